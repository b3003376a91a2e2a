//! The systemd units: what systemd itself says of them, and what it makes of them where it runs.

#[path = "systemd/machine.rs"]
mod machine;
#[allow(dead_code)]
#[path = "support/xmpp.rs"]
mod support;

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use machine::{Machine, skipped};
use serde_json::Value;
use support::{Kind, ROOM, Server};

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
            skipped("no systemd-analyze; deploy/install installs the package systemd");
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
        "StartLimitBurst=20",
        "StateDirectory=cicada",
    ] {
        assert!(unit.lines().any(|line| line == needed), "{needed}");
    }
}

fn configuration(server: &Server, more: &str) -> String {
    format!(
        "[cloud]\nname = \"alpine\"\n[xmpp]\njid = \"alpine@federation.test\"\n\
         password_file = \"/etc/cicada/xmpp.password\"\nserver = \"127.0.0.1:{}\"\n\
         ca_file = \"/etc/cicada/ca.crt\"\nroom = \"{ROOM}\"\n\
         [transfer]\nlisten = \"127.0.0.1:0\"\npeer_networks = [\"127.0.0.0/8\"]\n{more}",
        server.port
    )
}

/// The service is down and stays down, for this reason.
fn is_given_up(machine: &Machine, code: &str) {
    machine.wait("the service is given up", |m| m.property("cicada", "SubState") == "failed");
    let of = |property: &str| machine.property("cicada", property);
    let found = (of("Result"), of("ExecMainStatus"), of("NRestarts"));
    assert_eq!(found, ("exit-code".into(), code.into(), "0".into()), "{}", machine.log());
}

/// From a machine that never saw it, through the mistakes that were made before, to an operator's daily work.
#[test]
fn the_service_runs_as_setup_leaves_it_and_works_on_the_files_of_operators() {
    if !Kind::PROSODY.is_there("the service") {
        return;
    }
    let Some(machine) = Machine::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Kind::PROSODY, dir.path().join("xmpp"), &["alpine"], Duration::from_secs(2));

    machine.good(&["/run/cicada-under-test", "setup"]);
    let again: Value = serde_json::from_str(&machine.good(&["cicada", "setup", "--json"])).unwrap();
    assert_eq!((&again["changes"], &again["kept"]), (&serde_json::json!([]), &serde_json::json!([])));
    // Nothing of root's gets in the broker's way.
    for words in [&["identity", "show"][..], &["broker"], &["config", "check"]] {
        let (code, said) = machine.bad(&[&["cicada"], words].concat());
        assert!(code == 6 && said.contains("runuser -u cicada"), "{words:?}: {code} {said}");
    }
    assert_eq!(std::fs::read_dir(machine.path("/var/lib/cicada")).unwrap().count(), 0);

    // As it was written, with an empty password; then with words that it does not know.
    machine.run(&["systemctl", "start", "cicada"]);
    is_given_up(&machine, "2");
    std::fs::copy(server.ca_file(), machine.path("/etc/cicada/ca.crt")).unwrap();
    machine.write("/etc/cicada/ca.crt", &std::fs::read_to_string(server.ca_file()).unwrap(), 0o644);
    let wrong = configuration(&server, "[hypervisor]\nwheels = 4\n");
    machine.write("/etc/cicada/federation.toml", &wrong, 0o644);
    machine.run(&["systemctl", "start", "cicada"]);
    is_given_up(&machine, "2");
    // A password that root's editor left root's is told by its name.
    machine.write("/etc/cicada/federation.toml", &configuration(&server, ""), 0o600);
    let password = std::fs::read_to_string(server.password_file("alpine")).unwrap();
    machine.write("/etc/cicada/xmpp.password", &password, 0o600);
    machine.run(&["systemctl", "start", "cicada"]);
    is_given_up(&machine, "6");
    machine.write("/etc/cicada/federation.toml", &configuration(&server, ""), 0o644);
    machine.run(&["systemctl", "start", "cicada"]);
    is_given_up(&machine, "6");
    assert!(machine.log().contains("/etc/cicada/xmpp.password"), "{}", machine.log());

    let mended = machine.good(&["cicada", "setup"]);
    assert!(mended.contains("/etc/cicada/xmpp.password: now cicada:cicada 0600"), "{mended}");
    machine.good(&["systemctl", "start", "cicada", "cicada-guests"]);
    machine.wait("the broker answers", |m| m.run(&["cicada", "status"]).status.success());
    assert_eq!(std::fs::read_to_string(machine.path("/etc/cicada/xmpp.password")).unwrap(), password);

    operators_files(&machine);

    // A VM runs behind the unit's walls, and on when the broker is another; with the host it is shut down.
    machine.good(&["cicada", "vm", "set", "two", "--stop-timeout", "1s"]);
    machine.good(&["cicada", "vm", "start", "two"]);
    machine.good(&["systemctl", "restart", "cicada"]);
    machine.wait("the broker answers", |m| m.run(&["cicada", "status"]).status.success());
    assert_eq!(power(&machine, "two"), "running", "{}", machine.log());
    machine.good(&["systemctl", "stop", "cicada-guests"]);
    assert_eq!(machine.property("cicada-guests", "Result"), "success");
    assert_eq!(power(&machine, "two"), "stopped", "{}", machine.log());

    // Each VM as a user of its own, as an operator adds it to the unit.
    let added = machine.path("/etc/systemd/system/cicada.service.d");
    std::fs::create_dir(&added).unwrap();
    std::fs::write(added.join("vm-users.conf"), include_str!("../deploy/systemd/vm-users.conf")).unwrap();
    machine.good(&["systemctl", "daemon-reload"]);
    machine.good(&["systemctl", "restart", "cicada"]);
    machine.wait("the broker answers", |m| m.run(&["cicada", "status"]).status.success());
    machine.good(&["cicada", "vm", "start", "one"]);
    // The one that went down with the host has come up with the broker.
    machine.wait("two runs again", |m| power(m, "two") == "running");
    let processes = machine.good(&["ps", "-e", "-o", "uid=,args="]);
    let qemus = processes.lines().filter(|line| line.contains("qemu-system-x86_64"));
    let users: BTreeSet<u32> = qemus.map(|l| l.split_whitespace().next().unwrap().parse().unwrap()).collect();
    assert!(users.len() == 2 && users.iter().all(|uid| *uid >= 2_100_000_000), "{processes}");
    machine.good(&["cicada", "vm", "stop", "--all", "--force"]);
    machine.good(&["systemctl", "stop", "cicada"]);
    assert_eq!(machine.property("cicada", "Result"), "success", "{}", machine.log());
}

fn power(machine: &Machine, vm: &str) -> String {
    let shown: Value = serde_json::from_str(&machine.good(&["cicada", "vm", "show", vm, "--json"])).unwrap();
    shown["power"].as_str().unwrap().to_owned()
}

/// What root keeps where the service sees nothing goes in and out.
fn operators_files(machine: &Machine) {
    let sh = |script: &str| machine.good(&["sh", "-euc", script]);
    sh("umask 077; dd if=/dev/urandom of=/root/r.raw bs=1M count=12 status=none; truncate -s 32M /root/r.raw
        qemu-img convert -q -O qcow2 /root/r.raw /root/r.qcow2; cp /root/r.raw /tmp/t.raw");
    machine.good(&["cicada", "vm", "adopt", "one", "/root/r.qcow2", "--user-data", "/root/r.qcow2"]);
    machine.good(&["cicada", "vm", "adopt", "two", "/tmp/t.raw", "--format", "raw", "--network", "default"]);
    // What is no disk, or not there, is told as ever.
    assert_eq!(machine.bad(&["cicada", "vm", "adopt", "three", "/root/none"]).0, 3);
    assert_eq!(machine.bad(&["cicada", "vm", "adopt", "three", "/root"]).0, 2);
    for (vm, format, more) in
        [("one", "raw", ""), ("one", "qcow2", ""), ("two", "vmdk", ""), ("one", "vdi", "--user-data")]
    {
        for dir in ["/root", "/tmp"] {
            let to = format!("{dir}/{vm}{more}.{format}");
            let words = ["cicada", "vm", "export", vm, &to, "--format", format, more];
            let words: Vec<_> = words.into_iter().filter(|word| !word.is_empty()).collect();
            machine.good(&words);
            machine.good(&["qemu-img", "compare", "-f", "raw", "-F", format, "/root/r.raw", &to]);
            let meta = std::fs::metadata(machine.path(&to)).unwrap();
            assert_eq!((meta.uid(), meta.mode() & 0o777), (0, 0o600), "{to}");
            assert_eq!(machine.bad(&words).0, 4, "{to} was written over");
        }
    }
    let recipes: Value =
        serde_json::from_str(&machine.good(&["cicada", "recipe", "list", "--json"])).unwrap();
    let recipe = recipes[0]["id"].as_str().unwrap();
    machine.good(&["cicada", "compose", recipe, "--output", "/root/base.qcow2", "--format", "qcow2"]);
    machine.good(&["qemu-img", "check", "-q", "/root/base.qcow2"]);

    sh("umask 077; mkdir -p /root/tree/usr/bin; echo hello >/root/tree/usr/bin/hello");
    machine.good(&["cicada", "component", "import", "/root/tree", "--name", "hello", "--version", "1"]);
    machine.good(&["cicada", "repo", "export", "/root/all.tar"]);
    machine.good(&["cicada", "repo", "import", "/root/all.tar"]);
    // Standard output and input are root's as well.
    let mut out = machine
        .command(&["cicada", "repo", "export", "-"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut back = machine.command(&["cicada", "repo", "import", "-"]);
    let back = back.stdin(out.stdout.take().unwrap()).output().unwrap();
    assert!(back.status.success() && out.wait().unwrap().success(), "{back:?}");

    // Others may not ask at all, and none of root's is left with the broker.
    let other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let (code, _) = machine
        .bad(&[&other[..], &["cicada", "--socket", "/var/lib/cicada/cicada.sock", "vm", "list"]].concat());
    assert_eq!(code, 6);
    let strays = machine.good(&["find", "/var/lib/cicada", "-uid", "0"]);
    assert_eq!(strays, "");
}
