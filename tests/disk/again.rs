//! A look that reads only what changed finds what a look at everything finds.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use cicada::disk::{Scan, create_overlay, create_user_data, scan_root, scan_user_data};
use cicada::vm::ChunkMap;
use proptest::prelude::*;

use crate::round_trip::{OURS, Request, SIZE, create_by_qemu, requests};
use crate::{Dice, make_base, qemu};

/// A guest that goes on running: QEMU's block layer with its caches, told one request at a time.
struct Guest {
    process: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Guest {
    fn start(disk: &Path) -> Self {
        let mut process = Command::new("qemu-io")
            .args(["-t", "writeback", "-d", "unmap", "-f", "qcow2", qemu::text(disk)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap());
        Self { requests: process.stdin.take(), answers, process }
    }

    /// Returns when the request has been completed.
    fn does(&mut self, request: &Request) {
        writeln!(self.requests.as_mut().unwrap(), "{}", request.command()).unwrap();
        let mut line = String::new();
        while !line.contains("ops;") {
            line.clear();
            assert!(self.answers.read_line(&mut line).unwrap() > 0, "the guest is gone");
            assert!(!line.contains("failed"), "{line}");
        }
    }

    /// Writes out what it caches.
    fn switches_off(mut self) {
        drop(self.requests.take());
        assert!(self.process.wait().unwrap().success());
    }
}

/// What a hypervisor that notes changes says of requests: whole granules.
fn noted(requests: &[Request]) -> Vec<Range<u64>> {
    const GRANULE: u64 = 64 << 10;
    let range = |request: &Request| {
        let (Request::Write { offset, len, .. }
        | Request::Zero { offset, len }
        | Request::Discard { offset, len }) = request;
        offset / GRANULE * GRANULE..(offset + len).next_multiple_of(GRANULE).min(SIZE)
    };
    requests.iter().map(range).collect()
}

fn agrees(scan: &Scan, overlay: &Path, base: &Path) -> Result<(), TestCaseError> {
    let (whole, index) = scan_root(overlay, base).unwrap();
    prop_assert!(*scan.map == whole, "{:?}", differing(&scan.map, &whole));
    prop_assert_eq!(scan.index.len(), index.len());
    Ok(())
}

fn differing(one: &ChunkMap, two: &ChunkMap) -> Vec<u64> {
    let numbers = one.blocks.iter().chain(&two.blocks).map(|b| b.0);
    numbers.filter(|n| one.get(*n) != two.get(*n)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 64, ..ProptestConfig::default() })]

    /// Looks beside a running guest see old tables; the last one, after it, is right all the same.
    #[test]
    fn root_disks_are_looked_at_again(
        seed: u64,
        before in requests(),
        passes in proptest::collection::vec(requests(), 1..4),
        bits in 9u32..=21,
        ours: bool,
    ) {
        if !qemu::installed("root_disks_are_looked_at_again") {
            return Ok(());
        }
        let dir = tempfile::tempdir().unwrap();
        let base = make_base(dir.path(), SIZE, seed);
        let overlay = dir.path().join("overlay.qcow2");
        create_by_qemu(&overlay, &base, &if ours { OURS.into() } else { format!("cluster_size={}", 1u64 << bits) });
        let mut guest = Guest::start(&overlay);
        before.iter().for_each(|request| guest.does(request));
        // From here on changes are noted.
        let mut scan = Scan::root(&overlay, &base).unwrap();
        for requests in &passes {
            requests.iter().for_each(|request| guest.does(request));
            scan = scan.root_again(&overlay, &base, &noted(requests)).unwrap();
        }
        guest.switches_off();
        let last = scan.root_again(&overlay, &base, &[]).unwrap();
        agrees(&last, &overlay, &base)?;
        // Nobody wrote since: nothing is read.
        let idle = last.root_again(&overlay, &base, &[]).unwrap();
        prop_assert_eq!(idle.read_bytes, 0);
        agrees(&idle, &overlay, &base)?;
    }

    #[test]
    fn user_data_is_looked_at_again(first in requests(), second in requests()) {
        if !qemu::installed("user_data_is_looked_at_again") {
            return Ok(());
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.raw");
        create_user_data(&path, SIZE).unwrap();
        let commands = |requests: &[Request]| requests.iter().map(Request::command).collect::<Vec<_>>();
        qemu::io(&path, "raw", &commands(&first));
        let scan = Scan::user_data(&path).unwrap();
        qemu::io(&path, "raw", &commands(&second));
        let again = scan.user_data_again(&path, &noted(&second)).unwrap();
        let (whole, index) = scan_user_data(&path).unwrap();
        prop_assert!(*again.map == whole, "{:?}", differing(&again.map, &whole));
        prop_assert_eq!(again.index.len(), index.len());
    }
}

/// What was written before changes were noted, and whose place QEMU kept to itself, is found by
/// its place. Without that no list of changes would ever name it.
#[test]
fn what_qemu_kept_to_itself_is_found() {
    if !qemu::installed("what_qemu_kept_to_itself_is_found") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = make_base(dir.path(), SIZE, 17);
    let overlay = dir.path().join("overlay.qcow2");
    create_overlay(&overlay, &base, SIZE).unwrap();
    let mut guest = Guest::start(&overlay);
    guest.does(&Request::Write { offset: 1 << 20, len: 300 << 10, pattern: 9 });
    guest.does(&Request::Zero { offset: 3 << 20, len: 64 << 10 });
    let stale = Scan::root(&overlay, &base).unwrap();
    guest.switches_off();
    let (whole, _) = scan_root(&overlay, &base).unwrap();
    assert!(*stale.map != whole, "QEMU wrote its tables at once: this test shows nothing");
    let last = stale.root_again(&overlay, &base, &[]).unwrap();
    assert!(*last.map == whole, "{:?}", differing(&last.map, &whole));
}

#[test]
fn little_is_read_again_and_another_disk_wholly() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.raw");
    let size = 16 << 20;
    create_user_data(&path, size).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&Dice::new(5).bytes(size as usize), 0).unwrap();
    let scan = Scan::user_data(&path).unwrap();
    assert_eq!(scan.read_bytes, size);
    file.write_all_at(b"changed", 5 << 20).unwrap();
    // In any order, overlapping, empty, or beyond the end.
    let mib = 1 << 20;
    let changed = [12 * mib..12 * mib, 5 * mib..5 * mib + 7, 5 * mib + 1..5 * mib + 2, size..size + mib];
    let again = scan.user_data_again(&path, &changed).unwrap();
    assert_eq!(again.read_bytes, 16 << 10);
    assert_eq!(*again.map, scan_user_data(&path).unwrap().0);
    assert_ne!(again.map, scan.map);

    file.set_len(2 * size).unwrap();
    let grown = again.user_data_again(&path, &[]).unwrap();
    assert_eq!(grown.read_bytes, size, "the hole is not read");
    assert_eq!(*grown.map, scan_user_data(&path).unwrap().0);
}
