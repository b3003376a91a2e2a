//! When our own presence goes to the room: on change only, and not in a hurry. Everything sent
//! reaches every member, so changes in quick succession travel as one.

use std::time::Duration;

/// Holds what shall be announced until it may be sent. Times are measured from any fixed start.
#[derive(Debug, Clone)]
pub struct Announcer<T> {
    wanted: Option<T>,
    announced: Option<T>,
    not_before: Duration,
}

impl<T> Default for Announcer<T> {
    fn default() -> Self {
        Self { wanted: None, announced: None, not_before: Duration::ZERO }
    }
}

impl<T: PartialEq + Clone> Announcer<T> {
    /// What the room should know; the latest counts.
    pub fn want(&mut self, value: T) {
        self.wanted = Some(value);
    }

    pub fn has_something(&self) -> bool {
        self.wanted.is_some()
    }

    /// What to send at `now`, if anything; nothing more is sent for `pause` after it.
    pub fn take_due(&mut self, now: Duration, pause: Duration) -> Option<T> {
        if now < self.not_before || self.wanted == self.announced {
            return None;
        }
        self.announced = self.wanted.clone();
        self.not_before = now + pause;
        self.announced.clone()
    }

    /// The room does not know us any more: what is wanted is news again, and due at once.
    pub fn forget(&mut self) {
        self.announced = None;
        self.not_before = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSE: Duration = Duration::from_secs(2);

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn only_changes_are_sent_and_a_burst_is_one() {
        let mut a = Announcer::default();
        assert_eq!(a.take_due(at(0), PAUSE), None, "nothing is known of us yet");
        a.want(1);
        assert_eq!(a.take_due(at(0), PAUSE), Some(1));
        for n in 2..10 {
            a.want(n);
            assert_eq!(a.take_due(at(n), PAUSE), None);
        }
        assert_eq!(a.take_due(at(2000), PAUSE), Some(9));
        a.want(10);
        a.want(9);
        assert_eq!(a.take_due(at(9000), PAUSE), None, "it changed and changed back");
    }

    #[test]
    fn a_room_entered_anew_is_told_at_once() {
        let mut a = Announcer::default();
        a.want("x");
        assert_eq!(a.take_due(at(0), PAUSE), Some("x"));
        a.forget();
        assert_eq!(a.take_due(at(1), PAUSE), Some("x"));
    }
}
