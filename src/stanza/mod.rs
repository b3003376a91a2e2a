//! Level 1: XMPP payloads and namespaces; parse and build, no sockets.
#![doc = include_str!("PROTOCOL.md")]

pub mod cloud;
pub mod commands;
pub mod error;
pub mod muc;
pub mod negotiation;
pub mod ns;

pub use cloud::Cloud;
pub use negotiation::{Answer, Request};
