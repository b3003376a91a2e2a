//! Level 1: negotiation and hand-over. Messages, signatures and the two machines; no I/O, no clock.
#![doc = include_str!("PROTOCOL.md")]

pub mod envelope;
pub mod evidence;
pub mod handover;
pub mod lineage;
pub mod message;
pub mod move_record;
pub mod ownership;
pub mod records;
pub mod source;
pub mod target;

pub use envelope::{Envelope, EnvelopeError, ReplayGuard};
pub use evidence::Evidence;
pub use handover::{HandOver, Receipt, Return};
pub use lineage::{Lineage, Link, LinkKind, Links};
pub use message::{Answer, AnswerBody, Denial, DenialCode, Pass, RequestBody};
pub use ownership::{Law, Refusal};
