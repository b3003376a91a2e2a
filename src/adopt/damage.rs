//! Whether a disk file is whole. QEMU reads what a cut file lacks as zeros, so nothing else notices.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;

use serde_json::Value;

use crate::compose::ImageFormat;

use super::disk_file::DiskFile;
use super::error::io_error;
use super::{AdoptError, Job};

/// Of `qemu-img check`: clusters that nothing uses, which cost room alone.
const LEAKS_ONLY: i32 = 3;
const NOT_SUPPORTED: i32 = 63;
/// The longest line of a map; each is one run.
const LINE_BYTES_MAX: u64 = 4096;
/// The most that a first-level table may have, as in QEMU.
const L1_BYTES_MAX: u64 = 32 << 20;
const MIB: u64 = 1 << 20;
const L2_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Refuses a file that lacks what its own tables say it has. It names no other file any more.
pub fn check(disk: &DiskFile, format: ImageFormat, len: u64, job: Job<'_>) -> Result<(), AdoptError> {
    let path = disk.path();
    if format == ImageFormat::Qcow2 {
        check_tables(disk, len)?;
    }
    // QEMU takes one that lacks the last byte of its last block; blocks are counted in whole MiB.
    if format == ImageFormat::Vhdx && len % MIB == MIB - 1 {
        return Err(damaged(path, "it was cut short: it lacks the last byte".into()));
    }
    check_map(disk, format, len, job)?;
    job.check()?;
    let mut command = disk.qemu_img(&["check", "--output=json", "-f", &format.to_string()])?;
    // It says a line for each cluster.
    command.stdin(Stdio::null()).stderr(Stdio::null());
    let output = command.output().map_err(|e| super::source::not_run(path, &e))?;
    match output.status.code() {
        Some(0 | LEAKS_ONLY | NOT_SUPPORTED) => Ok(()),
        // One that cannot check this format says so in the same way as one that fails.
        _ if matches!(format, ImageFormat::Vpc | ImageFormat::Raw) => Ok(()),
        _ => {
            let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
            let count = |name: &str| said[name].as_u64().unwrap_or(0);
            let (bad, failed) = (count("corruptions"), count("check-errors"));
            Err(damaged(
                path,
                match bad + failed {
                    0 => "'qemu-img check' fails on it".to_owned(),
                    _ => format!("'qemu-img check' finds {bad} corruptions and {failed} errors"),
                },
            ))
        }
    }
}

fn damaged(path: &Path, reason: String) -> AdoptError {
    AdoptError::Damaged { path: path.to_owned(), reason }
}

/// Every run of data must lie in the file to its last byte.
fn check_map(disk: &DiskFile, format: ImageFormat, len: u64, job: Job<'_>) -> Result<(), AdoptError> {
    let path = disk.path();
    let mut command = disk.qemu_img(&["map", "--output=json", "-f", &format.to_string()])?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = super::source::Running(command.spawn().map_err(|e| super::source::not_run(path, &e))?);
    let Some(out) = child.0.stdout.take() else { return Ok(()) };
    let mut lines = BufReader::new(out);
    loop {
        let mut line = Vec::new();
        let n = (&mut lines).take(LINE_BYTES_MAX).read_until(b'\n', &mut line);
        if n.map_err(io_error("read the map of", path))? == 0 {
            break;
        }
        job.check()?;
        let text = line.trim_ascii();
        let text = text.strip_prefix(b"[").unwrap_or(text);
        let text = text.strip_suffix(b"]").or(text.strip_suffix(b",")).unwrap_or(text);
        let Ok(run) = serde_json::from_slice::<Value>(text) else { continue };
        let (Some(offset), Some(length)) = (run["offset"].as_u64(), run["length"].as_u64()) else { continue };
        if run["data"].as_bool() == Some(true) && offset.checked_add(length).is_none_or(|end| end > len) {
            return Err(damaged(
                path,
                format!(
                    "it was cut short: what it says of its content ends at byte {}, the file at {len}",
                    offset.saturating_add(length)
                ),
            ));
        }
    }
    let status = child.0.wait().map_err(io_error("wait for qemu-img reading", path))?;
    match status.success() {
        true => Ok(()),
        false => Err(damaged(path, "'qemu-img map' cannot make out where its content lies".into())),
    }
}

/// Tables of a qcow2 that lie beyond its end would read as zeros: nothing of the disk would be there.
fn check_tables(disk: &DiskFile, len: u64) -> Result<(), AdoptError> {
    let (path, file) = (disk.path(), disk.file());
    let mut header = [0; 104];
    let there = len.min(header.len() as u64) as usize;
    file.read_exact_at(&mut header[..there], 0).map_err(io_error("read", path))?;
    let be = |at: usize, n: usize| header[at..at + n].iter().fold(0u64, |v, b| v << 8 | u64::from(*b));
    let cluster_bytes = 1u64 << be(20, 4).min(30);
    let (count, table) = (be(36, 4), be(40, 8));
    let cut = || damaged(path, format!("it was cut short: its tables lie beyond its end at byte {len}"));
    let table_bytes = (count * 8).min(L1_BYTES_MAX);
    if table.checked_add(table_bytes).is_none_or(|end| end > len) {
        return Err(cut());
    }
    let mut entries = vec![0; table_bytes as usize];
    file.read_exact_at(&mut entries, table).map_err(io_error("read", path))?;
    for entry in entries.chunks_exact(8) {
        let offset = entry.iter().fold(0u64, |v, b| v << 8 | u64::from(*b)) & L2_OFFSET;
        if offset != 0 && offset.checked_add(cluster_bytes).is_none_or(|end| end > len) {
            return Err(cut());
        }
    }
    Ok(())
}
