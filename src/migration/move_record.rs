//! What a cloud records of a migration it has or had a part in: what its history shows, and what a restart takes
//! an unfinished move up by. It is not what the API shows (`interface/moves.rs`), though it began as that:
//! `broker/account.rs` makes either of the other. What is added here reads records that lack it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::types::{CloudName, MemberJid, MigrationId, PeerText, VmId, VmName, kinds};

kinds! {
    /// The part in it of the cloud that records it.
    MoveRole {
        Source = "source",
        Target = "target",
    }

    /// How far it had come, or how it ended.
    MovePhase {
        Negotiate = "negotiate",
        Stage = "stage",
        SwitchOver = "switch-over",
        Start = "start",
        HandedOver = "handed-over",
        Completed = "completed",
        Cancelled = "cancelled",
        Failed = "failed",
        InDoubt = "in-doubt",
        Waiting = "waiting",
        /// One that an earlier release recorded.
        #[serde(other)]
        Other = "other",
    }

    /// Why one ended without a hand-over.
    FailureKind {
        BadRequest = "bad-request",
        NotFound = "not-found",
        Conflict = "conflict",
        Refused = "refused",
        Forbidden = "forbidden",
        Unavailable = "unavailable",
        Damaged = "damaged",
        NoSpace = "no-space",
        Missing = "missing",
        Cancelled = "cancelled",
        Failed = "failed",
    }
}

/// A migration as it was when this was written.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MoveRecord {
    #[serde(rename = "progress")]
    pub course: MoveCourse,
    #[serde(rename = "account")]
    pub cost: MoveCost,
    #[serde(rename = "problem")]
    pub failure: Option<Failure>,
    #[serde(default)]
    pub remarks: Vec<String>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MoveCourse {
    pub id: MigrationId,
    pub vm: VmName,
    pub vm_id: VmId,
    pub role: MoveRole,
    pub peer: MemberJid,
    pub peer_cloud: Option<CloudName>,
    pub phase: MovePhase,
    pub detail: String,
    #[serde(rename = "done_bytes", alias = "bytes_done")]
    pub bytes_done: u64,
    #[serde(rename = "total_bytes", alias = "bytes_total")]
    pub bytes_total: u64,
    pub rate_bytes_per_s: u64,
    pub eta_s: Option<u64>,
    pub fraction: f64,
    #[serde(with = "crate::clock::rfc3339")]
    pub started: UnixMillis,
    #[serde(with = "crate::clock::rfc3339")]
    pub updated: UnixMillis,
    /// Nothing follows. One that had not ended when its broker did was cut short, or waits for a receipt.
    pub ended: bool,
    /// The VM's epoch at the source when the move began: another one now means that it changed hands since.
    #[serde(default)]
    pub epoch: u64,
    #[serde(default)]
    pub handed_over: bool,
    /// Earlier tries of the same move that restarts cut short.
    #[serde(default)]
    pub attempt: u32,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    pub object: String,
    pub reason: String,
    #[serde(default)]
    pub next_step: String,
}

/// What it cost.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct MoveCost {
    pub components_needed: u32,
    pub components_held: u32,
    pub components_fetched: u32,
    pub packs_needed: u32,
    pub packs_fetched: u32,
    pub fetched: Vec<PeerText>,
    pub component_bytes: u64,
    pub root_delta_bytes: u64,
    pub user_data_bytes: u64,
    pub control_bytes: u64,
    pub wire_bytes: u64,
    #[serde(default)]
    pub fetch_ms: u64,
    #[serde(default)]
    pub looking_ms: u64,
    #[serde(default)]
    pub foretold: Option<MoveForetold>,
    #[serde(default)]
    pub shutdown_ms: Option<u64>,
    #[serde(default)]
    pub carried_bytes: u64,
    pub monolithic_zstd_bytes: Option<u64>,
    pub monolithic_raw_bytes: Option<u64>,
    pub last_scan_bytes: Option<u64>,
    pub phase_ms: BTreeMap<String, u64>,
    pub downtime_ms: Option<u64>,
    pub boot_ms: Option<u64>,
}

/// What it was to do and how long that was foretold to take: what forecasts are learnt from.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MoveForetold {
    /// Some builds called it as the API does.
    #[serde(alias = "carried_bytes")]
    pub bytes: u64,
    pub base_bytes: u64,
    pub disk_bytes: u64,
    pub runs: bool,
    pub patience_s: f64,
    pub ignores: bool,
    pub low_s: Option<f64>,
    pub high_s: Option<f64>,
    pub disturbed: bool,
}
