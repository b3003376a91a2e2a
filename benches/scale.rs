//! A repository of many packs: how long opening, planning, collecting and checking take, and in how
//! much memory. Every step runs in a process of its own.
//!
//! `cargo bench --bench scale [-- PACKS…]`: 100000 packs without arguments. They are real packs of
//! one small file, a hundred to a component; one component in ten has no name and is collected.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cicada::component::manifest::{Kind, Manifest, PackRef};
use cicada::repository::Repository;
use cicada::types::{ComponentId, PackId};
use common::{Result, TICKS_PER_SECOND, cpu_ticks, status_kib};

/// What a child process does, and in which repository.
const STEP: &str = "CICADA_BENCH_STEP";
const DIR: &str = "CICADA_BENCH_DIR";
const PACKS_EACH: u64 = 100;
const PACK_BYTES: usize = 4096;
/// Components of the VM that is compared with what is held.
const VM_COMPONENTS: usize = 500;

fn main() -> Result<()> {
    if let (Ok(step), Some(dir)) = (std::env::var(STEP), std::env::var_os(DIR)) {
        return run(&step, Path::new(&dir));
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
        for step in ["open after a clean end", "look up", "plan", "collect, dry run", "collect"] {
            child(step, &path)?;
        }
        kill_while_open(&path)?;
        child("open after a kill", &path)?;
        // As after a power failure: the machine that had it open is another boot.
        kill_while_open(&path)?;
        fs::write(path.join("unclean"), "another boot")?;
        child("open after a restart of the machine", &path)?;
        child("check", &path)?;
    }
    Ok(())
}

fn child(step: &str, dir: &Path) -> Result<()> {
    let status = Command::new(std::env::current_exe()?).env(STEP, step).env(DIR, dir).status()?;
    if status.success() { Ok(()) } else { Err(format!("'{step}' failed").into()) }
}

fn kill_while_open(dir: &Path) -> Result<()> {
    let mut child = Command::new(std::env::current_exe()?)
        .env(STEP, "hold")
        .env(DIR, dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    child.stdout.take().ok_or("no output")?.read_exact(&mut [0])?;
    child.kill()?;
    child.wait()?;
    Ok(())
}

fn run(step: &str, dir: &Path) -> Result<()> {
    let cpu_s = || cpu_ticks(std::process::id()).map(|ticks| ticks as f64 / TICKS_PER_SECOND);
    let (begun, cpu_begun) = (Instant::now(), cpu_s()?);
    let repository = Repository::open(dir)?;
    let (opened, cpu_opened) = (begun.elapsed(), cpu_s()?);
    let begun = Instant::now();
    let mut what = String::new();
    match step {
        "hold" => {
            // Something new that the index's last state on disk may lack.
            common::store(&repository, format!("{begun:?}").as_bytes())?;
            std::io::stdout().write_all(b".")?;
            std::io::stdout().flush()?;
            std::thread::sleep(Duration::from_secs(3600));
        }
        "look up" => {
            let held = (0..20_000u64).filter(|n| repository.has_pack(&content(n * 37).0)).count();
            what = format!(", {held} of 20000 found");
        }
        "plan" => {
            let all: Vec<ComponentId> = repository.components()?.into_iter().map(|(id, _)| id).collect();
            let listed = begun.elapsed();
            let step = (all.len() / VM_COMPONENTS).max(1);
            let vm: Vec<_> = all.into_iter().step_by(step).take(VM_COMPONENTS).collect();
            let begun = Instant::now();
            let report = repository.missing_packs(&vm)?;
            what = format!(
                ", listing all components {:.2} s, a VM of {} components compared in {:.3} s ({} packs missing)",
                listed.as_secs_f64(),
                vm.len(),
                begun.elapsed().as_secs_f64(),
                report.packs.len()
            );
        }
        "collect, dry run" | "collect" => {
            let report = repository.gc(step != "collect", Duration::ZERO, &[])?;
            what = format!(", {} kept, {} removed", report.kept.total().count, report.removed.total().count);
        }
        "check" => {
            let report = repository.check(&mut |_, _| ())?;
            what = format!(", {} good, clean: {}", report.good.total().count, report.is_clean());
        }
        _ => {}
    }
    let (worked, cpu_worked) = (begun.elapsed(), cpu_s()?);
    let (pid, mb) = (std::process::id(), |kib: u64| kib as f64 * 1024.0 / 1e6);
    let (now, most) = (mb(status_kib(pid, "VmRSS")?), mb(status_kib(pid, "VmHWM")?));
    let begun = Instant::now();
    drop(repository);
    println!(
        "{step}: opened in {:.2} s ({:.2} s of CPU), work {:.2} s ({:.2}), closed in {:.2} s; RSS {now:.1} MB, at most {most:.1} MB{what}",
        opened.as_secs_f64(),
        cpu_opened - cpu_begun,
        worked.as_secs_f64(),
        cpu_worked - cpu_opened,
        begun.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Makes a repository of this many packs. The files are written as the format says, without the
/// syncs that a store does; manifests go through the repository.
fn fill(dir: &Path, packs: u64) -> Result<()> {
    let begun = Instant::now();
    drop(Repository::create(dir)?);
    for fan in 0..=255u8 {
        fs::create_dir(dir.join(format!("packs/{fan:02x}")))?;
    }
    for n in 0..packs {
        let (id, plain) = content(n);
        let frame = zstd::bulk::compress(&plain, 1)?;
        let mut stored = b"CICPAK\0\x01".to_vec();
        stored.extend_from_slice(&(plain.len() as u64).to_le_bytes());
        stored.extend_from_slice(&(frame.len() as u32).to_le_bytes());
        stored.extend_from_slice(&frame);
        fs::write(dir.join(format!("packs/{}/{id}.pack", &id.to_string()[..2])), stored)?;
    }
    let written = begun.elapsed();
    let begun = Instant::now();
    let repository = Repository::open(dir)?;
    let objects = repository.rebuild_index()?;
    let indexed = begun.elapsed();
    let begun = Instant::now();
    for n in 0..packs.div_ceil(PACKS_EACH) {
        let range = n * PACKS_EACH..((n + 1) * PACKS_EACH).min(packs);
        let manifest = component(n, range);
        let id = repository.put_manifest(&manifest)?;
        if n % 10 > 0 {
            repository.bind_component(&manifest, id)?;
        }
    }
    println!(
        "{objects} packs written in {:.1} s, entered in the index in {:.1} s; {} components stored in {:.1} s",
        written.as_secs_f64(),
        indexed.as_secs_f64(),
        packs.div_ceil(PACKS_EACH),
        begun.elapsed().as_secs_f64()
    );
    Ok(())
}

fn component(n: u64, packs: std::ops::Range<u64>) -> Manifest {
    let pack = |n: u64| PackRef {
        id: content(n).0,
        size_bytes: PACK_BYTES as u64,
        package: format!("package-{n}"),
        package_version: "1".into(),
    };
    Manifest {
        name: format!("component-{n}"),
        version: "1".into(),
        kind: Kind::Program,
        architecture: "amd64".into(),
        origin: "a bench".into(),
        licences: Vec::new(),
        requires: Vec::new(),
        conflicts: Vec::new(),
        packs: packs.map(pack).collect(),
        entries: Vec::new(),
        fragments: Vec::new(),
    }
}

/// The n-th pack.
fn content(n: u64) -> (PackId, Vec<u8>) {
    let mut plain = vec![0; PACK_BYTES];
    plain[..8].copy_from_slice(&n.to_le_bytes());
    (PackId::of(&plain), plain)
}
