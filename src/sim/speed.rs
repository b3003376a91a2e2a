//! What a run takes of the machine it runs on. Nothing that happens in it depends on these figures, and they are
//! others each time.

use std::time::Instant;

use serde::Serialize;

use super::world::World;

/// What a run took of the machine it ran on.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
pub struct Speed {
    /// Until all clouds had seen and asked each other, and to the end.
    pub filled_s: f64,
    pub took_s: f64,
    /// Of one processor, as others may have needed it meanwhile. Zero where the system does not say.
    pub filled_cpu_s: f64,
    pub took_cpu_s: f64,
    /// What the process had more for each cloud when the room had filled than before there were any: its broker, its
    /// book, and what the simulation keeps of it. Zero where the system does not say.
    pub resident_per_cloud_bytes: u64,
    /// The most that the process ever had.
    pub resident_most_bytes: u64,
    /// Of a core's steps, every so many of which were timed.
    pub step_median_ns: u32,
    pub step_99th_ns: u32,
    pub steps_timed: u64,
    #[serde(skip)]
    begun: Option<Instant>,
    #[serde(skip)]
    resident_before: u64,
    #[serde(skip)]
    cpu_before_s: f64,
}

impl Speed {
    /// Before there is any cloud.
    pub(super) fn begin() -> Self {
        let (begun, resident_before, cpu_before_s) = (Some(Instant::now()), resident("VmRSS:"), cpu_s());
        Self { begun, resident_before, cpu_before_s, ..Self::default() }
    }

    fn since(&self) -> f64 {
        self.begun.map_or(0.0, |begun| begun.elapsed().as_secs_f64())
    }

    /// All clouds are there, and nothing moves.
    pub(super) fn rests(&mut self, clouds: usize) {
        (self.filled_s, self.filled_cpu_s) = (self.since(), cpu_s() - self.cpu_before_s);
        let more = resident("VmRSS:").saturating_sub(self.resident_before);
        self.resident_per_cloud_bytes = more / (clouds as u64).max(1);
    }

    pub(super) fn end(&mut self, world: &mut World) {
        (self.took_s, self.took_cpu_s) = (self.since(), cpu_s() - self.cpu_before_s);
        self.resident_most_bytes = resident("VmHWM:");
        let mut samples = world.step_ns.take().unwrap_or_default();
        samples.sort_unstable();
        let at = |share: usize| samples.get(samples.len() * share / 100).copied().unwrap_or_default();
        (self.step_median_ns, self.step_99th_ns) = (at(50), at(99));
        self.steps_timed = samples.len() as u64;
    }
}

/// Memory of this process, from `/proc`; zero where that is not known.
fn resident(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// Seconds that this thread ran; zero where that is not known.
fn cpu_s() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|ns| ns.parse::<f64>().ok()).unwrap_or(0.0) / 1e9
}
