//! The signed envelope every negotiation message travels in. XMPP servers stamp addresses but do
//! not authenticate payloads, so each message is bound to its sender, recipient, VM and epoch by
//! the sender's identity key and refused when stale or seen before.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::types::{MemberJid, MigrationId, PublicKey, Signature, Signer, VmId};

/// The newest protocol version this code speaks: hand-overs say how their giver became the owner, and
/// the VM's history travels with them.
pub const VERSION: u32 = 2;
/// The version before: no history.
pub const VERSION_BEFORE: u32 = 1;
/// All versions this code speaks, newest first; presence tells them to the others.
pub const VERSIONS: [u32; 2] = [VERSION, VERSION_BEFORE];

/// The newest version both sides speak, from the list in the other's presence.
pub fn common_version(theirs: &str) -> Option<u32> {
    let theirs: Vec<u32> = theirs.split(',').filter_map(|v| v.trim().parse().ok()).collect();
    VERSIONS.into_iter().find(|v| theirs.contains(v))
}

/// The largest sealed message.
pub const SEALED_BYTES_MAX: usize = 128 << 10;
/// How long a message is valid after it was signed.
pub const LIFETIME: Duration = Duration::from_secs(120);
/// How far two clouds' clocks may differ.
pub const SKEW: Duration = Duration::from_secs(120);
/// Digits of a nonce, hexadecimal.
const NONCE_DIGITS: usize = 32;
/// Nonces of one member remembered at once; beyond that its new messages are refused rather than old
/// ones forgotten.
const NONCES_MAX: usize = 100_000;
/// Separates these signatures from every other use of the key.
const CONTEXT: &[u8] = b"cicada negotiation 1\0";

/// A message with all it is bound to.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Envelope<T> {
    pub version: u32,
    pub from: MemberJid,
    pub to: MemberJid,
    pub migration: MigrationId,
    pub vm: VmId,
    /// The VM's epoch as the sender knows it.
    pub epoch: u64,
    /// Random, 32 hex digits.
    pub nonce: String,
    pub issued: UnixMillis,
    pub expires: UnixMillis,
    pub body: T,
}

#[derive(Debug, thiserror::Error)]
pub enum EnvelopeError {
    #[error("message of {0} bytes exceeds the limit of {SEALED_BYTES_MAX}")]
    TooLarge(usize),
    #[error("message is too short to carry a signature")]
    TooShort,
    #[error("signature does not match the sender's identity key")]
    Signature,
    #[error("malformed message")]
    Malformed(#[source] serde_json::Error),
    #[error("protocol version {0} is not spoken here, only {VERSION} and {VERSION_BEFORE}")]
    Version(u32),
    #[error("message is addressed to {0}")]
    WrongRecipient(MemberJid),
    #[error("message names {claimed} as sender but came from {actual}")]
    WrongSender { claimed: MemberJid, actual: MemberJid },
    #[error(
        "signed at {issued} by the sender's clock and read at {now} by this one: it is too old, or the two clocks differ \
         by more than {} s", SKEW.as_secs()
    )]
    Expired { issued: UnixMillis, now: UnixMillis },
    #[error("the lifetime or the nonce is not as the protocol says")]
    Unbounded,
    #[error("message was seen before")]
    Replay,
    #[error("too many messages at once")]
    Flood,
}

impl<T: Serialize> Envelope<T> {
    /// 64 bytes of signature, then the JSON the signature covers.
    pub fn seal(&self, key: &dyn Signer) -> Result<Vec<u8>, EnvelopeError> {
        let json = serde_json::to_vec(self).map_err(EnvelopeError::Malformed)?;
        let signature = key.sign(&[CONTEXT, &json].concat());
        let sealed = [signature.as_bytes().as_slice(), &json].concat();
        if sealed.len() > SEALED_BYTES_MAX {
            return Err(EnvelopeError::TooLarge(sealed.len()));
        }
        Ok(sealed)
    }
}

impl<T: DeserializeOwned> Envelope<T> {
    /// Checks everything but replay: signature first, before a byte of JSON is read.
    pub fn open(
        sealed: &[u8],
        key: &PublicKey,
        sender: &MemberJid,
        recipient: &MemberJid,
        now: UnixMillis,
    ) -> Result<Self, EnvelopeError> {
        Self::open_spoken(&VERSIONS, sealed, key, sender, recipient, now)
    }

    /// As [`Envelope::open`] whatever the version, for a body that is not looked at: every version
    /// keeps the fields around the body, so that who speaks another can be told.
    pub fn open_foreign(
        sealed: &[u8],
        key: &PublicKey,
        sender: &MemberJid,
        recipient: &MemberJid,
        now: UnixMillis,
    ) -> Result<Envelope<IgnoredAny>, EnvelopeError> {
        Envelope::open_spoken(&[], sealed, key, sender, recipient, now)
    }

    /// No versions means any.
    fn open_spoken(
        spoken: &[u32],
        sealed: &[u8],
        key: &PublicKey,
        sender: &MemberJid,
        recipient: &MemberJid,
        now: UnixMillis,
    ) -> Result<Self, EnvelopeError> {
        if sealed.len() > SEALED_BYTES_MAX {
            return Err(EnvelopeError::TooLarge(sealed.len()));
        }
        let (signature, json) = sealed.split_first_chunk::<64>().ok_or(EnvelopeError::TooShort)?;
        key.verify(&[CONTEXT, json].concat(), &Signature::from_bytes(*signature))
            .map_err(|_| EnvelopeError::Signature)?;
        // The version is read alone first: a later version may change everything else.
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let version = serde_json::from_slice::<Version>(json).map_err(EnvelopeError::Malformed)?.version;
        if !spoken.is_empty() && !spoken.contains(&version) {
            return Err(EnvelopeError::Version(version));
        }
        let e: Self = serde_json::from_slice(json).map_err(EnvelopeError::Malformed)?;
        if e.from != *sender {
            return Err(EnvelopeError::WrongSender { claimed: e.from, actual: sender.clone() });
        }
        if e.to != *recipient {
            return Err(EnvelopeError::WrongRecipient(e.to));
        }
        if e.expires > e.issued.plus(LIFETIME) || e.nonce.len() != NONCE_DIGITS {
            return Err(EnvelopeError::Unbounded);
        }
        if e.is_fresh(now) { Ok(e) } else { Err(EnvelopeError::Expired { issued: e.issued, now }) }
    }

    /// As [`Envelope::open_foreign`], however long ago, or in what future, it was signed: so that who means it
    /// well can be told of the clocks.
    pub fn open_stale(
        sealed: &[u8],
        key: &PublicKey,
        sender: &MemberJid,
        recipient: &MemberJid,
        now: UnixMillis,
    ) -> Result<Envelope<IgnoredAny>, EnvelopeError> {
        match Self::open_foreign(sealed, key, sender, recipient, now) {
            // By the sender's own clock it is fresh, which is all that can be known of it.
            Err(EnvelopeError::Expired { issued, .. }) => {
                Self::open_foreign(sealed, key, sender, recipient, issued)
            }
            other => other,
        }
    }
}

impl<T> Envelope<T> {
    /// Neither expired nor from the future, by more than clocks may differ.
    pub fn is_fresh(&self, now: UnixMillis) -> bool {
        self.issued <= now.plus(SKEW) && now <= self.expires.plus(SKEW)
    }
}

/// Remembers nonces for as long as their messages could be accepted.
#[derive(Clone, Debug, Default)]
pub struct ReplayGuard {
    /// Of whom nonces are remembered.
    senders: BTreeMap<MemberJid, Sender>,
    numbered: u64,
    /// By the sender's number. One table for all: in a large room most of whom little is heard.
    seen: HashMap<(u64, [u8; NONCE_DIGITS]), UnixMillis>,
    swept: UnixMillis,
}

#[derive(Clone, Copy, Debug)]
struct Sender {
    number: u64,
    /// How many of its nonces are remembered: one that floods keeps nobody else out.
    nonces: usize,
}

impl ReplayGuard {
    /// Admits a message once.
    pub fn admit<T>(&mut self, e: &Envelope<T>, now: UnixMillis) -> Result<(), EnvelopeError> {
        if now.since(self.swept) > Duration::from_secs(10) {
            self.sweep(now);
        }
        let nonce = e.nonce.as_bytes().try_into().map_err(|_| EnvelopeError::Unbounded)?;
        let sender = match self.senders.get_mut(&e.from) {
            Some(sender) => sender,
            None => {
                self.numbered += 1;
                let sender = Sender { number: self.numbered, nonces: 0 };
                self.senders.entry(e.from.clone()).or_insert(sender)
            }
        };
        if sender.nonces >= NONCES_MAX {
            return Err(EnvelopeError::Flood);
        }
        match self.seen.insert((sender.number, nonce), e.expires) {
            None => {
                sender.nonces += 1;
                Ok(())
            }
            Some(_) => Err(EnvelopeError::Replay),
        }
    }

    fn sweep(&mut self, now: UnixMillis) {
        self.swept = now;
        self.seen.retain(|_, expires| now <= expires.plus(SKEW));
        let mut left: HashMap<u64, usize> = HashMap::new();
        self.seen.keys().for_each(|(number, _)| *left.entry(*number).or_default() += 1);
        self.senders.retain(|_, sender| {
            sender.nonces = left.get(&sender.number).copied().unwrap_or(0);
            sender.nonces > 0
        });
        if self.seen.capacity() > 4 * self.seen.len() {
            self.seen.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::IdentityKey;

    fn envelope(now: UnixMillis) -> Envelope<String> {
        Envelope {
            version: VERSION,
            from: "a@x".parse().unwrap(),
            to: "b@x".parse().unwrap(),
            migration: MigrationId::random(),
            vm: VmId::random(),
            epoch: 1,
            nonce: "0".repeat(32),
            issued: now,
            expires: now.plus(LIFETIME),
            body: "hello".into(),
        }
    }

    #[test]
    fn the_newest_common_version_is_found() {
        assert_eq!(common_version("1"), Some(1));
        assert_eq!(common_version("3, 2,1"), Some(2));
        for none in ["", "3", "4,3", "11", "one"] {
            assert_eq!(common_version(none), None, "{none}");
        }
    }

    #[test]
    fn only_the_right_message_opens() {
        let now = UnixMillis(1_000_000_000);
        let (key, other) =
            (IdentityKey::from_secret_bytes(&[1; 32]), IdentityKey::from_secret_bytes(&[2; 32]));
        let (a, b): (MemberJid, MemberJid) = ("a@x".parse().unwrap(), "b@x".parse().unwrap());
        let e = envelope(now);
        let sealed = e.seal(&key).unwrap();
        let open = |s: &[u8], k: &IdentityKey, from: &MemberJid, to: &MemberJid, t| {
            Envelope::<String>::open(s, &k.public(), from, to, t)
        };
        assert_eq!(open(&sealed, &key, &a, &b, now).unwrap(), e);
        assert!(matches!(open(&sealed, &other, &a, &b, now), Err(EnvelopeError::Signature)));
        assert!(matches!(open(&sealed, &key, &b, &b, now), Err(EnvelopeError::WrongSender { .. })));
        assert!(matches!(open(&sealed, &key, &a, &a, now), Err(EnvelopeError::WrongRecipient(_))));
        let late = now.plus(LIFETIME + SKEW * 2);
        assert!(matches!(open(&sealed, &key, &a, &b, late), Err(EnvelopeError::Expired { .. })));
        assert!(matches!(open(&sealed, &key, &a, &b, UnixMillis(0)), Err(EnvelopeError::Expired { .. })));
        for i in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[i] ^= 1;
            assert!(open(&bad, &key, &a, &b, now).is_err(), "{i}");
        }
        let old = Envelope { version: 7, ..e.clone() }.seal(&key).unwrap();
        assert!(matches!(open(&old, &key, &a, &b, now), Err(EnvelopeError::Version(7))));
        // Who speaks another version is understood well enough to be told so, and no forger is.
        let foreign = |s: &[u8], k: &IdentityKey| {
            Envelope::<String>::open_foreign(s, &k.public(), &a, &b, now).map(|e| (e.version, e.nonce))
        };
        assert_eq!(foreign(&old, &key).unwrap(), (7, e.nonce.clone()));
        assert!(matches!(foreign(&old, &other), Err(EnvelopeError::Signature)));
        let mut guard = ReplayGuard::default();
        guard.admit(&e, now).unwrap();
        assert!(matches!(guard.admit(&e, now), Err(EnvelopeError::Replay)));

        // One that floods is refused, and nobody else.
        for n in 1..NONCES_MAX {
            guard.admit(&Envelope { nonce: format!("{n:032x}"), ..e.clone() }, now).unwrap();
        }
        let more = Envelope { nonce: "f".repeat(32), ..e.clone() };
        assert!(matches!(guard.admit(&more, now), Err(EnvelopeError::Flood)));
        guard.admit(&Envelope { from: b, ..more.clone() }, now).unwrap();
        let later = now.plus(LIFETIME + SKEW * 2);
        guard.admit(&more, later).unwrap();
    }
}
