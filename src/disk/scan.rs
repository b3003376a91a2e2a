//! From a disk to its chunk map: what the guest wrote, by hash.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use rayon::iter::{ParallelBridge, ParallelIterator};

use super::error::io_error;
use super::mapping::Mapping;
use super::{BlockIndex, DiskError, DiskImage, ROOT_BLOCK_BYTES, USER_DATA_BLOCK_BYTES};
use crate::sparse::is_zero;
use crate::types::BlockHash;
use crate::vm::{Block, ChunkMap};

/// Threads that read and hash. The VM itself runs on the same machine, so not all of it.
const THREADS: usize = 2;

/// Bytes a thread reads at once, and takes on at once.
const UNIT_BYTES: u64 = 1 << 20;

/// One look at a disk: what was found, and what the next look needs to know of this one.
#[derive(Debug)]
pub struct Scan {
    pub map: Arc<ChunkMap>,
    /// Where the blocks lie.
    pub index: Arc<BlockIndex>,
    /// Bytes of the disk that were read for it, not counting holes and the composition below.
    pub read_bytes: u64,
    /// What the tables said before the first block was read.
    mapping: Mapping,
}

impl Scan {
    /// Reads all a guest may have written to a root disk, see [`scan_root`].
    pub fn root(overlay: &Path, base: &Path) -> Result<Self, DiskError> {
        Self::whole(DiskImage::overlay(overlay, base)?, ROOT_BLOCK_BYTES)
    }

    /// Reads a whole user-data disk, see [`scan_user_data`].
    pub fn user_data(path: &Path) -> Result<Self, DiskError> {
        Self::whole(DiskImage::raw(path)?, USER_DATA_BLOCK_BYTES)
    }

    /// As [`Self::root`], reading only what may have changed since this look at the same disk.
    /// `changed` must cover every byte written since before this look began (of what was written
    /// earlier, QEMU may have kept the mapping to itself: that is found here). A disk of another
    /// size is read whole.
    pub fn root_again(&self, overlay: &Path, base: &Path, changed: &[Range<u64>]) -> Result<Self, DiskError> {
        self.again(DiskImage::overlay(overlay, base)?, changed)
    }

    /// As [`Self::root_again`], of a user-data disk.
    pub fn user_data_again(&self, path: &Path, changed: &[Range<u64>]) -> Result<Self, DiskError> {
        self.again(DiskImage::raw(path)?, changed)
    }

    pub(super) fn whole(image: DiskImage, block_size_bytes: u32) -> Result<Self, DiskError> {
        let mapping = image.mapping()?;
        let read = hash_blocks(&image, image.written(&mapping), block_size_bytes)?;
        Self::of(image, block_size_bytes, read.blocks, read.bytes, mapping)
    }

    fn again(&self, image: DiskImage, changed: &[Range<u64>]) -> Result<Self, DiskError> {
        let (size, block_size_bytes) = (image.size_bytes(), self.map.block_size_bytes);
        if size != self.map.disk_size_bytes {
            return Self::whole(image, block_size_bytes);
        }
        let mapping = image.mapping()?;
        let mut suspects = mapping.differences(&self.mapping);
        suspects.extend(changed.iter().cloned());
        let suspects = whole_blocks(suspects, size, block_size_bytes.into());
        let read = hash_blocks(&image, suspects.iter().cloned().map(Ok), block_size_bytes)?;
        let mut left = suspects.as_slice();
        let is_unchanged = |(number, _): &&(u64, Block)| {
            let at = number * u64::from(block_size_bytes);
            while let Some((first, rest)) = left.split_first()
                && first.end <= at
            {
                left = rest;
            }
            left.first().is_none_or(|suspect| at < suspect.start)
        };
        let mut blocks: Vec<_> = self.map.blocks.iter().filter(is_unchanged).copied().collect();
        blocks.extend(read.blocks);
        blocks.sort_unstable_by_key(|(number, _)| *number);
        Self::of(image, block_size_bytes, blocks, read.bytes, mapping)
    }

    fn of(
        image: DiskImage,
        block_size_bytes: u32,
        blocks: Vec<(u64, Block)>,
        read_bytes: u64,
        mapping: Mapping,
    ) -> Result<Self, DiskError> {
        let map = ChunkMap { block_size_bytes, disk_size_bytes: image.size_bytes(), blocks };
        let index = BlockIndex::of_map(image, &map)?;
        Ok(Self { map: Arc::new(map), index: Arc::new(index), read_bytes, mapping })
    }
}

/// The root delta of an overlay at 4 KiB: a block that equals the composition is absent, one of
/// zeros over something else is `Zero`, any other is data. Beside a running VM the result may be
/// stale, see [`super::qcow2`].
pub fn scan_root(overlay: &Path, base: &Path) -> Result<(ChunkMap, BlockIndex), DiskError> {
    scan(DiskImage::overlay(overlay, base)?, ROOT_BLOCK_BYTES)
}

/// The blocks of a composition, in the size of a root delta's: what a guest copied or moved about
/// is often still there.
pub fn scan_base(base: &Path) -> Result<BlockIndex, DiskError> {
    scan(DiskImage::raw(base)?, ROOT_BLOCK_BYTES).map(|(_, index)| index)
}

/// The chunk map of a user-data disk: a block of zeros is absent, holes are not read.
pub fn scan_user_data(path: &Path) -> Result<(ChunkMap, BlockIndex), DiskError> {
    scan(DiskImage::raw(path)?, USER_DATA_BLOCK_BYTES)
}

pub(super) fn scan(image: DiskImage, block_size_bytes: u32) -> Result<(ChunkMap, BlockIndex), DiskError> {
    let map = chunk_map_of(&image, block_size_bytes)?;
    let index = BlockIndex::of_map(image, &map)?;
    Ok((map, index))
}

pub(super) fn chunk_map_of(image: &DiskImage, block_size_bytes: u32) -> Result<ChunkMap, DiskError> {
    let blocks = hash_blocks(image, image.written(&image.mapping()?), block_size_bytes)?.blocks;
    Ok(ChunkMap { block_size_bytes, disk_size_bytes: image.size_bytes(), blocks })
}

struct Read {
    /// Those that are not as below, ascending.
    blocks: Vec<(u64, Block)>,
    bytes: u64,
}

/// Reads and hashes the blocks that ascending ranges touch.
fn hash_blocks(
    image: &DiskImage,
    ranges: impl Iterator<Item = Result<Range<u64>, DiskError>> + Send,
    block_size_bytes: u32,
) -> Result<Read, DiskError> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(THREADS)
        .thread_name(|n| format!("disk-scan-{n}"))
        .build()
        .map_err(|e| io_error("start threads to scan", image.path())(std::io::Error::other(e)))?;
    let units = Units::new(ranges, image.size_bytes(), block_size_bytes.into());
    let parts: Result<Vec<Read>, DiskError> = pool.install(|| {
        units
            .par_bridge()
            .map_init(Buffers::new, |buffers, unit| {
                let mut part = Read { blocks: Vec::new(), bytes: 0 };
                for range in unit? {
                    part.bytes += range.end - range.start;
                    buffers.hash_range(image, range, block_size_bytes.into(), &mut part.blocks)?;
                }
                Ok(part)
            })
            .collect()
    });
    let mut read = Read { blocks: Vec::new(), bytes: 0 };
    for part in parts? {
        read.blocks.extend(part.blocks);
        read.bytes += part.bytes;
    }
    read.blocks.sort_unstable_by_key(|(number, _)| *number);
    Ok(read)
}

/// The blocks that any ranges touch, as ranges, ascending and apart.
fn whole_blocks(mut ranges: Vec<Range<u64>>, disk_size_bytes: u64, block_size_bytes: u64) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut whole: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        let start = range.start / block_size_bytes * block_size_bytes;
        let end = range.end.min(disk_size_bytes).next_multiple_of(block_size_bytes).min(disk_size_bytes);
        match whole.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ if range.is_empty() || start >= end => {}
            _ => whole.push(start..end),
        }
    }
    whole
}

/// What one thread reads into.
struct Buffers {
    above: Vec<u8>,
    below: Vec<u8>,
}

impl Buffers {
    fn new() -> Self {
        Self { above: vec![0; UNIT_BYTES as usize], below: vec![0; UNIT_BYTES as usize] }
    }

    /// Appends the blocks of a range of at most `UNIT_BYTES` that begins at a block.
    fn hash_range(
        &mut self,
        image: &DiskImage,
        range: Range<u64>,
        block_size_bytes: u64,
        blocks: &mut Vec<(u64, Block)>,
    ) -> Result<(), DiskError> {
        let len = (range.end - range.start) as usize;
        let (above, below) = (&mut self.above[..len], &mut self.below[..len]);
        image.read_at(range.start, above)?;
        let zero_below = image.is_zero_below();
        if !zero_below {
            image.read_below(range.start, below)?;
        }
        let size = block_size_bytes as usize;
        let numbers = range.start / block_size_bytes..;
        for ((number, above), below) in numbers.zip(above.chunks(size)).zip(below.chunks(size)) {
            let zero = is_zero(above);
            if if zero_below { zero } else { above == below } {
                continue;
            }
            blocks.push((number, if zero { Block::Zero } else { Block::Data(BlockHash::of(above)) }));
        }
        Ok(())
    }
}

/// Cuts ascending byte ranges into ranges of whole blocks, none twice, and gathers them into units of work.
struct Units<I> {
    written: I,
    disk_size_bytes: u64,
    block_size_bytes: u64,
    /// What is left of a range that did not fit the last unit.
    rest: Range<u64>,
    failed: bool,
}

impl<I: Iterator<Item = Result<Range<u64>, DiskError>>> Units<I> {
    fn new(written: I, disk_size_bytes: u64, block_size_bytes: u64) -> Self {
        Self { written, disk_size_bytes, block_size_bytes, rest: 0..0, failed: false }
    }
}

impl<I: Iterator<Item = Result<Range<u64>, DiskError>>> Iterator for Units<I> {
    type Item = Result<Vec<Range<u64>>, DiskError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut unit: Vec<Range<u64>> = Vec::new();
        let mut room = UNIT_BYTES;
        while room > 0 && !self.failed {
            if self.rest.is_empty() {
                match self.written.next() {
                    None => break,
                    Some(Err(e)) => {
                        self.failed = true;
                        return Some(Err(e));
                    }
                    Some(Ok(range)) => {
                        let size = self.block_size_bytes;
                        // Runs smaller than a block may share one that was taken already.
                        let start = (range.start / size * size).max(self.rest.end);
                        let end = range.end.next_multiple_of(size).min(self.disk_size_bytes);
                        self.rest = start..end.max(start);
                        continue;
                    }
                }
            }
            let part = self.rest.start..self.rest.end.min(self.rest.start + room);
            self.rest.start = part.end;
            // The short last block of a disk counts whole, so units stay aligned.
            room -= (part.end - part.start).next_multiple_of(self.block_size_bytes).min(room);
            match unit.last_mut() {
                Some(last) if last.end == part.start => last.end = part.end,
                _ => unit.push(part),
            }
        }
        (!unit.is_empty()).then_some(Ok(unit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{OverlayWriter, UserDataDisk, create_user_data};

    #[test]
    fn units_cover_every_touched_block_once() {
        let ranges: [Range<u64>; 6] =
            [0..512, 1024..1536, 8192..8704, 12_000..13_000, 16_384..3 << 20, (4 << 20)..(4 << 20) + 100];
        let units = Units::new(ranges.into_iter().map(Ok), (4 << 20) + 100, 4096);
        let units: Vec<_> = units.map(Result::unwrap).collect();
        assert!(units.iter().all(|u| u.iter().map(|r| r.end - r.start).sum::<u64>() <= UNIT_BYTES));
        let all: Vec<u64> = units.concat().into_iter().flat_map(|r| r.step_by(4096)).collect();
        let expected: Vec<u64> =
            [0, 8192, 12_288].into_iter().chain((16_384..3 << 20).step_by(4096)).chain([4 << 20]).collect();
        assert_eq!(all, expected);
    }

    #[test]
    fn a_root_delta_is_told_against_its_base() {
        let dir = tempfile::tempdir().unwrap();
        let (base, overlay) = (dir.path().join("base"), dir.path().join("overlay"));
        let size = 1 << 20;
        std::fs::write(&base, [9; 512 << 10]).unwrap();
        let mut writer = OverlayWriter::open_or_create(&overlay, &base, size).unwrap();
        writer.write_block(1, &[9; 4096]).unwrap(); // as the base
        writer.write_block(2, &[5; 4096]).unwrap();
        writer.write_zero(3).unwrap();
        writer.write_block(4, &[0; 4096]).unwrap(); // zeros, written out
        writer.write_zero(200).unwrap(); // beyond the base there are zeros anyway
        writer.write_block(255, &[5; 4096]).unwrap();
        writer.finish().unwrap();
        let (map, index) = scan_root(&overlay, &base).unwrap();
        let five = Block::Data(BlockHash::of(&[5; 4096]));
        assert_eq!(map.blocks, [(2, five), (3, Block::Zero), (4, Block::Zero), (255, five)]);
        assert_eq!(map.disk_size_bytes, size);

        let hash = BlockHash::of(&[5; 4096]);
        assert_eq!(index.read_block(&hash).unwrap(), [5; 4096]);
        writer.write_block(2, &[6; 4096]).unwrap();
        assert_eq!(index.read_block(&hash).unwrap(), [5; 4096], "the second place still has it");
        writer.discard(255).unwrap();
        assert!(matches!(index.read_block(&hash), Err(DiskError::Changed { .. })));
        let other = BlockHash::of(b"other");
        assert!(matches!(index.read_block(&other), Err(DiskError::UnknownBlock { .. })));
    }

    #[test]
    fn user_data_is_scanned_by_what_is_not_zero() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let (size, block) = (100_000, u64::from(USER_DATA_BLOCK_BYTES));
        create_user_data(&path, size).unwrap();
        let disk = UserDataDisk::open(&path, size).unwrap();
        disk.write_at(block, &[1; 100]).unwrap();
        disk.write_at(3 * block, &[0; 5000]).unwrap();
        disk.write_at(size - 1, &[2]).unwrap();
        let (map, index) = scan_user_data(&path).unwrap();
        assert_eq!(map.blocks.iter().map(|b| b.0).collect::<Vec<_>>(), [1, 6]);
        let Some(Block::Data(last)) = map.get(6) else { panic!("no last block") };
        assert_eq!(index.read_block(&last).unwrap().len() as u64, size % block);
    }
}
