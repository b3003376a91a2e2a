//! Level 6: the command line. One file per group of subcommands; parsing does no work, results go
//! to stdout and everything else to stderr.

mod account;
mod adopt;
mod archive;
pub mod bench;
mod broker;
mod component;
mod config;
mod confirm;
mod console;
mod context;
mod examples;
mod federation;
mod files;
mod format;
mod generate;
mod hardware;
mod identity;
mod members;
mod migration;
mod moving;
mod names;
mod online;
mod plan;
mod printer;
mod progress;
mod push;
mod receipt;
mod recipe;
mod replay;
mod repo;
mod resolve;
mod room_check;
mod setup;
mod sim;
mod table;
mod target;
mod vm;
mod vm_change;
mod whose;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use context::Context;
use printer::{ColorChoice, Failure, Outcome, Printer};

use crate::interface::Message;
use crate::interface::problem::{Problem, ProblemKind};
use crate::telemetry;

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    something failed that should not have
  2    the request or the configuration is wrong
  3    no VM, member, component, recipe or migration of that name, or nothing at a path
  4    the object is in a state in which this cannot be done
  5    refused: a policy, a lack of resources, another cloud said no, or what was waited for did not come
  6    not allowed: not a member, unknown key, wrong credentials, another user's file
  7    a broker, member or server that is needed cannot be reached
  8    content is missing or does not match its hash
  9    a disk is full
  10   a program or file this machine needs is missing
  130  cancelled

Settings come from flags, then from the environment (CICADA_XMPP__ROOM sets room in [xmpp]), then
from the configuration file: --config or CICADA_CONFIG, else ./federation.toml, else
/etc/cicada/federation.toml.";

/// A federated cloud broker: moves virtual machines between independent clouds.
///
/// 'cicada broker' is the daemon of one cloud; the other commands talk to it through its socket,
/// except where they say that they work without it.
#[derive(Parser)]
#[command(name = "cicada", version, after_help = EXIT_CODES, max_term_width = 110)]
pub struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
pub struct Globals {
    /// The configuration file
    #[arg(long, global = true, env = "CICADA_CONFIG", value_name = "FILE", help_heading = "Everywhere")]
    config: Option<PathBuf>,
    /// Set one field of the configuration, for example transfer.listen=0.0.0.0:7421
    #[arg(long, global = true, value_name = "FIELD=VALUE", value_parser = setting, help_heading = "Everywhere")]
    set: Vec<(String, String)>,
    /// The broker's socket; without it the configuration names it
    #[arg(long, global = true, env = "CICADA_SOCKET", value_name = "PATH", help_heading = "Everywhere")]
    socket: Option<PathBuf>,
    /// Print JSON: one value, or for long work one line per event and then the result
    #[arg(long, global = true, help_heading = "Everywhere")]
    json: bool,
    /// Print results and errors only
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Everywhere")]
    quiet: bool,
    /// Print whole ids and more columns
    #[arg(short, long, global = true, help_heading = "Everywhere")]
    verbose: bool,
    /// When to use colour; NO_COLOR is respected
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        value_name = "WHEN",
        help_heading = "Everywhere"
    )]
    color: ColorChoice,
    /// What to log to stderr: a level, or directives such as info,cicada::transfer=debug
    #[arg(long, global = true, env = "CICADA_LOG", value_name = "FILTER", help_heading = "Everywhere")]
    log: Option<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Run this cloud's broker
    ///
    /// It runs in the foreground and logs to stderr. TERM and INT stop it: VMs keep running, and moves go on
    /// when it starts again.
    Broker {
        /// Its state was restored from a backup: ask all members before any VM is run
        #[arg(long)]
        after_restore: bool,
        #[command(flatten)]
        recording: broker::Recording,
    },
    /// Make this machine ready to run the broker as a service (as root, without a broker)
    ///
    /// Makes the user 'cicada', the directories /etc/cicada and /var/lib/cicada, a configuration to be filled in
    /// where there is none, and the units of systemd, all with the owners and modes that the broker asks for. What
    /// it does is told line by line, and what is left to do. It may be run again at any time: it mends owners and
    /// modes, brings its own files up to date, and never writes over a file that somebody else made or changed.
    Setup(setup::Setup),
    /// Check or show the configuration (without a broker)
    #[command(subcommand)]
    Config(config::Command),
    /// This cloud's identity key, and whose keys it trusts
    #[command(subcommand)]
    Identity(identity::Command),
    /// Make the federation's room and its list of members (without a broker)
    #[command(subcommand)]
    Federation(federation::Command),
    /// Who is in the federation and what they offer
    Members(members::Members),
    /// How this cloud's broker is
    Status,
    /// Build, import and look at components
    #[command(subcommand)]
    Component(component::Command),
    /// Sets of components that make a disk
    #[command(subcommand)]
    Recipe(recipe::Command),
    /// Write the disk image of a recipe
    Compose(recipe::Compose),
    /// The repository of components and other content
    #[command(subcommand)]
    Repo(repo::Command),
    /// Virtual machines of this cloud
    #[command(subcommand)]
    Vm(Box<vm::Command>),
    /// Which members can take a VM, and what they lack of it
    Plan(plan::Plan),
    /// Move a VM to another cloud
    Move(moving::Move),
    /// Moves that run or ended
    #[command(subcommand)]
    Migration(migration::Command),
    /// The doubly signed records of hand-overs
    #[command(subcommand)]
    Receipt(receipt::Command),
    /// Measure what this machine makes of a repository's work (without a broker)
    Bench(bench::Bench),
    /// Simulate a federation of these brokers for days, in minutes (without a broker)
    ///
    /// The brokers' decisions are made by the code that ships; network, time, hypervisors and repositories are
    /// models that count bytes. The same scenario and seed give the same run.
    Sim(sim::Sim),
    /// Step a broker's core through what 'cicada broker --record' wrote, and show what it decides (without a broker)
    ///
    /// Nothing is done of what it decides. Exit code 4 if it decides otherwise than the recorded broker did.
    Replay(replay::Replay),
    /// Print completions for a shell (without a broker)
    #[command(visible_alias = "completion")]
    Completions(generate::Completions),
    /// Write the manual pages (without a broker)
    Man(generate::Man),
    /// Print names of what is there, for completions
    #[command(hide = true)]
    CompleteNames(names::CompleteNames),
    /// Links a guest's network card, on standard input, to the outside by passt; the broker starts it
    #[command(hide = true)]
    GuestLink { passt: PathBuf },
}

/// Parses the process's arguments, runs the command and returns its exit code.
pub fn run() -> ExitCode {
    // Before anything is made: what a cloud keeps is nobody else's to read, whatever the shell set.
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    let Cli { globals, command } = parse().unwrap_or_else(|e| not_understood(&e));
    let printer = Printer::new(globals.color, globals.json, globals.quiet, globals.verbose);
    let has_value = command.has_value();
    let ended = execute(globals, command, printer.clone());
    match ended.and_then(|()| if has_value { printer.end_well() } else { Ok(()) }) {
        Ok(()) | Err(Failure::BrokenPipe) => ExitCode::SUCCESS,
        Err(Failure::Told(kind)) => ExitCode::from(kind.exit_code()),
        Err(Failure::Problem(problem)) => {
            printer.end_badly(&problem);
            ExitCode::from(problem.kind.exit_code())
        }
    }
}

impl Command {
    /// Whether programs get a value of it, not bytes or nothing.
    fn has_value(&self) -> bool {
        match self {
            Command::Broker { .. } | Command::CompleteNames(_) | Command::GuestLink { .. } => false,
            Command::Vm(command) => !matches!(**command, vm::Command::Console(_)),
            _ => true,
        }
    }
}

fn parse() -> Result<Cli, clap::Error> {
    Cli::from_arg_matches(&examples::added(Cli::command()).try_get_matches()?)
}

/// A command line that is wrong, or asks for help only. Who asked for JSON gets that of an error as well.
fn not_understood(e: &clap::Error) -> ! {
    let wants_json = std::env::args_os().take_while(|a| a != "--").any(|a| a == "--json");
    if wants_json && e.use_stderr() {
        let said = e.to_string();
        let reason = said.lines().next().unwrap_or_default().trim_start_matches("error: ");
        let problem = Problem::new(ProblemKind::BadRequest, "command line", reason).next("try '--help'");
        let _ = Printer::new(ColorChoice::Never, true, false, false).json_message(&Message::Problem(problem));
    }
    e.exit()
}

fn execute(globals: Globals, command: Command, printer: Printer) -> Outcome {
    let is_broker = matches!(command, Command::Broker { .. });
    let default = match command {
        Command::Broker { .. } => telemetry::BROKER_FILTER,
        // What simulated brokers log is theirs; a rule that is broken is told as the command's error.
        Command::Sim(_) | Command::Replay(_) => "off",
        _ => telemetry::COMMAND_FILTER,
    };
    telemetry::start(globals.log.as_deref().unwrap_or(default), is_broker).map_err(|e| {
        Problem::from_error(ProblemKind::BadRequest, "--log", &e).next("write for example: --log info")
    })?;
    let mut runtime = match is_broker {
        true => tokio::runtime::Builder::new_multi_thread(),
        false => tokio::runtime::Builder::new_current_thread(),
    };
    let runtime = runtime
        .enable_all()
        .build()
        .map_err(|e| Problem::from_error(ProblemKind::Failed, "this process", &e))?;
    let result = runtime.block_on(dispatch(Context::new(globals, printer), command));
    // A read of the terminal cannot be cancelled; it must not keep the process alive.
    runtime.shutdown_background();
    result
}

async fn dispatch(ctx: Context, command: Command) -> Outcome {
    match command {
        Command::Broker { after_restore, recording } => broker::run(&ctx, after_restore, recording).await,
        Command::Setup(s) => setup::run(&ctx, &s),
        Command::Config(c) => config::run(&ctx, c).await,
        Command::Identity(c) => identity::run(&ctx, c).await,
        Command::Federation(c) => federation::run(&ctx, c).await,
        Command::Members(c) => members::run(&ctx, c).await,
        Command::Status => members::status(&ctx).await,
        Command::Component(c) => component::run(&ctx, c).await,
        Command::Recipe(c) => recipe::run(&ctx, c).await,
        Command::Compose(c) => recipe::compose(&ctx, c).await,
        Command::Repo(c) => repo::run(&ctx, c).await,
        Command::Vm(c) => vm::run(&ctx, *c).await,
        Command::Plan(c) => plan::run(&ctx, c).await,
        Command::Move(c) => moving::run(&ctx, c).await,
        Command::Migration(c) => migration::run(&ctx, c).await,
        Command::Receipt(c) => receipt::run(&ctx, c),
        Command::Bench(b) => bench::run(&ctx, &b),
        Command::Sim(s) => sim::run(&ctx, &s),
        Command::Replay(r) => replay::run(&ctx, &r),
        Command::Completions(c) => generate::completions(&ctx, &c),
        Command::CompleteNames(c) => names::print(&ctx, c).await,
        Command::Man(c) => generate::man(&ctx, &c),
        Command::GuestLink { passt } => crate::hypervisor::qemu::link::run(&passt)
            .map_err(|e| Problem::from_error(ProblemKind::Failed, "guest-link", &e).into()),
    }
}

fn setting(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((field, value)) if field.contains('.') => Ok((field.trim().to_owned(), value.trim().to_owned())),
        _ => Err("write section.field=value, for example transfer.listen=0.0.0.0:7421".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::examples::added(super::Cli::command()).debug_assert();
    }
}
