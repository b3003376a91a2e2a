//! What another broker must be told or asked until it answers, however long it is away. An errand
//! is due when its member comes online, and else less and less often. The list itself is not kept:
//! a restart finds what is still to be said in the records.

use std::time::Duration;

use crate::clock::UnixMillis;
use crate::migration::{AnswerBody, RequestBody};
use crate::types::{MemberJid, MigrationId};

use super::Broker;
use super::effect::{Effect, Matter, Peer, Unanswered};
use super::pending::Pending;

const PAUSE_FIRST: Duration = Duration::from_secs(2);
const PAUSE_MAX: Duration = Duration::from_secs(300);

#[derive(Clone)]
pub struct Errand {
    peer: Peer,
    matter: Matter,
    body: RequestBody,
    due: UnixMillis,
    tries: u32,
    /// A request is on its way.
    asking: bool,
    /// What came of the last try.
    last: String,
}

impl Broker {
    /// Begins to tell `peer`, at once and until it answered. The errand takes the place of an
    /// earlier one of the same migration.
    pub(super) fn run_errand(&mut self, peer: Peer, matter: Matter, body: RequestBody) {
        let due = self.now;
        let last = "it has not answered yet".to_owned();
        let errand = Errand { peer, matter, body, due, tries: 0, asking: false, last };
        self.errands.insert(matter.migration, errand);
        self.run_due_errands();
    }

    pub(super) fn hurry_errands(&mut self, member: &MemberJid) {
        let now = self.now;
        for errand in self.errands.values_mut().filter(|e| e.peer.jid == *member) {
            (errand.due, errand.tries) = (now, 0);
        }
        self.run_due_errands();
    }

    pub(super) fn run_due_errands(&mut self) {
        let now = self.now;
        let keys = self.errands.values().map(|e| (e.peer.clone(), self.by_its_key_now(&e.peer)));
        let moved: Vec<_> = keys.filter(|(then, now)| then != now).collect();
        for errand in self.errands.values_mut() {
            if let Some((_, now)) = moved.iter().find(|(then, _)| *then == errand.peer) {
                errand.peer = now.clone();
            }
        }
        let mut asks = Vec::new();
        for (id, errand) in self.errands.iter_mut().filter(|(_, e)| e.due <= now && !e.asking) {
            errand.due = now.plus(pause(errand.tries));
            errand.tries += 1;
            errand.asking = true;
            asks.push((*id, errand.peer.clone(), errand.matter, Box::new(errand.body.clone())));
        }
        for (id, to, about, body) in asks {
            let token = self.expect(Pending::Errand(id));
            self.emit(Effect::Ask { token, to, about, body });
        }
    }

    pub(super) fn errand_answered(&mut self, id: MigrationId, answer: Result<AnswerBody, Unanswered>) {
        let Some(errand) = self.errands.get_mut(&id) else { return };
        errand.asking = false;
        let answer = match answer {
            Ok(answer) => answer,
            Err(Unanswered(why)) => return errand.last = why,
        };
        let (body, peer, vm) = (errand.body.clone(), errand.peer.clone(), errand.matter.vm);
        let done = match body {
            RequestBody::Delete { .. } => self.delete_answered(id, vm, &answer),
            _ => self.follow_answered(id, &peer, &answer),
        };
        if done {
            self.errands.remove(&id);
        } else if let Some(errand) = self.errands.get_mut(&id) {
            errand.last = match answer {
                AnswerBody::Denied(d) => format!("it answered: {}", d.text),
                _ => "it is still at it".into(),
            };
        }
    }

    /// What came of the last try to tell, if something is still to be told.
    pub(super) fn errand_words(&self, id: MigrationId) -> Option<String> {
        self.errands.get(&id).map(|e| e.last.clone())
    }
}

/// Doubles with every try, up to a limit.
fn pause(tries: u32) -> Duration {
    PAUSE_FIRST.saturating_mul(1 << tries.min(16)).min(PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_never_end() {
        let pauses: Vec<u64> = (0..10).map(|n| pause(n).as_secs()).collect();
        assert_eq!(pauses, [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        assert_eq!(pause(u32::MAX), PAUSE_MAX);
    }
}
