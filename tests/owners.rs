//! Who owns a VM, among liars and restored backups: one real broker with its records on disk, and members
//! that are scripts. Messages, signatures and histories are real.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cicada::broker::interface::VmView;
use cicada::broker::records::Records;
use cicada::broker::serving::{Store, Tickets};
use cicada::broker::{Broker, Input, Link, LinkError, Problem, Reply, Request, RoomInput, Shared};
use cicada::clock::{Clock, ManualClock, UnixMillis};
use cicada::compose::Composer;
use cicada::config::Config;
use cicada::federation::{Members, Presence};
use cicada::hypervisor::FakeDriver;
use cicada::migration::envelope::{LIFETIME, VERSION, VERSION_BEFORE};
use cicada::migration::handover::{Origin, Provenance, SignedHandOver};
use cicada::migration::message::{Claim, Known, Seed};
use cicada::migration::ownership::{Gift, Given, Guest, Standing};
use cicada::migration::records::VmRecord;
use cicada::migration::{
    AnswerBody, DenialCode, Envelope, HandOver, Law, Lineage, Link as OwnershipLink, Links, RequestBody,
};
use cicada::repository::Repository;
use cicada::stanza::Cloud;
use cicada::transfer::{Endpoint, Limiter};
use cicada::types::{
    ByteSize, Hash, IdentityKey, MapId, MemberJid, MigrationId, RecipeId, ReservationId, VmId,
};
use cicada::vm::{Firmware, MapRef, VmSpec};
use futures::future::{BoxFuture, FutureExt};
use tokio::sync::{mpsc, oneshot};

const SOON: Duration = Duration::from_secs(30);
const NOW: UnixMillis = UnixMillis(1_700_000_000_000);

fn jid(name: &str) -> MemberJid {
    format!("{name}@federation.test").parse().unwrap()
}

fn key(name: &str) -> IdentityKey {
    IdentityKey::from_secret_bytes(Hash::of(name.as_bytes()).as_bytes())
}

fn spec(n: u128) -> VmSpec {
    VmSpec {
        id: VmId(uuid::Uuid::from_u128(n)),
        name: format!("vm-{n}").parse().unwrap(),
        cpus: 1,
        memory: ByteSize::mib(64),
        recipe: RecipeId::of(b"r"),
        root_size: ByteSize::mib(1),
        user_data_size: ByteSize(0),
        nics: Vec::new(),
        architecture: "amd64".into(),
        cpu_model: "qemu64".into(),
        firmware: Firmware::Bios,
    }
}

fn map() -> MapRef {
    MapRef { block_size_bytes: 4096, disk_size_bytes: 1 << 20, root: None }
}

/// A VM's way through clouds, made by the rules that ship: what each last recorded, and the history.
struct Way {
    records: BTreeMap<String, VmRecord>,
    history: Lineage,
}

impl Way {
    fn born(n: u128, at: &str) -> Self {
        let record = VmRecord { run: true, ..VmRecord::new(spec(n), Vec::new(), "disks-1", NOW) };
        Self { history: Lineage::empty(spec(n).id), records: BTreeMap::from([(at.to_owned(), record)]) }
    }

    fn moved(mut self, from: &str, to: &str) -> Self {
        let reservation = ReservationId::random();
        let gift = Gift {
            migration: MigrationId::random(),
            source: jid(from),
            source_key: key(from).public(),
            target: jid(to),
            target_key: key(to).public(),
            reservation: Some(reservation),
            seed: Seed { root_delta: map(), user_data: map() },
            was_running: true,
            now: NOW,
        };
        let (record, h) = Law::WHOLE.give_up(&self.records[from], &self.history, gift).unwrap();
        let signed: SignedHandOver = h.sign(&key(from));
        let guest = Guest {
            spec: record.spec.clone(),
            components: Vec::new(),
            disks: "disks-1".into(),
            run: true,
            reservation,
            now: NOW,
            grace: Duration::from_secs(60),
        };
        let empty = Lineage::empty(record.spec.id);
        let standing = Standing { record: None, known: &empty, damaged: false };
        let (taken, _) = Law::WHOLE
            .take_over(standing, Given::default(), Some(&self.history), signed, &key(to), guest)
            .unwrap();
        let receipt = taken.arrival.as_ref().unwrap().receipt.clone();
        self.history.push(OwnershipLink::from(receipt.clone())).unwrap();
        let released = Law::WHOLE.release(&record, receipt, NOW.plus(Duration::from_secs(3600))).unwrap();
        self.records.insert(from.to_owned(), released);
        self.records.insert(to.to_owned(), taken);
        self
    }
}

/// Members that answer what the broker asks about owners, or nothing.
#[derive(Clone)]
struct Script {
    clock: ManualClock,
    known: Arc<std::sync::Mutex<Option<Vec<Known>>>>,
}

impl Link for Script {
    fn request(
        &self,
        to: &MemberJid,
        sealed: Vec<u8>,
        _: Duration,
    ) -> BoxFuture<'static, Result<Vec<u8>, LinkError>> {
        let (to, now) = (to.clone(), self.clock.now());
        let known = self.known.lock().unwrap().clone();
        async move {
            let name = to.to_string().split('@').next().unwrap().to_owned();
            let opened =
                Envelope::<RequestBody>::open(&sealed, &key("home").public(), &jid("home"), &to, now);
            let (request, Some(known)) = (opened.unwrap(), known) else {
                return Err(LinkError::NotOnline(to));
            };
            let body = match request.body {
                RequestBody::Owners { .. } if name == "a" => AnswerBody::Owners { known },
                RequestBody::Owners { .. } => AnswerBody::Owners { known: Vec::new() },
                _ => return Err(LinkError::NotOnline(to)),
            };
            let answer = Envelope {
                version: request.version,
                from: to.clone(),
                to: jid("home"),
                migration: request.migration,
                vm: request.vm,
                epoch: request.epoch,
                nonce: request.nonce,
                issued: now,
                expires: now.plus(LIFETIME),
                body,
            };
            Ok(answer.seal(&key(&name)).unwrap())
        }
        .boxed()
    }
}

struct Home {
    dir: tempfile::TempDir,
    shared: Arc<Shared>,
    inbox: mpsc::UnboundedSender<Input>,
    clock: ManualClock,
    script: Script,
}

impl Home {
    /// With these records, and histories beside them, as a stopped broker left them.
    async fn start(ways: &[&Way], with_histories: bool, after_restore: bool) -> Self {
        let clock = ManualClock::new(NOW);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("federation.toml");
        let text = format!(
            "[cloud]\nname = \"home\"\ndata_dir = \"data\"\n[xmpp]\njid = \"{}\"\npassword_file = \"p\"\n\
             room = \"fed@rooms.federation.test\"\n[transfer]\nlisten = \"127.0.0.1:0\"\n\
             [hypervisor]\ncpus = 64\nmemory = \"64G\"\n[migration]\nconfirm_patience_s = 5\n",
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
        let records = Records::open(&config.cloud.data_dir).unwrap();
        for way in ways {
            records.save_vm(&way.records["home"]).unwrap();
            if with_histories {
                records.save_lineage(&way.history).unwrap();
            }
        }
        let (inbox, inputs) = mpsc::unbounded_channel();
        let script = Script { clock: clock.clone(), known: Arc::default() };
        let shared = Arc::new(Shared {
            me: jid("home"),
            key: identity,
            clock: Arc::new(clock.clone()),
            composer: Composer::new(repository.clone()),
            repository,
            driver: Arc::new(FakeDriver::new(Arc::new(clock.clone()))),
            link: Arc::new(script.clone()),
            endpoint,
            tickets,
            records,
            inbox: inbox.clone(),
            versions: Default::default(),
            config,
        });
        let confirmed = BTreeMap::from(["a", "b"].map(|name| (jid(name), key(name).public().into())));
        let members = Members::new(BTreeMap::new(), confirmed, false);
        let broker = Broker::open(shared.clone(), members, Box::new(|_| ())).unwrap();
        let broker = if after_restore { broker.after_restore().unwrap() } else { broker };
        tokio::spawn(broker.run(inputs));
        Self { dir, shared, inbox, clock, script }
    }

    fn sees(&self, name: &str) {
        let cloud = Cloud {
            name: name.into(),
            key: key(name).public().to_string().into(),
            versions: "2,1".into(),
            power: "on".into(),
            ..Cloud::default()
        };
        let presence =
            Presence { jid: jid(name), resource: "x".into(), available: true, cloud: Some(Box::new(cloud)) };
        let input = Input::Room(RoomInput::Presence(presence));
        self.inbox.send(input).unwrap_or_else(|_| panic!("stopped"));
    }

    async fn call(&self, request: Request) -> Result<Reply, Problem> {
        let (events, _seen) = mpsc::channel(64);
        let (reply, answer) = oneshot::channel();
        self.inbox.send(Input::Call { request, events, reply }).unwrap_or_else(|_| panic!("stopped"));
        answer.await.unwrap()
    }

    async fn vm(&self, n: u128) -> VmView {
        match self.call(Request::VmShow { vm: spec(n).id.to_string() }).await.unwrap() {
            Reply::Vm(vm) => *vm,
            other => panic!("{other:?}"),
        }
    }

    async fn until(&self, n: u128, what: impl Fn(&VmView) -> bool) -> VmView {
        let begun = Instant::now();
        loop {
            let vm = self.vm(n).await;
            if what(&vm) {
                return vm;
            }
            assert!(begun.elapsed() < SOON, "{vm:?}");
            self.clock.advance(Duration::from_millis(200));
            let _ = self.inbox.send(Input::Tick);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn refused(&self, kind: &str) -> u64 {
        match self.call(Request::Status).await.unwrap() {
            Reply::Status(status) => status.refusals.by_kind.get(kind).copied().unwrap_or(0),
            other => panic!("{other:?}"),
        }
    }

    async fn ask(
        &self,
        from: &str,
        version: u32,
        matter: (MigrationId, VmId),
        body: RequestBody,
    ) -> AnswerBody {
        let now = self.clock.now();
        let envelope = Envelope {
            version,
            from: jid(from),
            to: jid("home"),
            migration: matter.0,
            vm: matter.1,
            epoch: 1_000_000,
            nonce: uuid::Uuid::new_v4().simple().to_string(),
            issued: now,
            expires: now.plus(LIFETIME),
            body,
        };
        let (reply, answer) = oneshot::channel();
        let payload = envelope.seal(&key(from)).unwrap();
        let input = Input::Asked { from: jid(from), payload, reply };
        self.inbox.send(input).unwrap_or_else(|_| panic!("stopped"));
        let sealed = answer.await.unwrap().expect("refused without a word");
        let home = self.shared.key.public();
        Envelope::<AnswerBody>::open(&sealed, &home, &jid("home"), &jid(from), now).unwrap().body
    }

    fn files(&self, of: &str) -> usize {
        std::fs::read_dir(Path::new(self.dir.path()).join("data").join(of)).unwrap().count()
    }
}

fn denied(answer: &AnswerBody) -> Option<DenialCode> {
    match answer {
        AnswerBody::Denied(d) => Some(d.code),
        _ => None,
    }
}

fn page(history: &Lineage, after: Option<cicada::types::LinkId>) -> RequestBody {
    let links = history.since(after.as_ref()).to_vec();
    RequestBody::Lineage {
        at: 0,
        total: links.len() as u32,
        after,
        links: Links(links),
        successions: history.successions().clone(),
    }
}

/// The shown attack, in both versions; and the true owner still sends the VM home.
#[tokio::test(flavor = "multi_thread")]
async fn who_never_had_a_vm_takes_it_from_nobody() {
    let way = Way::born(1, "home").moved("home", "a");
    let home = Home::start(&[&way], true, false).await;
    ["a", "b"].iter().for_each(|name| home.sees(name));
    *home.script.known.lock().unwrap() = Some(Vec::new());
    home.until(1, |vm| vm.ownership == "given-up").await;
    // Until both have said what they know, nothing comes.
    let reservation = || RequestBody::Reservation { spec: spec(1) };
    let begun = Instant::now();
    loop {
        let id = MigrationId::random();
        match home.ask("b", VERSION, (id, spec(1).id), reservation()).await {
            AnswerBody::Reserved { .. } => {
                // It claims to have made the VM.
                let answer =
                    home.ask("b", VERSION, (id, spec(1).id), page(&Lineage::empty(spec(1).id), None)).await;
                assert_eq!(denied(&answer), Some(DenialCode::HandOver));
                break;
            }
            answer => assert_eq!(denied(&answer), Some(DenialCode::Busy)),
        }
        assert!(begun.elapsed() < SOON);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Or got it from a friend, or speaks the version before.
    let forged = Way::born(1, "friend").moved("friend", "b");
    let id = MigrationId::random();
    home.ask("b", VERSION, (id, spec(1).id), reservation()).await;
    let answer = home.ask("b", VERSION, (id, spec(1).id), page(&forged.history, None)).await;
    assert_eq!(denied(&answer), Some(DenialCode::HandOver));
    let id = MigrationId::random();
    let answer = home.ask("b", VERSION_BEFORE, (id, spec(1).id), reservation()).await;
    assert_eq!(denied(&answer), Some(DenialCode::HandOver), "{answer:?}");
    assert!(home.refused("stale-epoch").await >= 3, "what is refused is counted");
    // The owner shows what leads from here: nothing, since all is known.
    let id = MigrationId::random();
    let AnswerBody::Reserved { known, .. } = home.ask("a", VERSION, (id, spec(1).id), reservation()).await
    else {
        panic!("the owner is refused");
    };
    assert_eq!(known, way.history.tip().map(|tip| tip.id));
    let answer = home.ask("a", VERSION, (id, spec(1).id), page(&way.history, known)).await;
    assert_eq!(answer, AnswerBody::Lineage { links: 0 });
    let vm = home.vm(1).await;
    assert_eq!((vm.ownership.as_str(), vm.epoch), ("given-up", 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn hand_overs_of_unknown_vms_cost_no_file() {
    let home = Home::start(&[], false, false).await;
    home.sees("b");
    *home.script.known.lock().unwrap() = Some(Vec::new());
    let counted =
        |home: &Home| ["returns", "receipts", "lineages", "migrations", "vms"].map(|of| home.files(of));
    let before = counted(&home);
    let mut returned = 0;
    for n in 0..400u128 {
        let id = MigrationId::random();
        let h = HandOver {
            vm: spec(n + 10).id,
            migration: id,
            epoch: 1_000_001,
            source: jid("b"),
            source_key: key("b").public(),
            target: jid("home"),
            target_key: key("home").public(),
            recipe: RecipeId::of(b"r"),
            root_delta: MapId::of(b"d"),
            user_data: MapId::of(b"u"),
            issued: NOW,
            provenance: Some(Provenance { origin: Origin::Born, reservation: ReservationId::random() }),
        };
        let body = RequestBody::Start { hand_over: h.sign(&key("b")), run: true };
        match home.ask("b", VERSION, (id, spec(n + 10).id), body).await {
            AnswerBody::Returned { back, .. } => {
                back.verify().unwrap();
                returned += 1;
            }
            answer => assert_eq!(denied(&answer), Some(DenialCode::RateLimited)),
        }
        if n % 50 == 0 {
            home.clock.advance(Duration::from_secs(30));
        }
    }
    assert!(returned > 100, "{returned}");
    assert_eq!(counted(&home), before);
    // Of the version before: one for each VM, and only so many a day.
    for n in 0..300u128 {
        let id = MigrationId::random();
        let h = HandOver {
            vm: spec(n + 10).id,
            migration: id,
            epoch: 7,
            source: jid("b"),
            source_key: key("b").public(),
            target: jid("home"),
            target_key: key("home").public(),
            recipe: RecipeId::of(b"r"),
            root_delta: MapId::of(b"d"),
            user_data: MapId::of(b"u"),
            issued: NOW,
            provenance: None,
        };
        let body = RequestBody::Start { hand_over: h.sign(&key("b")), run: true };
        home.ask("b", VERSION_BEFORE, (id, spec(n + 10).id), body).await;
        if n % 50 == 0 {
            home.clock.advance(Duration::from_secs(30));
        }
    }
    let kept = home.files("returns") - before[0];
    assert!((1..=110).contains(&kept), "{kept}");
}

/// Yesterday's backup: the VM is not run, and given up with the proof shown.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_broker_asks_before_it_runs_and_believes_the_proof() {
    let backup = Way::born(1, "home");
    let now = Way::born(1, "home");
    let now = Way { records: backup.records.clone(), history: now.history }.moved("home", "a");
    let home = Home::start(&[&backup], true, true).await;
    // Nobody answers: held back, then the operator is told what may be done.
    let vm = home.vm(1).await;
    assert_eq!(vm.ownership, "here");
    assert!(vm.problem.as_ref().unwrap().reason.contains("a@federation.test"), "{:?}", vm.problem);
    let start = |by_word: bool| Request::VmStart { vm: "vm-1".into(), unconfirmed: by_word, by_uid: Some(1) };
    assert!(home.call(start(false)).await.is_err());
    home.clock.advance(Duration::from_secs(6));
    let vm = home.vm(1).await;
    assert!(vm.problem.unwrap().next_step.contains("--unconfirmed"));
    // The owner comes online.
    let shown = Known {
        vm: spec(1).id,
        links: Links(now.history.links().to_vec()),
        successions: Default::default(),
        more: false,
        here: true,
        running: true,
    };
    *home.script.known.lock().unwrap() = Some(vec![shown]);
    ["a", "b"].iter().for_each(|name| home.sees(name));
    let vm = home.until(1, |vm| vm.ownership == "given-up").await;
    assert_eq!((vm.owner, vm.epoch), (Some(jid("a")), 1));
    assert!(home.call(start(true)).await.is_err(), "no word helps against the proof");
}

/// An operator may take the risk, and that is recorded.
#[tokio::test(flavor = "multi_thread")]
async fn an_operators_word_is_recorded() {
    let way = Way::born(1, "home");
    let home = Home::start(&[&way], true, true).await;
    let request = Request::VmStart { vm: "vm-1".into(), unconfirmed: true, by_uid: Some(7) };
    // There is nothing to compose it from here; it was allowed all the same.
    let _ = home.call(request).await;
    let (records, _) = home.shared.records.vms().unwrap();
    let start = records[0].unconfirmed_start.clone().expect("it is recorded");
    assert_eq!(start.by_uid, Some(7));
    assert_eq!(start.silent, [jid("a"), jid("b")]);
}

/// The rightful owner shows that a former one runs a copy, and is not locked by it.
#[tokio::test(flavor = "multi_thread")]
async fn both_ends_show_that_a_vm_is_contested() {
    let way = Way::born(1, "b").moved("b", "home");
    let home = Home::start(&[&way], true, false).await;
    *home.script.known.lock().unwrap() = Some(Vec::new());
    ["a", "b"].iter().for_each(|name| home.sees(name));
    home.until(1, |vm| vm.problem.is_none()).await;
    let claim = |running: bool| RequestBody::Owners {
        claims: vec![Claim { vm: spec(1).id, tip: None, epoch: 1, running }],
    };
    let nobody = (MigrationId::random(), VmId(uuid::Uuid::nil()));
    // A stranger to its history contests nothing.
    home.ask("a", VERSION, nobody, claim(true)).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(home.vm(1).await.ownership, "here");
    let AnswerBody::Owners { known } = home.ask("b", VERSION, nobody, claim(true)).await else { panic!() };
    assert_eq!(known[0].links.0, way.history.links(), "it is shown why");
    let vm = home.until(1, |vm| vm.ownership == "contested").await;
    assert!(vm.problem.unwrap().reason.contains("b@federation.test"));
    home.ask("b", VERSION, nobody, claim(false)).await;
    home.until(1, |vm| vm.ownership == "here").await;
}
