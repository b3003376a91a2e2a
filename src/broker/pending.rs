//! What the core waits for: with every effect that has an outcome, what that outcome belongs to.

use crate::interface::{AdoptedView, Candidate, DeletedView, Problem};
use crate::migration::handover::Return;
use crate::migration::{Envelope, RequestBody};
use crate::types::{ByteSize, CloudName, Hash, MigrationId, PublicKey, VmId, VmName};

use super::Broker;
use super::book::ReturnRecord;
use super::effect::{AskId, CallId, Done, Matter, Peer, Token};
use super::power::Stop;

/// Who is told when a VM was started, or was not.
#[derive(Clone, Debug)]
pub enum Whom {
    Caller(CallId),
    /// The VM was made for this start: if that fails nothing of it is left.
    Maker(CallId),
    /// The VM was adopted: it stays, whatever comes of the start.
    Adopter(CallId, Box<AdoptedView>),
}

/// Who is told when a VM was removed.
#[derive(Clone, Debug)]
pub enum Remover {
    /// A grace period that is over.
    Nobody,
    Caller(CallId),
    /// Its start failed, and why.
    Maker(CallId, Problem),
}

/// What a plan is for.
#[derive(Clone, Debug)]
pub enum PlanFor {
    Caller(CallId),
    /// The best of these members gets the VM.
    Move {
        call: CallId,
        peers: Vec<(Peer, Option<CloudName>)>,
        force_stop: bool,
    },
}

/// A request of another broker that is worked on: it counts among what that member may ask at once.
#[derive(Clone, Debug)]
pub struct Working {
    pub ask: AskId,
    pub from: Peer,
    pub request: Box<Envelope<RequestBody>>,
}

#[derive(Clone, Debug)]
pub enum Pending {
    // VMs
    Made { call: CallId, name: VmName, start: bool },
    Adopted { call: CallId, name: VmName, start: bool, begun: crate::clock::UnixMillis },
    Exported { call: CallId, vm: VmId },
    Grown { call: CallId, vm: VmId, root: Option<ByteSize>, user_data: Option<ByteSize> },
    Removed { by: Remover, deleted: Box<DeletedView> },
    Started { vm: VmId, whom: Whom },
    StartedByItself { vm: VmId, arrival: Option<MigrationId> },
    Stopped { vm: VmId, stop: Stop, call: CallId, wanted: bool },
    StartAgain(VmId),

    // moves from here
    MoveChecked(MigrationId),
    MoveAnswered(MigrationId),
    MoveScanned(MigrationId, VmId),
    MoveStopped(MigrationId, VmId),
    MoveHeld(MigrationId, VmId),
    HoldOver(MigrationId),
    MoveWait(MigrationId),
    CancelTold { id: MigrationId, to: Peer, about: Matter, tries: u32 },
    CancelAgain { id: MigrationId, to: Peer, about: Matter, tries: u32 },
    Monolithic(MigrationId),
    Planned { vm: VmId, rows_left_out: Vec<Candidate>, purpose: PlanFor },

    // moves to here
    Staged(MigrationId),
    Booted(MigrationId),
    CheckLooked(Working),
    ReserveLooked(Working),
    Verified(Working),
    Lent { work: Working, ticket: Option<Hash> },
    OwnersKnown(Working),
    PromiseKept { work: Working, promise: Box<ReturnRecord>, back: Box<Return>, to: PublicKey },

    // others
    Errand(MigrationId),
    Owners(Peer),
    Steered { call: CallId, id: MigrationId, to: Peer, about: Matter, body: RequestBody, tries: u32 },
    SteerAgain { call: CallId, id: MigrationId, to: Peer, about: Matter, body: RequestBody, tries: u32 },
    Components,
}

impl Broker {
    /// An outcome finds what it belongs to.
    pub(super) fn done(&mut self, token: Token, done: Done) {
        let Some(pending) = self.pending.remove(&token) else {
            return tracing::warn!(?token, "an outcome that nobody waits for");
        };
        match (pending, done) {
            (Pending::Made { call, name, start }, Done::Made(result)) => {
                self.made(call, &name, start, result)
            }
            (Pending::Adopted { call, name, start, begun }, Done::Adopted(result)) => {
                self.adopted(call, &name, start, begun, result)
            }
            (Pending::Exported { call, vm }, Done::Exported(result)) => self.exported(call, vm, result),
            (Pending::Grown { call, vm, root, user_data }, Done::Grown(result)) => {
                self.grown(call, vm, (root, user_data), result)
            }
            (Pending::Removed { by, deleted }, Done::Removed(result)) => self.removed(by, *deleted, result),
            (Pending::Started { vm, whom }, Done::Started(result)) => self.started(vm, whom, result),
            (Pending::StartedByItself { vm, arrival }, Done::Started(result)) => {
                self.machine_started(vm, arrival, result)
            }
            (Pending::Stopped { vm, stop, call, wanted }, Done::Stopped { result, took, was_off }) => {
                self.stopped((vm, stop, call, wanted), result, took, was_off)
            }
            (Pending::StartAgain(vm), Done::Due) => drop(self.start_wanted(vm)),

            (Pending::MoveChecked(id), Done::Checked(result)) => self.checked(id, result),
            (Pending::MoveAnswered(id), Done::Answered(answer)) => self.outgoing_answered(id, answer),
            (Pending::MoveScanned(id, vm), Done::Scanned(result)) => self.scanned(id, vm, result),
            (Pending::MoveStopped(id, vm), Done::Stopped { result, took, .. }) => {
                self.move_stopped(id, vm, result, took)
            }
            (Pending::MoveHeld(id, vm), Done::Paused(result)) => self.guest_held(id, vm, result),
            (Pending::HoldOver(id), Done::Due) => self.hold_over(id),
            (Pending::MoveWait(id), Done::Due) => self.waited(id),
            (Pending::CancelTold { id, to, about, tries }, Done::Answered(answer)) => {
                self.cancel_told(id, to, about, tries, answer)
            }
            (Pending::CancelAgain { id, to, about, tries }, Done::Due) => {
                self.tell_cancel(id, to, about, tries)
            }
            (Pending::Monolithic(id), Done::Monolithic(Some((zstd, raw)))) => self.amend_history(id, |a| {
                (a.monolithic_zstd_bytes, a.monolithic_raw_bytes) = (Some(zstd), Some(raw));
            }),
            (Pending::Monolithic(_), Done::Monolithic(None)) => {}
            (Pending::Planned { vm, rows_left_out, purpose }, Done::Planned(rows)) => {
                self.planned(vm, rows_left_out, purpose, rows)
            }

            (Pending::Staged(id), Done::Staged(result)) => self.stage_finished(id, result),
            (Pending::Booted(id), Done::Booted(boot_ms)) => self.booted(id, boot_ms),
            (Pending::CheckLooked(work), Done::Holdings(held)) => self.check_looked(&work, held),
            (Pending::ReserveLooked(work), Done::Holdings(held)) => self.reserve_looked(&work, &held),
            (Pending::Verified(work), Done::Verified(verified)) => self.lineage_verified(&work, verified),
            (Pending::Lent { work, ticket }, Done::Lent(held)) => self.lent_out(&work, ticket, held),
            (Pending::OwnersKnown(work), Done::OwnersKnown { known, disputed }) => {
                self.owners_known(&work, known, &disputed)
            }
            (Pending::PromiseKept { work, promise, back, to }, Done::PromiseKept(kept)) => {
                self.promise_kept(&work, &promise, *back, to, kept)
            }

            (Pending::Errand(id), Done::Answered(answer)) => self.errand_answered(id, answer),
            (Pending::Owners(peer), Done::OwnersSaid(said)) => self.owners_said(&peer, said),
            (Pending::Steered { call, id, to, about, body, tries }, Done::Answered(answer)) => {
                self.steered((call, id, to, about, body, tries), answer)
            }
            (Pending::SteerAgain { call, id, to, about, body, tries }, Done::Due) => {
                self.ask_to_steer(call, id, to, about, body, tries)
            }
            (Pending::Components, Done::Components(held)) => self.optimize_anew(held),
            (pending, done) => {
                tracing::error!(?pending, ?done, "an outcome of another kind than what was wanted");
            }
        }
    }
}
