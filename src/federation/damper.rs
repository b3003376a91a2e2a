//! Members whose presence changes all the time: the newest state counts, and it is looked at only as
//! often as is reasonable. Fed with the time.

use std::collections::BTreeMap;

use crate::clock::UnixMillis;
use crate::types::MemberJid;

use super::Presence;
use super::rate::{Allowance, Buckets};

/// What a broker that follows the rules never reaches: it speaks at most every two seconds.
const ALLOWANCE: Allowance = Allowance::new(20.0, 1.0);
/// Members told apart; as many as a room may have.
const MEMBERS_MAX: usize = 10_000;
/// Sessions of one member held back at most; what comes beyond is dropped.
const HELD_MAX: usize = 8;

#[derive(Debug)]
pub struct Damper {
    buckets: Buckets<MemberJid>,
    /// The newest presence of sessions that spoke too often.
    held: BTreeMap<(MemberJid, String), Presence>,
}

impl Default for Damper {
    fn default() -> Self {
        Self { buckets: Buckets::new(MEMBERS_MAX), held: BTreeMap::new() }
    }
}

impl Damper {
    /// Gives the presence back if it may be looked at now; else it comes with [`Damper::due`],
    /// unless a newer one of the same session takes its place.
    pub fn offer(&mut self, presence: Presence, now: UnixMillis) -> Option<Presence> {
        let from = (presence.jid.clone(), String::new());
        let held = self.held.range(from..).take_while(|((jid, _), _)| *jid == presence.jid).count();
        if held == 0 && self.buckets.take(&presence.jid, &ALLOWANCE, now).is_ok() {
            return Some(presence);
        }
        let key = (presence.jid.clone(), presence.resource.clone());
        if held < HELD_MAX || self.held.contains_key(&key) {
            self.held.insert(key, presence);
        }
        None
    }

    /// What was held back and may be looked at now.
    pub fn due(&mut self, now: UnixMillis) -> Vec<Presence> {
        let ready: Vec<_> = self
            .held
            .keys()
            .filter(|(jid, _)| self.buckets.take(jid, &ALLOWANCE, now).is_ok())
            .cloned()
            .collect();
        ready.iter().filter_map(|key| self.held.remove(key)).collect()
    }

    /// What was held back of this member is of no interest any more.
    pub fn forget(&mut self, member: &MemberJid) {
        self.held.retain(|(jid, _), _| jid != member);
    }

    /// Nobody is here any more.
    pub fn clear(&mut self) {
        self.held.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn presence(jid: &str, resource: &str, available: bool) -> Presence {
        Presence { jid: jid.parse().unwrap(), resource: resource.into(), available, cloud: None }
    }

    fn at(ms: u64) -> UnixMillis {
        UnixMillis(1_000_000 + ms)
    }

    #[test]
    fn churn_is_damped_and_its_last_word_counts() {
        let mut d = Damper::default();
        let passed = (0..1001).filter(|n| d.offer(presence("a@x", "r", n % 2 == 1), at(0)).is_some()).count();
        assert_eq!(passed, 20);
        assert!(d.offer(presence("b@x", "r", true), at(0)).is_some(), "another member is heard");
        assert_eq!(d.due(at(0)), []);
        assert_eq!(d.due(at(1000)), [presence("a@x", "r", false)]);
        assert_eq!(d.due(at(2000)), []);
    }

    #[test]
    fn many_sessions_of_one_member_take_bounded_memory() {
        let mut d = Damper::default();
        for n in 0..50_000 {
            d.offer(presence("a@x", &n.to_string(), true), at(0));
        }
        assert_eq!(d.held.len(), HELD_MAX);
        assert_eq!(d.due(at(3000)).len(), 3);
        d.clear();
        assert_eq!(d.due(at(60_000)), []);
    }
}
