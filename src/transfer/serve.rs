//! Answering requests: read, admit each object, open it, pack small ones together, send. The
//! store is read on the blocking pool, one step ahead of the wire.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::{ReadToEndError, RecvStream, SendStream, WriteError};
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::timeout;

use super::batch::{self, Effort, Pace};
use super::error::{Refusal, close};
use super::frame::{Frame, Request, limit, size_limit_bytes};
use super::limiter::Limiter;
use super::object::{Authority, Content, Encoding, ObjectBody, ObjectKey, ObjectSource, PackWish, Ticket};
use crate::federation::Refused;
use crate::types::PublicKey;

/// How much of a large object is read, and written, at a time.
const CHUNK_BYTES: usize = 256 << 10;
/// How much is written at a time under a ticket's cap, and how often the cap is looked at.
const LIMITED_BYTES: usize = 16 << 10;
const LIMIT_LOOK: Duration = Duration::from_millis(200);
/// UDP payload for each byte of stream: headers of QUIC, and its acknowledgements.
const DATAGRAM_OVERHEAD: f64 = 1.028;
/// A stream that takes nothing is given up when the whole connection moved less than this, too.
const STALL_BYTES: u64 = 32 << 10;

/// What an endpoint serves from, shared by its connections.
pub struct Server {
    pub authority: Arc<dyn Authority>,
    pub source: Arc<dyn ObjectSource>,
    /// Requests answered at the same time, over all connections.
    pub permits: Semaphore,
    pub stall_timeout: Duration,
}

/// Serves whatever the peer asks for until the connection ends.
pub async fn serve(server: Arc<Server>, connection: quinn::Connection, peer: PublicKey) {
    let session =
        Arc::new(Session { server, connection, peer, logged: AtomicU64::new(0), pace: Arc::default() });
    let mut requests = JoinSet::new();
    let mut window = SendWindow::new(&session.connection);
    let mut ticks = tokio::time::interval(WINDOW_LOOK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick(), if !requests.is_empty() => window.adapt(&session.connection),
            accepted = session.connection.accept_bi() => match accepted {
                Ok((send, recv)) => {
                    requests.spawn(session.clone().answer(send, recv));
                }
                Err(_) => return,
            },
            Some(_) = requests.join_next() => {}
        }
    }
}

/// Keeps what waits in a connection's send buffers to a fraction of a second of what it carries:
/// what is buffered is beyond the reach of a cap, and of a cancel.
struct SendWindow {
    sent_bytes: u64,
    looked: Instant,
    rate_bytes_per_s: f64,
}

/// How often the window is looked at, and how much time's worth of sending beyond the round trip it
/// holds.
const WINDOW_LOOK: Duration = Duration::from_millis(100);
const WINDOW_TIME: Duration = Duration::from_millis(200);
const WINDOW_BYTES: std::ops::RangeInclusive<u64> = (1 << 20)..=(16 << 20);

impl SendWindow {
    fn new(connection: &quinn::Connection) -> Self {
        connection.set_send_window(*WINDOW_BYTES.start());
        let sent_bytes = connection.stats().udp_tx.bytes;
        Self { sent_bytes, looked: Instant::now(), rate_bytes_per_s: 0.0 }
    }

    fn adapt(&mut self, connection: &quinn::Connection) {
        let (sent_bytes, now) = (connection.stats().udp_tx.bytes, Instant::now());
        let passed = now.duration_since(self.looked).as_secs_f64().max(1e-3);
        let rate = (sent_bytes - self.sent_bytes) as f64 / passed;
        // Up at once, so that a fast link is filled; down slowly, because sending comes in bursts.
        self.rate_bytes_per_s = rate.max(0.7 * self.rate_bytes_per_s + 0.3 * rate);
        (self.sent_bytes, self.looked) = (sent_bytes, now);
        let held = 2.0 * self.rate_bytes_per_s * (connection.rtt() + WINDOW_TIME).as_secs_f64();
        connection.set_send_window((held as u64).clamp(*WINDOW_BYTES.start(), *WINDOW_BYTES.end()));
    }
}

struct Session {
    server: Arc<Server>,
    connection: quinn::Connection,
    peer: PublicKey,
    /// Reasons of refusal already logged, one bit per code: a line each per connection.
    logged: AtomicU64,
    /// How hard batches are compressed on this link.
    pace: Arc<Mutex<Pace>>,
}

/// Why an answer was not sent to its end.
enum Unanswered {
    /// The asker stopped the stream or went away.
    Gone,
    /// The asker takes nothing any more.
    Stalled,
    /// The object cannot be sent to its end.
    Refused(Refusal),
}

impl From<WriteError> for Unanswered {
    fn from(_: WriteError) -> Self {
        Unanswered::Gone
    }
}

impl Session {
    fn address(&self) -> SocketAddr {
        self.connection.remote_address()
    }

    async fn answer(self: Arc<Self>, mut send: SendStream, mut recv: RecvStream) {
        // Requests are answered in the order they were made: the asker gets whole objects soon,
        // and the next request is there before this one is done.
        let index = i32::try_from(send.id().index()).unwrap_or(i32::MAX);
        let _ = send.set_priority(-index);
        let request = match timeout(self.server.stall_timeout, recv.read_to_end(limit::REQUEST_BYTES)).await {
            Ok(Ok(bytes)) => Request::decode(&bytes).map_err(|e| e.to_string()),
            Ok(Err(ReadToEndError::TooLong)) => {
                Err(format!("a request is longer than {} bytes", limit::REQUEST_BYTES))
            }
            Ok(Err(ReadToEndError::Read(_))) => return,
            Err(_) => {
                let _ = send.reset(close::STALLED);
                return;
            }
        };
        let request = match request {
            Ok(request) => request,
            Err(reason) => {
                self.server.authority.refused(Some(&self.peer), self.address().ip(), Refused::Malformed);
                tracing::warn!(peer = ?self.peer, address = %self.address(), reason, "cut off a peer that broke the transfer protocol");
                self.connection.close(close::MISBEHAVED, reason.as_bytes());
                return;
            }
        };
        let done = match self.server.permits.try_acquire() {
            Ok(_permit) => self.clone().send_objects(&mut send, request).await,
            Err(_) => {
                let all = Frame::Refused { reason: Refusal::TooMany, count: request.keys.len() };
                self.log_refusal(Refusal::TooMany, &request.keys[0], &mut 0);
                self.write(&mut send, all.encode().into(), &None).await
            }
        };
        let _ = match done {
            Ok(()) => send.finish(),
            Err(Unanswered::Gone) => send.reset(close::DONE),
            Err(Unanswered::Stalled) => {
                tracing::warn!(peer = ?self.peer, address = %self.address(), "gave up a request: the peer takes nothing any more");
                send.reset(close::STALLED)
            }
            Err(Unanswered::Refused(reason)) => send.reset(close::refused(reason)),
        };
    }

    async fn send_objects(
        self: Arc<Self>,
        send: &mut SendStream,
        request: Request,
    ) -> Result<(), Unanswered> {
        let limiter = self.server.authority.limiter(&request.ticket);
        let has_packs = !request.wishes.is_empty();
        let producer = Producer {
            session: self.clone(),
            ticket: request.ticket,
            keys: request.keys.into_iter(),
            wishes: request.wishes.into_iter(),
            ahead: None,
            effort: Effort::new(self.pace.clone()),
            counted: 0,
        };
        let mut last_write = Duration::ZERO;
        let mut next = spawn_blocking(move || producer.step());
        loop {
            let waiting = Instant::now();
            // While a delta is being made, the asker is told that nobody has fallen asleep.
            let step = loop {
                match timeout(self.server.stall_timeout / 4, &mut next).await {
                    Ok(step) => break step,
                    Err(_) if !has_packs => break (&mut next).await,
                    Err(_) => self.write(send, Frame::Working.encode().into(), &limiter).await?,
                }
            };
            let Ok((answer, mut producer)) = step else {
                return Err(Unanswered::Refused(Refusal::Failed));
            };
            let Some(answer) = answer else { return Ok(()) };
            producer.effort.adapt(last_write, waiting.elapsed());
            next = spawn_blocking(move || producer.step());
            let writing = Instant::now();
            match answer {
                Answer::Frame(frame) => self.write(send, frame.into(), &limiter).await?,
                Answer::Large(key, body) => self.send_large(send, key, body, &limiter).await?,
            }
            last_write = writing.elapsed();
        }
    }

    async fn send_large(
        &self,
        send: &mut SendStream,
        key: ObjectKey,
        body: ObjectBody,
        limiter: &Option<Limiter>,
    ) -> Result<(), Unanswered> {
        let size_bytes = body.size_bytes();
        let announced = Frame::Large { encoding: body.encoding, size_bytes }.encode();
        self.write(send, announced.into(), limiter).await?;
        match body.content {
            Content::Bytes(bytes) => self.write(send, bytes, limiter).await,
            Content::File { file, offset_bytes, size_bytes } => {
                let file = Arc::new(file);
                let end = offset_bytes.saturating_add(size_bytes);
                let mut at = offset_bytes;
                let mut next = read_ahead(&file, at, end);
                while at < end {
                    let chunk = match next.await {
                        Ok(Ok(chunk)) => chunk,
                        Ok(Err(error)) => {
                            tracing::warn!(%key, %error, "an object could not be read to its end while it was sent");
                            return Err(Unanswered::Refused(Refusal::Changed));
                        }
                        Err(_) => return Err(Unanswered::Refused(Refusal::Failed)),
                    };
                    at += chunk.len() as u64;
                    next = read_ahead(&file, at, end);
                    self.write(send, chunk, limiter).await?;
                }
                Ok(())
            }
        }
    }

    async fn write(
        &self,
        send: &mut SendStream,
        mut bytes: Bytes,
        limiter: &Option<Limiter>,
    ) -> Result<(), Unanswered> {
        let Some(limiter) = limiter else { return self.write_at_once(send, bytes).await };
        while !bytes.is_empty() {
            while let Some(wait) = limiter.wait() {
                // Not longer, so that a cap that is lifted is lifted at once.
                tokio::time::sleep(wait.min(LIMIT_LOOK)).await;
            }
            // A cap set meanwhile holds from the next piece on.
            let most = limiter.rate_bytes_per_s().map_or(CHUNK_BYTES, |_| LIMITED_BYTES);
            let piece = bytes.split_to(bytes.len().min(most));
            limiter.spend((piece.len() as f64 * DATAGRAM_OVERHEAD) as usize);
            self.write_at_once(send, piece).await?;
        }
        Ok(())
    }

    async fn write_at_once(&self, send: &mut SendStream, bytes: Bytes) -> Result<(), Unanswered> {
        let mut rest = [bytes];
        while !rest[0].is_empty() {
            let before = self.connection.stats().udp_tx.bytes;
            match timeout(self.server.stall_timeout, send.write_chunks(&mut rest)).await {
                Ok(written) => {
                    written?;
                }
                // Other streams may be ahead of this one, and the cap may be low: only when
                // nothing moves has the peer stalled.
                Err(_) if self.connection.stats().udp_tx.bytes - before >= STALL_BYTES => {}
                Err(_) => return Err(Unanswered::Stalled),
            }
        }
        Ok(())
    }

    /// `counted` are the reasons counted for this request already.
    fn log_refusal(&self, reason: Refusal, key: &ObjectKey, counted: &mut u64) {
        let bit = 1 << u32::from(reason.code()).min(63);
        if let Some(refused) = reason.refused().filter(|_| *counted & bit == 0) {
            *counted |= bit;
            self.server.authority.refused(Some(&self.peer), self.address().ip(), refused);
        }
        if self.logged.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
            tracing::warn!(peer = ?self.peer, address = %self.address(), %reason, object = %key, "refused to serve a peer");
        }
    }
}

fn read_ahead(file: &Arc<File>, at: u64, end: u64) -> tokio::task::JoinHandle<io::Result<Bytes>> {
    let file = file.clone();
    let length = (end - at).min(CHUNK_BYTES as u64) as usize;
    spawn_blocking(move || {
        let mut chunk = vec![0; length];
        file.read_exact_at(&mut chunk, at)?;
        Ok(chunk.into())
    })
}

/// What one step of a request sends.
enum Answer {
    Frame(Vec<u8>),
    Large(ObjectKey, ObjectBody),
}

/// One object, as far as the store goes.
enum Opened {
    Refused(Refusal),
    Small(Bytes),
    Large(ObjectKey, ObjectBody),
}

/// Turns a request into answers, step by step. Runs on the blocking pool.
struct Producer {
    session: Arc<Session>,
    ticket: Ticket,
    keys: std::vec::IntoIter<ObjectKey>,
    /// One for each pack among the keys.
    wishes: std::vec::IntoIter<PackWish>,
    /// Opened, but belongs to the next step.
    ahead: Option<Opened>,
    effort: Effort,
    counted: u64,
}

impl Producer {
    fn step(mut self) -> (Option<Answer>, Self) {
        let answer = match self.take() {
            None => None,
            Some(Opened::Large(key, body)) => Some(Answer::Large(key, body)),
            Some(Opened::Refused(reason)) => {
                let mut count = 1;
                while self.take_if(|o| matches!(o, Opened::Refused(r) if *r == reason)).is_some() {
                    count += 1;
                }
                Some(Answer::Frame(Frame::Refused { reason, count }.encode()))
            }
            Some(Opened::Small(bytes)) => {
                let mut sizes_bytes = vec![bytes.len() as u32];
                let mut plain = Vec::from(bytes);
                let room = |plain: &[u8], o: &Opened| matches!(o, Opened::Small(b) if plain.len() + b.len() <= limit::BATCH_BYTES);
                while let Some(Opened::Small(bytes)) = self.take_if(|o| room(&plain, o)) {
                    sizes_bytes.push(bytes.len() as u32);
                    plain.extend_from_slice(&bytes);
                }
                Some(Answer::Frame(self.effort.pack(plain, sizes_bytes).encode()))
            }
        };
        (answer, self)
    }

    fn take(&mut self) -> Option<Opened> {
        self.ahead.take().or_else(|| {
            let key = self.keys.next()?;
            Some(self.open(&key).unwrap_or_else(|reason| {
                self.session.log_refusal(reason, &key, &mut self.counted);
                Opened::Refused(reason)
            }))
        })
    }

    fn take_if(&mut self, wanted: impl Fn(&Opened) -> bool) -> Option<Opened> {
        let opened = self.take()?;
        if wanted(&opened) {
            return Some(opened);
        }
        self.ahead = Some(opened);
        None
    }

    fn open(&mut self, key: &ObjectKey) -> Result<Opened, Refusal> {
        let wish = if key.is_pack() { self.wishes.next().unwrap_or_default() } else { PackWish::default() };
        let Server { authority, source, .. } = &*self.session.server;
        authority.check(&self.session.peer, &self.ticket, key)?;
        let body = match key {
            ObjectKey::Pack(pack) => source.open_pack(&self.ticket, pack, &wish)?,
            _ => source.open(&self.ticket, key)?,
        };
        let failed = |reason: &dyn std::fmt::Display| {
            tracing::error!(object = %key, %reason, "an object that is held cannot be served");
            Refusal::Failed
        };
        let plain_size_bytes = match body.encoding {
            Encoding::Plain | Encoding::StoredPack(_) | Encoding::PackDelta(_) => body.size_bytes(),
            Encoding::Zstd { plain_size_bytes } => plain_size_bytes,
        };
        if plain_size_bytes > size_limit_bytes(key) || body.size_bytes() > size_limit_bytes(key) {
            return Err(failed(&format!("{plain_size_bytes} bytes are over the limit")));
        }
        match (key.is_pack(), body.encoding) {
            (true, Encoding::StoredPack(_) | Encoding::PackDelta(_)) => Ok(Opened::Large(*key, body)),
            (true, _) | (_, Encoding::StoredPack(_) | Encoding::PackDelta(_)) => {
                Err(failed(&"it is not in the form its kind has"))
            }
            (false, Encoding::Zstd { .. }) => {
                let packed = read(&body.content).map_err(|e| failed(&e))?;
                if plain_size_bytes > limit::SMALL_BYTES as u64 {
                    let content = Content::Bytes(packed);
                    return Ok(Opened::Large(*key, ObjectBody { content, ..body }));
                }
                let plain = batch::unpack(&packed, plain_size_bytes);
                plain.map(|p| Opened::Small(p.into())).ok_or_else(|| failed(&"it does not unpack"))
            }
            (false, Encoding::Plain) => {
                let plain = read(&body.content).map_err(|e| failed(&e))?;
                if plain.len() <= limit::SMALL_BYTES {
                    return Ok(Opened::Small(plain));
                }
                let body = match zstd::bulk::compress(&plain, 1) {
                    Ok(packed) if packed.len() < plain.len() => ObjectBody {
                        encoding: Encoding::Zstd { plain_size_bytes },
                        content: Content::Bytes(packed.into()),
                    },
                    _ => ObjectBody::plain(plain),
                };
                Ok(Opened::Large(*key, body))
            }
        }
    }
}

fn read(content: &Content) -> io::Result<Bytes> {
    match content {
        Content::Bytes(bytes) => Ok(bytes.clone()),
        Content::File { file, offset_bytes, size_bytes } => {
            // The caller checked the size against the limit of the object's kind.
            let mut bytes = vec![0; *size_bytes as usize];
            file.read_exact_at(&mut bytes, *offset_bytes)?;
            Ok(bytes.into())
        }
    }
}
