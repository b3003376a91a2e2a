//! What a VM is busy with, and what its operators and others may do to it meanwhile: one case each, by name.

use std::time::Duration;

use cicada::broker::{CallId, Input};
use cicada::clock::UnixMillis;
use cicada::interface::{
    Deleted, MoveRequest, Problem, ProblemKind, Reply, Request, Side, VmOwnership, VmRequest, VmSet,
};
use cicada::migration::Law;
use cicada::migration::records::VmRecord;
use cicada::sim::World;
use cicada::types::{ByteSize, VmId};
use cicada::vm::{PowerState, VmSpec};

use crate::federation::{NAME, federation, open, record, records, rests, sound, vm};

fn start() -> Request {
    Request::Vm(VmRequest::Start { vm: NAME.into(), unconfirmed: false, by_uid: None })
}

fn stop() -> Request {
    Request::Vm(VmRequest::Stop { vm: NAME.into(), force: true, timeout_s: None, for_host: false })
}

fn go(to: &str) -> Request {
    Request::Move(MoveRequest::Begin {
        vm: NAME.into(),
        to: Some(to.into()),
        dry_run: false,
        force_stop: true,
    })
}

fn delete(what: Deleted) -> Request {
    Request::Vm(VmRequest::Delete { vm: NAME.into(), taken_for: Some(what) })
}

fn passes(world: &mut World, seconds: u64) {
    world.run_until(world.now.plus(Duration::from_secs(seconds)), |w, _| sound(w)).unwrap();
}

/// A federation in the order of time.
fn in_time(count: usize, runs: bool) -> World {
    let mut world = federation(count, runs, false, Law::WHOLE);
    world.in_time();
    world
}

fn ask(world: &mut World, at: usize, request: Request) -> CallId {
    world.call(at, request).expect("its broker is there")
}

/// What is refused at once.
fn refused(world: &mut World, at: usize, request: Request) -> Problem {
    let text = format!("{request:?}");
    let call = ask(world, at, request);
    match world.reply(at, call) {
        Some(Err(problem)) => problem.clone(),
        other => panic!("{text}: {other:?}"),
    }
}

fn done(world: &World, at: usize, call: CallId) {
    assert!(matches!(world.reply(at, call), Some(Ok(_))), "{:?}", world.reply(at, call));
}

fn power(world: &World, at: usize) -> Option<PowerState> {
    world.clouds[at].power.get(&vm()).copied()
}

fn record_of(world: &World, at: usize) -> VmRecord {
    world.clouds[at].book.vm(vm()).expect("it has a record")
}

/// Until this is so.
fn until(world: &mut World, what: &str, so: impl Fn(&World) -> bool) {
    for _ in 0..100_000 {
        if so(world) {
            return;
        }
        world.turn();
        sound(world).unwrap();
    }
    panic!("never: {what}");
}

#[test]
fn what_failed_to_start_travels_as_what_is_to_run() {
    let mut world = in_time(2, false);
    world.failures = 1.0;
    let call = ask(&mut world, 0, start());
    passes(&mut world, 1);
    assert!(matches!(world.reply(0, call), Some(Err(_))));
    world.failures = 0.0;
    assert!(record_of(&world, 0).run && power(&world, 0) == Some(PowerState::Stopped));
    let call = ask(&mut world, 0, go("beta"));
    rests(&mut world).unwrap();
    done(&world, 0, call);
    assert!(record_of(&world, 1).run && power(&world, 1) == Some(PowerState::Running));
}

#[test]
fn what_waits_for_its_start_may_leave_and_is_started_where_it_is_if_that_fails() {
    for cancelled in [false, true] {
        let mut world = in_time(2, true);
        // Its hypervisor is gone with the broker, and it does not start at once.
        world.crash(0, Duration::from_secs(1));
        world.cloud(0).power.insert(vm(), PowerState::Stopped);
        world.failures = 1.0;
        until(&mut world, "its start failed", |w| w.clouds[0].broker.is_some());
        world.run_until(world.now.plus(Duration::from_secs(2)), |_, _| Ok(())).unwrap();
        world.failures = 0.0;
        let call = ask(&mut world, 0, go("beta"));
        if cancelled {
            for id in open(&mut world, 0) {
                ask(&mut world, 0, Request::Move(MoveRequest::Cancel { id: id.to_string() }));
            }
        }
        rests(&mut world).unwrap();
        assert_eq!(matches!(world.reply(0, call), Some(Ok(_))), !cancelled, "{:?}", world.reply(0, call));
        let at = usize::from(!cancelled);
        assert!(record_of(&world, at).is_here() && record_of(&world, at).run);
        assert_eq!(power(&world, at), Some(PowerState::Running));
    }
}

#[test]
fn what_is_being_started_is_only_stopped_and_that_afterwards() {
    let mut world = in_time(2, false);
    let begun = ask(&mut world, 0, start());
    let set = VmSet {
        vm: NAME.into(),
        name: Some("www".parse().expect("a name")),
        cpus: Some(2),
        memory: None,
        description: None,
        autostart: None,
        stop_timeout_s: None,
    };
    let export = Request::Vm(VmRequest::Export {
        vm: NAME.into(),
        output: "/o".into(),
        format: "raw".into(),
        user_data: false,
    });
    let resize = Request::Vm(VmRequest::Resize {
        vm: NAME.into(),
        root_size: Some(ByteSize(2 << 30)),
        user_data_size: None,
    });
    let reboot = Request::Vm(VmRequest::Reboot { vm: NAME.into(), force: true, timeout_s: None });
    for request in
        [start(), go("beta"), Request::Vm(VmRequest::Set(set)), export, resize, delete(Deleted::Vm), reboot]
    {
        let problem = refused(&mut world, 0, request);
        assert!(problem.kind == ProblemKind::Conflict && problem.reason.contains("started"), "{problem}");
    }
    let ended = ask(&mut world, 0, stop());
    assert!(world.reply(0, ended).is_none());
    assert!(refused(&mut world, 0, stop()).reason.contains("stopped"));
    passes(&mut world, 5);
    done(&world, 0, begun);
    done(&world, 0, ended);
    assert!(!record_of(&world, 0).run && power(&world, 0) == Some(PowerState::Stopped));
}

#[test]
fn what_arrives_is_stopped_as_soon_as_it_was_started() {
    let mut world = in_time(2, true);
    ask(&mut world, 0, go("beta"));
    until(&mut world, "it is taken over", |w| w.clouds[1].book.is_here(vm()) == Some(true));
    assert_ne!(power(&world, 1), Some(PowerState::Running), "it is being started");
    let for_host =
        Request::Vm(VmRequest::Stop { vm: NAME.into(), force: false, timeout_s: None, for_host: true });
    let call = ask(&mut world, 1, for_host);
    passes(&mut world, 60);
    done(&world, 1, call);
    assert!(record_of(&world, 1).run, "it is to run once the host is back");
    assert_eq!(power(&world, 1), Some(PowerState::Stopped));
}

/// Else the source would have it back by the promise never to run it, and the start would go on all the same.
#[test]
fn what_is_being_started_on_arrival_is_not_promised_away() {
    let mut world = in_time(2, true);
    ask(&mut world, 0, go("beta"));
    until(&mut world, "it is taken over", |w| w.clouds[1].book.is_here(vm()) == Some(true));
    let id = record_of(&world, 1).arrival.expect("it arrived").migration.to_string();
    let resolve =
        Request::Move(MoveRequest::Resolve { id, owner: Side::There, confirmed: true, by_uid: None });
    let problem = refused(&mut world, 1, resolve);
    assert!(problem.kind == ProblemKind::Conflict && problem.reason.contains("started"), "{problem}");
    rests(&mut world).unwrap();
    assert_eq!(power(&world, 1), Some(PowerState::Running));
}

#[test]
fn a_copy_that_its_vm_comes_home_to_is_not_deleted() {
    let mut world = in_time(2, true);
    ask(&mut world, 0, go("beta"));
    passes(&mut world, 60);
    world.write(vm());
    let call = ask(&mut world, 1, go("alpha"));
    until(&mut world, "it is staged", |w| !w.clouds[0].staged.is_empty());
    let problem = refused(&mut world, 0, delete(Deleted::KeptCopy));
    assert!(problem.kind == ProblemKind::Conflict && problem.reason.contains("moved here"), "{problem}");
    rests(&mut world).unwrap();
    done(&world, 1, call);
    assert_eq!(power(&world, 0), Some(PowerState::Running));
}

#[test]
fn nothing_comes_to_where_a_copy_is_being_removed() {
    let mut world = in_time(2, true);
    ask(&mut world, 0, go("beta"));
    passes(&mut world, 60);
    let removed = ask(&mut world, 0, delete(Deleted::KeptCopy));
    assert!(world.reply(0, removed).is_none(), "it takes a while");
    let spec = record(&world.catalogue, true).spec;
    let about = cicada::broker::Matter {
        migration: cicada::types::MigrationId::random(),
        vm: vm(),
        epoch: record_of(&world, 1).epoch,
    };
    let reserve = cicada::migration::RequestBody::Reservation { spec };
    let version = cicada::migration::envelope::VERSION;
    let first = world.say(1, 0, about, version, reserve.clone());
    assert!(
        matches!(&first, Some(cicada::migration::AnswerBody::Denied(d)) if d.text.as_str().contains("removed")),
        "{first:?}"
    );
    passes(&mut world, 1);
    done(&world, 0, removed);
    let then = world.say(1, 0, about, version, reserve);
    assert!(matches!(then, Some(cicada::migration::AnswerBody::Reserved { .. })), "{then:?}");
}

/// That it is off then says nothing of its guest.
#[test]
fn what_waits_for_its_start_is_not_taken_for_switched_off_where_events_were_lost() {
    let mut world = in_time(2, true);
    world.crash(0, Duration::from_secs(1));
    world.cloud(0).power.insert(vm(), PowerState::Stopped);
    // None of the others says who owns it: its machine was booted since.
    world.cloud(0).mark = None;
    world.partitions.push((0, 1));
    until(&mut world, "its broker is there again", |w| w.clouds[0].broker.is_some());
    let now = world.now;
    let broker = world.cloud(0).broker.as_mut().expect("it is there");
    assert!(!broker.is_confirmed(vm()), "it waits");
    broker.step(now, Input::Machines(vec![(vm(), PowerState::Stopped)]));
    assert!(record_of(&world, 0).run, "it is to run");
    world.partitions.clear();
    rests(&mut world).unwrap();
    assert_eq!(power(&world, 0), Some(PowerState::Running));
}

/// Long after a crash, and with nothing under way, it does.
#[test]
fn a_guest_that_switched_itself_off_while_events_were_lost_stays_off() {
    let mut world = in_time(2, true);
    world.crash(0, Duration::from_secs(1));
    world.cloud(0).power.insert(vm(), PowerState::Stopped);
    world.failures = 1.0;
    until(&mut world, "its broker is there again", |w| w.clouds[0].broker.is_some());
    world.run_until(world.now.plus(Duration::from_secs(1)), |_, _| Ok(())).unwrap();
    world.failures = 0.0;
    until(&mut world, "it runs again", |w| power(w, 0) == Some(PowerState::Running));
    passes(&mut world, 5);
    world.cloud(0).power.insert(vm(), PowerState::Stopped);
    let now = world.now;
    let broker = world.cloud(0).broker.as_mut().expect("it is there");
    broker.step(now, Input::Machines(vec![(vm(), PowerState::Stopped)]));
    assert!(!record_of(&world, 0).run, "its start failed within these minutes, but it ran since");
    rests(&mut world).unwrap();
}

// --- damaged records ---

fn other() -> VmId {
    VmId(uuid::Uuid::from_u128(0xdb << 120))
}

/// Two VMs in the first cloud; the record of one of them cannot be read from some restart on.
fn with_a_damaged_record(runs: bool) -> World {
    let mut world = in_time(2, runs);
    let first = record(&world.catalogue, true);
    let spec = VmSpec { id: other(), name: "db".parse().expect("a name"), ..first.spec.clone() };
    let db = VmRecord { run: true, ..VmRecord::new(spec, vec!["os@1".into()], "disks-1", UnixMillis(2)) };
    world.crash(0, Duration::from_secs(1));
    world.place(0, db, 1000).expect("it is placed");
    world.clouds[0].book.damage(vm(), true);
    until(&mut world, "its broker is there again", |w| w.clouds[0].broker.is_some());
    passes(&mut world, 60);
    world
}

#[test]
fn a_damaged_record_keeps_its_own_vm_down_and_nothing_else() {
    let mut world = with_a_damaged_record(false);
    for request in [start(), stop(), go("beta"), delete(Deleted::Vm)] {
        let problem = refused(&mut world, 0, request);
        assert!(matches!(problem.kind, ProblemKind::Damaged | ProblemKind::NotFound), "{problem}");
    }
    let id = vm().to_string();
    let by_id = Request::Vm(VmRequest::Start { vm: id, unconfirmed: false, by_uid: None });
    assert_eq!(refused(&mut world, 0, by_id).kind, ProblemKind::Damaged);
    let call = ask(&mut world, 0, Request::Vm(VmRequest::List));
    let Some(Ok(Reply::Vms(listed))) = world.reply(0, call) else { panic!() };
    let aside: Vec<_> = listed.iter().filter(|v| v.ownership == VmOwnership::Damaged).collect();
    assert_eq!((listed.len(), aside.len(), aside[0].id), (2, 1, vm()));
    // The other is stopped, started and moved as ever, and comes home to where the damage is.
    let before = world.clouds[0].book.vm(vm());
    let db = |to: &str| {
        Request::Move(MoveRequest::Begin {
            vm: "db".into(),
            to: Some(to.into()),
            dry_run: false,
            force_stop: false,
        })
    };
    for (from, to) in [(0, "beta"), (1, "alpha")] {
        let call = ask(&mut world, from, db(to));
        passes(&mut world, 120);
        done(&world, from, call);
        let at = 1 - from;
        assert_eq!(world.clouds[at].power.get(&other()), Some(&PowerState::Running));
    }
    assert_eq!(world.clouds[0].book.vm(vm()), before, "nobody wrote over what was damaged");
    assert_ne!(power(&world, 0), Some(PowerState::Running));
    // Mended, all is as it was.
    world.crash(0, Duration::from_secs(1));
    world.clouds[0].book.damage(vm(), false);
    until(&mut world, "its broker is there again", |w| w.clouds[0].broker.is_some());
    passes(&mut world, 60);
    let call = ask(&mut world, 0, start());
    passes(&mut world, 5);
    done(&world, 0, call);
    assert_eq!(power(&world, 0), Some(PowerState::Running));
}

/// Whose record is damaged at the target is not known to be anybody's, until it is mended.
#[test]
fn nothing_is_promised_of_a_vm_whose_record_is_damaged() {
    let mut world = in_time(2, true);
    ask(&mut world, 0, go("beta"));
    until(&mut world, "it is taken over", |w| w.clouds[1].book.is_here(vm()) == Some(true));
    world.crash(1, Duration::from_secs(1));
    world.clouds[1].book.damage(vm(), true);
    passes(&mut world, 600);
    let doubted = records(&world).find_map(|(at, r)| r.given_up().map(|g| (at, g.receipt.is_some())));
    println!("at the source: {doubted:?}");
    assert!(record_of(&world, 0).given_up().is_some(), "it never comes back by itself");
    world.crash(1, Duration::from_secs(1));
    world.clouds[1].book.damage(vm(), false);
    rests(&mut world).unwrap();
    assert_eq!(power(&world, 1), Some(PowerState::Running));
}
