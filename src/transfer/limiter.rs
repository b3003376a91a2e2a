//! The bandwidth cap of a broker: one token bucket that everything it sends draws from.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A slower cap would let handshakes and keep-alives time out.
pub const RATE_MIN_BYTES_PER_S: u64 = 8 << 10;
/// How much time's worth of bytes may be saved up while nothing is sent, or by a late timer.
const BURST: Duration = Duration::from_millis(20);
const BURST_BYTES_MIN: f64 = 4096.0;

/// Caps what an endpoint sends, in bytes of UDP payload per second: retransmissions,
/// acknowledgements and handshakes count, so what the cap promises is what the link sees (less
/// IP and UDP headers, 28 or 48 bytes a packet). Clones share one cap.
#[derive(Clone, Debug)]
pub struct Limiter {
    bucket: Arc<Mutex<Bucket>>,
    started: Instant,
    /// What this cap is a part of.
    outer: Option<Arc<Limiter>>,
}

impl Default for Limiter {
    fn default() -> Self {
        Self::unlimited()
    }
}

impl Limiter {
    pub fn unlimited() -> Self {
        Self::new(None)
    }

    /// `None` is no cap.
    pub fn new(rate_bytes_per_s: Option<u64>) -> Self {
        let bucket = Arc::new(Mutex::new(Bucket::new(rate_bytes_per_s)));
        Self { bucket, started: Instant::now(), outer: None }
    }

    /// This cap inside another: what draws from it draws from both.
    pub fn within(&self, outer: Limiter) -> Limiter {
        Limiter { outer: Some(Arc::new(outer)), ..self.clone() }
    }

    /// Changes the cap at once, also of transfers under way. Rates below 8 KiB/s are raised to it.
    pub fn set_rate(&self, rate_bytes_per_s: Option<u64>) {
        let now = self.started.elapsed();
        self.bucket().set_rate(now, rate_bytes_per_s);
    }

    /// The tightest cap.
    pub fn rate_bytes_per_s(&self) -> Option<u64> {
        let outer = self.outer.as_ref().and_then(|outer| outer.rate_bytes_per_s());
        let own = self.bucket().rate_bytes_per_s;
        own.into_iter().chain(outer).min()
    }

    /// Bytes of UDP payload sent since the start.
    pub fn sent_bytes(&self) -> u64 {
        self.bucket().sent_bytes
    }

    pub(super) fn spend(&self, bytes: usize) {
        let now = self.started.elapsed();
        self.bucket().spend(now, bytes);
        if let Some(outer) = &self.outer {
            outer.spend(bytes);
        }
    }

    /// How long to wait before the next datagram may go; `None` is not at all.
    pub(super) fn wait(&self) -> Option<Duration> {
        let now = self.started.elapsed();
        let own = self.bucket().wait(now);
        own.max(self.outer.as_ref().and_then(|outer| outer.wait()))
    }

    fn bucket(&self) -> MutexGuard<'_, Bucket> {
        // A bucket is consistent at every point where a panic could happen.
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A token bucket that may run into debt: a datagram goes when the balance is positive, and pays
/// afterwards, so the long-term rate is exact whatever the sizes. `now` counts from any fixed
/// moment.
#[derive(Debug)]
struct Bucket {
    rate_bytes_per_s: Option<u64>,
    balance_bytes: f64,
    filled: Duration,
    sent_bytes: u64,
}

impl Bucket {
    fn new(rate: Option<u64>) -> Self {
        let mut bucket =
            Self { rate_bytes_per_s: None, balance_bytes: 0.0, filled: Duration::ZERO, sent_bytes: 0 };
        bucket.set_rate(Duration::ZERO, rate);
        bucket
    }

    fn set_rate(&mut self, now: Duration, rate: Option<u64>) {
        self.fill(now);
        self.rate_bytes_per_s = rate.map(|r| r.max(RATE_MIN_BYTES_PER_S));
        if rate.is_none() {
            self.balance_bytes = 0.0;
        }
        self.fill(now);
    }

    fn spend(&mut self, now: Duration, bytes: usize) {
        self.sent_bytes += bytes as u64;
        if self.rate_bytes_per_s.is_some() {
            self.fill(now);
            self.balance_bytes -= bytes as f64;
        }
    }

    fn wait(&mut self, now: Duration) -> Option<Duration> {
        let rate = self.rate_bytes_per_s?;
        self.fill(now);
        if self.balance_bytes > 0.0 {
            return None;
        }
        Some(Duration::from_secs_f64((1.0 - self.balance_bytes) / rate as f64))
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.filled);
        self.filled = self.filled.max(now);
        let Some(rate) = self.rate_bytes_per_s else { return };
        let most = (rate as f64 * BURST.as_secs_f64()).max(BURST_BYTES_MIN);
        self.balance_bytes = (self.balance_bytes + rate as f64 * passed.as_secs_f64()).min(most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Sends as a greedy sender with a timer that wakes late would; returns bytes sent by `until`.
    fn run(bucket: &mut Bucket, now: &mut Duration, until: Duration, size: usize, late: Duration) -> u64 {
        let before = bucket.sent_bytes;
        while *now < until {
            match bucket.wait(*now) {
                None => bucket.spend(*now, size),
                Some(d) => *now += d + late,
            }
        }
        bucket.sent_bytes - before
    }

    proptest! {
        #[test]
        fn holds_the_rate(rate in 100_000u64..200_000_000, size in 40usize..65_000, late_us in 0u64..5_000) {
            let mut bucket = Bucket::new(Some(rate));
            let mut now = Duration::ZERO;
            let sent = run(&mut bucket, &mut now, Duration::from_secs(10), size, Duration::from_micros(late_us));
            let want = rate as f64 * now.as_secs_f64();
            // One datagram of debt and one burst are what it may be off by.
            let slack = size as f64 + rate as f64 * 0.03 + BURST_BYTES_MIN;
            prop_assert!((sent as f64 - want).abs() <= slack, "sent {sent}, want {want}");
        }
    }

    #[test]
    fn the_rate_changes_while_a_sender_waits() {
        let mut bucket = Bucket::new(Some(1_000_000));
        let mut now = Duration::ZERO;
        run(&mut bucket, &mut now, Duration::from_secs(2), 1200, Duration::ZERO);
        bucket.set_rate(now, Some(5_000_000));
        let start = now;
        let sent = run(&mut bucket, &mut now, Duration::from_secs(4), 1200, Duration::ZERO);
        let rate = sent as f64 / (now - start).as_secs_f64();
        assert!((rate / 5e6 - 1.0).abs() < 0.02, "{rate}");
        bucket.set_rate(now, None);
        assert_eq!(bucket.wait(now), None);
    }

    #[test]
    fn a_cap_inside_another_draws_from_both() {
        let (member, ticket) = (Limiter::new(Some(1 << 20)), Limiter::unlimited());
        let both = ticket.within(member.clone());
        assert_eq!((both.rate_bytes_per_s(), ticket.rate_bytes_per_s()), (Some(1 << 20), None));
        both.spend(10 << 20);
        assert!(both.wait().is_some() && member.wait().is_some());
        assert_eq!(ticket.wait(), None);
        assert!(
            Limiter::unlimited().within(member.clone()).wait().is_some(),
            "the member's other tickets wait too"
        );
        ticket.set_rate(Some(1 << 19));
        assert_eq!(both.rate_bytes_per_s(), Some(1 << 19));
        assert_eq!((member.sent_bytes(), ticket.sent_bytes()), (10 << 20, 10 << 20));
    }

    #[test]
    fn an_idle_link_saves_up_little_and_no_rate_is_zero() {
        let mut bucket = Bucket::new(Some(1_000_000));
        let hour = Duration::from_secs(3600);
        let mut burst = 0;
        while bucket.wait(hour).is_none() {
            bucket.spend(hour, 1000);
            burst += 1000;
        }
        assert!(burst <= 21_000, "{burst}");
        bucket.set_rate(hour, Some(0));
        assert_eq!(bucket.rate_bytes_per_s, Some(RATE_MIN_BYTES_PER_S));
    }
}
