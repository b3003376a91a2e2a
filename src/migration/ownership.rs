//! The rules of ownership: who may run a VM, give it up, take it over, take it back, be overridden,
//! contested or shown to be wrong, and what must be kept. All of them stand here and nowhere else;
//! they are pure: each takes what a cloud knows and returns what it must record *before* it acts.
//!
//! A cloud knows of a VM its record (`records.rs`) and its history (`lineage.rs`). The history is what
//! doubly signed records prove; the record says what this cloud decided for itself.

use std::fmt;
use std::time::Duration;

use crate::clock::UnixMillis;
use crate::types::{MapId, MemberJid, MigrationId, PublicKey, ReservationId, Signer, hex};
use crate::vm::VmSpec;

use super::handover::{
    EPOCH_MAX, HandOver, HandOverError, Origin, Provenance, Receipt, Return, SignedHandOver,
};
use super::lineage::{Lineage, LineageError, Link, LinkKind, Links, PAGE_LINKS_MAX};
use super::message::{DenialCode, Seed};
use super::records::{Arrival, Disproved, GivenUp, KeptCopy, Ownership, VmRecord};

/// Earlier copies of one VM that are kept at once; with more it does not come home.
pub const KEPT_COPIES_MAX: usize = 8;

/// The rules that tests switch off one by one, to see that a suite notices. See `Law::without`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Rule {
    /// Only who owns a VM gives it up.
    OwnerGivesUp,
    /// Nothing arrives where the VM is.
    NotTwice,
    /// A VM does not come home while its last hand-over from here is without receipt or return.
    NotWhileInDoubt,
    /// The history shown goes on from the one known.
    HistoryGoesOn,
    /// The hand-over goes on from the history shown: its giver is the owner by it, and the epoch the next.
    HandOverGoesOn,
    /// A hand-over is taken only under the reservation it names.
    OwnReservation,
    /// What was promised never to be run is not taken over.
    PromiseBinds,
    /// A hand-over whose receipt was given is not taken again.
    TakenOnce,
    /// The record of a take-over says whether the VM is to run.
    TakeOverSaysRun,
    /// A receipt once given is given again, and never a return.
    ReceiptIsForGood,
    /// Only the signed return of the very hand-over brings the VM back.
    ReturnFits,
    /// Receipts outlive the record that holds them.
    LinksOutliveRecords,
    /// A copy is kept for its grace period, whoever hands the VM over.
    CopyIsKept,
    /// Once a hand-over was acknowledged, its giver's withdrawal contests nothing.
    AcknowledgedIsFinal,
    /// A VM runs only where it is here, uncontested, undisproved and confirmed.
    RunsWhereOwned,
    /// Who is shown a history that goes on from its own past itself gives way to it.
    ProofIsBelieved,
    /// A VM that something holds is not moved.
    HeldIsNotMoved,
}

impl Rule {
    /// All of them.
    pub const ALL: [Rule; 17] = [
        Rule::OwnerGivesUp,
        Rule::NotTwice,
        Rule::NotWhileInDoubt,
        Rule::HistoryGoesOn,
        Rule::HandOverGoesOn,
        Rule::OwnReservation,
        Rule::PromiseBinds,
        Rule::TakenOnce,
        Rule::TakeOverSaysRun,
        Rule::ReceiptIsForGood,
        Rule::ReturnFits,
        Rule::LinksOutliveRecords,
        Rule::CopyIsKept,
        Rule::AcknowledgedIsFinal,
        Rule::RunsWhereOwned,
        Rule::ProofIsBelieved,
        Rule::HeldIsNotMoved,
    ];
}

/// Why ownership does not change.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    #[error("a VM of this id is here already")]
    AlreadyHere,
    #[error("this cloud gave the VM up and still waits for the receipt")]
    InDoubt,
    #[error("the record of this VM is damaged here: its operator must restore it")]
    Damaged,
    #[error("{0} earlier copies of this VM are in their grace period here")]
    CopiesKept(usize),
    #[error(
        "the history shown does not go on from what is known here: the VM went to {owner} under epoch {epoch}"
    )]
    Forked { owner: MemberJid, epoch: u64 },
    #[error("{giver} shows no history, and the VM went to {owner} under epoch {epoch}")]
    Unproven { giver: MemberJid, owner: MemberJid, epoch: u64 },
    #[error("the hand-over does not go on from the VM's history")]
    HandOver(#[source] LineageError),
    #[error("the hand-over is not signed as it should be")]
    Signature(#[source] HandOverError),
    #[error("the hand-over is under another reservation")]
    OtherReservation,
    #[error("this cloud promised never to run the VM under epoch {0}")]
    Promised(u64),
    #[error("this hand-over was taken before")]
    TakenBefore,
    #[error("the VM is not this cloud's to give")]
    NotHere,
    #[error("the VM is contested: {0}")]
    Contested(&'static str),
    #[error("the VM's history here says that {0} owns it")]
    NotOwner(MemberJid),
    #[error("the VM's history is damaged or missing here")]
    HistoryLost,
    #[error("something holds the VM: it is being {0}")]
    Held(Hold),
    #[error("nothing is given up that this could be about")]
    NotGivenUp,
    #[error("it is about another hand-over")]
    OtherHandOver,
    #[error("no VM has moved that often")]
    TooOften,
    #[error("members that may know more have not been asked yet")]
    Unconfirmed,
}

impl Refusal {
    /// The code under which a peer is told.
    pub fn code(&self) -> DenialCode {
        match self {
            Refusal::AlreadyHere => DenialCode::AlreadyThere,
            Refusal::InDoubt | Refusal::CopiesKept(_) | Refusal::Damaged | Refusal::Held(_) => {
                DenialCode::Busy
            }
            Refusal::Contested(_) => DenialCode::Contested,
            Refusal::NotHere | Refusal::NotGivenUp | Refusal::Unconfirmed | Refusal::HistoryLost => {
                DenialCode::Other
            }
            Refusal::Forked { .. }
            | Refusal::Unproven { .. }
            | Refusal::HandOver(_)
            | Refusal::Signature(_)
            | Refusal::OtherReservation
            | Refusal::Promised(_)
            | Refusal::TakenBefore
            | Refusal::NotOwner(_)
            | Refusal::OtherHandOver
            | Refusal::TooOften => DenialCode::HandOver,
        }
    }

    /// Whether no honest peer comes to this: it claims what the VM's history does not say.
    pub fn is_false_claim(&self) -> bool {
        use Refusal::{Forked, HandOver, NotOwner, Signature, Unproven};
        matches!(self, Forked { .. } | Unproven { .. } | NotOwner(_) | HandOver(_) | Signature(_))
    }

    /// What whoever is refused can do.
    pub fn next_step(&self) -> &'static str {
        match self {
            Refusal::Forked { .. } | Refusal::Unproven { .. } => {
                "compare 'cicada migration receipt' of the clouds on the way; where the history known there is \
                 void, its operator can remove the VM's file below lineages/ with the broker stopped"
            }
            Refusal::HistoryLost => "restore the VM's file below lineages/ from a backup",
            Refusal::CopiesKept(_) => "wait, or delete the earlier copies there",
            Refusal::InDoubt => "wait until the earlier hand-over is answered, or let an operator resolve it",
            _ => "",
        }
    }
}

/// What this cloud knows of one VM when something is asked about it.
#[derive(Clone, Copy)]
pub struct Standing<'a> {
    pub record: Option<&'a VmRecord>,
    /// The history known here, the record's own links included.
    pub known: &'a Lineage,
    /// There is a record, and it cannot be read.
    pub damaged: bool,
}

/// What is promised or was given about one hand-over.
#[derive(Clone, Copy, Default)]
pub struct Given<'a> {
    /// Never to run the VM under this hand-over's epoch.
    pub promised: bool,
    /// The receipt this cloud gave for the migration.
    pub receipt: Option<&'a Receipt>,
}

/// Where a VM is given, and in which state.
#[derive(Clone, Debug)]
pub struct Gift {
    pub migration: MigrationId,
    pub source: MemberJid,
    pub source_key: PublicKey,
    pub target: MemberJid,
    pub target_key: PublicKey,
    /// The target's reservation; `None` if it speaks version 1.
    pub reservation: Option<ReservationId>,
    pub seed: Seed,
    /// Whether it is to run where it goes; recorded as `was_running`, which it is called since the first release.
    pub to_run: bool,
    pub now: UnixMillis,
}

/// What arrives.
#[derive(Clone, Debug)]
pub struct Guest {
    pub spec: VmSpec,
    pub components: Vec<String>,
    /// The directory where it was staged.
    pub disks: String,
    /// Whether its source wants it to run.
    pub run: bool,
    pub reservation: ReservationId,
    pub now: UnixMillis,
    /// How long an earlier copy is kept that has no end of its own.
    pub grace: Duration,
}

/// What became of a hand-over to this cloud that no migration here remembers.
#[derive(Clone, PartialEq, Debug)]
pub enum Became {
    /// It was taken over, and here is the receipt.
    Taken(Receipt),
    /// It was not and cannot be any more: its reservation has ended. It can be returned as it is.
    Void,
    /// It was not, and must never be: that has to be recorded before it is returned.
    ToBePromised,
    /// It cannot be told until an operator decides.
    Unknowable,
    /// The migration's receipt is for another hand-over.
    Other,
}

/// What follows from another cloud's showing a history.
#[derive(Clone, PartialEq, Debug)]
pub enum Learnt {
    /// Nothing that is not known.
    Nothing,
    /// It goes on from what is known, and the VM is not here.
    Longer(Lineage),
    /// This cloud gave the VM up since: the record is to say so.
    GivenUp(Box<VmRecord>, Lineage),
    /// The VM is still, or again, this cloud's, by more than its record knows.
    Ours(Box<VmRecord>, Lineage),
    /// It was given up, and the VM runs here: both copies stay as they are for their operators.
    Disproved(Box<VmRecord>),
    /// It contradicts what is known here, and proves nothing against it.
    Contradicts,
}

/// What a VM is busy with. It is one thing at a time.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Hold {
    Free,
    /// It is to run and does not: it waits for its turn, or for the end of a pause. Nothing holds it.
    Queued,
    Starting,
    Stopping,
    Exporting,
    Resizing,
    /// It leaves, until its target has confirmed that.
    Moving(MigrationId),
    /// It was given up and is on its way home: the copy here is what it begins with.
    Coming,
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Hold::Free => "left alone",
            Hold::Queued => "kept waiting for its start",
            Hold::Starting => "started",
            Hold::Stopping => "stopped",
            Hold::Exporting => "exported",
            Hold::Resizing => "resized",
            Hold::Moving(_) => "moved",
            Hold::Coming => "moved here",
        })
    }
}

/// The rules, all in force but in tests.
#[derive(Clone, Copy, Debug)]
pub struct Law {
    #[cfg(debug_assertions)]
    off: Option<Rule>,
}

impl Law {
    /// The rules that ship.
    pub const WHOLE: Law = Law {
        #[cfg(debug_assertions)]
        off: None,
    };

    /// The rules but one. Not in release builds.
    #[cfg(debug_assertions)]
    pub const fn without(rule: Rule) -> Self {
        Law { off: Some(rule) }
    }

    /// Whether a rule is in force.
    pub fn holds(self, rule: Rule) -> bool {
        #[cfg(debug_assertions)]
        return self.off != Some(rule);
        #[cfg(not(debug_assertions))]
        {
            let _ = rule;
            true
        }
    }

    /// A refusal, where its rule is in force.
    fn refuse(self, rule: Rule, broken: bool, refusal: Refusal) -> Result<(), Refusal> {
        if broken && self.holds(rule) { Err(refusal) } else { Ok(()) }
    }

    // --- running ---

    /// Whether the VM may be started here. `confirmed`: whoever may know more was asked, or an operator
    /// took the risk.
    pub fn may_run(self, record: &VmRecord, confirmed: bool) -> Result<(), Refusal> {
        let rule = Rule::RunsWhereOwned;
        self.refuse(rule, !record.is_here(), Refusal::NotHere)?;
        self.refuse(rule, is_contested(record), Refusal::Contested("its source's operator took it back"))?;
        self.refuse(
            rule,
            record.disproved.is_some(),
            Refusal::Contested("another cloud shows that it was given up"),
        )?;
        self.refuse(rule, !confirmed, Refusal::Unconfirmed)
    }

    /// Whether a move may begin; `confirmed` as for [`Law::may_run`].
    pub fn may_move(self, record: &VmRecord, hold: Hold, confirmed: bool) -> Result<(), Refusal> {
        self.refuse(Rule::RunsWhereOwned, !confirmed, Refusal::Unconfirmed)?;
        let held = !matches!(hold, Hold::Free | Hold::Queued);
        self.refuse(Rule::HeldIsNotMoved, held, Refusal::Held(hold))?;
        self.may_give_up(record)
    }

    fn may_give_up(self, record: &VmRecord) -> Result<(), Refusal> {
        let rule = Rule::OwnerGivesUp;
        self.refuse(rule, !record.is_here(), Refusal::NotHere)?;
        self.refuse(rule, is_contested(record), Refusal::Contested("its source's operator took it back"))?;
        self.refuse(
            rule,
            record.disproved.is_some(),
            Refusal::Contested("another cloud shows that it was given up"),
        )
    }

    // --- the source ---

    /// The record that gives the VM up, to be made durable before the hand-over is signed.
    pub fn give_up(
        self,
        record: &VmRecord,
        known: &Lineage,
        gift: Gift,
    ) -> Result<(VmRecord, HandOver), Refusal> {
        self.may_give_up(record)?;
        if let Some(tip) = known.tip()
            && !known.is_owned_by(&gift.source_key)
        {
            return Err(Refusal::NotOwner(tip.owner.clone()));
        }
        if record.origin != Some(known.origin()) {
            return Err(Refusal::HistoryLost);
        }
        let epoch = known.next_epoch();
        if epoch > EPOCH_MAX {
            return Err(Refusal::TooOften);
        }
        let hand_over = HandOver {
            vm: record.spec.id,
            migration: gift.migration,
            epoch,
            source: gift.source,
            source_key: gift.source_key,
            target: gift.target.clone(),
            target_key: gift.target_key,
            recipe: record.spec.recipe,
            root_delta: gift.seed.root_delta.id(),
            user_data: gift.seed.user_data.id(),
            issued: gift.now,
            provenance: gift
                .reservation
                .map(|reservation| Provenance { origin: known.origin(), reservation }),
        };
        let mut record = record.clone();
        record.epoch = epoch - 1;
        record.ownership = Ownership::GivenUp(Box::new(GivenUp {
            migration: gift.migration,
            to: gift.target,
            to_key: gift.target_key,
            record: hex::encode(&hand_over.encode()),
            was_running: gift.to_run,
            since: gift.now,
            seed: Some(gift.seed),
            receipt: None,
            scrub_after: None,
        }));
        Ok((record, hand_over))
    }

    /// Whether `receipt` ends the hand-over that `record` is waiting for.
    pub fn receipt_fits(self, record: &VmRecord, receipt: &Receipt) -> Result<(), Refusal> {
        let given = record.given_up().ok_or(Refusal::NotGivenUp)?;
        let h = receipt.verify().map_err(Refusal::Signature)?;
        let fits = given.hand_over().ok().as_ref() == Some(&h);
        if fits { Ok(()) } else { Err(Refusal::OtherHandOver) }
    }

    /// The record once the target's receipt is there: the copy is kept for the grace period.
    pub fn release(
        self,
        record: &VmRecord,
        receipt: Receipt,
        scrub_after: UnixMillis,
    ) -> Result<VmRecord, Refusal> {
        self.receipt_fits(record, &receipt)?;
        let mut record = record.clone();
        let Ownership::GivenUp(given) = &mut record.ownership else { return Err(Refusal::NotGivenUp) };
        given.receipt = Some(receipt);
        given.scrub_after = Some(scrub_after);
        record.disproved = None;
        Ok(record)
    }

    /// The record and history once the target returned the VM.
    pub fn take_back(
        self,
        record: &VmRecord,
        known: &Lineage,
        back: &Return,
    ) -> Result<(VmRecord, Lineage), Refusal> {
        let given = record.given_up().ok_or(Refusal::NotGivenUp)?;
        let h = given.hand_over().map_err(|_| Refusal::NotGivenUp)?;
        let fits = back.verify().is_ok_and(|returned| returned == h);
        self.refuse(Rule::ReturnFits, !fits, Refusal::OtherHandOver)?;
        self.ours_again(record, known, &h, back.clone().into())
    }

    /// The record and history once an operator took the VM back without the target's word. The link is
    /// only a word: who knows the target's receipt does not believe it.
    pub fn take_back_by_word(
        self,
        record: &VmRecord,
        known: &Lineage,
        key: &dyn Signer,
    ) -> Result<(VmRecord, Lineage), Refusal> {
        let given = record.given_up().filter(|g| g.in_doubt()).ok_or(Refusal::NotGivenUp)?;
        let h = given.hand_over().map_err(|_| Refusal::NotGivenUp)?;
        // Its receipt is here, and only the record does not know of it.
        if let Some(tip) = known.tip()
            && known
                .links()
                .last()
                .is_some_and(|l| l.kind == LinkKind::Receipt && l.hand_over.record == given.record)
        {
            return Err(Refusal::NotOwner(tip.owner.clone()));
        }
        let link = h.clone().sign(key).take_back(key).into();
        let (mut record, known) = self.ours_again(record, known, &h, link)?;
        record.taken_back = Some(h.migration);
        // The operator starts it, once satisfied that nobody else runs it.
        record.run = false;
        Ok((record, known))
    }

    fn ours_again(
        self,
        record: &VmRecord,
        known: &Lineage,
        h: &HandOver,
        link: Link,
    ) -> Result<(VmRecord, Lineage), Refusal> {
        let mut known = known.clone();
        // After a crash the same link may be there already, or an operator's word that this one confirms.
        known.amend(link).map_err(Refusal::HandOver)?;
        let mut record = record.clone();
        record.ownership = Ownership::Here;
        record.epoch = h.epoch + 1;
        record.origin = Some(known.origin());
        Ok((record, known))
    }

    /// The record once an operator left the VM to the silent target: scrubbed after the grace period.
    pub fn leave_to_target(self, record: &VmRecord, scrub_after: UnixMillis) -> Result<VmRecord, Refusal> {
        let mut record = record.clone();
        match &mut record.ownership {
            Ownership::GivenUp(given) if given.in_doubt() => given.scrub_after = Some(scrub_after),
            _ => return Err(Refusal::NotGivenUp),
        }
        Ok(record)
    }

    /// What was taken back by word and is the target's after all: given up again, with its receipt.
    pub fn yield_to_target(
        self,
        record: &VmRecord,
        known: &Lineage,
        given: GivenUp,
        receipt: Option<Receipt>,
        scrub_after: UnixMillis,
    ) -> Result<(VmRecord, Lineage), Refusal> {
        if !record.is_here() {
            return Err(Refusal::NotHere);
        }
        let h = given.hand_over().map_err(|_| Refusal::NotGivenUp)?;
        let mut known = known.clone();
        if let Some(receipt) = &receipt {
            known.amend(receipt.clone().into()).map_err(Refusal::HandOver)?;
        }
        let mut record = record.clone();
        record.ownership =
            Ownership::GivenUp(Box::new(GivenUp { receipt, scrub_after: Some(scrub_after), ..given }));
        record.epoch = h.epoch - 1;
        record.taken_back = None;
        record.contested = None;
        record.run = false;
        Ok((record, known))
    }

    // --- the target ---

    /// Whether the VM may come at all, whoever brings it.
    pub fn may_arrive(self, standing: Standing<'_>) -> Result<(), Refusal> {
        self.refuse(Rule::NotTwice, standing.damaged, Refusal::Damaged)?;
        let Some(record) = standing.record else { return Ok(()) };
        self.refuse(Rule::NotTwice, record.is_here(), Refusal::AlreadyHere)?;
        let in_doubt = record.given_up().is_some_and(GivenUp::in_doubt);
        self.refuse(Rule::NotWhileInDoubt, in_doubt, Refusal::InDoubt)?;
        let kept = record.kept.len();
        self.refuse(Rule::CopyIsKept, kept >= KEPT_COPIES_MAX, Refusal::CopiesKept(kept))
    }

    /// Whether a VM may come from `giver`, who shows `offered` of its history (`None`: it speaks version
    /// 1 and keeps none). The history to go on from.
    pub fn offer(
        self,
        standing: Standing<'_>,
        giver: &MemberJid,
        giver_key: &PublicKey,
        offered: Option<&Lineage>,
    ) -> Result<Lineage, Refusal> {
        self.may_arrive(standing)?;
        let known = standing.known;
        let Some(tip) = known.tip() else {
            return Ok(offered.cloned().unwrap_or_else(|| Lineage::empty(known.vm())));
        };
        let (owner, epoch) = (tip.owner.clone(), tip.epoch);
        let lineage = match offered {
            Some(offered) => match known.extended_by(offered) {
                Some(lineage) => lineage,
                None => {
                    self.refuse(Rule::HistoryGoesOn, true, Refusal::Forked { owner, epoch })?;
                    offered.clone()
                }
            },
            None => {
                let refusal = Refusal::Unproven { giver: giver.clone(), owner, epoch };
                self.refuse(Rule::HistoryGoesOn, !known.is_owned_by(giver_key), refusal)?;
                known.clone()
            }
        };
        match lineage.tip() {
            Some(tip) if !lineage.is_owned_by(giver_key) => {
                self.refuse(Rule::HandOverGoesOn, true, Refusal::NotOwner(tip.owner.clone()))?;
            }
            _ => {}
        }
        Ok(lineage)
    }

    /// The record of a take-over with the receipt it holds, and the history that leads to it. Nothing is
    /// ours, and the receipt nobody's, before the history and then the record are durable.
    pub fn take_over(
        self,
        standing: Standing<'_>,
        given: Given<'_>,
        offered: Option<&Lineage>,
        signed: SignedHandOver,
        key: &dyn Signer,
        guest: Guest,
    ) -> Result<(VmRecord, Lineage), Refusal> {
        let h = signed.verify().map_err(Refusal::Signature)?;
        self.refuse(Rule::PromiseBinds, given.promised, Refusal::Promised(h.epoch))?;
        self.refuse(Rule::TakenOnce, given.receipt.is_some(), Refusal::TakenBefore)?;
        let other = h.provenance.is_some_and(|p| p.reservation != guest.reservation);
        self.refuse(Rule::OwnReservation, other, Refusal::OtherReservation)?;
        let lineage = self.offer(standing, &h.source, &h.source_key, offered)?;
        let goes_on = lineage.goes_on_with(&h).map_err(Refusal::HandOver);
        let broken = goes_on.as_ref().err().cloned().unwrap_or(Refusal::OtherHandOver);
        self.refuse(Rule::HandOverGoesOn, goes_on.is_err(), broken)?;
        let receipt = signed.accept(key);
        let link = Link::from(receipt.clone());
        let mut record = VmRecord::new(guest.spec, guest.components, &guest.disks, guest.now);
        record.epoch = h.epoch;
        record.origin = Some(Origin::After(link.id()));
        record.run = guest.run && self.holds(Rule::TakeOverSaysRun);
        record.arrival = Some(Arrival {
            migration: h.migration,
            from: h.source,
            from_key: h.source_key,
            receipt,
            acknowledged: false,
            contested: None,
        });
        if let Some(old) = standing.record.filter(|_| self.holds(Rule::CopyIsKept)) {
            let end = old.given_up().and_then(|g| g.scrub_after).unwrap_or(guest.now.plus(guest.grace));
            record.kept = old.kept.clone();
            record.kept.push(KeptCopy { disks: old.disks.clone(), scrub_after: end });
        }
        Ok((record, lineage))
    }

    /// What became of a hand-over to this cloud for which no migration is under way.
    pub fn what_became_of(
        self,
        standing: Standing<'_>,
        given: Given<'_>,
        h: &HandOver,
        signed: &SignedHandOver,
    ) -> Became {
        let arrived = standing.record.and_then(|r| r.arrival.as_ref()).filter(|a| a.migration == h.migration);
        let receipt =
            arrived.map(|a| &a.receipt).or(given.receipt).filter(|_| self.holds(Rule::ReceiptIsForGood));
        match receipt {
            // The operator gave back what was taken over, knowing the risk.
            _ if given.promised => Became::ToBePromised,
            Some(receipt) if receipt.hand_over.record == signed.record => Became::Taken(receipt.clone()),
            Some(_) => Became::Other,
            None if standing.damaged => Became::Unknowable,
            None if h.provenance.is_some() => Became::Void,
            None => Became::ToBePromised,
        }
    }

    /// The promise never to run what was taken over: the history known, with the return in the receipt's
    /// place, so that the VM may come again.
    pub fn give_back(self, known: &Lineage, back: &Return) -> Lineage {
        let mut out = known.clone();
        match out.amend(back.clone().into()) {
            Ok(()) => out,
            Err(_) => known.clone(),
        }
    }

    /// The record once the source knows that the VM is ours.
    pub fn acknowledge(self, record: &VmRecord, migration: MigrationId) -> Option<VmRecord> {
        let mut record = record.clone();
        let arrival = record.arrival.as_mut().filter(|a| a.migration == migration && !a.acknowledged)?;
        (arrival.acknowledged, arrival.contested) = (true, None);
        Some(record)
    }

    /// The record once the source's operator took back what this cloud had taken over. `None` if that
    /// changes nothing: it is known, or the hand-over was acknowledged, or is not the last.
    pub fn withdrawn(self, record: &VmRecord, migration: MigrationId, now: UnixMillis) -> Option<VmRecord> {
        let mut record = record.clone();
        let is_here = record.is_here();
        let arrival =
            record.arrival.as_mut().filter(|a| a.migration == migration && a.contested.is_none())?;
        let over = !is_here || arrival.acknowledged;
        if over && self.holds(Rule::AcknowledgedIsFinal) {
            return None;
        }
        // Told again for ever: the source may settle it in our favour.
        (arrival.contested, arrival.acknowledged) = (Some(now), false);
        Some(record)
    }

    /// The record once the target of a hand-over that was taken back by word showed its receipt.
    pub fn contest(self, record: &VmRecord, migration: MigrationId, now: UnixMillis) -> Option<VmRecord> {
        let ours = record.is_here() && record.taken_back == Some(migration) && record.contested.is_none();
        ours.then(|| VmRecord { contested: Some(now), ..record.clone() })
    }

    /// The record once our operator said that the VM is ours all the same.
    pub fn uncontested(self, record: &VmRecord) -> Option<VmRecord> {
        let mut record = record.clone();
        let arrival = record.arrival.as_mut().and_then(|a| a.contested.take());
        let here = record.contested.take();
        arrival.or(here).map(|_| record)
    }

    // --- what others know ---

    /// What follows from `shown`, a verified history of this VM that `by` keeps.
    pub fn learn(
        self,
        standing: Standing<'_>,
        shown: &Lineage,
        me: &PublicKey,
        running: bool,
        by: &MemberJid,
        (now, scrub_after): (UnixMillis, UnixMillis),
    ) -> Learnt {
        let known = standing.known;
        let longer = match known.extended_by(shown) {
            Some(longer) if longer.links().len() > known.links().len() => longer,
            Some(_) => return Learnt::Nothing,
            // What they know is the beginning of what is known here.
            None if shown.tip().is_some_and(|tip| known.position(&tip.id).is_some()) => {
                return Learnt::Nothing;
            }
            None => return Learnt::Contradicts,
        };
        let Some(record) = standing.record else { return Learnt::Longer(longer) };
        // What this cloud itself signed, and nobody else can have, on what its record does not know.
        let more = &longer.links()[known.links().len()..];
        let is_mine = |key: &PublicKey| longer.successions().leads(key, me);
        let mine =
            more.first().and_then(|link| link.hand_over.read().ok()).filter(|h| is_mine(&h.source_key));
        let Some(first) = mine.filter(|_| self.holds(Rule::ProofIsBelieved)) else { return Learnt::Nothing };
        let mut changed = record.clone();
        let comes_home = longer.is_owned_by(me);
        if let Some(given) = record.given_up() {
            let pending = given.in_doubt() && given.hand_over().ok().as_ref() == Some(&first);
            if pending && more.len() == 1 {
                // The target will answer the same to who asks it.
                return Learnt::Nothing;
            }
            if !pending && !comes_home {
                return Learnt::Longer(longer);
            }
            // What only an operator can know is whether the disks here are worth starting.
            (changed.ownership, changed.run) = (Ownership::Here, false);
        }
        if comes_home {
            // Returned, or given and come home since.
            (changed.origin, changed.epoch) = (Some(longer.origin()), longer.next_epoch() - 1);
            changed.disproved = None;
            return Learnt::Ours(Box::new(changed), longer);
        }
        let left = |link: &Link| {
            link.kind == LinkKind::Receipt && link.hand_over.read().is_ok_and(|h| is_mine(&h.source_key))
        };
        let last = more.iter().rposition(left).unwrap_or(0);
        let links = more[last..].iter().take(PAGE_LINKS_MAX).cloned().collect();
        if record.disproved.is_some() {
            return Learnt::Nothing;
        }
        changed.disproved = Some(Box::new(Disproved { by: by.clone(), since: now, links: Links(links) }));
        match (running, self.concede(&changed, now, scrub_after)) {
            (false, Ok(record)) => Learnt::GivenUp(Box::new(record), longer),
            _ => Learnt::Disproved(Box::new(changed)),
        }
    }

    /// The record of a disproved VM that does not run: given up, as it long was.
    pub fn concede(
        self,
        record: &VmRecord,
        now: UnixMillis,
        scrub_after: UnixMillis,
    ) -> Result<VmRecord, Refusal> {
        let disproved = record.disproved.as_ref().ok_or(Refusal::NotGivenUp)?;
        let (Some(h), Some(link)) = (disproved.hand_over(), disproved.links.0.first()) else {
            return Err(Refusal::NotGivenUp);
        };
        let mut out = record.clone();
        out.disproved = None;
        out.run = false;
        out.epoch = h.epoch - 1;
        out.ownership = Ownership::GivenUp(Box::new(GivenUp {
            migration: h.migration,
            to: h.target.clone(),
            to_key: h.target_key,
            record: hex::encode(&h.encode()),
            was_running: false,
            since: now,
            seed: None,
            receipt: link.receipt(),
            scrub_after: Some(scrub_after),
        }));
        Ok(out)
    }

    /// The record and history once the target of a hand-over that was taken back by word returned it after
    /// all. `None` if the VM has moved on since, or the word was never spoken.
    pub fn confirm_back(
        self,
        record: &VmRecord,
        known: &Lineage,
        back: &Return,
    ) -> Result<Option<(VmRecord, Lineage)>, Refusal> {
        let h = back.verify().map_err(Refusal::Signature)?;
        let last = known.links().last().filter(|last| last.hand_over.record == back.hand_over.record);
        if !record.is_here() || record.taken_back != Some(h.migration) || last.is_none() {
            return Ok(None);
        }
        let (mut record, known) = self.ours_again(record, known, &h, back.clone().into())?;
        record.contested = None;
        Ok(Some((record, known)))
    }

    /// The record as its history says, where a crash came between the two: a history goes first.
    pub fn mended(self, record: &VmRecord, known: &Lineage, me: &PublicKey) -> VmRecord {
        let mut out = record.clone();
        let owner = known.is_empty() || known.is_owned_by(me);
        if record.is_here() && owner && record.epoch + 1 == known.next_epoch() {
            out.origin = Some(known.origin());
        }
        out
    }

    /// A history for a record of a release that kept none: the receipt it came by and the returns since,
    /// or, where these do not lead to its epoch, this cloud's own word.
    pub fn begin_history(
        self,
        record: &VmRecord,
        returns: &[Return],
        me: &MemberJid,
        key: &dyn Signer,
    ) -> (VmRecord, Lineage) {
        let mut known = Lineage::empty(record.spec.id);
        if let Some(a) = &record.arrival {
            let _ = known.push(a.receipt.clone().into());
        }
        let mut later: Vec<_> =
            returns.iter().filter_map(|r| Some((r.hand_over.read().ok()?.epoch, r))).collect();
        later.sort_by_key(|(epoch, _)| *epoch);
        let now = |known: &Lineage| known.next_epoch() - 1;
        for (epoch, back) in later {
            if epoch == now(&known) + 1 && epoch < record.epoch {
                let _ = known.push(back.clone().into());
            }
        }
        if now(&known) != record.epoch {
            let word = self.word(record, me, key);
            if known.push(word.clone()).is_err() {
                known = Lineage::empty(record.spec.id);
                let _ = known.push(word);
            }
        }
        (VmRecord { origin: Some(known.origin()), ..record.clone() }, known)
    }

    /// This cloud's own word that it owns the VM under the record's epoch: a hand-over of version 1 to itself.
    fn word(self, record: &VmRecord, me: &MemberJid, key: &dyn Signer) -> Link {
        let nothing = MapId::of(b"");
        let to_itself = HandOver {
            vm: record.spec.id,
            migration: MigrationId(uuid::Uuid::nil()),
            epoch: record.epoch,
            source: me.clone(),
            source_key: key.public(),
            target: me.clone(),
            target_key: key.public(),
            recipe: record.spec.recipe,
            root_delta: nothing,
            user_data: nothing,
            issued: record.created,
            provenance: None,
        };
        to_itself.sign(key).accept(key).into()
    }

    // --- what is kept ---

    /// The links that `record` alone holds, to be kept beyond it before it is replaced or removed.
    pub fn outlive(self, record: &VmRecord) -> Vec<(MigrationId, Receipt)> {
        if !self.holds(Rule::LinksOutliveRecords) {
            return Vec::new();
        }
        let came = record.arrival.as_ref().map(|a| (a.migration, a.receipt.clone()));
        let went = record.given_up().and_then(|g| Some((g.migration, g.receipt.clone()?)));
        came.into_iter().chain(went).collect()
    }

    /// The history with what `record` adds to what was kept beside it.
    pub fn known(self, mut kept: Lineage, record: Option<&VmRecord>) -> Lineage {
        let Some(record) = record else { return kept };
        for (_, receipt) in Law::WHOLE.outlive(record) {
            let link = Link::from(receipt);
            // What does not go on from there is of a history that was lost, and is refused where it counts.
            if kept.position(&link.id()).is_none() {
                let _ = kept.push_kept(link);
            }
        }
        kept
    }

    /// Directories of earlier copies whose grace period is over, and the record without them.
    pub fn due(self, record: &VmRecord, now: UnixMillis) -> Option<(Vec<String>, VmRecord)> {
        let (over, kept): (Vec<_>, Vec<_>) =
            record.kept.iter().cloned().partition(|copy| copy.scrub_after <= now);
        (!over.is_empty())
            .then(|| (over.into_iter().map(|copy| copy.disks).collect(), VmRecord { kept, ..record.clone() }))
    }
}

fn is_contested(record: &VmRecord) -> bool {
    record.contested.is_some() || record.arrival.as_ref().is_some_and(|a| a.contested.is_some())
}

#[cfg(test)]
mod tests;
