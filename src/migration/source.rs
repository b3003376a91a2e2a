//! The source's side of a cold migration: a pure machine.
//!
//! ```text
//!  Checking -> Reserving -> Scanning(1) -> Staging(1) -> ... more passes while they carry much ...
//!                                              |
//!                                              v
//!              Stopping -> Scanning(last) -> Staging(last) -> GivingUp -> HandingOver -> Released
//!                                                                              |
//!   before GivingUp every denial, failure or cancel leads to                   v
//!   Abandoned: target told, VM runs here if it is to                     TakingBack -> Abandoned
//! ```
//!
//! The point of no return is the effect [`Effect::GiveUp`]: its runner records durably that the VM
//! is no longer ours and only then signs. From there the machine asks the target for ever, until
//! a receipt or a signed return comes back; no silence, no denial and no restart ends it.

use crate::types::PeerText;
use crate::vm::MapRef;

use super::handover::{Receipt, Return, SignedHandOver};
use super::message::{Answer, Denial, DenialCode, Pass, RequestBody, StageAccount};

/// Pre-passes while the VM runs; each carries what changed during the one before.
const PRE_PASSES_MAX: u32 = 4;
/// A pass that carried less than this is followed by the switch-over.
const PASS_BYTES_SMALL: u64 = 8 << 20;
/// Unanswered requests in a row before an unfinished move is abandoned.
const UNANSWERED_MAX: u32 = 40;
/// Unanswered requests in a row before a guest that is held still goes on.
const UNANSWERED_HELD_MAX: u32 = 5;
/// Times the whole staging is begun again because the target forgot it.
const RESTARTS_MAX: u32 = 3;
const WAIT_MS: u64 = 250;
/// The longer a pass takes while the guest runs on, the less often it is asked about: about once in a tenth of the
/// time that it has taken.
const WAIT_MS_MAX: u64 = 2000;
/// From so many answers on the wait is the longest.
const WORKING_MAX: u32 = 28;
const WAIT_SWITCH_OVER_MS: u64 = 50;
const WAIT_UNANSWERED_MS: u64 = 2000;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Phase {
    Checking,
    Reserving,
    Scanning { pass: u32, last: bool },
    Staging(Pass),
    Stopping,
    GivingUp,
    HandingOver,
    TakingBack,
    Released,
    Abandoned,
}

impl Phase {
    /// Whether the hand-over can still be called off.
    pub fn can_cancel(self) -> bool {
        !matches!(
            self,
            Phase::GivingUp | Phase::HandingOver | Phase::TakingBack | Phase::Released | Phase::Abandoned
        )
    }

    pub fn ended(self) -> bool {
        matches!(self, Phase::Released | Phase::Abandoned)
    }
}

/// What happened.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    Begin,
    Checked(Result<(), Denial>),
    Answered(Box<Answer>),
    /// No answer in time, or the target is not online.
    Unanswered,
    Scanned(Result<(MapRef, MapRef), Denial>),
    Stopped(Result<(), Denial>),
    /// The guest stands still, or why not.
    Held(Result<(), Denial>),
    /// As long as one move may hold it has passed since it was first held.
    HoldOver,
    /// `Err` only if it is certain that nothing was recorded.
    GaveUp(Result<SignedHandOver, Denial>),
    TookBack(Result<(), Denial>),
    /// The wait asked for is over.
    Timer,
    /// The target answers and fetches nothing: by what was sent, not by what it says.
    Stalled,
    Cancel,
}

/// What to do; each effect up to [`Effect::Wait`] is answered by one event.
#[derive(Clone, PartialEq, Debug)]
pub enum Effect {
    /// Ask the target whether it can take the VM.
    Check,
    AskReservation,
    /// Hash the disks; the VM is stopped when `last`.
    Scan {
        pass: u32,
        last: bool,
    },
    AskInitialization(Pass),
    Stop,
    /// Pause the guest.
    Suspend,
    /// Record durably that the VM is the target's under the next epoch, then sign.
    GiveUp(Pass),
    AskStart(SignedHandOver),
    /// Record durably that the VM is ours again, under the epoch after the returned one.
    TakeBack(Return),
    Wait {
        ms: u64,
    },
    /// Let a paused guest go on.
    Resume,
    /// Start the VM again: it is to run, and was stopped for the migration.
    Restart,
    TellCancel,
    /// The target owns it: keep the copy for the grace period, then scrub it.
    Release {
        receipt: Receipt,
        running: bool,
        problem: Option<PeerText>,
        account: StageAccount,
    },
    /// Over, without a hand-over.
    Abandon(End),
}

/// Why a migration ended without a hand-over. Only the source itself says that it was called off.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum End {
    /// The operator called it off.
    Cancelled,
    /// The target or this cloud could not, or would not.
    Denied(Denial),
}

/// Whether the guest stands still although the VM runs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Hold {
    No,
    Pausing,
    Held,
}

/// A VM as a move finds it. What is wanted of it and what it does are two things: one whose start failed is to run
/// and does not; one whose end a broker did not live to see is not to run, and does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Found {
    /// It is to run, wherever it is.
    pub to_run: bool,
    /// A guest is to be shut down before the last pass.
    pub is_up: bool,
}

/// The machine. `step` never blocks, never fails and treats an event that does not fit as noise:
/// a late answer of an earlier try must not disturb.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Source {
    phase: Phase,
    found: Found,
    stopped: bool,
    /// No more passes while the VM runs.
    hurry: bool,
    hold: Hold,
    /// The guest was held for as long as one move may hold it.
    hold_spent: bool,
    /// Why the guest could not be held, until somebody asks again.
    not_held: Option<Denial>,
    unanswered: u32,
    /// How often the target was still at the pass under way.
    working: u32,
    restarts: u32,
    next_pass: u32,
    delivered_bytes: u64,
    signed: Option<SignedHandOver>,
    /// How it is to end once what is under way is over.
    end: Option<End>,
}

impl Source {
    /// A migration about to begin.
    pub fn new(found: Found) -> Self {
        Self {
            phase: Phase::Checking,
            found,
            stopped: !found.is_up,
            hurry: false,
            hold: Hold::No,
            hold_spent: false,
            not_held: None,
            unanswered: 0,
            working: 0,
            restarts: 0,
            next_pass: 1,
            delivered_bytes: 0,
            signed: None,
            end: None,
        }
    }

    /// A migration found after a restart of the broker, given up but not acknowledged.
    pub fn resume(to_run: bool, signed: SignedHandOver) -> (Self, Vec<Effect>) {
        // What is to run did, as far as anybody remembers.
        let mut s = Self::new(Found { to_run, is_up: to_run });
        s.phase = Phase::HandingOver;
        s.stopped = true;
        s.signed = Some(signed.clone());
        (s, vec![Effect::AskStart(signed)])
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether the VM is to run at the target, and here if it does not leave.
    pub fn to_run(&self) -> bool {
        self.found.to_run
    }

    /// Whether a guest ran here when the move began.
    pub fn was_up(&self) -> bool {
        self.found.is_up
    }

    /// Unanswered requests in a row: more than a few mean the owner is in doubt while handing over.
    pub fn unanswered(&self) -> u32 {
        self.unanswered
    }

    /// Whether the guest is held still.
    pub fn held(&self) -> bool {
        self.hold == Hold::Held
    }

    /// `stop` or `suspend`, asked by the target or by an operator here. Repeating changes nothing.
    pub fn asked(&mut self, request: &RequestBody) -> (Answer, Vec<Effect>) {
        let deny = |code, text| (Answer::Denied(Denial::new(code, text)), Vec::new());
        match (request, self.phase) {
            (_, Phase::Released | Phase::Abandoned) => {
                deny(DenialCode::UnknownMigration, "the migration has ended")
            }
            (_, Phase::GivingUp | Phase::HandingOver | Phase::TakingBack) => {
                deny(DenialCode::OutOfOrder, "the hand-over has begun")
            }
            (RequestBody::Stop | RequestBody::Suspend, _) if self.stopped => (Answer::Stopped, Vec::new()),
            (RequestBody::Stop, _) | (RequestBody::Suspend, Phase::Stopping) => {
                self.hurry = true;
                (Answer::Stopping, Vec::new())
            }
            (RequestBody::Suspend, _) => match (self.hold, self.not_held.take()) {
                (Hold::Held, _) => (Answer::Suspended, Vec::new()),
                (Hold::Pausing, _) => (Answer::Suspending, Vec::new()),
                (Hold::No, Some(denial)) => (Answer::Denied(denial), Vec::new()),
                (Hold::No, None) if self.hold_spent => {
                    deny(DenialCode::Policy, "the guest was held still for as long as one move may hold it")
                }
                (Hold::No, None) => {
                    self.hold = Hold::Pausing;
                    (Answer::Suspending, vec![Effect::Suspend])
                }
            },
            _ => deny(DenialCode::NotYours, "only the source of a migration asks this of its target"),
        }
    }

    pub fn step(&mut self, event: Event) -> Vec<Effect> {
        if matches!(event, Event::Answered(_)) {
            self.unanswered = 0;
        }
        match (self.phase, event) {
            (Phase::Checking, Event::Begin) => vec![Effect::Check],
            (Phase::Checking, Event::Checked(Ok(()))) => self.reserve(),
            (Phase::Checking, Event::Checked(Err(d)))
            | (Phase::Scanning { .. }, Event::Scanned(Err(d)))
            | (Phase::Stopping, Event::Stopped(Err(d))) => {
                let end = self.end.take().unwrap_or(End::Denied(d));
                self.abandon(end)
            }

            // A guest that is switching off cannot be started: the stop is awaited, then undone.
            (Phase::Stopping, Event::Cancel) => {
                self.end = Some(End::Cancelled);
                Vec::new()
            }
            (phase, Event::Cancel) if phase.can_cancel() => self.abandon(End::Cancelled),

            (phase, Event::Held(result)) if self.hold == Hold::Pausing => {
                self.hold = if result.is_ok() { Hold::Held } else { Hold::No };
                self.not_held = result.err();
                let over = self.hold_spent;
                match phase {
                    // The stop has waited for this.
                    Phase::Stopping => match self.end.take() {
                        None => vec![Effect::Stop],
                        Some(end) => self.abandon(end),
                    },
                    // Too late: its time was over before it stood still.
                    phase if phase.ended() || over => self.let_go(),
                    _ => Vec::new(),
                }
            }
            // A stop makes a paused guest go on by itself.
            (phase, Event::HoldOver) => {
                self.hold_spent = true;
                if phase == Phase::Stopping { Vec::new() } else { self.let_go() }
            }

            (Phase::Reserving, Event::Answered(a)) => match *a {
                Answer::Reserved { .. } => self.scan(),
                other => self.unexpected(other),
            },

            (Phase::Scanning { pass, last }, Event::Scanned(Ok((root_delta, user_data)))) => {
                let pass = Pass { number: pass, last, root_delta, user_data };
                self.phase = Phase::Staging(pass);
                self.working = 0;
                vec![Effect::AskInitialization(pass)]
            }

            (Phase::Staging(pass), Event::Answered(a)) => match *a {
                Answer::Working(_) if pass.last => vec![Effect::Wait { ms: WAIT_SWITCH_OVER_MS }],
                Answer::Working(_) if self.hold != Hold::No => vec![Effect::Wait { ms: WAIT_MS }],
                Answer::Working(_) => {
                    let ms = (WAIT_MS + WAIT_MS * u64::from(self.working / 4)).min(WAIT_MS_MAX);
                    self.working = (self.working + 1).min(WORKING_MAX);
                    vec![Effect::Wait { ms }]
                }
                Answer::Staged { pass: n, account } if n == pass.number => self.staged(pass, account),
                other => self.unexpected(other),
            },
            (Phase::Staging(pass), Event::Stalled) => {
                let why = match pass.last {
                    true => "the target brought its copy no further while the VM stood still for it",
                    false => "the target brought its copy no further",
                };
                self.abandon(End::Denied(Denial::new(DenialCode::Other, why)))
            }
            (Phase::Staging(pass), Event::Timer) => vec![Effect::AskInitialization(pass)],
            (Phase::Reserving, Event::Timer) => vec![Effect::AskReservation],

            (Phase::Reserving | Phase::Staging(_), Event::Unanswered) => {
                self.unanswered += 1;
                if self.unanswered < UNANSWERED_MAX {
                    // A target that is gone must not keep the guest from going on.
                    let silent = self.unanswered >= UNANSWERED_HELD_MAX;
                    let mut effects = if silent { self.let_go() } else { Vec::new() };
                    effects.push(Effect::Wait { ms: WAIT_UNANSWERED_MS });
                    effects
                } else {
                    self.abandon(End::Denied(Denial::new(DenialCode::Other, "the target stopped answering")))
                }
            }

            (Phase::Stopping, Event::Stopped(Ok(()))) => {
                (self.stopped, self.hold) = (true, Hold::No);
                match self.end.take() {
                    None => self.scan(),
                    Some(end) => self.abandon(end),
                }
            }

            (Phase::GivingUp, Event::GaveUp(Ok(signed))) => {
                self.phase = Phase::HandingOver;
                self.signed = Some(signed.clone());
                vec![Effect::AskStart(signed)]
            }
            // Nothing was signed, so nothing was given up.
            (Phase::GivingUp, Event::GaveUp(Err(d))) => self.abandon(End::Denied(d)),

            (Phase::HandingOver, Event::Answered(a)) => match *a {
                Answer::Started { receipt, running, problem, account } => {
                    self.phase = Phase::Released;
                    vec![Effect::Release { receipt, running, problem, account }]
                }
                Answer::Returned { back, denial } => {
                    self.phase = Phase::TakingBack;
                    self.end = Some(End::Denied(denial));
                    vec![Effect::TakeBack(back)]
                }
                Answer::Working(_) => vec![Effect::Wait { ms: WAIT_SWITCH_OVER_MS }],
                // Only a signed return ends this; a bare denial proves nothing.
                _ => vec![Effect::Wait { ms: WAIT_UNANSWERED_MS }],
            },
            (Phase::HandingOver, Event::Unanswered) => {
                self.unanswered += 1;
                vec![Effect::Wait { ms: WAIT_UNANSWERED_MS }]
            }
            (Phase::HandingOver, Event::Timer) => {
                self.signed.clone().map(Effect::AskStart).into_iter().collect()
            }

            (Phase::TakingBack, Event::TookBack(Ok(()))) => {
                let given_back = || Denial::new(DenialCode::Other, "the target gave the VM back");
                let end = self.end.take().unwrap_or_else(|| End::Denied(given_back()));
                self.phase = Phase::Abandoned;
                let mut effects = vec![Effect::Abandon(end)];
                if self.found.to_run {
                    effects.insert(0, Effect::Restart);
                }
                effects
            }
            // The return could not be recorded, or is not valid: keep asking.
            (Phase::TakingBack, Event::TookBack(Err(_))) => {
                self.phase = Phase::HandingOver;
                vec![Effect::Wait { ms: WAIT_UNANSWERED_MS }]
            }

            _ => Vec::new(),
        }
    }

    fn reserve(&mut self) -> Vec<Effect> {
        self.phase = Phase::Reserving;
        vec![Effect::AskReservation]
    }

    /// The next look at the disks: the last one once the VM is stopped.
    fn scan(&mut self) -> Vec<Effect> {
        let (pass, last) = (self.next_pass, self.stopped);
        self.next_pass += 1;
        self.phase = Phase::Scanning { pass, last };
        vec![Effect::Scan { pass, last }]
    }

    fn staged(&mut self, pass: Pass, account: StageAccount) -> Vec<Effect> {
        if pass.last {
            self.phase = Phase::GivingUp;
            return vec![Effect::GiveUp(pass)];
        }
        let delivered = account.root_delta_bytes.saturating_add(account.user_data_bytes);
        let carried = delivered.saturating_sub(self.delivered_bytes);
        self.delivered_bytes = delivered;
        if carried > PASS_BYTES_SMALL && pass.number < PRE_PASSES_MAX && !self.hurry {
            return self.scan();
        }
        self.phase = Phase::Stopping;
        // A guest paused while it switches off would never be off.
        if self.hold == Hold::Pausing { Vec::new() } else { vec![Effect::Stop] }
    }

    fn unexpected(&mut self, answer: Answer) -> Vec<Effect> {
        match answer {
            // It restarted or the lease ran out: what it fetched is still in its repository, so
            // beginning again costs little.
            Answer::Denied(d) if d.code == DenialCode::UnknownMigration && self.restarts < RESTARTS_MAX => {
                self.restarts += 1;
                self.delivered_bytes = 0;
                // All is fetched anew: too long to stand still for.
                let mut effects = self.let_go();
                effects.extend(self.reserve());
                effects
            }
            Answer::Denied(d) => self.abandon(End::Denied(d)),
            // An answer to an earlier request that was repeated.
            _ => vec![Effect::Wait { ms: WAIT_MS }],
        }
    }

    fn let_go(&mut self) -> Vec<Effect> {
        match std::mem::replace(&mut self.hold, Hold::No) {
            Hold::Held => vec![Effect::Resume],
            // Told when it stands still.
            hold => {
                self.hold = hold;
                Vec::new()
            }
        }
    }

    fn abandon(&mut self, end: End) -> Vec<Effect> {
        let mut effects = vec![Effect::TellCancel];
        // A stop that failed may have come half-way; starting a VM that runs changes nothing. What stood still before
        // waits for its start as it did.
        let Found { to_run, is_up } = self.found;
        if to_run && is_up && (self.stopped || self.phase == Phase::Stopping) {
            effects.push(Effect::Restart);
        } else {
            effects.extend(self.let_go());
        }
        self.phase = Phase::Abandoned;
        effects.push(Effect::Abandon(end));
        effects
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> MapRef {
        MapRef { block_size_bytes: 4096, disk_size_bytes: 1 << 20, root: None }
    }

    fn answered(a: Answer) -> Event {
        Event::Answered(Box::new(a))
    }

    fn until_staging(runs: bool) -> Source {
        staging(Found { to_run: runs, is_up: runs })
    }

    fn staging(found: Found) -> Source {
        let mut s = Source::new(found);
        assert_eq!(s.step(Event::Begin), [Effect::Check]);
        assert_eq!(s.step(Event::Checked(Ok(()))), [Effect::AskReservation]);
        let scan = s.step(answered(Answer::Reserved { expires_in_s: 60, reservation: None, known: None }));
        assert_eq!(scan, [Effect::Scan { pass: 1, last: !found.is_up }]);
        assert!(matches!(s.step(Event::Scanned(Ok((map(), map()))))[..], [Effect::AskInitialization(_)]));
        s
    }

    fn staged(pass: u32, bytes: u64) -> Event {
        let account = StageAccount { user_data_bytes: bytes, ..Default::default() };
        answered(Answer::Staged { pass, account })
    }

    #[test]
    fn passes_repeat_while_they_carry_much() {
        let mut s = until_staging(true);
        assert_eq!(s.step(staged(1, 1 << 30)), [Effect::Scan { pass: 2, last: false }]);
        s.step(Event::Scanned(Ok((map(), map()))));
        assert_eq!(s.step(staged(2, (1 << 30) + 5)), [Effect::Stop]);
        assert_eq!(s.step(Event::Stopped(Ok(()))), [Effect::Scan { pass: 3, last: true }]);
        s.step(Event::Scanned(Ok((map(), map()))));
        assert!(matches!(s.step(staged(3, 1 << 31))[..], [Effect::GiveUp(_)]));
        assert!(s.step(Event::Cancel).is_empty(), "too late");
    }

    #[test]
    fn a_vm_stands_still_for_no_target_that_stalls() {
        // While it runs a pass that brings nothing ends as well, and the VM is not touched.
        let effects = until_staging(true).step(Event::Stalled);
        assert!(matches!(effects[..], [Effect::TellCancel, Effect::Abandon(_)]), "{effects:?}");
        let mut s = until_staging(true);
        s.step(staged(1, 0));
        s.step(Event::Stopped(Ok(())));
        s.step(Event::Scanned(Ok((map(), map()))));
        let effects = s.step(Event::Stalled);
        assert!(
            matches!(effects[..], [Effect::TellCancel, Effect::Restart, Effect::Abandon(_)]),
            "{effects:?}"
        );
    }

    #[test]
    fn a_stopped_vm_is_staged_once_and_not_started_again() {
        let mut s = until_staging(false);
        let effects = s.step(Event::Cancel);
        assert!(matches!(effects[..], [Effect::TellCancel, Effect::Abandon(_)]), "{effects:?}");
    }

    #[test]
    fn what_is_to_run_and_does_not_is_not_stopped_first_nor_started_by_a_move_that_fails() {
        let mut s = staging(Found { to_run: true, is_up: false });
        assert!(s.to_run() && !s.was_up());
        assert_eq!(s.asked(&RequestBody::Stop).0, Answer::Stopped);
        let effects = s.clone().step(Event::Cancel);
        assert!(matches!(effects[..], [Effect::TellCancel, Effect::Abandon(_)]), "{effects:?}");
        let effects = s.step(staged(1, 0));
        assert!(matches!(effects[..], [Effect::GiveUp(_)]), "{effects:?}");
    }

    #[test]
    fn what_runs_and_is_not_to_is_stopped_and_stays_so() {
        let found = Found { to_run: false, is_up: true };
        let mut s = staging(found);
        assert_eq!(s.step(staged(1, 0)), [Effect::Stop]);
        let effects = s.clone().step(Event::Stopped(Err(Denial::new(DenialCode::Other, "hangs"))));
        assert!(matches!(effects[..], [Effect::TellCancel, Effect::Abandon(_)]), "{effects:?}");
        assert_eq!(s.step(Event::Stopped(Ok(()))), [Effect::Scan { pass: 2, last: true }]);
        let effects = s.step(Event::Cancel);
        assert!(matches!(effects[..], [Effect::TellCancel, Effect::Abandon(_)]), "{effects:?}");
        // Held still meanwhile, it is let go.
        let mut s = staging(found);
        s.asked(&RequestBody::Suspend);
        s.step(Event::Held(Ok(())));
        s.step(staged(1, 0));
        let effects = s.step(Event::Stopped(Err(Denial::new(DenialCode::Other, "hangs"))));
        assert!(
            matches!(effects[..], [Effect::TellCancel, Effect::Resume, Effect::Abandon(_)]),
            "{effects:?}"
        );
    }

    #[test]
    fn every_denial_before_the_hand_over_leaves_the_vm_running() {
        let denied = || answered(Answer::Denied(Denial::new(DenialCode::Memory, "none")));
        let mut s = until_staging(true);
        assert!(matches!(s.step(denied())[..], [Effect::TellCancel, Effect::Abandon(_)]));
        let mut s = until_staging(true);
        s.step(staged(1, 0));
        s.step(Event::Stopped(Ok(())));
        s.step(Event::Scanned(Ok((map(), map()))));
        assert!(matches!(s.step(denied())[..], [Effect::TellCancel, Effect::Restart, Effect::Abandon(_)]));
        assert!(s.step(staged(2, 0)).is_empty(), "a late answer changes nothing");
    }

    #[test]
    fn a_target_cannot_say_that_the_operator_cancelled() {
        let said = Denial::new(DenialCode::Other, "cancelled by the operator");
        let effects = until_staging(true).step(answered(Answer::Denied(said.clone())));
        assert_eq!(effects.last(), Some(&Effect::Abandon(End::Denied(said.clone()))));
        let effects = until_staging(true).step(Event::Cancel);
        assert_eq!(effects.last(), Some(&Effect::Abandon(End::Cancelled)));
        let mut s = Source::new(Found { to_run: true, is_up: true });
        s.step(Event::Begin);
        assert_eq!(
            s.step(Event::Checked(Err(said.clone()))).last(),
            Some(&Effect::Abandon(End::Denied(said)))
        );
    }

    #[test]
    fn a_cancel_while_the_guest_switches_off_waits_for_it() {
        for stopped in [Ok(()), Err(Denial::new(DenialCode::Other, "hangs"))] {
            let mut s = until_staging(true);
            assert_eq!(s.step(staged(1, 0)), [Effect::Stop]);
            assert!(s.step(Event::Cancel).is_empty());
            let effects = s.step(Event::Stopped(stopped));
            assert!(matches!(effects[..], [Effect::TellCancel, Effect::Restart, Effect::Abandon(_)]));
        }
    }

    fn held() -> Source {
        let mut s = until_staging(true);
        assert_eq!(s.asked(&RequestBody::Suspend), (Answer::Suspending, vec![Effect::Suspend]));
        assert_eq!(s.asked(&RequestBody::Suspend), (Answer::Suspending, Vec::new()), "paused once");
        assert!(s.step(Event::Held(Ok(()))).is_empty());
        assert_eq!(s.asked(&RequestBody::Suspend), (Answer::Suspended, Vec::new()));
        s
    }

    fn denied(answer: &Answer) -> Option<DenialCode> {
        match answer {
            Answer::Denied(d) => Some(d.code),
            _ => None,
        }
    }

    #[test]
    fn a_stop_ends_the_passes() {
        let mut s = until_staging(true);
        assert_eq!(s.asked(&RequestBody::Stop), (Answer::Stopping, Vec::new()));
        assert_eq!(s.step(staged(1, 1 << 30)), [Effect::Stop]);
        assert_eq!(s.asked(&RequestBody::Stop).0, Answer::Stopping);
        assert_eq!(s.asked(&RequestBody::Suspend), (Answer::Stopping, Vec::new()));
        s.step(Event::Stopped(Ok(())));
        assert_eq!(s.asked(&RequestBody::Stop).0, Answer::Stopped);
        s.step(Event::Scanned(Ok((map(), map()))));
        assert!(matches!(s.step(staged(2, 1 << 30))[..], [Effect::GiveUp(_)]));
        for request in [RequestBody::Stop, RequestBody::Suspend] {
            assert_eq!(denied(&s.asked(&request).0), Some(DenialCode::OutOfOrder), "too late");
        }
        let cancel = RequestBody::Cancel { reason: PeerText::default() };
        assert_eq!(denied(&until_staging(true).asked(&cancel).0), Some(DenialCode::NotYours));
    }

    #[test]
    fn a_held_guest_goes_on_whatever_ends_the_hold() {
        let mut s = held();
        let effects = s.step(Event::Cancel);
        assert!(
            matches!(effects[..], [Effect::TellCancel, Effect::Resume, Effect::Abandon(_)]),
            "{effects:?}"
        );
        assert_eq!(denied(&s.asked(&RequestBody::Suspend).0), Some(DenialCode::UnknownMigration));

        assert_eq!(held().step(Event::HoldOver), [Effect::Resume]);
        let forgot = Denial::new(DenialCode::UnknownMigration, "?");
        assert_eq!(held().step(answered(Answer::Denied(forgot))), [Effect::Resume, Effect::AskReservation]);

        let mut s = held();
        let goes_on = (0..UNANSWERED_MAX).position(|_| s.step(Event::Unanswered).contains(&Effect::Resume));
        assert_eq!(goes_on, Some(UNANSWERED_HELD_MAX as usize - 1));
        assert!(!s.held());

        // Switched over, it is stopped, and started should that fail.
        let mut s = held();
        assert_eq!(s.step(staged(1, 0)), [Effect::Stop]);
        assert!(s.step(Event::HoldOver).is_empty());
        let effects = s.step(Event::Stopped(Err(Denial::new(DenialCode::Other, "hangs"))));
        assert!(
            matches!(effects[..], [Effect::TellCancel, Effect::Restart, Effect::Abandon(_)]),
            "{effects:?}"
        );
    }

    /// However often it is asked: a target that renews its hold gets one time in all.
    #[test]
    fn a_guest_is_held_for_one_time_in_each_move() {
        let mut s = held();
        assert_eq!(s.step(Event::HoldOver), [Effect::Resume]);
        let (answer, effects) = s.asked(&RequestBody::Suspend);
        assert!(denied(&answer) == Some(DenialCode::Policy) && effects.is_empty());
        // Its time runs out while the guest is being paused.
        let mut s = until_staging(true);
        s.asked(&RequestBody::Suspend);
        assert!(s.step(Event::HoldOver).is_empty());
        assert_eq!(s.step(Event::Held(Ok(()))), [Effect::Resume]);
        assert!(!s.held());
    }

    #[test]
    fn a_stop_waits_for_a_pause_under_way() {
        for result in [Ok(()), Err(Denial::new(DenialCode::Unsupported, "cannot"))] {
            let mut s = until_staging(true);
            s.asked(&RequestBody::Suspend);
            assert!(s.step(staged(1, 0)).is_empty());
            assert_eq!(s.step(Event::Held(result)), [Effect::Stop]);
        }
        // Ended meanwhile, it is not left paused.
        let mut s = until_staging(true);
        s.asked(&RequestBody::Suspend);
        s.step(Event::Cancel);
        assert_eq!(s.step(Event::Held(Ok(()))), [Effect::Resume]);
    }

    #[test]
    fn why_a_guest_cannot_be_held_is_told_once() {
        let mut s = until_staging(true);
        s.asked(&RequestBody::Suspend);
        s.step(Event::Held(Err(Denial::new(DenialCode::Unsupported, "cannot"))));
        assert_eq!(denied(&s.asked(&RequestBody::Suspend).0), Some(DenialCode::Unsupported));
        assert_eq!(s.asked(&RequestBody::Suspend).1, [Effect::Suspend], "then it is tried again");
        let mut s = until_staging(false);
        assert_eq!(s.asked(&RequestBody::Suspend), (Answer::Stopped, Vec::new()));
    }

    #[test]
    fn a_target_that_forgot_is_asked_again_a_few_times() {
        let forgot = || answered(Answer::Denied(Denial::new(DenialCode::UnknownMigration, "?")));
        let mut s = until_staging(true);
        for n in 0..RESTARTS_MAX {
            assert_eq!(s.step(forgot()), [Effect::AskReservation], "{n}");
        }
        assert!(matches!(s.step(forgot())[..], [Effect::TellCancel, Effect::Abandon(_)]));
    }
}
