//! One machine that runs VMs: hypervisor, disk files, compositions, its end of the data link.

pub mod adopt;
pub mod machine;
pub mod monolithic;
pub mod rehearsal;
pub mod scan;
pub mod stage;
