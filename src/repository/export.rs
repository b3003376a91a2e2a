//! Exporting: what chosen components and recipes reach, as an archive.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use crate::durable::{self, PendingFile};
use crate::types::{ComponentId, RecipeId};

use super::archive::{
    ArchiveError, ArchiveIndex, INDEX_NAME, entry_name, write_end, write_header, write_padding,
};
use super::error::{IoContext, ObjectId, ObjectKind, RepositoryError};
use super::{Pin, Repository};

const PIECE_BYTES: usize = 256 << 10;

type Result<T, E = ArchiveError> = std::result::Result<T, E>;

/// Told the stored bytes done and in all; answers whether to go on.
pub type GoOn<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// A chosen part of a repository, kept from being collected while this lives.
#[derive(Debug)]
pub struct Export {
    repository: Repository,
    index: ArchiveIndex,
    _pin: Pin,
}

/// What an archive holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ArchiveContent {
    pub components: u64,
    pub recipes: u64,
    pub packs: u64,
    /// Components that bear a name.
    pub names: u64,
    pub stored_bytes: u64,
}

impl Repository {
    /// Chooses what `components` and `recipes` reach; all components that have a name, and the
    /// recipes that need nothing else, if both are empty. All of it must be held.
    pub fn export(&self, components: &[ComponentId], recipes: &[RecipeId]) -> Result<Export> {
        let bound: BTreeMap<ComponentId, String> =
            self.bound_components()?.into_iter().map(|(name, id)| (id, name)).collect();
        let everything = components.is_empty() && recipes.is_empty();
        let mut waiting = components.to_vec();
        if everything {
            waiting.extend(bound.keys());
        }
        let mut sizes: BTreeMap<ObjectId, u64> = BTreeMap::new();
        // Pinned before they are looked at; what they lead to is pinned with them.
        let mut roots: Vec<_> = recipes.iter().map(|id| ObjectId::Recipe(*id)).collect();
        roots.extend(waiting.iter().map(|id| ObjectId::Manifest(*id)));
        let pin = self.pin(roots);
        for id in recipes {
            waiting.extend(self.recipe(id)?.components);
            sizes.insert(ObjectId::Recipe(*id), self.stored_bytes(&ObjectId::Recipe(*id))?);
        }
        while let Some(id) = waiting.pop() {
            let object = ObjectId::Manifest(id);
            if sizes.contains_key(&object) {
                continue;
            }
            let manifest = self.manifest(&id)?;
            sizes.insert(object, self.stored_bytes(&object)?);
            waiting.extend(&manifest.requires);
            for pack in &manifest.packs {
                if let Entry::Vacant(new) = sizes.entry(ObjectId::Pack(pack.id)) {
                    new.insert(self.pack_stored(&pack.id)?.stored_size_bytes);
                }
            }
        }
        if everything {
            for id in self.recipes()? {
                let complete = |id: &ComponentId| sizes.contains_key(&ObjectId::Manifest(*id));
                if self.recipe(&id)?.components.iter().all(complete) {
                    sizes.insert(ObjectId::Recipe(id), self.stored_bytes(&ObjectId::Recipe(id))?);
                }
            }
        }
        if sizes.is_empty() {
            return Err(ArchiveError::Nothing);
        }
        let names =
            bound.into_iter().filter(|(id, _)| sizes.contains_key(&ObjectId::Manifest(*id))).collect();
        let index = ArchiveIndex { objects: sizes.into_iter().collect(), names };
        Ok(Export { repository: self.clone(), index, _pin: pin })
    }

    fn stored_bytes(&self, object: &ObjectId) -> Result<u64, RepositoryError> {
        let file = self.open_object(object)?;
        Ok(file.metadata().at("inspect", &self.layout().object_path(object))?.len())
    }
}

impl Export {
    pub fn content(&self) -> ArchiveContent {
        ArchiveContent::of(&self.index)
    }

    /// Writes the archive to `path`: as a directory if there is one of that name or the path ends
    /// in `/`, else as a tar file, which takes its name when it is complete; a pipe or a device of
    /// characters, such as a tape, is written to directly. A file that is there and a disk are
    /// refused. Says how many bytes were there already.
    pub fn write(&self, path: &Path, go_on: GoOn<'_>) -> Result<u64> {
        if path.is_dir() || path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return self.write_tree(path, go_on);
        }
        let failed = |source| io_error("write", path, source);
        // Of a link that leads nowhere, itself.
        let there = fs::metadata(path).or_else(|_| fs::symlink_metadata(path));
        let kind = there.ok().map(|meta| meta.file_type());
        if kind.is_some_and(|kind| kind.is_file() || kind.is_symlink() || kind.is_block_device()) {
            return Err(ArchiveError::Occupied { path: path.to_owned() });
        }
        if kind.is_some() {
            let mut out = OpenOptions::new().write(true).open(path).map_err(failed)?;
            self.write_tar(&mut out, path, go_on)?;
        } else {
            let mut pending = PendingFile::create(path).map_err(failed)?;
            self.write_tar(pending.file(), path, go_on)?;
            pending.commit().map_err(failed)?;
        }
        Ok(0)
    }

    /// Writes the archive as a tar file into one that is open, or a pipe; `path` is for messages.
    pub fn write_into(&self, file: &File, path: &Path, go_on: GoOn<'_>) -> Result<()> {
        let failed = |source| io_error("write", path, source);
        let mut out = file.try_clone().map_err(failed)?;
        self.write_tar(&mut out, path, go_on)?;
        match out.metadata().map_err(failed)?.is_file() {
            true => out.sync_all().map_err(failed),
            false => Ok(()),
        }
    }

    fn write_tar(&self, out: &mut File, path: &Path, go_on: GoOn<'_>) -> Result<()> {
        let failed = |source| io_error("write", path, source);
        let (mut done, total) = (0, self.index.stored_bytes());
        let index = self.index.encode();
        write_header(out, INDEX_NAME, index.len() as u64)
            .and_then(|()| out.write_all(&index))
            .and_then(|()| write_padding(out, index.len() as u64))
            .map_err(failed)?;
        for (object, size) in &self.index.objects {
            let mut stored = self.open(object, *size)?;
            write_header(out, &entry_name(object), *size).map_err(failed)?;
            copy(&mut stored, *size, out, path, &mut |n| go_on(done + n, total))?;
            write_padding(out, *size).map_err(failed)?;
            done += size;
        }
        write_end(out).map_err(failed)
    }

    /// The index comes last: a directory without it was not finished. Files that are there with
    /// the right size are left, so that it can be gone on with.
    fn write_tree(&self, dir: &Path, go_on: GoOn<'_>) -> Result<u64> {
        if dir.join("cicada-repository").exists() {
            let reason = "it is a repository itself; choose another directory".to_owned();
            return Err(ArchiveError::Target { path: dir.to_owned(), reason });
        }
        let failed = |path: &Path, source| io_error("write", path, source);
        fs::create_dir_all(dir).map_err(|e| failed(dir, e))?;
        let index_path = dir.join(INDEX_NAME);
        durable::remove(&index_path).map_err(|e| failed(&index_path, e))?;
        let (mut done, mut skipped, total) = (0, 0, self.index.stored_bytes());
        for (object, size) in &self.index.objects {
            let path = dir.join(entry_name(object));
            if fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file() && meta.len() == *size) {
                skipped += size;
            } else {
                let mut stored = self.open(object, *size)?;
                let parent = path.parent().unwrap_or(dir);
                fs::create_dir_all(parent).map_err(|e| failed(parent, e))?;
                let mut pending = PendingFile::create(&path).map_err(|e| failed(&path, e))?;
                copy(&mut stored, *size, pending.file(), &path, &mut |n| go_on(done + n, total))?;
                pending.commit().map_err(|e| failed(&path, e))?;
            }
            done += size;
            if !go_on(done, total) {
                return Err(ArchiveError::Stopped);
            }
        }
        durable::write(&index_path, &self.index.encode()).map_err(|e| failed(&index_path, e))?;
        Ok(skipped)
    }

    /// An object's stored form, after it was verified.
    fn open(&self, object: &ObjectId, size_bytes: u64) -> Result<File> {
        let repository = &self.repository;
        match object {
            ObjectId::Manifest(id) => drop(repository.manifest_bytes(id)?),
            ObjectId::Recipe(id) => drop(repository.recipe_bytes(id)?),
            // To find damage here is better than to carry it to where it cannot be healed.
            ObjectId::Pack(id) => repository.read_pack(id, &mut |_, _| Ok(()))?,
            ObjectId::Node(_) => return Err(RepositoryError::Missing { object: *object }.into()),
        }
        let file = repository.open_object(object)?;
        let path = repository.layout().object_path(object);
        let now_bytes = file.metadata().map_err(|e| io_error("inspect", &path, e))?.len();
        if now_bytes != size_bytes {
            return Err(ArchiveError::Changed { object: *object });
        }
        Ok(file)
    }
}

impl ArchiveContent {
    pub(super) fn of(index: &ArchiveIndex) -> Self {
        let count = |kind| index.objects.iter().filter(|(o, _)| o.kind() == kind).count() as u64;
        Self {
            components: count(ObjectKind::Manifest),
            recipes: count(ObjectKind::Recipe),
            packs: count(ObjectKind::Pack),
            names: index.names.len() as u64,
            stored_bytes: index.stored_bytes(),
        }
    }
}

fn copy(
    from: &mut File,
    size_bytes: u64,
    to: &mut dyn Write,
    path: &Path,
    go_on: &mut dyn FnMut(u64) -> bool,
) -> Result<()> {
    let failed = |source| io_error("write", path, source);
    let mut buffer = vec![0; PIECE_BYTES];
    let mut done = 0;
    while done < size_bytes {
        let n = (size_bytes - done).min(PIECE_BYTES as u64) as usize;
        from.read_exact(&mut buffer[..n]).map_err(failed)?;
        to.write_all(&buffer[..n]).map_err(failed)?;
        done += n as u64;
        if !go_on(done) {
            return Err(ArchiveError::Stopped);
        }
    }
    Ok(())
}

/// An I/O error outside the repository; a full disk says how much is free there.
pub(super) fn io_error(what: &'static str, path: &Path, source: io::Error) -> ArchiveError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            RepositoryError::io(what, path, 0, source).into()
        }
        _ => ArchiveError::Io { what, path: path.to_owned(), source },
    }
}
