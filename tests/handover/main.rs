//! The hand-over under every kind of fault: the real machines and signatures, simulated brokers
//! that keep only what they record durably. A run is told by its seed.

mod cloud;
mod exhaustive;
mod model;
mod world;

use std::collections::HashSet;
use std::hash::Hasher;

use cicada::migration::Law;
use cicada::migration::ownership::Rule;

use world::{Tally, World};

/// The rules in force. Those of ownership are the ones that ship.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub law: Law,
    /// A migration that reserves again stages into a new directory.
    pub own_directory_per_reservation: bool,
    /// A broker whose records may be old asks before it runs what they say.
    pub asks_before_it_runs: bool,
}

const ALL: Rules = Rules { law: Law::WHOLE, own_directory_per_reservation: true, asks_before_it_runs: true };

const RUNS: u64 = 20_000;

fn run(seeds: impl Iterator<Item = u64>, rules: Rules) -> Result<(Tally, usize), (u64, String)> {
    let mut histories = HashSet::new();
    let mut sum = Tally::default();
    for seed in seeds {
        let mut world = World::new(seed.wrapping_mul(0x2545_f491_4f6c_dd1d), rules);
        world.run().map_err(|what| (seed, what))?;
        let t = world.tally;
        sum.steps += t.steps;
        sum.moves += t.moves;
        sum.crashes += t.crashes;
        sum.hand_overs += t.hand_overs;
        sum.returns += t.returns;
        sum.abandoned += t.abandoned;
        sum.held += t.held;
        sum.lost += t.lost;
        sum.repeated += t.repeated;
        sum.replayed += t.replayed;
        sum.refused += t.refused;
        sum.attacks += t.attacks;
        sum.withdrawals += t.withdrawals;
        sum.restored += t.restored;
        histories.insert(world.history.finish());
    }
    Ok((sum, histories.len()))
}

#[test]
fn one_owner_whatever_happens() {
    match run(0..RUNS, ALL) {
        Ok((tally, interleavings)) => {
            let faults = tally.crashes + tally.lost + tally.repeated + tally.replayed + tally.refused;
            println!("{RUNS} runs, {interleavings} distinct interleavings, {faults} faults: {tally:?}");
            assert!(interleavings as u64 > RUNS / 10 * 9 && tally.refused > 1000, "too much alike");
            assert!(tally.hand_overs > 1000 && tally.returns > 100, "too tame to prove anything");
            let attacked = tally.attacks > 1000 && tally.withdrawals > 1000 && tally.restored > 1000;
            assert!(attacked, "too peaceful to prove anything");
        }
        Err((seed, what)) => panic!("seed {seed}: {what}"),
    }
}

/// The suites, one of which must notice that a rule is off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Suite {
    /// The random runs of this file.
    Runs,
    /// The search in `exhaustive.rs`.
    Search,
    /// The tests beside the rules, `migration/ownership/tests.rs`, alone: another wall stands before it here.
    Beside,
}

fn noticed_by(rule: Rule) -> Suite {
    match rule {
        Rule::OwnerGivesUp | Rule::NotTwice | Rule::PromiseBinds | Rule::TakenOnce | Rule::ReturnFits => {
            Suite::Beside
        }
        Rule::LinksOutliveRecords => Suite::Search,
        Rule::NotWhileInDoubt
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

#[test]
fn every_rule_is_needed() {
    let law = |rule| (format!("{rule:?}"), Rules { law: Law::without(rule), ..ALL });
    let mut without: Vec<_> =
        Rule::ALL.into_iter().filter(|rule| noticed_by(*rule) == Suite::Runs).map(law).collect();
    without.push(("OwnDirectory".into(), Rules { own_directory_per_reservation: false, ..ALL }));
    without.push(("AsksBeforeItRuns".into(), Rules { asks_before_it_runs: false, ..ALL }));
    let mut unneeded = Vec::new();
    for (name, rules) in without {
        match run(0..RUNS * 5, rules) {
            Ok(_) => unneeded.push(name),
            Err((seed, what)) => println!("without {name}, seed {seed}: {what}"),
        }
    }
    assert!(unneeded.is_empty(), "no run needs {unneeded:?}");
}
