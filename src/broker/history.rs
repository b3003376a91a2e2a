//! Ended migrations that are remembered, and which of them give way to others. A member can begin and
//! call off as many as it likes: what it cannot do is displace those in which a VM was handed over, or
//! those of other members.

use std::collections::BTreeMap;

use crate::clock::UnixMillis;
use crate::interface::{MigrationPhase, MigrationRole, MigrationView};
use crate::types::{MemberJid, MigrationId};

/// Migrations with a hand-over that are remembered, the newest.
const HAND_OVERS_MAX: usize = 1000;
/// Attempts that are remembered of one member in one direction, the newest.
const ATTEMPTS_MAX: usize = 50;
/// Members and directions whose attempts are remembered: those heard of last.
const RINGS_MAX: usize = 200;

#[derive(Clone, Debug, Default)]
pub struct History {
    views: BTreeMap<MigrationId, MigrationView>,
}

/// What a view gives way to: others of its ring, and none else.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Ring {
    HandOvers,
    /// Of a member, in one direction: from here, or to here.
    Attempts(MemberJid, MigrationRole),
}

impl Ring {
    fn of(view: &MigrationView) -> Self {
        let p = &view.progress;
        // Views of earlier releases do not say; those that completed were handed over.
        if p.handed_over || p.phase == MigrationPhase::Completed {
            Self::HandOvers
        } else {
            Self::Attempts(p.peer.clone(), p.role)
        }
    }

    fn size_max(&self) -> usize {
        match self {
            Self::HandOvers => HAND_OVERS_MAX,
            Self::Attempts(..) => ATTEMPTS_MAX,
        }
    }
}

impl History {
    /// What was recorded, within bounds; and what of it is to be forgotten.
    pub fn of(views: BTreeMap<MigrationId, MigrationView>) -> (Self, Vec<MigrationId>) {
        let mut history = Self { views };
        let rings: Vec<Ring> = history.rings().into_keys().collect();
        let mut displaced: Vec<_> = rings.iter().flat_map(|ring| history.shrink(ring)).collect();
        displaced.extend(history.shrink_rings());
        (history, displaced)
    }

    pub fn get(&self, id: &MigrationId) -> Option<&MigrationView> {
        self.views.get(id)
    }

    pub fn views(&self) -> impl Iterator<Item = &MigrationView> {
        self.views.values()
    }

    /// A migration that goes on.
    pub fn take(&mut self, id: &MigrationId) -> Option<MigrationView> {
        self.views.remove(id)
    }

    /// Remembers an ended migration; returns what it displaced.
    pub fn remember(&mut self, view: MigrationView) -> Vec<MigrationId> {
        let ring = Ring::of(&view);
        self.views.insert(view.progress.id, view);
        let mut displaced = self.shrink(&ring);
        displaced.extend(self.shrink_rings());
        displaced
    }

    /// Removes the oldest of a ring that is too large.
    fn shrink(&mut self, ring: &Ring) -> Vec<MigrationId> {
        let of_ring = self.views.values().filter(|view| Ring::of(view) == *ring);
        let mut all: Vec<_> = of_ring.map(|view| (view.progress.started, view.progress.id)).collect();
        let over = all.len().saturating_sub(ring.size_max());
        if over > 0 {
            all.sort_unstable();
        }
        all.truncate(over);
        let displaced: Vec<_> = all.into_iter().map(|(_, id)| id).collect();
        displaced.iter().for_each(|id| drop(self.views.remove(id)));
        displaced
    }

    /// Removes whole rings of attempts, those first of which the newest is the oldest.
    fn shrink_rings(&mut self) -> Vec<MigrationId> {
        // Each has one view at least.
        if self.views.len() <= RINGS_MAX {
            return Vec::new();
        }
        let mut rings: Vec<_> =
            self.rings().into_iter().filter(|(ring, _)| *ring != Ring::HandOvers).collect();
        let over = rings.len().saturating_sub(RINGS_MAX);
        rings.sort_by_key(|(_, newest)| *newest);
        rings.truncate(over);
        let gone = |view: &&MigrationView| rings.iter().any(|(ring, _)| *ring == Ring::of(view));
        let displaced: Vec<_> = self.views.values().filter(gone).map(|view| view.progress.id).collect();
        displaced.iter().for_each(|id| drop(self.views.remove(id)));
        displaced
    }

    /// All rings, with when their newest view began.
    fn rings(&self) -> BTreeMap<Ring, UnixMillis> {
        let mut rings = BTreeMap::new();
        for view in self.views.values() {
            let newest = rings.entry(Ring::of(view)).or_insert(view.progress.started);
            *newest = view.progress.started.max(*newest);
        }
        rings
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::account::new_view;
    use crate::vm::VmSpec;

    fn view(peer: &str, role: MigrationRole, at: u64) -> MigrationView {
        let spec: VmSpec = serde_json::from_value(serde_json::json!({
            "id": uuid::Uuid::nil(), "name": "web", "cpus": 1, "memory": 1 << 27, "recipe": "0".repeat(64),
            "root_size": 0, "user_data_size": 0, "nics": [], "architecture": "amd64", "cpu_model": "qemu64",
        }))
        .unwrap();
        let mut view =
            new_view(MigrationId::random(), &spec, role, &peer.parse().unwrap(), None, UnixMillis(at));
        view.progress.phase = MigrationPhase::Cancelled;
        view.progress.ended = true;
        view
    }

    fn handed(peer: &str, at: u64) -> MigrationView {
        let mut view = view(peer, MigrationRole::Target, at);
        view.progress.handed_over = true;
        view
    }

    #[test]
    fn a_members_attempts_displace_its_own_attempts_and_nothing_else() {
        let mut history = History::default();
        let mut kept = Vec::new();
        for at in 0..100 {
            let view = handed("a@x", at);
            kept.push(view.progress.id);
            history.remember(view);
        }
        let mut completed = view("a@x", MigrationRole::Source, 100);
        completed.progress.phase = MigrationPhase::Completed;
        kept.push(completed.progress.id);
        history.remember(completed);
        // Others' attempts, and our own towards the member.
        for (peer, role) in [("b@x", MigrationRole::Target), ("mallory@x", MigrationRole::Source)] {
            for at in 0..ATTEMPTS_MAX as u64 {
                let view = view(peer, role, at);
                kept.push(view.progress.id);
                history.remember(view);
            }
        }
        let mut displaced = 0;
        let floods: Vec<_> =
            (0..1000).map(|at| view("mallory@x", MigrationRole::Target, 1000 + at)).collect();
        for view in &floods {
            displaced += history.remember(view.clone()).len();
        }
        assert_eq!(displaced, 1000 - ATTEMPTS_MAX);
        assert!(kept.iter().all(|id| history.get(id).is_some()), "something was erased");
        let newest = &floods[1000 - ATTEMPTS_MAX..];
        assert!(newest.iter().all(|view| history.get(&view.progress.id).is_some()), "the newest stay");
        assert_eq!(history.views().count(), kept.len() + ATTEMPTS_MAX);
    }

    #[test]
    fn hand_overs_and_members_are_bounded_and_the_newest_stay() {
        let mut history = History::default();
        let first = handed("a@x", 0);
        history.remember(first.clone());
        for at in 1..HAND_OVERS_MAX as u64 {
            assert_eq!(history.remember(handed("a@x", at)), []);
        }
        assert_eq!(history.remember(handed("b@x", 5000)), [first.progress.id]);
        for n in 0..3 * RINGS_MAX as u64 {
            history.remember(view(&format!("m{n}@x"), MigrationRole::Target, n));
        }
        assert_eq!(history.views().count(), HAND_OVERS_MAX + RINGS_MAX);
        let oldest = history.views().filter(|v| !v.progress.handed_over).map(|v| v.progress.started.0).min();
        assert_eq!(oldest, Some(2 * RINGS_MAX as u64));
    }

    #[test]
    fn what_is_read_at_start_is_brought_within_bounds() {
        let floods = (0..1000).map(|at| view("mallory@x", MigrationRole::Target, at));
        let all = floods.chain([handed("a@x", 0)]).map(|view| (view.progress.id, view)).collect();
        let (history, displaced) = History::of(all);
        assert_eq!((history.views().count(), displaced.len()), (ATTEMPTS_MAX + 1, 1000 - ATTEMPTS_MAX));
        assert!(displaced.iter().all(|id| history.get(id).is_none()));
    }
}
