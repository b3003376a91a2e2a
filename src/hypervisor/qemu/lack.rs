//! What a host lacks to run VMs with QEMU.

use std::path::PathBuf;

use crate::hypervisor::DriverError;

#[derive(Debug, thiserror::Error)]
pub enum QemuLack {
    #[error(
        "the UEFI firmware {} was not found: install the package ovmf, or set firmware_code and firmware_vars",
        path.display()
    )]
    Firmware { path: PathBuf },
    #[error("{} is QEMU {found}; {need} or later is needed", path.display())]
    Version { path: PathBuf, found: String, need: &'static str },
    #[error("{} does not have the machine type {machine_type}: set machine_type to one of {offered}", path.display())]
    MachineType { path: PathBuf, machine_type: String, offered: String },
    #[error("KVM was demanded but does not work here: {reason}; set accelerator to \"auto\" or \"tcg\"")]
    Kvm { reason: String },
    #[error("VMs cannot run as the users of vm_uids: {reason}; set vm_uids to \"auto\" or \"off\"")]
    Users { reason: String },
    #[error("QEMU could not be asked what it offers: {detail}")]
    Probe { detail: String },
}

impl From<QemuLack> for DriverError {
    fn from(lack: QemuLack) -> Self {
        DriverError::Lacks(Box::new(lack))
    }
}
