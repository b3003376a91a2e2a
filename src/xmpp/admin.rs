//! Making and keeping a federation's room, with the account that owns it.

use xmpp_parsers::data_forms::{DataForm, DataFormType, Field, FieldType};
use xmpp_parsers::disco::{DiscoInfoQuery, DiscoInfoResult};
use xmpp_parsers::jid::{BareJid, Jid};
use xmpp_parsers::minidom::Element;
use xmpp_parsers::muc::Muc;
use xmpp_parsers::muc::user::Affiliation;

use crate::stanza::muc::{AdminItem, AdminQuery, OwnerQuery};
use crate::stanza::ns;
use crate::types::MemberJid;

use super::room;
use super::session::{Handle, RequestError, Settings, connect};

#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error("cannot connect to the XMPP server")]
    Connect(#[source] std::io::Error),
    #[error("'{0}' is no address of a room: write name@rooms.example.org")]
    Room(String),
    #[error("cannot {what}")]
    Request {
        what: String,
        #[source]
        source: RequestError,
    },
    #[error("the server took the configuration, but {0}; its room service may not allow what a federation needs")]
    NotTaken(String),
}

/// An owner's session.
pub struct Admin {
    handle: Handle,
    room: Jid,
    nick: String,
}

impl Admin {
    /// `settings.room` names the room.
    pub async fn open(mut settings: Settings) -> Result<Self, AdminError> {
        let text = settings.room.take().unwrap_or_default();
        let room = BareJid::new(&text).ok().filter(|j| j.node().is_some()).ok_or(AdminError::Room(text))?;
        let nick = settings.nick.to_string();
        let (handle, mut events) = connect(settings).map_err(AdminError::Connect)?;
        // Failures of the link come as events; the first request waits for the link itself.
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                if let super::XmppEvent::Down(reason) = event {
                    tracing::warn!(reason, "XMPP");
                }
            }
        });
        Ok(Self { handle, room: room.into(), nick })
    }

    async fn ask(&self, what: &str, set: bool, payload: impl Into<Element>) -> Result<Option<Element>, AdminError> {
        let answer = self.handle.iq(self.room.clone(), set, payload).await;
        answer.map_err(|source| AdminError::Request { what: what.to_owned(), source })
    }

    /// Makes the room, or makes an existing one what a federation needs, and sees that it is.
    pub async fn create_room(&self, name: &str) -> Result<(), AdminError> {
        // A room begins to exist when somebody enters it.
        let occupant = Jid::new(&format!("{}/{}", self.room, self.nick)).map_err(|e| AdminError::Room(e.to_string()))?;
        let enter = xmpp_parsers::presence::Presence::available().with_to(occupant.clone()).with_payload(Muc::new());
        self.handle.send(enter).await;
        let field = |var: &str, value: &str| Field::new(var, FieldType::TextSingle).with_value(value);
        let fields = vec![
            field("muc#roomconfig_roomname", name),
            field("muc#roomconfig_persistentroom", "1"),
            field("muc#roomconfig_membersonly", "1"),
            field("muc#roomconfig_whois", "anyone"),
            field("muc#roomconfig_publicroom", "0"),
            field("muc#roomconfig_allowinvites", "0"),
            field("muc#roomconfig_changesubject", "0"),
            field("muc#roomconfig_historylength", "0"),
        ];
        let form = DataForm::new(DataFormType::Submit, ns::MUC_ROOM_CONFIG, fields);
        self.ask("configure the room", true, OwnerQuery { form: Some(form) }).await?;
        let features = self.ask("read the room's configuration", false, DiscoInfoQuery { node: None }).await?;
        let fault = features.and_then(|e| DiscoInfoResult::try_from(e).ok()).map(|f| room::fault(&f));
        self.handle.send(room::leave(occupant)).await;
        match fault {
            Some(None) => Ok(()),
            Some(Some(fault)) => Err(AdminError::NotTaken(fault)),
            None => Err(AdminError::NotTaken("the room does not tell its configuration".into())),
        }
    }

    pub async fn add_member(&self, member: &MemberJid) -> Result<(), AdminError> {
        self.affiliate(member, Affiliation::Member, "add").await
    }

    /// Removes a member; one that is in the room is thrown out.
    pub async fn remove_member(&self, member: &MemberJid) -> Result<(), AdminError> {
        self.affiliate(member, Affiliation::None, "remove").await
    }

    // One IQ a member: some servers apply only the first item of several.
    async fn affiliate(&self, member: &MemberJid, affiliation: Affiliation, verb: &str) -> Result<(), AdminError> {
        let jid = BareJid::new(member.as_str()).ok();
        let query = AdminQuery { items: vec![AdminItem { affiliation, jid }] };
        self.ask(&format!("{verb} member {member}"), true, query).await.map(drop)
    }

    /// Members and owners, with their affiliation.
    pub async fn list_members(&self) -> Result<Vec<(MemberJid, String)>, AdminError> {
        let mut out = Vec::new();
        for (affiliation, name) in [(Affiliation::Owner, "owner"), (Affiliation::Admin, "admin"), (Affiliation::Member, "member")] {
            let query = AdminQuery { items: vec![AdminItem { affiliation, jid: None }] };
            let answer = self.ask("list members", false, query).await?;
            let items = answer.and_then(|e| AdminQuery::try_from(e).ok()).map(|q| q.items).unwrap_or_default();
            let jids = items.into_iter().filter_map(|i| i.jid.and_then(|j| j.to_string().parse().ok()));
            out.extend(jids.map(|jid| (jid, name.to_owned())));
        }
        Ok(out)
    }

    pub async fn close(self) {
        self.handle.close().await;
    }
}
