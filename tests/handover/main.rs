//! The hand-over under every kind of fault: brokers' cores as they ship (`cicada::broker`), driven by simulated
//! federations in which whatever is on its way may happen next. Random runs, and a search of everything within
//! bounds. Nothing of a broker is written again here.
//!
//! `CICADA_HANDOVER_RUNS=N` makes so many random runs, `CICADA_HANDOVER_SEED=N` one alone,
//! `CICADA_HANDOVER_SEARCH=N` allows the search so many states and every order after deaths, too;
//! `CICADA_HANDOVER_RULE=Name` tries one rule, whichever suite is to notice it.

mod federation;
mod held;
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
            let rarer = [tally.hasty, tally.redeemed, tally.damaged, tally.passed_on];
            assert!(rarer.iter().all(|n| *n > count / 200), "too peaceful to prove anything: {rarer:?}");
        }
        Err((seed, what)) => panic!("seed {seed}: {what}; run it alone with CICADA_HANDOVER_SEED={seed}"),
    }
}

/// The suites, one of which must notice that a rule is off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Suite {
    /// The random runs, from this seed on: what needs some rules is so rare that hundreds of runs do not come to it.
    Runs(u64),
    /// The search.
    Search,
    /// The tests beside the rules, `migration/ownership/tests.rs`, alone: in the core another wall stands before the
    /// rule.
    Beside,
}

fn noticed_by(rule: Rule) -> Suite {
    match rule {
        Rule::OwnerGivesUp | Rule::NotTwice | Rule::PromiseBinds | Rule::TakenOnce | Rule::ReturnFits => {
            Suite::Beside
        }
        Rule::TakeOverSaysRun => Suite::Search,
        Rule::NotWhileInDoubt
        | Rule::ReceiptIsForGood
        | Rule::CopyIsKept
        | Rule::AcknowledgedIsFinal
        | Rule::OwnReservation
        | Rule::LinksOutliveRecords
        | Rule::HeldIsNotMoved
        | Rule::ProofIsBelieved => Suite::Runs(0),
        Rule::RunsWhereOwned => Suite::Runs(120),
        Rule::HandOverGoesOn => Suite::Runs(1060),
        Rule::HistoryGoesOn => Suite::Runs(1132),
    }
}

/// The first run that goes wrong without the rule, and well with it.
#[cfg(debug_assertions)]
fn noticed(rule: Rule, seeds: std::ops::Range<u64>) -> Option<(u64, String)> {
    let mut from = seeds.start;
    while let Err((seed, what)) = runs(Law::without(rule), from..seeds.end) {
        if runs(Law::WHOLE, seed..seed + 1).is_ok() {
            return Some((seed, what));
        }
        from = seed + 1;
    }
    None
}

#[cfg(debug_assertions)]
#[test]
fn every_rule_is_needed() {
    let searched = Rule::ALL.into_iter().filter(|rule| noticed_by(*rule) == Suite::Search);
    assert!(searched.eq(search::NOTICES), "the search tries other rules than the table says");
    let count = number("CICADA_HANDOVER_RUNS").unwrap_or(1000);
    let only = std::env::var("CICADA_HANDOVER_RULE").ok();
    let mut unneeded = Vec::new();
    let seeds = |rule: Rule| match (&only, noticed_by(rule)) {
        (Some(only), _) => (*only == format!("{rule:?}")).then_some(0..count),
        (None, Suite::Runs(from)) => Some(from..from + count),
        (None, _) => None,
    };
    for (rule, seeds) in Rule::ALL.into_iter().filter_map(|rule| Some((rule, seeds(rule)?))) {
        match noticed(rule, seeds.clone()) {
            Some((seed, what)) => println!("without {rule:?}, seed {seed}: {what}"),
            None => {
                println!("without {rule:?}: nothing in {} runs", seeds.count());
                unneeded.push(rule);
            }
        }
    }
    assert!(unneeded.is_empty(), "no run needs {unneeded:?}");
}
