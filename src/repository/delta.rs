//! A new version of a pack as the difference from an older one: the reference delta of
//! `FORMAT.md`, section "Delta". Pure: bytes in, bytes out, bounded on both sides.

use std::io::{self, Read, Write};

use zstd::zstd_safe::{CCtx, CParameter, DCtx, get_error_name};

use super::frame::PACK_BYTES_MAX;
use crate::component::manifest::ALIGNMENT_BYTES;
use crate::types::PackId;

/// Magic and version.
pub(super) const MAGIC: &[u8; 8] = b"CICDLT\0\x01";
/// Magic, plain size, the base's plain size and id.
pub(super) const HEADER_BYTES: usize = 8 + 8 + 8 + 32;
/// Stored length, and the region of the base the segment leans on: offset and length.
const SEGMENT_HEADER_BYTES: usize = 4 + 8 + 4;
/// Plain bytes of every segment but the last. A format constant.
pub(super) const SEGMENT_BYTES: usize = 64 << 20;
/// The most of the base that one segment leans on.
pub(super) const REGION_BYTES_MAX: usize = 128 << 20;
/// Region and segment together fit in this window: 2^28 bytes.
const WINDOW_LOG: u32 = 28;
/// Matches far apart: finer than zstd's own choice, because versions of a program differ in many
/// small places. Measured on two kernels of one line (110 MB): 9.4 MB with zstd's choice, 6.9 MB
/// with this, in 1.4 s.
const FAR_MATCH_BYTES: u32 = 32;
const FAR_HASH_LOG: u32 = 23;
const FAR_HASH_RATE_LOG: u32 = 4;
/// Levels: while somebody waits, and ahead of time.
pub(super) const LEVEL: i32 = 7;
pub(super) const STRONG_LEVEL: i32 = 19;

/// What a delta says about itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub plain_bytes: u64,
    pub base_plain_bytes: u64,
    pub base: PackId,
}

impl Header {
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..8].copy_from_slice(MAGIC);
        out[8..16].copy_from_slice(&self.plain_bytes.to_le_bytes());
        out[16..24].copy_from_slice(&self.base_plain_bytes.to_le_bytes());
        out[24..].copy_from_slice(self.base.as_bytes());
        out
    }

    pub fn read(bytes: &[u8; HEADER_BYTES]) -> Result<Self, String> {
        if bytes[..8] != *MAGIC {
            return Err("it does not begin with the magic of a delta of version 1".into());
        }
        let [plain_bytes, base_plain_bytes] = [8, 16].map(|at| {
            let mut number = [0; 8];
            number.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(number)
        });
        for size in [plain_bytes, base_plain_bytes] {
            if size == 0 || size > PACK_BYTES_MAX || !size.is_multiple_of(ALIGNMENT_BYTES) {
                return Err(format!("its plain size of {size} bytes is not possible"));
            }
        }
        let mut base = [0; 32];
        base.copy_from_slice(&bytes[24..]);
        Ok(Self { plain_bytes, base_plain_bytes, base: PackId::from_bytes(base) })
    }
}

/// The part of the base that the segment at `offset` of a pack leans on: where it would be if all
/// had grown evenly, and as much as is allowed around it.
fn region(offset: u64, segment_bytes: usize, header: &Header) -> (u64, usize) {
    let len = header.base_plain_bytes.min(REGION_BYTES_MAX as u64);
    let scale = |at: u64| {
        (u128::from(at) * u128::from(header.base_plain_bytes) / u128::from(header.plain_bytes)) as u64
    };
    let centre = scale(offset + segment_bytes as u64 / 2);
    let start = centre.saturating_sub(len / 2).min(header.base_plain_bytes - len);
    (start, len as usize)
}

/// Writes the delta that makes `pack` of `base`. Gives up, with `Ok(false)`, when it exceeds
/// `limit_bytes`. Takes about 100 MiB beside what is mapped at the quick level, 500 MiB at the strong.
pub(super) fn encode(
    pack: &[u8],
    (base_id, base): (PackId, &[u8]),
    level: i32,
    limit_bytes: u64,
    out: &mut impl Write,
) -> io::Result<bool> {
    let header =
        Header { plain_bytes: pack.len() as u64, base_plain_bytes: base.len() as u64, base: base_id };
    out.write_all(&header.encode())?;
    let mut written = HEADER_BYTES as u64;
    let mut frame: Vec<u8> = Vec::new();
    for (n, segment) in pack.chunks(SEGMENT_BYTES).enumerate() {
        let (start, len) = region((n * SEGMENT_BYTES) as u64, segment.len(), &header);
        let room = limit_bytes.saturating_sub(written + SEGMENT_HEADER_BYTES as u64);
        frame.clear();
        frame.reserve_exact((segment.len() as u64).min(room) as usize);
        let mut context = CCtx::create();
        for parameter in [
            CParameter::CompressionLevel(level),
            CParameter::WindowLog(WINDOW_LOG),
            CParameter::EnableLongDistanceMatching(true),
            CParameter::LdmMinMatch(FAR_MATCH_BYTES),
            CParameter::LdmHashLog(FAR_HASH_LOG),
            CParameter::LdmHashRateLog(FAR_HASH_RATE_LOG),
        ] {
            context.set_parameter(parameter).map_err(failed)?;
        }
        context.ref_prefix(&base[start as usize..start as usize + len]).map_err(failed)?;
        // It fails when the room does not suffice: then the delta is of no use.
        if context.compress2(&mut frame, segment).is_err() {
            return Ok(false);
        }
        out.write_all(&(frame.len() as u32).to_le_bytes())?;
        out.write_all(&start.to_le_bytes())?;
        out.write_all(&(len as u32).to_le_bytes())?;
        out.write_all(&frame)?;
        written += (SEGMENT_HEADER_BYTES + frame.len()) as u64;
    }
    Ok(written <= limit_bytes)
}

/// Why a delta could not be applied.
#[derive(Debug)]
pub(super) enum Failure {
    /// The delta is not one, or not of this base.
    Wrong(String),
    Io(io::Error),
}

/// Makes the pack of which `delta` is the difference from `base` and passes it on segment by
/// segment: at most [`SEGMENT_BYTES`] and what is stored for them are held. What came out must be
/// compared with the pack's id.
pub(super) fn apply(
    delta: &mut impl Read,
    base: &[u8],
    pass: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> Result<(), Failure> {
    let wrong = |reason: String| Err(Failure::Wrong(reason));
    let mut header = [0; HEADER_BYTES];
    read_exact(delta, &mut header)?;
    let header = Header::read(&header).map_err(Failure::Wrong)?;
    if header.base_plain_bytes != base.len() as u64 {
        return wrong(format!("it is of a base of {} bytes, not {}", header.base_plain_bytes, base.len()));
    }
    let mut left = header.plain_bytes;
    let (mut frame, mut plain) = (Vec::new(), Vec::new());
    while left > 0 {
        let plain_len = left.min(SEGMENT_BYTES as u64) as usize;
        let mut head = [0; SEGMENT_HEADER_BYTES];
        read_exact(delta, &mut head)?;
        let number = |at: usize, len: usize| {
            head[at..at + len].iter().rev().fold(0u64, |n, byte| n << 8 | u64::from(*byte))
        };
        let (stored_len, start, len) = (number(0, 4) as usize, number(4, 8), number(12, 4) as usize);
        if stored_len == 0 || stored_len > plain_len + (plain_len >> 8) + 64 {
            return wrong(format!("a segment of {plain_len} bytes claims {stored_len} stored bytes"));
        }
        let region = usize::try_from(start).ok().and_then(|s| base.get(s..s.checked_add(len)?));
        let Some(region) = region.filter(|_| len <= REGION_BYTES_MAX) else {
            return wrong(format!("a segment leans on {len} bytes at {start} of its base"));
        };
        frame.resize(stored_len, 0);
        read_exact(delta, &mut frame)?;
        plain.clear();
        plain.reserve_exact(plain_len);
        let mut context = DCtx::create();
        context.ref_prefix(region).map_err(|code| Failure::Io(failed(code)))?;
        let made = context.decompress(&mut plain, &frame).map_err(|code| {
            Failure::Wrong(format!("a segment does not decompress: {}", get_error_name(code)))
        })?;
        if made != plain_len {
            return wrong(format!("a segment of {plain_len} bytes decompresses to {made}"));
        }
        pass(&plain).map_err(Failure::Io)?;
        left -= plain_len as u64;
    }
    match delta.read(&mut [0]).map_err(Failure::Io)? {
        0 => Ok(()),
        _ => wrong("bytes follow its last segment".into()),
    }
}

fn read_exact(delta: &mut impl Read, out: &mut [u8]) -> Result<(), Failure> {
    delta.read_exact(out).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => Failure::Wrong("it is too short".into()),
        _ => Failure::Io(e),
    })
}

fn failed(code: usize) -> io::Error {
    io::Error::other(get_error_name(code))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(seed: u8, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut out);
        out
    }

    fn delta(pack: &[u8], base: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        assert!(encode(pack, (PackId::of(base), base), LEVEL, u64::MAX, &mut out).unwrap());
        out
    }

    fn applied(delta: &[u8], base: &[u8]) -> Result<Vec<u8>, Failure> {
        let mut out = Vec::new();
        apply(&mut &delta[..], base, &mut |bytes| {
            out.extend_from_slice(bytes);
            Ok(())
        })?;
        Ok(out)
    }

    #[test]
    fn a_version_is_made_of_the_one_before_it() {
        let base = noise(1, 3 << 20);
        let pack = [&base[..1 << 20], &noise(2, 4096), &base[1 << 20..]].concat();
        let delta = delta(&pack, &base);
        assert!(delta.len() < 8192, "{}", delta.len());
        assert!(applied(&delta, &base).unwrap() == pack);
        assert!(applied(&delta, &noise(3, base.len())).ok() != Some(pack));
        assert!(matches!(applied(&delta, &base[4096..]), Err(Failure::Wrong(_))));
    }

    #[test]
    fn more_than_one_segment_finds_its_region() {
        let base = noise(1, REGION_BYTES_MAX + (40 << 20));
        let pack = [&noise(2, 1 << 20), &base[..]].concat();
        let delta = delta(&pack, &base);
        assert!(delta.len() < 4 << 20, "{}", delta.len());
        assert!(applied(&delta, &base).unwrap() == pack);
    }

    #[test]
    fn what_is_too_large_to_be_worth_it_is_given_up() {
        let (base, pack) = (noise(1, 1 << 20), noise(2, 1 << 20));
        let mut out = Vec::new();
        assert!(!encode(&pack, (PackId::of(&base), &base), LEVEL, 1 << 19, &mut out).unwrap());
        assert!(out.len() <= 1 << 19);
    }

    #[test]
    fn lies_are_refused() {
        let base = noise(1, 1 << 20);
        let good = delta(&[&base[..], &noise(2, 4096)].concat(), &base);
        for (at, bytes) in [
            (0, &b"x"[..]),
            (8, &[0; 8]),
            (8, &[0xff; 8]),
            (HEADER_BYTES, &[0; 4]),
            (HEADER_BYTES, &[0xff; 4]),
            (HEADER_BYTES + 4, &[0xff; 8]),
            (HEADER_BYTES + 12, &[0xff; 4]),
        ] {
            let mut bad = good.clone();
            bad[at..at + bytes.len()].copy_from_slice(bytes);
            assert!(matches!(applied(&bad, &base), Err(Failure::Wrong(_))), "{at}");
        }
        assert!(applied(&[&good[..], b"x"].concat(), &base).is_err());
        for len in [0, 10, HEADER_BYTES, HEADER_BYTES + 7, good.len() - 1] {
            assert!(matches!(applied(&good[..len], &base), Err(Failure::Wrong(_))), "{len}");
        }
        // A bomb: a segment that unpacks to more than it may.
        let small = [&base[..8192]].concat();
        let bomb = zstd::bulk::compress(&vec![0; 32 << 20], 3).unwrap();
        let mut bad =
            Header { plain_bytes: 8192, base_plain_bytes: 8192, base: PackId::of(&small) }.encode().to_vec();
        bad.extend_from_slice(&(bomb.len() as u32).to_le_bytes());
        bad.extend_from_slice(&[0; 12]);
        bad.extend_from_slice(&bomb);
        assert!(matches!(applied(&bad, &small), Err(Failure::Wrong(_))));
    }

    proptest! {
        #[test]
        fn any_edit_round_trips(at in 0usize..60_000, cut in 0usize..5000, insert in 0usize..9000, seed: u8) {
            let base = noise(seed, 64 << 10);
            let end = (at + cut).min(base.len());
            let mut pack = [&base[..at], &noise(seed.wrapping_add(1), insert), &base[end..]].concat();
            pack.resize(pack.len().next_multiple_of(4096), 0);
            prop_assert!(applied(&delta(&pack, &base), &base).unwrap() == pack);
        }
    }
}
