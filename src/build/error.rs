//! Why a component could not be built or imported.

use std::io;
use std::path::PathBuf;

use crate::component::definition::DefinitionError;
use crate::component::fragment::FragmentError;
use crate::component::tree::TreeError;
use crate::compose::ComposeError;
use crate::path_owner::Exposure;
use crate::repository::RepositoryError;
use crate::types::codec::CodecError;

#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("definition {}", path.display())]
    Definition { path: PathBuf, source: DefinitionError },
    #[error("definitions {} and {} both define '{name}': give one of them", first.display(), second.display())]
    DefinedTwice { name: String, first: PathBuf, second: PathBuf },
    #[error(
        "'{component}' is built on OS component '{os}', which is neither given nor in the repository: build its definition too"
    )]
    OsMissing { component: String, os: String },
    #[error("'{component}' is built on '{os}', which is a {kind}, not an os")]
    OsOfOtherKind { component: String, os: String, kind: String },
    #[error("building components needs root, or a user namespace (it unpacks packages with their owners)")]
    NotRoot,
    /// Root building where another user may write would do what that user planted.
    #[error("the build directory {} is no place to build in", path.display())]
    Exposed { path: PathBuf, source: Exposure },
    #[error("{} in the build directory is a link or another user's, so it was not used", path.display())]
    Planted { path: PathBuf },
    #[error("building without root needs {what}")]
    NoNamespace { what: &'static str, next_step: String },
    #[error("the package lists of '{suite}' are not up to date, and old ones are not built from")]
    Lists { suite: String, source: Box<BuildError> },
    #[error("cannot start {tool}: install the package {package}")]
    ToolMissing { tool: &'static str, package: &'static str, source: io::Error },
    #[error("cache directory {}: {reason}", path.display())]
    CacheDirectory { path: PathBuf, reason: &'static str },
    #[error(
        "this machine's apt sources name no Debian archive to take '{suite}' from: add one to /etc/apt/sources.list.d"
    )]
    NoSources { suite: String },
    #[error("building '{component}' failed at: {step}\n{output}\nThe whole log is in {}", log.display())]
    Step { component: String, step: String, output: String, log: PathBuf },
    #[error("'{component}': package '{package}', whose version it takes, is not among the installed ones")]
    VersionUnknown { component: String, package: String },
    #[error("'{component}': {pattern} matches {count} files of the unpacked packages, one is expected")]
    UnpackedMatch { component: String, pattern: String, count: usize },
    #[error("{path} in {}", root.display())]
    Tree { root: PathBuf, path: String, source: io::Error },
    #[error(
        "a path of {length} bytes is too long, {} are possible: {path}",
        crate::component::manifest::limit::PATH_BYTES
    )]
    LongPath { path: String, length: usize },
    #[error("too many {what}, at {object}")]
    TooMuch { what: &'static str, object: String },
    /// Refused: a component is shared by all VMs that have it, so nothing secret may be in it.
    #[error("{path} is {what}, and a component must not carry secrets or identity: remove it from the source{}", more(*further))]
    Secret { path: String, what: String, further: usize },
    #[error("the aggregated file {path}")]
    Fragment { path: String, source: FragmentError },
    #[error("{}: {path}: {reason}", archive.display())]
    Archive { archive: PathBuf, path: String, reason: String },
    #[error("{}: {path}: {reason}", archive.display())]
    CutShort { archive: PathBuf, path: String, reason: String },
    #[error("{} is neither a directory nor a tar archive (.tar or .tar.zst){hint}", path.display())]
    UnknownSource { path: PathBuf, hint: String },
    /// What a program brings must not take away what it is built on by mistake.
    #[error("{path} {reason}: change the source, or import it as it is with --as-is")]
    Replaces { path: String, reason: String },
    #[error("the components it requires make no tree together")]
    Required(#[source] TreeError),
    /// The composer would refuse every disk with it.
    #[error("no disk could be composed with it")]
    Compose(#[source] ComposeError),
    #[error("the component does not make a valid manifest")]
    Manifest(#[from] CodecError),
    #[error("storing the component failed")]
    Repository(#[from] RepositoryError),
}

fn more(further: usize) -> String {
    match further {
        0 => String::new(),
        n => format!(" (and {n} more)"),
    }
}

impl BuildError {
    pub fn read(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Read { path, source }
    }

    pub fn write(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Write { path, source }
    }
}
