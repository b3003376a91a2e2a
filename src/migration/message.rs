//! The bodies of negotiation messages: the seven request/answer pairs of the ODCA process message
//! table, and cancellation. JSON inside a signed [`super::Envelope`]; unknown fields are ignored,
//! so a later minor version can add some.

use serde::{Deserialize, Serialize};

use crate::types::{
    ComponentId, LinkId, MemberJid, PackId, PeerText, PublicKey, ReservationId, Successions, VmId,
};
use crate::vm::{MapRef, VmSpec};

use super::handover::{Receipt, Return, SignedHandOver};
use super::lineage::Links;

/// Ids one check may ask about at once; more are asked in further checks.
pub const CHECK_IDS_MAX: usize = 1000;
/// Objects one content request may ask for; more are asked for in further requests.
pub const CONTENT_IDS_MAX: usize = 1000;
/// Tickets one content request may give back.
pub const TICKETS_BACK_MAX: usize = 16;
/// VMs one question about their owners may name; more are asked about in further ones.
pub const CLAIMS_MAX: usize = 500;
/// Addresses a source may offer.
pub const ADDRESSES_MAX: usize = 16;

/// What one broker asks of another. Every request may be repeated: the answer is the same, or
/// tells what became of it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum RequestBody {
    /// To the target: could you take this VM, and what of it do you hold? Changes nothing there.
    Configuration { spec: VmSpec, components: Vec<ComponentId>, packs: Vec<PackId> },
    /// To the target: keep room for it.
    Reservation { spec: VmSpec },
    /// To the target of a reservation: links `at` to `at + links` of the VM's history, of `total`, oldest
    /// first. With the last page the target says whether it believes the history.
    /// `after` names the link they begin after, if the target knows it.
    /// `successions`: how keys in it gave way to others.
    Lineage {
        at: u32,
        total: u32,
        after: Option<LinkId>,
        links: Links,
        #[serde(default)]
        successions: Successions,
    },
    /// To any member: we believe to own these VMs. What do you know of them beyond that? Belongs to no VM.
    Owners { claims: Vec<Claim> },
    /// To the target: bring your copy to this state. Repeated to learn how far it is.
    Initialization(Box<Initialization>),
    /// To the target: it is yours; start it. Repeated until a receipt or a return comes back.
    Start { hand_over: SignedHandOver, run: bool },
    /// To the target: our operator took the VM back without your word. Promise never to run it under
    /// this epoch, or say with your receipt that you took it over.
    Withdraw { hand_over: SignedHandOver },
    /// To the target: forget this migration and remove what was made for it.
    Cancel { reason: PeerText },
    /// To the source: hold the guest still, so that the copy catches up with it. Repeated to learn
    /// whether it stands still.
    Suspend,
    /// To the source: switch over now, with no pass more while the VM runs. Repeated to learn
    /// whether it is stopped.
    Stop,
    /// To the source: the VM runs here; release your copy. Tells how long the guest took to boot.
    Delete { boot_ms: Option<u64> },
    /// To any member: which of these do you hold and let me fetch? Belongs to no VM. `done` are
    /// tickets of earlier answers that are not needed any more.
    Content {
        components: Vec<ComponentId>,
        packs: Vec<PackId>,
        #[serde(default)]
        done: Vec<String>,
    },
}

/// A VM that the sender believes to own.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Claim {
    pub vm: VmId,
    /// The last link of its history that the sender knows; none if it was made there.
    pub tip: Option<LinkId>,
    pub epoch: u64,
    pub running: bool,
}

/// What a member knows of a VM beyond another's claim.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Known {
    pub vm: VmId,
    /// Links from the claim's tip on; from the first, if the member does not know that one.
    pub links: Links,
    /// How keys in them gave way to others.
    #[serde(default)]
    pub successions: Successions,
    /// There are more than one answer carries.
    pub more: bool,
    /// The member believes to own the VM itself, and whether it runs there.
    pub here: bool,
    pub running: bool,
}

/// One pass of staging. The components follow from the recipe; the maps name the disks' state.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Initialization {
    pub spec: VmSpec,
    /// The recipe's canonical bytes, base64.
    pub recipe: String,
    /// Names of the recipe's components, in its order, for accounts and error messages.
    pub component_names: Vec<PeerText>,
    /// Stored bytes of the components the target lacked when it was checked, for its progress.
    #[serde(default)]
    pub component_bytes: u64,
    pub pass: Pass,
    /// Where the source serves content: `host:port`.
    pub addresses: Vec<PeerText>,
    pub source_key: PublicKey,
    /// The capability that content requests must carry, 64 hex digits.
    pub ticket: String,
    /// With the last pass: the firmware's variables, base64 of a zstd frame of at most 4 MiB.
    #[serde(default)]
    pub firmware: Option<String>,
}

/// The disks' state one staging pass aims at.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Pass {
    /// Counts from 1.
    pub number: u32,
    /// The VM is stopped: these maps are final.
    pub last: bool,
    pub root_delta: MapRef,
    pub user_data: MapRef,
}

/// What comes back.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum AnswerBody {
    Configuration(CheckAnswer),
    Reserved {
        expires_in_s: u64,
        /// What the hand-over has to name; not of a target that speaks version 1.
        #[serde(default)]
        reservation: Option<ReservationId>,
        /// The last link of the VM's history that the target knows: what comes after it is enough.
        #[serde(default)]
        known: Option<LinkId>,
    },
    /// So much of the history is there.
    Lineage {
        links: u32,
    },
    /// What is known beyond the claims; claims of which nothing more is known are left out.
    Owners {
        known: Vec<Known>,
    },
    /// Not finished yet; ask again.
    Working(Progress),
    /// The pass of this number is complete and verified.
    Staged {
        pass: u32,
        account: StageAccount,
    },
    /// The target owns the VM.
    Started {
        receipt: Receipt,
        running: bool,
        /// Why it does not run although it was taken over.
        problem: Option<PeerText>,
        account: StageAccount,
    },
    /// The target never took the VM and never will under this epoch.
    Returned {
        back: Return,
        denial: Denial,
    },
    Cancelled {
        /// How long what was staged is kept for another try, seconds; not said by earlier releases.
        #[serde(default)]
        kept_s: u64,
    },
    /// The guest is about to stand still; ask again.
    Suspending,
    /// The guest stands still, until it is switched over or the migration ends.
    Suspended,
    /// The VM is stopped after the pass under way; ask again.
    Stopping,
    /// The VM is stopped.
    Stopped,
    /// The source's copy is gone, or will be in so many seconds.
    Deleted {
        grace_s: u64,
    },
    Content(ContentAnswer),
    Denied(Denial),
}

/// An answer as it is sealed.
pub type Answer = AnswerBody;

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct CheckAnswer {
    /// What would be other than here; empty means exactly the same.
    pub differences: Vec<Denial>,
    /// Why not; empty means yes.
    pub blockers: Vec<Denial>,
    /// Positions in the request's lists of what is not held.
    pub components_lacking: Vec<u32>,
    pub packs_lacking: Vec<u32>,
    /// The disks' state the member last held of this VM: what is equal need not travel.
    pub seed: Option<Seed>,
    /// What an earlier try of the asker brought beyond that.
    #[serde(default)]
    pub kept: Option<Kept>,
    /// The VM's disk is composed there already; not said by earlier releases.
    #[serde(default)]
    pub composed: bool,
    /// The member reads `disk_bus`, `system_uuid` and the cards' `model` of a spec; the release before does not, and
    /// would give the guest other devices.
    #[serde(default)]
    pub reads_devices: bool,
}

/// What is left of a move that ended without a hand-over.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Kept {
    /// For so many seconds more.
    pub for_s: u64,
    /// Plain bytes of its last pass that came, beyond those of the passes that were completed.
    pub root_delta_bytes: u64,
    pub user_data_bytes: u64,
}

/// What a member serves of a content request.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ContentAnswer {
    /// Positions in the request's lists.
    pub components_held: Vec<u32>,
    pub packs_held: Vec<u32>,
    /// The capability to fetch exactly these, 64 hex digits; none if nothing is held.
    pub ticket: Option<String>,
    pub expires_in_s: u64,
    /// Where they are served: `host:port`.
    pub addresses: Vec<PeerText>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Seed {
    pub root_delta: MapRef,
    pub user_data: MapRef,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Progress {
    /// `fetch`, `compose` or `start`.
    pub step: PeerText,
    pub bytes_done: u64,
    pub bytes_total: u64,
}

/// What staging cost so far, as the target counted it.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct StageAccount {
    pub components_fetched: u32,
    pub packs_needed: u32,
    pub packs_fetched: u32,
    /// Names of components that travelled, wholly or in part.
    pub fetched: Vec<PeerText>,
    pub component_bytes: u64,
    pub root_delta_bytes: u64,
    pub user_data_bytes: u64,
    /// Manifests, recipe and chunk-map nodes.
    pub map_bytes: u64,
    pub wire_bytes: u64,
    pub fetch_ms: u64,
    pub compose_ms: u64,
}

/// A refusal with its reason. Codes are stable; the text is for people.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Denial {
    pub code: DenialCode,
    pub text: PeerText,
    #[serde(default)]
    pub next_step: PeerText,
    /// When asking again may help, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

impl Denial {
    pub fn new(code: DenialCode, text: impl Into<PeerText>) -> Self {
        Self { code, text: text.into(), next_step: PeerText::default(), retry_after_ms: None }
    }
    pub fn retry_after(mut self, wait: std::time::Duration) -> Self {
        self.retry_after_ms = Some(wait.as_millis() as u64);
        self
    }
    pub fn next(mut self, step: impl Into<PeerText>) -> Self {
        self.next_step = step.into();
        self
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DenialCode {
    /// The member does not accept VMs from this cloud.
    Policy,
    Cpus,
    Memory,
    Storage,
    Architecture,
    CpuModel,
    DiskBus,
    /// The model of a network card.
    CardModel,
    Network,
    NetworkKind,
    Hypervisor,
    Accelerator,
    /// Of other hardware: the machine type.
    Machine,
    Firmware,
    /// A VM of this id or name is already there.
    AlreadyThere,
    /// The member is too busy with other migrations.
    Busy,
    /// The lease ran out, or the member restarted and forgot an unfinished migration.
    UnknownMigration,
    /// A request that does not fit the migration's state.
    OutOfOrder,
    /// The hand-over is malformed, forged, stale or for another VM.
    HandOver,
    /// Content could not be fetched, did not verify or could not be composed.
    Content,
    /// The hypervisor failed.
    Start,
    /// The sender may not ask this.
    NotYours,
    /// The operator of the source took the VM back without the target's word: it has two owners.
    Contested,
    /// This mode of migration is not supported here.
    Unsupported,
    /// The sender asks more often, or more at once, than it may.
    RateLimited,
    /// The message is of a protocol version that is not spoken here.
    Version,
    /// By this cloud's clock the message is too old, or of the future.
    Clock,
    #[serde(other)]
    Other,
}

impl DenialCode {
    /// The code as it travels.
    pub fn as_str(self) -> String {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::String(s)) => s,
            _ => "other".into(),
        }
    }
}

/// Where a VM went or came from.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Party {
    pub jid: MemberJid,
    pub key: PublicKey,
}
