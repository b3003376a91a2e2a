//! `cicada config`

use clap::Subcommand;

use crate::config::{Config, NetworkKind};
use crate::hypervisor::QemuConfig;
use crate::hypervisor::qemu::{find_passt, is_confinable, missing as missing_on_host, why_shared};
use crate::interface::problem::{Problem, ProblemKind};

use super::context::Context;
use super::printer::{Failure, Outcome};
use super::table::Table;
use super::{online, whose};

#[derive(Subcommand)]
pub enum Command {
    /// Check the configuration, the files it names, and that QEMU starts a VM as it is configured (works without a
    /// broker)
    Check {
        /// Also try what else a broker will need: the server, its certificate and the login, the room and entering
        /// it, the transfer port and addresses, and the bridges. A broker that runs is left alone
        #[arg(long)]
        online: bool,
    },
    /// Print the settings in effect, defaults included (works without a broker)
    Show,
}

pub async fn run(ctx: &Context, command: Command) -> Outcome {
    let config = ctx.config()?;
    match command {
        Command::Check { online } => {
            whose::not_as_root(&config)?;
            config.check_files().map_err(|e| Problem::from_config(&e))?;
            let warnings = walls(&config);
            let checks = match online {
                true => online::run(ctx, &config).await,
                // A second or so: what is wrong with the machine is found by trying alone.
                false => {
                    vec![online::check(online::CheckKind::Hypervisor, online::hypervisor(&config).await)]
                }
            };
            let failed = checks.iter().find_map(|c| c.problem.clone());
            if ctx.printer.json {
                let value = serde_json::json!({
                    "file": config.path, "good": failed.is_none(), "warnings": warnings, "checks": checks,
                });
                ctx.printer.json_value(&value)?;
                return failed.map_or(Ok(()), |problem| Err(Failure::Told(problem.kind)));
            }
            let mut table = Table::new(["CHECK", "RESULT", "WHAT"]);
            for check in &checks {
                let result = match (&check.problem, &check.warning) {
                    (Some(_), _) => "fault",
                    (None, Some(_)) => "warning",
                    (None, None) => "good",
                };
                table.row([check.check.to_string(), result.into(), check.detail.clone()]);
            }
            table.print(&ctx.printer)?;
            for warning in &warnings {
                ctx.printer.note(format!("warning: {warning}"));
            }
            for warning in checks.iter().filter_map(|c| c.warning.as_ref()) {
                ctx.printer.note(format!("warning: {warning}; {}", warning.next_step));
            }
            checks.iter().filter_map(|c| c.problem.as_ref()).for_each(|problem| ctx.printer.problem(problem));
            match failed {
                // Whatever else is wrong may follow from the first.
                Some(problem) => Err(Failure::Told(problem.kind)),
                None => ctx.printer.line(format!("{}: good", config.path.display())),
            }
        }
        Command::Show if ctx.printer.json => ctx.printer.json_value(config.effective()),
        Command::Show => {
            let text = toml::to_string(config.effective())
                .map_err(|e| Problem::from_error(ProblemKind::Failed, "configuration", &e))?;
            ctx.printer.line(format!("# {}", config.path.display()))?;
            text.trim_end().lines().try_for_each(|line| ctx.printer.line(line))
        }
    }
}

/// What guests need, or what of the walls around them, is missing on this host.
fn walls(config: &Config) -> Vec<String> {
    let mut missing = Vec::new();
    let users = config.networks.iter().filter(|n| n.kind == NetworkKind::User);
    let users: Vec<_> = users.map(|n| n.name.as_str()).collect();
    if !users.is_empty() && find_passt(&QemuConfig::default()).is_none() {
        missing.push(format!(
            "passt was not found: guests on the networks {} reach the services of this host, and VMs of other \
             clouds are only plugged in where foreign = true is set; install the package passt",
            users.join(", ")
        ));
    }
    if !is_confinable() {
        missing.push("this kernel has no Landlock: a broken QEMU could read whatever the broker can".into());
    }
    missing.extend(missing_on_host(&crate::daemon::qemu_config(config)));
    missing.extend(why_shared(&crate::daemon::qemu_config(config)));
    missing
}
