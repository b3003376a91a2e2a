//! A cloud that cannot start a VM says so before it takes it over, whatever it is that stands in the way.

#[allow(dead_code)]
#[path = "federation/world.rs"]
mod world;

use std::path::Path;

use cicada::interface::{MoveRequest, Reply, Request, VmRequest};
use cicada::interface::{Verdict, VmView};
use cicada::vm::{Firmware, PowerState};
use world::World;

fn adopt(world: &World, name: &str, firmware: Firmware, networks: &[&str], start: bool) -> VmView {
    world.noise_vm(0, name, 300_000, |adopt| {
        adopt.firmware = firmware;
        adopt.networks = networks.iter().map(|n| (*n).to_owned()).collect();
        adopt.start = start;
    })
}

fn moves(world: &World, vm: &str) -> Result<Reply, cicada::interface::Problem> {
    let to = Some("boreal".to_owned());
    world.call(0, &Request::Move(MoveRequest::Begin { vm: vm.into(), to, dry_run: false, force_stop: true }))
}

fn config_check(world: &World, cloud: usize) -> String {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_cicada"))
        .arg("--config")
        .arg(world.clouds[cloud].dir.join("federation.toml"))
        .args(["config", "check"])
        .output()
        .unwrap();
    String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
}

fn nothing_is_left(world: &World) {
    world.wait("nothing is left of it at the target", 20, |w| {
        let rehearsals = w.clouds[1].dir.join("data/rehearsals");
        let empty = |dir: &Path| std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
        w.vm_files(1).is_empty() && empty(&rehearsals)
    });
    assert_eq!(world.vms(1), []);
}

#[test]
fn a_cloud_that_cannot_start_a_vm_does_not_take_it_over() {
    if world::missing_tool() {
        return;
    }
    let _turn = world::turn();
    let mut world = World::prepare(&["alpine", "boreal"], &[], 30);
    let firmware = world.dir.path().join("firmware.fd");
    std::fs::copy("/usr/share/OVMF/OVMF_CODE_4M.fd", &firmware).unwrap();
    world.clouds[1].environment.push(("CICADA_HYPERVISOR__FIRMWARE_CODE".into(), firmware.clone()));
    for cloud in 0..2 {
        world.configure(
            cloud,
            "[[network]]\nname = \"office\"\nkind = \"bridge\"\nbridge = \"cicada-none\"\n[migration]\nstop_timeout_s = 3\n",
        );
        world.start_broker(cloud);
    }
    world.wait_online();

    // A bridge that is not there: said by `config check`, and in the plan.
    assert!(config_check(&world, 1).contains("this host has no bridge cicada-none"));
    adopt(&world, "desk", Firmware::Bios, &["office"], false);
    let plan = world.plan(0, "desk");
    let Verdict::No { reasons } = &plan.candidates[0].verdict else { panic!("{plan:?}") };
    assert!(reasons[0].text.contains("no bridge cicada-none") && reasons[0].code == "start", "{reasons:?}");
    let problem = moves(&world, "desk").unwrap_err();
    assert!(problem.reason.contains("no bridge cicada-none"), "{problem}");
    assert_eq!(world.vm(0, "desk").ownership, cicada::interface::VmOwnership::Here);

    // Firmware that is there, and of which no machine is made: found by starting one.
    adopt(&world, "web", Firmware::Uefi, &["lan"], true);
    world.wait("it runs", 20, |w| w.vm(0, "web").power == PowerState::Running);
    std::fs::write(&firmware, b"no firmware").unwrap();
    let before = world.vm(0, "web");
    let problem = moves(&world, "web").unwrap_err();
    assert!(problem.reason.contains("does not start such a VM"), "{problem}");
    let after = world.vm(0, "web");
    assert_eq!(
        (after.ownership.as_str(), after.power, after.epoch),
        ("here", PowerState::Running, before.epoch)
    );
    nothing_is_left(&world);

    // Firmware that was removed: said in the plan.
    std::fs::remove_file(&firmware).unwrap();
    let plan = world.plan(0, "web");
    let Verdict::No { reasons } = &plan.candidates[0].verdict else { panic!("{plan:?}") };
    assert!(reasons[0].text.contains("firmware.fd was not found"), "{reasons:?}");

    // What no machine here has is refused before the disk is read.
    let refused = world.try_noise_vm(0, "arm", 300_000, |adopt| adopt.architecture = "arm64".into());
    assert!(refused.unwrap_err().reason.contains("no architecture 'arm64'"));
    let refused = world.try_noise_vm(0, "odd", 300_000, |a| a.hardware.cpu_model = Some("none-such".into()));
    assert!(refused.unwrap_err().reason.contains("no CPU model 'none-such'"));

    // All is well again.
    std::fs::copy("/usr/share/OVMF/OVMF_CODE_4M.fd", &firmware).unwrap();
    let Ok(Reply::Migration(moved)) = moves(&world, "web") else { panic!("{}", world.log(0)) };
    assert_eq!(moved.progress.phase, cicada::interface::MigrationPhase::Completed);
    assert_eq!(moved.progress.detail, "the VM runs in boreal@federation.test");
    world.wait("it runs there", 20, |w| w.vm(1, "web").power == PowerState::Running);
    // What stood still is not said to run.
    adopt(&world, "still", Firmware::Bios, &[], false);
    let Ok(Reply::Migration(moved)) = moves(&world, "still") else { panic!("{}", world.log(0)) };
    assert!(moved.progress.detail.ends_with("and does not run"), "{}", moved.progress.detail);
}

/// Paths of sockets are longer than an address holds.
#[test]
fn vms_run_below_a_directory_of_any_depth() {
    if world::missing_tool() {
        return;
    }
    let _turn = world::turn();
    let name = "a-cloud-whose-name-is-about-as-long-as-a-name-may-be";
    let world = World::start(&[name]);
    let vm = adopt(&world, "web", Firmware::Bios, &[], true);
    assert!(vm.console_socket.len() > 107, "{}", vm.console_socket);
    world.wait("it runs", 20, |w| w.vm(0, "web").power == PowerState::Running);
    let stop =
        Request::Vm(VmRequest::Stop { vm: "web".into(), force: true, timeout_s: Some(5), for_host: false });
    world.call(0, &stop).unwrap();
    assert_eq!(world.vm(0, "web").power, PowerState::Stopped);
}

/// What a configuration names and QEMU does not run is known before a VM needs it.
#[test]
fn a_cloud_that_could_start_no_vm_does_not_begin_and_says_why() {
    if world::missing_tool() {
        return;
    }
    let _turn = world::turn();
    let world = World::prepare(&["alpine"], &[], 30);
    world.configure(0, "");
    let firmware = world.dir.path().join("firmware.fd");
    std::fs::write(&firmware, b"no firmware").unwrap();
    let offered =
        std::process::Command::new("qemu-system-x86_64").args(["-machine", "help"]).output().unwrap();
    let offered = String::from_utf8(offered.stdout).unwrap();
    let mut names = offered.lines().filter_map(|line| line.split(' ').next());
    let other_family = names.find(|name| name.starts_with("pc-i440fx-")).unwrap();
    let run = |set: &str, command: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_cicada"))
            .arg("--config")
            .arg(world.clouds[0].dir.join("federation.toml"))
            .args(["--set", set])
            .args(command)
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    for (set, words) in [
        ("hypervisor.cpu_model=none-such", "the CPU model 'none-such' is not offered"),
        // A machine of another family, whose buses have other names.
        (&format!("hypervisor.machine_type={other_family}"), "does not start"),
        (&format!("hypervisor.firmware_vars={}", firmware.display()), "does not start"),
    ] {
        let (code, said) = run(set, &["broker"]);
        assert!(code == Some(10) && said.contains(words), "{set}: {code:?} {said}");
        let (code, said) = run(set, &["config", "check"]);
        assert!(code != Some(0) && said.contains(words), "{set}: {code:?} {said}");
    }
    let (_, said) = run("hypervisor.accelerator=tcg", &["config", "check", "--online"]);
    assert!(said.contains("starts a VM as it is configured"), "{said}");
}
