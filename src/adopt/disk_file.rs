//! A disk file as it was opened: what is read here and what `qemu-img` reads is the same file, whatever
//! lies at its path by now, or for whom the path leads anywhere.

use std::fs::{self, File, FileType};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::compose::{HANDED, qemu_img_with};
use crate::sparse;

use super::error::io_error;
use super::{AdoptError, Job};

const PIECE_BYTES: usize = 4 << 20;

pub struct DiskFile {
    path: PathBuf,
    file: File,
}

impl DiskFile {
    pub fn open(path: &Path) -> Result<Self, AdoptError> {
        // Others may never end, or do something when they are opened.
        check_kind(path, fs::metadata(path).map_err(io_error("open", path))?.file_type())?;
        let file = File::open(path).map_err(io_error("open", path))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// One that somebody else opened.
    pub fn opened(path: &Path, file: &File) -> Result<Self, AdoptError> {
        check_kind(path, file.metadata().map_err(io_error("inspect", path))?.file_type())?;
        let file = file.try_clone().map_err(io_error("inspect", path))?;
        Ok(Self { path: path.to_owned(), file })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// `qemu-img` with these words and then the file; it must be [`DiskFile::for_tools`].
    pub fn qemu_img(&self, words: &[&str]) -> Result<Command, AdoptError> {
        let mut command = qemu_img_with(&self.file).map_err(io_error("read", &self.path))?;
        command.args(words).arg(HANDED);
        Ok(command)
    }

    /// The file as tools of this user can open it: itself, or a copy in `temporary` of one that was handed
    /// over and that this user may not open.
    pub fn for_tools(&self, temporary: &Path, job: Job<'_>) -> Result<Self, AdoptError> {
        let itself = || self.file.try_clone().map_err(io_error("read", &self.path));
        let again = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let file = match File::open(again) {
            Ok(_) => itself()?,
            Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => self.copy(temporary, job)?,
            Err(e) => return Err(io_error("open", &self.path)(e)),
        };
        Ok(Self { path: self.path.clone(), file })
    }

    fn copy(&self, temporary: &Path, job: Job<'_>) -> Result<File, AdoptError> {
        let read = |e| io_error("read", &self.path)(e);
        let written = |e| io_error("create a file in", temporary)(e);
        let len = self.file.metadata().map_err(read)?.len();
        let copy = tempfile::tempfile_in(temporary).map_err(written)?;
        copy.set_len(len).map_err(written)?;
        let mut buffer = vec![0; PIECE_BYTES];
        for run in sparse::data_runs(&self.file, 0..len) {
            let run = run.map_err(read)?;
            for at in run.clone().step_by(PIECE_BYTES) {
                job.check()?;
                super::source::require_room(temporary)?;
                let piece = &mut buffer[..(run.end - at).min(PIECE_BYTES as u64) as usize];
                self.file.read_exact_at(piece, at).map_err(read)?;
                copy.write_all_at(piece, at).map_err(written)?;
                (job.progress)("copy", at + piece.len() as u64, len);
            }
        }
        Ok(copy)
    }
}

fn check_kind(path: &Path, kind: FileType) -> Result<(), AdoptError> {
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    let reason = "it is neither a file nor a block device".into();
    Err(AdoptError::NotADisk { path: path.to_owned(), reason })
}
