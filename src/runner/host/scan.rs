//! The source's looks at a VM's disks. The first reads all of them. While a VM moves its driver
//! notes where the guest writes, from before a look until the next one, so that every later look,
//! and above all the one the VM stands still for, reads only what changed. Whenever it is not
//! certain what did, a look reads all again.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::disk::{self, Scan};
use crate::hypervisor::{Ability, DiskChanges, DriverError, Period};
use crate::interface::chain;
use crate::migration::message::Seed;
use crate::migration::{Denial, DenialCode};
use crate::runner::{Shared, check};
use crate::types::{NodeHash, PackId, VmId};
use crate::vm::{ChunkMap, VmSpec};

use super::machine::DiskPaths;

/// How long a hypervisor that ends may take to let go of the disks.
const DISKS_FREE_WITHIN: Duration = Duration::from_secs(5);

/// A look at the disks, as the next one needs it.
#[derive(Clone, Default)]
pub struct Looked {
    /// The root disk, then the user-data disk if there is one. Empty before the first look.
    pub disks: Vec<Arc<Scan>>,
    /// The period of changes that began right before the disks were read.
    period: Option<Period>,
}

impl Looked {
    /// Bytes of the disks that were read.
    pub fn read_bytes(&self) -> u64 {
        self.disks.iter().map(|scan| scan.read_bytes).sum()
    }
}

/// What a look at the disks found.
pub struct Scanned {
    pub seed: Seed,
    pub nodes: HashSet<NodeHash>,
    pub looked: Looked,
    /// Packs of all components: a target may find one of its own damaged, too.
    pub packs: HashSet<PackId>,
}

/// An earlier look, and where the guest has written since it began.
pub struct Since {
    disks: Vec<Arc<Scan>>,
    changes: DiskChanges,
}

/// The next look at a VM that moves, after `before`; `last` once the VM is stopped.
pub async fn look(
    shared: Arc<Shared>,
    spec: VmSpec,
    disks: DiskPaths,
    before: Looked,
    last: bool,
) -> Result<Scanned, Denial> {
    let begun = Instant::now();
    if last {
        let disks = disks.clone();
        check::blocking(move || stands_still(&disks)).await?;
    }
    // First the period of changes, then the reading: what is written meanwhile is in one of them.
    let (period, changes) = next_period(&shared, spec.id, &before, last).await;
    let since = changes.map(|changes| Since { disks: before.disks, changes });
    let (by_changes, name) = (since.is_some(), spec.name.clone());
    let mut scanned = check::blocking(move || scan(&shared, &spec, &disks, since)).await?;
    scanned.looked.period = period;
    tracing::info!(
        vm = %name, last, by_changes, read_bytes = scanned.looked.read_bytes(),
        ms = begun.elapsed().as_millis() as u64, "disks scanned"
    );
    Ok(scanned)
}

/// Refuses where a hypervisor nobody knows of has a disk open: what it writes would be lost, and the
/// VM would run twice. Those we know of have ended by now, or are about to. Blocking.
fn stands_still(disks: &DiskPaths) -> Result<(), Denial> {
    let begun = Instant::now();
    for path in [&disks.root, &disks.user_data] {
        while disk::is_in_use(path).map_err(|e| Denial::new(DenialCode::Content, chain(&e)))? {
            if begun.elapsed() > DISKS_FREE_WITHIN {
                let why = format!("{} is in use by another process", path.display());
                return Err(Denial::new(DenialCode::Busy, why)
                    .next("end the process that has it open (fuser tells which), then move again"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}

/// Begins the next period, unless this is the last look, and tells what changed since the look
/// before, where that is known.
async fn next_period(
    shared: &Shared,
    vm: VmId,
    before: &Looked,
    last: bool,
) -> (Option<Period>, Option<DiskChanges>) {
    let (driver, first) = (&shared.driver, before.disks.is_empty());
    if !driver.features().abilities.contains(&Ability::TrackChanges) || (first && last) {
        return (None, None);
    }
    let told = if last {
        driver.end_tracking(vm, before.period).await.map(|changes| (None, changes))
    } else {
        driver.track_changes(vm, before.period).await.map(|(period, changes)| (Some(period), changes))
    };
    match told {
        Ok((period, changes)) => {
            if !first && changes.is_none() {
                tracing::info!(%vm, "what changed on its disks is not known; they are read whole again");
            }
            (period, changes)
        }
        Err(error) => {
            tracing::warn!(%vm, error = chain(&error), "what changes on its disks is not known; they are read whole");
            (None, None)
        }
    }
}

/// Hashes both disks, or what changed on them, and stores the chunk maps' nodes. Blocking.
pub fn scan(
    shared: &Shared,
    spec: &VmSpec,
    disks: &DiskPaths,
    since: Option<Since>,
) -> Result<Scanned, Denial> {
    let content = |e: &dyn std::error::Error| Denial::new(DenialCode::Content, chain(e));
    let mut nodes = HashSet::new();
    let mut found = Vec::new();
    let mut keep = |map: &ChunkMap| {
        let (name, hashes) = shared.repository.put_map(map).map_err(|e| content(&e))?;
        nodes.extend(hashes);
        Ok::<_, Denial>(name)
    };
    let root = match since.as_ref().and_then(|s| Some((s.disks.first()?, &s.changes.root))) {
        Some((before, changed)) => before.root_again(&disks.root, &disks.base, changed),
        None => Scan::root(&disks.root, &disks.base),
    };
    let root = root.map_err(|e| content(&e))?;
    let root_delta = keep(&root.map)?;
    found.push(Arc::new(root));
    let user_data = match spec.user_data_size.0 {
        0 => keep(&ChunkMap::empty(disk::USER_DATA_BLOCK_BYTES, 0))?,
        _ => {
            let user_data = match since.as_ref().and_then(|s| Some((s.disks.get(1)?, &s.changes.user_data))) {
                Some((before, changed)) => before.user_data_again(&disks.user_data, changed),
                None => Scan::user_data(&disks.user_data),
            };
            let user_data = user_data.map_err(|e| content(&e))?;
            let name = keep(&user_data.map)?;
            found.push(Arc::new(user_data));
            name
        }
    };
    let recipe = shared.repository.recipe(&spec.recipe).map_err(|e| content(&e))?;
    let mut packs = HashSet::new();
    for component in &recipe.components {
        let manifest = shared.repository.manifest(component).map_err(|e| content(&e))?;
        packs.extend(manifest.packs.iter().map(|p| p.id));
    }
    let looked = Looked { disks: found, period: None };
    Ok(Scanned { seed: Seed { root_delta, user_data }, nodes, looked, packs })
}

/// A VM's changes are of no interest any more.
pub async fn end_tracking(shared: &Shared, vm: VmId) {
    match shared.driver.end_tracking(vm, None).await {
        Ok(_) | Err(DriverError::UnknownVm { .. }) => {}
        Err(e) => tracing::warn!(%vm, error = chain(&e), "cannot end tracking the VM's changes"),
    }
}
