//! What is asked about VMs and told of them.

use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::migration::records::{Autostart, Shape};
use crate::types::{ByteSize, ImageDigest, MemberJid, MigrationId, RecipeId, VmId, VmName};
use crate::vm::spec::Nic;
use crate::vm::{CardModel, DiskBus, Firmware, Hardware, Mac, PowerState, SystemUuid};

use super::kinds::VmOwnership;
use super::problem::Problem;
use super::request::{FileUse, requests};

requests! {
    /// What whoever has VMs here asks: to make, run, change and remove them.
    VmRequest {
        "vm-create" => Create(VmCreate),
        /// Makes a VM of an existing disk. Ends without trace when its caller goes away.
        "vm-adopt" => Adopt(VmAdopt),
        /// Writes the whole disk of a stopped VM to `output`, a path on the broker's machine where nothing is yet.
        "vm-export" => Export {
            vm: String,
            output: String,
            format: String,
            user_data: bool,
        },
        "vm-list" => List,
        "vm-show" => Show {
            vm: String,
        },
        "vm-start" => Start {
            vm: String,
            /// Start it although members that may know more of its owner did not say.
            #[serde(default)]
            unconfirmed: bool,
            /// Filled in by the API.
            #[serde(default)]
            by_uid: Option<u32>,
        },
        "vm-stop" => Stop {
            vm: String,
            /// Switched off without asking the guest; for the host's sake, once `timeout_s` is over.
            force: bool,
            /// What its guest gets to shut down; its own setting, or the cloud's, if not given.
            #[serde(default)]
            timeout_s: Option<u64>,
            /// The host goes down: the VM is started again with the broker.
            #[serde(default)]
            for_host: bool,
        },
        /// Stops it as `vm-stop` does, and starts it again.
        "vm-reboot" => Reboot {
            vm: String,
            force: bool,
            #[serde(default)]
            timeout_s: Option<u64>,
        },
        "vm-set" => Set(VmSet),
        /// Makes disks of a stopped VM larger.
        "vm-resize" => Resize {
            vm: String,
            #[serde(default)]
            root_size: Option<ByteSize>,
            #[serde(default)]
            user_data_size: Option<ByteSize>,
        },
        /// Scrubs a stopped VM, or the copy that one left here which was handed over.
        "vm-delete" => Delete {
            vm: String,
            /// What the asker takes it for; refused if it is the other.
            #[serde(default)]
            taken_for: Option<Deleted>,
        },
    }
}

impl VmRequest {
    pub(super) fn files(&self) -> Vec<(&str, FileUse)> {
        match self {
            Self::Adopt(adopt) => {
                let more = [&adopt.user_data, &adopt.nvram].into_iter().flatten();
                std::iter::once(&adopt.disk).chain(more).map(|path| (path.as_str(), FileUse::Read)).collect()
            }
            Self::Export { output, .. } => vec![(output, FileUse::Write)],
            Self::Create(_)
            | Self::List
            | Self::Show { .. }
            | Self::Start { .. }
            | Self::Stop { .. }
            | Self::Reboot { .. }
            | Self::Set(_)
            | Self::Resize { .. }
            | Self::Delete { .. } => Vec::new(),
        }
    }

    pub(super) fn asked_by(&mut self, uid: Option<u32>) {
        if let Self::Start { by_uid, .. } = self {
            *by_uid = uid;
        }
    }
}

/// A new VM. With a user-data size of zero it has no second disk.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmCreate {
    pub name: VmName,
    pub components: Vec<String>,
    pub ordered: bool,
    pub root_size: ByteSize,
    pub user_data_size: ByteSize,
    pub memory: ByteSize,
    pub cpus: u32,
    pub networks: Vec<String>,
    pub kernel_command_line: String,
    pub start: bool,
    #[serde(default)]
    pub hardware: Box<Hardware>,
}

/// What shall be another of a VM; what is not given stays.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSet {
    pub vm: String,
    #[serde(default)]
    pub name: Option<VmName>,
    /// CPUs and memory of a VM that runs are another from its next start on.
    #[serde(default)]
    pub cpus: Option<u32>,
    #[serde(default)]
    pub memory: Option<ByteSize>,
    /// One line; empty for none.
    #[serde(default)]
    pub description: Option<String>,
    #[serde(default)]
    pub autostart: Option<Autostart>,
    /// Zero for the cloud's own.
    #[serde(default)]
    pub stop_timeout_s: Option<u32>,
}

/// A VM to be made of disks on the broker's machine.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmAdopt {
    pub name: VmName,
    /// Absolute paths.
    pub disk: String,
    pub user_data: Option<String>,
    /// Of both disks: `auto`, or a format that `compose` writes.
    pub format: String,
    /// Debian architecture name.
    pub architecture: String,
    pub firmware: Firmware,
    pub memory: ByteSize,
    pub cpus: u32,
    pub networks: Vec<String>,
    /// What is not known becomes part of a component that others can use, instead of the root delta.
    pub share: bool,
    /// Only tell what would be known.
    pub dry_run: bool,
    pub start: bool,
    /// What the guest knew of its old machine, as far as its operator says it: no disk has it.
    #[serde(default)]
    pub hardware: Box<Hardware>,
    /// Absolute path of a file with the variables of the old machine's UEFI firmware.
    #[serde(default)]
    pub nvram: Option<String>,
}

/// What of an existing disk was known.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct AdoptedView {
    #[serde(rename = "vm", alias = "name")]
    pub name: VmName,
    pub format: String,
    /// Size of the disk as it was given, and as it is a VM's: a multiple of 1 MiB.
    pub disk_bytes: u64,
    pub size_bytes: u64,
    /// The image digest of the disk.
    pub digest: ImageDigest,
    /// Bytes found in packs, bytes that are nowhere, and zeros; in blocks of 4 KiB.
    pub known_bytes: u64,
    pub residue_bytes: u64,
    pub zero_bytes: u64,
    pub extents: u64,
    pub packs: u64,
    /// Packs held that were too many to be looked into.
    pub packs_left_out: u64,
    pub known_from: Vec<KnownFromView>,
    pub elapsed_ms: u64,
    /// What the disk is and how it boots, in words.
    #[serde(default)]
    pub what: String,
    #[serde(default)]
    pub boots: String,
    /// Where that differs from what was asked for, and what stays behind.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Component of the base and the VM as it was made; not there after a dry run.
    pub component: Option<String>,
    #[serde(rename = "made")]
    pub vm: Option<Box<VmView>>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct KnownFromView {
    /// `name@version`.
    pub component: String,
    pub packs: u64,
    #[serde(rename = "known_bytes", alias = "bytes")]
    pub bytes: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ExportedView {
    pub output: String,
    pub format: String,
    /// Size of the disk.
    pub size_bytes: u64,
    pub elapsed_ms: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct VmView {
    pub id: VmId,
    pub name: VmName,
    pub power: PowerState,
    pub ownership: VmOwnership,
    /// Where it went, when it was given up.
    pub owner: Option<MemberJid>,
    pub epoch: u64,
    /// When its record was made in this cloud.
    #[serde(default, with = "crate::clock::rfc3339")]
    pub created: UnixMillis,
    pub cpus: u32,
    #[serde(rename = "memory_bytes", alias = "memory")]
    pub memory: ByteSize,
    #[serde(rename = "root_size_bytes", alias = "root_size")]
    pub root_size: ByteSize,
    #[serde(rename = "user_data_size_bytes", alias = "user_data_size")]
    pub user_data_size: ByteSize,
    pub nics: Vec<NicView>,
    pub recipe: RecipeId,
    pub components: Vec<String>,
    /// Bytes of the root delta and user data that are really allocated on disk.
    pub root_delta_bytes: u64,
    pub user_data_bytes: u64,
    pub console_socket: String,
    pub console_log: String,
    /// The migration that holds it now.
    pub migration: Option<MigrationId>,
    /// What an operator must know before touching it: in doubt, contested, damaged.
    #[serde(default)]
    pub problem: Option<Problem>,
    #[serde(default)]
    pub description: String,
    #[serde(default)]
    pub autostart: Autostart,
    /// Its own; the cloud's `migration.stop_timeout_s` holds without one.
    #[serde(default)]
    pub stop_timeout_s: Option<u32>,
    /// The CPUs and memory it runs with, where others hold from its next start on.
    #[serde(default)]
    pub runs_as: Option<Shape>,
    pub architecture: String,
    pub cpu_model: String,
    pub firmware: Firmware,
    pub disk_bus: DiskBus,
    /// The UUID its guest finds in the firmware's tables.
    pub system_uuid: SystemUuid,
}

/// A network card of a VM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NicView {
    pub network: String,
    pub mac: Mac,
    #[serde(default)]
    pub model: CardModel,
}

impl From<&Nic> for NicView {
    fn from(nic: &Nic) -> Self {
        Self { network: nic.network.clone(), mac: nic.mac, model: nic.model }
    }
}

/// What `vm delete` destroys.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Deleted {
    /// The VM itself: its disks are here and nowhere else.
    Vm,
    /// The copy that it left here when it was handed over.
    KeptCopy,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DeletedView {
    #[serde(rename = "vm_id", alias = "id")]
    pub id: VmId,
    #[serde(rename = "vm", alias = "name")]
    pub name: VmName,
    pub what: Deleted,
    /// Who has the VM, if only a copy was here.
    pub owner: Option<MemberJid>,
    /// Bytes that were allocated.
    pub root_delta_bytes: u64,
    pub user_data_bytes: u64,
}
