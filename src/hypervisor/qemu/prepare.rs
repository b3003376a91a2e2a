//! The files around a VM: its state directory, its firmware variables, and making its disks
//! durable. Blocking.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::args::file;
use super::lack::QemuLack;
use crate::durable;
use crate::hypervisor::{DriverError, Machine};
use crate::types::VmId;
use crate::vm::Firmware;

/// Makes the state directory, which nobody else may enter (who reaches the QMP socket commands
/// the VM), and the firmware variables if the VM needs some and has none yet.
pub fn prepare(machine: &Machine, vars_template: &Path) -> Result<(), DriverError> {
    let vm = machine.spec.id;
    let dir = &machine.state_dir;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .and_then(|()| fs::set_permissions(dir, fs::Permissions::from_mode(0o700)))
        .map_err(failed(vm, "make the directory", dir))?;

    if machine.spec.firmware == Firmware::Bios {
        return Ok(());
    }
    let vars = &machine.firmware_vars;
    let expected =
        fs::metadata(vars_template).map_err(|_| QemuLack::Firmware { path: vars_template.to_owned() })?.len();
    match fs::metadata(vars) {
        Ok(meta) if meta.len() == expected => Ok(()),
        Ok(meta) => Err(DriverError::FirmwareVars { vm, path: vars.clone(), found: meta.len(), expected }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => fs::read(vars_template)
            .and_then(|template| durable::write(vars, &template))
            .map_err(failed(vm, "write the firmware variables", vars)),
        Err(e) => Err(failed(vm, "read the firmware variables", vars)(e)),
    }
}

/// Removes the driver's files and the directory, unless somebody else put something there.
pub fn remove_state_dir(machine: &Machine) -> Result<(), DriverError> {
    let (vm, dir) = (machine.spec.id, &machine.state_dir);
    let names = [
        file::QMP,
        file::CONSOLE,
        file::AGENT,
        file::NBD,
        file::RECORD,
        file::STDERR_LOG,
        "qemu.log.1",
        file::CONSOLE_LOG,
        "console.log.1",
    ];
    for name in names {
        let path = dir.join(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(vm, "remove", &path)(e)),
            _ => {}
        }
    }
    match fs::remove_dir(dir) {
        Err(e) if !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {
            Err(failed(vm, "remove", dir)(e))
        }
        _ => Ok(()),
    }
}

/// Puts what a VM wrote on stable storage; its process must have ended.
pub fn sync_disks(machine: &Machine) -> Result<(), DriverError> {
    let written = [Some(&machine.root_disk), machine.user_data_disk.as_ref(), Some(&machine.firmware_vars)];
    for path in written.into_iter().flatten() {
        match File::open(path).and_then(|file| file.sync_all()) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(failed(machine.spec.id, "write to stable storage", path)(e));
            }
            _ => {}
        }
    }
    Ok(())
}

fn failed(vm: VmId, action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DriverError {
    let path: PathBuf = path.to_owned();
    move |source| DriverError::Io { vm, action, path, source }
}
