//! Real moves between two brokers, mixed: VMs that are off and VMs that run, guests that end and guests that
//! ignore the power button, small and large, new to the target and on their way home. What was foretold of each
//! and what it took, as lines that `broker::forecast` replays in its tests.
//!
//! `cargo bench --profile dev --bench forecast -- MOVES SEED OUT.csv` (50, 1, standard output).

#[allow(dead_code)]
#[path = "../../tests/federation/world.rs"]
mod world;

use std::fmt::Write as _;

use cicada::interface::{MigrationView, MoveRequest, Reply, Request, VmRequest, VmSet};
use world::support::Kind;
use world::{World, capped, components, lacks, missing_tool};

const TINY: [&str; 3] = ["format-uefi-gpt", "kernel-tiny", "os-tiny"];
const NAMES: [&str; 2] = ["alpine", "boreal"];
/// What one of the two sends at most; the other as much as it can.
const SLOW: &str = "6M";
/// How many VMs there are at most: the oldest of noise gives way to a new one.
const VMS_MAX: usize = 6;
const COLUMNS: &str = "source,vm,runs,bytes,base_bytes,disk_bytes,patience_s,ignores,total_s,flowing_s,\
                       carried_bytes,composing_s,looking_s,shutdown_s,starting_s,low_s,high_s";

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

struct Guest {
    name: String,
    at: usize,
    is_noise: bool,
    number: usize,
}

fn main() {
    if !Kind::usual().is_there("the bench") || lacks(&["qemu-system-x86_64", "qemu-img"]) {
        return;
    }
    let mut args = std::env::args().skip(1).filter(|arg| !arg.starts_with("--"));
    let moves: usize = args.next().and_then(|a| a.parse().ok()).unwrap_or(50);
    let seed = args.next().and_then(|a| a.parse().ok()).unwrap_or(1);
    let out = args.next();
    let mut random = Random(seed);
    let mut world = World::start(&NAMES);
    world.reconfigure(0, &capped(SLOW));
    let mut guests = Vec::new();
    // Guests that boot, and end when they are asked to.
    if !missing_tool() {
        let built = components(&TINY);
        world.push(0, &built, &built.ids);
        for number in 0..2 {
            let name = format!("tiny-{number}");
            world.create_vm(0, &name, &built.ids, 8, true);
            world.wait_booted(0, &name, 300);
            guests.push(Guest { name, at: 0, is_noise: false, number });
        }
    }
    let (mut made, mut lines) = (guests.len(), format!("{COLUMNS}\n"));
    let mut seen = Vec::new();
    for n in 0..moves {
        if guests.len() < 3 || random.below(3) == 0 {
            let of_noise = || guests.iter().position(|guest| guest.is_noise);
            if let Some(oldest) = (guests.len() >= VMS_MAX).then(of_noise).flatten() {
                delete(&world, &guests.remove(oldest));
            }
            guests.push(noise(&world, &mut random, made));
            made += 1;
        }
        // The newest is new to the target; the others may be on their way home.
        let at = if random.below(2) == 0 { guests.len() - 1 } else { random.below(guests.len()) };
        let guest = &mut guests[at];
        // One that was just moved boots, and hears nothing until it is up.
        if !guest.is_noise {
            world.wait_booted(guest.at, &guest.name, 300);
            world.guest(guest.at, &guest.name, "true");
        }
        let Some(view) = moved(&world, guest) else { continue };
        let line = line(guest, &view);
        println!("{n}: {line}");
        let a = view.account.foretold.as_ref().and_then(|f| Some((f.low_s?, f.high_s?)));
        if let Some((low_s, high_s)) = a {
            let took_s = view.progress.updated.since(view.progress.started).as_secs_f64();
            seen.push((low_s, high_s, took_s));
        }
        let _ = writeln!(lines, "{line}");
        guest.at = 1 - guest.at;
    }
    let inside = seen.iter().filter(|(low, high, took)| (low..=high).contains(&took)).count();
    let width = median(seen.iter().map(|(low, high, _)| high - low));
    let error = median(seen.iter().map(|(low, high, took)| (took - (low + high) / 2.0).abs()));
    println!("{inside} of {} inside; width {width:.2} s, error {error:.2} s, medians", seen.len());
    match out {
        Some(path) => std::fs::write(path, lines).expect("cannot write the lines"),
        None => print!("{lines}"),
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut all: Vec<f64> = values.collect();
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or_default()
}

/// A VM of a disk that nothing boots from; every third runs, and ignores the power button.
fn noise(world: &World, random: &mut Random, number: usize) -> Guest {
    let (name, at) = (format!("noise-{number}"), random.below(2));
    let start = random.below(3) == 0;
    let len = (1 << 20) << random.below(6);
    world.noise_vm(at, &name, len + random.below(len) / 4096 * 4096, |adopt| adopt.start = start);
    Guest { name, at, is_noise: true, number }
}

fn delete(world: &World, guest: &Guest) {
    let vm = || guest.name.clone();
    let _ = world.call(
        guest.at,
        &Request::Vm(VmRequest::Stop { vm: vm(), force: true, timeout_s: Some(5), for_host: false }),
    );
    for cloud in 0..NAMES.len() {
        let _ = world.call(cloud, &Request::Vm(VmRequest::Delete { vm: vm(), taken_for: None }));
    }
}

fn moved(world: &World, guest: &Guest) -> Option<MigrationView> {
    // Each cloud has its own; what boots nothing hears no power button.
    let timeout_s = if guest.is_noise { 2 } else { 60 };
    let set: VmSet =
        serde_json::from_value(serde_json::json!({ "vm": guest.name, "stop_timeout_s": timeout_s }))
            .expect("is a change");
    world.call(guest.at, &Request::Vm(VmRequest::Set(set))).expect("cannot be changed");
    let to = Some(NAMES[1 - guest.at].into());
    let request =
        Request::Move(MoveRequest::Begin { vm: guest.name.clone(), to, dry_run: false, force_stop: true });
    match world.call(guest.at, &request) {
        Ok(Reply::Migration(view)) => Some(*view),
        other => {
            println!("{}: {other:?}", guest.name);
            None
        }
    }
}

fn line(guest: &Guest, view: &MigrationView) -> String {
    let (p, a) = (&view.progress, &view.account);
    let f = a.foretold.clone().unwrap_or_default();
    let seconds = |ms: u64| format!("{:.3}", ms as f64 / 1000.0);
    let known = |s: Option<f64>| s.map(|s| format!("{s:.3}")).unwrap_or_default();
    let phase = |name: &str| seconds(a.phase_ms.get(name).copied().unwrap_or(0));
    [
        NAMES[guest.at].to_owned(),
        guest.number.to_string(),
        f.work.runs.to_string(),
        f.work.bytes.to_string(),
        f.work.base_bytes.to_string(),
        f.work.disk_bytes.to_string(),
        f.work.patience_s.to_string(),
        f.work.ignores.to_string(),
        seconds(p.updated.since(p.started).as_millis() as u64),
        seconds(a.fetch_ms),
        p.bytes_done.to_string(),
        phase("compose"),
        seconds(a.looking_ms),
        a.shutdown_ms.map(seconds).unwrap_or_default(),
        phase("start"),
        known(f.low_s),
        known(f.high_s),
    ]
    .join(",")
}
