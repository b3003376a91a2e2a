//! The VMs of this cloud: create, start, stop, delete, and what is shown of them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::clock::UnixMillis;
use crate::interface::{Deleted, DeletedView, Problem, ProblemKind, Reply, VmOwnership, VmView, chain};
use crate::migration::records::{GivenUp, VmRecord};
use crate::placement::shortlist::Earlier;
use crate::types::{MemberJid, VmId};
use crate::vm::PowerState;

use super::effect::{CallId, Effect};
use super::hold::{Hold, No, Verb};
use super::pending::{Pending, Remover, Whom};
use super::power::Stop;
use super::{Broker, aside};

/// What guests of our own components print on their console when they have booted.
pub const READY_LINE: &str = "cicada: guest ready";
/// Below a VM's directory: where its hypervisor's sockets and logs lie, and the names of two of them.
pub const RUN_DIR: &str = "run";
pub const CONSOLE_FILE: &str = "con.sock";
pub const CONSOLE_LOG_FILE: &str = "console.log";

/// A VM known here, with what holds it at this moment.
#[derive(Clone)]
pub struct Vm {
    pub record: VmRecord,
    /// As the hypervisor said last.
    pub power: PowerState,
    /// What it is busy with; changed by [`Broker::holds`] and [`Broker::lets_go`].
    pub hold: Hold,
    /// How it last ended, when not by our doing.
    pub power_note: Option<String>,
    /// When it crashed or did not start, as far back as it counts.
    pub failures: Vec<UnixMillis>,
    /// To be stopped as soon as it is started.
    pub(super) stop_next: Option<(Stop, CallId)>,
    /// It was stopped because the host goes down, and still should run.
    pub stopped_for_host: bool,
    /// Whether those that may know more of who owns it were asked, or an operator took the risk.
    pub confirmed: bool,
    /// What members answered to plans, and when.
    pub answers: BTreeMap<MemberJid, (UnixMillis, Earlier)>,
}

impl Vm {
    pub fn new(record: VmRecord) -> Self {
        Self {
            record,
            power: PowerState::Stopped,
            hold: Hold::Free,
            power_note: None,
            failures: Vec::new(),
            stop_next: None,
            stopped_for_host: false,
            confirmed: true,
            answers: BTreeMap::new(),
        }
    }
}

impl Broker {
    /// How a VM is, as far as its hypervisor knows of it.
    pub(super) fn power_of(&self, vm: VmId) -> PowerState {
        self.vms.get(&vm).map_or(PowerState::Stopped, |vm| vm.power)
    }

    pub(super) fn set_power(&mut self, vm: VmId, power: PowerState) {
        if let Some(vm) = self.vms.get_mut(&vm) {
            vm.power = power;
        }
    }

    fn run_dir(&self, vm: VmId) -> PathBuf {
        self.vms_dir.join(vm.to_string()).join(RUN_DIR)
    }

    /// A VM by name or UUID. Where a name is both a present VM's and a given-up one's, the present wins.
    pub(super) fn find_vm(&self, name: &str) -> Result<VmId, Problem> {
        if let Some(damaged) = self.find_aside(name) {
            return Err(aside::problem(damaged));
        }
        let by_id = name.parse::<VmId>().ok().filter(|id| self.vms.contains_key(id));
        let by_name = || {
            let mut found: Vec<_> = self
                .vms
                .values()
                .filter(|vm| vm.record.spec.name.as_str() == name)
                .map(|vm| &vm.record)
                .collect();
            found.sort_by_key(|r| !r.is_here());
            found.first().map(|r| r.spec.id)
        };
        by_id.or_else(by_name).ok_or_else(|| {
            Problem::new(ProblemKind::NotFound, format!("VM {name}"), "there is no such VM in this cloud")
                .next("see 'cicada vm list'")
        })
    }

    /// A VM that an operator starts. `by_word`: the operator takes the risk that another cloud owns it.
    pub(super) fn startable_vm(
        &mut self,
        name: &str,
        by_word: bool,
        by_uid: Option<u32>,
    ) -> Result<VmId, Problem> {
        let verb = if by_word { Verb::StartByWord } else { Verb::Start };
        let id = self.vm_for(verb, name)?;
        match by_word {
            true => self
                .confirm_by_word(id, by_uid)
                .map(|()| id)
                .map_err(|e| Problem::from_error(ProblemKind::Failed, format!("VM {name}"), &e)),
            false => Ok(id),
        }
    }

    pub(super) fn vm_view(&self, vm: &Vm) -> VmView {
        let record = &vm.record;
        let spec = &record.spec;
        let given = record.given_up();
        let in_doubt = given.is_some_and(GivenUp::in_doubt);
        let power = match given {
            Some(_) => PowerState::Stopped,
            None => vm.power,
        };
        let (run_dir, taken) =
            (self.run_dir(spec.id), self.measured.disks.get(&spec.id).copied().unwrap_or_default());
        VmView {
            id: spec.id,
            name: spec.name.clone(),
            power,
            ownership: match given {
                None if self.contested(spec.id).is_some() || self.disputed(spec.id).is_some() => {
                    VmOwnership::Contested
                }
                None => VmOwnership::Here,
                Some(_) if in_doubt => VmOwnership::InDoubt,
                Some(_) => VmOwnership::GivenUp,
            },
            owner: given.map(|g| g.to.clone()),
            epoch: record.epoch,
            created: record.created,
            cpus: spec.cpus,
            memory: spec.memory,
            root_size: spec.root_size,
            user_data_size: spec.user_data_size,
            nics: spec.nics.iter().map(Into::into).collect(),
            recipe: spec.recipe,
            components: record.components.clone(),
            root_delta_bytes: taken.root_bytes,
            user_data_bytes: taken.user_data_bytes,
            console_socket: run_dir.join(CONSOLE_FILE).display().to_string(),
            console_log: run_dir.join(CONSOLE_LOG_FILE).display().to_string(),
            migration: match vm.hold {
                Hold::Moving(id) => Some(id),
                _ => None,
            },
            problem: self.vm_problem(spec.id),
            description: record.settings.description.clone(),
            autostart: record.settings.autostart,
            stop_timeout_s: record.settings.stop_timeout_s,
            runs_as: record.runs_as,
            architecture: spec.architecture.clone(),
            cpu_model: spec.cpu_model.clone(),
            firmware: spec.firmware,
            disk_bus: spec.disk_bus,
            system_uuid: spec.system_uuid.unwrap_or(spec.id.into()),
        }
    }

    /// A VM has disks, and gets its record.
    pub(super) fn vm_made(&mut self, record: VmRecord, start: bool, whom: Whom) {
        let id = record.spec.id;
        if let Err(e) = self.book.save_vm(&record) {
            let problem = Problem::from_error(ProblemKind::Failed, format!("VM {}", record.spec.name), &e);
            let (Whom::Caller(call) | Whom::Maker(call) | Whom::Adopter(call, _)) = whom;
            self.vms.insert(id, Vm::new(record));
            return self.remove_vm(id, Remover::Maker(call, problem));
        }
        tracing::info!(vm = %record.spec.name, id = %id, "created");
        self.vms.insert(id, Vm::new(record));
        match start {
            true => self.start_vm(id, whom),
            false => self.tell_started(id, whom, Ok(())),
        }
    }

    /// What came of a start, or of a VM that was only made.
    pub(super) fn tell_started(&mut self, id: VmId, whom: Whom, result: Result<(), Problem>) {
        let view = self.vms.get(&id).map(|vm| Box::new(self.vm_view(vm)));
        match (whom, result) {
            (Whom::Caller(call) | Whom::Maker(call), Ok(())) => {
                self.reply(call, Ok(view.map_or(Reply::Done, Reply::Vm)));
            }
            (Whom::Caller(call), Err(problem)) => self.reply(call, Err(problem)),
            (Whom::Maker(call), Err(problem)) => self.remove_vm(id, Remover::Maker(call, problem)),
            (Whom::Adopter(call, mut adopted), Ok(())) => {
                adopted.vm = view;
                self.reply(call, Ok(Reply::Adopted(adopted)));
            }
            // The disk was read at length: what came of that stays.
            (Whom::Adopter(call, _), Err(problem)) => {
                let reason = match self.vms.contains_key(&id) {
                    true => format!("{}; the VM is there all the same, and stopped", problem.reason),
                    false => problem.reason.clone(),
                };
                self.reply(call, Err(Problem { reason, ..problem }));
            }
        }
    }

    pub(super) fn verb_done(&mut self, id: VmId, busy_with: Hold, result: Result<(), Problem>, call: CallId) {
        if !self.vms.contains_key(&id) {
            return;
        }
        self.lets_go(id, busy_with);
        self.tell_started(id, Whom::Caller(call), result);
        self.presence_changed();
    }

    /// Deletes a stopped VM, or the kept copy of one that was handed over and acknowledged.
    pub(super) fn delete_vm(&mut self, name: &str, taken_for: Option<Deleted>, call: CallId) {
        let what = |b: &Self, id: VmId| match b.vms.get(&id).is_some_and(|vm| vm.record.is_here()) {
            true => Deleted::Vm,
            false => Deleted::KeptCopy,
        };
        let id = self.deletable(name).and_then(|id| match taken_for.is_none_or(|t| t == what(self, id)) {
            true => Ok(id),
            false => Err(Problem::new(ProblemKind::Conflict, format!("VM {name}"), "moved in the meantime")
                .next(format!("see 'cicada vm show {name}'"))),
        });
        match id {
            Err(problem) => self.reply(call, Err(problem)),
            Ok(id) => self.remove_vm(id, Remover::Caller(call)),
        }
    }

    fn deletable(&self, name: &str) -> Result<VmId, Problem> {
        let id = self.find_vm(name)?;
        let given = self.vms.get(&id).and_then(|vm| vm.record.given_up());
        match (self.may(Verb::Delete, id), given) {
            (Ok(()), _) => Ok(id),
            (Err(No::InDoubt), Some(g)) => Err(Problem::new(
                ProblemKind::Conflict,
                format!("VM {name}"),
                "its hand-over is not acknowledged: this may be the only copy",
            )
            .next(format!("bring {} online again; the hand-over then completes by itself", g.to))),
            (Err(no), _) => Err(self.refused(id, name, Verb::Delete, no)),
        }
    }

    /// Scrubs and forgets a VM's copy here.
    pub(super) fn remove_vm(&mut self, id: VmId, by: Remover) {
        let kept = self.vms.get(&id).map_or(Ok(()), |vm| self.book.keep_receipts(&vm.record));
        if let Err(e) = kept {
            let problem = Problem::from_error(ProblemKind::Failed, format!("VM {id}"), &e);
            tracing::warn!(vm = %id, reason = %problem, "not removed: its receipt cannot be kept");
            return self.tell_removed(by, Err(problem));
        }
        let Some(vm) = self.vms.remove(&id) else {
            let gone =
                Problem::new(ProblemKind::NotFound, format!("VM {id}"), "there is no such VM in this cloud");
            return self.tell_removed(by, Err(gone));
        };
        self.removing.insert(id);
        // All that lies there goes, also what was staged.
        self.interrupted.remove(&id);
        self.forecasts.forget(id);
        let taken = self.measured.disks.get(&id).copied().unwrap_or_default();
        let given = vm.record.given_up();
        let deleted = DeletedView {
            id,
            name: vm.record.spec.name.clone(),
            what: if given.is_some() { Deleted::KeptCopy } else { Deleted::Vm },
            owner: given.map(|g| g.to.clone()),
            root_delta_bytes: taken.root_bytes,
            user_data_bytes: taken.user_data_bytes,
        };
        let token = self.expect(Pending::Removed { by, deleted: Box::new(deleted) });
        self.emit(Effect::Remove { token, record: Box::new(vm.record) });
        self.noted = u64::MAX;
    }

    pub(super) fn removed(&mut self, by: Remover, deleted: DeletedView, result: Result<(), Problem>) {
        tracing::info!(vm = %deleted.name, "removed");
        self.removing.remove(&deleted.id);
        self.noted = u64::MAX;
        self.tell_removed(by, result.map(|()| deleted));
    }

    fn tell_removed(&mut self, by: Remover, result: Result<DeletedView, Problem>) {
        match by {
            Remover::Nobody => {}
            Remover::Caller(call) => self.reply(call, result.map(Reply::Deleted)),
            Remover::Maker(call, problem) => {
                let left = match result {
                    Ok(_) => "nothing of it is left".to_owned(),
                    Err(e) => format!("and it could not be removed again: {}", e.reason),
                };
                let reason = format!("{}; the VM was made for this start, {left}", problem.reason);
                self.reply(call, Err(Problem { reason, ..problem }));
            }
        }
    }

    /// Scrubs copies whose grace period is over.
    pub(super) fn scrub_released(&mut self) {
        let now = self.now;
        let due: Vec<_> = self
            .vms
            .iter()
            .filter(|(_, vm)| vm.record.given_up().and_then(|g| g.scrub_after).is_some_and(|t| t <= now))
            .filter(|(id, _)| self.may(Verb::Scrub, **id).is_ok())
            .map(|(id, _)| *id)
            .collect();
        due.into_iter().for_each(|id| self.remove_vm(id, Remover::Nobody));
        self.scrub_kept(now);
    }

    /// Scrubs copies from before VMs left and came home.
    fn scrub_kept(&mut self, now: UnixMillis) {
        for (id, vm) in &mut self.vms {
            let Some((over, record)) = self.book.law().due(&vm.record, now) else { continue };
            // What the record does not name any more, the next start would find and remove as well.
            if let Err(e) = self.book.save_vm(&record) {
                tracing::warn!(vm = %record.spec.name, error = chain(&e), "earlier copies are not scrubbed yet");
                continue;
            }
            vm.record = record;
            tracing::info!(vm = %vm.record.spec.name, copies = over.len(), "the grace period of earlier copies is over");
            self.effects.push(Effect::Scrub { vm: *id, disks: over });
        }
    }
}
