//! The target's side of a cold migration: a pure machine.
//!
//! ```text
//!  Reserved -> Staging(n) -> Staged(n) -> Staging(n+1) ... Staged(last)
//!      |           |            |                             | signed hand-over that fits
//!      +-----------+------------+--- lease over, cancel --+   v
//!                                                         |  TakingOver -> Starting -> Owned
//!                                                         v
//!                                                     Abandoned (all that was made is removed)
//! ```
//!
//! Every request gets exactly one answer at once; work that takes time is answered `working` and
//! the source asks again, so lost and repeated messages do no harm. The VM is run only after the
//! effect [`Effect::TakeOver`] has durably recorded the ownership.

use crate::types::{MemberJid, PublicKey, RecipeId};

use super::handover::{HandOver, Receipt, SignedHandOver};
use super::message::{Answer, Denial, DenialCode, Initialization, Pass, Progress, RequestBody, StageAccount};

#[derive(Clone, PartialEq, Debug)]
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
    /// Tell the source that the VM runs here.
    AskDelete {
        boot_ms: Option<u64>,
    },
    /// Stop staging and remove all that was made for this migration.
    CleanUp,
}

/// What the migration is about, fixed by the reservation.
#[derive(Clone, PartialEq, Debug)]
pub struct Agreement {
    pub source: MemberJid,
    pub source_key: PublicKey,
    pub target: MemberJid,
    pub target_key: PublicKey,
    pub migration: crate::types::MigrationId,
    pub vm: crate::types::VmId,
    /// The VM's epoch at the source; the hand-over is for the next.
    pub epoch: u64,
    pub recipe: RecipeId,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Target {
    phase: Phase,
    agreement: Agreement,
    lease_s: u64,
    account: StageAccount,
    progress: Progress,
    run: bool,
    receipt: Option<Receipt>,
    problem: Option<String>,
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
    pub fn problem(&self) -> Option<String> {
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
                self.problem = result.err();
                Vec::new()
            }
            Event::Booted { boot_ms } if self.phase == Phase::Owned => vec![Effect::AskDelete { boot_ms }],
            Event::LeaseExpired if self.leased() => self.abandon(),
            _ => Vec::new(),
        }
    }

    fn asked(&mut self, request: RequestBody) -> Vec<Effect> {
        match request {
            // A check changes nothing and is answered by the broker, migration or not.
            RequestBody::Configuration { .. } => {
                deny(DenialCode::OutOfOrder, "a check belongs to no migration")
            }
            RequestBody::Reservation { .. } if self.leased() => {
                answer(Answer::Reserved { expires_in_s: self.lease_s })
            }
            RequestBody::Initialization(init) => self.initialise(init),
            RequestBody::Start { hand_over, run } => self.take_over(hand_over, run),
            RequestBody::Cancel { .. } if self.leased() => {
                let mut effects = self.abandon();
                effects.extend(answer(Answer::Cancelled));
                effects
            }
            RequestBody::Cancel { .. } if self.phase == Phase::Abandoned => answer(Answer::Cancelled),
            RequestBody::Cancel { .. } => deny(DenialCode::OutOfOrder, "the VM was already handed over"),
            RequestBody::Reservation { .. } => deny(DenialCode::OutOfOrder, "the reservation was redeemed"),
            RequestBody::Suspend | RequestBody::Stop | RequestBody::Delete { .. } => {
                deny(DenialCode::NotYours, "only the target of a migration asks this of its source")
            }
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

    /// The hand-over must be signed by the source, and be of this migration.
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
