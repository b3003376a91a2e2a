//! Checks: asking other members whether they could take a VM and what of it they hold, and
//! answering the same question.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use futures::future::join_all;

use crate::broker::effect::{Checked, DisksOf};
use crate::broker::planning::{reason, unasked};
use crate::broker::{Matter, Peer};
use crate::component::{Manifest, Recipe};
use crate::interface::{Candidate, Problem, Verdict};
use crate::migration::message::{CHECK_IDS_MAX, CheckAnswer, Seed};
use crate::migration::records::VmRecord;
use crate::migration::{AnswerBody, Denial, DenialCode, RequestBody};
use crate::placement::hardware;
use crate::repository::Repository;
use crate::types::{CloudName, ComponentId, MigrationId, PackId};
use crate::vm::{Block, ChunkMap, MapRef, VmSpec};

use super::Shared;
use super::content::catalogue;
use super::host::{machine, scan};

/// Asks `peer` about `spec`. A blocker comes back as the first denial of its list.
pub async fn check(
    shared: &Arc<Shared>,
    peer: &Peer,
    matter: Matter,
    spec: &VmSpec,
    recipe: &Arc<Recipe>,
) -> Result<Checked, Denial> {
    let begun = Instant::now();
    let mut out = Checked { components_needed: recipe.components.len() as u32, ..Checked::default() };
    // What it is made of is told to those alone that could take it.
    let fit = ask(shared, peer, matter, spec, Vec::new(), Vec::new()).await?;
    (out.differences, out.seed) = (fit.differences, fit.seed);
    out.kept = fit.kept;
    if !fit.composed {
        let (repository, recipe) = (shared.repository.clone(), recipe.clone());
        out.base_bytes = blocking(move || base_bytes(&repository, &recipe)).await?;
    }
    let mut lacking = Vec::new();
    for ids in recipe.components.chunks(CHECK_IDS_MAX) {
        let answer = ask(shared, peer, matter, spec, ids.to_vec(), Vec::new()).await?;
        lacking.extend(pick(ids, &answer.components_lacking)?);
    }
    out.answer_ms = begun.elapsed().as_secs_f64() * 1000.0;
    out.components_held = out.components_needed - lacking.len() as u32;

    let manifests = {
        let (repository, lacking) = (shared.repository.clone(), lacking.clone());
        blocking(move || manifests_of(&repository, &lacking)).await?
    };
    let mut packs: Vec<PackId> = manifests.iter().flat_map(|(m, _)| m.packs.iter().map(|p| p.id)).collect();
    packs.sort_unstable();
    packs.dedup();
    out.packs_needed = packs.len() as u32;
    let mut missing = Vec::new();
    for ids in packs.chunks(CHECK_IDS_MAX) {
        let answer = ask(shared, peer, matter, spec, Vec::new(), ids.to_vec()).await?;
        missing.extend(pick(ids, &answer.packs_lacking)?);
    }
    out.packs_missing = missing.len() as u32;
    let bases = held_bases(shared, peer, matter, spec, &lacking, &missing).await?;
    out.component_bytes = manifests.iter().map(|(_, stored_bytes)| stored_bytes).sum();
    let repository = shared.repository.clone();
    let (whole, saves, unknown) = blocking(move || {
        let (mut whole, mut saves, mut unknown) = (0, 0, false);
        for id in &missing {
            let stored = repository.pack_stored(id).map_err(|e| content(&e))?.stored_size_bytes;
            whole += stored;
            let Some(bases) = bases.get(id) else { continue };
            match bases.iter().filter_map(|base| repository.held_delta_bytes(id, base)).min() {
                Some(delta) => saves += stored.saturating_sub(delta),
                None => unknown = true,
            }
        }
        Ok((whole, saves, unknown))
    })
    .await?;
    out.component_bytes += whole;
    (out.delta_saves_bytes, out.deltas_unknown) = (saves, unknown);
    Ok(out)
}

/// For packs the member lacks: packs both hold that a delta may lean on.
async fn held_bases(
    shared: &Arc<Shared>,
    peer: &Peer,
    matter: Matter,
    spec: &VmSpec,
    components: &[ComponentId],
    missing: &[PackId],
) -> Result<HashMap<PackId, Vec<PackId>>, Denial> {
    let (repository, components) = (shared.repository.clone(), components.to_vec());
    let wanted: HashSet<PackId> = missing.iter().copied().collect();
    let likely = blocking(move || repository.likely_bases(&components, &wanted).map_err(|e| content(&e)));
    let mut bases = likely.await?;
    let mut all: Vec<PackId> = bases.values().flatten().copied().collect();
    all.sort_unstable();
    all.dedup();
    let mut lacking = HashSet::new();
    for ids in all.chunks(CHECK_IDS_MAX) {
        let answer = ask(shared, peer, matter, spec, Vec::new(), ids.to_vec()).await?;
        lacking.extend(pick(ids, &answer.packs_lacking)?);
    }
    bases.values_mut().for_each(|found| found.retain(|base| !lacking.contains(base)));
    bases.retain(|_, found| !found.is_empty());
    Ok(bases)
}

async fn ask(
    shared: &Shared,
    peer: &Peer,
    matter: Matter,
    spec: &VmSpec,
    components: Vec<ComponentId>,
    packs: Vec<PackId>,
) -> Result<CheckAnswer, Denial> {
    let request = RequestBody::Configuration {
        spec: spec.clone(),
        components: components.clone(),
        packs: packs.clone(),
    };
    match shared.ask(peer, matter, request).await {
        Ok(AnswerBody::Configuration(answer)) => match answer.blockers.first() {
            None => {
                hardware::unread(spec, &answer).map_or(Ok(()), Err)?;
                pick(&components, &answer.components_lacking)?;
                pick(&packs, &answer.packs_lacking)?;
                Ok(answer)
            }
            Some(first) => {
                let all: Vec<_> = answer.blockers.iter().map(|d| d.text.as_str()).collect();
                Err(Denial::new(first.code, all.join("; ")).next(first.next_step.clone()))
            }
        },
        Ok(AnswerBody::Denied(d)) => Err(d),
        Ok(_) => {
            Err(Denial::new(DenialCode::Other, format!("{} gave an answer that fits no check", peer.jid)))
        }
        Err(e) => Err(Denial::new(DenialCode::Other, crate::interface::chain(&e))
            .next(format!("see 'cicada members' for whether {} is online and trusted", peer.jid))),
    }
}

/// What the answer's positions name, each of them once.
fn pick<T: Copy>(ids: &[T], positions: &[u32]) -> Result<Vec<T>, Denial> {
    let bad = |text: &str| Denial::new(DenialCode::Other, format!("the answer names positions {text}"));
    if !positions.is_sorted_by(|a, b| a < b) {
        return Err(bad("twice or out of order"));
    }
    let picked = positions.iter().map(|p| ids.get(*p as usize).copied()).collect::<Option<Vec<_>>>();
    picked.ok_or_else(|| bad("that were not asked about"))
}

fn manifests_of(repository: &Repository, ids: &[ComponentId]) -> Result<Vec<(Arc<Manifest>, u64)>, Denial> {
    ids.iter()
        .map(|id| {
            let bytes = repository.manifest_stored_bytes(id).map_err(|e| content(&e))?;
            Ok((repository.manifest(id).map_err(|e| content(&e))?, bytes))
        })
        .collect()
}

/// Plain bytes of all packs of a recipe.
fn base_bytes(repository: &Repository, recipe: &Recipe) -> Result<u64, Denial> {
    let mut packs = HashMap::new();
    for id in &recipe.components {
        let manifest = repository.manifest(id).map_err(|e| content(&e))?;
        packs.extend(manifest.packs.iter().map(|pack| (pack.id, pack.size_bytes)));
    }
    Ok(packs.values().fold(0, |sum, bytes| sum.saturating_add(*bytes)))
}

/// This side's part of a check that needs the repository. Blocking.
pub fn holdings(
    repository: &Repository,
    components: &[ComponentId],
    packs: &[PackId],
) -> (Vec<u32>, Vec<u32>) {
    let lacks_component = |id: &ComponentId| {
        !repository.has_manifest(id)
            || repository.manifest(id).map_or(true, |m| m.packs.iter().any(|p| !repository.has_pack(&p.id)))
    };
    let positions = |lacking: Vec<bool>| (0u32..).zip(lacking).filter(|(_, l)| *l).map(|(i, _)| i).collect();
    (
        positions(components.iter().map(lacks_component).collect()),
        positions(packs.iter().map(|id| !repository.has_pack(id)).collect()),
    )
}

/// Bytes of `map` that a holder of `seed` lacks; all of its data if the seed is not known here.
fn bytes_missing(repository: &Repository, map: &MapRef, seed: Option<&MapRef>) -> Result<u64, Denial> {
    let load = |r: &MapRef| repository.map(r);
    let wanted: ChunkMap = load(map).map_err(|e| content(&e))?;
    let held: HashSet<Block> = match seed.map(load) {
        Some(Ok(seed)) => seed.blocks.into_iter().map(|(_, b)| b).collect(),
        _ => HashSet::new(),
    };
    let mut missing: HashSet<Block> = HashSet::new();
    missing.extend(wanted.blocks.iter().map(|(_, b)| *b).filter(|b| *b != Block::Zero && !held.contains(b)));
    Ok(missing.len() as u64 * u64::from(map.block_size_bytes))
}

/// As [`bytes_missing`], of the root delta and of the user data.
pub fn disks_missing(repository: &Repository, now: &Seed, held: Option<&Seed>) -> Result<(u64, u64), Denial> {
    Ok((
        bytes_missing(repository, &now.root_delta, held.map(|s| &s.root_delta))?,
        bytes_missing(repository, &now.user_data, held.map(|s| &s.user_data))?,
    ))
}

/// The row of `plan` for one member that is asked.
pub async fn candidate(
    shared: &Arc<Shared>,
    peer: &Peer,
    cloud: Option<CloudName>,
    matter: Matter,
    spec: &VmSpec,
    recipe: &Arc<Recipe>,
    disks: Option<Seed>,
) -> Candidate {
    let mut row = unasked(peer.jid.clone(), cloud, Verdict::Yes);
    row.components_needed = recipe.components.len() as u32;
    match check(shared, peer, matter, &spec.anonymous(), recipe).await {
        Ok(checked) => {
            row.component_bytes_missing = checked.component_bytes - checked.delta_saves_bytes;
            row.deltas_unknown = checked.deltas_unknown;
            row.components_held = checked.components_held;
            row.packs_missing = checked.packs_missing;
            row.answer_ms = checked.answer_ms;
            if !checked.differences.is_empty() {
                row.verdict = Verdict::WithDifferences {
                    differences: checked.differences.iter().map(reason).collect(),
                };
            }
            row.base_bytes = checked.base_bytes;
            let kept = checked.kept.unwrap_or_default();
            row.kept_s = kept.for_s;
            if let Some(now) = disks {
                let (repository, seed) = (shared.repository.clone(), checked.seed);
                let sizes = blocking(move || disks_missing(&repository, &now, seed.as_ref()));
                if let Ok((root, user)) = sizes.await {
                    row.root_delta_bytes_missing = root.saturating_sub(kept.root_delta_bytes);
                    row.user_data_bytes_missing = user.saturating_sub(kept.user_data_bytes);
                }
            }
        }
        Err(denial) => row.verdict = Verdict::No { reasons: vec![reason(&denial)] },
    }
    row
}

fn content(e: &dyn std::error::Error) -> Denial {
    Denial::new(DenialCode::Content, crate::interface::chain(e))
}

pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Denial> + Send + 'static,
) -> Result<T, Denial> {
    joined(tokio::task::spawn_blocking(work)).await
}

pub async fn joined<T>(work: tokio::task::JoinHandle<Result<T, Denial>>) -> Result<T, Denial> {
    match work.await {
        Ok(result) => result,
        Err(e) => Err(Denial::new(DenialCode::Other, format!("a worker ended early: {e}"))),
    }
}

/// The rows of a plan: the disks are scanned, and all of `peers` are asked at once.
pub async fn candidates(
    shared: &Arc<Shared>,
    record: &VmRecord,
    peers: Vec<(Peer, Option<CloudName>)>,
) -> Result<Vec<Candidate>, Problem> {
    let spec = &record.spec;
    let disks = machine::paths_of(shared, &DisksOf::record(record));
    let (for_scan, scan_spec) = (shared.clone(), spec.clone());
    let scanned = blocking(move || scan::scan(&for_scan, &scan_spec, &disks, None).map(|s| s.seed));
    let seed = scanned.await.ok();
    let recipe = shared.repository.recipe(&spec.recipe).map_err(|e| catalogue::repository_problem(&e))?;
    let recipe = Arc::new(recipe);
    let ask = peers.iter().map(|(peer, cloud)| {
        let matter = Matter { migration: MigrationId::random(), vm: spec.id, epoch: record.epoch };
        let recipe = &recipe;
        async move { candidate(shared, peer, cloud.clone(), matter, spec, recipe, seed).await }
    });
    Ok(join_all(ask).await)
}
