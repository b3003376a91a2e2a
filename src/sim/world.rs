//! The simulated federation: time, the network between clouds, and what their cores want done. One seed makes
//! one run; nothing else decides what happens when.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use crate::broker::effect::{
    Checked, Done, Effect, Input, Matter, Measured, Peer, RoomInput, Scanned, Unanswered,
};
use crate::broker::planning::{reason, unasked};
use crate::broker::talks::{AskingOwners, Next, Reserving};
use crate::broker::{AskId, Broker, CallId, Token, owners};
use crate::clock::UnixMillis;
use crate::federation::Presence;
use crate::interface::{Candidate, Problem, ProblemKind, Reply, Request, Verdict};
use crate::migration::envelope::{LIFETIME, VERSION};
use crate::migration::message::{Seed, StageAccount};
use crate::migration::records::VmRecord;
use crate::migration::{AnswerBody, Denial, DenialCode, Envelope, RequestBody};
use crate::types::{CloudName, MemberJid, MigrationId, NodeHash, PublicKey, VmId};
use crate::vm::hypervisor::StopMode;
use crate::vm::{MapRef, PowerState, VmSpec};

use super::cloud::{Answered, Cloud, Job};
use super::model::Catalogue;

/// How often a broker that has nothing under way looks at its clock; one that has does every second.
const QUIET_TICK_MS: u64 = 20_000;
/// How long an unanswered request is waited for.
const ASK_TIMEOUT_MS: u64 = 10_000;

/// Numbers that look random and follow from a seed (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`; zero if there is nothing below it.
    pub fn below(&mut self, n: usize) -> usize {
        if n == 0 { 0 } else { (self.number() % n as u64) as usize }
    }

    pub fn chance(&mut self, probability: f64) -> bool {
        (self.number() >> 11) as f64 / (1u64 << 53) as f64 <= probability && probability > 0.0
    }

    /// Between 0 and 1.
    pub fn fraction(&mut self) -> f64 {
        (self.number() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The network, and how it fails.
#[derive(Clone, PartialEq, Debug)]
pub struct Links {
    pub latency_ms: u64,
    pub bytes_per_s: u64,
    /// Of a message, each way.
    pub loss: f64,
    /// Presence of one cloud goes round at most so often.
    pub presence_pause_ms: u64,
}

impl Default for Links {
    fn default() -> Self {
        Self { latency_ms: 20, bytes_per_s: 12_500_000, loss: 0.0, presence_pause_ms: 1000 }
    }
}

/// What was counted.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Counts {
    pub messages: u64,
    pub presences: u64,
    pub component_bytes: u64,
    pub own_bytes: u64,
    pub steps: u64,
    pub crashes: u64,
}

enum Event {
    Input(usize, u32, Box<Input>),
    Tick(usize, u32),
    /// A sealed request arrives.
    Request {
        to: usize,
        from: MemberJid,
        payload: Vec<u8>,
        answered: Answered,
    },
    /// A sealed answer arrives, or none does.
    Answer {
        answered: Answered,
        sealed: Option<Vec<u8>>,
    },
    Announce(usize, u32),
    Restart(usize),
}

struct Scheduled {
    at: UnixMillis,
    seq: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.seq) == (other.at, other.seq)
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.seq).cmp(&(other.at, other.seq))
    }
}

/// A conversation under way, with what it is for.
enum Talk {
    One,
    Reserve(Box<Reserving>),
    Owners(Box<AskingOwners>),
    Check(Box<Checking>),
}

struct Talking {
    cloud: usize,
    job: Job,
    to: Peer,
    about: Matter,
    nonce: String,
    talk: Talk,
    /// It is one row of this plan.
    plan: Option<u64>,
}

/// A check as the model asks it: whether the VM fits, then which components and packs are lacking.
struct Checking {
    spec: VmSpec,
    checked: Checked,
    begun: UnixMillis,
    asks: Asks,
}

#[derive(Clone, Copy, PartialEq)]
enum Asks {
    Fit,
    Components,
    Packs,
}

/// A plan whose members are asked.
struct Planning {
    cloud: usize,
    job: Job,
    rows: Vec<Candidate>,
    awaited: usize,
}

pub struct World {
    pub now: UnixMillis,
    pub random: Random,
    pub links: Links,
    pub clouds: Vec<Cloud>,
    pub catalogue: Catalogue,
    /// Bytes of each VM's own: what a first move carries beside components.
    pub own_bytes: BTreeMap<VmId, u64>,
    /// Clouds that cannot reach each other.
    pub partitions: Vec<(usize, usize)>,
    pub counts: Counts,
    by_jid: BTreeMap<MemberJid, usize>,
    keys: BTreeMap<MemberJid, PublicKey>,
    queue: BinaryHeap<Reverse<Scheduled>>,
    seq: u64,
    talks: BTreeMap<u64, Talking>,
    plans: BTreeMap<u64, Planning>,
    next_talk: u64,
    /// What a move carried, for whoever asks.
    pub carried: BTreeMap<MigrationId, (u64, u64)>,
    announcing: Vec<bool>,
    /// In how many clouds each VM runs.
    running: BTreeMap<VmId, u32>,
}

impl World {
    /// # Errors
    /// If a cloud's settings are none.
    pub fn new(seed: u64, clouds: Vec<Cloud>, catalogue: Catalogue, links: Links) -> Result<Self, String> {
        Self::placed(seed, clouds, catalogue, links, |_| Ok(()))
    }

    /// With VMs that `prepare` puts into clouds before their brokers begin.
    ///
    /// # Errors
    /// If a cloud's settings are none.
    pub fn placed(
        seed: u64,
        clouds: Vec<Cloud>,
        catalogue: Catalogue,
        links: Links,
        prepare: impl FnOnce(&mut Self) -> Result<(), String>,
    ) -> Result<Self, String> {
        let by_jid = clouds.iter().enumerate().map(|(at, c)| (c.jid.clone(), at)).collect();
        let keys = clouds.iter().map(|c| (c.jid.clone(), c.key.public())).collect();
        let count = clouds.len();
        let mut world = Self {
            now: UnixMillis(1_700_000_000_000),
            random: Random(seed),
            links,
            clouds,
            catalogue,
            own_bytes: BTreeMap::new(),
            partitions: Vec::new(),
            counts: Counts::default(),
            by_jid,
            keys,
            queue: BinaryHeap::new(),
            seq: 0,
            talks: BTreeMap::new(),
            plans: BTreeMap::new(),
            next_talk: 0,
            carried: BTreeMap::new(),
            announcing: vec![false; count],
            running: BTreeMap::new(),
        };
        prepare(&mut world)?;
        for at in 0..count {
            world.start(at, false)?;
        }
        Ok(world)
    }

    /// Whether a VM runs in more than one cloud.
    pub fn is_crowded(&self, vm: VmId) -> bool {
        self.running.get(&vm).is_some_and(|clouds| *clouds > 1)
    }

    /// A cloud's broker begins, or begins again, with what its book says.
    ///
    /// # Errors
    /// If its settings are none.
    pub fn start(&mut self, at: usize, after_restore: bool) -> Result<(), String> {
        let keys = self.keys.clone();
        self.announcing[at] = false;
        self.clouds[at].open(&keys, self.now, after_restore)?;
        let life = self.clouds[at].life;
        let machines = self.clouds[at].power.iter().map(|(vm, power)| (*vm, *power)).collect();
        self.measure(at);
        self.step(at, Input::Machines(machines));
        self.step(at, Input::Room(RoomInput::Joined));
        // Whoever is there shows itself to who comes.
        let others: Vec<_> = (0..self.clouds.len()).filter(|other| *other != at).collect();
        for other in others {
            if let Some(cloud) = self.clouds[other].announced.clone() {
                let presence = self.presence_of(other, true, Some(cloud));
                self.later(self.links.latency_ms, Event::Input(at, life, Box::new(presence)));
            }
        }
        let offset = self.random.below(1000) as u64;
        self.later(1000 + offset, Event::Tick(at, life));
        Ok(())
    }

    /// A cloud's broker dies, and is started again after a while.
    pub fn crash(&mut self, at: usize, down: Duration) {
        if self.clouds[at].broker.is_none() {
            return;
        }
        self.counts.crashes += 1;
        self.clouds[at].crash();
        self.talks.retain(|_, talk| talk.cloud != at);
        self.plans.retain(|_, plan| plan.cloud != at);
        let gone = self.presence_of(at, false, None);
        for other in (0..self.clouds.len()).filter(|other| *other != at) {
            let life = self.clouds[other].life;
            self.later(self.links.latency_ms, Event::Input(other, life, Box::new(gone.clone())));
        }
        self.later(down.as_millis() as u64, Event::Restart(at));
    }

    fn presence_of(&self, at: usize, available: bool, cloud: Option<crate::stanza::Cloud>) -> Input {
        let jid = self.clouds[at].jid.clone();
        let cloud = cloud.map(Box::new);
        Input::Room(RoomInput::Presence(Presence { jid, resource: "broker".into(), available, cloud }))
    }

    fn later(&mut self, after_ms: u64, event: Event) {
        self.seq += 1;
        let at = self.now.plus(Duration::from_millis(after_ms));
        self.queue.push(Reverse(Scheduled { at, seq: self.seq, event }));
    }

    /// Runs one event; `None` when nothing will ever happen again.
    pub fn turn(&mut self) -> Option<usize> {
        let Reverse(next) = self.queue.pop()?;
        self.now = next.at.max(self.now);
        let cloud = match next.event {
            Event::Input(at, life, input) => {
                if self.clouds[at].life == life {
                    self.step(at, *input);
                }
                at
            }
            Event::Tick(at, life) => {
                if self.clouds[at].life == life {
                    self.measure(at);
                    self.step(at, Input::Tick);
                    // A broker with nothing under way only looks whether something is over.
                    let quiet = self.clouds[at].broker.as_ref().is_some_and(Broker::is_quiet);
                    self.later(if quiet { QUIET_TICK_MS } else { 1000 }, Event::Tick(at, life));
                }
                at
            }
            Event::Request { to, from, payload, answered } => {
                if self.clouds[to].broker.is_some() {
                    let ask = AskId(self.clouds[to].id());
                    self.clouds[to].awaited.insert(ask, answered);
                    self.measure(to);
                    self.step(to, Input::Asked(ask, from, payload));
                }
                to
            }
            Event::Answer { answered, sealed } => {
                if self.clouds[answered.cloud].life == answered.life {
                    self.heard(&answered, sealed);
                }
                answered.cloud
            }
            Event::Announce(at, life) => {
                if self.clouds[at].life == life {
                    self.announcing[at] = false;
                    self.show(at);
                }
                at
            }
            Event::Restart(at) => {
                if let Err(e) = self.start(at, false) {
                    tracing::error!(cloud = %self.clouds[at].jid, error = e, "does not start again");
                }
                at
            }
        };
        Some(cloud)
    }

    /// Runs until `until`, or nothing happens any more; `look` sees the world after every event, and the
    /// cloud to which it happened.
    ///
    /// # Errors
    /// What `look` objects to.
    pub fn run_until(
        &mut self,
        until: UnixMillis,
        mut look: impl FnMut(&Self, usize) -> Result<(), String>,
    ) -> Result<(), String> {
        while self.queue.peek().is_some_and(|Reverse(next)| next.at <= until) {
            if let Some(at) = self.turn() {
                look(self, at)?;
            }
        }
        self.now = until.max(self.now);
        Ok(())
    }

    /// An operator asks; the answer will lie among the cloud's replies.
    pub fn call(&mut self, at: usize, request: Request) -> Option<CallId> {
        self.clouds[at].broker.as_ref()?;
        let call = CallId(self.clouds[at].id());
        self.measure(at);
        self.step(at, Input::Call(call, request));
        Some(call)
    }

    /// Puts a VM into a cloud, as if it had been made there: before its broker began, or while it is down.
    ///
    /// # Errors
    /// If the book cannot be written.
    pub fn place(&mut self, at: usize, record: VmRecord, own_bytes: u64) -> Result<(), String> {
        use crate::broker::book::Book;
        let vm = record.spec.id;
        if let Some(made) = self.catalogue.made(&record.spec.recipe).cloned() {
            let catalogue = std::mem::take(&mut self.catalogue);
            self.clouds[at].learn(&catalogue, &made);
            self.catalogue = catalogue;
        }
        let power = if record.run { PowerState::Running } else { PowerState::Stopped };
        self.set_power(at, vm, Some(power));
        self.own_bytes.insert(vm, own_bytes);
        self.clouds[at].book.save_vm(&record).map_err(|e| e.to_string())
    }

    fn measure(&mut self, at: usize) {
        // The disks of the model never fill: only what was composed since changes anything.
        if !std::mem::take(&mut self.clouds[at].composed_anew) {
            return;
        }
        let free = 1 << 50;
        let composed = self.clouds[at].composed.clone();
        let measured = Measured {
            at: Some(self.now),
            total_bytes: free,
            free_bytes: free,
            composed,
            ..Measured::default()
        };
        self.step(at, Input::Measured(Box::new(measured)));
    }

    fn step(&mut self, at: usize, input: Input) {
        let now = self.now;
        let Some(broker) = &mut self.clouds[at].broker else { return };
        self.counts.steps += 1;
        let effects = broker.step(now, input);
        effects.into_iter().for_each(|effect| self.perform(at, effect));
    }

    fn done(&mut self, at: usize, token: Token, after_ms: u64, done: Done) {
        let life = self.clouds[at].life;
        self.later(after_ms, Event::Input(at, life, Box::new(Input::Done(token, done))));
    }

    fn power(&mut self, at: usize, vm: VmId, power: PowerState, after_ms: u64) {
        let life = self.clouds[at].life;
        self.set_power(at, vm, Some(power));
        self.later(after_ms, Event::Input(at, life, Box::new(Input::Power(vm, power))));
    }

    fn set_power(&mut self, at: usize, vm: VmId, power: Option<PowerState>) {
        let before = match power {
            Some(power) => self.clouds[at].power.insert(vm, power),
            None => self.clouds[at].power.remove(&vm),
        };
        let counts = |power: Option<PowerState>| u32::from(power == Some(PowerState::Running));
        let running = self.running.entry(vm).or_default();
        *running = *running + counts(power) - counts(before);
    }

    fn perform(&mut self, at: usize, effect: Effect) {
        match effect {
            Effect::Reply(call, result) => drop(self.clouds[at].replies.insert(call, *result)),
            Effect::Answer(ask, sealed) => {
                if let Some(answered) = self.clouds[at].awaited.remove(&ask) {
                    self.send_answer(at, answered, sealed);
                }
            }
            Effect::Ask { token, to, about, body } => {
                self.talk(at, token, to, about, Talk::One, *body, None);
            }
            Effect::Check { token, to, about, spec } => {
                let (talk, body) = self.checking(*spec);
                self.talk(at, token, to, about, talk, body, None);
            }
            Effect::Reserve { token, to, about, spec, lineage } => {
                let (talk, body) = Reserving::begin(*spec, *lineage);
                self.talk(at, token, to, about, Talk::Reserve(Box::new(talk)), body, None);
            }
            Effect::Plan { token, record, peers } => self.plan(at, token, &record, peers),
            Effect::AskOwners { token, of, claims } => {
                let mut talk = AskingOwners::begin(claims);
                match talk.next_question() {
                    Some(body) => {
                        let talk = Talk::Owners(Box::new(talk));
                        self.talk(at, token, of, nothing(), talk, body, None);
                    }
                    None => self.done(at, token, 0, Done::OwnersSaid(Ok(()))),
                }
            }
            Effect::KnowOwners { token, by, claims } => {
                use crate::broker::book::Book;
                let book = self.clouds[at].book.clone();
                let (known, disputed) =
                    owners::known_beyond(&by, claims.into_iter(), |vm| book.lineage(vm).ok());
                self.done(at, token, 1, Done::OwnersKnown { known, disputed });
            }
            Effect::Verify { token, known, successions, pages } => {
                let verified = known.with(&successions).continued(pages).map(Box::new);
                self.done(at, token, 1, Done::Verified(verified));
            }
            Effect::Speaks(member, version) => {
                match version {
                    Some(version) => self.clouds[at].versions.insert(member, version),
                    None => self.clouds[at].versions.remove(&member),
                };
            }
            Effect::Announce(cloud) => self.announce(at, *cloud),
            Effect::Lend { token, .. } => self.done(at, token, 1, Done::Lent(Ok((Vec::new(), Vec::new())))),
            Effect::EndServing(id) => drop(self.clouds[at].serving.remove(&id)),
            Effect::Wake { token, at: when } => {
                let wait = when.since(self.now).as_millis() as u64;
                self.done(at, token, wait, Done::Due);
            }
            Effect::KeepPromise { token, promise, to } => {
                use crate::broker::book::Book;
                let kept = self.clouds[at].book.save_return(&promise, Some(&to)).map_err(|e| e.to_string());
                self.done(at, token, 2, Done::PromiseKept(kept));
            }
            Effect::Start { token, record } => self.boot(at, token, &record),
            Effect::Stop { token, vm, mode, .. } => self.stop(at, token, vm, mode),
            Effect::Pause { token, vm } => {
                self.power(at, vm, PowerState::Paused, 1);
                self.done(at, token, 1, Done::Paused(Ok(())));
            }
            Effect::Resume(vm) if self.clouds[at].running(vm) => self.power(at, vm, PowerState::Running, 1),
            Effect::Undefine(vm) => self.power(at, vm, PowerState::Stopped, 0),
            Effect::Scan { token, record, serving, last, .. } => {
                self.clouds[at].serving.insert(serving.migration, serving.ticket);
                let own = self.own_bytes.get(&record.spec.id).copied().unwrap_or(0);
                let ms = if last { 50 } else { 50 + own / 1_000_000 };
                let seed = seed_of(&record.spec);
                let missing_bytes = if serving.seed.is_some() { own / 20 } else { own };
                let scanned = Scanned { seed, missing_bytes, read_bytes: own, firmware: None };
                self.done(at, token, ms, Done::Scanned(Ok(scanned)));
            }
            Effect::EstimateMonolithic { token, .. } => self.done(at, token, 0, Done::Monolithic(None)),
            Effect::Stage { token, order } => {
                self.clouds[at].staged.insert(order.migration);
                self.stage(at, token, order.migration, &order.from, &order.spec, &order.init);
            }
            Effect::EndStaging(id) | Effect::KeepStaged(id) => drop(self.clouds[at].staged.remove(&id)),
            Effect::WatchBoot { token, .. } => self.done(at, token, 3000, Done::Booted(Some(3000))),
            Effect::Remove { token, record } => {
                let vm = record.spec.id;
                self.set_power(at, vm, None);
                self.clouds[at].book.remove_vm(vm);
                self.done(at, token, 5, Done::Removed(Ok(())));
            }
            Effect::LookUp { token, spec, components, packs } => {
                let held = self.clouds[at].holdings(&spec.recipe, &components, &packs);
                self.done(at, token, 1, Done::Holdings(held));
            }
            Effect::ListComponents(token) => {
                let held = self.clouds[at].components.clone();
                self.done(at, token, 1, Done::Components(held));
            }
            Effect::Content { call, .. } | Effect::Heal { call, .. } => self.not_simulated(at, call),
            Effect::Receipt(wanted) => self.not_simulated(at, wanted.call),
            Effect::Make { token, .. } => self.done(at, token, 0, Done::Made(Err(none("VMs are placed")))),
            Effect::Adopt { token, .. } => {
                self.done(at, token, 0, Done::Adopted(Err(none("VMs are placed"))))
            }
            Effect::Export(export) => {
                self.done(at, export.token, 0, Done::Exported(Err(none("there are no disks"))));
            }
            Effect::Grow { token, .. } => self.done(at, token, 1, Done::Grown(Ok(()))),
            // Nothing that the model has.
            Effect::Tell(..)
            | Effect::Admit { .. }
            | Effect::Part(_)
            | Effect::Withdraw(_)
            | Effect::Cap(..)
            | Effect::Mark(_)
            | Effect::Define(_)
            | Effect::Resume(_)
            | Effect::EndTracking(_)
            | Effect::RemoveStaged { .. }
            | Effect::Scrub { .. }
            | Effect::Optimize(_)
            | Effect::StopOptimizing => {}
            Effect::End(_) | Effect::Shutdown => self.clouds[at].crash(),
        }
    }

    fn not_simulated(&mut self, at: usize, call: CallId) {
        self.clouds[at].replies.insert(call, Err(none("it is not simulated")));
    }

    // --- the room ---

    fn announce(&mut self, at: usize, cloud: crate::stanza::Cloud) {
        if self.clouds[at].announced.as_ref() == Some(&cloud) {
            return;
        }
        let first = self.clouds[at].announced.replace(cloud).is_none();
        if !std::mem::replace(&mut self.announcing[at], true) {
            let life = self.clouds[at].life;
            let pause = if first { 0 } else { self.links.presence_pause_ms };
            self.later(pause, Event::Announce(at, life));
        }
    }

    /// Presence as it is now goes to everybody.
    fn show(&mut self, at: usize) {
        let Some(cloud) = self.clouds[at].announced.clone() else { return };
        let presence = self.presence_of(at, true, Some(cloud));
        for other in (0..self.clouds.len()).filter(|other| *other != at) {
            if self.is_cut(at, other) {
                continue;
            }
            self.counts.presences += 1;
            let life = self.clouds[other].life;
            self.later(self.links.latency_ms, Event::Input(other, life, Box::new(presence.clone())));
        }
    }

    fn is_cut(&self, a: usize, b: usize) -> bool {
        self.partitions.iter().any(|(x, y)| (*x, *y) == (a, b) || (*x, *y) == (b, a))
    }

    // --- requests and answers ---

    #[allow(clippy::too_many_arguments)]
    fn talk(
        &mut self,
        at: usize,
        token: Token,
        to: Peer,
        about: Matter,
        talk: Talk,
        body: RequestBody,
        plan: Option<u64>,
    ) {
        self.next_talk += 1;
        let id = self.next_talk;
        let job = Job { token, life: self.clouds[at].life };
        self.talks.insert(id, Talking { cloud: at, job, to, about, nonce: String::new(), talk, plan });
        self.request(id, body);
    }

    fn request(&mut self, id: u64, body: RequestBody) {
        let now = self.now;
        let Some(talking) = self.talks.get_mut(&id) else { return };
        let cloud = &self.clouds[talking.cloud];
        let answered = Answered { cloud: talking.cloud, life: talking.job.life, talk: id };
        talking.nonce = format!("{id:016x}{:016x}", self.counts.messages);
        let version = cloud.versions.get(&talking.to.jid).copied().unwrap_or(VERSION);
        let envelope = Envelope {
            version,
            from: cloud.jid.clone(),
            to: talking.to.jid.clone(),
            migration: talking.about.migration,
            vm: talking.about.vm,
            epoch: talking.about.epoch,
            nonce: talking.nonce.clone(),
            issued: now,
            expires: now.plus(LIFETIME),
            body,
        };
        let (sealed, from) = (envelope.seal(&cloud.key), cloud.jid.clone());
        let target = self.by_jid.get(&talking.to.jid).copied();
        self.counts.messages += 1;
        let lost = self.random.chance(self.links.loss);
        match (sealed, target.filter(|to| !lost && !self.is_cut(answered.cloud, *to))) {
            (Ok(payload), Some(to)) => {
                self.later(
                    self.links.latency_ms,
                    Event::Request { to, from, payload, answered: answered.clone() },
                );
                self.later(ASK_TIMEOUT_MS, Event::Answer { answered, sealed: None });
            }
            _ => self.later(ASK_TIMEOUT_MS, Event::Answer { answered, sealed: None }),
        }
    }

    fn send_answer(&mut self, at: usize, answered: Answered, sealed: Option<Vec<u8>>) {
        self.counts.messages += 1;
        if self.random.chance(self.links.loss) || self.is_cut(at, answered.cloud) {
            return;
        }
        self.later(self.links.latency_ms, Event::Answer { answered, sealed });
    }

    fn heard(&mut self, answered: &Answered, sealed: Option<Vec<u8>>) {
        let Some(talking) = self.talks.get(&answered.talk) else { return };
        let cloud = &self.clouds[answered.cloud];
        let opened = sealed.as_ref().and_then(|sealed| {
            let (key, jid) = (&talking.to.key, &talking.to.jid);
            Envelope::<AnswerBody>::open(sealed, key, jid, &cloud.jid, self.now).ok()
        });
        let opened = opened.filter(|answer| answer.nonce == talking.nonce);
        // What comes late answers nothing any more.
        if sealed.is_some() && opened.is_none() {
            return;
        }
        match opened.map(|answer| answer.body) {
            Some(AnswerBody::Denied(d)) if d.code == DenialCode::RateLimited => {
                // As the runner: asked again when it says. The model has no floods.
                self.conclude(answered.talk, Ok(AnswerBody::Denied(d)));
            }
            Some(body) => self.answer_to(answered.talk, body),
            None => self.conclude(answered.talk, Err(Unanswered("no answer in time".into()))),
        }
    }

    fn answer_to(&mut self, id: u64, body: AnswerBody) {
        let Some(talking) = self.talks.get_mut(&id) else { return };
        let (at, peer) = (talking.cloud, talking.to.clone());
        match &mut talking.talk {
            Talk::One => self.conclude(id, Ok(body)),
            Talk::Reserve(talk) => match talk.answered(body) {
                Next::Ask(next) => self.request(id, *next),
                Next::End(answer) => self.conclude(id, Ok(*answer)),
            },
            Talk::Owners(talk) => {
                let shown = talk.answered(body);
                let next = talk.next_question();
                for shown in shown {
                    use crate::broker::book::Book;
                    let vm = shown.claim.vm;
                    if let Ok(kept) = self.clouds[at].book.lineage(vm)
                        && let Ok(lineage) = shown.verified(&kept)
                    {
                        self.step(at, Input::Shown(peer.clone(), vm, Box::new(lineage)));
                    }
                }
                match next {
                    Some(body) => self.request(id, body),
                    None => self.conclude(id, Ok(AnswerBody::Owners { known: Vec::new() })),
                }
            }
            Talk::Check(_) => self.check_answered(id, body),
        }
    }

    /// A conversation is over.
    fn conclude(&mut self, id: u64, answer: Result<AnswerBody, Unanswered>) {
        let Some(talking) = self.talks.remove(&id) else { return };
        let done = match talking.talk {
            Talk::One | Talk::Reserve(_) => Done::Answered(answer),
            Talk::Owners(_) => Done::OwnersSaid(answer.map(drop)),
            Talk::Check(checking) => {
                let why = match answer {
                    Ok(AnswerBody::Denied(d)) => d,
                    Ok(_) => Denial::new(DenialCode::Other, "gave an answer that fits no check"),
                    Err(Unanswered(why)) => Denial::new(DenialCode::Other, why),
                };
                return self.checked(
                    talking.cloud,
                    talking.job,
                    talking.plan,
                    &talking.to,
                    *checking,
                    Err(why),
                );
            }
        };
        self.done(talking.cloud, talking.job.token, 0, done);
    }

    // --- checks and plans ---

    fn checking(&self, spec: VmSpec) -> (Talk, RequestBody) {
        let body =
            RequestBody::Configuration { spec: spec.anonymous(), components: Vec::new(), packs: Vec::new() };
        let begun = self.now;
        let talk = Checking { spec, checked: Checked::default(), begun, asks: Asks::Fit };
        (Talk::Check(Box::new(talk)), body)
    }

    fn check_answered(&mut self, id: u64, body: AnswerBody) {
        let answer = match body {
            AnswerBody::Configuration(answer) => answer,
            other => return self.conclude(id, Ok(other)),
        };
        if let Some(first) = answer.blockers.first() {
            return self.conclude(id, Ok(AnswerBody::Denied(first.clone())));
        }
        let Some(talking) = self.talks.get_mut(&id) else { return };
        let Talk::Check(checking) = &mut talking.talk else { return };
        let Some(made) = self.catalogue.made(&checking.spec.recipe) else { return };
        let spec = checking.spec.anonymous();
        let ask = |components, packs| RequestBody::Configuration { spec, components, packs };
        let components: Vec<_> = made.components.iter().map(|at| self.catalogue.components[*at].id).collect();
        let packs = self.catalogue.packs_of(made);
        let next = match checking.asks {
            Asks::Fit => {
                checking.checked.seed = answer.seed;
                checking.checked.kept = answer.kept;
                checking.checked.components_needed = components.len() as u32;
                checking.asks = Asks::Components;
                Some(ask(components, Vec::new()))
            }
            Asks::Components => {
                let lacking = answer.components_lacking.len() as u32;
                checking.checked.components_held = checking.checked.components_needed - lacking;
                checking.asks = Asks::Packs;
                (lacking > 0).then(|| ask(Vec::new(), packs.iter().map(|(id, _)| *id).collect()))
            }
            Asks::Packs => {
                let lacking = &answer.packs_lacking;
                checking.checked.packs_needed = packs.len() as u32;
                checking.checked.packs_missing = lacking.len() as u32;
                let bytes = lacking.iter().filter_map(|at| packs.get(*at as usize)).map(|(_, bytes)| *bytes);
                checking.checked.component_bytes = bytes.sum();
                None
            }
        };
        match next {
            Some(body) => self.request(id, body),
            None => {
                let Some(talking) = self.talks.remove(&id) else { return };
                if let Talk::Check(checking) = talking.talk {
                    self.checked(talking.cloud, talking.job, talking.plan, &talking.to, *checking, Ok(()));
                }
            }
        }
    }

    fn checked(
        &mut self,
        at: usize,
        job: Job,
        plan: Option<u64>,
        to: &Peer,
        checking: Checking,
        result: Result<(), Denial>,
    ) {
        let Checking { spec, mut checked, begun, .. } = checking;
        checked.answer_ms = self.now.since(begun).as_millis() as f64;
        let Some(plan_id) = plan else {
            let recipe = self.catalogue.made(&spec.recipe).map(|made| (*made.recipe).clone());
            let done = result.and_then(|()| {
                let recipe = recipe.ok_or_else(|| Denial::new(DenialCode::Content, "no such recipe"))?;
                Ok(Box::new((checked, recipe)))
            });
            return self.done(at, job.token, 0, Done::Checked(done));
        };
        let mut row = unasked(to.jid.clone(), None, Verdict::Yes);
        match result {
            Ok(()) => {
                row.component_bytes_missing = checked.component_bytes;
                row.components_needed = checked.components_needed;
                row.components_held = checked.components_held;
                row.packs_missing = checked.packs_missing;
                let own = self.own_bytes.get(&spec.id).copied().unwrap_or(0);
                row.user_data_bytes_missing = if checked.seed.is_some() { own / 20 } else { own };
            }
            Err(denial) => row.verdict = Verdict::No { reasons: vec![reason(&denial)] },
        }
        let Some(planning) = self.plans.get_mut(&plan_id) else { return };
        planning.rows.push(row);
        planning.awaited -= 1;
        if planning.awaited == 0
            && let Some(planning) = self.plans.remove(&plan_id)
        {
            self.done(planning.cloud, planning.job.token, 0, Done::Planned(Ok(planning.rows)));
        }
    }

    fn plan(&mut self, at: usize, token: Token, record: &VmRecord, peers: Vec<(Peer, Option<CloudName>)>) {
        self.next_talk += 1;
        let plan = self.next_talk;
        let job = Job { token, life: self.clouds[at].life };
        if peers.is_empty() {
            return self.done(at, token, 0, Done::Planned(Ok(Vec::new())));
        }
        let awaited = peers.len();
        self.plans.insert(plan, Planning { cloud: at, job, rows: Vec::new(), awaited });
        for (peer, _) in peers {
            let about = Matter {
                migration: MigrationId(uuid::Uuid::from_u128(u128::from(self.random.number()))),
                vm: record.spec.id,
                epoch: record.epoch,
            };
            let (talk, body) = self.checking(record.spec.clone());
            self.talk(at, token, peer, about, talk, body, Some(plan));
        }
    }

    // --- hosts ---

    fn boot(&mut self, at: usize, token: Token, record: &VmRecord) {
        let vm = record.spec.id;
        self.power(at, vm, PowerState::Running, 500);
        self.done(at, token, 500, Done::Started(Ok(())));
    }

    fn stop(&mut self, at: usize, token: Token, vm: VmId, mode: StopMode) {
        let was_off = !self.clouds[at].running(vm);
        let took_ms = match mode {
            _ if was_off => 0,
            StopMode::Forced => 10,
            StopMode::Graceful { .. } => 2000,
        };
        self.power(at, vm, PowerState::Stopped, took_ms);
        let took = Duration::from_millis(took_ms);
        self.done(at, token, took_ms, Done::Stopped { result: Ok(()), took, was_off });
    }

    fn stage(
        &mut self,
        at: usize,
        token: Token,
        id: MigrationId,
        from: &Peer,
        spec: &VmSpec,
        init: &crate::migration::message::Initialization,
    ) {
        let Some(made) = self.catalogue.made(&spec.recipe).cloned() else {
            let no = Denial::new(DenialCode::Content, "no such recipe");
            return self.done(at, token, 1, Done::Staged(Err(no)));
        };
        let source = self.by_jid.get(&from.jid).copied();
        let served = source.is_some_and(|source| {
            !self.is_cut(source, at)
                && self.clouds[source].serving.get(&id).is_some_and(|t| t.to_string() == init.ticket)
        });
        if !served {
            let no = Denial::new(DenialCode::Other, "the source serves nothing under this ticket");
            return self.done(at, token, 1000, Done::Staged(Err(no)));
        }
        let catalogue = std::mem::take(&mut self.catalogue);
        let component_bytes = self.clouds[at].learn(&catalogue, &made);
        self.catalogue = catalogue;
        let first = init.pass.number == 1;
        let own = self.own_bytes.get(&spec.id).copied().unwrap_or(0);
        let kept = self.clouds[at].book.vm(spec.id).is_some();
        // What came back is only what was written meanwhile; a later pass carries what the last did not.
        let own_bytes = match (first, kept) {
            (true, false) => own,
            (true, true) => own / 20,
            (false, _) => own / 200,
        };
        self.counts.component_bytes += component_bytes;
        self.counts.own_bytes += own_bytes;
        let carried = self.carried.entry(id).or_default();
        *carried = (carried.0 + component_bytes, carried.1 + own_bytes);
        let (component_bytes, own_bytes) = *carried;
        let bytes = component_bytes + own_bytes;
        let ms = bytes.saturating_mul(1000) / self.links.bytes_per_s.max(1) + self.links.latency_ms;
        let account = StageAccount {
            component_bytes,
            user_data_bytes: own_bytes,
            wire_bytes: bytes,
            fetch_ms: ms,
            ..StageAccount::default()
        };
        self.done(at, token, ms, Done::Staged(Ok(account)));
    }

    /// Moves of VMs that have not ended, as brokers that are up see them.
    pub fn under_way(&self) -> usize {
        self.talks.len()
    }

    /// How a call ended, if it has.
    pub fn reply(&self, at: usize, call: CallId) -> Option<&Result<Reply, Problem>> {
        self.clouds[at].replies.get(&call)
    }
}

fn none(why: &str) -> Problem {
    Problem::new(ProblemKind::BadRequest, "simulation", why)
}

fn nothing() -> Matter {
    Matter { migration: MigrationId(uuid::Uuid::nil()), vm: VmId(uuid::Uuid::nil()), epoch: 0 }
}

/// Disks of the right sizes with nothing on them: the model counts bytes apart.
fn seed_of(spec: &VmSpec) -> Seed {
    let map = |size: u64| MapRef { block_size_bytes: 65_536, disk_size_bytes: size, root: None::<NodeHash> };
    Seed { root_delta: map(spec.root_size.0), user_data: map(spec.user_data_size.0) }
}
