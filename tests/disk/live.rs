//! Reading beside a writer: the first pass may be stale but never fails for good or lies.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use cicada::disk::{DiskError, create_overlay, scan_root};
use cicada::vm::Block;

use crate::{Dice, make_base, qemu};

#[test]
fn a_disk_is_scanned_while_qemu_writes() {
    if !qemu::installed("a_disk_is_scanned_while_qemu_writes") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let size = 64 << 20;
    let base = make_base(dir.path(), size, 11);
    let overlay = dir.path().join("overlay.qcow2");
    create_overlay(&overlay, &base, size).unwrap();
    let mut guest = Command::new("qemu-io")
        .args(["-f", "qcow2", qemu::text(&overlay)])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut requests = guest.stdin.take().unwrap();
    let done = AtomicBool::new(false);
    let (mut passes, mut served, mut changed) = (0, 0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut dice = Dice::new(99);
            for n in 0..6000 {
                let offset = dice.below(size / 4096 - 16) * 4096;
                let command = match n % 10 {
                    0 => format!("write -z {offset} 65536"),
                    1 => format!("discard {offset} 65536"),
                    _ => format!("write -P {} {offset} {}", n % 251, 4096 * (1 + dice.below(8))),
                };
                writeln!(requests, "{command}").unwrap();
                if n % 50 == 0 {
                    writeln!(requests, "flush").unwrap();
                }
            }
            drop(requests);
            guest.wait().unwrap();
            done.store(true, Ordering::SeqCst);
        });
        while !done.load(Ordering::SeqCst) {
            let (map, index) = match scan_root(&overlay, &base) {
                Ok(scanned) => scanned,
                Err(e) => panic!("pass {passes}: {e}"),
            };
            passes += 1;
            for (_, block) in map.blocks.iter().step_by(7) {
                let Block::Data(hash) = block else { continue };
                match index.read_block(hash) {
                    Ok(_) => served += 1,
                    Err(DiskError::Changed { .. }) => changed += 1,
                    Err(e) => panic!("{e}"),
                }
            }
        }
    });
    println!("{passes} passes, {served} blocks served, {changed} found changed");
    assert!(passes > 0);
    qemu::check(&overlay);
    let (map, index) = scan_root(&overlay, &base).unwrap();
    for (_, block) in &map.blocks {
        if let Block::Data(hash) = block {
            index.read_block(hash).unwrap();
        }
    }
}

#[test]
fn a_disk_that_qemu_has_open_is_in_use() {
    if !qemu::installed("a_disk_that_qemu_has_open_is_in_use") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = make_base(dir.path(), 1 << 20, 3);
    let overlay = dir.path().join("overlay.qcow2");
    create_overlay(&overlay, &base, 1 << 20).unwrap();
    let raw = dir.path().join("user-data.raw");
    std::fs::write(&raw, vec![7; 1 << 20]).unwrap();
    assert!(!cicada::disk::is_in_use(&dir.path().join("nothing")).unwrap());
    for (format, disk) in [("qcow2", &overlay), ("raw", &raw)] {
        assert!(!cicada::disk::is_in_use(disk).unwrap(), "{format}");
        let mut guest = Command::new("qemu-io")
            .args(["-f", format, qemu::text(disk)])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let begun = std::time::Instant::now();
        while !cicada::disk::is_in_use(disk).unwrap() {
            assert!(begun.elapsed().as_secs() < 60, "{format}: not seen to be in use");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        drop(guest.stdin.take());
        guest.wait().unwrap();
        assert!(!cicada::disk::is_in_use(disk).unwrap(), "{format}");
    }
}
