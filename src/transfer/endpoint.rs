//! One UDP socket per broker: it answers dials from members and dials them.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use quinn::congestion::CubicConfig;
use quinn::{ConnectionError, TokioRuntime, TransportErrorCode, VarInt};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::connection::Connection;
use super::door::{self, Dial, Door, Entry};
use super::error::{Refusal, TransferError, close};
use super::limiter::Limiter;
use super::object::{Authority, ObjectSource};
use super::serve::{Server, serve};
use super::tls::{self, Identity, alert};
use super::{fetch, socket};
use crate::federation::{Refusals, Refused};
use crate::types::{IdentityKey, PublicKey};

/// How patient an endpoint is, and how much it takes on. The defaults suit the internet.
#[derive(Clone, Debug)]
pub struct Settings {
    /// For all addresses of a peer together, and for a dial to us.
    pub connect_timeout: Duration,
    /// A connection on which nothing was heard for so long is lost.
    pub idle_timeout: Duration,
    /// A peer that could send or take something and does not for so long is cut off.
    pub stall_timeout: Duration,
    /// Connections at the same time; above half of it, dialling takes proof of address.
    pub connections_max: usize,
    /// Handshakes with those who dial us at the same time; likewise.
    pub handshakes_max: usize,
    /// Dials that one address may make at once, and a second in the long run.
    pub dials_burst: u32,
    pub dials_per_s: u32,
    /// Connections with one member at the same time.
    pub connections_per_member: usize,
    /// Requests answered at the same time, over all connections.
    pub requests_max: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(20),
            stall_timeout: Duration::from_secs(20),
            connections_max: 512,
            handshakes_max: 128,
            dials_burst: 60,
            dials_per_s: 5,
            connections_per_member: 16,
            requests_max: 256,
        }
    }
}

/// How long an address may stay silent before the next is tried beside it (RFC 8305).
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(250);
/// How long [`Endpoint::close`] waits for the peers to hear of it.
const FAREWELL: Duration = Duration::from_secs(2);
/// What 100 ms at 1 Gbit/s take, and some more, so that a full link never waits for credit.
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 24 << 20;
/// Packets that are acknowledged together, where the peer knows the extension
/// (draft-ietf-quic-ack-frequency).
const ACK_PACKETS: u32 = 10;
/// What is sent before the first acknowledgement; paced. Four times RFC 6928's, for two round
/// trips less of slow start on links between data centres.
const INITIAL_WINDOW_BYTES: u64 = 64 << 10;
/// Requests a peer may have open on one connection.
const STREAMS_MAX: u32 = 32;
/// What the answering side says once the peer is admitted.
const WELCOME: &[u8] = b"\x01";

/// A broker's end of all transfers. Dropping it closes every connection.
#[derive(Debug)]
pub struct Endpoint {
    shared: Arc<Shared>,
}

struct Shared {
    quinn: quinn::Endpoint,
    identity: Identity,
    server: Arc<Server>,
    transport: Arc<quinn::TransportConfig>,
    settings: Settings,
    /// Live connections with each member, whoever dialled, the newest last.
    connections: Mutex<HashMap<PublicKey, Vec<Connection>>>,
    door: Mutex<Door>,
    handshakes: AtomicUsize,
    /// What was logged of dials that were refused.
    refusals: Mutex<Refusals>,
    started: Instant,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("quinn", &self.quinn).finish_non_exhaustive()
    }
}

impl Endpoint {
    /// Listens on `address` with the default settings. Must be called on a tokio runtime.
    pub fn bind(
        address: SocketAddr,
        identity: &IdentityKey,
        authority: Arc<dyn Authority>,
        source: Arc<dyn ObjectSource>,
        limiter: Limiter,
    ) -> Result<Self, TransferError> {
        Self::bind_with(address, identity, authority, source, limiter, Settings::default())
    }

    /// As [`Endpoint::bind`], with settings.
    pub fn bind_with(
        address: SocketAddr,
        identity: &IdentityKey,
        authority: Arc<dyn Authority>,
        source: Arc<dyn ObjectSource>,
        limiter: Limiter,
        settings: Settings,
    ) -> Result<Self, TransferError> {
        let no_bind = |source| TransferError::Bind { address, source };
        tokio::runtime::Handle::try_current().map_err(|e| no_bind(io::Error::other(e)))?;
        let no_identity = |source| TransferError::Identity { source };
        let identity = Identity::new(identity).map_err(no_identity)?;
        let transport = Arc::new(transport(&settings));
        let mut server_config =
            quinn::ServerConfig::with_crypto(Arc::new(identity.server().map_err(no_identity)?));
        server_config.transport_config(transport.clone());
        let runtime = Arc::new(TokioRuntime);
        let socket = socket::bind(address, limiter, &*runtime).map_err(no_bind)?;
        let quinn = quinn::Endpoint::new_with_abstract_socket(
            quinn::EndpointConfig::default(),
            Some(server_config),
            Arc::new(socket),
            runtime,
        )
        .map_err(no_bind)?;
        let server = Arc::new(Server {
            authority,
            source,
            permits: Semaphore::new(settings.requests_max),
            stall_timeout: settings.stall_timeout,
        });
        let shared = Arc::new(Shared {
            quinn,
            identity,
            server,
            transport,
            settings,
            connections: Mutex::default(),
            door: Mutex::default(),
            handshakes: AtomicUsize::new(0),
            refusals: Mutex::default(),
            started: Instant::now(),
        });
        tokio::spawn(shared.clone().accept());
        Ok(Self { shared })
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.shared.quinn.local_addr()
    }

    /// Connects to the broker that holds the key `expect`, at whichever of its addresses answers
    /// first; a further one is tried every 250 ms.
    pub async fn connect(
        &self,
        addresses: &[SocketAddr],
        expect: PublicKey,
    ) -> Result<Connection, TransferError> {
        if addresses.is_empty() {
            return Err(TransferError::NoAddress { peer: expect });
        }
        let mut attempts: FuturesUnordered<_> = addresses
            .iter()
            .zip(0u32..)
            .map(|(address, place)| async move {
                sleep(NEXT_ADDRESS_AFTER * place).await;
                (*address, self.shared.dial(*address, expect).await)
            })
            .collect();
        let mut failures: Vec<(SocketAddr, TransferError)> = Vec::new();
        let first = async {
            while let Some((address, attempt)) = attempts.next().await {
                match attempt {
                    Ok(connection) => return Some(connection),
                    Err(failure) => failures.push((address, failure)),
                }
            }
            None
        };
        if let Ok(Some(connection)) = timeout(self.shared.settings.connect_timeout, first).await {
            self.shared.clone().keep(connection.clone());
            return Ok(connection);
        }
        // An address that answered, and said no, tells more than those that stayed silent.
        if let Some(place) = failures.iter().position(|(_, f)| !is_silence(f)) {
            let (address, failure) = failures.swap_remove(place);
            tracing::warn!(peer = ?expect, %address, reason = %failure, "could not connect to a member");
            return Err(failure);
        }
        let tried: Vec<String> = addresses
            .iter()
            .map(|address| match failures.iter().find(|(a, _)| a == address) {
                Some((_, TransferError::Unreachable { tried, .. })) => tried.clone(),
                Some((_, failure)) => format!("{address}: {failure}"),
                None => format!("{address}: no answer"),
            })
            .collect();
        let failure = TransferError::Unreachable { peer: expect, tried: tried.join(", ") };
        tracing::warn!(peer = ?expect, reason = %failure, "could not connect to a member");
        Err(failure)
    }

    /// The newest live connection with a member, whoever dialled: objects can be fetched over it
    /// in either direction.
    pub fn connection_with(&self, peer: &PublicKey) -> Option<Connection> {
        self.shared.connections().get(peer)?.iter().rev().find(|c| c.is_open()).cloned()
    }

    /// Ends every connection with a peer that is no member any more, and what travels over them.
    pub fn cut(&self, peer: &PublicKey) {
        let all = self.shared.connections().remove(peer).unwrap_or_default();
        for connection in all {
            connection.quinn.close(close::refused(Refusal::NotMember), b"no member any more");
        }
    }

    /// Ends all connections and stops answering; waits a moment so that the peers hear of it.
    pub async fn close(&self) {
        self.shared.quinn.close(close::DONE, b"shutting down");
        let _ = timeout(FAREWELL, self.shared.quinn.wait_idle()).await;
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.shared.quinn.close(close::DONE, b"shutting down");
    }
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, HashMap<PublicKey, Vec<Connection>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn accept(self: Arc<Self>) {
        while let Some(incoming) = self.quinn.accept().await {
            let address = incoming.remote_address();
            let dial = Dial {
                address: address.ip(),
                proven: incoming.remote_address_validated(),
                may_prove: incoming.may_retry(),
            };
            let (open, handshakes) = (self.quinn.open_connections(), self.handshakes.load(Ordering::Relaxed));
            let entry = self.door.lock().unwrap_or_else(PoisonError::into_inner).enter(
                dial,
                open,
                handshakes,
                &self.settings,
                door::moment(self.started.elapsed()),
            );
            match entry {
                Entry::Welcome => {
                    self.handshakes.fetch_add(1, Ordering::Relaxed);
                    tokio::spawn(self.clone().welcome(incoming));
                }
                Entry::Prove => drop(incoming.retry()),
                Entry::Refuse(crowd) => {
                    self.refused(None, address, Refused::RateLimit, &crowd.as_str());
                    incoming.refuse();
                }
            }
        }
    }

    /// Counts a dial that was refused, and logs it: once for each address and kind in a while.
    fn refused(
        &self,
        peer: Option<&PublicKey>,
        address: SocketAddr,
        refused: Refused,
        reason: &dyn std::fmt::Display,
    ) {
        self.server.authority.refused(peer, door::site(address.ip()), refused);
        let now = door::moment(self.started.elapsed());
        let sender = door::site(address.ip()).to_string();
        let told = self.refusals.lock().unwrap_or_else(PoisonError::into_inner).refuse(&sender, refused, now);
        if let Some(suppressed) = told {
            tracing::warn!(%address, ?peer, kind = %refused, %reason, suppressed, "refused a dial");
        }
    }

    /// Takes a dial through the handshake, admits the key or says why not, and serves.
    async fn welcome(self: Arc<Self>, incoming: quinn::Incoming) {
        let address = incoming.remote_address();
        let handshake = async {
            let connecting = incoming.accept().map_err(|e| handshake_failure(address, None, e))?;
            connecting.await.map_err(|e| handshake_failure(address, None, e))
        };
        let silent = TransferError::Handshake { address, source: ConnectionError::TimedOut };
        let outcome = timeout(self.settings.connect_timeout, handshake).await;
        self.handshakes.fetch_sub(1, Ordering::Relaxed);
        let connection = match outcome.unwrap_or(Err(silent)) {
            Ok(connection) => connection,
            Err(failure) => {
                let kind = match &failure {
                    TransferError::WrongProtocol { .. } => Refused::Version,
                    _ => Refused::Malformed,
                };
                let cause =
                    std::error::Error::source(&failure).map(|e| format!(" ({e})")).unwrap_or_default();
                return self.refused(None, address, kind, &format!("{failure}{cause}"));
            }
        };
        let Some(peer) = tls::peer_of(&connection) else {
            self.refused(None, address, Refused::Version, &"no usable key or protocol");
            connection.close(close::MISBEHAVED, b"no usable key or protocol");
            return;
        };
        let crowded = || {
            let open =
                self.connections().get(&peer).map_or(0, |all| all.iter().filter(|c| c.is_open()).count());
            open >= self.settings.connections_per_member
        };
        let admitted = self.server.authority.admit(&peer).map_err(|reason| (reason, Refused::NotMember));
        let admitted = admitted.and_then(|()| match crowded() {
            true => Err((Refusal::TooMany, Refused::RateLimit)),
            false => Ok(()),
        });
        if let Err((reason, kind)) = admitted {
            self.refused(Some(&peer), address, kind, &reason);
            connection.close(close::refused(reason), reason.to_string().as_bytes());
            return;
        }
        let welcome = async {
            let mut stream = connection.open_uni().await.ok()?;
            stream.write_all(WELCOME).await.ok()?;
            stream.finish().ok()
        };
        if timeout(self.settings.connect_timeout, welcome).await.ok().flatten().is_none() {
            tracing::warn!(%address, ?peer, reason = "it went away or takes no welcome", "refused a dial");
            connection.close(close::STALLED, b"no welcome taken");
            return;
        }
        let stall_timeout = self.settings.stall_timeout;
        self.keep(Connection { quinn: connection, peer, stall_timeout });
    }

    async fn dial(&self, address: SocketAddr, expect: PublicKey) -> Result<Connection, TransferError> {
        let no_identity = |source| TransferError::Identity { source };
        let (crypto, found) = self.identity.client(expect).map_err(no_identity)?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(self.transport.clone());
        let unreachable = |e: quinn::ConnectError| TransferError::Unreachable {
            peer: expect,
            tried: format!("{address}: {e}"),
        };
        // The name is only there because TLS wants one; it is not sent.
        let connecting = self.quinn.connect_with(config, address, "cicada.invalid").map_err(unreachable)?;
        let connection =
            connecting.await.map_err(|e| handshake_failure(address, Some((expect, &found)), e))?;
        let refused = |e| match fetch::lost(expect, &connection, e) {
            TransferError::Interrupted { source, .. } => {
                handshake_failure(address, Some((expect, &found)), source)
            }
            other => other,
        };
        // In TLS 1.3 the dialling side is done first: only the welcome says that we are admitted.
        let mut stream = connection.accept_uni().await.map_err(refused)?;
        match stream.read_to_end(WELCOME.len()).await {
            Ok(welcome) if welcome == WELCOME => {}
            Err(quinn::ReadToEndError::Read(quinn::ReadError::ConnectionLost(e))) => return Err(refused(e)),
            Ok(_) | Err(_) => {
                connection.close(close::MISBEHAVED, b"unexpected welcome");
                return Err(TransferError::WrongProtocol { address });
            }
        }
        Ok(Connection { quinn: connection, peer: expect, stall_timeout: self.settings.stall_timeout })
    }

    /// Serves an admitted connection, and knows it while it lives.
    fn keep(self: Arc<Self>, connection: Connection) {
        let peer = connection.peer;
        let id = connection.quinn.stable_id();
        self.connections().entry(peer).or_default().push(connection.clone());
        tokio::spawn(async move {
            serve(self.server.clone(), connection.quinn, peer).await;
            let mut connections = self.connections();
            if let Some(all) = connections.get_mut(&peer) {
                all.retain(|c| c.quinn.stable_id() != id);
                if all.is_empty() {
                    connections.remove(&peer);
                }
            }
        });
    }
}

fn is_silence(failure: &TransferError) -> bool {
    match failure {
        TransferError::Unreachable { .. } => true,
        TransferError::Handshake { source, .. } => {
            matches!(source, ConnectionError::TimedOut | ConnectionError::Reset)
        }
        _ => false,
    }
}

/// Names the usual reasons; `dialled` is who we expected and whom we found, when we dialled.
fn handshake_failure(
    address: SocketAddr,
    dialled: Option<(PublicKey, &Arc<OnceLock<PublicKey>>)>,
    source: ConnectionError,
) -> TransferError {
    if let Some((expected, found)) = dialled
        && let Some(found) = found.get()
    {
        return TransferError::WrongKey { address, expected, found: *found };
    }
    let code = match &source {
        ConnectionError::TransportError(e) => Some(e.code),
        ConnectionError::ConnectionClosed(e) => Some(e.error_code),
        _ => None,
    };
    if code == Some(TransportErrorCode::crypto(alert::NO_APPLICATION_PROTOCOL)) {
        TransferError::WrongProtocol { address }
    } else if code == Some(TransportErrorCode::crypto(alert::ACCESS_DENIED)) {
        TransferError::KeyRefused { address }
    } else {
        TransferError::Handshake { address, source }
    }
}

fn transport(settings: &Settings) -> quinn::TransportConfig {
    let mut transport = quinn::TransportConfig::default();
    let mut congestion = CubicConfig::default();
    congestion.initial_window(INITIAL_WINDOW_BYTES);
    // One acknowledgement for ten packets, not for two: one percent of what a link carries.
    let mut acknowledgements = quinn::AckFrequencyConfig::default();
    acknowledgements.ack_eliciting_threshold(ACK_PACKETS.into());
    let idle_ms = u32::try_from(settings.idle_timeout.as_millis()).unwrap_or(u32::MAX);
    transport
        .max_idle_timeout(Some(VarInt::from_u32(idle_ms).into()))
        .keep_alive_interval(Some(settings.idle_timeout / 4))
        .max_concurrent_bidi_streams(STREAMS_MAX.into())
        .max_concurrent_uni_streams(1u32.into())
        .stream_receive_window(STREAM_WINDOW_BYTES.into())
        .receive_window(CONNECTION_WINDOW_BYTES.into())
        .send_window(STREAM_WINDOW_BYTES.into())
        .datagram_receive_buffer_size(None)
        .ack_frequency_config(Some(acknowledgements))
        .congestion_controller_factory(Arc::new(congestion));
    transport
}
