//! The binary as operators and scripts use it: texts, tables, exit codes, signals. The broker is a
//! service made for the test behind the real API; repositories are real.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use cicada::api::Service;
use cicada::compose::Composer;
use cicada::interface::ObjectKind;
use cicada::interface::{Event, MoveRequest, Reply, Request, VmRequest};
use cicada::interface::{Problem, ProblemKind};
use cicada::migration::Evidence;
use cicada::migration::handover::HandOver;
use cicada::repository::Repository;
use cicada::runner::content::catalogue;
use cicada::types::{Hash, IdentityKey};
use clap::CommandFactory;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc, watch};

const MIGRATION: &str = "11111111-2222-4333-8444-555555555555";
const VM: &str = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee";

fn cicada() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cicada"));
    for name in ["CICADA_CONFIG", "CICADA_SOCKET", "CICADA_LOG"] {
        command.env_remove(name);
    }
    command.env("NO_COLOR", "1");
    command
}

fn run(dir: &Path, args: &[&str]) -> Output {
    cicada().current_dir(dir).args(args).stdin(Stdio::null()).output().unwrap()
}

fn stdout(o: &Output) -> String {
    String::from_utf8(o.stdout.clone()).unwrap()
}
fn stderr(o: &Output) -> String {
    String::from_utf8(o.stderr.clone()).unwrap()
}

/// A directory with a good configuration and no broker.
fn cloud() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = r#"
        [cloud]
        name = "cloud-a"
        data_dir = "data"
        [xmpp]
        jid = "a@example.org"
        password_file = "password"
        room = "fed@rooms.example.org"
    "#;
    std::fs::write(dir.path().join("federation.toml"), text).unwrap();
    let password = dir.path().join("password");
    std::fs::write(&password, "secret\n").unwrap();
    std::fs::set_permissions(&password, std::fs::Permissions::from_mode(0o600)).unwrap();
    dir
}

#[test]
fn every_subcommand_explains_itself() {
    fn walk(command: &clap::Command, path: &mut Vec<String>, out: &mut Vec<Vec<String>>) {
        out.push(path.clone());
        for sub in command.get_subcommands().filter(|s| s.get_name() != "help") {
            path.push(sub.get_name().to_owned());
            walk(sub, path, out);
            path.pop();
        }
    }
    let mut paths = Vec::new();
    walk(&cicada::cli::Cli::command(), &mut Vec::new(), &mut paths);
    assert!(paths.len() > 40, "{}", paths.len());
    for path in paths {
        let o = cicada().args(&path).arg("--help").output().unwrap();
        assert_eq!(o.status.code(), Some(0), "{path:?}");
        assert!(stdout(&o).contains("Usage: cicada"), "{path:?}");
        assert_eq!(stderr(&o), "", "{path:?}");
    }
}

#[test]
fn wrong_command_lines_exit_with_2() {
    let dir = cloud();
    for args in [
        &["fly"][..],
        &["vm", "list", "--no-such-flag"],
        &["vm", "create", "web"],
        &["vm", "create", "Web!", "--component", "x"],
        &["vm", "create", "web", "--component", "x", "--memory", "much"],
        &["vm", "stop", "web", "--timeout", "soon"],
        &["vm", "adopt", "web"],
        &["vm", "adopt", "web", "disk", "--format", "iso"],
        &["vm", "adopt", "web", "disk", "--firmware", "coreboot"],
        &["vm", "adopt", "web", "disk", "--dry-run", "--start"],
        &["vm", "export", "web", "disk", "--format", "auto"],
        &["vm", "console", "web", "--expect-regex", "("],
        &["vm", "console", "web", "--send", r"\q"],
        &["identity", "trust", "nobody", "key"],
        &["compose", "abcdef", "-o", "x", "--format", "iso"],
        &["--set", "nonsense", "status"],
        &["--quiet", "--verbose", "status"],
        &["--log", "no=such=filter", "status"],
        &["federation", "list", "--owner-jid", "o@example.org"],
    ] {
        let o = run(dir.path(), args);
        assert_eq!(o.status.code(), Some(2), "{args:?}: {}", stderr(&o));
        assert_eq!(stdout(&o), "", "{args:?}");
        assert!(stderr(&o).starts_with("error: "), "{args:?}: {}", stderr(&o));
    }
}

#[test]
fn without_a_broker_commands_say_how_to_start_it() {
    let dir = cloud();
    let socket = dir.path().join("data/cicada.sock");
    let expected = format!(
        "error: broker at {}: is not running\nhint: start it with: cicada broker\n",
        socket.display()
    );
    for args in [
        &["status"][..],
        &["members"],
        &["vm", "list", "--json"],
        &["vm", "create", "web", "--component", "x"],
        &["vm", "adopt", "web", "disk"],
        &["vm", "export", "web", "disk"],
        &["plan", "web"],
        &["move", "web"],
        &["migration", "list"],
        &["identity", "revoke", "b@example.org"],
    ] {
        let o = run(dir.path(), args);
        assert_eq!((o.status.code(), stderr(&o)), (Some(7), expected.clone()), "{args:?}");
        if args.contains(&"--json") {
            let end: Value = serde_json::from_str(&stdout(&o)).unwrap();
            assert_eq!(end["problem"]["kind"], "unavailable", "{args:?}");
        } else {
            assert_eq!(stdout(&o), "", "{args:?}");
        }
    }
}

#[test]
fn configuration_mistakes_are_named_once() {
    let dir = cloud();
    let path = dir.path().canonicalize().unwrap();
    let check = |args: &[&str]| {
        let o = run(&path, &[args, &["config", "check"]].concat());
        (o.status.code().unwrap(), stderr(&o).replace(&format!("{}/", path.display()), ""))
    };
    let o = run(&path, &["config", "check"]);
    assert!(stdout(&o).ends_with(": good\n") && stdout(&o).contains("starts a VM"), "{o:?}");
    assert_eq!(
        check(&["--set", "xmpp.rom=x"]),
        (
            2,
            "error: xmpp.rom in the command line: is not a known setting\nhint: did you mean 'room'?\n"
                .into()
        )
    );
    assert_eq!(
        check(&["--config", "none.toml"]),
        (
            10,
            "error: none.toml: cannot be read: No such file or directory (os error 2)\n\
             hint: create none.toml or correct the setting that names it\n"
                .into()
        )
    );
    std::fs::set_permissions(path.join("password"), std::fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(
        check(&[]),
        (6, "error: password: can be read by others (mode 644)\nhint: chmod 600 password\n".into())
    );
    std::fs::remove_file(path.join("federation.toml")).unwrap();
    let (code, text) = check(&[]);
    assert_eq!(code, 10);
    assert!(
        text.starts_with("error: configuration file: there is none at federation.toml or /etc/cicada"),
        "{text}"
    );
}

#[test]
fn config_show_prints_what_is_in_effect_and_can_be_read_again() {
    let dir = cloud();
    let o = cicada()
        .current_dir(dir.path())
        .env("CICADA_MIGRATION__LEASE_S", "30")
        .args(["--set", "cloud.region=north", "config", "show"])
        .output()
        .unwrap();
    let table: toml::Table = stdout(&o).parse().unwrap();
    assert_eq!(table["migration"]["lease_s"].as_integer(), Some(30));
    assert_eq!(table["cloud"]["region"].as_str(), Some("north"));
    let o = run(dir.path(), &["config", "show", "--json"]);
    let value: Value = serde_json::from_str(&stdout(&o)).unwrap();
    assert_eq!(value["xmpp"]["security"], "direct-tls");
}

#[test]
fn the_identity_is_stable_and_private() {
    let dir = cloud();
    let show =
        || serde_json::from_str::<Value>(&stdout(&run(dir.path(), &["identity", "show", "--json"]))).unwrap();
    let first = show();
    assert_eq!(first["member"], "a@example.org");
    assert_eq!(show(), first);
    let key = dir.path().join("data/identity.key");
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_receipt_is_checked_without_a_broker_and_by_the_keys_at_hand() {
    let dir = tempfile::tempdir().unwrap();
    let keys = [1, 2].map(|n| IdentityKey::from_secret_bytes(&[n; 32]));
    let hand_over = HandOver {
        vm: VM.parse().unwrap(),
        migration: MIGRATION.parse().unwrap(),
        epoch: 7,
        source: "a@example.org".parse().unwrap(),
        source_key: keys[0].public(),
        target: "b@example.org".parse().unwrap(),
        target_key: keys[1].public(),
        recipe: cicada::types::RecipeId::of(b"recipe"),
        root_delta: cicada::types::MapId::of(b"delta"),
        user_data: cicada::types::MapId::of(b"data"),
        issued: cicada::clock::UnixMillis(1_700_000_000_000),
        provenance: None,
    };
    let mut evidence = Evidence::from(hand_over.sign(&keys[0]).give_back(&keys[1]));
    evidence.remarks.push("\u{1b}[2Jhello".into());
    let json = serde_json::to_vec(&evidence).unwrap();
    let verify = |more: &[&str]| {
        let o = run_with_input(dir.path(), &[&["receipt", "verify", "-"], more].concat(), &json);
        (o.status.code(), stdout(&o), stderr(&o))
    };
    let (code, out, err) = verify(&[]);
    assert_eq!(code, Some(0), "{err}");
    assert!(
        out.contains("return: the target never ran the VM") && out.contains("2023-11-14 22:13:20 UTC"),
        "{out}"
    );
    assert!(!out.contains('\u{1b}') && out.contains("[2Jhello"), "a remark reaches the terminal as it is");
    assert_eq!((out.matches("NOT KNOWN").count(), err.matches("WARNING").count()), (2, 2), "{out}{err}");
    let [a, b] = keys.map(|k| k.public().to_string());
    let (code, out, err) = verify(&["--source-key", &a, "--target-key", &b]);
    assert_eq!((code, err.as_str(), out.matches("the key given").count()), (Some(0), "", 2), "{out}");
    assert_eq!(verify(&["--target-key", &a]).0, Some(8));

    // With a configuration, its keys are the ones that count.
    std::fs::write(dir.path().join("password"), "x").unwrap();
    let pinned = |key: &str| {
        let text = format!(
            "[cloud]\nname = \"cloud-c\"\ndata_dir = \"data\"\n[xmpp]\njid = \"c@example.org\"\n\
             password_file = \"password\"\nroom = \"fed@rooms.example.org\"\n\
             [trust]\npinned = [{{ jid = \"a@example.org\", key = \"{key}\" }}]\n"
        );
        std::fs::write(dir.path().join("federation.toml"), text).unwrap();
        verify(&[])
    };
    let (code, out, err) = pinned(&a);
    assert_eq!((code, out.matches("a key trusted here").count()), (Some(0), 1), "{out}{err}");
    let (code, _, err) = pinned(&b);
    assert_eq!(code, Some(8));
    assert!(err.contains("not the one trusted here"), "{err}");
    assert!(!dir.path().join("data").exists(), "a check left something behind");
}

#[test]
fn completions_and_manual_pages_are_made() {
    let dir = cloud();
    for shell in ["bash", "zsh", "fish"] {
        let o = run(dir.path(), &["completions", shell]);
        assert!(o.status.success() && stdout(&o).contains("rebuild-index"), "{shell}");
        assert!(stdout(&o).contains("cicada complete-names"), "{shell}");
    }
    // Without a broker there is nothing to name, and nothing is said about that.
    let o = run(dir.path(), &["complete-names", "vm"]);
    assert_eq!((o.status.code(), stdout(&o) + &stderr(&o)), (Some(0), String::new()));
    let _broker = TestBroker::start(dir.path());
    assert_eq!(stdout(&run(dir.path(), &["complete-names", "vm"])), "web-1\n");
    // As bash asks for it.
    let script = dir.path().join("completion");
    std::fs::write(&script, run(dir.path(), &["completions", "bash"]).stdout).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_cicada")).parent().unwrap();
    let asks = |words: &str| {
        let asked = format!(
            "PATH={}:$PATH; source ./completion; COMP_WORDS=({words} w); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             _cicada_with_names cicada w \"${{COMP_WORDS[COMP_CWORD-1]}}\"; echo \" ${{COMPREPLY[*]}} \"",
            program.display()
        );
        let o = Command::new("bash").current_dir(dir.path()).args(["-c", &asked]).output().unwrap();
        stdout(&o).contains(" web-1 ")
    };
    for words in ["cicada vm start", "cicada vm console", "cicada plan", "cicada move"] {
        assert!(asks(words), "{words}");
    }
    for words in ["cicada vm create", "cicada vm stop --timeout", "cicada move web-1 --to"] {
        assert!(!asks(words), "{words}");
    }
    assert!(run(dir.path(), &["man", "pages"]).status.success());
    let pages = std::fs::read_dir(dir.path().join("pages")).unwrap().count();
    assert!(pages > 40, "{pages}");
}

/// Writes a small tree that can become a component.
fn tree(dir: &Path, name: &str, text: &str) -> PathBuf {
    let root = dir.join(name);
    std::fs::create_dir_all(root.join("opt/tool")).unwrap();
    std::fs::write(root.join("opt/tool/run"), text).unwrap();
    root
}

fn import(dir: &Path, tree: &Path, version: &str) -> Output {
    let tree = tree.to_str().unwrap();
    run(dir, &["component", "import", tree, "--name", "tool", "--version", version])
}

#[test]
fn what_is_held_without_a_name_is_shown_and_bound() {
    let dir = cloud();
    let here = dir.path();
    assert!(import(here, &tree(here, "one", "first"), "1").status.success());
    assert!(import(here, &tree(here, "two", "second"), "1").status.success());
    let listed = || -> Vec<(String, bool)> {
        let o = run(here, &["component", "list", "--json"]);
        let list: Vec<Value> = serde_json::from_slice(&o.stdout).unwrap();
        let mut all: Vec<_> = list
            .iter()
            .map(|c| (c["id"].as_str().unwrap().to_owned(), c["bound"].as_bool().unwrap()))
            .collect();
        all.sort_by_key(|c| c.1);
        all
    };
    let [(lost, false), (held, true)] = &listed()[..] else { panic!("{:?}", listed()) };
    let o = run(here, &["component", "list"]);
    assert!(stdout(&o).lines().next().unwrap().contains("BOUND"), "{}", stdout(&o));
    // The name has another, and a component's name is its own.
    let o = run(here, &["component", "bind", &lost[..12]]);
    assert_eq!(o.status.code(), Some(4), "{}", stderr(&o));
    assert!(stderr(&o).contains(&held[..10]), "{}", stderr(&o));
    assert_eq!(run(here, &["component", "bind", &lost[..12], "other@1"]).status.code(), Some(2));
    assert_eq!(run(here, &["component", "bind", "0123456789ab"]).status.code(), Some(3));
    assert!(run(here, &["component", "remove", &held[..12]]).status.success());
    assert!(run(here, &["component", "bind", &lost[..12], "tool@1"]).status.success());
    let o = run(here, &["component", "show", "tool@1", "--json"]);
    assert!(stdout(&o).contains(lost.as_str()), "{}", stdout(&o));
}

#[test]
fn an_import_says_what_it_leaves_out_and_what_is_wrong_before_the_work() {
    let dir = cloud();
    let here = dir.path();
    let source = tree(here, "one", "first");
    std::fs::create_dir_all(source.join("var/log")).unwrap();
    std::fs::write(source.join("var/log/x"), "log").unwrap();
    let o = import(here, &source, "1");
    assert!(stderr(&o).contains("left out 1, a log: /var/log/x"), "{}", stderr(&o));
    let path = source.to_str().unwrap();
    let quiet = ["component", "import", path, "--name", "tool", "--version", "1", "--quiet"];
    assert!(stderr(&run(here, &quiet)).contains("/var/log/x"));
    let json = ["component", "import", path, "--name", "tool", "--version", "1", "--json"];
    let said = stdout(&run(here, &json));
    assert!(said.contains(r#"{"event":"left-out","path":"/var/log/x","what":"a log"}"#), "{said}");
    // Whatever else is wrong, the name is found first.
    let o = run(here, &["component", "import", "/nowhere", "--name", "Tool", "--version", "1"]);
    assert_eq!(o.status.code(), Some(2));
    assert!(stderr(&o).contains("'Tool'"), "{}", stderr(&o));
}

#[test]
fn content_is_served_from_the_repository_while_no_broker_runs() {
    let dir = cloud();
    let here = dir.path();
    let one = import(here, &tree(here, "one", "first"), "1");
    assert!(one.status.success(), "{}", stderr(&one));
    assert!(stderr(&one).contains("handed to the repository (no broker runs)"), "{}", stderr(&one));
    assert!(import(here, &tree(here, "two", "second"), "2").status.success());

    let list: Value = serde_json::from_str(&stdout(&run(here, &["component", "list", "--json"]))).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 2);
    assert_eq!(list[0]["name"], "tool");
    let shown = run(here, &["component", "show", "tool@1", "--entries"]);
    assert!(stdout(&shown).contains("opt/tool/run"), "{}{}", stdout(&shown), stderr(&shown));
    let diff = run(here, &["component", "diff", "tool@1", "tool@2"]);
    assert!(
        stdout(&diff).contains("~ /opt/tool/run") || stdout(&diff).contains("~ opt/tool/run"),
        "{}",
        stdout(&diff)
    );
    let none = run(here, &["component", "show", "nothing"]);
    assert_eq!(none.status.code(), Some(3), "{}", stderr(&none));
    assert!(stderr(&none).contains("hint: "), "{}", stderr(&none));

    assert!(run(here, &["repo", "check"]).status.success());
    assert!(run(here, &["component", "remove", "tool@2"]).status.success());
    assert!(run(here, &["repo", "gc", "--dry-run"]).status.success());
    assert!(stdout(&run(here, &["repo", "stats"])).contains("components"));
    assert!(run(here, &["repo", "rebuild-index"]).status.success());

    let packs: Vec<_> = files(&here.join("data/repository")).into_iter().filter(|p| is_pack(p)).collect();
    assert!(!packs.is_empty());
    for pack in &packs {
        let mut bytes = std::fs::read(pack).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::set_permissions(pack, std::fs::Permissions::from_mode(0o644)).unwrap();
        std::fs::write(pack, bytes).unwrap();
    }
    let check = run(here, &["repo", "check"]);
    assert_eq!(check.status.code(), Some(8), "{}{}", stdout(&check), stderr(&check));
    assert!(stdout(&check).contains("damaged"), "{}", stdout(&check));
}

/// Runs a command with these bytes at its standard input.
fn run_with_input(dir: &Path, args: &[&str], input: &[u8]) -> Output {
    let pipes = |c: &mut Command| {
        c.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut child = pipes(cicada().current_dir(dir).args(args));
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

#[test]
fn archives_carry_components_to_a_cloud_without_a_link() {
    let (a, b) = (cloud(), cloud());
    let (from, to) = (a.path(), b.path());
    let nothing = run(from, &["repo", "export", "empty.tar"]);
    assert_eq!(nothing.status.code(), Some(3), "{}", stderr(&nothing));
    assert!(import(from, &tree(from, "one", "first"), "1").status.success());
    assert!(import(from, &tree(from, "two", "second"), "2").status.success());
    let o = run(from, &["repo", "export", "all.tar"]);
    assert!(o.status.success(), "{}", stderr(&o));
    let streamed = run(from, &["repo", "export", "-"]);
    assert!(streamed.status.success(), "{}", stderr(&streamed));
    let all = std::fs::read(from.join("all.tar")).unwrap();
    assert!(streamed.stdout == all, "to a pipe it is the same archive");
    let o = run(from, &["repo", "export", "-", "--json"]);
    assert_eq!((o.status.code(), o.stdout.len()), (Some(2), 0));
    assert!(run(from, &["repo", "export", "one/", "--component", "tool@1"]).status.success());

    // The other cloud has a broker, which holds its repository.
    let broker = TestBroker::start(to);
    let o = run(to, &["repo", "import", "-", "--json"]);
    assert_eq!(o.status.code(), Some(2), "an empty input is no archive: {}", stderr(&o));
    let o = run_with_input(to, &["repo", "import", "-"], &all);
    assert!(o.status.success(), "{}", stderr(&o));
    assert!(stdout(&o).contains("not bound"), "{}", stdout(&o));
    assert_eq!(run(to, &["component", "show", "tool@1"]).status.code(), Some(3), "no names without --bind");
    let one = from.join("one");
    let o = run(to, &["repo", "import", one.to_str().unwrap(), "--bind", "--json"]);
    assert!(o.status.success(), "{}", stderr(&o));
    let last: Value = serde_json::from_str(stdout(&o).lines().last().unwrap()).unwrap();
    let lines = last.as_array().unwrap();
    let value = |name: &str, unit: &str| {
        lines.iter().find(|l| l["name"] == name && l["unit"] == unit).unwrap()["value"].clone()
    };
    assert_eq!((value("stored", "objects"), value("held-already", "objects")), (json!(0), json!(2)));
    assert_eq!(value("bound", "names"), json!(1));
    assert!(run(to, &["component", "show", "tool@1"]).status.success());
    assert_eq!(run(to, &["component", "show", "tool@2"]).status.code(), Some(3));
    let back = run(to, &["repo", "export", "-", "--component", "tool@1"]);
    assert!(back.status.success() && back.stdout.len() > 1024, "{}", stderr(&back));
    assert!(run(to, &["repo", "check"]).status.success());
    drop(broker);

    // A damaged object costs that object, and says so.
    let c = cloud();
    let mut bad = all.clone();
    let at = bad.len() - 1024 - 512;
    bad[at] ^= 1;
    let o = run_with_input(c.path(), &["repo", "import", "-"], &bad);
    assert_eq!(o.status.code(), Some(8), "{}{}", stdout(&o), stderr(&o));
    assert!(stdout(&o).contains("refused"), "{}", stdout(&o));
    let o = run_with_input(c.path(), &["repo", "import", "-"], &all[..all.len() - 2000]);
    assert_eq!(o.status.code(), Some(8), "{}", stderr(&o));
    assert!(stderr(&o).contains("of 4 objects"), "{}", stderr(&o));
    assert_eq!(run(c.path(), &["repo", "import", "nowhere.tar"]).status.code(), Some(3));
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for path in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
        if path.is_dir() { out.extend(files(&path)) } else { out.push(path) }
    }
    out
}

fn is_pack(path: &Path) -> bool {
    path.components().any(|c| c.as_os_str() == "packs")
}

#[test]
fn a_broker_gets_what_it_lacks_through_its_socket() {
    let dir = cloud();
    let here = dir.path();
    let broker = TestBroker::start(here);
    let o = import(here, &tree(here, "one", "first"), "1");
    assert!(o.status.success(), "{}", stderr(&o));
    assert!(stderr(&o).contains("handed to the broker: 1 components, "), "{}", stderr(&o));
    let puts = broker.seen.lock().unwrap().puts;
    assert_eq!(puts, 2, "a pack and a manifest");
    assert!(import(here, &tree(here, "one", "first"), "1").status.success());
    assert_eq!(broker.seen.lock().unwrap().packs, 1, "the pack is not sent again");
    assert!(stdout(&run(here, &["component", "list"])).contains("tool"));
}

#[test]
fn tables_are_for_people_and_json_for_programs() {
    let dir = cloud();
    let _broker = TestBroker::start(dir.path());
    let o = run(dir.path(), &["vm", "list"]);
    assert_eq!(
        stdout(&o),
        "NAME   ID        POWER    WHERE  CPUS   MEMORY  ROOT DELTA  USER DATA  MIGRATION\n\
         web-1  aaaaaaaa  running  here      2  512 MiB     1.5 MiB     64 MiB\n"
    );
    assert_eq!(stderr(&o), "");
    let o = run(dir.path(), &["vm", "list", "--json"]);
    let value: Value = serde_json::from_str(&stdout(&o)).unwrap();
    assert_eq!(value[0]["name"], "web-1");
    let o = run(dir.path(), &["vm", "show", "other", "--json"]);
    assert_eq!(o.status.code(), Some(3));
    assert_eq!(
        serde_json::from_str::<Value>(&stdout(&o)).unwrap(),
        json!({ "problem": {
            "kind": "not-found", "object": "VM other", "reason": "there is no such VM",
            "next_step": "see 'cicada vm list'"
        } })
    );
    let o = run(dir.path(), &["vm", "list", "--no-such-flag", "--json"]);
    let value: Value = serde_json::from_str(&stdout(&o)).unwrap();
    assert_eq!((o.status.code(), &value["problem"]["kind"]), (Some(2), &json!("bad-request")));
    let o = run(dir.path(), &["plan", "web-1", "--json"]);
    let value: Value = serde_json::from_str(&stdout(&o)).unwrap();
    assert_eq!(value["candidates"][0]["member"], "cloud-b@example.org");
    let o = run(dir.path(), &["vm", "show", "other"]);
    assert_eq!(o.status.code(), Some(3));
    assert_eq!(stderr(&o), "error: VM other: there is no such VM\nhint: see 'cicada vm list'\n");
    let o = run(dir.path(), &["plan", "web-1"]);
    assert_eq!(
        stdout(&o),
        "CLOUD    ANSWER  HELD  COMPONENTS  ROOT DELTA  USER DATA            TIME  ANSWERED IN\n\
         cloud-b  yes      3/4     5.2 MiB     1.5 MiB     64 MiB  4.0 s to 9.0 s        12 ms\n\
         cloud-c  no       4/4         0 B         0 B        0 B               ?         8 ms\n\
         cloud-c: needs 512 MiB of memory, 0 B are free [memory]; free memory there\n"
    );
}

#[test]
fn an_adoption_tells_what_was_known_and_what_was_added() {
    let dir = cloud();
    let _broker = TestBroker::start(dir.path());
    std::fs::write(dir.path().join("old.img"), [7; 2560]).unwrap();
    let o = run(dir.path(), &["vm", "adopt", "old", "old.img", "--format", "raw", "--dry-run"]);
    let digest = "ab".repeat(32);
    let expected = format!(
        "VM            none, a dry run\n\
         disk          2.5 KiB, raw\n\
         known         768 KiB, 75 % of its content\n\
         residue       256 KiB\n\
         zeros         0 B\n\
         extents       7 in 3 packs\n\
         image digest  {digest}\n\
         time          12 ms\n\n\
         KNOWN FROM  PACKS    BYTES\n\
         redis@7.0       3  768 KiB\n"
    );
    assert_eq!(stdout(&o), expected);
    let notes = "the disk's size is no multiple of 1 MiB: 1046016 bytes of zeros were added at its end\n";
    assert!(stderr(&o).ends_with(notes), "{}", stderr(&o));
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let dir = cloud();
    let _broker = TestBroker::start(dir.path());
    let mut child = cicada()
        .current_dir(dir.path())
        .args(["completions", "zsh"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!((child.wait().unwrap().code(), text.as_str()), (Some(0), ""));
}

#[test]
fn a_move_shows_plan_progress_and_account() {
    let dir = cloud();
    let _broker = TestBroker::start(dir.path());
    let o = run(dir.path(), &["move", "web-1", "--to", "cloud-b"]);
    assert_eq!(o.status.code(), Some(0), "{}", stderr(&o));
    let err = stderr(&o);
    let mut lines = err.lines();
    assert_eq!(
        lines.next().unwrap(),
        "plan: web-1 to cloud-b: 3 of 4 components are there, 5.2 MiB are missing, \
         1.5 MiB of root delta and 64 MiB of user data; 4.0 s to 9.0 s"
    );
    assert_eq!(lines.next().unwrap(), "stage: 40 %, 20 MiB of 50 MiB, 10 MiB/s, 3.0 s left");
    assert_eq!(
        stdout(&o),
        "web-1 is now in cloud-b: 12 s, down for 3.1 s\n\
         \n            NEEDED  HELD  FETCHED\n\
         components       4     3        1  redis@7.0\n\
         packs          210   198       12\n\
         \nSENT                                BYTES\n\
         components                        5.2 MiB                11 %\n\
         root delta                          1 MiB                 2 %\n\
         user data                          40 MiB                87 %\n\
         control                             4 KiB                 0 %\n\
         together                         46.2 MiB\n\
         on the wire, both ways             47 MiB\n\
         instead of whole disks, zstd -3   512 MiB  11.1 times as much\n\
         \nPHASE         TIME\n\
         negotiate    50 ms\n\
         stage        8.0 s\n\
         switch-over  3.2 s\n\
         VM down      3.1 s\n"
    );
}

#[test]
fn a_move_for_programs_is_a_stream_of_messages() {
    let dir = cloud();
    let _broker = TestBroker::start(dir.path());
    let o = run(dir.path(), &["move", "web-1", "--json"]);
    assert_eq!((o.status.code(), stderr(&o).as_str()), (Some(0), ""));
    let lines: Vec<Value> = stdout(&o).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines[0]["event"], "note");
    assert!(lines[0]["text"].as_str().unwrap().starts_with("plan: "));
    assert_eq!(lines[1]["event"], "migration");
    let progress = &lines.last().unwrap()["progress"];
    assert_eq!(progress["phase"], "completed");
    assert_eq!(progress["started"], "2023-11-14T22:13:20.000Z");
}

#[test]
fn ctrl_c_cancels_a_move_and_waits_for_what_comes_of_it() {
    let dir = cloud();
    let broker = TestBroker::start(dir.path());
    let mut child = spawn_waiting_move(dir.path());
    let mut err = BufReader::new(child.stderr.take().unwrap());
    read_until(&mut err, "stage: ");
    interrupt(&child);
    let rest = read_all(&mut err);
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest}");
    assert!(rest.contains("error: migration of web-1: was cancelled"), "{rest}");
    assert_eq!(broker.seen.lock().unwrap().cancelled.as_deref(), Some(MIGRATION));
}

#[test]
fn a_second_ctrl_c_leaves_the_move_to_the_broker() {
    let dir = cloud();
    let broker = TestBroker::start(dir.path());
    broker.seen.lock().unwrap().deaf = true;
    let mut child = spawn_waiting_move(dir.path());
    let mut err = BufReader::new(child.stderr.take().unwrap());
    read_until(&mut err, "stage: ");
    interrupt(&child);
    read_until(&mut err, "cancelling");
    interrupt(&child);
    let rest = read_all(&mut err);
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest}");
    assert!(rest.contains(&format!("hint: cicada migration watch {MIGRATION}")), "{rest}");
}

fn spawn_waiting_move(dir: &Path) -> std::process::Child {
    let mut command = cicada();
    command.current_dir(dir).args(["move", "slow", "--to", "cloud-b"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn interrupt(child: &std::process::Child) {
    let pid = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
}

fn read_until(reader: &mut impl BufRead, start: &str) {
    let mut line = String::new();
    while reader.read_line(&mut line).unwrap() > 0 {
        if line.starts_with(start) {
            return;
        }
        line.clear();
    }
    panic!("'{start}' did not come");
}

fn read_all(reader: &mut impl Read) -> String {
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn the_console_can_be_scripted() {
    let dir = cloud();
    let broker = TestBroker::start(dir.path());
    // A guest that echoes what is typed, in capitals.
    let console = UnixListener::bind(dir.path().join("console")).unwrap();
    std::thread::spawn(move || {
        for mut stream in console.incoming().flatten() {
            let mut typed = [0; 100];
            while let Ok(n) = stream.read(&mut typed) {
                if n == 0 || stream.write_all(&typed[..n].to_ascii_uppercase()).is_err() {
                    break;
                }
            }
        }
    });
    let script = [
        "vm",
        "console",
        "web-1",
        "--send",
        "hel",
        "--send",
        r"lo\n",
        "--expect",
        "HELLO",
        "--expect-regex",
        "\n",
    ];
    let o = run(dir.path(), &script);
    assert_eq!((o.status.code(), stdout(&o).as_str()), (Some(0), "HELLO\n"), "{}", stderr(&o));
    let o = run(
        dir.path(),
        &["vm", "console", "web-1", "--send", "x", "--expect", "never", "--timeout", "200ms"],
    );
    assert_eq!(o.status.code(), Some(5));
    assert_eq!(
        stderr(&o),
        format!(
            "error: console of VM web-1: 'never' was not seen within 200ms\n\
             hint: all it printed is in {}\n",
            broker.dir.join("console.log").display()
        )
    );
    // What was printed before is in the log, which also needs no running VM.
    std::fs::write(dir.path().join("console.log"), "boot\nlogin: ").unwrap();
    let o = run(dir.path(), &["vm", "console", "web-1", "--history", "--expect", "login:"]);
    assert_eq!((o.status.code(), stdout(&o).as_str()), (Some(0), "boot\nlogin: "), "{}", stderr(&o));
    // What the guest printed commands no terminal, unless that is asked for.
    std::fs::write(dir.path().join("console.log"), "\x1b]0;mine\x07login: ").unwrap();
    let o = run(dir.path(), &["vm", "console", "web-1", "--history", "--expect", "login:"]);
    assert_eq!((o.status.code(), stdout(&o).as_str()), (Some(0), r"\x1b]0;mine\x07login: "));
    let o = run(dir.path(), &["vm", "console", "web-1", "--history", "--raw", "--expect", "login:"]);
    assert_eq!((o.status.code(), stdout(&o).as_str()), (Some(0), "\x1b]0;mine\x07login: "));
    // A history with nothing to send after it ends where it ends.
    std::fs::write(dir.path().join("console.log"), "boot\nlogin: ").unwrap();
    let history = ["vm", "console", "web-1", "--history"];
    let o = run(dir.path(), &history);
    assert_eq!((o.status.code(), stdout(&o).as_str()), (Some(0), "boot\nlogin: "), "{}", stderr(&o));
    // What was printed before something was typed is no answer to it.
    let script = ["--send", r"x\n", "--expect", "login:", "--timeout", "300ms"];
    let o = run(dir.path(), &[&history[..], &script].concat());
    assert_eq!(o.status.code(), Some(5), "{}", stdout(&o));
    std::fs::remove_file(dir.path().join("console")).unwrap();
    let o = run(dir.path(), &history);
    assert_eq!((o.status.code(), stdout(&o).as_str()), (Some(0), "boot\nlogin: "), "of one that is off");
    let o = run(dir.path(), &["vm", "console", "web-1"]);
    assert_eq!(o.status.code(), Some(4), "{}", stderr(&o));
}

#[derive(Default)]
struct Seen {
    puts: usize,
    packs: usize,
    cancelled: Option<String>,
    /// Takes cancellations without acting on them.
    deaf: bool,
}

/// A service with one VM, two members, and a real repository, behind the real API.
struct TestBroker {
    dir: PathBuf,
    seen: Arc<Mutex<Seen>>,
    _stop: watch::Sender<bool>,
    _runtime: tokio::runtime::Runtime,
}

struct TestService {
    dir: PathBuf,
    repository: Repository,
    seen: Arc<Mutex<Seen>>,
    cancelled: Arc<Notify>,
}

impl TestBroker {
    fn start(dir: &Path) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let repository = dir.join("data/repository");
        std::fs::create_dir_all(&repository).unwrap();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let service = TestService {
            dir: dir.to_owned(),
            repository: Repository::open_or_create(&repository).unwrap(),
            seen: seen.clone(),
            cancelled: Arc::default(),
        };
        let (stop, stopped) = watch::channel(false);
        let listener = runtime.block_on(cicada::api::bind(&dir.join("data/cicada.sock"))).unwrap();
        runtime.spawn(cicada::api::serve(listener, Arc::new(service), stopped));
        Self { dir: dir.to_owned(), seen, _stop: stop, _runtime: runtime }
    }
}

impl TestService {
    fn vm(&self, power: &str) -> Value {
        json!({
            "id": VM, "name": "web-1", "power": power, "ownership": "here", "owner": null, "epoch": 0, "cpus": 2,
            "memory_bytes": 512 << 20, "root_size_bytes": 2u64 << 30, "user_data_size_bytes": 256 << 20, "nics": [],
            "recipe": "0".repeat(64), "components": ["debian@12"], "root_delta_bytes": 3 << 19,
            "user_data_bytes": 64 << 20, "console_socket": self.dir.join("console"),
            "console_log": self.dir.join("console.log"), "migration": null,
            "architecture": "amd64", "cpu_model": "qemu64", "firmware": "uefi", "disk_bus": "virtio",
            "system_uuid": VM
        })
    }
}

fn candidate(
    cloud: &str,
    verdict: Value,
    missing: u64,
    held: u32,
    delta: u64,
    data: u64,
    s: Option<(f64, f64)>,
) -> Value {
    json!({
        "cloud": cloud, "member": format!("{cloud}@example.org"), "verdict": verdict,
        "component_missing_bytes": missing, "components_needed": 4, "components_held": held, "packs_missing": 1,
        "root_delta_missing_bytes": delta, "user_data_missing_bytes": data,
        "seconds_low": s.map(|s| s.0), "seconds_high": s.map(|s| s.1), "answer_ms": if s.is_some() { 12.3 } else { 8.0 }
    })
}

fn plan() -> Value {
    let no = json!({ "verdict": "no", "reasons": [{
        "code": "memory", "text": "needs 512 MiB of memory, 0 B are free", "next_step": "free memory there"
    }] });
    json!({ "vm": "web-1", "candidates": [
        candidate("cloud-b", json!({ "verdict": "yes" }), 5_452_595, 3, 3 << 19, 64 << 20, Some((4.0, 9.0))),
        candidate("cloud-c", no, 0, 4, 0, 0, None),
    ] })
}

fn progress(phase: &str, done: u64) -> Value {
    json!({
        "id": MIGRATION, "vm": "web-1", "vm_id": VM, "role": "source", "peer": "cloud-b@example.org",
        "peer_cloud": "cloud-b", "phase": phase, "detail": "", "done_bytes": done << 20, "total_bytes": 50 << 20,
        "rate_bytes_per_s": 10 << 20, "eta_s": (50 - done) / 10, "fraction": done as f64 / 50.0,
        "started": "2023-11-14T22:13:20.000Z", "updated": "2023-11-14T22:13:32.000Z", "ended": phase == "completed"
    })
}

fn adopted() -> Value {
    json!({
        "vm": "old", "format": "raw", "disk_bytes": 2560, "size_bytes": 1 << 20, "digest": "ab".repeat(32),
        "known_bytes": 768 << 10, "residue_bytes": 256 << 10, "zero_bytes": 0, "extents": 7, "packs": 3,
        "packs_left_out": 0, "known_from": [{ "component": "redis@7.0", "packs": 3, "known_bytes": 768 << 10 }],
        "elapsed_ms": 12, "component": null, "made": null
    })
}

fn migration() -> Value {
    json!({ "progress": progress("completed", 50), "problem": null, "account": {
        "components_needed": 4, "components_held": 3, "components_fetched": 1, "packs_needed": 210,
        "packs_fetched": 12, "fetched": ["redis@7.0"], "component_bytes": 5_452_595, "root_delta_bytes": 1 << 20,
        "user_data_bytes": 40 << 20, "control_bytes": 4096, "wire_bytes": 47 << 20,
        "monolithic_zstd_bytes": 512 << 20, "monolithic_raw_bytes": null, "phase_ms": { "switch-over": 3200, "stage": 8000, "negotiate": 50 }, "downtime_ms": 3100,
        "boot_ms": null
    } })
}

fn reply(name: &str, value: Value) -> Result<Reply, Problem> {
    Ok(serde_json::from_value(json!({ "reply": name, "value": value })).unwrap())
}

impl Service for TestService {
    fn call(
        &self,
        request: Request,
        given: cicada::runner::Given,
        events: mpsc::Sender<Event>,
    ) -> BoxFuture<'static, Result<Reply, Problem>> {
        let vm = self.vm("running");
        let (seen, cancelled) = (self.seen.clone(), self.cancelled.clone());
        let repository = self.repository.clone();
        Box::pin(async move {
            match request {
                Request::Vm(VmRequest::List) => reply("vms", json!([vm])),
                Request::Vm(VmRequest::Show { vm: name }) if name == "web-1" => reply("vm", vm),
                Request::Vm(VmRequest::Show { vm }) => {
                    Err(Problem::new(ProblemKind::NotFound, format!("VM {vm}"), "there is no such VM")
                        .next("see 'cicada vm list'"))
                }
                Request::Move(MoveRequest::Plan { .. }) => reply("plan", plan()),
                Request::Vm(VmRequest::Adopt(adopt)) => {
                    assert!(Path::new(&adopt.disk).is_absolute() && adopt.dry_run, "{adopt:?}");
                    reply("adopted", adopted())
                }
                Request::Move(MoveRequest::Begin { vm, to, dry_run: false, force_stop: false }) => {
                    assert_eq!(
                        to.as_deref(),
                        Some("cloud-b@example.org"),
                        "what was planned is what is asked for"
                    );
                    let stage = serde_json::from_value(progress("stage", 20)).unwrap();
                    events.send(Event::Migration(stage)).await.unwrap();
                    if vm == "slow" {
                        cancelled.notified().await;
                        return Err(Problem::new(
                            ProblemKind::Cancelled,
                            "migration of web-1",
                            "was cancelled",
                        ));
                    }
                    reply("migration", migration())
                }
                Request::Move(MoveRequest::Cancel { id }) => {
                    let mut seen = seen.lock().unwrap();
                    if !seen.deaf {
                        seen.cancelled = Some(id);
                        cancelled.notify_one();
                    }
                    Ok(Reply::Done)
                }
                Request::Content(request) => tokio::task::spawn_blocking(move || {
                    let composer = Composer::new(repository.clone());
                    let mut tell = |event| drop(events.try_send(event));
                    let stop = || events.is_closed();
                    let files = (&request, &given);
                    catalogue::call(&repository, &composer, Duration::ZERO, &[], files, &stop, &mut tell)
                })
                .await
                .unwrap(),
                other => panic!("{other:?}"),
            }
        })
    }

    fn put_object(
        &self,
        kind: ObjectKind,
        id: Hash,
        size_bytes: u64,
        body: BoxStream<'static, std::io::Result<Bytes>>,
    ) -> BoxFuture<'static, Result<bool, Problem>> {
        let repository = self.repository.clone();
        {
            let mut seen = self.seen.lock().unwrap();
            seen.puts += 1;
            seen.packs += usize::from(kind == ObjectKind::Pack);
        }
        Box::pin(async move {
            let pieces: Vec<_> = body.collect().await;
            let mut pieces = pieces.into_iter().map(Result::unwrap);
            catalogue::put_object(&repository, kind, id, size_bytes, &mut || pieces.next()).map(|()| true)
        })
    }

    fn has_objects(
        &self,
        kind: ObjectKind,
        ids: Vec<Hash>,
    ) -> BoxFuture<'static, Result<Vec<bool>, Problem>> {
        let repository = self.repository.clone();
        Box::pin(
            async move { Ok(ids.into_iter().map(|id| catalogue::holds(&repository, kind, id)).collect()) },
        )
    }
}
