//! Level 3: a simulated federation. The brokers' cores are the ones that ship; the network, time, hypervisors
//! and repositories are models. Where the model ends: `SIMULATION.md`.

pub mod cloud;
mod conversations;
mod host;
pub mod model;
mod order;
pub mod queue;
mod room;
pub mod scenario;
pub mod world;

pub use cloud::{Cloud, Shape};
pub use host::seed_of;
pub use model::{Catalogue, Component};
pub use order::Death;
pub use queue::{Kind, Pending, Said};
pub use scenario::{Outcome, Row, Scenario, ScenarioError};
pub use world::{Counts, Links, Random, World};
