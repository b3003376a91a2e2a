//! Who owns which VM, as other members know it. A broker whose records may be older than what the others
//! saw asks them before it runs a VM, and every broker asks a member that comes online: a record
//! restored from a backup, or a second copy, is found out within seconds of seeing each other.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::clock::UnixMillis;
use crate::interface::{Problem, ProblemKind, Side, chain};
use crate::migration::envelope::VERSION;
use crate::migration::lineage::PAGE_LINKS_MAX;
use crate::migration::message::{CLAIMS_MAX, Claim, Known};
use crate::migration::ownership::Learnt;
use crate::migration::records::{UnconfirmedStart, VmRecord};
use crate::migration::{AnswerBody, Denial, DenialCode, Law, Lineage, Link, Links, RequestBody};
use crate::types::{LinkId, MemberJid, VmId};

use super::Broker;
use super::book::RecordError;
use super::continuity::{Mark, digest_of};
use super::effect::{Effect, Peer, Unanswered};
use super::hold::{Hold, Verb};
use super::pending::{Pending, Working};

/// How often members are asked that did not answer, or that run what is ours.
const MEET_EVERY: Duration = Duration::from_secs(5);
/// A member that runs what is ours learns so, and asks about it every few seconds. If it is online and did not for
/// so long, what it said was true once, and came late.
const DISPUTE_LAPSES: Duration = Duration::from_secs(60);

/// Another member runs a VM that is this cloud's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dispute {
    pub by: MemberJid,
    pub since: UnixMillis,
    /// When it said so last.
    pub said: UnixMillis,
}

/// Whom this broker still has to ask before it runs VMs by itself.
#[derive(Clone, Debug)]
pub struct Confirming {
    /// Why it asks.
    pub restored: bool,
    pub since: UnixMillis,
    pub awaited: BTreeSet<MemberJid>,
    /// Its operator was told that members are silent.
    pub warned: bool,
}

impl Broker {
    /// VMs that this cloud believes to own, as it claims them before others.
    fn claims(&self) -> Vec<Claim> {
        let here = self.vms.values().filter(|vm| vm.record.is_here());
        here.map(|vm| Claim {
            vm: vm.record.spec.id,
            tip: vm.record.origin.and_then(tip_of),
            epoch: vm.record.epoch,
            running: self.is_running(vm.record.spec.id),
        })
        .collect()
    }

    fn is_running(&self, vm: VmId) -> bool {
        !self.is_off(vm)
    }

    /// A member that comes online, or whose key is confirmed only now, is asked once for as long as it
    /// stays.
    pub(super) fn meet(&mut self, jid: &MemberJid) {
        let online = self.members.is_online(jid);
        match self.members.trusted_key(jid).ok().filter(|_| online) {
            Some(key) if self.met.insert(jid.clone()) => self.ask_owners(Peer { jid: jid.clone(), key }),
            Some(_) => {}
            None => drop(self.met.remove(jid)),
        }
    }

    /// Whom the last try did not reach, and, while VMs are held back or disputed, everybody again.
    pub(super) fn meet_members(&mut self) {
        let now = self.now;
        if now.since(self.met_at) < MEET_EVERY {
            return;
        }
        self.met_at = now;
        let members = &self.members;
        self.disputes.retain(|_, d| !members.is_online(&d.by) || now.since(d.said) < DISPUTE_LAPSES);
        if !self.disputes.is_empty() || self.vms.values().any(|vm| vm.record.disproved.is_some()) {
            self.forget_meetings();
        }
        if !std::mem::take(&mut self.someone_unmet) {
            return;
        }
        let online: Vec<MemberJid> = self.members.trusted().map(|(jid, _)| jid.clone()).collect();
        online.iter().for_each(|jid| self.meet(jid));
    }

    pub(super) fn forget_meetings(&mut self) {
        self.met.clear();
        self.someone_unmet = true;
    }

    /// Asks a member what it knows of the VMs here beyond what is known here.
    pub(super) fn ask_owners(&mut self, peer: Peer) {
        // One of the version before keeps no histories: it cannot say.
        if self.versions.get(&peer.jid).copied().unwrap_or(VERSION) < VERSION {
            return self.owners_answered(&peer.jid);
        }
        let claims = self.claims();
        let token = self.expect(Pending::Owners(peer.clone()));
        self.emit(Effect::AskOwners { token, of: peer, claims });
    }

    pub(super) fn owners_said(&mut self, peer: &Peer, said: Result<(), Unanswered>) {
        match said {
            Ok(()) => self.owners_answered(&peer.jid),
            Err(Unanswered(why)) => {
                tracing::info!(member = %peer.jid, error = why, "does not say which VMs it owns");
                self.met.remove(&peer.jid);
                self.someone_unmet = true;
            }
        }
    }

    /// What a member knows beyond another's claims.
    pub(super) fn answer_owners(&mut self, work: &Working) -> Option<AnswerBody> {
        let RequestBody::Owners { claims } = &work.request.body else { return None };
        if claims.len() > CLAIMS_MAX {
            let text = format!("at most {CLAIMS_MAX} VMs may be asked about at once");
            return Some(AnswerBody::Denied(Denial::new(DenialCode::Other, text)));
        }
        let looked = |claim: &Claim| {
            let record = self.vms.get(&claim.vm).map(|vm| Box::new(vm.record.clone()));
            (*claim, record, self.is_running(claim.vm))
        };
        let claims = claims.iter().map(looked).collect();
        let by = work.from.clone();
        let token = self.expect(Pending::OwnersKnown(work.clone()));
        self.emit(Effect::KnowOwners { token, by, claims });
        None
    }

    pub(super) fn owners_known(&mut self, work: &Working, known: Vec<Known>, disputed: &BTreeSet<VmId>) {
        let asked = match &work.request.body {
            RequestBody::Owners { claims } => claims.iter().map(|c| c.vm).collect(),
            _ => BTreeSet::new(),
        };
        self.answer_work(work, AnswerBody::Owners { known });
        self.disputed_by(&work.from.jid, &asked, disputed);
    }

    /// Which of our VMs a member runs as well, by what it said last.
    fn disputed_by(&mut self, by: &MemberJid, asked: &BTreeSet<VmId>, disputed: &BTreeSet<VmId>) {
        let now = self.now;
        self.disputes
            .retain(|vm, d| d.by != *by || disputed.contains(vm) || !asked.contains(vm) && !asked.is_empty());
        for vm in disputed {
            let known = self.disputes.get(vm).map(|d| d.since);
            if known.is_none() {
                tracing::error!(%vm, member = %by, "CONTESTED: this cloud owns the VM by its history, and {by} runs a copy it gave up");
            }
            let since = known.unwrap_or(now);
            self.disputes.insert(*vm, Dispute { by: by.clone(), since, said: now });
        }
    }

    /// A member showed a history beyond what is known here.
    pub(super) fn learn_of(&mut self, by: &Peer, vm: VmId, shown: &Lineage) {
        let now = self.now;
        let scrub_after = now.plus(self.config.migration.grace_period);
        let known = match self.known(vm) {
            Ok(known) => known,
            Err(e) => return tracing::error!(%vm, error = chain(&e), "what is known of the VM is damaged"),
        };
        let (me, stands_still) = (self.key.public(), self.may(Verb::LetGo, vm).is_ok());
        let learnt = self.book.law().learn(
            self.standing(vm, &known),
            shown,
            &me,
            !stands_still,
            &by.jid,
            (now, scrub_after),
        );
        let (record, lineage) = match learnt {
            Learnt::Nothing => return,
            Learnt::Contradicts => {
                return tracing::error!(%vm, member = %by.jid, "shows another history of the VM than this cloud's: neither goes on from the other");
            }
            Learnt::Longer(lineage) => (None, Some(lineage)),
            Learnt::Ours(record, lineage) => (Some(record), Some(lineage)),
            Learnt::GivenUp(record, lineage) => {
                let to = record.given_up().map(|g| g.to.to_string()).unwrap_or_default();
                tracing::error!(vm = %record.spec.name, %to, member = %by.jid, epoch = record.epoch + 1, "this cloud's record is older than the VM's history: it was given up since, and is not run here");
                (Some(record), Some(lineage))
            }
            Learnt::Disproved(record) => {
                tracing::error!(vm = %record.spec.name, member = %by.jid, "CONTESTED: the VM runs here, and its history says that this cloud gave it up: see 'cicada vm show {}'", record.spec.name);
                (Some(record), None)
            }
        };
        let kept = lineage.map_or(Ok(()), |lineage| self.keep_lineage(&lineage));
        let saved = kept.and_then(|()| match &record {
            Some(record) => self.book.save_ownership(record),
            None => Ok(()),
        });
        if let Err(e) = saved {
            return tracing::error!(%vm, error = chain(&e), "what a member showed is not recorded; it is asked again");
        }
        if let (Some(record), Some(entry)) = (record, self.vms.get_mut(&vm)) {
            let pending = entry.record.given_up().filter(|g| g.in_doubt()).map(|g| g.migration);
            entry.record = *record;
            // What an old record was waiting for is decided.
            if let Some(id) = pending {
                self.lets_go(vm, Hold::Moving(id));
                self.resolved_outgoing(id, Side::There);
            }
        }
        self.presence_changed();
    }

    /// A member said all it knows.
    fn owners_answered(&mut self, by: &MemberJid) {
        if let Some(confirming) = &mut self.confirming {
            confirming.awaited.remove(by);
        }
        self.confirm_if_all_said();
    }

    // --- before the first run ---

    /// At start: asks whoever may know more than the records here, unless these are proven to be the
    /// newest.
    pub(super) fn begin_confirming(&mut self) {
        let awaited = self.could_know();
        if awaited.is_empty() {
            return;
        }
        let mut restored = self.after_restore;
        let mut held = 0;
        // Those given up as well: what an old record waits for may bring them back.
        for vm in self.vms.values_mut() {
            let mark = self.marks.mark(&vm.record);
            vm.confirmed = mark == Mark::Same && !self.after_restore;
            restored |= mark == Mark::Other;
            held += usize::from(vm.record.is_here() && !vm.confirmed);
        }
        if self.vms.values().all(|vm| vm.confirmed) && !self.after_restore {
            return;
        }
        if held > 0 {
            tracing::warn!(
                members = awaited.len(),
                vms = held,
                restored,
                "the records here may be older than what others know: members are asked before a VM is started"
            );
        }
        self.confirming = Some(Confirming { restored, since: self.now, awaited, warned: false });
    }

    fn confirm_if_all_said(&mut self) {
        let over = self.confirming.as_ref().is_some_and(|c| c.awaited.is_empty());
        if over {
            self.confirming = None;
            tracing::info!("all members were asked: VMs may be started");
            self.confirmed_by_all();
            self.noted = u64::MAX;
        }
    }

    fn confirmed_by_all(&mut self) {
        let waiting: Vec<VmId> = self.vms.iter().filter(|(_, vm)| !vm.confirmed).map(|(id, _)| *id).collect();
        for id in &waiting {
            if let Some(vm) = self.vms.get_mut(id) {
                vm.confirmed = true;
            }
        }
        self.start_in_order(waiting);
    }

    /// Who is not a member any more, or not trusted, is not waited for.
    pub(super) fn review_confirming(&mut self) {
        let (members, Some(confirming)) = (&self.members, &mut self.confirming) else { return };
        // Those of `could_know`, one of which this cloud itself never is.
        confirming.awaited.retain(|jid| members.believes(jid));
        self.confirm_if_all_said();
    }

    /// Members to whom a VM may have gone.
    fn could_know(&self) -> BTreeSet<MemberJid> {
        self.members.believed().filter(|jid| **jid != self.me).cloned().collect()
    }

    /// Why a VM is not run yet, if those that may know more were not asked.
    pub(super) fn unconfirmed(&self, vm: VmId) -> Option<Problem> {
        let entry = self.vms.get(&vm).filter(|vm| vm.record.is_here() && !vm.confirmed)?;
        let confirming = self.confirming.as_ref()?;
        let name = &entry.record.spec.name;
        let silent: Vec<_> = confirming.awaited.iter().map(MemberJid::to_string).collect();
        let why = match confirming.restored {
            true => "its record, or another, was put back from a backup",
            false => "this machine was booted, or its records replaced, since the broker last ran",
        };
        let reason = format!(
            "is not run before it is known that no other cloud owns it: {why}, and {} may know more and did not \
             say yet",
            silent.join(", ")
        );
        let next = match self.is_unconfirmed_for_long() {
            false => "wait until they are online".to_owned(),
            true => format!(
                "bring them online, or revoke who is gone for good; or, sure that the VM runs nowhere else: \
                 cicada vm start {name} --unconfirmed"
            ),
        };
        Some(Problem::new(ProblemKind::Conflict, format!("VM {name}"), reason).next(next))
    }

    /// An operator starts a VM although not all were asked; who, when and against whose silence is recorded.
    pub(super) fn confirm_by_word(&mut self, vm: VmId, by_uid: Option<u32>) -> Result<(), RecordError> {
        let Some(entry) = self.vms.get_mut(&vm).filter(|vm| !vm.confirmed) else { return Ok(()) };
        let silent =
            self.confirming.as_ref().map(|c| c.awaited.iter().cloned().collect()).unwrap_or_default();
        let mut record = entry.record.clone();
        let start = UnconfirmedStart { at: self.now, by_uid, silent };
        tracing::warn!(vm = %record.spec.name, ?by_uid, silent = ?start.silent, "an operator starts a VM without the word of those that may know more");
        record.unconfirmed_start = Some(start);
        self.book.save_vm(&record)?;
        (entry.record, entry.confirmed) = (record, true);
        Ok(())
    }

    /// Members that were silent for long are named once.
    pub(super) fn warn_unconfirmed(&mut self) {
        let over = self.is_unconfirmed_for_long();
        let held = self.vms.values().filter(|vm| !vm.confirmed && vm.record.is_here()).count();
        if let Some(c) = self.confirming.as_mut().filter(|c| over && !c.warned) {
            c.warned = true;
            tracing::error!(vms = held, silent = ?c.awaited, "VMs are held back: members that may own them by now do not answer; see 'cicada vm show'");
        }
    }

    /// Keeps the mark of what this machine did last, of all that is confirmed.
    pub(super) fn note_continuity(&mut self) {
        let changes = self.book.changes();
        if changes == self.noted {
            return;
        }
        self.noted = changes;
        let confirmed = self.vms.values().filter(|vm| vm.confirmed);
        let marks = confirmed.map(|vm| (vm.record.spec.id, digest_of(&vm.record))).collect();
        self.emit(Effect::Mark(marks));
    }

    /// A VM of ours that another member runs as well, in words.
    pub(super) fn disputed(&self, vm: VmId) -> Option<Problem> {
        let dispute = self.disputes.get(&vm)?;
        let entry = self.vms.get(&vm).filter(|vm| vm.record.is_here())?;
        let reason = format!(
            "is this cloud's by its history, and {} runs a copy that it gave up, from a backup perhaps",
            dispute.by
        );
        Some(
            Problem::new(ProblemKind::Conflict, format!("VM {}", entry.record.spec.name), reason)
                .next(format!("let the operator of {} stop it there; this one may run on", dispute.by)),
        )
    }

    /// A VM that runs here and was given up, as another member shows, in words.
    pub(super) fn disproved(&self, record: &VmRecord) -> Option<Problem> {
        let d = record.disproved.as_ref()?;
        let h = d.hand_over()?;
        let name = &record.spec.name;
        let reason = format!(
            "was given to {} under epoch {}, as {} shows by this cloud's own signature; the record here is older",
            h.target, h.epoch, d.by
        );
        Some(Problem::new(ProblemKind::Conflict, format!("VM {name}"), reason).next(format!(
            "save what only this copy has, then 'cicada vm stop {name}' and 'cicada migration resolve {} --owner \
             there'", h.migration
        )))
    }

    /// Whether the time is over in which silent members are waited for without a word.
    pub(super) fn is_unconfirmed_for_long(&self) -> bool {
        let patience = self.config.migration.confirm_patience;
        self.confirming.as_ref().is_some_and(|c| self.now.since(c.since) >= patience)
    }
}

fn tip_of(origin: crate::migration::handover::Origin) -> Option<LinkId> {
    match origin {
        crate::migration::handover::Origin::Born => None,
        crate::migration::handover::Origin::After(id) => Some(id),
    }
}

/// What is known of these VMs beyond what is claimed, within one answer's bound; and which of them the one who
/// claims runs although it gave them up. `kept` is the history that is kept beside each record.
pub fn known_beyond(
    by: &Peer,
    claims: impl Iterator<Item = (Claim, Option<Box<VmRecord>>, bool)>,
    kept: impl Fn(VmId) -> Option<Lineage>,
) -> (Vec<Known>, BTreeSet<VmId>) {
    let (mut known, mut disputed, mut budget) = (Vec::new(), BTreeSet::new(), PAGE_LINKS_MAX);
    for (claim, record, running) in claims {
        let Some(kept) = kept(claim.vm) else { continue };
        let lineage = Law::WHOLE.known(kept, record.as_deref());
        let here = record.as_deref().is_some_and(VmRecord::is_here);
        let Some(more) = beyond(&lineage, &claim, here) else { continue };
        // It once was the owner by this very history, and runs the VM still: not a stranger's claim.
        if here && claim.running && was_owner(&lineage, &claim, by) {
            disputed.insert(claim.vm);
        }
        let links: Vec<Link> = more.iter().take(budget).cloned().collect();
        budget -= links.len();
        let more = links.len() < more.len();
        let successions = lineage.successions().clone();
        known.push(Known { vm: claim.vm, links: Links(links), successions, more, here, running });
    }
    (known, disputed)
}

/// The links that `claim` does not know of; none if it may be the later one.
fn beyond<'a>(lineage: &'a Lineage, claim: &Claim, here: bool) -> Option<&'a [Link]> {
    let links = match &claim.tip {
        Some(tip) if lineage.position(tip).is_some() => lineage.since(Some(tip)),
        None => lineage.links(),
        // Unknown here: later than what is known, or another history.
        Some(_) if here => lineage.links(),
        Some(_) => return None,
    };
    (!links.is_empty() || here && claim.tip.is_some_and(|tip| lineage.position(&tip).is_none()))
        .then_some(links)
}

/// Whether the sender of a claim owned the VM by the link that it names.
fn was_owner(lineage: &Lineage, claim: &Claim, peer: &Peer) -> bool {
    let gave = |link: &Link| {
        let keys = lineage.successions();
        link.hand_over.read().is_ok_and(|h| keys.leads(&h.source_key, &peer.key))
    };
    match &claim.tip {
        Some(tip) if lineage.position(tip).is_some() => lineage.since(Some(tip)).first().is_some_and(gave),
        // A history of its own, after it gave the VM away.
        Some(_) => lineage.links().iter().any(gave),
        None => lineage.links().first().is_some_and(gave),
    }
}
