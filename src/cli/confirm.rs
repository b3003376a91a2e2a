//! Questions before what cannot be undone.

use std::io::{self, BufRead, IsTerminal, Read, Write};

use crate::interface::problem::{Problem, ProblemKind};

/// No name that is asked for is longer.
const ANSWER_BYTES_MAX: u64 = 256;

/// Asks for the VM's name: more than a key pressed by habit. `object` is what is refused otherwise, and
/// `not_done` says so, as in "is not deleted".
pub fn by_name(name: &str, object: &str, not_done: &str) -> Result<(), Problem> {
    if !io::stdin().is_terminal() {
        return Err(Problem::new(
            ProblemKind::BadRequest,
            object,
            format!("{not_done}: there is nobody to ask"),
        )
        .next("add --yes if you are sure"));
    }
    let failed = |e: io::Error| Problem::from_error(ProblemKind::Failed, "the terminal", &e);
    let mut err = io::stderr().lock();
    write!(err, "Type the VM's name ({name}) to go on: ").and_then(|()| err.flush()).map_err(failed)?;
    let mut line = String::new();
    io::stdin().lock().take(ANSWER_BYTES_MAX).read_line(&mut line).map_err(failed)?;
    if line.trim() == name {
        return Ok(());
    }
    Err(Problem::new(ProblemKind::Cancelled, object, format!("{not_done}: another name was typed")))
}
