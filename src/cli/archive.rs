//! `cicada repo export` and `cicada repo import`

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use clap::Args;

use crate::interface::problem::{Problem, ProblemKind};
use crate::interface::{ContentRequest, Reply, Request};
use crate::runner::content::archive::import_faults;

use super::context::Context;
use super::printer::{Failure, Outcome};
use super::repo::print_report;

#[derive(Args)]
pub struct Export {
    /// A file to write, which must not be there yet, a directory, or - for standard output
    #[arg(value_name = "FILE|DIR")]
    output: PathBuf,
    /// A component to export, with what it requires: a name, name@version or the beginning of an id
    #[arg(long = "component", value_name = "COMPONENT")]
    components: Vec<String>,
    /// A recipe to export, with its components: the beginning of its id, at least six digits
    #[arg(long = "recipe", value_name = "RECIPE")]
    recipes: Vec<String>,
}

#[derive(Args)]
pub struct Import {
    /// What 'cicada repo export' wrote: a file, a directory, or - for standard input
    #[arg(value_name = "FILE|DIR")]
    input: PathBuf,
    /// Make its components known by the names the archive gives them: only from somebody you trust
    #[arg(long)]
    bind: bool,
}

pub async fn export(ctx: &Context, args: Export) -> Outcome {
    let request = |output| {
        Request::Content(ContentRequest::RepoExport {
            output,
            components: args.components,
            recipes: args.recipes,
        })
    };
    if args.output != Path::new("-") {
        return ctx.work(&request(absolute(&args.output)?), print_report).await;
    }
    if ctx.printer.json {
        let reason = "standard output cannot carry the archive and JSON";
        let problem = Problem::new(ProblemKind::BadRequest, "-", reason).next("export to a file");
        // Nor that of an error: what takes it is an archive's place.
        ctx.printer.problem(&problem);
        return Err(Failure::Told(problem.kind));
    }
    let (end, copying) = to_stdout().map_err(|e| pipe_problem(&e))?;
    let result = ctx.follow_giving(&request("-".into()), end).await;
    let copied = copying.join().unwrap_or_else(|_| Err(io::Error::other("the copying ended early")));
    if copied.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::BrokenPipe) {
        return Err(Failure::BrokenPipe);
    }
    result?;
    copied.map_err(|e| pipe_problem(&e).into())
}

pub async fn import(ctx: &Context, args: Import) -> Outcome {
    let request = |input| Request::Content(ContentRequest::RepoImport { input, bind: args.bind });
    let result = if args.input == Path::new("-") {
        let end = from_stdin().map_err(|e| pipe_problem(&e))?;
        ctx.follow_giving(&request("-".into()), end).await
    } else {
        ctx.follow(&request(absolute(&args.input)?)).await
    };
    let faults = match &result {
        Ok(Reply::Report(lines)) => import_faults(lines),
        _ => 0,
    };
    ctx.end(result, print_report)?;
    if faults > 0 {
        let reason = format!("{faults} of its objects or names could not be taken");
        let problem = Problem::new(ProblemKind::Damaged, format!("archive {}", args.input.display()), reason);
        return Err(problem
            .next("get the archive again and repeat the import; what is held is skipped")
            .into());
    }
    Ok(())
}

/// The broker has another working directory.
fn absolute(path: &Path) -> Result<String, Problem> {
    let bad = |reason: String| Problem::new(ProblemKind::BadRequest, path.display().to_string(), reason);
    let slash = path.as_os_str().as_encoded_bytes().ends_with(b"/");
    let path = std::path::absolute(path).map_err(|e| bad(e.to_string()))?;
    let text = path.to_str().ok_or_else(|| bad("the path is not UTF-8".into()))?;
    // A slash at the end asks for a directory.
    Ok(if slash && !text.ends_with('/') { format!("{text}/") } else { text.to_owned() })
}

fn pipe_problem(e: &io::Error) -> Problem {
    Problem::from_error(ProblemKind::Failed, "-", e)
}

/// The end of a pipe that is handed over: standard output and input stay ours, and to give back at any time.
fn to_stdout() -> io::Result<(OwnedFd, JoinHandle<io::Result<()>>)> {
    let (mut from, end) = io::pipe()?;
    let copying = thread::spawn(move || io::copy(&mut from, &mut io::stdout().lock()).map(drop));
    Ok((end.into(), copying))
}

fn from_stdin() -> io::Result<OwnedFd> {
    let (end, mut to) = io::pipe()?;
    thread::spawn(move || io::copy(&mut io::stdin().lock(), &mut to).map(drop));
    Ok(end.into())
}
