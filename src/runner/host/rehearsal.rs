//! Before a cloud takes a VM over, it starts that VM once: its very command line, on scratch disks of the
//! same shape, and of the guest nothing is executed. What cannot run here is refused before anything travels.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::disk;
use crate::hypervisor::{DiskFormat, Driver, DriverError, Machine};
use crate::interface::{Problem, ProblemKind, chain};
use crate::migration::{Denial, DenialCode};
use crate::runner::Shared;
use crate::types::{ByteSize, RecipeId, VmId, VmName};
use crate::vm::{Firmware, VmSpec};

use super::machine::DiskPaths;

/// Below the data directory; each VM's scratch has its id as a name.
const DIR: &str = "rehearsals";

fn dir_of(shared: &Shared, vm: VmId) -> PathBuf {
    shared.config.cloud.data_dir.join(DIR).join(vm.to_string())
}

/// Why a machine that was tried out did not start.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("its disks cannot be made in {}", dir.display())]
    Disks { dir: PathBuf, source: io::Error },
    #[error(transparent)]
    Start(#[from] DriverError),
}

/// The machine that `spec` would be here, with nothing on its disks.
pub fn machine(shared: &Shared, spec: &VmSpec) -> Machine {
    machine_in(&dir_of(shared, spec.id), spec)
}

fn machine_in(dir: &Path, spec: &VmSpec) -> Machine {
    let disks = DiskPaths::in_dir(dir, dir.join("base.raw"));
    Machine {
        spec: spec.clone(),
        root_format: DiskFormat::Qcow2,
        root_disk: disks.root,
        base: Some(disks.base),
        user_data_disk: (spec.user_data_size.0 > 0).then_some(disks.user_data),
        firmware_vars: DiskPaths::firmware_in(dir),
        state_dir: dir.join("run"),
    }
}

/// Why the hypervisor would not start `spec`, as far as that is known without starting it.
pub fn refusal(shared: &Shared, spec: &VmSpec) -> Option<Denial> {
    shared.driver.check(&machine(shared, spec)).err().map(|e| denial(&e))
}

/// Starts and ends it.
///
/// # Errors
/// Why the hypervisor does not start it.
pub async fn rehearse(shared: &Shared, spec: &VmSpec) -> Result<(), Denial> {
    rehearse_in(&*shared.driver, dir_of(shared, spec.id), spec).await.map_err(|e| match e {
        Failure::Disks { .. } => Denial::new(DenialCode::Storage, chain(&e)),
        Failure::Start(e) => denial(&e),
    })
}

/// Starts and ends a small VM such as the configuration makes: what it names and this host does not run
/// is known before a VM needs it.
///
/// # Errors
/// Why no VM would start.
pub async fn rehearse_configured(driver: &dyn Driver, config: &Config) -> Result<(), Problem> {
    let id = VmId::random();
    let spec = VmSpec {
        id,
        name: VmName::unknown(id),
        cpus: 1,
        memory: ByteSize::mib(64),
        recipe: RecipeId::of(b""),
        root_size: ByteSize::mib(1),
        user_data_size: ByteSize(0),
        nics: Vec::new(),
        architecture: "amd64".into(),
        cpu_model: config.hypervisor.cpu_model.clone(),
        firmware: Firmware::Uefi,
        disk_bus: Default::default(),
        system_uuid: None,
    };
    // Where a broker that starts ends what was left; before its first start that is not there.
    let data_dir = &config.cloud.data_dir;
    let elsewhere = match data_dir.is_dir() {
        true => None,
        false => Some(
            tempfile::tempdir().map_err(|e| Problem::from_error(ProblemKind::Failed, "hypervisor", &e))?,
        ),
    };
    let dir = elsewhere.as_ref().map_or(data_dir.join(DIR), |dir| dir.path().to_owned());
    rehearse_in(driver, dir.join(id.to_string()), &spec).await.map_err(|e| {
        let reason = format!("a VM as it is configured does not start: {}", chain(&e));
        Problem::new(ProblemKind::Missing, "hypervisor", reason)
            .next("correct cpu_model, machine_type and firmware in [hypervisor], or leave them out")
    })
}

async fn rehearse_in(driver: &dyn Driver, dir: PathBuf, spec: &VmSpec) -> Result<(), Failure> {
    let machine = machine_in(&dir, spec);
    // Before anything is made for it.
    driver.check(&machine)?;
    let (scratch, made) = (dir.clone(), machine.clone());
    let made = tokio::task::spawn_blocking(move || make_disks(&scratch, &made)).await;
    let tried = match made.unwrap_or_else(|e| Err(io::Error::other(e))) {
        Ok(()) => driver.rehearse(&machine).await.map_err(Failure::Start),
        Err(source) => Err(Failure::Disks { dir: dir.clone(), source }),
    };
    let removed = tokio::task::spawn_blocking(move || fs::remove_dir_all(dir)).await;
    if let Ok(Err(error)) = removed {
        tracing::warn!(vm = %spec.id, error = chain(&error), "what a start was tried on could not be removed");
    }
    tried
}

fn denial(e: &dyn std::error::Error) -> Denial {
    Denial::new(DenialCode::Start, format!("its hypervisor does not start such a VM: {}", chain(e)))
        .next("let that cloud's operator see 'cicada config check' and the broker's log there")
}

fn make_disks(dir: &Path, machine: &Machine) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let sparse = |path: &Path, size_bytes: u64| {
        fs::OpenOptions::new().create(true).truncate(true).write(true).open(path)?.set_len(size_bytes)
    };
    let spec = &machine.spec;
    if let Some(base) = &machine.base {
        sparse(base, spec.root_size.0)?;
        let _ = fs::remove_file(&machine.root_disk);
        disk::create_overlay(&machine.root_disk, base, spec.root_size.0).map_err(io::Error::other)?;
    }
    if let Some(user_data) = &machine.user_data_disk {
        sparse(user_data, spec.user_data_size.0)?;
    }
    Ok(())
}

/// Ends what a broker that died was trying out.
pub async fn end_left_over(shared: &Shared) {
    let dir = shared.config.cloud.data_dir.join(DIR);
    let Ok(entries) = fs::read_dir(&dir) else { return };
    for entry in entries.flatten() {
        let vm = entry.file_name().to_str().and_then(|name| name.parse::<VmId>().ok());
        if let Some(vm) = vm
            && let Err(error) = shared.driver.end_rehearsal(vm, &entry.path().join("run")).await
        {
            tracing::warn!(%vm, error = chain(&error), "what a start was tried with may still run");
            continue;
        }
        if let Err(error) = fs::remove_dir_all(entry.path()) {
            tracing::warn!(path = %entry.path().display(), error = chain(&error), "a leftover stays");
        }
    }
}
