//! VMs that are to be made: what this cloud could never give is refused before anything is read or written.

use crate::interface::{Problem, ProblemKind, VmAdopt, VmCreate};
use crate::migration::records::VmRecord;
use crate::types::{ByteSize, VmName};
use crate::vm::Hardware;
use crate::vm::hypervisor::Lack;

use super::Broker;
use super::effect::{CallId, Effect};
use super::pending::{Pending, Whom};

/// What is known of a VM before it is made.
struct Wanted<'w> {
    name: &'w VmName,
    networks: &'w [String],
    hardware: &'w Hardware,
    cpus: u32,
    memory: ByteSize,
    /// The sizes of its disks, as far as they are known.
    disks_bytes: u64,
}

impl Broker {
    pub(super) fn create_vm(&mut self, create: VmCreate, call: CallId) {
        let wanted = Wanted {
            name: &create.name,
            networks: &create.networks,
            hardware: &create.hardware,
            cpus: create.cpus,
            memory: create.memory,
            disks_bytes: create.root_size.0.saturating_add(create.user_data_size.0),
        };
        if let Err(problem) = self.could_have(&wanted) {
            return self.reply(call, Err(problem));
        }
        self.names_in_use.insert(create.name.clone());
        let pending = Pending::Made { call, name: create.name.clone(), start: create.start };
        let (token, id) = (self.expect(pending), self.ids.vm());
        self.emit(Effect::Make { token, id, create: Box::new(create) });
    }

    pub(super) fn made(
        &mut self,
        call: CallId,
        name: &VmName,
        start: bool,
        result: Result<Box<VmRecord>, Problem>,
    ) {
        self.names_in_use.remove(name);
        match result {
            Ok(record) if start => self.vm_made(*record, true, Whom::Maker(call)),
            Ok(record) => self.vm_made(*record, false, Whom::Caller(call)),
            Err(problem) => self.reply(call, Err(problem)),
        }
    }

    /// Whether this cloud could have a VM of this disk.
    pub(super) fn adoptable(&self, adopt: &VmAdopt) -> Result<(), Problem> {
        self.could_have(&Wanted {
            name: &adopt.name,
            networks: &adopt.networks,
            hardware: &adopt.hardware,
            cpus: adopt.cpus,
            memory: adopt.memory,
            disks_bytes: 0,
        })?;
        let lack = Lack::of("architecture", &adopt.architecture, &self.features.architectures);
        lack.map_or(Ok(()), |lack| Err(not_offered(&adopt.name, &lack)))
    }

    fn could_have(&self, wanted: &Wanted) -> Result<(), Problem> {
        if let Some(problem) = self.create_problem(wanted.name, wanted.networks) {
            return Err(problem);
        }
        self.devices_for(wanted)?;
        let object = format!("VM {}", wanted.name);
        self.fits_this_host(&object, wanted.cpus, wanted.memory)?;
        self.has_storage(&object, wanted.disks_bytes)
    }

    /// Whether its guest would find what it is to find, and nobody else the same.
    fn devices_for(&self, wanted: &Wanted) -> Result<(), Problem> {
        let (features, hardware) = (&self.features, wanted.hardware);
        let object = format!("VM {}", wanted.name);
        if let Some(what) = hardware.surplus(wanted.networks) {
            let reason = format!("there are more {what} than networks");
            return Err(Problem::new(ProblemKind::BadRequest, object, reason)
                .next("give each --mac and --card-model its --network"));
        }
        let mut models = hardware.card_models.iter();
        let model = hardware.cpu_model.as_ref();
        let lack = model
            .and_then(|model| Lack::of("CPU model", model, &features.cpu_models))
            .or_else(|| Lack::of("disk bus", &hardware.disk_bus, &features.disk_buses))
            .or_else(|| models.find_map(|model| Lack::of("network card", model, &features.card_models)));
        if let Some(lack) = lack {
            return Err(not_offered(wanted.name, &lack));
        }
        let here = || self.vms.values().filter(|vm| vm.record.is_here()).map(|vm| &vm.record.spec);
        for (mac, network) in hardware.macs.iter().zip(wanted.networks) {
            let has = |nic: &crate::vm::spec::Nic| nic.mac == *mac && nic.network == *network;
            if let Some(other) = here().find(|spec| spec.nics.iter().any(has)) {
                let reason =
                    format!("VM {} has the MAC address {mac} in the network {network} already", other.name);
                return Err(Problem::new(ProblemKind::Conflict, object, reason)
                    .next("leave --mac out, or delete or move that VM first"));
            }
        }
        let has = |uuid| here().find(|spec| spec.system_uuid == Some(uuid) || uuid == spec.id.into());
        if let Some((uuid, other)) = hardware.system_uuid.and_then(|uuid| Some((uuid, has(uuid)?))) {
            let reason = format!("VM {} has the UUID {uuid} already", other.name);
            return Err(Problem::new(ProblemKind::Conflict, object, reason)
                .next("leave --uuid out, or delete or move that VM first"));
        }
        Ok(())
    }

    /// Why no VM of this name and with these networks can be made.
    pub(super) fn create_problem(&self, name: &VmName, networks: &[String]) -> Option<Problem> {
        let object = format!("VM {name}");
        let taken = self.names_in_use.contains(name)
            || self.vms.values().any(|vm| vm.record.is_here() && vm.record.spec.name == *name);
        if taken {
            return Some(
                Problem::new(ProblemKind::Conflict, object, "a VM of that name exists")
                    .next("choose another name"),
            );
        }
        let known = &self.config.networks;
        if let Some(bad) = networks.iter().find(|n| !known.iter().any(|k| k.name == **n)) {
            let names: Vec<_> = known.iter().map(|n| n.name.as_str()).collect();
            let reason = format!("there is no network named '{bad}'");
            let next = format!(
                "networks of this cloud: {}; others go into federation.toml as [[network]]",
                names.join(", ")
            );
            return Some(Problem::new(ProblemKind::NotFound, object, reason).next(next));
        }
        None
    }
}

fn not_offered(name: &VmName, lack: &Lack) -> Problem {
    let reason = format!("this cloud has no {} '{}'", lack.what, lack.asked.escape_debug());
    Problem::new(ProblemKind::BadRequest, format!("VM {name}"), reason)
        .next(format!("it has: {}", lack.offered))
}
