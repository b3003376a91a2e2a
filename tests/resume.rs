//! Moves that are cut by the death of a broker go on by themselves, and what came is not sent again.

#[allow(dead_code)]
#[path = "federation/world.rs"]
mod world;

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use cicada::interface::MigrationView;
use cicada::interface::{MoveRequest, Reply, Request};
use world::{World, capped, components, missing_tool, turn};

const TINY: [&str; 3] = ["format-uefi-gpt", "kernel-tiny", "os-tiny"];
const USER_DATA_MIB: u64 = 40;

/// A VM that is off, with user data that does not compress and differs by `seed`.
fn vm_with_data(world: &World, built: &world::Built, name: &str, seed: &str) {
    world.create_vm(0, name, &built.ids, USER_DATA_MIB, false);
    let is_data =
        |path: &&std::path::PathBuf| std::fs::metadata(path).is_ok_and(|m| m.len() == USER_DATA_MIB << 20);
    let files = world.vm_files(0);
    let newest = |p: &&std::path::PathBuf| std::fs::metadata(p).unwrap().modified().unwrap();
    let disk = files.iter().filter(is_data).max_by_key(newest).expect("no user-data disk");
    let mut noise = vec![0; (USER_DATA_MIB << 20) as usize];
    blake3::Hasher::new().update(seed.as_bytes()).finalize_xof().fill(&mut noise);
    let file = std::fs::OpenOptions::new().write(true).open(disk).unwrap();
    file.write_all_at(&noise, 0).unwrap();
}

/// Waits until so much of a move was delivered; returns how much it was.
fn wait_delivered(world: &World, bytes: u64) -> u64 {
    let begun = Instant::now();
    loop {
        let running = world.migrations(0).into_iter().find(|m| !m.progress.ended);
        let done = running.map_or(0, |m| m.progress.bytes_done);
        if done >= bytes {
            return done;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "only {done} bytes of the move came");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What the last try sent, with what was delivered before the cut, is the whole and little more.
fn assert_little_is_sent_again(before_bytes: u64, last: &MigrationView, components_bytes: u64) {
    let a = &last.account;
    let total = components_bytes + (USER_DATA_MIB << 20);
    let sent = before_bytes + a.component_bytes + a.user_data_bytes + a.root_delta_bytes;
    assert!(sent < total + total / 50 + (1 << 20), "{sent} bytes were sent of {total}: {a:?}");
}

#[test]
fn a_move_goes_on_after_either_broker_dies() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let built = components(&TINY);
    let mut world = World::start(&["alpine", "boreal"]);
    world.reconfigure(0, &capped("6M"));
    world.push(0, &built, &built.ids);
    let stored: u64 = built.ids.iter().map(|id| built.stored_bytes(id)).sum();

    // The target dies half-way through the components, and half-way through the user data.
    vm_with_data(&world, &built, "one", "one");
    let moving = world.begin_move(0, "one", Some("boreal"));
    wait_delivered(&world, stored / 2);
    world.stop_broker(1, true);
    world.start_broker(1);
    let before = wait_delivered(&world, stored + (USER_DATA_MIB << 19));
    world.stop_broker(1, true);
    world.start_broker(1);
    let Ok(Reply::Migration(moved)) = moving.join().unwrap() else {
        panic!("the move did not go on\n{}\n{}", world.log(0), world.log(1))
    };
    assert_little_is_sent_again(before, &moved, stored);
    assert_eq!(world.vm(1, "one").ownership, cicada::interface::VmOwnership::Here);

    // The source dies: it begins the move again by itself, and the target has what came.
    vm_with_data(&world, &built, "two", "two");
    let moving = world.begin_move(0, "two", Some("boreal"));
    let before = wait_delivered(&world, USER_DATA_MIB << 19);
    world.stop_broker(0, true);
    assert!(moving.join().unwrap().is_err());
    world.start_broker(0);
    world.wait("the move went on", 90, |w| {
        w.vm(0, "two").ownership == cicada::interface::VmOwnership::GivenUp
    });
    world.wait("it ended", 30, |w| w.migrations(0).iter().all(|m| m.progress.ended));
    let mut all = world.migrations(0);
    all.retain(|m| m.progress.vm.to_string() == "two");
    let [cut, moved] = &all[..] else { panic!("{all:?}") };
    assert!(cut.problem.as_ref().is_some_and(|p| p.to_string().contains("goes on")), "{cut:?}");
    assert!(moved.problem.is_none() && moved.progress.attempt == 1, "{moved:?}");
    assert_little_is_sent_again(before, moved, 0);

    // A cap set on the way holds, and is lifted.
    vm_with_data(&world, &built, "three", "three");
    let moving = world.begin_move(0, "three", Some("boreal"));
    wait_delivered(&world, 1 << 20);
    let id = world.migrations(0).into_iter().find(|m| !m.progress.ended).unwrap().progress.id.to_string();
    let limit = |bytes_per_s| {
        world.call(0, &Request::Move(MoveRequest::Limit { id: id.clone(), bytes_per_s })).unwrap()
    };
    limit(Some(1 << 20));
    std::thread::sleep(Duration::from_secs(2));
    let (from, begun) = (wait_delivered(&world, 0), Instant::now());
    std::thread::sleep(Duration::from_secs(4));
    let rate = (wait_delivered(&world, 0) - from) as f64 / begun.elapsed().as_secs_f64();
    // Progress comes in steps of batches; tests/transfer.rs looks closer.
    assert!(rate < 2.0 * f64::from(1 << 20), "{rate} bytes a second under a cap of 1 MiB/s");
    limit(None);
    assert!(moving.join().unwrap().is_ok());
    let late = world.call(0, &Request::Move(MoveRequest::Limit { id, bytes_per_s: None })).unwrap_err();
    assert!(late.to_string().contains("has ended"), "{late}");

    // Nothing is left of any of it.
    let temporary = |cloud: usize| {
        ["temporary", "incoming"].map(|dir| {
            let dir = world.clouds[cloud].dir.join("data/repository").join(dir);
            std::fs::read_dir(dir).unwrap().count()
        })
    };
    assert_eq!([temporary(0), temporary(1)], [[0, 0]; 2]);
    let roots = world.vm_files(1).iter().filter(|p| p.ends_with("root.qcow2")).count();
    assert_eq!(roots, 3, "{:?}", world.vm_files(1));
}

/// A component as its next point release: one file of one pack has a few other bytes.
fn next_version(built: &world::Built, id: &cicada::types::ComponentId) -> cicada::types::ComponentId {
    use cicada::component::manifest::EntryKind;
    let repository = &built.repository;
    let mut manifest = (*repository.manifest(id).unwrap()).clone();
    let largest = (0..manifest.packs.len()).max_by_key(|n| manifest.packs[*n].size_bytes).unwrap();
    let mut plain = Vec::new();
    let old = manifest.packs[largest].id;
    repository
        .read_pack(&old, &mut |_, run| {
            match run {
                cicada::sparse::Run::Data(bytes) => plain.extend_from_slice(bytes),
                cicada::sparse::Run::Zeros(len) => plain.resize(plain.len() + len as usize, 0),
            }
            Ok(())
        })
        .unwrap();
    let changed = manifest.entries.iter_mut().find_map(|entry| match &mut entry.kind {
        EntryKind::File { size_bytes, hash, pack, offset_bytes }
            if *pack as usize == largest && *size_bytes > 100_000 =>
        {
            let content = &mut plain[*offset_bytes as usize..(*offset_bytes + *size_bytes) as usize];
            content[50_000..50_100].fill(7);
            *hash = cicada::types::Hash::of(content);
            Some(())
        }
        _ => None,
    });
    changed.expect("no large file");
    let mut writer = repository.pack_writer().unwrap();
    writer.append(&mut &plain[..], plain.len() as u64).unwrap();
    manifest.packs[largest].id = writer.finish().unwrap().unwrap().0;
    manifest.version = "2".into();
    repository.put_manifest(&manifest).unwrap()
}

#[test]
fn what_resembles_something_held_travels_as_the_difference() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let built = components(&TINY);
    let world = World::start(&["alpine", "boreal"]);
    let kernel = built.ids.iter().position(|id| built.name(id).starts_with("linux-tiny@")).unwrap();
    let mut newer = built.ids.clone();
    newer[kernel] = next_version(&built, &built.ids[kernel]);
    world.push(0, &built, &built.ids);
    world.push(0, &built, &newer[kernel..=kernel]);
    let whole = built.stored_bytes(&newer[kernel]);

    vm_with_data(&world, &built, "one", "one");
    world.move_vm(0, "one", "boreal");

    // A point release of the kernel.
    let create = |name: &str| {
        let ids = newer.clone();
        world.create_vm(0, name, &ids, 0, false);
    };
    create("released");
    let plan = world.plan(0, "released").candidates.remove(0);
    let missing = plan.component_bytes_missing;
    assert!(plan.deltas_unknown && missing <= whole && plan.packs_missing == 1, "{plan:?} of {whole}");
    let moved = world.move_vm(0, "released", "boreal").account;
    assert!(moved.component_bytes < missing / 10, "{} of {missing}", moved.component_bytes);
    assert_eq!(moved.packs_fetched, 1);

    // Another VM with the same data, from the same member.
    vm_with_data(&world, &built, "one2", "one");
    let twin = world.move_vm(0, "one2", "boreal").account;
    assert_eq!(twin.user_data_bytes, 0, "its blocks are there");
    assert_eq!(twin.component_bytes, 0);
}

#[test]
fn several_members_serve_at_once() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let built = components(&TINY);
    let world = World::start(&["alpine", "boreal", "cedar"]);
    for cloud in [0, 2] {
        world.push(cloud, &built, &built.ids);
    }
    let whole: u64 = built.ids.iter().map(|id| built.stored_bytes(id)).sum();
    world.create_vm(0, "web", &built.ids, 0, false);
    let account = world.move_vm(0, "web", "boreal").account;
    assert!(account.component_bytes <= whole + 4096, "{} of {whole}", account.component_bytes);
    assert!(account.wire_bytes > whole, "what members lent counts, too");
    let log = world.log(1);
    let lent = log.lines().find(|line| line.contains("lent packs that the source needed not send"));
    assert!(lent.is_some_and(|line| line.contains("cedar@federation.test")), "{log}");
}
