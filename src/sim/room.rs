//! The room of a simulated federation: who is shown to whom.

use std::rc::Rc;
use std::sync::Arc;

use crate::broker::effect::{Input, RoomInput};
use crate::federation::Presence;
use crate::types::PeerText;

use super::counts::stanza_bytes;
use super::queue::Event;
use super::world::World;

/// Members that the room's server tells of a presence in a millisecond: about 100 Mbit/s.
const TOLD_PER_MS: usize = 10;

impl World {
    pub(super) fn announce(&mut self, at: usize, cloud: crate::stanza::Cloud) {
        if self.clouds[at].announced.as_deref() == Some(&cloud) {
            return;
        }
        let pause_ms = self.links.presence_pause_ms;
        let of = self.cloud(at);
        let first = of.announced.replace(Arc::new(cloud)).is_none();
        if !std::mem::replace(&mut of.announcing, true) {
            let life = of.life;
            self.later(at, if first { 0 } else { pause_ms }, Event::Announce(life));
        }
    }

    pub(super) fn presence_of(&self, at: usize, available: bool) -> Rc<Presence> {
        let of = &self.clouds[at];
        let mut cloud = of.announced.clone().filter(|_| available);
        if let (Some(cloud), Some(versions)) = (&mut cloud, &of.versions_shown) {
            Arc::make_mut(cloud).versions = PeerText::from(versions);
        }
        let jid = of.jid.clone();
        Rc::new(Presence { jid, resource: "broker".into(), available, cloud })
    }

    /// Presence as it is now goes to everybody.
    pub(super) fn show(&mut self, at: usize, available: bool) {
        if available && self.clouds[at].announced.is_none() {
            return;
        }
        let presence = self.presence_of(at, available);
        let bytes = stanza_bytes(&presence);
        self.cloud(at).announced_bytes = bytes;
        self.counts.presences += 1;
        if !self.local_clocks {
            let round = Event::GoesRound { next: 0, presence, bytes };
            return self.later(at, self.links.latency_ms, round);
        }
        for other in (0..self.clouds.len()).filter(|other| *other != at) {
            let presence = presence.clone();
            self.later(other, self.links.latency_ms, Event::Shown { presence, bytes });
        }
    }

    /// The room tells so many members of a presence, and the others later: all at once would ask at once about it,
    /// as no room of this size does.
    pub(super) fn goes_round(&mut self, at: usize, next: usize, presence: Rc<Presence>, bytes: u64) {
        let end = (next + TOLD_PER_MS).min(self.clouds.len());
        for other in (next..end).filter(|other| *other != at) {
            if self.is_cut(at, other) || self.clouds[other].broker.is_none() {
                continue;
            }
            self.counts.presence_delivered(bytes);
            self.acting = other;
            self.step(other, Input::Room(RoomInput::Presence((*presence).clone())));
        }
        if end < self.clouds.len() {
            self.acting = at;
            self.later(at, 1, Event::GoesRound { next: end, presence, bytes });
        }
    }

    pub(super) fn is_cut(&self, a: usize, b: usize) -> bool {
        self.partitions.iter().any(|(x, y)| (*x, *y) == (a, b) || (*x, *y) == (b, a))
    }
}
