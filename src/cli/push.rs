//! Hands components from the builder's repository to the broker: only what it lacks travels.

use std::collections::HashSet;
use std::sync::Arc;

use futures::stream::{self, StreamExt, TryStreamExt};

use crate::component::Manifest;
use crate::interface::ObjectKind;
use crate::interface::problem::Problem;
use crate::interface::{ContentRequest, Event, Request};
use crate::repository::Repository;
use crate::runner::content::catalogue::repository_problem;
use crate::types::{ComponentId, PackId};

use super::context::Context;
use super::format::bytes;
use super::printer::Outcome;
use super::progress::Progress;
use super::target::{Object, Target, blocking};

/// Packs under way at once; the receiver hashes each on a thread.
const PACKS_AT_ONCE: usize = 2;

/// Makes the broker hold and know `ids` and what they require.
pub async fn hand_over(ctx: &Context, builder: &Repository, ids: &[ComponentId]) -> Outcome {
    let target = ctx.target().await?;
    let (repository, ids) = (builder.clone(), ids.to_vec());
    let components = blocking(move || with_requirements(&repository, &ids)).await??;
    let mut progress = Progress::new(&ctx.printer);
    let mut sent = 0;
    for (id, manifest) in &components {
        sent = packs(&target, builder, manifest, sent, &mut progress).await?;
        let object = Object::Bytes(manifest.encode());
        target.put_object(ObjectKind::Manifest, id.0, object).await?;
        target.call(&Request::Content(ContentRequest::ComponentBind { id: *id }), |_| ()).await?;
    }
    progress.end();
    let receiver = match target {
        Target::Broker(_) => "the broker",
        Target::Offline(_) => "the repository (no broker runs)",
    };
    ctx.step(format!(
        "handed to {receiver}: {} components, {} of packs it lacked",
        components.len(),
        bytes(sent)
    ))
}

/// Each component after what it requires.
fn with_requirements(
    repository: &Repository,
    ids: &[ComponentId],
) -> Result<Vec<(ComponentId, Arc<Manifest>)>, Problem> {
    let mut seen = HashSet::new();
    let mut out = Vec::new();
    // (id, whether its requirements are on the list already)
    let mut pending: Vec<_> = ids.iter().rev().map(|id| (*id, false)).collect();
    while let Some((id, ready)) = pending.pop() {
        if ready {
            let manifest = repository.manifest(&id).map_err(|e| repository_problem(&e))?;
            out.push((id, manifest));
        } else if seen.insert(id) {
            let manifest = repository.manifest(&id).map_err(|e| repository_problem(&e))?;
            pending.push((id, true));
            pending.extend(manifest.requires.iter().map(|r| (*r, false)));
        }
    }
    Ok(out)
}

/// Sends the packs the target lacks, after `sent` bytes of others; says how many stored bytes that makes.
async fn packs(
    target: &Target,
    builder: &Repository,
    manifest: &Manifest,
    sent: u64,
    progress: &mut Progress,
) -> Result<u64, Problem> {
    let ids: Vec<_> = manifest.packs.iter().map(|p| p.id.0).collect();
    let held = target.has_objects(ObjectKind::Pack, &ids).await?;
    // Opened for their sizes first and again when their turn comes: they may be many.
    let mut missing = Vec::new();
    for (id, _) in ids.iter().zip(held).filter(|(_, held)| !held) {
        missing.push(
            builder
                .pack_stored(&PackId(*id))
                .map(|s| (*id, s.stored_size_bytes))
                .map_err(|e| repository_problem(&e))?,
        );
    }
    let total = sent + missing.iter().map(|(_, size)| size).sum::<u64>();
    let sends = stream::iter(missing).map(|(id, size)| async move {
        let stored = builder.pack_stored(&PackId(id)).map_err(|e| repository_problem(&e))?;
        target.put_object(ObjectKind::Pack, id, Object::File(stored.file, size)).await.map(|()| size)
    });
    let mut sends = std::pin::pin!(sends.buffer_unordered(PACKS_AT_ONCE));
    let mut done = sent;
    while let Some(size) = sends.try_next().await? {
        done += size;
        let (phase, unit) = ("hand-over".to_owned(), "bytes".to_owned());
        progress.event(&Event::Progress { phase, done, total, unit });
    }
    Ok(total)
}
