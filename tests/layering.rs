//! Dependencies between modules point down only. The table is the one in ARCHITECTURE.md.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Module, level, and siblings of its own level it may use.
const ROOMS: &[(&str, u8, &[&str])] = &[
    ("types", 0, &["clock"]),
    ("clock", 0, &[]),
    ("durable", 0, &["fault"]),
    ("fault", 0, &[]),
    ("unix_socket", 0, &[]),
    ("sparse", 0, &["types"]),
    ("stanza", 1, &[]),
    ("vm", 1, &[]),
    ("component", 1, &[]),
    ("migration", 1, &["vm", "component"]),
    ("federation", 1, &["stanza"]),
    ("placement", 1, &["vm", "migration", "federation"]),
    ("interface", 1, &["vm", "component", "migration", "federation"]),
    ("config", 2, &["path_owner"]),
    ("path_owner", 2, &[]),
    ("lent_ids", 2, &[]),
    ("telemetry", 2, &[]),
    // Of the configuration it takes the settings alone.
    ("broker", 2, &["config"]),
    ("disk", 2, &[]),
    ("repository", 2, &[]),
    ("transfer", 2, &[]),
    ("hypervisor", 2, &["lent_ids"]),
    ("xmpp", 2, &[]),
    ("compose", 3, &[]),
    ("build", 3, &["compose"]),
    ("adopt", 3, &["compose"]),
    ("recording", 3, &[]),
    ("runner", 3, &["adopt", "compose", "recording"]),
    ("sim", 3, &[]),
    ("client", 4, &["api"]),
    ("api", 4, &[]),
    ("daemon", 5, &[]),
    ("cli", 6, &[]),
];

/// What pure modules never mention outside their tests.
const IMPURE: &[&str] =
    &["std::fs", "std::net", "std::process", "std::thread", "tokio::", "SystemTime", "Instant::now"];
/// And what the core does not mention either: its ids are handed to it.
const RANDOM: &[&str] = &["::random()", "new_v4", "getrandom"];

fn sources(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
        if entry.is_dir() {
            sources(&entry, out);
        } else if entry.extension().is_some_and(|e| e == "rs") {
            out.push(entry);
        }
    }
}

/// The file without its unit tests, comments and doc comments.
fn code_of(text: &str) -> String {
    let code = text.split("\n#[cfg(test)]\nmod tests").next().unwrap_or(text);
    code.lines().filter(|l| !l.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

#[test]
fn dependencies_point_down() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let rooms: BTreeMap<&str, (u8, &[&str])> = ROOMS.iter().map(|(n, l, s)| (*n, (*l, *s))).collect();
    let mut files = Vec::new();
    sources(&root, &mut files);
    let mut broken = Vec::new();
    for file in files {
        let path = file.strip_prefix(&root).unwrap();
        let room = path.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
        if room == "lib" || room == "main" {
            continue;
        }
        let Some((level, siblings)) = rooms.get(room.as_str()) else {
            broken.push(format!("{}: module '{room}' has no level: add it to the table", path.display()));
            continue;
        };
        let code = code_of(&fs::read_to_string(&file).unwrap());
        for used in code.split("crate::").skip(1) {
            // `use crate::{a, b}` would escape the check.
            let name: String = used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if name.is_empty() {
                broken.push(format!("{}: write one `use crate::room::…` a line", path.display()));
                continue;
            }
            let Some((used_level, _)) = rooms.get(name.as_str()) else { continue };
            let allowed = name == room
                || used_level < level
                || (used_level == level && siblings.contains(&name.as_str()));
            if !allowed {
                broken.push(format!("{} (level {level}) uses {name} (level {used_level})", path.display()));
            }
        }
        let decides =
            *level <= 1 && !["clock", "durable", "fault", "sparse", "unix_socket"].contains(&room.as_str());
        if decides || room == "broker" {
            let random = if room == "broker" { RANDOM } else { &[] };
            for word in IMPURE.iter().chain(random).filter(|w| code.contains(**w)) {
                broken.push(format!("{} is pure but mentions {word}", path.display()));
            }
        }
        if code.contains("sled::") && path != Path::new("repository/index.rs") {
            broken.push(format!("{}: only repository/index.rs knows sled", path.display()));
        }
    }
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn no_source_file_is_too_long() {
    let mut files = Vec::new();
    sources(Path::new(env!("CARGO_MANIFEST_DIR")), &mut files);
    let long: Vec<_> = files
        .iter()
        .filter(|f| !f.components().any(|c| c.as_os_str() == "target"))
        .map(|f| (fs::read_to_string(f).unwrap().lines().count(), f))
        .filter(|(n, _)| *n > 1000)
        .collect();
    assert!(long.is_empty(), "over 1,000 lines: {long:?}");
}

/// Settings are TOML. What reads other formats would be code that nothing calls and everything carries.
#[test]
fn no_format_is_built_in_that_nothing_reads() {
    for lock in ["Cargo.lock", "fuzz/Cargo.lock"] {
        let lock = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(lock)).unwrap();
        for name in ["yaml-rust2", "ron", "json5", "rust-ini"] {
            assert!(!lock.contains(&format!("name = \"{name}\"\n")), "{name}");
        }
    }
}
