//! One VM under QEMU: its state, its process, and the task that watches both.
//!
//! ```text
//!            start                 pause
//!  Stopped ---------> Running <-----------> Paused
//!  Crashed            |  ^  \     resume      |
//!     ^     stop      |  |   \                | stop, guest switches off
//!     |               v  | timeout           v
//!     +---------- Stopping <------------------+
//! ```
//!
//! A process may outlive its guest for a moment (`vm/tracking.rs`): the VM is Stopping until it ends.
//! Whatever the state, when the process ends the watcher tidies up and the VM is Stopped or
//! Crashed. State changes come from QEMU's events, in their order; nothing is polled.

mod tracking;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::{Semaphore, broadcast, watch};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use super::args::file;
use super::launch::Launch;
use super::process::{self, Found, Process};
use super::qmp::{Qmp, QmpError, QmpEvent};
use super::{blocking, prepare};
use crate::hypervisor::{
    ConsoleStream, DriverError, DriverEvent, EventKind, Machine, MachineStats, StopReason,
};
use crate::types::{ByteSize, VmId};
use crate::unix_socket;
use crate::vm::PowerState;

/// From the start of the process until it answers; ample for an overloaded host.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Between attempts to connect while QEMU makes its socket; only while it starts.
const CONNECT_RETRY: Duration = Duration::from_millis(10);
/// A guest that still boots misses the power button, so it is pressed again.
const PRESS_AGAIN: Duration = Duration::from_secs(5);
/// For QEMU to accept `quit`; beyond it hangs.
const QUIT_TIMEOUT: Duration = Duration::from_secs(5);
/// For QEMU to write out its caches after `quit`.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(60);
/// For the kernel to end a killed process.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);
/// For the events still in the socket of a process that has ended.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the logs' sizes are looked at.
const LOG_CHECK: Duration = Duration::from_secs(30);

pub(super) struct Vm {
    id: VmId,
    /// One verb at a time. Not held while waiting for a guest to switch itself off.
    pub verbs: tokio::sync::Mutex<()>,
    inner: Mutex<Inner>,
    console: Arc<Semaphore>,
    events: broadcast::Sender<DriverEvent>,
    log_max: ByteSize,
    /// `qemu-img`, where there is one.
    img: Option<PathBuf>,
}

struct Inner {
    /// None until the first `define` has succeeded.
    machine: Option<Machine>,
    state: PowerState,
    run: Option<Arc<Run>>,
    /// Why the running process is about to end, once that is known.
    stopping: Option<StopReason>,
    tracking: tracking::Tracking,
}

/// The UUID that a machine's guest finds.
fn shown_uuid(machine: &Machine) -> Uuid {
    machine.spec.system_uuid.map_or(machine.spec.id.0, Uuid::from)
}

/// A QEMU process and the ways to it.
struct Run {
    process: process::Handle,
    /// What its guest is shown, and QEMU tells.
    uuid: Uuid,
    qmp_path: PathBuf,
    qmp: tokio::sync::Mutex<Option<Qmp>>,
    /// Becomes true when the process is gone and all is tidied up.
    ended: watch::Receiver<bool>,
    _watcher: AbortOnDropHandle<()>,
}

impl Vm {
    pub fn new(
        id: VmId,
        events: broadcast::Sender<DriverEvent>,
        log_max: ByteSize,
        img: Option<PathBuf>,
    ) -> Self {
        let inner = Inner {
            machine: None,
            state: PowerState::Stopped,
            run: None,
            stopping: None,
            tracking: tracking::Tracking::default(),
        };
        Self {
            id,
            verbs: tokio::sync::Mutex::new(()),
            inner: Mutex::new(inner),
            console: Arc::new(Semaphore::new(1)),
            events,
            log_max,
            img,
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Every change under the lock is a plain assignment: there is no half-made state.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn machine(&self) -> Option<Machine> {
        self.inner().machine.clone()
    }

    pub fn state(&self) -> PowerState {
        self.inner().state
    }

    fn run(&self) -> Option<Arc<Run>> {
        self.inner().run.clone()
    }

    fn emit(&self, kind: EventKind) {
        tracing::debug!(vm = %self.id, event = ?kind, "VM event");
        // Nobody listening is fine.
        let _ = self.events.send(DriverEvent { vm: self.id, kind });
    }

    fn wrong_state(&self, verb: &'static str) -> DriverError {
        DriverError::WrongState { vm: self.id, state: self.state(), verb }
    }

    fn io(
        &self,
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> DriverError {
        let (vm, path) = (self.id, path.into());
        move |source| DriverError::Io { vm, action, path, source }
    }

    // The verbs below are called with `verbs` held, except where they say otherwise.

    pub async fn define(
        self: &Arc<Self>,
        machine: &Machine,
        vars_template: PathBuf,
    ) -> Result<(), DriverError> {
        let known = self.machine();
        if known.as_ref() == Some(machine) {
            return Ok(());
        }
        if known.is_some() && self.run().is_some() {
            return Err(DriverError::Differs { vm: self.id, state: self.state() });
        }
        let wanted = machine.clone();
        blocking(move || prepare::prepare(&wanted, &vars_template)).await?;
        let moved = known.as_ref().is_none_or(|known| known.state_dir != machine.state_dir);
        if moved {
            self.take_over(machine).await?;
        }
        self.inner().machine = Some(machine.clone());
        if let Some(known) = known.filter(|_| moved) {
            blocking(move || prepare::remove_state_dir(&known)).await?;
        }
        Ok(())
    }

    /// Finds out what an earlier driver left in the state directory, and watches what still runs.
    async fn take_over(self: &Arc<Self>, machine: &Machine) -> Result<(), DriverError> {
        let (dir, id) = (machine.state_dir.clone(), self.id);
        let failed = self.io("look for an earlier QEMU in", &machine.state_dir);
        let found = blocking(move || {
            let found = process::find(&dir, id)?;
            if !matches!(found, Found::Alive(_)) {
                process::clean(&dir)?;
            }
            Ok(found)
        })
        .await
        .map_err(failed)?;
        match found {
            Found::Nothing => {}
            Found::Ended => {
                self.inner().state = PowerState::Crashed;
                let detail = "its process ended while no driver was watching".to_owned();
                self.emit(EventKind::Crashed { detail });
            }
            Found::Alive(handle) => {
                tracing::info!(vm = %self.id, pid = handle.pid, "took over a running VM");
                let run = self.watch(machine, Process::adopted(handle), None);
                // One that does not answer can still be stopped by force; anything else will
                // connect again and say what is wrong.
                match self.qmp(&run).await {
                    // What an earlier driver tracked is nobody's any more.
                    Ok(qmp) => {
                        self.stop_tracking(&qmp).await;
                        // Its guest has ended, who knows why, and nobody was there to end it.
                        if self.state() == PowerState::Stopping {
                            self.inner().stopping = Some(StopReason::Host);
                            self.await_quit(&run).await;
                        }
                    }
                    Err(error) => {
                        tracing::warn!(vm = %self.id, %error, "a VM taken over does not answer");
                        self.inner().state = PowerState::Running;
                    }
                }
            }
        }
        Ok(())
    }

    /// Registers a process as this VM's and starts the watcher.
    fn watch(self: &Arc<Self>, machine: &Machine, process: Process, qmp: Option<Qmp>) -> Arc<Run> {
        let (ended_sender, ended) = watch::channel(false);
        let handle = process.handle.clone();
        let mut inner = self.inner();
        // The watcher sees the run registered: it takes the same lock.
        let watcher = tokio::spawn(watch_process(
            Arc::downgrade(self),
            process,
            machine.state_dir.clone(),
            ended_sender,
        ));
        let run = Arc::new(Run {
            process: handle,
            uuid: shown_uuid(machine),
            qmp_path: machine.state_dir.join(file::QMP),
            qmp: tokio::sync::Mutex::new(qmp),
            ended,
            _watcher: AbortOnDropHandle::new(watcher),
        });
        inner.run = Some(run.clone());
        inner.stopping = None;
        run
    }

    pub async fn start(self: &Arc<Self>, launch: Launch) -> Result<(), DriverError> {
        let Some(machine) = self.machine() else { return Err(DriverError::UnknownVm { vm: self.id }) };
        match self.state() {
            PowerState::Running => return Ok(()),
            PowerState::Paused => return self.resume().await,
            PowerState::Starting | PowerState::Stopping => return Err(self.wrong_state("started")),
            PowerState::Stopped | PowerState::Crashed => {}
        }
        self.inner().tracking.forget();
        self.inner().state = PowerState::Starting;
        let launched = self.launch(&machine, launch).await;
        if launched.is_err() {
            self.inner().state = PowerState::Stopped;
            let dir = machine.state_dir.clone();
            let _ = blocking(move || process::clean(&dir)).await;
        }
        launched
    }

    /// On Err no process is left.
    async fn launch(self: &Arc<Self>, machine: &Machine, launch: Launch) -> Result<(), DriverError> {
        let (dir, system, log_max) = (machine.state_dir.clone(), launch.system.clone(), self.log_max);
        let mut process = blocking(move || {
            process::clean(&dir)
                .and_then(|()| process::cut_log(&dir.join(file::CONSOLE_LOG), log_max))
                .map_err(|source| DriverError::Run { path: system, source })?;
            process::spawn(&launch, &dir)
        })
        .await?;

        let qmp_path = machine.state_dir.join(file::QMP);
        let deadline = tokio::time::sleep(START_TIMEOUT);
        let failure = tokio::select! {
            answer = self.connect_when_ready(&qmp_path, process.handle.pid, shown_uuid(machine)) => match answer {
                Ok(qmp) => {
                    {
                        let mut inner = self.inner();
                        if inner.state == PowerState::Starting {
                            inner.state = PowerState::Running;
                        }
                    }
                    self.emit(EventKind::Started);
                    self.watch(machine, process, Some(qmp));
                    return Ok(());
                }
                Err(error) => error,
            },
            status = process.ended() => return Err(self.ended_at_start(machine, status).await),
            () = deadline => DriverError::Timeout {
                vm: self.id,
                verb: "started",
                state: PowerState::Starting,
                after: START_TIMEOUT,
                next_step: "it was ended; try again when the host is less busy",
            },
        };
        let _ = process.handle.kill();
        let status = process.ended().await;
        match failure {
            // It hung up because it ended: its last words say more.
            failure if matches!(qmp_error(&failure), Some(QmpError::Closed { .. })) => {
                Err(self.ended_at_start(machine, status).await)
            }
            failure => Err(failure),
        }
    }

    async fn ended_at_start(
        &self,
        machine: &Machine,
        status: std::io::Result<Option<std::process::ExitStatus>>,
    ) -> DriverError {
        let dir = machine.state_dir.clone();
        let stderr = blocking(move || process::last_words(&dir)).await;
        // QEMU locks the images it opens; so it words a lock held by another process.
        if stderr.contains("Failed to get") && stderr.contains(" lock") {
            return DriverError::DiskInUse { vm: self.id, detail: stderr };
        }
        DriverError::EndedAtStart { vm: self.id, status: status_text(status), stderr }
    }

    async fn connect_when_ready(
        self: &Arc<Self>,
        path: &Path,
        pid: i32,
        uuid: Uuid,
    ) -> Result<Qmp, DriverError> {
        loop {
            match self.connect(path, pid, uuid).await {
                // Not made yet, or bound and not yet listening.
                Err(e) if matches!(qmp_error(&e), Some(QmpError::Connect(_))) => {
                    tokio::time::sleep(CONNECT_RETRY).await
                }
                done => return done,
            }
        }
    }

    /// Connects to the process and makes sure it is this VM.
    async fn connect(self: &Arc<Self>, path: &Path, pid: i32, uuid: Uuid) -> Result<Qmp, DriverError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "UPPERCASE")]
        struct Identity {
            uuid: Uuid,
        }
        let failed = |source: QmpError| DriverError::Control { vm: self.id, pid, source: Box::new(source) };
        let vm = Arc::downgrade(self);
        let on_event = move |event| {
            if let Some(vm) = vm.upgrade() {
                vm.observe(event);
            }
        };
        let qmp = Qmp::connect(path, on_event).await.map_err(failed)?;
        let identity: Identity = qmp.query("query-uuid").await.map_err(failed)?;
        if identity.uuid != uuid {
            let says = format!("the machine {}", identity.uuid);
            return Err(DriverError::WrongIdentity { vm: self.id, pid, says });
        }
        Ok(qmp)
    }

    /// The connection to a running process, made anew if it was lost.
    async fn qmp(self: &Arc<Self>, run: &Run) -> Result<Qmp, DriverError> {
        let mut slot = run.qmp.lock().await;
        if let Some(qmp) = slot.as_ref().filter(|qmp| !qmp.is_closed()) {
            return Ok(qmp.clone());
        }
        let qmp = self.connect(&run.qmp_path, run.process.pid, run.uuid).await?;
        // Events were missed; the state is not to be guessed from them.
        let state = self.asked_state(run, &qmp).await?;
        self.inner().state = state;
        if state == PowerState::Stopping {
            self.inner().stopping.get_or_insert(StopReason::Guest);
            self.see_off_soon();
        }
        *slot = Some(qmp.clone());
        Ok(qmp)
    }

    async fn asked_state(&self, run: &Run, qmp: &Qmp) -> Result<PowerState, DriverError> {
        #[derive(Deserialize)]
        struct Status {
            status: String,
        }
        let status: Status = qmp.query("query-status").await.map_err(|e| self.qmp_failed(run, e))?;
        Ok(match status.status.as_str() {
            "running" => PowerState::Running,
            "shutdown" => PowerState::Stopping,
            _ => PowerState::Paused,
        })
    }

    fn qmp_failed(&self, run: &Run, source: QmpError) -> DriverError {
        DriverError::Control { vm: self.id, pid: run.process.pid, source: Box::new(source) }
    }

    async fn execute(self: &Arc<Self>, run: &Run, command: &'static str) -> Result<(), DriverError> {
        let qmp = self.qmp(run).await?;
        qmp.execute(command, None).await.map(drop).map_err(|e| self.qmp_failed(run, e))
    }

    pub async fn pause(self: &Arc<Self>) -> Result<(), DriverError> {
        match (self.state(), self.run()) {
            (PowerState::Paused, _) => Ok(()),
            // QEMU's STOP event, seen before the answer, changes the state.
            (PowerState::Running, Some(run)) => self.execute(&run, "stop").await,
            _ => Err(self.wrong_state("paused")),
        }
    }

    pub async fn resume(self: &Arc<Self>) -> Result<(), DriverError> {
        match (self.state(), self.run()) {
            (PowerState::Running, _) => Ok(()),
            (PowerState::Paused, Some(run)) => self.execute(&run, "cont").await,
            _ => Err(self.wrong_state("resumed")),
        }
    }

    /// Takes `verbs` itself, and not while it waits.
    pub async fn stop_gracefully(
        self: &Arc<Self>,
        timeout: Duration,
        escalate: bool,
    ) -> Result<(), DriverError> {
        let (run, pressed) = {
            let _turn = self.verbs.lock().await;
            let Some(run) = self.run() else { return Ok(()) };
            let pressed = self.press_power_button(&run).await;
            (run, pressed)
        };
        let outcome = match pressed {
            Ok(()) => self.await_switch_off(&run, timeout).await,
            // It did not listen because it was ending already.
            Err(_) if has_ended(&run, DRAIN_TIMEOUT).await => return Ok(()),
            Err(error) => Err(error),
        };
        match outcome {
            Err(error) if escalate => {
                tracing::warn!(vm = %self.id, %error, "the guest does not stop: ending it by force");
                self.stop_by_force().await
            }
            outcome => outcome,
        }
    }

    async fn press_power_button(self: &Arc<Self>, run: &Run) -> Result<(), DriverError> {
        match self.state() {
            PowerState::Stopping => return Ok(()),
            // A paused guest cannot switch itself off.
            PowerState::Paused => self.execute(run, "cont").await?,
            _ => {}
        }
        self.execute(run, "system_powerdown").await?;
        let mut inner = self.inner();
        if inner.run.is_some() {
            inner.state = PowerState::Stopping;
        }
        Ok(())
    }

    async fn await_switch_off(self: &Arc<Self>, run: &Run, timeout: Duration) -> Result<(), DriverError> {
        let deadline = tokio::time::Instant::now() + timeout;
        while !has_ended(
            run,
            PRESS_AGAIN.min(deadline.saturating_duration_since(tokio::time::Instant::now())),
        )
        .await
        {
            if tokio::time::Instant::now() < deadline {
                // It may be ending just now.
                let _ = self.execute(run, "system_powerdown").await;
                continue;
            }
            let _turn = self.verbs.lock().await;
            if *run.ended.borrow() {
                break;
            }
            let state = match self.qmp(run).await {
                Ok(qmp) => self.asked_state(run, &qmp).await.unwrap_or(PowerState::Running),
                Err(_) => PowerState::Running,
            };
            self.inner().state = state;
            return Err(DriverError::Timeout {
                vm: self.id,
                verb: "stopped",
                state,
                after: timeout,
                next_step: "its guest ignores the power button",
            });
        }
        Ok(())
    }

    /// Takes `verbs` itself.
    pub async fn stop_by_force(self: &Arc<Self>) -> Result<(), DriverError> {
        let _turn = self.verbs.lock().await;
        let Some(run) = self.run() else { return Ok(()) };
        {
            let mut inner = self.inner();
            inner.state = PowerState::Stopping;
            inner.stopping.get_or_insert(StopReason::Forced);
        }
        // `quit` lets QEMU write out what it caches; a signal to kill does not.
        let asked = tokio::time::timeout(QUIT_TIMEOUT, self.execute(&run, "quit")).await;
        let listens = matches!(asked, Ok(Ok(())));
        if has_ended(&run, if listens { FLUSH_TIMEOUT } else { Duration::ZERO }).await {
            return Ok(());
        }
        tracing::warn!(vm = %self.id, pid = run.process.pid, "QEMU does not quit: killing it");
        run.process.kill().map_err(self.io("kill the QEMU of", run.qmp_path.clone()))?;
        if has_ended(&run, KILL_TIMEOUT).await {
            return Ok(());
        }
        Err(DriverError::Timeout {
            vm: self.id,
            verb: "ended",
            state: PowerState::Stopping,
            after: KILL_TIMEOUT,
            next_step: "the kernel keeps the process, as a rule because its storage hangs: look at the storage",
        })
    }

    /// A VM that crashed and was then told to stop is stopped.
    pub fn settle_crash(&self) {
        let mut inner = self.inner();
        if inner.state == PowerState::Crashed {
            inner.state = PowerState::Stopped;
        }
    }

    pub async fn console(&self) -> Result<ConsoleStream, DriverError> {
        let (Some(machine), Some(_run)) = (self.machine(), self.run()) else {
            return Err(self.wrong_state("looked at through its console"));
        };
        let turn =
            self.console.clone().try_acquire_owned().map_err(|_| DriverError::ConsoleBusy { vm: self.id })?;
        let path = machine.state_dir.join(file::CONSOLE);
        let stream = unix_socket::connect_async(&path)
            .await
            .map_err(self.io("connect to the console socket", path))?;
        Ok(ConsoleStream::new(stream, turn))
    }

    pub async fn stats(self: &Arc<Self>) -> Result<MachineStats, DriverError> {
        #[derive(Deserialize)]
        struct Block {
            #[serde(default)]
            qdev: String,
            stats: Counters,
        }
        #[derive(Deserialize)]
        struct Counters {
            rd_bytes: u64,
            wr_bytes: u64,
        }
        let Some(run) = self.run() else { return Err(self.wrong_state("measured")) };
        let qmp = self.qmp(&run).await?;
        let blocks: Vec<Block> = qmp.query("query-blockstats").await.map_err(|e| self.qmp_failed(&run, e))?;
        let pid = run.process.pid;
        let (cpu_time, resident) = blocking(move || process::usage(pid))
            .await
            .map_err(self.io("read the usage of", format!("/proc/{pid}")))?;
        let disks = blocks.iter().filter(|b| b.qdev.contains("-disk"));
        let (read, written) =
            disks.fold((0u64, 0u64), |(r, w), b| (r + b.stats.rd_bytes, w + b.stats.wr_bytes));
        Ok(MachineStats { cpu_time, resident, disk_read: ByteSize(read), disk_written: ByteSize(written) })
    }

    /// Takes note of what QEMU says. Called in the order QEMU said it.
    fn observe(self: &Arc<Self>, event: QmpEvent) {
        let text = |key: &str| event.data[key].as_str().unwrap_or_default().to_owned();
        match event.name.as_str() {
            // Only a process that is to outlive its guest stops then.
            "STOP" if self.inner().stopping == Some(StopReason::Guest) => {
                self.see_off_soon();
            }
            "STOP" => self.change(PowerState::Running, PowerState::Paused, EventKind::Paused),
            "RESUME" => self.change(PowerState::Paused, PowerState::Running, EventKind::Resumed),
            "RESET" if event.data["guest"] == true => self.emit(EventKind::Rebooted),
            "SHUTDOWN" => {
                let mut inner = self.inner();
                inner.state = PowerState::Stopping;
                inner.stopping.get_or_insert(match text("reason").as_str() {
                    "host-qmp-quit" => StopReason::Forced,
                    reason if reason.starts_with("guest") => StopReason::Guest,
                    _ => StopReason::Host,
                });
            }
            "BLOCK_IO_ERROR" => self.emit(EventKind::DiskError {
                device: text("node-name"),
                reason: text("reason"),
                paused: event.data["action"] == "stop",
            }),
            _ => {}
        }
    }

    fn change(&self, from: PowerState, to: PowerState, kind: EventKind) {
        {
            let mut inner = self.inner();
            if inner.state != from {
                return;
            }
            inner.state = to;
        }
        self.emit(kind);
    }

    /// The process is gone: tidies up and says what happened.
    async fn process_ended(
        &self,
        state_dir: PathBuf,
        status: std::io::Result<Option<std::process::ExitStatus>>,
    ) {
        if let Some(run) = self.run() {
            let qmp = run.qmp.lock().await.clone();
            if let Some(qmp) = qmp {
                let _ = tokio::time::timeout(DRAIN_TIMEOUT, qmp.closed()).await;
            }
        }
        let (cleaned, last_words) =
            blocking(move || (process::clean(&state_dir), process::last_words(&state_dir))).await;
        if let Err(error) = cleaned {
            tracing::warn!(vm = %self.id, %error, "leftovers of a VM that ended could not be removed");
        }
        let failed = matches!(&status, Ok(Some(status)) if !status.success());
        let kind = {
            let mut inner = self.inner();
            inner.run = None;
            inner.tracking.end();
            let reason = inner.stopping.take();
            match reason {
                // Killed as it was told to, or having said why it would go.
                Some(reason) if reason == StopReason::Forced || !failed => {
                    inner.state = PowerState::Stopped;
                    EventKind::Stopped { reason }
                }
                _ => {
                    inner.state = PowerState::Crashed;
                    inner.tracking.forget();
                    EventKind::Crashed { detail: format!("{}: {last_words}", status_text(status)) }
                }
            }
        };
        if let EventKind::Crashed { detail } = &kind {
            tracing::error!(vm = %self.id, %detail, "QEMU ended unasked");
        }
        self.emit(kind);
    }
}

/// Waits for the end of the process and keeps its logs in bounds until then. Holds the VM weakly:
/// a driver that is dropped leaves its VMs running.
async fn watch_process(vm: Weak<Vm>, mut process: Process, state_dir: PathBuf, ended: watch::Sender<bool>) {
    let mut tick = tokio::time::interval(LOG_CHECK);
    let status = loop {
        tokio::select! {
            status = process.ended() => break status,
            _ = tick.tick() => {
                let Some(max) = vm.upgrade().map(|vm| vm.log_max) else { return };
                let dir = state_dir.clone();
                let cut = blocking(move || {
                    process::cut_log(&dir.join(file::CONSOLE_LOG), max)?;
                    process::cut_log(&dir.join(file::STDERR_LOG), max)
                });
                if let Err(error) = cut.await {
                    tracing::warn!(dir = %state_dir.display(), %error, "a VM's logs cannot be cut");
                }
            }
        }
    };
    let Some(vm) = vm.upgrade() else { return };
    // In a task of its own: the run that owns this one is dropped on the way.
    let tidy = async move {
        vm.process_ended(state_dir, status).await;
        let _ = ended.send(true);
    };
    tokio::spawn(tidy);
}

/// Whether the process has ended and all is tidied up, within `limit`.
async fn has_ended(run: &Run, limit: Duration) -> bool {
    let mut ended = run.ended.clone();
    match tokio::time::timeout(limit, ended.wait_for(|ended| *ended)).await {
        Ok(Ok(_)) => true,
        Ok(Err(_)) | Err(_) => false,
    }
}

/// What QEMU's control connection said, if that is why the driver failed.
fn qmp_error(error: &DriverError) -> Option<&QmpError> {
    match error {
        DriverError::Control { source, .. } => source.downcast_ref(),
        _ => None,
    }
}

fn status_text(status: std::io::Result<Option<std::process::ExitStatus>>) -> String {
    match status {
        Ok(Some(status)) => status.to_string(),
        Ok(None) => "exit status unknown".into(),
        Err(error) => format!("exit status unknown ({error})"),
    }
}
