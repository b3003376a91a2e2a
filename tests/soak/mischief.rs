//! Faults, and their mending.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use cicada::interface::{MoveRequest, Reply, Request};
use rustix::process::{Pid, Signal, kill_process};

use crate::fleet::Fleet;
use crate::links::Wire;
use crate::watcher::processes;
use crate::world::World;
use crate::{CLOUDS, Random};

/// Faults that last at the same time, at most.
const AT_ONCE: usize = 2;
/// For how long links are cut: below and above what QUIC and XMPP sessions bear.
const CUTS: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(10), Duration::from_secs(60)];

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Fault {
    BrokerKilled(usize),
    BrokerFrozen(usize),
    ServerKilled,
    /// Nothing of a cloud's goes to the XMPP server, or comes from there.
    RoomCut(usize),
    /// Nobody reaches a cloud's data.
    DataCut(usize),
}

impl Fault {
    fn cloud(self) -> Option<usize> {
        match self {
            Fault::BrokerKilled(c) | Fault::BrokerFrozen(c) | Fault::RoomCut(c) | Fault::DataCut(c) => {
                Some(c)
            }
            Fault::ServerKilled => None,
        }
    }
}

/// A cloud's links, which can be cut.
pub struct Links {
    pub room: Wire,
    pub data: Wire,
}

pub struct Mischief {
    links: Vec<Links>,
    /// What is out of order, and until when.
    lasting: BTreeMap<Fault, Instant>,
    /// VMs whose hypervisor was killed since they were last looked at.
    pub killed: BTreeSet<String>,
    count: BTreeMap<&'static str, u64>,
}

impl Mischief {
    pub fn over(links: Vec<Links>) -> Self {
        Self { links, lasting: BTreeMap::new(), killed: BTreeSet::new(), count: BTreeMap::new() }
    }

    pub fn tally(&self) -> String {
        let total: u64 = self.count.values().sum();
        let kinds: Vec<_> = self.count.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
        format!("{total} faults ({})", kinds.join(", "))
    }

    /// Whether a cloud's broker can be asked something.
    pub fn is_well(&self, cloud: usize) -> bool {
        let broker = [Fault::BrokerKilled(cloud), Fault::BrokerFrozen(cloud)];
        !broker.iter().any(|fault| self.lasting.contains_key(fault))
    }

    fn counted(&mut self, kind: &'static str) {
        *self.count.entry(kind).or_default() += 1;
    }

    /// Mends what is due, then perhaps does something new that lasts no longer than `left`.
    pub fn step(&mut self, world: &mut World, fleet: &Fleet, left: Duration, random: &mut Random) {
        let now = Instant::now();
        let due: Vec<Fault> =
            self.lasting.iter().filter(|(_, until)| **until <= now).map(|(f, _)| *f).collect();
        due.into_iter().for_each(|fault| self.mend(world, fault));
        if self.lasting.len() >= AT_ONCE || random.below(4) != 0 {
            return;
        }
        let cloud = random.below(CLOUDS.len());
        match random.below(16) {
            0..=3 => self.begin(world, Fault::BrokerKilled(cloud), left, random),
            4..=5 => self.begin(world, Fault::BrokerFrozen(cloud), left, random),
            6 => self.begin(world, Fault::ServerKilled, left, random),
            7..=8 => self.kill_hypervisor(world, fleet, random),
            9..=10 => self.begin(world, Fault::RoomCut(cloud), left, random),
            11..=12 => self.begin(world, Fault::DataCut(cloud), left, random),
            _ => self.cancel_a_move(world, random),
        }
    }

    fn begin(&mut self, world: &mut World, fault: Fault, left: Duration, random: &mut Random) {
        if self.lasting.keys().any(|f| f.cloud() == fault.cloud()) {
            return;
        }
        let lasts = match fault {
            Fault::BrokerKilled(cloud) => {
                world.stop_broker(cloud, true);
                self.counted("brokers killed");
                random.between(1, 4000)
            }
            Fault::BrokerFrozen(cloud) => {
                world.signal_broker(cloud, Signal::STOP);
                self.counted("brokers frozen");
                random.between(200, 15_000)
            }
            Fault::ServerKilled => {
                world.xmpp.kill();
                self.counted("XMPP servers killed");
                random.between(1, 4000)
            }
            Fault::RoomCut(cloud) => {
                self.links[cloud].room.cut();
                self.counted("links to the room cut");
                self.cut_lasts(left, random)
            }
            Fault::DataCut(cloud) => {
                self.links[cloud].data.cut();
                self.counted("data links cut");
                self.cut_lasts(left, random)
            }
        };
        self.lasting.insert(fault, Instant::now() + lasts);
    }

    /// One of [`CUTS`], none that lasts longer than `left` but for the shortest.
    fn cut_lasts(&mut self, left: Duration, random: &mut Random) -> Duration {
        let fitting = CUTS.iter().filter(|cut| **cut <= left).count();
        let lasts = CUTS[random.below(fitting)];
        if lasts == CUTS[2] {
            self.counted("of these for a minute");
        }
        lasts
    }

    fn mend(&mut self, world: &mut World, fault: Fault) {
        self.lasting.remove(&fault);
        match fault {
            Fault::BrokerKilled(cloud) => world.start_broker(cloud),
            Fault::BrokerFrozen(cloud) => world.signal_broker(cloud, Signal::CONT),
            Fault::ServerKilled => world.xmpp.restart(),
            Fault::RoomCut(cloud) => self.links[cloud].room.mend(),
            Fault::DataCut(cloud) => self.links[cloud].data.mend(),
        }
    }

    pub fn heal(&mut self, world: &mut World) {
        let lasting: Vec<_> = self.lasting.keys().copied().collect();
        lasting.into_iter().for_each(|fault| self.mend(world, fault));
    }

    fn kill_hypervisor(&mut self, world: &World, fleet: &Fleet, random: &mut Random) {
        let mut running = processes(world.dir.path());
        running.retain(|p| fleet.ids().contains(&p.vm));
        if running.is_empty() {
            return;
        }
        let victim = running.swap_remove(random.below(running.len()));
        kill(victim.pid);
        self.killed.insert(victim.vm);
        self.counted("hypervisors killed");
    }

    fn cancel_a_move(&mut self, world: &World, random: &mut Random) {
        let cloud = random.below(CLOUDS.len());
        if self
            .lasting
            .keys()
            .any(|f| matches!(f, Fault::BrokerFrozen(c) | Fault::BrokerKilled(c) if *c == cloud))
        {
            return;
        }
        let Ok(Reply::Migrations(all)) = world.call(cloud, &Request::Move(MoveRequest::List)) else { return };
        let Some(running) = all
            .iter()
            .find(|m| !m.progress.ended && m.progress.role == cicada::interface::MigrationRole::Source)
        else {
            return;
        };
        // Too late is an answer as well.
        if world
            .call(cloud, &Request::Move(MoveRequest::Cancel { id: running.progress.id.to_string() }))
            .is_ok()
        {
            self.counted("moves cancelled");
        }
    }
}

fn kill(pid: i32) {
    // It may have ended by itself.
    let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
}
