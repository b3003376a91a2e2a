//! `cicada move`: the plan, how it goes on, what it cost. Ctrl-C asks the broker to cancel and
//! waits for what comes of it; a second one leaves the move to the broker.

use clap::Args;
use futures::future::{BoxFuture, FutureExt, OptionFuture};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::client::Client;
use crate::interface::problem::{Problem, ProblemKind};
use crate::interface::{Event, MoveRequest, Reply, Request};
use crate::types::MigrationId;

use super::context::Context;
use super::printer::{Outcome, unexpected};
use super::progress::Progress;
use super::{migration, plan};

#[derive(Args)]
pub struct Move {
    /// The VM's name or UUID
    vm: String,
    /// Where to: a cloud's name or an address; the best member if not given
    #[arg(long, value_name = "CLOUD")]
    to: Option<String>,
    /// Switch a guest off that does not end in its time: it may lose what it had not written
    #[arg(long)]
    force_stop: bool,
    /// Only say who could take it and what would travel
    #[arg(long)]
    dry_run: bool,
}

pub async fn run(ctx: &Context, args: Move) -> Outcome {
    if args.dry_run {
        let request = Request::Move(MoveRequest::Begin {
            vm: args.vm,
            to: args.to,
            dry_run: true,
            force_stop: args.force_stop,
        });
        return ctx.read(&request, plan::print_reply).await;
    }
    let client = ctx.client().await?;
    let to = choose(ctx, &client, &args).await?;
    let request =
        Request::Move(MoveRequest::Begin { vm: args.vm, to, dry_run: false, force_stop: args.force_stop });
    follow(ctx, &client, &request).await
}

/// Prints the plan's line and returns its target, so that what was planned is what happens.
async fn choose(ctx: &Context, client: &Client, args: &Move) -> Outcome<Option<String>> {
    let request = Request::Move(MoveRequest::Plan { vm: args.vm.clone(), to: args.to.clone(), all: false });
    let plan = match client.call(&request, |_| ()).await? {
        Reply::Plan(plan) => plan,
        other => return Err(unexpected(&other)),
    };
    match plan.candidates.first() {
        Some(best) if best.verdict.is_yes() => {
            plan::lines(&plan, best).into_iter().try_for_each(|line| ctx.step(line))?;
            Ok(Some(best.jid.to_string()))
        }
        // The broker refuses, and says why.
        _ => Ok(args.to.clone()),
    }
}

async fn follow(ctx: &Context, client: &Client, request: &Request) -> Outcome {
    let failed = |e: std::io::Error| Problem::from_error(ProblemKind::Failed, "signals", &e);
    let mut interrupts = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut progress = Progress::new(&ctx.printer);
    let (found, id) = watch::channel(None);
    let result = {
        let on_event = |event: Event| {
            if let Event::Migration(m) = &event {
                found.send_replace(Some(m.id));
            }
            progress.event(&event);
        };
        let mut call = std::pin::pin!(client.call(request, on_event));
        let mut cancelling: OptionFuture<BoxFuture<'_, Result<Reply, Problem>>> = None.into();
        let mut interrupted = false;
        loop {
            tokio::select! {
                result = &mut call => break result,
                _ = interrupts.recv() => {
                    if interrupted {
                        break Err(left(*id.borrow()));
                    }
                    interrupted = true;
                    ctx.printer.note("cancelling; press Ctrl-C again to leave the move to the broker");
                    cancelling = Some(cancel(client, id.clone()).boxed()).into();
                }
                Some(answer) = &mut cancelling => {
                    cancelling = None.into();
                    if let Err(problem) = answer {
                        ctx.printer.note(format!("not cancelled: {problem}"));
                    }
                }
            }
        }
    };
    progress.end();
    migration::end(ctx, result)
}

/// Cancels the migration as soon as its id is known.
async fn cancel(client: &Client, mut id: watch::Receiver<Option<MigrationId>>) -> Result<Reply, Problem> {
    let known = id.wait_for(Option::is_some).await.ok().and_then(|id| *id);
    match known {
        Some(id) => client.call(&Request::Move(MoveRequest::Cancel { id: id.to_string() }), |_| ()).await,
        None => Ok(Reply::Done),
    }
}

fn left(id: Option<MigrationId>) -> Problem {
    let next = match id {
        Some(id) => format!("cicada migration watch {id}"),
        None => "cicada migration list".into(),
    };
    Problem::new(ProblemKind::Cancelled, "move", "is left to the broker, which goes on with it").next(next)
}
