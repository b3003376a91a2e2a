//! Every fault at every phase of a real move: two brokers, Prosody and QEMU as processes of their
//! own, killed or cut off at named points (`cicada::fault`). Then all is mended and looked at.
//! `TABLE.md` says what came of it.
//!
//! Among the tests every third cell is run, so that each point and each fault has its turn;
//! `deploy/faults` runs them all and keeps the table. `CICADA_FAULT_CELLS=given-up/Broker` runs the
//! cells whose point and fault contain these; `CICADA_WRITE_TABLE=1` replaces the kept table.

#[allow(dead_code)]
#[path = "../federation/world.rs"]
mod world;

mod cell;
mod guest;
#[path = "../support/links.rs"]
mod links;
mod pair;
mod storage;
mod table;

use std::collections::VecDeque;
use std::io::Write as _;
use std::sync::Mutex;

use pair::{Pair, comes};
use table::{Fault, Outcome, POINTS, Row};

/// Of so many cells one is run when none are asked for.
const SHARE: usize = 3;
/// Worlds at once; in each the VM goes to and fro.
const WORLDS: usize = 2;

#[test]
fn every_fault_at_every_phase_leaves_one_owner_and_no_trace() {
    if !cfg!(debug_assertions) {
        let _ = writeln!(std::io::stderr(), "SKIPPED: a release build has no points at which to fail");
        return;
    }
    if pair::missing_tool() {
        return;
    }
    let wanted = std::env::var("CICADA_FAULT_CELLS").ok();
    let (point_part, fault_part) = wanted.as_deref().and_then(|w| w.split_once('/')).unwrap_or_default();
    let mut cells = VecDeque::new();
    for (row, point) in POINTS.iter().enumerate() {
        for (column, fault) in Fault::ALL.iter().enumerate() {
            let is_wanted = match wanted {
                Some(_) => point.contains(point_part) && format!("{fault:?}").contains(fault_part),
                None => (row + column) % SHARE == 0,
            };
            if is_wanted && fault.is_possible_at(point) {
                cells.push_back((*point, *fault));
            }
        }
    }
    // Those that need other worlds come last.
    cells.make_contiguous().sort_by_key(|(_, fault)| fault.is_of_storage());
    let all = cells.len();
    let (cells, rows) = (Mutex::new(cells), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..WORLDS.min(all) {
            scope.spawn(|| {
                let mut pair = None;
                loop {
                    let Some((point, fault)) = cells.lock().unwrap().pop_front() else { return };
                    let row = run_cell(&mut pair, point, fault);
                    if let Some(row) = &row {
                        println!("{point} x {fault:?}: {:?}", row.result);
                    }
                    rows.lock().unwrap().push(row);
                }
            });
        }
    });
    let rows = rows.into_inner().unwrap();
    assert_eq!(rows.len(), all, "a world could not be made");
    let rows: Vec<_> = rows.into_iter().flatten().collect();
    println!("{}", table::markdown(&rows));
    if wanted.as_deref() == Some("/") && std::env::var_os("CICADA_WRITE_TABLE").is_some() {
        table::keep(&rows);
    }
    let failed: Vec<_> =
        rows.iter().filter_map(|r| Some((r.point, r.fault, r.result.as_ref().err()?))).collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn a_hand_over_is_given_back_and_recorded_whatever_happens_to_either_broker() {
    if !cfg!(debug_assertions) || pair::missing_tool() {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: a release build has no points at which to fail, or a tool is missing"
        );
        return;
    }
    let mut pair = Pair::start(false).unwrap();
    for point in ["target-returning", "target-returned", "source-taking-back", "source-taken-back"] {
        let source = at_rest(&pair).unwrap();
        let result = cell::run_returned(&mut pair, source, point);
        println!("given back, {point}: {result:?}");
        let outcome = result.map(|r| r.outcome);
        assert_eq!(outcome, Ok(Outcome::Returned), "{point}\n{}\n{}", pair.world.log(0), pair.world.log(1));
    }
    for point in ["source-giving-up", "target-taking-over"] {
        let source = at_rest(&pair).unwrap();
        let result = cell::run_undecided(&mut pair, source, point);
        println!("not known to be recorded, {point}: {result:?}");
        let outcome = result.map(|r| r.outcome);
        assert_eq!(outcome, Ok(Outcome::Moved), "{point}\n{}\n{}", pair.world.log(0), pair.world.log(1));
    }
}

/// The VM's cloud, once it runs and nothing else happens.
fn at_rest(pair: &Pair) -> Result<usize, String> {
    let source = cell::rest(pair)?;
    if !comes(60, || pair.is_ready(source)) {
        return Err("the guest is not ready".to_owned());
    }
    pair.world.wait_online();
    Ok(source)
}

/// Runs a cell in a world that is at rest; one in which something went wrong is not used again.
fn run_cell(world: &mut Option<Pair>, point: &'static str, fault: Fault) -> Option<Row> {
    if world.as_ref().is_none_or(|pair| pair.storage.is_empty() == fault.is_of_storage()) {
        *world = None;
        *world = Pair::start(fault.is_of_storage());
    }
    let Some(pair) = world else {
        let _ =
            writeln!(std::io::stderr(), "SKIPPED: {point} x {fault:?}: a file system cannot be mounted here");
        return None;
    };
    let result = at_rest(pair).and_then(|source| {
        let result = cell::run(pair, source, point, fault);
        match &result {
            Ok(r) if !fault.may_end(point, r.outcome) => Err(format!("it must not end as '{}'", r.outcome)),
            Ok(r) if r.outcome == Outcome::Abandoned => {
                let log = pair.world.log(source);
                println!("{}", log.lines().rev().find(|l| l.contains("not moved")).unwrap_or("no reason?"));
                result
            }
            _ => result,
        }
    });
    if let Err(why) = &result {
        println!("{point} x {fault:?} FAILED: {why}");
        for cloud in 0..2 {
            let log = pair.world.log(cloud);
            let lines: Vec<_> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(40)..].join("\n");
            println!("--- end of the log of {}\n{tail}", pair.world.clouds[cloud].name);
        }
        pair.let_go();
        *world = None;
    }
    Some(Row { point, fault, result })
}
