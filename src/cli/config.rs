//! `cicada config`

use clap::Subcommand;

use crate::broker::problem::{Problem, ProblemKind};

use super::context::{Context, config_problem};
use super::printer::Outcome;

#[derive(Subcommand)]
pub enum Command {
    /// Check the configuration and the files it names (works without a broker)
    Check,
    /// Print the settings in effect, defaults included (works without a broker)
    Show,
}

pub fn run(ctx: &Context, command: Command) -> Outcome {
    let config = ctx.config()?;
    match command {
        Command::Check => {
            config.check_files().map_err(|e| config_problem(&e))?;
            if ctx.printer.json {
                return ctx.printer.json_value(&serde_json::json!({ "file": config.path, "good": true }));
            }
            ctx.printer.line(format!("{}: good", config.path.display()))
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
