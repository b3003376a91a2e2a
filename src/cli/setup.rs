//! `cicada setup`: this machine made ready to run the broker as a service.

mod machine;
mod plan;

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::config::Config;
use crate::interface::problem::{Problem, ProblemKind};

use super::context::Context;
use super::printer::Outcome;
use machine::Machine;
use plan::{CONFIG, PASSWORD, Places, Plan, STATE, Step, UNITS, USER};

#[derive(Args)]
pub struct Setup {
    /// Only tell what would be done; root is not needed
    #[arg(long)]
    dry_run: bool,
    /// Set up the machine whose files lie below a directory, as an image or a chroot
    #[arg(long, value_name = "DIR", default_value = "/", hide_default_value = true)]
    root: PathBuf,
}

pub fn run(ctx: &Context, args: &Setup) -> Outcome {
    if !args.dry_run && !rustix::process::geteuid().is_root() {
        let reason = "needs root: it makes a user and files in /etc, /usr/local and /var";
        return Err(Problem::new(ProblemKind::Forbidden, "setup", reason)
            .next("run it with sudo; 'cicada setup --dry-run' tells what it would do")
            .into());
    }
    let root = fs::canonicalize(&args.root)
        .map_err(|e| Problem::from_path(format!("--root {}", args.root.display()), &e))?;
    let machine = Machine::below(&root);
    let (places, unusable) = places(&machine, &root);
    let wanted = plan::wanted(&places);
    let facts = machine.facts(&wanted)?;
    let plan = plan::plan(&wanted, &facts).map_err(|e| {
        let object = machine.at(&e.path).display().to_string();
        Problem::from_error(ProblemKind::Conflict, object, &e).next("move it away, and run this again")
    })?;
    if plan.steps.iter().any(|step| matches!(step, Step::GiveAll { .. })) {
        not_in_use(&machine, &places)?;
    }
    let mut done = Vec::new();
    for step in &plan.steps {
        if !args.dry_run {
            machine.perform(step).inspect_err(|_| tell_done(ctx, &done))?;
        }
        done.push(step);
    }
    let next = next(&machine, &places, &plan, unusable);
    if ctx.printer.json {
        let pair = |object: &str, key: &str, text: &str| serde_json::json!({ "object": object, key: text });
        return ctx.printer.json_value(&serde_json::json!({
            "dry_run": args.dry_run,
            "changes": plan.steps.iter().map(|s| pair(&s.object(), "change", &s.change())).collect::<Vec<_>>(),
            "kept": plan.kept.iter().map(|k| pair(&k.object, "reason", &k.reason)).collect::<Vec<_>>(),
            "next": next,
        }));
    }
    if plan.steps.is_empty() {
        ctx.printer.line("everything is as the service needs it")?;
    }
    let would = if args.dry_run { "would be: " } else { "" };
    for step in &plan.steps {
        ctx.printer.line(format!("{}: {would}{}", step.object(), step.change()))?;
    }
    for kept in &plan.kept {
        ctx.printer.note(format!("{}: {}", kept.object, kept.reason));
    }
    ctx.printer.line("next:")?;
    (1..).zip(&next).try_for_each(|(n, step)| ctx.printer.line(format!("{n}. {step}")))
}

/// What was done before something went wrong.
fn tell_done(ctx: &Context, done: &[&Step]) {
    done.iter().for_each(|step| ctx.printer.note(format!("{}: {}", step.object(), step.change())));
}

/// What the configuration says, and what is wrong with it.
fn places(machine: &Machine, root: &Path) -> (Places, Option<Problem>) {
    let path = machine.at(Path::new(CONFIG));
    if !path.exists() {
        return (Places::default(), None);
    }
    let config = match Config::load_with(Some(&path), [], &[]) {
        Ok(config) => config,
        Err(e) => return (Places::default(), Some(Problem::from_config(&e))),
    };
    // Relative paths were found from where the file lies now.
    let there = |path: &Path| match path.strip_prefix(root) {
        Ok(rest) => Path::new("/").join(rest),
        Err(_) => path.to_owned(),
    };
    let other = |path: &Path, usual: &Path| Some(there(path)).filter(|p| !p.starts_with(usual));
    let places = Places {
        password: other(&config.xmpp.password_file, Path::new(PASSWORD)),
        data_dir: other(&config.cloud.data_dir, Path::new(STATE)),
        repository: other(&config.repository.dir, Path::new(STATE)),
    };
    (places, None)
}

/// What is root's is not taken from a broker that runs as root.
fn not_in_use(machine: &Machine, places: &Places) -> Result<(), Problem> {
    let dir = places.data_dir.as_deref().unwrap_or(Path::new(STATE));
    let socket = machine.at(dir).join("cicada.sock");
    let answers = UnixStream::connect(&socket).ok();
    let by_root =
        answers.and_then(|s| rustix::net::sockopt::socket_peercred(&s).ok()).is_some_and(|c| c.uid.is_root());
    if !by_root {
        return Ok(());
    }
    let reason = "a broker of root's answers there, and its files are to become the service's";
    Err(Problem::new(ProblemKind::Conflict, socket.display().to_string(), reason)
        .next("stop it, and run this again; its VMs run on and are taken over if the service finds them"))
}

/// What is left for the operator.
fn next(machine: &Machine, places: &Places, plan: &Plan, unusable: Option<Problem>) -> Vec<String> {
    let mut next = Vec::new();
    let config = fs::read_to_string(machine.at(Path::new(CONFIG))).ok();
    match unusable {
        Some(problem) => next.push(format!("mend {CONFIG}: {problem}")),
        None if config.is_none_or(|text| plan::is_sample(&text)) => {
            next.push(format!("change the four values marked REQUIRED in {CONFIG}"));
        }
        None => {}
    }
    let password = places.password.as_deref().unwrap_or(Path::new(PASSWORD));
    if fs::metadata(machine.at(password)).map_or(0, |m| m.len()) == 0 {
        next.push(format!(
            "write the account's password into it: cat >{} (an editor may leave it root's: then run this again)",
            password.display()
        ));
    }
    next.push(format!("runuser -u {USER} -- cicada config check --online"));
    let is_unit =
        |step: &Step| matches!(step, Step::WriteFile { replaces: true, path, .. } if path.starts_with(UNITS));
    next.push(match plan.steps.iter().any(is_unit) {
        true => "systemctl restart cicada: VMs run on".into(),
        false => "systemctl enable --now cicada cicada-guests".into(),
    });
    next
}
