//! One broker, and members that are scripts: what each may do, what is refused and counted, and what
//! ends when a member is one no more. Signatures, records and the data link (QUIC) are real.

#[path = "guarded/quotas.rs"]
mod quotas;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cicada::broker::RoomInput;
use cicada::clock::{Clock, ManualClock, UnixMillis};
use cicada::compose::Composer;
use cicada::config::Config;
use cicada::federation::{Members, Presence, Refused};
use cicada::hypervisor::FakeDriver;
use cicada::interface::{CloudRequest, Reply, Request};
use cicada::interface::{MemberView, StatusView};
use cicada::migration::envelope::{LIFETIME, SKEW, VERSION};
use cicada::migration::message::{CheckAnswer, ContentAnswer};
use cicada::migration::{AnswerBody, Denial, DenialCode, Envelope, HandOver, RequestBody};
use cicada::repository::Repository;
use cicada::runner::Records;
use cicada::runner::content::serving::{Store, Tickets};
use cicada::runner::{Inbox, Input, Link, LinkError, Runner, Shared};
use cicada::stanza::Cloud;
use cicada::transfer::{
    Authority, Connection, Endpoint, FetchReport, Limiter, ObjectBody, ObjectKey, ObjectSink, ObjectSource,
    PackRange, PackWish, PackWriter, Progress, Refusal, Settings, SinkError, Ticket, TransferError, Verified,
};
use cicada::types::{
    ByteSize, ComponentId, Hash, IdentityKey, MapId, MemberJid, MigrationId, PackId, PublicKey, RecipeId,
    Succession, VmId,
};
use cicada::vm::{Firmware, VmSpec};
use futures::future::{BoxFuture, FutureExt};
use tokio::sync::{mpsc, oneshot};

const SOON: Duration = Duration::from_secs(60);

fn jid(name: &str) -> MemberJid {
    format!("{name}@federation.test").parse().unwrap()
}

fn key(name: &str) -> IdentityKey {
    IdentityKey::from_secret_bytes(Hash::of(name.as_bytes()).as_bytes())
}

/// The scripts hear what they are asked, and answer nothing.
#[derive(Clone, Default)]
struct Silence(Arc<Mutex<Vec<Sealed>>>);

/// To whom, and the message.
type Sealed = (MemberJid, Vec<u8>);

impl Link for Silence {
    fn request(
        &self,
        to: &MemberJid,
        sealed: Vec<u8>,
        _: Duration,
    ) -> BoxFuture<'static, Result<Vec<u8>, LinkError>> {
        self.0.lock().unwrap().push((to.clone(), sealed));
        let to = to.clone();
        async move { Err(LinkError::NotOnline(to)) }.boxed()
    }
}

/// The broker under test.
struct Home {
    _dir: tempfile::TempDir,
    shared: Arc<Shared>,
    inbox: Inbox,
    clock: ManualClock,
    heard: Silence,
    driver: Arc<FakeDriver>,
}

impl Home {
    /// Trusts "a" and "b", whom it sees in the room; sees "stranger" without trusting it.
    async fn start(settings: &str) -> Self {
        let clock = ManualClock::new(UnixMillis(1_700_000_000_000));
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("federation.toml");
        let text = format!(
            "[cloud]\nname = \"home\"\ndata_dir = \"data\"\n[xmpp]\njid = \"{}\"\npassword_file = \"p\"\n\
             room = \"fed@rooms.federation.test\"\n[transfer]\nlisten = \"127.0.0.1:0\"\n\
             [hypervisor]\ncpus = 64\nmemory = \"64G\"\n{settings}\n",
            jid("home")
        );
        std::fs::write(&file, text).unwrap();
        let config = Config::load_with(Some(&file), [], &[]).unwrap();
        let repository = Repository::open_or_create(&config.repository.dir).unwrap();
        let tickets = Arc::new(Tickets::default());
        let store = Arc::new(Store { repository: repository.clone(), tickets: tickets.clone() });
        let identity = key("home");
        let endpoint =
            Endpoint::bind(config.transfer.listen, &identity, tickets.clone(), store, Limiter::unlimited())
                .unwrap();
        let heard = Silence::default();
        let driver = Arc::new(FakeDriver::new(Arc::new(clock.clone())));
        let (inbox, inputs) = cicada::runner::inbox();
        let shared = Arc::new(Shared {
            me: jid("home"),
            key: identity,
            clock: Arc::new(clock.clone()),
            composer: Composer::new(repository.clone()),
            repository,
            driver: driver.clone(),
            link: Arc::new(heard.clone()),
            endpoint,
            tickets,
            records: Records::open(&config.cloud.data_dir).unwrap(),
            inbox: inbox.clone(),
            versions: Default::default(),
            config,
        });
        let confirmed = BTreeMap::from(["a", "b"].map(|name| (jid(name), key(name).public())));
        let members = Members::new(BTreeMap::new(), confirmed, false);
        let broker = Runner::open(shared.clone(), members, Box::new(|_| ()), None).unwrap();
        tokio::spawn(broker.run(inputs));
        let home = Self { _dir: dir, shared, inbox, clock, heard, driver };
        for name in ["a", "b", "stranger"] {
            home.shows(name, key(name).public());
        }
        home
    }

    fn room(&self, input: RoomInput) {
        self.inbox.send(Input::Room(input)).unwrap_or_else(|_| panic!("stopped"));
    }

    /// A member shows itself in the room with this key.
    fn shows(&self, name: &str, key: PublicKey) {
        self.shows_with(name, key, &[]);
    }

    /// As [`Home::shows`], with what is to say how it came to that key.
    fn shows_with(&self, name: &str, key: PublicKey, successions: &[Succession]) {
        let cloud = Cloud {
            name: name.into(),
            key: key.to_string().into(),
            versions: "1".into(),
            power: "on".into(),
            ..Cloud::default()
        };
        self.presents(name, cloud.with_successions(successions.iter().cloned()));
    }

    fn presents(&self, name: &str, cloud: Cloud) {
        self.room(RoomInput::Presence(Presence {
            jid: jid(name),
            resource: "x".into(),
            available: true,
            cloud: Some(std::sync::Arc::new(cloud)),
        }));
    }

    async fn call(&self, request: Request) -> Result<Reply, cicada::interface::Problem> {
        let (events, _seen) = mpsc::channel(64);
        let (reply, answer) = oneshot::channel();
        self.inbox
            .send(Input::Call { request: Box::new(request), given: Default::default(), events, reply })
            .unwrap_or_else(|_| panic!("stopped"));
        answer.await.unwrap()
    }

    async fn status(&self) -> StatusView {
        match self.call(Request::Cloud(CloudRequest::Status)).await.unwrap() {
            Reply::Status(status) => *status,
            other => panic!("{other:?}"),
        }
    }

    async fn member(&self, name: &str) -> MemberView {
        match self.call(Request::Cloud(CloudRequest::Members)).await.unwrap() {
            Reply::Members(all) => all.into_iter().find(|m| m.jid == jid(name)).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    async fn refused(&self, kind: &str) -> u64 {
        self.status().await.refusals.by_kind.get(kind).copied().unwrap_or(0)
    }

    /// Sends bytes as the server would hand them over, with the sender's true address.
    async fn asked(&self, from: &MemberJid, payload: Vec<u8>) -> Option<Vec<u8>> {
        let (reply, answer) = oneshot::channel();
        let input = Input::Asked { from: from.clone(), payload, reply };
        self.inbox.send(input).unwrap_or_else(|_| panic!("stopped"));
        answer.await.unwrap()
    }

    fn envelope(&self, from: &str, vm: VmId, body: RequestBody) -> Envelope<RequestBody> {
        let now = self.clock.now();
        Envelope {
            version: VERSION,
            from: jid(from),
            to: jid("home"),
            migration: MigrationId::random(),
            vm,
            epoch: 1,
            nonce: uuid::Uuid::new_v4().simple().to_string(),
            issued: now,
            expires: now.plus(LIFETIME),
            body,
        }
    }

    /// An honest request; its answer's signature is checked.
    async fn ask(&self, from: &str, vm: VmId, body: RequestBody) -> AnswerBody {
        self.ask_as(self.envelope(from, vm, body), &key(from)).await.expect("refused without a word")
    }

    async fn ask_as(&self, e: Envelope<RequestBody>, key: &IdentityKey) -> Option<AnswerBody> {
        let sealed = self.asked(&e.from, e.seal(key).unwrap()).await?;
        let (home, now) = (self.shared.key.public(), self.clock.now());
        Some(Envelope::<AnswerBody>::open(&sealed, &home, &jid("home"), &e.from, now).unwrap().body)
    }

    async fn check(&self, from: &str, spec: &VmSpec, packs: &[PackId]) -> CheckAnswer {
        let body = RequestBody::Configuration { spec: spec.clone(), components: vec![], packs: packs.into() };
        match self.ask(from, spec.id, body).await {
            AnswerBody::Configuration(answer) => answer,
            other => panic!("{other:?}"),
        }
    }

    async fn reserve(&self, from: &str, spec: &VmSpec) -> Result<(), Denial> {
        match self.ask(from, spec.id, RequestBody::Reservation { spec: spec.clone() }).await {
            AnswerBody::Reserved { .. } => Ok(()),
            AnswerBody::Denied(denial) => Err(denial),
            other => panic!("{other:?}"),
        }
    }

    async fn content(&self, from: &str, packs: &[PackId]) -> Result<ContentAnswer, Denial> {
        let body = RequestBody::Content { components: vec![], packs: packs.into(), done: vec![] };
        match self.ask(from, VmId(uuid::Uuid::nil()), body).await {
            AnswerBody::Content(answer) => Ok(answer),
            AnswerBody::Denied(denial) => Err(denial),
            other => panic!("{other:?}"),
        }
    }

    /// Makes a named component of one pack of noise.
    fn holds(&self, name: &str, size_bytes: usize) -> PackId {
        use cicada::component::manifest::{Entry, EntryKind, Kind, Manifest, Meta, PackRef};
        let mut content = vec![0; size_bytes];
        blake3::Hasher::new().update(name.as_bytes()).finalize_xof().fill(&mut content);
        let mut writer = self.shared.repository.pack_writer().unwrap();
        let (offset_bytes, hash) = writer.append(&mut content.as_slice(), content.len() as u64).unwrap();
        let (pack, size_bytes) = writer.finish().unwrap().unwrap();
        let meta = Meta { mode: 0o644, uid: 0, gid: 0, mtime_s: 0 };
        let kind = EntryKind::File { size_bytes: content.len() as u64, hash, pack: 0, offset_bytes };
        let manifest = Manifest {
            name: name.into(),
            version: "1".into(),
            kind: Kind::Program,
            architecture: "amd64".into(),
            origin: String::new(),
            licences: Vec::new(),
            requires: Vec::new(),
            conflicts: Vec::new(),
            packs: vec![PackRef { id: pack, size_bytes, package: name.into(), package_version: "1".into() }],
            entries: vec![Entry { path: b"file".to_vec(), meta, xattrs: Vec::new(), kind }],
            fragments: Vec::new(),
        };
        let id: ComponentId = self.shared.repository.put_manifest(&manifest).unwrap();
        self.shared.repository.bind_component(&manifest, id).unwrap();
        pack
    }

    fn address(&self) -> SocketAddr {
        self.shared.endpoint.local_addr().unwrap()
    }
}

fn spec(name: &str) -> VmSpec {
    VmSpec {
        id: VmId::random(),
        name: name.parse().unwrap(),
        cpus: 2,
        memory: ByteSize::mib(512),
        recipe: RecipeId::of(b"recipe"),
        root_size: ByteSize::mib(768),
        user_data_size: ByteSize::mib(256),
        nics: vec![],
        architecture: "amd64".into(),
        cpu_model: "qemu64".into(),
        firmware: Firmware::Uefi,
        disk_bus: Default::default(),
        system_uuid: None,
    }
}

/// A member's end of the data link. It serves nothing and keeps nothing.
struct Fetcher(Endpoint);

struct Nothing;

impl Authority for Nothing {
    fn admit(&self, _: &PublicKey) -> Result<(), Refusal> {
        Err(Refusal::NotMember)
    }
    fn check(&self, _: &PublicKey, _: &Ticket, _: &ObjectKey) -> Result<(), Refusal> {
        Err(Refusal::UnknownTicket)
    }
}

impl ObjectSource for Nothing {
    fn open(&self, _: &Ticket, _: &ObjectKey) -> Result<ObjectBody, Refusal> {
        Err(Refusal::NotHeld)
    }
    fn open_pack(&self, _: &Ticket, _: &PackId, _: &PackWish) -> Result<ObjectBody, Refusal> {
        Err(Refusal::NotHeld)
    }
}

impl ObjectSink for Nothing {
    fn deliver(&self, _: Vec<Verified>) -> Result<(), SinkError> {
        Ok(())
    }
    fn pack(&self, _: &PackId, _: bool, _: &PackRange, _: u64) -> Result<Box<dyn PackWriter>, SinkError> {
        Ok(Box::new(Nothing))
    }
}

impl PackWriter for Nothing {
    fn write(&mut self, _: &[u8]) -> Result<(), SinkError> {
        Ok(())
    }
    fn finish(self: Box<Self>) -> Result<(), SinkError> {
        Ok(())
    }
}

impl Fetcher {
    /// With the key of that name.
    fn new(name: &str) -> Self {
        let any = "127.0.0.1:0".parse().unwrap();
        let nothing = Arc::new(Nothing);
        Self(Endpoint::bind(any, &key(name), nothing.clone(), nothing, Limiter::unlimited()).unwrap())
    }

    async fn connect(&self, home: &Home) -> Result<Connection, TransferError> {
        self.0.connect(&[home.address()], home.shared.key.public()).await
    }
}

async fn fetch(
    connection: &Connection,
    answer: &ContentAnswer,
    pack: PackId,
) -> Result<FetchReport, cicada::transfer::FetchError> {
    let ticket: Hash = answer.ticket.as_ref().unwrap().parse().unwrap();
    let ticket = Ticket::from_bytes(*ticket.as_bytes());
    connection
        .fetch(&ticket, vec![ObjectKey::Pack(pack)], Arc::new(Nothing), Arc::new(Progress::default()))
        .await
}

fn policy_texts(denials: &[Denial]) -> Vec<&str> {
    denials.iter().filter(|d| d.code == DenialCode::Policy).map(|d| d.text.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_members_vms_take_no_more_together_than_it_may() {
    let home = Home::start(
        "[migration]\nconcurrency = 20\n[[member]]\njid = \"a@federation.test\"\nvms_max = 2\ncpus_max = 3\n\
         memory_max = \"4G\"\nstorage_max = \"10G\"\n",
    )
    .await;
    let (one, two) = (spec("one"), spec("two"));
    assert_eq!(home.check("a", &one, &[]).await.blockers, []);
    home.reserve("a", &one).await.unwrap();
    assert_eq!(
        home.check("a", &one, &[]).await.blockers,
        [],
        "its own reservation does not count against it"
    );
    home.reserve("a", &one).await.unwrap();

    let why = "cpus_max for VMs from this cloud is 3; 2 are used and 2 are asked for";
    assert_eq!(policy_texts(&home.check("a", &two, &[]).await.blockers), [why]);
    let denial = home.reserve("a", &two).await.unwrap_err();
    assert_eq!((denial.code, denial.text.as_str()), (DenialCode::Policy, why));
    assert!(denial.next_step.contains("raise cpus_max"), "{}", denial.next_step);
    let small = VmSpec { cpus: 1, ..two.clone() };
    home.reserve("a", &small).await.unwrap();
    let third = home.check("a", &VmSpec { cpus: 1, ..spec("three") }, &[]).await.blockers;
    assert_eq!(policy_texts(&third).len(), 2, "VMs and CPUs: {third:?}");

    let (a, b) = (home.member("a").await, home.member("b").await);
    assert_eq!((a.used.vms, a.used.cpus, a.used.memory_bytes), (2, 3, 1 << 30));
    assert_eq!(a.used.storage_bytes, 2 << 30);
    assert_eq!(a.policy.unwrap().vms_max, Some(2));
    assert_eq!((b.used.vms, b.policy.unwrap().vms_max), (0, Some(50)), "what holds for all");
    home.reserve("b", &spec("other")).await.unwrap();
    assert_eq!(home.status().await.refusals.total, 0, "an ordinary denial is no refusal");

    // A reservation that ran out counts no more.
    home.clock.advance(Duration::from_secs(121));
    home.inbox.send(Input::Tick).unwrap_or_else(|_| panic!("stopped"));
    assert_eq!(home.member("a").await.used.vms, 0);
    home.reserve("a", &two).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whose_vms_are_not_taken_learns_nothing_of_what_is_held() {
    let home = Home::start(
        "[migration]\naccept_from = [\"a@federation.test\"]\n[repository]\nshare_with = []\n\
         [[member]]\njid = \"b@federation.test\"\nshare_components = true\n",
    )
    .await;
    let pack = home.holds("one", 100_000);
    let vm = spec("one");
    assert_eq!(home.check("a", &vm, &[pack]).await.packs_lacking, [0u32; 0]);
    let answer = home.check("b", &vm, &[pack]).await;
    assert_eq!((answer.packs_lacking.as_slice(), policy_texts(&answer.blockers).len()), (&[0][..], 1));
    assert_eq!(home.reserve("b", &vm).await.unwrap_err().code, DenialCode::Policy);
    assert_eq!(home.content("a", &[pack]).await.unwrap_err().code, DenialCode::Policy);
    assert_eq!(home.content("b", &[pack]).await.unwrap().packs_held, [0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_attack_is_refused_and_counted_by_its_kind_and_sender() {
    let home = Home::start("").await;
    let vm = spec("one");
    home.reserve("a", &vm).await.unwrap();
    let cancel = || RequestBody::Cancel { reason: "x".into() };
    let e = || home.envelope("a", vm.id, cancel());
    let now = home.clock.now();

    let once = e();
    assert_eq!(home.ask_as(once.clone(), &key("a")).await, Some(AnswerBody::Cancelled { kept_s: 0 }));
    let long_ago = UnixMillis(now.0 - (LIFETIME + SKEW).as_millis() as u64 - 1000);
    let refused = [
        ("replay", once, "a"),
        ("expired", Envelope { issued: long_ago, expires: long_ago.plus(LIFETIME), ..e() }, "a"),
        ("expired", Envelope { expires: now.plus(LIFETIME * 10), ..e() }, "a"),
        ("signature", e(), "b"),
        ("wrong-recipient", Envelope { to: jid("b"), ..e() }, "a"),
        ("version", Envelope { version: VERSION + 1, ..e() }, "a"),
        ("version", Envelope { version: 0, ..e() }, "a"),
        ("untrusted-key", Envelope { from: jid("stranger"), ..e() }, "stranger"),
        ("not-member", Envelope { from: jid("nobody"), ..e() }, "nobody"),
    ];
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for (kind, envelope, signer) in refused {
        let answer = home.ask_as(envelope, &key(signer)).await;
        // A trusted sender of another version is told so; all others learn nothing.
        let code = answer.as_ref().map(|answer| match answer {
            AnswerBody::Denied(d) => d.code,
            other => panic!("{kind}: {other:?}"),
        });
        // So is one whose clock differs, if the message is a sound one otherwise.
        let expected = match kind {
            "version" => Some(DenialCode::Version),
            "expired" if *counts.get(kind).unwrap_or(&0) == 0 => Some(DenialCode::Clock),
            _ => None,
        };
        assert_eq!(code, expected, "{kind}");
        *counts.entry(kind).or_default() += 1;
    }
    let ahead_ms = home.member("a").await.clock_ahead_ms;
    assert_eq!(ahead_ms, Some(0), "an old message that comes again says nothing of a clock");
    let ahead = now.plus(LIFETIME + SKEW);
    let early = Envelope { issued: ahead, expires: ahead.plus(LIFETIME), ..e() };
    match home.ask_as(early, &key("a")).await {
        Some(AnswerBody::Denied(d)) => {
            assert_eq!(d.code, DenialCode::Clock);
            assert!(d.text.contains(&ahead.to_string()) && d.text.contains(&now.to_string()), "{}", d.text);
        }
        other => panic!("{other:?}"),
    }
    *counts.entry("expired").or_default() += 1;
    assert_eq!(home.member("a").await.clock_ahead_ms, Some((LIFETIME + SKEW).as_millis() as i64));
    // Somebody else's sealed message, sent on as one's own.
    let of_b = home.envelope("b", vm.id, cancel()).seal(&key("a")).unwrap();
    assert_eq!(home.asked(&jid("a"), of_b).await, None);
    *counts.entry("wrong-sender").or_default() += 1;
    for rubbish in [vec![], vec![0; 63], vec![0; 200 << 10]] {
        assert_eq!(home.asked(&jid("a"), rubbish).await, None);
        *counts.entry("malformed").or_default() += 1;
    }
    *counts.entry("signature").or_default() += 1;
    assert_eq!(home.asked(&jid("a"), vec![7; 500]).await, None);

    // Well signed, but another's: a migration, and a VM that was never handed over to them.
    let mine = spec("mine");
    let theirs = home.envelope("a", mine.id, RequestBody::Reservation { spec: mine.clone() });
    home.ask_as(theirs.clone(), &key("a")).await.unwrap();
    let meddling = [
        Envelope { migration: theirs.migration, ..home.envelope("b", mine.id, cancel()) },
        Envelope { migration: theirs.migration, ..home.envelope("a", vm.id, cancel()) },
        home.envelope("b", vm.id, RequestBody::Reservation { spec: mine.clone() }),
    ];
    for envelope in meddling {
        let signer = key(envelope.from.as_str().split('@').next().unwrap());
        match home.ask_as(envelope, &signer).await {
            Some(AnswerBody::Denied(d)) => assert_eq!(d.code, DenialCode::NotYours),
            other => panic!("{other:?}"),
        }
        *counts.entry("not-yours").or_default() += 1;
    }
    // A hand-over meant for another target, and one that another source signed.
    let hand_over = |source: &str, target: &str| HandOver {
        vm: vm.id,
        migration: MigrationId::random(),
        epoch: 2,
        source: jid(source),
        source_key: key(source).public(),
        target: jid(target),
        target_key: key(target).public(),
        recipe: vm.recipe,
        root_delta: MapId::of(b"root"),
        user_data: MapId::of(b"data"),
        issued: now,
        provenance: None,
    };
    for (source, target) in [("a", "b"), ("b", "home")] {
        let signed = hand_over(source, target).sign(&key(source));
        match home.ask("a", vm.id, RequestBody::Start { hand_over: signed, run: true }).await {
            AnswerBody::Denied(d) => assert_eq!(d.code, DenialCode::HandOver),
            other => panic!("{other:?}"),
        }
        *counts.entry("stale-epoch").or_default() += 1;
    }
    // The account of a member shows another key.
    home.shows("b", key("c").public());
    assert_eq!(home.ask_as(home.envelope("b", vm.id, cancel()), &key("c")).await, None);
    *counts.entry("changed-key").or_default() += 1;
    let b = home.member("b").await;
    assert_eq!((b.trust.as_str(), b.pinned_fingerprint), ("changed", key("b").public().fingerprint()));
    assert_eq!(b.fingerprint, key("c").public().fingerprint());

    let seen = home.status().await.refusals;
    let counts: BTreeMap<String, u64> = counts.into_iter().map(|(kind, n)| (kind.to_owned(), n)).collect();
    assert_eq!(seen.by_kind, counts);
    assert_eq!(seen.total, counts.values().sum::<u64>());
    assert_eq!(
        home.member("b").await.refused,
        BTreeMap::from([("changed-key".into(), 1), ("not-yours".into(), 2)])
    );
    assert!(seen.senders.iter().any(|s| s.sender == jid("nobody").to_string()));
    assert!(home.member("stranger").await.refused.contains_key("untrusted-key"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_too_often_is_told_when_to_come_back() {
    let home = Home::start("[[member]]\njid = \"a@federation.test\"\nrequests_per_minute = 60\n").await;
    let (vm, cancel) = (VmId::random(), RequestBody::Cancel { reason: "x".into() });
    for _ in 0..10 {
        assert_eq!(home.ask("a", vm, cancel.clone()).await, AnswerBody::Cancelled { kept_s: 0 });
    }
    match home.ask("a", vm, cancel.clone()).await {
        AnswerBody::Denied(d) => {
            assert_eq!((d.code, d.retry_after_ms), (DenialCode::RateLimited, Some(1000)))
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(
        home.ask("b", vm, cancel.clone()).await,
        AnswerBody::Cancelled { kept_s: 0 },
        "another is not slowed"
    );
    let mut answered = 0;
    for _ in 0..100 {
        let e = home.envelope("a", vm, cancel.clone());
        answered += u32::from(home.ask_as(e, &key("a")).await.is_some());
    }
    assert_eq!(answered, 9, "a flood is not even told any more");
    assert_eq!(home.refused("rate-limit").await, 101);
    home.clock.advance(Duration::from_secs(1));
    assert_eq!(home.ask("a", vm, cancel).await, AnswerBody::Cancelled { kept_s: 0 });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cap_for_a_member_holds_over_all_its_tickets() {
    const CAP: u64 = 512 << 10;
    let cap = format!("[[member]]\njid = \"a@federation.test\"\nbandwidth_limit = \"{CAP}\"\n");
    let home = Home::start(&cap).await;
    let packs = [home.holds("one", 1 << 20), home.holds("two", 1 << 20)];
    let (a, b) = (Fetcher::new("a"), Fetcher::new("b"));
    let mut times = Vec::new();
    for (name, fetcher) in [("b", b), ("a", a)] {
        let connection = fetcher.connect(&home).await.unwrap();
        let answers =
            [home.content(name, &packs[..1]).await.unwrap(), home.content(name, &packs[1..]).await.unwrap()];
        let begun = Instant::now();
        let (one, two) = tokio::join!(
            fetch(&connection, &answers[0], packs[0]),
            fetch(&connection, &answers[1], packs[1])
        );
        assert!(one.unwrap().refused.is_empty() && two.unwrap().refused.is_empty());
        times.push(begun.elapsed());
    }
    println!("2 MiB without a cap {:?}, capped at 512 KiB/s {:?}", times[0], times[1]);
    // 4 s on the dot; the last of it may still be in buffers.
    assert!(times[1] > Duration::from_secs(3), "{:?}", times[1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_travels_to_a_member_that_is_revoked_or_removed_is_cut() {
    for revoked in [true, false] {
        let slow = "[[member]]\njid = \"a@federation.test\"\nbandwidth_limit = \"65536\"\n";
        let home = Home::start(slow).await;
        let pack = home.holds("large", 8 << 20);
        let a = Fetcher::new("a");
        let connection = a.connect(&home).await.unwrap();
        let answer = home.content("a", &[pack]).await.unwrap();
        home.reserve("a", &spec("one")).await.unwrap();
        let (fetching, its) = (connection.clone(), answer.clone());
        let fetch_of_minutes = tokio::spawn(async move { fetch(&fetching, &its, pack).await });
        let begun = Instant::now();
        while connection.stats().received_bytes < 100 << 10 {
            assert!(begun.elapsed() < SOON, "nothing comes");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if revoked {
            home.call(Request::Cloud(CloudRequest::IdentityRevoke { member: jid("a") })).await.unwrap();
        } else {
            home.room(RoomInput::Removed(jid("a")));
        }
        let end = tokio::time::timeout(SOON, fetch_of_minutes).await.expect("the transfer goes on");
        assert!(end.unwrap().is_err());
        assert_eq!(home.member("a").await.used.vms, 0, "its reservation is gone");
        assert_eq!(home.member("a").await.state.as_str(), if revoked { "online" } else { "removed" });
        assert!(home.shared.endpoint.connection_with(&key("a").public()).is_none());
        match a.connect(&home).await {
            Err(TransferError::Refused { reason: Refusal::NotMember, .. }) => {}
            other => panic!("{other:?}"),
        }
        let cancel = RequestBody::Cancel { reason: "x".into() };
        assert_eq!(home.ask_as(home.envelope("a", VmId::random(), cancel), &key("a")).await, None);
        let kind = if revoked { "untrusted-key" } else { "not-member" };
        assert!(home.member("a").await.refused[kind] >= 1);
        assert!(home.refused("not-member").await >= 1, "the dial is counted too");

        // What it had is gone even if it is trusted again.
        match revoked {
            true => {
                let request =
                    Request::Cloud(CloudRequest::IdentityTrust { member: jid("a"), key: key("a").public() });
                home.call(request).await.unwrap();
            }
            false => home.shows("a", key("a").public()),
        }
        assert_eq!(home.member("a").await.trust.as_str(), "trusted");
        let connection = a.connect(&home).await.unwrap();
        let report = fetch(&connection, &answer, pack).await.unwrap();
        assert_eq!(report.refused, [(ObjectKey::Pack(pack), Refusal::UnknownTicket)]);
        assert_eq!(home.member("a").await.refused["ticket"], 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_members_key_gives_way_to_another_only_by_its_own_word_and_only_once() {
    let home = Home::start("").await;
    let step = |old: &str, new: &str| Succession::sign(&key(old), &key(new), UnixMillis(1));
    let trust = async || home.member("a").await.trust;
    let cancel = || RequestBody::Cancel { reason: "x".into() };
    // What a signer under a's name gets: an answer, or nothing but a count of that kind.
    let asks = async |signer: &str| {
        let before = home.member("a").await.refused;
        let answer = home.ask_as(home.envelope("a", VmId::random(), cancel()), &key(signer)).await;
        let after = home.member("a").await.refused;
        let kind = after.into_iter().find(|(kind, n)| before.get(kind) != Some(n)).map(|(kind, _)| kind);
        assert_eq!(answer.is_some(), kind.is_none(), "{answer:?} {kind:?}");
        kind
    };
    let dials = async |name: &str| Fetcher::new(name).connect(&home).await.is_ok();
    let refused = |kind: &str| Some(kind.to_owned());
    assert_eq!((asks("a").await, dials("a").await), (None, true));

    // Forged: without the old key, without the new one, by somebody else's, or none at all.
    let forged = Succession { by_old: step("thief", "new").by_old, ..step("a", "new") };
    let taken = Succession { by_new: step("a", "thief").by_new, ..step("a", "new") };
    for proofs in [vec![forged], vec![taken], vec![step("b", "new")], vec![]] {
        home.shows_with("a", key("new").public(), &proofs);
        assert_eq!(trust().await.as_str(), "changed", "{proofs:?}");
        assert_eq!((asks("new").await, dials("new").await), (refused("changed-key"), false));
    }

    // By its own word it is followed, at once and for good; the old key is none any more.
    home.shows("a", key("a").public());
    let old = Fetcher::new("a");
    old.connect(&home).await.unwrap();
    home.shows_with("a", key("new").public(), &[step("a", "new")]);
    let member = home.member("a").await;
    assert_eq!((member.trust.as_str(), member.predecessors.len()), ("trusted", 1));
    assert_eq!(member.predecessors[0].key, key("a").public());
    assert!(home.shared.endpoint.connection_with(&key("a").public()).is_none(), "what it had is cut");
    assert_eq!((asks("new").await, asks("a").await), (None, refused("signature")));
    assert_eq!((dials("new").await, old.connect(&home).await.is_ok()), (true, false));
    let kept = home.shared.records.trust().unwrap();
    assert!(kept[&jid("a")].successions.leads(&key("a").public(), &key("new").public()));

    // A copy of the old key is of no use, not even with a succession of its own.
    home.shows("a", key("a").public());
    assert_eq!((trust().await.as_str(), asks("a").await), ("superseded", refused("changed-key")));
    let before = home.refused("changed-key").await;
    home.shows_with("a", key("thief").public(), &[step("a", "thief")]);
    assert_eq!((trust().await.as_str(), home.refused("changed-key").await), ("forked", before + 1));
    assert_eq!((asks("thief").await, dials("thief").await), (refused("changed-key"), false));
    assert_eq!(home.member("a").await.pinned_fingerprint, key("new").public().fingerprint());
    home.shows_with("a", key("new").public(), &[step("a", "new")]);
    assert_eq!((trust().await.as_str(), asks("new").await), ("trusted", None));

    // Revoked, neither key counts, nor what either introduces.
    home.call(Request::Cloud(CloudRequest::IdentityRevoke { member: jid("a") })).await.unwrap();
    for (shown, proofs) in [
        ("new", vec![step("a", "new")]),
        ("a", vec![]),
        ("later", vec![step("a", "new"), step("new", "later")]),
        ("thief", vec![step("a", "thief")]),
    ] {
        home.shows_with("a", key(shown).public(), &proofs);
        assert_eq!(trust().await.as_str(), "revoked", "{shown}");
        assert_eq!((asks(shown).await, dials(shown).await), (refused("untrusted-key"), false));
    }
    let revoked = home.shared.records.revoked().unwrap();
    assert_eq!(revoked.0[&jid("a")].len(), 2);
}

/// Lets these in, and keeps what was refused.
struct Keeper(Vec<PublicKey>, Mutex<Vec<Refused>>);

impl Authority for Keeper {
    fn admit(&self, peer: &PublicKey) -> Result<(), Refusal> {
        if self.0.contains(peer) { Ok(()) } else { Err(Refusal::NotMember) }
    }
    fn check(&self, _: &PublicKey, _: &Ticket, _: &ObjectKey) -> Result<(), Refusal> {
        Err(Refusal::UnknownTicket)
    }
    fn refused(&self, _: Option<&PublicKey>, _: IpAddr, reason: Refused) {
        self.1.lock().unwrap().push(reason);
    }
}

fn keeper(settings: Settings) -> (Arc<Keeper>, Endpoint) {
    let keeper = Arc::new(Keeper(vec![key("a").public()], Mutex::default()));
    let (any, limiter) = ("127.0.0.1:0".parse().unwrap(), Limiter::unlimited());
    let nothing = Arc::new(Nothing);
    let endpoint =
        Endpoint::bind_with(any, &key("home"), keeper.clone(), nothing, limiter, settings).unwrap();
    (keeper, endpoint)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_address_dials_only_so_often_and_one_member_holds_only_so_many_connections() {
    let few_dials = Settings { dials_burst: 3, dials_per_s: 0, ..Settings::default() };
    let (keeper_of_few, door) = keeper(few_dials);
    let stranger = Fetcher::new("stranger");
    for n in 0..10 {
        let error =
            stranger.0.connect(&[door.local_addr().unwrap()], key("home").public()).await.unwrap_err();
        // Three unproven, and three more that had to prove their address.
        let heard = matches!(error, TransferError::Refused { reason: Refusal::NotMember, .. });
        assert_eq!(heard, n < 6, "dial {n}: {error:?}");
    }
    let refused = keeper_of_few.1.lock().unwrap().clone();
    assert_eq!(refused, [[Refused::NotMember; 6].as_slice(), &[Refused::RateLimit; 4]].concat());

    let (keeper_of_two, door) = keeper(Settings { connections_per_member: 2, ..Settings::default() });
    let (a, at) = (Fetcher::new("a"), [door.local_addr().unwrap()]);
    let one = a.0.connect(&at, key("home").public()).await.unwrap();
    let _two = a.0.connect(&at, key("home").public()).await.unwrap();
    match a.0.connect(&at, key("home").public()).await.unwrap_err() {
        TransferError::Refused { reason: Refusal::TooMany, .. } => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(*keeper_of_two.1.lock().unwrap(), [Refused::RateLimit]);
    one.close();
    let begun = Instant::now();
    while a.0.connect(&at, key("home").public()).await.is_err() {
        assert!(begun.elapsed() < SOON, "a connection that was closed counts still");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
