//! Joining the room and reading its presence.

use std::sync::Arc;

use xmpp_parsers::caps;
use xmpp_parsers::disco::{DiscoInfoResult, Identity};
use xmpp_parsers::hashes::Algo;
use xmpp_parsers::jid::Jid;
use xmpp_parsers::message::Message;
use xmpp_parsers::minidom::Element;
use xmpp_parsers::muc::Muc;
use xmpp_parsers::muc::muc::History;
use xmpp_parsers::presence::{Presence as Stanza, Type};
use xmpp_parsers::version::VersionResult;

use crate::federation::Presence;
use crate::stanza::error::condition_in;
use crate::stanza::{Cloud, ns};
use crate::types::{MemberJid, PeerText};

/// The resource a broker's session has. One per account: a broker that crashed and came back takes
/// the place of its former session at once, instead of standing beside it until that times out.
pub const RESOURCE: &str = "cicada";

/// What a presence stanza from the room says.
#[derive(Debug, Clone, PartialEq)]
pub enum RoomPresence {
    /// Our own, reflected: the join is complete.
    Entered,
    /// As that, of a room that came to be by our entering it.
    Made,
    /// We are out of the room; why.
    Removed(String),
    Member(Presence),
    /// The room does not let us in, or does not know us any more.
    Refused(Refusal),
    Irrelevant,
}

/// What this software is, for XEP-0030 and XEP-0115.
pub fn disco(node: Option<String>) -> DiscoInfoResult {
    let features =
        [ns::DISCO_INFO, xmpp_parsers::ns::CAPS, ns::PING, ns::VERSION, ns::CLOUD, ns::NEGOTIATION, ns::MUC];
    DiscoInfoResult {
        node,
        identities: vec![Identity::new("automation", "broker", "en", "cicada")],
        features: features.iter().map(|s| (*s).to_owned()).collect(),
        extensions: Vec::new(),
    }
}

/// What this software is, for XEP-0092.
pub fn version() -> VersionResult {
    VersionResult { name: "cicada".into(), version: env!("CARGO_PKG_VERSION").into(), os: None }
}

/// Presence that enters the room. To one who is in it already, the room would send everybody's
/// presence again.
pub fn enter(occupant: Jid, cloud: Cloud) -> Stanza {
    update(occupant, cloud).with_payload(Muc::new().with_history(History::new().with_maxstanzas(0)))
}

/// Presence that tells a room we are in what changed.
pub fn update(occupant: Jid, cloud: Cloud) -> Stanza {
    let stanza = Stanza::available().with_to(occupant).with_payload(cloud);
    match caps::hash_caps(&caps::compute_disco(&disco(None)), Algo::Sha_1) {
        Ok(hash) => stanza.with_payload(caps::Caps::new(ns::CAPS_NODE, hash)),
        Err(_) => stanza,
    }
}

pub fn leave(occupant: Jid) -> Stanza {
    Stanza::unavailable().with_to(occupant)
}

/// Why a room lets nobody in, or cannot be looked at.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("this account is not a member of the room")]
    NotMember,
    #[error("this account is banned from the room")]
    Banned,
    #[error("there is no such room")]
    NoRoom,
    /// Some services keep its name closed for weeks.
    #[error("the room was destroyed")]
    Destroyed,
    #[error("there is no such room, and this account may not make it")]
    MayNotMake,
    #[error("there was no such room, and this account may make one: any other might have")]
    Made,
    #[error("the nick is in use by another account")]
    NickTaken,
    #[error("the room asks for a password")]
    Password,
    #[error("the room is full")]
    Full,
    #[error("the room's service is not reachable")]
    Unreachable,
    #[error("what the room's address names is no service for rooms: it answers {0}")]
    NoService(PeerText),
    #[error("the room does not answer")]
    Silent,
    #[error("the room answers {0}")]
    Other(PeerText),
}

impl Refusal {
    /// By the condition of the error that answers the wish to enter (XEP-0045, section 7.2).
    pub fn of(condition: &str) -> Self {
        match condition {
            "registration-required" => Self::NotMember,
            "forbidden" => Self::Banned,
            "item-not-found" => Self::NoRoom,
            "gone" => Self::Destroyed,
            "not-allowed" => Self::MayNotMake,
            "conflict" => Self::NickTaken,
            "not-authorized" => Self::Password,
            "service-unavailable" => Self::Full,
            "remote-server-not-found" | "remote-server-timeout" => Self::Unreachable,
            other => Self::Other(other.into()),
        }
    }

    /// By the condition of the error that answers the question what the room is (XEP-0045, section 6.4).
    pub fn to_look(condition: &str) -> Self {
        match Self::of(condition) {
            known @ (Self::NoRoom | Self::Destroyed | Self::Unreachable) => known,
            _ => Self::NoService(condition.into()),
        }
    }

    /// What helps the account `me`.
    pub fn next_step(&self, me: &MemberJid) -> String {
        match self {
            Self::NotMember | Self::Banned => {
                format!("let the room's owner run: cicada federation add {me}")
            }
            Self::NoRoom | Self::MayNotMake | Self::Made => {
                "let its owner make it with: cicada federation create; or correct [xmpp] room".into()
            }
            Self::Destroyed => {
                "set another [xmpp] room, or let an administrator of the server make this one anew with: \
                 cicada federation create"
                    .into()
            }
            Self::NickTaken => "set another cloud.name, or let the other cloud do so".into(),
            Self::Password => {
                "let the room's owner run: cicada federation create, which takes the password away".into()
            }
            Self::Full => {
                "let the room's owner run: cicada federation create, which lets in as many as the server \
                 allows"
                    .into()
            }
            Self::Unreachable | Self::NoService(_) => {
                "correct [xmpp] room: its domain is the server's service for rooms".into()
            }
            Self::Silent | Self::Other(_) => "see the XMPP server's log".into(),
        }
    }
}

/// Whether a message of the room announces that its configuration changed.
pub fn configuration_changed(message: &Message) -> bool {
    let user = message.payloads.iter().find(|p| p.is("x", ns::MUC_USER));
    // XEP-0045, section 10.2.1: privacy-related or not, and who sees real addresses.
    user.is_some_and(|x| statuses(x).any(|code| matches!(code, "104" | "172" | "173" | "174")))
}

/// Reads a presence from the room, in which `me` is our full JID. `xmpp_parsers`' own type refuses
/// status codes it does not know, so the few parts that matter are taken from the raw element.
pub fn read(stanza: &Stanza, me: &Jid) -> RoomPresence {
    if stanza.type_ == Type::Error {
        let error = stanza.payloads.iter().find(|p| p.name() == "error");
        let condition = error.and_then(condition_in).unwrap_or("an error");
        return RoomPresence::Refused(Refusal::of(condition));
    }
    let Some(user) = stanza.payloads.iter().find(|p| p.is("x", ns::MUC_USER)) else {
        return RoomPresence::Irrelevant;
    };
    let available = stanza.type_ == Type::None;
    if !available && stanza.type_ != Type::Unavailable {
        return RoomPresence::Irrelevant;
    }
    // Every occupant is told so of itself, and ejabberd does not say that it is of itself.
    if !available && user.children().any(|c| c.is("destroy", ns::MUC_USER)) {
        return RoomPresence::Removed("the room was destroyed".into());
    }
    let myself = statuses(user).any(|code| code == "110");
    match (myself, available) {
        (true, true) if statuses(user).any(|code| code == "201") => RoomPresence::Made,
        (true, true) => RoomPresence::Entered,
        (true, false) => RoomPresence::Removed(removal_in_words(user)),
        (false, _) => match occupant(user, available) {
            // Another client of our own account is no other member.
            Some((jid, _)) if jid.as_str() == me.to_bare().as_str() => RoomPresence::Irrelevant,
            Some((jid, resource)) => {
                RoomPresence::Member(Presence { jid, resource, available, cloud: cloud_in(stanza) })
            }
            None => RoomPresence::Irrelevant,
        },
    }
}

/// Whether a member's going means that it is none any more (XEP-0045, sections 9.4 and 9.1).
pub fn is_removal(stanza: &Stanza) -> bool {
    let user = stanza.payloads.iter().find(|p| p.is("x", ns::MUC_USER));
    stanza.type_ == Type::Unavailable
        && user.is_some_and(|x| statuses(x).any(|code| matches!(code, "301" | "321" | "322")))
}

fn cloud_in(stanza: &Stanza) -> Option<Arc<Cloud>> {
    let payload = stanza.payloads.iter().find(|p| p.is("cloud", ns::CLOUD))?;
    Cloud::try_from(payload.clone()).ok().map(Arc::new)
}

pub(super) fn statuses(user: &Element) -> impl Iterator<Item = &str> {
    user.children().filter(|c| c.name() == "status").filter_map(|c| c.attr("code"))
}

/// XEP-0045, section 15.6.2.
fn removal_in_words(user: &Element) -> String {
    let why = statuses(user).find_map(|code| match code {
        "301" => Some("we were banned from the room"),
        "307" => Some("we were thrown out of the room"),
        "321" => Some("this account is no member of the room any more"),
        "322" => Some("the room became members-only, and this account is no member"),
        "332" => Some("the room's service shuts down"),
        "333" => Some("the room's service lost us"),
        _ => None,
    });
    why.unwrap_or("we are out of the room").to_owned()
}

/// The real address behind an occupant. Somebody may be in the room as an account's second session
/// under the same nick: of several, the broker's counts.
fn occupant(user: &Element, available: bool) -> Option<(MemberJid, String)> {
    let items = user.children().filter(|c| c.name() == "item" && (!available || is_member(c)));
    let mut sessions: Vec<_> = items.filter_map(|item| real_jid(item.attr("jid")?)).collect();
    let broker = sessions.iter().position(|(_, resource)| resource == RESOURCE).unwrap_or(0);
    (!sessions.is_empty()).then(|| sessions.swap_remove(broker))
}

fn is_member(item: &Element) -> bool {
    matches!(item.attr("affiliation"), Some("member" | "admin" | "owner"))
}

fn real_jid(text: &str) -> Option<(MemberJid, String)> {
    let jid = Jid::new(text).ok()?;
    let resource = jid.resource()?.as_str().to_owned();
    Some((jid.to_bare().to_string().parse().ok()?, resource))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stanza(payload: &str, kind: &str) -> Stanza {
        let text = format!("<presence xmlns='jabber:client' from='room@r/nick' {kind}>{payload}</presence>");
        Stanza::try_from(text.parse::<Element>().unwrap()).unwrap()
    }

    fn of_room(items: &str, kind: &str) -> RoomPresence {
        let user = format!("<x xmlns='http://jabber.org/protocol/muc#user'>{items}</x>");
        let cloud = "<cloud xmlns='urn:cicada:cloud:1' name='n' key='k' versions='1' power='on'/>";
        read(&stanza(&format!("{user}{cloud}"), kind), &Jid::new("me@example.org/cicada").unwrap())
    }

    #[test]
    fn the_real_jid_counts_and_unknown_status_codes_do_not_harm() {
        let presence = of_room(
            "<item affiliation='member' role='participant' jid='A@Example.org/cicada'/><status code='9999'/>",
            "",
        );
        let RoomPresence::Member(member) = presence else { panic!("{presence:?}") };
        assert_eq!((member.jid.as_str(), member.resource.as_str()), ("a@example.org", "cicada"));
        assert!(member.available && member.cloud.is_some());
    }

    #[test]
    fn of_several_sessions_under_one_nick_the_brokers_counts() {
        let items = "<item affiliation='member' role='participant' jid='a@example.org/phone'/>\
                     <item affiliation='member' role='participant' jid='a@example.org/cicada'/>";
        let RoomPresence::Member(member) = of_room(items, "") else { panic!() };
        assert_eq!(member.resource, RESOURCE);
    }

    #[test]
    fn who_has_no_address_or_affiliation_is_nobody() {
        for item in [
            "<item affiliation='member' role='participant'/>",
            "<item affiliation='none' role='participant' jid='a@example.org/cicada'/>",
            "<item affiliation='member' role='participant' jid='a@example.org'/>",
            "<item affiliation='member' role='participant' jid='me@example.org/phone'/>",
            "",
        ] {
            assert_eq!(of_room(item, ""), RoomPresence::Irrelevant, "{item}");
        }
        let gone = of_room(
            "<item affiliation='none' role='none' jid='a@example.org/cicada'/>",
            "type='unavailable'",
        );
        assert!(matches!(gone, RoomPresence::Member(Presence { available: false, .. })), "{gone:?}");
    }

    #[test]
    fn our_own_coming_and_going() {
        let item =
            "<item affiliation='member' role='participant' jid='me@example.org/cicada'/><status code='110'/>";
        assert_eq!(of_room(item, ""), RoomPresence::Entered);
        assert_eq!(of_room(&format!("{item}<status code='201'/>"), ""), RoomPresence::Made);
        let destroyed = "<destroy/><item affiliation='none' role='none'/>";
        assert_eq!(
            of_room(destroyed, "type='unavailable'"),
            RoomPresence::Removed("the room was destroyed".into())
        );
        let removed = of_room(&format!("{item}<status code='321'/>"), "type='unavailable'");
        assert_eq!(removed, RoomPresence::Removed("this account is no member of the room any more".into()));
    }

    #[test]
    fn going_and_being_removed_are_two_things() {
        let going = |status: &str, kind: &str| {
            let item = format!("<item affiliation='none' role='none' jid='a@example.org/cicada'/>{status}");
            let user = format!("<x xmlns='http://jabber.org/protocol/muc#user'>{item}</x>");
            is_removal(&stanza(&user, kind))
        };
        for code in ["301", "321", "322"] {
            assert!(going(&format!("<status code='{code}'/>"), "type='unavailable'"), "{code}");
        }
        assert!(!going("", "type='unavailable'"));
        assert!(!going("<status code='307'/>", "type='unavailable'"), "who was thrown out may come back");
        assert!(!going("<status code='321'/>", ""));
    }

    #[test]
    fn refusals_are_told_in_words() {
        let p = stanza(
            "<error type='auth'><registration-required xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>",
            "type='error'",
        );
        let me = Jid::new("me@example.org/cicada").unwrap();
        assert_eq!(read(&p, &me), RoomPresence::Refused(Refusal::NotMember));
        assert_eq!(Refusal::NotMember.to_string(), "this account is not a member of the room");
        // Asked what it is, a service that knows rooms says so or that there is none; all else is no service.
        assert_eq!(Refusal::to_look("item-not-found"), Refusal::NoRoom);
        assert_eq!(Refusal::to_look("forbidden"), Refusal::NoService("forbidden".into()));
        let me: MemberJid = "me@example.org".parse().unwrap();
        let add = "let the room's owner run: cicada federation add me@example.org";
        assert_eq!(
            (Refusal::of("forbidden").next_step(&me).as_str(), Refusal::NotMember.next_step(&me).as_str()),
            (add, add)
        );
    }

    #[test]
    fn a_changed_configuration_is_noticed() {
        let message = |code: &str| {
            let text = format!(
                "<message xmlns='jabber:client' type='groupchat'><x xmlns='http://jabber.org/protocol/muc#user'>\
                 <status code='{code}'/></x></message>"
            );
            Message::try_from(text.parse::<Element>().unwrap()).unwrap()
        };
        assert!(configuration_changed(&message("173")));
        assert!(!configuration_changed(&message("100")));
    }
}
