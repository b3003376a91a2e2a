//! How a guest would be off at a member, against how it is here: the hardware it sees and what its networks are,
//! as members say in the room. Pure.

use std::collections::BTreeSet;

use crate::migration::message::CheckAnswer;
use crate::migration::{Denial, DenialCode};
use crate::types::PeerText;
use crate::vm::{Firmware, VmSpec};

/// What decides which hardware a guest sees, as presence names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trait {
    Accelerator,
    /// Versioned machine type.
    Machine,
    /// Digest of the firmware's code and of its fresh variables.
    Firmware,
}

impl Trait {
    /// All of them.
    pub const ALL: [Trait; 3] = [Trait::Accelerator, Trait::Machine, Trait::Firmware];

    /// What stands before its value in a list of features.
    pub fn prefix(self) -> &'static str {
        match self {
            Trait::Accelerator => "accelerator:",
            Trait::Machine => "machine:",
            Trait::Firmware => "firmware:",
        }
    }
}

/// What stands before the kind of a network in a list of features: `network-kind:lan=bridge`.
const NETWORK_KIND: &str = "network-kind:";

/// The feature that says of what kind a network is.
pub fn network_kind(name: &str, kind: &str) -> String {
    format!("{NETWORK_KIND}{name}={kind}")
}

/// How `spec`'s guest would be off at a member that tells `there`, if here it is `here`. Who does not say, as
/// an earlier release, is not told of.
pub fn differences(spec: &VmSpec, here: &[String], there: &[PeerText]) -> Vec<Denial> {
    let counts = |t: &Trait| *t != Trait::Firmware || spec.firmware == Firmware::Uefi;
    let difference = |t: Trait| {
        let ours = here.iter().find_map(|f| f.strip_prefix(t.prefix()))?;
        let theirs = there.iter().find_map(|f| f.as_str().strip_prefix(t.prefix()))?;
        (ours != theirs).then(|| described(t, ours, theirs))
    };
    let networks: BTreeSet<&str> = spec.nics.iter().map(|nic| nic.network.as_str()).collect();
    let of_network = |name: &str| {
        let kind =
            |f: &str| f.strip_prefix(NETWORK_KIND)?.strip_prefix(name)?.strip_prefix('=').map(str::to_owned);
        let ours = here.iter().find_map(|f| kind(f))?;
        let theirs = there.iter().find_map(|f| kind(f.as_str()))?;
        (ours != theirs).then(|| {
            let text = format!("the network {name} is of kind {theirs} there, here {ours}");
            Denial::new(DenialCode::NetworkKind, text)
                .next("behind kind \"user\" nobody reaches the guest: set the same kind in [[network]] at both ends")
        })
    };
    let hardware = Trait::ALL.into_iter().filter(counts).filter_map(difference);
    hardware.chain(networks.into_iter().filter_map(of_network)).collect()
}

/// Why a member that answered a check like this does not get the VM: of a release that reads nothing of the devices
/// that were chosen for it, it would run the guest with others.
pub fn unread(spec: &VmSpec, answer: &CheckAnswer) -> Option<Denial> {
    let text = "its release knows nothing of disk buses, models of network cards and UUIDs in firmware: the guest \
                would find others than were chosen";
    let denial = Denial::new(DenialCode::Unsupported, text).next("let its operator upgrade cicada there");
    (spec.has_chosen_devices() && !answer.reads_devices).then_some(denial)
}

fn described(t: Trait, ours: &str, theirs: &str) -> Denial {
    match t {
        Trait::Accelerator => {
            Denial::new(DenialCode::Accelerator, format!("it runs VMs by {theirs}, this cloud by {ours}"))
        }
        Trait::Machine => Denial::new(
            DenialCode::Machine,
            format!("the guest sees other hardware there: machine type {theirs}, here {ours}"),
        )
        .next("set hypervisor.machine_type to one that both have"),
        Trait::Firmware => Denial::new(
            DenialCode::Firmware,
            format!("UEFI firmware of another build: {theirs}, here {ours}"),
        )
        .next("the same package of the firmware at both ends makes them equal"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        serde_json::from_value(serde_json::json!({
            "id": uuid::Uuid::nil(), "name": "web", "cpus": 1, "memory": 1 << 27, "recipe": "0".repeat(64),
            "root_size": 0, "user_data_size": 0, "nics": [], "architecture": "amd64", "cpu_model": "qemu64",
            "firmware": "uefi",
        }))
        .unwrap()
    }

    #[test]
    fn a_member_that_does_not_read_of_devices_gets_no_vm_with_chosen_ones() {
        let mut said = serde_json::json!({
            "differences": [], "blockers": [], "components_lacking": [], "packs_lacking": [], "seed": null,
        });
        let earlier: CheckAnswer = serde_json::from_value(said.clone()).unwrap();
        said["reads_devices"] = true.into();
        let today: CheckAnswer = serde_json::from_value(said).unwrap();
        let plain = spec();
        let chosen = VmSpec { disk_bus: crate::vm::DiskBus::Sata, ..spec() };
        assert_eq!((unread(&plain, &earlier), unread(&chosen, &today)), (None, None));
        assert_eq!(unread(&chosen, &earlier).map(|d| d.code), Some(DenialCode::Unsupported));
    }

    #[test]
    fn other_hardware_is_a_difference_and_silence_is_none() {
        let spec = spec();
        let here = ["accelerator:kvm", "machine:pc-q35-7.2", "firmware:aa", "driver:qemu"].map(String::from);
        let codes = |spec: &VmSpec, there: &[&str]| {
            let there: Vec<PeerText> = there.iter().map(|f| (*f).into()).collect();
            differences(spec, &here, &there).iter().map(|d| d.code).collect::<Vec<_>>()
        };
        assert_eq!(codes(&spec, &["accelerator:kvm", "machine:pc-q35-7.2", "firmware:aa"]), []);
        assert_eq!(codes(&spec, &["network:lan"]), [], "an earlier release does not say");
        let other = ["accelerator:tcg", "machine:pc-q35-10.0", "firmware:bb"];
        let all = [DenialCode::Accelerator, DenialCode::Machine, DenialCode::Firmware];
        assert_eq!(codes(&spec, &other), all);
        let mut plugged = spec.clone();
        let card = |network: &str| crate::vm::spec::Nic {
            network: network.into(),
            mac: crate::vm::Mac::derived(spec.id, 0),
            model: Default::default(),
        };
        plugged.nics = ["lan", "wan"].map(card).into();
        let here = [network_kind("lan", "bridge"), network_kind("wan", "user")];
        let told = |there: &[&str]| {
            let there: Vec<PeerText> = there.iter().map(|f| (*f).into()).collect();
            differences(&plugged, &here, &there).iter().map(|d| d.text.to_string()).collect::<Vec<_>>()
        };
        assert!(told(&["network-kind:lan=bridge", "network-kind:wan=user"]).is_empty());
        assert!(told(&["network:lan", "network-kind:dmz=none"]).is_empty(), "of others nothing is said");
        let said = told(&["network-kind:lan=user", "network-kind:wan=user"]);
        assert_eq!(said, ["the network lan is of kind user there, here bridge"]);
        let bios = VmSpec { firmware: Firmware::Bios, ..spec };
        assert_eq!(codes(&bios, &other), all[..2], "its firmware is QEMU's own");
    }
}
