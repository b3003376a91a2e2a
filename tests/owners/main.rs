//! Who owns a VM, among liars and restored backups: one real broker with its records on disk, and members
//! that are scripts. Messages, signatures and histories are real.

mod home;

use std::time::{Duration, Instant};

use cicada::interface::{Request, VmRequest};
use cicada::migration::envelope::{VERSION, VERSION_BEFORE};
use cicada::migration::message::{Claim, Known};
use cicada::migration::{AnswerBody, DenialCode, Lineage, Links, RequestBody};
use cicada::types::{MigrationId, VmId};

use home::{Home, SOON, Way, hand_over, jid, spec};

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
    // Asked as soon as they are seen, and not again while the clock stands.
    *home.script.known.lock().unwrap() = Some(Vec::new());
    ["a", "b"].iter().for_each(|name| home.sees(name));
    home.until(1, |vm| vm.ownership == cicada::interface::VmOwnership::GivenUp).await;
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
        let hand_over = hand_over("b", id, spec(n + 10).id, 1_000_001, VERSION);
        let body = RequestBody::Start { hand_over, run: true };
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
        let hand_over = hand_over("b", id, spec(n + 10).id, 7, VERSION_BEFORE);
        let body = RequestBody::Start { hand_over, run: true };
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
    assert_eq!(vm.ownership, cicada::interface::VmOwnership::Here);
    assert!(vm.problem.as_ref().unwrap().reason.contains("a@federation.test"), "{:?}", vm.problem);
    let start = |by_word: bool| {
        Request::Vm(VmRequest::Start { vm: "vm-1".into(), unconfirmed: by_word, by_uid: Some(1) })
    };
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
    let vm = home.until(1, |vm| vm.ownership == cicada::interface::VmOwnership::GivenUp).await;
    assert_eq!((vm.owner, vm.epoch), (Some(jid("a")), 1));
    assert!(home.call(start(true)).await.is_err(), "no word helps against the proof");
}

/// An operator may take the risk, and that is recorded.
#[tokio::test(flavor = "multi_thread")]
async fn an_operators_word_is_recorded() {
    let way = Way::born(1, "home");
    let home = Home::start(&[&way], true, true).await;
    let request = Request::Vm(VmRequest::Start { vm: "vm-1".into(), unconfirmed: true, by_uid: Some(7) });
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
    assert_eq!(home.vm(1).await.ownership, cicada::interface::VmOwnership::Here);
    let AnswerBody::Owners { known } = home.ask("b", VERSION, nobody, claim(true)).await else { panic!() };
    assert_eq!(known[0].links.0, way.history.links(), "it is shown why");
    let vm = home.until(1, |vm| vm.ownership == cicada::interface::VmOwnership::Contested).await;
    assert!(vm.problem.unwrap().reason.contains("b@federation.test"));
    home.ask("b", VERSION, nobody, claim(false)).await;
    home.until(1, |vm| vm.ownership == cicada::interface::VmOwnership::Here).await;
}
