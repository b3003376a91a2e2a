//! What makes VMs run and stop: an operator, the start of the broker, crashes, the end of the host.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::hypervisor::{DriverEvent, EventKind, Machine, StopMode, StopReason};
use crate::interface::problem::{Problem, ProblemKind, chain};
use crate::migration::ownership::Hold;
use crate::types::{ByteSize, MigrationId, VmId};
use crate::vm::PowerState;

use super::lineages::LAW;
use super::vms::{Answer, Busy, Vm};
use super::{Broker, Input, Shared};

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
    pub(super) fn start_vm(&mut self, id: VmId, reply: Answer) {
        let off = is_off(&self.shared, id);
        let (room, Some(vm)) = (self.room(&self.shared.me, Some(id)), self.vms.get_mut(&id)) else {
            return;
        };
        if off {
            vm.record.runs_as = None;
        }
        let spec = &vm.record.spec;
        let object = format!("VM {}", spec.name);
        let running =
            self.shared.driver.state(id).is_ok_and(|s| s != PowerState::Stopped && s != PowerState::Crashed);
        if !running && (spec.cpus > room.cpus_free || spec.memory.0 > room.memory_bytes_free) {
            let reason = format!(
                "needs {} CPUs and {}; {} CPUs and {} are free",
                spec.cpus,
                spec.memory,
                room.cpus_free,
                ByteSize(room.memory_bytes_free)
            );
            let _ = reply.send(Err(Problem::new(ProblemKind::Refused, object, reason).next(
                "stop or move another VM, or raise hypervisor.cpus and hypervisor.memory in federation.toml",
            )));
            return;
        }
        vm.record.run = true;
        (vm.power_note, vm.stopped_for_host) = (None, false);
        if let Err(e) = self.shared.records.save_vm(&vm.record) {
            let _ = reply.send(Err(Problem::from_error(ProblemKind::Failed, object, &e)));
            return;
        }
        vm.busy = Some(Busy::Verb("starting"));
        let (machine, shared) = (self.machine_of(id), self.shared.clone());
        let Some(machine) = machine else { return };
        tokio::spawn(async move {
            let result = run_machine(&shared, &machine).await;
            shared.post(Input::apply(move |b| b.verb_done(id, result, reply)));
        });
    }

    fn machine_of(&self, id: VmId) -> Option<Machine> {
        self.vms.get(&id).map(|vm| self.machine(&vm.record))
    }

    /// Starts a VM without an operator waiting: at boot, after an abandoned move, or on arrival. The task
    /// ends when it was tried.
    pub(super) fn start_machine(&mut self, id: VmId, arrival: Option<MigrationId>) -> Option<JoinHandle<()>> {
        let vm = self.vms.get_mut(&id)?;
        if let Err(refusal) = LAW.may_run(&vm.record, vm.confirmed) {
            tracing::error!(vm = %vm.record.spec.name, reason = %refusal, "not started by itself");
            return None;
        }
        let outdated = vm.record.runs_as.is_some() && is_off(&self.shared, id);
        if !vm.record.run || outdated {
            vm.record.run = true;
            if outdated {
                vm.record.runs_as = None;
            }
            if let Err(e) = self.shared.records.save_vm(&vm.record) {
                tracing::warn!(vm = %vm.record.spec.name, error = chain(&e), "cannot record that it should run");
            }
        }
        (vm.starting, vm.stopped_for_host) = (true, false);
        let machine = self.machine_of(id)?;
        let shared = self.shared.clone();
        Some(tokio::spawn(async move {
            let result = run_machine(&shared, &machine).await.map_err(|p| p.reason);
            if let Err(reason) = &result {
                tracing::error!(vm = %machine.spec.name, reason, "does not start");
            }
            shared.post(Input::apply(move |b| b.machine_started(id, arrival, result)));
        }))
    }

    fn machine_started(&mut self, id: VmId, arrival: Option<MigrationId>, result: Result<(), String>) {
        let Some(vm) = self.vms.get_mut(&id) else { return };
        vm.starting = false;
        let (stop, failed) = (vm.stop_next.take(), result.is_err());
        if let Some(migration) = arrival {
            self.arrival_started(migration, result);
        }
        match stop {
            Some((stop, reply)) => self.stop_vm(id, stop, reply),
            None if failed => self.start_again(id),
            None => {}
        }
        self.presence_changed();
    }

    /// Stops a VM that nothing else holds; one that is being started by itself as soon as that is done.
    pub(super) fn stop_named(
        &mut self,
        name: &str,
        force: bool,
        timeout_s: Option<u64>,
        for_host: bool,
        reply: Answer,
    ) {
        let starting = |vm: &Vm| vm.record.is_here() && vm.busy.is_none() && vm.starting;
        let id = self.find_vm(name).and_then(|id| match self.vms.get(&id) {
            Some(vm) if starting(vm) && vm.stop_next.is_none() => Ok(id),
            _ => self.free_vm(name),
        });
        match id {
            Ok(id) => {
                let mode = self.stop_mode(id, force, timeout_s, for_host);
                self.stop_vm(id, Stop { mode, for_host, again: false }, reply)
            }
            Err(problem) => drop(reply.send(Err(problem))),
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
        own.map_or(self.shared.config.migration.stop_timeout, |s| Duration::from_secs(s.into()))
    }

    pub(super) fn stop_vm(&mut self, id: VmId, stop: Stop, reply: Answer) {
        let Some(vm) = self.vms.get_mut(&id) else { return };
        let name = vm.record.spec.name.clone();
        let object = format!("VM {name}");
        let wanted = vm.record.run;
        // Recorded first: from now on nothing starts it by itself.
        if !stop.for_host && !stop.again && wanted {
            vm.record.run = false;
            if let Err(e) = self.shared.records.save_vm(&vm.record) {
                vm.record.run = true;
                return drop(reply.send(Err(Problem::from_error(ProblemKind::Failed, object, &e))));
            }
        }
        vm.stopped_for_host = stop.for_host;
        if vm.starting {
            vm.stop_next = Some((stop, reply));
            return;
        }
        vm.busy = Some(Busy::Verb("stopping"));
        let shared = self.shared.clone();
        tokio::spawn(async move {
            let (begun, off) = (std::time::Instant::now(), is_off(&shared, id));
            let result = match off {
                true => Ok(()),
                false => shared
                    .driver
                    .stop(id, stop.mode)
                    .await
                    .map_err(|e| Problem::from_driver(name.as_str(), &e)),
            };
            let elapsed = begun.elapsed();
            shared.post(Input::apply(move |b| {
                if let (StopMode::Graceful { timeout, .. }, false) = (stop.mode, off) {
                    b.note_stop(id, elapsed < timeout);
                }
                if let (Err(_), Some(vm)) = (&result, b.vms.get_mut(&id)) {
                    vm.stopped_for_host = false;
                    vm.record.run = wanted;
                    if let Err(e) = b.shared.records.save_vm(&vm.record) {
                        tracing::warn!(vm = %vm.record.spec.name, error = chain(&e), "that it still runs is not recorded");
                    }
                }
                if stop.again && result.is_ok() {
                    if let Some(vm) = b.vms.get_mut(&id) {
                        vm.busy = None;
                    }
                    return b.start_vm(id, reply);
                }
                b.verb_done(id, result, reply);
            }));
        });
    }

    /// Takes note whether a guest that was asked to end did so in its time.
    pub(super) fn note_stop(&mut self, id: VmId, in_time: bool) {
        let now = self.shared.now();
        let Some(vm) = self.vms.get_mut(&id).filter(|vm| vm.record.is_here()) else { return };
        if vm.record.ignored_stop.is_none() == in_time {
            return;
        }
        vm.record.ignored_stop = (!in_time).then_some(now);
        if let Err(e) = self.shared.records.save_vm(&vm.record) {
            tracing::warn!(vm = %vm.record.spec.name, error = chain(&e), "how its guest took a shutdown is not recorded");
        }
    }

    /// A VM ended or crashed without our doing.
    pub(super) fn power_event(&mut self, event: &DriverEvent) {
        let Some(vm) = self.vms.get_mut(&event.vm) else { return };
        let name = vm.record.spec.name.clone();
        match &event.kind {
            EventKind::Stopped { reason: StopReason::Guest } if vm.busy.is_none() && !vm.stopped_for_host => {
                tracing::info!(vm = %name, "the guest switched itself off");
                vm.record.run = false;
                if let Err(e) = self.shared.records.save_vm(&vm.record) {
                    tracing::warn!(vm = %name, error = chain(&e), "stop not recorded");
                }
            }
            // A host that goes down ends the broker before it: whoever sent it, the VM is to run.
            EventKind::Stopped { reason: StopReason::Host } if vm.busy.is_none() && !vm.stopped_for_host => {
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
    pub(super) fn review_power(&mut self) {
        let (listed, now) = (self.shared.driver.list(), self.shared.now());
        tracing::warn!(vms = listed.len(), "events of the hypervisor were lost; all VMs are looked at");
        for (vm, state) in listed {
            let Some(known) = self.vms.get(&vm).filter(|vm| vm.record.is_here() && vm.record.run) else {
                continue;
            };
            // Whatever holds it looks for itself; what failed to start is waiting to be started again.
            let failed = known.failures.last().is_some_and(|at| now.since(*at) <= RESTART_PAUSE_MAX);
            let waits = known.hold() != Hold::Free || failed;
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
        let now = self.shared.now();
        let Some(vm) = self.vms.get_mut(&id).filter(|vm| vm.record.is_here() && vm.record.run) else {
            return;
        };
        vm.failures.retain(|at| now.since(*at) < FAILURE_WINDOW);
        let pause = (RESTART_PAUSE * 4u32.pow(vm.failures.len().min(5) as u32)).min(RESTART_PAUSE_MAX);
        vm.failures.push(now);
        tracing::info!(vm = %vm.record.spec.name, pause_s = pause.as_secs(), "starting it again after a pause");
        self.start_after(id, pause);
    }

    fn start_after(&self, id: VmId, pause: Duration) {
        let shared = self.shared.clone();
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            shared.post(Input::apply(move |b| drop(b.start_wanted(id))));
        });
    }

    /// Starts a VM that should run and does not, once nothing else holds it.
    fn start_wanted(&mut self, id: VmId) -> Option<JoinHandle<()>> {
        let vm = self.vms.get(&id).filter(|vm| vm.record.is_here() && vm.record.run)?;
        match vm.hold() {
            Hold::Free if is_off(&self.shared, id) && !vm.stopped_for_host => self.start_machine(id, None),
            Hold::Free => None,
            // A move that is under way, or an operator, decides first.
            Hold::Migration(_) | Hold::Verb(_) => {
                self.start_after(id, HELD_PAUSE);
                None
            }
        }
    }

    /// Starts those of these VMs that should run and do not, one after the other in the order in which they
    /// were made: after a restart of the host, or when all were asked who owns them.
    pub(super) fn start_in_order(&self, vms: impl IntoIterator<Item = VmId>) {
        let created = |id: &VmId| self.vms.get(id).map(|vm| vm.record.created);
        let mut order: Vec<VmId> = vms.into_iter().collect();
        order.sort_by_key(|id| (created(id), *id));
        let shared = self.shared.clone();
        tokio::spawn(async move {
            for id in order {
                let (begun, starting) = oneshot::channel();
                shared.post(Input::apply(move |b| drop(begun.send(b.start_wanted(id)))));
                if let Ok(Some(starting)) = starting.await {
                    let _ = starting.await;
                }
            }
        });
    }
}

/// Whether no guest of it runs; what the driver never heard of does not.
pub(super) fn is_off(shared: &Shared, id: VmId) -> bool {
    matches!(shared.driver.state(id), Err(_) | Ok(PowerState::Crashed | PowerState::Stopped))
}

/// Makes sure the composition is there and is the right one, then starts the VM.
async fn run_machine(shared: &std::sync::Arc<Shared>, machine: &Machine) -> Result<(), Problem> {
    let name = machine.spec.name.as_str();
    let object = format!("VM {name}");
    // What runs may have another name or shape than its next start will give it: it runs on as it is.
    if shared.driver.state(machine.spec.id).is_ok_and(|s| s == PowerState::Running) {
        return Ok(());
    }
    let (composer, recipe) = (shared.composer.clone(), machine.spec.recipe);
    let composed = tokio::task::spawn_blocking(move || composer.composition(&recipe).map(drop)).await;
    match composed {
        Ok(Ok(())) => {}
        Ok(Err(e)) => {
            let problem = super::content::compose_problem(&e);
            return Err(Problem { object, ..problem });
        }
        Err(e) => return Err(Problem::new(ProblemKind::Failed, object, e.to_string())),
    }
    shared.driver.start(machine).await.map_err(|e| Problem::from_driver(name, &e))
}
