//! Level 3: a simulated federation. The brokers' cores are the ones that ship; the network, time, hypervisors
//! and repositories are models. Where the model ends: `SIMULATION.md`.

mod blocks;
pub mod cloud;
mod conversations;
pub mod counts;
mod helper;
mod host;
pub mod model;
mod order;
pub mod queue;
mod room;
pub mod scenario;
mod settled;
pub mod speed;
pub mod svg;
pub mod trace;
pub mod world;

pub use cloud::{Cloud, Shape};
pub use counts::{Counts, Subject, Tally};
pub use host::seed_of;
pub use model::{Catalogue, Component};
pub use order::Death;
pub use queue::{Kind, Pending, Said};
pub use scenario::{Outcome, Reached, Row, Scenario, ScenarioError};
pub use speed::Speed;
pub use world::{Carried, Links, Random, World};
