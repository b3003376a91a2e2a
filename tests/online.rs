//! `cicada federation create` and `cicada config check --online` as an operator runs them, on every server that is
//! there: what is wrong with a room is found before a broker is started, with what helps on this very server.

#[allow(dead_code)]
#[path = "support/session.rs"]
mod session;
#[allow(dead_code)]
#[path = "support/xmpp.rs"]
mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use cicada::stanza::muc::{AdminItem, AdminQuery, Affiliation, OwnerQuery};
use cicada::stanza::ns;
use cicada::xmpp::admin::{Admin, Owners};
use cicada::xmpp::{Handle, Settings, XmppEvent, connect};
use serde_json::Value;
use session::{Broker, cloud, jid};
use support::{Kind, ROOM, Software, on_every_server};
use xmpp_parsers::data_forms::{DataForm, DataFormType, Field, FieldType};
use xmpp_parsers::jid::{BareJid, Jid};

on_every_server!(
    each_fault_of_a_room_is_found_with_what_helps,
    a_broker_that_runs_is_left_alone,
    a_federation_is_made_and_what_is_weak_is_told,
    a_broker_tells_what_is_weak_where_it_is,
);

/// A server and the configuration of a cloud on it.
struct Site {
    server: support::Server,
    dir: tempfile::TempDir,
}

impl Site {
    fn start(kind: Kind, accounts: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = support::Server::start(kind, dir.path().join("xmpp"), accounts, Duration::from_secs(2));
        let site = Self { server, dir };
        for account in [accounts, &["admin"]].concat() {
            let file = site.path(&format!("{account}.password"));
            std::fs::copy(site.server.password_file(account), &file).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The configuration of a cloud of this account, with lines of `[xmpp]` in place of the usual ones.
    fn config(&self, account: &str, name: &str, room: &str) -> PathBuf {
        let (dir, port, ca) = (self.dir.path().display(), self.server.port, self.server.ca_file());
        let text = format!(
            "[cloud]\nname = \"{name}\"\ndata_dir = \"{dir}/{account}-data\"\n[xmpp]\njid = \"{account}@federation.test\"\n\
             password_file = \"{dir}/{account}.password\"\nserver = \"127.0.0.1:{port}\"\nca_file = \"{}\"\n\
             room = \"{room}\"\n[transfer]\nlisten = \"127.0.0.1:0\"\npeer_networks = [\"127.0.0.0/8\"]\n",
            ca.display()
        );
        let file = self.path(&format!("{account}.toml"));
        std::fs::write(&file, text).unwrap();
        file
    }

    async fn admin(&self) -> Admin {
        Admin::open(self.server.settings("admin")).await.unwrap()
    }
}

async fn cicada(config: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cicada"));
    command.arg("--config").arg(config).args(arguments);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// What of a check is about XMPP, by its name: what was found, and what is wrong with what helps.
async fn check(config: &Path) -> Vec<(String, String, Option<Value>)> {
    let output = cicada(config, &["config", "check", "--online", "--json"]).await;
    let text = String::from_utf8(output.stdout).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let of_rooms = ["xmpp-server", "room", "membership", "nick", "room-owners", "making-rooms"];
    let checks = value["checks"].as_array().unwrap().iter();
    let of_rooms = checks.filter(|c| of_rooms.contains(&c["check"].as_str().unwrap()));
    of_rooms
        .map(|c| {
            let wrong = [&c["problem"], &c["warning"]].into_iter().find(|p| !p.is_null()).cloned();
            (c["check"].as_str().unwrap().to_owned(), c["detail"].as_str().unwrap().to_owned(), wrong)
        })
        .collect()
}

/// What is wrong with `what`: its kind, reason and next step.
fn wrong(checks: &[(String, String, Option<Value>)], what: &str) -> (String, String, String) {
    let found = checks.iter().find(|(name, _, wrong)| name == what && wrong.is_some());
    let Some((_, _, Some(problem))) = found else { panic!("{what} is good: {checks:#?}") };
    let text = |key: &str| problem[key].as_str().unwrap().to_owned();
    assert!(!text("object").is_empty() && !text("next_step").is_empty(), "{problem}");
    (text("kind"), text("reason"), text("next_step"))
}

fn all_good(checks: &[(String, String, Option<Value>)]) {
    assert!(checks.iter().all(|(_, _, wrong)| wrong.is_none()), "{checks:#?}");
}

async fn client(site: &Site, account: &str) -> Handle {
    let (handle, mut events) = connect(Settings { room: None, ..site.server.settings(account) }).unwrap();
    assert!(matches!(events.recv().await, Some(XmppEvent::Joined)));
    tokio::spawn(async move { while events.recv().await.is_some() {} });
    handle
}

async fn set_options(client: &Handle, options: &[(&str, &str)]) {
    let fields = options.iter().map(|(var, value)| {
        Field::new(&format!("muc#roomconfig_{var}"), FieldType::TextSingle).with_value(value)
    });
    let form = DataForm::new(DataFormType::Submit, ns::MUC_ROOM_CONFIG, fields.collect());
    client.iq(Jid::new(ROOM).unwrap(), true, OwnerQuery { form: Some(form) }).await.unwrap();
}

async fn each_fault_of_a_room_is_found_with_what_helps(kind: Kind) {
    let site = Site::start(kind, &["alpine", "boreal"]);
    let config = site.config("alpine", "alpine", ROOM);
    let create = "cicada federation create";

    let checks = check(&config).await;
    let (class, reason, next) = wrong(&checks, "room");
    assert_eq!((class.as_str(), reason.as_str()), ("not-found", "there is no such room"));
    assert!(next.contains(create), "{next}");
    let software = if kind.software == Software::Prosody { "Prosody" } else { "ejabberd" };
    assert!(checks[0].1.contains(software), "{checks:?}");
    assert!(checks.iter().any(|(name, _, wrong)| name == "making-rooms" && wrong.is_none()), "{checks:?}");

    let owner = site.admin().await;
    owner.create_room("lobby", &Owners::default()).await.unwrap();
    let (class, reason, next) = wrong(&check(&config).await, "membership");
    assert_eq!(class, "forbidden");
    assert!(
        reason.contains("not a member") && next.contains("cicada federation add alpine@federation.test"),
        "{next}"
    );

    let root = client(&site, "admin").await;
    let banned =
        AdminItem { affiliation: Affiliation::Outcast, jid: BareJid::new(jid("alpine").as_str()).ok() };
    root.iq(Jid::new(ROOM).unwrap(), true, AdminQuery { items: vec![banned] }).await.unwrap();
    let (class, reason, next) = wrong(&check(&config).await, "membership");
    assert!(class == "forbidden" && reason.contains("banned"), "{reason}");
    assert!(next.contains("cicada federation add alpine@federation.test"), "{next}");
    // That helps.
    owner.add_member(&jid("alpine")).await.unwrap();
    owner.add_member(&jid("boreal")).await.unwrap();
    let checks = check(&config).await;
    all_good(&checks);
    let detail = |what: &str| checks.iter().find(|(name, ..)| name == what).unwrap().1.clone();
    assert_eq!(detail("room-owners"), "admin@federation.test");
    assert_eq!(detail("nick"), "alpine is free; no broker of this cloud is in the room");

    let boreal =
        Broker::start(Settings { nick: "alpine".parse().unwrap(), ..site.server.settings("boreal") });
    boreal.sees(|s| s.joined == 1).await;
    let (class, reason, next) = wrong(&check(&config).await, "nick");
    assert_eq!(
        (class.as_str(), reason.as_str()),
        ("conflict", "the nick is in use by boreal@federation.test")
    );
    assert!(next.contains("cloud.name"), "{next}");
    boreal.handle.close().await;

    // A temporary room is gone when nobody is in it.
    root.visit(Jid::new(&format!("{ROOM}/keeper")).unwrap()).await.unwrap();
    let needed = [("membersonly", "1"), ("whois", "anyone"), ("persistentroom", "1"), ("publicroom", "0")];
    let with = |option: &'static str, value: &'static str| {
        let mut options = needed.to_vec();
        options.retain(|(name, _)| *name != option);
        options.push((option, value));
        options
    };
    for (options, fault) in [
        (with("membersonly", "0"), "the room is not members-only"),
        (with("whois", "moderators"), "the room is anonymous"),
        (with("persistentroom", "0"), "the room is temporary"),
        (with("publicroom", "1"), "the room is listed"),
        (
            [with("passwordprotectedroom", "1"), vec![("roomsecret", "sesame")]].concat(),
            "the room is closed by a password",
        ),
    ] {
        set_options(&root, &options).await;
        let (class, reason, next) = wrong(&check(&config).await, "room");
        assert!(class == "refused" && reason.starts_with(fault) && next.contains(create), "{reason}: {next}");
    }
    owner.create_room("lobby", &Owners::default()).await.unwrap();
    all_good(&check(&config).await);

    for room in ["lobby@nosuch.federation.test", "boreal@federation.test"] {
        let (class, reason, next) = wrong(&check(&site.config("alpine", "alpine", room)).await, "room");
        assert_eq!(class, "unavailable", "{reason}");
        assert!(next.contains("[xmpp] room"), "{next}");
    }
}

async fn a_broker_that_runs_is_left_alone(kind: Kind) {
    let site = Site::start(kind, &["alpine", "boreal"]);
    let owner = site.admin().await;
    owner.create_room("lobby", &Owners::default()).await.unwrap();
    for member in ["alpine", "boreal"] {
        owner.add_member(&jid(member)).await.unwrap();
    }
    let alpine = Broker::start(site.server.settings("alpine"));
    let boreal = Broker::start(site.server.settings("boreal"));
    alpine.sees_member("boreal").await;
    boreal.sees_member("alpine").await;
    for _ in 0..2 {
        let checks = check(&site.config("alpine", "alpine", ROOM)).await;
        // No broker runs by this configuration, but one of the account is there.
        let (class, reason, _) = wrong(&checks, "nick");
        assert_eq!(class, "conflict");
        assert!(reason.contains("a broker of alpine@federation.test is in the room"), "{reason}");
        assert!(checks.iter().all(|(name, _, wrong)| name == "nick" || wrong.is_none()), "{checks:#?}");
    }
    // The session is the same as before, its members are, and it is seen as before.
    for broker in [&alpine, &boreal] {
        let seen = broker.seen.borrow().clone();
        assert_eq!((seen.joined, seen.down, seen.removed), (1, None, Vec::new()));
    }
    alpine.handle.set_presence(cloud("alpine", 42));
    let load = |s: &session::Seen| s.online["alpine"].cloud.as_ref().and_then(|c| c.load);
    boreal.sees(|s| load(s) == Some(42)).await;
    assert_eq!(alpine.ask("boreal", vec![1, 2]).await, Ok(vec![2, 1]));
    assert_eq!(boreal.ask("alpine", vec![1, 2]).await, Ok(vec![2, 1]));
    // Nobody else stayed in the room.
    let visit = owner.enter("looker").await.unwrap();
    let mut nicks: Vec<_> = visit.others.into_iter().map(|o| o.nick).collect();
    nicks.sort();
    assert_eq!(nicks, ["alpine", "boreal"]);
}

async fn a_federation_is_made_and_what_is_weak_is_told(kind: Kind) {
    let site = Site::start(kind, &["alpine", "boreal", "eve"]);
    let config = site.config("alpine", "alpine", ROOM);
    let file = site.path("admin.password").display().to_string();
    let as_admin = ["--owner-jid", "admin@federation.test", "--owner-password-file", &file];
    let federation = async |arguments: &[&str]| {
        let output = cicada(&config, &[&["federation"], arguments].concat()).await;
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
            String::from_utf8(output.stdout).unwrap(),
        )
    };

    // An account that may make no rooms is told who may.
    let (code, err, _) = federation(&["create"]).await;
    assert_eq!(code, Some(6), "{err}");
    assert!(err.contains("alpine@federation.test may not make rooms there"), "{err}");
    let who = if kind.software == Software::Prosody { "one of the server's admins" } else { "access_create" };
    assert!(err.contains(who) && err.contains("--owner-jid"), "{err}");

    let (code, err, _) = federation(&[&["create"], &as_admin[..]].concat()).await;
    assert_eq!(code, Some(0), "{err}");
    assert!(
        err.contains("is made; alpine@federation.test may be in it") && !err.contains("warning"),
        "{err}"
    );
    let (code, err, _) = federation(&[&["add", "boreal@federation.test"], &as_admin[..]].concat()).await;
    assert!(code == Some(0) && !err.contains("warning"), "{err}");
    let (code, _, out) = federation(&[&["list"], &as_admin[..]].concat()).await;
    assert_eq!(code, Some(0));
    for line in
        ["admin@federation.test   owner", "alpine@federation.test  member", "boreal@federation.test  member"]
    {
        assert!(out.contains(line), "{out}");
    }
    // Who does not own it is told how to come to.
    let (code, err, _) = federation(&["add", "eve@federation.test"]).await;
    assert_eq!(code, Some(6), "{err}");
    assert!(err.contains("name an owner of the room"), "{err}");

    // A server that lets everybody make rooms is told of, by every way to see it.
    site.server.let_everybody_make_rooms();
    let restrict =
        if kind.software == Software::Prosody { "restrict_room_creation = true" } else { "access_create" };
    let (code, err, _) = federation(&[&["create"], &as_admin[..]].concat()).await;
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("warning: service rooms.federation.test") && err.contains(restrict), "{err}");
    let checks = check(&config).await;
    let (class, reason, next) = wrong(&checks, "making-rooms");
    assert!(
        class == "refused" && reason.contains("may make rooms") && next.contains(restrict),
        "{reason}: {next}"
    );
    assert!(checks.iter().all(|(name, _, wrong)| name == "making-rooms" || wrong.is_none()), "{checks:#?}");

    // There Eve can be first.
    let room = "taken@rooms.federation.test";
    let eve = client(&site, "eve").await;
    eve.visit(Jid::new(&format!("{room}/eve")).unwrap()).await.unwrap();
    eve.iq(Jid::new(room).unwrap(), true, OwnerQuery { form: Some(persistent()) }).await.unwrap();
    let config = site.config("alpine", "alpine", room);
    let create = async |more: &[&str]| {
        let output = cicada(&config, &[&["federation", "create"], &as_admin[..], more].concat()).await;
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, err) = create(&[]).await;
    assert_eq!(code, Some(5), "{err}");
    for word in ["eve@federation.test", "--co-owner", "--evict-owners"] {
        assert!(err.contains(word), "{err}");
    }
    // Nobody is made an owner without a word: the administrator was, where it had to.
    let is_13 = site.admin().await.server().await.to_string().starts_with("Prosody 13");
    assert_eq!(
        err.contains("admin@federation.test administers the server, and was made an owner"),
        is_13,
        "{err}"
    );
    let (code, err) = create(&["--co-owner", "boreal@federation.test", "--evict-owners"]).await;
    assert_eq!(code, Some(0), "{err}");
    let (code, err) = create(&["--co-owner", "boreal@federation.test"]).await;
    assert!(code == Some(0) && !err.contains("was made an owner"), "{err}");
}

/// A broker that runs, ended with the test.
struct Daemon(std::process::Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn a_broker_tells_what_is_weak_where_it_is(kind: Kind) {
    let qemu = Command::new("qemu-system-x86_64").arg("--version").output();
    if !qemu.is_ok_and(|q| q.status.success()) {
        let line = b"SKIPPED: a broker's warnings: QEMU is not installed (deploy/install installs it)\n";
        let _ = std::io::Write::write_all(&mut std::io::stderr(), line);
        return;
    }
    let site = Site::start(kind, &["alpine"]);
    site.server.let_everybody_make_rooms();
    let owner = site.admin().await;
    owner.create_room("lobby", &Owners::default()).await.unwrap();
    owner.add_member(&jid("alpine")).await.unwrap();
    let root = client(&site, "admin").await;
    let weak = [("membersonly", "1"), ("whois", "anyone"), ("persistentroom", "1"), ("publicroom", "1")];
    set_options(&root, &weak).await;
    let log = std::fs::File::create(site.path("log")).unwrap();
    let mut broker = Command::new(env!("CARGO_BIN_EXE_cicada"));
    broker.arg("--config").arg(site.config("alpine", "alpine", ROOM)).arg("broker");
    let broker = Daemon(broker.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap());
    let restrict =
        if kind.software == Software::Prosody { "restrict_room_creation = true" } else { "access_create" };
    let (begun, mut seen) = (std::time::Instant::now(), String::new());
    let told = |text: &str| {
        text.contains("may make rooms at rooms.federation.test")
            && text.contains(restrict)
            && text.contains("the federation's room is listed for everybody to see")
    };
    while !told(&seen) {
        assert!(begun.elapsed() < Duration::from_secs(60), "{seen}");
        tokio::time::sleep(Duration::from_millis(200)).await;
        seen = std::fs::read_to_string(site.path("log")).unwrap();
    }
    // It is in the room nevertheless.
    let visit = owner.enter("looker").await.unwrap();
    assert!(visit.others.iter().any(|o| o.nick == "alpine"), "{visit:?}");
    // The check sees the same, and that this very broker runs.
    let checks = check(&site.config("alpine", "alpine", ROOM)).await;
    let nick = checks.iter().find(|(name, ..)| name == "nick").unwrap();
    assert_eq!(nick.1, "alpine@federation.test is in the room as alpine and was left alone");
    assert!(wrong(&checks, "room").1.contains("listed"), "{checks:#?}");
    drop(broker);
}

fn persistent() -> DataForm {
    let field = Field::new("muc#roomconfig_persistentroom", FieldType::TextSingle).with_value("1");
    DataForm::new(DataFormType::Submit, ns::MUC_ROOM_CONFIG, vec![field])
}
