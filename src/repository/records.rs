//! Manifests and recipes: small objects stored whole, compressed, verified at every reading.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::error::{IoContext, ObjectId, ObjectKind, RepositoryError, Result};
use super::{Entry, Repository, frame};
use crate::component::manifest::limit;
use crate::component::{Manifest, Recipe};
use crate::types::codec::CodecError;
use crate::types::{ComponentId, Hash, RecipeId};

/// Magic and version of a stored record. Specified in `FORMAT.md`, section "Record".
const MAGIC: &[u8; 8] = b"CICZST\0\x01";
const HEADER_BYTES: usize = 16;
/// No recipe that decodes is larger.
const RECIPE_BYTES_MAX: u64 = 1 << 20;
/// A record may ask for a window of 8 MiB, the most any level up to 19 does.
const WINDOW_LOG_MAX: u32 = 23;
/// Decoded manifests kept in memory, by the size of their encoding.
const CACHE_BYTES: usize = 4 << 20;

/// The manifests used last, most recent at the end, with the size of their encoding.
#[derive(Default)]
pub(super) struct ManifestCache {
    recent: Mutex<Vec<(ComponentId, usize, Arc<Manifest>)>>,
}

impl Repository {
    /// Stores a manifest, unless it is held. Refuses one that breaks a rule of the format.
    pub fn put_manifest(&self, manifest: &Manifest) -> Result<ComponentId> {
        let bytes = manifest.encode();
        let id = ComponentId::of(&bytes);
        manifest.check().map_err(|e| codec(ObjectId::Manifest(id), e))?;
        self.store_manifest(id, &bytes, manifest)?;
        Ok(id)
    }

    /// Stores a manifest that came as canonical bytes, from a peer for instance: refused unless
    /// they have this id and every rule of the format holds.
    pub fn put_manifest_bytes(&self, id: &ComponentId, bytes: &[u8]) -> Result<()> {
        let object = ObjectId::Manifest(*id);
        require_hash(object, bytes)?;
        let manifest = Manifest::decode(bytes).map_err(|e| codec(object, e))?;
        self.store_manifest(*id, bytes, &manifest)
    }

    pub fn manifest(&self, id: &ComponentId) -> Result<Arc<Manifest>> {
        if let Some(manifest) = self.inner.manifests.get(id) {
            return Ok(manifest);
        }
        let bytes = self.manifest_bytes(id)?;
        let manifest = Manifest::decode(&bytes).map_err(|e| codec(ObjectId::Manifest(*id), e))?;
        let manifest = Arc::new(manifest);
        self.inner.manifests.put(*id, bytes.len(), &manifest);
        Ok(manifest)
    }

    /// The canonical bytes, verified.
    pub fn manifest_bytes(&self, id: &ComponentId) -> Result<Vec<u8>> {
        self.record(ObjectId::Manifest(*id), limit::MANIFEST_BYTES)
    }

    pub fn has_manifest(&self, id: &ComponentId) -> bool {
        self.has_file(&ObjectId::Manifest(*id))
    }

    /// Stores a recipe, unless it is held.
    pub fn put_recipe(&self, recipe: &Recipe) -> Result<RecipeId> {
        let bytes = recipe.encode();
        let id = RecipeId::of(&bytes);
        self.put_recipe_bytes(&id, &bytes)?;
        Ok(id)
    }

    /// As [`Repository::put_manifest_bytes`], for a recipe.
    pub fn put_recipe_bytes(&self, id: &RecipeId, bytes: &[u8]) -> Result<()> {
        let object = ObjectId::Recipe(*id);
        require_hash(object, bytes)?;
        Recipe::decode(bytes).map_err(|e| codec(object, e))?;
        self.store_record(object, bytes)
    }

    pub fn recipe(&self, id: &RecipeId) -> Result<Recipe> {
        Recipe::decode(&self.recipe_bytes(id)?).map_err(|e| codec(ObjectId::Recipe(*id), e))
    }

    /// The canonical bytes, verified.
    pub fn recipe_bytes(&self, id: &RecipeId) -> Result<Vec<u8>> {
        self.record(ObjectId::Recipe(*id), RECIPE_BYTES_MAX)
    }

    pub fn has_recipe(&self, id: &RecipeId) -> bool {
        self.has_file(&ObjectId::Recipe(*id))
    }

    fn store_manifest(&self, id: ComponentId, bytes: &[u8], manifest: &Manifest) -> Result<()> {
        self.store_record(ObjectId::Manifest(id), bytes)?;
        self.index().put_summary(&id, manifest)
    }

    fn store_record(&self, object: ObjectId, bytes: &[u8]) -> Result<()> {
        let mut pending = self.layout().pending("record")?;
        let failed =
            |e| RepositoryError::io("write", &self.layout().object_path(&object), bytes.len() as u64, e);
        let stored = encode(bytes).map_err(failed)?;
        pending.file().write_all(&stored).map_err(failed)?;
        let entry = Entry { plain_bytes: bytes.len() as u64, stored_bytes: stored.len() as u64, place: None };
        self.store_file(object, pending, &entry)
    }

    /// A record's bytes, verified; a damaged one is set aside.
    fn record(&self, object: ObjectId, limit_bytes: u64) -> Result<Vec<u8>> {
        let mut file = self.open_object(&object)?;
        let mut stored = Vec::new();
        // What does not compress takes a little more than its plain size.
        let read = (&mut file).take(2 * limit_bytes).read_to_end(&mut stored);
        read.at("read", &self.layout().object_path(&object))?;
        let plain = decode(&stored, limit_bytes).and_then(|plain| match Hash::of(&plain) {
            hash if hash.as_bytes() == object.hash_bytes() => Ok(plain),
            _ => Err("the hash of its content is another".into()),
        });
        plain.map_err(|reason| self.damaged(object, &file, reason))
    }

    pub(super) fn manifest_cache(&self) -> &ManifestCache {
        &self.inner.manifests
    }
}

/// Longest stored form that is read of a record: what does not compress takes a little more than
/// its plain size.
pub(super) fn record_bytes_max(kind: ObjectKind) -> u64 {
    2 * plain_bytes_max(kind)
}

fn plain_bytes_max(kind: ObjectKind) -> u64 {
    if kind == ObjectKind::Recipe { RECIPE_BYTES_MAX } else { limit::MANIFEST_BYTES }
}

/// The canonical bytes in a record's stored form, not held against the object's id.
pub(super) fn unpack(object: &ObjectId, stored: &[u8]) -> Result<Vec<u8>, String> {
    decode(stored, plain_bytes_max(object.kind()))
}

/// Reads and verifies a manifest's file; the file is positioned at its start again.
pub(super) fn load_manifest(file: &mut File, id: &ComponentId) -> Result<Manifest, String> {
    let mut stored = Vec::new();
    let read = file.take(2 * limit::MANIFEST_BYTES).read_to_end(&mut stored);
    read.and_then(|_| file.rewind()).map_err(|e| e.to_string())?;
    let plain = decode(&stored, limit::MANIFEST_BYTES)?;
    if ComponentId::of(&plain) != *id {
        return Err("the hash of its content is another".into());
    }
    Manifest::decode(&plain).map_err(|e| e.to_string())
}

/// Plain and stored size of a record file, for the index.
pub(super) fn measure(file: &mut File) -> Option<Entry> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact(&mut header).ok()?;
    let (magic, size) = header.split_first_chunk()?;
    (magic == MAGIC).then_some(())?;
    let plain_bytes = u64::from_le_bytes(size.try_into().ok()?);
    Some(Entry { plain_bytes, stored_bytes: file.metadata().ok()?.len(), place: None })
}

pub(super) fn encode(plain: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stored = MAGIC.to_vec();
    stored.extend_from_slice(&(plain.len() as u64).to_le_bytes());
    stored.extend(zstd::bulk::compress(plain, frame::LEVEL)?);
    Ok(stored)
}

/// The claimed size is only compared, never allocated.
pub(super) fn decode(stored: &[u8], limit_bytes: u64) -> Result<Vec<u8>, String> {
    let short = || "its file is too short".to_owned();
    let (magic, rest) = stored.split_first_chunk().ok_or_else(short)?;
    let (size, compressed) = rest.split_first_chunk().ok_or_else(short)?;
    if magic != MAGIC {
        return Err("it does not begin with the magic of a record of version 1".into());
    }
    let claimed_bytes = u64::from_le_bytes(*size);
    let mut plain = Vec::new();
    zstd::Decoder::with_buffer(compressed)
        .and_then(|mut d| d.window_log_max(WINDOW_LOG_MAX).map(|()| d))
        .and_then(|d| d.take(limit_bytes + 1).read_to_end(&mut plain))
        .map_err(|e| format!("it does not decompress: {e}"))?;
    if plain.len() as u64 != claimed_bytes || claimed_bytes > limit_bytes {
        return Err(format!("it claims {claimed_bytes} plain bytes and has others"));
    }
    Ok(plain)
}

fn require_hash(object: ObjectId, bytes: &[u8]) -> Result<()> {
    if Hash::of(bytes).as_bytes() == object.hash_bytes() {
        return Ok(());
    }
    Err(RepositoryError::Refused { object, reason: "the hash of what was sent is another".into() })
}

fn codec(object: ObjectId, source: CodecError) -> RepositoryError {
    RepositoryError::Codec { what: object.to_string(), source }
}

impl ManifestCache {
    fn recent(&self) -> MutexGuard<'_, Vec<(ComponentId, usize, Arc<Manifest>)>> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, id: &ComponentId) -> Option<Arc<Manifest>> {
        let mut recent = self.recent();
        let found = recent.iter().position(|(held, ..)| held == id)?;
        let entry = recent.remove(found);
        let manifest = Arc::clone(&entry.2);
        recent.push(entry);
        Some(manifest)
    }

    fn put(&self, id: ComponentId, size_bytes: usize, manifest: &Arc<Manifest>) {
        let mut recent = self.recent();
        recent.retain(|(held, ..)| *held != id);
        recent.push((id, size_bytes, Arc::clone(manifest)));
        let mut used: usize = recent.iter().map(|(_, size, _)| size).sum();
        // The newest stays however large it is.
        while used > CACHE_BYTES && recent.len() > 1 {
            used -= recent.remove(0).1;
        }
    }

    pub fn clear(&self) {
        self.recent().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_of_more_than_8_mib_is_refused() {
        // One raw block whose frame asks for a window of 2^(10 + n) bytes.
        let stored = |n: u8| {
            let frame = [&[0x28, 0xb5, 0x2f, 0xfd, 0, n << 3, 0x21, 0, 0][..], b"abcd"].concat();
            [MAGIC.as_slice(), &4u64.to_le_bytes(), &frame].concat()
        };
        assert_eq!(decode(&stored(13), 100), Ok(b"abcd".to_vec()));
        let refused = decode(&stored(14), 100).unwrap_err();
        assert!(refused.starts_with("it does not decompress"), "{refused}");
    }
}
