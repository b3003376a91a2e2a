//! The stored form of a pack: a header and a sequence of independent frames, each preceded by its
//! stored length. Specified in `FORMAT.md`, section "Pack".

use std::cell::RefCell;
use std::io;

use crate::component::manifest::{ALIGNMENT_BYTES, limit};

/// Magic and version of the stored form.
pub(super) const MAGIC: &[u8; 8] = b"CICPAK\0\x01";
/// Magic and plain size.
pub(super) const HEADER_BYTES: usize = 16;
/// The stored length before each frame.
pub(super) const LENGTH_BYTES: usize = 4;
/// Plain bytes of every frame but the last. Changing this is a format break.
pub(super) const FRAME_BYTES: usize = 1 << 20;
/// A pack is never larger than the largest a manifest may name.
pub(super) const PACK_BYTES_MAX: u64 = limit::FILE_BYTES;
/// The quick level packs are made with; ids do not depend on it.
pub const LEVEL: i32 = 3;

pub(super) fn header(plain_bytes: u64) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    out[..8].copy_from_slice(MAGIC);
    out[8..].copy_from_slice(&plain_bytes.to_le_bytes());
    out
}

/// Reads the plain size from a header and holds it against the size of the stored form.
pub(super) fn read_header(header: &[u8; HEADER_BYTES], stored_bytes: u64) -> Result<u64, String> {
    let [magic @ .., _, _, _, _, _, _, _, _] = header;
    if magic != MAGIC {
        return Err("it does not begin with the magic of a pack of version 1".into());
    }
    let mut size = [0; 8];
    size.copy_from_slice(&header[8..]);
    let plain_bytes = u64::from_le_bytes(size);
    if plain_bytes == 0 || !plain_bytes.is_multiple_of(ALIGNMENT_BYTES) || plain_bytes > PACK_BYTES_MAX {
        return Err(format!("its plain size of {plain_bytes} bytes is not possible"));
    }
    let frames = frame_count(plain_bytes);
    let (least, most) =
        (HEADER_BYTES as u64 + frames * (LENGTH_BYTES as u64 + 1), stored_bytes_max(plain_bytes));
    if !(least..=most).contains(&stored_bytes) {
        return Err(format!("{stored_bytes} bytes cannot hold a plain size of {plain_bytes}"));
    }
    Ok(plain_bytes)
}

pub(super) fn frame_count(plain_bytes: u64) -> u64 {
    plain_bytes.div_ceil(FRAME_BYTES as u64)
}

/// The size of a pack none of whose frames shrank.
pub(super) fn stored_bytes_max(plain_bytes: u64) -> u64 {
    HEADER_BYTES as u64 + frame_count(plain_bytes) * LENGTH_BYTES as u64 + plain_bytes
}

/// Plain length of the frame that begins at `offset_bytes` of a pack.
pub(super) fn plain_len(plain_bytes: u64, offset_bytes: u64) -> usize {
    plain_bytes.saturating_sub(offset_bytes).min(FRAME_BYTES as u64) as usize
}

/// The stored length of a frame must be between one byte and its plain length.
pub(super) fn read_length(bytes: [u8; LENGTH_BYTES], plain_len: usize) -> Result<usize, String> {
    let len = u32::from_le_bytes(bytes) as usize;
    if len == 0 || len > plain_len {
        return Err(format!("a frame of {plain_len} bytes claims {len} stored bytes"));
    }
    Ok(len)
}

/// Room for the length and the stored bytes of any frame.
pub(super) const STORED_FRAME_BYTES_MAX: usize = LENGTH_BYTES + FRAME_BYTES;

/// Writes length and stored bytes of one frame to the beginning of `out`, which must have room for
/// `plain` and the length, and returns how many they are. What does not shrink is stored plain.
pub(super) fn compress(plain: &[u8], out: &mut [u8]) -> io::Result<usize> {
    thread_local! {
        static COMPRESSOR: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
    }
    let (length, frame) = out
        .split_at_mut_checked(LENGTH_BYTES)
        .filter(|(_, frame)| frame.len() >= plain.len())
        .ok_or(io::ErrorKind::InvalidInput)?;
    // One byte less than plain: a frame that does not fit has not shrunk.
    let room = plain.len().saturating_sub(1);
    let shrunk = COMPRESSOR.with_borrow_mut(|slot| {
        let compressor = match slot {
            Some(c) => c,
            None => slot.insert(zstd::bulk::Compressor::new(LEVEL)?),
        };
        Ok::<_, io::Error>(compressor.compress_to_buffer(plain, &mut frame[..room]).ok())
    })?;
    let len = shrunk.unwrap_or_else(|| {
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
        assert_eq!(read_header(&header(8192), 100), Ok(8192));
        for (plain, stored) in
            [(0, 100), (4095, 100), (8192, 20), (8192, 9000), (1 << 41, 1000), (u64::MAX, 1000)]
        {
            assert!(read_header(&header(plain), stored).is_err(), "{plain} {stored}");
        }
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
