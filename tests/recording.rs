//! Brokers that record what they take in while a VM moves, is stopped and changed, and one dies: a core that is
//! stepped through either recording decides the same.

#[allow(dead_code)]
#[path = "federation/world.rs"]
mod world;

use std::path::Path;
use std::process::{Command, Output};

use cicada::broker::Effect;
use cicada::broker::book::Book;
use cicada::interface::{MoveRequest, ProblemKind, Request};
use cicada::migration::move_record::MovePhase;
use cicada::recording::{Difference, Replay};
use cicada::runner::{RecordBook, Records};
use cicada::types::ByteSize;
use world::{World, missing_tool, turn};

fn replay(recording: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cicada")).arg("replay").arg(recording).args(more).output().unwrap()
}

fn assert_same(world: &World, cloud: usize, recording: &Path, end: &str) {
    let out = replay(recording, &["--differences"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}\n{}\n{}", String::from_utf8_lossy(&out.stdout), world.log(cloud));
    assert!(said.contains(end), "{said}");
}

#[test]
fn a_core_decides_again_what_a_broker_decided() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let mut world = World::start(&["alpine", "boreal"]);
    let recordings = [0, 1].map(|cloud| world.clouds[cloud].dir.join("recording"));
    for cloud in [0, 1] {
        world.stop_broker(cloud, false);
        let path = recordings[cloud].display().to_string();
        world.clouds[cloud].arguments = vec!["--record".into(), path];
        world.start_broker(cloud);
    }
    world.wait_online();
    world.noise_vm(0, "web", 4 << 20, |_| ());
    world.plan(0, "web");
    world.move_vm(0, "web", "boreal");
    let id = world.vm(1, "web").id.to_string();
    let far = Request::Move(MoveRequest::Begin {
        vm: "web".into(),
        to: Some("nowhere".into()),
        dry_run: false,
        force_stop: false,
    });
    assert_eq!(world.call(1, &far).unwrap_err().kind, ProblemKind::NotFound);
    world.move_vm(1, "web", "alpine");
    world.noise_vm(1, "db", 1 << 20, |adopt| adopt.memory = ByteSize::mib(32));
    world.call(1, &Request::Move(MoveRequest::List)).unwrap();
    world.status(0);

    // One is stopped, the other dies.
    world.stop_broker(0, false);
    assert_same(&world, 0, &recordings[0], "was stopped");
    world.stop_broker(1, true);
    assert_same(&world, 1, &recordings[1], "died");

    // How the fixtures of `of_before` below were made.
    if let Some(dir) = std::env::var_os("CICADA_WRITE_FIXTURES") {
        for (recording, name) in recordings.iter().zip(["alpine", "boreal"]) {
            std::fs::copy(recording, Path::new(&dir).join(format!("{name}.recording"))).unwrap();
        }
        let from = world.clouds[0].dir.join("data");
        let status = Command::new("cp").arg("-r").arg(from).arg(Path::new(&dir).join("data")).status();
        assert!(status.unwrap().success());
    }

    // What is asked for is shown, and as JSON too.
    let shown = replay(&recordings[0], &["--grep", &id]);
    let text = String::from_utf8_lossy(&shown.stdout);
    assert!(text.contains("Move") && text.contains("Reserve") && text.contains("Stage"), "{text}");
    let json = replay(&recordings[0], &["--json", "--grep", "no such text"]);
    let summary: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!((&summary["end"], &summary["steps_that_differ"]), (&"stopped".into(), &0.into()), "{summary}");

    // A recording is never written over.
    let mut again = world.spawn_broker(0);
    assert_eq!(again.wait().unwrap().code(), Some(4), "{}", world.log(0));
}

/// What is answered to other brokers is what it was, bit by bit. (Other effects may be spelt otherwise since.)
#[test]
fn other_brokers_are_answered_as_before() {
    for name in ["alpine", "boreal"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/before/{name}.recording"));
        let mut replay = Replay::open(&path).unwrap();
        let mut answers = 0;
        while let Some(step) = replay.step().unwrap() {
            answers += step.effects.iter().filter(|e| matches!(e, Effect::Answer(_, Some(_)))).count();
            let is_answer = |words: &Option<String>| words.as_ref().is_some_and(|w| w.starts_with("Answer "));
            let differs = step.differences.iter().find(
                |d| matches!(d, Difference::Effect { recorded, now, .. } if is_answer(recorded) || is_answer(now)),
            );
            assert_eq!(differs, None, "{name}, step {}: {:?}", step.number, step.input);
        }
        assert!(answers > 5, "{name} answered {answers} times");
    }
}

/// Records of before open, and say the same.
#[test]
fn records_of_before_open() {
    let dir = tempfile::tempdir().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/before/data");
    assert!(Command::new("cp").arg("-r").arg(from).arg(dir.path()).status().unwrap().success());
    let book = RecordBook::new(Records::open(&dir.path().join("data")).unwrap());
    let (vms, damaged) = book.vms().unwrap();
    assert!(damaged.is_empty(), "{damaged:?}");
    let [web] = vms.as_slice() else { panic!("{vms:?}") };
    assert!(web.is_here() && web.spec.name.as_str() == "web" && web.spec.memory == ByteSize::mib(64));
    assert_eq!(web.epoch, 3, "born, given away, home again");
    let lineage = book.lineage(web.spec.id).unwrap();
    assert_eq!(lineage.links().len(), 2);
    assert!(lineage.tip().unwrap().owner.as_str().starts_with("alpine@"));
    let migrations = book.migrations().unwrap();
    assert_eq!(migrations.len(), 2);
    for record in migrations {
        assert_eq!(record.course.phase, MovePhase::Completed);
        let receipt = book.receipt(record.course.id).unwrap().expect("its receipt is kept");
        receipt.verify().unwrap();
    }
}
