//! Which user each QEMU runs as: one of its own, where this host allows that.
//!
//! Such a user owns no file, is nobody else's, and may open nothing that is closed to others: QEMU
//! inherits what it needs (`args::Handed`). So a QEMU that its guest broke can neither signal nor trace
//! another VM or the broker, nor connect to their sockets, nor open their files. A user is taken for one
//! run of a QEMU and written down nowhere: which are taken is seen by what runs, so that several brokers
//! of this host can share a range, and nothing is left to tidy up. Where `/proc` hides other users'
//! processes, brokers of different users do not see each other's and need ranges of their own.
//!
//! Root becomes another user just so. Everybody else does it in a user namespace that holds one user, and
//! then the broker's user, who owns the namespace, may signal and look at what runs in it. Blocking.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, test_kill_process};

use super::config::VmUids;
use crate::hypervisor::Accelerator;
use crate::lent_ids::{self, Ids};

/// Who may become any user takes these, if `/etc/subuid` lends it none: above what directories of users
/// and containers hand out by default, and below what systemd calls unfit.
const ANYBODYS: Ids = Ids { first: 2_100_000_000, count: 65_536 };
/// Of 65536 ids or more that are lent, these: packages' users, as components are built with them, are none
/// of them.
const MIDDLE: Ids = Ids { first: 20_000, count: 40_000 };
/// How often a user is looked for that another broker takes at the same moment.
const ATTEMPTS: usize = 8;
const COMPLAINT_BYTES_MAX: usize = 400;

/// Capabilities by their bits, see `linux/capability.h`.
const CAP_KILL: u64 = 1 << 5;
const CAP_SETGID: u64 = 1 << 6;
const CAP_SETUID: u64 = 1 << 7;

/// The users that VMs run as here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Uids {
    way: Way,
    /// The user N of the range has the group N.
    users: Ids,
    groups_first: u32,
    /// The groups QEMU has beside its own; the broker's if None.
    groups: Option<Vec<u32>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    /// As root.
    Direct,
    /// In a namespace for which this process says itself who is in it: it has `CAP_SETUID`.
    Namespace,
    /// In a namespace for which `newuidmap` says it, by `/etc/subuid`.
    LentNamespace,
}

/// One of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct User {
    uid: u32,
    gid: u32,
}

impl Uids {
    /// The users of `choice`, after one was tried out; or why there are none.
    pub fn find(choice: &VmUids, system: &Path, accelerator: Accelerator) -> Result<Self, String> {
        let way = way()?;
        let (users, groups) = match choice {
            VmUids::Range { first, last } => {
                let range = Ids { first: *first, count: last.saturating_sub(*first).saturating_add(1) };
                (range, range)
            }
            VmUids::Auto | VmUids::Off => offered(way)?,
        };
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        if let Some(name) = somebodys(&passwd, users) {
            return Err(format!("user {name} is one of {}-{}", users.first, users.last()));
        }
        let kvm = accelerator == Accelerator::Kvm;
        let groups_of_qemu = match (way, kvm.then(kvm_group).flatten()) {
            (_, None) => Some(Vec::new()),
            (Way::Direct, Some(group)) => Some(vec![group]),
            // A group that is not in the namespace can be kept, but not chosen.
            (Way::Namespace | Way::LentNamespace, Some(_)) => None,
        };
        let found = Self { way, users, groups_first: groups.first, groups: groups_of_qemu };
        found.try_out(system, &["--version"])?;
        if kvm {
            found
                .try_out(Path::new("/bin/sh"), &["-c", "exec 3<>/dev/kvm"])
                .map_err(|e| format!("{e}; is /dev/kvm for the group kvm, and is this user in it?"))?;
        }
        Ok(found)
    }

    /// The range, for messages.
    pub fn range(&self) -> String {
        format!("{}-{}", self.users.first, self.users.last())
    }

    /// Runs a program as one of the users.
    fn try_out(&self, program: &Path, args: &[&str]) -> Result<(), String> {
        let failed = |e: &dyn std::fmt::Display| format!("a process cannot become another user: {e}");
        let child = with_some(|| {
            let mut command = Command::new(program);
            command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            self.spawn(command, |mut command| command.spawn())
        });
        let child = match child {
            Ok(Some(child)) => child,
            // They are VMs that run on from an earlier broker: it is tried out.
            Err(e) if e.get_ref().is_some_and(|e| e.is::<Taken>()) => return Ok(()),
            Ok(None) => return Err(failed(&taken())),
            Err(e) => return Err(failed(&e)),
        };
        let output = child.wait_with_output().map_err(|e| failed(&e))?;
        if output.status.success() {
            return Ok(());
        }
        let args = args.join(" ");
        Err(format!("'{} {args}' as another user: {}", program.display(), complaint(&output)))
    }

    /// Starts `command` as a user that nobody else is, by `start`, which returns when it runs. None if
    /// somebody else took the user at the same time; then nothing runs.
    pub fn spawn<C: Send>(
        &self,
        mut command: Command,
        start: impl FnOnce(Command) -> io::Result<C> + Send,
    ) -> io::Result<Option<C>> {
        let user = self.pick()?;
        let (ours, theirs) = UnixStream::pair()?;
        let change = Change {
            user,
            namespace: self.way != Way::Direct,
            groups: self.groups.clone(),
            broker: theirs.into(),
            brokers_end: ours.as_raw_fd(),
        };
        // SAFETY: between fork and exec it makes plain system calls only, and takes no memory.
        unsafe {
            command.pre_exec(move || change.make());
        }
        std::thread::scope(|scope| {
            let starting = scope.spawn(|| start(command));
            let accompanied = self.accompany(ours, user);
            let started = starting.join().unwrap_or_else(|_| Err(io::Error::other("its thread panicked")));
            match accompanied? {
                Outcome::Changed => started.map(Some),
                Outcome::Taken => Ok(None),
                Outcome::Ended => started.and(Err(io::Error::other("it ended before it was another user"))),
            }
        })
    }

    /// A user that no process is now.
    fn pick(&self) -> io::Result<User> {
        let running = running()?;
        let mut random = [0; 4];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        let start = u32::from_le_bytes(random) % self.users.count;
        let offsets = (start..self.users.count).chain(0..start);
        let mut free =
            offsets.filter(|n| !running.iter().any(|(_, uids)| uids.contains(&(self.users.first + n))));
        let n = free.next().ok_or_else(taken)?;
        Ok(User { uid: self.users.first + n, gid: self.groups_first + n })
    }

    /// The broker's side of a [`Change`].
    fn accompany(&self, mut child: UnixStream, user: User) -> io::Result<Outcome> {
        if self.way != Way::Direct {
            let Some(pid) = asked(&mut child)? else { return Ok(Outcome::Ended) };
            self.populate(pid, user)?;
            child.write_all(&[1])?;
        }
        let Some(pid) = asked(&mut child)? else { return Ok(Outcome::Ended) };
        // Both looked first; who looks again after the change sees the other, or is seen.
        if running()?.iter().any(|(other, uids)| *other != pid && uids.contains(&user.uid)) {
            return Ok(Outcome::Taken);
        }
        // What could not be ended must not begin.
        let number = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
        test_kill_process(number).map_err(|e| {
            io::Error::new(io::ErrorKind::PermissionDenied, format!("it could not be ended again: {e}"))
        })?;
        child.write_all(&[1])?;
        Ok(Outcome::Changed)
    }

    /// Says who is in the namespace of process `pid`: this user alone, by the same number.
    fn populate(&self, pid: i32, user: User) -> io::Result<()> {
        for (tool, file, id) in [("newuidmap", "uid_map", user.uid), ("newgidmap", "gid_map", user.gid)] {
            if self.way == Way::Namespace {
                fs::write(format!("/proc/{pid}/{file}"), format!("{id} {id} 1\n"))?;
                continue;
            }
            let (pid, id) = (pid.to_string(), id.to_string());
            let mut command = Command::new(tool);
            command.args([&pid, &id, &id, "1"]).stdin(Stdio::null());
            let output = command.output().map_err(|e| io::Error::new(e.kind(), format!("{tool}: {e}")))?;
            if !output.status.success() {
                return Err(io::Error::other(format!("{tool}: {}", complaint(&output))));
            }
        }
        Ok(())
    }
}

enum Outcome {
    Changed,
    Taken,
    /// The child is gone, and whoever started it knows why.
    Ended,
}

/// Tries until something comes of it, a few times.
pub fn with_some<T, E>(mut attempt: impl FnMut() -> Result<Option<T>, E>) -> Result<Option<T>, E> {
    for _ in 0..ATTEMPTS {
        if let Some(done) = attempt()? {
            return Ok(Some(done));
        }
    }
    Ok(None)
}

#[derive(Debug, thiserror::Error)]
#[error("all users that VMs may run as are taken: widen hypervisor.vm_uids")]
struct Taken;

pub fn taken() -> io::Error {
    io::Error::other(Taken)
}

/// Says that VMs share the broker's user, and why.
pub fn shared(reason: &str) -> String {
    format!(
        "all VMs run as the broker's user, so a broken QEMU could call the broker's API and touch other VMs' \
         processes: {reason}"
    )
}

/// What the child does between fork and exec. The broker answers twice: when it has said who is in the
/// child's namespace, and when nobody else is the child's user.
struct Change {
    user: User,
    namespace: bool,
    groups: Option<Vec<u32>>,
    broker: OwnedFd,
    /// As long as the child has this end, too, it would never see the broker's being closed.
    brokers_end: RawFd,
}

impl Change {
    /// By system calls of the kernel: the C library's would tell threads that are not there.
    fn make(&self) -> io::Result<()> {
        let User { uid, gid } = self.user;
        // SAFETY: the number is the broker's end, which nothing in the child owns.
        unsafe { libc::close(self.brokers_end) };
        if self.namespace {
            // SAFETY: takes no pointer.
            done(unsafe { libc::syscall(libc::SYS_unshare, libc::CLONE_NEWUSER) })?;
            self.ask()?;
        }
        if let Some(groups) = &self.groups {
            // SAFETY: the list is as long as said.
            done(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
        }
        // SAFETY: these take no pointer.
        done(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
        done(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
        // Whatever setuid program it finds a way to.
        done(unsafe { libc::syscall(libc::SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
        self.ask()
    }

    fn ask(&self) -> io::Result<()> {
        let number = std::process::id().to_le_bytes();
        rustix::net::send(&self.broker, &number, rustix::net::SendFlags::NOSIGNAL)?;
        let mut answer = [0u8];
        match rustix::io::read(&self.broker, &mut answer)? {
            1 => Ok(()),
            _ => Err(rustix::io::Errno::PERM.into()),
        }
    }
}

fn done(returned: libc::c_long) -> io::Result<()> {
    if returned == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The process id with which a child asks for leave to go on; None if it is gone.
fn asked(child: &mut UnixStream) -> io::Result<Option<i32>> {
    let mut number = [0; 4];
    match child.read_exact(&mut number) {
        Ok(()) => Ok(Some(i32::from_le_bytes(number))),
        Err(e) if matches!(e.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => {
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// All processes and the users they are: real, effective, saved and for files.
fn running() -> io::Result<Vec<(i32, Vec<u32>)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let status = fs::read(format!("/proc/{pid}/status")).unwrap_or_default();
        found.push((pid, uids_in(&String::from_utf8_lossy(&status))));
    }
    Ok(found)
}

fn uids_in(status: &str) -> Vec<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    line.unwrap_or_default().split_whitespace().filter_map(|id| id.parse().ok()).collect()
}

/// How this process can start others as other users.
fn way() -> Result<Way, String> {
    let status = fs::read_to_string("/proc/self/status").map_err(|e| format!("/proc/self/status: {e}"))?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let held = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0);
    let holds = |wanted: u64| held & wanted == wanted;
    if rustix::process::geteuid().is_root() && holds(CAP_SETUID | CAP_SETGID | CAP_KILL) {
        return Ok(Way::Direct);
    }
    if holds(CAP_SETUID | CAP_SETGID) {
        return Ok(Way::Namespace);
    }
    if status.lines().any(|line| line.split_whitespace().eq(["NoNewPrivs:", "1"])) {
        return Err(
            "newuidmap has no effect under NoNewPrivileges=yes; with CAP_SETUID and CAP_SETGID the broker \
                    does without, see deploy/systemd/vm-users.conf"
                .into(),
        );
    }
    match lent_ids::missing_tool() {
        Some(tool) => Err(format!("{tool} was not found: install the package uidmap")),
        None => Ok(Way::LentNamespace),
    }
}

/// The users and groups there are to take from when the operator names none.
fn offered(way: Way) -> Result<(Ids, Ids), String> {
    match lent_ids::lent() {
        [Some(users), Some(groups)] => Ok(of_lent(users, groups)),
        _ if way == Way::LentNamespace => {
            let user = lent_ids::user();
            Err(format!(
                "no ids are lent to {user} in /etc/subuid and /etc/subgid; as root: usermod \
                 --add-subuids 1000000-1065535 --add-subgids 1000000-1065535 {user} (any range no other line \
                 there has), and restart the broker"
            ))
        }
        _ if lent_ids::lent_to_all().iter().any(|ids| ids.overlaps(ANYBODYS)) => {
            Err("/etc/subuid lends the users that VMs would run as to others: set hypervisor.vm_uids".into())
        }
        _ => Ok((ANYBODYS, ANYBODYS)),
    }
}

fn of_lent(users: Ids, groups: Ids) -> (Ids, Ids) {
    let count = users.count.min(groups.count);
    let (skipped, count) = if count > MIDDLE.last() { (MIDDLE.first, MIDDLE.count) } else { (0, count) };
    let part = |ids: Ids| Ids { first: ids.first.saturating_add(skipped), count };
    (part(users), part(groups))
}

/// Somebody of `/etc/passwd` who is among the users; root always would be.
fn somebodys(passwd: &str, users: Ids) -> Option<String> {
    let mut lines = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let own = rustix::process::geteuid().as_raw();
    if users.contains(0) || users.contains(own) {
        return Some(if users.contains(0) { "root".into() } else { lent_ids::user() });
    }
    let theirs = lines
        .find(|fields| fields.get(2).and_then(|uid| uid.parse().ok()).is_some_and(|uid| users.contains(uid)));
    theirs.map(|fields| fields[0].to_owned())
}

/// The group one must be in to use KVM, if that matters.
fn kvm_group() -> Option<u32> {
    let device = fs::metadata("/dev/kvm").ok()?;
    let mode = device.permissions().mode();
    (mode & 0o006 != 0o006 && mode & 0o060 == 0o060).then(|| device.gid())
}

/// What a program that failed said, safe to print.
fn complaint(output: &std::process::Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    let said: String = said.trim().escape_debug().take(COMPLAINT_BYTES_MAX).collect();
    if said.is_empty() { output.status.to_string() } else { said }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_read_from_the_kernels_text() {
        assert_eq!(uids_in("Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t9\t9\t9\t9\n"), [1, 2, 3, 4]);
        assert!(uids_in("Name:\tx\n").is_empty());
        let own = rustix::process::geteuid().as_raw();
        let me = std::process::id() as i32;
        assert!(running().unwrap().iter().any(|(pid, uids)| *pid == me && uids.contains(&own)));
    }

    #[test]
    fn lent_ids_are_taken_where_no_package_has_users() {
        let ids = |first, count| Ids { first, count };
        let (users, groups) = of_lent(ids(100_000, 65_536), ids(300_000, 70_000));
        assert_eq!((users, groups), (ids(120_000, 40_000), ids(320_000, 40_000)));
        let (users, groups) = of_lent(ids(100_000, 10), ids(300_000, 7));
        assert_eq!((users, groups), (ids(100_000, 7), ids(300_000, 7)));
    }

    #[test]
    fn nobodys_users_are_wanted() {
        let passwd = "root:x:0:0::/root:/bin/sh\nada:x:5000:5000::/:/bin/sh\n";
        let named = |first, count| somebodys(passwd, Ids { first, count });
        assert_eq!(named(0, 10).as_deref(), Some("root"));
        assert_eq!(named(4_990, 11).as_deref(), Some("ada"));
        assert_eq!(named(4_990, 10), None);
    }

    /// A VM's user has the group of the device and no other, or is not made do with.
    #[test]
    fn a_vms_user_must_be_able_to_use_kvm_where_kvm_is_used() {
        let Ok(device) = fs::metadata("/dev/kvm") else {
            println!("SKIPPED: there is no /dev/kvm");
            return;
        };
        if way() != Ok(Way::Direct) || fs::File::open("/dev/kvm").is_err() {
            println!("SKIPPED: this needs root and a KVM that can be opened");
            return;
        }
        let mode = device.permissions().mode();
        let found = Uids::find(&VmUids::Auto, Path::new("/bin/true"), Accelerator::Kvm);
        match (found, mode & 0o006 == 0o006, mode & 0o060 == 0o060) {
            (Ok(uids), true, _) => assert_eq!(uids.groups, Some(Vec::new())),
            (Ok(uids), false, true) => assert_eq!(uids.groups, Some(vec![device.gid()])),
            (Err(reason), false, false) => assert!(reason.contains("for the group kvm"), "{reason}"),
            other => panic!("{other:?}, mode {mode:o}"),
        }
    }

    /// The other half of what keeps two brokers from one user: who sees another after the change gives way.
    #[test]
    fn a_user_that_another_process_is_gives_way() {
        if way() != Ok(Way::Direct) {
            println!("SKIPPED: this needs root");
            return;
        }
        let uids = Uids {
            way: Way::Direct,
            users: Ids { first: 2_130_000_000 + std::process::id() % 1_000_000, count: 1 },
            groups_first: 2_130_000_000,
            groups: Some(Vec::new()),
        };
        let sleep = || {
            let mut command = Command::new("sleep");
            command.arg("60");
            command
        };
        let mut first = uids.spawn(sleep(), |mut c| c.spawn()).unwrap().unwrap();
        let error = uids.spawn(sleep(), |mut c| c.spawn()).unwrap_err();
        assert_eq!(error.to_string(), taken().to_string());
        // As if both had looked before either had changed.
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&std::process::id().to_le_bytes()).unwrap();
        let user = User { uid: uids.users.first, gid: uids.groups_first };
        assert!(matches!(uids.accompany(ours, user).unwrap(), Outcome::Taken));
        first.kill().unwrap();
        first.wait().unwrap();
        let mut next = uids.spawn(sleep(), |mut c| c.spawn()).unwrap().unwrap();
        next.kill().unwrap();
        next.wait().unwrap();
    }
}
