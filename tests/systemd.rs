//! The systemd unit: what systemd itself says of it.

use std::io::Write as _;
use std::path::Path;
use std::process::Command;

/// Overall exposure that is not exceeded; systemd counts from 0 to 10.
const EXPOSURE_MAX: f64 = 2.5;

/// What `systemd-analyze` says, on both channels; nothing without it.
fn analyze(arguments: &[&str], unit: &str) -> Option<String> {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/systemd").join(unit);
    let mut command = Command::new("systemd-analyze");
    command.args(arguments).arg(&unit).env("LC_ALL", "C");
    let output = match command.output() {
        Ok(output) => output,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let words = "SKIPPED: no systemd-analyze; deploy/install installs the package systemd";
            let _ = writeln!(std::io::stderr(), "{words}");
            return None;
        }
        Err(e) => panic!("systemd-analyze: {e}"),
    };
    let words = [output.stdout, output.stderr].concat();
    Some(String::from_utf8_lossy(&words).into_owned())
}

#[test]
fn the_units_expose_no_more_than_they_must() {
    for unit in ["cicada.service", "cicada-guests.service"] {
        let Some(text) = analyze(&["security", "--offline=true", "--no-pager"], unit) else { return };
        let line = text.lines().find(|l| l.contains("Overall exposure level"));
        let line = line.unwrap_or_else(|| panic!("no exposure in: {text}"));
        println!("{line}");
        let after = line.split_once(".service:").unwrap().1;
        let exposure: f64 = after.split_whitespace().next().unwrap().parse().unwrap();
        assert!(exposure <= EXPOSURE_MAX, "{line}");
    }
}

#[test]
fn systemd_understands_every_line_of_the_units() {
    for unit in ["cicada.service", "cicada-guests.service"] {
        let Some(text) = analyze(&["verify", "--man=no", "--generators=no"], unit) else { return };
        // The program is not installed where tests run.
        let complaint = |line: &&str| line.contains("cicada") && !line.contains("is not executable");
        let complaints: Vec<_> = text.lines().filter(complaint).collect();
        assert!(complaints.is_empty(), "{complaints:?}");
    }
}

/// With just these `hypervisor.rs: a_broker_with_two_capabilities_has_users_for_its_vms_too` runs.
#[test]
fn vms_have_users_of_their_own_by_two_capabilities_and_no_other_change() {
    let added = include_str!("../deploy/systemd/vm-users.conf");
    let settings: Vec<_> = added.lines().filter(|line| !line.starts_with('#')).collect();
    let two = "CAP_SETUID CAP_SETGID";
    let expected = [
        "[Service]".to_owned(),
        format!("CapabilityBoundingSet={two}"),
        format!("AmbientCapabilities={two}"),
    ];
    assert_eq!(settings, expected);
    let unit = include_str!("../deploy/systemd/cicada.service");
    let namespaces = unit.lines().find_map(|line| line.strip_prefix("RestrictNamespaces=")).unwrap();
    assert!(namespaces.split(' ').any(|kind| kind == "user"), "{namespaces}");
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
