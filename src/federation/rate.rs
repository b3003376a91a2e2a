//! How often something may be done: token buckets, one or one for each of many. Fed with the time,
//! bounded in memory whatever the number of strangers.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::clock::UnixMillis;

/// So many at once, and so many a second in the long run.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Allowance {
    pub burst: f64,
    pub per_second: f64,
}

impl Allowance {
    pub const fn new(burst: f64, per_second: f64) -> Self {
        Self { burst, per_second }
    }

    /// So many a minute; ten seconds' worth at once.
    pub fn per_minute(n: u32) -> Self {
        let per_second = f64::from(n) / 60.0;
        Self { burst: (per_second * 10.0).max(1.0), per_second }
    }
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Bucket {
    tokens: f64,
    filled: UnixMillis,
}

impl Bucket {
    pub fn full(allowance: &Allowance, now: UnixMillis) -> Self {
        Self { tokens: allowance.burst, filled: now }
    }

    /// Takes one token, or says how long it will be until there is one. A clock that is set back
    /// only delays.
    pub fn take(&mut self, allowance: &Allowance, now: UnixMillis) -> Result<(), Duration> {
        self.fill(allowance, now);
        if self.tokens >= 1.0 {
            self.tokens -= 1.0;
            return Ok(());
        }
        let seconds = (1.0 - self.tokens) / allowance.per_second.max(1e-3);
        Err(Duration::from_millis((seconds * 1000.0).ceil() as u64))
    }

    /// As good as one never used.
    fn is_full(&mut self, allowance: &Allowance, now: UnixMillis) -> bool {
        self.fill(allowance, now);
        self.tokens >= allowance.burst
    }

    fn fill(&mut self, allowance: &Allowance, now: UnixMillis) {
        let passed = now.since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + passed * allowance.per_second).min(allowance.burst);
        self.filled = now;
    }
}

/// A bucket for each key, at most `max` of them told apart: those that come beyond share one.
#[derive(Clone, Debug)]
pub struct Buckets<K> {
    buckets: BTreeMap<K, Bucket>,
    shared: Option<Bucket>,
    max: usize,
    swept: UnixMillis,
}

/// Full buckets are forgotten at most this often.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

impl<K: Ord + Clone> Buckets<K> {
    pub fn new(max: usize) -> Self {
        Self { buckets: BTreeMap::new(), shared: None, max, swept: UnixMillis::default() }
    }

    pub fn take(&mut self, key: &K, allowance: &Allowance, now: UnixMillis) -> Result<(), Duration> {
        if let Some(bucket) = self.buckets.get_mut(key) {
            return bucket.take(allowance, now);
        }
        if self.buckets.len() >= self.max && now.since(self.swept) >= SWEEP_EVERY {
            self.swept = now;
            self.buckets.retain(|_, bucket| !bucket.is_full(allowance, now));
        }
        let bucket = if self.buckets.len() < self.max {
            self.buckets.entry(key.clone()).or_insert_with(|| Bucket::full(allowance, now))
        } else {
            self.shared.get_or_insert_with(|| Bucket::full(allowance, now))
        };
        bucket.take(allowance, now)
    }

    /// Gives a token back that was taken for what turned out well.
    pub fn give_back(&mut self, key: &K, allowance: &Allowance) {
        if let Some(bucket) = self.buckets.get_mut(key) {
            bucket.tokens = (bucket.tokens + 1.0).min(allowance.burst);
        }
    }

    pub fn forget(&mut self, key: &K) {
        self.buckets.remove(key);
    }

    pub fn len(&self) -> usize {
        self.buckets.len()
    }

    pub fn is_empty(&self) -> bool {
        self.buckets.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FEW: Allowance = Allowance::new(3.0, 2.0);

    fn at(ms: u64) -> UnixMillis {
        UnixMillis(1_000_000 + ms)
    }

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let mut b = Bucket::full(&FEW, at(0));
        assert_eq!((0..5).filter(|_| b.take(&FEW, at(0)).is_ok()).count(), 3);
        assert_eq!(b.take(&FEW, at(0)), Err(Duration::from_millis(500)));
        assert_eq!(b.take(&FEW, at(400)), Err(Duration::from_millis(100)));
        assert_eq!(b.take(&FEW, at(500)), Ok(()));
        let passed = (0..10_000u64).filter(|ms| b.take(&FEW, at(500 + ms)).is_ok()).count();
        assert!((19..=21).contains(&passed), "{passed} in ten seconds");
        assert_eq!(
            (0..9).filter(|_| b.take(&FEW, at(900_000)).is_ok()).count(),
            3,
            "nothing more is saved up"
        );
        assert!(b.take(&FEW, at(0)).is_err(), "a clock set back gives nothing");
    }

    #[test]
    fn many_strangers_take_no_more_memory_than_some_and_do_not_lock_each_other_out_for_ever() {
        let mut all = Buckets::new(100);
        let passed = (0..10_000u32).filter(|n| all.take(n, &FEW, at(0)).is_ok()).count();
        assert_eq!((passed, all.len()), (103, 100));
        assert!(all.take(&5, &FEW, at(0)).is_ok(), "who is told apart keeps its own");
        assert!(all.take(&20_000, &FEW, at(0)).is_err());
        assert!(all.take(&20_000, &FEW, at(10_000)).is_ok());
        assert_eq!(all.len(), 1, "full buckets are forgotten");
    }

    #[test]
    fn a_token_given_back_can_be_taken_again_and_no_more_than_a_burst_is_saved() {
        let mut all = Buckets::new(100);
        assert_eq!((0..5).filter(|_| all.take(&1, &FEW, at(0)).is_ok()).count(), 3);
        all.give_back(&1, &FEW);
        assert_eq!((0..5).filter(|_| all.take(&1, &FEW, at(0)).is_ok()).count(), 1);
        (0..9).for_each(|_| all.give_back(&1, &FEW));
        all.give_back(&2, &FEW);
        assert_eq!((0..9).filter(|_| all.take(&1, &FEW, at(0)).is_ok()).count(), 3);
        assert_eq!(all.len(), 1);
    }

    #[test]
    fn a_rate_per_minute_allows_ten_seconds_worth_at_once() {
        assert_eq!(Allowance::per_minute(6000), Allowance::new(1000.0, 100.0));
        let little = Allowance::per_minute(1);
        let mut b = Bucket::full(&little, at(0));
        assert_eq!((b.take(&little, at(0)), b.take(&little, at(0))), (Ok(()), Err(Duration::from_secs(60))));
    }
}
