//! Refs: small durable records under a name, from which everything worth keeping is reached.
//! Specified in `FORMAT.md`, section "Ref".

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Repository;
use super::error::{IoContext, RepositoryError, Result};
use crate::durable;
use crate::types::Hash;
use crate::types::codec::{CodecError, Reader, Writer};

/// Magic and version of a ref file.
const MAGIC: &[u8; 8] = b"CICREF\0\x01";
const NAME_BYTES_MAX: u64 = 4096;
const VALUE_BYTES_MAX: u64 = 1 << 20;

/// What a ref's name and value mean.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RefKind {
    /// `kind/name/version/architecture` -> the 32 bytes of a component id. A root.
    Component = 0,
    /// Opaque: whoever writes it passes what it refers to as extra roots to [`Repository::gc`].
    Vm = 1,
    /// A recipe id in hex -> opaque. The recipe is a root.
    Composition = 2,
    /// Opaque, refers to nothing.
    Trust = 3,
}

impl RefKind {
    pub const ALL: [RefKind; 4] = [RefKind::Component, RefKind::Vm, RefKind::Composition, RefKind::Trust];

    pub fn as_str(self) -> &'static str {
        match self {
            RefKind::Component => "component",
            RefKind::Vm => "vm",
            RefKind::Composition => "composition",
            RefKind::Trust => "trust",
        }
    }
}

impl Repository {
    /// Binds `name` to `value` durably, replacing what it was bound to. Nodes taken before become
    /// durable first, so a ref never outlives what it may name.
    pub fn set_ref(&self, kind: RefKind, name: &str, value: &[u8]) -> Result<()> {
        let (name_bytes, value_bytes) = (name.len() as u64, value.len() as u64);
        if name.is_empty() || name_bytes > NAME_BYTES_MAX || value_bytes > VALUE_BYTES_MAX {
            let rule = format!(
                "a name of 1 to {NAME_BYTES_MAX} bytes and a value of at most {VALUE_BYTES_MAX} are allowed, \
                 not {name_bytes} and {value_bytes}"
            );
            return Err(RepositoryError::Invalid { what: "ref", rule });
        }
        self.flush_nodes()?;
        self.layout().write(&self.ref_path(kind, name), &encode(kind, name, value))
    }

    /// What `name` is bound to, `None` when it is not.
    pub fn get_ref(&self, kind: RefKind, name: &str) -> Result<Option<Vec<u8>>> {
        let found = read(kind, &self.ref_path(kind, name))?;
        Ok(found.map(|(_, value)| value))
    }

    /// All names of a kind with their values, sorted by name. One that cannot be read is an error,
    /// because what it names must not be taken for garbage.
    pub fn list_refs(&self, kind: RefKind) -> Result<Vec<(String, Vec<u8>)>> {
        let dir = self.ref_dir(kind);
        let mut found = Vec::new();
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(found),
            Err(e) => return Err(RepositoryError::io("list", &dir, 0, e)),
        };
        for entry in entries {
            let path = entry.at("list", &dir)?.path();
            found.extend(read(kind, &path)?);
        }
        found.sort();
        Ok(found)
    }

    /// Removes a binding; tells whether there was one.
    pub fn remove_ref(&self, kind: RefKind, name: &str) -> Result<bool> {
        let path = self.ref_path(kind, name);
        let existed = path.exists();
        if existed {
            durable::remove(&path).at("remove", &path)?;
        }
        Ok(existed)
    }

    fn ref_dir(&self, kind: RefKind) -> PathBuf {
        self.layout().dir("refs").join(kind.as_str())
    }

    /// Names may hold any character, so the file is called by the name's hash.
    fn ref_path(&self, kind: RefKind, name: &str) -> PathBuf {
        self.ref_dir(kind).join(Hash::of(name.as_bytes()).to_string())
    }
}

pub(super) fn encode(kind: RefKind, name: &str, value: &[u8]) -> Vec<u8> {
    let mut w = Writer::with_magic(MAGIC);
    w.u8(kind as u8);
    w.str(name);
    w.bytes(value);
    let mut bytes = w.into_bytes();
    let seal = Hash::of(&bytes);
    bytes.extend_from_slice(seal.as_bytes());
    bytes
}

pub(super) fn decode(kind: RefKind, bytes: &[u8]) -> Result<(String, Vec<u8>), CodecError> {
    let (body, seal) = bytes.split_last_chunk().ok_or(CodecError::Magic { expected: "ref of version 1" })?;
    let mut r = Reader::with_magic(body, MAGIC, "ref of version 1")?;
    if Hash::of(body).as_bytes() != seal {
        return Err(CodecError::Invalid { what: "ref", rule: "the hash of its content is another".into() });
    }
    let found = r.u8("ref kind")?;
    if found != kind as u8 {
        return Err(CodecError::Unknown { what: "ref kind", value: found.into() });
    }
    let name = r.str("ref name", NAME_BYTES_MAX)?.to_owned();
    let value = r.bytes("ref value", VALUE_BYTES_MAX)?.to_vec();
    r.end()?;
    Ok((name, value))
}

fn read(kind: RefKind, path: &Path) -> Result<Option<(String, Vec<u8>)>> {
    let damaged =
        |reason: String| RepositoryError::DamagedRef { kind: kind.as_str(), path: path.to_owned(), reason };
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(RepositoryError::io("read", path, 0, e)),
    };
    let (name, value) = decode(kind, &bytes).map_err(|e| damaged(e.to_string()))?;
    // A copy under another name would bind a name nobody bound.
    let belongs = path.file_name().is_some_and(|f| f == Hash::of(name.as_bytes()).to_string().as_str());
    if !belongs {
        return Err(damaged(format!("it belongs to the name '{name}'")));
    }
    Ok(Some((name, value)))
}
