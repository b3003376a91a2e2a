//! What a hypervisor offers, how it is told to stop a VM, and what happens to VMs on it: the words that the
//! drivers and the broker share.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::hardware::{CardModel, DiskBus};
use super::spec::VmSpec;
use crate::types::VmId;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    Qcow2,
    Raw,
}

impl DiskFormat {
    pub fn name(self) -> &'static str {
        match self {
            DiskFormat::Qcow2 => "qcow2",
            DiskFormat::Raw => "raw",
        }
    }
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    Kvm,
    /// QEMU's software emulation.
    Tcg,
    /// Nothing: the fake driver.
    Simulated,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
            Accelerator::Simulated => "simulated",
        })
    }
}

/// Something not every driver can do; a driver lists only what it can do now.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ability {
    Pause,
    Console,
    Suspend,
    Snapshot,
    SetCpus,
    SetMemory,
    AttachDisk,
    /// [`Driver::track_changes`] and [`Driver::end_tracking`].
    TrackChanges,
    LivePreCopy,
    LivePostCopy,
}

/// What a driver offers on this host. Constant for the driver's life.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Features {
    pub driver: String,
    /// Version of the hypervisor itself.
    pub version: String,
    pub accelerator: Accelerator,
    /// Versioned machine type: what hardware the guest sees.
    pub machine_type: String,
    /// Short digest of the UEFI firmware that guests get: its code, and its variables as they are fresh.
    pub firmware: String,
    /// Debian architecture names.
    pub architectures: BTreeSet<String>,
    /// CPU models every feature of which a guest gets here.
    pub cpu_models: BTreeSet<String>,
    pub disk_buses: BTreeSet<DiskBus>,
    pub card_models: BTreeSet<CardModel>,
    pub root_formats: BTreeSet<DiskFormat>,
    /// Names of the networks a VM can be plugged into.
    pub networks: BTreeSet<String>,
    /// Those of them whose guests reach this host's own services, its loopback included.
    pub exposing_networks: BTreeSet<String>,
    /// Whether each VM runs as a user of its own, not as the broker's.
    pub own_users: bool,
    pub abilities: BTreeSet<Ability>,
}

/// Something that is asked for and not offered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lack {
    /// For example `CPU model`.
    pub what: &'static str,
    pub asked: String,
    /// What could be had instead, separated by commas.
    pub offered: String,
}

impl Lack {
    /// Whether `asked` is not among `offered`.
    pub fn of<T: Ord + ToString>(what: &'static str, asked: &T, offered: &BTreeSet<T>) -> Option<Self> {
        let words = || offered.iter().map(T::to_string).collect::<Vec<_>>().join(", ");
        let none = |words: String| if words.is_empty() { "none".into() } else { words };
        (!offered.contains(asked)).then(|| Self { what, asked: asked.to_string(), offered: none(words()) })
    }
}

impl Features {
    /// What of a VM's hardware is not to be had here, its networks apart.
    pub fn lacks(&self, spec: &VmSpec) -> Option<Lack> {
        let mut cards = spec.nics.iter();
        Lack::of("architecture", &spec.architecture, &self.architectures)
            .or_else(|| Lack::of("CPU model", &spec.cpu_model, &self.cpu_models))
            .or_else(|| Lack::of("disk bus", &spec.disk_bus, &self.disk_buses))
            .or_else(|| cards.find_map(|nic| Lack::of("network card", &nic.model, &self.card_models)))
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopMode {
    /// Press the power button and wait. When `timeout` has passed the VM is stopped by force if
    /// `escalate` is set; else it goes on running and the verb fails with a timeout.
    Graceful { timeout: Duration, escalate: bool },
    /// As pulling the plug, except that what the guest has written is kept.
    Forced,
}

/// Why a VM stopped without having crashed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StopReason {
    /// The guest switched itself off, by its own will or because the power button was pressed.
    Guest,
    /// [`StopMode::Forced`], or a graceful stop that escalated.
    Forced,
    /// The hypervisor was told to end by a signal, as a rule because the host is shutting down; or
    /// by a driver that took it over and found that its guest had ended while nobody watched.
    Host,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DriverEvent {
    pub vm: VmId,
    pub kind: EventKind,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    Started,
    Paused,
    Resumed,
    /// The guest rebooted itself.
    Rebooted,
    Stopped {
        reason: StopReason,
    },
    /// The hypervisor process ended unasked; `detail` has its exit status and last words.
    Crashed {
        detail: String,
    },
    /// A disk of the VM failed; `paused` when the VM waits for the operator, as on a full disk.
    DiskError {
        device: String,
        reason: String,
        paused: bool,
    },
}
