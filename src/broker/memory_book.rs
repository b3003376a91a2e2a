//! A book in memory: for simulated clouds, which crash and begin again with what was written.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::clock::UnixMillis;
use crate::federation::{Kept, Revoked};
use crate::interface::MigrationView;
use crate::migration::lineage::Lineage;
use crate::migration::records::VmRecord;
use crate::migration::{Receipt, Return};
use crate::types::{MemberJid, MigrationId, PublicKey, VmId};

use super::book::{Book, Damaged, RecordError, ReturnRecord};
use super::resolving::Resolution;

/// What was written. Clones are the same book.
#[derive(Clone, Default)]
pub struct MemoryBook(Arc<Mutex<Pages>>);

#[derive(Default)]
struct Pages {
    vms: BTreeMap<VmId, VmRecord>,
    migrations: BTreeMap<MigrationId, MigrationView>,
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
    /// Writes that fail from now on.
    failing: BTreeSet<Page>,
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
    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes writing these fail, and all others work.
    pub fn fail(&self, pages: impl IntoIterator<Item = Page>) {
        self.pages().failing = pages.into_iter().collect();
    }

    fn writing(&self, page: Page) -> Result<MutexGuard<'_, Pages>, RecordError> {
        let pages = self.pages();
        match pages.failing.contains(&page) {
            false => Ok(pages),
            true => Err(RecordError::Io {
                action: "write",
                path: PathBuf::from(format!("{page:?}")),
                source: std::io::Error::other("made to fail"),
            }),
        }
    }

    /// The record of a VM, as it is written.
    pub fn vm(&self, vm: VmId) -> Option<VmRecord> {
        self.pages().vms.get(&vm).cloned()
    }

    /// A VM is removed, with its record.
    pub fn remove_vm(&self, vm: VmId) {
        let mut pages = self.pages();
        pages.vms.remove(&vm);
        pages.changes += 1;
    }

    /// Everything as it is now, as a backup has it.
    pub fn copy(&self) -> Self {
        let p = self.pages();
        Self(Arc::new(Mutex::new(Pages {
            vms: p.vms.clone(),
            migrations: p.migrations.clone(),
            lineages: p.lineages.clone(),
            promised: p.promised.clone(),
            receipts: p.receipts.clone(),
            returned: p.returned.clone(),
            resolutions: p.resolutions.clone(),
            trust: p.trust.clone(),
            revoked: p.revoked.clone(),
            restored: p.restored,
            changes: p.changes,
            failing: BTreeSet::new(),
        })))
    }
}

impl Book for MemoryBook {
    fn vms(&self) -> Result<(Vec<VmRecord>, Vec<Damaged>), RecordError> {
        Ok((self.pages().vms.values().cloned().collect(), Vec::new()))
    }
    fn save_vm(&self, record: &VmRecord) -> Result<(), RecordError> {
        let mut pages = self.writing(Page::Vms)?;
        pages.vms.insert(record.spec.id, record.clone());
        pages.changes += 1;
        Ok(())
    }
    fn save_ownership(&self, record: &VmRecord) -> Result<(), RecordError> {
        self.save_vm(record)
    }
    fn record_path(&self, vm: VmId) -> PathBuf {
        PathBuf::from(format!("{vm}/record.json"))
    }
    fn migrations(&self) -> Result<Vec<MigrationView>, RecordError> {
        Ok(self.pages().migrations.values().cloned().collect())
    }
    fn note_now(&self, view: &MigrationView) {
        self.pages().migrations.insert(view.progress.id, view.clone());
    }
    fn note_later(&self, view: &MigrationView) {
        self.note_now(view);
    }
    fn forget_migration(&self, id: MigrationId) {
        self.pages().migrations.remove(&id);
    }
    fn lineage(&self, vm: VmId) -> Result<Lineage, RecordError> {
        Ok(self.pages().lineages.get(&vm).cloned().unwrap_or_else(|| Lineage::empty(vm)))
    }
    fn save_lineage(&self, lineage: &Lineage) -> Result<(), RecordError> {
        self.writing(Page::Lineages)?.lineages.insert(lineage.vm(), lineage.clone());
        Ok(())
    }
    fn returns_of(&self, vm: VmId) -> Result<Vec<Return>, RecordError> {
        let of_it = |back: &&Return| back.hand_over.read().is_ok_and(|h| h.vm == vm);
        Ok(self.pages().returned.values().filter(of_it).cloned().collect())
    }
    fn save_return(&self, record: &ReturnRecord, source: Option<&PublicKey>) -> Result<(), RecordError> {
        let mut pages = self.writing(Page::Returns)?;
        let epoch = pages.promised.entry((record.vm, source.map(ToString::to_string))).or_default();
        *epoch = record.epoch.max(*epoch);
        Ok(())
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
        self.writing(Page::Receipts)?.receipts.insert(migration, receipt.clone());
        Ok(())
    }
    fn receipt(&self, migration: MigrationId) -> Result<Option<Receipt>, RecordError> {
        Ok(self.pages().receipts.get(&migration).cloned())
    }
    fn save_returned(&self, migration: MigrationId, back: &Return) -> Result<(), RecordError> {
        self.writing(Page::Returns)?.returned.insert(migration, back.clone());
        Ok(())
    }
    fn save_resolution(&self, resolution: &Resolution) -> Result<(), RecordError> {
        self.pages().resolutions.insert(resolution.migration, resolution.clone());
        Ok(())
    }
    fn resolutions(&self) -> Result<Vec<Resolution>, RecordError> {
        Ok(self.pages().resolutions.values().cloned().collect())
    }
    fn save_trust(&self, kept: &BTreeMap<MemberJid, Kept>) -> Result<(), RecordError> {
        self.pages().trust = kept.clone();
        Ok(())
    }
    fn save_revoked(&self, revoked: &Revoked) -> Result<(), RecordError> {
        self.pages().revoked = revoked.clone();
        Ok(())
    }
    fn restored(&self) -> Result<Option<UnixMillis>, RecordError> {
        Ok(self.pages().restored)
    }
    fn save_restored(&self, at: UnixMillis) -> Result<(), RecordError> {
        self.pages().restored = Some(at);
        Ok(())
    }
    fn changes(&self) -> u64 {
        self.pages().changes
    }
}
