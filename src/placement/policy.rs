//! Whether the rules for one member let a VM of its come: the part of a check that is about who asks.

use crate::federation::{MemberPolicy, Used};
use crate::migration::{Denial, DenialCode};
use crate::vm::VmSpec;

/// What one VM takes of its sender's limits.
pub fn taken_by(spec: &VmSpec) -> Used {
    Used {
        vms: 1,
        cpus: spec.cpus.into(),
        memory_bytes: spec.memory.0,
        storage_bytes: super::storage::promised(spec),
    }
}

/// Blockers for `spec` from a member of this policy, whose VMs here take `used` already.
pub fn blockers(policy: &MemberPolicy, used: &Used, spec: &VmSpec) -> Vec<Denial> {
    let over = policy.exceeded(used, &taken_by(spec)).into_iter();
    let next = |limit| format!("move a VM away from there, or let its operator raise {limit} for this cloud");
    over.map(|e| Denial::new(DenialCode::Policy, e.text).next(next(e.limit))).collect()
}
