//! Notes about migrations, written behind the owner task's back: a member may make as many of them as it
//! likes, and must not make everybody wait for the disk with each. Notes of the same migration are
//! written once, the last; a crash forgets those that wait. They decide nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::interface::problem::chain;
use crate::migration::move_record::MoveRecord;
use crate::types::MigrationId;

use super::record_dir::Records;

/// Migrations whose notes may wait; what comes beyond is not recorded.
const WAITING_MAX: usize = 4096;

pub struct Notes {
    desk: Arc<Desk>,
    writer: Option<JoinHandle<()>>,
}

struct Desk {
    records: Records,
    waiting: Mutex<Waiting>,
    woken: Condvar,
    /// Held from choosing a note to having written it, so that an older one never replaces a newer.
    pen: Mutex<()>,
}

#[derive(Default)]
struct Waiting {
    /// What is to be recorded, or `None` for what is to be forgotten.
    changes: BTreeMap<MigrationId, Option<Box<MoveRecord>>>,
    /// Somebody waits for the pen: the writer lets it go first.
    hurried: bool,
    ended: bool,
}

impl Notes {
    pub fn new(records: Records) -> Self {
        let desk = Desk { records, waiting: Mutex::default(), woken: Condvar::new(), pen: Mutex::default() };
        let desk = Arc::new(desk);
        let at_desk = desk.clone();
        let writer = std::thread::Builder::new().name("notes".into()).spawn(move || at_desk.write_all());
        let writer =
            writer.inspect_err(|error| tracing::error!(%error, "migrations will not be recorded")).ok();
        Self { desk, writer }
    }

    /// Records the migration soon.
    pub fn later(&self, record: &MoveRecord) {
        self.desk.put(record.course.id, Some(Box::new(record.clone())));
    }

    pub fn forget(&self, id: MigrationId) {
        self.desk.put(id, None);
    }

    /// Records the migration before this returns: what this cloud itself began, and goes on with after a
    /// restart.
    pub fn now(&self, record: &MoveRecord) {
        lock(&self.desk.waiting).hurried = true;
        let _pen = lock(&self.desk.pen);
        lock(&self.desk.waiting).changes.remove(&record.course.id);
        self.desk.write(record.course.id, Some(record));
        lock(&self.desk.waiting).hurried = false;
        self.desk.woken.notify_all();
    }
}

/// Whatever waits is written before.
impl Drop for Notes {
    fn drop(&mut self) {
        lock(&self.desk.waiting).ended = true;
        self.desk.woken.notify_all();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

impl Desk {
    fn put(&self, id: MigrationId, change: Option<Box<MoveRecord>>) {
        let mut waiting = lock(&self.waiting);
        if waiting.changes.len() >= WAITING_MAX && !waiting.changes.contains_key(&id) {
            tracing::warn!(migration = %id, "not recorded: the disk is slower than migrations begin and end");
            return;
        }
        waiting.changes.insert(id, change);
        self.woken.notify_all();
    }

    fn write_all(&self) {
        loop {
            let mut waiting = lock(&self.waiting);
            while waiting.changes.is_empty() || waiting.hurried {
                if waiting.ended && waiting.changes.is_empty() {
                    return;
                }
                waiting = self.woken.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
            drop(waiting);
            let _pen = lock(&self.pen);
            let next = lock(&self.waiting).changes.pop_first();
            if let Some((id, change)) = next {
                self.write(id, change.as_deref());
            }
        }
    }

    fn write(&self, id: MigrationId, change: Option<&MoveRecord>) {
        let written = match change {
            Some(record) => self.records.save_migration(record),
            None => self.records.forget_migration(id),
        };
        if let Err(e) = written {
            tracing::warn!(migration = %id, error = chain(&e), "not recorded: a restart would forget it");
        }
    }
}

// A panic while one is held leaves nothing half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::account::new_view;
    use crate::clock::UnixMillis;
    use crate::vm::VmSpec;

    fn record() -> MoveRecord {
        let spec: VmSpec = serde_json::from_value(serde_json::json!({
            "id": uuid::Uuid::nil(), "name": "web", "cpus": 1, "memory": 1 << 27, "recipe": "0".repeat(64),
            "root_size": 0, "user_data_size": 0, "nics": [], "architecture": "amd64", "cpu_model": "qemu64",
        }))
        .unwrap();
        new_view(
            MigrationId::random(),
            &spec,
            crate::interface::MigrationRole::Target,
            &"a@x".parse().unwrap(),
            None,
            UnixMillis(0),
        )
        .into()
    }

    #[test]
    fn the_last_note_of_each_migration_is_what_is_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let (mut kept, forgotten) = (record(), record());
        let notes = Notes::new(records.clone());
        notes.later(&forgotten);
        for updated in 0..500 {
            kept.course.updated = UnixMillis(updated);
            notes.later(&kept);
        }
        notes.forget(forgotten.course.id);
        drop(notes);
        assert_eq!(records.migrations().unwrap(), [kept]);
    }

    #[test]
    fn what_is_recorded_at_once_is_not_replaced_by_what_waited() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let notes = Notes::new(records.clone());
        let mut all: Vec<_> = (0..50).map(|_| record()).collect();
        for record in &mut all {
            notes.later(record);
            record.course.updated = UnixMillis(7);
            notes.now(record);
        }
        drop(notes);
        let recorded = records.migrations().unwrap();
        assert_eq!(recorded.len(), all.len());
        assert!(recorded.iter().all(|record| record.course.updated == UnixMillis(7)));
    }

    #[test]
    fn notes_that_wait_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let notes = Notes::new(Records::open(dir.path()).unwrap());
        let _pen = lock(&notes.desk.pen);
        (0..WAITING_MAX + 100).for_each(|_| notes.forget(MigrationId::random()));
        assert_eq!(lock(&notes.desk.waiting).changes.len(), WAITING_MAX);
        // The writer waits for the pen.
        drop(_pen);
    }
}
