//! Packs on their way here from another broker, in either form. What came is kept when the link or
//! the broker breaks, and gone on with.

use std::fs::{self, File};
use std::io::{self, BufReader, Seek, Write};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use rustix::fs::FlockOperation;

use super::delta::{self, Failure};
use super::error::{IoContext, ObjectId, RepositoryError, Result};
use super::forms::FormTag;
use super::{PackReceiver, Repository, frame};
use crate::durable::{self, PendingFile};
use crate::types::PackId;

/// The part of a pack's form that is here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PartialPack {
    pub tag: FormTag,
    pub received_bytes: u64,
}

/// What a sender says of the form it sends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IncomingForm {
    pub tag: FormTag,
    /// Of the whole form.
    pub size_bytes: u64,
    /// How much of it is left out because it is here.
    pub offset_bytes: u64,
    pub is_delta: bool,
}

/// Takes the rest of a form. Dropped before [`IncomingPack::finish`], what came stays for the next.
pub enum IncomingPack {
    Stored(Box<PackReceiver>),
    Delta(IncomingDelta),
}

/// A delta as it arrives; applied when it is whole.
pub struct IncomingDelta {
    repository: Repository,
    id: PackId,
    pending: PendingFile,
    size_bytes: u64,
    received_bytes: u64,
    expected_plain_bytes: Option<u64>,
    /// A part of it came before, perhaps before a crash.
    resumed: bool,
}

impl Repository {
    /// The largest part of a pack that came earlier.
    pub fn partial_pack(&self, id: &PackId) -> Option<PartialPack> {
        let partials = fs::read_dir(self.layout().dir("incoming")).ok()?.flatten().filter_map(|entry| {
            let name = entry.file_name();
            let tag = name.to_str()?.strip_prefix(&id.to_string())?.strip_prefix('-')?;
            let tag = u128::from_str_radix(tag, 16).ok()?.to_be_bytes();
            Some(PartialPack { tag, received_bytes: entry.metadata().ok()?.len() })
        });
        partials.filter(|p| p.received_bytes > 0).max_by_key(|p| p.received_bytes)
    }

    /// Goes on receiving a pack, or begins to. `expected_plain_bytes` is what its manifest says.
    pub fn incoming_pack(
        &self,
        id: PackId,
        form: IncomingForm,
        expected_plain_bytes: Option<u64>,
    ) -> Result<IncomingPack> {
        let object = ObjectId::Pack(id);
        let refused = |reason: &str| Err(RepositoryError::Refused { object, reason: reason.into() });
        let plain_bytes = expected_plain_bytes.unwrap_or(frame::PACK_BYTES_MAX);
        if form.size_bytes > frame::stored_bytes_max(plain_bytes) || form.offset_bytes > form.size_bytes {
            return refused("its announced size is not possible");
        }
        self.require_space(form.size_bytes - form.offset_bytes)?;
        let path = self.incoming_path(&id, &form.tag);
        let mut pending = PendingFile::resume(&path).at("open", &path)?;
        // Two migrations may want the same pack at the same time: the second has its own copy.
        if !durable::lock_exclusive(pending.file()).at("lock", &path)? {
            if form.offset_bytes > 0 {
                return Err(RepositoryError::Io {
                    what: "go on with",
                    path,
                    source: io::ErrorKind::WouldBlock.into(),
                });
            }
            pending = self.layout().pending("incoming")?;
        }
        let held_bytes = pending.file().metadata().at("read", &path)?.len();
        if form.offset_bytes == 0 {
            pending.file().set_len(0).at("write", &path)?;
        } else if held_bytes != form.offset_bytes {
            return Err(RepositoryError::TornPart { object });
        }
        if form.is_delta {
            let received_bytes = form.offset_bytes;
            let (repository, size_bytes) = (self.clone(), form.size_bytes);
            return Ok(IncomingPack::Delta(IncomingDelta {
                repository,
                id,
                pending,
                size_bytes,
                received_bytes,
                expected_plain_bytes,
                resumed: form.offset_bytes > 0,
            }));
        }
        let mut receiver = PackReceiver::new(self.clone(), id, pending, form.size_bytes);
        if let Some(size) = expected_plain_bytes {
            receiver = receiver.expect_plain_size(size);
        }
        if form.offset_bytes > 0 {
            receiver.replay()?;
        }
        Ok(IncomingPack::Stored(Box::new(receiver)))
    }

    /// Removes parts nobody went on with for `grace`.
    pub(super) fn trim_incoming(&self, grace: Duration) -> Result<()> {
        let dir = self.layout().dir("incoming");
        for entry in fs::read_dir(&dir).at("list", &dir)? {
            let path = entry.at("list", &dir)?.path();
            let Ok(file) = File::open(&path) else { continue };
            let age = file.metadata().and_then(|m| m.modified());
            let age = age.ok().and_then(|m| SystemTime::now().duration_since(m).ok());
            let busy = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err();
            if !busy && age.is_some_and(|age| age >= grace) {
                fs::remove_file(&path).at("remove", &path)?;
            }
        }
        Ok(())
    }

    /// The pack is here: parts of it, of whatever form, are of no more use.
    fn remove_partials(&self, id: &PackId) {
        let Ok(entries) = fs::read_dir(self.layout().dir("incoming")) else { return };
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with(&id.to_string()) {
                // What stays is removed by the collector.
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn incoming_path(&self, id: &PackId, tag: &FormTag) -> PathBuf {
        self.layout().dir("incoming").join(format!("{id}-{:032x}", u128::from_be_bytes(*tag)))
    }
}

impl IncomingPack {
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            IncomingPack::Stored(receiver) => receiver.write(bytes),
            IncomingPack::Delta(delta) => delta.write(bytes),
        }
    }

    /// Verifies the whole and stores it durably.
    pub fn finish(self) -> Result<()> {
        let (repository, id) = match &self {
            IncomingPack::Stored(receiver) => (receiver.repository().clone(), receiver.id()),
            IncomingPack::Delta(delta) => (delta.repository.clone(), delta.id),
        };
        match self {
            IncomingPack::Stored(receiver) => receiver.finish()?,
            IncomingPack::Delta(delta) => delta.finish()?,
        }
        repository.remove_partials(&id);
        Ok(())
    }
}

impl IncomingDelta {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() as u64 > self.size_bytes - self.received_bytes {
            return Err(self.refused(format!("more than {} bytes of its delta came", self.size_bytes)));
        }
        let written = self.pending.file().write_all(bytes);
        written
            .map_err(|e| RepositoryError::io("write", self.pending.temporary_path(), self.size_bytes, e))?;
        self.received_bytes += bytes.len() as u64;
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        let applied = self.apply();
        // Applied or refused: either way the delta has served.
        if !matches!(applied, Err(RepositoryError::Io { .. } | RepositoryError::NoSpace { .. })) {
            self.pending.discard();
        }
        applied
    }

    fn apply(&mut self) -> Result<()> {
        let path = self.pending.temporary_path().to_owned();
        if self.received_bytes != self.size_bytes {
            return Err(self.refused(format!(
                "its delta ended after {} of {} bytes",
                self.received_bytes, self.size_bytes
            )));
        }
        let mut file = self.pending.file().try_clone().at("open", &path)?;
        file.rewind().at("read", &path)?;
        let mut header = [0; delta::HEADER_BYTES];
        let header = match io::Read::read_exact(&mut file, &mut header) {
            Ok(()) => delta::Header::read(&header).map_err(|reason| self.refused(reason))?,
            Err(_) => return Err(self.refused("its delta is too short".into())),
        };
        if self.expected_plain_bytes.is_some_and(|expected| expected != header.plain_bytes) {
            return Err(self.refused(format!("its delta makes {} bytes", header.plain_bytes)));
        }
        self.repository.require_space(header.plain_bytes)?;
        let base = self.repository.plain_pack(&header.base)?;
        let base = base.bytes(0, base.size_bytes() as usize).at("read", &path)?;
        file.rewind().at("read", &path)?;
        let mut writer = self.repository.pack_writer()?;
        let mut hasher = blake3::Hasher::new();
        let mut failure = None;
        let applied = delta::apply(&mut BufReader::new(file), base, &mut |plain| {
            hasher.update(plain);
            writer.append(&mut &plain[..], plain.len() as u64).map(drop).map_err(|e| {
                failure = Some(e);
                io::ErrorKind::Other.into()
            })
        });
        match (applied, failure) {
            (Ok(()), _) => {}
            (Err(Failure::Wrong(reason)), _) => return Err(self.refused(reason)),
            (Err(Failure::Io(_)), Some(error)) => return Err(error),
            (Err(Failure::Io(source)), None) => return Err(RepositoryError::io("read", &path, 0, source)),
        }
        // Compared before it is stored, so that nothing wrong is.
        if hasher.finalize() != *self.id.as_bytes() {
            return Err(self.refused("its delta makes another".into()));
        }
        writer.finish().map(drop)
    }

    fn refused(&self, reason: String) -> RepositoryError {
        let object = ObjectId::Pack(self.id);
        if self.resumed {
            return RepositoryError::TornPart { object };
        }
        RepositoryError::Refused { object, reason }
    }
}
