//! Signatures of a simulated federation that another processor makes and checks while the first goes on: what is said
//! is on its way for a while, and only then looked at. Nothing that happens depends on who came to it first.

use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::clock::UnixMillis;
use crate::migration::{AnswerBody, Envelope, RequestBody};
use crate::types::{IdentityKey, MemberJid, PublicKey};

/// What is to be done.
pub(super) enum Chore {
    Seal { envelope: Box<Envelope<RequestBody>>, key: IdentityKey },
    Open { sealed: Vec<u8>, key: PublicKey, by: MemberJid, to: MemberJid, at: UnixMillis },
}

/// What came of it.
#[derive(Clone)]
pub(super) enum Made {
    Sealed(Option<Vec<u8>>),
    Opened(Option<Box<Envelope<AnswerBody>>>),
}

impl Chore {
    pub fn done(self) -> Made {
        match self {
            Chore::Seal { envelope, key } => Made::Sealed(envelope.seal(&key).ok()),
            Chore::Open { sealed, key, by, to, at } => {
                Made::Opened(Envelope::open(&sealed, &key, &by, &to, at).ok().map(Box::new))
            }
        }
    }
}

enum State {
    Waits(Box<Chore>),
    UnderWay,
    Over(Made),
}

/// A chore that whoever comes first does.
#[derive(Clone)]
pub(super) struct Order(Arc<(Mutex<State>, Condvar)>);

impl Order {
    pub fn new(job: Chore) -> Self {
        Self(Arc::new((Mutex::new(State::Waits(Box::new(job))), Condvar::new())))
    }

    /// Does it, unless somebody does or did.
    fn work_off(&self) {
        let (state, over) = &*self.0;
        let mut held = state.lock().unwrap_or_else(PoisonError::into_inner);
        if !matches!(*held, State::Waits(_)) {
            return;
        }
        let State::Waits(job) = std::mem::replace(&mut *held, State::UnderWay) else { return };
        drop(held);
        let made = job.done();
        *state.lock().unwrap_or_else(PoisonError::into_inner) = State::Over(made);
        over.notify_all();
    }

    /// What came of it; it is done now if nobody was at it.
    pub fn made(&self) -> Made {
        self.work_off();
        let (state, over) = &*self.0;
        let mut held = state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match &*held {
                State::Over(made) => return made.clone(),
                _ => held = over.wait(held).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// Another thread, which ends with the last world that knows it.
#[derive(Clone)]
pub(super) struct Helper(Sender<Order>);

impl Helper {
    /// `None` if there can be no other thread: then everything is done where it is needed.
    pub fn begin() -> Option<Self> {
        let (orders, taken) = mpsc::channel::<Order>();
        let work = move || taken.into_iter().for_each(|order| order.work_off());
        std::thread::Builder::new().name("signatures".into()).spawn(work).ok()?;
        Some(Self(orders))
    }

    pub fn order(&self, job: Chore) -> Order {
        let order = Order::new(job);
        // Without the thread it is done by whoever needs it.
        let _ = self.0.send(order.clone());
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::envelope::{LIFETIME, VERSION};
    use crate::sim::cloud::{jid_of, key_of};
    use crate::types::{MigrationId, VmId};

    #[test]
    fn whoever_comes_first_does_the_same() {
        let at = UnixMillis(1_000_000_000);
        let envelope = Envelope {
            version: VERSION,
            from: jid_of("a"),
            to: jid_of("b"),
            migration: MigrationId(uuid::Uuid::nil()),
            vm: VmId(uuid::Uuid::nil()),
            epoch: 1,
            nonce: "0".repeat(32),
            issued: at,
            expires: at.plus(LIFETIME),
            body: RequestBody::Owners { claims: Vec::new() },
        };
        let seal = || Chore::Seal { envelope: Box::new(envelope.clone()), key: key_of("a") };
        let here = envelope.seal(&key_of("a")).unwrap();
        let helper = Helper::begin().unwrap();
        let orders: Vec<Order> = (0..100).map(|_| helper.order(seal())).chain([Order::new(seal())]).collect();
        for order in &orders {
            assert!(matches!(order.made(), Made::Sealed(Some(sealed)) if sealed == here));
        }
        let spoilt = [&here[..64], b"{}"].concat();
        let open =
            Chore::Open { sealed: spoilt, key: key_of("a").public(), by: jid_of("a"), to: jid_of("b"), at };
        assert!(matches!(helper.order(open).made(), Made::Opened(None)));
    }
}
