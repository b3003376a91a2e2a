//! Level 2: the XMPP session: connector, the one task that owns the stream, the room, and the
//! administration of rooms.

pub mod admin;
mod connector;
mod room;
mod session;

pub use connector::Security;
pub use session::{Handle, IncomingRequest, RequestError, Settings, XmppEvent, connect};
