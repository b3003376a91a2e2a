//! Random ids that the core hands out. They follow from a seed alone, so that a run can be repeated; whoever
//! does not know the seed cannot foretell them (BLAKE3 as a keyed pseudo-random function).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use uuid::Uuid;

use crate::types::{Hash, MigrationId, ReservationId, VmId};

/// A source of ids.
#[derive(Clone)]
pub struct Ids {
    key: [u8; 32],
    used: u64,
    tape: Option<(Tape, TapeUse)>,
}

/// What was drawn, in order: a recording keeps it instead of the seed. Clones are the same tape.
#[derive(Clone, Default)]
pub struct Tape(Arc<Mutex<VecDeque<[u8; 32]>>>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum TapeUse {
    Written,
    Read,
}

impl Tape {
    fn all(&self) -> std::sync::MutexGuard<'_, VecDeque<[u8; 32]>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes out what is on it.
    pub fn take(&self) -> Vec<[u8; 32]> {
        self.all().drain(..).collect()
    }

    /// Puts what is drawn next in the place of what was left.
    pub fn put(&self, drawn: Vec<[u8; 32]>) {
        *self.all() = drawn.into();
    }
}

impl Ids {
    /// `seed` is secret: tickets follow from it.
    pub fn new(seed: [u8; 32]) -> Self {
        Self { key: seed, used: 0, tape: None }
    }

    /// What is drawn goes onto `tape` as well.
    pub fn onto(self, tape: Tape) -> Self {
        Self { tape: Some((tape, TapeUse::Written)), ..self }
    }

    /// What was drawn before is drawn again; beyond the tape's end, what fits nothing.
    pub fn from_tape(tape: Tape) -> Self {
        Self { key: [0; 32], used: 0, tape: Some((tape, TapeUse::Read)) }
    }

    fn bytes(&mut self) -> [u8; 32] {
        self.used += 1;
        let told = match &self.tape {
            Some((tape, TapeUse::Read)) => tape.all().pop_front(),
            _ => None,
        };
        let bytes =
            told.unwrap_or_else(|| *blake3::keyed_hash(&self.key, &self.used.to_le_bytes()).as_bytes());
        if let Some((tape, TapeUse::Written)) = &self.tape {
            tape.all().push_back(bytes);
        }
        bytes
    }

    pub fn uuid(&mut self) -> Uuid {
        let bytes = self.bytes();
        let mut first = [0; 16];
        first.copy_from_slice(&bytes[..16]);
        uuid::Builder::from_random_bytes(first).into_uuid()
    }

    pub fn migration(&mut self) -> MigrationId {
        MigrationId(self.uuid())
    }

    pub fn reservation(&mut self) -> ReservationId {
        ReservationId(self.uuid())
    }

    pub fn vm(&mut self) -> VmId {
        VmId(self.uuid())
    }

    /// 32 bytes that nobody else can guess.
    pub fn ticket(&mut self) -> Hash {
        Hash::from_bytes(self.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_follow_from_the_seed_and_never_come_twice() {
        let mut a = Ids::new([1; 32]);
        let mut b = Ids::new([1; 32]);
        let mut c = Ids::new([2; 32]);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..1000 {
            let id = a.uuid();
            assert_eq!(id, b.uuid());
            assert_ne!(id, c.uuid());
            assert_eq!(id.get_version_num(), 4);
            assert!(seen.insert(id));
        }
        assert_eq!(a.ticket(), b.ticket());
    }
}
