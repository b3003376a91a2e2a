//! Packs that arrive from other brokers go to the repository, in whatever form they come.

use crate::repository::{IncomingForm, IncomingPack, Repository, RepositoryError};
use crate::transfer::{PackRange, PackWish, PackWriter, SinkError};
use crate::types::PackId;

/// What makes a pack cheaper to send: packs held here that are likely versions of it, and the part
/// that came earlier.
pub fn wish(repository: &Repository, pack: &PackId, bases: &[PackId]) -> PackWish {
    let begun = repository.partial_pack(pack).map(|p| (p.tag, p.received_bytes));
    PackWish { bases: bases.to_vec(), begun }
}

/// A writer for one pack. No pack may unpack to more than `expected_plain_bytes`, which its
/// manifest promises.
pub fn receive(
    repository: &Repository,
    pack: &PackId,
    is_delta: bool,
    range: &PackRange,
    size_bytes: u64,
    expected_plain_bytes: Option<u64>,
) -> Result<Box<dyn PackWriter>, SinkError> {
    let form = IncomingForm {
        tag: range.tag,
        size_bytes: range.offset_bytes.saturating_add(size_bytes),
        offset_bytes: range.offset_bytes,
        is_delta,
    };
    let incoming = repository.incoming_pack(*pack, form, expected_plain_bytes).map_err(not_taken)?;
    Ok(Box::new(Receiving(incoming)))
}

struct Receiving(IncomingPack);

impl PackWriter for Receiving {
    fn write(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        self.0.write(bytes).map_err(not_taken)
    }
    fn finish(self: Box<Self>) -> Result<(), SinkError> {
        self.0.finish().map_err(not_taken)
    }
}

/// Whose fault it is that something was not stored.
pub fn not_taken(e: RepositoryError) -> SinkError {
    if e.is_content_fault() { SinkError::Content(Box::new(e)) } else { SinkError::Storage(Box::new(e)) }
}
