//! What can go wrong with a repository, and what to do about it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::types::codec::CodecError;
use crate::types::{ByteSize, ComponentId, NodeHash, PackId, RecipeId};

/// One content-addressed object.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind", content = "id")]
pub enum ObjectId {
    Manifest(ComponentId),
    Recipe(RecipeId),
    Pack(PackId),
    Node(NodeHash),
}

impl ObjectId {
    pub fn kind(&self) -> ObjectKind {
        match self {
            ObjectId::Manifest(_) => ObjectKind::Manifest,
            ObjectId::Recipe(_) => ObjectKind::Recipe,
            ObjectId::Pack(_) => ObjectKind::Pack,
            ObjectId::Node(_) => ObjectKind::Node,
        }
    }

    pub fn hash_bytes(&self) -> &[u8; 32] {
        match self {
            ObjectId::Manifest(id) => id.as_bytes(),
            ObjectId::Recipe(id) => id.as_bytes(),
            ObjectId::Pack(id) => id.as_bytes(),
            ObjectId::Node(id) => id.as_bytes(),
        }
    }
}

/// Shows the kind and the full hash, so the text can be searched for.
impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ObjectId::Manifest(id) => write!(f, "component {id}"),
            ObjectId::Recipe(id) => write!(f, "recipe {id}"),
            ObjectId::Pack(id) => write!(f, "pack {id}"),
            ObjectId::Node(id) => write!(f, "chunk map node {id}"),
        }
    }
}

/// The kinds of object. The number is part of the index key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectKind {
    Manifest = 0,
    Recipe = 1,
    Pack = 2,
    Node = 3,
}

impl ObjectKind {
    pub const ALL: [ObjectKind; 4] =
        [ObjectKind::Manifest, ObjectKind::Recipe, ObjectKind::Pack, ObjectKind::Node];

    pub fn as_str(self) -> &'static str {
        match self {
            ObjectKind::Manifest => "manifest",
            ObjectKind::Recipe => "recipe",
            ObjectKind::Pack => "pack",
            ObjectKind::Node => "node",
        }
    }

    pub(super) fn object(self, hash: [u8; 32]) -> ObjectId {
        match self {
            ObjectKind::Manifest => ObjectId::Manifest(ComponentId::from_bytes(hash)),
            ObjectKind::Recipe => ObjectId::Recipe(RecipeId::from_bytes(hash)),
            ObjectKind::Pack => ObjectId::Pack(PackId::from_bytes(hash)),
            ObjectKind::Node => ObjectId::Node(NodeHash::from_bytes(hash)),
        }
    }
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    #[error(
        "the repository {} is in use by {}: stop it first, or let it do the work",
        dir.display(), holder(pid)
    )]
    Locked { dir: PathBuf, pid: Option<u32> },

    #[error("{} is not a repository: {reason}", dir.display())]
    NotARepository { dir: PathBuf, reason: String },

    #[error("the repository {} has {found}, which this version of cicada cannot read: use a newer one", dir.display())]
    Version { dir: PathBuf, found: String },

    #[error("{object} is not in the repository: fetch it from a member that holds it, or build it here")]
    Missing { object: ObjectId },

    /// The bytes on disk are not the object. The file is at `path`, in quarantine.
    #[error("{object} is damaged ({reason}); it was set aside as {}: fetch it again", path.display())]
    Damaged { object: ObjectId, path: PathBuf, reason: String },

    /// A ref cannot be read. It stays where it is: what it names must not be collected.
    #[error("the {kind} ref in {} is damaged ({reason}): restore the file from a backup or delete it", path.display())]
    DamagedRef { kind: &'static str, path: PathBuf, reason: String },

    #[error("cancelled")]
    Cancelled,

    /// What was handed in is not what it claims to be; nothing was kept.
    #[error("{object} was refused: {reason}")]
    Refused { object: ObjectId, reason: String },

    /// A crash may have torn what an earlier run received, or the sender's form changed: no fault
    /// of the sender.
    #[error("what was here of {object} does not fit what followed, and was dropped: ask for all of it")]
    TornPart { object: ObjectId },

    #[error("no component is called '{text}': `cicada component list` shows what there is")]
    UnknownComponent { text: String },

    #[error("'{text}' names more than one component: {}; write name@version or the id", candidates.join(", "))]
    Ambiguous { text: String, candidates: Vec<String> },

    /// `next_step` is what an operator can do about `by`.
    #[error("{object} is needed by {by}")]
    InUse { object: ObjectId, by: String, next_step: String },

    #[error(
        "no space left in {}: {} needed, {} free; make room, or remove what is not needed with `cicada repo gc`",
        dir.display(), ByteSize(*need_bytes), ByteSize(*have_bytes)
    )]
    NoSpace { need_bytes: u64, have_bytes: u64, dir: PathBuf },

    #[error("cannot {what} {}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },

    #[error("{what} is malformed")]
    Codec {
        what: String,
        #[source]
        source: CodecError,
    },

    #[error(
        "the repository index failed ({reason}): it is derived data, `cicada repo rebuild-index` makes it anew"
    )]
    Index { reason: String },

    #[error("{what}: {rule}")]
    Invalid { what: &'static str, rule: String },
}

pub type Result<T, E = RepositoryError> = std::result::Result<T, E>;

fn holder(pid: &Option<u32>) -> String {
    match pid {
        Some(pid) => format!("process {pid}"),
        None => "another process".to_owned(),
    }
}

impl RepositoryError {
    /// An I/O error on `path`; a full disk becomes `NoSpace` with what the write would have needed.
    pub(super) fn io(what: &'static str, path: &Path, need_bytes: u64, source: io::Error) -> Self {
        let full = matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        if full {
            let dir = path.parent().unwrap_or(path).to_owned();
            let have_bytes = free_bytes(&dir).unwrap_or(0);
            return RepositoryError::NoSpace { need_bytes, have_bytes, dir };
        }
        RepositoryError::Io { what, path: path.to_owned(), source }
    }
}

/// Bytes an unprivileged writer can still put into `dir`'s file system.
pub(super) fn free_bytes(dir: &Path) -> io::Result<u64> {
    let s = rustix::fs::statvfs(dir)?;
    Ok(s.f_bavail.saturating_mul(s.f_frsize))
}

/// Attaches what was being done and to which file.
pub(super) trait IoContext<T> {
    fn at(self, what: &'static str, path: &Path) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn at(self, what: &'static str, path: &Path) -> Result<T> {
        self.map_err(|e| RepositoryError::io(what, path, 0, e))
    }
}
