//! Making the index from the objects on disk.

use std::collections::HashSet;
use std::fs::{self, File};
use std::time::SystemTime;

use super::error::{IoContext, ObjectId, ObjectKind, RepositoryError, Result};
use super::index::Index;
use super::layout::{LastUse, Layout, list_fan, list_strays, walk_objects};
use super::{Repository, nodes, pack_reader, records};
use crate::types::Hash;

/// Room without which opening an index anew would only fail again.
const INDEX_ROOM_BYTES: u64 = 4 << 20;

impl Repository {
    /// Enters every object on disk anew and removes entries that have none. Returns the number of
    /// objects. Others may use the repository meanwhile.
    pub fn rebuild_index(&self) -> Result<u64> {
        self.flush_nodes()?;
        reconcile(self.layout(), self.index(), true)
    }
}

impl Repository {
    /// Opens an index anew that answers with an old failure of its storage, such as of a disk that was full,
    /// and makes it good from the objects on disk. False if there was nothing to mend.
    ///
    /// # Errors
    /// The storage still fails, or there is too little room; the index is as it was, to be tried again.
    pub fn heal_index(&self) -> Result<bool> {
        if !self.index().has_failed() {
            return Ok(false);
        }
        self.require_space(INDEX_ROOM_BYTES)?;
        match self.index().reopen(false).and_then(|()| self.index().is_complete()) {
            Ok(complete) => reconcile(self.layout(), self.index(), !complete)?,
            Err(RepositoryError::Index { reason }) => {
                tracing::warn!(reason, "the index is unusable and is made anew");
                self.index().reopen(true)?;
                reconcile(self.layout(), self.index(), true)?
            }
            Err(error) => return Err(error),
        };
        Ok(true)
    }

    /// Whether [`Repository::heal_index`] has something to mend.
    pub fn index_has_failed(&self) -> bool {
        self.index().has_failed()
    }
}

/// Opens the index; one that cannot be used is removed and made anew.
pub(super) fn open_index(layout: &Layout, last: LastUse) -> Result<Index> {
    let dir = layout.dir("index");
    match try_open(layout, last) {
        Err(RepositoryError::Index { reason }) => {
            tracing::warn!(reason, dir = %dir.display(), "the index is unusable and is made anew");
            Index::wipe(&dir).at("remove", &dir)?;
            try_open(layout, last)
        }
        other => other,
    }
}

fn try_open(layout: &Layout, last: LastUse) -> Result<Index> {
    let index = Index::open(&layout.dir("index"))?;
    let complete =
        index.is_complete()? && index.seal()?.is_some_and(|seal| layout.index_seal() == Some(seal));
    if !complete || last != LastUse::Clean {
        let objects = reconcile(layout, &index, !complete)?;
        tracing::info!(objects, dir = %layout.root.display(), "index made good from the objects on disk");
    }
    Ok(index)
}

/// Closes the index under a new seal.
pub(super) fn seal(layout: &Layout, index: &Index) -> Result<()> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seal = format!("{}-{}", now.as_nanos(), std::process::id()).into_bytes();
    index.set_seal(&seal)?;
    layout.remember_index_seal(&seal)
}

/// Makes the index say what the disk holds. Unless `anew`, entries that are there are believed and
/// their objects not opened. Never removes an entry whose object is there, so look-ups meanwhile
/// find what they found before. Returns the number of objects.
pub(super) fn reconcile(layout: &Layout, index: &Index, anew: bool) -> Result<u64> {
    let mut objects = 0;
    for kind in [ObjectKind::Manifest, ObjectKind::Recipe, ObjectKind::Pack] {
        // The index is in order of hashes, so a directory needs one pass over its part of it, and no
        // look-ups. New entries go in unordered: sorted ones would leave the tree's leaves half full.
        for fan in 0..=u8::MAX {
            let (mut held, strays) = list_fan(layout, kind, fan)?;
            for path in strays {
                tracing::warn!(path = %path.display(), "does not belong in a repository");
            }
            let known: Vec<[u8; 32]> = index.of_fan(kind, fan).collect::<Result<_>>()?;
            for hash in &held {
                let object = kind.object(*hash);
                let believed = !anew && known.binary_search(hash).is_ok() && has_summary(index, &object)?;
                objects += u64::from(believed || enter(layout, index, &object)?);
            }
            held.sort_unstable();
            for hash in known.iter().filter(|hash| held.binary_search(hash).is_err()) {
                let object = kind.object(*hash);
                index.remove_if(&object, || !layout.object_path(&object).exists())?;
            }
        }
        for path in list_strays(layout, kind)? {
            tracing::warn!(path = %path.display(), "does not belong in a repository");
        }
    }
    let bundles = enter_nodes(layout, index)?;
    for item in index.of_kind(ObjectKind::Node) {
        let (object, entry) = item?;
        let bundle = entry.place.map(|place| place.bundle);
        if bundle.is_some_and(|b| bundles.contains(&b) || nodes::bundle_path(layout, &b).exists()) {
            objects += 1;
        } else {
            index.remove_if(&object, || true)?;
        }
    }
    index.set_complete()?;
    Ok(objects)
}

/// Enters an object from its file; tells whether there is one that can be.
fn enter(layout: &Layout, index: &Index, object: &ObjectId) -> Result<bool> {
    // Gone since the directory was read.
    let Ok(mut file) = File::open(layout.object_path(object)) else { return Ok(false) };
    let left_out = |reason: String| {
        tracing::warn!(%object, reason, "left out of the index; a check sets it aside");
        Ok(false)
    };
    let manifest = match object {
        ObjectId::Manifest(id) => match records::load_manifest(&mut file, id) {
            Ok(manifest) => Some((id, manifest)),
            Err(reason) => return left_out(reason),
        },
        _ => None,
    };
    let Some(entry) = measure(object.kind(), &mut file) else {
        return left_out("its header is not one".into());
    };
    index.insert(object, &entry)?;
    if let Some((id, manifest)) = manifest {
        index.put_summary(id, &manifest)?;
    }
    Ok(true)
}

/// Enters the intact nodes of every bundle; returns the bundles.
fn enter_nodes(layout: &Layout, index: &Index) -> Result<HashSet<Hash>> {
    let mut bundles = HashSet::new();
    walk_objects(layout, ObjectKind::Node, |hash, path, _| {
        let Ok(bytes) = fs::read(path) else { return Ok(()) };
        let name = Hash::from_bytes(hash);
        let (found, ended_early) = nodes::read_bundle(&bytes);
        if let Some(reason) = ended_early {
            tracing::warn!(path = %path.display(), reason, "a node bundle is damaged");
        }
        let intact = found.into_iter().filter(|node| node.intact);
        index.insert_nodes(intact.map(|n| (n.hash, nodes::entry(name, n.offset, n.bytes.len()))))?;
        bundles.insert(name);
        Ok(())
    })?;
    Ok(bundles)
}

fn has_summary(index: &Index, object: &ObjectId) -> Result<bool> {
    match object {
        ObjectId::Manifest(id) => index.has_summary(id),
        _ => Ok(true),
    }
}

fn measure(kind: ObjectKind, file: &mut File) -> Option<super::Entry> {
    match kind {
        ObjectKind::Pack => pack_reader::measure(file),
        _ => records::measure(file),
    }
}
