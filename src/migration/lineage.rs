//! The history of a VM's ownership: a chain of signed records, each of which names the one before it.
//! Whoever owns the VM shows it to whom it hands the VM over; whoever knows any link of it believes
//! only a chain that goes on from there. Epochs follow from the chain and are never free, but in
//! records of version 1, which name no record before them.

use std::collections::HashMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rayon::prelude::*;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::types::codec::{CodecError, Reader, Writer};
use crate::types::{LinkId, MemberJid, MigrationId, PublicKey, Signature, Successions, VmId, hex};

use super::handover::{
    EPOCH_MAX, HandOver, HandOverError, Origin, RECORD_BYTES_MAX, Receipt, Return, SignedHandOver, TakenBack,
};

const MAGIC: &[u8; 8] = b"CICLIN\x00\x01";
/// Separates link ids from every other use of BLAKE3. Changing it is a format break.
const ID_CONTEXT: &[u8] = b"cicada ownership link 1\0";
/// The longest chain that is read. At ten moves a day it lasts for almost three years.
pub const LINKS_MAX: usize = 10_000;
/// Links of one message: under the limit of a sealed envelope even where all names are long.
pub const PAGE_LINKS_MAX: usize = 64;
/// Encoded bytes of one message's links.
pub const PAGE_BYTES_MAX: usize = 64 << 10;
/// The epoch under which a VM is owned where it was made.
pub const EPOCH_BORN: u64 = 1;

/// What the second signature of a link says.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkKind {
    /// The target: it owns the VM.
    Receipt,
    /// The target: it never took the VM over and never will by this hand-over.
    Return,
    /// The source: its operator took the VM back without the target's word.
    TakenBack,
}

/// One signed step of a VM's history.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Link {
    pub kind: LinkKind,
    pub hand_over: SignedHandOver,
    /// The target's; the source's if the VM was taken back.
    pub signature: Signature,
}

impl From<Receipt> for Link {
    fn from(r: Receipt) -> Self {
        Self { kind: LinkKind::Receipt, hand_over: r.hand_over, signature: r.signature }
    }
}

impl From<Return> for Link {
    fn from(r: Return) -> Self {
        Self { kind: LinkKind::Return, hand_over: r.hand_over, signature: r.signature }
    }
}

impl From<TakenBack> for Link {
    fn from(r: TakenBack) -> Self {
        Self { kind: LinkKind::TakenBack, hand_over: r.hand_over, signature: r.signature }
    }
}

impl Link {
    /// The hand-over, if both signatures are what they claim.
    pub fn verify(&self) -> Result<HandOver, HandOverError> {
        let (hand_over, signature) = (self.hand_over.clone(), self.signature);
        match self.kind {
            LinkKind::Receipt => Receipt { hand_over, signature }.verify(),
            LinkKind::Return => Return { hand_over, signature }.verify(),
            LinkKind::TakenBack => TakenBack { hand_over, signature }.verify(),
        }
    }

    /// Names what was done by what, whatever the signatures' bytes: signing the same again changes
    /// nothing.
    pub fn id(&self) -> LinkId {
        let bytes = [ID_CONTEXT, &[self.kind as u8], self.hand_over.record.as_bytes()].concat();
        LinkId::of(&bytes)
    }

    /// The receipt, if it is one.
    pub fn receipt(&self) -> Option<Receipt> {
        (self.kind == LinkKind::Receipt)
            .then(|| Receipt { hand_over: self.hand_over.clone(), signature: self.signature })
    }

    fn encode(&self, w: &mut Writer) {
        w.u8(self.kind as u8);
        w.bytes(&hex::decode(&self.hand_over.record).unwrap_or_default());
        w.fixed(self.hand_over.signature.as_bytes());
        w.fixed(self.signature.as_bytes());
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        let kind = match r.u8("kind of link")? {
            0 => LinkKind::Receipt,
            1 => LinkKind::Return,
            2 => LinkKind::TakenBack,
            value => return Err(CodecError::Unknown { what: "kind of link", value: value.into() }),
        };
        let record = hex::encode(r.bytes("hand-over record", RECORD_BYTES_MAX)?);
        let source = Signature::from_bytes(r.array("source's signature")?);
        let signature = Signature::from_bytes(r.array("second signature")?);
        Ok(Self { kind, hand_over: SignedHandOver { record, signature: source }, signature })
    }
}

/// Links as they travel and as records hold them: base64 of their canonical bytes.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Links(pub Vec<Link>);

impl Serialize for Links {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut w = Writer::new();
        self.0.iter().for_each(|link| link.encode(&mut w));
        s.serialize_str(&BASE64.encode(w.into_bytes()))
    }
}

impl<'de> Deserialize<'de> for Links {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let text = String::deserialize(d)?;
        if text.len() > PAGE_BYTES_MAX / 3 * 4 + 4 {
            return Err(D::Error::custom("more links than one message may carry"));
        }
        let bytes = BASE64.decode(&text).map_err(D::Error::custom)?;
        let (mut r, mut out) = (Reader::new(&bytes), Vec::new());
        while r.remaining_bytes() > 0 {
            if out.len() == PAGE_LINKS_MAX {
                return Err(D::Error::custom("more links than one message may carry"));
            }
            out.push(Link::decode(&mut r).map_err(D::Error::custom)?);
        }
        Ok(Self(out))
    }
}

/// Where a history stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tip {
    pub id: LinkId,
    /// Who owns the VM by it, and under which epoch.
    pub owner: MemberJid,
    pub owner_key: PublicKey,
    pub epoch: u64,
}

/// Why records are no history.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LineageError {
    #[error("link {at} of its history is not signed as it should be")]
    Link {
        at: usize,
        #[source]
        source: HandOverError,
    },
    #[error("link {at} of its history is of another VM")]
    OtherVm { at: usize },
    #[error("link {at} of its history names another link before it")]
    Origin { at: usize },
    #[error("link {at} of its history is signed by {jid}, who did not own the VM then")]
    NotOwner { at: usize, jid: MemberJid },
    #[error("link {at} of its history is for epoch {epoch}, and {expected} comes next")]
    Epoch { at: usize, epoch: u64, expected: u64 },
    #[error("its history has more than {LINKS_MAX} links")]
    TooLong,
    #[error("its history is malformed")]
    Malformed(#[source] CodecError),
    /// What was told of it before, where that was recorded: the words of the whole chain.
    #[error("{0}")]
    Told(String),
}

/// As the words of the whole chain.
impl Serialize for LineageError {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let causes = std::iter::successors(Some(self as &dyn std::error::Error), |e| e.source());
        s.serialize_str(&causes.map(ToString::to_string).collect::<Vec<_>>().join(": "))
    }
}

impl<'de> Deserialize<'de> for LineageError {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d).map(Self::Told)
    }
}

/// A verified history of one VM: every link is signed, and goes on from the one before it. Empty if
/// nothing is known, or the VM never left where it was made.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(into = "Parts", try_from = "Parts")]
pub struct Lineage {
    vm: VmId,
    links: Vec<Link>,
    ids: HashMap<LinkId, usize>,
    tip: Option<Tip>,
    /// How keys that signed it gave way to later ones.
    successions: Successions,
}

/// What tells a history whole.
#[derive(Serialize, Deserialize)]
struct Parts {
    vm: VmId,
    /// One each: how many may stand together is bounded.
    links: Vec<Links>,
    successions: Successions,
}

impl From<Lineage> for Parts {
    fn from(l: Lineage) -> Self {
        Self {
            vm: l.vm,
            links: l.links.into_iter().map(|link| Links(vec![link])).collect(),
            successions: l.successions,
        }
    }
}

/// Verified anew: nothing else makes one.
impl TryFrom<Parts> for Lineage {
    type Error = LineageError;
    fn try_from(parts: Parts) -> Result<Self, LineageError> {
        Self::empty(parts.vm)
            .with(&parts.successions)
            .continued(parts.links.into_iter().flat_map(|l| l.0).collect())
    }
}

/// Its links tell all the rest.
impl std::hash::Hash for Lineage {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.vm.hash(state);
        self.links.len().hash(state);
        self.tip.as_ref().map(|tip| tip.id).hash(state);
    }
}

impl Lineage {
    pub fn empty(vm: VmId) -> Self {
        Self { vm, links: Vec::new(), ids: HashMap::new(), tip: None, successions: Successions::default() }
    }

    /// Checks every signature and every step.
    pub fn verify(vm: VmId, links: Vec<Link>) -> Result<Self, LineageError> {
        Self::empty(vm).continued(links)
    }

    /// This history gone on by `links`, each verified.
    pub fn continued(&self, links: Vec<Link>) -> Result<Self, LineageError> {
        if self.links.len() + links.len() > LINKS_MAX {
            return Err(LineageError::TooLong);
        }
        let records: Vec<_> = links.par_iter().map(Link::verify).collect();
        let mut out = self.clone();
        for (link, record) in links.into_iter().zip(records) {
            let at = out.links.len();
            out.append(link, &record.map_err(|source| LineageError::Link { at, source })?)?;
        }
        Ok(out)
    }

    /// Goes on by one link.
    pub fn push(&mut self, link: Link) -> Result<(), LineageError> {
        let at = self.links.len();
        let record = link.verify().map_err(|source| LineageError::Link { at, source })?;
        self.append(link, &record)
    }

    /// As [`Lineage::push`], for a link of our own records, whose signatures were checked before it was
    /// written.
    pub fn push_kept(&mut self, link: Link) -> Result<(), LineageError> {
        let at = self.links.len();
        let record = link.hand_over.read().map_err(|source| LineageError::Link { at, source })?;
        self.append(link, &record)
    }

    fn append(&mut self, link: Link, h: &HandOver) -> Result<(), LineageError> {
        let at = self.links.len();
        if at == LINKS_MAX {
            return Err(LineageError::TooLong);
        }
        self.goes_on_with(h)?;
        let (owner, owner_key, epoch) = match link.kind {
            LinkKind::Receipt => (h.target.clone(), h.target_key, h.epoch),
            LinkKind::Return | LinkKind::TakenBack => (h.source.clone(), h.source_key, h.epoch + 1),
        };
        let id = link.id();
        self.tip = Some(Tip { id, owner, owner_key, epoch });
        self.ids.insert(id, at);
        self.links.push(link);
        Ok(())
    }

    /// Whether `h` hands over what this history says its source owns.
    pub fn goes_on_with(&self, h: &HandOver) -> Result<(), LineageError> {
        let at = self.links.len();
        if h.vm != self.vm {
            return Err(LineageError::OtherVm { at });
        }
        if let Some(tip) = &self.tip
            && !self.successions.leads(&tip.owner_key, &h.source_key)
        {
            return Err(LineageError::NotOwner { at, jid: h.source.clone() });
        }
        let origin = match &h.provenance {
            // Version 1 binds to the owner's key and to the order alone.
            None => {
                let expected = self.tip.as_ref().map_or(EPOCH_BORN, |tip| tip.epoch) + 1;
                return match h.epoch >= expected && h.epoch <= EPOCH_MAX {
                    true => Ok(()),
                    false => Err(LineageError::Epoch { at, epoch: h.epoch, expected }),
                };
            }
            Some(p) => p.origin,
        };
        if origin != self.origin() {
            return Err(LineageError::Origin { at });
        }
        let expected = self.next_epoch();
        match h.epoch == expected {
            true => Ok(()),
            false => Err(LineageError::Epoch { at, epoch: h.epoch, expected }),
        }
    }

    /// Puts the later word on the last hand-over in the place of an earlier one: what was taken back
    /// without the target's word, or taken over, was returned after all.
    pub fn amend(&mut self, link: Link) -> Result<(), LineageError> {
        let mut links = self.links.clone();
        if links.last().is_some_and(|last| last.hand_over.record == link.hand_over.record) {
            links.pop();
        }
        let mut amended = Self::empty(self.vm).with(&self.successions).continued(links)?;
        amended.push(link)?;
        *self = amended;
        Ok(())
    }

    pub fn vm(&self) -> VmId {
        self.vm
    }
    pub fn links(&self) -> &[Link] {
        &self.links
    }
    pub fn tip(&self) -> Option<&Tip> {
        self.tip.as_ref()
    }
    pub fn is_empty(&self) -> bool {
        self.links.is_empty()
    }
    /// What the next hand-over names as the record by which its giver owns the VM.
    pub fn origin(&self) -> Origin {
        self.tip.as_ref().map_or(Origin::Born, |tip| Origin::After(tip.id))
    }
    /// The epoch of the next hand-over.
    pub fn next_epoch(&self) -> u64 {
        self.tip.as_ref().map_or(EPOCH_BORN, |tip| tip.epoch) + 1
    }
    /// Where in it a link stands, from 0.
    pub fn position(&self, id: &LinkId) -> Option<usize> {
        self.ids.get(id).copied()
    }
    /// The links after `id`; all of them if it is not one.
    pub fn since(&self, id: Option<&LinkId>) -> &[Link] {
        let from = id.and_then(|id| self.position(id)).map_or(0, |at| at + 1);
        &self.links[from..]
    }
    /// Whether the whole way from where the VM was made is there.
    pub fn is_from_birth(&self) -> bool {
        self.links.first().is_none_or(|first| {
            first.hand_over.read().is_ok_and(|h| h.provenance.is_some_and(|p| p.origin == Origin::Born))
        })
    }
    pub fn successions(&self) -> &Successions {
        &self.successions
    }
    /// Whether the owner's key is `key`, or gave way to it.
    pub fn is_owned_by(&self, key: &PublicKey) -> bool {
        self.tip.as_ref().is_some_and(|tip| self.successions.leads(&tip.owner_key, key))
    }
    /// With what else is known of the keys in it. Of two successors of a key the first known counts.
    pub fn with(mut self, successions: &Successions) -> Self {
        for succession in successions.iter() {
            let _ = self.successions.add(succession.clone());
        }
        self
    }
    /// The migration whose hand-over made the last link.
    pub fn last_migration(&self) -> Option<MigrationId> {
        self.links.last()?.hand_over.read().ok().map(|h| h.migration)
    }

    /// This history, gone on with `offered`: what another cloud shows of the same VM. `None` if that
    /// does not go on from here.
    pub fn extended_by(&self, offered: &Self) -> Option<Self> {
        let Some(tip) = &self.tip else { return Some(offered.clone()) };
        let more = match offered.position(&tip.id) {
            Some(at) => &offered.links[at + 1..],
            None if offered.is_empty() => return None,
            // Clouds of the version before keep no history: theirs begins with a receipt that leads
            // from the owner known here.
            None => &offered.links[..],
        };
        let mut out = self.clone().with(&offered.successions);
        for link in more {
            let record = link.hand_over.read().ok()?;
            out.append(link.clone(), &record).ok()?;
        }
        Some(out)
    }

    /// The canonical bytes of the file a broker keeps.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::with_magic(MAGIC);
        w.fixed(self.vm.0.as_bytes());
        w.varint(self.links.len() as u64);
        self.links.iter().for_each(|link| link.encode(&mut w));
        self.successions.encode(&mut w);
        w.into_bytes()
    }

    /// Reads such a file of our own: its links were verified before they were written, so only that each
    /// goes on from the one before it is checked again.
    pub fn reopen(vm: VmId, bytes: &[u8]) -> Result<Self, LineageError> {
        let (of, links, successions) = Self::read(bytes).map_err(LineageError::Malformed)?;
        if of != vm {
            return Err(LineageError::OtherVm { at: 0 });
        }
        let mut out = Self::empty(vm).with(&successions);
        for (at, link) in links.into_iter().enumerate() {
            let record = link.hand_over.read().map_err(|source| LineageError::Link { at, source })?;
            out.append(link, &record)?;
        }
        Ok(out)
    }

    fn read(bytes: &[u8]) -> Result<(VmId, Vec<Link>, Successions), CodecError> {
        let mut r = Reader::with_magic(bytes, MAGIC, "history of ownership of version 1")?;
        let vm = VmId(uuid::Uuid::from_bytes(r.array("vm")?));
        let count = r.bounded("links", LINKS_MAX as u64)?;
        let mut links = Vec::new();
        for _ in 0..count {
            links.push(Link::decode(&mut r)?);
        }
        let successions = Successions::decode(&mut r)?;
        r.end()?;
        Ok((vm, links, successions))
    }
}
