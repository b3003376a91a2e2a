//! Healing: what a check finds damaged or missing is fetched from members that hold it.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::broker::Peer;
use crate::interface::{Event, Problem, ProblemKind, ReportLine};
use crate::repository::{CheckReport, ObjectId, Repository};
use crate::runner::Shared;
use crate::types::MemberJid;

use super::borrowing::borrow;
use super::catalogue::{check_lines, check_repository, line, repository_problem};

/// Lines about objects that stay damaged or missing.
const NOT_HEALED: &str = "not-healed";

/// What a healing could not mend, from its report: objects and damaged references.
pub fn unhealed(lines: &[ReportLine]) -> u64 {
    let counts =
        |l: &&ReportLine| !l.detail.is_empty() && (l.name == NOT_HEALED || l.name == "damaged-references");
    lines.iter().filter(counts).map(|l| l.value).sum()
}

/// Checks the repository and heals what can be healed.
pub async fn heal(
    shared: &Arc<Shared>,
    peers: &[Peer],
    events: &mpsc::Sender<Event>,
) -> Result<Vec<ReportLine>, Problem> {
    let told = events.clone();
    let report = on_disk(shared, move |repository| {
        check_repository(repository, &mut |event| drop(told.try_send(event)))
    })
    .await?;
    let mut wanted = wanted_of(&report);
    let mut tried: BTreeSet<ObjectId> = BTreeSet::new();
    let mut healed: Vec<(ObjectId, MemberJid)> = Vec::new();
    let mut reasons = std::collections::BTreeMap::new();
    // A manifest that comes back tells what else is missing.
    loop {
        let asked: Vec<ObjectId> = wanted.difference(&tried).copied().collect();
        if asked.is_empty() {
            break;
        }
        let (before, total) = (healed.len() as u64, wanted.len() as u64);
        let mut progress = |fetched: u64| {
            let done = before + fetched;
            let phase = "heal".to_owned();
            let _ = events.try_send(Event::Progress { phase, done, total, unit: "objects".into() });
        };
        progress(0);
        let borrowed = borrow(shared, peers, &asked, &Arc::default(), &mut progress).await;
        healed.extend(borrowed.fetched);
        reasons.extend(borrowed.reasons);
        tried.extend(asked);
        let missing =
            on_disk(shared, |repository| repository.missing_objects().map_err(|e| repository_problem(&e)));
        wanted.extend(missing.await?.into_iter().map(|m| m.object));
    }
    let mended: BTreeSet<ObjectId> = healed.iter().map(|(object, _)| *object).collect();
    let left: Vec<ObjectId> = wanted.difference(&mended).copied().collect();
    let mut lines = check_lines(&report);
    lines.push(line("healed", healed.len() as u64, "objects", ""));
    lines.push(line(NOT_HEALED, left.len() as u64, "objects", ""));
    lines.extend(
        healed.iter().map(|(object, from)| line("healed", 1, "objects", format!("{object}, from {from}"))),
    );
    let nobody = match peers {
        [] => "no trusted member is online".to_owned(),
        _ => peers
            .iter()
            .map(|p| match reasons.get(&p.jid) {
                Some(reason) => format!("{}: {reason}", p.jid),
                None => format!("{} does not offer it", p.jid),
            })
            .collect::<Vec<_>>()
            .join("; "),
    };
    lines.extend(left.iter().map(|object| {
        let why = match object {
            ObjectId::Manifest(_) | ObjectId::Pack(_) => nobody.as_str(),
            ObjectId::Recipe(_) | ObjectId::Node(_) => "members lend components only",
        };
        line(NOT_HEALED, 1, "objects", format!("{object}: {why}"))
    }));
    Ok(lines)
}

fn wanted_of(report: &CheckReport) -> BTreeSet<ObjectId> {
    let damaged = report.damaged.iter().map(|d| d.object);
    damaged.chain(report.missing.iter().map(|m| m.object)).collect()
}

async fn on_disk<T: Send + 'static>(
    shared: &Arc<Shared>,
    work: impl FnOnce(&Repository) -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let repository = shared.repository.clone();
    let done = tokio::task::spawn_blocking(move || work(&repository)).await;
    done.map_err(|e| Problem::from_error(ProblemKind::Failed, "repository", &e))?
}
