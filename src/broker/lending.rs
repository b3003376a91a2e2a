//! Answering members that ask for components by hash: what has a name here may be fetched by whom
//! the configuration lets, with a ticket for exactly that, for some minutes.

use std::collections::HashMap;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::clock::UnixMillis;
use crate::interface::problem::chain;
use crate::migration::message::{CONTENT_IDS_MAX, ContentAnswer, TICKETS_BACK_MAX};
use crate::migration::{AnswerBody, Denial, DenialCode, Envelope, RequestBody};
use crate::transfer::Ticket;
use crate::types::{Hash, PublicKey};

use super::guard::Work;
use super::serving::Served;
use super::shared::{Peer, Shared};
use super::{Broker, Input};

/// Content tickets one member may have at once.
const OPEN_MAX: usize = 4;
/// How long a ticket is good. Who needs longer asks again.
const LIFETIME: Duration = Duration::from_secs(600);

/// Content tickets that are open, by member.
#[derive(Debug, Default)]
pub struct Lent {
    open: HashMap<PublicKey, Vec<(Ticket, UnixMillis)>>,
}

impl Lent {
    /// Opens a ticket, unless the member has as many as it may.
    fn open(&mut self, peer: PublicKey, ticket: Ticket, now: UnixMillis) -> Result<(), Denial> {
        let open = self.open.entry(peer).or_default();
        if open.len() >= OPEN_MAX {
            let text = format!("{OPEN_MAX} content tickets are open already");
            let next = format!("give one back, or wait {} min", LIFETIME.as_secs() / 60);
            return Err(Denial::new(DenialCode::Busy, text).next(next));
        }
        open.push((ticket, now.plus(LIFETIME)));
        Ok(())
    }

    /// Closes a ticket if it is this member's.
    fn close(&mut self, peer: &PublicKey, ticket: &Ticket) -> bool {
        let Some(open) = self.open.get_mut(peer) else { return false };
        let before = open.len();
        open.retain(|(t, _)| t != ticket);
        let closed = open.len() < before;
        if open.is_empty() {
            self.open.remove(peer);
        }
        closed
    }

    /// Closes all of a member's; the tickets themselves are withdrawn with all it has.
    pub fn forget(&mut self, peer: &PublicKey) {
        self.open.remove(peer);
    }

    /// Closes the tickets that have expired, and says which.
    fn expire(&mut self, now: UnixMillis) -> Vec<Ticket> {
        let mut expired = Vec::new();
        self.open.retain(|_, open| {
            open.retain(|(ticket, until)| {
                let lives = now < *until;
                if !lives {
                    expired.push(*ticket);
                }
                lives
            });
            !open.is_empty()
        });
        expired
    }
}

impl Broker {
    pub(super) fn answer_content(
        &mut self,
        peer: &Peer,
        request: Envelope<RequestBody>,
        work: Work,
        reply: oneshot::Sender<Option<Vec<u8>>>,
    ) {
        let opened = self.open_content_ticket(peer, &request.body);
        let (addresses, shared, peer) = (self.transfer_addresses(), self.shared.clone(), peer.clone());
        let ticket = match opened {
            Ok(ticket) => ticket,
            Err(denial) => {
                let _ = reply.send(shared.answer(&request, AnswerBody::Denied(denial)).ok());
                return;
            }
        };
        tokio::task::spawn_blocking(move || {
            let _under_way = work;
            let answer = lend(&shared, &peer, &request.body, ticket, addresses);
            let lent = matches!(&answer, AnswerBody::Content(a) if a.ticket.is_some());
            if let Some(unused) = ticket.filter(|_| !lent) {
                shared.post(Input::apply(move |broker| {
                    broker.lent.close(&peer.key, &unused);
                }));
            }
            let _ = reply.send(shared.answer(&request, answer).ok());
        });
    }

    /// Takes back what the member returns, and opens a ticket if it asks for something.
    fn open_content_ticket(&mut self, peer: &Peer, body: &RequestBody) -> Result<Option<Ticket>, Denial> {
        let RequestBody::Content { components, packs, done } = body else { return Ok(None) };
        for text in done.iter().take(TICKETS_BACK_MAX) {
            if let Ok(ticket) = text.parse::<Hash>().map(|h| Ticket::from_bytes(*h.as_bytes()))
                && self.lent.close(&peer.key, &ticket)
            {
                self.shared.tickets.withdraw(&ticket);
            }
        }
        let asked = components.len() + packs.len();
        if asked == 0 {
            return Ok(None);
        }
        if asked > CONTENT_IDS_MAX {
            let text = format!("{asked} objects were asked for, at most {CONTENT_IDS_MAX} may be at once");
            return Err(Denial::new(DenialCode::Other, text));
        }
        if !self.policy_of(&peer.jid).share_components {
            let next = format!(
                "let its operator add {} to repository.share_with, or change its [[member]]",
                peer.jid
            );
            return Err(
                Denial::new(DenialCode::Policy, "components are not shared with this cloud").next(next)
            );
        }
        let ticket = Ticket::random().map_err(|e| Denial::new(DenialCode::Other, e.to_string()))?;
        self.lent.open(peer.key, ticket, self.shared.now())?;
        Ok(Some(ticket))
    }

    pub(super) fn expire_lent(&mut self) {
        for ticket in self.lent.expire(self.shared.now()) {
            self.shared.tickets.withdraw(&ticket);
        }
    }
}

/// Looks up what of the request has a name here, and serves it under `ticket`. Blocking.
fn lend(
    shared: &Shared,
    peer: &Peer,
    body: &RequestBody,
    ticket: Option<Ticket>,
    addresses: Vec<String>,
) -> AnswerBody {
    let mut answer = ContentAnswer {
        components_held: Vec::new(),
        packs_held: Vec::new(),
        ticket: None,
        expires_in_s: LIFETIME.as_secs(),
        addresses: addresses.into_iter().map(Into::into).collect(),
    };
    let (Some(ticket), RequestBody::Content { components, packs, .. }) = (ticket, body) else {
        return AnswerBody::Content(answer);
    };
    match shared.repository.held_by_name(components, packs) {
        Ok((c, p)) => (answer.components_held, answer.packs_held) = (c, p),
        Err(e) => return AnswerBody::Denied(Denial::new(DenialCode::Content, chain(&e))),
    }
    if answer.components_held.is_empty() && answer.packs_held.is_empty() {
        return AnswerBody::Content(answer);
    }
    let content = Served {
        peer: Some(peer.key),
        components: answer.components_held.iter().map(|i| components[*i as usize]).collect(),
        packs: answer.packs_held.iter().map(|i| packs[*i as usize]).collect(),
        ..Served::default()
    };
    tracing::info!(member = %peer.jid, components = content.components.len(), packs = content.packs.len(), "lends components");
    shared.tickets.serve(ticket, content);
    answer.ticket = Some(Hash::from_bytes(*ticket.as_bytes()).to_string());
    AnswerBody::Content(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::IdentityKey;

    #[test]
    fn a_member_has_few_tickets_and_they_end() {
        let key = |n| IdentityKey::from_secret_bytes(&[n; 32]).public();
        let ticket = |n| Ticket::from_bytes([n; 32]);
        let (mut lent, start) = (Lent::default(), UnixMillis(1000));
        for n in 0..OPEN_MAX as u8 {
            lent.open(key(1), ticket(n), start).unwrap();
        }
        assert_eq!(lent.open(key(1), ticket(99), start).unwrap_err().code, DenialCode::Busy);
        lent.open(key(2), ticket(50), start).unwrap();
        assert!(!lent.close(&key(2), &ticket(0)), "another member's");
        assert!(lent.close(&key(1), &ticket(0)) && !lent.close(&key(1), &ticket(0)));
        lent.open(key(1), ticket(99), start.plus(Duration::from_secs(1))).unwrap();
        assert!(lent.expire(start.plus(LIFETIME - Duration::from_millis(1))).is_empty());
        assert_eq!(lent.expire(start.plus(LIFETIME)).len(), OPEN_MAX);
        assert_eq!(lent.expire(start.plus(LIFETIME * 2)), [ticket(99)]);
        assert!(lent.open.is_empty());
    }
}
