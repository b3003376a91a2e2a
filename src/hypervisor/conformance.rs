//! What every driver must do, as one suite. Each check uses VMs of its own and leaves none.

use std::time::Duration;

use futures::future::BoxFuture;
use tokio::io::AsyncWriteExt;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::TryRecvError;

use super::{
    Ability, DiskChanges, Driver, DriverError, DriverEvent, EventKind, Machine, StopMode, StopReason,
};
use crate::types::{ByteSize, VmId};
use crate::vm::PowerState;

/// A driver and the VMs to try it with.
pub struct Bench<'a> {
    pub driver: &'a dyn Driver,
    /// A new machine, with all its files, whose guest ignores the power button.
    pub make_machine: &'a (dyn Fn() -> Machine + Sync),
    /// Makes the hypervisor process of a VM die.
    pub crash: &'a (dyn Fn(VmId) + Sync),
}

type Outcome = Result<(), String>;

/// How long an event may take to arrive.
const EVENT_TIMEOUT: Duration = Duration::from_secs(30);
/// Long enough to see that a deaf guest does not stop.
const PATIENCE: Duration = Duration::from_millis(300);

/// Runs every check; the error names the check and what was wrong.
pub async fn run(bench: &Bench<'_>) -> Outcome {
    let checks: [(&str, BoxFuture<'_, Outcome>); 10] = [
        ("features are filled in", Box::pin(features(bench))),
        ("a VM that was never defined is unknown to every verb", Box::pin(unknown(bench))),
        ("the verbs lead from state to state and can be repeated", Box::pin(lifecycle(bench))),
        ("a machine that runs keeps its shape", Box::pin(shape(bench))),
        ("what is not offered is refused", Box::pin(not_offered(bench))),
        ("a deaf guest stops by force only", Box::pin(deaf_guest(bench))),
        ("a crash is noticed and got over", Box::pin(crash(bench))),
        ("the console has one holder at a time", Box::pin(console(bench))),
        ("changes are tracked from call to call", Box::pin(tracking(bench))),
        ("verbs at the same time come out as one after the other", Box::pin(concurrent(bench))),
    ];
    for (name, check) in checks {
        check.await.map_err(|problem| format!("{name}: {problem}"))?;
        let left = bench.driver.list();
        ensure(left.is_empty(), || format!("{name}: left behind {left:?}"))?;
    }
    Ok(())
}

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Outcome {
    if holds { Ok(()) } else { Err(otherwise()) }
}

/// The driver's error and its sources, in one line.
fn told(error: DriverError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

impl Bench<'_> {
    fn expect_state(&self, vm: VmId, expected: PowerState) -> Outcome {
        let state = self.driver.state(vm).map_err(told)?;
        ensure(state == expected, || format!("the VM is {state}, not {expected}"))?;
        let listed = self.driver.list();
        ensure(listed.contains(&(vm, expected)), || format!("the list says {listed:?}"))
    }

    async fn discard(&self, vm: VmId) -> Outcome {
        self.driver.stop(vm, StopMode::Forced).await.map_err(told)?;
        self.driver.undefine(vm).await.map_err(told)
    }
}

/// The events of one VM.
struct Events(Receiver<DriverEvent>, VmId);

impl Events {
    async fn expect(&mut self, expected: EventKind) -> Outcome {
        self.expect_such(&format!("{expected:?}"), |kind| *kind == expected).await
    }

    /// The next event must be such.
    async fn expect_such(&mut self, name: &str, such: impl Fn(&EventKind) -> bool) -> Outcome {
        let next = async {
            loop {
                match self.0.recv().await {
                    Ok(event) if event.vm == self.1 => return Ok(event.kind),
                    Ok(_) => {}
                    Err(error) => return Err(error.to_string()),
                }
            }
        };
        match tokio::time::timeout(EVENT_TIMEOUT, next).await {
            Ok(kind) => {
                let kind = kind?;
                ensure(such(&kind), || format!("the event {kind:?} came, not {name}"))
            }
            Err(_) => Err(format!("the event {name} never came")),
        }
    }

    fn expect_none(&mut self) -> Outcome {
        match self.0.try_recv() {
            Err(TryRecvError::Empty) => Ok(()),
            other => Err(format!("{other:?} came, and nothing should")),
        }
    }
}

async fn features(bench: &Bench<'_>) -> Outcome {
    let features = bench.driver.features();
    let machine = (bench.make_machine)();
    ensure(!features.driver.is_empty() && !features.machine_type.is_empty(), || format!("{features:?}"))?;
    ensure(features.architectures.contains(&machine.spec.architecture), || format!("{features:?}"))?;
    ensure(features.cpu_models.contains(&machine.spec.cpu_model), || format!("{features:?}"))
}

async fn unknown(bench: &Bench<'_>) -> Outcome {
    let (driver, vm) = (bench.driver, VmId::random());
    let graceful = StopMode::Graceful { timeout: PATIENCE, escalate: true };
    let outcomes = [
        ("state", driver.state(vm).map(drop)),
        ("console_log", driver.console_log(vm).map(drop)),
        ("stop by force", driver.stop(vm, StopMode::Forced).await),
        ("stop", driver.stop(vm, graceful).await),
        ("pause", driver.pause(vm).await),
        ("resume", driver.resume(vm).await),
        ("console", driver.console(vm).await.map(drop)),
        ("stats", driver.stats(vm).await.map(drop)),
        ("track_changes", driver.track_changes(vm, None).await.map(drop)),
        ("end_tracking", driver.end_tracking(vm, None).await.map(drop)),
    ];
    for (verb, outcome) in outcomes {
        let is_refused = matches!(&outcome, Err(DriverError::UnknownVm { vm: named }) if *named == vm);
        ensure(is_refused, || format!("{verb} gave {outcome:?}"))?;
    }
    driver.undefine(vm).await.map_err(told)
}

/// A start that is only tried leaves nothing, and nobody hears of it.
async fn rehearsed(bench: &Bench<'_>, events: &mut Events) -> Result<(), String> {
    let (driver, machine) = (bench.driver, (bench.make_machine)());
    let listed = driver.list();
    for _ in 0..2 {
        driver.rehearse(&machine).await.map_err(told)?;
        ensure(driver.list() == listed, || format!("{:?} is listed", driver.list()))?;
        ensure(!machine.state_dir.exists(), || "the state directory is still there".into())?;
    }
    events.expect_none()?;
    let mut foreign = machine.clone();
    foreign.spec.cpu_model = "no-such-model".into();
    for refused in [driver.check(&foreign), driver.rehearse(&foreign).await] {
        ensure(matches!(refused, Err(DriverError::NotOffered { .. })), || format!("it gave {refused:?}"))?;
    }
    Ok(())
}

async fn lifecycle(bench: &Bench<'_>) -> Outcome {
    let (driver, machine) = (bench.driver, (bench.make_machine)());
    let vm = machine.spec.id;
    let mut events = Events(driver.events(), vm);
    for _ in 0..2 {
        driver.define(&machine).await.map_err(told)?;
        bench.expect_state(vm, PowerState::Stopped)?;
    }
    ensure(machine.firmware_vars.is_file(), || "there are no firmware variables".into())?;
    driver.check(&machine).map_err(told)?;
    rehearsed(bench, &mut events).await?;
    driver.stop(vm, StopMode::Forced).await.map_err(told)?;
    let idle = driver.pause(vm).await;
    ensure(matches!(idle, Err(DriverError::WrongState { .. })), || format!("pausing gave {idle:?}"))?;
    let idle = driver.stats(vm).await;
    ensure(matches!(idle, Err(DriverError::WrongState { .. })), || format!("measuring gave {idle:?}"))?;
    events.expect_none()?;

    for round in 0..2 {
        for _ in 0..2 {
            driver.start(&machine).await.map_err(told)?;
            bench.expect_state(vm, PowerState::Running)?;
        }
        events.expect(EventKind::Started).await?;
        let stats = driver.stats(vm).await.map_err(told)?;
        ensure(stats.resident.0 > 0, || format!("round {round}: {stats:?}"))?;
        for _ in 0..2 {
            driver.pause(vm).await.map_err(told)?;
            bench.expect_state(vm, PowerState::Paused)?;
        }
        for _ in 0..2 {
            driver.resume(vm).await.map_err(told)?;
            bench.expect_state(vm, PowerState::Running)?;
        }
        driver.pause(vm).await.map_err(told)?;
        driver.start(&machine).await.map_err(told)?;
        bench.expect_state(vm, PowerState::Running)?;
        for kind in [EventKind::Paused, EventKind::Resumed, EventKind::Paused, EventKind::Resumed] {
            events.expect(kind).await?;
        }
        let running = driver.undefine(vm).await;
        ensure(matches!(running, Err(DriverError::WrongState { .. })), || format!("undefine: {running:?}"))?;
        for _ in 0..2 {
            driver.stop(vm, StopMode::Forced).await.map_err(told)?;
            bench.expect_state(vm, PowerState::Stopped)?;
        }
        events.expect(EventKind::Stopped { reason: StopReason::Forced }).await?;
        events.expect_none()?;
    }
    for _ in 0..2 {
        driver.undefine(vm).await.map_err(told)?;
    }
    ensure(!machine.state_dir.exists(), || "the state directory is still there".into())?;
    ensure(machine.root_disk.exists(), || "the root disk is gone".into())?;
    ensure(machine.firmware_vars.exists(), || "the firmware variables are gone".into())
}

async fn shape(bench: &Bench<'_>) -> Outcome {
    let (driver, machine) = (bench.driver, (bench.make_machine)());
    let vm = machine.spec.id;
    let mut larger = machine.clone();
    larger.spec.memory = ByteSize(machine.spec.memory.0 * 2);
    driver.start(&machine).await.map_err(told)?;
    for refused in [driver.define(&larger).await, driver.start(&larger).await] {
        ensure(matches!(refused, Err(DriverError::Differs { .. })), || format!("{refused:?}"))?;
    }
    bench.expect_state(vm, PowerState::Running)?;
    driver.stop(vm, StopMode::Forced).await.map_err(told)?;
    driver.define(&larger).await.map_err(told)?;
    bench.discard(vm).await
}

async fn not_offered(bench: &Bench<'_>) -> Outcome {
    type Change = fn(&mut Machine);
    let changes: [Change; 3] = [
        |m| m.spec.architecture = "pdp11".into(),
        |m| m.spec.cpu_model = "z80".into(),
        |m| {
            let mac = crate::vm::Mac::derived(m.spec.id, 0);
            m.spec.nics =
                vec![crate::vm::spec::Nic { network: "nowhere".into(), mac, model: Default::default() }];
        },
    ];
    for change in changes {
        let mut machine = (bench.make_machine)();
        change(&mut machine);
        let refused = bench.driver.define(&machine).await;
        ensure(matches!(refused, Err(DriverError::NotOffered { .. })), || format!("{refused:?}"))?;
        ensure(!machine.state_dir.exists(), || "something was prepared all the same".into())?;
    }
    let mut machine = (bench.make_machine)();
    machine.spec.cpus = 0;
    let refused = bench.driver.start(&machine).await;
    ensure(matches!(refused, Err(DriverError::BadSpec { .. })), || format!("{refused:?}"))
}

async fn deaf_guest(bench: &Bench<'_>) -> Outcome {
    let (driver, machine) = (bench.driver, (bench.make_machine)());
    let vm = machine.spec.id;
    driver.start(&machine).await.map_err(told)?;
    let patient = driver.stop(vm, StopMode::Graceful { timeout: PATIENCE, escalate: false }).await;
    ensure(matches!(patient, Err(DriverError::Timeout { .. })), || format!("{patient:?}"))?;
    bench.expect_state(vm, PowerState::Running)?;
    let mut events = Events(driver.events(), vm);
    driver.stop(vm, StopMode::Graceful { timeout: PATIENCE, escalate: true }).await.map_err(told)?;
    bench.expect_state(vm, PowerState::Stopped)?;
    events.expect(EventKind::Stopped { reason: StopReason::Forced }).await?;
    bench.discard(vm).await
}

async fn crash(bench: &Bench<'_>) -> Outcome {
    let (driver, machine) = (bench.driver, (bench.make_machine)());
    let vm = machine.spec.id;
    driver.start(&machine).await.map_err(told)?;
    let mut events = Events(driver.events(), vm);
    (bench.crash)(vm);
    events.expect_such("Crashed", |kind| matches!(kind, EventKind::Crashed { .. })).await?;
    bench.expect_state(vm, PowerState::Crashed)?;
    let gentle = StopMode::Graceful { timeout: PATIENCE, escalate: false };
    for mode in [StopMode::Forced, gentle] {
        driver.stop(vm, mode).await.map_err(told)?;
        bench.expect_state(vm, PowerState::Stopped)?;
        driver.start(&machine).await.map_err(told)?;
        events.expect(EventKind::Started).await?;
        bench.expect_state(vm, PowerState::Running)?;
        (bench.crash)(vm);
        events.expect_such("Crashed", |kind| matches!(kind, EventKind::Crashed { .. })).await?;
    }
    driver.start(&machine).await.map_err(told)?;
    bench.discard(vm).await
}

async fn console(bench: &Bench<'_>) -> Outcome {
    let (driver, machine) = (bench.driver, (bench.make_machine)());
    let vm = machine.spec.id;
    driver.define(&machine).await.map_err(told)?;
    let early = driver.console(vm).await;
    ensure(matches!(early, Err(DriverError::WrongState { .. })), || format!("{early:?}"))?;
    driver.start(&machine).await.map_err(told)?;
    for _ in 0..2 {
        let mut held = driver.console(vm).await.map_err(told)?;
        held.write_all(b"\r").await.map_err(|e| e.to_string())?;
        let second = driver.console(vm).await;
        ensure(matches!(second, Err(DriverError::ConsoleBusy { .. })), || format!("{second:?}"))?;
    }
    let log = driver.console_log(vm).map_err(told)?;
    ensure(log.starts_with(&machine.state_dir), || format!("the log is {}", log.display()))?;
    bench.discard(vm).await
}

/// What the changes are, only a guest that writes can show; here it is when there are any.
async fn tracking(bench: &Bench<'_>) -> Outcome {
    let (driver, machine) = (bench.driver, (bench.make_machine)());
    if !driver.features().abilities.contains(&Ability::TrackChanges) {
        return Ok(());
    }
    let vm = machine.spec.id;
    driver.define(&machine).await.map_err(told)?;
    let idle = driver.track_changes(vm, None).await;
    ensure(matches!(idle, Err(DriverError::WrongState { .. })), || format!("tracking gave {idle:?}"))?;
    ensure_none(driver.end_tracking(vm, None).await, "a VM that never ran")?;
    driver.start(&machine).await.map_err(told)?;
    let mut events = Events(driver.events(), vm);
    let mut first = None;
    for round in 0..2 {
        let (mut since, changes) = driver.track_changes(vm, first).await.map_err(told)?;
        ensure(changes.is_none(), || format!("round {round} begins with {changes:?}"))?;
        first = Some(since);
        for _ in 0..2 {
            let (next, changes) = driver.track_changes(vm, Some(since)).await.map_err(told)?;
            ensure(changes.is_some() && next != since, || format!("round {round}: {changes:?}"))?;
            since = next;
            bench.expect_state(vm, PowerState::Running)?;
        }
        // Somebody who missed a period is told nothing, and neither is the other one then.
        let (other, missed) = driver.track_changes(vm, first).await.map_err(told)?;
        ensure(missed.is_none(), || format!("a period that ended long ago has {missed:?}"))?;
        let (_, missed) = driver.track_changes(vm, Some(since)).await.map_err(told)?;
        ensure(missed.is_none() && other != since, || format!("a stranger's period has {missed:?}"))?;
        for _ in 0..2 {
            ensure_none(driver.end_tracking(vm, Some(since)).await, "a VM that runs")?;
        }
    }
    events.expect_none()?;
    driver.pause(vm).await.map_err(told)?;
    let (since, _) = driver.track_changes(vm, None).await.map_err(told)?;
    bench.expect_state(vm, PowerState::Paused)?;
    driver.resume(vm).await.map_err(told)?;
    // Only the guest's own end leaves anything.
    driver.stop(vm, StopMode::Forced).await.map_err(told)?;
    ensure_none(driver.end_tracking(vm, Some(since)).await, "a forced stop")?;
    for kind in [EventKind::Paused, EventKind::Resumed, EventKind::Stopped { reason: StopReason::Forced }] {
        events.expect(kind).await?;
    }
    driver.start(&machine).await.map_err(told)?;
    let (since, _) = driver.track_changes(vm, None).await.map_err(told)?;
    (bench.crash)(vm);
    events.expect(EventKind::Started).await?;
    events.expect_such("Crashed", |kind| matches!(kind, EventKind::Crashed { .. })).await?;
    ensure_none(driver.end_tracking(vm, Some(since)).await, "a crash")?;
    driver.start(&machine).await.map_err(told)?;
    let (_, fresh) = driver.track_changes(vm, Some(since)).await.map_err(told)?;
    ensure(fresh.is_none(), || format!("a new start has {fresh:?}"))?;
    bench.discard(vm).await
}

fn ensure_none(changes: Result<Option<DiskChanges>, DriverError>, of: &str) -> Outcome {
    let changes = changes.map_err(told)?;
    ensure(changes.is_none(), || format!("{of} has {changes:?}"))
}

async fn concurrent(bench: &Bench<'_>) -> Outcome {
    let (driver, machine, other) = (bench.driver, (bench.make_machine)(), (bench.make_machine)());
    let (vm, other_vm) = (machine.spec.id, other.spec.id);
    let mut events = Events(driver.events(), vm);
    let (a, b, c) = futures::join!(driver.start(&machine), driver.start(&machine), driver.start(&other));
    for outcome in [a, b, c] {
        outcome.map_err(told)?;
    }
    events.expect(EventKind::Started).await?;
    let (a, b) = futures::join!(driver.stop(vm, StopMode::Forced), driver.stop(vm, StopMode::Forced));
    a.and(b).map_err(told)?;
    events.expect(EventKind::Stopped { reason: StopReason::Forced }).await?;
    bench.expect_state(vm, PowerState::Stopped)?;
    bench.expect_state(other_vm, PowerState::Running)?;
    // A stop that nobody waits for any more still comes to its end.
    drop(tokio::time::timeout(Duration::from_millis(1), driver.stop(other_vm, StopMode::Forced)).await);
    bench.discard(other_vm).await?;
    bench.discard(vm).await
}
