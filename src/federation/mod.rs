//! Level 1: members, presence, trust, and what each member may do. Pure: fed with what the room
//! shows, asked what it means.
#![doc = include_str!("THREATS.md")]

pub mod announce;
pub mod damper;
pub mod members;
pub mod policy;
pub mod rate;
pub mod refusals;
pub mod trust;

pub use announce::Announcer;
pub use damper::Damper;
pub use members::{Distrust, Member, Members, Presence, Trust};
pub use policy::{MemberPolicy, Used};
pub use refusals::{Refusals, Refused};
pub use trust::{Kept, KeyNews, Keyring, Revoked};
