//! Level 3: the one task that owns all state, and its effect runners.

pub mod handle;
pub mod interface;
pub mod problem;

pub use interface::{Event, Reply, Request};
pub use problem::{Problem, ProblemKind};
