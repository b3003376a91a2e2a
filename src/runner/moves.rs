//! What moves under way have in memory beside the core: the last scan of disks that leave, disks between the
//! passes of those that come.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::disk::Scan;
use crate::transfer::{Limiter, Ticket};
use crate::types::{MigrationId, NodeHash, VmId};

use super::host::scan::Looked;
use super::host::stage::{Staged, StagedDir};

/// Shared with the tasks that work on them.
#[derive(Clone, Default)]
pub struct Moves(Arc<Mutex<Tables>>);

#[derive(Default)]
struct Tables {
    leaving: BTreeMap<MigrationId, Leaving>,
    arriving: BTreeMap<MigrationId, Arriving>,
    /// Who works in a directory of disks.
    working: BTreeMap<(VmId, String), TaskTracker>,
}

/// A VM that leaves.
#[derive(Default)]
pub struct Leaving {
    pub ticket: Option<Ticket>,
    pub limiter: Limiter,
    /// Nodes of the chunk maps of all passes so far.
    pub nodes: HashSet<NodeHash>,
    pub looked: Looked,
}

/// A VM that comes.
#[derive(Default)]
struct Arriving {
    staged: Option<Staged>,
    cancel: CancellationToken,
}

impl Moves {
    fn lock(&self) -> MutexGuard<'_, Tables> {
        // A panic while it is held leaves a table that misses one entry at most.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What each move from here sent so far.
    pub fn sent_bytes(&self) -> Vec<(MigrationId, u64)> {
        self.lock().leaving.iter().map(|(id, l)| (*id, l.limiter.sent_bytes())).collect()
    }

    pub fn cap(&self, id: MigrationId, bytes_per_s: Option<u64>) {
        self.lock().leaving.entry(id).or_default().limiter.set_rate(bytes_per_s);
    }

    /// The last scan of a move, for the next.
    pub fn looked(&self, id: MigrationId) -> Looked {
        self.lock().leaving.entry(id).or_default().looked.clone()
    }

    /// Changes what is known of a VM that leaves, unless its move has ended.
    pub fn with_leaving<T>(&self, id: MigrationId, change: impl FnOnce(&mut Leaving) -> T) -> Option<T> {
        self.lock().leaving.get_mut(&id).map(change)
    }

    /// The disks as they were scanned last; they are not needed here any more.
    pub fn take_scans(&self, id: MigrationId) -> Vec<Arc<Scan>> {
        self.lock().leaving.get_mut(&id).map(|l| std::mem::take(&mut l.looked.disks)).unwrap_or_default()
    }

    /// A move from here is over; its ticket, if one was served under.
    pub fn end_leaving(&self, id: MigrationId) -> Option<Ticket> {
        self.lock().leaving.remove(&id)?.ticket
    }

    /// Begins a pass: the disks between passes, and what ends it.
    pub fn begin_pass(&self, id: MigrationId) -> (Option<Staged>, CancellationToken) {
        let mut tables = self.lock();
        let arriving = tables.arriving.entry(id).or_default();
        (arriving.staged.take(), arriving.cancel.clone())
    }

    /// Keeps the disks for the next pass, unless the move has ended.
    pub fn end_pass(&self, id: MigrationId, staged: Staged) {
        if let Some(arriving) = self.lock().arriving.get_mut(&id) {
            arriving.staged = Some(staged);
        }
    }

    /// A move to here has ended: what is under way stops, unless it has become a VM's.
    pub fn end_arriving(&self, id: MigrationId, cancel: bool) {
        let ended = self.lock().arriving.remove(&id);
        if let Some(arriving) = ended.filter(|_| cancel) {
            arriving.cancel.cancel();
        }
    }

    /// A directory of disks, with everything that is at work in it.
    pub fn dir(&self, vm: VmId, disks: &str, path: PathBuf) -> StagedDir {
        let tasks = self.lock().working.entry((vm, disks.to_owned())).or_default().clone();
        StagedDir { path, tasks }
    }

    /// Nobody will work there any more.
    pub fn forget_dir(&self, vm: VmId, disks: &str) {
        self.lock().working.remove(&(vm, disks.to_owned()));
    }
}
