//! The stored form of packs.

use std::cell::RefCell;
use std::fs;

use cicada::repository::{ObjectId, Repository, RepositoryError};
use cicada::sparse::Run;
use cicada::types::PackId;

use crate::{memory, split, work_dir};

/// Packs kept before the repository is made anew.
const KEPT_MAX: u32 = 2000;
/// Larger claims are only checked for being refused or taken, not unpacked here.
const PLAIN_BYTES_MAX: u64 = 3 << 20;

thread_local! {
    static REPOSITORY: RefCell<Option<(Repository, u32)>> = const { RefCell::new(None) };
}

/// A stored pack from a peer, in pieces whose size is the first byte. The id is that of what an
/// independent reader unpacks, so a sound pack is kept and read back.
pub fn stored_form(data: &[u8]) {
    let Some((piece, stored)) = split(data) else { return };
    REPOSITORY.with_borrow_mut(|slot| {
        let fresh = slot.take().filter(|(_, kept)| *kept < KEPT_MAX).unwrap_or_else(|| {
            let _unwatched = memory::pause();
            let dir = work_dir().join("repository");
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir_all(&dir).expect("the work directory can be written");
            (Repository::create(&dir).expect("a repository can be made"), 0)
        });
        let (repository, kept) = slot.insert(fresh);
        if receive(repository, piece, stored) {
            *kept += 1;
        }
    });
}

fn receive(repository: &Repository, piece: u8, stored: &[u8]) -> bool {
    let plain = unpack(stored);
    let id = PackId::of(plain.as_deref().unwrap_or(b"unknown"));
    let result = repository.pack_receiver(id, stored.len() as u64).and_then(|mut receiver| {
        for part in stored.chunks(usize::from(piece).max(1) * 7) {
            receiver.write(part)?;
        }
        receiver.finish()
    });
    let left = fs::read_dir(repository.temporary_dir()).expect("it can be listed").count();
    assert_eq!(left, 0, "nothing stays in temporary/");
    match (result, plain) {
        (Ok(()), Some(plain)) => {
            let mut back = Vec::new();
            let read = repository.read_pack(&id, &mut |at, run| {
                assert_eq!(at, back.len() as u64);
                match run {
                    Run::Data(bytes) => back.extend_from_slice(bytes),
                    Run::Zeros(len) => back.resize(back.len() + len as usize, 0),
                }
                Ok(())
            });
            read.expect("a pack that was kept can be read");
            assert_eq!(back, plain);
            true
        }
        (Ok(()), None) => panic!("a pack was kept that an independent reader refuses"),
        (Err(RepositoryError::Refused { object, .. }), plain) => {
            assert_eq!(object, ObjectId::Pack(id), "the error names the pack");
            assert!(plain.is_none(), "a sound pack was refused");
            false
        }
        (Err(e), _) => panic!("a bad pack is refused, not: {e}"),
    }
}

/// A delta against a base that the first byte makes. What is accepted has the size it claims.
pub fn delta(data: &[u8]) {
    let Some((seed, delta)) = split(data) else { return };
    let Some(claimed) = delta.get(8..16).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes) else {
        return;
    };
    // One segment is taken whole; larger claims differ in nothing but the memory they may take.
    if claimed > PLAIN_BYTES_MAX {
        return;
    }
    let base = delta_base(seed);
    if let Ok(made) = cicada::repository::fuzzing::apply_delta(delta, &base) {
        assert_eq!(made.len() as u64, claimed);
    }
}

/// What deltas of the corpus lean on.
pub fn delta_base(seed: u8) -> Vec<u8> {
    (0..8192u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8 ^ seed).collect()
}

/// Reads a stored pack by `FORMAT.md`.
fn unpack(stored: &[u8]) -> Option<Vec<u8>> {
    let body = stored.strip_prefix(b"CICPAK\0\x02")?;
    let (size, rest) = body.split_first_chunk::<8>()?;
    let (frame, mut rest) = rest.split_first_chunk::<8>()?;
    let (size, frame_bytes) = (u64::from_le_bytes(*size), u64::from_le_bytes(*frame));
    if !frame_bytes.is_power_of_two() || !(1 << 20..=1 << 24).contains(&frame_bytes) {
        return None;
    }
    if size == 0 || size % 4096 != 0 || size > PLAIN_BYTES_MAX {
        return None;
    }
    let mut plain = Vec::new();
    while (plain.len() as u64) < size {
        let len = (size - plain.len() as u64).min(frame_bytes) as usize;
        let (length, after) = rest.split_first_chunk::<4>()?;
        let stored_len = u32::from_le_bytes(*length) as usize;
        if stored_len == 0 || stored_len > len || stored_len > after.len() {
            return None;
        }
        let (frame, after) = after.split_at(stored_len);
        if stored_len == len {
            plain.extend_from_slice(frame);
        } else {
            let unpacked = zstd::bulk::decompress(frame, len).ok()?;
            if unpacked.len() != len {
                return None;
            }
            plain.extend(unpacked);
        }
        rest = after;
    }
    rest.is_empty().then_some(plain)
}
