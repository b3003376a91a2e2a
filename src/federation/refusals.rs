//! What was refused, to whom and why: counted by kind and by sender, and told once for each until it
//! was quiet for a while. Bounded in memory; fed with the time.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::types::kinds;

/// Senders told apart at most; the rest are counted together.
const SENDERS_MAX: usize = 1000;
/// A sender's name is cut to this.
const SENDER_BYTES_MAX: usize = 128;
/// How long the same refusal of the same sender is not told again.
const QUIET: Duration = Duration::from_secs(600);
/// Who is counted together with others beyond [`SENDERS_MAX`].
pub const OTHERS: &str = "others";

kinds! {
    /// Why something was refused that no honest, healthy peer asks for. Ordinary denials, such as
    /// too little memory, are none.
    Refused {
        /// A message that was seen before.
        Replay = "replay",
        /// A message that expired, or a clock that is far off.
        Expired = "expired",
        /// A signature that is not by the sender's key.
        Signature = "signature",
        /// A message addressed to somebody else.
        WrongRecipient = "wrong-recipient",
        /// A message that names another sender than it has.
        WrongSender = "wrong-sender",
        /// A version that is not spoken here.
        Version = "version",
        /// No member of the federation.
        NotMember = "not-member",
        /// A member whose key nobody confirmed, or that shows none.
        UntrustedKey = "untrusted-key",
        /// A member that shows another key than the pinned one.
        ChangedKey = "changed-key",
        /// A VM, migration or ticket that is another member's.
        NotYours = "not-yours",
        /// A hand-over that is forged, stale or another's, or an epoch that is over.
        StaleEpoch = "stale-epoch",
        /// More than is allowed in that time.
        RateLimit = "rate-limit",
        /// What cannot be read or is too large, or a handshake that fails.
        Malformed = "malformed",
        /// A transfer ticket that is not known or does not cover what is asked for.
        Ticket = "ticket",
        /// An address to fetch from that is not dialled from here.
        Address = "address",
    }
}

/// Refusals of one kind to one sender, gathered elsewhere.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Tally {
    pub sender: String,
    pub refused: Refused,
    pub count: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    count: u64,
    /// Of `count`, what [`Refusals::take_new`] did not tell yet.
    new: u64,
    told: Option<UnixMillis>,
    /// Since it was told.
    suppressed: u64,
}

/// The counts, and what was logged of them.
#[derive(Clone, Debug, Default)]
pub struct Refusals {
    senders: BTreeMap<String, BTreeMap<Refused, Entry>>,
    by_kind: BTreeMap<Refused, u64>,
}

impl Refusals {
    /// Counts a refusal. `Some` if it is to be logged, with how many like it were not.
    pub fn refuse(&mut self, sender: &str, refused: Refused, now: UnixMillis) -> Option<u64> {
        let entry = self.count(sender, refused, 1);
        if entry.told.is_some_and(|told| now.since(told) < QUIET) {
            entry.suppressed += 1;
            return None;
        }
        entry.told = Some(now);
        Some(std::mem::take(&mut entry.suppressed))
    }

    /// Counts what was refused, and logged, elsewhere.
    pub fn add(&mut self, tally: &Tally) {
        self.count(&tally.sender, tally.refused, tally.count);
    }

    fn count(&mut self, sender: &str, refused: Refused, n: u64) -> &mut Entry {
        let cut = (0..=sender.len().min(SENDER_BYTES_MAX)).rev().find(|i| sender.is_char_boundary(*i));
        let sender = &sender[..cut.unwrap_or(0)];
        let known = self.senders.contains_key(sender) || self.senders.len() < SENDERS_MAX;
        let name = if known { sender } else { OTHERS };
        let total = self.by_kind.entry(refused).or_default();
        *total = total.saturating_add(n);
        let entry = self.senders.entry(name.to_owned()).or_default().entry(refused).or_default();
        entry.count = entry.count.saturating_add(n);
        entry.new = entry.new.saturating_add(n);
        entry
    }

    /// What was counted since the last call.
    pub fn take_new(&mut self) -> Vec<Tally> {
        let all = self.senders.iter_mut().flat_map(|(sender, kinds)| {
            kinds.iter_mut().map(move |(refused, entry)| Tally {
                sender: sender.clone(),
                refused: *refused,
                count: std::mem::take(&mut entry.new),
            })
        });
        all.filter(|tally| tally.count > 0).collect()
    }

    pub fn total(&self) -> u64 {
        self.by_kind.values().fold(0, |sum, n| sum.saturating_add(*n))
    }

    pub fn by_kind(&self) -> &BTreeMap<Refused, u64> {
        &self.by_kind
    }

    /// All senders that are told apart, with what they were refused.
    pub fn senders(&self) -> impl Iterator<Item = (&str, BTreeMap<Refused, u64>)> {
        self.senders.keys().map(|sender| (sender.as_str(), self.of(sender)))
    }

    /// What one sender was refused.
    pub fn of(&self, sender: &str) -> BTreeMap<Refused, u64> {
        let kinds = self.senders.get(sender).into_iter().flatten();
        kinds.map(|(refused, entry)| (*refused, entry.count)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(s: u64) -> UnixMillis {
        UnixMillis(1_000_000 + s * 1000)
    }

    #[test]
    fn a_flood_is_told_once_and_then_again_after_a_while_with_its_number() {
        let mut r = Refusals::default();
        let told: Vec<_> = (0..100).filter_map(|_| r.refuse("eve@x", Refused::Replay, at(0))).collect();
        assert_eq!(told, [0]);
        assert_eq!(r.refuse("eve@x", Refused::Signature, at(1)), Some(0), "another kind is news");
        assert_eq!(r.refuse("bob@x", Refused::Replay, at(1)), Some(0), "so is another sender");
        assert_eq!(r.refuse("eve@x", Refused::Replay, at(599)), None);
        assert_eq!(r.refuse("eve@x", Refused::Replay, at(600)), Some(100));
        assert_eq!(r.total(), 104);
        assert_eq!(r.by_kind()[&Refused::Replay], 103);
        assert_eq!(r.of("eve@x")[&Refused::Replay], 102);
        assert!(r.of("carol@x").is_empty());
    }

    #[test]
    fn many_senders_take_no_more_memory_than_some_and_are_counted_still() {
        let mut r = Refusals::default();
        let names = (0..5000).map(|n| format!("{n}@x"));
        let told = names.filter(|name| r.refuse(name, Refused::NotMember, at(0)).is_some()).count();
        assert_eq!((told, r.senders.len()), (SENDERS_MAX + 1, SENDERS_MAX + 1));
        assert_eq!((r.total(), r.of(OTHERS)[&Refused::NotMember]), (5000, 4000));
        r.refuse(&"ü".repeat(5000), Refused::NotMember, at(0));
        let mut r = Refusals::default();
        r.refuse(&format!("a{}", "ü".repeat(5000)), Refused::NotMember, at(0));
        assert!(r.senders.keys().all(|name| name.len() <= SENDER_BYTES_MAX));
    }

    #[test]
    fn what_is_gathered_elsewhere_arrives_once() {
        let (mut there, mut here) = (Refusals::default(), Refusals::default());
        for _ in 0..3 {
            there.refuse("192.0.2.1", Refused::NotMember, at(0));
        }
        for tally in there.take_new() {
            here.add(&tally);
        }
        assert_eq!(there.take_new(), []);
        there.refuse("192.0.2.1", Refused::NotMember, at(1));
        there.take_new().iter().for_each(|tally| here.add(tally));
        assert_eq!((here.total(), here.of("192.0.2.1")[&Refused::NotMember]), (4, 4));
    }
}
