//! `cicada vm console`: a terminal on a VM's serial console, or a script that types and waits.

use std::io::{self, IsTerminal, SeekFrom};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use clap::{ArgMatches, Args, Command, FromArgMatches, error::ErrorKind};
use regex::bytes::Regex;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::Instant;

use crate::config::HumanDuration;
use crate::interface::problem::{Problem, ProblemKind};
use crate::interface::{Reply, Request, VmRequest, VmView};

use super::context::Context;
use super::printer::{Outcome, Printer, unexpected};

/// Ctrl-], as in telnet and `virsh console`.
const ESCAPE: u8 = 0x1d;
/// Output that is searched for an expected text; more than any screen.
const SEARCHED_BYTES_MAX: usize = 1 << 20;
/// What waits in a socket is read within this.
const AT_ONCE: Duration = Duration::from_millis(1);
const LOG_POLL: Duration = Duration::from_millis(100);
const EXPECT_TIMEOUT: HumanDuration = HumanDuration::from_secs(60);

/// With --send and --expect it does what they say, in their order, and ends: a text is expected in what
/// came after the last --send, the guest's echo of that left aside. Else it connects the terminal; or, if
/// standard input is none, sends that and prints what comes until the console closes or --timeout is
/// over. With --history and nothing to send it ends with the history.
///
/// What the guest prints is escaped where a script or a file is shown (--expect, --history, no
/// terminal): a newline and a tab stay, every other control or direction character is written as
/// \xNN or \u{...}; --raw hands the bytes on. A terminal that is connected is the guest's: what it
/// prints there commands the terminal, as on any serial line, and so it can do what escape
/// sequences can. Do not connect to a guest you do not trust with a terminal you do.
#[derive(Args)]
pub struct Console {
    /// The VM's name or UUID
    vm: String,
    #[command(flatten)]
    script: Script,
    /// How long each expected text may take (60s if not given)
    #[arg(long, value_name = "DURATION")]
    timeout: Option<HumanDuration>,
    /// Begin with what the console has printed before, from its log
    #[arg(long)]
    history: bool,
    /// Print what the guest wrote byte by byte, escape sequences included
    #[arg(long)]
    raw: bool,
}

pub async fn run(ctx: &Context, args: Console) -> Outcome {
    let vm = match ctx.ask(&Request::Vm(VmRequest::Show { vm: args.vm })).await? {
        Reply::Vm(vm) => vm,
        other => return Err(unexpected(&other)),
    };
    if let Some(owner) = &vm.owner {
        return Err(Problem::new(
            ProblemKind::Conflict,
            format!("VM {}", vm.name),
            format!("was handed over to {owner}, and has no console here"),
        )
        .next("connect to it there")
        .into());
    }
    let mut ends = Ends::open(&vm, &args.script, args.history).await?;
    let mut screen = Screen::new(&ctx.printer, args.raw);
    if !args.script.steps.is_empty() {
        let timeout = args.timeout.unwrap_or(EXPECT_TIMEOUT).0;
        return run_script(&mut screen, &vm, &mut ends, &args.script.steps, timeout).await;
    }
    if io::stdin().is_terminal() {
        if !args.raw
            && let Output::Log(_) = &ends.output
        {
            // What was printed before is history; from here on the terminal is the guest's.
            ends.output.catch_up(&mut screen).await?;
            screen.end()?;
        }
        ctx.printer.note(format!("connected to {}; Ctrl-] leaves", vm.name));
        let raw = RawMode::enter()?;
        let result = interact(&ctx.printer, &mut ends).await;
        drop(raw);
        ctx.printer.note("");
        return result;
    }
    let history_only = args.history && args.timeout.is_none();
    pipe(&mut screen, &mut ends, args.timeout.map(|t| t.0), history_only).await
}

/// Standard output for what a guest wrote.
struct Screen<'a> {
    printer: &'a Printer,
    raw: bool,
    /// The beginning of a character whose rest has not come yet.
    pending: Vec<u8>,
}

impl<'a> Screen<'a> {
    fn new(printer: &'a Printer, raw: bool) -> Self {
        Self { printer, raw, pending: Vec::new() }
    }

    fn show(&mut self, bytes: &[u8]) -> Outcome {
        if self.raw {
            return self.printer.raw(bytes);
        }
        self.pending.extend_from_slice(bytes);
        let text = escape(&mut self.pending, false);
        self.printer.raw(text.as_bytes())
    }

    /// Nothing more comes.
    fn end(&mut self) -> Outcome {
        let text = escape(&mut self.pending, true);
        self.printer.raw(text.as_bytes())
    }
}

/// Takes whole characters off `bytes` as text that commands no terminal. A carriage return before a
/// newline, as consoles write it, goes; one alone would overwrite its line. What may be the
/// beginning of more is left unless it is the `last`.
fn escape(bytes: &mut Vec<u8>, last: bool) -> String {
    let mut text = String::with_capacity(bytes.len());
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let head = &rest[..rest.len().min(4)];
        let valid = match std::str::from_utf8(head) {
            Ok(valid) => valid,
            // The first character is whole, whatever follows.
            Err(e) if e.valid_up_to() > 0 => {
                std::str::from_utf8(&head[..e.valid_up_to()]).unwrap_or_default()
            }
            Err(e) if e.error_len().is_none() && !last => break,
            Err(_) => "",
        };
        let Some(c) = valid.chars().next() else {
            text.push_str(&format!("\\x{:02x}", rest[0]));
            rest = &rest[1..];
            continue;
        };
        match c {
            '\r' if rest.len() == 1 && !last => break,
            '\r' if rest.get(1) == Some(&b'\n') => {}
            '\n' | '\t' => text.push(c),
            c if c.is_ascii_control() => text.push_str(&format!("\\x{:02x}", c as u32)),
            c if is_printable(c) => text.push(c),
            c => text.extend(c.escape_unicode()),
        }
        rest = &rest[c.len_utf8()..];
    }
    let left = rest.len();
    bytes.drain(..bytes.len() - left);
    text
}

/// Whether a character neither commands a terminal nor hides or reorders the text around it.
fn is_printable(c: char) -> bool {
    !c.is_control()
        && !matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[derive(Clone, Debug)]
enum Step {
    Send(Vec<u8>),
    Expect(Regex, String),
}

/// `--send` and `--expect` in the order in which they were given, which derived arguments lose.
#[derive(Clone, Debug)]
struct Script {
    steps: Vec<Step>,
}

impl Args for Script {
    fn augment_args(command: Command) -> Command {
        let text = |name: &'static str, help: &'static str| {
            clap::Arg::new(name)
                .long(name)
                .value_name("TEXT")
                .action(clap::ArgAction::Append)
                .allow_hyphen_values(true)
                .help(help)
        };
        command
            .arg(text("send", "Type TEXT; \\n \\r \\t \\e \\\\ and \\xNN are understood, nothing is added"))
            .arg(text("expect", "Print output until TEXT is seen; exit code 5 if it is not in time"))
            .arg(text("expect-regex", "As --expect, with a regular expression"))
    }
    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Script {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut steps = Vec::new();
        for name in ["send", "expect", "expect-regex"] {
            let indices = matches.indices_of(name).into_iter().flatten();
            let texts = matches.get_many::<String>(name).into_iter().flatten();
            for (index, text) in indices.zip(texts) {
                let step = step(name, text).map_err(|e| {
                    clap::Error::raw(ErrorKind::ValueValidation, format!("--{name} '{text}': {e}\n"))
                })?;
                steps.push((index, step));
            }
        }
        steps.sort_by_key(|(index, _)| *index);
        Ok(Self { steps: steps.into_iter().map(|(_, step)| step).collect() })
    }
    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

fn step(name: &str, text: &str) -> Result<Step, String> {
    match name {
        "send" => unescape(text).map(Step::Send),
        "expect" => {
            Regex::new(&regex::escape(text)).map(|r| Step::Expect(r, text.into())).map_err(|e| e.to_string())
        }
        _ => Regex::new(text).map(|r| Step::Expect(r, text.into())).map_err(|e| e.to_string()),
    }
}

fn unescape(text: &str) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.extend(c.encode_utf8(&mut [0; 4]).bytes());
            continue;
        }
        out.push(match chars.next() {
            Some('n') => b'\n',
            Some('r') => b'\r',
            Some('t') => b'\t',
            Some('e') => 0x1b,
            Some('\\') => b'\\',
            Some('x') => {
                let hex: String = chars.by_ref().take(2).collect();
                let two = hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_hexdigit());
                let byte = u8::from_str_radix(&hex, 16).ok().filter(|_| two);
                byte.ok_or_else(|| format!("\\x{hex} is not two hex digits"))?
            }
            other => return Err(format!("\\{} is not known", other.map_or(String::new(), String::from))),
        });
    }
    Ok(out)
}

/// Where the console's output comes from and what is typed goes to.
struct Ends {
    output: Output,
    input: Option<OwnedWriteHalf>,
}

enum Output {
    Socket(OwnedReadHalf),
    /// The log has all that the console ever printed, and goes on.
    Log(tokio::fs::File),
}

impl Ends {
    async fn open(vm: &VmView, script: &Script, history: bool) -> Result<Self, Problem> {
        let only_reads =
            script.steps.iter().all(|s| matches!(s, Step::Expect(..))) && !script.steps.is_empty();
        if history && only_reads {
            return Ok(Self { output: Output::open_log(vm).await?, input: None });
        }
        let stream = match connect(vm).await {
            // What it printed before it stopped can be read all the same.
            Err(p) if history && script.steps.is_empty() && p.kind == ProblemKind::Conflict => {
                return Ok(Self { output: Output::open_log(vm).await?, input: None });
            }
            stream => stream?,
        };
        let (read, write) = stream.into_split();
        let output = if history { Output::open_log(vm).await? } else { Output::Socket(read) };
        Ok(Self { output, input: Some(write) })
    }

    async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.input {
            Some(input) => input.write_all(bytes).await,
            None => Ok(()),
        }
    }
}

impl Output {
    async fn open_log(vm: &VmView) -> Result<Self, Problem> {
        let file = tokio::fs::File::open(Path::new(&vm.console_log)).await;
        file.map(Output::Log).map_err(|e| {
            let problem = Problem::from_path(format!("console log {}", vm.console_log), &e);
            match problem.kind {
                ProblemKind::NotFound => {
                    problem.next(format!("it is made at the first start: cicada vm start {}", vm.name))
                }
                _ => problem,
            }
        })
    }

    /// Prints what is there by now.
    async fn catch_up(&mut self, screen: &mut Screen<'_>) -> Outcome {
        let failed = |e: io::Error| Problem::from_error(ProblemKind::Failed, "console log", &e);
        let mut buffer = vec![0; 16 << 10];
        loop {
            let n = match self {
                Output::Log(file) => file.read(&mut buffer).await.map_err(failed)?,
                // Zero if nothing waits; its end is noticed by the next read.
                Output::Socket(socket) => tokio::time::timeout(AT_ONCE, socket.read(&mut buffer))
                    .await
                    .unwrap_or(Ok(0))
                    .map_err(failed)?,
            };
            if n == 0 {
                return Ok(());
            }
            if !screen.printer.quiet {
                screen.show(&buffer[..n])?;
            }
        }
    }

    /// Waits for output; zero bytes is the console's end. Safe to drop between calls.
    async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Output::Socket(socket) => socket.read(buffer).await,
            Output::Log(file) => loop {
                let n = file.read(buffer).await?;
                if n > 0 {
                    return Ok(n);
                }
                // A log that was cut begins anew.
                if file.metadata().await?.len() < file.stream_position().await? {
                    file.seek(SeekFrom::Start(0)).await?;
                }
                tokio::time::sleep(LOG_POLL).await;
            },
        }
    }
}

async fn connect(vm: &VmView) -> Result<UnixStream, Problem> {
    UnixStream::connect(&vm.console_socket).await.map_err(|e| match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Problem::new(
            ProblemKind::Conflict,
            format!("VM {}", vm.name),
            format!("has no console: it is {}", vm.power),
        )
        .next(format!("start it with: cicada vm start {}", vm.name)),
        _ => Problem::from_error(ProblemKind::Failed, format!("console of VM {}", vm.name), &e),
    })
}

async fn run_script(
    screen: &mut Screen<'_>,
    vm: &VmView,
    ends: &mut Ends,
    steps: &[Step],
    timeout: Duration,
) -> Outcome {
    let object = format!("console of VM {}", vm.name);
    let mut seen = Seen::default();
    let failed = |e: io::Error| Problem::from_error(ProblemKind::Failed, object.clone(), &e);
    for step in steps {
        match step {
            Step::Send(bytes) => {
                // What was printed before, history and all, is no answer to it.
                if !seen.sending {
                    ends.output.catch_up(screen).await?;
                }
                seen.sent(bytes);
                ends.send(bytes).await.map_err(failed)?;
            }
            Step::Expect(pattern, text) => {
                let deadline = Instant::now() + timeout;
                if !expect(screen, ends, &mut seen, pattern, deadline, &object).await? {
                    let reason = format!("'{text}' was not seen within {}", HumanDuration(timeout));
                    return Err(Problem::new(ProblemKind::Refused, object, reason)
                        .next(format!("all it printed is in {}", vm.console_log))
                        .into());
                }
            }
        }
    }
    if screen.printer.quiet { Ok(()) } else { screen.end() }
}

/// What came after the last match, or the last thing that was typed.
#[derive(Default)]
struct Seen {
    bytes: Vec<u8>,
    /// Typed lines, which a guest's terminal echoes.
    echoes: Vec<Vec<u8>>,
    /// Nothing was expected since something was typed.
    sending: bool,
}

impl Seen {
    fn sent(&mut self, typed: &[u8]) {
        self.bytes.clear();
        // Several steps may type one line.
        if !self.sending {
            self.echoes = vec![Vec::new()];
        }
        self.sending = true;
        for byte in typed {
            match (byte, self.echoes.last_mut()) {
                (b'\n' | b'\r', _) => self.echoes.push(Vec::new()),
                (byte, Some(line)) => line.push(*byte),
                (_, None) => {}
            }
        }
    }

    fn came(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        let excess = self.bytes.len().saturating_sub(SEARCHED_BYTES_MAX);
        self.bytes.drain(..excess);
    }

    /// Whether `pattern` is in it, but for the first echo of each typed line; what is before its end is dropped.
    /// `last` if nothing more comes: then what only begins like an echo is none.
    fn find(&mut self, pattern: &Regex, last: bool) -> bool {
        self.sending = false;
        let mut from = 0;
        while let Some(found) = pattern.find_at(&self.bytes, from) {
            let range = found.range();
            let echoes = || (0..self.echoes.len()).filter_map(|i| self.echo(i, last));
            match echoes().find(|echo| echo.start < range.end && range.start < echo.end) {
                // The rest of the echo may be on its way.
                Some(echo) if echo.end > self.bytes.len() => return false,
                Some(echo) => from = echo.end,
                None => {
                    let passed: Vec<_> = (0..self.echoes.len())
                        .map(|i| self.echo(i, true).is_some_and(|echo| echo.end <= range.end))
                        .collect();
                    for (line, _) in self.echoes.iter_mut().zip(passed).filter(|(_, passed)| *passed) {
                        line.clear();
                    }
                    self.bytes.drain(..range.end);
                    return true;
                }
            }
        }
        false
    }

    /// Where a typed line is echoed for the first time; to beyond the end where only its beginning came yet.
    fn echo(&self, number: usize, last: bool) -> Option<std::ops::Range<usize>> {
        let (bytes, line) = (&self.bytes, self.echoes.get(number).filter(|line| !line.is_empty())?);
        let ends = number + 1 < self.echoes.len();
        let is_echo = |at: &usize| {
            let there = &bytes[*at..];
            match there.get(line.len()) {
                Some(next) => there.starts_with(line) && (!ends || matches!(next, b'\r' | b'\n')),
                None if there.len() == line.len() => there == line.as_slice() && !(last && ends),
                None => !last && line.starts_with(there),
            }
        };
        let at = (0..bytes.len()).find(is_echo)?;
        // Its line end belongs to it.
        Some(at..at + line.len() + usize::from(ends))
    }
}

/// Prints output until `pattern` is in what came.
async fn expect(
    screen: &mut Screen<'_>,
    ends: &mut Ends,
    seen: &mut Seen,
    pattern: &Regex,
    deadline: Instant,
    object: &str,
) -> Outcome<bool> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        if seen.find(pattern, false) {
            return Ok(true);
        }
        let Ok(read) = tokio::time::timeout_at(deadline, ends.output.read(&mut buffer)).await else {
            return Ok(seen.find(pattern, true));
        };
        let n = read.map_err(|e| Problem::from_error(ProblemKind::Failed, object, &e))?;
        if n == 0 {
            return Ok(seen.find(pattern, true));
        }
        if !screen.printer.quiet {
            screen.show(&buffer[..n])?;
        }
        seen.came(&buffer[..n]);
    }
}

/// The terminal and the console, until Ctrl-] or the console's end.
async fn interact(printer: &Printer, ends: &mut Ends) -> Outcome {
    let failed = |e: io::Error| Problem::from_error(ProblemKind::Failed, "console", &e);
    let mut stdin = tokio::io::stdin();
    let (mut typed, mut printed) = (vec![0; 1024], vec![0; 16 << 10]);
    loop {
        tokio::select! {
            n = stdin.read(&mut typed) => {
                let n = n.map_err(failed)?;
                let escape = typed[..n].iter().position(|b| *b == ESCAPE);
                ends.send(&typed[..escape.unwrap_or(n)]).await.map_err(failed)?;
                if n == 0 || escape.is_some() {
                    return Ok(());
                }
            }
            n = ends.output.read(&mut printed) => match n.map_err(failed)? {
                0 => return Ok(()),
                n => printer.raw(&printed[..n])?,
            }
        }
    }
}

/// Standard input to the console, and its output to standard output.
async fn pipe(
    screen: &mut Screen<'_>,
    ends: &mut Ends,
    timeout: Option<Duration>,
    history_only: bool,
) -> Outcome {
    let failed = |e: io::Error| Problem::from_error(ProblemKind::Failed, "console", &e);
    let mut stdin = tokio::io::stdin();
    let (mut given, mut printed) = (vec![0; 16 << 10], vec![0; 16 << 10]);
    let (mut more, mut sent) = (true, 0);
    let over = async {
        match timeout {
            Some(t) => tokio::time::sleep(t).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(over);
    loop {
        tokio::select! {
            n = stdin.read(&mut given), if more => {
                let n = n.map_err(failed)?;
                (more, sent) = (n > 0, sent + n);
                if history_only && sent == 0 {
                    ends.output.catch_up(screen).await?;
                    return screen.end();
                }
                ends.send(&given[..n]).await.map_err(failed)?;
            }
            n = ends.output.read(&mut printed) => match n.map_err(failed)? {
                0 => return screen.end(),
                n => screen.show(&printed[..n])?,
            },
            () = &mut over => return screen.end(),
        }
    }
}

/// The terminal hands on every key at once while this lives.
struct RawMode(Termios);

impl RawMode {
    fn enter() -> Result<Self, Problem> {
        let failed =
            |e: rustix::io::Errno| Problem::from_error(ProblemKind::Failed, "terminal", &io::Error::from(e));
        let stdin = io::stdin();
        let saved = tcgetattr(stdin.as_fd()).map_err(failed)?;
        let mut raw = saved.clone();
        raw.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw).map_err(failed)?;
        Ok(Self(saved))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin().as_fd(), OptionalActions::Now, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(typed: &[&str], came: &str) -> Seen {
        let mut seen = Seen::default();
        typed.iter().for_each(|text| seen.sent(text.as_bytes()));
        seen.came(came.as_bytes());
        seen
    }

    #[test]
    fn an_echo_is_no_answer() {
        let text = |t: &str| Regex::new(&regex::escape(t)).unwrap();
        // Typed in pieces, echoed, answered.
        let mut s = seen(&["echo o", "k\n"], "$ echo ok\r\n");
        assert!(!s.find(&text("ok"), false));
        s.came(b"ok\r\n$ ");
        assert!(s.find(&text("ok"), false) && !s.find(&text("ok"), true));
        // While only its beginning came nobody knows; when nothing more comes it was none.
        let mut s = seen(&["hello world\n"], "hello");
        assert!(!s.find(&text("hello"), false) && s.find(&text("hello"), true));
        // What is not echoed, as a password is not.
        assert!(seen(&["y\n"], "yes").find(&text("yes"), false));
        assert!(seen(&["secret\n"], "Welcome").find(&text("Welcome"), false));
        // Of two lines each has one echo.
        let mut s = seen(&["a1\na2\n"], "a1\r\na2\r\nout a2\r\n");
        assert!(s.find(&Regex::new("a[12]").unwrap(), false) && !s.find(&text("a"), true));
        // What came before it was typed is over.
        let mut s = seen(&[], "login: ");
        s.sent(b"root\n");
        assert!(!s.find(&text("login: "), true));
    }

    #[test]
    fn typed_text_may_hold_escapes() {
        assert_eq!(unescape(r"a\n\x41\\\eé").unwrap(), "a\nA\\\u{1b}é".as_bytes());
        for bad in [r"\q", r"\x4", r"\xzz", r"\"] {
            assert!(unescape(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_a_guest_printed_commands_no_terminal() {
        let whole = |bytes: &[u8]| {
            let mut left = bytes.to_vec();
            let text = escape(&mut left, true);
            assert!(left.is_empty());
            text
        };
        assert_eq!(whole("login: né\r\n\tok".as_bytes()), "login: né\n\tok");
        assert_eq!(whole(b"\x1b[2J\x1b]52;c;eA==\x07"), r"\x1b[2J\x1b]52;c;eA==\x07");
        assert_eq!(whole(b"good\rbad \x08\x7f \xff\xc3"), r"good\x0dbad \x08\x7f \xff\xc3");
        assert_eq!(whole("\u{9b}2J \u{202e}txt\u{200b}".as_bytes()), r"\u{9b}2J \u{202e}txt\u{200b}");
        // However the bytes are cut, the text is the same.
        let bytes = "a\u{9b}é\r\n\u{1f600}\r".as_bytes();
        for cut in 0..bytes.len() {
            let mut pending = bytes[..cut].to_vec();
            let mut text = escape(&mut pending, false);
            pending.extend_from_slice(&bytes[cut..]);
            text += &escape(&mut pending, true);
            assert_eq!(text, whole(bytes), "cut at {cut}");
        }
    }

    #[test]
    fn steps_keep_their_order() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            script: Script,
        }
        let line =
            ["x", "--expect", "login:", "--send", "root\\n", "--expect-regex", "[#$] ", "--send", "-x"];
        let parsed = <Line as clap::Parser>::try_parse_from(line).unwrap();
        let kinds: Vec<_> = parsed.script.steps.iter().map(|s| matches!(s, Step::Send(_))).collect();
        assert_eq!(kinds, [false, true, false, true]);
        assert!(<Line as clap::Parser>::try_parse_from(["x", "--expect-regex", "("]).is_err());
    }
}
