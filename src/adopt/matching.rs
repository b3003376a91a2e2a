//! Which blocks of a disk lie where in packs. Files begin at block boundaries in packs as on disks,
//! so matching blocks is matching files; runs are followed, so that one file is one extent.

use std::collections::BTreeMap;

use super::{AdoptError, DiskBlocks, Job};
use crate::component::BlockExtent;
use crate::component::extents::{BLOCK_BYTES, EXTENTS_MAX};
use crate::repository::BlockPlaces;

/// A pack of no named component is used from this much on, and this share of it: a move takes whole packs.
const MATCHED_BYTES_MIN: u64 = 64 << 10;
const MATCHED_PERCENT_MIN: u64 = 5;
/// Of a pack of a named component, which others may hold too.
const NAMED_PERCENT_MIN: u64 = 25;
/// Places of one block that are compared; beyond that the block is so common that any will do.
const CANDIDATES_MAX: usize = 64;
/// How far places are compared.
const LOOK_AHEAD_BLOCKS: u64 = 256;
/// Blocks between two looks at whether to go on.
const STRIDE: u64 = 1 << 16;

/// The known part of a disk. Digests matched, bytes were not compared yet.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Matching {
    /// Ascending and disjoint on the disk; `pack` is the number in [`BlockPlaces::packs`].
    pub extents: Vec<BlockExtent>,
}

impl Matching {
    pub fn known_blocks(&self) -> u64 {
        self.extents.iter().map(|e| e.blocks).sum()
    }

    /// Blocks matched in each pack that has any.
    pub fn blocks_of_packs(&self) -> BTreeMap<u32, u64> {
        let mut blocks = BTreeMap::new();
        self.extents.iter().for_each(|e| *blocks.entry(e.pack).or_default() += e.blocks);
        blocks
    }

    /// The runs of blocks that are neither zeros nor known, ascending: first block and count.
    pub fn residue_runs(&self, disk: &DiskBlocks) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut extents = self.extents.iter().peekable();
        for (block, _) in disk.nonzero() {
            while extents.next_if(|e| e.disk_block + e.blocks <= block).is_some() {}
            if extents.peek().is_some_and(|e| e.disk_block <= block) {
                continue;
            }
            match runs.last_mut() {
                Some((first, count)) if *first + *count == block => *count += 1,
                _ => runs.push((block, 1)),
            }
        }
        runs
    }
}

/// Matches one disk against the packs of a repository.
pub struct Matcher<'a> {
    places: &'a BlockPlaces,
    allowed: Vec<bool>,
    /// Blocks matched so far in each pack: among equals, the pack used most.
    used: Vec<u64>,
    extents_max: u64,
}

impl<'a> Matcher<'a> {
    pub fn new(places: &'a BlockPlaces) -> Self {
        let packs = places.packs.len();
        Self { places, allowed: vec![true; packs], used: vec![0; packs], extents_max: EXTENTS_MAX }
    }

    /// Matches all blocks, then, if packs turn out not to be worth it, again without those.
    pub fn run(mut self, disk: &DiskBlocks, job: Job<'_>) -> Result<Matching, AdoptError> {
        let matching = self.pass(disk, job)?;
        let blocks = matching.blocks_of_packs();
        let mut all_worth_it = true;
        for (number, allowed) in (0u32..).zip(&mut self.allowed) {
            let matched = blocks.get(&number).copied().unwrap_or(0);
            let pack = &self.places.packs[number as usize];
            *allowed = is_worth_it(matched * BLOCK_BYTES, pack.size_bytes, pack.is_named);
            all_worth_it &= *allowed || matched == 0;
        }
        if all_worth_it {
            return Ok(matching);
        }
        self.used.fill(0);
        self.pass(disk, job)
    }

    fn pass(&mut self, disk: &DiskBlocks, job: Job<'_>) -> Result<Matching, AdoptError> {
        let mut extents: Vec<BlockExtent> = Vec::new();
        let total = disk.nonzero_count();
        for ((block, digest), done) in disk.nonzero().zip(0u64..) {
            if done.is_multiple_of(STRIDE) {
                job.check()?;
                (job.progress)("match", done * BLOCK_BYTES, total * BLOCK_BYTES);
            }
            let is_full = extents.len() as u64 == self.extents_max;
            // What follows the run before, if not at once then behind zeros or what is not known.
            let last = extents.last_mut().filter(|e| self.allowed[e.pack as usize]);
            let expected = last.as_ref().map(|e| (e.pack, e.pack_block + (block - e.disk_block)));
            let expected = expected.filter(|(pack, at)| self.places.is_at(digest, *pack, *at));
            let Some((pack, pack_block)) = expected.or_else(|| self.best(disk, block, digest)) else {
                continue;
            };
            match last {
                Some(e)
                    if e.pack == pack
                        && e.disk_block + e.blocks == block
                        && e.pack_block + e.blocks == pack_block =>
                {
                    e.blocks += 1;
                }
                // The rest is residue.
                _ if is_full => break,
                _ => extents.push(BlockExtent { disk_block: block, pack, pack_block, blocks: 1 }),
            }
            self.used[pack as usize] += 1;
        }
        Ok(Matching { extents })
    }

    /// The place from which most blocks go on as on the disk.
    fn best(&self, disk: &DiskBlocks, block: u64, digest: u64) -> Option<(u32, u64)> {
        let allowed = self.places.find(digest).iter().filter(|p| self.allowed[p.pack as usize]);
        let mut candidates = allowed.take(CANDIDATES_MAX).map(|p| (p.pack, u64::from(p.block))).peekable();
        let first = candidates.next()?;
        if candidates.peek().is_none() {
            return Some(first);
        }
        let run = |(pack, at): (u32, u64)| {
            (1..LOOK_AHEAD_BLOCKS)
                .take_while(|n| match disk.digest_at(block + n) {
                    0 => false,
                    digest => self.places.is_at(digest, pack, at + n),
                })
                .count()
        };
        let rank = |place: &(u32, u64)| {
            let pack = place.0 as usize;
            let named = self.places.packs[pack].is_named;
            (run(*place), self.used[pack], named, std::cmp::Reverse(*place))
        };
        std::iter::once(first).chain(candidates).max_by_key(rank)
    }
}

/// Whether so much of a pack is on the disk that a move may take the whole pack along. What a named
/// component has is likely held by others, or will be, so little of it is enough if it is a share.
fn is_worth_it(matched_bytes: u64, pack_bytes: u64, is_named: bool) -> bool {
    let share = |percent| matched_bytes > 0 && matched_bytes * 100 >= pack_bytes * percent;
    if is_named {
        share(NAMED_PERCENT_MIN)
    } else {
        matched_bytes >= MATCHED_BYTES_MIN && share(MATCHED_PERCENT_MIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adopt::Segments;
    use crate::repository::{PLACES_MAX_DEFAULT, Repository};

    const JOB: Job<'static> = Job { progress: &|_, _, _| (), cancelled: &|| false };

    /// Blocks of equal bytes; block 0 is zeros.
    fn blocks(numbers: &[u8]) -> Vec<u8> {
        numbers.iter().flat_map(|n| [*n; BLOCK_BYTES as usize]).collect()
    }

    struct World {
        places: BlockPlaces,
        disk: DiskBlocks,
        /// Place of each pack, in the order given, in `places.packs`.
        numbers: Vec<u32>,
    }

    fn world(packs: &[Vec<u8>], disk: &[u8]) -> World {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::create(&dir.path().join("r")).unwrap();
        let store = |numbers: &Vec<u8>| {
            let bytes = blocks(numbers);
            let mut writer = repository.pack_writer().unwrap();
            writer.append(&mut bytes.as_slice(), bytes.len() as u64).unwrap();
            writer.finish().unwrap().unwrap().0
        };
        let ids: Vec<_> = packs.iter().map(store).collect();
        let path = dir.path().join("disk");
        std::fs::write(&path, blocks(disk)).unwrap();
        let disk = DiskBlocks::read(&Segments::of_file(&path).unwrap(), JOB).unwrap();
        let places = repository.block_places(PLACES_MAX_DEFAULT, &|_, _| (), &|| false).unwrap();
        let place = |id| places.packs.iter().position(|p| p.id == id).unwrap() as u32;
        World { numbers: ids.into_iter().map(place).collect(), places, disk }
    }

    /// Extents as (disk block, pack in the order given, pack block, blocks).
    fn matched(world: &World, matching: &Matching) -> Vec<(u64, usize, u64, u64)> {
        let pack = |number| world.numbers.iter().position(|n| *n == number).unwrap();
        matching.extents.iter().map(|e| (e.disk_block, pack(e.pack), e.pack_block, e.blocks)).collect()
    }

    fn pass(packs: &[Vec<u8>], disk: &[u8]) -> Vec<(u64, usize, u64, u64)> {
        let world = world(packs, disk);
        let matching = Matcher::new(&world.places).pass(&world.disk, JOB).unwrap();
        matched(&world, &matching)
    }

    #[test]
    fn runs_go_on_where_they_began() {
        assert_eq!(pass(&[vec![1, 2, 3], vec![2, 9]], &[1, 2, 3]), [(0, 0, 0, 3)]);
        assert_eq!(pass(&[vec![2, 9], vec![1, 2, 3]], &[7, 1, 2, 3]), [(1, 1, 0, 3)]);
        // Among equal beginnings, the one that goes on longest.
        assert_eq!(pass(&[vec![2, 9], vec![5, 2, 3, 4], vec![2, 3]], &[2, 3, 4]), [(0, 1, 1, 3)]);
        // A file with a hole, or a changed block, is found again behind it.
        assert_eq!(pass(&[vec![2], vec![1, 0, 2]], &[1, 0, 2]), [(0, 1, 0, 1), (2, 1, 2, 1)]);
        assert_eq!(pass(&[vec![2], vec![1, 8, 2]], &[1, 9, 2]), [(0, 1, 0, 1), (2, 1, 2, 1)]);
        // The same blocks may be used many times.
        assert_eq!(pass(&[vec![1, 2]], &[1, 2, 1, 2]), [(0, 0, 0, 2), (2, 0, 0, 2)]);
        assert_eq!(pass(&[vec![1, 2]], &[3, 4]), []);
    }

    #[test]
    fn what_is_neither_known_nor_zeros_is_residue() {
        let world = world(&[vec![1, 2]], &[9, 0, 1, 2, 8, 7, 0, 6]);
        let matching = Matcher::new(&world.places).pass(&world.disk, JOB).unwrap();
        assert_eq!(matched(&world, &matching), [(2, 0, 0, 2)]);
        assert_eq!(matching.residue_runs(&world.disk), [(0, 1), (4, 2), (7, 1)]);
        assert_eq!((world.disk.nonzero_count(), world.disk.count()), (6, 256));
    }

    #[test]
    fn more_extents_than_a_list_may_have_are_residue() {
        let world = world(&[vec![1, 2, 3]], &[1, 3, 2, 3]);
        let mut matcher = Matcher::new(&world.places);
        matcher.extents_max = 2;
        let matching = matcher.pass(&world.disk, JOB).unwrap();
        assert_eq!(matched(&world, &matching), [(0, 0, 0, 1), (1, 0, 2, 1)]);
        assert_eq!(matching.residue_runs(&world.disk), [(2, 2)]);
    }

    #[test]
    fn what_was_found_in_a_pack_not_worth_it_is_looked_for_elsewhere() {
        // Block 200 follows 17 others in a large pack of which little else is used, and ends a small one.
        let known: Vec<u8> = (1..=16).collect();
        let large: Vec<u8> = [vec![100, 200, 201], (0..400).map(|n| 50 + (n % 40) as u8).collect()].concat();
        let small = [known.clone(), vec![200]].concat();
        let disk = [vec![100, 200], vec![0], known].concat();
        let world = world(&[large, small], &disk);
        let mut matcher = Matcher::new(&world.places);
        let all = matched(&world, &matcher.pass(&world.disk, JOB).unwrap());
        assert_eq!(all, [(0, 0, 0, 2), (3, 1, 0, 16)]);
        let worthy = Matcher::new(&world.places).run(&world.disk, JOB).unwrap();
        assert_eq!(matched(&world, &worthy), [(1, 1, 16, 1), (3, 1, 0, 16)]);
        let cancelled = Job { cancelled: &|| true, ..JOB };
        assert!(matches!(
            Matcher::new(&world.places).run(&world.disk, cancelled),
            Err(AdoptError::Cancelled)
        ));
    }

    #[test]
    fn a_pack_is_worth_its_way_if_much_and_a_good_share_of_it_is_used() {
        const KIB: u64 = 1 << 10;
        for (matched, size, named, worth) in [
            (64 * KIB, 64 * KIB, false, true),
            (60 * KIB, 60 * KIB, false, false),
            (64 * KIB, 1280 * KIB, false, true),
            (64 * KIB, 1284 * KIB, false, false),
            (4 * KIB, 8 * KIB, true, true),
            (64 * KIB, 9000 * KIB, true, false),
            (2250 * KIB, 9000 * KIB, true, true),
            (4 * KIB, 9000 * KIB, true, false),
            (0, 4 * KIB, true, false),
        ] {
            assert_eq!(is_worth_it(matched, size, named), worth, "{matched} of {size}, {named}");
        }
    }
}
