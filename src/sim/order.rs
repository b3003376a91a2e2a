//! The order of things taken out of time's hands: whatever is on its way may happen next, be lost, or meet a
//! broker that dies. Each cloud then has a clock of its own, which only moves forward: nothing happens there
//! before what it follows from, and that is all that is known of the time elsewhere.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::time::Duration;

use crate::broker::memory_book::Page;
use crate::types::VmId;

use super::queue::{Event, Pending, Said, Scheduled};
use super::world::{World, mix};

/// How a broker dies in the middle of a step.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Death {
    /// So many writes are made; all, if there are fewer.
    pub writes: u64,
    /// And so many of the step's effects happen.
    pub effects: usize,
    /// What a hypervisor was told and has not done yet it does all the same.
    pub hosts_go_on: bool,
    pub down: Duration,
}

impl World {
    /// From now on whoever drives the world says what happens next.
    pub fn in_any_order(&mut self) {
        self.local_clocks = true;
        let now = self.now;
        (0..self.clouds.len()).for_each(|at| self.cloud(at).clock = now);
    }

    /// Time rules again: the earliest happens next.
    pub fn in_time(&mut self) {
        self.local_clocks = false;
        self.now = self.clouds.iter().map(|c| c.clock).max().unwrap_or(self.now).max(self.now);
    }

    /// All that may happen next. What a hypervisor does with one VM keeps its order.
    pub fn pending(&self) -> Vec<Pending> {
        let mut all: Vec<&Scheduled> = self.queue.iter().map(|Reverse(s)| s).collect();
        all.sort_unstable();
        let mut lanes: BTreeSet<(usize, VmId)> = BTreeSet::new();
        all.retain(|s| !self.is_void(s) && s.lane().is_none_or(|vm| lanes.insert((s.cloud, vm))));
        let pending =
            |s: &Scheduled| Pending { seq: s.seq, id: s.id, at: s.at, cloud: s.cloud, kind: s.kind() };
        all.into_iter().map(pending).collect()
    }

    /// Whether it would change nothing: nobody waits for it any more.
    fn is_void(&self, s: &Scheduled) -> bool {
        let cloud = &self.clouds[s.cloud];
        match &s.event {
            Event::Input(life, _) | Event::Tick(life) | Event::Announce(life) => cloud.life != *life,
            Event::Answer { answered, .. } => {
                cloud.life != answered.life || !cloud.waits_for(answered.talk, answered.asked)
            }
            Event::AskAgain { life, talk, asked } => cloud.life != *life || !cloud.waits_for(*talk, *asked),
            Event::Shown { .. } => cloud.broker.is_none(),
            Event::GoesRound { .. } | Event::Host { .. } | Event::Request { .. } | Event::Restart => false,
        }
    }

    fn remove(&mut self, seq: u64) -> Option<Scheduled> {
        let mut all = std::mem::take(&mut self.queue).into_vec();
        let found = all.iter().position(|Reverse(s)| s.seq == seq).map(|at| all.swap_remove(at).0);
        self.queue = BinaryHeap::from(all);
        found
    }

    /// Lets this happen. Whether there was such a thing.
    pub fn take(&mut self, seq: u64) -> bool {
        let found = self.remove(seq);
        found.map(|next| self.happen(next)).is_some()
    }

    /// It is lost on its way.
    pub fn lose(&mut self, seq: u64) {
        drop(self.remove(seq));
    }

    /// Lets this happen while writing these fails.
    pub fn take_failing(&mut self, seq: u64, pages: &[Page]) {
        let Some(next) = self.remove(seq) else { return };
        let at = next.cloud;
        self.note(at, 0xfa11 + pages.len() as u64);
        self.clouds[at].book.fail(pages.iter().copied());
        self.happen(next);
        self.clouds[at].book.fail([]);
    }

    /// Lets this happen while it becomes unknown what was written about owners: the broker ends.
    pub fn take_undecided(&mut self, seq: u64, written: bool) {
        let Some(next) = self.remove(seq) else { return };
        let at = next.cloud;
        self.note(at, 0x0dd + u64::from(written));
        self.clouds[at].book.leave_undecided(Some(written));
        self.happen(next);
        self.clouds[at].book.leave_undecided(None);
    }

    /// Lets this happen, and the broker to which it does die over it.
    pub fn take_and_die(&mut self, seq: u64, death: Death) {
        let Some(next) = self.remove(seq) else { return };
        let at = next.cloud;
        self.note(at, 0xdead ^ death.writes << 32 ^ (death.effects as u64) << 16);
        self.clouds[at].book.stop_after(Some(death.writes));
        self.dying = Some((at, death));
        self.happen(next);
        self.clouds[at].book.stop_after(None);
        if self.dying.take().is_some() {
            self.die(at, death);
        }
    }

    /// Time passes at one cloud.
    pub fn pass(&mut self, at: usize, by: Duration) {
        let clock = self.clouds[at].clock.plus(by);
        self.note(at, by.as_millis() as u64);
        self.cloud(at).clock = clock;
    }

    /// What was said comes again.
    pub fn repeat(&mut self, said: Said) {
        self.enter(said.to);
        self.deliver_again(said);
    }

    /// What there is in all clouds and on its way: two worlds with the same digest go on alike. It is a hash of
    /// what happened to each cloud, in the order in which it did there.
    pub fn digest(&self) -> u64 {
        let clouds = self.clouds.iter().fold(0, |digest, cloud| mix(digest, cloud.chain));
        let all = self.queue.iter().map(|Reverse(s)| s).filter(|s| !self.is_void(s));
        let queue = all.map(|s| mix(s.id, s.cloud as u64)).fold(0, u64::wrapping_add);
        mix(clouds, queue)
    }
}
