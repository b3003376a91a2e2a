//! Whether a VM fits into this cloud now: the target's side of a check.

use std::collections::BTreeSet;

use crate::migration::{Denial, DenialCode};
use crate::types::{MemberJid, VmId, VmName};
use crate::vm::spec::Nic;
use crate::vm::{CardModel, DiskBus, VmSpec};

use super::storage::{Needed, Storage};

/// What this cloud has and allows at one instant.
#[derive(Clone, PartialEq, Debug)]
pub struct Room {
    /// Virtual ones that VMs may still have.
    pub cpus_free: u32,
    pub cpus: u32,
    pub memory_bytes_free: u64,
    pub memory_bytes: u64,
    pub storage: Storage,
    pub architecture: String,
    pub cpu_models: Vec<String>,
    pub disk_buses: Vec<DiskBus>,
    pub card_models: Vec<CardModel>,
    /// Names of networks that VMs from this source may be plugged into.
    pub networks: Vec<String>,
    /// Network cards of VMs owned or arriving here.
    pub cards: Vec<(VmId, Nic)>,
    /// Whether VMs from this source are taken.
    pub accepts_source: bool,
    /// VMs owned or arriving here, by id and name.
    pub present: Vec<(VmId, VmName)>,
    /// Unfinished incoming migrations, and how many are allowed at once.
    pub incoming: usize,
    pub incoming_max: usize,
    /// Of those the ones from the same source, and how many of them are allowed.
    pub incoming_from_source: usize,
    pub incoming_from_source_max: usize,
}

/// What stands in the way of `spec` coming from `source`; empty means a plain yes. How the guest would be off
/// otherwise is [`super::hardware::differences`].
pub fn assess(room: &Room, spec: &VmSpec, source: &MemberJid, needed: &Needed) -> Vec<Denial> {
    let mut blockers = Vec::new();
    let mut no = |code, text: String, next: String| blockers.push(Denial::new(code, text).next(next));
    if !room.accepts_source {
        let next = format!("let its operator add {source} to migration.accept_from");
        no(DenialCode::Policy, format!("VMs from {source} are not accepted"), next);
    }
    if room.present.iter().any(|(id, _)| *id == spec.id) {
        no(DenialCode::AlreadyThere, format!("VM {} is already there", spec.id.short()), String::new());
    } else if room.present.iter().any(|(_, name)| *name == spec.name) {
        let next = format!("rename one of the two with 'cicada vm rename {} NEW'", spec.name);
        no(DenialCode::AlreadyThere, format!("another VM named {} is there", spec.name), next);
    }
    if room.incoming >= room.incoming_max {
        let text = format!("{} migrations are arriving already", room.incoming);
        no(DenialCode::Busy, text, "try again when they are done".into());
    } else if room.incoming_from_source >= room.incoming_from_source_max {
        let text = format!("{} migrations from this cloud are arriving already", room.incoming_from_source);
        let next = "try again when they are done, or let its operator raise migration.concurrency_per_member";
        no(DenialCode::Busy, text, next.into());
    }
    if room.architecture != spec.architecture {
        let text = format!("the VM is {}, the hosts are {}", spec.architecture, room.architecture);
        no(DenialCode::Architecture, text, String::new());
    }
    if !room.cpu_models.contains(&spec.cpu_model) {
        let text =
            format!("CPU model {} is not offered (offered: {})", spec.cpu_model, room.cpu_models.join(", "));
        no(DenialCode::CpuModel, text, String::new());
    }
    if !room.disk_buses.contains(&spec.disk_bus) {
        let text =
            format!("disks on {} are not offered (offered: {})", spec.disk_bus, words(&room.disk_buses));
        no(DenialCode::DiskBus, text, String::new());
    }
    for model in models(spec).filter(|model| !room.card_models.contains(model)) {
        let text = format!("network cards {model} are not offered (offered: {})", words(&room.card_models));
        no(DenialCode::CardModel, text, String::new());
    }
    if spec.cpus > room.cpus_free {
        let text =
            format!("needs {} CPUs, {} of {} virtual ones are free", spec.cpus, room.cpus_free, room.cpus);
        no(DenialCode::Cpus, text, "free CPUs there or choose another member".into());
    }
    let memory = crate::types::ByteSize(room.memory_bytes_free);
    if spec.memory > memory {
        let all = crate::types::ByteSize(room.memory_bytes);
        let text = format!("needs {} of memory, {memory} of {all} are free", spec.memory);
        no(DenialCode::Memory, text, "free memory there or choose another member".into());
    }
    if let Some((text, next)) = room.storage.lacks(needed) {
        no(DenialCode::Storage, text, next.into());
    }
    for nic in &spec.nics {
        if !room.networks.contains(&nic.network) {
            let text = format!("there is no network named {}", nic.network);
            let next = format!(
                "let its operator define [[network]] name = \"{}\"; one of kind \"user\" needs passt there, or foreign = true",
                nic.network
            );
            no(DenialCode::Network, text, next);
        }
        let same =
            |(vm, card): &&(VmId, Nic)| *vm != spec.id && card.mac == nic.mac && card.network == nic.network;
        if let Some((vm, _)) = room.cards.iter().find(same) {
            let text = format!(
                "VM {} there has the MAC address {} in the network {} already",
                vm.short(),
                nic.mac,
                nic.network
            );
            no(
                DenialCode::Network,
                text,
                "two of one address hear nothing; move or delete that VM first".into(),
            );
        }
    }
    blockers
}

/// The models of its cards, each once.
fn models(spec: &VmSpec) -> impl Iterator<Item = CardModel> {
    spec.nics.iter().map(|nic| nic.model).collect::<BTreeSet<_>>().into_iter()
}

fn words<T: ToString>(offered: &[T]) -> String {
    offered.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{ByteSize, RecipeId};
    use crate::vm::Mac;

    fn spec() -> VmSpec {
        let id = VmId::random();
        VmSpec {
            id,
            name: "web".parse().unwrap(),
            cpus: 2,
            memory: ByteSize::mib(512),
            recipe: RecipeId::of(b"r"),
            root_size: ByteSize::gib(2),
            user_data_size: ByteSize::mib(64),
            nics: vec![Nic { network: "lan".into(), mac: Mac::derived(id, 0), model: Default::default() }],
            architecture: "amd64".into(),
            cpu_model: "qemu64".into(),
            firmware: crate::vm::Firmware::Uefi,
            disk_bus: Default::default(),
            system_uuid: None,
        }
    }

    fn room() -> Room {
        Room {
            cpus_free: 4,
            cpus: 8,
            memory_bytes_free: 1 << 30,
            memory_bytes: 2 << 30,
            storage: Storage { free_bytes: 10 << 30, overcommit: 1.0, ..Storage::default() },
            architecture: "amd64".into(),
            cpu_models: vec!["qemu64".into()],
            disk_buses: vec![DiskBus::Virtio],
            card_models: vec![CardModel::Virtio],
            cards: vec![],
            networks: vec!["lan".into()],
            accepts_source: true,
            present: vec![],
            incoming: 0,
            incoming_max: 2,
            incoming_from_source: 0,
            incoming_from_source_max: 1,
        }
    }

    #[test]
    fn each_violated_fact_is_named() {
        let source: MemberJid = "a@x".parse().unwrap();
        let vm = spec();
        let needed = Needed::by(&vm, false);
        assert_eq!(assess(&room(), &vm, &source, &needed), []);
        type Spoil = fn(&mut Room, &VmSpec);
        let table: [(DenialCode, Spoil); 13] = [
            (DenialCode::DiskBus, |r, _| r.disk_buses = vec![DiskBus::Sata]),
            (DenialCode::CardModel, |r, _| r.card_models.clear()),
            (DenialCode::Network, |r, s| r.cards.push((VmId::random(), s.nics[0].clone()))),
            (DenialCode::Cpus, |r, _| r.cpus_free = 1),
            (DenialCode::Memory, |r, _| r.memory_bytes_free = 1),
            (DenialCode::Storage, |r, _| r.storage.promised_bytes = 9 << 30),
            (DenialCode::Architecture, |r, _| r.architecture = "arm64".into()),
            (DenialCode::CpuModel, |r, _| r.cpu_models.clear()),
            (DenialCode::Network, |r, _| r.networks.clear()),
            (DenialCode::Policy, |r, _| r.accepts_source = false),
            (DenialCode::AlreadyThere, |r, s| r.present.push((s.id, "other".parse().unwrap()))),
            (DenialCode::Busy, |r, _| r.incoming = 2),
            (DenialCode::Busy, |r, _| r.incoming_from_source = 1),
        ];
        for (code, spoil) in table {
            let mut r = room();
            spoil(&mut r, &vm);
            let codes: Vec<_> = assess(&r, &vm, &source, &needed).iter().map(|d| d.code).collect();
            assert_eq!(codes, [code]);
        }
    }
}
