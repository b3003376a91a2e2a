//! Requests of those who may not ask. A server does not keep strangers from sending them, so they
//! must neither fill the log nor keep the session busy.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Senders told apart at most; the rest are counted together.
const SENDERS_MAX: usize = 1000;
/// Refusals sent at most per window; what comes beyond is dropped without an answer.
const ANSWERS_PER_WINDOW: u32 = 20;
const WINDOW: Duration = Duration::from_secs(1);

#[derive(Default)]
pub struct Refusals {
    counts: HashMap<String, u64>,
    window: Option<(Instant, u32)>,
}

/// What to do about one refused request.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Whether to answer it at all.
    pub answer: bool,
    /// Worth a line in the log: how many there were from this sender.
    pub log: Option<u64>,
}

impl Refusals {
    pub fn refuse(&mut self, sender: &str, now: Instant) -> Refusal {
        let known = self.counts.contains_key(sender) || self.counts.len() < SENDERS_MAX;
        let count = self.counts.entry(if known { sender.to_owned() } else { String::new() }).or_default();
        *count += 1;
        let power_of_ten = 10u64.checked_pow(count.ilog10()) == Some(*count);
        let (start, sent) =
            self.window.filter(|(start, _)| now.duration_since(*start) < WINDOW).unwrap_or((now, 0));
        let answer = sent < ANSWERS_PER_WINDOW;
        self.window = Some((start, sent + u32::from(answer)));
        Refusal { answer, log: power_of_ten.then_some(*count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_neither_logged_nor_answered_in_full() {
        let (mut r, now) = (Refusals::default(), Instant::now());
        let all: Vec<_> = (0..100).map(|_| r.refuse("eve@x", now)).collect();
        assert_eq!(all.iter().filter_map(|r| r.log).collect::<Vec<_>>(), [1, 10, 100]);
        assert_eq!(all.iter().filter(|r| r.answer).count(), 20);
        assert_eq!(r.refuse("mallory@x", now + WINDOW), Refusal { answer: true, log: Some(1) });
    }

    #[test]
    fn many_senders_take_no_more_memory_than_some() {
        let (mut r, now) = (Refusals::default(), Instant::now());
        let logged = (0..5000).filter(|n| r.refuse(&format!("{n}@x"), now).log.is_some()).count();
        assert_eq!(r.counts.len(), SENDERS_MAX + 1);
        assert_eq!(logged, SENDERS_MAX + 4);
    }
}
