//! One simulated cloud: the broker's rules around the two machines, over durable records that
//! survive its crashes, VM processes and disks that do too, and a memory that does not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use cicada::clock::UnixMillis;
use cicada::migration::envelope::{LIFETIME, VERSION};
use cicada::migration::handover::{HandOver, Receipt, Return, SignedHandOver};
use cicada::migration::message::{Initialization, StageAccount};
use cicada::migration::source::{self, Source};
use cicada::migration::target::{self, Agreement, Target};
use cicada::migration::{AnswerBody, Denial, DenialCode, Envelope, Pass, ReplayGuard, RequestBody};
use cicada::types::{ByteSize, IdentityKey, MemberJid, MigrationId, RecipeId, VmId};
use cicada::vm::{MapRef, VmSpec};

use crate::Rules;
use crate::world::{Message, Random, VM};

/// The broker's record of the VM.
#[derive(Clone, PartialEq, Debug)]
pub struct Record {
    pub epoch: u64,
    pub given_up: Option<GivenUp>,
    pub run: bool,
    pub dir: String,
    pub arrival: Option<Arrival>,
}

impl Record {
    /// The highest epoch of the VM this record knows of.
    fn seen_epoch(&self) -> u64 {
        self.epoch + u64::from(self.given_up.is_some())
    }
}

#[derive(Clone, PartialEq, Debug)]
pub struct GivenUp {
    pub to: usize,
    pub hand_over: HandOver,
    pub was_running: bool,
    pub receipt: Option<Receipt>,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Arrival {
    pub migration: MigrationId,
    pub from: usize,
    pub receipt: Receipt,
    pub acknowledged: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Busy {
    Migration(MigrationId),
    Starting,
}

/// What a crash of the broker leaves behind.
pub struct Durable {
    pub record: Option<Record>,
    /// Epochs promised never to be run here.
    pub returns: BTreeSet<u64>,
    /// Receipts given for hand-overs whose record is overwritten or scrubbed.
    pub past: BTreeMap<MigrationId, Receipt>,
    /// Disks by directory; the number stands for the content.
    pub dirs: BTreeMap<String, u64>,
    /// The VM's process lives on without its broker.
    pub running: bool,
    pub paused: bool,
}

pub struct Outgoing {
    pub machine: Source,
    pub to: usize,
    pub epoch: u64,
}

pub struct Incoming {
    pub machine: Target,
    pub from: usize,
    pub dir: String,
}

/// Asynchronous work of the broker; lost when it crashes.
#[derive(Debug)]
pub enum Job {
    Check(MigrationId),
    Scan(MigrationId),
    Stop(MigrationId),
    Pause(MigrationId),
    Resume,
    Start(Option<MigrationId>),
    Stage { id: MigrationId, dir: String, content: u64 },
    Scrub(String),
    Delete { id: MigrationId, to: usize },
    Source(MigrationId, source::Event),
    Target(MigrationId, target::Event),
}

/// Requests sent whose answer is awaited.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Waiting {
    Source(MigrationId),
    Delete(MigrationId, usize),
    Nobody,
}

#[derive(Default)]
pub struct Memory {
    pub outgoing: BTreeMap<MigrationId, Outgoing>,
    pub incoming: BTreeMap<MigrationId, Incoming>,
    pub jobs: Vec<Job>,
    pub waiting: BTreeMap<u64, Waiting>,
    pub replay: ReplayGuard,
    pub busy: Option<Busy>,
}

pub struct Cloud {
    pub me: usize,
    pub key: IdentityKey,
    pub durable: Durable,
    pub memory: Memory,
    pub rules: Rules,
    /// What happens outside: messages sent, the newest content ever written, injected faults.
    pub sent: Vec<Message>,
    pub start_failed: bool,
    pub faults: bool,
    /// Guest writes whose content a start must find.
    pub newest: u64,
    next: u64,
    pub broken: Option<String>,
    /// What its own clock says.
    pub now: UnixMillis,
    /// Requests refused because their time is over, or not come yet.
    pub refused: u64,
}

pub fn jid(n: usize) -> MemberJid {
    static JIDS: LazyLock<[MemberJid; 3]> = LazyLock::new(|| {
        [0, 1, 2].map(|n| format!("cloud-{n}@federation").parse().expect("a valid address"))
    });
    JIDS[n].clone()
}

pub fn key(n: usize) -> IdentityKey {
    IdentityKey::from_secret_bytes(&[n as u8 + 1; 32])
}

/// A map whose name stands for the content.
pub fn map(content: u64) -> MapRef {
    MapRef { block_size_bytes: 4096, disk_size_bytes: content, root: None }
}

pub fn spec() -> VmSpec {
    VmSpec {
        id: VmId(uuid::Uuid::from_u128(VM)),
        name: "demo".parse().expect("a valid name"),
        cpus: 1,
        memory: ByteSize(1 << 28),
        recipe: RecipeId::of(b"recipe"),
        root_size: ByteSize(1 << 30),
        user_data_size: ByteSize(0),
        nics: Vec::new(),
        architecture: "amd64".into(),
        cpu_model: "qemu64".into(),
        firmware: cicada::vm::Firmware::Uefi,
    }
}

fn denial(code: DenialCode, text: &str) -> Denial {
    Denial::new(code, text)
}

fn deny(code: DenialCode, text: &str) -> AnswerBody {
    AnswerBody::Denied(denial(code, text))
}

impl Cloud {
    pub fn new(me: usize, rules: Rules) -> Self {
        Self {
            me,
            key: key(me),
            durable: Durable {
                record: None,
                returns: BTreeSet::new(),
                past: BTreeMap::new(),
                dirs: BTreeMap::new(),
                running: false,
                paused: false,
            },
            memory: Memory::default(),
            rules,
            sent: Vec::new(),
            start_failed: false,
            faults: true,
            newest: 1,
            next: 0,
            broken: None,
            now: UnixMillis(0),
            refused: 0,
        }
    }

    pub fn owns(&self) -> bool {
        self.durable.record.as_ref().is_some_and(|r| r.given_up.is_none())
    }

    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// A durable write fails now and then, cleanly: a broker that does not know whether it
    /// succeeded has to stop, which is a crash.
    fn disk_fails(&self, random: &mut Random) -> bool {
        self.faults && random.one_in(30)
    }

    fn send(&mut self, to: usize, id: MigrationId, epoch: u64, body: RequestBody, waiting: Waiting) {
        let nonce = self.fresh();
        self.memory.waiting.insert(nonce, waiting);
        let message = crate::world::Payload::Request { migration: id, epoch, body };
        self.sent.push(Message { from: self.me, to, nonce, issued: self.now, payload: message });
    }

    // --- life and death of the process ---

    pub fn crash(&mut self, random: &mut Random) {
        let jobs = std::mem::take(&mut self.memory).jobs;
        // What had been asked of the hypervisor may still come to pass.
        for job in jobs {
            match job {
                Job::Stop(_) if random.one_in(2) => self.switched_off(),
                Job::Pause(_) if random.one_in(2) => self.durable.paused = self.durable.running,
                Job::Scrub(dir) if random.one_in(2) => drop(self.durable.dirs.remove(&dir)),
                _ => {}
            }
        }
        self.boot();
    }

    fn boot(&mut self) {
        let Some(record) = self.durable.record.clone() else {
            self.durable.dirs.clear();
            return;
        };
        self.durable.dirs.retain(|dir, _| *dir == record.dir);
        match &record.given_up {
            Some(g) if g.receipt.is_none() => {
                let id = g.hand_over.migration;
                let (machine, effects) = Source::resume(g.was_running, g.hand_over.clone().sign(&self.key));
                self.memory.outgoing.insert(id, Outgoing { machine, to: g.to, epoch: record.epoch });
                self.memory.busy = Some(Busy::Migration(id));
                for effect in effects {
                    self.source_effect(id, effect, &mut Random::new(0));
                }
            }
            Some(_) => {}
            None => {
                if let Some(a) = record.arrival.as_ref().filter(|a| !a.acknowledged) {
                    self.memory.jobs.push(Job::Delete { id: a.migration, to: a.from });
                }
                if record.run {
                    self.start_machine(None);
                }
            }
        }
    }

    // --- the operator ---

    pub fn begin_move(&mut self, to: usize, id: MigrationId) -> bool {
        let Some(record) = self.durable.record.as_ref().filter(|r| r.given_up.is_none()) else {
            return false;
        };
        if self.memory.busy.is_some() {
            return false;
        }
        let run = Outgoing { machine: Source::new(self.durable.running), to, epoch: record.epoch };
        self.memory.busy = Some(Busy::Migration(id));
        self.memory.outgoing.insert(id, run);
        true
    }

    /// Scrubs a copy whose grace period is over.
    pub fn scrub_released(&mut self) {
        let Some(record) = &self.durable.record else { return };
        let released = record.given_up.as_ref().is_some_and(|g| g.receipt.is_some());
        let coming_home = self.memory.incoming.values().any(|r| unfinished(&r.machine));
        if !released || coming_home || self.memory.busy.is_some() {
            return;
        }
        let dir = record.dir.clone();
        self.keep_past();
        self.durable.record = None;
        self.memory.jobs.push(Job::Scrub(dir));
    }

    /// A receipt once given is given again for ever, also when its record goes.
    fn keep_past(&mut self) {
        if let Some(a) = self.durable.record.as_ref().and_then(|r| r.arrival.clone())
            && self.rules.receipts_outlive_records
        {
            self.durable.past.insert(a.migration, a.receipt);
        }
    }

    // --- the hypervisor ---

    fn start_machine(&mut self, arrival: Option<MigrationId>) {
        let Some(record) = self.durable.record.as_mut().filter(|r| r.given_up.is_none()) else { return };
        record.run = true;
        if self.rules.starting_is_busy {
            self.memory.busy = Some(Busy::Starting);
        }
        self.memory.jobs.push(Job::Start(arrival));
    }

    fn switched_off(&mut self) {
        (self.durable.running, self.durable.paused) = (false, false);
    }

    fn started(&mut self, arrival: Option<MigrationId>, random: &mut Random) {
        if self.memory.busy == Some(Busy::Starting) {
            self.memory.busy = None;
        }
        let mut result = Ok(());
        // Starting a paused VM lets it go on.
        self.durable.paused = false;
        if self.memory.jobs.iter().any(|j| matches!(j, Job::Stop(_))) {
            result = Err("a VM that is stopping cannot be started".to_owned());
        } else if self.faults && random.one_in(25) && !self.durable.running {
            self.start_failed = true;
            result = Err("the hypervisor failed".to_owned());
        } else if !self.durable.running {
            let dir = self.durable.record.as_ref().map(|r| r.dir.clone()).unwrap_or_default();
            match self.durable.dirs.get(&dir) {
                Some(content) if *content == self.newest => self.durable.running = true,
                other => self.broken = Some(format!("starts {dir} with {other:?}, not {}", self.newest)),
            }
        }
        if let Some(id) = arrival {
            self.target_event(id, target::Event::Started(result), random);
        }
    }

    // --- jobs ---

    pub fn run_job(&mut self, job: Job, random: &mut Random) {
        let faults = self.faults;
        let failed = |random: &mut Random| faults && random.one_in(20);
        match job {
            Job::Source(id, event) => self.source_event(id, event, random),
            Job::Target(id, event) => drop(self.target_event(id, event, random)),
            Job::Check(id) => {
                let no = failed(random).then(|| denial(DenialCode::Policy, "no"));
                self.source_event(id, source::Event::Checked(no.map_or(Ok(()), Err)), random);
            }
            Job::Scan(id) => {
                let Some(record) = &self.durable.record else { return };
                let content = self.durable.dirs.get(&record.dir).copied().unwrap_or_default();
                let result = match failed(random) {
                    true => Err(denial(DenialCode::Content, "unreadable")),
                    false => Ok((map(content), map(content))),
                };
                self.source_event(id, source::Event::Scanned(result), random);
            }
            Job::Stop(id) => {
                let result = match failed(random) {
                    true => Err(denial(DenialCode::Other, "does not stop")),
                    false => {
                        self.switched_off();
                        Ok(())
                    }
                };
                self.source_event(id, source::Event::Stopped(result), random);
            }
            Job::Pause(id) => {
                let result = match failed(random) {
                    true => Err(denial(DenialCode::Unsupported, "cannot")),
                    false => {
                        self.durable.paused = self.durable.running;
                        Ok(())
                    }
                };
                match self.memory.outgoing.contains_key(&id) {
                    true => self.source_event(id, source::Event::Held(result), random),
                    false => self.durable.paused = false,
                }
            }
            Job::Resume => self.durable.paused = false,
            Job::Start(arrival) => self.started(arrival, random),
            Job::Stage { id, dir, content } => {
                let result = match failed(random) {
                    true => Err(denial(DenialCode::Content, "does not verify")),
                    false => {
                        self.durable.dirs.insert(dir.clone(), content);
                        Ok(StageAccount::default())
                    }
                };
                // A pass of a reservation that has ended meanwhile is of no interest.
                if self.memory.incoming.get(&id).is_some_and(|r| r.dir == dir) {
                    self.target_event(id, target::Event::StageFinished(result), random);
                } else {
                    self.memory.jobs.push(Job::Scrub(dir));
                }
            }
            Job::Scrub(dir) => drop(self.durable.dirs.remove(&dir)),
            Job::Delete { id, to } => {
                self.send(to, id, 0, RequestBody::Delete { boot_ms: None }, Waiting::Delete(id, to));
            }
        }
    }

    // --- the source's side ---

    pub fn source_event(&mut self, id: MigrationId, event: source::Event, random: &mut Random) {
        let Some(run) = self.memory.outgoing.get_mut(&id) else { return };
        for effect in run.machine.step(event) {
            if self.faults && random.one_in(100) {
                return self.crash(random);
            }
            self.source_effect(id, effect, random);
        }
    }

    fn source_effect(&mut self, id: MigrationId, effect: source::Effect, random: &mut Random) {
        use source::{Effect, Event};
        let Some(run) = self.memory.outgoing.get(&id) else { return };
        let (to, epoch, run_there) = (run.to, run.epoch, run.machine.was_running());
        match effect {
            Effect::Check => self.memory.jobs.push(Job::Check(id)),
            Effect::AskReservation => {
                self.send(to, id, epoch, RequestBody::Reservation { spec: spec() }, Waiting::Source(id));
            }
            Effect::Scan { .. } => self.memory.jobs.push(Job::Scan(id)),
            Effect::AskInitialization(pass) => {
                let body = RequestBody::Initialization(Box::new(self.initialization(pass)));
                self.send(to, id, epoch, body, Waiting::Source(id));
            }
            Effect::Stop => self.memory.jobs.push(Job::Stop(id)),
            Effect::Suspend => self.memory.jobs.push(Job::Pause(id)),
            Effect::Resume => self.memory.jobs.push(Job::Resume),
            Effect::GiveUp(pass) => {
                let result = match self.disk_fails(random) {
                    true => Err(denial(DenialCode::Other, "disk full")),
                    false => self.give_up(id, to, pass, run_there),
                };
                self.memory.jobs.push(Job::Source(id, Event::GaveUp(result)));
            }
            Effect::AskStart(hand_over) => {
                let body = RequestBody::Start { hand_over, run: run_there };
                self.send(to, id, epoch, body, Waiting::Source(id));
            }
            Effect::TakeBack(back) => {
                let result = match self.disk_fails(random) {
                    true => Err(denial(DenialCode::Other, "disk full")),
                    false => self.take_back(&back),
                };
                self.memory.jobs.push(Job::Source(id, Event::TookBack(result)));
            }
            Effect::Wait { .. } => self.memory.jobs.push(Job::Source(id, Event::Timer)),
            Effect::Restart => self.start_machine(None),
            Effect::TellCancel => {
                self.send(to, id, epoch, RequestBody::Cancel { reason: "off".into() }, Waiting::Nobody);
            }
            Effect::Release { receipt, .. } => {
                let failed = self.disk_fails(random);
                let given = self.durable.record.as_mut().and_then(|r| r.given_up.as_mut());
                match given.filter(|g| g.hand_over.migration == id) {
                    Some(_) if failed => return self.crash(random),
                    Some(g) => g.receipt = Some(receipt),
                    None => self.broken = Some("released what is not given up by this migration".into()),
                }
                self.end_outgoing(id);
            }
            Effect::Abandon(_) => self.end_outgoing(id),
        }
    }

    fn end_outgoing(&mut self, id: MigrationId) {
        self.memory.outgoing.remove(&id);
        if self.memory.busy == Some(Busy::Migration(id)) || !self.rules.starting_is_busy {
            self.memory.busy = None;
        }
    }

    fn initialization(&self, pass: Pass) -> Initialization {
        Initialization {
            spec: spec(),
            recipe: String::new(),
            component_names: Vec::new(),
            component_bytes: 0,
            pass,
            addresses: Vec::new(),
            source_key: self.key.public(),
            ticket: String::new(),
            firmware: None,
        }
    }

    fn give_up(
        &mut self,
        id: MigrationId,
        to: usize,
        pass: Pass,
        was_running: bool,
    ) -> Result<SignedHandOver, Denial> {
        let record = self.durable.record.as_mut().ok_or_else(|| denial(DenialCode::Other, "gone"))?;
        let hand_over = HandOver {
            vm: spec().id,
            migration: id,
            epoch: record.epoch + 1,
            source: jid(self.me),
            source_key: self.key.public(),
            target: jid(to),
            target_key: key(to).public(),
            recipe: spec().recipe,
            root_delta: pass.root_delta.id(),
            user_data: pass.user_data.id(),
            issued: UnixMillis(1),
        };
        record.given_up = Some(GivenUp { to, hand_over: hand_over.clone(), was_running, receipt: None });
        Ok(hand_over.sign(&self.key))
    }

    fn take_back(&mut self, back: &Return) -> Result<(), Denial> {
        let refuse = |text: &str| denial(DenialCode::HandOver, text);
        let h = back.verify().map_err(|e| refuse(&e.to_string()))?;
        let record = self.durable.record.as_mut().ok_or_else(|| refuse("unknown"))?;
        if record.given_up.as_ref().map(|g| &g.hand_over) != Some(&h) {
            return Err(refuse("the return is for another hand-over"));
        }
        record.given_up = None;
        record.epoch = h.epoch + 1;
        Ok(())
    }

    pub fn answered(&mut self, nonce: u64, body: AnswerBody, random: &mut Random) {
        match self.memory.waiting.remove(&nonce) {
            Some(Waiting::Source(id)) => {
                if let AnswerBody::Started { receipt, .. } = &body
                    && !receipt.verify().is_ok_and(|h| h.migration == id)
                {
                    self.broken = Some("receipt of another migration".into());
                }
                self.source_event(id, source::Event::Answered(Box::new(body)), random);
            }
            Some(Waiting::Delete(id, _)) => {
                let arrival = self.durable.record.as_mut().and_then(|r| r.arrival.as_mut());
                if let Some(a) = arrival.filter(|a| a.migration == id) {
                    a.acknowledged = true;
                }
                if self.memory.incoming.get(&id).is_some_and(|r| !unfinished(&r.machine)) {
                    self.memory.incoming.remove(&id);
                }
            }
            // Too late, or before a crash: nobody waits any more.
            Some(Waiting::Nobody) | None => {}
        }
    }

    pub fn unanswered(&mut self, nonce: u64, random: &mut Random) {
        match self.memory.waiting.remove(&nonce) {
            Some(Waiting::Source(id)) => self.source_event(id, source::Event::Unanswered, random),
            Some(Waiting::Delete(id, to)) => self.memory.jobs.push(Job::Delete { id, to }),
            Some(Waiting::Nobody) | None => {}
        }
    }

    // --- the target's side ---

    /// What every broker checks first. Each 64th message goes all the way through the seal.
    fn admits(&mut self, m: &Message, id: MigrationId, epoch: u64) -> bool {
        let envelope = Envelope {
            version: VERSION,
            from: jid(m.from),
            to: jid(self.me),
            migration: id,
            vm: VmId(uuid::Uuid::from_u128(VM)),
            epoch,
            nonce: format!("{:032x}", m.nonce),
            issued: m.issued,
            expires: m.issued.plus(LIFETIME),
            body: (),
        };
        let fresh = envelope.is_fresh(self.now);
        if m.nonce.is_multiple_of(64) {
            let sealed = envelope.seal(&key(m.from)).expect("it is small");
            let opened =
                Envelope::<()>::open(&sealed, &key(m.from).public(), &jid(m.from), &jid(self.me), self.now);
            if opened.is_ok() != fresh {
                self.broken = Some("a sealed message is judged otherwise".into());
            }
        }
        self.refused += u64::from(!fresh);
        fresh && self.memory.replay.admit(&envelope, self.now).is_ok()
    }

    pub fn asked(
        &mut self,
        m: &Message,
        id: MigrationId,
        epoch: u64,
        body: &RequestBody,
        random: &mut Random,
    ) {
        if !self.admits(m, id, epoch) {
            return;
        }
        let known = self.memory.incoming.get(&id).map(|r| r.from == m.from);
        let answer = match (body, known) {
            (_, Some(false)) => Some(deny(DenialCode::NotYours, "another's")),
            (RequestBody::Delete { .. }, _) => Some(AnswerBody::Deleted { grace_s: 0 }),
            (RequestBody::Stop | RequestBody::Suspend, _) => Some(self.steered(m.from, id, body, random)),
            (body, Some(true)) => self.target_event(id, target::Event::Asked(Box::new(body.clone())), random),
            (RequestBody::Reservation { .. }, None) => Some(self.reserve(m.from, id, epoch, random)),
            (RequestBody::Start { hand_over, .. }, None) => {
                Some(self.start_unknown(m.from, hand_over, random))
            }
            (RequestBody::Cancel { .. }, None) => Some(AnswerBody::Cancelled),
            _ => Some(deny(DenialCode::UnknownMigration, "unknown")),
        };
        if let Some(body) = answer {
            let payload = crate::world::Payload::Answer(body);
            self.sent.push(Message { from: self.me, to: m.from, nonce: m.nonce, issued: self.now, payload });
        }
    }

    fn steered(
        &mut self,
        from: usize,
        id: MigrationId,
        body: &RequestBody,
        random: &mut Random,
    ) -> AnswerBody {
        let Some(run) = self.memory.outgoing.get_mut(&id).filter(|run| run.to == from) else {
            return deny(DenialCode::UnknownMigration, "unknown");
        };
        let (answer, effects) = run.machine.asked(body);
        effects.into_iter().for_each(|effect| self.source_effect(id, effect, random));
        answer
    }

    /// The operator of the target of a running migration asks its source.
    pub fn steer(&mut self, body: RequestBody) {
        let run = self.memory.incoming.iter().find(|(_, run)| run.machine.leased());
        if let Some((id, to)) = run.map(|(id, run)| (*id, run.from)) {
            self.send(to, id, 0, body, Waiting::Nobody);
        }
    }

    fn reserve(&mut self, from: usize, id: MigrationId, epoch: u64, random: &mut Random) -> AnswerBody {
        let present = self.owns() || self.memory.incoming.values().any(|r| unfinished(&r.machine));
        if present || self.faults && random.one_in(30) {
            return deny(DenialCode::AlreadyThere, "already there");
        }
        if self.rules.no_arrival_while_in_doubt && !self.memory.outgoing.is_empty() {
            return deny(DenialCode::Busy, "its last hand-over from here is not acknowledged");
        }
        if self.durable.record.as_ref().is_some_and(|r| epoch < r.seen_epoch()) {
            return deny(DenialCode::HandOver, "a later epoch was seen");
        }
        let agreement = Agreement {
            source: jid(from),
            source_key: key(from).public(),
            target: jid(self.me),
            target_key: self.key.public(),
            migration: id,
            vm: spec().id,
            epoch,
            recipe: spec().recipe,
        };
        let dir = match self.rules.own_directory_per_reservation {
            true => format!("{id}-{}", self.fresh()),
            false => id.to_string(),
        };
        self.memory.incoming.insert(id, Incoming { machine: Target::new(agreement, 60), from, dir });
        AnswerBody::Reserved { expires_in_s: 60 }
    }

    fn start_unknown(&mut self, from: usize, signed: &SignedHandOver, random: &mut Random) -> AnswerBody {
        let h = match signed.verify() {
            Ok(h) if h.target_key == self.key.public() && h.source == jid(from) => h,
            _ => return deny(DenialCode::HandOver, "not for us"),
        };
        let arrival = self.durable.record.as_ref().and_then(|r| r.arrival.as_ref());
        let here = arrival.filter(|a| a.migration == h.migration).map(|a| a.receipt.clone());
        if let Some(receipt) = here.or_else(|| self.durable.past.get(&h.migration).cloned()) {
            let running = self.durable.running;
            return AnswerBody::Started { receipt, running, problem: None, account: StageAccount::default() };
        }
        if self.disk_fails(random) {
            return deny(DenialCode::Other, "disk full");
        }
        self.durable.returns.insert(h.epoch);
        let back = signed.clone().give_back(&self.key);
        AnswerBody::Returned { back, denial: denial(DenialCode::UnknownMigration, "forgotten") }
    }

    /// `None` if the broker crashed before it answered.
    pub fn target_event(
        &mut self,
        id: MigrationId,
        event: target::Event,
        random: &mut Random,
    ) -> Option<AnswerBody> {
        let asked = matches!(event, target::Event::Asked(_));
        let run = self.memory.incoming.get_mut(&id)?;
        let effects = run.machine.step(event);
        let answers = effects.iter().filter(|e| matches!(e, target::Effect::Answer(_))).count();
        if answers != usize::from(asked) {
            self.broken = Some(format!("{answers} answers: {effects:?}"));
        }
        let mut answer = None;
        for effect in effects {
            if self.faults && random.one_in(100) {
                self.crash(random);
                return None;
            }
            match effect {
                target::Effect::Answer(a) => answer = Some(*a),
                other => self.target_effect(id, other, random),
            }
        }
        if self.memory.incoming.get(&id).is_some_and(|r| *r.machine.phase() == target::Phase::Abandoned) {
            self.memory.incoming.remove(&id);
        }
        answer
    }

    fn target_effect(&mut self, id: MigrationId, effect: target::Effect, random: &mut Random) {
        use target::{Effect, Event};
        let Some(run) = self.memory.incoming.get(&id) else { return };
        let (from, dir) = (run.from, run.dir.clone());
        match effect {
            Effect::Answer(_) => {}
            Effect::Stage(init) => {
                let content = init.pass.root_delta.disk_size_bytes;
                self.memory.jobs.push(Job::Stage { id, dir, content });
            }
            Effect::TakeOver(signed) => {
                let result = match self.disk_fails(random) {
                    true => Err(denial(DenialCode::Other, "disk full")),
                    false => self.take_over(id, signed),
                };
                self.memory.jobs.push(Job::Target(id, Event::TookOver(result)));
            }
            Effect::Start => self.start_machine(Some(id)),
            Effect::AskDelete { .. } => self.memory.jobs.push(Job::Delete { id, to: from }),
            Effect::CleanUp => self.memory.jobs.push(Job::Scrub(dir)),
        }
    }

    fn take_over(&mut self, id: MigrationId, signed: SignedHandOver) -> Result<Receipt, Denial> {
        let refuse = |text: &str| denial(DenialCode::HandOver, text);
        let h = signed.verify().map_err(|e| refuse(&e.to_string()))?;
        let run = self.memory.incoming.get(&id).ok_or_else(|| refuse("unknown"))?;
        let (from, dir, wanted) = (run.from, run.dir.clone(), run.machine.run());
        let newer = |r: &Record| r.given_up.is_none() || r.seen_epoch() >= h.epoch;
        if self.durable.returns.contains(&h.epoch) || self.durable.past.contains_key(&id) {
            return Err(refuse("returned, or taken over before"));
        }
        if self.durable.record.as_ref().is_some_and(newer) {
            return Err(refuse("a later epoch was seen"));
        }
        self.keep_past();
        if wanted && self.rules.starting_is_busy {
            self.memory.busy = Some(Busy::Starting);
        }
        let receipt = signed.accept(&self.key);
        let arrival = Arrival { migration: id, from, receipt: receipt.clone(), acknowledged: false };
        let run = wanted && self.rules.take_over_records_run;
        let record = Record { epoch: h.epoch, given_up: None, run, dir, arrival: Some(arrival) };
        if let Some(old) = self.durable.record.replace(record) {
            self.memory.jobs.push(Job::Scrub(old.dir));
        }
        Ok(receipt)
    }
}

pub fn unfinished(machine: &Target) -> bool {
    !matches!(machine.phase(), target::Phase::Owned | target::Phase::Abandoned)
}
