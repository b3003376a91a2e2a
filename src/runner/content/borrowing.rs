//! Fetching components by hash from whichever members hold them, from several at once. What
//! arrives is verified like everything else, so any trusted member is as good as another.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;

use crate::broker::{Matter, Peer};
use crate::interface::chain;
use crate::migration::message::{CONTENT_IDS_MAX, ContentAnswer};
use crate::migration::{AnswerBody, RequestBody};
use crate::repository::{ObjectId, Repository};
use crate::runner::Shared;
use crate::transfer::{ObjectKey, ObjectSink, Progress, Refusal, Ticket, TransferError, Violation};
use crate::types::{Hash, MemberJid, MigrationId, PackId, VmId};

use super::receiving::{self, Packs, Sink};

/// Attempts to go on with one member after the data link broke.
const RECONNECTS_MAX: u32 = 3;

/// What came of asking members for objects.
#[derive(Debug, Default)]
pub struct Borrowed {
    /// Objects that are held now, and whom they came from.
    pub fetched: Vec<(ObjectId, MemberJid)>,
    /// Why members gave less than all, in words.
    pub reasons: BTreeMap<MemberJid, String>,
    /// UDP payload of the data links, both directions.
    pub wire_bytes: u64,
}

/// What one member offers of a request.
struct Offer {
    peer: Peer,
    ticket: Ticket,
    addresses: Vec<SocketAddr>,
    holds: HashSet<ObjectId>,
}

/// Asks all of `peers` for manifests and packs (other objects are not lent) and fetches each from
/// one that offers it; where that fails, from the next. `progress` gets the number fetched, `counter`
/// what comes while it comes.
pub async fn borrow(
    shared: &Arc<Shared>,
    peers: &[Peer],
    wanted: &[ObjectId],
    counter: &Arc<Progress>,
    progress: &mut (dyn FnMut(u64) + Send),
) -> Borrowed {
    let mut borrowed = Borrowed::default();
    let lent = |o: &&ObjectId| matches!(o, ObjectId::Manifest(_) | ObjectId::Pack(_));
    let wanted: Vec<ObjectId> = wanted.iter().filter(lent).copied().collect();
    // Pinned before they come, so that no collection takes them for garbage.
    let _pin = shared.repository.pin(wanted.clone());
    for objects in wanted.chunks(CONTENT_IDS_MAX) {
        let mut pending: BTreeSet<ObjectId> = objects.iter().copied().collect();
        // Asked again while something comes: a ticket may have expired in the middle.
        loop {
            let before = pending.len();
            let asked: Vec<ObjectId> = pending.iter().copied().collect();
            let answers = join_all(peers.iter().map(|peer| ask(shared, peer, &asked))).await;
            let mut offers = Vec::new();
            for (peer, answer) in peers.iter().zip(answers) {
                match answer {
                    Ok(offer) => offers.extend(offer),
                    Err(reason) => drop(borrowed.reasons.insert(peer.jid.clone(), reason)),
                }
            }
            fetch_offered(shared, &mut offers, &mut pending, &mut borrowed, (counter, &mut *progress)).await;
            join_all(offers.iter().map(|offer| give_back(shared, offer))).await;
            if pending.is_empty() || pending.len() == before {
                break;
            }
        }
    }
    borrowed
}

/// Shares the objects out among those who offer them, until each has come or failed everywhere.
async fn fetch_offered(
    shared: &Arc<Shared>,
    offers: &mut [Offer],
    pending: &mut BTreeSet<ObjectId>,
    borrowed: &mut Borrowed,
    (counter, progress): (&Arc<Progress>, &mut (dyn FnMut(u64) + Send)),
) {
    let packs = packs_of(shared, pending).await;
    loop {
        let mut shares: Vec<Vec<ObjectId>> = vec![Vec::new(); offers.len()];
        for object in pending.iter() {
            let holders = (0..offers.len()).filter(|n| offers[*n].holds.contains(object));
            if let Some(n) = holders.min_by_key(|n| shares[*n].len()) {
                shares[n].push(*object);
            }
        }
        if shares.iter().all(Vec::is_empty) {
            return;
        }
        let fetches = offers.iter().zip(&shares).filter(|(_, share)| !share.is_empty());
        let results =
            join_all(fetches.map(|(offer, share)| fetch(shared, offer, share, &packs, counter))).await;
        let asked = offers.iter_mut().zip(&shares).filter(|(_, share)| !share.is_empty());
        for ((offer, share), (wire_bytes, result)) in asked.zip(results) {
            borrowed.wire_bytes += wire_bytes;
            if let Err(reason) = result {
                tracing::warn!(member = %offer.peer.jid, reason, "did not give all it offered");
                borrowed.reasons.insert(offer.peer.jid.clone(), reason);
            }
            for object in share {
                // Whatever went wrong, this member is not asked for it again.
                offer.holds.remove(object);
                if holds(&shared.repository, object) {
                    pending.remove(object);
                    borrowed.fetched.push((*object, offer.peer.jid.clone()));
                }
            }
        }
        progress(borrowed.fetched.len() as u64);
    }
}

fn holds(repository: &Repository, object: &ObjectId) -> bool {
    match object {
        ObjectId::Manifest(id) => repository.has_manifest(id),
        ObjectId::Pack(id) => repository.has_pack(id),
        ObjectId::Recipe(_) | ObjectId::Node(_) => false,
    }
}

async fn packs_of(shared: &Arc<Shared>, objects: &BTreeSet<ObjectId>) -> Arc<Packs> {
    let packs: HashSet<PackId> = objects
        .iter()
        .filter_map(|o| match o {
            ObjectId::Pack(id) => Some(*id),
            _ => None,
        })
        .collect();
    let repository = shared.repository.clone();
    let sizes = tokio::task::spawn_blocking(move || repository.plain_sizes(&packs).unwrap_or_default()).await;
    Arc::new(Packs { sizes: sizes.unwrap_or_default(), ..Packs::default() })
}

/// A request for content belongs to no VM.
fn no_vm() -> Matter {
    Matter { migration: MigrationId::random(), vm: VmId(uuid::Uuid::nil()), epoch: 0 }
}

/// What `peer` offers of `objects`; nothing if it holds none of them.
async fn ask(shared: &Shared, peer: &Peer, objects: &[ObjectId]) -> Result<Option<Offer>, String> {
    let (mut components, mut packs) = (Vec::new(), Vec::new());
    for object in objects {
        match object {
            ObjectId::Manifest(id) => components.push(*id),
            ObjectId::Pack(id) => packs.push(*id),
            ObjectId::Recipe(_) | ObjectId::Node(_) => {}
        }
    }
    let request =
        RequestBody::Content { components: components.clone(), packs: packs.clone(), done: Vec::new() };
    let answer: ContentAnswer = match shared.ask(peer, no_vm(), request).await {
        Ok(AnswerBody::Content(answer)) => answer,
        Ok(AnswerBody::Denied(denial)) => return Err(denial.text.into()),
        Ok(_) => return Err("gave an answer that fits no content request".into()),
        Err(e) => return Err(chain(&e)),
    };
    let Some(ticket) = answer.ticket else { return Ok(None) };
    let ticket: Hash = ticket.parse().map_err(|_| "gave a malformed ticket".to_owned())?;
    // Positions beyond the lists name nothing.
    let components = answer.components_held.iter().filter_map(|i| components.get(*i as usize));
    let packs = answer.packs_held.iter().filter_map(|i| packs.get(*i as usize));
    let holds = components.map(|id| ObjectId::Manifest(*id)).chain(packs.map(|id| ObjectId::Pack(*id)));
    let addresses = receiving::resolve(shared, peer, &answer.addresses).await.map_err(|e| chain(&e))?;
    let ticket = Ticket::from_bytes(*ticket.as_bytes());
    Ok(Some(Offer { peer: peer.clone(), ticket, addresses, holds: holds.collect() }))
}

/// Frees the ticket at the member, which allows only few; if that fails, it expires.
async fn give_back(shared: &Shared, offer: &Offer) {
    let done = vec![Hash::from_bytes(*offer.ticket.as_bytes()).to_string()];
    let request = RequestBody::Content { components: Vec::new(), packs: Vec::new(), done };
    if let Err(e) = shared.ask(&offer.peer, no_vm(), request).await {
        tracing::debug!(member = %offer.peer.jid, error = chain(&e), "a content ticket is left to expire");
    }
}

/// Fetches objects from one member, over a connection of its own; what crossed the wire for it, and
/// how it ended.
async fn fetch(
    shared: &Shared,
    offer: &Offer,
    objects: &[ObjectId],
    packs: &Arc<Packs>,
    counter: &Arc<Progress>,
) -> (u64, Result<(), String>) {
    let mut wire_bytes = 0;
    let result = fetch_all(shared, offer, objects, packs, counter, &mut wire_bytes).await;
    (wire_bytes, result)
}

async fn fetch_all(
    shared: &Shared,
    offer: &Offer,
    objects: &[ObjectId],
    packs: &Arc<Packs>,
    counter: &Arc<Progress>,
    wire_bytes: &mut u64,
) -> Result<(), String> {
    let mut keys: Vec<ObjectKey> = objects
        .iter()
        .filter_map(|o| match o {
            ObjectId::Manifest(id) => Some(ObjectKey::Manifest(*id)),
            ObjectId::Pack(id) => Some(ObjectKey::Pack(*id)),
            ObjectId::Recipe(_) | ObjectId::Node(_) => None,
        })
        .collect();
    let sink: Arc<dyn ObjectSink> =
        Arc::new(Sink { repository: shared.repository.clone(), packs: packs.clone(), blocks: None });
    let mut attempt = 0;
    let mut damaged = None;
    while !keys.is_empty() {
        let failure = match shared.endpoint.connect(&offer.addresses, offer.peer.key).await {
            Ok(connection) => {
                let fetched =
                    connection.fetch(&offer.ticket, keys.clone(), sink.clone(), counter.clone()).await;
                let stats = connection.stats();
                *wire_bytes += stats.sent_bytes + stats.received_bytes;
                connection.close();
                match fetched {
                    Ok(report) => {
                        let refused = report.refused.first().map(|(key, why)| refusal(key, *why));
                        return refused.or(damaged).map_or(Ok(()), Err);
                    }
                    Err(e) => {
                        if e.report.missing.len() < keys.len() {
                            attempt = 0;
                        }
                        keys = e.report.missing;
                        e.source
                    }
                }
            }
            Err(e) => e,
        };
        match &failure {
            // Its copy is bad; the others may be good.
            TransferError::Misbehaved {
                source:
                    Violation::Pack { key, .. } | Violation::Hash { key, .. } | Violation::Unpack { key, .. },
                ..
            } => {
                damaged = Some(chain(&failure));
                keys.retain(|k| k != key);
            }
            TransferError::Interrupted { .. } | TransferError::Stalled { .. } if attempt < RECONNECTS_MAX => {
                attempt += 1;
                tokio::time::sleep(Duration::from_millis(500 << attempt)).await;
            }
            _ => return Err(chain(&failure)),
        }
    }
    damaged.map_or(Ok(()), Err)
}

fn refusal(key: &ObjectKey, why: Refusal) -> String {
    format!("did not serve {key}: {why}")
}
