//! The image digest: BLAKE3 over the list of BLAKE3 hashes of the image's 4 MiB segments, the last
//! one shorter. Holes and zeros hash alike, so sparseness does not matter; the list localises a
//! mismatch.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;

use rayon::prelude::*;

use crate::sparse::data_runs;
use crate::types::ImageDigest;

/// Changing this value is a format break.
pub const SEGMENT_BYTES: u64 = 4 << 20;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Digest {
    pub digest: ImageDigest,
    pub segments: Vec<blake3::Hash>,
}

pub fn digest_of(path: &Path) -> io::Result<Digest> {
    digest(&File::open(path)?)
}

/// Reads what is not a hole, on all cores.
pub fn digest(file: &File) -> io::Result<Digest> {
    let len = file.metadata()?.len();
    let count = len.div_ceil(SEGMENT_BYTES);
    let mut has_data = vec![false; count as usize];
    for data in data_runs(file, 0..len) {
        let data = data?;
        has_data[(data.start / SEGMENT_BYTES) as usize..data.end.div_ceil(SEGMENT_BYTES) as usize].fill(true);
    }
    let segments: Vec<blake3::Hash> = has_data
        .par_iter()
        .enumerate()
        .map_init(
            || vec![0u8; SEGMENT_BYTES as usize],
            |buffer, (i, has_data)| {
                let start = i as u64 * SEGMENT_BYTES;
                let size = SEGMENT_BYTES.min(len - start);
                if !has_data && size == SEGMENT_BYTES {
                    return Ok(zero_segment());
                }
                let buffer = &mut buffer[..size as usize];
                file.read_exact_at(buffer, start)?;
                Ok(blake3::hash(buffer))
            },
        )
        .collect::<io::Result<_>>()?;
    Ok(Digest::of_segments(segments))
}

impl Digest {
    pub fn of_segments(segments: Vec<blake3::Hash>) -> Self {
        let mut list = blake3::Hasher::new();
        for segment in &segments {
            list.update(segment.as_bytes());
        }
        Self { digest: ImageDigest(list.finalize().into()), segments }
    }

    /// The list of segment hashes, to be kept beside an image.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.segments.iter().flat_map(|s| *s.as_bytes()).collect()
    }

    /// A kept list; `None` if it is damaged.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (segments, rest) = bytes.as_chunks::<{ blake3::OUT_LEN }>();
        rest.is_empty()
            .then(|| Self::of_segments(segments.iter().map(|s| blake3::Hash::from_bytes(*s)).collect()))
    }

    /// Numbers of the segments that differ.
    pub fn differing(&self, other: &Digest) -> Vec<u64> {
        let count = self.segments.len().max(other.segments.len());
        (0..count).filter(|i| self.segments.get(*i) != other.segments.get(*i)).map(|i| i as u64).collect()
    }
}

/// What a segment of zeros hashes to.
pub fn zero_segment() -> blake3::Hash {
    static HASH: OnceLock<blake3::Hash> = OnceLock::new();
    *HASH.get_or_init(|| blake3::hash(&vec![0; SEGMENT_BYTES as usize]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, Write};

    #[test]
    fn holes_and_zeros_are_the_same() {
        let mut sparse = tempfile::tempfile().unwrap();
        sparse.set_len(3 * SEGMENT_BYTES + 5).unwrap();
        sparse.seek(io::SeekFrom::Start(SEGMENT_BYTES + 7)).unwrap();
        sparse.write_all(b"cicada").unwrap();
        let mut full = tempfile::tempfile().unwrap();
        let mut bytes = vec![0; 3 * SEGMENT_BYTES as usize + 5];
        bytes[SEGMENT_BYTES as usize + 7..][..6].copy_from_slice(b"cicada");
        full.write_all(&bytes).unwrap();
        let (a, b) = (digest(&sparse).unwrap(), digest(&full).unwrap());
        assert_eq!(a, b);
        assert_eq!(a.segments[0], zero_segment());
        assert_eq!(digest(&tempfile::tempfile().unwrap()).unwrap().segments.len(), 0);
    }
}
