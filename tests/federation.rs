//! The main job for real: two clouds, Prosody, QEMU, components from the distribution's packages.

#[allow(dead_code)]
#[path = "federation/world.rs"]
mod world;

use std::io::Write as _;

use cicada::component::{Kind, Manifest, PackRef};
use cicada::interface::{ContentRequest, MoveRequest, ProblemKind, Reply, Request, VmRequest};
use cicada::interface::{Event, Verdict, VmAdopt, VmCreate};
use cicada::types::ByteSize;
use cicada::vm::Firmware;
use world::{World, capped, components, missing_tool, turn};

const TINY: [&str; 3] = ["format-uefi-gpt", "kernel-tiny", "os-tiny"];

#[test]
fn a_running_vm_moves_with_its_data_and_comes_home_for_next_to_nothing() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let built = components(&TINY);
    let world = World::start(&["alpine", "boreal"]);
    world.push(0, &built, &built.ids);
    let born = world.create_vm(0, "web", &built.ids, 64, true);
    world.wait_booted(0, "web", 120);
    world.guest(0, "web", "dd if=/dev/urandom of=/data/proof bs=1k count=300 2>/dev/null; sha256sum /data/proof >/root/sum; sync");

    // Refusals before anything happens.
    let refused = |request: Request| world.call(0, &request).unwrap_err();
    let to = |member: &str| {
        Request::Move(MoveRequest::Begin {
            vm: "web".into(),
            to: Some(member.into()),
            dry_run: false,
            force_stop: false,
        })
    };
    assert_eq!(refused(to("nowhere")).kind, ProblemKind::NotFound);
    assert_eq!(refused(to("nobody@federation.test")).kind, ProblemKind::NotFound);
    let none =
        Request::Move(MoveRequest::Begin { vm: "none".into(), to: None, dry_run: false, force_stop: false });
    assert_eq!(refused(none).kind, ProblemKind::NotFound);

    // The plan is exact, a dry run changes nothing.
    let plan = world.plan(0, "web");
    assert_eq!(plan.candidates.len(), 1);
    assert_eq!(plan.candidates[0].verdict, Verdict::Yes);
    let whole: u64 = built.ids.iter().map(|id| built.stored_bytes(id)).sum();
    assert_eq!(plan.candidates[0].component_bytes_missing, whole);
    world
        .call(
            0,
            &Request::Move(MoveRequest::Begin {
                vm: "web".into(),
                to: None,
                dry_run: true,
                force_stop: false,
            }),
        )
        .unwrap();
    assert_eq!(world.vm_files(1), Vec::<std::path::PathBuf>::new());

    let mut fractions = Vec::new();
    let request =
        Request::Move(MoveRequest::Begin { vm: "web".into(), to: None, dry_run: false, force_stop: false });
    let reply = world.call_with(0, &request, |event| {
        if let Event::Migration(p) = event {
            fractions.push(p.fraction);
        }
    });
    let Ok(Reply::Migration(moved)) = reply else { panic!("{reply:?}\n{}\n{}", world.log(0), world.log(1)) };
    assert!(fractions.is_sorted(), "progress runs backwards: {fractions:?}");
    assert_eq!(fractions.last(), Some(&1.0));
    let account = &moved.account;
    assert_eq!((account.components_needed, account.components_held, account.components_fetched), (3, 0, 3));
    assert!(account.component_bytes.abs_diff(whole) < 4096, "{} against {whole}", account.component_bytes);
    assert!(account.downtime_ms.is_some());

    // The same VM, there and only there.
    world.wait_booted(1, "web", 120);
    let there = world.vm(1, "web");
    let same = |vm: &cicada::interface::VmView| {
        let what =
            (vm.id, vm.name.clone(), vm.cpus, vm.memory, vm.root_size, vm.user_data_size, vm.nics.clone());
        (what, vm.recipe, vm.cpu_model.clone(), vm.firmware, vm.disk_bus, vm.system_uuid)
    };
    assert_eq!(same(&there), same(&born), "id, name, MAC, CPUs and memory are the same");
    assert_eq!((there.epoch, there.ownership.as_str()), (2, "here"));
    world.guest(1, "web", "sha256sum -c /root/sum");
    let here = world.vm(0, "web");
    assert_eq!(here.ownership, cicada::interface::VmOwnership::GivenUp);
    let start = world
        .call(0, &Request::Vm(VmRequest::Start { vm: "web".into(), unconfirmed: false, by_uid: None }))
        .unwrap_err();
    assert_eq!(start.kind, ProblemKind::Conflict, "{start}");

    // Home again: the repository has learned, and the kept copy is the seed.
    world.guest(1, "web", "echo away > /data/away; sync");
    let home = world.move_vm(1, "web", "alpine");
    assert_eq!((home.account.components_held, home.account.packs_fetched), (3, 0));
    assert!(home.account.wire_bytes < 256 << 10, "the way home took {} bytes", home.account.wire_bytes);
    world.wait_booted(0, "web", 120);
    world.guest(0, "web", "sha256sum -c /root/sum && cat /data/away");
    assert_eq!(world.vm(0, "web").epoch, 3);

    // The brokers restart while the VM runs on.
    world.guest(0, "web", "cp /proc/sys/kernel/random/boot_id /run/before");
    let mut world = world;
    world.stop_broker(0, true);
    world.start_broker(0);
    world.wait("the VM is taken over", 20, |w| w.vm(0, "web").power == cicada::vm::PowerState::Running);
    world.guest(0, "web", "cmp /proc/sys/kernel/random/boot_id /run/before");
}

/// Numbered lines, each to a place of its own on the user-data disk and to the end of a list on the
/// root disk, as fast as the guest can.
const WRITER: &str = r#"dd if=/dev/zero of=/data/live bs=512 count=4096
n=0
while [ $n -lt 4000 ]; do
    n=$((n + 1)); echo $n $(echo $n | sha256sum) >/run/line
    dd if=/run/line of=/data/live bs=512 seek=$((n * 37 % 4096)) count=1 conv=notrunc
    cat /run/line >>/root/list
    [ $((n % 5)) = 0 ] && sync
done
"#;

#[test]
fn a_guest_that_never_stops_writing_stands_still_for_its_changes_only() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let built = components(&TINY);
    let world = World::start(&["alpine", "boreal"]);
    world.push(0, &built, &built.ids);
    world.create_vm(0, "web", &built.ids, 128, true);
    world.wait_booted(0, "web", 120);
    let held = 48u64;
    world.guest(0, "web", &format!("dd if=/dev/urandom of=/data/held bs=1M count={held} 2>/dev/null"));
    world.guest(0, "web", "cp /bin/busybox /root/held; sha256sum /data/held /root/held >/root/sums; sync");
    for line in WRITER.lines() {
        world.guest(0, "web", &format!("echo '{line}' >>/root/writer"));
    }
    world.guest(
        0,
        "web",
        "setsid sh /root/writer >/dev/null 2>&1 & sleep 3; wc -l </root/list >/root/before",
    );

    let account = world.move_vm(0, "web", "boreal").account;
    let read = account.last_scan_bytes.unwrap();
    println!("{read} bytes read in the last look, {:?}", account.phase_ms);
    assert!(read > 0, "the guest wrote until its end");
    assert!(read < held << 20 >> 2, "{read} bytes read again\n{}", world.log(0));

    world.wait_booted(1, "web", 120);
    world.guest(1, "web", "sha256sum -c /root/sums");
    world.guest(1, "web", "[ $(wc -l </root/list) -gt $(cat /root/before) ]");
    // Every line of the list is in its place: the list grew after the line was written.
    world.guest(1, "web", "tr -d '\\0' </data/live | sort >/run/found; sort /root/list >/run/listed");
    world.guest(1, "web", "[ $(comm -23 /run/listed /run/found | wc -l) = 0 ]");
    world.guest(1, "web", "[ $(wc -l </run/found) -ge $(wc -l </run/listed) ]");
}

#[test]
fn only_what_is_missing_travels() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let built = components(&[
        "format-uefi-gpt",
        "kernel-cloud-6.1",
        "os-debian-12-minimal",
        "program-redis",
        "program-nginx",
        "program-jq",
    ]);
    let [format, kernel, os, redis, nginx, jq] = built.ids[..] else { panic!("{:?}", built.ids) };
    // Definitions are built in order of dependency, so the ids may be in another one.
    let name = |id| built.name(&id).split('@').next().unwrap().to_owned();
    let mut by_name: std::collections::BTreeMap<_, _> =
        [format, kernel, os, redis, nginx, jq].into_iter().map(|id| (name(id), id)).collect();
    let mut take = |part: &str| {
        let key = by_name
            .keys()
            .find(|k| k.contains(part))
            .cloned()
            .unwrap_or_else(|| panic!("{part} in {by_name:?}"));
        by_name.remove(&key).unwrap()
    };
    let (a, b, c) = (take("uefi"), take("redis"), take("nginx"));
    let (g, kernel, os) = (take("jq"), take("linux"), take("debian"));

    let world = World::start(&["alpine", "boreal"]);
    world.push(0, &built, &built.ids);
    let create = |name: &str, ids: &[cicada::types::ComponentId]| {
        let request = Request::Vm(VmRequest::Create(VmCreate {
            name: name.parse().unwrap(),
            components: ids.iter().map(ToString::to_string).collect(),
            ordered: false,
            root_size: ByteSize::gib(2),
            user_data_size: ByteSize::mib(32),
            memory: ByteSize::mib(512),
            cpus: 1,
            networks: vec![],
            kernel_command_line: "console=ttyS0".into(),
            start: false,
            hardware: Default::default(),
        }));
        match world.call(0, &request) {
            Ok(Reply::Vm(v)) => *v,
            other => panic!("{other:?}\n{}", world.log(0)),
        }
    };
    let fill = |vm: &cicada::interface::VmView, seed: u8| {
        // User data as a guest would leave it, of incompressible bytes.
        let dir = world.clouds[0].dir.join("data/vms").join(vm.id.to_string()).join("disks-1/user-data.raw");
        let file = std::fs::OpenOptions::new().write(true).open(dir).unwrap();
        let mut bytes = vec![0u8; 4 << 20];
        blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 8 << 20).unwrap();
    };
    let total = |ids: &[cicada::types::ComponentId]| ids.iter().map(|id| built.stored_bytes(id)).sum::<u64>();
    let check = |vm: &str, travels: &[cicada::types::ComponentId], needed: u32| {
        let plan = world.plan(0, vm).candidates.remove(0);
        assert_eq!(plan.component_bytes_missing, total(travels), "{vm}: the plan is exact");
        let account = world.move_vm(0, vm, "boreal").account;
        assert_eq!(account.components_needed, needed);
        assert_eq!(account.components_held, needed - travels.len() as u32);
        let mut names: Vec<_> = travels.iter().map(|id| built.name(id)).collect();
        let mut fetched = account.fetched.clone();
        names.sort();
        fetched.sort();
        assert_eq!(fetched, names, "{vm}: exactly these components travel");
        let payload = total(travels) + account.user_data_bytes + account.root_delta_bytes;
        assert!(account.component_bytes <= total(travels) + 4096);
        // On the wire: what is missing and the user data, and at most 5 % and 256 KiB of framing.
        assert!(
            account.wire_bytes < payload + payload / 20 + (256 << 10),
            "{vm}: {} bytes on the wire for {payload} of content",
            account.wire_bytes
        );
        assert!((4 << 20..5 << 20).contains(&account.user_data_bytes), "{vm}: {}", account.user_data_bytes);
        println!(
            "{vm}: components {}, user data {}, wire {} bytes",
            account.component_bytes, account.user_data_bytes, account.wire_bytes
        );
    };

    // Worst case: the target holds nothing, everything travels.
    let worst = create("worst", &[a, kernel, os, b]);
    fill(&worst, 1);
    check("worst", &[a, kernel, os, b], 4);
    // Average case: the target holds {format, kernel, OS, redis}; of {format, kernel, OS, nginx, jq}
    // only the two programs travel.
    let average = create("average", &[a, kernel, os, c, g]);
    fill(&average, 2);
    check("average", &[c, g], 5);
    // Best case: all of it was seen before, if never together; only user data travels.
    let best = create("best", &[a, kernel, os, b, c, g]);
    fill(&best, 3);
    check("best", &[], 6);
}

#[test]
fn a_cancelled_move_leaves_the_vm_running_and_nothing_behind() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let built = components(&TINY);
    let mut world = World::start(&["alpine", "boreal"]);
    // Slow enough to be caught in the act.
    world.reconfigure(0, &capped("8Mbit"));
    world.push(0, &built, &built.ids);
    world.create_vm(0, "web", &built.ids, 32, true);
    world.wait_booted(0, "web", 120);
    let mover = world.begin_move(0, "web", None);
    let staging = |w: &World| {
        w.migrations(0).into_iter().find(|m| {
            m.progress.phase == cicada::interface::MigrationPhase::Stage && m.progress.bytes_done > 0
        })
    };
    world.wait("it is being staged", 30, |w| staging(w).is_some());
    let id = staging(&world).unwrap().progress.id;
    let busy = world
        .call(
            0,
            &Request::Vm(VmRequest::Stop {
                vm: "web".into(),
                force: false,
                timeout_s: Some(5),
                for_host: false,
            }),
        )
        .unwrap_err();
    assert_eq!(busy.kind, ProblemKind::Conflict);
    world.call(0, &Request::Move(MoveRequest::Cancel { id: id.to_string() })).unwrap();
    let outcome = mover.join().unwrap().unwrap_err();
    assert_eq!(outcome.kind, ProblemKind::Cancelled, "{outcome}");
    assert_eq!(world.vm(0, "web").power, cicada::vm::PowerState::Running);
    world.guest(0, "web", "true");
    world.wait("nothing is left at the target", 20, |w| {
        w.vm_files(1).is_empty() && w.status(1).cpus.free == 4 && w.vms(1).is_empty()
    });
    // And it can still be moved.
    world.move_vm(0, "web", "boreal");
    assert!(!world.log(0).contains("tracking the VM's changes"), "{}", world.log(0));
}

/// A guest that switches itself off while its move is under way and the broker is dead leaves a
/// process that waits. The next broker sees it off, and runs the VM again as it was told to.
#[test]
fn a_broker_that_died_in_the_middle_of_a_move_finds_its_vm_again() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let built = components(&TINY);
    let mut world = World::start(&["alpine", "boreal"]);
    // The move must not be through before the guest has booted again.
    world.reconfigure(0, &capped("512Kbit"));
    world.push(0, &built, &built.ids);
    world.create_vm(0, "web", &built.ids, 32, true);
    world.wait_booted(0, "web", 120);
    world.guest(0, "web", "echo kept >/data/kept; sync");
    let vm = world.vm(0, "web");
    let mover = world.begin_move(0, "web", None);
    world.wait("it is being staged", 30, |w| w.log(0).contains("disks scanned"));
    let boots = || std::fs::read_to_string(&vm.console_log).unwrap().matches("guest ready").count();
    assert_eq!(boots(), 1);
    world.stop_broker(0, true);
    assert!(mover.join().unwrap().is_err());
    let mut console = std::os::unix::net::UnixStream::connect(&vm.console_socket).unwrap();
    std::io::Write::write_all(&mut console, b"\nsync; poweroff -f\n").unwrap();
    std::thread::sleep(std::time::Duration::from_secs(5));
    drop(console);

    world.start_broker(0);
    assert!(world.log(0).contains("took over a running VM"), "its process did not wait\n{}", world.log(0));
    world.wait("the VM runs again", 120, |_| boots() == 2);
    assert_eq!(world.vm(0, "web").power, cicada::vm::PowerState::Running, "{}", world.log(0));
    world.guest(0, "web", "grep kept /data/kept");
    // The move goes on by itself; called off, nothing is left that would hold its process up.
    let moving = |w: &World| w.migrations(0).into_iter().find(|m| !m.progress.ended);
    world.wait("it is moved again", 60, |w| moving(w).is_some());
    let id = moving(&world).unwrap().progress.id.to_string();
    world.call(0, &Request::Move(MoveRequest::Cancel { id })).unwrap();
    world.wait("the move is called off", 60, |w| w.vm(0, "web").migration.is_none());
    world
        .call(
            0,
            &Request::Vm(VmRequest::Stop {
                vm: "web".into(),
                force: false,
                timeout_s: Some(60),
                for_host: false,
            }),
        )
        .unwrap();
    assert_eq!(world.vm(0, "web").power, cicada::vm::PowerState::Stopped);
    assert!(!world.log(0).contains("does not quit"), "{}", world.log(0));
}

#[test]
fn brokers_survive_bad_surroundings() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let built = components(&TINY);
    let mut world = World::start(&["alpine", "boreal"]);
    world.push(0, &built, &built.ids);

    // A second broker on the same repository.
    let mut second = world.spawn_broker(0);
    assert!(!second.wait().unwrap().success());
    assert!(world.log(0).contains("in use") || world.log(0).contains("another broker"), "{}", world.log(0));

    // A recipe that cannot be.
    let missing = world.call(
        0,
        &Request::Content(ContentRequest::RecipeCreate {
            components: vec![built.ids[0].to_string()],
            ordered: false,
            root_size: ByteSize::mib(512),
            kernel_command_line: String::new(),
        }),
    );
    assert_eq!(missing.unwrap_err().kind, ProblemKind::Refused);
    let unknown = world.call(
        0,
        &Request::Content(ContentRequest::ComponentShow { component: "nonsense".into(), entries: false }),
    );
    assert_eq!(unknown.unwrap_err().kind, ProblemKind::NotFound);

    // A damaged pack at the target is noticed when it is needed, and fetched again.
    world.create_vm(0, "one", &built.ids, 0, false);
    world.move_vm(0, "one", "boreal");
    let compositions = world.clouds[1].dir.join("data/repository/compositions");
    for file in std::fs::read_dir(&compositions).unwrap().flatten() {
        std::fs::remove_file(file.path()).unwrap();
    }
    std::fs::remove_dir_all(world.clouds[1].dir.join("data/repository/hot")).unwrap();
    std::fs::create_dir(world.clouds[1].dir.join("data/repository/hot")).unwrap();
    let damaged = largest_file(&world.clouds[1].dir.join("data/repository/packs"));
    let mut bytes = std::fs::read(&damaged).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&damaged, bytes).unwrap();
    world.create_vm(0, "two", &built.ids, 0, false);
    let again = world.move_vm(0, "two", "boreal");
    assert_eq!(again.account.packs_fetched, 1, "{:?}", again.account);

    // The XMPP server dies and comes back.
    world.xmpp.stop();
    world.wait("the loss is noticed", 30, |w| w.status(0).link != cicada::interface::LinkState::Online);
    let offline = world
        .call(0, &Request::Move(MoveRequest::Plan { vm: "one".into(), to: None, all: false }))
        .unwrap_err();
    assert_eq!(offline.kind, ProblemKind::Conflict, "given up VMs are not planned: {offline}");
    world.xmpp.restart();
    world.wait("both are back", 60, |w| {
        w.status(0).link == cicada::interface::LinkState::Online
            && w.members(0).iter().any(|m| {
                m.state == cicada::interface::MemberState::Online
                    && m.trust == cicada::interface::MemberTrust::Trusted
            })
            && w.members(1).iter().any(|m| m.state == cicada::interface::MemberState::Online)
    });
    world.move_vm(1, "two", "alpine");

    // A member that dies is seen gone.
    world.stop_broker(1, true);
    world.wait("it is seen gone", 60, |w| {
        w.members(0).iter().all(|m| m.state == cicada::interface::MemberState::Gone)
    });
    let gone = world.call(
        0,
        &Request::Move(MoveRequest::Begin {
            vm: "two".into(),
            to: Some("boreal".into()),
            dry_run: false,
            force_stop: false,
        }),
    );
    assert_eq!(gone.unwrap_err().kind, ProblemKind::Unavailable);
}

fn largest_file(dir: &std::path::Path) -> std::path::PathBuf {
    let mut best = (0, dir.to_owned());
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            let size = entry.metadata().unwrap().len();
            if entry.path().is_dir() {
                todo.push(entry.path());
            } else if size > best.0 {
                best = (size, entry.path());
            }
        }
    }
    best.1
}

#[test]
fn a_full_disk_at_the_target_ends_the_move_cleanly() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let built = components(&TINY);
    let mut world = World::start(&["alpine", "boreal"]);
    world.push(0, &built, &built.ids);
    world.create_vm(0, "web", &built.ids, 0, false);
    world.stop_broker(1, false);
    let repository = world.clouds[1].dir.join("data/repository");
    std::fs::remove_dir_all(&repository).unwrap();
    let Some(_small) = SmallDisk::mount(&repository, 8) else {
        let _ = writeln!(std::io::stderr(), "SKIPPED: a small file system cannot be mounted here");
        return;
    };
    world.start_broker(1);
    world.wait_online();
    let problem = world
        .call(
            0,
            &Request::Move(MoveRequest::Begin {
                vm: "web".into(),
                to: None,
                dry_run: false,
                force_stop: false,
            }),
        )
        .unwrap_err();
    assert!(problem.reason.contains("no space left") && problem.reason.contains("needed"), "{problem}");
    let vm = world.vm(0, "web");
    assert_eq!((vm.ownership.as_str(), vm.epoch), ("here", 1));
    world.wait("nothing is left at the target", 20, |w| {
        w.vm_files(1).is_empty() && w.status(1).cpus.free == 4
    });
    world
        .call(0, &Request::Vm(VmRequest::Start { vm: "web".into(), unconfirmed: false, by_uid: None }))
        .unwrap();
}

/// `cicada repo check --heal` at a cloud.
fn check_and_heal(world: &World, cloud: usize) -> std::process::Output {
    std::process::Command::new(env!("CARGO_BIN_EXE_cicada"))
        .arg("--socket")
        .arg(world.socket(cloud))
        .args(["repo", "check", "--heal"])
        .output()
        .unwrap()
}

/// A file below `dir` with this extension.
fn some_file(dir: &std::path::Path, extension: &str) -> Option<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).ok()?.map(|e| e.unwrap().path());
    entries
        .filter_map(|path| match path.is_dir() {
            true => some_file(&path, extension),
            false => Some(path).filter(|p| p.extension().is_some_and(|e| e == extension)),
        })
        .min()
}

#[test]
fn damage_is_healed_from_another_member() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let built = components(&TINY);
    let mut world = World::start(&["alpine", "boreal"]);
    world.push(0, &built, &built.ids);
    let repository = world.clouds[0].dir.join("data/repository");
    let spoil = || {
        let pack = some_file(&repository.join("packs"), "pack").unwrap();
        let mut bytes = std::fs::read(&pack).unwrap();
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        std::fs::write(&pack, bytes).unwrap();
    };
    spoil();
    std::fs::remove_file(some_file(&repository.join("manifests"), "manifest").unwrap()).unwrap();
    let alone = check_and_heal(&world, 0);
    let text = String::from_utf8_lossy(&alone.stdout);
    assert_eq!(alone.status.code(), Some(8), "{text}");
    assert!(text.contains("boreal@federation.test does not offer it"), "{text}");

    world.push(1, &built, &built.ids);
    let healed = check_and_heal(&world, 0);
    let text = String::from_utf8_lossy(&healed.stdout);
    assert_eq!(healed.status.code(), Some(0), "{text}{}{}", world.log(0), world.log(1));
    assert!(text.contains(", from boreal@federation.test"), "{text}");
    let again = check_and_heal(&world, 0);
    assert!(!String::from_utf8_lossy(&again.stdout).contains("from boreal"), "nothing is left to heal");
    world.create_vm(0, "web", &built.ids, 0, false);

    // One that shares with nobody gives nothing.
    world.reconfigure(1, "[repository]\nshare_with = []\n");
    spoil();
    let refused = check_and_heal(&world, 0);
    let text = String::from_utf8_lossy(&refused.stdout);
    assert_eq!(refused.status.code(), Some(8), "{text}");
    assert!(text.contains("components are not shared with this cloud"), "{text}");
}

/// A file system of a few MiB, as long as it is held.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(at: &std::path::Path, size_mib: u32) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let options = format!("size={size_mib}m,mode=700");
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(at)
            .status();
        mounted.is_ok_and(|s| s.success()).then(|| Self(at.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_vm_written_out_is_adopted_again_and_boots_as_before() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let built = components(&TINY);
    let world = World::start(&["alpine"]);
    world.push(0, &built, &built.ids);
    world.create_vm(0, "web", &built.ids, 64, true);
    world.wait_booted(0, "web", 120);
    world.guest(0, "web", "dd if=/dev/urandom of=/data/proof bs=1k count=300 2>/dev/null; sha256sum /data/proof >/root/sum; sync");
    world
        .call(
            0,
            &Request::Vm(VmRequest::Stop {
                vm: "web".into(),
                force: false,
                timeout_s: Some(60),
                for_host: false,
            }),
        )
        .unwrap();
    let path = |name: &str| world.dir.path().join(name).display().to_string();
    for (name, format, user_data) in [("web.vmdk", "vmdk", false), ("web-data.qcow2", "qcow2", true)] {
        let (vm, output, format) = ("web".into(), path(name), format.into());
        world.call(0, &Request::Vm(VmRequest::Export { vm, output, format, user_data })).unwrap();
    }
    world.call(0, &Request::Vm(VmRequest::Delete { vm: "web".into(), taken_for: None })).unwrap();
    let adopt = VmAdopt {
        name: "twin".parse().unwrap(),
        disk: path("web.vmdk"),
        user_data: Some(path("web-data.qcow2")),
        format: "auto".into(),
        architecture: "amd64".into(),
        firmware: Firmware::Uefi,
        memory: ByteSize::mib(256),
        cpus: 1,
        networks: vec!["lan".into()],
        share: false,
        dry_run: false,
        start: true,
        hardware: Default::default(),
        nvram: None,
    };
    let reply = world.call(0, &Request::Vm(VmRequest::Adopt(adopt)));
    let Ok(Reply::Adopted(adopted)) = reply else { panic!("{reply:?}\n{}", world.log(0)) };
    // All files of the root are known; what is left is the two file systems' own, what lies on the
    // system partition, and what the guest wrote.
    assert!(adopted.known_bytes > 3 * adopted.residue_bytes, "{adopted:?}");
    world.wait_booted(0, "twin", 120);
    world.guest(0, "twin", "sha256sum -c /root/sum");
}

/// Boots from a BIOS, prints the ready line on the serial port and halts; writes nothing.
fn boot_sector() -> Vec<u8> {
    let mut sector = vec![
        0x31, 0xc0, 0x8e, 0xd8, 0xfc, // xor ax, ax; mov ds, ax; cld
        0xbe, 0x21, 0x7c, // mov si, message
        0xac, 0x84, 0xc0, 0x74, 0x11, // next: lodsb; test al, al; jz halt
        0x88, 0xc3, 0xba, 0xfd, 0x03, // mov bl, al; mov dx, 0x3fd
        0xec, 0xa8, 0x20, 0x74, 0xfb, // wait: in al, dx; test al, 0x20; jz wait
        0x88, 0xd8, 0xb2, 0xf8, 0xee, 0xeb, 0xea, // mov al, bl; mov dl, 0xf8; out dx, al; jmp next
        0xf4, 0xeb, 0xfd, // halt: hlt; jmp halt
    ];
    sector.extend_from_slice(cicada::broker::READY_LINE.as_bytes());
    sector.extend_from_slice(b"\r\n");
    sector.resize(510, 0);
    sector.extend_from_slice(&[0x55, 0xaa]);
    sector
}

/// Bytes that do not compress and differ by `seed`.
fn noise(seed: u8, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut out);
    out
}

/// A component of one pack of noise, bound to a name.
fn noise_component(dir: &std::path::Path, content: &[u8]) -> world::Built {
    let repository = cicada::repository::Repository::create(&dir.join("made")).unwrap();
    let mut writer = repository.pack_writer().unwrap();
    writer.append(&mut &*content, content.len() as u64).unwrap();
    let (id, size_bytes) = writer.finish().unwrap().unwrap();
    let pack = PackRef { id, size_bytes, package: "noise".into(), package_version: "1".into() };
    let manifest = Manifest {
        name: "noise".into(),
        version: "1".into(),
        kind: Kind::Program,
        architecture: "amd64".into(),
        origin: "a test".into(),
        licences: Vec::new(),
        requires: Vec::new(),
        conflicts: Vec::new(),
        packs: vec![pack],
        entries: Vec::new(),
        fragments: Vec::new(),
    };
    let ids = vec![repository.put_manifest(&manifest).unwrap()];
    world::Built { repository, ids }
}

#[test]
fn an_adopted_disk_boots_moves_and_is_the_same_disk_everywhere() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let world = World::start(&["alpine", "boreal"]);
    let known = noise(1, 6 << 20);
    let built = noise_component(world.dir.path(), &known);
    // Both clouds hold the content, neither has seen the disk.
    world.push(0, &built, &built.ids);
    world.push(1, &built, &built.ids);
    let private = noise(2, 900_000);
    let mut disk = boot_sector();
    disk.resize(1 << 20, 0);
    disk.extend_from_slice(&known);
    disk.resize(20 << 20, 0);
    disk.extend_from_slice(&private);
    disk.resize(40 << 20, 0);
    let data = noise(3, 100_000);
    let path = |name: &str| world.dir.path().join(name).display().to_string();
    std::fs::write(path("disk.raw"), &disk).unwrap();
    std::fs::write(path("data.raw"), &data).unwrap();
    let adopt = VmAdopt {
        name: "old".parse().unwrap(),
        disk: path("disk.raw"),
        user_data: Some(path("data.raw")),
        format: "raw".into(),
        architecture: "amd64".into(),
        firmware: Firmware::Bios,
        memory: ByteSize::mib(64),
        cpus: 1,
        networks: vec!["lan".into()],
        share: false,
        dry_run: true,
        start: false,
        hardware: Default::default(),
        nvram: None,
    };

    // A dry run tells and changes nothing.
    let tried = world.call(0, &Request::Vm(VmRequest::Adopt(adopt.clone()))).unwrap();
    let Reply::Adopted(tried) = tried else { panic!("{tried:?}") };
    assert_eq!((tried.known_bytes, tried.packs, &tried.vm), (6 << 20, 1, &None));
    assert_eq!((tried.boots.as_str(), tried.what.as_str()), ("BIOS", "a boot sector, no partition table"));
    let lost = |words: &str| tried.notes.iter().any(|n| n.contains("do not come along") && n.contains(words));
    assert!(lost("UUID") && lost("--mac") && lost("--cpu-model"), "{:?}", tried.notes);
    // Asked to start in another way, it says so; what only its name calls a disk is not believed.
    let uefi = VmAdopt { firmware: Firmware::Uefi, ..adopt.clone() };
    let Ok(Reply::Adopted(uefi)) = world.call(0, &Request::Vm(VmRequest::Adopt(uefi))) else { panic!() };
    assert!(uefi.notes[0].contains("--firmware bios"), "{:?}", uefi.notes);
    let guessed = VmAdopt { format: "auto".into(), ..adopt.clone() };
    let refused = world.call(0, &Request::Vm(VmRequest::Adopt(guessed))).unwrap_err();
    assert!(
        refused.kind == ProblemKind::BadRequest && refused.to_string().contains("--format raw"),
        "{refused}"
    );
    assert_eq!(world.vms(0).len() + world.vm_files(0).len(), 0);

    let adopt = VmAdopt { dry_run: false, ..adopt };
    let mut phases: Vec<String> = Vec::new();
    let reply = world.call_with(0, &Request::Vm(VmRequest::Adopt(adopt.clone())), |event| {
        if let Event::Progress { phase, .. } = event
            && phases.last() != Some(&phase)
        {
            phases.push(phase);
        }
    });
    let Ok(Reply::Adopted(adopted)) = reply else { panic!("{reply:?}\n{}", world.log(0)) };
    assert_eq!(phases, ["read", "index", "match", "compose", "write", "verify", "user-data"]);
    assert_eq!((adopted.known_bytes, adopted.residue_bytes), (tried.known_bytes, tried.residue_bytes));
    let taken = world.call(0, &Request::Vm(VmRequest::Adopt(adopt.clone()))).unwrap_err();
    assert_eq!(taken.kind, ProblemKind::Conflict);

    let export = |cloud: usize, name: &str, user_data: bool| {
        let output = path(name);
        let request = Request::Vm(VmRequest::Export {
            vm: "old".into(),
            output: output.clone(),
            format: "raw".into(),
            user_data,
        });
        match world.call(cloud, &request) {
            Ok(Reply::Exported(_)) => std::fs::read(output).unwrap(),
            other => panic!("{other:?}\n{}", world.log(cloud)),
        }
    };
    assert!(export(0, "here.raw", false) == disk);
    let existing = Request::Vm(VmRequest::Export {
        vm: "old".into(),
        output: path("here.raw"),
        format: "qcow2".into(),
        user_data: false,
    });
    assert_eq!(world.call(0, &existing).unwrap_err().kind, ProblemKind::Conflict);

    // Its content is there already: what travels is the residue and the list of extents.
    let plan = world.plan(0, "old");
    assert!(plan.candidates[0].component_bytes_missing < 16 << 10, "{plan:?}");
    let moved = world.move_vm(0, "old", "boreal");
    assert_eq!(moved.account.packs_fetched, 1, "{:?}", moved.account);
    assert!(moved.account.wire_bytes < (private.len() + data.len() + (256 << 10)) as u64);
    assert!(export(1, "there.raw", false) == disk, "the disk is another at the target");
    let mut padded = data.clone();
    padded.resize(1 << 20, 0);
    assert!(export(1, "there-data.raw", true) == padded);

    // It starts there as it would have at home.
    let view = world.vm(1, "old");
    assert_eq!(view.firmware, Firmware::Bios);
    world
        .call(1, &Request::Vm(VmRequest::Start { vm: "old".into(), unconfirmed: false, by_uid: None }))
        .unwrap();
    world.wait_booted(1, "old", 120);
    let running = Request::Vm(VmRequest::Export {
        vm: "old".into(),
        output: path("running.raw"),
        format: "raw".into(),
        user_data: false,
    });
    assert_eq!(world.call(1, &running).unwrap_err().kind, ProblemKind::Conflict);
    world
        .call(
            1,
            &Request::Vm(VmRequest::Stop {
                vm: "old".into(),
                force: true,
                timeout_s: Some(5),
                for_host: false,
            }),
        )
        .unwrap();
    let home = world.move_vm(1, "old", "alpine");
    assert_eq!(home.account.packs_fetched, 0);
    assert!(export(0, "home.raw", false) == disk);

    // An operator who leaves in the middle leaves nothing behind.
    std::fs::write(path("large.raw"), noise(4, 300 << 20)).unwrap();
    let compositions = world.clouds[0].dir.join("data/repository/compositions");
    let count = |dir: &std::path::Path| std::fs::read_dir(dir).unwrap().count();
    let before = (world.vm_files(0), count(&compositions));
    let large = VmAdopt { name: "large".parse().unwrap(), disk: path("large.raw"), user_data: None, ..adopt };
    let request = Request::Vm(VmRequest::Adopt(large.clone()));
    let socket = world.socket(0);
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let client = cicada::client::Client::connect(&socket).await.unwrap();
        let writes = tokio::sync::Notify::new();
        let call = client.call(&request, |event| {
            if matches!(event, Event::Progress { phase, .. } if phase == "write") {
                writes.notify_one();
            }
        });
        tokio::select! {
            reply = call => panic!("it was not interrupted: {reply:?}"),
            () = writes.notified() => {}
        }
    });
    world.wait("the name is free again", 60, |w| {
        w.call(0, &Request::Vm(VmRequest::Adopt(VmAdopt { disk: path("nowhere"), ..large.clone() })))
            .is_err_and(|p| p.kind == ProblemKind::NotFound)
    });
    assert_eq!((world.vm_files(0), count(&compositions)), before);
    assert_eq!(world.vms(0).len(), 1);
}
