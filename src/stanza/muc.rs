//! The parts of XEP-0045 that administer a room.

use xmpp_parsers::data_forms::DataForm;
use xmpp_parsers::iq::{IqGetPayload, IqResultPayload, IqSetPayload};
use xmpp_parsers::jid::BareJid;
use xmpp_parsers::muc::user::Affiliation;
use xso::{AsXml, FromXml};

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
        let read: Vec<_> = query.items.iter().map(|i| i.affiliation.clone()).collect();
        assert_eq!(read, [Affiliation::Owner, Affiliation::Member]);
        let ask = AdminQuery { items: vec![AdminItem { affiliation: Affiliation::Member, jid: None }] };
        let element = Element::from(ask);
        assert_eq!(element.children().next().and_then(|i| i.attr("affiliation")), Some("member"));
    }

    #[test]
    fn a_room_without_a_form_is_read_as_such() {
        let text = "<query xmlns='http://jabber.org/protocol/muc#owner'/>";
        assert_eq!(OwnerQuery::try_from(text.parse::<Element>().unwrap()).unwrap().form, None);
    }
}
