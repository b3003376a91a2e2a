//! Level 0: ids, hashes, sizes and the bounded canonical codec. No I/O, no clock.

pub mod codec;
pub mod hash;
pub mod hex;
pub mod id;
pub mod identity;
mod kinds;
pub mod size;
pub mod succession;
pub mod text;

pub use hash::{BlockHash, ComponentId, Hash, ImageDigest, LinkId, MapId, NodeHash, PackId, RecipeId};
pub use id::{CloudName, MemberJid, MigrationId, ReservationId, VmId, VmName};
pub use identity::{IdentityKey, PublicKey, Signature, Signer};
pub(crate) use kinds::kinds;
pub use size::ByteSize;
pub use succession::{Succession, Successions};
pub use text::PeerText;
