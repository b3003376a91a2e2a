//! The doubly signed records this cloud keeps for good, and how operators get them.

use crate::broker::book::RecordError;
use crate::broker::effect::ReceiptWanted;
use crate::interface::{Problem, ProblemKind, Reply, chain};
use crate::migration::Evidence;
use crate::runner::record_dir::Records;
use crate::types::MigrationId;

/// The record of one migration, remembered or not. Blocking.
pub fn receipt(records: &Records, wanted: ReceiptWanted) -> Result<Reply, Problem> {
    let ReceiptWanted { text: id, known, remarks, .. } = wanted;
    let object = format!("migration {id}");
    let failed = |e: RecordError| {
        Problem::from_error(ProblemKind::Damaged, object.clone(), &e)
            .next("the other cloud of the migration keeps the same record")
    };
    let found = find(records, &id, &object)?.or_else(|| known.as_ref().ok().map(|p| p.id));
    let Some(migration) = found else {
        return Err(known
            .err()
            .unwrap_or_else(|| Problem::new(ProblemKind::NotFound, object.clone(), "is not known here")));
    };
    let returned = records.returned(migration).map_err(failed)?.map(Evidence::from);
    let given = records.receipt(migration).map_err(failed)?.map(Evidence::from);
    let Some(mut evidence) = returned.or(given) else {
        let mut reason =
            "there is no doubly signed record of it: it was not handed over, or not yet".to_owned();
        remarks.iter().filter(|(id, _)| *id == migration).for_each(|(_, remark)| {
            reason.push_str("; ");
            reason.push_str(remark);
        });
        return Err(Problem::new(ProblemKind::Conflict, object, reason)
            .next(format!("see 'cicada migration show {migration}'")));
    };
    // Without it the record stands as well, for itself.
    if let Ok(lineage) = evidence.verify().map(|h| records.lineage(h.vm)) {
        match lineage {
            Ok(lineage) => evidence = evidence.with_history(&lineage),
            Err(e) => tracing::warn!(%migration, error = chain(&e), "its history is damaged here"),
        }
    }
    evidence.remarks = remarks.into_iter().filter(|(id, _)| *id == migration).map(|(_, r)| r).collect();
    Ok(Reply::Receipt(Box::new(evidence)))
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
