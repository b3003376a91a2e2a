//! A real broker against a member that keeps to the protocol until some step and then misbehaves in
//! every way that was thought of, as the source of a VM and as its target. After each row of the
//! table the broker must live, own what it owned, have its resources free again and nothing staged
//! left, and have said why it refused. What goes wrong below the transfer's frames is in
//! `transfer/hostile.rs`, hostile content in `hostile_content.rs`.

#[allow(dead_code)]
#[path = "../federation/world.rs"]
mod world;

mod as_source;
mod as_target;
mod ownership;
mod peer;
mod room;
mod table;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cicada::client::Client;
use cicada::interface::{MoveRequest, Problem, Reply, Request};
use cicada::interface::{StatusView, VmView};
use peer::Peer;
use table::Table;
use world::World;
use world::support::Kind;

/// The lease that ends what a silent source began. Short, so that the test is.
const SETTINGS: &str = "[migration]\nlease_s = 3\nconcurrency = 4\n[transfer]\nlisten = \"127.0.0.1:0\"\npeer_networks = [\"127.0.0.0/8\"]\n";
/// What the broker may grow by, whatever a peer sends.
const GROWTH_BYTES_MAX: u64 = 200 << 20;

pub struct Bench {
    pub world: World,
    /// The peer that misbehaves.
    pub mallory: Peer,
    /// An honest one.
    pub victim: Peer,
    pub table: Table,
    resident_bytes: u64,
    made: u32,
    /// Refusals by kind that were looked at.
    counted: RefCell<BTreeMap<String, u64>>,
}

fn missing_tool() -> bool {
    !Kind::usual().is_there("hostile_peer") || world::lacks(&["qemu-system-x86_64", "qemu-img"])
}

#[test]
fn a_member_that_misbehaves_at_any_step_does_no_harm() {
    if missing_tool() {
        return;
    }
    let world = World::start_with(&["alpine"], &["mallory", "victim"], SETTINGS);
    let runtime =
        Arc::new(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap());
    let join = |name: &str| Peer::join(runtime.clone(), world.account(name), name, world.dir.path());
    let (mallory, victim) = (join("mallory"), join("victim"));
    let (table, counted) = (Table::default(), RefCell::default());
    let mut bench = Bench { world, mallory, victim, table, resident_bytes: 0, made: 0, counted };
    bench.world.wait("the played members are seen and trusted", 60, |w| {
        let members = w.members(0);
        ["mallory", "victim"].iter().all(|name| {
            members.iter().any(|m| {
                m.jid.as_str().starts_with(name)
                    && m.state == cicada::interface::MemberState::Online
                    && m.trust == cicada::interface::MemberTrust::Trusted
            })
        })
    });
    bench.resident_bytes = bench.status().resident_bytes;

    as_source::rows(&mut bench);
    as_target::rows(&mut bench);
    ownership::rows(&mut bench);
    room::rows(&mut bench);

    bench.refusals_are_logged_once();
    bench.table.keep();
    let rows = bench.table.len();
    assert!(rows > 150, "{rows} rows");
    let Bench { world, mallory, victim, .. } = bench;
    for peer in [&mallory, &victim] {
        peer.block_on(peer.handle.close());
    }
    drop(world);
}

impl Bench {
    /// That it answers at all, and soon, is half of what is asked of it.
    pub fn status(&self) -> StatusView {
        let begun = Instant::now();
        let status = self.world.status(0);
        assert!(begun.elapsed() < Duration::from_secs(20), "the broker answers after {:?}", begun.elapsed());
        status
    }

    /// Waits until nothing of a migration is left, and asserts the rest. `what` names the row.
    pub fn settled(&self, what: &str) {
        let begun = Instant::now();
        loop {
            let status = self.status();
            let free = status.cpus.free == status.cpus.total
                && status.memory_bytes.free == status.memory_bytes.total;
            let left = self.leftovers();
            if status.migrations_running == 0 && free && left.is_empty() {
                let grown = status.resident_bytes.saturating_sub(self.resident_bytes);
                assert!(grown < GROWTH_BYTES_MAX, "{what}: {grown} bytes more than at first");
                return;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "{what}: {} migrations run, {:?} and {:?} free, left: {left:?}\n{}",
                status.migrations_running,
                status.cpus,
                status.memory_bytes,
                self.world.log(0)
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Directories below `vms/` that belong to no record.
    fn leftovers(&self) -> Vec<PathBuf> {
        let list = |dir: PathBuf| -> Vec<PathBuf> {
            std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect()
        };
        let mut left = Vec::new();
        for vm in list(self.world.clouds[0].dir.join("data/vms")) {
            let disks = list(vm.clone()).into_iter().filter(|p| p.to_string_lossy().contains("disks-"));
            match std::fs::read_to_string(vm.join("record.json")) {
                // Copies in their grace period are named there as well.
                Ok(record) => left.extend(disks.filter(|dir| {
                    !record.contains(dir.file_name().and_then(|name| name.to_str()).unwrap_or_default())
                })),
                Err(_) => left.push(vm),
            }
        }
        left
    }

    /// One more refusal of this kind was counted than when this was last asked, and it is in the log.
    pub fn refused_for(&self, kind: &str) {
        let count = |w: &World| w.status(0).refusals.by_kind.get(kind).copied().unwrap_or(0);
        let before = self.counted.borrow().get(kind).copied().unwrap_or(0);
        self.world.wait(&format!("a refusal is counted as {kind}"), 20, |w| count(w) > before);
        self.counted.borrow_mut().insert(kind.to_owned(), count(&self.world));
        let kind = format!("\"kind\":\"{kind}\"");
        assert!(self.lines_with(&["request refused", &kind]) > 0, "{kind} is not in the log");
    }

    /// However often it happened: one line for each member, or account, and kind.
    fn refusals_are_logged_once(&self) {
        let mut told = BTreeMap::<(String, String), usize>::new();
        for line in self.world.log(0).lines().filter(|line| line.contains("request refused")) {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let word = |name: &str| line[name].as_str().unwrap_or_default().to_owned();
            *told.entry((word("member"), word("kind"))).or_default() += 1;
        }
        let again: Vec<_> = told.iter().filter(|(_, lines)| **lines > 1).collect();
        assert!(again.is_empty() && told.len() >= 8, "{told:?}");
    }

    /// How many lines of the log say this.
    pub fn lines_with(&self, words: &[&str]) -> usize {
        self.world.log(0).lines().filter(|line| words.iter().all(|w| line.contains(w))).count()
    }

    /// A VM of a small disk in the real cloud; its name.
    pub fn new_vm(&mut self) -> VmView {
        self.made += 1;
        let name = format!("own-{}", self.made);
        self.world.noise_vm(0, &name, 300_000, |_| ())
    }

    /// Begins to move a VM of the real cloud to the peer that misbehaves.
    pub fn begin_move(&self, vm: &VmView) -> Moving {
        self.mallory.drain();
        let (socket, vm) = (self.world.socket(0), vm.name.to_string());
        Moving(std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let request = Request::Move(MoveRequest::Begin {
                    vm,
                    to: Some("mallory".into()),
                    dry_run: false,
                    force_stop: false,
                });
                Client::connect(&socket).await?.call(&request, |_| {}).await
            })
        }))
    }

    /// Calls off whatever runs.
    pub fn cancel_all(&self) {
        let Ok(Reply::Migrations(all)) = self.world.call(0, &Request::Move(MoveRequest::List)) else {
            return;
        };
        for m in all.iter().filter(|m| !m.progress.ended) {
            let _ = self.world.call(0, &Request::Move(MoveRequest::Cancel { id: m.progress.id.to_string() }));
        }
    }
}

/// A move under way.
pub struct Moving(std::thread::JoinHandle<Result<Reply, Problem>>);

impl Moving {
    pub fn ended(&self) -> bool {
        self.0.is_finished()
    }
    pub fn outcome(self) -> Result<Reply, Problem> {
        self.0.join().unwrap()
    }
}
