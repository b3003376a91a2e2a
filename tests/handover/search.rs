//! Every order in which things can happen around one or two moves between two clouds, with so many crashes, failing
//! writes and losses as a budget allows: the worlds are cloned at every choice, and no state is visited twice.
//!
//! Two states are the same if the same happened to each cloud in the same order; what happens in one cloud changes
//! nothing in the other but by a message. So the paths that differ only in the order of independent things meet
//! again, and how many there are is counted without walking each.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use cicada::broker::memory_book::Page;
use cicada::interface::{MoveRequest, Request};
use cicada::migration::Law;
use cicada::migration::ownership::Rule;
use cicada::sim::{Death, Kind, Pending, World};

use crate::federation::{NAME, federation, open, owners, records, rests, sound};
use crate::number;

/// How much trouble there is on one path.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Budget {
    moves: u8,
    crashes: u8,
    failing_writes: u8,
    /// Answers that do not come in time, and waits that end before what was waited for.
    impatience: u8,
    cancels: u8,
    /// A broker died: from there on things happen in the order of time.
    dead: bool,
}

/// A rule of the world around the brokers that is broken on purpose, to see that the search would notice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Broken {
    Nothing,
    /// Disks say that they wrote what a crash takes back.
    DisksLie,
}

/// What can be done next.
#[derive(Clone, Copy, Debug)]
enum Choice {
    Take(Pending),
    Failing(Pending, Page),
    Dies(Pending, Death),
    Lies(Pending),
    Move,
    Cancel(usize),
}

#[derive(Default)]
struct Search {
    broken: Option<Broken>,
    /// What a broker that begins again asks, and is asked, has so many orders that only one of them is followed, if
    /// the search is not given more states.
    in_time_once_dead: bool,
    /// Paths from each state to its ends.
    paths: HashMap<(u64, Budget), f64>,
    transitions: u64,
    ends: u64,
    handed_over: u64,
    returned: u64,
    states_max: u64,
    deepest: usize,
    path: Vec<String>,
}

const DOWN: Duration = Duration::from_secs(1);

impl Search {
    fn choices(&self, world: &World, budget: Budget) -> Vec<(Choice, Budget)> {
        let mut out = Vec::new();
        let pending = world.pending();
        // The room tells everybody at once who comes and goes.
        if let Some(told) = pending.iter().find(|p| p.kind == Kind::Room) {
            return vec![(Choice::Take(*told), budget)];
        }
        let news: Vec<Pending> = pending.iter().copied().filter(|p| p.kind.is_news()).collect();
        for p in &news {
            out.push((Choice::Take(*p), budget));
            if p.kind == Kind::Restart || budget.crashes + budget.failing_writes == 0 {
                continue;
            }
            let mut after = world.clone();
            let writes = after.clouds[p.cloud].book.writes();
            after.take(p.seq);
            let writes = after.clouds[p.cloud].book.writes() - writes;
            if budget.failing_writes > 0 && writes > 0 {
                let left = Budget { failing_writes: budget.failing_writes - 1, ..budget };
                out.extend([Page::Vms, Page::Lineages].map(|page| (Choice::Failing(*p, page), left)));
            }
            if budget.crashes > 0 {
                let left = Budget { crashes: budget.crashes - 1, dead: self.in_time_once_dead, ..budget };
                // Between any two writes, before any effect happened or after all did.
                let dies = |writes, effects| {
                    Choice::Dies(*p, Death { writes, effects, hosts_go_on: true, down: DOWN })
                };
                out.extend((0..writes).map(|n| (dies(n, 0), left)));
                out.push((dies(writes, 0), left));
                out.push((dies(writes, usize::MAX), left));
                if self.broken == Some(Broken::DisksLie) && writes > 0 {
                    out.push((Choice::Lies(*p), left));
                }
            }
        }
        let waits = |p: &&Pending| matches!(p.kind, Kind::Silence | Kind::Due);
        match news.is_empty() {
            // Nothing comes of itself: the first wait ends.
            true => {
                let first = pending.iter().filter(waits).min_by_key(|p| (p.at, p.id));
                out.extend(first.map(|p| (Choice::Take(*p), budget)));
            }
            false if budget.impatience > 0 => {
                let left = Budget { impatience: budget.impatience - 1, ..budget };
                out.extend(pending.iter().filter(waits).map(|p| (Choice::Take(*p), left)));
            }
            false => {}
        }
        if budget.moves > 0 && !owners(world).is_empty() && !under_way(world) {
            out.push((Choice::Move, Budget { moves: budget.moves - 1, ..budget }));
        }
        if budget.cancels > 0 && under_way(world) {
            let left = Budget { cancels: budget.cancels - 1, ..budget };
            out.extend((0..world.clouds.len()).map(|at| (Choice::Cancel(at), left)));
        }
        out
    }

    fn apply(&self, world: &mut World, choice: Choice) {
        match choice {
            Choice::Take(p) => drop(world.take(p.seq)),
            Choice::Failing(p, page) => world.take_failing(p.seq, &[page]),
            Choice::Dies(p, death) => world.take_and_die(p.seq, death),
            Choice::Lies(p) => {
                let before = world.clouds[p.cloud].book.copy();
                world.take(p.seq);
                world.cloud(p.cloud).book = before;
                world.crash(p.cloud, DOWN);
            }
            Choice::Move => {
                let Some(from) = owners(world).first().copied() else { return };
                let to = Some(world.clouds[1 - from].name().to_owned());
                world.call(
                    from,
                    Request::Move(MoveRequest::Begin {
                        vm: NAME.into(),
                        to,
                        dry_run: false,
                        force_stop: true,
                    }),
                );
            }
            Choice::Cancel(at) => {
                for id in open(world, at) {
                    world.call(at, Request::Move(MoveRequest::Cancel { id: id.to_string() }));
                }
            }
        }
    }

    /// How many paths lead from here to an end, all of them sound.
    fn explore(&mut self, world: &World, budget: Budget) -> Result<f64, String> {
        let state = (world.digest(), budget);
        if let Some(paths) = self.paths.get(&state) {
            return Ok(*paths);
        }
        if self.paths.len() as u64 >= self.states_max {
            return Err(format!("there are more than {} states", self.states_max));
        }
        self.deepest = self.deepest.max(self.path.len());
        let choices = if budget.dead { Vec::new() } else { self.choices(world, budget) };
        let mut paths = 0.0;
        for (choice, left) in choices {
            self.transitions += 1;
            let mut next = world.clone();
            self.apply(&mut next, choice);
            self.path.push(format!("{choice:?}"));
            sound(&next)?;
            paths += self.explore(&next, left)?;
            self.path.pop();
        }
        if paths == 0.0 {
            self.ends += 1;
            let mut end = world.clone();
            rests(&mut end)?;
            let (at, owner) = records(&end).find(|(_, r)| r.is_here()).ok_or("nobody owns it")?;
            if !owner.run {
                return Err("it ran, and is not to run any more".into());
            }
            self.handed_over += u64::from(at != 0);
            self.returned += u64::from(at == 0 && owner.epoch > 1);
            paths = 1.0;
        }
        self.paths.insert(state, paths);
        Ok(paths)
    }
}

/// Whether a move goes on, as the record of one of the clouds or what they say to each other shows.
fn under_way(world: &World) -> bool {
    let doubted = records(world).any(|(_, r)| r.given_up().is_some_and(|g| g.in_doubt()));
    doubted || world.clouds.iter().any(|c| !c.serving.is_empty() || !c.staged.is_empty())
}

fn search(budget: Budget, law: Law, broken: Broken) -> (Search, Result<f64, String>) {
    let allowed = number("CICADA_HANDOVER_SEARCH");
    let (states_max, in_time_once_dead) = (allowed.unwrap_or(200_000), allowed.is_none());
    let mut search = Search { broken: Some(broken), states_max, in_time_once_dead, ..Search::default() };
    let begun = Instant::now();
    let world = federation(2, true, false, law);
    let result = search.explore(&world, budget);
    println!(
        "{budget:?}: {} states, {} transitions, {} ends ({} handed over, {} taken back), {:?} interleavings, at most \
         {} steps deep, {:.1} s",
        search.paths.len(),
        search.transitions,
        search.ends,
        search.handed_over,
        search.returned,
        result.as_ref().ok(),
        search.deepest,
        begun.elapsed().as_secs_f64()
    );
    (search, result)
}

/// All of it is in order.
fn explore(budget: Budget) -> Search {
    let (search, result) = search(budget, Law::WHOLE, Broken::Nothing);
    match result {
        Ok(_) => search,
        Err(what) => panic!("{what}, after {:#?}", search.path),
    }
}

const NONE: Budget =
    Budget { moves: 1, crashes: 0, failing_writes: 0, impatience: 0, cancels: 0, dead: false };

#[test]
fn one_move_is_in_order_in_every_order_of_what_happens() {
    let search = explore(Budget { impatience: 1, ..NONE });
    assert!(search.handed_over > 0, "it was never handed over");
}

#[test]
fn one_move_is_in_order_whenever_a_broker_dies_or_a_write_fails() {
    let search = explore(Budget { crashes: 1, impatience: 1, ..NONE });
    assert!(search.handed_over > 0 && search.returned > 0, "too tame to prove anything");
    assert!(search.paths.len() > 1000, "too small to prove anything");
    explore(Budget { failing_writes: 1, ..NONE });
}

#[test]
fn two_moves_are_in_order_in_every_order_of_what_happens() {
    explore(Budget { moves: 2, ..NONE });
}

#[test]
fn the_search_notices_disks_that_lie() {
    let (found, result) = search(Budget { crashes: 1, ..NONE }, Law::WHOLE, Broken::DisksLie);
    let what = result.expect_err("two owners or none are to be found");
    println!("disks that lie: {what} after {:?}", found.path.last());
}

/// Rules that only a death in the middle of a step needs.
pub const NOTICES: [Rule; 1] = [Rule::TakeOverSaysRun];

#[cfg(debug_assertions)]
#[test]
fn the_search_notices_rules_that_are_off() {
    for rule in NOTICES {
        let (found, result) = search(Budget { crashes: 1, ..NONE }, Law::without(rule), Broken::Nothing);
        let what = result.err().unwrap_or_else(|| panic!("no order needs {rule:?}"));
        println!("without {rule:?}: {what} after {:?}", found.path.last());
    }
}
