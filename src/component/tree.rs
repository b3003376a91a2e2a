//! Uniting a set of components into one file tree, or naming the two that cannot share a disk.
//!
//! A component may change what it was built on: its entry wins over one of a component it
//! requires, directly or not. Directories several components bring are one directory, with the
//! metadata of the component lowest in that order. Anything else that two components claim
//! differently is a conflict, unless the recipe states an order: then the later one wins.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use crate::types::{ComponentId, Hash, PackId};

use super::fragment::{self, Conflict, Part};
use super::manifest::{Entry, EntryKind, Fragment, Kind, Manifest, Meta, parent_of, path_order, show};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    #[error("the set is empty")]
    Empty,
    #[error("component {component} is in the set twice")]
    Twice { component: String },
    #[error("component {component} was built on component {missing}, which is not in the set")]
    Requires { component: String, missing: String },
    #[error("components require each other in a circle: {components}")]
    Cycle { components: String },
    #[error("component {component} refuses to share a disk with {other}")]
    Refuses { component: String, other: String },
    #[error("component {component} is for {architecture}, the others are for {other}")]
    Architecture { component: String, architecture: String, other: String },
    #[error("components {left} and {right} both bring {path}, differently")]
    Path { left: String, right: String, path: String },
    #[error(transparent)]
    Fragment(#[from] Conflict),
    #[error("component {component} brings {path} below something that is no directory")]
    NoDirectory { component: String, path: String },
    #[error("{path} of component {component} is a hard link to a file that another component replaced")]
    HardLink { component: String, path: String },
    #[error("a disk that boots needs exactly one component of kind {kind}, the set has {count}")]
    NotBootable { kind: Kind, count: usize },
}

/// One path of the united tree.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
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

/// The whole tree, sorted by path, directories before what is in them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tree {
    pub nodes: Vec<Node>,
}

/// A path with the order of entries.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Path(Vec<u8>);

impl Ord for Path {
    fn cmp(&self, other: &Self) -> Ordering {
        path_order(&self.0, &other.0)
    }
}

impl PartialOrd for Path {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Whether the set can boot: one format, one kernel, one operating system.
pub fn check_bootable(components: &[(ComponentId, Arc<Manifest>)]) -> Result<(), TreeError> {
    for kind in [Kind::Format, Kind::Kernel, Kind::Os] {
        let count = components.iter().filter(|(_, m)| m.kind == kind).count();
        if count != 1 {
            return Err(TreeError::NotBootable { kind, count });
        }
    }
    Ok(())
}

/// Unites components into one tree. The order of the slice matters only if `ordered`.
pub fn unite(components: &[(ComponentId, Arc<Manifest>)], ordered: bool) -> Result<Tree, TreeError> {
    let order = Order::new(components)?;
    let name = |number: usize| components[number].1.name.clone();
    let mut tree: BTreeMap<Path, (usize, Node)> = BTreeMap::new();
    for &number in &order.sequence {
        for entry in &components[number].1.entries {
            place(&mut tree, number, entry, components, &order, ordered)?;
        }
    }
    merge_fragments(&mut tree, components, &order, ordered)?;
    for (Path(path), (number, node)) in &tree {
        let at = |p: &[u8]| tree.get(&Path(p.to_vec()));
        match parent_of(path).filter(|p| !p.is_empty()).map(at) {
            None | Some(Some((_, Node { kind: NodeKind::Directory, .. }))) => {}
            _ => return Err(TreeError::NoDirectory { component: name(*number), path: show(path) }),
        }
        if let NodeKind::HardLink { target } = &node.kind {
            match at(target) {
                Some((owner, Node { kind: NodeKind::File { .. } | NodeKind::Literal(_), .. }))
                    if owner == number => {}
                _ => return Err(TreeError::HardLink { component: name(*number), path: show(path) }),
            }
        }
    }
    Ok(Tree { nodes: tree.into_values().map(|(_, node)| node).collect() })
}

/// Who was built on whom.
struct Order {
    /// Component numbers, required ones first, otherwise in the order they were stated.
    sequence: Vec<usize>,
    /// All that each component requires, directly or not.
    below: Vec<HashSet<usize>>,
}

impl Order {
    fn new(components: &[(ComponentId, Arc<Manifest>)]) -> Result<Self, TreeError> {
        let first = &components.first().ok_or(TreeError::Empty)?.1;
        let mut numbers = HashMap::new();
        for (i, (id, m)) in components.iter().enumerate() {
            if numbers.insert(*id, i).is_some() {
                return Err(TreeError::Twice { component: m.name.clone() });
            }
            if m.architecture != first.architecture {
                return Err(TreeError::Architecture {
                    component: m.name.clone(),
                    architecture: m.architecture.clone(),
                    other: first.architecture.clone(),
                });
            }
            if let Some((_, other)) = components.iter().find(|(_, o)| m.conflicts.contains(&o.name)) {
                return Err(TreeError::Refuses { component: m.name.clone(), other: other.name.clone() });
            }
        }
        let mut direct = Vec::new();
        for (_, m) in components {
            let mut needs = Vec::new();
            for id in &m.requires {
                let missing = || TreeError::Requires { component: m.name.clone(), missing: id.short() };
                needs.push(*numbers.get(id).ok_or_else(missing)?);
            }
            direct.push(needs);
        }
        let mut below: Vec<HashSet<usize>> = vec![HashSet::new(); components.len()];
        let mut sequence: Vec<usize> = Vec::new();
        while sequence.len() < components.len() {
            let ready = (0..components.len())
                .find(|i| !sequence.contains(i) && direct[*i].iter().all(|d| sequence.contains(d)));
            let Some(next) = ready else {
                let stuck = (0..components.len()).filter(|i| !sequence.contains(i));
                let names: Vec<_> = stuck.map(|i| components[i].1.name.as_str()).collect();
                return Err(TreeError::Cycle { components: names.join(", ") });
            };
            for d in &direct[next] {
                let deeper: Vec<usize> = below[*d].iter().copied().collect();
                below[next].insert(*d);
                below[next].extend(deeper);
            }
            sequence.push(next);
        }
        Ok(Self { sequence, below })
    }

    fn overrides(&self, upper: usize, lower: usize) -> bool {
        self.below[upper].contains(&lower)
    }
}

fn place(
    tree: &mut BTreeMap<Path, (usize, Node)>,
    number: usize,
    entry: &Entry,
    components: &[(ComponentId, Arc<Manifest>)],
    order: &Order,
    ordered: bool,
) -> Result<(), TreeError> {
    let manifest = &components[number].1;
    let path = Path(entry.path.clone());
    let held = tree.get(&path);
    let Some(node) = node_of(manifest, entry) else {
        // A whiteout: takes away what the component was built on, with all below it.
        let gone: Vec<Path> = tree
            .range(path.clone()..)
            .take_while(|(p, _)| is_below(&p.0, &entry.path))
            .filter(|(_, (owner, _))| order.overrides(number, *owner) || ordered)
            .map(|(p, _)| p.clone())
            .collect();
        gone.iter().for_each(|p| drop(tree.remove(p)));
        return Ok(());
    };
    let conflict = |owner: usize| TreeError::Path {
        left: components[owner].1.name.clone(),
        right: manifest.name.clone(),
        path: show(&entry.path),
    };
    match held {
        None => {}
        Some((owner, old)) if same(old, &node, *owner == number) => return Ok(()),
        Some((owner, Node { kind: NodeKind::Directory, .. })) if node.kind == NodeKind::Directory => {
            // Only the time differs, or the lower component decides; two siblings must agree.
            let (owner, old) = (*owner, &tree[&path].1);
            let only_time =
                Meta { mtime_s: old.meta.mtime_s, ..node.meta } == old.meta && old.xattrs == node.xattrs;
            if only_time {
                return Ok(());
            }
            if !order.overrides(number, owner) && !ordered {
                return Err(conflict(owner));
            }
        }
        Some((owner, old)) => {
            let was_directory = old.kind == NodeKind::Directory;
            if was_directory || !(order.overrides(number, *owner) || ordered) {
                return Err(conflict(*owner));
            }
        }
    }
    tree.insert(path, (number, node));
    Ok(())
}

fn same(a: &Node, b: &Node, same_component: bool) -> bool {
    let content = match (&a.kind, &b.kind) {
        // The same content may lie in different packs.
        (NodeKind::File { hash: x, size_bytes: n, .. }, NodeKind::File { hash: y, size_bytes: m, .. }) => {
            x == y && n == m
        }
        (x, y) => x == y,
    };
    // Links stay within their component, so an equal entry of another is not the same inode.
    let linked = matches!(a.kind, NodeKind::HardLink { .. });
    content && a.meta == b.meta && a.xattrs == b.xattrs && (!linked || same_component)
}

/// `None` for a whiteout.
fn node_of(manifest: &Manifest, entry: &Entry) -> Option<Node> {
    let kind = match &entry.kind {
        EntryKind::Directory => NodeKind::Directory,
        EntryKind::File { size_bytes: 0, .. } => NodeKind::Literal(Vec::new()),
        EntryKind::File { size_bytes, hash, pack, offset_bytes } => NodeKind::File {
            // `Manifest::check` has seen that the pack exists and holds the range.
            pack: manifest.packs.get(*pack as usize)?.id,
            offset_bytes: *offset_bytes,
            size_bytes: *size_bytes,
            hash: *hash,
        },
        EntryKind::Symlink { target } => NodeKind::Symlink { target: target.clone() },
        EntryKind::HardLink { target } => NodeKind::HardLink { target: target.clone() },
        EntryKind::CharDevice { major, minor } => NodeKind::CharDevice { major: *major, minor: *minor },
        EntryKind::BlockDevice { major, minor } => NodeKind::BlockDevice { major: *major, minor: *minor },
        EntryKind::Fifo => NodeKind::Fifo,
        EntryKind::Socket => NodeKind::Socket,
        EntryKind::Whiteout => return None,
    };
    Some(Node { path: entry.path.clone(), meta: entry.meta, xattrs: entry.xattrs.clone(), kind })
}

fn is_below(path: &[u8], dir: &[u8]) -> bool {
    path.strip_prefix(dir).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

fn merge_fragments(
    tree: &mut BTreeMap<Path, (usize, Node)>,
    components: &[(ComponentId, Arc<Manifest>)],
    order: &Order,
    ordered: bool,
) -> Result<(), TreeError> {
    let mut files: BTreeMap<&[u8], Vec<(usize, &Fragment)>> = BTreeMap::new();
    for &number in &order.sequence {
        for fragment in &components[number].1.fragments {
            files.entry(&fragment.path).or_default().push((number, fragment));
        }
    }
    for (path, shares) in files {
        let name = |number: usize| components[number].1.name.as_str();
        let (owner, first) = shares[0];
        let clash = |left: usize, right: usize| TreeError::Path {
            left: name(left).into(),
            right: name(right).into(),
            path: show(path),
        };
        if let Some((other, _)) = tree.get(&Path(path.to_vec())) {
            return Err(clash(*other, owner));
        }
        if let Some((other, _)) = shares.iter().find(|(_, f)| f.rule != first.rule) {
            return Err(clash(owner, *other));
        }
        let parts: Vec<_> = shares
            .iter()
            .map(|(number, f)| Part { component: name(*number), number: *number, records: &f.records })
            .collect();
        let overrides = |upper, lower| order.overrides(upper, lower);
        let bytes = fragment::merge(first.rule, path, &parts, &overrides, ordered)?;
        let node = Node {
            path: path.to_vec(),
            meta: first.meta,
            xattrs: Vec::new(),
            kind: NodeKind::Literal(bytes),
        };
        tree.insert(Path(path.to_vec()), (owner, node));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::component::manifest::{FragmentRule, PackRef};

    fn meta(mode: u16) -> Meta {
        Meta { mode, uid: 0, gid: 0, mtime_s: 0 }
    }

    fn dir(path: &str) -> Entry {
        Entry { path: path.into(), meta: meta(0o755), xattrs: vec![], kind: EntryKind::Directory }
    }

    fn file(path: &str, content: &str) -> Entry {
        let kind =
            EntryKind::File { size_bytes: 4, hash: Hash::of(content.as_bytes()), pack: 0, offset_bytes: 0 };
        Entry { path: path.into(), meta: meta(0o644), xattrs: vec![], kind }
    }

    fn whiteout(path: &str) -> Entry {
        Entry { path: path.into(), meta: meta(0), xattrs: vec![], kind: EntryKind::Whiteout }
    }

    fn component(
        name: &str,
        requires: &[ComponentId],
        mut entries: Vec<Entry>,
    ) -> (ComponentId, Arc<Manifest>) {
        entries.sort_by(|a, b| path_order(&a.path, &b.path));
        let m = Manifest {
            name: name.into(),
            version: "1".into(),
            kind: Kind::Program,
            architecture: "amd64".into(),
            origin: String::new(),
            licences: vec![],
            requires: requires.to_vec(),
            conflicts: vec![],
            packs: vec![PackRef {
                id: PackId::of(name.as_bytes()),
                size_bytes: 4096,
                package: "p".into(),
                package_version: "1".into(),
            }],
            entries,
            fragments: vec![],
        };
        m.check().unwrap();
        (m.id(), Arc::new(m))
    }

    fn paths(tree: &Tree) -> Vec<String> {
        tree.nodes.iter().map(|n| String::from_utf8(n.path.clone()).unwrap()).collect()
    }

    #[test]
    fn a_program_changes_and_removes_what_it_was_built_on() {
        let os = component("os", &[], vec![dir("a"), dir("a/b"), file("a/b/c", "1"), file("a/x", "1")]);
        let redis = component("redis", &[os.0], vec![dir("a"), file("a/x", "2"), whiteout("a/b")]);
        let tree = unite(&[redis, os], false).unwrap();
        assert_eq!(paths(&tree), ["a", "a/x"]);
        assert!(matches!(&tree.nodes[1].kind, NodeKind::File { hash, .. } if *hash == Hash::of(b"2")));
    }

    #[test]
    fn siblings_that_disagree_are_named_unless_ordered() {
        let os = component("os", &[], vec![dir("a")]);
        let redis = component("redis", &[os.0], vec![dir("a"), file("a/x", "1")]);
        let nginx = component("nginx", &[os.0], vec![dir("a"), file("a/x", "2")]);
        let set = [os, redis, nginx];
        let error = unite(&set, false).unwrap_err();
        assert_eq!(error.to_string(), "components redis and nginx both bring /a/x, differently");
        let tree = unite(&set, true).unwrap();
        assert!(matches!(&tree.nodes[1].kind, NodeKind::File { hash, .. } if *hash == Hash::of(b"2")));
    }

    #[test]
    fn missing_and_refused_companions_are_named() {
        let os = component("os", &[], vec![]);
        let redis = component("redis", &[os.0], vec![]);
        assert!(matches!(unite(std::slice::from_ref(&redis), false), Err(TreeError::Requires { .. })));
        let mut m = (*component("nginx", &[], vec![]).1).clone();
        m.conflicts = vec!["redis".into()];
        let refused = unite(&[os.clone(), redis, (m.id(), Arc::new(m))], false);
        assert!(matches!(refused, Err(TreeError::Refuses { .. })));
        assert!(matches!(unite(&[os.clone(), os], false), Err(TreeError::Twice { .. })));
        assert_eq!(unite(&[], false), Err(TreeError::Empty));
    }

    #[test]
    fn a_file_where_another_has_a_directory_is_a_conflict() {
        let os = component("os", &[], vec![dir("a"), file("a/b", "1")]);
        let bad = component("bad", &[os.0], vec![file("a", "1")]);
        assert!(matches!(unite(&[os, bad], false), Err(TreeError::Path { .. })));
    }

    #[test]
    fn fragments_become_one_file() {
        let with = |name: &str, requires: &[ComponentId], line: &str| {
            let (_, m) = component(name, requires, vec![dir("etc")]);
            let mut m = (*m).clone();
            m.fragments = vec![Fragment {
                path: b"etc/passwd".to_vec(),
                rule: FragmentRule::Accounts,
                meta: meta(0o644),
                records: fragment::parse(FragmentRule::Accounts, line.as_bytes()).unwrap(),
            }];
            (m.id(), Arc::new(m))
        };
        let os = with("os", &[], "root:x:0:0:");
        let redis = with("redis", &[os.0], "redis:x:100:100:");
        let tree = unite(&[os, redis], false).unwrap();
        assert_eq!(tree.nodes[1].kind, NodeKind::Literal(b"root:x:0:0:\nredis:x:100:100:\n".to_vec()));
    }
}
