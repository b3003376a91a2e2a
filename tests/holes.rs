//! Content with holes costs what its data costs: counted are the bytes that the program itself moves, not its time.

#[path = "support/offline.rs"]
mod offline;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{WaitId, WaitIdOptions, waitid};

/// A hole that nobody would want to read.
const HOLE_BYTES: u64 = 20 << 30;
/// What a command may move beside the data: its program, settings, the repository's index.
const MOVED_BYTES_MAX: u64 = 48 << 20;

struct Cloud(tempfile::TempDir);

impl Cloud {
    fn new() -> Self {
        Self(offline::cloud())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Runs a command to its end; gives what it printed, and the bytes it read and wrote.
    fn run(&self, args: &[&str]) -> (String, u64) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cicada"));
        for name in ["CICADA_CONFIG", "CICADA_SOCKET", "CICADA_LOG"] {
            command.env_remove(name);
        }
        let out = self.path().join("out");
        let mut child = command
            .current_dir(self.path())
            .args(args)
            .stdin(Stdio::null())
            .stdout(File::create(&out).unwrap())
            .spawn()
            .unwrap();
        let pid = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
        // It has ended, and is still there to be asked.
        waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).unwrap();
        let io = std::fs::read_to_string(format!("/proc/{}/io", child.id())).unwrap();
        assert!(child.wait().unwrap().success(), "{args:?}");
        let counted = |name: &str| {
            io.lines().find_map(|l| l.strip_prefix(name)?.trim().parse::<u64>().ok()).expect(name)
        };
        (std::fs::read_to_string(out).unwrap(), counted("rchar:") + counted("wchar:"))
    }

    fn frugally(&self, args: &[&str]) -> String {
        let (said, moved) = self.run(args);
        assert!(moved < MOVED_BYTES_MAX, "{args:?} moved {} MiB", moved >> 20);
        said
    }

    fn tree(&self, name: &str, path: &str) -> std::path::PathBuf {
        let file = self.path().join(name).join(path);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, name).unwrap();
        file
    }
}

/// Bytes that a directory takes on the disk.
fn taken_bytes(path: &Path) -> u64 {
    let meta = std::fs::symlink_metadata(path).unwrap();
    let inside = match meta.is_dir() {
        true => std::fs::read_dir(path).unwrap().map(|e| taken_bytes(&e.unwrap().path())).sum(),
        false => 0,
    };
    meta.blocks() * 512 + inside
}

#[test]
fn a_hole_is_neither_read_nor_written_from_its_import_to_the_disk() {
    let cloud = Cloud::new();
    let here = cloud.path();
    for (name, kind, path) in [
        ("fmt", "format", "boot/efi/EFI/BOOT/BOOTX64.EFI"),
        ("os", "os", "etc/os-release"),
        ("k", "kernel", "boot/vmlinuz"),
    ] {
        cloud.tree(name, path);
        cloud.run(&["component", "import", name, "--name", name, "--version", "1", "--kind", kind]);
    }
    // Data at its beginning, in the middle of nowhere, and at its end.
    let sparse = cloud.tree("big", "opt/sparse");
    let file = OpenOptions::new().write(true).open(&sparse).unwrap();
    file.set_len(HOLE_BYTES).unwrap();
    for offset in [0, (9 << 30) + 12_345, HOLE_BYTES - 6] {
        file.write_all_at(b"cicada", offset).unwrap();
    }
    if file.metadata().unwrap().blocks() > 1 << 20 {
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "SKIPPED: the file system of {} has no holes", here.display());
        return;
    }

    let import = |source: &str, version: &str| {
        let id =
            cloud.frugally(&["component", "import", source, "--name", "big", "--version", version, "--json"]);
        let last: serde_json::Value = serde_json::from_str(id.lines().last().unwrap()).unwrap();
        last.to_string()
    };
    import("big", "1");
    // The same as it comes out of archives, of which one knows of holes and one is full of zeros that lie in one.
    for (name, options) in [("gnu.tar", &["--sparse"][..]), ("pax.tar", &["--sparse", "--format=pax"])] {
        let mut tar = Command::new("tar");
        let done = tar.current_dir(here).args(options).args(["-C", "big", "-cf", name, "."]).status();
        assert!(done.unwrap().success());
        import(name, name);
    }
    let hashes: Vec<String> = ["1", "gnu.tar", "pax.tar"]
        .iter()
        .map(|version| {
            let shown = cloud.frugally(&["component", "show", &format!("big@{version}"), "--json"]);
            let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
            shown["packs"][0]["id"].as_str().unwrap().to_owned()
        })
        .collect();
    assert!(hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:?}");

    let recipe = ["--component", "fmt", "--component", "os", "--component", "k", "--component", "big@1"];
    let recipe = [&["recipe", "create"][..], &recipe, &["--root-size", "24G", "--json"]].concat();
    let made: serde_json::Value = serde_json::from_str(&cloud.frugally(&recipe)).unwrap();
    let id = made["id"].as_str().unwrap();
    cloud.frugally(&["compose", id, "-o", "disk.raw"]);
    cloud.frugally(&["repo", "check"]);
    cloud.frugally(&["repo", "export", "all.tar"]);
    cloud.frugally(&["component", "optimize", "--no-deltas"]);
    cloud.frugally(&["repo", "check"]);

    // Composed anew of what was optimised, it is the same disk.
    std::fs::remove_dir_all(here.join("data/repository/hot")).unwrap();
    std::fs::create_dir(here.join("data/repository/hot")).unwrap();
    std::fs::remove_dir_all(here.join("data/repository/compositions")).unwrap();
    std::fs::create_dir(here.join("data/repository/compositions")).unwrap();
    cloud.frugally(&["compose", id, "-o", "again.raw"]);

    let taken = taken_bytes(here);
    assert!(taken < 256 << 20, "it takes {} MiB", taken >> 20);
    let again = File::open(here.join("again.raw")).unwrap();
    let mut found = [0; 6];
    assert!(again.metadata().unwrap().len() == 24 << 30 && finds(&again, b"cicada", &mut found), "{found:?}");
}

/// Whether the bytes stand at the beginning of some block of data.
fn finds(file: &File, bytes: &[u8], found: &mut [u8]) -> bool {
    let len = file.metadata().unwrap().len();
    cicada::sparse::data_runs(file, 0..len).any(|run| {
        let run = run.unwrap();
        run.step_by(4096).any(|at| file.read_exact_at(found, at).is_ok() && found == bytes)
    })
}
