//! BLAKE3 hashes and the content ids made of them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::hex;
use super::text::PeerText;

/// A BLAKE3 hash of 32 bytes. `Display` is the full lower-case hex; [`Hash::short`] is for people.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash([u8; 32]);

/// Text that is not a 64-digit hex hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a hash: 64 hex digits expected")]
pub struct ParseHashError(pub PeerText);

impl Hash {
    pub const LEN_BYTES: usize = 32;

    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Hash of `data`, computed on the calling thread.
    pub fn of(data: &[u8]) -> Self {
        Self(*blake3::hash(data).as_bytes())
    }

    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first ten hex digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..10].to_owned()
    }
}

impl From<blake3::Hash> for Hash {
    fn from(h: blake3::Hash) -> Self {
        Self(*h.as_bytes())
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for b in self.0 {
            write!(f, "{b:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}

impl FromStr for Hash {
    type Err = ParseHashError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let bad = || ParseHashError(s.into());
        // The length first: a stranger's text is not copied to be refused.
        let bytes =
            (s.len() == 64).then(|| hex::decode(&s.to_ascii_lowercase())).flatten().ok_or_else(bad)?;
        Ok(Self(bytes.try_into().map_err(|_| bad())?))
    }
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

macro_rules! content_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Hash);

        impl $name {
            pub fn of(data: &[u8]) -> Self {
                Self(Hash::of(data))
            }
            pub const fn from_bytes(bytes: [u8; 32]) -> Self {
                Self(Hash::from_bytes(bytes))
            }
            pub const fn as_bytes(&self) -> &[u8; 32] {
                self.0.as_bytes()
            }
            /// The first ten hex digits, for people.
            pub fn short(&self) -> String {
                self.0.short()
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = ParseHashError;
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                s.parse().map(Self)
            }
        }
    };
}

content_id!(
    /// Hash of a pack's plain bytes.
    PackId
);
content_id!(
    /// Hash of a component manifest's canonical bytes.
    ComponentId
);
content_id!(
    /// Hash of a recipe's canonical bytes; names a composition.
    RecipeId
);
content_id!(
    /// Hash of a chunk map's header, which names its root node.
    MapId
);
content_id!(
    /// Hash of one node of a chunk map's tree.
    NodeHash
);
content_id!(
    /// Hash of one block of a disk.
    BlockHash
);
content_id!(
    /// Names one link of a VM's history of ownership: what was signed, whatever the signatures' bytes.
    LinkId
);
content_id!(
    /// Digest of a whole disk image: BLAKE3 over the list of BLAKE3 of its 4 MiB segments.
    ImageDigest
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_round_trip_and_bad_text() {
        let h = Hash::of(b"cicada");
        assert_eq!(h.to_string().parse::<Hash>(), Ok(h));
        for bad in ["", "zz", &"g".repeat(64), &"é".repeat(32), &"0".repeat(63), &"+0".repeat(32)] {
            assert!(bad.parse::<Hash>().is_err(), "{bad}");
        }
    }
}
