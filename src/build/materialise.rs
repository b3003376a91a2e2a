//! A component as a directory again, exactly: what a program is built on is the OS as every VM has
//! it, not as some machine's package tools made it today.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};

use super::acl;
use super::error::BuildError;
use super::fragments;
use crate::component::manifest::{Entry, EntryKind, Manifest, Meta, show};
use crate::repository::Repository;
use crate::types::ComponentId;

/// The directory of a component's tree in the cache, made if it is not there yet.
pub fn cached(repository: &Repository, cache: &Path, id: &ComponentId) -> Result<PathBuf, BuildError> {
    let path = cache.join("trees").join(id.to_string());
    if path.is_dir() {
        return Ok(path);
    }
    let unfinished = path.with_extension("unfinished");
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).map_err(BuildError::write(&unfinished))?;
    }
    let manifest = repository.manifest(id)?;
    materialise(repository, &manifest, &unfinished)?;
    fs::rename(&unfinished, &path).map_err(BuildError::write(&path))?;
    Ok(path)
}

/// Writes a component's tree into the new directory `target`.
pub fn materialise(repository: &Repository, manifest: &Manifest, target: &Path) -> Result<(), BuildError> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(target).map_err(BuildError::write(target))?;
    let mut packs = Vec::new();
    for pack in &manifest.packs {
        packs.push(repository.hot_pack(&pack.id)?);
    }
    // A checked manifest has directories first and nothing below a link, so no path leads outside.
    for entry in &manifest.entries {
        write_entry(&packs, entry, target).map_err(|source| BuildError::Tree {
            root: target.to_owned(),
            path: show(&entry.path),
            source,
        })?;
    }
    for fragment in &manifest.fragments {
        let path = target.join(as_path(&fragment.path));
        let content = fragments::render(fragment);
        let written = fs::write(&path, content).and_then(|()| set_meta(&path, &fragment.meta));
        written.map_err(BuildError::write(&path))?;
    }
    // Writing into a directory changes its time: directories come last, the deepest first.
    for entry in manifest.entries.iter().rev().filter(|e| e.kind == EntryKind::Directory) {
        let path = target.join(as_path(&entry.path));
        set_meta(&path, &entry.meta).map_err(BuildError::write(&path))?;
    }
    Ok(())
}

fn write_entry(packs: &[File], entry: &Entry, target: &Path) -> io::Result<()> {
    let path = target.join(as_path(&entry.path));
    match &entry.kind {
        EntryKind::Directory if entry.path.is_empty() => {}
        EntryKind::Directory => fs::DirBuilder::new().mode(0o700).create(&path)?,
        EntryKind::File { size_bytes, pack, offset_bytes, .. } => {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            if *size_bytes > 0 {
                let pack = packs.get(*pack as usize).ok_or_else(|| io::Error::other("names no pack"))?;
                copy_range(pack, *offset_bytes, *size_bytes, &mut file)?;
            }
        }
        EntryKind::Symlink { target: to } => std::os::unix::fs::symlink(as_path(to), &path)?,
        EntryKind::HardLink { target: to } => return fs::hard_link(target.join(as_path(to)), &path),
        EntryKind::CharDevice { major, minor } => {
            make_node(&path, FileType::CharacterDevice, rustix::fs::makedev(*major, *minor))?
        }
        EntryKind::BlockDevice { major, minor } => {
            make_node(&path, FileType::BlockDevice, rustix::fs::makedev(*major, *minor))?
        }
        EntryKind::Fifo => make_node(&path, FileType::Fifo, 0)?,
        EntryKind::Socket => make_node(&path, FileType::Socket, 0)?,
        // Only what is built on another component removes something.
        EntryKind::Whiteout => return Ok(()),
    }
    set_meta(&path, &entry.meta)?;
    for (name, value) in &entry.xattrs {
        let value = if acl::is_acl(name) {
            acl::from_disk(value).ok_or_else(|| io::Error::other(format!("{name} is no POSIX ACL")))?
        } else {
            value.clone()
        };
        rustix::fs::lsetxattr(&path, name, &value, XattrFlags::empty())?;
    }
    Ok(())
}

fn copy_range(pack: &File, offset_bytes: u64, size_bytes: u64, target: &mut File) -> io::Result<()> {
    let mut reader = RangeReader { file: pack, at: offset_bytes, left: size_bytes };
    if io::copy(&mut reader, target)? == size_bytes {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// Reads a part of a file without moving its position, so several can read it.
pub(super) struct RangeReader<'a> {
    pub file: &'a File,
    pub at: u64,
    pub left: u64,
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

fn make_node(path: &Path, kind: FileType, device: u64) -> io::Result<()> {
    Ok(rustix::fs::mknodat(rustix::fs::CWD, path, kind, Mode::from_raw_mode(0o600), device)?)
}

fn set_meta(path: &Path, meta: &Meta) -> io::Result<()> {
    let (cwd, at) = (rustix::fs::CWD, AtFlags::SYMLINK_NOFOLLOW);
    // Changing the owner clears the set-id bits, so the mode comes after it.
    rustix::fs::chownat(cwd, path, Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)), at)?;
    if !path.is_symlink() {
        rustix::fs::chmodat(cwd, path, Mode::from_raw_mode(meta.mode.into()), AtFlags::empty())?;
    }
    let time = Timespec { tv_sec: meta.mtime_s, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(rustix::fs::utimensat(cwd, path, &times, at)?)
}

fn as_path(bytes: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    PathBuf::from(std::ffi::OsStr::from_bytes(bytes))
}
