//! Random ids that the core hands out. They follow from a seed alone, so that a run can be repeated; whoever
//! does not know the seed cannot foretell them (BLAKE3 as a keyed pseudo-random function).

use uuid::Uuid;

use crate::types::{Hash, MigrationId, ReservationId, VmId};

/// A source of ids.
#[derive(Clone)]
pub struct Ids {
    key: [u8; 32],
    used: u64,
}

impl Ids {
    /// `seed` is secret: tickets follow from it.
    pub fn new(seed: [u8; 32]) -> Self {
        Self { key: seed, used: 0 }
    }

    fn bytes(&mut self) -> [u8; 32] {
        self.used += 1;
        *blake3::keyed_hash(&self.key, &self.used.to_le_bytes()).as_bytes()
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
