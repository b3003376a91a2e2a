//! Who owns a VM, among members that lie about it: one that never had it, one that gave it away, one
//! that came back from a backup.

use std::time::{Duration, Instant};

use cicada::interface::{Request, VmRequest};
use cicada::migration::envelope::VERSION_BEFORE;
use cicada::migration::handover::Provenance;
use cicada::migration::message::{Claim, Progress, StageAccount};
use cicada::migration::{AnswerBody, DenialCode, HandOver, Lineage, Link, Links, Receipt, RequestBody};
use cicada::stanza::Cloud;
use cicada::types::{IdentityKey, MigrationId, ReservationId, VmId};
use cicada::vm::PowerState;

use crate::Bench;
use crate::as_source::{delete_vm, denied, init};
use crate::as_target::honest;
use crate::peer::{Matter, Peer, Spoil};

/// What a source shows before it hands over; nothing if it speaks the version before, which has no history.
type Shown = Option<Lineage>;

pub fn rows(bench: &mut Bench) {
    let (vm, history) = owned_by_the_peer(bench);
    never_had_it(bench, vm, &history);
    let history = home_and_away(bench, vm, history);
    replays_and_forks(bench, vm, &history);
    gave_it_and_withdraws(bench, vm, history);
    claims_what_it_gave(bench);
    holds_a_guest(bench);
}

/// A VM of the real cloud that went to the peer, and its history as both know it.
fn owned_by_the_peer(bench: &mut Bench) -> (VmId, Lineage) {
    let cloud = Cloud { versions: "2,1".into(), region: Some("version-2".into()), ..bench.mallory.cloud() };
    bench.mallory.show(cloud);
    bench.world.wait("the peer is known to speak version 2", 30, |w| {
        w.members(0).iter().any(|m| *m.region == *"version-2")
    });
    let vm = bench.new_vm();
    let receipt = give_away(bench, vm.name.as_str());
    (vm.id, Lineage::verify(vm.id, vec![receipt.into()]).unwrap())
}

/// Moves a VM of the real cloud to the peer, honestly.
fn give_away(bench: &Bench, name: &str) -> Receipt {
    let peer = &bench.mallory;
    let vm = bench.world.vm(0, name);
    let moving = bench.begin_move(&vm);
    let (begun, mut receipt) = (Instant::now(), None);
    while !moving.ended() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the move does not end\n{}", bench.world.log(0));
        let Some(asked) = peer.asked(Duration::from_millis(200)) else { continue };
        let answer = match &asked.envelope.body {
            RequestBody::Reservation { .. } => AnswerBody::Reserved {
                expires_in_s: 60,
                reservation: Some(ReservationId::random()),
                known: None,
            },
            RequestBody::Lineage { at, links, .. } => {
                AnswerBody::Lineage { links: at + links.0.len() as u32 }
            }
            RequestBody::Start { hand_over, .. } => {
                let given = receipt.insert(hand_over.clone().accept(&peer.key)).clone();
                let account = StageAccount::default();
                AnswerBody::Started { receipt: given, running: false, problem: None, account }
            }
            other => honest(peer, other),
        };
        peer.answer(asked, answer, Spoil::Nothing);
    }
    let moved = moving.outcome();
    assert!(moved.is_ok(), "{moved:?}\n{}", bench.world.log(0));
    receipt.expect("it was handed over")
}

/// Everything up to the hand-over that was agreed on, or the denial that came before.
fn bring(peer: &Peer, matter: Matter, shown: &Shown) -> Result<HandOver, (DenialCode, String)> {
    let reservation = match shown {
        Some(_) => peer.ask(matter, peer.reservation(matter)),
        None => peer.ask_in(VERSION_BEFORE, matter, peer.reservation(matter)),
    };
    let AnswerBody::Reserved { reservation, known, .. } = reservation else {
        return Err(denied(&reservation));
    };
    let hand_over = peer.hand_over(matter);
    let Some(lineage) = shown else { return Ok(hand_over) };
    let after = known.filter(|tip| lineage.position(tip).is_some());
    let links = lineage.since(after.as_ref()).to_vec();
    let page = RequestBody::Lineage {
        at: 0,
        total: links.len() as u32,
        after,
        links: Links(links),
        successions: lineage.successions().clone(),
    };
    let answer = peer.ask_through(matter, page);
    if !matches!(answer, AnswerBody::Lineage { .. }) {
        return Err(denied(&answer));
    }
    let staged = peer.ask_through(matter, init(peer.initialization(matter)));
    assert!(matches!(staged, AnswerBody::Staged { .. }), "{staged:?}");
    let provenance = Provenance { origin: lineage.origin(), reservation: reservation.expect("of version 2") };
    Ok(HandOver { provenance: Some(provenance), ..hand_over })
}

/// Brings a VM to the real cloud, as whoever owns it may.
fn comes_home(bench: &Bench, peer: &Peer, vm: VmId, history: &Lineage) -> (Matter, Lineage) {
    let matter = Matter { migration: MigrationId::random(), vm, epoch: history.next_epoch() - 1 };
    peer.drain();
    let hand_over = bring(peer, matter, &Some(history.clone())).expect("the owner is believed");
    let start = RequestBody::Start { hand_over: hand_over.sign(&peer.key), run: false };
    let answer = peer.ask_through(matter, start);
    let AnswerBody::Started { receipt, .. } = answer else { panic!("{answer:?}") };
    let mut deleting = std::iter::from_fn(|| peer.asked(Duration::from_secs(30)));
    let asked = deleting.find(|a| a.verb() == "delete").expect("it says that the VM is its own");
    peer.answer(asked, AnswerBody::Deleted { grace_s: 0 }, Spoil::Nothing);
    let mut history = history.clone();
    history.push(receipt.into()).unwrap();
    bench.world.wait("it knows that its receipt arrived", 30, |w| {
        w.vm(0, &vm.to_string()).ownership == cicada::interface::VmOwnership::Here
    });
    (matter, history)
}

/// The VM is still whose it was, and its copy here as well.
fn untouched(bench: &Bench, vm: VmId, owner: &Peer, disks: &[u8]) {
    let shown = bench.world.vm(0, &vm.to_string());
    assert_eq!((shown.ownership.as_str(), shown.owner.as_ref()), ("given-up", Some(&owner.jid)));
    assert!(copy_of(bench, vm) == disks, "the kept copy changed");
}

/// The bytes of the copy that is kept.
fn copy_of(bench: &Bench, vm: VmId) -> Vec<u8> {
    let root = bench.world.clouds[0].dir.join("data/vms").join(vm.to_string());
    let mut files: Vec<_> = walk(&root).into_iter().filter(|p| !p.ends_with("record.json")).collect();
    files.sort();
    files.iter().flat_map(|path| std::fs::read(path).unwrap()).collect()
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().flatten().map(|e| e.path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

/// It is refused, counted, and nothing changed.
fn refused(bench: &mut Bench, words: &str, tried: Result<HandOver, (DenialCode, String)>) {
    let (code, text) = tried.expect_err(words);
    assert_eq!(code, DenialCode::HandOver, "{words}: {text}");
    bench.refused_for("stale-epoch");
    bench.table.row("source: ownership", words, text);
}

fn never_had_it(bench: &mut Bench, vm: VmId, history: &Lineage) {
    let copy = copy_of(bench, vm);
    let born = |epoch| Matter { migration: MigrationId::random(), vm, epoch };
    let friend = IdentityKey::from_secret_bytes(&[77; 32]);
    let forged = forged_history(vm, &friend, &bench.victim);
    let tries = [
        ("claims to have made a VM that went to another", born(1), Some(Lineage::empty(vm))),
        ("the same under epoch 1,000,001", born(1_000_000), Some(Lineage::empty(vm))),
        ("in the version before, which shows no history", born(1_000_000), None),
        ("with a history that a friend signed", born(2), Some(forged)),
        ("with the owner's history, as if it were the owner", born(2), Some(history.clone())),
    ];
    for (words, matter, shown) in tries {
        let tried = bring(&bench.victim, matter, &shown);
        bench.victim.ask(matter, RequestBody::Cancel { reason: "".into() });
        refused(bench, words, tried);
        untouched(bench, vm, &bench.mallory, &copy);
        bench.settled(words);
    }
    // Signed and sent out of nowhere.
    for n in 0..20 {
        let matter = born(1_000_000 + n);
        let hand_over = HandOver {
            provenance: Some(Provenance {
                origin: Lineage::empty(vm).origin(),
                reservation: ReservationId::random(),
            }),
            ..bench.victim.hand_over(matter)
        };
        let start = RequestBody::Start { hand_over: hand_over.sign(&bench.victim.key), run: true };
        let answer = bench.victim.ask(matter, start);
        assert!(matches!(answer, AnswerBody::Returned { .. }), "{answer:?}");
    }
    untouched(bench, vm, &bench.mallory, &copy);
    let words = "hands over out of nowhere what it never had, 20 times";
    bench.table.row("source: ownership", words, "returned; the VM stays its owner's, the copy is kept");
}

/// A history of one link that leads from a friend to the peer.
fn forged_history(vm: VmId, friend: &IdentityKey, peer: &Peer) -> Lineage {
    let provenance = Provenance { origin: Lineage::empty(vm).origin(), reservation: ReservationId::random() };
    let matter = Matter { migration: MigrationId::random(), vm, epoch: 1 };
    let hand_over = HandOver {
        source: "friend@federation.test".parse().unwrap(),
        source_key: friend.public(),
        target: peer.jid.clone(),
        target_key: peer.key.public(),
        provenance: Some(provenance),
        ..peer.hand_over(matter)
    };
    let receipt = hand_over.sign(friend).accept(&peer.key);
    Lineage::verify(vm, vec![receipt.into()]).unwrap()
}

/// Home, and away again: three links.
fn home_and_away(bench: &Bench, vm: VmId, history: Lineage) -> Lineage {
    let (_, mut history) = comes_home(bench, &bench.mallory, vm, &history);
    let name = bench.world.vm(0, &vm.to_string()).name.to_string();
    history.push(give_away(bench, &name).into()).unwrap();
    history
}

fn replays_and_forks(bench: &mut Bench, vm: VmId, history: &Lineage) {
    let copy = copy_of(bench, vm);
    let links = history.links();
    let old = Lineage::verify(vm, links[..1].to_vec()).unwrap();
    // The former owner goes on from there, to a friend of its own.
    let matter = Matter { migration: MigrationId::random(), vm, epoch: 2 };
    let hand_over = HandOver {
        target: bench.victim.jid.clone(),
        target_key: bench.victim.key.public(),
        provenance: Some(Provenance { origin: old.origin(), reservation: ReservationId::random() }),
        ..bench.mallory.hand_over(matter)
    };
    let receipt = hand_over.sign(&bench.mallory.key).accept(&bench.victim.key);
    let mut fork = old.clone();
    fork.push(Link::from(receipt)).unwrap();
    let again = |epoch| Matter { migration: MigrationId::random(), vm, epoch };
    // Each under the epoch that follows from what is shown, and under the one that is due.
    let (replayed, due) = ("a former owner replays the receipt by which it once was the owner", 4);
    let forked = "a chain that forks from an old link";
    for (words, peer, epoch, shown) in [
        (replayed, 0, 2, &old),
        ("the same under the epoch that is due", 0, due, &old),
        (forked, 1, 3, &fork),
        ("the same under the epoch that is due", 1, due, &fork),
    ] {
        let peer = [&bench.mallory, &bench.victim][peer];
        let tried = bring(peer, again(epoch), &Some(shown.clone()));
        refused(bench, words, tried);
        untouched(bench, vm, &bench.mallory, &copy);
    }
    bench.settled("a fork");
}

fn gave_it_and_withdraws(bench: &mut Bench, vm: VmId, history: Lineage) {
    let (matter, history) = comes_home(bench, &bench.mallory, vm, &history);
    let hand_over = history.links().last().expect("it has links").hand_over.clone();
    for _ in 0..100 {
        bench.mallory.ask(matter, RequestBody::Withdraw { hand_over: hand_over.clone() });
    }
    assert_eq!(bench.world.vm(0, &vm.to_string()).ownership, cicada::interface::VmOwnership::Here);
    let started = bench
        .world
        .call(0, &Request::Vm(VmRequest::Start { vm: vm.to_string(), unconfirmed: false, by_uid: None }));
    assert!(started.is_ok(), "{started:?}");
    bench
        .world
        .call(
            0,
            &Request::Vm(VmRequest::Stop {
                vm: vm.to_string(),
                force: true,
                timeout_s: Some(20),
                for_host: false,
            }),
        )
        .unwrap();
    delete_vm(bench, matter);
    bench.settled("withdrawals without end");
    bench.table.row(
        "source: ownership",
        "withdraws 100 times what it handed over, after the receipt was acknowledged",
        "the VM stays, uncontested, and starts",
    );
}

/// A cloud that came back from a backup runs what it gave away; a stranger says that it does.
fn claims_what_it_gave(bench: &mut Bench) {
    let (vm, history) = owned_by_the_peer(bench);
    let (matter, _) = comes_home(bench, &bench.mallory, vm, &history);
    let nobody = Matter { migration: MigrationId::random(), vm: VmId(uuid::Uuid::nil()), epoch: 0 };
    let tip = history.tip().map(|tip| tip.id);
    let claim = |running| RequestBody::Owners { claims: vec![Claim { vm, tip, epoch: 2, running }] };
    let is = |bench: &Bench, ownership: &'static str| {
        let vm = vm.to_string();
        bench.world.wait(ownership, 20, |w| w.vm(0, &vm).ownership.as_str() == ownership);
    };
    let answer = bench.victim.ask(nobody, claim(true));
    assert!(matches!(answer, AnswerBody::Owners { .. }), "{answer:?}");
    is(bench, "here");
    bench.table.row("owners", "claims to run a VM that it never had", "nothing is contested");
    let answer = bench.mallory.ask(nobody, claim(true));
    let AnswerBody::Owners { known } = answer else { panic!("{answer:?}") };
    assert_eq!((known.len(), known[0].links.0.len()), (1, 1), "it is shown what it lost");
    is(bench, "contested");
    let words = "restored from a backup, runs a VM that it gave away";
    bench.table.row("owners", words, "it is shown the receipt, and the VM is contested here");
    bench.mallory.ask(nobody, claim(false));
    is(bench, "here");
    bench.table.row("owners", "stops it", "the VM is the broker's again");
    delete_vm(bench, matter);
    bench.settled("what was given away");
}

/// A target that asks for the guest to be held, again and again.
fn holds_a_guest(bench: &mut Bench) {
    let vm = bench.new_vm();
    let name = vm.name.to_string();
    let start = Request::Vm(VmRequest::Start { vm: name.clone(), unconfirmed: false, by_uid: None });
    bench.world.call(0, &start).unwrap();
    let moving = bench.begin_move(&vm);
    let peer = &bench.mallory;
    let asked = crate::as_target::until(bench, "initialization");
    let matter = Matter { migration: asked.envelope.migration, vm: vm.id, epoch: asked.envelope.epoch };
    peer.answer(asked, AnswerBody::Working(Progress::default()), Spoil::Nothing);
    let (begun, mut paused, mut refused) = (Instant::now(), Duration::ZERO, None);
    let mut last = begun;
    while begun.elapsed() < Duration::from_secs(15) && refused.is_none() {
        let answer = peer.ask(matter, RequestBody::Suspend);
        if let AnswerBody::Denied(denial) = &answer {
            refused = Some(denial.text.to_string());
        }
        if let Some(asked) = peer.asked(Duration::from_millis(100)) {
            peer.answer(asked, AnswerBody::Working(Progress::default()), Spoil::Nothing);
        }
        if bench.world.vm(0, &name).power == PowerState::Paused {
            paused += last.elapsed();
        }
        last = Instant::now();
    }
    let refused = refused.expect("a hold does not last for ever");
    assert!(paused > Duration::ZERO && paused < Duration::from_secs(8), "{paused:?}");
    bench.world.wait("the guest goes on", 20, |w| w.vm(0, &name).power == PowerState::Running);
    bench.cancel_all();
    assert!(moving.outcome().is_err());
    bench
        .world
        .call(
            0,
            &Request::Vm(VmRequest::Stop { vm: name, force: true, timeout_s: Some(20), for_host: false }),
        )
        .unwrap();
    delete_vm(bench, Matter { vm: vm.id, ..matter });
    bench.settled("a guest that is held");
    let did = format!("it goes on after one lease; then: {refused}");
    bench.table.row("target: suspend", "holds the guest, again and again", did);
}
