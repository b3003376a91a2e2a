//! What disks take up, and what is free: asked of the system, a moment ago at the latest.

use std::time::Duration;

use crate::broker::effect::DisksOf;
use crate::broker::{Broker, Measured};
use crate::clock::UnixMillis;

use super::Shared;
use super::host::machine;

/// How old a measurement may be that is used. Guests write, and others use the same disk, at any time.
const MEASURED_FOR: Duration = Duration::from_secs(1);

#[derive(Default)]
pub struct Measuring {
    at: Option<UnixMillis>,
}

impl Measuring {
    /// A new measurement, if the last one is too old.
    pub fn due(&mut self, shared: &Shared, broker: &Broker) -> Option<Measured> {
        let now = shared.now();
        let is_new = self.at.is_some_and(|at| now.since(at) < MEASURED_FOR && now >= at);
        (!is_new).then(|| self.anew(shared, broker, None))
    }

    /// A new measurement, with disks that the core does not know yet.
    pub fn anew(&mut self, shared: &Shared, broker: &Broker, more: Option<DisksOf>) -> Measured {
        let now = shared.now();
        self.at = Some(now);
        let mut disks = broker.to_measure();
        disks.extend(more);
        let composed =
            disks.iter().map(|d| d.recipe).filter(|recipe| shared.composer.is_composed(recipe)).collect();
        let (total_bytes, free_bytes) = match rustix::fs::statvfs(shared.records.dir()) {
            Ok(s) => (s.f_blocks.saturating_mul(s.f_frsize), s.f_bavail.saturating_mul(s.f_frsize)),
            Err(error) => {
                tracing::warn!(%error, "the free storage cannot be asked for: nothing is promised");
                (0, 0)
            }
        };
        let disks = disks.iter().map(|d| (d.vm, machine::allocated(shared, d))).collect();
        Measured { at: Some(now), total_bytes, free_bytes, disks, composed, resident_bytes: resident_bytes() }
    }
}

/// Resident memory of this process, from `/proc`; zero where that is not known.
fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()))
        .unwrap_or(0);
    pages * 4096
}
