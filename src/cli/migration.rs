//! `cicada migration`

use std::path::PathBuf;

use clap::Subcommand;

use crate::config::Rate;
use crate::interface::problem::Problem;
use crate::interface::{
    Message, MigrationPhase, MigrationRole, MigrationView, MoveRequest, Reply, Request, Score,
};

use super::account;
use super::context::Context;
use super::format::{ago, bytes, seconds, utc};
use super::printer::{Failure, Outcome, Printer, unexpected};
use super::table::{Table, card};
use super::{receipt, resolve};

#[derive(Subcommand)]
pub enum Command {
    /// List the moves that run, then those that ended
    List,
    /// Show a move: what it cost, how long it was foretold to take, what is kept of it if it failed
    Show {
        /// Its id, or the beginning of it
        id: String,
    },
    /// Cancel a move; possible until the VM is handed over
    Cancel { id: String },
    /// Follow a move until it ends
    Watch { id: String },
    /// Print the doubly signed record of a move, also of one long ago; 'cicada receipt verify' checks it
    Receipt {
        /// The move's id, or the beginning of it
        id: String,
        /// A file to write it to, instead of printing it; it must not exist
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Decide who owns a VM whose hand-over is in doubt. Says what that risks, and asks
    Resolve(resolve::Resolve),
    /// Switch over now: no more copying while the VM runs. At either of the two clouds
    SwitchOver { id: String },
    /// Hold the guest still, so that copying catches up with it. At either of the two clouds
    Hold { id: String },
    /// Cap what a move sends from here, from now on, while it runs
    Limit {
        id: String,
        /// Bits a second such as "100Mbit" or bytes such as "12M"; 'none' lifts the cap
        #[arg(value_name = "RATE", value_parser = cap)]
        rate: Cap,
    },
}

/// A cap in bytes a second, or none.
#[derive(Clone, Copy, Debug)]
pub struct Cap(Option<u64>);

fn cap(text: &str) -> Result<Cap, String> {
    match text {
        "none" => Ok(Cap(None)),
        text => text.parse().map(|rate: Rate| Cap(Some(rate.bytes_per_s))).map_err(|e| e.to_string()),
    }
}

pub async fn run(ctx: &Context, command: Command) -> Outcome {
    match command {
        Command::List => ctx.read(&Request::Move(MoveRequest::List), print_list).await,
        Command::Show { id } => {
            ctx.read(&Request::Move(MoveRequest::Show { id }), |printer, reply| match reply {
                Reply::Migration(view) => print_view(printer, &view),
                other => Err(unexpected(&other)),
            })
            .await
        }
        Command::Cancel { id } => {
            ctx.ask(&Request::Move(MoveRequest::Cancel { id: id.clone() })).await?;
            ctx.printer.note(format!("{id} is being cancelled"));
            Ok(())
        }
        Command::SwitchOver { id } => {
            ctx.ask(&Request::Move(MoveRequest::SwitchOver { id: id.clone() })).await?;
            ctx.printer.note(format!("{id} switches over after the pass under way"));
            Ok(())
        }
        Command::Hold { id } => {
            ctx.ask(&Request::Move(MoveRequest::Hold { id: id.clone() })).await?;
            ctx.printer.note(format!("the guest of {id} is held still until it is switched over"));
            Ok(())
        }
        Command::Limit { id, rate: Cap(bytes_per_s) } => {
            ctx.ask(&Request::Move(MoveRequest::Limit { id: id.clone(), bytes_per_s })).await?;
            ctx.printer.note(match bytes_per_s {
                Some(rate) => format!("{id} sends at most {}/s from now on", bytes(rate)),
                None => format!("{id} sends as fast as it can from now on"),
            });
            Ok(())
        }
        Command::Receipt { id, output } => receipt::fetch(ctx, id, output).await,
        Command::Resolve(args) => resolve::run(ctx, args).await,
        Command::Watch { id } => {
            let result = ctx.follow(&Request::Move(MoveRequest::Watch { id })).await;
            end(ctx, result)
        }
    }
}

/// Prints the end of a migration that was followed. One that ended without a hand-over is a failure.
pub fn end(ctx: &Context, result: Result<Reply, Problem>) -> Outcome {
    let (view, problem) = match result {
        Ok(Reply::Migration(view)) => {
            let problem = view.problem.clone();
            (view, problem)
        }
        Ok(other) => return Err(unexpected(&other)),
        Err(problem) => return ctx.end(Err(problem), |_, _| Ok(())),
    };
    match problem {
        None => ctx.end(Ok(Reply::Migration(view)), |printer, reply| match reply {
            Reply::Migration(view) => account::print_end(printer, &view),
            other => Err(unexpected(&other)),
        }),
        Some(problem) => {
            if ctx.printer.json {
                ctx.printer.json_message(&Message::Reply(Box::new(Reply::Migration(view))))?;
            }
            Err(Failure::Problem(problem))
        }
    }
}

fn print_list(printer: &Printer, reply: Reply) -> Outcome {
    let Reply::Migrations(views) = reply else { return Err(unexpected(&reply)) };
    let mut table = Table::new(["MIGRATION", "VM", "", "PEER", "PHASE", ">DONE", ">SENT", "STARTED"]);
    for MigrationView { progress: p, account, .. } in &views {
        table.row([
            if printer.verbose { p.id.to_string() } else { p.id.short() },
            p.vm.to_string(),
            if p.role == MigrationRole::Target { "from".into() } else { "to".into() },
            p.peer_cloud.as_ref().map_or_else(|| p.peer.to_string(), ToString::to_string),
            p.phase.to_string(),
            if p.ended { "-".into() } else { format!("{:.0} %", p.fraction * 100.0) },
            bytes(account::sent_bytes(account)),
            ago(p.started),
        ]);
    }
    if table.is_empty() {
        printer.note("nothing has been moved yet");
    }
    table.print(printer)
}

/// How long the move was to take, and what became of that.
fn foretold(view: &MigrationView) -> Option<String> {
    let (p, foretold) = (&view.progress, view.account.foretold.as_ref()?);
    let interval = format!("{} to {}", seconds(foretold.low_s?), seconds(foretold.high_s?));
    if p.phase != MigrationPhase::Completed {
        return Some(interval);
    }
    let took_s = p.updated.since(p.started).as_secs_f64();
    let score = match foretold.score(took_s)? {
        Score::Held => "as foretold",
        Score::Sooner => "less than foretold",
        Score::Later => "more than foretold",
    };
    Some(format!("{interval}; it took {}, {score}", seconds(took_s)))
}

fn print_view(printer: &Printer, view: &MigrationView) -> Outcome {
    let p = &view.progress;
    let peer = p.peer_cloud.as_ref().map_or_else(String::new, |cloud| format!("{cloud} "));
    let problem = view.problem.as_ref();
    card(
        printer,
        &[
            ("migration", p.id.to_string()),
            ("VM", format!("{} ({})", p.vm, p.vm_id)),
            (if p.role == MigrationRole::Target { "from" } else { "to" }, format!("{peer}({})", p.peer)),
            ("phase", p.phase.to_string()),
            ("now", if p.ended { String::new() } else { p.detail.clone() }),
            ("started", utc(p.started)),
            (if p.ended { "ended" } else { "last change" }, utc(p.updated)),
            ("foretold", foretold(view).unwrap_or_default()),
            ("problem", problem.map(ToString::to_string).unwrap_or_default()),
            ("next step", problem.map(|p| p.next_step.clone()).unwrap_or_default()),
        ],
    )?;
    for remark in &view.remarks {
        printer.line(format!("{}  {remark}", printer.bold("note")))?;
    }
    printer.line("")?;
    account::print(printer, &view.account)
}
