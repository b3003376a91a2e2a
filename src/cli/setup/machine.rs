//! The machine that is set up: what is found there, and how a plan is carried out.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};

use crate::durable;
use crate::interface::problem::{Problem, ProblemKind};

use super::plan::{Facts, Found, Ids, Kind, Owner, PROGRAM, SYSUSERS, Step, USER, Wanted, What};

/// Longer files are none of ours.
const TEXT_BYTES_MAX: u64 = 1 << 20;
/// A repository has no deeper directories.
const DEPTH_MAX: usize = 64;
const KVM: &str = "kvm";
/// Units here go before those that are installed by nobody's package.
const UNITS_BEFORE: [&str; 2] =
    ["/etc/systemd/system/cicada.service", "/etc/systemd/system/cicada-guests.service"];

/// A machine below a directory: `/` is this one.
pub struct Machine {
    root: PathBuf,
}

impl Machine {
    pub fn below(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Where a path of the machine is.
    pub fn at(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn is_this_one(&self) -> bool {
        self.root == Path::new("/")
    }

    pub fn facts(&self, wanted: &[Wanted]) -> Result<Facts, Problem> {
        let broker = self.broker();
        let mut facts = Facts { broker, may_use_kvm: self.may_use_kvm(), ..Facts::default() };
        for w in wanted {
            let path = self.at(&w.path);
            if let Some(found) = found(&path, &w.what).map_err(about(&path))? {
                if w.what == What::Directory && w.owner == Owner::Broker && found.kind == Kind::Directory {
                    let count = roots(&path, None).map_err(about(&path))?;
                    facts.roots.insert(w.path.clone(), count);
                }
                facts.at.insert(w.path.clone(), found);
            }
        }
        facts.same_program = self.same_program().unwrap_or(false);
        facts.before = UNITS_BEFORE.map(PathBuf::from).into_iter().filter(|p| self.at(p).exists()).collect();
        Ok(facts)
    }

    fn broker(&self) -> Option<Ids> {
        let passwd = fs::read_to_string(self.at(Path::new("/etc/passwd"))).unwrap_or_default();
        let known = passwd.lines().find_map(ids_in);
        // Users may be known to this machine from elsewhere.
        known.or_else(|| {
            let asked = self.is_this_one().then(|| Command::new("getent").args(["passwd", USER]).output());
            asked.and_then(Result::ok).and_then(|o| ids_in(String::from_utf8_lossy(&o.stdout).trim()))
        })
    }

    fn may_use_kvm(&self) -> bool {
        let groups = fs::read_to_string(self.at(Path::new("/etc/group"))).unwrap_or_default();
        groups.lines().any(|line| {
            let fields: Vec<_> = line.split(':').collect();
            fields.first() == Some(&KVM) && fields.get(3).is_some_and(|m| m.split(',').any(|u| u == USER))
        })
    }

    fn same_program(&self) -> io::Result<bool> {
        let (there, this) = (self.at(Path::new(PROGRAM)), std::env::current_exe()?);
        let (a, b) = (fs::metadata(&there)?, fs::metadata(&this)?);
        if (a.dev(), a.ino()) == (b.dev(), b.ino()) {
            return Ok(true);
        }
        Ok(a.len() == b.len() && hash(&there)? == hash(&this)?)
    }

    /// Carries one step out. All of it may be done again.
    pub fn perform(&self, step: &Step) -> Result<(), Problem> {
        match step {
            Step::AddUser { .. } => self.add_user(),
            Step::MakeDirectory { path, owner, mode } => {
                let path = self.at(path);
                let made = || {
                    let parent = path.parent().unwrap_or(&path);
                    DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
                    DirBuilder::new().mode(0o700).create(&path)?;
                    give(&File::open(&path)?, self.ids(*owner)?, *mode)?;
                    durable::sync_dir_of(&path)
                };
                made().map_err(about(&path))
            }
            Step::WriteFile { path, text, owner, mode, replaces } => {
                let path = self.at(path);
                self.write(&path, text.as_bytes(), *owner, *mode, *replaces).map_err(about(&path))
            }
            Step::CopyProgram { path } => {
                let path = self.at(path);
                let copied = || {
                    let bytes = fs::read(std::env::current_exe()?)?;
                    self.write(&path, &bytes, Owner::Root, 0o755, false)
                };
                copied().map_err(about(&path))
            }
            Step::Give { path, owner, mode } => {
                let path = self.at(path);
                // What lies in a directory of the broker's may be a link of its making by now.
                let given = || {
                    let flags = if path.is_dir() { OFlags::empty() } else { OFlags::NOFOLLOW };
                    let flags = (flags | OFlags::NONBLOCK).bits().cast_signed();
                    let file = OpenOptions::new().read(true).custom_flags(flags).open(&path)?;
                    if file.metadata()?.is_file() && file.metadata()?.nlink() > 1 {
                        return Err(io::Error::other("has another name as well"));
                    }
                    give(&file, self.ids(*owner)?, *mode)
                };
                given().map_err(about(&path))
            }
            Step::GiveAll { path, .. } => {
                let path = self.at(path);
                let given = self.ids(Owner::Broker).and_then(|ids| roots(&path, Some(ids)));
                given.map(drop).map_err(about(&path))
            }
            Step::Reload => match self.is_this_one() && Path::new("/run/systemd/system").is_dir() {
                true => run(Command::new("systemctl").arg("daemon-reload"), &[]),
                // It reads them when it starts.
                false => Ok(()),
            },
        }
    }

    fn add_user(&self) -> Result<(), Problem> {
        let mut command = Command::new("systemd-sysusers");
        if !self.is_this_one() {
            let mut root = std::ffi::OsString::from("--root=");
            root.push(&self.root);
            command.arg(root);
        }
        run(command.arg("-"), SYSUSERS.as_bytes())?;
        match self.broker() {
            Some(_) => Ok(()),
            None => {
                let reason = "was not made, although systemd-sysusers found nothing wrong";
                Err(Problem::new(ProblemKind::Failed, format!("user {USER}"), reason))
            }
        }
    }

    fn ids(&self, owner: Owner) -> io::Result<(u32, u32)> {
        owner.ids(self.broker()).ok_or_else(|| io::Error::other(format!("there is no user {USER}")))
    }

    fn write(&self, path: &Path, bytes: &[u8], owner: Owner, mode: u32, replaces: bool) -> io::Result<()> {
        let ids = self.ids(owner)?;
        if let Some(parent) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
        }
        // Whole or not at all: a service may be started from it at any time.
        let mut part = path.as_os_str().to_owned();
        part.push(".cicada-setup");
        let part = PathBuf::from(part);
        let _ = fs::remove_file(&part);
        let written = || {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
            file.write_all(bytes)?;
            give(&file, ids, mode)?;
            file.sync_all()?;
            match replaces {
                true => fs::rename(&part, path)?,
                false => crate::compose::place(&part, path)?,
            }
            durable::sync_dir_of(path)
        };
        written().inspect_err(|_| drop(fs::remove_file(&part)))
    }
}

fn about(path: &Path) -> impl FnOnce(io::Error) -> Problem + '_ {
    move |e| Problem::from_path(path.display().to_string(), &e)
}

fn ids_in(line: &str) -> Option<Ids> {
    let mut fields = line.split(':');
    (fields.next() == Some(USER)).then_some(())?;
    let user = fields.nth(1)?.parse().ok()?;
    Some(Ids { user, group: fields.next()?.parse().ok()? })
}

fn hash(path: &Path) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok(hasher.finalize())
}

fn found(path: &Path, what: &What) -> io::Result<Option<Found>> {
    let meta = match fs::symlink_metadata(path) {
        // Directories are followed, as systemd does.
        Ok(meta) if meta.is_symlink() && *what == What::Directory => fs::metadata(path),
        other => other,
    };
    let meta = match meta {
        Ok(meta) => meta,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    let kind = match meta.file_type() {
        t if t.is_dir() => Kind::Directory,
        t if t.is_file() => Kind::File,
        _ => Kind::Other,
    };
    let reads = kind == Kind::File && matches!(what, What::Shipped(_)) && meta.len() <= TEXT_BYTES_MAX;
    let text = if reads { read_text(path)? } else { None };
    Ok(Some(Found { kind, user: meta.uid(), group: meta.gid(), mode: meta.mode() & 0o7777, text }))
}

fn read_text(path: &Path) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(TEXT_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8(bytes).ok())
}

fn give(file: &File, (user, group): (u32, u32), mode: u32) -> io::Result<()> {
    fchown(file, Some(user), Some(group))?;
    // After it: a change of owner takes bits away.
    file.set_permissions(Permissions::from_mode(mode))
}

/// Counts what in a directory is root's, and gives it to others. Links are not followed, and a file of several
/// names is left: the directory is another user's, who may have put anything there.
fn roots(dir: &Path, give_to: Option<(u32, u32)>) -> io::Result<u64> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(dir, flags, Mode::empty())?;
    roots_in(&dir, give_to, DEPTH_MAX)
}

fn roots_in(dir: &OwnedFd, give_to: Option<(u32, u32)>, depth: usize) -> io::Result<u64> {
    let mut count = 0;
    if depth == 0 {
        return Ok(0);
    }
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found = match rustix::fs::openat(dir, name, flags, Mode::empty()) {
            Ok(found) => found,
            Err(rustix::io::Errno::NOENT) => continue,
            Err(e) => return Err(e.into()),
        };
        let stat = rustix::fs::fstat(&found)?;
        let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if stat.st_uid == 0 && (is_dir || stat.st_nlink == 1) {
            count += 1;
            if let Some((user, group)) = give_to {
                let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
                rustix::fs::chownat(&found, c"", Some(user), Some(group), AtFlags::EMPTY_PATH)?;
            }
        }
        if is_dir {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let below = rustix::fs::openat(found.as_fd(), c".", flags, Mode::empty())?;
            count += roots_in(&below, give_to, depth - 1)?;
        }
    }
    Ok(count)
}

fn run(command: &mut Command, input: &[u8]) -> Result<(), Problem> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut ran = || {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input)?;
        }
        child.wait_with_output()
    };
    match ran() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
            Err(Problem::new(ProblemKind::Failed, name, format!("failed: {said}")))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let problem = Problem::new(ProblemKind::Missing, name, "is not installed");
            Err(problem.next("install systemd; without it make the user and run the broker in your own way"))
        }
        Err(e) => Err(Problem::from_error(ProblemKind::Failed, name, &e)),
    }
}
