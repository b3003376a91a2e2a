//! Staging without QEMU: what is fetched, what is not, and what an interruption leaves.

use std::collections::HashMap;
use std::path::Path;

use cicada::disk::{
    DiskError, DiskFile, DiskImage, OverlayWriter, ROOT_BLOCK_BYTES, StagedDisk, USER_DATA_BLOCK_BYTES,
};
use cicada::types::BlockHash;
use cicada::vm::{Block, ChunkMap, MapRef};
use proptest::prelude::*;

use crate::make_base;

const SIZE: u64 = (4 << 20) + 4096 + 512;

/// Blocks by hash, as a peer would serve them, counting.
#[derive(Default)]
struct Shelf {
    blocks: HashMap<BlockHash, Vec<u8>>,
    served: usize,
}

impl Shelf {
    /// A block of one repeated byte.
    fn block(&mut self, byte: u8, len: usize) -> Block {
        let bytes = vec![byte; len];
        let hash = BlockHash::of(&bytes);
        self.blocks.insert(hash, bytes);
        Block::Data(hash)
    }

    fn serve(&mut self, hash: &BlockHash) -> Result<Vec<u8>, DiskError> {
        self.served += 1;
        Ok(self.blocks[hash].clone())
    }

    fn served_since(&mut self) -> usize {
        std::mem::take(&mut self.served)
    }
}

fn root_map(blocks: Vec<(u64, Block)>) -> ChunkMap {
    ChunkMap { block_size_bytes: ROOT_BLOCK_BYTES, disk_size_bytes: SIZE, blocks }
}

fn shape(map: &ChunkMap) -> MapRef {
    MapRef { block_size_bytes: map.block_size_bytes, disk_size_bytes: map.disk_size_bytes, root: None }
}

fn root(dir: &Path) -> DiskFile {
    DiskFile::Root { overlay: dir.join("root.qcow2"), base: make_base(dir, SIZE, 1) }
}

fn open(disk: &DiskFile, map: &ChunkMap) -> StagedDisk {
    StagedDisk::open_or_create(disk.clone(), &shape(map)).unwrap()
}

fn pass(staged: &mut StagedDisk, map: &ChunkMap, shelf: &mut Shelf) -> usize {
    staged.apply(map, &mut |hash| shelf.serve(hash)).unwrap();
    staged.finish(map).unwrap();
    staged.verify(map).unwrap();
    assert_eq!(staged.plan(map).unwrap().missing(), 0);
    shelf.served_since()
}

#[test]
fn a_block_in_many_places_is_fetched_once_and_later_passes_only_fetch_what_is_new() {
    let dir = tempfile::tempdir().unwrap();
    let disk = root(dir.path());
    let mut shelf = Shelf::default();
    let [a, b, c] = [1, 2, 3].map(|byte| shelf.block(byte, 4096));
    let last = shelf.block(9, 512);
    let first = root_map(vec![(1, a), (2, a), (3, b), (4, Block::Zero), (700, a), (SIZE / 4096, last)]);
    let mut staged = open(&disk, &first);
    let plan = staged.plan(&first).unwrap();
    assert_eq!(
        (plan.fetch.len(), plan.fetch_bytes, plan.zero.len(), plan.missing()),
        (3, 2 * 4096 + 512, 1, 6)
    );
    assert_eq!(pass(&mut staged, &first, &mut shelf), 3);

    // New content, a copy of what the disk keeps elsewhere, and places given up.
    let second = root_map(vec![(2, a), (3, c), (5, a), (SIZE / 4096, last)]);
    let plan = staged.plan(&second).unwrap();
    assert_eq!((plan.fetch.len(), plan.copy.len(), plan.discard, plan.already), (1, 1, vec![1, 4, 700], 2));
    assert_eq!(pass(&mut staged, &second, &mut shelf), 1);

    // Two blocks change places: neither can be the other's source.
    let swapped = root_map(vec![(2, c), (3, a), (SIZE / 4096, last)]);
    assert_eq!(pass(&mut staged, &swapped, &mut shelf), 2);
    assert_eq!(pass(&mut staged, &root_map(vec![]), &mut shelf), 0);
    assert_eq!(staged.applied(), root_map(vec![]));
}

#[test]
fn a_pass_goes_on_where_it_was_after_a_cut_and_after_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let disk = root(dir.path());
    let mut shelf = Shelf::default();
    let blocks = (0..200u8).map(|n| (u64::from(n) * 5, shelf.block(n + 1, 4096))).collect();
    let map = root_map(blocks);
    let mut staged = open(&disk, &map);
    let cut = |shelf: &mut Shelf, staged: &mut StagedDisk, after: usize| {
        let mut count = 0;
        let result = staged.apply(&map, &mut |hash| {
            count += 1;
            if count > after {
                Err(DiskError::UnknownBlock { path: "link".into(), hash: *hash })
            } else {
                shelf.serve(hash)
            }
        });
        assert!(result.is_err());
        shelf.served_since()
    };
    assert_eq!(cut(&mut shelf, &mut staged, 80), 80);
    assert!(matches!(staged.finish(&map), Err(DiskError::Incomplete { missing: 120, .. })));
    // The link was cut, the process lives.
    assert_eq!(cut(&mut shelf, &mut staged, 30), 30);
    // The process dies: there is no record, so the disk itself is asked.
    drop(staged);
    assert!(!dir.path().join("root.qcow2.map").exists());
    let mut staged = open(&disk, &map);
    assert_eq!(staged.plan(&map).unwrap().fetch.len(), 90);
    assert_eq!(pass(&mut staged, &map, &mut shelf), 90);
    // An orderly end: the record stands and says the same.
    drop(staged);
    assert_eq!(open(&disk, &map).applied(), map);
}

#[test]
fn a_record_older_than_its_disk_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let disk = root(dir.path());
    let mut shelf = Shelf::default();
    let map = root_map(vec![(1, shelf.block(1, 4096)), (2, shelf.block(2, 4096))]);
    let mut staged = open(&disk, &map);
    pass(&mut staged, &map, &mut shelf);
    drop(staged);
    // A VM runs on it. The clock of file times ticks every few milliseconds.
    std::thread::sleep(std::time::Duration::from_millis(20));
    let DiskFile::Root { overlay, base } = &disk else { unreachable!() };
    let mut guest = OverlayWriter::open_or_create(overlay, base, SIZE).unwrap();
    guest.write_block(2, &[5; 4096]).unwrap();
    guest.finish().unwrap();
    drop(guest);
    let staged = open(&disk, &map);
    assert!(matches!(staged.verify(&map), Err(DiskError::Differs { offset_bytes: 8192, .. })));
    assert_eq!(staged.plan(&map).unwrap().fetch.len(), 1);
}

#[test]
fn wrong_blocks_and_wrong_maps_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let disk = root(dir.path());
    let mut shelf = Shelf::default();
    let short = shelf.block(1, 512);
    let (Block::Data(full_hash), Block::Data(short_hash)) = (shelf.block(1, 4096), short) else {
        unreachable!()
    };
    let map = root_map(vec![(0, Block::Data(full_hash)), (7, short)]);
    let mut staged = open(&disk, &map);
    staged.begin(&map).unwrap();
    for (hash, bytes) in [(full_hash, vec![2; 4096]), (short_hash, vec![1; 512]), (full_hash, vec![1; 4097])]
    {
        let refused = staged.write_block(&hash, &bytes);
        assert!(matches!(refused, Err(DiskError::WrongBlock { .. })), "{refused:?}");
    }
    let unasked = BlockHash::of(&[6; 4096]);
    assert_eq!(staged.write_block(&unasked, &[6; 4096]).unwrap(), 0);
    assert_eq!(staged.write_block(&full_hash, &[1; 4096]).unwrap(), 1);
    assert_eq!(staged.write_block(&full_hash, &[1; 4096]).unwrap(), 0);

    let mut other_size = root_map(vec![]);
    other_size.disk_size_bytes += 4096;
    for wrong in [
        other_size,
        root_map(vec![(SIZE / 4096 + 1, short)]),
        root_map(vec![(u64::MAX, short)]),
        root_map(vec![(5, short), (5, short)]),
        ChunkMap::empty(8192, SIZE),
    ] {
        assert!(matches!(staged.plan(&wrong), Err(DiskError::WrongMap { .. })));
        assert!(matches!(staged.verify(&wrong), Err(DiskError::WrongMap { .. })));
    }
    assert!(matches!(StagedDisk::open_or_create(disk, &shape(&map)), Err(DiskError::Busy { .. })));
    let relative = DiskFile::Root { overlay: dir.path().join("x"), base: "base".into() };
    assert!(matches!(StagedDisk::open_or_create(relative, &shape(&map)), Err(DiskError::WrongDisk { .. })));
}

#[test]
fn zeros_on_a_user_data_disk_are_holes_however_they_are_spelt() {
    let dir = tempfile::tempdir().unwrap();
    let disk = DiskFile::UserData { raw: dir.path().join("data.raw") };
    let mut shelf = Shelf::default();
    let block = USER_DATA_BLOCK_BYTES as usize;
    let size = 10 * block as u64 + 77;
    let map = |blocks| ChunkMap { block_size_bytes: USER_DATA_BLOCK_BYTES, disk_size_bytes: size, blocks };
    let (a, last) = (shelf.block(1, block), shelf.block(2, 77));
    let first = map(vec![(0, a), (3, Block::Zero), (4, a), (10, last)]);
    let mut staged = open(&disk, &first);
    assert_eq!(pass(&mut staged, &first, &mut shelf), 2);
    let second = map(vec![(0, Block::Zero), (4, a)]);
    assert_eq!(pass(&mut staged, &second, &mut shelf), 0);
    let bytes = std::fs::read(disk.path()).unwrap();
    assert_eq!(bytes.len() as u64, size);
    assert!(bytes.iter().enumerate().all(|(at, b)| *b == u8::from((4 * block..5 * block).contains(&at))));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// The writer against a plain array, over passes, finished and reopened or left dirty.
    #[test]
    fn overlays_hold_what_was_written(
        operations in proptest::collection::vec((0u64..=SIZE / 4096, 0u8..9, 1u8..), 1..120),
        ends in proptest::collection::vec(any::<bool>(), 4),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (base, overlay) = (make_base(dir.path(), SIZE, 77), dir.path().join("overlay"));
        let below = std::fs::read(&base).unwrap();
        let mut model = below.clone();
        for (part, end) in operations.chunks(operations.len().div_ceil(4)).zip(ends) {
            let mut writer = OverlayWriter::open_or_create(&overlay, &base, SIZE).unwrap();
            for (number, kind, byte) in part {
                let at = *number as usize * 4096;
                let range = at..SIZE.min(at as u64 + 4096) as usize;
                match kind {
                    0 | 1 => {
                        writer.discard(*number).unwrap();
                        model[range.clone()].copy_from_slice(&below[range]);
                    }
                    2 | 3 => {
                        writer.write_zero(*number).unwrap();
                        model[range].fill(0);
                    }
                    _ => {
                        writer.write_block(*number, &vec![*byte; range.len()]).unwrap();
                        model[range].fill(*byte);
                    }
                }
            }
            if end {
                writer.finish().unwrap();
            }
            let image = DiskImage::overlay(&overlay, &base).unwrap();
            let mut found = vec![0; SIZE as usize];
            image.read_at(0, &mut found).unwrap();
            prop_assert!(found == model);
        }
        if crate::qemu::installed("overlays_hold_what_was_written: check by QEMU") {
            OverlayWriter::open_or_create(&overlay, &base, SIZE).unwrap().finish().unwrap();
            crate::qemu::check(&overlay);
        }
    }
}
