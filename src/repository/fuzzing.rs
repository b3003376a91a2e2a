//! The readers of a repository's files, for `fuzz/`; compiled for nothing else.

use super::{RefKind, nodes, records, refs};
use crate::types::NodeHash;
use crate::types::codec::CodecError;

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
