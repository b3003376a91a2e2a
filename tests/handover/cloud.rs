//! One simulated cloud: the broker's rules around the two machines, over durable records that
//! survive its crashes, VM processes and disks that do too, and a memory that does not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use cicada::clock::UnixMillis;
use cicada::migration::envelope::{LIFETIME, VERSION};
use cicada::migration::handover::{Receipt, Return, SignedHandOver};
use cicada::migration::message::{Initialization, Seed, StageAccount};
use cicada::migration::ownership::{Became, Gift, Given, Guest, Hold, Learnt, Standing};
use cicada::migration::records::VmRecord;
use cicada::migration::source::{self, Source};
use cicada::migration::target::{self, Agreement, Target};
use cicada::migration::{
    AnswerBody, Denial, DenialCode, Envelope, Lineage, Links, Pass, Refusal, ReplayGuard, RequestBody,
};
use cicada::types::{
    ByteSize, IdentityKey, LinkId, MemberJid, MigrationId, PublicKey, RecipeId, ReservationId, VmId,
};
use cicada::vm::{MapRef, VmSpec};

use crate::Rules;
use crate::world::{Message, Random, VM};

/// What a crash of the broker leaves behind.
#[derive(Clone)]
pub struct Durable {
    pub record: Option<VmRecord>,
    /// The history kept beside the record.
    pub lineage: Lineage,
    /// Hand-overs of version 1 promised never to be run here: to whose key, under which epoch.
    pub returns: BTreeSet<(PublicKey, u64)>,
    /// Receipts kept for good.
    pub receipts: BTreeMap<MigrationId, Receipt>,
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
    /// Negotiated in version 1: no history is shown.
    pub before: bool,
    /// The target's answer to the reservation, until it has the history.
    reserved: Option<AnswerBody>,
    reservation: Option<ReservationId>,
}

pub struct Incoming {
    pub machine: Target,
    pub from: usize,
    pub dir: String,
    before: bool,
    offered: Option<Lineage>,
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
    pub hold: Option<Hold>,
    /// Its records may be older than what others know, and it has not asked them.
    pub unconfirmed: bool,
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

/// Three clouds, and a member that never had the VM.
pub const KEYS: usize = 4;

pub fn jid(n: usize) -> MemberJid {
    static JIDS: LazyLock<[MemberJid; KEYS]> = LazyLock::new(|| {
        [0, 1, 2, 3].map(|n| format!("cloud-{n}@federation").parse().expect("a valid address"))
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
        disk_bus: Default::default(),
        system_uuid: None,
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
                lineage: Lineage::empty(spec().id),
                returns: BTreeSet::new(),
                receipts: BTreeMap::new(),
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

    /// By its own records; what may be older than the others' knowledge does not count.
    pub fn owns(&self) -> bool {
        !self.memory.unconfirmed && self.durable.record.as_ref().is_some_and(VmRecord::is_here)
    }

    /// All it knows of the VM's history.
    pub fn known(&self) -> Lineage {
        self.rules.law.known(self.durable.lineage.clone(), self.durable.record.as_ref())
    }

    fn standing<'a>(&'a self, known: &'a Lineage) -> Standing<'a> {
        Standing { record: self.durable.record.as_ref(), known, damaged: false }
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
        let unconfirmed = self.memory.unconfirmed;
        let jobs = std::mem::replace(&mut self.memory, Memory { unconfirmed, ..Memory::default() }).jobs;
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
        let named = |dir: &String| *dir == record.disks || record.kept.iter().any(|copy| copy.disks == *dir);
        self.durable.dirs.retain(|dir, _| named(dir));
        match record.given_up() {
            Some(g) if g.in_doubt() => {
                let (id, hand_over) = (g.migration, g.hand_over().expect("it was recorded whole"));
                let before = hand_over.provenance.is_none();
                let (machine, effects) = Source::resume(g.was_running, hand_over.sign(&self.key));
                let (to, epoch) = (index(&g.to), record.epoch);
                let run = Outgoing { machine, to, epoch, before, reserved: None, reservation: None };
                self.memory.outgoing.insert(id, run);
                self.memory.hold = Some(Hold::Migration(id));
                for effect in effects {
                    self.source_effect(id, effect, &mut Random::new(0));
                }
            }
            Some(_) => {}
            None => {
                if let Some(a) = record.arrival.as_ref().filter(|a| !a.acknowledged) {
                    self.memory.jobs.push(Job::Delete { id: a.migration, to: index(&a.from) });
                }
                if record.run {
                    self.start_machine(None);
                }
            }
        }
    }

    /// The machine came back from a backup: its records are as they were, and it knows that they may be old.
    pub fn restore(&mut self, backup: &Durable) {
        self.memory = Memory { unconfirmed: self.rules.asks_before_it_runs, ..Memory::default() };
        let disks = std::mem::take(&mut self.durable.dirs);
        self.durable = Durable { running: false, paused: false, ..backup.clone() };
        // Disks that are gone since do not come back, and a guest that starts finds what is there.
        self.durable.dirs.retain(|dir, _| disks.contains_key(dir));
        self.boot();
    }

    /// Asks another cloud what it knows.
    pub fn learn_from(&mut self, other: &Cloud) {
        let (known, shown) = (self.known(), other.known());
        let running = self.durable.running;
        let learnt = self.rules.law.learn(
            self.standing(&known),
            &shown,
            &self.key.public(),
            running,
            &jid(other.me),
            (UnixMillis(1), UnixMillis(2)),
        );
        let (record, lineage) = match learnt {
            Learnt::Nothing | Learnt::Contradicts => return,
            Learnt::Longer(lineage) => (None, Some(lineage)),
            Learnt::Ours(record, lineage) | Learnt::GivenUp(record, lineage) => (Some(record), Some(lineage)),
            Learnt::Disproved(record) => (Some(record), None),
        };
        if let Some(lineage) = lineage {
            self.durable.lineage = lineage;
        }
        if let Some(record) = record {
            let pending =
                self.durable.record.replace(*record).and_then(|old| Some(old.given_up()?.migration));
            if let Some(id) = pending {
                self.end_outgoing(id);
            }
        }
    }

    /// All others were asked.
    pub fn confirm(&mut self) {
        if std::mem::take(&mut self.memory.unconfirmed)
            && self.memory.hold.is_none()
            && self.durable.record.as_ref().is_some_and(|r| r.is_here() && r.run)
        {
            self.start_machine(None);
        }
    }

    // --- the operator ---

    pub fn begin_move(&mut self, to: usize, id: MigrationId, before: bool) -> bool {
        let Some(record) = self.durable.record.as_ref() else { return false };
        let hold = self.memory.hold.unwrap_or(Hold::Free);
        if self.rules.law.may_move(record, hold, !self.memory.unconfirmed).is_err() {
            return false;
        }
        let (machine, epoch) = (Source::new(self.durable.running), record.epoch);
        let run = Outgoing { machine, to, epoch, before, reserved: None, reservation: None };
        self.memory.hold = Some(Hold::Migration(id));
        self.memory.outgoing.insert(id, run);
        true
    }

    /// Scrubs copies whose grace period is over.
    pub fn scrub_released(&mut self) {
        let Some(record) = self.durable.record.clone() else { return };
        let coming_home = self.memory.incoming.values().any(|r| unfinished(&r.machine));
        if coming_home || self.memory.hold.is_some() || self.memory.unconfirmed {
            return;
        }
        // The grace period is over for the one or the other.
        if let Some((over, record)) = self.rules.law.due(&record, UnixMillis(u64::MAX)) {
            self.durable.record = Some(record);
            self.memory.jobs.extend(over.into_iter().map(Job::Scrub));
        } else if record.given_up().is_some_and(|g| !g.in_doubt()) {
            self.keep_past();
            self.durable.record = None;
            self.memory.jobs.push(Job::Scrub(record.disks));
        }
    }

    /// A receipt once given is given again for ever, also when its record goes.
    fn keep_past(&mut self) {
        let Some(record) = &self.durable.record else { return };
        let known = self.known();
        for (id, receipt) in self.rules.law.outlive(record) {
            self.durable.receipts.insert(id, receipt);
        }
        self.durable.lineage = known;
    }

    // --- the hypervisor ---

    fn start_machine(&mut self, arrival: Option<MigrationId>) {
        let confirmed = !self.memory.unconfirmed;
        let Some(record) = self.durable.record.as_mut() else { return };
        if self.rules.law.may_run(record, confirmed).is_err() {
            return;
        }
        record.run = true;
        self.memory.hold = Some(Hold::Verb("started"));
        self.memory.jobs.push(Job::Start(arrival));
    }

    fn switched_off(&mut self) {
        (self.durable.running, self.durable.paused) = (false, false);
    }

    fn started(&mut self, arrival: Option<MigrationId>, random: &mut Random) {
        if matches!(self.memory.hold, Some(Hold::Verb(_))) {
            self.memory.hold = None;
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
            let dir = self.durable.record.as_ref().map(|r| r.disks.clone()).unwrap_or_default();
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
                let content = self.durable.dirs.get(&record.disks).copied().unwrap_or_default();
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
        let before = run.before;
        match effect {
            Effect::Check => self.memory.jobs.push(Job::Check(id)),
            Effect::AskReservation => {
                // Version 1 is told by the epoch's high bit here: envelopes are made elsewhere.
                let body = RequestBody::Reservation { spec: spec() };
                self.send(to, id, epoch | u64::from(before) << 63, body, Waiting::Source(id));
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
                let record = self.durable.record.as_ref();
                match record.map(|record| self.rules.law.release(record, receipt, UnixMillis(2))) {
                    Some(Ok(_)) if failed => return self.crash(random),
                    Some(Ok(record)) => self.durable.record = Some(record),
                    other => self.broken = Some(format!("released what is not given up by it: {other:?}")),
                }
                self.end_outgoing(id);
            }
            Effect::Abandon(_) => self.end_outgoing(id),
        }
    }

    fn end_outgoing(&mut self, id: MigrationId) {
        self.memory.outgoing.remove(&id);
        if self.memory.hold == Some(Hold::Migration(id)) {
            self.memory.hold = None;
        }
    }

    fn initialization(&self, pass: Pass) -> Initialization {
        initialization(&self.key, pass)
    }

    fn give_up(
        &mut self,
        id: MigrationId,
        to: usize,
        pass: Pass,
        was_running: bool,
    ) -> Result<SignedHandOver, Denial> {
        let record = self.durable.record.as_ref().ok_or_else(|| denial(DenialCode::Other, "gone"))?;
        let gift = Gift {
            migration: id,
            source: jid(self.me),
            source_key: self.key.public(),
            target: jid(to),
            target_key: key(to).public(),
            reservation: self.memory.outgoing.get(&id).and_then(|run| run.reservation),
            seed: Seed { root_delta: pass.root_delta, user_data: pass.user_data },
            was_running,
            now: UnixMillis(1),
        };
        let (record, hand_over) =
            self.rules.law.give_up(record, &self.known(), gift).map_err(|refusal| refused(&refusal))?;
        self.durable.record = Some(record);
        Ok(hand_over.sign(&self.key))
    }

    fn take_back(&mut self, back: &Return) -> Result<(), Denial> {
        let record = self.durable.record.as_ref().ok_or_else(|| denial(DenialCode::HandOver, "unknown"))?;
        let (record, known) =
            self.rules.law.take_back(record, &self.known(), back).map_err(|refusal| refused(&refusal))?;
        self.durable.lineage = known;
        self.durable.record = Some(record);
        Ok(())
    }

    pub fn answered(&mut self, nonce: u64, body: AnswerBody, random: &mut Random) {
        match self.memory.waiting.remove(&nonce) {
            Some(Waiting::Source(id)) => {
                if let AnswerBody::Started { receipt, .. } = &body {
                    let record = self.durable.record.as_ref();
                    if record.is_none_or(|record| self.rules.law.receipt_fits(record, receipt).is_err()) {
                        return self.source_event(id, source::Event::Unanswered, random);
                    }
                }
                if let Some(body) = self.shows_history(id, body) {
                    self.source_event(id, source::Event::Answered(Box::new(body)), random);
                }
            }
            Some(Waiting::Delete(id, _)) => {
                let record = self.durable.record.as_ref();
                if let Some(record) = record.and_then(|record| self.rules.law.acknowledge(record, id)) {
                    self.durable.record = Some(record);
                }
                if self.memory.incoming.get(&id).is_some_and(|r| !unfinished(&r.machine)) {
                    self.memory.incoming.remove(&id);
                }
            }
            // Too late, or before a crash: nobody waits any more.
            Some(Waiting::Nobody) | None => {}
        }
    }

    /// A reservation counts once its target has the VM's history.
    fn shows_history(&mut self, id: MigrationId, body: AnswerBody) -> Option<AnswerBody> {
        let known = self.known();
        let run = self.memory.outgoing.get_mut(&id)?;
        match &body {
            AnswerBody::Reserved { reservation: Some(reservation), known: theirs, .. } => {
                run.reservation = Some(*reservation);
                run.reserved = Some(body.clone());
                let after = theirs.filter(|id| known.position(id).is_some());
                let links = known.since(after.as_ref()).to_vec();
                let (to, epoch, total) = (run.to, run.epoch, links.len() as u32);
                let page = RequestBody::Lineage {
                    at: 0,
                    total,
                    after,
                    links: Links(links),
                    successions: Default::default(),
                };
                self.send(to, id, epoch, page, Waiting::Source(id));
                None
            }
            AnswerBody::Lineage { .. } => run.reserved.take(),
            _ => Some(body),
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
            (RequestBody::Withdraw { hand_over }, _) => Some(self.withdrawn(m.from, hand_over, random)),
            (RequestBody::Lineage { after, links, .. }, _) => Some(self.shown(id, *after, links)),
            (RequestBody::Stop | RequestBody::Suspend, _) => Some(self.steered(m.from, id, body, random)),
            (body, Some(true)) => self.target_event(id, target::Event::Asked(Box::new(body.clone())), random),
            (RequestBody::Reservation { .. }, None) => Some(self.reserve(m.from, id, epoch, random)),
            (RequestBody::Start { hand_over, .. }, None) => {
                Some(self.start_unknown(m.from, hand_over, random))
            }
            (RequestBody::Cancel { .. }, None) => Some(AnswerBody::Cancelled { kept_s: 0 }),
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
        let before = epoch >> 63 == 1;
        let epoch = epoch & !(1 << 63);
        let arriving = self.memory.incoming.values().any(|r| unfinished(&r.machine));
        if arriving || self.memory.unconfirmed || self.faults && random.one_in(30) {
            return deny(DenialCode::AlreadyThere, "already there");
        }
        let known = self.known();
        let (standing, law) = (self.standing(&known), self.rules.law);
        let allowed = match before {
            true => law.offer(standing, &jid(from), &key(from).public(), None).map(drop),
            false => law.may_arrive(standing),
        };
        if let Err(refusal) = allowed {
            return AnswerBody::Denied(refused(&refusal));
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
            reservation: ReservationId(uuid::Uuid::from_u128(
                u128::from(random.next()) << 8 | self.me as u128,
            )),
            known: known.tip().map(|tip| tip.id),
        };
        let dir = match self.rules.own_directory_per_reservation {
            true => format!("{id}-{}", self.fresh()),
            false => id.to_string(),
        };
        let machine = Target::new(agreement, 60);
        let answer = match before {
            true => AnswerBody::Reserved { expires_in_s: 60, reservation: None, known: None },
            false => machine.reserved(),
        };
        self.memory.incoming.insert(id, Incoming { machine, from, dir, before, offered: None });
        answer
    }

    /// The history that the source of a reservation shows.
    fn shown(&mut self, id: MigrationId, after: Option<LinkId>, links: &Links) -> AnswerBody {
        let known = self.known();
        let law = self.rules.law;
        let base = match after {
            Some(after) if known.tip().is_some_and(|tip| tip.id == after) => known.clone(),
            Some(_) => return deny(DenialCode::HandOver, "not the last link known"),
            None => Lineage::empty(spec().id),
        };
        let offered = match base.continued(links.0.clone()) {
            Ok(offered) => offered,
            Err(e) => return deny(DenialCode::HandOver, &e.to_string()),
        };
        let standing = self.standing(&known);
        let Some(run) = self.memory.incoming.get(&id).filter(|run| run.machine.leased()) else {
            return deny(DenialCode::UnknownMigration, "unknown");
        };
        let from = run.from;
        if let Err(refusal) = law.offer(standing, &jid(from), &key(from).public(), Some(&offered)) {
            return AnswerBody::Denied(refused(&refusal));
        }
        if let Some(run) = self.memory.incoming.get_mut(&id) {
            run.offered = Some(offered);
        }
        AnswerBody::Lineage { links: links.0.len() as u32 }
    }

    fn start_unknown(&mut self, from: usize, signed: &SignedHandOver, random: &mut Random) -> AnswerBody {
        let h = match signed.verify() {
            Ok(h) if h.target_key == self.key.public() && h.source == jid(from) => h,
            _ => return deny(DenialCode::HandOver, "not for us"),
        };
        let known = Lineage::empty(spec().id);
        let receipt = self.durable.receipts.get(&h.migration).cloned();
        let promised = self.durable.returns.contains(&(h.source_key, h.epoch));
        let given = Given { promised, receipt: receipt.as_ref() };
        match self.rules.law.what_became_of(self.standing(&known), given, &h, signed) {
            Became::Taken(receipt) => {
                let running = self.durable.running;
                return AnswerBody::Started {
                    receipt,
                    running,
                    problem: None,
                    account: StageAccount::default(),
                };
            }
            Became::Other | Became::Unknowable => return deny(DenialCode::HandOver, "cannot be told"),
            Became::Void => {}
            Became::ToBePromised if self.disk_fails(random) => return deny(DenialCode::Other, "disk full"),
            Became::ToBePromised => drop(self.durable.returns.insert((h.source_key, h.epoch))),
        }
        let back = signed.clone().give_back(&self.key);
        AnswerBody::Returned { back, denial: denial(DenialCode::UnknownMigration, "forgotten") }
    }

    fn withdrawn(&mut self, from: usize, signed: &SignedHandOver, random: &mut Random) -> AnswerBody {
        let Ok(h) = signed.verify() else { return deny(DenialCode::HandOver, "forged") };
        let under_way = self.memory.incoming.get(&h.migration).is_some_and(|run| run.machine.leased());
        if under_way {
            self.target_event(h.migration, target::Event::LeaseExpired, random);
        }
        let answer = self.start_unknown(from, signed, random);
        if let (AnswerBody::Started { .. }, Some(record)) = (&answer, &self.durable.record)
            && let Some(record) = self.rules.law.withdrawn(record, h.migration, UnixMillis(1))
        {
            self.durable.record = Some(record);
        }
        answer
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
        let run = self.memory.incoming.get(&id).ok_or_else(|| denial(DenialCode::HandOver, "unknown"))?;
        let h = signed.verify().map_err(|e| denial(DenialCode::HandOver, &e.to_string()))?;
        let guest = Guest {
            spec: spec(),
            components: Vec::new(),
            disks: run.dir.clone(),
            run: run.machine.run(),
            reservation: run.machine.agreement().reservation,
            now: UnixMillis(1),
            grace: std::time::Duration::from_millis(1),
        };
        let wanted = run.machine.run();
        let known = self.known();
        let receipt = self.durable.receipts.get(&id).cloned();
        let promised = self.durable.returns.contains(&(h.source_key, h.epoch));
        let given = Given { promised, receipt: receipt.as_ref() };
        let offered = run.offered.as_ref().filter(|_| !run.before);
        let taken = self.rules.law.take_over(self.standing(&known), given, offered, signed, &self.key, guest);
        let (record, lineage) = taken.map_err(|refusal| refused(&refusal))?;
        self.keep_past();
        self.durable.lineage = lineage;
        if wanted {
            self.memory.hold = Some(Hold::Verb("started"));
        }
        let receipt = record.arrival.as_ref().map(|a| a.receipt.clone()).expect("it just arrived");
        let kept = record.kept.iter().map(|copy| copy.disks.clone()).collect::<Vec<_>>();
        if let Some(old) = self.durable.record.replace(record)
            && !kept.contains(&old.disks)
        {
            self.broken = Some(format!("loses {} within its grace period", old.disks));
        }
        self.durable.receipts.insert(id, receipt.clone());
        Ok(receipt)
    }
}

/// A pass over what `key`'s holder has.
pub fn initialization(key: &IdentityKey, pass: Pass) -> Initialization {
    Initialization {
        spec: spec(),
        recipe: String::new(),
        component_names: Vec::new(),
        component_bytes: 0,
        pass,
        addresses: Vec::new(),
        source_key: key.public(),
        ticket: String::new(),
        firmware: None,
    }
}

/// A refusal as a peer is told it.
fn refused(refusal: &Refusal) -> Denial {
    Denial::new(refusal.code(), refusal.to_string())
}

/// Which cloud an address is.
pub fn index(jid: &MemberJid) -> usize {
    (0..KEYS).find(|n| *jid == self::jid(*n)).expect("a cloud of this world")
}

pub fn unfinished(machine: &Target) -> bool {
    !matches!(machine.phase(), target::Phase::Owned | target::Phase::Abandoned)
}
