//! The identity and shape of a VM: everything that stays the same when it moves.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::types::{ByteSize, RecipeId, VmId, VmName};

use super::hardware::{CardModel, DiskBus, Firmware, SystemUuid};

/// A MAC address. As text: six lower-case hex pairs with colons.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// A unicast address with QEMU's prefix `52:54:00`, derived from the VM's id so it is stable.
    pub fn derived(vm: VmId, nic: u8) -> Self {
        let h = crate::types::Hash::of(&[vm.0.as_bytes().as_slice(), &[nic]].concat());
        let b = h.as_bytes();
        Self([0x52, 0x54, 0x00, b[0], b[1], b[2]])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("'{}' is no unicast MAC address such as 52:54:00:12:34:56", s.escape_default());
        let mut out = [0; 6];
        let mut parts = s.split(':');
        for byte in &mut out {
            let part = parts.next().filter(|p| p.len() == 2 && !p.starts_with('+')).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        // QEMU takes all zeros for "choose one".
        if parts.next().is_some() || out[0] & 1 == 1 || out == [0; 6] {
            return Err(bad());
        }
        Ok(Self(out))
    }
}

impl TryFrom<String> for Mac {
    type Error = String;
    fn try_from(s: String) -> Result<Self, String> {
        s.parse()
    }
}

impl From<Mac> for String {
    fn from(m: Mac) -> String {
        m.to_string()
    }
}

/// One network card.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Nic {
    /// The network's name; a target must have one of the same name.
    pub network: String,
    pub mac: Mac,
    /// Left out where it is virtio, which every version of cicada knows.
    #[serde(default, skip_serializing_if = "CardModel::is_default")]
    pub model: CardModel,
}

/// What a VM is, independent of where it runs. Travels with it, unchanged.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct VmSpec {
    pub id: VmId,
    pub name: VmName,
    pub cpus: u32,
    pub memory: ByteSize,
    pub recipe: RecipeId,
    /// Size of the root disk: the recipe's virtual size, or more where it was made larger since.
    pub root_size: ByteSize,
    /// Size of the user-data disk; zero means there is none.
    pub user_data_size: ByteSize,
    pub nics: Vec<Nic>,
    /// Debian architecture name.
    pub architecture: String,
    /// A CPU model every member can give, for example `qemu64`; a baseline, never the host's own.
    pub cpu_model: String,
    /// Left out where it is UEFI, which every version of cicada knows.
    #[serde(default, skip_serializing_if = "Firmware::is_default")]
    pub firmware: Firmware,
    #[serde(default, skip_serializing_if = "DiskBus::is_default")]
    pub disk_bus: DiskBus,
    /// What the guest finds in its firmware's tables; without one it is the VM's id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_uuid: Option<SystemUuid>,
}

/// Bounds of a VM's shape; beyond them a spec is refused wherever it comes from.
pub mod limit {
    pub const CPUS: u32 = 1024;
    pub const MEMORY_BYTES: u64 = 1 << 44;
    pub const MEMORY_BYTES_MIN: u64 = 32 << 20;
    pub const DISK_BYTES: u64 = 1 << 44;
    pub const NICS: usize = 16;
}

impl VmSpec {
    /// Names the first rule the spec breaks.
    pub fn check(&self) -> Result<(), String> {
        let plain = |s: &str| {
            (1..=63).contains(&s.len())
                && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        };
        if !(1..=limit::CPUS).contains(&self.cpus) {
            return Err(format!("{} CPUs: 1 to {} are possible", self.cpus, limit::CPUS));
        }
        if !(limit::MEMORY_BYTES_MIN..=limit::MEMORY_BYTES).contains(&self.memory.0) {
            return Err(format!("memory of {}: 32 MiB to 16 TiB are possible", self.memory));
        }
        for (what, size) in [("root disk", self.root_size), ("user-data disk", self.user_data_size)] {
            if size.0 > limit::DISK_BYTES || size.0 % (1 << 20) != 0 {
                return Err(format!("{what} of {}: a multiple of 1 MiB up to 16 TiB is possible", size.0));
            }
        }
        if self.nics.len() > limit::NICS {
            return Err(format!("{} network cards: at most {} are possible", self.nics.len(), limit::NICS));
        }
        if let Some(n) = self.nics.iter().find(|n| !plain(&n.network)) {
            return Err(format!("'{}' is no network name", n.network.escape_default()));
        }
        let twice = |(i, nic): (usize, &Nic)| self.nics[..i].iter().any(|other| other.mac == nic.mac);
        if let Some((_, nic)) = self.nics.iter().enumerate().find(|card| twice(*card)) {
            return Err(format!("two network cards have the MAC address {}", nic.mac));
        }
        if !plain(&self.architecture) || !plain(&self.cpu_model) {
            return Err("the architecture or CPU model has odd characters".into());
        }
        Ok(())
    }

    /// Whether its guest would find other devices in the hands of a broker that reads no more of a spec than the
    /// first release did.
    pub fn has_chosen_devices(&self) -> bool {
        !self.disk_bus.is_default()
            || self.system_uuid.is_some()
            || self.nics.iter().any(|nic| !nic.model.is_default())
    }

    /// All of it that decides whether a cloud could take the VM, and nothing that tells which VM it is but
    /// its random id: what a check carries to clouds that may never get it.
    pub fn anonymous(&self) -> Self {
        let nics = self.nics.iter().zip(0u8..).map(|(nic, n)| {
            // Only of a made-up VM: a card's address follows from its VM's id.
            Nic { mac: Mac::derived(VmId(uuid::Uuid::nil()), n), ..nic.clone() }
        });
        // Whether it has one is told, not which.
        let system_uuid = self.system_uuid.map(|_| self.id.into());
        Self { name: VmName::unknown(self.id), nics: nics.collect(), system_uuid, ..self.clone() }
    }
}

/// What a VM is doing, as observed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PowerState {
    Stopped,
    Starting,
    Running,
    Paused,
    Stopping,
    /// The hypervisor process ended without being asked to.
    Crashed,
}

impl fmt::Display for PowerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            PowerState::Stopped => "stopped",
            PowerState::Starting => "starting",
            PowerState::Running => "running",
            PowerState::Paused => "paused",
            PowerState::Stopping => "stopping",
            PowerState::Crashed => "crashed",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the first release wrote it: what every VM has is not named, or earlier brokers would read another spec.
    #[test]
    fn a_spec_names_devices_only_where_they_are_chosen() {
        let id = VmId(uuid::Uuid::from_u128(1));
        let first = serde_json::json!({
            "id": id, "name": "web", "cpus": 1, "memory": 1 << 27, "recipe": "0".repeat(64), "root_size": 1 << 20,
            "user_data_size": 0, "nics": [{"network": "lan", "mac": "52:54:00:00:00:01"}], "architecture": "amd64",
            "cpu_model": "qemu64",
        });
        let spec: VmSpec = serde_json::from_value(first.clone()).unwrap();
        assert_eq!((spec.has_chosen_devices(), spec.check()), (false, Ok(())));
        assert_eq!(serde_json::to_value(&spec).unwrap(), first);
        let uuid: SystemUuid = "4c4c4544-0044-4710-8035-b3c04f4d3532".parse().unwrap();
        for chosen in [
            VmSpec { disk_bus: DiskBus::Sata, ..spec.clone() },
            VmSpec { system_uuid: Some(uuid), ..spec.clone() },
            VmSpec { nics: vec![Nic { model: CardModel::E1000, ..spec.nics[0].clone() }], ..spec.clone() },
        ] {
            assert!(chosen.has_chosen_devices() && chosen.anonymous().has_chosen_devices());
            let back: VmSpec = serde_json::from_value(serde_json::to_value(&chosen).unwrap()).unwrap();
            assert_eq!(back, chosen);
            assert!(chosen.anonymous().system_uuid != Some(uuid));
        }
        let twice = VmSpec { nics: vec![spec.nics[0].clone(), spec.nics[0].clone()], ..spec };
        assert!(twice.check().unwrap_err().contains("52:54:00:00:00:01"));
    }

    #[test]
    fn mac_addresses_are_unicast_text() {
        assert_eq!("52:54:00:0a:0b:0c".parse::<Mac>().unwrap().to_string(), "52:54:00:0a:0b:0c");
        for bad in [
            "",
            "52:54:00:0a:0b",
            "53:54:00:0a:0b:0c",
            "52:54:00:0a:0b:0c:0d",
            "zz:54:00:0a:0b:0c",
            "5:254:0:0:0:0",
            "+2:54:00:0a:0b:0c",
            "00:00:00:00:00:00",
            "ff:ff:ff:ff:ff:ff",
            "01:00:5e:00:00:01",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }
}
