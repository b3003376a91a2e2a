//! Removes a disk for good: after the grace period at a source, or when a VM is deleted.
//!
//! Every byte range that holds data is overwritten with zeros once and synced before the file is
//! unlinked. On a file system that overwrites in place (ext4, XFS without reflinks), on a disk
//! that does too, nothing of the guest's can be read back from the device through its ordinary
//! interface. That does **not** hold for copies made before (snapshots, reflinks, backups, data
//! journals, page files), for file systems that never overwrite (btrfs, ZFS), and for flash, whose
//! spare blocks may keep the old bytes. Where that matters, encrypt the device and destroy the key.
//!
//! A disk under the suffix [`SCRUB_SUFFIX`] is being scrubbed: it takes that name first, so that
//! no half-wiped disk is ever taken for a whole one, and [`finish_scrubs`] ends what a crash cut short.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::error::io_error;
use super::user_data::{data_ranges, write_zeros};
use super::{DiskError, staged_map};
use crate::durable;

/// What a disk's name ends in while it is scrubbed.
pub const SCRUB_SUFFIX: &str = ".scrub";

/// Overwrites and removes a disk and the record beside it, durably. One that is not there is no
/// error. No hypervisor may have it open.
pub fn scrub(disk: &Path) -> Result<(), DiskError> {
    let doomed = doomed_path(disk);
    // An earlier disk of that name, left by a crash.
    wipe(&doomed)?;
    staged_map::remove(disk)?;
    match fs::symlink_metadata(disk) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(io_error("stat", disk)(e)),
        Ok(metadata) => check_removable(disk, &metadata)?,
    }
    fs::rename(disk, &doomed)
        .and_then(|()| durable::sync_dir_of(&doomed))
        .map_err(io_error("rename", disk))?;
    wipe(&doomed)
}

/// Ends every scrub in `dir` that a crash interrupted; returns how many there were.
pub fn finish_scrubs(dir: &Path) -> Result<usize, DiskError> {
    let mut count = 0;
    for entry in fs::read_dir(dir).map_err(io_error("list", dir))? {
        let path = entry.map_err(io_error("list", dir))?.path();
        if path.file_name().is_some_and(|name| name.as_bytes().ends_with(SCRUB_SUFFIX.as_bytes())) {
            wipe(&path)?;
            count += 1;
        }
    }
    Ok(count)
}

fn doomed_path(disk: &Path) -> PathBuf {
    let mut name = disk.as_os_str().to_owned();
    name.push(OsStr::new(SCRUB_SUFFIX));
    PathBuf::from(name)
}

/// Zeros written through one name of a file would destroy what its other names stand for.
fn check_removable(path: &Path, metadata: &fs::Metadata) -> Result<(), DiskError> {
    if metadata.is_file() && metadata.nlink() == 1 {
        return Ok(());
    }
    let reason = "it is no ordinary file, or has a second name".to_owned();
    Err(DiskError::WrongDisk { path: path.to_owned(), reason })
}

fn wipe(path: &Path) -> Result<(), DiskError> {
    let no_follow = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
    let file = match OpenOptions::new().read(true).write(true).custom_flags(no_follow).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(io_error("open", path)(e)),
    };
    let metadata = file.metadata().map_err(io_error("stat", path))?;
    check_removable(path, &metadata)?;
    for range in data_ranges(&file, path, metadata.len()) {
        let range = range?;
        match write_zeros(&file, range.start, range.end - range.start) {
            // A file system that writes elsewhere when overwriting can be too full for it. Keeping
            // the disk would not help: there, its old bytes stay in either case.
            Err(e) if e.kind() == io::ErrorKind::StorageFull => {
                tracing::warn!(path = %path.display(), "no room to overwrite the disk; removing it as it is");
                break;
            }
            other => other.map_err(io_error("overwrite", path))?,
        }
    }
    file.sync_all().map_err(io_error("sync", path))?;
    durable::remove(path).map_err(io_error("remove", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_nothing_and_ends_what_was_begun() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("root.qcow2");
        for _ in 0..2 {
            fs::write(&disk, [7; 100_000]).unwrap();
            fs::write(staged_map::path_of(&disk), b"x").unwrap();
            // Another handle sees what becomes of the bytes.
            let mut witness = fs::File::open(&disk).unwrap();
            fs::write(doomed_path(&disk), [8; 5000]).unwrap();
            scrub(&disk).unwrap();
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
            let mut bytes = Vec::new();
            io::Read::read_to_end(&mut witness, &mut bytes).unwrap();
            assert!(bytes.len() == 100_000 && bytes.iter().all(|b| *b == 0));
        }
        scrub(&disk).unwrap();
        fs::write(doomed_path(&disk), [8; 5000]).unwrap();
        assert_eq!(finish_scrubs(dir.path()).unwrap(), 1);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn never_writes_through_a_second_name() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, other) = (dir.path().join("disk"), dir.path().join("other"));
        fs::write(&other, b"precious").unwrap();
        fs::hard_link(&other, &disk).unwrap();
        assert!(matches!(scrub(&disk), Err(DiskError::WrongDisk { .. })));
        fs::remove_file(&disk).unwrap();
        std::os::unix::fs::symlink(&other, &disk).unwrap();
        assert!(matches!(scrub(&disk), Err(DiskError::WrongDisk { .. })));
        assert_eq!(fs::read(&other).unwrap(), b"precious");
    }
}
