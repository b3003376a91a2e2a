//! Keeping the stanza stream connected: logs in again after every loss, and backs off across
//! failed and short-lived logins alike.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio_xmpp::stanzastream::{Connection, StanzaStream};
use xmpp_parsers::jid::Jid;

use crate::types::PeerText;

use super::connector::Connector;
use super::outbox::STREAM_DEPTH;

const WAIT_FIRST: Duration = Duration::from_millis(200);
const WAIT_MAX: Duration = Duration::from_secs(15);
/// After a refused password or an impostor, which only an operator can mend.
const WAIT_REFUSED: Duration = Duration::from_secs(30);
/// A link that lived shorter than this died of something that will happen again.
const SHORT_LIFE: Duration = Duration::from_secs(2);
/// Short lives in a row after which it is no accident.
const SHORT_LIVES_TOLD: u32 = 4;

/// A login failed, or one after the other does not last. The next attempt follows by itself.
#[derive(Debug)]
pub struct Trouble {
    pub reason: String,
    /// Only an operator can mend it.
    pub refused: bool,
}

/// Set by the session when a connection became a session, so that one that never did is known.
pub type Ready = Arc<AtomicBool>;

/// The stream of `jid`, a full JID. Troubles are told by `troubles`, at the pace of the attempts.
pub fn stanza_stream(
    connector: Connector,
    jid: Jid,
    password: String,
    ready: Ready,
    troubles: mpsc::UnboundedSender<Trouble>,
) -> StanzaStream {
    let link = Arc::new(Link { connector, jid, password, ready, troubles, history: Mutex::default() });
    let connect = move |_location, slot| drop(tokio::spawn(link.clone().connect(slot)));
    StanzaStream::new(Box::new(connect), STREAM_DEPTH)
}

struct Link {
    connector: Connector,
    jid: Jid,
    password: String,
    ready: Ready,
    troubles: mpsc::UnboundedSender<Trouble>,
    history: Mutex<History>,
}

#[derive(Default)]
struct History {
    connected: Option<Instant>,
    backoff: Backoff,
}

impl Link {
    /// Fills the slot, however long it takes: a dropped slot ends the stream.
    async fn connect(self: Arc<Self>, mut slot: oneshot::Sender<Connection>) {
        let (wait, stillborn) = self.end_of_life();
        tokio::time::sleep(jittered(wait)).await;
        loop {
            match self.connector.login(&self.jid, &self.password).await {
                Ok((mut features, stream)) => {
                    // A restarted server refuses to resume in a form that xmpp-parsers 0.23 cannot
                    // read, which ends the connection: bind afresh then.
                    if stillborn {
                        features.stream_management = None;
                    }
                    self.ready.store(false, Ordering::SeqCst);
                    self.with_history(|h| {
                        h.connected = Some(Instant::now());
                        h.backoff.logged_in();
                    });
                    let stream = stream.box_stream();
                    let _ = slot.send(Connection { stream, features, identity: self.jid.clone() });
                    return;
                }
                Err(e) => {
                    let wait = self.with_history(|h| h.backoff.after_failure());
                    let refused = e.is_lasting();
                    self.tell(e.to_string(), refused);
                    tokio::time::sleep(jittered(if refused { WAIT_REFUSED } else { wait })).await;
                }
            }
            if self.troubles.is_closed() {
                // The session was closed. The stream takes a dropped slot for a fault, so wait for its end.
                return slot.closed().await;
            }
        }
    }

    /// Looks back on the last connection: how long to wait now, and whether it died before it
    /// became a session.
    fn end_of_life(&self) -> (Duration, bool) {
        let (connected, wait, short_lives) = self.with_history(|h| {
            let connected = h.connected.take();
            let wait = connected.map_or(Duration::ZERO, |t| h.backoff.after_life(t.elapsed()));
            (connected, wait, h.backoff.short_lives)
        });
        if short_lives >= SHORT_LIVES_TOLD {
            let reason = format!(
                "the session of {} ended {short_lives} times in a row soon after it began; does another broker use this account?",
                self.jid.to_bare()
            );
            self.tell(reason, false);
        }
        (wait, connected.is_some() && !self.ready.load(Ordering::SeqCst))
    }

    fn tell(&self, reason: String, refused: bool) {
        // It quotes the server.
        let reason = PeerText::from(reason).into();
        let _ = self.troubles.send(Trouble { reason, refused });
    }

    fn with_history<T>(&self, f: impl FnOnce(&mut History) -> T) -> T {
        // Nothing in here panics; should it, the history is still whole.
        f(&mut self.history.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

/// How long to wait before the next login.
#[derive(Debug, Default)]
struct Backoff {
    failures: u32,
    short_lives: u32,
}

impl Backoff {
    fn logged_in(&mut self) {
        self.failures = 0;
    }

    fn after_failure(&mut self) -> Duration {
        self.failures += 1;
        nth_wait(self.failures)
    }

    /// After a connection that lived so long. Two sessions that throw each other out live as long
    /// as the other waits: a life counts as long only well beyond the last wait.
    fn after_life(&mut self, lived: Duration) -> Duration {
        let last = if self.short_lives == 0 { Duration::ZERO } else { nth_wait(self.short_lives) };
        if lived >= SHORT_LIFE.max(4 * last) {
            self.short_lives = 0;
            return Duration::ZERO;
        }
        self.short_lives += 1;
        nth_wait(self.short_lives)
    }
}

fn nth_wait(n: u32) -> Duration {
    WAIT_FIRST.saturating_mul(1 << (n.saturating_sub(1)).min(16)).min(WAIT_MAX)
}

/// Up to a quarter more, so that brokers do not all come back in the same moment.
fn jittered(wait: Duration) -> Duration {
    wait + wait.mul_f32(random_fraction() / 4.0)
}

/// Between 0 and 1.
pub fn random_fraction() -> f32 {
    let mut byte = [0];
    // Without randomness everybody waits equally long, which only costs a moment.
    let _ = getrandom::fill(&mut byte);
    f32::from(byte[0]) / 255.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_back_off_to_a_limit_and_start_anew_after_a_login() {
        let mut b = Backoff::default();
        let waits: Vec<_> = (0..10).map(|_| b.after_failure().as_millis()).collect();
        assert_eq!(waits, [200, 400, 800, 1600, 3200, 6400, 12800, 15000, 15000, 15000]);
        b.logged_in();
        assert_eq!(b.after_life(Duration::from_millis(5)), WAIT_FIRST, "not the wait of the failures before");
        assert_eq!(b.after_failure(), WAIT_FIRST);
    }

    #[test]
    fn a_long_life_is_forgiven_at_once() {
        let mut b = Backoff::default();
        assert_eq!(b.after_life(Duration::from_secs(100)), Duration::ZERO);
    }

    #[test]
    fn two_sessions_that_throw_each_other_out_slow_down() {
        let (mut one, mut other) = (Backoff::default(), Backoff::default());
        let mut wait = Duration::from_millis(1);
        for _ in 0..20 {
            wait = one.after_life(wait);
            wait = other.after_life(wait);
        }
        assert_eq!(wait, WAIT_MAX);
    }
}
