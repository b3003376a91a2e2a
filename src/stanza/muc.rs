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
