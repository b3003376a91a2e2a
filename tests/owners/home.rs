//! A cloud whose members are scripts: the real broker, its records on disk, signatures and histories.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cicada::broker::RoomInput;
use cicada::clock::{Clock, ManualClock, UnixMillis};
use cicada::compose::Composer;
use cicada::config::Config;
use cicada::federation::{Members, Presence};
use cicada::hypervisor::FakeDriver;
use cicada::interface::VmView;
use cicada::interface::{CloudRequest, Problem, Reply, Request, VmRequest};
use cicada::migration::envelope::{LIFETIME, VERSION_BEFORE};
use cicada::migration::handover::{Origin, Provenance, SignedHandOver};
use cicada::migration::message::{Known, Seed};
use cicada::migration::ownership::{Gift, Given, Guest, Standing};
use cicada::migration::records::VmRecord;
use cicada::migration::{AnswerBody, Envelope, HandOver, Law, Lineage, Link as OwnershipLink, RequestBody};
use cicada::repository::Repository;
use cicada::runner::Records;
use cicada::runner::content::serving::{Store, Tickets};
use cicada::runner::{Input, Link, LinkError, Runner, Shared};
use cicada::stanza::Cloud;
use cicada::transfer::{Endpoint, Limiter};
use cicada::types::{
    ByteSize, Hash, IdentityKey, MapId, MemberJid, MigrationId, RecipeId, ReservationId, VmId,
};
use cicada::vm::{Firmware, MapRef, VmSpec};
use futures::future::{BoxFuture, FutureExt};
use tokio::sync::{mpsc, oneshot};

pub const SOON: Duration = Duration::from_secs(30);
pub const NOW: UnixMillis = UnixMillis(1_700_000_000_000);

pub fn jid(name: &str) -> MemberJid {
    format!("{name}@federation.test").parse().unwrap()
}

pub fn key(name: &str) -> IdentityKey {
    IdentityKey::from_secret_bytes(Hash::of(name.as_bytes()).as_bytes())
}

pub fn spec(n: u128) -> VmSpec {
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
        disk_bus: Default::default(),
        system_uuid: None,
    }
}

pub fn map() -> MapRef {
    MapRef { block_size_bytes: 4096, disk_size_bytes: 1 << 20, root: None }
}

/// A hand-over to this cloud of a VM that nobody here ever heard of; version 1 says nothing of where it came from.
pub fn hand_over(from: &str, migration: MigrationId, vm: VmId, epoch: u64, version: u32) -> SignedHandOver {
    let provenance = Provenance { origin: Origin::Born, reservation: ReservationId::random() };
    let hand_over = HandOver {
        vm,
        migration,
        epoch,
        source: jid(from),
        source_key: key(from).public(),
        target: jid("home"),
        target_key: key("home").public(),
        recipe: RecipeId::of(b"r"),
        root_delta: MapId::of(b"d"),
        user_data: MapId::of(b"u"),
        issued: NOW,
        provenance: (version > VERSION_BEFORE).then_some(provenance),
    };
    hand_over.sign(&key(from))
}

/// A VM's way through clouds, made by the rules that ship: what each last recorded, and the history.
pub struct Way {
    pub records: BTreeMap<String, VmRecord>,
    pub history: Lineage,
}

impl Way {
    pub fn born(n: u128, at: &str) -> Self {
        let record = VmRecord { run: true, ..VmRecord::new(spec(n), Vec::new(), "disks-1", NOW) };
        Self { history: Lineage::empty(spec(n).id), records: BTreeMap::from([(at.to_owned(), record)]) }
    }

    pub fn moved(mut self, from: &str, to: &str) -> Self {
        let reservation = ReservationId::random();
        let gift = Gift {
            migration: MigrationId::random(),
            source: jid(from),
            source_key: key(from).public(),
            target: jid(to),
            target_key: key(to).public(),
            reservation: Some(reservation),
            seed: Seed { root_delta: map(), user_data: map() },
            to_run: true,
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
pub struct Script {
    clock: ManualClock,
    pub known: Arc<std::sync::Mutex<Option<Vec<Known>>>>,
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

pub struct Home {
    pub dir: tempfile::TempDir,
    pub shared: Arc<Shared>,
    inbox: cicada::runner::Inbox,
    pub clock: ManualClock,
    pub script: Script,
}

impl Home {
    /// With these records, and histories beside them, as a stopped broker left them.
    pub async fn start(ways: &[&Way], with_histories: bool, after_restore: bool) -> Self {
        let clock = ManualClock::new(NOW);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("federation.toml");
        let text = format!(
            "[cloud]\nname = \"home\"\ndata_dir = \"data\"\n[xmpp]\njid = \"{}\"\npassword_file = \"p\"\n\
             room = \"fed@rooms.federation.test\"\n[transfer]\nlisten = \"127.0.0.1:0\"\npeer_networks = [\"127.0.0.0/8\"]\n\
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
        let (inbox, inputs) = cicada::runner::inbox();
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
        let confirmed = BTreeMap::from(["a", "b"].map(|name| (jid(name), key(name).public())));
        let members = Members::new(BTreeMap::new(), confirmed, false);
        let broker = Runner::open(shared.clone(), members, Box::new(|_| ()), None).unwrap();
        let broker = if after_restore { broker.after_restore().unwrap() } else { broker };
        tokio::spawn(broker.run(inputs));
        Self { dir, shared, inbox, clock, script }
    }

    pub fn sees(&self, name: &str) {
        let cloud = Cloud {
            name: name.into(),
            key: key(name).public().to_string().into(),
            versions: "2,1".into(),
            power: "on".into(),
            ..Cloud::default()
        };
        let presence = Presence {
            jid: jid(name),
            resource: "x".into(),
            available: true,
            cloud: Some(std::sync::Arc::new(cloud)),
        };
        let input = Input::Room(RoomInput::Presence(presence));
        self.inbox.send(input).unwrap_or_else(|_| panic!("stopped"));
    }

    pub async fn call(&self, request: Request) -> Result<Reply, Problem> {
        let (events, _seen) = mpsc::channel(64);
        let (reply, answer) = oneshot::channel();
        self.inbox
            .send(Input::Call { request: Box::new(request), given: Default::default(), events, reply })
            .unwrap_or_else(|_| panic!("stopped"));
        answer.await.unwrap()
    }

    pub async fn vm(&self, n: u128) -> VmView {
        match self.call(Request::Vm(VmRequest::Show { vm: spec(n).id.to_string() })).await.unwrap() {
            Reply::Vm(vm) => *vm,
            other => panic!("{other:?}"),
        }
    }

    pub async fn until(&self, n: u128, what: impl Fn(&VmView) -> bool) -> VmView {
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

    pub async fn refused(&self, kind: &str) -> u64 {
        match self.call(Request::Cloud(CloudRequest::Status)).await.unwrap() {
            Reply::Status(status) => status.refusals.by_kind.get(kind).copied().unwrap_or(0),
            other => panic!("{other:?}"),
        }
    }

    pub async fn ask(
        &self,
        from: &str,
        version: u32,
        matter: (MigrationId, VmId),
        body: RequestBody,
    ) -> AnswerBody {
        self.try_ask(from, version, matter, body).await.expect("refused without a word")
    }

    /// Nothing, if it is refused without a word.
    pub async fn try_ask(
        &self,
        from: &str,
        version: u32,
        matter: (MigrationId, VmId),
        body: RequestBody,
    ) -> Option<AnswerBody> {
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
        let sealed = answer.await.unwrap()?;
        let home = self.shared.key.public();
        Some(Envelope::<AnswerBody>::open(&sealed, &home, &jid("home"), &jid(from), now).unwrap().body)
    }

    pub fn files(&self, of: &str) -> usize {
        std::fs::read_dir(Path::new(self.dir.path()).join("data").join(of)).unwrap().count()
    }
}
