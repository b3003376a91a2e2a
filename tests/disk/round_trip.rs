//! Random guest writes, through QEMU: reader against `qemu-img map` and `convert`, scan, stage, compare.

use std::path::{Path, PathBuf};

use cicada::disk::qcow2::{Run, RunState};
use cicada::disk::{
    BlockIndex, DiskError, DiskFile, DiskImage, OverlayWriter, Qcow2, StagedDisk, create_overlay,
    create_user_data, scan_root, scan_user_data,
};
use cicada::types::BlockHash;
use cicada::vm::ChunkMap;
use proptest::prelude::*;

use crate::{make_base, qemu};

/// Not a multiple of a cluster, nor of a block.
pub const SIZE: u64 = (6 << 20) + 4096 + 1536;

pub const OURS: &str = "extended_l2=on,cluster_size=128k";

/// One request of a guest.
#[derive(Clone, Debug)]
pub enum Request {
    Write { offset: u64, len: u64, pattern: u8 },
    Zero { offset: u64, len: u64 },
    Discard { offset: u64, len: u64 },
}

impl Request {
    pub fn command(&self) -> String {
        match self {
            Request::Write { offset, len, pattern } => format!("write -P {pattern} {offset} {len}"),
            Request::Zero { offset, len } => format!("write -z -u {offset} {len}"),
            Request::Discard { offset, len } => format!("discard {offset} {len}"),
        }
    }
}

fn request() -> impl Strategy<Value = Request> {
    let sector = 512u64;
    // Mostly pages, as a file system writes; sometimes odd sectors or long stretches.
    let place = prop_oneof![
        3 => (0..SIZE / 4096, 1u64..8).prop_map(|(o, l)| (o * 4096, l * 4096)),
        1 => (0..SIZE / 512, 1u64..40).prop_map(move |(o, l)| (o * sector, l * sector)),
        1 => (0..SIZE / 65536, 1u64..20).prop_map(|(o, l)| (o * 65536, l * 65536)),
    ]
    .prop_map(|(offset, len)| (offset, len.min(SIZE - offset)));
    (place, 0u8..4, 0u8..8).prop_map(|((offset, len), pattern, kind)| match kind {
        0 => Request::Zero { offset, len },
        1 => Request::Discard { offset, len },
        _ => Request::Write { offset, len, pattern },
    })
}

pub fn requests() -> impl Strategy<Value = Vec<Request>> {
    proptest::collection::vec(request(), 1..30)
}

pub fn commands(requests: &[Request]) -> Vec<String> {
    requests.iter().map(Request::command).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, max_shrink_iters: 64, ..ProptestConfig::default() })]

    #[test]
    fn root_disks_arrive_whole(seed: u64, first in requests(), second in requests(), made_here: bool) {
        if !qemu::installed("root_disks_arrive_whole") {
            return Ok(());
        }
        let dir = tempfile::tempdir().unwrap();
        let base = make_base(dir.path(), SIZE, seed);
        let source = dir.path().join("source.qcow2");
        if made_here {
            create_overlay(&source, &base, SIZE).unwrap();
            qemu::check(&source);
        } else {
            create_by_qemu(&source, &base, OURS);
        }
        let disk = DiskFile::Root { overlay: dir.path().join("target.qcow2"), base: base.clone() };
        for requests in [&first, &second] {
            qemu::io(&source, "qcow2", &commands(requests));
            agrees_with_qemu(&source, &base, dir.path());
            let (map, index) = scan_root(&source, &base).unwrap();
            let fetched = stage(&disk, &map, &index);
            // A block of a pass is one the guest touched in it: nothing else travels.
            prop_assert!(fetched as u64 <= touched_blocks(requests, 4096));
            qemu::check(disk.path());
            qemu::img(&["compare", "-q", "-f", "qcow2", "-F", "qcow2", qemu::text(&source), qemu::text(disk.path())]);
        }
        // A VM runs at the target, then the disk is brought back to what it was.
        qemu::io(disk.path(), "qcow2", &commands(&first));
        qemu::check(disk.path());
        let (map, index) = scan_root(&source, &base).unwrap();
        stage(&disk, &map, &index);
        qemu::check(disk.path());
        qemu::img(&["compare", "-q", "-f", "qcow2", "-F", "qcow2", qemu::text(&source), qemu::text(disk.path())]);
    }

    #[test]
    fn plain_qcow2_of_any_cluster_size_reads_right(seed: u64, requests in requests(), bits in 9u32..=21, extended: bool) {
        if !qemu::installed("plain_qcow2_of_any_cluster_size_reads_right") {
            return Ok(());
        }
        let dir = tempfile::tempdir().unwrap();
        let base = make_base(dir.path(), SIZE, seed);
        let disk = dir.path().join("disk.qcow2");
        let extended = if extended && bits >= 14 { "on" } else { "off" };
        create_by_qemu(&disk, &base, &format!("extended_l2={extended},cluster_size={}", 1u64 << bits));
        qemu::io(&disk, "qcow2", &commands(&requests));
        agrees_with_qemu(&disk, &base, dir.path());
        let (map, index) = scan_root(&disk, &base).unwrap();
        let target = DiskFile::Root { overlay: dir.path().join("target.qcow2"), base };
        stage(&target, &map, &index);
        qemu::img(&["compare", "-q", "-f", "qcow2", "-F", "qcow2", qemu::text(&disk), qemu::text(target.path())]);
    }

    #[test]
    fn user_data_arrives_whole(first in requests(), second in requests()) {
        if !qemu::installed("user_data_arrives_whole") {
            return Ok(());
        }
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source.raw");
        create_user_data(&source, SIZE).unwrap();
        let disk = DiskFile::UserData { raw: dir.path().join("target.raw") };
        for requests in [&first, &second] {
            qemu::io(&source, "raw", &commands(requests));
            let (map, index) = scan_user_data(&source).unwrap();
            let fetched = stage(&disk, &map, &index);
            prop_assert!(fetched as u64 <= touched_blocks(requests, map.block_size_bytes.into()));
            prop_assert!(std::fs::read(&source).unwrap() == std::fs::read(disk.path()).unwrap());
        }
    }
}

#[test]
fn what_no_disk_of_ours_has_is_refused() {
    if !qemu::installed("what_no_disk_of_ours_has_is_refused") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = make_base(dir.path(), SIZE, 1);
    let path = |name: &str| dir.path().join(name);
    let refused = |disk: &Path, expected: &str| match scan_root(disk, &base) {
        Err(DiskError::Unsupported { what, .. }) => assert_eq!(what, expected),
        other => panic!("{expected}: {other:?}"),
    };

    let compressed = path("compressed");
    qemu::img(&["convert", "-c", "-f", "raw", "-O", "qcow2", qemu::text(&base), qemu::text(&compressed)]);
    refused(&compressed, "compressed clusters");

    let snapshot = path("snapshot");
    create_by_qemu(&snapshot, &base, OURS);
    qemu::img(&["snapshot", "-c", "s", qemu::text(&snapshot)]);
    refused(&snapshot, "internal snapshots");

    let old = path("old");
    create_by_qemu(&old, &base, "compat=0.10");
    refused(&old, "a qcow2 version other than 3");

    let external = path("external");
    let data = format!("data_file={}", qemu::text(&path("data")));
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", &data, qemu::text(&external), "1M"]);
    refused(&external, "an external data file");

    let plain = path("plain");
    create_by_qemu(&plain, &base, "cluster_size=64k");
    let wrong = OverlayWriter::open_or_create(&plain, &base, SIZE);
    assert!(matches!(wrong, Err(DiskError::WrongDisk { .. })), "{wrong:?}");
}

#[test]
fn an_overlay_left_dirty_is_repaired_by_qemu_and_by_us() {
    if !qemu::installed("an_overlay_left_dirty_is_repaired_by_qemu_and_by_us") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = make_base(dir.path(), SIZE, 3);
    for by_qemu in [true, false] {
        let overlay = dir.path().join(format!("overlay-{by_qemu}"));
        let mut writer = OverlayWriter::open_or_create(&overlay, &base, SIZE).unwrap();
        for number in [0, 40, 41, 1000] {
            writer.write_block(number, &[7; 4096]).unwrap();
        }
        drop(writer);
        if by_qemu {
            qemu::io(&overlay, "qcow2", &["write -P 8 65536 4096".into()]);
        } else {
            OverlayWriter::open_or_create(&overlay, &base, SIZE).unwrap().finish().unwrap();
        }
        qemu::check(&overlay);
        qemu::io(&overlay, "qcow2", &["read -P 7 163840 8192".into(), "read -P 7 0 4096".into()]);
    }
}

/// A file of more than 8 GiB needs a second refcount block.
#[test]
fn refcounts_follow_a_file_that_grows() {
    if !qemu::installed("refcounts_follow_a_file_that_grows") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = make_base(dir.path(), 1 << 20, 5);
    let overlay = dir.path().join("overlay");
    let size = 10 << 30;
    let mut writer = OverlayWriter::open_or_create(&overlay, &base, size).unwrap();
    for number in (0..size / 4096).step_by(32) {
        writer.write_block(number, &[1; 4096]).unwrap();
    }
    writer.finish().unwrap();
    qemu::check(&overlay);
    for number in (0..size / 4096).step_by(32).skip(100) {
        writer.discard(number).unwrap();
    }
    writer.finish().unwrap();
    qemu::check(&overlay);
    drop(writer);
    let image = Qcow2::open(&overlay).unwrap();
    assert_eq!(image.allocated().map(|r| r.unwrap().len_bytes).sum::<u64>(), 100 * 4096);
}

pub fn create_by_qemu(disk: &Path, base: &Path, options: &str) {
    let options =
        if options.contains("compat") { options.to_owned() } else { format!("compat=1.1,{options}") };
    let size = std::fs::metadata(base).unwrap().len().to_string();
    let (base, disk) = (qemu::text(base), qemu::text(disk));
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", &options, "-F", "raw", "-b", base, disk, &size]);
}

/// Brings `disk` to `map` with blocks from `index`, as after a fresh start of the broker; returns how many.
fn stage(disk: &DiskFile, map: &ChunkMap, index: &BlockIndex) -> usize {
    let shape = map.to_tree().0;
    let mut staged = StagedDisk::open_or_create(disk.clone(), &shape).unwrap();
    let changes = staged.plan(map).unwrap();
    let mut fetched = 0;
    let mut provide = |hash: &BlockHash| {
        fetched += 1;
        index.read_block(hash)
    };
    staged.apply(map, &mut provide).unwrap();
    assert_eq!(fetched, changes.fetch.len());
    staged.finish(map).unwrap();
    staged.verify(map).unwrap();
    fetched
}

fn touched_blocks(requests: &[Request], block: u64) -> u64 {
    requests
        .iter()
        .map(|r| match r {
            Request::Write { offset, len, .. }
            | Request::Zero { offset, len }
            | Request::Discard { offset, len } => (offset + len).div_ceil(block) - offset / block,
        })
        .sum()
}

/// Content as QEMU converts it, allocation as QEMU maps it.
fn agrees_with_qemu(overlay: &Path, base: &Path, dir: &Path) {
    let raw: PathBuf = dir.join("converted.raw");
    qemu::img(&["convert", "-f", "qcow2", "-O", "raw", qemu::text(overlay), qemu::text(&raw)]);
    let expected = std::fs::read(&raw).unwrap();
    let image = DiskImage::overlay(overlay, base).unwrap();
    let mut found = vec![0; image.size_bytes() as usize];
    image.read_at(0, &mut found).unwrap();
    assert!(found == expected, "content differs");

    let mapped = qemu::img(&["map", "--output=json", "-f", "qcow2", qemu::text(overlay)]);
    let mapped: Vec<serde_json::Value> = serde_json::from_str(&mapped).unwrap();
    let qcow2 = Qcow2::open(overlay).unwrap();
    let mut ours = qcow2.allocated().map(Result::unwrap);
    let mut current: Option<Run> = None;
    for entry in &mapped {
        let number = |key: &str| entry[key].as_u64().unwrap();
        // Where neither layer holds anything QEMU names the lowest it asked.
        if number("depth") != 0 || entry["present"] == false {
            continue;
        }
        let (mut start, end) = (number("start"), number("start") + number("length"));
        while start < end {
            let run = match current.take().or_else(|| ours.next()) {
                Some(run) => run,
                None => panic!("QEMU has {start}..{end} allocated, we nothing: {mapped:?}"),
            };
            assert_eq!(run.offset_bytes, start, "{mapped:?}");
            match (run.state, entry["offset"].as_u64()) {
                (RunState::Data { host_offset_bytes }, Some(offset)) => {
                    assert_eq!(host_offset_bytes, offset + start - number("start"));
                }
                (RunState::Data { .. }, None) => panic!("QEMU has no data at {start}"),
                (RunState::Zero, _) => assert_eq!(entry["zero"], true),
            }
            let len = run.len_bytes.min(end - start);
            if run.len_bytes > len {
                let state = match run.state {
                    RunState::Data { host_offset_bytes } => {
                        RunState::Data { host_offset_bytes: host_offset_bytes + len }
                    }
                    RunState::Zero => RunState::Zero,
                };
                current = Some(Run { offset_bytes: start + len, len_bytes: run.len_bytes - len, state });
            }
            start += len;
        }
    }
    assert!(current.is_none() && ours.next().is_none(), "we have more than QEMU: {mapped:?}");
}
