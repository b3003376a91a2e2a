//! Plain ("hot") copies of packs, ready to be copied or reflinked from. A cache: made and verified
//! at first use, the least recently used removed when the limit is passed.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::fs::FlockOperation;

use super::error::{IoContext, RepositoryError, Result};
use super::{PlainPack, Repository};
use crate::durable::PendingFile;
use crate::sparse::{self, Run, SparseFile};
use crate::types::{Hash, PackId};

/// How much plain content is kept unless the operator says otherwise.
pub const HOT_BYTES_DEFAULT: u64 = 8 << 30;

#[derive(Debug)]
pub(super) struct HotCache {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    limit_bytes: u64,
    /// Counted at first use.
    used_bytes: Option<u64>,
}

struct HotFile {
    path: PathBuf,
    /// On the disk, holes not counted.
    taken_bytes: u64,
    used: SystemTime,
}

impl HotCache {
    pub fn new() -> Self {
        Self { state: Mutex::new(State { limit_bytes: HOT_BYTES_DEFAULT, used_bytes: None }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Repository {
    /// Sets how much plain content is kept and removes what is over.
    pub fn set_hot_limit(&self, limit_bytes: u64) -> Result<()> {
        let mut state = self.hot().state();
        state.limit_bytes = limit_bytes;
        self.trim_hot(&mut state, 0)
    }

    /// The pack's plain bytes as a file, verified when it was made. While the file is open it is
    /// not evicted.
    pub fn hot_pack(&self, id: &PackId) -> Result<File> {
        let path = self.hot_path(id);
        if let Some(file) = lease(&path)? {
            return Ok(file);
        }
        let size_bytes = self.pack_stored(id)?.plain_size_bytes;
        self.require_space(self.pack_data_bytes(id)?)?;
        let mut pending = self.layout().pending("hot")?;
        // Not synced: the cache is emptied when the machine went down without closing it.
        self.read_pack(id, &mut |offset, run| write(pending.file(), offset, run))?;
        pending.file().set_len(size_bytes).at("write", pending.temporary_path())?;
        self.keep_hot(pending, &path)?;
        lease(&path)?
            .ok_or_else(|| RepositoryError::io("open", &path, 0, io::Error::from(io::ErrorKind::NotFound)))
    }

    /// Gives a verified plain copy its name, unless another thread was faster.
    fn keep_hot(&self, pending: PendingFile, path: &Path) -> Result<()> {
        let taken_bytes = fs::metadata(pending.temporary_path()).map_or(0, |meta| taken_bytes(&meta));
        let mut state = self.hot().state();
        self.trim_hot(&mut state, taken_bytes)?;
        if path.exists() {
            return Ok(());
        }
        let dir = path.parent().unwrap_or(path);
        fs::create_dir_all(dir).at("create", dir)?;
        fs::rename(pending.temporary_path(), path).at("create", path)?;
        state.used_bytes = state.used_bytes.map(|used| used + taken_bytes);
        Ok(())
    }

    /// The pack's plain bytes, mapped.
    pub fn plain_pack(&self, id: &PackId) -> Result<PlainPack> {
        PlainPack::new(&self.hot_pack(id)?).at("map", &self.hot_path(id))
    }

    /// Takes the plain bytes of a pack that is just being received, so that they need not be
    /// unpacked again to be composed. `None` when there is no room to spare for them.
    pub(super) fn hot_writer(&self, size_bytes: u64) -> Option<HotWriter> {
        let spare = size_bytes <= self.hot().state().limit_bytes / 2
            && self.free_bytes().is_ok_and(|free| free / 4 > size_bytes);
        let pending = if spare { self.layout().pending("hot").ok()? } else { return None };
        Some(HotWriter { pending, size_bytes })
    }

    /// As [`Repository::hot_pack`], if that file was made before.
    pub fn held_hot_pack(&self, id: &PackId) -> Result<Option<File>> {
        lease(&self.hot_path(id))
    }

    /// Re-reads every hot file and removes those that are not their pack.
    pub(super) fn check_hot(&self) -> Result<u64> {
        let mut removed = 0;
        for hot in self.hot_files()? {
            let Ok(file) = File::open(&hot.path) else { continue };
            let found = sparse::hash_of(&mut SparseFile::new(file)).at("read", &hot.path)?;
            let name = hot.path.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse::<Hash>().ok());
            if name != Some(found) {
                fs::remove_file(&hot.path).at("remove", &hot.path)?;
                removed += 1;
            }
        }
        self.hot().state().used_bytes = None;
        Ok(removed)
    }

    pub(super) fn remove_hot(&self, id: &PackId) {
        // What stays is evicted in time.
        if fs::remove_file(self.hot_path(id)).is_ok() {
            self.hot().state().used_bytes = None;
        }
    }

    fn hot_path(&self, id: &PackId) -> PathBuf {
        let name = id.to_string();
        self.layout().dir("hot").join(&name[..2]).join(name)
    }

    /// Makes room for `coming_bytes`, least recently used first, leaving what is leased.
    fn trim_hot(&self, state: &mut State, coming_bytes: u64) -> Result<()> {
        if let Some(used) = state.used_bytes
            && used.saturating_add(coming_bytes) <= state.limit_bytes
        {
            return Ok(());
        }
        let mut files = self.hot_files()?;
        let mut used: u64 = files.iter().map(|f| f.taken_bytes).sum();
        files.sort_by_key(|f| f.used);
        for hot in files {
            if used.saturating_add(coming_bytes) <= state.limit_bytes {
                break;
            }
            let Ok(file) = File::open(&hot.path) else { continue };
            if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                fs::remove_file(&hot.path).at("remove", &hot.path)?;
                used -= hot.taken_bytes;
            }
        }
        state.used_bytes = Some(used);
        Ok(())
    }

    fn hot_files(&self) -> Result<Vec<HotFile>> {
        let dir = self.layout().dir("hot");
        let mut files = Vec::new();
        for fan in fs::read_dir(&dir).at("list", &dir)? {
            let fan = fan.at("list", &dir)?.path();
            for file in fs::read_dir(&fan).at("list", &fan)? {
                let path = file.at("list", &fan)?.path();
                if let Ok(meta) = fs::metadata(&path) {
                    let used = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                    files.push(HotFile { path, taken_bytes: taken_bytes(&meta), used });
                }
            }
        }
        Ok(files)
    }
}

/// A plain copy under way. It is a convenience: whatever goes wrong with it, the pack is fine.
pub(super) struct HotWriter {
    pending: PendingFile,
    size_bytes: u64,
}

impl HotWriter {
    /// Whether it could be written.
    pub fn write(&mut self, offset: u64, run: Run<'_>) -> bool {
        write(self.pending.file(), offset, run).is_ok()
    }

    /// The pack was verified, so its plain copy is good.
    pub fn keep(mut self, repository: &Repository, id: &PackId) {
        let kept = self.pending.file().set_len(self.size_bytes).at("write", &repository.hot_path(id));
        if let Err(error) = kept.and_then(|()| repository.keep_hot(self.pending, &repository.hot_path(id))) {
            tracing::debug!(pack = %id, %error, "no plain copy kept");
        }
    }
}

/// Holes stay holes; the file gets its length at the end.
fn write(file: &File, offset: u64, run: Run<'_>) -> io::Result<()> {
    match run {
        Run::Data(bytes) => sparse::write_at(file, bytes, offset),
        Run::Zeros(_) => Ok(()),
    }
}

fn taken_bytes(meta: &fs::Metadata) -> u64 {
    meta.blocks() * 512
}

/// Opens a hot file under a shared lock, which ends when the file is closed, and marks it as used.
fn lease(path: &Path) -> Result<Option<File>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(RepositoryError::io("open", path, 0, e)),
    };
    // Locked by the eviction: about to go.
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_err() {
        return Ok(None);
    }
    file.set_modified(SystemTime::now()).at("mark as used", path)?;
    Ok(Some(file))
}
