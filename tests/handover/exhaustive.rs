//! Every reachable state of the small model, visited one by one.

use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Mutex;

use cicada::migration::ownership::Rule;
use stateright::{Checker, HasDiscoveries, Model, Property};

use crate::model::{Action, Ask, Broken, Packet, Reply, Side, State};
use crate::{Suite, noticed_by};

/// A federation without faults comes to rest within this many steps.
const CALM_STEPS_MAX: usize = 200;

/// How much happens; within it, everything does.
#[derive(Clone, Copy)]
struct Bounds {
    moves: usize,
    /// How often the target may forget a move that is being staged, and it is staged anew.
    restarts: u32,
    /// Reservations of one move: each repeated request makes another, and need not be followed for ever.
    reserved: u8,
    /// Whether switch-over and hold are asked for.
    steered: bool,
}

struct HandOver {
    bounds: Bounds,
    broken: Broken,
    /// Fingerprints of states known to come to rest, so that no path is walked twice.
    restful: Mutex<HashSet<u64>>,
}

impl HandOver {
    fn new(bounds: Bounds, broken: Broken) -> Self {
        Self { bounds, broken, restful: Mutex::default() }
    }

    /// From here, without further faults, a good rest is reached.
    fn comes_to_rest(&self, state: &State) -> Result<(), &'static str> {
        let mut restful = self.restful.lock().expect("nothing panics while it is held");
        let (mut path, mut at) = (Vec::new(), state.clone());
        while path.len() < CALM_STEPS_MAX {
            let mut hasher = DefaultHasher::new();
            at.hash(&mut hasher);
            let print = hasher.finish();
            if !restful.contains(&print) {
                path.push(print);
                if let Some(next) = at.calm(self.broken) {
                    at = next;
                    continue;
                }
                at.rests_well()?;
            }
            restful.extend(path);
            return Ok(());
        }
        Err("it does not come to rest")
    }
}

fn said(s: &State, of: usize, reply: Reply) -> bool {
    s.said.contains(&Packet { of, ask: Ask::Start, reply: Some(reply) })
}

fn owns_under(side: &Side, epoch: u64) -> bool {
    side.owns() && side.epoch() == epoch
}

impl Model for HandOver {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::first(true), State::first(false)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        state.actions(self.bounds.moves, self.bounds.steered, self.broken, actions);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut next = last.clone();
        next.apply(action, self.broken);
        (next != *last).then_some(next)
    }

    fn within_boundary(&self, state: &State) -> bool {
        let passes_max = |of: usize| 1 + self.bounds.restarts + u32::from(state.moves[of].ran);
        state.said.iter().all(|p| match p.ask {
            Ask::Stage { pass, .. } => pass <= passes_max(p.of),
            _ => true,
        }) && state.sides.iter().all(|side| side.reserved.values().all(|n| *n <= self.bounds.reserved))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never two owners", |_, s: &State| {
                s.sides.iter().filter(|side| side.owns()).count() <= 1
            }),
            Property::always("it runs only where it is owned", |_, s: &State| {
                s.sides.iter().all(|side| side.owns() || !side.running)
            }),
            Property::always("the owner's epoch is the highest", |_, s: &State| {
                let [a, b] = &s.sides;
                [(a, b), (b, a)].iter().all(|(x, y)| !x.owns() || x.epoch() > y.epoch())
            }),
            Property::always("never a receipt and a return of one hand-over", |_, s: &State| {
                (0..s.moves.len()).all(|of| !(said(s, of, Reply::Started) && said(s, of, Reply::Returned)))
            }),
            Property::always("it can come to rest with one owner", |m: &Self, s: &State| {
                m.comes_to_rest(s).is_ok()
            }),
            Property::sometimes("it is handed over", |_, s: &State| owns_under(&s.sides[1], 2)),
            Property::sometimes("it is taken back", |_, s: &State| {
                owns_under(&s.sides[0], 3) && s.moves.len() == 1
            }),
            Property::always("only a VM that is being moved is paused", |_, s: &State| {
                s.sides.iter().all(|side| {
                    !side.paused || side.running && side.outgoing.is_some() || side.starting.is_some()
                })
            }),
            Property::sometimes("its owner is in doubt after a restart", |_, s: &State| {
                !s.sides.iter().any(Side::owns) && s.sides[0].outgoing.is_some()
            }),
        ]
    }
}

/// Visits everything within the bounds.
fn explore(bounds: Bounds) {
    let check = HandOver::new(bounds, Broken::Nothing).checker().spawn_bfs().join();
    for (name, path) in check.discoveries() {
        let why = check.model().comes_to_rest(path.last_state());
        let classification = check.discovery_classification(name);
        assert_eq!(classification.to_string(), "example", "{name} ({why:?}): {:?}", path.into_actions());
    }
    check.assert_properties();
    println!(
        "{} move(s), staged anew {} time(s): {} states, {} of them unique, at most {} steps deep",
        bounds.moves,
        bounds.restarts,
        check.state_count(),
        check.unique_state_count(),
        check.max_depth()
    );
    assert!(check.unique_state_count() > 1000, "too small to prove anything");
}

#[test]
fn one_move_is_in_order_in_every_state() {
    explore(Bounds { moves: 1, restarts: 3, reserved: 4, steered: true });
}

#[test]
fn two_moves_are_in_order_in_every_state() {
    explore(Bounds { moves: 2, restarts: 0, reserved: 2, steered: false });
}

#[test]
fn the_check_finds_every_broken_rule() {
    let found = [
        (Broken::SignsFirst, "never two owners"),
        (Broken::Without(Rule::OwnReservation), "never a receipt and a return of one hand-over"),
        (Broken::Without(Rule::ReceiptIsForGood), "never a receipt and a return of one hand-over"),
        (Broken::StartsFirst, "it runs only where it is owned"),
        (Broken::Without(Rule::LinksOutliveRecords), "never a receipt and a return of one hand-over"),
        (Broken::DenialIsReturn, "never two owners"),
        (Broken::ArrivingIsFree, "it can come to rest with one owner"),
    ];
    for rule in Rule::ALL.into_iter().filter(|rule| noticed_by(*rule) == Suite::Search) {
        assert!(found.iter().any(|(broken, _)| *broken == Broken::Without(rule)), "{rule:?} is not tried");
    }
    for (broken, expected) in found {
        let bounds = Bounds { moves: 2, restarts: 0, reserved: 2, steered: false };
        let until = HasDiscoveries::AnyOf([expected].into());
        let check = HandOver::new(bounds, broken).checker().finish_when(until).spawn_bfs().join();
        let path = check.assert_any_discovery(expected);
        println!("{broken:?}: not '{expected}' after {:?}", path.into_actions());
    }
}
