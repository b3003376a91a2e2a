//! Words of a member that act on a terminal: put into every string a message may hold, and into all that a
//! broker shows of a member. The broker, its API and the binary that prints are real; the member is a script.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use cicada::api::Service;
use cicada::broker::RoomInput;
use cicada::clock::{Clock, ManualClock, UnixMillis};
use cicada::compose::Composer;
use cicada::config::Config;
use cicada::federation::{Members, Presence};
use cicada::hypervisor::FakeDriver;
use cicada::interface::ObjectKind;
use cicada::interface::{Event, VmAdopt};
use cicada::interface::{Problem, Reply, Request, VmRequest};
use cicada::migration::envelope::VERSION;
use cicada::migration::message::{CheckAnswer, ContentAnswer, Initialization, Progress, StageAccount};
use cicada::migration::{AnswerBody, Denial, DenialCode, Envelope, HandOver, Pass, RequestBody};
use cicada::repository::Repository;
use cicada::runner::Records;
use cicada::runner::content::serving::{Store, Tickets};
use cicada::runner::{Given, Inbox, Input, Link, LinkError, Runner, Shared};
use cicada::stanza::Cloud;
use cicada::transfer::{Endpoint, Limiter};
use cicada::types::text::{TEXT_CHARS_MAX, is_plain};
use cicada::types::{ByteSize, Hash, IdentityKey, MapId, MemberJid, MigrationId, RecipeId, VmId};
use cicada::vm::{Firmware, MapRef, VmSpec};
use futures::future::{BoxFuture, FutureExt};
use futures::stream::BoxStream;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};

/// Clears the screen, sets the clipboard, forges a line, turns around what follows.
const HOSTILE: &str =
    "no\x1b[2J\x1b]52;c;AAAA\x07\r\nFORGED  yes\u{9b}2J\u{7f}\u{202e}\u{2066}\u{2028}FORGED\u{200b}\0";
/// Stands for it in what is made with the types of an honest program, which clean.
const MARK: &str = "HOSTILE";

fn jid(name: &str) -> MemberJid {
    format!("{name}@federation.test").parse().unwrap()
}

fn key(name: &str) -> IdentityKey {
    IdentityKey::from_secret_bytes(Hash::of(name.as_bytes()).as_bytes())
}

fn denial() -> Denial {
    Denial::new(DenialCode::Memory, MARK).next(MARK)
}

fn account() -> StageAccount {
    StageAccount { components_fetched: 1, fetched: vec![MARK.into()], ..StageAccount::default() }
}

fn map() -> MapRef {
    MapRef { block_size_bytes: 4096, disk_size_bytes: 1 << 20, root: None }
}

fn spec() -> VmSpec {
    VmSpec {
        id: VmId::random(),
        name: "guest".parse().unwrap(),
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

/// Puts the hostile words where their mark stands.
fn spoil(value: &mut Value) {
    match value {
        Value::String(s) if s == MARK => *s = HOSTILE.into(),
        Value::Array(all) => all.iter_mut().for_each(spoil),
        Value::Object(fields) => fields.values_mut().for_each(spoil),
        _ => {}
    }
}

// ---- Every string of every message -------------------------------------------------------------

fn hand_over() -> HandOver {
    HandOver {
        vm: VmId::random(),
        migration: MigrationId::random(),
        epoch: 2,
        source: jid("a"),
        source_key: key("a").public(),
        target: jid("b"),
        target_key: key("b").public(),
        recipe: RecipeId::of(b"r"),
        root_delta: MapId::of(b"d"),
        user_data: MapId::of(b"u"),
        issued: UnixMillis(5),
        provenance: None,
    }
}

fn requests() -> Vec<RequestBody> {
    let signed = hand_over().sign(&key("a"));
    let pass = Pass { number: 1, last: true, root_delta: map(), user_data: map() };
    let all = vec![
        RequestBody::Configuration { spec: spec(), components: Vec::new(), packs: Vec::new() },
        RequestBody::Reservation { spec: spec() },
        RequestBody::Initialization(Box::new(Initialization {
            spec: spec(),
            recipe: "AAAA".into(),
            component_names: vec!["x".into()],
            component_bytes: 1,
            pass,
            addresses: vec!["[::1]:7".into()],
            source_key: key("a").public(),
            ticket: "0".repeat(64),
            firmware: Some("AAAA".into()),
        })),
        RequestBody::Start { hand_over: signed.clone(), run: true },
        RequestBody::Withdraw { hand_over: signed },
        RequestBody::Cancel { reason: "x".into() },
        RequestBody::Suspend,
        RequestBody::Stop,
        RequestBody::Delete { boot_ms: Some(1) },
        RequestBody::Content { components: Vec::new(), packs: Vec::new(), done: vec!["0".into()] },
        RequestBody::Lineage {
            at: 0,
            total: 0,
            after: None,
            links: Default::default(),
            successions: Default::default(),
        },
        RequestBody::Owners { claims: Vec::new() },
    ];
    // A kind that is added has to be added above.
    for request in &all {
        match request {
            RequestBody::Configuration { .. }
            | RequestBody::Reservation { .. }
            | RequestBody::Initialization(_)
            | RequestBody::Start { .. }
            | RequestBody::Withdraw { .. }
            | RequestBody::Cancel { .. }
            | RequestBody::Suspend
            | RequestBody::Stop
            | RequestBody::Delete { .. }
            | RequestBody::Lineage { .. }
            | RequestBody::Owners { .. }
            | RequestBody::Content { .. } => {}
        }
    }
    all
}

fn answers() -> Vec<AnswerBody> {
    let signed = hand_over().sign(&key("a"));
    let all = vec![
        AnswerBody::Configuration(CheckAnswer {
            differences: vec![denial()],
            blockers: vec![denial()],
            components_lacking: Vec::new(),
            packs_lacking: Vec::new(),
            seed: None,
            kept: None,
            composed: false,
            reads_devices: true,
        }),
        AnswerBody::Reserved { expires_in_s: 1, reservation: None, known: None },
        AnswerBody::Lineage { links: 0 },
        AnswerBody::Owners { known: Vec::new() },
        AnswerBody::Working(Progress { step: "fetch".into(), ..Progress::default() }),
        AnswerBody::Staged { pass: 1, account: account() },
        AnswerBody::Started {
            receipt: signed.clone().accept(&key("b")),
            running: false,
            problem: Some("x".into()),
            account: account(),
        },
        AnswerBody::Returned { back: signed.give_back(&key("b")), denial: denial() },
        AnswerBody::Cancelled { kept_s: 0 },
        AnswerBody::Suspending,
        AnswerBody::Suspended,
        AnswerBody::Stopping,
        AnswerBody::Stopped,
        AnswerBody::Deleted { grace_s: 1 },
        AnswerBody::Content(ContentAnswer {
            components_held: Vec::new(),
            packs_held: Vec::new(),
            ticket: Some("0".into()),
            expires_in_s: 1,
            addresses: vec!["x".into()],
        }),
        AnswerBody::Denied(denial()),
    ];
    for answer in &all {
        match answer {
            AnswerBody::Configuration(_)
            | AnswerBody::Reserved { .. }
            | AnswerBody::Working(_)
            | AnswerBody::Staged { .. }
            | AnswerBody::Started { .. }
            | AnswerBody::Returned { .. }
            | AnswerBody::Cancelled { .. }
            | AnswerBody::Suspending
            | AnswerBody::Suspended
            | AnswerBody::Stopping
            | AnswerBody::Stopped
            | AnswerBody::Deleted { .. }
            | AnswerBody::Content(_)
            | AnswerBody::Lineage { .. }
            | AnswerBody::Owners { .. }
            | AnswerBody::Denied(_) => {}
        }
    }
    all
}

fn leaves(value: &Value, at: &str, out: &mut Vec<String>) {
    match value {
        Value::String(_) => out.push(at.to_owned()),
        Value::Array(all) => {
            all.iter().enumerate().for_each(|(i, v)| leaves(v, &format!("{at}/{i}"), out));
        }
        Value::Object(fields) => fields.iter().for_each(|(k, v)| leaves(v, &format!("{at}/{k}"), out)),
        _ => {}
    }
}

/// Fields that carry encoded bytes or what is compared, and are neither shown nor taken unless they are well formed.
const NOT_WORDS: [&str; 8] =
    ["recipe", "firmware", "record", "ticket", "done", "architecture", "cpu_model", "network"];

/// Puts the words into every string in turn. What is taken is clean; the rest is refused as a whole.
fn every_string<T: serde::Serialize + serde::de::DeserializeOwned>(all: &[T]) -> usize {
    let mut taken = 0;
    for message in all {
        let whole = serde_json::to_value(message).unwrap();
        let mut places = Vec::new();
        leaves(&whole, "", &mut places);
        for place in places {
            for words in [HOSTILE.to_owned(), HOSTILE.repeat(500)] {
                let mut hostile = whole.clone();
                *hostile.pointer_mut(&place).unwrap() = words.into();
                let Ok(read) = serde_json::from_value::<T>(hostile) else { continue };
                let read = serde_json::to_value(read).unwrap();
                let text = read.pointer(&place).and_then(Value::as_str).unwrap();
                let field = place.split('/').rfind(|p| p.parse::<usize>().is_err()).unwrap();
                if NOT_WORDS.contains(&field) {
                    continue;
                }
                // An unknown code is `other`.
                assert!(text.chars().all(is_plain), "{place}: {text:?}");
                assert!(text.chars().count() <= TEXT_CHARS_MAX, "{place}");
                taken += 1;
            }
        }
    }
    taken
}

#[test]
fn every_string_of_a_message_is_clean_or_refused() {
    assert!(every_string(&requests()) >= 3 * 2, "names, addresses, a reason");
    assert!(every_string(&answers()) >= 12 * 2);
}

// ---- What is printed ---------------------------------------------------------------------------

#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Denies,
    Blocks,
    /// Says what would be different, works, then denies.
    GivesUp,
    Takes,
}

/// The member "b".
#[derive(Clone)]
struct Liar {
    clock: ManualClock,
    mood: Arc<Mutex<Mood>>,
    worked: Arc<Mutex<bool>>,
}

impl Liar {
    fn answer(&self, body: &RequestBody) -> AnswerBody {
        let mood = *self.mood.lock().unwrap();
        let check = |blockers| {
            AnswerBody::Configuration(CheckAnswer {
                differences: vec![denial()],
                blockers,
                components_lacking: Vec::new(),
                packs_lacking: Vec::new(),
                seed: None,
                kept: None,
                composed: false,
                reads_devices: true,
            })
        };
        match body {
            _ if mood == Mood::Denies => AnswerBody::Denied(denial()),
            RequestBody::Configuration { .. } if mood == Mood::Blocks => check(vec![denial(), denial()]),
            RequestBody::Configuration { .. } => check(Vec::new()),
            RequestBody::Reservation { .. } => {
                AnswerBody::Reserved { expires_in_s: 60, reservation: None, known: None }
            }
            RequestBody::Initialization(init) if mood == Mood::Takes => {
                AnswerBody::Staged { pass: init.pass.number, account: account() }
            }
            RequestBody::Initialization(_) if !std::mem::replace(&mut *self.worked.lock().unwrap(), true) => {
                AnswerBody::Working(Progress { step: MARK.into(), bytes_done: 1, bytes_total: 2 })
            }
            RequestBody::Start { hand_over, .. } => AnswerBody::Started {
                receipt: hand_over.clone().accept(&key("b")),
                running: false,
                problem: Some(MARK.into()),
                account: account(),
            },
            RequestBody::Cancel { .. } => AnswerBody::Cancelled { kept_s: 0 },
            _ => AnswerBody::Denied(denial()),
        }
    }
}

fn seal(body: Value, of: &Envelope<Value>, clock: &ManualClock) -> Vec<u8> {
    let now = clock.now();
    let mut body = body;
    spoil(&mut body);
    let envelope = Envelope {
        from: jid("b"),
        to: jid("home"),
        issued: now,
        expires: now.plus(Duration::from_secs(60)),
        body,
        ..of.clone()
    };
    envelope.seal(&key("b")).unwrap()
}

impl Link for Liar {
    fn request(
        &self,
        to: &MemberJid,
        payload: Vec<u8>,
        _: Duration,
    ) -> BoxFuture<'static, Result<Vec<u8>, LinkError>> {
        let home = key("home").public();
        let asked = Envelope::<Value>::open(&payload, &home, &jid("home"), to, self.clock.now()).unwrap();
        let body: RequestBody = serde_json::from_value(asked.body.clone()).unwrap();
        let answer = serde_json::to_value(self.answer(&body)).unwrap();
        let sealed = seal(answer, &asked, &self.clock);
        async move { Ok(sealed) }.boxed()
    }
}

/// The broker behind its API.
struct Door(Inbox);

impl Service for Door {
    fn call(
        &self,
        request: Request,
        given: Given,
        events: mpsc::Sender<Event>,
    ) -> BoxFuture<'static, Result<Reply, Problem>> {
        let (reply, answer) = oneshot::channel();
        self.0
            .send(Input::Call { request: Box::new(request), given: given.into(), events, reply })
            .unwrap_or_else(|_| panic!("stopped"));
        async move { answer.await.unwrap() }.boxed()
    }

    fn put_object(
        &self,
        _: ObjectKind,
        _: Hash,
        _: u64,
        _: BoxStream<'static, std::io::Result<Bytes>>,
    ) -> BoxFuture<'static, Result<bool, Problem>> {
        unreachable!("no object is put")
    }

    fn has_objects(&self, _: ObjectKind, _: Vec<Hash>) -> BoxFuture<'static, Result<Vec<bool>, Problem>> {
        unreachable!("no object is looked for")
    }
}

/// Runs the binary in all its ways of printing. Its stdout without colours, and whether the words were in it.
async fn printed(dir: &Path, args: &[&str]) -> (String, bool) {
    let (mut plain, mut said) = (String::new(), false);
    for way in [&["--color", "never"][..], &["--color", "always", "--verbose"], &["--json"]] {
        // What changes something is done once.
        if args[0] == "move" && way != ["--color", "never"] {
            continue;
        }
        let all: Vec<String> = way.iter().chain(args).map(|a| (*a).to_owned()).collect();
        let dir = dir.to_owned();
        let run = move || {
            Command::new(env!("CARGO_BIN_EXE_cicada"))
                .current_dir(&dir)
                .env("CICADA_CONFIG", dir.join("federation.toml"))
                .args(&all)
                .stdin(Stdio::null())
                .output()
                .unwrap()
        };
        let output = tokio::task::spawn_blocking(run).await.unwrap();
        for bytes in [&output.stdout, &output.stderr] {
            let mut text = String::from_utf8(bytes.clone()).unwrap();
            if way[0] == "--color" && way[1] == "always" {
                for own in ["\x1b[1m", "\x1b[31m", "\x1b[32m", "\x1b[1;31m", "\x1b[1;36m", "\x1b[0m"] {
                    text = text.replace(own, "");
                }
            }
            assert!(text.chars().all(|c| c == '\n' || is_plain(c)), "{args:?} {way:?}: {text:?}");
            for line in text.lines() {
                assert!(!line.trim_start().starts_with("FORGED"), "{args:?} {way:?}: {text}");
            }
            said |= text.contains("FORGED");
        }
        if way == ["--color", "never"] {
            plain = String::from_utf8(output.stdout).unwrap();
        }
    }
    (plain, said)
}

/// A record of a move as an earlier build kept it: with the words as they came.
fn keep_old_record(records: &Records) -> MigrationId {
    let id = MigrationId::random();
    let view = serde_json::json!({
        "progress": {
            "id": id, "vm": "old", "vm_id": VmId::random(), "role": "source", "peer": jid("b"), "peer_cloud": null,
            "phase": HOSTILE, "detail": HOSTILE, "bytes_done": 0, "bytes_total": 0, "rate_bytes_per_s": 0,
            "eta_s": null, "fraction": 1.0, "started": 1, "updated": 2, "ended": true
        },
        "account": cicada::interface::Account {
            phase_ms: BTreeMap::from([(HOSTILE.to_owned(), 1)]), ..Default::default()
        },
        "problem": { "kind": "refused", "object": HOSTILE, "reason": HOSTILE, "next_step": HOSTILE },
        "remarks": []
    });
    let record = serde_json::json!({ "version": 1, "view": view });
    std::fs::write(records.dir().join(format!("migrations/{id}.json")), record.to_string()).unwrap();
    id
}

struct World {
    dir: tempfile::TempDir,
    inbox: Inbox,
    liar: Liar,
    old: MigrationId,
    _stop: watch::Sender<bool>,
}

async fn start() -> World {
    let clock = ManualClock::new(UnixMillis(1_700_000_000_000));
    let dir = tempfile::tempdir().unwrap();
    let file: PathBuf = dir.path().join("federation.toml");
    let text = format!(
        "[cloud]\nname = \"home\"\ndata_dir = \"data\"\n[xmpp]\njid = \"{}\"\npassword_file = \"p\"\n\
         room = \"fed@rooms.federation.test\"\n[transfer]\nlisten = \"127.0.0.1:0\"\n\
         [hypervisor]\ncpus = 64\nmemory = \"64G\"\n",
        jid("home")
    );
    std::fs::write(&file, text).unwrap();
    let config = Config::load_with(Some(&file), [], &[]).unwrap();
    let repository = Repository::open_or_create(&config.repository.dir).unwrap();
    let tickets = Arc::new(Tickets::default());
    let store = Arc::new(Store { repository: repository.clone(), tickets: tickets.clone() });
    let endpoint =
        Endpoint::bind(config.transfer.listen, &key("home"), tickets.clone(), store, Limiter::unlimited())
            .unwrap();
    let records = Records::open(&config.cloud.data_dir).unwrap();
    let old = keep_old_record(&records);
    let (inbox, inputs) = cicada::runner::inbox();
    let mood = Arc::new(Mutex::new(Mood::Denies));
    let liar = Liar { clock: clock.clone(), mood, worked: Arc::default() };
    let socket = config.api.socket.clone();
    let shared = Arc::new(Shared {
        me: jid("home"),
        key: key("home"),
        clock: Arc::new(clock.clone()),
        composer: Composer::new(repository.clone()),
        repository,
        driver: Arc::new(FakeDriver::new(Arc::new(clock))),
        link: Arc::new(liar.clone()),
        endpoint,
        tickets,
        records,
        inbox: inbox.clone(),
        versions: Default::default(),
        config,
    });
    let confirmed = BTreeMap::from([(jid("b"), key("b").public())]);
    let broker =
        Runner::open(shared, Members::new(BTreeMap::new(), confirmed, false), Box::new(|_| ()), None);
    tokio::spawn(broker.unwrap().run(inputs));
    let listener = cicada::api::bind(&socket).await.unwrap();
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(cicada::api::serve(listener, Arc::new(Door(inbox.clone())), stopped));
    World { dir, inbox, liar, old, _stop: stop }
}

impl World {
    /// The member shows itself as its stanza is read, every text of it hostile. XML has no place for C0.
    fn shows(&self) {
        let words: String = HOSTILE.chars().filter(|c| *c >= ' ').collect();
        let text = format!(
            "<cloud xmlns='urn:cicada:cloud:1' name='b' key='{}' versions='1' software='{words}' region='{words}' \
             power='{words}'><feature>{words}</feature></cloud>",
            key("b").public()
        );
        let cloud = Cloud::try_from(text.parse::<xmpp_parsers::minidom::Element>().unwrap()).unwrap();
        let cloud = Some(std::sync::Arc::new(cloud));
        let presence = Presence { jid: jid("b"), resource: "x".into(), available: true, cloud };
        self.inbox.send(Input::Room(RoomInput::Presence(presence))).unwrap_or_else(|_| panic!("stopped"));
    }

    /// The member asks.
    async fn ask(&self, migration: MigrationId, vm: VmId, body: &RequestBody) -> Value {
        let now = self.liar.clock.now();
        let of = Envelope {
            version: VERSION,
            from: jid("b"),
            to: jid("home"),
            migration,
            vm,
            epoch: 1,
            nonce: uuid::Uuid::new_v4().simple().to_string(),
            issued: now,
            expires: now,
            body: Value::Null,
        };
        let payload = seal(serde_json::to_value(body).unwrap(), &of, &self.liar.clock);
        let (reply, answer) = oneshot::channel();
        let asked = Input::Asked { from: jid("b"), payload, reply };
        self.inbox.send(asked).unwrap_or_else(|_| panic!("stopped"));
        let sealed = answer.await.unwrap().expect("an answer");
        let (me, home) = (jid("b"), jid("home"));
        Envelope::<Value>::open(&sealed, &key("home").public(), &home, &me, now).unwrap().body
    }

    fn mood(&self, mood: Mood) {
        *self.liar.mood.lock().unwrap() = mood;
    }

    async fn print(&self, args: &[&str]) -> (String, bool) {
        printed(self.dir.path(), args).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_command_prints_a_members_words_raw() {
    let world = start().await;
    world.shows();
    let disk = world.dir.path().join("disk");
    std::fs::write(&disk, vec![7; 1 << 20]).unwrap();
    let (events, _seen) = mpsc::channel(64);
    let (reply, adopted) = oneshot::channel();
    let request = Request::Vm(VmRequest::Adopt(VmAdopt {
        name: "web".parse().unwrap(),
        disk: disk.display().to_string(),
        user_data: None,
        format: "raw".into(),
        architecture: "amd64".into(),
        firmware: Firmware::Bios,
        memory: ByteSize::mib(64),
        cpus: 1,
        networks: Vec::new(),
        share: false,
        dry_run: false,
        start: false,
        hardware: Default::default(),
        nvram: None,
    }));
    world
        .inbox
        .send(Input::Call { request: Box::new(request), given: Default::default(), events, reply })
        .unwrap_or_else(|_| panic!("stopped"));
    adopted.await.unwrap().unwrap();

    let says = async |args: &[&str]| {
        let (_, said) = world.print(args).await;
        assert!(said, "{args:?} shows nothing of what the member said");
    };
    says(&["members"]).await;
    for mood in [Mood::Denies, Mood::Blocks, Mood::GivesUp, Mood::Takes] {
        world.mood(mood);
        says(&["plan", "web"]).await;
        says(&["move", "web", "--to", "b"]).await;
    }
    // A reservation that is called off, in the member's words.
    let (migration, guest) = (MigrationId::random(), spec());
    let reserved = world.ask(migration, guest.id, &RequestBody::Reservation { spec: guest.clone() }).await;
    assert_eq!(reserved["answer"], "reserved", "{reserved}");
    world.ask(migration, guest.id, &RequestBody::Cancel { reason: MARK.into() }).await;

    says(&["migration", "list"]).await;
    let (list, _) = world.print(&["migration", "list", "--json"]).await;
    let list: Value = serde_json::from_str(&list).unwrap();
    let ids: Vec<String> =
        list.as_array().unwrap().iter().map(|m| m["progress"]["id"].as_str().unwrap().to_owned()).collect();
    assert!(ids.contains(&world.old.to_string()) && ids.contains(&migration.to_string()) && ids.len() == 6);
    for id in &ids {
        says(&["migration", "show", id]).await;
        says(&["migration", "watch", id]).await;
        for command in ["receipt", "cancel"] {
            world.print(&["migration", command, id]).await;
        }
    }
    for args in [&["status"][..], &["vm", "list"], &["vm", "show", "web"], &["vm", "start", "web"]] {
        world.print(args).await;
    }
}
