//! What commands say when they are given what they cannot use: which object, why, what next, and the exit code
//! that goes with it. No broker runs.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

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

/// A directory with a good configuration and no broker.
fn cloud() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = "[cloud]\nname = \"cloud-a\"\ndata_dir = \"data\"\n[xmpp]\njid = \"a@example.org\"\n\
                password_file = \"password\"\nroom = \"fed@rooms.example.org\"\n";
    std::fs::write(dir.path().join("federation.toml"), text).unwrap();
    let password = dir.path().join("password");
    std::fs::write(&password, "secret\n").unwrap();
    std::fs::set_permissions(&password, std::fs::Permissions::from_mode(0o600)).unwrap();
    dir
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
        // A file whose content is not all there is told of by its name.
        assert!(
            code == 8 || (code == 2 && err.contains("ends before its content")),
            "{cut} {keep}: {code} {err}"
        );
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
    let (code, _, err) = run(here, &["component", "remove", "os@1"]);
    assert_eq!(code, 4, "{err}");
    assert!(err.contains("hint: delete the VMs made of it, then `cicada repo gc`"), "{err}");
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
