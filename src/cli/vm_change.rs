//! `cicada vm set`, `rename`, `resize`, `reboot`, and the waiting of `start`.

use std::io::SeekFrom;
use std::path::Path;
use std::time::Duration;

use clap::Args;
use tokio::io::{AsyncReadExt, AsyncSeekExt};

use crate::broker::READY_LINE;
use crate::config::HumanDuration;
use crate::interface::problem::{Problem, ProblemKind};
use crate::interface::{Reply, Request, VmRequest, VmSet, VmView};
use crate::migration::records::{Autostart, Shape};
use crate::types::{ByteSize, VmName};
use crate::vm::PowerState;

use super::context::Context;
use super::printer::{Outcome, unexpected};
use super::vm::{done, whole_seconds};

const WAIT: HumanDuration = HumanDuration::from_secs(300);
const LOG_POLL: Duration = Duration::from_millis(200);

#[derive(Args)]
pub struct Wait {
    /// Wait until its guest has booted: until its console shows a text
    #[arg(long)]
    wait: bool,
    /// That text; guests of the components that come with cicada print 'cicada: guest ready'
    #[arg(long, default_value = READY_LINE, value_name = "TEXT", requires = "wait")]
    wait_for: String,
    /// How long to wait
    #[arg(long, default_value_t = WAIT, value_name = "DURATION", requires = "wait")]
    wait_timeout: HumanDuration,
}

#[derive(Args)]
pub struct Reboot {
    /// Its name or UUID
    vm: String,
    /// Switch it off without asking the guest
    #[arg(long)]
    force: bool,
    /// How long the guest may take to shut down; its own setting, or the cloud's, if not given
    #[arg(long, value_name = "DURATION")]
    timeout: Option<HumanDuration>,
    #[command(flatten)]
    wait: Wait,
}

/// Name, CPUs and memory belong to the VM and go with it when it moves. Its description, autostart and
/// stop timeout belong to this cloud: they stay, and hold again when it comes home.
#[derive(Args)]
pub struct Set {
    /// Its name or UUID
    vm: String,
    #[command(flatten)]
    changes: Changes,
}

#[derive(Args)]
#[group(required = true, multiple = true)]
struct Changes {
    /// 1 to 63 of a-z 0-9 . _ -
    #[arg(long)]
    name: Option<VmName>,
    /// From its next start on, if it runs
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// From its next start on, if it runs
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// One line for people; '' for none
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// Whether it is started after a boot of this machine: if it ran (last), always or never
    #[arg(long, value_name = "last|always|never")]
    autostart: Option<Autostart>,
    /// How long its guest may take to shut down, also in a move; 'default' for the cloud's
    /// migration.stop_timeout_s
    #[arg(long, value_name = "DURATION", value_parser = stop_timeout)]
    stop_timeout: Option<u32>,
}

#[derive(Args)]
pub struct Rename {
    /// Its name or UUID
    vm: String,
    /// The new name: 1 to 63 of a-z 0-9 . _ -
    name: VmName,
}

/// What is new reads as zeros: the guest enlarges the partition and the file system itself, for
/// example with growpart and resize2fs. A broker of an earlier version does not take a VM whose root
/// disk was made larger.
#[derive(Args)]
pub struct Resize {
    /// Its name or UUID; it must be stopped
    vm: String,
    #[command(flatten)]
    sizes: Sizes,
}

#[derive(Args)]
#[group(required = true, multiple = true)]
struct Sizes {
    /// The new size of its root disk
    #[arg(long, value_name = "SIZE")]
    root: Option<ByteSize>,
    /// The new size of its user-data disk; makes one if there is none
    #[arg(long, value_name = "SIZE")]
    user_data: Option<ByteSize>,
}

fn stop_timeout(text: &str) -> Result<u32, String> {
    if text == "default" {
        return Ok(0);
    }
    let time: HumanDuration = text.parse().map_err(|e| format!("{e}, or default"))?;
    match u32::try_from(whole_seconds(time)) {
        Ok(s) if s > 0 => Ok(s),
        _ => Err("more than zero, at most a day, or default".into()),
    }
}

pub fn shape(shape: Shape) -> String {
    format!("{} CPUs and {} until its next start", shape.cpus, shape.memory)
}

pub async fn set(ctx: &Context, args: Set) -> Outcome {
    change(
        ctx,
        VmSet {
            vm: args.vm,
            name: args.changes.name,
            cpus: args.changes.cpus,
            memory: args.changes.memory,
            description: args.changes.description,
            autostart: args.changes.autostart,
            stop_timeout_s: args.changes.stop_timeout,
        },
    )
    .await
}

pub async fn rename(ctx: &Context, args: Rename) -> Outcome {
    let none = VmSet {
        vm: args.vm,
        name: Some(args.name),
        cpus: None,
        memory: None,
        description: None,
        autostart: None,
        stop_timeout_s: None,
    };
    change(ctx, none).await
}

async fn change(ctx: &Context, set: VmSet) -> Outcome {
    let was = set.vm.clone();
    ctx.work(&Request::Vm(VmRequest::Set(set)), |printer, reply| {
        let Reply::Vm(vm) = reply else { return Err(unexpected(&reply)) };
        printer.note(if vm.name.as_str() == was || vm.id.to_string() == was {
            format!("{} is changed", vm.name)
        } else {
            format!("{was} is now {}", vm.name)
        });
        if let Some(runs) = vm.runs_as {
            printer.note(format!(
                "it runs with {}; 'cicada vm reboot {}' gives it {} CPUs and {}",
                shape(runs),
                vm.name,
                vm.cpus,
                vm.memory
            ));
        }
        Ok(())
    })
    .await
}

pub async fn resize(ctx: &Context, args: Resize) -> Outcome {
    let request = Request::Vm(VmRequest::Resize {
        vm: args.vm,
        root_size: args.sizes.root,
        user_data_size: args.sizes.user_data,
    });
    ctx.work(&request, |printer, reply| {
        let Reply::Vm(vm) = reply else { return Err(unexpected(&reply)) };
        let user_data = match vm.user_data_size.0 {
            0 => String::new(),
            _ => format!(" and {} of user data", vm.user_data_size),
        };
        printer.note(format!(
            "{} has a root disk of {}{user_data}; its guest enlarges partition and file system",
            vm.name, vm.root_size
        ));
        Ok(())
    })
    .await
}

pub async fn start(ctx: &Context, vm: &str, request: Request, wait: Wait) -> Outcome {
    begin(ctx, vm, request, wait, "started").await
}

pub async fn reboot(ctx: &Context, args: Reboot) -> Outcome {
    let timeout_s = args.timeout.map(whole_seconds);
    let request = Request::Vm(VmRequest::Reboot { vm: args.vm.clone(), force: args.force, timeout_s });
    begin(ctx, &args.vm, request, args.wait, "rebooted").await
}

async fn begin(ctx: &Context, vm: &str, request: Request, wait: Wait, what: &str) -> Outcome {
    if !wait.wait {
        return done(ctx, request, format!("{vm} is {what}")).await;
    }
    let before = shown(ctx, vm).await?;
    // Of a VM that runs already, what it has printed counts too.
    let runs_on =
        matches!(request, Request::Vm(VmRequest::Start { .. })) && before.power == PowerState::Running;
    let from = match runs_on {
        true => 0,
        false => tokio::fs::metadata(&before.console_log).await.map_or(0, |m| m.len()),
    };
    let reply = ctx.follow(&request).await;
    if reply.is_ok() {
        ctx.step(format!("{vm} is {what}; waiting for '{}'", wait.wait_for))?;
        let seen = tokio::time::timeout(
            wait.wait_timeout.0,
            printed(Path::new(&before.console_log), from, wait.wait_for.as_bytes()),
        );
        if seen.await.is_err() {
            let reason = format!("runs, but '{}' did not come within {}", wait.wait_for, wait.wait_timeout);
            let problem = Problem::new(ProblemKind::Refused, format!("VM {vm}"), reason)
                .next(format!("look at its console: cicada vm console {vm} --history"));
            return ctx.end(Err(problem), |_, _| Ok(()));
        }
    }
    ctx.end(reply, |printer, _| {
        printer.note(format!("{vm} is {what}, and its guest is ready"));
        Ok(())
    })
}

async fn shown(ctx: &Context, vm: &str) -> Outcome<Box<VmView>> {
    match ctx.ask(&Request::Vm(VmRequest::Show { vm: vm.into() })).await? {
        Reply::Vm(view) => Ok(view),
        other => Err(unexpected(&other)),
    }
}

/// Returns when `text` stands in the log beyond `from`. A log that cannot be read yet may come.
async fn printed(log: &Path, mut from: u64, text: &[u8]) {
    let mut tail: Vec<u8> = Vec::new();
    loop {
        if let Ok(mut file) = tokio::fs::File::open(log).await {
            let len = file.metadata().await.map_or(0, |m| m.len());
            // It was cut, and begins anew.
            if len < from {
                (from, tail) = (0, Vec::new());
            }
            let mut piece = Vec::new();
            if file.seek(SeekFrom::Start(from)).await.is_ok()
                && let Ok(n) = file.take(1 << 20).read_to_end(&mut piece).await
            {
                from += n as u64;
                tail.extend_from_slice(&piece);
                if text.is_empty() || tail.windows(text.len()).any(|w| w == text) {
                    return;
                }
                let over = tail.len().saturating_sub(text.len());
                tail.drain(..over);
            }
        }
        tokio::time::sleep(LOG_POLL).await;
    }
}
