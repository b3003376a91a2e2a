//! What a QEMU process is given before it starts: its files and sockets, open, its end of each card, and
//! the walls around it.
//!
//! QEMU starts no process and gains no privilege (`args::SANDBOX`). What needs either is done here:
//! a bridge's tap device is opened by the distribution's `qemu-bridge-helper`, which hands it over
//! by `SCM_RIGHTS`, and a user network's `guest-link` is started. Blocking.

use std::fs::OpenOptions;
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use command_fds::{CommandFdExt, FdMapping};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope, path_beneath_rules,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::args::{self, Handed, Host, Link};
use super::uids::Uids;
use crate::hypervisor::{DriverError, Machine};
use crate::unix_socket;

/// Rights of Linux 6.12, of which the kernel takes those it knows.
const RIGHTS: ABI = ABI::V6;
const COMPLAINT_BYTES_MAX: u64 = 4096;
/// What the bridge helper's socket is in it.
const HELPER_FD: i32 = 3;
/// What QEMU and the libraries it loads read on any host.
const SYSTEM_READ: [&str; 9] =
    ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/etc/qemu", "/proc", "/sys"];
const DEVICES: [&str; 5] = ["/dev/kvm", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"];

/// The programs that make the other ends of cards.
#[derive(Clone, Debug)]
pub struct Wiring {
    /// Without it cards of user networks are QEMU's own.
    pub passt: Option<PathBuf>,
    /// The program with the command `guest-link`.
    pub link: PathBuf,
    pub bridge_helper: PathBuf,
}

/// Everything [`super::process::spawn`] needs to make a QEMU.
#[derive(Clone, Debug)]
pub struct Launch {
    pub system: PathBuf,
    pub machine: Machine,
    pub host: Host,
    pub wiring: Wiring,
    pub reach: Reach,
    /// The users VMs run as, where that is not the broker's.
    pub uids: Option<Arc<Uids>>,
    /// Its guest runs. Otherwise it only is brought as far as that.
    pub executes: bool,
}

/// A command line, and what the descriptors in it stand for.
pub struct Opened {
    pub argv: Vec<String>,
    pub fds: Vec<OwnedFd>,
}

impl Launch {
    /// Opens all that QEMU inherits. Dropping what it returns closes it again.
    pub fn open(
        &self,
        complaints: &std::fs::File,
        detach: impl Fn(&mut Command),
    ) -> Result<Opened, DriverError> {
        let vm = self.machine.spec.id;
        let mut fds = Vec::new();
        let mut open = |what: Handed| {
            let failed = |action, path: &Path| {
                let path = path.to_owned();
                move |source| DriverError::Io { vm, action, path, source }
            };
            let by = |options: &mut OpenOptions, path: &Path| {
                options.open(path).map(OwnedFd::from).map_err(failed("open", path))
            };
            let fd = match &what {
                Handed::Read(path) => by(OpenOptions::new().read(true), path)?,
                Handed::Write(path) => by(OpenOptions::new().read(true).write(true), path)?,
                Handed::Append(path) => by(OpenOptions::new().append(true).create(true).mode(0o600), path)?,
                Handed::Listen(path) => {
                    unix_socket::bind(path).map(OwnedFd::from).map_err(failed("make the socket", path))?
                }
                Handed::Card(Link::Isolated) => isolated(&self.wiring, complaints, &detach)
                    .map_err(|source| DriverError::Run { path: self.wiring.link.clone(), source })?,
                Handed::Card(Link::Bridge(bridge)) => {
                    let helper = &self.wiring.bridge_helper;
                    tap(helper, bridge).map_err(|source| DriverError::Run { path: helper.clone(), source })?
                }
            };
            let number = fd.as_raw_fd();
            fds.push(fd);
            Ok(number)
        };
        let argv = args::argv(&self.machine, &self.host, &mut open)?;
        Ok(Opened { argv, fds })
    }
}

/// The part of the file system a QEMU may open; everything else is closed to it. Of its machine that is
/// nothing: it inherits what it needs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reach {
    read: Vec<PathBuf>,
    /// Whether it makes connections itself, for a user network of its own.
    connects: bool,
}

impl Reach {
    pub fn of(system: &Path, connects: bool) -> Self {
        let mut read = vec![system.to_owned()];
        if connects {
            // Its resolver's name.
            read.push("/etc/resolv.conf".into());
        }
        Self { read, connects }
    }
}

/// Confines the calling thread, and what it starts, for good. False where the kernel has no
/// Landlock; one with less of it than wished for still closes files.
pub fn confine(reach: &Reach) -> io::Result<bool> {
    let broken = |e: &dyn std::fmt::Display| io::Error::other(format!("Landlock: {e}"));
    let writing = AccessFs::from_all(RIGHTS) & !AccessFs::Execute;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(RIGHTS))
        .and_then(|r| r.scope(Scope::from_all(RIGHTS)))
        .map_err(|e| broken(&e))?;
    if !reach.connects {
        rules = rules.handle_access(AccessNet::from_all(RIGHTS)).map_err(|e| broken(&e))?;
    }
    let status = rules
        .create()
        .and_then(|r| r.add_rules(path_beneath_rules(SYSTEM_READ, AccessFs::from_read(RIGHTS))))
        .and_then(|r| r.add_rules(path_beneath_rules(&reach.read, AccessFs::from_read(RIGHTS))))
        .and_then(|r| r.add_rules(path_beneath_rules(DEVICES, writing)))
        .and_then(|r| r.restrict_self())
        .map_err(|e| broken(&e))?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

/// Whether this kernel confines by Landlock at all.
pub fn is_confinable() -> bool {
    let nothing = Reach { read: Vec::new(), connects: false };
    // In a thread of its own, which ends with it.
    std::thread::spawn(move || confine(&nothing).unwrap_or(false)).join().unwrap_or(false)
}

/// Starts a `guest-link`, which lives as long as what is returned is open somewhere.
fn isolated(
    wiring: &Wiring,
    complaints: &std::fs::File,
    detach: &impl Fn(&mut Command),
) -> io::Result<OwnedFd> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, "passt is gone: install the package passt");
    let passt = wiring.passt.as_ref().ok_or_else(missing)?;
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new(&wiring.link);
    command
        .arg("guest-link")
        .arg(passt)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(complaints.try_clone()?);
    detach(&mut command);
    let started = command.spawn().map_err(|e| named(&wiring.link, &e))?;
    // It ends when QEMU does; somebody has to take note of that as long as this process lives.
    std::thread::Builder::new().name("guest-link".into()).spawn(move || {
        let mut started = started;
        started.wait()
    })?;
    Ok(ours.into())
}

/// A new tap device in a bridge, which goes with its last descriptor. The helper's own list of
/// bridges, `/etc/qemu/bridge.conf`, has to allow it.
fn tap(helper: &Path, bridge: &str) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new(helper);
    command
        .args(["--use-vnet".to_owned(), format!("--br={bridge}"), format!("--fd={HELPER_FD}")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .fd_mappings(vec![FdMapping { parent_fd: theirs.into(), child_fd: HELPER_FD }])
        .map_err(io::Error::other)?;
    let mut child = command.spawn().map_err(|e| named(helper, &e))?;
    // The helper's end closes when it ends, not when this one does.
    drop(command);
    let mut said = String::new();
    if let Some(stderr) = child.stderr.take() {
        let _ = stderr.take(COMPLAINT_BYTES_MAX).read_to_string(&mut said);
    }
    let status = child.wait()?;
    let received = if status.success() { received_fd(&ours)? } else { None };
    received.ok_or_else(|| {
        let said = said.trim().escape_debug().to_string();
        io::Error::other(format!(
            "the bridge {bridge} cannot be joined: {} says '{said}', {status}; \
             is there such a bridge, and does /etc/qemu/bridge.conf say 'allow {bridge}'?",
            helper.display()
        ))
    })
}

fn received_fd(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    Ok(control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    }))
}

fn named(program: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", program.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;

    /// A thread that confines itself as a QEMU is confined, before it becomes one.
    #[test]
    fn a_confined_thread_opens_nothing_beside_its_machine() {
        if !is_confinable() {
            let _ = writeln!(std::io::stderr(), "SKIPPED: this kernel has no Landlock");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["key", "system", "disk"] {
            fs::write(at(name), name).unwrap();
        }
        let reach = Reach::of(&at("system"), false);
        let (key, system, disk, new) = (at("key"), at("system"), at("disk"), at("new"));
        let mut inherited = OpenOptions::new().read(true).write(true).open(&disk).unwrap();
        std::thread::spawn(move || {
            assert!(confine(&reach).unwrap());
            let denied = |e: io::Error| e.kind() == io::ErrorKind::PermissionDenied;
            assert!(denied(fs::read(&key).unwrap_err()));
            assert!(denied(fs::write(&system, "x").unwrap_err()));
            assert_eq!(fs::read(&system).unwrap(), b"system");
            // Its machine's files it has open, and opens no other way.
            inherited.write_all(b"x").unwrap();
            inherited.set_len(2).unwrap();
            assert!(denied(fs::read(&disk).unwrap_err()));
            assert!(denied(unix_socket::bind(&new).unwrap_err()));
            assert!(fs::read("/etc/shadow").is_err() && fs::read("/etc/passwd").is_err());
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_bridge_that_is_not_there_is_named() {
        let helper = Path::new("/usr/lib/qemu/qemu-bridge-helper");
        if !helper.is_file() {
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED: {} is not there: install qemu-system-common",
                helper.display()
            );
            return;
        }
        let error = tap(helper, "cicada-none").unwrap_err().to_string();
        assert!(error.contains("bridge cicada-none") && error.contains("bridge.conf"), "{error}");
    }
}
