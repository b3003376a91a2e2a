//! From a scanned tree to a stored component: what must not enter is withheld, what the OS already
//! has is left out, aggregated files become fragments, the rest is packed, one pack a package.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::Read;

use crate::component::definition::matches;
use crate::component::manifest::{
    Entry, EntryKind, Kind, Manifest, Meta, PackRef, limit, parent_of, path_order, show,
};
use crate::component::recipe::EPOCH_S;
use crate::repository::Repository;
use crate::sparse::{self, Content, SparseFile};
use crate::types::{ComponentId, Hash, PackId};

use super::error::BuildError;
use super::fragments;
use super::owner::Owners;
use super::scan::{self, Node, NodeKind, Tree, TreePath};
use super::withhold;

/// Who a component is.
#[derive(Clone, Debug)]
pub struct Identity {
    pub name: String,
    pub version: String,
    pub kind: Kind,
    pub architecture: String,
    pub origin: String,
    pub licences: Vec<String>,
    pub requires: Vec<ComponentId>,
    pub conflicts: Vec<String>,
}

/// Where the content of a scanned tree's files is read.
pub trait Contents {
    fn open(&self, path: &[u8]) -> Result<Box<dyn Content + '_>, BuildError>;
}

impl Contents for super::scan::Root {
    fn open(&self, path: &[u8]) -> Result<Box<dyn Content + '_>, BuildError> {
        Ok(Box::new(SparseFile::new(self.file(path)?)))
    }
}

/// What to do with secrets that are found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Secrets {
    /// Package scripts make host keys and the like: leave them out and say so.
    LeaveOut,
    /// Somebody handed us a tree: refuse it.
    Refuse,
}

/// What to do with the times of files and directories.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Times {
    /// Those of building mean nothing.
    Normalise,
    Keep,
}

/// What a manifest must pass before anything is packed; its files have no places yet.
pub type Check<'a> = &'a dyn Fn(&Manifest) -> Result<(), BuildError>;

/// A tree on its way to becoming a component.
pub struct Layer<'a> {
    pub tree: Tree,
    pub contents: &'a dyn Contents,
    /// The component the tree was built on.
    pub base: Option<&'a Manifest>,
    pub owners: Owners,
    /// Patterns of the definition.
    pub exclude: &'a [String],
    pub secrets: Secrets,
    pub times: Times,
}

impl Layer<'_> {
    /// Packs and stores the component. `left_out` is told every secret that stayed outside, and of a
    /// tree that somebody handed us everything else too. `check` sees the manifest before the work.
    /// The result is the same for the same tree, whenever and wherever it is built.
    pub fn store(
        mut self,
        repository: &Repository,
        identity: Identity,
        check: Check<'_>,
        left_out: &mut dyn FnMut(String, &str),
    ) -> Result<Manifest, BuildError> {
        self.withhold(left_out)?;
        if self.times == Times::Normalise {
            self.normalise();
        }
        let fragments = self.take_fragments()?;
        let changed = self.changed()?;
        let mut manifest = Manifest {
            name: identity.name,
            version: identity.version,
            kind: identity.kind,
            architecture: identity.architecture,
            origin: identity.origin,
            licences: sorted(identity.licences),
            requires: identity.requires,
            conflicts: sorted(identity.conflicts),
            packs: Vec::new(),
            entries: Vec::new(),
            fragments,
        };
        let mut draft = manifest.clone();
        draft.packs.push(PackRef {
            id: PackId::of(b""),
            size_bytes: limit::FILE_BYTES,
            package: DERIVED.into(),
            package_version: String::new(),
        });
        self.list(&changed, &mut BTreeMap::new(), &mut draft);
        check(&draft)?;
        drop(draft);
        self.pack(repository, &changed, &mut manifest)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Takes out what must not enter: excluded paths in silence, secrets by name, leftovers of building
    /// in silence too.
    fn withhold(&mut self, left_out: &mut dyn FnMut(String, &str)) -> Result<(), BuildError> {
        let mut drop = BTreeSet::new();
        let mut refused: Vec<(String, String)> = Vec::new();
        let mut empty_machine_id = false;
        for (path, node) in &self.tree {
            let kind = scan::inode_kind(&self.tree, node);
            if withhold::is_leftover(path, kind) || self.is_excluded(path) {
                if self.secrets == Secrets::Refuse {
                    left_out(show(&path.0), withhold::leftover(path, kind));
                }
                drop.insert(path.clone());
                continue;
            }
            if let Some(what) = withhold::secret(path, kind) {
                match self.secrets {
                    Secrets::Refuse => refused.push((show(&path.0), what.into())),
                    Secrets::LeaveOut if path.0 == withhold::MACHINE_ID => empty_machine_id = true,
                    Secrets::LeaveOut => {
                        left_out(show(&path.0), what);
                        drop.insert(path.clone());
                    }
                }
                continue;
            }
            if let NodeKind::File { size_bytes } = node.kind
                && withhold::is_searched(path, size_bytes)
                && self.owners.of(&path.0).is_none()
            {
                let content = self.read(&path.0, size_bytes)?;
                if let Some(what) = withhold::secret_content(path, &content) {
                    refused.push((show(&path.0), what));
                }
            }
        }
        if let Some((path, what)) = refused.first().cloned() {
            return Err(BuildError::Secret { path, what, further: refused.len() - 1 });
        }
        if empty_machine_id && let Some(node) = self.tree.get_mut(&TreePath(withhold::MACHINE_ID.to_vec())) {
            node.kind = NodeKind::File { size_bytes: 0 };
        }
        self.keep_links_whole(&mut drop);
        drop.iter().for_each(|p| {
            self.tree.remove(p);
        });
        // A directory that was left out takes along what was in it.
        let kept: HashSet<Vec<u8>> = self.tree.keys().map(|p| p.0.clone()).collect();
        self.tree.retain(|p, _| ancestors(&p.0).all(|a| a.is_empty() || kept.contains(a)));
        Ok(())
    }

    /// When the first name of an inode with several is withheld, the next becomes the file.
    fn keep_links_whole(&mut self, drop: &mut BTreeSet<TreePath>) {
        let mut heir_of: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        let links: Vec<(TreePath, Vec<u8>)> = self
            .tree
            .iter()
            .filter_map(|(p, n)| match &n.kind {
                NodeKind::HardLink { target } if !drop.contains(p) => Some((p.clone(), target.clone())),
                _ => None,
            })
            .collect();
        for (path, target) in links {
            if !drop.contains(&TreePath(target.clone())) {
                continue;
            }
            let kind = match heir_of.get(&target) {
                Some(heir) => NodeKind::HardLink { target: heir.clone() },
                None => {
                    heir_of.insert(target.clone(), path.0.clone());
                    match self.tree.get(&TreePath(target)).map(|n| n.kind.clone()) {
                        Some(kind) => kind,
                        None => continue,
                    }
                }
            };
            if let Some(node) = self.tree.get_mut(&path) {
                node.kind = kind;
            }
        }
    }

    fn is_excluded(&self, path: &TreePath) -> bool {
        self.exclude.iter().any(|pattern| matches(pattern.as_bytes(), &path.0))
    }

    /// Times of building mean nothing and would make every build another component: nothing is
    /// younger than the fixed epoch, and directories, whose time is that of the last package put
    /// into them, all have it.
    fn normalise(&mut self) {
        for node in self.tree.values_mut() {
            node.meta.mtime_s = match node.kind {
                NodeKind::Directory { .. } | NodeKind::Whiteout => EPOCH_S,
                _ => node.meta.mtime_s.clamp(0, EPOCH_S),
            };
        }
    }

    fn take_fragments(&mut self) -> Result<Vec<crate::component::Fragment>, BuildError> {
        let mut found = Vec::new();
        for (path, node) in &self.tree {
            if let (Some(rule), NodeKind::File { size_bytes }) = (fragments::rule_of(&path.0), &node.kind) {
                found.push((path.clone(), rule, node.meta, *size_bytes));
            }
        }
        let mut out = Vec::new();
        for (path, rule, meta, size_bytes) in found {
            let content = self.read(&path.0, size_bytes)?;
            self.tree.remove(&path);
            if let Some(fragment) = fragments::share(path.0, rule, meta, &content, self.base)? {
                out.push(fragment);
            }
        }
        out.sort_by(|a, b| path_order(&a.path, &b.path));
        Ok(out)
    }

    /// The paths that differ from the base, and the directories they lie in.
    fn changed(&self) -> Result<BTreeSet<TreePath>, BuildError> {
        let mut changed = BTreeSet::new();
        let Some(base) = self.base else {
            let kept = self.tree.iter().filter(|(_, n)| n.kind != NodeKind::Whiteout);
            return Ok(kept.map(|(p, _)| p.clone()).collect());
        };
        for (path, node) in &self.tree {
            let before = find(base, &path.0);
            if self.differs(path, node, before)? {
                if let NodeKind::HardLink { target } = &node.kind {
                    changed.insert(TreePath(target.clone()));
                }
                changed.insert(path.clone());
            }
        }
        for path in changed.clone() {
            let above = ancestors(&path.0).filter(|a| !a.is_empty());
            changed.extend(above.map(|a| TreePath(a.to_vec())));
        }
        Ok(changed)
    }

    fn differs(&self, path: &TreePath, node: &Node, before: Option<&Entry>) -> Result<bool, BuildError> {
        let Some(before) = before else {
            // Nothing to remove where the base has nothing.
            return Ok(node.kind != NodeKind::Whiteout);
        };
        if let (NodeKind::HardLink { target }, EntryKind::HardLink { target: old }) =
            (&node.kind, &before.kind)
        {
            return Ok(target != old);
        }
        if node.meta != before.meta || node.xattrs != before.xattrs {
            return Ok(true);
        }
        Ok(match (&node.kind, &before.kind) {
            (NodeKind::File { size_bytes }, EntryKind::File { size_bytes: old, hash, .. }) => {
                size_bytes != old || (*size_bytes > 0 && self.hash(&path.0)? != *hash)
            }
            (kind, old) => entry_kind(kind).as_ref() != Some(old),
        })
    }

    /// Packs the changed files, one pack a package in the order of names, and fills the manifest.
    fn pack(
        &self,
        repository: &Repository,
        changed: &BTreeSet<TreePath>,
        manifest: &mut Manifest,
    ) -> Result<(), BuildError> {
        let mut by_package: BTreeMap<&str, Vec<(&TreePath, u64)>> = BTreeMap::new();
        for path in changed {
            if let Some(Node { kind: NodeKind::File { size_bytes: size @ 1.. }, .. }) = self.tree.get(path) {
                by_package.entry(self.owners.of(&path.0).unwrap_or(DERIVED)).or_default().push((path, *size));
            }
        }
        let mut places: BTreeMap<&TreePath, EntryKind> = BTreeMap::new();
        for (package, files) in by_package {
            let mut writer = repository.pack_writer()?;
            let number = manifest.packs.len() as u32;
            for (path, size_bytes) in files {
                let mut content = self.contents.open(&path.0)?;
                let (offset_bytes, hash) = writer.append(&mut content, size_bytes)?;
                places.insert(path, EntryKind::File { size_bytes, hash, pack: number, offset_bytes });
            }
            if let Some((id, size_bytes)) = writer.finish()? {
                manifest.packs.push(PackRef {
                    id,
                    size_bytes,
                    package: package.to_owned(),
                    package_version: self.owners.version_of(package).unwrap_or_default().to_owned(),
                });
            }
        }
        self.list(changed, &mut places, manifest);
        Ok(())
    }

    /// Fills the manifest with entries. Files that have no place are listed as they would be at the
    /// beginning of the first pack.
    fn list(
        &self,
        changed: &BTreeSet<TreePath>,
        places: &mut BTreeMap<&TreePath, EntryKind>,
        manifest: &mut Manifest,
    ) {
        for path in changed {
            let Some(node) = self.tree.get(path) else { continue };
            let size_bytes = if let NodeKind::File { size_bytes } = node.kind { size_bytes } else { 0 };
            let empty = EntryKind::File { size_bytes, hash: Hash::of(b""), pack: 0, offset_bytes: 0 };
            let kind = places.remove(path).or_else(|| entry_kind(&node.kind)).unwrap_or(empty);
            // A whiteout has nothing to own.
            let meta = match kind {
                EntryKind::Whiteout => Meta { mode: 0, uid: 0, gid: 0, mtime_s: 0 },
                EntryKind::HardLink { ref target } => {
                    self.tree.get(&TreePath(target.clone())).map_or(node.meta, |t| t.meta)
                }
                _ => node.meta,
            };
            manifest.entries.push(Entry { path: path.0.clone(), meta, xattrs: node.xattrs.clone(), kind });
        }
        self.push_removed_below_opaque(manifest);
    }

    /// A directory made anew over one of the base hides what the base has in it: say so by name.
    fn push_removed_below_opaque(&self, manifest: &mut Manifest) {
        let Some(base) = self.base else { return };
        let opaque: HashSet<&[u8]> = self
            .tree
            .iter()
            .filter(|(_, n)| n.kind == NodeKind::Directory { opaque: true })
            .map(|(p, _)| &p.0[..])
            .collect();
        if opaque.is_empty() {
            return;
        }
        for e in &base.entries {
            let hidden = ancestors(&e.path).any(|a| opaque.contains(a));
            // Below a whiteout nothing may be; it removes the whole subtree.
            let parent_stays =
                parent_of(&e.path).is_some_and(|p| self.tree.contains_key(&TreePath(p.to_vec())));
            if hidden && parent_stays && !self.tree.contains_key(&TreePath(e.path.clone())) {
                let meta = Meta { mode: 0, uid: 0, gid: 0, mtime_s: 0 };
                let entry = Entry { path: e.path.clone(), meta, xattrs: vec![], kind: EntryKind::Whiteout };
                manifest.entries.push(entry);
            }
        }
        manifest.entries.sort_by(|a, b| path_order(&a.path, &b.path));
    }

    fn read(&self, path: &[u8], size_bytes: u64) -> Result<Vec<u8>, BuildError> {
        let mut out = Vec::new();
        let mut reader = self.contents.open(path)?.take(size_bytes);
        reader.read_to_end(&mut out).map_err(BuildError::read(show(path)))?;
        Ok(out)
    }

    fn hash(&self, path: &[u8]) -> Result<Hash, BuildError> {
        let mut content = self.contents.open(path)?;
        sparse::hash_of(&mut content).map_err(BuildError::read(show(path)))
    }
}

/// The pack of what no package owns: what package scripts derived, and the definition's own files.
const DERIVED: &str = "derived";

fn entry_kind(kind: &NodeKind) -> Option<EntryKind> {
    Some(match kind {
        NodeKind::File { .. } => return None,
        NodeKind::Directory { .. } => EntryKind::Directory,
        NodeKind::HardLink { target } => EntryKind::HardLink { target: target.clone() },
        NodeKind::Symlink { target } => EntryKind::Symlink { target: target.clone() },
        NodeKind::CharDevice { major, minor } => EntryKind::CharDevice { major: *major, minor: *minor },
        NodeKind::BlockDevice { major, minor } => EntryKind::BlockDevice { major: *major, minor: *minor },
        NodeKind::Fifo => EntryKind::Fifo,
        NodeKind::Socket => EntryKind::Socket,
        NodeKind::Whiteout => EntryKind::Whiteout,
    })
}

fn find<'a>(manifest: &'a Manifest, path: &[u8]) -> Option<&'a Entry> {
    let found = manifest.entries.binary_search_by(|e| path_order(&e.path, path));
    found.ok().map(|i| &manifest.entries[i])
}

/// The directories above a path, the root last.
fn ancestors(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::successors(parent_of(path), |p| parent_of(p))
}

fn sorted(mut list: Vec<String>) -> Vec<String> {
    list.sort();
    list.dedup();
    list
}
