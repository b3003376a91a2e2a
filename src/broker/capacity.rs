//! What this cloud has, what of it is taken or promised, and so what it could take.

use crate::config::Network;
use crate::federation::{MemberPolicy, Used};
use crate::interface::Resource;
use crate::placement::storage::promised;
use crate::placement::{Needed, Room, Storage};
use crate::types::{MemberJid, VmId, VmName};
use crate::vm::PowerState;
use crate::vm::spec::Nic;

use super::Broker;
use super::effect::DisksOf;
use super::incoming::Incoming;

impl Broker {
    /// What this cloud could take now. `except` leaves out a VM's own share, and the reservation
    /// of an earlier migration of it, whose place one from the same source takes.
    pub(super) fn room(&self, source: &MemberJid, except: Option<VmId>) -> Room {
        let counts =
            |r: &&Incoming| r.is_unfinished() && !except.is_some_and(|vm| r.gives_way_to(vm, source));
        let (cpus, memory) = self.resources(except);
        let features = &self.features;
        let from_source = |r: &&Incoming| counts(r) && r.comes_from(source);
        let migration = &self.config.migration;
        Room {
            cpus_free: cpus.free as u32,
            cpus: cpus.total as u32,
            memory_bytes_free: memory.free,
            memory_bytes: memory.total,
            storage: self.storage(except),
            architecture: features.architectures.iter().next().cloned().unwrap_or_default(),
            cpu_models: features.cpu_models.iter().cloned().collect(),
            disk_buses: features.disk_buses.iter().copied().collect(),
            card_models: features.card_models.iter().copied().collect(),
            cards: self.cards(counts),
            networks: self.networks_for(source),
            accepts_source: self.policy_of(source).accept_vms,
            present: self
                .vms
                .values()
                .filter(|vm| vm.record.is_here())
                .map(|vm| (vm.record.spec.id, vm.record.spec.name.clone()))
                .chain(self.aside.keys().map(|vm| (*vm, VmName::unknown(*vm))))
                .chain(self.incoming.values().filter(counts).map(|r| (r.spec().id, r.spec().name.clone())))
                .collect(),
            incoming: self.incoming.values().filter(counts).count(),
            incoming_max: migration.concurrency,
            incoming_from_source: self.incoming.values().filter(from_source).count(),
            incoming_from_source_max: migration.concurrency_per_member,
        }
    }

    /// Network cards of VMs that are here, and of those of arrivals that `counts`.
    fn cards(&self, counts: impl Fn(&&Incoming) -> bool) -> Vec<(VmId, Nic)> {
        let here = self.vms.values().filter(|vm| vm.record.is_here()).map(|vm| &vm.record.spec);
        let arriving = self.incoming.values().filter(|run| counts(run)).map(Incoming::spec);
        let all = here.chain(arriving);
        all.flat_map(|spec| spec.nics.iter().map(|nic| (spec.id, nic.clone()))).collect()
    }

    /// Virtual CPUs and bytes of memory that VMs may have here, with what is free.
    pub(super) fn resources(&self, except: Option<VmId>) -> (Resource, Resource) {
        let config = &self.config.hypervisor;
        let running = self.vms.iter().filter(|(id, vm)| {
            Some(**id) != except && vm.record.is_here() && (vm.record.run || vm.power == PowerState::Running)
        });
        let used = running.map(|(_, vm)| {
            let takes = vm.record.takes();
            (takes.cpus, takes.memory.0)
        });
        let reserved = self.incoming.values().filter(|r| Some(r.spec().id) != except).map(Incoming::reserved);
        let (cpus, memory) = used
            .chain(reserved)
            .fold((0u64, 0u64), |(c, m), (cpus, memory)| (c + u64::from(cpus), m.saturating_add(memory)));
        let resource = |total: u64, used: u64| Resource { total, free: total.saturating_sub(used) };
        let virtual_cpus = (f64::from(config.cpus) * config.cpu_overcommit) as u64;
        (resource(virtual_cpus, cpus), resource(config.memory.0, memory))
    }

    /// Networks a VM of `source` may be plugged into: another cloud's guests reach services of this
    /// host only where the operator lets them.
    fn networks_for(&self, source: &MemberJid) -> Vec<String> {
        let exposing = &self.features.exposing_networks;
        let may = |n: &&Network| *source == self.me || n.foreign || !exposing.contains(&n.name);
        self.config.networks.iter().filter(may).map(|n| n.name.clone()).collect()
    }

    /// The storage for VMs, with what is promised. `except` leaves out a VM's own share.
    pub(super) fn storage(&self, except: Option<VmId>) -> Storage {
        let h = &self.config.hypervisor;
        let mut storage = Storage {
            floor_bytes: h.storage_floor.0,
            overcommit: h.storage_overcommit,
            ..Storage::default()
        };
        storage.free_bytes = self.measured.free_bytes;
        let taken = |vm: &VmId| {
            let disks = self.measured.disks.get(vm).copied().unwrap_or_default();
            disks.root_bytes.saturating_add(disks.user_data_bytes)
        };
        let here = self.vms.values().filter(|vm| vm.record.is_here()).map(|vm| &vm.record.spec);
        for spec in here.filter(|spec| Some(spec.id) != except) {
            storage.allocated_bytes = storage.allocated_bytes.saturating_add(taken(&spec.id));
            storage.promised_bytes = storage.promised_bytes.saturating_add(promised(spec));
        }
        for run in self.arriving().filter(|run| Some(run.spec().id) != except) {
            let (spec, there) = (run.spec(), taken(&run.spec().id));
            let composed = self.measured.composed.contains(&spec.recipe);
            let to_come = Needed::by(spec, composed).at_once_bytes.saturating_sub(there);
            storage.allocated_bytes = storage.allocated_bytes.saturating_add(there);
            storage.promised_bytes = storage.promised_bytes.saturating_add(promised(spec));
            storage.arriving_bytes = storage.arriving_bytes.saturating_add(to_come);
        }
        storage
    }

    /// Bytes of the file system that VMs' disks lie on, and what is free of them.
    pub(super) fn file_system(&self) -> Resource {
        Resource { total: self.measured.total_bytes, free: self.measured.free_bytes }
    }

    /// What `member` may do here, with what its share of this cloud comes to.
    pub(super) fn limits_of(&self, member: &MemberJid) -> MemberPolicy {
        let (cpus, memory) = self.resources(None);
        let storage_bytes = self.storage(None).promisable_bytes();
        let capacity = Used { vms: 0, cpus: cpus.total, memory_bytes: memory.total, storage_bytes };
        self.policy_of(member).within(&capacity)
    }

    /// Arrivals whose VM is not here yet.
    fn arriving(&self) -> impl Iterator<Item = &Incoming> {
        let is_here = |vm: &VmId| self.vms.get(vm).is_some_and(|vm| vm.record.is_here());
        self.incoming.values().filter(move |run| run.is_unfinished() && !is_here(&run.spec().id))
    }

    /// Disks whose size matters: of VMs that are here, or whose copy is, and of those that arrive.
    pub fn to_measure(&self) -> Vec<DisksOf> {
        let known = self.vms.values().map(|vm| DisksOf::record(&vm.record));
        known.chain(self.arriving().map(Incoming::disks_of)).collect()
    }
}
