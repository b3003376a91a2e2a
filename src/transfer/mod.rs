//! Level 2: content-addressed objects between brokers over QUIC, with the identity keys as TLS
//! raw public keys. The wire is specified in `transfer/PROTOCOL.md`.
//!
//! This module knows no repository: what it serves comes through [`ObjectSource`], what it
//! fetches goes through [`ObjectSink`], and who may have what is decided by [`Authority`].
//! Either end of a [`Connection`] may fetch from the other, whoever dialled.

mod batch;
mod connection;
mod door;
mod endpoint;
mod error;
mod fetch;
mod frame;
#[cfg(test)]
mod hostile;
mod limiter;
mod object;
mod reach;
mod serve;
mod socket;
mod tls;

pub use connection::{Connection, LinkStats};
pub use endpoint::{Endpoint, Settings};
pub use error::{FetchError, Refusal, TransferError, Violation};
pub use fetch::{FetchReport, Progress, ProgressSnapshot};
pub use frame::limit;
pub use limiter::Limiter;
pub use object::{
    Authority, Content, Encoding, ObjectBody, ObjectKey, ObjectSink, ObjectSource, PackRange, PackWish,
    PackWriter, SinkError, Ticket, Verified,
};
pub use reach::{Barred, Reach};

/// What `fuzz/` reaches into.
#[cfg(fuzzing)]
pub mod fuzzing {
    pub use super::batch::{open, unpack};
    pub use super::frame::{Frame, HEADER_BYTES, Request};
}

/// The application protocol, with its version (TLS ALPN, RFC 7301).
pub const ALPN: &[u8] = b"cicada-transfer/1";
