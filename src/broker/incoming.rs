//! Migrations that come to this cloud, and the answers to every request of another broker.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::clock::UnixMillis;
use crate::fault;
use crate::migration::handover::{Receipt, SignedHandOver};
use crate::migration::message::{CheckAnswer, Initialization, StageAccount};
use crate::migration::target::{Agreement, Effect, Event as TargetEvent, Phase, Target};
use crate::migration::{AnswerBody, Denial, DenialCode, Envelope, RequestBody};
use crate::placement;
use crate::types::{MemberJid, MigrationId, VmId};
use crate::vm::VmSpec;

use super::account::{self, new_view};
use super::interface::MigrationView;
use super::negotiation;
use super::problem::{Problem, ProblemKind};
use super::records::{Arrival, ReturnRecord, VmRecord};
use super::shared::{Matter, Peer};
use super::staging::{self, StageJob, Staged};
use super::vms::{Busy, Vm};
use super::{Broker, Input};

/// How long an arrival that is over still answers its source.
const KEPT_AFTER_END: Duration = Duration::from_secs(120);
/// Members asked to lend components for one migration.
const LENDERS_MAX: usize = 4;
/// How long a guest is watched for its ready line before its boot counts as unobserved.
const BOOT_WATCH: Duration = Duration::from_secs(600);

/// One migration this broker is the target of.
pub struct Incoming {
    machine: Target,
    peer: Peer,
    matter: Matter,
    spec: VmSpec,
    pub view: MigrationView,
    lease_until: UnixMillis,
    component_names: Vec<String>,
    /// The staged disks between passes; taken by the pass that works on them.
    staged: Option<Staged>,
    cancel: CancellationToken,
    dir_name: String,
    begun: UnixMillis,
    /// Another migration of the same VM took its place: what it staged is kept for that.
    superseded: bool,
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
    pub fn is_unfinished(&self) -> bool {
        !matches!(self.machine.phase(), Phase::Owned | Phase::Abandoned)
    }
    pub fn spec(&self) -> &VmSpec {
        &self.spec
    }
}

impl Broker {
    /// Answers a sealed request; `None` means the sender is not trusted and learns nothing.
    pub(super) fn asked(&mut self, from: MemberJid, payload: &[u8], reply: oneshot::Sender<Option<Vec<u8>>>) {
        let now = self.shared.now();
        let key = match self.members.trusted_key(&from) {
            Ok(key) => key,
            Err(reason) => {
                self.refusals += 1;
                tracing::warn!(member = %from, reason, "request refused");
                let _ = reply.send(None);
                return;
            }
        };
        let opened = Envelope::<RequestBody>::open(payload, &key, &from, &self.shared.me, now)
            .and_then(|e| self.replay.admit(&e, now).map(|()| e));
        let request = match opened {
            Ok(request) => request,
            Err(e) => {
                self.refusals += 1;
                tracing::warn!(member = %from, reason = super::problem::chain(&e), "request refused");
                let _ = reply.send(None);
                return;
            }
        };
        let peer = Peer { jid: from, key };
        if let RequestBody::Configuration { .. } = request.body {
            self.answer_check(&peer, request, reply);
            return;
        }
        if let RequestBody::Content { .. } = request.body {
            self.answer_content(&peer, request, reply);
            return;
        }
        let answer = self.answer_request(&peer, &request);
        let _ = reply.send(self.shared.answer(&request, answer).ok());
    }

    fn answer_check(
        &mut self,
        peer: &Peer,
        request: Envelope<RequestBody>,
        reply: oneshot::Sender<Option<Vec<u8>>>,
    ) {
        let RequestBody::Configuration { spec, components, packs } = &request.body else { return };
        let room = self.room(&peer.jid, Some(spec.id));
        let seed = self.vms.get(&spec.id).and_then(|vm| vm.record.given_up()).map(|g| g.seed);
        let bad = spec.check().err().map(|text| Denial::new(DenialCode::Other, text));
        let (shared, spec) = (self.shared.clone(), spec.clone());
        let (components, packs, source) = (components.clone(), packs.clone(), peer.jid.clone());
        tokio::task::spawn_blocking(move || {
            let composed = shared.composer.is_composed(&spec.recipe);
            let needed = negotiation::storage_needed(&spec, composed);
            let (mut blockers, differences) = placement::assess(&room, &spec, &source, needed);
            blockers.extend(bad);
            let (components_lacking, packs_lacking) =
                negotiation::holdings(&shared.repository, &components, &packs);
            let answer = CheckAnswer { differences, blockers, components_lacking, packs_lacking, seed };
            let _ = reply.send(shared.answer(&request, AnswerBody::Configuration(answer)).ok());
        });
    }

    fn answer_request(&mut self, peer: &Peer, request: &Envelope<RequestBody>) -> AnswerBody {
        let id = request.migration;
        let known = self.incoming.get(&id).map(|run| run.peer == *peer && run.matter.vm == request.vm);
        match (&request.body, known) {
            (_, Some(false)) => deny(DenialCode::NotYours, "this migration is another member's"),
            (RequestBody::Delete { boot_ms }, _) => self.answer_delete(peer, request, *boot_ms),
            (RequestBody::Suspend | RequestBody::Stop, _) => {
                deny(DenialCode::Unsupported, "cold migrations are driven by their source")
            }
            (body, Some(true)) => self.incoming_event(id, TargetEvent::Asked(Box::new(body.clone()))),
            (RequestBody::Reservation { spec }, None) => self.reserve(peer, request, spec),
            (RequestBody::Start { hand_over, .. }, None) => self.start_unknown(peer, hand_over),
            (RequestBody::Cancel { .. }, None) => AnswerBody::Cancelled,
            _ => deny(DenialCode::UnknownMigration, "no such migration here; the reservation may have ended"),
        }
    }

    fn reserve(&mut self, peer: &Peer, request: &Envelope<RequestBody>, spec: &VmSpec) -> AnswerBody {
        if spec.id != request.vm {
            return deny(DenialCode::NotYours, "the reservation is for another VM than the message");
        }
        if let Err(text) = spec.check() {
            return deny(DenialCode::Other, &text);
        }
        fault::point("target-reserving");
        self.supersede(peer, spec.id);
        let composed = self.shared.composer.is_composed(&spec.recipe);
        let room = self.room(&peer.jid, None);
        let needed = negotiation::storage_needed(spec, composed);
        let (blockers, _) = placement::assess(&room, spec, &peer.jid, needed);
        if let Some(first) = blockers.into_iter().next() {
            return AnswerBody::Denied(first);
        }
        let in_doubt = |vm: &Vm| vm.record.given_up().is_some_and(|g| g.receipt.is_none());
        if self.vms.get(&spec.id).is_some_and(in_doubt) {
            return deny(DenialCode::Busy, "this cloud gave the VM up and still waits for the receipt");
        }
        let newest = self.vms.get(&spec.id).map_or(0, |vm| vm.record.epoch);
        if request.epoch < newest {
            return deny(DenialCode::HandOver, "this cloud has seen a later epoch of the VM");
        }
        let now = self.shared.now();
        let lease = self.shared.config.migration.lease;
        let agreement = Agreement {
            source: peer.jid.clone(),
            source_key: peer.key,
            target: self.shared.me.clone(),
            target_key: self.shared.key.public(),
            migration: request.migration,
            vm: spec.id,
            epoch: request.epoch,
            recipe: spec.recipe,
        };
        let cloud = self.members.cloud_of(&peer.jid);
        let run = Incoming {
            machine: Target::new(agreement, lease.as_secs()),
            peer: peer.clone(),
            matter: Matter { migration: request.migration, vm: spec.id, epoch: request.epoch },
            view: new_view(request.migration, spec, "target", &peer.jid, cloud, now),
            spec: spec.clone(),
            lease_until: now.plus(lease),
            component_names: Vec::new(),
            staged: None,
            cancel: CancellationToken::new(),
            // Of its own: the copy of an earlier try may still be on its way out.
            dir_name: format!("disks-{}", uuid::Uuid::new_v4().simple()),
            begun: now,
            superseded: false,
        };
        tracing::info!(migration = %request.migration, vm = %spec.name, from = %peer.jid, "reserved");
        self.incoming.insert(request.migration, run);
        self.presence_changed();
        AnswerBody::Reserved { expires_in_s: lease.as_secs() }
    }

    /// A source that asks anew for the same VM has forgotten its earlier migration.
    fn supersede(&mut self, peer: &Peer, vm: VmId) {
        let earlier = self.incoming.iter().filter(|(_, run)| run.gives_way_to(vm, &peer.jid));
        let ids: Vec<_> = earlier.map(|(id, _)| *id).collect();
        for id in ids {
            tracing::info!(migration = %id, "its source begins anew");
            if let Some(run) = self.incoming.get_mut(&id) {
                run.superseded = true;
            }
            self.incoming_event(id, TargetEvent::LeaseExpired);
        }
    }

    /// A hand-over for a migration nobody here remembers: either we took the VM over before a
    /// restart, or we never will.
    fn start_unknown(&mut self, peer: &Peer, signed: &SignedHandOver) -> AnswerBody {
        let h = match signed.verify() {
            Ok(h) if h.target == self.shared.me && h.target_key == self.shared.key.public() => h,
            Ok(_) => return deny(DenialCode::HandOver, "the hand-over is for another target"),
            Err(e) => return deny(DenialCode::HandOver, &e.to_string()),
        };
        if h.source != peer.jid || h.source_key != peer.key {
            return deny(DenialCode::HandOver, "the hand-over is another source's");
        }
        let arrived = self
            .vms
            .get(&h.vm)
            .and_then(|vm| vm.record.arrival.as_ref())
            .filter(|a| a.migration == h.migration);
        let receipt = arrived.map(|a| a.receipt.clone()).or_else(|| self.shared.records.receipt(h.migration));
        if let Some(receipt) = receipt {
            let running = self.shared.driver.state(h.vm).is_ok_and(|s| s == crate::vm::PowerState::Running);
            return AnswerBody::Started {
                receipt,
                running,
                problem: (!running).then(|| "it is not running at this moment".into()),
                account: StageAccount::default(),
            };
        }
        // The promise binds from here on, whatever happens to this process.
        let promise = ReturnRecord { vm: h.vm, epoch: h.epoch, hand_over: signed.clone() };
        fault::point("target-returning");
        match self.shared.records.save_return(&promise) {
            Ok(()) => {
                fault::point("target-returned");
                tracing::info!(migration = %h.migration, vm = %h.vm, "hand-over returned: its staged copy is gone");
                let denial = Denial::new(
                    DenialCode::UnknownMigration,
                    "the target restarted and had forgotten the migration",
                );
                AnswerBody::Returned { back: signed.clone().give_back(&self.shared.key), denial }
            }
            Err(e) => deny(DenialCode::Other, &super::problem::chain(&e)),
        }
    }

    fn answer_delete(
        &mut self,
        peer: &Peer,
        request: &Envelope<RequestBody>,
        boot_ms: Option<u64>,
    ) -> AnswerBody {
        let given = self.vms.get(&request.vm).and_then(|vm| vm.record.given_up());
        match given {
            Some(g) if g.migration == request.migration && g.to == peer.jid => {
                let grace = g
                    .scrub_after
                    .map_or(self.shared.config.migration.grace_period, |t| t.since(self.shared.now()));
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
        let now = self.shared.now();
        let none = || deny(DenialCode::UnknownMigration, "no such migration here");
        let Some(run) = self.incoming.get_mut(&id) else { return none() };
        if matches!(event, TargetEvent::Asked(_)) {
            run.lease_until = now.plus(self.shared.config.migration.lease);
        }
        let effects = run.machine.step(event);
        let p = &mut run.view.progress;
        p.updated = now;
        let (phase, fraction) = match run.machine.phase() {
            Phase::Reserved => ("negotiate", 0.01),
            Phase::Staging(pass) | Phase::Staged(pass) if !pass.last => ("stage", 0.1),
            Phase::Staging(_) | Phase::Staged(_) => ("switch-over", 0.85),
            Phase::TakingOver | Phase::Starting => ("start", 0.95),
            Phase::Owned => ("completed", 1.0),
            Phase::Abandoned => ("cancelled", 1.0),
        };
        p.phase = phase.into();
        p.fraction = p.fraction.max(fraction);
        let mut answer = none();
        for effect in effects {
            match effect {
                Effect::Answer(a) => answer = *a,
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

    fn incoming_effect(&mut self, id: MigrationId, effect: Effect) {
        let shared = self.shared.clone();
        let Some(run) = self.incoming.get_mut(&id) else { return };
        let (peer, matter, vm) = (run.peer.clone(), run.matter, run.matter.vm);
        match effect {
            Effect::Answer(_) => {}
            Effect::Stage(init) => self.stage(id, *init),
            Effect::TakeOver(signed) => {
                let result = self.take_over(id, signed);
                self.shared.post(Input::Incoming(id, TargetEvent::TookOver(result)));
            }
            Effect::Start => {
                fault::point("target-starting");
                self.start_machine(vm, Some(id));
            }
            Effect::AskDelete { boot_ms } => {
                fault::point("target-telling");
                run.view.account.boot_ms = boot_ms;
                if let Some(ms) = boot_ms {
                    run.view.account.phase_ms.insert("boot".into(), ms);
                }
                let view = run.view.clone();
                self.remember(view);
                tokio::spawn(async move {
                    for attempt in 0u64..20 {
                        let asked = shared.ask(&peer, matter, RequestBody::Delete { boot_ms }).await;
                        if matches!(asked, Ok(AnswerBody::Deleted { .. } | AnswerBody::Denied(_))) {
                            shared.post(Input::apply(move |b| b.acknowledged(id, vm)));
                            return;
                        }
                        tokio::time::sleep(Duration::from_secs(2 + attempt * 3)).await;
                    }
                });
            }
            Effect::CleanUp => {
                run.cancel.cancel();
                run.staged = None;
                let dir = shared.records.vm_dir(vm).join(&run.dir_name);
                if run.superseded && dir.exists() {
                    return self.keep_interrupted(vm, dir);
                }
                let no_record = !self.vms.contains_key(&vm);
                tracing::info!(migration = %id, "removing what was staged");
                tokio::task::spawn_blocking(move || staging::remove_staged(&shared, vm, &dir, no_record));
            }
        }
    }

    /// Trusted members that are online, but for the one a VM comes from.
    fn lenders(&self, source: &MemberJid) -> Vec<Peer> {
        let online = self.members.all().filter(|m| m.is_online() && m.jid != *source);
        let trusted = online.filter_map(|m| {
            self.members.trusted_key(&m.jid).ok().map(|key| Peer { jid: m.jid.clone(), key })
        });
        trusted.take(LENDERS_MAX).collect()
    }

    fn stage(&mut self, id: MigrationId, init: Initialization) {
        fault::point("target-staging");
        let Some(run) = self.incoming.get_mut(&id) else { return };
        run.component_names = init.component_names.clone();
        let (own, peer) = (run.matter.vm, run.peer.jid.clone());
        let seeds =
            self.vms.get(&run.matter.vm).filter(|vm| !vm.record.is_here()).map(|vm| vm.record.clone());
        let seeds = seeds.map(|record| self.disk_paths(&record));
        // Only what that member once had itself: from what is not asked for it learns nothing.
        let from_peer =
            |vm: &&Vm| vm.record.spec.id != own && vm.record.arrival.as_ref().is_some_and(|a| a.from == peer);
        let neighbours = self.vms.values().filter(from_peer).map(|vm| self.disk_paths(&vm.record)).collect();
        let lenders = self.lenders(&peer);
        let Some(run) = self.incoming.get(&id) else { return };
        if run.staged.is_none() {
            let dir = self.shared.records.vm_dir(run.matter.vm).join(&run.dir_name);
            self.take_interrupted(run.matter.vm, &dir);
        }
        let Some(run) = self.incoming.get_mut(&id) else { return };
        let (progress, mut reports) = tokio::sync::watch::channel(Default::default());
        let job = StageJob {
            shared: self.shared.clone(),
            peer: run.peer.clone(),
            spec: run.spec.clone(),
            init,
            dir: self.shared.records.vm_dir(run.matter.vm).join(&run.dir_name),
            seeds,
            neighbours,
            lenders,
            staged: run.staged.take(),
            account: run.machine.account().clone(),
            progress,
            cancel: run.cancel.clone(),
        };
        let shared = self.shared.clone();
        tokio::spawn(async move {
            let work = tokio::spawn(staging::run(job));
            while reports.changed().await.is_ok() {
                let p: crate::migration::message::Progress = reports.borrow_and_update().clone();
                shared.post(Input::Incoming(id, TargetEvent::StageProgress(p)));
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            let result = match work.await {
                Ok(result) => result,
                Err(e) => Err(Denial::new(DenialCode::Other, format!("staging ended early: {e}"))),
            };
            shared.post(Input::apply(move |b| b.stage_finished(id, result)));
        });
    }

    fn stage_finished(&mut self, id: MigrationId, result: Result<(Staged, StageAccount), Denial>) {
        let Some(run) = self.incoming.get_mut(&id) else { return };
        let is_last = matches!(run.machine.phase(), Phase::Staging(pass) if pass.last);
        fault::point(if is_last { "target-staged-last" } else { "target-staged" });
        let event = match result {
            Ok((staged, account)) => {
                account::stage(&mut run.view.account, &account);
                run.staged = Some(staged);
                Ok(account)
            }
            Err(denial) => {
                tracing::warn!(migration = %id, reason = denial.text, "staging failed");
                Err(denial)
            }
        };
        self.incoming_event(id, TargetEvent::StageFinished(event));
    }

    /// From the moment the record is saved, the VM is ours.
    fn take_over(&mut self, id: MigrationId, signed: SignedHandOver) -> Result<Receipt, Denial> {
        let fail = |text: String| Denial::new(DenialCode::HandOver, text);
        let run = self.incoming.get_mut(&id).ok_or_else(|| fail("unknown migration".into()))?;
        let h = signed.verify().map_err(|e| fail(e.to_string()))?;
        if self.shared.records.has_returned(h.vm, h.epoch) {
            return Err(fail(format!("epoch {} of this VM was returned and will never run here", h.epoch)));
        }
        let previous = self.vms.get(&h.vm).map(|vm| vm.record.clone());
        if previous.as_ref().is_some_and(|r| r.is_here() || r.epoch >= h.epoch) {
            return Err(fail("this cloud has seen a later epoch of the VM".into()));
        }
        // The record to come forgets how the VM arrived before.
        if let Some(a) = previous.as_ref().and_then(|r| r.arrival.as_ref()) {
            let kept = self.shared.records.save_receipt(a.migration, &a.receipt);
            kept.map_err(|e| fail(super::problem::chain(&e)))?;
        }
        let receipt = signed.accept(&self.shared.key);
        let mut record =
            VmRecord::new(run.spec.clone(), run.component_names.clone(), &run.dir_name, self.shared.now());
        record.epoch = h.epoch;
        // Should this process end here, the next one starts the VM.
        record.run = run.machine.run();
        record.arrival = Some(Arrival {
            migration: id,
            from: run.peer.jid.clone(),
            from_key: run.peer.key,
            receipt: receipt.clone(),
            acknowledged: false,
        });
        fault::point("target-taking-over");
        self.shared.records.save_ownership(&record).map_err(|e| fail(super::problem::chain(&e)))?;
        fault::point("target-taken-over");
        run.staged = None;
        tracing::info!(migration = %id, vm = %record.spec.name, epoch = h.epoch, "taken over");
        // Nothing else may begin before it was started.
        let busy = record.run.then_some(Busy::Verb("starting"));
        self.vms.insert(h.vm, Vm { busy, ..Vm::new(record) });
        // The copy from before it left is older than what is ours now.
        if let Some(old) = previous {
            let dir: PathBuf = self.shared.records.vm_dir(h.vm).join(&old.disks);
            tokio::task::spawn_blocking(move || staging::scrub_dir(&dir));
        }
        Ok(receipt)
    }

    /// After [`Broker::start_machine`] for an arriving VM.
    pub(super) fn arrival_started(&mut self, id: MigrationId, result: Result<(), String>) {
        fault::point("target-started");
        let Some(run) = self.incoming.get(&id) else { return };
        let vm = run.matter.vm;
        if let Some(entry) = self.vms.get_mut(&vm) {
            entry.busy = None;
        }
        if result.is_ok() {
            let (shared, begun) = (self.shared.clone(), std::time::Instant::now());
            tokio::spawn(async move {
                let log = shared.driver.console_log(vm).ok();
                let boot_ms = match log {
                    Some(log) => super::vms::watch_boot(&log, BOOT_WATCH)
                        .await
                        .then(|| begun.elapsed().as_millis() as u64),
                    None => None,
                };
                shared.post(Input::Incoming(id, TargetEvent::Booted { boot_ms }));
            });
        }
        self.incoming_event(id, TargetEvent::Started(result));
    }

    fn acknowledged(&mut self, id: MigrationId, vm: crate::types::VmId) {
        let Some(entry) = self.vms.get_mut(&vm) else { return };
        if let Some(a) = entry.record.arrival.as_mut().filter(|a| a.migration == id && !a.acknowledged) {
            a.acknowledged = true;
            if let Err(e) = self.shared.records.save_vm(&entry.record) {
                tracing::warn!(vm = %vm, error = super::problem::chain(&e), "acknowledgement not recorded");
            }
        }
        // The source may still be asking how the start went: the run is dropped a little later.
    }

    fn incoming_ended(&mut self, id: MigrationId) {
        let now = self.shared.now();
        let Some(run) = self.incoming.get_mut(&id) else { return };
        if run.view.progress.ended {
            return;
        }
        run.view.progress.ended = true;
        if let Some(reason) = run.machine.problem() {
            let vm = format!("VM {}", run.spec.name);
            run.view.problem = Some(
                Problem::new(ProblemKind::Failed, vm, reason)
                    .next("see its console log, then 'cicada vm start'"),
            );
        }
        let seconds = now.since(run.begun).as_secs_f64();
        self.rates.record(&run.peer.jid, run.view.account.wire_bytes, seconds);
        let view = run.view.clone();
        let abandoned = *run.machine.phase() == Phase::Abandoned;
        self.remember(view);
        if abandoned {
            self.incoming.remove(&id);
        }
        self.presence_changed();
    }

    /// Ends reservations nobody redeemed, and forgets arrivals long over.
    pub(super) fn expire_leases(&mut self) {
        let now = self.shared.now();
        let acknowledged: HashSet<_> = self
            .vms
            .values()
            .filter_map(|vm| vm.record.arrival.as_ref().filter(|a| a.acknowledged).map(|a| a.migration))
            .collect();
        self.incoming.retain(|id, run| {
            run.is_unfinished()
                || !acknowledged.contains(id)
                || now.since(run.view.progress.updated) < KEPT_AFTER_END
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
            let shared = self.shared.clone();
            tokio::spawn(async move {
                for attempt in 0u64..20 {
                    let asked = shared.ask(&peer, matter, RequestBody::Delete { boot_ms: None }).await;
                    if matches!(asked, Ok(AnswerBody::Deleted { .. })) {
                        shared.post(Input::apply(move |b| b.acknowledged(arrival.migration, vm)));
                        return;
                    }
                    tokio::time::sleep(Duration::from_secs(5 + attempt * 3)).await;
                }
            });
        }
    }
}

fn deny(code: DenialCode, text: &str) -> AnswerBody {
    AnswerBody::Denied(Denial::new(code, text))
}
