//! A pack's plain copy, mapped: its bytes are hashed and written from where they lie in the page cache.

use std::fs::File;
use std::io;

use memmap2::{Advice, Mmap};

pub struct PlainPack(Mmap);

impl PlainPack {
    /// Maps a file that the repository keeps. It may be unlinked meanwhile, but is never made shorter.
    pub fn new(file: &File) -> io::Result<Self> {
        // SAFETY: plain copies are written under a temporary name and never changed after the rename
        // that makes them visible; the repository's lock keeps other processes out.
        unsafe { Mmap::map(file) }.map(Self)
    }

    pub fn len_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    /// Reads a range in and returns it. Without this, a disk that cannot read would end the process
    /// when the bytes are touched; so it is an error.
    pub fn bytes(&self, offset: u64, len: usize) -> io::Result<&[u8]> {
        let range = usize::try_from(offset).ok().and_then(|from| Some(from..from.checked_add(len)?));
        let range = range.filter(|r| r.end <= self.0.len());
        let range = range.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        match self.0.advise_range(Advice::PopulateRead, range.start, len) {
            // Linux before 5.14 does not know the advice.
            Err(e) if e.raw_os_error() != Some(rustix::io::Errno::INVAL.raw_os_error()) => Err(e),
            _ => Ok(&self.0[range]),
        }
    }
}
