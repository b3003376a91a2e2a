//! Level 3: what a broker's core takes in, kept in a file, and a core stepped through it again. The format is
//! `RECORDING.md`. Since a core decides by its inputs alone, a recording tells why it did what it did: it is what
//! an operator attaches to a report.

mod recorder;
mod replay;
#[cfg(test)]
mod tests;
mod told;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::broker::continuity::Marks;
use crate::broker::{Effect, Input};
use crate::clock::UnixMillis;
use crate::federation::Keyring;
use crate::types::{Hash, PublicKey, Successions, VmId};
use crate::vm::hypervisor::Features;

pub use recorder::Recorder;
pub use replay::{Difference, Replay, Step};
pub use told::{RecordedBook, RecordedKey, Told};

/// The version of the format.
pub const FORMAT: u32 = 1;
/// A longer line is none of ours.
const LINE_BYTES_MAX: u64 = 256 << 20;
const CHECK_DIGITS: usize = 16;

/// What a core began with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Header {
    pub format: u32,
    pub release: String,
    pub key: PublicKey,
    /// The settings in effect, as in `federation.toml`, all paths absolute.
    pub config: String,
    pub keyring: Keyring,
    pub successions: Successions,
    pub features: Features,
    pub transfer_addresses: Vec<String>,
    pub vms_dir: PathBuf,
    pub disk_dirs: BTreeMap<VmId, Vec<String>>,
    pub marks: Marks,
    pub now_ms: UnixMillis,
    pub after_restore: bool,
    pub told: Told,
}

/// A line after the first.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Step { at_ms: UnixMillis, input: Box<Input>, told: Told, effects: Vec<Decided> },
    End { end: End },
}

/// Why nothing follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    Limit,
    Stopped,
}

/// An effect, as it is told apart: its name, and digits of the hash of its text.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Decided(pub String, pub String);

impl Decided {
    fn of(effect: &Effect) -> Self {
        let text = format!("{effect:?}");
        let kind = text.find(|c: char| !c.is_alphanumeric()).map_or(text.as_str(), |end| &text[..end]);
        Self(kind.to_owned(), digits(&[text.as_bytes()]))
    }
}

/// Why a recording cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum RecordingError {
    #[error("cannot {action} it")]
    Io {
        action: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("is no recording: its first line is none of a broker's")]
    Foreign,
    #[error("has format {found}; this release reads format {FORMAT}")]
    Format { found: u64 },
    #[error("line {line} was altered, or does not follow the one before it")]
    Altered { line: u64 },
    #[error("line {line} is not what this release writes")]
    Malformed {
        line: u64,
        #[source]
        source: serde_json::Error,
    },
    #[error("line {line} is longer than {LINE_BYTES_MAX} bytes")]
    TooLong { line: u64 },
    #[error("its broker cannot begin")]
    Beginning(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The first digits of the hash of these bytes.
fn digits(parts: &[&[u8]]) -> String {
    let mut text = Hash::of(&parts.concat()).to_string();
    text.truncate(CHECK_DIGITS);
    text
}

/// What `fuzz/` reads recordings by.
#[cfg(fuzzing)]
pub mod fuzzing {
    use super::{CHECK_DIGITS, RecordingError, digits, replay::Lines};

    /// How many lines follow the first.
    pub fn read(bytes: &[u8]) -> Result<u64, RecordingError> {
        let mut lines = Lines::of(bytes);
        lines.header()?;
        let mut entries = 0;
        while lines.entry()?.is_some() {
            entries += 1;
        }
        Ok(entries)
    }

    /// These lines with checks that fit.
    pub fn sealed(lines: &str) -> String {
        let mut check = "0".repeat(CHECK_DIGITS);
        let sealed = lines.split('\n').map(|json| {
            check = digits(&[check.as_bytes(), json.as_bytes()]);
            format!("{check} {json}\n")
        });
        sealed.collect()
    }
}
