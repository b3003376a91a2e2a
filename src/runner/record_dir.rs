//! What must survive a crash: one durable record per VM and one per migration. A VM's record is
//! the only place that says who owns it.
#![doc = include_str!("RECORDS.md")]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::broker::book::{Book, Damaged, MigrationRecord, RecordError, ReturnRecord};
use crate::broker::resolving::Resolution;
use crate::clock::UnixMillis;
use crate::durable;
use crate::federation::{Kept, Revoked};
use crate::migration::lineage::Lineage;
use crate::migration::move_record::MoveRecord;
use crate::migration::records::{VERSION, VmRecord};
use crate::migration::{Receipt, Return};
use crate::types::{MemberJid, MigrationId, PublicKey, VmId};

use super::notes::Notes;

/// Records of one beginning that are told apart.
const FOUND_MAX: usize = 16;

/// The directory tree of a cloud's own state.
#[derive(Clone, Debug)]
pub struct Records {
    dir: PathBuf,
    changes: Arc<AtomicU64>,
}

impl Records {
    pub fn open(data_dir: &Path) -> Result<Self, RecordError> {
        let records = Self { dir: data_dir.to_owned(), changes: Arc::default() };
        for sub in ["vms", "migrations", "returns", "receipts", "resolutions", "lineages"] {
            let path = data_dir.join(sub);
            // What guests wrote is nobody else's business, wherever the data directory is.
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o700)))
                .and_then(|()| durable::sync_dir_of(&path.join("record")))
                .map_err(|source| RecordError::Io { action: "make private", path, source })?;
        }
        Ok(records)
    }

    /// Keys the operator of `data_dir` has confirmed, read without changing anything there.
    pub fn trust_in(data_dir: &Path) -> Result<BTreeMap<MemberJid, Kept>, RecordError> {
        Self { dir: data_dir.to_owned(), changes: Arc::default() }.trust()
    }

    /// Grows with every change of a VM's record.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// When this broker's operator said that its state came from a backup.
    pub fn restored(&self) -> Result<Option<UnixMillis>, RecordError> {
        load_if_there(&self.dir.join("restored.json"))
    }

    pub fn save_restored(&self, at: UnixMillis) -> Result<(), RecordError> {
        save(&self.dir.join("restored.json"), &at)
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
        self.changes.fetch_add(1, Ordering::Relaxed);
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
        self.save_vm(record).map_err(undecided)
    }

    pub fn remove_vm(&self, vm: VmId) -> Result<(), RecordError> {
        self.changes.fetch_add(1, Ordering::Relaxed);
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

    /// All VMs, and those whose record is damaged: one must not keep the others down.
    pub fn vms(&self) -> Result<(Vec<VmRecord>, Vec<Damaged>), RecordError> {
        let (mut good, mut damaged) = (Vec::new(), Vec::new());
        for dir in entries(&self.dir.join("vms"))? {
            let path = dir.join("record.json");
            let name = dir.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse::<VmId>().ok());
            let Some(vm) = name.filter(|_| path.exists()) else { continue };
            match self.vm(vm, &path) {
                Ok(record) => good.push(record),
                Err(reason) => damaged.push(Damaged { vm, path, reason }),
            }
        }
        Ok((good, damaged))
    }

    fn vm(&self, vm: VmId, path: &Path) -> Result<VmRecord, String> {
        // The process before this one may have ended because it could not.
        durable::sync_dir_of(path).map_err(|e| format!("{} cannot be made durable: {e}", path.display()))?;
        let record: VmRecord = load(path).map_err(|e| crate::interface::problem::chain(&e))?;
        if record.version != VERSION {
            return Err(RecordError::Version { path: path.to_owned(), version: record.version }.to_string());
        }
        if record.spec.id != vm {
            return Err(format!("record {} is of another VM: {}", path.display(), record.spec.id));
        }
        // An operator promised it while the record could not be read.
        let source = record.arrival.as_ref().map(|a| &a.from_key);
        if record.is_here() && self.has_returned(vm, record.epoch, source) {
            return Err(format!("epoch {} was returned to its source and must never run here", record.epoch));
        }
        Ok(record)
    }

    pub fn save_migration(&self, record: &MoveRecord) -> Result<(), RecordError> {
        let path = self.dir.join("migrations").join(format!("{}.json", record.course.id));
        save(&path, &MigrationRecord { version: VERSION, record: record.clone() })
    }

    /// Past and unfinished migrations; damaged records are left out, they decide nothing.
    pub fn migrations(&self) -> Result<Vec<MoveRecord>, RecordError> {
        let all = entries(&self.dir.join("migrations"))?;
        Ok(all.iter().filter_map(|p| load::<MigrationRecord>(p).ok()).map(|r| r.record).collect())
    }

    pub fn forget_migration(&self, id: MigrationId) -> Result<(), RecordError> {
        let path = self.dir.join("migrations").join(format!("{id}.json"));
        durable::remove(&path).map_err(|source| RecordError::Io { action: "remove", path, source })
    }

    /// What is known of a VM's history beside its record; empty if nothing is.
    pub fn lineage(&self, vm: VmId) -> Result<Lineage, RecordError> {
        let path = self.lineage_path(vm);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Lineage::empty(vm)),
            Err(source) => return Err(RecordError::Io { action: "read", path, source }),
        };
        Lineage::reopen(vm, &bytes).map_err(|source| RecordError::Lineage { path, source })
    }

    /// Keeps a VM's history for good.
    pub fn save_lineage(&self, lineage: &Lineage) -> Result<(), RecordError> {
        let path = self.lineage_path(lineage.vm());
        durable::write(&path, &lineage.encode()).map_err(|source| RecordError::Io {
            action: "write",
            path,
            source,
        })
    }

    fn lineage_path(&self, vm: VmId) -> PathBuf {
        self.dir.join("lineages").join(vm.to_string())
    }

    /// The returns of this VM's hand-overs that are kept here. Reads all that are kept of any VM: for
    /// records of earlier releases, once.
    pub fn returns_of(&self, vm: VmId) -> Result<Vec<Return>, RecordError> {
        let all = entries(&self.dir.join("returns"))?;
        let of_it = |back: &Return| back.hand_over.read().is_ok_and(|h| h.vm == vm);
        Ok(all.iter().filter_map(|path| load::<Return>(path).ok()).filter(of_it).collect())
    }

    /// Promises never to run the VM under the hand-over's epoch, nor any before it. The promise is made
    /// to the holder of `source`, who signed the hand-over: nobody else can spoil an epoch for it. An
    /// operator who does not know whose hand-over it was promises it to all.
    pub fn save_return(&self, record: &ReturnRecord, source: Option<&PublicKey>) -> Result<(), RecordError> {
        let path = self.return_path(record.vm, source);
        if load_if_there::<ReturnRecord>(&path)?.is_some_and(|kept| kept.epoch >= record.epoch) {
            return Ok(());
        }
        save(&path, record).map_err(undecided)
    }

    /// Whether anything was promised to that source about the VM.
    pub fn has_promised(&self, vm: VmId, source: &PublicKey) -> bool {
        self.return_path(vm, Some(source)).exists()
    }

    /// Keeps a receipt for good. The VM's record holds it only until the VM arrives again or is
    /// removed, but its source may ask for it later, and must never be told that we returned it.
    pub fn save_receipt(&self, migration: MigrationId, receipt: &Receipt) -> Result<(), RecordError> {
        save(&self.receipt_path(migration), receipt)
    }

    /// An error, other than `None`, says nothing about whether one was given.
    pub fn receipt(&self, migration: MigrationId) -> Result<Option<Receipt>, RecordError> {
        load_if_there(&self.receipt_path(migration))
    }

    /// Keeps the other doubly signed record for good.
    pub fn save_returned(&self, migration: MigrationId, back: &Return) -> Result<(), RecordError> {
        save(&self.returned_path(migration), back)
    }

    pub fn returned(&self, migration: MigrationId) -> Result<Option<Return>, RecordError> {
        load_if_there(&self.returned_path(migration))
    }

    /// Migrations whose doubly signed record is kept and whose id begins so, a few at most.
    pub fn signed_migrations(&self, prefix: &str) -> Result<Vec<MigrationId>, RecordError> {
        let mut found = Vec::new();
        for dir in ["receipts", "returns"] {
            let path = self.dir.join(dir);
            let io = |source| RecordError::Io { action: "list", path: path.clone(), source };
            // For good means many: what is not asked for is not kept in memory.
            for entry in fs::read_dir(&path).map_err(io)? {
                let name = entry.map_err(io)?.file_name();
                let id =
                    name.to_str().and_then(|n| n.strip_suffix(".json")).filter(|n| n.starts_with(prefix));
                let id = id.and_then(|n| n.parse::<MigrationId>().ok());
                found.extend(id.filter(|id| found.len() < FOUND_MAX && !found.contains(id)));
            }
        }
        Ok(found)
    }

    /// What an operator decided about a hand-over in doubt.
    pub fn save_resolution(&self, r: &Resolution) -> Result<(), RecordError> {
        save(&self.dir.join("resolutions").join(format!("{}.json", r.migration)), r)
    }

    /// A damaged one is left out, loudly: it must not keep the VMs down.
    pub fn resolutions(&self) -> Result<Vec<Resolution>, RecordError> {
        let readable = |path: &PathBuf| match load(path) {
            Ok(resolution) => Some(resolution),
            Err(e) => {
                tracing::error!(
                    error = crate::interface::problem::chain(&e),
                    "an operator's decision is unreadable"
                );
                None
            }
        };
        Ok(entries(&self.dir.join("resolutions"))?.iter().filter_map(readable).collect())
    }

    fn receipt_path(&self, migration: MigrationId) -> PathBuf {
        self.dir.join("receipts").join(format!("{migration}.json"))
    }

    fn returned_path(&self, migration: MigrationId) -> PathBuf {
        self.dir.join("returns").join(format!("{migration}.json"))
    }

    /// Whether that epoch was promised away, to the holder of `source` or to whomever. A promise that
    /// cannot be read binds for every epoch.
    pub fn has_returned(&self, vm: VmId, epoch: u64, source: Option<&PublicKey>) -> bool {
        let promised_to = |source: Option<&PublicKey>| {
            let kept = load_if_there::<ReturnRecord>(&self.return_path(vm, source));
            let name = source.map_or_else(|| "all".into(), PublicKey::fingerprint);
            // As earlier releases wrote it: one file for each epoch.
            let each = self.dir.join("returns").join(format!("{vm}-{epoch}-{name}.json"));
            !matches!(&kept, Ok(None)) && kept.map_or(true, |k| k.is_some_and(|k| k.epoch >= epoch))
                || each.exists()
        };
        promised_to(None) || source.is_some_and(|key| promised_to(Some(key)))
    }

    /// Keys confirmed at run time, and what followed them; those in the configuration come first.
    pub fn trust(&self) -> Result<BTreeMap<MemberJid, Kept>, RecordError> {
        let path = self.trust_path();
        if path.exists() { load(&path) } else { Ok(BTreeMap::new()) }
    }

    pub fn save_trust(&self, kept: &BTreeMap<MemberJid, Kept>) -> Result<(), RecordError> {
        save(&self.trust_path(), kept)
    }

    /// Members whose keys the operator revoked at run time.
    pub fn revoked(&self) -> Result<Revoked, RecordError> {
        let path = self.dir.join("revoked.json");
        if path.exists() { load(&path) } else { Ok(Revoked::default()) }
    }

    pub fn save_revoked(&self, revoked: &Revoked) -> Result<(), RecordError> {
        save(&self.dir.join("revoked.json"), revoked)
    }

    fn trust_path(&self) -> PathBuf {
        self.dir.join("trust.json")
    }

    fn return_path(&self, vm: VmId, source: Option<&PublicKey>) -> PathBuf {
        let source = source.map_or_else(|| "all".into(), PublicKey::fingerprint);
        self.dir.join("returns").join(format!("{vm}-{source}.json"))
    }
}

/// A record that may be there, or not after the next crash, is told apart: nobody may act on it.
fn undecided(error: RecordError) -> RecordError {
    match error {
        RecordError::Io { source, path, .. } if durable::is_undecided(&source) => {
            RecordError::Undecided { path, source }
        }
        error => error,
    }
}

/// The book as a directory keeps it, with a desk for notes that may wait.
pub struct RecordBook {
    records: Records,
    notes: Option<Notes>,
}

impl RecordBook {
    pub fn new(records: Records) -> Self {
        Self { notes: Some(Notes::new(records.clone())), records }
    }

    /// Of a cloud whose broker does not run: it is only read.
    pub fn at_rest(records: Records) -> Self {
        Self { notes: None, records }
    }
}

impl Book for RecordBook {
    fn vms(&self) -> Result<(Vec<VmRecord>, Vec<Damaged>), RecordError> {
        self.records.vms()
    }
    fn save_vm(&self, record: &VmRecord) -> Result<(), RecordError> {
        self.records.save_vm(record)
    }
    fn save_ownership(&self, record: &VmRecord) -> Result<(), RecordError> {
        self.records.save_ownership(record)
    }
    fn record_path(&self, vm: VmId) -> PathBuf {
        self.records.vm_dir(vm).join("record.json")
    }
    fn migrations(&self) -> Result<Vec<MoveRecord>, RecordError> {
        self.records.migrations()
    }
    fn note_now(&self, record: &MoveRecord) {
        if let Some(notes) = &self.notes {
            notes.now(record);
        }
    }
    fn note_later(&self, record: &MoveRecord) {
        if let Some(notes) = &self.notes {
            notes.later(record);
        }
    }
    fn forget_migration(&self, id: MigrationId) {
        if let Some(notes) = &self.notes {
            notes.forget(id);
        }
    }
    fn lineage(&self, vm: VmId) -> Result<Lineage, RecordError> {
        self.records.lineage(vm)
    }
    fn save_lineage(&self, lineage: &Lineage) -> Result<(), RecordError> {
        self.records.save_lineage(lineage)
    }
    fn returns_of(&self, vm: VmId) -> Result<Vec<Return>, RecordError> {
        self.records.returns_of(vm)
    }
    fn save_return(&self, record: &ReturnRecord, source: Option<&PublicKey>) -> Result<(), RecordError> {
        self.records.save_return(record, source)
    }
    fn has_promised(&self, vm: VmId, source: &PublicKey) -> bool {
        self.records.has_promised(vm, source)
    }
    fn has_returned(&self, vm: VmId, epoch: u64, source: Option<&PublicKey>) -> bool {
        self.records.has_returned(vm, epoch, source)
    }
    fn save_receipt(&self, migration: MigrationId, receipt: &Receipt) -> Result<(), RecordError> {
        self.records.save_receipt(migration, receipt)
    }
    fn receipt(&self, migration: MigrationId) -> Result<Option<Receipt>, RecordError> {
        self.records.receipt(migration)
    }
    fn save_returned(&self, migration: MigrationId, back: &Return) -> Result<(), RecordError> {
        self.records.save_returned(migration, back)
    }
    fn save_resolution(&self, resolution: &Resolution) -> Result<(), RecordError> {
        self.records.save_resolution(resolution)
    }
    fn resolutions(&self) -> Result<Vec<Resolution>, RecordError> {
        self.records.resolutions()
    }
    fn save_trust(&self, kept: &BTreeMap<MemberJid, Kept>) -> Result<(), RecordError> {
        self.records.save_trust(kept)
    }
    fn save_revoked(&self, revoked: &Revoked) -> Result<(), RecordError> {
        self.records.save_revoked(revoked)
    }
    fn restored(&self) -> Result<Option<UnixMillis>, RecordError> {
        self.records.restored()
    }
    fn save_restored(&self, at: UnixMillis) -> Result<(), RecordError> {
        self.records.save_restored(at)
    }
    fn changes(&self) -> u64 {
        self.records.changes()
    }
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

fn load_if_there<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>, RecordError> {
    match load(path) {
        Ok(value) => Ok(Some(value)),
        Err(RecordError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

fn load<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, RecordError> {
    let json =
        fs::read(path).map_err(|source| RecordError::Io { action: "read", path: path.to_owned(), source })?;
    serde_json::from_slice(&json).map_err(|source| RecordError::Malformed { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::handover::{HandOver, SignedHandOver};
    use crate::migration::records::Arrival;
    use crate::types::{ByteSize, IdentityKey, MapId, RecipeId};
    use crate::vm::{Firmware, VmSpec};

    fn record(name: &str) -> VmRecord {
        let spec = VmSpec {
            id: VmId::random(),
            name: name.parse().unwrap(),
            cpus: 1,
            memory: ByteSize::mib(64),
            recipe: RecipeId::of(b"r"),
            root_size: ByteSize::mib(1),
            user_data_size: ByteSize(0),
            nics: Vec::new(),
            architecture: "amd64".into(),
            cpu_model: "qemu64".into(),
            firmware: Firmware::Bios,
            disk_bus: Default::default(),
            system_uuid: None,
        };
        VmRecord::new(spec, Vec::new(), "disks-1", UnixMillis(1))
    }

    fn signed() -> SignedHandOver {
        let (a, b) = (IdentityKey::from_secret_bytes(&[1; 32]), IdentityKey::from_secret_bytes(&[2; 32]));
        let record = HandOver {
            vm: VmId::random(),
            migration: MigrationId::random(),
            epoch: 2,
            source: "a@x".parse().unwrap(),
            source_key: a.public(),
            target: "b@x".parse().unwrap(),
            target_key: b.public(),
            recipe: RecipeId::of(b"r"),
            root_delta: MapId::of(b"d"),
            user_data: MapId::of(b"u"),
            issued: UnixMillis(5),
            provenance: None,
        };
        record.sign(&a)
    }

    #[test]
    fn one_damaged_record_leaves_the_others_readable() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let (good, bad) = (record("good"), record("bad"));
        records.save_vm(&good).unwrap();
        records.save_vm(&bad).unwrap();
        let path = records.vm_dir(bad.spec.id).join("record.json");
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let (vms, damaged) = records.vms().unwrap();
            assert!(vms.len() == 1 && vms[0] == good, "cut at {cut}");
            assert_eq!((damaged[0].vm, &damaged[0].path), (bad.spec.id, &path));
        }
        // Of a later release, of another VM, or of an epoch that was promised away.
        let spoilt =
            [VmRecord { version: 9, ..bad.clone() }, VmRecord { spec: good.spec.clone(), ..bad.clone() }];
        for record in spoilt {
            fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
            assert_eq!(records.vms().unwrap().1.len(), 1, "{record:?}");
        }
        fs::write(&path, whole).unwrap();
        assert_eq!(records.vms().unwrap().1, []);
        records
            .save_return(&ReturnRecord { vm: bad.spec.id, epoch: bad.epoch, hand_over: None }, None)
            .unwrap();
        assert_eq!(records.vms().unwrap().1.len(), 1);
    }

    #[test]
    fn signed_records_are_found_by_the_beginning_of_their_id() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let key = IdentityKey::from_secret_bytes(&[2; 32]);
        let (came, back) = (MigrationId::random(), MigrationId::random());
        records.save_receipt(came, &signed().accept(&key)).unwrap();
        let returned = signed().give_back(&key);
        records.save_returned(back, &returned).unwrap();
        // A promise is not found as a migration.
        records.save_return(&ReturnRecord { vm: VmId::random(), epoch: 2, hand_over: None }, None).unwrap();
        for id in [came, back] {
            assert_eq!(records.signed_migrations(&id.to_string()[..8]).unwrap(), [id]);
        }
        assert_eq!(records.signed_migrations("").unwrap().len(), 2);
        assert_eq!(records.returned(back).unwrap(), Some(returned));
        assert_eq!(records.receipt(back).unwrap(), None);
        fs::write(dir.path().join(format!("receipts/{came}.json")), b"{").unwrap();
        assert!(records.receipt(came).is_err(), "a damaged receipt is not the same as none");
    }

    #[test]
    fn records_of_earlier_releases_are_read() {
        let mut value =
            serde_json::to_value(ReturnRecord { vm: VmId::random(), epoch: 2, hand_over: Some(signed()) })
                .unwrap();
        serde_json::from_value::<ReturnRecord>(value.clone()).unwrap();
        value.as_object_mut().unwrap().remove("hand_over");
        serde_json::from_value::<ReturnRecord>(value).unwrap();
        let arrival = serde_json::json!({
            "migration": MigrationId::random(), "from": "a@x", "acknowledged": true,
            "from_key": IdentityKey::from_secret_bytes(&[1; 32]).public(),
            "receipt": signed().accept(&IdentityKey::from_secret_bytes(&[2; 32])),
        });
        assert!(!serde_json::from_value::<Arrival>(arrival).unwrap().is_open());
    }
}
