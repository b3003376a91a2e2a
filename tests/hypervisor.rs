//! Both drivers pass the conformance suite; QEMU also keeps its promises about processes, disks,
//! guests and restarts of the broker.

#[path = "hypervisor/guest.rs"]
mod guest;
#[path = "hypervisor/network.rs"]
mod network;
#[path = "hypervisor/users.rs"]
mod users;

use std::fs;
use std::io::Write as _;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cicada::clock::ManualClock;
use cicada::hypervisor::conformance::{self, Bench};
use cicada::hypervisor::fake::{FakeDriver, GuestDisk, Verb};
use cicada::hypervisor::qemu::find_passt;
use cicada::hypervisor::qemu::qmp::Qmp;
use cicada::hypervisor::qemu::{AcceleratorChoice, NetworkBackend, QemuConfig, QemuDriver, QemuLack, VmUids};
use cicada::hypervisor::{
    Ability, DiskFormat, Driver, DriverError, DriverEvent, EventKind, Machine, StopMode, StopReason,
    find_qemu,
};
use cicada::types::{ByteSize, RecipeId, VmId};
use cicada::vm::spec::Nic;
use cicada::vm::{CardModel, DiskBus, Mac, PowerState, VmSpec};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const MIB: u64 = 1 << 20;

/// A machine in `dir` with raw disks, empty unless they are there already.
fn machine_in(dir: &Path) -> Machine {
    machine_with(dir, VmId::random())
}

fn machine_with(dir: &Path, id: VmId) -> Machine {
    let home = dir.join(id.short());
    fs::create_dir_all(&home).unwrap();
    let disk = |name: &str, size_bytes| {
        let path = home.join(name);
        let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        file.unwrap().set_len(size_bytes).unwrap();
        path
    };
    Machine {
        spec: VmSpec {
            id,
            name: format!("vm-{}", id.short()).parse().unwrap(),
            cpus: 1,
            memory: ByteSize::mib(96),
            recipe: RecipeId::of(b""),
            root_size: ByteSize::mib(4),
            user_data_size: ByteSize::mib(1),
            nics: vec![Nic {
                network: "default".into(),
                mac: Mac::derived(id, 0),
                model: Default::default(),
            }],
            architecture: "amd64".into(),
            cpu_model: "qemu64".into(),
            firmware: cicada::vm::Firmware::Uefi,
            disk_bus: Default::default(),
            system_uuid: None,
        },
        root_disk: disk("root.raw", 4 * MIB),
        root_format: DiskFormat::Raw,
        base: None,
        user_data_disk: Some(disk("user-data.raw", MIB)),
        firmware_vars: home.join("vars.fd"),
        state_dir: home.join("run"),
    }
}

/// Where the program lies, for a run by somebody who may not look where it was built.
const LINK: &str = "CICADA_TEST_LINK";

fn config() -> QemuConfig {
    let networks =
        [("default".to_owned(), NetworkBackend::User), ("unplugged".to_owned(), NetworkBackend::None)];
    let link = std::env::var_os(LINK).unwrap_or(env!("CARGO_BIN_EXE_cicada").into());
    let link = Some(link.into());
    QemuConfig { networks: networks.into(), link, ..QemuConfig::default() }
}

fn is_missing(error: &DriverError) -> bool {
    match error {
        DriverError::MissingTool { .. } => true,
        DriverError::Lacks(lack) => matches!(lack.downcast_ref(), Some(QemuLack::Firmware { .. })),
        _ => false,
    }
}

/// A driver and a scratch directory, or None, said loudly, where QEMU or its firmware is missing.
async fn qemu() -> Option<(QemuDriver, TempDir)> {
    match QemuDriver::open(config()).await {
        Ok(driver) => Some((driver, tempfile::tempdir().unwrap())),
        Err(missing) if is_missing(&missing) => {
            let _ = writeln!(std::io::stderr(), "SKIPPED: {missing}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Process ids of the QEMUs of a VM, by their command lines.
fn processes_of(vm: VmId) -> Vec<i32> {
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|b| *b == 0).any(|arg| arg == vm.to_string().as_bytes())
        })
        .collect()
}

fn signal(vm: VmId, signal: rustix::process::Signal) {
    for pid in processes_of(vm) {
        rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal).unwrap();
    }
}

fn kill(vm: VmId) {
    signal(vm, rustix::process::Signal::KILL);
}

/// Waits until `holds`; for things that have no event.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(60), "never: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn the_fake_driver_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let driver = FakeDriver::new(Arc::new(ManualClock::default()));
    let make_machine = || {
        let machine = machine_in(dir.path());
        driver.set_deaf(machine.spec.id, true);
        machine
    };
    let crash = |vm| driver.crash(vm);
    conformance::run(&Bench { driver: &driver, make_machine: &make_machine, crash: &crash }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_qemu_driver_conforms() {
    let Some((driver, dir)) = qemu().await else { return };
    println!("{:?}", driver.features());
    let make_machine = || machine_in(dir.path());
    let crash = |vm| kill(vm);
    conformance::run(&Bench { driver: &driver, make_machine: &make_machine, crash: &crash }).await.unwrap();
}

#[tokio::test]
async fn the_fake_guest_writes_and_verbs_fail_on_demand() {
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::default();
    let driver = FakeDriver::new(Arc::new(clock.clone()));
    let machine = machine_in(dir.path());
    let vm = machine.spec.id;
    driver.fail_next(Verb::Start, 2);
    for _ in 0..2 {
        assert!(matches!(driver.start(&machine).await, Err(DriverError::Injected { .. })));
        assert_eq!(driver.state(vm).unwrap(), PowerState::Stopped);
        assert!(driver.guest_writes(vm, GuestDisk::Root, 0, b"too early").is_err());
    }
    driver.start(&machine).await.unwrap();
    driver.guest_writes(vm, GuestDisk::Root, 4096, b"root").unwrap();
    driver.guest_writes(vm, GuestDisk::UserData, 0, b"data").unwrap();
    assert_eq!(&fs::read(&machine.root_disk).unwrap()[4096..4100], b"root");
    assert_eq!(&fs::read(machine.user_data_disk.as_ref().unwrap()).unwrap()[..4], b"data");
    clock.advance(Duration::from_secs(3));
    let stats = driver.stats(vm).await.unwrap();
    assert_eq!((stats.cpu_time, stats.disk_written), (Duration::from_secs(3), ByteSize(8)));

    let mut console = driver.console(vm).await.unwrap();
    let mut guest = driver.take_guest_console(vm).unwrap();
    guest.write_all(b"login: ").await.unwrap();
    let mut said = [0; 7];
    console.read_exact(&mut said).await.unwrap();
    assert_eq!(&said, b"login: ");

    driver.stop(vm, StopMode::Graceful { timeout: Duration::ZERO, escalate: false }).await.unwrap();
    assert_eq!(driver.state(vm).unwrap(), PowerState::Stopped);
}

/// The operator's promise: nothing is left of a VM that was stopped, however often.
#[tokio::test(flavor = "multi_thread")]
async fn twenty_starts_and_stops_leave_nothing() {
    let Some((driver, dir)) = qemu().await else { return };
    let machine = machine_in(dir.path());
    let vm = machine.spec.id;
    let (mut starting, mut stopping) = (Duration::ZERO, Duration::ZERO);
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    driver.define(&machine).await.unwrap();
    let before = descriptors();
    for _ in 0..20 {
        let begin = Instant::now();
        driver.start(&machine).await.unwrap();
        starting += begin.elapsed();
        assert_eq!(processes_of(vm).len(), 1);
        let begin = Instant::now();
        driver.stop(vm, StopMode::Forced).await.unwrap();
        stopping += begin.elapsed();
        assert!(processes_of(vm).is_empty());
        let mut left: Vec<_> =
            fs::read_dir(&machine.state_dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["console.log", "qemu.log"]);
    }
    eventually("no descriptors are left", || descriptors() <= before).await;
    println!("20 rounds: start {:?}, stop {:?} on average", starting / 20, stopping / 20);
}

/// Whatever its disks are attached to and its cards are, its firmware finds the loader; and the UUID it shows.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_boots_from_every_bus_beside_every_card() {
    let Some((driver, dir)) = qemu().await else { return };
    let cards = driver.features().card_models.clone();
    assert!(DiskBus::ALL.iter().all(|bus| driver.features().disk_buses.contains(bus)));
    assert!(CardModel::ALL.iter().all(|model| cards.contains(model)), "{cards:?}");
    drop(driver);
    for bus in DiskBus::ALL {
        let driver = QemuDriver::open(config()).await.unwrap();
        let mut machine = machine_in(dir.path());
        let vm = machine.spec.id;
        machine.spec.disk_bus = *bus;
        machine.spec.nics = CardModel::ALL
            .iter()
            .zip(0..)
            .map(|(model, n)| Nic { network: "unplugged".into(), mac: Mac::derived(vm, n), model: *model })
            .collect();
        let uuid = "4c4c4544-0044-4710-8035-b3c04f4d3532";
        machine.spec.system_uuid = (*bus != DiskBus::Virtio).then(|| uuid.parse().unwrap());
        fs::write(&machine.root_disk, guest::disk(4 * MIB)).unwrap();
        driver.start(&machine).await.unwrap();
        let log = driver.console_log(vm).unwrap();
        let greets = || fs::read_to_string(&log).unwrap_or_default().contains(guest::GREETING);
        eventually(&format!("the guest greets from {bus}"), greets).await;
        assert_eq!(processes_of(vm).len(), 1, "it is known by its own id");
        assert!(driver.stats(vm).await.unwrap().disk_read.0 > 0, "{bus}");
        // The next driver finds it by what its guest is shown, and not by anything else.
        drop(driver);
        let mut other = machine.clone();
        other.spec.system_uuid = Some("4c4c4544-0044-4710-8035-b3c04f4d3533".parse().unwrap());
        let driver = QemuDriver::open(config()).await.unwrap();
        driver.define(&other).await.unwrap();
        assert!(matches!(driver.stats(vm).await, Err(DriverError::WrongIdentity { .. })), "{bus}");
        drop(driver);
        let driver = QemuDriver::open(config()).await.unwrap();
        driver.define(&machine).await.unwrap();
        driver.stats(vm).await.unwrap();
        driver.stop(vm, StopMode::Forced).await.unwrap();
        driver.undefine(vm).await.unwrap();
    }
}

/// The guest boots from its disk by UEFI, talks on the console, and obeys the power button.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_boots_talks_and_switches_itself_off() {
    let Some((driver, dir)) = qemu().await else { return };
    let machine = machine_in(dir.path());
    let vm = machine.spec.id;
    fs::write(&machine.root_disk, guest::disk(4 * MIB)).unwrap();
    for round in 1..=2 {
        let mut events = driver.events();
        driver.start(&machine).await.unwrap();
        let log = driver.console_log(vm).unwrap();
        let greetings = || fs::read_to_string(&log).unwrap_or_default().matches(guest::GREETING).count();
        eventually("the guest greets on its console", || greetings() == round).await;

        let mut console = driver.console(vm).await.unwrap();
        console.write_all(b"x").await.unwrap();
        let mut echo = [0];
        console.read_exact(&mut echo).await.unwrap();
        assert_eq!(&echo, b"X", "the guest answers in capitals");

        assert!(driver.stats(vm).await.unwrap().disk_read.0 > 0);
        // A paused guest is made to go on, so that it can obey.
        driver.pause(vm).await.unwrap();
        let graceful = StopMode::Graceful { timeout: Duration::from_secs(30), escalate: false };
        driver.stop(vm, graceful).await.unwrap();
        assert_eq!(driver.state(vm).unwrap(), PowerState::Stopped);
        assert!(processes_of(vm).is_empty());
        let mut last = None;
        while let Ok(event) = events.try_recv() {
            last = Some(event.kind);
        }
        assert_eq!(last, Some(EventKind::Stopped { reason: StopReason::Guest }));
    }
}

/// What a guest has written is on disk when a forced stop returns, in either format, and a base
/// shared by two VMs stays as it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_forced_stop_keeps_what_the_guest_wrote() {
    let Some((driver, dir)) = qemu().await else { return };
    let base = dir.path().join("base.raw");
    let content = guest::writing_disk(4 * MIB);
    fs::write(&base, &content).unwrap();
    fs::set_permissions(&base, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();

    let raw = machine_in(dir.path());
    fs::copy(&base, &raw.root_disk).unwrap();
    fs::set_permissions(&raw.root_disk, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let mut machines = vec![raw];
    let tools = find_qemu().unwrap();
    match tools.img() {
        Ok(img) => {
            for _ in 0..2 {
                let mut machine = machine_in(dir.path());
                machine.root_format = DiskFormat::Qcow2;
                machine.base = Some(base.clone());
                let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
                run(Command::new(img).args(create).args([&base, &machine.root_disk]));
                machines.push(machine);
            }
        }
        Err(error) => drop(writeln!(std::io::stderr(), "SKIPPED: overlays, because {error}")),
    }
    for machine in &machines {
        driver.start(machine).await.unwrap();
    }
    for machine in &machines {
        let vm = machine.spec.id;
        let log = driver.console_log(vm).unwrap();
        let greets = || fs::read_to_string(&log).unwrap_or_default().contains(guest::GREETING.trim());
        eventually("the guest has written", greets).await;
        assert!(driver.stats(vm).await.unwrap().disk_written.0 > 0);
        driver.stop(vm, StopMode::Forced).await.unwrap();
        let image = match machine.root_format {
            DiskFormat::Raw => fs::read(&machine.root_disk).unwrap(),
            DiskFormat::Qcow2 => {
                let flat = machine.root_disk.with_extension("flat");
                let img = tools.img().unwrap();
                run(Command::new(img).arg("check").arg(&machine.root_disk));
                let convert = ["convert", "-O", "raw"];
                run(Command::new(img).args(convert).args([&machine.root_disk, &flat]));
                fs::read(flat).unwrap()
            }
        };
        assert_eq!(guest::read_back(image).trim(), guest::WRITTEN);
    }
    assert!(fs::read(&base).unwrap() == content, "the shared base has changed");
}

/// Where two contents of a disk differ and `changes` does not say so.
fn untold(before: &[u8], after: &[u8], changes: &[Range<u64>]) -> Vec<usize> {
    let told = |at: usize| changes.iter().any(|range| range.contains(&(at as u64)));
    (0..before.len()).filter(|at| before[*at] != after[*at] && !told(*at)).collect()
}

/// A machine whose guest writes a file to a small corner of its disk.
fn writer_in(dir: &Path, content: Vec<u8>) -> Machine {
    let machine = machine_in(dir);
    fs::write(&machine.root_disk, content).unwrap();
    machine
}

/// Waits for the end of a VM and says why it ended.
async fn ended(events: &mut tokio::sync::broadcast::Receiver<DriverEvent>) -> EventKind {
    let end = async {
        loop {
            let kind = events.recv().await.unwrap().kind;
            if matches!(kind, EventKind::Stopped { .. } | EventKind::Crashed { .. }) {
                return kind;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(90), end).await.unwrap()
}

const BY_ITSELF: EventKind = EventKind::Stopped { reason: StopReason::Guest };

/// Every byte a guest wrote is in the changes of the period it wrote in.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_writes_is_told() {
    let Some((driver, dir)) = qemu().await else { return };
    if !driver.features().abilities.contains(&Ability::TrackChanges) {
        let _ = writeln!(std::io::stderr(), "SKIPPED: qemu-img is not installed");
        return;
    }
    let machine = writer_in(dir.path(), guest::writing_disk(4 * MIB));
    let vm = machine.spec.id;
    let before = fs::read(&machine.root_disk).unwrap();
    driver.start(&machine).await.unwrap();
    let (since, unknown) = driver.track_changes(vm, None).await.unwrap();
    assert_eq!(unknown, None);
    let log = driver.console_log(vm).unwrap();
    let greets = || fs::read_to_string(&log).unwrap_or_default().contains(guest::GREETING.trim());
    eventually("the guest has written", greets).await;
    let (since, changes) = driver.track_changes(vm, Some(since)).await.unwrap();
    let changes = changes.unwrap();
    let after = fs::read(&machine.root_disk).unwrap();
    assert!(before != after && guest::read_back(after.clone()).trim() == guest::WRITTEN);
    assert_eq!(untold(&before, &after, &changes.root), Vec::<usize>::new());
    assert!(untold(&before, &after, &[]).len() > guest::WRITTEN.len());
    let told: u64 = changes.root.iter().map(|r| r.end - r.start).sum();
    assert!(told < 2 * MIB, "{told} bytes are told of for one small file");
    assert_eq!(changes.user_data, []);
    // It writes no more.
    let idle = driver.track_changes(vm, Some(since)).await.unwrap().1.unwrap();
    assert_eq!((idle.root, idle.user_data), (vec![], vec![]));
    driver.stop(vm, StopMode::Forced).await.unwrap();
    assert!(!machine.state_dir.join("nbd.sock").exists());
}

/// The last period lasts until the guest's end, of its own will or not; the process is gone then.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_writes_before_its_end_is_told() {
    let Some((driver, dir)) = qemu().await else { return };
    if !driver.features().abilities.contains(&Ability::TrackChanges) {
        let _ = writeln!(std::io::stderr(), "SKIPPED: qemu-img is not installed");
        return;
    }
    let machine = writer_in(dir.path(), guest::passing_disk(4 * MIB));
    let vm = machine.spec.id;
    let before = fs::read(&machine.root_disk).unwrap();
    for period in 1..=2 {
        let mut events = driver.events();
        driver.start(&machine).await.unwrap();
        let mut since = None;
        for _ in 0..period {
            since = Some(driver.track_changes(vm, since).await.unwrap().0);
        }
        assert_eq!(ended(&mut events).await, BY_ITSELF);
        assert_eq!(driver.state(vm).unwrap(), PowerState::Stopped);
        assert!(processes_of(vm).is_empty());
        let after = fs::read(&machine.root_disk).unwrap();
        assert!(before != after && guest::read_back(after.clone()).contains(guest::WRITTEN));
        let changes = driver.end_tracking(vm, since).await.unwrap().unwrap();
        assert_eq!(untold(&before, &after, &changes.root), Vec::<usize>::new());
        assert_eq!(driver.end_tracking(vm, since).await.unwrap(), None, "once");
        fs::write(&machine.root_disk, &before).unwrap();
    }
    // What a start forgets.
    let mut events = driver.events();
    driver.start(&machine).await.unwrap();
    let (since, _) = driver.track_changes(vm, None).await.unwrap();
    assert_eq!(ended(&mut events).await, BY_ITSELF);
    driver.start(&machine).await.unwrap();
    driver.stop(vm, StopMode::Forced).await.unwrap();
    assert_eq!(driver.end_tracking(vm, Some(since)).await.unwrap(), None);

    // The power button, while a period lasts.
    fs::write(&machine.root_disk, guest::disk(4 * MIB)).unwrap();
    driver.start(&machine).await.unwrap();
    let (since, _) = driver.track_changes(vm, None).await.unwrap();
    let greetings = || fs::read_to_string(driver.console_log(vm).unwrap()).unwrap_or_default();
    eventually("the guest greets", || greetings().contains(guest::GREETING)).await;
    let mut events = driver.events();
    let graceful = StopMode::Graceful { timeout: Duration::from_secs(30), escalate: false };
    driver.stop(vm, graceful).await.unwrap();
    assert_eq!(ended(&mut events).await, BY_ITSELF);
    assert!(processes_of(vm).is_empty());
    assert!(driver.end_tracking(vm, Some(since)).await.unwrap().is_some());
}

/// A driver that goes away while it tracks leaves nothing the next one would trip over.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_driver_ends_what_an_earlier_one_tracked() {
    let Some((driver, dir)) = qemu().await else { return };
    if !driver.features().abilities.contains(&Ability::TrackChanges) {
        let _ = writeln!(std::io::stderr(), "SKIPPED: qemu-img is not installed");
        return;
    }
    // The guest ends while nobody watches: its process waits for the next driver.
    let machine = writer_in(dir.path(), guest::passing_disk(4 * MIB));
    let vm = machine.spec.id;
    driver.start(&machine).await.unwrap();
    let (since, _) = driver.track_changes(vm, None).await.unwrap();
    drop(driver);
    let written = || guest::has_written(fs::read(&machine.root_disk).unwrap());
    eventually("the guest has written", written).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(processes_of(vm).len(), 1);
    let driver = QemuDriver::open(config()).await.unwrap();
    let mut events = driver.events();
    driver.define(&machine).await.unwrap();
    assert_eq!(driver.state(vm).unwrap(), PowerState::Stopped);
    assert_eq!(ended(&mut events).await, EventKind::Stopped { reason: StopReason::Host });
    assert!(processes_of(vm).is_empty());
    assert_eq!(driver.end_tracking(vm, Some(since)).await.unwrap(), None);

    // The guest runs on: its process is as if nothing had been tracked, and ends with it.
    fs::write(&machine.root_disk, guest::disk(4 * MIB)).unwrap();
    driver.start(&machine).await.unwrap();
    let (since, _) = driver.track_changes(vm, None).await.unwrap();
    driver.track_changes(vm, Some(since)).await.unwrap();
    drop(driver);
    let driver = QemuDriver::open(config()).await.unwrap();
    driver.define(&machine).await.unwrap();
    drop(driver);
    let qmp = Qmp::connect(&machine.state_dir.join("qmp.sock"), |_| ()).await.unwrap();
    let nodes = qmp.execute("query-named-block-nodes", None).await.unwrap().to_string();
    assert!(nodes.contains("user-data") && !nodes.contains("dirty-bitmaps"), "{nodes}");
    assert_eq!(qmp.execute("query-block-exports", None).await.unwrap(), serde_json::json!([]));
    drop(qmp);
    let driver = QemuDriver::open(config()).await.unwrap();
    driver.define(&machine).await.unwrap();
    assert_eq!(driver.track_changes(vm, Some(since)).await.unwrap().1, None);
    driver.stop(vm, StopMode::Forced).await.unwrap();
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A broker that restarts takes its VMs over: by the record, by the process list where it died
/// before the record was complete, and not at all where the process is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_driver_takes_over_what_an_earlier_one_started() {
    let Some((driver, dir)) = qemu().await else { return };
    let machine = machine_in(dir.path());
    let vm = machine.spec.id;
    let record = machine.state_dir.join("qemu.pid");
    driver.start(&machine).await.unwrap();
    let process = processes_of(vm);
    driver.pause(vm).await.unwrap();
    drop(driver);

    let driver = QemuDriver::open(config()).await.unwrap();
    driver.define(&machine).await.unwrap();
    assert_eq!(driver.state(vm).unwrap(), PowerState::Paused);
    driver.start(&machine).await.unwrap();
    assert_eq!(driver.state(vm).unwrap(), PowerState::Running);
    assert_eq!(processes_of(vm), process, "it is the same process");
    drop(driver);

    fs::write(&record, "starting\n").unwrap();
    let driver = QemuDriver::open(config()).await.unwrap();
    let mut events = driver.events();
    driver.define(&machine).await.unwrap();
    assert_eq!(driver.state(vm).unwrap(), PowerState::Running);
    kill(vm);
    let event = tokio::time::timeout(Duration::from_secs(10), events.recv()).await.unwrap().unwrap();
    assert!(matches!(event.kind, EventKind::Crashed { .. }), "{event:?}");
    assert!(!record.exists());

    driver.start(&machine).await.unwrap();
    drop(driver);
    kill(vm);
    eventually("the process is gone", || processes_of(vm).is_empty()).await;
    let driver = QemuDriver::open(config()).await.unwrap();
    driver.define(&machine).await.unwrap();
    assert_eq!(driver.state(vm).unwrap(), PowerState::Crashed);
    assert!(!record.exists());
    driver.start(&machine).await.unwrap();
    driver.stop(vm, StopMode::Forced).await.unwrap();
}

/// Set for the process that plays the broker below: the directory and the id of the VM to start.
const BROKER_DIR: &str = "CICADA_TEST_BROKER_DIR";
const BROKER_VM: &str = "CICADA_TEST_BROKER_VM";

/// Starts a VM and waits to be killed. Does nothing unless run by the test below.
#[tokio::test(flavor = "multi_thread")]
async fn broker_to_be_killed() {
    let (Ok(dir), Ok(vm)) = (std::env::var(BROKER_DIR), std::env::var(BROKER_VM)) else { return };
    let driver = QemuDriver::open(config()).await.unwrap();
    driver.start(&machine_with(Path::new(&dir), vm.parse().unwrap())).await.unwrap();
    println!("\nstarted");
    std::future::pending().await
}

/// kill -9 of the broker and everything in its process group leaves the VM running, and the next
/// broker stops it without a trace.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_survives_the_death_of_its_broker() {
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::CommandExt;
    let Some((driver, dir)) = qemu().await else { return };
    let vm = VmId::random();
    let mut broker = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "broker_to_be_killed", "--nocapture"])
        .envs([(BROKER_DIR, dir.path().to_str().unwrap()), (BROKER_VM, &vm.to_string())])
        .stdout(std::process::Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(broker.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "started"));
    let group = rustix::process::Pid::from_raw(broker.id() as i32).unwrap();
    rustix::process::kill_process_group(group, rustix::process::Signal::KILL).unwrap();
    broker.wait().unwrap();
    assert_eq!(processes_of(vm).len(), 1);

    let machine = machine_with(dir.path(), vm);
    driver.define(&machine).await.unwrap();
    assert_eq!(driver.state(vm).unwrap(), PowerState::Running);
    driver.stop(vm, StopMode::Forced).await.unwrap();
    assert!(processes_of(vm).is_empty());
    driver.undefine(vm).await.unwrap();
    assert!(!machine.state_dir.exists());
}

/// QEMU that hangs is ended all the same, also by a driver that could never talk to it.
#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_qemu_is_killed() {
    let Some((driver, dir)) = qemu().await else { return };
    let machine = machine_in(dir.path());
    let vm = machine.spec.id;
    driver.start(&machine).await.unwrap();
    signal(vm, rustix::process::Signal::STOP);
    let begin = Instant::now();
    driver.stop(vm, StopMode::Forced).await.unwrap();
    assert!(processes_of(vm).is_empty());
    assert_eq!(driver.state(vm).unwrap(), PowerState::Stopped);
    println!("a hanging QEMU was ended after {:?}", begin.elapsed());
}

/// A host that shuts down tells every process to end: that is no crash.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_shuts_down_is_no_crash() {
    let Some((driver, dir)) = qemu().await else { return };
    let machine = machine_in(dir.path());
    let vm = machine.spec.id;
    driver.start(&machine).await.unwrap();
    let mut events = driver.events();
    signal(vm, rustix::process::Signal::TERM);
    let event = tokio::time::timeout(Duration::from_secs(10), events.recv()).await.unwrap().unwrap();
    assert_eq!(event.kind, EventKind::Stopped { reason: StopReason::Host });
    assert_eq!(driver.state(vm).unwrap(), PowerState::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_name_what_to_do() {
    let Some((driver, dir)) = qemu().await else { return };

    // Somebody else has the disk.
    let (first, mut second) = (machine_in(dir.path()), machine_in(dir.path()));
    second.root_disk = first.root_disk.clone();
    driver.start(&first).await.unwrap();
    let refused = driver.start(&second).await;
    assert!(matches!(refused, Err(DriverError::DiskInUse { .. })), "{refused:?}");
    assert_eq!(driver.state(second.spec.id).unwrap(), PowerState::Stopped);
    assert!(processes_of(second.spec.id).is_empty());

    // A disk that is not there: it is named before a QEMU is made.
    let mut no_disk = machine_in(dir.path());
    no_disk.root_disk = dir.path().join("nowhere.raw");
    let error = driver.start(&no_disk).await.unwrap_err();
    assert!(
        error.to_string().contains("cannot open") && error.to_string().contains("nowhere.raw"),
        "{error}"
    );
    assert!(matches!(error, DriverError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound));
    assert_eq!(driver.state(no_disk.spec.id).unwrap(), PowerState::Stopped);
    assert!(processes_of(no_disk.spec.id).is_empty());

    // A disk that QEMU can make nothing of: its own words.
    let mut no_image = machine_in(dir.path());
    no_image.root_format = DiskFormat::Qcow2;
    let error = driver.start(&no_image).await.unwrap_err().to_string();
    assert!(error.contains("exit status: 1") && error.contains("not in qcow2 format"), "{error}");

    // Firmware variables of another build.
    let odd_vars = machine_in(dir.path());
    fs::write(&odd_vars.firmware_vars, "short").unwrap();
    let refused = driver.define(&odd_vars).await;
    assert!(matches!(refused, Err(DriverError::FirmwareVars { found: 5, .. })), "{refused:?}");
    assert!(driver.state(odd_vars.spec.id).is_err());

    // Of sockets a state directory may have longer names than an address holds.
    let mut deep = machine_in(dir.path());
    deep.state_dir = deep.state_dir.join("d".repeat(100));
    let vm = deep.spec.id;
    driver.start(&deep).await.unwrap();
    drop(driver.console(vm).await.unwrap());
    if driver.features().abilities.contains(&Ability::TrackChanges) {
        let (period, _) = driver.track_changes(vm, None).await.unwrap();
        let (_, changes) = driver.track_changes(vm, Some(period)).await.unwrap();
        assert!(changes.is_some(), "what changed is read through a socket there");
    }
    driver.stop(vm, StopMode::Forced).await.unwrap();

    driver.stop(first.spec.id, StopMode::Forced).await.unwrap();
}

#[tokio::test]
async fn a_host_that_lacks_something_is_told_what() {
    let missing = |config: QemuConfig| async move { QemuDriver::open(config).await.err().unwrap() };
    let error = missing(QemuConfig { firmware_code: "/nowhere/code.fd".into(), ..config() }).await;
    assert!(error.to_string().contains("install the package ovmf"), "{error}");
    let Some(_) = qemu().await else { return };
    let error = missing(QemuConfig { system: Some("/nowhere/qemu".into()), ..config() }).await;
    assert!(error.to_string().contains("install the package qemu-system-x86"), "{error}");
    let tcg = AcceleratorChoice::Tcg;
    let error = missing(QemuConfig { machine_type: "pc-q35-1.0".into(), accelerator: tcg, ..config() }).await;
    assert!(error.to_string().contains("pc-q35-7.2"), "{error}");
    println!("{:?}", find_qemu().unwrap());
}

/// What a guest reaches, by whatever packets: the outside, and nothing of this host. And nothing is
/// left when it ends.
#[test]
fn a_guest_on_a_user_network_reaches_the_outside_but_not_this_host() {
    let Some(passt) = find_passt(&QemuConfig::default()) else {
        let _ = writeln!(std::io::stderr(), "SKIPPED: passt is missing: install the package passt");
        return;
    };
    let services = network::Services::open();
    let mut card = network::Card::plug(&passt);
    let outside = network::Outside::make();
    // So long may addresses that are new to the host go unseen.
    std::thread::sleep(Duration::from_millis(1100));
    let mut here =
        vec![[127, 0, 0, 1].into(), [127, 8, 8, 8].into(), [0, 0, 0, 0].into(), [10, 0, 2, 2].into()];
    here.extend(outside.as_ref().map(|outside| outside.ours));
    for address in here {
        assert!(!card.connects(address, services.tcp_port()), "{address}");
        card.says(address, services.udp_port());
    }
    assert!(!services.hears());
    if let Some(outside) = &outside {
        assert!(card.connects(outside.address, 7), "the outside");
        assert!(!card.connects(outside.address, 8), "nobody listens there");
    }
    let behind = children_of(card.process.id() as i32);
    assert_eq!(behind.len(), 1, "passt");
    assert!(card.unplug());
    assert!(!Path::new(&format!("/proc/{}", behind[0])).exists());
}

fn children_of(pid: i32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let children =
        tasks.map(|task| fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default());
    children.flat_map(|c| c.split_whitespace().map(|p| p.parse().unwrap()).collect::<Vec<_>>()).collect()
}

/// Pids of the processes behind the cards of VMs in `dir`, by where their complaints go.
fn links_in(dir: &Path) -> Vec<i32> {
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let is_link = line.split(|b| *b == 0).any(|arg| arg == b"guest-link");
            is_link && fs::read_link(format!("/proc/{pid}/fd/2")).is_ok_and(|log| log.starts_with(dir))
        })
        .collect()
}

/// The process behind a card lives exactly as long as its QEMU: over a restart of the driver, and
/// not after a stop or a crash.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_behind_a_card_lives_as_long_as_its_vm() {
    let Some((driver, dir)) = qemu().await else { return };
    if find_passt(&config()).is_none() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: passt is missing: install the package passt");
        return;
    }
    let machine = machine_in(dir.path());
    let vm = machine.spec.id;
    driver.start(&machine).await.unwrap();
    let before = links_in(dir.path());
    assert_eq!(before.len(), 1);
    drop(driver);
    let driver = QemuDriver::open(config()).await.unwrap();
    driver.define(&machine).await.unwrap();
    assert_eq!(driver.state(vm).unwrap(), PowerState::Running);
    assert_eq!(links_in(dir.path()), before);
    driver.stop(vm, StopMode::Forced).await.unwrap();
    eventually("the link ends with a stop", || links_in(dir.path()).is_empty()).await;
    driver.start(&machine).await.unwrap();
    assert_eq!(links_in(dir.path()).len(), 1);
    kill(vm);
    eventually("the link ends with a crash", || links_in(dir.path()).is_empty()).await;
}

/// Every QEMU has its whole seccomp filter, whatever cards it has.
#[tokio::test(flavor = "multi_thread")]
async fn a_bridged_card_leaves_qemu_its_whole_sandbox() {
    let bridge = format!("cicbr{}", std::process::id() % 100_000);
    let made = Command::new("ip").args(["link", "add", &bridge, "type", "bridge"]).output();
    if !made.as_ref().is_ok_and(|o| o.status.success()) {
        let _ = writeln!(std::io::stderr(), "SKIPPED: no bridge can be made: {made:?}");
        return;
    }
    let done = tokio::spawn(bridged(bridge.clone())).await;
    let _ = Command::new("ip").args(["link", "del", &bridge]).output();
    done.unwrap();
}

async fn bridged(bridge: String) {
    let dir = tempfile::tempdir().unwrap();
    // The helper of the distribution, for which alone another /etc/qemu/bridge.conf holds.
    let helper = dir.path().join("helper");
    fs::create_dir_all(dir.path().join("etc/qemu")).unwrap();
    fs::write(dir.path().join("etc/qemu/bridge.conf"), format!("allow {bridge}\n")).unwrap();
    let real = QemuConfig::default().bridge_helper;
    let script = format!(
        "#!/bin/sh\nexec unshare -m sh -c 'mount --bind {} /etc && exec {} \"$@\"' sh \"$@\"\n",
        dir.path().join("etc").display(),
        real.display()
    );
    fs::write(&helper, script).unwrap();
    fs::set_permissions(&helper, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut config = config();
    config.networks.insert("lan".into(), NetworkBackend::Bridge(bridge.clone()));
    config.bridge_helper = helper;
    let driver = match QemuDriver::open(config).await {
        Ok(driver) => driver,
        Err(missing) if is_missing(&missing) => {
            let _ = writeln!(std::io::stderr(), "SKIPPED: {missing}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let mut machine = machine_in(dir.path());
    machine.spec.nics[0].network = "lan".into();
    let vm = machine.spec.id;
    let ports = || fs::read_dir(format!("/sys/class/net/{bridge}/brif")).unwrap().count();
    driver.start(&machine).await.unwrap();
    assert_eq!(ports(), 1);
    let pid = processes_of(vm)[0];
    let line = String::from_utf8(fs::read(format!("/proc/{pid}/cmdline")).unwrap()).unwrap();
    assert!(line.contains("spawn=deny") && line.contains("elevateprivileges=deny"), "{line}");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.lines().any(|l| l.split_whitespace().eq(["Seccomp:", "2"])), "{status}");
    driver.stop(vm, StopMode::Forced).await.unwrap();
    eventually("the tap device goes with QEMU", || ports() == 0).await;
}

/// Asks a running QEMU itself to open files: what it inherited it can, and nothing by its path, not even
/// where it is the broker's user.
#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_opens_nothing_but_its_own_machines_files() {
    let Some((_, dir)) = qemu().await else { return };
    if !cicada::hypervisor::qemu::is_confinable() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: this kernel has no Landlock");
        return;
    }
    let driver = QemuDriver::open(QemuConfig { vm_uids: VmUids::Off, ..config() }).await.unwrap();
    let key = dir.path().join("identity.key");
    fs::write(&key, [7; 4096]).unwrap();
    let machine = machine_in(dir.path());
    driver.start(&machine).await.unwrap();
    let vm = machine.spec.id;
    drop(driver);
    let qmp = Qmp::connect(&machine.state_dir.join("qmp.sock"), |_| ()).await.unwrap();
    let open = async |name: &'static str, path: &Path| {
        let file =
            serde_json::json!({"driver": "file", "node-name": name, "filename": path, "read-only": true});
        qmp.execute("blockdev-add", Some(file)).await.map_err(|e| e.to_string())
    };
    let sets = qmp.execute("query-fdsets", None).await.unwrap();
    let of =
        |set: &serde_json::Value, end| set["fds"][0]["opaque"].as_str().is_some_and(|o| o.ends_with(end));
    let code =
        sets.as_array().unwrap().iter().find(|set| of(set, "CODE_4M.fd")).expect("the firmware's code");
    open("own", Path::new(&format!("/dev/fdset/{}", code["fdset-id"]))).await.unwrap();
    let state_log = machine.state_dir.join("console.log");
    let closed = [("key", key.as_path()), ("log", &state_log), ("passwd", Path::new("/etc/passwd"))];
    for (name, path) in closed {
        let error = open(name, path).await.unwrap_err();
        assert!(error.contains("Permission denied"), "{error}");
    }
    drop(qmp);
    kill(vm);
}

/// A start that is only tried: the very command line, of which nothing is executed, and nothing stays.
#[tokio::test]
async fn a_start_is_tried_without_a_guest_and_leaves_nothing() {
    let Some((driver, dir)) = qemu().await else { return };
    let machine = machine_in(dir.path());
    let vm = machine.spec.id;
    driver.rehearse(&machine).await.unwrap();
    assert!(processes_of(vm).is_empty() && driver.list().is_empty());
    assert!(!machine.state_dir.exists());

    // What a driver that died was trying out is ended by the next one.
    driver.start(&machine).await.unwrap();
    drop(driver);
    assert_eq!(processes_of(vm).len(), 1, "it outlives its driver");
    let next = QemuDriver::open(config()).await.unwrap();
    next.end_rehearsal(vm, &machine.state_dir).await.unwrap();
    eventually("it is ended", || processes_of(vm).is_empty()).await;
    next.end_rehearsal(vm, &dir.path().join("nothing-here")).await.unwrap();

    // What cannot start says so, and why.
    let mut bad = machine_in(dir.path());
    fs::write(&bad.root_disk, b"no image").unwrap();
    bad.root_format = DiskFormat::Qcow2;
    let error = next.rehearse(&bad).await.unwrap_err();
    assert!(matches!(error, DriverError::EndedAtStart { .. }), "{error}");
    assert!(processes_of(bad.spec.id).is_empty());
}
