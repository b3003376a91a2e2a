//! Level 2: the log, on stderr: text for a terminal, else one JSON object a line.
//!
//! What the levels mean:
//! - `error`: something an operator asked for, or is owed, did not happen.
//! - `warn`: something was refused, damaged or tried again; the broker goes on without help.
//! - `info`: what changed for an operator: members come and go, VMs start, stop and move.
//! - `debug`: single steps of those.
//! - `trace`: single messages and objects.
//!
//! Secrets and the content of disks are never logged. Fields quote other clouds, servers and guests: an event
//! stays one line, in which nothing acts on a terminal but our own colours.

use std::io::{self, IsTerminal, Write};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

use crate::types::text::{escaped, escaped_json};

/// What the broker logs when nothing else is asked for.
pub const BROKER_FILTER: &str = "info";
/// Other commands say what they have to say themselves: what a session with the server came to is their error.
pub const COMMAND_FILTER: &str = "warn,cicada::xmpp::session=off,cicada::xmpp::link=off";

/// Starts logging. `filter` is a level, or directives such as `info,cicada::transfer=debug`. In one
/// process only the first call has an effect. Lines of JSON are for who collects a broker's log, not for who reads
/// what a command says.
pub fn start(filter: &str, is_broker: bool) -> Result<(), ParseError> {
    let filter = EnvFilter::builder().parse(filter)?;
    let colors = std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let form = match io::stderr().is_terminal() {
        true if colors => Form::Colored,
        false if is_broker => Form::Json,
        _ => Form::Text,
    };
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    let log = log.with_writer(move || Lines { out: io::stderr(), form });
    // A second start fails, as it should.
    let _ = match form {
        Form::Json => log.json().flatten_event(true).try_init(),
        Form::Text | Form::Colored => log.with_target(false).with_ansi(form == Form::Colored).try_init(),
    };
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Json,
    Text,
    Colored,
}

/// Where events go, each written at once as it is formatted. The formatter escapes some of what acts on
/// terminals; this lets nothing else pass.
struct Lines<W> {
    out: W,
    form: Form,
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let (line, end) = text.strip_suffix('\n').map_or((&*text, ""), |line| (line, "\n"));
        let safe = match self.form {
            Form::Json => escaped_json(line),
            Form::Colored => escaped_but_colors(line).into(),
            Form::Text => escaped(line),
        };
        self.out.write_all(&[safe.as_bytes(), end.as_bytes()].concat())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// The line with all spelt out that is not plain, but for changes of colour: `ESC [`, digits and semicolons, `m`.
fn escaped_but_colors(line: &str) -> String {
    let mut parts = line.split('\x1b');
    let mut out = escaped(parts.next().unwrap_or_default()).into_owned();
    for part in parts {
        let codes = part.strip_prefix('[').and_then(|p| p.split_once('m')).map(|(codes, _)| codes);
        let is_color = codes.is_some_and(|c| c.bytes().all(|b| b.is_ascii_digit() || b == b';'));
        out.push_str(if is_color { "\x1b" } else { "\\u{1b}" });
        out.push_str(&escaped(part));
    }
    out
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::types::text::is_plain;

    const HOSTILE: &str = "\x1b[2J\x1b]52;c;AA\x07\r\nforged INFO line\u{9b}2J\u{7f}\u{202e}\u{2028}x";

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is logged where a peer's words stand in the message and in every kind of field.
    fn logged(form: Form) -> String {
        let kept = Kept::default();
        let out = kept.clone();
        let log = tracing_subscriber::fmt().with_writer(move || Lines { out: out.clone(), form });
        let event = || {
            tracing::warn!(text = HOSTILE, shown = %HOSTILE, debugged = ?HOSTILE, "said {HOSTILE}");
        };
        match form {
            Form::Json => tracing::subscriber::with_default(log.json().flatten_event(true).finish(), event),
            _ => tracing::subscriber::with_default(log.with_ansi(form == Form::Colored).finish(), event),
        }
        let bytes = kept.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn nobody_forges_a_line_of_the_log_or_acts_on_a_terminal() {
        // The formatter dims, tilts and colours.
        let own = regex::Regex::new("\x1b\\[[0-9;]*m").unwrap();
        for form in [Form::Json, Form::Text, Form::Colored] {
            let log = logged(form);
            assert!(log.matches("forged INFO line").count() == 4, "{log:?}");
            let line = log.strip_suffix('\n').unwrap();
            let rest = if form == Form::Colored { own.replace_all(line, "") } else { line.into() };
            assert!(rest.chars().all(is_plain), "{rest:?}");
        }
    }
}
