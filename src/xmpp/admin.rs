//! Making and keeping a federation's room, with the account that owns it.

use xmpp_parsers::data_forms::{DataForm, DataFormType, Field, FieldType};
use xmpp_parsers::disco::{DiscoInfoQuery, DiscoInfoResult};
use xmpp_parsers::jid::{BareJid, Jid};
use xmpp_parsers::minidom::Element;
use xmpp_parsers::muc::Muc;
use xmpp_parsers::presence::Presence;

use crate::stanza::muc::{AdminItem, AdminQuery, Affiliation, OwnerQuery};
use crate::stanza::ns;
use crate::types::MemberJid;

use super::handle::{Handle, IqReply, RequestError, Settings, XmppEvent};
use super::room;
use super::session::connect;

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
    #[error(
        "the server took the configuration, but {0}; its room service may not allow what a federation needs"
    )]
    NotTaken(String),
}

/// Options of a federation's room. The last ones have no name that all servers share, and are set
/// where the room offers them.
const OPTIONS: [(&str, &str, bool); 8] = [
    ("muc#roomconfig_membersonly", "1", true),
    ("muc#roomconfig_whois", "anyone", true),
    ("muc#roomconfig_persistentroom", "1", true),
    ("muc#roomconfig_publicroom", "0", false),
    ("muc#roomconfig_allowinvites", "0", false),
    ("{http://prosody.im/protocol/muc}roomconfig_allowmemberinvites", "0", false),
    ("muc#roomconfig_changesubject", "0", false),
    ("muc#roomconfig_historylength", "0", false),
];
const OPTION_NAME: &str = "muc#roomconfig_roomname";

/// An owner's session.
pub struct Admin {
    handle: Handle,
    room: Jid,
}

impl Admin {
    /// Logs in. `settings.room` names the room. The first failure is the answer: nothing is tried again.
    pub async fn open(mut settings: Settings) -> Result<Self, AdminError> {
        let text = settings.room.take().unwrap_or_default();
        let room = BareJid::new(&text).ok().filter(|j| j.node().is_some()).ok_or(AdminError::Room(text))?;
        let (handle, mut events) = connect(settings).map_err(AdminError::Connect)?;
        let failed = |reason: String| {
            let kind = match handle.login_was_refused() {
                true => std::io::ErrorKind::PermissionDenied,
                false => std::io::ErrorKind::Other,
            };
            AdminError::Connect(std::io::Error::new(kind, reason))
        };
        loop {
            match events.recv().await {
                Some(XmppEvent::Joined) => break,
                Some(XmppEvent::Down(reason)) => return Err(failed(reason)),
                Some(_) => {}
                None => return Err(failed("the session ended".into())),
            }
        }
        // The session waits for its reader. What happens to it shows in what is asked of it.
        tokio::spawn(async move { while events.recv().await.is_some() {} });
        Ok(Self { handle, room: room.into() })
    }

    async fn ask(
        &self,
        what: &str,
        set: bool,
        payload: impl Into<Element>,
    ) -> Result<Option<Element>, AdminError> {
        let answer: IqReply = self.handle.iq(self.room.clone(), set, payload).await;
        answer.map_err(|source| AdminError::Request { what: what.to_owned(), source })
    }

    /// Makes the room, or makes an existing one what a federation needs, and sees that it is.
    pub async fn create_room(&self, name: &str) -> Result<(), AdminError> {
        // A room begins to exist when somebody enters it. The nick is nobody's.
        let nick = format!("owner-{}", uuid::Uuid::new_v4().simple());
        let occupant =
            Jid::new(&format!("{}/{nick}", self.room)).map_err(|e| AdminError::Room(e.to_string()))?;
        self.handle.send(Presence::available().with_to(occupant.clone()).with_payload(Muc::new())).await;
        let configured = self.configure(name).await;
        self.handle.send(room::leave(occupant)).await;
        configured
    }

    async fn configure(&self, name: &str) -> Result<(), AdminError> {
        let form = self.ask("read the room's options", false, OwnerQuery { form: None }).await?;
        let offered: Vec<_> = form
            .and_then(|e| OwnerQuery::try_from(e).ok()?.form)
            .map(|form| form.fields.into_iter().filter_map(|f| f.var).collect())
            .unwrap_or_default();
        let form = DataForm::new(DataFormType::Submit, ns::MUC_ROOM_CONFIG, fields(name, &offered));
        self.ask("configure the room", true, OwnerQuery { form: Some(form) }).await?;
        self.room_fault().await?.map_or(Ok(()), |fault| Err(AdminError::NotTaken(fault)))
    }

    /// What the room lacks of what a federation needs; nothing if it is one for it.
    pub async fn room_fault(&self) -> Result<Option<String>, AdminError> {
        let features =
            self.ask("read the room's configuration", false, DiscoInfoQuery { node: None }).await?;
        Ok(match features.and_then(|e| DiscoInfoResult::try_from(e).ok()) {
            Some(features) => room::fault(&features),
            None => Some("the room does not tell its configuration".into()),
        })
    }

    /// Whether this account's server reaches one of that domain.
    pub async fn answers(&self, domain: &str) -> Result<(), AdminError> {
        let to = Jid::new(domain).map_err(|e| AdminError::Room(e.to_string()))?;
        match self.handle.iq(to, false, DiscoInfoQuery { node: None }).await {
            // It is there, and does not tell what it is.
            Err(RequestError::Refused { condition, .. })
                if matches!(
                    condition.as_str(),
                    "forbidden" | "not-authorized" | "feature-not-implemented"
                ) =>
            {
                Ok(())
            }
            answer => answer
                .map(drop)
                .map_err(|source| AdminError::Request { what: format!("reach {domain}"), source }),
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
    async fn affiliate(
        &self,
        member: &MemberJid,
        affiliation: Affiliation,
        verb: &str,
    ) -> Result<(), AdminError> {
        let jid = BareJid::new(member.as_str()).ok();
        let query = AdminQuery { items: vec![AdminItem { affiliation, jid }] };
        self.ask(&format!("{verb} member {member}"), true, query).await.map(drop)
    }

    /// Members and owners, with their affiliation.
    pub async fn list_members(&self) -> Result<Vec<(MemberJid, String)>, AdminError> {
        let mut out = Vec::new();
        for affiliation in [Affiliation::Owner, Affiliation::Admin, Affiliation::Member] {
            let query = AdminQuery { items: vec![AdminItem { affiliation, jid: None }] };
            let answer = self.ask("list members", false, query).await?;
            let items =
                answer.and_then(|e| AdminQuery::try_from(e).ok()).map(|q| q.items).unwrap_or_default();
            let jids = items.into_iter().filter_map(|i| i.jid.and_then(|j| j.to_string().parse().ok()));
            out.extend(jids.map(|jid| (jid, affiliation.as_str().to_owned())));
        }
        Ok(out)
    }

    pub async fn close(self) {
        self.handle.close().await;
    }
}

fn fields(name: &str, offered: &[String]) -> Vec<Field> {
    let field = |var: &str, value: &str| Field::new(var, FieldType::TextSingle).with_value(value);
    let is_offered = |var: &str| offered.iter().any(|o| o == var);
    let options = OPTIONS.iter().filter(|(var, _, required)| *required || is_offered(var));
    let name = Some(field(OPTION_NAME, name)).filter(|_| is_offered(OPTION_NAME));
    options.map(|(var, value, _)| field(var, value)).chain(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_a_federation_is_always_asked_for_the_rest_where_offered() {
        let vars = |offered: &[&str]| -> Vec<_> {
            let offered: Vec<_> = offered.iter().map(|o| (*o).to_owned()).collect();
            fields("lobby", &offered).into_iter().filter_map(|f| f.var).collect()
        };
        assert_eq!(vars(&[]).len(), 3);
        let some = vars(&["muc#roomconfig_roomname", "muc#roomconfig_allowinvites", "muc#roomconfig_pubsub"]);
        assert_eq!(some[3..], ["muc#roomconfig_allowinvites", "muc#roomconfig_roomname"]);
    }
}
