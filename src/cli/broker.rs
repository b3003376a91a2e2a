//! `cicada broker`

use crate::daemon;

use super::context::Context;
use super::printer::Outcome;

pub async fn run(ctx: &Context) -> Outcome {
    Ok(daemon::run(ctx.config()?).await?)
}
