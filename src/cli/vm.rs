//! `cicada vm`

use clap::{Args, Subcommand};

use crate::config::HumanDuration;
use crate::interface::{Deleted, Reply, Request, VmCreate, VmRequest, VmView};
use crate::types::{ByteSize, VmName};
use crate::vm::PowerState;

use super::adopt;
use super::confirm;
use super::console;
use super::context::Context;
use super::format::bytes;
use super::hardware::Hardware;
use super::printer::{Failure, Outcome, Printer, unexpected};
use super::recipe::Ingredients;
use super::table::{Table, card};
use super::vm_change;

/// What an overlay takes that no guest wrote to.
const UNTOUCHED_DELTA_BYTES: u64 = 1 << 20;

#[derive(Subcommand)]
pub enum Command {
    /// Make a VM of components
    Create(Create),
    /// Make a VM of an existing disk
    Adopt(adopt::Adopt),
    /// Write a stopped VM's disk to a file
    Export(adopt::Export),
    /// List the VMs
    List,
    /// Show one VM
    Show {
        /// Its name or UUID
        vm: String,
    },
    /// Start a VM
    Start {
        /// Its name or UUID
        vm: String,
        /// Although members that may own it by now did not say: you are sure that it runs nowhere else
        #[arg(long)]
        unconfirmed: bool,
        #[command(flatten)]
        wait: vm_change::Wait,
    },
    /// Shut VMs down, one after the other
    Stop {
        #[arg(required_unless_present = "all", value_name = "VM")]
        vms: Vec<String>,
        /// All that run, the newest first
        #[arg(long, conflicts_with = "vms")]
        all: bool,
        /// For the host's sake: they start again with the broker, and who does not end in time is switched off
        #[arg(long)]
        for_host: bool,
        /// Switch it off without asking the guest
        #[arg(long)]
        force: bool,
        /// How long the guest may take; its own setting, or the cloud's, if not given
        #[arg(long, value_name = "DURATION")]
        timeout: Option<HumanDuration>,
    },
    /// Shut a VM down and start it again
    Reboot(vm_change::Reboot),
    /// Change a VM: what runs keeps its CPUs and memory until its next start
    Set(vm_change::Set),
    /// Give a VM another name
    Rename(vm_change::Rename),
    /// Make disks of a stopped VM larger
    Resize(vm_change::Resize),
    /// Delete a stopped VM with its disks, or the copy that one left here
    Delete {
        vm: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Connect to a VM's console; Ctrl-] leaves it
    Console(console::Console),
}

#[derive(Args)]
pub struct Create {
    /// 1 to 63 of a-z 0-9 . _ -
    name: VmName,
    #[command(flatten)]
    ingredients: Ingredients,
    /// Size of the disk for the owner's data; 0 for none
    #[arg(long, default_value = "0", value_name = "SIZE")]
    user_data: ByteSize,
    #[command(flatten)]
    hardware: Hardware,
    /// Start it at once
    #[arg(long)]
    start: bool,
}

pub async fn run(ctx: &Context, command: Command) -> Outcome {
    match command {
        Command::Create(create) => ctx.work(&create.request(), print_vm).await,
        Command::Adopt(args) => adopt::adopt(ctx, args).await,
        Command::Export(args) => adopt::export(ctx, args).await,
        Command::List => ctx.read(&Request::Vm(VmRequest::List), print_list).await,
        Command::Show { vm } => ctx.read(&Request::Vm(VmRequest::Show { vm }), print_vm).await,
        Command::Start { vm, unconfirmed, wait } => {
            let request = Request::Vm(VmRequest::Start { vm: vm.clone(), unconfirmed, by_uid: None });
            vm_change::start(ctx, &vm, request, wait).await
        }
        Command::Reboot(args) => vm_change::reboot(ctx, args).await,
        Command::Set(args) => vm_change::set(ctx, args).await,
        Command::Rename(args) => vm_change::rename(ctx, args).await,
        Command::Resize(args) => vm_change::resize(ctx, args).await,
        Command::Stop { vms, all, for_host, force, timeout } => {
            let vms = match all {
                true => running(ctx).await?,
                false => vms.into_iter().map(|vm| (vm.clone(), vm)).collect(),
            };
            let timeout_s = timeout.map(whole_seconds);
            let mut failed = Ok(());
            for (vm, name) in vms {
                let request = Request::Vm(VmRequest::Stop { vm, force, timeout_s, for_host });
                match done(ctx, request, format!("{name} is stopped")).await {
                    // One guest that hangs does not keep the others running.
                    Err(Failure::Problem(problem)) if all => {
                        let earlier = std::mem::replace(&mut failed, Err(problem.into()));
                        if let Err(Failure::Problem(earlier)) = earlier {
                            ctx.printer.problem(&earlier);
                        }
                    }
                    ended => ended?,
                }
            }
            failed
        }
        Command::Delete { vm, yes } => delete(ctx, vm, yes).await,
        Command::Console(args) => console::run(ctx, args).await,
    }
}

impl Create {
    fn request(self) -> Request {
        let i = self.ingredients;
        Request::Vm(VmRequest::Create(VmCreate {
            name: self.name,
            components: i.components,
            ordered: i.ordered,
            root_size: i.root_size,
            user_data_size: self.user_data,
            memory: self.hardware.memory,
            cpus: self.hardware.cpus,
            networks: self.hardware.networks.clone(),
            kernel_command_line: i.kernel_command_line,
            start: self.start,
            hardware: self.hardware.chosen(),
        }))
    }
}

async fn delete(ctx: &Context, vm: String, yes: bool) -> Outcome {
    let shown = match ctx.ask(&Request::Vm(VmRequest::Show { vm: vm.clone() })).await? {
        Reply::Vm(view) => view,
        other => return Err(unexpected(&other)),
    };
    let taken_for = if shown.owner.is_some() { Deleted::KeptCopy } else { Deleted::Vm };
    // What runs, or is not to be deleted for another reason, is refused without a question.
    let asks = !yes && matches!(shown.power, PowerState::Stopped | PowerState::Crashed);
    if asks && let Some(statement) = at_stake(&shown) {
        ctx.printer.aloud().note(statement);
        confirm::by_name(shown.name.as_str(), &format!("VM {vm}"), "is not deleted")?;
    }
    let request = Request::Vm(VmRequest::Delete { vm: shown.id.to_string(), taken_for: Some(taken_for) });
    ctx.work(&request, |printer, reply| {
        let Reply::Deleted(d) = reply else { return Err(unexpected(&reply)) };
        printer.note(match &d.owner {
            Some(owner) => {
                format!("the copy that {} left here is deleted; the VM itself is {owner}'s", d.name)
            }
            None => format!("{} is deleted, with {}", d.name, content(d.root_delta_bytes, d.user_data_bytes)),
        });
        Ok(())
    })
    .await
}

/// What is lost with it; nothing for a VM whose disks hold nothing of its own.
fn at_stake(vm: &VmView) -> Option<String> {
    let content = content(vm.root_delta_bytes, vm.user_data_bytes);
    match &vm.owner {
        Some(owner) => Some(format!(
            "{} was handed over to {owner} and is not touched there. The copy that it left here, {content}, makes \
             the way home short: without it everything travels again.",
            vm.name
        )),
        None if vm.user_data_size.0 == 0 && vm.root_delta_bytes <= UNTOUCHED_DELTA_BYTES => None,
        None => Some(format!(
            "{} is here and nowhere else: its disks, {content}, are destroyed for good.",
            vm.name
        )),
    }
}

fn content(root_delta_bytes: u64, user_data_bytes: u64) -> String {
    format!("{} of changes and {} of user data", bytes(root_delta_bytes), bytes(user_data_bytes))
}

/// The VMs that run, each with its name, the newest first: who was started last may need those before it.
async fn running(ctx: &Context) -> Result<Vec<(String, String)>, Failure> {
    let reply = ctx.ask(&Request::Vm(VmRequest::List)).await?;
    let Reply::Vms(mut vms) = reply else { return Err(unexpected(&reply)) };
    vms.retain(|vm| vm.owner.is_none() && !matches!(vm.power, PowerState::Stopped | PowerState::Crashed));
    vms.sort_by_key(|vm| std::cmp::Reverse((vm.created, vm.id)));
    Ok(vms.into_iter().map(|vm| (vm.id.to_string(), vm.name.to_string())).collect())
}

/// Not zero of them for a short time.
pub(super) fn whole_seconds(time: HumanDuration) -> u64 {
    time.0.as_millis().div_ceil(1000) as u64
}

pub(super) async fn done(ctx: &Context, request: Request, text: String) -> Outcome {
    ctx.work(&request, |printer, _| {
        printer.note(text);
        Ok(())
    })
    .await
}

fn print_list(printer: &Printer, reply: Reply) -> Outcome {
    let Reply::Vms(vms) = reply else { return Err(unexpected(&reply)) };
    let mut table = Table::new([
        "NAME",
        "ID",
        "POWER",
        "WHERE",
        ">CPUS",
        ">MEMORY",
        ">ROOT DELTA",
        ">USER DATA",
        "MIGRATION",
    ]);
    for vm in &vms {
        table.row([
            vm.name.to_string(),
            if printer.verbose { vm.id.to_string() } else { vm.id.short() },
            vm.power.to_string(),
            place(vm),
            vm.cpus.to_string(),
            vm.memory.to_string(),
            bytes(vm.root_delta_bytes),
            bytes(vm.user_data_bytes),
            vm.migration.map(|m| m.short()).unwrap_or_default(),
        ]);
    }
    if table.is_empty() {
        printer.note("there are no VMs; 'cicada vm create' makes one");
    }
    table.print(printer)
}

fn place(vm: &VmView) -> String {
    match &vm.owner {
        Some(owner) => format!("{} ({owner})", vm.ownership),
        None => vm.ownership.to_string(),
    }
}

pub(super) fn print_vm(printer: &Printer, reply: Reply) -> Outcome {
    let Reply::Vm(vm) = reply else { return Err(unexpected(&reply)) };
    let power = match vm.power {
        PowerState::Running => printer.good("running"),
        PowerState::Crashed => printer.bad("crashed"),
        other => other.to_string(),
    };
    let nics: Vec<_> = vm.nics.iter().map(|n| format!("{} {} ({})", n.network, n.mac, n.model)).collect();
    let user_data = match vm.user_data_size.0 {
        0 => "none".into(),
        _ => format!("{}, {} in use", vm.user_data_size, bytes(vm.user_data_bytes)),
    };
    card(
        printer,
        &[
            ("name", vm.name.to_string()),
            ("id", vm.id.to_string()),
            ("power", power),
            ("where", place(&vm)),
            ("epoch", vm.epoch.to_string()),
            ("description", vm.description.clone()),
            ("CPUs", vm.cpus.to_string()),
            ("memory", vm.memory.to_string()),
            ("runs with", vm.runs_as.map(vm_change::shape).unwrap_or_default()),
            ("autostart", vm.autostart.to_string()),
            ("stop timeout", vm.stop_timeout_s.map(|s| format!("{s} s")).unwrap_or_default()),
            ("firmware", vm.firmware.to_string()),
            ("disk bus", vm.disk_bus.to_string()),
            ("UUID in guest", vm.system_uuid.to_string()),
            ("CPU model", vm.cpu_model.clone()),
            ("networks", nics.join(", ")),
            ("components", vm.components.join(", ")),
            ("recipe", vm.recipe.to_string()),
            ("root disk", format!("{}, {} of delta in use", vm.root_size, bytes(vm.root_delta_bytes))),
            ("user data", user_data),
            ("console", vm.console_socket.clone()),
            ("console log", vm.console_log.clone()),
            ("migration", vm.migration.map(|m| m.to_string()).unwrap_or_default()),
            ("problem", vm.problem.as_ref().map(|p| printer.bad(&p.reason)).unwrap_or_default()),
            ("next step", vm.problem.as_ref().map(|p| p.next_step.clone()).unwrap_or_default()),
        ],
    )
}
