//! What operators are told before they decide who owns a VM, and after.

use std::time::Duration;

use crate::clock::UnixMillis;
use crate::interface::Side;
use crate::interface::problem::{Problem, ProblemKind};
use crate::migration::HandOver;
use crate::migration::records::{Arrival, GivenUp, VmRecord};
use crate::types::VmName;

use super::effect::Peer;
use super::resolving::{Outcome, Resolution, known_as};

/// A statement of what is done and risked, and what to look at first.
type Statement = (String, Vec<String>);

pub fn take_back(record: &VmRecord, g: &GivenUp) -> Statement {
    let (name, epoch) = (&record.spec.name, record.epoch + 1);
    let target = known_as(&g.to, &g.to_key);
    let statement = format!(
        "VM {name} was given to {target} under epoch {epoch} on {}, and that cloud has neither confirmed nor \
         returned it. It is taken back under epoch {}. RISK: if that cloud has taken it over, or still does \
         because the hand-over reaches it late, two copies run at once, with the same addresses, and what one \
         of them wrote is lost in the end.",
        g.since,
        epoch + 1,
    );
    let checks = vec![
        format!("reach the operator of {} by another way, and compare the key's fingerprint", g.to),
        format!(
            "'cicada vm show {}' there says that there is no such VM, or its hosts are off for good",
            record.spec.id
        ),
        format!(
            "if its broker runs, 'cicada migration resolve {} --owner there' at that cloud is the way without \
             risk: it promises never to run the VM, and the doubt ends here by itself",
            g.migration
        ),
    ];
    (statement, checks)
}

pub fn accept(record: &VmRecord, g: &GivenUp, grace: Duration) -> Statement {
    let statement = format!(
        "VM {} was given to {} under epoch {} on {}, and that cloud has neither confirmed nor returned it. It is \
         left to that cloud without its receipt. RISK: the copy here is scrubbed in {} hours; if that cloud \
         never took the VM over, and does not say so before, the VM is lost.",
        record.spec.name,
        known_as(&g.to, &g.to_key),
        record.epoch + 1,
        g.since,
        grace.as_secs().div_ceil(3600),
    );
    let checks = vec![format!(
        "the operator of {} sees the VM with its data: 'cicada vm show {}' there says 'where here' and epoch {}",
        g.to,
        record.spec.id,
        record.epoch + 1
    )];
    (statement, checks)
}

pub fn settle(r: &Resolution, owner: Side, grace: Duration) -> Statement {
    match owner {
        Side::Here => (
            format!(
                "VM {} has two owners. The copy here counts from now on and may be started. RISK: until the \
                 operator of {} has deleted the other copy, two copies can run at once; what the other one \
                 wrote is lost.",
                r.name, r.peer
            ),
            vec![format!("the operator of {} has stopped the VM there and agrees to delete it", r.peer)],
        ),
        Side::There => (
            format!(
                "VM {} has two owners. The copy at {} counts from now on. RISK: the copy here is scrubbed in {} \
                 hours; what it wrote since it was taken back is lost.",
                r.name,
                r.peer,
                grace.as_secs().div_ceil(3600)
            ),
            vec![format!("'cicada vm export {} FILE' writes the disks here to files first", r.name)],
        ),
    }
}

pub fn keep(name: &VmName, source: &Peer) -> Statement {
    (
        format!(
            "VM {name} was taken over here, and the operator of {} took it back there. The copy here counts \
             from now on and may be started. RISK: until the other copy is gone, two copies can run at once.",
            known_as(&source.jid, &source.key)
        ),
        vec![format!(
            "the operator of {} has stopped the VM there and will leave it to this cloud",
            source.jid
        )],
    )
}

/// A VM that was given up, as another cloud showed, and of which a copy was run here.
pub fn concede(name: &VmName, h: &HandOver, grace: Duration) -> Statement {
    let statement = format!(
        "VM {name} was given to {} under epoch {} by this cloud's own signature, which its records lost. The copy \
         here is given up and scrubbed after {} s. RISK: what only this copy's guest wrote is lost then.",
        h.target,
        h.epoch,
        grace.as_secs()
    );
    (statement, vec!["what only this copy has was saved elsewhere, or is not needed".into()])
}

pub fn give_back(name: &VmName, epoch: u64, source: &Peer) -> Statement {
    (
        format!(
            "VM {name} was taken over here under epoch {epoch}, and its source {} has not acknowledged that. This \
             cloud promises never to run it under that epoch, so that its source can take it back; it is set \
             aside, its disks stay. RISK: if the source has the receipt already, it scrubs its copy, and \
             nobody may run the VM any more.",
            known_as(&source.jid, &source.key)
        ),
        vec![format!("'cicada vm show {name}' at {} says 'where in-doubt'", source.jid)],
    )
}

pub fn promise(name: &VmName, epoch: u64, source: &Peer) -> Statement {
    (
        format!(
            "VM {name} is on its way here from {} under epoch {epoch}. This cloud promises never to run it under \
             that epoch, so that its source can take it back. RISK: if a record of this cloud was lost that \
             said the VM is ours, and the source has our receipt, nobody may run the VM any more.",
            known_as(&source.jid, &source.key)
        ),
        vec![format!("the VM at {} is 'here' or 'in-doubt', not 'given-up'", source.jid)],
    )
}

pub fn contested_answer(r: &Resolution) -> String {
    format!("its operator took the VM back on {}: it has two owners until operators settle it", r.at)
}

pub fn contested_at_source(r: &Resolution) -> Problem {
    let reason = format!(
        "CONTESTED, it has two owners: the operator here took it back on {}, and {} had taken it over",
        r.at, r.peer
    );
    Problem::new(ProblemKind::Conflict, format!("VM {}", r.name), reason).next(format!(
        "agree with the operator of {} whose copy counts; stop the other one; then: cicada migration resolve {} \
         --owner here|there",
        r.peer, r.migration
    ))
}

pub fn contested_at_target(record: &VmRecord, a: &Arrival, since: UnixMillis) -> Problem {
    let reason = format!(
        "CONTESTED, it has two owners: it was taken over here from {}, whose operator took it back (known since {since})",
        a.from
    );
    Problem::new(ProblemKind::Conflict, format!("VM {}", record.spec.name), reason).next(format!(
        "agree with the operator of {} whose copy counts. If this one: cicada migration resolve {} --owner here. \
         If that one: cicada vm stop {name}, cicada vm delete {name}",
        a.from,
        a.migration,
        name = record.spec.name
    ))
}

/// Decided here, and the other cloud has not said what it knows.
pub fn unconfirmed(r: &Resolution) -> Problem {
    let reason = match r.owner {
        Side::Here => format!(
            "was taken back by the operator on {}, and {} has not said yet that it never runs it",
            r.at, r.peer
        ),
        Side::There => format!("was left to {} by the operator on {}, without its receipt", r.peer, r.at),
    };
    Problem::new(ProblemKind::Conflict, format!("VM {}", r.name), reason)
        .next(format!("{} is asked until it answers; see 'cicada migration show {}'", r.peer, r.migration))
}

pub fn in_doubt(record: &VmRecord, g: &GivenUp) -> Problem {
    let reason = format!("was given to {} on {}, which has neither confirmed nor returned it", g.to, g.since);
    Problem::new(ProblemKind::Conflict, format!("VM {}", record.spec.name), reason)
        .next(format!("see 'cicada migration show {}'", g.migration))
}

/// A decision and what became of it, for `migration show` and receipts.
pub fn remark(r: &Resolution) -> String {
    let by = by(r.by_uid);
    let decided = match (&r.given, r.owner) {
        (Some(_), Side::Here) => "took the VM back",
        (Some(_), Side::There) => "left the VM to the target",
        (None, Side::There) => "promised that this cloud never runs the VM under that epoch",
        (None, Side::Here) => "kept the VM, which was contested",
    };
    let became = match &r.outcome {
        Outcome::Awaited => format!("{} has not said yet what it knows", r.peer),
        Outcome::Agreed { at } if r.given.is_some() => {
            let word = if r.owner == Side::Here { "its return" } else { "its receipt" };
            format!("{} gave {word} on {at}: no harm was done", r.peer)
        }
        Outcome::Agreed { .. } => String::new(),
        Outcome::Contested { since } => {
            format!("CONTESTED since {since}: {} had taken it over, the VM has two owners", r.peer)
        }
        Outcome::Reverted { at } => format!("{} returned it on {at}: it had never taken it over", r.peer),
        Outcome::Settled { owner, by_uid, at } => {
            let side = if *owner == Side::Here { "the copy here" } else { "the target's copy" };
            format!("it was contested; {} settled on {at} that {side} counts", self::by(*by_uid))
        }
    };
    let text = format!("override: on {} {by} {decided}, without the word of {}. {became}", r.at, r.peer);
    format!("{} Told: {}", text.trim_end().trim_end_matches('.').to_owned() + ".", r.statement)
}

fn by(uid: Option<u32>) -> String {
    uid.map_or_else(|| "an operator".into(), |uid| format!("the operator with uid {uid}"))
}
