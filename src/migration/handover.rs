//! The signed hand-over: the responsibility transfer point. The target may run a VM under epoch
//! n+1 only with the source's signature over this record, and the source may run it again only
//! with the target's signed return under n+2.

use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::types::codec::{CodecError, Reader, Writer};
use crate::types::{
    LinkId, MapId, MemberJid, MigrationId, PublicKey, RecipeId, ReservationId, Signature, Signer, VmId, hex,
};

/// A record that says nothing of how its source became the owner.
const MAGIC_1: &[u8; 8] = b"CICHOV\x00\x01";
/// A record with its [`Provenance`].
const MAGIC_2: &[u8; 8] = b"CICHOV\x00\x02";
const JID_BYTES_MAX: u64 = 3071;
/// Every move adds two at most, so no honest VM comes near it, and what follows still counts.
pub const EPOCH_MAX: u64 = 1 << 60;
/// No record that decodes is longer.
pub const RECORD_BYTES_MAX: u64 = 16 << 10;
const RECORD_DIGITS_MAX: usize = 2 * RECORD_BYTES_MAX as usize;

/// By which record the source owns the VM.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// It was made there and never left.
    Born,
    /// The last link of the VM's history (`lineage.rs`).
    After(LinkId),
}

/// What a record of version 2 is bound to besides.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Provenance {
    pub origin: Origin,
    /// The target's reservation it redeems. One that has ended never comes again, so a hand-over
    /// under it can be returned without a record of that.
    pub reservation: ReservationId,
}

/// Who gives which VM, in which exact state, to whom.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct HandOver {
    pub vm: VmId,
    pub migration: MigrationId,
    /// The epoch the target will own the VM under.
    pub epoch: u64,
    pub source: MemberJid,
    pub source_key: PublicKey,
    pub target: MemberJid,
    pub target_key: PublicKey,
    pub recipe: RecipeId,
    /// The final root delta and user data; what the target holds must match them.
    pub root_delta: MapId,
    pub user_data: MapId,
    pub issued: UnixMillis,
    /// None: version 1.
    pub provenance: Option<Provenance>,
}

impl HandOver {
    /// The canonical bytes both sides sign.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::with_magic(if self.provenance.is_some() { MAGIC_2 } else { MAGIC_1 });
        w.fixed(self.vm.0.as_bytes());
        w.fixed(self.migration.0.as_bytes());
        w.u64(self.epoch);
        w.str(self.source.as_str());
        w.fixed(self.source_key.as_bytes());
        w.str(self.target.as_str());
        w.fixed(self.target_key.as_bytes());
        for hash in [self.recipe.as_bytes(), self.root_delta.as_bytes(), self.user_data.as_bytes()] {
            w.fixed(hash);
        }
        w.u64(self.issued.0);
        if let Some(p) = &self.provenance {
            match p.origin {
                Origin::Born => w.u8(0),
                Origin::After(id) => {
                    w.u8(1);
                    w.fixed(id.as_bytes());
                }
            }
            w.fixed(p.reservation.0.as_bytes());
        }
        w.into_bytes()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let bound = bytes.starts_with(MAGIC_2);
        let magic = if bound { MAGIC_2 } else { MAGIC_1 };
        let mut r = Reader::with_magic(bytes, magic, "hand-over record of version 1 or 2")?;
        let invalid = |what| move |_| CodecError::Invalid { what, rule: "malformed".into() };
        let vm = VmId(uuid::Uuid::from_bytes(r.array("vm")?));
        let migration = MigrationId(uuid::Uuid::from_bytes(r.array("migration")?));
        let epoch = r.u64("epoch")?;
        if epoch > EPOCH_MAX {
            let rule = format!("{epoch} is more than {EPOCH_MAX}");
            return Err(CodecError::Invalid { what: "epoch", rule });
        }
        let mut party = || {
            let text = r.str("member", JID_BYTES_MAX)?;
            let jid: MemberJid = text.parse().map_err(invalid("member"))?;
            // Parsing normalises, and what is signed has one spelling.
            if jid.as_str() != text {
                return Err(CodecError::NotCanonical { what: "member" });
            }
            let key = PublicKey::from_bytes(r.array("key")?)
                .map_err(|_| CodecError::Invalid { what: "key", rule: "no ed25519 key".into() })?;
            Ok::<_, CodecError>((jid, key))
        };
        let (source, source_key) = party()?;
        let (target, target_key) = party()?;
        let out = Self {
            vm,
            migration,
            epoch,
            source,
            source_key,
            target,
            target_key,
            recipe: RecipeId::from_bytes(r.array("recipe")?),
            root_delta: MapId::from_bytes(r.array("root delta")?),
            user_data: MapId::from_bytes(r.array("user data")?),
            issued: UnixMillis(r.u64("issued")?),
            provenance: if bound { Some(Provenance::read(&mut r)?) } else { None },
        };
        r.end()?;
        Ok(out)
    }

    /// The source gives the VM up. Call it only after that was durably recorded.
    pub fn sign(self, key: &dyn Signer) -> SignedHandOver {
        let bytes = self.encode();
        let signature = key.sign(&bytes);
        SignedHandOver { record: hex::encode(&bytes), signature }
    }
}

impl Provenance {
    fn read(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        let origin = match r.u8("origin")? {
            0 => Origin::Born,
            1 => Origin::After(LinkId::from_bytes(r.array("link")?)),
            value => return Err(CodecError::Unknown { what: "origin", value: value.into() }),
        };
        let reservation = ReservationId(uuid::Uuid::from_bytes(r.array("reservation")?));
        Ok(Self { origin, reservation })
    }
}

/// A hand-over with the source's signature, as it travels and as it is kept.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct SignedHandOver {
    /// The canonical bytes, in hex.
    pub record: String,
    pub signature: Signature,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandOverError {
    #[error("hand-over record is malformed")]
    Malformed(#[source] CodecError),
    #[error("hand-over record is not hex")]
    NotHex,
    #[error("hand-over is not signed by the {0}")]
    Signature(&'static str),
    #[error("hand-over is for another {0}")]
    Mismatch(&'static str),
}

impl SignedHandOver {
    fn bytes(&self) -> Result<Vec<u8>, HandOverError> {
        let short = Some(&self.record).filter(|r| r.len() <= RECORD_DIGITS_MAX);
        short.and_then(|r| hex::decode(r)).ok_or(HandOverError::NotHex)
    }

    /// What it says; for records whose signatures were checked before.
    pub fn read(&self) -> Result<HandOver, HandOverError> {
        HandOver::decode(&self.bytes()?).map_err(HandOverError::Malformed)
    }

    /// The record, if the source it names signed it.
    pub fn verify(&self) -> Result<HandOver, HandOverError> {
        let bytes = self.bytes()?;
        let record = HandOver::decode(&bytes).map_err(HandOverError::Malformed)?;
        record.source_key.verify(&bytes, &self.signature).map_err(|_| HandOverError::Signature("source"))?;
        Ok(record)
    }

    fn countersigned_bytes(&self, context: &[u8]) -> Vec<u8> {
        [context, self.record.as_bytes(), self.signature.as_bytes()].concat()
    }

    /// The target takes the VM over. Call it only after that was durably recorded.
    pub fn accept(self, key: &dyn Signer) -> Receipt {
        let signature = key.sign(&self.countersigned_bytes(ACCEPT));
        Receipt { hand_over: self, signature }
    }

    /// The target gives the VM back and promises never to run it under this record's epoch. Call it
    /// only after that promise was durably recorded.
    pub fn give_back(self, key: &dyn Signer) -> Return {
        let signature = key.sign(&self.countersigned_bytes(RETURN));
        Return { hand_over: self, signature }
    }
}

impl SignedHandOver {
    /// The source's operator takes the VM back without the target's word. Call it only after that was
    /// durably recorded.
    pub fn take_back(self, key: &dyn Signer) -> TakenBack {
        let signature = key.sign(&self.countersigned_bytes(TAKE_BACK));
        TakenBack { hand_over: self, signature }
    }
}

const ACCEPT: &[u8] = b"cicada hand-over accepted 1\0";
const RETURN: &[u8] = b"cicada hand-over returned 1\0";
const TAKE_BACK: &[u8] = b"cicada hand-over taken back 1\0";

/// The doubly signed record: the target owns the VM.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Receipt {
    pub hand_over: SignedHandOver,
    pub signature: Signature,
}

/// The doubly signed opposite: the target never ran the VM and never will under this epoch; the
/// source owns it again under the next.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Return {
    pub hand_over: SignedHandOver,
    pub signature: Signature,
}

/// The source's word that it owns the VM again although it gave it away: an operator decided so while
/// the target was silent. It proves nothing about the target.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct TakenBack {
    pub hand_over: SignedHandOver,
    pub signature: Signature,
}

impl Receipt {
    pub fn verify(&self) -> Result<HandOver, HandOverError> {
        second_by_target(&self.hand_over, &self.signature, ACCEPT)
    }
}

impl Return {
    pub fn verify(&self) -> Result<HandOver, HandOverError> {
        second_by_target(&self.hand_over, &self.signature, RETURN)
    }
}

impl TakenBack {
    pub fn verify(&self) -> Result<HandOver, HandOverError> {
        let record = self.hand_over.verify()?;
        let bytes = self.hand_over.countersigned_bytes(TAKE_BACK);
        record.source_key.verify(&bytes, &self.signature).map_err(|_| HandOverError::Signature("source"))?;
        Ok(record)
    }
}

fn second_by_target(
    signed: &SignedHandOver,
    signature: &Signature,
    context: &[u8],
) -> Result<HandOver, HandOverError> {
    let record = signed.verify()?;
    record
        .target_key
        .verify(&signed.countersigned_bytes(context), signature)
        .map_err(|_| HandOverError::Signature("target"))?;
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::IdentityKey;

    #[test]
    fn each_signature_proves_one_thing() {
        let (a, b) = (IdentityKey::from_secret_bytes(&[1; 32]), IdentityKey::from_secret_bytes(&[2; 32]));
        let record = HandOver {
            vm: VmId::random(),
            migration: MigrationId::random(),
            epoch: 2,
            source: "a@x".parse().unwrap(),
            source_key: a.public(),
            target: "b@x".parse().unwrap(),
            target_key: b.public(),
            recipe: RecipeId::of(b"r"),
            root_delta: MapId::of(b"d"),
            user_data: MapId::of(b"u"),
            issued: UnixMillis(5),
            provenance: None,
        };
        let signed = record.clone().sign(&a);
        assert_eq!(signed.verify(), Ok(record.clone()));
        assert!(record.clone().sign(&b).verify().is_err());
        let receipt = signed.clone().accept(&b);
        assert_eq!(receipt.verify(), Ok(record.clone()));
        assert!(signed.clone().accept(&a).verify().is_err());
        // A receipt is no return and the other way round.
        let back = Return { hand_over: receipt.hand_over.clone(), signature: receipt.signature };
        assert!(back.verify().is_err());
        assert_eq!(signed.clone().give_back(&b).verify(), Ok(record.clone()));

        // The same bytes in another spelling would be another text to countersign.
        let spelt = SignedHandOver { record: signed.record.replacen("00", "+0", 1), ..signed.clone() };
        assert_eq!(spelt.verify(), Err(HandOverError::NotHex));
        let spelt = SignedHandOver { record: signed.record.to_uppercase(), ..signed };
        assert_eq!(spelt.verify(), Err(HandOverError::NotHex));
        let mut bytes = record.encode();
        let at = bytes.windows(3).position(|w| w == b"a@x").unwrap();
        bytes[at] = b'A';
        assert_eq!(HandOver::decode(&bytes), Err(CodecError::NotCanonical { what: "member" }));
    }
}
