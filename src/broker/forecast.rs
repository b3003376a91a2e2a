//! How long a move will take, by what moves to that member took. Pure.
//!
//! A move looks at disks, is set up, bytes flow, a base is composed, a guest that runs is shut down and started:
//! each is learned apart from the others, rates from the time in which they held and weighted by bytes. What the
//! model did not foresee is learned as well: by how much earlier moves missed what was foretold of them, and
//! that becomes the interval. Every move that was foretold is scored.

use std::collections::{BTreeMap, VecDeque};

use crate::interface::{MigrationPhase, MigrationRole, MigrationView, MoveWork, Score};
use crate::types::{MemberJid, VmId};

/// What weight earlier moves keep beside a new one.
const KEPT: f64 = 0.8;
/// Less than this says more of latency than of the link, of composing or of looking.
const BYTES_MIN: u64 = 256 << 10;
/// Moves whose misses are remembered, of each member: the next one lies between the smallest and the largest of
/// so many in 9 of 10 cases, whatever they are like.
const MISSES: usize = 19;
/// Fewer say nothing of the spread.
const MISSES_MIN: usize = 3;
/// Moves whose score is remembered, of each member.
const SCORES: usize = 50;
/// The interval that is assumed until as many are known.
const SPREAD_AT_FIRST: (f64, f64) = (0.5, 2.5);
/// By how much few misses are widened, together: the fewer, the more.
const WIDENED_BY: f64 = 2.0;
/// What no model foresees, such as the tick by which brokers look, and the share of a move that varies: a miss is
/// counted in these, so that those of short and of long moves say something of each other.
const VARIES_S: f64 = 0.25;
const VARIES_SHARE: f64 = 0.1;
/// What is left of the interval where all earlier moves took the same.
const VARIES_LEAST: f64 = 0.1;
/// Shutdowns of a guest that say something of its next one, and those of whichever guests that say something of
/// one that was never seen to end.
const SHUTDOWNS: usize = 5;
const SHUTDOWNS_OF_ALL: usize = 20;
/// How much sooner, and how much later than it ever did, a guest may end.
const SHUTDOWN_VARIES: (f64, f64) = (0.6, 1.6);
const STRANGER_VARIES: (f64, f64) = (0.5, 2.0);
const SHUTDOWN_VARIES_S: f64 = 0.2;

/// What one move took, in seconds.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Took {
    pub total_s: f64,
    /// In which content was fetched, and how much it was.
    pub flowing_s: f64,
    pub bytes: u64,
    pub composing_s: f64,
    /// At the disks, before anything travelled.
    pub looking_s: f64,
    pub shutdown_s: Option<f64>,
    pub starting_s: f64,
}

/// From and to, in seconds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Interval {
    pub low_s: f64,
    pub high_s: f64,
}

/// Seconds by how much there was of something, the older the less.
#[derive(Clone, Copy, Default, Debug)]
struct Rate {
    seconds: f64,
    amount: f64,
}

impl Rate {
    fn learn(&mut self, amount: f64, seconds: f64) {
        self.seconds = self.seconds * KEPT + seconds.max(0.0);
        self.amount = self.amount * KEPT + amount;
    }

    /// `None` as long as nothing is known of it.
    fn seconds_of(&self, amount: f64) -> Option<f64> {
        match amount {
            0.0 => Some(0.0),
            _ if self.amount == 0.0 => None,
            _ => Some(self.seconds * amount / self.amount),
        }
    }
}

/// What moves to one member taught.
#[derive(Clone, Default, Debug)]
struct Course {
    flowing: Rate,
    composing: Rate,
    looking: Rate,
    starting: Rate,
    /// Of moves of VMs that are off, and of VMs that run.
    set_up: [Rate; 2],
    misses: VecDeque<f64>,
    /// Whether what was foretold of a move held, the newest last.
    scores: VecDeque<bool>,
}

impl Course {
    /// All but the shutdown of a guest.
    fn foretold_s(&self, work: &MoveWork) -> Option<f64> {
        let starting_s = if work.runs { self.starting.seconds_of(1.0)? } else { 0.0 };
        let set_up = &self.set_up[usize::from(work.runs)];
        // One that is off is set up sooner, but not by much.
        let set_up_s =
            set_up.seconds_of(1.0).or_else(|| self.set_up[usize::from(!work.runs)].seconds_of(1.0))?;
        let by_bytes =
            [(self.looking, work.disk_bytes), (self.composing, work.base_bytes), (self.flowing, work.bytes)];
        // What is too little to be learned from takes as good as no time.
        let by_bytes = by_bytes.into_iter().filter(|(_, bytes)| *bytes >= BYTES_MIN);
        let by_bytes: Option<Vec<f64>> =
            by_bytes.map(|(rate, bytes)| rate.seconds_of(bytes as f64)).collect();
        Some(set_up_s + starting_s + by_bytes?.into_iter().sum::<f64>())
    }

    fn interval(&self, foretold_s: f64) -> Interval {
        let found = self.misses.len();
        if found < MISSES_MIN {
            let (low, high) = SPREAD_AT_FIRST;
            return Interval { low_s: foretold_s * low, high_s: foretold_s * high + VARIES_S };
        }
        let low = self.misses.iter().copied().fold(f64::INFINITY, f64::min);
        let high = self.misses.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let margin = (high - low) * WIDENED_BY / found as f64 / 2.0 + VARIES_LEAST;
        let at = |miss: f64| (foretold_s + miss * varies_s(foretold_s)).max(0.0);
        Interval { low_s: at(low.min(0.0) - margin), high_s: at(high.max(0.0) + margin) }
    }
}

fn varies_s(foretold_s: f64) -> f64 {
    VARIES_S + VARIES_SHARE * foretold_s
}

fn push<T>(ring: &mut VecDeque<T>, value: T, max: usize) {
    ring.push_back(value);
    if ring.len() > max {
        ring.pop_front();
    }
}

/// From the shortest to the longest of some shutdowns, and as much beyond as guests vary.
fn around(shutdowns_s: &VecDeque<f64>, (low, high): (f64, f64)) -> Option<Interval> {
    let shortest_s = shutdowns_s.iter().copied().reduce(f64::min)?;
    let longest_s = shutdowns_s.iter().copied().reduce(f64::max)?;
    Some(Interval { low_s: shortest_s * low, high_s: longest_s * high + SHUTDOWN_VARIES_S })
}

/// What is known of moves to each member, and of each guest's shutdown, the newest last.
#[derive(Clone, Default, Debug)]
pub struct Forecasts {
    courses: BTreeMap<MemberJid, Course>,
    shutdowns_s: BTreeMap<VmId, VecDeque<f64>>,
    shutdowns_of_all_s: VecDeque<f64>,
}

impl Forecasts {
    /// Learns from moves as they are remembered, the oldest first.
    pub fn of<'a>(views: impl Iterator<Item = &'a MigrationView>) -> Self {
        let mut views: Vec<_> = views.filter(|v| v.progress.role == MigrationRole::Source).collect();
        views.sort_by_key(|view| view.progress.started);
        let mut forecasts = Self::default();
        views.into_iter().for_each(|view| forecasts.learn_from(view));
        forecasts
    }

    /// Learns from a move that was completed, and scores what was foretold of it.
    pub fn learn_from(&mut self, view: &MigrationView) {
        let (p, a) = (&view.progress, &view.account);
        let Some(foretold) = a.foretold.as_ref().filter(|_| p.phase == MigrationPhase::Completed) else {
            return;
        };
        let seconds = |ms: u64| ms as f64 / 1000.0;
        let phase_s = |name: &str| seconds(a.phase_ms.get(name).copied().unwrap_or(0));
        let total_s = p.updated.since(p.started).as_secs_f64();
        let took = Took {
            total_s,
            // The target's figures: they may be anything.
            flowing_s: seconds(a.fetch_ms).min(total_s),
            bytes: p.bytes_done,
            composing_s: phase_s("compose").min(total_s),
            looking_s: seconds(a.looking_ms),
            shutdown_s: a.shutdown_ms.map(seconds),
            starting_s: phase_s("start"),
        };
        if let Some(score) = foretold.score(took.total_s) {
            let course = self.courses.entry(p.peer.clone()).or_default();
            push(&mut course.scores, score == Score::Held, SCORES);
        }
        // A link that was down says nothing of what it is like.
        if !foretold.disturbed {
            self.learn(&p.peer, p.vm_id, &foretold.work, &took);
        }
    }

    fn learn(&mut self, member: &MemberJid, vm: VmId, work: &MoveWork, took: &Took) {
        if let Some(shutdown_s) = took.shutdown_s {
            push(self.shutdowns_s.entry(vm).or_default(), shutdown_s, SHUTDOWNS);
            push(&mut self.shutdowns_of_all_s, shutdown_s, SHUTDOWNS_OF_ALL);
        }
        let course = self.courses.entry(member.clone()).or_default();
        // By what was known before it. How long a guest takes is its own matter.
        if let Some(foretold_s) = course.foretold_s(work) {
            let missed_s = took.total_s - took.shutdown_s.unwrap_or(0.0) - foretold_s;
            push(&mut course.misses, missed_s / varies_s(foretold_s), MISSES);
        }
        if took.bytes >= BYTES_MIN && took.flowing_s > 0.0 {
            course.flowing.learn(took.bytes as f64, took.flowing_s);
        }
        if work.base_bytes >= BYTES_MIN {
            course.composing.learn(work.base_bytes as f64, took.composing_s);
        }
        if work.disk_bytes >= BYTES_MIN {
            course.looking.learn(work.disk_bytes as f64, took.looking_s);
        }
        let starting_s = if work.runs { took.starting_s } else { 0.0 };
        if work.runs {
            course.starting.learn(1.0, starting_s);
        }
        let composing_s = if work.base_bytes >= BYTES_MIN { took.composing_s } else { 0.0 };
        let looking_s = if work.disk_bytes >= BYTES_MIN { took.looking_s } else { 0.0 };
        let flowing_s = if took.bytes >= BYTES_MIN { took.flowing_s } else { 0.0 };
        let told_apart_s = flowing_s + composing_s + looking_s + starting_s;
        let set_up_s = took.total_s - took.shutdown_s.unwrap_or(0.0) - told_apart_s;
        course.set_up[usize::from(work.runs)].learn(1.0, set_up_s);
    }

    /// Whether a guest was seen to end.
    pub fn knows_shutdown_of(&self, vm: VmId) -> bool {
        self.shutdowns_s.contains_key(&vm)
    }

    /// How long a guest will take to end, if anything is known of guests.
    fn shutdown(&self, vm: VmId, work: &MoveWork) -> Option<Interval> {
        let most_s = work.patience_s;
        let found = match self.shutdowns_s.get(&vm) {
            _ if work.ignores => Some(Interval { low_s: most_s, high_s: most_s }),
            Some(shutdowns_s) => around(shutdowns_s, SHUTDOWN_VARIES),
            None => around(&self.shutdowns_of_all_s, STRANGER_VARIES),
        };
        found.map(|i| Interval { low_s: i.low_s.min(most_s), high_s: i.high_s.min(most_s) })
    }

    /// How long a move takes; nothing is known before the first of its kind to `member`. What a guest that runs
    /// writes meanwhile is not in it.
    pub fn foretell(&self, member: &MemberJid, vm: VmId, work: &MoveWork) -> Option<Interval> {
        let course = self.courses.get(member)?;
        let rest = course.interval(course.foretold_s(work)?);
        if !work.runs {
            return Some(rest);
        }
        let shutdown = self.shutdown(vm, work)?;
        Some(Interval { low_s: rest.low_s + shutdown.low_s, high_s: rest.high_s + shutdown.high_s })
    }

    /// How many of the last moves to a member took what was foretold of them, and of how many.
    pub fn held(&self, member: &MemberJid) -> (u32, u32) {
        let scores = self.courses.get(member).map(|course| &course.scores);
        scores.map_or((0, 0), |s| (s.iter().filter(|held| **held).count() as u32, s.len() as u32))
    }

    /// Forgets a VM that is gone.
    pub fn forget(&mut self, vm: VmId) {
        self.shutdowns_s.remove(&vm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interface::Foretold;

    fn vm(n: u128) -> VmId {
        VmId(uuid::Uuid::from_u128(n))
    }

    fn member() -> MemberJid {
        "b@x".parse().unwrap()
    }

    fn off(bytes: u64) -> MoveWork {
        MoveWork { bytes, ..MoveWork::default() }
    }

    fn running(bytes: u64) -> MoveWork {
        MoveWork { bytes, runs: true, patience_s: 90.0, ..MoveWork::default() }
    }

    #[test]
    fn slow_guests_do_not_slow_the_link() {
        // A few small moves of guests that take long to end, then one of a gigabyte: minutes, not hours.
        let mut f = Forecasts::default();
        for n in 0..4 {
            let took = Took {
                total_s: 31.0,
                flowing_s: 0.1,
                shutdown_s: Some(30.0),
                bytes: 1 << 20,
                starting_s: 0.4,
                ..Took::default()
            };
            f.learn(&member(), vm(n), &running(1 << 20), &took);
        }
        let i = f.foretell(&member(), vm(9), &off(1 << 30)).unwrap();
        assert!(i.low_s > 20.0 && i.high_s < 260.0, "{i:?}");
        // One that is known to ignore it takes what it is given.
        let deaf = MoveWork { ignores: true, patience_s: 5.0, ..running(1 << 20) };
        let i = f.foretell(&member(), vm(1), &deaf).unwrap();
        assert!(i.low_s > 2.0 && i.high_s > 5.0 && i.high_s < 20.0, "{i:?}");
        // The guest that is known to take 30 s, and one that was never seen to end.
        for n in [1, 9] {
            let i = f.foretell(&member(), vm(n), &running(1 << 20)).unwrap();
            assert!(i.low_s > 14.0 && i.high_s > 31.0 && i.high_s < 70.0, "{i:?}");
        }
        assert_eq!(f.foretell(&"c@x".parse().unwrap(), vm(1), &off(5)), None);
    }

    #[test]
    fn what_was_never_seen_is_not_foretold() {
        let mut f = Forecasts::default();
        let took = Took { total_s: 1.0, ..Took::default() };
        f.learn(&member(), vm(1), &off(0), &took);
        assert!(f.foretell(&member(), vm(1), &off(0)).is_some());
        // Nothing flowed, nothing was composed, no guest was started.
        assert_eq!(f.foretell(&member(), vm(1), &off(1 << 30)), None);
        assert_eq!(f.foretell(&member(), vm(1), &MoveWork { base_bytes: 1 << 30, ..off(0) }), None);
        assert_eq!(f.foretell(&member(), vm(1), &running(0)), None);
    }

    #[test]
    fn composing_is_foretold_where_it_is_to_be_done() {
        let mut f = Forecasts::default();
        for _ in 0..5 {
            let took = Took {
                total_s: 21.0,
                flowing_s: 10.0,
                bytes: 100 << 20,
                composing_s: 10.0,
                ..Took::default()
            };
            f.learn(&member(), vm(1), &MoveWork { base_bytes: 500 << 20, ..off(100 << 20) }, &took);
        }
        let at =
            |base_bytes| f.foretell(&member(), vm(1), &MoveWork { base_bytes, ..off(100 << 20) }).unwrap();
        let (there, twice) = (at(0), at(1000 << 20));
        assert!(there.low_s < 11.0 && there.high_s > 11.0 && there.high_s < 14.0, "{there:?}");
        assert!(twice.low_s < 31.0 && twice.high_s > 31.0 && twice.low_s > 25.0, "{twice:?}");
    }

    fn view(total_ms: u64, foretold: Foretold) -> MigrationView {
        let spec: crate::vm::VmSpec = serde_json::from_value(serde_json::json!({
            "id": vm(1).0, "name": "web", "cpus": 1, "memory": 1 << 27, "recipe": "0".repeat(64),
            "root_size": 0, "user_data_size": 0, "nics": [], "architecture": "amd64", "cpu_model": "qemu64",
        }))
        .unwrap();
        let id = crate::types::MigrationId::random();
        let start = crate::clock::UnixMillis(1000);
        let mut view =
            crate::broker::account::new_view(id, &spec, MigrationRole::Source, &member(), None, start);
        view.progress.phase = MigrationPhase::Completed;
        view.progress.updated = crate::clock::UnixMillis(1000 + total_ms);
        view.account.foretold = Some(foretold);
        view
    }

    #[test]
    fn every_completed_move_scores_what_was_foretold_of_it() {
        let foretold = Foretold { low_s: Some(2.0), high_s: Some(4.0), ..Foretold::default() };
        let mut views: Vec<_> =
            [1500, 3000, 9000].into_iter().map(|total_ms| view(total_ms, foretold.clone())).collect();
        // One of which nothing was foretold, one that failed, and one that came here.
        views.push(view(3000, Foretold::default()));
        views.push(view(3000, foretold.clone()));
        views[4].progress.phase = MigrationPhase::Failed;
        views.push(view(3000, foretold.clone()));
        views[5].progress.role = MigrationRole::Target;
        let f = Forecasts::of(views.iter());
        assert_eq!(f.held(&member()), (1, 3));
        assert_eq!(f.held(&"c@x".parse().unwrap()), (0, 0));
        // One whose link was down counts as a miss, and teaches nothing.
        let mut disturbed = view(3_600_000, Foretold { disturbed: true, ..foretold });
        disturbed.account.phase_ms.insert("start".into(), 3_599_000);
        let before = f.foretell(&member(), vm(1), &off(0));
        let mut f = f;
        f.learn_from(&disturbed);
        assert_eq!((f.held(&member()), f.foretell(&member(), vm(1), &off(0))), ((1, 4), before));
    }

    #[test]
    fn a_targets_figures_count_for_no_more_than_the_move_took() {
        let foretold =
            Foretold { work: MoveWork { base_bytes: 1 << 20, ..off(1 << 20) }, ..Foretold::default() };
        let mut liar = view(2000, foretold);
        (liar.account.fetch_ms, liar.progress.bytes_done) = (u64::MAX, 1 << 20);
        liar.account.phase_ms.insert("compose".into(), u64::MAX);
        let f = Forecasts::of([&liar].into_iter());
        let i = f.foretell(&member(), vm(1), &MoveWork { base_bytes: 1 << 20, ..off(1 << 20) }).unwrap();
        assert!(i.high_s < 20.0, "{i:?}");
    }

    /// Moves as the bench made them, each foretold by those before it.
    #[test]
    fn real_moves_fall_into_their_intervals() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/forecast/runs");
        let mut runs: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        runs.retain(|path| path.extension().is_some_and(|e| e == "csv"));
        assert!(!runs.is_empty(), "no real moves are kept");
        let (mut told, mut inside, mut moves) = (0, 0, 0);
        let (mut widths, mut errors) = (Vec::new(), Vec::new());
        for run in runs {
            let (mut sources, text) =
                (BTreeMap::<_, Forecasts>::new(), std::fs::read_to_string(&run).unwrap());
            for line in text.lines().skip(1) {
                let columns: Vec<_> = line.split(',').collect();
                let number = |at: usize| columns[at].parse::<u64>().unwrap();
                let seconds = |at: usize| columns[at].parse::<f64>().ok();
                let of = vm(number(1).into());
                let work = MoveWork {
                    runs: columns[2] == "true",
                    bytes: number(3),
                    base_bytes: number(4),
                    disk_bytes: number(5),
                    patience_s: seconds(6).unwrap(),
                    ignores: columns[7] == "true",
                };
                let took = Took {
                    total_s: seconds(8).unwrap(),
                    flowing_s: seconds(9).unwrap(),
                    bytes: number(10),
                    composing_s: seconds(11).unwrap(),
                    looking_s: seconds(12).unwrap(),
                    shutdown_s: seconds(13),
                    starting_s: seconds(14).unwrap(),
                };
                moves += 1;
                let f = sources.entry(columns[0]).or_default();
                if let Some(i) = f.foretell(&member(), of, &work) {
                    told += 1;
                    inside += u32::from((i.low_s..=i.high_s).contains(&took.total_s));
                    widths.push(i.high_s - i.low_s);
                    errors.push((took.total_s - (i.low_s + i.high_s) / 2.0).abs());
                }
                f.learn(&member(), of, &work, &took);
            }
        }
        let median = |mut all: Vec<f64>| {
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        println!(
            "{inside} of {told} foretold of {moves} moves inside; width {:.2} s, error {:.2} s, medians",
            median(widths),
            median(errors)
        );
        assert!(told >= 50 && told * 10 >= moves * 8, "only {told} of {moves} were foretold");
        assert!(inside * 10 >= told * 9, "{inside} of {told}");
    }
}
