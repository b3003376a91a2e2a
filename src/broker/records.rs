//! What must survive a crash: one durable record per VM and one per migration. A VM's record is
//! the only place that says who owns it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::durable;
use crate::migration::handover::SignedHandOver;
use crate::migration::message::Seed;
use crate::migration::{HandOver, Receipt};
use crate::types::codec::CodecError;
use crate::types::{MemberJid, MigrationId, PublicKey, VmId, hex};
use crate::vm::VmSpec;

use super::interface::MigrationView;

/// Version of the records below.
const VERSION: u32 = 1;

/// A VM this cloud owns, or owned and keeps a copy of.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct VmRecord {
    pub version: u32,
    pub spec: VmSpec,
    /// Number of hand-overs so far; whoever holds the highest signed epoch owns the VM.
    pub epoch: u64,
    pub ownership: Ownership,
    /// Whether the operator wants it to run.
    pub run: bool,
    /// Names of the recipe's components, for people.
    pub components: Vec<String>,
    /// Directory of its disks, relative to the VM's own.
    pub disks: String,
    pub created: UnixMillis,
    /// How it came here, unless it was born here.
    pub arrival: Option<Arrival>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Ownership {
    Here,
    /// Given to another cloud under `epoch + 1`; never to be run here under this epoch.
    GivenUp(Box<GivenUp>),
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct GivenUp {
    pub migration: MigrationId,
    pub to: MemberJid,
    pub to_key: PublicKey,
    /// The hand-over's canonical bytes in hex, recorded before they were signed.
    pub record: String,
    pub was_running: bool,
    pub since: UnixMillis,
    /// The disks' state when given up: a seed should the VM come home.
    pub seed: Seed,
    pub receipt: Option<Receipt>,
    /// When the copy is scrubbed; `None` while the target has not acknowledged.
    pub scrub_after: Option<UnixMillis>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Arrival {
    pub migration: MigrationId,
    pub from: MemberJid,
    pub from_key: PublicKey,
    pub receipt: Receipt,
    /// The source knows that we own it and has been told that it runs.
    pub acknowledged: bool,
}

impl GivenUp {
    pub fn hand_over(&self) -> Result<HandOver, CodecError> {
        let bad = || CodecError::Invalid { what: "hand-over record", rule: "not hex".into() };
        HandOver::decode(&hex::decode(&self.record).ok_or_else(bad)?)
    }
}

impl VmRecord {
    pub fn new(spec: VmSpec, components: Vec<String>, disks: &str, created: UnixMillis) -> Self {
        Self {
            version: VERSION,
            spec,
            epoch: 1,
            ownership: Ownership::Here,
            run: false,
            components,
            disks: disks.to_owned(),
            created,
            arrival: None,
        }
    }

    pub fn is_here(&self) -> bool {
        self.ownership == Ownership::Here
    }

    pub fn given_up(&self) -> Option<&GivenUp> {
        match &self.ownership {
            Ownership::Here => None,
            Ownership::GivenUp(g) => Some(g),
        }
    }
}

/// A migration this broker has or had a part in.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MigrationRecord {
    pub version: u32,
    pub view: MigrationView,
}

/// A promise never to run a VM under an epoch, kept so that it binds after a restart too.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ReturnRecord {
    pub vm: VmId,
    pub epoch: u64,
    pub hand_over: SignedHandOver,
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
    #[error("record {path} is not readable: restore it from a backup, the VM's disks are untouched")]
    Malformed {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("record {path} has version {version}; this release reads version {VERSION}")]
    Version { path: PathBuf, version: u32 },
}

/// The directory tree of a cloud's own state.
#[derive(Clone, Debug)]
pub struct Records {
    dir: PathBuf,
}

impl Records {
    pub fn open(data_dir: &Path) -> Result<Self, RecordError> {
        let records = Self { dir: data_dir.to_owned() };
        for sub in ["vms", "migrations", "returns", "receipts"] {
            let path = data_dir.join(sub);
            let made = fs::create_dir_all(&path).and_then(|()| durable::sync_dir_of(&path.join("record")));
            made.map_err(|source| RecordError::Io { action: "create", path, source })?;
        }
        Ok(records)
    }

    /// The cloud's data directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn vms_dir(&self) -> PathBuf {
        self.dir.join("vms")
    }

    pub fn vm_dir(&self, vm: VmId) -> PathBuf {
        self.dir.join("vms").join(vm.to_string())
    }

    /// Makes `record` the truth about its VM. When this returns, it survives a crash.
    pub fn save_vm(&self, record: &VmRecord) -> Result<(), RecordError> {
        let dir = self.vm_dir(record.spec.id);
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| RecordError::Io { action, path, source }
        };
        if !dir.exists() {
            fs::create_dir_all(&dir).map_err(io("create", &dir))?;
            durable::sync_dir_of(&dir).map_err(io("sync", &dir))?;
        }
        save(&dir.join("record.json"), record)
    }

    /// As [`Records::save_vm`], where the record changes who may run the VM. An error means that
    /// nothing was recorded.
    pub fn save_ownership(&self, record: &VmRecord) -> Result<(), RecordError> {
        self.save_vm(record).map_err(end_if_undecided)
    }

    pub fn remove_vm(&self, vm: VmId) -> Result<(), RecordError> {
        let path = self.vm_dir(vm).join("record.json");
        durable::remove(&path).map_err(|source| RecordError::Io { action: "remove", path, source })?;
        let dir = self.vm_dir(vm);
        match fs::remove_dir_all(&dir) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(RecordError::Io { action: "remove", path: dir, source })
            }
            _ => Ok(()),
        }
    }

    pub fn vms(&self) -> Result<Vec<VmRecord>, RecordError> {
        let mut out: Vec<VmRecord> = Vec::new();
        for dir in entries(&self.dir.join("vms"))? {
            let path = dir.join("record.json");
            if !path.exists() {
                continue;
            }
            // The process before this one may have ended because it could not.
            durable::sync_dir_of(&path).map_err(|source| RecordError::Io {
                action: "make durable",
                path: path.clone(),
                source,
            })?;
            let record: VmRecord = load(&path)?;
            if record.version != VERSION {
                return Err(RecordError::Version { path, version: record.version });
            }
            out.push(record);
        }
        Ok(out)
    }

    pub fn save_migration(&self, view: &MigrationView) -> Result<(), RecordError> {
        let path = self.dir.join("migrations").join(format!("{}.json", view.progress.id));
        save(&path, &MigrationRecord { version: VERSION, view: view.clone() })
    }

    /// Past and unfinished migrations; damaged records are left out, they decide nothing.
    pub fn migrations(&self) -> Result<Vec<MigrationView>, RecordError> {
        let all = entries(&self.dir.join("migrations"))?;
        Ok(all.iter().filter_map(|p| load::<MigrationRecord>(p).ok()).map(|r| r.view).collect())
    }

    pub fn forget_migration(&self, id: MigrationId) -> Result<(), RecordError> {
        let path = self.dir.join("migrations").join(format!("{id}.json"));
        durable::remove(&path).map_err(|source| RecordError::Io { action: "remove", path, source })
    }

    /// Promises never to run the VM under the hand-over's epoch.
    pub fn save_return(&self, record: &ReturnRecord) -> Result<(), RecordError> {
        save(&self.return_path(record.vm, record.epoch), record).map_err(end_if_undecided)
    }

    /// Keeps a receipt for good. The VM's record holds it only until the VM arrives again or is
    /// removed, but its source may ask for it later, and must never be told that we returned it.
    pub fn save_receipt(&self, migration: MigrationId, receipt: &Receipt) -> Result<(), RecordError> {
        save(&self.receipt_path(migration), receipt)
    }

    pub fn receipt(&self, migration: MigrationId) -> Option<Receipt> {
        load(&self.receipt_path(migration)).ok()
    }

    fn receipt_path(&self, migration: MigrationId) -> PathBuf {
        self.dir.join("receipts").join(format!("{migration}.json"))
    }

    pub fn has_returned(&self, vm: VmId, epoch: u64) -> bool {
        self.return_path(vm, epoch).exists()
    }

    /// Keys the operator has confirmed at run time; those in the configuration come first.
    pub fn trust(&self) -> Result<BTreeMap<MemberJid, PublicKey>, RecordError> {
        let path = self.trust_path();
        if path.exists() { load(&path) } else { Ok(BTreeMap::new()) }
    }

    pub fn save_trust(&self, pinned: &BTreeMap<MemberJid, PublicKey>) -> Result<(), RecordError> {
        save(&self.trust_path(), pinned)
    }

    fn trust_path(&self) -> PathBuf {
        self.dir.join("trust.json")
    }

    fn return_path(&self, vm: VmId, epoch: u64) -> PathBuf {
        self.dir.join("returns").join(format!("{vm}-{epoch}.json"))
    }
}

/// A record that may be there, or not after the next crash, must neither be acted on nor denied.
/// The process ends; the next one makes what it finds durable, and goes by that.
fn end_if_undecided(error: RecordError) -> RecordError {
    if let RecordError::Io { source, path, .. } = &error
        && durable::is_undecided(source)
    {
        tracing::error!(path = %path.display(), error = super::problem::chain(&error), "who owns the VM cannot be recorded: the broker ends here, and asks when it is started again");
        std::process::exit(1);
    }
    error
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, RecordError> {
    let io = |source| RecordError::Io { action: "list", path: dir.to_owned(), source };
    let mut out: Vec<PathBuf> =
        fs::read_dir(dir).map_err(io)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>().map_err(io)?;
    out.retain(|p| !p.to_string_lossy().ends_with(durable::TEMPORARY_SUFFIX));
    out.sort();
    Ok(out)
}

fn save<T: Serialize>(path: &Path, value: &T) -> Result<(), RecordError> {
    let json = serde_json::to_vec_pretty(value)
        .map_err(|source| RecordError::Malformed { path: path.to_owned(), source })?;
    durable::write(path, &json).map_err(|source| RecordError::Io {
        action: "write",
        path: path.to_owned(),
        source,
    })
}

fn load<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, RecordError> {
    let json =
        fs::read(path).map_err(|source| RecordError::Io { action: "read", path: path.to_owned(), source })?;
    serde_json::from_slice(&json).map_err(|source| RecordError::Malformed { path: path.to_owned(), source })
}
