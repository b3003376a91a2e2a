//! What travels, and the seams to those who hold it, want it and guard it.

use std::fmt;
use std::fs::File;
use std::net::IpAddr;

use bytes::Bytes;

use super::error::Refusal;
use super::limiter::Limiter;
use crate::federation::Refused;
use crate::types::{BlockHash, ComponentId, Hash, NodeHash, PackId, PublicKey, RecipeId};

/// Names one object a broker may ask another for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ObjectKey {
    Manifest(ComponentId),
    Recipe(RecipeId),
    Pack(PackId),
    Node(NodeHash),
    Block(BlockHash),
}

impl ObjectKey {
    /// The hash the object's plain bytes must have.
    pub fn hash(&self) -> Hash {
        match self {
            ObjectKey::Manifest(id) => id.0,
            ObjectKey::Recipe(id) => id.0,
            ObjectKey::Pack(id) => id.0,
            ObjectKey::Node(id) => id.0,
            ObjectKey::Block(id) => id.0,
        }
    }
    pub fn kind(&self) -> &'static str {
        match self {
            ObjectKey::Manifest(_) => "manifest",
            ObjectKey::Recipe(_) => "recipe",
            ObjectKey::Pack(_) => "pack",
            ObjectKey::Node(_) => "node",
            ObjectKey::Block(_) => "block",
        }
    }
    pub(super) fn is_pack(&self) -> bool {
        matches!(self, ObjectKey::Pack(_))
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind(), self.hash().short())
    }
}

/// The right to fetch the objects of one VM's migration for a while: 32 random bytes that the
/// source gives the target inside the signed negotiation. `Debug` hides it, and comparing takes
/// the same time wherever two tickets differ.
#[derive(Clone, Copy)]
pub struct Ticket([u8; 32]);

impl Ticket {
    /// A fresh ticket from the system's random source.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl PartialEq for Ticket {
    fn eq(&self, other: &Self) -> bool {
        // `blake3::Hash` compares in constant time.
        blake3::Hash::from_bytes(self.0) == blake3::Hash::from_bytes(other.0)
    }
}

impl Eq for Ticket {}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ticket(…)")
    }
}

/// How a body's bytes relate to the plain object.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Encoding {
    /// The object itself.
    Plain,
    /// One zstd frame (RFC 8878) that unpacks to `plain_size_bytes` bytes.
    Zstd { plain_size_bytes: u64 },
    /// A pack as the repository stores it; only the receiver's [`PackWriter`] can read it.
    StoredPack(PackRange),
    /// A pack as the delta from one the asker holds; likewise.
    PackDelta(PackRange),
}

/// Which part of a pack's form follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PackRange {
    /// Tells this form from others of the same pack.
    pub tag: [u8; 16],
    /// Left out because the asker has it: where the bytes that follow begin.
    pub offset_bytes: u64,
    /// What the pack's stored form has: with a delta, what need not be sent.
    pub stored_size_bytes: u64,
}

/// What an asker says beside a pack's id, so that less has to be sent.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PackWish {
    /// Packs it holds that may be earlier versions, likeliest first; at most
    /// [`limit::BASES`](super::limit::BASES).
    pub bases: Vec<PackId>,
    /// A part of a form that came earlier: its tag, and how many bytes are there.
    pub begun: Option<([u8; 16], u64)>,
}

/// Where a body's bytes are.
#[derive(Debug)]
pub enum Content {
    Bytes(Bytes),
    /// A range of a file that must not change while it is open.
    File {
        file: File,
        offset_bytes: u64,
        size_bytes: u64,
    },
}

/// One object, opened for sending.
#[derive(Debug)]
pub struct ObjectBody {
    /// Packs are [`Encoding::StoredPack`] or [`Encoding::PackDelta`], everything else is not.
    pub encoding: Encoding,
    pub content: Content,
}

impl ObjectBody {
    pub fn plain(bytes: impl Into<Bytes>) -> Self {
        Self { encoding: Encoding::Plain, content: Content::Bytes(bytes.into()) }
    }
    /// Bytes as they are sent, before batching.
    pub fn size_bytes(&self) -> u64 {
        match &self.content {
            Content::Bytes(b) => b.len() as u64,
            Content::File { size_bytes, .. } => *size_bytes,
        }
    }
}

/// The serving side's store. Called on the blocking pool, after [`Authority::check`].
pub trait ObjectSource: Send + Sync + 'static {
    fn open(&self, ticket: &Ticket, key: &ObjectKey) -> Result<ObjectBody, Refusal>;

    /// Opens a pack in the form that suits the asker best. May take long: the asker is told that
    /// its request is being worked on.
    fn open_pack(&self, ticket: &Ticket, pack: &PackId, wish: &PackWish) -> Result<ObjectBody, Refusal>;
}

/// Who may connect, and who may have what. Called often; must not block for long.
pub trait Authority: Send + Sync + 'static {
    /// Whether the holder of this proven key may connect: members only.
    fn admit(&self, peer: &PublicKey) -> Result<(), Refusal>;
    /// Whether `ticket`, shown by `peer`, covers `key` now.
    fn check(&self, peer: &PublicKey, ticket: &Ticket, key: &ObjectKey) -> Result<(), Refusal>;
    /// The cap of what is sent for a ticket, beside the endpoint's own.
    fn limiter(&self, _ticket: &Ticket) -> Option<Limiter> {
        None
    }
    /// Counts a peer, or whoever dials from an address, that was refused.
    fn refused(&self, _peer: Option<&PublicKey>, _address: IpAddr, _reason: Refused) {}
}

/// An object whose bytes have the hash its key says. The bytes of one batch share a buffer: who
/// keeps some for long copies them.
#[derive(Clone, Debug)]
pub struct Verified {
    pub key: ObjectKey,
    pub bytes: Bytes,
}

/// Why a sink does not take what arrived.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The pack is not what its id says: the peer is at fault.
    #[error("the content does not match its id")]
    Content(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It cannot be kept here: full disk, I/O error, size over a limit of ours.
    #[error("it cannot be stored")]
    Storage(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Where fetched objects go. Called on the blocking pool, from several streams at once. Taking
/// an object that is already held must be harmless: a resumed fetch may bring it again.
pub trait ObjectSink: Send + Sync + 'static {
    /// Takes verified objects (never packs), in the order they were asked for.
    fn deliver(&self, objects: Vec<Verified>) -> Result<(), SinkError>;
    /// What is here that makes a pack cheaper to send. Asked just before the pack is.
    fn wish(&self, _pack: &PackId) -> PackWish {
        PackWish::default()
    }
    /// A writer for `size_bytes` bytes of a pack's form, which begin at the range's offset.
    fn pack(
        &self,
        pack: &PackId,
        is_delta: bool,
        range: &PackRange,
        size_bytes: u64,
    ) -> Result<Box<dyn PackWriter>, SinkError>;
}

/// Takes one pack's bytes in order. Dropped unfinished, it may keep what came for the next attempt.
pub trait PackWriter: Send {
    fn write(&mut self, stored: &[u8]) -> Result<(), SinkError>;
    /// All bytes were written: verify them against the pack's id and keep the pack.
    fn finish(self: Box<Self>) -> Result<(), SinkError>;
}
