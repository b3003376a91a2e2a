//! What programs read of every command: `src/cli/JSON.md`, tried with real brokers and QEMU. Keys are the same for
//! the same thing, values that programs compare are identifiers, moments are RFC 3339, and a failure is JSON too.

#[allow(dead_code)]
#[path = "federation/world.rs"]
mod world;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use cicada::interface::{Request, VmRequest};
use regex::Regex;
use serde_json::Value;
use world::World;

/// Commands that print no JSON of their own, and why.
const SILENT: [(&str, &str); 4] = [
    ("broker", "it logs"),
    ("completions", "it writes a script"),
    ("man", "it writes files"),
    ("vm console", "it passes bytes on"),
];

/// Where keys are identifiers that are counted or timed, not names of fields.
const MAPS: [&str; 4] = ["by_kind", "messages", "phase_ms", "refused"];

/// Values that programs compare.
const IDENTIFIERS: [&str; 23] = [
    "accelerator",
    "affiliation",
    "against",
    "autostart",
    "check",
    "code",
    "disk_bus",
    "driver",
    "event",
    "firmware",
    "kind",
    "link",
    "model",
    "ownership",
    "phase",
    "power",
    "role",
    "security",
    "state",
    "trust",
    "unit",
    "verdict",
    "vouched",
];

const MOMENTS: [&str; 8] = ["created", "issued", "last_seen", "since", "started", "until", "updated", "at"];

/// Names that one thing had beside another.
const OTHER_NAMES: [&str; 7] =
    ["jid", "memory", "root_size", "user_data_size", "bytes", "bytes_done", "bytes_missing"];

struct Shape {
    field: Regex,
    identifier: Regex,
    moment: Regex,
    wrong: Vec<String>,
}

impl Shape {
    fn new() -> Self {
        Self {
            field: Regex::new("^[a-z][a-z0-9]*(_[a-z0-9]+)*$").unwrap(),
            identifier: Regex::new("^[a-z0-9]+(-[a-z0-9]+)*$").unwrap(),
            moment: Regex::new(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$").unwrap(),
            wrong: Vec::new(),
        }
    }

    fn look(&mut self, at: &str, value: &Value) {
        match value {
            Value::Array(values) => values.iter().for_each(|value| self.look(at, value)),
            Value::Object(fields) => {
                let is_map = MAPS.iter().any(|map| at.ends_with(map));
                let is_report = fields.contains_key("value") && fields.contains_key("unit");
                for (key, value) in fields {
                    let here = format!("{at}.{key}");
                    let form = if is_map { &self.identifier } else { &self.field };
                    let is_named = form.is_match(key);
                    // Settings have the names that they have in the file.
                    let is_setting = at.starts_with("config show");
                    let is_amount =
                        !key.contains("bytes") || key.ends_with("_bytes") || key.contains("bytes_per_");
                    if !is_named
                        || (!is_map && !is_setting && (OTHER_NAMES.contains(&key.as_str()) || !is_amount))
                    {
                        self.wrong.push(format!("{here}: the key"));
                    }
                    if !is_map {
                        self.field(&here, key, value, is_report);
                    }
                    self.look(&here, value);
                }
            }
            Value::Number(n) => {
                let is_moment =
                    n.as_u64().is_some_and(|n| (1_500_000_000_000..2_500_000_000_000).contains(&n));
                if is_moment && !at.ends_with("bytes") && !at.ends_with(".value") {
                    self.wrong.push(format!("{at}: {n} looks like a moment"));
                }
            }
            _ => {}
        }
    }

    fn field(&mut self, at: &str, key: &str, value: &Value, is_report: bool) {
        let Some(text) = value.as_str() else {
            if MOMENTS.contains(&key) && !value.is_null() {
                self.wrong.push(format!("{at}: {value} is no moment"));
            }
            return;
        };
        let compared = IDENTIFIERS.contains(&key) || (is_report && key == "name");
        if compared && !text.is_empty() && !self.identifier.is_match(text) {
            self.wrong.push(format!("{at}: '{text}' is no identifier"));
        }
        if MOMENTS.contains(&key) && !self.moment.is_match(text) {
            self.wrong.push(format!("{at}: '{text}' is no moment"));
        }
    }
}

/// Runs commands, and keeps what was seen of them.
struct Walk {
    world: World,
    shape: Shape,
    seen: BTreeSet<String>,
}

impl Walk {
    /// Runs `command` with these arguments, and gives the exit code and the last value.
    fn run(&mut self, command: &str, arguments: &[&str]) -> (i32, Value) {
        let here = &self.world.clouds[0].dir;
        let mut program = Command::new(env!("CARGO_BIN_EXE_cicada"));
        for name in ["CICADA_CONFIG", "CICADA_SOCKET", "CICADA_LOG"] {
            program.env_remove(name);
        }
        let output = program
            .current_dir(here)
            .args(command.split(' '))
            .args(arguments)
            .arg("--json")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let (text, said) =
            (String::from_utf8(output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr));
        let code = output.status.code().unwrap();
        let values: Vec<Value> = match serde_json::from_str(&text) {
            Ok(value) => vec![value],
            Err(_) => text
                .lines()
                .map(|line| {
                    serde_json::from_str(line).unwrap_or_else(|e| panic!("{command}: {e}: {line}\n{text}"))
                })
                .collect(),
        };
        let last = values
            .last()
            .unwrap_or_else(|| panic!("{command} {arguments:?} printed nothing: {said}"))
            .clone();
        let (end, before) = values.split_last().unwrap();
        for event in before {
            let known = ["note", "progress", "migration", "left-out", "step"];
            let is_event = event["event"].as_str().is_some_and(|kind| known.contains(&kind));
            // A value may come before the problem that it told of.
            if !is_event && code == 0 {
                self.shape.wrong.push(format!("{command}: {event} is no event"));
            }
        }
        // `config check` tells its problems with what it checked.
        if code != 0 && command != "config check" {
            let only = end.as_object().is_some_and(|o| o.len() == 1 && o.contains_key("problem"));
            let problem = &end["problem"];
            let whole = ["kind", "object", "reason", "next_step"].iter().all(|key| problem[key].is_string());
            if !only || !whole {
                self.shape.wrong.push(format!("{command}: code {code} without a problem: {end}"));
            }
        }
        // A receipt is a document with a format of its own, for whoever verifies it in years.
        if command != "migration receipt" || code != 0 {
            values.iter().for_each(|value| self.shape.look(command, value));
        }
        self.seen.insert(command.to_owned());
        (code, last)
    }

    fn done(&mut self, command: &str, arguments: &[&str]) -> Value {
        let (code, value) = self.run(command, arguments);
        assert_eq!(code, 0, "{command} {arguments:?}: {value}\n{}", self.world.log(0));
        value
    }

    fn refused(&mut self, command: &str, arguments: &[&str]) {
        let (code, value) = self.run(command, arguments);
        assert_ne!(code, 0, "{command} {arguments:?}: {value}");
    }

    fn path(&self, name: &str) -> String {
        self.world.clouds[0].dir.join(name).display().to_string()
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

/// The commands that are shown, by their paths.
fn leaves(command: &clap::Command, path: &str, out: &mut BTreeSet<String>) {
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        let below = format!("{path} {}", sub.get_name()).trim_start().to_owned();
        match sub.has_subcommands() {
            true => leaves(sub, &below, out),
            false => drop(out.insert(below)),
        }
    }
}

#[test]
fn every_command_has_one_shape_of_json() {
    let _turn = world::turn();
    if world::missing_tool() {
        return;
    }
    let world = World::start_with(&["alpine", "boreal"], &[], "");
    let mut w = Walk { world, shape: Shape::new(), seen: BTreeSet::new() };
    cloud(&mut w);
    content(&mut w);
    vms(&mut w);
    moves(&mut w);
    measured(&mut w);
    w.refused("identity rotate", &[]);
    w.done("identity revoke", &["boreal@federation.test"]);

    use clap::CommandFactory;
    let mut all = BTreeSet::new();
    leaves(&cicada::cli::Cli::command(), "", &mut all);
    let silent = SILENT.map(|(command, _)| command.to_owned());
    let expected: BTreeSet<String> = all.iter().filter(|c| !silent.contains(c)).cloned().collect();
    assert_eq!(w.seen, expected, "commands that were looked at, and those that are there");
    assert!(silent.iter().all(|c| all.contains(c)));
    w.shape.wrong.sort();
    w.shape.wrong.dedup();
    assert!(w.shape.wrong.is_empty(), "{:#?}", w.shape.wrong);
}

fn cloud(w: &mut Walk) {
    w.done("config show", &[]);
    w.run("config check", &[]);
    w.run("config check", &["--online"]);
    assert_eq!(w.done("status", &[])["link"], "online");
    let members = w.done("members", &[]);
    assert_eq!(members[0]["member"], "boreal@federation.test");
    let key = text(&members[0]["key"]);
    let own = w.done("identity show", &[]);
    assert!(own["member"] == "alpine@federation.test" && own["since"].is_string(), "{own}");
    w.done("identity list", &[]);
    w.done("identity trust", &["boreal@federation.test", &key]);
    let password = w.path("owner");
    std::fs::copy(w.world.xmpp.password_file("admin"), &password).unwrap();
    std::fs::set_permissions(&password, std::fs::Permissions::from_mode(0o600)).unwrap();
    let owner = ["--owner-jid", "admin@federation.test", "--owner-password-file", &password];
    w.done("federation list", &owner);
    w.run("federation create", &owner);
    w.run("federation add", &[&["outsider@federation.test"][..], &owner].concat());
    w.run("federation remove", &[&["outsider@federation.test"][..], &owner].concat());
    // A command line that is wrong, and a broker that is not there.
    w.refused("status", &["--no-such-flag"]);
    w.refused("status", &["--socket", "/nowhere"]);
}

fn content(w: &mut Walk) {
    for (name, kind, path) in [
        ("fmt", "format", "boot/efi/EFI/BOOT/BOOTX64.EFI"),
        ("os", "os", "etc/os-release"),
        ("k", "kernel", "boot/vmlinuz"),
    ] {
        let root = w.path(name);
        let file = std::path::Path::new(&root).join(path);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, name).unwrap();
        std::fs::create_dir_all(format!("{root}/var/log")).unwrap();
        std::fs::write(format!("{root}/var/log/left-out"), name).unwrap();
        for version in ["1", "2"] {
            w.done("component import", &[&root, "--name", name, "--version", version, "--kind", kind]);
        }
    }
    w.refused("component build", &["nowhere.toml"]);
    let list = w.done("component list", &[]);
    w.done("component show", &["os@1", "--entries"]);
    w.done("component diff", &["os@1", "os@2"]);
    let of = list.as_array().unwrap().iter().find(|c| c["name"] == "os" && c["version"] == "2").unwrap();
    let id = text(&of["id"]);
    w.done("component remove", &["os@2"]);
    w.done("component bind", &[&id[..12]]);
    w.done("component optimize", &["os@1"]);
    let set = ["--component", "fmt@1", "--component", "os@1", "--component", "k@1", "--root-size", "256M"];
    let recipe = text(&w.done("recipe create", &set)["id"]);
    w.done("recipe list", &[]);
    let disk = w.path("disk.raw");
    assert!(w.done("compose", &[&recipe, "-o", &disk])["size_bytes"].is_u64());
    w.done("repo stats", &[]);
    w.done("repo check", &[]);
    w.done("repo gc", &["--dry-run"]);
    w.done("repo rebuild-index", &[]);
    let archive = w.path("all.tar");
    w.done("repo export", &[&archive]);
    w.done("repo import", &[&archive, "--bind"]);
}

fn vms(w: &mut Walk) {
    let set = ["--component", "fmt@1", "--component", "os@1", "--component", "k@1", "--root-size", "256M"];
    let made = w.done("vm create", &[&["made", "--user-data", "1M", "--network", "lan"][..], &set].concat());
    assert!(made["memory_bytes"] == 512 << 20 && made["nics"][0]["model"] == "virtio", "{made}");
    assert!(made["created"].is_string() && made["system_uuid"] == made["id"], "{made}");
    w.done("vm resize", &["made", "--user-data", "2M"]);
    w.done("vm delete", &["made", "--yes"]);
    let noise = w.path("noise.raw");
    let mut bytes = vec![0; 300_000];
    blake3::Hasher::new().update(b"noise").finalize_xof().fill(&mut bytes);
    std::fs::write(&noise, bytes).unwrap();
    let uuid = "4c4c4544-0044-4710-8035-b3c04f4d3532";
    let adopt = ["web", &noise, "--format", "raw", "--firmware", "bios", "--memory", "64M"];
    let dry = w.done("vm adopt", &[&adopt[..], &["--dry-run"]].concat());
    let lost = dry["notes"].to_string();
    assert!(dry["made"].is_null() && ["--uuid", "--disk-bus"].iter().all(|o| lost.contains(o)), "{dry}");
    let chosen = ["--uuid", uuid, "--disk-bus", "sata", "--network", "lan", "--card-model", "e1000e"];
    let mac = ["--mac", "00:1b:21:0a:0b:0c"];
    let adopted = w.done("vm adopt", &[&adopt[..], &chosen, &mac].concat());
    assert!(adopted["vm"] == "web" && !adopted["notes"].to_string().contains("--uuid"), "{adopted}");
    // What a VM here has already.
    for again in [&mac[..], &["--uuid", uuid]] {
        let other = ["other", &noise, "--format", "raw", "--firmware", "bios", "--network", "lan"];
        w.refused("vm adopt", &[&other[..], again].concat());
    }
    // What this host never has.
    for too_much in [["--cpus", "5"], ["--memory", "3G"], ["--user-data", "1T"]] {
        w.refused("vm create", &[&["huge"][..], &set, &too_much].concat());
    }
    w.done("vm list", &[]);
    w.done("vm start", &["web"]);
    w.done("vm set", &["web", "--memory", "96M"]);
    w.done("vm reboot", &["web", "--force"]);
    // One that crashed and was told to stop is stopped.
    w.done("vm set", &["web", "--autostart", "never"]);
    crash(w, "web");
    w.done("vm stop", &["web", "--force"]);
    assert_eq!(w.done("vm show", &["web"])["power"], "stopped");
    w.refused("vm show", &["nobody"]);
    w.done("vm rename", &["web", "shop"]);
    let file = w.path("shop.qcow2");
    w.done("vm export", &["shop", &file, "--format", "qcow2"]);
}

/// Kills the QEMU of a VM.
fn crash(w: &mut Walk, vm: &str) {
    let id = w.world.vm(0, vm).id;
    let found = Command::new("pgrep").args(["-f", &format!("qemu-system.*{id}")]).output().unwrap();
    for pid in String::from_utf8(found.stdout).unwrap().lines() {
        let pid = rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

fn moves(w: &mut Walk) {
    let plan = w.done("plan", &["shop"]);
    assert_eq!(plan["candidates"][0]["member"], "boreal@federation.test", "{plan}");
    w.refused("plan", &["shop", "--to", "nowhere"]);
    let before = w.done("vm show", &["shop"]);
    let moved = w.done("move", &["shop", "--to", "boreal"]);
    let id = text(&moved["progress"]["id"]);
    // The devices came along, and the way home is as good.
    let there = serde_json::to_value(w.world.vm(1, "shop")).unwrap();
    for field in ["system_uuid", "disk_bus", "nics", "firmware", "cpu_model", "memory_bytes", "id"] {
        assert_eq!(there[field], before[field], "{field}");
    }
    w.done("migration list", &[]);
    w.done("migration show", &[&id]);
    w.done("migration watch", &[&id]);
    for command in ["migration cancel", "migration switch-over", "migration hold"] {
        w.refused(command, &[&id]);
    }
    w.refused("migration limit", &[&id, "1Mbit"]);
    w.refused("migration resolve", &[&id, "--owner", "here", "--yes"]);
    w.done("migration receipt", &[&id]);
    let file = w.path("receipt");
    let own = text(&w.done("identity show", &[])["key"]);
    let written = Command::new(env!("CARGO_BIN_EXE_cicada"))
        .arg("--socket")
        .arg(w.world.socket(0))
        .args(["migration", "receipt", &id, "-o", &file])
        .status();
    assert!(written.unwrap().success());
    w.done("receipt verify", &[&file, "--source-key", &own]);
    w.world.call(1, &Request::Vm(VmRequest::Delete { vm: "shop".into(), taken_for: None })).unwrap();
}

fn measured(w: &mut Walk) {
    let content = w.path("os");
    w.done("bench", &[&content, "--dir", &content]);
    let fixtures = format!("{}/fixtures/sim", env!("CARGO_MANIFEST_DIR"));
    let small = std::fs::read_to_string(format!("{fixtures}/small.toml")).unwrap();
    let tiny = small.replace("clouds = 10", "clouds = 3").replace("vms = 60", "vms = 4");
    let tiny = tiny.replace("hours = 48", "hours = 3");
    assert_ne!(tiny, small);
    let (scenario, packages) = (w.path("scenario.toml"), format!("{fixtures}/packages.tsv"));
    std::fs::write(&scenario, tiny).unwrap();
    w.done("sim", &[&scenario, "--packages", &packages]);
    let recording = format!("{}/fixtures/before/alpine.recording", env!("CARGO_MANIFEST_DIR"));
    w.run("replay", &[&recording]);
    let root = w.path("root");
    std::fs::create_dir(&root).unwrap();
    w.done("setup", &["--dry-run", "--root", &root]);
}
