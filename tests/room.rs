//! The federation's room on every server that is there: made, mended and verified, whose it is, who may make
//! others, and why it lets nobody in.

#[allow(dead_code)]
#[path = "support/session.rs"]
mod session;
#[allow(dead_code)]
#[path = "support/xmpp.rs"]
mod support;

use cicada::stanza::commands::Command;
use cicada::stanza::muc::{AdminItem, AdminQuery, Affiliation, DestroyQuery, OwnerQuery};
use cicada::stanza::ns;
use cicada::xmpp::admin::{Admin, AdminError, Created, Owners};
use cicada::xmpp::probe::RoomMaking;
use cicada::xmpp::{Handle, Need, Refusal, Settings, XmppEvent, connect};
use session::{Broker, jid};
use support::{DOMAIN, Kind, ROOM, Software, on_every_server};
use xmpp_parsers::data_forms::{DataForm, DataFormType, Field, FieldType};
use xmpp_parsers::disco::{DiscoItemsQuery, DiscoItemsResult};
use xmpp_parsers::jid::{BareJid, Jid};
use xmpp_parsers::minidom::Element;

const SERVICE: &str = "rooms.federation.test";

on_every_server!(
    a_room_is_made_mended_and_verified,
    who_may_make_rooms_is_seen_and_nothing_is_left_behind,
    a_strangers_room_is_neither_taken_nor_shared_without_a_word,
    an_administrator_adds_members_to_a_room_that_another_made,
    why_a_room_lets_nobody_in_is_told,
    a_broker_enters_as_soon_as_it_may,
);

/// A server of its own, stopped before its directory goes.
fn start(kind: Kind, accounts: &[&str]) -> (support::Server, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let hibernation = std::time::Duration::from_secs(2);
    (support::Server::start(kind, dir.path().join("xmpp"), accounts, hibernation), dir)
}

async fn admin(server: &support::Server, account: &str) -> Admin {
    Admin::open(server.settings(account)).await.unwrap()
}

/// Any session of an account, to do what Cicada does not.
async fn client(server: &support::Server, account: &str) -> Handle {
    let (handle, mut events) = connect(Settings { room: None, ..server.settings(account) }).unwrap();
    assert!(matches!(events.recv().await, Some(XmppEvent::Joined)));
    tokio::spawn(async move { while events.recv().await.is_some() {} });
    handle
}

fn room() -> Jid {
    Jid::new(ROOM).unwrap()
}

async fn set_options(client: &Handle, options: &[(&str, &str)]) {
    let fields = options.iter().map(|(var, value)| {
        Field::new(&format!("muc#roomconfig_{var}"), FieldType::TextSingle).with_value(value)
    });
    let form = DataForm::new(DataFormType::Submit, ns::MUC_ROOM_CONFIG, fields.collect());
    client.iq(room(), true, OwnerQuery { form: Some(form) }).await.unwrap();
}

const AS_NEEDED: [(&str, &str); 4] =
    [("membersonly", "1"), ("whois", "anyone"), ("persistentroom", "1"), ("publicroom", "0")];

async fn affiliate(client: &Handle, account: &str, affiliation: Affiliation) {
    let jid = BareJid::new(jid(account).as_str()).ok();
    client.iq(room(), true, AdminQuery { items: vec![AdminItem { affiliation, jid }] }).await.unwrap();
}

async fn owners_of(admin: &Admin) -> Vec<String> {
    let list = admin.list_members().await.unwrap();
    let owners = list.into_iter().filter(|(_, affiliation)| affiliation == "owner");
    let mut owners: Vec<_> =
        owners.map(|(jid, _)| jid.as_str().split('@').next().unwrap().to_owned()).collect();
    owners.sort();
    owners
}

async fn a_room_is_made_mended_and_verified(kind: Kind) {
    let (server, _dir) = start(kind, &["alpine", "boreal"]);
    let owner = admin(&server, "admin").await;
    let told = owner.server().await.to_string();
    let expected = match (kind.software, kind.debian_13) {
        (Software::Prosody, true) => "Prosody 13",
        (Software::Prosody, false) => "Prosody ",
        (Software::Ejabberd, _) => "ejabberd 2",
    };
    assert!(told.starts_with(expected), "{told}");

    assert_eq!(owner.look().await, Err(Refusal::NoRoom));
    let made = owner.create_room("lobby", &Owners::default()).await.unwrap();
    assert_eq!(made, Created { made: true, ..Created::default() });
    assert!(owner.look().await.unwrap().is_empty());
    assert_eq!(owners_of(&owner).await, ["admin"]);
    // Again, with members in it: nothing is lost.
    owner.add_member(&jid("alpine")).await.unwrap();
    let alpine = Broker::start(server.settings("alpine"));
    alpine.sees(|s| s.joined == 1).await;
    let again = owner.create_room("lobby", &Owners::default()).await.unwrap();
    assert_eq!(again, Created::default());
    assert!(owner.list_members().await.unwrap().contains(&(jid("alpine"), "member".into())));
    // Whose it is, members see as well.
    let member = admin(&server, "alpine").await;
    assert_eq!(member.owners().await, Some(vec![jid("admin")]));

    // What was changed is seen by everybody, and mended.
    let root = client(&server, "admin").await;
    set_options(
        &root,
        &[("membersonly", "1"), ("whois", "anyone"), ("persistentroom", "0"), ("publicroom", "1")],
    )
    .await;
    let flaws: Vec<_> = member.look().await.unwrap().flaws().collect();
    assert_eq!(flaws, [Need::Persistent, Need::Hidden]);
    set_options(&root, &[("membersonly", "0"), ("whois", "moderators"), ("persistentroom", "1")]).await;
    let fault = member.look().await.unwrap().fault();
    assert_eq!(fault.as_deref(), Some("the room is not members-only and anonymous"));
    let closed = [&AS_NEEDED[..], &[("passwordprotectedroom", "1"), ("roomsecret", "sesame")]].concat();
    set_options(&root, &closed).await;
    assert!(member.look().await.unwrap().fault().is_some_and(|fault| fault.contains("password")));
    assert_eq!(member.enter("x").await, Err(Refusal::Password));
    assert_eq!(owner.create_room("lobby", &Owners::default()).await.unwrap(), Created::default());
    assert!(owner.look().await.unwrap().is_empty());
    assert!(member.enter("x").await.is_ok());
    // Who owns nothing changes nothing.
    let eve = admin(&server, "boreal").await;
    assert!(matches!(eve.create_room("mine", &Owners::default()).await, Err(AdminError::NotOwner(_))));
    assert!(matches!(eve.add_member(&jid("boreal")).await, Err(e) if e.is_denied()));
    assert!(!owner.has_claimed() && !eve.has_claimed());
}

/// All rooms of the service, listed or not.
async fn rooms(server: &support::Server) -> Vec<String> {
    let root = client(server, "admin").await;
    let service = Jid::new(SERVICE).unwrap();
    if server.kind.software == Software::Ejabberd {
        let items =
            root.iq(service, false, DiscoItemsQuery { node: None, rsm: None }).await.unwrap().unwrap();
        let items = DiscoItemsResult::try_from(items).unwrap().items;
        return items.into_iter().map(|item| item.jid.to_string()).collect();
    }
    let list = Command::execute("http://prosody.im/protocol/muc#destroy");
    let form: Element = root.iq(service, true, list).await.unwrap().unwrap();
    let fields = Command::try_from(form).unwrap().form.unwrap().fields;
    let rooms = fields.into_iter().find(|f| f.var.as_deref() == Some("rooms")).unwrap();
    rooms.options.into_iter().map(|o| o.value).collect()
}

async fn who_may_make_rooms_is_seen_and_nothing_is_left_behind(kind: Kind) {
    let (server, _dir) = start(kind, &["alpine"]);
    let open = match kind.software {
        Software::Prosody => RoomMaking::Anybody,
        Software::Ejabberd => RoomMaking::ThisAccount,
    };
    let administrator = match kind.software {
        Software::Prosody => RoomMaking::Administrator,
        Software::Ejabberd => RoomMaking::ThisAccount,
    };
    // As deploy/xmpp has it.
    let alpine = admin(&server, "alpine").await;
    assert_eq!(alpine.room_making().await, RoomMaking::Restricted);
    let denied = alpine.create_room("mine", &Owners::default()).await.unwrap_err();
    assert!(matches!(denied, AdminError::MayNotMake(_)), "{denied}");
    let root = admin(&server, "admin").await;
    assert_eq!(root.room_making().await, administrator);
    assert_eq!(rooms(&server).await, Vec::<String>::new());
    alpine.close().await;
    root.close().await;

    server.let_everybody_make_rooms();
    let alpine = admin(&server, "alpine").await;
    assert_eq!(alpine.room_making().await, open);
    assert_eq!(admin(&server, "admin").await.room_making().await, administrator);
    assert_eq!(rooms(&server).await, Vec::<String>::new());
    // There a new room is open to all until it is configured, where the server does not keep it closed meanwhile.
    let made = alpine.create_room("mine", &Owners::default()).await.unwrap();
    let began_open = kind.software == Software::Ejabberd;
    assert_eq!(made, Created { made: true, began_open, ..Created::default() });
    assert_eq!(rooms(&server).await, [ROOM]);
    alpine.close().await;

    // What 0.12 takes for administrators, 13 takes for everybody.
    if kind.software == Software::Prosody {
        server.reconfigure(|text| {
            text.replace("restrict_room_creation = false", "restrict_room_creation = \"admin\"")
        });
        let seen = admin(&server, "alpine").await.room_making().await;
        let is_13 = admin(&server, "admin").await.server().await.to_string().contains(" 13");
        assert_eq!(seen, if is_13 { RoomMaking::Anybody } else { RoomMaking::Restricted });
    }
}

/// Eve was first, and the federation's owner comes later.
async fn a_strangers_room_is_neither_taken_nor_shared_without_a_word(kind: Kind) {
    let (server, _dir) = start(kind, &["alpine", "eve", "mallory"]);
    server.let_everybody_make_rooms();
    let eve = client(&server, "eve").await;
    let occupant = Jid::new(&format!("{ROOM}/eve")).unwrap();
    assert!(eve.visit(occupant.clone()).await.unwrap().made);
    set_options(&eve, &AS_NEEDED).await;
    affiliate(&eve, "mallory", Affiliation::Admin).await;

    // An account that owns nothing is told so.
    let alpine = admin(&server, "alpine").await;
    let denied = alpine.create_room("ours", &Owners::default()).await.unwrap_err();
    assert!(matches!(denied, AdminError::NotOwner(_)), "{denied}");
    // An administrator could take it, and does not before it is told to.
    let root = admin(&server, "admin").await;
    let refused = root.create_room("ours", &Owners::default()).await.unwrap_err();
    let AdminError::OtherOwners(others) = &refused else { panic!("{refused}") };
    assert_eq!(*others, [jid("eve"), jid("mallory")]);
    assert!(refused.to_string().contains("eve@federation.test and mallory@federation.test"), "{refused}");
    let half = Owners { others: vec![jid("eve")], evict: false };
    let refused = root.create_room("ours", &half).await.unwrap_err();
    assert!(matches!(&refused, AdminError::OtherOwners(others) if *others == [jid("mallory")]), "{refused}");
    // With those that are named, others are made owners too.
    let shared = Owners { others: vec![jid("eve"), jid("alpine")], evict: true };
    root.create_room("ours", &shared).await.unwrap();
    assert_eq!(owners_of(&root).await, ["admin", "alpine", "eve"]);
    root.create_room("ours", &Owners { evict: true, ..Owners::default() }).await.unwrap();
    assert_eq!(owners_of(&root).await, ["admin"]);
    assert_eq!(root.list_members().await.unwrap().len(), 1, "nobody else is anything");
    // Eve is out of it, and stays out.
    assert_eq!(eve.visit(occupant).await, Err(Refusal::NotMember));
}

async fn an_administrator_adds_members_to_a_room_that_another_made(kind: Kind) {
    let (server, _dir) = start(kind, &["alpine", "boreal"]);
    server.let_everybody_make_rooms();
    admin(&server, "alpine").await.create_room("ours", &Owners::default()).await.unwrap();
    let root = admin(&server, "admin").await;
    root.add_member(&jid("boreal")).await.unwrap();
    let is_13 = root.server().await.to_string().starts_with("Prosody 13");
    // In Prosody 13 it had to make itself an owner; in 0.12 and this ejabberd it is one of every room.
    assert_eq!(root.has_claimed(), is_13);
    assert_eq!(owners_of(&root).await, if is_13 { vec!["admin", "alpine"] } else { vec!["alpine"] });
    Broker::start(server.settings("boreal")).sees(|s| s.joined == 1).await;
    // `federation create` writes the right down, so that it lasts over an upgrade.
    root.create_room("ours", &Owners { others: vec![jid("alpine")], evict: false }).await.unwrap();
    assert_eq!(owners_of(&root).await, ["admin", "alpine"]);
    root.remove_member(&jid("boreal")).await.unwrap();
}

async fn why_a_room_lets_nobody_in_is_told(kind: Kind) {
    let (server, _dir) = start(kind, &["alpine", "boreal"]);
    let owner = admin(&server, "admin").await;
    owner.create_room("lobby", &Owners::default()).await.unwrap();
    let alpine = admin(&server, "alpine").await;
    assert_eq!(alpine.enter("alpine").await, Err(Refusal::NotMember));
    let root = client(&server, "admin").await;
    affiliate(&root, "alpine", Affiliation::Outcast).await;
    // Prosody does not tell who is banned from who is no member.
    let banned = match kind.software {
        Software::Prosody => Refusal::NotMember,
        Software::Ejabberd => Refusal::Banned,
    };
    assert_eq!(alpine.enter("alpine").await, Err(banned));
    owner.add_member(&jid("alpine")).await.unwrap();
    owner.add_member(&jid("boreal")).await.unwrap();
    let boreal = Broker::start(server.settings("boreal"));
    boreal.sees(|s| s.joined == 1).await;
    assert_eq!(alpine.enter("boreal").await, Err(Refusal::NickTaken));
    let visit = alpine.enter("visitor").await.unwrap();
    assert_eq!((visit.made, visit.affiliation), (false, Affiliation::Member));
    let seen: Vec<_> =
        visit.others.iter().map(|o| (o.nick.as_str(), o.jid.as_ref().map(Jid::as_str))).collect();
    assert_eq!(seen, [("boreal", Some("boreal@federation.test/cicada"))]);
    // A nick is changed as one enters, and one in use is not had.
    assert_eq!(alpine.enter("boreal").await, Err(Refusal::NickTaken));
    assert!(alpine.enter("alpine").await.is_ok());
    alpine.leave("alpine").await;

    let elsewhere = |room: &str| Settings { room: Some(room.to_owned()), ..server.settings("alpine") };
    let nowhere = Admin::open(elsewhere(&format!("lobby@nosuch.{DOMAIN}"))).await.unwrap();
    assert!(matches!(nowhere.look().await, Err(Refusal::NoService(_) | Refusal::Unreachable)));
    let account = Admin::open(elsewhere(jid("boreal").as_str())).await.unwrap();
    assert!(matches!(account.look().await, Err(Refusal::NoService(_))));
    let absent = Admin::open(elsewhere(&format!("absent@{SERVICE}"))).await.unwrap();
    assert_eq!(absent.look().await, Err(Refusal::NoRoom));
    assert_eq!(rooms(&server).await, [ROOM], "looking makes no room");
}

/// The room comes to be, and the membership, while a broker waits for them.
async fn a_broker_enters_as_soon_as_it_may(kind: Kind) {
    let (server, _dir) = start(kind, &["alpine"]);
    let alpine = Broker::start(server.settings("alpine"));
    let down = alpine.sees(|s| s.down.is_some()).await.down.unwrap();
    assert_eq!(down, "there is no such room");
    let owner = admin(&server, "admin").await;
    owner.create_room("lobby", &Owners::default()).await.unwrap();
    alpine.sees(|s| s.down.as_deref() == Some("this account is not a member of the room")).await;
    owner.add_member(&jid("alpine")).await.unwrap();
    alpine.sees(|s| s.joined == 1).await;
    // A room that is gone is not made anew by those that were in it.
    let root = client(&server, "admin").await;
    root.iq(room(), true, DestroyQuery::default()).await.unwrap();
    alpine.sees(|s| s.down.as_deref() == Some("there is no such room")).await;
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!(rooms(&server).await, Vec::<String>::new());
}
