//! How well a shaped link is used: two processes in two network namespaces, joined by a veth pair
//! that tbf slows down. Needs root, `ip` and `tc`; says `SKIPPED:` otherwise.

#[path = "transfer/world.rs"]
mod world;

use std::io::Write as _;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cicada::transfer::{Limiter, ObjectKey, Progress, Settings};
use world::{Broker, Members, Sink, Store, data, identity};

const SOURCE: &str = "10.213.7.1";
const TARGET: &str = "10.213.7.2";
const PORT: u16 = 7443;
/// Tells a child process which part it plays, and how many megabytes it moves.
const MEGABYTES: &str = "CICADA_LINK_MEGABYTES";

#[test]
fn a_shaped_link_is_filled() {
    if let Some(reason) = cannot_shape() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: link use over a shaped link: {reason}");
        return;
    }
    for (mbit, megabytes) in [(10, 8), (100, 60)] {
        let lab = match Lab::new(mbit) {
            Ok(lab) => lab,
            Err(reason) => {
                let _ = writeln!(std::io::stderr(), "SKIPPED: link use over a shaped link: {reason}");
                return;
            }
        };
        let mut source = lab.start("source_process", &lab.source, megabytes);
        let mut lines = BufReader::new(source.0.stdout.take().unwrap()).lines();
        assert!(lines.any(|l| l.unwrap().contains("READY")), "the source did not start");
        let mut target = lab.start("target_process", &lab.target, megabytes);
        let output = BufReader::new(target.0.stdout.take().unwrap()).lines();
        let lines: Vec<String> = output.map(Result::unwrap).collect();
        let line = lines.iter().find(|l| l.contains("RESULT")).unwrap_or_else(|| panic!("{lines:#?}"));
        let mut fields = line.split_whitespace().skip_while(|w| !w.contains("RESULT")).skip(1);
        let mut next = || fields.next().unwrap().parse::<f64>().unwrap();
        let (seconds, payload, udp, link, rtt_ms) = (next(), next(), next(), next(), next());
        let cap = f64::from(mbit) * 1e6 / 8.0 * seconds;
        println!(
            "{mbit} Mbit/s link: {:.1} MB in {seconds:.2} s; of the cap {:.1} % used on the link, {:.1} % as UDP payload, {:.1} % as objects; rtt {rtt_ms:.1} ms",
            payload / 1e6,
            100.0 * link / cap,
            100.0 * udp / cap,
            100.0 * payload / cap,
        );
        assert!(link / cap >= 0.9, "only {:.1} % of the link was used", 100.0 * link / cap);
    }
}

fn cannot_shape() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root".into());
    }
    let missing = ["ip", "tc"].into_iter().find(|tool| Command::new(tool).arg("-V").output().is_err());
    missing.map(|tool| format!("{tool} is not installed"))
}

/// Incompressible, and the same in both processes.
fn content(megabytes: u64) -> (Arc<Store>, Vec<ObjectKey>) {
    let store = Store::new();
    let mut keys: Vec<_> =
        (0..megabytes * 3 / 4).map(|i| store.add_pack(data::noise(i, 1_000_000))).collect();
    keys.extend((0..megabytes * 61).map(|i| store.add_block(data::noise(1_000_000 + i, 4096))));
    (store, keys)
}

fn broker(address: &str, n: u8, store: Arc<Store>) -> Broker {
    let address = format!("{address}:{PORT}").parse().unwrap();
    let both = [identity(1).public(), identity(2).public()];
    Broker::start_at(
        address,
        identity(n),
        Members::new(&both),
        store,
        Limiter::unlimited(),
        Settings::default(),
    )
}

/// Plays a part for [`a_shaped_link_is_filled`]; alone it does nothing.
#[test]
fn source_process() {
    let Some(megabytes) = std::env::var(MEGABYTES).ok().and_then(|m| m.parse().ok()) else { return };
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let _broker = broker(SOURCE, 1, content(megabytes).0);
        println!("READY");
        tokio::time::sleep(Duration::from_secs(120)).await;
    });
}

/// Plays a part for [`a_shaped_link_is_filled`]; alone it does nothing.
#[test]
fn target_process() {
    let Some(megabytes) = std::env::var(MEGABYTES).ok().and_then(|m| m.parse().ok()) else { return };
    let keys = content(megabytes).1;
    let link_bytes = || -> u64 {
        std::fs::read_to_string("/sys/class/net/wire/statistics/rx_bytes").unwrap().trim().parse().unwrap()
    };
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let target = broker(TARGET, 2, Store::new());
        let address = format!("{SOURCE}:{PORT}").parse().unwrap();
        let connection = target.endpoint.connect(&[address], identity(1).public()).await.unwrap();
        let (sink, progress) = (Sink::new(), Arc::new(Progress::default()));
        let (started, link, before) = (Instant::now(), link_bytes(), connection.stats());
        connection.fetch(&world::TICKET, keys, sink, progress.clone()).await.unwrap();
        let (seconds, after) = (started.elapsed().as_secs_f64(), connection.stats());
        println!(
            "RESULT {seconds} {} {} {} {}",
            progress.snapshot().payload_bytes,
            after.received_bytes - before.received_bytes,
            link_bytes() - link,
            after.rtt.as_secs_f64() * 1e3,
        );
        target.endpoint.close().await;
    });
}

/// Two namespaces and the slow link between them; gone when dropped.
struct Lab {
    source: String,
    target: String,
}

impl Lab {
    fn new(mbit: u32) -> Result<Self, String> {
        let name = |end: &str| format!("cicada-{}-{end}", std::process::id());
        let lab = Self { source: name("source"), target: name("target") };
        let (a, b) = (&lab.source, &lab.target);
        run(&format!("ip netns add {a}"))?;
        run(&format!("ip netns add {b}"))?;
        run(&format!("ip -n {a} link add wire type veth peer name wire netns {b}"))?;
        for (space, address) in [(a, SOURCE), (b, TARGET)] {
            run(&format!("ip -n {space} addr add {address}/24 dev wire"))?;
            run(&format!("ip -n {space} link set wire up"))?;
            run(&format!(
                "tc -n {space} qdisc add dev wire root tbf rate {mbit}mbit burst 32kb latency 50ms"
            ))?;
        }
        Ok(lab)
    }

    /// Runs one test function of this binary inside a namespace.
    fn start(&self, part: &str, space: &str, megabytes: u64) -> Running {
        let child = Command::new("ip")
            .args(["netns", "exec", space])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", part, "--nocapture"])
            .env(MEGABYTES, megabytes.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Running(child)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for space in [&self.source, &self.target] {
            let _ = Command::new("ip").args(["netns", "delete", space]).status();
        }
    }
}

fn run(command: &str) -> Result<(), String> {
    let words: Vec<&str> = command.split(' ').collect();
    let output = Command::new(words[0]).args(&words[1..]).output().map_err(|e| e.to_string())?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    output.status.success().then_some(()).ok_or_else(|| format!("'{command}' says: {}", complaint.trim()))
}

/// A child process that does not outlive the test. (`ip netns exec` becomes the program it runs.)
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
