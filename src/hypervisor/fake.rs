//! A driver without a hypervisor, for simulation and fault tests.
//!
//! VMs are entries in memory that change state at once; no time passes and no process exists. Files
//! are kept as a real driver keeps them (state directory, firmware variables), and a test can act
//! as the guest: write to the disks, speak on the console, switch itself off. Any verb can be told
//! to fail.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::ready;
use tokio::io::DuplexStream;
use tokio::sync::{Semaphore, broadcast};

use super::driver::EVENTS_KEPT;
use super::{
    Ability, Accelerator, ConsoleStream, DiskChanges, DiskFormat, Driver, DriverError, DriverEvent,
    DriverFuture, EventKind, Features, Machine, MachineStats, Period, StopMode, StopReason,
};
use crate::clock::{Clock, UnixMillis};
use crate::durable;
use crate::types::{ByteSize, VmId};
use crate::vm::hypervisor::Lack;
use crate::vm::spec::Nic;
use crate::vm::{CardModel, DiskBus, PowerState};

/// What the fake firmware's variables look like before a VM has any of its own.
pub const VARS_TEMPLATE: &[u8] = b"fake firmware variables\n";
const CONSOLE_BYTES: usize = 64 << 10;

/// A verb that can be told to fail.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Verb {
    Define,
    Start,
    Rehearse,
    Stop,
    Pause,
    Resume,
    Undefine,
    Console,
    Stats,
    TrackChanges,
}

impl Verb {
    fn participle(self) -> &'static str {
        match self {
            Verb::Define => "defined",
            Verb::Start => "started",
            Verb::Rehearse => "tried out",
            Verb::Stop => "stopped",
            Verb::Pause => "paused",
            Verb::Resume => "resumed",
            Verb::Undefine => "undefined",
            Verb::Console => "looked at through its console",
            Verb::Stats => "measured",
            Verb::TrackChanges => "watched for changes",
        }
    }
}

/// Which disk a guest writes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestDisk {
    Root,
    UserData,
}

#[derive(Clone)]
pub struct FakeDriver {
    features: Arc<Features>,
    clock: Arc<dyn Clock>,
    events: broadcast::Sender<DriverEvent>,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    vms: BTreeMap<VmId, Entry>,
    deaf: BTreeSet<VmId>,
    /// How many of the next calls of a verb fail.
    failing: BTreeMap<Verb, u32>,
    /// Periods of change tracking begun, of all VMs.
    periods: u64,
}

struct Entry {
    machine: Machine,
    state: PowerState,
    started: UnixMillis,
    written: ByteSize,
    /// The changes of the period under way.
    tracked: Option<(Period, DiskChanges)>,
    /// Those of the last one, when the guest switched itself off.
    kept: Option<(Period, DiskChanges)>,
    console: Arc<Semaphore>,
    /// The guest's end of the console somebody holds.
    guest_console: Option<DuplexStream>,
}

impl FakeDriver {
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        let features = Features {
            driver: "fake".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            accelerator: Accelerator::Simulated,
            machine_type: super::qemu::config::MACHINE_TYPE.into(),
            firmware: "fake".into(),
            architectures: ["amd64".to_owned()].into(),
            cpu_models: ["qemu64".to_owned()].into(),
            disk_buses: DiskBus::ALL.iter().copied().collect(),
            card_models: CardModel::ALL.iter().copied().collect(),
            root_formats: [DiskFormat::Qcow2, DiskFormat::Raw].into(),
            networks: ["default".to_owned()].into(),
            exposing_networks: BTreeSet::new(),
            own_users: false,
            abilities: [Ability::Pause, Ability::Console, Ability::TrackChanges].into(),
        };
        Self::with_features(clock, features)
    }

    /// A fake that claims to be some other driver.
    pub fn with_features(clock: Arc<dyn Clock>, features: Features) -> Self {
        Self {
            features: Arc::new(features),
            clock,
            events: broadcast::Sender::new(EVENTS_KEPT),
            inner: Arc::default(),
        }
    }

    // What a test does.

    /// The next `count` calls of `verb` fail without having changed anything.
    pub fn fail_next(&self, verb: Verb, count: u32) {
        self.inner().failing.insert(verb, count);
    }

    /// Whether the guest ignores its power button. It need not be defined yet. Graceful stops of a
    /// deaf guest time out at once.
    pub fn set_deaf(&self, vm: VmId, deaf: bool) {
        let mut inner = self.inner();
        if deaf {
            inner.deaf.insert(vm);
        } else {
            inner.deaf.remove(&vm);
        }
    }

    /// The guest writes to a raw disk. Only one that runs can.
    pub fn guest_writes(
        &self,
        vm: VmId,
        disk: GuestDisk,
        offset_bytes: u64,
        bytes: &[u8],
    ) -> Result<(), DriverError> {
        let path = self.with(vm, |entry| {
            if entry.state != PowerState::Running {
                return Err(wrong_state(entry, "writing"));
            }
            let machine = &entry.machine;
            let path = match disk {
                GuestDisk::Root if machine.root_format == DiskFormat::Raw => Some(machine.root_disk.clone()),
                GuestDisk::Root => None,
                GuestDisk::UserData => machine.user_data_disk.clone(),
            };
            entry.written.0 += bytes.len() as u64;
            if let Some((_, tracked)) = &mut entry.tracked {
                let ranges = match disk {
                    GuestDisk::Root => &mut tracked.root,
                    GuestDisk::UserData => &mut tracked.user_data,
                };
                note(ranges, offset_bytes..offset_bytes + bytes.len() as u64);
            }
            path.ok_or_else(|| DriverError::BadSpec {
                vm,
                rule: "the fake guest writes to raw disks only, and there is none".into(),
            })
        })?;
        let write = || OpenOptions::new().write(true).open(&path)?.write_all_at(bytes, offset_bytes);
        write().map_err(|source| DriverError::Io {
            vm,
            action: "write to the disk",
            path: path.clone(),
            source,
        })
    }

    /// The guest switches itself off. Does nothing if it does not run.
    pub fn guest_switches_off(&self, vm: VmId) {
        self.end(vm, EventKind::Stopped { reason: StopReason::Guest });
    }

    /// The hypervisor process dies. Does nothing if there is none.
    pub fn crash(&self, vm: VmId) {
        self.end(vm, EventKind::Crashed { detail: "a crash made by a test".into() });
    }

    /// The guest's end of the console, once, while somebody holds the other.
    pub fn take_guest_console(&self, vm: VmId) -> Option<DuplexStream> {
        self.inner().vms.get_mut(&vm)?.guest_console.take()
    }

    // What the verbs are made of.

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn emit(&self, vm: VmId, kind: EventKind) {
        let _ = self.events.send(DriverEvent { vm, kind });
    }

    fn may_fail(&self, vm: VmId, verb: Verb) -> Result<(), DriverError> {
        match self.inner().failing.get_mut(&verb) {
            Some(left) if *left > 0 => {
                *left -= 1;
                Err(DriverError::Injected { vm, verb: verb.participle() })
            }
            _ => Ok(()),
        }
    }

    fn with<T>(
        &self,
        vm: VmId,
        work: impl FnOnce(&mut Entry) -> Result<T, DriverError>,
    ) -> Result<T, DriverError> {
        work(self.inner().vms.get_mut(&vm).ok_or(DriverError::UnknownVm { vm })?)
    }

    fn end(&self, vm: VmId, kind: EventKind) {
        {
            let mut inner = self.inner();
            let Some(entry) = inner.vms.get_mut(&vm).filter(|entry| has_process(entry)) else { return };
            entry.state = match kind {
                EventKind::Crashed { .. } => PowerState::Crashed,
                _ => PowerState::Stopped,
            };
            entry.guest_console = None;
            let tracked = entry.tracked.take();
            entry.kept = tracked.filter(|_| kind == EventKind::Stopped { reason: StopReason::Guest });
        }
        self.emit(vm, kind);
    }

    /// What this host does not offer.
    fn check_now(&self, machine: &Machine) -> Result<(), DriverError> {
        let (vm, spec) = (machine.spec.id, &machine.spec);
        spec.check().map_err(|rule| DriverError::BadSpec { vm, rule })?;
        let network = |nic: &Nic| Lack::of("network", &nic.network, &self.features.networks);
        match self.features.lacks(spec).or_else(|| spec.nics.iter().find_map(network)) {
            Some(lack) => Err(DriverError::not_offered(vm, lack)),
            None => Ok(()),
        }
    }

    fn define_now(&self, machine: &Machine) -> Result<(), DriverError> {
        let vm = machine.spec.id;
        self.may_fail(vm, Verb::Define)?;
        self.check_now(machine)?;
        let mut inner = self.inner();
        match inner.vms.get_mut(&vm) {
            Some(entry) if entry.machine == *machine => return Ok(()),
            Some(entry) if has_process(entry) => {
                return Err(DriverError::Differs { vm, state: entry.state });
            }
            Some(entry) => entry.machine = machine.clone(),
            None => {}
        }
        let failed = |action, path: &PathBuf| {
            let path = path.clone();
            move |source| DriverError::Io { vm, action, path, source }
        };
        fs::create_dir_all(&machine.state_dir).map_err(failed("make the directory", &machine.state_dir))?;
        if !machine.firmware_vars.exists() {
            durable::write(&machine.firmware_vars, VARS_TEMPLATE)
                .map_err(failed("write the firmware variables", &machine.firmware_vars))?;
        }
        inner.vms.entry(vm).or_insert_with(|| Entry {
            machine: machine.clone(),
            state: PowerState::Stopped,
            started: UnixMillis::default(),
            written: ByteSize(0),
            tracked: None,
            kept: None,
            console: Arc::new(Semaphore::new(1)),
            guest_console: None,
        });
        Ok(())
    }

    fn start_now(&self, machine: &Machine) -> Result<(), DriverError> {
        self.define_now(machine)?;
        let vm = machine.spec.id;
        self.may_fail(vm, Verb::Start)?;
        let now = self.clock.now();
        let kind = self.with(vm, |entry| {
            let kind = match entry.state {
                PowerState::Running => return Ok(None),
                PowerState::Paused => EventKind::Resumed,
                _ => {
                    (entry.started, entry.written) = (now, ByteSize(0));
                    entry.kept = None;
                    EventKind::Started
                }
            };
            entry.state = PowerState::Running;
            Ok(Some(kind))
        })?;
        if let Some(kind) = kind {
            self.emit(vm, kind);
        }
        Ok(())
    }

    fn stop_now(&self, vm: VmId, mode: StopMode) -> Result<(), DriverError> {
        self.may_fail(vm, Verb::Stop)?;
        let is_deaf = self.inner().deaf.contains(&vm);
        let reason = self.with(vm, |entry| match mode {
            StopMode::Graceful { timeout, escalate: false } if is_deaf && has_process(entry) => {
                // The button press would have made a paused guest go on.
                entry.state = PowerState::Running;
                Err(DriverError::Timeout {
                    vm,
                    verb: "stopped",
                    state: entry.state,
                    after: timeout,
                    next_step: "its guest ignores the power button",
                })
            }
            StopMode::Graceful { .. } if !is_deaf => Ok(StopReason::Guest),
            _ => Ok(StopReason::Forced),
        })?;
        self.end(vm, EventKind::Stopped { reason });
        self.with(vm, |entry| {
            if entry.state == PowerState::Crashed {
                entry.state = PowerState::Stopped;
            }
            Ok(())
        })
    }

    fn switch(
        &self,
        vm: VmId,
        verb: Verb,
        from: PowerState,
        to: PowerState,
        kind: EventKind,
    ) -> Result<(), DriverError> {
        self.may_fail(vm, verb)?;
        let changed = self.with(vm, |entry| match entry.state {
            state if state == to => Ok(false),
            state if state == from => {
                entry.state = to;
                Ok(true)
            }
            _ => Err(wrong_state(entry, verb.participle())),
        })?;
        if changed {
            self.emit(vm, kind);
        }
        Ok(())
    }

    fn undefine_now(&self, vm: VmId) -> Result<(), DriverError> {
        self.may_fail(vm, Verb::Undefine)?;
        let mut inner = self.inner();
        let Some(entry) = inner.vms.get(&vm) else { return Ok(()) };
        if has_process(entry) {
            return Err(wrong_state(entry, Verb::Undefine.participle()));
        }
        let path = &entry.machine.state_dir;
        match fs::remove_dir(path) {
            Err(source)
                if !matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) =>
            {
                return Err(DriverError::Io { vm, action: "remove", path: path.clone(), source });
            }
            _ => {}
        }
        inner.vms.remove(&vm);
        Ok(())
    }

    fn console_now(&self, vm: VmId) -> Result<ConsoleStream, DriverError> {
        self.may_fail(vm, Verb::Console)?;
        self.with(vm, |entry| {
            if !has_process(entry) {
                return Err(wrong_state(entry, Verb::Console.participle()));
            }
            let turn =
                entry.console.clone().try_acquire_owned().map_err(|_| DriverError::ConsoleBusy { vm })?;
            let (ours, guests) = tokio::io::duplex(CONSOLE_BYTES);
            entry.guest_console = Some(guests);
            Ok(ConsoleStream::new(ours, turn))
        })
    }

    fn track_now(
        &self,
        vm: VmId,
        since: Option<Period>,
    ) -> Result<(Period, Option<DiskChanges>), DriverError> {
        self.may_fail(vm, Verb::TrackChanges)?;
        let period = {
            let mut inner = self.inner();
            inner.periods += 1;
            Period(inner.periods)
        };
        self.with(vm, |entry| {
            if !has_process(entry) {
                return Err(wrong_state(entry, Verb::TrackChanges.participle()));
            }
            let ended = entry.tracked.replace((period, DiskChanges::default()));
            Ok((period, changes_of(since, ended)))
        })
    }

    fn end_tracking_now(&self, vm: VmId, since: Option<Period>) -> Result<Option<DiskChanges>, DriverError> {
        self.with(vm, |entry| {
            entry.tracked = None;
            Ok(changes_of(since, entry.kept.take()))
        })
    }

    fn stats_now(&self, vm: VmId) -> Result<MachineStats, DriverError> {
        self.may_fail(vm, Verb::Stats)?;
        let now = self.clock.now();
        self.with(vm, |entry| {
            if !has_process(entry) {
                return Err(wrong_state(entry, Verb::Stats.participle()));
            }
            let spec = &entry.machine.spec;
            Ok(MachineStats {
                cpu_time: now.since(entry.started) * spec.cpus,
                resident: spec.memory,
                disk_read: ByteSize(0),
                disk_written: entry.written,
            })
        })
    }
}

/// Adds a range to ascending ones that do not touch.
fn note(ranges: &mut Vec<Range<u64>>, mut new: Range<u64>) {
    let first = ranges.partition_point(|r| r.end < new.start);
    let after = ranges.partition_point(|r| r.start <= new.end);
    for touched in &ranges[first..after] {
        new = new.start.min(touched.start)..new.end.max(touched.end);
    }
    ranges.splice(first..after, [new]);
}

/// What a period that has ended held, if it is the one asked about.
fn changes_of(since: Option<Period>, ended: Option<(Period, DiskChanges)>) -> Option<DiskChanges> {
    ended.filter(|(period, _)| since == Some(*period)).map(|(_, changes)| changes)
}

fn has_process(entry: &Entry) -> bool {
    !matches!(entry.state, PowerState::Stopped | PowerState::Crashed)
}

fn wrong_state(entry: &Entry, verb: &'static str) -> DriverError {
    DriverError::WrongState { vm: entry.machine.spec.id, state: entry.state, verb }
}

impl Driver for FakeDriver {
    fn features(&self) -> &Features {
        &self.features
    }
    fn define<'a>(&'a self, machine: &'a Machine) -> DriverFuture<'a, ()> {
        Box::pin(ready(self.define_now(machine)))
    }
    fn start<'a>(&'a self, machine: &'a Machine) -> DriverFuture<'a, ()> {
        Box::pin(ready(self.start_now(machine)))
    }
    fn check(&self, machine: &Machine) -> Result<(), DriverError> {
        self.check_now(machine)
    }
    fn rehearse<'a>(&'a self, machine: &'a Machine) -> DriverFuture<'a, ()> {
        let tried = self.check_now(machine).and_then(|()| self.may_fail(machine.spec.id, Verb::Rehearse));
        Box::pin(ready(tried))
    }
    fn end_rehearsal<'a>(&'a self, _: VmId, _: &'a Path) -> DriverFuture<'a, ()> {
        Box::pin(ready(Ok(())))
    }
    fn stop(&self, vm: VmId, mode: StopMode) -> DriverFuture<'_, ()> {
        Box::pin(ready(self.stop_now(vm, mode)))
    }
    fn pause(&self, vm: VmId) -> DriverFuture<'_, ()> {
        let (from, to) = (PowerState::Running, PowerState::Paused);
        Box::pin(ready(self.switch(vm, Verb::Pause, from, to, EventKind::Paused)))
    }
    fn resume(&self, vm: VmId) -> DriverFuture<'_, ()> {
        let (from, to) = (PowerState::Paused, PowerState::Running);
        Box::pin(ready(self.switch(vm, Verb::Resume, from, to, EventKind::Resumed)))
    }
    fn state(&self, vm: VmId) -> Result<PowerState, DriverError> {
        self.with(vm, |entry| Ok(entry.state))
    }
    fn list(&self) -> Vec<(VmId, PowerState)> {
        self.inner().vms.iter().map(|(id, entry)| (*id, entry.state)).collect()
    }
    fn undefine(&self, vm: VmId) -> DriverFuture<'_, ()> {
        Box::pin(ready(self.undefine_now(vm)))
    }
    fn console(&self, vm: VmId) -> DriverFuture<'_, ConsoleStream> {
        Box::pin(ready(self.console_now(vm)))
    }
    fn console_log(&self, vm: VmId) -> Result<PathBuf, DriverError> {
        self.with(vm, |entry| Ok(entry.machine.state_dir.join(super::qemu::args::file::CONSOLE_LOG)))
    }
    fn events(&self) -> broadcast::Receiver<DriverEvent> {
        self.events.subscribe()
    }
    fn stats(&self, vm: VmId) -> DriverFuture<'_, MachineStats> {
        Box::pin(ready(self.stats_now(vm)))
    }
    fn track_changes(
        &self,
        vm: VmId,
        since: Option<Period>,
    ) -> DriverFuture<'_, (Period, Option<DiskChanges>)> {
        Box::pin(ready(self.track_now(vm, since)))
    }
    fn end_tracking(&self, vm: VmId, since: Option<Period>) -> DriverFuture<'_, Option<DiskChanges>> {
        Box::pin(ready(self.end_tracking_now(vm, since)))
    }
}
