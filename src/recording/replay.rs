//! Steps a core through a recording.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use crate::broker::ids::Ids;
use crate::broker::{Beginning, Broker, Effect, Input};
use crate::clock::UnixMillis;
use crate::config::Config;
use crate::federation::Members;
use crate::migration::Law;

use super::told::Stream;
use super::{
    CHECK_DIGITS, Decided, End, FORMAT, Header, LINE_BYTES_MAX, Line, RecordedBook, RecordedKey,
    RecordingError, digits,
};

/// A recording and the core that is stepped through it.
pub struct Replay {
    lines: Lines<BufReader<File>>,
    broker: Broker,
    stream: Stream,
    pub header: Header,
    steps: u64,
    pub end: Option<End>,
}

/// What a core did at one step.
#[derive(Clone, Debug)]
pub struct Step {
    /// From 1.
    pub number: u64,
    pub line: u64,
    pub at: UnixMillis,
    pub input: Input,
    pub effects: Vec<Effect>,
    pub differences: Vec<Difference>,
}

/// Where the core decides otherwise than the recorded one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Difference {
    /// At this place among the effects: what was recorded, what is wanted now.
    Effect { place: usize, recorded: Option<String>, now: Option<String> },
    /// It asks for something else than it did.
    Asks(String),
}

impl Replay {
    /// Opens a recording and begins its core.
    ///
    /// # Errors
    /// If it is none, of another format, altered, or its core cannot begin.
    pub fn open(path: &Path) -> Result<Self, RecordingError> {
        let file = File::open(path).map_err(|source| RecordingError::Io { action: "read", source })?;
        let mut lines = Lines::of(BufReader::new(file));
        let header = lines.header()?;
        let stream = Stream::default();
        stream.put(header.told.clone());
        let broker = begin(&header, &stream)?;
        Ok(Self { lines, broker, stream, header, steps: 0, end: None })
    }

    /// The next step; `None` at the end, where [`Replay::end`] says whether that was told.
    ///
    /// # Errors
    /// If the recording is damaged from here on.
    pub fn step(&mut self) -> Result<Option<Step>, RecordingError> {
        if self.end.is_some() {
            return Ok(None);
        }
        let Some(entry) = self.lines.entry()? else { return Ok(None) };
        let line = self.lines.line;
        let (at, input, told, recorded) = match entry {
            Line::Step { at_ms, input, told, effects } => (at_ms, *input, told, effects),
            Line::End { end } => {
                self.end = Some(end);
                return Ok(None);
            }
        };
        self.steps += 1;
        self.stream.put(told);
        let effects = self.broker.step(at, input.clone());
        let mut differences: Vec<_> = self.stream.strays().into_iter().map(Difference::Asks).collect();
        let now: Vec<Decided> = effects.iter().map(Decided::of).collect();
        for place in 0..recorded.len().max(now.len()) {
            let (was, is) = (recorded.get(place), now.get(place));
            if was != is {
                let words = |d: Option<&Decided>| d.map(|d| format!("{} {}", d.0, d.1));
                differences.push(Difference::Effect { place, recorded: words(was), now: words(is) });
            }
        }
        Ok(Some(Step { number: self.steps, line, at, input, effects, differences }))
    }
}

fn begin(header: &Header, stream: &Stream) -> Result<Broker, RecordingError> {
    let failed = |e: Box<dyn std::error::Error + Send + Sync>| RecordingError::Beginning(e);
    let config = Config::of_text(&header.config, Path::new("/")).map_err(|e| failed(e.into()))?;
    let members = Members::believing(header.keyring.clone()).seen_by(config.cloud.name.clone());
    let key = RecordedKey { public: header.key, stream: stream.clone(), signer: None };
    let beginning = Beginning {
        config,
        key: Arc::new(key),
        features: header.features.clone(),
        transfer_addresses: header.transfer_addresses.clone(),
        vms_dir: header.vms_dir.clone(),
        disk_dirs: header.disk_dirs.clone(),
        marks: header.marks.clone(),
        ids: Ids::from_tape(stream.ids.clone()),
        now: header.now_ms,
        law: Law::WHOLE,
    };
    let book = Box::new(RecordedBook { stream: stream.clone(), book: None });
    let broker = Broker::open(book, members, beginning).map_err(|e| failed(e.into()))?;
    let broker = broker.with_successions(header.successions.clone());
    if header.after_restore { broker.after_restore().map_err(|e| failed(e.into())) } else { Ok(broker) }
}

/// Lines whose checks fit.
pub(super) struct Lines<R> {
    file: R,
    line: u64,
    check: String,
}

impl<R: BufRead> Lines<R> {
    pub fn of(file: R) -> Self {
        Self { file, line: 0, check: "0".repeat(CHECK_DIGITS) }
    }

    /// The beginning, which is the first line.
    pub fn header(&mut self) -> Result<Header, RecordingError> {
        let first = match self.next() {
            Ok(Some(first)) => first,
            Ok(None) | Err(RecordingError::Altered { .. }) => return Err(RecordingError::Foreign),
            Err(e) => return Err(e),
        };
        let value: serde_json::Value = serde_json::from_str(&first).map_err(|_| RecordingError::Foreign)?;
        match value.get("format").and_then(serde_json::Value::as_u64) {
            Some(format) if format == u64::from(FORMAT) => {}
            Some(found) => return Err(RecordingError::Format { found }),
            None => return Err(RecordingError::Foreign),
        }
        serde_json::from_value(value).map_err(|source| RecordingError::Malformed { line: 1, source })
    }

    /// The next line after that; `None` behind the last.
    pub fn entry(&mut self) -> Result<Option<Line>, RecordingError> {
        let Some(text) = self.next()? else { return Ok(None) };
        let line = self.line;
        serde_json::from_str(&text).map(Some).map_err(|source| RecordingError::Malformed { line, source })
    }

    /// The next line. A last one that was cut is none: its broker died while it wrote it.
    fn next(&mut self) -> Result<Option<String>, RecordingError> {
        let mut bytes = Vec::new();
        let read = self.file.by_ref().take(LINE_BYTES_MAX + 1).read_until(b'\n', &mut bytes);
        read.map_err(|source| RecordingError::Io { action: "read", source })?;
        if bytes.len() as u64 > LINE_BYTES_MAX {
            return Err(RecordingError::TooLong { line: self.line + 1 });
        }
        if bytes.pop() != Some(b'\n') {
            return Ok(None);
        }
        self.line += 1;
        let altered = RecordingError::Altered { line: self.line };
        let Ok(text) = String::from_utf8(bytes) else { return Err(altered) };
        let Some((check, json)) = text.split_once(' ') else { return Err(altered) };
        if check != digits(&[self.check.as_bytes(), json.as_bytes()]) {
            return Err(altered);
        }
        self.check = check.to_owned();
        Ok(Some(json.to_owned()))
    }
}
