//! What one member may do here: whose VMs are taken, how much they may take together, what is
//! served to it, how often it may ask. Set in the configuration; evaluated here, without effects.

use serde::{Deserialize, Serialize};

use crate::types::ByteSize;

/// The rules for one member. `None` is no limit of its own.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MemberPolicy {
    /// Whether its VMs are taken.
    pub accept_vms: bool,
    /// Whether it may fetch components that have a name here.
    pub share_components: bool,
    /// Part of this cloud that its VMs may take, where no limit below says otherwise; 1 is all.
    #[serde(default = "all")]
    pub share: f64,
    /// Limits of what VMs from it may take here together, reservations counted in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vms_max: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus_max: Option<u32>,
    #[serde(
        default,
        rename = "memory_max_bytes",
        alias = "memory_max",
        skip_serializing_if = "Option::is_none"
    )]
    pub memory_max: Option<ByteSize>,
    /// Of virtual disks: root and user data.
    #[serde(
        default,
        rename = "storage_max_bytes",
        alias = "storage_max",
        skip_serializing_if = "Option::is_none"
    )]
    pub storage_max: Option<ByteSize>,
    /// Most that is served to it, over all its tickets, bytes per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes_per_s: Option<u64>,
    pub requests_per_minute: u32,
}

fn all() -> f64 {
    1.0
}

/// What VMs from one member take here: those that came from it and are here still, and those that
/// are on their way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Used {
    pub vms: u32,
    pub cpus: u64,
    pub memory_bytes: u64,
    pub storage_bytes: u64,
}

impl Used {
    pub fn plus(self, more: Used) -> Used {
        Used {
            vms: self.vms.saturating_add(more.vms),
            cpus: self.cpus.saturating_add(more.cpus),
            memory_bytes: self.memory_bytes.saturating_add(more.memory_bytes),
            storage_bytes: self.storage_bytes.saturating_add(more.storage_bytes),
        }
    }
}

/// A limit that would be exceeded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Exceeded {
    /// The setting's name.
    pub limit: &'static str,
    /// Which limit, what is used of it, and what was asked for.
    pub text: String,
}

impl MemberPolicy {
    /// With limits for all that has none of its own: the member's share of what this cloud has.
    pub fn within(self, capacity: &Used) -> Self {
        if self.share >= 1.0 {
            return self;
        }
        let share = |all: u64| (all as f64 * self.share) as u64;
        Self {
            cpus_max: self.cpus_max.or(Some(u32::try_from(share(capacity.cpus)).unwrap_or(u32::MAX).max(1))),
            memory_max: self.memory_max.or(Some(ByteSize(share(capacity.memory_bytes)))),
            storage_max: self.storage_max.or(Some(ByteSize(share(capacity.storage_bytes)))),
            ..self
        }
    }

    /// The limits that `wanted` beside `used` would exceed; empty means it may come.
    pub fn exceeded(&self, used: &Used, wanted: &Used) -> Vec<Exceeded> {
        let count = |n: u64| n.to_string();
        let size = |n: u64| ByteSize(n).to_string();
        type Show<'a> = &'a dyn Fn(u64) -> String;
        let rows: [(&'static str, Option<u64>, u64, u64, Show<'_>); 4] = [
            ("vms_max", self.vms_max.map(u64::from), used.vms.into(), wanted.vms.into(), &count),
            ("cpus_max", self.cpus_max.map(u64::from), used.cpus, wanted.cpus, &count),
            ("memory_max", self.memory_max.map(|m| m.0), used.memory_bytes, wanted.memory_bytes, &size),
            ("storage_max", self.storage_max.map(|s| s.0), used.storage_bytes, wanted.storage_bytes, &size),
        ];
        let over = rows.into_iter().filter_map(|(limit, most, used, wanted, show)| {
            let most = most.filter(|most| used.saturating_add(wanted) > *most)?;
            let text = format!(
                "{limit} for VMs from this cloud is {}; {} are used and {} are asked for",
                show(most),
                show(used),
                show(wanted)
            );
            Some(Exceeded { limit, text })
        });
        over.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open() -> MemberPolicy {
        MemberPolicy {
            accept_vms: true,
            share_components: true,
            share: 1.0,
            vms_max: None,
            cpus_max: None,
            memory_max: None,
            storage_max: None,
            bandwidth_bytes_per_s: None,
            requests_per_minute: 6000,
        }
    }

    #[test]
    fn a_share_limits_what_has_no_limit_of_its_own() {
        let cloud = Used { vms: 0, cpus: 16, memory_bytes: 32 << 30, storage_bytes: 100 << 30 };
        assert_eq!(open().within(&cloud), open(), "a whole share lifts them");
        let half = MemberPolicy { share: 0.5, cpus_max: Some(12), ..open() }.within(&cloud);
        assert_eq!(
            (half.cpus_max, half.memory_max, half.storage_max, half.vms_max),
            (Some(12), Some(ByteSize::gib(16)), Some(ByteSize::gib(50)), None)
        );
        let tiny = MemberPolicy { share: 0.01, ..open() }.within(&cloud);
        assert_eq!(tiny.cpus_max, Some(1), "a share is never nothing");
    }

    #[test]
    fn each_limit_is_named_with_what_is_used() {
        let used = Used { vms: 1, cpus: 2, memory_bytes: 512 << 20, storage_bytes: 3 << 30 };
        let wanted = Used { vms: 1, cpus: 2, memory_bytes: 512 << 20, storage_bytes: 1 << 30 };
        assert_eq!(open().exceeded(&used, &wanted), []);
        let exact = MemberPolicy {
            vms_max: Some(2),
            cpus_max: Some(4),
            memory_max: Some(ByteSize::gib(1)),
            storage_max: Some(ByteSize::gib(4)),
            ..open()
        };
        assert_eq!(exact.exceeded(&used, &wanted), [], "a limit may be reached");
        let tight = MemberPolicy {
            vms_max: Some(1),
            cpus_max: Some(3),
            memory_max: Some(ByteSize::mib(1023)),
            storage_max: Some(ByteSize::gib(3)),
            ..open()
        };
        let over = tight.exceeded(&used, &wanted);
        let limits: Vec<_> = over.iter().map(|e| e.limit).collect();
        assert_eq!(limits, ["vms_max", "cpus_max", "memory_max", "storage_max"]);
        assert_eq!(over[1].text, "cpus_max for VMs from this cloud is 3; 2 are used and 2 are asked for");
        let absurd = Used { vms: u32::MAX, cpus: u64::MAX, memory_bytes: u64::MAX, storage_bytes: u64::MAX };
        assert_eq!(tight.exceeded(&used, &absurd).len(), 4, "sums do not wrap");
        assert_eq!(used.plus(absurd).cpus, u64::MAX);
    }
}
