//! Migrations that come to this cloud, and the answers to every request of another broker.

use std::collections::HashSet;
use std::time::Duration;

use crate::clock::UnixMillis;
use crate::fault;
use crate::federation::Refused;
use crate::interface::{MigrationPhase, MigrationRole, MigrationView, Problem, ProblemKind, chain};
use crate::migration::envelope::{LIFETIME, VERSION, VERSION_BEFORE, VERSIONS};
use crate::migration::handover::{EPOCH_MAX, HandOver, Receipt, Return, SignedHandOver};
use crate::migration::message::{CHECK_IDS_MAX, CheckAnswer, Initialization, Seed, StageAccount};
use crate::migration::ownership::{Became, Given, Guest};
use crate::migration::target::{Agreement, Effect as ArrivalEffect, Event as TargetEvent, Phase, Target};
use crate::migration::{AnswerBody, Denial, DenialCode, Envelope, EnvelopeError, Lineage, Pass, RequestBody};
use crate::placement;
use crate::types::{MemberJid, MigrationId, PeerText, PublicKey, VmId};
use crate::vm::{PowerState, VmSpec};

use super::Broker;
use super::account::{self, Advance, new_view};
use super::book::ReturnRecord;
use super::effect::{AskId, DisksOf, Effect, Holdings, Matter, Peer, StageOrder, StageReport};
use super::guard::{self, Pace};
use super::hold::{Hold, No, Verb};
use super::lineages::{Offer, denial};
use super::pending::{Pending, Working};
use super::unfinished::Holds;
use super::vms::Vm;

/// How long an arrival that is over still answers its source.
const KEPT_AFTER_END: Duration = Duration::from_secs(120);
/// Members asked to lend components for one migration.
const LENDERS_MAX: usize = 4;
/// Hand-overs remembered that wait for an operator because a record is damaged.
const UNANSWERED_MAX: usize = 1000;

/// One migration this broker is the target of.
#[derive(Clone)]
pub struct Incoming {
    machine: Target,
    peer: Peer,
    matter: Matter,
    spec: VmSpec,
    pub view: MigrationView,
    lease_until: UnixMillis,
    component_names: Vec<PeerText>,
    /// Its disks, below the VM's directory.
    disks: String,
    /// A pass has begun here.
    staged: bool,
    /// What is on its disks: now, and before the pass that is under way.
    holds: Holds,
    held: Holds,
    advance: Advance,
    phase_since: UnixMillis,
    /// Why it ended without a hand-over, if not by the machine's own reason.
    ended_because: Option<String>,
    /// What its source shows of the VM's history.
    pub(super) offer: Offer,
}

impl Incoming {
    /// What this migration has reserved: CPUs and memory.
    pub fn reserved(&self) -> (u32, u64) {
        if self.machine.leased() { (self.spec.cpus, self.spec.memory.0) } else { (0, 0) }
    }
    /// Whether a new migration of `vm` from `source` takes this one's place.
    pub fn gives_way_to(&self, vm: VmId, source: &MemberJid) -> bool {
        self.matter.vm == vm && self.peer.jid == *source && self.machine.leased()
    }
    pub fn comes_from(&self, member: &MemberJid) -> bool {
        self.peer.jid == *member
    }
    /// Whether it can still be called off from here.
    pub fn is_leased(&self) -> bool {
        self.machine.leased()
    }
    pub fn is_unfinished(&self) -> bool {
        !matches!(self.machine.phase(), Phase::Owned | Phase::Abandoned)
    }
    pub fn spec(&self) -> &VmSpec {
        &self.spec
    }
    /// Where its disks are staged, and stay once the VM is ours.
    pub fn disks_of(&self) -> DisksOf {
        DisksOf { vm: self.matter.vm, disks: self.disks.clone(), recipe: self.spec.recipe }
    }
    pub fn is_of(&self, peer: &Peer, vm: VmId) -> bool {
        self.peer == *peer && self.matter.vm == vm
    }
    /// Its source asks: the lease runs anew.
    pub fn is_asked(&mut self, lease_until: UnixMillis) {
        self.lease_until = lease_until;
    }
    pub fn about(&self) -> (Matter, &Peer) {
        (self.matter, &self.peer)
    }
    pub fn phase(&self) -> &Phase {
        self.machine.phase()
    }
    pub fn lease_until(&self) -> UnixMillis {
        self.lease_until
    }
    pub fn end_because(&mut self, reason: String) {
        self.ended_because.get_or_insert(reason);
    }
}

impl Broker {
    /// Answers a sealed request; `None` means the sender is not trusted and learns nothing.
    pub(super) fn asked(&mut self, ask: AskId, from: MemberJid, payload: &[u8]) {
        let now = self.now;
        let key = match self.members.trusted_key(&from) {
            Ok(key) => key,
            Err(reason) => {
                self.refuse(&from, reason.refused(), &reason);
                return self.emit(Effect::Answer(ask, None));
            }
        };
        let pace = self.guard.pace(&from, self.policy_of(&from).requests_per_minute, now);
        if pace != Pace::Fine {
            self.refuse(&from, Refused::RateLimit, &"it asks more often than it may");
        }
        if pace == Pace::Never {
            return self.emit(Effect::Answer(ask, None));
        }
        let opened = Envelope::<RequestBody>::open(payload, &key, &from, &self.me, now);
        match &opened {
            Ok(e) => self.clocks.note(&from, e.issued, now, true),
            Err(EnvelopeError::Expired { issued, now }) => self.clocks.note(&from, *issued, *now, false),
            Err(_) => {}
        }
        let opened = opened.and_then(|e| self.replay.admit(&e, now).map(|()| e));
        let request = match opened {
            Ok(request) => request,
            Err(e) => {
                self.refuse(&from, guard::kind_of(&e), &chain(&e));
                let told = match &e {
                    EnvelopeError::Version(_) => self.other_version(&from, &key, payload, &e.to_string()),
                    EnvelopeError::Expired { .. } => self.other_clock(&from, &key, payload, &e.to_string()),
                    _ => None,
                };
                return self.emit(Effect::Answer(ask, told));
            }
        };
        if let Pace::Later(wait) = pace {
            return self.answer(ask, &request, guard::too_often(wait));
        }
        let peer = Peer { jid: from, key };
        let is_work = |body: &RequestBody| {
            use RequestBody::{Configuration, Content, Lineage, Owners};
            matches!(body, Configuration { .. } | Content { .. } | Lineage { .. } | Owners { .. })
        };
        if is_work(&request.body) {
            if !self.guard.begin_work(&peer.jid) {
                self.refuse(&peer.jid, Refused::RateLimit, &"it asks more at once than it may");
                return self.answer(ask, &request, guard::too_much());
            }
            let work = Working { ask, from: peer, request: Box::new(request) };
            let answered = match &work.request.body {
                RequestBody::Content { .. } => self.answer_content(&work),
                RequestBody::Lineage { .. } => self.answer_lineage(&work),
                RequestBody::Owners { .. } => self.answer_owners(&work),
                _ => self.answer_check(&work),
            };
            if let Some(answer) = answered {
                self.answer_work(&work, answer);
            }
            return;
        }
        match self.answer_request(&peer, &request, ask) {
            Answered::Now(answer) => {
                self.note_denial(&peer.jid, &answer);
                self.answer(ask, &request, answer);
            }
            Answered::Later => {}
            Answered::Promised(promise, back) => {
                // It binds from here on, whatever becomes of the write.
                self.promising.insert((promise.vm, peer.key));
                let (to, kept) = (peer.key, Box::new(promise.clone()));
                let work = Working { ask, from: peer, request: Box::new(request) };
                let pending = Pending::PromiseKept { work, promise: Box::new(promise), back, to };
                let token = self.expect(pending);
                self.emit(Effect::KeepPromise { token, promise: kept, to });
            }
        }
    }

    /// Seals the answer to a request, and sends it.
    pub(super) fn answer(&mut self, ask: AskId, request: &Envelope<RequestBody>, body: AnswerBody) {
        let sealed = self.sealed(request, body);
        self.emit(Effect::Answer(ask, sealed));
    }

    /// As [`Broker::answer`], of a request that was counted as work.
    pub(super) fn answer_work(&mut self, work: &Working, body: AnswerBody) {
        self.guard.end_work(&work.from.jid);
        self.answer(work.ask, &work.request, body);
    }

    fn sealed<T>(&self, request: &Envelope<T>, body: AnswerBody) -> Option<Vec<u8>> {
        let envelope = Envelope {
            // In the version it came in; who speaks none of ours is told so in our newest.
            version: if VERSIONS.contains(&request.version) { request.version } else { VERSION },
            from: self.me.clone(),
            to: request.from.clone(),
            migration: request.migration,
            vm: request.vm,
            epoch: request.epoch,
            nonce: request.nonce.clone(),
            issued: self.now,
            expires: self.now.plus(LIFETIME),
            body,
        };
        envelope.seal(&*self.key).ok()
    }

    /// A trusted member that speaks another version is told so, in ours.
    fn other_version(
        &mut self,
        from: &MemberJid,
        key: &PublicKey,
        payload: &[u8],
        text: &str,
    ) -> Option<Vec<u8>> {
        let now = self.now;
        let request = Envelope::<RequestBody>::open_foreign(payload, key, from, &self.me, now).ok()?;
        self.replay.admit(&request, now).ok()?;
        let denial =
            Denial::new(DenialCode::Version, text).next("bring the older of the two brokers up to date");
        self.sealed(&request, AnswerBody::Denied(denial))
    }

    /// A trusted member whose clock is not ours is told both times. What it asks is not done.
    fn other_clock(&self, from: &MemberJid, key: &PublicKey, payload: &[u8], text: &str) -> Option<Vec<u8>> {
        let now = self.now;
        let request = Envelope::<RequestBody>::open_stale(payload, key, from, &self.me, now).ok()?;
        let denial = Denial::new(DenialCode::Clock, text).next(
            "set the clocks of both hosts by NTP; 'cicada members --verbose' shows how far they differ",
        );
        self.sealed(&request, AnswerBody::Denied(denial))
    }

    fn answer_check(&mut self, work: &Working) -> Option<AnswerBody> {
        let RequestBody::Configuration { spec, components, packs } = &work.request.body else {
            return Some(deny(DenialCode::Other, "is no check"));
        };
        if components.len() + packs.len() > CHECK_IDS_MAX {
            let text = format!("at most {CHECK_IDS_MAX} ids may be asked about at once");
            return Some(deny(DenialCode::Other, &text));
        }
        // Whose VMs are never taken need not know what is held.
        let tells = self.policy_of(&work.from.jid).accept_vms;
        let (components, packs) =
            if tells { (components.clone(), packs.clone()) } else { (Vec::new(), Vec::new()) };
        let spec = Box::new(spec.clone());
        let token = self.expect(Pending::CheckLooked(work.clone()));
        self.emit(Effect::LookUp { token, spec, components, packs });
        None
    }

    pub(super) fn check_looked(&mut self, work: &Working, held: Holdings) {
        let RequestBody::Configuration { spec, components, packs } = &work.request.body else { return };
        let from = &work.from.jid;
        let room = self.room(from, Some(spec.id));
        let needed = placement::Needed::by(spec, held.composed);
        let mut blockers = placement::assess(&room, spec, from, &needed);
        blockers.extend(self.policy_blockers(from, spec));
        blockers.extend(spec.check().err().map(|text| Denial::new(DenialCode::Other, text)));
        // What is said of it in the terms of the agreement says more.
        if blockers.is_empty() {
            blockers.extend(held.refusal);
        }
        let (components_lacking, packs_lacking) = match room.accepts_source {
            true => (held.components_lacking, held.packs_lacking),
            false => ((0..components.len() as u32).collect(), (0..packs.len() as u32).collect()),
        };
        let seed = self.vms.get(&spec.id).and_then(|vm| vm.record.given_up()).and_then(|g| g.seed);
        let seed = seed.filter(|_| room.accepts_source);
        let kept = self.kept_of(spec.id, from).filter(|_| room.accepts_source);
        let answer = CheckAnswer {
            // This cloud's own word for what presence says already; who asks compares.
            differences: Vec::new(),
            blockers,
            components_lacking,
            packs_lacking,
            // The newer of both: an earlier try began with a copy that was kept here.
            seed: kept.and_then(|(_, seed)| seed).or(seed),
            kept: kept.map(|(kept, _)| kept),
            composed: held.composed && room.accepts_source,
            reads_devices: true,
        };
        self.answer_work(work, AnswerBody::Configuration(answer));
    }

    fn answer_request(&mut self, peer: &Peer, request: &Envelope<RequestBody>, ask: AskId) -> Answered {
        let id = request.migration;
        let known = self.incoming.get(&id).map(|run| run.is_of(peer, request.vm));
        let answer = match (&request.body, known) {
            (RequestBody::Withdraw { hand_over }, None | Some(true)) => {
                return self.answer_withdraw(peer, hand_over);
            }
            (RequestBody::Start { hand_over, .. }, None) => {
                return self.start_unknown(peer, request, hand_over);
            }
            (_, Some(false)) => deny(DenialCode::NotYours, "this migration is another member's"),
            (RequestBody::Delete { boot_ms }, _) => self.answer_delete(peer, request, *boot_ms),
            (RequestBody::Suspend | RequestBody::Stop, _) => self.answer_steering(peer, request),
            (body, Some(true)) => self.incoming_event(id, TargetEvent::Asked(Box::new(body.clone()))),
            (RequestBody::Reservation { spec }, None) => match self.cannot_reserve(peer, request, spec) {
                Some(denied) => denied,
                None => {
                    let work = Working { ask, from: peer.clone(), request: Box::new(request.clone()) };
                    let spec = Box::new(spec.clone());
                    let token = self.expect(Pending::ReserveLooked(work));
                    self.emit(Effect::LookUp { token, spec, components: Vec::new(), packs: Vec::new() });
                    return Answered::Later;
                }
            },
            // It may have been told before.
            (RequestBody::Cancel { .. }, None) => {
                let kept = self.kept_here_until(id).and_then(|_| self.kept_of(request.vm, &peer.jid));
                AnswerBody::Cancelled { kept_s: kept.map_or(0, |(kept, _)| kept.for_s) }
            }
            _ => deny(DenialCode::UnknownMigration, "no such migration here; the reservation may have ended"),
        };
        Answered::Now(answer)
    }

    /// Why no reservation can be made, whatever room there is.
    fn cannot_reserve(
        &self,
        peer: &Peer,
        request: &Envelope<RequestBody>,
        spec: &VmSpec,
    ) -> Option<AnswerBody> {
        if spec.id != request.vm {
            return Some(deny(DenialCode::NotYours, "the reservation is for another VM than the message"));
        }
        if let Err(text) = spec.check() {
            return Some(deny(DenialCode::Other, &text));
        }
        if self.confirming.is_some() {
            let text = "this cloud asks the others first what became of its VMs while it was away";
            return Some(AnswerBody::Denied(
                Denial::new(DenialCode::Busy, text).next("try again in a minute"),
            ));
        }
        // Else a member could take the place of a migration that is remembered, or of ours.
        let id = request.migration;
        let is_its_own_attempt = |view: &MigrationView| {
            let p = &view.progress;
            p.peer == peer.jid
                && p.vm_id == spec.id
                && p.role == MigrationRole::Target
                && !p.handed_over
                && p.phase != MigrationPhase::Completed
        };
        let is_taken = self.outgoing.contains_key(&id)
            || self.unfinished.iter().any(|cut| cut.id() == id)
            || self.history.get(&id).is_some_and(|view| !is_its_own_attempt(view));
        if is_taken {
            return Some(deny(DenialCode::NotYours, "another migration has this id, or it is over"));
        }
        None
    }

    pub(super) fn reserve_looked(&mut self, work: &Working, held: &Holdings) {
        let answer = self.reserve(&work.from, &work.request, held.composed);
        self.note_denial(&work.from.jid, &answer);
        self.answer(work.ask, &work.request, answer);
    }

    fn reserve(&mut self, peer: &Peer, request: &Envelope<RequestBody>, composed: bool) -> AnswerBody {
        let RequestBody::Reservation { spec } = &request.body else {
            return deny(DenialCode::Other, "is no reservation");
        };
        // Another message may have come first, while it was looked up what is composed.
        if self.incoming.contains_key(&request.migration) {
            return deny(DenialCode::OutOfOrder, "this reservation is being made");
        }
        if let Some(denied) = self.cannot_reserve(peer, request, spec) {
            return denied;
        }
        fault::point("target-reserving");
        self.supersede(peer, spec.id);
        let room = self.room(&peer.jid, None);
        let needed = placement::Needed::by(spec, composed);
        let blockers = placement::assess(&room, spec, &peer.jid, &needed);
        let rules = self.policy_blockers(&peer.jid, spec);
        if let Some(first) = blockers.into_iter().chain(rules).next() {
            return AnswerBody::Denied(first);
        }
        if request.epoch >= EPOCH_MAX {
            return deny(DenialCode::HandOver, "no VM has moved that often");
        }
        let known = match self.known(spec.id) {
            Ok(known) => known,
            Err(e) => {
                tracing::error!(vm = %spec.id, error = chain(&e), "a VM cannot come: what is known of it is damaged");
                return deny(DenialCode::Other, "what is known of the VM here is damaged");
            }
        };
        if request.epoch + 1 < known.next_epoch() {
            return deny(DenialCode::HandOver, "this cloud has seen a later epoch of the VM");
        }
        // Of all other reasons the law speaks.
        if self.may(Verb::Arrive, spec.id) == Err(No::Removed) {
            let text = "what this cloud kept of the VM is being removed";
            return AnswerBody::Denied(Denial::new(DenialCode::Busy, text).next("try again in a minute"));
        }
        // Its history comes with the next messages, if its source keeps one.
        let standing = self.standing(spec.id, &known);
        let allowed = match request.version {
            VERSION_BEFORE => self.book.law().offer(standing, &peer.jid, &peer.key, None).map(drop),
            _ => self.book.law().may_arrive(standing),
        };
        if let Err(refusal) = allowed {
            return AnswerBody::Denied(denial(&refusal));
        }
        let now = self.now;
        if let Err(wait) = self.guard.begin_attempt(&peer.jid, now) {
            let text = "more reservations that nothing came of than this cloud takes in that time";
            self.refuse(&peer.jid, Refused::RateLimit, &text);
            return AnswerBody::Denied(Denial::new(DenialCode::RateLimited, text).retry_after(wait));
        }
        let lease = self.config.migration.lease;
        let agreement = Agreement {
            source: peer.jid.clone(),
            source_key: peer.key,
            target: self.me.clone(),
            target_key: self.key.public(),
            migration: request.migration,
            vm: spec.id,
            epoch: request.epoch,
            recipe: spec.recipe,
            reservation: self.ids.reservation(),
            known: known.tip().map(|tip| tip.id),
        };
        let machine = Target::new(agreement, lease.as_secs());
        let answer = machine.reserved();
        let cloud = self.members.cloud_of(&peer.jid);
        let run = Incoming {
            machine,
            peer: peer.clone(),
            matter: Matter { migration: request.migration, vm: spec.id, epoch: request.epoch },
            view: new_view(request.migration, spec, MigrationRole::Target, &peer.jid, cloud, now),
            spec: spec.clone(),
            lease_until: now.plus(lease),
            component_names: Vec::new(),
            // Of its own: the copy of an earlier try may still be on its way out.
            disks: format!("disks-{}", self.ids.uuid().simple()),
            staged: false,
            holds: Holds::default(),
            held: Holds::default(),
            advance: Advance::default(),
            phase_since: now,
            ended_because: None,
            offer: Offer::default(),
        };
        tracing::info!(migration = %request.migration, vm = %spec.name, from = %peer.jid, "reserved");
        self.history.take(&request.migration);
        self.incoming.insert(request.migration, run);
        self.presence_changed();
        answer
    }

    /// A source that asks anew for the same VM has forgotten its earlier migration.
    fn supersede(&mut self, peer: &Peer, vm: VmId) {
        let earlier = self.incoming.iter().filter(|(_, run)| run.gives_way_to(vm, &peer.jid));
        let ids: Vec<_> = earlier.map(|(id, _)| *id).collect();
        for id in ids {
            tracing::info!(migration = %id, "its source begins anew");
            if let Some(run) = self.incoming.get_mut(&id) {
                run.end_because(format!("{} began anew", peer.jid));
            }
            self.incoming_event(id, TargetEvent::LeaseExpired);
        }
    }

    /// A hand-over for a migration nobody here remembers: either we took the VM over before a
    /// restart, or we never will.
    fn start_unknown(
        &mut self,
        peer: &Peer,
        request: &Envelope<RequestBody>,
        signed: &SignedHandOver,
    ) -> Answered {
        match self.addressed(peer, signed) {
            Ok(h) if h.migration != request.migration || h.vm != request.vm => {
                let text = "the hand-over is for another migration or VM than the message";
                Answered::Now(deny(DenialCode::HandOver, text))
            }
            Ok(h) => self.what_became_of(peer, &h, signed),
            Err(denial) => Answered::Now(AnswerBody::Denied(denial)),
        }
    }

    /// Our receipt if we took the VM over, else our word that we never will by this hand-over.
    pub(super) fn what_became_of(&mut self, peer: &Peer, h: &HandOver, signed: &SignedHandOver) -> Answered {
        let records = &self.book;
        let broken = |e: &dyn std::error::Error| Answered::Now(deny(DenialCode::Other, &chain(e)));
        let receipt = match records.receipt(h.migration) {
            Ok(receipt) => receipt,
            Err(e) => return broken(&e),
        };
        let promised = records.has_returned(h.vm, h.epoch, Some(&peer.key));
        // What a history says does not matter here: only what this cloud itself recorded.
        let known = Lineage::empty(h.vm);
        let given = Given { promised, receipt: receipt.as_ref() };
        let became = self.book.law().what_became_of(self.standing(h.vm, &known), given, h, signed);
        // What was taken over after the backup was made is not known any more.
        let lost = self.restored.is_some_and(|at| h.issued < at) && !promised;
        match became {
            Became::Void | Became::ToBePromised if lost => {
                self.leave_to_operator(peer, h.migration, signed);
                let text = "the target was restored from a backup, and may have taken the VM over before: its \
                            operator must promise never to run it with 'cicada migration resolve'";
                Answered::Now(deny(DenialCode::Other, text))
            }
            Became::Taken(receipt) => {
                let running = self.power_of(h.vm) == PowerState::Running;
                Answered::Now(AnswerBody::Started {
                    receipt,
                    running,
                    problem: (!running).then(|| "it is not running at this moment".into()),
                    account: StageAccount::default(),
                })
            }
            Became::Other => {
                Answered::Now(deny(DenialCode::HandOver, "another hand-over of this migration was taken"))
            }
            Became::Unknowable => {
                self.leave_to_operator(peer, h.migration, signed);
                let text = "the target's record of the VM is damaged: its operator must restore it, or promise \
                            never to run it with 'cicada migration resolve'";
                Answered::Now(deny(DenialCode::Other, text))
            }
            Became::Void => {
                fault::point("target-returning");
                let back = signed.clone().give_back(&*self.key);
                fault::point("target-returned");
                Answered::Now(returned(back))
            }
            Became::ToBePromised => {
                let promise = ReturnRecord { vm: h.vm, epoch: h.epoch, hand_over: Some(signed.clone()) };
                let back = signed.clone().give_back(&*self.key);
                if promised {
                    return Answered::Now(returned(back));
                }
                let is_new = !records.has_promised(h.vm, &peer.key);
                if is_new && !self.guard.may_promise(&peer.jid, self.now) {
                    let text = "as many hand-overs of VMs unknown here were returned as may be in one day";
                    let wait = Duration::from_secs(3600);
                    let denial = Denial::new(DenialCode::RateLimited, text).retry_after(wait);
                    self.refuse(&peer.jid, Refused::RateLimit, &text);
                    return Answered::Now(AnswerBody::Denied(denial));
                }
                Answered::Promised(promise, Box::new(back))
            }
        }
    }

    /// Remembers a hand-over that only an operator can answer; it is asked again anyway.
    fn leave_to_operator(&mut self, peer: &Peer, id: MigrationId, signed: &SignedHandOver) {
        self.unanswered.insert(id, (peer.clone(), signed.clone()));
        while self.unanswered.len() > UNANSWERED_MAX {
            self.unanswered.pop_first();
        }
    }

    /// A promise is given only once it is durable.
    pub(super) fn promise_kept(
        &mut self,
        work: &Working,
        promise: &ReturnRecord,
        back: Return,
        to: PublicKey,
        kept: Result<(), String>,
    ) {
        self.promising.remove(&(promise.vm, to));
        let answer = match kept {
            Ok(()) => {
                tracing::info!(vm = %promise.vm, epoch = promise.epoch, "hand-over returned: it is never run here under this epoch");
                returned(back)
            }
            Err(why) => deny(DenialCode::Other, &why),
        };
        self.answer(work.ask, &work.request, answer);
    }

    fn answer_delete(
        &mut self,
        peer: &Peer,
        request: &Envelope<RequestBody>,
        boot_ms: Option<u64>,
    ) -> AnswerBody {
        if let Some(denial) = self.delete_of_contested(request) {
            return AnswerBody::Denied(denial);
        }
        if self.aside.contains_key(&request.vm) {
            return deny(DenialCode::Busy, "the record of that VM is damaged here");
        }
        let given = self.vms.get(&request.vm).and_then(|vm| vm.record.given_up());
        match given {
            Some(g) if g.migration == request.migration && g.to == peer.jid => {
                let grace = g.scrub_after.map_or(self.config.migration.grace_period, |t| t.since(self.now));
                self.amend_history(request.migration, |a| {
                    a.boot_ms = boot_ms;
                    if let Some(ms) = boot_ms {
                        a.phase_ms.insert("boot".into(), ms);
                    }
                });
                AnswerBody::Deleted { grace_s: grace.as_secs() }
            }
            // Scrubbed already, or never ours: nothing is left to release.
            None if !self.vms.contains_key(&request.vm) => AnswerBody::Deleted { grace_s: 0 },
            _ => deny(DenialCode::NotYours, "that VM was not handed over to you"),
        }
    }

    /// One step of a target machine; the answer if the event was a request.
    pub(super) fn incoming_event(&mut self, id: MigrationId, event: TargetEvent) -> AnswerBody {
        let now = self.now;
        let none = || deny(DenialCode::UnknownMigration, "no such migration here");
        let Some(run) = self.incoming.get_mut(&id) else { return none() };
        match &event {
            TargetEvent::Asked(request) => {
                run.lease_until = now.plus(self.config.migration.lease);
                if let (RequestBody::Cancel { reason }, true) = (&**request, run.is_leased()) {
                    run.end_because(format!("{} called it off: {reason}", run.peer.jid));
                }
            }
            TargetEvent::LeaseExpired => run.end_because(format!("{} asked nothing any more", run.peer.jid)),
            _ => {}
        }
        if let TargetEvent::StageProgress(report) = &event {
            run.advance.report(&mut run.view.progress, report, now);
            let carried = &mut run.view.account.carried_bytes;
            *carried = (*carried).max(report.bytes_done);
        }
        let effects = run.machine.step(event);
        let p = &mut run.view.progress;
        p.updated = now;
        let (phase, fraction) = match run.machine.phase() {
            Phase::Reserved => (MigrationPhase::Negotiate, 0.01),
            Phase::Staging(pass) | Phase::Staged(pass) => {
                let ran = !(pass.last && pass.number == 1);
                let name = if pass.last && ran { MigrationPhase::SwitchOver } else { MigrationPhase::Stage };
                (name, run.advance.in_pass(pass, ran, p))
            }
            Phase::TakingOver | Phase::Starting => (MigrationPhase::Start, 0.95),
            Phase::Owned if run.machine.problem().is_some() => (MigrationPhase::HandedOver, 1.0),
            Phase::Owned => (MigrationPhase::Completed, 1.0),
            Phase::Abandoned => (MigrationPhase::Cancelled, 1.0),
        };
        if p.phase != phase {
            let before = std::mem::replace(&mut p.phase, phase);
            *run.view.account.phase_ms.entry(before.to_string()).or_default() +=
                now.since(run.phase_since).as_millis() as u64;
            run.phase_since = now;
        }
        p.fraction = p.fraction.max(fraction);
        let mut answer = none();
        for effect in effects {
            match effect {
                ArrivalEffect::Answer(a) => answer = *a,
                other => self.incoming_effect(id, other),
            }
        }
        let ended = self
            .incoming
            .get(&id)
            .is_some_and(|r| matches!(r.machine.phase(), Phase::Owned | Phase::Abandoned));
        if ended {
            self.incoming_ended(id);
        }
        answer
    }

    fn incoming_effect(&mut self, id: MigrationId, effect: ArrivalEffect) {
        let Some(run) = self.incoming.get_mut(&id) else { return };
        let (peer, matter, vm) = (run.peer.clone(), run.matter, run.matter.vm);
        match effect {
            ArrivalEffect::Answer(_) => {}
            ArrivalEffect::Stage(init) => self.stage(id, *init),
            ArrivalEffect::TakeOver(signed) => {
                let result = self.take_over(id, signed);
                self.incoming_event(id, TargetEvent::TookOver(result));
            }
            ArrivalEffect::Start => {
                fault::point("target-starting");
                if !self.start_machine(vm, Some(id)) {
                    let why = "its record does not let it run here".to_owned();
                    self.arrival_started(id, Err(why));
                }
            }
            ArrivalEffect::AskDelete { boot_ms } => {
                fault::point("target-telling");
                run.view.account.boot_ms = boot_ms;
                if let Some(ms) = boot_ms {
                    run.view.account.phase_ms.insert("boot".into(), ms);
                }
                let view = run.view.clone();
                self.remember(view);
                self.run_errand(peer, matter, RequestBody::Delete { boot_ms });
            }
            ArrivalEffect::CleanUp => {
                let (disks, staged, holds) = (run.disks.clone(), run.staged, run.holds);
                self.emit(Effect::EndStaging(id));
                // Whatever ended the move, the next one need not carry again what came.
                if staged {
                    return self.keep_interrupted(vm, disks, Some((id, peer.jid)), holds);
                }
                tracing::info!(migration = %id, "removing what was staged");
                let no_record = !self.vms.contains_key(&vm);
                self.emit(Effect::RemoveStaged { vm, disks, no_record });
            }
        }
    }

    fn stage(&mut self, id: MigrationId, init: Initialization) {
        fault::point("target-staging");
        let Some(run) = self.incoming.get_mut(&id) else { return };
        run.component_names = init.component_names.clone();
        run.view.account.components_needed = init.component_names.len() as u32;
        let is_first = !std::mem::replace(&mut run.staged, true);
        // Found after a restart, it is known how it ended. What only reserved is not worth a note.
        self.book.note_later(&run.view);
        let (from, spec, disks) = (run.peer.clone(), run.spec.clone(), run.disks.clone());
        let account = run.machine.account().clone();
        let (own, source) = (spec.id, &from.jid);
        // Only what that member once had itself: from what is not asked for it learns nothing.
        let came_from_it = |vm: &&Vm| {
            vm.record.spec.id != own && vm.record.arrival.as_ref().is_some_and(|a| a.from == *source)
        };
        let neighbours =
            self.vms.values().filter(came_from_it).map(|vm| DisksOf::record(&vm.record)).collect();
        let left = self.vms.get(&own).filter(|vm| !vm.record.is_here());
        let seeds = left.map(|vm| DisksOf::record(&vm.record));
        let lenders = self.trusted_online().filter(|p| p.jid != *source).take(LENDERS_MAX).collect();
        let earlier = if is_first { self.take_interrupted(own) } else { None };
        if let (Some((_, holds)), Some(run)) = (&earlier, self.incoming.get_mut(&id)) {
            (run.holds, run.held) = (*holds, *holds);
        }
        let goes_on_with = earlier.map(|(disks, _)| disks);
        let order = Box::new(StageOrder {
            migration: id,
            from,
            spec,
            init,
            disks,
            goes_on_with,
            seeds,
            lenders,
            neighbours,
            account,
        });
        let token = self.expect(Pending::Staged(id));
        self.emit(Effect::Stage { token, order });
    }

    pub(super) fn staging(&mut self, id: MigrationId, report: StageReport) {
        if let Some(run) = self.incoming.get_mut(&id) {
            account::came(&mut run.view.account, &report.account);
            run.holds.root_delta_bytes = run.held.root_delta_bytes.saturating_add(report.root_delta_bytes);
            run.holds.user_data_bytes = run.held.user_data_bytes.saturating_add(report.user_data_bytes);
        }
        self.incoming_event(id, TargetEvent::StageProgress(report.progress));
    }

    pub(super) fn stage_finished(&mut self, id: MigrationId, result: Result<StageAccount, Denial>) {
        let Some(run) = self.incoming.get_mut(&id) else { return };
        let is_last = matches!(run.machine.phase(), Phase::Staging(pass) if pass.last);
        fault::point(if is_last { "target-staged-last" } else { "target-staged" });
        match &result {
            Ok(account) => {
                account::came(&mut run.view.account, account);
                if let Phase::Staging(Pass { root_delta, user_data, .. }) = *run.machine.phase() {
                    run.holds = Holds { seed: Some(Seed { root_delta, user_data }), ..Holds::default() };
                    run.held = run.holds;
                }
            }
            Err(denial) => {
                tracing::warn!(migration = %id, reason = denial.text.as_str(), "staging failed");
            }
        }
        self.incoming_event(id, TargetEvent::StageFinished(result));
    }

    /// From the moment the record is saved, the VM is ours.
    fn take_over(&mut self, id: MigrationId, signed: SignedHandOver) -> Result<Receipt, Denial> {
        let fail = |text: &str| Denial::new(DenialCode::HandOver, text);
        let broken = |e: &dyn std::error::Error| Denial::new(DenialCode::Other, chain(e));
        let run = self.incoming.get(&id).ok_or_else(|| fail("unknown migration"))?;
        let h = signed.verify().map_err(|e| fail(&e.to_string()))?;
        let records = &self.book;
        let known = self.known(h.vm).map_err(|e| broken(&e))?;
        let kept = records.receipt(id).map_err(|e| broken(&e))?;
        let promised = records.has_returned(h.vm, h.epoch, Some(&run.peer.key))
            || self.promising.contains(&(h.vm, run.peer.key));
        let guest = Guest {
            spec: run.spec.clone(),
            components: run.component_names.iter().map(ToString::to_string).collect(),
            disks: run.disks.clone(),
            // Should this process end here, the next one starts the VM.
            run: run.machine.run(),
            reservation: run.machine.agreement().reservation,
            now: self.now,
            grace: self.config.migration.grace_period,
        };
        let given = Given { promised, receipt: kept.as_ref() };
        let taken = self.book.law().take_over(
            self.standing(h.vm, &known),
            given,
            run.offer.lineage.as_ref(),
            signed,
            &*self.key,
            guest,
        );
        let (mut record, lineage) = taken.map_err(|refusal| {
            if refusal.is_false_claim() {
                let peer = run.peer.jid.clone();
                tracing::warn!(migration = %id, vm = %h.vm, from = %peer, reason = chain(&refusal), "not taken over");
            }
            denial(&refusal)
        })?;
        // The record to come forgets how the VM arrived before.
        if let Some(previous) = self.vms.get(&h.vm) {
            record.settings = previous.record.settings.clone();
            record.ignored_stop = previous.record.ignored_stop;
            records.keep_receipts(&previous.record).map_err(|e| broken(&e))?;
        }
        self.keep_lineage(&lineage).map_err(|e| broken(&e))?;
        let Some(receipt) = record.arrival.as_ref().map(|a| a.receipt.clone()) else {
            return Err(fail("no receipt was made"));
        };
        fault::point("target-taking-over");
        records.save_ownership(&record).map_err(|e| broken(&e))?;
        fault::point("target-taken-over");
        // Not before: a receipt that is kept is given to whoever asks.
        if let Err(e) = records.save_receipt(id, &receipt) {
            tracing::warn!(migration = %id, error = chain(&e), "the receipt lies in the VM's record alone");
        }
        if let Err(e) = self.keep_lineage(&self.book.law().known(lineage, Some(&record))) {
            tracing::warn!(migration = %id, error = chain(&e), "the last link of its history lies in the VM's record alone");
        }
        tracing::info!(migration = %id, vm = %record.spec.name, epoch = h.epoch, "taken over");
        // Nothing else may begin before it was started.
        let hold = if record.run { Hold::Starting } else { Hold::Free };
        self.vms.insert(h.vm, Vm { hold, ..Vm::new(record) });
        self.effects.push(Effect::KeepStaged(id));
        if let Some(run) = self.incoming.get_mut(&id) {
            run.view.progress.handed_over = true;
            self.guard.end_well(&run.peer.jid);
        }
        Ok(receipt)
    }

    /// After [`Broker::start_machine`] for an arriving VM.
    pub(super) fn arrival_started(&mut self, id: MigrationId, result: Result<(), String>) {
        fault::point("target-started");
        let Some(run) = self.incoming.get(&id) else { return };
        let vm = run.matter.vm;
        self.lets_go(vm, Hold::Starting);
        if result.is_ok() {
            let token = self.expect(Pending::Booted(id));
            self.emit(Effect::WatchBoot { token, vm });
        }
        self.incoming_event(id, TargetEvent::Started(result));
    }

    pub(super) fn booted(&mut self, id: MigrationId, boot_ms: Option<u64>) {
        self.incoming_event(id, TargetEvent::Booted { boot_ms });
    }

    pub(super) fn acknowledged(&mut self, id: MigrationId, vm: VmId) {
        let Some(entry) = self.vms.get_mut(&vm) else { return };
        if let Some(record) = self.book.law().acknowledge(&entry.record, id) {
            entry.record = record;
            if let Err(e) = self.book.save_vm(&entry.record) {
                tracing::warn!(vm = %vm, error = chain(&e), "acknowledgement not recorded");
            }
        }
        // The source may still be asking how the start went: the run is dropped a little later.
    }

    fn incoming_ended(&mut self, id: MigrationId) {
        let Some(run) = self.incoming.get_mut(&id) else { return };
        if run.view.progress.ended {
            return;
        }
        run.view.progress.ended = true;
        let abandoned = *run.machine.phase() == Phase::Abandoned;
        if let Some(reason) =
            run.ended_because.clone().filter(|_| abandoned && run.machine.problem().is_none())
        {
            let arrival = format!("arrival of {}", run.spec.name);
            run.view.problem = Some(Problem::new(ProblemKind::Cancelled, arrival, reason));
        }
        if let Some(reason) = run.machine.problem() {
            let vm = format!("VM {}", run.spec.name);
            run.view.problem = Some(
                Problem::new(ProblemKind::Failed, vm, reason)
                    .next("see its console log, then 'cicada vm start'"),
            );
        }
        let view = run.view.clone();
        self.remember(view);
        if abandoned {
            self.incoming.remove(&id);
        }
        self.presence_changed();
    }

    /// Ends reservations nobody redeemed, and forgets arrivals long over.
    pub(super) fn expire_leases(&mut self) {
        let now = self.now;
        // Once the VM has left, or come once more, its record says nothing of it: receipts are kept beside it.
        let open: HashSet<_> = self
            .vms
            .values()
            .filter_map(|vm| vm.record.arrival.as_ref().filter(|a| !a.acknowledged).map(|a| a.migration))
            .collect();
        self.incoming.retain(|id, run| {
            run.is_unfinished() || open.contains(id) || now.since(run.view.progress.updated) < KEPT_AFTER_END
        });
        let over: Vec<_> = self
            .incoming
            .iter()
            .filter(|(_, r)| r.machine.leased() && r.lease_until < now)
            .map(|(id, _)| *id)
            .collect();
        for id in over {
            tracing::info!(migration = %id, "lease ran out");
            self.incoming_event(id, TargetEvent::LeaseExpired);
        }
    }

    /// Starts VMs that were taken over before a restart and tells their sources.
    pub(super) fn resume_incoming(&mut self) {
        let arrived: Vec<_> = self
            .vms
            .values()
            .filter(|vm| vm.record.is_here())
            .filter_map(|vm| {
                vm.record
                    .arrival
                    .clone()
                    .filter(|a| !a.acknowledged)
                    .map(|a| (vm.record.spec.id, a, vm.record.epoch))
            })
            .collect();
        for (vm, arrival, epoch) in arrived {
            let peer = Peer { jid: arrival.from.clone(), key: arrival.from_key };
            let matter = Matter { migration: arrival.migration, vm, epoch: epoch - 1 };
            self.run_errand(peer, matter, RequestBody::Delete { boot_ms: None });
        }
    }
}

/// How a request is answered.
pub(super) enum Answered {
    Now(AnswerBody),
    /// Something is looked up first.
    Later,
    /// With the return, once this promise is durable.
    Promised(ReturnRecord, Box<Return>),
}

fn returned(back: Return) -> AnswerBody {
    let denial = Denial::new(DenialCode::UnknownMigration, "the target had not taken the VM over");
    AnswerBody::Returned { back, denial }
}

fn deny(code: DenialCode, text: &str) -> AnswerBody {
    AnswerBody::Denied(Denial::new(code, text))
}
