//! Writes a recording while a broker runs.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use crate::broker::book::Book;
use crate::broker::ids::Ids;
use crate::broker::{Beginning, Effect, Input};
use crate::clock::UnixMillis;
use crate::federation::Keyring;
use crate::interface::chain;
use crate::types::{ByteSize, Successions};

use super::told::Stream;
use super::{
    CHECK_DIGITS, Decided, End, FORMAT, Header, Line, RecordedBook, RecordedKey, RecordingError, digits,
};

/// A recording being written. What goes wrong ends it with a line in the log, and never the broker.
pub struct Recorder {
    file: Option<BufWriter<File>>,
    limit_bytes: u64,
    written_bytes: u64,
    check: String,
    stream: Stream,
    header: Option<Header>,
}

impl Recorder {
    /// Begins a new file, which only its owner can read.
    ///
    /// # Errors
    /// If there is such a file already, or none can be made.
    pub fn create(path: &Path, limit: ByteSize) -> Result<Self, RecordingError> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(|source| RecordingError::Io { action: "create", source })?;
        Ok(Self {
            file: Some(BufWriter::new(file)),
            limit_bytes: limit.0,
            written_bytes: 0,
            check: "0".repeat(CHECK_DIGITS),
            stream: Stream::default(),
            header: None,
        })
    }

    /// Takes note of what a core begins with, and of what it is told from now on.
    pub fn wrap(
        &mut self,
        beginning: Beginning,
        book: Box<dyn Book>,
        keyring: Keyring,
    ) -> (Beginning, Box<dyn Book>) {
        let stream = self.stream.clone();
        let b = beginning;
        let config = toml::to_string(b.config.effective()).unwrap_or_else(|e| {
            tracing::error!(error = chain(&e), "the recording ends here; the broker goes on");
            self.file = None;
            String::new()
        });
        self.header = Some(Header {
            format: FORMAT,
            release: env!("CARGO_PKG_VERSION").to_owned(),
            key: b.key.public(),
            config,
            keyring,
            successions: Successions::default(),
            features: b.features.clone(),
            transfer_addresses: b.transfer_addresses.clone(),
            vms_dir: b.vms_dir.clone(),
            disk_dirs: b.disk_dirs.clone(),
            marks: b.marks.clone(),
            now_ms: b.now,
            after_restore: false,
            told: Default::default(),
        });
        let key = RecordedKey { public: b.key.public(), stream: stream.clone(), signer: Some(b.key) };
        let ids: Ids = b.ids.onto(stream.ids.clone());
        (Beginning { key: Arc::new(key), ids, ..b }, Box::new(RecordedBook { stream, book: Some(book) }))
    }

    pub fn set_after_restore(&mut self) {
        if let Some(header) = &mut self.header {
            header.after_restore = true;
        }
    }

    pub fn set_successions(&mut self, successions: &Successions) {
        if let Some(header) = &mut self.header {
            header.successions = successions.clone();
        }
    }

    /// An input as it will be written, before the core takes it.
    pub fn before(&mut self, input: &Input) -> Option<serde_json::Value> {
        if let Some(header) = self.header.take() {
            self.write(&Header { told: self.stream.take(), ..header });
        }
        self.file.as_ref()?;
        match serde_json::to_value(input) {
            Ok(value) => Some(value),
            Err(e) => {
                self.fail(&RecordingError::Malformed { line: 0, source: e });
                None
            }
        }
    }

    /// The step of an input, after the core took it.
    pub fn after(&mut self, at: UnixMillis, input: Option<serde_json::Value>, effects: &[Effect]) {
        let told = self.stream.take();
        let Some(input) = input else { return };
        let effects: Vec<Decided> = effects.iter().map(Decided::of).collect();
        let step = serde_json::json!({ "at_ms": at, "input": input, "told": told, "effects": effects });
        self.write(&step);
        if self.written_bytes >= self.limit_bytes && self.file.is_some() {
            tracing::warn!(
                bytes = self.written_bytes,
                "the recording is as large as it may be: it ends here"
            );
            self.end(End::Limit);
        }
    }

    /// Says why nothing follows.
    pub fn end(&mut self, end: End) {
        self.write(&Line::End { end });
        self.file = None;
    }

    fn write(&mut self, value: &impl Serialize) {
        let Some(file) = &mut self.file else { return };
        let written = serde_json::to_string(value).map_err(std::io::Error::from).and_then(|json| {
            self.check = digits(&[self.check.as_bytes(), json.as_bytes()]);
            self.written_bytes += (CHECK_DIGITS + json.len() + 2) as u64;
            // Whole lines: whatever ends the broker, what it did before is there.
            writeln!(file, "{} {json}", self.check).and_then(|()| file.flush())
        });
        if let Err(source) = written {
            self.fail(&RecordingError::Io { action: "write", source });
        }
    }

    fn fail(&mut self, error: &RecordingError) {
        tracing::error!(error = chain(error), "the recording ends here; the broker goes on");
        self.file = None;
    }
}
