//! Where in the packs a block of 4 KiB lies: what finds the known part of a disk that was not
//! composed here. Derived from the packs; a digest of each is kept beside them, specified in
//! `FORMAT.md`, section "Block digests".

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::error::{IoContext, ObjectId, ObjectKind, RepositoryError, Result};
use super::{Pin, Repository, frame};
use crate::component::manifest::ALIGNMENT_BYTES;
use crate::sparse::Run;
use crate::types::{ComponentId, Hash, PackId};

/// Magic and version of a pack's block digests.
const MAGIC: &[u8; 8] = b"CICBLK\0\x01";
const DIGEST_BYTES: usize = 8;
const BLOCK_BYTES: usize = ALIGNMENT_BYTES as usize;
/// What is indexed unless the caller says otherwise: 2 GiB of memory for 512 GiB of packs.
pub const PLACES_MAX_DEFAULT: u64 = 1 << 27;

/// The digest by which blocks are looked up: the first eight bytes of the BLAKE3 hash as a little-endian
/// number; 0 stands for a block of zeros. It finds candidates: whoever relies on one compares the bytes.
pub fn block_digest(block: &[u8]) -> u64 {
    const ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
    if block.len() <= BLOCK_BYTES && *block == ZEROS[..block.len()] {
        return 0;
    }
    let hash = blake3::hash(block);
    let [a, b, c, d, e, f, g, h, ..] = *hash.as_bytes();
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

/// A block of a pack, 16 bytes in memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct BlockPlace {
    digest: u64,
    /// Number of the pack in [`BlockPlaces::packs`].
    pub pack: u32,
    pub block: u32,
}

/// A pack whose blocks can be found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IndexedPack {
    pub id: PackId,
    /// Plain size.
    pub size_bytes: u64,
    /// The component it belongs to, as `name@version`, a bound one if there is one.
    pub component: Option<String>,
    /// Whether a component that is bound to a name has it.
    pub is_named: bool,
}

/// The blocks of packs by their digests; blocks of zeros are left out.
#[derive(Debug)]
pub struct BlockPlaces {
    pub packs: Vec<IndexedPack>,
    /// Packs that did not fit into the bound, the oldest ones.
    pub packs_left_out: usize,
    /// Sorted.
    places: Vec<BlockPlace>,
    /// The packs stay as long as somebody knows where in them something lies.
    _kept: Pin,
}

impl BlockPlaces {
    /// All places of a block, in the order of packs and blocks.
    pub fn find(&self, digest: u64) -> &[BlockPlace] {
        let begin = self.places.partition_point(|p| p.digest < digest);
        let rest = &self.places[begin..];
        &rest[..rest.partition_point(|p| p.digest == digest)]
    }

    /// Whether this block of this pack has the digest.
    pub fn is_at(&self, digest: u64, pack: u32, block: u64) -> bool {
        let Ok(block) = u32::try_from(block) else { return false };
        self.places.binary_search(&BlockPlace { digest, pack, block }).is_ok()
    }

    pub fn len(&self) -> usize {
        self.places.len()
    }

    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }
}

impl Repository {
    /// Indexes the blocks of all packs held, at most `places_max` of them, the newest packs first.
    /// Packs that were never looked at are unpacked once, which takes the time of reading them.
    /// `progress` gets plain bytes done and to do, from any thread; `cancelled` ends it with
    /// [`RepositoryError::Cancelled`].
    pub fn block_places(
        &self,
        places_max: u64,
        progress: &(dyn Fn(u64, u64) + Sync),
        cancelled: &(dyn Fn() -> bool + Sync),
    ) -> Result<BlockPlaces> {
        let (packs, packs_left_out, kept) = self.newest_packs(places_max)?;
        let total_bytes: u64 = packs.iter().map(|p| p.size_bytes).sum();
        let done_bytes = AtomicU64::new(0);
        let found: Vec<Option<Vec<u64>>> = packs
            .par_iter()
            .map(|pack| {
                if cancelled() {
                    return Err(RepositoryError::Cancelled);
                }
                let digests = match self.block_digests(&pack.id) {
                    Ok(digests) => Some(digests),
                    // It was set aside, or collected meanwhile; a disk can do without it.
                    Err(RepositoryError::Damaged { .. } | RepositoryError::Missing { .. }) => None,
                    Err(e) => return Err(e),
                };
                let done = done_bytes.fetch_add(pack.size_bytes, Ordering::Relaxed) + pack.size_bytes;
                progress(done, total_bytes);
                Ok(digests)
            })
            .collect::<Result<_>>()?;
        let mut places = Vec::with_capacity((total_bytes / ALIGNMENT_BYTES) as usize);
        for (pack, digests) in (0u32..).zip(found) {
            let numbered = (0u32..).zip(digests.unwrap_or_default());
            places.extend(numbered.filter(|(_, digest)| *digest != 0).map(|(block, digest)| BlockPlace {
                digest,
                pack,
                block,
            }));
        }
        places.par_sort_unstable();
        Ok(BlockPlaces { packs, packs_left_out, places, _kept: kept })
    }

    /// The packs to look at, pinned, and how many there are no places for.
    fn newest_packs(&self, places_max: u64) -> Result<(Vec<IndexedPack>, usize, Pin)> {
        let owners = self.pack_owners()?;
        let known: Vec<_> = self.index().of_kind(ObjectKind::Pack).collect::<Result<_>>()?;
        let kept = self.pin(known.iter().map(|(object, _)| *object).collect());
        let mut held = Vec::new();
        for (object, entry) in known {
            let ObjectId::Pack(id) = object else { continue };
            let meta = fs::metadata(self.layout().object_path(&object));
            let Ok(modified) = meta.and_then(|m| m.modified()) else { continue };
            held.push((modified, id, entry.plain_bytes));
        }
        held.sort_by_key(|(modified, id, _)| (std::cmp::Reverse(*modified), *id));
        let (mut blocks, mut left_out) = (0, 0);
        let mut packs = Vec::new();
        for (_, id, size_bytes) in held {
            let here = size_bytes / ALIGNMENT_BYTES;
            if blocks + here > places_max {
                left_out += 1;
                continue;
            }
            blocks += here;
            let (component, is_named) = owners.get(&id).cloned().map_or((None, false), |(c, n)| (Some(c), n));
            packs.push(IndexedPack { id, size_bytes, component, is_named });
        }
        Ok((packs, left_out, kept))
    }

    /// The component of each pack that has one, and whether that is bound; bound ones go first.
    fn pack_owners(&self) -> Result<HashMap<PackId, (String, bool)>> {
        let bound: HashSet<ComponentId> = self.bound_components()?.into_iter().map(|b| b.1).collect();
        let mut owners: HashMap<PackId, (String, bool)> = HashMap::new();
        for item in self.index().summaries() {
            let (id, summary) = item?;
            let is_named = bound.contains(&id);
            let label = format!("{}@{}", summary.name, summary.version);
            for (pack, _) in summary.packs {
                let owner = owners.entry(pack).or_insert_with(|| (label.clone(), is_named));
                if is_named && !owner.1 {
                    *owner = (label.clone(), true);
                }
            }
        }
        Ok(owners)
    }

    /// The digests of a pack's blocks, kept ones if there are any.
    fn block_digests(&self, id: &PackId) -> Result<Vec<u64>> {
        let path = self.block_digests_path(id);
        if let Some(digests) = fs::read(&path).ok().and_then(|bytes| decode(id, &bytes)) {
            return Ok(digests);
        }
        let mut digests = Vec::new();
        self.read_pack(id, &mut |_, run| {
            // Frames are multiples of blocks.
            match run {
                Run::Data(bytes) => digests.extend(bytes.chunks(BLOCK_BYTES).map(block_digest)),
                Run::Zeros(len) => digests.resize(digests.len() + len as usize / BLOCK_BYTES, 0),
            }
            Ok(())
        })?;
        if let Err(error) = self.keep_block_digests(id, &digests) {
            tracing::warn!(pack = %id, %error, "its block digests cannot be kept; they will be made again");
        }
        Ok(digests)
    }

    fn keep_block_digests(&self, id: &PackId, digests: &[u64]) -> Result<()> {
        let path = self.block_digests_path(id);
        let mut pending = self.layout().pending("blocks")?;
        // Not synced: what a crash leaves of it does not bear its seal.
        pending.file().write_all(&encode(id, digests)).at("write", &path)?;
        let dir = path.parent().unwrap_or(&path);
        fs::create_dir_all(dir).at("create", dir)?;
        fs::rename(pending.temporary_path(), &path).at("create", &path)
    }

    /// For a pack that is no longer held.
    pub(super) fn remove_block_digests(&self, id: &PackId) {
        let path = self.block_digests_path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "block digests of a removed pack stay");
            }
            _ => {}
        }
    }

    fn block_digests_path(&self, id: &PackId) -> PathBuf {
        let name = id.to_string();
        self.layout().dir("blocks").join(&name[..2]).join(name)
    }
}

fn encode(id: &PackId, digests: &[u64]) -> Vec<u8> {
    let mut out = Vec::with_capacity(MAGIC.len() + digests.len() * DIGEST_BYTES + Hash::LEN_BYTES);
    out.extend_from_slice(MAGIC);
    digests.iter().for_each(|d| out.extend_from_slice(&d.to_le_bytes()));
    out.extend_from_slice(seal(id, &out).as_bytes());
    out
}

/// `None` if the bytes are not the kept digests of this pack.
fn decode(id: &PackId, bytes: &[u8]) -> Option<Vec<u64>> {
    let (body, found) = bytes.split_last_chunk::<{ Hash::LEN_BYTES }>()?;
    if seal(id, body).as_bytes() != found {
        return None;
    }
    let (digests, rest) = body.strip_prefix(MAGIC)?.as_chunks::<DIGEST_BYTES>();
    let blocks_max = frame::PACK_BYTES_MAX / ALIGNMENT_BYTES;
    (rest.is_empty() && digests.len() as u64 <= blocks_max)
        .then(|| digests.iter().map(|d| u64::from_le_bytes(*d)).collect())
}

/// Binds the digests to their pack.
fn seal(id: &PackId, body: &[u8]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(id.as_bytes()).update(body);
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn block(n: u8) -> Vec<u8> {
        vec![n; BLOCK_BYTES]
    }

    fn pack(repository: &Repository, blocks: &[u8]) -> PackId {
        let mut writer = repository.pack_writer().unwrap();
        let bytes: Vec<u8> = blocks.iter().flat_map(|n| block(*n)).collect();
        writer.append(&mut bytes.as_slice(), bytes.len() as u64).unwrap();
        writer.finish().unwrap().unwrap().0
    }

    fn places(repository: &Repository, places_max: u64) -> BlockPlaces {
        repository.block_places(places_max, &|_, _| (), &|| false).unwrap()
    }

    #[test]
    fn blocks_are_found_in_all_packs_and_zeros_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::create(&dir.path().join("r")).unwrap();
        let (a, b) = (pack(&repository, &[1, 2, 0, 3]), pack(&repository, &[2, 9]));
        for round in 0..2 {
            let places = places(&repository, PLACES_MAX_DEFAULT);
            let of = |n| -> Vec<(PackId, u32)> {
                let found = places.find(block_digest(&block(n)));
                let mut all: Vec<_> =
                    found.iter().map(|p| (places.packs[p.pack as usize].id, p.block)).collect();
                all.sort();
                all
            };
            let mut two = vec![(a, 1), (b, 0)];
            two.sort();
            assert_eq!(of(2), two, "round {round}");
            assert_eq!(of(3), [(a, 3)]);
            assert_eq!((of(0), of(7), places.len()), (vec![], vec![], 5));
            let number = places.packs.iter().position(|p| p.id == a).unwrap() as u32;
            assert!(places.is_at(block_digest(&block(3)), number, 3));
            assert!(!places.is_at(block_digest(&block(3)), number, 2));
            assert!(!places.is_at(block_digest(&block(3)), number, u64::MAX));
        }
    }

    #[test]
    fn kept_digests_are_used_and_damaged_ones_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::create(&dir.path().join("r")).unwrap();
        let id = pack(&repository, &[1, 2]);
        places(&repository, 100);
        let path = repository.block_digests_path(&id);
        // Only a kept file can say that the pack holds what it does not.
        fs::write(&path, encode(&id, &[5, 0])).unwrap();
        assert_eq!(places(&repository, 100).find(5).len(), 1);
        let mut bytes = fs::read(&path).unwrap();
        bytes[9] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(places(&repository, 100).find(block_digest(&block(2))).len(), 1);
        let other = pack(&repository, &[8]);
        fs::copy(&path, repository.block_digests_path(&other)).unwrap_or_else(|_| {
            fs::create_dir_all(repository.block_digests_path(&other).parent().unwrap()).unwrap();
            fs::copy(&path, repository.block_digests_path(&other)).unwrap()
        });
        assert_eq!(places(&repository, 100).find(block_digest(&block(8))).len(), 1, "another pack's file");
        repository.gc(false, std::time::Duration::ZERO, &[]).unwrap();
        assert!(!path.exists(), "block digests go with their pack");
    }

    #[test]
    fn what_exceeds_the_bound_is_left_out_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::create(&dir.path().join("r")).unwrap();
        let (old, new) = (pack(&repository, &[1, 2, 3]), pack(&repository, &[4, 5]));
        let path = repository.layout().object_path(&ObjectId::Pack(old));
        fs::File::open(path).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        let places = places(&repository, 4);
        assert_eq!(places.packs.iter().map(|p| p.id).collect::<Vec<_>>(), [new]);
        assert_eq!((places.packs_left_out, places.len()), (1, 2));
        let cancelled = repository.block_places(4, &|_, _| (), &|| true).unwrap_err();
        assert!(matches!(cancelled, RepositoryError::Cancelled));
    }
}
