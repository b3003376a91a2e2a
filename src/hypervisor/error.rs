//! Why a hypervisor did not do as it was told.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::types::VmId;
use crate::vm::PowerState;
use crate::vm::hypervisor::Lack;

#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    // Refusals: nothing was tried.
    #[error("VM {vm} is not defined here")]
    UnknownVm { vm: VmId },
    #[error("VM {vm} is {state}: it cannot be {verb}")]
    WrongState { vm: VmId, state: PowerState, verb: &'static str },
    #[error("VM {vm} is {state} in another shape: stop it before it is changed")]
    Differs { vm: VmId, state: PowerState },
    #[error("VM {vm}: the {what} '{asked}' is not offered here; there is {offered}")]
    NotOffered { vm: VmId, what: &'static str, asked: String, offered: String },
    #[error("VM {vm}: {rule}")]
    BadSpec { vm: VmId, rule: String },
    #[error("the console of VM {vm} is in use: close the other session first")]
    ConsoleBusy { vm: VmId },
    #[error("VM {vm}: the path {path:?} is not UTF-8, which the hypervisor needs")]
    PathNotUtf8 { vm: VmId, path: PathBuf },

    // What the host lacks.
    #[error("{tool} was not found: install the package {package}, or set its path in the configuration")]
    MissingTool { tool: &'static str, package: &'static str },
    #[error("network {network}: this host has no bridge {bridge}: make it, or name another in [[network]]")]
    NoBridge { network: String, bridge: String },
    /// Something that only its driver knows.
    #[error(transparent)]
    Lacks(Box<dyn std::error::Error + Send + Sync>),

    // Failures.
    #[error("VM {vm}: cannot {action} {}", path.display())]
    Io {
        vm: VmId,
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot run {}", path.display())]
    Run {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the firmware variables {} of VM {vm} have {found} bytes, this firmware's have {expected}: \
         they were made by another build of the firmware; remove the file to begin with fresh ones",
        path.display()
    )]
    FirmwareVars { vm: VmId, path: PathBuf, found: u64, expected: u64 },
    #[error("a disk of VM {vm} is in use by another process: {detail}")]
    DiskInUse { vm: VmId, detail: String },
    #[error("the hypervisor of VM {vm} ended while starting, {status}: {stderr}")]
    EndedAtStart { vm: VmId, status: String, stderr: String },
    #[error("VM {vm} was not {verb} within {} s; it is still {state}; {next_step}", after.as_secs_f32())]
    Timeout { vm: VmId, verb: &'static str, state: PowerState, after: Duration, next_step: &'static str },
    #[error("the hypervisor of VM {vm} (process {pid}) failed the driver")]
    Control {
        vm: VmId,
        pid: i32,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("where VM {vm} wrote to its disks cannot be told: {reason}; they are read whole instead")]
    Changes { vm: VmId, reason: String },
    #[error("process {pid} answers for VM {vm} but says it is {says}: stop that process by hand")]
    WrongIdentity { vm: VmId, pid: i32, says: String },
    #[error("VM {vm} refused to be {verb}: a fault injected by a test")]
    Injected { vm: VmId, verb: &'static str },
}

impl DriverError {
    pub(super) fn not_offered(vm: VmId, lack: Lack) -> Self {
        DriverError::NotOffered { vm, what: lack.what, asked: lack.asked, offered: lack.offered }
    }
}

/// Names, as the messages above show them.
pub(super) fn list<'a>(names: impl IntoIterator<Item = &'a String>) -> String {
    let names: Vec<&str> = names.into_iter().map(String::as_str).collect();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}
