//! What an operator can set about QEMU.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::types::ByteSize;

/// The hardware every VM sees. Versioned, so that a guest finds the same machine in every cloud
/// and under every later QEMU; this one exists from QEMU 7.2 on.
pub const MACHINE_TYPE: &str = "pc-q35-7.2";

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QemuConfig {
    /// `qemu-system-x86_64`; searched for in PATH if not set.
    pub system: Option<PathBuf>,
    /// `qemu-img`; searched for in PATH if not set.
    pub img: Option<PathBuf>,
    pub accelerator: AcceleratorChoice,
    /// A versioned q35 machine type. All members that exchange VMs need the same.
    pub machine_type: String,
    /// UEFI firmware code and the template of its variables, of one and the same build.
    pub firmware_code: PathBuf,
    pub firmware_vars: PathBuf,
    /// The networks VMs can be plugged into, by name.
    pub networks: BTreeMap<String, NetworkBackend>,
    /// `passt`, which connects cards of user networks to the outside; searched for in PATH if not set.
    pub passt: Option<PathBuf>,
    /// The program whose `guest-link` command stands between such a card and passt; the running one
    /// if not set.
    pub link: Option<PathBuf>,
    /// `qemu-bridge-helper`, which plugs VMs into bridges without the broker being root.
    pub bridge_helper: PathBuf,
    /// The users that VMs run as.
    pub vm_uids: VmUids,
    /// A console log that grows beyond this is cut; the part before is kept once.
    pub console_log_max: ByteSize,
}

impl Default for QemuConfig {
    /// Debian's paths and one network `default` that reaches outside without any privilege.
    fn default() -> Self {
        Self {
            system: None,
            img: None,
            accelerator: AcceleratorChoice::Auto,
            machine_type: MACHINE_TYPE.into(),
            firmware_code: "/usr/share/OVMF/OVMF_CODE_4M.fd".into(),
            firmware_vars: "/usr/share/OVMF/OVMF_VARS_4M.fd".into(),
            networks: [("default".to_owned(), NetworkBackend::User)].into(),
            passt: None,
            link: None,
            bridge_helper: "/usr/lib/qemu/qemu-bridge-helper".into(),
            vm_uids: VmUids::Auto,
            console_log_max: ByteSize::mib(16),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmUids {
    /// Each VM as a user of its own where this host allows it, else as the broker's.
    #[default]
    Auto,
    /// As the broker's user.
    Off,
    /// Each as one of these, or no driver at all.
    Range { first: u32, last: u32 },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AcceleratorChoice {
    /// KVM where a probe guest runs under it, else software emulation.
    #[default]
    Auto,
    /// KVM or no driver at all.
    Kvm,
    /// Software emulation.
    Tcg,
}

/// How a network of this host is reached. In TOML: `"user"`, `"none"` or `{ bridge = "br0" }`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkBackend {
    /// Address translation, outgoing connections only: by passt where there is one, and then not to
    /// this host; else inside QEMU (slirp), which reaches this host's own services.
    User,
    /// A bridge of this host. The bridge helper must allow it in `/etc/qemu/bridge.conf`.
    Bridge(String),
    /// A card without a cable.
    None,
}
