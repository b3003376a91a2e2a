//! What an operator may choose of the hardware a guest finds, beside CPUs and memory. Part of what travels: a
//! system that came from another machine starts by the devices it knows.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::spec::{Mac, Nic};
use crate::types::{VmId, kinds};

/// A kind of hardware that an operator may choose: read by its word, and left out where it is the default.
macro_rules! choices {
    ($($name:ident, $what:literal, $default:ident;)+) => {$(
        impl $name {
            pub(super) fn is_default(&self) -> bool {
                *self == Self::default()
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::$default
            }
        }

        impl FromStr for $name {
            type Err = String;
            fn from_str(s: &str) -> Result<Self, String> {
                Self::ALL.iter().copied().find(|one| one.as_str() == s).ok_or_else(|| {
                    format!("'{}' is no {}: {}", s.escape_default(), $what, Self::WORDS.join(", "))
                })
            }
        }
    )+};
}

kinds! {
    /// What starts a VM's operating system.
    Firmware {
        /// What disks composed of components need.
        Uefi = "uefi",
        /// For adopted disks that have a boot sector only.
        Bios = "bios",
    }

    /// What a VM's disks are attached to.
    DiskBus {
        /// A PCI device for each disk, paravirtual.
        Virtio = "virtio",
        /// A paravirtual SCSI controller.
        Scsi = "scsi",
        /// The AHCI controller of the machine itself; what a PC of the last twenty years had.
        Sata = "sata",
        /// An NVMe controller for each disk.
        Nvme = "nvme",
    }

    /// A model of network card.
    CardModel {
        /// Paravirtual.
        Virtio = "virtio",
        /// Intel 82574L.
        E1000e = "e1000e",
        /// Intel 82540EM, of older guests.
        E1000 = "e1000",
        /// Realtek 8139, of very old guests.
        Rtl8139 = "rtl8139",
        /// The paravirtual card of VMware.
        Vmxnet3 = "vmxnet3",
    }
}

choices! {
    Firmware, "firmware", Uefi;
    DiskBus, "disk bus", Virtio;
    CardModel, "network card", Virtio;
}

/// The UUID that a guest finds in its firmware's tables (SMBIOS, "system information"). Licences and the ids of
/// systems hang on it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "Uuid", into = "Uuid")]
pub struct SystemUuid(Uuid);

impl TryFrom<Uuid> for SystemUuid {
    type Error = String;
    fn try_from(uuid: Uuid) -> Result<Self, String> {
        // SMBIOS: all zeros and all ones say that there is none.
        match uuid.is_nil() || uuid.is_max() {
            true => Err(format!("{uuid} stands for no UUID")),
            false => Ok(Self(uuid)),
        }
    }
}

impl From<SystemUuid> for Uuid {
    fn from(uuid: SystemUuid) -> Uuid {
        uuid.0
    }
}

impl From<VmId> for SystemUuid {
    fn from(vm: VmId) -> Self {
        Self(vm.0)
    }
}

impl FromStr for SystemUuid {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let bad = |_| format!("'{}' is no UUID", s.escape_default());
        Uuid::parse_str(s).map_err(bad)?.try_into()
    }
}

impl fmt::Display for SystemUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What an operator says of a new VM's hardware; what is not said is as for every VM.
#[derive(Clone, PartialEq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hardware {
    /// Of the networks' cards, in their order.
    #[serde(default)]
    pub macs: Vec<Mac>,
    #[serde(default)]
    pub card_models: Vec<CardModel>,
    #[serde(default)]
    pub disk_bus: DiskBus,
    #[serde(default)]
    pub system_uuid: Option<SystemUuid>,
    #[serde(default)]
    pub cpu_model: Option<String>,
}

impl Hardware {
    /// The cards of VM `id` on `networks`. One model is that of all cards.
    pub fn nics(&self, id: VmId, networks: &[String]) -> Vec<Nic> {
        let model = |i: usize| match self.card_models[..] {
            [all] => all,
            _ => self.card_models.get(i).copied().unwrap_or_default(),
        };
        let mac = |i: usize, n: u8| self.macs.get(i).copied().unwrap_or_else(|| Mac::derived(id, n));
        let numbered = networks.iter().enumerate().zip(0u8..);
        numbered.map(|((i, n), nic)| Nic { network: n.clone(), mac: mac(i, nic), model: model(i) }).collect()
    }

    /// What of it names cards that are not there.
    pub fn surplus(&self, networks: &[String]) -> Option<&'static str> {
        match networks.len() {
            n if self.macs.len() > n => Some("MAC addresses"),
            n if self.card_models.len() > n => Some("models of cards"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_the_same_everywhere() {
        fn check<T: Serialize + fmt::Display + FromStr<Err = String> + PartialEq + fmt::Debug>(all: &[T]) {
            for one in all {
                assert_eq!(serde_json::to_value(one).unwrap(), one.to_string());
                assert_eq!(one.to_string().parse::<T>().as_ref(), Ok(one));
            }
        }
        check(Firmware::ALL);
        check(DiskBus::ALL);
        check(CardModel::ALL);
        let said = "ide".parse::<DiskBus>().unwrap_err();
        assert_eq!(said, "'ide' is no disk bus: virtio, scsi, sata, nvme");
    }

    #[test]
    fn one_model_is_that_of_all_cards() {
        let networks = ["a".to_owned(), "b".to_owned()];
        let id = VmId(Uuid::from_u128(1));
        let models = |card_models: &[CardModel]| {
            let hardware = Hardware { card_models: card_models.to_vec(), ..Hardware::default() };
            hardware.nics(id, &networks).iter().map(|nic| nic.model).collect::<Vec<_>>()
        };
        assert_eq!(models(&[]), [CardModel::Virtio; 2]);
        assert_eq!(models(&[CardModel::E1000e]), [CardModel::E1000e; 2]);
        assert_eq!(models(&[CardModel::E1000, CardModel::Vmxnet3]), [CardModel::E1000, CardModel::Vmxnet3]);
    }

    #[test]
    fn a_uuid_that_stands_for_none_is_none() {
        for bad in ["00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff", "x", ""] {
            assert!(bad.parse::<SystemUuid>().is_err(), "{bad}");
            assert!(serde_json::from_value::<SystemUuid>(bad.into()).is_err(), "{bad}");
        }
    }
}
