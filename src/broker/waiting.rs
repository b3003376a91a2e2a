//! What a migration waits for, in words: since when, for whom, and what an operator may do.

use crate::clock::UnixMillis;
use crate::interface::{MigrationPhase, MigrationView};
use crate::migration::target::Phase;
use crate::types::{MemberJid, MigrationId};

use super::Broker;
use super::incoming::Incoming;
use super::outgoing::Outgoing;

impl Broker {
    /// Says in the view what is awaited at this moment.
    pub(super) fn explain(&self, view: &mut MigrationView) {
        let p = &mut view.progress;
        let (id, now) = (p.id, self.now);
        if let Some(run) = self.outgoing.get(&id) {
            if run.in_doubt(now) {
                p.phase = MigrationPhase::InDoubt;
                p.detail = self.doubt(run);
            }
        } else if let Some(run) = self.incoming.get(&id).filter(|r| r.is_unfinished()) {
            p.detail = arriving(run, now);
        } else if let Some(cut) = self.unfinished.iter().find(|u| u.id() == id) {
            p.phase = MigrationPhase::Waiting;
            p.detail = format!(
                "was cut short by a restart of this broker; begins again when {} is there ({}), and fails if that \
                 is not before {}. The VM is here; 'cicada migration cancel {id}' calls it off",
                p.peer,
                self.presence_of(&p.peer),
                cut.until()
            );
        }
        if let Some(last) = self.errand_words(id) {
            let what = self.errand_purpose(id, &p.peer);
            p.detail = format!("{what} ({}); last word: {last}", self.presence_of(&p.peer));
        }
    }

    /// As it is shown alone: with what operators decided about it.
    pub(super) fn remarked(&self, mut view: MigrationView) -> MigrationView {
        let id = view.progress.id;
        view.remarks =
            self.resolution_remarks().into_iter().filter(|(m, _)| *m == id).map(|(_, r)| r).collect();
        if view.progress.ended && !view.progress.detail.is_empty() && self.errand_words(id).is_some() {
            view.remarks.push(format!("still to be said: {}", view.progress.detail));
        }
        let peer = &view.progress.peer;
        if let Some(until) = self.kept_here_until(id) {
            view.remarks.push(format!(
                "what came is kept until {until}: another move of the VM from {peer} goes on with it"
            ));
        }
        if let Some(until) = self.kept_there.get(&id) {
            view.remarks.push(format!(
                "{peer} keeps what was sent until {until}: another move of the VM to it goes on with that"
            ));
        }
        view
    }

    fn doubt(&self, run: &Outgoing) -> String {
        let p = &run.view.progress;
        let (id, peer) = (p.id, &p.peer);
        let given = self.vms.get(&p.vm_id).and_then(|vm| Some((vm.record.epoch + 1, vm.record.given_up()?)));
        let Some((epoch, given)) = given else { return p.detail.clone() };
        let last = if run.last_word.is_empty() { "nothing" } else { &run.last_word };
        format!(
            "in doubt who owns the VM: it was given to {peer} under epoch {epoch} on {}, and that cloud has neither \
             confirmed nor returned it ({}; last word: {last}). It is asked every few seconds; its answer ends \
             this by itself, so the best is to get it online. Until then the VM must not run here. If it can \
             never answer, 'cicada migration resolve {id} --owner here|there' says what deciding alone risks",
            given.since,
            self.presence_of(peer),
        )
    }

    fn errand_purpose(&self, id: MigrationId, peer: &MemberJid) -> String {
        match self.resolutions.contains_key(&id) {
            true => format!("{peer} is asked what it knows of the hand-over that the operator decided"),
            false => {
                format!("{peer} is still to be told that the VM is here; it may wait, nothing depends on it")
            }
        }
    }

    fn presence_of(&self, peer: &MemberJid) -> String {
        match self.members.get(peer) {
            Some(m) if m.is_online() => format!("{peer} is online"),
            Some(m) => format!("{peer} is gone since {}", m.since),
            None => format!("{peer} was not seen since this broker started"),
        }
    }
}

/// At the target, before the VM is ours.
fn arriving(run: &Incoming, now: UnixMillis) -> String {
    let (_, peer) = run.about();
    let peer = &peer.jid;
    let left = run.lease_until().since(now).as_secs();
    let lease =
        format!("the VM is {peer}'s until then; without a word from it this ends by itself in {left} s");
    match run.phase() {
        Phase::Reserved => {
            format!("room is kept; waiting for {peer} to say what to fetch ({lease})")
        }
        Phase::Staging(pass) if pass.last => {
            format!("pass {}, the last: fetching what changed; the VM stands still at {peer}", pass.number)
        }
        Phase::Staging(pass) => {
            format!("pass {}: fetching what is missing; the VM runs at {peer}", pass.number)
        }
        Phase::Staged(pass) if pass.last => {
            format!("all is here; waiting for the signed hand-over of {peer} ({lease})")
        }
        Phase::Staged(pass) => {
            format!("pass {} is here; waiting for the next word of {peer} ({lease})", pass.number)
        }
        Phase::TakingOver | Phase::Starting => "the VM is taken over and being started".into(),
        Phase::Owned | Phase::Abandoned => String::new(),
    }
}
