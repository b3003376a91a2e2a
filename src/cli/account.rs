//! What a move cost, as tables.

use crate::interface::{Account, MigrationRole, MigrationView};

use super::format::{bytes, millis};
use super::printer::{Outcome, Printer};
use super::table::Table;

/// In the order in which they happen; others follow by name.
const PHASES: [&str; 6] = ["negotiate", "stage", "compose", "switch-over", "start", "release"];

/// The end of a move that was waited for.
pub fn print_end(printer: &Printer, view: &MigrationView) -> Outcome {
    let (p, a) = (&view.progress, &view.account);
    let peer = p.peer_cloud.as_ref().map_or_else(|| p.peer.to_string(), ToString::to_string);
    let total = millis(p.updated.since(p.started).as_millis() as u64);
    let direction = if p.role == MigrationRole::Target { "came here from" } else { "is now in" };
    let downtime = a.downtime_ms.map(|ms| format!(", down for {}", millis(ms))).unwrap_or_default();
    printer.line(printer.good(&format!("{} {direction} {peer}: {total}{downtime}", p.vm)))?;
    printer.line("")?;
    print(printer, a)
}

pub fn print(printer: &Printer, a: &Account) -> Outcome {
    components(printer, a)?;
    printer.line("")?;
    traffic(printer, a)?;
    times(printer, a)
}

/// All that came across, of passes that failed as well.
pub fn sent_bytes(a: &Account) -> u64 {
    told_apart_bytes(a).max(a.carried_bytes)
}

/// Payload of all kinds.
fn told_apart_bytes(a: &Account) -> u64 {
    [a.component_bytes, a.root_delta_bytes, a.user_data_bytes, a.control_bytes]
        .into_iter()
        .fold(0, u64::saturating_add)
}

fn components(printer: &Printer, a: &Account) -> Outcome {
    let mut table = Table::new(["", ">NEEDED", ">HELD", ">FETCHED", ""]);
    let count = |n: u32| n.to_string();
    table.row([
        "components".into(),
        count(a.components_needed),
        count(a.components_held),
        count(a.components_fetched),
        a.fetched.join(", "),
    ]);
    let held = a.packs_needed.saturating_sub(a.packs_fetched);
    table.row(["packs".into(), count(a.packs_needed), count(held), count(a.packs_fetched), String::new()]);
    table.print(printer)
}

fn traffic(printer: &Printer, a: &Account) -> Outcome {
    let sent = sent_bytes(a);
    let mut table = Table::new(["SENT", ">BYTES", ">"]);
    for (name, n) in [
        ("components", a.component_bytes),
        ("root delta", a.root_delta_bytes),
        ("user data", a.user_data_bytes),
        ("control", a.control_bytes),
    ] {
        let share =
            if sent == 0 { String::new() } else { format!("{:.0} %", n as f64 * 100.0 / sent as f64) };
        table.row([name.into(), bytes(n), share]);
    }
    let not_told_apart = sent - told_apart_bytes(a);
    if not_told_apart > 0 {
        table.row(["not told apart: its pass ended early".into(), bytes(not_told_apart), String::new()]);
    }
    table.row(["together".into(), bytes(sent), String::new()]);
    if a.wire_bytes > 0 {
        table.row(["on the wire, both ways".into(), bytes(a.wire_bytes), String::new()]);
    }
    let compared =
        [("whole disks, zstd -3", a.monolithic_zstd_bytes), ("whole disks, raw", a.monolithic_raw_bytes)];
    for (name, n) in compared.into_iter().filter_map(|(name, n)| Some((name, n?))) {
        table.row([format!("instead of {name}"), bytes(n), ratio(n, sent)]);
    }
    if let Some(n) = a.last_scan_bytes {
        table.row(["read of the disks when stopped".into(), bytes(n), String::new()]);
    }
    table.print(printer)
}

fn ratio(whole: u64, sent: u64) -> String {
    match sent {
        0 => String::new(),
        _ => format!("{:.1} times as much", whole as f64 / sent as f64),
    }
}

fn times(printer: &Printer, a: &Account) -> Outcome {
    let mut table = Table::new(["PHASE", ">TIME"]);
    let known = PHASES.iter().filter_map(|p| a.phase_ms.get_key_value(*p));
    let others = a.phase_ms.iter().filter(|(p, _)| !PHASES.contains(&p.as_str()));
    for (phase, ms) in known.chain(others) {
        table.row([phase.clone(), millis(*ms)]);
    }
    let more = [("VM down", a.downtime_ms), ("guest ready after its start", a.boot_ms)];
    for (name, ms) in more.into_iter().filter_map(|(name, ms)| Some((name, ms?))) {
        table.row([name.into(), millis(ms)]);
    }
    if !table.is_empty() {
        printer.line("")?;
    }
    table.print(printer)
}
