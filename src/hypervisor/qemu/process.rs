//! QEMU processes: started so that they outlive the broker, found again by the next one, and
//! signalled through a pidfd, so that never a stranger with a recycled number is meant.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::{Child, Command};

use super::args::{self, file};
use super::launch::{self, Launch, Reach};
use super::uids;
use crate::durable;
use crate::hypervisor::DriverError;
use crate::types::{ByteSize, VmId};

/// Clock ticks a second in `/proc`: USER_HZ, fixed by the kernel's interface on x86-64 and arm64.
const TICKS_PER_SECOND: u64 = 100;
/// How much of a log's end is shown in an error.
const TAIL_BYTES: u64 = 4096;
const TAIL_LINES: usize = 5;

/// A process that can be signalled; cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle {
    pub pid: i32,
    pidfd: Arc<OwnedFd>,
}

impl Handle {
    fn open(pid: i32) -> io::Result<Self> {
        let number = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
        Ok(Self { pid, pidfd: Arc::new(pidfd_open(number, PidfdFlags::empty())?) })
    }

    /// A process that has ended already is no error.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// A process whose end can be awaited.
#[derive(Debug)]
pub struct Process {
    pub handle: Handle,
    // Only of a child can the exit status be had.
    child: Option<Child>,
}

impl Process {
    /// One that was started by an earlier driver.
    pub fn adopted(handle: Handle) -> Self {
        Self { handle, child: None }
    }

    /// Waits for the end, without polling. The exit status is known of own children only.
    pub async fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        if let Some(child) = &mut self.child {
            return child.wait().await.map(Some);
        }
        // A pidfd becomes readable when its process ends.
        let own = self.handle.pidfd.try_clone()?;
        // SAFETY: the descriptor is owned by what registers it, and stays the same until dropped.
        let fd = unsafe { AsyncFd::register_with_interest(own, Interest::READABLE) }
            .map_err(|e| e.into_parts().1)?;
        fd.readable().await?.retain_ready();
        Ok(None)
    }
}

/// Starts QEMU in a session of its own, so that no signal meant for the broker reaches it, with
/// its complaints going to a file. The record is durable before and after; on error no process is
/// left, for nobody would know of it.
pub fn spawn(launch: &Launch, state_dir: &Path) -> Result<Process, DriverError> {
    let run = |source| DriverError::Run { path: launch.system.clone(), source };
    let log = fresh_log(state_dir).map_err(run)?;
    Record::Starting.write(state_dir).map_err(run)?;
    let runtime = tokio::runtime::Handle::current();
    let confined = |command| spawn_confined(command, &launch.reach, &runtime);
    let mut child = match &launch.uids {
        Some(uids) => uids::with_some(|| {
            clean_sockets(state_dir).map_err(run)?;
            let command = command(launch, &log)?;
            uids.spawn(command, confined).map_err(run)
        })?
        .ok_or_else(|| run(uids::taken()))?,
        None => confined(command(launch, &log)?).map_err(run)?,
    };
    match recorded(&child, state_dir) {
        Ok(handle) => Ok(Process { handle, child: Some(child) }),
        Err(e) => {
            let _ = child.start_kill();
            while matches!(child.try_wait(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(run(e))
        }
    }
}

fn fresh_log(state_dir: &Path) -> io::Result<fs::File> {
    let path = state_dir.join(file::STDERR_LOG);
    OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&path)?;
    OpenOptions::new().append(true).open(path)
}

/// QEMU's command, with all it inherits. Dropping it closes the other ends of the cards, too.
fn command(launch: &Launch, log: &fs::File) -> Result<std::process::Command, DriverError> {
    let opened = launch.open(log, detach)?;
    let log = log.try_clone().map_err(|source| DriverError::Run { path: launch.system.clone(), source })?;
    let mut command = std::process::Command::new(&launch.system);
    command.args((!launch.executes).then_some("-S"));
    command.args(&opened.argv).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    detach(&mut command);
    let fds = opened.fds;
    // The descriptors keep their numbers: to move them could hit one the standard library is to use yet.
    // SAFETY: between fork and exec only fcntl is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            for fd in &fds {
                rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
            }
            Ok(())
        });
    }
    Ok(command)
}

/// Landlock confines a thread and its children: one that does nothing else starts the process. The
/// command is dropped with it, so that nothing here keeps the other ends of the cards open.
fn spawn_confined(
    command: std::process::Command,
    reach: &Reach,
    runtime: &tokio::runtime::Handle,
) -> io::Result<Child> {
    std::thread::scope(|scope| {
        let spawn = || {
            let _within = runtime.enter();
            launch::confine(reach)?;
            Command::from(command).spawn()
        };
        let done = scope.spawn(spawn).join();
        done.unwrap_or_else(|_| Err(io::Error::other("the thread that starts QEMU panicked")))
    })
}

/// Makes what the command starts the leader of a session of its own.
fn detach(command: &mut std::process::Command) {
    // SAFETY: between fork and exec only setsid is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| Ok(rustix::process::setsid().map(drop)?));
    }
}

fn recorded(child: &Child, state_dir: &Path) -> io::Result<Handle> {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).ok_or(io::ErrorKind::NotFound)?;
    // Not yet awaited, the child keeps its number even if it has ended.
    let handle = Handle::open(pid)?;
    Record::of(pid)?.write(state_dir)?;
    Ok(handle)
}

/// What the driver has written down about a VM's process; the format is in `STATE.md`.
#[derive(Debug, PartialEq, Eq)]
enum Record {
    /// A process was about to be started and may or may not exist.
    Starting,
    Started {
        pid: i32,
        start_ticks: u64,
        boot_id: String,
    },
}

impl Record {
    fn of(pid: i32) -> io::Result<Self> {
        Ok(Record::Started { pid, start_ticks: Stat::read(pid)?.start_ticks, boot_id: boot_id()? })
    }

    fn write(&self, state_dir: &Path) -> io::Result<()> {
        let text = match self {
            Record::Starting => "starting\n".to_owned(),
            Record::Started { pid, start_ticks, boot_id } => format!("{pid} {start_ticks} {boot_id}\n"),
        };
        durable::write(&state_dir.join(file::RECORD), text.as_bytes())
    }

    /// None where there is no record. One that makes no sense is as good as one of a beginning.
    fn read(state_dir: &Path) -> io::Result<Option<Self>> {
        match fs::read_to_string(state_dir.join(file::RECORD)) {
            Ok(text) => Ok(Some(Self::parse(&text).unwrap_or(Record::Starting))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let (pid, start_ticks, boot_id) = (words.next()?, words.next()?, words.next()?);
        Some(Record::Started {
            pid: pid.parse().ok()?,
            start_ticks: start_ticks.parse().ok()?,
            boot_id: boot_id.to_owned(),
        })
    }
}

/// What an earlier driver left of a VM.
#[derive(Debug)]
pub enum Found {
    /// It was not running.
    Nothing,
    /// It ran, and its process ended unobserved.
    Ended,
    Alive(Handle),
}

/// Looks for the QEMU process an earlier driver started for `vm`.
pub fn find(state_dir: &Path, vm: VmId) -> io::Result<Found> {
    match Record::read(state_dir)? {
        None => Ok(Found::Nothing),
        Some(Record::Started { pid, start_ticks, boot_id: boot }) => {
            let is_it =
                |stat: Stat| stat.start_ticks == start_ticks && stat.is_alive && is_of(pid, vm, state_dir);
            if boot != boot_id()? {
                return Ok(Found::Ended);
            }
            // Opened first and checked after: what the check sees is what the pidfd holds.
            match Handle::open(pid) {
                Ok(handle) if Stat::read(pid).is_ok_and(is_it) => Ok(Found::Alive(handle)),
                _ => Ok(Found::Ended),
            }
        }
        // The earlier driver died between the two records: look at every process.
        Some(Record::Starting) => {
            for entry in fs::read_dir("/proc")? {
                let Some(pid) = entry?.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
                    continue;
                };
                if !is_of(pid, vm, state_dir) {
                    continue;
                }
                if let Ok(handle) = Handle::open(pid)
                    && is_of(pid, vm, state_dir)
                {
                    Record::of(pid)?.write(state_dir)?;
                    return Ok(Found::Alive(handle));
                }
            }
            Ok(Found::Nothing)
        }
    }
}

/// Whether the command line of the process is that of the VM's QEMU; false of one that has ended.
fn is_of(pid: i32, vm: VmId, state_dir: &Path) -> bool {
    let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    let args: Vec<&[u8]> = line.split(|b| *b == 0).collect();
    args::is_of(&args, vm, state_dir)
}

/// The parts of `/proc/PID/stat` used here, see proc_pid_stat(5).
struct Stat {
    is_alive: bool,
    start_ticks: u64,
    cpu_ticks: u64,
}

impl Stat {
    fn read(pid: i32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        Self::parse(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/stat"))
    }

    fn parse(text: &str) -> Option<Self> {
        // The program's name, in parentheses, may hold anything; what counts follows the last one.
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        let number = |i: usize| fields.get(i)?.parse::<u64>().ok();
        Some(Self {
            is_alive: !matches!(*fields.first()?, "Z" | "X"),
            cpu_ticks: number(11)?.checked_add(number(12)?)?,
            start_ticks: number(19)?,
        })
    }
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Processor time and resident memory of a process.
pub fn usage(pid: i32) -> io::Result<(Duration, ByteSize)> {
    let ticks = Stat::read(pid)?.cpu_ticks;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let resident_kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?.trim().parse().ok())
        .unwrap_or(0);
    Ok((Duration::from_millis(ticks * (1000 / TICKS_PER_SECOND)), ByteSize::kib(resident_kib)))
}

/// Removes what only a running QEMU needs.
pub fn clean(state_dir: &Path) -> io::Result<()> {
    clean_sockets(state_dir)?;
    durable::remove(&state_dir.join(file::RECORD))
}

fn clean_sockets(state_dir: &Path) -> io::Result<()> {
    for name in [file::QMP, file::CONSOLE, file::AGENT, file::NBD] {
        durable::remove(&state_dir.join(name))?;
    }
    Ok(())
}

/// The last lines QEMU wrote to its standard error, safe to print.
pub fn last_words(state_dir: &Path) -> String {
    let tail = || -> io::Result<String> {
        let mut log = fs::File::open(state_dir.join(file::STDERR_LOG))?;
        let length = log.metadata()?.len();
        log.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        log.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let tail = tail().unwrap_or_default();
    let lines: Vec<String> = tail.lines().filter(|line| !line.trim().is_empty()).map(printable).collect();
    match lines.len() {
        0 => "it said nothing".into(),
        n => lines[n.saturating_sub(TAIL_LINES)..].join("; "),
    }
}

/// The text without what would command a terminal.
fn printable(line: &str) -> String {
    line.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Cuts a log a running QEMU appends to once it is longer than `max`; the part before is kept
/// under the same name with `.1`. What is written in between is lost.
pub fn cut_log(path: &Path, max: ByteSize) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(meta) if meta.len() > max.0 => {
            let mut kept = path.as_os_str().to_owned();
            kept.push(".1");
            fs::copy(path, Path::new(&kept))?;
            OpenOptions::new().write(true).open(path)?.set_len(0)
        }
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_read_behind_any_program_name() {
        let line = "4711 (a) R 1) S 1 4711 4711 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 4 0 987654 1 2 3";
        let stat = Stat::parse(line).unwrap();
        assert_eq!((stat.cpu_ticks, stat.start_ticks, stat.is_alive), (300, 987_654, true));
        for bad in ["", "1 (x", "1 (x) Z 1 2"] {
            assert!(Stat::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_recycled_number_is_not_taken_for_the_vm() {
        let dir = tempfile::tempdir().unwrap();
        let vm = VmId::random();
        assert!(matches!(find(dir.path(), vm).unwrap(), Found::Nothing));
        // This very process: alive, and its start time fits, but it is no QEMU of that VM.
        Record::of(std::process::id() as i32).unwrap().write(dir.path()).unwrap();
        assert!(matches!(find(dir.path(), vm).unwrap(), Found::Ended));
        for torn in ["", "starting\n", "12 x y", "99999999999 1 a"] {
            fs::write(dir.path().join(file::RECORD), torn).unwrap();
            assert!(matches!(find(dir.path(), vm).unwrap(), Found::Nothing), "{torn}");
        }
    }

    #[test]
    fn records_read_as_written() {
        let dir = tempfile::tempdir().unwrap();
        for record in [Record::Starting, Record::of(std::process::id() as i32).unwrap()] {
            record.write(dir.path()).unwrap();
            assert_eq!(Record::read(dir.path()).unwrap(), Some(record));
        }
    }

    #[test]
    fn logs_are_cut_and_their_end_is_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join(file::STDERR_LOG);
        assert_eq!(last_words(dir.path()), "it said nothing");
        fs::write(&log, "1\n2\n3\n4\n5\n6\x1b[31m\n\n").unwrap();
        assert_eq!(last_words(dir.path()), "2; 3; 4; 5; 6\u{fffd}[31m");
        cut_log(&log, ByteSize(100)).unwrap();
        assert_eq!(fs::metadata(&log).unwrap().len(), 18);
        cut_log(&log, ByteSize(10)).unwrap();
        assert_eq!(fs::metadata(&log).unwrap().len(), 0);
        assert_eq!(fs::metadata(dir.path().join("qemu.log.1")).unwrap().len(), 18);
    }
}
