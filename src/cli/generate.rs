//! `cicada completions` and `cicada man`

use std::io;
use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::interface::problem::Problem;

use super::Cli;
use super::context::Context;
use super::names;
use super::printer::Outcome;

#[derive(Args)]
pub struct Completions {
    shell: Shell,
}

#[derive(Args)]
pub struct Man {
    /// Where to write them; made if it is not there
    dir: PathBuf,
}

pub fn completions(ctx: &Context, args: &Completions) -> Outcome {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "cicada", &mut text);
    let text = String::from_utf8_lossy(&text).into_owned();
    ctx.printer.raw(names::with_names(args.shell, text).as_bytes())
}

pub fn man(ctx: &Context, args: &Man) -> Outcome {
    let failed = |e: io::Error| Problem::from_path(format!("directory {}", args.dir.display()), &e);
    std::fs::create_dir_all(&args.dir).map_err(failed)?;
    // Manual pages are for everybody.
    rustix::process::umask(rustix::fs::Mode::WGRP | rustix::fs::Mode::WOTH);
    clap_mangen::generate_to(Cli::command(), &args.dir).map_err(failed)?;
    ctx.printer.note(format!("manual pages written to {}", args.dir.display()));
    Ok(())
}
