//! Level 3: the broker. One task owns all state; operators, other brokers, the hypervisor and the
//! clock put inputs into its queue, and it answers, steps machines and starts effects. Effects run
//! elsewhere and come back as inputs.

pub mod account;
mod adopting;
pub mod archive;
pub mod aside;
mod borrowing;
mod calls;
mod capacity;
mod changing;
pub mod content;
pub mod continuity;
mod errands;
mod evidence;
mod forecast;
mod guard;
pub mod handle;
pub mod healing;
mod history;
pub mod inbox;
mod incoming;
pub mod interface;
mod lending;
mod lineages;
pub mod negotiation;
mod notes;
pub mod optimize;
mod outgoing;
mod owners;
mod planning;
mod power;
pub mod problem;
pub mod receiving;
pub mod records;
pub mod rehearsal;
mod resolution_words;
pub mod resolving;
pub mod rotation;
mod scanning;
pub mod serving;
pub mod shared;
mod staging;
mod steering;
mod unfinished;
mod vms;
mod waiting;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use crate::clock::UnixMillis;
use crate::federation::Members;
use crate::hypervisor::DriverEvent;
use crate::migration::ReplayGuard;
use crate::migration::envelope::common_version;
use crate::migration::handover::SignedHandOver;
use crate::migration::source::Event as SourceEvent;
use crate::migration::target::Event as TargetEvent;
use crate::types::{MemberJid, MigrationId, PublicKey, Successions, VmId, VmName};

pub use inbox::{Inbox, Inputs, inbox};
pub use interface::{Event, Reply, Request};
pub use problem::{Problem, ProblemKind};
pub use shared::{Link, LinkError, Shared};
pub use vms::READY_LINE;

use capacity::Measured;
use continuity::Continuity;
use forecast::Forecasts;
use guard::Guard;
use history::History;
use incoming::Incoming;
use interface::{Account, MigrationView};
use lending::Lent;
use notes::Notes;
use optimize::Idle;
use outgoing::Outgoing;
use records::{Damaged, RecordError};
use resolving::Resolution;
use shared::Peer;
use vms::Vm;

/// What the owner task reacts to.
pub enum Input {
    /// An operator's request.
    Call {
        request: Request,
        events: mpsc::Sender<Event>,
        reply: oneshot::Sender<Result<Reply, Problem>>,
    },
    /// Another broker's sealed request; `None` in reply refuses it without a word.
    Asked {
        from: MemberJid,
        payload: Vec<u8>,
        reply: oneshot::Sender<Option<Vec<u8>>>,
    },
    /// The room as the XMPP session sees it.
    Room(RoomInput),
    Driver(DriverEvent),
    /// Events of the hypervisor were lost.
    PowerUnknown,
    Outgoing(MigrationId, SourceEvent),
    Incoming(MigrationId, TargetEvent),
    /// The result of an effect, to be taken into the state.
    Apply(Box<dyn FnOnce(&mut Broker) + Send>),
    /// Once a second.
    Tick,
    Shutdown,
}

/// What happens in the room and to the session.
pub enum RoomInput {
    Presence(crate::federation::Presence),
    /// The room's owner removed a member.
    Removed(MemberJid),
    /// What the session refused by itself.
    Refused(crate::federation::refusals::Tally),
    /// The session is up and the room was joined.
    Joined,
    /// The session is down, or the room refused us; why.
    Down(String),
}

impl Input {
    pub fn apply(change: impl FnOnce(&mut Broker) + Send + 'static) -> Self {
        Input::Apply(Box::new(change))
    }
}

pub struct Broker {
    shared: Arc<Shared>,
    members: Members,
    link: String,
    /// When a failed index is opened anew at the earliest.
    index_retry: UnixMillis,
    replay: ReplayGuard,
    vms: BTreeMap<VmId, Vm>,
    /// Names of VMs that are being made.
    names_in_use: BTreeSet<VmName>,
    outgoing: BTreeMap<MigrationId, Outgoing>,
    incoming: BTreeMap<MigrationId, Incoming>,
    /// Ended migrations.
    history: History,
    notes: Notes,
    /// Moves from here that a restart cut short.
    unfinished: Vec<unfinished::Unfinished>,
    /// Disks staged here for migrations that are gone.
    interrupted: BTreeMap<VmId, unfinished::Interrupted>,
    /// VMs whose record cannot be used.
    aside: BTreeMap<VmId, Damaged>,
    /// What operators decided about hand-overs in doubt.
    resolutions: BTreeMap<MigrationId, Resolution>,
    /// What others are still to be told or asked.
    errands: BTreeMap<MigrationId, errands::Errand>,
    /// Hand-overs to us that cannot be answered: the VM's record is damaged.
    unanswered: BTreeMap<MigrationId, (Peer, SignedHandOver)>,
    /// Promises that are being written: of which VM, to whose key.
    promising: HashSet<(VmId, PublicKey)>,
    /// VMs of ours that another member runs as well.
    disputes: BTreeMap<VmId, owners::Dispute>,
    /// Members that were asked since they came online.
    met: BTreeSet<MemberJid>,
    met_at: UnixMillis,
    /// Set until those that may know more than the records here were asked.
    confirming: Option<owners::Confirming>,
    continuity: Continuity,
    /// Changes of records that its mark knows of.
    noted: u64,
    /// Records of before this time came from a backup.
    restored: Option<UnixMillis>,
    after_restore: bool,
    /// What disks take up, as it was measured last.
    measured: std::sync::Mutex<Measured>,
    idle: Idle,
    forecasts: Forecasts,
    lent: Lent,
    /// What others may ask, and what they were refused.
    guard: Guard,
    /// How this cloud's earlier keys gave way to the one it has.
    successions: Successions,
    /// Called with the new state whenever what others see of this cloud may have changed.
    announce: Box<dyn Fn(&Broker) + Send>,
    announce_wanted: bool,
}

impl Broker {
    /// Reads the durable records. `announce` publishes this cloud's presence.
    pub fn open(
        shared: Arc<Shared>,
        members: Members,
        announce: Box<dyn Fn(&Broker) + Send>,
    ) -> Result<Self, RecordError> {
        let (vms, damaged) = shared.records.vms()?;
        for d in &damaged {
            tracing::error!(vm = %d.vm, reason = d.reason, "set aside: it is not run, and its disks are not touched");
        }
        let mut vms = vms;
        for record in &mut vms {
            if let Err(e) = lineages::complete(&shared, record) {
                tracing::error!(vm = %record.spec.name, error = problem::chain(&e), "it cannot move: its history is damaged");
            }
        }
        for record in &vms {
            if let Err(e) = evidence::keep_receipts(&shared.records, record) {
                tracing::warn!(vm = %record.spec.name, error = problem::chain(&e), "a receipt lies in its record alone");
            }
        }
        let resolutions = shared.records.resolutions()?;
        let vms: BTreeMap<_, _> = vms.into_iter().map(|record| (record.spec.id, Vm::new(record))).collect();
        let notes = Notes::new(shared.records.clone());
        let note = |view: &MigrationView| notes.later(view);
        let (history, unfinished) = unfinished::split(shared.records.migrations()?, &vms, shared.now(), note);
        let (history, displaced) = History::of(history);
        displaced.into_iter().for_each(|id| notes.forget(id));
        let idle = Idle::new(shared.now());
        let continuity = Continuity::of(shared.records.dir());
        let restored = shared.records.restored()?;
        Ok(Self {
            shared,
            members,
            link: "connecting".into(),
            index_retry: UnixMillis(0),
            replay: ReplayGuard::default(),
            vms,
            names_in_use: BTreeSet::new(),
            outgoing: BTreeMap::new(),
            incoming: BTreeMap::new(),
            history,
            notes,
            unfinished,
            interrupted: BTreeMap::new(),
            aside: damaged.into_iter().map(|d| (d.vm, d)).collect(),
            resolutions: resolutions.into_iter().map(|r| (r.migration, r)).collect(),
            errands: BTreeMap::new(),
            unanswered: BTreeMap::new(),
            promising: HashSet::new(),
            disputes: BTreeMap::new(),
            met: BTreeSet::new(),
            met_at: UnixMillis(0),
            confirming: None,
            continuity,
            noted: 0,
            restored,
            after_restore: false,
            measured: std::sync::Mutex::default(),
            idle,
            forecasts: Forecasts::default(),
            lent: Lent::default(),
            guard: Guard::default(),
            successions: Successions::default(),
            announce,
            announce_wanted: true,
        })
    }

    /// The records came from a backup, its operator says: everybody is asked before a VM is run, and
    /// hand-overs of before are not returned by themselves.
    pub fn after_restore(mut self) -> Result<Self, RecordError> {
        let now = self.shared.now();
        self.shared.records.save_restored(now)?;
        (self.restored, self.after_restore) = (Some(now), true);
        Ok(self)
    }

    /// The owner task. Ends at [`Input::Shutdown`]; VMs keep running.
    pub async fn run(mut self, mut inputs: Inputs) {
        self.find_leftovers();
        let shared = self.shared.clone();
        rehearsal::end_left_over(&shared).await;
        self.adopt_running().await;
        self.resume_resolutions();
        self.resume_outgoing();
        self.resume_incoming();
        self.apply_autostart();
        self.begin_confirming();
        self.start_in_order(self.vms.keys().copied());
        self.noted = u64::MAX;
        while let Some(input) = inputs.next().await {
            match input {
                Input::Call { request, events, reply } => self.call(request, events, reply),
                Input::Asked { from, payload, reply } => self.asked(from, &payload, reply),
                Input::Room(input) => self.room_input(input),
                Input::Driver(event) => self.power_event(&event),
                Input::PowerUnknown => self.review_power(),
                Input::Outgoing(id, event) => self.outgoing_event(id, event),
                Input::Incoming(id, event) => drop(self.incoming_event(id, event)),
                Input::Apply(change) => change(&mut self),
                Input::Tick => self.tick(),
                Input::Shutdown => break,
            }
            self.note_continuity();
            if std::mem::take(&mut self.announce_wanted) {
                (self.announce)(&self);
            }
        }
        self.idle.stop();
        tracing::info!("the broker stops; VMs keep running");
    }

    fn tick(&mut self) {
        self.end_stalled();
        self.review_confirming();
        self.meet_members();
        self.warn_unconfirmed();
        self.expire_leases();
        self.expire_interrupted();
        self.take_up_unfinished();
        self.run_due_errands();
        self.expire_lent();
        self.gather_refusals();
        self.scrub_released();
        self.optimize_when_idle();
        self.heal_index();
    }

    fn room_input(&mut self, input: RoomInput) {
        let now = self.shared.now();
        match input {
            RoomInput::Presence(presence) => {
                let (jid, was_online) = (presence.jid.clone(), self.members.is_online(&presence.jid));
                if let Some(news) = self.members.presence(presence, now) {
                    self.take_key_news(&jid, &news);
                }
                self.admit_members();
                let spoken = common_version(self.members.versions_of(&jid));
                self.shared.versions.note(&jid, spoken);
                if !was_online && self.members.is_online(&jid) {
                    self.hurry_errands(&jid);
                }
                self.meet(&jid);
            }
            RoomInput::Removed(member) => {
                let key = self.members.get(&member).and_then(|m| m.key);
                self.members.removed(&member, now);
                self.part_with(&member, key);
            }
            RoomInput::Refused(tally) => self.guard.refusals.add(&tally),
            RoomInput::Joined => {
                self.link = interface::ONLINE.into();
                self.announce_wanted = true;
            }
            RoomInput::Down(reason) => {
                self.link = reason;
                self.members.disconnected(now);
            }
        }
    }

    pub(crate) fn presence_changed(&mut self) {
        self.announce_wanted = true;
    }

    /// Where this broker can be dialled for transfers.
    fn transfer_addresses(&self) -> Vec<String> {
        self.shared.config.transfer.addresses(self.shared.endpoint.local_addr().ok())
    }

    /// Takes over VMs that kept running while no broker was there.
    async fn adopt_running(&mut self) {
        let machines: Vec<_> =
            self.vms.values().filter(|vm| vm.record.is_here()).map(|vm| self.machine(&vm.record)).collect();
        for machine in machines {
            if let Err(e) = self.shared.driver.define(&machine).await {
                tracing::error!(vm = %machine.spec.name, error = problem::chain(&e), "cannot be defined");
            }
        }
    }

    /// Keeps an ended migration. What was begun here must not begin again after a restart.
    fn remember(&mut self, view: MigrationView) {
        match view.progress.role.as_str() {
            "source" => self.notes.now(&view),
            _ => self.notes.later(&view),
        }
        let displaced = self.history.remember(view);
        displaced.into_iter().for_each(|id| self.notes.forget(id));
    }

    fn amend_history(&mut self, id: MigrationId, amend: impl FnOnce(&mut Account)) {
        if let Some(run) = self.outgoing.get_mut(&id) {
            amend(&mut run.view.account);
        } else if let Some(mut view) = self.history.get(&id).cloned() {
            amend(&mut view.account);
            // Others may say the same again and again.
            if self.history.get(&id).is_some_and(|known| known.account != view.account) {
                self.notes.later(&view);
                self.history.remember(view);
            }
        }
    }
}
