//! The simulated federation: time, the network between clouds, and what their cores want done. One seed makes
//! one run; nothing else decides what happens when.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::broker::book::Book;
use crate::broker::effect::{Done, Effect, Input, Measured, RoomInput};
use crate::broker::memory_book::MemoryBook;
use crate::broker::talks::{AskingOwners, Reserving};
use crate::broker::{Broker, CallId, Token, owners};
use crate::clock::UnixMillis;
use crate::interface::{Problem, ProblemKind, Reply, Request};
use crate::migration::records::VmRecord;
use crate::types::{MemberJid, MigrationId, PublicKey, VmId};
use crate::vm::PowerState;

use super::cloud::{Cloud, Talk};
use super::conversations::nothing;
use super::counts::Counts;
use super::helper::Helper;
use super::model::Catalogue;
use super::order::Death;
use super::queue::{Event, Said, Scheduled, Work};
use super::trace::Trace;

/// How often a broker that has nothing under way looks at its clock; one that has does every second.
const QUIET_TICK_MS: u64 = 20_000;

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

/// What a move carried.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Carried {
    pub component_bytes: u64,
    pub own_bytes: u64,
    /// What blocks of one size would have been, in the place of components.
    pub block_bytes: u64,
}

/// When simulated time begins.
pub(super) const BEGUN: UnixMillis = UnixMillis(1_700_000_000_000);
/// Steps of which one is timed.
const SAMPLE_EVERY: u64 = 61;

#[derive(Clone)]
pub struct World {
    pub now: UnixMillis,
    pub random: Random,
    pub links: Links,
    pub clouds: Vec<Rc<Cloud>>,
    pub catalogue: Rc<Catalogue>,
    /// Bytes of each VM's own: what a first move carries beside components.
    pub own_bytes: BTreeMap<VmId, u64>,
    /// Clouds that cannot reach each other.
    pub partitions: Vec<(usize, usize)>,
    /// How often hypervisors and disks fail at what they are to do; 0 to 1.
    pub failures: f64,
    pub counts: Counts,
    /// What steps of cores took, every so many, if somebody wants to know. Nothing depends on it.
    pub step_ns: Option<Vec<u32>>,
    /// Who makes and checks signatures besides.
    pub(super) helper: Option<Helper>,
    /// What happened last to some clouds, in words, if somebody wants to know.
    pub trace: Option<Trace>,
    /// All that was asked, if somebody wants it.
    pub log: Option<Vec<Said>>,
    /// The guests' states that were written last.
    pub(super) newest: BTreeMap<VmId, u64>,
    /// What must never happen and did, outside of brokers.
    pub broken: Option<String>,
    pub(super) by_jid: Rc<BTreeMap<MemberJid, usize>>,
    keys: Rc<BTreeMap<MemberJid, PublicKey>>,
    pub(super) queue: BinaryHeap<Reverse<Scheduled>>,
    seq: u64,
    /// What a move carried, for whoever asks.
    pub carried: BTreeMap<MigrationId, Carried>,
    /// In how many clouds each VM runs.
    running: BTreeMap<VmId, u32>,
    /// Clouds whose records or VMs changed since somebody looked.
    touched: Vec<usize>,
    /// Each cloud has a time of its own: see `order.rs`.
    pub(super) local_clocks: bool,
    /// To whom things happen at this moment.
    pub(super) acting: usize,
    pub(super) dying: Option<(usize, Death)>,
    pub(super) asks_by_hand: Option<u64>,
    pub(super) by_hand: Option<Option<Vec<u8>>>,
}

/// Both in one number.
pub(super) fn mix(a: u64, b: u64) -> u64 {
    Random(a ^ b.wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(31)).number()
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
        Self::joining(seed, clouds, catalogue, links, Duration::ZERO, prepare)
    }

    /// As [`World::placed`], with brokers that begin one `pause` after the other.
    ///
    /// # Errors
    /// If a cloud's settings are none.
    pub fn joining(
        seed: u64,
        clouds: Vec<Cloud>,
        catalogue: Catalogue,
        links: Links,
        pause: Duration,
        prepare: impl FnOnce(&mut Self) -> Result<(), String>,
    ) -> Result<Self, String> {
        let by_jid = clouds.iter().enumerate().map(|(at, c)| (c.jid.clone(), at)).collect();
        let keys = clouds.iter().map(|c| (c.jid.clone(), c.key.public())).collect();
        let count = clouds.len();
        let mut world = Self {
            now: BEGUN,
            random: Random(seed),
            links,
            clouds: clouds.into_iter().map(Rc::new).collect(),
            catalogue: Rc::new(catalogue),
            own_bytes: BTreeMap::new(),
            partitions: Vec::new(),
            failures: 0.0,
            counts: Counts::default(),
            step_ns: None,
            helper: None,
            trace: None,
            log: None,
            newest: BTreeMap::new(),
            broken: None,
            by_jid: Rc::new(by_jid),
            keys: Rc::new(keys),
            queue: BinaryHeap::new(),
            seq: 0,
            carried: BTreeMap::new(),
            running: BTreeMap::new(),
            touched: Vec::new(),
            local_clocks: false,
            acting: 0,
            dying: None,
            asks_by_hand: None,
            by_hand: None,
        };
        prepare(&mut world)?;
        for at in 0..count {
            match pause.as_millis() as u64 * at as u64 {
                0 => world.start(at, false)?,
                after_ms => world.later(at, after_ms, Event::Restart),
            }
        }
        Ok(world)
    }

    /// One cloud, to be changed. Worlds that were cloned share what neither changed since.
    pub fn cloud(&mut self, at: usize) -> &mut Cloud {
        Rc::make_mut(&mut self.clouds[at])
    }

    /// Whether a VM runs in more than one cloud.
    pub fn is_crowded(&self, vm: VmId) -> bool {
        self.running.get(&vm).is_some_and(|clouds| *clouds > 1)
    }

    /// What is done from here on happens to this cloud, at its time.
    pub(super) fn enter(&mut self, at: usize) {
        let clock = self.clouds[at].clock;
        self.now = if self.local_clocks { clock } else { self.now.max(clock) };
        self.acting = at;
    }

    /// The time by a cloud's own clock.
    pub(super) fn now_at(&self, at: usize) -> UnixMillis {
        self.now.plus(Duration::from_millis(self.clouds[at].ahead_ms))
    }

    /// Something happened to a cloud.
    pub(super) fn note(&mut self, at: usize, what: u64) {
        let of = self.cloud(at);
        of.chain = mix(of.chain, what);
    }

    /// A cloud's broker begins, or begins again, with what its book says.
    ///
    /// # Errors
    /// If its settings are none.
    pub fn start(&mut self, at: usize, after_restore: bool) -> Result<(), String> {
        self.enter(at);
        let (keys, now) = (self.keys.clone(), self.now_at(at));
        self.cloud(at).open(&keys, now, after_restore)?;
        let life = self.clouds[at].life;
        let machines = self.clouds[at].power.iter().map(|(vm, power)| (*vm, *power)).collect();
        self.measure(at);
        self.step(at, Input::Machines(machines));
        self.step(at, Input::Room(RoomInput::Joined));
        // Whoever is there shows itself to who comes.
        for other in (0..self.clouds.len()).filter(|other| *other != at) {
            if self.clouds[other].broker.is_some() && self.clouds[other].announced.is_some() {
                let presence = self.presence_of(other, true);
                let bytes = self.clouds[other].announced_bytes;
                self.later(at, self.links.latency_ms, Event::Shown { presence, bytes });
            }
        }
        let offset = Random(u64::from(life) << 32 | at as u64).below(1000) as u64;
        self.later(at, 1000 + offset, Event::Tick(life));
        self.cloud(at).clock = self.now;
        Ok(())
    }

    /// A cloud's broker dies, and is started again after a while.
    pub fn crash(&mut self, at: usize, down: Duration) {
        let hosts_go_on = self.random.chance(0.5);
        self.enter(at);
        self.die(at, Death { writes: 0, effects: 0, hosts_go_on, down });
    }

    pub(super) fn die(&mut self, at: usize, death: Death) {
        if self.clouds[at].broker.is_none() {
            return;
        }
        self.counts.crashes += 1;
        self.note(at, 0xdead + u64::from(death.hosts_go_on));
        let life = self.clouds[at].life;
        self.cloud(at).crash();
        // What hypervisors were told comes to pass, or does not.
        let all = std::mem::take(&mut self.queue).into_sorted_vec();
        let (lost, kept): (Vec<_>, Vec<_>) = all.into_iter().partition(|Reverse(s)| {
            s.cloud == at && matches!(&s.event, Event::Host { life: of, .. } if *of == life)
        });
        self.queue = BinaryHeap::from(kept);
        for Reverse(s) in lost.into_iter().rev().filter(|_| death.hosts_go_on) {
            if let Event::Host { vm, work, took, fails, .. } = s.event {
                self.hosted(at, vm, work, took, fails);
            }
        }
        self.show(at, false);
        self.later(at, death.down.as_millis() as u64, Event::Restart);
    }

    /// A cloud's machine is lost, and another goes on with its records as they were in a backup. VMs are off.
    ///
    /// # Errors
    /// If it does not start.
    pub fn restore(&mut self, at: usize, backup: MemoryBook, same_machine: bool) -> Result<(), String> {
        self.enter(at);
        self.note(at, 0xbac + u64::from(same_machine));
        self.cloud(at).crash();
        let life = self.clouds[at].life;
        self.queue
            .retain(|Reverse(s)| s.cloud != at || !matches!(s.event, Event::Host { .. } | Event::Restart));
        let vms: Vec<VmId> = self.clouds[at].power.keys().copied().collect();
        vms.into_iter().for_each(|vm| self.set_power(at, vm, None));
        let of = self.cloud(at);
        of.book = backup;
        of.restored = true;
        of.mark = of.mark.take().filter(|_| same_machine);
        debug_assert!(of.life == life);
        self.show(at, false);
        self.start(at, !same_machine)
    }

    pub(super) fn later(&mut self, cloud: usize, after_ms: u64, event: Event) {
        self.seq += 1;
        let at = self.now.plus(Duration::from_millis(after_ms));
        let by = self.acting;
        let by = self.cloud(by);
        by.made += 1;
        let id = mix(by.chain, by.made);
        self.queue.push(Reverse(Scheduled { at, seq: self.seq, id, cloud, event }));
    }

    /// Runs the earliest event; `None` when nothing will ever happen again.
    pub fn turn(&mut self) -> Option<usize> {
        let Reverse(next) = self.queue.pop()?;
        let cloud = next.cloud;
        self.happen(next);
        Some(cloud)
    }

    pub(super) fn happen(&mut self, next: Scheduled) {
        let at = next.cloud;
        self.enter(at);
        self.now = self.now.max(next.at);
        self.note(at, mix(next.id, self.now.0));
        let lives = |world: &Self, life: u32| world.clouds[at].life == life;
        match next.event {
            Event::Input(life, input) if lives(self, life) => self.step(at, *input),
            Event::Tick(life) if lives(self, life) => {
                self.measure(at);
                self.step(at, Input::Tick);
                // A broker with nothing under way only looks whether something is over.
                let quiet = self.clouds[at].broker.as_ref().is_some_and(Broker::is_quiet);
                self.later(at, if quiet { QUIET_TICK_MS } else { 1000 }, Event::Tick(life));
            }
            Event::Announce(life) if lives(self, life) => {
                self.cloud(at).announcing = false;
                self.show(at, true);
            }
            Event::Input(..) | Event::Tick(_) | Event::Announce(_) => {}
            Event::Host { life, vm, work, token, took, fails } => {
                let done = self.hosted(at, vm, work, took, fails);
                self.hosted_for(at, life, vm, token, done);
            }
            Event::Shown { presence, bytes } => {
                self.counts.presence_delivered(bytes);
                self.step(at, Input::Room(RoomInput::Presence((*presence).clone())));
            }
            Event::GoesRound { next, presence, bytes } => self.goes_round(at, next, presence, bytes),
            Event::Request { said, answered, sealing } => match sealing {
                Some(sealing) => self.arrives_sealed(said, answered, &sealing),
                None => self.arrives(said, answered),
            },
            Event::Answer { answered, sealed, opening } if lives(self, answered.life) => {
                self.heard(&answered, sealed, opening);
            }
            Event::Answer { .. } => {}
            Event::AskAgain { life, talk, asked } => {
                if lives(self, life) && self.clouds[at].waits_for(talk, asked) {
                    self.ask_again(at, talk);
                }
            }
            Event::Restart => {
                if let Err(e) = self.start(at, false) {
                    tracing::error!(cloud = %self.clouds[at].jid, error = e, "does not start again");
                }
            }
        }
        let now = self.now;
        self.cloud(at).clock = now;
    }

    /// Runs until `until`, or nothing happens any more; `look` sees the world after every event, and each cloud
    /// whose records, or whose VMs' power, changed.
    ///
    /// # Errors
    /// What `look` objects to.
    pub fn run_until(
        &mut self,
        until: UnixMillis,
        mut look: impl FnMut(&Self, usize) -> Result<(), String>,
    ) -> Result<(), String> {
        while self.queue.peek().is_some_and(|Reverse(next)| next.at <= until) {
            self.turn();
            let mut touched = std::mem::take(&mut self.touched);
            touched.sort_unstable();
            touched.dedup();
            touched.iter().try_for_each(|at| look(self, *at))?;
            touched.clear();
            self.touched = touched;
        }
        self.now = until.max(self.now);
        Ok(())
    }

    /// An operator asks; the answer will lie among the cloud's replies.
    pub fn call(&mut self, at: usize, request: Request) -> Option<CallId> {
        self.clouds[at].broker.as_ref()?;
        self.enter(at);
        let call = CallId(self.cloud(at).id());
        self.note(at, call.0);
        self.measure(at);
        self.step(at, Input::Call(call, request));
        let now = self.now;
        self.cloud(at).clock = now;
        Some(call)
    }

    /// Puts a VM into a cloud, as if it had been made there: before its broker began, or while it is down.
    ///
    /// # Errors
    /// If the book cannot be written.
    pub fn place(&mut self, at: usize, record: VmRecord, own_bytes: u64) -> Result<(), String> {
        let vm = record.spec.id;
        let catalogue = self.catalogue.clone();
        if let Some(made) = catalogue.made(&record.spec.recipe) {
            self.cloud(at).learn(&catalogue, made);
        }
        let power = if record.run { PowerState::Running } else { PowerState::Stopped };
        self.set_power(at, vm, Some(power));
        self.own_bytes.insert(vm, own_bytes);
        self.newest.insert(vm, 1);
        self.cloud(at).keep_disks(vm, &record.disks, 1);
        self.clouds[at].book.save_vm(&record).map_err(|e| e.to_string())
    }

    pub(super) fn measure(&mut self, at: usize) {
        // The disks of the model never fill: only what was composed since changes anything.
        if !self.clouds[at].composed_anew {
            return;
        }
        let free = 1 << 50;
        let of = self.cloud(at);
        of.composed_anew = false;
        let composed = of.composed.clone();
        let measured = Measured {
            at: Some(self.now_at(at)),
            total_bytes: free,
            free_bytes: free,
            composed,
            ..Measured::default()
        };
        self.step(at, Input::Measured(Box::new(measured)));
    }

    pub(super) fn step(&mut self, at: usize, input: Input) {
        let now = self.now_at(at);
        let sampled = self.step_ns.is_some() && self.counts.steps.is_multiple_of(SAMPLE_EVERY);
        let writes = self.clouds[at].book.writes();
        if self.trace.is_some() && self.clouds[at].broker.is_some() {
            self.trace(at, &input);
        }
        let Some(broker) = &mut self.cloud(at).broker else { return };
        let begun = sampled.then(Instant::now);
        let mut effects = broker.step(now, input);
        if let (Some(begun), Some(samples)) = (begun, &mut self.step_ns) {
            samples.push(begun.elapsed().as_nanos().min(u128::from(u32::MAX)) as u32);
        }
        self.counts.steps += 1;
        let death = self.dying.take_if(|(dying, _)| *dying == at).map(|(_, death)| death);
        if let Some(death) = death {
            effects.truncate(death.effects);
        }
        effects.into_iter().for_each(|effect| self.perform(at, effect));
        if let Some(death) = death {
            self.die(at, death);
        }
        if self.clouds[at].book.writes() != writes {
            self.touched.push(at);
        }
    }

    pub(super) fn done(&mut self, at: usize, token: Token, after_ms: u64, done: Done) {
        let life = self.clouds[at].life;
        self.later(at, after_ms, Event::Input(life, Box::new(Input::Done(token, done))));
    }

    pub(super) fn set_power(&mut self, at: usize, vm: VmId, power: Option<PowerState>) {
        let before = match power {
            Some(power) => self.cloud(at).power.insert(vm, power),
            None => self.cloud(at).power.remove(&vm),
        };
        let counts = |power: Option<PowerState>| u32::from(power == Some(PowerState::Running));
        self.touched.push(at);
        let running = self.running.entry(vm).or_default();
        *running = *running + counts(power) - counts(before);
    }

    fn perform(&mut self, at: usize, effect: Effect) {
        match effect {
            Effect::Reply(call, result) => drop(self.cloud(at).replies.insert(call, *result)),
            Effect::Answer(ask, sealed) => {
                if let Some(answered) = self.cloud(at).awaited.remove(&ask) {
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
                    Some(version) => self.cloud(at).versions.insert(member, version),
                    None => self.cloud(at).versions.remove(&member),
                };
            }
            Effect::Announce(cloud) => self.announce(at, *cloud),
            Effect::Lend { token, .. } => self.done(at, token, 1, Done::Lent(Ok((Vec::new(), Vec::new())))),
            Effect::EndServing(id) => drop(self.cloud(at).serving.remove(&id)),
            Effect::Wake { token, at: when } => {
                let wait = when.since(self.now_at(at)).as_millis() as u64;
                self.done(at, token, wait, Done::Due);
            }
            Effect::KeepPromise { token, promise, to } => {
                let kept = self.clouds[at].book.save_return(&promise, Some(&to)).map_err(|e| e.to_string());
                self.done(at, token, 2, Done::PromiseKept(kept));
            }
            Effect::Start { token, record } => {
                self.order(at, record.spec.id, Work::Start(record), Some(token));
            }
            Effect::Stop { token, vm, mode, .. } => self.order(at, vm, Work::Stop(mode), Some(token)),
            Effect::Pause { token, vm } => self.order(at, vm, Work::Pause, Some(token)),
            Effect::Resume(vm) => self.order(at, vm, Work::Resume, None),
            Effect::Undefine(vm) => self.order(at, vm, Work::Undefine, None),
            Effect::Scan { token, record, serving, last, .. } => {
                self.scan(at, token, &record, &serving, last)
            }
            Effect::EstimateMonolithic { token, .. } => self.done(at, token, 0, Done::Monolithic(None)),
            Effect::Stage { token, order } => self.stage(at, token, &order),
            Effect::EndStaging(id) | Effect::KeepStaged(id) => drop(self.cloud(at).staged.remove(&id)),
            Effect::RemoveStaged { vm, disks, .. } => self.cloud(at).remove_disks(vm, &disks),
            Effect::Scrub { vm, disks } => {
                disks.iter().for_each(|disks| self.cloud(at).remove_disks(vm, disks));
            }
            Effect::Mark(mark) => self.cloud(at).mark = Some(mark.into_iter().collect()),
            Effect::WatchBoot { token, .. } => self.done(at, token, 3000, Done::Booted(Some(3000))),
            Effect::Remove { token, record } => {
                let vm = record.spec.id;
                self.set_power(at, vm, None);
                self.cloud(at).disks.remove(&vm);
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
            | Effect::AdmitAlso(..)
            | Effect::Part(_)
            | Effect::Withdraw(_)
            | Effect::Cap(..)
            | Effect::Define(_)
            | Effect::EndTracking(_)
            | Effect::Optimize(_)
            | Effect::StopOptimizing => {}
            // Whoever looks after it starts it again.
            Effect::End(_) | Effect::Shutdown => {
                let hosts_go_on = self.random.chance(0.5);
                self.die(at, Death { writes: 0, effects: 0, hosts_go_on, down: Duration::from_secs(1) });
            }
        }
    }

    fn not_simulated(&mut self, at: usize, call: CallId) {
        self.cloud(at).replies.insert(call, Err(none("it is not simulated")));
    }

    /// How a call ended, if it has.
    pub fn reply(&self, at: usize, call: CallId) -> Option<&Result<Reply, Problem>> {
        self.clouds[at].replies.get(&call)
    }
}

fn none(why: &str) -> Problem {
    Problem::new(ProblemKind::BadRequest, "simulation", why)
}
