//! Level 3: a simulated federation. The brokers' cores are the ones that ship; the network, time, hypervisors
//! and repositories are models. Where the model ends: `SIMULATION.md`.

pub mod cloud;
pub mod model;
pub mod scenario;
pub mod world;

pub use cloud::{Cloud, Shape};
pub use model::{Catalogue, Component};
pub use scenario::{Outcome, Row, Scenario, ScenarioError};
pub use world::{Counts, Links, Random, World};
