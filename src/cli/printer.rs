//! All output of a command goes through here; what it looks like is decided once.
//!
//! What is printed quotes other clouds, servers, guests and old records. Whatever came of cleaning that where
//! it was read, nothing here reaches a terminal that is not [plain](crate::types::text::is_plain): it is spelt out.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::ValueEnum;
use serde::Serialize;
use serde_json::Value;

use crate::interface::problem::{Problem, ProblemKind};
use crate::interface::{Message, Reply};
use crate::types::text::{escaped, escaped_json};

/// How a command ends if not well.
#[derive(Debug)]
pub enum Failure {
    Problem(Problem),
    /// It was printed already; its class is the exit code.
    Told(ProblemKind),
    /// Whoever read our output has enough; that is a success.
    BrokenPipe,
}

pub type Outcome<T = ()> = Result<T, Failure>;

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Failure::Problem(problem)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum ColorChoice {
    /// On a terminal
    #[default]
    Auto,
    Always,
    Never,
}

#[derive(Clone, Debug)]
pub struct Printer {
    pub json: bool,
    pub quiet: bool,
    pub verbose: bool,
    color_out: bool,
    color_err: bool,
    /// Whether progress can be drawn.
    pub draws: bool,
    /// Whether anything went to stdout.
    printed: Arc<AtomicBool>,
    /// Columns of the terminal that stdout is; none elsewhere, where nothing is shortened.
    pub columns: Option<usize>,
}

impl Printer {
    pub fn new(color: ColorChoice, json: bool, quiet: bool, verbose: bool) -> Self {
        let wanted = |is_terminal: bool| match color {
            ColorChoice::Auto => is_terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()),
            ColorChoice::Always => true,
            ColorChoice::Never => false,
        };
        let (out, err) = (io::stdout().is_terminal(), io::stderr().is_terminal());
        let dumb = std::env::var_os("TERM").is_some_and(|t| t == "dumb");
        Self {
            json,
            quiet,
            verbose,
            color_out: wanted(out),
            color_err: wanted(err),
            printed: Arc::default(),
            draws: err && !quiet && !json && !dumb,
            columns: if out { columns() } else { None },
        }
    }

    /// A line of a result, on stdout.
    pub fn line(&self, text: impl AsRef<str>) -> Outcome {
        let text = if self.color_out { escaped_but_colors(text.as_ref()) } else { escaped(text.as_ref()) };
        self.raw(&[text.as_bytes(), b"\n"].concat())
    }

    /// For programs every command ends with a value: `null` where it had nothing to tell.
    pub fn end_well(&self) -> Outcome {
        if self.json && !self.printed.load(Ordering::Relaxed) {
            self.json_value(&Value::Null)
        } else {
            Ok(())
        }
    }

    /// Bytes on stdout as they are. Nothing that quotes others is printed by this.
    pub fn raw(&self, bytes: &[u8]) -> Outcome {
        self.printed.store(true, Ordering::Relaxed);
        let mut out = io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush()).map_err(|e| match e.kind() {
            io::ErrorKind::BrokenPipe => Failure::BrokenPipe,
            _ => Problem::from_error(ProblemKind::Failed, "standard output", &e).into(),
        })
    }

    /// A value as JSON, on stdout: one line where events came before it.
    pub fn json_value(&self, value: &impl Serialize) -> Outcome {
        let text = match self.printed.load(Ordering::Relaxed) {
            true => serde_json::to_string(value),
            false => serde_json::to_string_pretty(value),
        };
        self.json(&text.map_err(|e| Problem::from_error(ProblemKind::Failed, "the result", &e))?)
    }

    /// One line of a stream that the API does not have.
    pub fn json_line(&self, value: &impl Serialize) -> Outcome {
        let text = serde_json::to_string(value);
        self.json(&text.map_err(|e| Problem::from_error(ProblemKind::Failed, "the result", &e))?)
    }

    fn json(&self, text: &str) -> Outcome {
        self.raw(&[escaped_json(text).as_bytes(), b"\n"].concat())
    }

    /// What a reply carries, without its name.
    pub fn json_reply(&self, reply: &Reply) -> Outcome {
        self.json_value(&carried(reply)?)
    }

    /// One line of a stream: an event, the value that a reply carries, or a problem.
    pub fn json_message(&self, message: &Message) -> Outcome {
        let text = match message {
            Message::Event(event) => serde_json::to_string(event),
            Message::Reply(reply) => serde_json::to_string(&carried(reply)?),
            Message::Problem(_) => serde_json::to_string(message),
        };
        self.json(&text.map_err(|e| Problem::from_error(ProblemKind::Failed, "the result", &e))?)
    }

    /// Something to know that is no result, on stderr.
    pub fn note(&self, text: impl AsRef<str>) {
        if !self.quiet {
            self.to_stderr("", text.as_ref());
        }
    }

    /// As this one, but what must be known is printed in spite of `--quiet`.
    pub fn aloud(&self) -> Self {
        Self { quiet: false, ..self.clone() }
    }

    /// The end of a command that went wrong: for people on stderr, and for programs the last line on stdout too.
    pub fn end_badly(&self, problem: &Problem) {
        if self.json {
            // There is nobody to tell that stdout is gone.
            let _ = self.json_message(&Message::Problem(problem.clone()));
        }
        self.problem(problem);
    }

    /// What went wrong, on stderr.
    pub fn problem(&self, problem: &Problem) {
        self.to_stderr(&self.paint_err("1;31", "error: "), &problem.to_string());
        if !problem.next_step.is_empty() {
            self.to_stderr(&self.paint_err("1;36", "hint: "), &problem.next_step);
        }
    }

    pub fn bold(&self, text: &str) -> String {
        paint(self.color_out, BOLD, text)
    }
    pub fn good(&self, text: &str) -> String {
        paint(self.color_out, GREEN, text)
    }
    pub fn bad(&self, text: &str) -> String {
        paint(self.color_out, RED, text)
    }

    fn paint_err(&self, code: &str, text: &str) -> String {
        paint(self.color_err, &format!("\x1b[{code}m"), text)
    }

    /// A line: a word of our own and what it says.
    fn to_stderr(&self, word: &str, text: &str) {
        // There is nobody to tell that stderr is gone.
        let _ = writeln!(io::stderr().lock(), "{word}{}", escaped(text));
    }
}

/// As the terminal says, or, where it does not know, its user.
fn columns() -> Option<usize> {
    let told = rustix::termios::tcgetwinsize(io::stdout()).map_or(0, |size| usize::from(size.ws_col));
    let named = || std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    Some(told).filter(|columns| *columns > 0).or_else(named).filter(|columns| *columns > 0)
}

fn carried(reply: &Reply) -> Outcome<Value> {
    let value = serde_json::to_value(reply)
        .map_err(|e| Problem::from_error(ProblemKind::Failed, "the result", &e))?;
    Ok(match value {
        Value::Object(mut fields) => fields.remove("value").unwrap_or_default(),
        _ => Value::Null,
    })
}

const BOLD: &str = "\x1b[1m";
const RED: &str = "\x1b[31m";
const GREEN: &str = "\x1b[32m";
const RESET: &str = "\x1b[0m";

fn paint(on: bool, color: &str, text: &str) -> String {
    if on { format!("{color}{text}{RESET}") } else { text.to_owned() }
}

/// The text with all spelt out that is not plain, but for the colours that [`paint`] makes. They change
/// nothing but a look, and that only where colours are on.
fn escaped_but_colors(text: &str) -> Cow<'_, str> {
    let (mut out, mut rest) = (String::new(), text);
    while let Some((before, from)) = rest.find('\x1b').map(|at| rest.split_at(at)) {
        out.push_str(&escaped(before));
        let color = [BOLD, RED, GREEN, RESET].into_iter().find(|color| from.starts_with(color));
        let (shown, length) = color.map_or_else(|| (escaped("\x1b"), 1), |c| (c.into(), c.len()));
        out.push_str(&shown);
        rest = &from[length..];
    }
    out.push_str(&escaped(rest));
    out.into()
}

/// A broker of another version, or a mistake of ours.
pub fn unexpected(reply: &Reply) -> Failure {
    let name = serde_json::to_value(reply).ok().and_then(|v| Some(v.get("reply")?.as_str()?.to_owned()));
    let reason = format!("answered with '{}', which is not what was asked for", name.unwrap_or_default());
    Problem::new(ProblemKind::Failed, "broker", reason)
        .next("use the same version of cicada for the broker and its commands")
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::text::is_plain;

    #[test]
    fn only_the_colors_of_our_own_are_let_through() {
        let text = format!("{}\x1b[2J\x1b]52;c;AA\x07\n\u{9b}2J\u{202e}", paint(true, RED, "no"));
        let shown = escaped_but_colors(&text);
        let said = r"\u{1b}[2J\u{1b}]52;c;AA\u{7}\n\u{9b}2J\u{202e}";
        assert_eq!(shown, format!("{RED}no{RESET}{said}"));
        assert!(escaped(&text).chars().all(is_plain));
    }
}
