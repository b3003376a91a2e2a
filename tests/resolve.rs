//! Hand-overs in doubt, what operators may decide about them, and the records that prove who owns a
//! VM. The brokers are real; their VMs are small disks that are never started.

#[allow(dead_code)]
#[path = "federation/world.rs"]
mod world;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use cicada::interface::{ContentRequest, MoveRequest, ProblemKind, Reply, Request, VmRequest};
use cicada::interface::{MigrationView, VmView};
use serde_json::Value;
use world::{World, missing_tool, turn};

const A: usize = 0;
const B: usize = 1;

/// A VM of one small disk, at alpine.
fn vm(world: &World, name: &str) -> VmView {
    world.noise_vm(A, name, 2 << 20, |adopt| adopt.networks = vec!["lan".into()])
}

fn cicada(world: &World, cloud: usize, args: &[&str]) -> Output {
    let config = world.clouds[cloud].dir.join("federation.toml");
    command(world.dir.path()).arg("--config").arg(config).args(args).output().unwrap()
}

fn command(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cicada"));
    for name in ["CICADA_CONFIG", "CICADA_SOCKET", "CICADA_LOG"] {
        command.env_remove(name);
    }
    command.env("NO_COLOR", "1").current_dir(dir).stdin(Stdio::null());
    command
}

fn text(output: &Output) -> (Option<i32>, String, String) {
    let utf8 = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code(), utf8(&output.stdout), utf8(&output.stderr))
}

fn migration(world: &World, cloud: usize, id: &str) -> MigrationView {
    match world.call(cloud, &Request::Move(MoveRequest::Show { id: id.into() })) {
        Ok(Reply::Migration(view)) => *view,
        other => panic!("{other:?}\n{}", world.log(cloud)),
    }
}

fn listed(world: &World, cloud: usize, id: &str) -> bool {
    match world.call(cloud, &Request::Move(MoveRequest::List)) {
        Ok(Reply::Migrations(all)) => all.iter().any(|m| m.progress.id.to_string() == id),
        other => panic!("{other:?}"),
    }
}

fn record(world: &World, cloud: usize, vm: &VmView) -> PathBuf {
    world.clouds[cloud].dir.join(format!("data/vms/{}/record.json", vm.id))
}

fn change_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(path, serde_json::to_vec(&value).unwrap()).unwrap();
}

/// Leaves the source's records as a crash just before the receipt came leaves them. Both brokers are down.
fn forget_receipt(world: &World, vm: &VmView, id: &str) {
    change_json(&record(world, A, vm), |r| {
        r["ownership"]["receipt"] = Value::Null;
        r["ownership"]["scrub_after"] = Value::Null;
    });
    let data = world.clouds[A].dir.join("data");
    std::fs::remove_file(data.join(format!("receipts/{id}.json"))).unwrap();
    std::fs::remove_file(data.join(format!("lineages/{}", vm.id))).unwrap();
    // Nor did the source acknowledge anything.
    change_json(&record(world, B, vm), |r| r["arrival"]["acknowledged"] = false.into());
    change_json(&data.join(format!("migrations/{id}.json")), |m| {
        m["view"]["progress"]["ended"] = false.into();
        m["view"]["progress"]["phase"] = "start".into();
    });
}

/// Leaves the target's records as if the hand-over had never come.
fn forget_arrival(world: &World, vm: &VmView, id: &str) {
    let data = world.clouds[B].dir.join("data");
    std::fs::remove_dir_all(record(world, B, vm).parent().unwrap()).unwrap();
    std::fs::remove_file(data.join(format!("receipts/{id}.json"))).unwrap();
    std::fs::remove_file(data.join(format!("lineages/{}", vm.id))).unwrap();
}

/// Waits until each of the two clouds can send VMs to the other.
fn wait_online(world: &World) {
    let sees = |w: &World, cloud: usize, other: &str| {
        let there = |m: &cicada::interface::MemberView| {
            m.state == cicada::interface::MemberState::Online
                && m.trust == cicada::interface::MemberTrust::Trusted
        };
        w.members(cloud).iter().any(|m| m.jid.as_str().starts_with(other) && there(m))
    };
    world.wait("the clouds see each other", 90, |w| sees(w, A, "boreal") && sees(w, B, "alpine"));
}

/// A move whose target is down and whose source does not know what became of it.
fn in_doubt(world: &mut World, vm: &VmView, forget_target: bool) -> String {
    wait_online(world);
    let id = world.move_vm(A, vm.name.as_str(), "boreal").progress.id.to_string();
    world.stop_broker(B, true);
    world.stop_broker(A, true);
    forget_receipt(world, vm, &id);
    if forget_target {
        forget_arrival(world, vm, &id);
    }
    world.start_broker(A);
    assert!(listed(world, A, &id), "a restart forgot the migration in doubt");
    world.wait("the source says that it is in doubt", 60, |w| {
        migration(w, A, &id).progress.phase == cicada::interface::MigrationPhase::InDoubt
    });
    id
}

fn resolve(world: &World, cloud: usize, id: &str, owner: &str) {
    let (code, _, err) =
        text(&cicada(world, cloud, &["migration", "resolve", id, "--owner", owner, "--yes"]));
    assert_eq!(code, Some(0), "{err}\n{}", world.log(cloud));
    assert!(err.contains("RISK: "), "the risk is not told: {err}");
}

fn ownership(world: &World, cloud: usize, vm: &VmView) -> String {
    let vms = world.vms(cloud);
    vms.iter().find(|v| v.id == vm.id).map_or_else(|| "nothing".into(), |v| v.ownership.to_string())
}

#[test]
fn both_ends_keep_the_same_receipt_and_anybody_can_check_it() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let mut world = World::start(&["alpine", "boreal"]);
    let vm = vm(&world, "proof");
    let id = world.move_vm(A, "proof", "boreal").progress.id.to_string();
    let dir = world.dir.path().to_owned();
    let path = |name: &str| dir.join(name).display().to_string();
    for (cloud, file) in [(A, "a.json"), (B, "b.json")] {
        let (code, _, err) =
            text(&cicada(&world, cloud, &["migration", "receipt", &id, "--output", &path(file)]));
        assert_eq!(code, Some(0), "{err}");
    }
    let receipt = std::fs::read(path("a.json")).unwrap();
    assert!(receipt == std::fs::read(path("b.json")).unwrap(), "the two ends keep different records");
    // By the beginning of its id, and never over a file that is there.
    let (_, printed, _) = text(&cicada(&world, B, &["migration", "receipt", &id[..8]]));
    assert_eq!(printed.as_bytes(), receipt);
    let over = cicada(&world, A, &["migration", "receipt", &id, "--output", &path("a.json")]);
    assert_eq!(over.status.code(), Some(4));

    // Long ago: the views and the source's copy are gone, the receipt stays.
    world.call(A, &Request::Vm(VmRequest::Delete { vm: "proof".into(), taken_for: None })).unwrap();
    let keys = [A, B].map(|cloud| world.status(cloud).key.to_string());
    for cloud in [A, B] {
        world.stop_broker(cloud, false);
        std::fs::remove_file(world.clouds[cloud].dir.join(format!("data/migrations/{id}.json"))).unwrap();
        world.start_broker(cloud);
        let (code, again, err) = text(&cicada(&world, cloud, &["migration", "receipt", &id]));
        assert_eq!((code, again.as_bytes()), (Some(0), receipt.as_slice()), "{err}");
    }
    assert!(!record(&world, A, &vm).exists());

    // Offline, from a directory without a configuration.
    let elsewhere = tempfile::tempdir().unwrap();
    let verify = |file: &str, more: &[&str]| {
        let mut command = command(elsewhere.path());
        text(&command.args(["receipt", "verify", file]).args(more).output().unwrap())
    };
    let (code, out, err) = verify(&path("a.json"), &[]);
    assert_eq!(code, Some(0), "{err}");
    assert!(
        out.contains(&vm.id.to_string()) && out.lines().any(|l| l.starts_with("epoch ") && l.ends_with(" 2")),
        "{out}"
    );
    assert!(out.contains("NOT KNOWN here") && err.contains("WARNING"), "{out}{err}");
    let both = ["--source-key", &keys[0], "--target-key", &keys[1], "--json"];
    let (code, out, err) = verify(&path("a.json"), &both);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    let said: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&said["source"]["vouched"], &said["kind"]), (&"given".into(), &"receipt".into()));
    let (code, _, err) = verify(&path("a.json"), &["--source-key", &keys[1]]);
    assert_eq!(code, Some(8), "{err}");
    // A cloud of the federation trusts the keys of both.
    let (code, out, err) = text(&cicada(&world, B, &["receipt", "verify", &path("a.json")]));
    assert_eq!((code, err.as_str()), (Some(0), ""), "{out}");
    assert_eq!(out.matches("a key trusted here").count(), 2, "{out}");

    // Touched, it proves nothing.
    let spoil = |name: &str, change: fn(&mut Value)| {
        std::fs::write(path(name), &receipt).unwrap();
        change_json(Path::new(&path(name)), change);
        verify(&path(name), &[])
    };
    let (code, _, err) = spoil("as-return.json", |r| r["kind"] = "return".into());
    assert_eq!(code, Some(8), "{err}");
    let (code, _, err) = spoil("epoch.json", |r| {
        // Magic, VM and migration, then the epoch.
        let record = r["record"].as_str().unwrap().to_owned();
        let at = 2 * (8 + 16 + 16);
        let other: String = record[at..at + 16].replace('2', "7");
        assert_ne!(other, record[at..at + 16]);
        r["record"] = format!("{}{other}{}", &record[..at], &record[at + 16..]).into();
    });
    assert_eq!(code, Some(8), "{err}");
    assert_eq!(spoil("format.json", |r| r["format"] = "letter".into()).0, Some(2));
    std::fs::write(path("none.json"), "{").unwrap();
    assert_eq!(verify(&path("none.json"), &[]).0, Some(2));
    assert_eq!(verify("/dev/zero", &[]).0, Some(2), "the input is not bounded");
    assert_eq!(cicada(&world, A, &["migration", "receipt", "0123abcd"]).status.code(), Some(3));
}

#[test]
fn a_vm_taken_back_while_the_target_had_it_is_contested_until_operators_settle_it() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let mut world = World::start(&["alpine", "boreal"]);
    let vm = vm(&world, "twice");
    let id = in_doubt(&mut world, &vm, false);

    // It explains itself, and nobody is asked where nobody sits.
    let view = migration(&world, A, &id);
    for word in ["in doubt who owns", "boreal@federation.test", "migration resolve", "must not run here"] {
        assert!(view.progress.detail.contains(word), "{word}: {}", view.progress.detail);
    }
    assert_eq!(ownership(&world, A, &vm), "in-doubt");
    let asked = cicada(&world, A, &["migration", "resolve", &id, "--owner", "here"]);
    assert_eq!(asked.status.code(), Some(2), "{asked:?}");
    assert_eq!(ownership(&world, A, &vm), "in-doubt", "decided without a yes");

    resolve(&world, A, &id, "here");
    let mine = world.vm(A, "twice");
    assert_eq!((mine.ownership.as_str(), mine.epoch), ("here", 3));
    assert!(mine.problem.unwrap().reason.contains("taken back by the operator"));
    // Who, when and what was told outlive a crash.
    world.stop_broker(A, true);
    world.start_broker(A);
    let remarks = migration(&world, A, &id).remarks.join("\n");
    let uid = rustix::process::getuid().as_raw();
    assert!(remarks.contains("override: on ") && remarks.contains(&format!("uid {uid}")), "{remarks}");
    assert!(remarks.contains("RISK: "), "{remarks}");

    // The target comes back with its take-over.
    world.start_broker(B);
    world.wait("both see that the VM has two owners", 90, |w| {
        ownership(w, A, &vm) == "contested" && ownership(w, B, &vm) == "contested"
    });
    for cloud in [A, B] {
        assert!(world.log(cloud).contains("TWO OWNERS"), "{}", world.log(cloud));
        let problem = world.vm(cloud, "twice").problem.unwrap();
        assert!(problem.next_step.contains("--owner here"), "{problem:?}");
        let start = world
            .call(
                cloud,
                &Request::Vm(VmRequest::Start { vm: "twice".into(), unconfirmed: false, by_uid: None }),
            )
            .unwrap_err();
        assert_eq!(start.kind, ProblemKind::Conflict, "{start}");
        let away = Request::Move(MoveRequest::Begin {
            vm: "twice".into(),
            to: None,
            dry_run: false,
            force_stop: false,
        });
        assert_eq!(world.call(cloud, &away).unwrap_err().kind, ProblemKind::Conflict);
    }
    // The receipt came, and says what happened besides.
    let (code, receipt, err) = text(&cicada(&world, A, &["migration", "receipt", &id]));
    assert_eq!(code, Some(0), "{err}");
    assert!(receipt.contains("CONTESTED"), "{receipt}");
    // It stays contested over a restart.
    world.stop_broker(A, true);
    world.start_broker(A);
    assert_eq!(ownership(&world, A, &vm), "contested");

    // They settle it: the target's copy counts.
    resolve(&world, A, &id, "there");
    assert_eq!(ownership(&world, A, &vm), "given-up");
    assert_eq!(world.vm(A, "twice").epoch, 1);
    world.wait("the target learns it", 90, |w| ownership(w, B, &vm) == "here");
    // And it can come home as if nothing had been.
    wait_online(&world);
    world.move_vm(B, "twice", "alpine");
    for _ in 0..2 {
        assert_eq!((ownership(&world, A, &vm).as_str(), world.vm(A, "twice").epoch), ("here", 3));
        // What was decided once does not happen again.
        world.stop_broker(A, true);
        world.start_broker(A);
    }
}

#[test]
fn what_a_target_says_late_ends_an_override_well_where_it_can() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let mut world = World::start(&["alpine", "boreal"]);

    // Taken back, and the target never had it.
    let back = vm(&world, "back");
    let id = in_doubt(&mut world, &back, true);
    resolve(&world, A, &id, "here");
    world.start_broker(B);
    world.wait("the target promised never to run it", 90, |w| w.vm(A, "back").problem.is_none());
    // Whom it binds in favour of keeps it: at the target, a file for whatever a member hands over would be
    // a file for each.
    let (code, out, err) = text(&cicada(&world, A, &["migration", "receipt", &id]));
    assert_eq!(code, Some(0), "{err}");
    let kept: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(kept["kind"], "return");
    assert!(migration(&world, A, &id).remarks[0].contains("no harm was done"));
    wait_online(&world);
    world.move_vm(A, "back", "boreal");

    // Left to the target, and the target had it.
    let left = vm(&world, "left");
    let id = in_doubt(&mut world, &left, false);
    resolve(&world, A, &id, "there");
    assert_eq!(ownership(&world, A, &left), "given-up");
    world.start_broker(B);
    world.wait("its receipt comes", 90, |w| cicada(w, A, &["migration", "receipt", &id]).status.success());
    assert_eq!(
        (ownership(&world, A, &left).as_str(), ownership(&world, B, &left).as_str()),
        ("given-up", "here")
    );

    // Left to the target, which never had it: the copy here is the only one.
    let only = vm(&world, "only");
    let id = in_doubt(&mut world, &only, true);
    resolve(&world, A, &id, "there");
    world.start_broker(B);
    world.wait("it is here again", 90, |w| ownership(w, A, &only) == "here");
    assert_eq!(world.vm(A, "only").epoch, 3);

    // Nothing is in doubt any more.
    let settled = cicada(&world, A, &["migration", "resolve", &id, "--owner", "here", "--yes"]);
    assert_eq!(settled.status.code(), Some(4), "{settled:?}");
}

/// Bytes of a record as a failing disk may leave them.
fn spoilt(good: &[u8]) -> [Vec<u8>; 4] {
    let mut flipped = good.to_vec();
    flipped[good.len() / 2..good.len() / 2 + 8].fill(0xff);
    [good[..good.len() / 2].to_vec(), Vec::new(), vec![0; good.len()], flipped]
}

#[test]
fn a_damaged_record_keeps_no_other_vm_down_and_its_own_is_never_run() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let mut world = World::start(&["alpine", "boreal"]);
    let (good, bad) = (vm(&world, "good"), vm(&world, "bad"));
    let path = record(&world, A, &bad);
    let intact = std::fs::read(&path).unwrap();
    let disks =
        |w: &World| w.vm_files(A).into_iter().filter(|p| p.extension().is_some_and(|e| e == "qcow2")).count();
    assert_eq!(disks(&world), 2);
    for bytes in spoilt(&intact) {
        world.stop_broker(A, true);
        std::fs::write(&path, bytes).unwrap();
        world.start_broker(A);
        assert_eq!(
            (ownership(&world, A, &good).as_str(), ownership(&world, A, &bad).as_str()),
            ("here", "damaged")
        );
        let (code, _, err) = text(&cicada(&world, A, &["vm", "start", &bad.id.to_string()]));
        assert_eq!(code, Some(8), "{err}");
        assert!(err.contains(&path.display().to_string()) && err.contains("backup"), "{err}");
        // What it needs is not known, so nothing may go.
        let gc = world.call(A, &Request::Content(ContentRequest::RepoGc { dry_run: false })).unwrap_err();
        assert_eq!(gc.kind, ProblemKind::Conflict, "{gc}");
        assert_eq!(disks(&world), 2, "its disks were touched");
    }
    world.stop_broker(A, true);
    let gc = cicada(&world, A, &["repo", "gc"]);
    assert_eq!(gc.status.code(), Some(4), "{gc:?}");
    std::fs::write(&path, &intact).unwrap();
    world.start_broker(A);
    assert_eq!(ownership(&world, A, &bad), "here");

    // At the target of a hand-over in doubt: it cannot say whether it took the VM over.
    let id = in_doubt(&mut world, &bad, false);
    std::fs::remove_file(world.clouds[B].dir.join(format!("data/receipts/{id}.json"))).unwrap();
    let there = record(&world, B, &bad);
    let intact = std::fs::read(&there).unwrap();
    std::fs::write(&there, b"{").unwrap();
    world.start_broker(B);
    world.wait("the source is told why", 60, |w| {
        migration(w, A, &id).progress.detail.contains("record of the VM is damaged")
    });
    assert_eq!(ownership(&world, B, &bad), "damaged");
    let here = cicada(&world, B, &["migration", "resolve", &id, "--owner", "here", "--yes"]);
    assert_eq!(here.status.code(), Some(4), "{here:?}");
    resolve(&world, B, &id, "there");
    world.wait("the source has it back", 60, |w| ownership(w, A, &bad) == "here");
    assert_eq!(world.vm(A, "bad").epoch, 3);
    // The old record, found again, does not run what was promised away; nor is it overwritten.
    world.stop_broker(B, true);
    std::fs::write(&there, &intact).unwrap();
    world.start_broker(B);
    assert_eq!(ownership(&world, B, &bad), "damaged");
    wait_online(&world);
    let away = Request::Move(MoveRequest::Begin {
        vm: "bad".into(),
        to: Some("boreal".into()),
        dry_run: false,
        force_stop: false,
    });
    let refused = world.call(A, &away).unwrap_err();
    assert_eq!(refused.kind, ProblemKind::Refused, "{refused}");
    assert_eq!(std::fs::read(&there).unwrap(), intact);
}

/// Freezes the target in the moment the source gave the VM up, then kills it.
#[test]
fn a_target_killed_in_the_hand_over_leaves_one_owner_or_says_that_there_are_two() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let mut world = World::start(&["alpine", "boreal"]);
    let vm = vm(&world, "cut");
    let path = record(&world, A, &vm);
    let given_up = |path: &Path| std::fs::read(path).is_ok_and(|b| b.windows(8).any(|w| w == b"given-up"));
    let mut id = None;
    // Now and then the receipt is faster than we are.
    for _ in 0..10 {
        let socket = world.socket(A);
        let moving = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let request = Request::Move(MoveRequest::Begin {
                    vm: "cut".into(),
                    to: Some("boreal".into()),
                    dry_run: false,
                    force_stop: false,
                });
                cicada::client::Client::connect(&socket).await?.call(&request, |_| ()).await
            })
        });
        let begun = Instant::now();
        while !given_up(&path) {
            assert!(begun.elapsed() < Duration::from_secs(120), "not given up\n{}", world.log(A));
            std::thread::sleep(Duration::from_micros(200));
        }
        world.signal_broker(B, rustix::process::Signal::STOP);
        // The receipt may be on its way.
        std::thread::sleep(Duration::from_secs(2));
        world.stop_broker(B, true);
        if ownership(&world, A, &vm) == "in-doubt" {
            id = Some(world.vm(A, "cut").migration.unwrap().to_string());
            world.wait("the move is in doubt", 120, |w| {
                migration(w, A, id.as_deref().unwrap()).progress.phase
                    == cicada::interface::MigrationPhase::InDoubt
            });
            resolve(&world, A, id.as_deref().unwrap(), "here");
            let ended = moving.join().unwrap().unwrap_err();
            assert!(ended.reason.contains("taken back by the operator"), "{ended}");
            break;
        }
        moving.join().unwrap().unwrap();
        world.start_broker(B);
        wait_online(&world);
        world.move_vm(B, "cut", "alpine");
    }
    let Some(id) = id else {
        let _ = writeln!(std::io::stderr(), "SKIPPED: the target always answered before it could be stopped");
        return;
    };
    let mine = world.vm(A, "cut");
    assert_eq!(mine.ownership, cicada::interface::VmOwnership::Here);
    world.start_broker(B);
    world.wait("the target said what it knows", 90, |w| {
        !migration(w, A, &id).remarks[0].contains("has not said yet")
    });
    let (a, b) = (ownership(&world, A, &vm), ownership(&world, B, &vm));
    match b.as_str() {
        // It was given back before, so its old copy may be there.
        "nothing" | "given-up" => assert_eq!(a, "here", "{}", world.log(B)),
        _ => {
            world.wait("both know of it", 60, |w| ownership(w, B, &vm) == "contested");
            assert_eq!(a, "contested", "{}", world.log(B));
        }
    }
}
