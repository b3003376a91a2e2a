//! Components lent between members: brokers in one process, joined by a link made for the test;
//! repositories, signatures and the data link (QUIC) are real.

use std::collections::{BTreeMap, HashMap};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cicada::broker::RoomInput;
use cicada::broker::{Matter, Peer};
use cicada::clock::ManualClock;
use cicada::clock::UnixMillis;
use cicada::component::manifest::{Entry, EntryKind, Kind, Manifest, Meta, PackRef};
use cicada::compose::Composer;
use cicada::config::Config;
use cicada::federation::{Members, Presence};
use cicada::hypervisor::FakeDriver;
use cicada::interface::ReportLine;
use cicada::interface::{CloudRequest, ContentRequest, Reply, Request};
use cicada::migration::message::ContentAnswer;
use cicada::migration::{AnswerBody, DenialCode, RequestBody};
use cicada::repository::Repository;
use cicada::runner::AskError;
use cicada::runner::Records;
use cicada::runner::content::healing::unhealed;
use cicada::runner::content::serving::{Store, Tickets};
use cicada::runner::{Inbox, Input, Link, LinkError, Runner, Shared};
use cicada::stanza::Cloud;
use cicada::transfer::{
    Endpoint, Limiter, ObjectKey, ObjectSink, PackRange, PackWriter, Progress, Refusal, SinkError, Ticket,
    Verified,
};
use cicada::types::{ComponentId, Hash, IdentityKey, MemberJid, MigrationId, PackId, PublicKey, VmId};
use futures::future::{BoxFuture, FutureExt};
use tokio::sync::{mpsc, oneshot};

type Inboxes = Arc<Mutex<HashMap<MemberJid, Inbox>>>;

/// Hands requests to the other brokers of this process, as the server would: with the sender's
/// true address, and nothing said about its trust.
struct Wire {
    me: MemberJid,
    inboxes: Inboxes,
}

impl Link for Wire {
    fn request(
        &self,
        to: &MemberJid,
        payload: Vec<u8>,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Vec<u8>, LinkError>> {
        let inbox = self.inboxes.lock().unwrap().get(to).cloned();
        let (from, to) = (self.me.clone(), to.clone());
        async move {
            let (reply, answer) = oneshot::channel();
            let inbox = inbox.ok_or_else(|| LinkError::NotOnline(to.clone()))?;
            inbox.send(Input::Asked { from, payload, reply }).map_err(|_| LinkError::Down)?;
            match tokio::time::timeout(timeout, answer).await {
                Ok(Ok(Some(sealed))) => Ok(sealed),
                Ok(_) => Err(LinkError::Refused { to, reason: "no".into() }),
                Err(_) => Err(LinkError::Timeout { to, seconds: timeout.as_secs() }),
            }
        }
        .boxed()
    }
}

struct Member {
    _dir: tempfile::TempDir,
    jid: MemberJid,
    key: PublicKey,
    shared: Arc<Shared>,
    inbox: Inbox,
}

fn jid(name: &str) -> MemberJid {
    format!("{name}@federation.test").parse().unwrap()
}

fn key(name: &str) -> IdentityKey {
    IdentityKey::from_secret_bytes(Hash::of(name.as_bytes()).as_bytes())
}

/// A federation in which everybody trusts everybody but those called "stranger".
async fn federation(members: &[(&str, &str)]) -> (Vec<Member>, ManualClock) {
    let clock = ManualClock::new(UnixMillis(1_700_000_000_000));
    let inboxes = Inboxes::default();
    let all: Vec<_> =
        members.iter().map(|(name, settings)| start(name, settings, members, &inboxes, &clock)).collect();
    for member in &all {
        for (name, _) in members {
            let cloud = Cloud {
                name: (*name).into(),
                key: key(name).public().to_string().into(),
                versions: "1".into(),
                power: "on".into(),
                ..Cloud::default()
            };
            let presence = Presence {
                jid: jid(name),
                resource: "broker".into(),
                available: true,
                cloud: Some(std::sync::Arc::new(cloud)),
            };
            member
                .inbox
                .send(Input::Room(RoomInput::Presence(presence)))
                .unwrap_or_else(|_| panic!("stopped"));
        }
        member.call(Request::Cloud(CloudRequest::Members)).await.unwrap();
    }
    (all, clock)
}

fn start(
    name: &str,
    settings: &str,
    members: &[(&str, &str)],
    inboxes: &Inboxes,
    clock: &ManualClock,
) -> Member {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("federation.toml");
    let text = format!(
        "[cloud]\nname = \"{name}\"\ndata_dir = \"data\"\n[xmpp]\njid = \"{}\"\npassword_file = \"password\"\n\
         room = \"fed@rooms.federation.test\"\n[transfer]\nlisten = \"127.0.0.1:0\"\npeer_networks = [\"127.0.0.0/8\"]\n{settings}\n",
        jid(name)
    );
    std::fs::write(&file, text).unwrap();
    let config = Config::load_with(Some(&file), [], &[]).unwrap();
    let repository = Repository::open_or_create(&config.repository.dir).unwrap();
    let tickets = Arc::new(Tickets::default());
    let store = Arc::new(Store { repository: repository.clone(), tickets: tickets.clone() });
    let identity = key(name);
    let endpoint =
        Endpoint::bind(config.transfer.listen, &identity, tickets.clone(), store, Limiter::new(None))
            .unwrap();
    let (inbox, inputs) = cicada::runner::inbox();
    inboxes.lock().unwrap().insert(jid(name), inbox.clone());
    let shared = Arc::new(Shared {
        me: jid(name),
        key: identity,
        clock: Arc::new(clock.clone()),
        composer: Composer::new(repository.clone()),
        repository,
        driver: Arc::new(FakeDriver::new(Arc::new(clock.clone()))),
        link: Arc::new(Wire { me: jid(name), inboxes: inboxes.clone() }),
        endpoint,
        tickets,
        records: Records::open(&config.cloud.data_dir).unwrap(),
        inbox: inbox.clone(),
        versions: Default::default(),
        config,
    });
    let trusted = members.iter().filter(|(other, _)| *other != "stranger");
    let trusted: BTreeMap<_, _> = trusted.map(|(other, _)| (jid(other), key(other).public())).collect();
    let broker =
        Runner::open(shared.clone(), Members::new(trusted, BTreeMap::new(), false), Box::new(|_| ()), None)
            .unwrap();
    tokio::spawn(broker.run(inputs));
    Member { _dir: dir, jid: jid(name), key: key(name).public(), shared, inbox }
}

impl Member {
    async fn call(&self, request: Request) -> Result<Reply, cicada::interface::Problem> {
        let (events, mut seen) = mpsc::channel(64);
        let (reply, answer) = oneshot::channel();
        self.inbox
            .send(Input::Call { request: Box::new(request), given: Default::default(), events, reply })
            .unwrap_or_else(|_| panic!("stopped"));
        tokio::spawn(async move { while seen.recv().await.is_some() {} });
        answer.await.unwrap()
    }

    async fn heal(&self) -> Vec<ReportLine> {
        match self.call(Request::Cloud(CloudRequest::Heal)).await.unwrap() {
            Reply::Report(lines) => lines,
            other => panic!("{other:?}"),
        }
    }

    fn repository(&self) -> &Repository {
        &self.shared.repository
    }

    fn peer(&self) -> Peer {
        Peer { jid: self.jid.clone(), key: self.key }
    }

    /// Makes a component here of one pack, and binds its name if `named`.
    fn holds(&self, name: &str, requires: Vec<ComponentId>, named: bool) -> (ComponentId, PackId) {
        let content = name.repeat(100_000);
        let mut writer = self.repository().pack_writer().unwrap();
        let (offset_bytes, hash) = writer.append(&mut content.as_bytes(), content.len() as u64).unwrap();
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
            requires,
            conflicts: Vec::new(),
            packs: vec![PackRef { id: pack, size_bytes, package: name.into(), package_version: "1".into() }],
            entries: vec![Entry { path: b"file".to_vec(), meta, xattrs: Vec::new(), kind }],
            fragments: Vec::new(),
        };
        let id = self.repository().put_manifest(&manifest).unwrap();
        if named {
            self.repository().bind_component(&manifest, id).unwrap();
        }
        (id, pack)
    }

    fn file(&self, kind: &str, id: impl std::fmt::Display) -> PathBuf {
        let id = id.to_string();
        self.repository().dir().join(format!("{kind}s/{}/{id}.{kind}", &id[..2]))
    }

    async fn ask_content(
        &self,
        of: &Member,
        packs: &[PackId],
        done: Vec<String>,
    ) -> Result<AnswerBody, AskError> {
        let matter = Matter { migration: MigrationId::random(), vm: VmId(uuid::Uuid::nil()), epoch: 0 };
        let body = RequestBody::Content { components: Vec::new(), packs: packs.to_vec(), done };
        self.shared.ask(&of.peer(), matter, body).await
    }
}

fn spoil(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

fn details<'a>(lines: &'a [ReportLine], name: &str) -> Vec<&'a str> {
    lines.iter().filter(|l| l.name == name && !l.detail.is_empty()).map(|l| l.detail.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_and_missing_components_come_back_from_whoever_has_them() {
    let (all, _) = federation(&[("a", ""), ("b", ""), ("c", "")]).await;
    let [a, b, c] = &all[..] else { panic!() };
    let (base, base_pack) = a.holds("base", vec![], true);
    let (web, web_pack) = a.holds("web", vec![base], true);
    let (_, mail_pack) = a.holds("mail", vec![base], true);
    b.holds("base", vec![], true);
    b.holds("web", vec![base], true);
    // Needed by a name, though it has none itself.
    c.holds("base", vec![], false);
    c.holds("mail", vec![base], true);
    let good = a.heal().await;
    assert_eq!((unhealed(&good), details(&good, "healed").len()), (0, 0));

    // A whole component gone, a pack spoilt, a pack gone; and one member's copy is bad, too.
    std::fs::remove_file(a.file("manifest", web)).unwrap();
    std::fs::remove_file(a.file("pack", web_pack)).unwrap();
    spoil(&a.file("pack", base_pack));
    spoil(&b.file("pack", base_pack));
    std::fs::remove_file(a.file("pack", mail_pack)).unwrap();
    let lines = a.heal().await;
    assert_eq!(unhealed(&lines), 0, "{lines:#?}");
    let healed = details(&lines, "healed");
    assert_eq!(healed.len(), 4, "{lines:#?}");
    let from = |id: &dyn ToString, member: &Member| {
        healed.iter().any(|l| l.contains(&id.to_string()) && l.contains(member.jid.as_str()))
    };
    assert!(from(&web, b) && from(&web_pack, b) && from(&base_pack, c) && from(&mail_pack, c), "{healed:?}");
    let Ok(Reply::Report(check)) = a.call(Request::Content(ContentRequest::RepoCheck)).await else {
        panic!()
    };
    assert!(check.iter().all(|l| l.detail.is_empty()), "{check:#?}");
    assert_eq!(std::fs::read_dir(a.repository().dir().join("quarantine")).unwrap().count(), 0);
    // Whoever lent a bad copy can be healed the same way.
    assert_eq!(unhealed(&b.heal().await), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_may_give_stays_missing_and_says_why() {
    let everyone =
        [("a", ""), ("b", ""), ("c", "[repository]\nshare_with = [\"b@federation.test\"]"), ("stranger", "")];
    let (all, _) = federation(&everyone).await;
    let [a, b, c, stranger] = &all[..] else { panic!() };
    let (_, own) = a.holds("own", vec![], true);
    let (_, kept) = a.holds("kept", vec![], true);
    // Held without a name, held by one that does not share with us, held by one we do not know.
    b.holds("own", vec![], false);
    c.holds("kept", vec![], true);
    stranger.holds("own", vec![], true);
    stranger.holds("kept", vec![], true);
    for pack in [own, kept] {
        std::fs::remove_file(a.file("pack", pack)).unwrap();
    }
    let lines = a.heal().await;
    assert_eq!(unhealed(&lines), 2, "{lines:#?}");
    let left = details(&lines, "not-healed");
    assert!(left.iter().all(|l| l.contains("b@federation.test does not offer it")), "{left:?}");
    assert!(left.iter().all(|l| l.contains("c@federation.test: components are not shared")), "{left:?}");
    assert!(left.iter().all(|l| !l.contains("stranger")), "{left:?}");
    assert!(stranger.ask_content(c, &[kept], vec![]).await.is_err(), "a stranger is not answered");
    // The one that may, gets it.
    b.holds("kept", vec![], true);
    std::fs::remove_file(b.file("pack", kept)).unwrap();
    let lines = b.heal().await;
    assert_eq!((unhealed(&lines), details(&lines, "healed").len()), (0, 1), "{lines:#?}");
    let lines = a.heal().await;
    assert_eq!((unhealed(&lines), details(&lines, "healed").len()), (1, 1), "now b has it under a name");
}

/// Makes everything that is stored now two days old.
fn age(repository: &Repository) {
    fn walk(dir: &Path) {
        for path in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
            if path.is_dir() {
                walk(&path);
            } else {
                let file = std::fs::File::open(&path).unwrap();
                file.set_modified(std::time::SystemTime::now() - 2 * DAY).unwrap();
            }
        }
    }
    ["packs", "manifests"].iter().for_each(|dir| walk(&repository.dir().join(dir)));
}

const DAY: Duration = Duration::from_secs(86_400);

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn readers_a_writer_and_collections_do_not_disturb_a_transfer_nor_each_other() {
    const EACH: usize = 40;
    let (all, _) = federation(&[("a", ""), ("b", "")]).await;
    let [a, b] = &all[..] else { panic!() };
    let (mut lost, mut read) = (Vec::new(), Vec::new());
    for n in 0..EACH {
        b.holds(&format!("lost-{n}"), vec![], true);
        b.holds(&format!("dead-{n}"), vec![], false);
        lost.push(a.holds(&format!("lost-{n}"), vec![], true));
        read.push(a.holds(&format!("read-{n}"), vec![], true));
        a.holds(&format!("dead-{n}"), vec![], false);
    }
    for (manifest, pack) in &lost {
        std::fs::remove_file(a.file("manifest", manifest)).unwrap();
        std::fs::remove_file(a.file("pack", pack)).unwrap();
    }
    age(a.repository());
    age(b.repository());
    let stop = std::sync::atomic::AtomicBool::new(false);
    let ended = || stop.load(std::sync::atomic::Ordering::Relaxed);
    let (healed, collected, collected_there) = std::thread::scope(|scope| {
        // Both the borrower and the lender collect all the time.
        let collect = |repository: Repository| {
            move || {
                let mut removed = 0;
                loop {
                    // The last round begins when the rest has ended.
                    let last = ended();
                    removed += repository.gc(false, DAY, &[]).unwrap().removed.total().count;
                    if last {
                        return removed;
                    }
                }
            }
        };
        let (here, there) =
            (scope.spawn(collect(a.repository().clone())), scope.spawn(collect(b.repository().clone())));
        for reader in 0..2 {
            let (read, repository) = (&read, a.repository().clone());
            scope.spawn(move || {
                for (manifest, pack) in read.iter().cycle().skip(reader * EACH / 2) {
                    repository.read_pack(pack, &mut |_, _| Ok(())).unwrap();
                    assert_eq!(repository.manifest(manifest).unwrap().packs[0].id, *pack);
                    if ended() {
                        return;
                    }
                }
            });
        }
        let writer = scope.spawn(|| {
            for n in 0..EACH {
                let (id, _) = a.holds(&format!("new-{n}"), vec![], true);
                assert_eq!(a.repository().resolve_component(&format!("new-{n}")).unwrap(), id);
            }
        });
        let healed = tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(a.heal()));
        writer.join().unwrap();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        (healed, here.join().unwrap(), there.join().unwrap())
    });
    assert_eq!((unhealed(&healed), details(&healed, "healed").len()), (0, 2 * EACH), "{healed:#?}");
    assert_eq!((collected, collected_there), (2 * EACH as u64, 2 * EACH as u64), "the dead, and only they");
    for member in [a, b] {
        let report = member.repository().check(&mut |_, _| ()).unwrap();
        assert!(report.is_clean() && report.strays.is_empty(), "{report:?}");
        let stats = member.repository().stats().unwrap();
        assert_eq!((stats.temporary.files, stats.quarantine.files), (0, 0));
        assert_eq!(stats.objects.packs.count, report.good.packs.count, "index and disk agree");
    }
    assert_eq!(a.repository().components().unwrap().len(), 3 * EACH);
}

/// Keeps what comes.
#[derive(Default)]
struct Taken(Mutex<Vec<u8>>);

struct Taking(Arc<Taken>);

struct Shelf(Arc<Taken>);

impl ObjectSink for Shelf {
    fn deliver(&self, _: Vec<Verified>) -> Result<(), SinkError> {
        Ok(())
    }
    fn pack(&self, _: &PackId, _: bool, _: &PackRange, _: u64) -> Result<Box<dyn PackWriter>, SinkError> {
        Ok(Box::new(Taking(self.0.clone())))
    }
}

impl PackWriter for Taking {
    fn write(&mut self, stored: &[u8]) -> Result<(), SinkError> {
        self.0.0.lock().unwrap().extend_from_slice(stored);
        Ok(())
    }
    fn finish(self: Box<Self>) -> Result<(), SinkError> {
        Ok(())
    }
}

async fn fetch(by: &Member, answer: &ContentAnswer, of: &Member, pack: PackId) -> Result<Vec<u8>, Refusal> {
    let addresses: Vec<_> = answer.addresses.iter().map(|a| a.parse().unwrap()).collect();
    let ticket: Hash = answer.ticket.as_ref().unwrap().parse().unwrap();
    let connection = by.shared.endpoint.connect(&addresses, of.key).await.unwrap();
    let taken = Arc::new(Taken::default());
    let report = connection
        .fetch(
            &Ticket::from_bytes(*ticket.as_bytes()),
            vec![ObjectKey::Pack(pack)],
            Arc::new(Shelf(taken.clone())),
            Arc::new(Progress::default()),
        )
        .await
        .unwrap();
    match report.refused.first() {
        Some((_, refusal)) => Err(*refusal),
        None => Ok(taken.0.lock().unwrap().clone()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_is_for_one_member_these_objects_and_some_minutes() {
    let (all, clock) = federation(&[("a", ""), ("b", ""), ("c", "")]).await;
    let [a, b, c] = &all[..] else { panic!() };
    let (_, one) = b.holds("one", vec![], true);
    let (_, two) = b.holds("two", vec![], true);
    let (_, unnamed) = b.holds("unnamed", vec![], false);
    let content = |answer| match answer {
        Ok(AnswerBody::Content(answer)) => answer,
        other => panic!("{other:?}"),
    };
    let foreign = PackId::of(b"held by nobody");
    let answer = content(a.ask_content(b, &[foreign, one, unnamed], vec![]).await);
    assert_eq!((answer.packs_held.as_slice(), answer.expires_in_s), (&[1][..], 600));
    let mut stored = Vec::new();
    b.repository().pack_stored(&one).unwrap().file.read_to_end(&mut stored).unwrap();
    assert_eq!(fetch(a, &answer, b, one).await, Ok(stored));
    assert_eq!(fetch(a, &answer, b, two).await, Err(Refusal::OutOfScope));
    assert_eq!(fetch(a, &answer, b, unnamed).await, Err(Refusal::OutOfScope));
    assert_eq!(fetch(c, &answer, b, one).await, Err(Refusal::OutOfScope), "another member's ticket");

    // Few at once; what is given back is free again.
    assert_eq!(
        content(a.ask_content(b, &[foreign], vec![]).await).ticket,
        None,
        "nothing held, nothing open"
    );
    for _ in 0..3 {
        content(a.ask_content(b, &[two], vec![]).await);
    }
    match a.ask_content(b, &[two], vec![]).await {
        Ok(AnswerBody::Denied(denial)) => assert_eq!(denial.code, DenialCode::Busy),
        other => panic!("{other:?}"),
    }
    content(c.ask_content(b, &[two], answer.ticket.clone().into_iter().collect()).await);
    assert!(fetch(a, &answer, b, one).await.is_ok(), "nobody gives back another's");
    let again = content(a.ask_content(b, &[two], answer.ticket.clone().into_iter().collect()).await);
    assert_eq!(fetch(a, &answer, b, one).await, Err(Refusal::UnknownTicket));
    assert!(fetch(a, &again, b, two).await.is_ok());

    clock.advance(Duration::from_secs(601));
    b.inbox.send(Input::Tick).unwrap_or_else(|_| panic!("stopped"));
    b.call(Request::Cloud(CloudRequest::Members)).await.unwrap();
    assert_eq!(fetch(a, &again, b, two).await, Err(Refusal::UnknownTicket));
    content(a.ask_content(b, &[two], vec![]).await);
    let many: Vec<_> = (0..1001u32).map(|n| PackId::of(&n.to_le_bytes())).collect();
    assert!(matches!(a.ask_content(b, &many, vec![]).await, Ok(AnswerBody::Denied(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_with_nothing_to_do_compresses_what_it_holds() {
    let (all, clock) = federation(&[("a", "[repository]\noptimize_after = \"60s\"")]).await;
    let [a] = &all[..] else { panic!() };
    let (_, first) = a.holds("first", vec![], true);
    let is_optimized = |pack: &PackId| a.repository().is_optimized(pack).unwrap();
    let idle_until_optimized = async |pack: &PackId, idle: Duration| {
        clock.advance(idle);
        a.inbox.send(Input::Tick).unwrap_or_else(|_| panic!("stopped"));
        let done = async {
            while !is_optimized(pack) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(90), done).await.expect("it was not optimised");
    };
    assert!(!is_optimized(&first));
    idle_until_optimized(&first, Duration::from_secs(61)).await;
    // What came since is found by a later look.
    let (_, second) = a.holds("second", vec![], true);
    idle_until_optimized(&second, Duration::from_secs(31)).await;
}
