//! The room of a simulated federation: who is shown to whom.

use std::rc::Rc;
use std::sync::Arc;

use crate::federation::Presence;
use crate::types::PeerText;

use super::counts::stanza_bytes;
use super::queue::Event;
use super::world::World;

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
            return self.later(at, self.links.latency_ms, Event::Shown { everybody: true, presence, bytes });
        }
        for other in (0..self.clouds.len()).filter(|other| *other != at) {
            let presence = presence.clone();
            self.later(other, self.links.latency_ms, Event::Shown { everybody: false, presence, bytes });
        }
    }

    pub(super) fn is_cut(&self, a: usize, b: usize) -> bool {
        self.partitions.iter().any(|(x, y)| (*x, *y) == (a, b) || (*x, *y) == (b, a))
    }
}
