//! `cicada replay`: a broker's core stepped through a recording.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::broker::Input;
use crate::interface::{Problem, ProblemKind};
use crate::recording::{Difference, End, RecordingError, Replay as Player, Step};

use super::context::Context;
use super::printer::{Failure, Outcome};

/// Characters of an input or effect that are shown, without `--full`.
const SHOWN_CHARS: usize = 160;

#[derive(Args)]
pub struct Replay {
    /// A recording by 'cicada broker --record'
    #[arg(value_name = "FILE")]
    recording: PathBuf,
    /// Show steps from this one on
    #[arg(long, value_name = "STEP", default_value_t = 1)]
    from: u64,
    /// Show steps up to this one
    #[arg(long, value_name = "STEP")]
    to: Option<u64>,
    /// Show only steps whose input or effects contain this text, such as a VM's name or a migration's id
    #[arg(long, value_name = "TEXT")]
    grep: Option<String>,
    /// Show steps without effects, and all of every input and effect
    #[arg(long)]
    full: bool,
    /// Show only what differs
    #[arg(long, conflicts_with = "full")]
    differences: bool,
}

/// A step as it is shown.
#[derive(Serialize)]
#[serde(tag = "event", rename = "step")]
struct Shown {
    step: u64,
    line: u64,
    #[serde(with = "crate::clock::rfc3339")]
    at: crate::clock::UnixMillis,
    input: String,
    effects: Vec<String>,
    differences: Vec<String>,
}

/// The end of a replay.
#[derive(Serialize)]
struct Summary {
    release: String,
    steps: u64,
    steps_that_differ: u64,
    /// The first of them.
    first_difference: Option<u64>,
    end: Ended,
}

/// Why nothing follows.
#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Ended {
    /// It was as large as it might be.
    Limit,
    Stopped,
    /// The broker died, or the file was cut.
    Cut,
}

pub fn run(ctx: &Context, args: &Replay) -> Outcome {
    let object = args.recording.display().to_string();
    let problem = |e: RecordingError| match &e {
        RecordingError::Io { source, .. } => Problem::from_path(&object, source),
        RecordingError::Beginning(_) => Problem::from_error(ProblemKind::Failed, &object, &e),
        RecordingError::Format { .. } => Problem::from_error(ProblemKind::BadRequest, &object, &e)
            .next("replay it with the release that wrote it"),
        _ => Problem::from_error(ProblemKind::Damaged, &object, &e),
    };
    let mut player = Player::open(&args.recording).map_err(problem)?;
    let release = player.header.release.clone();
    if release != env!("CARGO_PKG_VERSION") {
        ctx.printer
            .note(format!("it was recorded by release {release}: this one may spell effects otherwise"));
    }
    let mut summary =
        Summary { release, steps: 0, steps_that_differ: 0, first_difference: None, end: Ended::Cut };
    loop {
        let step = match player.step() {
            Ok(Some(step)) => step,
            Ok(None) => break,
            Err(e) => {
                return Err(problem(e)
                    .next(format!("the first {} steps could be read", summary.steps))
                    .into());
            }
        };
        summary.steps = step.number;
        if !step.differences.is_empty() {
            summary.steps_that_differ += 1;
            summary.first_difference.get_or_insert(step.number);
        }
        show(ctx, args, &step)?;
    }
    summary.end = match player.end {
        Some(End::Limit) => Ended::Limit,
        Some(End::Stopped) => Ended::Stopped,
        None => Ended::Cut,
    };
    if ctx.printer.json {
        ctx.printer.json_line(&summary)?;
    } else {
        let end = match summary.end {
            Ended::Cut => "its broker died, or the file was cut",
            Ended::Limit => "it was as large as it might be",
            Ended::Stopped => "its broker was stopped",
        };
        ctx.printer.note(format!("{} steps; the recording ends there: {end}", summary.steps));
    }
    match summary.first_difference {
        None => Ok(()),
        Some(first) => {
            let reason = format!(
                "{} of {} steps differ, step {first} first",
                summary.steps_that_differ, summary.steps
            );
            let problem = Problem::new(ProblemKind::Conflict, &object, reason)
                .next(format!("see 'cicada replay {object} --from {first} --to {first} --full'"));
            Err(Failure::Problem(problem))
        }
    }
}

fn show(ctx: &Context, args: &Replay, step: &Step) -> Outcome {
    let in_range = step.number >= args.from && args.to.is_none_or(|to| step.number <= to);
    let silent = step.effects.is_empty() && step.differences.is_empty() && !args.full;
    if !in_range || silent || args.differences && step.differences.is_empty() {
        return Ok(());
    }
    let mut shown = Shown {
        step: step.number,
        line: step.line,
        at: step.at,
        input: input(&step.input),
        effects: step.effects.iter().map(|e| format!("{e:?}")).collect(),
        differences: step.differences.iter().map(difference).collect(),
    };
    if let Some(text) = &args.grep
        && !shown.input.contains(text.as_str())
        && !shown.effects.iter().any(|e| e.contains(text.as_str()))
    {
        return Ok(());
    }
    if !args.full {
        shown.input = cut(&shown.input);
        shown.effects.iter_mut().for_each(|e| *e = cut(e));
    }
    if ctx.printer.json {
        return ctx.printer.json_line(&shown);
    }
    let at = step.at.rfc3339();
    ctx.printer.line(format!("{} {at} {}", ctx.printer.bold(&step.number.to_string()), shown.input))?;
    for effect in &shown.effects {
        ctx.printer.line(format!("    {effect}"))?;
    }
    for difference in &shown.differences {
        ctx.printer.line(format!("    {}", ctx.printer.bad(&format!("differs: {difference}"))))?;
    }
    Ok(())
}

fn input(input: &Input) -> String {
    match input {
        // Sealed bytes say nothing to people.
        Input::Asked(ask, from, sealed) => format!("Asked({ask:?}, {from}, {} bytes)", sealed.len()),
        input => format!("{input:?}"),
    }
}

fn difference(difference: &Difference) -> String {
    match difference {
        Difference::Asks(what) => format!("it {what}"),
        Difference::Effect { place, recorded, now } => {
            let word = |d: &Option<String>| d.clone().unwrap_or_else(|| "nothing".into());
            format!("effect {}: was {}, is {}", place + 1, word(recorded), word(now))
        }
    }
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
