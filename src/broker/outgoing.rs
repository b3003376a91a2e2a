//! Migrations that leave this cloud: the source machine's effects.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::clock::UnixMillis;
use crate::component::Recipe;
use crate::fault;
use crate::interface::{
    Event, Foretold, MigrationPhase, MigrationRole, MigrationView, Problem, ProblemKind, Reply, Side, chain,
};
use crate::migration::handover::{Receipt, Return, SignedHandOver};
use crate::migration::message::{Initialization, Seed, StageAccount};
use crate::migration::ownership::Gift;
use crate::migration::source::{Effect as MoveEffect, End, Event as SourceEvent, Found, Phase, Source};
use crate::migration::{AnswerBody, Denial, DenialCode, Pass, RequestBody};
use crate::types::{CloudName, Hash, MigrationId, PeerText, ReservationId, VmId};
use crate::vm::hypervisor::{Ability, StopMode};

use super::Broker;
use super::account::{self, Advance, new_view};
use super::effect::{CallId, Checked, Effect, Matter, Peer, Scanned, Serving, Unanswered};
use super::hold::{Hold, No, Verb};
use super::lineages;
use super::pending::Pending;

/// How long a hand-over may be without a sign of the target before its owner is said to be in doubt.
const IN_DOUBT_AFTER: Duration = Duration::from_secs(20);

/// How long a VM stands still for a target that fetches nothing, and how long a pass may last in which it
/// composes, and fetches nothing, while the VM runs or is off anyway.
const STALLED_AFTER: Duration = Duration::from_secs(300);
const PASS_STALLED_AFTER: Duration = Duration::from_secs(1800);
/// How often a target is told that a move was called off, and the pause between.
const CANCEL_TRIES_MAX: u32 = 5;
const CANCEL_PAUSE: Duration = Duration::from_secs(2);
/// Fetching less than this is fetching nothing: a target that takes a byte a minute gets no VM.
const ADVANCE_BYTES: u64 = 64 << 10;

/// One migration this broker is the source of.
#[derive(Clone)]
pub struct Outgoing {
    pub(super) machine: Source,
    pub(super) peer: Peer,
    pub(super) matter: Matter,
    /// Not there before the check, nor if the hand-over was found after a restart: nothing is staged any more.
    recipe: Option<Recipe>,
    component_names: Vec<PeerText>,
    ticket: Hash,
    /// What went to the target so far, as the data link counts it.
    sent_bytes: u64,
    advance: Advance,
    /// The target's reservation; none if it speaks the version before.
    reservation: Option<ReservationId>,
    checked: Option<Checked>,
    /// Of the last scan, for the last pass.
    firmware: Option<String>,
    pass: Option<Pass>,
    pub view: MigrationView,
    phase_since: UnixMillis,
    /// When the target was last heard to be at it, or the hand-over began.
    heard: UnixMillis,
    /// When the target was last seen to fetch something, and how much had been sent to it then.
    advanced: (UnixMillis, u64),
    /// What came of the last request, if not an answer that leads on.
    pub last_word: String,
    stopped_at: Option<UnixMillis>,
    /// By the target's word.
    runs_there: bool,
    force_stop: bool,
    /// Its guest was held still before.
    was_held: bool,
    /// Who is told how it goes on, and how it ends.
    watchers: Vec<CallId>,
}

/// Where a VM is to go.
#[derive(Clone)]
pub struct Course {
    pub peer: Peer,
    pub cloud: Option<CloudName>,
    /// How many tries restarts cut short.
    pub attempt: u32,
    /// A guest that does not end in time is switched off.
    pub force_stop: bool,
}

impl Outgoing {
    fn new(machine: Source, peer: Peer, matter: Matter, view: MigrationView, ticket: Hash) -> Self {
        let since = view.progress.updated;
        Self {
            machine,
            peer,
            matter,
            recipe: None,
            component_names: Vec::new(),
            ticket,
            sent_bytes: 0,
            advance: Advance::default(),
            reservation: None,
            checked: None,
            firmware: None,
            pass: None,
            view,
            phase_since: since,
            heard: since,
            advanced: (since, 0),
            last_word: String::new(),
            stopped_at: None,
            runs_there: false,
            force_stop: false,
            was_held: false,
            watchers: Vec::new(),
        }
    }

    /// Whether its guest is held for the first time.
    pub fn first_held(&mut self) -> bool {
        !std::mem::replace(&mut self.was_held, true)
    }

    /// Whether it is not known who owns the VM: it was given away, and the target does not say.
    pub fn in_doubt(&self, now: UnixMillis) -> bool {
        self.machine.phase() == Phase::HandingOver && now.since(self.heard) >= IN_DOUBT_AFTER
    }
}

impl Broker {
    /// Begins to move a VM that is ours and free.
    pub(super) fn begin_move(
        &mut self,
        vm: VmId,
        course: Course,
        call: Option<CallId>,
    ) -> Option<MigrationId> {
        let Course { peer, cloud, attempt, force_stop } = course;
        if let Err(problem) = self.may_begin_move(vm) {
            if let Some(call) = call {
                self.reply(call, Err(problem));
            }
            return None;
        }
        let (id, ticket, is_up) = (self.ids.migration(), self.ids.ticket(), !self.is_off(vm));
        let entry = self.vms.get_mut(&vm)?;
        entry.hold = Hold::Moving(id);
        let record = &entry.record;
        let mut view = new_view(id, &record.spec, MigrationRole::Source, &peer.jid, cloud, self.now);
        (view.progress.epoch, view.progress.attempt) = (record.epoch, attempt);
        let matter = Matter { migration: id, vm, epoch: record.epoch };
        let run = Outgoing {
            component_names: record.components.iter().map(PeerText::from).collect(),
            force_stop,
            watchers: call.into_iter().collect(),
            ..Outgoing::new(Source::new(Found { to_run: record.run, is_up }), peer, matter, view, ticket)
        };
        tracing::info!(migration = %id, vm = %record.spec.name, to = %run.peer.jid, "move begins");
        // Found unfinished after a restart, it is begun again.
        self.book.note_now(&run.view);
        self.outgoing.insert(id, run);
        self.outgoing_event(id, SourceEvent::Begin);
        Some(id)
    }

    fn may_begin_move(&self, vm: VmId) -> Result<(), Problem> {
        let Some(entry) = self.vms.get(&vm) else {
            return Err(Problem::new(ProblemKind::NotFound, "VM", "was deleted meanwhile"));
        };
        let name = &entry.record.spec.name;
        self.may(Verb::Move, vm).map_err(|no| self.refused(vm, name.as_str(), Verb::Move, no))?;
        self.book.law().may_move(&entry.record, entry.hold, entry.confirmed).map_err(|refusal| {
            Problem::new(ProblemKind::Conflict, format!("VM {name}"), refusal.to_string())
                .next("see 'cicada vm show'; move it when nothing holds it")
        })
    }

    /// Takes up hand-overs that were not acknowledged when the broker stopped.
    pub(super) fn resume_outgoing(&mut self) {
        let pending: Vec<_> = self
            .vms
            .values()
            .filter_map(|vm| {
                vm.record.given_up().filter(|g| g.in_doubt()).map(|g| (vm.record.clone(), g.clone()))
            })
            .collect();
        for (record, given) in pending {
            let Ok(hand_over) = given.hand_over() else {
                tracing::error!(vm = %record.spec.name, "the record of its hand-over is damaged; its owner is in doubt");
                continue;
            };
            let (id, ticket, now) = (given.migration, self.ids.ticket(), self.now);
            let peer = Peer { jid: given.to.clone(), key: given.to_key };
            let (machine, effects) = Source::resume(given.was_running, hand_over.sign(&*self.key));
            let mut view = self
                .history
                .take(&id)
                .unwrap_or_else(|| new_view(id, &record.spec, MigrationRole::Source, &peer.jid, None, now));
            (view.progress.ended, view.progress.handed_over, view.problem) = (false, true, None);
            // How long it was down is nobody's forecast.
            view.account.foretold = None;
            tracing::info!(migration = %id, vm = %record.spec.name, to = %peer.jid, "asking again whether the hand-over arrived");
            let matter = Matter { migration: id, vm: record.spec.id, epoch: record.epoch };
            let run = Outgoing {
                component_names: record.components.iter().map(PeerText::from).collect(),
                phase_since: now,
                heard: given.since,
                advanced: (given.since, 0),
                last_word: "this broker restarted and asks anew".into(),
                ..Outgoing::new(machine, peer, matter, view, ticket)
            };
            self.outgoing.insert(id, run);
            self.holds(record.spec.id, Hold::Moving(id));
            self.outgoing_report(id, Phase::HandingOver);
            effects.into_iter().for_each(|e| self.outgoing_effect(id, e));
        }
    }

    /// An operator decided the hand-over: the machine ends where it is.
    pub(super) fn resolved_outgoing(&mut self, id: MigrationId, owner: Side) {
        let Some(run) = self.outgoing.get_mut(&id) else { return };
        let (phase, reason) = match owner {
            Side::Here => (MigrationPhase::Failed, "was in doubt, and taken back by the operator"),
            Side::There => {
                (MigrationPhase::Completed, "was in doubt, and left to the target by the operator")
            }
        };
        let object = format!("move of {}", run.view.progress.vm);
        let next = format!("see 'cicada migration show {id}' for what the target says in the end");
        run.view.problem = Some(Problem::new(ProblemKind::Conflict, object, reason).next(next));
        self.end_outgoing(id, phase);
    }

    pub(super) fn watch_outgoing(&mut self, id: MigrationId, call: CallId) {
        if let Some(run) = self.outgoing.get_mut(&id) {
            run.watchers.push(call);
        }
    }

    /// Nobody listens there any more.
    pub(super) fn caller_gone(&mut self, call: CallId) {
        self.outgoing.values_mut().for_each(|run| run.watchers.retain(|watcher| *watcher != call));
    }

    /// Calls a migration off, if the hand-over has not begun.
    pub(super) fn cancel_outgoing(&mut self, id: MigrationId) -> Result<(), Problem> {
        let run = self.outgoing.get(&id);
        let run = run.ok_or_else(|| {
            Problem::new(ProblemKind::NotFound, format!("migration {id}"), "is not running")
        })?;
        if !run.machine.phase().can_cancel() {
            return Err(Problem::new(
                ProblemKind::Conflict,
                format!("migration {id}"),
                "the VM is already being handed over",
            )
            .next("wait for the end, then move it back"));
        }
        self.outgoing_event(id, SourceEvent::Cancel);
        Ok(())
    }

    pub(super) fn limit_outgoing(&mut self, id: MigrationId, bytes_per_s: Option<u64>) {
        if self.outgoing.contains_key(&id) {
            tracing::info!(migration = %id, ?bytes_per_s, "capped by the operator");
            self.emit(Effect::Cap(id, bytes_per_s));
        }
    }

    /// What the data link sent so far.
    pub(super) fn take_sent(&mut self, sent: &[(MigrationId, u64)]) {
        for (id, bytes) in sent {
            if let Some(run) = self.outgoing.get_mut(id) {
                run.sent_bytes = run.sent_bytes.max(*bytes);
            }
        }
    }

    pub(super) fn outgoing_event(&mut self, id: MigrationId, event: SourceEvent) {
        let Some(run) = self.outgoing.get_mut(&id) else { return };
        let before = run.machine.phase();
        let effects = run.machine.step(event);
        self.outgoing_report(id, before);
        for effect in effects {
            self.outgoing_effect(id, effect);
        }
    }

    /// Keeps the view true after a step.
    pub(super) fn outgoing_report(&mut self, id: MigrationId, before: Phase) {
        let now = self.now;
        let Some(run) = self.outgoing.get_mut(&id) else { return };
        let after = run.machine.phase();
        let ran = run.machine.was_up();
        run.view.account.carried_bytes = run.view.account.carried_bytes.max(run.sent_bytes);
        let (old, new) = (phase_name(before, ran), phase_name(after, ran));
        if old != new {
            *run.view.account.phase_ms.entry(old.to_string()).or_default() +=
                now.since(run.phase_since).as_millis() as u64;
            run.phase_since = now;
        }
        if before != after {
            run.heard = now;
            run.advanced.0 = now;
        }
        let in_doubt = run.in_doubt(now);
        let p = &mut run.view.progress;
        p.updated = now;
        p.phase = if in_doubt { MigrationPhase::InDoubt } else { new };
        p.detail = match after {
            Phase::Checking => format!("asking {} whether it can take the VM", run.peer.jid),
            Phase::Reserving => format!("reserving room at {}", run.peer.jid),
            Phase::Scanning { last: false, .. } => "hashing the disks while the VM runs".into(),
            Phase::Scanning { last: true, .. } if ran => "hashing what the last moments changed".into(),
            Phase::Scanning { last: true, .. } => "hashing the disks".into(),
            Phase::Staging(p) if !p.last => format!("pass {}: the target fetches what it lacks", p.number),
            Phase::Staging(_) if ran => "last pass: the VM is stopped".into(),
            Phase::Staging(_) => "the target fetches what it lacks; the VM does not run".into(),
            Phase::Stopping => "stopping the VM".into(),
            Phase::HandingOver if in_doubt => format!(
                "in doubt whether {} took the VM over; asking until it answers. It must not be started here",
                run.peer.jid
            ),
            Phase::GivingUp | Phase::HandingOver => format!("handing the VM over to {}", run.peer.jid),
            Phase::TakingBack => "the target gave the VM back".into(),
            Phase::Released if run.runs_there => format!("the VM runs in {}", run.peer.jid),
            Phase::Released => format!("the VM is in {}, and does not run", run.peer.jid),
            Phase::Abandoned => "ended without a hand-over; the VM is here".into(),
        };
        if run.machine.held() {
            p.detail.push_str("; the guest is held still");
        }
        let fraction = match after {
            Phase::Checking => 0.0,
            Phase::Reserving => 0.01,
            Phase::Scanning { last: false, .. } => 0.02,
            Phase::Scanning { last: true, .. } if !ran => 0.02,
            Phase::Staging(pass) => run.advance.in_pass(&pass, ran, p),
            Phase::Stopping | Phase::Scanning { .. } => p.fraction,
            Phase::GivingUp | Phase::HandingOver | Phase::TakingBack => 0.95,
            Phase::Released | Phase::Abandoned => 1.0,
        };
        p.fraction = p.fraction.max(fraction);
        // How it ended is said once, by who ends it.
        if !after.ended() {
            self.outgoing_publish(id);
        }
    }

    fn outgoing_publish(&mut self, id: MigrationId) {
        let Some(mut view) = self.outgoing.get(&id).map(|run| run.view.clone()) else { return };
        self.explain(&mut view);
        let watchers = self.outgoing.get(&id).map(|run| run.watchers.clone()).unwrap_or_default();
        for call in watchers {
            self.emit(Effect::Tell(call, Event::Migration(view.progress.clone())));
        }
    }

    pub(super) fn outgoing_effect(&mut self, id: MigrationId, effect: MoveEffect) {
        let Some(run) = self.outgoing.get_mut(&id) else { return };
        let (peer, matter) = (run.peer.clone(), run.matter);
        let vm = matter.vm;
        match effect {
            MoveEffect::Check => {
                let Some(spec) = self.spec_of(vm) else { return self.vm_is_gone(id) };
                let token = self.expect(Pending::MoveChecked(id));
                self.emit(Effect::Check { token, to: peer, about: matter, spec });
            }
            MoveEffect::AskReservation => {
                let Some(spec) = self.spec_of(vm) else { return self.vm_is_gone(id) };
                match self.known(vm) {
                    Ok(lineage) => {
                        let token = self.expect(Pending::MoveAnswered(id));
                        let lineage = Box::new(lineage);
                        self.emit(Effect::Reserve { token, to: peer, about: matter, spec, lineage });
                    }
                    Err(e) => {
                        let denial = Denial::new(DenialCode::Other, chain(&e))
                            .next("restore the VM's file below lineages/ from a backup");
                        let denied = SourceEvent::Answered(Box::new(AnswerBody::Denied(denial)));
                        self.outgoing_event(id, denied);
                    }
                }
            }
            MoveEffect::AskInitialization(pass) => {
                run.pass = Some(pass);
                match self.initialization(id, pass) {
                    Some(request) => self.ask_target(id, request),
                    None => self.vm_is_gone(id),
                }
            }
            MoveEffect::AskStart(hand_over) => {
                let run = run.machine.to_run();
                self.ask_target(id, RequestBody::Start { hand_over, run });
            }
            MoveEffect::Scan { last, pass } => {
                let Some(recipe) = &run.recipe else { return self.vm_is_gone(id) };
                let serving = Box::new(Serving {
                    migration: id,
                    to: peer.key,
                    ticket: run.ticket,
                    recipe: recipe.id(),
                    components: recipe.components.clone(),
                    seed: run.checked.as_ref().and_then(|checked| checked.seed),
                });
                let Some(entry) = self.vms.get(&vm) else { return self.vm_is_gone(id) };
                let record = Box::new(entry.record.clone());
                let token = self.expect(Pending::MoveScanned(id, vm));
                self.emit(Effect::Scan { token, record, serving, pass, last });
            }
            MoveEffect::Stop => {
                run.stopped_at = Some(self.now);
                let escalate = run.force_stop;
                let mode = StopMode::Graceful { timeout: self.stop_timeout(vm), escalate };
                let name = self.vms.get(&vm).map(|vm| vm.record.spec.name.to_string()).unwrap_or_default();
                let token = self.expect(Pending::MoveStopped(id, vm));
                self.emit(Effect::Stop { token, vm, name, mode });
            }
            MoveEffect::Suspend => self.hold_guest(id, vm),
            MoveEffect::Resume => self.resume_guest(vm),
            MoveEffect::GiveUp(pass) => {
                let result = self.give_up(id, pass);
                self.outgoing_event(id, SourceEvent::GaveUp(result));
            }
            MoveEffect::TakeBack(back) => {
                let result = self.take_back(id, back);
                self.outgoing_event(id, SourceEvent::TookBack(result));
            }
            MoveEffect::Wait { ms } => self.wake(Duration::from_millis(ms), Pending::MoveWait(id)),
            // The host goes down: it starts with the broker.
            MoveEffect::Restart if self.vms.get(&vm).is_some_and(|vm| vm.stopped_for_host) => {}
            MoveEffect::Restart => drop(self.start_machine(vm, None)),
            MoveEffect::TellCancel => self.tell_cancel(id, peer, matter, 0),
            MoveEffect::Release { receipt, running, problem, account } => {
                self.release(id, receipt, running, problem, account)
            }
            MoveEffect::Abandon(end) => self.abandon(id, end),
        }
    }

    fn spec_of(&self, vm: VmId) -> Option<Box<crate::vm::VmSpec>> {
        self.vms.get(&vm).map(|vm| Box::new(vm.record.spec.clone()))
    }

    /// What is moved was removed, or set aside, in the middle of it.
    fn vm_is_gone(&mut self, id: MigrationId) {
        let gone = Denial::new(DenialCode::Other, "the VM's record is gone");
        self.abandon(id, End::Denied(gone));
    }

    pub(super) fn waited(&mut self, id: MigrationId) {
        self.outgoing_event(id, SourceEvent::Timer);
    }

    pub(super) fn move_stopped(
        &mut self,
        id: MigrationId,
        vm: VmId,
        result: Result<(), Problem>,
        took: Duration,
    ) {
        self.note_stop(vm, took < self.stop_timeout(vm));
        if let Some(run) = self.outgoing.get_mut(&id) {
            run.view.account.shutdown_ms = Some(took.as_millis() as u64);
        }
        let result = result.map_err(|p| {
            Denial::new(DenialCode::Other, format!("the VM does not stop: {}", p.reason))
                .next("look at its console; 'cicada move --force-stop' switches it off when its time is over")
        });
        fault::point("source-stopped");
        self.outgoing_event(id, SourceEvent::Stopped(result));
    }

    /// Tells a target, a few times, that the move was called off.
    pub(super) fn tell_cancel(&mut self, id: MigrationId, to: Peer, about: Matter, tries: u32) {
        let reason = "the source called the move off".into();
        let token = self.expect(Pending::CancelTold { id, to: to.clone(), about, tries: tries + 1 });
        self.emit(Effect::Ask { token, to, about, body: Box::new(RequestBody::Cancel { reason }) });
    }

    pub(super) fn cancel_told(
        &mut self,
        id: MigrationId,
        to: Peer,
        about: Matter,
        tries: u32,
        answer: Result<AnswerBody, Unanswered>,
    ) {
        match answer {
            Ok(AnswerBody::Cancelled { kept_s }) => self.note_kept_there(id, Duration::from_secs(kept_s)),
            Ok(_) => {}
            Err(_) if tries < CANCEL_TRIES_MAX => {
                self.wake(CANCEL_PAUSE, Pending::CancelAgain { id, to, about, tries });
            }
            Err(_) => {
                tracing::warn!(migration = %id, target = %to.jid, "could not tell the target; its lease will run out");
            }
        }
    }

    fn initialization(&self, id: MigrationId, pass: Pass) -> Option<RequestBody> {
        let run = self.outgoing.get(&id)?;
        let entry = self.vms.get(&run.matter.vm)?;
        Some(RequestBody::Initialization(Box::new(Initialization {
            spec: entry.record.spec.clone(),
            recipe: BASE64.encode(run.recipe.as_ref()?.encode()),
            component_names: run.component_names.clone(),
            component_bytes: run.checked.as_ref().map_or(0, |c| c.component_bytes),
            pass,
            addresses: self.transfer_addresses.iter().map(PeerText::from).collect(),
            source_key: self.key.public(),
            ticket: run.ticket.to_string(),
            firmware: run.firmware.clone().filter(|_| pass.last),
        })))
    }

    /// A guest stands still for its last pass: a target that does not get on with it gets no VM.
    pub(super) fn end_stalled(&mut self) {
        let now = self.now;
        for run in self.outgoing.values_mut() {
            let sent = run.sent_bytes;
            if sent >= run.advanced.1.saturating_add(ADVANCE_BYTES) {
                run.advanced = (now, sent);
            }
        }
        let stalled = |run: &&Outgoing| {
            let Phase::Staging(pass) = run.machine.phase() else { return false };
            let stands_still = pass.last && run.machine.was_up();
            let limit = if stands_still { STALLED_AFTER } else { PASS_STALLED_AFTER };
            now.since(run.advanced.0) > limit
        };
        let ids: Vec<_> = self.outgoing.values().filter(stalled).map(|run| run.matter.migration).collect();
        ids.into_iter().for_each(|id| self.outgoing_event(id, SourceEvent::Stalled));
    }

    fn ask_target(&mut self, id: MigrationId, request: RequestBody) {
        let Some(run) = self.outgoing.get(&id) else { return };
        let (to, about) = (self.by_its_key_now(&run.peer), run.matter);
        let token = self.expect(Pending::MoveAnswered(id));
        self.emit(Effect::Ask { token, to, about, body: Box::new(request) });
    }

    pub(super) fn outgoing_answered(&mut self, id: MigrationId, answer: Result<AnswerBody, Unanswered>) {
        match &answer {
            Ok(AnswerBody::Reserved { .. }) => fault::point("source-reserved"),
            Ok(AnswerBody::Staged { .. }) => fault::point("source-staged"),
            Ok(AnswerBody::Started { .. }) => fault::point("source-start-answered"),
            _ => {}
        }
        let fits = |receipt: &Receipt| {
            let vm = self.outgoing.get(&id).and_then(|run| self.vms.get(&run.matter.vm));
            vm.is_some_and(|vm| self.book.law().receipt_fits(&vm.record, receipt).is_ok())
        };
        let is_false = matches!(&answer, Ok(AnswerBody::Started { receipt, .. }) if !fits(receipt));
        let Some(run) = self.outgoing.get_mut(&id) else { return };
        let event = match answer {
            Ok(AnswerBody::Started { .. }) if is_false => {
                run.last_word = "its receipt is for something else".into();
                tracing::warn!(migration = %id, peer = %run.peer.jid, "answered with a receipt that does not fit; ignored");
                SourceEvent::Unanswered
            }
            Ok(body) => {
                if let AnswerBody::Reserved { reservation, .. } = &body {
                    run.reservation = *reservation;
                    run.advance.counts_anew(&run.view.progress);
                }
                if let AnswerBody::Started { running, .. } = &body {
                    run.runs_there = *running;
                }
                if let AnswerBody::Denied(d) = &body {
                    run.last_word = format!("it denied: {}", d.text);
                }
                if let AnswerBody::Working(p) = &body {
                    let now = self.now;
                    run.heard = now;
                    run.advance.report(&mut run.view.progress, p, now);
                }
                if let AnswerBody::Staged { account, .. } = &body {
                    account::stage(&mut run.view.account, account);
                    account::carried(&mut run.view);
                }
                SourceEvent::Answered(Box::new(body))
            }
            Err(Unanswered(reason)) => {
                // Asked every few seconds, perhaps for days.
                if reason != run.last_word {
                    tracing::info!(migration = %id, peer = %run.peer.jid, reason, "no answer");
                }
                run.last_word = reason;
                if let Some(foretold) = &mut run.view.account.foretold {
                    foretold.disturbed = true;
                }
                SourceEvent::Unanswered
            }
        };
        self.outgoing_event(id, event);
    }

    pub(super) fn checked(&mut self, id: MigrationId, result: Result<Box<(Checked, Recipe)>, Denial>) {
        fault::point("source-checked");
        let Some(run) = self.outgoing.get_mut(&id) else { return };
        let event = result.map(|checked| {
            let (checked, recipe) = *checked;
            let a = &mut run.view.account;
            a.components_needed = checked.components_needed;
            a.components_held = checked.components_held;
            a.packs_needed = checked.packs_needed;
            run.view.progress.bytes_total = checked.component_bytes;
            (run.checked, run.recipe) = (Some(checked), Some(recipe));
        });
        self.outgoing_event(id, SourceEvent::Checked(event));
    }

    pub(super) fn scanned(&mut self, id: MigrationId, vm: VmId, result: Result<Scanned, Denial>) {
        fault::point("source-scanned");
        // Called off meanwhile, perhaps before the scan began to track changes.
        let Some(run) = self.outgoing.get_mut(&id) else {
            self.end_tracking(vm);
            return self.emit(Effect::EndServing(id));
        };
        if let (Ok(scanned), Phase::Scanning { pass: 1, .. }) = (&result, run.machine.phase()) {
            run.view.account.looking_ms = self.now.since(run.phase_since).as_millis() as u64;
            self.foretell_move(id, scanned.missing_bytes);
        }
        let Some(run) = self.outgoing.get_mut(&id) else { return };
        let event = result.map(|s| {
            run.view.account.last_scan_bytes = Some(s.read_bytes);
            run.firmware = s.firmware;
            (s.seed.root_delta, s.seed.user_data)
        });
        self.outgoing_event(id, SourceEvent::Scanned(event));
    }

    /// Says how long a move will take, now that it is known what it is to do.
    fn foretell_move(&mut self, id: MigrationId, disk_bytes_missing: u64) {
        let Some(run) = self.outgoing.get(&id) else { return };
        let Some(checked) = &run.checked else { return };
        let kept = checked.kept.unwrap_or_default();
        let there = kept.root_delta_bytes.saturating_add(kept.user_data_bytes);
        let components = checked.component_bytes.saturating_sub(checked.delta_saves_bytes);
        let (vm, peer) = (run.matter.vm, &run.peer.jid);
        let bytes = components.saturating_add(disk_bytes_missing.saturating_sub(there));
        let work = self.work(vm, bytes, checked.base_bytes, run.machine.was_up());
        let interval = self.forecasts.foretell(peer, vm, &work);
        let foretold = Foretold {
            work,
            low_s: interval.map(|i| i.low_s),
            high_s: interval.map(|i| i.high_s),
            disturbed: false,
        };
        if let Some(run) = self.outgoing.get_mut(&id) {
            run.view.account.foretold = Some(foretold);
        }
    }

    /// A move that ended asks no more where the VM writes. If another one of the same VM has begun,
    /// that one will.
    fn end_tracking(&mut self, vm: VmId) {
        let moves_again = self.vms.get(&vm).is_some_and(|entry| matches!(entry.hold, Hold::Moving(_)));
        if !moves_again && self.features.abilities.contains(&Ability::TrackChanges) {
            self.emit(Effect::EndTracking(vm));
        }
    }

    /// The point of no return: first the durable record, then the signature.
    fn give_up(&mut self, id: MigrationId, pass: Pass) -> Result<SignedHandOver, Denial> {
        let missing = || Denial::new(DenialCode::Other, "the VM's record is gone");
        let run = self.outgoing.get(&id).ok_or_else(missing)?;
        let vm = run.matter.vm;
        let gift = Gift {
            migration: id,
            source: self.me.clone(),
            source_key: self.key.public(),
            target: run.peer.jid.clone(),
            target_key: run.peer.key,
            reservation: run.reservation,
            seed: Seed { root_delta: pass.root_delta, user_data: pass.user_data },
            to_run: run.machine.to_run(),
            now: self.now,
        };
        let broken = |e: &dyn std::error::Error| Denial::new(DenialCode::Other, chain(e));
        let known = self.known(vm).map_err(|e| broken(&e))?;
        match self.may(Verb::GiveUp, vm) {
            Ok(()) => {}
            Err(No::Unknown) => return Err(missing()),
            Err(no) => return Err(Denial::new(DenialCode::Busy, format!("the VM {no}"))),
        }
        let entry = self.vms.get_mut(&vm).ok_or_else(missing)?;
        let (record, hand_over) = self
            .book
            .law()
            .give_up(&entry.record, &known, gift)
            .map_err(|refusal| lineages::denial(&refusal))?;
        fault::point("source-giving-up");
        self.book.save_ownership(&record).map_err(|e| Denial::new(DenialCode::Other, chain(&e)))?;
        fault::point("source-given-up");
        entry.record = record;
        // Found again after a restart even if the answer never comes.
        let run = self.outgoing.get_mut(&id).ok_or_else(missing)?;
        run.view.progress.handed_over = true;
        self.book.note_now(&run.view);
        tracing::info!(migration = %id, to = %run.peer.jid, epoch = hand_over.epoch, "given up");
        Ok(hand_over.sign(&*self.key))
    }

    fn take_back(&mut self, id: MigrationId, back: Return) -> Result<(), Denial> {
        let refuse = |text: String| Denial::new(DenialCode::HandOver, text);
        let run = self.outgoing.get(&id).ok_or_else(|| refuse("unknown".into()))?;
        let vm = run.matter.vm;
        let known = self.known(vm).map_err(|e| refuse(chain(&e)))?;
        let entry = self.vms.get(&vm).ok_or_else(|| refuse("unknown VM".into()))?;
        let (record, known) = self
            .book
            .law()
            .take_back(&entry.record, &known, &back)
            .map_err(|refusal| lineages::denial(&refusal))?;
        // Only evidence: without it the target would be asked again, and give it again.
        self.book.save_returned(id, &back).map_err(|e| refuse(chain(&e)))?;
        // Then the history, which is ahead of the record for a moment: both are facts by now.
        self.keep_lineage(&known).map_err(|e| refuse(chain(&e)))?;
        fault::point("source-taking-back");
        self.book.save_ownership(&record).map_err(|e| refuse(chain(&e)))?;
        fault::point("source-taken-back");
        if let Some(entry) = self.vms.get_mut(&vm) {
            entry.record = record;
        }
        Ok(())
    }

    fn release(
        &mut self,
        id: MigrationId,
        receipt: Receipt,
        running: bool,
        problem: Option<PeerText>,
        stage: StageAccount,
    ) {
        let now = self.now;
        let Some(run) = self.outgoing.get_mut(&id) else { return };
        account::stage(&mut run.view.account, &stage);
        run.view.account.downtime_ms =
            run.stopped_at.filter(|_| running).map(|t| now.since(t).as_millis() as u64);
        if let Some(reason) = problem {
            run.view.problem = Some(
                Problem::new(
                    ProblemKind::Failed,
                    format!("VM {}", run.view.progress.vm),
                    format!("handed over, but it does not run there: {reason}"),
                )
                .next("let that cloud's operator start it, or move it back"),
            );
        }
        let phase = if run.machine.to_run() && !running {
            MigrationPhase::HandedOver
        } else {
            MigrationPhase::Completed
        };
        let vm = run.matter.vm;
        let grace = self.config.migration.grace_period;
        if let Err(e) = self.book.save_receipt(id, &receipt) {
            tracing::warn!(migration = %id, error = chain(&e), "the receipt lies in the VM's record alone");
        }
        if let Some(entry) = self.vms.get_mut(&vm) {
            match self.book.law().release(&entry.record, receipt, now.plus(grace)) {
                Ok(record) => {
                    if let Err(e) = self.book.keep_receipts(&record) {
                        tracing::warn!(migration = %id, error = chain(&e), "the last link of its history lies in the VM's record alone");
                    }
                    entry.record = record;
                }
                Err(refusal) => {
                    tracing::error!(migration = %id, %refusal, "released by a receipt that does not fit")
                }
            }
            fault::point("source-releasing");
            if let Err(e) = self.book.save_vm(&entry.record) {
                tracing::error!(vm = %entry.record.spec.name, error = chain(&e), "receipt not recorded; it will be asked for again");
            }
            fault::point("source-released");
        }
        self.lets_go(vm, Hold::Moving(id));
        self.effects.push(Effect::Undefine(vm));
        self.estimate_monolithic(id);
        self.end_outgoing(id, phase);
    }

    /// What a move of the whole disk would have sent.
    fn estimate_monolithic(&mut self, id: MigrationId) {
        // After a restart nothing was scanned.
        let recipe = self.outgoing.get(&id).and_then(|run| run.recipe.as_ref().map(Recipe::id));
        if let Some(recipe) = recipe {
            let token = self.expect(Pending::Monolithic(id));
            self.emit(Effect::EstimateMonolithic { token, migration: id, recipe });
        }
    }

    fn abandon(&mut self, id: MigrationId, end: End) {
        let Some(run) = self.outgoing.get_mut(&id) else { return };
        let object = format!("move of {}", run.view.progress.vm);
        let (phase, problem) = match end {
            End::Cancelled => {
                let reason = "cancelled by the operator";
                let problem = Problem::new(ProblemKind::Cancelled, object, reason);
                let next =
                    format!("'cicada migration show {id}' says how long the target keeps what was sent");
                (MigrationPhase::Cancelled, if run.sent_bytes > 0 { problem.next(next) } else { problem })
            }
            End::Denied(d) => {
                (MigrationPhase::Failed, Problem::new(ProblemKind::Refused, object, d.text).next(d.next_step))
            }
        };
        run.view.problem = Some(problem);
        let vm = run.matter.vm;
        self.lets_go(vm, Hold::Moving(id));
        self.end_tracking(vm);
        self.end_outgoing(id, phase);
    }

    fn end_outgoing(&mut self, id: MigrationId, phase: MigrationPhase) {
        let Some(run) = self.outgoing.get_mut(&id) else { return };
        run.view.progress.phase = phase;
        run.view.progress.ended = true;
        run.view.progress.eta_s = None;
        self.outgoing_publish(id);
        let Some(mut run) = self.outgoing.remove(&id) else { return };
        self.forecasts.learn_from(&run.view);
        self.emit(Effect::EndServing(id));
        let outcome = match (&run.view.problem, phase) {
            (Some(p), MigrationPhase::Cancelled | MigrationPhase::Failed | MigrationPhase::HandedOver) => {
                Err(p.clone())
            }
            _ => Ok(Reply::Migration(Box::new(run.view.clone()))),
        };
        match &outcome {
            Ok(_) => tracing::info!(migration = %id, vm = %run.view.progress.vm, to = %run.peer.jid, "moved"),
            Err(p) if phase == MigrationPhase::HandedOver => {
                tracing::error!(migration = %id, vm = %run.view.progress.vm, to = %run.peer.jid, reason = %p, "moved");
            }
            Err(p) => tracing::warn!(migration = %id, vm = %run.view.progress.vm, reason = %p, "not moved"),
        }
        for call in std::mem::take(&mut run.watchers) {
            self.reply(call, outcome.clone());
        }
        self.remember(run.view);
        self.presence_changed();
    }
}

fn phase_name(phase: Phase, ran: bool) -> MigrationPhase {
    match phase {
        Phase::Checking | Phase::Reserving => MigrationPhase::Negotiate,
        Phase::Scanning { last: false, .. } => MigrationPhase::Stage,
        Phase::Staging(p) if !p.last => MigrationPhase::Stage,
        // One that stands still has nothing to be switched over: all of it travels now.
        Phase::Scanning { .. } | Phase::Staging(_) if !ran => MigrationPhase::Stage,
        Phase::Stopping
        | Phase::Scanning { .. }
        | Phase::Staging(_)
        | Phase::GivingUp
        | Phase::TakingBack => MigrationPhase::SwitchOver,
        Phase::HandingOver => MigrationPhase::Start,
        Phase::Released => MigrationPhase::Completed,
        Phase::Abandoned => MigrationPhase::Failed,
    }
}
