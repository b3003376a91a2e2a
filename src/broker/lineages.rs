//! The histories of ownership at work: what is known of a VM, showing it to whom the VM goes, and
//! believing what is shown. The rules are `migration/ownership.rs`'s.

use crate::interface::chain;
use crate::migration::lineage::{LINKS_MAX, LineageError};
use crate::migration::ownership::Standing;
use crate::migration::records::VmRecord;
use crate::migration::target::Event as TargetEvent;
use crate::migration::{AnswerBody, Denial, DenialCode, Lineage, Link, Refusal, RequestBody};
use crate::types::{LinkId, MemberJid, Signer, VmId};

use super::Broker;
use super::book::{Ledger, RecordError};
use super::effect::Effect;
use super::pending::{Pending, Working};

/// What a source shows of a VM's history while its reservation lasts.
#[derive(Clone, Default)]
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
        let kept = self.book.lineage(vm)?;
        let kept = kept.with(self.successions());
        Ok(self.book.law().known(kept, self.vms.get(&vm).map(|vm| &vm.record)))
    }

    pub(super) fn standing<'a>(&'a self, vm: VmId, known: &'a Lineage) -> Standing<'a> {
        let record = self.vms.get(&vm).map(|vm| &vm.record);
        Standing { record, known, damaged: self.aside.contains_key(&vm) }
    }

    /// Makes a history durable, if it says more than what is kept.
    pub(super) fn keep_lineage(&self, lineage: &Lineage) -> Result<(), RecordError> {
        self.book.keep_lineage(lineage)
    }

    /// A page of the history of a VM that is about to come.
    pub(super) fn answer_lineage(&mut self, work: &Working) -> Option<AnswerBody> {
        let request = &work.request;
        let deny = |code, text: &str| Some(AnswerBody::Denied(Denial::new(code, text)));
        let RequestBody::Lineage { at, total, after, links, successions } = &request.body else {
            return deny(DenialCode::Other, "is no history");
        };
        let (at, total) = (*at as usize, *total as usize);
        let lease_until = self.now.plus(self.config.migration.lease);
        let of_it = self.incoming.get_mut(&request.migration);
        let Some(run) = of_it.filter(|run| run.is_of(&work.from, request.vm)) else {
            return deny(
                DenialCode::UnknownMigration,
                "no such migration here; the reservation may have ended",
            );
        };
        run.is_asked(lease_until);
        if !run.is_leased() {
            return deny(DenialCode::OutOfOrder, "the VM was already handed over");
        }
        if total > LINKS_MAX {
            return deny(DenialCode::HandOver, &LineageError::TooLong.to_string());
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
            return Some(AnswerBody::Lineage { links: held as u32 });
        }
        let (vm, after, pages) = (request.vm, offer.after, offer.pages.clone());
        let known = match (after, self.known(vm)) {
            (None, _) => Lineage::empty(vm),
            (Some(after), Ok(known)) if known.tip().is_some_and(|tip| tip.id == after) => known,
            (Some(_), _) => {
                let text = "the history shown begins after a link that is not the last one known here";
                return deny(DenialCode::HandOver, text);
            }
        };
        let (known, successions) = (Box::new(known), successions.clone());
        let token = self.expect(Pending::Verified(work.clone()));
        self.emit(Effect::Verify { token, known, successions, pages });
        None
    }

    pub(super) fn lineage_verified(&mut self, work: &Working, verified: Result<Box<Lineage>, LineageError>) {
        let (id, vm) = (work.request.migration, work.request.vm);
        let judged = verified.map_err(Refusal::HandOver).and_then(|offered| {
            let known = self.known(vm).map_err(|e| {
                tracing::error!(%vm, error = chain(&e), "a VM cannot come: what is known of it is damaged");
                Refusal::HistoryLost
            })?;
            let standing = self.standing(vm, &known);
            let run = self.incoming.get(&id).ok_or(Refusal::OtherReservation)?;
            let (_, peer) = run.about();
            self.book.law().offer(standing, &peer.jid, &peer.key, Some(&offered))?;
            Ok(*offered)
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
        self.note_denial(&work.from.jid, &answer);
        self.answer_work(work, answer);
    }
}

/// Gives records of releases that kept no history one, and mends what a crash left between a history and
/// its record.
pub(super) fn complete(
    book: &Ledger,
    me: &MemberJid,
    key: &dyn Signer,
    record: &mut VmRecord,
) -> Result<(), RecordError> {
    let (vm, law) = (record.spec.id, book.law());
    let (changed, known) = match record.origin {
        None => law.begin_history(record, &book.returns_of(vm)?, me, key),
        Some(_) => {
            let known = law.known(book.lineage(vm)?, Some(record));
            (law.mended(record, &known, &key.public()), known)
        }
    };
    book.keep_lineage(&known)?;
    if changed != *record {
        book.save_vm(&changed)?;
        *record = changed;
    }
    Ok(())
}
