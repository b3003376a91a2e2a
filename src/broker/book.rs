//! The durable book: what must survive a crash, and what the core asks of whoever keeps it. Writing is
//! synchronous: when a method returns, what it wrote survives. A directory keeps it (`runner/record_dir.rs`),
//! or memory.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::federation::{Kept, Revoked};
use crate::interface::MigrationView;
use crate::migration::handover::SignedHandOver;
use crate::migration::lineage::{Lineage, LineageError};
use crate::migration::move_record::MoveRecord;
use crate::migration::records::{VERSION, VmRecord};
use crate::migration::{Law, Receipt, Return};
use crate::types::{MemberJid, MigrationId, PublicKey, VmId};

use super::resolving::Resolution;

/// A VM whose record cannot be used. Its disks are not touched.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Damaged {
    pub vm: VmId,
    pub path: PathBuf,
    pub reason: String,
}

/// A migration this broker has or had a part in, as it lies on disk.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MigrationRecord {
    pub version: u32,
    #[serde(rename = "view")]
    pub record: MoveRecord,
}

/// A promise never to run a VM under an epoch, kept so that it binds after a restart too.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ReturnRecord {
    pub vm: VmId,
    pub epoch: u64,
    /// `None` if the operator promised it before the hand-over came.
    #[serde(default)]
    pub hand_over: Option<SignedHandOver>,
}

#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("cannot {action} {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("record {path} is not readable: restore it from a backup")]
    Malformed {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("history of ownership {path} is damaged: restore it from a backup")]
    Lineage {
        path: PathBuf,
        #[source]
        source: LineageError,
    },
    #[error("record {path} has version {version}; this release reads version {VERSION}")]
    Version { path: PathBuf, version: u32 },
    /// It may be there, or not after the next crash: it must neither be acted on nor denied.
    #[error("it is not known whether {path} was recorded")]
    Undecided {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// What a book said whose answers were recorded: the words of the whole chain.
    #[error("{words}")]
    Told { words: String, undecided: bool },
}

impl RecordError {
    /// Whether it is unknown what the book says now.
    pub const fn is_undecided(&self) -> bool {
        matches!(self, RecordError::Undecided { .. } | RecordError::Told { undecided: true, .. })
    }
}

/// Keeps the book.
pub trait Book: Send + Sync {
    /// All VMs, and those whose record is damaged: one must not keep the others down.
    fn vms(&self) -> Result<(Vec<VmRecord>, Vec<Damaged>), RecordError>;
    /// Makes `record` the truth about its VM.
    fn save_vm(&self, record: &VmRecord) -> Result<(), RecordError>;
    /// As [`Book::save_vm`], where the record changes who may run the VM. An error other than
    /// [`RecordError::Undecided`] means that nothing was recorded.
    fn save_ownership(&self, record: &VmRecord) -> Result<(), RecordError>;
    /// Where a VM's record lies, for people.
    fn record_path(&self, vm: VmId) -> PathBuf;
    /// Past and unfinished migrations.
    fn migrations(&self) -> Result<Vec<MoveRecord>, RecordError>;
    /// Records a migration before this returns: what this cloud itself began goes on after a restart.
    fn note_now(&self, record: &MoveRecord);
    /// Records a migration soon.
    fn note_later(&self, record: &MoveRecord);
    fn forget_migration(&self, id: MigrationId);
    /// What is known of a VM's history beside its record; empty if nothing is.
    fn lineage(&self, vm: VmId) -> Result<Lineage, RecordError>;
    fn save_lineage(&self, lineage: &Lineage) -> Result<(), RecordError>;
    /// The returns of this VM's hand-overs that are kept: for records of earlier releases.
    fn returns_of(&self, vm: VmId) -> Result<Vec<Return>, RecordError>;
    /// Promises never to run the VM under the record's epoch, nor any before it, to the holder of `source`,
    /// who signed the hand-over; without one, to all.
    fn save_return(&self, record: &ReturnRecord, source: Option<&PublicKey>) -> Result<(), RecordError>;
    /// Whether anything was promised to that source about the VM.
    fn has_promised(&self, vm: VmId, source: &PublicKey) -> bool;
    /// Whether that epoch was promised away, to the holder of `source` or to whomever.
    fn has_returned(&self, vm: VmId, epoch: u64, source: Option<&PublicKey>) -> bool;
    /// Keeps a receipt for good.
    fn save_receipt(&self, migration: MigrationId, receipt: &Receipt) -> Result<(), RecordError>;
    fn receipt(&self, migration: MigrationId) -> Result<Option<Receipt>, RecordError>;
    /// Keeps a return for good.
    fn save_returned(&self, migration: MigrationId, back: &Return) -> Result<(), RecordError>;
    fn save_resolution(&self, resolution: &Resolution) -> Result<(), RecordError>;
    fn resolutions(&self) -> Result<Vec<Resolution>, RecordError>;
    fn save_trust(&self, kept: &BTreeMap<MemberJid, Kept>) -> Result<(), RecordError>;
    fn save_revoked(&self, revoked: &Revoked) -> Result<(), RecordError>;
    /// When this broker's operator said that its state came from a backup.
    fn restored(&self) -> Result<Option<UnixMillis>, RecordError>;
    fn save_restored(&self, at: UnixMillis) -> Result<(), RecordError>;
    /// Grows with every change of a VM's record.
    fn changes(&self) -> u64;
}

/// The book in the core's hands: it takes note when it becomes unknown what is written in it.
#[derive(Clone)]
pub struct Ledger {
    book: Arc<dyn Book>,
    law: Law,
    undecided: RefCell<Option<String>>,
}

impl Ledger {
    pub fn new(book: Box<dyn Book>, law: Law) -> Self {
        Self { book: book.into(), law, undecided: RefCell::new(None) }
    }

    /// The rules that what is written follows.
    pub fn law(&self) -> Law {
        self.law
    }

    /// Why nothing may be done any more.
    pub fn undecided(&self) -> Option<String> {
        self.undecided.borrow().clone()
    }

    fn note(&self, result: Result<(), RecordError>) -> Result<(), RecordError> {
        if let Err(e) = &result
            && e.is_undecided()
        {
            *self.undecided.borrow_mut() = Some(crate::interface::chain(e));
        }
        result
    }

    /// Records a migration before this returns.
    pub fn note_now(&self, view: &MigrationView) {
        self.book.note_now(&view.clone().into());
    }

    /// Records a migration soon.
    pub fn note_later(&self, view: &MigrationView) {
        self.book.note_later(&view.clone().into());
    }

    pub fn save_ownership(&self, record: &VmRecord) -> Result<(), RecordError> {
        self.note(self.book.save_ownership(record))
    }

    pub fn save_return(&self, record: &ReturnRecord, source: Option<&PublicKey>) -> Result<(), RecordError> {
        self.note(self.book.save_return(record, source))
    }

    /// Makes a history durable, if it is not what is kept.
    pub fn keep_lineage(&self, lineage: &Lineage) -> Result<(), RecordError> {
        if lineage.is_empty() || self.book.lineage(lineage.vm()).is_ok_and(|kept| kept == *lineage) {
            return Ok(());
        }
        self.book.save_lineage(lineage)
    }

    /// Keeps the receipts that `record` holds beyond it: at start, and before it is replaced or removed.
    pub fn keep_receipts(&self, record: &VmRecord) -> Result<(), RecordError> {
        for (migration, receipt) in self.law.outlive(record) {
            match self.book.receipt(migration) {
                Ok(Some(_)) => {}
                Ok(None) => self.book.save_receipt(migration, &receipt)?,
                Err(e) => {
                    tracing::warn!(%migration, error = crate::interface::chain(&e), "its receipt is damaged; written anew");
                    self.book.save_receipt(migration, &receipt)?;
                }
            }
        }
        self.keep_lineage(&self.law.known(self.book.lineage(record.spec.id)?, Some(record)))
    }
}

impl std::ops::Deref for Ledger {
    type Target = dyn Book;
    fn deref(&self) -> &Self::Target {
        &*self.book
    }
}
