//! The hand-over under every kind of fault: the real machines and signatures, simulated brokers
//! that keep only what they record durably. A run is told by its seed.

mod cloud;
mod exhaustive;
mod model;
mod world;

use std::collections::HashSet;
use std::hash::Hasher;

use world::{Tally, World};

/// What the broker must do besides running the machines. Each rule is needed: without it some run
/// ends with two owners, a lost VM or a move that never ends.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The record of a take-over says whether the VM is to run.
    pub take_over_records_run: bool,
    /// A VM that is being started cannot be moved.
    pub starting_is_busy: bool,
    /// A receipt is kept when the record that holds it is overwritten or removed.
    pub receipts_outlive_records: bool,
    /// A VM does not come home while its last hand-over from here is not acknowledged.
    pub no_arrival_while_in_doubt: bool,
    /// A migration that reserves again stages into a new directory.
    pub own_directory_per_reservation: bool,
}

const ALL: Rules = Rules {
    take_over_records_run: true,
    starting_is_busy: true,
    receipts_outlive_records: true,
    no_arrival_while_in_doubt: true,
    own_directory_per_reservation: true,
};

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
        }
        Err((seed, what)) => panic!("seed {seed}: {what}"),
    }
}

#[test]
fn every_rule_of_the_broker_is_needed() {
    type Spoil = fn(&mut Rules);
    let without: [(&str, Spoil); 5] = [
        ("take_over_records_run", |r| r.take_over_records_run = false),
        ("starting_is_busy", |r| r.starting_is_busy = false),
        ("receipts_outlive_records", |r| r.receipts_outlive_records = false),
        ("no_arrival_while_in_doubt", |r| r.no_arrival_while_in_doubt = false),
        ("own_directory_per_reservation", |r| r.own_directory_per_reservation = false),
    ];
    for (name, change) in without {
        let mut rules = ALL;
        change(&mut rules);
        match run(0..RUNS * 5, rules) {
            Ok(_) => panic!("no run needs the rule {name}"),
            Err((seed, what)) => println!("without {name}, seed {seed}: {what}"),
        }
    }
}
