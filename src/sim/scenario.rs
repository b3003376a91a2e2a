//! A scenario: which clouds, which VMs, how often they move, what fails. And its run, with what came of it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::broker::CallId;
use crate::interface::{MigrationView, MoveRequest, Reply, Request};
use crate::migration::records::VmRecord;
use crate::types::{ByteSize, MigrationId, VmId};
use crate::vm::VmSpec;

use super::cloud::{Cloud, Shape};
use super::counts::{Counts, Subject, Tally};
use super::helper::Helper;
use super::model::{Catalogue, Component};
use super::settled::{Broken, settled, sound};
use super::speed::Speed;
use super::trace::Trace;
use super::world::{Links, Random, World};

/// Clouds of one room; what comes then is written in `SIMULATION.md`.
const CLOUDS_MAX: u32 = 1000;
const VMS_MAX: u32 = 100_000;
const HOURS_MAX: f64 = 24.0 * 366.0;
const ROOT_BYTES: u64 = 4 << 30;

/// As a file says.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    pub seed: u64,
    pub clouds: u32,
    pub vms: u32,
    pub hours: f64,
    /// On average over the day.
    pub moves_per_hour: f64,
    /// How much more there is to do at the busiest hour than on average; 0 to 1.
    #[serde(default)]
    pub day_and_night: f64,
    /// Programs of one VM.
    #[serde(default = "one")]
    pub programs_per_vm: u32,
    /// How unevenly programs are liked: the k-th most liked with a weight of 1/k to this.
    #[serde(default)]
    pub zipf: f64,
    /// What a VM has of its own.
    pub own: ByteSize,
    /// What VMs of one cloud may take together; each takes one processor and a gibibyte of memory.
    #[serde(default = "many")]
    pub cpus: u32,
    #[serde(default = "much")]
    pub memory: ByteSize,
    /// Whether targets are chosen by asking members, as 'cicada move' without --to does.
    #[serde(default)]
    pub choose_targets: bool,
    #[serde(default)]
    pub link: Link,
    #[serde(default)]
    pub faults: Faults,
}

fn one() -> u32 {
    1
}

/// More than all VMs of a scenario take.
fn many() -> u32 {
    VMS_MAX
}

fn much() -> ByteSize {
    ByteSize(1 << 44)
}

#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Link {
    pub latency_ms: u64,
    pub bytes_per_s: u64,
    /// Of a message, each way; 0 to 1.
    pub loss: f64,
    pub presence_pause_s: u64,
}

impl Default for Link {
    fn default() -> Self {
        Self { latency_ms: 20, bytes_per_s: 12_500_000, loss: 0.0, presence_pause_s: 60 }
    }
}

#[derive(Clone, PartialEq, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Faults {
    /// Of brokers, all clouds together.
    pub crashes_per_hour: f64,
    pub down_s: u64,
}

/// Why there is nothing to simulate.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    #[error("{0}")]
    Syntax(String),
    #[error("{}{field}: {reason}", line.map(|line| format!("line {line}: ")).unwrap_or_default())]
    Field { line: Option<usize>, field: &'static str, reason: String },
    #[error("line {line} of the packages: {reason}")]
    Packages { line: usize, reason: &'static str },
    #[error(
        "seed {seed}, after {after_s} simulated seconds and {moves} moves: {what}{}",
        history.iter().map(|line| format!("\n  {line}")).collect::<String>()
    )]
    Violated {
        seed: u64,
        after_s: u64,
        moves: u64,
        what: String,
        /// What the brokers concerned were told last.
        history: Vec<String>,
    },
    #[error("was stopped")]
    Stopped,
}

/// What a run came to, every so many moves.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
pub struct Row {
    /// Moves done by then.
    pub moves: u64,
    pub simulated_hours: f64,
    /// Of the moves since the row before: bytes of components, and of what was the VM's own.
    pub component_bytes_per_move: u64,
    pub own_bytes_per_move: u64,
    /// What copying the whole disk, compressed, would have sent.
    pub monolithic_bytes_per_move: u64,
    /// What a tool would have sent that keeps each block of 4 KiB once; the VM's own data as above.
    pub block_bytes_per_move: u64,
    /// Of the bytes of components that were needed, the share that was there already.
    pub hit_rate: f64,
    pub seconds_per_move: f64,
    pub messages_per_move: f64,
    pub message_bytes_per_move: u64,
    /// What the room delivered meanwhile, to all members together.
    pub presences_per_move: f64,
    pub presence_bytes_per_move: u64,
    /// Of all clouds together.
    pub repository_bytes: u64,
}

/// What went through the network while the room filled.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct Filling {
    #[serde(flatten)]
    pub messages: Tally,
    pub presences_delivered: u64,
    #[serde(rename = "presence_delivered_bytes")]
    pub presence_bytes_delivered: u64,
}

/// How a run ended.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
pub struct Outcome {
    pub seed: u64,
    pub clouds: u32,
    pub vms: u32,
    pub moves: u64,
    pub moves_not_done: u64,
    pub simulated_hours: f64,
    /// Of the bytes of components that moves needed, the share that was there already.
    pub hit_rate: f64,
    /// Of all moves: as in the rows.
    pub bytes_per_move: u64,
    pub monolithic_bytes_per_move: u64,
    pub block_bytes_per_move: u64,
    pub seconds_per_move: f64,
    pub messages_per_move: f64,
    /// What it took until all clouds had seen and asked each other, before anything moved.
    pub filling: Filling,
    /// Requests and answers, by what they are about.
    pub messages: BTreeMap<Subject, Tally>,
    /// Of clouds to the room, and of the room to each of its members.
    pub presences: u64,
    pub presences_delivered: u64,
    #[serde(rename = "presence_delivered_bytes")]
    pub presence_bytes_delivered: u64,
    /// Requests that were put off because too much was asked of one cloud at once.
    pub put_off: u64,
    pub steps: u64,
    pub crashes: u64,
    pub rows: Vec<Row>,
}

/// How far a run is.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Reached {
    pub simulated_s: u64,
    pub simulated_total_s: u64,
    /// Moves done.
    pub moves: u64,
}

impl Scenario {
    /// # Errors
    /// What is wrong with it, and where.
    pub fn parse(text: &str) -> Result<Self, ScenarioError> {
        let scenario: Self =
            toml::from_str(text).map_err(|e| ScenarioError::Syntax(e.to_string().trim().to_owned()))?;
        scenario.check().map_err(|e| match e {
            ScenarioError::Field { field, reason, .. } => {
                ScenarioError::Field { line: line_of(text, field), field, reason }
            }
            e => e,
        })?;
        Ok(scenario)
    }

    fn check(&self) -> Result<(), ScenarioError> {
        let no = |field, reason: String| Err(ScenarioError::Field { line: None, field, reason });
        if !(2..=CLOUDS_MAX).contains(&self.clouds) {
            return no("clouds", format!("{}: 2 to {CLOUDS_MAX} are possible", self.clouds));
        }
        if !(1..=VMS_MAX).contains(&self.vms) {
            return no("vms", format!("{}: 1 to {VMS_MAX} are possible", self.vms));
        }
        for (field, value, most) in [
            ("hours", self.hours, HOURS_MAX),
            ("moves_per_hour", self.moves_per_hour, 1e6),
            ("day_and_night", self.day_and_night, 1.0),
            ("zipf", self.zipf, 10.0),
            ("link.loss", self.link.loss, 0.9),
            ("faults.crashes_per_hour", self.faults.crashes_per_hour, 1e5),
        ] {
            if !value.is_finite() || value < 0.0 || value > most {
                return no(field, format!("{value}: 0 to {most} is possible"));
            }
        }
        for (field, value) in [("hours", self.hours), ("moves_per_hour", self.moves_per_hour)] {
            if value == 0.0 {
                return no(field, "nothing would move: it must be more than 0".into());
            }
        }
        let fit = u64::from(self.cpus).min(self.memory.0 >> 30);
        if fit.saturating_mul(u64::from(self.clouds)) < u64::from(self.vms) + u64::from(self.clouds) {
            let field = if u64::from(self.cpus) <= self.memory.0 >> 30 { "cpus" } else { "memory" };
            return no(field, format!("{fit} VMs fit into a cloud: {} and room to move do not", self.vms));
        }
        if self.link.bytes_per_s == 0 {
            return no("link.bytes_per_s", "nothing would ever arrive".into());
        }
        if self.faults.crashes_per_hour > 0.0 && self.faults.down_s == 0 {
            return no("faults.down_s", "brokers that crash must be down for a second at least".into());
        }
        Ok(())
    }

    /// Runs it. `packages` says what components consist of (`fixtures/sim/packages.tsv`); `progress` is told how
    /// far the run is, and says whether to go on.
    ///
    /// # Errors
    /// A rule that was broken, with the seed and when.
    pub fn run(
        &self,
        packages: &str,
        progress: impl FnMut(Reached) -> bool,
    ) -> Result<(Outcome, Speed), ScenarioError> {
        self.run_prepared(packages, progress, |_| Ok(()))
    }

    /// A rule that was broken is shown with what the clouds concerned were told before: the same run once more.
    fn run_prepared(
        &self,
        packages: &str,
        mut progress: impl FnMut(Reached) -> bool,
        prepare: impl Fn(&mut World) -> Result<(), String>,
    ) -> Result<(Outcome, Speed), ScenarioError> {
        let mut world = None;
        let found = match self.attempt(packages, &mut progress, &prepare, &mut world, None) {
            Err(Ended::Broken(found)) => found,
            Err(Ended::Other(e)) => return Err(e),
            Ok(ran) => return Ok(ran),
        };
        let trace = Trace::of(found.broken.clouds.iter().copied());
        let again = self.attempt(packages, &mut |_| true, &prepare, &mut world, Some(trace));
        let history = match again {
            Err(Ended::Broken(again)) if again == found => {
                let trace = world.and_then(|world| world.trace).unwrap_or_default();
                trace.lines().map(str::to_owned).collect()
            }
            _ => vec!["the same seed made another run: that is a fault of the simulation".into()],
        };
        let Found { after_s, moves, broken } = found;
        Err(ScenarioError::Violated { seed: self.seed, after_s, moves, what: broken.what, history })
    }

    fn attempt(
        &self,
        packages: &str,
        progress: &mut dyn FnMut(Reached) -> bool,
        prepare: &dyn Fn(&mut World) -> Result<(), String>,
        ran: &mut Option<World>,
        trace: Option<Trace>,
    ) -> Result<(Outcome, Speed), Ended> {
        let mut speed = Speed::begin();
        let catalogue = Catalogue::new(components(packages)?);
        let programs: Vec<usize> = (0..catalogue.components.len())
            .filter(|at| !matches!(catalogue.components[*at].name.as_str(), "os" | "kernel"))
            .collect();
        let base: Vec<usize> = (0..catalogue.components.len()).filter(|at| !programs.contains(at)).collect();
        if programs.is_empty() || base.len() < 2 {
            let reason = "os, kernel and a program are needed";
            return Err(ScenarioError::Packages { line: 1, reason }.into());
        }
        let mut random = Random(self.seed ^ 0x5eed);
        let (mut catalogue, mut kinds) = (catalogue, BTreeMap::new());
        let vms: Vec<usize> = (0..self.vms)
            .map(|_| {
                let mut parts: BTreeSet<usize> = BTreeSet::new();
                for _ in 0..self.programs_per_vm.min(programs.len() as u32) {
                    parts.insert(programs[zipf(&mut random, programs.len(), self.zipf)]);
                }
                let parts: Vec<usize> = base.iter().copied().chain(parts).collect();
                *kinds.entry(parts.clone()).or_insert_with(|| catalogue.add_recipe(parts, ROOT_BYTES))
            })
            .collect();
        let shape = Shape { cpus: self.cpus, memory: self.memory, settings: SETTINGS.into() };
        let clouds = (0..self.clouds).map(|n| Cloud::new(&format!("c{n}"), shape.clone())).collect();
        let links = Links {
            latency_ms: self.link.latency_ms,
            bytes_per_s: self.link.bytes_per_s,
            loss: self.link.loss,
            presence_pause_ms: self.link.presence_pause_s * 1000,
        };
        let placed = |world: &mut World| {
            (world.trace, world.step_ns, world.helper) = (trace, Some(Vec::new()), Helper::begin());
            for (n, kind) in vms.iter().enumerate() {
                let record = record(n, *kind, &world.catalogue);
                world.place(n % self.clouds as usize, record, self.own.0)?;
            }
            prepare(world)
        };
        // A room that all enter at once is a storm of its own; this one fills in a minute.
        let pause = Duration::from_millis(JOINED_WITHIN_MS / u64::from(self.clouds));
        let world = ran.insert(
            World::joining(self.seed, clouds, catalogue, links, pause, placed)
                .map_err(|reason| ScenarioError::Field { line: None, field: "clouds", reason })?,
        );
        let begun = world.now;
        let mut run = Run::new(self, world);
        // Everybody sees everybody first.
        run.advance_told(world, FILLED_WITHIN, progress)?;
        speed.rests(world.clouds.len());
        run.counted = world.counts.clone();
        run.outcome.filling = Filling {
            messages: world.counts.all(),
            presences_delivered: world.counts.presences_delivered,
            presence_bytes_delivered: world.counts.presence_bytes_delivered,
        };
        let end = begun.plus(self.lasts());
        while world.now < end {
            let hour = world.now.since(begun).as_secs_f64() / 3600.0;
            let busy = 1.0 + self.day_and_night * (std::f64::consts::TAU * (hour / 24.0 - 0.25)).sin();
            let rate = self.moves_per_hour * busy + self.faults.crashes_per_hour;
            let pause = -(1.0 - world.random.fraction()).ln() / rate.max(1e-9) * 3600.0;
            run.advance_told(world, Duration::from_secs_f64(pause.min(3600.0)), progress)?;
            if pause >= 3600.0 {
                continue;
            }
            let crash = self.faults.crashes_per_hour / rate;
            if world.random.chance(crash) {
                let at = world.random.below(world.clouds.len());
                world.crash(at, Duration::from_secs(self.faults.down_s));
            } else {
                run.begin_move(world);
            }
        }
        // What is under way ends.
        run.advance_told(world, SETTLED_WITHIN, progress)?;
        run.settle(world)?;
        speed.end(world);
        Ok((run.end(world), speed))
    }

    fn lasts(&self) -> Duration {
        Duration::from_secs_f64(self.hours * 3600.0)
    }
}

/// Where a field stands in the text, if it stands there.
fn line_of(text: &str, field: &str) -> Option<usize> {
    let document = toml::de::DeTable::parse(text).ok()?;
    let mut table = document.get_ref();
    let mut names = field.split('.').peekable();
    loop {
        let name = names.next()?;
        let (key, value) = table.iter().find(|(key, _)| key.get_ref().as_ref() == name)?;
        if names.peek().is_none() {
            return Some(1 + text.get(..key.span().start)?.matches('\n').count());
        }
        table = value.get_ref().as_table()?;
    }
}

/// A broken rule, and when it was found.
#[derive(PartialEq)]
struct Found {
    after_s: u64,
    moves: u64,
    broken: Broken,
}

/// Why a run did not come to its end.
enum Ended {
    Broken(Found),
    Other(ScenarioError),
}

impl From<ScenarioError> for Ended {
    fn from(e: ScenarioError) -> Self {
        Ended::Other(e)
    }
}

/// All brokers have begun within this time.
const JOINED_WITHIN_MS: u64 = 60_000;
/// Everybody has seen and asked everybody within this time.
const FILLED_WITHIN: Duration = Duration::from_secs(120);
/// Every move has ended so long after the last began.
const SETTLED_WITHIN: Duration = Duration::from_secs(3600);
/// Whoever waits is told how far a run is after so much of it.
const TOLD_EVERY: Duration = Duration::from_secs(5);

/// Leases and patience as they ship; no bounds that a federation of one room would not have.
const SETTINGS: &str = "cpu_overcommit = 1.0\n[migration]\nconcurrency = 1000\nrequests_per_minute = 600000\n[[member]]\njid = \"nobody@sim.example\"\n";

fn components(packages: &str) -> Result<Vec<Component>, ScenarioError> {
    let mut all: Vec<(String, Vec<(String, u64)>)> = Vec::new();
    for (line, text) in (1..).zip(packages.lines()) {
        let bad = |reason| ScenarioError::Packages { line, reason };
        let mut fields = text.split('\t');
        let (Some(component), Some(pack), Some(bytes), None) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            return Err(bad("three fields are expected, apart by tabs"));
        };
        let bytes: u64 = bytes.parse().map_err(|_| bad("the third field is no number of bytes"))?;
        match all.iter_mut().find(|(name, _)| name == component) {
            Some((_, packs)) => packs.push((pack.to_owned(), bytes)),
            None => all.push((component.to_owned(), vec![(pack.to_owned(), bytes)])),
        }
    }
    Ok(all.iter().map(|(name, packs)| Component::new(name, packs)).collect())
}

/// A place among `n`, the k-th with a weight of 1/k to the `power`.
fn zipf(random: &mut Random, n: usize, power: f64) -> usize {
    let weight = |k: usize| ((k + 1) as f64).powf(-power);
    let mut left = random.fraction() * (0..n).map(weight).sum::<f64>();
    for k in 0..n {
        left -= weight(k);
        if left <= 0.0 {
            return k;
        }
    }
    n - 1
}

fn id_of(n: usize) -> VmId {
    VmId(uuid::Uuid::from_u128(n as u128 + 1))
}

fn record(n: usize, kind: usize, catalogue: &Catalogue) -> VmRecord {
    let id = id_of(n);
    let name = format!("vm{n}").parse().unwrap_or_else(|_| crate::types::VmName::unknown(id));
    let spec = VmSpec { memory: ByteSize(1 << 30), ..catalogue.recipes[kind].vm(id, name) };
    VmRecord { run: true, ..VmRecord::new(spec, Vec::new(), "disks-1", crate::clock::UnixMillis(1)) }
}

/// Bytes of all moves.
#[derive(Default)]
struct All {
    needed: u64,
    components: u64,
    own: u64,
    monolithic: u64,
    blocks: u64,
}

/// A run under way: the moves asked for, and what came of those that ended.
struct Run<'a> {
    scenario: &'a Scenario,
    begun: crate::clock::UnixMillis,
    /// In which cloud, in which life of its broker, and under which call.
    open: Vec<(usize, u32, CallId)>,
    /// Where each VM was seen last.
    owners: Vec<usize>,
    row_moves: u64,
    since: Row,
    needed_bytes: u64,
    /// Of all moves.
    all: All,
    all_seconds: f64,
    /// What had been counted at the row before.
    counted: Counts,
    seconds: f64,
    outcome: Outcome,
}

impl<'a> Run<'a> {
    fn new(scenario: &'a Scenario, world: &World) -> Self {
        let expected = scenario.hours * scenario.moves_per_hour;
        Self {
            scenario,
            begun: world.now,
            open: Vec::new(),
            owners: (0..scenario.vms as usize).map(|n| n % scenario.clouds as usize).collect(),
            row_moves: ((expected / 40.0) as u64).max(1),
            since: Row::default(),
            needed_bytes: 0,
            all: All::default(),
            all_seconds: 0.0,
            counted: Counts::default(),
            seconds: 0.0,
            outcome: Outcome {
                seed: scenario.seed,
                clouds: scenario.clouds,
                vms: scenario.vms,
                ..Outcome::default()
            },
        }
    }

    fn advance(&mut self, world: &mut World, by: Duration) -> Result<(), Ended> {
        let until = world.now.plus(by);
        let mut broken = None;
        let result =
            world.run_until(until, |world, at| sound(world, at).map_err(|e| broken.insert(e).what.clone()));
        match broken.filter(|_| result.is_err()) {
            Some(broken) => Err(self.broken(world, broken)),
            None => {
                self.collect(world);
                Ok(())
            }
        }
    }

    /// In steps short enough to tell how far it is.
    fn advance_told(
        &mut self,
        world: &mut World,
        by: Duration,
        progress: &mut dyn FnMut(Reached) -> bool,
    ) -> Result<(), Ended> {
        let until = world.now.plus(by);
        loop {
            let left = until.since(world.now);
            self.advance(world, left.min(TOLD_EVERY))?;
            let all = self.scenario.lasts().max(FILLED_WITHIN) + SETTLED_WITHIN;
            let reached = Reached {
                simulated_s: world.now.since(self.begun).min(all).as_secs(),
                simulated_total_s: all.as_secs(),
                moves: self.outcome.moves,
            };
            if !progress(reached) {
                return Err(ScenarioError::Stopped.into());
            }
            if left <= TOLD_EVERY {
                return Ok(());
            }
        }
    }

    fn broken(&self, world: &World, broken: Broken) -> Ended {
        let after_s = world.now.since(self.begun).as_secs();
        Ended::Broken(Found { after_s, moves: self.outcome.moves, broken })
    }

    /// Everything had time to end.
    fn settle(&mut self, world: &mut World) -> Result<(), Ended> {
        let vms: Vec<VmId> = (0..self.owners.len()).map(id_of).collect();
        settled(world, &vms).map_err(|broken| self.broken(world, broken))?;
        match self.open.first() {
            None => Ok(()),
            Some((at, _, call)) => {
                let what = format!("{} never told how a move ended (call {})", world.clouds[*at].jid, call.0);
                Err(self.broken(world, Broken { clouds: vec![*at], what }))
            }
        }
    }

    fn begin_move(&mut self, world: &mut World) {
        let n = world.random.below(self.owners.len());
        let at = self.owner_of(world, n);
        let other = (at + 1 + world.random.below(world.clouds.len() - 1)) % world.clouds.len();
        let to = (!self.scenario.choose_targets).then(|| world.clouds[other].name().to_owned());
        let request = Request::Move(MoveRequest::Begin {
            vm: id_of(n).to_string(),
            to,
            dry_run: false,
            force_stop: true,
        });
        match world.call(at, request) {
            Some(call) => self.open.push((at, world.clouds[at].life, call)),
            None => self.outcome.moves_not_done += 1,
        }
    }

    fn owner_of(&mut self, world: &World, n: usize) -> usize {
        let here = |at: usize| world.clouds[at].book.is_here(id_of(n)) == Some(true);
        if !here(self.owners[n])
            && let Some(at) = (0..world.clouds.len()).find(|at| here(*at))
        {
            self.owners[n] = at;
        }
        self.owners[n]
    }

    /// Takes in the moves that have ended.
    fn collect(&mut self, world: &mut World) {
        let mut open = std::mem::take(&mut self.open);
        open.retain(|(at, life, call)| match world.cloud(*at).replies.remove(call) {
            None => {
                world.clouds[*at].life == *life || {
                    // Its broker died; the move goes on or not without anybody who waits for it.
                    self.outcome.moves_not_done += 1;
                    false
                }
            }
            Some(Ok(Reply::Migration(view))) => {
                self.moved(world, &view);
                false
            }
            Some(_) => {
                self.outcome.moves_not_done += 1;
                false
            }
        });
        self.open = open;
    }

    fn moved(&mut self, world: &World, view: &MigrationView) {
        let p = &view.progress;
        let id: MigrationId = p.id;
        let carried = world.carried.get(&id).copied().unwrap_or_default();
        let to = world.by_jid.get(&p.peer).copied();
        let recipe = to.and_then(|to| world.clouds[to].book.look_at(p.vm_id, |record| record.spec.recipe));
        let needed: u64 = recipe
            .and_then(|recipe| world.catalogue.made(&recipe))
            .map_or(0, |made| made.packs.iter().map(|(_, bytes)| bytes).sum());
        if let (Some(to), Some(owner)) = (to, self.owners.get_mut(p.vm_id.0.as_u128() as usize - 1)) {
            *owner = to;
        }
        self.since.component_bytes_per_move += carried.component_bytes;
        self.since.own_bytes_per_move += carried.own_bytes;
        self.since.monolithic_bytes_per_move += needed + self.scenario.own.0;
        self.since.block_bytes_per_move += carried.block_bytes + carried.own_bytes;
        self.since.moves += 1;
        self.needed_bytes += needed;
        let seconds = p.updated.since(p.started).as_secs_f64();
        (self.seconds, self.all_seconds) = (self.seconds + seconds, self.all_seconds + seconds);
        self.outcome.moves += 1;
        if self.since.moves >= self.row_moves {
            self.end_row(world);
        }
    }

    fn end_row(&mut self, world: &World) {
        let mut row = std::mem::take(&mut self.since);
        let n = row.moves.max(1);
        let sent = row.component_bytes_per_move;
        self.all.needed += self.needed_bytes;
        self.all.components += sent;
        self.all.own += row.own_bytes_per_move;
        self.all.monolithic += row.monolithic_bytes_per_move;
        self.all.blocks += row.block_bytes_per_move;
        row.hit_rate = 1.0 - sent as f64 / self.needed_bytes.max(1) as f64;
        row.component_bytes_per_move = sent / n;
        row.own_bytes_per_move /= n;
        row.monolithic_bytes_per_move /= n;
        row.block_bytes_per_move /= n;
        row.seconds_per_move = self.seconds / n as f64;
        let (now, before) = (&world.counts, &self.counted);
        let (messages, earlier) = (now.all(), before.all());
        row.messages_per_move = (messages.messages - earlier.messages) as f64 / n as f64;
        row.message_bytes_per_move = (messages.bytes - earlier.bytes) / n;
        row.presences_per_move = (now.presences_delivered - before.presences_delivered) as f64 / n as f64;
        row.presence_bytes_per_move = (now.presence_bytes_delivered - before.presence_bytes_delivered) / n;
        row.moves = self.outcome.moves;
        row.simulated_hours = world.now.since(self.begun).as_secs_f64() / 3600.0;
        row.repository_bytes = world.clouds.iter().map(|c| c.stored_bytes).sum();
        (self.needed_bytes, self.seconds, self.counted) = (0, 0.0, world.counts.clone());
        self.outcome.rows.push(row);
    }

    fn end(mut self, world: &World) -> Outcome {
        if self.since.moves > 0 {
            self.end_row(world);
        }
        let (all, counts, moves) = (&self.all, &world.counts, self.outcome.moves.max(1));
        let while_moving = counts.all().messages - self.outcome.filling.messages.messages;
        Outcome {
            simulated_hours: world.now.since(self.begun).as_secs_f64() / 3600.0,
            hit_rate: 1.0 - all.components as f64 / all.needed.max(1) as f64,
            bytes_per_move: (all.components + all.own) / moves,
            monolithic_bytes_per_move: all.monolithic / moves,
            block_bytes_per_move: all.blocks / moves,
            seconds_per_move: self.all_seconds / moves as f64,
            messages_per_move: while_moving as f64 / moves as f64,
            messages: counts.messages.clone(),
            presences: counts.presences,
            presences_delivered: counts.presences_delivered,
            presence_bytes_delivered: counts.presence_bytes_delivered,
            put_off: counts.put_off,
            steps: counts.steps,
            crashes: counts.crashes,
            ..self.outcome
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKAGES: &str = "os\tlibc_1\t1000\nos\tbash_1\t500\nkernel\tlinux_6\t3000\nweb\tnginx_1\t200\n\
                            db\tpg_1\t900\ndb\tlibc_1\t1000";

    fn text(more: &str) -> String {
        format!(
            "seed = 1\nclouds = 3\nvms = 6\nhours = 2\nmoves_per_hour = 30\nown = \"1M\"\nzipf = 1.0\n{more}"
        )
    }

    #[test]
    fn a_repository_learns_and_a_seed_makes_a_run() {
        let scenario = Scenario::parse(&text("")).unwrap();
        let run = |scenario: &Scenario| scenario.run(PACKAGES, |_| true).unwrap().0;
        let outcome = run(&scenario);
        assert!(outcome.moves > 30, "{outcome:?}");
        let (first, last) = (&outcome.rows[0], &outcome.rows[outcome.rows.len() - 1]);
        assert_eq!(last.component_bytes_per_move, 0, "all is everywhere by then: {outcome:?}");
        assert!(first.hit_rate <= last.hit_rate && last.hit_rate == 1.0);
        assert_eq!(run(&scenario), outcome);
        let crashing = text("[faults]\ncrashes_per_hour = 30\ndown_s = 5\n[link]\nloss = 0.05\n");
        let outcome = run(&Scenario::parse(&crashing).unwrap());
        assert!(outcome.crashes > 10 && outcome.moves > 0, "{outcome:?}");
        assert!(matches!(scenario.run(PACKAGES, |_| false), Err(ScenarioError::Stopped)));
    }

    #[test]
    fn what_contradicts_itself_is_named() {
        for (more, words) in [
            ("colour = 1", "colour"),
            ("day_and_night = 2", "line 8: day_and_night"),
            ("[link]\nbytes_per_s = 0", "line 9: link.bytes_per_s: nothing would ever arrive"),
            ("[link]\nloss = 0.1\nto = \"nowhere\"", "line 10"),
            ("[faults]\ncrashes_per_hour = 1", "down_s"),
            ("cpus = 2", "line 8: cpus: 2 VMs fit into a cloud"),
            ("memory = \"1G\"", "line 8: memory"),
            ("zipf = \"x\"", "duplicate key"),
        ] {
            let e = Scenario::parse(&text(more)).unwrap_err().to_string();
            assert!(e.contains(words), "{e}");
        }
        let one = text("").replace("clouds = 3", "clouds = 1");
        assert!(Scenario::parse(&one).unwrap_err().to_string().contains("2 to 1000"));
        let scenario = Scenario::parse(&text("")).unwrap();
        for (packages, words) in [("os\tx", "line 1"), ("os\tx\ty", "number"), ("os\tx\t1", "a program")] {
            let e = scenario.run(packages, |_| true).unwrap_err().to_string();
            assert!(e.contains(words), "{e}");
        }
    }

    #[test]
    fn scenarios_that_ship_are_ones() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/sim");
        let mut clouds = Vec::new();
        for path in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            if path.extension().is_some_and(|e| e == "toml") {
                let text = std::fs::read_to_string(&path).unwrap();
                let scenario = Scenario::parse(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                clouds.push(scenario.clouds);
            }
        }
        assert!([2, 10, 100, 1000].iter().all(|n| clouds.contains(n)), "{clouds:?}");
    }

    #[test]
    fn a_broken_rule_is_shown_with_seed_and_history() {
        let scenario = Scenario::parse(&text("")).unwrap();
        // A VM that two clouds believe to be theirs.
        let twice = |world: &mut World| {
            let record = world.clouds[0].book.vm(id_of(0)).ok_or("it was placed")?;
            world.place(1, record, 1000)
        };
        let e = scenario.run_prepared(PACKAGES, |_| true, twice).unwrap_err();
        let ScenarioError::Violated { seed: 1, what, history, .. } = &e else { panic!("{e}") };
        assert!(what.contains("runs in more than one cloud"), "{e}");
        assert!(history.iter().any(|line| line.contains("c0: Machines")), "{e}");
    }

    /// What a run leaves behind, put there by hand, each found when everything had time to end.
    #[test]
    fn what_is_left_over_is_found() {
        let scenario = Scenario::parse(&text("")).unwrap();
        let mut world = None;
        scenario.attempt(PACKAGES, &mut |_| true, &|_| Ok(()), &mut world, None).ok().unwrap();
        let world = world.unwrap();
        let vms: Vec<VmId> = (0..6).map(id_of).collect();
        assert_eq!(settled(&mut world.clone(), &vms), Ok(()));
        let id = MigrationId(uuid::Uuid::from_u128(7));
        let found = |spoil: &dyn Fn(&mut World)| {
            let mut world = world.clone();
            spoil(&mut world);
            settled(&mut world, &vms).unwrap_err().what
        };
        let owner = (0..3).find(|at| world.clouds[*at].book.is_here(vms[0]) == Some(true)).unwrap();
        for (words, what) in [
            ("staged", found(&|w| w.cloud(1).staged.extend([id]))),
            ("ticket", found(&|w| w.cloud(1).serving.extend([(id, crate::types::Hash::of(b"ticket"))]))),
            ("is lost", found(&|w| w.cloud(owner).book.remove_vm(vms[0]))),
            ("should run", found(&|w| w.set_power(owner, vms[0], Some(crate::vm::PowerState::Stopped)))),
            ("is down", found(&|w| w.crash(2, Duration::from_secs(5)))),
        ] {
            assert!(what.contains(words), "{words}: {what}");
        }
    }
}
