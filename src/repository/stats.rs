//! What the repository holds, what sharing saves, and how often it had what was asked for.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Repository;
use super::error::{IoContext, ObjectKind, RepositoryError, Result};
use super::layout::Layout;
use crate::types::codec::{CodecError, Reader, Writer};

/// Magic and version of the file of look-up counters.
const LOOKUPS_MAGIC: &[u8; 8] = b"CICLUP\0\x01";
const LOOKUPS_FILE: &str = "lookups";

/// A number of objects and their bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    pub count: u64,
    pub plain_bytes: u64,
    pub stored_bytes: u64,
}

impl Tally {
    pub(super) fn add(&mut self, other: Tally) {
        self.count += other.count;
        self.plain_bytes += other.plain_bytes;
        self.stored_bytes += other.stored_bytes;
    }
}

/// A tally for each kind of object.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ByKind {
    pub manifests: Tally,
    pub recipes: Tally,
    pub packs: Tally,
    pub nodes: Tally,
}

impl ByKind {
    pub fn of(&self, kind: ObjectKind) -> Tally {
        match kind {
            ObjectKind::Manifest => self.manifests,
            ObjectKind::Recipe => self.recipes,
            ObjectKind::Pack => self.packs,
            ObjectKind::Node => self.nodes,
        }
    }

    pub(super) fn of_mut(&mut self, kind: ObjectKind) -> &mut Tally {
        match kind {
            ObjectKind::Manifest => &mut self.manifests,
            ObjectKind::Recipe => &mut self.recipes,
            ObjectKind::Pack => &mut self.packs,
            ObjectKind::Node => &mut self.nodes,
        }
    }

    pub fn total(&self) -> Tally {
        let mut total = Tally::default();
        ObjectKind::ALL.iter().for_each(|kind| total.add(self.of(*kind)));
        total
    }
}

/// Files below a directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DirectoryUse {
    pub files: u64,
    /// Sum of file sizes; images are sparse, so this can exceed what they take.
    pub size_bytes: u64,
    pub allocated_bytes: u64,
}

/// Bytes asked for over the repository's life, by whether they were here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Lookups {
    pub count: u64,
    pub hit_bytes: u64,
    pub miss_bytes: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RepositoryStats {
    pub objects: ByKind,
    pub components: u64,
    /// Plain bytes of packs counted once for each component that uses them, less counted once.
    pub shared_bytes: u64,
    pub compositions: DirectoryUse,
    pub temporary: DirectoryUse,
    pub hot: DirectoryUse,
    pub quarantine: DirectoryUse,
    pub lookups: Lookups,
}

impl Repository {
    pub fn stats(&self) -> Result<RepositoryStats> {
        self.flush_nodes()?;
        let mut stats = RepositoryStats::default();
        for item in self.index().entries() {
            let (object, entry) = item?;
            let tally = Tally { count: 1, plain_bytes: entry.plain_bytes, stored_bytes: entry.stored_bytes };
            stats.objects.of_mut(object.kind()).add(tally);
        }
        let mut seen = HashSet::new();
        for item in self.index().summaries() {
            let (_, summary) = item?;
            stats.components += 1;
            for (pack, size_bytes) in summary.packs {
                if !seen.insert(pack) {
                    stats.shared_bytes = stats.shared_bytes.saturating_add(size_bytes);
                }
            }
        }
        stats.compositions = directory_use(self.compositions_dir())?;
        stats.temporary = directory_use(self.temporary_dir())?;
        stats.hot = directory_use(&self.layout().dir("hot"))?;
        stats.quarantine = directory_use(&self.layout().dir("quarantine"))?;
        stats.lookups = *self.inner.lookups.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok(stats)
    }

    /// Counts, durably, one question for content: how much of it was here and how much was not.
    pub fn record_lookup(&self, hit_bytes: u64, miss_bytes: u64) -> Result<()> {
        let mut lookups = self.inner.lookups.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let next = Lookups {
            count: lookups.count.saturating_add(1),
            hit_bytes: lookups.hit_bytes.saturating_add(hit_bytes),
            miss_bytes: lookups.miss_bytes.saturating_add(miss_bytes),
        };
        let mut w = Writer::with_magic(LOOKUPS_MAGIC);
        [next.count, next.hit_bytes, next.miss_bytes].into_iter().for_each(|n| w.u64(n));
        self.layout().write(&self.layout().dir(LOOKUPS_FILE), &w.into_bytes())?;
        *lookups = next;
        Ok(())
    }
}

/// The counters of earlier uses. They are only statistics: unreadable ones begin anew.
pub(super) fn read_lookups(layout: &Layout) -> Lookups {
    let path = layout.dir(LOOKUPS_FILE);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Lookups::default(),
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "look-up counters begin anew");
            return Lookups::default();
        }
    };
    decode_lookups(&bytes).unwrap_or_else(|error| {
        tracing::warn!(%error, path = %path.display(), "look-up counters begin anew");
        Lookups::default()
    })
}

fn decode_lookups(bytes: &[u8]) -> Result<Lookups, CodecError> {
    let mut r = Reader::with_magic(bytes, LOOKUPS_MAGIC, "file of look-up counters of version 1")?;
    let lookups = Lookups { count: r.u64("count")?, hit_bytes: r.u64("hits")?, miss_bytes: r.u64("misses")? };
    r.end()?;
    Ok(lookups)
}

fn directory_use(dir: &Path) -> Result<DirectoryUse> {
    let mut found = DirectoryUse::default();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            // Temporary directories come and go.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(RepositoryError::io("list", &dir, 0, e)),
        };
        for entry in entries {
            let entry = entry.at("list", &dir)?;
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                dirs.push(entry.path());
            } else {
                found.files += 1;
                found.size_bytes += meta.len();
                found.allocated_bytes += meta.blocks() * 512;
            }
        }
    }
    Ok(found)
}
