//! `cicada setup` on machines that are directories: what it makes of an empty one, of one that somebody made
//! mistakes on, and what it leaves alone.

use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn skipped(reason: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {reason}");
}

/// A machine with nothing but the users that every system has.
struct Machine(tempfile::TempDir);

impl Machine {
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skipped("making users and giving files away needs root");
            return None;
        }
        if Command::new("systemd-sysusers").arg("--version").output().is_err() {
            skipped("no systemd-sysusers; deploy/install installs the package systemd");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        fs::write(dir.path().join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
        fs::write(dir.path().join("etc/group"), "root:x:0:\nkvm:x:105:\n").unwrap();
        Some(Self(dir))
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path.strip_prefix('/').unwrap())
    }

    fn cicada(&self, arguments: &[&str]) -> (i32, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_cicada"))
            .args(["setup", "--root"])
            .arg(self.0.path())
            .args(arguments)
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    }

    fn setup(&self) -> Value {
        let (code, out, err) = self.cicada(&["--json"]);
        assert_eq!(code, 0, "{out}{err}");
        serde_json::from_str(&out).unwrap()
    }

    /// The user and group id of the broker.
    fn broker(&self) -> (u32, u32) {
        let passwd = fs::read_to_string(self.path("/etc/passwd")).unwrap();
        let line = passwd.lines().find(|l| l.starts_with("cicada:")).unwrap();
        let fields: Vec<_> = line.split(':').collect();
        (fields[2].parse().unwrap(), fields[3].parse().unwrap())
    }

    fn is(&self, path: &str, owner: (u32, u32), mode: u32) {
        let meta = fs::symlink_metadata(self.path(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
        assert_eq!(((meta.uid(), meta.gid()), meta.mode() & 0o7777), (owner, mode), "{path}");
    }
}

fn objects(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|step| step["object"].as_str().unwrap()).collect()
}

/// Everything below a directory with owner, mode and content.
fn all_of(dir: &Path) -> Vec<(PathBuf, u32, u32, Option<Vec<u8>>)> {
    let mut all = Vec::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(at) = waiting.pop() {
        let meta = fs::symlink_metadata(&at).unwrap();
        if meta.is_dir() {
            waiting.extend(fs::read_dir(&at).unwrap().map(|e| e.unwrap().path()));
        }
        let content = meta.is_file().then(|| fs::read(&at).unwrap());
        all.push((at, meta.uid(), meta.mode(), content));
    }
    all.sort();
    all
}

#[test]
fn an_empty_machine_is_made_ready_once_and_a_dry_run_makes_nothing() {
    let Some(machine) = Machine::new() else { return };
    let before = all_of(machine.0.path());
    let (code, told, _) = machine.cicada(&["--dry-run"]);
    assert!(
        code == 0 && told.contains("/var/lib/cicada: would be: directory made, cicada:cicada 0700"),
        "{told}"
    );
    assert!(all_of(machine.0.path()) == before);

    let made = machine.setup();
    let broker = machine.broker();
    let group = fs::read_to_string(machine.path("/etc/group")).unwrap();
    assert!(group.lines().any(|l| l.starts_with("kvm:") && l.ends_with(":cicada")), "{group}");
    machine.is("/etc/cicada", (0, broker.1), 0o750);
    machine.is("/etc/cicada/federation.toml", (0, broker.1), 0o640);
    machine.is("/etc/cicada/xmpp.password", broker, 0o600);
    machine.is("/var/lib/cicada", broker, 0o700);
    machine.is("/var/cache/cicada-build", (0, 0), 0o700);
    machine.is("/usr/local/bin/cicada", (0, 0), 0o755);
    for unit in ["cicada.service", "cicada-guests.service"] {
        machine.is(&format!("/usr/local/lib/systemd/system/{unit}"), (0, 0), 0o644);
    }
    // The user itself, and each of the files and directories, was told.
    assert!(objects(&made["changes"]).len() >= 12, "{made}");
    let next = made["next"].to_string();
    for step in ["REQUIRED", "/etc/cicada/xmpp.password", "config check --online", "systemctl enable --now"] {
        assert!(next.contains(step), "{next}");
    }

    let after = all_of(machine.0.path());
    assert_eq!(machine.setup()["changes"], serde_json::json!([]));
    assert!(all_of(machine.0.path()) == after);
}

#[test]
fn what_root_left_is_put_right_and_no_content_is_touched() {
    let Some(machine) = Machine::new() else { return };
    machine.setup();
    let broker = machine.broker();
    // As editors of root's and commands run by it leave things.
    let rewrite = |path: &str, text: &str, mode: u32| {
        let path = machine.path(path);
        let _ = fs::remove_file(&path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    };
    let config = "[cloud]\nname = \"a\"\n[xmpp]\njid = \"a@x.org\"\npassword_file = \"/etc/cicada/xmpp.password\"\n\
                  room = \"f@rooms.x.org\"\n";
    rewrite("/etc/cicada/federation.toml", config, 0o600);
    rewrite("/etc/cicada/xmpp.password", "secret\n", 0o600);
    rewrite("/var/lib/cicada/identity.key", "key", 0o600);
    rewrite("/var/lib/cicada/repository/packs/aa", "pack", 0o600);
    let mended = machine.setup();
    machine.is("/etc/cicada/federation.toml", (0, broker.1), 0o640);
    machine.is("/etc/cicada/xmpp.password", broker, 0o600);
    for path in ["identity.key", "repository", "repository/packs", "repository/packs/aa"] {
        let meta = fs::metadata(machine.path(&format!("/var/lib/cicada/{path}"))).unwrap();
        assert_eq!((meta.uid(), meta.gid()), broker, "{path}");
    }
    assert_eq!(fs::read_to_string(machine.path("/etc/cicada/federation.toml")).unwrap(), config);
    assert_eq!(fs::read_to_string(machine.path("/etc/cicada/xmpp.password")).unwrap(), "secret\n");
    let next = mended["next"].to_string();
    assert!(!next.contains("REQUIRED") && !next.contains("write the account's"), "{next}");
    assert_eq!(machine.setup()["changes"], serde_json::json!([]));
}

/// The data directory is the broker's, who may have put anything there for root to stumble over.
#[test]
fn nothing_outside_is_given_away() {
    let Some(machine) = Machine::new() else { return };
    machine.setup();
    let outside = machine.path("/etc/shadow");
    fs::write(&outside, "secret").unwrap();
    fs::create_dir(machine.path("/srv")).unwrap();
    fs::write(machine.path("/srv/file"), "").unwrap();
    symlink(&outside, machine.path("/var/lib/cicada/link")).unwrap();
    symlink(machine.path("/srv"), machine.path("/var/lib/cicada/dir")).unwrap();
    fs::hard_link(&outside, machine.path("/var/lib/cicada/hard")).unwrap();
    machine.setup();
    for path in ["/etc/shadow", "/srv", "/srv/file"] {
        assert_eq!(fs::metadata(machine.path(path)).unwrap().uid(), 0, "{path}");
    }
    // And what is in the place of the password is no other file.
    let password = machine.path("/etc/cicada/xmpp.password");
    fs::remove_file(&password).unwrap();
    symlink(&outside, &password).unwrap();
    let kept = machine.setup();
    assert_eq!(objects(&kept["kept"]), ["/etc/cicada/xmpp.password"]);
    fs::remove_file(&password).unwrap();
    fs::hard_link(&outside, &password).unwrap();
    let (code, _, err) = machine.cicada(&[]);
    assert!(code != 0 && err.contains("xmpp.password"), "{code} {err}");
    assert_eq!(fs::metadata(&outside).unwrap().uid(), 0);
}

#[test]
fn an_operators_units_are_left_and_an_earlier_version_of_ours_is_replaced() {
    let Some(machine) = Machine::new() else { return };
    machine.setup();
    let unit = machine.path("/usr/local/lib/systemd/system/cicada.service");
    let ours = fs::read_to_string(&unit).unwrap();
    let changed = ours.replace("TimeoutStopSec=30", "TimeoutStopSec=31");
    fs::write(&unit, &changed).unwrap();
    let own = machine.path("/etc/systemd/system/cicada-guests.service");
    fs::create_dir_all(own.parent().unwrap()).unwrap();
    fs::write(&own, "[Service]\n").unwrap();
    let kept = machine.setup();
    assert_eq!(objects(&kept["changes"]), [""; 0]);
    assert_eq!(objects(&kept["kept"]).len(), 2, "{kept}");
    assert_eq!(
        (fs::read_to_string(&unit).unwrap(), fs::read_to_string(&own).unwrap()),
        (changed, "[Service]\n".into())
    );
    fs::remove_file(&unit).unwrap();
    assert!(objects(&machine.setup()["changes"]).contains(&"/usr/local/lib/systemd/system/cicada.service"));
    assert_eq!(fs::read_to_string(&unit).unwrap(), ours);
}

#[test]
fn other_places_of_the_configuration_are_made_and_the_unit_may_write_there() {
    let Some(machine) = Machine::new() else { return };
    machine.setup();
    let config = "[cloud]\nname = \"a\"\ndata_dir = \"/srv/cicada\"\n[xmpp]\njid = \"a@x.org\"\n\
                  password_file = \"/srv/secret\"\nroom = \"f@rooms.x.org\"\n";
    fs::create_dir(machine.path("/srv")).unwrap();
    fs::write(machine.path("/etc/cicada/federation.toml"), config).unwrap();
    fs::write(machine.path("/srv/secret"), "secret").unwrap();
    machine.setup();
    let broker = machine.broker();
    machine.is("/srv/cicada", broker, 0o700);
    machine.is("/srv/secret", broker, 0o600);
    let added = machine.path("/usr/local/lib/systemd/system/cicada.service.d/places.conf");
    assert!(fs::read_to_string(added).unwrap().ends_with("ReadWritePaths=/srv/cicada\n"));
    assert_eq!(machine.setup()["changes"], serde_json::json!([]));
}

#[test]
fn only_root_sets_up_and_what_is_in_the_way_is_named() {
    let Some(machine) = Machine::new() else { return };
    // Where others can run it.
    let program = machine.0.path().join("cicada");
    fs::copy(env!("CARGO_BIN_EXE_cicada"), &program).unwrap();
    fs::set_permissions(machine.0.path(), Permissions::from_mode(0o755)).unwrap();
    let as_nobody = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&program)
            .args(["setup", "--root"]);
        command.arg(machine.0.path()).args(arguments).output().unwrap()
    };
    let refused = as_nobody(&[]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        refused.status.code() == Some(6) && said.contains("needs root") && said.contains("sudo"),
        "{said}"
    );
    assert!(as_nobody(&["--dry-run"]).status.success());

    fs::create_dir_all(machine.path("/var/lib")).unwrap();
    fs::write(machine.path("/var/lib/cicada"), "").unwrap();
    let (code, _, err) = machine.cicada(&[]);
    assert!(code == 4 && err.contains("/var/lib/cicada"), "{code} {err}");
    // Before anything was done.
    assert!(!machine.path("/etc/cicada").exists() && !machine.path("/usr").exists());
}
