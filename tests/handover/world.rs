//! Three clouds, one VM and a network that loses, repeats, delays and reorders.

use std::collections::hash_map::DefaultHasher;
use std::hash::Hash;

use cicada::clock::UnixMillis;
use cicada::migration::handover::Provenance;
use cicada::migration::records::{GivenUp, VmRecord};
use cicada::migration::source::Event as SourceEvent;
use cicada::migration::target::Event as TargetEvent;
use cicada::migration::{AnswerBody, HandOver, Lineage, Links, Pass, RequestBody};
use cicada::types::MigrationId;

use crate::Rules;
use crate::cloud::{self, Cloud, Durable, Job, KEYS, jid, key, map, spec, unfinished};

pub const VM: u128 = 0x5eed;
const CLOUDS: usize = 3;
/// A healed federation comes to rest within this many steps.
const HEALED_STEPS_MAX: usize = 3000;
const REPLAYED_MAX: usize = 200;
/// Clocks are off by at most this much while there are faults, and by so much that brokers still
/// understand each other when there are none.
const OFF_FAULTY_MS: u64 = 240_000;
const OFF_HEALED_MS: u64 = 55_000;

#[derive(Clone, Debug)]
pub struct Message {
    pub from: usize,
    pub to: usize,
    pub nonce: u64,
    /// By the sender's clock.
    pub issued: UnixMillis,
    pub payload: Payload,
}

#[derive(Clone, Debug)]
pub enum Payload {
    Request { migration: MigrationId, epoch: u64, body: RequestBody },
    Answer(AnswerBody),
}

/// SplitMix64: a run is told by its seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// What a run did; summed over runs to show that the interesting things happen.
#[derive(Default, Clone, Copy, Debug)]
pub struct Tally {
    pub steps: u64,
    pub moves: u64,
    pub crashes: u64,
    pub hand_overs: u64,
    pub returns: u64,
    pub abandoned: u64,
    pub held: u64,
    pub lost: u64,
    pub repeated: u64,
    pub replayed: u64,
    /// Requests refused for their time.
    pub refused: u64,
    /// False hand-overs, by members that never had the VM and by former owners.
    pub attacks: u64,
    /// Withdrawals of hand-overs that were acknowledged.
    pub withdrawals: u64,
    /// Clouds that came back from a backup.
    pub restored: u64,
}

pub struct World {
    clouds: Vec<Cloud>,
    network: Vec<Message>,
    log: Vec<Message>,
    random: Random,
    ran: bool,
    now_ms: u64,
    /// Each clock is ahead of the true time by this.
    ahead_ms: [u64; CLOUDS],
    /// A hash of everything that happened, in order.
    pub history: DefaultHasher,
    pub tally: Tally,
    moves_left: usize,
    backups: Vec<(usize, Durable)>,
}

type Outcome = Result<(), String>;

impl World {
    pub fn new(seed: u64, rules: Rules) -> Self {
        let mut random = Random::new(seed);
        let mut clouds: Vec<_> = (0..CLOUDS).map(|n| Cloud::new(n, rules)).collect();
        let ran = !random.one_in(4);
        let home = &mut clouds[0].durable;
        home.dirs.insert("disks-1".into(), 1);
        let record = VmRecord::new(spec(), Vec::new(), "disks-1", UnixMillis(1));
        home.record = Some(VmRecord { run: ran, ..record });
        home.running = ran;
        let moves_left = 1 + random.below(4);
        Self {
            clouds,
            network: Vec::new(),
            log: Vec::new(),
            random,
            ran,
            now_ms: 1_000_000_000,
            ahead_ms: [0; CLOUDS],
            history: DefaultHasher::new(),
            tally: Tally::default(),
            moves_left,
            backups: Vec::new(),
        }
    }

    /// Faults for a while, then none; at rest everything must be in order, and stay so when old
    /// messages come again.
    pub fn run(&mut self) -> Outcome {
        let steps = 60 + self.random.below(200);
        let calm = self.random.one_in(3);
        self.set_clocks(OFF_FAULTY_MS);
        for _ in 0..steps {
            self.disturb(calm);
            self.settle()?;
        }
        self.clouds.iter_mut().for_each(|c| c.faults = false);
        (0..CLOUDS).for_each(|n| self.confirm(n));
        self.settle()?;
        self.moves_left = 0;
        self.set_clocks(OFF_HEALED_MS);
        self.heal()?;
        self.at_rest()?;
        if self.random.one_in(3) { self.replay() } else { Ok(()) }
    }

    /// Half of the time they are right.
    fn set_clocks(&mut self, off_ms: u64) {
        let right = self.random.one_in(2);
        for ahead in &mut self.ahead_ms {
            *ahead = if right { 0 } else { self.random.below(off_ms as usize) as u64 };
        }
        self.pass_time(0);
    }

    fn pass_time(&mut self, ms: u64) {
        self.now_ms += ms;
        for (cloud, ahead) in self.clouds.iter_mut().zip(self.ahead_ms) {
            cloud.now = UnixMillis(self.now_ms + ahead);
        }
    }

    fn disturb(&mut self, calm: bool) {
        let pause_ms = if self.random.one_in(100) { 60_000 } else { 200 };
        let ms = self.random.below(pause_ms) as u64;
        self.pass_time(ms);
        let n = self.random.below(CLOUDS);
        // In calm runs migrations get further before something happens to them.
        let choice = self.random.below(if calm { 1000 } else { 200 });
        if choice <= 70 {
            (choice, n).hash(&mut self.history);
        }
        match choice {
            0..=5 => {
                self.tally.crashes += 1;
                self.clouds[n].crash(&mut self.random);
            }
            6..=13 => self.lose(),
            14..=21 => self.repeat(),
            22..=27 => self.time_out(n),
            28..=30 => self.expire(n),
            31..=33 => self.cancel(n),
            51..=54 => self.clouds[n].steer(RequestBody::Suspend),
            55..=56 => self.clouds[n].steer(RequestBody::Stop),
            57..=58 => self.hold_over(n),
            59..=61 => self.attack(),
            62..=63 => self.withdraw(),
            64..=66 => self.backups.push((n, self.clouds[n].durable.clone())),
            67..=68 => self.restore(),
            69..=70 => self.confirm(n),
            34..=39 => self.clouds[n].scrub_released(),
            40..=50 => self.write(),
            _ => self.progress(),
        }
    }

    /// One thing that was to happen happens.
    fn progress(&mut self) {
        if self.moves_left > 0 && self.random.one_in(15) {
            self.begin_move();
        }
        let jobs: usize = self.clouds.iter().map(|c| c.memory.jobs.len()).sum();
        let messages = self.network.len();
        let mut at = self.random.below(jobs + messages);
        if at < messages {
            let message = self.network.swap_remove(at);
            return self.deliver(&message);
        }
        at -= messages;
        for cloud in &mut self.clouds {
            if at < cloud.memory.jobs.len() {
                let job = cloud.memory.jobs.remove(at);
                (cloud.me, std::mem::discriminant(&job)).hash(&mut self.history);
                return cloud.run_job(job, &mut self.random);
            }
            at -= cloud.memory.jobs.len();
        }
        // Nothing is under way: whoever still waits learns that no answer comes.
        if messages == 0 {
            (0..CLOUDS).for_each(|n| self.time_out(n));
        }
    }

    fn deliver(&mut self, message: &Message) {
        let answer = matches!(message.payload, Payload::Answer(_));
        (message.from, message.to, message.nonce, answer).hash(&mut self.history);
        // Nobody listens to what is said to a liar.
        let Some(cloud) = self.clouds.get_mut(message.to) else { return };
        match &message.payload {
            Payload::Request { migration, epoch, body } => {
                cloud.asked(message, *migration, *epoch, body, &mut self.random);
            }
            Payload::Answer(body) => {
                match body {
                    AnswerBody::Started { .. } => self.tally.hand_overs += 1,
                    AnswerBody::Returned { .. } => self.tally.returns += 1,
                    _ => {}
                }
                cloud.answered(message.nonce, body.clone(), &mut self.random);
            }
        }
    }

    fn begin_move(&mut self) {
        let Some(n) = self.clouds.iter().position(Cloud::owns) else { return };
        let to = (n + 1 + self.random.below(CLOUDS - 1)) % CLOUDS;
        let id = MigrationId(uuid::Uuid::from_u128(u128::from(self.random.next()) | 1 << 64));
        // Now and then with a cloud of the version before.
        let before = self.random.one_in(6);
        if self.clouds[n].begin_move(to, id, before) {
            self.tally.moves += 1;
            self.moves_left -= 1;
            self.clouds[n].source_event(id, SourceEvent::Begin, &mut self.random);
        }
    }

    fn lose(&mut self) {
        if !self.network.is_empty() {
            self.tally.lost += 1;
            let at = self.random.below(self.network.len());
            self.network.swap_remove(at);
        }
    }

    fn repeat(&mut self) {
        // Something on its way, or something of long ago.
        let from = if self.random.one_in(2) { &self.network } else { &self.log };
        if !from.is_empty() {
            self.tally.repeated += 1;
            let copy = from[self.random.below(from.len())].clone();
            self.network.push(copy);
        }
    }

    fn time_out(&mut self, n: usize) {
        let waiting: Vec<_> = self.clouds[n].memory.waiting.keys().copied().collect();
        if !waiting.is_empty() {
            let nonce = waiting[self.random.below(waiting.len())];
            self.clouds[n].unanswered(nonce, &mut self.random);
        }
    }

    fn expire(&mut self, n: usize) {
        let leased =
            self.clouds[n].memory.incoming.iter().find(|(_, r)| r.machine.leased()).map(|(id, _)| *id);
        if let Some(id) = leased {
            self.clouds[n].target_event(id, TargetEvent::LeaseExpired, &mut self.random);
        }
    }

    fn cancel(&mut self, n: usize) {
        let first = self.clouds[n].memory.outgoing.iter().find(|(_, r)| r.machine.phase().can_cancel());
        if let Some(id) = first.map(|(id, _)| *id) {
            self.tally.abandoned += 1;
            self.clouds[n].source_event(id, SourceEvent::Cancel, &mut self.random);
        }
    }

    /// A member hands over what it never had, or had once: with the history as it then was, or none, under
    /// an epoch of its choice, to a cloud that knows better.
    fn attack(&mut self) {
        let histories = self.clouds.iter().map(Cloud::known);
        let Some(whole) = histories.max_by_key(|h| h.links().len()) else { return };
        let liar = self.random.below(KEYS);
        let links = whole.links();
        let length = self.random.below(links.len() + 1);
        let Ok(shown) = Lineage::verify(spec().id, links[..length].to_vec()) else { return };
        if shown.tip().is_some_and(|tip| tip.owner_key != key(liar).public()) || length == links.len() {
            return;
        }
        // Who last heard that the liar owns the VM cannot know that it gave it away since.
        let owned_by_liar =
            |known: &Lineage| known.tip().is_some_and(|tip| tip.owner_key == key(liar).public());
        let knows_better = |c: &Cloud| {
            let known = c.known();
            c.me != liar && known.links().len() > length && !owned_by_liar(&known)
        };
        let targets: Vec<usize> = self.clouds.iter().filter(|c| knows_better(c)).map(|c| c.me).collect();
        if targets.is_empty() {
            return;
        }
        let target = targets[self.random.below(targets.len())];
        self.tally.attacks += 1;
        let before = self.random.one_in(3);
        let id = MigrationId(uuid::Uuid::from_u128(u128::from(self.random.next()) | 1 << 65));
        let epoch = [shown.next_epoch(), whole.next_epoch(), 1_000_001][self.random.below(3)];
        let say = |world: &mut Self, body: RequestBody| world.say(liar, target, id, (epoch, before), body);
        let Some(AnswerBody::Reserved { reservation, .. }) =
            say(self, RequestBody::Reservation { spec: spec() })
        else {
            return;
        };
        if !before && !self.random.one_in(4) {
            let total = shown.links().len() as u32;
            let page = RequestBody::Lineage {
                at: 0,
                total,
                after: None,
                links: Links(shown.links().to_vec()),
                successions: Default::default(),
            };
            say(self, page);
        }
        // What it stages is not what the guest wrote.
        let pass = Pass { number: 1, last: true, root_delta: map(0), user_data: map(0) };
        let staging = RequestBody::Initialization(Box::new(cloud::initialization(&key(liar), pass)));
        say(self, staging.clone());
        let jobs = &mut self.clouds[target].memory.jobs;
        let staged = jobs.iter().position(|job| matches!(job, Job::Stage { id: of, .. } if *of == id));
        if let Some(at) = staged {
            let job = jobs.remove(at);
            self.clouds[target].run_job(job, &mut self.random);
        }
        say(self, staging);
        let hand_over = HandOver {
            vm: spec().id,
            migration: id,
            epoch,
            source: jid(liar),
            source_key: key(liar).public(),
            target: jid(target),
            target_key: key(target).public(),
            recipe: spec().recipe,
            root_delta: pass.root_delta.id(),
            user_data: pass.user_data.id(),
            issued: UnixMillis(1),
            provenance: reservation.map(|reservation| Provenance { origin: shown.origin(), reservation }),
        };
        say(self, RequestBody::Start { hand_over: hand_over.sign(&key(liar)), run: true });
    }

    /// A liar's request and the answer to it.
    fn say(
        &mut self,
        liar: usize,
        target: usize,
        id: MigrationId,
        (epoch, before): (u64, bool),
        body: RequestBody,
    ) -> Option<AnswerBody> {
        let nonce = self.random.next() | 1 << 63;
        let epoch = (epoch - 1) | u64::from(before) << 63;
        let cloud = &mut self.clouds[target];
        let payload = Payload::Request { migration: id, epoch, body: body.clone() };
        let message = Message { from: liar, to: target, nonce, issued: cloud.now, payload };
        cloud.asked(&message, id, epoch, &body, &mut self.random);
        let at = cloud.sent.iter().position(|m| m.nonce == nonce)?;
        match cloud.sent.remove(at).payload {
            Payload::Answer(answer) => Some(answer),
            Payload::Request { .. } => None,
        }
    }

    /// The giver of a hand-over that was acknowledged withdraws it.
    fn withdraw(&mut self) {
        let acknowledged = |c: &Cloud| {
            let arrival = c.durable.record.as_ref()?.arrival.clone()?;
            arrival.acknowledged.then_some((c.me, cloud::index(&arrival.from), arrival))
        };
        let Some((target, giver, arrival)) = self.clouds.iter().find_map(acknowledged) else { return };
        self.tally.withdrawals += 1;
        let body = RequestBody::Withdraw { hand_over: arrival.receipt.hand_over };
        self.say(giver, target, arrival.migration, (1, false), body);
    }

    /// A cloud that does not own the VM, and to which it is not going, comes back from a backup.
    fn restore(&mut self) {
        if self.backups.is_empty() {
            return;
        }
        let at = self.random.below(self.backups.len());
        let (n, backup) = self.backups.swap_remove(at);
        let goes_there = self.clouds.iter().any(|c| c.memory.outgoing.values().any(|run| run.to == n));
        let cloud = &self.clouds[n];
        let given = cloud.durable.record.as_ref().and_then(VmRecord::given_up);
        let under_way = !cloud.memory.outgoing.is_empty() || !cloud.memory.incoming.is_empty();
        let owns = cloud.durable.record.as_ref().is_some_and(VmRecord::is_here);
        if owns || goes_there || under_way || given.is_some_and(GivenUp::in_doubt) {
            return;
        }
        // Where it is taken back by its giver, nobody else knows that it is not here.
        self.tally.restored += 1;
        self.clouds[n].restore(&backup);
    }

    /// A cloud that may not know all asks the others.
    fn confirm(&mut self, n: usize) {
        if !self.clouds[n].memory.unconfirmed {
            return;
        }
        let mut cloud = self.clouds.remove(n);
        self.clouds.iter().for_each(|other| cloud.learn_from(other));
        cloud.confirm();
        self.clouds.insert(n, cloud);
    }

    fn hold_over(&mut self, n: usize) {
        let held = self.clouds[n].memory.outgoing.iter().find(|(_, run)| run.machine.held());
        if let Some(id) = held.map(|(id, _)| *id) {
            self.tally.held += 1;
            self.clouds[n].source_event(id, SourceEvent::HoldOver, &mut self.random);
        }
    }

    /// The guest writes.
    fn write(&mut self) {
        let Some(cloud) = self.clouds.iter_mut().find(|c| c.durable.running && !c.durable.paused) else {
            return;
        };
        let dir = cloud.durable.record.as_ref().map(|r| r.disks.clone()).unwrap_or_default();
        if let Some(content) = cloud.durable.dirs.get_mut(&dir) {
            *content += 1;
            let newest = *content;
            self.clouds.iter_mut().for_each(|c| c.newest = newest);
        }
    }

    /// Collects what was sent and checks what must hold at every instant.
    fn settle(&mut self) -> Outcome {
        self.tally.steps += 1;
        for cloud in &mut self.clouds {
            self.tally.refused += std::mem::take(&mut cloud.refused);
            self.log.extend(cloud.sent.iter().cloned());
            self.network.append(&mut cloud.sent);
            if let Some(what) = cloud.broken.take() {
                return Err(format!("cloud {}: {what}", cloud.me));
            }
        }
        let owners: Vec<_> = self.clouds.iter().filter(|c| c.owns()).collect();
        let running: Vec<_> = self.clouds.iter().filter(|c| c.durable.running).collect();
        if owners.len() > 1 {
            return Err(format!("owned by clouds {:?}", owners.iter().map(|c| c.me).collect::<Vec<_>>()));
        }
        if running.len() > 1 {
            return Err("runs in two clouds".into());
        }
        if let Some(stray) = running.iter().find(|c| !c.owns()) {
            return Err(format!("runs in cloud {}, which does not own it", stray.me));
        }
        let epoch =
            |c: &Cloud| c.durable.record.as_ref().filter(|_| !c.memory.unconfirmed).map_or(0, |r| r.epoch);
        if let Some(owner) = owners.first()
            && self.clouds.iter().any(|c| c.me != owner.me && epoch(c) >= epoch(owner))
        {
            return Err("a later epoch than the owner's exists".into());
        }
        Ok(())
    }

    /// Runs without faults until nothing is left to do.
    fn heal(&mut self) -> Outcome {
        for _ in 0..HEALED_STEPS_MAX {
            let busy = |c: &Cloud| !c.memory.jobs.is_empty() || !c.memory.waiting.is_empty();
            if !self.network.is_empty() || self.clouds.iter().any(busy) {
                self.progress();
            } else if self.clouds.iter().any(|c| c.memory.incoming.values().any(|r| r.machine.leased())) {
                // A lease ends only when nobody has asked for as long as it lasts.
                (0..CLOUDS).for_each(|n| self.expire(n));
            } else {
                return self.settle();
            }
            self.settle()?;
        }
        let phases: Vec<_> = self
            .clouds
            .iter()
            .flat_map(|c| c.memory.outgoing.values().map(|r| (c.me, r.machine.phase())))
            .collect();
        Err(format!("does not come to rest; sources in {phases:?}"))
    }

    fn at_rest(&self) -> Outcome {
        let Some(owner) = self.clouds.iter().find(|c| c.owns()) else {
            return Err("nobody owns the VM".into());
        };
        for c in &self.clouds {
            if !c.memory.outgoing.is_empty() {
                return Err(format!("cloud {} still moves it", c.me));
            }
            if c.memory.incoming.values().any(|r| unfinished(&r.machine)) {
                return Err(format!("cloud {} still holds a reservation", c.me));
            }
            let named = |dir: &String| {
                let record = c.durable.record.as_ref();
                record.is_some_and(|r| r.disks == *dir || r.kept.iter().any(|copy| copy.disks == *dir))
            };
            if let Some(dir) = c.durable.dirs.keys().find(|dir| !named(dir)) {
                return Err(format!("cloud {} keeps {dir}, which nothing names", c.me));
            }
            if c.memory.hold.is_some() {
                return Err(format!("cloud {} still holds the VM: {:?}", c.me, c.memory.hold));
            }
            let arrival = c.durable.record.as_ref().and_then(|r| r.arrival.as_ref());
            if arrival.is_some_and(|a| a.contested.is_some()) {
                return Err(format!("cloud {} holds the VM for contested", c.me));
            }
        }
        let content = owner.durable.record.as_ref().and_then(|r| owner.durable.dirs.get(&r.disks));
        if content != Some(&owner.newest) {
            return Err(format!("the owner's disks hold {content:?}, not {}", owner.newest));
        }
        if let Some(c) = self.clouds.iter().find(|c| c.durable.paused) {
            return Err(format!("the guest is left paused in cloud {}", c.me));
        }
        let excused = !self.ran || self.clouds.iter().any(|c| c.start_failed);
        if !excused && !owner.durable.running {
            return Err(format!("the VM ran and does not run in cloud {}, its owner", owner.me));
        }
        Ok(())
    }

    /// Everything ever said is said again, to clouds that restarted and forgot the nonces.
    fn replay(&mut self) -> Outcome {
        let owner = |w: &Self| w.clouds.iter().find(|c| c.owns()).map(|c| (c.me, c.durable.record.clone()));
        let before = owner(self);
        self.clouds.iter_mut().for_each(|c| c.crash(&mut self.random));
        self.network = self.log.iter().take(REPLAYED_MAX).cloned().collect();
        self.tally.replayed += self.network.len() as u64;
        self.heal()?;
        self.at_rest()?;
        let epoch = |o: &Option<(usize, Option<VmRecord>)>| {
            o.as_ref().map(|(n, r)| (*n, r.as_ref().map(|r| r.epoch)))
        };
        match epoch(&owner(self)) == epoch(&before) {
            true => Ok(()),
            false => {
                Err(format!("old messages moved the VM: {:?} to {:?}", epoch(&before), epoch(&owner(self))))
            }
        }
    }
}
