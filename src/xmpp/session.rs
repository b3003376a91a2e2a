//! The session: one task owns the stanza stream, unsplit. It stays joined to the room whatever
//! happens to the connection.
//!
//! ```text
//!             session up            room may be used          our presence comes back
//!   Offline ------------> Checking ------------------> Admitted -----> Entering ------> Inside
//!      ^                     |  ^                                          |               |
//!      |        not a room   v  | after a while        refused, no answer  |   removed,    |
//!      |        to be in   Barred <----------------------------------------+   forgotten   |
//!      +--------- session lost (from any) ------------------ Checking <--------------------+
//! ```

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use tokio::sync::{mpsc, watch};
use tokio_xmpp::Stanza;
use tokio_xmpp::stanzastream::{Event, StanzaStream, StreamEvent};
use xmpp_parsers::disco::{DiscoInfoQuery, DiscoInfoResult};
use xmpp_parsers::iq::{Iq, IqPayload};
use xmpp_parsers::jid::Jid;
use xmpp_parsers::minidom::Element;
use xmpp_parsers::ping::Ping;
use xmpp_parsers::presence::Presence as PresenceStanza;

use crate::clock::UnixMillis;
use crate::federation::{Announcer, Damper, Presence};
use crate::migration::envelope::SEALED_BYTES_MAX;
use crate::stanza::error::{condition_name, text_of};
use crate::stanza::{Cloud, Request};
use crate::types::MemberJid;

use super::answering::Answering;
use super::connector::Connector;
use super::handle::{Command, Handle, IQ_TIMEOUT, IqReply, RequestError, Settings, XmppEvent};
use super::link::{self, Trouble};
use super::needs::Lacks;
use super::outbox::Outbox;
use super::pending::{Pending, Waiting};
use super::refusals::Strangers;
use super::room::{self, Refusal, RoomPresence};
use super::visit::Visits;

mod asked;

/// How long to wait before a room that did not let us in, or may not be used, is asked again: first, and
/// twice as long each time up to the most. ejabberd says for a moment after its start that no room exists.
const REJOIN_AFTER: Duration = Duration::from_secs(1);
const REJOIN_AFTER_MAX: Duration = Duration::from_secs(15);
/// XEP-0410: whether the room still knows us.
const SELF_PING_EVERY: Duration = Duration::from_secs(60);
/// Presence is sent at most this often; up to half as long again at random, so that members whose
/// state changes together do not all speak at once.
const PRESENCE_PAUSE: Duration = Duration::from_secs(2);
/// Accounts in the room that are told apart; a room of more is none of ours.
const OCCUPANTS_MAX: usize = 10_000;
/// Sessions of one account that are told apart.
const SESSIONS_MAX: usize = 8;
const COMMANDS_DEPTH: usize = 256;
const EVENTS_DEPTH: usize = 1024;
const TICK: Duration = Duration::from_millis(500);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// What helps against a room that is not as it should be.
const OWNER_MENDS: &str = "let the room's owner run: cicada federation create";

/// Starts the session's task. It lives until [`Handle::close`], or until every handle is gone. The
/// events must be read: the session waits for its reader.
pub fn connect(settings: Settings) -> std::io::Result<(Handle, mpsc::Receiver<XmppEvent>)> {
    let bad = |e: String| std::io::Error::new(std::io::ErrorKind::InvalidInput, e);
    let account = Jid::new(settings.jid.as_str()).map_err(|e| bad(e.to_string()))?;
    let connector = Connector::new(
        account.domain().as_str(),
        settings.server.as_deref(),
        settings.security,
        settings.ca_file.as_deref(),
        settings.rules,
    )?;
    // Sessions that administer must not throw out the account's broker, nor each other.
    let resource = match settings.room {
        Some(_) => room::RESOURCE.to_owned(),
        None => format!("{}-{}", room::RESOURCE, uuid::Uuid::new_v4().simple()),
    };
    let me = Jid::new(&format!("{}/{resource}", settings.jid)).map_err(|e| bad(e.to_string()))?;
    let occupant = match &settings.room {
        Some(room) => Some(
            Jid::new(&format!("{room}/{}", settings.nick)).map_err(|e| bad(format!("room {room}: {e}")))?,
        ),
        None => None,
    };
    let (commands, inbox) = mpsc::channel(COMMANDS_DEPTH);
    let (events, outbox) = mpsc::channel(EVENTS_DEPTH);
    let (presence, wanted) = watch::channel(None);
    let (troubles, told) = mpsc::unbounded_channel();
    let ready = link::Ready::default();
    let stream = link::stanza_stream(connector, me.clone(), settings.password, ready.clone(), troubles);
    let refused = Arc::new(AtomicBool::new(false));
    let session = Session {
        refused: refused.clone(),
        account: settings.jid,
        me,
        occupant,
        commands: commands.downgrade(),
        events,
        outbox: Outbox::default(),
        pending: Pending::new(),
        visits: Visits::default(),
        place: Place::Offline,
        announcer: Announcer::default(),
        started: Instant::now(),
        occupants: HashMap::new(),
        ready,
        bound: false,
        pinged: Instant::now(),
        answering: Answering::default(),
        strangers: Strangers::new(Instant::now()),
        damper: Damper::default(),
        barred: 0,
        reason_told: String::new(),
        flaws_told: String::new(),
    };
    tokio::spawn(session.run(stream, inbox, wanted, told));
    Ok((Handle { commands, presence: Arc::new(presence), refused }, outbox))
}

/// Where we are; the diagram is at the top.
#[derive(Debug, Clone, Copy)]
enum Place {
    Offline,
    Checking,
    /// The room may be used; we enter as soon as there is something to say of ourselves.
    Admitted,
    Entering {
        since: Instant,
    },
    Inside,
    Barred {
        since: Instant,
    },
}

struct Session {
    /// Whether the server said no to who we are, at the last try.
    refused: Arc<AtomicBool>,
    account: MemberJid,
    /// Our full JID.
    me: Jid,
    /// Our place in the room.
    occupant: Option<Jid>,
    commands: mpsc::WeakSender<Command>,
    events: mpsc::Sender<XmppEvent>,
    outbox: Outbox,
    pending: Pending,
    /// To rooms other than ours.
    visits: Visits,
    place: Place,
    announcer: Announcer<Cloud>,
    /// Where the announcer's time begins.
    started: Instant,
    /// Members in the room with their sessions, by resource. Nobody else may ask us anything.
    occupants: HashMap<MemberJid, HashMap<String, Presence>>,
    /// Tells the link that its connection became a session.
    ready: link::Ready,
    /// Whether there ever was a session.
    bound: bool,
    pinged: Instant,
    answering: Answering,
    strangers: Strangers,
    /// Members whose presence changes too often.
    damper: Damper,
    /// How often in a row the room was asked anew in vain.
    barred: u32,
    /// The last reason logged, so that attempts do not repeat it.
    reason_told: String,
    /// What the room lacked when that was logged last.
    flaws_told: String,
}

impl Session {
    async fn run(
        mut self,
        mut stream: StanzaStream,
        mut commands: mpsc::Receiver<Command>,
        mut wanted: watch::Receiver<Option<Cloud>>,
        mut troubles: mpsc::UnboundedReceiver<Trouble>,
    ) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let closer = loop {
            self.outbox.pump(&stream).await;
            tokio::select! {
                event = stream.next() => match event {
                    Some(Event::Stream(event)) => self.stream_event(event).await,
                    Some(Event::Stanza(stanza)) => self.stanza(stanza).await,
                    None => break None,
                },
                command = commands.recv() => match command {
                    Some(Command::Close(done)) => break Some(done),
                    Some(command) => self.command(command),
                    None => break None,
                },
                Ok(()) = wanted.changed() => {
                    if let Some(cloud) = wanted.borrow_and_update().clone() {
                        self.announcer.want(cloud);
                        self.announce();
                    }
                }
                Some(trouble) = troubles.recv() => self.trouble(trouble).await,
                () = self.outbox.has_room() => {}
                _ = tick.tick() => self.tick().await,
            }
        };
        if matches!(self.place, Place::Entering { .. } | Place::Inside) {
            self.leave();
            self.outbox.pump(&stream).await;
        }
        self.pending.abandon();
        self.visits.abandon();
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, stream.close()).await;
        if let Some(done) = closer {
            let _ = done.send(());
        }
    }

    // What happens to the connection.

    async fn stream_event(&mut self, event: StreamEvent) {
        match event {
            StreamEvent::Reset { .. } => {
                self.ready.store(true, Ordering::SeqCst);
                // Before the first session nothing was under way: it is sent now.
                if std::mem::replace(&mut self.bound, true) {
                    self.pending.abandon();
                    self.visits.abandon();
                    self.outbox.clear();
                }
                if !matches!(self.place, Place::Offline) {
                    self.offline("the session with the XMPP server began anew".into()).await;
                }
                self.online().await;
            }
            StreamEvent::Suspended => tracing::info!("XMPP connection lost; trying to resume"),
            StreamEvent::Resumed => {
                self.ready.store(true, Ordering::SeqCst);
                tracing::info!("XMPP session resumed");
                // It took so long that everybody was declared absent.
                if matches!(self.place, Place::Offline) {
                    self.online().await;
                }
            }
        }
    }

    async fn online(&mut self) {
        self.reason_told.clear();
        self.barred = 0;
        match self.occupant {
            Some(_) => self.check_room(),
            None => {
                self.place = Place::Inside;
                self.emit(XmppEvent::Joined).await;
            }
        }
    }

    async fn trouble(&mut self, trouble: Trouble) {
        self.refused.store(trouble.refused, Ordering::Relaxed);
        if trouble.reason != self.reason_told {
            if trouble.refused {
                tracing::error!(
                    reason = trouble.reason,
                    "XMPP login refused; it is tried again every half minute"
                );
            } else {
                tracing::warn!(reason = trouble.reason, "XMPP");
            }
            self.reason_told.clone_from(&trouble.reason);
        }
        self.offline(trouble.reason).await;
    }

    /// Nobody can be said to be here.
    async fn offline(&mut self, reason: String) {
        self.place = Place::Offline;
        self.occupants.clear();
        self.damper.clear();
        self.emit(XmppEvent::Down(reason)).await;
    }

    async fn emit(&self, event: XmppEvent) {
        // The broker reads until it shuts down; then nobody needs the event.
        let _ = self.events.send(event).await;
    }

    // What the rest of the program wants.

    fn command(&mut self, command: Command) {
        match command {
            // Servers end a session over a stanza that is too large.
            Command::Request { sealed, reply, .. } if sealed.len() > SEALED_BYTES_MAX => {
                let text = format!("{} bytes are more than a message may have", sealed.len());
                drop(reply.send(Err(RequestError::Refused {
                    condition: "policy-violation".into(),
                    text: text.into(),
                })));
            }
            Command::Request { to, sealed, timeout, reply } => {
                let sessions = self.occupants.get(&to);
                let broker = sessions.and_then(|s| s.values().find(|p| p.cloud.is_some()));
                match broker.and_then(|p| Jid::new(&format!("{to}/{}", p.resource)).ok()) {
                    Some(jid) => {
                        let payload = Element::from(Request { sealed });
                        self.ask(jid, true, payload, Waiting::Request(reply), timeout);
                    }
                    None => drop(reply.send(Err(RequestError::NotOnline(to.to_string())))),
                }
            }
            Command::Iq { to, set, payload, reply } => {
                self.ask(to, set, payload, Waiting::Iq(reply), IQ_TIMEOUT);
            }
            // What waited for a session would make a room when nobody looks any more.
            Command::Visit { reply, .. } if matches!(self.place, Place::Offline) => {
                drop(reply.send(Err(Refusal::Silent)));
            }
            Command::Visit { occupant, reply } => {
                if let Some(presence) = self.visits.begin(occupant, IQ_TIMEOUT, reply) {
                    self.send(presence);
                }
            }
            Command::Send(stanza) => self.send(*stanza),
            // Taken before it gets here.
            Command::Close(_) => {}
        }
    }

    fn ask(&mut self, to: Jid, set: bool, payload: Element, waiting: Waiting, timeout: Duration) {
        let id = match self.pending.open(to.clone(), waiting, timeout) {
            Ok(id) => id,
            Err(waiting) => {
                let text = "too many questions are under way".into();
                return waiting
                    .end(Err(RequestError::Refused { condition: "resource-constraint".into(), text }));
            }
        };
        let to = Some(to);
        let iq = if set {
            Iq::Set { from: None, to, id, payload }
        } else {
            Iq::Get { from: None, to, id, payload }
        };
        self.send(iq);
    }

    /// Sends when the stream takes it. What does not fit is lost; whoever waits for an answer to it
    /// learns so by the deadline.
    fn send(&mut self, stanza: impl Into<Stanza>) {
        if !self.outbox.push(stanza) {
            tracing::warn!("too much waits to be sent to the XMPP server; a stanza is dropped");
        }
    }

    async fn tick(&mut self) {
        let now = Instant::now();
        for (waiting, error) in self.pending.late(now) {
            match waiting {
                Waiting::RoomFeatures if matches!(self.place, Place::Checking) => {
                    self.refused(Refusal::Silent).await;
                }
                waiting => waiting.end(Err(error)),
            }
        }
        for occupant in self.visits.late(now) {
            self.send(room::leave(occupant));
        }
        self.tell_refusals();
        if matches!(self.place, Place::Inside) {
            for presence in self.damper.due(self.moment()) {
                self.emit(XmppEvent::Presence(presence)).await;
            }
        }
        match self.place {
            Place::Entering { since } if since.elapsed() > REJOIN_AFTER_MAX => {
                self.barred("the room does not let us in, nor tells why".into(), OWNER_MENDS).await;
            }
            Place::Barred { since } if since.elapsed() > self.rejoin_after() => {
                self.barred = self.barred.saturating_add(1);
                self.check_room();
            }
            Place::Inside => {
                self.announce();
                if self.pinged.elapsed() > SELF_PING_EVERY {
                    self.pinged = now;
                    self.ping_ourselves();
                }
            }
            _ => {}
        }
    }

    // The room.

    /// Asks what kind of room it is, before it learns anything of us.
    fn check_room(&mut self) {
        self.place = Place::Checking;
        self.ask_features();
    }

    fn ask_features(&mut self) {
        let Some(room) = self.occupant.as_ref().map(|o| Jid::from(o.to_bare())) else { return };
        let query = Element::from(DiscoInfoQuery { node: None });
        self.ask(room, false, query, Waiting::RoomFeatures, IQ_TIMEOUT);
    }

    async fn room_checked(&mut self, result: IqReply) {
        let lacks = match result {
            Ok(payload) => match payload.and_then(|e| DiscoInfoResult::try_from(e).ok()) {
                Some(features) => Ok(Lacks::of(&features)),
                None => Err(("the room does not tell its configuration".into(), OWNER_MENDS.to_owned())),
            },
            Err(RequestError::Refused { condition, .. }) => {
                let refusal = Refusal::to_look(&condition);
                Err((refusal.to_string(), refusal.next_step(&self.account)))
            }
            Err(e) => Err((e.to_string(), OWNER_MENDS.to_owned())),
        };
        let fault = match lacks {
            Ok(lacks) => {
                self.tell_flaws(&lacks);
                lacks.fault().map(|fault| (fault, OWNER_MENDS.to_owned()))
            }
            Err(fault) => Some(fault),
        };
        match (fault, self.place) {
            (None, Place::Checking) => {
                self.place = Place::Admitted;
                self.announce();
            }
            (Some((reason, next)), Place::Checking | Place::Inside) => self.barred(reason, &next).await,
            _ => {}
        }
    }

    /// Says once what the room lacks that may be borne.
    fn tell_flaws(&mut self, lacks: &Lacks) {
        let flaws: Vec<_> = lacks.flaws().map(|flaw| flaw.lacking()).collect();
        let flaws = flaws.join(", and ");
        if flaws != self.flaws_told && !flaws.is_empty() {
            tracing::warn!(next_step = OWNER_MENDS, "the federation's room is {flaws}");
        }
        self.flaws_told = flaws;
    }

    async fn refused(&mut self, refusal: Refusal) {
        let next = refusal.next_step(&self.account);
        self.barred(refusal.to_string(), &next).await;
    }

    /// Not a room to be in, or one that does not let us in.
    async fn barred(&mut self, reason: String, next_step: &str) {
        if matches!(self.place, Place::Entering { .. } | Place::Inside) {
            self.leave();
        }
        if reason != self.reason_told {
            tracing::error!(reason, next_step, "not in the federation's room");
            self.reason_told.clone_from(&reason);
        }
        self.offline(reason).await;
        self.place = Place::Barred { since: Instant::now() };
    }

    fn rejoin_after(&self) -> Duration {
        REJOIN_AFTER.saturating_mul(1 << self.barred.min(16)).min(REJOIN_AFTER_MAX)
    }

    fn leave(&mut self) {
        if let Some(occupant) = self.occupant.clone() {
            self.send(room::leave(occupant));
        }
    }

    /// Enters the room, or tells it what changed, if it is time.
    fn announce(&mut self) {
        let Some(occupant) = self.occupant.clone() else { return };
        let entering = matches!(self.place, Place::Admitted) && self.announcer.has_something();
        if entering {
            self.announcer.forget();
            self.place = Place::Entering { since: Instant::now() };
        } else if !matches!(self.place, Place::Inside) {
            return;
        }
        let pause = PRESENCE_PAUSE + PRESENCE_PAUSE.mul_f32(link::random_fraction() / 2.0);
        if let Some(cloud) = self.announcer.take_due(self.started.elapsed(), pause) {
            self.send(if entering { room::enter(occupant, cloud) } else { room::update(occupant, cloud) });
        }
    }

    fn ping_ourselves(&mut self) {
        if let Some(occupant) = self.occupant.clone() {
            self.ask(occupant, false, Ping.into(), Waiting::SelfPing, IQ_TIMEOUT);
            self.ask_features();
        }
    }

    /// The room does not count us in any more, but may again.
    async fn lost_room(&mut self, reason: String) {
        tracing::warn!(reason, "entering the room again");
        self.offline(reason).await;
        self.check_room();
    }

    async fn room_presence(&mut self, stanza: &PresenceStanza) {
        match (room::read(stanza, &self.me), self.place) {
            (RoomPresence::Entered, Place::Entering { .. }) => {
                self.place = Place::Inside;
                self.barred = 0;
                self.pinged = Instant::now();
                self.emit(XmppEvent::Joined).await;
                let seen: Vec<_> = self.occupants.values().flat_map(|s| s.values().cloned()).collect();
                for presence in seen {
                    self.emit(XmppEvent::Presence(presence)).await;
                }
            }
            (RoomPresence::Removed(reason), Place::Inside) => self.lost_room(reason).await,
            // It was there a moment ago. To stay would be to own a room that nobody configured.
            (RoomPresence::Made, Place::Entering { .. }) => self.refused(Refusal::Made).await,
            (RoomPresence::Refused(refusal), Place::Entering { .. }) => self.refused(refusal).await,
            (RoomPresence::Refused(refusal), Place::Inside) => self.lost_room(refusal.to_string()).await,
            (RoomPresence::Member(presence), Place::Entering { .. } | Place::Inside) => {
                let removed = room::is_removal(stanza).then(|| presence.jid.clone());
                self.member(presence).await;
                if let Some(jid) = removed {
                    self.damper.forget(&jid);
                    self.emit(XmppEvent::Removed(jid)).await;
                }
            }
            _ => {}
        }
    }

    async fn member(&mut self, presence: Presence) {
        if presence.available {
            if self.occupants.len() >= OCCUPANTS_MAX && !self.occupants.contains_key(&presence.jid) {
                return;
            }
            let sessions = self.occupants.entry(presence.jid.clone()).or_default();
            if sessions.len() >= SESSIONS_MAX && !sessions.contains_key(&presence.resource) {
                return;
            }
            sessions.insert(presence.resource.clone(), presence.clone());
        } else if let Some(sessions) = self.occupants.get_mut(&presence.jid) {
            sessions.remove(&presence.resource);
            if sessions.is_empty() {
                self.occupants.remove(&presence.jid);
            }
        }
        // Before we are in the room, its members are gathered only.
        if !matches!(self.place, Place::Inside) {
            return;
        }
        if let Some(presence) = self.damper.offer(presence, self.moment()) {
            self.emit(XmppEvent::Presence(presence)).await;
        }
    }

    /// Time for what counts it from any start.
    fn moment(&self) -> UnixMillis {
        UnixMillis::default().plus(self.started.elapsed())
    }

    // What comes in.

    async fn stanza(&mut self, stanza: Stanza) {
        let ours = self.occupant.as_ref().map(Jid::to_bare);
        let of_room = |from: &Option<Jid>| ours.is_some() && from.as_ref().map(Jid::to_bare) == ours;
        match stanza {
            Stanza::Presence(p) if of_room(&p.from) => self.room_presence(&p).await,
            Stanza::Message(m) if of_room(&m.from) && room::configuration_changed(&m) => self.ask_features(),
            Stanza::Iq(iq @ (Iq::Get { .. } | Iq::Set { .. })) => self.asked(iq),
            Stanza::Iq(iq) => self.answered(iq).await,
            Stanza::Presence(p) => drop(self.visits.presence(&p)),
            Stanza::Message(_) => {}
        }
    }

    async fn answered(&mut self, iq: Iq) {
        let (header, payload) = iq.split();
        let Some(waiting) = self.pending.answered(header.from.as_ref(), &header.id) else { return };
        let result = match payload {
            IqPayload::Result(element) => Ok(element),
            IqPayload::Error(e) => {
                Err(RequestError::Refused { condition: condition_name(&e), text: text_of(&e) })
            }
            IqPayload::Get(_) | IqPayload::Set(_) => return,
        };
        match waiting {
            Waiting::RoomFeatures => self.room_checked(result).await,
            Waiting::SelfPing => {
                if let (Err(RequestError::Refused { condition, .. }), Place::Inside) = (result, self.place) {
                    // XEP-0410, section 3.2: after these we are in the room still, or cannot know.
                    let undecided = matches!(
                        condition.as_str(),
                        "service-unavailable"
                            | "feature-not-implemented"
                            | "item-not-found"
                            | "remote-server-not-found"
                            | "remote-server-timeout"
                    );
                    if !undecided {
                        self.lost_room("the room has forgotten us".into()).await;
                    }
                }
            }
            waiting => waiting.end(result),
        }
    }
}
