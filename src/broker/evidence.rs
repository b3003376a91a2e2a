//! The doubly signed records this cloud keeps for good, and how operators get them.

use crate::interface::Reply;
use crate::interface::problem::{Problem, ProblemKind, chain};
use crate::migration::{Evidence, Lineage};
use crate::types::MigrationId;

use super::Broker;
use super::calls::Answer;
use super::lineages::LAW;
use super::records::{RecordError, Records, VmRecord};

impl Broker {
    /// Answers with the record of one migration, remembered or not.
    pub(super) fn receipt(&self, id: String, reply: Answer) {
        let known = self.migration(&id).map(|view| view.progress);
        let remarks = self.resolution_remarks();
        let records = self.shared.records.clone();
        tokio::task::spawn_blocking(move || {
            let object = format!("migration {id}");
            let failed = |e: RecordError| {
                Problem::from_error(ProblemKind::Damaged, object.clone(), &e)
                    .next("the other cloud of the migration keeps the same record")
            };
            let result = (|| {
                let found = find(&records, &id, &object)?;
                let found = found.or_else(|| known.as_ref().ok().map(|p| p.id));
                let Some(migration) = found else {
                    return Err(known.err().unwrap_or_else(|| {
                        Problem::new(ProblemKind::NotFound, object.clone(), "is not known here")
                    }));
                };
                let returned = records.returned(migration).map_err(failed)?.map(Evidence::from);
                let given = records.receipt(migration).map_err(failed)?.map(Evidence::from);
                let Some(mut evidence) = returned.or(given) else {
                    let reason = "there is no doubly signed record of it: it was not handed over, or not yet";
                    let mut reason = reason.to_owned();
                    remarks.iter().filter(|(id, _)| *id == migration).for_each(|(_, remark)| {
                        reason.push_str("; ");
                        reason.push_str(remark);
                    });
                    return Err(Problem::new(ProblemKind::Conflict, object.clone(), reason)
                        .next(format!("see 'cicada migration show {migration}'")));
                };
                // Without it the record stands as well, for itself.
                if let Ok(lineage) = evidence.verify().map(|h| records.lineage(h.vm)) {
                    match lineage {
                        Ok(lineage) => evidence = evidence.with_history(&lineage),
                        Err(e) => {
                            tracing::warn!(%migration, error = chain(&e), "its history is damaged here")
                        }
                    }
                }
                evidence.remarks =
                    remarks.into_iter().filter(|(id, _)| *id == migration).map(|(_, r)| r).collect();
                Ok(Reply::Receipt(Box::new(evidence)))
            })();
            let _ = reply.send(result);
        });
    }
}

/// Keeps the receipts that `record` holds beyond it: at start, and before it is replaced or removed.
pub fn keep_receipts(records: &Records, record: &VmRecord) -> Result<(), RecordError> {
    for (migration, receipt) in LAW.outlive(record) {
        match records.receipt(migration) {
            Ok(Some(_)) => {}
            Ok(None) => records.save_receipt(migration, &receipt)?,
            Err(e) => {
                tracing::warn!(%migration, error = chain(&e), "its receipt is damaged; written anew");
                records.save_receipt(migration, &receipt)?;
            }
        }
    }
    keep_lineage(records, &LAW.known(records.lineage(record.spec.id)?, Some(record)))
}

/// Makes a history durable, if it is not what is kept.
pub fn keep_lineage(records: &Records, lineage: &Lineage) -> Result<(), RecordError> {
    if lineage.is_empty() || records.lineage(lineage.vm()).is_ok_and(|kept| kept == *lineage) {
        return Ok(());
    }
    records.save_lineage(lineage)
}

/// The one migration whose record is kept and whose id begins so.
fn find(records: &Records, prefix: &str, object: &str) -> Result<Option<MigrationId>, Problem> {
    if prefix.len() < 4 {
        return Ok(None);
    }
    let found = records.signed_migrations(prefix);
    let found = found.map_err(|e| Problem::from_error(ProblemKind::Failed, object, &e))?;
    match found.as_slice() {
        [] => Ok(None),
        [id] => Ok(Some(*id)),
        _ => Err(Problem::new(ProblemKind::BadRequest, object, "several migrations begin so")
            .next("write more digits")),
    }
}
