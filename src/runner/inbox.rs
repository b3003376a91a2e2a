//! What waits for the owner task. Requests of others have a lane of their own, which is bounded, for each
//! member and for all: who sends more than is worked off is refused there, and counted. What this cloud
//! itself began comes back by the other lane, which refuses nothing and goes first.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;

use crate::federation::Refused;
use crate::federation::refusals::{Refusals, Tally};
use crate::types::MemberJid;

use super::Input;

/// Requests that may wait, of one member and of all.
const REQUESTS_OF_MEMBER_MAX: usize = 64;
const REQUESTS_MAX: usize = 256;
/// News of the room that may wait before the session's reader pauses.
const NEWS_MAX: usize = 256;
const NEWS_PAUSE: Duration = Duration::from_millis(10);

/// The way to the owner task; clones share it.
#[derive(Clone)]
pub struct Inbox {
    own: mpsc::UnboundedSender<Input>,
    requests: mpsc::Sender<Input>,
    door: Arc<Mutex<Door>>,
}

/// The owner task's end.
pub struct Inputs {
    own: mpsc::UnboundedReceiver<Input>,
    requests: mpsc::Receiver<Input>,
    door: Arc<Mutex<Door>>,
}

/// The owner task has ended.
#[derive(Debug, thiserror::Error)]
#[error("the broker has stopped")]
pub struct Stopped;

#[derive(Default)]
struct Door {
    /// Requests that wait, by their sender.
    requests: BTreeMap<MemberJid, usize>,
    news: usize,
    tick: bool,
    refused: Refusals,
}

pub fn inbox() -> (Inbox, Inputs) {
    let (own, own_out) = mpsc::unbounded_channel();
    let (requests, requests_out) = mpsc::channel(REQUESTS_MAX);
    let door = Arc::<Mutex<Door>>::default();
    (Inbox { own, requests, door: door.clone() }, Inputs { own: own_out, requests: requests_out, door })
}

impl Inbox {
    /// Hands an input to the owner task. A request that finds its lane full is dropped, and with it the
    /// way to answer it.
    pub fn send(&self, input: Input) -> Result<(), Stopped> {
        match &input {
            Input::Asked { from, .. } => {
                let from = from.clone();
                return self.ask(&from, input);
            }
            // One that waits does for all.
            Input::Tick if std::mem::replace(&mut lock(&self.door).tick, true) => return Ok(()),
            Input::Room(_) => lock(&self.door).news += 1,
            _ => {}
        }
        self.own.send(input).map_err(|_| Stopped)
    }

    /// Waits until the owner task has caught up with what happens in the room.
    pub async fn news_read(&self) {
        while lock(&self.door).news >= NEWS_MAX && !self.own.is_closed() {
            tokio::time::sleep(NEWS_PAUSE).await;
        }
    }

    fn ask(&self, from: &MemberJid, input: Input) -> Result<(), Stopped> {
        let mut door = lock(&self.door);
        if door.requests.get(from).is_none_or(|n| *n < REQUESTS_OF_MEMBER_MAX) {
            match self.requests.try_send(input) {
                Ok(()) => {
                    *door.requests.entry(from.clone()).or_default() += 1;
                    return Ok(());
                }
                Err(mpsc::error::TrySendError::Closed(_)) => return Err(Stopped),
                Err(mpsc::error::TrySendError::Full(_)) => {}
            }
        }
        door.refused.add(&Tally { sender: from.to_string(), refused: Refused::RateLimit, count: 1 });
        Ok(())
    }

    /// What was refused here since the last call.
    pub(super) fn take_refused(&self) -> Vec<Tally> {
        lock(&self.door).refused.take_new()
    }
}

impl Inputs {
    /// The next input; none if nobody can send any more.
    pub(super) async fn next(&mut self) -> Option<Input> {
        let input = tokio::select! {
            biased;
            Some(input) = self.own.recv() => input,
            Some(input) = self.requests.recv() => input,
            else => return None,
        };
        let mut door = lock(&self.door);
        match &input {
            Input::Asked { from, .. } => {
                let waiting = door.requests.get_mut(from).map(|n| {
                    *n -= 1;
                    *n
                });
                if waiting == Some(0) {
                    door.requests.remove(from);
                }
            }
            Input::Tick => door.tick = false,
            Input::Room(_) => door.news -= 1,
            _ => {}
        }
        drop(door);
        Some(input)
    }
}

// A panic while it is held leaves a count that is wrong by one at most.
fn lock(door: &Mutex<Door>) -> MutexGuard<'_, Door> {
    door.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;
    use tokio::sync::oneshot::error::TryRecvError;

    use super::*;
    use crate::broker::RoomInput;

    fn asked(from: &str) -> (Input, oneshot::Receiver<Option<Vec<u8>>>) {
        let (reply, answer) = oneshot::channel();
        (Input::Asked { from: from.parse().unwrap(), payload: vec![0; 100], reply }, answer)
    }

    #[tokio::test]
    async fn a_flood_of_requests_is_bounded_for_each_and_for_all_refused_and_counted() {
        let (inbox, mut inputs) = inbox();
        let mut answers = Vec::new();
        for _ in 0..10_000 {
            let (input, answer) = asked("mallory@x");
            inbox.send(input).unwrap();
            answers.push(answer);
        }
        let waiting =
            answers.iter_mut().filter_map(|a| (a.try_recv() == Err(TryRecvError::Empty)).then_some(()));
        assert_eq!(waiting.count(), REQUESTS_OF_MEMBER_MAX, "the others are told at once");
        // Others are not kept out by one.
        let (input, mut answer) = asked("bob@x");
        inbox.send(input).unwrap();
        assert_eq!(answer.try_recv(), Err(TryRecvError::Empty));
        let expected = Tally {
            sender: "mallory@x".into(),
            refused: Refused::RateLimit,
            count: 10_000 - REQUESTS_OF_MEMBER_MAX as u64,
        };
        assert_eq!(inbox.take_refused(), [expected]);
        for n in 0..1000 {
            inbox.send(asked(&format!("{n}@x")).0).unwrap();
        }
        let all = REQUESTS_MAX - REQUESTS_OF_MEMBER_MAX - 1;
        assert_eq!(inbox.take_refused().iter().map(|t| t.count).sum::<u64>(), 1000 - all as u64);
        // What was worked off makes room.
        for _ in 0..REQUESTS_MAX {
            assert!(matches!(inputs.next().await, Some(Input::Asked { .. })));
        }
        assert!(lock(&inbox.door).requests.is_empty());
        inbox.send(asked("mallory@x").0).unwrap();
        assert_eq!(inbox.take_refused(), []);
    }

    #[tokio::test]
    async fn what_must_not_be_lost_arrives_through_a_flood_and_goes_first() {
        let (inbox, mut inputs) = inbox();
        for n in 0..1000 {
            inbox.send(asked(&format!("{}@x", n % 100)).0).unwrap();
        }
        for _ in 0..1000 {
            inbox.send(Input::Core(Box::new(crate::broker::Input::Tick))).unwrap();
            inbox.send(Input::Tick).unwrap();
        }
        inbox.send(Input::Shutdown).unwrap();
        let (mut outcomes, mut ticks) = (0, 0);
        loop {
            match inputs.next().await.unwrap() {
                Input::Core(_) => outcomes += 1,
                Input::Tick => ticks += 1,
                Input::Shutdown => break,
                _ => panic!("a request came before what this cloud began itself"),
            }
        }
        assert_eq!((outcomes, ticks), (1000, 1));
        inbox.send(Input::Tick).unwrap();
        assert!(
            matches!(inputs.next().await, Some(Input::Tick)),
            "a tick that was read is followed by others"
        );
    }

    #[tokio::test]
    async fn the_reader_of_the_room_waits_for_the_owner_task() {
        let (inbox, mut inputs) = inbox();
        for _ in 0..NEWS_MAX {
            inbox.send(Input::Room(RoomInput::Joined)).unwrap();
        }
        let wait = Duration::from_millis(100);
        assert!(tokio::time::timeout(wait, inbox.news_read()).await.is_err());
        inputs.next().await.unwrap();
        inbox.news_read().await;
        drop(inputs);
        assert!(inbox.send(Input::Tick).is_err());
    }
}
