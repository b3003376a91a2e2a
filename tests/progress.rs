//! What a move says of itself: how far it is, what was sent, what is kept when it ended without a hand-over.

#[allow(dead_code)]
#[path = "federation/world.rs"]
mod world;

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use cicada::client::Client;
use cicada::interface::{Candidate, Event, MigrationProgress, MigrationView, VmSet};
use cicada::interface::{MoveRequest, Problem, ProblemKind, Reply, Request, VmRequest};
use world::support::Kind;
use world::{World, capped, lacks, turn};

const DISK_BYTES: u64 = 24 << 20;

fn missing() -> bool {
    !Kind::usual().is_there("the test") || lacks(&["qemu-system-x86_64", "qemu-img"])
}

/// A move that is followed.
struct Followed {
    seen: Arc<Mutex<Vec<MigrationProgress>>>,
    end: JoinHandle<Result<Reply, Problem>>,
}

fn follow(world: &World, vm: &str, force_stop: bool) -> Followed {
    let (socket, seen) = (world.socket(0), Arc::<Mutex<Vec<_>>>::default());
    let request = Request::Move(MoveRequest::Begin {
        vm: vm.into(),
        to: Some("boreal".into()),
        dry_run: false,
        force_stop,
    });
    let heard = seen.clone();
    let end = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let note = |event: Event| {
            if let Event::Migration(p) = event {
                heard.lock().unwrap().push(p);
            }
        };
        runtime.block_on(async { Client::connect(&socket).await?.call(&request, note).await })
    });
    Followed { seen, end }
}

impl Followed {
    fn seen(&self) -> Vec<MigrationProgress> {
        self.seen.lock().unwrap().clone()
    }

    fn moved(self, world: &World) -> MigrationView {
        match self.end.join().unwrap() {
            Ok(Reply::Migration(view)) => *view,
            other => panic!("{other:?}\n{}\n{}", world.log(0), world.log(1)),
        }
    }

    fn failed(self) -> Problem {
        self.end.join().unwrap().unwrap_err()
    }

    /// Waits until so much was carried; the move's id.
    fn wait_carried(&self, world: &World, bytes: u64) -> String {
        world.wait("enough was carried", 60, |_| self.seen().last().is_some_and(|p| p.bytes_done >= bytes));
        self.seen().last().unwrap().id.to_string()
    }
}

fn shown(world: &World, cloud: usize, id: &str) -> MigrationView {
    match world.call(cloud, &Request::Move(MoveRequest::Show { id: id.into() })) {
        Ok(Reply::Migration(view)) => *view,
        other => panic!("{other:?}"),
    }
}

fn planned(world: &World, vm: &str) -> Candidate {
    world.plan(0, vm).candidates.remove(0)
}

fn missing_bytes(c: &Candidate) -> u64 {
    c.component_bytes_missing + c.root_delta_bytes_missing + c.user_data_bytes_missing
}

/// All that a move's account tells apart.
fn told_apart(view: &MigrationView) -> u64 {
    let a = &view.account;
    a.component_bytes + a.root_delta_bytes + a.user_data_bytes
}

fn says_kept(view: &MigrationView) -> bool {
    view.remarks.iter().any(|remark| remark.contains("another move of the VM"))
}

#[test]
fn a_move_says_how_far_it_is_and_what_became_of_what_was_sent() {
    if missing() {
        return;
    }
    let _turn = turn();
    let mut world = World::start(&["alpine", "boreal"]);
    world.reconfigure(0, &capped("5M"));

    // A VM that stands still: its data is its progress.
    world.noise_vm(0, "still", DISK_BYTES as usize, |_| ());
    let moving = follow(&world, "still", false);
    let id = moving.wait_carried(&world, DISK_BYTES / 2);
    assert!(
        moving.seen().iter().all(|p| p.phase == cicada::interface::MigrationPhase::Negotiate
            || p.phase == cicada::interface::MigrationPhase::Stage),
        "{:?}",
        moving.seen()
    );
    world.call(0, &Request::Move(MoveRequest::Cancel { id: id.clone() })).unwrap();
    let seen = moving.seen();
    let problem = moving.failed();
    assert_eq!(problem.kind, ProblemKind::Cancelled, "{problem}");
    assert!(seen.is_sorted_by(|a, b| a.fraction <= b.fraction && a.bytes_done <= b.bytes_done), "{seen:?}");
    for p in seen.iter().filter(|p| p.phase == cicada::interface::MigrationPhase::Stage && p.bytes_total > 0)
    {
        let carried = p.bytes_done as f64 / p.bytes_total as f64;
        assert!(
            (p.fraction - carried).abs() < 0.1,
            "{} of the bytes and {} of the move",
            carried,
            p.fraction
        );
    }

    // Both sides say what came across, and that it is kept.
    let carried = seen.last().unwrap().bytes_done;
    assert!(shown(&world, 0, &id).account.carried_bytes >= carried, "{:?}", shown(&world, 0, &id).account);
    let there = shown(&world, 1, &id);
    assert!(told_apart(&there) >= DISK_BYTES / 4, "{:?}", there.account);
    assert_eq!(there.account.components_needed, shown(&world, 0, &id).account.components_needed);
    assert!(there.account.phase_ms.get("stage").is_some_and(|ms| *ms > 0), "{:?}", there.account);
    assert!(says_kept(&there), "{there:?}");
    world.wait("the source knows as well", 20, |w| says_kept(&shown(w, 0, &id)));

    // The next plan counts it as there, the next move goes on with it.
    let plan = planned(&world, "still");
    assert!(plan.kept_s > 0 && missing_bytes(&plan) <= DISK_BYTES - carried + (1 << 20), "{plan:?}");
    let moved = follow(&world, "still", false).moved(&world);
    let sent = told_apart(&moved);
    assert!(sent <= DISK_BYTES - carried + (1 << 20), "{sent} after {carried} of {DISK_BYTES}");
    let there = shown(&world, 1, &moved.progress.id.to_string());
    assert_eq!(told_apart(&there), sent, "{:?}", there.account);
    assert!(there.account.wire_bytes > sent, "{:?}", there.account);
    assert!(!says_kept(&there), "{there:?}");
}

/// A disk of noise boots nothing, and what does not run hears no power button.
#[test]
fn a_guest_that_ignores_the_power_button_costs_no_second_copy() {
    if missing() {
        return;
    }
    let _turn = turn();
    let world = World::start(&["alpine", "boreal"]);
    world.noise_vm(0, "deaf", DISK_BYTES as usize, |adopt| adopt.start = true);
    let set: VmSet = serde_json::from_str(r#"{"vm": "deaf", "stop_timeout_s": 2}"#).unwrap();
    world.call(0, &Request::Vm(VmRequest::Set(set))).unwrap();
    let problem = follow(&world, "deaf", false).failed();
    assert!(problem.to_string().contains("does not stop"), "{problem}");
    assert!(problem.next_step.contains("--force-stop"), "{problem:?}");
    let failed = world.migrations(0).pop().unwrap();
    assert!(failed.account.carried_bytes >= DISK_BYTES, "{:?}", failed.account);
    let id = failed.progress.id.to_string();
    world.wait("what came is kept", 20, |w| says_kept(&shown(w, 0, &id)) && says_kept(&shown(w, 1, &id)));

    let plan = world.plan(0, "deaf");
    assert!(plan.notes.iter().any(|n| n.contains("did not end by itself") && n.contains("2 s")), "{plan:?}");
    assert!(plan.candidates[0].kept_s > 0 && missing_bytes(&plan.candidates[0]) < 1 << 20, "{plan:?}");
    let moved = follow(&world, "deaf", true).moved(&world);
    assert!(told_apart(&moved) < 1 << 20, "{:?}", moved.account);
}
