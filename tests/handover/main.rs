//! The hand-over under every kind of fault: brokers' cores as they ship (`cicada::broker`), driven by simulated
//! federations in which whatever is on its way may happen next. Random runs, and a search of everything within
//! bounds. Nothing of a broker is written again here.
//!
//! `CICADA_HANDOVER_RUNS=N` makes so many random runs, `CICADA_HANDOVER_SEED=N` one alone,
//! `CICADA_HANDOVER_SEARCH=N` allows the search so many states.

mod federation;
mod liar;
mod runs;
mod search;

use cicada::migration::Law;
use cicada::migration::ownership::Rule;

use runs::{Beginnings, runs};

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

#[test]
fn one_owner_whatever_happens() {
    if let Some(seed) = number("CICADA_HANDOVER_SEED") {
        // What the brokers log of one run tells the story of it.
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .with_ansi(false)
            .without_time()
            .init();
        let one = runs::run(&Beginnings::new(Law::WHOLE), seed);
        return println!("seed {seed}: {:?}", one.expect("a rule is broken"));
    }
    let count = number("CICADA_HANDOVER_RUNS").unwrap_or(1000);
    match runs(Law::WHOLE, 0..count) {
        Ok((tally, interleavings)) => {
            let faults = tally.faults();
            println!("{count} runs, {interleavings} distinct interleavings, {faults} faults: {tally:?}");
            assert!(interleavings as u64 > count / 10 * 9, "too much alike");
            assert!(
                tally.hand_overs > count / 20 && tally.returns > count / 50,
                "too tame to prove anything"
            );
            let attacked = [tally.attacks, tally.withdrawals, tally.restored, tally.resolved];
            assert!(attacked.iter().all(|n| *n > count / 50), "too peaceful to prove anything: {attacked:?}");
        }
        Err((seed, what)) => panic!("seed {seed}: {what}; run it alone with CICADA_HANDOVER_SEED={seed}"),
    }
}

/// The suites, one of which must notice that a rule is off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Suite {
    /// The random runs.
    Runs,
    /// The tests beside the rules, `migration/ownership/tests.rs`, alone: another wall stands before it here.
    Beside,
}

fn noticed_by(rule: Rule) -> Suite {
    match rule {
        Rule::OwnerGivesUp | Rule::NotTwice | Rule::PromiseBinds | Rule::TakenOnce | Rule::ReturnFits => {
            Suite::Beside
        }
        Rule::LinksOutliveRecords
        | Rule::NotWhileInDoubt
        | Rule::HistoryGoesOn
        | Rule::HandOverGoesOn
        | Rule::OwnReservation
        | Rule::TakeOverSaysRun
        | Rule::ReceiptIsForGood
        | Rule::CopyIsKept
        | Rule::AcknowledgedIsFinal
        | Rule::RunsWhereOwned
        | Rule::ProofIsBelieved
        | Rule::HeldIsNotMoved => Suite::Runs,
    }
}

#[cfg(debug_assertions)]
#[test]
fn every_rule_is_needed() {
    let count = number("CICADA_HANDOVER_RUNS").unwrap_or(1000) * 5;
    let only = std::env::var("CICADA_HANDOVER_RULE").ok();
    let mut unneeded = Vec::new();
    for rule in Rule::ALL.into_iter().filter(|rule| noticed_by(*rule) == Suite::Runs) {
        if only.as_ref().is_some_and(|only| *only != format!("{rule:?}")) {
            continue;
        }
        match runs(Law::without(rule), 0..count) {
            Ok(_) => {
                println!("without {rule:?}: nothing in {count} runs");
                unneeded.push(rule);
            }
            Err((seed, what)) => println!("without {rule:?}, seed {seed}: {what}"),
        }
    }
    assert!(unneeded.is_empty(), "no run needs {unneeded:?}");
}
