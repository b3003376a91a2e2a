//! Checking: every object is read again and held against its hash; what refers to nothing is named.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::error::{ObjectId, ObjectKind, RepositoryError, Result};
use super::layout::walk_objects;
use super::stats::ByKind;
use super::{Repository, nodes, rebuild};

/// One object whose bytes are not it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Damage {
    pub object: ObjectId,
    /// Where it was set aside.
    pub path: PathBuf,
    pub reason: String,
}

/// An object that something held here refers to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MissingObject {
    pub object: ObjectId,
    /// Components, recipes and refs, in words.
    pub needed_by: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct CheckReport {
    /// What was read and found good.
    pub good: ByKind,
    pub damaged: Vec<Damage>,
    /// Damaged objects, now set aside, are missing too. Chunk map nodes are not among them: only
    /// who knows the maps can tell, with [`Repository::nodes_missing`].
    pub missing: Vec<MissingObject>,
    /// Refs that cannot be read, in words.
    pub damaged_refs: Vec<String>,
    /// Files that do not belong where they are.
    pub strays: Vec<PathBuf>,
    /// Hot copies that were wrong and are gone.
    pub hot_removed: u64,
}

impl CheckReport {
    pub fn is_clean(&self) -> bool {
        self.damaged.is_empty() && self.missing.is_empty() && self.damaged_refs.is_empty()
    }
}

type Needs = BTreeMap<ObjectId, BTreeSet<String>>;

impl Repository {
    /// Reads and verifies every object. `progress` gets stored bytes done and in all.
    pub fn check(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<CheckReport> {
        self.flush_nodes()?;
        self.manifest_cache().clear();
        // An object the index lost is not missing.
        rebuild::reconcile(self.layout(), self.index(), false)?;
        let mut report = CheckReport::default();
        let mut total_bytes = 0;
        for kind in ObjectKind::ALL {
            report.strays.extend(walk_objects(self.layout(), kind, |_, _, meta| {
                total_bytes += meta.len();
                Ok(())
            })?);
        }
        let mut done_bytes = 0;
        progress(0, total_bytes);
        for kind in ObjectKind::ALL {
            walk_objects(self.layout(), kind, |hash, path, meta| {
                match kind {
                    ObjectKind::Node => self.check_bundle(path, &mut report)?,
                    _ => self.check_object(kind.object(hash), meta.len(), &mut report)?,
                }
                done_bytes += meta.len();
                progress(done_bytes, total_bytes);
                Ok(())
            })?;
        }
        report.hot_removed = self.check_hot()?;
        report.missing = self.find_missing(&mut report.damaged_refs)?;
        Ok(report)
    }

    fn check_object(&self, object: ObjectId, stored_bytes: u64, report: &mut CheckReport) -> Result<()> {
        let verified = match &object {
            ObjectId::Pack(id) => self.read_pack(id, &mut |_, _| Ok(())),
            ObjectId::Manifest(id) => self.manifest_bytes(id).map(drop),
            ObjectId::Recipe(id) => self.recipe_bytes(id).map(drop),
            ObjectId::Node(hash) => self.node(hash).map(drop),
        };
        match verified {
            Ok(()) => {
                let tally = report.good.of_mut(object.kind());
                tally.count += 1;
                tally.stored_bytes += stored_bytes;
                tally.plain_bytes += self.index().get(&object)?.map_or(0, |e| e.plain_bytes);
            }
            Err(RepositoryError::Damaged { object, path, reason }) => {
                report.damaged.push(Damage { object, path, reason });
            }
            // Collected since the directory was read.
            Err(RepositoryError::Missing { .. }) => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// Nodes are read where the index finds them, so only those of this bundle that it finds count.
    fn check_bundle(&self, path: &std::path::Path, report: &mut CheckReport) -> Result<()> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(RepositoryError::io("read", path, 0, e)),
        };
        let (found, ended_early) = nodes::read_bundle(&bytes);
        if ended_early.is_some() {
            report.strays.push(path.to_owned());
        }
        for node in found {
            let object = ObjectId::Node(node.hash);
            let entry = self.index().get(&object)?;
            let here = entry.and_then(|e| e.place).is_some_and(|p| p.offset_bytes == node.offset as u64);
            if here {
                self.check_object(object, entry.map_or(0, |e| e.stored_bytes), report)?;
            }
        }
        Ok(())
    }

    /// What held components, recipes and refs refer to and is not here, without reading content.
    pub fn missing_objects(&self) -> Result<Vec<MissingObject>> {
        self.find_missing(&mut Vec::new())
    }

    fn find_missing(&self, damaged_refs: &mut Vec<String>) -> Result<Vec<MissingObject>> {
        let mut needs = Needs::new();
        match self.bound_components() {
            Ok(bound) => {
                for (name, id) in bound {
                    need(&mut needs, ObjectId::Manifest(id), || format!("the name {name}"));
                }
            }
            Err(e) => damaged_refs.push(e.to_string()),
        }
        match self.composition_recipes() {
            Ok(recipes) => {
                for id in recipes {
                    need(&mut needs, ObjectId::Recipe(id), || format!("the composition {}", id.short()));
                }
            }
            Err(e) => damaged_refs.push(e.to_string()),
        }
        for item in self.index().summaries() {
            let (id, summary) = item?;
            if !self.has_manifest(&id) {
                continue;
            }
            let by = || format!("component {}@{} ({})", summary.name, summary.version, id.short());
            for required in &summary.requires {
                need(&mut needs, ObjectId::Manifest(*required), by);
            }
            for (pack, _) in &summary.packs {
                if !self.has_pack(pack) {
                    need(&mut needs, ObjectId::Pack(*pack), by);
                }
            }
        }
        walk_objects(self.layout(), ObjectKind::Recipe, |hash, _, _| {
            let ObjectId::Recipe(id) = ObjectKind::Recipe.object(hash) else { return Ok(()) };
            if let Ok(recipe) = self.recipe(&id) {
                for component in recipe.components {
                    need(&mut needs, ObjectId::Manifest(component), || format!("recipe {}", id.short()));
                }
            }
            Ok(())
        })?;
        let missing = needs.into_iter().filter(|(object, _)| !self.has_file(object));
        Ok(missing
            .map(|(object, by)| MissingObject { object, needed_by: by.into_iter().collect() })
            .collect())
    }
}

fn need(needs: &mut Needs, object: ObjectId, by: impl FnOnce() -> String) {
    needs.entry(object).or_default().insert(by());
}
