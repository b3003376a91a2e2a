//! Coverage-guided fuzzing of everything that reads foreign bytes. One program holds all targets;
//! `CICADA_FUZZ_TARGET` names the one to run, and `deploy/fuzz` builds and runs it.
//!
//! A run fails by a panic, by memory out of proportion ([`memory`]), by taking longer than
//! libFuzzer's time limit, or where what was accepted does not survive being written again.
#![no_main]

mod content;
mod control;
mod disk;
mod edges;
mod machines;
mod memory;
mod pack;
mod seeds;
mod settings;
mod trees;

use std::path::PathBuf;
use std::sync::OnceLock;

type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 17] = [
    ("chunk-map", trees::chunk_map),
    ("config", settings::config),
    ("definition", settings::definition),
    ("delta", pack::delta),
    ("disk", disk::qcow2),
    ("edges", edges::edges),
    ("extents", content::extents),
    ("fragments", content::fragments),
    ("frames", control::frames),
    ("journal", settings::journal),
    ("machines", machines::machines),
    ("manifest", content::manifest),
    ("negotiation", control::negotiation),
    ("pack", pack::stored_form),
    ("recording", settings::recording),
    ("records", content::records),
    ("stanzas", control::stanzas),
];

static TARGET: OnceLock<Target> = OnceLock::new();

libfuzzer_sys::fuzz_target!(init: choose(), |data: &[u8]| {
    if let Some(target) = TARGET.get() {
        memory::watch(data.len(), || target(data));
    }
});

fn choose() {
    memory::stop_watching_on_panic();
    let name = std::env::var("CICADA_FUZZ_TARGET").unwrap_or_default();
    match name.as_str() {
        "list" => TARGETS.iter().for_each(|(name, _)| println!("{name}")),
        "seeds" => seeds::write(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus")),
        name => match TARGETS.iter().find(|(known, _)| *known == name) {
            Some((_, target)) => {
                let _ = TARGET.set(*target);
                return;
            }
            None => {
                eprintln!("no fuzz target is called '{name}'; CICADA_FUZZ_TARGET=list lists them");
                std::process::exit(2);
            }
        },
    }
    std::process::exit(0);
}

/// The first byte and the rest.
fn split(data: &[u8]) -> Option<(u8, &[u8])> {
    data.split_first().map(|(first, rest)| (*first, rest))
}

/// Where targets may write; `deploy/fuzz` makes it and removes it.
fn work_dir() -> PathBuf {
    std::env::temp_dir().join(format!("cicada-fuzz-{}", std::process::id()))
}
