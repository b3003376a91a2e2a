//! Existing disks become VMs, and VMs' disks become files: what operators ask for.

use crate::clock::UnixMillis;
use crate::interface::{AdoptedView, ExportedView, Problem, ProblemKind, Reply, VmAdopt};
use crate::migration::records::VmRecord;
use crate::types::{VmId, VmName};

use super::Broker;
use super::effect::{CallId, Effect, Export};
use super::hold::{Hold, Verb};
use super::pending::{Pending, Whom};

impl Broker {
    pub(super) fn adopt_vm(&mut self, adopt: VmAdopt, call: CallId) {
        // Before hours of reading.
        if let Err(problem) = self.adoptable(&adopt) {
            return self.reply(call, Err(problem));
        }
        self.names_in_use.insert(adopt.name.clone());
        let (name, start, begun) = (adopt.name.clone(), adopt.start, self.now);
        let (token, id) = (self.expect(Pending::Adopted { call, name, start, begun }), self.ids.vm());
        self.emit(Effect::Adopt { token, call, id, adopt: Box::new(adopt) });
    }

    pub(super) fn adopted(
        &mut self,
        call: CallId,
        name: &VmName,
        start: bool,
        begun: UnixMillis,
        result: Result<Box<(AdoptedView, Option<VmRecord>)>, Problem>,
    ) {
        self.names_in_use.remove(name);
        let (mut view, record) = match result {
            Ok(adopted) => *adopted,
            Err(problem) => return self.reply(call, Err(problem)),
        };
        view.elapsed_ms = self.now.since(begun).as_millis() as u64;
        match record {
            Some(record) => self.vm_made(record, start, Whom::Adopter(call, Box::new(view))),
            None => self.reply(call, Ok(Reply::Adopted(Box::new(view)))),
        }
    }

    /// Writes a disk out; the VM cannot be started meanwhile.
    pub(super) fn export_vm(
        &mut self,
        name: &str,
        output: String,
        format: String,
        user_data: bool,
        call: CallId,
    ) {
        let id = match self.exportable(name, &output, user_data) {
            Ok(id) => id,
            Err(problem) => return self.reply(call, Err(problem)),
        };
        let Some(vm) = self.vms.get_mut(&id) else { return };
        vm.hold = Hold::Exporting;
        let record = vm.record.clone();
        let token = self.expect(Pending::Exported { call, vm: id });
        self.emit(Effect::Export(Box::new(Export { token, call, record, user_data, output, format })));
    }

    /// Whether a VM's disk can be written out now.
    fn exportable(&self, name: &str, output: &str, user_data: bool) -> Result<VmId, Problem> {
        let id = self.vm_for(Verb::Export, name)?;
        let object = format!("VM {name}");
        let bad = |reason: &str| Problem::new(ProblemKind::BadRequest, object.clone(), reason);
        if !output.starts_with('/') {
            return Err(bad("the path of the file to write must be absolute"));
        }
        let has_none = self.vms.get(&id).is_some_and(|vm| vm.record.spec.user_data_size.0 == 0);
        if user_data && has_none { Err(bad("it has no user-data disk")) } else { Ok(id) }
    }

    pub(super) fn exported(&mut self, call: CallId, id: VmId, result: Result<ExportedView, Problem>) {
        self.lets_go(id, Hold::Exporting);
        self.reply(call, result.map(Reply::Exported));
        self.presence_changed();
    }
}
