//! Where package tools run: a tree in its own mount, network, process, IPC and host name namespaces,
//! gone with all its mounts when the command ends, however it ends. Needs root, of this machine or of
//! a user namespace.
//!
//! What runs in it comes from packages and definitions, so it is not trusted: bubblewrap leaves it
//! the tree (or, for tools of this machine, programs to read and the tree to write), the null, zero
//! and random devices, [`CAPABILITIES`] and the system calls that [`super::filter`] allows.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::error::BuildError;
use super::filter;
use crate::component::recipe::EPOCH_S;
use crate::path_owner;

/// What package scripts need to give files their owners and modes and to become other users. None
/// of them mounts, loads, traces or makes devices.
const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Set up inside the mount namespace, before the step's own commands. `in_tree` runs a command with
/// the tree as its root; `beside_tree` runs a tool of this machine, which sees the tree as `/tree`
/// and may write nothing else; `inside`, for scripts beside the tree, keeps links in the tree from
/// leading them elsewhere.
const PRELUDE: &str = r#"
umask 022
confine() { sh -euc "$CONFINE" sh "$@"; }
if [ -n "$LOWER" ]; then
    mount -t overlay overlay -o "lowerdir=$LOWER,upperdir=$UPPER,workdir=$WORK,index=off,$OVERLAY" "$ROOT"
else
    mount --bind "$UPPER" "$ROOT"
fi
is_dir() { [ -d "$1" ] && [ ! -L "$1" ]; }
in_tree() {
    passing=
    ! is_dir "$ROOT/proc" || passing="$passing --proc /proc"
    ! is_dir "$ROOT/dev" || passing="$passing --dev /dev"
    ! is_dir "$ROOT/tmp" || passing="$passing --perms 1777 --tmpfs /tmp"
    ! is_dir "$ROOT/run" || passing="$passing --perms 0755 --tmpfs /run --dir /run/lock --ro-bind $SHARED /run/cicada"
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
        DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true SYSTEMD_OFFLINE=1 \
        SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" FILTER="$FILTER" CAPABILITIES="$CAPABILITIES" \
        sh -euc "$CONFINE" sh --unshare-net --bind "$ROOT" / $passing ${IN_TREE:-} --chdir / "$@"
}
beside_tree() {
    view=
    for path in bin sbin lib lib32 lib64; do
        if [ -L "/$path" ]; then view="$view --symlink $(readlink "/$path") /$path"
        elif [ -d "/$path" ]; then view="$view --ro-bind /$path /$path"; fi
    done
    for path in alternatives apt debian_version dpkg group host.conf hosts ld.so.cache ld.so.conf ld.so.conf.d \
        mailcap mime.types nsswitch.conf os-release passwd perl; do
        view="$view --ro-bind-try /etc/$path /etc/$path"
    done
    confine --unshare-net $view --ro-bind /usr /usr --ro-bind-try /var/lib/dpkg /var/lib/dpkg \
        --proc /proc --dev /dev --perms 1777 --tmpfs /tmp --perms 1777 --tmpfs /var/tmp --tmpfs /run \
        --bind "$ROOT" /tree ${BESIDE:-} --chdir / "$@"
}
"#;

/// Runs bubblewrap with what all uses of it share.
const CONFINE: &str = r#"
umask 022
filter=$FILTER capabilities=$CAPABILITIES
unset FILTER CAPABILITIES CONFINE
exec bwrap --unshare-ipc --unshare-pid --unshare-uts --hostname localhost --die-with-parent --new-session \
    --seccomp 9 --cap-drop ALL $capabilities "$@" 9<"$filter"
"#;

/// For scripts that `beside_tree` runs: where a path of the tree really lies.
pub const INSIDE: &str = r#"
inside() {
    parent=$(realpath -m -- "/tree/$(dirname -- "$1")")
    case "$parent/" in /tree/*) ;; *) echo "$1 leads out of the tree" >&2; exit 1 ;; esac
    mkdir -p -- "$parent"
    printf '%s/%s' "$parent" "$(basename -- "$1")"
}
directory() {
    [ ! -L "$1" ] || { echo "$1 is a link, not a directory" >&2; exit 1; }
}
"#;

/// A tree being built, in a directory of its own: removed when dropped, unless kept.
#[derive(Debug)]
pub struct Sandbox {
    component: String,
    dir: tempfile::TempDir,
    lower: Option<PathBuf>,
    log: PathBuf,
    cache: PathBuf,
}

impl Sandbox {
    /// An empty tree. `cache` is where the work is done.
    pub fn new(component: &str, cache: &Path) -> Result<Self, BuildError> {
        let cache = fs::canonicalize(cache).map_err(BuildError::read(cache))?;
        filter::write(&cache.join(FILTER)).map_err(BuildError::write(&cache))?;
        let odd = |c: char| !(c.is_ascii_alphanumeric() || "/._-+@".contains(c));
        if cache.to_str().is_none_or(|text| text.contains(odd)) {
            let reason = "its name has characters that mount options cannot carry";
            return Err(BuildError::CacheDirectory { path: cache, reason });
        }
        let work = work_dir(&cache);
        super::make_dir(&work)?;
        let dir = tempfile::Builder::new().prefix(&format!("{component}-")).tempdir_in(&work);
        let dir = dir.map_err(BuildError::write(&work))?;
        let logs = cache.join("logs");
        super::make_dir(&logs)?;
        let log = logs.join(format!("{component}.log"));
        open_log(&log).and_then(|file| file.set_len(0)).map_err(BuildError::write(&log))?;
        let sandbox = Self { component: component.to_owned(), dir, lower: None, log, cache };
        for part in [sandbox.upper(), sandbox.path("work"), sandbox.path("root"), sandbox.shared()] {
            // The upper directory's own mode becomes that of `/`.
            let made = fs::DirBuilder::new().mode(0o755).create(&part);
            let made = made.and_then(|()| fs::set_permissions(&part, fs::Permissions::from_mode(0o755)));
            made.map_err(BuildError::write(&part))?;
        }
        Ok(sandbox)
    }

    /// Lays the tree over another; before anything was done in it.
    pub fn set_lower(&mut self, lower: PathBuf) {
        self.lower = Some(lower);
    }

    /// The tree, or with a lower one what differs from it, in overlayfs' notation.
    pub fn upper(&self) -> PathBuf {
        self.path("upper")
    }

    /// A directory that is `/run/cicada` inside.
    pub fn shared(&self) -> PathBuf {
        self.path("shared")
    }

    /// A place for what is no part of the tree.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Moves everything to `target` for inspection.
    pub fn keep(self, target: &Path) -> Result<(), BuildError> {
        let moved = fs::create_dir_all(target.parent().unwrap_or(target))
            .and_then(|()| if target.exists() { fs::remove_dir_all(target) } else { Ok(()) })
            .and_then(|()| fs::rename(self.dir.path(), target));
        moved.map_err(BuildError::write(target))
    }

    /// Runs a shell script in the sandbox, outside the tree `$ROOT`; `in_tree` runs inside it.
    pub fn run(&self, step: &str, script: &str, variables: &[(&str, &str)]) -> Result<(), BuildError> {
        let script = format!("{PRELUDE}\n{script}\n");
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "--pid", "--fork", "--mount-proc"])
            .args(["--kill-child=KILL", "--", "sh", "-euc", &script])
            .env("FILTER", self.filter())
            .env("CAPABILITIES", capability_arguments())
            .env("CONFINE", CONFINE)
            // In a user namespace overlayfs has to note what it hides in attributes users may set.
            .env(
                "OVERLAY",
                if path_owner::in_user_namespace() { "userxattr" } else { "redirect_dir=off,metacopy=off" },
            )
            .env("LOWER", self.lower.as_deref().unwrap_or(Path::new("")))
            .env("UPPER", self.upper())
            .env("WORK", self.path("work"))
            .env("ROOT", self.path("root"))
            .env("SHARED", self.shared())
            .envs(variables.iter().copied());
        self.command(step, "unshare", "util-linux", command)
    }

    /// Runs a shell script beside the tree, which is `/tree` there; nothing else can be written to, and
    /// what lies under this sandbox's directory is seen in its place but cannot be changed.
    pub fn run_beside(&self, step: &str, script: &str) -> Result<(), BuildError> {
        let script =
            format!("beside_tree /bin/sh -euc {}", quoted(&format!("umask 022\n{INSIDE}\n{script}")));
        let view = format!("--ro-bind {0} {0}", self.dir.path().display());
        self.run(step, &script, &[("BESIDE", &view)])
    }

    /// The filter of system calls as the kernel takes it.
    fn filter(&self) -> PathBuf {
        self.cache.join(FILTER)
    }

    /// A command in which a tool of this machine runs with its network, the whole machine to read and
    /// `dir` as [`APT_DIR`] to write: for apt, whose downloads are done by a user of its own, which
    /// could not reach a directory that is closed to others.
    pub fn with_network(&self, dir: &Path, chdir: &Path, tool: &[String]) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-euc", CONFINE, "sh", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"])
            .args(["--perms", "1777", "--tmpfs", "/var/tmp", "--setenv", "TMPDIR", "/var/tmp", "--bind"])
            .arg(dir)
            .args([APT_DIR, "--chdir"])
            .arg(chdir)
            .args(tool)
            .env("FILTER", self.filter())
            .env("CAPABILITIES", capability_arguments());
        command
    }

    /// Runs a tool of this machine; its output goes to the build log.
    pub fn command(
        &self,
        step: &str,
        tool: &'static str,
        package: &'static str,
        mut command: Command,
    ) -> Result<(), BuildError> {
        let log = self.log.clone();
        let mut file = open_log(&log).map_err(BuildError::write(&log))?;
        let begin = file.seek(SeekFrom::End(0)).map_err(BuildError::write(&log))?;
        let handle = |f: &File| f.try_clone().map(Stdio::from).map_err(BuildError::write(&log));
        command
            .stdin(Stdio::null())
            .stdout(handle(&file)?)
            .stderr(handle(&file)?)
            .env("SOURCE_DATE_EPOCH", EPOCH_S.to_string())
            .env("LC_ALL", "C.UTF-8");
        let status = command.status().map_err(|source| BuildError::ToolMissing { tool, package, source })?;
        if status.success() {
            return Ok(());
        }
        let output = tail(&mut file, begin).map_err(BuildError::read(&log))?;
        Err(BuildError::Step { component: self.component.clone(), step: step.to_owned(), output, log })
    }
}

/// Where [`Sandbox::with_network`] shows a directory of ours, in place of apt's own.
pub const APT_DIR: &str = "/var/cache/apt";
const FILTER: &str = "seccomp.bpf";

fn capability_arguments() -> String {
    CAPABILITIES.iter().map(|c| format!("--cap-add {c} ")).collect()
}

fn open_log(path: &Path) -> std::io::Result<File> {
    let no_follow = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    File::options().create(true).append(true).read(true).mode(0o600).custom_flags(no_follow).open(path)
}

/// Where trees are made. Whatever is in it when no build runs is a dead one's leftover.
pub fn work_dir(cache: &Path) -> PathBuf {
    cache.join("work")
}

const TAIL_LINES: usize = 15;
const TAIL_BYTES: u64 = 8 << 10;

/// The last lines written since `begin`.
fn tail(file: &mut File, begin: u64) -> std::io::Result<String> {
    let end = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(begin.max(end.saturating_sub(TAIL_BYTES))))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n"))
}

/// A word that the shell takes as it is.
pub fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
