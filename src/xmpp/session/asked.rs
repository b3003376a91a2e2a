//! What others ask of us. Anybody may ask what we are; requests are taken only from members of the
//! room, since a server does not keep strangers from sending them.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio_xmpp::Stanza;
use xmpp_parsers::iq::{Iq, IqPayload};
use xmpp_parsers::jid::Jid;
use xmpp_parsers::minidom::Element;
use xmpp_parsers::stanza_error::{DefinedCondition, StanzaError};

use crate::federation::Refused;
use crate::migration::envelope::SEALED_BYTES_MAX;
use crate::stanza::error::refusal;
use crate::stanza::{Answer, Request, ns};
use crate::types::MemberJid;
use crate::xmpp::answering::Seat;
use crate::xmpp::handle::{Command, IncomingRequest, XmppEvent};
use crate::xmpp::room;

use super::{Place, Session};

/// How long the broker may take to answer another's request.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

impl Session {
    pub(super) fn asked(&mut self, iq: Iq) {
        let (header, payload) = iq.split();
        let (from, id) = (header.from, header.id);
        let is_request = matches!(&payload, IqPayload::Set(e) if e.is("request", ns::NEGOTIATION));
        if !is_request && !self.may_ask(from.as_ref()) {
            return;
        }
        let answer = match payload {
            IqPayload::Get(e) if e.is("ping", ns::PING) => Ok(None),
            IqPayload::Get(e) if e.is("query", ns::DISCO_INFO) => {
                Ok(Some(room::disco(e.attr("node").map(str::to_owned)).into()))
            }
            IqPayload::Get(e) if e.is("query", ns::VERSION) => Ok(Some(room::version().into())),
            IqPayload::Set(e) if e.is("request", ns::NEGOTIATION) => {
                match self.request(from.as_ref(), &id, e) {
                    Verdict::Forwarded | Verdict::Dropped => return,
                    Verdict::Refused(e) => Err(*e),
                }
            }
            _ => Err(refusal(DefinedCondition::ServiceUnavailable, "")),
        };
        self.send(reply(from, id, answer));
    }

    /// Whether a small question is answered: our own server's and the room's always are.
    fn may_ask(&mut self, from: Option<&Jid>) -> bool {
        let Some(account) = from.map(Jid::to_bare) else { return true };
        let server = account.node().is_none() && account.domain() == self.me.domain();
        let room = self.occupant.as_ref().is_some_and(|o| o.to_bare() == account);
        server
            || room
            || account == self.me.to_bare()
            || self.strangers.may_ask(account.as_str(), Instant::now())
    }

    /// Tells what was refused here, as far as there is room.
    pub(super) fn tell_refusals(&mut self) {
        for tally in self.strangers.take_new() {
            let _ = self.events.try_send(XmppEvent::Refused(tally));
        }
    }

    /// A member's request goes to the broker; anybody else's is refused.
    fn request(&mut self, from: Option<&Jid>, id: &str, payload: Element) -> Verdict {
        let Some(from) = from else { return Verdict::Dropped };
        if !matches!(self.place, Place::Inside) || self.occupant.is_none() {
            let text = "not in the federation's room at present";
            return Verdict::refuse(DefinedCondition::RecipientUnavailable, text);
        }
        let sender: Option<MemberJid> = from.to_bare().to_string().parse().ok();
        let Some(member) = sender.filter(|jid| self.occupants.contains_key(jid)) else {
            return self.refuse_outsider(from);
        };
        let readable = Request::try_from(payload);
        if !readable.as_ref().is_ok_and(|r| r.sealed.len() <= SEALED_BYTES_MAX) {
            self.strangers.malformed(member.as_str(), Instant::now());
        }
        let request = match readable {
            Ok(request) if request.sealed.len() <= SEALED_BYTES_MAX => request,
            Ok(_) => return Verdict::refuse(DefinedCondition::PolicyViolation, "too large"),
            Err(e) => return Verdict::refuse(DefinedCondition::BadRequest, &e.to_string()),
        };
        let busy = || Verdict::refuse(DefinedCondition::ResourceConstraint, "too many requests");
        let Some(seat) = self.answering.begin(&member) else {
            self.strangers.too_many(member.as_str(), Instant::now());
            return busy();
        };
        let (reply, answer) = oneshot::channel();
        let request = IncomingRequest { from: member, sealed: request.sealed, reply };
        match self.events.try_send(XmppEvent::Request(request)) {
            Ok(()) => {
                self.forward_answer(from.clone(), id.to_owned(), answer, seat);
                Verdict::Forwarded
            }
            Err(_) => busy(),
        }
    }

    fn refuse_outsider(&mut self, from: &Jid) -> Verdict {
        let refusal = self.strangers.refuse(from.to_bare().as_str(), Instant::now());
        if let Some(suppressed) = refusal.log {
            let (kind, reason) = (Refused::NotMember, "the sender is no member in the room");
            tracing::warn!(member = %from.to_bare(), %kind, reason, suppressed, "request refused");
        }
        if refusal.answer {
            Verdict::refuse(DefinedCondition::Forbidden, "only members of the federation may ask")
        } else {
            Verdict::Dropped
        }
    }

    /// Sends the broker's answer when it comes.
    fn forward_answer(&self, from: Jid, id: String, answer: oneshot::Receiver<Option<Vec<u8>>>, seat: Seat) {
        let commands = self.commands.clone();
        tokio::spawn(async move {
            let answer = match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
                Ok(Ok(Some(sealed))) if sealed.len() <= SEALED_BYTES_MAX => {
                    Ok(Some(Answer { sealed }.into()))
                }
                Ok(Ok(None)) => {
                    let text = "the request was refused; let that cloud's operator see its log";
                    Err(refusal(DefinedCondition::Forbidden, text))
                }
                _ => Err(refusal(DefinedCondition::RecipientUnavailable, "the broker does not answer now")),
            };
            drop(seat);
            if let Some(commands) = commands.upgrade() {
                let iq = Stanza::Iq(reply(Some(from), id, answer));
                let _ = commands.send(Command::Send(Box::new(iq))).await;
            }
        });
    }
}

/// What became of a request from outside.
enum Verdict {
    Forwarded,
    Refused(Box<StanzaError>),
    /// Not worth an answer.
    Dropped,
}

impl Verdict {
    fn refuse(condition: DefinedCondition, text: &str) -> Self {
        Self::Refused(Box::new(refusal(condition, text)))
    }
}

fn reply(to: Option<Jid>, id: String, answer: Result<Option<Element>, StanzaError>) -> Iq {
    match answer {
        Ok(payload) => Iq::Result { from: None, to, id, payload },
        Err(error) => Iq::Error { from: None, to, id, error, payload: None },
    }
}
