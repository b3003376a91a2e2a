//! What a cloud records of a VM: its shape, and who owns it. Types only; `runner/RECORDS.md` says
//! where they lie and in which order they are written, `ownership.rs` how they change.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::types::codec::CodecError;
use crate::types::{ByteSize, MemberJid, MigrationId, PublicKey, hex};
use crate::vm::VmSpec;

use super::handover::{HandOver, Origin, Receipt};
use super::lineage::{EPOCH_BORN, Links};
use super::message::Seed;

/// Version of the records below.
pub const VERSION: u32 = 1;

/// A VM this cloud owns, or owned and keeps a copy of.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct VmRecord {
    pub version: u32,
    pub spec: VmSpec,
    /// The epoch under which this cloud owns the VM, or owned it. It follows from the history.
    pub epoch: u64,
    pub ownership: Ownership,
    /// Whether the operator wants it to run.
    pub run: bool,
    /// Names of the recipe's components, for people.
    pub components: Vec<String>,
    /// Directory of its disks, relative to the VM's own.
    pub disks: String,
    pub created: UnixMillis,
    /// How it came here, unless it was born here.
    pub arrival: Option<Arrival>,
    /// The hand-over that an operator took back without the target's word, which made it ours.
    #[serde(default)]
    pub taken_back: Option<MigrationId>,
    /// Since when we know that the target of that hand-over had taken the VM over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contested: Option<UnixMillis>,
    /// By which record this cloud is the owner. `None` in records of releases that kept no history.
    #[serde(default)]
    pub origin: Option<Origin>,
    /// Copies from before it left and came home, each kept for the grace period of its hand-over.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept: Vec<KeptCopy>,
    /// Another cloud showed that this one gave the VM up later than this record knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disproved: Option<Box<Disproved>>,
    /// When its guest last let the time for a shutdown pass; none once it was seen to end by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ignored_stop: Option<UnixMillis>,
    /// The last time an operator started it without the word of those that may know more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unconfirmed_start: Option<UnconfirmedStart>,
    /// The shape it runs in, where the spec has changed since it was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runs_as: Option<Shape>,
    /// What this cloud's operator wants of it.
    #[serde(default, skip_serializing_if = "Settings::is_default")]
    pub settings: Settings,
}

/// What a guest sees of its machine that can be changed between two starts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Shape {
    pub cpus: u32,
    #[serde(rename = "memory_bytes", alias = "memory")]
    pub memory: ByteSize,
}

impl Shape {
    pub fn of(spec: &VmSpec) -> Self {
        Self { cpus: spec.cpus, memory: spec.memory }
    }
}

/// An operator's wishes for a VM. They are the cloud's own: they stay when the VM moves, and are found again
/// when it comes home.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Settings {
    #[serde(default)]
    pub description: String,
    #[serde(default)]
    pub autostart: Autostart,
    /// How long its guest may take to shut down; the cloud's `migration.stop_timeout_s` if not set.
    #[serde(default)]
    pub stop_timeout_s: Option<u32>,
}

impl Settings {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Whether a VM is started when the broker starts after a boot of its machine.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Autostart {
    /// If it was to run when the machine went down.
    #[default]
    Last,
    Always,
    Never,
}

impl fmt::Display for Autostart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Autostart::Last => "last",
            Autostart::Always => "always",
            Autostart::Never => "never",
        })
    }
}

impl FromStr for Autostart {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "last" => Ok(Autostart::Last),
            "always" => Ok(Autostart::Always),
            "never" => Ok(Autostart::Never),
            _ => Err(format!("'{}' is not one of last, always, never", s.escape_default())),
        }
    }
}

/// An operator's word that the VM runs nowhere else.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct UnconfirmedStart {
    pub at: UnixMillis,
    /// Who called the API, where the system tells.
    pub by_uid: Option<u32>,
    /// Members that had not said what they know.
    pub silent: Vec<MemberJid>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Ownership {
    Here,
    /// Given to another cloud under the next epoch; never to be run here under this one.
    GivenUp(Box<GivenUp>),
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct GivenUp {
    pub migration: MigrationId,
    pub to: MemberJid,
    pub to_key: PublicKey,
    /// The hand-over's canonical bytes in hex, recorded before they were signed.
    pub record: String,
    /// Whether it was to run when it was given up: the target is asked so, and it runs here again if it is returned.
    pub was_running: bool,
    pub since: UnixMillis,
    /// The disks' state when given up: a seed should the VM come home. Not known of a hand-over that
    /// this cloud's records have lost.
    pub seed: Option<Seed>,
    pub receipt: Option<Receipt>,
    /// When the copy is scrubbed; `None` while the target has not acknowledged and no operator has
    /// accepted that it is the owner.
    pub scrub_after: Option<UnixMillis>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Arrival {
    pub migration: MigrationId,
    pub from: MemberJid,
    pub from_key: PublicKey,
    pub receipt: Receipt,
    /// The source knows that we own it and has been told that it runs.
    pub acknowledged: bool,
    /// Since when we know that the source's operator took the VM back without our word.
    #[serde(default)]
    pub contested: Option<UnixMillis>,
}

/// An earlier copy of the VM's disks.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct KeptCopy {
    /// Its directory, relative to the VM's own.
    pub disks: String,
    pub scrub_after: UnixMillis,
}

/// What another cloud showed of the VM's history beyond this record.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Disproved {
    pub by: MemberJid,
    pub since: UnixMillis,
    /// The links after the one by which this record is the owner; the first is this cloud's own hand-over.
    pub links: Links,
}

impl Disproved {
    /// The first of the hand-overs that this record does not know.
    pub fn hand_over(&self) -> Option<HandOver> {
        self.links.0.first()?.hand_over.read().ok()
    }
}

impl Arrival {
    /// Whether the source has still something to say about it.
    pub fn is_open(&self) -> bool {
        !self.acknowledged || self.contested.is_some()
    }
}

impl GivenUp {
    pub fn hand_over(&self) -> Result<HandOver, CodecError> {
        let bad = || CodecError::Invalid { what: "hand-over record", rule: "not hex".into() };
        HandOver::decode(&hex::decode(&self.record).ok_or_else(bad)?)
    }

    /// Whether nobody has said yet who owns the VM: no receipt, no operator.
    pub fn in_doubt(&self) -> bool {
        self.receipt.is_none() && self.scrub_after.is_none()
    }
}

impl VmRecord {
    /// A VM that is made here.
    pub fn new(spec: VmSpec, components: Vec<String>, disks: &str, created: UnixMillis) -> Self {
        Self {
            version: VERSION,
            spec,
            epoch: EPOCH_BORN,
            ownership: Ownership::Here,
            run: false,
            components,
            disks: disks.to_owned(),
            created,
            arrival: None,
            taken_back: None,
            contested: None,
            origin: Some(Origin::Born),
            kept: Vec::new(),
            disproved: None,
            ignored_stop: None,
            unconfirmed_start: None,
            runs_as: None,
            settings: Settings::default(),
        }
    }

    /// What it takes of this host when it runs: as it was started, or as it will be, whichever is more.
    pub fn takes(&self) -> Shape {
        let spec = Shape::of(&self.spec);
        let now = self.runs_as.unwrap_or(spec);
        Shape { cpus: spec.cpus.max(now.cpus), memory: ByteSize(spec.memory.0.max(now.memory.0)) }
    }

    pub fn is_here(&self) -> bool {
        self.ownership == Ownership::Here
    }

    pub fn given_up(&self) -> Option<&GivenUp> {
        match &self.ownership {
            Ownership::Here => None,
            Ownership::GivenUp(g) => Some(g),
        }
    }

    /// The highest epoch of the VM this record knows of.
    pub fn seen_epoch(&self) -> u64 {
        self.epoch + u64::from(!self.is_here())
    }
}
