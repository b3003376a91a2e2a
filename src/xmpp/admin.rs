//! Making and keeping a federation's room, with the account that owns it.

use std::sync::atomic::{AtomicBool, Ordering};

use xmpp_parsers::data_forms::{DataForm, DataFormType};
use xmpp_parsers::disco::DiscoInfoQuery;
use xmpp_parsers::jid::{BareJid, Jid};
use xmpp_parsers::minidom::Element;

use crate::stanza::muc::{AdminItem, AdminQuery, Affiliation, OwnerQuery};
use crate::stanza::ns;
use crate::types::MemberJid;

use super::handle::{Handle, IqReply, RequestError, Settings, XmppEvent};
use super::needs::{self, Lacks, Need};
use super::probe::{self, RoomMaking};
use super::room::Refusal;
use super::server::{Server, Software};
use super::session::connect;
use super::visit::VisitReply;

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
    /// The room's service does not let this account in, or is none.
    #[error("{0}")]
    Refused(Refusal),
    #[error("there is no such room, and {0} may not make rooms there")]
    MayNotMake(MemberJid),
    #[error("{0} does not own the room")]
    NotOwner(MemberJid),
    /// Whoever owns it can let anybody in.
    #[error("the room was there already, and is {}'s as well", .0.iter().map(|o| o.as_str()).collect::<Vec<_>>().join(" and "))]
    OtherOwners(Vec<MemberJid>),
    #[error(
        "the server took the configuration, but {0}; its room service may not allow what a federation needs"
    )]
    NotTaken(String),
}

/// What became of [`Admin::create_room`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Created {
    /// It was not there before.
    pub made: bool,
    /// Until it was configured anybody could walk in.
    pub began_open: bool,
    /// What it lacks still that may be borne.
    pub flaws: Vec<Need>,
    /// Options that did not become what they were set to.
    pub not_taken: Vec<String>,
}

/// Who is to own a room.
#[derive(Debug, Clone, Default)]
pub struct Owners {
    /// Beside the account that administers.
    pub others: Vec<MemberJid>,
    /// Whether those that are not named lose it.
    pub evict: bool,
}

/// An owner's session.
pub struct Admin {
    handle: Handle,
    account: MemberJid,
    room: Jid,
    /// Whether the account was made an owner by the right of an administrator.
    claimed: AtomicBool,
}

impl Admin {
    /// Logs in. `settings.room` names the room. The first failure is the answer: nothing is tried again.
    pub async fn open(mut settings: Settings) -> Result<Self, AdminError> {
        let text = settings.room.take().unwrap_or_default();
        let room = BareJid::new(&text).ok().filter(|j| j.node().is_some()).ok_or(AdminError::Room(text))?;
        let account = settings.jid.clone();
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
        Ok(Self { handle, account, room: room.into(), claimed: AtomicBool::new(false) })
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

    /// Asks as an owner. An administrator of the service that is none makes itself one.
    async fn ask_as_owner(
        &self,
        what: &str,
        set: bool,
        payload: impl Into<Element>,
    ) -> Result<Option<Element>, AdminError> {
        let payload = payload.into();
        match self.ask(what, set, payload.clone()).await {
            Err(e) if e.is_denied() => match self.claim().await {
                true => self.ask(what, set, payload).await,
                false => Err(e),
            },
            answer => answer,
        }
    }

    async fn claim(&self) -> bool {
        let claimed = probe::claim(&self.handle, &self.room, &self.account).await;
        self.claimed.fetch_or(claimed, Ordering::Relaxed);
        claimed
    }

    /// Whether this account was made an owner of the room for what it did.
    pub fn has_claimed(&self) -> bool {
        self.claimed.load(Ordering::Relaxed)
    }

    /// The software that keeps the room.
    pub async fn server(&self) -> Server {
        probe::server(&self.handle, self.service()).await
    }

    /// The domain of the room's service.
    pub fn service(&self) -> &str {
        self.room.domain().as_str()
    }

    /// Who may make rooms there, as far as this account can see.
    pub async fn room_making(&self) -> RoomMaking {
        probe::room_making(&self.handle, self.service()).await
    }

    /// What the room lacks of what a federation needs.
    pub async fn look(&self) -> Result<Lacks, Refusal> {
        probe::look(&self.handle, &self.room).await
    }

    /// Enters the room under this nick, or takes it when in the room already, and tells what was seen.
    pub async fn enter(&self, nick: &str) -> VisitReply {
        match Jid::new(&format!("{}/{nick}", self.room)) {
            Ok(occupant) => self.handle.visit(occupant).await,
            Err(e) => Err(Refusal::Other(e.to_string().into())),
        }
    }

    /// Leaves the room.
    pub async fn leave(&self, nick: &str) {
        if let Ok(occupant) = Jid::new(&format!("{}/{nick}", self.room)) {
            self.handle.leave(occupant).await;
        }
    }

    /// Makes the room, or makes an existing one what a federation needs, and sees that it is. An existing one that
    /// is others' as well is refused, unless `owners` names or evicts them.
    pub async fn create_room(&self, name: &str, owners: &Owners) -> Result<Created, AdminError> {
        let absent = match self.look().await {
            Ok(_) => false,
            Err(Refusal::NoRoom | Refusal::Destroyed) => true,
            Err(refusal) => return Err(AdminError::Refused(refusal)),
        };
        // A room begins to exist when somebody enters it, and is configured from within. The nick is nobody's.
        let nick = format!("owner-{}", uuid::Uuid::new_v4().simple());
        let entered = match self.enter(&nick).await {
            // Who does not own it is let in when it does.
            Err(Refusal::NotMember | Refusal::Banned) if !absent && self.claim().await => {
                self.enter(&nick).await
            }
            entered => entered,
        };
        let made = match entered {
            Ok(visit) => visit.made,
            Err(Refusal::MayNotMake | Refusal::Banned) if absent => {
                return Err(AdminError::MayNotMake(self.account.clone()));
            }
            // An owner may configure what it cannot enter: a password is in its way.
            Err(Refusal::Password | Refusal::Full | Refusal::NickTaken) => false,
            Err(Refusal::NotMember | Refusal::Banned) => {
                return Err(AdminError::NotOwner(self.account.clone()));
            }
            Err(refusal) => return Err(AdminError::Refused(refusal)),
        };
        let done = self.make_federations(name, made, owners).await;
        self.leave(&nick).await;
        done
    }

    async fn make_federations(&self, name: &str, made: bool, owners: &Owners) -> Result<Created, AdminError> {
        let began_open = made && self.began_open().await;
        // First, so that nothing is changed in a room that is others'.
        let form = match self.ask_as_owner("read the room's options", false, OwnerQuery { form: None }).await
        {
            Err(e) if e.is_denied() => return Err(AdminError::NotOwner(self.account.clone())),
            form => form?,
        };
        self.settle_owners(owners).await?;
        let read = |form: Option<Element>| form.and_then(|e| OwnerQuery::try_from(e).ok()?.form);
        let offered = read(form).unwrap_or_else(|| DataForm::new(DataFormType::Form, "", Vec::new()));
        let set = needs::settings(name, &offered);
        let filled = DataForm::new(DataFormType::Submit, ns::MUC_ROOM_CONFIG, set.clone());
        self.ask("configure the room", true, OwnerQuery { form: Some(filled) }).await?;

        let lacks = self.look().await.map_err(AdminError::Refused)?;
        if let Some(fault) = lacks.fault() {
            return Err(AdminError::NotTaken(fault));
        }
        let now = read(self.ask("read the room's options", false, OwnerQuery { form: None }).await?);
        let not_taken = now.map(|now| needs::not_taken(&set, &now)).unwrap_or_default();
        Ok(Created { made, began_open, flaws: lacks.flaws().collect(), not_taken })
    }

    /// Whether the new room let anybody in before it was configured. Prosody looks the same, but keeps a new room
    /// closed until then, unless muc_room_locking is off.
    async fn began_open(&self) -> bool {
        self.look().await.is_ok_and(|lacks| lacks.fault().is_some())
            && !matches!(self.server().await.software, Software::Prosody | Software::Prosody13)
    }

    /// Sees that the room's owners are those that shall be. That of this account is written down: a right that it
    /// has as the server's administrator ends with the upgrade to Prosody 13.
    async fn settle_owners(&self, owners: &Owners) -> Result<(), AdminError> {
        let found = self.list(Affiliation::Owner).await?;
        let administrators = self.list(Affiliation::Admin).await?;
        let is_named = |jid: &MemberJid| *jid == self.account || owners.others.contains(jid);
        let strangers: Vec<_> =
            found.iter().chain(&administrators).filter(|jid| !is_named(jid)).cloned().collect();
        if !strangers.is_empty() && !owners.evict {
            return Err(AdminError::OtherOwners(strangers));
        }
        for jid in std::iter::once(&self.account).chain(&owners.others).filter(|jid| !found.contains(jid)) {
            self.affiliate(jid, Affiliation::Owner, "make an owner of").await?;
        }
        for jid in &strangers {
            self.affiliate(jid, Affiliation::None, "take the room from").await?;
        }
        Ok(())
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
        self.affiliate(member, Affiliation::Member, "add member").await
    }

    /// Removes a member; one that is in the room is thrown out.
    pub async fn remove_member(&self, member: &MemberJid) -> Result<(), AdminError> {
        self.affiliate(member, Affiliation::None, "remove member").await
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
        self.ask_as_owner(&format!("{verb} {member}"), true, query).await.map(drop)
    }

    /// Members and owners, with their affiliation.
    pub async fn list_members(&self) -> Result<Vec<(MemberJid, String)>, AdminError> {
        let mut out = Vec::new();
        for affiliation in [Affiliation::Owner, Affiliation::Admin, Affiliation::Member] {
            let jids = self.list(affiliation).await?;
            out.extend(jids.into_iter().map(|jid| (jid, affiliation.as_str().to_owned())));
        }
        Ok(out)
    }

    async fn list(&self, affiliation: Affiliation) -> Result<Vec<MemberJid>, AdminError> {
        let query = AdminQuery { items: vec![AdminItem { affiliation, jid: None }] };
        let answer = self.ask_as_owner("list members", false, query).await?;
        Ok(jids_in(answer))
    }

    /// The room's owners, where it shows them to this account.
    pub async fn owners(&self) -> Option<Vec<MemberJid>> {
        let query = AdminQuery { items: vec![AdminItem { affiliation: Affiliation::Owner, jid: None }] };
        Some(jids_in(self.ask("list owners", false, query).await.ok()?))
    }

    pub async fn close(self) {
        self.handle.close().await;
    }
}

impl AdminError {
    /// Whether the room says that this is not for us to do.
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Request { source: RequestError::Refused { condition, .. }, .. }
            if matches!(condition.as_str(), "forbidden" | "not-allowed" | "not-authorized" | "not-acceptable"))
    }
}

fn jids_in(answer: Option<Element>) -> Vec<MemberJid> {
    let items = answer.and_then(|e| AdminQuery::try_from(e).ok()).map(|q| q.items).unwrap_or_default();
    items.into_iter().filter_map(|i| i.jid?.to_string().parse().ok()).collect()
}
