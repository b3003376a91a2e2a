//! Level 2: the broker's core. It decides and does nothing else: [`Broker::step`] takes what happened and the
//! time at which it did, and says what is to be done. What does it is `runner/`; in a simulation, models.

pub mod account;
mod adopting;
pub mod aside;
pub mod book;
mod calls;
mod capacity;
mod changing;
pub mod continuity;
pub mod effect;
mod errands;
mod forecast;
mod guard;
mod history;
mod hold;
mod idle;
pub mod ids;
mod incoming;
mod lending;
mod lineages;
mod making;
pub mod memory_book;
mod outgoing;
pub mod owners;
mod pending;
pub mod planning;
mod power;
mod presence;
mod recorded;
mod resolution_words;
pub mod resolving;
pub mod rotation;
mod steering;
pub mod talks;
mod unfinished;
mod vms;
mod waiting;

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;

use crate::clock::UnixMillis;
use crate::config::Config;
use crate::federation::Members;
use crate::interface::{Account, MigrationRole, MigrationView, Problem, Reply};
use crate::migration::envelope::common_version;
use crate::migration::handover::SignedHandOver;
use crate::migration::move_record::MoveRecord;
use crate::migration::records::VmRecord;
use crate::migration::{Law, ReplayGuard};
use crate::types::{MemberJid, MigrationId, PublicKey, Signer, Successions, VmId, VmName};
use crate::vm::PowerState;
use crate::vm::hypervisor::Features;

pub use effect::{AskId, CallId, Done, Effect, Input, Matter, Measured, Peer, RoomInput, Token, Unanswered};
pub use vms::{CONSOLE_FILE, CONSOLE_LOG_FILE, READY_LINE, RUN_DIR};

use book::{Book, Damaged, Ledger, RecordError};
use continuity::Marks;
use forecast::Forecasts;
use guard::Guard;
use history::History;
use idle::Idle;
use ids::Ids;
use incoming::Incoming;
use lending::Lent;
use outgoing::Outgoing;
use pending::Pending;
use resolving::Resolution;
use vms::Vm;

/// What the runner found before the core begins.
pub struct Beginning {
    pub config: Config,
    pub key: Arc<dyn Signer>,
    pub features: Features,
    /// Where this broker can be dialled for transfers.
    pub transfer_addresses: Vec<String>,
    /// Where VMs' directories lie, for what is shown of them.
    pub vms_dir: PathBuf,
    /// Directories of disks by VM, the one that was changed last at the end.
    pub disk_dirs: BTreeMap<VmId, Vec<String>>,
    pub marks: Marks,
    pub ids: Ids,
    pub now: UnixMillis,
    /// The rules of ownership. All of them: only tests of a debug build can make another law.
    pub law: Law,
}

/// A clone goes on from the same state: give it a book of its own with [`Broker::over`].
#[derive(Clone)]
pub struct Broker {
    now: UnixMillis,
    config: Arc<Config>,
    me: MemberJid,
    key: Arc<dyn Signer>,
    features: Features,
    transfer_addresses: Vec<String>,
    vms_dir: PathBuf,
    book: Ledger,
    ids: Ids,
    /// What this step wants done so far.
    effects: Vec<Effect>,
    pending: BTreeMap<Token, Pending>,
    next_token: u64,
    members: Members,
    /// Negotiation versions spoken with members, from their presence.
    versions: BTreeMap<MemberJid, u32>,
    clocks: guard::Clocks,
    offline: Option<String>,
    replay: ReplayGuard,
    vms: BTreeMap<VmId, Vm>,
    /// Names of VMs that are being made.
    names_in_use: BTreeSet<VmName>,
    /// VMs to be started, one after the other.
    start_order: VecDeque<VmId>,
    /// The one of them that is being started.
    starting_now: Option<VmId>,
    outgoing: BTreeMap<MigrationId, Outgoing>,
    incoming: BTreeMap<MigrationId, Incoming>,
    /// Ended migrations.
    history: History,
    /// Moves from here that a restart cut short.
    unfinished: Vec<unfinished::Unfinished>,
    /// Disks staged here for migrations that are gone.
    interrupted: BTreeMap<VmId, unfinished::Interrupted>,
    /// Until when targets keep what was sent in moves from here that ended without a hand-over.
    kept_there: BTreeMap<MigrationId, UnixMillis>,
    /// VMs whose record cannot be used.
    aside: BTreeMap<VmId, Damaged>,
    /// VMs of which what is here is being removed: nothing may come to where they lay.
    removing: BTreeSet<VmId>,
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
    /// Somebody may have to be asked whom no presence brings up.
    someone_unmet: bool,
    /// Set until those that may know more than the records here were asked.
    confirming: Option<owners::Confirming>,
    marks: Marks,
    /// Changes of records that the mark knows of.
    noted: u64,
    /// Records of before this time came from a backup.
    restored: Option<UnixMillis>,
    after_restore: bool,
    /// What disks take up, as it was measured last.
    measured: Measured,
    idle: Idle,
    forecasts: Forecasts,
    lent: Lent,
    /// What others may ask, and what they were refused.
    guard: Guard,
    successions: Successions,
    announce_wanted: bool,
    /// What is still to be done at the first step.
    beginning: Option<BTreeMap<VmId, Vec<String>>>,
}

impl Broker {
    /// Reads the durable records.
    ///
    /// # Errors
    /// If they cannot be read as a whole; a record that is damaged is set aside.
    pub fn open(book: Box<dyn Book>, members: Members, b: Beginning) -> Result<Self, RecordError> {
        let book = Ledger::new(book, b.law);
        let (now, me) = (b.now, b.config.xmpp.jid.clone());
        let (mut vms, damaged) = book.vms()?;
        for d in &damaged {
            tracing::error!(vm = %d.vm, reason = d.reason, "set aside: it is not run, and its disks are not touched");
        }
        for record in &mut vms {
            if let Err(e) = lineages::complete(&book, &me, &*b.key, record) {
                tracing::error!(vm = %record.spec.name, error = crate::interface::chain(&e), "it cannot move: its history is damaged");
            }
        }
        for record in &vms {
            if let Err(e) = book.keep_receipts(record) {
                tracing::warn!(vm = %record.spec.name, error = crate::interface::chain(&e), "a receipt lies in its record alone");
            }
        }
        let resolutions = book.resolutions()?;
        let vms: BTreeMap<_, _> = vms.into_iter().map(|record| (record.spec.id, Vm::new(record))).collect();
        let note = |record: &MoveRecord| (*book).note_later(record);
        let (history, unfinished) = unfinished::split(book.migrations()?, &vms, now, note);
        let (history, displaced) = History::of(history);
        displaced.into_iter().for_each(|id| book.forget_migration(id));
        let forecasts = Forecasts::of(history.views());
        let restored = book.restored()?;
        Ok(Self {
            now,
            me,
            config: Arc::new(b.config),
            key: b.key,
            features: b.features,
            transfer_addresses: b.transfer_addresses,
            vms_dir: b.vms_dir,
            book,
            ids: b.ids,
            effects: Vec::new(),
            pending: BTreeMap::new(),
            next_token: 0,
            members,
            versions: BTreeMap::new(),
            clocks: guard::Clocks::default(),
            offline: Some("connecting".into()),
            replay: ReplayGuard::default(),
            vms,
            names_in_use: BTreeSet::new(),
            start_order: VecDeque::new(),
            starting_now: None,
            outgoing: BTreeMap::new(),
            incoming: BTreeMap::new(),
            history,
            unfinished,
            interrupted: BTreeMap::new(),
            kept_there: BTreeMap::new(),
            aside: damaged.into_iter().map(|d| (d.vm, d)).collect(),
            resolutions: resolutions.into_iter().map(|r| (r.migration, r)).collect(),
            removing: BTreeSet::new(),
            errands: BTreeMap::new(),
            unanswered: BTreeMap::new(),
            promising: HashSet::new(),
            disputes: BTreeMap::new(),
            met: BTreeSet::new(),
            met_at: UnixMillis(0),
            someone_unmet: true,
            confirming: None,
            marks: b.marks,
            noted: 0,
            restored,
            after_restore: false,
            measured: Measured::default(),
            idle: Idle::new(now),
            forecasts,
            lent: Lent::default(),
            guard: Guard::default(),
            successions: Successions::default(),
            announce_wanted: true,
            beginning: Some(b.disk_dirs),
        })
    }

    /// Goes on over another book, which must say what this one's does.
    pub fn over(mut self, book: Box<dyn Book>) -> Self {
        self.book = Ledger::new(book, self.book.law());
        self
    }

    /// With the successions by which this cloud's key came to be its.
    pub fn with_successions(self, successions: Successions) -> Self {
        Self { successions, ..self }
    }

    /// The records came from a backup, its operator says: everybody is asked before a VM is run, and
    /// hand-overs of before are not returned by themselves.
    pub fn after_restore(mut self) -> Result<Self, RecordError> {
        self.book.save_restored(self.now)?;
        (self.restored, self.after_restore) = (Some(self.now), true);
        Ok(self)
    }

    /// The VMs that are this cloud's: what the runner makes known to the hypervisor before the first step.
    pub fn records_here(&self) -> impl Iterator<Item = &VmRecord> {
        self.vms.values().map(|vm| &vm.record).filter(|record| record.is_here())
    }

    /// Whether those that may know more of who owns this VM were asked.
    pub fn is_confirmed(&self, vm: VmId) -> bool {
        self.vms.get(&vm).is_none_or(|vm| vm.confirmed)
    }

    /// Tokens of what it waits for.
    pub fn awaited(&self) -> impl Iterator<Item = Token> + '_ {
        self.pending.keys().copied()
    }

    /// What it waits for under this token, as a fault's report shows it.
    pub fn awaits(&self, token: Token) -> Option<String> {
        self.pending.get(&token).map(|pending| format!("{pending:?}"))
    }

    /// Whether nothing is under way that time could change within seconds.
    pub fn is_quiet(&self) -> bool {
        self.outgoing.is_empty()
            && !self.incoming.values().any(Incoming::is_unfinished)
            && self.unfinished.is_empty()
            && self.errands.is_empty()
            && self.confirming.is_none()
            && self.disputes.is_empty()
    }

    /// Takes in one thing that happened at `now`, and says what is to be done. The first input is
    /// [`Input::Machines`]: what runs already.
    pub fn step(&mut self, now: UnixMillis, input: Input) -> Vec<Effect> {
        self.now = now;
        let stops = matches!(input, Input::Shutdown);
        match input {
            Input::Call(call, request) => self.call(request, call),
            Input::Asked(ask, from, payload) => self.asked(ask, from, &payload),
            Input::Room(input) => self.room_input(input),
            Input::Machine(event, power) => {
                self.set_power(event.vm, power);
                self.power_event(&event);
            }
            Input::Power(vm, power) => self.set_power(vm, power),
            Input::Machines(listed) => self.machines(listed),
            Input::Staging(id, report) => self.staging(id, *report),
            Input::Shown(by, vm, lineage) => self.learn_of(&by, vm, &lineage),
            Input::Signed { by, issued, fresh } => self.clocks.note(&by, issued, now, fresh),
            Input::Measured(measured) => self.measured = *measured,
            Input::Sent(sent) => self.take_sent(&sent),
            Input::CallerGone(call) => self.caller_gone(call),
            Input::LinkRefused(refused) => self.link_refused(refused),
            Input::Overrun(refused) => self.overrun(refused),
            Input::Refused(from, refused, reason) => self.refuse(&from, refused, &reason),
            Input::Done(token, done) => self.done(token, done),
            Input::Tick => self.tick(),
            Input::Shutdown => {
                self.emit(Effect::StopOptimizing);
                self.emit(Effect::Shutdown);
                tracing::info!("the broker stops; VMs keep running");
            }
        }
        if let Some(reason) = self.book.undecided() {
            tracing::error!(
                reason,
                "who owns the VM cannot be recorded: the broker ends here, and asks when it is started again"
            );
            self.effects.clear();
            return vec![Effect::End(reason)];
        }
        if !stops {
            self.note_continuity();
            if std::mem::take(&mut self.announce_wanted) {
                let cloud = self.presence();
                self.emit(Effect::Announce(Box::new(cloud)));
            }
        }
        std::mem::take(&mut self.effects)
    }

    fn emit(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    fn reply(&mut self, call: CallId, result: Result<Reply, Problem>) {
        self.emit(Effect::Reply(call, Box::new(result)));
    }

    /// What is pending gets a token, under which its outcome comes back.
    fn expect(&mut self, pending: Pending) -> Token {
        self.next_token += 1;
        let token = Token(self.next_token);
        self.pending.insert(token, pending);
        token
    }

    fn wake(&mut self, after: std::time::Duration, pending: Pending) {
        let token = self.expect(pending);
        let at = self.now.plus(after);
        self.emit(Effect::Wake { token, at });
    }

    /// How the VMs are: at the start, and after events were lost.
    fn machines(&mut self, listed: Vec<(VmId, PowerState)>) {
        for (vm, power) in &listed {
            self.set_power(*vm, *power);
        }
        match self.beginning.take() {
            Some(disk_dirs) => self.begin(disk_dirs),
            None => self.review_power(&listed),
        }
    }

    fn begin(&mut self, disk_dirs: BTreeMap<VmId, Vec<String>>) {
        self.find_leftovers(disk_dirs);
        self.resume_resolutions();
        self.resume_outgoing();
        self.resume_incoming();
        self.apply_autostart();
        self.begin_confirming();
        let all: Vec<VmId> = self.vms.keys().copied().collect();
        self.start_in_order(all);
        self.noted = u64::MAX;
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
        self.scrub_released();
        self.optimize_when_idle();
    }

    fn room_input(&mut self, input: RoomInput) {
        let now = self.now;
        match input {
            RoomInput::Presence(presence) => {
                let (jid, was_online) = (presence.jid.clone(), self.members.is_online(&presence.jid));
                let admitted = self.members.admitted(&jid);
                if let Some(news) = self.members.presence(presence, now) {
                    self.take_key_news(&jid, &news);
                }
                self.readmit(&jid, admitted);
                let spoken = common_version(self.members.versions_of(&jid));
                match spoken {
                    Some(version) => self.versions.insert(jid.clone(), version),
                    None => self.versions.remove(&jid),
                };
                self.emit(Effect::Speaks(jid.clone(), spoken));
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
                self.offline = None;
                self.announce_wanted = true;
                // Whoever left while nobody could tell may not connect any more.
                self.admit_members();
            }
            RoomInput::Down(reason) => {
                self.offline = Some(reason);
                self.members.disconnected(now);
            }
        }
    }

    fn presence_changed(&mut self) {
        self.announce_wanted = true;
    }

    /// Keeps an ended migration. What was begun here must not begin again after a restart.
    fn remember(&mut self, view: MigrationView) {
        match view.progress.role {
            MigrationRole::Source => self.book.note_now(&view),
            MigrationRole::Target => self.book.note_later(&view),
        }
        let displaced = self.history.remember(view);
        displaced.into_iter().for_each(|id| self.book.forget_migration(id));
    }

    fn amend_history(&mut self, id: MigrationId, amend: impl FnOnce(&mut Account)) {
        if let Some(run) = self.outgoing.get_mut(&id) {
            amend(&mut run.view.account);
        } else if let Some(mut view) = self.history.get(&id).cloned() {
            amend(&mut view.account);
            // Others may say the same again and again.
            if self.history.get(&id).is_some_and(|known| known.account != view.account) {
                self.book.note_later(&view);
                self.history.remember(view);
            }
        }
    }
}
