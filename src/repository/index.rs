//! The derived index: which objects there are, where nodes lie, and a summary of each component.
//! The only file that knows sled. Everything here can be rebuilt from the objects on disk, so an
//! entry is a hint that a reader confirms against the disk.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::Duration;

use super::error::{IoContext, ObjectId, ObjectKind, RepositoryError, Result};
use crate::component::Kind;
use crate::component::manifest::{Manifest, limit};
use crate::types::codec::{CodecError, Reader, Writer};
use crate::types::{ComponentId, Hash, NodeHash, PackId};

/// Small on purpose: look-ups are rare next to the content they lead to.
const CACHE_BYTES: u64 = 4 << 20;
/// Version of the keys and values below; an index of another version is made anew.
const VERSION: &[u8] = b"1";

pub(super) struct Index {
    dir: PathBuf,
    /// Nothing only where opening anew failed.
    open: RwLock<Option<Trees>>,
    /// An operation failed in reading or writing. sled (0.34) answers with its first such error for ever,
    /// also when there is room again: it must be opened anew.
    failed: AtomicBool,
    /// Held while an object is entered, and while one is found gone and removed: so none that is
    /// stored at the same time is taken for gone.
    changing: Mutex<()>,
}

#[derive(Clone)]
struct Trees {
    db: sled::Db,
    /// Kind byte and hash -> [`Entry`].
    objects: sled::Tree,
    /// Component id -> [`Summary`].
    summaries: sled::Tree,
}

/// Sizes of an object, and for a node where its bytes lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    pub plain_bytes: u64,
    pub stored_bytes: u64,
    pub place: Option<NodePlace>,
}

/// Where in which bundle the bytes of a node begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct NodePlace {
    pub bundle: Hash,
    pub offset_bytes: u64,
}

/// What listing, planning and resolving need of a manifest, without reading it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Summary {
    pub name: String,
    pub version: String,
    pub architecture: String,
    pub kind: Kind,
    pub requires: Vec<ComponentId>,
    pub packs: Vec<(PackId, u64)>,
}

impl Trees {
    fn open(dir: &Path) -> Result<Self> {
        let config = sled::Config::new()
            .path(dir)
            .cache_capacity(CACHE_BYTES)
            .mode(sled::Mode::LowSpace)
            .flush_every_ms(Some(1000));
        // A closing index lets go of its lock from a background thread, a moment later.
        let mut attempts = 0;
        let db = loop {
            match config.open() {
                Err(sled::Error::Io(e)) if attempts < 100 && is_lock_held(&e) => {
                    attempts += 1;
                    thread::sleep(Duration::from_millis(20));
                }
                other => break other?,
            }
        };
        Ok(Self { objects: db.open_tree("objects")?, summaries: db.open_tree("summaries")?, db })
    }
}

impl Index {
    /// Opens what is there, or makes an empty index. An index that cannot be read is an error; the
    /// caller wipes it and rebuilds.
    pub fn open(dir: &Path) -> Result<Self> {
        let open = RwLock::new(Some(Trees::open(dir)?));
        Ok(Self { dir: dir.to_owned(), open, failed: AtomicBool::new(false), changing: Mutex::new(()) })
    }

    /// Whether nothing is to be had of it until it is opened anew.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// Opens it anew; what was entered last may be lost. `wiped`: all of it is.
    pub fn reopen(&self, wiped: bool) -> Result<()> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        // With the last handle goes sled's lock on the directory.
        *open = None;
        if wiped {
            Self::wipe(&self.dir).at("remove", &self.dir)?;
        }
        *open = Some(Trees::open(&self.dir)?);
        self.failed.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn trees(&self) -> Result<Trees> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.clone().ok_or_else(|| malformed("it could not be opened anew"))
    }

    /// Takes note of failures that sled never gets over.
    fn noted<T>(&self, result: sled::Result<T>) -> Result<T> {
        if let Err(sled::Error::Io(_)) = &result {
            self.failed.store(true, Ordering::Relaxed);
        }
        Ok(result?)
    }

    /// Whether [`Index::set_complete`] was ever reached, by code of this version.
    pub fn is_complete(&self) -> Result<bool> {
        Ok(self.noted(self.trees()?.db.get("complete"))?.is_some_and(|v| v == VERSION))
    }

    /// States that all objects on disk have been entered.
    pub fn set_complete(&self) -> Result<()> {
        self.noted(self.trees()?.db.insert("complete", VERSION))?;
        self.flush()
    }

    /// The seal put on the index when it was closed last.
    pub fn seal(&self) -> Result<Option<Vec<u8>>> {
        Ok(self.noted(self.trees()?.db.get("seal"))?.map(|v| v.to_vec()))
    }

    /// Ends a use: the seal is the last thing written. sled gives up, without a word, whatever lies
    /// behind damage in its log, so a seal other than the one remembered elsewhere tells.
    pub fn set_seal(&self, seal: &[u8]) -> Result<()> {
        self.noted(self.trees()?.db.insert("seal", seal))?;
        self.flush()
    }

    /// Removes the index from disk; it must not be open.
    pub fn wipe(dir: &Path) -> io::Result<()> {
        match fs::remove_dir_all(dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    pub fn flush(&self) -> Result<()> {
        self.noted(self.trees()?.db.flush())?;
        Ok(())
    }

    pub fn get(&self, object: &ObjectId) -> Result<Option<Entry>> {
        match self.noted(self.trees()?.objects.get(key(object)))? {
            Some(value) => Ok(Some(decode(&value, Entry::read)?)),
            None => Ok(None),
        }
    }

    /// Enters an object, whose file must be in its place.
    pub fn insert(&self, object: &ObjectId, entry: &Entry) -> Result<()> {
        let _changing = self.changing();
        self.noted(self.trees()?.objects.insert(key(object), entry.encode()))?;
        Ok(())
    }

    /// Removes an object if it `is_gone`, and what is known of it.
    pub fn remove_if(&self, object: &ObjectId, is_gone: impl FnOnce() -> bool) -> Result<()> {
        let _changing = self.changing();
        if !is_gone() {
            return Ok(());
        }
        self.noted(self.trees()?.objects.remove(key(object)))?;
        if let ObjectId::Manifest(id) = object {
            self.noted(self.trees()?.summaries.remove(id.as_bytes()))?;
        }
        Ok(())
    }

    /// Inserts the nodes of one bundle at once.
    pub fn insert_nodes(&self, nodes: impl IntoIterator<Item = (NodeHash, Entry)>) -> Result<()> {
        let mut batch = sled::Batch::default();
        for (hash, entry) in nodes {
            batch.insert(key(&ObjectId::Node(hash)).as_slice(), entry.encode());
        }
        let _changing = self.changing();
        self.noted(self.trees()?.objects.apply_batch(batch))?;
        Ok(())
    }

    /// What `walk` goes through; one error, if the index is not open.
    fn items(
        &self,
        walk: impl FnOnce(&Trees) -> sled::Iter,
    ) -> impl Iterator<Item = Result<(sled::IVec, sled::IVec)>> {
        let (items, closed) = match self.trees() {
            Ok(trees) => (Some(walk(&trees)), None),
            Err(error) => (None, Some(Err(error))),
        };
        items.into_iter().flatten().map(|item| self.noted(item)).chain(closed)
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hashes of one kind that begin with a byte, ascending.
    pub fn of_fan(&self, kind: ObjectKind, fan: u8) -> impl Iterator<Item = Result<[u8; 32]>> {
        self.items(move |t| t.objects.scan_prefix([kind as u8, fan]))
            .map(|item| Ok(*object_of(&item?.0)?.hash_bytes()))
    }

    /// Every entry of one kind.
    pub fn of_kind(&self, kind: ObjectKind) -> impl Iterator<Item = Result<(ObjectId, Entry)>> {
        self.items(move |t| t.objects.scan_prefix([kind as u8])).map(|item| {
            let (key, value) = item?;
            Ok((object_of(&key)?, decode(&value, Entry::read)?))
        })
    }

    /// Every entry, one kind after the other.
    pub fn entries(&self) -> impl Iterator<Item = Result<(ObjectId, Entry)>> {
        self.items(move |t| t.objects.iter()).map(|item| {
            let (key, value) = item?;
            Ok((object_of(&key)?, decode(&value, Entry::read)?))
        })
    }

    pub fn has_summary(&self, id: &ComponentId) -> Result<bool> {
        self.noted(self.trees()?.summaries.contains_key(id.as_bytes()))
    }

    /// Keeps a manifest's summary. The manifest must be entered before: see [`Index::remove_if`].
    pub fn put_summary(&self, id: &ComponentId, manifest: &Manifest) -> Result<()> {
        self.noted(self.trees()?.summaries.insert(id.as_bytes(), Summary::of(manifest).encode()))?;
        Ok(())
    }

    pub fn summary(&self, id: &ComponentId) -> Result<Option<Summary>> {
        match self.noted(self.trees()?.summaries.get(id.as_bytes()))? {
            Some(value) => Ok(Some(decode(&value, Summary::read)?)),
            None => Ok(None),
        }
    }

    pub fn summaries(&self) -> impl Iterator<Item = Result<(ComponentId, Summary)>> {
        self.items(|t| t.summaries.iter()).map(|item| {
            let (key, value) = item?;
            let id = <[u8; 32]>::try_from(&*key).map_err(|_| malformed("a key of wrong length"))?;
            Ok((ComponentId::from_bytes(id), decode(&value, Summary::read)?))
        })
    }
}

fn key(object: &ObjectId) -> [u8; 33] {
    let mut key = [object.kind() as u8; 33];
    key[1..].copy_from_slice(object.hash_bytes());
    key
}

fn object_of(key: &[u8]) -> Result<ObjectId> {
    let (kind, hash) = key.split_first().ok_or_else(|| malformed("an empty key"))?;
    let kind = *ObjectKind::ALL.get(usize::from(*kind)).ok_or_else(|| malformed("a key of unknown kind"))?;
    let hash = <[u8; 32]>::try_from(hash).map_err(|_| malformed("a key of wrong length"))?;
    Ok(kind.object(hash))
}

impl Entry {
    fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.varint(self.plain_bytes);
        w.varint(self.stored_bytes);
        if let Some(place) = &self.place {
            w.fixed(place.bundle.as_bytes());
            w.varint(place.offset_bytes);
        }
        w.into_bytes()
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        let plain_bytes = r.varint("plain bytes")?;
        let stored_bytes = r.varint("stored bytes")?;
        let place = if r.remaining_bytes() == 0 {
            None
        } else {
            let bundle = Hash::from_bytes(r.array("bundle")?);
            Some(NodePlace { bundle, offset_bytes: r.varint("offset")? })
        };
        Ok(Self { plain_bytes, stored_bytes, place })
    }
}

impl Summary {
    pub fn of(m: &Manifest) -> Self {
        Self {
            name: m.name.clone(),
            version: m.version.clone(),
            architecture: m.architecture.clone(),
            kind: m.kind,
            requires: m.requires.clone(),
            packs: m.packs.iter().map(|p| (p.id, p.size_bytes)).collect(),
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.str(&self.name);
        w.str(&self.version);
        w.str(&self.architecture);
        w.u8(self.kind as u8);
        w.varint(self.requires.len() as u64);
        self.requires.iter().for_each(|id| w.fixed(id.as_bytes()));
        w.varint(self.packs.len() as u64);
        for (id, size_bytes) in &self.packs {
            w.fixed(id.as_bytes());
            w.varint(*size_bytes);
        }
        w.into_bytes()
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        let name = r.str("name", limit::TEXT_BYTES)?.to_owned();
        let version = r.str("version", limit::TEXT_BYTES)?.to_owned();
        let architecture = r.str("architecture", limit::TEXT_BYTES)?.to_owned();
        let kind = r.u8("kind")?;
        let kind = *Kind::ALL
            .get(usize::from(kind))
            .ok_or(CodecError::Unknown { what: "component kind", value: kind.into() })?;
        let n = r.count("requires", limit::LIST_ITEMS, 32)?;
        let requires = (0..n)
            .map(|_| Ok(ComponentId::from_bytes(r.array("required component")?)))
            .collect::<Result<_, CodecError>>()?;
        let n = r.count("packs", limit::PACKS, 33)?;
        let packs = (0..n)
            .map(|_| Ok((PackId::from_bytes(r.array("pack")?), r.varint("pack size")?)))
            .collect::<Result<_, CodecError>>()?;
        Ok(Self { name, version, architecture, kind, requires, packs })
    }
}

fn decode<T>(bytes: &[u8], read: fn(&mut Reader<'_>) -> Result<T, CodecError>) -> Result<T> {
    let mut r = Reader::new(bytes);
    let value = read(&mut r).and_then(|value| r.end().map(|()| value));
    value.map_err(|e| malformed(&e.to_string()))
}

fn malformed(reason: &str) -> RepositoryError {
    RepositoryError::Index { reason: reason.to_owned() }
}

/// sled reports a held lock as an I/O error of its own making, with this text.
fn is_lock_held(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::WouldBlock || e.to_string().contains("could not acquire lock")
}

impl From<sled::Error> for RepositoryError {
    fn from(e: sled::Error) -> Self {
        RepositoryError::Index { reason: e.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        let pack = ObjectId::Pack(PackId::of(b"p"));
        let node = NodeHash::of(b"n");
        let plain = Entry { plain_bytes: 4096, stored_bytes: 70, place: None };
        let place = NodePlace { bundle: Hash::of(b"b"), offset_bytes: 1 << 40 };
        let placed = Entry { place: Some(place), ..plain };
        // Many times, because the lock of the one before may still be held.
        for round in 0..20 {
            let index = Index::open(&path).unwrap();
            if round > 0 {
                assert_eq!(index.get(&pack).unwrap(), Some(plain));
                assert_eq!(index.get(&ObjectId::Node(node)).unwrap(), Some(placed));
                assert_eq!(index.entries().count(), 2);
            }
            index.insert(&pack, &plain).unwrap();
            index.insert_nodes([(node, placed)]).unwrap();
        }
    }

    #[test]
    fn bytes_that_are_no_index_never_pass_for_a_complete_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("db"), vec![0x5a; 100_000]).unwrap();
        fs::write(path.join("conf"), b"nonsense").unwrap();
        // sled takes junk for an empty database.
        assert!(Index::open(&path).and_then(|i| i.is_complete()).is_ok_and(|complete| !complete));
    }
}
