//! Level 0: the one way a file becomes durable. Temporary file in the same directory, write,
//! fsync, rename, fsync of the directory: after a crash the old content or the new is there,
//! never a mixture.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::fault;

/// Temporary files end in this; whatever bears it after a crash is a leftover and may be removed.
pub const TEMPORARY_SUFFIX: &str = ".tmp";

/// The file was replaced, and it is not known whether a crash of the machine undoes that.
#[derive(Debug, thiserror::Error)]
#[error("written, but the directory cannot be made durable")]
struct Undecided(#[source] io::Error);

/// Whether after this failure of a write the new content may be there: nobody may act on either
/// then, before [`sync_dir_of`] has succeeded and the file was read again.
pub fn is_undecided(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Undecided>())
}

/// Replaces `path` by `bytes`, durably. On error the old file is untouched, but for the one that
/// [`is_undecided`] tells of; nothing else is left behind.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_with_mode(path, bytes, 0o644)
}

/// As [`write`], for secrets: only the owner may read.
pub fn write_secret(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_with_mode(path, bytes, 0o600)
}

fn write_with_mode(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut pending = PendingFile::create_with_mode(path, mode)?;
    pending.file().write_all(bytes)?;
    pending.commit()
}

/// A file being written that takes its name only when [`PendingFile::commit`] succeeds; dropped
/// before that, it removes itself.
#[derive(Debug)]
pub struct PendingFile {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
    done: bool,
    /// Dropped unfinished, the file stays where it is, to be gone on with.
    resumable: bool,
}

impl PendingFile {
    pub fn create(target: &Path) -> io::Result<Self> {
        Self::create_with_mode(target, 0o644)
    }

    fn create_with_mode(target: &Path, mode: u32) -> io::Result<Self> {
        use std::sync::atomic::{AtomicU64, Ordering};
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let name =
            target.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no file name"))?;
        let mut temporary = name.to_os_string();
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        temporary.push(format!(".{}-{n}{TEMPORARY_SUFFIX}", std::process::id()));
        let temporary = target.with_file_name(temporary);
        // A file of that name can only be a leftover of a dead process with our number.
        let _ = fs::remove_file(&temporary);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(mode).open(&temporary)?;
        Ok(Self { file, temporary, target: target.to_owned(), done: false, resumable: false })
    }

    /// Opens, or begins, a file that stays when it is dropped unfinished, positioned at its end.
    /// What an earlier process left in it may be torn: whoever goes on verifies it.
    pub fn resume(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
        Ok(Self { file, temporary: path.to_owned(), target: path.to_owned(), done: false, resumable: true })
    }

    /// Removes the file now, resumable or not.
    pub fn discard(mut self) {
        self.resumable = false;
    }

    pub fn file(&mut self) -> &mut File {
        &mut self.file
    }

    pub fn temporary_path(&self) -> &Path {
        &self.temporary
    }

    /// Makes the content durable under its final name.
    pub fn commit(self) -> io::Result<()> {
        let target = self.target.clone();
        self.commit_as(&target)
    }

    /// As [`PendingFile::commit`], under a name that was not known at first. It must be on the same
    /// file system.
    pub fn commit_as(mut self, target: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.temporary, target)?;
        self.done = true;
        let synced =
            if fault::fails("durable-renamed") { Err(Errno::IO.into()) } else { sync_dir_of(target) };
        synced.map_err(|e| io::Error::new(e.kind(), Undecided(e)))
    }
}

impl Drop for PendingFile {
    fn drop(&mut self) {
        if !self.done && !self.resumable {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// How long a lock may be held by a child of ours that has not executed its program yet: until then
/// it has all our open files.
const FORK_PATIENCE: Duration = Duration::from_millis(300);

/// Takes the exclusive lock of an open file; tells whether it was to be had.
pub fn lock_exclusive(file: &File) -> io::Result<bool> {
    let begun = Instant::now();
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) if begun.elapsed() < FORK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Makes the directory entry of `path` durable, after a create, rename or removal.
pub fn sync_dir_of(path: &Path) -> io::Result<()> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(dir)?.sync_all()
}

/// Removes a file durably; one that is not there is no error.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Ok(()) => sync_dir_of(path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn replaces_whole_files_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        write(&path, b"one").unwrap();
        write_secret(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(PendingFile::create(&path).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        remove(&path).unwrap();
        remove(&path).unwrap();
    }
}
