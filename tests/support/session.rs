//! A broker's XMPP session without a broker behind it, and what it saw.

use std::collections::BTreeMap;
use std::time::Duration;

use cicada::federation::{Presence, Refused};
use cicada::stanza::Cloud;
use cicada::types::{IdentityKey, MemberJid};
use cicada::xmpp::{Handle, RequestError, Settings, XmppEvent, connect};
use tokio::sync::{mpsc, watch};

use crate::support::DOMAIN;

pub const SOON: Duration = Duration::from_secs(15);

pub fn jid(account: &str) -> MemberJid {
    format!("{account}@{DOMAIN}").parse().unwrap()
}

pub fn cloud(name: &str, load: u32) -> Cloud {
    Cloud {
        name: name.into(),
        key: IdentityKey::from_secret_bytes(&[7; 32]).public().to_string().into(),
        versions: "1".into(),
        power: "on".into(),
        load: Some(load),
        ..Cloud::default()
    }
}

/// What a broker saw so far.
#[derive(Default, Clone, Debug)]
pub struct Seen {
    pub joined: usize,
    /// Presences that came since the beginning.
    pub presences: usize,
    pub down: Option<String>,
    pub online: BTreeMap<String, Presence>,
    /// Members the room's owner removed.
    pub removed: Vec<MemberJid>,
    /// What the session refused by itself.
    pub refused: BTreeMap<(String, Refused), u64>,
}

/// A session that answers requests with the same bytes, turned round.
pub struct Broker {
    pub handle: Handle,
    pub seen: watch::Receiver<Seen>,
}

impl Broker {
    pub fn start(settings: Settings) -> Self {
        let name = settings.nick.to_string();
        let (handle, events) = connect(settings).unwrap();
        handle.set_presence(cloud(&name, 1));
        let (out, seen) = watch::channel(Seen::default());
        tokio::spawn(watch_events(events, out));
        Self { handle, seen }
    }

    /// Waits until `what` holds; panics with what was seen instead.
    pub async fn sees(&self, what: impl Fn(&Seen) -> bool) -> Seen {
        let mut seen = self.seen.clone();
        let result = tokio::time::timeout(SOON, seen.wait_for(&what)).await.map(|s| s.unwrap().clone());
        result.unwrap_or_else(|_| panic!("not seen in time; instead {:?}", self.seen.borrow()))
    }

    pub async fn sees_member(&self, name: &str) -> Presence {
        self.sees(|s| s.online.contains_key(name)).await.online[name].clone()
    }

    pub async fn ask(&self, to: &str, sealed: Vec<u8>) -> Result<Vec<u8>, RequestError> {
        self.handle.request(jid(to), sealed, Duration::from_secs(10)).await
    }
}

async fn watch_events(mut events: mpsc::Receiver<XmppEvent>, out: watch::Sender<Seen>) {
    while let Some(event) = events.recv().await {
        match event {
            XmppEvent::Joined => out.send_modify(|s| {
                s.joined += 1;
                s.down = None;
            }),
            XmppEvent::Down(reason) => out.send_modify(|s| {
                s.down = Some(reason);
                s.online.clear();
            }),
            XmppEvent::Presence(p) => out.send_modify(|s| {
                s.presences += 1;
                let name = p.jid.as_str().split('@').next().unwrap_or_default().to_owned();
                let is_same = s.online.get(&name).is_some_and(|before| before.resource == p.resource);
                match p.available {
                    true if p.cloud.is_some() => drop(s.online.insert(name, p)),
                    // Others of its account come and go beside a broker.
                    false if is_same => drop(s.online.remove(&name)),
                    _ => {}
                }
            }),
            XmppEvent::Removed(member) => out.send_modify(|s| s.removed.push(member)),
            XmppEvent::Refused(t) => out.send_modify(|s| {
                *s.refused.entry((t.sender, t.refused)).or_default() += t.count;
            }),
            XmppEvent::Request(request) => {
                let _ = request.reply.send(Some(request.sealed.into_iter().rev().collect()));
            }
        }
    }
}
