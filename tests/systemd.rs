//! The systemd unit: what systemd itself says of it.

use std::path::Path;
use std::process::Command;

/// Overall exposure that is not exceeded; systemd counts from 0 to 10.
const EXPOSURE_MAX: f64 = 2.5;

#[test]
fn the_unit_exposes_no_more_than_it_must() {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/systemd/cicada.service");
    let mut command = Command::new("systemd-analyze");
    command.args(["security", "--offline=true", "--no-pager"]).arg(&unit).env("LC_ALL", "C");
    let output = match command.output() {
        Ok(output) => output,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            println!("SKIPPED: no systemd-analyze; deploy/install installs the package systemd");
            return;
        }
        Err(e) => panic!("systemd-analyze: {e}"),
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find(|l| l.contains("Overall exposure level")).unwrap_or_else(|| {
        panic!("no exposure in: {text}\n{}", String::from_utf8_lossy(&output.stderr));
    });
    println!("{line}");
    let after = line.split_once(".service:").unwrap().1;
    let exposure: f64 = after.split_whitespace().next().unwrap().parse().unwrap();
    assert!(exposure <= EXPOSURE_MAX, "{line}");
}

#[test]
fn the_unit_keeps_what_the_broker_needs() {
    let unit = include_str!("../deploy/systemd/cicada.service");
    for needed in [
        "KillMode=process",
        "UMask=0077",
        "DeviceAllow=/dev/kvm rw",
        "DeviceAllow=/dev/net/tun rw",
        "RestartPreventExitStatus=2 6 10",
        "StateDirectory=cicada",
    ] {
        assert!(unit.lines().any(|line| line == needed), "{needed}");
    }
}
