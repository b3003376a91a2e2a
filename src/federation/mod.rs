//! Level 1: members, presence and trust. Pure: fed with what the room shows, asked what it means.

pub mod announce;
pub mod members;

pub use announce::Announcer;
pub use members::{Member, Members, Presence, Trust};
