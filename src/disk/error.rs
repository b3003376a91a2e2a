//! What can go wrong with a disk.

use std::io;
use std::path::{Path, PathBuf};

use crate::types::{BlockHash, ByteSize};

/// Why something could not be done with a disk. `Damaged` and the failures are about this machine's
/// files; `WrongBlock` and `WrongMap` are about what somebody else sent.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("cannot {what} {}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The bytes of a qcow2 file contradict themselves or its length. While QEMU has the disk open
    /// a later try may succeed.
    #[error("{} is damaged at byte {offset_bytes}: {reason}; see 'qemu-img check'", path.display())]
    Damaged { path: PathBuf, offset_bytes: u64, reason: &'static str },
    /// A sound qcow2 file that uses what no disk of ours has.
    #[error("{} uses {what}, which is not supported; convert it with 'qemu-img convert'", path.display())]
    Unsupported { path: PathBuf, what: &'static str },
    /// The file is not the disk it was taken for: another size or backing file.
    #[error("{} is another disk than expected: {reason}; remove it or name another place", path.display())]
    WrongDisk { path: PathBuf, reason: String },
    #[error("{} is there already; remove it or name another place", path.display())]
    Exists { path: PathBuf },
    #[error("{} is being written by another task; wait for that one to end", path.display())]
    Busy { path: PathBuf },
    /// The guest has overwritten a block since the disk was scanned; scan again.
    #[error("block {} of {} was overwritten since the scan; scan again", hash.short(), path.display())]
    Changed { path: PathBuf, hash: BlockHash },
    #[error("{} has no block {}", path.display(), hash.short())]
    UnknownBlock { path: PathBuf, hash: BlockHash },
    /// A block from elsewhere is not what its hash says.
    #[error("block {} is not what it should be: {reason}", hash.short())]
    WrongBlock { hash: BlockHash, reason: String },
    /// A chunk map does not describe this disk.
    #[error("the chunk map does not fit {}: {reason}", path.display())]
    WrongMap { path: PathBuf, reason: String },
    #[error("{} still lacks {missing} blocks of its chunk map", path.display())]
    Incomplete { path: PathBuf, missing: u64 },
    /// A staged disk does not read as its chunk map says.
    #[error("{} differs from its chunk map at byte {offset_bytes}; stage it again", path.display())]
    Differs { path: PathBuf, offset_bytes: u64 },
    #[error("{} met an I/O error before; open it again", path.display())]
    Poisoned { path: PathBuf },
    #[error("{} needs {} free and has {}; free some space or choose another place", dir.display(), ByteSize(*need_bytes), ByteSize(*have_bytes))]
    NoSpace { need_bytes: u64, have_bytes: u64, dir: PathBuf },
}

/// For `map_err`: an I/O error with the object and the verb.
pub(super) fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> DiskError + 'a {
    move |source| DiskError::Io { what, path: path.to_owned(), source }
}
