//! The plan of a disk: metadata bytes and extents, computed from the tree and the parameters alone.

use crate::component::DiskParameters;
use crate::component::tree::Tree;
use crate::types::{ByteSize, PackId};

use super::error::ComposeError;
use super::{esp, ext4, gpt};

/// Partitions begin on multiples of this; so do the disk's end and every size.
pub const ALIGNMENT_BYTES: u64 = 1 << 20;

/// A run of whole 4 KiB blocks that is the same in a pack and in the image.
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
    /// Offset and content; disjoint from each other and from the extents.
    pub metadata: Vec<(u64, Vec<u8>)>,
    pub extents: Vec<Extent>,
}

impl Plan {
    /// Bytes that will be allocated.
    pub fn data_bytes(&self) -> u64 {
        self.metadata.iter().map(|(_, b)| b.len() as u64).sum::<u64>()
            + self.extents.iter().map(|e| e.len_bytes).sum::<u64>()
    }
}

pub fn plan(tree: &Tree, disk: &DiskParameters) -> Result<Plan, ComposeError> {
    let esp_start = ALIGNMENT_BYTES;
    let root_start = esp_start + disk.esp_size_bytes;
    let root_end = disk.virtual_size_bytes.saturating_sub(ALIGNMENT_BYTES);
    let content: u64 = tree
        .nodes
        .iter()
        .map(|n| match &n.kind {
            crate::component::tree::NodeKind::File { size_bytes, .. } => size_bytes.next_multiple_of(4096),
            _ => 512,
        })
        .sum();
    // Journal, tables and a little room to live.
    let need = root_start + content + content / 16 + (96 << 20);
    if root_end <= root_start || root_end < need {
        return Err(ComposeError::TooSmall { size: ByteSize(disk.virtual_size_bytes), need: ByteSize(need) });
    }
    let mut metadata = gpt::write(disk, esp_start..root_start, root_start..root_end);
    let (esp_files, root_files) = esp::split(tree);
    let esp = esp::layout(&esp_files, disk)?;
    metadata.extend(esp.metadata.into_iter().map(|(at, bytes)| (esp_start + at, bytes)));
    let mut extents: Vec<Extent> = esp.extents;
    extents.iter_mut().for_each(|e| e.image_offset_bytes += esp_start);

    let root = ext4::layout(&root_files, disk, root_end - root_start)?;
    metadata.extend(root.metadata.into_iter().map(|(at, bytes)| (root_start + at, bytes)));
    extents.extend(
        root.extents
            .into_iter()
            .map(|e| Extent { image_offset_bytes: e.image_offset_bytes + root_start, ..e }),
    );
    metadata.sort_by_key(|(at, _)| *at);
    Ok(Plan { virtual_size_bytes: disk.virtual_size_bytes, metadata, extents: joined(extents) })
}

/// Neighbours in both pack and image become one extent.
fn joined(mut extents: Vec<Extent>) -> Vec<Extent> {
    extents.sort_by_key(|e| (e.pack, e.pack_offset_bytes, e.image_offset_bytes));
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
