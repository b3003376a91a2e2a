//! `cicada component`

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::build::{
    self, BuildError, BuildEvent, BuildOptions, Built, ImportIdentity, ImportOptions, LeftOut,
};
use crate::component::Kind;
use crate::interface::problem::{Problem, ProblemKind};
use crate::interface::{
    ComponentDetail, ComponentDiff, ComponentView, ContentRequest, Event, Message, Reply, Request,
};
use crate::repository::Repository;
use crate::runner::content::catalogue;
use crate::types::ComponentId;

use super::context::Context;
use super::format::{bytes, seconds};
use super::printer::{Outcome, Printer, unexpected};
use super::table::{Table, card};
use super::{push, target, whose};

/// Where root builds for a broker of another user; 'cicada setup' makes it.
const ROOTS_DIR: &str = "/var/cache/cicada-build";

#[derive(Subcommand)]
pub enum Command {
    /// Build components from definitions and hand them to the broker (works without a broker)
    ///
    /// Needs no root: another user builds in a user namespace, with the ids of /etc/subuid and
    /// /etc/subgid. Root builds only in a directory that nobody else may write to.
    ///
    /// Building happens in a repository of its own; what the broker lacks goes to it through its
    /// socket, or into its repository while it does not run.
    Build {
        /// Component definitions
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        #[command(flatten)]
        place: Place,
        /// Build even what an earlier build of the same inputs made
        #[arg(long)]
        rebuild: bool,
        /// Leave a failed build's tree for inspection
        #[arg(long)]
        keep_failed: bool,
    },
    /// Make a component of a directory or a tar archive (works without a broker)
    ///
    /// Content, owners (as ids), modes, times (whole seconds), links, devices, ACLs and the extended
    /// attributes of files and directories are kept. What is left out (sockets, logs, what a running
    /// system makes anew) is said. What a tar archive says that cannot be kept, secrets, and what no
    /// disk could be composed with is refused.
    Import(Import),
    /// List the components by name
    ///
    /// What came by a move is held for the VMs that need it, but its name is bound to nothing: it is
    /// listed as not bound, and 'component bind' binds it.
    List,
    /// Show one component
    Show {
        /// A name, name@version or the beginning of an id
        component: String,
        /// List the paths in it
        #[arg(long)]
        entries: bool,
    },
    /// Compare two components
    Diff { from: String, to: String },
    /// Compress strongly what components consist of, and make deltas between the versions that are
    /// here, so that less travels (works without a broker)
    ///
    /// Takes about 3 s for 10 MB on a core, at the lowest priority. It can be stopped and run again.
    Optimize {
        /// Names, name@version or beginnings of ids; all components held if none is given
        components: Vec<String>,
        /// Only compress
        #[arg(long)]
        no_deltas: bool,
    },
    /// Bind a component that came by a move to its name, so that new VMs can have it (works without a
    /// broker)
    Bind {
        /// The beginning of an id that 'component list' shows as not bound
        id: String,
        /// The name it must have, for certainty: a component's name is part of it
        #[arg(value_name = "NAME@VERSION")]
        name: Option<String>,
    },
    /// Forget a component's name; 'cicada repo gc' frees what nothing else needs
    Remove { component: String },
}

#[derive(Args)]
pub struct Place {
    /// Where building happens: packages, work in progress, what was built; <data_dir>/build if not given, and
    /// /var/cache/cicada-build for root where the broker is another user's
    #[arg(long, value_name = "DIR")]
    build_dir: Option<PathBuf>,
}

#[derive(Args)]
pub struct Import {
    /// A directory, or a .tar or .tar.zst archive
    source: PathBuf,
    #[arg(long)]
    name: String,
    #[arg(long)]
    version: String,
    /// format, kernel, os or program
    #[arg(long, default_value = "program")]
    kind: Kind,
    /// Debian architecture name
    #[arg(long, default_value = "amd64")]
    architecture: String,
    /// A component it was made on; what that has already is left out. Built or imported here before
    #[arg(long, value_name = "COMPONENT")]
    requires: Vec<String>,
    /// Let the source's directories replace links, owners, modes and times of what it requires
    ///
    /// Without this a directory of what it requires stays as it is there, and where that has a link to
    /// a directory (/lib to usr/lib), what the source has in that place goes through the link.
    #[arg(long)]
    as_is: bool,
    #[command(flatten)]
    place: Place,
}

pub async fn run(ctx: &Context, command: Command) -> Outcome {
    match command {
        Command::Build { files, place, rebuild, keep_failed } => {
            run_build(ctx, files, &place, rebuild, keep_failed).await
        }
        Command::Import(import) => run_import(ctx, import).await,
        Command::List => ctx.read(&Request::Content(ContentRequest::ComponentList), print_list).await,
        Command::Show { component, entries } => {
            ctx.read(
                &Request::Content(ContentRequest::ComponentShow { component, entries }),
                |printer, reply| match reply {
                    Reply::Component(detail) => print_detail(printer, &detail),
                    other => Err(unexpected(&other)),
                },
            )
            .await
        }
        Command::Diff { from, to } => {
            ctx.read(&Request::Content(ContentRequest::ComponentDiff { from, to }), |printer, reply| {
                match reply {
                    Reply::ComponentDiff(diff) => print_diff(printer, &diff),
                    other => Err(unexpected(&other)),
                }
            })
            .await
        }
        Command::Optimize { components, no_deltas } => {
            let request =
                Request::Content(ContentRequest::ComponentOptimize { components, deltas: !no_deltas });
            ctx.work(&request, super::repo::print_report).await
        }
        Command::Bind { id, name } => {
            let reply =
                ctx.ask(&Request::Content(ContentRequest::ComponentName { component: id, name })).await?;
            let Reply::Components(bound) = &reply else { return Err(unexpected(&reply)) };
            if ctx.printer.json {
                return ctx.printer.json_reply(&reply);
            }
            bound.iter().try_for_each(|c| {
                let id = id_text(&ctx.printer, &c.id);
                ctx.printer.line(format!("{}@{} is bound to {id}", c.name, c.version))
            })
        }
        Command::Remove { component } => {
            ctx.ask(&Request::Content(ContentRequest::ComponentRemove { component: component.clone() }))
                .await?;
            ctx.printer
                .note(format!("{component} is removed; 'cicada repo gc' frees what nothing else needs"));
            Ok(())
        }
    }
}

impl Place {
    fn dir(&self, ctx: &Context) -> Result<PathBuf, Problem> {
        match &self.build_dir {
            Some(dir) => Ok(dir.clone()),
            None => {
                let config = ctx.config()?;
                // What root made in another user's directory that user could not go on with.
                match whose::not_as_root(&config) {
                    Ok(()) => Ok(config.cloud.data_dir.join("build")),
                    Err(_) => Ok(ROOTS_DIR.into()),
                }
            }
        }
    }

    fn repository(&self, ctx: &Context) -> Result<Repository, Problem> {
        let dir = self.dir(ctx)?.join("repository");
        std::fs::create_dir_all(&dir).map_err(|e| {
            Problem::from_error(ProblemKind::Failed, format!("directory {}", dir.display()), &e)
        })?;
        Repository::open_or_create(&dir).map_err(|e| {
            let problem = catalogue::repository_problem(&e);
            Problem { object: format!("build repository {}", dir.display()), ..problem }
                .next("wait for the other build, or name another --build-dir")
        })
    }
}

async fn run_build(
    ctx: &Context,
    files: Vec<PathBuf>,
    place: &Place,
    rebuild: bool,
    keep_failed: bool,
) -> Outcome {
    let dir = place.dir(ctx)?;
    build::check_dir(&dir).map_err(|e| build_problem(&e))?;
    if !rustix::process::geteuid().is_root() {
        let mut command = build::command_without_root().map_err(|e| build_problem(&e))?;
        return Err(Problem::from_error(ProblemKind::Failed, "unshare", &command.exec()).into());
    }
    // What would go wrong at the end is better known before minutes of work.
    drop(ctx.target().await?);
    let repository = place.repository(ctx)?;
    let options = BuildOptions { cache_dir: place.dir(ctx)?.join("cache"), keep_failed, rebuild };
    let (events, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let builder = repository.clone();
    let work = tokio::task::spawn_blocking(move || {
        build::build(&builder, &files, &options, &mut |event| drop(events.send(event)))
    });
    while let Some(event) = seen.recv().await {
        if let Some(text) = event_text(event) {
            ctx.step(text)?;
        }
    }
    let built = work
        .await
        .map_err(|e| Problem::from_error(ProblemKind::Failed, "component build", &e))?
        .map_err(|e| build_problem(&e))?;
    let ids: Vec<_> = built.iter().map(|b| b.id).collect();
    push::hand_over(ctx, &repository, &ids).await?;
    print_built(ctx, &repository, &built)
}

fn event_text(event: BuildEvent) -> Option<String> {
    Some(match event {
        BuildEvent::Begun { component, number, total } => {
            format!("{component}: building ({number} of {total})")
        }
        BuildEvent::Step { component, step } => format!("{component}: {step}"),
        BuildEvent::LeftOut { component, path, what } => {
            format!("{component}: left out {path}, which is {what}")
        }
        BuildEvent::Finished { component, reused: true, .. } => format!("{component}: built before"),
        BuildEvent::Finished { .. } => return None,
    })
}

fn print_built(ctx: &Context, repository: &Repository, built: &[Built]) -> Outcome {
    if ctx.printer.json {
        let all = catalogue::components(repository)?;
        let views = built.iter().filter_map(|b| all.iter().find(|v| v.id == b.id).cloned()).collect();
        return ctx.printer.json_message(&Message::Reply(Box::new(Reply::Components(views))));
    }
    let mut table = Table::new(["NAME", "VERSION", "KIND", "ID", ">SIZE", ">TOOLS", ">PACKING"]);
    for b in built {
        table.row([
            b.name.clone(),
            b.version.clone(),
            b.kind.to_string(),
            id_text(&ctx.printer, &b.id),
            bytes(b.plain_bytes),
            if b.reused { "-".into() } else { seconds(b.seconds_tools) },
            if b.reused { "-".into() } else { seconds(b.seconds_ingest) },
        ]);
    }
    table.print(&ctx.printer)
}

async fn run_import(ctx: &Context, import: Import) -> Outcome {
    let mut identity = ImportIdentity {
        name: import.name.clone(),
        version: import.version.clone(),
        kind: import.kind,
        architecture: import.architecture,
        requires: Vec::new(),
    };
    // What would go wrong at the end is better known before the work.
    build::check_identity(&identity).map_err(|e| build_problem(&e))?;
    drop(ctx.target().await?);
    let repository = import.place.repository(ctx)?;
    identity.requires = catalogue::resolve(&repository, &import.requires)?;
    let options = ImportOptions { as_is: import.as_is };
    let (builder, source) = (repository.clone(), import.source);
    let (id, left_out) = target::blocking(move || {
        let mut left_out = Vec::new();
        build::import_reporting(&builder, &source, identity, options, &mut |l| left_out.push(l))
            .map(|id| (id, left_out))
    })
    .await?
    .map_err(|e| build_problem(&e))?;
    say_left_out(ctx, &left_out)?;
    push::hand_over(ctx, &repository, &[id]).await?;
    let text = format!("{}@{} {}", import.name, import.version, id_text(&ctx.printer, &id));
    match ctx.printer.json {
        true => {
            let views = catalogue::components(&repository)?.into_iter().filter(|v| v.id == id).collect();
            ctx.printer.json_message(&Message::Reply(Box::new(Reply::Components(views))))
        }
        false => ctx.printer.line(text),
    }
}

/// What an import left out, by reason: some of each, all of them as JSON and with --verbose.
fn say_left_out(ctx: &Context, left_out: &[LeftOut]) -> Outcome {
    const SHOWN_MAX: usize = 5;
    if ctx.printer.json {
        return left_out.iter().try_for_each(|l| {
            let (path, what) = (l.path.clone(), l.what.clone());
            ctx.printer.json_message(&Message::Event(Event::LeftOut { path, what }))
        });
    }
    let mut by_reason: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for l in left_out {
        by_reason.entry(&l.what).or_default().push(&l.path);
    }
    for (what, paths) in by_reason {
        let shown = if ctx.printer.verbose { paths.len() } else { SHOWN_MAX };
        let more = paths.len().saturating_sub(shown);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let some = paths.iter().take(shown).copied().collect::<Vec<_>>().join(", ");
        // Not even with --quiet is anything left out in silence.
        ctx.printer.aloud().note(format!("left out {}, {what}: {some}{more}", paths.len()));
    }
    Ok(())
}

fn build_problem(e: &BuildError) -> Problem {
    let (kind, next) = match e {
        BuildError::Definition { .. }
        | BuildError::DefinedTwice { .. }
        | BuildError::OsMissing { .. }
        | BuildError::OsOfOtherKind { .. }
        | BuildError::Archive { .. }
        | BuildError::UnknownSource { .. }
        | BuildError::CacheDirectory { .. }
        | BuildError::Manifest(_) => (ProblemKind::BadRequest, ""),
        BuildError::CutShort { .. } => (ProblemKind::Damaged, ""),
        BuildError::Read { path, source } => {
            let mut problem = Problem::from_path(path.display().to_string(), source);
            // What the system did not say, the reader of the archive says of its bytes.
            if problem.kind == ProblemKind::Failed && source.raw_os_error().is_none() {
                problem.kind = ProblemKind::Damaged;
            }
            let next = match problem.kind {
                ProblemKind::Damaged => "it is cut short or damaged: get the whole of it",
                ProblemKind::Forbidden => "let the user who runs this read it",
                _ => "check the path and who may read it",
            };
            return Problem::from_error(problem.kind, "component", e).next(next);
        }
        BuildError::NotRoot => (ProblemKind::Forbidden, "run it as 'cicada component build'"),
        BuildError::NoNamespace { next_step, .. } => (ProblemKind::Missing, next_step.as_str()),
        BuildError::Exposed { source, .. } => {
            let next = format!(
                "run it as that directory's user, which needs no root, or name with --build-dir a place of \
                 your own such as /var/cache/cicada-build; if it is yours: {}",
                source.next_step()
            );
            return Problem::from_error(ProblemKind::Forbidden, "component", e).next(next);
        }
        BuildError::Planted { .. } => {
            (ProblemKind::Forbidden, "find out who made it, and remove the build directory")
        }
        BuildError::Lists { .. } => (
            ProblemKind::Failed,
            "see with 'apt-get update' whether this machine reaches its archive and has the right time, then \
             build again",
        ),
        BuildError::ToolMissing { .. } | BuildError::NoSources { .. } => {
            (ProblemKind::Missing, "deploy/install installs what is needed")
        }
        BuildError::Secret { .. }
        | BuildError::Fragment { .. }
        | BuildError::Replaces { .. }
        | BuildError::Required(_)
        | BuildError::LongPath { .. }
        | BuildError::TooMuch { .. } => (ProblemKind::Refused, ""),
        BuildError::Compose(_) => (ProblemKind::Refused, "change the source"),
        BuildError::Repository(e) => return catalogue::repository_problem(e),
        BuildError::Step { .. } => (ProblemKind::Failed, "--keep-failed leaves the tree for inspection"),
        BuildError::Write { .. }
        | BuildError::VersionUnknown { .. }
        | BuildError::UnpackedMatch { .. }
        | BuildError::Tree { .. } => (ProblemKind::Failed, ""),
    };
    Problem::from_error(kind, "component", e).next(next)
}

pub fn id_text(printer: &Printer, id: &ComponentId) -> String {
    if printer.verbose { id.to_string() } else { id.short() }
}

fn print_list(printer: &Printer, reply: Reply) -> Outcome {
    let Reply::Components(components) = reply else { return Err(unexpected(&reply)) };
    let mut table =
        Table::new(["NAME", "VERSION", "KIND", "ARCHITECTURE", "ID", "BOUND", ">PACKS", ">PLAIN", ">STORED"]);
    for c in &components {
        table.row([
            c.name.clone(),
            c.version.clone(),
            c.kind.to_string(),
            c.architecture.clone(),
            id_text(printer, &c.id),
            if c.bound { "yes" } else { "no" }.to_owned(),
            c.packs.to_string(),
            bytes(c.plain_bytes),
            bytes(c.stored_bytes),
        ]);
    }
    if table.is_empty() {
        printer.note("there are no components; 'cicada component build components/*.toml' makes some");
    }
    if components.iter().any(|c| !c.bound) {
        printer.note(
            "what is not bound came by a move, or another has its name now: 'cicada component bind ID' binds it",
        );
    }
    table.print(printer)
}

fn print_detail(printer: &Printer, d: &ComponentDetail) -> Outcome {
    let c: &ComponentView = &d.component;
    card(
        printer,
        &[
            ("name", c.name.clone()),
            ("version", c.version.clone()),
            ("kind", c.kind.to_string()),
            ("architecture", c.architecture.clone()),
            ("id", c.id.to_string()),
            ("bound", if c.bound { "yes" } else { "no: 'cicada component bind' binds it" }.to_owned()),
            ("origin", d.origin.clone()),
            ("licences", d.licences.join(", ")),
            ("requires", d.requires.iter().map(|id| id_text(printer, id)).collect::<Vec<_>>().join(", ")),
            ("conflicts", d.conflicts.join(", ")),
            ("size", format!("{} plain, {} stored", bytes(c.plain_bytes), bytes(c.stored_bytes))),
            ("entries", d.entry_count.to_string()),
            ("merged files", d.fragments.join(", ")),
        ],
    )?;
    if !d.packs.is_empty() {
        printer.line("")?;
    }
    let mut table = Table::new(["PACKAGE", "VERSION", ">PLAIN", "PACK"]);
    for p in &d.packs {
        let id = if printer.verbose { p.id.clone() } else { p.id.chars().take(10).collect() };
        table.row([p.package.clone(), p.package_version.clone(), bytes(p.plain_bytes), id]);
    }
    table.print(printer)?;
    if !d.entries.is_empty() {
        printer.line("")?;
    }
    d.entries.iter().try_for_each(|path| printer.line(path))
}

fn print_diff(printer: &Printer, d: &ComponentDiff) -> Outcome {
    for (sign, paths) in [("-", &d.removed), ("+", &d.added), ("~", &d.changed)] {
        paths.iter().try_for_each(|path| printer.line(format!("{sign} {path}")))?;
    }
    printer.line(format!(
        "{} added, {} removed, {} changed; {} in packs that the first lacks",
        d.added.len(),
        d.removed.len(),
        d.changed.len(),
        bytes(d.bytes_missing)
    ))
}
