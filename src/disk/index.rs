//! Where the blocks of a disk lie, so that they can be served by hash.

use super::{DiskError, DiskFile, DiskImage, ROOT_BLOCK_BYTES, USER_DATA_BLOCK_BYTES, staged_map};
use crate::types::BlockHash;
use crate::vm::{Block, ChunkMap};

/// Finds the blocks of one disk by hash: of a VM's disk at the source, or of an old copy at a site
/// the VM comes back to. Twelve bytes a block. It never vouches for what the disk held when it was
/// made: every block is hashed again when read.
#[derive(Debug)]
pub struct BlockIndex {
    image: DiskImage,
    block_size_bytes: u32,
    /// Sorted.
    places: Vec<Place>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Place {
    prefix: [u8; 8],
    /// A disk has at most 2^32 blocks: 16 TiB of 4 KiB.
    number: u32,
}

/// A block may lie in many places; when the guest overwrote so many of them, it is called changed.
const PLACES_TRIED_MAX: usize = 16;

impl BlockIndex {
    /// Indexes a disk whose map is known.
    pub fn of_map(image: DiskImage, map: &ChunkMap) -> Result<Self, DiskError> {
        let wrong = |reason| DiskError::WrongMap { path: image.path().to_owned(), reason };
        if map.disk_size_bytes != image.size_bytes() {
            return Err(wrong(format!(
                "the map is of a disk of {} bytes, the disk has {}",
                map.disk_size_bytes,
                image.size_bytes()
            )));
        }
        let mut places = Vec::new();
        for (number, block) in &map.blocks {
            if let Block::Data(hash) = block {
                let number = u32::try_from(*number).map_err(|_| wrong(format!("it has a block {number}")))?;
                places.push(Place { prefix: prefix(hash), number });
            }
        }
        places.sort_unstable();
        places.shrink_to_fit();
        Ok(Self { image, block_size_bytes: map.block_size_bytes, places })
    }

    /// Indexes a disk by what it held when it was last staged; `None` if that is not recorded.
    pub(super) fn as_staged(disk: &DiskFile) -> Option<Self> {
        let image = disk.open().ok()?;
        let block_size_bytes = match disk {
            DiskFile::Root { .. } => ROOT_BLOCK_BYTES,
            DiskFile::UserData { .. } => USER_DATA_BLOCK_BYTES,
        };
        let map = staged_map::load_stale(disk.path(), block_size_bytes, image.size_bytes())?;
        Self::of_map(image, &map).ok()
    }

    /// Blocks of data, each place counted.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Whether the disk had the block when it was indexed; [`Self::read_block`] may still fail.
    pub fn contains(&self, hash: &BlockHash) -> bool {
        self.places(hash).next().is_some()
    }

    /// The block's bytes, right by its hash. [`DiskError::Changed`] if the guest has overwritten it
    /// since, [`DiskError::UnknownBlock`] if it was never there.
    pub fn read_block(&self, hash: &BlockHash) -> Result<Vec<u8>, DiskError> {
        let mut seen = false;
        for place in self.places(hash).take(PLACES_TRIED_MAX) {
            seen = true;
            let offset = u64::from(place.number) * u64::from(self.block_size_bytes);
            let left = self.image.size_bytes().saturating_sub(offset);
            let mut block = vec![0; left.min(self.block_size_bytes.into()) as usize];
            self.image.read_at(offset, &mut block)?;
            if BlockHash::of(&block) == *hash {
                return Ok(block);
            }
        }
        let (path, hash) = (self.image.path().to_owned(), *hash);
        Err(if seen { DiskError::Changed { path, hash } } else { DiskError::UnknownBlock { path, hash } })
    }

    fn places(&self, hash: &BlockHash) -> impl Iterator<Item = &Place> {
        let prefix = prefix(hash);
        let first = self.places.partition_point(|p| p.prefix < prefix);
        self.places[first..].iter().take_while(move |p| p.prefix == prefix)
    }
}

fn prefix(hash: &BlockHash) -> [u8; 8] {
    let mut prefix = [0; 8];
    prefix.copy_from_slice(&hash.as_bytes()[..8]);
    prefix
}
