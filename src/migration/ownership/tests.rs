//! Each rule by itself: what it refuses, and that without it the refusal is gone.

use super::*;
use crate::migration::message::Seed;
use crate::types::IdentityKey;
use crate::types::{ByteSize, RecipeId, VmId};
use crate::vm::{Firmware, MapRef};

const NOW: UnixMillis = UnixMillis(1_000_000);
const LATER: UnixMillis = UnixMillis(2_000_000);

fn key(n: u8) -> IdentityKey {
    IdentityKey::from_secret_bytes(&[n; 32])
}

fn jid(n: u8) -> MemberJid {
    format!("c{n}@x").parse().unwrap()
}

fn spec() -> VmSpec {
    VmSpec {
        id: VmId(uuid::Uuid::from_u128(5)),
        name: "web".parse().unwrap(),
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

fn seed() -> Seed {
    let map = MapRef { block_size_bytes: 4096, disk_size_bytes: 1 << 20, root: None };
    Seed { root_delta: map, user_data: map }
}

/// One cloud's whole knowledge of the VM.
#[derive(Clone, Debug)]
struct Cloud {
    n: u8,
    record: Option<VmRecord>,
    known: Lineage,
}

/// Taken over or not, and by what the source would then have to go on.
type Moved = Result<(SignedHandOver, Receipt), Refusal>;

impl Cloud {
    fn new(n: u8) -> Self {
        Self { n, record: None, known: Lineage::empty(spec().id) }
    }

    /// Where the VM was made.
    fn born(n: u8) -> Self {
        Self { record: Some(VmRecord::new(spec(), Vec::new(), "disks-1", NOW)), ..Self::new(n) }
    }

    fn standing(&self) -> Standing<'_> {
        Standing { record: self.record.as_ref(), known: &self.known, damaged: false }
    }

    fn history(&self) -> Lineage {
        Law::WHOLE.known(self.known.clone(), self.record.as_ref())
    }

    fn record(&self) -> &VmRecord {
        self.record.as_ref().unwrap()
    }

    fn gift(&self, to: u8, reservation: Option<ReservationId>) -> Gift {
        Gift {
            migration: MigrationId::random(),
            source: jid(self.n),
            source_key: key(self.n).public(),
            target: jid(to),
            target_key: key(to).public(),
            reservation,
            seed: seed(),
            to_run: false,
            now: NOW,
        }
    }

    fn gives(
        &mut self,
        law: Law,
        to: u8,
        reservation: Option<ReservationId>,
    ) -> Result<SignedHandOver, Refusal> {
        let (record, h) = law.give_up(self.record(), &self.history(), self.gift(to, reservation))?;
        self.record = Some(record);
        Ok(h.sign(&key(self.n)))
    }

    fn takes(
        &mut self,
        law: Law,
        given: Given<'_>,
        offered: Option<&Lineage>,
        signed: SignedHandOver,
        reservation: ReservationId,
    ) -> Result<Receipt, Refusal> {
        self.known = self.history();
        let guest = Guest {
            spec: spec(),
            components: Vec::new(),
            disks: format!("disks-{}", uuid::Uuid::new_v4()),
            run: true,
            reservation,
            now: NOW,
            grace: Duration::from_secs(1000),
        };
        let (record, lineage) =
            law.take_over(self.standing(), given, offered, signed, &key(self.n), guest)?;
        self.known = lineage;
        self.record = Some(record);
        Ok(self.record().arrival.as_ref().unwrap().receipt.clone())
    }
}

/// A whole move; `version` 1 shows no history.
fn moves(law: Law, version: u32, from: &mut Cloud, to: &mut Cloud) -> Moved {
    let reservation = ReservationId::random();
    let offered = from.history();
    let signed = from.gives(law, to.n, (version > 1).then_some(reservation))?;
    let offered = Some(&offered).filter(|_| version > 1);
    let receipt = to.takes(law, Given::default(), offered, signed.clone(), reservation)?;
    from.record = Some(law.release(from.record(), receipt.clone(), LATER)?);
    Ok((signed, receipt))
}

fn moved(from: &mut Cloud, to: &mut Cloud) -> (SignedHandOver, Receipt) {
    moves(Law::WHOLE, 2, from, to).unwrap()
}

/// What the pure rules let through, and stop.
fn without(rule: Rule) -> Law {
    Law::without(rule)
}

#[test]
fn a_vm_goes_round_and_its_history_is_whole() {
    let (mut a, mut b, mut c) = (Cloud::born(1), Cloud::new(2), Cloud::new(3));
    for round in 0..3 {
        moved(&mut a, &mut b);
        moved(&mut b, &mut c);
        moved(&mut c, &mut a);
        let history = a.history();
        assert_eq!(history.links().len(), 3 * (round + 1));
        assert!(history.is_from_birth());
        assert_eq!((a.record().epoch, history.next_epoch()), (3 * round as u64 + 4, 3 * round as u64 + 5));
        let bytes = history.encode();
        assert_eq!(Lineage::reopen(spec().id, &bytes).unwrap(), history);
        assert_eq!(Lineage::verify(spec().id, history.links().to_vec()).unwrap(), history);
    }
}

/// The shown attack: a member that never had the VM hands it over under an epoch of its choice.
#[test]
fn who_never_had_a_vm_is_not_believed_by_who_knows_it() {
    let (mut a, mut b) = (Cloud::born(1), Cloud::new(2));
    moved(&mut a, &mut b);
    // `a` holds b's receipt. The liar claims to have made the VM itself, or to have got it from a friend.
    for version in [1, 2] {
        let mut liar = Cloud::born(9);
        let refusal = moves(Law::WHOLE, version, &mut liar, &mut a.clone()).unwrap_err();
        assert!(refusal.is_false_claim(), "{refusal:?}");
        let mut victim = a.clone();
        // Without the rule it is believed; without a history the key is looked at once more.
        let believed = moves(without(Rule::HistoryGoesOn), version, &mut Cloud::born(9), &mut victim).is_ok();
        assert_eq!(believed, version == 2);
        let (mut friend, mut liar) = (Cloud::born(8), Cloud::new(9));
        moves(Law::WHOLE, version, &mut friend, &mut liar).unwrap();
        assert!(moves(Law::WHOLE, 2, &mut liar, &mut a.clone()).unwrap_err().is_false_claim());
    }
    // The true owner still can send it home.
    moved(&mut b, &mut a);
    assert!(a.record().is_here());
}

#[test]
fn an_epoch_is_never_free() {
    let (mut a, mut b) = (Cloud::born(1), Cloud::new(2));
    moved(&mut a, &mut b);
    for epoch in [0, 1, 2, 4, 1_000_001, EPOCH_MAX] {
        let reservation = ReservationId::random();
        let (_, mut h) = Law::WHOLE.give_up(b.record(), &b.history(), b.gift(3, Some(reservation))).unwrap();
        h.epoch = epoch;
        let take = |law: Law| {
            let signed = h.clone().sign(&key(2));
            Cloud::new(3).takes(law, Given::default(), Some(&b.history()), signed, reservation)
        };
        assert!(matches!(take(Law::WHOLE), Err(Refusal::HandOver(LineageError::Epoch { .. }))), "{epoch}");
        assert!(take(without(Rule::HandOverGoesOn)).is_ok(), "{epoch}");
    }
}

#[test]
fn a_former_owner_gives_nothing_away_twice() {
    let (mut a, mut b, mut c) = (Cloud::born(1), Cloud::new(2), Cloud::new(3));
    let before = a.clone();
    moved(&mut a, &mut b);
    assert_eq!(moves(Law::WHOLE, 2, &mut a, &mut c), Err(Refusal::NotHere));
    // From a backup it can sign again; whoever saw the later link does not believe it.
    let mut restored = before;
    assert!(moves(Law::WHOLE, 2, &mut restored.clone(), &mut b.clone()).is_err());
    moved(&mut b, &mut c);
    let mut away = Cloud { record: None, ..c.clone() };
    away.known = c.history();
    let refusal = moves(Law::WHOLE, 2, &mut restored, &mut away).unwrap_err();
    assert!(matches!(refusal, Refusal::Forked { epoch: 3, .. }), "{refusal:?}");
}

#[test]
fn old_receipts_replayed_lead_nowhere() {
    let (mut a, mut b, mut c) = (Cloud::born(1), Cloud::new(2), Cloud::new(3));
    moved(&mut a, &mut b);
    let old = b.history();
    moved(&mut b, &mut a);
    moved(&mut a, &mut c);
    moved(&mut c, &mut a);
    // b shows the history as it was when it owned the VM, and hands over by it.
    let mut liar = Cloud { n: 2, record: None, known: old.clone() };
    liar.record =
        Some(VmRecord { epoch: 2, origin: Some(old.origin()), ..VmRecord::new(spec(), vec![], "d", NOW) });
    let mut away = Cloud { record: None, known: a.history(), ..a.clone() };
    assert!(matches!(moves(Law::WHOLE, 2, &mut liar, &mut away), Err(Refusal::Forked { .. })));
    // A history whose links are out of order, left out, or another VM's is none.
    let links = a.history().links().to_vec();
    for at in 0..links.len() - 1 {
        let mut cut = links.clone();
        cut.remove(at);
        assert!(Lineage::verify(spec().id, cut).is_err(), "{at}");
        let mut swapped = links.clone();
        swapped.swap(at, at + 1);
        assert!(Lineage::verify(spec().id, swapped).is_err(), "{at}");
        let mut turned = links.clone();
        turned[at].kind = LinkKind::Return;
        assert!(Lineage::verify(spec().id, turned).is_err(), "{at}");
    }
    assert!(Lineage::verify(VmId::random(), links).is_err());
}

#[test]
fn clouds_of_the_version_before_keep_no_history_and_are_believed_along_the_way() {
    let (mut a, mut b, mut c) = (Cloud::born(1), Cloud::new(2), Cloud::new(3));
    // a -> b by version 1; b forgets how it came, as that version does, and hands on to c by version 1.
    moves(Law::WHOLE, 1, &mut a, &mut b).unwrap();
    b.known = Lineage::empty(spec().id);
    let mut old = b.record().clone();
    (old.arrival, old.origin) = (None, Some(Origin::Born));
    b.record = Some(old);
    // Straight home from the key it went to.
    let mut home = a.clone();
    let (_, mut h) = Law::WHOLE.give_up(b.record(), &b.known, b.gift(1, None)).unwrap();
    h.epoch = 3;
    let signed = h.clone().sign(&key(2));
    home.takes(Law::WHOLE, Given::default(), None, signed, ReservationId::random()).unwrap();
    // Home by way of c, which shows the receipt that leads from there.
    let (_, mut h) = Law::WHOLE.give_up(b.record(), &b.known, b.gift(3, None)).unwrap();
    h.epoch = 3;
    c.takes(Law::WHOLE, Given::default(), None, h.sign(&key(2)), ReservationId::random()).unwrap();
    assert!(!c.history().is_from_birth());
    moved(&mut c, &mut a.clone());
    // Anybody else without a history is refused, and with one that leads from elsewhere too.
    let refusal = moves(Law::WHOLE, 1, &mut Cloud::born(9), &mut a.clone()).unwrap_err();
    assert!(matches!(refusal, Refusal::Unproven { .. }), "{refusal:?}");
}

#[test]
fn a_return_brings_it_back_and_the_history_goes_on_over_it() {
    let (mut a, mut b) = (Cloud::born(1), Cloud::new(2));
    let signed = a.gives(Law::WHOLE, 2, Some(ReservationId::random())).unwrap();
    let other =
        Cloud::born(1).gives(Law::WHOLE, 3, Some(ReservationId::random())).unwrap().give_back(&key(3));
    assert_eq!(Law::WHOLE.take_back(a.record(), &a.known, &other), Err(Refusal::OtherHandOver));
    assert!(without(Rule::ReturnFits).take_back(a.record(), &a.known, &other).is_ok());
    let back = signed.give_back(&key(2));
    for _ in 0..2 {
        // Again after a crash between the history and the record.
        let (record, known) = Law::WHOLE.take_back(a.record(), &a.known, &back).unwrap();
        a.known = known;
        assert!(record.is_here());
        assert_eq!((record.epoch, record.origin), (3, Some(a.known.origin())));
    }
    let (record, _) = Law::WHOLE.take_back(a.record(), &a.known, &back).unwrap();
    a.record = Some(record);
    moved(&mut a, &mut b);
    assert_eq!(b.record().epoch, 4);
    assert_eq!(b.history().links().len(), 2);
}

#[test]
fn an_operators_word_is_believed_only_by_who_knows_no_better() {
    let (mut a, mut b) = (Cloud::born(1), Cloud::new(2));
    let reservation = ReservationId::random();
    let offered = a.history();
    let signed = a.gives(Law::WHOLE, 2, Some(reservation)).unwrap();
    let receipt = b.takes(Law::WHOLE, Given::default(), Some(&offered), signed.clone(), reservation).unwrap();
    // The receipt never comes, and a's operator takes the VM back.
    let given = a.record().given_up().unwrap().clone();
    let (record, known) = Law::WHOLE.take_back_by_word(a.record(), &a.known, &key(1)).unwrap();
    (a.record, a.known) = (Some(record), known);
    assert!(!a.record().run && a.record().taken_back == Some(given.migration));
    let mut c = Cloud::new(3);
    moved(&mut a.clone(), &mut c);
    let mut away = Cloud { record: None, known: b.history(), ..b.clone() };
    assert!(moves(Law::WHOLE, 2, &mut a.clone(), &mut away).unwrap_err().is_false_claim());
    // Contested, then settled in the target's favour: the history is the target's again.
    let contested = Law::WHOLE.contest(a.record(), given.migration, NOW).unwrap();
    let gives =
        |law: Law| law.give_up(&contested, &a.known, a.gift(3, Some(ReservationId::random()))).map(drop);
    assert!(matches!(gives(Law::WHOLE), Err(Refusal::Contested(_))));
    assert_eq!(gives(without(Rule::OwnerGivesUp)), Ok(()));
    assert!(Law::WHOLE.may_run(&contested, true).is_err());
    let (record, known) =
        Law::WHOLE.yield_to_target(&contested, &a.known, given.clone(), Some(receipt), LATER).unwrap();
    assert!(!record.is_here() && known == b.history());
    (a.record, a.known) = (Some(record), known);
    moved(&mut b, &mut a);
    // Or it was returned after all: the return takes the word's place.
    let mut a = Cloud::born(1);
    let signed = a.gives(Law::WHOLE, 2, Some(ReservationId::random())).unwrap();
    let (record, known) = Law::WHOLE.take_back_by_word(a.record(), &a.known, &key(1)).unwrap();
    let back = signed.give_back(&key(2));
    let (record, known) = Law::WHOLE.confirm_back(&record, &known, &back).unwrap().unwrap();
    assert_eq!(known.links()[0].kind, LinkKind::Return);
    assert_eq!(record.origin, Some(known.origin()));
}

#[test]
fn what_cannot_be_taken_over_is_refused_each_for_its_reason() {
    let (mut a, b) = (Cloud::born(1), Cloud::new(2));
    let (offered, reservation) = (a.history(), ReservationId::random());
    let signed = a.gives(Law::WHOLE, 2, Some(reservation)).unwrap();
    let receipt = signed.clone().accept(&key(2));
    let take = |law: Law, cloud: &Cloud, given: Given<'_>, reservation| {
        cloud.clone().takes(law, given, Some(&offered), signed.clone(), reservation).map(drop)
    };
    let cases = [
        (Rule::PromiseBinds, Given { promised: true, receipt: None }, reservation, Refusal::Promised(2)),
        (
            Rule::TakenOnce,
            Given { promised: false, receipt: Some(&receipt) },
            reservation,
            Refusal::TakenBefore,
        ),
        (Rule::OwnReservation, Given::default(), ReservationId::random(), Refusal::OtherReservation),
    ];
    for (rule, given, reservation, refusal) in cases {
        assert_eq!(take(Law::WHOLE, &b, given, reservation), Err(refusal));
        assert_eq!(take(without(rule), &b, given, reservation), Ok(()), "{rule:?}");
    }
    let here = Cloud::born(2);
    assert_eq!(take(Law::WHOLE, &here, Given::default(), reservation), Err(Refusal::AlreadyHere));
    assert_eq!(take(without(Rule::NotTwice), &here, Given::default(), reservation), Ok(()));
    let damaged = Standing { record: None, known: &b.known, damaged: true };
    assert_eq!(Law::WHOLE.may_arrive(damaged), Err(Refusal::Damaged));
    // In doubt: its own hand-over is without an answer.
    let mut doubtful = Cloud::born(2);
    doubtful.gives(Law::WHOLE, 3, Some(ReservationId::random())).unwrap();
    assert_eq!(Law::WHOLE.may_arrive(doubtful.standing()), Err(Refusal::InDoubt));
    assert_eq!(without(Rule::NotWhileInDoubt).may_arrive(doubtful.standing()), Ok(()));
}

#[test]
fn the_copy_is_kept_for_its_grace_period_whoever_hands_over() {
    let (mut a, mut b) = (Cloud::born(1), Cloud::new(2));
    moved(&mut a, &mut b);
    moved(&mut b, &mut a);
    let record = a.record();
    assert_eq!(record.kept, [KeptCopy { disks: "disks-1".into(), scrub_after: LATER }]);
    assert_eq!(Law::WHOLE.due(record, NOW), None);
    let (over, after) = Law::WHOLE.due(record, LATER).unwrap();
    assert_eq!((over, after.kept.len()), (vec!["disks-1".to_owned()], 0));
    let mut gone = Cloud::born(1);
    let mut b = Cloud::new(2);
    moved(&mut gone, &mut b);
    moves(without(Rule::CopyIsKept), 2, &mut b, &mut gone).unwrap();
    assert!(gone.record().kept.is_empty());
    // Not without bound.
    let (mut a, mut b) = (Cloud::born(1), Cloud::new(2));
    for _ in 0..KEPT_COPIES_MAX {
        moved(&mut a, &mut b);
        moved(&mut b, &mut a);
    }
    moved(&mut a, &mut b);
    assert_eq!(moves(Law::WHOLE, 2, &mut b, &mut a), Err(Refusal::CopiesKept(KEPT_COPIES_MAX)));
}

#[test]
fn a_withdrawal_contests_only_what_is_not_acknowledged() {
    let (mut a, mut b) = (Cloud::born(1), Cloud::new(2));
    let (signed, _) = moved(&mut a, &mut b);
    let migration = signed.read().unwrap().migration;
    let contested = Law::WHOLE.withdrawn(b.record(), migration, NOW).unwrap();
    assert!(Law::WHOLE.may_run(&contested, true).is_err());
    let settled = Law::WHOLE.uncontested(&contested).unwrap();
    Law::WHOLE.may_run(&settled, true).unwrap();
    let acknowledged = Law::WHOLE.acknowledge(b.record(), migration).unwrap();
    assert_eq!(Law::WHOLE.withdrawn(&acknowledged, migration, NOW), None);
    assert!(without(Rule::AcknowledgedIsFinal).withdrawn(&acknowledged, migration, NOW).is_some());
    assert_eq!(Law::WHOLE.withdrawn(b.record(), MigrationId::random(), NOW), None);
}

#[test]
fn what_became_of_a_hand_over_is_told_from_what_was_recorded() {
    let (mut a, mut b) = (Cloud::born(1), Cloud::new(2));
    let (signed, receipt) = moved(&mut a, &mut b);
    let h = signed.read().unwrap();
    let became =
        |law: Law, cloud: &Cloud, given: Given<'_>| law.what_became_of(cloud.standing(), given, &h, &signed);
    assert_eq!(became(Law::WHOLE, &b, Given::default()), Became::Taken(receipt.clone()));
    let kept = Given { promised: false, receipt: Some(&receipt) };
    assert_eq!(became(Law::WHOLE, &Cloud::new(2), kept), Became::Taken(receipt.clone()));
    assert_eq!(became(without(Rule::ReceiptIsForGood), &b, Given::default()), Became::Void);
    assert_eq!(became(Law::WHOLE, &b, Given { promised: true, ..kept }), Became::ToBePromised);
    // Under a reservation that has ended nothing need be recorded; without one, it must be.
    assert_eq!(became(Law::WHOLE, &Cloud::new(2), Given::default()), Became::Void);
    let old = HandOver { provenance: None, ..h.clone() };
    let signed = old.clone().sign(&key(1));
    let became = Law::WHOLE.what_became_of(Cloud::new(2).standing(), Given::default(), &old, &signed);
    assert_eq!(became, Became::ToBePromised);
}

#[test]
fn a_restored_record_gives_way_to_the_history_it_lost() {
    let (mut a, mut b, mut c) = (Cloud::born(1), Cloud::new(2), Cloud::new(3));
    let backup = a.clone();
    moved(&mut a, &mut b);
    let learn = |law: Law, cloud: &Cloud, shown: &Lineage, running: bool| {
        law.learn(cloud.standing(), shown, &key(cloud.n).public(), running, &jid(2), (NOW, LATER))
    };
    // Before it ran: given up, with the receipt.
    let Learnt::GivenUp(record, lineage) = learn(Law::WHOLE, &backup, &b.history(), false) else { panic!() };
    let given = record.given_up().unwrap();
    assert_eq!((given.to.clone(), given.receipt.is_some(), given.in_doubt()), (jid(2), true, false));
    assert_eq!((record.epoch, record.run), (1, false));
    assert_eq!(lineage, b.history());
    // And it can come home afterwards.
    let mut restored = Cloud { n: 1, record: Some(*record), known: lineage };
    moved(&mut b.clone(), &mut restored);
    // Too late: it runs, and is not touched.
    let Learnt::Disproved(record) = learn(Law::WHOLE, &backup, &b.history(), true) else { panic!() };
    assert!(record.is_here() && Law::WHOLE.may_run(&record, true).is_err());
    assert!(Law::WHOLE.may_move(&record, Hold::Free, true).is_err());
    let conceded = Law::WHOLE.concede(&record, NOW, LATER).unwrap();
    assert_eq!(conceded.given_up().unwrap().to, jid(2));
    // Nothing is learnt from less, from the same, from a liar's, or with the rule off.
    assert_eq!(learn(Law::WHOLE, &a, &backup.history(), false), Learnt::Nothing);
    let known = Cloud { known: a.history(), ..a.clone() };
    assert_eq!(learn(Law::WHOLE, &known, &b.history(), false), Learnt::Nothing);
    let mut liar = Cloud::born(9);
    moved(&mut liar, &mut Cloud::new(8));
    assert_eq!(
        learn(Law::WHOLE, &backup, &liar.history(), false),
        Learnt::Nothing,
        "not signed by this cloud"
    );
    assert_eq!(learn(Law::WHOLE, &known, &liar.history(), false), Learnt::Contradicts);
    assert_eq!(learn(without(Rule::ProofIsBelieved), &backup, &b.history(), false), Learnt::Nothing);
    // It went on and came home since: still this cloud's, under a later epoch.
    moved(&mut b, &mut c);
    moved(&mut c, &mut a);
    let Learnt::Ours(record, lineage) = learn(Law::WHOLE, &backup, &a.history(), true) else { panic!() };
    assert!(record.is_here());
    assert_eq!((record.epoch, record.origin), (4, Some(lineage.origin())));
}

#[test]
fn nothing_runs_or_leaves_but_where_it_may() {
    let a = Cloud::born(1);
    Law::WHOLE.may_run(a.record(), true).unwrap();
    assert_eq!(Law::WHOLE.may_run(a.record(), false), Err(Refusal::Unconfirmed));
    assert_eq!(Law::WHOLE.may_move(a.record(), Hold::Free, false), Err(Refusal::Unconfirmed));
    assert_eq!(without(Rule::RunsWhereOwned).may_run(a.record(), false), Ok(()));
    Law::WHOLE.may_move(a.record(), Hold::Queued, true).unwrap();
    for hold in [Hold::Starting, Hold::Exporting, Hold::Moving(MigrationId::random())] {
        assert!(matches!(Law::WHOLE.may_move(a.record(), hold, true), Err(Refusal::Held(_))));
        assert_eq!(without(Rule::HeldIsNotMoved).may_move(a.record(), hold, true), Ok(()));
    }
    // A history that was lost is not made up.
    let lost = VmRecord { origin: Some(Origin::After(crate::types::LinkId::of(b"x"))), ..a.record().clone() };
    let refusal = Law::WHOLE.give_up(&lost, &a.known, a.gift(2, Some(ReservationId::random()))).unwrap_err();
    assert_eq!(refusal, Refusal::HistoryLost);
}

#[test]
fn links_outlive_the_record_that_holds_them() {
    let (mut a, mut b) = (Cloud::born(1), Cloud::new(2));
    moved(&mut a, &mut b);
    assert_eq!(Law::WHOLE.outlive(a.record()).len(), 1);
    assert_eq!(Law::WHOLE.outlive(b.record()).len(), 1);
    assert!(without(Rule::LinksOutliveRecords).outlive(b.record()).is_empty());
}

#[test]
fn a_record_of_an_earlier_release_gets_a_history() {
    let (mut a, mut b, mut c) = (Cloud::born(1), Cloud::new(2), Cloud::new(3));
    let legacy = |cloud: &Cloud| VmRecord { origin: None, ..cloud.record().clone() };
    let begin = |record: &VmRecord, n: u8, returns: &[Return]| {
        Law::WHOLE.begin_history(record, returns, &jid(n), &key(n))
    };
    // Born here; came by a receipt; was returned since; and where evidence is missing, by its own word.
    let (record, known) = begin(&legacy(&a), 1, &[]);
    assert!(known.is_empty() && record.origin == Some(Origin::Born));
    moves(Law::WHOLE, 1, &mut a, &mut b).unwrap();
    let (record, known) = begin(&legacy(&b), 2, &[]);
    assert_eq!((known.links().len(), record.origin), (1, Some(known.origin())));
    let signed = b.gives(Law::WHOLE, 3, None).unwrap();
    let back = signed.give_back(&key(3));
    let returned = VmRecord { epoch: 4, ownership: Ownership::Here, ..legacy(&b) };
    let (_, known) = begin(&returned, 2, &[back]);
    assert_eq!((known.links().len(), known.next_epoch()), (2, 5));
    let (record, known) = begin(&returned, 2, &[]);
    assert_eq!((known.links().len(), known.next_epoch()), (2, 5));
    // All of them move on, and whoever knew the way believes it.
    let mut b = Cloud { n: 2, record: Some(record), known };
    moved(&mut b, &mut c);
    moved(&mut c, &mut a);
}
