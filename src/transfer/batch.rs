//! Small objects travel together: neighbouring 4 KiB blocks of a disk compress far better as one
//! zstd frame than alone. Packing on the serving side, unpacking and verifying on the other.

use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use zstd::zstd_safe::{CCtx, CParameter, DCtx, DParameter};

use super::error::Violation;
use super::frame::{Frame, size_limit_bytes};
use super::object::{ObjectKey, Verified};
use crate::types::Hash;

/// How hard the batches of a request are compressed.
#[derive(Debug, Default)]
pub struct Effort {
    pace: Arc<Mutex<Pace>>,
    /// Batches to send plain before trying again, after some in a row that did not compress.
    plain_left: u8,
    /// Batches in a row that did not compress.
    dense: u8,
    /// The plain bytes of the batch before: the next one is compressed as what follows it.
    before: Bytes,
}

/// What is waited for on a connection, learnt by all its requests together: harder while it is the
/// wire, easier while it is the next batch. Single times say little, since sending one only fills a
/// buffer and sending another waits for all of it; what counts are their sums of late.
#[derive(Debug)]
pub struct Pace {
    /// Index into [`LEVELS`].
    step: usize,
    sending_s: f64,
    making_s: f64,
    /// Batches since the last step.
    batches: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self { step: 1, sending_s: 0.0, making_s: 0.0, batches: 0 }
    }
}

impl Pace {
    /// How much of the past a batch leaves, and how many batches there are between two steps.
    const MEMORY: f64 = 0.9;
    const BATCHES: u32 = 4;

    fn learn(&mut self, sending: Duration, making: Duration) {
        self.sending_s = self.sending_s * Self::MEMORY + sending.as_secs_f64();
        self.making_s = self.making_s * Self::MEMORY + making.as_secs_f64();
        self.batches += 1;
        if self.batches < Self::BATCHES {
            return;
        }
        // On a link faster than that, nobody waits for it.
        let wire_is_slow = self.sending_s > 0.01;
        if wire_is_slow && self.making_s * 3.0 < self.sending_s && self.step + 1 < LEVELS.len() {
            (self.step, self.batches) = (self.step + 1, 0);
        } else if self.making_s > self.sending_s && self.step > 0 {
            (self.step, self.batches) = (self.step - 1, 0);
        }
    }
}

/// Compressed data must be at least 1/32 smaller, or unpacking it is not worth the while.
const GAIN_MIN: usize = 32;
/// After so many batches in a row that did not compress, so many are sent plain.
const DENSE_BATCHES: u8 = 2;
const PLAIN_BATCHES: u8 = 8;
/// How much of a batch is tried while batches are sent plain.
const SAMPLE_BYTES: usize = 32 << 10;
/// zstd levels; each takes about twice the time of the one before.
const LEVELS: [i32; 5] = [1, 3, 6, 9, 12];
/// A frame may ask for a window of 8 MiB, the most any level up to 19 does; more would be memory
/// taken before a byte was unpacked.
const WINDOW_LOG_MAX: u32 = 23;
/// A batch and the one before it fit in this window.
const BATCH_WINDOW_LOG: u32 = 21;

impl Effort {
    pub fn new(pace: Arc<Mutex<Pace>>) -> Self {
        Self { pace, ..Self::default() }
    }

    /// Learns how long the last batch took to send, and how long the next was then waited for: it is
    /// made while the last is sent.
    pub fn adapt(&mut self, sending: Duration, making: Duration) {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner).learn(sending, making);
    }

    /// Makes the frame for objects that lie one after another in `plain`.
    pub fn pack(&mut self, plain: Vec<u8>, sizes_bytes: Vec<u32>) -> Frame {
        let plain = Bytes::from(plain);
        let packed = self.compress(&plain);
        self.before = plain.clone();
        match packed {
            Some(packed) => Frame::Small { zstd: true, sizes_bytes, payload: packed.into() },
            None => Frame::Small { zstd: false, sizes_bytes, payload: plain },
        }
    }

    fn compress(&mut self, plain: &[u8]) -> Option<Vec<u8>> {
        if self.plain_left > 0 && !sample_shrinks(plain) {
            self.plain_left -= 1;
            return None;
        }
        self.plain_left = 0;
        let step = self.pace.lock().unwrap_or_else(PoisonError::into_inner).step;
        let packed = compress_after(&self.before, plain, LEVELS[step]);
        let gained = packed.filter(|p| p.len() + plain.len() / GAIN_MIN < plain.len());
        self.dense = if gained.is_none() { self.dense + 1 } else { 0 };
        if self.dense == DENSE_BATCHES {
            (self.dense, self.plain_left) = (0, PLAIN_BATCHES);
        }
        gained
    }
}

/// Whether a piece from the middle compresses: a look that costs little where nothing does.
fn sample_shrinks(plain: &[u8]) -> bool {
    let middle = plain.len() / 2;
    let sample = &plain[middle..plain.len().min(middle + SAMPLE_BYTES)];
    zstd::bulk::compress(sample, LEVELS[0]).is_ok_and(|p| p.len() + sample.len() / GAIN_MIN < sample.len())
}

fn compress_after(before: &[u8], plain: &[u8], level: i32) -> Option<Vec<u8>> {
    let mut context = CCtx::create();
    context.set_parameter(CParameter::CompressionLevel(level)).ok()?;
    context.set_parameter(CParameter::WindowLog(BATCH_WINDOW_LOG)).ok()?;
    context.ref_prefix(before).ok()?;
    // What does not fit has not shrunk.
    let mut packed = Vec::with_capacity(plain.len());
    context.compress2(&mut packed, plain).ok()?;
    Some(packed)
}

/// At most `plain_size_bytes` are made, whatever the frame claims.
fn unpack_after(before: &[u8], packed: &[u8], plain_size_bytes: usize) -> Option<Vec<u8>> {
    let mut context = DCtx::create();
    context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).ok()?;
    context.ref_prefix(before).ok()?;
    let mut plain = Vec::with_capacity(plain_size_bytes);
    let made = context.decompress(&mut plain, packed).ok()?;
    (made == plain_size_bytes).then_some(plain)
}

/// Unpacks and verifies a batch that answers the first of `keys`. `before` is the batch before it in
/// the same answer, and becomes this one.
pub fn open(
    keys: &[ObjectKey],
    zstd: bool,
    sizes_bytes: &[u32],
    payload: Bytes,
    before: &mut Bytes,
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
        let plain = unpack_after(before, &payload, plain_size_bytes as usize);
        Bytes::from(plain.ok_or(Violation::Unpack { key: first, plain_size_bytes })?)
    } else {
        payload
    };
    *before = plain.clone();
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
        let objects = open(&keys, zstd, &sizes, payload.clone(), &mut Bytes::new()).unwrap();
        assert!(objects.iter().zip(&text).all(|(o, t)| o.bytes == t));

        let mut swapped = keys.clone();
        swapped.swap(0, 1);
        assert!(matches!(
            open(&swapped, zstd, &sizes, payload.clone(), &mut Bytes::new()),
            Err(Violation::Hash { .. })
        ));
        assert!(matches!(
            open(&keys[..9], zstd, &sizes, payload.clone(), &mut Bytes::new()),
            Err(Violation::Long)
        ));
        let mut shorter = sizes.clone();
        shorter[9] -= 1;
        assert!(matches!(
            open(&keys, zstd, &shorter, payload, &mut Bytes::new()),
            Err(Violation::Unpack { .. })
        ));
    }

    #[test]
    fn noise_is_sent_plain_and_not_tried_every_time() {
        let mut effort = Effort::default();
        for n in 0..u64::from(DENSE_BATCHES) {
            assert!(!parts(effort.pack(noise(100_000, n), vec![100_000])).0);
        }
        assert!(!parts(effort.pack(noise(100_000, 7), vec![100_000])).0);
        assert_eq!(effort.plain_left, PLAIN_BATCHES - 1, "it was not tried");
        assert!(parts(effort.pack(vec![0; 100_000], vec![100_000])).0, "but this is worth it");
        assert_eq!(effort.plain_left, 0);
    }

    #[test]
    fn a_batch_leans_on_the_one_before_it() {
        let mut effort = Effort::default();
        let (first, second) = (noise(300_000, 1), [noise(300_000, 1), noise(1000, 2)].concat());
        let keys = [block(&first), block(&second)];
        let (zstd, sizes, payload) = parts(effort.pack(first, vec![300_000]));
        let mut before = Bytes::new();
        open(&keys, zstd, &sizes, payload, &mut before).unwrap();
        let (zstd, sizes, payload) = parts(effort.pack(second.clone(), vec![301_000]));
        assert!(zstd && payload.len() < 200_000, "{}", payload.len());
        assert_eq!(open(&keys[1..], zstd, &sizes, payload.clone(), &mut before).unwrap()[0].bytes, second);
        let alone = open(&keys[1..], zstd, &sizes, payload, &mut Bytes::new());
        assert!(matches!(alone, Err(Violation::Unpack { .. } | Violation::Hash { .. })));
    }

    #[test]
    fn a_bomb_stops_at_what_it_announced() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap();
        assert_eq!(unpack(&bomb, 1000), None);
        assert_eq!(unpack(&bomb, 64 << 20).map(|p| p.len()), Some(64 << 20));
        let key = block(b"x");
        let opened = open(&[key], true, &[100_000], bomb.into(), &mut Bytes::new());
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
            open(&[key], false, &[4], Bytes::from_static(b"pack"), &mut Bytes::new()),
            Err(Violation::Form { .. })
        ));
    }

    #[test]
    fn what_is_waited_for_decides_how_hard_it_works() {
        let ms = Duration::from_millis;
        let mut pace = Pace::default();
        // A slow wire behind a buffer: most batches go at once, some wait for all of it.
        for n in 0..100 {
            pace.learn(ms(if n % 6 == 5 { 400 } else { 0 }), ms(5));
        }
        assert_eq!(pace.step, LEVELS.len() - 1);
        (0..40).for_each(|_| pace.learn(ms(1), ms(5)));
        assert_eq!(pace.step, 0);
        (0..40).for_each(|_| pace.learn(Duration::from_micros(100), ms(0)));
        assert_eq!(pace.step, 0, "a wire that takes all at once is not slow");
    }

    proptest! {
        #[test]
        fn foreign_payloads_never_panic(
            payload in proptest::collection::vec(any::<u8>(), 0..300),
            sizes in proptest::collection::vec(0u32..400, 0..6),
            zstd: bool,
            before: Vec<u8>,
        ) {
            let keys = [block(b"a"); 5];
            let _ = open(&keys, zstd, &sizes, payload.clone().into(), &mut Bytes::from(before));
            let _ = unpack(&payload, 1000);
        }
    }
}
