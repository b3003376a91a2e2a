//! Level 1: can this VM run here, and which member suits best. Pure functions of snapshots.

pub mod policy;
pub mod rank;
pub mod room;
pub mod storage;

pub use rank::{Offer, rank};
pub use room::{NetworkOffer, Room, assess};
pub use storage::{Needed, Storage};
