//! What an overlay's tables said at one moment, and where they say something else later.
//!
//! QEMU keeps tables in memory, so a scan beside a running VM may miss a block that was written
//! long before, and no list of later writes would name it. But a block that was read by the
//! tables of one moment, has the same place in those of a later one and was not written in
//! between holds what was read. So the next scan reads where tables differ, whatever the list says.

use std::ops::Range;

use super::DiskError;
use super::qcow2::{Qcow2, Run, RunState};

/// The runs of an overlay, ascending: 32 bytes for each stretch of the file.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Mapping(Vec<Run>);

impl Mapping {
    pub fn of(qcow2: &Qcow2) -> Result<Self, DiskError> {
        qcow2.allocated().collect::<Result<_, _>>().map(Self)
    }

    /// What the overlay itself holds, ascending and apart.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + Send + '_ {
        self.0.iter().map(|run| run.offset_bytes..end(run))
    }

    /// Where a byte is held elsewhere than in `other`, or otherwise; ascending and apart.
    pub fn differences(&self, other: &Self) -> Vec<Range<u64>> {
        let mut differing: Vec<Range<u64>> = Vec::new();
        let (mut ours, mut theirs) = (self.0.as_slice(), other.0.as_slice());
        let mut at = 0;
        loop {
            let (one, one_until) = held_at(&mut ours, at);
            let (two, two_until) = held_at(&mut theirs, at);
            let until = one_until.min(two_until);
            if until == u64::MAX {
                return differing;
            }
            if one != two {
                match differing.last_mut() {
                    Some(last) if last.end == at => last.end = until,
                    _ => differing.push(at..until),
                }
            }
            at = until;
        }
    }
}

fn end(run: &Run) -> u64 {
    run.offset_bytes.saturating_add(run.len_bytes)
}

/// How the byte at `at` is held, and up to where the answer follows from this one; drops runs before.
fn held_at(runs: &mut &[Run], at: u64) -> (Option<RunState>, u64) {
    while let Some((first, rest)) = runs.split_first()
        && end(first) <= at
    {
        *runs = rest;
    }
    match runs.first() {
        None => (None, u64::MAX),
        Some(run) if run.offset_bytes > at => (None, run.offset_bytes),
        Some(run) => {
            let state = match run.state {
                RunState::Zero => RunState::Zero,
                RunState::Data { host_offset_bytes } => {
                    RunState::Data { host_offset_bytes: host_offset_bytes + (at - run.offset_bytes) }
                }
            };
            (Some(state), end(run))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Runs of small lengths with gaps, some of which continue the one before in the file.
    fn mapping() -> impl Strategy<Value = Mapping> {
        let run = (0u64..3, 1u64..5, prop_oneof![Just(None), (0u64..4).prop_map(Some)]);
        proptest::collection::vec(run, 0..12).prop_map(|parts| {
            let mut at = 0;
            Mapping(
                parts
                    .into_iter()
                    .map(|(gap, len_bytes, host)| {
                        let offset_bytes = at + gap;
                        at = offset_bytes + len_bytes;
                        let state = host.map_or(RunState::Zero, |host| RunState::Data {
                            host_offset_bytes: 100 * host + offset_bytes,
                        });
                        Run { offset_bytes, len_bytes, state }
                    })
                    .collect(),
            )
        })
    }

    fn byte(mapping: &Mapping, at: u64) -> Option<RunState> {
        let run = mapping.0.iter().find(|run| (run.offset_bytes..end(run)).contains(&at))?;
        Some(match run.state {
            RunState::Zero => RunState::Zero,
            RunState::Data { host_offset_bytes: first } => {
                RunState::Data { host_offset_bytes: first + at - run.offset_bytes }
            }
        })
    }

    proptest! {
        #[test]
        fn every_byte_held_otherwise_is_told_and_no_other(a in mapping(), b in mapping()) {
            let told = a.differences(&b);
            for at in 0..100 {
                let differs = byte(&a, at) != byte(&b, at);
                prop_assert_eq!(told.iter().any(|range| range.contains(&at)), differs, "byte {}", at);
            }
            prop_assert!(told.windows(2).all(|pair| pair[0].end < pair[1].start));
            prop_assert_eq!(a.differences(&a), Vec::new());
        }
    }
}
