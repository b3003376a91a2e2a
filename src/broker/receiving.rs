//! What arrives from other brokers goes to the repository, packs in whatever form they come.

use std::collections::HashMap;
use std::sync::Arc;

use crate::disk::DiskError;
use crate::repository::{IncomingForm, IncomingPack, Repository, RepositoryError};
use crate::transfer::{ObjectKey, ObjectSink, PackRange, PackWish, PackWriter, SinkError, Verified};
use crate::types::{BlockHash, PackId};

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
