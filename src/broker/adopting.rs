//! Existing disks become VMs, and VMs' disks become files: what operators ask for, run off the
//! broker's own task, which only makes the record.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

use crate::adopt::{self, AdoptError, Base, Findings, Job, VmDisk};
use crate::compose::ImageFormat;
use crate::disk;
use crate::types::{ByteSize, RecipeId, VmId, VmName};
use crate::vm::spec::Nic;
use crate::vm::{Mac, PowerState, VmSpec};

use super::interface::{AdoptedView, Event, ExportedView, KnownFromView, Reply, VmAdopt};
use super::problem::{Problem, ProblemKind};
use super::records::VmRecord;
use super::vms::{Answer, Busy, DiskPaths};
use super::{Broker, Input, Shared, content, staging};

/// A disk of a VM to be written out.
pub(super) struct Export {
    vm: VmId,
    name: VmName,
    disk: VmDisk,
    recipe: RecipeId,
    output: PathBuf,
    format: ImageFormat,
}

/// An adoption whose VM has disks and lacks its record.
struct Adopted {
    record: VmRecord,
    base: Base,
}

impl Broker {
    pub(super) fn adopt_vm(&mut self, adopt: VmAdopt, events: mpsc::Sender<Event>, reply: Answer) {
        if let Some(problem) = self.create_problem(&adopt.name, &adopt.networks) {
            return drop(reply.send(Err(problem)));
        }
        self.names_in_use.insert(adopt.name.clone());
        let shared = self.shared.clone();
        tokio::task::spawn_blocking(move || {
            let (name, start, begun) = (adopt.name.clone(), adopt.start, Instant::now());
            let reporter = Reporter::new(&events);
            let result = reporter.run(|job| make(&shared, &adopt, job));
            let result = result.map_err(|e| adopt_problem(&name, &e));
            shared.post(Input::apply(move |b| {
                b.names_in_use.remove(&name);
                match result {
                    Ok((mut view, adopted)) => {
                        view.elapsed_ms = begun.elapsed().as_millis() as u64;
                        b.adopted(view, adopted, start, reply);
                    }
                    Err(problem) => drop(reply.send(Err(problem))),
                }
            }));
        });
    }

    fn adopted(&mut self, mut view: AdoptedView, adopted: Option<Adopted>, start: bool, reply: Answer) {
        let Some(Adopted { record, base }) = adopted else {
            return drop(reply.send(Ok(Reply::Adopted(Box::new(view)))));
        };
        if reply.is_closed() {
            // Its operator left while the last bytes were written.
            let shared = self.shared.clone();
            tokio::task::spawn_blocking(move || undo(&shared, record.spec.id, Some(&base)));
            return;
        }
        let (made, answer) = oneshot::channel();
        self.vm_made(record, start, made);
        // From here on the VM's recipe keeps everything.
        drop(base.kept);
        tokio::spawn(async move {
            let result = match answer.await {
                Ok(Ok(Reply::Vm(vm))) => {
                    view.vm = Some(vm);
                    Ok(Reply::Adopted(Box::new(view)))
                }
                // The disk was read at length: what came of that stays.
                Ok(Err(p)) => {
                    let reason = format!("{}; the VM is there all the same, and stopped", p.reason);
                    Err(Problem { reason, ..p })
                }
                Ok(other) => other,
                Err(_) => Err(Problem::new(ProblemKind::Unavailable, "broker", "is shutting down")),
            };
            let _ = reply.send(result);
        });
    }

    /// The disk an operator wants written out, if that can be done now.
    pub(super) fn exported_disk(
        &self,
        name: &str,
        output: &str,
        format: &str,
        user_data: bool,
    ) -> Result<Export, Problem> {
        let id = self.free_vm(name)?;
        let object = format!("VM {name}");
        let bad = |reason: String| Problem::new(ProblemKind::BadRequest, object.clone(), reason);
        let format: ImageFormat = format.parse().map_err(bad)?;
        let output = PathBuf::from(output);
        if !output.is_absolute() {
            return Err(bad("the path of the file to write must be absolute".into()));
        }
        let Some(vm) = self.vms.get(&id) else { return Err(bad("it is gone".into())) };
        match self.shared.driver.state(id) {
            Ok(PowerState::Stopped | PowerState::Crashed) | Err(_) => {}
            Ok(state) => {
                return Err(Problem::new(
                    ProblemKind::Conflict,
                    object,
                    format!("is {state}: its disk changes while it is read"),
                )
                .next(format!("cicada vm stop {name}")));
            }
        }
        let spec = &vm.record.spec;
        let paths = self.disk_paths(&vm.record);
        let disk = match user_data {
            true if spec.user_data_size.0 == 0 => return Err(bad("it has no user-data disk".into())),
            true => VmDisk::UserData(paths.user_data),
            false => VmDisk::Root { overlay: paths.root, base: paths.base },
        };
        Ok(Export { vm: id, name: spec.name.clone(), disk, recipe: spec.recipe, output, format })
    }

    /// Writes a disk out; the VM cannot be started meanwhile.
    pub(super) fn export_vm(&mut self, export: Export, events: mpsc::Sender<Event>, reply: Answer) {
        let id = export.vm;
        let Some(vm) = self.vms.get_mut(&id) else { return };
        vm.busy = Some(Busy::Verb("being exported"));
        let shared = self.shared.clone();
        tokio::task::spawn_blocking(move || {
            let begun = Instant::now();
            let reporter = Reporter::new(&events);
            let result = reporter.run(|job| write_out(&shared, &export, job));
            let answer = result
                .map(|size_bytes| {
                    Reply::Exported(ExportedView {
                        output: export.output.display().to_string(),
                        format: export.format.to_string(),
                        size_bytes,
                        elapsed_ms: begun.elapsed().as_millis() as u64,
                    })
                })
                .map_err(|e| adopt_problem(&export.name, &e));
            shared.post(Input::apply(move |b| {
                if let Some(vm) = b.vms.get_mut(&id) {
                    vm.busy = None;
                }
                let _ = reply.send(answer);
                b.presence_changed();
            }));
        });
    }
}

fn write_out(shared: &Shared, export: &Export, job: Job<'_>) -> Result<u64, AdoptError> {
    if let VmDisk::Root { .. } = export.disk {
        shared.composer.composition(&export.recipe)?;
    }
    adopt::export(&export.disk, &export.output, export.format, job)
}

/// Reads the disk, makes its base and its root delta. Blocking; on failure nothing is left.
fn make(
    shared: &Shared,
    adopt: &VmAdopt,
    job: Job<'_>,
) -> Result<(AdoptedView, Option<Adopted>), AdoptError> {
    let disk_path = PathBuf::from(&adopt.disk);
    let invalid = |reason: String| AdoptError::NotADisk { path: disk_path.clone(), reason };
    let format = match adopt.format.as_str() {
        "auto" => None,
        name => Some(name.parse::<ImageFormat>().map_err(invalid)?),
    };
    let id = VmId::random();
    let nics = (0u8..)
        .zip(&adopt.networks)
        .map(|(i, n)| Nic { network: n.clone(), mac: Mac::derived(id, i) })
        .collect();
    let mut spec = VmSpec {
        id,
        name: adopt.name.clone(),
        cpus: adopt.cpus,
        memory: adopt.memory,
        recipe: RecipeId::of(b""),
        root_size: ByteSize(0),
        user_data_size: ByteSize(0),
        nics,
        architecture: adopt.architecture.clone(),
        cpu_model: shared.config.hypervisor.cpu_model.clone(),
        firmware: adopt.firmware,
    };
    // Before hours of reading.
    spec.check().map_err(invalid)?;
    let found = adopt::examine(&shared.repository, &disk_path, format, job)?;
    let findings = found.findings();
    let mut view = view(&adopt.name, &findings);
    if adopt.dry_run {
        return Ok((view, None));
    }
    let base =
        found.make_base(&shared.repository, &shared.composer, &adopt.architecture, adopt.share, job)?;
    (spec.recipe, spec.root_size) = (base.recipe, ByteSize(findings.size_bytes));
    let disks = || {
        let record = VmRecord::new(spec, vec![base.label.clone()], "disks-1", shared.now());
        let dir = shared.records.vm_dir(id).join(&record.disks);
        std::fs::create_dir_all(&dir).map_err(|source| AdoptError::Io {
            what: "create",
            path: dir.clone(),
            source,
        })?;
        let residue_bytes = if adopt.share { 0 } else { findings.residue_bytes };
        disk::require_space(&dir, residue_bytes)?;
        let paths = DiskPaths::in_dir(&dir, shared.composer.path_of(&base.recipe));
        found.write_root(&paths.root, &paths.base, job)?;
        take_user_data(shared, adopt, format, &paths, record, job)
    };
    match disks() {
        Ok(record) => {
            view.component = Some(base.label.clone());
            Ok((view, Some(Adopted { record, base })))
        }
        Err(e) => {
            undo(shared, id, Some(&base));
            Err(e)
        }
    }
}

fn take_user_data(
    shared: &Shared,
    adopt: &VmAdopt,
    format: Option<ImageFormat>,
    paths: &DiskPaths,
    mut record: VmRecord,
    job: Job<'_>,
) -> Result<VmRecord, AdoptError> {
    if let Some(disk) = &adopt.user_data {
        let temporary = shared.repository.temporary_dir();
        let size = adopt::take_user_data(Path::new(disk), format, temporary, &paths.user_data, job)?;
        record.spec.user_data_size = ByteSize(size);
    }
    Ok(record)
}

/// Removes what an adoption made that did not become a VM.
fn undo(shared: &Shared, id: VmId, base: Option<&Base>) {
    let dir = shared.records.vm_dir(id);
    staging::scrub_dir(&dir.join("disks-1"));
    let _ = std::fs::remove_dir(&dir);
    if let Some(base) = base.filter(|b| b.is_new) {
        adopt::abandon(&shared.composer, &base.recipe);
    }
}

fn view(name: &VmName, f: &Findings) -> AdoptedView {
    let from = f.known_from.iter().map(|k| KnownFromView {
        component: k.component.clone(),
        packs: k.packs,
        bytes: k.bytes,
    });
    AdoptedView {
        name: name.clone(),
        format: f.format.to_string(),
        disk_bytes: f.disk_bytes,
        size_bytes: f.size_bytes,
        digest: f.digest,
        known_bytes: f.known_bytes,
        residue_bytes: f.residue_bytes,
        zero_bytes: f.zero_bytes,
        extents: f.extents,
        packs: f.known_from.iter().map(|k| k.packs).sum(),
        packs_left_out: f.packs_left_out as u64,
        known_from: from.collect(),
        elapsed_ms: 0,
        component: None,
        vm: None,
    }
}

fn adopt_problem(name: &VmName, e: &AdoptError) -> Problem {
    let kind = match e {
        AdoptError::Repository(e) => return content::repository_problem(e),
        AdoptError::Compose(e) => return content::compose_problem(e),
        AdoptError::Disk(disk::DiskError::NoSpace { .. }) | AdoptError::NoSpace { .. } => {
            ProblemKind::NoSpace
        }
        AdoptError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            ProblemKind::NotFound
        }
        AdoptError::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
            ProblemKind::Forbidden
        }
        AdoptError::NotADisk { .. } => ProblemKind::BadRequest,
        AdoptError::RefersElsewhere { .. }
        | AdoptError::TooLarge { .. }
        | AdoptError::Convert { .. }
        | AdoptError::Scattered => ProblemKind::Refused,
        AdoptError::Changed { .. } | AdoptError::Occupied { .. } => ProblemKind::Conflict,
        AdoptError::NoQemuImg => ProblemKind::Missing,
        AdoptError::Cancelled => ProblemKind::Cancelled,
        AdoptError::Disk(_) | AdoptError::Io { .. } => ProblemKind::Failed,
    };
    let problem = Problem::from_error(kind, format!("VM {name}"), e);
    match kind {
        ProblemKind::Forbidden => problem.next("let the broker's user read the disk, or write the output"),
        ProblemKind::NotFound => problem.next("name a file on the broker's machine"),
        _ => problem,
    }
}

/// Turns progress from many threads into events that never run backwards, and an operator who left
/// into a cancellation.
struct Reporter<'a> {
    events: &'a mpsc::Sender<Event>,
    last: Mutex<(&'static str, u64)>,
}

impl<'a> Reporter<'a> {
    /// Steps of one phase that are told.
    const STEPS: u64 = 200;

    fn new(events: &'a mpsc::Sender<Event>) -> Self {
        Self { events, last: Mutex::new(("", 0)) }
    }

    fn run<T>(&self, work: impl FnOnce(Job<'_>) -> T) -> T {
        let progress = |phase, done, total| self.tell(phase, done, total);
        let cancelled = || self.events.is_closed();
        work(Job { progress: &progress, cancelled: &cancelled })
    }

    fn tell(&self, phase: &'static str, done: u64, total: u64) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = last.0 != phase;
        if !is_new && (done <= last.1 || (done < total && done - last.1 < total / Self::STEPS)) {
            return;
        }
        *last = (phase, done);
        let unit = "bytes".into();
        // A reader that is slow misses a step.
        let _ = self.events.try_send(Event::Progress { phase: phase.into(), done, total, unit });
    }
}
