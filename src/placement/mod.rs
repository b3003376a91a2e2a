//! Level 1: can this VM run here, and which member suits best. Pure functions of snapshots.

pub mod hardware;
pub mod policy;
pub mod rank;
pub mod room;
pub mod shortlist;
pub mod storage;

pub use rank::{Offer, rank};
pub use room::{Room, assess};
pub use shortlist::shortlist;
pub use storage::{Needed, Storage};
