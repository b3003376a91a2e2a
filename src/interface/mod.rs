//! What can be asked of a broker, and what it answers: the vocabulary that the API, the client
//! and the CLI share. Every request is one JSON value; long work reports [`Event`]s before its
//! [`Reply`].

use serde::{Deserialize, Serialize};

use crate::migration::Evidence;
use crate::types::{ByteSize, ComponentId, MemberJid, PublicKey};

mod cloud;
mod content;
mod kinds;
mod moves;
pub mod problem;
mod vms;

pub use cloud::*;
pub use content::*;
pub use kinds::*;
pub use moves::*;
pub use problem::{Problem, ProblemKind, chain};
pub use vms::*;

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
        /// Ask every member that may be able to take it, and not a few of many.
        #[serde(default)]
        all: bool,
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

/// What is done with a file that a request names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileUse {
    Read,
    Write,
}

impl Request {
    /// The files it names, in the order in which whoever asks may hand them over with it, opened.
    pub fn files(&self) -> Vec<(&str, FileUse)> {
        match self {
            Request::Compose { output, .. }
            | Request::VmExport { output, .. }
            | Request::RepoExport { output, .. } => vec![(output, FileUse::Write)],
            Request::RepoImport { input, .. } => vec![(input, FileUse::Read)],
            Request::VmAdopt(adopt) => {
                let more = [&adopt.user_data, &adopt.nvram].into_iter().flatten();
                std::iter::once(&adopt.disk).chain(more).map(|path| (path.as_str(), FileUse::Read)).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Notes who asks, where that is kept.
    pub fn asked_by(&mut self, uid: Option<u32>) {
        if let Request::MigrationResolve { by_uid, .. } | Request::VmStart { by_uid, .. } = self {
            *by_uid = uid;
        }
    }
}

/// The answer to a request.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "reply", content = "value", rename_all = "kebab-case")]
pub enum Reply {
    Done,
    Status(Box<StatusView>),
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

/// Objects an operator can put into a repository.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ObjectKind {
    Manifest,
    Pack,
    Recipe,
}

impl ObjectKind {
    pub const fn as_str(self) -> &'static str {
        match self {
            ObjectKind::Manifest => "manifest",
            ObjectKind::Pack => "pack",
            ObjectKind::Recipe => "recipe",
        }
    }
}
