//! What the owner task and its effect runners share: resources that are safe to use from anywhere.
//! State lives in [`crate::broker::Broker`] alone.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use futures::future::BoxFuture;

use crate::broker::{self, Matter, Peer};
use crate::clock::{Clock, UnixMillis};
use crate::compose::Composer;
use crate::config::Config;
use crate::hypervisor::Driver;
use crate::migration::envelope::{LIFETIME, VERSION};
use crate::migration::{AnswerBody, DenialCode, Envelope, EnvelopeError, RequestBody};
use crate::repository::Repository;
use crate::transfer::Endpoint;
use crate::types::{IdentityKey, MemberJid};

use super::Input;
use super::content::serving::Tickets;
use super::inbox::Inbox;
use super::record_dir::Records;

/// The way to other brokers: the XMPP session, or a simulated one.
pub trait Link: Send + Sync {
    /// Sends a sealed request to a member's broker and waits for its sealed answer.
    fn request(
        &self,
        to: &MemberJid,
        payload: Vec<u8>,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Vec<u8>, LinkError>>;
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    #[error("{0} is not online")]
    NotOnline(MemberJid),
    #[error("no answer from {to} within {seconds} s")]
    Timeout { to: MemberJid, seconds: u64 },
    #[error("{to} refused the request: {reason}")]
    Refused { to: MemberJid, reason: String },
    #[error("the XMPP session is down")]
    Down,
}

/// Why there is no answer to a request.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("the answer cannot be trusted")]
    Answer(#[source] EnvelopeError),
    #[error("the request cannot be sent")]
    Request(#[source] EnvelopeError),
}

pub struct Shared {
    pub config: Config,
    pub me: MemberJid,
    pub key: IdentityKey,
    pub clock: Arc<dyn Clock>,
    pub repository: Repository,
    pub composer: Composer,
    pub driver: Arc<dyn Driver>,
    pub link: Arc<dyn Link>,
    pub endpoint: Endpoint,
    pub tickets: Arc<Tickets>,
    pub records: Records,
    pub inbox: Inbox,
    /// The newest protocol version spoken by us and each member, from its presence.
    pub versions: Versions,
}

/// Which protocol version is spoken with whom.
#[derive(Default)]
pub struct Versions(RwLock<BTreeMap<MemberJid, u32>>);

impl Versions {
    /// The newest, if the member's presence did not say.
    pub fn with(&self, member: &MemberJid) -> u32 {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        known.get(member).copied().unwrap_or(VERSION)
    }

    pub fn note(&self, member: &MemberJid, version: Option<u32>) {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match version {
            Some(version) => known.insert(member.clone(), version),
            None => known.remove(member),
        };
    }
}

/// How long one request may take; unanswered ones are repeated by the machines.
pub const ASK_TIMEOUT: Duration = Duration::from_secs(10);

/// How often, and after how long, a peer that is asked too often is asked again.
const PATIENCE: u32 = 10;
const WAIT_MIN: Duration = Duration::from_millis(100);
const WAIT_MAX: Duration = Duration::from_secs(5);

impl Shared {
    pub fn now(&self) -> UnixMillis {
        self.clock.now()
    }

    /// Hands an input to the owner task. After shutdown it is dropped: what matters is durable.
    pub fn post(&self, input: Input) {
        let _ = self.inbox.send(input);
    }

    /// Asks a peer, signed, and checks the signature of its answer. A peer that is asked too often
    /// is asked again when it says.
    pub async fn ask(&self, peer: &Peer, matter: Matter, body: RequestBody) -> Result<AnswerBody, AskError> {
        let mut patience = PATIENCE;
        loop {
            let answer = self.ask_once(peer, matter, body.clone()).await?;
            match &answer {
                AnswerBody::Denied(d) if d.code == DenialCode::RateLimited && patience > 0 => {
                    patience -= 1;
                    let wait = Duration::from_millis(d.retry_after_ms.unwrap_or_default());
                    tokio::time::sleep(wait.clamp(WAIT_MIN, WAIT_MAX)).await;
                }
                _ => return Ok(answer),
            }
        }
    }

    async fn ask_once(&self, peer: &Peer, matter: Matter, body: RequestBody) -> Result<AnswerBody, AskError> {
        let envelope = self.envelope(peer.jid.clone(), matter, body);
        let nonce = envelope.nonce.clone();
        let sealed = envelope.seal(&self.key).map_err(AskError::Request)?;
        let answer = self.link.request(&peer.jid, sealed, ASK_TIMEOUT).await?;
        let answer: Envelope<AnswerBody> = self
            .opened(&peer.jid, Envelope::open(&answer, &peer.key, &peer.jid, &self.me, self.now()))
            .map_err(AskError::Answer)?;
        // An answer repeats its request's nonce, so an old answer cannot be replayed for a new one.
        if answer.nonce != nonce || answer.migration != matter.migration || answer.vm != matter.vm {
            return Err(AskError::Answer(EnvelopeError::Replay));
        }
        Ok(answer.body)
    }

    /// Takes note of the clock of whoever signed a message.
    pub fn opened<T>(
        &self,
        from: &MemberJid,
        opened: Result<Envelope<T>, EnvelopeError>,
    ) -> Result<Envelope<T>, EnvelopeError> {
        match &opened {
            Ok(e) => self.signed(from, e.issued, true),
            Err(EnvelopeError::Expired { issued, .. }) => self.signed(from, *issued, false),
            Err(_) => {}
        }
        opened
    }

    fn signed(&self, by: &MemberJid, issued: UnixMillis, fresh: bool) {
        self.tell(broker::Input::Signed { by: by.clone(), issued, fresh });
    }

    /// Tells the core of something.
    pub fn tell(&self, input: broker::Input) {
        self.post(Input::Core(Box::new(input)));
    }

    fn envelope<T>(&self, to: MemberJid, matter: Matter, body: T) -> Envelope<T> {
        let now = self.now();
        Envelope {
            version: self.versions.with(&to),
            from: self.me.clone(),
            to,
            migration: matter.migration,
            vm: matter.vm,
            epoch: matter.epoch,
            nonce: uuid::Uuid::new_v4().simple().to_string(),
            issued: now,
            expires: now.plus(LIFETIME),
            body,
        }
    }
}
