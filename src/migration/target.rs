//! The target's side of a cold migration: a pure machine.
//!
//! ```text
//!  Reserved -> Staging(n) -> Staged(n) -> Staging(n+1) ... Staged(last)
//!      |           |            |                             | signed hand-over that fits
//!      +-----------+------------+--- lease over, cancel --+   v
//!                                                         |  TakingOver -> Starting -> Owned
//!                                                         v
//!                                                     Abandoned (what passes brought is kept for a lease)
//! ```
//!
//! Every request gets exactly one answer at once; work that takes time is answered `working` and
//! the source asks again, so lost and repeated messages do no harm. The VM is run only after the
//! effect [`Effect::TakeOver`] has durably recorded the ownership.

use crate::types::{LinkId, MemberJid, PeerText, PublicKey, RecipeId, ReservationId};

use super::handover::{HandOver, Receipt, SignedHandOver};
use super::message::{Answer, Denial, DenialCode, Initialization, Pass, Progress, RequestBody, StageAccount};

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Phase {
    Reserved,
    Staging(Pass),
    Staged(Pass),
    TakingOver,
    Starting,
    Owned,
    Abandoned,
}

/// What happened here or was asked by the source.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    Asked(Box<RequestBody>),
    StageFinished(Result<StageAccount, Denial>),
    StageProgress(Progress),
    /// `Err` only if it is certain that nothing was recorded.
    TookOver(Result<Receipt, Denial>),
    /// `Err` tells why the VM does not run although it is ours.
    Started(Result<(), String>),
    Booted {
        boot_ms: Option<u64>,
    },
    LeaseExpired,
}

#[derive(Clone, PartialEq, Debug)]
pub enum Effect {
    /// Exactly one for every `Asked`.
    Answer(Box<Answer>),
    Stage(Box<Initialization>),
    /// Record durably that the VM is ours under this hand-over's epoch, then countersign.
    TakeOver(SignedHandOver),
    Start,
    /// Tell the source that the VM is ours: it runs, or failed to.
    AskDelete {
        boot_ms: Option<u64>,
    },
    /// Stop staging and remove all that was made for this migration.
    CleanUp,
}

/// What the migration is about, fixed by the reservation.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Agreement {
    pub source: MemberJid,
    pub source_key: PublicKey,
    pub target: MemberJid,
    pub target_key: PublicKey,
    pub migration: crate::types::MigrationId,
    pub vm: crate::types::VmId,
    /// The VM's epoch at the source as it says: only a hand-over counts.
    pub epoch: u64,
    pub recipe: RecipeId,
    /// Of this reservation alone; a hand-over of version 2 names it.
    pub reservation: ReservationId,
    /// The last link of the VM's history that was known here before.
    pub known: Option<LinkId>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Target {
    phase: Phase,
    agreement: Agreement,
    lease_s: u64,
    account: StageAccount,
    progress: Progress,
    run: bool,
    receipt: Option<Receipt>,
    problem: Option<PeerText>,
    denial: Option<Denial>,
}

impl Target {
    /// Room was found and counted; the lease runs for `lease_s` seconds from each request.
    pub fn new(agreement: Agreement, lease_s: u64) -> Self {
        Self {
            phase: Phase::Reserved,
            agreement,
            lease_s,
            account: StageAccount::default(),
            progress: Progress::default(),
            run: false,
            receipt: None,
            problem: None,
            denial: None,
        }
    }

    /// A migration found after a restart: the VM is ours, perhaps not started yet.
    pub fn resume(agreement: Agreement, lease_s: u64, receipt: Receipt, run: bool) -> (Self, Vec<Effect>) {
        let mut t = Self::new(agreement, lease_s);
        t.receipt = Some(receipt);
        t.run = run;
        let effects = t.start();
        (t, effects)
    }

    pub fn phase(&self) -> &Phase {
        &self.phase
    }
    pub fn agreement(&self) -> &Agreement {
        &self.agreement
    }
    pub fn account(&self) -> &StageAccount {
        &self.account
    }
    pub fn progress(&self) -> &Progress {
        &self.progress
    }
    /// Why the VM does not run although it is ours, or why staging failed.
    pub fn problem(&self) -> Option<PeerText> {
        self.problem.clone().or_else(|| self.denial.as_ref().map(|d| d.text.clone()))
    }
    /// Whether the source wants the VM to run here; part of what a take-over records.
    pub fn run(&self) -> bool {
        self.run
    }
    /// Whether the lease still counts: from the take-over on, nothing expires.
    pub fn leased(&self) -> bool {
        matches!(self.phase, Phase::Reserved | Phase::Staging(_) | Phase::Staged(_))
    }

    /// Whether a pass has begun: what it brought may serve another try.
    pub fn has_staged(&self) -> bool {
        matches!(self.phase, Phase::Staging(_) | Phase::Staged(_))
    }

    pub fn step(&mut self, event: Event) -> Vec<Effect> {
        match event {
            Event::Asked(request) => self.asked(*request),
            Event::StageProgress(p) => {
                self.progress = p;
                Vec::new()
            }
            Event::StageFinished(result) => {
                if let Phase::Staging(pass) = self.phase {
                    self.phase = Phase::Staged(pass);
                    match result {
                        Ok(account) => self.account = account,
                        Err(d) => self.denial = Some(d),
                    }
                }
                Vec::new()
            }
            Event::TookOver(Ok(receipt)) if self.phase == Phase::TakingOver => {
                self.receipt = Some(receipt);
                self.start()
            }
            // Not recorded, so not ours, and an epoch refused once is refused for ever: once this
            // migration is forgotten, the source's next `start` is answered with a return.
            Event::TookOver(Err(d)) if self.phase == Phase::TakingOver => {
                self.problem = Some(d.text);
                self.abandon()
            }
            Event::Started(result) if self.phase == Phase::Starting => {
                self.phase = Phase::Owned;
                self.problem = result.err().map(PeerText::from);
                // One that runs is told of once its guest has booted.
                match self.problem {
                    Some(_) => vec![Effect::AskDelete { boot_ms: None }],
                    None => Vec::new(),
                }
            }
            Event::Booted { boot_ms } if self.phase == Phase::Owned => vec![Effect::AskDelete { boot_ms }],
            Event::LeaseExpired if self.leased() => self.abandon(),
            _ => Vec::new(),
        }
    }

    fn asked(&mut self, request: RequestBody) -> Vec<Effect> {
        match request {
            // A check changes nothing and is answered by the broker, migration or not.
            RequestBody::Configuration { .. } | RequestBody::Content { .. } | RequestBody::Owners { .. } => {
                deny(DenialCode::OutOfOrder, "a check belongs to no migration")
            }
            // Verified by the broker, which keeps it for the take-over.
            RequestBody::Lineage { .. } => deny(DenialCode::OutOfOrder, "the VM was already handed over"),
            RequestBody::Reservation { .. } if self.leased() => answer(self.reserved()),
            RequestBody::Initialization(init) => self.initialise(init),
            RequestBody::Start { hand_over, run } => self.take_over(hand_over, run),
            RequestBody::Cancel { .. } if self.leased() => {
                let kept_s = if self.has_staged() { self.lease_s } else { 0 };
                let mut effects = self.abandon();
                effects.extend(answer(Answer::Cancelled { kept_s }));
                effects
            }
            RequestBody::Cancel { .. } if self.phase == Phase::Abandoned => {
                answer(Answer::Cancelled { kept_s: 0 })
            }
            RequestBody::Cancel { .. } => deny(DenialCode::OutOfOrder, "the VM was already handed over"),
            RequestBody::Reservation { .. } => deny(DenialCode::OutOfOrder, "the reservation was redeemed"),
            // Answered from the records, whatever this machine knows.
            RequestBody::Withdraw { .. } => deny(DenialCode::OutOfOrder, "is not asked of a migration"),
            RequestBody::Suspend | RequestBody::Stop | RequestBody::Delete { .. } => {
                deny(DenialCode::NotYours, "only the target of a migration asks this of its source")
            }
        }
    }

    /// The answer to the reservation, first and repeated.
    pub fn reserved(&self) -> Answer {
        Answer::Reserved {
            expires_in_s: self.lease_s,
            reservation: Some(self.agreement.reservation),
            known: self.agreement.known,
        }
    }

    fn initialise(&mut self, init: Box<Initialization>) -> Vec<Effect> {
        let wanted = init.pass;
        match &self.phase {
            Phase::Staging(pass) if *pass == wanted => answer(Answer::Working(self.progress.clone())),
            Phase::Staged(pass) if *pass == wanted => match self.denial.clone() {
                None => answer(Answer::Staged { pass: pass.number, account: self.account.clone() }),
                Some(denial) => answer(Answer::Denied(denial)),
            },
            Phase::Staged(pass) if pass.last => {
                deny(DenialCode::OutOfOrder, "the last pass is staged already")
            }
            // A late repetition: going back would leave the source asking for a pass it has seen.
            Phase::Staged(pass) if wanted.number <= pass.number => {
                deny(DenialCode::OutOfOrder, "a later pass is staged already")
            }
            Phase::Reserved | Phase::Staged(_) => {
                self.phase = Phase::Staging(wanted);
                self.denial = None;
                self.progress = Progress::default();
                let mut effects = answer(Answer::Working(self.progress.clone()));
                effects.push(Effect::Stage(init));
                effects
            }
            Phase::Staging(_) => deny(DenialCode::OutOfOrder, "another pass is being staged"),
            Phase::Abandoned => deny(DenialCode::UnknownMigration, "the reservation has ended"),
            _ => deny(DenialCode::OutOfOrder, "the VM was already handed over"),
        }
    }

    fn take_over(&mut self, signed: SignedHandOver, run: bool) -> Vec<Effect> {
        match &self.phase {
            Phase::TakingOver | Phase::Starting => {
                answer(Answer::Working(Progress { step: "start".into(), ..Progress::default() }))
            }
            Phase::Owned => match self.receipt.clone() {
                Some(receipt) => answer(Answer::Started {
                    receipt,
                    running: self.run && self.problem.is_none(),
                    problem: self.problem.clone(),
                    account: self.account.clone(),
                }),
                None => deny(DenialCode::OutOfOrder, "owned without a receipt"),
            },
            Phase::Abandoned => deny(DenialCode::UnknownMigration, "the reservation has ended"),
            Phase::Reserved | Phase::Staging(_) | Phase::Staged(_) => self.redeem(signed, run),
        }
    }

    /// The first `start`. The source has given the VM up, so a refusal that changes nothing would
    /// leave the VM to nobody: a hand-over of this migration that cannot be taken ends it here, and
    /// the source's next `start`, for a migration then unknown, is answered with a return.
    fn redeem(&mut self, signed: SignedHandOver, run: bool) -> Vec<Effect> {
        let hand_over = match self.belongs(&signed) {
            Ok(h) => h,
            Err(why) => return deny(DenialCode::HandOver, &why),
        };
        let (code, why) = match &self.phase {
            Phase::Staged(pass) if pass.last && self.denial.is_none() => match self.differs(&hand_over, pass)
            {
                None => {
                    self.phase = Phase::TakingOver;
                    self.run = run;
                    self.problem = None;
                    let mut effects =
                        answer(Answer::Working(Progress { step: "start".into(), ..Progress::default() }));
                    effects.push(Effect::TakeOver(signed));
                    return effects;
                }
                Some(what) => (DenialCode::HandOver, format!("the hand-over is for another {what}")),
            },
            _ => (DenialCode::UnknownMigration, "the last pass is not staged".into()),
        };
        let mut effects = deny(code, &why);
        effects.extend(self.abandon());
        effects
    }

    /// The hand-over must be signed by the source, and be of this migration and the epoch it was agreed
    /// on. Whether that is the next one is the ownership rules' matter.
    fn belongs(&self, signed: &SignedHandOver) -> Result<HandOver, String> {
        let h = signed.verify().map_err(|e| e.to_string())?;
        let a = &self.agreement;
        let checks = [
            ("VM", h.vm == a.vm),
            ("migration", h.migration == a.migration),
            ("epoch", Some(h.epoch) == a.epoch.checked_add(1)),
            ("source", h.source == a.source && h.source_key == a.source_key),
            ("target", h.target == a.target && h.target_key == a.target_key),
        ];
        match checks.iter().find(|(_, ok)| !ok) {
            Some((what, _)) => Err(format!("the hand-over is for another {what}")),
            None => Ok(h),
        }
    }

    /// What of the VM's state was handed over otherwise than it is staged here.
    fn differs(&self, h: &HandOver, pass: &Pass) -> Option<&'static str> {
        let checks = [
            ("recipe", h.recipe == self.agreement.recipe),
            ("root delta", h.root_delta == pass.root_delta.id()),
            ("user data", h.user_data == pass.user_data.id()),
        ];
        checks.iter().find(|(_, ok)| !ok).map(|(what, _)| *what)
    }

    fn start(&mut self) -> Vec<Effect> {
        if self.run {
            self.phase = Phase::Starting;
            vec![Effect::Start]
        } else {
            self.phase = Phase::Owned;
            vec![Effect::AskDelete { boot_ms: None }]
        }
    }

    fn abandon(&mut self) -> Vec<Effect> {
        self.phase = Phase::Abandoned;
        vec![Effect::CleanUp]
    }
}

fn answer(a: Answer) -> Vec<Effect> {
    vec![Effect::Answer(Box::new(a))]
}

fn deny(code: DenialCode, text: &str) -> Vec<Effect> {
    answer(Answer::Denied(Denial::new(code, text)))
}

#[cfg(test)]
mod tests {
    use crate::clock::UnixMillis;
    use crate::types::{ByteSize, IdentityKey, MapId, MigrationId, VmId};
    use crate::vm::{MapRef, VmSpec};

    use super::*;

    fn source_key() -> IdentityKey {
        IdentityKey::from_secret_bytes(&[1; 32])
    }

    fn target_key() -> IdentityKey {
        IdentityKey::from_secret_bytes(&[2; 32])
    }

    fn agreement() -> Agreement {
        Agreement {
            source: "a@x".parse().unwrap(),
            source_key: source_key().public(),
            target: "b@x".parse().unwrap(),
            target_key: target_key().public(),
            migration: MigrationId(uuid::Uuid::from_u128(1)),
            vm: VmId(uuid::Uuid::from_u128(2)),
            epoch: 4,
            recipe: RecipeId::of(b"r"),
            reservation: ReservationId(uuid::Uuid::from_u128(3)),
            known: None,
        }
    }

    fn pass(number: u32, last: bool) -> Pass {
        let map = |disk_size_bytes| MapRef { block_size_bytes: 4096, disk_size_bytes, root: None };
        Pass { number, last, root_delta: map(1 << 20), user_data: map(1 << 21) }
    }

    fn hand_over() -> HandOver {
        let a = agreement();
        HandOver {
            vm: a.vm,
            migration: a.migration,
            epoch: a.epoch + 1,
            source: a.source,
            source_key: a.source_key,
            target: a.target,
            target_key: a.target_key,
            recipe: a.recipe,
            root_delta: pass(1, true).root_delta.id(),
            user_data: pass(1, true).user_data.id(),
            issued: UnixMillis(9),
            provenance: None,
        }
    }

    fn spec() -> VmSpec {
        VmSpec {
            id: agreement().vm,
            name: "demo".parse().unwrap(),
            cpus: 1,
            memory: ByteSize(1 << 28),
            recipe: agreement().recipe,
            root_size: ByteSize(1 << 20),
            user_data_size: ByteSize(1 << 21),
            nics: Vec::new(),
            architecture: "amd64".into(),
            cpu_model: "qemu64".into(),
            firmware: crate::vm::Firmware::Uefi,
            disk_bus: Default::default(),
            system_uuid: None,
        }
    }

    fn initialization(pass: Pass) -> RequestBody {
        RequestBody::Initialization(Box::new(Initialization {
            spec: spec(),
            recipe: String::new(),
            component_names: Vec::new(),
            component_bytes: 0,
            pass,
            addresses: Vec::new(),
            source_key: source_key().public(),
            ticket: String::new(),
            firmware: None,
        }))
    }

    fn start_of(h: HandOver) -> RequestBody {
        RequestBody::Start { hand_over: h.sign(&source_key()), run: true }
    }

    fn start() -> RequestBody {
        start_of(hand_over())
    }

    fn cancel() -> RequestBody {
        RequestBody::Cancel { reason: PeerText::default() }
    }

    /// The one answer, and what else is to be done.
    fn ask(t: &mut Target, request: RequestBody) -> (Answer, Vec<Effect>) {
        let (mut answers, mut others) = (Vec::new(), Vec::new());
        for effect in t.step(Event::Asked(Box::new(request))) {
            match effect {
                Effect::Answer(a) => answers.push(*a),
                other => others.push(other),
            }
        }
        assert_eq!(answers.len(), 1, "{answers:?}");
        (answers.remove(0), others)
    }

    fn denied(answer: &Answer) -> Option<DenialCode> {
        match answer {
            Answer::Denied(d) => Some(d.code),
            _ => None,
        }
    }

    fn content_denial() -> Denial {
        Denial::new(DenialCode::Content, "gone")
    }

    fn staging(pass: Pass) -> Target {
        let mut t = Target::new(agreement(), 60);
        assert!(matches!(ask(&mut t, initialization(pass)).1[..], [Effect::Stage(_)]));
        t
    }

    fn staged(pass: Pass) -> Target {
        let mut t = staging(pass);
        assert!(t.step(Event::StageFinished(Ok(StageAccount::default()))).is_empty());
        t
    }

    fn taking_over() -> Target {
        let mut t = staged(pass(1, true));
        let (answer, effects) = ask(&mut t, start());
        assert!(matches!(answer, Answer::Working(_)));
        assert!(matches!(effects[..], [Effect::TakeOver(_)]));
        assert!(t.run() && !t.leased());
        t
    }

    fn starting() -> Target {
        let mut t = taking_over();
        let receipt = hand_over().sign(&source_key()).accept(&target_key());
        assert_eq!(t.step(Event::TookOver(Ok(receipt))), [Effect::Start]);
        t
    }

    fn owned() -> Target {
        let mut t = starting();
        assert!(t.step(Event::Started(Ok(()))).is_empty());
        t
    }

    fn abandoned() -> Target {
        let mut t = Target::new(agreement(), 60);
        assert_eq!(t.step(Event::LeaseExpired), [Effect::CleanUp]);
        t
    }

    fn every_phase() -> Vec<Target> {
        let failed = {
            let mut t = staging(pass(1, true));
            t.step(Event::StageFinished(Err(content_denial())));
            t
        };
        vec![
            Target::new(agreement(), 60),
            staging(pass(1, false)),
            staged(pass(1, false)),
            staged(pass(1, true)),
            failed,
            taking_over(),
            starting(),
            owned(),
            abandoned(),
        ]
    }

    fn every_request() -> Vec<RequestBody> {
        vec![
            RequestBody::Configuration { spec: spec(), components: Vec::new(), packs: Vec::new() },
            RequestBody::Reservation { spec: spec() },
            initialization(pass(1, false)),
            initialization(pass(2, true)),
            start(),
            start_of(HandOver { epoch: 9, ..hand_over() }),
            cancel(),
            RequestBody::Suspend,
            RequestBody::Stop,
            RequestBody::Content { components: Vec::new(), packs: Vec::new(), done: Vec::new() },
            RequestBody::Withdraw { hand_over: hand_over().sign(&source_key()) },
            RequestBody::Lineage {
                at: 0,
                total: 0,
                after: None,
                links: Default::default(),
                successions: Default::default(),
            },
            RequestBody::Owners { claims: Vec::new() },
            RequestBody::Delete { boot_ms: None },
        ]
    }

    #[test]
    fn every_request_in_every_phase_gets_one_answer() {
        for t in every_phase() {
            for request in every_request() {
                // Twice: a repeated message is answered as well.
                let mut t = t.clone();
                ask(&mut t, request.clone());
                ask(&mut t, request);
            }
        }
    }

    /// The source must not go on asking, nor a withdrawal contest what is the target's.
    #[test]
    fn a_start_that_failed_is_told_to_the_source_at_once() {
        let mut t = starting();
        assert_eq!(t.step(Event::Started(Err("no firmware".into()))), [Effect::AskDelete { boot_ms: None }]);
        assert_eq!(
            (t.phase(), t.problem().as_ref().map(PeerText::as_str)),
            (&Phase::Owned, Some("no firmware"))
        );
    }

    #[test]
    fn what_happens_at_the_wrong_time_changes_nothing() {
        let receipt = hand_over().sign(&source_key()).accept(&target_key());
        for mut t in [owned(), abandoned()] {
            let before = t.clone();
            for event in [
                Event::StageFinished(Err(content_denial())),
                Event::TookOver(Ok(receipt.clone())),
                Event::TookOver(Err(content_denial())),
                Event::Started(Err("crashed".into())),
                Event::LeaseExpired,
            ] {
                assert!(t.step(event).is_empty());
            }
            assert_eq!(t, before);
        }
    }

    #[test]
    fn a_hand_over_of_something_else_is_denied_and_changes_nothing() {
        let h = hand_over();
        let others = [
            HandOver { vm: VmId(uuid::Uuid::from_u128(7)), ..h.clone() },
            HandOver { migration: MigrationId(uuid::Uuid::from_u128(7)), ..h.clone() },
            HandOver { epoch: h.epoch + 1, ..h.clone() },
            HandOver { epoch: h.epoch - 1, ..h.clone() },
            HandOver { target: "c@x".parse().unwrap(), ..h.clone() },
            HandOver { target_key: source_key().public(), ..h.clone() },
            HandOver { source: "c@x".parse().unwrap(), ..h.clone() },
        ];
        let forged = RequestBody::Start { hand_over: h.sign(&target_key()), run: true };
        for request in others.into_iter().map(start_of).chain([forged]) {
            let mut t = staged(pass(1, true));
            let before = t.clone();
            let (answer, effects) = ask(&mut t, request);
            assert_eq!(denied(&answer), Some(DenialCode::HandOver));
            assert!(effects.is_empty());
            assert_eq!(t, before);
            ask(&mut t, start());
            assert_eq!(*t.phase(), Phase::TakingOver, "the right one is still taken");
        }
    }

    /// The source gave the VM up and asks for ever: what cannot be taken must come to a return, and
    /// the broker gives that for migrations it does not know.
    #[test]
    fn a_hand_over_that_cannot_be_taken_ends_the_migration() {
        let h = hand_over();
        let other_state = [
            HandOver { recipe: RecipeId::of(b"other"), ..h.clone() },
            HandOver { root_delta: MapId::of(b"other"), ..h.clone() },
            HandOver { user_data: MapId::of(b"other"), ..h.clone() },
        ];
        let mut cases: Vec<_> = other_state.into_iter().map(|h| (staged(pass(1, true)), h)).collect();
        let failed = every_phase().remove(4);
        for t in [Target::new(agreement(), 60), staging(pass(1, true)), staged(pass(1, false)), failed] {
            cases.push((t, h.clone()));
        }
        for (mut t, h) in cases {
            let (answer, effects) = ask(&mut t, start_of(h));
            assert!(denied(&answer).is_some());
            assert_eq!(effects, [Effect::CleanUp]);
            assert_eq!(*t.phase(), Phase::Abandoned);
        }
        let mut t = taking_over();
        assert_eq!(t.step(Event::TookOver(Err(content_denial()))), [Effect::CleanUp]);
        assert_eq!(*t.phase(), Phase::Abandoned);
        assert_eq!(t.problem().as_deref(), Some("gone"));
    }

    #[test]
    fn repeated_requests_are_answered_alike() {
        let mut t = Target::new(agreement(), 60);
        for _ in 0..2 {
            let (answer, _) = ask(&mut t, RequestBody::Reservation { spec: spec() });
            assert_eq!(answer, t.reserved());
            assert!(matches!(answer, Answer::Reserved { expires_in_s: 60, reservation: Some(_), .. }));
        }
        let mut t = staging(pass(2, true));
        let (answer, effects) = ask(&mut t, initialization(pass(2, true)));
        assert!(matches!(answer, Answer::Working(_)) && effects.is_empty(), "staged once");
        t.step(Event::StageFinished(Ok(StageAccount::default())));
        for _ in 0..2 {
            let (answer, effects) = ask(&mut t, initialization(pass(2, true)));
            assert!(matches!(answer, Answer::Staged { pass: 2, .. }) && effects.is_empty());
        }
        for mut t in [taking_over(), starting()] {
            let (answer, effects) = ask(&mut t, start());
            assert!(matches!(answer, Answer::Working(_)) && effects.is_empty(), "taken over once");
        }
        let mut t = owned();
        for _ in 0..2 {
            let (answer, effects) = ask(&mut t, start());
            assert!(
                matches!(answer, Answer::Started { running: true, problem: None, .. }) && effects.is_empty()
            );
        }
        assert_eq!(denied(&ask(&mut t, cancel()).0), Some(DenialCode::OutOfOrder));
        let mut t = abandoned();
        assert_eq!(ask(&mut t, cancel()), (Answer::Cancelled { kept_s: 0 }, Vec::new()));
    }

    #[test]
    fn whoever_calls_off_is_told_how_long_what_came_is_kept() {
        for (mut t, kept_s) in [
            (Target::new(agreement(), 60), 0),
            (staging(pass(1, false)), 60),
            (staged(pass(1, false)), 60),
            (staged(pass(2, true)), 60),
        ] {
            assert_eq!(ask(&mut t, cancel()), (Answer::Cancelled { kept_s }, vec![Effect::CleanUp]));
        }
        // As an earlier release says it.
        let answer: Answer = serde_json::from_str(r#"{"answer": "cancelled"}"#).unwrap();
        assert_eq!(answer, Answer::Cancelled { kept_s: 0 });
    }

    #[test]
    fn a_late_repetition_of_an_earlier_pass_does_not_go_back() {
        let mut t = staged(pass(3, false));
        let (answer, effects) = ask(&mut t, initialization(pass(2, false)));
        assert_eq!(denied(&answer), Some(DenialCode::OutOfOrder));
        assert!(effects.is_empty());
        assert!(matches!(ask(&mut t, initialization(pass(4, true))).1[..], [Effect::Stage(_)]));
    }
}
