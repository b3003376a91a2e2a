//! A member that a test plays: a session in the room, an identity key, an endpoint that serves. It
//! speaks the protocol as a broker does, and wherever it is told to, something else.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use cicada::adopt::{self, Job};
use cicada::clock::{Clock, SystemClock, UnixMillis};
use cicada::component::Recipe;
use cicada::compose::{Composer, ImageFormat};
use cicada::disk::Scan;
use cicada::migration::envelope::{LIFETIME, VERSION};
use cicada::migration::handover::SignedHandOver;
use cicada::migration::message::Initialization;
use cicada::migration::{AnswerBody, Envelope, HandOver, Pass, RequestBody};
use cicada::repository::Repository;
use cicada::runner::content::serving::{Served, Store, Tickets};
use cicada::stanza::{Cloud, Request as RequestStanza};
use cicada::transfer::{
    Authority, Content, Encoding, Endpoint, Limiter, ObjectBody, ObjectKey, ObjectSource, PackWish, Refusal,
    Ticket,
};
use cicada::types::{ByteSize, Hash, IdentityKey, MemberJid, MigrationId, PackId, PeerText, PublicKey, VmId};
use cicada::vm::{Firmware, MapRef, VmSpec};
use cicada::xmpp::{Handle, IncomingRequest, RequestError, Settings, XmppEvent, connect};
use serde::Serialize;
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use xmpp_parsers::jid::Jid;
use xmpp_parsers::minidom::{Element, Node};
use xmpp_parsers::presence::Presence;

const QUIET: Job<'static> = Job { progress: &|_, _, _| (), cancelled: &|| false };
const PATIENCE: Duration = Duration::from_secs(30);

/// What is wrong with a message's seal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Spoil {
    Nothing,
    UnknownFields,
    Signature,
    AnothersKey,
    Cut,
    NotJson,
    NextVersion,
    Sender,
    Recipient,
    Expired,
    FutureDated,
    LivesTooLong,
    ShortNonce,
    /// Only for answers.
    Nonce,
    Migration,
    Vm,
}

/// What a message is about.
#[derive(Clone, Copy, Debug)]
pub struct Matter {
    pub migration: MigrationId,
    pub vm: VmId,
    pub epoch: u64,
}

impl Matter {
    pub fn new(epoch: u64) -> Self {
        Self { migration: MigrationId::random(), vm: VmId::random(), epoch }
    }
    pub fn again(self) -> Self {
        Self { migration: MigrationId::random(), ..self }
    }
}

pub fn now() -> UnixMillis {
    SystemClock.now()
}

/// Signs as `Envelope::seal` does, but whatever is to be signed.
/// Words as no honest program has them: [`PeerText`] cleans, so a mark stands for them until they are sent.
pub fn raw(words: impl Into<String>) -> PeerText {
    let mut all = RAW.lock().unwrap();
    all.push(words.into());
    format!("raw-words-{:06}", all.len() - 1).into()
}

static RAW: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn raw_of(mark: &str) -> Option<String> {
    let index = mark.strip_prefix("raw-words-")?.parse::<usize>().ok()?;
    RAW.lock().unwrap().get(index).cloned()
}

fn with_raw_words(value: &mut Value) {
    match value {
        Value::String(s) => *s = raw_of(s).unwrap_or(std::mem::take(s)),
        Value::Array(all) => all.iter_mut().for_each(with_raw_words),
        Value::Object(fields) => fields.values_mut().for_each(with_raw_words),
        _ => {}
    }
}

fn put_raw_words(element: &mut Element) {
    for (_, value) in element.attrs_mut().iter_mut() {
        *value = raw_of(value).unwrap_or(std::mem::take(value));
    }
    for node in element.nodes_mut() {
        match node {
            Node::Element(child) => put_raw_words(child),
            Node::Text(text) => *text = raw_of(text).unwrap_or(std::mem::take(text)),
        }
    }
}

fn seal_json(key: &IdentityKey, json: &[u8]) -> Vec<u8> {
    let signature = key.sign(&[b"cicada negotiation 1\0".as_slice(), json].concat());
    [signature.as_bytes().as_slice(), json].concat()
}

pub fn seal<T: Serialize + Clone>(envelope: &Envelope<T>, key: &IdentityKey, spoil: Spoil) -> Vec<u8> {
    let mut e = envelope.clone();
    let ago = |d: Duration| UnixMillis(e.issued.0 - d.as_millis() as u64);
    match spoil {
        Spoil::NextVersion => e.version = cicada::migration::envelope::VERSION + 1,
        Spoil::Sender => e.from = "victim@federation.test".parse().unwrap(),
        Spoil::Recipient => e.to = "victim@federation.test".parse().unwrap(),
        Spoil::Expired => (e.issued, e.expires) = (ago(LIFETIME * 4), ago(LIFETIME * 3)),
        Spoil::FutureDated => {
            e.issued = e.issued.plus(LIFETIME * 3);
            e.expires = e.issued.plus(LIFETIME);
        }
        Spoil::LivesTooLong => e.expires = e.issued.plus(LIFETIME * 100),
        Spoil::ShortNonce => e.nonce.truncate(8),
        Spoil::Nonce => e.nonce = uuid::Uuid::new_v4().simple().to_string(),
        Spoil::Migration => e.migration = MigrationId::random(),
        Spoil::Vm => e.vm = VmId::random(),
        _ => {}
    }
    let mut value = serde_json::to_value(&e).unwrap();
    with_raw_words(&mut value);
    if spoil == Spoil::UnknownFields {
        value["later"] = serde_json::json!({ "some": [1, 2, 3] });
        value["body"]["later"] = serde_json::json!("x".repeat(1000));
    }
    let mut json = serde_json::to_vec(&value).unwrap();
    if spoil == Spoil::NotJson {
        json.truncate(json.len() / 2);
    }
    let other = IdentityKey::from_secret_bytes(&[99; 32]);
    let mut sealed = seal_json(if spoil == Spoil::AnothersKey { &other } else { key }, &json);
    match spoil {
        Spoil::Signature => sealed[10] ^= 1,
        Spoil::Cut => sealed.truncate(40),
        _ => {}
    }
    sealed
}

/// How the endpoint treats those who fetch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Manners {
    Honest,
    /// Other bytes than were asked for.
    Lying,
    /// A byte a second, for ever.
    Slow,
}

struct Shop {
    store: Store,
    manners: Mutex<Manners>,
    slow: Limiter,
}

impl Shop {
    fn spoiled(&self, body: ObjectBody) -> ObjectBody {
        let Content::Bytes(bytes) = &body.content else { return body };
        if *self.manners.lock().unwrap() != Manners::Lying {
            return body;
        }
        // A sound frame, of other bytes.
        let mut bytes = match body.encoding {
            Encoding::Zstd { plain_size_bytes } => {
                zstd::bulk::decompress(bytes, plain_size_bytes as usize).unwrap()
            }
            _ => bytes.to_vec(),
        };
        if let Some(last) = bytes.last_mut() {
            *last ^= 1;
        }
        if let Encoding::Zstd { .. } = body.encoding {
            bytes = zstd::bulk::compress(&bytes, 3).unwrap();
        }
        ObjectBody { encoding: body.encoding, content: Content::Bytes(Bytes::from(bytes)) }
    }
}

impl ObjectSource for Shop {
    fn open(&self, ticket: &Ticket, key: &ObjectKey) -> Result<ObjectBody, Refusal> {
        self.store.open(ticket, key).map(|body| self.spoiled(body))
    }
    fn open_pack(&self, ticket: &Ticket, pack: &PackId, wish: &PackWish) -> Result<ObjectBody, Refusal> {
        self.store.open_pack(ticket, pack, wish).map(|body| self.spoiled(body))
    }
}

impl Authority for Shop {
    fn admit(&self, _: &PublicKey) -> Result<(), Refusal> {
        Ok(())
    }
    fn check(&self, peer: &PublicKey, ticket: &Ticket, key: &ObjectKey) -> Result<(), Refusal> {
        self.store.tickets.check(peer, ticket, key)
    }
    fn limiter(&self, _: &Ticket) -> Option<Limiter> {
        (*self.manners.lock().unwrap() == Manners::Slow).then(|| self.slow.clone())
    }
}

/// A VM that the peer may offer: a small disk of noise, adopted.
pub struct Goods {
    pub recipe: Recipe,
    pub root: MapRef,
    pub user_data: MapRef,
    root_size: ByteSize,
    user_data_size: ByteSize,
    scans: [Scan; 2],
}

pub struct Peer {
    pub jid: MemberJid,
    pub key: IdentityKey,
    pub handle: Handle,
    pub endpoint: Endpoint,
    pub goods: Goods,
    pub ticket: Ticket,
    /// The real broker.
    pub real: MemberJid,
    pub real_key: PublicKey,
    settings: Settings,
    name: String,
    shop: Arc<Shop>,
    requests: Mutex<mpsc::UnboundedReceiver<IncomingRequest>>,
    runtime: Arc<Runtime>,
}

impl Peer {
    /// Enters the room and waits until the real broker is seen there.
    pub fn join(runtime: Arc<Runtime>, settings: Settings, name: &str, dir: &Path) -> Self {
        let secret = *Hash::of(name.as_bytes()).as_bytes();
        let key = IdentityKey::from_secret_bytes(&secret);
        let dir = dir.join(format!("{name}-played"));
        std::fs::create_dir_all(&dir).unwrap();
        let repository = Repository::create(&dir.join("repository")).unwrap();
        let goods = make_goods(&repository, &dir, name);
        let tickets = Arc::new(Tickets::default());
        let shop = Arc::new(Shop {
            store: Store { repository, tickets },
            manners: Mutex::new(Manners::Honest),
            slow: Limiter::new(Some(1)),
        });
        let _entered = runtime.enter();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let endpoint = Endpoint::bind(any, &key, shop.clone(), shop.clone(), Limiter::unlimited()).unwrap();
        let (handle, mut events) = connect(settings.clone()).unwrap();
        let (to_requests, requests) = mpsc::unbounded_channel();
        let (to_seen, mut seen) = mpsc::unbounded_channel();
        runtime.spawn(async move {
            while let Some(event) = events.recv().await {
                match event {
                    XmppEvent::Request(request) => drop(to_requests.send(request)),
                    XmppEvent::Presence(p) => drop(to_seen.send(p)),
                    XmppEvent::Joined
                    | XmppEvent::Down(_)
                    | XmppEvent::Removed(_)
                    | XmppEvent::Refused(_) => {}
                }
            }
        });
        let real: MemberJid = "alpine@federation.test".parse().unwrap();
        let mut peer = Self {
            jid: settings.jid.clone(),
            real_key: key.public(),
            key,
            handle,
            endpoint,
            goods,
            ticket: Ticket::random().unwrap(),
            real: real.clone(),
            settings,
            name: name.to_owned(),
            shop,
            requests: Mutex::new(requests),
            runtime: runtime.clone(),
        };
        peer.show(peer.cloud());
        peer.real_key = runtime.block_on(async {
            let found = async {
                loop {
                    let presence = seen.recv().await.expect("the session lives");
                    if let Some(cloud) = presence.cloud.filter(|_| presence.jid == real) {
                        return cloud.key.parse().unwrap();
                    }
                }
            };
            tokio::time::timeout(PATIENCE, found).await.expect("the real broker is in the room")
        });
        peer
    }

    /// What an honest broker of this name says of itself.
    pub fn cloud(&self) -> Cloud {
        Cloud {
            name: self.name.as_str().into(),
            key: self.key.public().to_string().into(),
            versions: "1".into(),
            power: "on".into(),
            ..Cloud::default()
        }
    }

    pub fn show(&self, cloud: Cloud) {
        let element = Element::from(cloud.clone());
        let mut spoilt = element.clone();
        put_raw_words(&mut spoilt);
        if spoilt == element {
            return self.handle.set_presence(cloud);
        }
        let room = self.settings.room.as_ref().unwrap();
        let occupant = Jid::new(&format!("{room}/{}", self.settings.nick)).unwrap();
        let mut stanza = Presence::available().with_to(occupant);
        stanza.payloads.push(spoilt);
        self.block_on(self.handle.send(stanza));
    }

    pub fn behave(&self, manners: Manners) {
        *self.shop.manners.lock().unwrap() = manners;
    }

    /// Ends every connection with the real broker.
    pub fn cut_connections(&self) {
        if let Some(connection) = self.endpoint.connection_with(&self.real_key) {
            connection.close();
        }
    }

    pub fn has_connection(&self) -> bool {
        self.endpoint.connection_with(&self.real_key).is_some()
    }

    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    // Asking.

    pub fn envelope<T>(&self, matter: Matter, body: T) -> Envelope<T> {
        let now = now();
        Envelope {
            version: VERSION,
            from: self.jid.clone(),
            to: self.real.clone(),
            migration: matter.migration,
            vm: matter.vm,
            epoch: matter.epoch,
            nonce: uuid::Uuid::new_v4().simple().to_string(),
            issued: now,
            expires: now.plus(LIFETIME),
            body,
        }
    }

    /// Sends whatever bytes as a request; what the stanza's answer was. Told to wait, it does.
    pub fn send(&self, sealed: &[u8]) -> Result<Vec<u8>, RequestError> {
        let to = Jid::new(&format!("{}/cicada", self.real)).unwrap();
        let payload = RequestStanza { sealed: sealed.to_vec() };
        for _ in 0..30 {
            let answer = self.block_on(self.handle.iq(to.clone(), true, payload.clone()));
            match answer {
                Err(RequestError::Refused { condition, .. }) if condition == "resource-constraint" => {
                    std::thread::sleep(Duration::from_secs(1));
                }
                Err(e) => return Err(e),
                Ok(payload) => {
                    let answer = cicada::stanza::Answer::try_from(payload.expect("an answer")).unwrap();
                    return Ok(answer.sealed);
                }
            }
        }
        panic!("told to wait for ever")
    }

    pub fn ask_spoiled(
        &self,
        matter: Matter,
        body: RequestBody,
        spoil: Spoil,
    ) -> Result<AnswerBody, RequestError> {
        let envelope = self.envelope(matter, body);
        let sealed = self.send(&seal(&envelope, &self.key, spoil))?;
        let answer: Envelope<AnswerBody> =
            Envelope::open(&sealed, &self.real_key, &self.real, &self.jid, now()).expect("a sound answer");
        assert_eq!(
            (answer.nonce, answer.migration, answer.vm),
            (envelope.nonce, matter.migration, matter.vm)
        );
        Ok(answer.body)
    }

    /// As a broker of another version asks.
    pub fn ask_in(&self, version: u32, matter: Matter, body: RequestBody) -> AnswerBody {
        let envelope = Envelope { version, ..self.envelope(matter, body) };
        let sealed = self.send(&seal(&envelope, &self.key, Spoil::Nothing)).expect("it is answered");
        Envelope::open(&sealed, &self.real_key, &self.real, &self.jid, now()).expect("a sound answer").body
    }

    pub fn ask(&self, matter: Matter, body: RequestBody) -> AnswerBody {
        self.ask_spoiled(matter, body, Spoil::Nothing).expect("an honest request is answered")
    }

    /// Asks until the answer is another than `working`.
    pub fn ask_through(&self, matter: Matter, body: RequestBody) -> AnswerBody {
        for _ in 0..600 {
            match self.ask(matter, body.clone()) {
                AnswerBody::Working(_) => std::thread::sleep(Duration::from_millis(100)),
                other => return other,
            }
        }
        panic!("still working after a minute: {body:?}")
    }

    // The bodies of an honest source.

    pub fn spec(&self, matter: Matter) -> VmSpec {
        VmSpec {
            id: matter.vm,
            name: format!("vm-{}", matter.vm.short()).parse().unwrap(),
            cpus: 1,
            memory: ByteSize::mib(64),
            recipe: self.goods.recipe.id(),
            root_size: self.goods.root_size,
            user_data_size: self.goods.user_data_size,
            nics: Vec::new(),
            architecture: "amd64".into(),
            cpu_model: "qemu64".into(),
            firmware: Firmware::Bios,
            disk_bus: Default::default(),
            system_uuid: None,
        }
    }

    pub fn configuration(&self, matter: Matter) -> RequestBody {
        let components = self.goods.recipe.components.clone();
        RequestBody::Configuration { spec: self.spec(matter), components, packs: Vec::new() }
    }

    pub fn reservation(&self, matter: Matter) -> RequestBody {
        RequestBody::Reservation { spec: self.spec(matter) }
    }

    pub fn pass(&self, number: u32, last: bool) -> Pass {
        Pass { number, last, root_delta: self.goods.root, user_data: self.goods.user_data }
    }

    pub fn initialization(&self, matter: Matter) -> Initialization {
        self.serve();
        Initialization {
            spec: self.spec(matter),
            recipe: BASE64.encode(self.goods.recipe.encode()),
            component_names: vec!["played-1@1".into()],
            component_bytes: 1000,
            pass: self.pass(1, true),
            addresses: vec![self.endpoint.local_addr().unwrap().to_string().into()],
            source_key: self.key.public(),
            ticket: Hash::from_bytes(*self.ticket.as_bytes()).to_string(),
            firmware: None,
        }
    }

    pub fn hand_over(&self, matter: Matter) -> HandOver {
        HandOver {
            vm: matter.vm,
            migration: matter.migration,
            epoch: matter.epoch + 1,
            source: self.jid.clone(),
            source_key: self.key.public(),
            target: self.real.clone(),
            target_key: self.real_key,
            recipe: self.goods.recipe.id(),
            root_delta: self.goods.root.id(),
            user_data: self.goods.user_data.id(),
            issued: now(),
            provenance: None,
        }
    }

    pub fn signed(&self, matter: Matter) -> SignedHandOver {
        self.hand_over(matter).sign(&self.key)
    }

    /// Serves the goods to the real broker.
    fn serve(&self) {
        let repository = &self.shop.store.repository;
        let recipe = &self.goods.recipe;
        let manifests = recipe.components.iter().map(|c| repository.manifest(c).unwrap());
        let maps = self.goods.scans.iter().flat_map(|s| s.map.to_tree().1);
        let served = Served {
            peer: Some(self.real_key),
            recipe: Some(recipe.id()),
            components: recipe.components.iter().copied().collect(),
            packs: manifests.flat_map(|m| m.packs.iter().map(|p| p.id).collect::<Vec<_>>()).collect(),
            nodes: maps.map(|(hash, _)| hash).collect(),
            blocks: self.goods.scans.iter().map(|s| s.index.clone()).collect(),
            limiter: Limiter::unlimited(),
        };
        self.shop.store.tickets.serve(self.ticket, served);
    }

    // Being asked.

    /// The next request of the real broker, opened; `None` if none comes in time.
    pub fn asked(&self, patience: Duration) -> Option<Asked> {
        let mut requests = self.requests.lock().unwrap();
        let request = self.block_on(async { tokio::time::timeout(patience, requests.recv()).await.ok()? })?;
        assert_eq!(request.from, self.real);
        let envelope: Envelope<RequestBody> =
            Envelope::open(&request.sealed, &self.real_key, &self.real, &self.jid, now())
                .expect("a sound request");
        Some(Asked { envelope, reply: request.reply })
    }

    /// Seals `body` as the answer to `asked`.
    pub fn answer(&self, asked: Asked, body: AnswerBody, spoil: Spoil) {
        let sealed = self.sealed_answer(&asked, body, spoil);
        asked.send(sealed);
    }

    pub fn sealed_answer(&self, asked: &Asked, body: AnswerBody, spoil: Spoil) -> Vec<u8> {
        let e = &asked.envelope;
        let matter = Matter { migration: e.migration, vm: e.vm, epoch: e.epoch };
        let mut envelope = self.envelope(matter, body);
        envelope.nonce = e.nonce.clone();
        seal(&envelope, &self.key, spoil)
    }

    /// Forgets requests that nobody looked at.
    pub fn drain(&self) {
        let mut requests = self.requests.lock().unwrap();
        while requests.try_recv().is_ok() {}
    }
}

pub struct Asked {
    pub envelope: Envelope<RequestBody>,
    reply: tokio::sync::oneshot::Sender<Option<Vec<u8>>>,
}

impl Asked {
    pub fn send(self, sealed: Vec<u8>) {
        let _ = self.reply.send(Some(sealed));
    }
    pub fn refuse(self) {
        let _ = self.reply.send(None);
    }
    pub fn verb(&self) -> &'static str {
        match self.envelope.body {
            RequestBody::Configuration { .. } => "configuration",
            RequestBody::Reservation { .. } => "reservation",
            RequestBody::Initialization(_) => "initialization",
            RequestBody::Start { .. } => "start",
            RequestBody::Withdraw { .. } => "withdraw",
            RequestBody::Cancel { .. } => "cancel",
            RequestBody::Delete { .. } => "delete",
            RequestBody::Suspend | RequestBody::Stop => "suspend or stop",
            RequestBody::Content { .. } => "content",
            RequestBody::Lineage { .. } => "lineage",
            RequestBody::Owners { .. } => "owners",
        }
    }
}

/// Bytes that do not compress and differ by `seed`.
pub fn noise(seed: &str, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(seed.as_bytes()).finalize_xof().fill(&mut out);
    out
}

/// A root disk of which a part is a pack's, a part is residue; and user data.
fn make_goods(repository: &Repository, dir: &Path, name: &str) -> Goods {
    let composer = Composer::new(repository.clone());
    let examine = |disk: &Path| adopt::examine(repository, disk, Some(ImageFormat::Raw), QUIET).unwrap();
    // Shared, the first disk becomes a pack that the second one leans on.
    let first = dir.join("first.raw");
    std::fs::write(&first, noise(&format!("{name}-1"), 1 << 20)).unwrap();
    let shared = examine(&first).make_base(repository, &composer, "amd64", true, QUIET).unwrap();
    let second = dir.join("second.raw");
    let bytes = [noise(&format!("{name}-1"), 1 << 20), noise(&format!("{name}-2"), 200_000)].concat();
    std::fs::write(&second, bytes).unwrap();
    let examined = examine(&second);
    let base = examined.make_base(repository, &composer, "amd64", false, QUIET).unwrap();
    let (overlay, image) = (dir.join("root.qcow2"), composer.path_of(&base.recipe));
    examined.write_root(&overlay, &image, QUIET).unwrap();
    let user = dir.join("user-data.raw");
    std::fs::write(&user, noise(&format!("{name}-3"), 1 << 20)).unwrap();
    let scans = [Scan::root(&overlay, &image).unwrap(), Scan::user_data(&user).unwrap()];
    let goods = Goods {
        recipe: repository.recipe(&base.recipe).unwrap(),
        root: scans[0].map.to_tree().0,
        user_data: scans[1].map.to_tree().0,
        root_size: ByteSize(scans[0].map.disk_size_bytes),
        user_data_size: ByteSize(1 << 20),
        scans,
    };
    for scan in &goods.scans {
        repository.put_map(&scan.map).unwrap();
    }
    // Nothing of them is collected while the test runs.
    std::mem::forget((shared, base));
    goods
}
