//! Who is a member, with which key, and what presence claims.

use std::time::Duration;

use cicada::interface::{MoveRequest, Reply, Request};
use cicada::migration::{AnswerBody, RequestBody};
use cicada::stanza::Request as RequestStanza;
use cicada::stanza::cloud::Capacity;
use cicada::types::IdentityKey;
use cicada::xmpp::admin::Admin;
use cicada::xmpp::{RequestError, connect};
use xmpp_parsers::jid::Jid;

use crate::Bench;
use crate::peer::{Manners, Matter, Spoil, raw, seal};

pub fn rows(bench: &mut Bench) {
    presence_rows(bench);
    key_rows(bench);
    outsider(bench);
    expelled(bench);
}

fn presence_rows(bench: &mut Bench) {
    let honest = bench.mallory.cloud();
    let most = Capacity {
        cpus: u64::MAX,
        cpus_free: u64::MAX,
        memory: u64::MAX,
        memory_free: u64::MAX,
        storage: u64::MAX,
        storage_free: u64::MAX,
    };
    let lies = [
        (
            "2^64-1 of everything",
            {
                let mut c = honest.clone();
                c.capacity = Some(most);
                c
            },
            true,
        ),
        (
            "more free than there is",
            {
                let mut c = honest.clone();
                c.capacity = Some(Capacity { cpus: 0, ..most });
                c
            },
            false,
        ),
        (
            "100,000 bytes of features",
            {
                let mut c = honest.clone();
                c.features = vec![raw("f".repeat(100)); 1000];
                c
            },
            false,
        ),
        (
            "a region of 10,000 bytes",
            {
                let mut c = honest.clone();
                c.region = Some(raw("r".repeat(10_000)));
                c
            },
            false,
        ),
        (
            "the name of another cloud",
            {
                let mut c = honest.clone();
                c.name = "alpine".into();
                c
            },
            true,
        ),
        (
            "the name of another member",
            {
                let mut c = honest.clone();
                c.name = "victim".into();
                c
            },
            true,
        ),
        (
            "texts that run backwards",
            {
                let mut c = honest.clone();
                (c.region, c.software) = (Some(raw("\u{202e}nwod\u{2066}")), Some(raw("\u{85}\u{9b}2J")));
                c
            },
            false,
        ),
        (
            "a name that is none",
            {
                let mut c = honest.clone();
                c.name = raw("\u{202e}x y");
                c
            },
            true,
        ),
    ];
    for (words, cloud, _) in &lies {
        let region = format!("lie-{}", bench.table.len());
        let mut shown = cloud.clone();
        // A lie is told by the next presence having come after it.
        bench.mallory.show(shown.clone());
        std::thread::sleep(Duration::from_millis(3500));
        shown = honest.clone();
        shown.region = Some(region.as_str().into());
        let members = bench.world.members(0);
        let mallory = members.iter().find(|m| m.jid == bench.mallory.jid).unwrap();
        let texts = [&mallory.region, &mallory.software, &mallory.power].map(|t| t.as_str()).join(" ");
        assert!(texts.len() < 1000 && mallory.features.len() <= 64, "{words}");
        let controls =
            |c: char| c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        assert!(!texts.chars().any(controls), "{words}: {texts:?}");
        let victim = members.iter().find(|m| m.jid == bench.victim.jid).unwrap();
        assert_eq!(victim.cloud.as_ref().map(|c| c.to_string()).as_deref(), Some("victim"), "{words}");
        assert!(mallory.cloud.as_ref().is_none_or(|c| c.as_str() == "mallory"), "{words}");
        // Plans add up what members claim.
        let status = bench.status();
        assert_eq!(status.link, cicada::interface::LinkState::Online);
        bench.mallory.show(shown);
        bench.world.wait(words, 30, |w| {
            w.members(0)
                .iter()
                .any(|m| *m.region == *region && m.state == cicada::interface::MemberState::Online)
        });
        bench.table.row(
            "presence",
            words,
            "nobody else's name or entry changes, the next honest presence counts",
        );
    }
    bench.settled("presence");
}

fn key_rows(bench: &mut Bench) {
    let matter = Matter::new(1);
    assert!(matches!(
        bench.mallory.ask(matter, bench.mallory.reservation(matter)),
        AnswerBody::Reserved { .. }
    ));
    let mut cloud = bench.mallory.cloud();
    let other = IdentityKey::from_secret_bytes(&[99; 32]);
    cloud.key = other.public().to_string().into();
    let trust = |is: &str| {
        let (is, jid) = (is.to_owned(), bench.mallory.jid.clone());
        move |w: &crate::world::World| w.members(0).iter().any(|m| m.jid == jid && m.trust.as_str() == is)
    };
    bench.mallory.show(cloud);
    bench.world.wait("the changed key is seen", 30, trust("changed"));
    for spoil in [Spoil::Nothing, Spoil::AnothersKey] {
        let answer = bench.mallory.ask_spoiled(matter, bench.mallory.reservation(matter), spoil);
        assert!(matches!(&answer, Err(RequestError::Refused { .. })), "{answer:?}");
    }
    bench.refused_for("changed-key");
    bench.settled("a changed key");
    let mut none = bench.mallory.cloud();
    none.key = "no key".into();
    bench.mallory.show(none);
    bench.world.wait("the key is gone", 30, trust("no-key"));
    let answer = bench.mallory.ask_spoiled(matter, bench.mallory.reservation(matter), Spoil::Nothing);
    assert!(matches!(&answer, Err(RequestError::Refused { .. })), "{answer:?}");
    bench.refused_for("untrusted-key");
    bench.mallory.show(bench.mallory.cloud());
    bench.world.wait("the pinned key is seen again", 30, trust("trusted"));
    bench.table.row(
        "presence",
        "another key than the pinned one",
        "requests of either key refused and logged; the lease ends",
    );
    bench.table.row("presence", "no key", "requests refused and logged");
}

/// Knows the broker's address, and is no member.
fn outsider(bench: &mut Bench) {
    let mut settings = bench.world.account("outsider");
    settings.room = None;
    let sealed = |bench: &Bench| {
        let matter = Matter::new(1);
        let mut envelope = bench.mallory.envelope(matter, bench.mallory.reservation(matter));
        envelope.from = "outsider@federation.test".parse().unwrap();
        seal(&envelope, &bench.mallory.key, Spoil::Nothing)
    };
    let payload = RequestStanza { sealed: sealed(bench) };
    let real = Jid::new(&format!("{}/cicada", bench.mallory.real)).unwrap();
    let answer = bench.mallory.block_on(async {
        let (handle, mut events) = connect(settings).unwrap();
        tokio::spawn(async move { while events.recv().await.is_some() {} });
        let answer = handle.iq(real, true, payload).await;
        handle.close().await;
        answer
    });
    assert!(
        matches!(&answer, Err(RequestError::Refused { condition, .. }) if condition == "forbidden"),
        "{answer:?}"
    );
    bench.refused_for("not-member");
    bench.settled("an outsider");
    bench.table.row("no member", "a sealed request to the known address", "refused: forbidden, and logged");
}

/// A member whose membership is taken in the middle of two moves.
fn expelled(bench: &mut Bench) {
    let matter = Matter::new(1);
    let peer = &bench.victim;
    peer.behave(Manners::Slow);
    assert!(matches!(peer.ask(matter, peer.reservation(matter)), AnswerBody::Reserved { .. }));
    let own = bench.new_vm();
    let moving = bench.begin_move(&own);
    let asked = std::iter::from_fn(|| bench.mallory.asked(Duration::from_secs(30)))
        .find_map(|asked| match &asked.envelope.body {
            RequestBody::Initialization(_) => Some(asked),
            RequestBody::Configuration { .. } => {
                let yes = cicada::migration::message::CheckAnswer {
                    differences: vec![],
                    blockers: vec![],
                    components_lacking: vec![],
                    packs_lacking: vec![],
                    seed: None,
                    kept: None,
                    composed: false,
                    reads_devices: true,
                };
                bench.mallory.answer(asked, AnswerBody::Configuration(yes), Spoil::Nothing);
                None
            }
            _ => {
                bench.mallory.answer(
                    asked,
                    AnswerBody::Reserved { expires_in_s: 60, reservation: None, known: None },
                    Spoil::Nothing,
                );
                None
            }
        })
        .expect("the broker comes to the initialization");
    let RequestBody::Initialization(init) = asked.envelope.body.clone() else { unreachable!() };
    let addresses: Vec<_> = init.addresses.iter().map(|a| a.parse().unwrap()).collect();
    let connection = bench
        .mallory
        .block_on(bench.mallory.endpoint.connect(&addresses, bench.mallory.real_key))
        .expect("a member is let in");
    let admin = bench.world.account("admin");
    let jids = [bench.mallory.jid.clone(), bench.victim.jid.clone()];
    bench.mallory.block_on(async {
        let admin = Admin::open(admin).await.unwrap();
        for jid in &jids {
            admin.remove_member(jid).await.unwrap();
        }
        admin.close().await;
    });
    bench.world.wait("they are seen to be gone", 30, |w| {
        w.members(0)
            .iter()
            .filter(|m| jids.contains(&m.jid))
            .all(|m| m.state != cicada::interface::MemberState::Online)
    });
    let ended = bench
        .mallory
        .block_on(async { tokio::time::timeout(Duration::from_secs(30), connection.closed()).await.is_ok() });
    assert!(ended, "the connection of one who is no member lives on");
    let dialled = bench.mallory.block_on(bench.mallory.endpoint.connect(&addresses, bench.mallory.real_key));
    assert!(dialled.is_err(), "one who is no member is let in");
    for peer in [&bench.mallory, &bench.victim] {
        let answer = peer.ask_spoiled(matter, RequestBody::Cancel { reason: "".into() }, Spoil::Nothing);
        assert!(
            matches!(&answer, Err(RequestError::Refused { condition, .. }) if condition == "forbidden"),
            "{answer:?}"
        );
    }
    bench.refused_for("not-member");
    drop(asked);
    bench.cancel_all();
    assert!(moving.outcome().is_err());
    assert_eq!(bench.world.vm(0, own.name.as_str()).ownership, cicada::interface::VmOwnership::Here);
    bench.settled("a member that was expelled");
    let request = Request::Move(MoveRequest::Begin {
        vm: own.name.to_string(),
        to: Some("mallory".into()),
        dry_run: false,
        force_stop: false,
    });
    assert!(!matches!(bench.world.call(0, &request), Ok(Reply::Migration(_))));
    bench.table.row(
        "expelled",
        "asks on, as source and as target",
        "refused: forbidden, and logged; the lease ends, the VM stays",
    );
    bench.table.row(
        "expelled",
        "fetches on over the open connection, or dials anew",
        "connection closed, dials refused",
    );
}
