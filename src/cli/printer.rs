//! All output of a command goes through here; what it looks like is decided once.

use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use serde::Serialize;

use crate::broker::interface::{Message, Reply};
use crate::broker::problem::{Problem, ProblemKind};

/// How a command ends if not well.
#[derive(Debug)]
pub enum Failure {
    Problem(Problem),
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
            draws: err && !quiet && !json && !dumb,
        }
    }

    /// A result, on stdout.
    pub fn line(&self, text: impl AsRef<str>) -> Outcome {
        self.raw(&[text.as_ref().as_bytes(), b"\n"].concat())
    }

    /// Bytes on stdout as they are.
    pub fn raw(&self, bytes: &[u8]) -> Outcome {
        let mut out = io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush()).map_err(|e| match e.kind() {
            io::ErrorKind::BrokenPipe => Failure::BrokenPipe,
            _ => Problem::from_error(ProblemKind::Failed, "standard output", &e).into(),
        })
    }

    /// A value as JSON, on stdout.
    pub fn json_value(&self, value: &impl Serialize) -> Outcome {
        let text = serde_json::to_string_pretty(value)
            .map_err(|e| Problem::from_error(ProblemKind::Failed, "the result", &e))?;
        self.line(text)
    }

    /// What a reply carries, without its name.
    pub fn json_reply(&self, reply: &Reply) -> Outcome {
        let value = serde_json::to_value(reply)
            .map_err(|e| Problem::from_error(ProblemKind::Failed, "the result", &e))?;
        self.json_value(value.get("value").unwrap_or(&serde_json::Value::Null))
    }

    /// One line of a stream of events and their end.
    pub fn json_message(&self, message: &Message) -> Outcome {
        let text = serde_json::to_string(message)
            .map_err(|e| Problem::from_error(ProblemKind::Failed, "the result", &e))?;
        self.line(text)
    }

    /// Something to know that is no result, on stderr.
    pub fn note(&self, text: impl AsRef<str>) {
        if !self.quiet {
            self.to_stderr(text.as_ref());
        }
    }

    /// As this one, but what must be known is printed in spite of `--quiet`.
    pub fn aloud(&self) -> Self {
        Self { quiet: false, ..self.clone() }
    }

    /// The end of a command that went wrong, on stderr.
    pub fn problem(&self, problem: &Problem) {
        self.to_stderr(&format!("{} {problem}", self.paint_err("1;31", "error:")));
        if !problem.next_step.is_empty() {
            self.to_stderr(&format!("{} {}", self.paint_err("1;36", "hint:"), problem.next_step));
        }
    }

    pub fn bold(&self, text: &str) -> String {
        paint(self.color_out, "1", text)
    }
    pub fn good(&self, text: &str) -> String {
        paint(self.color_out, "32", text)
    }
    pub fn bad(&self, text: &str) -> String {
        paint(self.color_out, "31", text)
    }

    fn paint_err(&self, code: &str, text: &str) -> String {
        paint(self.color_err, code, text)
    }

    fn to_stderr(&self, text: &str) {
        // There is nobody to tell that stderr is gone.
        let _ = writeln!(io::stderr().lock(), "{text}");
    }
}

fn paint(on: bool, code: &str, text: &str) -> String {
    if on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

/// A broker of another version, or a mistake of ours.
pub fn unexpected(reply: &Reply) -> Failure {
    let name = serde_json::to_value(reply).ok().and_then(|v| Some(v.get("reply")?.as_str()?.to_owned()));
    let reason = format!("answered with '{}', which is not what was asked for", name.unwrap_or_default());
    Problem::new(ProblemKind::Failed, "broker", reason)
        .next("use the same version of cicada for the broker and its commands")
        .into()
}
