//! qcow2 files that lie: whatever their bytes, reading, scanning and opening for writing never
//! panic, and never allocate more for what a file merely claims. In a file of its own because it
//! watches every allocation of the process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use cicada::disk::{DiskError, OverlayWriter, Qcow2, scan_root};
use proptest::prelude::*;

/// Remembers the largest single allocation.
struct Watched;

static LARGEST_BYTES: AtomicUsize = AtomicUsize::new(0);
const ALLOCATION_BYTES_MAX: usize = 4 << 20;

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST_BYTES.fetch_max(layout.size(), Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST_BYTES.fetch_max(layout.size(), Ordering::Relaxed);
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST_BYTES.fetch_max(size, Ordering::Relaxed);
        unsafe { System.realloc(at, layout, size) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

const SIZE: u64 = 3 << 20;
const CLUSTER: u64 = 128 << 10;
/// Where an overlay made here keeps its tables.
const REFCOUNT_TABLE: u64 = CLUSTER;
const L1: u64 = 3 * CLUSTER;
const L2: u64 = 4 * CLUSTER;

/// A number written over the file, at a place that matters.
#[derive(Clone, Debug)]
struct Lie {
    at: u64,
    bytes: Vec<u8>,
}

fn lie() -> impl Strategy<Value = Lie> {
    let place = prop_oneof![
        4 => 0u64..200,
        2 => (0u64..4).prop_map(|n| L1 + n),
        4 => (0u64..16 * 24).prop_map(|n| L2 + n),
        1 => (0u64..32).prop_map(|n| REFCOUNT_TABLE + n),
    ];
    let number = prop_oneof![
        Just(0),
        Just(u64::MAX),
        Just(1 << 63),
        Just(1 << 62),
        Just(1 << 44),
        Just(CLUSTER),
        Just(L2),
        Just(L2 | 1 << 63),
        Just(SIZE),
        (0u32..64).prop_map(|n| 1 << n),
        any::<u64>(),
    ];
    (place, number, prop_oneof![Just(1usize), Just(4), Just(8)], any::<bool>()).prop_map(
        |(at, number, len, aligned)| {
            let at = if aligned { at / len as u64 * len as u64 } else { at };
            Lie { at, bytes: number.to_be_bytes()[8 - len..].to_vec() }
        },
    )
}

fn make(dir: &Path) -> (std::path::PathBuf, std::path::PathBuf) {
    let (base, overlay) = (dir.join("base"), dir.join("overlay"));
    std::fs::write(&base, vec![3; SIZE as usize]).unwrap();
    let mut writer = OverlayWriter::open_or_create(&overlay, &base, SIZE).unwrap();
    for number in (0..SIZE / 4096).step_by(9) {
        writer.write_block(number, &[number as u8; 4096]).unwrap();
        writer.write_zero(number + 1).unwrap();
    }
    writer.finish().unwrap();
    (base, overlay)
}

/// Does all that is done with a foreign overlay; errors are fine.
fn use_it(overlay: &Path, base: &Path) {
    LARGEST_BYTES.store(0, Ordering::Relaxed);
    if let Ok(image) = Qcow2::open(overlay) {
        let held: u64 = image.allocated().take(100_000).flatten().map(|run| run.len_bytes).sum();
        let mut buf = [0; 10_000];
        for offset in [0, 4095, SIZE - 1, image.virtual_size_bytes(), u64::MAX - 20_000] {
            let _ = image.read_at(offset, &mut buf, |_, part| {
                part.fill(0);
                Ok(())
            });
        }
        // A disk that claims gigabytes of zeros is sound, only long.
        if held < 1 << 26 {
            let _ = scan_root(overlay, base);
        }
    }
    if let Ok(mut writer) = OverlayWriter::open_or_create(overlay, base, SIZE) {
        for number in [0, 1, 5, 700, SIZE / 4096, u64::MAX] {
            let _ = writer.write_block(number, &[1; 4096]);
            let _ = writer.write_zero(number.wrapping_add(1));
            let _ = writer.discard(number.wrapping_add(2));
        }
        let _ = writer.finish();
    }
    let largest = LARGEST_BYTES.load(Ordering::Relaxed);
    assert!(largest <= ALLOCATION_BYTES_MAX, "allocated {largest} bytes at once");
}

#[test]
fn lies_are_survived() {
    let dir = tempfile::tempdir().unwrap();
    let (base, overlay) = make(dir.path());
    let honest = std::fs::read(&overlay).unwrap();
    // Cut short, or so long, and sparse, that any offset lies within.
    let length = prop_oneof![0..honest.len() as u64, Just(60 << 20), Just(1 << 42)];
    let lies = (proptest::collection::vec(lie(), 1..5), proptest::option::weighted(0.3, length));
    proptest!(ProptestConfig { cases: 1000, ..ProptestConfig::default() }, |((lies, length) in lies)| {
        std::fs::write(&overlay, &honest).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&overlay).unwrap();
        for lie in &lies {
            file.write_all_at(&lie.bytes, lie.at).unwrap();
        }
        if let Some(len) = length {
            file.set_len(len).unwrap();
        }
        drop(file);
        use_it(&overlay, &base);
    });

    // One by one, with the reason.
    let with = |at: u64, bytes: &[u8]| {
        std::fs::write(&overlay, &honest).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&overlay).unwrap();
        file.write_all_at(bytes, at).unwrap();
        scan_root(&overlay, &base)
    };
    let reason = |at: u64, number: u64, len: usize| match with(at, &number.to_be_bytes()[8 - len..]) {
        Err(DiskError::Damaged { reason, .. }) => reason,
        Err(DiskError::Unsupported { what, .. }) => what,
        other => panic!("{at}: {:?}", other.map(|(map, _)| map.blocks.len())),
    };
    assert_eq!(reason(0, 7, 4), "not a qcow2 file");
    assert_eq!(reason(4, 2, 4), "a qcow2 version other than 3");
    assert_eq!(reason(20, 40, 4), "the cluster size is outside the limits");
    assert_eq!(reason(24, 1 << 60, 8), "a disk of more than 16 TiB");
    assert_eq!(reason(24, 1 << 40, 8), "the L1 table does not fit the disk or the file");
    assert_eq!(reason(32, 1, 4), "encryption");
    assert_eq!(reason(36, 0xffff_ffff, 4), "the L1 table does not fit the disk or the file");
    assert_eq!(reason(40, u64::MAX << 17, 8), "the L1 table does not fit the disk or the file");
    assert_eq!(reason(60, 1, 4), "internal snapshots");
    assert_eq!(reason(72, 1 << 4 | 1 << 1, 8), "QEMU has marked it corrupt");
    assert_eq!(reason(72, 1 << 4 | 1 << 2, 8), "an external data file");
    assert_eq!(reason(72, 1 << 4 | 1 << 9, 8), "unknown qcow2 features");
    assert_eq!(reason(16, 5000, 4), "the name of the backing file is too long");
    assert_eq!(reason(L1, L2 + 512, 8), "an L1 entry has unknown bits or is not aligned");
    assert_eq!(reason(L1, 1 << 50, 8), "an L2 table lies beyond the end of the file");
    assert_eq!(reason(L2, 1 << 62, 8), "compressed clusters");
    assert_eq!(reason(L2, 1, 8), "an L2 entry has unknown bits or is not aligned");
    assert_eq!(reason(L2, 1 << 50, 8), "a data cluster lies beyond the end of the file");
    assert_eq!(reason(L2 + 8, u64::MAX, 8), "the subcluster bitmap of an L2 entry contradicts itself");

    // Two guest clusters in one host cluster would make the next writer destroy one.
    std::fs::write(&overlay, &honest).unwrap();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&overlay).unwrap();
    let mut entry = [0; 8];
    file.read_exact_at(&mut entry, L2).unwrap();
    file.write_all_at(&entry, L2 + 16).unwrap();
    let refused = OverlayWriter::open_or_create(&overlay, &base, SIZE);
    assert!(
        matches!(refused, Err(DiskError::Damaged { reason: "a cluster is used twice", .. })),
        "{refused:?}"
    );
}
