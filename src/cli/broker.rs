//! `cicada broker`

use crate::daemon;

use super::context::Context;
use super::printer::Outcome;

pub async fn run(ctx: &Context, after_restore: bool) -> Outcome {
    Ok(daemon::run(ctx.config()?, after_restore).await?)
}
