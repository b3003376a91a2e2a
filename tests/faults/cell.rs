//! One cell of the table: a move, a fault at one point of it, and what is there when all is mended.

use std::time::{Duration, Instant};

use cicada::interface::{Reply, Request, VmRequest};
use cicada::vm::PowerState;

use crate::pair::{Pair, VM, comes};
use crate::table::{Fault, Outcome, Recovery};

/// How long a link stays cut, and the server gone.
const CUT: Duration = Duration::from_millis(1500);
/// How long a world may take to come to rest.
const PATIENCE_S: u64 = 90;

/// The VM must run at `source`.
pub fn run(pair: &mut Pair, source: usize, point: &str, fault: Fault) -> Result<Recovery, String> {
    let target = 1 - source;
    let held = if point.starts_with("source") { source } else { target };
    let epoch = begin_held(pair, source, held, point)?;
    let begun = Instant::now();
    match fault {
        Fault::SourceBroker => pair.world.stop_broker(source, true),
        Fault::TargetBroker => pair.world.stop_broker(target, true),
        Fault::SourceQemu if !pair.kill_qemu(source) => return Err("there is no QEMU at the source".into()),
        Fault::TargetQemu if !pair.kill_qemu(target) => return Err("there is no QEMU at the target".into()),
        Fault::SourceQemu | Fault::TargetQemu => {}
        Fault::Server => pair.kill_server(),
        Fault::SourceXmpp => pair.xmpp[source].cut(),
        Fault::TargetXmpp => pair.xmpp[target].cut(),
        Fault::Data => pair.data.iter().for_each(|wire| wire.cut()),
        Fault::SourceFull => pair.storage[source].fill(),
        Fault::TargetFull => pair.storage[target].fill(),
        Fault::SourceReadOnly => pair.storage[source].turn_read_only(),
        Fault::TargetReadOnly => pair.storage[target].turn_read_only(),
    }
    pair.let_go();
    match fault {
        Fault::SourceBroker => pair.world.start_broker(source),
        Fault::TargetBroker => pair.world.start_broker(target),
        Fault::SourceQemu | Fault::TargetQemu => {}
        _ => std::thread::sleep(CUT),
    }
    if fault == Fault::Server {
        pair.world.xmpp.restart();
    }
    pair.xmpp.iter().chain(&pair.data).for_each(|wire| wire.mend());
    pair.storage.iter().for_each(|storage| storage.free());
    // What an operator does: whatever uses the disk is ended, and started again. After a full disk
    // that is the broker alone, whose index does not forget the error.
    for (cloud, full, read_only) in [
        (source, Fault::SourceFull, Fault::SourceReadOnly),
        (target, Fault::TargetFull, Fault::TargetReadOnly),
    ] {
        if fault == full {
            pair.world.stop_broker(cloud, true);
            pair.world.start_broker(cloud);
        }
        if fault == read_only {
            pair.world.stop_broker(cloud, true);
            pair.kill_qemu(cloud);
            pair.storage[cloud].repair();
            pair.world.start_broker(cloud);
        }
    }

    recovered(pair, source, epoch, begun)
}

/// A move whose target forgets what it staged, so that the VM is given back. The broker that reaches
/// `point` on that way dies there.
pub fn run_returned(pair: &mut Pair, source: usize, point: &str) -> Result<Recovery, String> {
    let target = 1 - source;
    let epoch = begin_held(pair, source, source, "source-given-up")?;
    pair.world.stop_broker(target, true);
    let dying = if point.starts_with("source") { source } else { target };
    pair.let_go_after(source, dying, &format!("{point}=kill"));
    let begun = Instant::now();
    pair.world.start_broker(target);
    pair.world.wait_end(dying)?;
    pair.world.start_broker(dying);
    recovered(pair, source, epoch, begun)
}

/// A change of ownership that is about to be recorded at `point` is written, and the directory
/// cannot be made durable: the broker must end by itself.
pub fn run_undecided(pair: &mut Pair, source: usize, point: &str) -> Result<Recovery, String> {
    let writer = if point.starts_with("source") { source } else { 1 - source };
    let epoch = begin_held(pair, source, writer, point)?;
    let begun = Instant::now();
    pair.let_go_after(writer, writer, "durable-renamed=fail");
    pair.world.wait_end(writer)?;
    pair.world.start_broker(writer);
    recovered(pair, source, epoch, begun)
}

/// Begins a move of which the broker of `held` waits at `point`; returns the epoch it began under.
fn begin_held(pair: &Pair, source: usize, held: usize, point: &str) -> Result<u64, String> {
    let epoch = pair.record(source).ok_or("no record")?.epoch;
    pair.hold_at(held, point);
    let moving = pair.begin_move(source);
    comes(60, || pair.is_held(held) || moving.is_finished());
    // The last point comes after the end.
    comes(10, || pair.is_held(held));
    if pair.is_held(held) { Ok(epoch) } else { Err("the point was not reached".into()) }
}

/// Waits until all is well again, and looks.
fn recovered(pair: &mut Pair, source: usize, epoch: u64, begun: Instant) -> Result<Recovery, String> {
    let target = 1 - source;
    let owner = rest(pair)?;
    let by_itself = comes(10, || pair.power(owner) == PowerState::Running);
    if !by_itself {
        let started = pair
            .world
            .call(owner, &Request::Vm(VmRequest::Start { vm: VM.into(), unconfirmed: false, by_uid: None }));
        if !matches!(started, Ok(Reply::Vm(_))) {
            return Err(format!("it does not start: {started:?}"));
        }
    }
    if !comes(60, || pair.is_ready(owner)) {
        return Err("the guest does not come up".into());
    }
    let seconds = begun.elapsed().as_secs_f64();
    // Copies and reservations go when their time is over.
    let mut found = Ok(());
    comes(40, || {
        found = pair.check(owner);
        found.is_ok()
    });
    found?;
    let now = pair.record(owner).ok_or("no record")?.epoch;
    let outcome = match (owner == target, now - epoch) {
        (true, 1) => Outcome::Moved,
        (false, 0) => Outcome::Abandoned,
        (false, 2) => Outcome::Returned,
        _ => return Err(format!("the epoch is {now} after {epoch}, at {owner}")),
    };
    Ok(Recovery { outcome, seconds, by_hand: !by_itself })
}

/// The owner, when nothing moves any more.
pub fn rest(pair: &Pair) -> Result<usize, String> {
    let mut last = Err(String::new());
    comes(PATIENCE_S, || {
        last = pair.owner_at_rest();
        last.is_ok()
    });
    last.map_err(|why| format!("no rest: {why}"))
}
