//! A tree from elsewhere laid onto the components it was made for, as a package manager unpacks: where
//! they have a link to a directory and the tree a directory, what is in it goes through the link; a
//! directory that they have stays theirs. What would take away a directory of theirs is refused.

use std::collections::HashMap;

use crate::component::manifest::{parent_of, show};
use crate::component::tree::{self as united, NodeKind as Base};
use crate::sparse::Content;

use super::error::BuildError;
use super::layer::Contents;
use super::scan::{self, NodeKind, Tree, TreePath};

/// As many as the kernel follows.
const LINKS_MAX: usize = 40;

/// Where entries whose paths moved lay in the source.
pub type Origins = HashMap<Vec<u8>, Vec<u8>>;

/// The tree as it lies on `base`, and where what moved lay in the source.
pub fn lay(tree: Tree, base: &united::Tree) -> Result<(Tree, Origins), BuildError> {
    let mut directories: HashMap<Vec<u8>, Vec<u8>> = HashMap::new();
    // In order, so each directory comes before what is in it.
    let mut places: HashMap<Vec<u8>, Vec<u8>> = HashMap::new();
    for (TreePath(path), node) in &tree {
        let there = match parent_of(path) {
            None => Vec::new(),
            Some(parent) => {
                let parent = directories.get(parent).map_or(parent, Vec::as_slice);
                let name = path.rsplit(|b| *b == b'/').next().unwrap_or(path);
                join(parent, name)
            }
        };
        let is_directory = matches!(node.kind, NodeKind::Directory { .. });
        let there = match base.find(&there).map(|n| &n.kind) {
            Some(Base::Symlink { .. }) if is_directory => follow(base, &there)?,
            Some(Base::Directory) if !is_directory && node.kind != NodeKind::Whiteout => {
                let reason = "is a directory in what the component requires, and all in it would be gone";
                return Err(BuildError::Replaces { path: show(path), reason: reason.into() });
            }
            // Another link to the same place is no harm; anything else would hide what is there.
            Some(Base::Symlink { .. }) if node.kind != NodeKind::Whiteout => {
                let theirs = follow(base, &there).ok();
                let mine = match scan::inode_kind(&tree, node) {
                    NodeKind::Symlink { target } => follow_target(base, &there, target).ok(),
                    _ => None,
                };
                if theirs.is_some() && mine != theirs {
                    let reason = "is a link to a directory in what the component requires, and would no longer \
                                  lead there";
                    return Err(BuildError::Replaces { path: show(path), reason: reason.into() });
                }
                there
            }
            None | Some(Base::Directory | Base::Symlink { .. }) => there,
            Some(_) if is_directory => {
                let reason = "is a directory, but a file in what the component requires";
                return Err(BuildError::Replaces { path: show(path), reason: reason.into() });
            }
            Some(_) => there,
        };
        if is_directory {
            directories.insert(path.clone(), there.clone());
        }
        if there != *path {
            places.insert(path.clone(), there);
        }
    }
    let moved = |path: &[u8]| places.get(path).cloned().unwrap_or_else(|| path.to_vec());
    let mut out = Tree::new();
    let mut origins = Origins::new();
    for (TreePath(path), mut node) in tree {
        let there = moved(&path);
        if let NodeKind::HardLink { target } = &mut node.kind {
            *target = moved(target);
        }
        if let NodeKind::Directory { opaque: false } = node.kind
            && let Some(theirs) = base.find(&there).filter(|n| n.kind == Base::Directory)
        {
            node.meta = theirs.meta;
            node.xattrs.clone_from(&theirs.xattrs);
        }
        let is_directory = matches!(node.kind, NodeKind::Directory { .. });
        match out.get(&TreePath(there.clone())) {
            // Two ways to one directory; whose owner it takes was settled above, or is the first's.
            Some(before) if is_directory && matches!(before.kind, NodeKind::Directory { .. }) => continue,
            Some(_) => {
                let reason = format!(
                    "and {} are one place by a link in what the component requires, and the source has both",
                    show(origins.get(&there).unwrap_or(&there))
                );
                return Err(BuildError::Replaces { path: show(&path), reason });
            }
            None => {}
        }
        if there != path {
            origins.insert(there.clone(), path);
        }
        out.insert(TreePath(there), node);
    }
    with_parents(&mut out, base)?;
    Ok((out, origins))
}

/// The directories that links lead through become entries, as the base has them.
fn with_parents(tree: &mut Tree, base: &united::Tree) -> Result<(), BuildError> {
    let mut lacking = Vec::new();
    for TreePath(path) in tree.keys() {
        let mut above = parent_of(path);
        while let Some(parent) = above.filter(|p| !p.is_empty()) {
            match tree.get(&TreePath(parent.to_vec())).map(|n| &n.kind) {
                None => lacking.push(parent.to_vec()),
                Some(NodeKind::Directory { .. }) => {}
                Some(_) => {
                    let reason = format!("would lie below {}, which is no directory", show(parent));
                    return Err(BuildError::Replaces { path: show(path), reason });
                }
            }
            above = parent_of(parent);
        }
    }
    for path in lacking {
        if let Some(theirs) = base.find(&path) {
            let kind = NodeKind::Directory { opaque: false };
            let node = super::scan::Node { meta: theirs.meta, xattrs: theirs.xattrs.clone(), kind };
            tree.insert(TreePath(path), node);
        }
    }
    Ok(())
}

/// The directory that a path of the base leads to.
fn follow(base: &united::Tree, path: &[u8]) -> Result<Vec<u8>, BuildError> {
    walk(base, Vec::new(), path, path)
}

/// The directory that a link at `path` with this target would lead to.
fn follow_target(base: &united::Tree, path: &[u8], target: &[u8]) -> Result<Vec<u8>, BuildError> {
    let begin = if target.first() == Some(&b'/') { &b""[..] } else { parent_of(path).unwrap_or_default() };
    walk(base, begin.to_vec(), target, path)
}

fn walk(base: &united::Tree, begin: Vec<u8>, way: &[u8], path: &[u8]) -> Result<Vec<u8>, BuildError> {
    let mut open: Vec<Vec<u8>> = way.rsplit(|b| *b == b'/').map(<[u8]>::to_vec).collect();
    let mut at = begin;
    let mut links = 0;
    while let Some(part) = open.pop() {
        match &part[..] {
            b"" | b"." => continue,
            b".." => {
                at = parent_of(&at).unwrap_or_default().to_vec();
                continue;
            }
            _ => {}
        }
        let here = join(&at, &part);
        match base.find(&here).map(|n| &n.kind) {
            Some(Base::Directory) => at = here,
            Some(Base::Symlink { target }) if links < LINKS_MAX => {
                links += 1;
                if target.first() == Some(&b'/') {
                    at.clear();
                }
                open.extend(target.rsplit(|b| *b == b'/').map(<[u8]>::to_vec));
            }
            _ => {
                let reason = format!(
                    "is a directory, but in what the component requires a link that leads to no directory, {}",
                    show(&here)
                );
                return Err(BuildError::Replaces { path: show(path), reason });
            }
        }
    }
    Ok(at)
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}

/// Contents whose paths moved.
pub struct Moved<'a> {
    pub contents: &'a dyn Contents,
    pub origins: Origins,
}

impl Contents for Moved<'_> {
    fn open(&self, path: &[u8]) -> Result<Box<dyn Content + '_>, BuildError> {
        self.contents.open(self.origins.get(path).map_or(path, Vec::as_slice))
    }
}
