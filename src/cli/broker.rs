//! `cicada broker`

use std::path::PathBuf;

use clap::Args;

use crate::daemon;
use crate::interface::{Problem, ProblemKind};
use crate::recording::{Recorder, RecordingError};
use crate::types::ByteSize;

use super::context::Context;
use super::printer::Outcome;
use super::whose;

#[derive(Args)]
pub struct Recording {
    /// Write what the broker takes in and decides to this new file, for 'cicada replay' and for reports
    ///
    /// Keys and passwords are not in it; names, addresses, paths and requests are.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Where the recording ends by itself; the broker goes on
    #[arg(long, value_name = "SIZE", default_value = "256M", requires = "record")]
    record_limit: ByteSize,
}

pub async fn run(ctx: &Context, after_restore: bool, recording: Recording) -> Outcome {
    let config = ctx.config()?;
    whose::not_as_root(&config)?;
    let recorder = match &recording.record {
        Some(path) => {
            let recorder = Recorder::create(path, recording.record_limit);
            Some(recorder.map_err(|e| match e {
                RecordingError::Io { source, .. } => Problem::from_path(path.display().to_string(), &source)
                    .next("a recording begins a new file: name one that is not there, in a directory of this user"),
                e => Problem::from_error(ProblemKind::Failed, path.display().to_string(), &e),
            })?)
        }
        None => None,
    };
    Ok(daemon::run(config, after_restore, recorder).await?)
}
