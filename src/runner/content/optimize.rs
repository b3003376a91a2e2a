//! `component optimize`: what is kept is compressed strongly, and deltas between the versions that
//! are here are made ahead of time.

use std::collections::HashSet;

use crate::interface::problem::{Problem, ProblemKind};
use crate::interface::{Event, ReportLine};
use crate::repository::{ObjectId, Repository, RepositoryError};
use crate::types::{ComponentId, PackId};

use super::catalogue::{line, repository_problem, resolve};

/// Optimises the components named, or all that are held. What was done stays done when `stop`
/// says so.
pub fn optimize(
    repository: &Repository,
    names: &[String],
    deltas: bool,
    stop: &dyn Fn() -> bool,
    events: &mut dyn FnMut(Event),
) -> Result<Vec<ReportLine>, Problem> {
    let ids = match names {
        [] => repository
            .components()
            .map_err(|e| repository_problem(&e))?
            .into_iter()
            .map(|(id, _)| id)
            .collect(),
        names => resolve(repository, names)?,
    };
    let failed = |e: &RepositoryError| repository_problem(e);
    let _pin = repository.pin(ids.iter().map(|id| ObjectId::Manifest(*id)).collect());
    let mut packs: Vec<(PackId, u64)> = Vec::new();
    for id in &ids {
        let manifest = repository.manifest(id).map_err(|e| failed(&e))?;
        packs.extend(manifest.packs.iter().map(|p| (p.id, p.size_bytes)));
    }
    packs.sort_unstable();
    packs.dedup();
    packs.retain(|(id, _)| repository.has_pack(id));
    let total: u64 = packs.iter().map(|(_, size)| size).sum();

    let (mut before, mut after, mut done) = (0, 0, 0);
    for (id, size_bytes) in &packs {
        let optimized = repository.optimize_pack(id, stop);
        if stop() {
            return Err(stopped());
        }
        let optimized = optimized.map_err(|e| failed(&e))?;
        before += optimized.before_bytes;
        after += optimized.after_bytes;
        done += size_bytes;
        events(Event::Progress { phase: "compress".into(), done, total, unit: "bytes".into() });
    }
    let mut lines = vec![
        line("packs", packs.len() as u64, "", ""),
        line("stored before", before, "bytes", ""),
        line("stored now", after, "bytes", ""),
    ];
    if deltas {
        let pairs = versions(repository, &ids).map_err(|e| failed(&e))?;
        let (mut made, mut delta_bytes, mut whole_bytes) = (0, 0, 0);
        for (n, (id, base)) in pairs.iter().enumerate() {
            if stop() {
                return Err(stopped());
            }
            let whole = repository.pack_stored(id).map_err(|e| failed(&e))?.stored_size_bytes;
            if let Some(bytes) = repository.prepare_delta(id, base).map_err(|e| failed(&e))? {
                made += 1;
                delta_bytes += bytes;
                whole_bytes += whole;
            }
            let (done, total) = (n as u64 + 1, pairs.len() as u64);
            events(Event::Progress { phase: "deltas".into(), done, total, unit: "packs".into() });
        }
        lines.push(line("deltas", made, "", "between versions that are here"));
        lines.push(line("deltas stored", delta_bytes, "bytes", "instead of the whole packs:"));
        lines.push(line("those packs stored", whole_bytes, "bytes", ""));
    }
    Ok(lines)
}

/// Optimises all of `components` that is not yet, and prepares the deltas between their versions.
/// Returns when there is nothing left to do, or `stop` says so.
pub fn optimize_quietly(
    repository: &Repository,
    components: &[ComponentId],
    stop: &dyn Fn() -> bool,
) -> Result<(), RepositoryError> {
    let _pin = repository.pin(components.iter().map(|id| ObjectId::Manifest(*id)).collect());
    for id in components {
        // It may have been removed meanwhile.
        let Ok(manifest) = repository.manifest(id) else { continue };
        for pack in &manifest.packs {
            if stop() {
                return Ok(());
            }
            if repository.has_pack(&pack.id) && !repository.is_optimized(&pack.id)? {
                match repository.optimize_pack(&pack.id, stop) {
                    Err(_) if stop() => return Ok(()),
                    optimized => optimized.map(drop)?,
                }
            }
        }
    }
    for (id, base) in versions(repository, components)? {
        if stop() {
            return Ok(());
        }
        repository.prepare_delta(&id, &base)?;
    }
    Ok(())
}

/// Packs that differ between versions of the components, each with the packs a delta may lean on.
fn versions(repository: &Repository, ids: &[ComponentId]) -> Result<Vec<(PackId, PackId)>, RepositoryError> {
    let mut pairs = Vec::new();
    for id in ids {
        let packs: HashSet<PackId> = repository.manifest(id)?.packs.iter().map(|p| p.id).collect();
        for (pack, bases) in repository.likely_bases(&[*id], &packs)? {
            pairs.extend(bases.into_iter().map(|base| (pack, base)));
        }
    }
    pairs.sort_unstable();
    pairs.dedup();
    Ok(pairs)
}

fn stopped() -> Problem {
    Problem::new(ProblemKind::Failed, "component optimize", "was stopped; what was done stays done")
        .next("run it again to go on")
}
