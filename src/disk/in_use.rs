//! Whether a hypervisor has a disk open.

use std::fs::OpenOptions;
use std::path::Path;

use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::Errno;

use super::DiskError;
use super::error::io_error;

/// Whether another process holds the locks that QEMU takes on an open image (open file description
/// locks, which exclude POSIX ones). A disk that is not there is not in use.
pub fn is_in_use(path: &Path) -> Result<bool, DiskError> {
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        opened => opened.map_err(io_error("open", path))?,
    };
    // Let go of again when the file is closed.
    match fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(false),
        Err(Errno::ACCESS | Errno::AGAIN) => Ok(true),
        Err(e) => Err(io_error("lock", path)(e.into())),
    }
}
