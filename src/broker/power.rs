//! What makes VMs run and stop: an operator, the start of the broker, crashes, the end of the host.

use std::time::Duration;

use crate::interface::{Problem, ProblemKind, chain};
use crate::types::{ByteSize, MigrationId, VmId};
use crate::vm::PowerState;
use crate::vm::hypervisor::{DriverEvent, EventKind, StopMode, StopReason};

use super::Broker;
use super::effect::{CallId, Effect};
use super::hold::{Hold, No, Verb};
use super::pending::{Pending, Whom};

/// Pause before a VM that crashed or did not start is started again; each failure within
/// [`FAILURE_WINDOW`] makes it four times as long.
const RESTART_PAUSE: Duration = Duration::from_secs(1);
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(300);
const FAILURE_WINDOW: Duration = Duration::from_secs(1800);
/// How often it is looked whether a VM that should run is still held by something else.
const HELD_PAUSE: Duration = Duration::from_secs(2);

/// How a VM is stopped.
#[derive(Clone, Copy, Debug)]
pub struct Stop {
    pub mode: StopMode,
    /// The host goes down: the VM is started again with the broker.
    pub for_host: bool,
    /// It is started again at once.
    pub again: bool,
}

impl Broker {
    pub(super) fn start_vm(&mut self, id: VmId, whom: Whom) {
        let me = self.me.clone();
        let (off, room) = (self.is_off(id), self.room(&me, Some(id)));
        let Some(vm) = self.vms.get_mut(&id) else { return };
        if off {
            vm.record.runs_as = None;
        }
        let spec = &vm.record.spec;
        let object = format!("VM {}", spec.name);
        if off && (spec.cpus > room.cpus_free || spec.memory.0 > room.memory_bytes_free) {
            let reason = format!(
                "needs {} CPUs and {}; {} CPUs and {} are free",
                spec.cpus,
                spec.memory,
                room.cpus_free,
                ByteSize(room.memory_bytes_free)
            );
            let problem = Problem::new(ProblemKind::Refused, object, reason).next(
                "stop or move another VM, or raise hypervisor.cpus and hypervisor.memory in federation.toml",
            );
            return self.tell_started(id, whom, Err(problem));
        }
        vm.record.run = true;
        (vm.power_note, vm.stopped_for_host) = (None, false);
        if let Err(e) = self.book.save_vm(&vm.record) {
            let problem = Problem::from_error(ProblemKind::Failed, object, &e);
            return self.tell_started(id, whom, Err(problem));
        }
        vm.hold = Hold::Starting;
        let record = Box::new(vm.record.clone());
        let token = self.expect(Pending::Started { vm: id, whom });
        self.emit(Effect::Start { token, record });
    }

    /// An operator's start was tried.
    pub(super) fn started(&mut self, id: VmId, whom: Whom, result: Result<(), Problem>) {
        let stop = self.start_is_over(id, result.is_ok());
        self.tell_started(id, whom, result);
        if let Some((stop, call)) = stop {
            self.stop_vm(id, stop, call);
        }
        self.presence_changed();
    }

    /// It was started, or was not. What is to be stopped as soon as it is.
    fn start_is_over(&mut self, id: VmId, started: bool) -> Option<(Stop, CallId)> {
        self.lets_go(id, Hold::Starting);
        let vm = self.vms.get(&id)?;
        // That its guest is off again was left to whoever looks now; one that a signal ended is started again.
        if started && vm.record.run && vm.power == PowerState::Stopped && vm.hold != Hold::Queued {
            self.switched_itself_off(id);
        }
        self.vms.get_mut(&id)?.stop_next.take()
    }

    fn switched_itself_off(&mut self, id: VmId) {
        let Some(vm) = self.vms.get_mut(&id) else { return };
        let name = &vm.record.spec.name;
        tracing::info!(vm = %name, "the guest switched itself off");
        vm.record.run = false;
        if let Err(e) = self.book.save_vm(&vm.record) {
            tracing::warn!(vm = %name, error = chain(&e), "stop not recorded");
        }
    }

    /// Starts a VM without an operator waiting: at boot, after an abandoned move, or on arrival. Whether it is
    /// being started.
    pub(super) fn start_machine(&mut self, id: VmId, arrival: Option<MigrationId>) -> bool {
        let off = self.is_off(id);
        let Some(vm) = self.vms.get_mut(&id) else { return false };
        if let Err(refusal) = self.book.law().may_run(&vm.record, vm.confirmed) {
            tracing::error!(vm = %vm.record.spec.name, reason = %refusal, "not started by itself");
            return false;
        }
        let outdated = vm.record.runs_as.is_some() && off;
        if !vm.record.run || outdated {
            vm.record.run = true;
            if outdated {
                vm.record.runs_as = None;
            }
            if let Err(e) = self.book.save_vm(&vm.record) {
                tracing::warn!(vm = %vm.record.spec.name, error = chain(&e), "cannot record that it should run");
            }
        }
        (vm.hold, vm.stopped_for_host) = (Hold::Starting, false);
        let record = Box::new(vm.record.clone());
        let token = self.expect(Pending::StartedByItself { vm: id, arrival });
        self.emit(Effect::Start { token, record });
        true
    }

    pub(super) fn machine_started(
        &mut self,
        id: VmId,
        arrival: Option<MigrationId>,
        result: Result<(), Problem>,
    ) {
        if self.starting_now == Some(id) {
            self.starting_now = None;
            self.start_next();
        }
        let Some(vm) = self.vms.get(&id) else { return };
        if let Err(problem) = &result {
            tracing::error!(vm = %vm.record.spec.name, reason = problem.reason, "does not start");
        }
        let result = result.map_err(|p| p.reason);
        let (stop, failed) = (self.start_is_over(id, result.is_ok()), result.is_err());
        if let Some(migration) = arrival {
            self.arrival_started(migration, result);
        }
        match stop {
            Some((stop, call)) => self.stop_vm(id, stop, call),
            None if failed => self.start_again(id),
            None => {}
        }
        self.presence_changed();
    }

    /// Stops a VM that nothing else holds; one that is being started as soon as that is done.
    pub(super) fn stop_named(
        &mut self,
        name: &str,
        force: bool,
        timeout_s: Option<u64>,
        for_host: bool,
        call: CallId,
    ) {
        let id = self.vm_for(Verb::Stop, name).and_then(|id| match self.vms.get(&id) {
            // One is enough.
            Some(vm) if vm.stop_next.is_some() => {
                Err(self.refused(id, name, Verb::Stop, No::Held(Hold::Stopping)))
            }
            _ => Ok(id),
        });
        match id {
            Ok(id) => {
                let mode = self.stop_mode(id, force, timeout_s, for_host);
                self.stop_vm(id, Stop { mode, for_host, again: false }, call)
            }
            Err(problem) => self.reply(call, Err(problem)),
        }
    }

    pub(super) fn stop_mode(
        &self,
        id: VmId,
        force: bool,
        timeout_s: Option<u64>,
        escalate: bool,
    ) -> StopMode {
        let timeout = timeout_s.map_or_else(|| self.stop_timeout(id), Duration::from_secs);
        if force { StopMode::Forced } else { StopMode::Graceful { timeout, escalate } }
    }

    /// How long a VM's guest may take to shut down.
    pub(super) fn stop_timeout(&self, id: VmId) -> Duration {
        let own = self.vms.get(&id).and_then(|vm| vm.record.settings.stop_timeout_s);
        own.map_or(self.config.migration.stop_timeout, |s| Duration::from_secs(s.into()))
    }

    pub(super) fn stop_vm(&mut self, id: VmId, stop: Stop, call: CallId) {
        let Some(vm) = self.vms.get_mut(&id) else {
            let gone = self.refused(id, &id.to_string(), Verb::Stop, No::Unknown);
            return self.reply(call, Err(gone));
        };
        let name = vm.record.spec.name.to_string();
        let wanted = vm.record.run;
        // Recorded first: from now on nothing starts it by itself.
        if !stop.for_host && !stop.again && wanted {
            vm.record.run = false;
            if let Err(e) = self.book.save_vm(&vm.record) {
                vm.record.run = true;
                let problem = Problem::from_error(ProblemKind::Failed, format!("VM {name}"), &e);
                return self.reply(call, Err(problem));
            }
        }
        vm.stopped_for_host = stop.for_host;
        if vm.hold == Hold::Starting {
            vm.stop_next = Some((stop, call));
            return;
        }
        vm.hold = Hold::Stopping;
        let token = self.expect(Pending::Stopped { vm: id, stop, call, wanted });
        self.emit(Effect::Stop { token, vm: id, name, mode: stop.mode });
    }

    pub(super) fn stopped(
        &mut self,
        (id, stop, call, wanted): (VmId, Stop, CallId, bool),
        result: Result<(), Problem>,
        took: Duration,
        was_off: bool,
    ) {
        if let (StopMode::Graceful { timeout, .. }, false) = (stop.mode, was_off) {
            self.note_stop(id, took < timeout);
        }
        if let (Ok(()), Some(vm)) = (&result, self.vms.get_mut(&id)) {
            // Of a crash, for example: what was is over.
            vm.power_note = None;
        }
        if let (Err(_), Some(vm)) = (&result, self.vms.get_mut(&id)) {
            vm.stopped_for_host = false;
            vm.record.run = wanted;
            if let Err(e) = self.book.save_vm(&vm.record) {
                tracing::warn!(vm = %vm.record.spec.name, error = chain(&e), "that it still runs is not recorded");
            }
        }
        if stop.again && result.is_ok() {
            self.lets_go(id, Hold::Stopping);
            return self.start_vm(id, Whom::Caller(call));
        }
        self.verb_done(id, Hold::Stopping, result, call);
    }

    /// Takes note whether a guest that was asked to end did so in its time.
    pub(super) fn note_stop(&mut self, id: VmId, in_time: bool) {
        let now = self.now;
        let Some(vm) = self.vms.get_mut(&id).filter(|vm| vm.record.is_here()) else { return };
        if vm.record.ignored_stop.is_none() == in_time {
            return;
        }
        vm.record.ignored_stop = (!in_time).then_some(now);
        if let Err(e) = self.book.save_vm(&vm.record) {
            tracing::warn!(vm = %vm.record.spec.name, error = chain(&e), "how its guest took a shutdown is not recorded");
        }
    }

    /// A VM ended or crashed without our doing.
    pub(super) fn power_event(&mut self, event: &DriverEvent) {
        let Some(vm) = self.vms.get_mut(&event.vm) else { return };
        let name = vm.record.spec.name.clone();
        // Else whoever is at it looks for itself.
        let by_itself = matches!(vm.hold, Hold::Free | Hold::Queued) && !vm.stopped_for_host;
        let starts = vm.hold == Hold::Starting;
        match &event.kind {
            EventKind::Stopped { reason: StopReason::Guest } if by_itself => {
                self.switched_itself_off(event.vm);
            }
            // A host that goes down ends the broker before it: whoever sent it, the VM is to run.
            EventKind::Stopped { reason: StopReason::Host } if by_itself || starts => {
                tracing::error!(vm = %name, "the hypervisor process was ended by a signal, its guest not asked");
                vm.power_note = Some("its hypervisor process was ended by a signal".into());
                self.start_again(event.vm);
            }
            EventKind::Crashed { detail } => {
                tracing::error!(vm = %name, detail, "the hypervisor process ended unasked");
                vm.power_note = Some(detail.clone());
                self.start_again(event.vm);
            }
            EventKind::DiskError { device, reason, paused } => {
                tracing::error!(vm = %name, device, reason, paused, "disk error");
            }
            _ => {}
        }
        self.presence_changed();
    }

    /// Events of the hypervisor were lost: what they told is seen from how the VMs are now.
    pub(super) fn review_power(&mut self, listed: &[(VmId, PowerState)]) {
        tracing::warn!(vms = listed.len(), "events of the hypervisor were lost; all VMs are looked at");
        for (vm, state) in listed.iter().copied() {
            let Some(known) = self.vms.get(&vm).filter(|vm| vm.record.is_here() && vm.record.run) else {
                continue;
            };
            // Whatever holds it looks for itself; what waits for its start, or for its owner, was off before.
            let waits = known.hold != Hold::Free || self.may(Verb::StartItself, vm).is_err();
            let kind = match state {
                PowerState::Crashed => {
                    EventKind::Crashed { detail: "it ended while events were lost".into() }
                }
                PowerState::Stopped if !waits => EventKind::Stopped { reason: StopReason::Guest },
                _ => continue,
            };
            if known.power_note.is_none() || state != PowerState::Crashed {
                self.power_event(&DriverEvent { vm, kind });
            }
        }
    }

    /// A VM that should run, and whose hypervisor process ended or could not be started, is started
    /// again after a pause, which grows while that goes on.
    fn start_again(&mut self, id: VmId) {
        let now = self.now;
        let Some(vm) = self.vms.get_mut(&id).filter(|vm| vm.record.is_here() && vm.record.run) else {
            return;
        };
        vm.failures.retain(|at| now.since(*at) < FAILURE_WINDOW);
        let pause = (RESTART_PAUSE * 4u32.pow(vm.failures.len().min(5) as u32)).min(RESTART_PAUSE_MAX);
        vm.failures.push(now);
        tracing::info!(vm = %vm.record.spec.name, pause_s = pause.as_secs(), "starting it again after a pause");
        self.start_after(id, pause);
    }

    fn start_after(&mut self, id: VmId, pause: Duration) {
        self.wake(pause, Pending::StartAgain(id));
        self.queues(id);
    }

    /// Nothing holds it, and it waits for its start.
    fn queues(&mut self, id: VmId) {
        self.lets_go(id, Hold::Free);
    }

    /// Whether it is to run, and its start is only a matter of time.
    pub(super) fn waits_for_start(&self, id: VmId) -> bool {
        let awaited = |p: &Pending| matches!(p, Pending::StartAgain(of) if *of == id);
        self.vms.get(&id).is_some_and(|vm| vm.record.is_here() && vm.record.run)
            && (self.start_order.contains(&id) || self.pending.values().any(awaited))
    }

    /// Starts a VM that should run and does not, once nothing else holds it. Whether it is being started.
    pub(super) fn start_wanted(&mut self, id: VmId) -> bool {
        self.lets_go(id, Hold::Queued);
        let Some(vm) = self.vms.get(&id).filter(|vm| vm.record.is_here() && vm.record.run) else {
            return false;
        };
        match self.may(Verb::StartItself, id) {
            // A move that is under way, or an operator, decides first.
            Err(No::Held(_)) => {
                self.start_after(id, HELD_PAUSE);
                false
            }
            // One that stands still was held for a move, or about to run, when a broker ended.
            Ok(()) if self.is_still(id) && !vm.stopped_for_host => self.start_machine(id, None),
            Ok(()) => false,
            Err(no) => {
                if self.is_still(id) {
                    tracing::error!(vm = %vm.record.spec.name, reason = %no, "not started by itself");
                }
                false
            }
        }
    }

    /// Starts those of these VMs that should run and do not, one after the other in the order in which they
    /// were made: after a restart of the host, or when all were asked who owns them.
    pub(super) fn start_in_order(&mut self, mut order: Vec<VmId>) {
        let created = |id: &VmId| self.vms.get(id).map(|vm| vm.record.created);
        order.sort_by_key(|id| (created(id), *id));
        self.start_order.extend(order.iter().copied());
        order.into_iter().for_each(|id| self.queues(id));
        if self.starting_now.is_none() {
            self.start_next();
        }
    }

    fn start_next(&mut self) {
        while let Some(id) = self.start_order.pop_front() {
            if self.start_wanted(id) {
                self.starting_now = Some(id);
                return;
            }
        }
    }

    /// Whether its guest does not go on by itself.
    pub(super) fn is_still(&self, id: VmId) -> bool {
        self.is_off(id) || self.power_of(id) == PowerState::Paused
    }

    /// Whether no guest of it runs; what the hypervisor never heard of does not.
    pub(super) fn is_off(&self, id: VmId) -> bool {
        matches!(self.power_of(id), PowerState::Crashed | PowerState::Stopped)
    }
}
