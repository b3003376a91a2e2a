//! Each VM is a user of its own: what such a user can and cannot do is tried by a process that is one.
//! Neither Landlock nor QEMU's sandbox is around that process, so what stops it is who it is.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cicada::hypervisor::qemu::{QemuConfig, QemuDriver, QemuLack, VmUids, why_shared};
use cicada::hypervisor::{Accelerator, Driver, DriverError, Machine, StopMode};
use cicada::types::VmId;
use cicada::vm::PowerState;
use tempfile::TempDir;

use super::{config, eventually, machine_in, processes_of, qemu};

/// Set for the process that plays a VM's user: what it shall try, a line each.
const TRIES: &str = "CICADA_TEST_TRIES";

/// Does nothing unless run by the test below.
#[test]
fn a_stranger_tries() {
    let Ok(tries) = std::env::var(TRIES) else { return };
    for line in tries.lines() {
        let (verb, object) = line.split_once(' ').unwrap();
        let pid = || rustix::process::Pid::from_raw(object.parse().unwrap()).unwrap();
        let tried = match verb {
            "read" => fs::File::open(object).map(drop),
            "write" => fs::OpenOptions::new().write(true).open(object).map(drop),
            "connect" => UnixStream::connect(object).map(drop),
            "signal" => rustix::process::test_kill_process(pid()).map_err(Into::into),
            // The kernel asks whether one may trace it.
            "trace" => fs::read(format!("/proc/{object}/environ")).map(drop),
            "descriptors" => fs::read_dir(format!("/proc/{object}/fd")).map(drop),
            other => panic!("{other}"),
        };
        let outcome = tried.map_or_else(|e| format!("{:?}", e.kind()), |()| "done".into());
        println!("\ntried {line}: {outcome}");
    }
}

/// The users of a process and its capabilities, as the kernel tells them.
fn status_of(pid: i32) -> BTreeMap<String, Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.map(|(key, v)| (key.into(), v.split_whitespace().map(String::from).collect())).collect()
}

fn uid_of(vm: VmId) -> u32 {
    let uids = status_of(processes_of(vm)[0]).remove("Uid").unwrap();
    assert!(uids.iter().all(|uid| *uid == uids[0]), "{uids:?}");
    uids[0].parse().unwrap()
}

fn ourselves() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Whether VMs have users of their own here; said loudly if not.
fn have_users() -> bool {
    let reason = why_shared(&config());
    if let Some(reason) = &reason {
        assert!(std::env::var_os(INNER).is_none(), "{reason}");
        println!("SKIPPED: {reason}");
    }
    reason.is_none()
}

/// By a process of its own: a child that another test just then forks would have the copy open for writing,
/// and what is open for writing cannot be run.
fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg(from).arg(to).status().unwrap();
    assert!(status.success());
    fs::set_permissions(to, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A directory that everybody may enter, with this very program in it.
fn program() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = dir.path().join("tests");
    copy(&std::env::current_exe().unwrap(), &program);
    (dir, program)
}

/// What comes of `tries`, made by a process that is the user QEMU process `of` is, or by this one.
fn outcomes(program: &Path, of: Option<i32>, tries: &str) -> Vec<String> {
    let mut command = match of {
        None => Command::new(program),
        Some(pid) => {
            let status = status_of(pid);
            let (uid, gid) = (&status["Uid"][0], &status["Gid"][0]);
            let is_in_namespace = fs::read_link(format!("/proc/{pid}/ns/user")).unwrap()
                != fs::read_link("/proc/self/ns/user").unwrap();
            let mut command = Command::new(if is_in_namespace { "nsenter" } else { "setpriv" });
            if is_in_namespace {
                command.arg(format!("--user=/proc/{pid}/ns/user")).args(["--setuid", uid, "--setgid", gid]);
            } else {
                command.args(["--reuid", uid, "--regid", gid, "--clear-groups"]);
            }
            command.arg(program);
            command
        }
    };
    command.args(["--exact", "users::a_stranger_tries", "--nocapture"]).env(TRIES, tries).current_dir("/");
    let output = command.stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stdout));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().filter_map(|line| line.strip_prefix("tried ")).map(String::from).collect()
}

/// Two VMs are two users, neither the broker's, without capabilities or groups; and such a user gets at
/// nothing of the broker or the other VM, though the same attempts by the broker's user succeed.
#[tokio::test(flavor = "multi_thread")]
async fn a_vms_user_gets_at_nothing_of_the_broker_or_another_vm() {
    let Some((driver, dir)) = qemu().await else { return };
    if !have_users() {
        return;
    }
    let data = dir.path().join("data");
    cicada::config::load_or_create_identity(&data).unwrap();
    let key = cicada::config::identity_path(&data);
    let api = data.join("cicada.sock");
    let _listener = cicada::api::bind(&api).await.unwrap();
    let (one, other) = (machine_in(&data), machine_in(&data));
    for machine in [&one, &other] {
        driver.start(machine).await.unwrap();
    }
    let [pid, other_pid] = [&one, &other].map(|machine| processes_of(machine.spec.id)[0]);
    let (uid, other_uid) = (uid_of(one.spec.id), uid_of(other.spec.id));
    assert!(uid != other_uid && uid != ourselves() && other_uid != ourselves(), "{uid}, {other_uid}");
    for pid in [pid, other_pid] {
        let status = status_of(pid);
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(status[set], ["0000000000000000"], "{set}");
        }
        assert_eq!(status["NoNewPrivs"], ["1"]);
        if driver.features().accelerator == Accelerator::Tcg {
            assert!(status["Groups"].is_empty(), "{:?}", status["Groups"]);
        }
        assert_ne!(status["Gid"][0], rustix::process::getegid().as_raw().to_string());
    }

    let files = |machine: &Machine| {
        let disks = [&machine.root_disk, machine.user_data_disk.as_ref().unwrap(), &machine.firmware_vars];
        let log = machine.state_dir.join("console.log");
        disks.into_iter().cloned().chain([log]).collect::<Vec<_>>()
    };
    let mut tries = format!("read {}\nconnect {}\n", key.display(), api.display());
    for path in files(&one).iter().chain(&files(&other)) {
        tries += &format!("read {0}\nwrite {0}\n", path.display());
    }
    for machine in [&one, &other] {
        for name in ["con.sock", "qga.sock", "qmp.sock"] {
            tries += &format!("connect {}\n", machine.state_dir.join(name).display());
        }
    }
    let into = |pid: u32| format!("signal {pid}\ntrace {pid}\ndescriptors {pid}\n");
    tries += &into(std::process::id());
    let (_programs, program) = program();
    let ours = outcomes(&program, None, &tries);
    let count = tries.lines().count();
    assert_eq!(ours.iter().filter(|line| line.ends_with(": done")).count(), count, "{ours:?}");
    let own = outcomes(&program, Some(other_pid), &into(other_pid as u32));
    assert!(own.len() == 3 && own.iter().all(|line| line.ends_with(": done")), "it is that user: {own:?}");
    tries += &into(other_pid as u32);
    // A broker makes the directory 0700. An operator may have made it before, and wider: the key, the
    // sockets and what is in vms/ are closed by themselves. Here vms/ is the machine's own directory.
    for mode in [0o700, 0o755] {
        fs::set_permissions(&data, fs::Permissions::from_mode(mode)).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
        for machine in [&one, &other] {
            let home = machine.state_dir.parent().unwrap();
            fs::set_permissions(home, fs::Permissions::from_mode(0o700)).unwrap();
        }
        let theirs = outcomes(&program, Some(pid), &tries);
        assert_eq!(theirs.len(), count + 3);
        for line in theirs {
            // Where /proc hides others' processes, they are not even there.
            let is_of_proc = ["trace", "descriptors"].iter().any(|verb| line.starts_with(verb));
            let is_hidden = is_of_proc && line.ends_with(": NotFound");
            assert!(is_hidden || line.ends_with(": PermissionDenied"), "{mode:o}: {line}");
        }
    }
    for machine in [&one, &other] {
        driver.stop(machine.spec.id, StopMode::Forced).await.unwrap();
        for path in files(machine) {
            fs::read(path).unwrap();
        }
        driver.undefine(machine.spec.id).await.unwrap();
        assert!(!machine.state_dir.exists());
    }
}

/// A new broker finds who runs, by the same user, and others do not take that user meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn users_are_kept_over_a_restart_of_the_broker() {
    let Some((_, dir)) = qemu().await else { return };
    if !have_users() {
        return;
    }
    let (one, other) = (machine_in(dir.path()), machine_in(dir.path()));
    let driver = QemuDriver::open(config()).await.unwrap();
    driver.start(&one).await.unwrap();
    let uid = uid_of(one.spec.id);
    drop(driver);
    // A range of just that user, and the next.
    let range = VmUids::Range { first: uid, last: uid };
    let Some(driver) = with_range(range).await else { return };
    driver.define(&one).await.unwrap();
    assert_eq!((driver.state(one.spec.id).unwrap(), uid_of(one.spec.id)), (PowerState::Running, uid));
    let error = driver.start(&other).await.unwrap_err();
    assert!(
        matches!(&error, DriverError::Run { source, .. } if source.to_string().contains("widen")),
        "{error:?}"
    );
    assert_eq!(driver.state(other.spec.id).unwrap(), PowerState::Stopped);
    driver.stop(one.spec.id, StopMode::Forced).await.unwrap();
    driver.start(&other).await.unwrap();
    assert_eq!(uid_of(other.spec.id), uid);
    driver.stop(other.spec.id, StopMode::Forced).await.unwrap();
}

/// A driver with a range whose only user may be taken right now, as it is tried out when it opens.
async fn with_range(vm_uids: VmUids) -> Option<QemuDriver> {
    match QemuDriver::open(QemuConfig { vm_uids, ..config() }).await {
        Ok(driver) => Some(driver),
        Err(DriverError::Lacks(reason)) if reason.to_string().contains("gid") => {
            println!("SKIPPED: groups are lent by other numbers than users: {reason}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// VMs that an earlier broker started as its own user, or that are told to be, are that user; a range
/// that cannot be is refused with the reason.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_may_be_the_brokers_user_by_choice_alone() {
    let Some((_, dir)) = qemu().await else { return };
    let machine = machine_in(dir.path());
    let vm = machine.spec.id;
    let driver = QemuDriver::open(QemuConfig { vm_uids: VmUids::Off, ..config() }).await.unwrap();
    driver.start(&machine).await.unwrap();
    assert_eq!(uid_of(vm), ourselves());
    drop(driver);
    let driver = QemuDriver::open(config()).await.unwrap();
    driver.define(&machine).await.unwrap();
    assert_eq!((driver.state(vm).unwrap(), uid_of(vm)), (PowerState::Running, ourselves()));
    driver.stop(vm, StopMode::Forced).await.unwrap();
    driver.start(&machine).await.unwrap();
    assert_eq!(uid_of(vm) == ourselves(), why_shared(&config()).is_some());
    driver.stop(vm, StopMode::Forced).await.unwrap();

    let somebodys = VmUids::Range { first: 1, last: 9 };
    let refused = QemuDriver::open(QemuConfig { vm_uids: somebodys, ..config() }).await.err();
    let Some(DriverError::Lacks(lack)) = refused else { panic!("{refused:?}") };
    let Some(QemuLack::Users { reason }) = lack.downcast_ref() else { panic!("{lack}") };
    assert!(reason.ends_with("is one of 1-9"), "{reason}");
    let off = QemuConfig { vm_uids: VmUids::Off, ..config() };
    assert!(why_shared(&off).unwrap().contains("\"off\""));
}

/// A broker of release 0.1.0 let QEMU make its sockets and open its disks itself. What it left running is
/// found, commanded, watched for changes, and is a user of its own when it is started again.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_an_earlier_release_left_running_is_taken_over() {
    let Some((driver, dir)) = qemu().await else { return };
    let machine = machine_in(dir.path());
    let vm = machine.spec.id;
    fs::create_dir(&machine.state_dir).unwrap();
    let at = |name: &str| machine.state_dir.join(name).display().to_string();
    let disk = |node: &str, path: &Path| {
        let file = serde_json::json!({"driver": "file", "filename": path});
        serde_json::json!({"driver": "raw", "node-name": node, "file": file}).to_string()
    };
    let mut older = Command::new(cicada::hypervisor::find_qemu().unwrap().system);
    older.args(["-uuid", &vm.to_string(), "-nodefaults", "-display", "none", "-machine", "pc-q35-7.2"]);
    older.args(["-chardev", &format!("socket,id=qmp,path={},server=on,wait=off", at("qmp.sock"))]);
    older.args(["-mon", "chardev=qmp,mode=control"]);
    older.args(["-blockdev", &disk("root", &machine.root_disk), "-device", "virtio-blk-pci,drive=root"]);
    let user_data = machine.user_data_disk.as_ref().unwrap();
    older.args(["-blockdev", &disk("user-data", user_data), "-device", "virtio-blk-pci,drive=user-data"]);
    let mut older = older.stdin(Stdio::null()).spawn().unwrap();
    eventually("it has its socket", || machine.state_dir.join("qmp.sock").exists()).await;
    fs::write(machine.state_dir.join("qemu.pid"), "starting\n").unwrap();

    driver.define(&machine).await.unwrap();
    assert_eq!(driver.state(vm).unwrap(), PowerState::Running);
    if driver.features().abilities.contains(&cicada::hypervisor::Ability::TrackChanges) {
        let (period, _) = driver.track_changes(vm, None).await.unwrap();
        let (_, changes) = driver.track_changes(vm, Some(period)).await.unwrap();
        let changes = changes.expect("QEMU took the socket it was sent");
        assert!(changes.root.is_empty() && changes.user_data.is_empty(), "{changes:?}");
    }
    driver.stop(vm, StopMode::Forced).await.unwrap();
    assert!(older.wait().unwrap().success());
    driver.start(&machine).await.unwrap();
    assert_eq!(uid_of(vm) == ourselves(), !driver.features().own_users);
    driver.stop(vm, StopMode::Forced).await.unwrap();
}

/// Set for a run of these tests by another user, where nothing may be skipped.
const INNER: &str = "CICADA_TEST_WITHOUT_ROOT";
/// Somebody every Debian has, whom nobody lends ids.
const SOMEBODY: (&str, u32) = ("daemon", 1);
/// What is run again.
const AGAIN: [&str; 12] = [
    "the_qemu_driver_conforms",
    "twenty_starts_and_stops_leave_nothing",
    "a_guest_boots_talks_and_switches_itself_off",
    "a_forced_stop_keeps_what_the_guest_wrote",
    "what_a_guest_writes_is_told",
    "a_new_driver_takes_over_what_an_earlier_one_started",
    "a_hanging_qemu_is_killed",
    "what_is_behind_a_card_lives_as_long_as_its_vm",
    "users::a_vms_user_gets_at_nothing_of_the_broker_or_another_vm",
    "users::users_are_kept_over_a_restart_of_the_broker",
    "users::a_vm_may_be_the_brokers_user_by_choice_alone",
    "users::a_vm_that_an_earlier_release_left_running_is_taken_over",
];

/// Runs those tests as somebody else. `lent` is what this one finds in `/etc/subuid` and `/etc/subgid`, in
/// a mount namespace of its own; `privileges` are arguments of setpriv.
fn run_as_somebody(lent: &str, privileges: &[&str]) {
    let (dir, program) = program();
    // Who runs it may not see where it was built.
    let link = dir.path().join("cicada");
    copy(Path::new(env!("CARGO_BIN_EXE_cicada")), &link);
    let home = dir.path().join("home");
    fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(SOMEBODY.1), Some(SOMEBODY.1)).unwrap();
    let ids = dir.path().join("lent");
    fs::write(&ids, lent).unwrap();
    // Where there are no such files nothing can be mounted on them.
    let script = "for f in /etc/subuid /etc/subgid; do [ -e $f ] && mount --bind \"$0\" $f || exit 77; done; exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--", "sh", "-c", script]).arg(&ids).arg("setpriv");
    command
        .args([format!("--reuid={}", SOMEBODY.1), format!("--regid={}", SOMEBODY.1)])
        .arg("--clear-groups");
    command.args(privileges).arg("--").arg(&program).args(["--exact", "--nocapture", "--test-threads=2"]);
    command.args(AGAIN).current_dir(dir.path());
    command.env(INNER, "1").env(super::LINK, &link).env("TMPDIR", &home).env("HOME", &home);
    let output = command.output().unwrap();
    if output.status.code() == Some(77) {
        println!("SKIPPED: {}", String::from_utf8_lossy(&output.stderr).trim());
        return;
    }
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains(&format!("{} passed", AGAIN.len())), "{text}");
    for skipped in text.lines().filter(|line| line.contains("SKIPPED")) {
        println!("as another user: {skipped}");
    }
}

fn may_become_somebody() -> bool {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: this needs root");
        return false;
    }
    true
}

/// All of it without root: in namespaces, with ids lent by `/etc/subuid`.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_without_root_has_users_for_its_vms_too() {
    if qemu().await.is_none() || !may_become_somebody() {
        return;
    }
    let lent = format!("{}:{}:65536\n", SOMEBODY.0, 2_120_000_000u32);
    run_as_somebody(&lent, &[]);
}

/// And with the privileges that the systemd unit can give instead, which rule out setuid programs.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_with_two_capabilities_has_users_for_its_vms_too() {
    if qemu().await.is_none() || !may_become_somebody() {
        return;
    }
    let two = "+setuid,+setgid";
    let (inherited, ambient) = (format!("--inh-caps={two}"), format!("--ambient-caps={two}"));
    let bounding = format!("--bounding-set=-all,{two}");
    run_as_somebody("", &[&inherited, &ambient, &bounding, "--no-new-privs"]);
}

/// Nothing is left of a VM's user in the namespace of a broker that dies: the next one ends its VM.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_vms_user_runs_ends_with_it() {
    let Some((driver, dir)) = qemu().await else { return };
    if !have_users() {
        return;
    }
    let machine = machine_in(dir.path());
    driver.start(&machine).await.unwrap();
    let uid = uid_of(machine.spec.id).to_string();
    driver.stop(machine.spec.id, StopMode::Forced).await.unwrap();
    let runs = || {
        let entries = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path().join("status"));
        let texts = entries.filter_map(|path| fs::read_to_string(path).ok());
        texts.filter(|text| text.lines().any(|l| l.starts_with("Uid:") && l.contains(&uid))).count()
    };
    eventually("no process of that user is left", || runs() == 0).await;
}
