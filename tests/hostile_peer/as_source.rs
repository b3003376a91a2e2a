//! The peer is the source: it offers VMs to the real broker.

use std::time::Duration;

use cicada::interface::{Reply, Request, VmRequest};
use cicada::migration::handover::{EPOCH_MAX, SignedHandOver};
use cicada::migration::message::{CHECK_IDS_MAX, Initialization};
use cicada::migration::{AnswerBody, DenialCode, HandOver, RequestBody};
use cicada::types::{ByteSize, ComponentId, IdentityKey, MapId, MigrationId, NodeHash, RecipeId, VmId};
use cicada::vm::spec::Nic;
use cicada::vm::{Mac, MapRef, VmSpec};
use cicada::xmpp::RequestError;

use crate::Bench;
use crate::peer::{Manners, Matter, Peer, Spoil, raw, seal};

/// What is wrong with a request's seal, and the reason that must be logged for it.
const SPOILS: [(Spoil, &str, &str); 11] = [
    (Spoil::Signature, "forged signature", "signature"),
    (Spoil::AnothersKey, "signed with another key", "signature"),
    (Spoil::Cut, "too short for a signature", "malformed"),
    (Spoil::NotJson, "JSON cut in the middle", "malformed"),
    (Spoil::NextVersion, "protocol version 3 only", "version"),
    (Spoil::Sender, "another member named as its sender", "wrong-sender"),
    (Spoil::Recipient, "addressed to another member", "wrong-recipient"),
    (Spoil::Expired, "expired", "expired"),
    (Spoil::FutureDated, "dated in the future", "expired"),
    (Spoil::LivesTooLong, "valid for hours", "expired"),
    (Spoil::ShortNonce, "a nonce of 8 digits", "expired"),
];

type SpoiltPass = Box<dyn Fn(&Peer, &mut Initialization)>;
type SpoiltHandOver = Box<dyn Fn(&Peer, HandOver) -> SignedHandOver>;

pub fn denied(answer: &AnswerBody) -> (DenialCode, String) {
    match answer {
        AnswerBody::Denied(d) => (d.code, format!("denied: {} ({})", d.code.as_str(), short(&d.text))),
        other => panic!("not denied: {other:?}"),
    }
}

fn short(text: &str) -> String {
    // Without what differs from run to run.
    let words = text.split(' ').map(|w| if w.len() > 24 { "…" } else { w });
    words.collect::<Vec<_>>().join(" ").chars().take(100).collect()
}

/// A trusted sender of another version, or with another time, is told so; all others learn nothing.
fn is_refusal(answer: &Result<AnswerBody, RequestError>) -> bool {
    match answer {
        Ok(AnswerBody::Denied(denial)) => matches!(denial.code, DenialCode::Version | DenialCode::Clock),
        Ok(_) => false,
        Err(e) => matches!(e, RequestError::Refused { condition, .. } if condition == "forbidden"),
    }
}

fn started(peer: &Peer, matter: Matter) -> RequestBody {
    RequestBody::Start { hand_over: peer.signed(matter), run: false }
}

fn cancel() -> RequestBody {
    RequestBody::Cancel { reason: "the test wants it so".into() }
}

pub fn init(init: Initialization) -> RequestBody {
    RequestBody::Initialization(Box::new(init))
}

/// Brings a migration so far that only `start` is missing.
fn stage(peer: &Peer, matter: Matter) {
    let reserved = peer.ask(matter, peer.reservation(matter));
    assert!(matches!(reserved, AnswerBody::Reserved { .. }), "{reserved:?}");
    let staged = peer.ask_through(matter, init(peer.initialization(matter)));
    assert!(matches!(staged, AnswerBody::Staged { pass: 1, .. }), "{staged:?}");
}

/// The rest of an honest migration; the VM is the real cloud's afterwards.
fn hand_over(bench: &Bench, peer: &Peer, matter: Matter) {
    let answer = peer.ask_through(matter, started(peer, matter));
    let AnswerBody::Started { receipt, .. } = answer else { panic!("{answer:?}") };
    assert_eq!(receipt.verify().unwrap().epoch, matter.epoch + 1);
    let deleting = std::iter::from_fn(|| peer.asked(Duration::from_secs(30))).find(|a| a.verb() == "delete");
    let asked = deleting.expect("the broker says that the VM is its own");
    peer.answer(asked, AnswerBody::Deleted { grace_s: 0 }, Spoil::Nothing);
    let vm = bench.world.vm(0, &matter.vm.to_string());
    assert_eq!((vm.ownership.as_str(), vm.epoch), ("here", matter.epoch + 1));
}

pub fn delete_vm(bench: &Bench, matter: Matter) {
    let vm = matter.vm.to_string();
    assert!(matches!(
        bench.world.call(0, &Request::Vm(VmRequest::Delete { vm, taken_for: None })),
        Ok(Reply::Deleted(_))
    ));
}

pub fn rows(bench: &mut Bench) {
    let matter = Matter::new(1);
    let check = bench.mallory.ask(matter, bench.mallory.configuration(matter));
    assert!(matches!(&check, AnswerBody::Configuration(c) if c.blockers.is_empty()), "{check:?}");
    stage(&bench.mallory, matter);
    hand_over(bench, &bench.mallory, matter);
    bench.table.row("source: all", "nothing", "takes the VM over");
    delete_vm(bench, matter);
    bench.settled("an honest move");

    seals(bench);
    check_rows(bench);
    reservation_rows(bench);
    initialization_rows(bench);
    content_rows(bench);
    start_rows(bench);
    others_rows(bench);
}

/// Every request, with every fault of a seal; afterwards the honest one is still answered.
fn seals(bench: &mut Bench) {
    let matter = Matter::new(1);
    for step in ["configuration", "reservation", "initialization", "start", "cancel", "delete", "content"] {
        let peer = &bench.mallory;
        let body = match step {
            "configuration" => peer.configuration(matter),
            "reservation" => peer.reservation(matter),
            "initialization" => init(peer.initialization(matter)),
            "start" => started(peer, matter),
            "cancel" => cancel(),
            "delete" => RequestBody::Delete { boot_ms: None },
            _ => RequestBody::Content { components: vec![], packs: vec![], done: vec![] },
        };
        let step = format!("source: {step}");
        for (spoil, words, kind) in SPOILS {
            let answer = bench.mallory.ask_spoiled(matter, body.clone(), spoil);
            assert!(is_refusal(&answer), "{step}, {words}: {answer:?}");
            bench.refused_for(kind);
            bench.table.row(&step, words, format!("refused and counted: {kind}"));
        }
        let peer = &bench.mallory;
        let huge = vec![0; 200 << 10];
        let answer = peer.send(&huge);
        assert!(
            matches!(&answer, Err(RequestError::Refused { condition, .. }) if condition == "policy-violation"),
            "{answer:?}"
        );
        bench.table.row(&step, "200 KiB", "refused: policy-violation");

        // With fields of a later version it is taken, and the same bytes are not taken twice.
        let envelope = peer.envelope(matter, body.clone());
        let sealed = seal(&envelope, &peer.key, Spoil::UnknownFields);
        assert!(peer.send(&sealed).is_ok(), "{step}");
        let replayed = peer.send(&sealed);
        assert!(matches!(&replayed, Err(RequestError::Refused { .. })), "{replayed:?}");
        bench.refused_for("replay");
        let peer = &bench.mallory;
        if matches!(body, RequestBody::Initialization(_)) {
            peer.ask_through(matter, body.clone());
        }
        if matches!(body, RequestBody::Start { .. }) {
            hand_over(bench, peer, matter);
        }
        bench.table.row(&step, "unknown fields", "accepted");
        bench.table.row(&step, "replayed", "refused and logged: message was seen before");
    }
    delete_vm(bench, matter);
    bench.settled("seals");
}

fn check_rows(bench: &mut Bench) {
    let matter = Matter::new(1);
    let ids = |n: usize| (0..n).map(|i| ComponentId::of(&i.to_le_bytes())).collect::<Vec<_>>();
    let peer = &bench.mallory;
    let ask = |components, spec| {
        peer.ask(matter, RequestBody::Configuration { spec, components, packs: Vec::new() })
    };
    let (code, text) = denied(&ask(ids(CHECK_IDS_MAX + 1), peer.spec(matter)));
    assert_eq!(code, DenialCode::Other);
    bench.table.row("source: configuration", "1,001 components", text);
    let mut rows = Vec::new();
    for (words, spec) in absurd_specs(peer.spec(matter)) {
        let answer = ask(Vec::new(), spec);
        let AnswerBody::Configuration(check) = &answer else { panic!("{words}: {answer:?}") };
        assert!(!check.blockers.is_empty(), "{words}");
        rows.push((words, format!("blocked: {}", short(&check.blockers[0].text))));
    }
    for (words, did) in rows {
        bench.table.row("source: configuration", words, did);
    }
    bench.settled("checks");
}

fn absurd_specs(spec: VmSpec) -> Vec<(&'static str, VmSpec)> {
    let nic =
        |i: u8| Nic { network: format!("net-{i}"), mac: Mac::derived(spec.id, i), model: Default::default() };
    vec![
        ("4,294,967,295 CPUs", VmSpec { cpus: u32::MAX, ..spec.clone() }),
        ("no CPU", VmSpec { cpus: 0, ..spec.clone() }),
        ("2^64-1 bytes of memory", VmSpec { memory: ByteSize(u64::MAX), ..spec.clone() }),
        ("16 TiB of memory", VmSpec { memory: ByteSize(1 << 44), ..spec.clone() }),
        ("a root disk of 2^64-1 bytes", VmSpec { root_size: ByteSize(u64::MAX), ..spec.clone() }),
        ("user data of 2^64-1 bytes", VmSpec { user_data_size: ByteSize(u64::MAX), ..spec.clone() }),
        ("16 TiB of user data", VmSpec { user_data_size: ByteSize(1 << 44), ..spec.clone() }),
        ("255 network cards", VmSpec { nics: (0..255).map(nic).collect(), ..spec.clone() }),
        ("a CPU model with spaces and commas", VmSpec { cpu_model: "qemu64,+x -S".into(), ..spec.clone() }),
        ("an architecture of 60,000 bytes", VmSpec { architecture: "a".repeat(60_000), ..spec }),
    ]
}

fn reservation_rows(bench: &mut Bench) {
    let step = "source: reservation";
    let peer = &bench.mallory;
    let matter = Matter::new(1);
    let mut rows: Vec<(&str, String)> = Vec::new();
    for (words, spec) in absurd_specs(peer.spec(matter)) {
        let (_, text) = denied(&peer.ask(matter, RequestBody::Reservation { spec }));
        rows.push((words, text));
    }
    let other = Matter::new(1);
    let (code, text) = denied(&peer.ask(matter, RequestBody::Reservation { spec: peer.spec(other) }));
    assert_eq!(code, DenialCode::NotYours);
    rows.push(("for another VM than the message's", text));
    for (words, epoch) in [("epoch 2^64-1", u64::MAX), ("the last epoch that there is", EPOCH_MAX)] {
        let jump = Matter { epoch, ..Matter::new(1) };
        let (code, text) = denied(&peer.ask(jump, peer.reservation(jump)));
        assert_eq!(code, DenialCode::HandOver);
        rows.push((words, text));
    }
    for (words, did) in rows {
        bench.table.row(step, words, did);
    }
    bench.settled("reservations that are refused");

    // A VM that is the real cloud's own.
    let own = bench.new_vm();
    let theirs = Matter { vm: own.id, ..Matter::new(7) };
    let (code, text) = denied(&bench.mallory.ask(theirs, bench.mallory.reservation(theirs)));
    assert_eq!(code, DenialCode::AlreadyThere);
    assert_eq!(bench.world.vm(0, own.name.as_str()).ownership, cicada::interface::VmOwnership::Here);
    bench.table.row(step, "for a VM that the broker owns", text);

    // Many at once: few are granted, and all of them end.
    let (mut granted, mut refused) = (0, 0);
    for _ in 0..200 {
        let matter = Matter::new(1);
        match bench.mallory.ask(matter, bench.mallory.reservation(matter)) {
            AnswerBody::Reserved { .. } => granted += 1,
            AnswerBody::Denied(_) => refused += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(refused >= 100, "{granted} were granted");
    bench.settled("a flood of reservations");
    bench.table.row(
        step,
        "200 at once for as many VMs, then silence",
        "grants two at a time, the leases run out",
    );
}

fn initialization_rows(bench: &mut Bench) {
    let step = "source: initialization";
    let cases: Vec<(&str, SpoiltPass)> = vec![
        (
            "another recipe than was reserved",
            Box::new(|p, i| {
                let mut recipe = p.goods.recipe.clone();
                recipe.ordered = !recipe.ordered;
                i.recipe = base64(&recipe.encode());
            }),
        ),
        ("a recipe that is not base64", Box::new(|_, i| i.recipe = "!!!".into())),
        ("a recipe of noise", Box::new(|_, i| i.recipe = base64(&[7; 5000]))),
        ("another VM's spec", Box::new(|p, i| i.spec = p.spec(Matter::new(1)))),
        ("more CPUs than were reserved", Box::new(|_, i| i.spec.cpus = 4)),
        (
            "another key for the transfer",
            Box::new(|_, i| {
                i.source_key = IdentityKey::from_secret_bytes(&[9; 32]).public();
            }),
        ),
        ("a ticket that is no ticket", Box::new(|_, i| i.ticket = "x".repeat(64))),
        ("a ticket that does not work", Box::new(|_, i| i.ticket = "ab".repeat(32))),
        ("blocks of 12,345 bytes", Box::new(|_, i| i.pass.root_delta.block_size_bytes = 12_345)),
        ("blocks of no bytes", Box::new(|_, i| i.pass.user_data.block_size_bytes = 0)),
        ("a map of a larger disk", Box::new(|_, i| i.pass.root_delta.disk_size_bytes = 1 << 60)),
        ("a map of a smaller disk", Box::new(|_, i| i.pass.user_data.disk_size_bytes -= 1)),
        (
            "a map whose root is not served",
            Box::new(|_, i| {
                i.pass.root_delta.root = Some(NodeHash::of(b"nobody has it"));
            }),
        ),
        (
            "the map of another disk",
            Box::new(|p, i| {
                let MapRef { block_size_bytes, disk_size_bytes, .. } = p.goods.root;
                i.pass.root_delta =
                    MapRef { block_size_bytes, disk_size_bytes, root: p.goods.user_data.root };
            }),
        ),
        ("firmware variables that are not base64", Box::new(|_, i| i.firmware = Some("!!!".into()))),
        (
            "firmware variables that unpack to 64 MiB",
            Box::new(|_, i| {
                i.firmware = Some(base64(&zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap()));
            }),
        ),
        ("no address", Box::new(|_, i| i.addresses.clear())),
        (
            "addresses that are none",
            Box::new(|_, i| i.addresses = vec![raw("\u{202e}::"), raw("x".repeat(9000))]),
        ),
    ];
    for (words, spoil) in cases {
        let peer = &bench.mallory;
        let matter = Matter::new(1);
        peer.ask(matter, peer.reservation(matter));
        let mut i = peer.initialization(matter);
        spoil(peer, &mut i);
        let answer = peer.ask_through(matter, init(i.clone()));
        let (code, text) = denied(&answer);
        assert!(matches!(code, DenialCode::Content | DenialCode::Storage), "{words}: {text}");
        // Repeated it is the same, and an honest pass still gets through.
        assert_eq!(denied(&peer.ask(matter, init(i))).0, code, "{words}");
        let mut honest = peer.initialization(matter);
        honest.pass.number = 2;
        let tried = peer.ask_through(matter, init(honest));
        let again = match &tried {
            AnswerBody::Staged { pass: 2, .. } => "an honest pass goes through",
            // The pass that failed said that it was the last.
            AnswerBody::Denied(_) => "the reservation is spent",
            other => panic!("{words}: {other:?}"),
        };
        assert!(matches!(peer.ask(matter, cancel()), AnswerBody::Cancelled { .. }));
        bench.settled(words);
        bench.table.row(step, words, format!("{text}; {again}"));
    }

    // Figures that are too large to add up harm nobody: the pass is honest otherwise.
    let peer = &bench.mallory;
    let matter = Matter::new(1);
    peer.ask(matter, peer.reservation(matter));
    let mut i = peer.initialization(matter);
    i.component_bytes = u64::MAX;
    i.component_names = (0..3000).map(|n| raw(format!("\u{202e}\u{1b}[31m{n}"))).collect();
    i.addresses = std::iter::repeat_n("192.0.2.1:9".into(), 300).chain(i.addresses).collect();
    i.addresses.rotate_right(1);
    let staged = peer.ask_through(matter, init(i));
    assert!(matches!(staged, AnswerBody::Staged { pass: 1, .. }), "{staged:?}");
    // A pass that comes again late, and one that goes back.
    let mut back = peer.initialization(matter);
    back.pass.number = 0;
    let (code, text) = denied(&peer.ask(matter, init(back)));
    assert_eq!(code, DenialCode::OutOfOrder);
    peer.ask(matter, cancel());
    bench.settled("figures");
    bench.table.row(step, "2^64-1 bytes of components, 3,000 names with control characters", "staged");
    bench.table.row(step, "a pass number that goes back", text);

    // Without a reservation, and after it was called off.
    let peer = &bench.mallory;
    for (words, matter) in [("without a reservation", Matter::new(1)), ("after its cancel", matter)] {
        let (code, text) = denied(&bench.mallory.ask(matter, init(peer.initialization(matter))));
        assert_eq!(code, DenialCode::UnknownMigration);
        bench.table.row(step, words, text);
    }
    bench.settled("initializations without a lease");
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// What goes wrong while content travels, and who goes silent then.
fn content_rows(bench: &mut Bench) {
    let step = "source: content";
    let begin = |peer: &Peer| {
        peer.cut_connections();
        let matter = Matter::new(1);
        assert!(matches!(peer.ask(matter, peer.reservation(matter)), AnswerBody::Reserved { .. }));
        matter
    };

    // Held already is not asked for again: the victim's goods are new to the broker.
    let peer = &bench.victim;
    peer.behave(Manners::Lying);
    let matter = begin(peer);
    let (code, text) = denied(&peer.ask_through(matter, init(peer.initialization(matter))));
    assert_eq!(code, DenialCode::Content, "{text}");
    peer.ask(matter, cancel());
    peer.behave(Manners::Honest);
    bench.settled("content that lies");
    bench.table.row(step, "other bytes than the hash says", text);

    let peer = &bench.victim;
    peer.behave(Manners::Slow);
    let matter = begin(peer);
    peer.ask(matter, init(peer.initialization(matter)));
    bench.world.wait("content is being fetched", 30, |_| peer.has_connection());
    bench.settled("content at a byte a second");
    bench.table.row(step, "a byte a second, and no further word", "the lease ends it");

    let peer = &bench.victim;
    let matter = begin(peer);
    peer.ask(matter, init(peer.initialization(matter)));
    bench.world.wait("content is being fetched", 30, |_| peer.has_connection());
    peer.cut_connections();
    peer.behave(Manners::Honest);
    bench.settled("a connection that is cut");
    bench.table.row(step, "the connection is cut, and no further word", "the lease ends it");

    let peer = &bench.victim;
    let matter = begin(peer);
    let mut i = peer.initialization(matter);
    i.addresses = vec!["127.0.0.1:9".into()];
    peer.ask(matter, init(i));
    bench.settled("an address where nobody is");
    bench.table.row(step, "an address where nobody answers, and no further word", "the lease ends it");

    for (words, go) in [("reserved", false), ("staged", true)] {
        let peer = &bench.victim;
        let matter = begin(peer);
        if go {
            let staged = peer.ask_through(matter, init(peer.initialization(matter)));
            assert!(matches!(staged, AnswerBody::Staged { .. }), "{staged:?}");
        }
        bench.settled(words);
        bench.table.row(
            &format!("source: {words}"),
            "silence",
            "the lease ends it, what was staged is removed",
        );
    }
}

fn start_rows(bench: &mut Bench) {
    let step = "source: start";
    // For a migration that is reserved only: ended, and given back when it is asked again.
    let peer = &bench.mallory;
    let matter = Matter::new(1);
    peer.ask(matter, peer.reservation(matter));
    let (code, text) = denied(&peer.ask(matter, started(peer, matter)));
    assert_eq!(code, DenialCode::UnknownMigration);
    let back = peer.ask(matter, started(peer, matter));
    let AnswerBody::Returned { back: first, .. } = &back else { panic!("{back:?}") };
    assert_eq!(first.verify().unwrap().vm, matter.vm);
    bench.settled("a start before it is staged");
    bench.table.row(step, "before the last pass is staged", format!("{text}; the next one is returned"));

    // That epoch of that VM is never taken again.
    let peer = &bench.mallory;
    let again = matter.again();
    stage(peer, again);
    peer.ask(again, started(peer, again));
    let back = peer.ask_through(again, started(peer, again));
    assert!(matches!(back, AnswerBody::Denied(_) | AnswerBody::Returned { .. }), "{back:?}");
    let back = peer.ask_through(again, started(peer, again));
    assert!(matches!(back, AnswerBody::Returned { .. }), "{back:?}");
    assert!(bench.world.call(0, &Request::Vm(VmRequest::Show { vm: matter.vm.to_string() })).is_err());
    bench.settled("an epoch that was returned");
    bench.table.row(step, "an epoch that was returned before", "never taken over, returned");

    // But the epoch is not spoilt for another source of that VM.
    let theirs = Matter { migration: MigrationId::random(), ..matter };
    stage(&bench.victim, theirs);
    hand_over(bench, &bench.victim, theirs);
    delete_vm(bench, theirs);
    bench.settled("another's epoch");
    bench.table.row(step, "returned for another's VM, whose source then brings it", "takes the VM over");

    let cases: Vec<(&str, SpoiltHandOver)> = vec![
        ("for another VM", Box::new(|p, h| HandOver { vm: VmId::random(), ..h }.sign(&p.key))),
        (
            "for another migration",
            Box::new(|p, h| HandOver { migration: MigrationId::random(), ..h }.sign(&p.key)),
        ),
        ("a stale epoch", Box::new(|p, h| HandOver { epoch: h.epoch - 1, ..h }.sign(&p.key))),
        ("an epoch that jumps", Box::new(|p, h| HandOver { epoch: h.epoch + 1, ..h }.sign(&p.key))),
        ("epoch 2^64-1", Box::new(|p, h| HandOver { epoch: u64::MAX, ..h }.sign(&p.key))),
        (
            "for another target",
            Box::new(|p, h| HandOver { target: "victim@federation.test".parse().unwrap(), ..h }.sign(&p.key)),
        ),
        (
            "for another key of the target",
            Box::new(|p, h| HandOver { target_key: p.key.public(), ..h }.sign(&p.key)),
        ),
        (
            "from another source",
            Box::new(|p, h| HandOver { source: "victim@federation.test".parse().unwrap(), ..h }.sign(&p.key)),
        ),
        ("signed by another key", Box::new(|_, h| h.sign(&IdentityKey::from_secret_bytes(&[9; 32])))),
        (
            "a record of noise",
            Box::new(|p, h| SignedHandOver { record: "ab".repeat(3000), ..h.sign(&p.key) }),
        ),
        (
            "a record that is not hex",
            Box::new(|p, h| SignedHandOver { record: "é".repeat(900), ..h.sign(&p.key) }),
        ),
    ];
    let matter = Matter::new(1);
    stage(&bench.mallory, matter);
    let mut rows = Vec::new();
    for (words, spoil) in &cases {
        let peer = &bench.mallory;
        let hand_over = spoil(peer, peer.hand_over(matter));
        let (code, text) = denied(&peer.ask(matter, RequestBody::Start { hand_over, run: false }));
        assert_eq!(code, DenialCode::HandOver, "{words}");
        rows.push((*words, format!("{text}; the right one is still taken")));
    }
    // The right one, a hundred times: one VM, one receipt.
    let peer = &bench.mallory;
    let request = started(peer, matter);
    let AnswerBody::Started { receipt, .. } = peer.ask_through(matter, request.clone()) else { panic!() };
    for _ in 0..100 {
        let answer = peer.ask(matter, request.clone());
        assert!(matches!(&answer, AnswerBody::Started { receipt: r, .. } if *r == receipt), "{answer:?}");
    }
    let (code, text) = denied(&peer.ask(matter, cancel()));
    assert_eq!(code, DenialCode::OutOfOrder);
    rows.push(("a hundred times", "one VM, the same receipt each time".into()));
    rows.push(("then `cancel`", text));
    let (_, text) = denied(&peer.ask(matter, init(peer.initialization(matter))));
    rows.push(("then `initialization`", text));
    let (_, text) = denied(&peer.ask(matter, peer.reservation(matter)));
    rows.push(("then `reservation`", text));
    let other = matter.again();
    let (_, text) = denied(&peer.ask(other, peer.reservation(other)));
    rows.push(("then `reservation` of another migration for that VM", text));
    // It never says whether it heard of the receipt: the VM is the real cloud's all the same.
    let vm = bench.world.vm(0, &matter.vm.to_string());
    assert_eq!((vm.ownership.as_str(), vm.epoch), ("here", 2));
    for (words, did) in rows {
        bench.table.row(step, words, did);
    }
    // A hand-over that signs the epoch away again, for a migration nobody knows.
    let later = Matter { migration: MigrationId::random(), vm: matter.vm, epoch: 40 };
    let answer = bench.mallory.ask(later, started(&bench.mallory, later));
    assert!(matches!(answer, AnswerBody::Returned { .. }), "{answer:?}");
    let vm = bench.world.vm(0, &matter.vm.to_string());
    assert_eq!((vm.ownership.as_str(), vm.epoch), ("here", 2));
    bench.table.row(
        step,
        "of an unknown migration, for a VM that is the broker's own by now",
        "returned; the VM stays",
    );
    // What it signed for one migration it sends for another.
    let (code, text) = denied(&bench.mallory.ask(later.again(), started(&bench.mallory, later)));
    assert_eq!(code, DenialCode::HandOver);
    bench.table.row(step, "of an unknown migration, in another's message", text);
    delete_vm(bench, matter);

    for (words, part) in [("another recipe", 0), ("another root delta", 1), ("other user data", 2)] {
        let peer = &bench.mallory;
        let matter = Matter::new(1);
        stage(peer, matter);
        let mut h = peer.hand_over(matter);
        match part {
            0 => h.recipe = RecipeId::of(b"other"),
            1 => h.root_delta = MapId::of(b"other"),
            _ => h.user_data = MapId::of(b"other"),
        }
        let request = RequestBody::Start { hand_over: h.sign(&peer.key), run: false };
        let (code, text) = denied(&peer.ask(matter, request.clone()));
        assert_eq!(code, DenialCode::HandOver);
        let back = peer.ask(matter, request);
        assert!(matches!(back, AnswerBody::Returned { .. }), "{back:?}");
        bench.settled(words);
        bench.table.row(
            step,
            &format!("for {words} than is staged"),
            format!("{text}; the next one is returned"),
        );
    }

    // An epoch older than what the cloud has seen of the VM.
    let gone = crate::as_target::moved_away(bench);
    let stale = Matter { vm: gone.id, ..Matter::new(0) };
    let (code, text) = denied(&bench.victim.ask(stale, bench.victim.reservation(stale)));
    assert_eq!(code, DenialCode::HandOver);
    bench.table.row("source: reservation", "an epoch older than the cloud has seen", text);
    bench.settled("a stale epoch");
}

/// Requests that meddle with what is another member's.
fn others_rows(bench: &mut Bench) {
    let matter = Matter::new(1);
    stage(&bench.victim, matter);
    let meddling = |p: &Peer| {
        [
            ("reservation", p.reservation(matter)),
            ("initialization", init(p.initialization(matter))),
            ("start", started(p, matter)),
            ("cancel", cancel()),
            ("delete", RequestBody::Delete { boot_ms: None }),
        ]
    };
    for (verb, request) in meddling(&bench.mallory) {
        let (code, text) = denied(&bench.mallory.ask(matter, request));
        assert_eq!(code, DenialCode::NotYours, "{verb}");
        bench.table.row(&format!("source: {verb}"), "of another member's migration", text);
    }
    // Signed by the victim, for the victim's migration, but sent by another.
    let signed = RequestBody::Start { hand_over: bench.victim.signed(matter), run: false };
    let (code, text) = denied(&bench.mallory.ask(Matter::new(1), signed));
    assert_eq!(code, DenialCode::HandOver);
    bench.table.row("source: start", "with the hand-over of another source", text);
    // Bytes that the victim sent, sent again by another.
    let envelope = bench.victim.envelope(matter, cancel());
    let answer = bench.mallory.send(&seal(&envelope, &bench.victim.key, Spoil::Nothing));
    assert!(matches!(&answer, Err(RequestError::Refused { .. })), "{answer:?}");
    bench.table.row(
        "source: cancel",
        "signed by another member",
        "refused and logged: signature does not match",
    );
    hand_over(bench, &bench.victim, matter);
    bench.table.row("source: all", "meddled with by another member", "takes the honest member's VM over");

    // What is the cloud's own.
    let own = bench.new_vm();
    for (words, vm) in
        [("of a VM that the broker owns", own.id), ("of a VM that came from another", matter.vm)]
    {
        let matter = Matter { vm, ..Matter::new(1) };
        let (code, text) =
            denied(&bench.mallory.ask(matter, RequestBody::Delete { boot_ms: Some(u64::MAX) }));
        assert_eq!(code, DenialCode::NotYours);
        assert_eq!(bench.world.vm(0, &vm.to_string()).ownership, cicada::interface::VmOwnership::Here);
        bench.table.row("source: delete", words, text);
    }
    for (verb, request) in [("suspend", RequestBody::Suspend), ("stop", RequestBody::Stop)] {
        let matter = Matter { vm: own.id, ..Matter::new(1) };
        let (code, text) = denied(&bench.mallory.ask(matter, request));
        assert_eq!(code, DenialCode::UnknownMigration);
        bench.table.row(&format!("source: {verb}"), "of a VM that the broker owns", text);
    }

    // Content: only what has a name, and not more than may be asked for.
    let ids: Vec<_> = (0..1001u32).map(|n| ComponentId::of(&n.to_le_bytes())).collect();
    let content =
        |components: Vec<ComponentId>, done| RequestBody::Content { components, packs: vec![], done };
    let (_, text) = denied(&bench.mallory.ask(Matter::new(0), content(ids.clone(), vec![])));
    bench.table.row("source: content", "asks for 1,001 components", text);
    let nameless = bench.mallory.goods.recipe.components.clone();
    let junk = vec!["x".repeat(5000), "00".repeat(32)];
    let answer = bench.mallory.ask(Matter::new(0), content(nameless, junk));
    assert!(matches!(&answer, AnswerBody::Content(c) if c.ticket.is_none()), "{answer:?}");
    bench.table.row(
        "source: content",
        "asks for what has no name here, gives back tickets it never had",
        "no ticket",
    );
    delete_vm(bench, matter);
    bench.settled("what is another's");
}
