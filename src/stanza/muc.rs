//! The parts of XEP-0045 that administer a room.

use std::borrow::Cow;

use xmpp_parsers::data_forms::DataForm;
use xmpp_parsers::iq::{IqGetPayload, IqResultPayload, IqSetPayload};
use xmpp_parsers::jid::BareJid;
use xso::error::Error;
use xso::{AsXml, AsXmlText, FromXml, FromXmlText};

use super::ns;

/// Room configuration (section 10).
#[derive(FromXml, AsXml, Debug, Clone, PartialEq)]
#[xml(namespace = ns::MUC_OWNER, name = "query")]
pub struct OwnerQuery {
    #[xml(child(default))]
    pub form: Option<DataForm>,
}

impl IqGetPayload for OwnerQuery {}
impl IqSetPayload for OwnerQuery {}
impl IqResultPayload for OwnerQuery {}

/// An owner's wish that the room be no more (section 10.9).
#[derive(AsXml, Debug, Clone, PartialEq, Default)]
#[xml(namespace = ns::MUC_OWNER, name = "query")]
pub struct DestroyQuery {
    #[xml(child)]
    destroy: Destroy,
}

#[derive(AsXml, Debug, Clone, PartialEq, Default)]
#[xml(namespace = ns::MUC_OWNER, name = "destroy")]
struct Destroy;

/// Affiliations (section 9.5).
#[derive(FromXml, AsXml, Debug, Clone, PartialEq)]
#[xml(namespace = ns::MUC_ADMIN, name = "query")]
pub struct AdminQuery {
    #[xml(child(n = ..))]
    pub items: Vec<AdminItem>,
}

impl IqGetPayload for AdminQuery {}
impl IqSetPayload for AdminQuery {}
impl IqResultPayload for AdminQuery {}

#[derive(FromXml, AsXml, Debug, Clone, PartialEq)]
#[xml(namespace = ns::MUC_ADMIN, name = "item")]
pub struct AdminItem {
    #[xml(attribute)]
    pub affiliation: Affiliation,
    #[xml(attribute(default))]
    pub jid: Option<BareJid>,
}

/// What an account is to a room (section 5.2). Unlike in `xmpp_parsers`, `none` is spelled out: that
/// is how a member is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Affiliation {
    Owner,
    Admin,
    Member,
    Outcast,
    None,
}

impl Affiliation {
    pub const ALL: [Self; 5] = [Self::Owner, Self::Admin, Self::Member, Self::Outcast, Self::None];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Owner => "owner",
            Self::Admin => "admin",
            Self::Member => "member",
            Self::Outcast => "outcast",
            Self::None => "none",
        }
    }
}

impl AsXmlText for Affiliation {
    fn as_xml_text(&self) -> Result<Cow<'_, str>, Error> {
        Ok(Cow::Borrowed(self.as_str()))
    }
}

impl FromXmlText for Affiliation {
    fn from_xml_text(text: String) -> Result<Self, Error> {
        let found = Self::ALL.into_iter().find(|a| a.as_str() == text);
        found.ok_or(Error::Other("unknown affiliation"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xmpp_parsers::minidom::Element;

    #[test]
    fn affiliation_lists_are_read_whatever_else_they_hold() {
        let text = "<query xmlns='http://jabber.org/protocol/muc#admin'>\
                    <item affiliation='owner' jid='admin@example.org' nick='x'><reason>r</reason></item>\
                    <item affiliation='member' jid='a@example.org'/><later xmlns='urn:x'/></query>";
        let query = AdminQuery::try_from(text.parse::<Element>().unwrap()).unwrap();
        let read: Vec<_> = query.items.iter().map(|i| i.affiliation).collect();
        assert_eq!(read, [Affiliation::Owner, Affiliation::Member]);
        for affiliation in Affiliation::ALL {
            let element = Element::from(AdminQuery { items: vec![AdminItem { affiliation, jid: None }] });
            let item = element.children().next().unwrap();
            assert_eq!(item.attr("affiliation"), Some(affiliation.as_str()));
        }
    }

    #[test]
    fn a_room_is_destroyed_in_its_owners_words() {
        let element = Element::from(DestroyQuery::default());
        assert!(element.is("query", ns::MUC_OWNER) && element.has_child("destroy", ns::MUC_OWNER));
    }

    #[test]
    fn a_room_without_a_form_is_read_as_such() {
        let text = "<query xmlns='http://jabber.org/protocol/muc#owner'/>";
        assert_eq!(OwnerQuery::try_from(text.parse::<Element>().unwrap()).unwrap().form, None);
    }
}
