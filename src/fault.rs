//! Level 0: named points at which a test makes this process die or wait, so that it can look at
//! what a crash exactly there leaves behind. Nothing of it is in a release build, and a release
//! build that is told to fail refuses to start.
//!
//! The variable [`VARIABLE`] names a file that is looked at whenever a point is reached. It holds
//! one instruction, which is removed when it is carried out:
//!
//! - `POINT=kill`: the process kills itself, as `kill -9` would.
//! - `POINT=hold:PATH`: the process makes the file PATH and waits until somebody removes it.
//! - `POINT=fail`: what is done at the point fails; only some points can.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Environment variable with the path of the instruction's file.
pub const VARIABLE: &str = "CICADA_FAULT_FILE";

/// Every point, in the order in which a move reaches them: at its source, then at its target.
pub const POINTS: &[&str] = &[
    "source-checked",
    "source-reserved",
    "source-scanned",
    "source-staged",
    "source-stopped",
    // Before and after the record that the VM is no longer ours.
    "source-giving-up",
    "source-given-up",
    "source-start-answered",
    // Before and after the record that ends the hand-over.
    "source-releasing",
    "source-released",
    // Before and after the record that the VM is ours again.
    "source-taking-back",
    "source-taken-back",
    "target-reserving",
    "target-staging",
    "target-composed",
    "target-staged",
    "target-staged-last",
    // Before and after the record that the VM is ours.
    "target-taking-over",
    "target-taken-over",
    "target-starting",
    "target-started",
    "target-telling",
    // Before and after the record that it never will be.
    "target-returning",
    "target-returned",
    // Before and after the record that this cloud's key gives way to another.
    "identity-made",
    "identity-succeeded",
    // Fails: the fsync of the directory after the rename of any durable write.
    "durable-renamed",
];

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultError {
    #[error("{VARIABLE} is set, and this is a release build: it has no points at which to fail")]
    Release,
    #[error("'{line}' in {} is no instruction: it is POINT=kill, POINT=hold:PATH or POINT=fail", path.display())]
    Malformed { path: PathBuf, line: String },
    #[error("there is no point '{name}'; there are {}", POINTS.join(", "))]
    Unknown { name: String },
}

#[derive(Debug, PartialEq, Eq)]
enum Action {
    Kill,
    Hold(PathBuf),
    Fail,
}

/// Whether a process may start with this value of [`VARIABLE`]; `has_points` is true of debug builds.
pub fn check(file: Option<&OsStr>, has_points: bool) -> Result<(), FaultError> {
    match file {
        None => Ok(()),
        Some(_) if !has_points => Err(FaultError::Release),
        Some(file) => read(Path::new(file)).map(drop),
    }
}

/// As [`check`], of this process.
pub fn check_environment() -> Result<(), FaultError> {
    check(std::env::var_os(VARIABLE).as_deref(), cfg!(debug_assertions))
}

/// A place where a test may want a crash. `name` is one of [`POINTS`].
pub fn point(name: &'static str) {
    match take(name) {
        None | Some(Action::Fail) => {}
        Some(Action::Kill) => {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
        Some(Action::Hold(path)) => {
            let made = std::fs::write(&path, name).is_ok();
            while made && path.exists() {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// Whether a test wants that what is done at `name` fails.
pub fn fails(name: &'static str) -> bool {
    take(name) == Some(Action::Fail)
}

/// The instruction for this point. Whoever removes it carries it out: once.
fn take(name: &'static str) -> Option<Action> {
    if !cfg!(debug_assertions) {
        return None;
    }
    debug_assert!(POINTS.contains(&name), "{name} is missing in POINTS");
    let file = std::env::var_os(VARIABLE)?;
    let (_, action) = read(Path::new(&file)).ok()?.filter(|(at, _)| at == name)?;
    std::fs::remove_file(&file).ok().map(|()| action)
}

/// The instruction, unless there is none.
fn read(path: &Path) -> Result<Option<(String, Action)>, FaultError> {
    let Ok(text) = std::fs::read_to_string(path) else { return Ok(None) };
    let line = text.trim();
    if line.is_empty() {
        return Ok(None);
    }
    let malformed = || FaultError::Malformed { path: path.to_owned(), line: line.to_owned() };
    let (name, action) = line.split_once('=').ok_or_else(malformed)?;
    let action = match action.split_once(':') {
        None if action == "kill" => Action::Kill,
        None if action == "fail" => Action::Fail,
        Some(("hold", path)) if !path.is_empty() => Action::Hold(path.into()),
        _ => return Err(malformed()),
    };
    if !POINTS.contains(&name) {
        return Err(FaultError::Unknown { name: name.to_owned() });
    }
    Ok(Some((name.to_owned(), action)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_build_refuses_to_be_told_to_fail() {
        assert_eq!(check(None, false), Ok(()));
        assert_eq!(check(Some("/nowhere".as_ref()), false), Err(FaultError::Release));
        assert_eq!(check(Some("/nowhere".as_ref()), true), Ok(()));
    }

    #[test]
    fn an_instruction_names_a_point_and_what_to_do() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let told = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            check(Some(file.path().as_os_str()), true)
        };
        assert_eq!(told(""), Ok(()));
        assert_eq!(told("source-given-up=kill\n"), Ok(()));
        assert_eq!(told("target-started=hold:/tmp/here"), Ok(()));
        assert_eq!(told("durable-renamed=fail"), Ok(()));
        for bad in ["source-given-up", "source-given-up=die", "source-given-up=hold:"] {
            assert!(matches!(told(bad), Err(FaultError::Malformed { .. })), "{bad}");
        }
        let unknown = told("somewhere=kill").unwrap_err().to_string();
        assert!(unknown.contains("'somewhere'") && unknown.contains("source-given-up"), "{unknown}");
    }
}
