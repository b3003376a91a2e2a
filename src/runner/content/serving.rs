//! What this broker serves to others: the content of VMs that are moving, to the member they
//! move to, while the migration's ticket is valid.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, RwLock};

use crate::disk::BlockIndex;
use crate::federation::Refused;
use crate::federation::refusals::Tally;
use crate::repository::{RECORD_LEVEL, Repository};
use crate::transfer::{
    Authority, Content, Encoding, Limiter, ObjectBody, ObjectKey, ObjectSource, PackRange, PackWish, Refusal,
    Ticket,
};
use crate::types::{ComponentId, NodeHash, PackId, PublicKey, RecipeId};

/// Refused peers told apart between two looks of the owner task; the rest are counted as 0.0.0.0.
const REFUSED_MAX: usize = 1000;

/// The content of one moving VM.
#[derive(Default)]
pub struct Served {
    pub peer: Option<PublicKey>,
    pub recipe: Option<RecipeId>,
    pub components: HashSet<ComponentId>,
    pub packs: HashSet<PackId>,
    /// Nodes of the chunk maps of all passes so far.
    pub nodes: HashSet<NodeHash>,
    /// Where the blocks of the newest pass lie.
    pub blocks: Vec<Arc<BlockIndex>>,
    /// The migration's own cap.
    pub limiter: Limiter,
}

/// Shared between the owner task, which issues and withdraws tickets, and the transfer endpoint.
#[derive(Default)]
pub struct Tickets {
    members: RwLock<HashSet<PublicKey>>,
    /// Members that have a cap of their own, over all their tickets.
    caps: RwLock<HashMap<PublicKey, Limiter>>,
    served: RwLock<HashMap<[u8; 32], Arc<Served>>>,
    /// Peers that were refused, by key where it is a known one, until the owner task counts them.
    refused: Mutex<HashMap<RefusedPeer, u64>>,
}

type RefusedPeer = (Option<PublicKey>, IpAddr, Refused);

impl Tickets {
    /// The keys of trusted members now in the room: nobody else may connect.
    pub fn set_members(&self, keys: HashSet<PublicKey>) {
        *write(&self.members) = keys;
    }

    /// One more that may connect.
    pub fn add_member(&self, key: PublicKey, cap_bytes_per_s: Option<u64>) {
        if let Some(rate) = cap_bytes_per_s {
            set_cap(&mut write(&self.caps), key, rate);
        }
        write(&self.members).insert(key);
    }

    /// The caps of members that have one, bytes per second. They hold for what is under way, too.
    pub fn set_caps(&self, rates: HashMap<PublicKey, u64>) {
        let mut caps = write(&self.caps);
        caps.retain(|key, _| rates.contains_key(key));
        for (key, rate) in rates {
            set_cap(&mut caps, key, rate);
        }
    }

    /// Serves `content` to whoever shows `ticket` and holds the content's peer key.
    pub fn serve(&self, ticket: Ticket, content: Served) {
        write(&self.served).insert(*ticket.as_bytes(), Arc::new(content));
    }

    pub fn withdraw(&self, ticket: &Ticket) {
        write(&self.served).remove(ticket.as_bytes());
    }

    /// Withdraws whatever was served to this member.
    pub fn withdraw_all_of(&self, peer: &PublicKey) {
        write(&self.served).retain(|_, served| served.peer != Some(*peer));
    }

    /// Who was refused since the last call: the key, if it is a member's, and the count under the
    /// address.
    pub fn take_refused(&self) -> Vec<(Option<PublicKey>, Tally)> {
        let mut refused = self.refused.lock().unwrap_or_else(|e| e.into_inner());
        let tally = |((peer, address, refused), count): (RefusedPeer, u64)| {
            (peer, Tally { sender: address.to_string(), refused, count })
        };
        refused.drain().map(tally).collect()
    }

    fn find(&self, ticket: &Ticket) -> Result<Arc<Served>, Refusal> {
        read(&self.served).get(ticket.as_bytes()).cloned().ok_or(Refusal::UnknownTicket)
    }
}

fn set_cap(caps: &mut HashMap<PublicKey, Limiter>, key: PublicKey, rate: u64) {
    let limiter = caps.entry(key).or_insert_with(|| Limiter::new(Some(rate)));
    if limiter.rate_bytes_per_s() != Some(rate) {
        limiter.set_rate(Some(rate));
    }
}

impl Authority for Tickets {
    fn admit(&self, peer: &PublicKey) -> Result<(), Refusal> {
        if read(&self.members).contains(peer) { Ok(()) } else { Err(Refusal::NotMember) }
    }

    fn check(&self, peer: &PublicKey, ticket: &Ticket, key: &ObjectKey) -> Result<(), Refusal> {
        let served = self.find(ticket)?;
        let covered = served.peer == Some(*peer)
            && match key {
                ObjectKey::Recipe(id) => served.recipe == Some(*id),
                ObjectKey::Manifest(id) => served.components.contains(id),
                ObjectKey::Pack(id) => served.packs.contains(id),
                ObjectKey::Node(id) => served.nodes.contains(id),
                // A block is only served if it lies on one of the VM's disks.
                ObjectKey::Block(_) => true,
            };
        if covered { Ok(()) } else { Err(Refusal::OutOfScope) }
    }

    fn limiter(&self, ticket: &Ticket) -> Option<Limiter> {
        let served = self.find(ticket).ok()?;
        let cap = served.peer.and_then(|peer| read(&self.caps).get(&peer).cloned());
        Some(match cap {
            Some(of_member) => served.limiter.within(of_member),
            None => served.limiter.clone(),
        })
    }

    fn refused(&self, peer: Option<&PublicKey>, address: IpAddr, reason: Refused) {
        // Keys cost nothing: a stranger's says less than where it comes from.
        let peer = peer.filter(|key| read(&self.members).contains(key)).copied();
        let mut refused = self.refused.lock().unwrap_or_else(|e| e.into_inner());
        let full = refused.len() >= REFUSED_MAX && !refused.contains_key(&(peer, address, reason));
        let address = if full { IpAddr::from([0, 0, 0, 0]) } else { address };
        *refused.entry((peer, address, reason)).or_default() += 1;
    }
}

/// The endpoint's view of the repository and of the disks being moved.
pub struct Store {
    pub repository: Repository,
    pub tickets: Arc<Tickets>,
}

impl ObjectSource for Store {
    fn open(&self, ticket: &Ticket, key: &ObjectKey) -> Result<ObjectBody, Refusal> {
        let refuse = |error: &dyn std::error::Error| {
            tracing::warn!(object = %key, error = crate::interface::chain(error), "cannot serve");
            Refusal::Failed
        };
        match key {
            ObjectKey::Manifest(id) => {
                // Packed as it is stored, so that plans are exact about it.
                let bytes = self.repository.manifest_bytes(id).map_err(|e| refuse(&e))?;
                let packed = zstd::bulk::compress(&bytes, RECORD_LEVEL).map_err(|e| refuse(&e))?;
                let encoding = Encoding::Zstd { plain_size_bytes: bytes.len() as u64 };
                Ok(ObjectBody { encoding, content: Content::Bytes(packed.into()) })
            }
            ObjectKey::Recipe(id) => {
                self.repository.recipe_bytes(id).map(ObjectBody::plain).map_err(|e| refuse(&e))
            }
            ObjectKey::Node(id) => self.repository.node(id).map(ObjectBody::plain).map_err(|e| refuse(&e)),
            // Packs have forms of their own.
            ObjectKey::Pack(_) => Err(Refusal::Failed),
            ObjectKey::Block(id) => {
                let served = self.tickets.find(ticket)?;
                for index in &served.blocks {
                    match index.read_block(id) {
                        Ok(bytes) => return Ok(ObjectBody::plain(bytes)),
                        Err(crate::disk::DiskError::UnknownBlock { .. }) => {}
                        Err(crate::disk::DiskError::Changed { .. }) => return Err(Refusal::Changed),
                        Err(e) => return Err(refuse(&e)),
                    }
                }
                Err(Refusal::NotHeld)
            }
        }
    }

    fn open_pack(&self, _ticket: &Ticket, pack: &PackId, wish: &PackWish) -> Result<ObjectBody, Refusal> {
        let form = self.repository.pack_form(pack, &wish.bases, wish.begun.map(|(tag, _)| tag));
        let form = form.map_err(|error| {
            tracing::warn!(%pack, error = crate::interface::chain(&error), "cannot serve");
            Refusal::Failed
        })?;
        let begun = wish.begun.filter(|(tag, bytes)| *tag == form.tag && *bytes <= form.size_bytes);
        let offset_bytes = begun.map_or(0, |(_, bytes)| bytes);
        let size_bytes = form.size_bytes - offset_bytes;
        let range = PackRange { tag: form.tag, offset_bytes, stored_size_bytes: form.stored_size_bytes };
        Ok(ObjectBody {
            encoding: if form.base.is_some() {
                Encoding::PackDelta(range)
            } else {
                Encoding::StoredPack(range)
            },
            content: Content::File { file: form.file, offset_bytes, size_bytes },
        })
    }
}

// A panic while a lock is held cannot leave these maps half changed.
fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(|e| e.into_inner())
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(|e| e.into_inner())
}
