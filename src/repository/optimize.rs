//! Compressing what is kept once more, at the strong level: what is stored so is also sent so.

use super::error::{ObjectId, RepositoryError, Result};
use super::frame::{self, Header, LENGTH_BYTES, STRONG_FRAME_BYTES};
use super::parallel::InOrder;
use super::{Entry, Repository};
use crate::sparse::Run;
use crate::types::PackId;

use std::io::{self, Write};

/// What optimising a pack came to, in stored bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Optimized {
    pub before_bytes: u64,
    pub after_bytes: u64,
}

impl Repository {
    /// Whether a pack has been stored at the strong level.
    pub fn is_optimized(&self, id: &PackId) -> Result<bool> {
        Ok(self.pack_stored(id)?.frame_bytes >= STRONG_FRAME_BYTES)
    }

    /// Replaces a pack's stored form by a smaller one. The id, which is of the plain bytes, stays;
    /// who has the old form open keeps it. Takes about 3 s for 10 MB on a core, at the lowest
    /// priority, and 130 MiB of memory for each core. Stops early, and changes nothing, when `stop`
    /// says so.
    pub fn optimize_pack(&self, id: &PackId, stop: &dyn Fn() -> bool) -> Result<Optimized> {
        let object = ObjectId::Pack(*id);
        let before = self.pack_stored(id)?;
        let unchanged =
            Optimized { before_bytes: before.stored_size_bytes, after_bytes: before.stored_size_bytes };
        if before.frame_bytes >= STRONG_FRAME_BYTES {
            return Ok(unchanged);
        }
        let header = Header { plain_bytes: before.plain_size_bytes, frame_bytes: STRONG_FRAME_BYTES };
        let mut pending = self.layout().pending("strong")?;
        let path = pending.temporary_path().to_owned();
        let write_error = |e| RepositoryError::io("write", &path, unchanged.before_bytes, e);
        pending.file().write_all(&header.encode()).map_err(write_error)?;
        let mut compressing: InOrder<io::Result<Vec<u8>>> = InOrder::in_background(16 * STRONG_FRAME_BYTES);
        let mut frame: Vec<u8> = Vec::new();
        // A hole that the frame under way begins with; all of it, as long as nothing else came.
        let mut zeros = 0;
        let mut zero_frame: Option<Vec<u8>> = None;
        let mut write_oldest = |queue: &mut InOrder<io::Result<Vec<u8>>>| match queue.pop() {
            Some(stored) => stored.and_then(|s| s).and_then(|s| pending.file().write_all(&s)).map(|()| true),
            None => Ok(false),
        };
        self.read_pack(id, &mut |offset, run| {
            if stop() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            match run {
                Run::Zeros(len) if frame.is_empty() => zeros += len as usize,
                Run::Zeros(len) => frame.resize(frame.len() + len as usize, 0),
                Run::Data(bytes) => {
                    frame.resize(frame.len() + std::mem::take(&mut zeros), 0);
                    frame.extend_from_slice(bytes);
                }
            }
            if zeros + frame.len() < STRONG_FRAME_BYTES && offset + run.len_bytes() < header.plain_bytes {
                return Ok(());
            }
            if compressing.is_full() {
                write_oldest(&mut compressing)?;
            }
            if zeros == STRONG_FRAME_BYTES {
                zeros = 0;
                let stored = match &zero_frame {
                    Some(stored) => stored.clone(),
                    None => zero_frame.insert(compress(&vec![0; STRONG_FRAME_BYTES])?).clone(),
                };
                compressing.push(move || Ok(stored));
                return Ok(());
            }
            frame.resize(frame.len() + std::mem::take(&mut zeros), 0);
            let plain = std::mem::take(&mut frame);
            compressing.push(move || compress(&plain));
            Ok(())
        })?;
        while write_oldest(&mut compressing).map_err(write_error)? {}
        let after_bytes = pending.file().metadata().map_err(write_error)?.len();
        // A pack too small or too dense to gain is replaced too, so that it is not tried again.
        if after_bytes > unchanged.before_bytes + unchanged.before_bytes / 64 {
            return Ok(unchanged);
        }
        let target = self.layout().object_path(&object);
        // The collector looks at the age and removes under this lock: what is gone stays gone.
        let _held = self.inner.pins.lock();
        if !self.has_file(&object) {
            return Err(RepositoryError::Missing { object });
        }
        self.layout().publish(pending, &target)?;
        let entry = Entry { plain_bytes: header.plain_bytes, stored_bytes: after_bytes, place: None };
        self.index().insert(&object, &entry)?;
        Ok(Optimized { before_bytes: unchanged.before_bytes, after_bytes })
    }
}

/// Length and stored bytes of a frame.
fn compress(plain: &[u8]) -> io::Result<Vec<u8>> {
    let mut stored = vec![0; LENGTH_BYTES + plain.len()];
    let len = frame::compress_strong(plain, &mut stored)?;
    stored.truncate(len);
    Ok(stored)
}
