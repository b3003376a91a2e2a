//! What is asked and told of components, recipes and the repository.

use serde::{Deserialize, Serialize};

use crate::component::Kind;
use crate::types::{ByteSize, ComponentId, ImageDigest, RecipeId};

use super::request::{FileUse, requests};

requests! {
    /// What whoever makes components, recipes and disks asks. Each is answered by a repository alone, whether
    /// a broker has it open or the command itself.
    ContentRequest {
        "component-list" => ComponentList,
        "component-show" => ComponentShow {
            component: String,
            entries: bool,
        },
        "component-diff" => ComponentDiff {
            from: String,
            to: String,
        },
        "component-remove" => ComponentRemove {
            component: String,
        },
        /// Compresses what components consist of strongly, all named ones if none are given, and makes
        /// deltas between the versions that are here.
        "component-optimize" => ComponentOptimize {
            components: Vec<String>,
            deltas: bool,
        },
        /// Makes a component whose manifest and packs were put into the repository known by its name.
        "component-bind" => ComponentBind {
            id: ComponentId,
        },
        /// As an operator binds what came by a move or an archive: `component` is the beginning of an id.
        /// A name that is given must be the component's own, and free.
        "component-name" => ComponentName {
            component: String,
            name: Option<String>,
        },
        "recipe-create" => RecipeCreate {
            components: Vec<String>,
            ordered: bool,
            root_size: ByteSize,
            kernel_command_line: String,
        },
        "recipe-list" => RecipeList,
        /// Writes the composed disk to `output`, a path on the broker's machine.
        "compose" => Compose {
            recipe: String,
            output: String,
            format: String,
        },
        "repo-stats" => RepoStats,
        "repo-check" => RepoCheck,
        "repo-gc" => RepoGc {
            dry_run: bool,
        },
        "repo-rebuild-index" => RepoRebuildIndex,
        /// Writes what components and recipes reach, or all that has a name, to `output`, a path on the
        /// broker's machine. Stops when the asker is gone.
        "repo-export" => RepoExport {
            output: String,
            components: Vec<String>,
            recipes: Vec<String>,
        },
        /// Takes what the archive at `input`, a path on the broker's machine, holds; its names only
        /// with `bind`. Stops when the asker is gone; what was stored stays.
        "repo-import" => RepoImport {
            input: String,
            bind: bool,
        },
    }
}

impl ContentRequest {
    pub(super) fn files(&self) -> Vec<(&str, FileUse)> {
        match self {
            Self::Compose { output, .. } | Self::RepoExport { output, .. } => vec![(output, FileUse::Write)],
            Self::RepoImport { input, .. } => vec![(input, FileUse::Read)],
            Self::ComponentList
            | Self::ComponentShow { .. }
            | Self::ComponentDiff { .. }
            | Self::ComponentRemove { .. }
            | Self::ComponentOptimize { .. }
            | Self::ComponentBind { .. }
            | Self::ComponentName { .. }
            | Self::RecipeCreate { .. }
            | Self::RecipeList
            | Self::RepoStats
            | Self::RepoCheck
            | Self::RepoGc { .. }
            | Self::RepoRebuildIndex => Vec::new(),
        }
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ReportLine {
    /// What is counted, for example `hit-rate`.
    pub name: String,
    pub value: u64,
    /// `bytes`, `objects`, `percent` or empty for a plain count.
    pub unit: String,
    /// More words, or the object it is about; may be empty.
    pub detail: String,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ComponentView {
    pub id: ComponentId,
    /// Whether its name means it. What came by a move is held, but bound to no name.
    #[serde(default)]
    pub bound: bool,
    pub name: String,
    pub version: String,
    pub kind: Kind,
    pub architecture: String,
    pub packs: u32,
    pub plain_bytes: u64,
    pub stored_bytes: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ComponentDetail {
    pub component: ComponentView,
    pub origin: String,
    pub licences: Vec<String>,
    pub requires: Vec<ComponentId>,
    pub conflicts: Vec<String>,
    pub entry_count: u64,
    pub fragments: Vec<String>,
    pub packs: Vec<PackView>,
    /// Paths, when asked for.
    pub entries: Vec<String>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PackView {
    pub id: String,
    pub package: String,
    pub package_version: String,
    pub plain_bytes: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ComponentDiff {
    /// Paths only the second has, only the first has, and both have with another content or metadata.
    pub added: Vec<String>,
    pub removed: Vec<String>,
    pub changed: Vec<String>,
    /// Plain bytes of packs the second has and the first lacks.
    #[serde(rename = "missing_bytes", alias = "bytes_missing")]
    pub bytes_missing: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RecipeView {
    pub id: RecipeId,
    pub components: Vec<String>,
    #[serde(rename = "root_size_bytes", alias = "root_size")]
    pub root_size: ByteSize,
    pub kernel_command_line: String,
    pub image_digest: ImageDigest,
    pub composed: bool,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ComposedView {
    pub recipe: RecipeId,
    pub image_digest: ImageDigest,
    pub output: String,
    #[serde(rename = "size_bytes", alias = "bytes")]
    pub bytes: u64,
    pub elapsed_ms: u64,
}
