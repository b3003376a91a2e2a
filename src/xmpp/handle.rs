//! The session as the rest of the program sees it: what it is told, what it reports.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio_xmpp::Stanza;
use xmpp_parsers::jid::Jid;
use xmpp_parsers::minidom::Element;
use xmpp_parsers::ping::Ping;

use crate::federation::Presence;
use crate::federation::refusals::Tally;
use crate::stanza::Cloud;
use crate::types::{CloudName, MemberJid, PeerText};

use super::connector::{LoginRules, Security};
use super::room::{self, Refusal};
use super::visit::VisitReply;

/// How long an IQ that is no member's request may take.
pub(super) const IQ_TIMEOUT: Duration = Duration::from_secs(10);
/// The session ends waiting itself; this much later its caller stops believing in it.
const SESSION_GRACE: Duration = Duration::from_secs(2);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// Which account, which server, which room.
#[derive(Clone)]
pub struct Settings {
    pub jid: MemberJid,
    pub password: String,
    /// `host` or `host:port`; the account's domain if not set.
    pub server: Option<String>,
    pub security: Security,
    /// Authorities that may vouch for the server; the system's if not set.
    pub ca_file: Option<PathBuf>,
    pub rules: LoginRules,
    /// Bare JID of the room; `None` for a session that only administers.
    pub room: Option<String>,
    pub nick: CloudName,
}

pub enum XmppEvent {
    /// The room was checked and joined, and its members follow. Without a room: the session is up.
    Joined,
    /// No session, or no room; why. It is tried again, and `Joined` follows when it succeeds.
    Down(String),
    Presence(Presence),
    /// The room's owner took this member off the list.
    Removed(MemberJid),
    Request(IncomingRequest),
    /// What was refused here already.
    Refused(Tally),
}

/// Another member's sealed request.
pub struct IncomingRequest {
    pub from: MemberJid,
    pub sealed: Vec<u8>,
    /// `None` refuses it.
    pub reply: oneshot::Sender<Option<Vec<u8>>>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error("{0} is not online")]
    NotOnline(String),
    #[error("no answer from {to} within {seconds} s")]
    Timeout { to: String, seconds: u64 },
    /// It may have been carried out or not: asking again must be harmless.
    #[error("the connection broke before the answer came")]
    Unknown,
    #[error("{condition}{}{text}", if .text.is_empty() { "" } else { ": " })]
    Refused { condition: PeerText, text: PeerText },
    #[error("the session is closed")]
    Closed,
}

/// What an IQ came to: the result's payload, if it has one.
pub type IqReply = Result<Option<Element>, RequestError>;

pub(super) enum Command {
    Request {
        to: MemberJid,
        sealed: Vec<u8>,
        timeout: Duration,
        reply: oneshot::Sender<Result<Vec<u8>, RequestError>>,
    },
    Iq {
        to: Jid,
        set: bool,
        payload: Element,
        reply: oneshot::Sender<IqReply>,
    },
    Visit {
        occupant: Jid,
        reply: oneshot::Sender<VisitReply>,
    },
    Send(Box<Stanza>),
    Close(oneshot::Sender<()>),
}

/// The way to the session's task; clones share it.
#[derive(Clone)]
pub struct Handle {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) presence: Arc<watch::Sender<Option<Cloud>>>,
    pub(super) refused: Arc<AtomicBool>,
}

impl Handle {
    /// Whether the last login failed for who we are, or who the server is, so that trying again cannot help.
    pub fn login_was_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }

    /// What this cloud says of itself: announced as soon as the room is joined, and whenever it
    /// differs from what was announced last, at most every few seconds.
    pub fn set_presence(&self, cloud: Cloud) {
        self.presence.send_replace(Some(cloud));
    }

    /// Sends a sealed request to a member's broker and waits for the sealed answer.
    pub async fn request(
        &self,
        to: MemberJid,
        sealed: Vec<u8>,
        timeout: Duration,
    ) -> Result<Vec<u8>, RequestError> {
        let (reply, answer) = oneshot::channel();
        let name = to.to_string();
        self.ask(Command::Request { to, sealed, timeout, reply }, answer, name, timeout).await
    }

    /// Any IQ, for administration.
    pub async fn iq(&self, to: Jid, set: bool, payload: impl Into<Element>) -> IqReply {
        let (reply, answer) = oneshot::channel();
        let (name, payload) = (to.to_string(), payload.into());
        self.ask(Command::Iq { to, set, payload, reply }, answer, name, IQ_TIMEOUT).await
    }

    /// Whether `to` answers (XEP-0199).
    pub async fn ping(&self, to: Jid) -> Result<(), RequestError> {
        self.iq(to, false, Ping).await.map(drop)
    }

    /// Enters a room other than the session's own under a nick, or changes the nick there, and tells what was seen.
    /// [`Handle::leave`] ends the visit.
    pub async fn visit(&self, occupant: Jid) -> VisitReply {
        let (reply, answer) = oneshot::channel();
        if self.commands.send(Command::Visit { occupant, reply }).await.is_err() {
            return Err(Refusal::Silent);
        }
        answer.await.unwrap_or(Err(Refusal::Silent))
    }

    /// Ends a visit.
    pub async fn leave(&self, occupant: Jid) {
        self.send(room::leave(occupant)).await;
    }

    /// Any stanza that needs no answer.
    pub async fn send(&self, stanza: impl Into<Stanza>) {
        let _ = self.commands.send(Command::Send(Box::new(stanza.into()))).await;
    }

    pub fn is_closed(&self) -> bool {
        self.commands.is_closed()
    }

    /// Leaves the room and ends the session.
    pub async fn close(&self) {
        let (done, closed) = oneshot::channel();
        let close = async {
            if self.commands.send(Command::Close(done)).await.is_ok() {
                let _ = closed.await;
            }
        };
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, close).await;
    }

    async fn ask<T>(
        &self,
        command: Command,
        answer: oneshot::Receiver<Result<T, RequestError>>,
        to: String,
        timeout: Duration,
    ) -> Result<T, RequestError> {
        let asked = async {
            self.commands.send(command).await.map_err(|_| RequestError::Closed)?;
            answer.await.map_err(|_| RequestError::Closed)?
        };
        match tokio::time::timeout(timeout + SESSION_GRACE, asked).await {
            Ok(result) => result,
            Err(_) => Err(RequestError::Timeout { to, seconds: timeout.as_secs() }),
        }
    }
}
