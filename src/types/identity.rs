//! ed25519 identity keys (RFC 8032): who a broker is, independent of any server.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ed25519_dalek::{Signer as _, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::hash::Hash;
use super::text::PeerText;

/// A public identity key. As text: base64 of its 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey([u8; 32]);

/// An ed25519 signature. As text: base64 of its 64 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Signature([u8; 64]);

/// The secret key. It has no text form but [`IdentityKey::secret_bytes`], and `Debug` hides it.
#[derive(Clone)]
pub struct IdentityKey(SigningKey);

/// What signs in a broker's name, and shows nothing else of its key.
pub trait Signer: Send + Sync {
    fn public(&self) -> PublicKey;
    fn sign(&self, message: &[u8]) -> Signature;
}

impl Signer for IdentityKey {
    fn public(&self) -> PublicKey {
        self.public()
    }
    fn sign(&self, message: &[u8]) -> Signature {
        self.sign(message)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    #[error("'{0}' is not a public key: base64 of 32 bytes expected")]
    PublicKey(PeerText),
    #[error("not a signature: base64 of 64 bytes expected")]
    Signature,
    #[error("the signature does not match the key and the bytes")]
    Mismatch,
}

impl PublicKey {
    pub fn from_bytes(bytes: [u8; 32]) -> Result<Self, IdentityError> {
        VerifyingKey::from_bytes(&bytes)
            .ok()
            .filter(|k| !k.is_weak())
            .map(|_| Self(bytes))
            .ok_or_else(|| IdentityError::PublicKey(BASE64.encode(bytes).into()))
    }

    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Checks `signature` over `message`, strictly (RFC 8032 without the known malleabilities).
    pub fn verify(&self, message: &[u8], signature: &Signature) -> Result<(), IdentityError> {
        let key = VerifyingKey::from_bytes(&self.0).map_err(|_| IdentityError::Mismatch)?;
        let sig = ed25519_dalek::Signature::from_bytes(&signature.0);
        key.verify_strict(message, &sig).map_err(|_| IdentityError::Mismatch)
    }

    /// What people compare: five groups of four hex digits of the key's BLAKE3 hash.
    pub fn fingerprint(&self) -> String {
        let hex = Hash::of(&self.0).to_string();
        let groups: Vec<&str> = (0..5).map(|i| &hex[4 * i..4 * i + 4]).collect();
        groups.join("-")
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.fingerprint())
    }
}

impl FromStr for PublicKey {
    type Err = IdentityError;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let bad = || IdentityError::PublicKey(s.into());
        let bytes = BASE64.decode(s).map_err(|_| bad())?;
        Self::from_bytes(bytes.try_into().map_err(|_| bad())?).map_err(|_| bad())
    }
}

impl TryFrom<String> for PublicKey {
    type Error = IdentityError;
    fn try_from(s: String) -> Result<Self, Self::Error> {
        s.parse()
    }
}

impl From<PublicKey> for String {
    fn from(k: PublicKey) -> String {
        k.to_string()
    }
}

impl Signature {
    pub const fn from_bytes(bytes: [u8; 64]) -> Self {
        Self(bytes)
    }
    pub const fn as_bytes(&self) -> &[u8; 64] {
        &self.0
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(self.0))
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signature({})", &BASE64.encode(self.0)[..12])
    }
}

impl TryFrom<String> for Signature {
    type Error = IdentityError;
    fn try_from(s: String) -> Result<Self, Self::Error> {
        let bytes = BASE64.decode(s).map_err(|_| IdentityError::Signature)?;
        Ok(Self(bytes.try_into().map_err(|_| IdentityError::Signature)?))
    }
}

impl From<Signature> for String {
    fn from(s: Signature) -> String {
        s.to_string()
    }
}

impl IdentityKey {
    /// The key whose 32 secret bytes these are.
    pub fn from_secret_bytes(secret: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(secret))
    }
    pub fn secret_bytes(&self) -> [u8; 32] {
        self.0.to_bytes()
    }
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key().to_bytes())
    }
    pub fn sign(&self, message: &[u8]) -> Signature {
        Signature(self.0.sign(message).to_bytes())
    }
    /// The secret key as PKCS #8 v1 DER (RFC 8410), the form TLS libraries load.
    pub fn pkcs8_der(&self) -> Zeroizing<Vec<u8>> {
        const PREFIX: [u8; 16] =
            [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
        let secret = Zeroizing::new(self.secret_bytes());
        Zeroizing::new([&PREFIX[..], &*secret].concat())
    }
}

impl PublicKey {
    /// SubjectPublicKeyInfo DER (RFC 8410), the form a TLS raw public key has (RFC 7250).
    pub fn spki_der(&self) -> Vec<u8> {
        [&SPKI_PREFIX[..], &self.0].concat()
    }
    /// Reads exactly what [`PublicKey::spki_der`] writes.
    pub fn from_spki_der(der: &[u8]) -> Result<Self, IdentityError> {
        let bad = || IdentityError::PublicKey("SubjectPublicKeyInfo".into());
        let raw = der.strip_prefix(&SPKI_PREFIX[..]).ok_or_else(bad)?;
        Self::from_bytes(raw.try_into().map_err(|_| bad())?)
    }
}

const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

impl fmt::Debug for IdentityKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IdentityKey({})", self.public().fingerprint())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_bind_key_and_bytes() {
        let key = IdentityKey::from_secret_bytes(&[7; 32]);
        let sig = key.sign(b"epoch 2");
        assert_eq!(key.public().verify(b"epoch 2", &sig), Ok(()));
        assert!(key.public().verify(b"epoch 3", &sig).is_err());
        assert!(IdentityKey::from_secret_bytes(&[8; 32]).public().verify(b"epoch 2", &sig).is_err());
        let key2 = key.public().to_string().parse::<PublicKey>().unwrap();
        assert_eq!(key2, key.public());
        assert_eq!(PublicKey::from_spki_der(&key2.spki_der()), Ok(key2));
        assert!(!format!("{key:?}").contains(&BASE64.encode([7; 32])));
    }
}
