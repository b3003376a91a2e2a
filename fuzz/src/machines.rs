//! The two machines of a migration, driven by bytes: requests and events in any order, honest and
//! not. Whatever comes, a request has one answer, and nothing leads back from a hand-over but what
//! both sides signed.

use std::sync::OnceLock;

use cicada::clock::UnixMillis;
use cicada::migration::handover::{EPOCH_MAX, SignedHandOver};
use cicada::migration::message::{Initialization, Progress, StageAccount};
use cicada::migration::source::{self, Found, Source};
use cicada::migration::target::{self, Agreement, Target};
use cicada::migration::{AnswerBody, Denial, DenialCode, HandOver, Pass, Receipt, RequestBody, Return};
use cicada::types::{ByteSize, IdentityKey, MapId, MigrationId, RecipeId, VmId};
use cicada::vm::{Firmware, MapRef, VmSpec};
use uuid::Uuid;

use crate::control::parties;
use crate::split;

/// Two bytes are one step: what happens, and which of its kinds.
pub fn machines(data: &[u8]) {
    let Some((selector, steps)) = split(data) else { return };
    let steps = steps.chunks_exact(2).map(|s| (s[0], s[1]));
    match selector % 2 {
        0 => drive_target(steps),
        // A third bit tells what it does apart from what is wanted of it.
        _ => drive_source(
            Found { to_run: selector & 2 != 0, is_up: (selector & 2 != 0) ^ (selector & 4 != 0) },
            steps,
        ),
    }
}

fn target_key() -> &'static IdentityKey {
    static KEY: OnceLock<IdentityKey> = OnceLock::new();
    KEY.get_or_init(|| IdentityKey::from_secret_bytes(&[2; 32]))
}

fn agreement() -> Agreement {
    let (key, source, target) = parties();
    Agreement {
        source: source.clone(),
        source_key: key.public(),
        target: target.clone(),
        target_key: target_key().public(),
        migration: MigrationId(Uuid::from_u128(1)),
        vm: VmId(Uuid::from_u128(2)),
        epoch: 4,
        recipe: RecipeId::of(b"r"),
        reservation: cicada::types::ReservationId(Uuid::from_u128(3)),
        known: None,
    }
}

fn map(kind: u8) -> MapRef {
    MapRef { block_size_bytes: 4096, disk_size_bytes: 1 << (20 + kind % 3), root: None }
}

fn pass(kind: u8) -> Pass {
    Pass { number: (kind & 3).into(), last: kind & 4 != 0, root_delta: map(kind >> 3), user_data: map(0) }
}

/// The hand-over that fits the last pass over `map(0)`, then some that do not.
fn hand_overs() -> &'static [SignedHandOver] {
    static ALL: OnceLock<Vec<SignedHandOver>> = OnceLock::new();
    ALL.get_or_init(|| {
        let a = agreement();
        let h = HandOver {
            vm: a.vm,
            migration: a.migration,
            epoch: a.epoch + 1,
            source: a.source,
            source_key: a.source_key,
            target: a.target,
            target_key: a.target_key,
            recipe: a.recipe,
            root_delta: map(0).id(),
            user_data: map(0).id(),
            issued: UnixMillis(9),
            provenance: None,
        };
        let key = &parties().0;
        vec![
            h.clone().sign(key),
            HandOver { epoch: h.epoch + 1, ..h.clone() }.sign(key),
            HandOver { epoch: EPOCH_MAX, ..h.clone() }.sign(key),
            HandOver { vm: VmId(Uuid::from_u128(7)), ..h.clone() }.sign(key),
            HandOver { root_delta: MapId::of(b"other"), ..h.clone() }.sign(key),
            h.clone().sign(target_key()),
            SignedHandOver { record: "zz".into(), ..h.sign(key) },
        ]
    })
}

fn receipt(kind: u8) -> &'static Receipt {
    static ALL: OnceLock<Vec<Receipt>> = OnceLock::new();
    let all = ALL.get_or_init(|| hand_overs().iter().map(|h| h.clone().accept(target_key())).collect());
    &all[usize::from(kind) % all.len()]
}

fn back(kind: u8) -> &'static Return {
    static ALL: OnceLock<Vec<Return>> = OnceLock::new();
    let all = ALL.get_or_init(|| hand_overs().iter().map(|h| h.clone().give_back(target_key())).collect());
    &all[usize::from(kind) % all.len()]
}

fn denial(kind: u8) -> Denial {
    let code = if kind & 1 == 0 { DenialCode::UnknownMigration } else { DenialCode::Other };
    Denial::new(code, "no")
}

fn account(kind: u8) -> StageAccount {
    let bytes = match kind % 3 {
        0 => 0,
        1 => 1 << 30,
        _ => u64::MAX,
    };
    StageAccount { root_delta_bytes: bytes, user_data_bytes: bytes, ..StageAccount::default() }
}

fn request(what: u8, kind: u8) -> RequestBody {
    let a = agreement();
    let spec = VmSpec {
        id: a.vm,
        name: "demo".parse().expect("a name"),
        cpus: 1,
        memory: ByteSize(1 << 28),
        recipe: a.recipe,
        root_size: ByteSize(1 << 20),
        user_data_size: ByteSize(1 << 20),
        nics: Vec::new(),
        architecture: "amd64".into(),
        cpu_model: "qemu64".into(),
        firmware: Firmware::Uefi,
        disk_bus: Default::default(),
        system_uuid: None,
    };
    match what {
        0 => RequestBody::Reservation { spec },
        1 => RequestBody::Initialization(Box::new(Initialization {
            spec,
            recipe: String::new(),
            component_names: Vec::new(),
            component_bytes: 0,
            pass: pass(kind),
            addresses: Vec::new(),
            source_key: a.source_key,
            ticket: String::new(),
            firmware: None,
        })),
        2 => RequestBody::Start { hand_over: hand_overs()[0].clone(), run: kind & 1 != 0 },
        3 => {
            let all = hand_overs();
            RequestBody::Start { hand_over: all[usize::from(kind) % all.len()].clone(), run: true }
        }
        4 => RequestBody::Cancel { reason: "".into() },
        5 => RequestBody::Suspend,
        6 => RequestBody::Delete { boot_ms: None },
        7 => RequestBody::Content { components: Vec::new(), packs: Vec::new(), done: Vec::new() },
        _ => RequestBody::Configuration { spec, components: Vec::new(), packs: Vec::new() },
    }
}

fn drive_target(steps: impl Iterator<Item = (u8, u8)>) {
    use target::{Effect, Event, Phase};
    let mut machine = Target::new(agreement(), 60);
    let (mut taking_over, mut owned, mut over, mut starts) = (false, false, false, 0);
    for (what, kind) in steps {
        let (was, leased) = (machine.phase().clone(), machine.leased());
        let event = match what % 16 {
            what @ 0..=8 => Event::Asked(Box::new(request(what, kind))),
            9 => Event::StageFinished(if kind & 1 == 0 { Ok(account(kind >> 1)) } else { Err(denial(kind)) }),
            10 => Event::StageProgress(Progress { bytes_done: u64::MAX, ..Progress::default() }),
            11 => Event::TookOver(if kind & 1 == 0 { Ok(receipt(0).clone()) } else { Err(denial(kind)) }),
            12 => Event::Started(if kind & 1 == 0 { Ok(()) } else { Err("crashed".into()) }),
            13 => Event::Booted { boot_ms: None },
            _ => Event::LeaseExpired,
        };
        let (asked, took_over) = (matches!(event, Event::Asked(_)), matches!(event, Event::TookOver(Ok(_))));
        let effects = machine.step(event);
        let answers: Vec<_> = effects.iter().filter(|e| matches!(e, Effect::Answer(_))).collect();
        assert_eq!(answers.len(), usize::from(asked), "one answer to each request: {effects:?}");
        owned |= took_over && taking_over;
        taking_over &= machine.phase() == &Phase::TakingOver;
        for effect in &effects {
            match effect {
                Effect::TakeOver(signed) => {
                    assert!(matches!(was, Phase::Staged(pass) if pass.last && pass.root_delta == map(0)));
                    assert_eq!(signed, &hand_overs()[0], "only the hand-over that fits is taken");
                    assert!(!owned && !over);
                    taking_over = true;
                }
                Effect::Start => {
                    starts += 1;
                    assert!(owned && starts == 1, "started once, when it is ours");
                }
                Effect::AskDelete { .. } => assert!(owned),
                Effect::CleanUp => {
                    assert!(!owned && !over && (leased || was == Phase::TakingOver), "cleaned up once");
                    over = true;
                }
                Effect::Stage(_) => assert!(leased),
                Effect::Answer(answer) => match **answer {
                    AnswerBody::Started { .. } => assert!(owned),
                    AnswerBody::Cancelled { .. } => assert!(!owned && machine.phase() == &Phase::Abandoned),
                    AnswerBody::Returned { .. } => panic!("only the broker returns"),
                    _ => {}
                },
            }
        }
        match machine.phase() {
            Phase::Starting | Phase::Owned => assert!(owned),
            Phase::Abandoned => assert!(over && !owned),
            _ => assert!(!owned && !over, "nothing leads back: {was:?} to {:?}", machine.phase()),
        }
    }
}

fn answer(what: u8, kind: u8) -> AnswerBody {
    match what % 8 {
        0 => AnswerBody::Reserved { expires_in_s: 60, reservation: None, known: None },
        1 => AnswerBody::Working(Progress::default()),
        2 => AnswerBody::Staged { pass: (kind & 7).into(), account: account(kind >> 3) },
        3 => AnswerBody::Denied(denial(kind)),
        4 => AnswerBody::Started {
            receipt: receipt(kind).clone(),
            running: true,
            problem: None,
            account: account(kind),
        },
        5 => AnswerBody::Returned { back: back(kind).clone(), denial: denial(kind) },
        6 => AnswerBody::Cancelled { kept_s: 0 },
        _ => AnswerBody::Deleted { grace_s: u64::MAX },
    }
}

fn drive_source(found: Found, steps: impl Iterator<Item = (u8, u8)>) {
    use source::{Effect, Event};
    let mut machine = Source::new(found);
    let (mut giving_up, mut given_up, mut ended) = (false, false, false);
    for (what, kind) in steps {
        let event = match what % 16 {
            0 => Event::Begin,
            1 => Event::Checked(if kind & 1 == 0 { Ok(()) } else { Err(denial(kind)) }),
            2..=7 => Event::Answered(Box::new(answer(kind, what ^ (kind >> 3)))),
            8 => Event::Unanswered,
            9 | 10 => Event::Scanned(if kind & 15 != 0 { Ok((map(0), map(0))) } else { Err(denial(kind)) }),
            11 => Event::Stopped(if kind & 1 == 0 { Ok(()) } else { Err(denial(kind)) }),
            12 => Event::GaveUp(if kind & 1 == 0 { Ok(hand_overs()[0].clone()) } else { Err(denial(kind)) }),
            13 => Event::TookBack(if kind & 1 == 0 { Ok(()) } else { Err(denial(kind)) }),
            14 if kind & 1 == 0 => Event::Timer,
            14 => Event::Stalled,
            _ => Event::Cancel,
        };
        let before = machine.phase();
        let (gave_up, took_back) = (
            matches!(event, Event::GaveUp(Ok(_))) && before == source::Phase::GivingUp,
            matches!(event, Event::TookBack(Ok(()))) && before == source::Phase::TakingBack,
        );
        let receipt_came = matches!(&event, Event::Answered(a) if matches!(**a, AnswerBody::Started { .. }));
        let not_recorded = matches!(event, Event::GaveUp(Err(_))) && before == source::Phase::GivingUp;
        let effects = machine.step(event);
        given_up |= gave_up;
        assert!(!(ended && !effects.is_empty()), "over is over: {effects:?}");
        for effect in &effects {
            match effect {
                Effect::GiveUp(pass) => {
                    assert!(pass.last && !giving_up, "given up once, in its last state");
                    giving_up = true;
                }
                Effect::AskStart(signed) => assert!(given_up && signed == &hand_overs()[0]),
                Effect::TakeBack(_) => assert!(given_up),
                Effect::Release { .. } => assert!(given_up && receipt_came),
                Effect::Restart | Effect::Abandon(_) => {
                    assert!(!giving_up || took_back || not_recorded, "given up, and {effect:?}");
                }
                Effect::TellCancel => assert!(!given_up),
                Effect::Check
                | Effect::AskReservation
                | Effect::Scan { .. }
                | Effect::AskInitialization(_)
                | Effect::Suspend
                | Effect::Resume
                | Effect::Stop => assert!(!giving_up, "given up, and {effect:?}"),
                Effect::Wait { .. } => {}
            }
        }
        ended |= machine.phase().ended();
        assert_eq!(ended, machine.phase().ended());
        assert!(!given_up || !machine.phase().can_cancel());
    }
}
