//! `cicada sim`: a simulated federation of brokers' cores.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::durable;
use crate::interface::{Event, Problem, ProblemKind};
use crate::sim::svg::svg;
use crate::sim::{Outcome as Simulated, Scenario, ScenarioError, Speed, Subject, Tally};
use crate::types::ByteSize;

use super::context::Context;
use super::printer::Outcome;
use super::progress::Progress;
use super::table::Table;

#[derive(Args)]
pub struct Sim {
    /// What is simulated: see fixtures/sim/ for examples
    #[arg(value_name = "SCENARIO")]
    scenario: PathBuf,
    /// What components consist of: lines of component, pack and bytes, apart by tabs; fixtures/sim/packages.tsv
    #[arg(long, value_name = "FILE")]
    packages: PathBuf,
    /// Another seed than the scenario's: another run
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// Write the figures to this file, too
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Draw bytes per move against moves made into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// For programs: what came of the run, and what it took of this machine.
#[derive(Serialize)]
struct Told<'a> {
    #[serde(flatten)]
    outcome: &'a Simulated,
    machine: &'a Speed,
}

pub fn run(ctx: &Context, args: &Sim) -> Outcome {
    let read = |path: &PathBuf| {
        std::fs::read_to_string(path).map_err(|e| Problem::from_path(path.display().to_string(), &e))
    };
    let object = format!("scenario {}", args.scenario.display());
    let problem = |e: ScenarioError| match &e {
        ScenarioError::Violated { seed, .. } => Problem::from_error(ProblemKind::Failed, &object, &e)
            .next(format!("this is a fault of the broker: report it with the scenario and --seed {seed}")),
        ScenarioError::Stopped => Problem::from_error(ProblemKind::Cancelled, &object, &e),
        _ => Problem::from_error(ProblemKind::BadRequest, &object, &e),
    };
    let mut scenario = Scenario::parse(&read(&args.scenario)?).map_err(problem)?;
    scenario.seed = args.seed.unwrap_or(scenario.seed);
    let packages = read(&args.packages)?;
    let mut progress = Progress::new(&ctx.printer);
    let mut told = None;
    let outcome = scenario.run(&packages, |reached| {
        let (done, total) = (reached.simulated_s / 60, reached.simulated_total_s / 60);
        if told.replace((done, reached.moves)) != Some((done, reached.moves)) {
            let phase = "simulate".to_owned();
            let unit = match ctx.printer.json {
                true => "minutes".to_owned(),
                false => format!("simulated minutes, {} moves", reached.moves),
            };
            progress.event(&Event::Progress { phase, done, total, unit });
        }
        true
    });
    progress.end();
    let (outcome, speed) = outcome.map_err(problem)?;
    let write = |path: &Option<PathBuf>, text: String| match path {
        Some(path) => durable::write(path, text.as_bytes())
            .map_err(|e| Problem::from_path(path.display().to_string(), &e)),
        None => Ok(()),
    };
    write(&args.csv, csv(&outcome))?;
    write(&args.svg, svg(&outcome))?;
    if ctx.printer.json {
        return ctx.printer.json_value(&Told { outcome: &outcome, machine: &speed });
    }
    print(ctx, &outcome)?;
    print_speed(ctx, &speed);
    Ok(())
}

fn print(ctx: &Context, outcome: &Simulated) -> Outcome {
    let mut table = Table::new([
        ">MOVES",
        ">HOURS",
        ">COMPONENTS",
        ">OWN",
        ">WHOLE DISK",
        ">BLOCKS",
        ">HELD",
        ">TIME",
        ">MESSAGES",
        ">PRESENCE",
        ">REPOSITORIES",
    ]);
    for row in &outcome.rows {
        let bytes = |bytes: u64| ByteSize(bytes).to_string();
        table.row([
            row.moves.to_string(),
            format!("{:.1}", row.simulated_hours),
            bytes(row.component_bytes_per_move),
            bytes(row.own_bytes_per_move),
            bytes(row.monolithic_bytes_per_move),
            bytes(row.block_bytes_per_move),
            format!("{:.0} %", row.hit_rate * 100.0),
            format!("{:.1} s", row.seconds_per_move),
            format!("{:.1}", row.messages_per_move),
            bytes(row.presence_bytes_per_move),
            bytes(row.repository_bytes),
        ]);
    }
    table.print(&ctx.printer)?;
    ctx.printer.note(format!(
        "{} moves in {} clouds with {} VMs, {} not done; {:.1} % of what they needed was there; {} crashes, {} steps \
         of cores; seed {}. Components, own, whole disk, blocks of 4 KiB and presence are bytes per move",
        outcome.moves,
        outcome.clouds,
        outcome.vms,
        outcome.moves_not_done,
        outcome.hit_rate * 100.0,
        outcome.crashes,
        outcome.steps,
        outcome.seed
    ));
    ctx.printer.note(format!(
        "a move took {:.1} s, {:.1} messages and {}; a copy of the whole disk {}, blocks of 4 KiB each kept once {}",
        outcome.seconds_per_move,
        outcome.messages_per_move,
        ByteSize(outcome.bytes_per_move),
        ByteSize(outcome.monolithic_bytes_per_move),
        ByteSize(outcome.block_bytes_per_move)
    ));
    let filling = &outcome.filling;
    ctx.printer.note(format!(
        "until all clouds had seen and asked each other: {} messages ({}), {} presence stanzas delivered ({})",
        filling.messages.messages,
        ByteSize(filling.messages.bytes),
        filling.presences_delivered,
        ByteSize(filling.presence_bytes_delivered)
    ));
    let moves = outcome.moves.max(1) as f64;
    let per_move = |(about, tally): (&Subject, &Tally)| {
        format!("{} {:.2} ({})", about.as_str(), tally.messages as f64 / moves, ByteSize(tally.bytes))
    };
    let messages: Vec<String> = outcome.messages.iter().map(per_move).collect();
    ctx.printer.note(format!(
        "messages per move (and bytes in all): {}; {} requests were put off because too much was asked at once",
        messages.join(", "),
        outcome.put_off
    ));
    ctx.printer.note(format!(
        "presence: {} stanzas to the room, {} delivered ({})",
        outcome.presences,
        outcome.presences_delivered,
        ByteSize(outcome.presence_bytes_delivered)
    ));
    Ok(())
}

fn print_speed(ctx: &Context, speed: &Speed) {
    let us = |ns: u32| f64::from(ns) / 1000.0;
    ctx.printer.note(format!(
        "on this machine: {:.1} s ({:.1} s of one processor), of which {:.1} s until all clouds had asked each other; {} for each cloud at rest, {} \
         in all at most; a step of a core took {:.1} µs (median), {:.1} µs (99 of 100 took less)",
        speed.took_s,
        speed.took_cpu_s,
        speed.filled_s,
        ByteSize(speed.resident_per_cloud_bytes),
        ByteSize(speed.resident_most_bytes),
        us(speed.step_median_ns),
        us(speed.step_99th_ns)
    ));
}

fn csv(outcome: &Simulated) -> String {
    let mut text =
        "moves,simulated_hours,component_bytes_per_move,own_bytes_per_move,monolithic_bytes_per_move,\
                    block_bytes_per_move,hit_rate,seconds_per_move,messages_per_move,message_bytes_per_move,presences_per_move,\
                    presence_bytes_per_move,repository_bytes\n"
            .to_owned();
    for r in &outcome.rows {
        text.push_str(&format!(
            "{},{:.3},{},{},{},{},{:.4},{:.3},{:.2},{},{:.1},{},{}\n",
            r.moves,
            r.simulated_hours,
            r.component_bytes_per_move,
            r.own_bytes_per_move,
            r.monolithic_bytes_per_move,
            r.block_bytes_per_move,
            r.hit_rate,
            r.seconds_per_move,
            r.messages_per_move,
            r.message_bytes_per_move,
            r.presences_per_move,
            r.presence_bytes_per_move,
            r.repository_bytes
        ));
    }
    text
}
