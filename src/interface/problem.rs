//! What an operator is told when something is refused or fails: which object, why, what next.

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

/// The class of a problem. Codes and exit codes are stable; both are listed in `deploy/README.md`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProblemKind {
    /// The request itself is wrong: unknown fields, bad values.
    BadRequest,
    /// No VM, member, component, recipe or migration of that name.
    NotFound,
    /// The object is in a state in which this cannot be done.
    Conflict,
    /// A policy, a lack of resources or another cloud said no.
    Refused,
    /// Not allowed: not a member, unknown key, wrong credentials.
    Forbidden,
    /// A member, server or broker that is needed cannot be reached now.
    Unavailable,
    /// Content is missing or does not match its hash.
    Damaged,
    /// Not enough room on a disk.
    NoSpace,
    /// A needed program or file of this machine is missing.
    Missing,
    /// The operator cancelled it.
    Cancelled,
    /// Something broke that should not have.
    Failed,
}

impl ProblemKind {
    /// The process exit code of a command that ends with this problem.
    pub const fn exit_code(self) -> u8 {
        match self {
            ProblemKind::Failed => 1,
            ProblemKind::BadRequest => 2,
            ProblemKind::NotFound => 3,
            ProblemKind::Conflict => 4,
            ProblemKind::Refused => 5,
            ProblemKind::Forbidden => 6,
            ProblemKind::Unavailable => 7,
            ProblemKind::Damaged => 8,
            ProblemKind::NoSpace => 9,
            ProblemKind::Missing => 10,
            ProblemKind::Cancelled => 130,
        }
    }
}

/// A typed refusal or failure. `Display` is one line: reason, then what to do next.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Problem {
    pub kind: ProblemKind,
    /// What it is about, for example `VM web-1` or `member b@example.org`.
    pub object: String,
    pub reason: String,
    /// What an operator can do about it; empty if nothing.
    #[serde(default)]
    pub next_step: String,
}

impl Problem {
    pub fn new(kind: ProblemKind, object: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { kind, object: object.into(), reason: reason.into(), next_step: String::new() }
    }

    pub fn next(mut self, step: impl Into<String>) -> Self {
        self.next_step = step.into();
        self
    }

    /// A failure from an error and the chain of its causes. What the system itself refused (no permission, no
    /// room) is an operator's to mend, so it keeps its own class instead of [`ProblemKind::Failed`].
    pub fn from_error(
        kind: ProblemKind,
        object: impl Into<String>,
        error: &(dyn std::error::Error + 'static),
    ) -> Self {
        let by_system = if kind == ProblemKind::Failed { refused_by_system(error) } else { None };
        let (kind, next) = by_system.unwrap_or((kind, ""));
        Self::new(kind, object, chain(error)).next(next)
    }

    /// As [`Problem::from_error`], about a path that the operator named.
    pub fn from_path(object: impl Into<String>, error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                Self::from_error(ProblemKind::NotFound, object, error).next("check the path")
            }
            io::ErrorKind::AlreadyExists => Self::from_error(ProblemKind::Conflict, object, error),
            io::ErrorKind::UnexpectedEof => Self::from_error(ProblemKind::Damaged, object, error),
            io::ErrorKind::IsADirectory => Self::from_error(ProblemKind::BadRequest, object, error),
            _ => Self::from_error(ProblemKind::Failed, object, error),
        }
    }
}

/// What the system refused, and what can be done about that.
fn refused_by_system(error: &(dyn std::error::Error + 'static)) -> Option<(ProblemKind, &'static str)> {
    let mut cause = Some(error);
    while let Some(e) = cause {
        if let Some(io) = e.downcast_ref::<io::Error>() {
            match io.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    return Some((
                        ProblemKind::Forbidden,
                        "run this as the user it belongs to, or let this user have it",
                    ));
                }
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    return Some((ProblemKind::NoSpace, "make room on that disk"));
                }
                _ => {}
            }
        }
        cause = e.source();
    }
    None
}

/// An error and its causes, outermost first, printed once.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        text.push_str(": ");
        text.push_str(&e.to_string());
        cause = e.source();
    }
    text
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.reason)
    }
}

impl std::error::Error for Problem {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_refused_is_no_failure_of_ours() {
        let io = |kind: io::ErrorKind| io::Error::from(kind);
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open the disk")]
        struct Deep(#[source] io::Error);
        let deep = Deep(io(io::ErrorKind::PermissionDenied));
        let problem = Problem::from_error(ProblemKind::Failed, "VM web", &deep);
        assert_eq!((problem.kind, problem.next_step.is_empty()), (ProblemKind::Forbidden, false));
        for (source, kind) in [
            (io::ErrorKind::PermissionDenied, ProblemKind::Forbidden),
            (io::ErrorKind::StorageFull, ProblemKind::NoSpace),
            (io::ErrorKind::NotFound, ProblemKind::NotFound),
            (io::ErrorKind::UnexpectedEof, ProblemKind::Damaged),
            (io::ErrorKind::Other, ProblemKind::Failed),
        ] {
            assert_eq!(Problem::from_path("x", &io(source)).kind, kind, "{source}");
        }
        // What was classed already stays.
        let classed = Problem::from_error(ProblemKind::Refused, "x", &io(io::ErrorKind::PermissionDenied));
        assert_eq!(classed.kind, ProblemKind::Refused);
    }
}
