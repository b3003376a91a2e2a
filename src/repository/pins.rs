//! Pins: what a running piece of work needs kept, before anything durable refers to it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Repository;
use super::error::ObjectId;

/// What is pinned in this process.
#[derive(Debug, Default)]
pub(super) struct Pins {
    state: Mutex<PinState>,
}

#[derive(Debug, Default)]
pub(super) struct PinState {
    counts: HashMap<ObjectId, usize>,
    /// Goes up with every new pin: the collector sees that what it marked is not all any more.
    pub generation: u64,
}

/// Keeps objects, and what they refer to, from being collected while it lives. Pin first, then ask
/// whether they are there: the order makes the answer last.
#[derive(Debug)]
pub struct Pin {
    pins: Arc<Pins>,
    objects: Vec<ObjectId>,
}

impl Pins {
    pub fn lock(&self) -> MutexGuard<'_, PinState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PinState {
    pub fn objects(&self) -> impl Iterator<Item = ObjectId> {
        self.counts.keys().copied()
    }
}

impl Repository {
    /// Pins objects, held or still to come, until the pin is dropped.
    pub fn pin(&self, objects: Vec<ObjectId>) -> Pin {
        let pins = Arc::clone(&self.inner.pins);
        let mut state = pins.lock();
        for object in &objects {
            *state.counts.entry(*object).or_default() += 1;
        }
        state.generation += 1;
        drop(state);
        Pin { pins, objects }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut state = self.pins.lock();
        for object in &self.objects {
            if let Some(count) = state.counts.get_mut(object) {
                *count -= 1;
                if *count == 0 {
                    state.counts.remove(object);
                }
            }
        }
    }
}
