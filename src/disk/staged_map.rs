//! The record beside a staged disk of what it holds, `NAME.map`. Format: `FORMAT.md`.
//!
//! It is derived: whenever it is missing, damaged or older than the disk, the disk is scanned.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::DiskError;
use super::error::io_error;
use crate::durable;
use crate::types::codec::{CodecError, Reader, Writer};
use crate::types::{BlockHash, Hash};
use crate::vm::{Block, ChunkMap};

/// Magic and version. Changing it is a format break; old records are then scanned for anew.
const MAGIC: &[u8; 8] = b"CICSTG\x00\x01";
const ENCODED_BLOCK_BYTES_MAX: u64 = 10 + 1 + Hash::LEN_BYTES as u64;
const FIXED_BYTES_MAX: u64 = 128;
const SUFFIX: &str = ".map";

pub(super) fn path_of(disk: &Path) -> PathBuf {
    let mut name = disk.as_os_str().to_owned();
    name.push(SUFFIX);
    PathBuf::from(name)
}

/// Says, durably, that `disk`, already synced, holds `map`.
pub(super) fn store(disk: &Path, map: &ChunkMap) -> Result<(), DiskError> {
    let path = path_of(disk);
    let bytes = encode(map, Stamp::of(disk)?);
    durable::write(&path, &bytes).map_err(io_error("write", &path))
}

/// What `disk` holds, if the record of it still stands.
pub(super) fn load(
    disk: &Path,
    block_size_bytes: u32,
    disk_size_bytes: u64,
) -> Result<Option<ChunkMap>, DiskError> {
    let path = path_of(disk);
    let blocks_max = disk_size_bytes.div_ceil(block_size_bytes.into());
    let bytes_max = blocks_max * ENCODED_BLOCK_BYTES_MAX + FIXED_BYTES_MAX;
    let mut bytes = Vec::new();
    match File::open(&path).and_then(|file| file.take(bytes_max).read_to_end(&mut bytes)) {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io_error("read", &path)(e)),
    }
    let empty = ChunkMap::empty(block_size_bytes, disk_size_bytes);
    match decode(&bytes, empty, Some(Stamp::of(disk)?)) {
        Ok(map) => Ok(map),
        Err(reason) => {
            tracing::warn!(path = %path.display(), %reason, "the record of a staged disk is damaged; scanning the disk");
            Ok(None)
        }
    }
}

/// What `disk` held when it was last staged, whatever happened to it since.
pub(super) fn load_stale(disk: &Path, block_size_bytes: u32, disk_size_bytes: u64) -> Option<ChunkMap> {
    let path = path_of(disk);
    let bytes_max =
        disk_size_bytes.div_ceil(block_size_bytes.into()) * ENCODED_BLOCK_BYTES_MAX + FIXED_BYTES_MAX;
    let mut bytes = Vec::new();
    File::open(&path).ok()?.take(bytes_max).read_to_end(&mut bytes).ok()?;
    decode(&bytes, ChunkMap::empty(block_size_bytes, disk_size_bytes), None).ok()?
}

pub(super) fn remove(disk: &Path) -> Result<(), DiskError> {
    let path = path_of(disk);
    durable::remove(&path).map_err(io_error("remove", &path))
}

/// Length and time of the last change of a disk file: differs if anybody wrote since.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    len_bytes: u64,
    modified_s: i64,
    modified_ns: i64,
}

impl Stamp {
    fn of(disk: &Path) -> Result<Self, DiskError> {
        let m = fs::metadata(disk).map_err(io_error("stat", disk))?;
        Ok(Self { len_bytes: m.len(), modified_s: m.mtime(), modified_ns: m.mtime_nsec() })
    }
}

fn encode(map: &ChunkMap, stamp: Stamp) -> Vec<u8> {
    let mut w = Writer::with_magic(MAGIC);
    w.u64(stamp.len_bytes);
    w.varint_signed(stamp.modified_s);
    w.varint_signed(stamp.modified_ns);
    w.u32(map.block_size_bytes);
    w.u64(map.disk_size_bytes);
    w.varint(map.blocks.len() as u64);
    let mut next = 0;
    for (number, block) in &map.blocks {
        w.varint(number - next);
        next = number + 1;
        match block {
            Block::Zero => w.u8(0),
            Block::Data(hash) => {
                w.u8(1);
                w.fixed(hash.as_bytes());
            }
        }
    }
    let mut bytes = w.into_bytes();
    let hash = Hash::of(&bytes);
    bytes.extend(hash.as_bytes());
    bytes
}

/// `None` if the record is sound but of other blocks than `empty`'s, or of another state of the disk
/// than `stamp`, where that matters.
fn decode(bytes: &[u8], empty: ChunkMap, stamp: Option<Stamp>) -> Result<Option<ChunkMap>, CodecError> {
    let Some((body, hash)) = bytes.split_last_chunk::<{ Hash::LEN_BYTES }>() else {
        return Err(CodecError::Truncated { what: "record", need: 32, have: bytes.len() as u64 });
    };
    let mut r = Reader::with_magic(body, MAGIC, "staged disk's map of version 1")?;
    if Hash::of(body).as_bytes() != hash {
        return Err(CodecError::Invalid { what: "record", rule: "its hash does not match".into() });
    }
    let found = Stamp {
        len_bytes: r.u64("disk length")?,
        modified_s: r.varint_signed("time")?,
        modified_ns: r.varint_signed("time")?,
    };
    let (block_size, disk_size) = (r.u32("block size")?, r.u64("disk size")?);
    if stamp.is_some_and(|stamp| stamp != found)
        || (block_size, disk_size) != (empty.block_size_bytes, empty.disk_size_bytes)
    {
        return Ok(None);
    }
    let mut map = empty;
    let blocks_max = map.disk_size_bytes.div_ceil(map.block_size_bytes.into());
    let count = r.count("blocks", blocks_max, 2)?;
    map.blocks.reserve_exact(count);
    let mut next: u64 = 0;
    for _ in 0..count {
        let number = next + r.bounded("gap between blocks", blocks_max)?;
        if number >= blocks_max {
            return Err(CodecError::TooLarge { what: "block number", value: number, limit: blocks_max });
        }
        next = number + 1;
        let block = match r.u8("block state")? {
            0 => Block::Zero,
            1 => Block::Data(BlockHash::from_bytes(r.array("block hash")?)),
            value => return Err(CodecError::Unknown { what: "block state", value: value.into() }),
        };
        map.blocks.push((number, block));
    }
    r.end()?;
    Ok(Some(map))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STAMP: Stamp = Stamp { len_bytes: 77, modified_s: -5, modified_ns: 9 };

    fn sample() -> ChunkMap {
        let data = Block::Data(BlockHash::of(b"x"));
        let blocks = vec![(0, data), (1, Block::Zero), (200, data), (255, data)];
        ChunkMap { block_size_bytes: 4096, disk_size_bytes: 1 << 20, blocks }
    }

    #[test]
    fn holds_a_map_until_the_disk_changes() {
        let map = sample();
        let bytes = encode(&map, STAMP);
        let empty = ChunkMap::empty(4096, 1 << 20);
        assert_eq!(decode(&bytes, empty.clone(), Some(STAMP)).unwrap(), Some(map));
        let later = Stamp { modified_ns: 10, ..STAMP };
        assert_eq!(decode(&bytes, empty.clone(), Some(later)).unwrap(), None);
        assert!(decode(&bytes, empty.clone(), None).unwrap().is_some());
        assert_eq!(decode(&bytes, ChunkMap::empty(8192, 1 << 20), Some(STAMP)).unwrap(), None);
    }

    proptest! {
        #[test]
        fn damage_is_found(at in 0usize..200, flip in 1u8.., cut in 0usize..200) {
            let bytes = encode(&sample(), STAMP);
            let mut broken = bytes.clone();
            broken[at % bytes.len()] ^= flip;
            let empty = ChunkMap::empty(4096, 1 << 20);
            prop_assert!(decode(&broken, empty.clone(), Some(STAMP)).is_err());
            prop_assert!(decode(&bytes[..cut % bytes.len()], empty, Some(STAMP)).is_err());
        }

        #[test]
        fn any_bytes_with_a_right_hash_never_panic(body in proptest::collection::vec(any::<u8>(), 0..120)) {
            let mut bytes = encode(&ChunkMap::empty(4096, 1 << 20), STAMP);
            bytes.truncate(bytes.len() - Hash::LEN_BYTES - 1);
            bytes.extend(body);
            bytes.extend(Hash::of(&bytes).as_bytes());
            let _ = decode(&bytes, ChunkMap::empty(4096, 1 << 20), Some(STAMP));
        }
    }
}
