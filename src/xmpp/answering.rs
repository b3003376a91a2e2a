//! Requests of others that the broker has not answered yet: so many of one member and of all, that one
//! cannot take the places of the others.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::types::MemberJid;

const OF_ALL_MAX: usize = 256;
const OF_MEMBER_MAX: usize = 64;

#[derive(Clone, Default)]
pub struct Answering(Arc<Mutex<BTreeMap<MemberJid, usize>>>);

/// One of the places, until it is dropped.
pub struct Seat(Answering, MemberJid);

impl Answering {
    /// A place for one more request of `member`, if there is any.
    pub fn begin(&self, member: &MemberJid) -> Option<Seat> {
        let mut seats = self.seats();
        let own = seats.get(member).copied().unwrap_or(0);
        if own >= OF_MEMBER_MAX || seats.values().sum::<usize>() >= OF_ALL_MAX {
            return None;
        }
        seats.insert(member.clone(), own + 1);
        Some(Seat(self.clone(), member.clone()))
    }

    // A panic while it is held leaves a count that is wrong by one at most.
    fn seats(&self) -> MutexGuard<'_, BTreeMap<MemberJid, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut seats = self.0.seats();
        match seats.get_mut(&self.1) {
            Some(n) if *n > 1 => *n -= 1,
            _ => drop(seats.remove(&self.1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_member_leaves_places_for_others_and_places_come_back() {
        let answering = Answering::default();
        let of = |name: &str| -> Vec<Seat> {
            let member: MemberJid = format!("{name}@x").parse().unwrap();
            std::iter::from_fn(|| answering.begin(&member)).take(1000).collect()
        };
        let mallory = of("mallory");
        assert_eq!(mallory.len(), OF_MEMBER_MAX);
        assert_eq!(of("bob").len(), OF_MEMBER_MAX, "they went with the requests");
        let others: Vec<_> = ["a", "b", "c", "d"].map(of).into();
        assert_eq!(others.iter().map(Vec::len).collect::<Vec<_>>(), [64, 64, 64, 0]);
        drop(mallory);
        assert_eq!(of("d").len(), OF_MEMBER_MAX);
        drop(others);
        assert!(answering.seats().is_empty());
    }
}
