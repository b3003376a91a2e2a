//! Receiving a pack's stored form from a peer: nothing it says is believed before it is checked.

use std::io::Write;

use super::error::{ObjectId, RepositoryError, Result};
use super::frame::{self, HEADER_BYTES, LENGTH_BYTES, PACK_BYTES_MAX};
use super::{Entry, Repository};
use crate::durable::PendingFile;
use crate::types::{ByteSize, PackId};

/// Takes the stored form of one pack in pieces of any size, at most one frame of it in memory.
/// Dropped without [`PackReceiver::finish`], or after an error, it leaves nothing.
pub struct PackReceiver {
    repository: Repository,
    id: PackId,
    pending: PendingFile,
    hasher: blake3::Hasher,
    stored_size_bytes: u64,
    /// What the manifest says, if the caller told.
    expected_plain_bytes: Option<u64>,
    received_bytes: u64,
    /// Known once the header came.
    plain_size_bytes: u64,
    plain_bytes: u64,
    expecting: Part,
    /// The part under way.
    part: Vec<u8>,
    plain: Vec<u8>,
    failed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    Header,
    Length,
    Frame { stored_len: usize },
    Nothing,
}

impl Repository {
    /// Begins to receive pack `id`, whose stored form has `stored_size_bytes` says the sender.
    /// Refuses when there is no room for it.
    pub fn pack_receiver(&self, id: PackId, stored_size_bytes: u64) -> Result<PackReceiver> {
        let object = ObjectId::Pack(id);
        if stored_size_bytes > frame::stored_bytes_max(PACK_BYTES_MAX) {
            let reason = format!("{} is more than a pack may have", ByteSize(stored_size_bytes));
            return Err(RepositoryError::Refused { object, reason });
        }
        self.require_space(stored_size_bytes)?;
        Ok(PackReceiver {
            repository: self.clone(),
            id,
            pending: self.layout().pending("incoming")?,
            hasher: blake3::Hasher::new(),
            stored_size_bytes,
            expected_plain_bytes: None,
            received_bytes: 0,
            plain_size_bytes: 0,
            plain_bytes: 0,
            expecting: Part::Header,
            part: Vec::new(),
            plain: Vec::new(),
            failed: false,
        })
    }
}

impl PackReceiver {
    /// Refuses the pack as soon as its header claims another plain size than the manifest says, so
    /// that nobody makes us decompress more than we asked for.
    pub fn expect_plain_size(mut self, plain_size_bytes: u64) -> Self {
        self.expected_plain_bytes = Some(plain_size_bytes);
        self
    }

    /// Stored bytes taken so far; after a cut the sender goes on from here.
    pub fn received_bytes(&self) -> u64 {
        self.received_bytes
    }

    /// Takes the next bytes of the stored form.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if self.failed {
            return Err(self.refused("an earlier part of it was refused".into()));
        }
        let taken = self.take(bytes);
        self.failed = taken.is_err();
        taken
    }

    /// Verifies the whole and stores it durably.
    pub fn finish(self) -> Result<()> {
        if self.failed || self.received_bytes != self.stored_size_bytes || self.expecting != Part::Nothing {
            let reason =
                format!("it ended after {} of {} stored bytes", self.received_bytes, self.stored_size_bytes);
            return Err(self.refused(reason));
        }
        if self.hasher.finalize() != *self.id.as_bytes() {
            return Err(self.refused("the hash of what was sent is another".into()));
        }
        let entry =
            Entry { plain_bytes: self.plain_bytes, stored_bytes: self.stored_size_bytes, place: None };
        self.repository.store_file(ObjectId::Pack(self.id), self.pending, &entry)
    }

    fn take(&mut self, mut bytes: &[u8]) -> Result<()> {
        if bytes.len() as u64 > self.stored_size_bytes - self.received_bytes {
            return Err(self.refused(format!("more than {} stored bytes came", self.stored_size_bytes)));
        }
        while !bytes.is_empty() {
            let need = match self.expecting {
                Part::Header => HEADER_BYTES,
                Part::Length => LENGTH_BYTES,
                Part::Frame { stored_len } => stored_len,
                Part::Nothing => return Err(self.refused("bytes follow its last frame".into())),
            };
            let (now, later) = bytes.split_at(bytes.len().min(need - self.part.len()));
            self.part.extend_from_slice(now);
            self.received_bytes += now.len() as u64;
            bytes = later;
            if self.part.len() == need {
                self.end_part()?;
            }
        }
        Ok(())
    }

    fn end_part(&mut self) -> Result<()> {
        let left = frame::plain_len(self.plain_size_bytes, self.plain_bytes);
        let next = match self.expecting {
            Part::Header => self.read_header(),
            Part::Length => {
                let mut length = [0; LENGTH_BYTES];
                length.copy_from_slice(&self.part);
                frame::read_length(length, left).map(|stored_len| Part::Frame { stored_len })
            }
            Part::Frame { .. } => self.read_frame(left),
            Part::Nothing => Ok(Part::Nothing),
        };
        self.expecting = next.map_err(|reason| self.refused(reason))?;
        self.pending.file().write_all(&self.part).map_err(|e| {
            RepositoryError::io("write", self.pending.temporary_path(), self.stored_size_bytes, e)
        })?;
        self.part.clear();
        Ok(())
    }

    fn read_header(&mut self) -> Result<Part, String> {
        let mut header = [0; HEADER_BYTES];
        header.copy_from_slice(&self.part);
        self.plain_size_bytes = frame::read_header(&header, self.stored_size_bytes)?;
        match self.expected_plain_bytes {
            Some(expected) if expected != self.plain_size_bytes => {
                Err(format!("it claims {} plain bytes instead of {expected}", self.plain_size_bytes))
            }
            _ => Ok(Part::Length),
        }
    }

    fn read_frame(&mut self, plain_len: usize) -> Result<Part, String> {
        frame::decompress(&self.part, plain_len, &mut self.plain)?;
        self.hasher.update(&self.plain);
        self.plain_bytes += plain_len as u64;
        Ok(if self.plain_bytes == self.plain_size_bytes { Part::Nothing } else { Part::Length })
    }

    fn refused(&self, reason: String) -> RepositoryError {
        RepositoryError::Refused { object: ObjectId::Pack(self.id), reason }
    }
}
