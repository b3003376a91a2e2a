//! A component out of a directory or a tar archive that somebody has, instead of packages.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

use super::error::BuildError;
use super::layer::{Contents, Identity, Layer, Secrets};
use super::materialise::RangeReader;
use super::owner::Owners;
use super::scan::{Node, NodeKind, Root, Tree, TreePath, kept_value};
use crate::component::Kind;
use crate::component::manifest::{Meta, limit, show};
use crate::repository::Repository;
use crate::types::ComponentId;

/// Who the imported component shall be.
#[derive(Clone, Debug)]
pub struct ImportIdentity {
    pub name: String,
    pub version: String,
    pub kind: Kind,
    /// Debian architecture name, for example `amd64`.
    pub architecture: String,
    /// The components it was built on; what the first of them already has is left out.
    pub requires: Vec<ComponentId>,
}

/// Stores a directory or a `.tar` or `.tar.zst` archive as a component and binds its name. A tree
/// with secrets or identity in it is refused.
pub fn import(
    repository: &Repository,
    source: &Path,
    identity: ImportIdentity,
) -> Result<ComponentId, BuildError> {
    let metadata = fs::metadata(source).map_err(BuildError::read(source))?;
    if metadata.is_dir() {
        let root = Root::open(source)?;
        let tree = root.scan()?;
        return store(repository, tree, &root, source, identity);
    }
    let archive = Archive::open(source, repository.temporary_dir())?;
    let tree = archive.scan()?;
    store(repository, tree, &archive, source, identity)
}

fn store(
    repository: &Repository,
    mut tree: Tree,
    contents: &dyn Contents,
    source: &Path,
    identity: ImportIdentity,
) -> Result<ComponentId, BuildError> {
    let base = identity.requires.first().map(|id| repository.manifest(id)).transpose()?;
    if identity.kind != Kind::Os {
        tree.remove(&TreePath(Vec::new()));
    }
    let origin = source.file_name().unwrap_or_default().to_string_lossy();
    let identity = Identity {
        name: identity.name,
        version: identity.version,
        kind: identity.kind,
        architecture: identity.architecture,
        origin: format!("imported from {}", origin.chars().take(200).collect::<String>()),
        licences: Vec::new(),
        requires: identity.requires,
        conflicts: Vec::new(),
    };
    let owners = Owners::read(&tree, contents)?;
    let layer =
        Layer { tree, contents, base: base.as_deref(), owners, exclude: &[], secrets: Secrets::Refuse };
    let manifest = layer.store(repository, identity, &mut |_, _| {})?;
    let id = repository.put_manifest(&manifest)?;
    repository.bind_component(&manifest, id)?;
    Ok(id)
}

/// A tar archive whose contents are read where they lie.
struct Archive {
    path: PathBuf,
    file: File,
    /// Offset and size of each file's content, by its path in the tree. Filled by [`Archive::scan`].
    places: std::cell::RefCell<HashMap<Vec<u8>, (u64, u64)>>,
}

const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The magic of POSIX and GNU tar headers and where it is.
const TAR_MAGIC: (&[u8], usize) = (b"ustar", 257);
/// The largest window a compressed archive may ask memory for: 128 MiB.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// PAX records that hold extended attributes.
const PAX_XATTR: &str = "SCHILY.xattr.";

impl Archive {
    fn open(path: &Path, temporary: &Path) -> Result<Self, BuildError> {
        let mut file = File::open(path).map_err(BuildError::read(path))?;
        let mut magic = Vec::new();
        (&file).take(TAR_MAGIC.1 as u64 + 5).read_to_end(&mut magic).map_err(BuildError::read(path))?;
        file.rewind().map_err(BuildError::read(path))?;
        if magic.starts_with(&ZSTD_MAGIC) {
            let mut plain = tempfile::tempfile_in(temporary).map_err(BuildError::write(temporary))?;
            let mut decoder = zstd::Decoder::new(file).map_err(BuildError::read(path))?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(BuildError::read(path))?;
            io::copy(&mut decoder, &mut plain).map_err(BuildError::read(path))?;
            plain.rewind().map_err(BuildError::read(path))?;
            return Ok(Self { path: path.to_owned(), file: plain, places: Default::default() });
        }
        if magic.get(TAR_MAGIC.1..) != Some(TAR_MAGIC.0) {
            return Err(BuildError::UnknownSource { path: path.to_owned() });
        }
        Ok(Self { path: path.to_owned(), file, places: Default::default() })
    }

    fn refuse(&self, path: &[u8], reason: impl Into<String>) -> BuildError {
        BuildError::Archive { archive: self.path.clone(), path: show(path), reason: reason.into() }
    }

    /// Reads all headers. A later entry of a path replaces the earlier, as unpacking would; the
    /// directories above an entry exist even if the archive does not name them.
    fn scan(&self) -> Result<Tree, BuildError> {
        let length_bytes = self.file.metadata().map_err(BuildError::read(&self.path))?.len();
        let mut reader = tar::Archive::new(&self.file);
        let mut tree = Tree::new();
        tree.insert(TreePath(Vec::new()), directory());
        let entries = reader.entries_with_seek().map_err(BuildError::read(&self.path))?;
        for entry in entries {
            let mut entry = entry.map_err(BuildError::read(&self.path))?;
            let raw = entry.path_bytes().into_owned();
            let path = self.plain_path(&raw)?;
            if tree.len() as u64 >= limit::ENTRIES {
                return Err(BuildError::TooMuch { what: "paths", object: show(&path) });
            }
            let (begin, size_bytes) = (entry.raw_file_position(), entry.size());
            let Some(node) = self.node(&mut entry, &path)? else { continue };
            if let NodeKind::File { .. } = node.kind {
                if begin.checked_add(size_bytes).is_none_or(|end| end > length_bytes) {
                    return Err(self.refuse(&path, "the archive ends before its content"));
                }
                self.places.borrow_mut().insert(path.clone(), (begin, size_bytes));
            }
            self.add(&mut tree, path, node)?;
        }
        self.check_links(&tree)?;
        Ok(tree)
    }

    fn add(&self, tree: &mut Tree, path: Vec<u8>, node: Node) -> Result<(), BuildError> {
        let mut above = Vec::new();
        for (at, _) in path.iter().enumerate().filter(|(_, b)| **b == b'/') {
            above.push(path[..at].to_vec());
        }
        for dir in above {
            let there = tree.entry(TreePath(dir.clone())).or_insert_with(directory);
            if !matches!(there.kind, NodeKind::Directory { .. }) {
                return Err(
                    self.refuse(&path, format!("it lies below {}, which is no directory", show(&dir)))
                );
            }
        }
        tree.insert(TreePath(path), node);
        Ok(())
    }

    /// A path without `./`; one that is absolute or leads upwards is refused.
    fn plain_path(&self, raw: &[u8]) -> Result<Vec<u8>, BuildError> {
        if raw.first() == Some(&b'/') || raw.contains(&0) {
            return Err(self.refuse(raw, "an absolute path or one with NUL"));
        }
        let mut out = Vec::new();
        for part in raw.split(|b| *b == b'/').filter(|p| !p.is_empty() && *p != b".") {
            if part == b".." || part.len() > limit::NAME_BYTES {
                return Err(self.refuse(raw, "a path with '..' or an overlong part"));
            }
            if !out.is_empty() {
                out.push(b'/');
            }
            out.extend_from_slice(part);
        }
        if out.len() as u64 > limit::PATH_BYTES {
            return Err(self.refuse(raw, "the path is too long"));
        }
        Ok(out)
    }

    /// `None` for what is no entry of a tree.
    fn node(&self, entry: &mut tar::Entry<'_, &File>, path: &[u8]) -> Result<Option<Node>, BuildError> {
        let header = entry.header();
        let number = |field: io::Result<u64>| {
            let value = field.map_err(|e| self.refuse(path, e.to_string()))?;
            u32::try_from(value).map_err(|_| self.refuse(path, format!("{value} is no user or group id")))
        };
        let mut meta = Meta {
            mode: (header.mode().map_err(|e| self.refuse(path, e.to_string()))? & 0o7777) as u16,
            uid: number(header.uid())?,
            gid: number(header.gid())?,
            mtime_s: i64::try_from(header.mtime().unwrap_or(0)).unwrap_or(i64::MAX),
        };
        let device =
            || -> Option<(u32, u32)> { Some((header.device_major().ok()??, header.device_minor().ok()??)) };
        let device = || device().ok_or_else(|| self.refuse(path, "a device without a number"));
        let link = entry.link_name_bytes().map(|l| l.into_owned());
        let link = || link.clone().ok_or_else(|| self.refuse(path, "a link without a target"));
        let kind = match header.entry_type() {
            t if t.is_dir() => NodeKind::Directory { opaque: false },
            t if t.is_file() || t.is_contiguous() => NodeKind::File { size_bytes: entry.size() },
            t if t.is_symlink() => NodeKind::Symlink { target: link()? },
            t if t.is_hard_link() => NodeKind::HardLink { target: self.plain_path(&link()?)? },
            t if t.is_character_special() => {
                let (major, minor) = device()?;
                NodeKind::CharDevice { major, minor }
            }
            t if t.is_block_special() => {
                let (major, minor) = device()?;
                NodeKind::BlockDevice { major, minor }
            }
            t if t.is_fifo() => NodeKind::Fifo,
            t if t.is_pax_global_extensions() => return Ok(None),
            t => return Err(self.refuse(path, format!("entries of type {t:?} are not supported"))),
        };
        if path.is_empty() && !matches!(kind, NodeKind::Directory { .. }) {
            return Err(self.refuse(path, "the root is no directory"));
        }
        let mut xattrs = Vec::new();
        if let Some(records) = entry.pax_extensions().map_err(|e| self.refuse(path, e.to_string()))? {
            for record in records {
                let record = record.map_err(|e| self.refuse(path, e.to_string()))?;
                let Ok(key) = record.key() else { continue };
                let number = || record.value().ok().and_then(|v| v.split('.').next()?.parse::<i64>().ok());
                match key {
                    "uid" => meta.uid = number().and_then(|n| n.try_into().ok()).unwrap_or(meta.uid),
                    "gid" => meta.gid = number().and_then(|n| n.try_into().ok()).unwrap_or(meta.gid),
                    "mtime" => meta.mtime_s = number().unwrap_or(meta.mtime_s),
                    _ => {}
                }
                if let Some(name) = key.strip_prefix(PAX_XATTR)
                    && let Some(value) = kept_value(name, record.value_bytes().to_vec())
                        .map_err(|e| self.refuse(path, e.to_string()))?
                {
                    xattrs.push((name.to_owned(), value));
                }
            }
        }
        xattrs.sort();
        xattrs.dedup_by(|a, b| a.0 == b.0);
        if xattrs.len() as u64 > limit::XATTRS {
            return Err(self.refuse(path, "too many extended attributes"));
        }
        if matches!(kind, NodeKind::Symlink { .. } | NodeKind::HardLink { .. }) {
            xattrs.clear();
        }
        Ok(Some(Node { meta, xattrs, kind }))
    }

    fn check_links(&self, tree: &Tree) -> Result<(), BuildError> {
        for (path, node) in tree {
            if let NodeKind::HardLink { target } = &node.kind
                && !matches!(
                    tree.get(&TreePath(target.clone())).map(|n| &n.kind),
                    Some(NodeKind::File { .. })
                )
            {
                return Err(
                    self.refuse(&path.0, format!("links to {}, which is no file in it", show(target)))
                );
            }
        }
        Ok(())
    }
}

fn directory() -> Node {
    let meta = Meta { mode: 0o755, uid: 0, gid: 0, mtime_s: 0 };
    Node { meta, xattrs: Vec::new(), kind: NodeKind::Directory { opaque: false } }
}

impl Contents for Archive {
    fn open(&self, path: &[u8]) -> Result<Box<dyn Read + '_>, BuildError> {
        let at = self.places.borrow().get(path).copied();
        let (at, left) = at.ok_or_else(|| self.refuse(path, "is no file of the archive"))?;
        Ok(Box::new(RangeReader { file: &self.file, at, left }))
    }
}
