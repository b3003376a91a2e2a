//! Sharing blocks between files, where the file system can.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::ioctl::{Setter, ioctl, opcode};

/// `struct file_clone_range` of linux/fs.h.
#[repr(C)]
struct FileCloneRange {
    src_fd: i64,
    src_offset: u64,
    src_length: u64,
    dest_offset: u64,
}

const FICLONERANGE: rustix::ioctl::Opcode = opcode::write::<FileCloneRange>(0x94, 13);
const BLOCK_BYTES: usize = 4096;

/// Whether files in `dir` can share blocks, found out by trying.
pub fn is_possible(dir: &Path) -> bool {
    let probe = || -> io::Result<()> {
        let mut from = tempfile::tempfile_in(dir)?;
        from.write_all(&[1; BLOCK_BYTES])?;
        clone_range(&from, 0, &tempfile::tempfile_in(dir)?, 0, BLOCK_BYTES as u64)
    };
    probe().is_ok()
}

/// Makes a range of `to` share the blocks of a range of `from`. All numbers must be multiples of the
/// file system's block size.
pub fn clone_range(from: &File, from_offset: u64, to: &File, to_offset: u64, len: u64) -> io::Result<()> {
    let range = FileCloneRange {
        src_fd: from.as_raw_fd().into(),
        src_offset: from_offset,
        src_length: len,
        dest_offset: to_offset,
    };
    // SAFETY: FICLONERANGE reads one `file_clone_range`, which `range` is; both descriptors are open
    // for as long as the call takes.
    unsafe { ioctl(to, Setter::<FICLONERANGE, FileCloneRange>::new(range)) }.map_err(io::Error::from)
}
