//! User-data disks: raw sparse files. What a guest never wrote, or discarded, is a hole.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;

use super::DiskError;
use super::error::io_error;
use crate::durable::{self, PendingFile};
use crate::sparse::data_runs;

/// Makes an empty user-data disk, durably and readable by its owner only; nothing is replaced.
pub fn create_user_data(path: &Path, size_bytes: u64) -> Result<(), DiskError> {
    create_file(path, |file| file.set_len(size_bytes))
}

/// Makes a user-data disk that no hypervisor runs larger, durably. One of that size stays as it is.
pub fn grow_user_data(path: &Path, size_bytes: u64) -> Result<(), DiskError> {
    let file = open_alone(path)?;
    let now = file.metadata().map_err(io_error("stat", path))?.len();
    if now > size_bytes {
        let reason = format!("it has {now} bytes, which is more than {size_bytes}");
        return Err(DiskError::WrongDisk { path: path.to_owned(), reason });
    }
    file.set_len(size_bytes).and_then(|()| file.sync_all()).map_err(io_error("enlarge", path))
}

/// A user-data disk opened for writing by one task at a time.
#[derive(Debug)]
pub struct UserDataDisk {
    file: File,
    path: PathBuf,
    size_bytes: u64,
}

impl UserDataDisk {
    /// Refuses a file of another size.
    pub fn open(path: &Path, size_bytes: u64) -> Result<Self, DiskError> {
        let file = open_alone(path)?;
        let found = file.metadata().map_err(io_error("stat", path))?.len();
        if found != size_bytes {
            let reason = format!("it has {found} bytes, not {size_bytes}");
            return Err(DiskError::WrongDisk { path: path.to_owned(), reason });
        }
        Ok(Self { file, path: path.to_owned(), size_bytes })
    }

    pub fn write_at(&self, offset_bytes: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.check(offset_bytes, bytes.len() as u64)?;
        self.file.write_all_at(bytes, offset_bytes).map_err(io_error("write", &self.path))
    }

    /// Makes a range read as zeros: a hole where the file system can, written zeros elsewhere.
    pub fn clear(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DiskError> {
        self.check(offset_bytes, len_bytes)?;
        let cleared = match punch_hole(&self.file, offset_bytes, len_bytes) {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => {
                write_zeros(&self.file, offset_bytes, len_bytes)
            }
            other => other,
        };
        cleared.map_err(io_error("clear", &self.path))
    }

    /// Makes everything written so far durable.
    pub fn finish(&self) -> Result<(), DiskError> {
        self.file.sync_all().map_err(io_error("sync", &self.path))
    }

    fn check(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DiskError> {
        if offset_bytes.checked_add(len_bytes).is_none_or(|end| end > self.size_bytes) {
            let reason = format!("byte {offset_bytes} is beyond its end at {}", self.size_bytes);
            return Err(DiskError::WrongMap { path: self.path.clone(), reason });
        }
        Ok(())
    }
}

/// Makes a disk file that only its owner may read, durably, unless one is there.
pub(super) fn create_file(
    path: &Path,
    fill: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<(), DiskError> {
    if path.symlink_metadata().is_ok() {
        return Err(DiskError::Exists { path: path.to_owned() });
    }
    let create = || {
        let mut pending = PendingFile::create(path)?;
        pending.file().set_permissions(Permissions::from_mode(0o600))?;
        fill(pending.file())?;
        pending.commit()
    };
    create().map_err(io_error("create", path))
}

/// Opens a disk for writing, refusing while another of our tasks has it open so. Hypervisors take
/// no such lock: that none runs the disk is the caller's to know.
pub(super) fn open_alone(path: &Path) -> Result<File, DiskError> {
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(io_error("open", path))?;
    match durable::lock_exclusive(&file) {
        Ok(true) => Ok(file),
        Ok(false) => Err(DiskError::Busy { path: path.to_owned() }),
        Err(e) => Err(io_error("lock", path)(e)),
    }
}

pub(super) fn punch_hole(file: &File, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
    if len_bytes == 0 {
        return Ok(());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, flags, offset_bytes, len_bytes)?)
}

pub(super) fn write_zeros(file: &File, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let mut done = 0;
    while done < len_bytes {
        let n = (len_bytes - done).min(ZEROS.len() as u64);
        file.write_all_at(&ZEROS[..n as usize], offset_bytes + done)?;
        done += n;
    }
    Ok(())
}

/// The ranges of a file that are not holes, ascending. Where the file system keeps no account of
/// holes that is the whole file. Ends after the first error.
pub(super) fn data_ranges<'a>(
    file: &'a File,
    path: &'a Path,
    len_bytes: u64,
) -> impl Iterator<Item = Result<Range<u64>, DiskError>> + Send + 'a {
    data_runs(file, 0..len_bytes).map(move |range| range.map_err(io_error("seek in", path)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn stays_sparse_and_within_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.raw");
        create_user_data(&path, 1 << 20).unwrap();
        assert!(matches!(create_user_data(&path, 5), Err(DiskError::Exists { .. })));
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        assert!(matches!(UserDataDisk::open(&path, 5), Err(DiskError::WrongDisk { .. })));

        let disk = UserDataDisk::open(&path, 1 << 20).unwrap();
        assert!(matches!(UserDataDisk::open(&path, 1 << 20), Err(DiskError::Busy { .. })));
        disk.write_at(64 << 10, &[7; 32 << 10]).unwrap();
        disk.clear(64 << 10, 16 << 10).unwrap();
        assert!(disk.write_at((1 << 20) - 1, &[1, 2]).is_err());
        assert!(disk.clear(u64::MAX, 2).is_err());
        disk.finish().unwrap();

        let ranges: Vec<_> = data_ranges(&disk.file, &path, 1 << 20).map(Result::unwrap).collect();
        let content = std::fs::read(&path).unwrap();
        assert!(content[64 << 10..80 << 10].iter().all(|b| *b == 0));
        assert!(content[80 << 10..96 << 10].iter().all(|b| *b == 7));
        assert!(ranges.iter().any(|r| r.contains(&(80 << 10))), "{ranges:?}");
    }
}
