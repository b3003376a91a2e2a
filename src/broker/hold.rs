//! Who may do what to a VM: by what it is busy with, by who owns it, and where it matters by whether a guest of it is
//! up. One table, and every call site asks it. The rules of ownership that tests can switch off are `Law`'s: a
//! refusal that is one of these says so.

use std::fmt;

use crate::interface::{Problem, ProblemKind};
use crate::migration::Law;
use crate::migration::ownership::Rule;
use crate::migration::records::{GivenUp, VmRecord};
use crate::types::VmId;

use super::{Broker, aside};

pub use crate::migration::ownership::Hold;

/// What is done to a VM.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Verb {
    Start,
    /// An operator takes the risk that another cloud owns it.
    StartByWord,
    /// Nobody waits for it: after a boot, a crash or a start that failed.
    StartItself,
    /// By force or not. What is being started is stopped as soon as that is done.
    Stop,
    Reboot,
    /// What it is called, what it gets of the host, what is wanted of it.
    Set,
    Export,
    Resize,
    /// Of the VM, or of the copy that it left behind.
    Delete,
    /// The copy goes because its time is over.
    Scrub,
    /// Planned, begun, or begun again.
    Move,
    /// The point of no return of a move.
    GiveUp,
    /// It comes from another cloud: from the reservation to the take-over.
    Arrive,
    /// It is let go of on an operator's word, or on proof that it was given up long ago.
    LetGo,
}

#[cfg(test)]
impl Verb {
    const ALL: [Verb; 14] = [
        Verb::Start,
        Verb::StartByWord,
        Verb::StartItself,
        Verb::Stop,
        Verb::Reboot,
        Verb::Set,
        Verb::Export,
        Verb::Resize,
        Verb::Delete,
        Verb::Scrub,
        Verb::Move,
        Verb::GiveUp,
        Verb::Arrive,
        Verb::LetGo,
    ];
}

/// Whose a VM is, as far as this cloud knows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Owner {
    Here,
    /// Here, by records that others may know to be old: not all of them were asked.
    Unconfirmed,
    /// Here, and another cloud's as well, or so it seems.
    Contested,
    /// Given to a cloud that has neither confirmed nor returned it.
    InDoubt,
    /// Another cloud's: what is here is a copy.
    GivenUp,
    /// Its record cannot be read.
    Aside,
    /// What was here of it is being removed.
    Removed,
    /// Nothing of it is here.
    Unknown,
}

#[cfg(test)]
impl Owner {
    const ALL: [Owner; 8] = [
        Owner::Here,
        Owner::Unconfirmed,
        Owner::Contested,
        Owner::InDoubt,
        Owner::GivenUp,
        Owner::Aside,
        Owner::Removed,
        Owner::Unknown,
    ];
}

/// Why something may not be done to a VM now.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum No {
    /// Nothing of it is here.
    Unknown,
    Aside,
    Removed,
    InDoubt,
    GivenUp,
    /// It is here already.
    Here,
    Held(Hold),
    Contested,
    Unconfirmed,
    /// A guest of it is up.
    Up,
    /// No guest of it is up.
    Off,
}

impl fmt::Display for No {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            No::Unknown => "there is no such VM in this cloud",
            No::Aside => "is set aside: its record is damaged",
            No::Removed => "is being removed",
            No::InDoubt => "was handed over, and that is not acknowledged",
            No::GivenUp => "was handed over to another cloud",
            No::Here => "is here already",
            No::Held(hold) => return write!(f, "is being {hold}"),
            No::Contested => "has two owners",
            No::Unconfirmed => "may be another cloud's by now: not all were asked that may know",
            No::Up => "runs",
            No::Off => "does not run",
        })
    }
}

/// The table. `law`: of which rules are in force. What is refused for several reasons is refused for the first: whose
/// it is, what holds it, who doubts it, whether it runs.
pub fn may(law: Law, verb: Verb, owner: Owner, hold: Hold, up: bool) -> Result<(), No> {
    let refuse = |rule: Option<Rule>, broken: bool, no: No| match rule {
        _ if !broken => Ok(()),
        Some(rule) if !law.holds(rule) => Ok(()),
        _ => Err(no),
    };
    let waits = matches!(hold, Hold::Free | Hold::Queued);
    let held = |rule: Option<Rule>, free: bool| refuse(rule, !free, No::Held(hold));
    let here = || match owner {
        Owner::Here | Owner::Unconfirmed | Owner::Contested => Ok(()),
        Owner::InDoubt => Err(No::InDoubt),
        Owner::GivenUp => Err(No::GivenUp),
        Owner::Aside => Err(No::Aside),
        Owner::Removed => Err(No::Removed),
        Owner::Unknown => Err(No::Unknown),
    };
    let undisputed = || refuse(Some(Rule::RunsWhereOwned), owner == Owner::Contested, No::Contested);
    let confirmed = || refuse(Some(Rule::RunsWhereOwned), owner == Owner::Unconfirmed, No::Unconfirmed);
    let off = |rule: Option<Rule>| refuse(rule, up, No::Up);
    match verb {
        Verb::Start | Verb::StartItself => {
            here()?;
            held(None, waits)?;
            undisputed()?;
            confirmed()
        }
        Verb::StartByWord => {
            here()?;
            held(None, waits)?;
            undisputed()
        }
        Verb::Stop => {
            here()?;
            held(None, waits || hold == Hold::Starting)
        }
        Verb::Reboot => {
            here()?;
            held(None, waits)?;
            undisputed()?;
            confirmed()?;
            refuse(None, !up, No::Off)
        }
        Verb::Set => {
            here()?;
            held(None, waits)
        }
        Verb::Export | Verb::Resize => {
            here()?;
            held(None, waits)?;
            off(None)
        }
        // A copy is a copy whatever became of it, but one that its VM comes home to.
        Verb::Delete if owner == Owner::GivenUp => held(None, waits),
        Verb::Delete => {
            here()?;
            held(None, waits)?;
            off(None)
        }
        Verb::Scrub => match owner {
            Owner::GivenUp => held(None, waits),
            Owner::Here | Owner::Unconfirmed | Owner::Contested => Err(No::Here),
            _ => here(),
        },
        Verb::Move => {
            here()?;
            held(Some(Rule::HeldIsNotMoved), waits)?;
            undisputed()?;
            confirmed()
        }
        Verb::GiveUp => {
            here()?;
            held(None, matches!(hold, Hold::Moving(_)))?;
            refuse(Some(Rule::OwnerGivesUp), owner == Owner::Contested, No::Contested)?;
            off(Some(Rule::HeldIsNotMoved))
        }
        Verb::Arrive => match owner {
            Owner::Unknown | Owner::GivenUp => held(None, waits || matches!(hold, Hold::Coming)),
            Owner::Removed => Err(No::Removed),
            Owner::Aside => refuse(Some(Rule::NotTwice), true, No::Aside),
            Owner::InDoubt => refuse(Some(Rule::NotWhileInDoubt), true, No::InDoubt),
            Owner::Here | Owner::Unconfirmed | Owner::Contested => {
                refuse(Some(Rule::NotTwice), true, No::Here)
            }
        },
        Verb::LetGo => match owner {
            // Whoever asks for the receipt stands still for it; what proves more ends that.
            Owner::InDoubt => {
                held(None, waits || matches!(hold, Hold::Moving(_)))?;
                off(None)
            }
            Owner::GivenUp => Err(No::GivenUp),
            _ => {
                here()?;
                held(None, waits)?;
                off(None)
            }
        },
    }
}

impl Broker {
    /// Whether `verb` may be done to a VM now: [`may`], of what is known of it.
    pub(super) fn may(&self, verb: Verb, vm: VmId) -> Result<(), No> {
        may(
            self.book.law(),
            verb,
            self.owner_of(vm),
            self.hold_of(vm),
            self.vms.contains_key(&vm) && !self.is_off(vm),
        )
    }

    pub(super) fn owner_of(&self, id: VmId) -> Owner {
        if self.aside.contains_key(&id) {
            return Owner::Aside;
        }
        match self.vms.get(&id) {
            None if self.removing.contains(&id) => Owner::Removed,
            None => Owner::Unknown,
            Some(vm) if vm.record.given_up().is_some_and(GivenUp::in_doubt) => Owner::InDoubt,
            Some(vm) if !vm.record.is_here() => Owner::GivenUp,
            Some(_) if self.contested(id).is_some() => Owner::Contested,
            Some(vm) if !vm.confirmed => Owner::Unconfirmed,
            Some(_) => Owner::Here,
        }
    }

    pub(super) fn hold_of(&self, id: VmId) -> Hold {
        let Some(vm) = self.vms.get(&id) else { return Hold::Free };
        let comes = || self.incoming.values().any(|run| run.is_unfinished() && run.spec().id == id);
        match vm.hold {
            Hold::Free if !vm.record.is_here() && comes() => Hold::Coming,
            hold => hold,
        }
    }

    /// A VM gets busy with something.
    pub(super) fn holds(&mut self, id: VmId, hold: Hold) {
        if let Some(vm) = self.vms.get_mut(&id) {
            vm.hold = hold;
        }
    }

    /// It is not busy with that any more. One that is to be started still waits for it.
    pub(super) fn lets_go(&mut self, id: VmId, hold: Hold) {
        let waits = self.waits_for_start(id) && self.is_still(id);
        if let Some(vm) = self.vms.get_mut(&id).filter(|vm| vm.hold == hold) {
            vm.hold = if waits { Hold::Queued } else { Hold::Free };
        }
    }

    /// A VM that `verb` may be done to, by name or UUID; what its operator is told if not.
    pub(super) fn vm_for(&self, verb: Verb, name: &str) -> Result<VmId, Problem> {
        let id = self.find_vm(name)?;
        self.may(verb, id).map_or_else(|no| Err(self.refused(id, name, verb, no)), |()| Ok(id))
    }

    /// What an operator is told of a refusal.
    pub(super) fn refused(&self, id: VmId, name: &str, verb: Verb, no: No) -> Problem {
        let object = format!("VM {name}");
        let conflict = |reason: String| Problem::new(ProblemKind::Conflict, object.clone(), reason);
        let record = self.vms.get(&id).map(|vm| &vm.record);
        let given = record.and_then(VmRecord::given_up).map(|g| (g, record.map_or(0, |r| r.epoch)));
        match (no, given) {
            (No::Unknown, _) => Problem::new(ProblemKind::NotFound, object, no.to_string()),
            (No::Aside, _) => match self.aside.get(&id) {
                Some(damaged) => aside::problem(damaged),
                None => conflict(no.to_string()),
            },
            (No::InDoubt | No::GivenUp, Some((g, epoch))) => {
                conflict(format!("was handed over to {} under epoch {}", g.to, epoch + 1))
                    .next("run the command there; the copy here must never be started")
            }
            (No::Held(Hold::Moving(m)), _) => conflict(format!("is being moved by migration {m}"))
                .next(format!("wait for it, or: cicada migration cancel {m}")),
            (No::Held(hold), _) => conflict(format!("is being {hold} right now")).next("wait a moment"),
            (No::Contested, _) => self.contested(id).unwrap_or_else(|| conflict(no.to_string())),
            (No::Unconfirmed, _) => self.unconfirmed(id).unwrap_or_else(|| conflict(no.to_string())),
            (No::Up, _) => {
                let why = match verb {
                    Verb::Export => ": its disk changes while it is read",
                    Verb::Resize => ": its disks can be made larger while it is stopped",
                    _ => "",
                };
                conflict(format!("is {}{why}", self.power_of(id))).next(format!("cicada vm stop {name}"))
            }
            (No::Off, _) => conflict(no.to_string()).next(format!("cicada vm start {name}")),
            (No::Removed | No::Here | No::InDoubt | No::GivenUp, _) => conflict(no.to_string()),
        }
    }
}

#[cfg(test)]
mod tests;
