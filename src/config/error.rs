//! What is wrong with a configuration: where, why, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use crate::path_owner::Exposure;

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("there is none at {}", paths(searched))]
    NotFound { searched: Vec<PathBuf> },
    #[error("cannot be read")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("is not TOML: {reason}")]
    Syntax { path: PathBuf, reason: String },
    /// `origin` is the file, environment variable or flag the value came from.
    #[error("{reason}")]
    Field { origin: String, field: String, reason: String, next_step: String },
    #[error("can be read by others (mode {mode:03o})")]
    Exposed { path: PathBuf, mode: u32 },
    /// Somebody else could put another file or directory in its place.
    #[error("is not safe from other users: {exposure}")]
    Replaceable { path: PathBuf, exposure: Exposure },
    #[error("{reason}")]
    Secret { path: PathBuf, reason: &'static str, next_step: &'static str },
    #[error("cannot be written")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl ConfigError {
    pub(super) fn field(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Field {
            origin: String::new(),
            field: field.into(),
            reason: reason.into(),
            next_step: String::new(),
        }
    }

    pub(super) fn next(mut self, step: impl Into<String>) -> Self {
        if let Self::Field { next_step, .. } = &mut self {
            *next_step = step.into();
        }
        self
    }

    /// What the error is about, such as `xmpp.room in /etc/cicada/federation.toml`.
    pub fn object(&self) -> String {
        match self {
            Self::NotFound { .. } => "configuration file".into(),
            Self::Syntax { path, .. }
            | Self::Read { path, .. }
            | Self::Write { path, .. }
            | Self::Exposed { path, .. }
            | Self::Replaceable { path, .. }
            | Self::Secret { path, .. } => path.display().to_string(),
            Self::Field { origin, field, .. } if field.is_empty() => origin.clone(),
            Self::Field { origin, field, .. } => format!("{field} in {origin}"),
        }
    }

    pub fn next_step(&self) -> String {
        match self {
            Self::NotFound { .. } => {
                "'cicada setup' puts the sample there to be edited; or name one with --config".into()
            }
            Self::Read { path, source } => read_step(path, source),
            Self::Syntax { .. } => super::SAMPLE.into(),
            Self::Field { next_step, .. } => next_step.clone(),
            Self::Exposed { path, .. } => format!("chmod 600 {}", path.display()),
            Self::Replaceable { exposure, .. } => exposure.next_step(),
            Self::Secret { next_step, .. } => (*next_step).into(),
            Self::Write { .. } => "check the directory, its owner and the room on its disk".into(),
        }
    }
}

fn read_step(path: &Path, source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::NotFound => format!("create {} or correct the setting that names it", path.display()),
        io::ErrorKind::PermissionDenied => {
            "run this as the broker's user, or give it the file; 'cicada setup' does so for the service"
                .into()
        }
        _ => "check the file and its disk".into(),
    }
}

fn paths(list: &[PathBuf]) -> String {
    list.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(" or ")
}

/// The word of `known` that `word` is most likely a misspelling of.
pub(super) fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let distance_max = (word.chars().count() / 3).max(1);
    let scored = known.into_iter().map(|k| (distance(word, k), k));
    scored.filter(|(d, _)| *d <= distance_max).min().map(|(_, k)| k)
}

/// Levenshtein distance, with a swap of neighbours counted as two.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let cost = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_finger_is_recognised() {
        let known = ["room", "server", "security", "password_file"];
        assert_eq!(nearest("rom", known), Some("room"));
        assert_eq!(nearest("pasword_file", known), Some("password_file"));
        assert_eq!(nearest("wholly-else", known), None);
    }
}
