//! What a move costs: views, progress and the comparison with a monolithic move.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use crate::clock::UnixMillis;
use crate::disk::Scan;
use crate::migration::message::{Progress, StageAccount};
use crate::repository::RefKind;
use crate::sparse;
use crate::types::{CloudName, MemberJid, MigrationId, RecipeId};
use crate::vm::{Block, VmSpec};

use super::Shared;
use super::interface::{Account, MigrationProgress, MigrationView};

/// zstd level a monolithic tool would use.
const MONOLITHIC_LEVEL: i32 = 3;

pub fn new_view(
    id: MigrationId,
    spec: &VmSpec,
    role: &str,
    peer: &MemberJid,
    peer_cloud: Option<CloudName>,
    now: UnixMillis,
) -> MigrationView {
    MigrationView {
        progress: MigrationProgress {
            id,
            vm: spec.name.clone(),
            vm_id: spec.id,
            role: role.into(),
            peer: peer.clone(),
            peer_cloud,
            phase: "negotiate".into(),
            detail: String::new(),
            bytes_done: 0,
            bytes_total: 0,
            rate_bytes_per_s: 0,
            eta_s: None,
            fraction: 0.0,
            started: now,
            updated: now,
            ended: false,
            epoch: 0,
            handed_over: false,
            attempt: 0,
        },
        account: Account::default(),
        problem: None,
        remarks: Vec::new(),
    }
}

/// Takes in what the target reports. Bytes never fall; the rate is smoothed over a few reports.
pub fn progress(view: &mut MigrationProgress, p: &Progress, now: UnixMillis) {
    let delta = p.bytes_done.saturating_sub(view.bytes_done);
    let elapsed = now.since(view.updated).as_secs_f64();
    if elapsed > 0.05 {
        let rate = delta as f64 / elapsed;
        view.rate_bytes_per_s = (0.7 * view.rate_bytes_per_s as f64 + 0.3 * rate) as u64;
        view.updated = now;
    }
    view.bytes_done = view.bytes_done.max(p.bytes_done);
    view.bytes_total = view.bytes_total.max(p.bytes_total).max(view.bytes_done);
    view.eta_s = match view.rate_bytes_per_s {
        0 => None,
        rate => Some((view.bytes_total - view.bytes_done).div_ceil(rate)),
    };
    if p.step == "compose" {
        view.detail = "the target composes the disk image".into();
    }
}

/// What share of a move is done when a pass is on its way, of which `carried` has come. Where the VM stands
/// still the first pass carries everything; otherwise the last one only what was written meanwhile.
pub fn fraction_of_pass(first: bool, last: bool, p: &MigrationProgress) -> f64 {
    let carried = match p.bytes_total {
        0 => 0.0,
        total => (p.bytes_done as f64 / total as f64).min(1.0),
    };
    match (first, last) {
        (true, true) => 0.03 + 0.90 * carried,
        (_, false) => 0.03 + 0.77 * carried,
        (false, true) => 0.85 + 0.08 * carried,
    }
}

/// Takes over the target's count; it is cumulative over all passes.
pub fn stage(account: &mut Account, s: &StageAccount) {
    // A target that restarted has forgotten its count.
    if s.wire_bytes < account.wire_bytes {
        return;
    }
    account.components_fetched = s.components_fetched;
    account.packs_needed = account.packs_needed.max(s.packs_needed);
    account.packs_fetched = s.packs_fetched;
    account.fetched = s.fetched.clone();
    account.component_bytes = s.component_bytes;
    account.root_delta_bytes = s.root_delta_bytes;
    account.user_data_bytes = s.user_data_bytes;
    account.wire_bytes = s.wire_bytes;
    account.fetch_ms = s.fetch_ms;
    // Another cloud's figures: they may be anything.
    let payload = s.component_bytes.saturating_add(s.root_delta_bytes).saturating_add(s.user_data_bytes);
    account.control_bytes = s.map_bytes.max(s.wire_bytes.saturating_sub(payload));
    account.phase_ms.insert("compose".into(), s.compose_ms);
}

/// What a tool that copies whole disks would send, compressed and raw. Blocking, and slow the
/// first time for a recipe: the composition's part is remembered.
pub fn monolithic(shared: &Shared, recipe: &RecipeId, disks: &[Arc<Scan>]) -> io::Result<(u64, u64)> {
    let name = recipe.to_string();
    let known = shared.repository.get_ref(RefKind::Composition, &name).map_err(io::Error::other)?;
    let known = known.and_then(|v| serde_json::from_slice::<(u64, u64)>(&v).ok());
    let (mut zstd, mut raw) = match known {
        Some(sizes) => sizes,
        None => {
            let composition = shared.composer.composition(recipe).map_err(io::Error::other)?;
            let sizes = compressed_size(&composition.path)?;
            let value = serde_json::to_vec(&sizes).map_err(io::Error::other)?;
            shared.repository.set_ref(RefKind::Composition, &name, &value).map_err(io::Error::other)?;
            sizes
        }
    };
    for disk in disks {
        let mut encoder = zstd::Encoder::new(Counter(0), MONOLITHIC_LEVEL)?;
        for (_, block) in &disk.map.blocks {
            if let Block::Data(hash) = block {
                let bytes = disk.index.read_block(hash).map_err(io::Error::other)?;
                raw += bytes.len() as u64;
                encoder.write_all(&bytes)?;
            }
        }
        zstd += encoder.finish()?.0;
    }
    Ok((zstd, raw))
}

/// Size of a file's data, compressed as one stream and raw; holes cost nothing.
fn compressed_size(path: &Path) -> io::Result<(u64, u64)> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut encoder = zstd::Encoder::new(Counter(0), MONOLITHIC_LEVEL)?;
    let mut raw = 0;
    for data in sparse::data_runs(&file.try_clone()?, 0..len) {
        let data = data?;
        file.seek(SeekFrom::Start(data.start))?;
        raw += io::copy(&mut (&mut file).take(data.end - data.start), &mut encoder)?;
    }
    Ok((encoder.finish()?.0, raw))
}

struct Counter(u64);

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        serde_json::from_value(serde_json::json!({
            "id": uuid::Uuid::nil(), "name": "web", "cpus": 1, "memory": 1 << 27, "recipe": "0".repeat(64),
            "root_size": 0, "user_data_size": 0, "nics": [], "architecture": "amd64", "cpu_model": "qemu64",
        }))
        .unwrap()
    }

    #[test]
    fn progress_never_runs_backwards() {
        let spec = spec();
        let peer = "b@x".parse().unwrap();
        let mut view = new_view(MigrationId::random(), &spec, "source", &peer, None, UnixMillis(0)).progress;
        let report = |done, total| Progress { step: "fetch".into(), bytes_done: done, bytes_total: total };
        progress(&mut view, &report(100, 1000), UnixMillis(1000));
        progress(&mut view, &report(50, 900), UnixMillis(2000));
        assert_eq!((view.bytes_done, view.bytes_total), (100, 1000));
        progress(&mut view, &report(2000, 1500), UnixMillis(3000));
        assert_eq!((view.bytes_done, view.bytes_total, view.eta_s), (2000, 2000, Some(0)));
    }

    #[test]
    fn what_is_done_follows_what_was_carried_whichever_pass_carries_it() {
        let spec = spec();
        let peer = "b@x".parse().unwrap();
        let view = |done, total| MigrationProgress {
            bytes_done: done,
            bytes_total: total,
            ..new_view(MigrationId::random(), &spec, "source", &peer, None, UnixMillis(0)).progress
        };
        // A VM that stands still: half of its bytes are about half of the move.
        for (done, expected) in [(0, 3), (500, 48), (1000, 93)] {
            assert_eq!((fraction_of_pass(true, true, &view(done, 1000)) * 100.0).round() as u32, expected);
        }
        // One that runs: the last pass begins beyond where the earlier ones end.
        assert!(
            fraction_of_pass(true, false, &view(1000, 1000)) < fraction_of_pass(false, true, &view(0, 0))
        );
        assert!(fraction_of_pass(false, true, &view(1000, 1000)) < 0.95);
    }
}
