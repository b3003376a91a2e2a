//! Conversations of more than one request, until they come to something: a VM's history is shown to whom it
//! goes to, and members are asked what they know of our VMs.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::broker::{Input, Matter, Peer};
use crate::interface::chain;
use crate::migration::lineage::PAGE_LINKS_MAX;
use crate::migration::message::{CLAIMS_MAX, Claim};
use crate::migration::{AnswerBody, Denial, DenialCode, Lineage, Link, Links, RequestBody};
use crate::types::{MigrationId, Successions, VmId};
use crate::vm::VmSpec;

use super::Shared;
use super::shared::AskError;

/// Reserves room at the target and shows it the VM's history. The answer is the reservation's, or the
/// denial that the history met.
pub async fn reserve(
    shared: &Shared,
    peer: &Peer,
    matter: Matter,
    spec: VmSpec,
    lineage: &Lineage,
) -> Result<AnswerBody, AskError> {
    let answer = shared.ask(peer, matter, RequestBody::Reservation { spec }).await?;
    let AnswerBody::Reserved { reservation: Some(_), known, .. } = &answer else { return Ok(answer) };
    let after = known.filter(|id| lineage.position(id).is_some());
    let links = lineage.since(after.as_ref());
    let (mut at, mut again) = (0, 0);
    loop {
        let page = Links(links[at..].iter().take(PAGE_LINKS_MAX).cloned().collect());
        let (at_link, total, successions) = (at as u32, links.len() as u32, lineage.successions().clone());
        let body = RequestBody::Lineage { at: at_link, total, after, links: page, successions };
        match shared.ask(peer, matter, body).await? {
            AnswerBody::Lineage { links: held } if held as usize == links.len() => return Ok(answer),
            AnswerBody::Lineage { links: held } if (held as usize) < links.len() => {
                // A target that comes no further is not asked for ever.
                again += u32::from(held as usize <= at);
                at = held as usize;
                if again > 3 {
                    let text = "the target does not take the VM's history";
                    return Ok(AnswerBody::Denied(Denial::new(DenialCode::Other, text)));
                }
            }
            AnswerBody::Lineage { .. } => {
                let text = "the target counts more of the VM's history than there is";
                return Ok(AnswerBody::Denied(Denial::new(DenialCode::Other, text)));
            }
            other => return Ok(other),
        }
    }
}

/// Asks a member what it knows of these VMs; what it shows beyond is verified and told to the core.
pub async fn ask_owners(shared: &Arc<Shared>, peer: &Peer, claims: Vec<Claim>) -> Result<(), AskError> {
    // Nothing claimed is told as well: what was disputed is not any more.
    let pages = if claims.is_empty() {
        vec![Vec::new()]
    } else {
        claims.chunks(CLAIMS_MAX).map(<[Claim]>::to_vec).collect()
    };
    for page in pages {
        ask_page(shared, peer, page).await?;
    }
    Ok(())
}

/// Asks about one page of claims, and about each VM again of which one answer did not say all.
async fn ask_page(shared: &Arc<Shared>, peer: &Peer, page: Vec<Claim>) -> Result<(), AskError> {
    let mut waiting = vec![page];
    let mut so_far: BTreeMap<VmId, (Claim, Vec<Link>)> = BTreeMap::new();
    let mut keys = Successions::default();
    while let Some(claims) = waiting.pop() {
        let asked: BTreeMap<VmId, Claim> = claims.iter().map(|c| (c.vm, *c)).collect();
        let matter = Matter { migration: MigrationId::random(), vm: VmId(uuid::Uuid::nil()), epoch: 0 };
        let answer = shared.ask(peer, matter, RequestBody::Owners { claims }).await?;
        let AnswerBody::Owners { known } = answer else { return Ok(()) };
        for k in known {
            let Some(claim) = asked.get(&k.vm) else { continue };
            for succession in k.successions.iter() {
                let _ = keys.add(succession.clone());
            }
            let (first, links) = so_far.entry(k.vm).or_insert((*claim, Vec::new()));
            let first = *first;
            let news = !k.links.0.is_empty();
            links.extend(k.links.0);
            let too_many = links.len() > crate::migration::lineage::LINKS_MAX;
            match (k.more && news && !too_many, links.last().map(Link::id)) {
                (true, tip) => waiting.push(vec![Claim { tip, ..*claim }]),
                // The budget of that answer was used up by others.
                (false, _) if k.more && !news && asked.len() > 1 => waiting.push(vec![*claim]),
                _ => {
                    if let Some((_, links)) = so_far.remove(&k.vm) {
                        judge(shared, peer, first, links, keys.clone()).await;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Verifies what was shown, away from the owner task.
async fn judge(shared: &Arc<Shared>, peer: &Peer, claim: Claim, links: Vec<Link>, keys: Successions) {
    let (shared, peer) = (shared.clone(), peer.clone());
    let work = tokio::task::spawn_blocking(move || {
        let kept = match shared.records.lineage(claim.vm) {
            Ok(kept) => kept,
            Err(e) => {
                return tracing::error!(vm = %claim.vm, error = chain(&e), "what is known of the VM is damaged");
            }
        };
        let goes_on = kept.tip().map(|tip| tip.id) == claim.tip;
        let whole = || Lineage::empty(claim.vm).with(&keys).continued(links.clone());
        let verified = if goes_on { kept.with(&keys).continued(links.clone()) } else { whole() };
        match verified.or_else(|_| whole()) {
            Ok(lineage) => {
                let (vm, by) = (claim.vm, peer);
                shared.tell(Input::Shown(by, vm, Box::new(lineage)));
            }
            Err(e) => {
                tracing::warn!(vm = %claim.vm, member = %peer.jid, error = chain(&e), "shows a history that is none")
            }
        }
    });
    let _ = work.await;
}
