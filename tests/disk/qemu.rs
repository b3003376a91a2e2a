//! QEMU's tools, where they are installed.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Mutex;

/// Whether QEMU's tools are there; says loudly what is not tested if they are not.
pub fn installed(test: &str) -> bool {
    let missing =
        ["qemu-img", "qemu-io"].into_iter().find(|t| Command::new(t).arg("--version").output().is_err());
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if let Some(tool) = missing
        && SAID.lock().unwrap().insert(test.to_owned())
    {
        // Not `println!`: the test runner would keep that to itself.
        std::io::stdout()
            .write_all(format!("SKIPPED: {test}: {tool} is not installed\n").as_bytes())
            .unwrap();
    }
    missing.is_none()
}

pub fn img(args: &[&str]) -> String {
    let output = Command::new("qemu-img").args(args).output().unwrap();
    succeeded(&format!("qemu-img {}", args.join(" ")), output)
}

/// Runs `qemu-io` commands on a disk, as one guest would.
pub fn io(disk: &Path, format: &str, commands: &[String]) {
    let mut io = Command::new("qemu-io");
    io.args(["-f", format, "-d", "unmap"]);
    for command in commands {
        io.args(["-c", command]);
    }
    let text = succeeded("qemu-io", io.arg(disk).output().unwrap());
    assert!(!text.contains("failed"), "{text}");
}

/// The file is without fault, and without leaks.
pub fn check(disk: &Path) {
    img(&["check", "-q", "-f", "qcow2", text(disk)]);
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn succeeded(what: &str, output: Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{what}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}
