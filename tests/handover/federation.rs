//! Clouds with one VM, and what must hold of them at every instant and in the end.

use std::time::Duration;

use cicada::clock::UnixMillis;
use cicada::interface::{MoveRequest, Reply, Request};
use cicada::migration::Law;
use cicada::migration::records::{GivenUp, VmRecord};
use cicada::sim::{Catalogue, Cloud, Component, Kind, Links, Pending, Shape, World};
use cicada::types::{ByteSize, MigrationId, VmId};
use cicada::vm::{PowerState, VmSpec};

pub const NAME: &str = "web";
pub const NOBODYS: &str = "it is nobody's";
/// A federation without trouble comes to rest within this time.
const RESTS_WITHIN: Duration = Duration::from_secs(3000);
const LEASE: Duration = Duration::from_secs(60);

pub fn vm() -> VmId {
    VmId(uuid::Uuid::from_u128(0x5eed))
}

pub fn record(catalogue: &Catalogue, runs: bool) -> VmRecord {
    let spec = catalogue.recipes[0].vm(vm(), NAME.parse().expect("a valid name"));
    let spec = VmSpec { user_data_size: ByteSize(0), ..spec };
    VmRecord { run: runs, ..VmRecord::new(spec, vec!["os@1".into()], "disks-1", UnixMillis(1)) }
}

/// Clouds that have seen each other, the first of which has the VM. `before`: all speak the version before.
pub fn federation(count: usize, runs: bool, before: bool, law: Law) -> World {
    let settings = format!("[migration]\nlease_s = {}\ngrace_period = \"10m\"\n", LEASE.as_secs());
    let shape = Shape { cpus: 16, memory: ByteSize(64 << 30), settings };
    let clouds = ["alpha", "beta", "gamma", "delta"].iter().take(count);
    let clouds: Vec<Cloud> = clouds
        .map(|name| {
            let mut cloud = Cloud::new(name, shape.clone());
            cloud.law = law;
            cloud.versions_shown = before.then(|| "1".to_owned());
            cloud
        })
        .collect();
    let mut catalogue = Catalogue::new(vec![Component::new("os", &[("libc".into(), 1000)])]);
    catalogue.add_recipe(vec![0], 1 << 30);
    let record = record(&catalogue, runs);
    let links = Links { presence_pause_ms: 3_600_000, ..Links::default() };
    let mut world = World::placed(1, clouds, catalogue, links, |world| world.place(0, record, 1000))
        .expect("valid settings");
    world.run_until(world.now.plus(Duration::from_secs(30)), |_, _| Ok(())).expect("nothing looks");
    world.in_any_order();
    world
}

/// The record of the VM in each cloud that has one.
pub fn records(world: &World) -> impl Iterator<Item = (usize, VmRecord)> {
    world.clouds.iter().enumerate().filter_map(|(at, c)| Some((at, c.book.vm(vm())?)))
}

/// A hand-over whose end is not known to its source.
pub fn in_doubt(world: &World) -> Option<(usize, GivenUp)> {
    records(world).find_map(|(at, r)| Some((at, r.given_up().filter(|g| g.receipt.is_none())?.clone())))
}

/// Who owns it by what is signed, and not by an operator's word alone.
pub fn owners(world: &World) -> Vec<usize> {
    let by_word = |at: usize| world.clouds[at].book.vm(vm()).is_some_and(|r| r.taken_back.is_some());
    (0..world.clouds.len()).filter(|at| world.clouds[*at].owns(vm()) && !by_word(*at)).collect()
}

fn names(world: &World, clouds: &[usize]) -> String {
    clouds.iter().map(|at| world.clouds[*at].name()).collect::<Vec<_>>().join(" and ")
}

/// What must hold at every instant.
pub fn sound(world: &World) -> Result<(), String> {
    if let Some(what) = &world.broken {
        return Err(what.clone());
    }
    let power = |at: usize| world.clouds[at].power.get(&vm()).copied();
    let up = |at: &usize| matches!(power(*at), Some(PowerState::Running | PowerState::Paused));
    let runs: Vec<usize> = (0..world.clouds.len()).filter(up).collect();
    if runs.len() > 1 {
        return Err(format!("it runs in {}", names(world, &runs)));
    }
    let owners = owners(world);
    if owners.len() > 1 {
        return Err(format!("it is owned by {}", names(world, &owners)));
    }
    let here: Vec<(usize, VmRecord)> = records(world).filter(|(_, r)| r.is_here()).collect();
    if let Some(stray) = runs.iter().find(|at| here.iter().all(|(of, _)| of != *at)) {
        return Err(format!("it runs in {}, whose it is not", world.clouds[*stray].name()));
    }
    if here.is_empty() && in_doubt(world).is_none() {
        return Err(NOBODYS.into());
    }
    if let Some(owner) = owners.first()
        && let Some(epoch) = world.clouds[*owner].book.vm(vm()).map(|r| r.epoch)
        && let Some((at, _)) = records(world).find(|(at, r)| {
            at != owner && r.epoch >= epoch && r.taken_back.is_none() && !world.clouds[*at].restored
        })
    {
        return Err(format!("{} knows a later epoch than its owner", world.clouds[at].name()));
    }
    Ok(())
}

fn listed(world: &mut World, at: usize) -> Result<Vec<(MigrationId, bool, String)>, String> {
    let call = world.call(at, Request::Move(MoveRequest::List)).ok_or("a broker is down at rest")?;
    match world.reply(at, call) {
        Some(Ok(Reply::Migrations(all))) => {
            Ok(all.iter().map(|m| (m.progress.id, m.progress.ended, m.progress.phase.to_string())).collect())
        }
        other => Err(format!("no list of migrations: {other:?}")),
    }
}

/// Moves that have not ended, as a cloud sees them.
pub fn open(world: &mut World, at: usize) -> Vec<MigrationId> {
    let all = listed(world, at).unwrap_or_default();
    all.into_iter().filter(|(_, ended, _)| !ended).map(|(id, ..)| id).collect()
}

/// Without trouble and in the order of time, all comes to rest: one owner, who runs it if it is to run; every
/// move has ended; nothing is served, staged, held or kept that nobody names.
pub fn rests(world: &mut World) -> Result<(), String> {
    world.in_time();
    (world.failures, world.links.loss) = (0.0, 0.0);
    world.partitions.clear();
    let until = world.now.plus(RESTS_WITHIN);
    let travels = |p: &Pending| matches!(p.kind, Kind::Request | Kind::Answer | Kind::Restart);
    loop {
        world.run_until(world.now.plus(LEASE), |w, _| sound(w))?;
        let quiet = |c: &std::rc::Rc<Cloud>| c.broker.as_ref().is_some_and(|b| b.is_quiet());
        if world.clouds.iter().all(quiet) && !world.pending().iter().any(travels) {
            break;
        }
        if world.now > until {
            let busy: Vec<usize> = (0..world.clouds.len()).filter(|at| !quiet(&world.clouds[*at])).collect();
            let busy: Vec<_> =
                busy.into_iter().map(|at| (world.clouds[at].name().to_owned(), listed(world, at))).collect();
            let news = world.pending().into_iter().filter(travels).collect::<Vec<_>>();
            let held: Vec<_> =
                records(world).map(|(at, r)| (world.clouds[at].name().to_owned(), r)).collect();
            return Err(format!(
                "it does not come to rest: busy {busy:?}, coming {news:?} at {:?}, records {held:#?}",
                world.now
            ));
        }
    }
    // Clocks may just have been put back by four minutes.
    world.run_until(world.now.plus(LEASE * 6), |w, _| sound(w))?;
    for at in 0..world.clouds.len() {
        if let Some((id, _, phase)) = listed(world, at)?.iter().find(|(_, ended, _)| !ended) {
            return Err(format!("{} does not end in {}: {phase}", id, world.clouds[at].name()));
        }
        let (cloud, name) = (&world.clouds[at], world.clouds[at].name());
        if !cloud.serving.is_empty() || !cloud.staged.is_empty() {
            return Err(format!("{name} still serves or stages something"));
        }
        if cloud.power.get(&vm()) == Some(&PowerState::Paused) {
            return Err(format!("the guest is left paused in {name}"));
        }
        let record = cloud.book.vm(vm());
        let named = |dir: &str| {
            record.as_ref().is_some_and(|r| r.disks == dir || r.kept.iter().any(|copy| copy.disks == dir))
        };
        if let Some((_, dir)) = cloud.all_disks().find(|(_, dir)| !named(dir)) {
            return Err(format!("{name} keeps {dir}, which nothing names"));
        }
    }
    let here: Vec<_> = records(world).filter(|(_, r)| r.is_here()).collect();
    let [(at, record)] = here.as_slice() else {
        return Err(format!("{} clouds own it at rest", here.len()));
    };
    let (cloud, name) = (&world.clouds[*at], world.clouds[*at].name());
    if record.contested.is_some() || record.arrival.as_ref().is_some_and(|a| a.contested.is_some()) {
        return Err(format!("{name} holds it for contested"));
    }
    let runs = cloud.power.get(&vm()) == Some(&PowerState::Running);
    if record.run != runs {
        return Err(format!("it is to run in {name}: {}, and runs: {runs}", record.run));
    }
    Ok(())
}
