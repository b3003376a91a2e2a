//! The doubly signed record as a file: what `cicada migration receipt` writes and anybody with the
//! two public keys can check. Its format is specified in `PROTOCOL.md`.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::types::{Signature, Successions};

use super::handover::{HandOver, HandOverError, Origin, Receipt, Return, SignedHandOver};
use super::lineage::{Lineage, LineageError, Link, LinkKind, Links, PAGE_LINKS_MAX};

/// The file's `format`.
pub const FORMAT: &str = "cicada-receipt";
/// The version this code writes and reads.
pub const VERSION: u32 = 1;
/// No file that is longer is read.
pub const FILE_BYTES_MAX: usize = 8 << 20;

/// What the target's signature says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// It owns the VM.
    Receipt,
    /// It never ran it under this epoch and never will.
    Return,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Receipt => "receipt",
            Kind::Return => "return",
        })
    }
}

/// A hand-over with both signatures.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Evidence {
    pub format: String,
    pub version: u32,
    pub kind: Kind,
    /// The hand-over's canonical bytes, in hex.
    pub record: String,
    pub source_signature: Signature,
    pub target_signature: Signature,
    /// The links of the VM's history before this one, oldest first, in parts; none if they are not known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<Links>,
    /// How keys in the history gave way to others.
    #[serde(default, skip_serializing_if = "Successions::is_empty")]
    pub successions: Successions,
    /// What the cloud that wrote the file adds, signed by nobody: an operator's override, for example.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remarks: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum EvidenceError {
    #[error("longer than {FILE_BYTES_MAX} bytes")]
    TooLarge,
    #[error("not the JSON of a receipt")]
    Malformed(#[source] serde_json::Error),
    #[error("its format is not '{FORMAT}'")]
    Format,
    #[error("version {0} of the format is not read here, only {VERSION}")]
    Version(u64),
}

impl Evidence {
    fn new(kind: Kind, signed: SignedHandOver, target_signature: Signature) -> Self {
        Self {
            format: FORMAT.into(),
            version: VERSION,
            kind,
            record: signed.record,
            source_signature: signed.signature,
            target_signature,
            history: Vec::new(),
            successions: Successions::default(),
            remarks: Vec::new(),
        }
    }

    /// Reads a file; says nothing about its signatures.
    pub fn parse(bytes: &[u8]) -> Result<Self, EvidenceError> {
        if bytes.len() > FILE_BYTES_MAX {
            return Err(EvidenceError::TooLarge);
        }
        let value: serde_json::Value = serde_json::from_slice(bytes).map_err(EvidenceError::Malformed)?;
        if value.get("format").and_then(|f| f.as_str()) != Some(FORMAT) {
            return Err(EvidenceError::Format);
        }
        // A later version may change everything else.
        match value.get("version").and_then(serde_json::Value::as_u64) {
            Some(version) if version != u64::from(VERSION) => return Err(EvidenceError::Version(version)),
            _ => {}
        }
        serde_json::from_value(value).map_err(EvidenceError::Malformed)
    }

    /// The hand-over, if both parties it names signed it, the target as this kind.
    pub fn verify(&self) -> Result<HandOver, HandOverError> {
        let hand_over = SignedHandOver { record: self.record.clone(), signature: self.source_signature };
        match self.kind {
            Kind::Receipt => Receipt { hand_over, signature: self.target_signature }.verify(),
            Kind::Return => Return { hand_over, signature: self.target_signature }.verify(),
        }
    }
}

impl Evidence {
    /// The record as a link of the VM's history.
    pub fn link(&self) -> Link {
        let hand_over = SignedHandOver { record: self.record.clone(), signature: self.source_signature };
        let kind = match self.kind {
            Kind::Receipt => LinkKind::Receipt,
            Kind::Return => LinkKind::Return,
        };
        Link { kind, hand_over, signature: self.target_signature }
    }

    /// Puts what `lineage` knows before this record into the file.
    pub fn with_history(mut self, lineage: &Lineage) -> Self {
        if let Some(at) = lineage.position(&self.link().id()) {
            self.history =
                lineage.links()[..at].chunks(PAGE_LINKS_MAX).map(|part| Links(part.to_vec())).collect();
            self.successions = lineage.successions().clone();
        }
        self
    }

    /// The whole history up to this record, verified link by link; `None` if the record says that something
    /// came before it, and the file does not.
    pub fn verify_history(&self) -> Result<Option<Lineage>, LineageError> {
        let h = self.link().hand_over.read().map_err(|source| LineageError::Link { at: 0, source })?;
        let goes_on = h.provenance.is_some_and(|p| p.origin != Origin::Born);
        if self.history.is_empty() && goes_on {
            return Ok(None);
        }
        let links = self.history.iter().flat_map(|part| part.0.iter().cloned()).chain([self.link()]);
        Lineage::empty(h.vm).with(&self.successions).continued(links.collect()).map(Some)
    }
}

impl From<Receipt> for Evidence {
    fn from(receipt: Receipt) -> Self {
        Self::new(Kind::Receipt, receipt.hand_over, receipt.signature)
    }
}

impl From<Return> for Evidence {
    fn from(back: Return) -> Self {
        Self::new(Kind::Return, back.hand_over, back.signature)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::UnixMillis;
    use crate::types::{IdentityKey, MapId, MigrationId, RecipeId, VmId};

    fn evidence() -> Evidence {
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
        record.sign(&a).accept(&b).into()
    }

    #[test]
    fn a_file_is_read_back_and_a_touched_one_does_not_verify() {
        let good = evidence();
        let json = serde_json::to_vec(&good).unwrap();
        assert_eq!(Evidence::parse(&json).unwrap(), good);
        assert_eq!(good.verify().unwrap().epoch, 2);
        assert!(Evidence { kind: Kind::Return, ..good.clone() }.verify().is_err(), "a receipt is no return");
        let swapped = Evidence {
            source_signature: good.target_signature,
            target_signature: good.source_signature,
            ..good.clone()
        };
        assert!(swapped.verify().is_err());
        for i in 0..good.record.len() {
            let mut record = good.record.clone().into_bytes();
            record[i] = if record[i] == b'0' { b'1' } else { b'0' };
            let record = String::from_utf8(record).unwrap();
            assert!(Evidence { record, ..good.clone() }.verify().is_err(), "{i}");
        }
        // What nobody signed may change.
        let remarked = Evidence { remarks: vec!["hello".into()], ..good };
        remarked.verify().unwrap();
    }

    /// A move on from the record, by `record`'s target to itself.
    #[test]
    fn a_file_shows_the_whole_way_or_says_that_it_does_not() {
        use crate::migration::handover::Provenance;
        use crate::types::ReservationId;
        let (a, b) = (IdentityKey::from_secret_bytes(&[1; 32]), IdentityKey::from_secret_bytes(&[2; 32]));
        let first = evidence();
        let h = first.verify().unwrap();
        let mut lineage = Lineage::empty(h.vm);
        lineage.push(first.link()).unwrap();
        let provenance = Some(Provenance { origin: lineage.origin(), reservation: ReservationId::random() });
        let second = HandOver {
            migration: MigrationId::random(),
            epoch: 3,
            source: h.target.clone(),
            source_key: h.target_key,
            target: h.source.clone(),
            target_key: h.source_key,
            provenance,
            ..h
        };
        let receipt = second.sign(&b).accept(&a);
        lineage.push(receipt.clone().into()).unwrap();
        let alone = Evidence::from(receipt.clone());
        assert_eq!(alone.verify_history(), Ok(None));
        let whole = Evidence::from(receipt).with_history(&lineage);
        let read = Evidence::parse(&serde_json::to_vec(&whole).unwrap()).unwrap();
        assert_eq!(read.verify_history(), Ok(Some(lineage)));
        let mut forged = read;
        forged.history[0].0[0].signature = forged.source_signature;
        assert!(forged.verify_history().is_err());
    }

    #[test]
    fn what_is_no_record_is_told_from_what_does_not_match() {
        let good = serde_json::to_value(evidence()).unwrap();
        let with = |field: &str, value: serde_json::Value| {
            let mut changed = good.clone();
            changed[field] = value;
            Evidence::parse(&serde_json::to_vec(&changed).unwrap())
        };
        assert!(matches!(with("format", "receipt".into()), Err(EvidenceError::Format)));
        assert!(matches!(with("version", 2.into()), Err(EvidenceError::Version(2))));
        assert!(matches!(with("kind", "gift".into()), Err(EvidenceError::Malformed(_))));
        assert!(matches!(with("source_signature", "AAAA".into()), Err(EvidenceError::Malformed(_))));
        assert!(with("something_new", 5.into()).is_ok(), "unknown fields are ignored");
        assert!(matches!(Evidence::parse(b"{}"), Err(EvidenceError::Format)));
        assert!(matches!(Evidence::parse(b""), Err(EvidenceError::Malformed(_))));
        assert!(matches!(Evidence::parse(&vec![b' '; FILE_BYTES_MAX + 1]), Err(EvidenceError::TooLarge)));
    }
}
