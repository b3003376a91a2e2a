//! Files that operators write and the broker keeps, and requests to its API.

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use cicada::api::HeldRequest;
use cicada::broker::book::{MigrationRecord, ReturnRecord};
use cicada::component::Definition;
use cicada::component::definition::matches;
use cicada::config::Config;
use cicada::interface::Message;
use cicada::interface::Request;
use cicada::migration::records::VmRecord;
use cicada::recording::{RecordingError, fuzzing as recordings};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{split, work_dir};

/// Between the file and the lines `NAME=VALUE` of environment and command line.
const ENVIRONMENT: &str = "\n#env\n";

/// A `federation.toml`, with settings from the environment (names that begin with `CICADA_`) and
/// from the command line (all others).
pub fn config(data: &[u8]) {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    let Ok(text) = std::str::from_utf8(data) else { return };
    let path = PATH.get_or_init(|| {
        fs::create_dir_all(work_dir()).expect("the work directory can be written");
        work_dir().join("federation.toml")
    });
    let (file, settings) = text.split_once(ENVIRONMENT).unwrap_or((text, ""));
    let settings = settings.lines().filter_map(|l| l.split_once('='));
    let (environment, overrides): (Vec<_>, Vec<_>) =
        settings.map(|(k, v)| (k.to_owned(), v.to_owned())).partition(|(k, _)| k.starts_with("CICADA_"));
    fs::write(path, file).expect("the work directory can be written");
    match Config::load_with(Some(path), environment, &overrides) {
        Ok(config) => {
            let _ = config.transfer.addresses(None);
            let effective = toml::to_string(config.effective()).expect("settings can be written");
            fs::write(path, &effective).expect("the work directory can be written");
            let again = Config::load_with(Some(path), [], &[]).expect("settings in effect can be loaded");
            let again = toml::to_string(again.effective()).expect("settings can be written");
            assert_eq!(again, effective, "settings in effect stay as they are");
        }
        Err(e) => assert!(!e.to_string().is_empty()),
    }
}

/// A component definition.
pub fn definition(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Definition::parse(text) {
        Ok(definition) => {
            let patterns = definition.exclude.iter().chain(&definition.leave_out);
            for pattern in patterns.chain(&definition.unpack_also) {
                for path in ["usr/share/doc/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa/x", "a", ""] {
                    let _ = matches(pattern.as_bytes(), path.as_bytes());
                }
            }
            definition.packages.iter().for_each(|p| assert!(p.argument().starts_with(&p.name)));
            let _ = definition.has_option(Some("x"));
            assert_eq!(Definition::parse(text).as_ref().ok(), Some(&definition));
        }
        Err(e) => assert!(!e.to_string().is_empty()),
    }
}

/// A recording of a broker, by the first byte as it is or as lines whose checks are made here.
pub fn recording(data: &[u8]) {
    let Some((selector, rest)) = split(data) else { return };
    let read = match (selector % 2, std::str::from_utf8(rest)) {
        (1, Ok(lines)) => {
            let read = recordings::read(recordings::sealed(lines).as_bytes());
            assert!(!matches!(read, Err(RecordingError::Altered { .. })), "checks that fit are believed");
            read
        }
        _ => recordings::read(rest),
    };
    if let Err(e) = read {
        assert!(!e.to_string().is_empty());
    }
}

/// JSON, by the first byte: the broker's durable records, and what its API takes and gives.
pub fn journal(data: &[u8]) {
    let Some((selector, json)) = split(data) else { return };
    match selector % 6 {
        0 => {
            if let Some(record) = read_back::<VmRecord>(json) {
                let _ = record.spec.check();
                if let Some(Ok(record)) = record.given_up().map(|given| given.hand_over()) {
                    let _ = record.encode();
                }
                if let Some(arrival) = &record.arrival {
                    let _ = arrival.receipt.verify();
                }
            }
        }
        1 => drop(serde_json::from_slice::<MigrationRecord>(json).map(|r| serde_json::to_vec(&r))),
        2 => {
            if let Some(record) = read_back::<ReturnRecord>(json) {
                let _ = record.hand_over.map(|signed| signed.verify());
            }
        }
        3 => drop(read_back::<Request>(json)),
        4 => {
            if let Ok(request) = serde_json::from_slice::<HeldRequest>(json) {
                assert!(serde_json::to_vec(&request).is_ok());
            }
        }
        _ => drop(serde_json::from_slice::<Message>(json).map(|m| serde_json::to_vec(&m))),
    }
}

fn read_back<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(json: &[u8]) -> Option<T> {
    let value: T = serde_json::from_slice(json).ok()?;
    let written = serde_json::to_vec(&value).expect("a record can be written");
    let back: T = serde_json::from_slice(&written).expect("a record reads back");
    assert_eq!(back, value, "a record reads back");
    Some(value)
}
