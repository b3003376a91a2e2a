//! Whether the records are the newest: a mark outside the data directory, in memory only, tells a
//! broker that starts again from one that starts from a backup. It holds, for each VM, a digest of who
//! owns it, and which boot of this machine it is of. No mark, or another one, proves nothing: then others are asked.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::migration::records::VmRecord;
use crate::types::codec::Writer;
use crate::types::{Hash, VmId};

/// What the mark says of one VM's record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mark {
    /// This machine, since it was booted, left it as it is.
    Same,
    /// This machine left it otherwise: it was put back, or changed by somebody else.
    Other,
    /// Nothing.
    Unknown,
}

/// The mark as it was found at start.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Marks {
    /// Whether the system has a place for one.
    pub has_place: bool,
    pub of_this_boot: bool,
    /// Digests of who owned each VM.
    pub found: BTreeMap<VmId, Hash>,
}

impl Marks {
    /// Whether this machine was booted since a broker left its mark, or none did. Never where none can be left.
    pub fn is_other_boot(&self) -> bool {
        self.has_place && !self.of_this_boot
    }

    /// What was found of this record at start.
    pub fn mark(&self, record: &VmRecord) -> Mark {
        match self.found.get(&record.spec.id) {
            Some(digest) if *digest == digest_of(record) => Mark::Same,
            Some(_) => Mark::Other,
            None => Mark::Unknown,
        }
    }
}

/// Who owns the VM, by its record.
pub fn digest_of(record: &VmRecord) -> Hash {
    let mut w = Writer::new();
    w.u64(record.epoch);
    w.u8(u8::from(record.is_here()));
    if let Some(given) = record.given_up() {
        w.fixed(given.migration.0.as_bytes());
    }
    Hash::of(&w.into_bytes())
}
