//! The verbs every hypervisor driver offers, and what they speak of.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, broadcast};

use super::DriverError;
use crate::types::{ByteSize, VmId};
pub use crate::vm::hypervisor::{
    Ability, Accelerator, DiskFormat, DriverEvent, EventKind, Features, StopMode, StopReason,
};
use crate::vm::{PowerState, VmSpec};

pub type DriverFuture<'a, T> = BoxFuture<'a, Result<T, DriverError>>;

/// A VM with everything one host needs to run it. Paths are this host's; the spec travels.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Machine {
    pub spec: VmSpec,
    /// The root disk: an overlay on the composition, whose header names its read-only base.
    pub root_disk: PathBuf,
    pub root_format: DiskFormat,
    /// The composition the root disk lies over, if it lies over one; only read.
    pub base: Option<PathBuf>,
    /// The user-data disk, raw.
    pub user_data_disk: Option<PathBuf>,
    /// This VM's own firmware variables; made from the firmware's template if absent. Under BIOS
    /// there are none.
    pub firmware_vars: PathBuf,
    /// The driver's own directory for this VM: sockets, process record, logs. Nothing in it needs
    /// to travel.
    pub state_dir: PathBuf,
}

/// What a running VM has used since its process started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct MachineStats {
    /// Processor time of the host, over all its CPUs.
    pub cpu_time: Duration,
    /// Host memory in use, the hypervisor's own included.
    pub resident: ByteSize,
    pub disk_read: ByteSize,
    pub disk_written: ByteSize,
}

/// Where a guest wrote to its disks, or discarded, in some period of time: byte ranges, ascending
/// and apart. They may cover more than was written, never less.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DiskChanges {
    pub root: Vec<Range<u64>>,
    /// Empty if there is no such disk.
    pub user_data: Vec<Range<u64>>,
}

/// Names a period of change tracking of one VM. No two periods have one name as long as the driver
/// lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Period(pub(super) u64);

/// One hypervisor on this host. Verbs may be called from anywhere at any time: those on one VM
/// take their turn, those on different VMs run side by side.
pub trait Driver: Send + Sync {
    fn features(&self) -> &Features;

    /// Makes a VM known and its state directory and firmware variables ready. If the VM is
    /// running already, started by an earlier driver in the same state directory, it is taken over
    /// as it is. Defining the same machine again changes nothing; another shape is taken if the
    /// VM does not run and refused if it does.
    fn define<'a>(&'a self, machine: &'a Machine) -> DriverFuture<'a, ()>;

    /// Defines the VM if need be and runs it. On Ok it is running, and was perhaps before.
    fn start<'a>(&'a self, machine: &'a Machine) -> DriverFuture<'a, ()>;

    /// Refuses what [`Driver::start`] would refuse before it starts anything. Its files need not be there.
    fn check(&self, machine: &Machine) -> Result<(), DriverError>;

    /// Starts a VM of this shape exactly as it would be started, executes nothing of its guest, and ends it:
    /// whether this host can run it. Disks and state directory are scratch; the VM is not defined by it, and
    /// of what it leaves in the state directory nothing stays.
    fn rehearse<'a>(&'a self, machine: &'a Machine) -> DriverFuture<'a, ()>;

    /// Ends what an earlier driver, which died, left of a rehearsal in `state_dir`.
    fn end_rehearsal<'a>(&'a self, vm: VmId, state_dir: &'a Path) -> DriverFuture<'a, ()>;

    /// On Ok the VM does not run, its process is gone, and what it wrote is on stable storage.
    fn stop(&self, vm: VmId, mode: StopMode) -> DriverFuture<'_, ()>;

    /// On Ok the guest executes nothing until [`Driver::resume`].
    fn pause(&self, vm: VmId) -> DriverFuture<'_, ()>;

    fn resume(&self, vm: VmId) -> DriverFuture<'_, ()>;

    fn state(&self, vm: VmId) -> Result<PowerState, DriverError>;

    /// All defined VMs, in order of their ids.
    fn list(&self) -> Vec<(VmId, PowerState)>;

    /// Forgets a VM that does not run and removes its state directory, not its disks or firmware
    /// variables. A VM that is not known is no error.
    fn undefine(&self, vm: VmId) -> DriverFuture<'_, ()>;

    /// The guest's serial console. One holder at a time, until the stream is dropped; a holder
    /// that does not read holds up the guest's output.
    fn console(&self, vm: VmId) -> DriverFuture<'_, ConsoleStream>;

    /// Where the console's output is kept, over restarts; the file may not exist yet.
    fn console_log(&self, vm: VmId) -> Result<PathBuf, DriverError>;

    /// Everything that happens from now on. A receiver that lags behind loses the oldest events:
    /// it should look at [`Driver::list`] then.
    fn events(&self) -> broadcast::Receiver<DriverEvent>;

    fn stats(&self, vm: VmId) -> DriverFuture<'_, MachineStats>;

    /// Begins a period in which every write of a running VM to its disks is noted, and at the same
    /// instant ends the one before. The changes of that one are returned if it was `since`: else
    /// somebody has begun a period in between, or the VM another run, and what changed is not known.
    ///
    /// A write that is under way when a period begins counts as one of that period, or was in the
    /// disk's file before. After an error a period may go on that nobody knows the name of.
    fn track_changes(
        &self,
        vm: VmId,
        since: Option<Period>,
    ) -> DriverFuture<'_, (Period, Option<DiskChanges>)>;

    /// Notes no more writes. If the guest has switched itself off, asked to or not, while `since`
    /// went on, these are the changes of that period up to the guest's end, once. `None` for a VM
    /// that runs, or ended in another way, or was started again, or was not tracked.
    fn end_tracking(&self, vm: VmId, since: Option<Period>) -> DriverFuture<'_, Option<DiskChanges>>;
}

/// How many events a receiver may lag behind before it loses some.
pub const EVENTS_KEPT: usize = 1024;

trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Both directions of a guest's serial console.
pub struct ConsoleStream {
    inner: Box<dyn Duplex>,
    // Held so that nobody else gets a console that would never show anything.
    _turn: OwnedSemaphorePermit,
}

impl ConsoleStream {
    pub(super) fn new(
        inner: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        turn: OwnedSemaphorePermit,
    ) -> Self {
        Self { inner: Box::new(inner), _turn: turn }
    }
}

impl fmt::Debug for ConsoleStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConsoleStream")
    }
}

impl AsyncRead for ConsoleStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for ConsoleStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
