//! What any account can find out about a room, the service that keeps it and the server behind that. What cannot
//! be asked is tried, and undone: who may make rooms, and whether this account may enter.

use std::time::Duration;

use xmpp_parsers::data_forms::{DataForm, DataFormType, Field, FieldType};
use xmpp_parsers::disco::{DiscoInfoQuery, DiscoInfoResult, DiscoItemsQuery, DiscoItemsResult};
use xmpp_parsers::jid::Jid;
use xmpp_parsers::version::VersionQuery;

use crate::stanza::commands::Command;
use crate::stanza::muc::{DestroyQuery, OwnerQuery};
use crate::stanza::ns;
use crate::types::MemberJid;

use super::handle::{Handle, RequestError};
use super::needs::Lacks;
use super::room::Refusal;
use super::server::{Server, Software};

/// Between attempts to look at the server while there is no session.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// What Prosody lets administrators of a service do to its rooms (XEP-0050).
const SET_AFFILIATION: &str = "http://prosody.im/protocol/muc#set-affiliation";

/// Who may make rooms at a service, as far as one account can see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RoomMaking {
    /// Not this account, so not everybody.
    Restricted,
    /// This account, which is no administrator.
    Anybody,
    /// This account, which is one: what others may cannot be seen.
    Administrator,
    /// This account; whether as an administrator the server does not tell.
    ThisAccount,
    /// It answered neither yes nor no.
    Unclear(Refusal),
}

/// What the room is, by its own account.
pub async fn look(handle: &Handle, room: &Jid) -> Result<Lacks, Refusal> {
    match handle.iq(room.clone(), false, DiscoInfoQuery { node: None }).await {
        Ok(answer) => match answer.and_then(|e| DiscoInfoResult::try_from(e).ok()) {
            Some(features) => Ok(Lacks::of(&features)),
            None => Err(Refusal::Silent),
        },
        Err(RequestError::Refused { condition, .. }) => Err(Refusal::to_look(&condition)),
        Err(_) => Err(Refusal::Silent),
    }
}

/// Which software keeps the rooms of this service.
pub async fn server(handle: &Handle, service: &str) -> Server {
    let above = service.split_once('.').map(|(_, above)| above).filter(|above| above.contains('.'));
    let places: Vec<_> =
        [Some(service), above].into_iter().flatten().filter_map(|p| Jid::new(p).ok()).collect();
    for place in &places {
        if let Ok(Some(answer)) = handle.iq(place.clone(), false, VersionQuery).await
            && let Some(server) = Server::by_version(&answer)
        {
            return server;
        }
    }
    for place in &places {
        let answer = handle.iq(place.clone(), false, DiscoInfoQuery { node: None }).await;
        let named = answer.ok().flatten().and_then(|e| DiscoInfoResult::try_from(e).ok());
        if let Some(server) = named.and_then(|d| Server::by_identity(&d)) {
            return server;
        }
    }
    Server::unknown()
}

/// Tries to make a room nobody else can mean, and takes it away again.
pub async fn room_making(handle: &Handle, service: &str) -> RoomMaking {
    let name = format!("cicada-probe-{}", uuid::Uuid::new_v4().simple());
    let Ok(occupant) = Jid::new(&format!("{name}@{service}/probe")) else {
        return RoomMaking::Unclear(Refusal::NoService("nothing".into()));
    };
    let room = Jid::from(occupant.to_bare());
    // ejabberd denies making a room with the condition that elsewhere means a ban. Nobody is banned here.
    match handle.visit(occupant.clone()).await {
        Err(Refusal::MayNotMake | Refusal::Banned) => RoomMaking::Restricted,
        Err(other) => RoomMaking::Unclear(other),
        Ok(_) => {
            destroy(handle, &room).await;
            handle.leave(occupant).await;
            if let Ok(service) = Jid::new(service)
                && is_administrator(handle, &service).await
            {
                return RoomMaking::Administrator;
            }
            // Of the servers that are known, Prosody alone shows who is an administrator.
            match server(handle, service).await.software {
                Software::Prosody | Software::Prosody13 => RoomMaking::Anybody,
                Software::Ejabberd | Software::Other => RoomMaking::ThisAccount,
            }
        }
    }
}

/// Made temporary first: Prosody keeps the name of a persistent room closed for a month.
async fn destroy(handle: &Handle, room: &Jid) {
    let temporary = Field::new("muc#roomconfig_persistentroom", FieldType::TextSingle).with_value("0");
    let form = DataForm::new(DataFormType::Submit, ns::MUC_ROOM_CONFIG, vec![temporary]);
    let _ = handle.iq(room.clone(), true, OwnerQuery { form: Some(form) }).await;
    let _ = handle.iq(room.clone(), true, DestroyQuery::default()).await;
}

/// Whether this account administers the service, where it is Prosody's.
pub async fn is_administrator(handle: &Handle, service: &Jid) -> bool {
    let query = DiscoItemsQuery { node: Some(ns::COMMANDS.into()), rsm: None };
    let answer = handle.iq(service.clone(), false, query).await.ok().flatten();
    let commands = answer.and_then(|e| DiscoItemsResult::try_from(e).ok());
    commands.is_some_and(|c| c.items.iter().any(|item| item.node.as_deref() == Some(SET_AFFILIATION)))
}

/// Makes `owner` an owner of the room by the right of the service's administrator. False where this account is
/// none, or the server has no such right: from 13 on it is the only one that Prosody's administrators have.
pub async fn claim(handle: &Handle, room: &Jid, owner: &MemberJid) -> bool {
    let Ok(service) = Jid::new(room.domain().as_str()) else { return false };
    if !is_administrator(handle, &service).await {
        return false;
    }
    let run = async |command: Command| -> Option<Command> {
        let answer = handle.iq(service.clone(), true, command).await.ok()??;
        Command::try_from(answer).ok()
    };
    let Some(begun) = run(Command::execute(SET_AFFILIATION)).await else { return false };
    let field = |var: &str, value: &str| Field::new(var, FieldType::TextSingle).with_value(value);
    let fields =
        vec![field("room", room.as_str()), field("jid", owner.as_str()), field("affiliation", "owner")];
    let form = DataForm::new(DataFormType::Submit, SET_AFFILIATION, fields);
    run(begun.complete(form)).await.is_some_and(|done| done.succeeded())
}

/// Warns in the log where everybody may make rooms: the federation's own, if it were ever lost, could be a
/// stranger's next. Ends when that is known, or with the session.
pub async fn warn_of_room_making(handle: Handle, room: String) {
    let Some((_, service)) = room.split_once('@') else { return };
    loop {
        match room_making(&handle, service).await {
            RoomMaking::Anybody => {
                let server = server(&handle, service).await;
                tracing::warn!(
                    %server,
                    next_step = server.restrict_room_making(service),
                    "every account may make rooms at {service}: if the federation's were lost, a stranger could make it anew"
                );
                return;
            }
            RoomMaking::ThisAccount => {
                let server = server(&handle, service).await;
                tracing::warn!(
                    %server,
                    next_step = server.restrict_room_making(service),
                    "this account may make rooms at {service}: unless it was chosen to, every account may, and if the \
                     federation's were lost, a stranger could make it anew"
                );
                return;
            }
            RoomMaking::Restricted | RoomMaking::Administrator => return,
            RoomMaking::Unclear(_) => {}
        }
        if handle.is_closed() {
            return;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}
