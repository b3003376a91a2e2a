//! Two brokers' worth of test doubles for the seams of `cicada::transfer`.
#![allow(dead_code)] // Each test binary uses its part.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use cicada::transfer::{
    Authority, Connection, Content, Encoding, Endpoint, Limiter, ObjectBody, ObjectKey, ObjectSink,
    ObjectSource, PackRange, PackWish, PackWriter, Refusal, Settings, SinkError, Ticket, TransferError,
    Verified,
};
use cicada::types::{BlockHash, ComponentId, Hash, IdentityKey, NodeHash, PackId, PublicKey, RecipeId};

pub const TICKET: Ticket = Ticket::from_bytes([42; 32]);

/// Everything logged by this process from now on.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<u8>>>);

/// Starts to log; to be called by one test of a binary.
pub fn log() -> Log {
    let log = Log::default();
    let writer = log.clone();
    let make_writer = move || writer.clone();
    tracing_subscriber::fmt().with_ansi(false).with_writer(make_writer).init();
    log
}

impl Log {
    pub fn lines(&self) -> Vec<String> {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap().lines().map(str::to_owned).collect()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

pub fn identity(n: u8) -> IdentityKey {
    IdentityKey::from_secret_bytes(&[n; 32])
}

/// Impatient, so that tests are quick.
pub fn settings() -> Settings {
    Settings {
        connect_timeout: Duration::from_secs(2),
        idle_timeout: Duration::from_secs(2),
        stall_timeout: Duration::from_secs(1),
        ..Settings::default()
    }
}

pub mod data {
    /// Reproducible bytes that do not compress.
    pub fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
        out
    }

    /// Half noise, half repetition.
    pub fn block_like_a_file_systems(seed: u64, len: usize) -> Vec<u8> {
        let mut out = noise(seed, len);
        for (i, byte) in out.iter_mut().enumerate() {
            if i % 128 < 64 {
                *byte = b"a line of some configuration file = 1\n"[i % 38];
            }
        }
        out
    }
}

pub struct Broker {
    pub endpoint: Endpoint,
    pub identity: IdentityKey,
    pub members: Arc<Members>,
    pub store: Arc<Store>,
}

impl Broker {
    pub fn start(identity: IdentityKey, members: Members, store: Arc<Store>, limiter: Limiter) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), identity, members, store, limiter, settings())
    }

    pub fn start_at(
        address: SocketAddr,
        identity: IdentityKey,
        members: Members,
        store: Arc<Store>,
        limiter: Limiter,
        settings: Settings,
    ) -> Self {
        let members = Arc::new(members);
        let endpoint =
            Endpoint::bind_with(address, &identity, members.clone(), store.clone(), limiter, settings)
                .unwrap();
        Self { endpoint, identity, members, store }
    }

    /// A source that holds `store`, and a target that holds nothing.
    pub async fn pair(store: Arc<Store>) -> (Self, Self) {
        Self::pair_with(store, Limiter::unlimited()).await
    }

    pub async fn pair_with(store: Arc<Store>, limiter: Limiter) -> (Self, Self) {
        Self::pair_as(store, limiter, settings()).await
    }

    pub async fn pair_as(store: Arc<Store>, limiter: Limiter, settings: Settings) -> (Self, Self) {
        let both = [identity(1).public(), identity(2).public()];
        let any = "127.0.0.1:0".parse().unwrap();
        let source = Self::start_at(any, identity(1), Members::new(&both), store, limiter, settings.clone());
        let target = Self::start_at(
            any,
            identity(2),
            Members::new(&both),
            Store::new(),
            Limiter::unlimited(),
            settings,
        );
        (source, target)
    }

    pub fn address(&self) -> SocketAddr {
        self.endpoint.local_addr().unwrap()
    }

    pub async fn connect(&self, to: &Broker) -> Result<Connection, TransferError> {
        self.endpoint.connect(&[to.address()], to.identity.public()).await
    }
}

pub struct Members(Mutex<HashSet<PublicKey>>, pub Limiter);

impl Members {
    pub fn new(keys: &[PublicKey]) -> Self {
        Self(Mutex::new(keys.iter().copied().collect()), Limiter::unlimited())
    }
    pub fn of(brokers: &[&Broker]) -> Self {
        Self::new(&brokers.iter().map(|b| b.identity.public()).collect::<Vec<_>>())
    }
    pub fn expel(&self, key: &PublicKey) {
        self.0.lock().unwrap().remove(key);
    }
}

impl Authority for Members {
    fn admit(&self, peer: &PublicKey) -> Result<(), Refusal> {
        self.0.lock().unwrap().contains(peer).then_some(()).ok_or(Refusal::NotMember)
    }
    fn check(&self, peer: &PublicKey, ticket: &Ticket, _: &ObjectKey) -> Result<(), Refusal> {
        self.admit(peer)?;
        if *ticket == TICKET { Ok(()) } else { Err(Refusal::UnknownTicket) }
    }
    fn limiter(&self, _: &Ticket) -> Option<Limiter> {
        Some(self.1.clone())
    }
}

/// Small objects in memory, packs in files.
#[derive(Default)]
pub struct Store {
    objects: Mutex<HashMap<ObjectKey, Bytes>>,
    packs: Mutex<HashMap<ObjectKey, (File, u64)>>,
    hang: Mutex<Option<(ObjectKey, Duration)>>,
}

/// Packs lie behind a header in their file, so offsets count.
const PACK_HEADER: &[u8] = b"header";

impl Store {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }
    fn add(&self, key: ObjectKey, bytes: Vec<u8>) -> ObjectKey {
        self.objects.lock().unwrap().insert(key, bytes.into());
        key
    }
    pub fn add_block(&self, bytes: Vec<u8>) -> ObjectKey {
        self.add(ObjectKey::Block(BlockHash::of(&bytes)), bytes)
    }
    pub fn add_node(&self, bytes: Vec<u8>) -> ObjectKey {
        self.add(ObjectKey::Node(NodeHash::of(&bytes)), bytes)
    }
    pub fn add_manifest(&self, bytes: Vec<u8>) -> ObjectKey {
        self.add(ObjectKey::Manifest(ComponentId::of(&bytes)), bytes)
    }
    pub fn add_recipe(&self, bytes: Vec<u8>) -> ObjectKey {
        self.add(ObjectKey::Recipe(RecipeId::of(&bytes)), bytes)
    }
    pub fn add_pack(&self, bytes: Vec<u8>) -> ObjectKey {
        let key = ObjectKey::Pack(PackId::of(&bytes));
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(PACK_HEADER).unwrap();
        file.write_all(&bytes).unwrap();
        self.packs.lock().unwrap().insert(key, (file, bytes.len() as u64));
        key
    }
    pub fn copy_from(&self, other: &Store) {
        self.objects.lock().unwrap().clone_from(&other.objects.lock().unwrap());
    }
    pub fn total_bytes(&self) -> u64 {
        let small: usize = self.objects.lock().unwrap().values().map(Bytes::len).sum();
        small as u64 + self.packs.lock().unwrap().values().map(|(_, size)| size).sum::<u64>()
    }
    /// Changes one byte of what is served for `key`.
    pub fn tamper(&self, key: &ObjectKey) {
        if let Some((file, size)) = self.packs.lock().unwrap().get_mut(key) {
            use std::os::unix::fs::FileExt;
            file.write_all_at(b"X", PACK_HEADER.len() as u64 + *size / 2).unwrap();
        } else {
            let mut objects = self.objects.lock().unwrap();
            let mut bytes = objects[key].to_vec();
            bytes[100] ^= 1;
            objects.insert(*key, bytes.into());
        }
    }
    pub fn hang_at(&self, key: &ObjectKey, how_long: Duration) {
        *self.hang.lock().unwrap() = Some((*key, how_long));
    }
}

impl ObjectSource for Store {
    fn open(&self, _: &Ticket, key: &ObjectKey) -> Result<ObjectBody, Refusal> {
        let hang = *self.hang.lock().unwrap();
        if let Some((at, how_long)) = hang
            && at == *key
        {
            std::thread::sleep(how_long);
        }
        let objects = self.objects.lock().unwrap();
        objects.get(key).map(|b| ObjectBody::plain(b.clone())).ok_or(Refusal::NotHeld)
    }

    fn open_pack(&self, _: &Ticket, pack: &PackId, _: &PackWish) -> Result<ObjectBody, Refusal> {
        let hang = *self.hang.lock().unwrap();
        if let Some((ObjectKey::Pack(at), how_long)) = hang
            && at == *pack
        {
            std::thread::sleep(how_long);
        }
        let packs = self.packs.lock().unwrap();
        let (file, size_bytes) = packs.get(&ObjectKey::Pack(*pack)).ok_or(Refusal::NotHeld)?;
        let content = Content::File {
            file: file.try_clone().unwrap(),
            offset_bytes: PACK_HEADER.len() as u64,
            size_bytes: *size_bytes,
        };
        let range = PackRange { tag: [0; 16], offset_bytes: 0, stored_size_bytes: *size_bytes };
        Ok(ObjectBody { encoding: Encoding::StoredPack(range), content })
    }
}

/// Keeps what it is given; of packs only that they were right.
#[derive(Default)]
pub struct Sink {
    objects: Mutex<HashMap<ObjectKey, Bytes>>,
    packs: Arc<Mutex<HashSet<PackId>>>,
    delay: Duration,
    full: bool,
}

impl Sink {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }
    /// Takes its time to finish a pack.
    pub fn slow(delay: Duration) -> Arc<Self> {
        Arc::new(Self { delay, ..Self::default() })
    }
    /// Has room for no pack.
    pub fn full() -> Arc<Self> {
        Arc::new(Self { full: true, ..Self::default() })
    }
    pub fn is_empty(&self) -> bool {
        self.objects.lock().unwrap().is_empty() && self.packs.lock().unwrap().is_empty()
    }
    pub fn holds(&self, key: &ObjectKey) -> bool {
        match key {
            ObjectKey::Pack(id) => self.packs.lock().unwrap().contains(id),
            key => self.objects.lock().unwrap().contains_key(key),
        }
    }
    pub fn assert_holds_all_of(&self, store: &Store) {
        assert_eq!(*self.objects.lock().unwrap(), *store.objects.lock().unwrap());
        assert!(store.packs.lock().unwrap().keys().all(|key| self.holds(key)));
    }
}

impl ObjectSink for Sink {
    fn deliver(&self, objects: Vec<Verified>) -> Result<(), SinkError> {
        self.objects.lock().unwrap().extend(objects.into_iter().map(|o| (o.key, o.bytes)));
        Ok(())
    }
    fn pack(
        &self,
        pack: &PackId,
        _: bool,
        _: &PackRange,
        size_bytes: u64,
    ) -> Result<Box<dyn PackWriter>, SinkError> {
        if self.full {
            return Err(SinkError::Storage("no space left".into()));
        }
        Ok(Box::new(Writer {
            pack: *pack,
            left_bytes: size_bytes,
            hasher: blake3::Hasher::new(),
            done: self.packs.clone(),
            delay: self.delay,
        }))
    }
}

struct Writer {
    pack: PackId,
    left_bytes: u64,
    hasher: blake3::Hasher,
    done: Arc<Mutex<HashSet<PackId>>>,
    delay: Duration,
}

impl PackWriter for Writer {
    fn write(&mut self, stored: &[u8]) -> Result<(), SinkError> {
        self.left_bytes -= stored.len() as u64;
        self.hasher.update(stored);
        Ok(())
    }
    fn finish(self: Box<Self>) -> Result<(), SinkError> {
        std::thread::sleep(self.delay);
        assert_eq!(self.left_bytes, 0);
        if Hash::from(self.hasher.finalize()) != self.pack.0 {
            return Err(SinkError::Content("the hash differs".into()));
        }
        self.done.lock().unwrap().insert(self.pack);
        Ok(())
    }
}
