//! Disks in segments of 4 MiB, holes left out: how they are read, hashed, compared and written.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use crate::component::extents::BLOCK_BYTES;
use crate::compose::{Digest, Output, SEGMENT_BYTES, zero_segment};
use crate::disk::{DiskImage, Qcow2};
use crate::durable;
use crate::repository::block_digest;
use crate::sparse;

use super::error::io_error;
use super::{AdoptError, Job, SIZE_UNIT_BYTES};

/// A disk opened for reading.
pub struct Segments {
    path: PathBuf,
    /// A multiple of [`SIZE_UNIT_BYTES`]; what lies beyond the file reads as zeros.
    size_bytes: u64,
    /// False where a segment is known to be zeros.
    may_have_data: Vec<bool>,
    content: Content,
}

enum Content {
    File(File),
    Vm(DiskImage),
}

impl Segments {
    /// A raw disk: a file or a block device.
    pub fn of_file(path: &Path) -> Result<Self, AdoptError> {
        Self::of_open(path, &File::open(path).map_err(io_error("open", path))?)
    }

    /// As [`Segments::of_file`], of what is open.
    pub fn of_open(path: &Path, file: &File) -> Result<Self, AdoptError> {
        let mut file = file.try_clone().map_err(io_error("open", path))?;
        let len = file.seek(io::SeekFrom::End(0)).map_err(io_error("measure", path))?;
        let size_bytes = len.next_multiple_of(SIZE_UNIT_BYTES);
        let mut may_have_data = vec![false; size_bytes.div_ceil(SEGMENT_BYTES) as usize];
        mark_data(&file, len, &mut may_have_data).map_err(io_error("look for holes in", path))?;
        Ok(Self { path: path.to_owned(), size_bytes, may_have_data, content: Content::File(file) })
    }

    /// A VM's root disk: what it wrote over its base.
    pub fn of_vm(overlay: &Path, base: &Path) -> Result<Self, AdoptError> {
        let base_disk = Self::of_file(base)?;
        let image = DiskImage::overlay(overlay, base)?;
        let size_bytes = image.size_bytes();
        let mut may_have_data = base_disk.may_have_data;
        may_have_data.resize(size_bytes.div_ceil(SEGMENT_BYTES) as usize, false);
        let qcow2 = Qcow2::open(overlay)?;
        for run in qcow2.allocated() {
            let run = run?;
            mark(&mut may_have_data, run.offset_bytes..run.offset_bytes + run.len_bytes);
        }
        Ok(Self { path: overlay.to_owned(), size_bytes, may_have_data, content: Content::Vm(image) })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub fn count(&self) -> usize {
        self.may_have_data.len()
    }

    /// The bytes a segment covers.
    pub fn range(&self, number: usize) -> Range<u64> {
        let start = number as u64 * SEGMENT_BYTES;
        start..(start + SEGMENT_BYTES).min(self.size_bytes)
    }

    /// Reads a segment into `buffer`, which has room for a whole one. `None`: it is zeros.
    pub fn read<'b>(&self, number: usize, buffer: &'b mut [u8]) -> Result<Option<&'b [u8]>, AdoptError> {
        if !self.may_have_data.get(number).is_some_and(|d| *d) {
            return Ok(None);
        }
        let range = self.range(number);
        let buffer = &mut buffer[..(range.end - range.start) as usize];
        match &self.content {
            Content::File(file) => {
                read_padded(file, buffer, range.start).map_err(io_error("read", &self.path))?
            }
            Content::Vm(image) => image.read_at(range.start, buffer)?,
        }
        Ok(Some(buffer))
    }

    /// Bytes that will have to be read.
    pub fn data_bytes(&self) -> u64 {
        self.may_have_data.iter().filter(|d| **d).count() as u64 * SEGMENT_BYTES
    }

    /// Writes all of it to `output` with holes for zeros, a new file as one of its owner's only; on failure
    /// nothing is left of that.
    pub fn write_raw(&self, output: Output<'_>, phase: &'static str, job: Job<'_>) -> Result<(), AdoptError> {
        let output = match output {
            Output::New(path) => path,
            Output::Given(path, file) => {
                self.copy_to(file, path, phase, job)?;
                return file.sync_all().map_err(io_error("write", path));
            }
        };
        let part = crate::compose::part_of(output);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part);
        let file = file.map_err(io_error("create", &part))?;
        let written = self.copy_to(&file, &part, phase, job).and_then(|()| {
            file.sync_all().map_err(io_error("write", &part))?;
            let renamed = crate::compose::place(&part, output).and_then(|()| durable::sync_dir_of(output));
            renamed.map_err(io_error("create", output))
        });
        if written.is_err() {
            let _ = std::fs::remove_file(&part);
        }
        written
    }

    fn copy_to(&self, file: &File, path: &Path, phase: &'static str, job: Job<'_>) -> Result<(), AdoptError> {
        file.set_len(self.size_bytes).map_err(io_error("size", path))?;
        let done = Done::new(phase, self.data_bytes(), job);
        (0..self.count()).into_par_iter().try_for_each_init(
            || vec![0; SEGMENT_BYTES as usize],
            |buffer, number| {
                let Some(bytes) = self.read(number, buffer)? else { return Ok(()) };
                sparse::write_at(file, bytes, self.range(number).start).map_err(io_error("write", path))?;
                done.add(SEGMENT_BYTES)
            },
        )
    }
}

/// What a disk is, block by block: 8 bytes of memory for each block of segments that are not zeros.
pub struct DiskBlocks {
    /// For each segment the digests of its blocks; none for a segment of zeros.
    digests: Vec<Vec<u64>>,
    digest: Digest,
    count: u64,
    nonzero_count: u64,
}

impl DiskBlocks {
    /// Reads the whole disk once.
    pub fn read(disk: &Segments, job: Job<'_>) -> Result<Self, AdoptError> {
        let done = Done::new("read", disk.data_bytes(), job);
        let read = (0..disk.count()).into_par_iter().map_init(
            || vec![0; SEGMENT_BYTES as usize],
            |buffer, number| {
                let Some(bytes) = disk.read(number, buffer)? else {
                    return Ok((zero_hash(disk, number), Vec::new()));
                };
                let digests: Vec<u64> = bytes.chunks(BLOCK_BYTES as usize).map(block_digest).collect();
                let hash = blake3::hash(bytes);
                done.add(SEGMENT_BYTES)?;
                Ok((hash, if digests.iter().all(|d| *d == 0) { Vec::new() } else { digests }))
            },
        );
        let (hashes, digests): (Vec<_>, Vec<Vec<u64>>) =
            read.collect::<Result<Vec<_>, AdoptError>>()?.into_iter().unzip();
        let nonzero_count = digests.iter().flatten().filter(|d| **d != 0).count() as u64;
        let count = disk.size_bytes() / BLOCK_BYTES;
        Ok(Self { digests, digest: Digest::of_segments(hashes), count, nonzero_count })
    }

    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    pub fn nonzero_count(&self) -> u64 {
        self.nonzero_count
    }

    /// The digest of a block, 0 for zeros and beyond the end.
    pub fn digest_at(&self, block: u64) -> u64 {
        const PER_SEGMENT: u64 = SEGMENT_BYTES / BLOCK_BYTES;
        let segment = self.digests.get((block / PER_SEGMENT) as usize);
        segment.and_then(|s| s.get((block % PER_SEGMENT) as usize)).copied().unwrap_or(0)
    }

    /// Number and digest of every block that is not zeros, ascending.
    pub fn nonzero(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.digests
            .iter()
            .zip((0..).step_by((SEGMENT_BYTES / BLOCK_BYTES) as usize))
            .flat_map(|(digests, first)| (first..).zip(digests.iter().copied()))
            .filter(|(_, digest)| *digest != 0)
    }
}

/// Counts work done by several threads, and stops them when it was cancelled.
pub(super) struct Done<'a> {
    phase: &'static str,
    done: AtomicU64,
    total: u64,
    job: Job<'a>,
}

impl<'a> Done<'a> {
    pub fn new(phase: &'static str, total: u64, job: Job<'a>) -> Self {
        Self { phase, done: AtomicU64::new(0), total, job }
    }

    pub fn add(&self, bytes: u64) -> Result<(), AdoptError> {
        self.job.check()?;
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        (self.job.progress)(self.phase, done, self.total);
        Ok(())
    }
}

/// What a segment of this disk hashes to if it is zeros.
pub(super) fn zero_hash(disk: &Segments, number: usize) -> blake3::Hash {
    let range = disk.range(number);
    match range.end - range.start {
        SEGMENT_BYTES => zero_segment(),
        short => blake3::hash(&vec![0; short as usize]),
    }
}

fn mark(segments: &mut [bool], range: Range<u64>) {
    let end = (range.end.div_ceil(SEGMENT_BYTES) as usize).min(segments.len());
    let begin = ((range.start / SEGMENT_BYTES) as usize).min(end);
    segments[begin..end].fill(true);
}

/// Marks the segments of a file that are not holes; where the file system keeps no account of holes,
/// all of them.
fn mark_data(file: &File, len: u64, segments: &mut [bool]) -> io::Result<()> {
    sparse::data_runs(file, 0..len).try_for_each(|data| data.map(|data| mark(segments, data)))
}

/// As `read_exact_at`, but what lies beyond the end of the file reads as zeros.
fn read_padded(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match file.read_at(buffer, offset) {
            Ok(0) => {
                buffer.fill(0);
                return Ok(());
            }
            Ok(n) => {
                buffer = &mut buffer[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
