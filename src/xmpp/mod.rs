//! Level 2: the XMPP session and the administration of rooms.
//!
//! One task owns the stanza stream (`session`) and stays joined to the room. Below it: the stream's
//! connections (`connector`, `scram`, `link`) and how deep their XML goes (`shallow`), what waits to be sent or
//! answered (`outbox`, `pending`), the room's presence (`room`) and requests of outsiders
//! (`refusals`). The rest of the program holds a `Handle` and reads events.

pub mod admin;
mod answering;
mod connector;
mod handle;
mod link;
mod outbox;
mod pending;
mod refusals;
mod room;
mod scram;
mod session;
mod shallow;

pub use connector::{LoginRules, Security, TlsMin};
pub use handle::{Handle, IncomingRequest, IqReply, RequestError, Settings, XmppEvent};
pub use scram::BindingRule;
pub use session::connect;

/// What `fuzz/` reaches into.
#[cfg(fuzzing)]
pub mod fuzzing {
    pub use super::room::{RoomPresence, configuration_changed, read};
    pub use super::shallow::filtered;
}
