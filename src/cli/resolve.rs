//! `cicada migration resolve`: the loud override. It says what is at risk before anything happens.

use clap::{Args, ValueEnum};

use crate::interface::{MoveRequest, Reply, Request, ResolutionView, Side};

use super::confirm;
use super::context::Context;
use super::printer::{Outcome, unexpected};

#[derive(Args)]
pub struct Resolve {
    /// The move's id, or the beginning of it
    id: String,
    /// Which cloud owns the VM from now on, as seen from here
    #[arg(long, value_enum)]
    owner: Owner,
    /// Do not ask; what is risked is printed all the same
    #[arg(long)]
    yes: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Owner {
    /// This cloud. At the target of a move only where the VM is contested
    Here,
    /// The other cloud. At the target of a move: a promise never to run the VM
    There,
}

pub async fn run(ctx: &Context, args: Resolve) -> Outcome {
    let owner = match args.owner {
        Owner::Here => Side::Here,
        Owner::There => Side::There,
    };
    let told = ask(ctx, &args.id, owner, false).await?;
    // Never kept quiet.
    let loud = ctx.printer.aloud();
    loud.note(&told.statement);
    if !told.checks.is_empty() {
        loud.note("Make sure first:");
    }
    told.checks.iter().for_each(|check| loud.note(format!("  - {check}")));
    if !args.yes {
        confirm::by_name(told.vm.as_str(), &format!("migration {}", told.migration), "is not decided")?;
    }
    let done = ask(ctx, &told.migration.to_string(), owner, true).await?;
    if ctx.printer.json {
        return ctx.printer.json_value(&done);
    }
    ctx.printer.note(format!(
        "decided and recorded; 'cicada migration show {}' and 'cicada vm show {}' say what comes of it",
        done.migration, done.vm_id
    ));
    Ok(())
}

async fn ask(ctx: &Context, id: &str, owner: Side, confirmed: bool) -> Outcome<ResolutionView> {
    let request = Request::Move(MoveRequest::Resolve { id: id.to_owned(), owner, confirmed, by_uid: None });
    match ctx.ask(&request).await? {
        Reply::Resolution(view) => Ok(*view),
        other => Err(unexpected(&other)),
    }
}
