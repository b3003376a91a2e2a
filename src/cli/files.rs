//! Files that a request names, opened here: by the rights of whoever asks, and wherever the broker's service
//! could not see them. A new file has no name until it is whole.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, OFlags};
use rustix::io::Errno;

use crate::compose::{occupied, part_of, place};
use crate::durable;
use crate::interface::problem::{Problem, ProblemKind};
use crate::interface::{ContentRequest, FileUse, Request};

/// What goes with a request.
#[derive(Default)]
pub struct Files {
    /// In the order of [`Request::files`], or none: what the broker has to open itself.
    pub descriptors: Vec<OwnedFd>,
    new: Option<NewFile>,
}

impl Files {
    /// Opens what the request names. `broker_uid` opens a new file once more, by its number.
    pub fn open(request: &Request, broker_uid: Option<u32>) -> Result<Self, Problem> {
        let mut files = Self::default();
        for (path, file_use) in request.files() {
            let (path, whole_dir) = (Path::new(path), path.ends_with('/') || Path::new(path).is_dir());
            match file_use {
                // An archive as a directory: whoever fills or reads that goes by paths.
                _ if whole_dir && is_archive(request) => return Ok(Self::default()),
                FileUse::Read => files.descriptors.push(to_read(path, is_archive(request))?.into()),
                FileUse::Write if is_archive(request) && is_stream(path) => {
                    files
                        .descriptors
                        .push(OpenOptions::new().write(true).open(path).map_err(about(path))?.into());
                }
                FileUse::Write => {
                    let new = NewFile::create(path, broker_uid)?;
                    files.descriptors.push(new.file.try_clone().map_err(about(path))?.into());
                    files.new = Some(new);
                }
            }
        }
        Ok(files)
    }

    /// What is left to do when the broker has written all of it.
    pub fn keep(self) -> Result<(), Problem> {
        self.new.map_or(Ok(()), NewFile::keep)
    }
}

fn is_archive(request: &Request) -> bool {
    matches!(
        request,
        Request::Content(ContentRequest::RepoExport { .. })
            | Request::Content(ContentRequest::RepoImport { .. })
    )
}

fn is_stream(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo() || meta.file_type().is_char_device())
}

fn about(path: &Path) -> impl FnOnce(io::Error) -> Problem + '_ {
    move |e| {
        let problem = Problem::from_path(path.display().to_string(), &e);
        let reason = format!("cannot be opened: {}", problem.reason);
        Problem { reason, ..problem }
    }
}

/// A disk is opened only where that does nothing; an archive may come through a pipe.
fn to_read(path: &Path, stream: bool) -> Result<File, Problem> {
    let kind = fs::metadata(path).map_err(about(path))?.file_type();
    if !stream && !kind.is_file() && !kind.is_block_device() {
        let reason = "is neither a file nor a block device";
        return Err(Problem::new(ProblemKind::BadRequest, path.display().to_string(), reason));
    }
    File::open(path).map_err(about(path))
}

/// A file that the broker writes and we name.
struct NewFile {
    path: PathBuf,
    file: File,
    /// Its name until then, on file systems that need one.
    part: Option<PathBuf>,
    /// Its owner, while the broker's user has it.
    owner: Option<u32>,
}

impl NewFile {
    fn create(path: &Path, broker_uid: Option<u32>) -> Result<Self, Problem> {
        let object = || path.display().to_string();
        if let Some(reason) = occupied(path) {
            return Err(Problem::new(ProblemKind::Conflict, object(), reason));
        }
        let dir = path.parent().unwrap_or(Path::new("/"));
        let mut new = match options().custom_flags(OFlags::TMPFILE.bits().cast_signed()).open(dir) {
            Ok(file) => Self { path: path.to_owned(), file, part: None, owner: None },
            Err(e) if knows_only_names(&e) => Self::with_name(path)?,
            Err(e) => return Err(about(path)(e)),
        };
        let me = rustix::process::geteuid().as_raw();
        if let Some(uid) = broker_uid.filter(|uid| *uid != me && me == 0) {
            fchown(&new.file, Some(uid), None).map_err(about(path))?;
            new.owner = Some(me);
        }
        Ok(new)
    }

    fn with_name(path: &Path) -> Result<Self, Problem> {
        let part = part_of(path);
        let file = options().create_new(true).open(&part).map_err(about(&part))?;
        Ok(Self { path: path.to_owned(), file, part: Some(part), owner: None })
    }

    fn keep(mut self) -> Result<(), Problem> {
        let path = &self.path;
        let named = || {
            if self.owner.is_some() {
                fchown(&self.file, self.owner, None)?;
            }
            match &self.part {
                Some(part) => place(part, path)?,
                None => {
                    let number = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                    rustix::fs::linkat(CWD, number, CWD, path, AtFlags::SYMLINK_FOLLOW)?;
                }
            }
            durable::sync_dir_of(path)
        };
        named().map_err(|e| {
            let problem = Problem::from_path(path.display().to_string(), &e);
            Problem { reason: format!("was written and cannot be named: {}", problem.reason), ..problem }
        })?;
        self.part = None;
        Ok(())
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

/// What file systems say on which every file has a name from the beginning.
fn knows_only_names(e: &io::Error) -> bool {
    matches!(Errno::from_io_error(e), Some(Errno::OPNOTSUPP | Errno::ISDIR))
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(part) = &self.part {
            let _ = fs::remove_file(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::interface::VmRequest;

    fn export(path: &Path) -> Request {
        let output = path.to_str().unwrap().to_owned();
        Request::Vm(VmRequest::Export { vm: "web".into(), output, format: "raw".into(), user_data: false })
    }

    #[test]
    fn a_new_file_has_its_name_when_it_is_kept_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        for keep in [false, true] {
            let files = Files::open(&export(&path), None).unwrap();
            rustix::io::write(&files.descriptors[0], b"whole").unwrap();
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
            if keep {
                files.keep().unwrap();
                assert_eq!(fs::read(&path).unwrap(), b"whole");
                assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
            }
        }
        let taken = Files::open(&export(&path), None).err().unwrap();
        assert_eq!(taken.kind, ProblemKind::Conflict);
    }

    /// As on file systems of both kinds.
    fn both(path: &Path) -> [Files; 2] {
        let named = NewFile::with_name(path).unwrap();
        [
            Files { descriptors: Vec::new(), new: Some(named) },
            Files::open(&export(&path.with_extension("raw")), None).unwrap(),
        ]
    }

    #[test]
    fn what_took_the_name_meanwhile_stays_and_what_was_not_kept_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        drop(both(&path));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        for files in both(&path) {
            let path = files.new.as_ref().unwrap().path.clone();
            fs::write(&path, "another's").unwrap();
            assert_eq!(files.keep().unwrap_err().kind, ProblemKind::Conflict);
            assert_eq!(fs::read(&path).unwrap(), b"another's");
            fs::remove_file(&path).unwrap();
        }
        both(&path).into_iter().for_each(|files| files.keep().unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
