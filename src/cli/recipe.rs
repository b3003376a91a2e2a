//! `cicada recipe` and `cicada compose`

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::compose::ImageFormat;
use crate::interface::problem::{Problem, ProblemKind};
use crate::interface::{ContentRequest, RecipeView, Reply, Request};
use crate::types::ByteSize;

use super::context::Context;
use super::format::{bytes, millis};
use super::printer::{Outcome, Printer, unexpected};
use super::table::{Table, card};

#[derive(Subcommand)]
pub enum Command {
    /// Make a recipe of components
    Create(Ingredients),
    /// List the recipes
    List,
}

/// What determines a root disk.
#[derive(Args)]
pub struct Ingredients {
    /// A component: a name, name@version or the beginning of an id; give all of them
    #[arg(long = "component", required = true, value_name = "COMPONENT")]
    pub components: Vec<String>,
    /// Where two components have the same path, let the later win instead of refusing
    #[arg(long)]
    pub ordered: bool,
    /// Size of the root disk
    #[arg(long, default_value = "2G", value_name = "SIZE")]
    pub root_size: ByteSize,
    /// More words for the kernel
    #[arg(long, default_value = "console=ttyS0", value_name = "TEXT", allow_hyphen_values = true)]
    pub kernel_command_line: String,
}

#[derive(Args)]
pub struct Compose {
    /// The beginning of a recipe's id, at least six digits
    recipe: String,
    /// The file to write, with your own rights; it must not be there yet
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// raw, qcow2, vmdk, vhdx, vpc or vdi
    #[arg(long, default_value = "raw", value_name = "FORMAT")]
    format: ImageFormat,
}

pub async fn run(ctx: &Context, command: Command) -> Outcome {
    match command {
        Command::Create(i) => {
            let request = Request::Content(ContentRequest::RecipeCreate {
                components: i.components,
                ordered: i.ordered,
                root_size: i.root_size,
                kernel_command_line: i.kernel_command_line,
            });
            ctx.read(&request, |printer, reply| match reply {
                Reply::Recipe(recipe) => print_recipe(printer, &recipe),
                other => Err(unexpected(&other)),
            })
            .await
        }
        Command::List => ctx.read(&Request::Content(ContentRequest::RecipeList), print_list).await,
    }
}

pub async fn compose(ctx: &Context, args: Compose) -> Outcome {
    let bad = |e| Problem::from_error(ProblemKind::BadRequest, "--output", &e);
    // The broker has another working directory.
    let output = std::path::absolute(&args.output).map_err(bad)?;
    let Some(output) = output.to_str() else {
        return Err(Problem::new(ProblemKind::BadRequest, "--output", "the path is not UTF-8").into());
    };
    let request = Request::Content(ContentRequest::Compose {
        recipe: args.recipe,
        output: output.into(),
        format: args.format.to_string(),
    });
    ctx.work(&request, |printer, reply| match reply {
        Reply::Composed(c) => card(
            printer,
            &[
                ("recipe", c.recipe.to_string()),
                ("image digest", c.image_digest.to_string()),
                ("output", c.output),
                ("size", bytes(c.bytes)),
                ("time", millis(c.elapsed_ms)),
            ],
        ),
        other => Err(unexpected(&other)),
    })
    .await
}

fn print_recipe(printer: &Printer, r: &RecipeView) -> Outcome {
    card(
        printer,
        &[
            ("recipe", r.id.to_string()),
            ("components", r.components.join(", ")),
            ("root disk", r.root_size.to_string()),
            ("kernel command line", r.kernel_command_line.clone()),
            ("image digest", r.image_digest.to_string()),
        ],
    )
}

fn print_list(printer: &Printer, reply: Reply) -> Outcome {
    let Reply::Recipes(recipes) = reply else { return Err(unexpected(&reply)) };
    let mut table = Table::new(["RECIPE", ">ROOT DISK", "COMPOSED", "COMPONENTS"]);
    for r in &recipes {
        let id = if printer.verbose { r.id.to_string() } else { r.id.short() };
        let composed = if r.composed { "yes" } else { "no" };
        table.row([id, r.root_size.to_string(), composed.into(), r.components.join(", ")]);
    }
    table.print(printer)
}
