//! The target's side: bringing a disk to a chunk map, with as few blocks from elsewhere as can be.
//!
//! One pass is [`StagedDisk::begin`] (holes, zeros and blocks the disk has elsewhere are put in
//! place; returned is what must come from elsewhere), [`StagedDisk::write_block`] for each, in any
//! order, and [`StagedDisk::finish`]. A later pass with a newer map brings only what differs. A
//! pass that was interrupted is begun again and asks only for what has not come yet; one that died
//! with its process too: the disk is scanned when its record is missing or out of date.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{BlockIndex, DiskError, DiskImage, OverlayWriter, ROOT_BLOCK_BYTES, UserDataDisk};
use super::{create_user_data, scan, staged_map};
use crate::sparse::is_zero;
use crate::types::BlockHash;
use crate::vm::{Block, ChunkMap, MapRef};

/// Which disk, and where.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DiskFile {
    /// An overlay over a composition; `base` is absolute.
    Root {
        overlay: PathBuf,
        base: PathBuf,
    },
    UserData {
        raw: PathBuf,
    },
}

impl DiskFile {
    pub fn path(&self) -> &Path {
        match self {
            DiskFile::Root { overlay, .. } => overlay,
            DiskFile::UserData { raw } => raw,
        }
    }

    /// Opens the disk for reading.
    pub fn open(&self) -> Result<DiskImage, DiskError> {
        match self {
            DiskFile::Root { overlay, base } => DiskImage::overlay(overlay, base),
            DiskFile::UserData { raw } => DiskImage::raw(raw),
        }
    }
}

/// What separates a disk from a chunk map.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Changes {
    /// Blocks that must come from elsewhere, each once, in order of their first place on the disk.
    pub fetch: Vec<BlockHash>,
    pub fetch_bytes: u64,
    /// Blocks the disk has in another place that stays as it is: hash and number of that place.
    pub copy: Vec<(BlockHash, u64)>,
    /// Numbers of the blocks to become zeros.
    pub zero: Vec<u64>,
    /// Numbers of the blocks to become absent.
    pub discard: Vec<u64>,
    /// Blocks of the map that are in place.
    pub already: u64,
    /// Every place to be written, sorted by hash.
    wanted: Vec<(BlockHash, u64)>,
}

impl Changes {
    /// Blocks of the disk that are not as the map says.
    pub fn missing(&self) -> u64 {
        (self.wanted.len() + self.zero.len() + self.discard.len()) as u64
    }
}

/// A disk being brought to a chunk map. One task at a time may have it open.
#[derive(Debug)]
pub struct StagedDisk {
    disk: DiskFile,
    image: DiskImage,
    writer: Writer,
    block_size_bytes: u32,
    /// What the disk holds. A user-data disk's has no `Zero`: zeros are absent there.
    applied: BTreeMap<u64, Block>,
    /// Places of the blocks of the pass under way, sorted by hash.
    wanted: Vec<(BlockHash, u64)>,
    /// Whether the record beside the disk says what it holds.
    recorded: bool,
    /// After an I/O error nobody knows what the disk holds.
    poisoned: bool,
}

#[derive(Debug)]
enum Writer {
    Root(OverlayWriter),
    UserData(UserDataDisk),
}

impl StagedDisk {
    /// Opens a disk that was staged before, also one a VM ran on meanwhile, or makes an empty one.
    /// `shape` gives the block and disk size, as the map to come has them.
    pub fn open_or_create(disk: DiskFile, shape: &MapRef) -> Result<Self, DiskError> {
        let (block_size_bytes, size_bytes) = (shape.block_size_bytes, shape.disk_size_bytes);
        let wrong = |reason| DiskError::WrongMap { path: disk.path().to_owned(), reason };
        shape.check().map_err(|e| wrong(e.to_string()))?;
        let writer = match &disk {
            DiskFile::Root { overlay, base } => {
                if block_size_bytes != ROOT_BLOCK_BYTES {
                    return Err(wrong(format!("a root delta has blocks of {ROOT_BLOCK_BYTES} bytes")));
                }
                Writer::Root(OverlayWriter::open_or_create(overlay, base, size_bytes)?)
            }
            DiskFile::UserData { raw } => {
                match create_user_data(raw, size_bytes) {
                    Ok(()) | Err(DiskError::Exists { .. }) => {}
                    Err(e) => return Err(e),
                }
                Writer::UserData(UserDataDisk::open(raw, size_bytes)?)
            }
        };
        let image = disk.open()?;
        let recorded = staged_map::load(disk.path(), block_size_bytes, size_bytes)?;
        let (recorded, map) = match recorded {
            Some(map) => (true, map),
            None => {
                staged_map::remove(disk.path())?;
                (false, scan::chunk_map_of(&image, block_size_bytes)?)
            }
        };
        let applied = map.blocks.into_iter().collect();
        let wanted = Vec::new();
        Ok(Self { disk, image, writer, block_size_bytes, applied, wanted, recorded, poisoned: false })
    }

    /// What the disk holds.
    pub fn applied(&self) -> ChunkMap {
        ChunkMap {
            block_size_bytes: self.block_size_bytes,
            disk_size_bytes: self.image.size_bytes(),
            blocks: self.applied.iter().map(|(n, b)| (*n, *b)).collect(),
        }
    }

    /// What separates the disk from `target`. Changes nothing.
    pub fn plan(&self, target: &ChunkMap) -> Result<Changes, DiskError> {
        self.check(target)?;
        let mut changes = Changes::default();
        self.compare(target, |number, have, want| match want {
            _ if have == want => changes.already += 1,
            None => changes.discard.push(number),
            Some(Block::Zero) => changes.zero.push(number),
            Some(Block::Data(hash)) => changes.wanted.push((hash, number)),
        });
        changes.wanted.sort_unstable();
        let mut local: BTreeMap<BlockHash, u64> = BTreeMap::new();
        self.compare(target, |number, have, want| {
            if let (true, Some(Block::Data(hash))) = (have == want, want)
                && !places(&changes.wanted, &hash).is_empty()
            {
                local.entry(hash).or_insert(number);
            }
        });
        let mut fetch = Vec::new();
        for group in changes.wanted.chunk_by(|a, b| a.0 == b.0) {
            let (hash, number) = group[0];
            if !local.contains_key(&hash) {
                fetch.push((number, hash));
                changes.fetch_bytes += self.block_len(number);
            }
        }
        fetch.sort_unstable();
        changes.fetch = fetch.into_iter().map(|(_, hash)| hash).collect();
        changes.copy = local.into_iter().collect();
        Ok(changes)
    }

    /// Starts a pass: does what needs no block from elsewhere and says what does. A pass under way
    /// is given up; what it wrote stays and counts.
    pub fn begin(&mut self, target: &ChunkMap) -> Result<Changes, DiskError> {
        let changes = self.plan(target)?;
        self.wanted.clone_from(&changes.wanted);
        if changes.missing() == 0 {
            return Ok(changes);
        }
        self.forget_record()?;
        for number in &changes.discard {
            self.put(*number, None)?;
        }
        for number in &changes.zero {
            self.put(*number, Some((Block::Zero, &[])))?;
        }
        for (hash, from) in &changes.copy {
            let bytes = self.read(*from)?;
            if BlockHash::of(&bytes) != *hash {
                // Someone else writes to the disk; what it holds can no longer be known from here.
                self.poisoned = true;
                return Err(self.differs(*from));
            }
            self.write_block(hash, &bytes)?;
        }
        Ok(changes)
    }

    /// Puts a block of the pass under way in all its places; returns how many there were. A block
    /// that nothing asks for, or that came before, is checked and left out.
    pub fn write_block(&mut self, hash: &BlockHash, bytes: &[u8]) -> Result<usize, DiskError> {
        let wrong = |reason| DiskError::WrongBlock { hash: *hash, reason };
        if bytes.len() > self.block_size_bytes as usize {
            return Err(wrong(format!("{} bytes, more than {}", bytes.len(), self.block_size_bytes)));
        }
        let found = BlockHash::of(bytes);
        if found != *hash {
            return Err(wrong(format!("its bytes have the hash {}", found.short())));
        }
        let block = Block::Data(*hash);
        let places: Vec<u64> = places(&self.wanted, hash)
            .iter()
            .map(|(_, number)| *number)
            .filter(|number| self.applied.get(number) != Some(&block))
            .collect();
        for number in &places {
            let len = self.block_len(*number);
            if bytes.len() as u64 != len {
                return Err(wrong(format!("{} bytes where the disk has room for {len}", bytes.len())));
            }
        }
        if !places.is_empty() {
            self.forget_record()?;
        }
        for number in &places {
            self.put(*number, Some((block, bytes)))?;
        }
        Ok(places.len())
    }

    /// Puts in place what any of `sources` has of a pass's blocks, and returns the others in order. A
    /// source that cannot read a block any more does not have it.
    pub fn fill(
        &mut self,
        hashes: Vec<BlockHash>,
        sources: &[Arc<BlockIndex>],
    ) -> Result<Vec<BlockHash>, DiskError> {
        let mut left = Vec::new();
        for hash in hashes {
            match sources.iter().find_map(|source| source.read_block(&hash).ok()) {
                Some(bytes) => drop(self.write_block(&hash, &bytes)?),
                None => left.push(hash),
            }
        }
        Ok(left)
    }

    /// A whole pass but for [`Self::finish`], with each block that is not there from `provide`.
    pub fn apply<E: From<DiskError>>(
        &mut self,
        target: &ChunkMap,
        provide: &mut dyn FnMut(&BlockHash) -> Result<Vec<u8>, E>,
    ) -> Result<Changes, E> {
        let changes = self.begin(target)?;
        for hash in &changes.fetch {
            self.write_block(hash, &provide(hash)?)?;
        }
        Ok(changes)
    }

    /// Makes durable what is there and records it, so that opening the disk again needs no scan.
    pub fn checkpoint(&mut self) -> Result<(), DiskError> {
        self.check_sound()?;
        let finished = match &mut self.writer {
            Writer::Root(overlay) => overlay.finish(),
            Writer::UserData(raw) => raw.finish(),
        };
        self.sound(finished)?;
        if !self.recorded {
            let stored = staged_map::store(self.disk.path(), &self.applied());
            self.sound(stored)?;
            self.recorded = true;
        }
        Ok(())
    }

    /// Ends a pass: refuses if anything of `target` has not been applied, else makes all durable.
    pub fn finish(&mut self, target: &ChunkMap) -> Result<(), DiskError> {
        let missing = self.plan(target)?.missing();
        if missing > 0 {
            return Err(DiskError::Incomplete { path: self.disk.path().to_owned(), missing });
        }
        self.checkpoint()
    }

    /// Reads the whole disk and compares it with `target`.
    pub fn verify(&self, target: &ChunkMap) -> Result<(), DiskError> {
        self.check(target)?;
        let found = scan::chunk_map_of(&self.image, self.block_size_bytes)?;
        let mut suspects = Vec::new();
        walk(found.blocks.into_iter(), self.normal(target), |number, have, want| {
            if have != want {
                suspects.push((number, want));
            }
        });
        for (number, want) in suspects {
            // A block may be listed though it equals what lies below, and then is not found by a scan.
            let right = match want {
                None => false,
                Some(Block::Zero) => is_zero(&self.read(number)?),
                Some(Block::Data(hash)) => BlockHash::of(&self.read(number)?) == hash,
            };
            if !right {
                return Err(self.differs(number));
            }
        }
        Ok(())
    }

    /// Makes one block what it should be; `None` is absent.
    fn put(&mut self, number: u64, block: Option<(Block, &[u8])>) -> Result<(), DiskError> {
        let (offset, len) = (number * u64::from(self.block_size_bytes), self.block_len(number));
        let done = match (&mut self.writer, block) {
            (Writer::Root(overlay), None) => overlay.discard(number),
            (Writer::Root(overlay), Some((Block::Zero, _))) => overlay.write_zero(number),
            (Writer::Root(overlay), Some((Block::Data(_), bytes))) => overlay.write_block(number, bytes),
            (Writer::UserData(raw), None | Some((Block::Zero, _))) => raw.clear(offset, len),
            (Writer::UserData(raw), Some((Block::Data(_), bytes))) => raw.write_at(offset, bytes),
        };
        self.sound(done)?;
        match block {
            None => self.applied.remove(&number),
            Some((block, _)) => self.applied.insert(number, block),
        };
        Ok(())
    }

    fn read(&self, number: u64) -> Result<Vec<u8>, DiskError> {
        let mut bytes = vec![0; self.block_len(number) as usize];
        self.image.read_at(number * u64::from(self.block_size_bytes), &mut bytes)?;
        Ok(bytes)
    }

    /// Before the first change of a pass: the record would be a lie from here on.
    fn forget_record(&mut self) -> Result<(), DiskError> {
        self.check_sound()?;
        if self.recorded {
            staged_map::remove(self.disk.path())?;
            self.recorded = false;
        }
        Ok(())
    }

    fn differs(&self, number: u64) -> DiskError {
        let offset_bytes = number * u64::from(self.block_size_bytes);
        DiskError::Differs { path: self.disk.path().to_owned(), offset_bytes }
    }

    fn check_sound(&self) -> Result<(), DiskError> {
        if self.poisoned {
            return Err(DiskError::Poisoned { path: self.disk.path().to_owned() });
        }
        Ok(())
    }

    fn sound(&mut self, result: Result<(), DiskError>) -> Result<(), DiskError> {
        self.poisoned |= result.is_err();
        result
    }

    fn block_len(&self, number: u64) -> u64 {
        let size = u64::from(self.block_size_bytes);
        self.image.size_bytes().saturating_sub(number.saturating_mul(size)).min(size)
    }

    /// Refuses a map that is not of this disk or breaks the rules of maps.
    fn check(&self, target: &ChunkMap) -> Result<(), DiskError> {
        let shape = (target.block_size_bytes, target.disk_size_bytes);
        let own = (self.block_size_bytes, self.image.size_bytes());
        let ascending = target.blocks.windows(2).all(|w| w[0].0 < w[1].0);
        let within = target.blocks.last().is_none_or(|(number, _)| self.block_len(*number) > 0);
        let reason = if shape != own {
            format!(
                "it is of a disk of {} bytes in blocks of {}, not {} in {}",
                shape.1, shape.0, own.1, own.0
            )
        } else if !ascending || !within {
            "its blocks are out of order or beyond the end of the disk".to_owned()
        } else {
            return Ok(());
        };
        Err(DiskError::WrongMap { path: self.disk.path().to_owned(), reason })
    }

    fn compare(&self, target: &ChunkMap, visit: impl FnMut(u64, Option<Block>, Option<Block>)) {
        walk(self.applied.iter().map(|(n, b)| (*n, *b)), self.normal(target), visit);
    }

    /// On a user-data disk a block of zeros and an absent one are the same.
    fn normal<'a>(&self, target: &'a ChunkMap) -> impl Iterator<Item = (u64, Block)> + 'a {
        let zero_is_absent = self.image.is_zero_below();
        target.blocks.iter().copied().filter(move |(_, block)| !(zero_is_absent && *block == Block::Zero))
    }
}

/// Where a hash is wanted.
fn places<'a>(wanted: &'a [(BlockHash, u64)], hash: &BlockHash) -> &'a [(BlockHash, u64)] {
    let first = wanted.partition_point(|(h, _)| h < hash);
    let count = wanted[first..].partition_point(|(h, _)| h == hash);
    &wanted[first..first + count]
}

/// Visits the block numbers of two ascending lists in order, with what each says of it.
fn walk(
    have: impl Iterator<Item = (u64, Block)>,
    want: impl Iterator<Item = (u64, Block)>,
    mut visit: impl FnMut(u64, Option<Block>, Option<Block>),
) {
    let (mut have, mut want) = (have.peekable(), want.peekable());
    while let Some(number) = [have.peek(), want.peek()].into_iter().flatten().map(|(n, _)| *n).min() {
        let have = have.next_if(|(n, _)| *n == number).map(|(_, block)| block);
        let want = want.next_if(|(n, _)| *n == number).map(|(_, block)| block);
        visit(number, have, want);
    }
}
