//! Making the index from the objects on disk.

use std::collections::HashSet;
use std::fs::{self, File};
use std::time::SystemTime;

use super::error::{IoContext, ObjectId, ObjectKind, RepositoryError, Result};
use super::index::Index;
use super::layout::{LastUse, Layout, walk_objects};
use super::{Repository, nodes, pack_reader, records};
use crate::types::Hash;

impl Repository {
    /// Enters every object on disk anew and removes entries that have none. Returns the number of
    /// objects. Others may use the repository meanwhile.
    pub fn rebuild_index(&self) -> Result<u64> {
        self.flush_nodes()?;
        reconcile(self.layout(), self.index(), true)
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
/// find what they found before.
pub(super) fn reconcile(layout: &Layout, index: &Index, anew: bool) -> Result<u64> {
    for kind in [ObjectKind::Manifest, ObjectKind::Recipe, ObjectKind::Pack] {
        let strays = walk_objects(layout, kind, |hash, path, _| {
            let object = kind.object(hash);
            if !anew && index.get(&object)?.is_some() && has_summary(index, &object)? {
                return Ok(());
            }
            // Gone since the directory was read.
            let Ok(mut file) = File::open(path) else { return Ok(()) };
            if let ObjectId::Manifest(id) = &object {
                match records::load_manifest(&mut file, id) {
                    Ok(manifest) => index.put_summary(id, &manifest)?,
                    Err(reason) => {
                        tracing::warn!(%object, reason, "left out of the index; a check sets it aside");
                        return Ok(());
                    }
                }
            }
            match measure(kind, &mut file) {
                Some(entry) => index.insert(&object, &entry),
                None => {
                    tracing::warn!(%object, "left out of the index; a check sets it aside");
                    Ok(())
                }
            }
        })?;
        for path in strays {
            tracing::warn!(path = %path.display(), "does not belong in a repository");
        }
    }
    let bundles = enter_nodes(layout, index)?;
    let mut objects = 0;
    for item in index.entries() {
        let (object, entry) = item?;
        let held = match entry.place {
            Some(place) => {
                bundles.contains(&place.bundle) || nodes::bundle_path(layout, &place.bundle).exists()
            }
            None => layout.object_path(&object).exists(),
        };
        if held {
            objects += 1;
        } else {
            index.remove(&object)?;
        }
    }
    index.set_complete()?;
    Ok(objects)
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
        ObjectId::Manifest(id) => Ok(index.summary(id)?.is_some()),
        _ => Ok(true),
    }
}

fn measure(kind: ObjectKind, file: &mut File) -> Option<super::Entry> {
    match kind {
        ObjectKind::Pack => pack_reader::measure(file),
        _ => records::measure(file),
    }
}
