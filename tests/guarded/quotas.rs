//! What a member may make this cloud do, promise and keep.

use base64::Engine as _;
use cicada::component::recipe::{DiskParameters, Recipe};
use cicada::interface::{MigrationView, MoveRequest, Verdict, VmAdopt, VmRequest, VmView};
use cicada::migration::message::{Initialization, Pass};
use cicada::stanza::cloud::Capacity;
use cicada::types::ImageDigest;
use cicada::vm::{Mac, MapRef, PowerState};

use super::*;

impl Home {
    async fn migrations(&self) -> Vec<MigrationView> {
        match self.call(Request::Move(MoveRequest::List)).await.unwrap() {
            Reply::Migrations(all) => all,
            other => panic!("{other:?}"),
        }
    }

    /// A request of a migration that is named.
    async fn ask_of(&self, from: &str, migration: MigrationId, vm: VmId, body: RequestBody) -> AnswerBody {
        let envelope = Envelope { migration, ..self.envelope(from, vm, body) };
        self.ask_as(envelope, &key(from)).await.expect("refused without a word")
    }

    fn notes(&self) -> usize {
        std::fs::read_dir(self.shared.records.dir().join("migrations")).unwrap().count()
    }

    /// Makes a VM of a small disk.
    async fn adopt(&self, name: &str, start: bool) {
        let disk = self.shared.records.dir().join("disk");
        std::fs::write(&disk, vec![7; 1 << 20]).unwrap();
        let adopt = VmAdopt {
            name: name.parse().unwrap(),
            disk: disk.display().to_string(),
            user_data: None,
            format: "raw".into(),
            architecture: "amd64".into(),
            firmware: Firmware::Bios,
            memory: ByteSize::mib(64),
            cpus: 1,
            networks: vec!["default".into()],
            share: false,
            dry_run: false,
            start,
            hardware: Default::default(),
            nvram: None,
        };
        self.call(Request::Vm(VmRequest::Adopt(adopt))).await.unwrap();
    }

    async fn vm(&self, name: &str) -> VmView {
        match self.call(Request::Vm(VmRequest::Show { vm: name.into() })).await.unwrap() {
            Reply::Vm(vm) => *vm,
            other => panic!("{other:?}"),
        }
    }

    fn presents_capacity(&self, name: &str, capacity: Capacity) {
        let cloud = Cloud {
            name: name.into(),
            key: key(name).public().to_string().into(),
            versions: "1".into(),
            power: "on".into(),
            capacity: Some(capacity),
            ..Cloud::default()
        };
        self.presents(name, cloud);
    }
}

fn reservation(spec: &VmSpec) -> RequestBody {
    RequestBody::Reservation { spec: spec.clone() }
}

fn cancel() -> RequestBody {
    RequestBody::Cancel { reason: "x".into() }
}

const MANY: &str = "[migration]\nconcurrency = 20\nrequests_per_minute = 600000\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_begins_and_calls_off_all_the_time_erases_nothing_and_is_refused() {
    let home = Home::start(MANY).await;
    let (begun_by_b, of_b) = (MigrationId::random(), spec("of-b"));
    home.ask_of("b", begun_by_b, of_b.id, reservation(&of_b)).await;
    home.ask_of("b", begun_by_b, of_b.id, cancel()).await;

    let (mut granted, mut refused) = (0, 0);
    for n in 0..1000 {
        let (id, vm) = (MigrationId::random(), spec(&format!("vm-{n}")));
        match home.ask_of("a", id, vm.id, reservation(&vm)).await {
            AnswerBody::Reserved { .. } => {
                granted += 1;
                assert_eq!(home.ask_of("a", id, vm.id, cancel()).await, AnswerBody::Cancelled { kept_s: 0 });
            }
            AnswerBody::Denied(d) => {
                assert_eq!(d.code, DenialCode::RateLimited, "{}", d.text);
                assert!(d.retry_after_ms.is_some());
                refused += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((granted, refused), (200, 800));
    assert_eq!(home.member("a").await.refused["rate-limit"], 800);
    let all = home.migrations().await;
    assert!(all.iter().any(|m| m.progress.id == begun_by_b), "another's attempt was erased");
    assert_eq!(all.iter().filter(|m| m.progress.peer == jid("a")).count(), 50);
    let begun = Instant::now();
    while home.notes() != all.len() {
        assert!(begun.elapsed() < SOON, "{} notes of {} migrations", home.notes(), all.len());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Another is not slowed, and the member itself may go on after a while.
    home.reserve("b", &spec("two")).await.unwrap();
    assert!(home.reserve("a", &spec("late")).await.is_err());
    home.clock.advance(Duration::from_secs(20));
    home.reserve("a", &spec("later")).await.unwrap();

    // The id of a migration that is remembered cannot be taken by somebody else.
    let (of_a, other) = (all.iter().find(|m| m.progress.peer == jid("a")).unwrap(), spec("other"));
    match home.ask_of("b", of_a.progress.id, other.id, reservation(&other)).await {
        AnswerBody::Denied(d) => assert_eq!(d.code, DenialCode::NotYours),
        other => panic!("{other:?}"),
    }
    let again = home.ask_of("b", begun_by_b, of_b.id, reservation(&of_b)).await;
    assert!(matches!(again, AnswerBody::Reserved { .. }), "its own attempt may be made again: {again:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reservation_that_only_waits_writes_nothing() {
    let home = Home::start(MANY).await;
    for n in 0..3 {
        home.reserve("a", &spec(&format!("vm-{n}"))).await.unwrap();
    }
    home.status().await;
    assert_eq!(home.notes(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_member_does_not_take_all_places_for_arrivals() {
    let home = Home::start("").await;
    for name in ["one", "two"] {
        home.reserve("a", &spec(name)).await.unwrap();
    }
    let denial = home.reserve("a", &spec("three")).await.unwrap_err();
    assert_eq!(denial.code, DenialCode::Busy);
    assert_eq!(denial.text.as_str(), "2 migrations from this cloud are arriving already");
    assert!(denial.next_step.as_str().contains("migration.concurrency_per_member"), "{}", denial.next_step);
    home.reserve("b", &spec("four")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn storage_that_was_promised_is_not_promised_again() {
    let home = Home::start("[members]\nshare = 1.0\n").await;
    let before = home.status().await.storage_promised_bytes;
    assert!(
        before.total > 4 << 30 && before.total == before.free,
        "{before:?}: the test needs a disk with room"
    );
    let mib = |bytes: u64| ByteSize(bytes & !((1 << 20) - 1));
    // Sparse: hardly anything of it is written when the VM comes.
    let sparse = |name: &str, tenths: u64| VmSpec {
        root_size: mib(before.total / 10 * tenths),
        user_data_size: ByteSize(0),
        ..spec(name)
    };
    home.reserve("a", &sparse("one", 7)).await.unwrap();
    let promised = home.status().await.storage_promised_bytes;
    assert!(promised.free < before.free / 10 * 4, "{promised:?} of {before:?}");
    let denial = home.reserve("b", &sparse("two", 4)).await.unwrap_err();
    assert_eq!(denial.code, DenialCode::Storage);
    assert!(denial.text.as_str().contains("are promised to other VMs already"), "{}", denial.text);
    assert!(denial.next_step.as_str().contains("hypervisor.storage_overcommit"), "{}", denial.next_step);
    let check = home.check("b", &sparse("two", 4), &[]).await;
    assert_eq!(check.blockers.iter().map(|d| d.code).collect::<Vec<_>>(), [DenialCode::Storage]);
    home.reserve("b", &sparse("three", 1)).await.unwrap();
    // What has to be written at once is summed too.
    let full = VmSpec { user_data_size: mib(before.total / 10 * 6), ..spec("four") };
    assert_eq!(home.reserve("b", &full).await.unwrap_err().code, DenialCode::Storage);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_section_of_its_own_a_member_may_take_its_share() {
    let home = Home::start("[members]\nshare = 0.25\nvms_max = 3\n").await;
    let policy = home.member("a").await.policy.unwrap();
    // 64 CPUs, four virtual ones for each.
    let limits = (policy.vms_max, policy.cpus_max, policy.memory_max);
    assert_eq!(limits, (Some(3), Some(64), Some(ByteSize::gib(16))));
    assert!(policy.storage_max.is_some());
    let large = VmSpec { memory: ByteSize::gib(17), ..spec("large") };
    let why = "memory_max for VMs from this cloud is 16 GiB; 0 B are used and 17 GiB are asked for";
    assert_eq!(policy_texts(&home.check("a", &large, &[]).await.blockers), [why]);

    let home = Home::start("[[member]]\njid = \"a@federation.test\"\nshare = 1.0\n").await;
    let larger = VmSpec { memory: ByteSize::gib(40), ..large };
    assert_eq!(home.check("a", &larger, &[]).await.blockers, []);
    assert_eq!(policy_texts(&home.check("b", &larger, &[]).await.blockers).len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_requests_is_refused_and_the_broker_goes_on() {
    let home = Home::start("[migration]\nrequests_per_minute = 6000000\n").await;
    let sealed = home.envelope("a", VmId::random(), cancel()).seal(&key("a")).unwrap();
    let mut answers = Vec::new();
    for _ in 0..20_000 {
        let (reply, answer) = oneshot::channel();
        home.inbox.send(Input::Asked { from: jid("a"), payload: sealed.clone(), reply }).unwrap();
        answers.push(answer);
    }
    home.status().await;
    let mut dropped = 0;
    for answer in answers {
        dropped += u64::from(answer.await.is_err());
    }
    println!("{dropped} of 20000 requests found no place");
    assert!(dropped > 10_000, "{dropped}");
    // Each was counted once: without a place, or as a replay.
    let refused = home.member("a").await.refused;
    assert_eq!((refused["rate-limit"], refused["rate-limit"] + refused["replay"]), (dropped, 19_999));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_member_makes_the_broker_dial_its_own_machine() {
    let home = Home::start("").await;
    let service = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    service.set_nonblocking(true).unwrap();
    let port = service.local_addr().unwrap().port();
    let recipe = Recipe {
        composer: cicada::compose::COMPOSER.into(),
        components: vec![ComponentId::of(b"not here")],
        ordered: false,
        disk: DiskParameters::derived(&[], 768 << 20, 64 << 20, ""),
        image_digest: ImageDigest::of(b"image"),
    };
    let vm = VmSpec { recipe: recipe.id(), ..spec("one") };
    let id = MigrationId::random();
    home.ask_of("a", id, vm.id, reservation(&vm)).await;
    let map = |size: ByteSize| MapRef { block_size_bytes: 65536, disk_size_bytes: size.0, root: None };
    let pass =
        Pass { number: 1, last: false, root_delta: map(vm.root_size), user_data: map(vm.user_data_size) };
    let hosts = ["127.0.0.1", "[::ffff:127.0.0.1]", "localhost", "0.0.0.0"];
    let init = Initialization {
        spec: vm.clone(),
        recipe: base64::engine::general_purpose::STANDARD.encode(recipe.encode()),
        component_names: vec!["x".into()],
        component_bytes: 1,
        pass,
        addresses: hosts.map(|host| format!("{host}:{port}").into()).into(),
        source_key: key("a").public(),
        ticket: "0".repeat(64),
        firmware: None,
    };
    let begun = Instant::now();
    let denial = loop {
        match home.ask_of("a", id, vm.id, RequestBody::Initialization(Box::new(init.clone()))).await {
            AnswerBody::Working(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            AnswerBody::Denied(denial) => break denial,
            other => panic!("{other:?}"),
        }
        assert!(begun.elapsed() < SOON, "neither denied nor done");
    };
    let (text, next) = (denial.text.as_str(), denial.next_step.as_str());
    assert_eq!(denial.code, DenialCode::Content, "{text}");
    assert!(
        text.contains("transfer.peer_networks") && next.contains("transfer.peer_networks"),
        "{text}; {next}"
    );
    assert_eq!(home.member("a").await.refused["address"], 1);
    assert!(service.recv_from(&mut [0; 2048]).is_err(), "it was dialled");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_tells_nobody_more_of_a_vm_than_the_answer_needs() {
    let home = Home::start("").await;
    home.adopt("payroll", false).await;
    let room = Capacity {
        cpus: 8,
        cpus_free: 8,
        memory: 8 << 30,
        memory_free: 8 << 30,
        storage: 1 << 40,
        storage_free: 1 << 40,
    };
    home.presents_capacity("a", Capacity { memory_free: 0, ..room });
    home.presents_capacity("b", room);
    home.heard.0.lock().unwrap().clear();
    let plan = match home
        .call(Request::Move(MoveRequest::Plan { vm: "payroll".into(), to: None, all: false }))
        .await
        .unwrap()
    {
        Reply::Plan(plan) => plan,
        other => panic!("{other:?}"),
    };
    let row = |name: &str| plan.candidates.iter().find(|c| c.jid == jid(name)).expect("all have a row");
    for (name, reason) in [("a", "of memory are free"), ("stranger", "")] {
        match &row(name).verdict {
            Verdict::NotAsked { reasons } => {
                assert!(reasons[0].text.as_str().contains(reason), "{reasons:?}")
            }
            other => panic!("{name}: {other:?}"),
        }
    }
    assert!(matches!(row("b").verdict, Verdict::No { .. }), "it does not answer");
    let heard = home.heard.0.lock().unwrap().clone();
    let open = |(to, sealed): &Sealed| {
        let (home_key, now) = (home.shared.key.public(), home.clock.now());
        let opened = Envelope::<RequestBody>::open(sealed, &home_key, &jid("home"), to, now);
        match opened.unwrap().body {
            RequestBody::Configuration { spec, components, packs } => {
                Some((to.clone(), spec, components, packs))
            }
            _ => None,
        }
    };
    let checks: Vec<_> = heard.iter().filter_map(open).collect();
    assert_eq!(checks.len(), 1);
    let (to, spec, components, packs) = &checks[0];
    assert_eq!(*to, jid("b"));
    assert!(components.is_empty() && packs.is_empty(), "told to those alone that could take it");
    assert_eq!(spec.name.as_str(), format!("unknown-{}", spec.id.short()));
    assert_eq!((spec.memory, spec.nics.len()), (ByteSize::mib(64), 1));
    assert_ne!(spec.nics[0].mac, Mac::derived(spec.id, 0));
    spec.check().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_happened_to_vms_while_events_were_lost_is_made_up_for() {
    let home = Home::start("").await;
    let mut ids = Vec::new();
    for name in ["off", "crashed", "well"] {
        home.adopt(name, true).await;
        ids.push(home.vm(name).await.id);
        assert_eq!(home.vm(name).await.power, PowerState::Running);
    }
    // Nobody here carries the hypervisor's events to the broker: these are lost.
    home.driver.guest_switches_off(ids[0]);
    home.driver.crash(ids[1]);
    let all = cicada::broker::Input::Machines(cicada::hypervisor::Driver::list(&*home.driver));
    home.inbox.send(Input::Core(Box::new(all))).unwrap();
    let begun = Instant::now();
    while home.vm("crashed").await.power != PowerState::Running {
        assert!(begun.elapsed() < SOON, "it was not started again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let run = |id: &VmId| {
        let record = std::fs::read(home.shared.records.vm_dir(*id).join("record.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&record).unwrap()["run"].clone()
    };
    assert_eq!(ids.iter().map(run).collect::<Vec<_>>(), [false, true, true]);
    assert_eq!(home.vm("off").await.power, PowerState::Stopped, "who switched itself off stays off");
    assert_eq!(home.vm("well").await.power, PowerState::Running);
}
