//! Changes of a VM that is there: its shape, its name, what its operator wants of it, the sizes of its disks.

use crate::interface::VmSet;
use crate::interface::problem::{Problem, ProblemKind, chain};
use crate::migration::records::{Autostart, Shape};
use crate::types::{ByteSize, VmId};

use super::Broker;
use super::effect::{CallId, Effect};
use super::hold::{Hold, Verb};
use super::pending::Pending;
use super::power::Stop;

const DESCRIPTION_BYTES_MAX: usize = 200;
/// A day: who needs more wants it switched off.
const STOP_TIMEOUT_S_MAX: u32 = 86_400;

impl Broker {
    /// Changes what is given. CPUs and memory of a VM that runs hold from its next start on.
    pub(super) fn set_vm(&mut self, set: &VmSet) -> Result<VmId, Problem> {
        let id = self.vm_for(Verb::Set, &set.vm)?;
        let Some(vm) = self.vms.get(&id) else { return Ok(id) };
        let object = format!("VM {}", set.vm);
        let bad = |reason: String| Problem::new(ProblemKind::BadRequest, object.clone(), reason);
        let mut record = vm.record.clone();
        if let Some(name) = set.name.as_ref().filter(|name| **name != record.spec.name) {
            if let Some(problem) = self.create_problem(name, &[]) {
                return Err(problem);
            }
            record.spec.name = name.clone();
        }
        let before = Shape::of(&record.spec);
        record.spec.cpus = set.cpus.unwrap_or(before.cpus);
        record.spec.memory = set.memory.unwrap_or(before.memory);
        record.spec.check().map_err(|reason| bad(reason).next("see 'cicada vm set --help'"))?;
        if Shape::of(&record.spec) != before {
            self.fits_this_host(&object, record.spec.cpus, record.spec.memory)?;
            if !self.is_off(id) {
                record.runs_as = record.runs_as.or(Some(before));
                // Set back to what it runs with.
                record.runs_as = record.runs_as.filter(|runs| *runs != Shape::of(&record.spec));
            }
        }
        if let Some(description) = &set.description {
            if description.len() > DESCRIPTION_BYTES_MAX || description.chars().any(char::is_control) {
                let reason =
                    format!("its description must be one line of at most {DESCRIPTION_BYTES_MAX} bytes");
                return Err(bad(reason));
            }
            record.settings.description = description.trim().to_owned();
        }
        record.settings.autostart = set.autostart.unwrap_or(record.settings.autostart);
        if let Some(s) = set.stop_timeout_s {
            if s > STOP_TIMEOUT_S_MAX {
                let reason =
                    format!("a stop timeout of {s} s: up to {STOP_TIMEOUT_S_MAX} s, a day, is possible");
                return Err(bad(reason));
            }
            record.settings.stop_timeout_s = (s > 0).then_some(s);
        }
        if record != vm.record {
            self.book.save_vm(&record).map_err(|e| Problem::from_error(ProblemKind::Failed, object, &e))?;
            tracing::info!(vm = %record.spec.name, id = %id, "changed");
            if let Some(vm) = self.vms.get_mut(&id) {
                vm.record = record;
            }
            self.presence_changed();
        }
        Ok(id)
    }

    /// What would never be started here is refused before it is written down.
    pub(super) fn fits_this_host(&self, object: &str, cpus: u32, memory: ByteSize) -> Result<(), Problem> {
        let (all_cpus, all_memory) = self.resources(None);
        if u64::from(cpus) <= all_cpus.total && memory.0 <= all_memory.total {
            return Ok(());
        }
        let reason = format!(
            "would need {cpus} CPUs and {memory}; all VMs here together may have {} CPUs and {}",
            all_cpus.total,
            ByteSize(all_memory.total)
        );
        Err(Problem::new(ProblemKind::Refused, object, reason)
            .next("ask for less, or raise hypervisor.cpus, cpu_overcommit or memory in federation.toml"))
    }

    /// Whether so much may be promised to a VM's disks.
    pub(super) fn has_storage(&self, object: &str, bytes: u64) -> Result<(), Problem> {
        let storage = self.storage(None);
        if bytes <= storage.unpromised_bytes() {
            return Ok(());
        }
        let reason = format!(
            "would be promised {} more; {} of {} may still be promised to VMs here",
            ByteSize(bytes),
            ByteSize(storage.unpromised_bytes()),
            ByteSize(storage.promisable_bytes())
        );
        Err(Problem::new(ProblemKind::NoSpace, object, reason)
            .next("delete or move a VM, or raise hypervisor.storage_overcommit in federation.toml"))
    }

    /// Stops a VM that runs, and starts it again.
    pub(super) fn reboot_vm(&mut self, id: VmId, force: bool, timeout_s: Option<u64>, call: CallId) {
        let mode = self.stop_mode(id, force, timeout_s, false);
        self.stop_vm(id, Stop { mode, for_host: false, again: true }, call);
    }

    /// Makes disks larger. The file is larger before the record says so: what a crash leaves in between is
    /// mended by asking again.
    pub(super) fn resize_vm(
        &mut self,
        name: &str,
        root_size: Option<ByteSize>,
        user_data_size: Option<ByteSize>,
        call: CallId,
    ) {
        match self.resizable(name, root_size, user_data_size) {
            Ok(id) => self.grow_disks(id, root_size, user_data_size, call),
            Err(problem) => self.reply(call, Err(problem)),
        }
    }

    fn resizable(
        &self,
        name: &str,
        root_size: Option<ByteSize>,
        user_data_size: Option<ByteSize>,
    ) -> Result<VmId, Problem> {
        let id = self.vm_for(Verb::Resize, name)?;
        let object = format!("VM {name}");
        let Some(vm) = self.vms.get(&id) else { return Ok(id) };
        let spec = &vm.record.spec;
        let mut wanted = spec.clone();
        wanted.root_size = root_size.unwrap_or(spec.root_size);
        wanted.user_data_size = user_data_size.unwrap_or(spec.user_data_size);
        for (what, now, then) in [
            ("root disk", spec.root_size, wanted.root_size),
            ("user-data disk", spec.user_data_size, wanted.user_data_size),
        ] {
            if then < now {
                let reason = format!("its {what} has {now}: it can be made larger, never smaller");
                return Err(Problem::new(ProblemKind::BadRequest, object, reason)
                    .next("give a larger size, or make a new VM and copy the data in its guest"));
            }
        }
        wanted.check().map_err(|reason| Problem::new(ProblemKind::BadRequest, object.clone(), reason))?;
        let grows = (wanted.root_size.0 - spec.root_size.0)
            .saturating_add(wanted.user_data_size.0 - spec.user_data_size.0);
        self.has_storage(&object, grows)?;
        Ok(id)
    }

    fn grow_disks(&mut self, id: VmId, root: Option<ByteSize>, user_data: Option<ByteSize>, call: CallId) {
        let Some(vm) = self.vms.get_mut(&id) else { return };
        vm.hold = Hold::Resizing;
        let record = Box::new(vm.record.clone());
        let token = self.expect(Pending::Grown { call, vm: id, root, user_data });
        self.emit(Effect::Grow { token, record, root, user_data });
    }

    pub(super) fn grown(
        &mut self,
        call: CallId,
        id: VmId,
        (root, user_data): (Option<ByteSize>, Option<ByteSize>),
        grown: Result<(), Problem>,
    ) {
        let result = grown.and_then(|()| {
            let Some(vm) = self.vms.get_mut(&id) else { return Ok(()) };
            let mut record = vm.record.clone();
            record.spec.root_size = root.unwrap_or(record.spec.root_size);
            record.spec.user_data_size = user_data.unwrap_or(record.spec.user_data_size);
            let object = format!("VM {}", record.spec.name);
            let failed = |e| Problem::from_error(ProblemKind::Failed, object, &e);
            self.book.save_vm(&record).map_err(failed)?;
            vm.record = record;
            Ok(())
        });
        self.verb_done(id, Hold::Resizing, result, call);
    }

    /// After a boot of the machine: which VMs are to run is decided by their operators' wishes.
    pub(super) fn apply_autostart(&mut self) {
        if !self.marks.is_other_boot() {
            return;
        }
        let off: Vec<_> = self.vms.keys().copied().filter(|id| self.is_off(*id)).collect();
        for id in off {
            let Some(vm) = self.vms.get_mut(&id).filter(|vm| vm.record.is_here()) else { continue };
            let run = match vm.record.settings.autostart {
                Autostart::Last => continue,
                Autostart::Always => true,
                Autostart::Never => false,
            };
            if vm.record.run == run {
                continue;
            }
            vm.record.run = run;
            tracing::info!(vm = %vm.record.spec.name, run, "decided by its autostart after a boot");
            if let Err(e) = self.book.save_vm(&vm.record) {
                tracing::warn!(vm = %vm.record.spec.name, error = chain(&e), "what its autostart decided is not recorded");
            }
        }
    }
}
