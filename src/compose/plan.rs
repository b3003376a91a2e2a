//! The plan of a disk: metadata bytes and extents, computed from the tree and the parameters alone.

use crate::component::DiskParameters;
use crate::component::tree::{Node, Tree};
use crate::types::{ByteSize, PackId};

use super::error::ComposeError;
use super::{esp, ext4, gpt};

/// Partitions begin and end on multiples of this, so that packs' blocks stay blocks in the image.
const ALIGNMENT_BYTES: u64 = 1 << 20;
/// The largest disk this composer lays out; more would need other ext4 features.
const VIRTUAL_SIZE_BYTES_MAX: u64 = 2 << 40;

/// A run of bytes that is the same in a pack and in the image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    pub pack: PackId,
    pub pack_offset_bytes: u64,
    pub image_offset_bytes: u64,
    pub len_bytes: u64,
}

/// All bytes of a disk that are not zero.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    pub virtual_size_bytes: u64,
    /// Offset and content, sorted; disjoint from each other and from the extents.
    pub metadata: Vec<(u64, Vec<u8>)>,
    /// Sorted by place in the image.
    pub extents: Vec<Extent>,
}

impl Plan {
    /// Bytes that come from nowhere else.
    pub fn metadata_bytes(&self) -> u64 {
        self.metadata.iter().map(|(_, b)| b.len() as u64).sum()
    }

    /// Bytes that will be allocated.
    pub fn data_bytes(&self) -> u64 {
        self.metadata_bytes() + self.extents.iter().map(|e| e.len_bytes).sum::<u64>()
    }
}

/// Lays out the whole disk: partition table, system partition, root file system.
pub fn plan(tree: &Tree, disk: &DiskParameters) -> Result<Plan, ComposeError> {
    if disk.virtual_size_bytes > VIRTUAL_SIZE_BYTES_MAX {
        let (size, limit) = (ByteSize(disk.virtual_size_bytes), ByteSize(VIRTUAL_SIZE_BYTES_MAX));
        return Err(ComposeError::TooLarge { size, limit });
    }
    let esp_start = ALIGNMENT_BYTES;
    let root_start = esp_start + disk.esp_size_bytes;
    let root_end = disk.virtual_size_bytes.saturating_sub(ALIGNMENT_BYTES);
    let (esp_files, root_files) = esp::split(tree);
    let too_small = || {
        let tried = root_end.saturating_sub(root_start);
        let need = (root_start + ALIGNMENT_BYTES).saturating_add(smallest_root(&root_files, disk, tried));
        ComposeError::TooSmall { size: ByteSize(disk.virtual_size_bytes), need: ByteSize(need) }
    };
    let size_bytes = root_end.checked_sub(root_start).filter(|s| *s > 0).ok_or_else(too_small)?;
    let root = ext4::layout(&root_files, disk, size_bytes)?.ok_or_else(too_small)?;
    let esp = esp::layout(&esp_files, disk)?;
    let mut metadata = gpt::write(disk, esp_start..root_start, root_start..root_end);
    let mut extents = Vec::with_capacity(root.extents.len() + esp.extents.len());
    for (start, partition) in [(esp_start, esp), (root_start, root)] {
        metadata.extend(partition.metadata.into_iter().map(|(at, bytes)| (start + at, bytes)));
        let moved = |e: Extent| Extent { image_offset_bytes: e.image_offset_bytes + start, ..e };
        extents.extend(partition.extents.into_iter().map(moved));
    }
    metadata.sort_by_key(|(at, _)| *at);
    Ok(Plan { virtual_size_bytes: disk.virtual_size_bytes, metadata, extents: joined(extents) })
}

/// A disk that is large enough for a tree; refused if there is none.
pub fn size_for(tree: &Tree) -> Result<ByteSize, ComposeError> {
    let limit = ByteSize(VIRTUAL_SIZE_BYTES_MAX);
    let root = ext4::size_estimate(&esp::split(tree).1);
    let size = root.saturating_add(root / 4).saturating_add(esp::size_for(tree));
    let size = size.saturating_add(4 * ALIGNMENT_BYTES) / ALIGNMENT_BYTES * ALIGNMENT_BYTES;
    if size > limit.0 {
        return Err(ComposeError::TooLarge { size: ByteSize(size), limit });
    }
    Ok(ByteSize(size))
}

/// The largest root file system of which it is tried whether less would do.
const TRIED_BYTES_MAX: u64 = 4 << 30;

/// The smallest root file system that holds `nodes`, known to be larger than `too_small_bytes`: found by trying,
/// down from an estimate that leaves room. The estimate itself where even that does not do.
fn smallest_root(nodes: &[&Node], disk: &DiskParameters, too_small_bytes: u64) -> u64 {
    let units = |bytes: u64| bytes / ALIGNMENT_BYTES;
    let fits = |n: u64| matches!(ext4::layout(nodes, disk, n * ALIGNMENT_BYTES), Ok(Some(_)));
    let estimate = ext4::size_estimate(nodes);
    // To lay out a large file system, if only to see whether it would do, takes memory by its size.
    if estimate > TRIED_BYTES_MAX {
        return estimate.div_ceil(ALIGNMENT_BYTES).saturating_mul(ALIGNMENT_BYTES);
    }
    let mut fit = units(estimate) + 1;
    let mut small = units(too_small_bytes).min(fit);
    if !fits(fit) {
        return fit.saturating_mul(ALIGNMENT_BYTES);
    }
    while fit - small > 1 {
        let middle = small + (fit - small) / 2;
        if fits(middle) { fit = middle } else { small = middle }
    }
    fit * ALIGNMENT_BYTES
}

/// Neighbours in both pack and image become one extent.
fn joined(mut extents: Vec<Extent>) -> Vec<Extent> {
    extents.sort_by_key(|e| e.image_offset_bytes);
    let mut out: Vec<Extent> = Vec::with_capacity(extents.len());
    for e in extents {
        match out.last_mut() {
            Some(last)
                if last.pack == e.pack
                    && last.pack_offset_bytes + last.len_bytes == e.pack_offset_bytes
                    && last.image_offset_bytes + last.len_bytes == e.image_offset_bytes =>
            {
                last.len_bytes += e.len_bytes;
            }
            _ => out.push(e),
        }
    }
    out
}

/// One partition, with offsets from its own beginning.
pub struct Partition {
    pub metadata: Vec<(u64, Vec<u8>)>,
    pub extents: Vec<Extent>,
}
