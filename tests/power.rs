//! What makes VMs run and stop, with a real broker and QEMU: what an operator said last is what happens.

#[allow(dead_code)]
#[path = "federation/world.rs"]
mod world;

use std::time::Duration;

use cicada::interface::VmView;
use cicada::interface::{Request, VmRequest};
use cicada::vm::PowerState;
use rustix::process::Signal;
use world::World;

/// Long enough for what was to be started again to be started.
const AFTER_ALL: Duration = Duration::from_secs(4);

fn one_cloud(vms: &[&str]) -> Option<World> {
    if world::missing_tool() {
        return None;
    }
    let world = World::start(&["alpine"]);
    for name in vms {
        // Firmware waits for a disk that boots, and ignores the power button.
        world.noise_vm(0, name, 300_000, |adopt| adopt.start = true);
        world.wait("it runs", 20, |w| w.vm(0, name).power == PowerState::Running);
    }
    Some(world)
}

fn stop(vm: &str, force: bool, for_host: bool) -> Request {
    Request::Vm(VmRequest::Stop { vm: vm.into(), force, timeout_s: Some(2), for_host })
}

fn signal_qemu(vm: &VmView, signal: Signal) {
    let found =
        std::process::Command::new("pgrep").args(["-f", &format!("qemu.*{}", vm.id)]).output().unwrap();
    let pids = String::from_utf8(found.stdout).unwrap();
    let pids: Vec<i32> = pids.lines().map(|line| line.parse().unwrap()).collect();
    assert!(!pids.is_empty(), "no hypervisor of {}", vm.name);
    for pid in pids {
        let _ = rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal);
    }
}

fn stays_off(world: &World, vm: &str) {
    std::thread::sleep(AFTER_ALL);
    let power = world.vm(0, vm).power;
    assert!(matches!(power, PowerState::Stopped | PowerState::Crashed), "{power}\n{}", world.log(0));
}

/// Broker and hypervisor die; the broker is back, about to start the VM again, and is told to stop it.
#[test]
fn what_was_stopped_while_it_was_started_again_stays_off() {
    let _turn = world::turn();
    let Some(mut world) = one_cloud(&["web"]) else { return };
    for round in 0..3 {
        let vm = world.vm(0, "web");
        world.stop_broker(0, true);
        signal_qemu(&vm, Signal::KILL);
        world.start_broker(0);
        std::thread::sleep(Duration::from_millis(60 * round));
        let stopped = world.call(0, &stop("web", true, false));
        assert!(stopped.is_ok(), "{stopped:?}");
        stays_off(&world, "web");
        // And after another start of the broker.
        world.stop_broker(0, true);
        world.start_broker(0);
        stays_off(&world, "web");
        let start = Request::Vm(VmRequest::Start { vm: "web".into(), unconfirmed: false, by_uid: None });
        world.call(0, &start).unwrap();
        world.wait("it runs", 20, |w| w.vm(0, "web").power == PowerState::Running);
    }
}

#[test]
fn a_hypervisor_that_a_signal_ended_is_started_again_and_that_is_told() {
    let _turn = world::turn();
    let Some(world) = one_cloud(&["web"]) else { return };
    for signal in [Signal::TERM, Signal::KILL] {
        let before = world.log(0).lines().filter(|line| line.contains("starting it again")).count();
        signal_qemu(&world.vm(0, "web"), signal);
        world.wait("it is to be started again", 20, |w| {
            w.log(0).lines().filter(|line| line.contains("starting it again")).count() > before
        });
        world.wait("it runs again", 30, |w| w.vm(0, "web").power == PowerState::Running);
    }
    assert!(world.log(0).contains("ended by a signal"), "{}", world.log(0));
}

/// A guest that does not listen: a stop that failed changes nothing, one for the host's sake does not wait.
#[test]
fn vms_that_were_stopped_for_the_host_run_again_with_the_broker() {
    let _turn = world::turn();
    let Some(mut world) = one_cloud(&["db", "web"]) else { return };
    assert!(world.call(0, &stop("web", false, false)).is_err());
    assert_eq!(world.vm(0, "web").power, PowerState::Running);
    signal_qemu(&world.vm(0, "web"), Signal::KILL);
    world.wait("it is to run still", 30, |w| w.vm(0, "web").power == PowerState::Running);
    for vm in ["web", "db"] {
        world.call(0, &stop(vm, false, true)).unwrap();
    }
    for vm in ["web", "db"] {
        stays_off(&world, vm);
    }
    // One that its operator starts meanwhile is like any other: what ends it unasked is made up for.
    let start = Request::Vm(VmRequest::Start { vm: "web".into(), unconfirmed: false, by_uid: None });
    world.call(0, &start).unwrap();
    signal_qemu(&world.vm(0, "web"), Signal::KILL);
    world.wait("it ended", 20, |w| w.vm(0, "web").power != PowerState::Running);
    world.wait("it runs again", 30, |w| w.vm(0, "web").power == PowerState::Running);
    world.stop_broker(0, false);
    world.start_broker(0);
    for vm in ["db", "web"] {
        world.wait("it runs again", 30, |w| w.vm(0, vm).power == PowerState::Running);
    }
}

fn cicada(world: &World, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_cicada"));
    command.arg("--socket").arg(world.socket(0)).args(arguments).stdin(std::process::Stdio::null());
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

/// The only copy is not destroyed unasked, and what goes is named.
#[test]
fn a_vm_is_deleted_only_by_who_means_it() {
    let _turn = world::turn();
    let Some(world) = one_cloud(&["db", "web"]) else { return };
    let (code, said) = cicada(&world, &["vm", "delete", "web", "--yes"]);
    assert_eq!((code, said.contains("is running")), (Some(4), true), "{said}");
    let (code, said) = cicada(&world, &["vm", "stop", "--all", "--force"]);
    assert_eq!(code, Some(0), "{said}");
    let order = ["web", "db"].map(|vm| said.find(vm).unwrap_or_else(|| panic!("{vm} is named: {said}")));
    assert!(order.is_sorted(), "the newest first: {said}");
    assert_eq!(cicada(&world, &["vm", "stop", "--all"]).0, Some(0), "nothing runs");
    // Nothing was ever written to this one: nothing is lost that its components do not give again.
    let user_data = world.clouds[0].dir.join("user-data.raw");
    std::fs::write(&user_data, vec![7; 1 << 20]).unwrap();
    let disk = world.clouds[0].dir.join("web.raw");
    let adopt = ["vm", "adopt", "mail", disk.to_str().unwrap(), "--format", "raw", "--firmware", "bios"];
    let (code, said) = cicada(&world, &[&adopt[..], &["--user-data", user_data.to_str().unwrap()]].concat());
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = cicada(&world, &["vm", "delete", "mail"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("is here and nowhere else") && said.contains("1 MiB of user data"), "{said}");
    assert!(said.contains("--yes"), "{said}");
    assert_eq!(world.vm(0, "mail").power, PowerState::Stopped);
    let (code, said) = cicada(&world, &["vm", "delete", "mail", "--yes"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("mail is deleted, with"), "{said}");
    assert_eq!(cicada(&world, &["vm", "show", "mail"]).0, Some(3));
}
