//! Level 1: what a VM is, and the chunk maps that describe what it wrote. Pure.

pub mod chunk_map;
pub mod hardware;
pub mod hypervisor;
pub mod spec;

pub use chunk_map::{Block, ChunkMap, MapRef};
pub use hardware::{CardModel, DiskBus, Firmware, Hardware, SystemUuid};
pub use spec::{Mac, PowerState, VmSpec};
