//! What hypervisors and disks of simulated clouds do: in which state a VM is, and which state of the guest each
//! directory of disks holds.

use std::time::Duration;

use crate::broker::Token;
use crate::broker::effect::{Done, Input, Scanned, Serving, StageOrder};
use crate::interface::{Problem, ProblemKind};
use crate::migration::message::{Seed, StageAccount};
use crate::migration::records::VmRecord;
use crate::migration::{Denial, DenialCode};
use crate::types::{NodeHash, VmId};
use crate::vm::hypervisor::StopMode;
use crate::vm::{MapRef, PowerState, VmSpec};

use super::blocks;
use super::queue::{Event, Work};
use super::world::{Carried, World};

impl World {
    /// Tells a hypervisor to do something; it does one thing with a VM after the other.
    pub(super) fn order(&mut self, at: usize, vm: VmId, work: Work, token: Option<Token>) {
        let took_ms = match &work {
            Work::Start(_) => 500,
            Work::Stop(_) if !self.clouds[at].running(vm) => 0,
            Work::Stop(StopMode::Forced) => 10,
            Work::Stop(StopMode::Graceful { .. }) => 2000,
            Work::Pause | Work::Resume | Work::Undefine => 1,
        };
        let life = self.clouds[at].life;
        let fails = token.is_some() && self.random.chance(self.failures);
        let took = Duration::from_millis(took_ms);
        self.later(at, took_ms, Event::Host { life, vm, work, token, took, fails });
    }

    /// A hypervisor does what it was told.
    pub(super) fn hosted(
        &mut self,
        at: usize,
        vm: VmId,
        work: Work,
        took: Duration,
        fails: bool,
    ) -> Option<Done> {
        let power = self.clouds[at].power.get(&vm).copied();
        let runs = power == Some(PowerState::Running);
        let was_off = !self.clouds[at].running(vm);
        let failed = || Problem::new(ProblemKind::Failed, "the hypervisor", "failed");
        match work {
            Work::Start(_) if fails && was_off => Some(Done::Started(Err(failed()))),
            Work::Start(record) => {
                if was_off {
                    self.reads_newest(at, &record);
                }
                self.set_power(at, vm, Some(PowerState::Running));
                Some(Done::Started(Ok(())))
            }
            Work::Stop(_) if fails && !was_off => {
                Some(Done::Stopped { result: Err(failed()), took, was_off })
            }
            Work::Stop(_) => {
                self.set_power(at, vm, Some(PowerState::Stopped));
                Some(Done::Stopped { result: Ok(()), took, was_off })
            }
            Work::Pause if fails || !runs => Some(Done::Paused(Err("the hypervisor failed".into()))),
            Work::Pause => {
                self.set_power(at, vm, Some(PowerState::Paused));
                Some(Done::Paused(Ok(())))
            }
            Work::Resume => {
                if power == Some(PowerState::Paused) {
                    self.set_power(at, vm, Some(PowerState::Running));
                }
                None
            }
            Work::Undefine => {
                if power.is_some() {
                    self.set_power(at, vm, Some(PowerState::Stopped));
                }
                None
            }
        }
    }

    /// What came of it is told to the broker that wanted it, if that lives.
    pub(super) fn hosted_for(
        &mut self,
        at: usize,
        life: u32,
        vm: VmId,
        token: Option<Token>,
        done: Option<Done>,
    ) {
        if self.clouds[at].life != life {
            return;
        }
        if let Some(power) = self.clouds[at].power.get(&vm).copied() {
            self.step(at, Input::Power(vm, power));
        }
        // The first of the two may have been its end.
        if let (Some(token), Some(done)) = (token, done)
            && self.clouds[at].life == life
        {
            self.step(at, Input::Done(token, done));
        }
    }

    /// A guest that starts finds what it wrote last.
    fn reads_newest(&mut self, at: usize, record: &VmRecord) {
        let vm = record.spec.id;
        let found = self.clouds[at].content(vm, &record.disks);
        let newest = self.newest.get(&vm).copied();
        if found != newest {
            let jid = &self.clouds[at].jid;
            let what = format!("{vm} starts in {jid} with {found:?} on {}, not {newest:?}", record.disks);
            self.broken.get_or_insert(what);
        }
    }

    /// A guest writes to its disks, where it runs.
    pub fn write(&mut self, vm: VmId) {
        let runs = |at: &usize| self.clouds[*at].power.get(&vm) == Some(&PowerState::Running);
        let Some(at) = (0..self.clouds.len()).find(runs) else { return };
        let Some(disks) = self.clouds[at].book.vm(vm).map(|record| record.disks) else { return };
        let newest = self.newest.entry(vm).or_default();
        *newest += 1;
        let newest = *newest;
        self.cloud(at).keep_disks(vm, &disks, newest);
    }

    pub(super) fn scan(&mut self, at: usize, token: Token, record: &VmRecord, serving: &Serving, last: bool) {
        let vm = record.spec.id;
        self.cloud(at).serving.insert(serving.migration, serving.ticket);
        let own = self.own_bytes.get(&vm).copied().unwrap_or(0);
        let ms = if last { 50 } else { 50 + own / 1_000_000 };
        let content = self.clouds[at].content(vm, &record.disks).unwrap_or(0);
        let scanned = match self.random.chance(self.failures) {
            true => Err(Denial::new(DenialCode::Content, "the disks cannot be read")),
            false => {
                let missing_bytes = if serving.seed.is_some() { own / 20 } else { own };
                let seed = seed_of(&record.spec, content);
                Ok(Scanned { seed, missing_bytes, read_bytes: own, firmware: None })
            }
        };
        self.done(at, token, ms, Done::Scanned(scanned));
    }

    pub(super) fn stage(&mut self, at: usize, token: Token, order: &StageOrder) {
        let (id, spec, vm) = (order.migration, &order.spec, order.spec.id);
        self.cloud(at).staged.insert(id);
        if let Some(earlier) = &order.goes_on_with {
            self.cloud(at).remove_disks(vm, earlier);
        }
        self.cloud(at).keep_disks(vm, &order.disks, 0);
        let catalogue = self.catalogue.clone();
        let Some(made) = catalogue.made(&spec.recipe) else {
            let no = Denial::new(DenialCode::Content, "no such recipe");
            return self.done(at, token, 1, Done::Staged(Err(no)));
        };
        let source = self.by_jid.get(&order.from.jid).copied();
        let served = source.is_some_and(|source| {
            let ticket = self.clouds[source].serving.get(&id);
            !self.is_cut(source, at) && ticket.is_some_and(|t| t.to_string() == order.init.ticket)
        });
        // What is known of the other cloud at this moment is part of what happened here.
        self.note(at, u64::from(served));
        if !served || self.random.chance(self.failures) {
            let no = Denial::new(DenialCode::Other, "the source serves nothing under this ticket");
            return self.done(at, token, 1000, Done::Staged(Err(no)));
        }
        let component_bytes = self.cloud(at).learn(&catalogue, made);
        let first = order.init.pass.number == 1;
        let own = self.own_bytes.get(&vm).copied().unwrap_or(0);
        let kept = self.clouds[at].book.has_vm(vm);
        // What came back is only what was written meanwhile; a later pass carries what the last did not.
        let own_bytes = match (first, kept) {
            (true, false) => own,
            (true, true) => own / 20,
            (false, _) => own / 200,
        };
        self.cloud(at).keep_disks(vm, &order.disks, content_of(&order.init.pass.root_delta));
        self.counts.component_bytes += component_bytes;
        self.counts.own_bytes += own_bytes;
        let needed: u64 = made.packs.iter().map(|(_, bytes)| bytes).sum();
        let block_bytes = if first { blocks::sent(component_bytes, needed, kept) } else { component_bytes };
        let carried = self.carried.entry(id).or_default();
        carried.component_bytes += component_bytes;
        carried.own_bytes += own_bytes;
        carried.block_bytes += block_bytes;
        let Carried { component_bytes, own_bytes, .. } = *carried;
        let bytes = component_bytes + own_bytes;
        let ms = bytes.saturating_mul(1000) / self.links.bytes_per_s.max(1) + self.links.latency_ms;
        let account = StageAccount {
            component_bytes,
            user_data_bytes: own_bytes,
            wire_bytes: bytes,
            fetch_ms: ms,
            ..StageAccount::default()
        };
        self.done(at, token, ms, Done::Staged(Ok(account)));
    }
}

/// Disks of the right sizes; in the place of what is on them, a number for the guest's state.
pub fn seed_of(spec: &VmSpec, content: u64) -> Seed {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&content.to_le_bytes());
    let root = Some(NodeHash::from_bytes(hash));
    let map = |size: u64, root| MapRef { block_size_bytes: 65_536, disk_size_bytes: size, root };
    Seed { root_delta: map(spec.root_size.0, root), user_data: map(spec.user_data_size.0, None) }
}

fn content_of(map: &MapRef) -> u64 {
    let mut number = [0; 8];
    if let Some(root) = &map.root {
        number.copy_from_slice(&root.as_bytes()[..8]);
    }
    u64::from_le_bytes(number)
}
