//! What a broker takes of memory while nothing happens, with many packs in its repository. The
//! limit is 60 MB.
//!
//! `cargo bench --bench rest [-- PACKS…]`: 100000 packs without arguments. The packs are links to
//! one small stored pack under made-up ids: as index entries they are like any others.

mod common;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use cicada::interface::{CloudRequest, Request};
use cicada::repository::Repository;
use cicada::types::PackId;
use common::world::{World, missing_tool};
use common::{Result, TICKS_PER_SECOND, cpu_ticks, end, status_kib, store};

const LIMIT_MB: f64 = 60.0;
/// The directory a child process opens as a repository.
const OPEN: &str = "CICADA_BENCH_OPEN";
/// File systems bound the links of one file.
const LINKS_MAX: u64 = 30_000;

fn main() -> Result<()> {
    if let Some(dir) = std::env::var_os(OPEN) {
        return opened(Path::new(&dir));
    }
    let mut counts: Vec<u64> =
        std::env::args().skip(1).filter(|a| a != "--bench").map(|a| a.parse()).collect::<Result<_, _>>()?;
    if counts.is_empty() {
        counts.push(100_000);
    }
    for packs in counts {
        let dir = tempfile::tempdir_in(".")?;
        let path = dir.path().join("repository");
        fill(&path, packs)?;
        open_in_a_process(&path)?;
        // As a process that was killed leaves it: the index is brought in line at the next opening.
        std::fs::copy("/proc/sys/kernel/random/boot_id", path.join("unclean"))?;
        println!("the same after a kill:");
        open_in_a_process(&path)?;
        if !missing_tool() {
            broker(packs)?;
        }
    }
    Ok(())
}

fn open_in_a_process(path: &Path) -> Result<()> {
    let status = Command::new(std::env::current_exe()?).env(OPEN, path).status()?;
    if status.success() { Ok(()) } else { Err("the process that opens the repository failed".into()) }
}

fn opened(dir: &Path) -> Result<()> {
    let before = status_kib(std::process::id(), "VmRSS")?;
    let begun = Instant::now();
    let repository = Repository::open(dir)?;
    let elapsed = begun.elapsed();
    // Look-ups all over the index fill its cache.
    let held = (0..20_000u64).filter(|n| repository.has_pack(&id(n * 37))).count();
    let after = status_kib(std::process::id(), "VmRSS")?;
    println!(
        "repository alone: opened in {:.2} s, {held} look-ups found something; RSS {:.1} MB, of it {:.1} MB before opening",
        elapsed.as_secs_f64(),
        mb(after),
        mb(before)
    );
    Ok(())
}

fn broker(packs: u64) -> Result<()> {
    let mut world = World::start(&["alpine", "boreal"]);
    world.stop_broker(0, false);
    let path = world.clouds[0].dir.join("data/repository");
    std::fs::remove_dir_all(&path)?;
    fill(&path, packs)?;
    let mut child = world.spawn_broker(0);
    let measured = at_rest(&world, child.id(), packs);
    let pid = rustix::process::Pid::from_child(&child);
    let ended = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    child.wait()?;
    measured?;
    ended?;
    end(world)
}

fn at_rest(world: &World, broker: u32, packs: u64) -> Result<()> {
    world.wait("the broker answers", 300, |w| w.call(0, &Request::Cloud(CloudRequest::Status)).is_ok());
    std::thread::sleep(Duration::from_secs(5));
    let (ticks, begun) = (cpu_ticks(broker)?, Instant::now());
    std::thread::sleep(Duration::from_secs(20));
    let busy = (cpu_ticks(broker)? - ticks) as f64 / TICKS_PER_SECOND / begun.elapsed().as_secs_f64();
    let (rss, most) = (mb(status_kib(broker, "VmRSS")?), mb(status_kib(broker, "VmHWM")?));
    let verdict = if rss < LIMIT_MB { "holds" } else { "BROKEN" };
    println!(
        "broker at rest, {packs} packs, one other member: RSS {rss:.1} MB (most since its start {most:.1} MB), {:.2} % of a core; limit {LIMIT_MB} MB: {verdict}",
        100.0 * busy
    );
    Ok(())
}

/// Makes a repository of this many packs, closed, with its index.
fn fill(dir: &Path, packs: u64) -> Result<()> {
    let begun = Instant::now();
    let repository = Repository::create(dir)?;
    let (real, _, _) = store(&repository, b"a pack")?;
    drop(repository);
    let of = |id: &PackId| dir.join(format!("packs/{}/{id}.pack", &id.to_string()[..2]));
    let mut original = of(&real);
    for n in 0..packs {
        let path = of(&id(n));
        if n < 10_000 {
            std::fs::create_dir_all(path.parent().ok_or("no directory")?)?;
        }
        if n % LINKS_MAX == LINKS_MAX - 1 {
            std::fs::copy(&original, &path)?;
            original = path;
        } else {
            std::fs::hard_link(&original, &path)?;
        }
    }
    let linked = begun.elapsed();
    let begun = Instant::now();
    let objects = Repository::open(dir)?.rebuild_index()?;
    println!(
        "{objects} objects linked in {:.1} s, entered in the index in {:.1} s",
        linked.as_secs_f64(),
        begun.elapsed().as_secs_f64()
    );
    Ok(())
}

fn id(n: u64) -> PackId {
    PackId::of(&n.to_le_bytes())
}

fn mb(kib: u64) -> f64 {
    kib as f64 * 1024.0 / 1e6
}
