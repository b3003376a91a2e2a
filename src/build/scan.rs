//! A directory tree as a list of entries: owner, mode, times, attributes, links, devices. Content
//! stays where it is until it is packed.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};

use super::acl;
use super::error::BuildError;
use super::withhold;
use crate::component::manifest::{Meta, limit, path_order, show};
use crate::path_owner;

/// A path in the order manifests have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TreePath(pub Vec<u8>);

impl Ord for TreePath {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        path_order(&self.0, &other.0)
    }
}

impl PartialOrd for TreePath {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// What a tree holds, by path; the root has the empty path.
pub type Tree = BTreeMap<TreePath, Node>;

/// What a node is, whichever of its names it bears.
pub fn inode_kind<'t>(tree: &'t Tree, node: &'t Node) -> &'t NodeKind {
    match &node.kind {
        NodeKind::HardLink { target } => {
            tree.get(&TreePath(target.clone())).map_or(&node.kind, |first| &first.kind)
        }
        kind => kind,
    }
}

/// Extended attributes, sorted by name, ACLs in the stored form.
pub type Attributes = Vec<(String, Vec<u8>)>;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    pub meta: Meta,
    pub xattrs: Attributes,
    pub kind: NodeKind,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NodeKind {
    Directory {
        /// What the layer below has in it does not show through (overlayfs).
        opaque: bool,
    },
    File {
        size_bytes: u64,
    },
    HardLink {
        target: Vec<u8>,
    },
    Symlink {
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
    /// Removes what the layer below has here (overlayfs).
    Whiteout,
}

/// Something of a source that does not enter the component, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LeftOut {
    pub path: String,
    pub what: String,
}

impl LeftOut {
    pub fn new(path: &[u8], what: &str) -> Self {
        Self { path: show(path), what: what.to_owned() }
    }

    pub fn attribute(path: &[u8], name: &str) -> Self {
        let what =
            format!("the extended attribute '{}', which a component cannot hold there", name.escape_debug());
        Self { path: show(path), what }
    }
}

/// A directory being read, and from which content is read later without following links.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    fd: OwnedFd,
}

impl Root {
    pub fn open(path: &Path) -> Result<Self, BuildError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| at(path, b"", e.into()))?;
        Ok(Self { path: path.to_owned(), fd })
    }

    /// Opens a regular file; no part of `path` may be a symbolic link.
    pub fn file(&self, path: &[u8]) -> Result<File, BuildError> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        rustix::fs::openat2(&self.fd, path, flags, Mode::empty(), resolve)
            .map(File::from)
            .map_err(|e| self.at(path, e.into()))
    }

    pub fn at(&self, path: &[u8], source: io::Error) -> BuildError {
        at(&self.path, path, source)
    }

    /// Reads the whole tree. Entries below other mounts are read like any.
    pub fn scan(&self) -> Result<Tree, BuildError> {
        self.walk(None)
    }

    /// As [`Root::scan`], but does not enter what would not be kept anyway, and says what is not kept.
    pub fn scan_kept(&self, left_out: &mut Vec<LeftOut>) -> Result<Tree, BuildError> {
        self.walk(Some(left_out))
    }

    fn walk(&self, left_out: Option<&mut Vec<LeftOut>>) -> Result<Tree, BuildError> {
        let mut walk = Walk { root: self, tree: Tree::new(), first_of: HashMap::new(), left_out };
        let stat = rustix::fs::fstat(&self.fd).map_err(|e| self.at(b"", e.into()))?;
        let node = walk.directory(&self.fd, b"", &stat)?;
        walk.tree.insert(TreePath(Vec::new()), node);
        walk.children(&self.fd, b"")?;
        Ok(walk.tree)
    }
}

fn at(root: &Path, path: &[u8], source: io::Error) -> BuildError {
    BuildError::Tree { root: root.to_owned(), path: show(path), source }
}

struct Walk<'a> {
    root: &'a Root,
    tree: Tree,
    /// The first path of every inode with several names.
    first_of: HashMap<(u64, u64), Vec<u8>>,
    /// What is not kept, if somebody wants to know; nothing of it is entered then.
    left_out: Option<&'a mut Vec<LeftOut>>,
}

impl Walk<'_> {
    fn children(&mut self, dir: &OwnedFd, path: &[u8]) -> Result<(), BuildError> {
        let fail = |e: rustix::io::Errno| self.root.at(path, e.into());
        let mut names = Vec::new();
        for item in Dir::read_from(dir).map_err(fail)? {
            let name = item.map_err(fail)?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(name);
            }
        }
        // The order decides which name of an inode is the file and which are links to it.
        names.sort();
        for name in names {
            let child = if path.is_empty() { name.clone() } else { [path, b"/", &name].concat() };
            self.child(dir, &name, child)?;
        }
        Ok(())
    }

    fn child(&mut self, dir: &OwnedFd, name: &[u8], path: Vec<u8>) -> Result<(), BuildError> {
        if path.len() as u64 > limit::PATH_BYTES {
            return Err(BuildError::LongPath { path: show(&path), length: path.len() });
        }
        if self.tree.len() as u64 >= limit::ENTRIES {
            return Err(BuildError::TooMuch { what: "paths", object: show(&path) });
        }
        let fail = |e: rustix::io::Errno| self.root.at(&path, e.into());
        let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(dir, name, flags, Mode::empty()).map_err(fail)?;
                let node = self.directory(&fd, &path, &stat)?;
                self.tree.insert(TreePath(path.clone()), node);
                if let Some(left_out) = &mut self.left_out
                    && withhold::is_passing(&path)
                {
                    if !is_empty_directory(&fd) {
                        left_out.push(LeftOut::new(&[&path[..], b"/**"].concat(), withhold::PASSING));
                    }
                    return Ok(());
                }
                return self.children(&fd, &path);
            }
            FileType::RegularFile => NodeKind::File { size_bytes: stat.st_size as u64 },
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(dir, name, Vec::new()).map_err(fail)?;
                NodeKind::Symlink { target: target.into_bytes() }
            }
            FileType::CharacterDevice => match device_of(&stat) {
                (0, 0) => NodeKind::Whiteout,
                (major, minor) => NodeKind::CharDevice { major, minor },
            },
            FileType::BlockDevice => {
                let (major, minor) = device_of(&stat);
                NodeKind::BlockDevice { major, minor }
            }
            FileType::Fifo => NodeKind::Fifo,
            FileType::Socket => NodeKind::Socket,
            FileType::Unknown => {
                return Err(self.root.at(&path, io::Error::other("of no file type that can be stored")));
            }
        };
        let kind = match self.first_of.entry((stat.st_dev, stat.st_ino)) {
            // What is removed has no inode.
            _ if kind == NodeKind::Whiteout => kind,
            Entry::Occupied(first) => NodeKind::HardLink { target: first.get().clone() },
            Entry::Vacant(first) => {
                if stat.st_nlink > 1 {
                    first.insert(path.clone());
                }
                kind
            }
        };
        let xattrs = match kind {
            // They are noted, or kept, by the first name.
            NodeKind::HardLink { .. } => Vec::new(),
            NodeKind::File { .. } => {
                let read = attributes(&self.root.file(&path)?).map_err(|e| self.root.at(&path, e))?;
                self.note(&path, &read);
                read.kept
            }
            // The others carry none that matter: `user.` and ACLs are for files and directories.
            _ => {
                self.note_of_others(dir, name, &path);
                Vec::new()
            }
        };
        self.tree.insert(TreePath(path), Node { meta: meta_of(&stat), xattrs, kind });
        Ok(())
    }

    fn directory(&mut self, fd: &OwnedFd, path: &[u8], stat: &Stat) -> Result<Node, BuildError> {
        let read = attributes(fd).map_err(|e| self.root.at(path, e))?;
        self.note(path, &read);
        let kind = NodeKind::Directory { opaque: read.opaque };
        Ok(Node { meta: meta_of(stat), xattrs: read.kept, kind })
    }

    /// Attributes of links and devices, such as SELinux has there. The kernel lists them by path alone;
    /// that of an open directory leads nowhere else.
    fn note_of_others(&mut self, dir: &OwnedFd, name: &[u8], path: &[u8]) {
        let Some(left_out) = &mut self.left_out else { return };
        let place = [format!("/proc/self/fd/{}/", dir.as_raw_fd()).as_bytes(), name].concat();
        let mut names = vec![0u8; 64 << 10];
        let length = rustix::fs::llistxattr(&place[..], &mut names[..]).unwrap_or(0);
        for name in names[..length].split(|b| *b == 0).filter(|n| !n.is_empty()) {
            left_out.push(LeftOut::attribute(path, &String::from_utf8_lossy(name)));
        }
    }

    fn note(&mut self, path: &[u8], read: &Read) {
        if let Some(left_out) = &mut self.left_out {
            left_out.extend(read.left_out.iter().map(|name| LeftOut::attribute(path, name)));
        }
    }
}

/// One that cannot be read is not known to be empty.
fn is_empty_directory(fd: &OwnedFd) -> bool {
    let Ok(items) = Dir::read_from(fd) else { return false };
    items.into_iter().all(|item| item.is_ok_and(|i| matches!(i.file_name().to_bytes(), b"." | b"..")))
}

fn device_of(stat: &Stat) -> (u32, u32) {
    (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev))
}

fn meta_of(stat: &Stat) -> Meta {
    Meta { mode: (stat.st_mode & 0o7777) as u16, uid: stat.st_uid, gid: stat.st_gid, mtime_s: stat.st_mtime }
}

/// What was read of a file's or directory's attributes.
struct Read {
    kept: Attributes,
    /// Names of those that stay behind.
    left_out: Vec<String>,
    /// Whether overlayfs marks the directory opaque.
    opaque: bool,
}

/// The attributes a component keeps. What overlayfs and trusted helpers note for themselves stays
/// behind.
fn attributes(fd: impl AsFd) -> io::Result<Read> {
    let fd = fd.as_fd();
    let mut names = vec![0u8; 64 << 10];
    let length = match rustix::fs::flistxattr(fd, &mut names[..]) {
        Ok(n) => n,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(e) => return Err(e.into()),
    };
    let (mut kept, mut left_out) = (Vec::new(), Vec::new());
    let mut opaque = false;
    for name in names[..length].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let Ok(name) = std::str::from_utf8(name) else {
            return Err(io::Error::other("has an extended attribute whose name is not UTF-8"));
        };
        let mut value = vec![0u8; 64 << 10];
        let length = rustix::fs::fgetxattr(fd, name, &mut value[..])?;
        value.truncate(length);
        // In a user namespace overlayfs has no other attributes to note it in.
        let opaque_name = match path_owner::in_user_namespace() {
            true => "user.overlay.opaque",
            false => "trusted.overlay.opaque",
        };
        if name == opaque_name {
            opaque = value == b"y";
        } else if let Some(value) = kept_value(name, value)? {
            kept.push((name.to_owned(), value));
        } else if !name.contains(".overlay.") {
            left_out.push(name.to_owned());
        }
    }
    kept.sort();
    Ok(Read { kept, left_out, opaque })
}

/// The value to store for an attribute, `None` for those that stay behind.
pub fn kept_value(name: &str, value: Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    let value = if acl::is_acl(name) {
        acl::to_disk(&value).ok_or_else(|| io::Error::other(format!("{name} is no POSIX ACL")))?
    } else if name.starts_with("user.overlay.") {
        return Ok(None);
    } else if name.starts_with("user.") || name.starts_with("security.") {
        value
    } else {
        return Ok(None);
    };
    if value.len() as u64 > limit::XATTR_VALUE_BYTES {
        return Err(io::Error::other(format!("{name} is larger than an ext4 block holds")));
    }
    Ok(Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn sees_everything_in_order_and_follows_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let p = |n: &str| dir.path().join(n);
        std::fs::create_dir_all(p("d/empty")).unwrap();
        std::fs::write(p("d/file"), b"12345").unwrap();
        std::fs::set_permissions(p("d/file"), std::fs::Permissions::from_mode(0o4750)).unwrap();
        std::fs::hard_link(p("d/file"), p("d.x")).unwrap();
        symlink("/etc/passwd", p("link")).unwrap();
        std::fs::hard_link(p("link"), p("link2")).unwrap();
        let fifo = FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, p("fifo"), fifo, Mode::RUSR, 0).unwrap();
        rustix::fs::setxattr(p("d/file"), "user.note", b"v", rustix::fs::XattrFlags::empty()).unwrap();

        let root = Root::open(dir.path()).unwrap();
        let tree = root.scan().unwrap();
        let paths: Vec<_> = tree.keys().map(|p| String::from_utf8(p.0.clone()).unwrap()).collect();
        assert_eq!(paths, ["", "d", "d/empty", "d/file", "d.x", "fifo", "link", "link2"]);
        let node = |n: &str| &tree[&TreePath(n.as_bytes().to_vec())];
        assert_eq!(node("d/file").kind, NodeKind::File { size_bytes: 5 });
        assert_eq!(node("d/file").meta.mode, 0o4750);
        assert_eq!(node("d/file").xattrs, [("user.note".to_owned(), b"v".to_vec())]);
        assert_eq!(node("d.x").kind, NodeKind::HardLink { target: b"d/file".to_vec() });
        assert_eq!(node("link").kind, NodeKind::Symlink { target: b"/etc/passwd".to_vec() });
        assert_eq!(node("link2").kind, NodeKind::HardLink { target: b"link".to_vec() });
        assert_eq!(node("fifo").kind, NodeKind::Fifo);
        assert!(root.file(b"link").is_err(), "a link is not followed");
        assert!(root.file(b"../x").is_err());
    }
}
