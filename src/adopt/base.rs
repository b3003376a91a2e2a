//! The base of an adopted disk: a component that lists where in which packs the disk's known blocks
//! lie, and the recipe that composes it. `repository/FORMAT.md`, section "Extent list".

use super::{AdoptError, Examined, Job};
use crate::component::extents::{BLOCK_BYTES, ENTRY};
use crate::component::manifest::Meta;
use crate::component::recipe::EPOCH_S;
use crate::component::{BlockExtent, Entry, EntryKind, ExtentList, Kind, Manifest, PackRef};
use crate::compose::{Composer, SEGMENT_BYTES};
use crate::repository::{ObjectId, Pin, Repository};
use crate::types::{ByteSize, ComponentId, Hash, PackId, RecipeId};

/// A base that is composed.
pub struct Base {
    pub component: ComponentId,
    /// `name@version` of the component.
    pub label: String,
    pub recipe: RecipeId,
    /// Whether it was composed for this; else another VM may use it.
    pub is_new: bool,
    /// Keeps everything until a VM's record names the recipe.
    pub kept: Pin,
}

pub fn make(
    disk: &Examined,
    repository: &Repository,
    composer: &Composer,
    architecture: &str,
    share: bool,
    job: Job<'_>,
) -> Result<Base, AdoptError> {
    let mut packs: Vec<(PackId, u64)> = disk
        .matching
        .blocks_of_packs()
        .keys()
        .map(|number| &disk.places.packs[*number as usize])
        .map(|pack| (pack.id, pack.size_bytes))
        .collect();
    // By id, so that equal disks and packs make equal components in any cloud.
    packs.sort();
    let number_of = |id: &PackId| packs.binary_search_by(|p| p.0.cmp(id)).map(|i| i as u32 + 1);
    let mut extents = Vec::with_capacity(disk.matching.extents.len());
    for e in &disk.matching.extents {
        // Every pack that is matched is in the list.
        if let Ok(pack) = number_of(&disk.places.packs[e.pack as usize].id) {
            extents.push(BlockExtent { pack, ..*e });
        }
    }
    let mut pins = Vec::new();
    let residue = if share { write_residue(disk, repository, job)? } else { None };
    if let Some((id, size_bytes, runs)) = residue {
        pins.push(repository.pin(vec![ObjectId::Pack(id)]));
        let pack = packs.len() as u32 + 1;
        packs.push((id, size_bytes));
        extents.extend(runs.into_iter().map(|run| BlockExtent { pack, ..run }));
        extents.sort_by_key(|e| e.disk_block);
    }
    let list = ExtentList { disk_size_bytes: disk.segments.size_bytes(), extents };
    let bytes = list.encode();
    let sizes: Vec<u64> = [BLOCK_BYTES].into_iter().chain(packs.iter().map(|p| p.1)).collect();
    list.check(&sizes).map_err(|_| AdoptError::Scattered)?;

    let mut writer = repository.pack_writer()?;
    let (offset_bytes, hash) = writer.append(&mut bytes.as_slice(), bytes.len() as u64)?;
    let Some((list_pack, list_size)) = writer.finish()? else { return Err(AdoptError::Scattered) };
    let reference = |(id, size_bytes): (PackId, u64), package: &str| PackRef {
        id,
        size_bytes,
        package: package.to_owned(),
        package_version: "1".into(),
    };
    let mut references = vec![reference((list_pack, list_size), ENTRY)];
    references.extend(packs.iter().map(|p| reference(*p, "content")));
    let mut identity = bytes.clone();
    packs.iter().for_each(|(id, _)| identity.extend_from_slice(id.as_bytes()));
    let manifest = Manifest {
        name: format!("adopted-{}", &Hash::of(&identity).to_string()[..16]),
        version: "1".into(),
        kind: Kind::Format,
        architecture: architecture.to_owned(),
        origin: "adopted disk".into(),
        licences: Vec::new(),
        requires: Vec::new(),
        conflicts: Vec::new(),
        packs: references,
        entries: vec![Entry {
            path: ENTRY.into(),
            meta: Meta { mode: 0o444, uid: 0, gid: 0, mtime_s: EPOCH_S },
            xattrs: Vec::new(),
            kind: EntryKind::File { size_bytes: bytes.len() as u64, hash, pack: 0, offset_bytes },
        }],
        fragments: Vec::new(),
    };
    let id = manifest.id();
    let kept = repository.pin(vec![ObjectId::Manifest(id)]);
    repository.put_manifest(&manifest)?;
    job.check()?;
    let composed: Vec<RecipeId> =
        repository.recipes()?.into_iter().filter(|r| composer.is_composed(r)).collect();
    let progress = |done, total| (job.progress)("compose", done, total);
    let (recipe, _) = composer.make_extents_recipe(&id, ByteSize(list.disk_size_bytes), &progress)?;
    let is_new = !composed.contains(&recipe);
    // Renews the age of one that was there, so that the collector leaves it until the VM is.
    composer.composition(&recipe)?;
    if share {
        repository.bind_component(&manifest, id)?;
    }
    drop((kept, pins));
    let kept = repository.pin(vec![ObjectId::Recipe(recipe), ObjectId::Manifest(id)]);
    Ok(Base { component: id, label: format!("{}@{}", manifest.name, manifest.version), recipe, is_new, kept })
}

/// Makes a pack of everything that is not known, with the runs it consists of (their pack is 0 still).
#[allow(clippy::type_complexity)]
fn write_residue(
    disk: &Examined,
    repository: &Repository,
    job: Job<'_>,
) -> Result<Option<(PackId, u64, Vec<BlockExtent>)>, AdoptError> {
    let runs = disk.matching.residue_runs(&disk.blocks);
    let total_bytes: u64 = runs.iter().map(|r| r.1 * BLOCK_BYTES).sum();
    let mut writer = repository.pack_writer()?;
    let mut buffer = vec![0; SEGMENT_BYTES as usize];
    let mut held: Option<usize> = None;
    let mut extents = Vec::with_capacity(runs.len());
    for (first, count) in runs {
        let pack_block = writer.size_bytes() / BLOCK_BYTES;
        extents.push(BlockExtent { disk_block: first, pack: 0, pack_block, blocks: count });
        let (mut at, end) = (first * BLOCK_BYTES, (first + count) * BLOCK_BYTES);
        while at < end {
            let segment = (at / SEGMENT_BYTES) as usize;
            if held != Some(segment) {
                job.check()?;
                (job.progress)("pack", writer.size_bytes(), total_bytes);
                // It was not zeros a moment ago.
                if disk.segments.read(segment, &mut buffer)?.is_none() {
                    return Err(AdoptError::Changed { path: disk.segments.path().to_owned() });
                }
                held = Some(segment);
            }
            let range = disk.segments.range(segment);
            let until = end.min(range.end);
            let piece = &buffer[(at - range.start) as usize..(until - range.start) as usize];
            writer.append(&mut &*piece, piece.len() as u64)?;
            at = until;
        }
    }
    Ok(writer.finish()?.map(|(id, size_bytes)| (id, size_bytes, extents)))
}
