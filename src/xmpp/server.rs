//! Which software serves a room, and what its administrator sets there. Told by the server itself, so it
//! serves for advice alone.

use std::fmt;

use xmpp_parsers::disco::DiscoInfoResult;
use xmpp_parsers::minidom::Element;

use crate::stanza::ns;
use crate::types::PeerText;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Software {
    /// 0.12 or before.
    Prosody,
    /// 13 or later: administrators do not own rooms any more.
    Prosody13,
    Ejabberd,
    Other,
}

/// The software, and how it names itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    pub software: Software,
    name: PeerText,
    version: PeerText,
}

impl Server {
    pub fn unknown() -> Self {
        Self { software: Software::Other, name: "an unknown server".into(), version: "".into() }
    }

    /// By its answer to XEP-0092.
    pub fn by_version(answer: &Element) -> Option<Self> {
        let text = |name: &str| answer.get_child(name, ns::VERSION).map(|e| PeerText::from(e.text()));
        Some(Self::named(text("name")?, text("version").unwrap_or_default()))
    }

    /// By the name of its identity (XEP-0030), which tells no version.
    pub fn by_identity(answer: &DiscoInfoResult) -> Option<Self> {
        let identity = answer.identities.iter().find(|i| i.category == "server")?;
        Some(Self::named(PeerText::from(identity.name.clone()?), PeerText::default()))
    }

    fn named(name: PeerText, version: PeerText) -> Self {
        let major = version.as_str().split('.').next().and_then(|n| n.parse::<u32>().ok());
        let software = match name.as_str().to_ascii_lowercase().as_str() {
            "prosody" if major == Some(0) => Software::Prosody,
            // What tells no number is newer than what does not need one.
            "prosody" => Software::Prosody13,
            "ejabberd" => Software::Ejabberd,
            _ => Software::Other,
        };
        Self { software, name, version }
    }

    /// How to let administrators alone make rooms at this service.
    pub fn restrict_room_making(&self, service: &str) -> String {
        match self.software {
            Software::Prosody => {
                format!("set restrict_room_creation = true in the Component \"{service}\" of prosody.cfg.lua")
            }
            Software::Prosody13 => format!(
                "set restrict_room_creation = true in the Component \"{service}\" of prosody.cfg.lua: 13 does not know \
                 0.12's \"admin\", and takes it for everybody"
            ),
            Software::Ejabberd => {
                "in ejabberd.yml, give mod_muc an access_create that only administrators have \
                                   (deploy/xmpp/ejabberd.yml.in shows one)"
                    .into()
            }
            Software::Other => {
                format!("let the server's administrator allow the making of rooms at {service} to few")
            }
        }
    }

    /// Which account makes rooms there.
    pub fn who_makes_rooms(&self) -> &'static str {
        match self.software {
            Software::Prosody | Software::Prosody13 => {
                "name one of the server's admins (prosody.cfg.lua) with --owner-jid and --owner-password-file"
            }
            Software::Ejabberd => {
                "name an account that mod_muc's access_create allows (ejabberd.yml) with --owner-jid and \
                 --owner-password-file"
            }
            Software::Other => {
                "name an account that may make rooms there with --owner-jid and --owner-password-file"
            }
        }
    }

    /// How an account comes to own a room that is there.
    pub fn become_owner(&self, room: &str, account: &str) -> String {
        let (node, service) = room.split_once('@').unwrap_or((room, ""));
        match self.software {
            Software::Prosody | Software::Prosody13 => {
                "name an owner of the room, or one of the server's admins (they \
                 make themselves owners), with --owner-jid and --owner-password-file"
                    .into()
            }
            Software::Ejabberd => format!(
                "name an owner of the room, or an account that mod_muc's access_admin allows, with --owner-jid and \
                 --owner-password-file; or let an administrator run: ejabberdctl set_room_affiliation {node} {service} \
                 {account} owner"
            ),
            Software::Other => "name an owner of the room with --owner-jid and --owner-password-file".into(),
        }
    }

    /// How rooms begin as those of a federation, where they are open until their maker has configured them.
    pub fn begin_closed(&self, service: &str) -> String {
        match self.software {
            Software::Ejabberd => {
                "set default_room_options of mod_muc as deploy/xmpp/ejabberd.yml.in does".into()
            }
            _ => format!(
                "set muc_room_locking = true or muc_room_default_members_only = true for {service}, as \
                 deploy/xmpp/prosody.cfg.lua.in does"
            ),
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name)?;
        if self.version.is_empty() { Ok(()) } else { write!(f, " {}", self.version) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(name: &str, version: &str) -> Server {
        let text = format!(
            "<query xmlns='jabber:iq:version'><name>{name}</name><version>{version}</version><os>Linux</os></query>"
        );
        Server::by_version(&text.parse().unwrap()).unwrap()
    }

    #[test]
    fn the_software_is_told_by_its_own_words() {
        assert_eq!(told("Prosody", "0.12.3").software, Software::Prosody);
        assert_eq!(told("Prosody", "13.0.1").software, Software::Prosody13);
        assert_eq!(told("Prosody", "trunk nightly build 2041").software, Software::Prosody13);
        assert_eq!(told("ejabberd", "24.12-3+deb13u2").software, Software::Ejabberd);
        assert_eq!(told("Openfire", "4.9.2").software, Software::Other);
        assert_eq!(told("Prosody", "13.0.1").to_string(), "Prosody 13.0.1");
        assert_eq!(told("evil\n[31m", "").to_string(), PeerText::from("evil\n[31m").to_string());
        let bare: Element = "<query xmlns='jabber:iq:version'/>".parse().unwrap();
        assert_eq!(Server::by_version(&bare), None);
    }

    #[test]
    fn every_software_has_its_own_advice() {
        let all =
            [told("Prosody", "0.12.3"), told("Prosody", "13.0.1"), told("ejabberd", "1"), told("x", "1")];
        let advice: Vec<_> = all.iter().map(|s| s.restrict_room_making("rooms.x")).collect();
        assert!(advice.iter().enumerate().all(|(n, a)| !advice[..n].contains(a)), "{advice:?}");
        assert!(all[2].become_owner("lobby@rooms.x", "a@x").contains("lobby rooms.x a@x owner"));
    }
}
