//! Garbage collection: mark what roots reach, then remove what is unmarked and old enough.
//!
//! Roots are component and composition refs, pins, what the caller adds, and everything younger
//! than the grace period. A damaged object on the way stops the collection: what it leads to is
//! not known and must not be lost.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::Repository;
use super::error::{IoContext, ObjectId, ObjectKind, RepositoryError, Result};
use super::layout::walk_objects;
use super::nodes::{Found, RECORD_HEADER_BYTES, read_bundle};
use super::stats::{ByKind, Tally};
use crate::types::codec::CodecError;
use crate::types::{Hash, NodeHash};
use crate::vm::chunk_map::{NODE_MAGIC, Node};

/// Bundles below this size are merged when there are many of them.
const SMALL_BUNDLE_BYTES: u64 = 1 << 20;
const SMALL_BUNDLES_MAX: usize = 64;

/// What a collection found and did.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct GcReport {
    /// Nothing was removed: `removed` is what would be.
    pub dry_run: bool,
    pub kept: ByKind,
    pub removed: ByKind,
    /// Referred to and not here; no reason for alarm while a transfer fetches it.
    pub missing: Vec<ObjectId>,
}

/// What is reached, and the pins it was computed with.
struct Marks {
    live: HashSet<ObjectId>,
    missing: Vec<ObjectId>,
    generation: u64,
}

/// How one collection runs.
struct Plan<'a> {
    dry_run: bool,
    grace: Duration,
    extra_roots: &'a [ObjectId],
}

impl Repository {
    /// Removes what no root reaches and is older than `grace`. VM refs are opaque to the
    /// repository: pass their recipes and map roots as `extra_roots`.
    pub fn gc(&self, dry_run: bool, grace: Duration, extra_roots: &[ObjectId]) -> Result<GcReport> {
        self.flush_nodes()?;
        let plan = Plan { dry_run, grace, extra_roots };
        let mut marks = self.mark(&plan)?;
        let mut report = GcReport { dry_run, ..GcReport::default() };
        for kind in [ObjectKind::Recipe, ObjectKind::Manifest, ObjectKind::Pack] {
            walk_objects(self.layout(), kind, |hash, path, _| {
                self.sweep_file(&plan, &mut marks, kind.object(hash), path, &mut report)
            })?;
        }
        self.sweep_nodes(&plan, &mut marks, &mut report)?;
        if !dry_run {
            self.trim_deltas()?;
            self.trim_incoming(grace)?;
            self.manifest_cache().clear();
            self.index().flush()?;
        }
        marks.missing.sort();
        report.missing = marks.missing;
        Ok(report)
    }

    fn mark(&self, plan: &Plan<'_>) -> Result<Marks> {
        let mut reached = plan.extra_roots.to_vec();
        let generation = {
            let pins = self.inner.pins.lock();
            reached.extend(pins.objects());
            pins.generation
        };
        reached.extend(self.bound_components()?.into_iter().map(|(_, id)| ObjectId::Manifest(id)));
        reached.extend(self.composition_recipes()?.into_iter().map(ObjectId::Recipe));
        self.add_young(plan, &mut reached)?;
        let mut marks = Marks { live: HashSet::new(), missing: Vec::new(), generation };
        while let Some(object) = reached.pop() {
            if !marks.live.insert(object) {
                continue;
            }
            match self.referred_by(&object) {
                Ok(next) => reached.extend(next),
                Err(RepositoryError::Missing { .. }) => {
                    if let Some(path) = self.is_quarantined(&object) {
                        let reason = "what it refers to is unknown, so nothing was collected".into();
                        return Err(RepositoryError::Damaged { object, path, reason });
                    }
                    marks.missing.push(object);
                }
                Err(e) => return Err(e),
            }
        }
        Ok(marks)
    }

    /// Objects so new that whoever made them may not have referred to them yet.
    fn add_young(&self, plan: &Plan<'_>, reached: &mut Vec<ObjectId>) -> Result<()> {
        for kind in ObjectKind::ALL {
            walk_objects(self.layout(), kind, |hash, path, meta| {
                if !is_young(meta, plan.grace) {
                    return Ok(());
                }
                if kind == ObjectKind::Node {
                    let bundle = fs::read(path).at("read", path)?;
                    reached.extend(read_bundle(&bundle).0.iter().map(|n| ObjectId::Node(n.hash)));
                } else {
                    reached.push(kind.object(hash));
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// What an object leads to.
    fn referred_by(&self, object: &ObjectId) -> Result<Vec<ObjectId>> {
        Ok(match object {
            ObjectId::Recipe(id) => self.recipe(id)?.components.into_iter().map(ObjectId::Manifest).collect(),
            ObjectId::Manifest(id) => {
                let manifest = self.manifest(id)?;
                let required = manifest.requires.iter().map(|id| ObjectId::Manifest(*id));
                required.chain(manifest.packs.iter().map(|p| ObjectId::Pack(p.id))).collect()
            }
            ObjectId::Pack(_) => Vec::new(),
            ObjectId::Node(hash) => children(&self.node(hash)?)
                .map_err(|source| RepositoryError::Codec { what: object.to_string(), source })?
                .into_iter()
                .map(ObjectId::Node)
                .collect(),
        })
    }

    fn sweep_file(
        &self,
        plan: &Plan<'_>,
        marks: &mut Marks,
        object: ObjectId,
        path: &Path,
        report: &mut GcReport,
    ) -> Result<()> {
        let Ok(meta) = fs::metadata(path) else { return Ok(()) };
        let plain_bytes = self.index().get(&object)?.map_or(0, |e| e.plain_bytes);
        let tally = Tally { count: 1, plain_bytes, stored_bytes: meta.len() };
        let removed = self.remove_unless_live(plan, marks, &[object], path)?;
        if removed && !plan.dry_run {
            self.forget(&object);
            if let ObjectId::Pack(id) = object {
                self.remove_hot(&id);
                self.remove_block_digests(&id);
            }
        }
        let side = if removed { &mut report.removed } else { &mut report.kept };
        side.of_mut(object.kind()).add(tally);
        Ok(())
    }

    /// Removes a file none of whose `objects` is live, and tells so. A pin taken since the marking
    /// makes it mark again; age and pins are looked at under the lock that taking them needs.
    fn remove_unless_live(
        &self,
        plan: &Plan<'_>,
        marks: &mut Marks,
        objects: &[ObjectId],
        path: &Path,
    ) -> Result<bool> {
        loop {
            let pins = self.inner.pins.lock();
            if pins.generation == marks.generation {
                if objects.iter().any(|o| marks.live.contains(o)) {
                    return Ok(false);
                }
                // Renewed since the walk, or gone.
                match fs::metadata(path) {
                    Ok(meta) if !is_young(&meta, plan.grace) => {}
                    _ => return Ok(false),
                }
                if !plan.dry_run {
                    fs::remove_file(path).at("remove", path)?;
                }
                return Ok(true);
            }
            drop(pins);
            *marks = self.mark(plan)?;
        }
    }

    /// Bundles without a live node go; those that are mostly dead, or small and many, give their
    /// live nodes to a new bundle and go.
    fn sweep_nodes(&self, plan: &Plan<'_>, marks: &mut Marks, report: &mut GcReport) -> Result<()> {
        let mut small = 0;
        let mut bundles = Vec::new();
        walk_objects(self.layout(), ObjectKind::Node, |hash, path, meta| {
            small += usize::from(meta.len() < SMALL_BUNDLE_BYTES);
            bundles.push((Hash::from_bytes(hash), path.to_owned()));
            Ok(())
        })?;
        let mut given_up = Vec::new();
        for (name, path) in bundles {
            let Ok(bytes) = fs::read(&path) else { continue };
            let nodes = read_bundle(&bytes).0;
            let (mut live, mut dead) = (Vec::new(), Vec::new());
            for node in &nodes {
                // A node that was moved lies in two bundles until the old one goes.
                let is_live =
                    marks.live.contains(&ObjectId::Node(node.hash)) && self.is_in(&name, &node.hash)?;
                if is_live { live.push(node) } else { dead.push(node) }
            }
            live.iter().for_each(|n| report.kept.nodes.add(tally(n)));
            let mut dead_bytes = Tally::default();
            dead.iter().for_each(|n| dead_bytes.add(tally(n)));
            let live_bytes: u64 = live.iter().map(|n| tally(n).stored_bytes).sum();
            let merge = small > SMALL_BUNDLES_MAX && (bytes.len() as u64) < SMALL_BUNDLE_BYTES;
            let young = fs::metadata(&path).is_ok_and(|meta| is_young(&meta, plan.grace));
            if young || !(merge || dead_bytes.stored_bytes > live_bytes) {
                report.kept.nodes.add(dead_bytes);
                continue;
            }
            if !plan.dry_run {
                self.move_nodes(live.iter().map(|n| (n.hash, n.bytes)))?;
            }
            given_up.push(GivenUp {
                name,
                path,
                live: live.iter().map(|n| n.hash).collect(),
                dead: dead.iter().map(|n| ObjectId::Node(n.hash)).collect(),
                dead_bytes,
            });
        }
        // The moved nodes are durable in their new place before the old one goes.
        self.flush_nodes()?;
        for bundle in given_up {
            let gone = self.remove_bundle(plan, marks, &bundle)?;
            let side = if gone { &mut report.removed } else { &mut report.kept };
            side.nodes.add(bundle.dead_bytes);
        }
        Ok(())
    }

    fn remove_bundle(&self, plan: &Plan<'_>, marks: &mut Marks, bundle: &GivenUp) -> Result<bool> {
        // A new bundle of the same nodes has the same name, and is the old one.
        for hash in &bundle.live {
            if !plan.dry_run && self.is_in(&bundle.name, hash)? {
                return Ok(false);
            }
        }
        let gone = self.remove_unless_live(plan, marks, &bundle.dead, &bundle.path)?;
        if gone && !plan.dry_run {
            for object in &bundle.dead {
                if let ObjectId::Node(hash) = object
                    && self.is_in(&bundle.name, hash)?
                {
                    self.index().remove_if(object, || true)?;
                }
            }
        }
        Ok(gone)
    }

    /// Whether the index finds a node in this bundle.
    fn is_in(&self, bundle: &Hash, node: &NodeHash) -> Result<bool> {
        let place = self.index().get(&ObjectId::Node(*node))?.and_then(|e| e.place);
        Ok(place.is_some_and(|p| p.bundle == *bundle))
    }
}

/// A bundle to be removed once its live nodes lie elsewhere.
struct GivenUp {
    name: Hash,
    path: PathBuf,
    live: Vec<NodeHash>,
    dead: Vec<ObjectId>,
    dead_bytes: Tally,
}

fn is_young(meta: &fs::Metadata, grace: Duration) -> bool {
    let Ok(modified) = meta.modified() else { return true };
    // A time in the future has no age yet.
    SystemTime::now().duration_since(modified).unwrap_or_default() < grace
}

/// The nodes a node names; its level is in its own bytes.
fn children(bytes: &[u8]) -> Result<Vec<NodeHash>, CodecError> {
    let level = bytes.get(NODE_MAGIC.len()).copied().unwrap_or_default();
    Ok(match Node::decode(bytes, level)? {
        Node::Leaf(_) => Vec::new(),
        Node::Inner(children) => children.into_iter().map(|(_, hash)| hash).collect(),
    })
}

fn tally(node: &Found<'_>) -> Tally {
    let plain_bytes = node.bytes.len() as u64;
    Tally { count: 1, plain_bytes, stored_bytes: plain_bytes + RECORD_HEADER_BYTES as u64 }
}
