//! Reading packs: verified plain bytes, or the stored form as it lies on disk.

use std::fs::File;
use std::io::{self, BufReader, Read};

use super::error::{IoContext, ObjectId, RepositoryError, Result};
use super::frame::{self, HEADER_BYTES, Header, LENGTH_BYTES, STORED_ZERO_BYTES_MAX, ZeroFrame};
use super::parallel::InOrder;
use super::{Entry, Repository};
use crate::sparse::{Run, SparseHasher};
use crate::types::PackId;

/// A pack opened to be sent as it is. The receiver verifies it; so does every reading of plain
/// bytes here.
#[derive(Debug)]
pub struct StoredPack {
    /// Positioned at the start of the stored form.
    pub file: File,
    pub stored_size_bytes: u64,
    pub plain_size_bytes: u64,
    /// Plain bytes of a frame.
    pub frame_bytes: usize,
}

/// A frame of zeros is stored in less than this share of its length.
const STORED_SHARE_OF_ZEROS: usize = 4096;

/// Takes a pack's plain bytes: their offset, and they.
pub type Sink<'s> = &'s mut dyn FnMut(u64, Run<'_>) -> io::Result<()>;

/// Why reading a pack ended early.
enum Failure {
    /// The stored bytes are not the pack.
    Damaged(String),
    Read(io::Error),
    /// The receiver of the bytes refused them.
    Sink(io::Error),
}

impl Repository {
    /// Whether the pack's file is there. Its content is verified when it is read.
    pub fn has_pack(&self, id: &PackId) -> bool {
        self.has_file(&ObjectId::Pack(*id))
    }

    pub fn pack_stored(&self, id: &PackId) -> Result<StoredPack> {
        let object = ObjectId::Pack(*id);
        let mut file = self.open_object(&object)?;
        match open_header(&mut file) {
            Ok((header, stored_size_bytes)) => {
                io::Seek::rewind(&mut file).at("read", &self.layout().object_path(&object))?;
                let Header { plain_bytes: plain_size_bytes, frame_bytes } = header;
                Ok(StoredPack { file, stored_size_bytes, plain_size_bytes, frame_bytes })
            }
            Err(failure) => Err(self.pack_failure(object, &file, failure)),
        }
    }

    /// Passes the plain bytes to `sink` with their offsets, in order, frames of zeros as their length.
    /// The hash is known only at the end: whatever the sink made must not be used unless this returns `Ok`.
    pub fn read_pack(&self, id: &PackId, sink: Sink<'_>) -> Result<()> {
        let object = ObjectId::Pack(*id);
        let mut file = self.open_object(&object)?;
        read_frames(&mut file, id, sink).map_err(|failure| self.pack_failure(object, &file, failure))
    }

    /// How many plain bytes of a pack may be something else than zeros, as far as the sizes of its frames tell:
    /// what unpacking it will take. Nothing is unpacked.
    pub fn pack_data_bytes(&self, id: &PackId) -> Result<u64> {
        let object = ObjectId::Pack(*id);
        let mut file = self.open_object(&object)?;
        data_bytes(&mut file).map_err(|failure| self.pack_failure(object, &file, failure))
    }

    fn pack_failure(&self, object: ObjectId, file: &File, failure: Failure) -> RepositoryError {
        let path = self.layout().object_path(&object);
        match failure {
            Failure::Damaged(reason) => self.damaged(object, file, reason),
            Failure::Read(e) => RepositoryError::io("read", &path, 0, e),
            Failure::Sink(e) => RepositoryError::io("pass on the content of", &path, 0, e),
        }
    }
}

/// Plain and stored size of a pack file, for the index.
pub(super) fn measure(file: &mut File) -> Option<Entry> {
    let (header, stored_bytes) = open_header(file).ok()?;
    Some(Entry { plain_bytes: header.plain_bytes, stored_bytes, place: None })
}

/// Reads the header; the file is positioned behind it.
fn open_header(file: &mut File) -> Result<(Header, u64), Failure> {
    let stored_bytes = file.metadata().map_err(Failure::Read)?.len();
    let mut header = [0; HEADER_BYTES];
    read_exact(file, &mut header)?;
    let header = Header::read(&header, stored_bytes).map_err(Failure::Damaged)?;
    Ok((header, stored_bytes))
}

fn data_bytes(file: &mut File) -> Result<u64, Failure> {
    let (header, _) = open_header(file)?;
    let mut file = BufReader::new(file);
    let (mut begun_bytes, mut data_bytes) = (0, 0);
    while begun_bytes < header.plain_bytes {
        let plain_len = header.plain_len(begun_bytes);
        let mut length = [0; LENGTH_BYTES];
        read_exact(&mut file, &mut length)?;
        let stored_len = frame::read_length(length, plain_len).map_err(Failure::Damaged)?;
        // What is so small for its length is zeros, or as good as.
        if stored_len > (plain_len / STORED_SHARE_OF_ZEROS).min(STORED_ZERO_BYTES_MAX) {
            data_bytes += plain_len as u64;
        }
        file.seek_relative(stored_len as i64).map_err(Failure::Read)?;
        begun_bytes += plain_len as u64;
    }
    Ok(data_bytes)
}

fn read_frames(file: &mut File, id: &PackId, sink: Sink<'_>) -> Result<(), Failure> {
    let (header, stored_bytes) = open_header(file)?;
    let mut file = BufReader::new(file);
    let mut plain = Plain { hasher: SparseHasher::new(), zero: ZeroFrame::default(), passed_bytes: 0, sink };
    let mut decompressing = InOrder::new(2 * header.frame_bytes);
    let mut spare: Vec<Vec<u8>> = Vec::new();
    let mut begun_bytes = 0;
    let mut consumed_bytes = HEADER_BYTES as u64;
    while begun_bytes < header.plain_bytes {
        if decompressing.is_full()
            && let Some(result) = decompressing.pop()
        {
            spare.push(plain.pass(result)?);
        }
        let plain_len = header.plain_len(begun_bytes);
        let mut length = [0; LENGTH_BYTES];
        read_exact(&mut file, &mut length)?;
        let stored_len = frame::read_length(length, plain_len).map_err(Failure::Damaged)?;
        let mut stored = vec![0; stored_len];
        read_exact(&mut file, &mut stored)?;
        begun_bytes += plain_len as u64;
        consumed_bytes += (LENGTH_BYTES + stored_len) as u64;
        if plain.zero.is(&stored, plain_len) {
            while let Some(result) = decompressing.pop() {
                spare.push(plain.pass(result)?);
            }
            plain.give(Run::Zeros(plain_len as u64))?;
            continue;
        }
        let mut bytes = spare.pop().unwrap_or_default();
        decompressing
            .push(move || frame::decompress(&stored, plain_len, &mut bytes).map(|()| (stored, bytes)));
    }
    while let Some(result) = decompressing.pop() {
        plain.pass(result)?;
    }
    if consumed_bytes != stored_bytes {
        let over = stored_bytes.saturating_sub(consumed_bytes);
        return Err(Failure::Damaged(format!("{over} bytes follow its last frame")));
    }
    if plain.hasher.finalize() != id.0 {
        return Err(Failure::Damaged("the hash of its content is another".into()));
    }
    Ok(())
}

/// What comes out of a pack on its way to whoever wants it.
struct Plain<'s> {
    hasher: SparseHasher,
    zero: ZeroFrame,
    passed_bytes: u64,
    sink: Sink<'s>,
}

/// A frame as it is stored, and unpacked.
type Unpacked = (Vec<u8>, Vec<u8>);

impl Plain<'_> {
    /// Passes a frame on; its buffer can be used again.
    fn pass(&mut self, result: io::Result<Result<Unpacked, String>>) -> Result<Vec<u8>, Failure> {
        let (stored, bytes) = result.map_err(Failure::Read)?.map_err(Failure::Damaged)?;
        let is_zero = self.zero.look(&stored, &bytes);
        self.give(if is_zero { Run::Zeros(bytes.len() as u64) } else { Run::Data(&bytes) })?;
        Ok(bytes)
    }

    fn give(&mut self, run: Run<'_>) -> Result<(), Failure> {
        self.hasher.update_run(run);
        (self.sink)(self.passed_bytes, run).map_err(Failure::Sink)?;
        self.passed_bytes += run.len_bytes();
        Ok(())
    }
}

/// A file that ends early is damage; anything else that goes wrong is the system's.
fn read_exact(file: &mut impl Read, out: &mut [u8]) -> Result<(), Failure> {
    file.read_exact(out).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => Failure::Damaged("its file is too short".into()),
        _ => Failure::Read(e),
    })
}
