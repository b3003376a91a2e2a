//! Joining the room and reading its presence.

use xmpp_parsers::caps;
use xmpp_parsers::disco::{DiscoInfoResult, Identity};
use xmpp_parsers::hashes::Algo;
use xmpp_parsers::jid::Jid;
use xmpp_parsers::minidom::Element;
use xmpp_parsers::muc::Muc;
use xmpp_parsers::muc::muc::History;
use xmpp_parsers::presence::{Presence as Stanza, Type};

use crate::federation::Presence;
use crate::stanza::{Cloud, ns};
use crate::types::MemberJid;

/// Features a room must have; without them outsiders could listen, or members hide.
const REQUIRED: [&str; 2] = ["muc_membersonly", "muc_nonanonymous"];

/// What a presence stanza from the room says.
#[derive(Debug, Clone, PartialEq)]
pub enum RoomPresence {
    /// Our own, reflected: the join is complete.
    Myself(Option<Presence>),
    Member(Presence),
    /// The room does not let us in.
    Refused(String),
    Irrelevant,
}

/// What this software is, for XEP-0030 and XEP-0115.
pub fn disco(node: Option<String>) -> DiscoInfoResult {
    DiscoInfoResult {
        node,
        identities: vec![Identity::new("automation", "broker", "en", "cicada")],
        features: [ns::DISCO_INFO, xmpp_parsers::ns::CAPS, ns::PING, ns::CLOUD, ns::NEGOTIATION, ns::MUC]
            .iter()
            .map(|s| (*s).to_owned())
            .collect(),
        extensions: Vec::new(),
    }
}

/// Presence to the room, with the payload.
pub fn presence(occupant: Jid, cloud: Cloud) -> Stanza {
    let mut stanza = Stanza::available()
        .with_to(occupant)
        .with_payload(Muc::new().with_history(History::new().with_maxstanzas(0)))
        .with_payload(cloud);
    if let Ok(hash) = caps::hash_caps(&caps::compute_disco(&disco(None)), Algo::Sha_1) {
        stanza = stanza.with_payload(caps::Caps::new(ns::CAPS_NODE, hash));
    }
    stanza
}

pub fn leave(occupant: Jid) -> Stanza {
    Stanza::unavailable().with_to(occupant)
}

/// Why a room of these features must not be used; `None` if it may.
pub fn fault(features: &DiscoInfoResult) -> Option<String> {
    let lacking: Vec<_> = REQUIRED.iter().filter(|f| !features.features.contains(**f)).copied().collect();
    if lacking.is_empty() {
        return None;
    }
    let words = lacking.iter().map(|f| match *f {
        "muc_membersonly" => "not members-only",
        _ => "anonymous",
    });
    Some(format!("the room is {}", words.collect::<Vec<_>>().join(" and ")))
}

/// Reads a presence from the room. `xmpp_parsers`' own type refuses status codes it does not know,
/// so the few parts that matter are taken from the raw element.
pub fn read(stanza: &Stanza) -> RoomPresence {
    if stanza.type_ == Type::Error {
        let error = stanza.payloads.iter().find(|p| p.name() == "error");
        let condition = error.and_then(|e| e.children().find(|c| c.name() != "text").map(|c| c.name().to_owned()));
        return RoomPresence::Refused(match condition.as_deref() {
            Some("registration-required") => "this account is not a member of the room".into(),
            Some("forbidden") => "this account is banned from the room".into(),
            Some("item-not-found") => "there is no such room".into(),
            Some("conflict") => "the nick is in use by another account".into(),
            Some(other) => format!("the room answers {other}"),
            None => "the room answers with an error".into(),
        });
    }
    let Some(user) = stanza.payloads.iter().find(|p| p.is("x", ns::MUC_USER)) else { return RoomPresence::Irrelevant };
    let myself = user.children().any(|c| c.name() == "status" && c.attr("code") == Some("110"));
    let presence = real_jid(user).map(|(jid, resource)| Presence {
        jid,
        resource,
        available: stanza.type_ != Type::Unavailable,
        cloud: stanza.payloads.iter().find(|p| p.is("cloud", ns::CLOUD)).and_then(|p| Cloud::try_from(p.clone()).ok()),
    });
    match presence {
        p if myself => RoomPresence::Myself(p),
        Some(p) => RoomPresence::Member(p),
        None => RoomPresence::Irrelevant,
    }
}

fn real_jid(user: &Element) -> Option<(MemberJid, String)> {
    let item = user.children().find(|c| c.name() == "item")?;
    let jid = Jid::new(item.attr("jid")?).ok()?;
    let resource = jid.resource()?.as_str().to_owned();
    Some((jid.to_bare().to_string().parse().ok()?, resource))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stanza(text: &str) -> Stanza {
        Stanza::try_from(text.parse::<Element>().unwrap()).unwrap()
    }

    #[test]
    fn the_real_jid_counts_and_unknown_status_codes_do_not_harm() {
        let p = stanza(
            "<presence xmlns='jabber:client' from='room@r/nick'><x xmlns='http://jabber.org/protocol/muc#user'>\
             <item affiliation='member' role='participant' jid='A@Example.org/broker'/><status code='9999'/></x>\
             <cloud xmlns='urn:cicada:cloud:1' name='n' key='k' versions='1' power='on'/></presence>",
        );
        let RoomPresence::Member(member) = read(&p) else { panic!("{:?}", read(&p)) };
        assert_eq!((member.jid.as_str(), member.resource.as_str(), member.available), ("a@example.org", "broker", true));
        assert!(member.cloud.is_some());
    }

    #[test]
    fn refusals_are_told_in_words() {
        let p = stanza(
            "<presence xmlns='jabber:client' from='room@r/nick' type='error'><error type='auth'>\
             <registration-required xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error></presence>",
        );
        assert_eq!(read(&p), RoomPresence::Refused("this account is not a member of the room".into()));
        let open = DiscoInfoResult { node: None, identities: vec![], features: Default::default(), extensions: vec![] };
        assert_eq!(fault(&open).unwrap(), "the room is not members-only and anonymous");
    }
}
