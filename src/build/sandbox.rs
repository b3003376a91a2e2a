//! Where package tools run: a tree in its own mount, network, process and IPC namespaces, gone with
//! all its mounts when the command ends, however it ends. Needs root.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::error::BuildError;
use crate::component::recipe::EPOCH_S;

/// Set up inside the namespaces, before the step's own commands. `place` and `inside` are for
/// commands that run outside the tree: a link in it must not lead them elsewhere.
const PRELUDE: &str = r#"
if [ -n "$LOWER" ]; then
    mount -t overlay overlay -o "lowerdir=$LOWER,upperdir=$UPPER,workdir=$WORK,redirect_dir=off,metacopy=off,index=off" "$ROOT"
else
    mount --bind "$UPPER" "$ROOT"
fi
[ ! -d "$ROOT/proc" ] || mount -t proc proc "$ROOT/proc"
[ ! -d "$ROOT/tmp" ] || mount -t tmpfs -o mode=1777 tmpfs "$ROOT/tmp"
if [ -d "$ROOT/run" ]; then
    mount -t tmpfs -o mode=755 tmpfs "$ROOT/run"
    mkdir "$ROOT/run/cicada" "$ROOT/run/lock"
    mount --bind "$SHARED" "$ROOT/run/cicada"
fi
if [ -d "$ROOT/dev" ]; then
    mount -t tmpfs -o mode=755 tmpfs "$ROOT/dev"
    for node in null:3 zero:5 full:7 random:8 urandom:9; do
        mknod -m 666 "$ROOT/dev/${node%:*}" c 1 "${node#*:}"
    done
    mknod -m 666 "$ROOT/dev/tty" c 5 0
    ln -s /proc/self/fd "$ROOT/dev/fd"
    mkdir "$ROOT/dev/shm" "$ROOT/dev/pts"
fi
inside() {
    parent=$(realpath -m -- "$ROOT/$(dirname -- "$1")")
    case "$parent/" in "$ROOT"/*) ;; *) echo "$1 leads out of the tree" >&2; exit 1 ;; esac
    mkdir -p -- "$parent"
    printf '%s/%s' "$parent" "$(basename -- "$1")"
}
in_tree() {
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
        DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true SYSTEMD_OFFLINE=1 \
        SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" chroot "$ROOT" "$@"
}
"#;

/// A tree being built, in a directory of its own: removed when dropped, unless kept.
#[derive(Debug)]
pub struct Sandbox {
    component: String,
    dir: tempfile::TempDir,
    lower: Option<PathBuf>,
    log: PathBuf,
}

impl Sandbox {
    /// An empty tree. `cache` is where the work is done.
    pub fn new(component: &str, cache: &Path) -> Result<Self, BuildError> {
        let cache = fs::canonicalize(cache).map_err(BuildError::read(cache))?;
        let odd = |c: char| !(c.is_ascii_alphanumeric() || "/._-+@".contains(c));
        if cache.to_str().is_none_or(|text| text.contains(odd)) {
            let reason = "its name has characters that mount options cannot carry";
            return Err(BuildError::CacheDirectory { path: cache, reason });
        }
        let work = work_dir(&cache);
        fs::create_dir_all(&work).map_err(BuildError::write(&work))?;
        let dir = tempfile::Builder::new().prefix(&format!("{component}-")).tempdir_in(&work);
        let dir = dir.map_err(BuildError::write(&work))?;
        let logs = cache.join("logs");
        fs::create_dir_all(&logs).map_err(BuildError::write(&logs))?;
        let log = logs.join(format!("{component}.log"));
        File::create(&log).map_err(BuildError::write(&log))?;
        let sandbox = Self { component: component.to_owned(), dir, lower: None, log };
        for part in [sandbox.upper(), sandbox.path("work"), sandbox.path("root"), sandbox.shared()] {
            // The upper directory's own mode becomes that of `/`.
            fs::DirBuilder::new().mode(0o755).create(&part).map_err(BuildError::write(&part))?;
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
            .args(["--mount", "--propagation", "private", "--net", "--ipc", "--uts", "--pid", "--fork"])
            .args(["--kill-child=KILL", "--", "sh", "-euc", &script])
            .env("LOWER", self.lower.as_deref().unwrap_or(Path::new("")))
            .env("UPPER", self.upper())
            .env("WORK", self.path("work"))
            .env("ROOT", self.path("root"))
            .env("SHARED", self.shared())
            .envs(variables.iter().copied());
        self.command(step, "unshare", "util-linux", command)
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
        let open = File::options().create(true).append(true).read(true).open(&log);
        let mut file = open.map_err(BuildError::write(&log))?;
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
