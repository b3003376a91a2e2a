//! A VM's files on this host, and bringing it up.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::broker::effect::{Allocated, DisksOf};
use crate::broker::{READY_LINE, RUN_DIR};
use crate::disk;
use crate::hypervisor::{DiskFormat, Machine};
use crate::interface::{Problem, ProblemKind, VmCreate};
use crate::migration::records::VmRecord;
use crate::runner::Shared;
use crate::runner::content::catalogue;
use crate::types::{ByteSize, ComponentId, VmId};
use crate::vm::{PowerState, VmSpec};

const ROOT_FILE: &str = "root.qcow2";
const USER_DATA_FILE: &str = "user-data.raw";

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

/// Where the disks of a VM lie.
pub fn paths_of(shared: &Shared, disks: &DisksOf) -> DiskPaths {
    let dir = shared.records.vm_dir(disks.vm).join(&disks.disks);
    DiskPaths::in_dir(&dir, shared.composer.path_of(&disks.recipe))
}

/// The machine that a record describes.
pub fn machine_of(shared: &Shared, record: &VmRecord) -> Machine {
    let disks = paths_of(shared, &DisksOf::record(record));
    let dir = shared.records.vm_dir(record.spec.id);
    Machine {
        root_format: DiskFormat::Qcow2,
        root_disk: disks.root,
        base: Some(disks.base),
        user_data_disk: (record.spec.user_data_size.0 > 0).then_some(disks.user_data),
        firmware_vars: DiskPaths::firmware_in(&dir.join(&record.disks)),
        state_dir: dir.join(RUN_DIR),
        spec: record.spec.clone(),
    }
}

/// Makes disks larger. A size that an earlier try gave them already is no fault. Blocking.
pub fn grow(
    shared: &Shared,
    record: &VmRecord,
    root: Option<ByteSize>,
    user_data: Option<ByteSize>,
) -> Result<(), Problem> {
    let paths = paths_of(shared, &DisksOf::record(record));
    let has_user_data = record.spec.user_data_size.0 > 0;
    let grown = root.map_or(Ok(()), |size| disk::grow_overlay(&paths.root, size.0)).and_then(|()| {
        match user_data {
            None => Ok(()),
            Some(size) if has_user_data => disk::grow_user_data(&paths.user_data, size.0),
            Some(size) if size.0 > 0 => match disk::create_user_data(&paths.user_data, size.0) {
                // An earlier try was cut short before the record said so.
                Err(disk::DiskError::Exists { .. }) => disk::grow_user_data(&paths.user_data, size.0),
                made => made,
            },
            Some(_) => Ok(()),
        }
    });
    grown.map_err(|e| Problem::from_error(ProblemKind::Failed, format!("VM {}", record.spec.name), &e))
}

/// Ends a VM's hypervisor, scrubs its disks, forgets its record.
pub async fn remove(shared: &Arc<Shared>, record: VmRecord) -> Result<(), Problem> {
    let (id, name) = (record.spec.id, record.spec.name.clone());
    let undefined = shared.driver.undefine(id).await;
    let scrubber = shared.clone();
    let work = tokio::task::spawn_blocking(move || {
        let kept = record.kept.iter().map(|copy| &copy.disks);
        for disks in kept.chain([&record.disks]) {
            super::stage::scrub_dir(&scrubber.records.vm_dir(id).join(disks));
        }
        scrubber.records.remove_vm(id)
    });
    let object = format!("VM {name}");
    match (undefined, work.await) {
        (Err(e), _) => Err(Problem::from_driver(name.as_str(), &e)),
        (_, Ok(Err(e))) => Err(Problem::from_error(ProblemKind::Failed, object, &e)),
        (_, Err(e)) => Err(Problem::new(ProblemKind::Failed, object, e.to_string())),
        (Ok(()), Ok(Ok(()))) => Ok(()),
    }
}

/// What disks take up, holes left out (`stat(2)`: blocks of 512 bytes); zero where there are none.
pub fn allocated(shared: &Shared, disks: &DisksOf) -> Allocated {
    let paths = paths_of(shared, disks);
    let bytes = |path: &Path| std::fs::metadata(path).map_or(0, |m| m.blocks().saturating_mul(512));
    Allocated { root_bytes: bytes(&paths.root), user_data_bytes: bytes(&paths.user_data) }
}

/// Composes, makes the disks and the record of a new VM. Blocking.
pub fn make_vm(shared: &Shared, id: VmId, create: VmCreate) -> Result<VmRecord, Problem> {
    let object = format!("VM {}", create.name);
    let failed =
        |e: &(dyn std::error::Error + 'static)| Problem::from_error(ProblemKind::Failed, object.clone(), e);
    let ids: Vec<ComponentId> = catalogue::resolve(&shared.repository, &create.components)?;
    let (recipe_id, recipe) = shared
        .composer
        .make_recipe(&ids, create.ordered, create.root_size, &create.kernel_command_line)
        .map_err(|e| catalogue::compose_problem(&e))?;
    let hardware = *create.hardware;
    let spec = VmSpec {
        id,
        name: create.name,
        cpus: create.cpus,
        memory: create.memory,
        recipe: recipe_id,
        root_size: ByteSize(recipe.disk.virtual_size_bytes),
        user_data_size: create.user_data_size,
        nics: hardware.nics(id, &create.networks),
        architecture: catalogue::architecture(&shared.repository, &ids)?,
        cpu_model: hardware.cpu_model.unwrap_or_else(|| shared.config.hypervisor.cpu_model.clone()),
        firmware: crate::vm::Firmware::Uefi,
        disk_bus: hardware.disk_bus,
        system_uuid: hardware.system_uuid,
    };
    spec.check().map_err(|reason| {
        Problem::new(ProblemKind::BadRequest, object.clone(), reason).next("see 'cicada vm create --help'")
    })?;
    let record = VmRecord::new(spec, catalogue::names(&shared.repository, &ids)?, "disks-1", shared.now());
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
/// Makes sure the composition is there and is the right one, then starts the VM.
pub async fn run_machine(shared: &Arc<Shared>, machine: &Machine) -> Result<(), Problem> {
    let name = machine.spec.name.as_str();
    let object = format!("VM {name}");
    // What runs may have another name or shape than its next start will give it: it runs on as it is.
    if shared.driver.state(machine.spec.id).is_ok_and(|s| s == PowerState::Running) {
        return Ok(());
    }
    let (composer, recipe) = (shared.composer.clone(), machine.spec.recipe);
    let composed = tokio::task::spawn_blocking(move || composer.composition(&recipe).map(drop)).await;
    match composed {
        Ok(Ok(())) => {}
        Ok(Err(e)) => {
            let problem = catalogue::compose_problem(&e);
            return Err(Problem { object, ..problem });
        }
        Err(e) => return Err(Problem::new(ProblemKind::Failed, object, e.to_string())),
    }
    shared.driver.start(machine).await.map_err(|e| Problem::from_driver(name, &e))
}
