//! Carries the conversations of `broker/talks.rs` over the network.

use std::sync::Arc;

use crate::broker::talks::{AskingOwners, Next, Reserving, Shown};
use crate::broker::{Input, Matter, Peer};
use crate::interface::chain;
use crate::migration::message::Claim;
use crate::migration::{AnswerBody, Lineage};
use crate::types::{MigrationId, VmId};
use crate::vm::VmSpec;

use super::Shared;
use super::shared::AskError;

/// Reserves room at the target and shows it the VM's history.
pub async fn reserve(
    shared: &Shared,
    peer: &Peer,
    matter: Matter,
    spec: VmSpec,
    lineage: Lineage,
) -> Result<AnswerBody, AskError> {
    let (mut talk, mut body) = Reserving::begin(spec, lineage);
    loop {
        match talk.answered(shared.ask(peer, matter, body).await?) {
            Next::Ask(next) => body = *next,
            Next::End(answer) => return Ok(*answer),
        }
    }
}

/// Asks a member what it knows of these VMs; what it shows beyond is verified and told to the core.
pub async fn ask_owners(shared: &Arc<Shared>, peer: &Peer, claims: Vec<Claim>) -> Result<(), AskError> {
    let mut talk = AskingOwners::begin(claims);
    while let Some(body) = talk.next_question() {
        let matter = Matter { migration: MigrationId::random(), vm: VmId(uuid::Uuid::nil()), epoch: 0 };
        for shown in talk.answered(shared.ask(peer, matter, body).await?) {
            judge(shared, peer, shown).await;
        }
    }
    Ok(())
}

/// Verifies what was shown, away from the runner's task.
async fn judge(shared: &Arc<Shared>, peer: &Peer, shown: Shown) {
    let (shared, peer, vm) = (shared.clone(), peer.clone(), shown.claim.vm);
    let work = tokio::task::spawn_blocking(move || {
        let kept = match shared.records.lineage(vm) {
            Ok(kept) => kept,
            Err(e) => {
                return tracing::error!(%vm, error = chain(&e), "what is known of the VM is damaged");
            }
        };
        match shown.verified(&kept) {
            Ok(lineage) => shared.tell(Input::Shown(peer, vm, Box::new(lineage))),
            Err(e) => {
                tracing::warn!(%vm, member = %peer.jid, error = chain(&e), "shows a history that is none");
            }
        }
    });
    let _ = work.await;
}
