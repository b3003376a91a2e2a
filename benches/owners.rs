//! What lies about ownership cost a broker: hand-overs of VMs that nobody ever had here, by a trusted member
//! and by strangers, in both versions of the protocol; and the check of a long history.
//!
//! `cargo bench --bench owners [-- ATTEMPTS]` (100000). Messages and signatures are real, time is simulated.

#[allow(dead_code)]
#[path = "../tests/owners/home.rs"]
mod home;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use cicada::interface::{CloudRequest, Reply, Request};
use cicada::migration::envelope::{VERSION, VERSION_BEFORE};
use cicada::migration::{AnswerBody, DenialCode, Lineage, RequestBody};
use cicada::types::{MigrationId, VmId};
use home::{Home, Way, spec};

const LINKS: usize = 1000;
const CHECK_LIMIT_MS: f64 = 100.0;
const STATUS_LIMIT: f64 = 2.0;
/// What promises of version 1 may take in a day.
const PROMISES_A_DAY: f64 = 100.0;
const ROUNDS: usize = 2000;

#[tokio::main]
async fn main() {
    let attempts = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(100_000);
    history();
    attacks(attempts).await;
}

/// A VM that went to and fro a thousand times, checked as whoever is shown its history does.
fn history() {
    let way = (0..LINKS).fold(Way::born(1, "a"), |way, n| match n % 2 {
        0 => way.moved("a", "b"),
        _ => way.moved("b", "a"),
    });
    let links = way.history.links().to_vec();
    let mut cpu_ms = Vec::new();
    let mut times: Vec<f64> = (0..20)
        .map(|_| {
            let links = links.clone();
            let (begun, cpu) = (Instant::now(), cpu_time_ms());
            let checked = Lineage::verify(spec(1).id, links).expect("it is whole");
            assert_eq!(checked.links().len(), LINKS);
            cpu_ms.push(cpu_time_ms() - cpu);
            ms(begun.elapsed())
        })
        .collect();
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    println!(
        "a chain of {LINKS} receipts checked: {median:.1} ms, {:.1} ms of them computing (limit {CHECK_LIMIT_MS} ms): {}",
        self::median(&cpu_ms),
        verdict(median <= CHECK_LIMIT_MS)
    );
}

async fn attacks(attempts: usize) {
    let home = Home::start(&[&Way::born(1, "home")], true, false).await;
    *home.script.known.lock().unwrap() = Some(Vec::new());
    ["a", "b"].iter().for_each(|name| home.sees(name));
    home.until(1, |vm| vm.problem.is_none()).await;
    status(&home, ROUNDS).await;
    let idle = status(&home, ROUNDS).await;
    for (who, from, version) in [
        ("a trusted member, version 2", "b", VERSION),
        ("strangers, version 2", "stranger", VERSION),
        ("a trusted member, version 1", "b", VERSION_BEFORE),
    ] {
        let (files, written, begun) = (files(home.dir.path()), written_bytes(), Instant::now());
        let mut answers = BTreeMap::<&str, usize>::new();
        let mut during = Vec::new();
        for n in 0..attempts {
            *answers.entry(attempt(&home, from, version, n).await).or_default() += 1;
            if n % 50 == 0 {
                home.clock.advance(Duration::from_secs(30));
                during.push(one_status(&home).await);
            }
        }
        let each_us = begun.elapsed().as_micros() as f64 / attempts as f64;
        let changed = changed(&files, &self::files(home.dir.path()));
        let after = status(&home, ROUNDS).await;
        println!("{attempts} hand-overs by {who}: {each_us:.0} us each; {answers:?}");
        let simulated_days = attempts as f64 / 50.0 * 30.0 / 86_400.0;
        // So many at once, and as many again in each day.
        let promises = (PROMISES_A_DAY * (1.0 + simulated_days)).ceil() as usize;
        let allowed = if version == VERSION { 0 } else { promises };
        println!(
            "  files made or changed: {changed}, bytes written: {} (allowed: {allowed} files): {}",
            written_bytes() - written,
            verdict(changed <= allowed)
        );
        let ratio = median(&after) / median(&idle);
        println!(
            "  status: idle {:.0} us, between attempts {:.0} us, afterwards {:.0} us: {ratio:.2} x idle (limit {STATUS_LIMIT} x): {}",
            median(&idle),
            median(&during),
            median(&after),
            verdict(ratio <= STATUS_LIMIT)
        );
    }
}

/// Hands over what nobody here ever heard of; what came of it, in a word.
async fn attempt(home: &Home, from: &str, version: u32, n: usize) -> &'static str {
    let (id, vm) = (MigrationId::random(), VmId(uuid::Uuid::from_u128(1000 + n as u128)));
    let hand_over = home::hand_over(from, id, vm, 1_000_001, version);
    let body = RequestBody::Start { hand_over, run: true };
    match home.try_ask(from, version, (id, vm), body).await {
        Some(AnswerBody::Returned { .. }) => "returned",
        Some(AnswerBody::Denied(d)) if d.code == DenialCode::RateLimited => "too often",
        Some(AnswerBody::Denied(_)) => "denied",
        Some(other) => panic!("{other:?}"),
        None => "no word",
    }
}

async fn one_status(home: &Home) -> f64 {
    let begun = Instant::now();
    let Ok(Reply::Status(_)) = home.call(Request::Cloud(CloudRequest::Status)).await else {
        panic!("it has a status")
    };
    begun.elapsed().as_secs_f64() * 1e6
}

async fn status(home: &Home, rounds: usize) -> Vec<f64> {
    let mut times = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        times.push(one_status(home).await);
    }
    times
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn ms(took: Duration) -> f64 {
    took.as_secs_f64() * 1e3
}

fn verdict(holds: bool) -> &'static str {
    if holds { "holds" } else { "BROKEN" }
}

type Files = BTreeMap<PathBuf, (u64, SystemTime)>;

fn files(dir: &Path) -> Files {
    let mut found = Files::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).expect("it is there").flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            match meta.is_dir() {
                true => dirs.push(entry.path()),
                false => drop(found.insert(entry.path(), (meta.len(), meta.modified().expect("it has one")))),
            }
        }
    }
    found
}

fn changed(before: &Files, after: &Files) -> usize {
    after.iter().filter(|(path, state)| before.get(*path) != Some(*state)).count()
}

/// What this thread computed, whatever else the machine does.
fn cpu_time_ms() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split_whitespace().next().and_then(|ns| ns.parse::<f64>().ok()).unwrap_or(0.0) / 1e6
}

/// What this process caused to be written to storage.
fn written_bytes() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
    io.lines().find_map(|line| line.strip_prefix("write_bytes: ")?.parse().ok()).unwrap_or(0)
}
