//! Fetching: many requests in flight over streams of their own, verified, handed to the sink.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use quinn::{ConnectionError, ReadError, RecvStream, WriteError};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet, spawn_blocking};
use tokio::time::{Instant, interval_at};

use super::batch;
use super::error::{FetchError, Refusal, TransferError, Violation, close};
use super::frame::{Frame, HEADER_BYTES, Request, limit};
use super::object::{Encoding, ObjectKey, ObjectSink, PackRange, PackWish, PackWriter, SinkError, Ticket};
use crate::types::{PackId, PublicKey};

/// Requests for small objects in flight, and packs. Enough that the next answer is always under
/// way; few enough that little is half done when a connection breaks.
const SMALL_STREAMS: usize = 6;
const PACK_STREAMS: usize = 3;
/// The fewest objects worth a request of their own.
const KEYS_MIN: usize = 32;
/// How much of a pack is handed to its writer at a time.
const CHUNK_BYTES: usize = 256 << 10;
/// How often a peer may say that it is still working on one object.
const WORKING_MAX: u32 = 100;
/// A peer that sends less than this in a stall timeout has stalled.
const STALL_BYTES: u64 = 1024;

/// What a fetch has got so far; read it from anywhere while the fetch runs. One may be shared by
/// several fetches.
#[derive(Debug, Default)]
pub struct Progress {
    objects: AtomicU64,
    payload_bytes: AtomicU64,
    encoded_bytes: AtomicU64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ProgressSnapshot {
    /// Objects verified and taken by the sink.
    pub objects: u64,
    /// Plain bytes of small objects taken, and stored bytes of packs as they arrive.
    pub payload_bytes: u64,
    /// Bytes of objects as they came over the wire, before QUIC's own framing.
    pub encoded_bytes: u64,
}

impl Progress {
    pub fn snapshot(&self) -> ProgressSnapshot {
        ProgressSnapshot {
            objects: self.objects.load(Ordering::Relaxed),
            payload_bytes: self.payload_bytes.load(Ordering::Relaxed),
            encoded_bytes: self.encoded_bytes.load(Ordering::Relaxed),
        }
    }
}

/// What became of the objects asked for.
#[derive(Clone, Default)]
pub struct FetchReport {
    /// Objects verified and taken by the sink.
    pub delivered: u64,
    /// Objects the peer does not serve, and why.
    pub refused: Vec<(ObjectKey, Refusal)>,
    /// Objects that were not answered: ask for these to resume. Empty after a fetch that ended well.
    pub missing: Vec<ObjectKey>,
}

/// Counts only: the lists may be long.
impl fmt::Debug for FetchReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FetchReport")
            .field("delivered", &self.delivered)
            .field("refused", &self.refused.len())
            .field("missing", &self.missing.len())
            .finish()
    }
}

/// One fetch, shared by its streams.
pub struct Fetch {
    pub connection: quinn::Connection,
    pub peer: PublicKey,
    pub ticket: Ticket,
    pub sink: Arc<dyn ObjectSink>,
    pub progress: Arc<Progress>,
    pub stall_timeout: Duration,
    pub pulse: Pulse,
}

/// Signs of life, for telling a peer that stalls from a sink that is slow.
pub struct Pulse {
    received_bytes: AtomicU64,
    /// Times the peer said that it is working on an object.
    working: AtomicU64,
    /// Sink calls under way.
    sinking: AtomicUsize,
    /// Large objects are held in memory until verified: one at a time.
    large: Semaphore,
}

impl Default for Pulse {
    fn default() -> Self {
        Self {
            received_bytes: AtomicU64::new(0),
            working: AtomicU64::new(0),
            sinking: AtomicUsize::new(0),
            large: Semaphore::new(1),
        }
    }
}

/// A batch as it came, and where the one before it in the same answer is kept.
struct Batch {
    zstd: bool,
    sizes_bytes: Vec<u32>,
    payload: Bytes,
    before: Arc<Mutex<Bytes>>,
}

/// The objects of one request, and how far its answer got.
struct Group {
    keys: Vec<ObjectKey>,
    answered: Mutex<Answered>,
}

#[derive(Default)]
struct Answered {
    /// Objects answered, from the first: answers come in order.
    count: usize,
    refused: Vec<(ObjectKey, Refusal)>,
}

impl Group {
    fn new(keys: Vec<ObjectKey>) -> Arc<Self> {
        Arc::new(Self { keys, answered: Mutex::default() })
    }
    fn answered<T>(&self, f: impl FnOnce(&mut Answered) -> T) -> T {
        f(&mut self.answered.lock().unwrap_or_else(PoisonError::into_inner))
    }
    fn rest(&self) -> &[ObjectKey] {
        &self.keys[self.answered(|a| a.count)..]
    }
    /// The next `n` objects were delivered.
    fn deliver(&self, n: usize) {
        self.answered(|a| a.count += n);
    }
    /// The next `n` objects are refused.
    fn refuse(&self, n: usize, reason: Refusal) {
        self.answered(|a| {
            a.refused.extend(self.keys[a.count..a.count + n].iter().map(|k| (*k, reason)));
            a.count += n;
        });
    }
}

/// Fetches `keys`. Dropping the future stops all its streams; what the sink is just taking it
/// still takes.
pub async fn run(fetch: Arc<Fetch>, keys: Vec<ObjectKey>) -> Result<FetchReport, FetchError> {
    let mut waiting = Waiting::new(keys);
    let mut report = FetchReport::default();
    let mut running: Vec<Arc<Group>> = Vec::new();
    let mut tasks = JoinSet::new();
    let mut watch = Watch::new(&fetch);
    let failure = loop {
        while let Some(group) = waiting.next(&running) {
            running.push(group.clone());
            tasks.spawn(fetch.clone().fetch_group(group));
        }
        let ended = tokio::select! {
            joined = tasks.join_next() => match joined {
                None => break None,
                Some(joined) => joined.unwrap_or_else(|panicked| Err(fetch.panicked(panicked))),
            },
            stalled = watch.stalled() => Err(stalled),
        };
        match ended {
            Err(failure) => break Some(failure),
            Ok(group) => {
                running.retain(|g| !Arc::ptr_eq(g, &group));
                report.add(&group);
            }
        }
    };
    let Some(source) = failure else { return Ok(report) };
    match &source {
        TransferError::Misbehaved { source, .. } => {
            tracing::warn!(peer = ?fetch.peer, address = %fetch.connection.remote_address(), reason = %source, "cut off a peer that broke the transfer protocol");
            fetch.connection.close(close::MISBEHAVED, b"protocol violation");
        }
        TransferError::Stalled { .. } => {
            tracing::warn!(peer = ?fetch.peer, address = %fetch.connection.remote_address(), "cut off a peer that sends nothing any more");
            fetch.connection.close(close::STALLED, b"stalled");
        }
        _ => {}
    }
    tasks.shutdown().await;
    for group in &running {
        report.missing.extend_from_slice(group.rest());
        report.add(group);
    }
    waiting.drain_into(&mut report.missing);
    Err(FetchError { report, source })
}

impl FetchReport {
    fn add(&mut self, group: &Group) {
        group.answered(|a| {
            self.delivered += (a.count - a.refused.len()) as u64;
            self.refused.append(&mut a.refused);
        });
    }
}

/// Objects not yet asked for.
struct Waiting {
    packs: VecDeque<ObjectKey>,
    small: VecDeque<ObjectKey>,
    keys_per_request: usize,
}

impl Waiting {
    fn new(keys: Vec<ObjectKey>) -> Self {
        let (packs, small): (VecDeque<_>, VecDeque<_>) = keys.into_iter().partition(ObjectKey::is_pack);
        let keys_per_request = (small.len() / (2 * SMALL_STREAMS)).clamp(KEYS_MIN, limit::KEYS_PER_REQUEST);
        Self { packs, small, keys_per_request }
    }

    /// The next request that may start beside those running.
    fn next(&mut self, running: &[Arc<Group>]) -> Option<Arc<Group>> {
        let packs = running.iter().filter(|g| g.keys[0].is_pack()).count();
        if packs < PACK_STREAMS
            && let Some(pack) = self.packs.pop_front()
        {
            return Some(Group::new(vec![pack]));
        }
        if running.len() - packs < SMALL_STREAMS && !self.small.is_empty() {
            let n = self.keys_per_request.min(self.small.len());
            return Some(Group::new(self.small.drain(..n).collect()));
        }
        None
    }

    fn drain_into(&mut self, missing: &mut Vec<ObjectKey>) {
        missing.extend(self.packs.drain(..));
        missing.extend(self.small.drain(..));
    }
}

/// Notices when the peer is there, and we are ready for its objects, but none arrive. A peer
/// that is not there at all is the idle timeout's affair.
struct Watch {
    fetch: Arc<Fetch>,
    ticks: tokio::time::Interval,
    seen_bytes: u64,
    seen_working: u64,
    seen_datagrams: u64,
}

impl Watch {
    fn new(fetch: &Arc<Fetch>) -> Self {
        let every = fetch.stall_timeout;
        let ticks = interval_at(Instant::now() + every, every);
        let seen_datagrams = fetch.connection.stats().udp_rx.datagrams;
        Self { fetch: fetch.clone(), ticks, seen_bytes: 0, seen_working: 0, seen_datagrams }
    }

    async fn stalled(&mut self) -> TransferError {
        loop {
            self.ticks.tick().await;
            let datagrams = self.fetch.connection.stats().udp_rx.datagrams;
            let received = self.fetch.pulse.received_bytes.load(Ordering::Relaxed);
            let working = self.fetch.pulse.working.load(Ordering::Relaxed);
            let ready = self.fetch.pulse.sinking.load(Ordering::Relaxed) == 0 && working == self.seen_working;
            if ready && received - self.seen_bytes < STALL_BYTES && datagrams > self.seen_datagrams {
                return TransferError::Stalled { peer: self.fetch.peer, waited: self.fetch.stall_timeout };
            }
            (self.seen_bytes, self.seen_working, self.seen_datagrams) = (received, working, datagrams);
        }
    }
}

/// A sink call under way on the blocking pool.
type Sinking<T> = JoinHandle<Result<T, TransferError>>;

impl Fetch {
    /// Asks for a group and takes its answer.
    async fn fetch_group(self: Arc<Self>, group: Arc<Group>) -> Result<Arc<Group>, TransferError> {
        let (mut send, mut recv) = self.connection.open_bi().await.map_err(|e| self.lost(e))?;
        let wishes = self.clone().wishes(&group).await?;
        let request = Request { ticket: self.ticket, keys: group.keys.clone(), wishes: wishes.clone() };
        // A peer may answer, and stop reading, before the whole request was sent.
        match send.write_all(&request.encode()).await {
            Err(WriteError::ConnectionLost(e)) => return Err(self.lost(e)),
            Err(_) | Ok(()) => {
                let _ = send.finish();
            }
        }
        match self.clone().take_answer(&mut recv, &group, wishes).await {
            Err(Ended::Reset(reason)) => group.refuse(group.rest().len(), reason),
            Err(Ended::Failed(failure)) => return Err(failure),
            Ok(()) => {}
        }
        Ok(group)
    }

    /// What the sink has to say of the packs of a group.
    async fn wishes(self: Arc<Self>, group: &Arc<Group>) -> Result<Vec<PackWish>, TransferError> {
        let as_pack = |key: &ObjectKey| match key {
            ObjectKey::Pack(pack) => Some(*pack),
            _ => None,
        };
        let packs: Vec<_> = group.keys.iter().filter_map(as_pack).collect();
        if packs.is_empty() {
            return Ok(Vec::new());
        }
        let fetch = self.clone();
        let asking = self.sinking(move || Ok(packs.iter().map(|p| fetch.sink.wish(p)).collect()));
        asking.await.unwrap_or_else(|panicked| Err(self.panicked(panicked)))
    }

    async fn take_answer(
        self: Arc<Self>,
        recv: &mut RecvStream,
        group: &Arc<Group>,
        wishes: Vec<PackWish>,
    ) -> Result<(), Ended> {
        let mut sinking: Option<Sinking<()>> = None;
        let mut answered = 0;
        let mut working = 0;
        let before = Arc::new(Mutex::new(Bytes::new()));
        let mut wishes = wishes.into_iter();
        while answered < group.keys.len() {
            let frame = self.read_frame(recv, group.keys.len() - answered).await;
            // What came before goes to the sink first, whatever follows.
            if let Some(sinking) = sinking.take() {
                self.settle(sinking).await?;
            }
            let rest = group.keys.len() - answered;
            match frame? {
                Frame::Refused { count, .. } if count > rest => return Err(self.fault(Violation::Long)),
                Frame::Refused { reason, count } => {
                    group.refuse(count, reason);
                    answered += count;
                }
                Frame::Small { zstd, sizes_bytes, payload } => {
                    let count = sizes_bytes.len();
                    if count > rest {
                        return Err(self.fault(Violation::Long));
                    }
                    let batch = Batch { zstd, sizes_bytes, payload, before: before.clone() };
                    sinking = Some(self.sink_small(group, answered, batch));
                    answered += count;
                }
                Frame::Large { encoding, size_bytes } => {
                    // Packs are asked for alone, so a group's wishes are in step with its answers.
                    let wish = wishes.next().unwrap_or_default();
                    self.take_large(recv, group, group.keys[answered], encoding, size_bytes, &wish).await?;
                    answered += 1;
                    working = 0;
                }
                Frame::Working if working == WORKING_MAX => return Err(self.fault(Violation::Long)),
                Frame::Working => {
                    working += 1;
                    self.pulse.working.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        if let Some(sinking) = sinking {
            self.settle(sinking).await?;
        }
        match recv.read(&mut [0]).await {
            Ok(None) | Err(ReadError::Reset(_)) => Ok(()),
            Ok(Some(_)) => Err(self.fault(Violation::Long)),
            Err(e) => Err(self.read_failed(e, 0)),
        }
    }

    fn sink_small(self: &Arc<Self>, group: &Arc<Group>, answered: usize, batch: Batch) -> Sinking<()> {
        let (fetch, group) = (self.clone(), group.clone());
        self.sinking(move || {
            let Batch { zstd, sizes_bytes, payload, before } = batch;
            let encoded = payload.len() as u64;
            let keys = &group.keys[answered..];
            // Batches of an answer are opened one after the other.
            let mut before = before.lock().unwrap_or_else(PoisonError::into_inner);
            let objects = batch::open(keys, zstd, &sizes_bytes, payload, &mut before);
            let objects = objects.map_err(|v| fetch.misbehaved(v))?;
            let (count, first) = (objects.len(), keys[0]);
            fetch.sink.deliver(objects).map_err(|e| fetch.not_taken(first, e))?;
            group.deliver(count);
            fetch.progress.objects.fetch_add(count as u64, Ordering::Relaxed);
            let plain = sizes_bytes.iter().map(|s| u64::from(*s)).sum();
            fetch.progress.payload_bytes.fetch_add(plain, Ordering::Relaxed);
            fetch.progress.encoded_bytes.fetch_add(encoded, Ordering::Relaxed);
            Ok(())
        })
    }

    async fn take_large(
        self: &Arc<Self>,
        recv: &mut RecvStream,
        group: &Arc<Group>,
        key: ObjectKey,
        encoding: Encoding,
        size_bytes: u64,
        wish: &PackWish,
    ) -> Result<(), Ended> {
        batch::check_size(&key, size_bytes).map_err(|v| self.fault(v))?;
        match (key, encoding) {
            (ObjectKey::Pack(pack), Encoding::StoredPack(range) | Encoding::PackDelta(range)) => {
                let is_delta = matches!(encoding, Encoding::PackDelta(_));
                let asked = range.offset_bytes == 0
                    || wish.begun.is_some_and(|begun| begun == (range.tag, range.offset_bytes));
                if !asked || (is_delta && wish.bases.is_empty()) {
                    return Err(self.fault(Violation::Form { key }));
                }
                self.take_pack(recv, pack, is_delta, range, size_bytes).await?;
            }
            (ObjectKey::Manifest(_), Encoding::Plain | Encoding::Zstd { .. }) => {
                self.take_manifest(recv, key, encoding, size_bytes).await?;
            }
            _ => return Err(self.fault(Violation::Form { key })),
        }
        group.deliver(1);
        self.progress.objects.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Streams a pack to its writer, one chunk behind the wire. `counted` is what the progress was
    /// told of it: in the end the stored form's size, whatever was sent.
    async fn take_pack(
        self: &Arc<Self>,
        recv: &mut RecvStream,
        pack: PackId,
        is_delta: bool,
        range: PackRange,
        size_bytes: u64,
    ) -> Result<(), Ended> {
        let key = ObjectKey::Pack(pack);
        // What came before is gone on with, and was counted then.
        let count = |bytes: u64| self.progress.payload_bytes.fetch_add(bytes, Ordering::Relaxed);
        let fetch = self.clone();
        let mut sinking: Sinking<Box<dyn PackWriter>> = self.sinking(move || {
            let writer = fetch.sink.pack(&pack, is_delta, &range, size_bytes);
            writer.map_err(|e| fetch.not_taken(key, e))
        });
        let mut left = size_bytes;
        while left > 0 {
            let mut chunk = vec![0; left.min(CHUNK_BYTES as u64) as usize];
            let read = self.read_large(recv, &mut chunk).await;
            let mut writer = self.settle(sinking).await?;
            read?;
            left -= chunk.len() as u64;
            count(chunk.len() as u64);
            let fetch = self.clone();
            sinking = self.sinking(move || {
                writer.write(&chunk).map_err(|e| fetch.not_taken(key, e))?;
                Ok(writer)
            });
        }
        let writer = self.settle(sinking).await?;
        let fetch = self.clone();
        self.settle(self.sinking(move || writer.finish().map_err(|e| fetch.not_taken(key, e)))).await?;
        count(range.stored_size_bytes.saturating_sub(range.offset_bytes + size_bytes));
        Ok(())
    }

    /// Manifests too large for a batch: gathered as they arrive, verified whole.
    async fn take_manifest(
        self: &Arc<Self>,
        recv: &mut RecvStream,
        key: ObjectKey,
        encoding: Encoding,
        size_bytes: u64,
    ) -> Result<(), Ended> {
        if let Encoding::Zstd { plain_size_bytes } = encoding {
            batch::check_size(&key, plain_size_bytes).map_err(|v| self.fault(v))?;
        }
        let _slot = self.pulse.large.acquire().await.map_err(|_| Ended::Failed(TransferError::Stopped))?;
        let mut encoded = Vec::new();
        while (encoded.len() as u64) < size_bytes {
            let at = encoded.len();
            encoded.resize(at + (size_bytes - at as u64).min(CHUNK_BYTES as u64) as usize, 0);
            self.read_large(recv, &mut encoded[at..]).await?;
        }
        let fetch = self.clone();
        let sinking = self.sinking(move || {
            let plain = match encoding {
                Encoding::Zstd { plain_size_bytes } => batch::unpack(&encoded, plain_size_bytes)
                    .ok_or_else(|| fetch.misbehaved(Violation::Unpack { key, plain_size_bytes }))?,
                Encoding::Plain | Encoding::StoredPack(_) | Encoding::PackDelta(_) => encoded,
            };
            let object = batch::verify(key, plain.into()).map_err(|v| fetch.misbehaved(v))?;
            let plain = object.bytes.len() as u64;
            fetch.sink.deliver(vec![object]).map_err(|e| fetch.not_taken(key, e))?;
            fetch.progress.payload_bytes.fetch_add(plain, Ordering::Relaxed);
            Ok(())
        });
        self.settle(sinking).await
    }

    /// Reads a frame; `missing` objects are not yet answered.
    async fn read_frame(&self, recv: &mut RecvStream, missing: usize) -> Result<Frame, Ended> {
        let mut header = [0; HEADER_BYTES];
        self.read_exact(recv, &mut header, missing).await?;
        let (tag, length) = Frame::header(header).map_err(|e| self.fault(e.into()))?;
        let mut body = vec![0; length];
        self.read_exact(recv, &mut body, missing).await?;
        Frame::decode(tag, body.into()).map_err(|e| self.fault(e.into()))
    }

    /// Reads bytes of a large object.
    async fn read_large(&self, recv: &mut RecvStream, into: &mut [u8]) -> Result<(), Ended> {
        self.read_exact(recv, into, 1).await?;
        self.progress.encoded_bytes.fetch_add(into.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    async fn read_exact(
        &self,
        recv: &mut RecvStream,
        mut into: &mut [u8],
        missing: usize,
    ) -> Result<(), Ended> {
        while !into.is_empty() {
            match recv.read(into).await {
                Ok(Some(n)) => {
                    self.pulse.received_bytes.fetch_add(n as u64, Ordering::Relaxed);
                    into = &mut into[n..];
                }
                Ok(None) => return Err(self.fault(Violation::Short { missing })),
                Err(e) => return Err(self.read_failed(e, missing)),
            }
        }
        Ok(())
    }

    /// Runs a sink call on the blocking pool, and counts it.
    fn sinking<T: Send + 'static>(
        self: &Arc<Self>,
        call: impl FnOnce() -> Result<T, TransferError> + Send + 'static,
    ) -> Sinking<T> {
        struct Counted(Arc<Fetch>);
        impl Drop for Counted {
            fn drop(&mut self) {
                self.0.pulse.sinking.fetch_sub(1, Ordering::Relaxed);
            }
        }
        self.pulse.sinking.fetch_add(1, Ordering::Relaxed);
        let counted = Counted(self.clone());
        spawn_blocking(move || {
            let _counted = counted;
            call()
        })
    }

    async fn settle<T>(&self, sinking: Sinking<T>) -> Result<T, Ended> {
        sinking.await.unwrap_or_else(|panicked| Err(self.panicked(panicked))).map_err(Ended::Failed)
    }

    fn read_failed(&self, error: ReadError, missing: usize) -> Ended {
        match error {
            ReadError::ConnectionLost(e) => Ended::Failed(self.lost(e)),
            ReadError::Reset(code) => match close::as_refusal(code) {
                Some(reason) => Ended::Reset(reason),
                None if code == close::STALLED => {
                    Ended::Failed(TransferError::Stalled { peer: self.peer, waited: self.stall_timeout })
                }
                None => self.fault(Violation::Short { missing }),
            },
            ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => {
                Ended::Failed(TransferError::Stopped)
            }
        }
    }

    fn lost(&self, source: ConnectionError) -> TransferError {
        lost(self.peer, &self.connection, source)
    }

    fn fault(&self, violation: Violation) -> Ended {
        Ended::Failed(self.misbehaved(violation))
    }

    fn misbehaved(&self, source: Violation) -> TransferError {
        TransferError::Misbehaved { peer: self.peer, source }
    }

    fn not_taken(&self, key: ObjectKey, source: SinkError) -> TransferError {
        match source {
            SinkError::Content(_) => self.misbehaved(Violation::Pack { key, source }),
            SinkError::Storage(_) => TransferError::Sink { key, source },
        }
    }

    fn panicked(&self, error: tokio::task::JoinError) -> TransferError {
        tracing::error!(%error, peer = ?self.peer, "a task of a fetch died");
        TransferError::Stopped
    }
}

/// Why an answer was not taken to its end.
enum Ended {
    /// The peer gave up the request, and with it every object not yet answered.
    Reset(Refusal),
    Failed(TransferError),
}

/// What a lost connection means to its user.
pub fn lost(peer: PublicKey, connection: &quinn::Connection, source: ConnectionError) -> TransferError {
    match source {
        ConnectionError::LocallyClosed => TransferError::Stopped,
        ConnectionError::ApplicationClosed(close) if close::as_refusal(close.error_code).is_some() => {
            let reason = close::as_refusal(close.error_code).unwrap_or(Refusal::Failed);
            TransferError::Refused { peer, address: connection.remote_address(), reason }
        }
        source => TransferError::Interrupted { peer, source },
    }
}
