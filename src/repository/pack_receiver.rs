//! Receiving a pack's stored form: nothing a sender says is believed before it is checked.

use std::io::{Read, Seek, Write};

use super::error::{IoContext, ObjectId, RepositoryError, Result};
use super::frame::{self, HEADER_BYTES, Header, LENGTH_BYTES, PACK_BYTES_MAX, ZeroFrame};
use super::hot::HotWriter;
use super::{Entry, Repository};
use crate::durable::PendingFile;
use crate::sparse::{Run, SparseHasher};
use crate::types::{ByteSize, PackId};

/// How much of an interrupted pack is read at a time when it is gone on with.
const REPLAY_BYTES: usize = 1 << 20;

/// Takes the stored form of one pack in pieces of any size, at most one frame of it in memory.
/// Dropped without [`PackReceiver::finish`] it leaves nothing, unless it was made to be resumed;
/// after an error it never leaves anything.
pub struct PackReceiver {
    repository: Repository,
    id: PackId,
    /// `None` once it was refused.
    pending: Option<PendingFile>,
    hasher: SparseHasher,
    zero: ZeroFrame,
    stored_size_bytes: u64,
    /// What the manifest says, if the caller told.
    expected_plain_bytes: Option<u64>,
    received_bytes: u64,
    /// Known once it came.
    header: Option<Header>,
    plain_bytes: u64,
    expecting: Part,
    /// The part under way.
    part: Vec<u8>,
    plain: Vec<u8>,
    /// What was unpacked to be verified is kept for the composer, if there is room.
    hot: Option<HotWriter>,
    /// A part of it came before, perhaps before a crash.
    resumed: bool,
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
        let pending = self.layout().pending("incoming")?;
        Ok(PackReceiver::new(self.clone(), id, pending, stored_size_bytes))
    }
}

impl PackReceiver {
    pub(super) fn new(
        repository: Repository,
        id: PackId,
        pending: PendingFile,
        stored_size_bytes: u64,
    ) -> Self {
        Self {
            repository,
            id,
            pending: Some(pending),
            hasher: SparseHasher::new(),
            zero: ZeroFrame::default(),
            stored_size_bytes,
            expected_plain_bytes: None,
            received_bytes: 0,
            header: None,
            plain_bytes: 0,
            expecting: Part::Header,
            part: Vec::new(),
            plain: Vec::new(),
            hot: None,
            resumed: false,
        }
    }

    /// Refuses the pack as soon as its header claims another plain size than the manifest says, so
    /// that nobody makes us decompress more than we asked for.
    pub fn expect_plain_size(mut self, plain_size_bytes: u64) -> Self {
        self.expected_plain_bytes = Some(plain_size_bytes);
        self
    }

    pub(super) fn repository(&self) -> &Repository {
        &self.repository
    }

    pub(super) fn id(&self) -> PackId {
        self.id
    }

    /// Goes over what an earlier receiver left in the file, as if it came now.
    pub(super) fn replay(&mut self) -> Result<()> {
        self.resumed = true;
        let Some(pending) = &mut self.pending else { return Ok(()) };
        let path = pending.temporary_path().to_owned();
        let mut file = pending.file().try_clone().at("open", &path)?;
        file.rewind().at("read", &path)?;
        let mut piece = vec![0; REPLAY_BYTES];
        loop {
            let n = file.read(&mut piece).at("read", &path)?;
            if n == 0 {
                return Ok(());
            }
            self.take(&piece[..n]).inspect_err(|_| self.discard())?;
        }
    }

    /// Stored bytes taken so far; after a cut the sender goes on from here.
    pub fn received_bytes(&self) -> u64 {
        self.received_bytes
    }

    /// Takes the next bytes of the stored form.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let taken = self.take(bytes).and_then(|()| match &mut self.pending {
            Some(pending) => {
                let written = pending.file().write_all(bytes);
                written.map_err(|e| {
                    RepositoryError::io("write", pending.temporary_path(), self.stored_size_bytes, e)
                })
            }
            None => Err(self.refused("an earlier part of it was refused".into())),
        });
        taken.inspect_err(|_| self.discard())
    }

    /// Verifies the whole and stores it durably.
    pub fn finish(mut self) -> Result<()> {
        let Some(pending) = self.pending.take() else {
            return Err(self.refused("an earlier part of it was refused".into()));
        };
        if self.received_bytes != self.stored_size_bytes || self.expecting != Part::Nothing {
            let reason =
                format!("it ended after {} of {} stored bytes", self.received_bytes, self.stored_size_bytes);
            pending.discard();
            return Err(self.refused(reason));
        }
        if std::mem::take(&mut self.hasher).finalize() != self.id.0 {
            pending.discard();
            return Err(self.refused("the hash of what was sent is another".into()));
        }
        let entry =
            Entry { plain_bytes: self.plain_bytes, stored_bytes: self.stored_size_bytes, place: None };
        self.repository.store_file(ObjectId::Pack(self.id), pending, &entry)?;
        if let Some(hot) = self.hot.take() {
            hot.keep(&self.repository, &self.id);
        }
        Ok(())
    }

    fn discard(&mut self) {
        if let Some(pending) = self.pending.take() {
            pending.discard();
        }
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
                self.expecting = self.end_part().map_err(|reason| self.refused(reason))?;
                self.part.clear();
            }
        }
        Ok(())
    }

    fn end_part(&mut self) -> Result<Part, String> {
        let left = self.header.map_or(0, |h| h.plain_len(self.plain_bytes));
        match self.expecting {
            Part::Header => self.read_header(),
            Part::Length => {
                let mut length = [0; LENGTH_BYTES];
                length.copy_from_slice(&self.part);
                frame::read_length(length, left).map(|stored_len| Part::Frame { stored_len })
            }
            Part::Frame { .. } => self.read_frame(left),
            Part::Nothing => Ok(Part::Nothing),
        }
    }

    fn read_header(&mut self) -> Result<Part, String> {
        let mut bytes = [0; HEADER_BYTES];
        bytes.copy_from_slice(&self.part);
        let header = Header::read(&bytes, self.stored_size_bytes)?;
        self.header = Some(header);
        match self.expected_plain_bytes {
            Some(expected) if expected != header.plain_bytes => {
                Err(format!("it claims {} plain bytes instead of {expected}", header.plain_bytes))
            }
            _ => {
                self.hot = self.repository.hot_writer(header.plain_bytes);
                Ok(Part::Length)
            }
        }
    }

    fn read_frame(&mut self, plain_len: usize) -> Result<Part, String> {
        let run = if self.zero.is(&self.part, plain_len) {
            Run::Zeros(plain_len as u64)
        } else {
            frame::decompress(&self.part, plain_len, &mut self.plain)?;
            match self.zero.look(&self.part, &self.plain) {
                true => Run::Zeros(plain_len as u64),
                false => Run::Data(&self.plain),
            }
        };
        self.hasher.update_run(run);
        if self.hot.as_mut().is_some_and(|hot| !hot.write(self.plain_bytes, run)) {
            self.hot = None;
        }
        self.plain_bytes += plain_len as u64;
        let whole = self.header.is_some_and(|h| h.plain_bytes == self.plain_bytes);
        Ok(if whole { Part::Nothing } else { Part::Length })
    }

    fn refused(&self, reason: String) -> RepositoryError {
        let object = ObjectId::Pack(self.id);
        if self.resumed {
            return RepositoryError::TornPart { object };
        }
        RepositoryError::Refused { object, reason }
    }
}
