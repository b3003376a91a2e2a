//! What waits to be sent. The stream's own queue blocks its caller when it is full, which it is
//! soon after a connection broke; the session must go on meanwhile, so it waits here instead.

use std::collections::VecDeque;

use tokio_xmpp::Stanza;
use tokio_xmpp::stanzastream::{StanzaStage, StanzaStream, StanzaToken};

/// Stanzas the stream holds at most; also the depth its queue is made with.
pub const STREAM_DEPTH: usize = 64;
/// Stanzas that may wait besides those; more are refused.
const WAITING_MAX: usize = 1024;

#[derive(Default)]
pub struct Outbox {
    waiting: VecDeque<Box<Stanza>>,
    /// Those given to the stream, oldest first, of which the front ones may have left already.
    given: VecDeque<StanzaToken>,
}

impl Outbox {
    /// False if there is no room for it.
    #[must_use]
    pub fn push(&mut self, stanza: impl Into<Stanza>) -> bool {
        let fits = self.waiting.len() < WAITING_MAX;
        if fits {
            self.waiting.push_back(Box::new(stanza.into()));
        }
        fits
    }

    /// Forgets what was meant for a session that is over.
    pub fn clear(&mut self) {
        self.waiting.clear();
    }

    /// Gives the stream as much as it takes without blocking.
    pub async fn pump(&mut self, stream: &StanzaStream) {
        while self.given.front().is_some_and(|t| t.state() != StanzaStage::Queued) {
            self.given.pop_front();
        }
        while self.given.len() < STREAM_DEPTH {
            let Some(stanza) = self.waiting.pop_front() else { return };
            self.given.push_back(stream.send(stanza).await);
        }
    }

    /// Resolves when there is room in the stream for what waits; never, if nothing does.
    pub async fn has_room(&mut self) {
        match self.given.front_mut() {
            Some(oldest) if !self.waiting.is_empty() => drop(oldest.wait_for(StanzaStage::Sent).await),
            _ => std::future::pending().await,
        }
    }
}
