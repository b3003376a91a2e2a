//! What anybody may ask of the session. A server does not keep strangers from asking, so they must
//! neither fill the log nor keep the session busy.

use std::time::Instant;

use crate::clock::UnixMillis;
use crate::federation::rate::{Allowance, Bucket, Buckets};
use crate::federation::refusals::Tally;
use crate::federation::{Refusals, Refused};

/// Small questions (XEP-0030, 0092, 0199) that one account may ask, and all accounts together.
const OF_ONE: Allowance = Allowance::new(20.0, 2.0);
const OF_ALL: Allowance = Allowance::new(200.0, 50.0);
const ACCOUNTS_MAX: usize = 1000;
/// Refusals sent to strangers; what comes beyond is dropped without an answer.
const REFUSALS: Allowance = Allowance::new(20.0, 20.0);

pub struct Strangers {
    started: Instant,
    questions: Buckets<String>,
    all: Bucket,
    answers: Bucket,
    refusals: Refusals,
}

/// What to do about one refused request.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Whether to answer it at all.
    pub answer: bool,
    /// Worth a line in the log: how many like it had none.
    pub log: Option<u64>,
}

impl Strangers {
    pub fn new(started: Instant) -> Self {
        let now = UnixMillis::default();
        Self {
            started,
            questions: Buckets::new(ACCOUNTS_MAX),
            all: Bucket::full(&OF_ALL, now),
            answers: Bucket::full(&REFUSALS, now),
            refusals: Refusals::default(),
        }
    }

    /// Whether a small question is answered.
    pub fn may_ask(&mut self, account: &str, now: Instant) -> bool {
        let moment = self.moment(now);
        // In this order: who asks too often must not use up what is for all.
        let answered = self.questions.take(&account.to_owned(), &OF_ONE, moment).is_ok()
            && self.all.take(&OF_ALL, moment).is_ok();
        if !answered {
            self.refusals.refuse(account, Refused::RateLimit, moment);
        }
        answered
    }

    /// Counts the refused request of an account that is no member.
    pub fn refuse(&mut self, account: &str, now: Instant) -> Refusal {
        let moment = self.moment(now);
        let log = self.refusals.refuse(account, Refused::NotMember, moment);
        Refusal { answer: self.answers.take(&REFUSALS, moment).is_ok(), log }
    }

    /// Counts a request that cannot be read.
    pub fn malformed(&mut self, account: &str, now: Instant) {
        self.refusals.refuse(account, Refused::Malformed, self.moment(now));
    }

    /// Counts a request of a member that has too many under way.
    pub fn too_many(&mut self, member: &str, now: Instant) {
        self.refusals.refuse(member, Refused::RateLimit, self.moment(now));
    }

    /// What was refused since the last call.
    pub fn take_new(&mut self) -> Vec<Tally> {
        self.refusals.take_new()
    }

    fn moment(&self, now: Instant) -> UnixMillis {
        UnixMillis::default().plus(now.duration_since(self.started))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_flood_is_neither_logged_nor_answered_in_full() {
        let start = Instant::now();
        let (mut s, now) = (Strangers::new(start), start);
        let all: Vec<_> = (0..100).map(|_| s.refuse("eve@x", now)).collect();
        assert_eq!(all.iter().filter_map(|r| r.log).collect::<Vec<_>>(), [0]);
        assert_eq!(all.iter().filter(|r| r.answer).count(), 20);
        assert_eq!(
            s.refuse("mallory@x", now + Duration::from_secs(1)),
            Refusal { answer: true, log: Some(0) }
        );
        let told: u64 = s.take_new().iter().map(|t| t.count).sum();
        assert_eq!((told, s.take_new().len()), (101, 0));
    }

    #[test]
    fn many_senders_take_no_more_memory_than_some() {
        let start = Instant::now();
        let mut s = Strangers::new(start);
        let logged = (0..5000).filter(|n| s.refuse(&format!("{n}@x"), start).log.is_some()).count();
        assert!(logged <= 1001, "{logged}");
        assert_eq!((0..5000).filter(|n| s.may_ask(&format!("{n}@x"), start)).count(), 200);
        assert_eq!(s.questions.len(), ACCOUNTS_MAX);
    }

    #[test]
    fn one_that_asks_all_the_time_does_not_silence_the_others() {
        let start = Instant::now();
        let mut s = Strangers::new(start);
        assert_eq!((0..5000).filter(|_| s.may_ask("eve@x", start)).count(), 20);
        assert!(s.may_ask("alpine@x", start));
        assert!(s.may_ask("eve@x", start + Duration::from_secs(1)));
    }
}
