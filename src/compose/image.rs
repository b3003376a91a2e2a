//! Writing a plan. First the packs that cannot be read from anywhere are put in place: blocks shared
//! with the pack's plain copy where the file system can, else unpacked straight into the image. Then
//! the image is gone through once, segment by segment on all cores: what is still missing is read
//! from the plan or from plain copies of packs and written, and every segment is hashed on the way.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rayon::prelude::*;

use crate::durable::PendingFile;
use crate::repository::{PlainPack, Repository};
use crate::sparse::{self, Run, SparseFile};
use crate::types::{ByteSize, PackId};

use super::digest::{Digest, SEGMENT_BYTES, zero_segment};
use super::error::ComposeError;
use super::plan::{Extent, Plan};
use super::reflink;

/// What is read, hashed and written at a time: few system calls, and it stays in a core's cache.
const WINDOW_BYTES: u64 = 256 << 10;

/// Called with the bytes done and the bytes to do, from any thread.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// An image that is complete but has no name yet. Dropped, it is gone.
pub struct PendingImage {
    file: PendingFile,
    pub digest: Digest,
    pub timing: Timing,
}

/// How plain copies of packs are used. They were verified when they were made, which may be long ago.
#[derive(Clone, Copy, Debug)]
pub struct PlainCopies {
    /// Their blocks can be shared with the image, so one is made of every pack.
    pub clones: bool,
    /// Read them through before, and unpack anew what is damaged: for when no expected digest tells.
    pub verified: bool,
}

/// Where the time of a composition went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timing {
    /// From components to the plan.
    pub plan: Duration,
    /// Cloning, and unpacking what has no plain copy.
    pub place: Duration,
    /// Writing the rest and hashing everything.
    pub write: Duration,
    /// Making it durable.
    pub sync: Duration,
}

/// Writes the image under a temporary name.
pub fn write(
    repository: &Repository,
    plan: &Plan,
    copies: PlainCopies,
    progress: Progress<'_>,
) -> Result<PendingImage, ComposeError> {
    let dir = repository.temporary_dir();
    let writer = Writer { repository, plan, copies, dir, progress, done_bytes: AtomicU64::new(0) };
    let new_bytes = if copies.clones { plan.metadata_bytes() } else { writer.data_bytes()? };
    writer.require_space(new_bytes)?;
    let target = dir.join("composition");
    let mut pending = PendingFile::create(&target).map_err(|e| writer.error("create", &target, e))?;
    let path = pending.temporary_path().to_owned();
    let image: &File = pending.file();
    image.set_len(plan.virtual_size_bytes).map_err(|e| writer.error("size", &path, e))?;

    let begun = Instant::now();
    let mut pieces = writer.place_packs(image)?;
    let place = begun.elapsed();

    let begun = Instant::now();
    let held = plan.metadata.iter().map(|(offset, bytes)| Piece {
        image_offset_bytes: *offset,
        len_bytes: bytes.len() as u64,
        source: Source::Bytes(bytes),
    });
    pieces.extend(held);
    pieces.sort_by_key(|p| p.image_offset_bytes);
    let digest = writer.write_segments(image, &path, &pieces)?;
    let timing = Timing { place, write: begun.elapsed(), ..Timing::default() };
    Ok(PendingImage { file: pending, digest, timing })
}

impl PendingImage {
    /// Makes it the composition, durable and read-only.
    pub fn keep(self, path: &Path) -> Result<Timing, ComposeError> {
        let error = |source| ComposeError::Io { what: "keep", path: path.to_owned(), source };
        let begun = Instant::now();
        let permissions = fs::Permissions::from_mode(0o444);
        fs::set_permissions(self.file.temporary_path(), permissions).map_err(error)?;
        self.file.commit_as(path).map_err(error)?;
        Ok(Timing { sync: begun.elapsed(), ..self.timing })
    }
}

/// A run of the image's bytes and where they are to be had.
struct Piece<'a> {
    image_offset_bytes: u64,
    len_bytes: u64,
    source: Source<'a>,
}

impl Piece<'_> {
    fn end_bytes(&self) -> u64 {
        self.image_offset_bytes + self.len_bytes
    }
}

enum Source<'a> {
    Bytes(&'a [u8]),
    /// A plain copy of a pack, with the offset of the piece in it.
    Pack(Arc<PlainPack>, u64),
    /// They are in the image already.
    Image,
}

struct Writer<'a> {
    repository: &'a Repository,
    plan: &'a Plan,
    copies: PlainCopies,
    dir: &'a Path,
    progress: Progress<'a>,
    done_bytes: AtomicU64,
}

impl<'a> Writer<'a> {
    /// Brings every pack's extents into the image, or says from which file they can be read.
    fn place_packs(&self, image: &File) -> Result<Vec<Piece<'a>>, ComposeError> {
        let mut by_pack: HashMap<PackId, Vec<Extent>> = HashMap::new();
        for extent in &self.plan.extents {
            by_pack.entry(extent.pack).or_default().push(*extent);
        }
        let mut packs: Vec<(PackId, Vec<Extent>)> = by_pack.into_iter().collect();
        // The largest first, so that no core idles at the end.
        let size = |extents: &[Extent]| extents.iter().map(|e| e.len_bytes).sum::<u64>();
        packs.sort_by_key(|(id, extents)| (u64::MAX - size(extents), *id));
        let pieces: Vec<Vec<Piece<'a>>> = packs
            .par_iter()
            .map(|(id, extents)| match self.plain_copy(id)? {
                Some((file, pack)) => {
                    check_reach(id, pack.size_bytes(), extents)?;
                    self.pieces_of(&file, pack, extents, image)
                }
                None => self.unpack(id, extents, image),
            })
            .collect::<Result<_, ComposeError>>()?;
        Ok(pieces.into_iter().flatten().collect())
    }

    /// Only where blocks can be shared is a plain copy worth making; one that is there is used. What
    /// cannot be mapped, because there are too many, is unpacked.
    fn plain_copy(&self, id: &PackId) -> Result<Option<(File, PlainPack)>, ComposeError> {
        let file = match self.repository.held_hot_pack(id)? {
            Some(file) if !self.copies.verified || is_pack(&file, id) => file,
            Some(_) => {
                tracing::warn!(pack = %id, "its plain copy is damaged: run 'cicada repo check'; unpacking it anew");
                return Ok(None);
            }
            None if self.copies.clones => self.repository.hot_pack(id)?,
            None => return Ok(None),
        };
        Ok(PlainPack::new(&file).ok().map(|pack| (file, pack)))
    }

    /// Shares the blocks of what can be shared; the rest is left to be read from the pack. Its holes are
    /// the image's.
    fn pieces_of(
        &self,
        file: &File,
        pack: PlainPack,
        extents: &[Extent],
        image: &File,
    ) -> Result<Vec<Piece<'a>>, ComposeError> {
        let pack = Arc::new(pack);
        let mut pieces = Vec::with_capacity(extents.len());
        for e in extents {
            for data in sparse::data_runs(file, e.pack_offset_bytes..e.pack_offset_bytes + e.len_bytes) {
                let data = data.map_err(|source| self.error("read", &self.dir.join("hot"), source))?;
                let (from, len_bytes) = (data.start, data.end - data.start);
                let image_offset_bytes = e.image_offset_bytes + (from - e.pack_offset_bytes);
                let is_shared = self.copies.clones
                    && reflink::clone_range(file, from, image, image_offset_bytes, len_bytes).is_ok();
                let source = if is_shared { Source::Image } else { Source::Pack(pack.clone(), from) };
                pieces.push(Piece { image_offset_bytes, len_bytes, source });
            }
        }
        Ok(pieces)
    }

    /// Unpacks a pack once, every run to all places it belongs to, and tells where that is. The pack is
    /// verified on the way.
    fn unpack(&self, id: &PackId, extents: &[Extent], image: &File) -> Result<Vec<Piece<'a>>, ComposeError> {
        let mut coming = extents.to_vec();
        coming.sort_by_key(|e| u64::MAX - e.pack_offset_bytes);
        let mut current: Vec<Extent> = Vec::new();
        let mut pieces = Vec::new();
        let mut failure = None;
        let mut size_bytes = 0;
        let unpacked = self.repository.read_pack(id, &mut |offset, run| {
            let end = offset + run.len_bytes();
            size_bytes = end;
            while coming.last().is_some_and(|e| e.pack_offset_bytes < end) {
                current.extend(coming.pop());
            }
            // The image is new: there are zeros already.
            if let Run::Data(bytes) = run {
                for e in &current {
                    let from = e.pack_offset_bytes.max(offset);
                    let to = (e.pack_offset_bytes + e.len_bytes).min(end);
                    let run = &bytes[(from - offset) as usize..(to - offset) as usize];
                    let image_offset_bytes = e.image_offset_bytes + (from - e.pack_offset_bytes);
                    sparse::write_at(image, run, image_offset_bytes).map_err(|error| {
                        let kind = error.kind();
                        failure = Some(error);
                        io::Error::from(kind)
                    })?;
                    pieces.push(Piece { image_offset_bytes, len_bytes: to - from, source: Source::Image });
                }
            }
            current.retain(|e| e.pack_offset_bytes + e.len_bytes > end);
            Ok(())
        });
        match (unpacked, failure) {
            (Err(_), Some(error)) => Err(self.error("write", &self.dir.join("composition"), error)),
            (unpacked, _) => {
                unpacked?;
                check_reach(id, size_bytes, extents)?;
                Ok(pieces)
            }
        }
    }

    /// One pass over the image: writes what is not in it yet and hashes all of it.
    fn write_segments(
        &self,
        image: &File,
        path: &Path,
        pieces: &[Piece<'_>],
    ) -> Result<Digest, ComposeError> {
        let size_bytes = self.plan.virtual_size_bytes;
        let total_bytes = pieces.iter().map(|p| p.len_bytes).sum();
        let segments = (0..size_bytes.div_ceil(SEGMENT_BYTES))
            .into_par_iter()
            .map_init(
                || vec![0u8; WINDOW_BYTES as usize],
                |buffer, i| {
                    let start = i * SEGMENT_BYTES;
                    let end = (start + SEGMENT_BYTES).min(size_bytes);
                    let mine = pieces_within(pieces, start, end);
                    if mine.is_empty() && end - start == SEGMENT_BYTES {
                        return Ok(zero_segment());
                    }
                    let mut hasher = blake3::Hasher::new();
                    for at in (start..end).step_by(WINDOW_BYTES as usize) {
                        let until = (at + WINDOW_BYTES).min(end);
                        let buffer = &mut buffer[..(until - at) as usize];
                        let bytes = write_window(image, buffer, at, pieces_within(mine, at, until))
                            .map_err(|e| self.error("write", path, e))?;
                        hasher.update(bytes);
                    }
                    self.report(mine, start, end, total_bytes);
                    Ok(hasher.finalize())
                },
            )
            .collect::<Result<Vec<_>, ComposeError>>()?;
        Ok(Digest::of_segments(segments))
    }

    fn report(&self, pieces: &[Piece<'_>], start: u64, end: u64, total_bytes: u64) {
        let inside = |p: &Piece<'_>| p.end_bytes().min(end) - p.image_offset_bytes.max(start);
        let bytes: u64 = pieces.iter().map(inside).sum();
        let done = self.done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        (self.progress)(done, total_bytes);
    }

    /// What the image will take on the disk, holes of packs not counted.
    fn data_bytes(&self) -> Result<u64, ComposeError> {
        let mut by_pack: HashMap<PackId, u64> = HashMap::new();
        for e in &self.plan.extents {
            *by_pack.entry(e.pack).or_default() += e.len_bytes;
        }
        let mut bytes = self.plan.metadata_bytes();
        for (id, len_bytes) in by_pack {
            let stored = self.repository.pack_stored(&id)?;
            let holes = stored.plain_size_bytes.saturating_sub(self.repository.pack_data_bytes(&id)?);
            bytes += len_bytes.saturating_sub(holes);
        }
        Ok(bytes)
    }

    fn require_space(&self, need_bytes: u64) -> Result<(), ComposeError> {
        let have_bytes = self.repository.free_bytes()?;
        if have_bytes < need_bytes { Err(self.no_space(need_bytes, have_bytes)) } else { Ok(()) }
    }

    fn no_space(&self, need_bytes: u64, have_bytes: u64) -> ComposeError {
        ComposeError::NoSpace {
            dir: self.dir.to_owned(),
            need: ByteSize(need_bytes),
            have: ByteSize(have_bytes),
        }
    }

    fn error(&self, what: &'static str, path: &Path, source: io::Error) -> ComposeError {
        if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            let need_bytes = self.data_bytes().unwrap_or_else(|_| self.plan.data_bytes());
            return self.no_space(need_bytes, self.repository.free_bytes().unwrap_or(0));
        }
        ComposeError::Io { what, path: path.to_owned(), source }
    }
}

/// What a manifest says of a pack's size was never held against the pack.
fn check_reach(pack: &PackId, size_bytes: u64, extents: &[Extent]) -> Result<(), ComposeError> {
    match extents.iter().map(|e| e.pack_offset_bytes + e.len_bytes).max() {
        Some(need_bytes) if need_bytes > size_bytes => {
            Err(ComposeError::ShortPack { pack: *pack, need_bytes })
        }
        _ => Ok(()),
    }
}

/// The pieces, which are sorted and disjoint, that have bytes between `start` and `end`.
fn pieces_within<'p, 'a>(pieces: &'p [Piece<'a>], start: u64, end: u64) -> &'p [Piece<'a>] {
    let pieces = &pieces[pieces.partition_point(|p| p.end_bytes() <= start)..];
    &pieces[..pieces.partition_point(|p| p.image_offset_bytes < end)]
}

/// Writes what is new of the image's bytes from `start` on, and returns all of them, as many as
/// `buffer` has room for.
fn write_window<'b>(
    image: &File,
    buffer: &'b mut [u8],
    start: u64,
    pieces: &'b [Piece<'_>],
) -> io::Result<&'b [u8]> {
    let end = start + buffer.len() as u64;
    // Nearly always a window lies within one pack; then nothing is copied but into the image.
    if let [Piece { image_offset_bytes, source: Source::Pack(pack, offset), .. }] = pieces
        && *image_offset_bytes <= start
        && end <= pieces[0].end_bytes()
    {
        let bytes = pack.bytes(offset + (start - image_offset_bytes), buffer.len())?;
        sparse::write_at(image, bytes, start)?;
        return Ok(bytes);
    }
    let mut cursor = 0;
    let mut written = 0..0;
    for piece in pieces {
        let from = piece.image_offset_bytes.max(start);
        let to = piece.end_bytes().min(end);
        let range = (from - start) as usize..(to - start) as usize;
        let skipped = from - piece.image_offset_bytes;
        buffer[cursor..range.start].fill(0);
        let room = &mut buffer[range.clone()];
        match &piece.source {
            Source::Bytes(bytes) => room.copy_from_slice(&bytes[skipped as usize..][..room.len()]),
            Source::Pack(pack, offset) => room.copy_from_slice(pack.bytes(offset + skipped, room.len())?),
            Source::Image => image.read_exact_at(room, from)?,
        }
        if !matches!(piece.source, Source::Image) {
            if written.end != range.start {
                sparse::write_at(image, &buffer[written.clone()], start + written.start as u64)?;
                written.start = range.start;
            }
            written.end = range.end;
        }
        cursor = range.end;
    }
    buffer[cursor..].fill(0);
    sparse::write_at(image, &buffer[written.clone()], start + written.start as u64)?;
    Ok(buffer)
}

fn is_pack(file: &File, id: &PackId) -> bool {
    let found = file.try_clone().and_then(|file| sparse::hash_of(&mut SparseFile::new(file)));
    found.is_ok_and(|found| found == id.0)
}
