//! What is asked about moves and told of them: plans, migrations, what they cost, and decisions about owners.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::types::{CloudName, MemberJid, MigrationId, PeerText, VmId, VmName};

use super::kinds::{MigrationPhase, MigrationRole};
use super::problem::Problem;
use super::request::requests;

requests! {
    /// What whoever moves VMs between clouds asks: who could take one, that it goes there, how far that is, and
    /// what becomes of a hand-over that hangs. An `id` is that of a migration, or its beginning.
    MoveRequest {
        "plan" => Plan {
            vm: String,
            to: Option<String>,
            /// Ask every member that may be able to take it, and not a few of many.
            #[serde(default)]
            all: bool,
        },
        /// Moves a VM, to the best member if none is named.
        "move" => Begin {
            vm: String,
            to: Option<String>,
            dry_run: bool,
            /// A guest that does not end in time is switched off.
            #[serde(default)]
            force_stop: bool,
        },
        "migration-list" => List,
        "migration-show" => Show {
            id: String,
        },
        /// Reports events of a migration until it ends.
        "migration-watch" => Watch {
            id: String,
        },
        "migration-cancel" => Cancel {
            id: String,
        },
        /// The doubly signed record of a migration, remembered or long ago.
        "migration-receipt" => Receipt {
            id: String,
        },
        /// Decides a hand-over in doubt. Until `confirmed` it only says what that means.
        "migration-resolve" => Resolve {
            id: String,
            owner: Side,
            confirmed: bool,
            /// Filled in by the API.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            by_uid: Option<u32>,
        },
        /// Caps what a migration sends from here, from now on; `None` lifts the cap.
        "migration-limit" => Limit {
            id: String,
            bytes_per_s: Option<u64>,
        },
        /// No more passes while the VM runs: switch over. At the target its source is asked.
        "migration-switch-over" => SwitchOver {
            id: String,
        },
        /// Holds the guest still until it is switched over. At the target its source is asked.
        "migration-hold" => Hold {
            id: String,
        },
    }
}

impl MoveRequest {
    pub(super) fn asked_by(&mut self, uid: Option<u32>) {
        if let Self::Resolve { by_uid, .. } = self {
            *by_uid = uid;
        }
    }
}

/// Which cloud of a migration is to own the VM, as seen from the broker that is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    Here,
    There,
}

/// One answer to "can you take this VM".
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PlanView {
    pub vm: VmName,
    /// Ranked, best first; members that cannot take it come last with the reasons.
    pub candidates: Vec<Candidate>,
    /// What stands in the way here, whoever takes it.
    #[serde(default)]
    pub notes: Vec<String>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Candidate {
    pub cloud: Option<CloudName>,
    #[serde(rename = "member", alias = "jid")]
    pub jid: MemberJid,
    pub verdict: Verdict,
    /// Bytes of components that will travel: stored form of packs and manifests, or the deltas that
    /// are ready. Exact unless `deltas_unknown`.
    #[serde(rename = "component_missing_bytes", alias = "component_bytes_missing")]
    pub component_bytes_missing: u64,
    /// Deltas from what the member holds are still to be made: less will travel.
    #[serde(default)]
    pub deltas_unknown: bool,
    pub components_needed: u32,
    pub components_held: u32,
    pub packs_missing: u32,
    /// Plain bytes of root delta and user-data blocks it lacks, an upper bound of what they take on the wire.
    #[serde(rename = "root_delta_missing_bytes", alias = "root_delta_bytes_missing")]
    pub root_delta_bytes_missing: u64,
    #[serde(rename = "user_data_missing_bytes", alias = "user_data_bytes_missing")]
    pub user_data_bytes_missing: u64,
    /// What an earlier try brought counts as there; it is kept for so many seconds more.
    #[serde(default)]
    pub kept_s: u64,
    /// Plain bytes of components that are to be composed; none if that was done.
    #[serde(default)]
    pub base_bytes: u64,
    /// Predicted duration, seconds, by earlier moves to that member; `None` before the first.
    pub seconds_low: Option<f64>,
    pub seconds_high: Option<f64>,
    /// Of the last moves there, how many took the time that was foretold, and of how many.
    #[serde(default)]
    pub forecasts_held: u32,
    #[serde(default)]
    pub forecasts_told: u32,
    pub answer_ms: f64,
}

impl Candidate {
    /// All that would travel, as far as that is known.
    pub fn bytes_missing(&self) -> u64 {
        let disks_bytes = self.root_delta_bytes_missing.saturating_add(self.user_data_bytes_missing);
        self.component_bytes_missing.saturating_add(disks_bytes)
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Verdict {
    Yes,
    WithDifferences {
        differences: Vec<Reason>,
    },
    No {
        reasons: Vec<Reason>,
    },
    /// Why it was not asked.
    NotAsked {
        reasons: Vec<Reason>,
    },
}

impl Verdict {
    /// Whether the member said that it could take the VM.
    pub fn is_yes(&self) -> bool {
        matches!(self, Verdict::Yes | Verdict::WithDifferences { .. })
    }
}

/// A machine-readable difference or blocker.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Reason {
    /// Stable code such as `memory`, `network-missing`, `architecture`.
    pub code: String,
    pub text: PeerText,
    #[serde(default)]
    pub next_step: PeerText,
}

/// A migration as it is now, or was.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MigrationView {
    pub progress: MigrationProgress,
    pub account: Account,
    /// Why it ended without a hand-over.
    pub problem: Option<Problem>,
    /// What else is to be known of it, such as an operator's override; empty in lists.
    #[serde(default)]
    pub remarks: Vec<String>,
}

/// An operator's decision about a hand-over in doubt, before or after it was made.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ResolutionView {
    pub migration: MigrationId,
    pub vm: VmName,
    pub vm_id: VmId,
    pub owner: Side,
    pub peer: MemberJid,
    /// Of the other cloud's key.
    pub fingerprint: String,
    /// What is done and what it risks.
    pub statement: String,
    /// What to make sure of first.
    pub checks: Vec<String>,
    pub done: bool,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MigrationProgress {
    pub id: MigrationId,
    pub vm: VmName,
    pub vm_id: VmId,
    /// This broker's part in it.
    pub role: MigrationRole,
    pub peer: MemberJid,
    pub peer_cloud: Option<CloudName>,
    pub phase: MigrationPhase,
    /// Words for a person about what is happening or awaited now.
    pub detail: String,
    /// Payload bytes delivered and expected so far; `total` may grow when a pass finds more.
    #[serde(rename = "done_bytes", alias = "bytes_done")]
    pub bytes_done: u64,
    #[serde(rename = "total_bytes", alias = "bytes_total")]
    pub bytes_total: u64,
    pub rate_bytes_per_s: u64,
    pub eta_s: Option<u64>,
    /// Phase-weighted, 0 to 1, never falls.
    pub fraction: f64,
    #[serde(with = "crate::clock::rfc3339")]
    pub started: UnixMillis,
    #[serde(with = "crate::clock::rfc3339")]
    pub updated: UnixMillis,
    pub ended: bool,
    /// The VM's epoch at the source when the move began; 0 at the target.
    #[serde(default)]
    pub epoch: u64,
    /// The VM was handed over in it: given away, though it may have come back, or taken over.
    #[serde(default)]
    pub handed_over: bool,
    /// Earlier tries of the same move that restarts cut short.
    #[serde(default)]
    pub attempt: u32,
}

/// What a move is to do.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MoveWork {
    /// To be carried, as far as that is known before.
    #[serde(rename = "carried_bytes")]
    pub bytes: u64,
    /// Plain bytes of components that are to be composed; none if the base is there.
    pub base_bytes: u64,
    /// What the VM's disks take up.
    pub disk_bytes: u64,
    /// Its guest is to be shut down, and started.
    pub runs: bool,
    /// What time the guest is given to end.
    pub patience_s: f64,
    /// It let that time pass before: it will again.
    pub ignores: bool,
}

/// What a move was to do, and how long that was foretold to take.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Foretold {
    #[serde(flatten)]
    pub work: MoveWork,
    /// None as long as too little was known.
    pub low_s: Option<f64>,
    pub high_s: Option<f64>,
    /// The target did not answer for a while.
    pub disturbed: bool,
}

/// What became of what was foretold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Score {
    Held,
    Sooner,
    Later,
}

impl Foretold {
    /// What a move that took so long makes of it; nothing if nothing was foretold.
    pub fn score(&self, took_s: f64) -> Option<Score> {
        Some(match (self.low_s?, self.high_s?) {
            (low_s, _) if took_s < low_s => Score::Sooner,
            (_, high_s) if took_s > high_s => Score::Later,
            _ => Score::Held,
        })
    }
}

/// What a move cost, and what it would have cost without components.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Account {
    pub components_needed: u32,
    pub components_held: u32,
    pub components_fetched: u32,
    pub packs_needed: u32,
    pub packs_fetched: u32,
    /// Names of the components that travelled, wholly or in part.
    pub fetched: Vec<PeerText>,
    /// Payload bytes as they travelled, by kind.
    pub component_bytes: u64,
    pub root_delta_bytes: u64,
    pub user_data_bytes: u64,
    /// Negotiation, chunk maps and framing.
    pub control_bytes: u64,
    /// UDP payload of the data link, both directions.
    pub wire_bytes: u64,
    /// Time in which content was fetched.
    #[serde(default)]
    pub fetch_ms: u64,
    /// How long the source looked at the disks before anything travelled.
    #[serde(default)]
    pub looking_ms: u64,
    /// What the move was to do, as it was known before.
    #[serde(default)]
    pub foretold: Option<Foretold>,
    /// How long the guest took to shut down.
    #[serde(default)]
    pub shutdown_ms: Option<u64>,
    /// What came across so far, as it is known while a pass is under way and when one fails; what the
    /// others say is of passes that were completed.
    #[serde(default)]
    pub carried_bytes: u64,
    /// Whole disks through zstd level 3, and raw allocated bytes; `None` until estimated.
    pub monolithic_zstd_bytes: Option<u64>,
    pub monolithic_raw_bytes: Option<u64>,
    /// Bytes of its disks the source read in its last look at them, while the VM stood still.
    pub last_scan_bytes: Option<u64>,
    /// Milliseconds per phase.
    pub phase_ms: BTreeMap<String, u64>,
    /// From the VM's stop at the source to its start at the target.
    pub downtime_ms: Option<u64>,
    /// From the start at the target to the guest's own ready line, where it prints one.
    pub boot_ms: Option<u64>,
}
