//! Entering a room for a moment, to see what it is: under a nick of its own, without anything to say.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use xmpp_parsers::jid::{BareJid, Jid};
use xmpp_parsers::muc::Muc;
use xmpp_parsers::muc::muc::History;
use xmpp_parsers::presence::{Presence as Stanza, Type};

use crate::stanza::error::condition_in;
use crate::stanza::muc::Affiliation;
use crate::stanza::ns;

use super::room::{Refusal, statuses};

/// Others in a room that are told apart.
const OCCUPANTS_MAX: usize = 10_000;
/// Rooms that are visited at once.
const VISITS_MAX: usize = 8;

/// Somebody else in the room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Occupant {
    pub nick: String,
    /// The full address, where the room shows it.
    pub jid: Option<Jid>,
}

/// What was seen at the entrance. The visitor is in the room until it leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Visit {
    /// The room did not exist: entering made it.
    pub made: bool,
    /// What the visitor is to the room.
    pub affiliation: Affiliation,
    pub others: Vec<Occupant>,
}

pub type VisitReply = Result<Visit, Refusal>;

/// Entrances under way, by room.
#[derive(Default)]
pub(super) struct Visits(HashMap<BareJid, UnderWay>);

struct UnderWay {
    occupant: Jid,
    others: Vec<Occupant>,
    deadline: Instant,
    reply: oneshot::Sender<VisitReply>,
}

impl Visits {
    /// The presence to send to enter as `occupant`, or to take that nick if the visitor is in already.
    pub fn begin(
        &mut self,
        occupant: Jid,
        timeout: Duration,
        reply: oneshot::Sender<VisitReply>,
    ) -> Option<Stanza> {
        let room = occupant.to_bare();
        if self.0.len() >= VISITS_MAX || self.0.contains_key(&room) {
            let _ = reply.send(Err(Refusal::Silent));
            return None;
        }
        let deadline = Instant::now() + timeout;
        self.0.insert(room, UnderWay { occupant: occupant.clone(), others: Vec::new(), deadline, reply });
        let history = History::new().with_maxstanzas(0);
        Some(Stanza::available().with_to(occupant).with_payload(Muc::new().with_history(history)))
    }

    /// Takes what a visited room says of its occupants; false if no visit to it is under way.
    pub fn presence(&mut self, stanza: &Stanza) -> bool {
        let Some(from) = stanza.from.as_ref() else { return false };
        let room = from.to_bare();
        let Some(visit) = self.0.get_mut(&room) else { return false };
        let end = match stanza.type_ {
            // Some errors come from the room, without a nick.
            Type::Error if *from == visit.occupant || from.resource().is_none() => {
                let error = stanza.payloads.iter().find(|p| p.name() == "error");
                Some(Err(Refusal::of(error.and_then(condition_in).unwrap_or("an error"))))
            }
            Type::None => visit.seen(from, stanza).map(Ok),
            _ => None,
        };
        if let Some(end) = end
            && let Some(visit) = self.0.remove(&room)
        {
            let _ = visit.reply.send(end);
        }
        true
    }

    /// Ends what has taken too long. The presence may reach the room yet, so these are to be left.
    pub fn late(&mut self, now: Instant) -> Vec<Jid> {
        let late = self.0.extract_if(|_, v| v.deadline <= now);
        late.map(|(_, visit)| {
            let _ = visit.reply.send(Err(Refusal::Silent));
            visit.occupant
        })
        .collect()
    }

    /// The session is over.
    pub fn abandon(&mut self) {
        for (_, visit) in self.0.drain() {
            let _ = visit.reply.send(Err(Refusal::Silent));
        }
    }
}

impl UnderWay {
    /// What was seen, if this is the visitor's own presence, which comes last (XEP-0045, section 7.2.2).
    fn seen(&mut self, from: &Jid, stanza: &Stanza) -> Option<Visit> {
        let nick = from.resource()?.as_str().to_owned();
        let user = stanza.payloads.iter().find(|p| p.is("x", ns::MUC_USER))?;
        let mut items = user.children().filter(|c| c.name() == "item");
        if *from == self.occupant && statuses(user).any(|code| code == "110") {
            let affiliation = items.find_map(|item| item.attr("affiliation"));
            let all = Affiliation::ALL.into_iter();
            return Some(Visit {
                made: statuses(user).any(|code| code == "201"),
                affiliation: all
                    .clone()
                    .find(|a| Some(a.as_str()) == affiliation)
                    .unwrap_or(Affiliation::None),
                others: std::mem::take(&mut self.others),
            });
        }
        // One nick may be that of several sessions of an account.
        for item in items {
            if self.others.len() < OCCUPANTS_MAX {
                let jid = item.attr("jid").and_then(|jid| Jid::new(jid).ok());
                self.others.push(Occupant { nick: nick.clone(), jid });
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xmpp_parsers::minidom::Element;

    fn stanza(from: &str, kind: &str, payload: &str) -> Stanza {
        let text =
            format!("<presence xmlns='jabber:client' from='lobby@rooms.x{from}' {kind}>{payload}</presence>");
        Stanza::try_from(text.parse::<Element>().unwrap()).unwrap()
    }

    fn user(items: &str) -> String {
        format!("<x xmlns='http://jabber.org/protocol/muc#user'>{items}</x>")
    }

    fn begun() -> (Visits, oneshot::Receiver<VisitReply>) {
        let (mut visits, (reply, answer)) = (Visits::default(), oneshot::channel());
        let occupant = Jid::new("lobby@rooms.x/visitor").unwrap();
        assert!(visits.begin(occupant, Duration::from_secs(9), reply).is_some());
        (visits, answer)
    }

    #[test]
    fn who_is_there_comes_before_the_visitor_itself() {
        let (mut visits, mut answer) = begun();
        let member = "<item affiliation='member' role='participant' jid='a@x/cicada'/>";
        assert!(visits.presence(&stanza("", "", "<c xmlns='http://jabber.org/protocol/caps'/>")));
        assert!(visits.presence(&stanza("/alpine", "", &user(member))));
        assert!(visits.presence(&stanza("/gone", "type='unavailable'", &user(member))));
        assert!(visits.presence(&stanza("/hidden", "", &user("<item affiliation='none' role='visitor'/>"))));
        assert!(!visits.presence(&Stanza::available()), "of no room");
        assert!(answer.try_recv().is_err());
        let own = "<item affiliation='owner' role='moderator'/><status code='201'/><status code='110'/>";
        assert!(visits.presence(&stanza("/visitor", "", &user(own))));
        let visit = answer.try_recv().unwrap().unwrap();
        assert_eq!((visit.made, visit.affiliation), (true, Affiliation::Owner));
        let nicks: Vec<_> = visit.others.iter().map(|o| (o.nick.as_str(), o.jid.is_some())).collect();
        assert_eq!(nicks, [("alpine", true), ("hidden", false)]);
        assert!(!visits.presence(&stanza("/later", "", &user(member))), "the visit is over");
    }

    #[test]
    fn a_refusal_ends_a_visit_and_so_does_silence() {
        let error =
            "<error type='auth'><registration-required xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>";
        for from in ["/visitor", ""] {
            let (mut visits, mut answer) = begun();
            assert!(visits.presence(&stanza("/somebody", "type='error'", error)));
            assert!(answer.try_recv().is_err(), "an error about somebody else");
            assert!(visits.presence(&stanza(from, "type='error'", error)));
            assert_eq!(answer.try_recv().unwrap(), Err(Refusal::NotMember));
        }
        let (mut visits, mut answer) = begun();
        assert!(visits.late(Instant::now()).is_empty());
        assert!(answer.try_recv().is_err());
        assert_eq!(
            visits.late(Instant::now() + Duration::from_secs(10)),
            [Jid::new("lobby@rooms.x/visitor").unwrap()]
        );
        assert_eq!(answer.try_recv().unwrap(), Err(Refusal::Silent));
    }

    #[test]
    fn visits_are_bounded() {
        let mut visits = Visits::default();
        let mut answers = Vec::new();
        for n in 0..20 {
            let (reply, answer) = oneshot::channel();
            let occupant = Jid::new(&format!("r{n}@rooms.x/v")).unwrap();
            let _ = visits.begin(occupant, Duration::from_secs(9), reply);
            answers.push(answer);
        }
        let open = answers.iter_mut().filter_map(|a| a.try_recv().err()).count();
        assert_eq!(open, VISITS_MAX);
        visits.abandon();
        let ends = answers.iter_mut().map(oneshot::Receiver::try_recv);
        let abandoned = ends.filter(|end| *end == Ok(Err(Refusal::Silent))).count();
        assert_eq!(abandoned, VISITS_MAX);
    }
}
