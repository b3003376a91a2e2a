//! The form of an archive: a chosen part of a repository in one tar file, or laid out as a
//! directory, for clouds that no link reaches. Specified in `FORMAT.md`, section "Archive".

use std::io::{self, Read, Write};
use std::path::PathBuf;

use crate::types::codec::{CodecError, Reader, Writer};
use crate::types::{ComponentId, Hash};

use super::error::{ObjectId, ObjectKind, RepositoryError};
use super::frame::{self, PACK_BYTES_MAX};
use super::layout::relative_path;
use super::records::record_bytes_max;

/// Magic and version of an archive's index.
const MAGIC: &[u8; 8] = b"CICARC\0\x01";
/// The index's name: the first entry of the tar file, the last file written of a directory.
pub(super) const INDEX_NAME: &str = "cicada-archive";
/// Enough for the objects an archive may hold.
pub(super) const INDEX_BYTES_MAX: u64 = 1 << 28;
const OBJECTS_MAX: u64 = 4_000_000;
const NAMES_MAX: u64 = 1_000_000;
const NAME_BYTES_MAX: u64 = 4096;
/// Unit of a tar file.
const BLOCK_BYTES: usize = 512;

/// Why an archive cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),

    #[error("no component is named here, so there is nothing to export: build or import components first")]
    Nothing,

    #[error("{} cannot take an archive: {reason}", path.display())]
    Target { path: PathBuf, reason: String },

    #[error("{} is there already, and is not written over: name another file", path.display())]
    Occupied { path: PathBuf },

    #[error("{object} was stored anew while it was exported: export again")]
    Changed { object: ObjectId },

    #[error("{} is not an archive of components: {reason}", path.display())]
    NotAnArchive { path: PathBuf, reason: String },

    /// What is there is not what the index says comes now. It was not read.
    #[error("the archive {} holds {found} where {expected} should be: it was changed; get it again", path.display())]
    Unexpected { path: PathBuf, found: String, expected: String },

    /// It is cut off. What came before was verified and stays.
    #[error(
        "the archive {} ends at {at}, after {done} of {total} objects: get the whole of it and import it \
         again; what is held is skipped",
        path.display()
    )]
    Ended { path: PathBuf, at: String, done: usize, total: usize },

    #[error("cannot {what} {}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },

    #[error("it was stopped")]
    Stopped,
}

/// What an archive holds, in the order of its entries.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct ArchiveIndex {
    /// Stored sizes in bytes; strictly ascending, so manifests come before packs.
    pub objects: Vec<(ObjectId, u64)>,
    /// Components that bear a name where the archive was made; strictly ascending.
    pub names: Vec<(ComponentId, String)>,
}

impl ArchiveIndex {
    pub fn stored_bytes(&self) -> u64 {
        self.objects.iter().map(|(_, size)| size).sum()
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::with_magic(MAGIC);
        w.varint(self.objects.len() as u64);
        for (object, stored_bytes) in &self.objects {
            w.u8(object.kind() as u8);
            w.fixed(object.hash_bytes());
            w.varint(*stored_bytes);
        }
        w.varint(self.names.len() as u64);
        for (id, name) in &self.names {
            w.fixed(id.as_bytes());
            w.str(name);
        }
        let mut bytes = w.into_bytes();
        let seal = Hash::of(&bytes);
        bytes.extend_from_slice(seal.as_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        const EXPECTED: &str = "archive index of version 1";
        let invalid = |rule: &str| CodecError::Invalid { what: "archive index", rule: rule.into() };
        let (body, seal) = bytes.split_last_chunk().ok_or(CodecError::Magic { expected: EXPECTED })?;
        let mut r = Reader::with_magic(body, MAGIC, EXPECTED)?;
        if Hash::of(body).as_bytes() != seal {
            return Err(invalid("the hash of its content is another"));
        }
        let mut index = Self::default();
        for _ in 0..r.count("objects of an archive", OBJECTS_MAX, 34)? {
            let kind = r.u8("object kind")?;
            let kind = [ObjectKind::Manifest, ObjectKind::Recipe, ObjectKind::Pack]
                .into_iter()
                .find(|k| *k as u8 == kind)
                .ok_or(CodecError::Unknown { what: "object kind", value: kind.into() })?;
            let object = kind.object(r.array("object id")?);
            let stored_bytes = r.bounded("stored size", stored_bytes_max(kind))?;
            if index.objects.last().is_some_and(|(last, _)| *last >= object) {
                return Err(invalid("its objects are not in order"));
            }
            index.objects.push((object, stored_bytes));
        }
        for _ in 0..r.count("names of an archive", NAMES_MAX, 33)? {
            let id = ComponentId::from_bytes(r.array("component id")?);
            let name = r.str("component name", NAME_BYTES_MAX)?.to_owned();
            if index.names.last().is_some_and(|(last, _)| *last >= id) {
                return Err(invalid("its names are not in order"));
            }
            if index.objects.binary_search_by_key(&ObjectId::Manifest(id), |o| o.0).is_err() {
                return Err(invalid("it names a component it does not hold"));
            }
            index.names.push((id, name));
        }
        r.end()?;
        Ok(index)
    }
}

/// No object of the kind is longer.
fn stored_bytes_max(kind: ObjectKind) -> u64 {
    match kind {
        ObjectKind::Pack => frame::stored_bytes_max(PACK_BYTES_MAX),
        _ => record_bytes_max(kind),
    }
}

/// The name an object has in an archive: the one it has in a repository.
pub(super) fn entry_name(object: &ObjectId) -> String {
    relative_path(object).display().to_string()
}

/// Writes the header of a tar entry.
pub(super) fn write_header(out: &mut dyn Write, name: &str, size_bytes: u64) -> io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_path(name)?;
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(size_bytes);
    header.set_mode(0o644);
    // Equal content gives an equal archive.
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_cksum();
    out.write_all(header.as_bytes())
}

/// Fills up the last block of an entry.
pub(super) fn write_padding(out: &mut dyn Write, size_bytes: u64) -> io::Result<()> {
    out.write_all(&[0; BLOCK_BYTES][..padding(size_bytes) as usize])
}

/// Two blocks of zeros.
pub(super) fn write_end(out: &mut dyn Write) -> io::Result<()> {
    out.write_all(&[0; 2 * BLOCK_BYTES])
}

pub(super) fn padding(size_bytes: u64) -> u64 {
    size_bytes.next_multiple_of(BLOCK_BYTES as u64) - size_bytes
}

/// What stands where a tar header should be.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Header {
    File {
        name: String,
        size_bytes: u64,
    },
    /// Links, devices, extensions, broken headers: in words.
    Other(String),
    /// The block of zeros at the end.
    End,
    /// Nothing.
    Eof,
}

pub(super) fn read_header(from: &mut dyn Read) -> io::Result<Header> {
    let mut block = [0; BLOCK_BYTES];
    let read = read_full(from, &mut block)?;
    if read < BLOCK_BYTES {
        return Ok(Header::Eof);
    }
    if block == [0; BLOCK_BYTES] {
        return Ok(Header::End);
    }
    let header = tar::Header::from_byte_slice(&block);
    // The sum is taken with blanks in its own place.
    let sum: u32 = block
        .iter()
        .zip(0usize..)
        .map(|(b, i)| u32::from(if (148..156).contains(&i) { b' ' } else { *b }))
        .sum();
    if !header.cksum().is_ok_and(|stated| stated == sum) {
        return Ok(Header::Other("something that is no tar entry".into()));
    }
    let name = String::from_utf8_lossy(&header.path_bytes()).into_owned();
    Ok(match (header.entry_type(), header.entry_size()) {
        (tar::EntryType::Regular, Ok(size_bytes)) => Header::File { name, size_bytes },
        (kind, _) => {
            Header::Other(format!("'{}', which is no regular file but of type {kind:?}", name.escape_debug()))
        }
    })
}

/// Reads until `into` is full or nothing follows; says how much came.
pub(super) fn read_full(from: &mut dyn Read, into: &mut [u8]) -> io::Result<usize> {
    let mut read = 0;
    while read < into.len() {
        match from.read(&mut into[read..]) {
            Ok(0) => break,
            Ok(n) => read += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(read)
}
