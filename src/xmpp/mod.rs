//! Level 2: the XMPP session and the administration of rooms.
//!
//! One task owns the stanza stream (`session`) and stays joined to the room. Below it: the stream's
//! connections (`connector`, `scram`, `link`) and how deep their XML goes (`shallow`), what waits to be sent or
//! answered (`outbox`, `pending`), the room's presence (`room`), what a room must be (`needs`), rooms entered for
//! a moment (`visit`) and requests of outsiders (`refusals`). The rest of the program holds a `Handle` and reads
//! events. Beside it: the owner's work (`admin`), what can be found out about a room, its service and its server
//! (`probe`), and which server that is (`server`).

pub mod admin;
mod answering;
mod connector;
mod handle;
mod link;
mod needs;
mod outbox;
mod pending;
pub mod probe;
mod refusals;
mod room;
mod scram;
mod server;
mod session;
mod shallow;
mod visit;

pub use connector::{LoginRules, Security, TlsMin};
pub use handle::{Handle, IncomingRequest, IqReply, RequestError, Settings, XmppEvent};
pub use needs::{Lacks, Need};
pub use room::{RESOURCE, Refusal};
pub use scram::BindingRule;
pub use server::{Server, Software};
pub use session::connect;
pub use visit::{Occupant, Visit, VisitReply};

/// What `fuzz/` reaches into.
#[cfg(fuzzing)]
pub mod fuzzing {
    pub use super::room::{RoomPresence, configuration_changed, read};
    pub use super::shallow::filtered;
}
