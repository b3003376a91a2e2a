//! Level 2: the content-addressed repository. Objects on disk are the truth, the index is derived.
//! What leaves the repository in plain form was verified against its hash. `FORMAT.md` beside this
//! file specifies every byte.
//!
//! All methods block on file I/O; async callers use a blocking thread.

mod archive;
mod block_places;
mod check;
mod components;
mod delta;
mod error;
mod export;
mod forms;
mod frame;
#[cfg(fuzzing)]
pub mod fuzzing;
mod gc;
mod hot;
mod import;
mod incoming;
mod index;
mod layout;
mod nodes;
mod optimize;
mod pack_reader;
mod pack_receiver;
mod pack_writer;
mod parallel;
mod pins;
mod plain;
mod queries;
mod rebuild;
mod records;
mod refs;
mod similar;
mod stats;

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::durable::PendingFile;

pub use archive::ArchiveError;
pub use block_places::{BlockPlace, BlockPlaces, IndexedPack, PLACES_MAX_DEFAULT, block_digest};
pub use check::{CheckReport, Damage, MissingObject};
pub use components::{ComponentSummary, MissingReport};
pub use error::{ObjectId, ObjectKind, RepositoryError};
pub use export::{ArchiveContent, Export, GoOn};
pub use forms::{FormTag, PackForm};
pub use frame::LEVEL as RECORD_LEVEL;
pub use gc::GcReport;
pub use hot::HOT_BYTES_DEFAULT;
pub use import::ImportReport;
pub use incoming::{IncomingForm, IncomingPack, PartialPack};
pub use optimize::Optimized;
pub use pack_reader::{Sink, StoredPack};
pub use pack_receiver::PackReceiver;
pub use pack_writer::PackWriter;
pub use pins::Pin;
pub use plain::PlainPack;
pub use refs::RefKind;
pub use stats::{ByKind, DirectoryUse, Lookups, RepositoryStats, Tally};

use error::{IoContext, Result};
use hot::HotCache;
use index::{Entry, Index};
use layout::{LastUse, Layout, Lock};
use nodes::PendingNodes;
use pins::Pins;
use records::ManifestCache;

/// A handle to an open repository; clones share it. The repository closes with the last one.
#[derive(Clone)]
pub struct Repository {
    inner: Arc<Inner>,
}

struct Inner {
    layout: Layout,
    index: Index,
    hot: HotCache,
    pins: Arc<Pins>,
    pending_nodes: Mutex<PendingNodes>,
    manifests: ManifestCache,
    lookups: Mutex<Lookups>,
    /// One delta is made at a time.
    diffing: Mutex<()>,
    /// Released last: whoever opens next finds everything closed.
    _lock: Lock,
}

impl Repository {
    /// Makes a repository in `dir`, which must be empty or absent, and opens it.
    pub fn create(dir: &Path) -> Result<Self> {
        let layout = Layout::new(dir);
        if layout.marker_exists() {
            let reason = "it is one already: open it instead of creating it".to_owned();
            return Err(RepositoryError::NotARepository { dir: dir.to_owned(), reason });
        }
        layout.create()?;
        Self::open(dir)
    }

    /// Opens a repository for this process alone. Removes leftovers of a process that died and
    /// makes the index good if it is missing, damaged or may be out of step.
    pub fn open(dir: &Path) -> Result<Self> {
        let layout = Layout::new(dir);
        layout.check_marker()?;
        let lock = layout.lock()?;
        layout.make_directories()?;
        layout.empty_dir("temporary")?;
        let last = layout.begin_use()?;
        if last == LastUse::Rebooted {
            layout.empty_dir("hot")?;
        }
        let index = rebuild::open_index(&layout, last)?;
        let lookups = Mutex::new(stats::read_lookups(&layout));
        Ok(Self {
            inner: Arc::new(Inner {
                layout,
                index,
                hot: HotCache::new(),
                pins: Arc::default(),
                pending_nodes: Mutex::default(),
                manifests: ManifestCache::default(),
                lookups,
                diffing: Mutex::default(),
                _lock: lock,
            }),
        })
    }

    /// Opens the repository in `dir`, making it first if there is none.
    pub fn open_or_create(dir: &Path) -> Result<Self> {
        if Layout::new(dir).marker_exists() { Self::open(dir) } else { Self::create(dir) }
    }

    /// The repository's directory.
    pub fn dir(&self) -> &Path {
        &self.layout().root
    }

    /// Where the composer keeps finished base images. The repository only counts them.
    pub fn compositions_dir(&self) -> &Path {
        &self.layout().compositions
    }

    /// For files on their way to a place in the repository; emptied whenever it is opened.
    pub fn temporary_dir(&self) -> &Path {
        &self.layout().temporary
    }

    /// Bytes that can still be written to the repository's file system.
    pub fn free_bytes(&self) -> Result<u64> {
        error::free_bytes(self.dir()).at("ask for free space in", self.dir())
    }

    /// Refuses when fewer than `need_bytes` are free.
    pub fn require_space(&self, need_bytes: u64) -> Result<()> {
        let have_bytes = self.free_bytes()?;
        if have_bytes < need_bytes {
            return Err(RepositoryError::NoSpace { need_bytes, have_bytes, dir: self.dir().to_owned() });
        }
        Ok(())
    }

    fn layout(&self) -> &Layout {
        &self.inner.layout
    }

    fn index(&self) -> &Index {
        &self.inner.index
    }

    fn hot(&self) -> &HotCache {
        &self.inner.hot
    }

    /// Gives a finished file its place, unless the object is held already; then only its age is
    /// renewed, so that the collector's grace period begins anew.
    fn store_file(&self, object: ObjectId, pending: PendingFile, entry: &Entry) -> Result<()> {
        let path = self.layout().object_path(&object);
        if self.renew(&object, &path)? {
            return Ok(());
        }
        self.layout().publish(pending, &path)?;
        self.index().insert(&object, entry)?;
        self.healed(&object)
    }

    /// Renews the age of an object that is held.
    fn renew(&self, object: &ObjectId, path: &Path) -> Result<bool> {
        // The collector looks at the age and removes under this lock.
        let _held = self.inner.pins.lock();
        if !self.has_file(object) {
            return Ok(false);
        }
        layout::touch(path).at("mark as used", path)?;
        Ok(true)
    }

    /// Whether an object's file is there: the index answers, the disk confirms.
    fn has_file(&self, object: &ObjectId) -> bool {
        let path = self.layout().object_path(object);
        match self.index().get(object) {
            Ok(None) => false,
            Ok(Some(_)) if path.exists() => true,
            Ok(Some(_)) => {
                self.forget(object);
                false
            }
            Err(error) => {
                tracing::warn!(%error, "asking the disk instead of the index");
                path.exists()
            }
        }
    }

    fn open_object(&self, object: &ObjectId) -> Result<File> {
        let path = self.layout().object_path(object);
        match File::open(&path) {
            Ok(file) => Ok(file),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.forget(object);
                Err(RepositoryError::Missing { object: *object })
            }
            Err(e) => Err(RepositoryError::io("open", &path, 0, e)),
        }
    }

    /// Sets a damaged object aside; returns the error that says so.
    fn damaged(&self, object: ObjectId, opened: &File, reason: String) -> RepositoryError {
        let error = self.layout().quarantine(object, opened, reason);
        if !self.layout().object_path(&object).exists() {
            self.forget(&object);
        }
        error
    }

    /// Takes an object that is no longer there out of the index.
    fn forget(&self, object: &ObjectId) {
        // Somebody may just have stored it again. A node has no file of its own.
        let is_node = object.kind() == ObjectKind::Node;
        let is_gone = || is_node || !self.layout().object_path(object).exists();
        if let Err(error) = self.index().remove_if(object, is_gone) {
            tracing::warn!(%error, %object, "a stale index entry stays");
        }
    }

    /// A good copy is in place: the damaged one is of no more use.
    fn healed(&self, object: &ObjectId) -> Result<()> {
        let path = self.layout().quarantine_path(object);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(RepositoryError::io("remove", &path, 0, e)),
            _ => Ok(()),
        }
    }

    fn is_quarantined(&self, object: &ObjectId) -> Option<PathBuf> {
        Some(self.layout().quarantine_path(object)).filter(|p| p.exists())
    }
}

impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Repository").field(&self.layout().root).finish()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let closed = || {
            nodes::flush(&self.layout, &self.index, &mut nodes::lock(&self.pending_nodes))?;
            rebuild::seal(&self.layout, &self.index)?;
            self.layout.end_use()
        };
        if let Err(error) = closed() {
            // The next open finds it unclean and makes the index good.
            tracing::warn!(%error, dir = %self.layout.root.display(), "the repository was not closed cleanly");
        }
    }
}

#[cfg(test)]
mod tests;
