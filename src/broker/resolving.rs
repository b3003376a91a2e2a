//! Hand-overs in doubt that an operator decides: `cicada migration resolve`. The decision is written
//! before anything follows from it, and the other cloud is asked until it has said what it knows.
//! What comes late is never passed over: a VM that turns out to have two owners is *contested*.

use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::interface::{Problem, ProblemKind, chain};
use crate::interface::{Reply, ResolutionView, Side};
use crate::migration::handover::{HandOver, Receipt, Return, SignedHandOver};
use crate::migration::records::{GivenUp, VERSION, VmRecord};
use crate::migration::target::Event as TargetEvent;
use crate::migration::{AnswerBody, Denial, DenialCode, Envelope, RequestBody};
use crate::types::{MemberJid, MigrationId, PublicKey, VmId, VmName};

use super::Broker;
use super::book::{RecordError, ReturnRecord};
use super::effect::{Effect, Matter, Peer};
use super::hold::{Hold, Verb};
use super::incoming::Answered;
use super::resolution_words as words;

/// An operator's decision, kept for good.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Resolution {
    pub version: u32,
    pub migration: MigrationId,
    pub vm: VmId,
    pub name: VmName,
    pub peer: MemberJid,
    pub owner: Side,
    /// Who called the API, where the system tells.
    pub by_uid: Option<u32>,
    pub at: UnixMillis,
    /// What the operator was told and agreed to.
    pub statement: String,
    /// At the source: the hand-over as it was.
    pub given: Option<Box<GivenUp>>,
    pub outcome: Outcome,
}

/// What became of a decision.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum Outcome {
    /// The other cloud has not said yet what it knows.
    Awaited,
    /// Its word agrees with the decision, or none is needed.
    Agreed { at: UnixMillis },
    /// Taken back here, but the other cloud had taken it over.
    Contested { since: UnixMillis },
    /// Left to the other cloud, which had not taken it: taken back, if the copy was still there.
    Reverted { at: UnixMillis },
    /// Contested, until the operator said which one counts.
    Settled { owner: Side, by_uid: Option<u32>, at: UnixMillis },
}

impl Resolution {
    fn hand_over(&self) -> Option<HandOver> {
        self.given.as_ref()?.hand_over().ok()
    }

    pub fn is_contested(&self) -> bool {
        matches!(self.outcome, Outcome::Contested { .. })
    }
}

/// What a decision does.
#[derive(Clone, Debug)]
enum Act {
    /// At the source: ours again, under the epoch after the one given away.
    TakeBack,
    /// At the source: the target's, without its receipt.
    Accept,
    /// At the source, contested: which of the two counts.
    Settle(Side),
    /// At the target: never to run the VM under the epoch.
    Promise { epoch: u64, hand_over: Option<SignedHandOver> },
    /// At the target, contested: ours, whatever the source says.
    Keep,
    /// Given up long ago, as another cloud shows: the copy here is let go of.
    Concede,
}

struct Decision {
    act: Act,
    vm: VmId,
    name: VmName,
    peer: Peer,
    statement: String,
    checks: Vec<String>,
}

impl Broker {
    /// Says what a decision risks, or, once `confirmed`, records it and lets it happen.
    pub(super) fn resolve(
        &mut self,
        text: &str,
        owner: Side,
        confirmed: bool,
        by_uid: Option<u32>,
    ) -> Result<Reply, Problem> {
        let id = self.resolvable(text)?;
        let d = self.decision(id, owner)?;
        if confirmed {
            self.act(id, owner, by_uid, &d)?;
        }
        Ok(Reply::Resolution(Box::new(ResolutionView {
            migration: id,
            vm: d.name,
            vm_id: d.vm,
            owner,
            fingerprint: d.peer.key.fingerprint(),
            peer: d.peer.jid,
            statement: d.statement,
            checks: d.checks,
            done: confirmed,
        })))
    }

    /// The one migration whose id begins so and about which something can be in doubt.
    fn resolvable(&self, text: &str) -> Result<MigrationId, Problem> {
        let given = self.vms.values().filter_map(|vm| vm.record.given_up()).filter(|g| g.in_doubt());
        let arrived = self.vms.values().filter_map(|vm| vm.record.arrival.as_ref());
        let arrived = arrived.filter(|a| a.is_open()).map(|a| a.migration);
        let contested = self.resolutions.values().filter(|r| r.is_contested()).map(|r| r.migration);
        let disproved = self.vms.values().filter_map(|vm| vm.record.disproved.as_ref()?.hand_over());
        let arriving = self.incoming.iter().filter(|(_, r)| r.is_unfinished()).map(|(id, _)| *id);
        let mut found: Vec<_> = given.map(|g| g.migration).chain(arrived).chain(contested).collect();
        found.extend(disproved.map(|h| h.migration));
        found.extend(arriving.chain(self.unanswered.keys().copied()));
        found.retain(|id| text.len() >= 4 && id.to_string().starts_with(text));
        found.sort();
        found.dedup();
        match found.as_slice() {
            [id] => Ok(*id),
            [] => {
                let p = self.migration(text)?.progress;
                let reason = match p.ended {
                    true => format!("is not in doubt: it has ended ({})", p.phase),
                    false => format!("is not in doubt: its phase is {}", p.phase),
                };
                Err(Problem::new(ProblemKind::Conflict, format!("migration {}", p.id), reason)
                    .next(format!("see 'cicada migration show {}'", p.id)))
            }
            _ => Err(Problem::new(ProblemKind::BadRequest, format!("migration {text}"), "several begin so")
                .next("write more digits")),
        }
    }

    fn decision(&self, id: MigrationId, owner: Side) -> Result<Decision, Problem> {
        let disproved = |vm: &&super::vms::Vm| {
            vm.record.disproved.as_ref().and_then(|d| d.hand_over()).is_some_and(|h| h.migration == id)
        };
        if let Some(vm) = self.vms.values().find(disproved) {
            return self.concession(&vm.record, id, owner);
        }
        if let Some(r) = self.resolutions.get(&id).filter(|r| r.is_contested()) {
            return self.settlement(r, owner);
        }
        let given = self.vms.values().find(|vm| vm.record.given_up().is_some_and(|g| g.migration == id));
        if let Some((vm, g)) = given.and_then(|vm| Some((vm, vm.record.given_up()?))) {
            if self.outgoing.get(&id).is_some_and(|run| !run.in_doubt(self.now)) {
                return Err(conflict(id, "is being handed over right now")
                    .next("wait: it counts as in doubt once the target has not answered for a while"));
            }
            let (act, (statement, checks)) = match owner {
                Side::Here => (Act::TakeBack, words::take_back(&vm.record, g)),
                Side::There => {
                    (Act::Accept, words::accept(&vm.record, g, self.config.migration.grace_period))
                }
            };
            let peer = Peer { jid: g.to.clone(), key: g.to_key };
            let (vm, name) = (vm.record.spec.id, vm.record.spec.name.clone());
            return Ok(Decision { act, vm, name, peer, statement, checks });
        }
        self.target_decision(id, owner)
    }

    /// A VM that this cloud gave up, as its own signature shows: it can only let go of it.
    fn concession(&self, record: &VmRecord, id: MigrationId, owner: Side) -> Result<Decision, Problem> {
        let (vm, name) = (record.spec.id, record.spec.name.clone());
        let h = record.disproved.as_ref().and_then(|d| d.hand_over());
        let h = h.ok_or_else(|| conflict(id, "what was shown of it is unreadable"))?;
        if owner == Side::Here {
            let reason =
                format!("this cloud's own signature gave the VM to {} under epoch {}", h.target, h.epoch);
            let next = "move it here from the cloud that owns it, or adopt this copy's disk as another VM";
            return Err(conflict(id, &reason).next(next));
        }
        self.lets_itself_go(vm, &name)?;
        let peer = Peer { jid: h.target.clone(), key: h.target_key };
        let (statement, checks) = words::concede(&name, &h, self.config.migration.grace_period);
        Ok(Decision { act: Act::Concede, vm, name, peer, statement, checks })
    }

    fn concede(&mut self, vm: VmId) -> Result<(), RecordError> {
        let now = self.now;
        let scrub_after = now.plus(self.config.migration.grace_period);
        let Some(entry) = self.vms.get_mut(&vm) else { return Ok(()) };
        let Ok(record) = self.book.law().concede(&entry.record, now, scrub_after) else { return Ok(()) };
        self.book.save_ownership(&record)?;
        entry.record = record;
        self.emit(Effect::Undefine(vm));
        // What was shown in full is asked for again: the history goes on from there.
        self.forget_meetings();
        self.presence_changed();
        Ok(())
    }

    fn settlement(&self, r: &Resolution, owner: Side) -> Result<Decision, Problem> {
        let given = r.given.as_ref().ok_or_else(|| conflict(r.migration, "its record is incomplete"))?;
        let mine = self.vms.get(&r.vm).filter(|vm| vm.record.is_here());
        if owner == Side::There && mine.is_some() {
            self.lets_itself_go(r.vm, &r.name)?;
        }
        let grace = self.config.migration.grace_period;
        let (statement, checks) = words::settle(r, owner, grace);
        let peer = Peer { jid: given.to.clone(), key: given.to_key };
        Ok(Decision { act: Act::Settle(owner), vm: r.vm, name: r.name.clone(), peer, statement, checks })
    }

    fn target_decision(&self, id: MigrationId, owner: Side) -> Result<Decision, Problem> {
        let unknown = || conflict(id, "nothing of it is in doubt here");
        let arrived =
            self.vms.values().map(|vm| &vm.record).find(|r| {
                r.is_here() && r.arrival.as_ref().is_some_and(|a| a.migration == id && a.is_open())
            });
        if let Some((record, a)) = arrived.and_then(|r| Some((r, r.arrival.as_ref()?))) {
            let (vm, name) = (record.spec.id, record.spec.name.clone());
            let peer = Peer { jid: a.from.clone(), key: a.from_key };
            if owner == Side::Here {
                if a.contested.is_none() {
                    return Err(conflict(id, "the VM is this cloud's already"));
                }
                let (statement, checks) = words::keep(&name, &peer);
                return Ok(Decision { act: Act::Keep, vm, name, peer, statement, checks });
            }
            self.lets_itself_go(vm, &name)?;
            let (statement, checks) = words::give_back(&name, record.epoch, &peer);
            let act = Act::Promise { epoch: record.epoch, hand_over: Some(a.receipt.hand_over.clone()) };
            return Ok(Decision { act, vm, name, peer, statement, checks });
        }
        let (vm, name, epoch, peer, hand_over) = match (self.unanswered.get(&id), self.incoming.get(&id)) {
            (Some((peer, signed)), _) => {
                let h = signed.verify().map_err(|_| unknown())?;
                let name = VmName::unknown(h.vm);
                (h.vm, name, h.epoch, peer.clone(), Some(signed.clone()))
            }
            (None, Some(run)) => {
                let (matter, peer) = run.about();
                (matter.vm, run.spec().name.clone(), matter.epoch + 1, peer.clone(), None)
            }
            (None, None) => return Err(unknown()),
        };
        if owner == Side::Here {
            let reason = "cannot be made this cloud's: that takes the source's signed hand-over";
            return Err(
                conflict(id, reason).next(format!("the source decides; its operator is {}", peer.jid))
            );
        }
        let (statement, checks) = words::promise(&name, epoch, &peer);
        Ok(Decision { act: Act::Promise { epoch, hand_over }, vm, name, peer, statement, checks })
    }

    fn lets_itself_go(&self, vm: VmId, name: &VmName) -> Result<(), Problem> {
        self.may(Verb::LetGo, vm).map_err(|no| self.refused(vm, name.as_str(), Verb::LetGo, no))
    }

    /// First the record of the decision, then what follows from it.
    fn act(
        &mut self,
        id: MigrationId,
        owner: Side,
        by_uid: Option<u32>,
        d: &Decision,
    ) -> Result<(), Problem> {
        let now = self.now;
        let given = self.vms.get(&d.vm).and_then(|vm| vm.record.given_up()).filter(|g| g.migration == id);
        let fresh = Resolution {
            version: VERSION,
            migration: id,
            vm: d.vm,
            name: d.name.clone(),
            peer: d.peer.jid.clone(),
            owner,
            by_uid,
            at: now,
            statement: d.statement.clone(),
            given: given.cloned().map(Box::new),
            outcome: match d.act {
                Act::TakeBack | Act::Accept => Outcome::Awaited,
                _ => Outcome::Agreed { at: now },
            },
        };
        let resolution = match (&d.act, self.resolutions.get(&id)) {
            (Act::Settle(owner), Some(r)) => {
                Resolution { outcome: Outcome::Settled { owner: *owner, by_uid, at: now }, ..r.clone() }
            }
            _ => fresh,
        };
        self.keep(resolution).map_err(|e| failed(&d.name, e))?;
        tracing::warn!(
            migration = %id, vm = %d.name, peer = %d.peer.jid, ?owner, ?by_uid, statement = d.statement,
            "an operator decided who owns a VM, without the other cloud's word"
        );
        match &d.act {
            Act::TakeBack | Act::Accept => self.apply(id).map_err(|e| failed(&d.name, e)),
            Act::Settle(Side::Here) | Act::Keep => self.uncontested(d.vm).map_err(|e| failed(&d.name, e)),
            Act::Concede => self.concede(d.vm).map_err(|e| failed(&d.name, e)),
            Act::Settle(Side::There) => self.yield_to_target(id).map_err(|e| failed(&d.name, e)),
            Act::Promise { epoch, hand_over } => {
                self.promise(id, d, *epoch, hand_over.as_ref()).map_err(|e| failed(&d.name, e))
            }
        }
    }

    fn keep(&mut self, resolution: Resolution) -> Result<(), RecordError> {
        self.book.save_resolution(&resolution)?;
        self.resolutions.insert(resolution.migration, resolution);
        Ok(())
    }

    /// Lets a decision of the source's operator happen, if it has not yet, and begins to ask.
    fn apply(&mut self, id: MigrationId) -> Result<(), RecordError> {
        let Some(r) = self.resolutions.get(&id).cloned() else { return Ok(()) };
        let undecided = |g: &GivenUp| g.migration == id && g.in_doubt();
        let held = self.vms.get(&r.vm).filter(|vm| vm.record.given_up().is_some_and(undecided));
        if let Some(entry) = held {
            let record = entry.record.clone();
            let record = match r.owner {
                Side::There => {
                    let scrub_after = self.now.plus(self.config.migration.grace_period);
                    self.book.law().leave_to_target(&record, scrub_after).unwrap_or(record)
                }
                Side::Here => {
                    let known = self.known(r.vm)?;
                    match self.book.law().take_back_by_word(&record, &known, &*self.key) {
                        Ok((record, known)) => {
                            self.keep_lineage(&known)?;
                            record
                        }
                        Err(refusal) => {
                            tracing::error!(migration = %id, vm = %r.name, %refusal, "the operator's decision cannot be carried out");
                            return Ok(());
                        }
                    }
                }
            };
            self.book.save_ownership(&record)?;
            if let Some(entry) = self.vms.get_mut(&r.vm) {
                entry.record = record;
            }
            self.lets_go(r.vm, Hold::Moving(id));
            self.resolved_outgoing(id, r.owner);
        }
        if matches!(r.outcome, Outcome::Awaited | Outcome::Contested { .. }) {
            self.follow(&r);
        }
        Ok(())
    }

    /// At start: finishes what was decided, and goes on asking.
    pub(super) fn resume_resolutions(&mut self) {
        self.mend_contested();
        let open = self.resolutions.values().filter(|r| r.given.is_some()).filter(|r| match r.outcome {
            Outcome::Awaited => true,
            Outcome::Contested { .. } => !matches!(self.book.receipt(r.migration), Ok(Some(_))),
            // The decision was written, what follows from it perhaps not.
            Outcome::Settled { owner: Side::There, .. } => true,
            _ => false,
        });
        let open: Vec<_> = open.map(|r| (r.migration, r.outcome.clone())).collect();
        for (id, outcome) in open {
            let result = match outcome {
                Outcome::Settled { .. } => self.yield_to_target(id),
                _ => self.apply(id),
            };
            if let Err(e) = result {
                tracing::error!(migration = %id, error = chain(&e), "an operator's decision cannot be carried out");
            }
        }
    }

    /// A record may have been damaged, or put back from a copy, when it turned out that its VM has two owners.
    fn mend_contested(&mut self) {
        let contested = self.resolutions.values().filter_map(|r| match r.outcome {
            Outcome::Contested { since } => Some((r.migration, r.vm, since)),
            _ => None,
        });
        for (id, vm, since) in contested.collect::<Vec<_>>() {
            let Some(entry) = self.vms.get_mut(&vm) else { continue };
            let Some(record) = self.book.law().contest(&entry.record, id, since) else { continue };
            if let Err(e) = self.book.save_ownership(&record) {
                tracing::error!(%vm, error = chain(&e), "that the VM is contested is not recorded");
            }
            entry.record = record;
        }
    }

    /// Asks the target what it knows of a hand-over that the operator decided.
    fn follow(&mut self, r: &Resolution) {
        let (Some(given), Some(h)) = (&r.given, r.hand_over()) else { return };
        let matter = Matter { migration: r.migration, vm: r.vm, epoch: h.epoch - 1 };
        let hand_over = h.sign(&*self.key);
        let body = match r.owner {
            // It must not take the VM over from here on, so it is not asked to start it again.
            Side::Here => RequestBody::Withdraw { hand_over },
            Side::There => RequestBody::Start { hand_over, run: given.was_running },
        };
        self.run_errand(Peer { jid: given.to.clone(), key: given.to_key }, matter, body);
    }

    /// The target's word on a hand-over that the operator decided. Whether that was all.
    pub(super) fn follow_answered(&mut self, id: MigrationId, peer: &Peer, answer: &AnswerBody) -> bool {
        let Some(r) = self.resolutions.get(&id).cloned() else { return true };
        let Some(h) = r.hand_over() else { return true };
        // What follows from it belongs into the VM's record: once that can be read.
        if self.aside.contains_key(&r.vm) {
            return false;
        }
        let kept = match answer {
            AnswerBody::Started { receipt, .. } if receipt.verify().as_ref() == Ok(&h) => {
                self.taken_over_there(&r, receipt)
            }
            AnswerBody::Returned { back, .. } if back.verify().as_ref() == Ok(&h) => {
                self.returned_late(&r, back)
            }
            _ => return false,
        };
        if let Err(e) = &kept {
            tracing::error!(migration = %id, peer = %peer.jid, error = chain(e), "its answer is not recorded; it is asked again");
        }
        kept.is_ok()
    }

    fn taken_over_there(&mut self, r: &Resolution, receipt: &Receipt) -> Result<(), RecordError> {
        self.book.save_receipt(r.migration, receipt)?;
        if r.owner == Side::Here {
            return self.contest(r.migration);
        }
        if let Some(entry) = self.vms.get_mut(&r.vm)
            && let Some(end) = entry.record.given_up().and_then(|g| g.scrub_after)
            && let Ok(record) = self.book.law().release(&entry.record, receipt.clone(), end)
        {
            self.book.save_ownership(&record)?;
            entry.record = record;
        }
        tracing::info!(migration = %r.migration, vm = %r.name, "the target's receipt came: the operator was right");
        self.keep(Resolution { outcome: Outcome::Agreed { at: self.now }, ..r.clone() })
    }

    fn returned_late(&mut self, r: &Resolution, back: &Return) -> Result<(), RecordError> {
        self.book.save_returned(r.migration, back)?;
        let at = self.now;
        if r.is_contested() {
            tracing::error!(migration = %r.migration, vm = %r.name, peer = %r.peer, "says both that it took the VM over and that it never did");
            return Ok(());
        }
        if r.owner == Side::Here {
            self.confirm_back(r, back)?;
            tracing::info!(migration = %r.migration, vm = %r.name, "the target promised never to run it: the VM has one owner");
            return self.keep(Resolution { outcome: Outcome::Agreed { at }, ..r.clone() });
        }
        let known = self.known(r.vm)?;
        let record = self.vms.get(&r.vm).map(|vm| vm.record.clone());
        match record.and_then(|record| self.book.law().take_back(&record, &known, back).ok()) {
            Some((record, known)) => {
                let record = VmRecord { run: false, ..record };
                self.keep_lineage(&known)?;
                self.book.save_ownership(&record)?;
                if let Some(entry) = self.vms.get_mut(&r.vm) {
                    entry.record = record;
                }
                tracing::warn!(migration = %r.migration, vm = %r.name, "the target never took the VM the operator left to it: it is here again, stopped");
            }
            None => {
                tracing::error!(migration = %r.migration, vm = %r.name, "the target never took the VM the operator left to it, and the copy here is gone");
            }
        }
        self.keep(Resolution { outcome: Outcome::Reverted { at }, ..r.clone() })
    }

    /// The target's return takes the place of our operator's word in the VM's history.
    fn confirm_back(&mut self, r: &Resolution, back: &Return) -> Result<(), RecordError> {
        let known = self.known(r.vm)?;
        let Some(entry) = self.vms.get(&r.vm) else { return Ok(()) };
        if let Ok(Some((record, known))) = self.book.law().confirm_back(&entry.record, &known, back) {
            self.keep_lineage(&known)?;
            self.book.save_ownership(&record)?;
            if let Some(entry) = self.vms.get_mut(&r.vm) {
                entry.record = record;
            }
        }
        Ok(())
    }

    /// The VM was taken back here, and the target had taken it over.
    fn contest(&mut self, id: MigrationId) -> Result<(), RecordError> {
        let awaited = |r: &&Resolution| r.outcome == Outcome::Awaited && !self.aside.contains_key(&r.vm);
        let Some(r) = self.resolutions.get(&id).filter(awaited) else {
            return Ok(());
        };
        let r = r.clone();
        tracing::error!(
            migration = %id, vm = %r.name, peer = %r.peer,
            "TWO OWNERS: the operator took the VM back here, and {} had taken it over. It is not started or \
             moved by itself; see 'cicada vm show {}'", r.peer, r.name
        );
        let since = self.now;
        if let Some(entry) = self.vms.get_mut(&r.vm)
            && let Some(record) = self.book.law().contest(&entry.record, id, since)
        {
            self.book.save_ownership(&record)?;
            entry.record = record;
        }
        self.keep(Resolution { outcome: Outcome::Contested { since }, ..r })
    }

    /// A target that tells us it runs a VM which our operator took back. The denial it gets.
    pub(super) fn delete_of_contested(&mut self, request: &Envelope<RequestBody>) -> Option<Denial> {
        let r = self.resolutions.get(&request.migration).filter(|r| r.owner == Side::Here)?;
        let open = matches!(
            r.outcome,
            Outcome::Awaited | Outcome::Contested { .. } | Outcome::Settled { owner: Side::Here, .. }
        );
        if !open || r.given.is_none() || r.vm != request.vm || r.peer != request.from {
            return None;
        }
        let (peer, text) = (r.peer.clone(), words::contested_answer(r));
        if let Err(e) = self.contest(request.migration) {
            tracing::error!(migration = %request.migration, error = chain(&e), "that the VM is contested is not recorded");
        }
        // Its receipt is still to be asked for.
        self.hurry_errands(&peer);
        Some(Denial::new(DenialCode::Contested, text))
    }

    /// At the target: what its source answered to being told that the VM is ours. Whether that was all.
    pub(super) fn delete_answered(&mut self, id: MigrationId, vm: VmId, answer: &AnswerBody) -> bool {
        match answer {
            AnswerBody::Deleted { .. } => self.acknowledged(id, vm),
            AnswerBody::Denied(d) if d.code == DenialCode::NotYours => {
                tracing::warn!(migration = %id, vm = %vm, reason = d.text.as_str(), "the source knows nothing of giving the VM up to us");
                self.acknowledged(id, vm);
            }
            AnswerBody::Denied(d) if d.code == DenialCode::Contested => {
                self.contested_by_source(id, vm, &d.text);
                // It may be settled in our favour one day.
                return false;
            }
            _ => return false,
        }
        true
    }

    /// At the target: the source's operator took a VM back that we had taken over.
    fn contested_by_source(&mut self, id: MigrationId, vm: VmId, words: &str) {
        let now = self.now;
        let Some(entry) = self.vms.get_mut(&vm) else { return };
        let Some(record) = self.book.law().withdrawn(&entry.record, id, now) else {
            tracing::warn!(migration = %id, vm = %entry.record.spec.name, words, "its source's withdrawal changes nothing: the hand-over is complete");
            return;
        };
        entry.record = record;
        let Some(a) = &entry.record.arrival else { return };
        let peer = Peer { jid: a.from.clone(), key: a.from_key };
        let matter = Matter { migration: id, vm, epoch: entry.record.epoch - 1 };
        tracing::error!(
            migration = %id, vm = %entry.record.spec.name, peer = %a.from, words,
            "TWO OWNERS: this cloud took the VM over, and the operator of its source took it back. It is not \
             started or moved by itself; see 'cicada vm show {}'", entry.record.spec.name
        );
        if let Err(e) = self.book.save_ownership(&entry.record) {
            tracing::error!(vm = %vm, error = chain(&e), "that the VM is contested is not recorded");
        }
        if !self.errands.contains_key(&id) {
            self.run_errand(peer, matter, RequestBody::Delete { boot_ms: None });
        }
    }

    /// Answers a source whose operator took the VM back: with our promise, or with our receipt.
    pub(super) fn answer_withdraw(&mut self, peer: &Peer, signed: &SignedHandOver) -> Answered {
        let h = match self.addressed(peer, signed) {
            Ok(h) => h,
            Err(denial) => return Answered::Now(AnswerBody::Denied(denial)),
        };
        if let Some(run) = self.incoming.get_mut(&h.migration).filter(|r| r.is_leased()) {
            run.end_because(format!("the operator of {} took the VM back", peer.jid));
            self.incoming_event(h.migration, TargetEvent::LeaseExpired);
        }
        let answer = self.what_became_of(peer, &h, signed);
        if let Answered::Now(AnswerBody::Started { .. }) = answer {
            self.contested_by_source(h.migration, h.vm, "the source withdrew its hand-over");
        }
        answer
    }

    fn uncontested(&mut self, vm: VmId) -> Result<(), RecordError> {
        let Some(entry) = self.vms.get_mut(&vm) else { return Ok(()) };
        if let Some(record) = self.book.law().uncontested(&entry.record) {
            self.book.save_ownership(&record)?;
            entry.record = record;
        }
        Ok(())
    }

    /// Contested and settled: the target's copy counts, ours is kept for the grace period.
    fn yield_to_target(&mut self, id: MigrationId) -> Result<(), RecordError> {
        let receipt = self.book.receipt(id)?;
        let Some(r) = self.resolutions.get(&id) else { return Ok(()) };
        let Some(given) = &r.given else { return Ok(()) };
        // Moved on, or come home since: that has nothing to do with it any more.
        let taken_back = |record: &VmRecord| record.is_here() && record.taken_back == Some(id);
        let Some(entry) = self.vms.get(&r.vm).filter(|vm| taken_back(&vm.record)) else { return Ok(()) };
        let scrub_after = self.now.plus(self.config.migration.grace_period);
        let known = self.known(r.vm)?;
        let given = (**given).clone();
        let (record, known) = match self.book.law().yield_to_target(
            &entry.record,
            &known,
            given,
            receipt,
            scrub_after,
        ) {
            Ok(yielded) => yielded,
            Err(refusal) => {
                tracing::error!(migration = %id, vm = %r.name, %refusal, "the VM is not left to its target");
                return Ok(());
            }
        };
        let vm = r.vm;
        self.keep_lineage(&known)?;
        self.book.save_ownership(&record)?;
        if let Some(entry) = self.vms.get_mut(&vm) {
            entry.record = record;
        }
        self.emit(Effect::Undefine(vm));
        self.presence_changed();
        Ok(())
    }

    /// At the target: never to run the VM under this epoch, whatever comes.
    fn promise(
        &mut self,
        id: MigrationId,
        d: &Decision,
        epoch: u64,
        hand_over: Option<&SignedHandOver>,
    ) -> Result<(), RecordError> {
        let record = ReturnRecord { vm: d.vm, epoch, hand_over: hand_over.cloned() };
        let source = hand_over.and_then(|h| h.verify().ok()).map(|h| h.source_key);
        self.book.save_return(&record, source.as_ref())?;
        // The VM may come again: its history goes on with the return.
        if let Some(signed) = hand_over {
            let back = signed.clone().give_back(&*self.key);
            let known = self.book.law().give_back(&self.known(d.vm)?, &back);
            self.keep_lineage(&known)?;
        }
        self.unanswered.remove(&id);
        self.errands.remove(&id);
        if let Some(run) = self.incoming.get_mut(&id).filter(|r| r.is_leased()) {
            run.end_because("the operator here promised never to run it".into());
            self.incoming_event(id, TargetEvent::LeaseExpired);
        }
        // What had come to an end would still answer with its receipt.
        self.incoming.remove(&id);
        let ours = self.vms.get(&d.vm).is_some_and(|vm| vm.record.is_here() && vm.record.epoch == epoch);
        if ours {
            // Its disks stay, for the operator to look at.
            self.put_aside(
                d.vm,
                format!("epoch {epoch} was returned to {}: it must never run here", d.peer.jid),
            );
        }
        Ok(())
    }

    /// Why a VM must not be started or moved without the operator: it has two owners.
    pub(super) fn contested(&self, vm: VmId) -> Option<Problem> {
        let record = &self.vms.get(&vm)?.record;
        if !record.is_here() {
            return None;
        }
        if let Some(problem) = self.disproved(record) {
            return Some(problem);
        }
        let arrival = record.arrival.as_ref().and_then(|a| Some((a, a.contested?)));
        if let Some((a, since)) = arrival {
            return Some(words::contested_at_target(record, a, since));
        }
        let found = self.resolutions.values().find(|r| r.vm == vm && r.is_contested())?;
        Some(words::contested_at_source(found))
    }

    /// What operators decided here, in words, by migration.
    pub(super) fn resolution_remarks(&self) -> Vec<(MigrationId, String)> {
        self.resolutions.values().map(|r| (r.migration, words::remark(r))).collect()
    }

    /// What an operator should know before touching the VM.
    pub(super) fn vm_problem(&self, vm: VmId) -> Option<Problem> {
        if let Some(problem) = self.contested(vm) {
            return Some(problem);
        }
        if let Some(problem) = self.disputed(vm).or_else(|| self.unconfirmed(vm)) {
            return Some(problem);
        }
        let record = &self.vms.get(&vm)?.record;
        let open = self.resolutions.values().find(|r| r.vm == vm && r.outcome == Outcome::Awaited);
        if let Some(r) = open.filter(|r| (r.owner == Side::Here) == record.is_here()) {
            return Some(words::unconfirmed(r));
        }
        let g = record.given_up().filter(|g| g.in_doubt())?;
        Some(words::in_doubt(record, g))
    }

    /// The hand-over, if it is this member's and for us.
    pub(super) fn addressed(&self, peer: &Peer, signed: &SignedHandOver) -> Result<HandOver, Denial> {
        let refuse = |text: String| Denial::new(DenialCode::HandOver, text);
        let h = signed.verify().map_err(|e| refuse(e.to_string()))?;
        if h.target != self.me || !self.is_or_was_ours(&h.target_key) {
            return Err(refuse("the hand-over is for another target".into()));
        }
        if h.source != peer.jid || !self.members.keys().leads(&peer.jid, &h.source_key, &peer.key) {
            return Err(refuse("the hand-over is another source's".into()));
        }
        Ok(h)
    }
}

fn conflict(id: MigrationId, reason: &str) -> Problem {
    Problem::new(ProblemKind::Conflict, format!("migration {id}"), reason)
}

fn failed(name: &VmName, e: RecordError) -> Problem {
    Problem::from_error(ProblemKind::Failed, format!("VM {name}"), &e)
        .next("free room on the disk, then decide again: what was recorded is carried out at the next start")
}

/// The fingerprint operators compare before they believe another cloud.
pub(super) fn known_as(jid: &MemberJid, key: &PublicKey) -> String {
    format!("{jid} (key {})", key.fingerprint())
}
