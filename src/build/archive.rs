//! A tar archive as a tree whose contents are read where they lie. Members are taken in the order of
//! the archive, as unpacking would: a later one of a path replaces the earlier, and a hard link is
//! another name of what lies at its target at that moment, whatever comes to lie there afterwards.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use crate::component::manifest::{Meta, limit, show};
use crate::component::recipe::EPOCH_S;
use crate::sparse::{self, Content, Holes};

use super::acl::{self, Acl, Names};
use super::error::BuildError;
use super::layer::Contents;
use super::scan::{Attributes, LeftOut, Node, NodeKind, Tree, TreePath, kept_value};
use super::tar_reader::{self, Member, Members, Place, Type};

/// Where the content of a file lies, by its path in the tree.
type Places = HashMap<Vec<u8>, Place>;

pub struct Archive {
    path: PathBuf,
    file: File,
    /// Filled by [`Archive::scan`].
    places: std::cell::RefCell<Places>,
}

const ZSTD_MAGIC: u32 = 0xfd2f_b528;
/// Of frames that hold no content; pzstd begins with one (RFC 8878, 3.1.2).
const ZSTD_SKIPPABLE: std::ops::RangeInclusive<u32> = 0x184d_2a50..=0x184d_2a5f;
/// The largest window a compressed archive may ask memory for: 128 MiB.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// Unpacking ends before less than this is free.
const FREE_BYTES_MIN: u64 = 256 << 20;
/// Account files larger than this are not looked into for names.
const ACCOUNTS_BYTES_MAX: u64 = 16 << 20;
/// What people may hold for an archive, and how it becomes one.
const FOREIGN: &[(&[u8], &str)] = &[
    (b"\x1f\x8b", "it is compressed by gzip: unpack it with 'gunzip'"),
    (b"\xfd7zXZ\0", "it is compressed by xz: unpack it with 'unxz'"),
    (b"BZh", "it is compressed by bzip2: unpack it with 'bunzip2'"),
    (b"\x04\x22\x4d\x18", "it is compressed by lz4: unpack it with 'unlz4'"),
    (b"PK\x03\x04", "it is a zip archive: unpack it and import the directory"),
    (b"!<arch>\n", "it is a package or library: unpack it and import the directory"),
    (b"07070", "it is a cpio archive: unpack it and import the directory"),
];

/// What one or several names are the names of.
struct Inode {
    meta: Meta,
    xattrs: Attributes,
    kind: NodeKind,
    place: Place,
    /// ACLs whose names are looked up when the archive's own accounts are known.
    acls: Vec<(&'static str, Vec<u8>)>,
}

impl Archive {
    pub fn open(path: &Path, temporary: &Path) -> Result<Self, BuildError> {
        let kind = fs::metadata(path).map_err(BuildError::read(path))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            // What is given through one can be read once, and opening one may wait for ever.
            let hint =
                if kind.is_fifo() { "; it is a pipe: write what comes through it to a file" } else { "" };
            return Err(BuildError::UnknownSource { path: path.to_owned(), hint: hint.into() });
        }
        let mut file = File::open(path).map_err(BuildError::read(path))?;
        let first = beginning(&file).map_err(BuildError::read(path))?;
        file.rewind().map_err(BuildError::read(path))?;
        let file = if is_zstd(&first) { unpacked(path, file, temporary)? } else { file };
        let archive = Self { path: path.to_owned(), file, places: Default::default() };
        let first = beginning(&archive.file).map_err(BuildError::read(path))?;
        if tar_reader::is_archive(&first) {
            return Ok(archive);
        }
        let known = FOREIGN.iter().find(|(magic, _)| first.starts_with(magic));
        Err(BuildError::UnknownSource {
            path: path.to_owned(),
            hint: known.map_or(String::new(), |(_, hint)| format!("; {hint}")),
        })
    }

    fn refuse(&self, path: &[u8], reason: impl Into<String>) -> BuildError {
        BuildError::Archive { archive: self.path.clone(), path: show(path), reason: reason.into() }
    }

    /// Reads all headers. The directories above a member exist even if the archive does not name them.
    /// Names in ACLs are those that headers pair with ids, else those of the archive's own account files
    /// and of `names`.
    pub fn scan(&self, mut names: Names, left_out: &mut Vec<LeftOut>) -> Result<Tree, BuildError> {
        let mut members = Members::new(&self.file).map_err(BuildError::read(&self.path))?;
        let mut inodes = vec![Inode::directory()];
        let mut found: BTreeMap<TreePath, usize> = [(TreePath(Vec::new()), 0)].into_iter().collect();
        let refused = |r: tar_reader::Refused| match r.is_cut {
            true => {
                BuildError::CutShort { archive: self.path.clone(), path: show(&r.path), reason: r.reason }
            }
            false => self.refuse(&r.path, r.reason),
        };
        while let Some(member) = members.next().map_err(refused)? {
            let path = self.plain_path(&member.path)?;
            for (of, name, id) in [
                (&mut names.users, &member.owner_names.0, member.uid),
                (&mut names.groups, &member.owner_names.1, member.gid),
            ] {
                if let Ok(id) = u32::try_from(id) {
                    of.add_packed(name, id);
                }
            }
            if found.len() as u64 >= limit::ENTRIES || inodes.len() as u64 >= 2 * limit::ENTRIES {
                return Err(BuildError::TooMuch { what: "paths", object: show(&path) });
            }
            for (at, _) in path.iter().enumerate().filter(|(_, b)| **b == b'/') {
                let above = TreePath(path[..at].to_vec());
                let there = *found.entry(above).or_insert_with(|| {
                    inodes.push(Inode::directory());
                    inodes.len() - 1
                });
                if !matches!(inodes[there].kind, NodeKind::Directory { .. }) {
                    let reason = format!("it lies below {}, which is no directory", show(&path[..at]));
                    return Err(self.refuse(&path, reason));
                }
            }
            let inode = match member.kind {
                Type::HardLink => {
                    let target = self.plain_path(&member.link)?;
                    match found.get(&TreePath(target.clone())) {
                        Some(inode) if !matches!(inodes[*inode].kind, NodeKind::Directory { .. }) => *inode,
                        _ => {
                            let reason = format!("links to {}, which is no file in it", show(&target));
                            return Err(self.refuse(&path, reason));
                        }
                    }
                }
                _ => {
                    inodes.push(self.inode(member, &path, left_out)?);
                    inodes.len() - 1
                }
            };
            self.check_replacing(&found, &inodes, &path, inode)?;
            found.insert(TreePath(path), inode);
        }
        self.resolve_acls(&found, &mut inodes, names, left_out)?;
        Ok(self.tree(found, &inodes))
    }

    /// A directory that holds something is not replaced by something else.
    fn check_replacing(
        &self,
        found: &BTreeMap<TreePath, usize>,
        inodes: &[Inode],
        path: &[u8],
        inode: usize,
    ) -> Result<(), BuildError> {
        if matches!(inodes[inode].kind, NodeKind::Directory { .. }) {
            return Ok(());
        }
        if path.is_empty() {
            return Err(self.refuse(path, "the root is no directory"));
        }
        let here = TreePath(path.to_vec());
        let is_directory =
            found.get(&here).is_some_and(|i| matches!(inodes[*i].kind, NodeKind::Directory { .. }));
        let mut behind = found.range((std::ops::Bound::Excluded(here), std::ops::Bound::Unbounded));
        let holds = |p: &TreePath| p.0.starts_with(path) && p.0.get(path.len()) == Some(&b'/');
        if is_directory && behind.next().is_some_and(|(p, _)| holds(p)) {
            return Err(self.refuse(path, "it comes again, but was a directory with something in it"));
        }
        Ok(())
    }

    fn tree(&self, found: BTreeMap<TreePath, usize>, inodes: &[Inode]) -> Tree {
        let mut first_of: HashMap<usize, Vec<u8>> = HashMap::new();
        let mut tree = Tree::new();
        let mut places = self.places.borrow_mut();
        for (path, number) in found {
            let inode = &inodes[number];
            let mut kind = inode.kind.clone();
            if matches!(kind, NodeKind::File { .. }) {
                places.insert(path.0.clone(), inode.place.clone());
            }
            if !matches!(kind, NodeKind::Directory { .. } | NodeKind::Whiteout) {
                match first_of.get(&number) {
                    Some(first) => kind = NodeKind::HardLink { target: first.clone() },
                    None => drop(first_of.insert(number, path.0.clone())),
                }
            }
            let xattrs = match kind {
                // They are the inode's.
                NodeKind::HardLink { .. } => Vec::new(),
                _ => inode.xattrs.clone(),
            };
            tree.insert(path, Node { meta: inode.meta, xattrs, kind });
        }
        tree
    }

    /// A path without `./`; one that is absolute or leads upwards is refused.
    fn plain_path(&self, raw: &[u8]) -> Result<Vec<u8>, BuildError> {
        let refuse = |reason: &str| Err(self.refuse(raw, reason));
        if raw.first() == Some(&b'/') {
            return refuse(
                "its path is absolute: make the archive with relative ones, as tar does without -P",
            );
        }
        if raw.contains(&0) {
            return refuse("its path has a NUL: make the archive again");
        }
        let mut out = Vec::new();
        for part in raw.split(|b| *b == b'/').filter(|p| !p.is_empty() && *p != b".") {
            if part == b".." {
                return refuse("its path leads upwards by '..': make the archive from within the directory");
            }
            if part.len() > limit::NAME_BYTES {
                return refuse("a part of its path is longer than any file system holds: rename it");
            }
            if !out.is_empty() {
                out.push(b'/');
            }
            out.extend_from_slice(part);
        }
        if out.len() as u64 > limit::PATH_BYTES {
            return refuse("its path is longer than any system opens: rename or move it");
        }
        Ok(out)
    }

    fn inode(&self, member: Member, path: &[u8], left_out: &mut Vec<LeftOut>) -> Result<Inode, BuildError> {
        let id = |value: u64| {
            // The highest stands for no id.
            let id = u32::try_from(value).ok().filter(|id| *id != u32::MAX);
            id.ok_or_else(|| self.refuse(path, format!("{value} is no user or group id")))
        };
        let meta =
            Meta { mode: member.mode, uid: id(member.uid)?, gid: id(member.gid)?, mtime_s: member.mtime_s };
        let (major, minor) = member.device;
        let kind = match member.kind {
            Type::Directory => NodeKind::Directory { opaque: false },
            Type::File => NodeKind::File { size_bytes: member.place.size_bytes },
            Type::Symlink if member.link.is_empty() => {
                return Err(self.refuse(path, "a link without a target"));
            }
            Type::Symlink => NodeKind::Symlink { target: member.link },
            // As in a directory, overlayfs removes what lies below in this way.
            Type::CharDevice if (major, minor) == (0, 0) => NodeKind::Whiteout,
            Type::CharDevice => NodeKind::CharDevice { major, minor },
            Type::BlockDevice => NodeKind::BlockDevice { major, minor },
            Type::Fifo => NodeKind::Fifo,
            Type::HardLink => return Err(self.refuse(path, "a link without a target")),
        };
        let mut inode = Inode { meta, xattrs: Vec::new(), kind, place: member.place, acls: Vec::new() };
        let extended = member.extended;
        let has_attributes = matches!(inode.kind, NodeKind::Directory { .. } | NodeKind::File { .. });
        for (name, value) in extended.xattrs {
            let kept = kept_value(&name, value).map_err(|e| self.refuse(path, e.to_string()))?;
            match kept.filter(|_| has_attributes) {
                Some(value) if acl::is_acl(&name) => {
                    let acl = Acl::of_disk(&value)
                        .ok_or_else(|| self.refuse(path, format!("{name} is no POSIX ACL")))?;
                    self.set_acl(path, &mut inode, &name, &acl, left_out)?;
                }
                Some(value) => inode.xattrs.push((name, value)),
                None => left_out.push(LeftOut::attribute(path, &name)),
            }
        }
        for (name, text) in [(acl::ACCESS, extended.acl_access), (acl::DEFAULT, extended.acl_default)] {
            let Some(text) = text else { continue };
            if has_attributes {
                inode.acls.push((name, text));
            } else {
                left_out.push(LeftOut::attribute(path, name));
            }
        }
        if inode.xattrs.len() as u64 > limit::XATTRS {
            return Err(self.refuse(path, "too many extended attributes"));
        }
        inode.xattrs.sort();
        Ok(inode)
    }

    fn resolve_acls(
        &self,
        found: &BTreeMap<TreePath, usize>,
        inodes: &mut [Inode],
        mut names: Names,
        left_out: &mut Vec<LeftOut>,
    ) -> Result<(), BuildError> {
        if inodes.iter().all(|i| i.acls.is_empty()) {
            return Ok(());
        }
        for (path, of) in [("etc/passwd", &mut names.users), ("etc/group", &mut names.groups)] {
            let inode = found.get(&TreePath(path.into())).map(|i| &inodes[*i]);
            if let Some(Inode { kind: NodeKind::File { size_bytes }, place, .. }) = inode
                && *size_bytes <= ACCOUNTS_BYTES_MAX
            {
                let mut content = Vec::new();
                self.reader(place).read_to_end(&mut content).map_err(BuildError::read(&self.path))?;
                acl::add_names(of, &content);
            }
        }
        for (path, number) in found {
            let inode = &mut inodes[*number];
            for (name, text) in std::mem::take(&mut inode.acls) {
                let acl =
                    acl::of_text(&text, &names).map_err(|e| self.refuse(&path.0, format!("{name}: {e}")))?;
                if let Some(acl) = acl {
                    self.set_acl(&path.0, inode, name, &acl, left_out)?;
                }
            }
        }
        Ok(())
    }

    /// As the kernel does: the mode follows the ACL, and one that says no more is not kept.
    fn set_acl(
        &self,
        path: &[u8],
        inode: &mut Inode,
        name: &str,
        acl: &Acl,
        left_out: &mut Vec<LeftOut>,
    ) -> Result<(), BuildError> {
        if name == acl::ACCESS {
            inode.meta.mode = inode.meta.mode & !0o777 | acl.mode();
            if acl.is_minimal() {
                return Ok(());
            }
        } else if !matches!(inode.kind, NodeKind::Directory { .. }) {
            left_out.push(LeftOut::attribute(path, name));
            return Ok(());
        }
        let value = acl.to_disk();
        if value.len() as u64 > limit::XATTR_VALUE_BYTES {
            return Err(self.refuse(path, format!("{name} is larger than an ext4 block holds")));
        }
        inode.xattrs.retain(|(n, _)| n != name);
        inode.xattrs.push((name.to_owned(), value));
        inode.xattrs.sort();
        Ok(())
    }

    fn reader(&self, place: &Place) -> PlaceReader<'_> {
        PlaceReader::new(&self.file, place.clone())
    }
}

impl Inode {
    /// A directory that is there because something lies in it.
    fn directory() -> Self {
        let meta = Meta { mode: 0o755, uid: 0, gid: 0, mtime_s: EPOCH_S };
        let kind = NodeKind::Directory { opaque: false };
        Self { meta, xattrs: Vec::new(), kind, place: Place::default(), acls: Vec::new() }
    }
}

fn beginning(file: &File) -> io::Result<Vec<u8>> {
    let mut first = vec![0; 512];
    let mut len = 0;
    while len < first.len() {
        match file.read_at(&mut first[len..], len as u64)? {
            0 => break,
            n => len += n,
        }
    }
    first.truncate(len);
    Ok(first)
}

fn is_zstd(first: &[u8]) -> bool {
    let magic = first.first_chunk().map(|magic| u32::from_le_bytes(*magic));
    magic.is_some_and(|magic| magic == ZSTD_MAGIC || ZSTD_SKIPPABLE.contains(&magic))
}

/// The archive unpacked into a file that has no name.
fn unpacked(path: &Path, file: File, temporary: &Path) -> Result<File, BuildError> {
    const STEP_BYTES: u64 = 64 << 20;
    let plain = tempfile::tempfile_in(temporary).map_err(BuildError::write(temporary))?;
    let mut decoder = zstd::Decoder::new(file).map_err(BuildError::read(path))?;
    decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(BuildError::read(path))?;
    let mut piece = vec![0; 1 << 20];
    let (mut until_look, mut len_bytes) = (0, 0);
    loop {
        let n = decoder.read(&mut piece).map_err(|e| match e.to_string().contains("too much memory") {
            true => BuildError::UnknownSource {
                path: path.to_owned(),
                hint: "; reading it takes more than 128 MiB: unpack it with 'unzstd --long=31'".into(),
            },
            false => BuildError::read(path)(e),
        })?;
        if n == 0 {
            break;
        }
        if until_look < n as u64 {
            // What it unpacks to is anybody's guess.
            let free = rustix::fs::statvfs(temporary).map_or(u64::MAX, |s| s.f_bavail * s.f_frsize);
            if free < FREE_BYTES_MIN + STEP_BYTES {
                let full = io::Error::from(io::ErrorKind::StorageFull);
                return Err(BuildError::write(temporary)(full));
            }
            until_look = STEP_BYTES;
        }
        until_look -= (n as u64).min(until_look);
        sparse::write_at(&plain, &piece[..n], len_bytes).map_err(BuildError::write(temporary))?;
        len_bytes += n as u64;
    }
    plain.set_len(len_bytes).map_err(BuildError::write(temporary))?;
    Ok(plain)
}

impl Contents for Archive {
    fn open(&self, path: &[u8]) -> Result<Box<dyn Content + '_>, BuildError> {
        let place = self.places.borrow().get(path).cloned();
        let place = place.ok_or_else(|| self.refuse(path, "is no file of the archive"))?;
        Ok(Box::new(PlaceReader::new(&self.file, place)))
    }
}

/// Reads a file of the archive: its holes, and those of the archive itself, without looking.
struct PlaceReader<'a> {
    file: &'a File,
    place: Place,
    at: u64,
    /// The run that was not passed yet.
    next: usize,
    holes: Holes,
}

impl<'a> PlaceReader<'a> {
    fn new(file: &'a File, place: Place) -> Self {
        Self { file, place, at: 0, next: 0, holes: Holes::default() }
    }

    /// Where in the archive the content lies that comes next, and how much of it there is; or how long the hole is.
    fn here(&mut self) -> Result<(u64, u64), u64> {
        let runs = &self.place.runs;
        while runs.get(self.next).is_some_and(|(offset, len, _)| self.at >= offset + len) {
            self.next += 1;
        }
        match runs.get(self.next) {
            Some((offset, len, archive)) if self.at >= *offset => {
                Ok((archive + (self.at - offset), offset + len - self.at))
            }
            Some((offset, _, _)) => Err(offset - self.at),
            None => Err(self.place.size_bytes.saturating_sub(self.at)),
        }
    }
}

impl Content for PlaceReader<'_> {
    fn skip_hole(&mut self, most_bytes: u64) -> io::Result<u64> {
        let hole = match self.here() {
            Ok((archive, left)) => self.holes.len_at(self.file, archive)?.min(left),
            Err(hole) => hole,
        };
        let hole = hole.min(most_bytes);
        self.at += hole;
        Ok(hole)
    }
}

impl Read for PlaceReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let hole = self.skip_hole(buffer.len() as u64)?;
        if hole > 0 {
            buffer[..hole as usize].fill(0);
            return Ok(hole as usize);
        }
        let Ok((archive, left)) = self.here() else { return Ok(0) };
        let take = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let n = self.file.read_at(&mut buffer[..take], archive)?;
        self.at += n as u64;
        Ok(n)
    }
}
