//! The session: one task owns the stanza stream, unsplit. It stays joined to the room whatever
//! happens to the connection, and gives every request its own timeout, since after a broken
//! connection the fate of what was under way is unknown.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use tokio::sync::{mpsc, oneshot};
use tokio_xmpp::Stanza;
use tokio_xmpp::stanzastream::{Connection, Event, StanzaStream, StreamEvent};
use xmpp_parsers::disco::{DiscoInfoQuery, DiscoInfoResult};
use xmpp_parsers::iq::{Iq, IqPayload};
use xmpp_parsers::jid::Jid;
use xmpp_parsers::minidom::Element;
use xmpp_parsers::ping::Ping;
use xmpp_parsers::stanza_error::{DefinedCondition, ErrorType, StanzaError};

use crate::federation::Presence;
use crate::stanza::{Answer, Cloud, Request, ns};
use crate::types::{CloudName, MemberJid};

use super::connector::{Connector, Security};
use super::room::{self, RoomPresence};

const STREAM_DEPTH: usize = 64;
const BACKOFF_FIRST: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(15);
/// After a refused password, which only an operator can mend.
const BACKOFF_REFUSED: Duration = Duration::from_secs(30);
/// A link that lived shorter than this died of something that will happen again.
const SHORT_LIFE: Duration = Duration::from_secs(2);
const REJOIN_AFTER: Duration = Duration::from_secs(15);
/// XEP-0410: whether the room still knows us.
const SELF_PING_EVERY: Duration = Duration::from_secs(60);
const IQ_TIMEOUT: Duration = Duration::from_secs(10);
/// Presence is sent at most this often.
const PRESENCE_EVERY: Duration = Duration::from_secs(2);
const SEALED_BYTES_MAX: usize = 128 << 10;
/// Requests of others being answered at once; more are told to wait.
const REQUESTS_MAX: usize = 256;

/// Which account, which server, which room.
#[derive(Clone)]
pub struct Settings {
    pub jid: MemberJid,
    pub password: String,
    /// `host` or `host:port`; the account's domain if not set.
    pub server: Option<String>,
    pub security: Security,
    pub ca_file: Option<PathBuf>,
    /// Bare JID of the room; `None` for a session that only administers.
    pub room: Option<String>,
    pub nick: CloudName,
}

pub enum XmppEvent {
    /// The room was joined, checked, and its members follow.
    Joined,
    /// No session, or no room; why. It is tried again.
    Down(String),
    Presence(Presence),
    Request(IncomingRequest),
}

/// Another member's sealed request.
pub struct IncomingRequest {
    pub from: MemberJid,
    pub sealed: Vec<u8>,
    /// `None` refuses it.
    pub reply: oneshot::Sender<Option<Vec<u8>>>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error("{0} is not online")]
    NotOnline(String),
    #[error("no answer from {to} within {seconds} s")]
    Timeout { to: String, seconds: u64 },
    #[error("the connection broke before the answer came")]
    Unknown,
    #[error("{condition}{}{text}", if .text.is_empty() { "" } else { ": " })]
    Refused { condition: String, text: String },
    #[error("the session is closed")]
    Closed,
}

type IqReply = Result<Option<Element>, RequestError>;

enum Command {
    Presence(Box<Cloud>),
    Request { to: MemberJid, sealed: Vec<u8>, timeout: Duration, reply: oneshot::Sender<Result<Vec<u8>, RequestError>> },
    Iq { to: Jid, set: bool, payload: Element, reply: oneshot::Sender<IqReply> },
    Send(Box<Stanza>),
    Close(oneshot::Sender<()>),
}

/// What a login attempt came to.
enum Link {
    Failed { reason: String, refused: bool },
}

/// The way to the session's task; clones share it.
#[derive(Clone)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
}

impl Handle {
    /// Announces this cloud in the room, now or as soon as it is joined.
    pub fn set_presence(&self, cloud: Cloud) {
        // A full queue means that a newer presence follows soon.
        let _ = self.commands.try_send(Command::Presence(Box::new(cloud)));
    }

    /// Sends a sealed request to a member's broker and waits for the sealed answer.
    pub async fn request(&self, to: MemberJid, sealed: Vec<u8>, timeout: Duration) -> Result<Vec<u8>, RequestError> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Request { to, sealed, timeout, reply };
        self.commands.send(command).await.map_err(|_| RequestError::Closed)?;
        answer.await.map_err(|_| RequestError::Closed)?
    }

    /// Any IQ, for administration.
    pub async fn iq(&self, to: Jid, set: bool, payload: impl Into<Element>) -> IqReply {
        let (reply, answer) = oneshot::channel();
        let command = Command::Iq { to, set, payload: payload.into(), reply };
        self.commands.send(command).await.map_err(|_| RequestError::Closed)?;
        answer.await.map_err(|_| RequestError::Closed)?
    }

    /// Any stanza that needs no answer.
    pub async fn send(&self, stanza: impl Into<Stanza>) {
        let _ = self.commands.send(Command::Send(Box::new(stanza.into()))).await;
    }

    /// Leaves the room and ends the session.
    pub async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.commands.send(Command::Close(done)).await.is_ok() {
            let _ = tokio::time::timeout(Duration::from_secs(3), closed).await;
        }
    }
}

/// Starts the session's task. It lives until [`Handle::close`], or until every handle is gone.
pub fn connect(settings: Settings) -> std::io::Result<(Handle, mpsc::Receiver<XmppEvent>)> {
    let bad = |e: String| std::io::Error::new(std::io::ErrorKind::InvalidInput, e);
    let account = Jid::new(settings.jid.as_str()).map_err(|e| bad(e.to_string()))?;
    let domain = account.domain().as_str().to_owned();
    let connector =
        Connector::new(&domain, settings.server.as_deref(), settings.security, settings.ca_file.as_deref())?;
    // Two sessions with one full JID would throw each other out for ever.
    let resource = format!("cicada-{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
    let jid = Jid::new(&format!("{}/{resource}", settings.jid)).map_err(|e| bad(e.to_string()))?;
    let occupant = match &settings.room {
        Some(room) => Some(Jid::new(&format!("{room}/{}", settings.nick)).map_err(|e| bad(format!("room {room}: {e}")))?),
        None => None,
    };
    let (commands, inbox) = mpsc::channel(256);
    let (events, outbox) = mpsc::channel(1024);
    let (links, link_events) = mpsc::unbounded_channel();
    let stream = stanza_stream(connector, jid, settings.password, links);
    let session = Session {
        me: settings.jid,
        occupant,
        commands: commands.downgrade(),
        events,
        cloud: None,
        presence_due: false,
        presence_sent: None,
        room: RoomState::Outside { since: None },
        occupants: HashMap::new(),
        pending: HashMap::new(),
        counter: 0,
        was_online: false,
        answering: Arc::default(),
        refused: HashSet::new(),
        pinged: Instant::now(),
    };
    tokio::spawn(session.run(stream, inbox, link_events));
    Ok((Handle { commands }, outbox))
}

/// The stream with a connect loop of our own: backs off across failed and short-lived logins alike.
fn stanza_stream(
    connector: Connector,
    jid: Jid,
    password: String,
    links: mpsc::UnboundedSender<Link>,
) -> StanzaStream {
    let handed: Arc<std::sync::Mutex<(Option<Instant>, Duration)>> = Arc::new((None, BACKOFF_FIRST).into());
    let connect = move |_location, slot: oneshot::Sender<Connection>| {
        let (connector, jid, password) = (connector.clone(), jid.clone(), password.clone());
        let (links, handed) = (links.clone(), handed.clone());
        tokio::spawn(async move {
            let (last, mut delay) = *handed.lock().unwrap_or_else(|e| e.into_inner());
            let short_lived = last.is_some_and(|t| t.elapsed() < SHORT_LIFE);
            if short_lived {
                tokio::time::sleep(jittered(delay)).await;
                delay = (delay * 2).min(BACKOFF_MAX);
            } else {
                delay = BACKOFF_FIRST;
            }
            loop {
                match connector.login(&jid, &password).await {
                    Ok((mut features, stream)) => {
                        // A restarted server refuses to resume in a form the parser does not know, and
                        // the link dies at once: bind afresh then.
                        if short_lived {
                            features.stream_management = None;
                        }
                        *handed.lock().unwrap_or_else(|e| e.into_inner()) = (Some(Instant::now()), delay);
                        let _ = slot.send(Connection { stream: stream.box_stream(), features, identity: jid });
                        return;
                    }
                    Err(e) => {
                        let refused = matches!(e, tokio_xmpp::Error::Auth(_));
                        let reason = if refused {
                            format!("the server refuses the password of {}", jid.to_bare())
                        } else {
                            format!("no session with the XMPP server: {e}")
                        };
                        let _ = links.send(Link::Failed { reason, refused });
                        tokio::time::sleep(jittered(if refused { BACKOFF_REFUSED } else { delay })).await;
                        delay = (delay * 2).min(BACKOFF_MAX);
                    }
                }
            }
        });
    };
    StanzaStream::new(Box::new(connect), STREAM_DEPTH)
}

/// Up to a quarter more, so that brokers do not all come back in the same moment.
fn jittered(d: Duration) -> Duration {
    let mut byte = [0];
    let _ = getrandom::fill(&mut byte);
    d + d.mul_f32(f32::from(byte[0]) / 1024.0)
}

enum RoomState {
    /// Not joined; since when a join was last tried.
    Outside { since: Option<Instant> },
    /// Joined, its features not checked yet.
    Entered,
    Inside,
    /// Not a room to be in, or one that does not let us in.
    Barred { since: Instant },
}

enum Waiting {
    Iq(oneshot::Sender<IqReply>),
    Request(oneshot::Sender<Result<Vec<u8>, RequestError>>),
    RoomFeatures,
    SelfPing,
}

struct Pending {
    waiting: Waiting,
    to: Jid,
    deadline: Instant,
    timeout: Duration,
}

struct Session {
    me: MemberJid,
    /// Our place in the room.
    occupant: Option<Jid>,
    commands: mpsc::WeakSender<Command>,
    events: mpsc::Sender<XmppEvent>,
    cloud: Option<Cloud>,
    presence_due: bool,
    presence_sent: Option<Instant>,
    room: RoomState,
    /// Members in the room: the resource of their broker, if it showed one.
    occupants: HashMap<MemberJid, HashMap<String, Presence>>,
    pending: HashMap<String, Pending>,
    counter: u64,
    was_online: bool,
    answering: Arc<AtomicUsize>,
    /// Outsiders whose requests were logged as refused.
    refused: HashSet<String>,
    pinged: Instant,
}

impl Session {
    async fn run(
        mut self,
        mut stream: StanzaStream,
        mut commands: mpsc::Receiver<Command>,
        mut links: mpsc::UnboundedReceiver<Link>,
    ) {
        let mut tick = tokio::time::interval(Duration::from_millis(500));
        loop {
            tokio::select! {
                event = stream.next() => match event {
                    Some(Event::Stream(event)) => self.stream_event(&mut stream, event).await,
                    Some(Event::Stanza(stanza)) => self.stanza(&mut stream, stanza).await,
                    None => break,
                },
                command = commands.recv() => match command {
                    Some(Command::Close(done)) => {
                        if let Some(occupant) = self.occupant.clone() {
                            stream.send(Box::new(room::leave(occupant).into())).await;
                        }
                        stream.close().await;
                        let _ = done.send(());
                        return;
                    }
                    Some(command) => self.command(&mut stream, command).await,
                    None => break,
                },
                Some(Link::Failed { reason, refused }) = links.recv() => {
                    if refused {
                        tracing::error!(reason, "XMPP login refused; it is tried again every 30 s");
                    }
                    self.down(reason).await;
                }
                _ = tick.tick() => self.tick(&mut stream).await,
            }
        }
        stream.close().await;
    }

    async fn emit(&self, event: XmppEvent) {
        // The broker reads until it shuts down; then nobody needs the event.
        let _ = self.events.send(event).await;
    }

    async fn down(&mut self, reason: String) {
        self.occupants.clear();
        if !matches!(self.room, RoomState::Barred { .. }) {
            self.room = RoomState::Outside { since: None };
        }
        self.emit(XmppEvent::Down(reason)).await;
    }

    async fn stream_event(&mut self, stream: &mut StanzaStream, event: StreamEvent) {
        match event {
            StreamEvent::Reset { .. } => {
                // What became of anything under way is unknown; callers ask again. Before the first
                // login nothing was under way: it is sent now.
                if std::mem::replace(&mut self.was_online, true) {
                    for (_, p) in self.pending.drain() {
                        p.waiting.end(Err(RequestError::Unknown));
                    }
                }
                self.occupants.clear();
                self.room = RoomState::Outside { since: None };
                self.join(stream).await;
            }
            StreamEvent::Suspended => self.emit_suspended(),
            StreamEvent::Resumed => tracing::info!("XMPP session resumed"),
        }
    }

    fn emit_suspended(&self) {
        tracing::info!("XMPP connection lost; trying to resume");
    }

    /// Joins the room, or announces what changed to it.
    async fn join(&mut self, stream: &mut StanzaStream) {
        let (Some(occupant), Some(cloud)) = (self.occupant.clone(), self.cloud.clone()) else { return };
        if let RoomState::Outside { since } = &mut self.room {
            *since = Some(Instant::now());
        }
        self.presence_due = false;
        self.presence_sent = Some(Instant::now());
        stream.send(Box::new(room::presence(occupant, cloud).into())).await;
    }

    async fn command(&mut self, stream: &mut StanzaStream, command: Command) {
        match command {
            Command::Presence(cloud) => {
                if self.cloud.as_ref() == Some(&*cloud) {
                    return;
                }
                let first = self.cloud.replace(*cloud).is_none();
                self.presence_due = true;
                if first {
                    self.join(stream).await;
                }
            }
            Command::Request { to, sealed, timeout, reply } => {
                let broker = self.occupants.get(&to).and_then(|r| r.values().find(|p| p.cloud.is_some()));
                let jid = broker.and_then(|p| Jid::new(&format!("{to}/{}", p.resource)).ok());
                match jid {
                    Some(jid) => {
                        let payload = Element::from(Request { sealed });
                        self.send_iq(stream, jid, true, payload, Waiting::Request(reply), timeout).await;
                    }
                    None => drop(reply.send(Err(RequestError::NotOnline(to.to_string())))),
                }
            }
            Command::Iq { to, set, payload, reply } => {
                self.send_iq(stream, to, set, payload, Waiting::Iq(reply), IQ_TIMEOUT).await;
            }
            Command::Send(stanza) => drop(stream.send(stanza).await),
            // Taken before it gets here.
            Command::Close(_) => {}
        }
    }

    async fn send_iq(
        &mut self,
        stream: &mut StanzaStream,
        to: Jid,
        set: bool,
        payload: Element,
        waiting: Waiting,
        timeout: Duration,
    ) {
        self.counter += 1;
        let id = format!("c{}", self.counter);
        let deadline = Instant::now() + timeout;
        self.pending.insert(id.clone(), Pending { waiting, to: to.clone(), deadline, timeout });
        let to = Some(to);
        let iq = if set { Iq::Set { from: None, to, id, payload } } else { Iq::Get { from: None, to, id, payload } };
        stream.send(Box::new(Stanza::Iq(iq))).await;
    }

    async fn tick(&mut self, stream: &mut StanzaStream) {
        let now = Instant::now();
        let late: Vec<_> = self.pending.iter().filter(|(_, p)| p.deadline <= now).map(|(id, _)| id.clone()).collect();
        for id in late {
            let Some(p) = self.pending.remove(&id) else { continue };
            let timeout = RequestError::Timeout { to: p.to.to_string(), seconds: p.timeout.as_secs() };
            match p.waiting {
                Waiting::RoomFeatures | Waiting::SelfPing => self.left(stream, "the room does not answer").await,
                waiting => waiting.end(Err(timeout)),
            }
        }
        match &self.room {
            RoomState::Outside { since: Some(since) } | RoomState::Barred { since } if since.elapsed() > REJOIN_AFTER => {
                self.room = RoomState::Outside { since: Some(now) };
                self.join(stream).await;
            }
            RoomState::Inside if self.presence_due && self.presence_sent.is_none_or(|t| t.elapsed() > PRESENCE_EVERY) => {
                self.join(stream).await;
            }
            RoomState::Inside if self.pinged.elapsed() > SELF_PING_EVERY => {
                self.pinged = now;
                if let Some(occupant) = self.occupant.clone() {
                    self.send_iq(stream, occupant, false, Ping.into(), Waiting::SelfPing, IQ_TIMEOUT).await;
                }
            }
            _ => {}
        }
    }

    async fn left(&mut self, stream: &mut StanzaStream, reason: &str) {
        self.down(reason.to_owned()).await;
        self.room = RoomState::Outside { since: Some(Instant::now()) };
        self.join(stream).await;
    }

    async fn stanza(&mut self, stream: &mut StanzaStream, stanza: Stanza) {
        match stanza {
            Stanza::Presence(p) => {
                let ours = self.occupant.as_ref().map(|o| o.to_bare());
                if p.from.as_ref().map(|f| f.to_bare()) == ours && ours.is_some() {
                    self.room_presence(stream, &p).await;
                }
            }
            Stanza::Iq(iq @ (Iq::Get { .. } | Iq::Set { .. })) => self.asked(stream, iq).await,
            Stanza::Iq(iq) => self.answered(stream, iq).await,
            Stanza::Message(_) => {}
        }
    }

    async fn room_presence(&mut self, stream: &mut StanzaStream, stanza: &xmpp_parsers::presence::Presence) {
        match room::read(stanza) {
            RoomPresence::Refused(reason) => {
                self.room = RoomState::Barred { since: Instant::now() };
                self.emit(XmppEvent::Down(reason)).await;
            }
            RoomPresence::Myself(presence) => {
                if presence.as_ref().is_some_and(|p| !p.available) {
                    return self.left(stream, "we were removed from the room").await;
                }
                if let Some(p) = presence {
                    self.member(p).await;
                }
                if matches!(self.room, RoomState::Outside { .. }) {
                    self.room = RoomState::Entered;
                    let Some(room) = self.occupant.as_ref().map(|o| Jid::from(o.to_bare())) else { return };
                    let query = Element::from(DiscoInfoQuery { node: None });
                    self.send_iq(stream, room, false, query, Waiting::RoomFeatures, IQ_TIMEOUT).await;
                }
            }
            RoomPresence::Member(p) => self.member(p).await,
            RoomPresence::Irrelevant => {}
        }
    }

    async fn member(&mut self, p: Presence) {
        let resources = self.occupants.entry(p.jid.clone()).or_default();
        if p.available {
            resources.insert(p.resource.clone(), p.clone());
        } else {
            resources.remove(&p.resource);
            if resources.is_empty() {
                self.occupants.remove(&p.jid);
            }
        }
        // Before the room was checked, nobody in it counts.
        if matches!(self.room, RoomState::Inside) && p.jid != self.me {
            self.emit(XmppEvent::Presence(p)).await;
        }
    }

    async fn answered(&mut self, stream: &mut StanzaStream, iq: Iq) {
        let (header, payload) = iq.split();
        let fits = self.pending.get(&header.id).is_some_and(|p| header.from.as_ref() == Some(&p.to));
        // An answer from somebody who was not asked is noise.
        let Some(pending) = fits.then(|| self.pending.remove(&header.id)).flatten() else { return };
        let result = match payload {
            IqPayload::Result(element) => Ok(element),
            IqPayload::Error(e) => Err(RequestError::Refused {
                condition: condition_of(&e),
                text: e.texts.values().next().cloned().unwrap_or_default(),
            }),
            _ => return,
        };
        match pending.waiting {
            Waiting::RoomFeatures => self.room_checked(stream, result).await,
            Waiting::SelfPing => {
                // XEP-0410, section 3: these say that we are not in it any more.
                let gone = matches!(&result, Err(RequestError::Refused { condition, .. })
                    if ["not-acceptable", "item-not-found", "service-unavailable"].contains(&condition.as_str()));
                if gone {
                    self.left(stream, "the room has forgotten us").await;
                }
            }
            waiting => waiting.end(result),
        }
    }

    async fn room_checked(&mut self, stream: &mut StanzaStream, result: IqReply) {
        let features = result.ok().flatten().and_then(|e| DiscoInfoResult::try_from(e).ok());
        let fault = match &features {
            Some(features) => room::fault(features),
            None => Some("the room does not tell its configuration".into()),
        };
        if let Some(reason) = fault {
            tracing::error!(reason, "leaving the room; let its owner run 'cicada federation create' again");
            if let Some(occupant) = self.occupant.clone() {
                stream.send(Box::new(room::leave(occupant).into())).await;
            }
            self.occupants.clear();
            self.room = RoomState::Barred { since: Instant::now() };
            return self.emit(XmppEvent::Down(reason)).await;
        }
        self.room = RoomState::Inside;
        self.pinged = Instant::now();
        self.emit(XmppEvent::Joined).await;
        let seen: Vec<_> = self.occupants.values().flat_map(|r| r.values().cloned()).collect();
        for p in seen.into_iter().filter(|p| p.jid != self.me) {
            self.emit(XmppEvent::Presence(p)).await;
        }
    }

    async fn asked(&mut self, stream: &mut StanzaStream, iq: Iq) {
        let (header, payload) = iq.split();
        let Some(from) = header.from else { return };
        let id = header.id;
        let refuse = |kind, condition, text: &str| {
            Iq::from_error(id.clone(), StanzaError::new(kind, condition, "en", text)).with_to(from.clone())
        };
        let answer = match payload {
            IqPayload::Get(e) if e.is("ping", ns::PING) => Iq::empty_result(from.clone(), id.clone()),
            IqPayload::Get(e) if e.is("query", ns::DISCO_INFO) => {
                let node = e.attr("node").map(str::to_owned);
                Iq::from_result(id.clone(), Some(room::disco(node))).with_to(from.clone())
            }
            IqPayload::Set(e) if e.is("request", ns::NEGOTIATION) => {
                let bare: Option<MemberJid> = from.to_bare().to_string().parse().ok();
                let member = bare.filter(|b| matches!(self.room, RoomState::Inside) && self.occupants.contains_key(b));
                match (member, Request::try_from(e)) {
                    (None, _) => {
                        if self.refused.len() < 1000 && self.refused.insert(from.to_bare().to_string()) {
                            tracing::warn!(from = %from, "request refused: the sender is not in the room");
                        }
                        refuse(ErrorType::Auth, DefinedCondition::Forbidden, "only members of the federation may ask")
                    }
                    (_, Err(e)) => refuse(ErrorType::Modify, DefinedCondition::BadRequest, &e.to_string()),
                    (_, Ok(r)) if r.sealed.len() > SEALED_BYTES_MAX => {
                        refuse(ErrorType::Modify, DefinedCondition::ResourceConstraint, "too large")
                    }
                    (Some(member), Ok(request)) => {
                        if self.answering.fetch_add(1, Ordering::SeqCst) < REQUESTS_MAX {
                            return self.forward(member, from, id, request).await;
                        }
                        self.answering.fetch_sub(1, Ordering::SeqCst);
                        refuse(ErrorType::Wait, DefinedCondition::ResourceConstraint, "too many requests")
                    }
                }
            }
            _ => refuse(ErrorType::Cancel, DefinedCondition::ServiceUnavailable, ""),
        };
        stream.send(Box::new(Stanza::Iq(answer))).await;
    }

    /// Hands a request to the broker and sends its answer when it comes.
    async fn forward(&self, member: MemberJid, from: Jid, id: String, request: Request) {
        let (reply, answer) = oneshot::channel();
        let (commands, answering) = (self.commands.clone(), self.answering.clone());
        tokio::spawn(async move {
            let answer = tokio::time::timeout(IQ_TIMEOUT, answer).await;
            answering.fetch_sub(1, Ordering::SeqCst);
            let iq = match answer {
                Ok(Ok(Some(sealed))) => Iq::from_result(id, Some(Answer { sealed })).with_to(from),
                Ok(Ok(None)) => {
                    let text = "the request was refused; let that cloud's operator see its log";
                    Iq::from_error(id, StanzaError::new(ErrorType::Auth, DefinedCondition::Forbidden, "en", text))
                        .with_to(from)
                }
                _ => {
                    let text = "the broker does not answer now";
                    let e = StanzaError::new(ErrorType::Wait, DefinedCondition::ServiceUnavailable, "en", text);
                    Iq::from_error(id, e).with_to(from)
                }
            };
            if let Some(commands) = commands.upgrade() {
                let _ = commands.send(Command::Send(Box::new(Stanza::Iq(iq)))).await;
            }
        });
        self.emit(XmppEvent::Request(IncomingRequest { from: member, sealed: request.sealed, reply })).await;
    }
}

impl Waiting {
    fn end(self, result: IqReply) {
        match self {
            Waiting::Iq(reply) => drop(reply.send(result)),
            Waiting::Request(reply) => {
                let bad = || RequestError::Refused { condition: "bad answer".into(), text: String::new() };
                let sealed = result.and_then(|element| {
                    element.and_then(|e| Answer::try_from(e).ok()).map(|a| a.sealed).ok_or_else(bad)
                });
                drop(reply.send(sealed));
            }
            Waiting::RoomFeatures | Waiting::SelfPing => {}
        }
    }
}

fn condition_of(e: &StanzaError) -> String {
    // The element's name is the condition's.
    Element::from(e.clone())
        .children()
        .find(|c| c.name() != "text")
        .map_or_else(|| "error".to_owned(), |c| c.name().to_owned())
}
