//! What is asked and told of this cloud and of the members of its federation.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::kinds::{LinkState, MemberState, MemberTrust};
use super::request::requests;
use crate::clock::UnixMillis;
use crate::federation::{MemberPolicy, Used};
use crate::types::{CloudName, MemberJid, PeerText, PublicKey, Succession};

requests! {
    /// What whoever runs this cloud asks: how it and the federation are, whose keys are believed, and what
    /// takes the broker as a whole.
    CloudRequest {
        "status" => Status,
        "members" => Members,
        "identity-trust" => IdentityTrust {
            member: MemberJid,
            key: PublicKey,
        },
        "identity-revoke" => IdentityRevoke {
            member: MemberJid,
        },
        /// Checks the repository, and fetches what is damaged or missing from members that hold it.
        "repo-heal" => Heal,
        /// Stops the broker; VMs keep running.
        "shutdown" => Shutdown,
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct StatusView {
    pub cloud: CloudName,
    pub version: String,
    #[serde(rename = "member", alias = "jid")]
    pub jid: MemberJid,
    pub key: PublicKey,
    pub fingerprint: String,
    pub room: String,
    pub link: LinkState,
    /// Why it is offline; empty if it is not.
    #[serde(default)]
    pub link_problem: String,
    pub driver: String,
    pub accelerator: String,
    /// Whether each VM runs as a user of its own, not as the broker's.
    #[serde(default)]
    pub own_users: bool,
    pub cpus: Resource,
    pub memory_bytes: Resource,
    /// Of the file system that VMs' disks lie on.
    pub storage_bytes: Resource,
    /// What may be promised to VMs of it, and what of that a VM that comes now could have.
    #[serde(default)]
    pub storage_promised_bytes: Resource,
    pub transfer_addresses: Vec<String>,
    pub vms_running: u32,
    pub migrations_running: u32,
    pub resident_bytes: u64,
    /// What others were refused since this broker started.
    #[serde(default)]
    pub refusals: RefusalsView,
}

/// Requests, dials and messages that no honest, healthy peer makes.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct RefusalsView {
    pub total: u64,
    /// By kind, such as `replay` or `not-member`.
    pub by_kind: BTreeMap<String, u64>,
    /// Those that were refused most: members, other accounts, addresses.
    pub senders: Vec<SenderView>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SenderView {
    pub sender: String,
    pub by_kind: BTreeMap<String, u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Resource {
    pub total: u64,
    pub free: u64,
}

/// A key that gave way to another.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Predecessor {
    pub key: PublicKey,
    pub fingerprint: String,
    /// By the clock of the cloud whose key it was.
    #[serde(with = "crate::clock::rfc3339")]
    pub until: UnixMillis,
}

impl Predecessor {
    pub fn of(s: &Succession) -> Self {
        Self { key: s.old, fingerprint: s.old.fingerprint(), until: s.issued }
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MemberView {
    #[serde(rename = "member", alias = "jid")]
    pub jid: MemberJid,
    pub cloud: Option<CloudName>,
    pub state: MemberState,
    #[serde(with = "crate::clock::rfc3339")]
    pub since: UnixMillis,
    #[serde(with = "crate::clock::rfc3339")]
    pub last_seen: UnixMillis,
    pub trust: MemberTrust,
    pub key: Option<PublicKey>,
    pub fingerprint: String,
    /// Of the pinned key, where the member shows another.
    #[serde(default)]
    pub pinned_fingerprint: String,
    /// The keys that the believed one followed, the newest last.
    #[serde(default)]
    pub predecessors: Vec<Predecessor>,
    /// Of the key in this cloud's configuration, where another followed it.
    #[serde(default)]
    pub outdated_pin: String,
    pub cpus: Resource,
    pub memory_bytes: Resource,
    pub storage_bytes: Resource,
    pub load_percent: f32,
    pub power: PeerText,
    pub region: PeerText,
    pub carbon_g_per_kwh: Option<f32>,
    pub price_per_hour: Option<f32>,
    pub features: Vec<PeerText>,
    pub software: PeerText,
    /// How far its clock is ahead of this cloud's, by the last message that it signed.
    #[serde(default)]
    pub clock_ahead_ms: Option<i64>,
    /// What it may do here.
    #[serde(default)]
    pub policy: Option<MemberPolicy>,
    /// What VMs from it take here.
    #[serde(default)]
    pub used: Used,
    /// What it was refused, by kind.
    #[serde(default)]
    pub refused: BTreeMap<String, u64>,
}
