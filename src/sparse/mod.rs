//! Content with holes: read, hashed and written at the cost of its data, however long the zeros between are.

mod file;
mod hash;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

pub use file::{Holes, SparseFile, data_runs};
pub use hash::SparseHasher;

use crate::types::Hash;

/// Zeros in aligned runs of this size are worth a hole.
pub const HOLE_BYTES: usize = 64 << 10;

/// Some zeros to point to.
static ZEROS: [u8; HOLE_BYTES] = [0; HOLE_BYTES];

/// Content that may know where its holes are.
pub trait Content: Read {
    /// Passes over zeros that begin here and need not be read, at most `most_bytes`, and tells how many they
    /// were: 0 where it knows of none.
    fn skip_hole(&mut self, most_bytes: u64) -> io::Result<u64> {
        let _ = most_bytes;
        Ok(0)
    }
}

impl Content for &[u8] {}

impl<C: Content + ?Sized> Content for &mut C {
    fn skip_hole(&mut self, most_bytes: u64) -> io::Result<u64> {
        (**self).skip_hole(most_bytes)
    }
}

impl<C: Content + ?Sized> Content for Box<C> {
    fn skip_hole(&mut self, most_bytes: u64) -> io::Result<u64> {
        (**self).skip_hole(most_bytes)
    }
}

/// Bytes that were read, or as many zeros.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Run<'a> {
    Data(&'a [u8]),
    Zeros(u64),
}

impl Run<'_> {
    pub fn len_bytes(&self) -> u64 {
        match self {
            Run::Data(bytes) => bytes.len() as u64,
            Run::Zeros(len) => *len,
        }
    }
}

/// Whether all bytes are zero. In builds of any kind as fast as memory.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(ZEROS.len()).all(|run| run == &ZEROS[..run.len()])
}

/// The hash of content up to its end.
pub fn hash_of(content: &mut dyn Content) -> io::Result<Hash> {
    let mut hasher = SparseHasher::new();
    hasher.update_content(content)?;
    Ok(hasher.finalize())
}

/// Writes to a place of a new file where nothing was written yet: long runs of zeros stay holes.
pub fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    let runs: Vec<&[u8]> = bytes.chunks(HOLE_BYTES).collect();
    let mut at = 0;
    for group in runs.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let len: usize = group.iter().map(|run| run.len()).sum();
        if !is_zero(group[0]) {
            file.write_all_at(&bytes[at..at + len], offset + at as u64)?;
        }
        at += len;
    }
    Ok(())
}
