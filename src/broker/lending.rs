//! Answering members that ask for components by hash: what has a name here may be fetched by whom
//! the configuration lets, with a ticket for exactly that, for some minutes.

use std::collections::HashMap;
use std::time::Duration;

use crate::clock::UnixMillis;
use crate::migration::message::{CONTENT_IDS_MAX, ContentAnswer, TICKETS_BACK_MAX};
use crate::migration::{AnswerBody, Denial, DenialCode, RequestBody};
use crate::types::{Hash, PublicKey};

use super::Broker;
use super::effect::{Effect, Peer};
use super::pending::{Pending, Working};

/// Content tickets one member may have at once.
const OPEN_MAX: usize = 4;
/// How long a ticket is good. Who needs longer asks again.
const LIFETIME: Duration = Duration::from_secs(600);

/// Content tickets that are open, by member.
#[derive(Clone, Debug, Default)]
pub struct Lent {
    open: HashMap<PublicKey, Vec<(Hash, UnixMillis)>>,
}

impl Lent {
    /// Opens a ticket, unless the member has as many as it may.
    fn open(&mut self, peer: PublicKey, ticket: Hash, now: UnixMillis) -> Result<(), Denial> {
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
    fn close(&mut self, peer: &PublicKey, ticket: &Hash) -> bool {
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
    fn expire(&mut self, now: UnixMillis) -> Vec<Hash> {
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
    pub(super) fn answer_content(&mut self, work: &Working) -> Option<AnswerBody> {
        let ticket = match self.open_content_ticket(&work.from, &work.request.body) {
            Ok(ticket) => ticket,
            Err(denial) => return Some(AnswerBody::Denied(denial)),
        };
        let RequestBody::Content { components, packs, .. } = &work.request.body else { return None };
        let (to, components, packs) = (work.from.clone(), components.clone(), packs.clone());
        let token = self.expect(Pending::Lent { work: work.clone(), ticket });
        self.emit(Effect::Lend { token, to, ticket, components, packs });
        None
    }

    /// It is known what of it has a name here, and that is served already.
    pub(super) fn lent_out(
        &mut self,
        work: &Working,
        ticket: Option<Hash>,
        held: Result<(Vec<u32>, Vec<u32>), Denial>,
    ) {
        let lends = matches!(&held, Ok((components, packs)) if !components.is_empty() || !packs.is_empty());
        if let Some(unused) = ticket.filter(|_| !lends) {
            self.lent.close(&work.from.key, &unused);
        }
        let answer = match held {
            Ok((components_held, packs_held)) => AnswerBody::Content(ContentAnswer {
                components_held,
                packs_held,
                ticket: ticket.filter(|_| lends).map(|ticket| ticket.to_string()),
                expires_in_s: LIFETIME.as_secs(),
                addresses: self.transfer_addresses.iter().map(Into::into).collect(),
            }),
            Err(denial) => AnswerBody::Denied(denial),
        };
        self.answer_work(work, answer);
    }

    /// Takes back what the member returns, and opens a ticket if it asks for something.
    fn open_content_ticket(&mut self, peer: &Peer, body: &RequestBody) -> Result<Option<Hash>, Denial> {
        let RequestBody::Content { components, packs, done } = body else { return Ok(None) };
        for text in done.iter().take(TICKETS_BACK_MAX) {
            if let Ok(ticket) = text.parse::<Hash>()
                && self.lent.close(&peer.key, &ticket)
            {
                self.emit(Effect::Withdraw(ticket));
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
        let ticket = self.ids.ticket();
        self.lent.open(peer.key, ticket, self.now)?;
        Ok(Some(ticket))
    }

    pub(super) fn expire_lent(&mut self) {
        for ticket in self.lent.expire(self.now) {
            self.emit(Effect::Withdraw(ticket));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::IdentityKey;

    #[test]
    fn a_member_has_few_tickets_and_they_end() {
        let key = |n| IdentityKey::from_secret_bytes(&[n; 32]).public();
        let ticket = |n| Hash::from_bytes([n; 32]);
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
