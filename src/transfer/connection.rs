//! An admitted connection between two brokers, the same at both ends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::error::{FetchError, close};
use super::fetch::{self, Fetch, FetchReport, Progress, Pulse};
use super::object::{ObjectKey, ObjectSink, Ticket};
use crate::types::PublicKey;

/// A connection on which both sides proved their keys. Clones share it; it stays open until one
/// side closes it or nothing is heard for the idle timeout.
#[derive(Clone, Debug)]
pub struct Connection {
    pub(super) quinn: quinn::Connection,
    pub(super) peer: PublicKey,
    pub(super) stall_timeout: Duration,
}

/// What a connection moved so far, as UDP payload: retransmissions, acknowledgements, handshake
/// and TLS included, IP and UDP headers not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LinkStats {
    pub sent_bytes: u64,
    pub received_bytes: u64,
    pub sent_datagrams: u64,
    pub received_datagrams: u64,
    pub lost_packets: u64,
    pub rtt: Duration,
    /// Largest UDP payload the path is known to carry.
    pub mtu_bytes: u16,
}

impl Connection {
    pub fn peer(&self) -> PublicKey {
        self.peer
    }

    pub fn remote_address(&self) -> SocketAddr {
        self.quinn.remote_address()
    }

    /// Fetches `keys` from the peer, in no particular order between requests. Every small object
    /// is verified before `sink` gets it; packs stream to the writer `sink` gives.
    ///
    /// Ends well even when the peer refuses some objects: see [`FetchReport::refused`]. On
    /// failure the error says what is missing; ask for that again, here or elsewhere. Dropping
    /// the future cancels.
    pub async fn fetch(
        &self,
        ticket: &Ticket,
        keys: Vec<ObjectKey>,
        sink: Arc<dyn ObjectSink>,
        progress: Arc<Progress>,
    ) -> Result<FetchReport, FetchError> {
        let fetch = Fetch {
            connection: self.quinn.clone(),
            peer: self.peer,
            ticket: *ticket,
            sink,
            progress,
            stall_timeout: self.stall_timeout,
            pulse: Pulse::default(),
        };
        fetch::run(Arc::new(fetch), keys).await
    }

    pub fn stats(&self) -> LinkStats {
        let stats = self.quinn.stats();
        LinkStats {
            sent_bytes: stats.udp_tx.bytes,
            received_bytes: stats.udp_rx.bytes,
            sent_datagrams: stats.udp_tx.datagrams,
            received_datagrams: stats.udp_rx.datagrams,
            lost_packets: stats.path.lost_packets,
            rtt: stats.path.rtt,
            mtu_bytes: stats.path.current_mtu,
        }
    }

    /// Whether it can still be used.
    pub fn is_open(&self) -> bool {
        self.quinn.close_reason().is_none()
    }

    /// Comes back when the connection has ended.
    pub async fn closed(&self) {
        self.quinn.closed().await;
    }

    /// Ends it, and what either side is fetching over it.
    pub fn close(&self) {
        self.quinn.close(close::DONE, b"done");
    }
}
