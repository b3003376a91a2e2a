//! The readers of a repository's files, for `fuzz/`; compiled for nothing else.

use super::{RefKind, delta, nodes, records, refs};
use crate::types::codec::CodecError;
use crate::types::{NodeHash, PackId};

/// The pack that a delta makes of its base.
pub fn apply_delta(mut bytes: &[u8], base: &[u8]) -> Result<Vec<u8>, String> {
    let mut made = Vec::new();
    let applied = delta::apply(&mut bytes, base, &mut |plain| {
        made.extend_from_slice(plain);
        Ok(())
    });
    applied.map(|()| made).map_err(|failure| format!("{failure:?}"))
}

pub fn make_delta(pack: &[u8], base: &[u8]) -> Vec<u8> {
    let mut made = Vec::new();
    // Written to memory, it cannot fail.
    let _ = delta::encode(pack, (PackId::of(base), base), delta::LEVEL, u64::MAX, &mut made);
    made
}

/// Plain bytes of a stored manifest or recipe of at most `limit_bytes`.
pub fn read_record(stored: &[u8], limit_bytes: u64) -> Result<Vec<u8>, String> {
    records::decode(stored, limit_bytes)
}

pub fn write_record(plain: &[u8]) -> std::io::Result<Vec<u8>> {
    records::encode(plain)
}

/// Name and value of a ref's file.
pub fn read_ref(kind: RefKind, bytes: &[u8]) -> Result<(String, Vec<u8>), CodecError> {
    refs::decode(kind, bytes)
}

pub fn write_ref(kind: RefKind, name: &str, value: &[u8]) -> Vec<u8> {
    refs::encode(kind, name, value)
}

/// The intact nodes of a bundle.
pub fn read_bundle(bundle: &[u8]) -> Vec<(NodeHash, &[u8])> {
    let (found, _) = nodes::read_bundle(bundle);
    found.into_iter().filter(|n| n.intact).map(|n| (n.hash, n.bytes)).collect()
}
