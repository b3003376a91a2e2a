//! The set of components becomes one file tree. The rules, for each path:
//!
//! - A component's claim stands aside for that of a component which requires it, directly or through
//!   others: a program may replace what its operating system brings.
//! - If the claims that remain are equal (content, owner, mode, attributes; of differing times the
//!   latest is taken) they are one. If they differ it is a conflict that names both components,
//!   unless the recipe states that order settles conflicts: then the component named last wins.
//! - Directories follow the same rules, so shared ones need equal owners and modes, and what is in
//!   them unites.
//! - A whiteout, or anything but a directory, takes away what the required components have at and
//!   below its path.
//! - Hard links hold within a component. Where the file one leads to was replaced, the link keeps its
//!   own component's content.
//! - Fragments merge as [`super::fragment`] says.
//!
//! The order of components matters only where a recipe says so.

use std::cmp::Ordering;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::fragment::{self, MergeError, Part};
use super::manifest::{Meta, parent_of, path_order, show};
use super::{Entry, EntryKind, Fragment, Kind, Manifest};
use crate::types::{ComponentId, Hash, PackId};

/// Components whose architecture is this go with every other.
const ARCHITECTURE_ALL: &str = "all";

/// Why a set of components makes no tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    #[error("{component} is named twice")]
    Repeated { component: String },
    #[error("{component} was built on components that are not in the set: {}", list(missing))]
    MissingRequired { component: String, missing: Vec<ComponentId> },
    #[error("{component} refuses to share a disk with {refused}")]
    Refused { component: String, refused: String },
    #[error("{first} is for {first_architecture}, but {second} is for {second_architecture}")]
    Architecture { first: String, first_architecture: String, second: String, second_architecture: String },
    #[error("a disk that starts needs exactly one {kind} component, not {}", count(found))]
    NotBootable { kind: Kind, found: Vec<String> },
    #[error(
        "{first} and {second} both bring {path}, with different {difference}: leave one out, or let the \
         recipe's order decide"
    )]
    Path { path: String, first: String, second: String, difference: &'static str },
    #[error("{path} of {component} lies below {parent}, which {owner} brings as no directory")]
    BelowNoDirectory { path: String, component: String, parent: String, owner: String },
    #[error("{whole} brings {path} as a whole file, but {part} shares it with others as a fragment")]
    WholeAndFragment { path: String, whole: String, part: String },
    #[error("{first} and {second} merge {path} by different rules")]
    Rules { path: String, first: String, second: String },
    #[error(transparent)]
    Merge(#[from] MergeError),
}

/// A component of the set and its verified manifest.
pub type Member = (ComponentId, Arc<Manifest>);

/// What a disk's root holds. Sorted by path, each directory before what is in it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tree {
    pub nodes: Vec<Node>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// As in a manifest; the root's is empty.
    pub path: Vec<u8>,
    pub meta: Meta,
    pub xattrs: Vec<(String, Vec<u8>)>,
    pub kind: NodeKind,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NodeKind {
    Directory,
    /// Content of a pack; never empty.
    File {
        pack: PackId,
        offset_bytes: u64,
        size_bytes: u64,
        hash: Hash,
    },
    /// Content that is here: merged fragments, and empty files.
    Literal(Vec<u8>),
    Symlink {
        target: Vec<u8>,
    },
    /// Another name of the file at `target`, which precedes or follows.
    HardLink {
        target: Vec<u8>,
    },
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
    Socket,
}

impl Tree {
    pub fn find(&self, path: &[u8]) -> Option<&Node> {
        let found = self.nodes.binary_search_by(|n| path_order(&n.path, path));
        found.ok().map(|i| &self.nodes[i])
    }
}

/// Unites components into one tree. Checks what holds for every set; whether a disk could start from
/// it says [`check_bootable`].
pub fn unite(components: &[Member], ordered: bool) -> Result<Tree, TreeError> {
    let set = Set::new(components, ordered)?;
    let mut claims = set.claims();
    // Stable: claims to one path stay in the order of the set.
    claims.sort_by(|a, b| path_order(a.path(), b.path()));
    let mut builder = Builder { set: &set, nodes: Vec::new(), shadows: Vec::new() };
    for group in claims.chunk_by(|a, b| a.path() == b.path()) {
        builder.add(group)?;
    }
    let owners: Vec<usize> = builder.nodes.iter().map(|(owner, _)| *owner).collect();
    let mut tree = Tree { nodes: builder.nodes.into_iter().map(|(_, node)| node).collect() };
    set.relink(&mut tree, &owners);
    Ok(tree)
}

/// A disk that starts has exactly one format, one kernel and one operating system.
pub fn check_bootable(components: &[Member]) -> Result<(), TreeError> {
    for kind in [Kind::Format, Kind::Kernel, Kind::Os] {
        let found: Vec<String> =
            components.iter().filter(|(_, m)| m.kind == kind).map(|(_, m)| label(m)).collect();
        if found.len() != 1 {
            return Err(TreeError::NotBootable { kind, found });
        }
    }
    Ok(())
}

/// How a component is called in messages.
pub fn label(manifest: &Manifest) -> String {
    format!("{}@{}", manifest.name, manifest.version)
}

/// The checked set and who requires whom.
struct Set<'a> {
    members: &'a [Member],
    ordered: bool,
    /// For each component the places of all it requires, directly or through others.
    requires: Vec<BTreeSet<usize>>,
}

impl<'a> Set<'a> {
    fn new(members: &'a [Member], ordered: bool) -> Result<Self, TreeError> {
        let mut places = HashMap::new();
        for (i, (id, manifest)) in members.iter().enumerate() {
            if places.insert(*id, i).is_some() {
                return Err(TreeError::Repeated { component: label(manifest) });
            }
        }
        check_required(members, &places)?;
        check_conflicts(members)?;
        check_architecture(members)?;
        let direct: Vec<Vec<usize>> = members
            .iter()
            .map(|(_, m)| m.requires.iter().filter_map(|id| places.get(id).copied()).collect())
            .collect();
        let requires = (0..members.len()).map(|i| reachable(i, &direct)).collect();
        Ok(Self { members, ordered, requires })
    }

    fn claims(&self) -> Vec<Claim<'a>> {
        let mut claims = Vec::new();
        for (component, (_, manifest)) in self.members.iter().enumerate() {
            claims.extend(manifest.entries.iter().map(|e| Claim { component, what: What::Entry(e) }));
            claims.extend(manifest.fragments.iter().map(|f| Claim { component, what: What::Fragment(f) }));
        }
        claims
    }

    fn manifest(&self, component: usize) -> &'a Manifest {
        &self.members[component].1
    }

    fn label(&self, component: usize) -> String {
        label(self.manifest(component))
    }

    fn requires(&self, a: usize, b: usize) -> bool {
        self.requires[a].contains(&b)
    }

    /// The file, link or device of the same component that a claim is a name of.
    fn file(&self, component: usize, entry: &'a Entry) -> &'a Entry {
        match &entry.kind {
            EntryKind::HardLink { target } => {
                let entries = &self.manifest(component).entries;
                entries.binary_search_by(|e| path_order(&e.path, target)).map_or(entry, |i| &entries[i])
            }
            _ => entry,
        }
    }

    /// Gives every group of hard links in the finished tree one name that is the file. A link leads to
    /// the path its component says, if that still is this very file; otherwise the first name
    /// that is left becomes the file.
    fn relink(&self, tree: &mut Tree, owners: &[usize]) {
        let mut renamed: HashMap<(usize, Vec<u8>), Vec<u8>> = HashMap::new();
        for (i, owner) in owners.iter().enumerate() {
            let NodeKind::HardLink { target } = &tree.nodes[i].kind else { continue };
            let Some(original) = self.entry(*owner, target) else { continue };
            let Some(content) = self.content(*owner, original) else { continue };
            let is_same = tree.find(target).is_some_and(|n| {
                is_same_content(&n.kind, &content)
                    && difference_of_meta(&n.meta, &original.meta).is_none()
                    && n.xattrs == original.xattrs
            });
            if is_same {
                continue;
            }
            let key = (*owner, target.clone());
            tree.nodes[i].kind = match renamed.get(&key) {
                Some(first) => NodeKind::HardLink { target: first.clone() },
                None => {
                    renamed.insert(key, tree.nodes[i].path.clone());
                    content
                }
            };
        }
    }

    /// What an entry becomes; `None` if it only removes. A checked manifest names no pack that it lacks.
    fn content(&self, component: usize, entry: &Entry) -> Option<NodeKind> {
        Some(match &entry.kind {
            EntryKind::Whiteout => return None,
            EntryKind::Directory => NodeKind::Directory,
            EntryKind::File { size_bytes: 0, .. } => NodeKind::Literal(Vec::new()),
            EntryKind::File { size_bytes, hash, pack, offset_bytes } => {
                let pack = self.manifest(component).packs.get(*pack as usize)?.id;
                NodeKind::File { pack, offset_bytes: *offset_bytes, size_bytes: *size_bytes, hash: *hash }
            }
            EntryKind::Symlink { target } => NodeKind::Symlink { target: target.clone() },
            EntryKind::HardLink { target } => NodeKind::HardLink { target: target.clone() },
            EntryKind::CharDevice { major, minor } => NodeKind::CharDevice { major: *major, minor: *minor },
            EntryKind::BlockDevice { major, minor } => NodeKind::BlockDevice { major: *major, minor: *minor },
            EntryKind::Fifo => NodeKind::Fifo,
            EntryKind::Socket => NodeKind::Socket,
        })
    }

    fn entry(&self, component: usize, path: &[u8]) -> Option<&'a Entry> {
        let entries = &self.manifest(component).entries;
        entries.binary_search_by(|e| path_order(&e.path, path)).ok().map(|i| &entries[i])
    }
}

fn check_required(members: &[Member], places: &HashMap<ComponentId, usize>) -> Result<(), TreeError> {
    for (_, manifest) in members {
        let missing: Vec<ComponentId> =
            manifest.requires.iter().filter(|id| !places.contains_key(id)).copied().collect();
        if !missing.is_empty() {
            return Err(TreeError::MissingRequired { component: label(manifest), missing });
        }
    }
    Ok(())
}

fn check_conflicts(members: &[Member]) -> Result<(), TreeError> {
    let mut by_name: HashMap<&str, Vec<&Member>> = HashMap::new();
    for member in members {
        by_name.entry(&member.1.name).or_default().push(member);
    }
    for (id, manifest) in members {
        let named = manifest.conflicts.iter().filter_map(|name| by_name.get(&name[..])).flatten();
        // Naming itself, a component refuses other versions of it.
        if let Some((_, other)) = named.into_iter().find(|(other, _)| other != id) {
            return Err(TreeError::Refused { component: label(manifest), refused: label(other) });
        }
    }
    Ok(())
}

fn check_architecture(members: &[Member]) -> Result<(), TreeError> {
    let mut bound = members.iter().map(|(_, m)| m).filter(|m| m.architecture != ARCHITECTURE_ALL);
    let Some(first) = bound.next() else { return Ok(()) };
    match bound.find(|m| m.architecture != first.architecture) {
        None => Ok(()),
        Some(second) => Err(TreeError::Architecture {
            first: label(first),
            first_architecture: first.architecture.clone(),
            second: label(second),
            second_architecture: second.architecture.clone(),
        }),
    }
}

fn reachable(from: usize, direct: &[Vec<usize>]) -> BTreeSet<usize> {
    let mut found = BTreeSet::new();
    let mut open = direct[from].clone();
    while let Some(next) = open.pop() {
        if found.insert(next) {
            open.extend(&direct[next]);
        }
    }
    found
}

/// That a component wants something at a path.
#[derive(Clone, Copy)]
struct Claim<'a> {
    component: usize,
    what: What<'a>,
}

#[derive(Clone, Copy)]
enum What<'a> {
    Entry(&'a Entry),
    Fragment(&'a Fragment),
}

impl<'a> Claim<'a> {
    fn path(&self) -> &'a [u8] {
        match self.what {
            What::Entry(e) => &e.path,
            What::Fragment(f) => &f.path,
        }
    }

    fn is_directory(&self) -> bool {
        matches!(self.what, What::Entry(Entry { kind: EntryKind::Directory, .. }))
    }

    fn is_entry(&self) -> bool {
        matches!(self.what, What::Entry(_))
    }
}

/// What is no directory at `path` hides what its component requires below it.
struct Shadow<'a> {
    path: &'a [u8],
    component: usize,
}

/// Resolves paths in order. Everything below a path follows it directly.
struct Builder<'s, 'a> {
    set: &'s Set<'a>,
    /// With the component whose claim stands.
    nodes: Vec<(usize, Node)>,
    shadows: Vec<Shadow<'a>>,
}

impl<'a> Builder<'_, 'a> {
    fn add(&mut self, group: &[Claim<'a>]) -> Result<(), TreeError> {
        let path = group[0].path();
        self.shadows.retain(|s| is_below(path, s.path));
        let visible: Vec<Claim<'a>> = group
            .iter()
            .filter(|c| !self.shadows.iter().any(|s| self.set.requires(s.component, c.component)))
            .copied()
            .collect();
        let standing = self.standing(&visible);
        // What order overrules hides nothing.
        let last = standing.last().map(|c| c.component);
        let is_overruled = |c: &Claim| {
            self.set.ordered
                && Some(c.component) != last
                && standing.iter().any(|s| s.component == c.component)
        };
        let shadows: Vec<Shadow<'a>> = visible
            .iter()
            .filter(|c| !c.is_directory() && !is_overruled(c))
            .map(|c| Shadow { path, component: c.component })
            .collect();
        self.shadows.extend(shadows);
        let Some((owner, node)) = self.resolve(&visible, &standing)? else { return Ok(()) };
        if self.is_placeable(owner, path)? {
            self.nodes.push((owner, node));
        }
        Ok(())
    }

    /// The claims of components that no other claimant requires.
    fn standing(&self, claims: &[Claim<'a>]) -> Vec<Claim<'a>> {
        claims
            .iter()
            .filter(|c| !claims.iter().any(|o| self.set.requires(o.component, c.component)))
            .copied()
            .collect()
    }

    /// The node that the claims to one path make, `None` for a whiteout or no claim.
    fn resolve(
        &self,
        claims: &[Claim<'a>],
        standing: &[Claim<'a>],
    ) -> Result<Option<(usize, Node)>, TreeError> {
        let Some(first) = standing.first() else { return Ok(None) };
        if standing.iter().all(Claim::is_entry) {
            return self.resolve_entries(standing);
        }
        if let Some(whole) = claims.iter().find(|c| c.is_entry()) {
            let part = claims.iter().find(|c| !c.is_entry()).unwrap_or(whole);
            return Err(TreeError::WholeAndFragment {
                path: show(first.path()),
                whole: self.set.label(whole.component),
                part: self.set.label(part.component),
            });
        }
        self.merge_fragments(claims, standing).map(Some)
    }

    fn resolve_entries(&self, standing: &[Claim<'a>]) -> Result<Option<(usize, Node)>, TreeError> {
        let entries: Vec<(usize, &Entry)> = standing
            .iter()
            .filter_map(|c| match c.what {
                What::Entry(e) => Some((c.component, e)),
                What::Fragment(_) => None,
            })
            .collect();
        let differences = |a: &(usize, &'a Entry), b: &(usize, &'a Entry)| {
            difference(self.set.file(a.0, a.1), self.set.file(b.0, b.1))
        };
        let (owner, entry) = self.choose(&entries, differences)?;
        let file = self.set.file(owner, entry);
        let equal = entries.iter().filter(|(c, e)| differences(&(owner, entry), &(*c, e)).is_none());
        let mtime_s = equal.map(|(c, e)| self.set.file(*c, e).meta.mtime_s).max();
        let meta = Meta { mtime_s: mtime_s.unwrap_or(file.meta.mtime_s), ..file.meta };
        let Some(kind) = self.set.content(owner, entry) else { return Ok(None) };
        let node = Node { path: entry.path.clone(), meta, xattrs: file.xattrs.clone(), kind };
        Ok(Some((owner, node)))
    }

    fn merge_fragments(
        &self,
        claims: &[Claim<'a>],
        standing: &[Claim<'a>],
    ) -> Result<(usize, Node), TreeError> {
        let fragments = |claims: &[Claim<'a>]| -> Vec<(usize, &'a Fragment)> {
            claims
                .iter()
                .filter_map(|c| match c.what {
                    What::Fragment(f) => Some((c.component, f)),
                    What::Entry(_) => None,
                })
                .collect()
        };
        let all = fragments(claims);
        let standing = fragments(standing);
        let (owner, fragment) = self.choose(&standing, |a, b| difference_of_meta(&a.1.meta, &b.1.meta))?;
        if let Some((other, _)) = all.iter().find(|(_, f)| f.rule != fragment.rule) {
            return Err(TreeError::Rules {
                path: show(&fragment.path),
                first: self.set.label(owner),
                second: self.set.label(*other),
            });
        }
        let labels: Vec<String> = all.iter().map(|(c, _)| self.set.label(*c)).collect();
        let parts: Vec<Part<'_>> = all
            .iter()
            .zip(&labels)
            .map(|((number, f), component)| Part { component, number: *number, records: &f.records })
            .collect();
        let overrides = |a, b| self.set.requires(a, b);
        let bytes = fragment::merge(fragment.rule, &fragment.path, &parts, &overrides, self.set.ordered)?;
        let mtime_s = all.iter().map(|(_, f)| f.meta.mtime_s).max();
        let meta = Meta { mtime_s: mtime_s.unwrap_or(fragment.meta.mtime_s), ..fragment.meta };
        let path = fragment.path.clone();
        Ok((owner, Node { path, meta, xattrs: Vec::new(), kind: NodeKind::Literal(bytes) }))
    }

    /// The first of equal claims, or the last one where order decides.
    fn choose<T: Copy + ClaimPath>(
        &self,
        claims: &[(usize, T)],
        differ: impl Fn(&(usize, T), &(usize, T)) -> Option<&'static str>,
    ) -> Result<(usize, T), TreeError> {
        let first = claims[0];
        let conflict = claims[1..].iter().find_map(|c| Some((c.0, differ(&first, c)?)));
        match conflict {
            None => Ok(first),
            Some(_) if self.set.ordered => Ok(claims[claims.len() - 1]),
            Some((second, difference)) => Err(TreeError::Path {
                path: show(first.1.path()),
                first: self.set.label(first.0),
                second: self.set.label(second),
                difference,
            }),
        }
    }

    /// Whether the parent is a directory of the tree. Where it is not, order has settled it, or it is
    /// a conflict.
    fn is_placeable(&self, owner: usize, path: &[u8]) -> Result<bool, TreeError> {
        let Some(parent) = parent_of(path).filter(|p| !p.is_empty()) else { return Ok(true) };
        let found = self.nodes.binary_search_by(|(_, n)| path_order(&n.path, parent)).ok();
        let holder = found.map(|i| &self.nodes[i]);
        match holder {
            Some((_, Node { kind: NodeKind::Directory, .. })) => Ok(true),
            _ if self.set.ordered => Ok(false),
            _ => {
                let remover = self.shadows.iter().find(|s| s.path == parent).map(|s| s.component);
                let by = holder.map(|(c, _)| *c).or(remover).unwrap_or(owner);
                Err(TreeError::BelowNoDirectory {
                    path: show(path),
                    component: self.set.label(owner),
                    parent: show(parent),
                    owner: self.set.label(by),
                })
            }
        }
    }
}

trait ClaimPath {
    fn path(&self) -> &[u8];
}

impl ClaimPath for &Entry {
    fn path(&self) -> &[u8] {
        &self.path
    }
}

impl ClaimPath for &Fragment {
    fn path(&self) -> &[u8] {
        &self.path
    }
}

/// In what two entries differ, times aside. Where content lies in a pack is no difference.
fn difference(a: &Entry, b: &Entry) -> Option<&'static str> {
    use EntryKind::*;
    let content = match (&a.kind, &b.kind) {
        (File { size_bytes, hash, .. }, File { size_bytes: other_size, hash: other_hash, .. }) => {
            ((size_bytes, hash) != (other_size, other_hash)).then_some("content")
        }
        (Whiteout, Whiteout) => return None,
        (Symlink { target }, Symlink { target: other }) => (target != other).then_some("target"),
        (a, b) if std::mem::discriminant(a) != std::mem::discriminant(b) => Some("kind"),
        (a, b) => (a != b).then_some("device numbers"),
    };
    content
        .or_else(|| difference_of_meta(&a.meta, &b.meta))
        .or_else(|| (a.xattrs != b.xattrs).then_some("extended attributes"))
}

fn difference_of_meta(a: &Meta, b: &Meta) -> Option<&'static str> {
    if (a.uid, a.gid) != (b.uid, b.gid) {
        return Some("owner");
    }
    (a.mode != b.mode).then_some("mode")
}

/// Wherever it lies.
fn is_same_content(a: &NodeKind, b: &NodeKind) -> bool {
    match (a, b) {
        (
            NodeKind::File { hash, size_bytes, .. },
            NodeKind::File { hash: other, size_bytes: other_size, .. },
        ) => (hash, size_bytes) == (other, other_size),
        (NodeKind::Directory | NodeKind::HardLink { .. }, _) => false,
        (a, b) => a == b,
    }
}

fn is_below(path: &[u8], directory: &[u8]) -> bool {
    match path.len().cmp(&directory.len()) {
        Ordering::Greater if directory.is_empty() => true,
        Ordering::Greater => path.starts_with(directory) && path[directory.len()] == b'/',
        _ => false,
    }
}

fn list(ids: &[ComponentId]) -> String {
    ids.iter().map(ComponentId::short).collect::<Vec<_>>().join(", ")
}

fn count(found: &[String]) -> String {
    if found.is_empty() { "none".to_owned() } else { found.join(" and ") }
}

#[cfg(test)]
mod tests;
