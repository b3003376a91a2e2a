//! Why a disk was not adopted or not written out.

use std::io;
use std::path::{Path, PathBuf};

use crate::component::extents::EXTENTS_MAX;
use crate::compose::ComposeError;
use crate::disk::DiskError;
use crate::repository::RepositoryError;
use crate::types::ByteSize;

#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    #[error(transparent)]
    Repository(RepositoryError),
    #[error(transparent)]
    Compose(#[from] ComposeError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("cannot {what} {}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is not a disk that can be adopted: {reason}", path.display())]
    NotADisk { path: PathBuf, reason: String },
    #[error("{} is damaged: {reason}; get it again as a whole, or repair it where it came from", path.display())]
    Damaged { path: PathBuf, reason: String },
    /// It asks for another file to be read, which would tell its maker what is in that file.
    #[error(
        "{} refers to {other}: a disk from elsewhere may not name files of this machine; flatten it \
         where it came from with 'qemu-img convert'", path.display()
    )]
    RefersElsewhere { path: PathBuf, other: String },
    #[error("{} is a disk of {size}: up to {limit} is possible", path.display())]
    TooLarge { path: PathBuf, size: ByteSize, limit: ByteSize },
    #[error("{} changed while it was read: stop whatever writes to it and try again", path.display())]
    Changed { path: PathBuf },
    #[error("{} is in use: stop the machine that writes to it and try again", path.display())]
    InUse { path: PathBuf },
    #[error("{} {reason}", path.display())]
    Occupied { path: PathBuf, reason: &'static str },
    #[error("qemu-img is not there: install the package qemu-utils")]
    NoQemuImg,
    #[error("qemu-img cannot read {}: {reason}", path.display())]
    Convert { path: PathBuf, reason: String },
    #[error("not enough room in {}: reading the disk would leave less than {}", dir.display(), ByteSize(*need_bytes))]
    NoSpace { dir: PathBuf, need_bytes: u64 },
    #[error("the known content is scattered over more than {EXTENTS_MAX} runs: adopt it without --share")]
    Scattered,
    #[error("cancelled")]
    Cancelled,
}

impl From<RepositoryError> for AdoptError {
    fn from(e: RepositoryError) -> Self {
        match e {
            RepositoryError::Cancelled => AdoptError::Cancelled,
            e => AdoptError::Repository(e),
        }
    }
}

/// For `map_err`: an I/O error with the object and the verb.
pub(super) fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> AdoptError + 'a {
    move |source| AdoptError::Io { what, path: path.to_owned(), source }
}
