//! A cloud's key gives way to another, for real: brokers, Prosody, the data link, and the program that
//! rotates, killed in between.

#[allow(dead_code)]
#[path = "federation/world.rs"]
mod world;

use std::process::{Command, Output};

use cicada::interface::MemberView;
use cicada::interface::{MoveRequest, Request};
use world::{World, components, missing_tool, turn};

const TINY: [&str; 3] = ["format-uefi-gpt", "kernel-tiny", "os-tiny"];

/// Runs the program as the operator of a cloud; with `point`, it dies there.
fn cicada(world: &World, cloud: usize, arguments: &[&str], point: Option<&str>) -> Output {
    let dir = &world.clouds[cloud].dir;
    let mut command = Command::new(env!("CARGO_BIN_EXE_cicada"));
    command.args(["--config", &dir.join("federation.toml").display().to_string()]).args(arguments);
    if let Some(point) = point {
        std::fs::write(dir.join("fault"), format!("{point}=kill\n")).unwrap();
        command.env("CICADA_FAULT_FILE", dir.join("fault"));
    }
    command.output().unwrap()
}

/// What `identity show` says: the fingerprint, and those before it.
fn identity(world: &World, cloud: usize) -> (String, Vec<String>) {
    let output = cicada(world, cloud, &["identity", "show", "--json"], None);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let fingerprint = |v: &serde_json::Value| v["fingerprint"].as_str().unwrap().to_owned();
    (fingerprint(&value), value["predecessors"].as_array().unwrap().iter().map(fingerprint).collect())
}

fn alpine_at_boreal(world: &World) -> MemberView {
    world.members(1).into_iter().find(|m| m.jid.as_str().starts_with("alpine")).unwrap()
}

fn failed(output: &Output, code: i32, word: &str) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), text.contains(word)), (Some(code), true), "{word}: {text}");
}

#[test]
fn a_cloud_rotates_its_key_and_members_follow_and_move_vms_on() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let built = components(&TINY);
    let mut world = World::start(&["alpine", "boreal"]);
    world.push(0, &built, &built.ids);
    world.create_vm(0, "web", &built.ids, 8, false);
    let first = world.move_vm(0, "web", "boreal");
    let id = first.progress.id.to_string();
    let receipt = world.dir.path().join("receipt.json").display().to_string();
    let saved = cicada(&world, 0, &["migration", "receipt", &id, "--output", &receipt], None);
    assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
    let (born, before) = identity(&world, 0);
    assert!(before.is_empty());

    // Not under a broker that signs with it, nor while something it signed is open.
    failed(&cicada(&world, 0, &["identity", "rotate"], None), 4, "the broker runs");
    world.create_vm(0, "other", &built.ids, 8, false);
    world.signal_broker(1, rustix::process::Signal::STOP);
    let moving = world.begin_move(0, "other", Some("boreal"));
    world.wait("a move is open", 30, |w| w.migrations(0).iter().any(|m| !m.progress.ended));
    world.stop_broker(0, true);
    failed(&cicada(&world, 0, &["identity", "rotate"], None), 4, "has not ended");
    assert!(moving.join().unwrap().is_err());
    assert_eq!(identity(&world, 0), (born.clone(), vec![]));
    world.signal_broker(1, rustix::process::Signal::CONT);
    world.start_broker(0);
    world.wait("the move ends", 120, |w| w.migrations(0).iter().all(|m| m.progress.ended));
    world.stop_broker(0, false);

    // Killed before the succession is recorded nothing changed, killed after it the new key counts.
    let killed = cicada(&world, 0, &["identity", "rotate"], Some("identity-made"));
    assert!(killed.status.code().is_none(), "{killed:?}");
    assert_eq!(identity(&world, 0), (born.clone(), vec![]));
    let killed = cicada(&world, 0, &["identity", "rotate"], Some("identity-succeeded"));
    assert!(killed.status.code().is_none(), "{killed:?}");
    let (second, before) = identity(&world, 0);
    assert_eq!(before, std::slice::from_ref(&born));
    // And once more, while the others are looking away.
    let rotated = cicada(&world, 0, &["identity", "rotate"], None);
    assert!(rotated.status.success(), "{}", String::from_utf8_lossy(&rotated.stderr));
    let (third, before) = identity(&world, 0);
    assert_eq!(before, [born, second]);

    // The other follows both steps by itself, and VMs move in both directions.
    world.start_broker(0);
    world.wait_online();
    let seen = alpine_at_boreal(&world);
    assert_eq!((seen.fingerprint, seen.predecessors.len()), (third.clone(), 2));
    assert!(world.log(1).contains("gave way to another"), "{}", world.log(1));
    let there = if world.vm(1, "web").ownership == cicada::interface::VmOwnership::Here { 1 } else { 0 };
    assert_eq!(there, 1);
    let back = world.move_vm(1, "web", "alpine");
    assert_eq!(back.progress.phase, cicada::interface::MigrationPhase::Completed);
    let again = world.move_vm(0, "web", "boreal");
    assert_eq!(again.progress.phase, cicada::interface::MigrationPhase::Completed);

    // Durably: after a restart as well, and after the offered history is forgotten.
    world.stop_broker(1, true);
    world.start_broker(1);
    world.wait_online();
    assert_eq!(alpine_at_boreal(&world).fingerprint, third);

    // What the first key signed is still good, at both ends.
    for cloud in 0..2 {
        let output = cicada(&world, cloud, &["receipt", "verify", &receipt, "--json"], None);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("trusted-since"), "{text}{output:?}");
    }

    // Revoked, it is no member to deal with by any of its keys.
    let revoked = cicada(&world, 1, &["identity", "revoke", "alpine@federation.test"], None);
    assert!(revoked.status.success());
    assert_eq!(alpine_at_boreal(&world).trust, cicada::interface::MemberTrust::Revoked);
    world.stop_broker(0, false);
    assert!(cicada(&world, 0, &["identity", "rotate"], None).status.success());
    world.start_broker(0);
    let (fourth, _) = identity(&world, 0);
    world.wait("it shows another key", 30, |w| alpine_at_boreal(w).fingerprint == fourth);
    assert_eq!(alpine_at_boreal(&world).trust, cicada::interface::MemberTrust::Revoked);
    assert!(
        world
            .call(
                1,
                &Request::Move(MoveRequest::Plan { vm: "web".into(), to: Some("alpine".into()), all: false })
            )
            .is_err()
    );
}
