//! `cicada broker`

use crate::daemon;

use super::context::Context;
use super::printer::Outcome;
use super::whose;

pub async fn run(ctx: &Context, after_restore: bool) -> Outcome {
    let config = ctx.config()?;
    whose::not_as_root(&config)?;
    Ok(daemon::run(config, after_restore).await?)
}
