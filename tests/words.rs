//! What commands say when they are given what they cannot use: which object, why, what next, and the exit code
//! that goes with it. No broker runs, but one that reaches nobody.

#[path = "support/offline.rs"]
mod offline;

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use cicada::repository::{RefKind, Repository};
use offline::cloud;

fn run(dir: &Path, args: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cicada"));
    for name in ["CICADA_CONFIG", "CICADA_SOCKET", "CICADA_LOG"] {
        command.env_remove(name);
    }
    let Output { status, stdout, stderr } =
        command.env("NO_COLOR", "1").current_dir(dir).args(args).stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

fn tree(dir: &Path, name: &str, path: &str, text: &str) -> String {
    let root = dir.join(name);
    let file = root.join(path);
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(file, text).unwrap();
    root.to_str().unwrap().to_owned()
}

fn import(dir: &Path, source: &str, name: &str, kind: &str) -> (i32, String, String) {
    run(dir, &["component", "import", source, "--name", name, "--version", "1", "--kind", kind])
}

/// The smallest things that make a disk.
fn components(dir: &Path) {
    for (name, kind, path) in [
        ("fmt", "format", "boot/efi/EFI/BOOT/BOOTX64.EFI"),
        ("os", "os", "etc/os-release"),
        ("k", "kernel", "boot/vmlinuz"),
    ] {
        let (code, _, err) = import(dir, &tree(dir, name, path, name), name, kind);
        assert_eq!(code, 0, "{err}");
    }
}

const RECIPE: [&str; 8] = ["recipe", "create", "--component", "fmt", "--component", "os", "--component", "k"];

#[test]
fn paths_that_are_not_there_are_not_found_and_cut_archives_are_damaged() {
    let dir = cloud();
    let here = dir.path();
    for args in [
        &["repo", "import", "nowhere.tar"][..],
        &["component", "import", "nowhere", "--name", "n", "--version", "1"],
        &["component", "build", "nowhere.toml"],
        &["receipt", "verify", "nowhere"],
        &["man", "/proc/nowhere/pages"],
        &["federation", "list", "--owner-jid", "o@example.org", "--owner-password-file", "nowhere"],
    ] {
        let (code, _, err) = run(here, args);
        assert_eq!(code, 3, "{args:?}: {err}");
        assert!(err.contains("nowhere") && err.contains("hint: "), "{args:?}: {err}");
    }
    let source = tree(here, "t", "opt/t", &"x".repeat(5000));
    let tar = |name: &str, more: &[&str]| {
        let done =
            Command::new("tar").current_dir(here).args(more).args(["-C", &source, "-cf", name, "."]).status();
        assert!(done.unwrap().success());
    };
    tar("whole.tar", &[]);
    tar("whole.tar.zst", &["--zstd"]);
    for (whole, keep) in [("whole.tar", 700), ("whole.tar", 3000), ("whole.tar.zst", 60)] {
        let bytes = std::fs::read(here.join(whole)).unwrap();
        let cut = format!("cut-{whole}");
        std::fs::write(here.join(&cut), &bytes[..keep]).unwrap();
        let (code, _, err) = import(here, &cut, "t", "program");
        assert_eq!(code, 8, "{cut} {keep}: {err}");
    }
}

#[test]
fn an_output_is_never_written_over_what_is_there() {
    let dir = cloud();
    let here = dir.path();
    components(here);
    let (code, out, err) = run(here, &[&RECIPE[..], &["--root-size", "256M", "--json"]].concat());
    assert_eq!(code, 0, "{err}");
    let recipe = serde_json::from_str::<serde_json::Value>(&out).unwrap()["id"].as_str().unwrap().to_owned();
    std::fs::write(here.join("mine"), "precious").unwrap();
    for format in ["raw", "qcow2"] {
        let (code, _, err) = run(here, &["compose", &recipe, "-o", "mine", "--format", format]);
        assert_eq!((code, err.contains("is there already: name another file")), (4, true), "{err}");
        let (code, _, err) = run(here, &["compose", &recipe, "-o", ".", "--format", format]);
        assert_eq!((code, err.contains("is a directory: name a file in it")), (4, true), "{err}");
        let (code, _, err) = run(here, &["compose", &recipe, "-o", "/dev/null", "--format", format]);
        assert_eq!((code, err.contains("is a device") && !err.contains("remove")), (4, true), "{err}");
        let (code, _, err) = run(here, &["compose", &recipe, "-o", "no/where", "--format", format]);
        assert_eq!(code, 3, "{err}");
        let new = format!("new.{format}");
        let (code, _, err) = run(here, &["compose", &recipe, "-o", &new, "--format", format]);
        assert_eq!((code, here.join(new).exists()), (0, true), "{err}");
    }
    assert_eq!(std::fs::read(here.join("mine")).unwrap(), b"precious");

    // A component that a composition was made of: what keeps it, and how that goes away.
    let repository = Repository::open_or_create(&here.join("data/repository")).unwrap();
    // As a move notes it, to tell what copying the whole disk would have cost.
    repository.set_ref(RefKind::Composition, &recipe, b"[1,1]").unwrap();
    drop(repository);
    let (code, _, err) = run(here, &["component", "remove", "os@1"]);
    assert_eq!(code, 4, "{err}");
    assert!(err.contains("hint: delete the VMs made of it, and run `cicada repo gc`"), "{err}");
    let (code, _, err) = run(here, &["repo", "gc"]);
    assert_eq!(code, 0, "{err}");
    assert_eq!(run(here, &["component", "remove", "os@1"]).0, 4, "within the grace period");
    let (code, _, err) = run(here, &["--set", "repository.gc_grace=0s", "repo", "gc"]);
    assert_eq!(code, 0, "{err}");
    let (code, _, err) = run(here, &["component", "remove", "os@1"]);
    assert_eq!(code, 0, "{err}");
}

#[test]
fn a_root_disk_that_is_too_small_is_told_the_size_that_does() {
    let dir = cloud();
    components(dir.path());
    let create = |size: &str| run(dir.path(), &[&RECIPE[..], &["--root-size", size]].concat());
    let (code, _, err) = create("10M");
    assert_eq!(code, 2, "{err}");
    let size = err.lines().find_map(|l| l.strip_prefix("hint: --root-size ")).unwrap().to_owned();
    let (code, _, err) = create(&size);
    assert_eq!(code, 0, "{size}: {err}");
    let smaller = format!("{}M", size.trim_end_matches('M').parse::<u64>().unwrap() - 1);
    let (code, _, err) = create(&smaller);
    assert_eq!((code, err.contains(&format!("--root-size {size}"))), (2, true), "{smaller}: {err}");
}

#[test]
fn addresses_are_checked_before_they_are_looked_up() {
    let dir = cloud();
    let check = |setting: &str| run(dir.path(), &["--set", setting, "config", "check"]);
    for good in ["xmpp.server=[::1]:5223", "xmpp.server=x.example.org:5223", "transfer.advertise=2001:db8::1"]
    {
        assert_eq!(check(good).0, 0, "{good}: {}", check(good).2);
    }
    for bad in [
        "xmpp.server=::1",
        "xmpp.server=2001:db8::1",
        "xmpp.server=[::1]",
        "xmpp.server=x.example.org",
        "xmpp.server=192.0.2.300:5223",
        "transfer.advertise=x.example.org:99999",
        "transfer.advertise=[2001:db8::1",
    ] {
        let (code, _, err) = check(bad);
        assert_eq!((code, err.contains("hint: write for example")), (2, true), "{bad}: {err}");
    }
    // The session dials the address in brackets: it comes to a port where nobody listens, not to a lookup.
    let (code, _, err) = run(dir.path(), &["--set", "xmpp.server=[::1]:1", "federation", "list"]);
    assert_eq!(code, 7, "{err}");
    assert!(err.contains("[::1]:1") && !err.contains("lookup"), "{err}");
    // One line of error, one hint, and no line of a log beside them.
    assert_eq!(
        err.lines().map(|l| l.split(':').next().unwrap()).collect::<Vec<_>>(),
        ["error", "hint"],
        "{err}"
    );
}

#[test]
fn the_sample_announces_nothing_that_nobody_set() {
    let dir = cloud();
    let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/federation.toml");
    let (code, out, err) = run(dir.path(), &["--config", sample, "config", "show", "--json"]);
    assert_eq!(code, 0, "{err}");
    let value: serde_json::Value = serde_json::from_str(&out).unwrap();
    for field in ["region", "carbon_g_per_kwh", "price_per_hour"] {
        let value = &value["cloud"][field];
        assert!(value.is_null() || value == "", "{field}: {value}");
    }
}

#[test]
fn a_path_that_is_too_long_is_not_one_of_too_many() {
    let dir = cloud();
    let root = dir.path().join("deep");
    std::fs::create_dir(&root).unwrap();
    // Step by step: no call takes such a path.
    let steps = "for i in $(seq 20); do mkdir \"$0\" && cd \"$0\" || exit 1; done; : >f";
    let made = Command::new("bash").current_dir(&root).args(["-c", steps, &"x".repeat(250)]).status();
    assert!(made.unwrap().success());
    let (code, _, err) = import(dir.path(), root.to_str().unwrap(), "deep", "program");
    assert_eq!((code, err.contains("is too long, 4095 are possible")), (5, true), "{err}");
}

/// A hint that is a command can be run as it is printed.
#[test]
fn what_keeps_a_component_is_removed_by_the_command_that_the_hint_says() {
    let dir = cloud();
    let here = dir.path();
    components(here);
    let (code, _, err) = run(
        here,
        &[
            "component",
            "import",
            &tree(here, "p", "opt/p", "p"),
            "--name",
            "p",
            "--version",
            "1",
            "--requires",
            "os",
        ],
    );
    assert_eq!(code, 0, "{err}");
    let (code, _, err) = run(here, &["component", "remove", "os"]);
    assert_eq!(code, 4, "{err}");
    let hint = err.lines().find_map(|l| l.strip_prefix("hint: ")).unwrap();
    let command: Vec<&str> = hint.split_once("cicada ").unwrap().1.split(' ').collect();
    let (code, _, err) = run(here, &command);
    assert_eq!(code, 0, "{command:?}: {err}");
    let (code, _, err) = run(here, &["component", "remove", "os"]);
    assert_eq!(code, 0, "{err}");
}

/// Pages as man(1) shows them, and the configuration's of the annotated sample.
#[test]
fn manual_pages_have_examples_files_and_the_configuration() {
    let dir = cloud();
    assert_eq!(run(dir.path(), &["man", "pages"]).0, 0);
    let page = |name: &str| std::fs::read_to_string(dir.path().join("pages").join(name)).unwrap();
    let adopt = page("cicada-vm-adopt.1");
    for part in [".SH EXAMPLES", "cicada vm adopt old old.qcow2", ".SH FILES", ".SH SEE ALSO", "disk\\-bus"] {
        assert!(adopt.contains(part), "{part}: {adopt}");
    }
    assert!(page("cicada.1").contains("cicada\\-vm(1)") && page("cicada.1").contains("Exit codes"));
    let configuration = page("federation.toml.5");
    let sample = include_str!("../federation.toml");
    let setting = |line: &&str| {
        line.split_once(" = ").is_some_and(|(key, _)| {
            key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_' || b.is_ascii_digit())
        })
    };
    let settings: Vec<&str> =
        sample.lines().map(|l| l.trim_start_matches(['#', ' '])).filter(setting).collect();
    assert!(settings.len() > 40, "{}", settings.len());
    for setting in settings {
        let key = setting.split(' ').next().unwrap();
        assert!(configuration.contains(&format!(".B {key} = ")), "{key}: {configuration}");
    }
    if !Path::new("/usr/bin/man").exists() && Command::new("man").arg("--version").output().is_err() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: not installed: man (package man-db)");
        return;
    }
    for name in ["cicada.1", "cicada-vm-adopt.1", "federation.toml.5"] {
        let shown = Command::new("man")
            .env("MANWIDTH", "80")
            .env("LC_ALL", "C.UTF-8")
            .args(["--warnings", "-l"])
            .arg(dir.path().join("pages").join(name))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&shown.stderr);
        assert!(shown.status.success() && said.is_empty(), "{name}: {said}");
        assert!(!shown.stdout.is_empty(), "{name}");
    }
}

/// What root makes in another user's cloud, that user's broker could not read.
#[test]
fn root_does_not_work_for_another_users_cloud() {
    use std::io::Write as _;
    use std::os::unix::fs::chown;
    if !rustix::process::geteuid().is_root() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: giving files to another user needs root");
        return;
    }
    let nobody = Some(65534);
    let dir = cloud();
    let (here, data) = (dir.path(), dir.path().join("data"));
    chown(here.join("password"), nobody, nobody).unwrap();
    let commands: [&[&str]; 5] = [
        &["identity", "show"],
        &["identity", "rotate"],
        &["config", "check"],
        &["component", "list"],
        &["broker"],
    ];
    for args in commands {
        let (code, _, err) = run(here, args);
        assert_eq!((code, err.contains("runuser -u nobody -- cicada")), (6, true), "{args:?}: {err}");
        assert!(!data.exists(), "{args:?} made something");
    }
    std::fs::create_dir(&data).unwrap();
    let (code, _, err) = run(here, &["identity", "show"]);
    assert_eq!((code, err.contains("chown -R nobody: ")), (6, true), "{err}");
    chown(&data, nobody, nobody).unwrap();
    std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o700)).unwrap();
    for args in commands {
        let (code, _, err) = run(here, args);
        assert_eq!((code, err.contains("runuser -u nobody -- cicada")), (6, true), "{args:?}: {err}");
    }
    assert_eq!(std::fs::read_dir(&data).unwrap().count(), 0);
    chown(here.join("password"), Some(0), Some(0)).unwrap();
    chown(&data, Some(0), Some(0)).unwrap();
    // A password that root wrote says nothing of whose cloud it is; whom the configuration is readable for does.
    let daemons_group = Some(1);
    chown(here.join("federation.toml"), Some(0), daemons_group).unwrap();
    for args in commands {
        let (code, _, err) = run(here, args);
        assert_eq!((code, err.contains("runuser -u daemon -- cicada")), (6, true), "{args:?}: {err}");
    }
    assert_eq!(std::fs::read_dir(&data).unwrap().count(), 0);
    chown(here.join("federation.toml"), Some(0), Some(0)).unwrap();
    assert_eq!(run(here, &["identity", "show"]).0, 0);
}

/// An error names the file that it is about.
#[test]
fn a_broker_that_cannot_read_its_password_says_which_file_that_is() {
    let dir = cloud();
    std::fs::remove_file(dir.path().join("password")).unwrap();
    let (code, _, err) = run(dir.path(), &["broker"]);
    assert_eq!(code, 10, "{err}");
    let path = dir.path().canonicalize().unwrap().join("password");
    assert!(err.contains(path.to_str().unwrap()) && err.contains("hint: create "), "{err}");
}

#[test]
fn what_a_broker_needs_is_tried_and_each_fault_named() {
    let dir = cloud();
    let settings = [
        "--set",
        "xmpp.server=127.0.0.1:1",
        "--set",
        "transfer.listen=192.0.2.9:1",
        "--set",
        "transfer.advertise=nowhere.invalid",
    ];
    let check =
        |more: &[&str]| run(dir.path(), &[&settings[..], &["config", "check", "--online"], more].concat());
    let (code, out, err) = check(&[]);
    assert_eq!(code, 7, "{out}{err}");
    for fault in ["xmpp-server", "transfer-port", "transfer-addresses"] {
        let line = out.lines().find(|l| l.starts_with(fault)).unwrap_or_else(|| panic!("{fault}: {out}"));
        assert!(line.contains("fault"), "{line}");
    }
    assert!(
        err.contains("[xmpp] server, security and ca_file") && err.contains("set transfer.listen"),
        "{err}"
    );
    let (code, out, _) = check(&["--json"]);
    let value: serde_json::Value = serde_json::from_str(&out).expect("one value");
    assert_eq!((code, value["good"].as_bool()), (7, Some(false)));
    let faults = value["checks"].as_array().unwrap().iter().filter(|c| !c["problem"].is_null()).count();
    assert!(faults >= 3, "{out}");
}

/// Nobody is seen by a broker whose own link is down, and that is not the others' fault.
#[test]
fn a_broker_without_its_server_says_that_the_link_is_its_own() {
    let dir = cloud();
    let mut command = Command::new(env!("CARGO_BIN_EXE_cicada"));
    command.current_dir(dir.path()).env("CICADA_CONFIG", "federation.toml");
    command.args(["--set", "xmpp.server=127.0.0.1:1", "--set", "transfer.listen=127.0.0.1:0", "broker"]);
    let mut broker =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let begun = std::time::Instant::now();
    while run(dir.path(), &["status"]).0 != 0 {
        if broker.try_wait().unwrap().is_some() {
            let said = std::io::read_to_string(broker.stderr.take().unwrap()).unwrap();
            assert!(said.contains("error: hypervisor"), "{said}");
            drop(writeln!(std::io::stderr(), "SKIPPED: no broker without QEMU (qemu-system-x86)"));
            return;
        }
        assert!(begun.elapsed().as_secs() < 60);
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let said = [&["members"][..], &["identity", "list"]].map(|args| run(dir.path(), args).2);
    broker.kill().unwrap();
    broker.wait().unwrap();
    for err in said {
        assert!(err.contains("this broker is not in the room itself"), "{err}");
    }
}

/// Every command that a hint, an error or a help text names is one: a hint that leads nowhere is worse than none.
#[test]
fn commands_that_texts_name_are_there() {
    use clap::CommandFactory;
    let root = cicada::cli::Cli::command();
    let mut todo = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    let named = regex::Regex::new(r"(?:'|`|: )cicada ([a-z-]+)(?: ([a-z-]+))?").unwrap();
    let (mut seen, mut wrong) = (0, Vec::new());
    while let Some(dir) = todo.pop() {
        for path in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
            if path.is_dir() {
                todo.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            for line in text
                .lines()
                .filter(|l| path.extension().is_some_and(|e| e == "rs") && !l.trim().starts_with("//"))
            {
                for found in named.captures_iter(line) {
                    seen += 1;
                    let command = root.find_subcommand(&found[1]);
                    let has_subcommands = command.is_some_and(clap::Command::has_subcommands);
                    let sub = found.get(2).map(|sub| sub.as_str());
                    let is_there = match (command, sub) {
                        (None, _) => false,
                        (Some(command), Some(sub)) if has_subcommands => {
                            command.find_subcommand(sub).is_some()
                        }
                        _ => true,
                    };
                    if !is_there {
                        wrong.push(format!("{}: {}", path.display(), &found[0]));
                    }
                }
            }
        }
    }
    assert!(seen > 50 && wrong.is_empty(), "{seen} {wrong:#?}");
}
