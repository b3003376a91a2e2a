//! Numbers and magics of a disk, read at fixed places.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Reads at an offset; what lies beyond the end is zero.
pub struct Reader<'a> {
    pub file: &'a File,
    pub len: u64,
}

impl Reader<'_> {
    pub fn fill(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let there = self.len.saturating_sub(offset).min(buffer.len() as u64) as usize;
        buffer[there..].fill(0);
        self.file.read_exact_at(&mut buffer[..there], offset)
    }

    pub fn at<const N: usize>(&self, offset: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(offset, &mut bytes)?;
        Ok(bytes)
    }

    pub fn has(&self, offset: u64, magic: &[u8]) -> io::Result<bool> {
        Ok(self.at::<32>(offset)?.starts_with(magic))
    }

    /// A number of `N` bytes, up to eight, the lowest first.
    pub fn le<const N: usize>(&self, offset: u64) -> io::Result<u64> {
        Ok(self.at::<N>(offset)?.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    }

    /// A number of `N` bytes, up to eight, the highest first.
    pub fn be<const N: usize>(&self, offset: u64) -> io::Result<u64> {
        Ok(self.at::<N>(offset)?.iter().fold(0, |n, b| n << 8 | u64::from(*b)))
    }
}
