//! Writing a plan: metadata, then the extents, from reflinks where the file system has them, else
//! decompressed straight into place, several packs at once.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::durable::PendingFile;
use crate::repository::{Repository, RepositoryError};
use crate::types::{ByteSize, PackId};

use super::digest::{self, Digest};
use super::error::ComposeError;
use super::plan::{Extent, Plan};

/// An image that is complete but has no name yet.
pub struct PendingImage {
    file: PendingFile,
    temporary: PathBuf,
    pub digest: Digest,
}

/// Writes the image into the compositions' directory under a temporary name.
pub fn write(repository: &Repository, plan: &Plan) -> Result<PendingImage, ComposeError> {
    let dir = repository.compositions_dir();
    require_space(dir, plan.data_bytes())?;
    let target = dir.join("composition");
    let io = |what, path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| no_space_or(source, what, path, plan.data_bytes())
    };
    let mut pending = PendingFile::create(&target).map_err(io("create", &target))?;
    let temporary = pending.temporary_path().to_owned();
    let file = pending.file();
    file.set_len(plan.virtual_size_bytes).map_err(io("size", &temporary))?;
    for (offset, bytes) in &plan.metadata {
        file.write_all_at(bytes, *offset).map_err(io("write", &temporary))?;
    }
    let mut by_pack: HashMap<PackId, Vec<Extent>> = HashMap::new();
    for extent in &plan.extents {
        by_pack.entry(extent.pack).or_default().push(*extent);
    }
    let mut packs: Vec<(PackId, Vec<Extent>)> = by_pack.into_iter().collect();
    // The largest first, so that no core idles at the end.
    packs.sort_by_key(|(id, extents)| (u64::MAX - extents.iter().map(|e| e.len_bytes).sum::<u64>(), *id));
    let file: &File = file;
    let clones = packs.first().is_some_and(|(id, extents)| clone_pack(repository, id, extents, file));
    packs.par_iter().try_for_each(|(id, extents)| {
        if clones && clone_pack(repository, id, extents, file) {
            return Ok(());
        }
        copy_pack(repository, id, extents, file)
    })?;
    let digest = digest::digest(file).map_err(io("read", &temporary))?;
    Ok(PendingImage { file: pending, temporary, digest })
}

impl PendingImage {
    /// Makes it the composition, durable and read-only.
    pub fn keep(self, path: &Path) -> Result<(), ComposeError> {
        let error = |source| ComposeError::Io { what: "keep", path: path.to_owned(), source };
        fs::set_permissions(&self.temporary, fs::Permissions::from_mode(0o444)).map_err(error)?;
        self.file.commit_as(path).map_err(error)
    }
}

/// Shares the pack's blocks with the image; false where the file system cannot.
fn clone_pack(repository: &Repository, id: &PackId, extents: &[Extent], image: &File) -> bool {
    if !reflinks(image) {
        return false;
    }
    let Ok(hot) = repository.hot_pack(id) else { return false };
    extents.iter().all(|e| {
        reflink::clone_range(&hot, e.pack_offset_bytes, image, e.image_offset_bytes, e.len_bytes).is_ok()
    })
}

/// Whether the image's file system can share blocks at all: btrfs, XFS and bcachefs can, and only
/// there is a plain copy of every pack worth having.
fn reflinks(image: &File) -> bool {
    const BTRFS: i64 = 0x9123_683e;
    const XFS: i64 = 0x5846_5342;
    const BCACHEFS: i64 = 0xca45_1a4e;
    rustix::fs::fstatfs(image).is_ok_and(|s| [BTRFS, XFS, BCACHEFS].contains(&(s.f_type as i64)))
}

/// Unpacks a pack once, every piece to all places it belongs to. The pack is verified on the way.
fn copy_pack(
    repository: &Repository,
    id: &PackId,
    extents: &[Extent],
    image: &File,
) -> Result<(), ComposeError> {
    // Sorted by pack offset; a pack range may appear at several places in the image.
    let mut sorted = extents.to_vec();
    sorted.sort_by_key(|e| e.pack_offset_bytes);
    let mut first = 0;
    let placed = repository.read_pack(id, &mut |offset, bytes| {
        let end = offset + bytes.len() as u64;
        while first < sorted.len() && sorted[first].pack_offset_bytes + sorted[first].len_bytes <= offset {
            first += 1;
        }
        for e in sorted[first..].iter().take_while(|e| e.pack_offset_bytes < end) {
            let from = e.pack_offset_bytes.max(offset);
            let to = (e.pack_offset_bytes + e.len_bytes).min(end);
            if from < to {
                let piece = &bytes[(from - offset) as usize..(to - offset) as usize];
                image.write_all_at(piece, e.image_offset_bytes + (from - e.pack_offset_bytes))?;
            }
        }
        Ok(())
    });
    placed.map_err(|e: RepositoryError| ComposeError::Repository(e))
}

fn require_space(dir: &Path, need_bytes: u64) -> Result<(), ComposeError> {
    let stat = rustix::fs::statvfs(dir).map_err(|e| ComposeError::Io {
        what: "look at",
        path: dir.to_owned(),
        source: e.into(),
    })?;
    let have = stat.f_bavail * stat.f_frsize;
    if have < need_bytes {
        return Err(ComposeError::NoSpace {
            dir: dir.to_owned(),
            need: ByteSize(need_bytes),
            have: ByteSize(have),
        });
    }
    Ok(())
}

fn no_space_or(source: io::Error, what: &'static str, path: PathBuf, need_bytes: u64) -> ComposeError {
    if source.kind() == io::ErrorKind::StorageFull {
        let dir = path.parent().unwrap_or(&path).to_owned();
        return ComposeError::NoSpace { dir, need: ByteSize(need_bytes), have: ByteSize(0) };
    }
    ComposeError::Io { what, path, source }
}

mod reflink {
    use std::fs::File;
    use std::io;
    use std::os::fd::AsRawFd;

    use rustix::ioctl::{Setter, ioctl, opcode};

    /// `struct file_clone_range` of linux/fs.h.
    #[repr(C)]
    struct FileCloneRange {
        src_fd: i64,
        src_offset: u64,
        src_length: u64,
        dest_offset: u64,
    }

    const FICLONERANGE: rustix::ioctl::Opcode = opcode::write::<FileCloneRange>(0x94, 13);

    /// Makes a range of `to` share the blocks of a range of `from`.
    pub fn clone_range(from: &File, from_offset: u64, to: &File, to_offset: u64, len: u64) -> io::Result<()> {
        let range = FileCloneRange {
            src_fd: from.as_raw_fd().into(),
            src_offset: from_offset,
            src_length: len,
            dest_offset: to_offset,
        };
        // SAFETY: FICLONERANGE reads one `file_clone_range`, which `range` is; both descriptors
        // are open for as long as the call takes.
        unsafe { ioctl(to, Setter::<FICLONERANGE, FileCloneRange>::new(range)) }.map_err(io::Error::from)
    }
}
