//! Moves that a restart or a crash of either broker cut short before the hand-over.
//!
//! At the source the VM is still ours: the move is begun again, as a new migration, when its target
//! is online. At the target what was staged waits for the length of a lease, so that it need not
//! travel again: for the same migration, or for a new one of the same VM.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::clock::UnixMillis;
use crate::interface::{MigrationPhase, MigrationView, Problem, ProblemKind};
use crate::migration::message::{Kept, Seed};
use crate::migration::move_record::{MovePhase, MoveRecord, MoveRole};
use crate::migration::records::VmRecord;
use crate::types::{MemberJid, MigrationId, VmId};

use super::Broker;
use super::effect::{Effect, Peer};
use super::hold::{No, Verb};
use super::outgoing::Course;
use super::vms::Vm;

/// How long a cut move waits for its target before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(600);
/// What a target's word about what it keeps counts for at most.
const KEPT_THERE_MAX: Duration = Duration::from_secs(86_400);
/// How often in a row a move is begun again: it may be what brings this broker down.
const ATTEMPTS_MAX: u32 = 3;

/// A move found unfinished at start.
#[derive(Clone)]
pub struct Unfinished {
    record: MoveRecord,
    until: UnixMillis,
}

/// Disks staged for a migration that is gone.
#[derive(Clone)]
pub struct Interrupted {
    /// Below the VM's directory.
    disks: String,
    until: UnixMillis,
    /// Which migration that was, and what is known to be on them; not after a restart.
    of: Option<(MigrationId, MemberJid)>,
    holds: Holds,
}

/// What is known to be on disks that are being staged.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Holds {
    /// The state that the last pass that was completed brought them to.
    pub seed: Option<Seed>,
    /// Plain bytes that came beyond it.
    pub root_delta_bytes: u64,
    pub user_data_bytes: u64,
}

/// Tells the moves that were cut short from those that ended or wait for an acknowledgement. A VM
/// that has changed hands since is not moved again: `ended` is told of a move of which only that
/// was missing.
pub fn split(
    records: Vec<MoveRecord>,
    vms: &BTreeMap<VmId, Vm>,
    now: UnixMillis,
    mut ended: impl FnMut(&MoveRecord),
) -> (BTreeMap<MigrationId, MigrationView>, Vec<Unfinished>) {
    let (mut history, mut cut) = (BTreeMap::new(), Vec::new());
    for mut record in records {
        let course = &mut record.course;
        let vm = vms.get(&course.vm_id).map(|vm| &vm.record);
        match (course.ended, course.role) {
            (true, _) => {}
            (false, MoveRole::Source) => {
                if vm.is_some_and(|vm| vm.is_here() && vm.epoch == course.epoch) {
                    cut.push(Unfinished { record, until: now.plus(PATIENCE) });
                    continue;
                }
                // Only the note that it ended is missing, unless its hand-over awaits a receipt.
                let waits = |r: &VmRecord| {
                    r.given_up().is_some_and(|given| given.migration == course.id && given.in_doubt())
                };
                if !vm.is_some_and(waits) {
                    course.ended = true;
                    course.phase = MovePhase::Completed;
                    ended(&record);
                }
            }
            (false, MoveRole::Target) => {
                let arrival = vm.and_then(|vm| vm.arrival.as_ref());
                course.ended = true;
                course.phase = MovePhase::Completed;
                if arrival.is_none_or(|a| a.migration != course.id) {
                    course.phase = MovePhase::Cancelled;
                    let reason = "was cut short by a restart of this broker before the VM was handed over";
                    let problem =
                        Problem::new(ProblemKind::Failed, format!("arrival of {}", course.vm), reason)
                            .next("its source goes on by itself; what was staged is kept a while");
                    record.failure = Some(problem.into());
                }
                ended(&record);
            }
        }
        history.insert(record.course.id, record.into());
    }
    (history, cut)
}

impl Unfinished {
    pub fn id(&self) -> MigrationId {
        self.record.course.id
    }

    pub fn view(&self) -> MigrationView {
        self.record.clone().into()
    }

    pub fn until(&self) -> UnixMillis {
        self.until
    }
}

impl Broker {
    /// Begins no more what the operator calls off. Whether it was waiting.
    pub(super) fn cancel_unfinished(&mut self, id: MigrationId) -> bool {
        let Some(at) = self.unfinished.iter().position(|u| u.id() == id) else { return false };
        let cut = self.unfinished.remove(at);
        let reason = "was cut short by a restart, then cancelled by the operator";
        self.end_unfinished(cut.view(), ProblemKind::Cancelled, reason.to_owned());
        true
    }

    /// Begins cut moves again whose target is there, and gives up those that waited too long.
    pub(super) fn take_up_unfinished(&mut self) {
        let now = self.now;
        for cut in std::mem::take(&mut self.unfinished) {
            let p = &cut.record.course;
            // Until it was asked who owns the VM, it waits as it does while something holds it.
            let (is_ours, waits) = match self.may(Verb::Move, p.vm_id) {
                Ok(()) => (true, false),
                Err(No::Held(_) | No::Unconfirmed) => (true, true),
                Err(_) => (false, false),
            };
            if !is_ours || p.attempt >= ATTEMPTS_MAX || cut.until < now {
                let reason = "was cut short by a restart of this broker, and its target did not come back";
                self.end_unfinished(cut.view(), ProblemKind::Failed, reason.to_owned());
                continue;
            }
            let online = self.members.all().any(|m| m.jid == p.peer && m.is_online());
            let key = self.members.trusted_key(&p.peer).ok().filter(|_| online && !waits);
            let Some(key) = key else {
                self.unfinished.push(cut);
                continue;
            };
            let peer = Peer { jid: p.peer.clone(), key };
            let (vm, cloud, attempt) = (p.vm_id, p.peer_cloud.clone(), p.attempt + 1);
            // Nobody waits for it any more; 'migration watch' does. Whoever allowed a guest to be switched off
            // allowed that move, and is not there now.
            let id = self.begin_move(vm, Course { peer, cloud, attempt, force_stop: false }, None);
            let goes_on = id.map_or_else(String::new, |id| format!("; it goes on as migration {id}"));
            let reason = format!("was cut short by a restart of this broker{goes_on}");
            self.end_unfinished(cut.view(), ProblemKind::Failed, reason);
        }
    }

    fn end_unfinished(&mut self, mut view: MigrationView, kind: ProblemKind, reason: String) {
        tracing::warn!(migration = %view.progress.id, vm = %view.progress.vm, reason, "move ended");
        let problem = Problem::new(kind, format!("move of {}", view.progress.vm), reason);
        view.problem = Some(problem.next("see 'cicada migration list', then move it again if need be"));
        view.progress.phase = match kind {
            ProblemKind::Cancelled => MigrationPhase::Cancelled,
            _ => MigrationPhase::Failed,
        };
        view.progress.ended = true;
        view.progress.eta_s = None;
        self.remember(view);
    }

    /// Keeps what was staged for a VM that may come again soon.
    pub(super) fn keep_interrupted(
        &mut self,
        vm: VmId,
        disks: String,
        of: Option<(MigrationId, MemberJid)>,
        holds: Holds,
    ) {
        let until = self.now.plus(self.config.migration.lease);
        if let Some(old) = self.interrupted.insert(vm, Interrupted { disks, until, of, holds }) {
            self.remove_interrupted(vm, old);
        }
    }

    /// What an earlier migration staged of a VM, for the new one, and what is on it.
    pub(super) fn take_interrupted(&mut self, vm: VmId) -> Option<(String, Holds)> {
        self.interrupted.remove(&vm).map(|old| (old.disks, old.holds))
    }

    /// What is kept of an earlier try of that member, and the seed of the next.
    pub(super) fn kept_of(&self, vm: VmId, source: &MemberJid) -> Option<(Kept, Option<Seed>)> {
        let kept = self.interrupted.get(&vm)?;
        let (_, from) = kept.of.as_ref()?;
        let holds = kept.holds;
        let told = Kept {
            for_s: kept.until.since(self.now).as_secs(),
            root_delta_bytes: holds.root_delta_bytes,
            user_data_bytes: holds.user_data_bytes,
        };
        (from == source).then_some((told, holds.seed))
    }

    /// Until when this cloud keeps what came in that migration.
    pub(super) fn kept_here_until(&self, id: MigrationId) -> Option<UnixMillis> {
        let kept = self.interrupted.values().find(|kept| kept.of.as_ref().is_some_and(|(of, _)| *of == id));
        kept.map(|kept| kept.until)
    }

    /// The target of a move from here keeps what came for so long.
    pub(super) fn note_kept_there(&mut self, id: MigrationId, kept: Duration) {
        // It is only shown: a target may say anything.
        let until = self.now.plus(kept.min(KEPT_THERE_MAX));
        if !kept.is_zero() {
            self.kept_there.insert(id, until);
        }
    }

    /// Removes what nobody came back for.
    pub(super) fn expire_interrupted(&mut self) {
        let now = self.now;
        self.kept_there.retain(|_, until| *until >= now);
        let over: Vec<VmId> =
            self.interrupted.iter().filter(|(_, i)| i.until < now).map(|(vm, _)| *vm).collect();
        for vm in over {
            if let Some(old) = self.interrupted.remove(&vm) {
                self.remove_interrupted(vm, old);
            }
        }
    }

    fn remove_interrupted(&mut self, vm: VmId, old: Interrupted) {
        tracing::info!(vm = %vm, disks = old.disks, "removing what was staged: nobody came back for it");
        let no_record = !self.vms.contains_key(&vm);
        self.emit(Effect::RemoveStaged { vm, disks: old.disks, no_record });
    }

    /// Directories of staging that belong to no migration, after a crash: the newest of each VM
    /// that is not here waits for its source, the others go.
    pub(super) fn find_leftovers(&mut self, disk_dirs: BTreeMap<VmId, Vec<String>>) {
        for (vm, mut dirs) in disk_dirs {
            // Nothing is known of those set aside, so all they have stays.
            if self.aside.contains_key(&vm) {
                continue;
            }
            let record = self.vms.get(&vm).map(|vm| &vm.record);
            let used: BTreeSet<&String> = record
                .iter()
                .flat_map(|record| record.kept.iter().map(|copy| &copy.disks).chain([&record.disks]))
                .collect();
            dirs.retain(|dir| !used.contains(dir));
            if !record.is_some_and(VmRecord::is_here)
                && let Some(newest) = dirs.pop()
            {
                self.keep_interrupted(vm, newest, None, Holds::default());
            }
            let no_record = !self.vms.contains_key(&vm);
            for disks in dirs {
                tracing::info!(%vm, disks, "removing a leftover of an unfinished migration");
                self.emit(Effect::RemoveStaged { vm, disks, no_record });
            }
        }
    }
}
