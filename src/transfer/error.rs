//! What can go wrong, and what is refused.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use quinn::{ConnectionError, VarInt};

use super::fetch::FetchReport;
use super::object::{ObjectKey, SinkError};
use crate::federation::Refused;
use crate::types::codec::CodecError;
use crate::types::{Hash, PublicKey};

/// Why a broker does not admit a peer or does not serve an object. The codes are the wire's;
/// never reuse one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Refusal {
    /// The peer's key belongs to no member of the federation.
    NotMember,
    /// The ticket was never issued, or is withdrawn.
    UnknownTicket,
    ExpiredTicket,
    /// The ticket is good, but was given to another member or for other objects.
    OutOfScope,
    /// The object is not here.
    NotHeld,
    /// The object changed or vanished while it was sent; asking again may work.
    Changed,
    /// Too many requests at once; asking later may work.
    TooMany,
    /// The object is here but could not be read.
    Failed,
    /// A code this version does not know.
    Other(u8),
}

impl Refusal {
    pub const fn code(self) -> u8 {
        match self {
            Refusal::NotMember => 1,
            Refusal::UnknownTicket => 2,
            Refusal::ExpiredTicket => 3,
            Refusal::OutOfScope => 4,
            Refusal::NotHeld => 5,
            Refusal::Changed => 6,
            Refusal::TooMany => 7,
            Refusal::Failed => 8,
            Refusal::Other(code) => code,
        }
    }
    /// As what it counts, where no honest peer is refused so.
    pub(super) fn refused(self) -> Option<Refused> {
        match self {
            Refusal::NotMember => Some(Refused::NotMember),
            Refusal::UnknownTicket | Refusal::ExpiredTicket | Refusal::OutOfScope => Some(Refused::Ticket),
            Refusal::TooMany => Some(Refused::RateLimit),
            Refusal::NotHeld | Refusal::Changed | Refusal::Failed | Refusal::Other(_) => None,
        }
    }
    pub const fn from_code(code: u8) -> Self {
        match code {
            1 => Refusal::NotMember,
            2 => Refusal::UnknownTicket,
            3 => Refusal::ExpiredTicket,
            4 => Refusal::OutOfScope,
            5 => Refusal::NotHeld,
            6 => Refusal::Changed,
            7 => Refusal::TooMany,
            8 => Refusal::Failed,
            code => Refusal::Other(code),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::NotMember => "the key belongs to no member of the federation",
            Refusal::UnknownTicket => "the transfer ticket is not known",
            Refusal::ExpiredTicket => "the transfer ticket has expired",
            Refusal::OutOfScope => "the transfer ticket does not cover this object or this member",
            Refusal::NotHeld => "the object is not held there",
            Refusal::Changed => "the object changed while it was sent",
            Refusal::TooMany => "too many requests at once",
            Refusal::Failed => "the object could not be read there",
            Refusal::Other(code) => return write!(f, "refused with the unknown code {code}"),
        })
    }
}

/// Codes a connection is closed with and a stream is reset or stopped with.
pub(super) mod close {
    use super::{Refusal, VarInt};

    /// The work is done, or the asker changed its mind.
    pub const DONE: VarInt = VarInt::from_u32(0);
    /// The other side broke the protocol.
    pub const MISBEHAVED: VarInt = VarInt::from_u32(1);
    /// The other side took or sent nothing for too long.
    pub const STALLED: VarInt = VarInt::from_u32(2);
    const REFUSED: u32 = 0x100;

    pub fn refused(refusal: Refusal) -> VarInt {
        VarInt::from_u32(REFUSED + u32::from(refusal.code()))
    }
    pub fn as_refusal(code: VarInt) -> Option<Refusal> {
        let low = code.into_inner().checked_sub(REFUSED.into())?;
        u8::try_from(low).ok().map(Refusal::from_code)
    }
}

/// How a peer broke the protocol. It is cut off: nothing more it sends is looked at.
#[derive(Debug, thiserror::Error)]
pub enum Violation {
    #[error("it sent a malformed frame")]
    Malformed(#[from] CodecError),
    #[error("its answer ended before {missing} of the objects asked for were answered")]
    Short { missing: usize },
    #[error("its answer goes on after every object was answered")]
    Long,
    #[error("it sent a {size_bytes}-byte {key}, over the limit of {limit_bytes} bytes")]
    TooLarge { key: ObjectKey, size_bytes: u64, limit_bytes: u64 },
    #[error("it sent {key} in a form such objects do not have")]
    Form { key: ObjectKey },
    #[error("what it sent as {key} does not unpack to the announced {plain_size_bytes} bytes")]
    Unpack { key: ObjectKey, plain_size_bytes: u64 },
    #[error("what it sent as {key} has the hash {found}")]
    Hash { key: ObjectKey, found: Hash },
    #[error("it sent a {key} whose content is not what the id says")]
    Pack { key: ObjectKey, source: SinkError },
}

#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    #[error("cannot listen for transfers on {address}; is another broker using the port?")]
    Bind { address: SocketAddr, source: io::Error },
    #[error("the identity key cannot be used for TLS")]
    Identity { source: rustls::Error },
    #[error("member {peer:?} gave no address to connect to; set its transfer address in its configuration")]
    NoAddress { peer: PublicKey },
    /// Which name led where is not said: it may be the name of a machine that only this one knows.
    #[error(
        "none of the addresses offered ({offered}) was found to be one that is dialled from there: global ones, \
         and those of the networks in its transfer.peer_networks"
    )]
    Barred { offered: String },
    #[error("member {peer:?} does not answer at any of its addresses ({tried}); check that UDP reaches it")]
    Unreachable { peer: PublicKey, tried: String },
    #[error(
        "{address} holds the key {found:?}, not the expected {expected:?}; \
         compare fingerprints with its operator before trusting it"
    )]
    WrongKey { address: SocketAddr, expected: PublicKey, found: PublicKey },
    #[error("{address} does not speak {}; its version may differ", String::from_utf8_lossy(super::ALPN))]
    WrongProtocol { address: SocketAddr },
    #[error("{address} refused our identity key: it expects another broker there")]
    KeyRefused { address: SocketAddr },
    #[error("member {peer:?} at {address} refused the connection: {reason}")]
    Refused { peer: PublicKey, address: SocketAddr, reason: Refusal },
    #[error("the handshake with {address} failed")]
    Handshake { address: SocketAddr, source: ConnectionError },
    #[error("the connection to member {peer:?} was interrupted; what is missing can be fetched again")]
    Interrupted { peer: PublicKey, source: ConnectionError },
    #[error("member {peer:?} sent nothing for {}; try again or another member", humanise(*.waited))]
    Stalled { peer: PublicKey, waited: Duration },
    #[error("member {peer:?} broke the transfer protocol and was cut off")]
    Misbehaved { peer: PublicKey, source: Violation },
    #[error("{key} arrived but was not taken")]
    Sink { key: ObjectKey, source: SinkError },
    #[error("the transfer was stopped here")]
    Stopped,
}

/// A fetch that did not get to its end, with what it did get.
#[derive(Debug, thiserror::Error)]
#[error("the fetch ended early: {} objects arrived, {} are missing", .report.delivered, .report.missing.len())]
pub struct FetchError {
    pub report: FetchReport,
    pub source: TransferError,
}

fn humanise(d: Duration) -> String {
    format!("{:.1} s", d.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusal_codes_are_stable_and_close_codes_carry_them() {
        for code in 0..=255 {
            let refusal = Refusal::from_code(code);
            assert_eq!(refusal.code(), code);
            assert_eq!(close::as_refusal(close::refused(refusal)), Some(refusal));
            assert_eq!(matches!(refusal, Refusal::Other(_)), !(1..=8).contains(&code));
        }
        for code in [close::DONE, close::MISBEHAVED, close::STALLED, VarInt::MAX] {
            assert_eq!(close::as_refusal(code), None);
        }
    }
}
