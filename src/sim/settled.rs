//! What must hold of a simulated federation: at every instant, and when everything had time to end.

use std::collections::BTreeSet;

use crate::broker::effect::Done;
use crate::broker::{Input, Token};
use crate::interface::{CloudRequest, MoveRequest, Reply, Request};
use crate::types::VmId;
use crate::vm::PowerState;

use super::queue::Event;
use super::world::World;

/// A rule that was broken, and in which clouds.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Broken {
    pub clouds: Vec<usize>,
    pub what: String,
}

fn broken(clouds: Vec<usize>, what: String) -> Result<(), Broken> {
    Err(Broken { clouds, what })
}

/// What must hold at every instant, of the cloud in which something changed.
pub(super) fn sound(world: &World, at: usize) -> Result<(), Broken> {
    let cloud = &world.clouds[at];
    if let Some(what) = &world.broken {
        return broken(vec![at], what.clone());
    }
    let running = cloud.power.iter().filter(|(_, power)| **power == PowerState::Running);
    let (mut cpus, mut memory) = (0u64, 0u64);
    for (vm, _) in running {
        if world.is_crowded(*vm) {
            return broken(running_in(world, *vm), format!("{vm} runs in more than one cloud"));
        }
        match cloud.book.look_at(*vm, |record| (record.is_here(), record.takes())) {
            Some((false, _)) => {
                return broken(vec![at], format!("{vm} runs in {}, which gave it up", cloud.jid));
            }
            Some((true, takes)) => (cpus, memory) = (cpus + u64::from(takes.cpus), memory + takes.memory.0),
            None => {}
        }
    }
    if cpus > u64::from(cloud.shape.cpus) || memory > cloud.shape.memory.0 {
        let (jid, shape) = (&cloud.jid, &cloud.shape);
        let what = format!(
            "VMs that run in {jid} take {cpus} processors and {memory} bytes of memory; it has {} and {}",
            shape.cpus, shape.memory.0
        );
        return broken(vec![at], what);
    }
    Ok(())
}

fn running_in(world: &World, vm: VmId) -> Vec<usize> {
    let runs = |at: &usize| world.clouds[*at].power.get(&vm) == Some(&PowerState::Running);
    (0..world.clouds.len()).filter(runs).collect()
}

/// What must hold when there was time enough for everything to end: every move did, every VM has one owner and
/// runs there, and nothing is kept, reserved, served or waited for that no move needs.
pub(super) fn settled(world: &mut World, vms: &[VmId]) -> Result<(), Broken> {
    for vm in vms {
        one_owner(world, *vm)?;
    }
    (0..world.clouds.len()).try_for_each(|at| nothing_left(world, at))
}

fn one_owner(world: &World, vm: VmId) -> Result<(), Broken> {
    let knows: Vec<usize> = (0..world.clouds.len()).filter(|at| world.clouds[*at].book.has_vm(vm)).collect();
    let owners: Vec<usize> =
        knows.iter().copied().filter(|at| world.clouds[*at].book.is_here(vm) == Some(true)).collect();
    match owners.as_slice() {
        [] => broken(knows, format!("{vm} is lost: it is no cloud's, and everything had time to end")),
        [owner] => {
            let wanted = world.clouds[*owner].book.look_at(vm, |record| record.run) == Some(true);
            let runs = world.clouds[*owner].power.get(&vm) == Some(&PowerState::Running);
            if wanted != runs {
                let jid = &world.clouds[*owner].jid;
                return broken(knows, format!("{vm} should run in {jid}: {wanted}, and runs: {runs}"));
            }
            Ok(())
        }
        _ => broken(owners.clone(), format!("{vm} has {} owners", owners.len())),
    }
}

fn nothing_left(world: &mut World, at: usize) -> Result<(), Broken> {
    let jid = world.clouds[at].jid.clone();
    let no = |what: String| broken(vec![at], format!("{jid} {what}"));
    let Some(Reply::Migrations(moves)) = answer(world, at, Request::Move(MoveRequest::List)) else {
        return no("does not say which moves are under way: it is down".into());
    };
    if let Some(open) = moves.iter().find(|view| !view.progress.ended) {
        let p = &open.progress;
        let peer = world.by_jid.get(&p.peer).copied();
        let what = format!("does not end move {} of {} with {}", p.id, p.vm_id, p.peer);
        return broken([at].into_iter().chain(peer).collect(), format!("{jid} {what}"));
    }
    let Some(Reply::Status(status)) = answer(world, at, Request::Cloud(CloudRequest::Status)) else {
        return no("does not say how it is".into());
    };
    let cloud = &world.clouds[at];
    let (cpus, memory) = cloud.book.taken();
    let taken = (status.cpus.total - status.cpus.free, status.memory_bytes.total - status.memory_bytes.free);
    if taken != (cpus, memory) {
        return no(format!(
            "keeps a lease: {} processors and {} bytes of memory are taken, and its VMs take {cpus} and {memory}",
            taken.0, taken.1
        ));
    }
    if let Some(id) = cloud.serving.keys().next() {
        return no(format!("serves a ticket of move {id}, which ended"));
    }
    if let Some(id) = cloud.staged.iter().next() {
        return no(format!("keeps the staged copy of move {id}, which ended"));
    }
    if let Some((ask, from)) = cloud.awaited.iter().find(|(_, from)| from.life != u32::MAX) {
        return no(format!("never answered request {} of {}", ask.0, world.clouds[from.cloud].jid));
    }
    let (coming, timers) = world.coming(at);
    let Some(broker) = &cloud.broker else { return Ok(()) };
    for token in broker.awaited() {
        let what = || broker.awaits(token).unwrap_or_default();
        if !coming.contains(&token) {
            return no(format!("waits for what will never come: {}", what()));
        }
        // Every timer belongs to a move, and all of them ended.
        if timers.contains(&token) {
            return no(format!("has a timer left: {}", what()));
        }
    }
    Ok(())
}

fn answer(world: &mut World, at: usize, request: Request) -> Option<Reply> {
    let call = world.call(at, request)?;
    world.cloud(at).replies.remove(&call)?.ok()
}

impl World {
    /// What is on its way to a broker, by the token under which it waits for it; and which of it is time.
    fn coming(&self, at: usize) -> (BTreeSet<Token>, BTreeSet<Token>) {
        let mut timers = BTreeSet::new();
        let cloud = &self.clouds[at];
        let queued =
            self.queue.iter().filter(|next| next.0.cloud == at).filter_map(|next| match &next.0.event {
                Event::Input(life, input) if *life == cloud.life => match **input {
                    Input::Done(token, Done::Due) => timers.insert(token).then_some(token),
                    Input::Done(token, _) => Some(token),
                    _ => None,
                },
                Event::Host { life, token, .. } if *life == cloud.life => *token,
                _ => None,
            });
        let talks = cloud.talks.values().map(|talking| talking.job.token);
        let plans = cloud.plans.values().map(|planning| planning.job.token);
        let coming = queued.chain(talks).chain(plans).collect();
        (coming, timers)
    }
}
