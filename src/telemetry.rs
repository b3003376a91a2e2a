//! Level 2: the log, on stderr: text for a terminal, else one JSON object a line.
//!
//! What the levels mean:
//! - `error`: something an operator asked for, or is owed, did not happen.
//! - `warn`: something was refused, damaged or tried again; the broker goes on without help.
//! - `info`: what changed for an operator: members come and go, VMs start, stop and move.
//! - `debug`: single steps of those.
//! - `trace`: single messages and objects.
//!
//! Secrets and the content of disks are never logged.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// What the broker logs when nothing else is asked for.
pub const BROKER_FILTER: &str = "info";
/// Other commands say what they have to say themselves.
pub const COMMAND_FILTER: &str = "warn";

/// Starts logging. `filter` is a level, or directives such as `info,cicada::transfer=debug`. In one
/// process only the first call has an effect.
pub fn start(filter: &str) -> Result<(), ParseError> {
    let filter = EnvFilter::builder().parse(filter)?;
    let tty = io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // A second start fails, as it should.
    let _ = if tty {
        log.with_target(false).with_ansi(std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())).try_init()
    } else {
        log.json().flatten_event(true).try_init()
    };
    Ok(())
}
