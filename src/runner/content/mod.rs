//! Work on the repository: what operators ask of it, what is lent to and borrowed from members, what arrives.

pub mod archive;
pub mod borrowing;
pub mod catalogue;
pub mod healing;
pub mod optimize;
pub mod receipts;
pub mod receiving;
pub mod serving;
