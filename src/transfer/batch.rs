//! Small objects travel together: neighbouring 4 KiB blocks of a disk compress far better as one
//! zstd frame than alone. Packing on the serving side, unpacking and verifying on the other.

use std::io::Read;
use std::time::Duration;

use bytes::Bytes;

use super::error::Violation;
use super::frame::{Frame, size_limit_bytes};
use super::object::{ObjectKey, Verified};
use crate::types::Hash;

/// How hard the next batch of a request is compressed: harder while the wire is what is waited for.
#[derive(Debug, Default)]
pub struct Effort {
    /// Index into [`LEVELS`].
    step: usize,
    /// Batches to send plain before trying again, after one that did not compress.
    plain_left: u8,
}

/// Compressed data must be at least 1/32 smaller, or unpacking it is not worth the while.
const GAIN_MIN: usize = 32;
/// How many batches are sent plain after one that did not compress.
const PLAIN_BATCHES: u8 = 8;
/// zstd levels; each takes about twice the time of the one before.
const LEVELS: [i32; 5] = [1, 3, 6, 9, 12];
/// A frame may ask for a window of 8 MiB, the most any level up to 19 does; more would be memory
/// taken before a byte was unpacked.
const WINDOW_LOG_MAX: u32 = 23;

impl Effort {
    /// Learns how long the last batch took to send, and how long the wire then waited for the next
    /// beyond that.
    pub fn adapt(&mut self, sending: Duration, waiting: Duration) {
        // The next batch is made while the last is sent: a wait means that making it is the slower part.
        if waiting > sending / 8 {
            self.step = self.step.saturating_sub(1);
        } else if sending > Duration::from_millis(5) {
            self.step = (self.step + 1).min(LEVELS.len() - 1);
        }
    }

    /// Makes the frame for objects that lie one after another in `plain`.
    pub fn pack(&mut self, plain: Vec<u8>, sizes_bytes: Vec<u32>) -> Frame {
        match self.compress(&plain) {
            Some(packed) => Frame::Small { zstd: true, sizes_bytes, payload: packed.into() },
            None => Frame::Small { zstd: false, sizes_bytes, payload: plain.into() },
        }
    }

    fn compress(&mut self, plain: &[u8]) -> Option<Vec<u8>> {
        if self.plain_left > 0 {
            self.plain_left -= 1;
            return None;
        }
        let packed = zstd::bulk::compress(plain, LEVELS[self.step]).ok();
        let gained = packed.filter(|p| p.len() + plain.len() / GAIN_MIN < plain.len());
        if gained.is_none() {
            self.plain_left = PLAIN_BATCHES;
        }
        gained
    }
}

/// Unpacks and verifies a batch that answers the first of `keys`.
pub fn open(
    keys: &[ObjectKey],
    zstd: bool,
    sizes_bytes: &[u32],
    payload: Bytes,
) -> Result<Vec<Verified>, Violation> {
    let (Some(&first), true) = (keys.first(), sizes_bytes.len() <= keys.len()) else {
        return Err(Violation::Long);
    };
    for (key, size) in keys.iter().zip(sizes_bytes) {
        check_size(key, u64::from(*size))?;
    }
    let plain = if zstd {
        // `Frame::decode` bounded the sum: this allocates at most `limit::SMALL_BYTES`.
        let plain_size_bytes: u64 = sizes_bytes.iter().map(|s| u64::from(*s)).sum();
        let plain = zstd::bulk::decompress(&payload, plain_size_bytes as usize).unwrap_or_default();
        if plain.len() as u64 != plain_size_bytes {
            return Err(Violation::Unpack { key: first, plain_size_bytes });
        }
        Bytes::from(plain)
    } else {
        payload
    };
    let mut rest = plain;
    let mut out = Vec::with_capacity(sizes_bytes.len());
    for (key, size) in keys.iter().zip(sizes_bytes) {
        if key.is_pack() {
            return Err(Violation::Form { key: *key });
        }
        // `Frame::decode` checked the sum of the sizes against the payload.
        let bytes = rest.split_to((*size as usize).min(rest.len()));
        out.push(verify(*key, bytes)?);
    }
    Ok(out)
}

/// Checks that `bytes` are what `key` names.
pub fn verify(key: ObjectKey, bytes: Bytes) -> Result<Verified, Violation> {
    match Hash::of(&bytes) {
        found if found == key.hash() => Ok(Verified { key, bytes }),
        found => Err(Violation::Hash { key, found }),
    }
}

/// Refuses an announced size that objects of the kind cannot have.
pub fn check_size(key: &ObjectKey, size_bytes: u64) -> Result<(), Violation> {
    let limit_bytes = size_limit_bytes(key);
    if size_bytes > limit_bytes {
        return Err(Violation::TooLarge { key: *key, size_bytes, limit_bytes });
    }
    Ok(())
}

/// Unpacks one zstd frame to exactly `plain_size_bytes`, growing as it goes, so that a lying
/// announcement costs no memory. `None` if it is no such frame.
pub fn unpack(packed: &[u8], plain_size_bytes: u64) -> Option<Vec<u8>> {
    let mut plain = Vec::new();
    let mut decoder = zstd::stream::read::Decoder::new(packed).ok()?.single_frame();
    decoder.window_log_max(WINDOW_LOG_MAX).ok()?;
    decoder.take(plain_size_bytes.saturating_add(1)).read_to_end(&mut plain).ok()?;
    (plain.len() as u64 == plain_size_bytes).then_some(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{BlockHash, PackId};
    use proptest::prelude::*;

    fn noise(len: usize, seed: u64) -> Vec<u8> {
        let mut out = vec![0; len];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
        out
    }

    fn block(bytes: &[u8]) -> ObjectKey {
        ObjectKey::Block(BlockHash::of(bytes))
    }

    fn parts(frame: Frame) -> (bool, Vec<u32>, Bytes) {
        match frame {
            Frame::Small { zstd, sizes_bytes, payload } => (zstd, sizes_bytes, payload),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn batches_compress_when_it_pays_and_open_verified() {
        let text: Vec<Vec<u8>> =
            (0..10u8).map(|i| format!("{i} lorem ipsum ").repeat(300).into_bytes()).collect();
        let keys: Vec<_> = text.iter().map(|b| block(b)).collect();
        let sizes: Vec<u32> = text.iter().map(|b| b.len() as u32).collect();
        let mut effort = Effort::default();
        let (zstd, sizes, payload) = parts(effort.pack(text.concat(), sizes));
        assert!(zstd && payload.len() < 5000);
        let objects = open(&keys, zstd, &sizes, payload.clone()).unwrap();
        assert!(objects.iter().zip(&text).all(|(o, t)| o.bytes == t));

        let mut swapped = keys.clone();
        swapped.swap(0, 1);
        assert!(matches!(open(&swapped, zstd, &sizes, payload.clone()), Err(Violation::Hash { .. })));
        assert!(matches!(open(&keys[..9], zstd, &sizes, payload.clone()), Err(Violation::Long)));
        let mut shorter = sizes.clone();
        shorter[9] -= 1;
        assert!(matches!(open(&keys, zstd, &shorter, payload), Err(Violation::Unpack { .. })));
    }

    #[test]
    fn noise_is_sent_plain_and_not_tried_every_time() {
        let mut effort = Effort::default();
        let bytes = noise(100_000, 1);
        assert!(!parts(effort.pack(bytes.clone(), vec![100_000])).0);
        assert!(!parts(effort.pack(vec![0; 100_000], vec![100_000])).0, "still in the plain stretch");
        for _ in 1..PLAIN_BATCHES {
            effort.pack(bytes.clone(), vec![100_000]);
        }
        assert!(parts(effort.pack(vec![0; 100_000], vec![100_000])).0);
    }

    #[test]
    fn a_bomb_stops_at_what_it_announced() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap();
        assert_eq!(unpack(&bomb, 1000), None);
        assert_eq!(unpack(&bomb, 64 << 20).map(|p| p.len()), Some(64 << 20));
        let key = block(b"x");
        let opened = open(&[key], true, &[100_000], bomb.into());
        assert!(matches!(opened, Err(Violation::Unpack { .. })));
    }

    #[test]
    fn a_window_of_more_than_8_mib_is_refused() {
        // A frame of one raw block whose header asks for a window of 2^(10 + n) bytes.
        let frame = |n: u8| [&[0x28, 0xb5, 0x2f, 0xfd, 0, n << 3, 0x21, 0, 0][..], b"abcd"].concat();
        assert_eq!(unpack(&frame(13), 4).as_deref(), Some(&b"abcd"[..]));
        assert_eq!(unpack(&frame(14), 4), None);
    }

    #[test]
    fn packs_never_come_in_batches() {
        let key = ObjectKey::Pack(PackId::of(b"pack"));
        assert!(matches!(
            open(&[key], false, &[4], Bytes::from_static(b"pack")),
            Err(Violation::Form { .. })
        ));
    }

    proptest! {
        #[test]
        fn foreign_payloads_never_panic(
            payload in proptest::collection::vec(any::<u8>(), 0..300),
            sizes in proptest::collection::vec(0u32..400, 0..6),
            zstd: bool,
        ) {
            let keys = [block(b"a"); 5];
            let _ = open(&keys, zstd, &sizes, payload.clone().into());
            let _ = unpack(&payload, 1000);
        }
    }
}
