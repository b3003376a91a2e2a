//! Level 1: what a VM's disk is made of. Manifests, recipes, definitions and the rules by which
//! components become one file tree. Pure: no I/O, no clock.

pub mod definition;
pub mod extents;
pub mod fragment;
pub mod manifest;
pub mod recipe;
pub mod tree;

pub use definition::Definition;
pub use extents::{BlockExtent, ExtentList};
pub use manifest::{Entry, EntryKind, Fragment, FragmentRule, Kind, Manifest, PackRef};
pub use recipe::{DiskParameters, Recipe};
