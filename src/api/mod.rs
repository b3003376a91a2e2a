//! Level 4: the local API of a broker, HTTP/1.1 over a Unix socket that only its user may open.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `POST /v1/request` | one `interface::Request`, JSON; beside its first bytes descriptors of the files it names, or none | `interface::Message` lines: events, then one reply or problem |
//! | `PUT /v1/object/{kind}/{id}` | the object, packs in stored form | [`PutAnswer`] or a problem line |
//! | `POST /v1/objects/held` | [`HeldRequest`] | [`HeldAnswer`] or a problem line |
//!
//! The status says how a request ended if it ended at once; a stream that began with an event has
//! status 200, and its last line says how it ended.

mod descriptors;
mod routes;
mod service;
mod socket;

use serde::{Deserialize, Serialize};

use crate::interface::ObjectKind;
use crate::interface::ProblemKind;
use crate::types::Hash;

pub use descriptors::Sending;
pub use routes::serve;
pub use service::Service;
pub use socket::bind;

/// JSON bodies may not be larger.
pub const JSON_BYTES_MAX: usize = 1 << 20;
/// Ids in one [`HeldRequest`].
pub const HELD_IDS_MAX: usize = 10_000;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldRequest {
    pub kind: ObjectKind,
    pub ids: Vec<Hash>,
}

/// One answer per id, in the request's order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HeldAnswer {
    pub held: Vec<bool>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PutAnswer {
    /// False if the repository held the object already.
    pub new: bool,
}

/// The HTTP status of a problem.
pub const fn status_of(kind: ProblemKind) -> u16 {
    match kind {
        ProblemKind::BadRequest => 400,
        ProblemKind::Forbidden => 403,
        ProblemKind::NotFound => 404,
        ProblemKind::Conflict => 409,
        ProblemKind::Refused => 422,
        ProblemKind::Cancelled => 410,
        ProblemKind::Failed => 500,
        ProblemKind::Damaged => 502,
        ProblemKind::Unavailable => 503,
        ProblemKind::Missing => 501,
        ProblemKind::NoSpace => 507,
    }
}
