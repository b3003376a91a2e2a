//! Questions under way. Each has its own deadline: after a broken connection nobody else tells
//! that an answer will not come.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use xmpp_parsers::jid::Jid;

use crate::migration::envelope::SEALED_BYTES_MAX;
use crate::stanza::Answer;

use super::handle::{IqReply, RequestError};

/// Questions under way at most.
const PENDING_MAX: usize = 1024;

/// Who waits for an answer.
pub enum Waiting {
    Iq(oneshot::Sender<IqReply>),
    Request(oneshot::Sender<Result<Vec<u8>, RequestError>>),
    RoomFeatures,
    SelfPing,
}

struct Question {
    waiting: Waiting,
    to: Jid,
    deadline: Instant,
    timeout: Duration,
}

pub struct Pending {
    questions: HashMap<String, Question>,
    /// Answers to a predecessor of this process under the same address must not fit ours.
    prefix: String,
    counter: u64,
}

impl Pending {
    pub fn new() -> Self {
        let prefix = uuid::Uuid::new_v4().simple().to_string();
        Self { questions: HashMap::new(), prefix, counter: 0 }
    }

    /// The id to ask under, or who waits, if too much is under way.
    pub fn open(&mut self, to: Jid, waiting: Waiting, timeout: Duration) -> Result<String, Waiting> {
        if self.questions.len() >= PENDING_MAX {
            return Err(waiting);
        }
        self.counter += 1;
        let id = format!("{}-{}", self.prefix, self.counter);
        let deadline = Instant::now() + timeout;
        self.questions.insert(id.clone(), Question { waiting, to, deadline, timeout });
        Ok(id)
    }

    /// Who waits for this answer. One from somebody who was not asked is noise.
    pub fn answered(&mut self, from: Option<&Jid>, id: &str) -> Option<Waiting> {
        let fits = self.questions.get(id).is_some_and(|q| from == Some(&q.to));
        fits.then(|| self.questions.remove(id)).flatten().map(|q| q.waiting)
    }

    /// Questions whose time is over.
    pub fn late(&mut self, now: Instant) -> Vec<(Waiting, RequestError)> {
        let late = self.questions.extract_if(|_, q| q.deadline <= now);
        late.map(|(_, q)| {
            let error = RequestError::Timeout { to: q.to.to_string(), seconds: q.timeout.as_secs() };
            (q.waiting, error)
        })
        .collect()
    }

    /// The session is over: what became of anything under way is unknown.
    pub fn abandon(&mut self) {
        for (_, q) in self.questions.drain() {
            q.waiting.end(Err(RequestError::Unknown));
        }
    }
}

impl Waiting {
    /// Hands over what came. The session itself looks after its own questions.
    pub fn end(self, result: IqReply) {
        match self {
            Waiting::Iq(reply) => drop(reply.send(result)),
            Waiting::Request(reply) => {
                let bad = || RequestError::Refused { condition: "bad answer".into(), text: "".into() };
                let sealed = result.and_then(|element| {
                    let answer = element.and_then(|e| Answer::try_from(e).ok()).map(|a| a.sealed);
                    answer.filter(|sealed| sealed.len() <= SEALED_BYTES_MAX).ok_or_else(bad)
                });
                drop(reply.send(sealed));
            }
            Waiting::RoomFeatures | Waiting::SelfPing => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jid(text: &str) -> Jid {
        Jid::new(text).unwrap()
    }

    #[test]
    fn only_who_was_asked_can_answer_and_only_once() {
        let mut p = Pending::new();
        let (reply, mut answer) = oneshot::channel();
        let id = p.open(jid("a@x/r"), Waiting::Iq(reply), Duration::from_secs(9)).ok().unwrap();
        assert!(p.answered(Some(&jid("b@x/r")), &id).is_none());
        assert!(p.answered(None, &id).is_none());
        assert!(p.late(Instant::now()).is_empty());
        p.answered(Some(&jid("a@x/r")), &id).unwrap().end(Ok(None));
        assert!(matches!(answer.try_recv(), Ok(Ok(None))));
        assert!(p.answered(Some(&jid("a@x/r")), &id).is_none());
    }

    #[test]
    fn every_question_ends_by_its_deadline_or_with_the_session() {
        let mut p = Pending::new();
        let (reply, _late) = oneshot::channel();
        assert!(p.open(jid("a@x/r"), Waiting::Iq(reply), Duration::ZERO).is_ok());
        let (reply, mut abandoned) = oneshot::channel();
        assert!(p.open(jid("a@x/r"), Waiting::Request(reply), Duration::from_secs(9)).is_ok());
        let late = p.late(Instant::now());
        assert_eq!(late.len(), 1);
        assert!(matches!(&late[0].1, RequestError::Timeout { to, seconds: 0 } if to == "a@x/r"));
        p.abandon();
        assert_eq!(abandoned.try_recv(), Ok(Err(RequestError::Unknown)));
    }

    #[test]
    fn questions_are_bounded() {
        let mut p = Pending::new();
        for _ in 0..PENDING_MAX {
            assert!(p.open(jid("a@x/r"), Waiting::SelfPing, Duration::ZERO).is_ok());
        }
        assert!(p.open(jid("a@x/r"), Waiting::SelfPing, Duration::ZERO).is_err());
    }
}
