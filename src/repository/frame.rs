//! The stored form of a pack: a header and a sequence of independent frames, each preceded by its
//! stored length. Specified in `FORMAT.md`, section "Pack".

use std::cell::RefCell;
use std::io;
use std::sync::OnceLock;

use crate::component::manifest::{ALIGNMENT_BYTES, limit};
use crate::sparse::is_zero;

/// Magic and version of the stored form.
pub(super) const MAGIC: &[u8; 8] = b"CICPAK\0\x02";
/// Magic, plain size, frame size, and four zero bytes.
pub(super) const HEADER_BYTES: usize = 24;
/// The stored length before each frame.
pub(super) const LENGTH_BYTES: usize = 4;
/// Plain bytes of a frame of a pack as it is made: small, so that making and composing overlap.
pub(super) const FRAME_BYTES: usize = 1 << 20;
/// Plain bytes of a frame of an optimised pack. Measured on `libLLVM` at the strong level: 1 MiB
/// frames are 12 % larger than one frame of 48 MiB, 8 MiB frames 3 %.
pub(super) const STRONG_FRAME_BYTES: usize = 8 << 20;
/// The smallest and the largest frame a reader accepts.
const FRAME_BYTES_LIMITS: [usize; 2] = [1 << 20, 16 << 20];
/// A pack is never larger than the largest a manifest may name.
pub(super) const PACK_BYTES_MAX: u64 = limit::FILE_BYTES;
/// The quick level packs are made with; ids do not depend on it.
pub const LEVEL: i32 = 3;
/// The strong level of optimised packs.
pub(super) const STRONG_LEVEL: i32 = 19;

/// No frame of zeros is stored in more.
pub(super) const STORED_ZERO_BYTES_MAX: usize = 4096;

/// What the stored form of a pack begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    /// A positive multiple of the alignment.
    pub plain_bytes: u64,
    /// Plain bytes of every frame but the last: a power of two.
    pub frame_bytes: usize,
}

impl Header {
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..8].copy_from_slice(MAGIC);
        out[8..16].copy_from_slice(&self.plain_bytes.to_le_bytes());
        out[16..20].copy_from_slice(&(self.frame_bytes as u32).to_le_bytes());
        out
    }

    /// Reads a header and holds it against the size of the stored form.
    pub fn read(header: &[u8; HEADER_BYTES], stored_bytes: u64) -> Result<Self, String> {
        let (magic, rest) = header.split_at(8);
        if magic != MAGIC {
            return Err("it does not begin with the magic of a pack of version 2".into());
        }
        let number = |at: usize, len: usize| {
            rest[at..at + len].iter().rev().fold(0u64, |n, byte| n << 8 | u64::from(*byte))
        };
        let (plain_bytes, frame_bytes) = (number(0, 8), number(8, 4) as usize);
        if plain_bytes == 0 || !plain_bytes.is_multiple_of(ALIGNMENT_BYTES) || plain_bytes > PACK_BYTES_MAX {
            return Err(format!("its plain size of {plain_bytes} bytes is not possible"));
        }
        let [least, most] = FRAME_BYTES_LIMITS;
        if !frame_bytes.is_power_of_two() || !(least..=most).contains(&frame_bytes) || number(12, 4) != 0 {
            return Err(format!("its frame size of {frame_bytes} bytes is not possible"));
        }
        let header = Self { plain_bytes, frame_bytes };
        let least = HEADER_BYTES as u64 + header.frame_count() * (LENGTH_BYTES as u64 + 1);
        if !(least..=header.stored_bytes_max()).contains(&stored_bytes) {
            return Err(format!("{stored_bytes} bytes cannot hold a plain size of {plain_bytes}"));
        }
        Ok(header)
    }

    pub fn frame_count(&self) -> u64 {
        self.plain_bytes.div_ceil(self.frame_bytes as u64)
    }

    /// The size of the stored form if no frame shrank.
    pub fn stored_bytes_max(&self) -> u64 {
        HEADER_BYTES as u64 + self.frame_count() * LENGTH_BYTES as u64 + self.plain_bytes
    }

    /// Plain length of the frame that begins at `offset_bytes` of the pack.
    pub fn plain_len(&self, offset_bytes: u64) -> usize {
        self.plain_bytes.saturating_sub(offset_bytes).min(self.frame_bytes as u64) as usize
    }
}

/// The size no stored form of so many plain bytes exceeds, whatever its frames.
pub(super) fn stored_bytes_max(plain_bytes: u64) -> u64 {
    Header { plain_bytes, frame_bytes: FRAME_BYTES_LIMITS[0] }.stored_bytes_max()
}

/// The stored length of a frame must be between one byte and its plain length.
pub(super) fn read_length(bytes: [u8; LENGTH_BYTES], plain_len: usize) -> Result<usize, String> {
    let len = u32::from_le_bytes(bytes) as usize;
    if len == 0 || len > plain_len {
        return Err(format!("a frame of {plain_len} bytes claims {len} stored bytes"));
    }
    Ok(len)
}

/// Room for the length and the stored bytes of a frame as packs are made with.
pub(super) const STORED_FRAME_BYTES_MAX: usize = LENGTH_BYTES + FRAME_BYTES;

/// Writes length and stored bytes of one frame to the beginning of `out`, which must have room for
/// `plain` and the length, and returns how many they are. What does not shrink is stored plain.
pub(super) fn compress(plain: &[u8], out: &mut [u8]) -> io::Result<usize> {
    thread_local! {
        static COMPRESSOR: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
    }
    COMPRESSOR.with_borrow_mut(|slot| {
        let compressor = match slot {
            Some(c) => c,
            None => slot.insert(zstd::bulk::Compressor::new(LEVEL)?),
        };
        compress_with(compressor, plain, out)
    })
}

/// As [`compress`], at the strong level. The compressor takes about 100 MiB and is not kept.
pub(super) fn compress_strong(plain: &[u8], out: &mut [u8]) -> io::Result<usize> {
    compress_with(&mut zstd::bulk::Compressor::new(STRONG_LEVEL)?, plain, out)
}

/// Length and stored bytes of a frame of zeros, as packs are made with.
pub(super) fn zero_frame() -> io::Result<&'static [u8]> {
    static STORED: OnceLock<Vec<u8>> = OnceLock::new();
    if let Some(stored) = STORED.get() {
        return Ok(stored);
    }
    let mut stored = vec![0; STORED_FRAME_BYTES_MAX];
    let len = compress(&vec![0; FRAME_BYTES], &mut stored)?;
    stored.truncate(len);
    Ok(STORED.get_or_init(|| stored))
}

/// The last frame that turned out to be zeros: one that is stored in the same way is the same.
#[derive(Default)]
pub(super) struct ZeroFrame {
    stored: Vec<u8>,
    plain_len: usize,
}

impl ZeroFrame {
    pub fn is(&self, stored: &[u8], plain_len: usize) -> bool {
        plain_len == self.plain_len && stored == self.stored
    }

    /// Looks at a frame that was unpacked, and tells whether it is zeros.
    pub fn look(&mut self, stored: &[u8], plain: &[u8]) -> bool {
        // Others do not pay to be remembered.
        let is_zero = stored.len() <= STORED_ZERO_BYTES_MAX && is_zero(plain);
        if is_zero && !self.is(stored, plain.len()) {
            *self = Self { stored: stored.to_vec(), plain_len: plain.len() };
        }
        is_zero
    }
}

fn compress_with(
    compressor: &mut zstd::bulk::Compressor<'_>,
    plain: &[u8],
    out: &mut [u8],
) -> io::Result<usize> {
    let (length, frame) = out
        .split_at_mut_checked(LENGTH_BYTES)
        .filter(|(_, frame)| frame.len() >= plain.len())
        .ok_or(io::ErrorKind::InvalidInput)?;
    // One byte less than plain: a frame that does not fit has not shrunk.
    let room = plain.len().saturating_sub(1);
    let len = compressor.compress_to_buffer(plain, &mut frame[..room]).unwrap_or_else(|_| {
        frame[..plain.len()].copy_from_slice(plain);
        plain.len()
    });
    length.copy_from_slice(&(len as u32).to_le_bytes());
    Ok(LENGTH_BYTES + len)
}

/// Replaces `out` by the `plain_len` plain bytes of one frame (given without its length). Never
/// makes more bytes than that, whatever the frame claims.
pub(super) fn decompress(stored: &[u8], plain_len: usize, out: &mut Vec<u8>) -> Result<(), String> {
    thread_local! {
        static DECOMPRESSOR: RefCell<zstd::bulk::Decompressor<'static>> = RefCell::default();
    }
    if stored.len() == plain_len {
        out.clear();
        out.extend_from_slice(stored);
        return Ok(());
    }
    if out.len() != plain_len {
        *out = vec![0; plain_len];
    }
    let made = DECOMPRESSOR
        .with_borrow_mut(|d| d.decompress_to_buffer(stored, out.as_mut_slice()))
        .map_err(|e| format!("a frame does not decompress: {e}"))?;
    if made != plain_len {
        return Err(format!("a frame of {plain_len} bytes decompresses to {made}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut out);
        out
    }

    #[test]
    fn frames_round_trip_and_never_grow() {
        for plain in [vec![7], vec![0; FRAME_BYTES], noise(FRAME_BYTES), noise(1), noise(4096), vec![1; 4096]]
        {
            let (mut stored, mut back) = (vec![0; STORED_FRAME_BYTES_MAX], vec![9; 3]);
            let len = compress(&plain, &mut stored).unwrap();
            stored.truncate(len);
            let [a, b, c, d, frame @ ..] = stored.as_slice() else { panic!("short") };
            assert_eq!(read_length([*a, *b, *c, *d], plain.len()), Ok(frame.len()));
            decompress(frame, plain.len(), &mut back).unwrap();
            assert!(back == plain);
        }
    }

    #[test]
    fn a_bomb_makes_no_more_than_it_may() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap();
        let mut out = Vec::new();
        assert!(decompress(&bomb, FRAME_BYTES, &mut out).is_err());
        assert!(out.capacity() <= FRAME_BYTES);
        let short = zstd::bulk::compress(&[0; 100_000], 3).unwrap();
        assert!(decompress(&short, FRAME_BYTES, &mut out).is_err());
    }

    #[test]
    fn headers_that_cannot_be_true_are_refused() {
        let header = |plain_bytes, frame_bytes| Header { plain_bytes, frame_bytes }.encode();
        let good = Header { plain_bytes: 8192, frame_bytes: STRONG_FRAME_BYTES };
        assert_eq!(Header::read(&good.encode(), 100), Ok(good));
        for (plain, stored) in
            [(0, 100), (4095, 100), (8192, 20), (8192, 9000), (1 << 41, 1000), (u64::MAX, 1000)]
        {
            assert!(Header::read(&header(plain, FRAME_BYTES), stored).is_err(), "{plain} {stored}");
        }
        for frame in [0, 1, 1 << 19, (1 << 20) + 1, 3 << 20, 1 << 25, u32::MAX as usize] {
            assert!(Header::read(&header(8192, frame), 100).is_err(), "{frame}");
        }
        let mut padded = good.encode();
        padded[23] = 1;
        assert!(Header::read(&padded, 100).is_err());
    }

    proptest! {
        #[test]
        fn bytes_of_a_stranger_never_panic(bytes in proptest::collection::vec(any::<u8>(), 1..200), len in 1usize..5000) {
            let _ = decompress(&bytes, len, &mut Vec::new());
            let mut framed = zstd::bulk::compress(&[5; 100], 3).unwrap();
            framed.extend(bytes);
            let _ = decompress(&framed, len, &mut Vec::new());
        }
    }
}
