//! How much other brokers may ask of this one, and what becomes of those that may not: rates, work
//! under way, refusals, and the end of all dealings with a member that is none any more.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::time::Duration;

use crate::clock::UnixMillis;
use crate::federation::rate::{Allowance, Buckets};
use crate::federation::refusals::Tally;
use crate::federation::{MemberPolicy, Refusals, Refused, Used};
use crate::interface::{RefusalsView, SenderView};
use crate::migration::target::Event as TargetEvent;
use crate::migration::{AnswerBody, Denial, DenialCode, EnvelopeError};
use crate::placement::policy;
use crate::types::{MemberJid, MigrationId, PublicKey, VmId};
use crate::vm::VmSpec;

use super::Broker;
use super::effect::Effect;

/// Members whose requests are counted apart; as many as a room may have.
const MEMBERS_MAX: usize = 10_000;
/// Answers that tell a member it asks too often. Who goes on in spite of them gets none.
const WARNINGS: Allowance = Allowance::new(10.0, 2.0);
/// Checks and content requests of one member, and of all, that may be worked on at once.
const WORK_OF_MEMBER_MAX: usize = 8;
const WORK_MAX: usize = 32;
/// When a member that asks too much at once may ask again.
const WORK_PAUSE: Duration = Duration::from_millis(500);
/// New promises never to run a VM that was never here, for one member in a day: each is a file for good.
const PROMISES: Allowance = Allowance::new(100.0, 100.0 / 86_400.0);
/// Reservations of one member that nothing came of; those that ended with a hand-over do not count.
const ATTEMPTS: Allowance = Allowance::new(200.0, 200.0 / 3600.0);
/// Senders that a status names.
const SENDERS_SHOWN: usize = 20;

/// Whether a request is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    Fine,
    /// It is told to ask again after this long.
    Later(Duration),
    /// Not even that.
    Never,
}

/// How far members' clocks are ahead of ours, by what they signed last; the way it took is in it.
#[derive(Clone, Default)]
pub struct Clocks(BTreeMap<MemberJid, ClockSeen>);

#[derive(Clone, Copy)]
struct ClockSeen {
    issued: UnixMillis,
    ahead_ms: i64,
}

impl Clocks {
    pub fn ahead_ms(&self, member: &MemberJid) -> Option<i64> {
        self.0.get(member).map(|seen| seen.ahead_ms)
    }

    /// Takes note of a message whose signature is a trusted member's. One that is not `fresh` counts only if
    /// it is the latest: whoever carries messages may bring old ones again.
    pub fn note(&mut self, member: &MemberJid, issued: UnixMillis, now: UnixMillis, fresh: bool) {
        let ahead_ms = issued.0.cast_signed().saturating_sub(now.0.cast_signed());
        if fresh || self.0.get(member).is_none_or(|seen| seen.issued < issued) {
            self.0.insert(member.clone(), ClockSeen { issued, ahead_ms });
        }
    }
}

#[derive(Clone)]
pub struct Guard {
    requests: Buckets<MemberJid>,
    warnings: Buckets<MemberJid>,
    promises: Buckets<MemberJid>,
    attempts: Buckets<MemberJid>,
    /// Expensive requests being worked on, of each member.
    work: HashMap<MemberJid, usize>,
    pub refusals: Refusals,
}

impl Default for Guard {
    fn default() -> Self {
        Self {
            requests: Buckets::new(MEMBERS_MAX),
            warnings: Buckets::new(MEMBERS_MAX),
            promises: Buckets::new(MEMBERS_MAX),
            attempts: Buckets::new(MEMBERS_MAX),
            work: HashMap::new(),
            refusals: Refusals::default(),
        }
    }
}

impl Guard {
    /// Counts a request before anything of it is read.
    pub fn pace(&mut self, from: &MemberJid, per_minute: u32, now: UnixMillis) -> Pace {
        match self.requests.take(from, &Allowance::per_minute(per_minute), now) {
            Ok(()) => Pace::Fine,
            Err(wait) if self.warnings.take(from, &WARNINGS, now).is_ok() => Pace::Later(wait),
            Err(_) => Pace::Never,
        }
    }

    /// Whether one more promise may be recorded for the member's sake.
    pub fn may_promise(&mut self, from: &MemberJid, now: UnixMillis) -> bool {
        self.promises.take(from, &PROMISES, now).is_ok()
    }

    /// Whether one more reservation may be made for the member; else when.
    pub fn begin_attempt(&mut self, from: &MemberJid, now: UnixMillis) -> Result<(), Duration> {
        self.attempts.take(from, &ATTEMPTS, now)
    }

    /// A VM came by its reservation.
    pub fn end_well(&mut self, from: &MemberJid) {
        self.attempts.give_back(from, &ATTEMPTS);
    }

    /// Begins an expensive request, unless as many are under way as may be.
    pub fn begin_work(&mut self, from: &MemberJid) -> bool {
        let of_member = self.work.get(from).copied().unwrap_or(0);
        if of_member >= WORK_OF_MEMBER_MAX || self.work.values().sum::<usize>() >= WORK_MAX {
            return false;
        }
        self.work.insert(from.clone(), of_member + 1);
        true
    }

    /// It was answered.
    pub fn end_work(&mut self, from: &MemberJid) {
        if let Some(n) = self.work.get_mut(from) {
            *n -= 1;
            if *n == 0 {
                self.work.remove(from);
            }
        }
    }

    pub fn view(&self) -> RefusalsView {
        let words = |kinds: &BTreeMap<Refused, u64>| {
            kinds.iter().map(|(refused, n)| (refused.to_string(), *n)).collect::<BTreeMap<_, _>>()
        };
        let mut senders: Vec<_> = self
            .refusals
            .senders()
            .map(|(sender, kinds)| SenderView { sender: sender.to_owned(), by_kind: words(&kinds) })
            .collect();
        senders.sort_by_key(|s| std::cmp::Reverse(s.by_kind.values().sum::<u64>()));
        senders.truncate(SENDERS_SHOWN);
        RefusalsView { total: self.refusals.total(), by_kind: words(self.refusals.by_kind()), senders }
    }
}

/// What to tell a member that asks too often.
pub fn too_often(wait: Duration) -> AnswerBody {
    let text = "more requests than this cloud answers in that time";
    AnswerBody::Denied(Denial::new(DenialCode::RateLimited, text).retry_after(wait))
}

/// What to tell a member that asks too much at once.
pub fn too_much() -> AnswerBody {
    let text = format!("{WORK_OF_MEMBER_MAX} checks and content requests are worked on at once");
    AnswerBody::Denied(Denial::new(DenialCode::RateLimited, text).retry_after(WORK_PAUSE))
}

/// What kind of refusal a message is that cannot be opened.
pub fn kind_of(error: &EnvelopeError) -> Refused {
    match error {
        EnvelopeError::TooLarge(_) | EnvelopeError::TooShort | EnvelopeError::Malformed(_) => {
            Refused::Malformed
        }
        EnvelopeError::Signature => Refused::Signature,
        EnvelopeError::Version(_) => Refused::Version,
        EnvelopeError::WrongRecipient(_) => Refused::WrongRecipient,
        EnvelopeError::WrongSender { .. } => Refused::WrongSender,
        EnvelopeError::Expired { .. } | EnvelopeError::Unbounded => Refused::Expired,
        EnvelopeError::Replay => Refused::Replay,
        EnvelopeError::Flood => Refused::RateLimit,
    }
}

impl Broker {
    /// Counts a refusal, and logs it if it is news.
    pub(super) fn refuse(&mut self, from: &MemberJid, refused: Refused, reason: &dyn Display) {
        let now = self.now;
        if let Some(suppressed) = self.guard.refusals.refuse(from.as_str(), refused, now) {
            tracing::warn!(member = %from, kind = %refused, %reason, suppressed, "request refused");
        }
    }

    /// An answer that denies what no honest member asks for is counted as a refusal.
    pub(super) fn note_denial(&mut self, from: &MemberJid, answer: &AnswerBody) {
        let AnswerBody::Denied(denial) = answer else { return };
        match denial.code {
            DenialCode::NotYours => self.refuse(from, Refused::NotYours, &denial.text),
            DenialCode::HandOver => self.refuse(from, Refused::StaleEpoch, &denial.text),
            _ => {}
        }
    }

    /// Takes in what the data link refused, under the names of members where they have one.
    pub(super) fn link_refused(&mut self, refused: Vec<(Option<PublicKey>, Tally)>) {
        for (peer, mut tally) in refused {
            let member = self.members.all().find(|m| m.key.is_some() && m.key == peer);
            if let Some(member) = member {
                tally.sender = member.jid.to_string();
            }
            self.guard.refusals.add(&tally);
        }
    }

    /// Takes in what was refused because it came faster than it is worked off.
    pub(super) fn overrun(&mut self, refused: Vec<Tally>) {
        for mut tally in refused {
            if let Ok(from) = tally.sender.parse::<MemberJid>() {
                self.refuse(&from, tally.refused, &"it sends more requests than are worked off");
                tally.count -= 1;
            }
            self.guard.refusals.add(&tally);
        }
    }

    pub(super) fn policy_of(&self, member: &MemberJid) -> MemberPolicy {
        self.config.policy_of(member)
    }

    /// What VMs from `member` take here. `except` is a VM that would take its own earlier
    /// reservation's place.
    pub(super) fn used_by(&self, member: &MemberJid, except: Option<VmId>) -> Used {
        let came = |vm: &&super::vms::Vm| {
            vm.record.is_here() && vm.record.arrival.as_ref().is_some_and(|a| a.from == *member)
        };
        let here = self.vms.values().filter(came).map(|vm| &vm.record.spec);
        // Taken over already, and not ended yet: counted as here.
        let arriving = self.incoming.values().filter(|run| {
            run.is_unfinished()
                && run.comes_from(member)
                && !except.is_some_and(|vm| run.gives_way_to(vm, member))
                && !self.vms.get(&run.spec().id).is_some_and(|vm| vm.record.is_here())
        });
        let all = here.chain(arriving.map(super::incoming::Incoming::spec));
        all.fold(Used::default(), |sum, spec| sum.plus(policy::taken_by(spec)))
    }

    /// Why the rules for `member` do not let `spec` come from it.
    pub(super) fn policy_blockers(&self, member: &MemberJid, spec: &VmSpec) -> Vec<Denial> {
        policy::blockers(&self.limits_of(member), &self.used_by(member, Some(spec.id)), spec)
    }

    /// Tells the data link who may connect, and what is served to whom at most.
    pub(super) fn admit_members(&mut self) {
        // Who is trusted anew was not asked yet.
        self.someone_unmet = true;
        let trusted: Vec<_> = self.members.trusted().map(|(jid, key)| (jid.clone(), key)).collect();
        let cap = |jid: &MemberJid| self.policy_of(jid).bandwidth_bytes_per_s;
        let caps = trusted.iter().filter_map(|(jid, key)| Some((*key, cap(jid)?))).collect();
        let keys = trusted.iter().map(|(_, key)| *key).collect();
        self.emit(Effect::Admit { keys, caps });
    }

    /// A member's presence changed: `before` could connect until now. Of a room's many members it is one.
    pub(super) fn readmit(&mut self, member: &MemberJid, before: Option<PublicKey>) {
        match (before, self.members.admitted(member)) {
            (before, now) if before == now => {}
            (None, Some(key)) => {
                let cap = self.policy_of(member).bandwidth_bytes_per_s;
                self.emit(Effect::AdmitAlso(key, cap));
            }
            _ => self.admit_members(),
        }
    }

    /// Ends all dealings with a member that is none any more, or is not trusted any more: tickets,
    /// connections, and moves that can still be called off. VMs handed over stay where they are.
    pub(super) fn part_with(&mut self, member: &MemberJid, key: Option<PublicKey>) {
        self.admit_members();
        if let Some(key) = key {
            self.lent.forget(&key);
            self.emit(Effect::Part(key));
        }
        let leaving: Vec<MigrationId> = self
            .outgoing
            .iter()
            .filter(|(_, run)| run.view.progress.peer == *member)
            .map(|(id, _)| *id)
            .collect();
        let arriving: Vec<MigrationId> = self
            .incoming
            .iter()
            .filter(|(_, run)| run.comes_from(member) && run.is_leased())
            .map(|(id, _)| *id)
            .collect();
        tracing::warn!(%member, leaving = leaving.len(), arriving = arriving.len(), "parted with a member");
        for id in leaving {
            let _ = self.cancel_outgoing(id);
        }
        for id in arriving {
            self.incoming_event(id, TargetEvent::LeaseExpired);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jid(text: &str) -> MemberJid {
        text.parse().unwrap()
    }

    #[test]
    fn a_member_that_asks_too_often_is_told_and_then_ignored_and_others_are_not_slowed() {
        let (mut guard, now) = (Guard::default(), UnixMillis(1_000_000));
        let paces: Vec<_> = (0..1100).map(|_| guard.pace(&jid("a@x"), 6000, now)).collect();
        assert_eq!(paces.iter().filter(|p| **p == Pace::Fine).count(), 1000);
        assert_eq!(paces[1000..1010], vec![Pace::Later(Duration::from_millis(10)); 10]);
        assert!(paces[1010..].iter().all(|p| *p == Pace::Never));
        assert_eq!(guard.pace(&jid("b@x"), 6000, now), Pace::Fine);
        assert_eq!(guard.pace(&jid("a@x"), 6000, now.plus(Duration::from_millis(10))), Pace::Fine);
    }

    #[test]
    fn expensive_work_is_bounded_for_each_and_for_all() {
        let mut guard = Guard::default();
        let of = |guard: &mut Guard, name: &str| (0..100).filter(|_| guard.begin_work(&jid(name))).count();
        assert_eq!(of(&mut guard, "a@x"), WORK_OF_MEMBER_MAX);
        let rest = ["b@x", "c@x", "d@x", "e@x"].map(|name| of(&mut guard, name));
        assert_eq!(rest, [8, 8, 8, 0], "all together have as many as there are");
        guard.end_work(&jid("a@x"));
        assert_eq!(of(&mut guard, "e@x"), 1);
        assert_eq!(of(&mut guard, "a@x"), 0);
        for name in ["b@x", "c@x", "d@x"] {
            (0..8).for_each(|_| guard.end_work(&jid(name)));
        }
        assert_eq!(of(&mut guard, "f@x"), 8);
        for n in 0..1000 {
            if guard.begin_work(&jid(&format!("{n}@x"))) {
                guard.end_work(&jid(&format!("{n}@x")));
            }
        }
        assert_eq!(guard.work.len(), 3, "who waits for nothing is not remembered");
    }
}
