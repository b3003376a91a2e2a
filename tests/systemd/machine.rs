//! A machine with a systemd of its own: namespaces of this one, with all of its files, where nothing that is
//! written stays.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Makes the machine's files and becomes its process 1. Runs in namespaces of its own, in a cgroup of its own.
const BOOT: &str = r#"
set -eu
mount -t tmpfs -o size=2g,mode=755 tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o lowerdir=/,upperdir="$1/upper",workdir="$1/work" "$1/root"
cd "$1/root"
mount -t proc proc proc
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount --rbind /dev dev
mount -t sysfs -o ro sysfs sys
mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
mount -t cgroup2 cgroup2 sys/fs/cgroup
# The program under test, where it cannot be confused with what is installed.
touch run/cicada-under-test
mount --bind "$2" run/cicada-under-test
# Of this machine's own services none shall run there.
rm -rf etc/systemd/system/* etc/cicada var/lib/cicada usr/local/bin/cicada
printf '[Unit]\nDescription=Nothing but what is asked for\n' >etc/systemd/system/quiet.target
mkdir run/outside
pivot_root . run/outside
umount -l run/outside
exec env -i container=unshare PATH=/usr/sbin:/usr/bin:/sbin:/bin \
  /lib/systemd/systemd --system --unit=quiet.target --show-status=no --log-level=warning --log-target=console
"#;

const PATIENCE: Duration = Duration::from_secs(120);

pub struct Machine {
    process: Child,
    pid: u32,
    cgroup: PathBuf,
    _dir: tempfile::TempDir,
}

/// Says loudly, past the runner's capture, what is not tried and why.
pub fn skipped(reason: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {reason}");
}

impl Machine {
    /// Nothing where there can be none, which is said.
    pub fn start() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skipped("a systemd of its own needs root");
            return None;
        }
        if !Path::new("/lib/systemd/systemd").exists() {
            skipped("no systemd; deploy/install installs it");
            return None;
        }
        let unified = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].into_iter().map(Path::new);
        let unified = unified.into_iter().find(|dir| dir.join("cgroup.controllers").exists());
        let Some(unified) = unified else {
            skipped("no cgroups of version 2 for a systemd of its own");
            return None;
        };
        let dir = tempfile::tempdir().unwrap();
        let cgroup = unified.join(format!("cicada-test-{}", std::process::id()));
        if let Err(e) = fs::create_dir(&cgroup) {
            skipped(&format!("no cgroup for a systemd of its own: {e}"));
            return None;
        }
        let enter = format!("echo $$ >{}/cgroup.procs && exec \"$@\"", cgroup.display());
        let namespaces = ["--mount", "--pid", "--cgroup", "--uts", "--ipc", "--fork", "--kill-child=KILL"];
        let process = Command::new("sh")
            .args(["-c", &enter, "sh", "unshare"])
            .args(namespaces)
            .args(["--propagation", "private", "sh", "-c", BOOT, "sh"])
            .args([dir.path(), Path::new(env!("CARGO_BIN_EXE_cicada"))])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut machine = Self { process, pid: 0, cgroup, _dir: dir };
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if let Some(status) = machine.process.try_wait().unwrap() {
                skipped(&format!("this machine lets no systemd of its own run: {status}"));
                return None;
            }
            let children = format!("/proc/{0}/task/{0}/children", machine.process.id());
            let children = fs::read_to_string(children).unwrap_or_default();
            machine.pid = children.split_whitespace().next().and_then(|pid| pid.parse().ok()).unwrap_or(0);
            if machine.pid != 0 && machine.property("quiet.target", "ActiveState") == "active" {
                return Some(machine);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        panic!("systemd did not start");
    }

    /// A file of the machine.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid))
    }

    /// Writes a file as an editor of root's does.
    pub fn write(&self, path: &str, text: &str, mode: u32) {
        let path = self.path(path);
        let _ = fs::remove_file(&path);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// Runs a command there as root, with the umask of a careless operator.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid.to_string()]);
        command.args(["--mount", "--pid", "--cgroup", "--uts", "--ipc", "--wd=/root"]);
        command.args(["env", "-i", "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"]);
        command.args(words).stdin(Stdio::null());
        command
    }

    pub fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// What it printed; it must go well.
    pub fn good(&self, words: &[&str]) -> String {
        let output = self.run(words);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{words:?}: {:?}\n{out}{err}\n{}", output.status, self.log());
        out
    }

    /// The exit code and what it said on stderr.
    pub fn bad(&self, words: &[&str]) -> (i32, String) {
        let output = self.run(words);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(!output.status.success(), "{words:?} went well: {out}{err}");
        (output.status.code().unwrap(), err)
    }

    pub fn property(&self, unit: &str, property: &str) -> String {
        text(&self.run(&["systemctl", "show", "--value", "-p", property, unit]).stdout).trim().to_owned()
    }

    /// What the broker wrote to its log.
    pub fn log(&self) -> String {
        text(&self.run(&["journalctl", "--no-pager", "-o", "cat", "-u", "cicada"]).stdout)
    }

    /// Until something holds.
    pub fn wait(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let begun = Instant::now();
        while !holds(self) {
            assert!(begun.elapsed() < PATIENCE, "{what}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // With its process 1 all of them end.
        let _ = self.process.kill();
        let _ = self.process.wait();
        for _ in 0..50 {
            remove_cgroup(&self.cgroup);
            if !self.cgroup.exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn remove_cgroup(cgroup: &Path) {
    for below in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if below.file_type().is_ok_and(|t| t.is_dir()) {
            remove_cgroup(&below.path());
        }
    }
    let _ = fs::remove_dir(cgroup);
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
