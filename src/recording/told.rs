//! What a core is told at once when it asks: answers of the durable book, random ids, signatures. Kept on the
//! way, and given again.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::broker::book::{Book, Damaged, RecordError, ReturnRecord};
use crate::broker::ids::Tape;
use crate::broker::resolving::Resolution;
use crate::clock::UnixMillis;
use crate::federation::{Kept, Revoked};
use crate::interface::chain;
use crate::migration::move_record::MoveRecord;
use crate::migration::records::VmRecord;
use crate::migration::{Lineage, Receipt, Return};
use crate::types::{MemberJid, MigrationId, PublicKey, Signature, Signer, VmId, hex};

/// What a core was told during one step.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Told {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub book: Vec<(String, Value)>,
    /// Hexadecimal.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub signatures: Vec<Signature>,
}

/// What the core is told goes through here. Clones are the same.
#[derive(Clone, Default)]
pub struct Stream {
    answers: Arc<Mutex<Answers>>,
    pub ids: Tape,
}

#[derive(Default)]
struct Answers {
    book: VecDeque<(String, Value)>,
    signatures: VecDeque<Signature>,
    /// Where the core asked for something else than what was recorded.
    strays: Vec<String>,
}

impl Stream {
    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes out what came by since.
    pub fn take(&self) -> Told {
        let mut answers = self.answers();
        Told {
            book: answers.book.drain(..).collect(),
            ids: self.ids.take().iter().map(|id| hex::encode(id)).collect(),
            signatures: answers.signatures.drain(..).collect(),
        }
    }

    /// Puts what is told next in the place of what was left over.
    pub fn put(&self, told: Told) {
        let mut answers = self.answers();
        answers.book = told.book.into();
        answers.signatures = told.signatures.into();
        self.ids.put(told.ids.iter().filter_map(|id| hex::decode(id)?.try_into().ok()).collect());
    }

    /// What was asked for otherwise than recorded since, and what was recorded and not asked for.
    pub fn strays(&self) -> Vec<String> {
        let mut answers = self.answers();
        let mut strays = std::mem::take(&mut answers.strays);
        if let Some((method, _)) = answers.book.front() {
            strays.push(format!("does not ask the book for '{method}'"));
        }
        if !answers.signatures.is_empty() {
            strays.push("does not sign what it signed".into());
        }
        let ids = self.ids.take().len();
        if ids > 0 {
            strays.push(format!("draws {ids} ids less"));
        }
        strays
    }

    fn answer<T: DeserializeOwned>(&self, method: &str) -> Option<T> {
        let mut answers = self.answers();
        if answers.book.front().is_none_or(|(recorded, _)| recorded != method) {
            answers.strays.push(format!("asks the book for '{method}'"));
            return None;
        }
        let (_, value) = answers.book.pop_front()?;
        match serde_json::from_value(value) {
            Ok(answer) => Some(answer),
            Err(e) => {
                answers.strays.push(format!("cannot read what the book said to '{method}': {e}"));
                None
            }
        }
    }
}

/// A failure of the book, in words.
#[derive(Serialize, Deserialize)]
struct Failed {
    failed: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    undecided: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Answer<T> {
    Failed(Failed),
    Given { given: T },
}

/// A key that signs as recorded, or whose signatures are kept.
pub struct RecordedKey {
    pub public: PublicKey,
    pub stream: Stream,
    /// What signs; without one, what was signed is told again.
    pub signer: Option<Arc<dyn Signer>>,
}

impl Signer for RecordedKey {
    fn public(&self) -> PublicKey {
        self.public
    }

    fn sign(&self, message: &[u8]) -> Signature {
        let mut answers = self.stream.answers();
        match &self.signer {
            Some(signer) => {
                let signature = signer.sign(message);
                answers.signatures.push_back(signature);
                signature
            }
            None => answers.signatures.pop_front().unwrap_or_else(|| {
                answers.strays.push("signs more".into());
                Signature::from_bytes([0; 64])
            }),
        }
    }
}

/// A book whose answers are kept, or told again.
pub struct RecordedBook {
    pub stream: Stream,
    /// What answers; without one, what was answered is told again.
    pub book: Option<Box<dyn Book>>,
}

impl RecordedBook {
    fn fallible<T: Serialize + DeserializeOwned>(
        &self,
        method: &str,
        ask: impl FnOnce(&dyn Book) -> Result<T, RecordError>,
    ) -> Result<T, RecordError> {
        let Some(book) = &self.book else {
            return match self.stream.answer(method) {
                Some(Answer::Given { given }) => Ok(given),
                Some(Answer::Failed(Failed { failed, undecided })) => {
                    Err(RecordError::Told { words: failed, undecided })
                }
                None => Err(RecordError::Told { words: "was not recorded".into(), undecided: false }),
            };
        };
        let result = ask(&**book);
        let answer = match &result {
            Ok(given) => serde_json::json!({ "given": given }),
            Err(e) => serde_json::to_value(Failed { failed: chain(e), undecided: e.is_undecided() })
                .unwrap_or_default(),
        };
        self.stream.answers().book.push_back((method.to_owned(), answer));
        result
    }

    fn sure<T: Serialize + DeserializeOwned + Default>(
        &self,
        method: &str,
        ask: impl FnOnce(&dyn Book) -> T,
    ) -> T {
        let Some(book) = &self.book else { return self.stream.answer(method).unwrap_or_default() };
        let given = ask(&**book);
        let value = serde_json::to_value(&given).unwrap_or_default();
        self.stream.answers().book.push_back((method.to_owned(), value));
        given
    }
}

impl Book for RecordedBook {
    fn vms(&self) -> Result<(Vec<VmRecord>, Vec<Damaged>), RecordError> {
        self.fallible("vms", |b| b.vms())
    }
    fn save_vm(&self, record: &VmRecord) -> Result<(), RecordError> {
        self.fallible("save_vm", |b| b.save_vm(record))
    }
    fn save_ownership(&self, record: &VmRecord) -> Result<(), RecordError> {
        self.fallible("save_ownership", |b| b.save_ownership(record))
    }
    fn record_path(&self, vm: VmId) -> PathBuf {
        self.sure("record_path", |b| b.record_path(vm))
    }
    fn migrations(&self) -> Result<Vec<MoveRecord>, RecordError> {
        self.fallible("migrations", |b| b.migrations())
    }
    fn note_now(&self, record: &MoveRecord) {
        self.sure("note_now", |b| b.note_now(record));
    }
    fn note_later(&self, record: &MoveRecord) {
        self.sure("note_later", |b| b.note_later(record));
    }
    fn forget_migration(&self, id: MigrationId) {
        self.sure("forget_migration", |b| b.forget_migration(id));
    }
    fn lineage(&self, vm: VmId) -> Result<Lineage, RecordError> {
        self.fallible("lineage", |b| b.lineage(vm))
    }
    fn save_lineage(&self, lineage: &Lineage) -> Result<(), RecordError> {
        self.fallible("save_lineage", |b| b.save_lineage(lineage))
    }
    fn returns_of(&self, vm: VmId) -> Result<Vec<Return>, RecordError> {
        self.fallible("returns_of", |b| b.returns_of(vm))
    }
    fn save_return(&self, record: &ReturnRecord, source: Option<&PublicKey>) -> Result<(), RecordError> {
        self.fallible("save_return", |b| b.save_return(record, source))
    }
    fn has_promised(&self, vm: VmId, source: &PublicKey) -> bool {
        self.sure("has_promised", |b| b.has_promised(vm, source))
    }
    fn has_returned(&self, vm: VmId, epoch: u64, source: Option<&PublicKey>) -> bool {
        self.sure("has_returned", |b| b.has_returned(vm, epoch, source))
    }
    fn save_receipt(&self, migration: MigrationId, receipt: &Receipt) -> Result<(), RecordError> {
        self.fallible("save_receipt", |b| b.save_receipt(migration, receipt))
    }
    fn receipt(&self, migration: MigrationId) -> Result<Option<Receipt>, RecordError> {
        self.fallible("receipt", |b| b.receipt(migration))
    }
    fn save_returned(&self, migration: MigrationId, back: &Return) -> Result<(), RecordError> {
        self.fallible("save_returned", |b| b.save_returned(migration, back))
    }
    fn save_resolution(&self, resolution: &Resolution) -> Result<(), RecordError> {
        self.fallible("save_resolution", |b| b.save_resolution(resolution))
    }
    fn resolutions(&self) -> Result<Vec<Resolution>, RecordError> {
        self.fallible("resolutions", |b| b.resolutions())
    }
    fn save_trust(&self, kept: &BTreeMap<MemberJid, Kept>) -> Result<(), RecordError> {
        self.fallible("save_trust", |b| b.save_trust(kept))
    }
    fn save_revoked(&self, revoked: &Revoked) -> Result<(), RecordError> {
        self.fallible("save_revoked", |b| b.save_revoked(revoked))
    }
    fn restored(&self) -> Result<Option<UnixMillis>, RecordError> {
        self.fallible("restored", |b| b.restored())
    }
    fn save_restored(&self, at: UnixMillis) -> Result<(), RecordError> {
        self.fallible("save_restored", |b| b.save_restored(at))
    }
    fn changes(&self) -> u64 {
        self.sure("changes", |b| b.changes())
    }
}
