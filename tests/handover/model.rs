//! Two clouds, one VM and a few moves, small enough that every state can be visited: the real
//! machines and signatures, and around them what a broker records, loses and refuses.
//!
//! The network forgets nothing: whatever was ever sent may arrive at any time, any number of times,
//! in any order, or never. That covers loss, duplication, reordering, delay and clocks that differ.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{LazyLock, Mutex};

use cicada::clock::UnixMillis;
use cicada::migration::handover::{HandOver, Receipt, Return, SignedHandOver};
use cicada::migration::message::{Initialization, Progress, Seed, StageAccount};
use cicada::migration::ownership::{Became, Gift, Given, Guest, Hold, Rule, Standing};
use cicada::migration::records::VmRecord;
use cicada::migration::source::{self, Source};
use cicada::migration::target::{self, Agreement, Target};
use cicada::migration::{Answer, Denial, DenialCode, Law, Lineage, Pass, RequestBody};
use cicada::types::{MigrationId, ReservationId};

use crate::cloud::{self, jid, key, map, spec};

/// A rule of the broker that is broken on purpose, to see that the check would notice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Broken {
    Nothing,
    /// The source signs and sends, and records afterwards.
    SignsFirst,
    /// The target starts the VM, and records afterwards.
    StartsFirst,
    /// One of the rules of ownership is off.
    Without(Rule),
    /// The source takes a bare denial of its hand-over for a return.
    DenialIsReturn,
    /// A VM that was taken over and is about to be started may be moved on.
    ArrivingIsFree,
}

impl Broken {
    fn law(self) -> Law {
        match self {
            Broken::Without(rule) => Law::without(rule),
            _ => Law::WHOLE,
        }
    }
}

/// One move as it was begun.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Move {
    pub from: usize,
    /// The VM's epoch at its source.
    pub epoch: u64,
    pub ran: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Ask {
    Reserve,
    Stage { pass: u32, last: bool },
    Start,
    Cancel,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Reply {
    /// By the target's so-manieth reservation for the move.
    Reserved(u8),
    Working,
    Staged,
    Started,
    Returned,
    Unknown,
    Refused,
}

/// A request of a move's source, or with `reply` the answer to it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Packet {
    pub of: usize,
    pub ask: Ask,
    pub reply: Option<Reply>,
}

/// Work of the source's broker; its outcome is the machine's next event.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum SourceWork {
    Check,
    Scan,
    Stop,
    GiveUp,
    GaveUp,
    RecordLate,
    TakeBack,
    TookBack,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum TargetWork {
    Stage,
    TakeOver,
    TookOver,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Outgoing {
    pub of: usize,
    machine: Source,
    work: Option<SourceWork>,
    pausing: bool,
    asked: Option<Ask>,
    reservation: u8,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Incoming {
    pub of: usize,
    reservation: u8,
    machine: Target,
    work: Option<TargetWork>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Side {
    // What survives a crash.
    pub record: Option<VmRecord>,
    /// The history kept beside the record.
    pub lineage: Lineage,
    /// Receipts that outlive their records.
    pub past: BTreeMap<usize, Receipt>,
    /// Reservations made for each move. Random in truth, so a crash does not bring one back.
    pub reserved: BTreeMap<usize, u8>,
    pub running: bool,
    pub paused: bool,
    // What does not.
    pub outgoing: Option<Outgoing>,
    pub incoming: Option<Incoming>,
    /// A start under way, and the move whose arrival it ends.
    pub starting: Option<Option<usize>>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct State {
    pub sides: [Side; 2],
    pub moves: Vec<Move>,
    /// The history that each move's source shows, and the hand-over once it is signed.
    pub shown: Vec<Lineage>,
    pub given: Vec<Option<HandOver>>,
    /// Everything ever said.
    pub said: BTreeSet<Packet>,
    /// A start failed, or the VM was off from the beginning: it need not run at the end.
    pub excused: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    Move,
    Arrives(Packet),
    /// A request about which the records can be neither read nor written.
    ArrivesDiskFull(Packet),
    SourceWork {
        side: usize,
        ok: bool,
    },
    TargetWork {
        side: usize,
        ok: bool,
    },
    Start {
        side: usize,
        ok: bool,
    },
    Cancel(usize),
    Silence(usize),
    /// The target, or an operator, asks to switch over or to hold the guest.
    SwitchOver(usize),
    Hold(usize),
    Pause {
        side: usize,
        ok: bool,
    },
    HoldOver(usize),
    LeaseOver(usize),
    /// `stops`: a guest that was being switched off goes off all the same.
    Crash {
        side: usize,
        stops: bool,
    },
    Scrub(usize),
}

impl Side {
    fn new(record: Option<VmRecord>, running: bool) -> Self {
        Self {
            record,
            lineage: Lineage::empty(spec().id),
            past: BTreeMap::new(),
            reserved: BTreeMap::new(),
            running,
            paused: false,
            outgoing: None,
            incoming: None,
            starting: None,
        }
    }

    pub fn owns(&self) -> bool {
        self.record.as_ref().is_some_and(VmRecord::is_here)
    }

    /// All it knows of the VM's history.
    fn known(&self) -> Lineage {
        Law::WHOLE.known(self.lineage.clone(), self.record.as_ref())
    }

    fn standing<'a>(&'a self, known: &'a Lineage) -> Standing<'a> {
        Standing { record: self.record.as_ref(), known, damaged: false }
    }

    pub fn epoch(&self) -> u64 {
        self.record.as_ref().map_or(0, |r| r.epoch)
    }

    /// What holds the VM: it is being moved, started or about to be started.
    fn hold(&self, broken: Broken) -> Hold {
        let arriving = self.incoming.as_ref();
        let arriving = arriving.is_some_and(|i| i.work == Some(TargetWork::TookOver) && i.machine.run());
        if let Some(run) = &self.outgoing {
            Hold::Migration(id(run.of))
        } else if self.starting.is_some() || arriving && broken != Broken::ArrivingIsFree {
            Hold::Verb("started")
        } else {
            Hold::Free
        }
    }

    fn busy(&self, broken: Broken) -> bool {
        self.hold(broken) != Hold::Free
    }

    fn may_move(&self, broken: Broken) -> bool {
        let record = self.record.as_ref();
        record.is_some_and(|r| broken.law().may_move(r, self.hold(broken), true).is_ok())
    }

    fn leased(&self) -> bool {
        self.incoming.as_ref().is_some_and(|i| i.machine.leased())
    }

    /// Whether nothing is under way.
    fn idle(&self) -> bool {
        !self.busy(Broken::Nothing)
            && self.incoming.as_ref().is_none_or(|i| *i.machine.phase() == target::Phase::Owned)
    }

    fn start(&mut self, arrival: Option<usize>) {
        if let Some(record) = self.record.as_mut().filter(|r| Law::WHOLE.may_run(r, true).is_ok()) {
            record.run = true;
            self.starting = Some(arrival);
        }
    }

    fn keep_past(&mut self, broken: Broken) {
        let Some(record) = &self.record else { return };
        let (known, links) = (self.known(), broken.law().outlive(record));
        self.past.extend(links.into_iter().map(|(migration, receipt)| (index(migration), receipt)));
        self.lineage = known;
    }
}

fn no(code: DenialCode) -> Denial {
    Denial::new(code, "no")
}

/// Signing is deterministic and slow: each hand-over is signed once.
fn signed(h: &HandOver) -> SignedHandOver {
    static SIGNED: LazyLock<Mutex<HashMap<HandOver, SignedHandOver>>> = LazyLock::new(Mutex::default);
    let mut known = SIGNED.lock().expect("no panic while signing");
    known.entry(h.clone()).or_insert_with(|| h.clone().sign(&key(cloud::index(&h.source)))).clone()
}

/// The same of the second signature.
fn receipt(h: &HandOver) -> Receipt {
    static SIGNED: LazyLock<Mutex<HashMap<HandOver, Receipt>>> = LazyLock::new(Mutex::default);
    let signed = signed(h);
    let mut known = SIGNED.lock().expect("no panic while signing");
    known.entry(h.clone()).or_insert_with(|| signed.accept(&key(cloud::index(&h.target)))).clone()
}

fn returned(h: &HandOver) -> Return {
    static SIGNED: LazyLock<Mutex<HashMap<HandOver, Return>>> = LazyLock::new(Mutex::default);
    let signed = signed(h);
    let mut known = SIGNED.lock().expect("no panic while signing");
    known.entry(h.clone()).or_insert_with(|| signed.give_back(&key(cloud::index(&h.target)))).clone()
}

fn reservation(of: usize, number: u8) -> ReservationId {
    ReservationId(uuid::Uuid::from_u128((of as u128) << 8 | u128::from(number)))
}

fn index(migration: MigrationId) -> usize {
    migration.0.as_u128() as usize - 1
}

fn id(of: usize) -> MigrationId {
    MigrationId(uuid::Uuid::from_u128(of as u128 + 1))
}

impl State {
    pub fn first(ran: bool) -> Self {
        let record = VmRecord::new(spec(), Vec::new(), "disks", UnixMillis(1));
        let home = Side::new(Some(VmRecord { run: ran, ..record }), ran);
        let (moves, shown, given, said) = (Vec::new(), Vec::new(), Vec::new(), BTreeSet::new());
        Self { sides: [home, Side::new(None, false)], moves, shown, given, said, excused: !ran }
    }

    /// Everything that can happen next.
    pub fn actions(&self, moves_max: usize, steered: bool, broken: Broken, out: &mut Vec<Action>) {
        if self.moves.len() < moves_max && self.sides.iter().any(|s| s.may_move(broken)) {
            out.push(Action::Move);
        }
        for &packet in &self.said {
            match packet.reply {
                None => {
                    out.push(Action::Arrives(packet));
                    let to = &self.sides[1 - self.moves[packet.of].from];
                    if packet.ask == Ask::Start && to.incoming.as_ref().is_none_or(|i| i.of != packet.of) {
                        out.push(Action::ArrivesDiskFull(packet));
                    }
                }
                // An answer carries its request's nonce: only who still waits for it takes it.
                Some(_) if self.awaits(packet) => out.push(Action::Arrives(packet)),
                Some(_) => {}
            }
        }
        for (side, s) in self.sides.iter().enumerate() {
            if let Some(run) = &s.outgoing {
                match run.work {
                    Some(SourceWork::GaveUp | SourceWork::TookBack | SourceWork::RecordLate) => {
                        out.push(Action::SourceWork { side, ok: true });
                    }
                    Some(_) => {
                        out.extend([true, false].map(|ok| Action::SourceWork { side, ok }));
                    }
                    None if run.machine.phase().can_cancel() => out.push(Action::Silence(side)),
                    None => {}
                }
                if run.machine.phase().can_cancel() {
                    out.push(Action::Cancel(side));
                    if steered && run.machine.was_running() {
                        out.extend([Action::SwitchOver(side), Action::Hold(side)]);
                    }
                }
                if run.pausing {
                    out.extend([true, false].map(|ok| Action::Pause { side, ok }));
                }
                if run.machine.held() {
                    out.push(Action::HoldOver(side));
                }
            }
            match s.incoming.as_ref().and_then(|run| run.work) {
                Some(TargetWork::TookOver) => out.push(Action::TargetWork { side, ok: true }),
                Some(_) => out.extend([true, false].map(|ok| Action::TargetWork { side, ok })),
                None => {}
            }
            if let Some(arrival) = s.starting {
                out.push(Action::Start { side, ok: true });
                if arrival.is_some() {
                    out.push(Action::Start { side, ok: false });
                }
            }
            if s.leased() {
                out.push(Action::LeaseOver(side));
            }
            if s.record.as_ref().and_then(VmRecord::given_up).is_some_and(|g| !g.in_doubt()) && !s.leased() {
                out.push(Action::Scrub(side));
            }
            if s.busy(broken) || s.incoming.is_some() {
                out.push(Action::Crash { side, stops: false });
                if s.outgoing.as_ref().is_some_and(|run| run.work == Some(SourceWork::Stop)) {
                    out.push(Action::Crash { side, stops: true });
                }
            }
        }
    }

    fn awaits(&self, answer: Packet) -> bool {
        let waiting = &self.sides[self.moves[answer.of].from].outgoing;
        waiting.as_ref().is_some_and(|run| run.of == answer.of && run.asked == Some(answer.ask))
    }

    pub fn apply(&mut self, action: Action, broken: Broken) {
        match action {
            Action::Move => self.begin(broken),
            Action::Arrives(packet) => match packet.reply {
                None => self.asked(packet, false, broken),
                Some(reply) => self.answered(packet, reply, broken),
            },
            Action::ArrivesDiskFull(packet) => self.asked(packet, true, broken),
            Action::SourceWork { side, ok } => self.source_work(side, ok, broken),
            Action::TargetWork { side, ok } => self.target_work(side, ok, broken),
            Action::Start { side, ok } => self.started(side, ok),
            Action::Cancel(side) => self.source_step(side, source::Event::Cancel),
            Action::Silence(side) => self.silence(side),
            Action::SwitchOver(side) => self.steer(side, &RequestBody::Stop),
            Action::Hold(side) => self.steer(side, &RequestBody::Suspend),
            Action::HoldOver(side) => self.source_step(side, source::Event::HoldOver),
            Action::Pause { side, ok } => {
                let s = &mut self.sides[side];
                if let Some(run) = s.outgoing.as_mut() {
                    run.pausing = false;
                    s.paused = ok && s.running;
                    let result = if ok { Ok(()) } else { Err(no(DenialCode::Unsupported)) };
                    self.source_step(side, source::Event::Held(result));
                }
            }
            Action::LeaseOver(side) => {
                if let Some(run) = self.sides[side].incoming.as_mut() {
                    run.machine.step(target::Event::LeaseExpired);
                    self.sides[side].incoming = None;
                }
            }
            Action::Crash { side, stops } => self.crash(side, stops),
            Action::Scrub(side) => {
                self.sides[side].keep_past(broken);
                self.sides[side].record = None;
            }
        }
    }

    /// What a federation without faults does next: the work at hand, then the question at hand and
    /// its answer, then the end of leases nobody needs. `None`: it is at rest.
    pub fn calm(&self, broken: Broken) -> Option<Self> {
        let mut next = self.clone();
        for (side, s) in self.sides.iter().enumerate() {
            let action = if s.outgoing.as_ref().is_some_and(|run| run.pausing) {
                Action::Pause { side, ok: true }
            } else if s.outgoing.as_ref().is_some_and(|run| run.work.is_some()) {
                Action::SourceWork { side, ok: true }
            } else if s.incoming.as_ref().is_some_and(|run| run.work.is_some()) {
                Action::TargetWork { side, ok: true }
            } else if s.starting.is_some() {
                Action::Start { side, ok: true }
            } else {
                continue;
            };
            next.apply(action, broken);
            return Some(next);
        }
        for s in &self.sides {
            if let Some(Outgoing { of, asked: Some(ask), .. }) = s.outgoing {
                let before = std::mem::take(&mut next.said);
                next.apply(Action::Arrives(Packet { of, ask, reply: None }), broken);
                let answer = next.said.iter().copied().find(|p| p.of == of && p.ask == ask);
                next.said.extend(before);
                if let Some(answer) = answer {
                    next.apply(Action::Arrives(answer), broken);
                }
                return Some(next);
            }
        }
        let leased = self.sides.iter().position(Side::leased)?;
        next.apply(Action::LeaseOver(leased), broken);
        Some(next)
    }

    /// At rest: one owner, nothing under way, and the VM runs if it ran.
    pub fn rests_well(&self) -> Result<(), &'static str> {
        let owners: Vec<_> = self.sides.iter().filter(|s| s.owns()).collect();
        match owners[..] {
            [_] if !self.sides.iter().all(Side::idle) => Err("something is still under way"),
            [_] if self.sides.iter().any(|s| s.paused) => Err("the guest is left paused"),
            [owner] if !owner.running && !self.excused => Err("the VM ran and does not run"),
            [_] => Ok(()),
            _ => Err("not exactly one owner"),
        }
    }

    fn begin(&mut self, broken: Broken) {
        let Some(from) = self.sides.iter().position(|s| s.may_move(broken)) else { return };
        let of = self.moves.len();
        let s = &mut self.sides[from];
        self.moves.push(Move { from, epoch: s.epoch(), ran: s.running });
        self.shown.push(s.known());
        self.given.push(None);
        let machine = Source::new(s.running);
        s.outgoing = Some(Outgoing { of, machine, work: None, pausing: false, asked: None, reservation: 0 });
        self.source_step(from, source::Event::Begin);
    }

    fn crash(&mut self, side: usize, stops: bool) {
        let s = &mut self.sides[side];
        (s.outgoing, s.incoming, s.starting) = (None, None, None);
        s.running &= !stops;
        s.paused &= s.running;
        let Some(record) = &s.record else { return };
        match record.given_up() {
            Some(g) if g.in_doubt() => {
                let of = index(g.migration);
                let h = g.hand_over().expect("it was recorded whole");
                let (machine, effects) = Source::resume(self.moves[of].ran, signed(&h));
                let (work, asked) = (None, None);
                s.outgoing = Some(Outgoing { of, machine, work, pausing: false, asked, reservation: 0 });
                self.source_effects(side, effects);
            }
            None if record.run => s.start(None),
            _ => {}
        }
    }

    fn started(&mut self, side: usize, ok: bool) {
        let s = &mut self.sides[side];
        let arrival = s.starting.take().flatten();
        s.running |= ok;
        s.paused &= !ok;
        self.excused |= !ok;
        if let Some(run) = s.incoming.as_mut().filter(|run| arrival == Some(run.of)) {
            let result = if ok { Ok(()) } else { Err("the hypervisor failed".to_owned()) };
            run.machine.step(target::Event::Started(result));
        }
    }

    fn steer(&mut self, side: usize, request: &RequestBody) {
        if let Some(run) = self.sides[side].outgoing.as_mut() {
            let (_, effects) = run.machine.asked(request);
            self.source_effects(side, effects);
        }
    }

    // --- the source's side ---

    fn source_step(&mut self, side: usize, event: source::Event) {
        if let Some(run) = self.sides[side].outgoing.as_mut() {
            let effects = run.machine.step(event);
            self.source_effects(side, effects);
        }
    }

    fn source_effects(&mut self, side: usize, effects: Vec<source::Effect>) {
        use source::Effect;
        for effect in effects {
            let s = &mut self.sides[side];
            let Some(run) = s.outgoing.as_mut() else { return };
            let of = run.of;
            let mut ask = |ask| {
                run.asked = Some(ask);
                // Answers to what was asked before are not waited for any more.
                self.said.retain(|p| p.of != of || p.reply.is_none() || p.ask == ask || p.ask == Ask::Start);
                self.said.insert(Packet { of, ask, reply: None });
            };
            match effect {
                Effect::AskReservation => ask(Ask::Reserve),
                Effect::AskInitialization(Pass { number, last, .. }) => {
                    ask(Ask::Stage { pass: number, last });
                }
                Effect::AskStart(_) => ask(Ask::Start),
                Effect::TellCancel => drop(self.said.insert(Packet { of, ask: Ask::Cancel, reply: None })),
                Effect::Check => run.work = Some(SourceWork::Check),
                Effect::Scan { .. } => run.work = Some(SourceWork::Scan),
                Effect::Stop => run.work = Some(SourceWork::Stop),
                Effect::GiveUp(_) => run.work = Some(SourceWork::GiveUp),
                Effect::TakeBack(_) => run.work = Some(SourceWork::TakeBack),
                // How long it takes is no matter: messages take any time.
                Effect::Wait { .. } => self.source_step(side, source::Event::Timer),
                Effect::Suspend => run.pausing = true,
                Effect::Resume => s.paused = false,
                Effect::Restart => s.start(None),
                Effect::Release { receipt, .. } => {
                    s.outgoing = None;
                    let record = s.record.as_ref();
                    let released = record.map(|r| Law::WHOLE.release(r, receipt, UnixMillis(2)));
                    s.record = Some(released.expect("it is there").expect("the receipt fits"));
                }
                // A pause that comes late is undone by the broker: nobody else would.
                Effect::Abandon(_) => s.outgoing = None,
            }
        }
    }

    fn source_work(&mut self, side: usize, ok: bool, broken: Broken) {
        use source::Event;
        let s = &mut self.sides[side];
        let known = s.known();
        let Some(run) = s.outgoing.as_mut() else { return };
        let (of, m) = (run.of, self.moves[run.of]);
        let result = if ok { Ok(()) } else { Err(no(DenialCode::Other)) };
        let event = match run.work.take() {
            Some(SourceWork::Check) => Event::Checked(result),
            Some(SourceWork::Scan) => Event::Scanned(result.map(|()| (map(1), map(1)))),
            Some(SourceWork::Stop) => {
                s.running &= !ok;
                s.paused = false;
                Event::Stopped(result)
            }
            Some(work @ (SourceWork::GiveUp | SourceWork::RecordLate)) if ok => {
                let given = s.record.as_ref().map(|record| {
                    let gift = Gift {
                        migration: id(of),
                        source: jid(side),
                        source_key: key(side).public(),
                        target: jid(1 - side),
                        target_key: key(1 - side).public(),
                        reservation: Some(reservation(of, run.reservation)),
                        seed: Seed { root_delta: map(1), user_data: map(1) },
                        was_running: m.ran,
                        now: UnixMillis(1),
                    };
                    broken.law().give_up(record, &known, gift)
                });
                let Some(Ok((record, h))) = given else {
                    self.source_step(side, Event::GaveUp(Err(no(DenialCode::Other))));
                    return;
                };
                self.given[of] = Some(h.clone());
                if work == SourceWork::GiveUp && broken == Broken::SignsFirst {
                    self.source_step(side, Event::GaveUp(Ok(signed(&h))));
                    if let Some(run) = self.sides[side].outgoing.as_mut() {
                        run.work = Some(SourceWork::RecordLate);
                    }
                    return;
                }
                let s = &mut self.sides[side];
                s.record = Some(record);
                if let Some(run) = s.outgoing.as_mut() {
                    run.work = (work == SourceWork::GiveUp).then_some(SourceWork::GaveUp);
                }
                return;
            }
            Some(SourceWork::GaveUp) => match &self.given[of] {
                Some(h) => Event::GaveUp(Ok(signed(h))),
                None => Event::GaveUp(Err(no(DenialCode::Other))),
            },
            Some(SourceWork::GiveUp | SourceWork::RecordLate) => Event::GaveUp(Err(no(DenialCode::Other))),
            Some(SourceWork::TakeBack) if ok => {
                let back = self.given[of].as_ref().map(returned);
                let law = broken.law();
                let record = s.record.as_ref();
                let taken = record.zip(back).map(|(record, back)| law.take_back(record, &known, &back));
                if let Some(Ok((record, known))) = taken {
                    (s.record, s.lineage) = (Some(record), known);
                }
                run.work = Some(SourceWork::TookBack);
                return;
            }
            Some(SourceWork::TakeBack) => Event::TookBack(result),
            Some(SourceWork::TookBack) => Event::TookBack(Ok(())),
            None => return,
        };
        self.source_step(side, event);
    }

    fn answered(&mut self, packet: Packet, reply: Reply, broken: Broken) {
        let m = self.moves[packet.of];
        let h = self.given[packet.of].clone();
        let unknown = || no(DenialCode::UnknownMigration);
        let answer = match (reply, packet.ask, &h) {
            (Reply::Unknown | Reply::Refused, Ask::Start, Some(h)) if broken == Broken::DenialIsReturn => {
                Answer::Returned { back: returned(h), denial: unknown() }
            }
            (Reply::Reserved(number), _, _) => Answer::Reserved {
                expires_in_s: 60,
                reservation: Some(reservation(packet.of, number)),
                known: None,
            },
            (Reply::Working, _, _) => Answer::Working(Progress::default()),
            (Reply::Staged, Ask::Stage { pass, .. }, _) => {
                Answer::Staged { pass, account: StageAccount::default() }
            }
            (Reply::Started, _, Some(h)) => Answer::Started {
                receipt: receipt(h),
                running: true,
                problem: None,
                account: StageAccount::default(),
            },
            (Reply::Returned, _, Some(h)) => Answer::Returned { back: returned(h), denial: unknown() },
            (Reply::Unknown, _, _) => Answer::Denied(unknown()),
            _ => Answer::Denied(no(DenialCode::OutOfOrder)),
        };
        if let (Reply::Reserved(number), Some(run)) = (reply, self.sides[m.from].outgoing.as_mut()) {
            run.reservation = number;
        }
        if let Some(run) = self.sides[m.from].outgoing.as_mut() {
            run.asked = None;
        }
        self.source_step(m.from, source::Event::Answered(Box::new(answer)));
    }

    /// No answer for so long that the machine draws its conclusions.
    fn silence(&mut self, side: usize) {
        for _ in 0..100 {
            let Some(run) = self.sides[side].outgoing.as_mut() else { return };
            let effects = run.machine.step(source::Event::Unanswered);
            self.source_effects(side, effects);
        }
    }

    // --- the target's side ---

    fn asked(&mut self, packet: Packet, disk_full: bool, broken: Broken) {
        let Packet { of, ask, .. } = packet;
        let m = self.moves[of];
        let side = 1 - m.from;
        let reply = match (ask, self.sides[side].incoming.as_ref()) {
            (_, Some(run)) if run.of == of => self.target_asked(side, self.request(of, m, ask)),
            (Ask::Reserve, _) => Some(self.reserve(side, of, m, broken)),
            (Ask::Start, _) => Some(self.start_unknown(side, of, disk_full, broken)),
            (Ask::Stage { .. }, _) => Some(Reply::Unknown),
            (Ask::Cancel, _) => None,
        };
        // These only make the source ask again, which needs no packet: what was said may arrive again.
        let idle = match reply {
            Some(Reply::Unknown | Reply::Refused) => ask == Ask::Start && broken != Broken::DenialIsReturn,
            other => matches!(other, None | Some(Reply::Working)),
        };
        let packet = Packet { of, ask, reply };
        if !idle && (ask == Ask::Start || self.awaits(packet)) {
            self.said.insert(packet);
        }
    }

    fn target_asked(&mut self, side: usize, request: RequestBody) -> Option<Reply> {
        let s = &mut self.sides[side];
        let run = s.incoming.as_mut()?;
        let mut reply = None;
        for effect in run.machine.step(target::Event::Asked(Box::new(request))) {
            match effect {
                target::Effect::Answer(a) => {
                    assert!(reply.is_none(), "one answer for each request");
                    reply = Some(match *a {
                        Answer::Reserved { .. } => Reply::Reserved(run.reservation),
                        Answer::Working(_) => Reply::Working,
                        Answer::Staged { .. } => Reply::Staged,
                        Answer::Started { .. } => Reply::Started,
                        Answer::Denied(d) if d.code == DenialCode::UnknownMigration => Reply::Unknown,
                        _ => Reply::Refused,
                    });
                }
                target::Effect::Stage(_) => run.work = Some(TargetWork::Stage),
                target::Effect::TakeOver(_) => run.work = Some(TargetWork::TakeOver),
                target::Effect::CleanUp => run.work = None,
                target::Effect::Start | target::Effect::AskDelete { .. } => {}
            }
        }
        if *run.machine.phase() == target::Phase::Abandoned {
            s.incoming = None;
        }
        reply
    }

    /// A reservation, with the history that its source shows.
    fn reserve(&mut self, side: usize, of: usize, m: Move, broken: Broken) -> Reply {
        let s = &mut self.sides[side];
        // A later reservation of the same VM takes the place of an earlier one.
        if s.leased() {
            s.incoming = None;
        }
        let known = s.known();
        let offered = broken.law().offer(
            s.standing(&known),
            &jid(m.from),
            &key(m.from).public(),
            Some(&self.shown[of]),
        );
        let arriving = s.incoming.as_ref().is_some_and(|run| *run.machine.phase() != target::Phase::Owned);
        if arriving || offered.is_err() {
            return Reply::Refused;
        }
        let number = *s.reserved.entry(of).and_modify(|n| *n += 1).or_insert(1);
        let agreement = Agreement {
            source: jid(m.from),
            source_key: key(m.from).public(),
            target: jid(side),
            target_key: key(side).public(),
            migration: id(of),
            vm: spec().id,
            epoch: m.epoch,
            recipe: spec().recipe,
            reservation: reservation(of, number),
            known: known.tip().map(|tip| tip.id),
        };
        let machine = Target::new(agreement, 60);
        s.incoming = Some(Incoming { of, reservation: number, machine, work: None });
        Reply::Reserved(number)
    }

    /// A hand-over for a migration nobody here remembers.
    fn start_unknown(&mut self, side: usize, of: usize, disk_full: bool, broken: Broken) -> Reply {
        let s = &mut self.sides[side];
        let Some(h) = &self.given[of] else { return Reply::Refused };
        // A disk that fails reads no receipt either: a bare denial, though the VM was taken.
        if disk_full {
            return Reply::Refused;
        }
        let known = Lineage::empty(spec().id);
        let given = Given { promised: false, receipt: s.past.get(&of) };
        match broken.law().what_became_of(s.standing(&known), given, h, &signed(h)) {
            Became::Taken(_) => Reply::Started,
            Became::Void => Reply::Returned,
            // Not in version 2.
            Became::ToBePromised => Reply::Returned,
            _ => Reply::Refused,
        }
    }

    fn target_work(&mut self, side: usize, ok: bool, broken: Broken) {
        let s = &mut self.sides[side];
        let Some(run) = s.incoming.as_mut() else { return };
        let of = run.of;
        match run.work.take() {
            Some(TargetWork::Stage) => {
                let result = if ok { Ok(StageAccount::default()) } else { Err(no(DenialCode::Content)) };
                run.machine.step(target::Event::StageFinished(result));
            }
            Some(TargetWork::TakeOver) => {
                if broken == Broken::StartsFirst && !s.running {
                    s.running = run.machine.run();
                    run.work = Some(TargetWork::TakeOver);
                    return;
                }
                let guest = Guest {
                    spec: spec(),
                    components: Vec::new(),
                    disks: format!("disks-{of}-{}", run.reservation),
                    run: run.machine.run(),
                    reservation: reservation(of, run.reservation),
                    now: UnixMillis(1),
                    grace: std::time::Duration::from_millis(1),
                };
                let (known, given) = (s.known(), Given { promised: false, receipt: s.past.get(&of) });
                let taken = self.given[of].as_ref().filter(|_| ok).map(|h| {
                    let (law, shown) = (broken.law(), Some(&self.shown[of]));
                    law.take_over(s.standing(&known), given, shown, signed(h), &key(side), guest)
                });
                let Some(run) = s.incoming.as_mut() else { return };
                let Some(Ok((record, lineage))) = taken else {
                    run.machine.step(target::Event::TookOver(Err(no(DenialCode::HandOver))));
                    s.incoming = None;
                    return;
                };
                run.work = Some(TargetWork::TookOver);
                s.keep_past(broken);
                s.lineage = lineage;
                // Where copies are kept is another test's matter; here each would make states differ.
                s.record = Some(VmRecord { kept: Vec::new(), disks: "disks".into(), ..record });
            }
            Some(TargetWork::TookOver) => {
                let Some(h) = &self.given[of] else { return };
                if run.machine.step(target::Event::TookOver(Ok(receipt(h)))) == [target::Effect::Start] {
                    s.start(Some(of));
                }
            }
            None => {}
        }
    }

    fn request(&self, of: usize, m: Move, ask: Ask) -> RequestBody {
        request(m, ask, self.given[of].as_ref())
    }
}

fn request(m: Move, ask: Ask, given: Option<&HandOver>) -> RequestBody {
    match ask {
        Ask::Reserve => RequestBody::Reservation { spec: spec() },
        Ask::Stage { pass, last } => RequestBody::Initialization(Box::new(Initialization {
            spec: spec(),
            recipe: String::new(),
            component_names: Vec::new(),
            component_bytes: 0,
            pass: Pass { number: pass, last, root_delta: map(1), user_data: map(1) },
            addresses: Vec::new(),
            source_key: key(m.from).public(),
            ticket: String::new(),
            firmware: None,
        })),
        Ask::Start => {
            let h = given.expect("asked for once it is signed");
            RequestBody::Start { hand_over: signed(h), run: m.ran }
        }
        Ask::Cancel => RequestBody::Cancel { reason: "".into() },
    }
}
