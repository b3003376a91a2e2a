//! What an operator changes of a VM that is there, with real brokers and QEMU: what is set is what it is started
//! with, what it is asked to end by, and what another cloud gets.

#[allow(dead_code)]
#[path = "federation/world.rs"]
mod world;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cicada::interface::{Request, VmRequest};
use cicada::types::ByteSize;
use cicada::vm::PowerState;
use world::World;

fn cicada(world: &World, cloud: usize, arguments: &[&str]) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_cicada"))
        .arg("--socket")
        .arg(world.socket(cloud))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (output.status.code().unwrap(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

fn done(world: &World, arguments: &[&str]) -> String {
    let (code, said) = cicada(world, 0, arguments);
    assert_eq!(code, 0, "{arguments:?}: {said}\n{}", world.log(0));
    said
}

/// Nothing that boots: its firmware says so on the console, and ignores the power button.
fn adopt(world: &World, name: &str, more: &[&str]) {
    let disk = world.clouds[0].dir.join(format!("{name}.raw"));
    let mut bytes = vec![0; 300_000];
    blake3::Hasher::new().update(name.as_bytes()).finalize_xof().fill(&mut bytes);
    std::fs::write(&disk, bytes).unwrap();
    let disk = disk.display().to_string();
    let adopt = ["vm", "adopt", name, &disk, "--format", "raw", "--firmware", "bios", "--memory", "64M"];
    done(world, &[&adopt[..], more].concat());
}

/// Arguments of the QEMU that runs it.
fn command_line(world: &World, vm: &str) -> String {
    let id = world.vm(0, vm).id;
    let found = Command::new("pgrep").args(["-f", &format!("qemu-system.*{id}")]).output().unwrap();
    let pid = String::from_utf8(found.stdout).unwrap().lines().next().expect("it runs").to_owned();
    String::from_utf8_lossy(&std::fs::read(format!("/proc/{pid}/cmdline")).unwrap()).replace('\0', " ")
}

#[test]
fn what_is_set_is_what_it_is_started_with() {
    let _turn = world::turn();
    if world::missing_tool() {
        return;
    }
    let mut world = World::start(&["alpine"]);
    adopt(&world, "web", &["--start"]);
    adopt(&world, "db", &[]);

    // While it runs: its name at once, its shape at its next start. What it takes of the host is the larger.
    let free = world.status(0).memory_bytes.free;
    let said = done(
        &world,
        &[
            "vm",
            "set",
            "web",
            "--name",
            "mail",
            "--cpus",
            "2",
            "--memory",
            "96M",
            "--description",
            "the mail",
        ],
    );
    assert!(
        said.contains("web is now mail") && said.contains("1 CPUs and 64 MiB until its next start"),
        "{said}"
    );
    assert_eq!(world.status(0).memory_bytes.free, free - (32 << 20));
    assert_eq!(cicada(&world, 0, &["vm", "show", "web"]).0, 3);
    let shown = done(&world, &["vm", "show", "mail"]);
    for text in ["the mail", "1 CPUs and 64 MiB until its next start", "96 MiB"] {
        assert!(shown.contains(text), "{text}: {shown}");
    }
    assert!(
        command_line(&world, "mail").contains("size=64M") || command_line(&world, "mail").contains("-m 64")
    );
    // A broker that was not there when it was started knows it as well.
    world.stop_broker(0, true);
    world.start_broker(0);
    assert_eq!(world.vm(0, "mail").runs_as.map(|s| s.memory), Some(ByteSize::mib(64)));
    done(&world, &["vm", "start", "mail"]);

    // Reboot: the guest is asked, then it may be told.
    let (code, said) = cicada(&world, 0, &["vm", "reboot", "mail", "--timeout", "1s"]);
    assert_eq!((code, said.contains("ignores the power button")), (5, true), "{said}");
    assert_eq!(world.vm(0, "mail").power, PowerState::Running);
    let said = done(
        &world,
        &[
            "vm",
            "reboot",
            "mail",
            "--force",
            "--wait",
            "--wait-for",
            "No bootable device",
            "--wait-timeout",
            "60s",
        ],
    );
    assert!(said.contains("its guest is ready"), "{said}");
    let line = command_line(&world, "mail");
    assert!(line.contains("guest=mail") && line.contains("96"), "{line}");
    assert_eq!(world.vm(0, "mail").runs_as, None);
    let wait = ["vm", "start", "mail", "--wait", "--wait-for", "never", "--wait-timeout", "1s"];
    let (code, said) = cicada(&world, 0, &wait);
    assert_eq!((code, said.contains("runs, but 'never' did not come")), (5, true), "{said}");
    let (code, said) = cicada(&world, 0, &["vm", "reboot", "db"]);
    assert_eq!((code, said.contains("cicada vm start db")), (4, true), "{said}");

    // Its own time to shut down.
    done(&world, &["vm", "set", "mail", "--stop-timeout", "1s"]);
    let begun = Instant::now();
    let (code, said) = cicada(&world, 0, &["vm", "stop", "mail"]);
    assert_eq!((code, said.contains("within 1 s")), (5, true), "{said}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    done(&world, &["vm", "stop", "mail", "--for-host"]);
    assert_eq!(world.vm(0, "mail").power, PowerState::Stopped);

    // What cannot be is refused, with nothing changed.
    for (args, code) in [
        (&["--name", "db"][..], 4),
        (&["--cpus", "0"], 2),
        (&["--cpus", "5"], 5),
        (&["--memory", "1M"], 2),
        (&["--memory", "1T"], 5),
        (&["--description", "two\nlines"], 2),
        (&["--stop-timeout", "2d"], 2),
        (&["--autostart", "perhaps"], 2),
        (&[], 2),
    ] {
        let before = world.vm(0, "mail");
        let (found, said) = cicada(&world, 0, &[&["vm", "set", "mail"][..], args].concat());
        assert_eq!(found, code, "{args:?}: {said}");
        assert_eq!(world.vm(0, "mail"), before);
    }
    assert_eq!(cicada(&world, 0, &["vm", "rename", "mail", "db"]).0, 4);
    done(&world, &["vm", "rename", "mail", "web"]);

    // A VM that was made to be started and does not, since another has the memory: nothing of it is left.
    done(&world, &["vm", "start", "db"]);
    let config = world.clouds[0].dir.join("federation.toml").display().to_string();
    for (name, kind, path) in [
        ("fmt", "format", "boot/efi/EFI/BOOT/BOOTX64.EFI"),
        ("os", "os", "etc/os-release"),
        ("k", "kernel", "boot/vmlinuz"),
    ] {
        let tree = world.dir.path().join(name);
        std::fs::create_dir_all(tree.join(path).parent().unwrap()).unwrap();
        std::fs::write(tree.join(path), name).unwrap();
        let tree = tree.display().to_string();
        let import = ["--config", &config, "component", "import", &tree, "--name", name, "--version", "1"];
        let build = ["--build-dir", "/var/cache/cicada-build"];
        done(&world, &[&import[..], &["--kind", kind], &build].concat());
    }
    let create = ["vm", "create", "big", "--component", "fmt", "--component", "os", "--component", "k"];
    let there = std::fs::read_dir(world.clouds[0].dir.join("data/vms")).unwrap().count();
    // What this host could never give is refused with the figures, before anything is made.
    for (too_much, figures) in [
        (["--memory", "3G"], "all VMs here together may have 4 CPUs and 2 GiB"),
        (["--cpus", "5"], "would need 5 CPUs"),
        (["--user-data", "8T"], "may still be promised"),
    ] {
        let (code, said) = cicada(&world, 0, &[&create[..], &too_much].concat());
        assert!(matches!(code, 5 | 9) && said.contains(figures), "{code} {said}");
    }
    let start = ["--root-size", "256M", "--memory", "2G", "--start"];
    let (code, said) = cicada(&world, 0, &[&create[..], &start].concat());
    assert_eq!((code, said.contains("nothing of it is left")), (5, true), "{said}");
    assert_eq!(cicada(&world, 0, &["vm", "show", "big"]).0, 3);
    assert_eq!(std::fs::read_dir(world.clouds[0].dir.join("data/vms")).unwrap().count(), there);
    let vms = |w: &World| std::fs::read_dir(w.clouds[0].dir.join("data/vms")).unwrap().count();
    let there = vms(&world);
    let disk = world.clouds[0].dir.join("web.raw").display().to_string();
    let late =
        ["vm", "adopt", "big", &disk, "--format", "raw", "--firmware", "bios", "--memory", "2G", "--start"];
    let (code, said) = cicada(&world, 0, &late);
    assert_eq!((code, said.contains("is there all the same")), (5, true), "{said}");
    done(&world, &["vm", "delete", "big", "--yes"]);
    assert_eq!(vms(&world), there);
}

/// As a boot of the machine would: the mark of this one is another's.
fn boot(world: &mut World, mark: &PathBuf) {
    world.stop_broker(0, false);
    for entry in std::fs::read_dir(mark.join("cicada")).or_else(|_| std::fs::read_dir(mark)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let text = std::fs::read_to_string(&path).unwrap();
            let rest = text.split_once('\n').map_or("", |(_, rest)| rest);
            std::fs::write(&path, format!("another-boot\n{rest}")).unwrap();
        }
    }
    world.start_broker(0);
}

#[test]
fn after_a_boot_autostart_decides() {
    let _turn = world::turn();
    if world::missing_tool() {
        return;
    }
    let mut world = World::prepare(&["alpine"], &[], 30);
    world.configure(0, "");
    let runtime = world.dir.path().join("run");
    std::fs::create_dir(&runtime).unwrap();
    world.clouds[0].environment.push(("RUNTIME_DIRECTORY".into(), runtime.clone()));
    world.start_broker(0);
    for (name, autostart) in [("last", "last"), ("always", "always"), ("never", "never")] {
        adopt(&world, name, &[]);
        done(&world, &["vm", "set", name, "--autostart", autostart]);
    }
    done(&world, &["vm", "start", "never"]);
    done(&world, &["vm", "start", "last"]);
    for name in ["never", "last"] {
        done(&world, &["vm", "stop", name, "--for-host", "--force"]);
    }
    // The broker alone, started anew, decides nothing.
    world.stop_broker(0, false);
    world.start_broker(0);
    world.wait("what ran runs again", 30, |w| {
        ["never", "last"].iter().all(|name| w.vm(0, name).power == PowerState::Running)
    });
    assert_eq!(world.vm(0, "always").power, PowerState::Stopped);
    for name in ["never", "last"] {
        done(&world, &["vm", "stop", name, "--for-host", "--force"]);
    }
    boot(&mut world, &runtime);
    world.wait("what is to run does", 30, |w| {
        ["last", "always"].iter().all(|name| w.vm(0, name).power == PowerState::Running)
    });
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(world.vm(0, "never").power, PowerState::Stopped);
}

#[test]
fn disks_grow_and_travel_as_they_are() {
    let _turn = world::turn();
    if world::missing_tool() {
        return;
    }
    let world = World::start(&["alpine", "boreal"]);
    adopt(&world, "web", &["--start"]);
    let (code, said) = cicada(&world, 0, &["vm", "resize", "web", "--root", "8M"]);
    assert_eq!((code, said.contains("cicada vm stop web")), (4, true), "{said}");
    done(&world, &["vm", "stop", "web", "--force"]);
    let size = world.vm(0, "web").root_size;
    done(&world, &["vm", "resize", "web", "--root", "8M", "--user-data", "4M"]);
    done(&world, &["vm", "resize", "web", "--user-data", "6M"]);
    let vm = world.vm(0, "web");
    assert!(size < vm.root_size, "{size}");
    assert_eq!((vm.root_size, vm.user_data_size), (ByteSize::mib(8), ByteSize::mib(6)));
    // Again is nothing new, smaller is refused, more than may be promised as well.
    done(&world, &["vm", "resize", "web", "--root", "8M", "--user-data", "6M"]);
    for (args, code) in [
        (&["--root", "4M"][..], 2),
        (&["--user-data", "1M"], 2),
        (&["--root", "8388609"], 2),
        (&["--root", "15T"], 9),
        (&[], 2),
    ] {
        let (found, said) = cicada(&world, 0, &[&["vm", "resize", "web"][..], args].concat());
        assert_eq!(found, code, "{args:?}: {said}");
    }
    // QEMU reads the larger disk, and finds nothing wrong with it.
    let overlays: Vec<_> =
        world.vm_files(0).into_iter().filter(|p| p.extension().is_some_and(|e| e == "qcow2")).collect();
    for overlay in &overlays {
        let check = Command::new("qemu-img").arg("check").arg(overlay).output().unwrap();
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
    }
    let exported = |cloud: usize, name: &str, more: &[&str]| {
        let file = world.clouds[cloud].dir.join(name);
        let args = [&["vm", "export", "web", file.to_str().unwrap()][..], more].concat();
        let (code, said) = cicada(&world, cloud, &args);
        assert_eq!(code, 0, "{said}");
        std::fs::read(file).unwrap()
    };
    let root = exported(0, "root", &[]);
    assert_eq!((root.len(), exported(0, "user-data", &["--user-data"]).len()), (8 << 20, 6 << 20));
    done(&world, &["vm", "start", "web"]);
    world.wait("it runs", 20, |w| w.vm(0, "web").power == PowerState::Running);

    // To the other cloud and home: the sizes go with it, the operator's wishes stay.
    done(&world, &["vm", "set", "web", "--description", "ours", "--stop-timeout", "1s"]);
    let begun = Instant::now();
    let (code, said) = cicada(&world, 0, &["move", "web", "--to", "boreal"]);
    assert_ne!(code, 0, "a guest that ignores the power button: {said}");
    assert!(begun.elapsed() < Duration::from_secs(45), "its own stop timeout: {:?}", begun.elapsed());
    // The move that was called off lets go of it.
    world.wait("it is free", 20, |w| cicada(w, 0, &["vm", "set", "web", "--stop-timeout", "1s"]).0 == 0);
    let (code, said) = cicada(&world, 0, &["move", "web", "--to", "boreal", "--force-stop"]);
    assert_eq!(code, 0, "{said}\n{}\n{}", world.log(0), world.log(1));
    let there = world.vm(1, "web");
    assert_eq!((there.root_size, there.user_data_size), (ByteSize::mib(8), ByteSize::mib(6)));
    assert_eq!((there.description.as_str(), there.stop_timeout_s), ("", None));
    let (code, said) = cicada(&world, 0, &["vm", "console", "web", "--history"]);
    assert_eq!((code, said.contains("connect to it there")), (4, true), "{said}");
    world
        .call(
            1,
            &Request::Vm(VmRequest::Stop { vm: "web".into(), force: true, timeout_s: None, for_host: false }),
        )
        .unwrap();
    assert!(exported(1, "root", &[]) == root, "the same disk");
    // It grows there, and comes home to a smaller copy of it.
    assert_eq!(cicada(&world, 1, &["vm", "resize", "web", "--root", "16M", "--user-data", "7M"]).0, 0);
    let (code, said) = cicada(&world, 1, &["move", "web", "--to", "alpine"]);
    assert_eq!(code, 0, "{said}\n{}\n{}", world.log(0), world.log(1));
    let home = world.vm(0, "web");
    assert_eq!((home.root_size, home.user_data_size), (ByteSize::mib(16), ByteSize::mib(7)));
    assert_eq!((home.description.as_str(), home.stop_timeout_s), ("ours", Some(1)));
    let again = exported(0, "root-again", &[]);
    assert!(again.len() == 16 << 20 && again.starts_with(&root), "the same disk, and zeros");
}

/// Whom a cloud believes, and who may be in the room, in words that an operator has at hand.
#[test]
fn members_are_named_by_their_clouds_and_keys_by_their_fingerprints() {
    let _turn = world::turn();
    if world::missing_tool() {
        return;
    }
    let world = World::start(&["alpine", "boreal"]);
    let fingerprint = world.status(1).fingerprint;
    let listed = done(&world, &["identity", "list"]);
    assert!(listed.contains("boreal@federation.test") && listed.contains(&fingerprint), "{listed}");
    let trust = |world: &World| world.members(0)[0].trust.to_string();
    done(&world, &["identity", "revoke", "boreal"]);
    assert_eq!(trust(&world), "revoked");
    let (code, said) = cicada(&world, 0, &["identity", "trust", "boreal", "0123-4567-89ab-cdef-0123"]);
    assert_eq!((code, said.contains(&fingerprint)), (6, true), "{said}");
    assert_eq!(cicada(&world, 0, &["identity", "trust", "nowhere", &fingerprint]).0, 3);
    assert_eq!(cicada(&world, 0, &["identity", "trust", "boreal", "0123"]).0, 2);
    assert_eq!(trust(&world), "revoked");
    done(&world, &["identity", "trust", "boreal", &fingerprint]);
    assert_eq!(trust(&world), "trusted");

    // Rooms: a wrong password is no lack of a server, and a domain that nobody serves is told of.
    let dir = &world.clouds[0].dir;
    let config = dir.join("federation.toml").display().to_string();
    let secret = |name: &str, text: &str| {
        use std::os::unix::fs::PermissionsExt;
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path.display().to_string()
    };
    let right = secret("right", &world.account("admin").password);
    let wrong = secret("wrong", "wrong");
    let federation = |password: &str, verb: &[&str]| {
        let owner = ["--owner-jid", "admin@federation.test", "--owner-password-file", password];
        cicada(&world, 0, &[&["--config", &config, "federation"], verb, &owner[..]].concat())
    };
    let (code, said) = federation(&wrong, &["list"]);
    assert_eq!((code, said.contains("check the password of admin@federation.test")), (6, true), "{said}");
    let (code, said) = federation(&right, &["add", "cloud@nowhere.invalid"]);
    assert_eq!(
        (code, said.contains("does not reach an XMPP server of nowhere.invalid")),
        (0, true),
        "{said}"
    );
    let (code, said) = federation(&right, &["add", "carol@federation.test"]);
    assert_eq!((code, said.contains("warning")), (0, false), "{said}");
    // All that a broker needs is there, and a broker that runs is not disturbed.
    let (code, said) = cicada(&world, 0, &["--config", &config, "config", "check", "--online"]);
    assert_eq!((code, said.contains("fault")), (0, false), "{said}");
    assert_eq!(world.status(0).link, cicada::interface::LinkState::Online);
}
