//! Existing disks become VMs' disks, and VMs' disks become files. Blocking.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::mpsc;

use crate::adopt::{self, AdoptError, Base, Disk, Findings, Job, VmDisk};
use crate::broker::effect::{DisksOf, Export};
use crate::compose::ImageFormat;
use crate::disk;
use crate::durable;
use crate::hypervisor::QemuConfig;
use crate::interface::{AdoptedView, Event, ExportedView, KnownFromView, Problem, ProblemKind, VmAdopt};
use crate::migration::records::VmRecord;
use crate::runner::content::catalogue;
use crate::runner::{Given, Shared};
use crate::types::{ByteSize, RecipeId, VmId, VmName};
use crate::vm::{DiskBus, Firmware, VmSpec};

use super::machine::{DiskPaths, paths_of};
use super::stage;

/// What the firmware of the guests here starts when nothing else is noted.
const LOADER: &str = "EFI/BOOT/BOOTX64.EFI";

/// An adoption whose VM has disks and lacks its record.
pub struct Adopted {
    pub record: VmRecord,
    pub base: Base,
}

/// Writes the disk of a stopped VM out.
pub fn export(
    shared: &Shared,
    export: &Export,
    given: &Given,
    events: &mpsc::Sender<Event>,
) -> Result<ExportedView, Problem> {
    let begun = Instant::now();
    let spec = &export.record.spec;
    let bad = |reason| Problem::new(ProblemKind::BadRequest, format!("VM {}", spec.name), reason);
    let format: ImageFormat = export.format.parse().map_err(bad)?;
    let paths = paths_of(shared, &DisksOf::record(&export.record));
    let disk = match export.user_data {
        true => VmDisk::UserData(paths.user_data),
        false => VmDisk::Root { overlay: paths.root, base: paths.base },
    };
    let output = given.output(&export.output);
    let write_out = |job: Job<'_>| {
        if let VmDisk::Root { .. } = disk {
            shared.composer.composition(&spec.recipe)?;
        }
        adopt::export(&disk, output, format, job)
    };
    let size_bytes = Reporter::new(events).run(write_out).map_err(|e| adopt_problem(&spec.name, &e))?;
    Ok(ExportedView {
        output: export.output.clone(),
        format: format.to_string(),
        size_bytes,
        elapsed_ms: begun.elapsed().as_millis() as u64,
    })
}

/// Reads the disk, makes its base and its root delta. On failure, or when the caller is gone, nothing is left.
pub fn take(
    shared: &Shared,
    id: VmId,
    adopt: &VmAdopt,
    given: &Given,
    events: &mpsc::Sender<Event>,
) -> Result<(AdoptedView, Option<Adopted>), Problem> {
    let reporter = Reporter::new(events);
    let (view, adopted) = reporter
        .run(|job| make(shared, id, adopt, given, job))
        .map_err(|e| adopt_problem(&adopt.name, &e))?;
    // Its operator left while the last bytes were written.
    if let Some(made) = adopted.as_ref().filter(|_| events.is_closed()) {
        undo(shared, id, Some(&made.base));
        return Err(adopt_problem(&adopt.name, &AdoptError::Cancelled));
    }
    Ok((view, adopted))
}

/// Reads the disk, makes its base and its root delta. Blocking; on failure nothing is left.
fn make(
    shared: &Shared,
    id: VmId,
    adopt: &VmAdopt,
    given: &Given,
    job: Job<'_>,
) -> Result<(AdoptedView, Option<Adopted>), AdoptError> {
    let invalid = |reason: String| AdoptError::NotADisk { path: PathBuf::from(&adopt.disk), reason };
    let format = match adopt.format.as_str() {
        "auto" => None,
        name => Some(name.parse::<ImageFormat>().map_err(invalid)?),
    };
    let hardware = &adopt.hardware;
    let mut spec = VmSpec {
        id,
        name: adopt.name.clone(),
        cpus: adopt.cpus,
        memory: adopt.memory,
        recipe: RecipeId::of(b""),
        root_size: ByteSize(0),
        user_data_size: ByteSize(0),
        nics: hardware.nics(id, &adopt.networks),
        architecture: adopt.architecture.clone(),
        cpu_model: hardware.cpu_model.clone().unwrap_or_else(|| shared.config.hypervisor.cpu_model.clone()),
        firmware: adopt.firmware,
        disk_bus: hardware.disk_bus,
        system_uuid: hardware.system_uuid,
    };
    // Before hours of reading.
    spec.check().map_err(invalid)?;
    let nvram = adopt.nvram.as_ref();
    let nvram = nvram.map(|path| read_nvram(shared, path, given.file(path), adopt.firmware));
    let nvram = nvram.transpose()?;
    let open = |path: &str| {
        let (file, path) = (given.file(path), Path::new(path));
        let temporary = shared.repository.temporary_dir();
        let source = match file {
            Some(file) => adopt::Source::opened(path, file, format, temporary, job)?,
            None => adopt::Source::open(path, format, temporary, job)?,
        };
        if format.is_none() {
            source.check_plausible()?;
        }
        Ok::<_, AdoptError>(source)
    };
    let user_data = adopt.user_data.as_ref().map(|path| open(path)).transpose()?;
    let found = adopt::examine_source(&shared.repository, open(&adopt.disk)?, job)?;
    let findings = found.findings();
    let mut view = view(&adopt.name, &findings);
    view.notes = notes(adopt, &findings, user_data.as_ref());
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
        if let Some(nvram) = &nvram {
            let path = DiskPaths::firmware_in(&dir);
            let failed = |source| AdoptError::Io { what: "write", path: path.clone(), source };
            durable::write_secret(&path, nvram).map_err(failed)?;
        }
        take_user_data(user_data.as_ref(), &paths, record, job)
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
    disk: Option<&adopt::Source>,
    paths: &DiskPaths,
    mut record: VmRecord,
    job: Job<'_>,
) -> Result<VmRecord, AdoptError> {
    if let Some(disk) = disk {
        record.spec.user_data_size = ByteSize(adopt::take_user_data_of(disk, &paths.user_data, job)?);
    }
    Ok(record)
}

/// The firmware's variables of the old machine; another firmware's do not fit this one.
fn read_nvram(
    shared: &Shared,
    path: &str,
    given: Option<&File>,
    firmware: Firmware,
) -> Result<Vec<u8>, AdoptError> {
    let path = Path::new(path);
    let refused = |reason: String| AdoptError::NotADisk { path: path.to_owned(), reason };
    if firmware != Firmware::Uefi {
        return Err(refused("BIOS has no NVRAM: give --nvram with --firmware uefi alone".into()));
    }
    let failed = |source| AdoptError::Io { what: "read", path: path.to_owned(), source };
    let template = shared.config.hypervisor.firmware_vars.clone();
    let template = template.unwrap_or_else(|| QemuConfig::default().firmware_vars);
    let expected = std::fs::metadata(&template).map_err(|source| AdoptError::Io {
        what: "read",
        path: template.clone(),
        source,
    })?;
    // What may never end is not opened.
    let found = given.map_or_else(|| std::fs::metadata(path), File::metadata).map_err(failed)?;
    if !found.is_file() || found.len() != expected.len() {
        return Err(refused(format!(
            "it has {} bytes where this cloud's firmware keeps {} in {}: it is another firmware's",
            found.len(),
            expected.len(),
            template.display()
        )));
    }
    let mut variables = vec![0; expected.len() as usize];
    let opened = given.map_or_else(|| File::open(path), File::try_clone).map_err(failed)?;
    opened.read_exact_at(&mut variables, 0).map_err(failed)?;
    Ok(variables)
}

/// Where the disk differs from what was asked for, and what does not come along.
fn notes(adopt: &VmAdopt, found: &Findings, user_data: Option<&adopt::Source>) -> Vec<String> {
    let mut notes = boot_notes(&found.disk, adopt.firmware, adopt.nvram.is_some());
    for (what, snapshots) in
        [("disk", &found.snapshots[..]), ("user data", user_data.map_or(&[][..], |s| s.snapshots()))]
    {
        if !snapshots.is_empty() {
            notes.push(format!("snapshots in the {what} file stay behind: {}", snapshots.join(", ")));
        }
    }
    let hardware = &adopt.hardware;
    let mut lost = vec!["graphics, sound and USB (a VM here has a serial console)"];
    if hardware.system_uuid.is_none() {
        lost.push("UUID (--uuid)");
    }
    if hardware.disk_bus == DiskBus::Virtio {
        lost.push("the disk's bus (it is virtio; --disk-bus)");
    }
    if hardware.macs.len() < adopt.networks.len() || adopt.networks.is_empty() {
        lost.push("MAC addresses (--mac)");
    }
    if hardware.card_models.is_empty() && !adopt.networks.is_empty() {
        lost.push("the model of its network cards (they are virtio; --card-model)");
    }
    if adopt.nvram.is_none() && adopt.firmware == Firmware::Uefi {
        lost.push("the firmware's variables (--nvram)");
    }
    if hardware.cpu_model.is_none() {
        lost.push("CPU model (--cpu-model)");
    }
    notes.push(format!("of the old machine do not come along: {}", lost.join(", ")));
    notes
}

/// Why a VM of this firmware may not start from the disk.
fn boot_notes(disk: &Disk, firmware: Firmware, has_nvram: bool) -> Vec<String> {
    let mut notes = Vec::new();
    let (fits, asked, other) = match firmware {
        Firmware::Uefi => (disk.boots_uefi, "UEFI", disk.boots_bios.then_some("bios")),
        Firmware::Bios => (disk.boots_bios, "BIOS", disk.boots_uefi.then_some("uefi")),
    };
    if !fits {
        let next = other.map_or(String::new(), |other| format!(": give --firmware {other}"));
        notes.push(format!("it shall start by {asked}, but on the disk: {}{next}", disk.boots()));
    } else if firmware == Firmware::Uefi && disk.loader.as_deref() != Some(LOADER) && !has_nvram {
        let found = disk.loader.as_deref().unwrap_or("none that firmware finds by itself");
        notes.push(format!(
            "it shall start by UEFI, which looks for the loader {LOADER}, but on the disk: {found}; the old \
             machine's --nvram may name another"
        ));
    }
    if disk.what.contains("sectors of 4096") {
        notes.push(
            "its table counts sectors of 4096 bytes, a VM's disk has sectors of 512: it is not found".into(),
        );
    }
    notes
}

/// Removes what an adoption made that did not become a VM.
fn undo(shared: &Shared, id: VmId, base: Option<&Base>) {
    let dir = shared.records.vm_dir(id);
    stage::scrub_dir(&dir.join("disks-1"));
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
        what: f.disk.what.clone(),
        boots: if f.disk.is_known || f.disk.boots_bios {
            f.disk.boots().to_owned()
        } else {
            "unknown".into()
        },
        notes: Vec::new(),
        component: None,
        vm: None,
    }
}

fn adopt_problem(name: &VmName, e: &AdoptError) -> Problem {
    let kind = match e {
        AdoptError::Repository(e) => return catalogue::repository_problem(e),
        AdoptError::Compose(e) => return catalogue::compose_problem(e),
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
        AdoptError::Damaged { .. } => ProblemKind::Damaged,
        AdoptError::Changed { .. } | AdoptError::InUse { .. } | AdoptError::Occupied { .. } => {
            ProblemKind::Conflict
        }
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
        let _ = self.events.try_send(Event::Progress { phase: phase.replace(' ', "-"), done, total, unit });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_does_not_start_as_asked_is_told() {
        let disk = |boots_bios, boots_uefi, loader: Option<&str>| Disk {
            what: "GPT, sectors of 512 bytes".into(),
            is_known: true,
            boots_bios,
            boots_uefi,
            loader: loader.map(str::to_owned),
            end_bytes: 0,
        };
        for (disk, firmware, has_nvram, expected) in [
            (disk(false, true, Some(LOADER)), Firmware::Uefi, false, None),
            (disk(true, false, None), Firmware::Bios, false, None),
            (disk(true, false, None), Firmware::Uefi, false, Some("--firmware bios")),
            (disk(false, true, None), Firmware::Bios, false, Some("--firmware uefi")),
            (disk(false, false, None), Firmware::Uefi, false, Some("nothing was found")),
            // As virtual machines that were installed by hand have it, and disks of other processors.
            (disk(true, true, None), Firmware::Uefi, false, Some("none that firmware finds")),
            (disk(false, true, Some("EFI/BOOT/BOOTAA64.EFI")), Firmware::Uefi, false, Some("BOOTAA64")),
            (disk(false, true, None), Firmware::Uefi, true, None),
        ] {
            let notes = boot_notes(&disk, firmware, has_nvram);
            assert_eq!(notes.len(), usize::from(expected.is_some()), "{notes:?}");
            assert!(expected.is_none_or(|words| notes[0].contains(words)), "{notes:?}");
        }
    }
}
