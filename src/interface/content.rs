//! What is told of components, recipes and the repository.

use serde::{Deserialize, Serialize};

use crate::component::Kind;
use crate::types::{ByteSize, ComponentId, ImageDigest, RecipeId};

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
