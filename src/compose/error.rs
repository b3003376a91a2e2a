//! Why a disk could not be composed.

use std::io;
use std::path::PathBuf;

use crate::component::tree::TreeError;
use crate::repository::RepositoryError;
use crate::types::{ByteSize, ImageDigest, PackId, RecipeId};

#[derive(Debug, thiserror::Error)]
pub enum ComposeError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error("these components do not make a disk")]
    Tree(#[from] TreeError),
    /// A manifest places a file where its pack has no bytes. The pack itself is sound.
    #[error(
        "pack {pack} ends before byte {need_bytes}, where a component says that a file of it ends: the \
         component was made wrongly, remove it with 'cicada component remove'"
    )]
    ShortPack { pack: PackId, need_bytes: u64 },
    #[error("the repository lacks {}", objects.join(", "))]
    Missing { objects: Vec<String> },
    #[error(
        "the recipe was made by composer {wanted}, known here are {} and {}: upgrade the older side",
        super::COMPOSER,
        super::EXTENTS_COMPOSER
    )]
    Composer { wanted: String },
    /// What an adopted disk's component says of its base cannot be true.
    #[error("the extent list of {component} is refused: {reason}; adopt the disk again where it came from")]
    ExtentList { component: String, reason: String },
    #[error("a disk of {size} is too small: the components need {need}")]
    TooSmall { size: ByteSize, need: ByteSize },
    #[error("a disk of {size} is too large: this composer lays out up to {limit}")]
    TooLarge { size: ByteSize, limit: ByteSize },
    #[error("the file system cannot hold {path}")]
    Layout {
        path: String,
        #[source]
        source: mkext4::Error,
    },
    #[error("the file system cannot be laid out")]
    FileSystem(#[source] mkext4::Error),
    #[error("{path} does not fit on an EFI system partition")]
    Esp {
        path: String,
        #[source]
        source: io::Error,
    },
    /// What was composed is not what the recipe promises.
    #[error(
        "composed {found} where recipe {recipe} promises {expected} (composer {composer}): \
         run 'cicada repo check', and compare composer versions with the source"
    )]
    Digest { recipe: RecipeId, expected: ImageDigest, found: ImageDigest, composer: String },
    /// A kept composition is not what it was; the numbers are of segments of 4 MiB.
    #[error(
        "the composition {} is damaged{}: stop the VMs that use it, remove the file, and it is composed \
         anew", path.display(), at(segments)
    )]
    Damaged { path: PathBuf, recipe: RecipeId, composer: String, segments: Vec<u64> },
    #[error("recipe {recipe} was never composed here")]
    NotComposed { recipe: RecipeId },
    #[error("not enough room in {}: {need} needed, {have} free", dir.display())]
    NoSpace { dir: PathBuf, need: ByteSize, have: ByteSize },
    #[error("cannot {what} {}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} {reason}", path.display())]
    Occupied { path: PathBuf, reason: &'static str },
    #[error("qemu-img is not there: install the package qemu-utils")]
    NoQemuImg,
    #[error("qemu-img failed: {0}")]
    Convert(String),
}

/// Names the first few segments.
fn at(segments: &[u64]) -> String {
    const SHOWN_MAX: usize = 8;
    if segments.is_empty() {
        return String::new();
    }
    let shown: Vec<String> = segments.iter().take(SHOWN_MAX).map(u64::to_string).collect();
    let more = if segments.len() > SHOWN_MAX { " and more" } else { "" };
    format!(" in its 4 MiB segments {}{more}", shown.join(", "))
}
