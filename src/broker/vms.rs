//! The VMs of this cloud: create, start, stop, delete, and what is shown of them.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::clock::UnixMillis;
use crate::disk;
use crate::hypervisor::{DiskFormat, Machine};
use crate::interface::problem::{Problem, ProblemKind, chain};
use crate::interface::{Deleted, DeletedView, Reply, VmCreate, VmView};
use crate::migration::ownership::Hold;
use crate::types::{ByteSize, ComponentId, MigrationId, VmId, VmName};
use crate::vm::spec::Nic;
use crate::vm::{Mac, PowerState, VmSpec};

use super::content;
use super::lineages::LAW;
use super::power::Stop;
use super::records::{GivenUp, VmRecord};
use super::{Broker, Input, Shared, aside, evidence, staging};

/// What guests of our own components print on their console when they have booted.
pub const READY_LINE: &str = "cicada: guest ready";
const ROOT_FILE: &str = "root.qcow2";
const USER_DATA_FILE: &str = "user-data.raw";

/// A VM known here, with what holds it at this moment.
pub struct Vm {
    pub record: VmRecord,
    pub busy: Option<Busy>,
    /// How it last ended, when not by our doing.
    pub power_note: Option<String>,
    /// When it crashed or did not start, as far back as it counts.
    pub failures: Vec<UnixMillis>,
    /// It is being started: a move would take it for one that stands still.
    pub starting: bool,
    /// To be stopped as soon as it is started.
    pub(super) stop_next: Option<(Stop, Answer)>,
    /// It was stopped because the host goes down, and still should run.
    pub stopped_for_host: bool,
    /// Whether those that may know more of who owns it were asked, or an operator took the risk.
    pub confirmed: bool,
}

impl Vm {
    pub fn new(record: VmRecord) -> Self {
        Self {
            record,
            busy: None,
            power_note: None,
            failures: Vec::new(),
            starting: false,
            stop_next: None,
            stopped_for_host: false,
            confirmed: true,
        }
    }
}

impl Vm {
    /// What holds it.
    pub fn hold(&self) -> Hold {
        match &self.busy {
            Some(Busy::Migration(id)) => Hold::Migration(*id),
            Some(Busy::Verb(verb)) => Hold::Verb(verb),
            None if self.starting => Hold::Verb("started"),
            None => Hold::Free,
        }
    }
}

/// Why a VM cannot be touched right now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Busy {
    Migration(MigrationId),
    Verb(&'static str),
}

/// The disk files of one VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskPaths {
    pub root: PathBuf,
    /// The composition the root disk lies over.
    pub base: PathBuf,
    pub user_data: PathBuf,
}

impl DiskPaths {
    pub fn in_dir(dir: &Path, base: PathBuf) -> Self {
        Self { root: dir.join(ROOT_FILE), base, user_data: dir.join(USER_DATA_FILE) }
    }

    /// The firmware's variables lie beside the disks and travel with them.
    pub fn firmware_in(dir: &Path) -> PathBuf {
        dir.join("firmware-vars.fd")
    }
}

pub(super) type Answer = oneshot::Sender<Result<Reply, Problem>>;

impl Broker {
    pub(super) fn disk_paths(&self, record: &VmRecord) -> DiskPaths {
        let dir = self.shared.records.vm_dir(record.spec.id).join(&record.disks);
        DiskPaths::in_dir(&dir, self.shared.composer.path_of(&record.spec.recipe))
    }

    pub(super) fn machine(&self, record: &VmRecord) -> Machine {
        let disks = self.disk_paths(record);
        let dir = self.shared.records.vm_dir(record.spec.id);
        Machine {
            root_format: DiskFormat::Qcow2,
            root_disk: disks.root,
            base: Some(disks.base),
            user_data_disk: (record.spec.user_data_size.0 > 0).then_some(disks.user_data),
            firmware_vars: DiskPaths::firmware_in(&dir.join(&record.disks)),
            state_dir: dir.join("run"),
            spec: record.spec.clone(),
        }
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

    /// A VM that is ours and that nothing holds.
    pub(super) fn free_vm(&self, name: &str) -> Result<VmId, Problem> {
        let id = self.find_vm(name)?;
        let object = format!("VM {name}");
        let Some(vm) = self.vms.get(&id) else {
            return Err(Problem::new(ProblemKind::NotFound, object, "there is no such VM in this cloud"));
        };
        if let Some(given) = vm.record.given_up() {
            let reason = format!("was handed over to {} under epoch {}", given.to, vm.record.epoch + 1);
            return Err(Problem::new(ProblemKind::Conflict, object, reason)
                .next("run the command there; the copy here must never be started"));
        }
        match vm.hold() {
            Hold::Free => Ok(id),
            Hold::Migration(m) => {
                Err(Problem::new(ProblemKind::Conflict, object, format!("is being moved by migration {m}"))
                    .next(format!("wait for it, or: cicada migration cancel {m}")))
            }
            Hold::Verb(verb) => {
                Err(Problem::new(ProblemKind::Conflict, object, format!("is {verb} right now"))
                    .next("wait a moment"))
            }
        }
    }

    /// As [`Broker::free_vm`], for what makes a VM run or sends it away.
    pub(super) fn movable_vm(&self, name: &str) -> Result<VmId, Problem> {
        let id = self.undisputed_vm(name)?;
        self.unconfirmed(id).map_or(Ok(id), Err)
    }

    fn undisputed_vm(&self, name: &str) -> Result<VmId, Problem> {
        let id = self.free_vm(name)?;
        self.contested(id).map_or(Ok(id), Err)
    }

    /// As [`Broker::movable_vm`], for what makes a VM run. `by_word`: the operator takes the risk that
    /// another cloud owns it.
    pub(super) fn startable_vm(
        &mut self,
        name: &str,
        by_word: bool,
        by_uid: Option<u32>,
    ) -> Result<VmId, Problem> {
        let id = self.undisputed_vm(name)?;
        match self.unconfirmed(id) {
            Some(_) if by_word => self
                .confirm_by_word(id, by_uid)
                .map(|()| id)
                .map_err(|e| Problem::from_error(ProblemKind::Failed, format!("VM {name}"), &e)),
            Some(problem) => Err(problem),
            None => Ok(id),
        }
    }

    pub(super) fn vm_view(&self, vm: &Vm) -> VmView {
        let record = &vm.record;
        let spec = &record.spec;
        let disks = self.disk_paths(record);
        let given = record.given_up();
        let in_doubt = given.is_some_and(GivenUp::in_doubt);
        let power = match given {
            Some(_) => PowerState::Stopped,
            None => self.shared.driver.state(spec.id).unwrap_or(PowerState::Stopped),
        };
        let machine = self.machine(record);
        VmView {
            id: spec.id,
            name: spec.name.clone(),
            power,
            ownership: match given {
                None if self.contested(spec.id).is_some() || self.disputed(spec.id).is_some() => "contested",
                None => "here",
                Some(_) if in_doubt => "in-doubt",
                Some(_) => "given-up",
            }
            .into(),
            owner: given.map(|g| g.to.clone()),
            epoch: record.epoch,
            created: record.created,
            cpus: spec.cpus,
            memory: spec.memory,
            root_size: spec.root_size,
            user_data_size: spec.user_data_size,
            nics: spec.nics.clone(),
            recipe: spec.recipe,
            components: record.components.clone(),
            root_delta_bytes: allocated_bytes(&disks.root),
            user_data_bytes: allocated_bytes(&disks.user_data),
            console_socket: machine
                .state_dir
                .join(crate::hypervisor::qemu::args::file::CONSOLE)
                .display()
                .to_string(),
            console_log: self
                .shared
                .driver
                .console_log(spec.id)
                .unwrap_or_else(|_| machine.state_dir.join(crate::hypervisor::qemu::args::file::CONSOLE_LOG))
                .display()
                .to_string(),
            migration: match vm.busy {
                Some(Busy::Migration(id)) => Some(id),
                _ => None,
            },
            problem: self.vm_problem(spec.id),
            description: record.settings.description.clone(),
            autostart: record.settings.autostart,
            stop_timeout_s: record.settings.stop_timeout_s,
            runs_as: record.runs_as,
            spec: spec.clone(),
        }
    }

    pub(super) fn create_vm(&mut self, create: VmCreate, reply: Answer) {
        if let Some(problem) = self.create_problem(&create.name, &create.networks) {
            let _ = reply.send(Err(problem));
            return;
        }
        self.names_in_use.insert(create.name.clone());
        let shared = self.shared.clone();
        tokio::task::spawn_blocking(move || {
            let name = create.name.clone();
            let start = create.start;
            let result = make_vm(&shared, create);
            shared.post(Input::apply(move |b| {
                b.names_in_use.remove(&name);
                match result {
                    Ok(record) if start => b.vm_made_to_run(record, reply),
                    Ok(record) => b.vm_made(record, false, reply),
                    Err(problem) => drop(reply.send(Err(problem))),
                }
            }));
        });
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
        let known = self.networks();
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

    pub(super) fn vm_made(&mut self, record: VmRecord, start: bool, reply: Answer) {
        let id = record.spec.id;
        if let Err(e) = self.shared.records.save_vm(&record) {
            let _ = reply.send(Err(Problem::from_error(
                ProblemKind::Failed,
                format!("VM {}", record.spec.name),
                &e,
            )));
            return;
        }
        tracing::info!(vm = %record.spec.name, id = %id, "created");
        self.vms.insert(id, Vm::new(record));
        if start {
            self.start_vm(id, reply);
        } else if let Some(vm) = self.vms.get(&id) {
            let _ = reply.send(Ok(Reply::Vm(Box::new(self.vm_view(vm)))));
        }
    }

    /// A VM that is made to be started at once: if that fails nothing of it is left.
    fn vm_made_to_run(&mut self, record: VmRecord, reply: Answer) {
        let (id, shared) = (record.spec.id, self.shared.clone());
        let (made, answer) = oneshot::channel();
        self.vm_made(record, true, made);
        tokio::spawn(async move {
            let problem = match answer.await {
                Ok(Ok(vm)) => return drop(reply.send(Ok(vm))),
                Ok(Err(problem)) => problem,
                // The broker ends; what it finds at its next start is the VM.
                Err(_) => return,
            };
            let (removed, end) = oneshot::channel();
            shared.post(Input::apply(move |b| b.remove_vm(id, Some(removed))));
            let left = match end.await {
                Ok(Ok(_)) => "nothing of it is left".to_owned(),
                Ok(Err(e)) => format!("and it could not be removed again: {}", e.reason),
                Err(_) => "and the broker ends".to_owned(),
            };
            let reason = format!("{}; the VM was made for this start, {left}", problem.reason);
            let _ = reply.send(Err(Problem { reason, ..problem }));
        });
    }

    pub(super) fn verb_done(&mut self, id: VmId, result: Result<(), Problem>, reply: Answer) {
        let Some(vm) = self.vms.get_mut(&id) else { return };
        vm.busy = None;
        let answer = match (result, self.vms.get(&id)) {
            (Ok(()), Some(vm)) => Ok(Reply::Vm(Box::new(self.vm_view(vm)))),
            (Err(problem), _) => Err(problem),
            (Ok(()), None) => Ok(Reply::Done),
        };
        let _ = reply.send(answer);
        self.presence_changed();
    }

    /// Deletes a stopped VM, or the kept copy of one that was handed over and acknowledged.
    pub(super) fn delete_vm(&mut self, name: &str, taken_for: Option<Deleted>, reply: Answer) {
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
            Err(problem) => drop(reply.send(Err(problem))),
            Ok(id) => self.remove_vm(id, Some(reply)),
        }
    }

    fn deletable(&self, name: &str) -> Result<VmId, Problem> {
        let id = self.find_vm(name)?;
        let object = format!("VM {name}");
        match self.vms.get(&id).and_then(|vm| vm.record.given_up()) {
            Some(g) if g.in_doubt() => Err(Problem::new(
                ProblemKind::Conflict,
                object,
                "its hand-over is not acknowledged: this may be the only copy",
            )
            .next(format!("bring {} online again; the hand-over then completes by itself", g.to))),
            Some(_) => Ok(id),
            None => {
                let id = self.free_vm(name)?;
                match self.shared.driver.state(id) {
                    Ok(PowerState::Stopped | PowerState::Crashed) | Err(_) => Ok(id),
                    Ok(state) => Err(Problem::new(ProblemKind::Conflict, object, format!("is {state}"))
                        .next(format!("cicada vm stop {name}"))),
                }
            }
        }
    }

    /// Scrubs and forgets a VM's copy here.
    pub(super) fn remove_vm(&mut self, id: VmId, reply: Option<Answer>) {
        let kept =
            self.vms.get(&id).map_or(Ok(()), |vm| evidence::keep_receipts(&self.shared.records, &vm.record));
        if let Err(e) = kept {
            let problem = Problem::from_error(ProblemKind::Failed, format!("VM {id}"), &e);
            tracing::warn!(vm = %id, reason = %problem, "not removed: its receipt cannot be kept");
            if let Some(reply) = reply {
                let _ = reply.send(Err(problem));
            }
            return;
        }
        let Some(vm) = self.vms.remove(&id) else { return };
        self.forecasts.forget(id);
        let disks = self.disk_paths(&vm.record);
        let given = vm.record.given_up();
        let deleted = DeletedView {
            id,
            name: vm.record.spec.name.clone(),
            what: if given.is_some() { Deleted::KeptCopy } else { Deleted::Vm },
            owner: given.map(|g| g.to.clone()),
            root_delta_bytes: allocated_bytes(&disks.root),
            user_data_bytes: allocated_bytes(&disks.user_data),
        };
        let shared = self.shared.clone();
        tokio::spawn(async move {
            let undefined = shared.driver.undefine(id).await;
            let name = vm.record.spec.name.clone();
            let work = tokio::task::spawn_blocking(move || {
                let kept = vm.record.kept.iter().map(|copy| &copy.disks);
                for disks in kept.chain([&vm.record.disks]) {
                    staging::scrub_dir(&shared.records.vm_dir(id).join(disks));
                }
                shared.records.remove_vm(id)
            });
            let object = format!("VM {name}");
            let result = match (undefined, work.await) {
                (Err(e), _) => Err(Problem::from_driver(name.as_str(), &e)),
                (_, Ok(Err(e))) => Err(Problem::from_error(ProblemKind::Failed, object, &e)),
                (_, Err(e)) => Err(Problem::new(ProblemKind::Failed, object, e.to_string())),
                (Ok(()), Ok(Ok(()))) => Ok(Reply::Deleted(deleted)),
            };
            tracing::info!(vm = %name, "removed");
            if let Some(reply) = reply {
                let _ = reply.send(result);
            }
        });
    }

    /// Scrubs copies whose grace period is over.
    pub(super) fn scrub_released(&mut self) {
        let now = self.shared.now();
        let due: Vec<_> = self
            .vms
            .iter()
            .filter(|(_, vm)| vm.busy.is_none())
            .filter(|(_, vm)| vm.record.given_up().and_then(|g| g.scrub_after).is_some_and(|t| t <= now))
            // A copy that is coming home right now serves as its seed.
            .filter(|(id, _)| !self.incoming.values().any(|r| r.is_unfinished() && r.spec().id == **id))
            .map(|(id, _)| *id)
            .collect();
        due.into_iter().for_each(|id| self.remove_vm(id, None));
        self.scrub_kept(now);
    }

    /// Scrubs copies from before VMs left and came home.
    fn scrub_kept(&mut self, now: UnixMillis) {
        for vm in self.vms.values_mut() {
            let Some((over, record)) = LAW.due(&vm.record, now) else { continue };
            // What the record does not name any more, the next start would find and remove as well.
            if let Err(e) = self.shared.records.save_vm(&record) {
                tracing::warn!(vm = %record.spec.name, error = chain(&e), "earlier copies are not scrubbed yet");
                continue;
            }
            vm.record = record;
            let dir = self.shared.records.vm_dir(vm.record.spec.id);
            tracing::info!(vm = %vm.record.spec.name, copies = over.len(), "the grace period of earlier copies is over");
            tokio::task::spawn_blocking(move || {
                over.iter().for_each(|disks| staging::scrub_dir(&dir.join(disks)))
            });
        }
    }
}

/// Composes, makes the disks and the record of a new VM. Blocking.
fn make_vm(shared: &Shared, create: VmCreate) -> Result<VmRecord, Problem> {
    let object = format!("VM {}", create.name);
    let failed =
        |e: &(dyn std::error::Error + 'static)| Problem::from_error(ProblemKind::Failed, object.clone(), e);
    let ids: Vec<ComponentId> = content::resolve(&shared.repository, &create.components)?;
    let (recipe_id, recipe) = shared
        .composer
        .make_recipe(&ids, create.ordered, create.root_size, &create.kernel_command_line)
        .map_err(|e| content::compose_problem(&e))?;
    let id = VmId::random();
    let nics = (0u8..)
        .zip(&create.networks)
        .map(|(i, n)| Nic { network: n.clone(), mac: Mac::derived(id, i) })
        .collect();
    let spec = VmSpec {
        id,
        name: create.name,
        cpus: create.cpus,
        memory: create.memory,
        recipe: recipe_id,
        root_size: ByteSize(recipe.disk.virtual_size_bytes),
        user_data_size: create.user_data_size,
        nics,
        architecture: content::architecture(&shared.repository, &ids)?,
        cpu_model: shared.config.hypervisor.cpu_model.clone(),
        firmware: crate::vm::Firmware::Uefi,
    };
    spec.check().map_err(|reason| {
        Problem::new(ProblemKind::BadRequest, object.clone(), reason).next("see 'cicada vm create --help'")
    })?;
    let record = VmRecord::new(spec, content::names(&shared.repository, &ids)?, "disks-1", shared.now());
    let dir = shared.records.vm_dir(id).join(&record.disks);
    std::fs::create_dir_all(&dir).map_err(|e| failed(&e))?;
    let paths = DiskPaths::in_dir(&dir, shared.composer.path_of(&recipe_id));
    let made = disk::create_overlay(&paths.root, &paths.base, record.spec.root_size.0).and_then(|()| {
        match record.spec.user_data_size.0 {
            0 => Ok(()),
            size => disk::create_user_data(&paths.user_data, size),
        }
    });
    made.map_err(|e| {
        let _ = std::fs::remove_dir_all(shared.records.vm_dir(id));
        failed(&e)
    })?;
    Ok(record)
}

/// Bytes really allocated for a file; zero if it is not there.
fn allocated_bytes(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |m| m.blocks() * 512)
}

/// Waits until the guest prints its ready line on the console. False if it does not in time.
pub async fn watch_boot(log: &Path, patience: Duration) -> bool {
    let seen = async {
        let from = tokio::fs::metadata(log).await.map_or(0, |m| m.len());
        // The log is appended to over restarts; the line of this boot comes after what is there now,
        // but the guest may already be a little ahead of us.
        let from = from.saturating_sub(4096);
        loop {
            if read_from(log, from).await.is_ok_and(|text| contains(&text, READY_LINE.as_bytes())) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::time::timeout(patience, seen).await.is_ok()
}

async fn read_from(path: &Path, from: u64) -> io::Result<Vec<u8>> {
    use tokio::io::{AsyncReadExt, AsyncSeekExt};
    let mut file = tokio::fs::File::open(path).await?;
    file.seek(io::SeekFrom::Start(from)).await?;
    let mut text = Vec::new();
    // A guest can print without end; the line comes early.
    file.take(4 << 20).read_to_end(&mut text).await?;
    Ok(text)
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|w| w == needle)
}
