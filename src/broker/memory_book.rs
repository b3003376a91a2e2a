//! A book in memory: for simulated clouds, which crash and begin again with what was written.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::clock::UnixMillis;
use crate::federation::{Kept, Revoked};
use crate::migration::lineage::Lineage;
use crate::migration::move_record::MoveRecord;
use crate::migration::records::VmRecord;
use crate::migration::{Receipt, Return};
use crate::types::{MemberJid, MigrationId, PublicKey, VmId};

use super::book::{Book, Damaged, RecordError, ReturnRecord};
use super::resolving::Resolution;

/// What was written. Clones are the same book.
#[derive(Clone, Default)]
pub struct MemoryBook(Arc<Mutex<Disk>>);

/// What the pages lie on.
#[derive(Default)]
struct Disk {
    pages: Arc<Pages>,
    /// Kinds of pages whose writing fails from now on.
    failing: BTreeSet<Page>,
    /// Writes so far.
    writes: u64,
    /// Nothing is written after so many: whoever writes does not live to see it.
    writes_max: Option<u64>,
    /// Whether the next change of an owner is written, and nobody can tell.
    undecided: Option<bool>,
}

#[derive(Clone, Default)]
struct Pages {
    vms: BTreeMap<VmId, VmRecord>,
    migrations: BTreeMap<MigrationId, MoveRecord>,
    lineages: BTreeMap<VmId, Lineage>,
    /// The latest epoch promised away, of each VM to each source; without one, to all.
    promised: BTreeMap<(VmId, Option<String>), u64>,
    receipts: BTreeMap<MigrationId, Receipt>,
    returned: BTreeMap<MigrationId, Return>,
    resolutions: BTreeMap<MigrationId, Resolution>,
    trust: BTreeMap<MemberJid, Kept>,
    revoked: Revoked,
    restored: Option<UnixMillis>,
    changes: u64,
    /// VMs whose record cannot be read.
    damaged: BTreeSet<VmId>,
}

/// A kind of page whose writing can be made to fail.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Page {
    Vms,
    Lineages,
    Returns,
    Receipts,
}

impl MemoryBook {
    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pages(&self) -> Arc<Pages> {
        self.disk().pages.clone()
    }

    /// Makes writing these fail, and all others work.
    pub fn fail(&self, pages: impl IntoIterator<Item = Page>) {
        self.disk().failing = pages.into_iter().collect();
    }

    /// After so many more writes nothing is written any more; `None` undoes it.
    pub fn stop_after(&self, writes: Option<u64>) {
        let mut disk = self.disk();
        disk.writes_max = writes.map(|more| disk.writes + more);
    }

    /// The next change of who owns a VM is written or not, and the writer does not learn which.
    pub fn leave_undecided(&self, written: Option<bool>) {
        self.disk().undecided = written;
    }

    /// How often it was written.
    pub fn writes(&self) -> u64 {
        self.disk().writes
    }

    fn write(&self, page: Option<Page>, change: impl FnOnce(&mut Pages)) -> Result<(), RecordError> {
        let mut disk = self.disk();
        let full = disk.writes_max.is_some_and(|max| disk.writes >= max);
        if full || page.is_some_and(|page| disk.failing.contains(&page)) {
            return Err(RecordError::Io {
                action: "write",
                path: PathBuf::from(format!("{page:?}")),
                source: std::io::Error::other("made to fail"),
            });
        }
        disk.writes += 1;
        change(Arc::make_mut(&mut disk.pages));
        Ok(())
    }

    fn write_owner(&self, page: Page, change: impl FnOnce(&mut Pages)) -> Result<(), RecordError> {
        let undecided = self.disk().undecided.take();
        match undecided {
            None => self.write(Some(page), change),
            Some(written) => {
                if written {
                    self.write(Some(page), change)?;
                }
                Err(RecordError::Undecided {
                    path: PathBuf::from(format!("{page:?}")),
                    source: std::io::Error::other("made to fail"),
                })
            }
        }
    }

    /// The record of a VM, as it is written.
    pub fn vm(&self, vm: VmId) -> Option<VmRecord> {
        self.pages().vms.get(&vm).cloned()
    }

    /// Whether a VM is this cloud's by its record, if there is one.
    pub fn is_here(&self, vm: VmId) -> Option<bool> {
        self.disk().pages.vms.get(&vm).map(VmRecord::is_here)
    }

    /// What a VM's record says, without a copy of it.
    pub fn look_at<T>(&self, vm: VmId, look: impl FnOnce(&VmRecord) -> T) -> Option<T> {
        self.disk().pages.vms.get(&vm).map(look)
    }

    /// Processors and bytes of memory of VMs that are this cloud's and shall run.
    pub fn taken(&self) -> (u64, u64) {
        let disk = self.disk();
        let here = disk.pages.vms.values().filter(|record| record.is_here() && record.run);
        here.map(VmRecord::takes)
            .fold((0, 0), |(cpus, memory), takes| (cpus + u64::from(takes.cpus), memory + takes.memory.0))
    }

    /// From now on, or not any more, whoever opens the book finds the record of this VM damaged. What it said is
    /// still told by [`MemoryBook::vm`].
    pub fn damage(&self, vm: VmId, is_damaged: bool) {
        let mut disk = self.disk();
        let damaged = &mut Arc::make_mut(&mut disk.pages).damaged;
        match is_damaged {
            true => drop(damaged.insert(vm)),
            false => drop(damaged.remove(&vm)),
        }
    }

    pub fn is_damaged(&self, vm: VmId) -> bool {
        self.disk().pages.damaged.contains(&vm)
    }

    /// The hand-overs of a VM that were given back to this cloud.
    pub fn returned(&self, vm: VmId) -> Vec<Return> {
        let of = |back: &Return| back.verify().is_ok_and(|h| h.vm == vm);
        self.pages().returned.values().filter(|back| of(back)).cloned().collect()
    }

    pub fn has_vm(&self, vm: VmId) -> bool {
        self.pages().vms.contains_key(&vm)
    }

    /// A VM is removed, with its record.
    pub fn remove_vm(&self, vm: VmId) {
        let _ = self.write(None, |pages| {
            pages.vms.remove(&vm);
            pages.damaged.remove(&vm);
            pages.changes += 1;
        });
    }

    /// Everything as it is now, as a backup has it.
    pub fn copy(&self) -> Self {
        let disk = self.disk();
        let (pages, writes) = (disk.pages.clone(), disk.writes);
        Self(Arc::new(Mutex::new(Disk { pages, writes, ..Disk::default() })))
    }
}

impl Pages {
    fn keep(&mut self, record: &VmRecord) {
        self.vms.insert(record.spec.id, record.clone());
        self.damaged.remove(&record.spec.id);
        self.changes += 1;
    }
}

impl Book for MemoryBook {
    fn vms(&self) -> Result<(Vec<VmRecord>, Vec<Damaged>), RecordError> {
        let pages = self.pages();
        let damage = |vm: &VmId| {
            let (path, reason) = (self.record_path(*vm), "made to be damaged".to_owned());
            Damaged { vm: *vm, path, reason }
        };
        let whole = pages.vms.iter().filter(|(vm, _)| !pages.damaged.contains(vm));
        Ok((whole.map(|(_, record)| record.clone()).collect(), pages.damaged.iter().map(damage).collect()))
    }
    fn save_vm(&self, record: &VmRecord) -> Result<(), RecordError> {
        self.write(Some(Page::Vms), |pages| pages.keep(record))
    }
    fn save_ownership(&self, record: &VmRecord) -> Result<(), RecordError> {
        self.write_owner(Page::Vms, |pages| pages.keep(record))
    }
    fn record_path(&self, vm: VmId) -> PathBuf {
        PathBuf::from(format!("{vm}/record.json"))
    }
    fn migrations(&self) -> Result<Vec<MoveRecord>, RecordError> {
        Ok(self.pages().migrations.values().cloned().collect())
    }
    fn note_now(&self, record: &MoveRecord) {
        let _ = self.write(None, |pages| drop(pages.migrations.insert(record.course.id, record.clone())));
    }
    fn note_later(&self, record: &MoveRecord) {
        self.note_now(record);
    }
    fn forget_migration(&self, id: MigrationId) {
        let _ = self.write(None, |pages| drop(pages.migrations.remove(&id)));
    }
    fn lineage(&self, vm: VmId) -> Result<Lineage, RecordError> {
        Ok(self.pages().lineages.get(&vm).cloned().unwrap_or_else(|| Lineage::empty(vm)))
    }
    fn save_lineage(&self, lineage: &Lineage) -> Result<(), RecordError> {
        self.write(Some(Page::Lineages), |pages| drop(pages.lineages.insert(lineage.vm(), lineage.clone())))
    }
    fn returns_of(&self, vm: VmId) -> Result<Vec<Return>, RecordError> {
        let of_it = |back: &&Return| back.hand_over.read().is_ok_and(|h| h.vm == vm);
        Ok(self.pages().returned.values().filter(of_it).cloned().collect())
    }
    fn save_return(&self, record: &ReturnRecord, source: Option<&PublicKey>) -> Result<(), RecordError> {
        self.write_owner(Page::Returns, |pages| {
            let epoch = pages.promised.entry((record.vm, source.map(ToString::to_string))).or_default();
            *epoch = record.epoch.max(*epoch);
        })
    }
    fn has_promised(&self, vm: VmId, source: &PublicKey) -> bool {
        self.pages().promised.contains_key(&(vm, Some(source.to_string())))
    }
    fn has_returned(&self, vm: VmId, epoch: u64, source: Option<&PublicKey>) -> bool {
        let pages = self.pages();
        let to = |source: Option<String>| pages.promised.get(&(vm, source)).is_some_and(|e| *e >= epoch);
        to(None) || source.is_some_and(|key| to(Some(key.to_string())))
    }
    fn save_receipt(&self, migration: MigrationId, receipt: &Receipt) -> Result<(), RecordError> {
        self.write(Some(Page::Receipts), |pages| drop(pages.receipts.insert(migration, receipt.clone())))
    }
    fn receipt(&self, migration: MigrationId) -> Result<Option<Receipt>, RecordError> {
        Ok(self.pages().receipts.get(&migration).cloned())
    }
    fn save_returned(&self, migration: MigrationId, back: &Return) -> Result<(), RecordError> {
        self.write(Some(Page::Returns), |pages| drop(pages.returned.insert(migration, back.clone())))
    }
    fn save_resolution(&self, resolution: &Resolution) -> Result<(), RecordError> {
        self.write(None, |pages| drop(pages.resolutions.insert(resolution.migration, resolution.clone())))
    }
    fn resolutions(&self) -> Result<Vec<Resolution>, RecordError> {
        Ok(self.pages().resolutions.values().cloned().collect())
    }
    fn save_trust(&self, kept: &BTreeMap<MemberJid, Kept>) -> Result<(), RecordError> {
        self.write(None, |pages| pages.trust = kept.clone())
    }
    fn save_revoked(&self, revoked: &Revoked) -> Result<(), RecordError> {
        self.write(None, |pages| pages.revoked = revoked.clone())
    }
    fn restored(&self) -> Result<Option<UnixMillis>, RecordError> {
        Ok(self.pages().restored)
    }
    fn save_restored(&self, at: UnixMillis) -> Result<(), RecordError> {
        self.write(None, |pages| pages.restored = Some(at))
    }
    fn changes(&self) -> u64 {
        self.pages().changes
    }
}
