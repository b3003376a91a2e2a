//! The peer is the target: the real broker moves VMs to it.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cicada::interface::VmView;
use cicada::interface::{Reply, Request, VmRequest};
use cicada::migration::handover::SignedHandOver;
use cicada::migration::message::{CheckAnswer, Initialization, Progress, Seed, StageAccount};
use cicada::migration::{AnswerBody, Denial, DenialCode, Receipt, RequestBody};
use cicada::transfer::{
    ObjectKey, ObjectSink, PackRange, PackWriter, Progress as Counter, Refusal, SinkError, Ticket, Verified,
};
use cicada::types::{BlockHash, ComponentId, Hash, IdentityKey, NodeHash, PackId, RecipeId};

use crate::peer::{Asked, Matter, Peer, Spoil, raw};
use crate::{Bench, Moving};

/// How long the real broker may take until it asks again.
const SOON: Duration = Duration::from_secs(30);

/// What a target makes of a hand-over.
type Trick = Box<dyn Fn(&Peer, SignedHandOver) -> AnswerBody>;

/// What an honest target answers.
pub fn honest(peer: &Peer, request: &RequestBody) -> AnswerBody {
    match request {
        RequestBody::Configuration { .. } => AnswerBody::Configuration(yes()),
        RequestBody::Reservation { .. } => {
            AnswerBody::Reserved { expires_in_s: 60, reservation: None, known: None }
        }
        RequestBody::Initialization(init) => {
            AnswerBody::Staged { pass: init.pass.number, account: StageAccount::default() }
        }
        RequestBody::Start { hand_over, .. } => started(hand_over.clone().accept(&peer.key)),
        RequestBody::Cancel { .. } => AnswerBody::Cancelled { kept_s: 0 },
        _ => AnswerBody::Denied(no("not this")),
    }
}

fn yes() -> CheckAnswer {
    CheckAnswer {
        differences: Vec::new(),
        blockers: Vec::new(),
        components_lacking: Vec::new(),
        packs_lacking: Vec::new(),
        seed: None,
        kept: None,
        composed: false,
        reads_devices: true,
    }
}

fn no(text: &str) -> Denial {
    Denial::new(DenialCode::Other, text)
}

fn started(receipt: Receipt) -> AnswerBody {
    AnswerBody::Started { receipt, running: false, problem: None, account: StageAccount::default() }
}

/// Answers honestly until the broker asks for `verb`; that request.
pub fn until(bench: &Bench, verb: &str) -> Asked {
    let begun = Instant::now();
    while begun.elapsed() < SOON * 2 {
        let Some(asked) = bench.mallory.asked(Duration::from_secs(1)) else { continue };
        if asked.verb() == verb {
            return asked;
        }
        let answer = honest(&bench.mallory, &asked.envelope.body);
        bench.mallory.answer(asked, answer, Spoil::Nothing);
    }
    panic!("the broker never asked for {verb}\n{}", bench.world.log(0))
}

/// Answers honestly until the move has ended; how it ended.
fn through(bench: &Bench, moving: Moving) -> Result<Reply, cicada::interface::Problem> {
    let begun = Instant::now();
    while !moving.ended() {
        assert!(begun.elapsed() < SOON * 2, "the move does not end\n{}", bench.world.log(0));
        if let Some(asked) = bench.mallory.asked(Duration::from_millis(200)) {
            let answer = honest(&bench.mallory, &asked.envelope.body);
            bench.mallory.answer(asked, answer, Spoil::Nothing);
        }
    }
    moving.outcome()
}

/// The move must have ended without a hand-over; the reason that operators are told.
fn failed(bench: &Bench, moving: Moving, vm: &VmView, epoch: u64) -> String {
    let problem = through(bench, moving).expect_err("the move fails");
    let now = bench.world.vm(0, vm.name.as_str());
    assert_eq!((now.ownership.as_str(), now.epoch), ("here", epoch), "{problem}");
    let words: Vec<_> =
        problem.reason.split(' ').map(|w| if w.chars().count() > 30 { "…" } else { w }).collect();
    format!("the VM stays: {}", words.join(" ").chars().take(100).collect::<String>())
}

fn completed(bench: &Bench, moving: Moving, vm: &VmView) {
    let moved = through(bench, moving);
    assert!(matches!(moved, Ok(Reply::Migration(_))), "{moved:?}\n{}", bench.world.log(0));
    assert_eq!(bench.world.vm(0, vm.name.as_str()).ownership, cicada::interface::VmOwnership::GivenUp);
}

/// A VM that the peer has taken over.
pub fn moved_away(bench: &mut Bench) -> VmView {
    let vm = bench.new_vm();
    let moving = bench.begin_move(&vm);
    completed(bench, moving, &vm);
    vm
}

pub fn rows(bench: &mut Bench) {
    honest_run(bench);
    check_rows(bench);
    answers_before_the_hand_over(bench);
    serving_rows(bench);
    start_rows(bench);
}

fn honest_run(bench: &mut Bench) {
    let vm = bench.new_vm();
    let moving = bench.begin_move(&vm);
    let asked = until(bench, "initialization");
    let RequestBody::Initialization(init) = &asked.envelope.body else { unreachable!() };
    let (ticket, keys) = (ticket_of(init), wanted(init));
    let delivered = fetch(&bench.mallory, init, ticket, keys).expect("an honest target is served");
    assert!(delivered.is_empty(), "refused: {delivered:?}");
    bench.mallory.answer(asked, AnswerBody::Working(Progress::default()), Spoil::Nothing);
    let start = until(bench, "start");
    let RequestBody::Start { hand_over, .. } = &start.envelope.body else { unreachable!() };
    let record = hand_over.verify().unwrap();
    assert_eq!((record.vm, record.epoch), (vm.id, 2));
    let matter = Matter { migration: start.envelope.migration, vm: vm.id, epoch: record.epoch };
    let answer = honest(&bench.mallory, &start.envelope.body);
    bench.mallory.answer(start, answer, Spoil::Nothing);
    completed(bench, moving, &vm);
    let deleted = bench.mallory.ask(matter, RequestBody::Delete { boot_ms: Some(u64::MAX) });
    assert!(matches!(deleted, AnswerBody::Deleted { .. }), "{deleted:?}");
    // Only its new owner, and only for that migration.
    let other = bench.mallory.ask(matter.again(), RequestBody::Delete { boot_ms: None });
    let theirs = bench.victim.ask(matter, RequestBody::Delete { boot_ms: None });
    for answer in [other, theirs] {
        assert!(matches!(&answer, AnswerBody::Denied(d) if d.code == DenialCode::NotYours), "{answer:?}");
    }
    bench.settled("an honest move away");
    bench.table.row("target: all", "nothing", "gives the VM up, and keeps the receipt");
    bench.table.row("target: delete", "of another migration, or of another member's VM", "denied: not-yours");
}

fn check_rows(bench: &mut Bench) {
    let step = "target: configuration";
    let vm = bench.new_vm();
    let absurd = Seed {
        root_delta: cicada::vm::MapRef { block_size_bytes: 0, disk_size_bytes: u64::MAX, root: None },
        user_data: cicada::vm::MapRef {
            block_size_bytes: u32::MAX,
            disk_size_bytes: u64::MAX,
            root: Some(NodeHash::of(b"x")),
        },
    };
    let blocker = Denial::new(DenialCode::Memory, raw("\u{202e}none\u{1b}[2J\n\nERROR forged"));
    let cases: Vec<(&str, AnswerBody)> = vec![
        (
            "names a component 20,000 times",
            AnswerBody::Configuration(CheckAnswer { components_lacking: vec![0; 20_000], ..yes() }),
        ),
        (
            "names components that were not asked about",
            AnswerBody::Configuration(CheckAnswer { components_lacking: vec![u32::MAX], ..yes() }),
        ),
        (
            "says no, in control characters",
            AnswerBody::Configuration(CheckAnswer { blockers: vec![blocker], ..yes() }),
        ),
        ("denies without a reason", AnswerBody::Denied(no(""))),
        ("answers `staged`", AnswerBody::Staged { pass: 1, account: StageAccount::default() }),
        ("answers `started` with another's receipt", {
            let matter = Matter::new(1);
            started(bench.mallory.signed(matter).accept(&bench.mallory.key))
        }),
    ];
    for (words, answer) in cases {
        let moving = bench.begin_move(&vm);
        let asked = until(bench, "configuration");
        bench.mallory.answer(asked, answer, Spoil::Nothing);
        let did = failed(bench, moving, &vm, 1);
        bench.settled(words);
        bench.table.row(step, words, did);
    }
    for (spoil, words) in ANSWER_SPOILS {
        let moving = bench.begin_move(&vm);
        let asked = until(bench, "configuration");
        let answer = honest(&bench.mallory, &asked.envelope.body);
        bench.mallory.answer(asked, answer, spoil);
        let did = failed(bench, moving, &vm, 1);
        bench.settled(words);
        bench.table.row(step, words, did);
    }
    // Seeds that no map can have only cost what they might have saved.
    let moving = bench.begin_move(&vm);
    let asked = until(bench, "configuration");
    let answer = AnswerBody::Configuration(CheckAnswer { seed: Some(absurd), ..yes() });
    bench.mallory.answer(asked, answer, Spoil::Nothing);
    completed(bench, moving, &vm);
    bench.table.row(
        step,
        "a seed of 2^64-1 bytes in blocks of none",
        "the seed is of no use, the move goes on",
    );
    // What it answers after the move is over is noise.
    bench.settled("checks of a hostile target");
}

/// What is wrong with an answer's seal.
const ANSWER_SPOILS: [(Spoil, &str); 10] = [
    (Spoil::Signature, "an answer with a forged signature"),
    (Spoil::AnothersKey, "an answer signed with another key"),
    (Spoil::Cut, "an answer too short for a signature"),
    (Spoil::NotJson, "an answer of JSON cut in the middle"),
    (Spoil::NextVersion, "an answer of protocol version 3"),
    (Spoil::Recipient, "an answer to another member"),
    (Spoil::Expired, "an answer that has expired"),
    (Spoil::Nonce, "an answer with another nonce"),
    (Spoil::Migration, "an answer of another migration"),
    (Spoil::Vm, "an answer about another VM"),
];

/// Each request is answered wrongly several times; the broker asks again, and goes on when it gets
/// an honest answer.
fn answers_before_the_hand_over(bench: &mut Bench) {
    let vm = bench.new_vm();
    let moving = bench.begin_move(&vm);
    for (verb, spoils) in [("reservation", &ANSWER_SPOILS[..3]), ("initialization", &ANSWER_SPOILS[3..7])] {
        for (spoil, words) in spoils {
            let asked = until(bench, verb);
            let answer = honest(&bench.mallory, &asked.envelope.body);
            bench.mallory.answer(asked, answer, *spoil);
            bench.table.row(&format!("target: {verb}"), words, "not believed, asked again");
        }
        let asked = until(bench, verb);
        asked.refuse();
        bench.table.row(&format!("target: {verb}"), "the stanza is refused", "asked again");
        // Of a kind that fits no request of this step.
        let asked = until(bench, verb);
        if verb == "initialization" {
            bench.mallory.answer(asked, AnswerBody::Deleted { grace_s: u64::MAX }, Spoil::Nothing);
            let asked = until(bench, verb);
            let account = StageAccount::default();
            bench.mallory.answer(asked, AnswerBody::Staged { pass: 77, account }, Spoil::Nothing);
            let asked = until(bench, verb);
            let receipt = bench.mallory.signed(Matter::new(1)).accept(&bench.mallory.key);
            bench.mallory.answer(asked, started(receipt), Spoil::Nothing);
            bench.table.row(
                "target: initialization",
                "another answer's kind, another pass, a receipt",
                "asked again",
            );
            let asked = until(bench, verb);
            let huge = Progress { step: raw("\u{1b}[2J".repeat(1000)), bytes_done: u64::MAX, bytes_total: 1 };
            bench.mallory.answer(asked, AnswerBody::Working(huge), Spoil::Nothing);
            bench.table.row("target: initialization", "progress of 2^64-1 bytes of one", "asked again");
            let asked = until(bench, verb);
            let RequestBody::Initialization(init) = &asked.envelope.body else { unreachable!() };
            let account = StageAccount {
                components_fetched: u32::MAX,
                component_bytes: u64::MAX,
                root_delta_bytes: u64::MAX,
                user_data_bytes: u64::MAX,
                map_bytes: u64::MAX,
                wire_bytes: u64::MAX,
                fetch_ms: u64::MAX,
                compose_ms: u64::MAX,
                fetched: vec![raw("x".repeat(50_000))],
                ..StageAccount::default()
            };
            let answer = AnswerBody::Staged { pass: init.pass.number, account };
            bench.mallory.answer(asked, answer, Spoil::Nothing);
        } else {
            bench.mallory.answer(
                asked,
                honest(
                    &bench.mallory,
                    &RequestBody::Reservation { spec: bench.mallory.spec(Matter::new(1)) },
                ),
                Spoil::UnknownFields,
            );
            bench.table.row("target: reservation", "an answer with unknown fields", "accepted");
        }
    }
    completed(bench, moving, &vm);
    bench.table.row("target: initialization", "an account of 2^64-1 bytes everywhere", "the move goes on");
    bench.settled("answers before the hand-over");

    let vm = bench.new_vm();
    for verb in ["reservation", "initialization"] {
        for text in ["", "\u{202e}no\u{1b}[2J"] {
            let moving = bench.begin_move(&vm);
            let asked = until(bench, verb);
            bench.mallory.answer(
                asked,
                AnswerBody::Denied(Denial::new(DenialCode::Other, raw(text))),
                Spoil::Nothing,
            );
            failed(bench, moving, &vm, 1);
        }
        bench.settled("denials");
        bench.table.row(
            &format!("target: {verb}"),
            "denies without a reason, or in control characters",
            "the VM stays",
        );
        // It forgets the migration for ever.
        let moving = bench.begin_move(&vm);
        let mut forgot = 0;
        while !moving.ended() {
            let Some(asked) = bench.mallory.asked(Duration::from_millis(200)) else { continue };
            let answer = match asked.verb() {
                v if v == verb => {
                    forgot += 1;
                    AnswerBody::Denied(Denial::new(DenialCode::UnknownMigration, "which one?"))
                }
                _ => honest(&bench.mallory, &asked.envelope.body),
            };
            bench.mallory.answer(asked, answer, Spoil::Nothing);
        }
        let did = failed(bench, moving, &vm, 1);
        assert!(forgot < 10, "{forgot}");
        bench.settled("a target that forgets");
        bench.table.row(&format!("target: {verb}"), "has forgotten the migration, every time", did);
    }

    // Silence, or `working` for ever: the operator calls it off.
    for (words, working) in [("silence", false), ("`working`, for ever", true)] {
        let moving = bench.begin_move(&vm);
        let asked = until(bench, "initialization");
        let mut kept = Vec::new();
        if working {
            bench.mallory.answer(asked, AnswerBody::Working(Progress::default()), Spoil::Nothing);
            for _ in 0..20 {
                let asked = until(bench, "initialization");
                bench.mallory.answer(asked, AnswerBody::Working(Progress::default()), Spoil::Nothing);
            }
        } else {
            kept.push(asked);
        }
        assert!(!moving.ended());
        bench.cancel_all();
        let did = failed(bench, moving, &vm, 1);
        bench.settled(words);
        bench.table.row(
            "target: initialization",
            words,
            format!("goes on until the operator cancels; {did}"),
        );
    }
}

fn ticket_of(init: &Initialization) -> Ticket {
    Ticket::from_bytes(*init.ticket.parse::<Hash>().unwrap().as_bytes())
}

/// What the broker named, of each kind that it serves.
fn wanted(init: &Initialization) -> Vec<ObjectKey> {
    let mut keys = vec![ObjectKey::Recipe(init.spec.recipe)];
    keys.extend(init.pass.root_delta.root.map(ObjectKey::Node));
    keys.extend(init.pass.user_data.root.map(ObjectKey::Node));
    keys
}

/// Fetches from the real broker; what it refused, or why nothing came.
fn fetch(
    peer: &Peer,
    init: &Initialization,
    ticket: Ticket,
    keys: Vec<ObjectKey>,
) -> Result<Vec<(ObjectKey, Refusal)>, String> {
    let addresses: Vec<_> = init.addresses.iter().map(|a| a.parse().unwrap()).collect();
    peer.block_on(async {
        let connection = peer.endpoint.connect(&addresses, peer.real_key).await.map_err(|e| e.to_string())?;
        let report =
            connection.fetch(&ticket, keys, Arc::new(Bin::default()), Arc::new(Counter::default())).await;
        report.map(|r| r.refused).map_err(|e| e.to_string())
    })
}

#[derive(Default)]
struct Bin(Mutex<usize>);

impl ObjectSink for Bin {
    fn deliver(&self, objects: Vec<Verified>) -> Result<(), SinkError> {
        *self.0.lock().unwrap() += objects.len();
        Ok(())
    }
    fn pack(&self, _: &PackId, _: bool, _: &PackRange, _: u64) -> Result<Box<dyn PackWriter>, SinkError> {
        Err(SinkError::Storage("packs are not kept".into()))
    }
}

/// What a target asks for that it was not offered.
fn serving_rows(bench: &mut Bench) {
    let step = "target: content";
    let vm = bench.new_vm();
    let moving = bench.begin_move(&vm);
    let asked = until(bench, "initialization");
    let RequestBody::Initialization(init) = asked.envelope.body.clone() else { unreachable!() };
    let foreign: Vec<(&str, ObjectKey)> = vec![
        ("a component that was not named", ObjectKey::Manifest(ComponentId::of(b"x"))),
        ("a recipe that was not named", ObjectKey::Recipe(RecipeId::of(b"x"))),
        ("a pack that was not named", ObjectKey::Pack(PackId::of(b"x"))),
        ("a node that was not named", ObjectKey::Node(NodeHash::of(b"x"))),
        ("a block that is on no disk of the VM", ObjectKey::Block(BlockHash::of(b"x"))),
    ];
    for (words, key) in foreign {
        let refused = fetch(&bench.mallory, &init, ticket_of(&init), vec![key]).unwrap();
        assert_eq!(refused.len(), 1, "{words}");
        bench.table.row(step, words, format!("refused: {}", refused[0].1));
    }
    let mut wrong = *ticket_of(&init).as_bytes();
    wrong[31] ^= 1;
    let refused = fetch(&bench.mallory, &init, Ticket::from_bytes(wrong), wanted(&init)).unwrap();
    assert!(refused.iter().all(|(_, r)| *r == Refusal::UnknownTicket) && !refused.is_empty());
    bench.table.row(step, "a ticket with one bit changed", format!("refused: {}", refused[0].1));
    let refused = fetch(&bench.victim, &init, ticket_of(&init), wanted(&init)).unwrap();
    assert!(refused.iter().all(|(_, r)| *r == Refusal::OutOfScope) && refused.len() == wanted(&init).len());
    bench.table.row(step, "another member with this one's ticket", format!("refused: {}", refused[0].1));
    bench.mallory.answer(asked, honest_staged(&init), Spoil::Nothing);
    completed(bench, moving, &vm);
    let refused = fetch(&bench.mallory, &init, ticket_of(&init), wanted(&init)).unwrap();
    assert!(refused.iter().all(|(_, r)| *r == Refusal::UnknownTicket) && !refused.is_empty());
    bench.table.row(step, "the ticket after the move has ended", format!("refused: {}", refused[0].1));
    bench.settled("what is not served");
}

fn honest_staged(init: &Initialization) -> AnswerBody {
    AnswerBody::Staged { pass: init.pass.number, account: StageAccount::default() }
}

fn hand_over_of(asked: &Asked) -> SignedHandOver {
    match &asked.envelope.body {
        RequestBody::Start { hand_over, .. } => hand_over.clone(),
        other => panic!("{other:?}"),
    }
}

/// From here on the VM is given up: only a receipt or a return ends it, and each only if it fits.
fn start_rows(bench: &mut Bench) {
    let step = "target: start";
    let vm = bench.new_vm();
    let (key, other) = (bench.mallory.key.clone(), IdentityKey::from_secret_bytes(&[9; 32]));
    let moving = bench.begin_move(&vm);
    let account = StageAccount::default;
    let tricks: Vec<(&str, Trick)> = vec![
        ("denies", Box::new(|_, _| AnswerBody::Denied(no("never heard of it")))),
        ("answers `cancelled`", Box::new(|_, _| AnswerBody::Cancelled { kept_s: 0 })),
        ("answers `staged`", Box::new(move |_, _| AnswerBody::Staged { pass: 1, account: account() })),
        (
            "a receipt signed by another key",
            Box::new({
                let other = other.clone();
                move |_, h| started(h.accept(&other))
            }),
        ),
        (
            "a receipt for another migration",
            Box::new(|p, _| {
                let matter = Matter::new(1);
                started(p.signed(matter).accept(&p.key))
            }),
        ),
        (
            "a receipt for a hand-over that it signed itself",
            Box::new(|p, h| started(h.verify().unwrap().sign(&p.key).accept(&p.key))),
        ),
        (
            "a return signed by another key",
            Box::new(move |_, h| AnswerBody::Returned { back: h.give_back(&other), denial: no("") }),
        ),
        (
            "a return of another hand-over",
            Box::new(|p, _| AnswerBody::Returned {
                back: p.signed(Matter::new(1)).give_back(&p.key),
                denial: no(""),
            }),
        ),
        (
            "a return whose signature is a receipt's",
            Box::new(|p, h| {
                let receipt = h.accept(&p.key);
                let text = serde_json::to_string(&receipt).unwrap();
                AnswerBody::Returned { back: serde_json::from_str(&text).unwrap(), denial: no("") }
            }),
        ),
    ];
    for (words, trick) in &tricks {
        let asked = until(bench, "start");
        let given = bench.world.vm(0, vm.name.as_str());
        assert!(
            given.ownership == cicada::interface::VmOwnership::GivenUp
                || given.ownership == cicada::interface::VmOwnership::InDoubt,
            "{words}: {}",
            given.ownership
        );
        let answer = trick(&bench.mallory, hand_over_of(&asked));
        bench.mallory.answer(asked, answer, Spoil::Nothing);
        bench.table.row(step, words, "proves nothing: asked again, the VM stays given up");
    }
    for (spoil, words) in [ANSWER_SPOILS[0], ANSWER_SPOILS[7], ANSWER_SPOILS[9]] {
        let asked = until(bench, "start");
        let answer = started(hand_over_of(&asked).accept(&key));
        bench.mallory.answer(asked, answer, spoil);
        bench.table.row(step, words, "not believed: asked again, the VM stays given up");
    }
    // It cannot be called off, nor started, nor deleted here.
    bench.cancel_all();
    let name = vm.name.to_string();
    for request in [
        Request::Vm(VmRequest::Start { vm: name.clone(), unconfirmed: false, by_uid: None }),
        Request::Vm(VmRequest::Delete { vm: name.clone(), taken_for: None }),
    ] {
        assert!(bench.world.call(0, &request).is_err(), "{request:?}");
    }
    // The return that fits: the VM is here again, under an epoch that the promise does not cover.
    let asked = until(bench, "start");
    let first = hand_over_of(&asked);
    let back = AnswerBody::Returned { back: first.clone().give_back(&key), denial: no("changed my mind") };
    bench.mallory.answer(asked, back, Spoil::Nothing);
    let did = failed(bench, moving, &vm, 3);
    bench.settled("a return");
    bench.table.row(step, "no answer that counts, then a return", did);

    // The receipt of the hand-over that was returned does not fit the next one.
    let moving = bench.begin_move(&vm);
    let asked = until(bench, "start");
    let second = hand_over_of(&asked);
    assert_eq!(second.verify().unwrap().epoch, 4);
    bench.mallory.answer(asked, started(first.clone().accept(&key)), Spoil::Nothing);
    bench.table.row(step, "after a return, the receipt of what was returned", "does not fit: asked again");
    let asked = until(bench, "start");
    let back = AnswerBody::Returned { back: first.give_back(&key), denial: no("") };
    bench.mallory.answer(asked, back, Spoil::Nothing);
    bench.table.row(step, "the return of an earlier hand-over", "does not fit: asked again");
    let asked = until(bench, "start");
    bench.mallory.answer(asked, started(second.clone().accept(&key)), Spoil::Nothing);
    completed(bench, moving, &vm);
    bench.settled("a receipt");
    // It has signed for the VM; that it also returns it changes nothing any more.
    let matter = Matter { migration: second.verify().unwrap().migration, vm: vm.id, epoch: 4 };
    let deleted = bench.mallory.ask(matter, RequestBody::Delete { boot_ms: None });
    assert!(matches!(deleted, AnswerBody::Deleted { .. }), "{deleted:?}");
    assert_eq!(bench.world.vm(0, vm.name.as_str()).ownership, cicada::interface::VmOwnership::GivenUp);
    assert!(
        bench
            .world
            .call(0, &Request::Vm(VmRequest::Start { vm: name, unconfirmed: false, by_uid: None }))
            .is_err()
    );
    bench.table.row(
        step,
        "a receipt, and then a return",
        "nobody asks for the return: the VM stays given up",
    );
}
