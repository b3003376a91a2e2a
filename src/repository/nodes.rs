//! Chunk map nodes: many and tiny, so they are gathered and written in bundles, each a file that
//! never changes. Specified in `FORMAT.md`, section "Node bundle".

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Repository;
use super::error::{IoContext, ObjectId, ObjectKind, RepositoryError, Result};
use super::index::{Entry, Index, NodePlace};
use super::layout::{self, Layout};
use crate::types::codec::CodecError;
use crate::types::{Hash, NodeHash};
use crate::vm::chunk_map::{FANOUT, NODE_MAGIC, Node};
use crate::vm::{ChunkMap, MapRef};

/// Magic and version of a bundle.
const MAGIC: &[u8; 8] = b"CICNDB\0\x01";
/// Length and hash before each node.
pub(super) const RECORD_HEADER_BYTES: usize = 4 + Hash::LEN_BYTES;
/// A full leaf: magic, level, count, and per block its place, state and hash.
const NODE_BYTES_MAX: usize = 8 + 1 + 2 + (1 + 1 + Hash::LEN_BYTES) * FANOUT as usize;
/// Gathered nodes are written when they are this many bytes.
const BUNDLE_BYTES: usize = 4 << 20;
/// A map of more leaves is not read into memory: they stand for 256 GiB in blocks of 4 KiB.
const MAP_LEAVES_MAX: u64 = 1 << 18;

/// Nodes not yet on disk: the bundle they will be, and where in it they are.
#[derive(Default)]
pub(super) struct PendingNodes {
    bundle: Vec<u8>,
    places: HashMap<NodeHash, (usize, usize)>,
}

impl Repository {
    /// Takes a node, refused unless it has this hash and is well formed. It is durable after the
    /// next [`Repository::flush_nodes`], [`Repository::put_map`] or [`Repository::set_ref`].
    pub fn put_node(&self, hash: NodeHash, bytes: &[u8]) -> Result<()> {
        let object = ObjectId::Node(hash);
        let level = bytes.get(NODE_MAGIC.len()).copied().unwrap_or_default();
        if bytes.len() > NODE_BYTES_MAX || NodeHash::of(bytes) != hash {
            let reason = "it is too large, or the hash of what was sent is another".into();
            return Err(RepositoryError::Refused { object, reason });
        }
        let decoded = Node::decode(bytes, level);
        decoded.map_err(|source| RepositoryError::Codec { what: object.to_string(), source })?;
        self.gather(hash, bytes)
    }

    /// A node's bytes, verified.
    pub fn node(&self, hash: &NodeHash) -> Result<Vec<u8>> {
        if let Some(bytes) = lock(&self.inner.pending_nodes).get(hash) {
            return Ok(bytes.to_vec());
        }
        let object = ObjectId::Node(*hash);
        let missing = RepositoryError::Missing { object };
        let Some(entry) = self.index().get(&object)? else { return Err(missing) };
        let Some(place) = entry.place else { return Err(missing) };
        let path = bundle_path(self.layout(), &place.bundle);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                // The collector may have moved the node to another bundle meanwhile.
                if self.index().get(&object)? != Some(entry) {
                    return self.node(hash);
                }
                self.forget(&object);
                return Err(missing);
            }
            Err(e) => return Err(RepositoryError::io("open", &path, 0, e)),
        };
        let mut bytes = vec![0; (entry.plain_bytes as usize).min(NODE_BYTES_MAX)];
        match file.read_exact_at(&mut bytes, place.offset_bytes) {
            Ok(()) if NodeHash::of(&bytes) == *hash => Ok(bytes),
            Ok(()) => Err(self.damaged_node(*hash, &bytes, "the hash of its content is another")?),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                Err(self.damaged_node(*hash, &[], "its bundle is too short")?)
            }
            Err(e) => Err(RepositoryError::io("read", &path, 0, e)),
        }
    }

    pub fn has_node(&self, hash: &NodeHash) -> bool {
        lock(&self.inner.pending_nodes).places.contains_key(hash)
            || self.index().get(&ObjectId::Node(*hash)).is_ok_and(|entry| entry.is_some())
    }

    /// Makes every node taken so far durable.
    pub fn flush_nodes(&self) -> Result<()> {
        flush(self.layout(), self.index(), &mut lock(&self.inner.pending_nodes))
    }

    /// Stores a chunk map's nodes durably, names the map, and tells the nodes' hashes.
    pub fn put_map(&self, map: &ChunkMap) -> Result<(MapRef, Vec<NodeHash>)> {
        let (name, nodes) = map.to_tree();
        let mut kept = HashSet::new();
        for (hash, bytes) in &nodes {
            let object = ObjectId::Node(*hash);
            match self.index().get(&object)?.and_then(|entry| entry.place) {
                Some(place) if kept.contains(&place.bundle) => {}
                Some(place) if self.keep_bundle(&place.bundle)? => drop(kept.insert(place.bundle)),
                Some(_) => {
                    self.forget(&object);
                    self.gather(*hash, bytes)?;
                }
                None => self.gather(*hash, bytes)?,
            }
        }
        self.flush_nodes()?;
        Ok((name, nodes.into_iter().map(|(hash, _)| hash).collect()))
    }

    /// Reads a whole chunk map.
    pub fn map(&self, map: &MapRef) -> Result<ChunkMap> {
        let node = |hash| self.node(&hash).map_err(MapError::Node);
        // Before memory is taken for a block: the same leaf may be named at millions of places.
        let leaves = ChunkMap::leaf_count(map, node).map_err(|e| e.about(map))?;
        if leaves > MAP_LEAVES_MAX {
            let rule = format!("{} has {leaves} leaves, more than {MAP_LEAVES_MAX}", map.id());
            return Err(RepositoryError::Invalid { what: "chunk map", rule });
        }
        ChunkMap::from_tree(map, node).map_err(|e| e.about(map))
    }

    /// The highest nodes of a map that are not here, with their levels (0 is a leaf). Fetch them and
    /// ask again until there are none.
    pub fn nodes_missing(&self, map: &MapRef) -> Result<Vec<(NodeHash, u8)>> {
        map.check().map_err(|e| MapError::from(e).about(map))?;
        let mut missing = Vec::new();
        let mut row: Vec<NodeHash> = map.root.into_iter().collect();
        for level in (0..map.levels()).rev() {
            let mut seen = HashSet::new();
            let mut next = Vec::new();
            for hash in row.into_iter().filter(|hash| seen.insert(*hash)) {
                if level == 0 && self.has_node(&hash) {
                    continue;
                }
                match self.node(&hash) {
                    Ok(bytes) => match Node::decode(&bytes, level)
                        .map_err(|e| MapError::from(e).about(map))?
                    {
                        Node::Inner(children) => next.extend(children.into_iter().map(|(_, child)| child)),
                        Node::Leaf(_) => {}
                    },
                    Err(RepositoryError::Missing { .. } | RepositoryError::Damaged { .. }) => {
                        missing.push((hash, level));
                    }
                    Err(e) => return Err(e),
                }
            }
            row = next;
        }
        Ok(missing)
    }

    /// Renews a bundle's age, so that nodes used again are not collected as old before the new map
    /// is referred to. Tells whether the bundle is there.
    fn keep_bundle(&self, bundle: &Hash) -> Result<bool> {
        let path = bundle_path(self.layout(), bundle);
        // The collector looks at the age and removes under this lock.
        let _held = self.inner.pins.lock();
        match layout::touch(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            other => other.at("mark as used", &path).map(|()| true),
        }
    }

    fn gather(&self, hash: NodeHash, bytes: &[u8]) -> Result<()> {
        if self.has_node(&hash) {
            return Ok(());
        }
        let mut pending = lock(&self.inner.pending_nodes);
        pending.add(hash, bytes);
        self.healed(&ObjectId::Node(hash))?;
        if pending.bundle.len() >= BUNDLE_BYTES {
            flush(self.layout(), self.index(), &mut pending)?;
        }
        Ok(())
    }

    /// Gathers nodes again although they are held, to give up the bundle they are in.
    pub(super) fn move_nodes<'a>(&self, nodes: impl Iterator<Item = (NodeHash, &'a [u8])>) -> Result<()> {
        let mut pending = lock(&self.inner.pending_nodes);
        for (hash, bytes) in nodes {
            pending.add(hash, bytes);
        }
        if pending.bundle.len() >= BUNDLE_BYTES {
            flush(self.layout(), self.index(), &mut pending)?;
        }
        Ok(())
    }

    /// A bundle holds other nodes too, so only a copy of the damaged bytes is set aside.
    fn damaged_node(&self, hash: NodeHash, bytes: &[u8], reason: &str) -> Result<RepositoryError> {
        let object = ObjectId::Node(hash);
        let path = self.layout().quarantine_path(&object);
        self.layout().write(&path, bytes)?;
        self.forget(&object);
        tracing::error!(%object, path = %path.display(), reason, "damaged object set aside");
        Ok(RepositoryError::Damaged { object, path, reason: reason.to_owned() })
    }
}

/// Writes the gathered nodes as one bundle and enters them in the index.
pub(super) fn flush(layout: &Layout, index: &Index, pending: &mut PendingNodes) -> Result<()> {
    if pending.places.is_empty() {
        return Ok(());
    }
    let name = Hash::of(&pending.bundle);
    layout.write(&bundle_path(layout, &name), &pending.bundle)?;
    index.insert_nodes(
        pending.places.iter().map(|(hash, (offset, len))| (*hash, entry(name, *offset, *len))),
    )?;
    *pending = PendingNodes::default();
    Ok(())
}

pub(super) fn lock(pending: &Mutex<PendingNodes>) -> MutexGuard<'_, PendingNodes> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn bundle_path(layout: &Layout, name: &Hash) -> PathBuf {
    let (dir, extension) = layout::place_of(ObjectKind::Node);
    let name = name.to_string();
    layout.dir(dir).join(&name[..2]).join(format!("{name}.{extension}"))
}

pub(super) fn entry(bundle: Hash, offset: usize, len: usize) -> Entry {
    Entry {
        plain_bytes: len as u64,
        stored_bytes: (RECORD_HEADER_BYTES + len) as u64,
        place: Some(NodePlace { bundle, offset_bytes: offset as u64 }),
    }
}

/// One node found in a bundle.
pub(super) struct Found<'a> {
    pub hash: NodeHash,
    pub offset: usize,
    pub bytes: &'a [u8],
    /// Whether the bytes have the hash.
    pub intact: bool,
}

/// Every node of a bundle, and what ended the reading early, if anything did.
pub(super) fn read_bundle(bundle: &[u8]) -> (Vec<Found<'_>>, Option<&'static str>) {
    let mut found = Vec::new();
    let Some(mut rest) = bundle.strip_prefix(MAGIC.as_slice()) else {
        return (found, Some("it does not begin with the magic of a node bundle of version 1"));
    };
    while let Some((length, after)) = rest.split_first_chunk() {
        let len = u32::from_le_bytes(*length) as usize;
        let Some((hash, after)) = after.split_first_chunk() else {
            return (found, Some("it ends within a node"));
        };
        if len > NODE_BYTES_MAX || len > after.len() {
            return (found, Some("a node claims more bytes than there are"));
        }
        let (bytes, after) = after.split_at(len);
        let hash = NodeHash::from_bytes(*hash);
        let offset = bundle.len() - after.len() - len;
        found.push(Found { hash, offset, bytes, intact: NodeHash::of(bytes) == hash });
        rest = after;
    }
    (found, if rest.is_empty() { None } else { Some("it ends within a node") })
}

impl PendingNodes {
    fn get(&self, hash: &NodeHash) -> Option<&[u8]> {
        let (offset, len) = *self.places.get(hash)?;
        self.bundle.get(offset..offset + len)
    }

    fn add(&mut self, hash: NodeHash, bytes: &[u8]) {
        if self.places.contains_key(&hash) {
            return;
        }
        if self.bundle.is_empty() {
            self.bundle.extend_from_slice(MAGIC);
        }
        self.bundle.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        self.bundle.extend_from_slice(hash.as_bytes());
        self.places.insert(hash, (self.bundle.len(), bytes.len()));
        self.bundle.extend_from_slice(bytes);
    }
}

/// Lets the map reader's codec errors and ours travel together.
enum MapError {
    Node(RepositoryError),
    Map(CodecError),
}

impl MapError {
    fn about(self, map: &MapRef) -> RepositoryError {
        match self {
            MapError::Node(e) => e,
            MapError::Map(source) => {
                RepositoryError::Codec { what: format!("chunk map {}", map.id()), source }
            }
        }
    }
}

impl From<CodecError> for MapError {
    fn from(source: CodecError) -> Self {
        MapError::Map(source)
    }
}
