//! What can be asked of a broker, and what it answers: the vocabulary that the API, the client
//! and the CLI share. Every request is one JSON value; long work reports [`Event`]s before its
//! [`Reply`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::component::Kind;
use crate::federation::{MemberPolicy, Used};
use crate::migration::Evidence;
use crate::migration::records::{Autostart, Shape};
use crate::types::{
    ByteSize, CloudName, ComponentId, ImageDigest, MemberJid, MigrationId, PeerText, PublicKey, RecipeId,
    Succession, VmId, VmName,
};
use crate::vm::spec::Nic;
use crate::vm::{Firmware, Mac, PowerState, VmSpec};

use super::problem::Problem;

/// A request. `vm` is a name or a UUID; `component` a name, `name@version` or id prefix;
/// `member` and `to` a cloud name or a bare JID.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    Status,
    Members,
    IdentityTrust {
        member: MemberJid,
        key: PublicKey,
    },
    IdentityRevoke {
        member: MemberJid,
    },
    ComponentList,
    ComponentShow {
        component: String,
        entries: bool,
    },
    ComponentDiff {
        from: String,
        to: String,
    },
    ComponentRemove {
        component: String,
    },
    /// Compresses what components consist of strongly, all named ones if none are given, and makes
    /// deltas between the versions that are here.
    ComponentOptimize {
        components: Vec<String>,
        deltas: bool,
    },
    /// Makes a component whose manifest and packs were put into the repository known by its name.
    ComponentBind {
        id: ComponentId,
    },
    /// As an operator binds what came by a move or an archive: `component` is the beginning of an id.
    /// A name that is given must be the component's own, and free.
    ComponentName {
        component: String,
        name: Option<String>,
    },
    RecipeCreate {
        components: Vec<String>,
        ordered: bool,
        root_size: ByteSize,
        kernel_command_line: String,
    },
    RecipeList,
    /// Writes the composed disk to `output`, a path on the broker's machine.
    Compose {
        recipe: String,
        output: String,
        format: String,
    },
    RepoStats,
    RepoCheck,
    /// Checks, and fetches what is damaged or missing from members that hold it.
    RepoHeal,
    RepoGc {
        dry_run: bool,
    },
    RepoRebuildIndex,
    /// Writes what components and recipes reach, or all that has a name, to `output`, a path on the
    /// broker's machine. Stops when the asker is gone.
    RepoExport {
        output: String,
        components: Vec<String>,
        recipes: Vec<String>,
    },
    /// Takes what the archive at `input`, a path on the broker's machine, holds; its names only
    /// with `bind`. Stops when the asker is gone; what was stored stays.
    RepoImport {
        input: String,
        bind: bool,
    },
    VmCreate(VmCreate),
    /// Makes a VM of an existing disk. Ends without trace when its caller goes away.
    VmAdopt(VmAdopt),
    /// Writes the whole disk of a stopped VM to `output`, a path on the broker's machine where nothing is yet.
    VmExport {
        vm: String,
        output: String,
        format: String,
        user_data: bool,
    },
    VmList,
    VmShow {
        vm: String,
    },
    VmStart {
        vm: String,
        /// Start it although members that may know more of its owner did not say.
        #[serde(default)]
        unconfirmed: bool,
        /// Filled in by the API.
        #[serde(default)]
        by_uid: Option<u32>,
    },
    VmStop {
        vm: String,
        /// Switched off without asking the guest; for the host's sake, once `timeout_s` is over.
        force: bool,
        /// What its guest gets to shut down; its own setting, or the cloud's, if not given.
        #[serde(default)]
        timeout_s: Option<u64>,
        /// The host goes down: the VM is started again with the broker.
        #[serde(default)]
        for_host: bool,
    },
    /// Stops it as [`Request::VmStop`] does, and starts it again.
    VmReboot {
        vm: String,
        force: bool,
        #[serde(default)]
        timeout_s: Option<u64>,
    },
    VmSet(VmSet),
    /// Makes disks of a stopped VM larger.
    VmResize {
        vm: String,
        #[serde(default)]
        root_size: Option<ByteSize>,
        #[serde(default)]
        user_data_size: Option<ByteSize>,
    },
    /// Scrubs a stopped VM, or the copy that one left here which was handed over.
    VmDelete {
        vm: String,
        /// What the asker takes it for; refused if it is the other.
        #[serde(default)]
        taken_for: Option<Deleted>,
    },
    Plan {
        vm: String,
        to: Option<String>,
    },
    Move {
        vm: String,
        to: Option<String>,
        dry_run: bool,
        /// A guest that does not end in time is switched off.
        #[serde(default)]
        force_stop: bool,
    },
    MigrationList,
    MigrationShow {
        id: String,
    },
    /// Reports events of a migration until it ends.
    MigrationWatch {
        id: String,
    },
    MigrationCancel {
        id: String,
    },
    /// The doubly signed record of a migration, remembered or long ago.
    MigrationReceipt {
        id: String,
    },
    /// Decides a hand-over in doubt. Until `confirmed` it only says what that means.
    MigrationResolve {
        id: String,
        owner: Side,
        confirmed: bool,
        /// Who asks, as the API's socket knows it.
        #[serde(skip)]
        by_uid: Option<u32>,
    },
    /// Caps what a migration sends from here, from now on; `None` lifts the cap.
    MigrationLimit {
        id: String,
        bytes_per_s: Option<u64>,
    },
    /// No more passes while the VM runs: switch over. At the target its source is asked.
    MigrationSwitchOver {
        id: String,
    },
    /// Holds the guest still until it is switched over. At the target its source is asked.
    MigrationHold {
        id: String,
    },
    /// Stops the broker; VMs keep running.
    Shutdown,
}

impl Request {
    /// Notes who asks, where that is kept.
    pub fn asked_by(&mut self, uid: Option<u32>) {
        if let Request::MigrationResolve { by_uid, .. } | Request::VmStart { by_uid, .. } = self {
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

/// A new VM. With a user-data size of zero it has no second disk.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmCreate {
    pub name: VmName,
    pub components: Vec<String>,
    pub ordered: bool,
    pub root_size: ByteSize,
    pub user_data_size: ByteSize,
    pub memory: ByteSize,
    pub cpus: u32,
    pub networks: Vec<String>,
    pub kernel_command_line: String,
    pub start: bool,
}

/// What shall be another of a VM; what is not given stays.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSet {
    pub vm: String,
    #[serde(default)]
    pub name: Option<VmName>,
    /// CPUs and memory of a VM that runs are another from its next start on.
    #[serde(default)]
    pub cpus: Option<u32>,
    #[serde(default)]
    pub memory: Option<ByteSize>,
    /// One line; empty for none.
    #[serde(default)]
    pub description: Option<String>,
    #[serde(default)]
    pub autostart: Option<Autostart>,
    /// Zero for the cloud's own.
    #[serde(default)]
    pub stop_timeout_s: Option<u32>,
}

/// A VM to be made of disks on the broker's machine.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmAdopt {
    pub name: VmName,
    /// Absolute paths.
    pub disk: String,
    pub user_data: Option<String>,
    /// Of both disks: `auto`, or a format that `compose` writes.
    pub format: String,
    /// Debian architecture name.
    pub architecture: String,
    pub firmware: Firmware,
    pub memory: ByteSize,
    pub cpus: u32,
    pub networks: Vec<String>,
    /// What is not known becomes part of a component that others can use, instead of the root delta.
    pub share: bool,
    /// Only tell what would be known.
    pub dry_run: bool,
    pub start: bool,
    #[serde(default)]
    pub hardware: AdoptHardware,
}

/// What the guest knew of its old machine, as far as an operator gives it: no disk has it.
#[derive(Clone, PartialEq, Default, Debug, Serialize, Deserialize)]
pub struct AdoptHardware {
    /// Of the networks, in their order.
    pub macs: Vec<Mac>,
    pub cpu_model: Option<String>,
    /// Absolute path of a file with the variables of the UEFI firmware.
    pub nvram: Option<String>,
}

/// The answer to a request.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "reply", content = "value", rename_all = "kebab-case")]
pub enum Reply {
    Done,
    Status(StatusView),
    Members(Vec<MemberView>),
    Components(Vec<ComponentView>),
    Component(Box<ComponentDetail>),
    ComponentDiff(ComponentDiff),
    Recipe(RecipeView),
    Recipes(Vec<RecipeView>),
    Composed(ComposedView),
    /// Repository reports are tables of name and value, in a fixed order.
    Report(Vec<ReportLine>),
    Vm(Box<VmView>),
    Adopted(Box<AdoptedView>),
    Exported(ExportedView),
    Vms(Vec<VmView>),
    Deleted(DeletedView),
    Plan(PlanView),
    Migration(Box<MigrationView>),
    Migrations(Vec<MigrationView>),
    Receipt(Box<Evidence>),
    Resolution(Box<ResolutionView>),
}

/// One line of progress of a long request.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A step of plain text.
    Note {
        text: String,
    },
    /// Work with a known size; `done` never falls while `phase` stays the same.
    Progress {
        phase: String,
        done: u64,
        total: u64,
        unit: String,
    },
    Migration(MigrationProgress),
    /// Something of an imported tree that did not enter the component.
    LeftOut {
        path: String,
        what: String,
    },
}

/// What travels over the API's stream: events, then exactly one end.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Message {
    Event(Event),
    Reply(Box<Reply>),
    Problem(Problem),
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ReportLine {
    pub name: String,
    pub value: u64,
    /// `bytes`, `objects`, `percent` or empty for a plain count.
    pub unit: String,
    /// More words, or the object it is about; may be empty.
    pub detail: String,
}

/// What [`StatusView::link`] says of a broker that is in the room.
pub const ONLINE: &str = "online";

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct StatusView {
    pub cloud: CloudName,
    pub version: String,
    pub jid: MemberJid,
    pub key: PublicKey,
    pub fingerprint: String,
    pub room: String,
    /// `online`, or why not.
    pub link: String,
    pub driver: String,
    pub accelerator: Box<str>,
    /// Whether each VM runs as a user of its own, not as the broker's.
    #[serde(default)]
    pub own_users: bool,
    pub cpus: Resource,
    pub memory_bytes: Resource,
    /// Of the file system that VMs' disks lie on.
    pub storage_bytes: Resource,
    /// What may be promised to VMs of it, and what of that a VM that comes now could have.
    #[serde(default)]
    pub storage_promised_bytes: Box<Resource>,
    pub transfer_addresses: Vec<String>,
    pub vms_running: u32,
    pub migrations_running: u32,
    pub resident_bytes: u64,
    /// What others were refused since this broker started.
    #[serde(default)]
    pub refusals: Box<RefusalsView>,
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
    pub until: UnixMillis,
}

impl Predecessor {
    pub fn of(s: &Succession) -> Self {
        Self { key: s.old, fingerprint: s.old.fingerprint(), until: s.issued }
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MemberView {
    pub jid: MemberJid,
    pub cloud: Option<CloudName>,
    /// `online`, `gone`, or `removed` by the room's owner.
    pub state: String,
    pub since: UnixMillis,
    pub last_seen: UnixMillis,
    /// `trusted`, `unknown`, `changed`, `superseded`, `forked`, `revoked` or `no key`.
    pub trust: String,
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

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ComponentView {
    pub id: ComponentId,
    /// Whether its name means it. What came by a move is held, but bound to no name.
    #[serde(default)]
    pub bound: bool,
    pub name: String,
    pub version: String,
    pub kind: Kind,
    pub architecture: String,
    pub packs: u32,
    pub plain_bytes: u64,
    pub stored_bytes: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ComponentDetail {
    pub component: ComponentView,
    pub origin: String,
    pub licences: Vec<String>,
    pub requires: Vec<ComponentId>,
    pub conflicts: Vec<String>,
    pub entry_count: u64,
    pub fragments: Vec<String>,
    pub packs: Vec<PackView>,
    /// Paths, when asked for.
    pub entries: Vec<String>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PackView {
    pub id: String,
    pub package: String,
    pub package_version: String,
    pub plain_bytes: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ComponentDiff {
    /// Paths only the second has, only the first has, and both have with another content or metadata.
    pub added: Vec<String>,
    pub removed: Vec<String>,
    pub changed: Vec<String>,
    /// Plain bytes of packs the second has and the first lacks.
    pub bytes_missing: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RecipeView {
    pub id: RecipeId,
    pub components: Vec<String>,
    pub root_size: ByteSize,
    pub kernel_command_line: String,
    pub image_digest: ImageDigest,
    pub composed: bool,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ComposedView {
    pub recipe: RecipeId,
    pub image_digest: ImageDigest,
    pub output: String,
    pub bytes: u64,
    pub elapsed_ms: u64,
}

/// What of an existing disk was known.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct AdoptedView {
    pub name: VmName,
    pub format: String,
    /// Size of the disk as it was given, and as it is a VM's: a multiple of 1 MiB.
    pub disk_bytes: u64,
    pub size_bytes: u64,
    /// The image digest of the disk.
    pub digest: ImageDigest,
    /// Bytes found in packs, bytes that are nowhere, and zeros; in blocks of 4 KiB.
    pub known_bytes: u64,
    pub residue_bytes: u64,
    pub zero_bytes: u64,
    pub extents: u64,
    pub packs: u64,
    /// Packs held that were too many to be looked into.
    pub packs_left_out: u64,
    pub known_from: Vec<KnownFromView>,
    pub elapsed_ms: u64,
    /// What the disk is and how it boots, in words.
    #[serde(default)]
    pub what: String,
    #[serde(default)]
    pub boots: String,
    /// Where that differs from what was asked for, and what stays behind.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Component of the base and the VM; not there after a dry run.
    pub component: Option<String>,
    pub vm: Option<Box<VmView>>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct KnownFromView {
    /// `name@version`.
    pub component: String,
    pub packs: u64,
    pub bytes: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ExportedView {
    pub output: String,
    pub format: String,
    /// Size of the disk.
    pub size_bytes: u64,
    pub elapsed_ms: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct VmView {
    pub id: VmId,
    pub name: VmName,
    pub power: PowerState,
    /// `here`, `given-up` (now in another cloud, copy kept for the grace period), `in-doubt`,
    /// `contested` (here, and in another cloud too; see `problem`), or `damaged` (its record cannot be used, only its id is known).
    pub ownership: String,
    /// Where it went, when it was given up.
    pub owner: Option<MemberJid>,
    pub epoch: u64,
    /// When its record was made in this cloud.
    #[serde(default)]
    pub created: UnixMillis,
    pub cpus: u32,
    pub memory: ByteSize,
    pub root_size: ByteSize,
    pub user_data_size: ByteSize,
    pub nics: Vec<Nic>,
    pub recipe: RecipeId,
    pub components: Vec<String>,
    /// Bytes of the root delta and user data that are really allocated on disk.
    pub root_delta_bytes: u64,
    pub user_data_bytes: u64,
    pub console_socket: String,
    pub console_log: String,
    /// The migration that holds it now.
    pub migration: Option<MigrationId>,
    /// What an operator must know before touching it: in doubt, contested, damaged.
    #[serde(default)]
    pub problem: Option<Problem>,
    #[serde(default)]
    pub description: String,
    #[serde(default)]
    pub autostart: Autostart,
    /// Its own; the cloud's `migration.stop_timeout_s` holds without one.
    #[serde(default)]
    pub stop_timeout_s: Option<u32>,
    /// The CPUs and memory it runs with, where others hold from its next start on.
    #[serde(default)]
    pub runs_as: Option<Shape>,
    pub spec: VmSpec,
}

/// What `vm delete` destroys.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Deleted {
    /// The VM itself: its disks are here and nowhere else.
    Vm,
    /// The copy that it left here when it was handed over.
    KeptCopy,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DeletedView {
    pub id: VmId,
    pub name: VmName,
    pub what: Deleted,
    /// Who has the VM, if only a copy was here.
    pub owner: Option<MemberJid>,
    /// Bytes that were allocated.
    pub root_delta_bytes: u64,
    pub user_data_bytes: u64,
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
    pub jid: MemberJid,
    pub verdict: Verdict,
    /// Bytes of components that will travel: stored form of packs and manifests, or the deltas that
    /// are ready. Exact unless `deltas_unknown`.
    pub component_bytes_missing: u64,
    /// Deltas from what the member holds are still to be made: less will travel.
    #[serde(default)]
    pub deltas_unknown: bool,
    pub components_needed: u32,
    pub components_held: u32,
    pub packs_missing: u32,
    /// Plain bytes of root delta and user-data blocks it lacks, an upper bound of what they take on the wire.
    pub root_delta_bytes_missing: u64,
    pub user_data_bytes_missing: u64,
    /// Predicted duration, seconds, by earlier moves to that member; `None` before the first.
    pub seconds_low: Option<f64>,
    pub seconds_high: Option<f64>,
    pub answer_ms: f64,
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
    /// `source` or `target`: this broker's part in it.
    pub role: String,
    pub peer: MemberJid,
    pub peer_cloud: Option<CloudName>,
    /// `negotiate`, `stage`, `compose`, `switch-over`, `start`, `release`, `completed`, `cancelled`, `failed`, `in-doubt`,
    /// `waiting` (cut by a restart, begins again).
    pub phase: String,
    /// Words for a person about what is happening or awaited now.
    pub detail: String,
    /// Payload bytes delivered and expected so far; `total` may grow when a pass finds more.
    pub bytes_done: u64,
    pub bytes_total: u64,
    pub rate_bytes_per_s: u64,
    pub eta_s: Option<u64>,
    /// Phase-weighted, 0 to 1, never falls.
    pub fraction: f64,
    pub started: UnixMillis,
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
