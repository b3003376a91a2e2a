//! How long a move will take, by what moves to that member took. Pure.
//!
//! A move is set up, bytes flow, and a guest that runs is shut down: each is learned apart from the others,
//! the rate from the time in which bytes flowed and weighted by bytes. What the model did not foresee is
//! learned as the ratio of what a move took to what was foretold of it, and becomes the interval.

use std::collections::{BTreeMap, VecDeque};

use crate::types::{MemberJid, VmId};

/// What weight earlier moves keep beside a new one.
const KEPT: f64 = 0.8;
/// Less than this says more of latency than of the link.
const BYTES_MIN: u64 = 256 << 10;
/// Moves whose ratio is remembered, of each member.
const SCORES: usize = 20;
/// Fewer say nothing of the spread.
const SCORES_MIN: usize = 3;
/// The interval that is assumed until then.
const SPREAD_AT_FIRST: (f64, f64) = (0.5, 2.5);
/// What the spread of few moves is widened by.
const MARGIN: f64 = 0.1;
/// What no model foresees: scheduling, and the tick by which brokers look.
const SLACK_S: f64 = 0.5;

/// What one move took, in seconds.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Took {
    pub total_s: f64,
    /// In which content was fetched.
    pub flowing_s: f64,
    /// Of the guest; none if it did not run.
    pub shutdown_s: Option<f64>,
    pub bytes: u64,
}

/// From and to, in seconds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Interval {
    pub low_s: f64,
    pub high_s: f64,
}

#[derive(Clone, Default, Debug)]
struct Course {
    /// Bytes, and the seconds in which they flowed, the older the less.
    flowed: (f64, f64),
    /// Of moves, and how many, the older the less.
    set_up: (f64, f64),
    ratios: VecDeque<f64>,
}

impl Course {
    fn set_up_s(&self) -> f64 {
        if self.set_up.1 > 0.0 { self.set_up.0 / self.set_up.1 } else { 0.0 }
    }

    /// Without the guest's shutdown. `None` as long as nothing flowed.
    fn foretold_s(&self, bytes: u64) -> Option<f64> {
        let (flowed, seconds) = self.flowed;
        match bytes {
            _ if self.set_up.1 == 0.0 => None,
            0 => Some(self.set_up_s()),
            _ if flowed == 0.0 => None,
            _ => Some(self.set_up_s() + bytes as f64 * seconds / flowed),
        }
    }

    fn spread(&self) -> (f64, f64) {
        if self.ratios.len() < SCORES_MIN {
            return SPREAD_AT_FIRST;
        }
        let low = self.ratios.iter().copied().fold(f64::INFINITY, f64::min);
        let high = self.ratios.iter().copied().fold(0.0, f64::max);
        (low * (1.0 - MARGIN), high * (1.0 + MARGIN))
    }
}

/// What is known of moves to each member, and of each guest's shutdown.
#[derive(Clone, Default, Debug)]
pub struct Forecasts {
    courses: BTreeMap<MemberJid, Course>,
    shutdowns_s: BTreeMap<VmId, f64>,
}

impl Forecasts {
    /// Learns from a move that was completed.
    pub fn learn(&mut self, member: &MemberJid, vm: VmId, took: Took) {
        if let Some(shutdown_s) = took.shutdown_s {
            self.shutdowns_s.insert(vm, shutdown_s);
        }
        let course = self.courses.entry(member.clone()).or_default();
        let without_shutdown_s = (took.total_s - took.shutdown_s.unwrap_or(0.0)).max(0.01);
        // Scored by what was known before it.
        if let Some(foretold_s) = course.foretold_s(took.bytes) {
            course.ratios.push_back(without_shutdown_s / foretold_s.max(0.01));
            if course.ratios.len() > SCORES {
                course.ratios.pop_front();
            }
        }
        if took.bytes >= BYTES_MIN && took.flowing_s > 0.0 {
            let (bytes, seconds) = course.flowed;
            course.flowed = (bytes * KEPT + took.bytes as f64, seconds * KEPT + took.flowing_s);
        }
        let (sum, count) = course.set_up;
        let set_up_s = (without_shutdown_s - took.flowing_s).max(0.0);
        course.set_up = (sum * KEPT + set_up_s, count * KEPT + 1.0);
    }

    /// How long a guest took to end the last time.
    pub fn shutdown_s(&self, vm: VmId) -> Option<f64> {
        self.shutdowns_s.get(&vm).copied()
    }

    /// How long a move of so many bytes takes; nothing is known before the first move to `member`.
    /// `runs`: its guest is to be shut down, which counts as far as it was seen to.
    pub fn foretell(&self, member: &MemberJid, vm: VmId, bytes: u64, runs: bool) -> Option<Interval> {
        let course = self.courses.get(member)?;
        let foretold_s = course.foretold_s(bytes)?;
        let shutdown_s = if runs { self.shutdown_s(vm).unwrap_or(0.0) } else { 0.0 };
        let (low, high) = course.spread();
        Some(Interval {
            low_s: foretold_s * low + shutdown_s * 0.5,
            high_s: foretold_s * high + shutdown_s * 2.0 + SLACK_S,
        })
    }

    /// Forgets a VM that is gone.
    pub fn forget(&mut self, vm: VmId) {
        self.shutdowns_s.remove(&vm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(n: u128) -> VmId {
        VmId(uuid::Uuid::from_u128(n))
    }

    fn member() -> MemberJid {
        "b@x".parse().unwrap()
    }

    /// Numbers between 0 and 1 that look random, the same in each run.
    struct Noise(u64);

    impl Noise {
        fn next(&mut self) -> f64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) as f64 / (1u64 << 31) as f64
        }
    }

    #[test]
    fn slow_guests_do_not_slow_the_link() {
        // A few small moves of guests that take long to end, then one of a gigabyte: minutes, not hours.
        let mut f = Forecasts::default();
        for n in 0..4 {
            let took = Took { total_s: 31.0, flowing_s: 0.1, shutdown_s: Some(30.0), bytes: 1 << 20 };
            f.learn(&member(), vm(n), took);
        }
        let i = f.foretell(&member(), vm(9), 1 << 30, false).unwrap();
        assert!(i.low_s > 20.0 && i.high_s < 260.0, "{i:?}");
        // The guest that is known to take 30 s.
        let i = f.foretell(&member(), vm(1), 1 << 20, true).unwrap();
        assert!(i.low_s > 14.0 && i.high_s > 31.0 && i.high_s < 70.0, "{i:?}");
        assert_eq!(f.foretell(&"c@x".parse().unwrap(), vm(1), 5, false), None);
    }

    /// Fifty mixed moves over a link that varies: nine of ten fall into what was foretold.
    #[test]
    fn mixed_moves_fall_into_their_intervals() {
        let (mut f, mut noise) = (Forecasts::default(), Noise(7));
        let (mut inside, mut told, mut widths, mut errors) = (0, 0, Vec::new(), Vec::new());
        for n in 0..60u128 {
            let bytes = (1u64 << (18 + (noise.next() * 12.0) as u32)) + (noise.next() * 1e6) as u64;
            let runs = noise.next() < 0.5;
            let which = vm(n % 5);
            let shutdown_s = runs.then(|| 2.0 + (n % 5) as f64 + noise.next());
            let flowing_s = 0.02 + bytes as f64 / 20e6 * (0.85 + 0.3 * noise.next());
            let total_s = 0.8 + 0.6 * noise.next() + flowing_s + shutdown_s.unwrap_or(0.0);
            if n >= 10
                && let Some(i) = f.foretell(&member(), which, bytes, runs)
            {
                told += 1;
                inside += u32::from((i.low_s..=i.high_s).contains(&total_s));
                widths.push(i.high_s - i.low_s);
                errors.push((total_s - (i.low_s + i.high_s) / 2.0).abs());
            }
            f.learn(&member(), which, Took { total_s, flowing_s, shutdown_s, bytes });
        }
        let median = |mut all: Vec<f64>| {
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        println!("{inside} of {told} inside; width {:.2} s, error {:.2} s", median(widths), median(errors));
        assert!(told == 50 && inside * 10 >= told * 9, "{inside} of {told}");
    }
}
