//! The XMPP session against real servers, every one that is there.

#[path = "support/session.rs"]
mod session;
#[allow(dead_code)]
#[path = "support/xmpp.rs"]
mod support;

use std::net::SocketAddr;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cicada::federation::Refused;
use cicada::stanza::{Answer, Request, ns};
use cicada::xmpp::admin::{Admin, AdminError, Owners};
use cicada::xmpp::{BindingRule, Handle, LoginRules, RequestError, Security, Settings, XmppEvent, connect};
use session::{Broker, Seen, cloud, jid};
use support::{DOMAIN, Kind, ROOM, Software, on_every_server};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use xmpp_parsers::data_forms::{DataForm, DataFormType, Field, FieldType};
use xmpp_parsers::jid::Jid;
use xmpp_parsers::minidom::Element;
use xmpp_parsers::muc::Muc;

/// How long the test's servers wait for a broker that vanished.
const HIBERNATION: Duration = Duration::from_secs(2);

/// A server of its own, stopped with the test.
struct Server {
    server: support::Server,
    _dir: tempfile::TempDir,
}

impl Deref for Server {
    type Target = support::Server;
    fn deref(&self) -> &support::Server {
        &self.server
    }
}

impl Server {
    fn start(kind: Kind, accounts: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self {
            server: support::Server::start(kind, dir.path().join("xmpp"), accounts, HIBERNATION),
            _dir: dir,
        }
    }

    /// From now on it binds logins as Prosody 13 does.
    fn offer_binding(&self) {
        let module = "mod_tls_exporter.lua";
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(module);
        std::fs::copy(source, self.dir.join("data").join(module)).unwrap();
        let paths = format!("plugin_paths = {{ \"{}\" }}\n", self.dir.join("data").display());
        self.reconfigure(|text| {
            paths.clone() + &text.replace("\"saslauth\"", "\"saslauth\", \"tls_exporter\"")
        });
    }

    async fn room_of(&self, members: &[&str]) {
        let admin = Admin::open(self.settings("admin")).await.unwrap();
        admin.create_room("lobby", &Owners::default()).await.unwrap();
        for member in members {
            admin.add_member(&jid(member)).await.unwrap();
        }
        admin.close().await;
    }
}

on_every_server!(
    members_see_and_ask_each_other_and_nobody_else,
    a_broken_connection_is_mended_and_a_crashed_broker_takes_its_place_back,
    a_killed_server_is_found_again,
    who_holds_the_servers_certificate_does_not_come_between_where_binding_is_required,
    rooms_and_accounts_that_are_wrong_are_refused_with_the_reason,
);

fn full_jid(account: &str) -> Jid {
    Jid::new(&format!("{account}@{DOMAIN}/cicada")).unwrap()
}

/// A wire that can be cut: connections break at once, new ones are refused until it is mended.
struct Wire {
    address: SocketAddr,
    cut: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
    kill: watch::Sender<()>,
}

impl Wire {
    async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (kill, killed) = watch::channel(());
        let (cut, count): (Arc<AtomicBool>, Arc<AtomicUsize>) = Default::default();
        let (is_cut, counted) = (cut.clone(), count.clone());
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                if is_cut.load(Ordering::SeqCst) {
                    continue;
                }
                counted.fetch_add(1, Ordering::SeqCst);
                let mut killed = killed.clone();
                tokio::spawn(async move {
                    let mut far = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                    killed.mark_unchanged();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = killed.changed() => {
                            // No farewell of any kind.
                            let _ = near.set_zero_linger();
                            let _ = far.set_zero_linger();
                        }
                    }
                });
            }
        });
        Self { address, cut, count, kill }
    }

    fn cut(&self) {
        self.cut.store(true, Ordering::SeqCst);
        self.kill.send_replace(());
    }

    fn mend(&self) {
        self.cut.store(false, Ordering::SeqCst);
    }

    fn through(&self, settings: Settings) -> Settings {
        Settings { server: Some(self.address.to_string()), ..settings }
    }
}

/// Somebody on the way who holds the server's own certificate and key, and reads all that passes.
struct Interceptor {
    address: SocketAddr,
}

impl Interceptor {
    /// With `strip` it takes channel binding out of what the server offers.
    async fn before(server: &Server, strip: bool) -> Self {
        use rustls::pki_types::pem::PemObject as _;
        use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let own = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from_pem_file(server.dir.join("certs/server.crt")).unwrap()],
                PrivateKeyDer::from_pem_file(server.dir.join("certs/server.key")).unwrap(),
            )
            .unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(server.dir.join("ca.crt")).unwrap()).unwrap();
        let theirs = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(own));
        let connector = tokio_rustls::TlsConnector::from(Arc::new(theirs));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, port) = (listener.local_addr().unwrap(), server.port);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let (acceptor, connector) = (acceptor.clone(), connector.clone());
                tokio::spawn(async move {
                    let Ok(mut near) = acceptor.accept(near).await else { return };
                    let far = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                    let name = ServerName::try_from(DOMAIN).unwrap();
                    let mut far = connector.connect(name, far).await.unwrap();
                    if strip {
                        let _ = stripped(&mut near, &mut far).await;
                    }
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                });
            }
        });
        Self { address }
    }

    fn between(&self, settings: Settings) -> Settings {
        Settings { server: Some(self.address.to_string()), ..settings }
    }
}

/// Relays up to the server's features, and those without what binds.
async fn stripped(
    near: &mut (impl AsyncRead + AsyncWrite + Unpin),
    far: &mut (impl AsyncRead + AsyncWrite + Unpin),
) -> std::io::Result<()> {
    let mut buffer = vec![0; 4096];
    let n = near.read(&mut buffer).await?;
    far.write_all(&buffer[..n]).await?;
    far.flush().await?;
    let mut text = String::new();
    while !text.contains("</stream:features>") {
        text.push(char::from(far.read_u8().await?));
    }
    let plus =
        regex::Regex::new("<mechanism>[^<]*-PLUS</mechanism>|<sasl-channel-binding.*</sasl-channel-binding>")
            .unwrap();
    near.write_all(plus.replace_all(&text, "").as_bytes()).await?;
    near.flush().await
}

/// Shows the session's log when RUST_LOG asks for it.
fn log() {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
}

async fn members_see_and_ask_each_other_and_nobody_else(kind: Kind) {
    log();
    let server = Server::start(kind, &["alpine", "boreal", "coral", "eve"]);
    server.room_of(&["alpine", "boreal", "coral"]).await;
    let wire = Wire::to(server.port).await;
    let alpine = Broker::start(server.settings("alpine"));
    // StartTLS is the other door of the same server.
    let starttls = Settings {
        security: Security::Starttls,
        server: Some(format!("127.0.0.1:{}", server.port - 1)),
        ..server.settings("boreal")
    };
    let boreal = Broker::start(starttls);
    let coral = Broker::start(wire.through(server.settings("coral")));
    for (broker, others) in
        [(&alpine, ["boreal", "coral"]), (&boreal, ["alpine", "coral"]), (&coral, ["alpine", "boreal"])]
    {
        for name in others {
            let presence = broker.sees_member(name).await;
            assert_eq!(
                (presence.jid, presence.cloud.map(|c| c.name.clone())),
                (jid(name), Some(name.into()))
            );
        }
    }

    // Requests: large ones, and many at once.
    let large: Vec<u8> = (0..100_000u32).map(|n| (n % 251) as u8).collect();
    let turned: Vec<u8> = large.iter().rev().copied().collect();
    assert_eq!(alpine.ask("boreal", large).await, Ok(turned));
    assert_eq!(boreal.ask("nobody", vec![1]).await, Err(RequestError::NotOnline(jid("nobody").to_string())));
    let start = Instant::now();
    for _ in 0..10 {
        let batch = (0..32u8).map(|n| alpine.ask("coral", vec![n; 1000]));
        for (n, answer) in futures::future::join_all(batch).await.into_iter().enumerate() {
            assert_eq!(answer, Ok(vec![n as u8; 1000]));
        }
    }
    println!("320 requests, 32 at once: {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(10));
    let mut trips = Vec::new();
    for _ in 0..50 {
        let start = Instant::now();
        alpine.ask("boreal", vec![0; 500]).await.unwrap();
        trips.push(start.elapsed());
    }
    trips.sort();
    println!("round trip p50 {:?}, p90 {:?}", trips[25], trips[45]);

    // What any XMPP client may ask.
    alpine.handle.ping(full_jid("boreal")).await.unwrap();
    let query = Element::builder("query", ns::DISCO_INFO).build();
    let features = alpine.handle.iq(full_jid("boreal"), false, query).await.unwrap().unwrap();
    assert!(features.children().any(|f| f.attr("var") == Some(ns::NEGOTIATION)));
    let query = Element::builder("query", ns::VERSION).build();
    let version = alpine.handle.iq(full_jid("boreal"), false, query).await.unwrap().unwrap();
    assert_eq!(version.get_child("name", ns::VERSION).map(Element::text).as_deref(), Some("cicada"));
    let bad = Element::builder("request", ns::NEGOTIATION).append("!").build();
    let refused = alpine.handle.iq(full_jid("boreal"), true, bad).await.unwrap_err();
    assert!(matches!(refused, RequestError::Refused { condition, .. } if condition == "bad-request"));
    boreal.sees(|s| s.refused.get(&(jid("alpine").to_string(), Refused::Malformed)) == Some(&1)).await;

    // An account of the same server that is no member.
    let (eve, mut events) = connect(Settings { room: None, ..server.settings("eve") }).unwrap();
    assert!(matches!(events.recv().await, Some(XmppEvent::Joined)));
    tokio::spawn(async move { while events.recv().await.is_some() {} });
    let request = Request { sealed: vec![1, 2, 3] };
    let refused = eve.iq(full_jid("alpine"), true, request.clone()).await.unwrap_err();
    assert!(
        matches!(&refused, RequestError::Refused { condition, .. } if condition == "forbidden"),
        "{refused}"
    );
    let answer = coral.handle.iq(full_jid("alpine"), true, request).await.unwrap().unwrap();
    assert_eq!(Answer::try_from(answer).unwrap().sealed, [3, 2, 1]);
    alpine.sees(|s| s.refused.get(&(jid("eve").to_string(), Refused::NotMember)) == Some(&1)).await;

    // Small questions are answered as long as there are few of them.
    let flood: Vec<_> = (0..100)
        .map(|_| {
            tokio::spawn({
                let eve = eve.clone();
                async move { eve.ping(full_jid("alpine")).await }
            })
        })
        .collect();
    alpine
        .sees(|s| s.refused.get(&(jid("eve").to_string(), Refused::RateLimit)).is_some_and(|n| *n >= 20))
        .await;
    coral.handle.ping(full_jid("alpine")).await.unwrap();
    flood.iter().for_each(|asked| asked.abort());
    eve.close().await;

    // A burst of changes travels as few presences, the last one included.
    let before = boreal.seen.borrow().presences;
    for load in 2..=40 {
        alpine.handle.set_presence(cloud("alpine", load));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let load_of = |s: &Seen| s.online["alpine"].cloud.as_ref().and_then(|c| c.load);
    let seen = boreal.sees(|s| load_of(s) == Some(40)).await;
    assert!(seen.presences - before <= 3, "{} presences", seen.presences - before);
    assert_eq!(alpine.seen.borrow().joined, 1);

    // One vanishes without a word: shown as gone, and cannot be asked.
    wire.cut();
    let start = Instant::now();
    alpine.sees(|s| !s.online.contains_key("coral")).await;
    println!("seen gone after {:?}, of which {HIBERNATION:?} are the server's", start.elapsed());
    assert!(matches!(alpine.ask("coral", vec![1]).await, Err(RequestError::NotOnline(_))));
    // One leaves properly: at once.
    boreal.handle.close().await;
    alpine.sees(|s| !s.online.contains_key("boreal")).await;
    alpine.handle.close().await;
    assert_eq!(alpine.ask("coral", vec![1]).await, Err(RequestError::Closed));
}

async fn a_broken_connection_is_mended_and_a_crashed_broker_takes_its_place_back(kind: Kind) {
    log();
    let server = Server::start(kind, &["alpine", "boreal"]);
    server.room_of(&["alpine", "boreal"]).await;
    let wire = Wire::to(server.port).await;
    let alpine = Broker::start(server.settings("alpine"));
    let boreal = Broker::start(wire.through(server.settings("boreal")));
    alpine.sees_member("boreal").await;
    boreal.sees_member("alpine").await;

    // A short cut goes unnoticed by the others: the session resumes.
    wire.cut();
    wire.mend();
    assert_eq!(alpine.ask("boreal", vec![1, 2]).await, Ok(vec![2, 1]));

    // A longer one is noticed here, and asked requests fail at once instead of hanging; the session
    // is still resumed, and the room is entered again.
    wire.cut();
    boreal.sees(|s| s.down.is_some()).await;
    assert!(matches!(boreal.ask("alpine", vec![1]).await, Err(RequestError::NotOnline(_))));
    wire.mend();
    boreal.sees_member("alpine").await;
    assert_eq!(boreal.ask("alpine", vec![1, 2]).await, Ok(vec![2, 1]));

    // One longer than the server waits ends the session; a new one begins.
    wire.cut();
    alpine.sees(|s| !s.online.contains_key("boreal")).await;
    wire.mend();
    alpine.sees_member("boreal").await;
    boreal.sees_member("alpine").await;
    assert_eq!(boreal.ask("alpine", vec![1, 2]).await, Ok(vec![2, 1]));
    assert_eq!(alpine.ask("boreal", vec![1, 2]).await, Ok(vec![2, 1]));

    // A broker crashes and is started again before the server noticed.
    wire.cut();
    let start = Instant::now();
    let reborn = Broker::start(Settings { room: Some(ROOM.into()), ..server.settings("boreal") });
    reborn.handle.set_presence(cloud("boreal", 77));
    alpine
        .sees(|s| s.online.get("boreal").and_then(|p| p.cloud.as_ref()).is_some_and(|c| c.load == Some(77)))
        .await;
    assert_eq!(alpine.ask("boreal", vec![5]).await, Ok(vec![5]));
    println!("a crashed broker is back after {:?}", start.elapsed());
    let connections = wire.count.load(Ordering::SeqCst);
    // ejabberd 23.01 takes two for a login, since it fails the binding that it offers.
    let most = if kind.software == Software::Ejabberd { 12 } else { 6 };
    assert!(connections <= most, "{connections} connections");
}

async fn a_killed_server_is_found_again(kind: Kind) {
    log();
    let server = Server::start(kind, &["alpine", "boreal"]);
    server.room_of(&["alpine", "boreal"]).await;
    let alpine = Broker::start(server.settings("alpine"));
    let boreal = Broker::start(server.settings("boreal"));
    alpine.sees_member("boreal").await;
    boreal.sees_member("alpine").await;
    server.kill();
    let down = alpine.sees(|s| s.down.is_some()).await;
    assert!(down.online.is_empty(), "nobody can be said to be here");
    let unanswered = alpine.ask("boreal", vec![1]).await;
    assert!(matches!(unanswered, Err(RequestError::NotOnline(_))), "{unanswered:?}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    server.restart();
    let start = Instant::now();
    alpine.sees_member("boreal").await;
    boreal.sees_member("alpine").await;
    println!("together again {:?} after the restart", start.elapsed());
    assert_eq!(alpine.ask("boreal", vec![1, 2]).await, Ok(vec![2, 1]));
    assert_eq!(boreal.ask("alpine", vec![1, 2]).await, Ok(vec![2, 1]));
}

/// An interceptor with a certificate for the domain is what no check of certificates notices.
async fn who_holds_the_servers_certificate_does_not_come_between_where_binding_is_required(kind: Kind) {
    log();
    let server = Server::start(kind, &["alpine", "boreal"]);
    server.room_of(&["alpine"]).await;
    let require = |settings| Settings {
        rules: LoginRules { channel_binding: BindingRule::Require, ..LoginRules::default() },
        ..settings
    };
    let first = Broker::start(require(server.settings("alpine")));
    if let Some(reason) = first.sees(|s| s.down.is_some() || s.joined == 1).await.down {
        if kind.software == Software::Ejabberd {
            // 23.01 fails what it offers, and does not mind a client that saw no offer (24.12 does): there is
            // nothing to require, and what is only preferred is done without.
            assert!(reason.contains("refuses the login bound to this TLS connection"), "{reason}");
            first.handle.close().await;
            Broker::start(server.settings("alpine")).sees(|s| s.joined == 1).await;
            return;
        }
        // Debian 12's Prosody, as it is, offers no binding that TLS 1.3 has; Debian 13's does.
        assert!(reason.contains("offers no channel binding over TLS 1.3"), "{reason}");
        server.offer_binding();
    }
    first.handle.close().await;
    let bound = Broker::start(require(server.settings("alpine")));
    bound.sees(|s| s.joined == 1).await;
    bound.handle.close().await;

    let relays = Interceptor::before(&server, false).await;
    let seen =
        Broker::start(require(relays.between(server.settings("alpine")))).sees(|s| s.down.is_some()).await;
    let reason = seen.down.unwrap();
    assert!(reason.contains("refuses the login bound to this TLS connection"), "{reason}");
    // Where it is only preferred, who can break it can also do without it: what THREATS.md says.
    let fooled = Broker::start(relays.between(server.settings("alpine")));
    fooled.sees(|s| s.joined == 1).await;
    fooled.handle.close().await;

    // To hide the offer is of no use in either case: the server is told that none was seen.
    let strips = Interceptor::before(&server, true).await;
    let seen =
        Broker::start(require(strips.between(server.settings("alpine")))).sees(|s| s.down.is_some()).await;
    let reason = seen.down.unwrap();
    assert!(reason.contains("offers no channel binding over TLS 1.3"), "{reason}");
    let seen = Broker::start(strips.between(server.settings("alpine"))).sees(|s| s.down.is_some()).await;
    let reason = seen.down.unwrap();
    assert!(reason.contains("binds logins") && reason.contains("somebody stands between"), "{reason}");
}

async fn rooms_and_accounts_that_are_wrong_are_refused_with_the_reason(kind: Kind) {
    log();
    let server = Server::start(kind, &["alpine", "boreal", "eve"]);

    // A wrong password, told at once by both doors.
    let start = Instant::now();
    let wrong = Settings { password: "wrong".into(), ..server.settings("alpine") };
    let seen = Broker::start(wrong.clone()).sees(|s| s.down.is_some()).await;
    assert_eq!(seen.down.unwrap(), "the server refuses the password of alpine@federation.test");
    let Err(AdminError::Connect(e)) = Admin::open(wrong).await else { panic!() };
    assert!(e.to_string().contains("refuses the password"), "{e}");
    println!("two wrong passwords told after {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(5));

    // A server that another authority vouches for, and none at all.
    let other_ca = Server::start(kind, &["x"]);
    let stranger = Settings { ca_file: Some(other_ca.ca_file()), ..server.settings("alpine") };
    let seen = Broker::start(stranger).sees(|s| s.down.is_some()).await;
    assert!(seen.down.as_ref().unwrap().contains("certificate"), "{:?}", seen.down);
    assert!(seen.down.as_ref().unwrap().contains("xmpp.ca_file"), "{:?}", seen.down);
    // The port of the other kind of TLS: what is there, and what to set.
    let starttls = Some(format!("127.0.0.1:{}", server.port - 1));
    let other = Settings { server: starttls, ..server.settings("alpine") };
    let seen = Broker::start(other).sees(|s| s.down.is_some()).await;
    assert!(seen.down.as_ref().unwrap().contains("xmpp.security = \"starttls\""), "{:?}", seen.down);
    let other = Settings { security: Security::Starttls, ..server.settings("alpine") };
    let seen = Broker::start(other).sees(|s| s.down.is_some()).await;
    assert!(seen.down.as_ref().unwrap().contains("xmpp.security = \"direct-tls\""), "{:?}", seen.down);
    let nowhere = Settings { server: Some("127.0.0.1:1".into()), ..server.settings("alpine") };
    let seen = Broker::start(nowhere).sees(|s| s.down.is_some()).await;
    assert!(seen.down.as_ref().unwrap().contains("127.0.0.1:1"), "{:?}", seen.down);

    // Rooms.
    let alpine = Broker::start(server.settings("alpine"));
    let seen = alpine.sees(|s| s.down.is_some()).await;
    assert_eq!(seen.down.unwrap(), "there is no such room");
    // Two brokers of one account throw each other out for ever.
    alpine.handle.close().await;
    let in_room =
        |room: &str| Settings { room: Some(format!("{room}@rooms.{DOMAIN}")), ..server.settings("alpine") };
    let admin = connect(Settings { room: None, ..server.settings("admin") }).unwrap();
    for (room, option, value, reason) in [
        ("open", "membersonly", "0", "the room is not members-only"),
        ("masked", "whois", "moderators", "the room is anonymous"),
    ] {
        make_room(&admin.0, room, option, value).await;
        let seen = Broker::start(in_room(room)).sees(|s| s.down.is_some()).await;
        assert_eq!((seen.joined, seen.down.as_deref()), (0, Some(reason)));
    }

    // Administration mends them, keeps the list, and says who may not.
    let owner =
        Admin::open(Settings { room: in_room("open").room, ..server.settings("admin") }).await.unwrap();
    owner.create_room("mended", &Owners::default()).await.unwrap();
    let outside = Broker::start(in_room("open")).sees(|s| s.down.is_some()).await;
    assert_eq!(outside.down.unwrap(), "this account is not a member of the room");
    for name in ["alpine", "boreal"] {
        owner.add_member(&jid(name)).await.unwrap();
    }
    let broker = Broker::start(in_room("open"));
    broker.sees(|s| s.joined == 1).await;
    let list = owner.list_members().await.unwrap();
    let expected = [("admin", "owner"), ("alpine", "member"), ("boreal", "member")];
    assert_eq!(list.len(), expected.len());
    assert!(
        expected.iter().all(|(name, affiliation)| list.contains(&(jid(name), (*affiliation).to_owned())))
    );
    let eve = Admin::open(Settings { room: in_room("open").room, ..server.settings("eve") }).await.unwrap();
    assert!(matches!(eve.add_member(&jid("eve")).await, Err(AdminError::Request { .. })));

    // A member that is removed is out, and a room that is opened is left.
    let other = Settings { room: in_room("open").room, ..server.settings("boreal") };
    let boreal = Broker::start(other);
    boreal.sees(|s| s.joined == 1).await;
    boreal.sees_member("alpine").await;
    owner.remove_member(&jid("alpine")).await.unwrap();
    let removed = broker.sees(|s| s.down.is_some()).await;
    let reason = removed.down.unwrap();
    assert!(reason.contains("member"), "{reason}");
    boreal.sees(|s| s.removed == [jid("alpine")] && !s.online.contains_key("alpine")).await;
    make_room(&admin.0, "open", "membersonly", "0").await;
    let left = boreal.sees(|s| s.down.is_some()).await;
    assert_eq!(left.down.as_deref(), Some("the room is not members-only"));
}

/// A room as careless owners make them: one option is other than a federation needs.
async fn make_room(admin: &Handle, room: &str, option: &str, value: &str) {
    let room = format!("{room}@rooms.{DOMAIN}");
    let enter =
        xmpp_parsers::presence::Presence::available().with_to(Jid::new(&format!("{room}/owner")).unwrap());
    admin.send(enter.with_payload(Muc::new())).await;
    let field = |var: &str, value: &str| {
        Field::new(&format!("muc#roomconfig_{var}"), FieldType::TextSingle).with_value(value)
    };
    let mut fields = vec![field("persistentroom", "1")];
    for (var, good) in [("membersonly", "1"), ("whois", "anyone")] {
        fields.push(field(var, if var == option { value } else { good }));
    }
    let form = DataForm::new(DataFormType::Submit, ns::MUC_ROOM_CONFIG, fields);
    let query = cicada::stanza::muc::OwnerQuery { form: Some(form) };
    admin.iq(Jid::new(&room).unwrap(), true, query).await.unwrap();
}
