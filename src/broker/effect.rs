//! What the core is told and what it wants done: plain data, so that it can be printed, compared and
//! replayed. Nothing here waits, and nothing here runs.
//!
//! An effect that has an outcome carries a [`Token`]; the outcome comes back as [`Input::Done`] with the same
//! token, exactly once. What it belongs to is kept in the core, beside the token.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::component::Recipe;
use crate::federation::refusals::Tally;
use crate::federation::{Presence, Refused};
use crate::interface::{AdoptedView, Candidate, Event, ExportedView, MigrationProgress, Problem, Reply};
use crate::interface::{ContentRequest, Request, VmAdopt, VmCreate};
use crate::migration::lineage::LineageError;
use crate::migration::message::{Claim, Initialization, Kept, Known, Progress, Seed, StageAccount};
use crate::migration::records::VmRecord;
use crate::migration::{AnswerBody, Denial, Lineage, Link, RequestBody};
use crate::stanza::Cloud;
use crate::types::{
    ByteSize, CloudName, ComponentId, Hash, MemberJid, MigrationId, PackId, PublicKey, RecipeId, Successions,
    VmId,
};
use crate::vm::hypervisor::{DriverEvent, StopMode};
use crate::vm::{PowerState, VmSpec};

use super::book::ReturnRecord;

/// An operator's request under way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct CallId(pub u64);

/// Another broker's request under way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct AskId(pub u64);

/// What ties the outcome of an effect to what wanted it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Token(pub u64);

/// Another broker, with the key it is trusted by.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Peer {
    pub jid: MemberJid,
    pub key: PublicKey,
}

/// What a negotiation message is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Matter {
    pub migration: MigrationId,
    pub vm: VmId,
    pub epoch: u64,
}

/// What the core reacts to.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Input {
    /// An operator's request.
    Call(CallId, Request),
    /// Another broker's sealed request.
    Asked(AskId, MemberJid, #[serde(with = "base64_text")] Vec<u8>),
    /// The room as the XMPP session sees it.
    Room(RoomInput),
    /// What happened to a VM, and the state it is in since.
    Machine(DriverEvent, PowerState),
    /// The state a VM is in, seen after something was done to it.
    Power(VmId, PowerState),
    /// Events of the hypervisor were lost: all VMs it knows, as they are now.
    Machines(Vec<(VmId, PowerState)>),
    /// A target's copy comes along.
    Staging(MigrationId, Box<StageReport>),
    /// A member shows a VM's history, verified.
    Shown(Peer, VmId, Box<Lineage>),
    /// A message that a member signed, and when it says it did.
    Signed {
        by: MemberJid,
        issued: UnixMillis,
        fresh: bool,
    },
    /// What disks take up, as it was just measured.
    Measured(Box<Measured>),
    /// Bytes that went to the targets of moves from here so far.
    Sent(Vec<(MigrationId, u64)>),
    /// Nobody waits for the end of this call any more.
    CallerGone(CallId),
    /// What the data link refused, under the keys of members where it knows them.
    LinkRefused(Vec<(Option<PublicKey>, Tally)>),
    /// Requests that were refused before they came this far, because more came than are worked off.
    Overrun(Vec<Tally>),
    /// What a conversation with a member met that no honest one does.
    Refused(MemberJid, Refused, String),
    Done(Token, Done),
    /// Once a second.
    Tick,
    Shutdown,
}

/// What happens in the room and to the session.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RoomInput {
    Presence(Presence),
    /// The room's owner removed a member.
    Removed(MemberJid),
    /// What the session refused by itself.
    Refused(Tally),
    /// The session is up and the room was joined.
    Joined,
    /// The session is down, or the room refused us; why.
    Down(String),
}

/// What comes of effects.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Done {
    /// A wait is over.
    Due,
    Answered(Result<AnswerBody, Unanswered>),
    Checked(Result<Box<(Checked, Recipe)>, Denial>),
    /// The rows of a plan.
    Planned(Result<Vec<Candidate>, Problem>),
    /// All that a member knows of our VMs was shown.
    OwnersSaid(Result<(), Unanswered>),
    OwnersKnown {
        known: Vec<Known>,
        disputed: BTreeSet<VmId>,
    },
    Verified(Result<Box<Lineage>, LineageError>),
    Holdings(Holdings),
    /// Positions of components and packs that may be fetched, if any.
    Lent(Result<(Vec<u32>, Vec<u32>), Denial>),
    PromiseKept(Result<(), String>),
    Started(Result<(), Problem>),
    Stopped {
        result: Result<(), Problem>,
        took: Duration,
        was_off: bool,
    },
    Paused(Result<(), String>),
    Scanned(Result<Scanned, Denial>),
    Staged(Result<StageAccount, Denial>),
    /// Milliseconds from the start until the guest's ready line, if it was seen.
    Booted(Option<u64>),
    /// Bytes compressed and raw, if that could be worked out.
    Monolithic(Option<(u64, u64)>),
    Made(Result<Box<VmRecord>, Problem>),
    Adopted(Result<Box<(AdoptedView, Option<VmRecord>)>, Problem>),
    Exported(Result<ExportedView, Problem>),
    Grown(Result<(), Problem>),
    Removed(Result<(), Problem>),
    Components(BTreeSet<ComponentId>),
}

/// There is no answer to a request; why, in words.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Unanswered(pub String);

/// What a member answered to a check, with what follows from it.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Checked {
    pub differences: Vec<Denial>,
    pub components_needed: u32,
    pub components_held: u32,
    pub packs_needed: u32,
    pub packs_missing: u32,
    /// Exact stored bytes of the packs and manifests the member lacks.
    pub component_bytes: u64,
    /// What of them need not travel, because deltas from what the member holds are ready.
    pub delta_saves_bytes: u64,
    /// Deltas will be made that nobody knows the size of yet: less will travel.
    pub deltas_unknown: bool,
    pub seed: Option<Seed>,
    /// What an earlier try brought beyond the seed.
    pub kept: Option<Kept>,
    /// Plain bytes of components that are to be composed; none if that was done.
    pub base_bytes: u64,
    pub answer_ms: f64,
}

/// What this cloud has of what a VM needs.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Holdings {
    /// Whether its disk is composed already.
    pub composed: bool,
    /// Why the hypervisor would not start it.
    pub refusal: Option<Denial>,
    /// Positions in what was asked about.
    pub components_lacking: Vec<u32>,
    pub packs_lacking: Vec<u32>,
}

/// What a scan of a VM's disks found.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Scanned {
    pub seed: Seed,
    /// Plain bytes of both disks that a target with that seed lacks; worked out in the first pass.
    pub missing_bytes: u64,
    /// Bytes of the disks that were read.
    pub read_bytes: u64,
    /// The firmware's variables, packed, base64; none if it has none, or they are too large to travel.
    pub firmware: Option<String>,
}

/// The disk as it was found a moment ago.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    pub at: Option<UnixMillis>,
    pub total_bytes: u64,
    pub free_bytes: u64,
    /// What the disks of each VM take up.
    pub disks: BTreeMap<VmId, Allocated>,
    /// Recipes of arriving VMs that are composed already.
    pub composed: BTreeSet<RecipeId>,
    /// Memory of this process.
    pub resident_bytes: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Allocated {
    pub root_bytes: u64,
    pub user_data_bytes: u64,
}

/// A move as the host knows it: where its content goes, and under which ticket.
#[derive(Clone, PartialEq, Debug)]
pub struct Serving {
    pub migration: MigrationId,
    pub to: PublicKey,
    pub ticket: Hash,
    pub recipe: RecipeId,
    pub components: Vec<ComponentId>,
    /// The disks' state the target says it has.
    pub seed: Option<Seed>,
}

/// One pass of bringing a VM's copy here to a state.
#[derive(Clone, PartialEq, Debug)]
pub struct StageOrder {
    pub migration: MigrationId,
    pub from: Peer,
    pub spec: VmSpec,
    pub init: Initialization,
    /// The directory of disks, below the VM's.
    pub disks: String,
    /// What an earlier migration of the VM staged.
    pub goes_on_with: Option<String>,
    /// A copy that was kept here.
    pub seeds: Option<DisksOf>,
    /// Other trusted members that are online: they may lend components.
    pub lenders: Vec<Peer>,
    /// VMs that came from the same member.
    pub neighbours: Vec<DisksOf>,
    /// What earlier passes counted.
    pub account: StageAccount,
}

/// How far a pass has come.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct StageReport {
    pub progress: Progress,
    /// Of all passes, as far as it is known while one is under way.
    pub account: StageAccount,
    /// Plain bytes that this pass brought.
    pub root_delta_bytes: u64,
    pub user_data_bytes: u64,
}

/// Where the disks of a VM lie.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DisksOf {
    pub vm: VmId,
    pub disks: String,
    pub recipe: RecipeId,
}

impl DisksOf {
    pub fn record(record: &VmRecord) -> Self {
        Self { vm: record.spec.id, disks: record.disks.clone(), recipe: record.spec.recipe }
    }
}

/// What the core wants done.
#[derive(Clone, PartialEq, Debug)]
pub enum Effect {
    // --- answers ---
    Reply(CallId, Box<Result<Reply, Problem>>),
    /// One line of progress; a reader that is slow misses it.
    Tell(CallId, Event),
    /// A sealed answer; `None` refuses without a word.
    Answer(AskId, Option<Vec<u8>>),

    // --- other brokers ---
    Ask {
        token: Token,
        to: Peer,
        about: Matter,
        body: Box<RequestBody>,
    },
    /// Asks a member whether it could take a VM and what of it it holds.
    Check {
        token: Token,
        to: Peer,
        about: Matter,
        spec: Box<VmSpec>,
    },
    /// Reserves room at a target and shows it the VM's history.
    Reserve {
        token: Token,
        to: Peer,
        about: Matter,
        spec: Box<VmSpec>,
        lineage: Box<Lineage>,
    },
    /// Asks all of these about a VM at once.
    Plan {
        token: Token,
        record: Box<VmRecord>,
        peers: Vec<(Peer, Option<CloudName>)>,
    },
    /// Asks a member what it knows of these VMs beyond what is claimed.
    AskOwners {
        token: Token,
        of: Peer,
        claims: Vec<Claim>,
    },
    /// Looks up what is known beyond another's claims; with each our record, and whether it runs.
    KnowOwners {
        token: Token,
        by: Peer,
        claims: Vec<(Claim, Option<Box<VmRecord>>, bool)>,
    },
    Verify {
        token: Token,
        known: Box<Lineage>,
        successions: Successions,
        pages: Vec<Link>,
    },
    /// What negotiation version is spoken with a member; `None` if its presence does not say.
    Speaks(MemberJid, Option<u32>),
    Announce(Box<Cloud>),

    // --- the data link ---
    /// The keys of trusted members in the room: nobody else may connect.
    Admit {
        keys: Vec<PublicKey>,
        caps: Vec<(PublicKey, u64)>,
    },
    /// One more such key, with what is served to it at most.
    AdmitAlso(PublicKey, Option<u64>),
    /// Ends what is served to this key, and its connections.
    Part(PublicKey),
    Withdraw(Hash),
    /// Serves what of this has a name here, under the ticket, if anything has.
    Lend {
        token: Token,
        to: Peer,
        ticket: Option<Hash>,
        components: Vec<ComponentId>,
        packs: Vec<PackId>,
    },
    /// Caps what a move sends.
    Cap(MigrationId, Option<u64>),
    /// Nothing of this move is served any more.
    EndServing(MigrationId),

    // --- time ---
    Wake {
        token: Token,
        at: UnixMillis,
    },

    // --- records ---
    /// Records a promise away from the core: many may wait for the disk.
    KeepPromise {
        token: Token,
        promise: Box<ReturnRecord>,
        to: PublicKey,
    },
    /// Marks who owns each VM, as evidence for the next start.
    Mark(Vec<(VmId, Hash)>),

    // --- VMs ---
    Define(Box<VmRecord>),
    /// Composes what is missing, then starts it.
    Start {
        token: Token,
        record: Box<VmRecord>,
    },
    Stop {
        token: Token,
        vm: VmId,
        name: String,
        mode: StopMode,
    },
    Pause {
        token: Token,
        vm: VmId,
    },
    Resume(VmId),
    Undefine(VmId),
    EndTracking(VmId),
    /// Hashes the disks, or what changed since the last scan of the same move, and serves them.
    Scan {
        token: Token,
        record: Box<VmRecord>,
        serving: Box<Serving>,
        pass: u32,
        last: bool,
    },
    /// What copying the whole disks of a move would have sent.
    EstimateMonolithic {
        token: Token,
        migration: MigrationId,
        recipe: RecipeId,
    },
    Stage {
        token: Token,
        order: Box<StageOrder>,
    },
    /// The pass under way ends, and the disks between passes are let go.
    EndStaging(MigrationId),
    /// The disks between passes are let go: they are a VM's now.
    KeepStaged(MigrationId),
    /// Removes what was staged once nobody works there, and the VM's directory if nothing else is in it.
    RemoveStaged {
        vm: VmId,
        disks: String,
        no_record: bool,
    },
    WatchBoot {
        token: Token,
        vm: VmId,
    },
    Make {
        token: Token,
        id: VmId,
        create: Box<VmCreate>,
    },
    Adopt {
        token: Token,
        call: CallId,
        id: VmId,
        adopt: Box<VmAdopt>,
    },
    Export(Box<Export>),
    Grow {
        token: Token,
        record: Box<VmRecord>,
        root: Option<ByteSize>,
        user_data: Option<ByteSize>,
    },
    /// Ends its hypervisor, scrubs all its disks, removes its record.
    Remove {
        token: Token,
        record: Box<VmRecord>,
    },
    /// Scrubs directories of disks below a VM's.
    Scrub {
        vm: VmId,
        disks: Vec<String>,
    },

    // --- content ---
    /// Answers a request about content; what these recipes name stays.
    Content {
        call: CallId,
        request: Box<ContentRequest>,
        recipes: Vec<RecipeId>,
    },
    Heal {
        call: CallId,
        peers: Vec<Peer>,
    },
    /// Answers with the doubly signed record of a migration whose id begins so.
    Receipt(Box<ReceiptWanted>),
    /// What is held here of what a VM needs.
    LookUp {
        token: Token,
        spec: Box<VmSpec>,
        components: Vec<ComponentId>,
        packs: Vec<PackId>,
    },
    ListComponents(Token),
    /// Compresses these while nothing moves.
    Optimize(Vec<ComponentId>),
    StopOptimizing,

    /// Whether a record was made durable is unknown: nothing may be done any more.
    End(String),
    /// The broker stops; VMs keep running.
    Shutdown,
}

/// A disk of a stopped VM to be written out.
#[derive(Clone, PartialEq, Debug)]
pub struct Export {
    pub token: Token,
    pub call: CallId,
    pub record: VmRecord,
    pub user_data: bool,
    pub output: String,
    pub format: String,
}

/// What is known of a migration whose signed record is asked for.
#[derive(Clone, PartialEq, Debug)]
pub struct ReceiptWanted {
    pub call: CallId,
    pub text: String,
    pub known: Result<MigrationProgress, Problem>,
    pub remarks: Vec<(MigrationId, String)>,
}

/// Sealed bytes as base64 in what is kept of inputs.
mod base64_text {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD as BASE64;
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub fn serialize<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&BASE64.encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        BASE64.decode(String::deserialize(d)?).map_err(de::Error::custom)
    }
}
