//! The histories of ownership at work: what is known of a VM, showing it to whom the VM goes, and
//! believing what is shown. The rules are `migration/ownership.rs`'s.

use tokio::sync::oneshot;

use crate::interface::problem::chain;
use crate::migration::lineage::{LINKS_MAX, LineageError, PAGE_LINKS_MAX};
use crate::migration::ownership::Standing;
use crate::migration::{
    AnswerBody, Denial, DenialCode, Envelope, Law, Lineage, Link, Links, Refusal, RequestBody,
};
use crate::types::{LinkId, VmId};
use crate::vm::VmSpec;

use super::guard::Work;
use super::records::RecordError;
use super::shared::{AskError, Matter, Peer, Shared};
use super::{Broker, Input, TargetEvent, evidence};

/// The rules of ownership as they ship.
pub(super) const LAW: Law = Law::WHOLE;

/// What a source shows of a VM's history while its reservation lasts.
#[derive(Default)]
pub struct Offer {
    /// The link before the first page, and the pages so far.
    after: Option<LinkId>,
    pages: Vec<Link>,
    /// Complete and verified.
    pub lineage: Option<Lineage>,
}

/// A refusal as a peer is told it.
pub(super) fn denial(refusal: &Refusal) -> Denial {
    Denial::new(refusal.code(), chain(refusal)).next(refusal.next_step())
}

impl Broker {
    /// All that is known here of a VM's history.
    pub(super) fn known(&self, vm: VmId) -> Result<Lineage, RecordError> {
        let kept = self.shared.records.lineage(vm)?;
        let kept = kept.with(self.successions());
        Ok(LAW.known(kept, self.vms.get(&vm).map(|vm| &vm.record)))
    }

    pub(super) fn standing<'a>(&'a self, vm: VmId, known: &'a Lineage) -> Standing<'a> {
        let record = self.vms.get(&vm).map(|vm| &vm.record);
        Standing { record, known, damaged: self.aside.contains_key(&vm) }
    }

    /// Makes a history durable, if it says more than what is kept.
    pub(super) fn keep_lineage(&self, lineage: &Lineage) -> Result<(), RecordError> {
        evidence::keep_lineage(&self.shared.records, lineage)
    }

    /// A page of the history of a VM that is about to come.
    pub(super) fn answer_lineage(
        &mut self,
        peer: &Peer,
        request: Envelope<RequestBody>,
        work: Work,
        reply: oneshot::Sender<Option<Vec<u8>>>,
    ) {
        let answer = |body: AnswerBody| self.shared.answer(&request, body).ok();
        let deny = |code, text: &str| AnswerBody::Denied(Denial::new(code, text));
        let RequestBody::Lineage { at, total, after, links, successions } = &request.body else { return };
        let (at, total) = (*at as usize, *total as usize);
        let id = request.migration;
        let Some(run) = self.incoming.get_mut(&id).filter(|run| run.is_of(peer, request.vm)) else {
            let text = "no such migration here; the reservation may have ended";
            return drop(reply.send(answer(deny(DenialCode::UnknownMigration, text))));
        };
        run.is_asked(self.shared.clock.now().plus(self.shared.config.migration.lease));
        if !run.is_leased() {
            return drop(reply.send(answer(deny(DenialCode::OutOfOrder, "the VM was already handed over"))));
        }
        if total > LINKS_MAX {
            return drop(reply.send(answer(deny(DenialCode::HandOver, &LineageError::TooLong.to_string()))));
        }
        let offer = &mut run.offer;
        // It begins anew after a request of its own was lost, or its own restart.
        if at == 0 {
            *offer = Offer { after: *after, ..Offer::default() };
        }
        let fits = at == offer.pages.len() && *after == offer.after && at + links.0.len() <= total;
        if fits && offer.lineage.is_none() {
            offer.pages.extend(links.0.iter().cloned());
        }
        let held = offer.pages.len();
        if held < total || !fits {
            return drop(reply.send(answer(AnswerBody::Lineage { links: held as u32 })));
        }
        let (vm, after, pages) = (request.vm, offer.after, offer.pages.clone());
        let successions = successions.clone();
        let known = match (after, self.known(vm)) {
            (None, _) => Lineage::empty(vm),
            (Some(after), Ok(known)) if known.tip().is_some_and(|tip| tip.id == after) => known,
            (Some(_), _) => {
                let text = "the history shown begins after a link that is not the last one known here";
                return drop(reply.send(answer(deny(DenialCode::HandOver, text))));
            }
        };
        let shared = self.shared.clone();
        tokio::task::spawn_blocking(move || {
            let _under_way = work;
            let verified = known.with(&successions).continued(pages);
            shared.post(Input::apply(move |b| b.lineage_verified(&request, verified, reply)));
        });
    }

    fn lineage_verified(
        &mut self,
        request: &Envelope<RequestBody>,
        verified: Result<Lineage, LineageError>,
        reply: oneshot::Sender<Option<Vec<u8>>>,
    ) {
        let id = request.migration;
        let judged = verified.map_err(Refusal::HandOver).and_then(|offered| {
            let known = self.known(request.vm).map_err(|e| {
                tracing::error!(vm = %request.vm, error = chain(&e), "a VM cannot come: what is known of it is damaged");
                Refusal::HistoryLost
            })?;
            let standing = self.standing(request.vm, &known);
            let run = self.incoming.get(&id).ok_or(Refusal::OtherReservation)?;
            let (_, peer) = run.about();
            LAW.offer(standing, &peer.jid, &peer.key, Some(&offered))?;
            Ok(offered)
        });
        let answer = match judged {
            Ok(offered) => {
                let links = self.incoming.get(&id).map_or(0, |run| run.offer.pages.len()) as u32;
                if let Some(run) = self.incoming.get_mut(&id) {
                    run.offer.lineage = Some(offered);
                }
                AnswerBody::Lineage { links }
            }
            Err(refusal) => {
                let answer = AnswerBody::Denied(denial(&refusal));
                if let Some(run) = self.incoming.get_mut(&id).filter(|run| run.is_leased()) {
                    run.end_because(chain(&refusal));
                    self.incoming_event(id, TargetEvent::LeaseExpired);
                }
                answer
            }
        };
        self.note_denial(&request.from, &answer);
        let _ = reply.send(self.shared.answer(request, answer).ok());
    }
}

/// Reserves room at the target and shows it the VM's history. The answer is the reservation's, or the
/// denial that the history met.
pub(super) async fn reserve(
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

/// Gives records of releases that kept no history one, and mends what a crash left between a history and
/// its record.
pub(super) fn complete(shared: &Shared, record: &mut super::records::VmRecord) -> Result<(), RecordError> {
    let records = &shared.records;
    let vm = record.spec.id;
    let (changed, known) = match record.origin {
        None => {
            let returns = records.returns_of(vm)?;
            LAW.begin_history(record, &returns, &shared.me, &shared.key)
        }
        Some(_) => {
            let known = LAW.known(records.lineage(vm)?, Some(record));
            (LAW.mended(record, &known, &shared.key.public()), known)
        }
    };
    evidence::keep_lineage(records, &known)?;
    if changed != *record {
        records.save_vm(&changed)?;
        *record = changed;
    }
    Ok(())
}
