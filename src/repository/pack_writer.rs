//! Making a pack: contents go in one after the other, hashed and compressed as they come.

use std::io::{self, Seek, SeekFrom, Write};

use super::error::{ObjectId, RepositoryError, Result};
use super::frame::{self, FRAME_BYTES, HEADER_BYTES, Header, PACK_BYTES_MAX, STORED_FRAME_BYTES_MAX};
use super::parallel::InOrder;
use super::{Entry, Repository};
use crate::component::manifest::ALIGNMENT_BYTES;
use crate::durable::PendingFile;
use crate::sparse::{Content, SparseHasher, is_zero};
use crate::types::{Hash, PackId};

/// Frames of a hole that are written in one go.
const ZERO_FRAMES_AT_ONCE: u64 = 1024;

/// Takes the contents of a pack's files. Dropped without [`PackWriter::finish`] it leaves nothing.
pub struct PackWriter {
    repository: Repository,
    pending: PendingFile,
    hasher: SparseHasher,
    plain_bytes: u64,
    stored_bytes: u64,
    /// The frame being filled.
    frame: Frame,
    compressing: InOrder<io::Result<Frame>>,
    /// Buffers to use again.
    spare: Vec<Frame>,
    /// After an error the offsets are not what the caller believes.
    failed: bool,
}

/// Buffers of full size for one frame and what is stored for it, and how much of them is used.
struct Frame {
    plain: Vec<u8>,
    plain_len: usize,
    stored: Vec<u8>,
    stored_len: usize,
}

impl Frame {
    /// Pages nobody touches cost nothing, so small packs need no smaller buffers.
    fn new() -> Self {
        let (plain, stored) = (vec![0; FRAME_BYTES], vec![0; STORED_FRAME_BYTES_MAX]);
        Self { plain, plain_len: 0, stored, stored_len: 0 }
    }
}

impl Repository {
    /// Begins a new pack.
    pub fn pack_writer(&self) -> Result<PackWriter> {
        let mut pending = self.layout().pending("pack")?;
        // The header is filled in at the end.
        let begun = pending.file().write_all(&[0; HEADER_BYTES]);
        begun.map_err(|e| RepositoryError::io("write", pending.temporary_path(), HEADER_BYTES as u64, e))?;
        Ok(PackWriter {
            repository: self.clone(),
            pending,
            hasher: SparseHasher::new(),
            plain_bytes: 0,
            stored_bytes: HEADER_BYTES as u64,
            frame: Frame::new(),
            compressing: InOrder::new(2 * FRAME_BYTES),
            spare: Vec::new(),
            failed: false,
        })
    }
}

impl PackWriter {
    /// Appends exactly `size_bytes` of `content`, padded with zeros to the alignment. Returns where
    /// they begin and their hash. Nothing is appended for an empty content; its offset is 0. Holes are
    /// not read.
    ///
    /// After an error the writer takes nothing more and cannot be finished.
    pub fn append(&mut self, content: &mut dyn Content, size_bytes: u64) -> Result<(u64, Hash)> {
        self.check_usable()?;
        self.failed = true;
        if size_bytes > PACK_BYTES_MAX - self.plain_bytes {
            let rule = format!("{size_bytes} bytes more would exceed the limit of {PACK_BYTES_MAX}");
            return Err(RepositoryError::Invalid { what: "pack size", rule });
        }
        let offset_bytes = if size_bytes == 0 { 0 } else { self.plain_bytes };
        let mut hasher = SparseHasher::new();
        let mut left = size_bytes;
        while left > 0 {
            let hole = content.skip_hole(left).map_err(|e| self.source_error(e, size_bytes))?;
            if hole > 0 {
                hasher.update_zeros(hole);
                self.append_zeros(hole)?;
                left -= hole;
                continue;
            }
            let begin = self.frame.plain_len;
            let take = left.min((FRAME_BYTES - begin) as u64) as usize;
            let room = &mut self.frame.plain[begin..begin + take];
            if let Err(e) = content.read_exact(room) {
                return Err(self.source_error(e, size_bytes));
            }
            if is_zero(room) {
                hasher.update_zeros(take as u64)
            } else {
                hasher.update(room)
            }
            left -= take as u64;
            self.advance(take)?;
        }
        let padding = (size_bytes.next_multiple_of(ALIGNMENT_BYTES) - size_bytes) as usize;
        self.append_zeros(padding as u64)?;
        self.failed = false;
        Ok((offset_bytes, hasher.finalize()))
    }

    /// Plain bytes so far.
    pub fn size_bytes(&self) -> u64 {
        self.plain_bytes
    }

    /// Stores the pack durably, unless it is held already, and returns its id and plain size.
    /// `None` when nothing was appended.
    pub fn finish(mut self) -> Result<Option<(PackId, u64)>> {
        self.check_usable()?;
        if self.plain_bytes == 0 {
            return Ok(None);
        }
        if self.frame.plain_len > 0 {
            self.seal_frame()?;
        }
        while self.write_oldest()? {}
        let id = PackId(std::mem::take(&mut self.hasher).finalize());
        let header = Header { plain_bytes: self.plain_bytes, frame_bytes: FRAME_BYTES }.encode();
        let file = self.pending.file();
        let written = file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(&header));
        written.map_err(|e| self.write_error(e))?;
        let entry = Entry { plain_bytes: self.plain_bytes, stored_bytes: self.stored_bytes, place: None };
        self.repository.store_file(ObjectId::Pack(id), self.pending, &entry)?;
        Ok(Some((id, self.plain_bytes)))
    }

    fn append_zeros(&mut self, mut len_bytes: u64) -> Result<()> {
        while len_bytes > 0 {
            if self.frame.plain_len == 0 && len_bytes >= FRAME_BYTES as u64 {
                let frames = len_bytes / FRAME_BYTES as u64;
                self.write_zero_frames(frames)?;
                len_bytes -= frames * FRAME_BYTES as u64;
                continue;
            }
            let begin = self.frame.plain_len;
            let take = len_bytes.min((FRAME_BYTES - begin) as u64) as usize;
            self.frame.plain[begin..begin + take].fill(0);
            len_bytes -= take as u64;
            self.advance(take)?;
        }
        Ok(())
    }

    /// Writes frames of a hole: they are all the same.
    fn write_zero_frames(&mut self, mut frames: u64) -> Result<()> {
        while self.write_oldest()? {}
        let stored = frame::zero_frame().map_err(|e| self.write_error(e))?;
        self.hasher.update_zeros(frames * FRAME_BYTES as u64);
        self.plain_bytes += frames * FRAME_BYTES as u64;
        self.stored_bytes += frames * stored.len() as u64;
        while frames > 0 {
            let now = frames.min(ZERO_FRAMES_AT_ONCE);
            let written = self.pending.file().write_all(&stored.repeat(now as usize));
            written.map_err(|e| self.write_error(e))?;
            frames -= now;
        }
        Ok(())
    }

    fn advance(&mut self, added_bytes: usize) -> Result<()> {
        self.plain_bytes += added_bytes as u64;
        self.frame.plain_len += added_bytes;
        if self.frame.plain_len == FRAME_BYTES { self.seal_frame() } else { Ok(()) }
    }

    /// Hands the frame to the compressors and begins the next.
    fn seal_frame(&mut self) -> Result<()> {
        if self.compressing.is_full() {
            self.write_oldest()?;
        }
        let next = self.spare.pop().unwrap_or_else(Frame::new);
        let mut full = std::mem::replace(&mut self.frame, next);
        let zeros = is_zero(&full.plain[..full.plain_len]);
        if zeros {
            self.hasher.update_zeros(full.plain_len as u64);
        } else {
            self.hasher.update(&full.plain[..full.plain_len]);
        }
        self.compressing.push(move || {
            if zeros && full.plain_len == FRAME_BYTES {
                let stored = frame::zero_frame()?;
                full.stored[..stored.len()].copy_from_slice(stored);
                full.stored_len = stored.len();
            } else {
                full.stored_len = frame::compress(&full.plain[..full.plain_len], &mut full.stored)?;
            }
            Ok(full)
        });
        Ok(())
    }

    fn write_oldest(&mut self) -> Result<bool> {
        let Some(result) = self.compressing.pop() else { return Ok(false) };
        let compressed = result.and_then(|r| r);
        let mut frame = compressed.map_err(|e| self.write_error(e))?;
        let stored = &frame.stored[..frame.stored_len];
        let written = self.pending.file().write_all(stored);
        written.map_err(|e| self.write_error(e))?;
        self.stored_bytes += frame.stored_len as u64;
        frame.plain_len = 0;
        self.spare.push(frame);
        Ok(true)
    }

    fn check_usable(&self) -> Result<()> {
        if self.failed {
            let rule = "an earlier append failed: begin a new pack".to_owned();
            return Err(RepositoryError::Invalid { what: "pack writer", rule });
        }
        Ok(())
    }

    fn write_error(&self, e: io::Error) -> RepositoryError {
        RepositoryError::io("write", self.pending.temporary_path(), self.plain_bytes, e)
    }

    fn source_error(&self, e: io::Error, size_bytes: u64) -> RepositoryError {
        if e.kind() == io::ErrorKind::UnexpectedEof {
            let rule = format!("it ended before the {size_bytes} bytes it should have; did it change?");
            return RepositoryError::Invalid { what: "content for a pack", rule };
        }
        RepositoryError::io("read content for", self.pending.temporary_path(), 0, e)
    }
}
