//! The pairs `stop` and `suspend`: a move is switched over, or its guest held still, at the wish of
//! its target or of an operator at either side.

use std::time::Duration;

use tokio::sync::oneshot;

use crate::interface::problem::{Problem, ProblemKind, chain};
use crate::interface::{MigrationView, Reply};
use crate::migration::source::Event as SourceEvent;
use crate::migration::{AnswerBody, Denial, DenialCode, Envelope, RequestBody};
use crate::types::{MigrationId, VmId};

use super::outgoing::Outgoing;
use super::shared::Peer;
use super::{Broker, Input};

/// How often, and how many times, a source is asked whether the guest stands still.
const ASK_EVERY: Duration = Duration::from_millis(500);
const ASKED_MAX: u32 = 40;

impl Broker {
    /// The target of a move from here asks.
    pub(super) fn answer_steering(&mut self, peer: &Peer, request: &Envelope<RequestBody>) -> AnswerBody {
        let deny = |code, text| AnswerBody::Denied(Denial::new(code, text));
        let Some(run) = self.outgoing.get(&request.migration) else {
            return deny(DenialCode::UnknownMigration, "no such migration leaves this cloud");
        };
        if run.peer != *peer || run.matter.vm != request.vm {
            return deny(DenialCode::NotYours, "you are not the target of this migration");
        }
        if !self.shared.config.migration.steered_by_target {
            return deny(DenialCode::Policy, "this cloud alone decides when its guests stand still");
        }
        tracing::info!(migration = %request.migration, peer = %peer.jid, request = ?request.body, "asked by the target");
        self.steer_source(request.migration, &request.body)
    }

    fn steer_source(&mut self, id: MigrationId, request: &RequestBody) -> AnswerBody {
        let Some(run) = self.outgoing.get_mut(&id) else {
            return AnswerBody::Denied(Denial::new(DenialCode::UnknownMigration, "the migration has ended"));
        };
        let before = run.machine.phase();
        let (answer, effects) = run.machine.asked(request);
        self.outgoing_report(id, before);
        effects.into_iter().for_each(|e| self.outgoing_effect(id, e));
        answer
    }

    /// An operator here asks: of our own machine, or of the source.
    pub(super) fn steer(
        &mut self,
        view: &MigrationView,
        request: RequestBody,
        reply: oneshot::Sender<Result<Reply, Problem>>,
    ) {
        let id = view.progress.id;
        let object = format!("migration {id}");
        if self.outgoing.contains_key(&id) {
            let answer = self.steer_source(id, &request);
            let _ = reply.send(outcome(object, answer));
            return;
        }
        let Some(run) = self.incoming.get(&id).filter(|run| run.is_leased()) else {
            let reason = match view.progress.ended {
                true => format!("has ended: {}", view.progress.phase),
                false => "the VM is already being handed over".to_owned(),
            };
            let _ = reply.send(Err(Problem::new(ProblemKind::Conflict, object, reason)));
            return;
        };
        let (matter, peer) = run.about();
        let (shared, peer) = (self.shared.clone(), peer.clone());
        tokio::spawn(async move {
            let mut answer = Ok(AnswerBody::Suspending);
            for _ in 0..ASKED_MAX {
                answer = shared.ask(&peer, matter, request.clone()).await;
                if !matches!(answer, Ok(AnswerBody::Suspending)) {
                    break;
                }
                tokio::time::sleep(ASK_EVERY).await;
            }
            let _ = reply.send(match answer {
                Ok(answer) => outcome(object, answer),
                Err(e) => Err(Problem::new(ProblemKind::Unavailable, object, chain(&e))
                    .next(format!("see 'cicada members' for whether {} is online and trusted", peer.jid))),
            });
        });
    }

    /// Pauses the guest; it goes on at the latest after the time of a lease.
    pub(super) fn hold_guest(&self, id: MigrationId, vm: VmId) {
        let shared = self.shared.clone();
        tokio::spawn(async move {
            let result = shared.driver.pause(vm).await.map_err(|e| {
                let text = format!("the guest cannot be held still: {}", chain(&e));
                Denial::new(DenialCode::Unsupported, text)
            });
            shared.post(Input::apply(move |b| b.guest_held(id, vm, result)));
        });
    }

    fn guest_held(&mut self, id: MigrationId, vm: VmId, result: Result<(), Denial>) {
        // Ended meanwhile: nobody else would let it go on.
        if !self.outgoing.contains_key(&id) {
            return self.resume_guest(vm);
        }
        match &result {
            // One time for the whole move, however often it is held and let go.
            Ok(()) if self.outgoing.get_mut(&id).is_some_and(Outgoing::first_held) => {
                let (shared, longest) = (self.shared.clone(), self.shared.config.migration.lease);
                tokio::spawn(async move {
                    tokio::time::sleep(longest).await;
                    shared.post(Input::Outgoing(id, SourceEvent::HoldOver));
                });
                tracing::info!(migration = %id, "the guest is held still");
            }
            Ok(()) => tracing::info!(migration = %id, "the guest is held still again"),
            Err(d) => tracing::warn!(migration = %id, reason = d.text.as_str(), "not held"),
        }
        self.outgoing_event(id, SourceEvent::Held(result));
    }

    pub(super) fn resume_guest(&self, vm: VmId) {
        let shared = self.shared.clone();
        // A VM that was given up or removed meanwhile is nobody's to wake.
        if !self.vms.get(&vm).is_some_and(|entry| entry.record.is_here()) {
            return;
        }
        tokio::spawn(async move {
            match shared.driver.resume(vm).await {
                Ok(()) => tracing::info!(vm = %vm, "the guest goes on"),
                Err(e) => tracing::warn!(vm = %vm, error = chain(&e), "the guest does not go on"),
            }
        });
    }
}

fn outcome(object: String, answer: AnswerBody) -> Result<Reply, Problem> {
    match answer {
        AnswerBody::Stopping | AnswerBody::Stopped | AnswerBody::Suspending | AnswerBody::Suspended => {
            Ok(Reply::Done)
        }
        AnswerBody::Denied(d) => {
            let kind = match d.code {
                DenialCode::OutOfOrder | DenialCode::UnknownMigration => ProblemKind::Conflict,
                _ => ProblemKind::Refused,
            };
            Err(Problem::new(kind, object, d.text).next(d.next_step))
        }
        _ => Err(Problem::new(ProblemKind::Failed, object, "the source gave an answer that fits no request")),
    }
}
