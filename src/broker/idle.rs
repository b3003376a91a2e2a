//! Compressing what is held while nothing moves.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::clock::UnixMillis;
use crate::types::ComponentId;

use super::Broker;
use super::effect::Effect;
use super::pending::Pending;

/// How often it is looked whether there is something new to optimise.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// Optimising while nothing moves.
#[derive(Clone)]
pub struct Idle {
    /// When something moved last.
    since: UnixMillis,
    /// When it was last looked whether there is something new.
    looked: UnixMillis,
    /// The components that were optimised last, or are just being.
    done: BTreeSet<ComponentId>,
    /// Work may be under way.
    busy: bool,
}

impl Idle {
    pub fn new(now: UnixMillis) -> Self {
        Self { since: now, looked: now, done: BTreeSet::new(), busy: false }
    }
}

impl Broker {
    /// Begins to optimise when nothing has moved for a while and there is something new, and stops
    /// when something moves.
    pub(super) fn optimize_when_idle(&mut self) {
        let now = self.now;
        let after = self.config.repository.optimize_after;
        if self.is_moving() {
            self.idle.since = now;
            self.stop_optimizing();
            // What was fetched is new, too.
            self.idle.done.clear();
            return;
        }
        if after.is_zero() || now.since(self.idle.since) < after || now.since(self.idle.looked) < LOOK_EVERY {
            return;
        }
        self.idle.looked = now;
        let token = self.expect(Pending::Components);
        self.emit(Effect::ListComponents(token));
    }

    fn stop_optimizing(&mut self) {
        if std::mem::take(&mut self.idle.busy) {
            self.emit(Effect::StopOptimizing);
        }
    }

    fn is_moving(&self) -> bool {
        !self.outgoing.is_empty() || self.incoming.values().any(|run| run.is_unfinished())
    }

    /// Optimises the components held, unless that was done already, or just is.
    pub(super) fn optimize_anew(&mut self, held: BTreeSet<ComponentId>) {
        // Something may have begun to move during the look.
        if self.is_moving() || self.idle.done == held {
            return;
        }
        self.stop_optimizing();
        self.idle.busy = true;
        self.emit(Effect::Optimize(held.iter().copied().collect()));
        self.idle.done = held;
    }
}
