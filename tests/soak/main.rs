//! VMs move back and forth between three clouds while faults fire at random: real brokers, XMPP
//! server and hypervisor processes. `deploy/soak` runs it for as long as told; among the tests it is
//! short. A seed fixes what is tried in which order; when it happens is up to the machine.

mod fleet;
#[allow(dead_code)]
#[path = "../hypervisor/guest.rs"]
mod guest;
#[path = "../support/links.rs"]
mod links;
mod mischief;
mod watcher;
#[allow(dead_code)]
#[path = "../federation/world.rs"]
mod world;

use std::time::{Duration, Instant};

use fleet::Fleet;
use links::{Wire, free_udp_port};
use mischief::{Links, Mischief};
use watcher::Watcher;
use world::{World, missing_tool, turn};

pub const CLOUDS: [&str; 3] = ["alpine", "boreal", "coral"];
/// Short, so that a round sees reservations and kept copies go.
const CONFIG: &str = "[migration]\nlease_s = 10\ngrace_period = \"3s\"\nstop_timeout_s = 20\n";
/// Faults fire for so long before everything must come to rest and is looked at.
const ROUND: Duration = Duration::from_secs(25);
/// Each fourth round is long enough for links to be cut for a minute.
const LONG_ROUND: Duration = Duration::from_secs(100);
/// How long the server keeps the place of a session whose link broke.
const HIBERNATION_S: u32 = 5;
const REST_WITHIN_S: u64 = 240;

/// SplitMix64.
pub struct Random(u64);

impl Random {
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.draw() % n.max(1) as u64) as usize
    }
    pub fn between(&mut self, least_ms: u64, most_ms: u64) -> Duration {
        Duration::from_millis(least_ms + self.draw() % (most_ms - least_ms))
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: no number")))
}

/// Starts a broker whose ways to the room and to its data can be cut.
fn start_behind_links(world: &mut World, cloud: usize, runtime: &tokio::runtime::Runtime) -> Links {
    let room = Wire::tcp(runtime, world.clouds[cloud].xmpp_port);
    let listen = free_udp_port();
    let data = Wire::udp(runtime, listen);
    world.clouds[cloud].xmpp_port = room.port;
    world.configure(
        cloud,
        &format!(
            "[transfer]\npeer_networks = [\"127.0.0.0/8\"]\nlisten = \"127.0.0.1:{listen}\"\n\
             advertise = [\"127.0.0.1:{}\"]\n{CONFIG}",
            data.port
        ),
    );
    world.start_broker(cloud);
    Links { room, data }
}

#[test]
fn every_vm_survives_random_faults_with_one_owner() {
    if missing_tool() {
        return;
    }
    let _turn = turn();
    let (seconds, seed) = (number("CICADA_SOAK_SECONDS", 40), number("CICADA_SOAK_SEED", 1));
    println!("soak: {seconds} s, seed {seed}");
    let mut random = Random(seed);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let mut world = World::prepare(&CLOUDS, &[], HIBERNATION_S);
    let links = (0..CLOUDS.len()).map(|cloud| start_behind_links(&mut world, cloud, &runtime)).collect();
    world.wait_online();
    let watcher = Watcher::start(world.dir.path());
    let mut fleet = Fleet::create(&world, &mut random);
    let mut mischief = Mischief::over(links);
    let (begun, mut rounds, mut slowest) = (Instant::now(), 0, Duration::ZERO);
    while rounds == 0 || begun.elapsed().as_secs() < seconds {
        rounds += 1;
        let round = Instant::now();
        let length = if rounds % 4 == 0 { LONG_ROUND } else { ROUND };
        while round.elapsed() < length {
            fleet.collect();
            fleet.move_some(&world, &mischief, &mut random);
            let left = length.saturating_sub(round.elapsed());
            mischief.step(&mut world, &fleet, left, &mut random);
            std::thread::sleep(random.between(100, 900));
            watcher.assert_one_place_each();
        }
        let healing = Instant::now();
        mischief.heal(&mut world);
        world.wait("everything comes to rest", REST_WITHIN_S, |w| fleet.at_rest(w));
        let rest = healing.elapsed();
        slowest = slowest.max(rest);
        fleet.collect();
        fleet.check(&world, &mut mischief);
        watcher.assert_one_place_each();
        fleet.change_content(&world, &mut random);
        println!(
            "{:>6} s  round {rounds}: {}; {}; at rest after {:.1} s",
            begun.elapsed().as_secs(),
            fleet.tally(),
            mischief.tally(),
            rest.as_secs_f64()
        );
    }
    println!(
        "soak, seed {seed}: {} s, {rounds} rounds; {}; {}; {} looks at all processes; {} checks held; \
         slowest return to rest {:.1} s",
        begun.elapsed().as_secs(),
        fleet.tally(),
        mischief.tally(),
        watcher.looks(),
        fleet.checks,
        slowest.as_secs_f64()
    );
}
