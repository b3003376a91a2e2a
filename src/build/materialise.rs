//! A component as a directory again, exactly: what a program is built on is the OS as every VM has
//! it, not as some machine's package tools made it today.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags};

use crate::component::manifest::{Entry, EntryKind, Fragment, Manifest, Meta, parent_of, show};
use crate::repository::Repository;
use crate::sparse::{self, SparseFile, SparseHasher};
use crate::types::{ComponentId, Hash};

use super::acl;
use super::error::BuildError;
use super::fragments;
use super::scan::{NodeKind, Root};

/// The directory of a component's tree in the cache, made if it is not there yet. A tree of an
/// earlier build is used only if it is still what was written then; any other is made anew.
pub fn cached(repository: &Repository, cache: &Path, id: &ComponentId) -> Result<PathBuf, BuildError> {
    let path = cache.join("trees").join(id.to_string());
    let noted = cache.join("trees").join(format!("{id}.digest"));
    if path.is_dir() && !path.is_symlink() {
        let kept = super::own_file(&noted).ok();
        if kept.is_some_and(|kept| digest(&path).is_ok_and(|now| kept == now.to_string())) {
            return Ok(path);
        }
    }
    let unfinished = path.with_extension("unfinished");
    for stale in [&path, &unfinished] {
        remove(stale).map_err(BuildError::write(stale))?;
    }
    let manifest = repository.manifest(id)?;
    materialise(repository, &manifest, &unfinished)?;
    let text = digest(&unfinished)?.to_string();
    crate::durable::write_secret(&noted, text.as_bytes()).map_err(BuildError::write(&noted))?;
    fs::rename(&unfinished, &path).map_err(BuildError::write(&path))?;
    Ok(path)
}

/// Removes a directory with all in it, or what else bears the name, following no link.
fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    }
}

/// Changes with anything of a tree: paths, owners, modes, times, attributes, links and content.
pub(super) fn digest(tree: &Path) -> Result<Hash, BuildError> {
    let root = Root::open(tree)?;
    let mut hasher = SparseHasher::new();
    for (path, node) in root.scan()? {
        let said = format!("{:?} {node:?}\n", path.0);
        hasher.update(&(said.len() as u64).to_le_bytes());
        hasher.update(said.as_bytes());
        if matches!(node.kind, NodeKind::File { .. }) {
            let file = root.file(&path.0)?;
            hasher.update_content(&mut SparseFile::new(file)).map_err(|e| root.at(&path.0, e))?;
        }
    }
    Ok(hasher.finalize())
}

/// Writes a component's tree into the new directory `target`, and beneath it only: no link of the
/// tree is followed, whatever a manifest says.
pub fn materialise(repository: &Repository, manifest: &Manifest, target: &Path) -> Result<(), BuildError> {
    let mut packs = Vec::new();
    for pack in &manifest.packs {
        packs.push(repository.hot_pack(&pack.id)?);
    }
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).map_err(BuildError::write(parent))?;
    }
    fs::DirBuilder::new().mode(0o755).create(target).map_err(BuildError::write(target))?;
    let tree = Beneath::open(target).map_err(BuildError::write(target))?;
    let fail = |path: &[u8]| {
        let path = show(path);
        move |source| BuildError::Tree { root: target.to_owned(), path, source }
    };
    for entry in &manifest.entries {
        write_entry(&packs, entry, &tree).map_err(fail(&entry.path))?;
    }
    for fragment in &manifest.fragments {
        write_fragment(fragment, &tree).map_err(fail(&fragment.path))?;
    }
    // Writing into a directory changes its time: directories come last, the deepest first.
    for entry in manifest.entries.iter().rev().filter(|e| e.kind == EntryKind::Directory) {
        let done = tree.parent(&entry.path).and_then(|(dir, name)| set_meta(&dir, name, &entry.meta, false));
        done.map_err(fail(&entry.path))?;
    }
    Ok(())
}

/// A directory beneath which everything is written. Each way down is resolved by the kernel without
/// links and without leaving the directory.
struct Beneath(OwnedFd);

impl Beneath {
    fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(path, flags, Mode::empty())?))
    }

    /// The directory a path lies in, and its name there; the root is `.` in itself.
    fn parent<'a>(&self, path: &'a [u8]) -> io::Result<(OwnedFd, &'a [u8])> {
        let name = path.rsplit(|b| *b == b'/').next().unwrap_or(path);
        let dir = parent_of(path).filter(|p| !p.is_empty()).unwrap_or(b".");
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::openat2(&self.0, dir, flags, Mode::empty(), resolve)?;
        Ok((dir, if name.is_empty() { b"." } else { name }))
    }
}

/// A new file; whatever bears the name already is an error.
fn create(dir: &OwnedFd, name: &[u8]) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)?))
}

fn write_fragment(fragment: &Fragment, tree: &Beneath) -> io::Result<()> {
    let (dir, name) = tree.parent(&fragment.path)?;
    create(&dir, name)?.write_all(&fragments::render(fragment))?;
    set_meta(&dir, name, &fragment.meta, false)
}

fn write_entry(packs: &[File], entry: &Entry, tree: &Beneath) -> io::Result<()> {
    let (dir, name) = tree.parent(&entry.path)?;
    let mut is_link = false;
    match &entry.kind {
        EntryKind::Directory if entry.path.is_empty() => {}
        EntryKind::Directory => rustix::fs::mkdirat(&dir, name, Mode::RWXU)?,
        EntryKind::File { size_bytes, pack, offset_bytes, .. } => {
            let mut file = create(&dir, name)?;
            if *size_bytes > 0 {
                let pack = packs.get(*pack as usize).ok_or_else(|| io::Error::other("names no pack"))?;
                copy_range(pack, *offset_bytes, *size_bytes, &mut file)?;
            }
        }
        EntryKind::Symlink { target } => {
            is_link = true;
            rustix::fs::symlinkat(&target[..], &dir, name)?;
        }
        EntryKind::HardLink { target } => {
            let (other, old) = tree.parent(target)?;
            return Ok(rustix::fs::linkat(other, old, &dir, name, AtFlags::empty())?);
        }
        EntryKind::CharDevice { major, minor } => {
            make_node(&dir, name, FileType::CharacterDevice, rustix::fs::makedev(*major, *minor))?
        }
        EntryKind::BlockDevice { major, minor } => {
            make_node(&dir, name, FileType::BlockDevice, rustix::fs::makedev(*major, *minor))?
        }
        EntryKind::Fifo => make_node(&dir, name, FileType::Fifo, 0)?,
        EntryKind::Socket => make_node(&dir, name, FileType::Socket, 0)?,
        // Only what is built on another component removes something.
        EntryKind::Whiteout => return Ok(()),
    }
    set_meta(&dir, name, &entry.meta, is_link)?;
    if entry.xattrs.is_empty() {
        return Ok(());
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&dir, name, flags, Mode::empty())?;
    for (name, value) in &entry.xattrs {
        let value = if acl::is_acl(name) {
            acl::from_disk(value).ok_or_else(|| io::Error::other(format!("{name} is no POSIX ACL")))?
        } else {
            value.clone()
        };
        rustix::fs::fsetxattr(&file, name, &value, XattrFlags::empty())?;
    }
    Ok(())
}

/// Holes stay holes.
fn copy_range(pack: &File, offset_bytes: u64, size_bytes: u64, target: &mut File) -> io::Result<()> {
    let end_bytes =
        offset_bytes.checked_add(size_bytes).filter(|end| pack.metadata().is_ok_and(|m| *end <= m.len()));
    let end_bytes = end_bytes.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
    for run in sparse::data_runs(pack, offset_bytes..end_bytes) {
        let run = run?;
        target.seek(SeekFrom::Start(run.start - offset_bytes))?;
        let len = run.end - run.start;
        if io::copy(&mut RangeReader { file: pack, at: run.start, left: len }, target)? != len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    target.set_len(size_bytes)
}

/// Reads a part of a file without moving its position, so several can read it.
struct RangeReader<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl io::Read for RangeReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let take = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let n = std::os::unix::fs::FileExt::read_at(self.file, &mut buffer[..take], self.at)?;
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

fn make_node(dir: &OwnedFd, name: &[u8], kind: FileType, device: u64) -> io::Result<()> {
    Ok(rustix::fs::mknodat(dir, name, kind, Mode::from_raw_mode(0o600), device)?)
}

fn set_meta(dir: &OwnedFd, name: &[u8], meta: &Meta, is_link: bool) -> io::Result<()> {
    let at = AtFlags::SYMLINK_NOFOLLOW;
    // Changing the owner clears the set-id bits, so the mode comes after it.
    rustix::fs::chownat(dir, name, Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)), at)?;
    if !is_link {
        rustix::fs::chmodat(dir, name, Mode::from_raw_mode(meta.mode.into()), AtFlags::empty())?;
    }
    let time = Timespec { tv_sec: meta.mtime_s, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(rustix::fs::utimensat(dir, name, &times, at)?)
}
