//! The forms a pack is sent in: as it is stored, or as the delta from a pack the receiver holds.
//! Deltas are made when they are first asked for, one at a time, and kept in a cache.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::error::{IoContext, RepositoryError, Result};
use super::{Repository, delta};
use crate::types::PackId;

/// Packs larger than this are only diffed ahead of time, never while somebody waits.
const LIVE_BYTES_MAX: u64 = 256 << 20;
/// No delta is made of packs larger than this.
const BYTES_MAX: u64 = 4 << 30;
/// Bases a pack is compared with: each may take seconds.
const COMPARED_MAX: usize = 2;
/// A delta must save at least this part of the stored form.
const SAVED_PART_MIN: u64 = 8;
/// What the cache keeps, the most recently used first.
const CACHE_BYTES_MAX: u64 = 4 << 30;
/// How much of a file's beginning makes its tag.
const TAGGED_BYTES: u64 = 64 << 10;

/// Tells one form of a pack from another, so that half of one is not completed with half of
/// another. No proof of anything: the pack's id is.
pub type FormTag = [u8; 16];

/// A pack opened to be sent.
#[derive(Debug)]
pub struct PackForm {
    pub file: File,
    pub size_bytes: u64,
    pub tag: FormTag,
    /// What the stored form has; for a delta, what it saves the sending of.
    pub stored_size_bytes: u64,
    /// The pack a delta leans on.
    pub base: Option<PackId>,
}

impl Repository {
    /// Opens the smallest form of a pack for a receiver that holds `bases`, or the one it has a part
    /// of. May take seconds when a delta has to be made.
    pub fn pack_form(&self, id: &PackId, bases: &[PackId], begun: Option<FormTag>) -> Result<PackForm> {
        let mut stored = self.pack_stored(id)?;
        let stored_size_bytes = stored.stored_size_bytes;
        let tag = tag_of(&mut stored.file, stored_size_bytes).at("read", self.dir())?;
        let mut best =
            PackForm { file: stored.file, size_bytes: stored_size_bytes, tag, stored_size_bytes, base: None };
        if begun == Some(best.tag) {
            return Ok(best);
        }
        let known = bases.iter().filter(|base| *base != id && self.has_pack(base));
        for base in known.take(COMPARED_MAX) {
            let made = self.delta(id, base, LIVE_BYTES_MAX, delta::LEVEL, stored_size_bytes);
            let opened = made.and_then(|file| match file {
                Some(file) => self.delta_form(file, base, stored_size_bytes).map(Some),
                None => Ok(None),
            });
            match opened {
                Ok(Some(form)) if begun == Some(form.tag) => return Ok(form),
                Ok(Some(form)) if form.size_bytes < best.size_bytes => best = form,
                Ok(_) => {}
                // Without the delta more travels, that is all.
                Err(error) => tracing::warn!(pack = %id, %base, %error, "no delta made"),
            }
        }
        Ok(best)
    }

    /// Makes the delta of a pack from an older one ahead of time, at the strong level, and tells its
    /// size; `None` where it would not be worth it.
    pub fn prepare_delta(&self, id: &PackId, base: &PackId) -> Result<Option<u64>> {
        let stored = self.pack_stored(id)?.stored_size_bytes;
        let path = self.delta_path(id, base);
        let mark = strong_mark(&path);
        // One made in haste is replaced.
        if fs::metadata(&path).is_ok_and(|held| held.len() > 0) && !mark.exists() {
            fs::remove_file(&path).at("remove", &path)?;
        }
        let Some(file) = self.delta(id, base, BYTES_MAX, delta::STRONG_LEVEL, stored)? else {
            return Ok(None);
        };
        File::create(&mark).at("create", &mark)?;
        Ok(Some(file.metadata().at("read", self.dir())?.len()))
    }

    /// The size of a delta that is ready to be sent; nothing is made.
    pub fn held_delta_bytes(&self, id: &PackId, base: &PackId) -> Option<u64> {
        fs::metadata(self.delta_path(id, base)).ok().map(|m| m.len()).filter(|len| *len > 0)
    }

    /// The delta from the cache, or made now. An empty file says that none is worth it.
    fn delta(
        &self,
        id: &PackId,
        base: &PackId,
        bytes_max: u64,
        level: i32,
        stored_bytes: u64,
    ) -> Result<Option<File>> {
        if !self.has_pack(base) {
            return Ok(None);
        }
        let path = self.delta_path(id, base);
        // One at a time: each takes memory, and who waited may find it done.
        let _turn = self.inner.diffing.lock().unwrap_or_else(|e| e.into_inner());
        if let Ok(file) = File::open(&path) {
            let is_delta = file.metadata().at("read", &path)?.len() > 0;
            // Its age says when it was used last; failing to renew it costs a little work later.
            let _ = file.set_modified(SystemTime::now());
            return Ok(is_delta.then_some(file));
        }
        let sizes = [self.pack_stored(id)?.plain_size_bytes, self.pack_stored(base)?.plain_size_bytes];
        if sizes.iter().any(|size| *size > bytes_max) {
            return Ok(None);
        }
        self.require_space(sizes[0] + sizes[1] + stored_bytes)?;
        let (new, old) = (self.plain_pack(id)?, self.plain_pack(base)?);
        let [new, old] = [&new, &old].map(|pack| pack.bytes(0, pack.size_bytes() as usize));
        let (new, old) = (new.at("read", self.dir())?, old.at("read", self.dir())?);
        let mut pending = self.layout().pending("delta")?;
        let limit = stored_bytes - stored_bytes / SAVED_PART_MIN;
        let worth = delta::encode(new, (*base, old), level, limit, pending.file())
            .map_err(|e| RepositoryError::io("write", &path, limit, e))?;
        if !worth {
            pending.file().set_len(0).at("write", &path)?;
        }
        self.layout().publish(pending, &path)?;
        let file = File::open(&path).at("open", &path)?;
        Ok(worth.then_some(file))
    }

    fn delta_form(&self, mut file: File, base: &PackId, stored_size_bytes: u64) -> Result<PackForm> {
        let size_bytes = file.metadata().at("read", self.dir())?.len();
        let tag = tag_of(&mut file, size_bytes).at("read", self.dir())?;
        Ok(PackForm { file, size_bytes, tag, stored_size_bytes, base: Some(*base) })
    }

    fn delta_path(&self, id: &PackId, base: &PackId) -> PathBuf {
        let id = id.to_string();
        self.layout().dir("deltas").join(&id[..2]).join(format!("{id}-{base}"))
    }

    /// Removes deltas whose packs are gone, and the least recently used over the limit.
    pub(super) fn trim_deltas(&self) -> Result<()> {
        let mut kept = Vec::new();
        let dir = self.layout().dir("deltas");
        for fan in fs::read_dir(&dir).at("list", &dir)? {
            let fan = fan.at("list", &dir)?.path();
            for file in fs::read_dir(&fan).at("list", &fan)? {
                let path = file.at("list", &fan)?.path();
                let useful = packs_of(&path).is_some_and(|ids| ids.iter().all(|id| self.has_pack(id)));
                let is_mark = path.extension().is_some();
                match fs::metadata(&path) {
                    // It goes with its delta.
                    Ok(_) if useful && is_mark && path.with_extension("").exists() => {}
                    Ok(meta) if useful && !is_mark => kept.push((meta.modified().ok(), meta.len(), path)),
                    _ => fs::remove_file(&path).at("remove", &path)?,
                }
            }
        }
        kept.sort();
        let mut used: u64 = kept.iter().map(|(_, len, _)| len).sum();
        for (_, len, path) in kept {
            if used <= CACHE_BYTES_MAX {
                break;
            }
            // The mark first: a delta without one is only made again.
            let mark = strong_mark(&path);
            if mark.exists() {
                fs::remove_file(&mark).at("remove", &mark)?;
            }
            fs::remove_file(&path).at("remove", &path)?;
            used -= len;
        }
        Ok(())
    }
}

/// There when the delta was made at the strong level.
fn strong_mark(delta: &Path) -> PathBuf {
    delta.with_extension("strong")
}

/// The pack and its base from a delta's file name.
fn packs_of(path: &Path) -> Option<[PackId; 2]> {
    let (id, base) = path.file_stem()?.to_str()?.split_once('-')?;
    Some([id.parse().ok()?, base.parse().ok()?])
}

fn tag_of(file: &mut File, size_bytes: u64) -> std::io::Result<FormTag> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&size_bytes.to_le_bytes());
    file.rewind()?;
    let mut first = Vec::new();
    file.by_ref().take(TAGGED_BYTES).read_to_end(&mut first)?;
    hasher.update(&first);
    file.rewind()?;
    let mut tag = [0; 16];
    tag.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    Ok(tag)
}
