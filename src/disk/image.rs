//! A disk as its guest sees it, whatever the file format.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::error::io_error;
use super::mapping::Mapping;
use super::qcow2::Qcow2;
use super::{DiskError, user_data};

/// A disk opened for reading.
#[derive(Debug)]
pub struct DiskImage {
    path: PathBuf,
    size_bytes: u64,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Overlay { qcow2: Qcow2, base: File, base_path: PathBuf },
    Raw(File),
}

impl DiskImage {
    /// A root disk. The backing file named in the overlay is ignored in favour of `base`: the
    /// caller knows the composition, a disk file is not asked which other file to read.
    pub fn overlay(overlay: &Path, base: &Path) -> Result<Self, DiskError> {
        let qcow2 = Qcow2::open(overlay)?;
        let base_file = File::open(base).map_err(io_error("open", base))?;
        Ok(Self {
            path: overlay.to_owned(),
            size_bytes: qcow2.virtual_size_bytes(),
            content: Content::Overlay { qcow2, base: base_file, base_path: base.to_owned() },
        })
    }

    /// A raw disk.
    pub fn raw(path: &Path) -> Result<Self, DiskError> {
        let file = File::open(path).map_err(io_error("open", path))?;
        let size_bytes = file.metadata().map_err(io_error("stat", path))?.len();
        Ok(Self { path: path.to_owned(), size_bytes, content: Content::Raw(file) })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Fills `buf` with what the guest reads at `offset_bytes`; zeros beyond the end.
    pub fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        match &self.content {
            Content::Overlay { qcow2, base, base_path } => {
                qcow2.read_at(offset_bytes, buf, |offset, part| {
                    read_padded_at(base, part, offset).map_err(io_error("read", base_path))
                })
            }
            Content::Raw(file) => {
                read_padded_at(file, buf, offset_bytes).map_err(io_error("read", &self.path))
            }
        }
    }

    /// Fills `buf` with what the guest would read at `offset_bytes` had it never written:
    /// the composition under an overlay, zeros under a raw disk.
    pub(super) fn read_below(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        match &self.content {
            Content::Overlay { base, base_path, .. } => {
                read_padded_at(base, buf, offset_bytes).map_err(io_error("read", base_path))
            }
            Content::Raw(_) => {
                buf.fill(0);
                Ok(())
            }
        }
    }

    /// Whether an absent block of this disk's map reads as zeros.
    pub(super) fn is_zero_below(&self) -> bool {
        matches!(self.content, Content::Raw(_))
    }

    /// What the tables of an overlay say now; a raw disk has none.
    pub(super) fn mapping(&self) -> Result<Mapping, DiskError> {
        match &self.content {
            Content::Overlay { qcow2, .. } => Mapping::of(qcow2),
            Content::Raw(_) => Ok(Mapping::default()),
        }
    }

    /// Byte ranges that may differ from what lies below, by the tables `mapping` or, for a raw
    /// disk, as the file is now; ascending. All else is known not to differ.
    pub(super) fn written<'a>(
        &'a self,
        mapping: &'a Mapping,
    ) -> Box<dyn Iterator<Item = Result<Range<u64>, DiskError>> + Send + 'a> {
        match &self.content {
            Content::Overlay { .. } => Box::new(mapping.ranges().map(Ok)),
            Content::Raw(file) => Box::new(user_data::data_ranges(file, &self.path, self.size_bytes)),
        }
    }
}

/// As `read_exact_at`, but what lies beyond the end of the file reads as zeros.
pub(super) fn read_padded_at(file: &File, mut buf: &mut [u8], mut offset_bytes: u64) -> io::Result<()> {
    while !buf.is_empty() {
        match file.read_at(buf, offset_bytes) {
            Ok(0) => {
                buf.fill(0);
                return Ok(());
            }
            Ok(n) => {
                buf = &mut buf[n..];
                offset_bytes += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
