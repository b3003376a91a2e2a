//! What several benches need.
#![allow(dead_code)] // Each bench uses its part.

use std::error::Error;
use std::path::Path;

use cicada::component::manifest::{Entry, EntryKind, Kind, Manifest, Meta, PackRef};
use cicada::repository::Repository;
use cicada::types::{ComponentId, PackId};

#[path = "../../tests/federation/world.rs"]
pub mod world;

pub type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Stores program components of small files, one in each pack, and binds their names.
pub fn synthetic_components(
    repository: &Repository,
    count: u32,
    packs_each: u32,
) -> Result<Vec<ComponentId>> {
    (0..count).map(|n| synthetic_component(repository, n, packs_each)).collect()
}

fn synthetic_component(repository: &Repository, n: u32, packs: u32) -> Result<ComponentId> {
    let meta = |mode| Meta { mode, uid: 0, gid: 0, mtime_s: 0 };
    let mut manifest = Manifest {
        name: format!("synthetic-{n}"),
        version: "1".into(),
        kind: Kind::Program,
        architecture: "amd64".into(),
        origin: "a bench".into(),
        licences: Vec::new(),
        requires: Vec::new(),
        conflicts: Vec::new(),
        packs: Vec::new(),
        entries: Vec::new(),
        fragments: Vec::new(),
    };
    for dir in ["opt".to_owned(), format!("opt/synthetic-{n}")] {
        manifest.entries.push(Entry {
            path: dir.into(),
            meta: meta(0o755),
            xattrs: Vec::new(),
            kind: EntryKind::Directory,
        });
    }
    for pack in 0..packs {
        let content = format!("file {pack} of component {n}\n").repeat(20);
        let (id, hash, size_bytes) = store(repository, content.as_bytes())?;
        let package = format!("package-{n}-{pack}");
        manifest.packs.push(PackRef { id, size_bytes, package, package_version: "1".into() });
        manifest.entries.push(Entry {
            path: format!("opt/synthetic-{n}/file-{pack}").into(),
            meta: meta(0o644),
            xattrs: Vec::new(),
            kind: EntryKind::File { size_bytes: content.len() as u64, hash, pack, offset_bytes: 0 },
        });
    }
    let id = repository.put_manifest(&manifest)?;
    repository.bind_component(&manifest, id)?;
    Ok(id)
}

/// One pack of one content: its id, the content's hash, the pack's plain size.
pub fn store(repository: &Repository, content: &[u8]) -> Result<(PackId, cicada::types::Hash, u64)> {
    let mut writer = repository.pack_writer()?;
    let (_, hash) = writer.append(&mut &*content, content.len() as u64)?;
    let (id, size_bytes) = writer.finish()?.ok_or("an empty pack")?;
    Ok((id, hash, size_bytes))
}

/// The p-th hundredth of sorted values, by the nearest-rank method.
pub fn percentile(sorted: &[f64], p: f64) -> f64 {
    let rank = (p / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// One number in kilobytes from `/proc/PID/status`.
pub fn status_kib(pid: u32, field: &str) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'));
    Ok(line.ok_or("no such field")?.trim().trim_end_matches(" kB").parse()?)
}

/// Of what proc(5) calls clock ticks, on every architecture Debian has.
pub const TICKS_PER_SECOND: f64 = 100.0;

/// Processor time a process has used.
pub fn cpu_ticks(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = text.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    // utime and stime, fields 14 and 15 of proc(5).
    Ok(fields.get(11).ok_or("short")?.parse::<u64>()? + fields.get(12).ok_or("short")?.parse::<u64>()?)
}

/// Ends the clouds of a bench that started no guests.
pub fn end(mut world: world::World) -> Result<()> {
    (0..world.clouds.len()).for_each(|cloud| world.stop_broker(cloud, false));
    world.xmpp.stop();
    remove(world.dir.path())?;
    // Its own end looks for guests.
    std::mem::forget(world);
    Ok(())
}

fn remove(dir: &Path) -> Result<()> {
    Ok(std::fs::remove_dir_all(dir)?)
}
