//! One identity key gives way to another: the old key and the new one both sign it.
//!
//! The old key's signature says who follows it, the new key's that whoever holds it agrees; neither
//! can be made without the secret key. A key has one successor at most: who sees a second one, sees a
//! thief or a copy of the old key, and stays with the first.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;

use super::codec::{CodecError, Reader, Writer};
use super::identity::{IdentityKey, PublicKey, Signature};

/// Successions that are kept together, and so the most that lead from one key to another.
pub const SUCCESSIONS_MAX: usize = 64;
/// Separates these signatures from every other use of the keys.
const CONTEXT: &[u8] = b"cicada key succession 1\0";
/// [`Succession::encode`] writes so many.
pub const SUCCESSION_BYTES: usize = 32 + 32 + 8 + 64 + 64;

/// From `issued` on, `new` speaks for who `old` spoke for.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Succession {
    pub old: PublicKey,
    pub new: PublicKey,
    /// By the clock of who signed; told to people, not relied on.
    pub issued: UnixMillis,
    pub by_old: Signature,
    pub by_new: Signature,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SuccessionError {
    #[error("a key cannot succeed itself")]
    Same,
    #[error("the succession of {} is not signed by it", .0.fingerprint())]
    NotByOld(PublicKey),
    #[error("the succession to {} is not signed by it", .0.fingerprint())]
    NotByNew(PublicKey),
    #[error(
        "{} was succeeded by {}, and cannot be by {} as well",
        old.fingerprint(), known.fingerprint(), other.fingerprint()
    )]
    Fork { old: PublicKey, known: PublicKey, other: PublicKey },
    #[error("{} succeeds two keys, or a key that succeeded it", .0.fingerprint())]
    Knot(PublicKey),
    #[error("the succession of {} is listed twice", .0.fingerprint())]
    Twice(PublicKey),
    #[error("more than {SUCCESSIONS_MAX} successions")]
    TooMany,
}

impl Succession {
    pub fn sign(old: &IdentityKey, new: &IdentityKey, issued: UnixMillis) -> Self {
        let message = message(&old.public(), &new.public(), issued);
        Self {
            old: old.public(),
            new: new.public(),
            issued,
            by_old: old.sign(&message),
            by_new: new.sign(&message),
        }
    }

    /// Whether both keys signed it.
    pub fn verify(&self) -> Result<(), SuccessionError> {
        if self.old == self.new {
            return Err(SuccessionError::Same);
        }
        let message = message(&self.old, &self.new, self.issued);
        self.old.verify(&message, &self.by_old).map_err(|_| SuccessionError::NotByOld(self.old))?;
        self.new.verify(&message, &self.by_new).map_err(|_| SuccessionError::NotByNew(self.new))
    }

    /// Appends its canonical form, [`SUCCESSION_BYTES`] long: old key, new key, `issued` as 64 bits
    /// little endian, signature by the old key, signature by the new one.
    pub fn encode(&self, w: &mut Writer) {
        w.fixed(self.old.as_bytes());
        w.fixed(self.new.as_bytes());
        w.u64(self.issued.0);
        w.fixed(self.by_old.as_bytes());
        w.fixed(self.by_new.as_bytes());
    }

    /// Reads what [`Succession::encode`] writes; signatures are not checked.
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        let key = |r: &mut Reader<'_>, what| {
            PublicKey::from_bytes(r.array(what)?)
                .map_err(|e| CodecError::Invalid { what, rule: e.to_string() })
        };
        Ok(Self {
            old: key(r, "old key")?,
            new: key(r, "new key")?,
            issued: UnixMillis(r.u64("time of issue")?),
            by_old: Signature::from_bytes(r.array("signature by the old key")?),
            by_new: Signature::from_bytes(r.array("signature by the new key")?),
        })
    }
}

/// What both keys sign.
fn message(old: &PublicKey, new: &PublicKey, issued: UnixMillis) -> Vec<u8> {
    [CONTEXT, old.as_bytes(), new.as_bytes(), &issued.0.to_le_bytes()].concat()
}

/// Successions that were verified and fit together: no key has two successors or two predecessors,
/// none leads back to itself, and there are at most [`SUCCESSIONS_MAX`]. As JSON: the list of them.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(try_from = "Vec<Succession>", into = "Vec<Succession>")]
pub struct Successions(Vec<Succession>);

impl Successions {
    /// Takes in one more; false if it is known already.
    pub fn add(&mut self, s: Succession) -> Result<bool, SuccessionError> {
        if let Some(known) = self.of(&s.old) {
            if known.new == s.new {
                // Signed twice at most, by clocks that differ; the first one counts.
                return s.verify().map(|()| false);
            }
            s.verify()?;
            return Err(SuccessionError::Fork { old: s.old, known: known.new, other: s.new });
        }
        if self.0.len() >= SUCCESSIONS_MAX {
            return Err(SuccessionError::TooMany);
        }
        s.verify()?;
        if self.0.iter().any(|k| k.new == s.new) || self.leads(&s.new, &s.old) {
            return Err(SuccessionError::Knot(s.new));
        }
        self.0.push(s);
        Ok(true)
    }

    /// The succession of a key.
    pub fn of(&self, old: &PublicKey) -> Option<&Succession> {
        self.0.iter().find(|s| s.old == *old)
    }

    /// Whether `to` is `from` or follows it, by however many steps.
    pub fn leads(&self, from: &PublicKey, to: &PublicKey) -> bool {
        from == to || self.after(from).any(|s| s.new == *to)
    }

    /// The newest key that follows `from`; `from` itself if none does.
    pub fn newest(&self, from: &PublicKey) -> PublicKey {
        self.after(from).last().map_or(*from, |s| s.new)
    }

    /// The successions from `from` on, in their order.
    pub fn after<'a>(&'a self, from: &PublicKey) -> impl Iterator<Item = &'a Succession> {
        std::iter::successors(self.of(from), |s| self.of(&s.new))
    }

    /// `key`, all that follow it and all that it follows.
    pub fn linked(&self, key: &PublicKey) -> BTreeSet<PublicKey> {
        let before = |key: &PublicKey| self.0.iter().find(|s| s.new == *key).map(|s| s.old);
        let earlier = std::iter::successors(before(key), before);
        earlier.chain([*key]).chain(self.after(key).map(|s| s.new)).collect()
    }

    /// In the order in which they were taken in.
    pub fn iter(&self) -> impl Iterator<Item = &Succession> {
        self.0.iter()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Their number as a varint, then each.
    pub fn encode(&self, w: &mut Writer) {
        w.varint(self.0.len() as u64);
        self.0.iter().for_each(|s| s.encode(w));
    }

    /// Reads what [`Successions::encode`] writes and verifies it.
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        let what = "successions";
        let count = r.count(what, SUCCESSIONS_MAX as u64, SUCCESSION_BYTES)?;
        let list = (0..count).map(|_| Succession::decode(r)).collect::<Result<Vec<_>, _>>()?;
        Self::try_from(list).map_err(|e| CodecError::Invalid { what, rule: e.to_string() })
    }
}

impl TryFrom<Vec<Succession>> for Successions {
    type Error = SuccessionError;
    fn try_from(list: Vec<Succession>) -> Result<Self, Self::Error> {
        if list.len() > SUCCESSIONS_MAX {
            return Err(SuccessionError::TooMany);
        }
        let mut out = Self::default();
        for succession in list {
            let old = succession.old;
            if !out.add(succession)? {
                return Err(SuccessionError::Twice(old));
            }
        }
        Ok(out)
    }
}

impl From<Successions> for Vec<Succession> {
    fn from(s: Successions) -> Self {
        s.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> IdentityKey {
        IdentityKey::from_secret_bytes(&[n; 32])
    }

    fn public(n: u8) -> PublicKey {
        key(n).public()
    }

    fn step(old: u8, new: u8) -> Succession {
        Succession::sign(&key(old), &key(new), UnixMillis(1_000 + u64::from(old)))
    }

    fn steps(pairs: &[(u8, u8)]) -> Result<Successions, SuccessionError> {
        pairs.iter().map(|(old, new)| step(*old, *new)).collect::<Vec<_>>().try_into()
    }

    #[test]
    fn both_keys_sign_and_nothing_can_be_changed_after() {
        let s = step(1, 2);
        assert_eq!(s.verify(), Ok(()));
        assert_eq!(step(1, 1).verify(), Err(SuccessionError::Same));
        let other = step(1, 3);
        for forged in [
            Succession { new: public(3), ..s.clone() },
            Succession { issued: UnixMillis(1), ..s.clone() },
            Succession { by_old: s.by_new, ..s.clone() },
            Succession { by_old: other.by_old, ..s.clone() },
        ] {
            assert_eq!(forged.verify(), Err(SuccessionError::NotByOld(public(1))), "{forged:?}");
        }
        // The new key must agree: nobody makes another's key the successor of his own.
        let s = Succession { by_new: key(3).sign(&message(&s.old, &s.new, s.issued)), ..s };
        assert_eq!(s.verify(), Err(SuccessionError::NotByNew(public(2))));
        // A signature made for another purpose is none here.
        let bare = [public(1).as_bytes().as_slice(), public(2).as_bytes()].concat();
        let s = Succession { by_old: key(1).sign(&bare), ..step(1, 2) };
        assert!(s.verify().is_err());
    }

    #[test]
    fn successions_lead_forward_only() {
        // The order they come in does not matter.
        let all = steps(&[(2, 3), (1, 2), (7, 8)]).unwrap();
        assert!(all.leads(&public(1), &public(3)) && all.leads(&public(2), &public(3)));
        assert!(all.leads(&public(9), &public(9)), "a key stands for itself");
        assert!(!all.leads(&public(3), &public(1)) && !all.leads(&public(1), &public(8)));
        assert_eq!((all.newest(&public(1)), all.newest(&public(9))), (public(3), public(9)));
        let of_one = BTreeSet::from([public(1), public(2), public(3)]);
        for n in 1..=3 {
            assert_eq!(all.linked(&public(n)), of_one);
        }
        assert_eq!(all.linked(&public(9)), BTreeSet::from([public(9)]));
    }

    #[test]
    fn a_key_has_one_successor_and_the_first_one_counts() {
        let mut all = steps(&[(1, 2)]).unwrap();
        let fork = SuccessionError::Fork { old: public(1), known: public(2), other: public(3) };
        assert_eq!(all.add(step(1, 3)), Err(fork));
        assert_eq!(
            all.add(Succession { by_new: step(4, 5).by_new, ..step(1, 3) }).unwrap_err(),
            SuccessionError::NotByNew(public(3)),
            "a forged fork accuses nobody"
        );
        assert_eq!(all.add(Succession::sign(&key(1), &key(2), UnixMillis(9))), Ok(false));
        assert_eq!(all.add(step(2, 1)), Err(SuccessionError::Knot(public(1))), "back to where it began");
        assert_eq!(all.add(step(3, 2)), Err(SuccessionError::Knot(public(2))), "two keys to one");
        assert_eq!(all, steps(&[(1, 2)]).unwrap());
        assert_eq!(steps(&[(1, 2), (1, 2)]), Err(SuccessionError::Twice(public(1))));
    }

    #[test]
    fn a_list_is_bounded_and_has_one_form() {
        let pairs: Vec<_> = (1..=64).map(|n| (n, n + 1)).collect();
        let mut all = steps(&pairs).unwrap();
        assert!(all.leads(&public(1), &public(65)));
        assert_eq!(all.add(step(65, 66)), Err(SuccessionError::TooMany));
        let mut w = Writer::new();
        all.encode(&mut w);
        let bytes = w.into_bytes();
        assert_eq!(bytes.len(), 1 + 64 * SUCCESSION_BYTES);
        let mut r = Reader::new(&bytes);
        assert_eq!(Successions::decode(&mut r).as_ref(), Ok(&all));
        r.end().unwrap();
        assert!(matches!(Successions::decode(&mut Reader::new(&[65])), Err(CodecError::TooLarge { .. })));
        assert!(matches!(Successions::decode(&mut Reader::new(&[64])), Err(CodecError::Truncated { .. })));
        let json = serde_json::to_string(&all).unwrap();
        assert_eq!(serde_json::from_str::<Successions>(&json).unwrap(), all);
        let mut forged: Vec<Succession> = all.into();
        forged[63].by_old = forged[62].by_old;
        let json = serde_json::to_string(&forged).unwrap();
        assert!(serde_json::from_str::<Successions>(&json).is_err(), "what is read was verified");
    }
}
