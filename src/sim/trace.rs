//! What happened last to the clouds concerned, in words: the history that a violation is shown with. It is written
//! down in a second run of the same seed, so that the first pays nothing for it.

use std::collections::{BTreeSet, VecDeque};

use crate::broker::Input;
use crate::broker::effect::{Done, RoomInput};

use super::world::World;

/// Lines kept.
const LINES_MAX: usize = 30;
/// Characters of a line.
const LINE_MAX: usize = 240;

#[derive(Clone, Debug, Default)]
pub struct Trace {
    of: BTreeSet<usize>,
    lines: VecDeque<String>,
}

impl Trace {
    /// Of these clouds.
    pub fn of(clouds: impl IntoIterator<Item = usize>) -> Self {
        Self { of: clouds.into_iter().collect(), lines: VecDeque::new() }
    }

    /// The latest, the oldest first.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(String::as_str)
    }

    fn add(&mut self, line: String) {
        if self.lines.len() == LINES_MAX {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

impl World {
    /// Notes what a broker is told, if its cloud is one of those concerned. Time that passes is left out, and the room.
    pub(super) fn trace(&mut self, at: usize, input: &Input) {
        let concerned = self.trace.as_ref().is_some_and(|trace| trace.of.contains(&at));
        let says_nothing = matches!(
            input,
            Input::Tick
                | Input::Room(RoomInput::Presence(_))
                | Input::Measured(_)
                | Input::Done(_, Done::Components(_) | Done::OwnersKnown { .. })
        );
        if !concerned || says_nothing {
            return;
        }
        let what = match input {
            // Sealed bytes say nothing.
            Input::Asked(_, from, payload) => format!("asked by {from}, {} bytes", payload.len()),
            other => format!("{other:?}"),
        };
        let what: String = what.chars().take(LINE_MAX).collect();
        let line = format!("{} ms, {}: {what}", self.now.0 - super::world::BEGUN.0, self.clouds[at].name());
        if let Some(trace) = &mut self.trace {
            trace.add(line);
        }
    }
}
