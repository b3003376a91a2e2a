//! Cicada: a federated cloud broker that moves virtual machines between independent clouds by
//! Composed Image Cloning. `ARCHITECTURE.md` has the map; dependencies point down only, which
//! `tests/layering.rs` enforces.

// Level 0
pub mod clock;
pub mod durable;
pub mod fault;
pub mod sparse;
pub mod types;
pub mod unix_socket;
// Level 1: pure
pub mod component;
pub mod federation;
pub mod interface;
pub mod migration;
pub mod placement;
pub mod stanza;
pub mod vm;
// Level 2: resources
pub mod config;
pub mod disk;
pub mod hypervisor;
pub mod lent_ids;
pub mod path_owner;
pub mod repository;
pub mod telemetry;
pub mod transfer;
pub mod xmpp;
// Level 3
pub mod adopt;
pub mod broker;
pub mod build;
pub mod compose;
pub mod recording;
pub mod runner;
pub mod sim;
// Level 4 to 6
pub mod api;
pub mod cli;
pub mod client;
pub mod daemon;
