//! `cicada repo`

use clap::Subcommand;

use crate::interface::problem::{Problem, ProblemKind};
use crate::interface::{CloudRequest, ContentRequest, Reply, ReportLine, Request};
use crate::runner::content::healing::unhealed;

use super::archive;
use super::context::Context;
use super::format::bytes;
use super::printer::{Outcome, Printer, unexpected};
use super::table::Table;

/// They work without a broker too: then they open its repository themselves.
#[derive(Subcommand)]
pub enum Command {
    /// What is kept, and how much it saves
    Stats,
    /// Read and verify everything; damaged objects are set aside
    Check {
        /// Fetch what is damaged or missing from members of the federation that hold it (needs the broker)
        #[arg(long)]
        heal: bool,
    },
    /// Remove what no name, VM or running transfer needs
    Gc {
        /// Only say what would be removed
        #[arg(long)]
        dry_run: bool,
    },
    /// Make the index anew from the objects
    RebuildIndex,
    /// Write components and recipes to an archive, for a cloud that no link reaches
    ///
    /// Everything that has a name goes into it, or what the chosen components and recipes need. A directory
    /// that holds an earlier export is brought up to date.
    Export(archive::Export),
    /// Take what an archive holds and the repository lacks
    ///
    /// Every object is verified. An import that was interrupted is gone on with by starting it again.
    Import(archive::Import),
}

pub async fn run(ctx: &Context, command: Command) -> Outcome {
    match command {
        Command::Stats => ctx.read(&Request::Content(ContentRequest::RepoStats), print_report).await,
        Command::Check { heal } => check(ctx, heal).await,
        Command::Gc { dry_run } => {
            ctx.work(&Request::Content(ContentRequest::RepoGc { dry_run }), print_report).await
        }
        Command::Export(e) => archive::export(ctx, e).await,
        Command::Import(i) => archive::import(ctx, i).await,
        Command::RebuildIndex => {
            ctx.work(&Request::Content(ContentRequest::RepoRebuildIndex), print_report).await
        }
    }
}

async fn check(ctx: &Context, heal: bool) -> Outcome {
    let request =
        if heal { Request::Cloud(CloudRequest::Heal) } else { Request::Content(ContentRequest::RepoCheck) };
    let result = ctx.follow(&request).await;
    let faults = match &result {
        Ok(Reply::Report(lines)) if heal => unhealed(lines),
        Ok(reply) => count_faults(reply),
        Err(_) => 0,
    };
    ctx.end(result, print_report)?;
    if faults == 0 {
        return Ok(());
    }
    let problem = |reason| Problem::new(ProblemKind::Damaged, "repository", reason);
    Err(match heal {
        true => problem(format!("{faults} objects stay damaged or missing"))
            .next("build or import the components again"),
        false => problem(format!("{faults} faults were found"))
            .next("fetch what is missing from other members with: cicada repo check --heal"),
    }
    .into())
}

fn count_faults(reply: &Reply) -> u64 {
    let Reply::Report(lines) = reply else { return 0 };
    lines.iter().filter(|l| !l.detail.is_empty() && l.name != "good").map(|l| l.value).sum()
}

pub(super) fn print_report(printer: &Printer, reply: Reply) -> Outcome {
    let Reply::Report(lines) = reply else { return Err(unexpected(&reply)) };
    let mut table = Table::new(["", ">", ""]);
    for ReportLine { name, value, unit, detail } in lines {
        let value = match unit.as_str() {
            "bytes" => bytes(value),
            "percent" => format!("{value} %"),
            "" => value.to_string(),
            _ => format!("{value} {unit}"),
        };
        table.row([name.replace('-', " "), value, detail]);
    }
    table.print(printer)
}
