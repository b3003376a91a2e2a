//! Level 2: virtual machines on this host.
//!
//! [`Driver`] is the one interface; every driver passes the same [`conformance`] suite. `qemu`
//! talks QMP to one QEMU process per VM and needs no daemon; `fake` serves simulation and fault
//! tests. What a driver cannot do it says in its [`Features`], and plans take that into account.

pub mod conformance;
pub mod driver;
pub mod error;
pub mod fake;
mod problem;
pub mod qemu;

pub use driver::{
    Ability, Accelerator, ConsoleStream, DiskChanges, DiskFormat, Driver, DriverEvent, DriverFuture,
    EventKind, Features, Machine, MachineStats, Period, StopMode, StopReason,
};
pub use error::DriverError;
pub use fake::FakeDriver;
pub use qemu::{QemuConfig, QemuDriver, QemuLack, QemuTools, find_qemu};

/// What `fuzz/` reaches into.
#[cfg(fuzzing)]
pub mod fuzzing {
    pub use super::qemu::fuzzing::{dirty_ranges, is_message};
}
