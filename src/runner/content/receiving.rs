//! What arrives from other brokers goes to the repository, packs in whatever form they come.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::broker::{Input, Peer};
use crate::disk::DiskError;
use crate::federation::Refused;
use crate::migration::message::ADDRESSES_MAX;
use crate::repository::{IncomingForm, IncomingPack, Repository, RepositoryError};
use crate::runner::Shared;
use crate::transfer::{
    Barred, ObjectKey, ObjectSink, PackRange, PackWish, PackWriter, Reach, SinkError, TransferError, Verified,
};
use crate::types::{BlockHash, PackId, PeerText};

/// How long another cloud's host names may take to be looked up, all together.
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(5);

/// Where another cloud says that it serves, looked up and checked: what is dialled are these very addresses.
/// Names that are not found in time, and what is not to be dialled, are left out.
pub async fn resolve(
    shared: &Shared,
    peer: &Peer,
    offered: &[PeerText],
) -> Result<Vec<SocketAddr>, TransferError> {
    let offered = &offered[..offered.len().min(ADDRESSES_MAX)];
    let look_ups = offered.iter().map(|address| async move {
        let found = tokio::time::timeout(LOOK_UP_TIMEOUT, tokio::net::lookup_host(address.as_str()));
        found.await.ok().and_then(Result::ok).into_iter().flatten().collect::<Vec<_>>()
    });
    let found = futures::future::join_all(look_ups).await.concat();
    let reach = Reach::new(shared.config.transfer.peer_networks.clone());
    let (mut dialled, barred) = sift(&reach, found);
    dialled.truncate(ADDRESSES_MAX);
    if let Some(reason) = barred.filter(|_| dialled.is_empty()) {
        let from = peer.jid.clone();
        shared.tell(Input::Refused(from, Refused::Address, reason));
    }
    if dialled.is_empty() && !offered.is_empty() {
        return Err(TransferError::Barred { offered: shown(offered) });
    }
    Ok(dialled)
}

/// What of `found` is dialled, and why some other of it is not, in words for this cloud's operator.
fn sift(reach: &Reach, found: Vec<SocketAddr>) -> (Vec<SocketAddr>, Option<String>) {
    let mut reason = None;
    let dialled = found.into_iter().filter(|address| match reach.check(address.ip()) {
        Ok(()) => true,
        Err(barred) => {
            let ip = address.ip().to_canonical();
            reason = Some(match barred {
                Barred::Always(what) => format!("it serves at {ip}, which is {what}"),
                Barred::Unlisted(what) => format!(
                    "it serves at {ip}, which is {what}: list its network in transfer.peer_networks to let it be dialled"
                ),
            });
            false
        }
    });
    (dialled.collect(), reason)
}

fn shown(offered: &[PeerText]) -> String {
    offered.iter().take(3).map(PeerText::as_str).collect::<Vec<_>>().join(", ")
}

/// What is known of the packs to be fetched.
#[derive(Debug, Default)]
pub struct Packs {
    /// Plain sizes the manifests promise: no pack may unpack to more.
    pub sizes: HashMap<PackId, u64>,
    /// Held packs that are likely versions of them.
    pub bases: HashMap<PackId, Vec<PackId>>,
}

/// Takes a block for the disk it is of.
pub type TakeBlock = dyn Fn(&BlockHash, &[u8]) -> Result<(), DiskError> + Send + Sync;

/// Where fetched objects go: blocks to a disk if there is one, all else to the repository.
pub struct Sink {
    pub repository: Repository,
    pub packs: Arc<Packs>,
    pub blocks: Option<Box<TakeBlock>>,
}

impl ObjectSink for Sink {
    fn deliver(&self, objects: Vec<Verified>) -> Result<(), SinkError> {
        for object in objects {
            let bytes = &object.bytes;
            match (&object.key, &self.blocks) {
                (ObjectKey::Manifest(id), _) => {
                    self.repository.put_manifest_bytes(id, bytes).map_err(not_taken)?;
                }
                (ObjectKey::Recipe(id), _) => {
                    self.repository.put_recipe_bytes(id, bytes).map_err(not_taken)?;
                }
                (ObjectKey::Node(hash), _) => self.repository.put_node(*hash, bytes).map_err(not_taken)?,
                (ObjectKey::Block(hash), Some(take)) => take(hash, bytes).map_err(storage)?,
                // Packs come through `pack`.
                (ObjectKey::Block(_), None) | (ObjectKey::Pack(_), _) => {}
            }
        }
        self.repository.flush_nodes().map_err(storage)
    }

    /// Bases, and the part that came earlier.
    fn wish(&self, pack: &PackId) -> PackWish {
        let begun = self.repository.partial_pack(pack).map(|p| (p.tag, p.received_bytes));
        PackWish { bases: self.packs.bases.get(pack).cloned().unwrap_or_default(), begun }
    }

    fn pack(
        &self,
        pack: &PackId,
        is_delta: bool,
        range: &PackRange,
        size_bytes: u64,
    ) -> Result<Box<dyn PackWriter>, SinkError> {
        let form = IncomingForm {
            tag: range.tag,
            size_bytes: range.offset_bytes.saturating_add(size_bytes),
            offset_bytes: range.offset_bytes,
            is_delta,
        };
        let expected_plain_bytes = self.packs.sizes.get(pack).copied();
        let incoming = self.repository.incoming_pack(*pack, form, expected_plain_bytes).map_err(not_taken)?;
        Ok(Box::new(Receiving(incoming)))
    }
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
fn not_taken(e: RepositoryError) -> SinkError {
    if e.is_content_fault() { SinkError::Content(Box::new(e)) } else { SinkError::Storage(Box::new(e)) }
}

fn storage(e: impl std::error::Error + Send + Sync + 'static) -> SinkError {
    SinkError::Storage(Box::new(e))
}
