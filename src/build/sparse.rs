//! A file read without reading its holes.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// Gives the bytes of a file; where the file system knows of a hole, zeros without asking it for them.
pub struct SparseFile {
    file: File,
    at: u64,
    /// Data at or behind `at`; what precedes it is a hole.
    data: Range<u64>,
}

impl SparseFile {
    pub fn new(file: File) -> Self {
        Self { file, at: 0, data: 0..0 }
    }

    /// The next run of data that ends behind `at`.
    fn find_data(&mut self) -> io::Result<()> {
        self.data = match rustix::fs::seek(&self.file, SeekFrom::Data(self.at)) {
            Ok(begin) => begin..rustix::fs::seek(&self.file, SeekFrom::Hole(begin)).unwrap_or(u64::MAX),
            // No data any more: a hole up to the end.
            Err(Errno::NXIO) => {
                let end = self.file.metadata()?.len();
                end..u64::MAX
            }
            // A file system without an account of holes.
            Err(_) => self.at..u64::MAX,
        };
        // Files of /proc and the like know of no data, and have some.
        if self.data.end <= self.at {
            self.data = self.at..u64::MAX;
        }
        Ok(())
    }
}

impl Read for SparseFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at >= self.data.end {
            self.find_data()?;
        }
        let room = |until: u64| buffer.len().min(usize::try_from(until - self.at).unwrap_or(usize::MAX));
        let n = if self.at < self.data.start {
            let take = room(self.data.start);
            buffer[..take].fill(0);
            take
        } else {
            let take = room(self.data.end);
            self.file.read_at(&mut buffer[..take], self.at)?
        };
        self.at += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_zeros_and_data_is_itself() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(3 << 20).unwrap();
        file.write_all_at(&[7; 5000], 1 << 20).unwrap();
        file.write_all_at(b"end", (3 << 20) - 3).unwrap();
        file.set_len((4 << 20) + 5).unwrap();
        let mut expected = Vec::new();
        file.read_to_end(&mut expected).unwrap();
        let mut found = Vec::new();
        SparseFile::new(file).read_to_end(&mut found).unwrap();
        assert!(found == expected);
        let mut nothing = Vec::new();
        SparseFile::new(tempfile::tempfile().unwrap()).read_to_end(&mut nothing).unwrap();
        assert!(nothing.is_empty());
    }
}
