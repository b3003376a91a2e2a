//! A member that breaks the protocol with its real key, in the name of any cloud that once had the VM, or never.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use cicada::broker::Matter;
use cicada::broker::book::Book;
use cicada::clock::UnixMillis;
use cicada::migration::envelope::{VERSION, VERSION_BEFORE};
use cicada::migration::handover::{Origin, Provenance, Return};
use cicada::migration::message::{Initialization, Seed};
use cicada::migration::{AnswerBody, HandOver, Law, Lineage, Links, Pass, RequestBody};
use cicada::sim::World;
use cicada::sim::cloud::key_of;
use cicada::types::MigrationId;
use cicada::vm::VmSpec;

use crate::federation::{record, records, vm};

/// How often another liar, history and victim are looked for.
const TRIES: usize = 8;

/// All that a cloud knows of the VM's history.
fn known(world: &World, at: usize) -> Lineage {
    let book = &world.clouds[at].book;
    Law::WHOLE.known(book.lineage(vm()).expect("it is read"), book.vm(vm()).as_ref())
}

/// A member hands over what it never had, or had once: with the history as it then was, or none, under an epoch
/// of its choice, to a cloud that knows better. Whether there was anything to lie about.
pub fn attack(world: &mut World) -> bool {
    (0..TRIES).any(|_| lie(world))
}

fn lie(world: &mut World) -> bool {
    let histories: Vec<Lineage> = (0..world.clouds.len()).map(|at| known(world, at)).collect();
    let Some(whole) = histories.iter().max_by_key(|h| h.links().len()) else { return false };
    let liar = world.random.below(world.clouds.len());
    let key = world.clouds[liar].key.clone();
    let length = world.random.below(whole.links().len() + 1);
    let Ok(shown) = Lineage::verify(vm(), whole.links()[..length].to_vec()) else { return false };
    if shown.tip().is_some_and(|tip| tip.owner_key != key.public()) || length == whole.links().len() {
        return false;
    }
    // Who last heard that the liar owns the VM cannot know that it gave it away since.
    let knows_better = |at: &usize| {
        let known = &histories[*at];
        *at != liar && known.links().len() > length && !known.is_owned_by(&key.public())
    };
    let mut targets: Vec<usize> = (0..world.clouds.len()).filter(knows_better).collect();
    // Who has it takes it from nobody; that is tried as well, but not often.
    if !world.random.chance(0.2) {
        targets.retain(|at| world.clouds[*at].book.vm(vm()).is_none_or(|r| !r.is_here()));
    }
    let Some(target) = targets.get(world.random.below(targets.len())).copied() else { return false };
    let version = if world.random.chance(0.3) { VERSION_BEFORE } else { VERSION };
    let migration = MigrationId(uuid::Uuid::from_u128(u128::from(world.random.number()) | 1 << 65));
    let epoch = [shown.next_epoch(), whole.next_epoch(), 1_000_001][world.random.below(3)];
    let about = Matter { migration, vm: vm(), epoch: epoch - 1 };
    let spec = record(&world.catalogue, true).spec;
    let say = |world: &mut World, body| {
        let answer = world.say(liar, target, about, version, body);
        tracing::debug!(?answer, "the liar is told");
        answer
    };
    let Some(AnswerBody::Reserved { reservation, .. }) =
        say(world, RequestBody::Reservation { spec: spec.clone() })
    else {
        return true;
    };
    if version == VERSION && !world.random.chance(0.25) {
        let links = Links(shown.links().to_vec());
        let (total, after) = (links.0.len() as u32, None);
        say(world, RequestBody::Lineage { at: 0, total, after, links, successions: Default::default() });
    }
    // What it stages is not what the guest wrote: it serves content under a ticket of its own.
    let seed = cicada::sim::seed_of(&spec, 0);
    stage(world, (liar, target), about, version, &spec, seed);
    let of = &world.clouds[target];
    let hand_over = HandOver {
        vm: vm(),
        migration,
        epoch,
        source: world.clouds[liar].jid.clone(),
        source_key: key.public(),
        target: of.jid.clone(),
        target_key: of.key.public(),
        recipe: spec.recipe,
        root_delta: seed.root_delta.id(),
        user_data: seed.user_data.id(),
        issued: UnixMillis(1),
        provenance: reservation.map(|reservation| Provenance { origin: shown.origin(), reservation }),
    };
    say(world, RequestBody::Start { hand_over: hand_over.sign(&key), run: true });
    true
}

/// Has a target stage disks in the state of `seed`, as the only pass.
fn stage(
    world: &mut World,
    (source, target): (usize, usize),
    about: Matter,
    version: u32,
    spec: &VmSpec,
    seed: Seed,
) {
    let recipe = &world.catalogue.recipes[0].recipe;
    let ticket = cicada::types::Hash::of(b"a liar's ticket");
    let init = Initialization {
        spec: spec.clone(),
        recipe: BASE64.encode(recipe.encode()),
        component_names: Vec::new(),
        component_bytes: 0,
        pass: Pass { number: 1, last: true, root_delta: seed.root_delta, user_data: seed.user_data },
        addresses: vec!["192.0.2.1:7420".into()],
        source_key: world.clouds[source].key.public(),
        ticket: ticket.to_string(),
        firmware: None,
    };
    world.cloud(source).serving.insert(about.migration, ticket);
    for _ in 0..4 {
        let body = RequestBody::Initialization(Box::new(init.clone()));
        let staged = world.say(source, target, about, version, body);
        let mut outcomes = world.pending().into_iter().filter(|p| p.cloud == target);
        let next = outcomes.rfind(|p| p.kind == cicada::sim::Kind::Outcome);
        match (staged, next) {
            (Some(AnswerBody::Working(_)), Some(next)) => drop(world.take(next.seq)),
            _ => break,
        }
    }
    world.cloud(source).serving.remove(&about.migration);
}

/// Whose hand-over was given back, and who owns the VM by that, presents it once more: under the same migration, and
/// a reservation that is not the one it names. Whether there was such a hand-over.
pub fn redeem(world: &mut World) -> bool {
    let returned: Vec<(usize, Return)> = (0..world.clouds.len())
        .flat_map(|at| world.clouds[at].book.returned(vm()).into_iter().map(move |back| (at, back)))
        .collect();
    let Some((giver, back)) = returned.get(world.random.below(returned.len())).cloned() else { return false };
    let Ok(h) = back.verify() else { return false };
    let Some(target) = world.clouds.iter().position(|c| c.jid == h.target) else { return false };
    let Some(origin) = h.provenance.map(|p| p.origin) else { return false };
    let history = known(world, giver);
    let length = match origin {
        Origin::Born => Some(0),
        Origin::After(id) => history.position(&id).map(|at| at + 1),
    };
    let spec = record(&world.catalogue, true).spec;
    let state = (0..1000).map(|state| cicada::sim::seed_of(&spec, state));
    let seed = { state }.find(|seed| seed.root_delta.id() == h.root_delta);
    let (Some(length), Some(seed)) = (length, seed) else { return false };
    let about = Matter { migration: h.migration, vm: vm(), epoch: h.epoch - 1 };
    let said = world.say(giver, target, about, VERSION, RequestBody::Reservation { spec: spec.clone() });
    let Some(AnswerBody::Reserved { .. }) = said else { return true };
    let links = Links(history.links()[..length].to_vec());
    let (total, after) = (links.0.len() as u32, None);
    let shown = RequestBody::Lineage { at: 0, total, after, links, successions: Default::default() };
    world.say(giver, target, about, VERSION, shown);
    stage(world, (giver, target), about, VERSION, &spec, seed);
    world.say(giver, target, about, VERSION, RequestBody::Start { hand_over: back.hand_over, run: true });
    true
}

/// The giver of a hand-over that was acknowledged withdraws it all the same.
pub fn withdraw(world: &mut World) -> bool {
    let acknowledged = records(world).find_map(|(at, r)| Some((at, r.arrival.filter(|a| a.acknowledged)?)));
    let Some((target, arrival)) = acknowledged else { return false };
    let Some(giver) = world.clouds.iter().position(|c| c.jid == arrival.from) else { return false };
    debug_assert_eq!(key_of(world.clouds[giver].name()).public(), arrival.from_key);
    let about = Matter { migration: arrival.migration, vm: vm(), epoch: 1 };
    let body = RequestBody::Withdraw { hand_over: arrival.receipt.hand_over };
    world.say(giver, target, about, VERSION, body);
    true
}
