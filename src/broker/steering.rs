//! The pairs `stop` and `suspend`: a move is switched over, or its guest held still, at the wish of
//! its target or of an operator at either side.

use std::time::Duration;

use crate::interface::{MigrationView, Problem, ProblemKind, Reply};
use crate::migration::source::Event as SourceEvent;
use crate::migration::{AnswerBody, Denial, DenialCode, Envelope, RequestBody};
use crate::types::{MigrationId, VmId};

use super::Broker;
use super::effect::{CallId, Effect, Matter, Peer, Unanswered};
use super::outgoing::Outgoing;
use super::pending::Pending;

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
        if !self.config.migration.steered_by_target {
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
    pub(super) fn steer(&mut self, view: MigrationView, body: RequestBody, call: CallId) {
        let id = view.progress.id;
        let object = format!("migration {id}");
        if self.outgoing.contains_key(&id) {
            let answer = self.steer_source(id, &body);
            return self.reply(call, outcome(object, answer));
        }
        let Some(run) = self.incoming.get(&id).filter(|run| run.is_leased()) else {
            let reason = match view.progress.ended {
                true => format!("has ended: {}", view.progress.phase),
                false => "the VM is already being handed over".to_owned(),
            };
            return self.reply(call, Err(Problem::new(ProblemKind::Conflict, object, reason)));
        };
        let (about, peer) = run.about();
        let to = peer.clone();
        self.ask_to_steer(call, id, to, about, body, 0);
    }

    pub(super) fn ask_to_steer(
        &mut self,
        call: CallId,
        id: MigrationId,
        to: Peer,
        about: Matter,
        body: RequestBody,
        tries: u32,
    ) {
        let asked = Box::new(body.clone());
        let pending = Pending::Steered { call, id, to: to.clone(), about, body, tries: tries + 1 };
        let token = self.expect(pending);
        self.emit(Effect::Ask { token, to, about, body: asked });
    }

    pub(super) fn steered(
        &mut self,
        (call, id, to, about, body, tries): (CallId, MigrationId, Peer, Matter, RequestBody, u32),
        answer: Result<AnswerBody, Unanswered>,
    ) {
        if matches!(answer, Ok(AnswerBody::Suspending)) && tries < ASKED_MAX {
            return self.wake(ASK_EVERY, Pending::SteerAgain { call, id, to, about, body, tries });
        }
        let object = format!("migration {id}");
        let result = match answer {
            Ok(answer) => outcome(object, answer),
            Err(Unanswered(why)) => Err(Problem::new(ProblemKind::Unavailable, object, why)
                .next(format!("see 'cicada members' for whether {} is online and trusted", to.jid))),
        };
        self.reply(call, result);
    }

    /// Pauses the guest; it goes on at the latest after the time of a lease.
    pub(super) fn hold_guest(&mut self, id: MigrationId, vm: VmId) {
        let token = self.expect(Pending::MoveHeld(id, vm));
        self.emit(Effect::Pause { token, vm });
    }

    pub(super) fn guest_held(&mut self, id: MigrationId, vm: VmId, result: Result<(), String>) {
        // Ended meanwhile: nobody else would let it go on.
        if !self.outgoing.contains_key(&id) {
            return self.resume_guest(vm);
        }
        let result = result.map_err(|why| {
            Denial::new(DenialCode::Unsupported, format!("the guest cannot be held still: {why}"))
        });
        match &result {
            // One time for the whole move, however often it is held and let go.
            Ok(()) if self.outgoing.get_mut(&id).is_some_and(Outgoing::first_held) => {
                self.wake(self.config.migration.lease, Pending::HoldOver(id));
                tracing::info!(migration = %id, "the guest is held still");
            }
            Ok(()) => tracing::info!(migration = %id, "the guest is held still again"),
            Err(d) => tracing::warn!(migration = %id, reason = d.text.as_str(), "not held"),
        }
        self.outgoing_event(id, SourceEvent::Held(result));
    }

    pub(super) fn hold_over(&mut self, id: MigrationId) {
        self.outgoing_event(id, SourceEvent::HoldOver);
    }

    pub(super) fn resume_guest(&mut self, vm: VmId) {
        // A VM that was given up or removed meanwhile is nobody's to wake.
        if self.vms.get(&vm).is_some_and(|entry| entry.record.is_here()) {
            self.emit(Effect::Resume(vm));
        }
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
