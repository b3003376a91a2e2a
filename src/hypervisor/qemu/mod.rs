//! The QEMU driver: one QEMU process per VM, commanded over QMP, with no daemon in between.
//!
//! The processes are nobody's children for long: they run in sessions of their own, and a broker
//! that starts again finds them by what it left in their state directories (`STATE.md`). Dropping
//! the driver leaves all VMs running. A service manager must be told not to end them with the
//! broker (systemd: `KillMode=process`).
#![doc = include_str!("STATE.md")]

pub mod args;
mod bitmaps;
pub mod config;
mod lack;
mod launch;
pub mod link;
mod prepare;
mod probe;
mod process;
pub mod qmp;
mod tools;
mod uids;
mod vm;

/// What `fuzz/` reaches into.
#[cfg(fuzzing)]
pub mod fuzzing {
    pub use super::bitmaps::ranges_in as dirty_ranges;
    pub use super::qmp::is_message;
}

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::broadcast;

pub use config::{AcceleratorChoice, NetworkBackend, QemuConfig, VmUids};
pub use lack::QemuLack;
pub use launch::is_confinable;
pub use tools::{QemuTools, QemuVersion, find_configured, find_passt, find_qemu};

use super::driver::EVENTS_KEPT;
use super::error::list;
use super::{
    Ability, Accelerator, ConsoleStream, DiskChanges, DiskFormat, Driver, DriverError, DriverEvent,
    DriverFuture, Features, Machine, MachineStats, Period, StopMode,
};
use crate::types::{ByteSize, VmId};
use crate::vm::spec::Nic;
use crate::vm::{Firmware, PowerState};
use launch::{Launch, Reach, Wiring};
use uids::Uids;
use vm::Vm;

pub struct QemuDriver {
    shared: Arc<Shared>,
}

struct Shared {
    system: PathBuf,
    host: args::Host,
    wiring: Wiring,
    uids: Option<Arc<Uids>>,
    features: Features,
    vars_template: PathBuf,
    log_max: ByteSize,
    img: Option<PathBuf>,
    vms: Mutex<BTreeMap<VmId, Arc<Vm>>>,
    events: broadcast::Sender<DriverEvent>,
}

impl QemuDriver {
    /// Finds QEMU and its firmware and tries out what they can do here. Takes a fraction of a
    /// second; what is found holds for the driver's life.
    pub async fn open(config: QemuConfig) -> Result<Self, DriverError> {
        let for_search = config.clone();
        let tools = blocking(move || {
            for path in [&for_search.firmware_code, &for_search.firmware_vars] {
                if !path.is_file() {
                    return Err(DriverError::from(QemuLack::Firmware { path: path.clone() }));
                }
            }
            Ok((find_configured(&for_search)?, firmware_digest(&for_search)?))
        })
        .await?;
        let (tools, firmware) = tools;
        let passt = find_passt(&config);
        let machine_type = config.machine_type;
        let accelerator = probe::accelerator(&tools.system, &machine_type, config.accelerator).await?;
        let offer = probe::ask(&tools.system, accelerator).await?;
        if !offer.machine_types.contains(&machine_type) {
            let q35 = offer.machine_types.iter().filter(|name| name.starts_with("pc-q35-"));
            let offered = list(q35);
            return Err(QemuLack::MachineType { path: tools.system, machine_type, offered }.into());
        }
        let img = tools.img().ok().map(PathBuf::from);
        let link = config.link.map_or_else(std::env::current_exe, Ok);
        let link = link.map_err(|e| QemuLack::Probe { detail: format!("this program's path: {e}") })?;
        let has_user_network = config.networks.values().any(|n| *n == NetworkBackend::User);
        if passt.is_none() && has_user_network {
            tracing::warn!(
                "passt was not found: guests on networks of kind \"user\" reach the services of this host; \
                 install the package passt and restart the broker"
            );
        }
        if !blocking(launch::is_confinable).await {
            tracing::warn!("this kernel has no Landlock: a broken QEMU could read whatever the broker can");
        }
        let uids = uids(config.vm_uids, &tools.system, accelerator).await?;
        let mut abilities = BTreeSet::from([Ability::Pause, Ability::Console]);
        if img.is_some() {
            abilities.insert(Ability::TrackChanges);
        }
        let features = Features {
            driver: "qemu".into(),
            version: tools.version.to_string(),
            accelerator,
            machine_type: machine_type.clone(),
            firmware,
            architectures: ["amd64".to_owned()].into(),
            cpu_models: offer.cpu_models,
            disk_buses: args::disk_buses(&offer.devices),
            card_models: args::card_models(&offer.devices),
            root_formats: [DiskFormat::Qcow2, DiskFormat::Raw].into(),
            networks: config.networks.keys().cloned().collect(),
            exposing_networks: config
                .networks
                .iter()
                .filter(|(_, kind)| passt.is_none() && **kind == NetworkBackend::User)
                .map(|(name, _)| name.clone())
                .collect(),
            own_users: uids.is_some(),
            abilities,
        };
        tracing::info!(version = %features.version, %accelerator, machine_type, "QEMU is ready");
        Ok(Self {
            shared: Arc::new(Shared {
                system: tools.system,
                host: args::Host {
                    accelerator,
                    machine_type,
                    firmware_code: config.firmware_code,
                    networks: config.networks,
                    isolates: passt.is_some(),
                    sandbox: offer.sandbox,
                },
                wiring: Wiring { passt, link, bridge_helper: config.bridge_helper },
                uids: uids.map(Arc::new),
                features,
                vars_template: config.firmware_vars,
                log_max: config.console_log_max,
                img,
                vms: Mutex::default(),
                events: broadcast::Sender::new(EVENTS_KEPT),
            }),
        })
    }
}

/// So that clouds can tell whether their guests get the same firmware.
fn firmware_digest(config: &QemuConfig) -> Result<String, DriverError> {
    let mut hasher = blake3::Hasher::new();
    for path in [&config.firmware_code, &config.firmware_vars] {
        let unread = |_| QemuLack::Firmware { path: path.clone() };
        hasher.update_reader(std::fs::File::open(path).map_err(unread)?).map_err(unread)?;
    }
    Ok(hasher.finalize().to_hex()[..16].to_owned())
}

/// The users that VMs run as, or None for the broker's.
async fn uids(choice: VmUids, system: &Path, accelerator: Accelerator) -> Result<Option<Uids>, DriverError> {
    if choice == VmUids::Off {
        return Ok(None);
    }
    let system = system.to_owned();
    match blocking(move || Uids::find(&choice, &system, accelerator)).await {
        Ok(uids) => {
            tracing::info!(users = uids.range(), "each VM runs as a user of its own");
            Ok(Some(uids))
        }
        Err(reason) if choice == VmUids::Auto => {
            tracing::warn!("{}", uids::shared(&reason));
            Ok(None)
        }
        Err(reason) => Err(QemuLack::Users { reason }.into()),
    }
}

/// Ends the process that an earlier driver left in this state directory, if there is one.
async fn end_left_over(vm: VmId, state_dir: PathBuf) -> Result<(), DriverError> {
    let path = state_dir.clone();
    blocking(move || match process::find(&state_dir, vm)? {
        process::Found::Alive(handle) => handle.kill(),
        process::Found::Nothing | process::Found::Ended => Ok(()),
    })
    .await
    .map_err(|source| DriverError::Io { vm, action: "end what was left in", path, source })
}

/// Whether this host has a bridge of that name.
fn is_bridge(name: &str) -> bool {
    Path::new("/sys/class/net").join(name).join("bridge").is_dir()
}

/// What the configuration names and this host does not have: VMs that need it do not start.
pub fn missing(config: &QemuConfig) -> Vec<String> {
    let bridges = config.networks.iter().filter_map(|(network, backend)| match backend {
        NetworkBackend::Bridge(bridge) if !is_bridge(bridge) => {
            Some(DriverError::NoBridge { bridge: bridge.clone(), network: network.clone() }.to_string())
        }
        _ => None,
    });
    bridges.collect()
}

/// Why VMs would not run as users of their own here, if they would not.
pub fn why_shared(config: &QemuConfig) -> Option<String> {
    if config.vm_uids == VmUids::Off {
        return Some(uids::shared("hypervisor.vm_uids is \"off\""));
    }
    let system = find_configured(config).ok()?.system;
    let uses_kvm = config.accelerator != AcceleratorChoice::Tcg && probe::kvm_is_plausible().is_ok();
    let accelerator = if uses_kvm { Accelerator::Kvm } else { Accelerator::Tcg };
    Uids::find(&config.vm_uids, &system, accelerator).err().map(|reason| uids::shared(&reason))
}

impl Shared {
    fn vms(&self) -> MutexGuard<'_, BTreeMap<VmId, Arc<Vm>>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn defined(&self, id: VmId) -> Result<Arc<Vm>, DriverError> {
        let vm = self.vms().get(&id).cloned();
        vm.filter(|vm| vm.machine().is_some()).ok_or(DriverError::UnknownVm { vm: id })
    }

    /// Refuses, without touching anything, what this host does not offer; gives what starts it.
    fn check(&self, machine: &Machine) -> Result<Launch, DriverError> {
        let (spec, features) = (&machine.spec, &self.features);
        let vm = spec.id;
        spec.check().map_err(|rule| DriverError::BadSpec { vm, rule })?;
        if let Some(lack) = features.lacks(spec) {
            return Err(DriverError::not_offered(vm, lack));
        }
        if spec.firmware == Firmware::Uefi {
            for path in [&self.host.firmware_code, &self.vars_template] {
                if !path.is_file() {
                    return Err(QemuLack::Firmware { path: path.clone() }.into());
                }
            }
        }
        for nic in &spec.nics {
            if let Some(NetworkBackend::Bridge(bridge)) = self.host.networks.get(&nic.network)
                && !is_bridge(bridge)
            {
                return Err(DriverError::NoBridge { bridge: bridge.clone(), network: nic.network.clone() });
            }
        }
        // Made again when it starts, with what is open then.
        args::argv(machine, &self.host, &mut |_| Ok(0))?;
        let is_user = |nic: &Nic| self.host.networks.get(&nic.network) == Some(&NetworkBackend::User);
        let connects = !self.host.isolates && spec.nics.iter().any(is_user);
        Ok(Launch {
            system: self.system.clone(),
            machine: machine.clone(),
            host: self.host.clone(),
            wiring: self.wiring.clone(),
            reach: Reach::of(&self.system, connects),
            uids: self.uids.clone(),
            executes: true,
        })
    }

    /// Runs `verb` with the VM's turn taken, making the VM known if it is not.
    async fn defining<T>(
        &self,
        machine: &Machine,
        verb: impl AsyncFnOnce(Arc<Vm>) -> Result<T, DriverError>,
    ) -> Result<T, DriverError> {
        let id = machine.spec.id;
        loop {
            let vm = self
                .vms()
                .entry(id)
                .or_insert_with(|| Arc::new(Vm::new(id, self.events.clone(), self.log_max, self.img.clone())))
                .clone();
            let _turn = vm.verbs.lock().await;
            // It may have been undefined while this waited for its turn.
            if !self.vms().get(&id).is_some_and(|now| Arc::ptr_eq(now, &vm)) {
                continue;
            }
            let defined = vm.define(machine, self.vars_template.clone()).await;
            if vm.machine().is_none() {
                self.vms().remove(&id);
            }
            defined?;
            return verb(vm.clone()).await;
        }
    }

    async fn rehearse(&self, machine: &Machine) -> Result<(), DriverError> {
        let id = machine.spec.id;
        let launch = Launch { executes: false, ..self.check(machine)? };
        // Not one of this host's VMs: nobody else sees it, nor hears of it.
        let vm = Arc::new(Vm::new(id, broadcast::Sender::new(1), self.log_max, None));
        let state_dir = machine.state_dir.clone();
        end_left_over(id, state_dir).await?;
        vm.define(machine, self.vars_template.clone()).await?;
        let tried = vm.start(launch).await;
        let ended = vm.stop_by_force().await;
        let machine = machine.clone();
        let removed = blocking(move || prepare::remove_state_dir(&machine)).await;
        tried.and(ended).and(removed)
    }

    async fn stop(&self, id: VmId, mode: StopMode) -> Result<(), DriverError> {
        let vm = self.defined(id)?;
        match mode {
            StopMode::Graceful { timeout, escalate } => vm.stop_gracefully(timeout, escalate).await?,
            StopMode::Forced => vm.stop_by_force().await?,
        }
        vm.settle_crash();
        match vm.machine() {
            Some(machine) => blocking(move || prepare::sync_disks(&machine)).await,
            None => Ok(()),
        }
    }

    async fn undefine(&self, id: VmId) -> Result<(), DriverError> {
        let Ok(vm) = self.defined(id) else { return Ok(()) };
        let _turn = vm.verbs.lock().await;
        let state = vm.state();
        if !matches!(state, PowerState::Stopped | PowerState::Crashed) {
            return Err(DriverError::WrongState { vm: id, state, verb: "undefined" });
        }
        if let Some(machine) = vm.machine() {
            blocking(move || prepare::remove_state_dir(&machine)).await?;
        }
        self.vms().remove(&id);
        Ok(())
    }
}

impl Driver for QemuDriver {
    fn features(&self) -> &Features {
        &self.shared.features
    }

    fn define<'a>(&'a self, machine: &'a Machine) -> DriverFuture<'a, ()> {
        let (shared, machine) = (self.shared.clone(), machine.clone());
        to_its_end(async move {
            shared.check(&machine)?;
            shared.defining(&machine, async |_| Ok(())).await
        })
    }

    fn start<'a>(&'a self, machine: &'a Machine) -> DriverFuture<'a, ()> {
        let (shared, machine) = (self.shared.clone(), machine.clone());
        to_its_end(async move {
            let launch = shared.check(&machine)?;
            shared.defining(&machine, async |vm| vm.start(launch).await).await
        })
    }

    fn check(&self, machine: &Machine) -> Result<(), DriverError> {
        self.shared.check(machine).map(drop)
    }

    fn rehearse<'a>(&'a self, machine: &'a Machine) -> DriverFuture<'a, ()> {
        let (shared, machine) = (self.shared.clone(), machine.clone());
        to_its_end(async move { shared.rehearse(&machine).await })
    }

    fn end_rehearsal<'a>(&'a self, vm: VmId, state_dir: &'a Path) -> DriverFuture<'a, ()> {
        let state_dir = state_dir.to_owned();
        to_its_end(async move { end_left_over(vm, state_dir).await })
    }

    fn stop(&self, vm: VmId, mode: StopMode) -> DriverFuture<'_, ()> {
        let shared = self.shared.clone();
        to_its_end(async move { shared.stop(vm, mode).await })
    }

    fn pause(&self, vm: VmId) -> DriverFuture<'_, ()> {
        Box::pin(async move {
            let vm = self.shared.defined(vm)?;
            let _turn = vm.verbs.lock().await;
            vm.pause().await
        })
    }

    fn resume(&self, vm: VmId) -> DriverFuture<'_, ()> {
        Box::pin(async move {
            let vm = self.shared.defined(vm)?;
            let _turn = vm.verbs.lock().await;
            vm.resume().await
        })
    }

    fn state(&self, vm: VmId) -> Result<PowerState, DriverError> {
        Ok(self.shared.defined(vm)?.state())
    }

    fn list(&self) -> Vec<(VmId, PowerState)> {
        let vms = self.shared.vms();
        vms.iter().filter(|(_, vm)| vm.machine().is_some()).map(|(id, vm)| (*id, vm.state())).collect()
    }

    fn undefine(&self, vm: VmId) -> DriverFuture<'_, ()> {
        let shared = self.shared.clone();
        to_its_end(async move { shared.undefine(vm).await })
    }

    fn console(&self, vm: VmId) -> DriverFuture<'_, ConsoleStream> {
        Box::pin(async move { self.shared.defined(vm)?.console().await })
    }

    fn console_log(&self, vm: VmId) -> Result<PathBuf, DriverError> {
        let machine = self.shared.defined(vm)?.machine().ok_or(DriverError::UnknownVm { vm })?;
        Ok(machine.state_dir.join(args::file::CONSOLE_LOG))
    }

    fn events(&self) -> broadcast::Receiver<DriverEvent> {
        self.shared.events.subscribe()
    }

    fn stats(&self, vm: VmId) -> DriverFuture<'_, MachineStats> {
        Box::pin(async move { self.shared.defined(vm)?.stats().await })
    }

    fn track_changes(
        &self,
        vm: VmId,
        since: Option<Period>,
    ) -> DriverFuture<'_, (Period, Option<DiskChanges>)> {
        let shared = self.shared.clone();
        to_its_end(async move {
            let vm = shared.defined(vm)?;
            let _turn = vm.verbs.lock().await;
            vm.track_changes(since).await
        })
    }

    fn end_tracking(&self, vm: VmId, since: Option<Period>) -> DriverFuture<'_, Option<DiskChanges>> {
        let shared = self.shared.clone();
        to_its_end(async move {
            let vm = shared.defined(vm)?;
            let _turn = vm.verbs.lock().await;
            vm.end_tracking(since).await
        })
    }
}

/// Runs a verb in a task, so that it is finished or undone even if nobody waits for it any more.
fn to_its_end<T: Send + 'static>(
    verb: impl Future<Output = Result<T, DriverError>> + Send + 'static,
) -> DriverFuture<'static, T> {
    Box::pin(async move { joined(tokio::spawn(verb)).await })
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    joined(tokio::task::spawn_blocking(work)).await
}

async fn joined<T>(task: tokio::task::JoinHandle<T>) -> T {
    match task.await {
        Ok(value) => value,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // Only a runtime that shuts down cancels these tasks, and then nobody is there to be told.
        Err(_) => std::future::pending().await,
    }
}
