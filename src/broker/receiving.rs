//! Packs that arrive from other brokers go to the repository, in whatever form they come.

use std::net::SocketAddr;
use std::time::Duration;

use crate::migration::message::ADDRESSES_MAX;
use crate::repository::{IncomingForm, IncomingPack, Repository, RepositoryError};
use crate::transfer::{PackRange, PackWish, PackWriter, SinkError};
use crate::types::PackId;

/// How long another cloud's host names may take to be looked up, all together.
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(5);

/// Where another cloud says that it serves. Names that are not found in time are left out.
pub async fn resolve(addresses: &[String]) -> Vec<SocketAddr> {
    let look_ups = addresses.iter().take(ADDRESSES_MAX).map(|address| async move {
        let found = tokio::time::timeout(LOOK_UP_TIMEOUT, tokio::net::lookup_host(address.as_str()));
        found.await.ok().and_then(Result::ok).into_iter().flatten().collect::<Vec<_>>()
    });
    let mut found = futures::future::join_all(look_ups).await.concat();
    found.truncate(ADDRESSES_MAX);
    found
}

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
