//! Level 2: VM disk files: qcow2 overlays, raw user-data disks, chunk maps of both.
//!
//! A VM has a root disk, a qcow2 overlay ([`overlay`], read by [`qcow2`]) whose backing file is the
//! composition, and a user-data disk, a raw sparse file ([`user_data`]). At the source [`scan`]
//! turns a disk into its chunk map and an index from which its blocks are served, the first time
//! by reading it all, then by reading what has changed; at the target
//! [`stage`] brings a disk to a chunk map, fetching only what is not there. [`scrub`] removes a
//! disk for good. The bytes of what is kept beside a disk are specified in `FORMAT.md`.
//!
//! All I/O here blocks.

mod error;
mod image;
mod in_use;
mod index;
mod mapping;
pub mod overlay;
pub mod qcow2;
pub mod scan;
pub mod scrub;
mod space;
pub mod stage;
mod staged_map;
pub mod user_data;

pub use error::DiskError;
pub use image::DiskImage;
pub use in_use::is_in_use;
pub use index::BlockIndex;
pub use overlay::{OverlayWriter, create_overlay, grow_overlay};
pub use qcow2::Qcow2;
pub use scan::{Scan, scan_base, scan_root, scan_user_data};
pub use scrub::{finish_scrubs, scrub};
pub use space::require_space;
pub use stage::{Changes, DiskFile, StagedDisk};
pub use user_data::{UserDataDisk, create_user_data, grow_user_data};

/// Where the blocks lie that a disk held when it was last staged, whatever a guest did to it since.
pub fn index_as_staged(disk: &DiskFile) -> Option<BlockIndex> {
    BlockIndex::as_staged(disk)
}

/// Block size of a root delta's chunk map; also the subcluster of the overlays written here, so a
/// guest's write of one page is one block.
pub const ROOT_BLOCK_BYTES: u32 = 4096;

/// Block size of a user-data disk's chunk map: hashes of 0.2 % of the data, at the price of
/// sending 16 KiB where a guest wrote 4. Measured (`benches/blocks.rs`) on an ext4 volume with a
/// PostgreSQL cluster that was worked on, blocks at zstd 3 and map together: 40.9 MB at 4 KiB, 40.1
/// at 8, 40.5 at 16, 41.0 at 32, 41.4 at 64; 16 KiB needs half the index of 8. A map carries its block size, so this may change freely.
pub const USER_DATA_BLOCK_BYTES: u32 = 16 << 10;
