//! Random runs: whatever may happen next does, in any order, and every kind of trouble between. A run is told by its
//! seed.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cicada::broker::CallId;
use cicada::broker::memory_book::{MemoryBook, Page};
use cicada::interface::{Deleted, MoveRequest, Reply, Request, Side, VmRequest};
use cicada::migration::Law;
use cicada::sim::{Death, Kind, Pending, World};
use cicada::vm::PowerState;

use crate::federation::{NAME, NOBODYS, federation, in_doubt, open, owners, records, rests, sound, vm};
use crate::liar;

const CLOUDS: usize = 4;
/// The last of them has no VM and gets none.
const MOVERS: usize = 3;
const REPLAYED_MAX: usize = 200;
/// Clocks are off by at most this much while there are faults, and by so much that brokers still understand each
/// other when there are none.
const OFF_FAULTY_MS: usize = 240_000;
const OFF_HEALED_MS: usize = 55_000;
/// Leases last a minute.
const LEASE_OVER: Duration = Duration::from_secs(61);

/// What a run did; summed over runs to show that the interesting things happen.
#[derive(Default, Clone, Copy, Debug)]
pub struct Tally {
    pub events: u64,
    pub steps: u64,
    pub moves: u64,
    pub crashes: u64,
    pub hand_overs: u64,
    pub returns: u64,
    pub cancelled: u64,
    pub steered: u64,
    pub failed_writes: u64,
    pub lost: u64,
    pub repeated: u64,
    pub replayed: u64,
    /// False hand-overs, by members that never had the VM and by former owners.
    pub attacks: u64,
    /// Withdrawals of hand-overs that were acknowledged.
    pub withdrawals: u64,
    /// Clouds that came back from a backup.
    pub restored: u64,
    /// Hand-overs in doubt that operators decided, and those of them that were decided wrongly.
    pub resolved: u64,
    pub resolved_wrongly: u64,
    /// VMs that nobody has any more because an operator said so.
    pub lost_by_word: u64,
    /// Moves asked for whatever the VM was busy with.
    pub hasty: u64,
    /// Hand-overs that were given back and presented once more.
    pub redeemed: u64,
    /// Records that a broker found damaged.
    pub damaged: u64,
    /// VMs that went on while their source did not know that they had come, and were forgotten where they came.
    pub passed_on: u64,
}

impl Tally {
    pub fn add(&mut self, t: &Tally) {
        for (sum, n) in [
            (&mut self.events, t.events),
            (&mut self.steps, t.steps),
            (&mut self.moves, t.moves),
            (&mut self.crashes, t.crashes),
            (&mut self.hand_overs, t.hand_overs),
            (&mut self.returns, t.returns),
            (&mut self.cancelled, t.cancelled),
            (&mut self.steered, t.steered),
            (&mut self.failed_writes, t.failed_writes),
            (&mut self.lost, t.lost),
            (&mut self.repeated, t.repeated),
            (&mut self.replayed, t.replayed),
            (&mut self.attacks, t.attacks),
            (&mut self.withdrawals, t.withdrawals),
            (&mut self.restored, t.restored),
            (&mut self.resolved, t.resolved),
            (&mut self.resolved_wrongly, t.resolved_wrongly),
            (&mut self.lost_by_word, t.lost_by_word),
            (&mut self.hasty, t.hasty),
            (&mut self.redeemed, t.redeemed),
            (&mut self.damaged, t.damaged),
            (&mut self.passed_on, t.passed_on),
        ] {
            *sum += n;
        }
    }

    pub fn faults(&self) -> u64 {
        self.crashes + self.failed_writes + self.lost + self.repeated + self.replayed
    }
}

/// Federations in which nothing has happened yet: every run begins with a copy of one.
pub struct Beginnings([World; 3]);

impl Beginnings {
    pub fn new(law: Law) -> Self {
        let of = |runs, before| federation(CLOUDS, runs, before, law);
        Self([of(true, false), of(false, false), of(true, true)])
    }
}

struct Run {
    world: World,
    tally: Tally,
    backups: Vec<(usize, MemoryBook)>,
    /// All speak the version before, which tells nobody who owns what: nothing is restored then.
    before: bool,
    moves_left: usize,
    /// What operators asked to be started.
    starts: Vec<(usize, CallId)>,
    /// An operator stopped it, or decided what leaves it stopped, or it never ran.
    stopped: bool,
    /// A member lies all the time.
    lies: bool,
    /// An operator left it to a target that had not taken it over, without that one's word: should it be silent until
    /// the grace period is over, that is the end of the VM. They are told so.
    left_by_word: bool,
    /// Operators do not wait for what a VM is busy with, its record is damaged, and what was given back comes again.
    hasty: bool,
}

type Outcome = Result<(), String>;

/// One run; its tally, and a hash of all that happened in it.
pub fn run(beginnings: &Beginnings, seed: u64) -> Result<(Tally, u64), String> {
    let which = [0, 0, 0, 1, 2][seed as usize % 5];
    let mut world = beginnings.0[which].clone();
    world.random.0 = seed.wrapping_mul(0x2545_f491_4f6c_dd1d);
    world.log = Some(Vec::new());
    let moves_left = 2 + world.random.below(5);
    let mut run = Run {
        world,
        tally: Tally::default(),
        backups: Vec::new(),
        before: which == 2,
        moves_left,
        starts: Vec::new(),
        stopped: which == 1,
        lies: seed % 3 == 1,
        left_by_word: false,
        hasty: seed % 4 == 1,
    };
    if seed % 16 == 13 {
        run.passed_on()?;
    }
    let troubled = run.trouble();
    let happened = run.world.digest();
    match troubled.and_then(|()| run.heal()) {
        Err(what) if what == NOBODYS && run.left_by_word => run.tally.lost_by_word += 1,
        went => went?,
    }
    run.tally.steps = run.world.counts.steps;
    run.tally.crashes = run.world.counts.crashes;
    Ok((run.tally, happened))
}

impl Run {
    fn one_in(&mut self, n: usize) -> bool {
        self.world.random.below(n) == 0
    }

    fn trouble(&mut self) -> Outcome {
        let steps = 100 + self.world.random.below(300);
        // Where there is peace moves get further before something happens to them.
        let peace = self.world.random.below(4);
        self.world.failures = [0.05, 0.02, 0.0, 0.0][peace];
        self.set_clocks(OFF_FAULTY_MS);
        for _ in 0..steps {
            self.disturb([400, 1000, 3000, 3000][peace])?;
            if in_doubt(&self.world).is_some() && self.one_in(25) {
                self.silence_for_long();
                sound(&self.world)?;
                match self.one_in(2) {
                    true => self.resolve(),
                    // Who took it over passes it on, perhaps to where it is still in doubt.
                    false => drop(self.begin_move()),
                }
            }
            if self.lies && self.one_in(12) {
                match self.one_in(4) {
                    true => self.tally.withdrawals += u64::from(liar::withdraw(&mut self.world)),
                    false => self.tally.attacks += u64::from(liar::attack(&mut self.world)),
                }
            }
            if self.hasty && self.one_in(12) {
                match self.world.random.below(8) {
                    0..=2 => self.move_hastily(),
                    3 => drop(self.begin_move()),
                    4 | 5 => self.tally.redeemed += u64::from(liar::redeem(&mut self.world)),
                    6 => self.damage(),
                    _ => self.mend(),
                }
            }
            self.tally.events += 1;
            sound(&self.world)?;
        }
        Ok(())
    }

    /// Operators have a VM moved whatever it is busy with.
    fn move_hastily(&mut self) {
        let Some(from) = owners(&self.world).first().copied() else { return };
        let runs = self.world.clouds[from].power.get(&vm()) == Some(&PowerState::Running);
        match self.world.random.below(4) {
            0 if runs => self.stop(from),
            0 | 1 => self.start(from),
            _ => {}
        }
        let to = (from + 1 + self.world.random.below(MOVERS - 1)) % MOVERS;
        let to = Some(self.world.clouds[to].name().to_owned());
        self.tally.hasty += 1;
        let request =
            Request::Move(MoveRequest::Begin { vm: NAME.into(), to, dry_run: false, force_stop: true });
        self.world.call(from, request);
    }

    /// A broker dies, and the next one cannot read the record of the VM.
    fn damage(&mut self) {
        let n = self.world.random.below(CLOUDS);
        if self.world.clouds[n].book.has_vm(vm()) {
            self.tally.damaged += 1;
            self.world.crash(n, Duration::from_secs(1));
            self.world.clouds[n].book.damage(vm(), true);
        }
    }

    /// Operators put damaged records back as they were.
    fn mend(&mut self) {
        for n in 0..CLOUDS {
            if self.world.clouds[n].book.is_damaged(vm()) {
                self.world.crash(n, Duration::from_secs(1));
                self.world.clouds[n].book.damage(vm(), false);
            }
        }
    }

    /// The target of a move keeps the receipt that it gave in its record alone, and its source hears nothing of it until
    /// the VM has gone on and the target has forgotten it.
    fn passed_on(&mut self) -> Outcome {
        self.moves_left += 4;
        self.progress_until(400, |w| in_doubt(w).is_some())?;
        let Some((source, given)) = in_doubt(&self.world) else { return Ok(()) };
        let Some(target) = self.world.clouds.iter().position(|c| c.jid == given.to) else { return Ok(()) };
        if let Some(next) = self.next(|p| p.cloud == target && p.kind == Kind::Request) {
            match self.one_in(3) {
                true => {
                    let (writes, down) = (self.world.random.below(4) as u64, Duration::from_secs(1));
                    let death = Death { writes, effects: 0, hosts_go_on: true, down };
                    self.world.take_and_die(next.seq, death);
                }
                false => self.world.take_failing(next.seq, &[Page::Receipts]),
            }
        }
        sound(&self.world)?;
        self.world.partitions.push((source, target));
        self.progress_until(800, |w| {
            let record = w.clouds[target].book.vm(vm());
            record.is_some_and(|r| r.given_up().is_some_and(|g| g.receipt.is_some()))
        })?;
        self.delete(target);
        self.progress_until(20, |w| !w.clouds[target].book.has_vm(vm()))?;
        self.tally.passed_on += u64::from(!self.world.clouds[target].book.has_vm(vm()));
        // What it has in memory it would tell as well.
        self.world.crash(target, Duration::from_secs(1));
        self.world.partitions.clear();
        Ok(())
    }

    fn progress_until(&mut self, steps_max: usize, so: impl Fn(&World) -> bool) -> Outcome {
        for _ in 0..steps_max {
            if so(&self.world) {
                break;
            }
            self.progress();
            self.tally.events += 1;
            sound(&self.world)?;
        }
        Ok(())
    }

    /// Half of the time they are right.
    fn set_clocks(&mut self, off_ms: usize) {
        let right = self.one_in(2);
        for at in 0..CLOUDS {
            let ahead = if right { 0 } else { self.world.random.below(off_ms) as u64 };
            self.world.cloud(at).ahead_ms = ahead;
        }
    }

    fn disturb(&mut self, of: usize) -> Outcome {
        let n = self.world.random.below(CLOUDS);
        match self.world.random.below(of) {
            0..=5 => self.crash(n),
            6..=13 => self.lose(),
            14..=21 => self.repeat(),
            22..=27 => self.silence(),
            28..=31 => self.wait(n),
            32..=34 => self.cancel(n),
            35..=39 => self.failing_write(),
            40..=50 => self.world.write(vm()),
            51..=56 => self.steer(n),
            80..=90 => self.tally.attacks += u64::from(liar::attack(&mut self.world)),
            91..=94 => self.tally.withdrawals += u64::from(liar::withdraw(&mut self.world)),
            57..=65 => self.backups.push((n, self.world.clouds[n].book.copy())),
            66..=67 => return self.restore(),
            68..=72 | 95..=100 => self.resolve(),
            73 => self.delete(n),
            74 => self.stop(n),
            75..=76 => self.start(n),
            77 => match self.world.partitions.pop() {
                Some(_) => {}
                None => self.world.partitions.push((n, (n + 1) % CLOUDS)),
            },
            _ => self.progress(),
        }
        Ok(())
    }

    fn next(&mut self, wanted: impl Fn(&Pending) -> bool) -> Option<Pending> {
        let all: Vec<Pending> = self.world.pending().into_iter().filter(wanted).collect();
        (!all.is_empty()).then(|| all[self.world.random.below(all.len())])
    }

    /// One thing that was to happen happens; what only waiting brings comes when nothing else does, mostly.
    fn progress(&mut self) {
        if self.one_in(6) && self.begin_move() {
            return;
        }
        let waits = self.one_in(20);
        let next = match waits {
            true => self.next(|_| true),
            false => self.next(|p| p.kind.is_news()),
        };
        // The first thing for which something waits.
        let next = next.or_else(|| {
            let waited = |p: &Pending| !matches!(p.kind, Kind::Announce);
            self.world.pending().into_iter().filter(waited).min_by_key(|p| (p.at, p.seq))
        });
        if let Some(next) = next {
            tracing::debug!(?next, "happens");
            self.world.take(next.seq);
        }
    }

    fn begin_move(&mut self) -> bool {
        if self.moves_left == 0 {
            return false;
        }
        let Some(from) = owners(&self.world).first().copied() else { return false };
        if !open(&mut self.world, from).is_empty() {
            return false;
        }
        let to = (from + 1 + self.world.random.below(MOVERS - 1)) % MOVERS;
        let to = Some(self.world.clouds[to].name().to_owned());
        self.tally.moves += 1;
        self.moves_left -= 1;
        let request = Request::Move(MoveRequest::Begin {
            vm: NAME.into(),
            to,
            dry_run: false,
            force_stop: self.one_in(2),
        });
        self.world.call(from, request).is_some()
    }

    fn crash(&mut self, n: usize) {
        let down = Duration::from_millis(self.world.random.below(20_000) as u64);
        let hosts_go_on = self.one_in(2);
        let effects = self.world.random.below(4);
        let writes = self.world.random.below(5) as u64;
        match self.next(|p| p.cloud == n && p.kind != Kind::Announce) {
            Some(next) if !self.one_in(3) => {
                self.world.take_and_die(next.seq, Death { writes, effects, hosts_go_on, down });
            }
            _ => self.world.crash(n, down),
        }
    }

    fn failing_write(&mut self) {
        self.tally.failed_writes += 1;
        let Some(next) = self.next(|p| p.kind.is_news()) else { return };
        let pages = [Page::Vms, Page::Lineages, Page::Returns, Page::Receipts];
        match self.world.random.below(6) {
            4 => self.world.take_undecided(next.seq, true),
            5 => self.world.take_undecided(next.seq, false),
            n => self.world.take_failing(next.seq, &pages[n..=n]),
        }
    }

    fn lose(&mut self) {
        if let Some(next) = self.next(|p| matches!(p.kind, Kind::Request | Kind::Answer)) {
            self.tally.lost += 1;
            self.world.lose(next.seq);
        }
    }

    /// Something of long ago comes again, or of a moment ago.
    fn repeat(&mut self) {
        let said = self.world.log.as_ref().map_or(0, Vec::len);
        if said == 0 {
            return;
        }
        let recent = self.one_in(2);
        let at = if recent {
            said - 1 - self.world.random.below(said.min(4))
        } else {
            self.world.random.below(said)
        };
        if let Some(said) = self.world.log.as_ref().map(|log| log[at].clone()) {
            self.tally.repeated += 1;
            self.world.repeat(said);
        }
    }

    fn silence(&mut self) {
        if let Some(next) = self.next(|p| matches!(p.kind, Kind::Silence | Kind::Due)) {
            self.world.take(next.seq);
        }
    }

    /// So much time passes at a cloud that leases end.
    fn wait(&mut self, n: usize) {
        let by = if self.one_in(2) { LEASE_OVER } else { Duration::from_secs(5) };
        self.world.pass(n, by);
        if let Some(tick) = self.next(|p| p.cloud == n && p.kind == Kind::Tick) {
            self.world.take(tick.seq);
        }
    }

    fn cancel(&mut self, n: usize) {
        for id in open(&mut self.world, n) {
            self.tally.cancelled += 1;
            self.world.call(n, Request::Move(MoveRequest::Cancel { id: id.to_string() }));
        }
    }

    /// Operators of either side have the guest held, or switched over.
    fn steer(&mut self, n: usize) {
        for id in open(&mut self.world, n) {
            self.tally.steered += 1;
            let id = id.to_string();
            let hold = self.one_in(2);
            let request = if hold {
                Request::Move(MoveRequest::Hold { id })
            } else {
                Request::Move(MoveRequest::SwitchOver { id })
            };
            self.world.call(n, request);
        }
    }

    fn stop(&mut self, n: usize) {
        self.stopped = true;
        let vm = NAME.to_owned();
        self.world
            .call(n, Request::Vm(VmRequest::Stop { vm, force: true, timeout_s: None, for_host: false }));
    }

    /// An operator starts it; never where it was taken back by word while another cloud has it.
    fn start(&mut self, n: usize) {
        let by_word = self.world.clouds[n].book.vm(vm()).is_some_and(|r| r.taken_back.is_some());
        if !by_word || owners(&self.world).is_empty() && in_doubt(&self.world).is_none() {
            let request = Request::Vm(VmRequest::Start { vm: NAME.into(), unconfirmed: false, by_uid: None });
            self.starts.extend(self.world.call(n, request).map(|call| (n, call)));
        }
    }

    /// An operator scrubs the copy that a VM left behind.
    fn delete(&mut self, n: usize) {
        let given = self.world.clouds[n].book.vm(vm()).is_some_and(|r| !r.is_here());
        if given {
            self.world.call(
                n,
                Request::Vm(VmRequest::Delete { vm: NAME.into(), taken_for: Some(Deleted::KeptCopy) }),
            );
        }
    }

    /// The source of a hand-over hears nothing of its target for so long that it counts as in doubt.
    fn silence_for_long(&mut self) {
        let Some((at, _)) = in_doubt(&self.world) else { return };
        for _ in 0..12 {
            while let Some(word) = self.next(|p| p.cloud == at && p.kind == Kind::Answer) {
                self.world.lose(word.seq);
            }
            let waits = |p: &Pending| p.cloud == at && matches!(p.kind, Kind::Silence | Kind::Due);
            match self.world.pending().into_iter().filter(waits).min_by_key(|p| (p.at, p.seq)) {
                Some(next) => drop(self.world.take(next.seq)),
                None => return,
            }
        }
    }

    /// An operator decides what is in doubt, mostly rightly.
    fn resolve(&mut self) {
        let Some((at, given)) = in_doubt(&self.world) else { return };
        let taken = owners(&self.world).iter().any(|owner| *owner != at);
        let wrong = self.one_in(4);
        let owner = if taken != wrong { Side::There } else { Side::Here };
        let id = given.migration.to_string();
        let request = Request::Move(MoveRequest::Resolve { id, owner, confirmed: true, by_uid: None });
        if let Some(call) = self.world.call(at, request)
            && matches!(self.world.reply(at, call), Some(Ok(Reply::Resolution(_))))
        {
            self.tally.resolved += 1;
            self.tally.resolved_wrongly += u64::from(wrong);
            self.left_by_word |= wrong && owner == Side::There;
        }
    }

    /// A cloud that does not own the VM, and to which it is not going, comes back from a backup.
    fn restore(&mut self) -> Outcome {
        if self.backups.is_empty() || self.before {
            return Ok(());
        }
        let which = self.world.random.below(self.backups.len());
        let (n, backup) = self.backups.swap_remove(which);
        let involved = (0..CLOUDS).any(|at| !open(&mut self.world, at).is_empty());
        let record = self.world.clouds[n].book.vm(vm());
        let owns = record.as_ref().is_some_and(|r| r.is_here());
        // What its own operator or another's decided meanwhile is not undone by a backup: that loses the VM.
        let decided = records(&self.world).any(|(_, r)| r.taken_back.is_some());
        if owns || involved || decided || in_doubt(&self.world).is_some() {
            return Ok(());
        }
        self.tally.restored += 1;
        let same_machine = self.one_in(2);
        self.world.restore(n, backup, same_machine)
    }

    /// Faults end; all comes to rest, also where old messages come again to brokers that forgot them.
    fn heal(&mut self) -> Outcome {
        self.set_clocks(OFF_HEALED_MS);
        self.mend();
        self.settle()?;
        self.ask_again();
        rests(&mut self.world)?;
        let decided = self.stopped || self.tally.resolved + self.tally.restored > 0;
        if let Some((at, _)) = records(&self.world).find(|(_, r)| r.is_here() && !r.run && !decided) {
            return Err(format!("it ran, and is not to run any more in {}", self.world.clouds[at].name()));
        }
        self.count();
        if self.one_in(3) { self.replay() } else { Ok(()) }
    }

    /// An operator whose broker died over a stop before it answered asks again, and one whose start failed.
    fn ask_again(&mut self) {
        let failed = |w: &World, (at, call): &(usize, CallId)| !matches!(w.reply(*at, *call), Some(Ok(_)));
        let starts = std::mem::take(&mut self.starts);
        let again: Vec<usize> =
            starts.iter().filter(|asked| failed(&self.world, asked)).map(|(at, _)| *at).collect();
        for at in again {
            if self.world.clouds[at].book.vm(vm()).is_some_and(|r| r.is_here() && r.run) {
                let vm = NAME.to_owned();
                self.world.call(at, Request::Vm(VmRequest::Start { vm, unconfirmed: false, by_uid: None }));
            }
        }
        for at in 0..MOVERS {
            let record = self.world.clouds[at].book.vm(vm());
            let runs = self.world.clouds[at].power.get(&vm()) == Some(&PowerState::Running);
            if runs && record.is_some_and(|r| r.is_here() && !r.run) {
                let vm = NAME.to_owned();
                self.world.call(
                    at,
                    Request::Vm(VmRequest::Stop { vm, force: true, timeout_s: None, for_host: false }),
                );
            }
        }
    }

    /// What is contested only operators can end: the one that took it over by a signed hand-over keeps it.
    fn settle(&mut self) -> Outcome {
        self.world.in_time();
        (self.world.failures, self.world.links.loss) = (0.0, 0.0);
        self.world.partitions.clear();
        for _ in 0..40 {
            self.world.run_until(self.world.now.plus(Duration::from_secs(60)), |w, _| sound(w))?;
            let contested = records(&self.world).find_map(|(at, r)| match (&r.arrival, r.taken_back) {
                _ if !r.is_here() => None,
                (_, Some(id)) if r.contested.is_some() => Some((at, id, Side::There)),
                (Some(a), _) if a.contested.is_some() => Some((at, a.migration, Side::Here)),
                _ => r.disproved.as_ref().and_then(|d| d.hand_over()).map(|h| (at, h.migration, Side::There)),
            });
            let Some((at, id, owner)) = contested else {
                // What is still asked may turn out to be contested.
                let quiet =
                    |c: &std::rc::Rc<cicada::sim::Cloud>| c.broker.as_ref().is_some_and(|b| b.is_quiet());
                if self.world.clouds.iter().all(quiet) {
                    return Ok(());
                }
                continue;
            };
            let force = Request::Vm(VmRequest::Stop {
                vm: NAME.into(),
                force: true,
                timeout_s: None,
                for_host: false,
            });
            if owner == Side::There {
                self.world.call(at, force);
                self.world.run_until(self.world.now.plus(Duration::from_secs(5)), |w, _| sound(w))?;
            }
            let id = id.to_string();
            self.world
                .call(at, Request::Move(MoveRequest::Resolve { id, owner, confirmed: true, by_uid: None }));
            // Nothing contested is started by itself, also once it is not any more: whoever has it then starts it.
            self.starts.extend((0..CLOUDS).map(|at| (at, CallId(u64::MAX))));
        }
        Err("what is contested cannot be settled".into())
    }

    fn count(&mut self) {
        for at in 0..CLOUDS {
            let Some(call) = self.world.call(at, Request::Move(MoveRequest::List)) else { continue };
            let Some(Ok(Reply::Migrations(all))) = self.world.reply(at, call) else { continue };
            let mine = all.iter().filter(|m| m.progress.role.as_str() == "source");
            for m in mine {
                match m.progress.handed_over {
                    true => self.tally.hand_overs += 1,
                    false => self.tally.returns += 1,
                }
            }
        }
    }

    /// Everything ever said is said again, to clouds that restarted and forgot the nonces.
    fn replay(&mut self) -> Outcome {
        let owner = |w: &World| records(w).find(|(_, r)| r.is_here()).map(|(at, r)| (at, r.epoch));
        let before = owner(&self.world);
        (0..CLOUDS).for_each(|at| self.world.crash(at, Duration::from_secs(1)));
        self.world.run_until(self.world.now.plus(Duration::from_secs(2)), |w, _| sound(w))?;
        let said: Vec<_> = self.world.log.take().unwrap_or_default();
        for said in said.into_iter().take(REPLAYED_MAX) {
            self.tally.replayed += 1;
            self.world.repeat(said);
        }
        rests(&mut self.world)?;
        match owner(&self.world) == before {
            true => Ok(()),
            false => Err(format!("old messages moved the VM: {before:?} to {:?}", owner(&self.world))),
        }
    }
}

/// Runs of these seeds; their tally and how many of them were different, or the first that broke a rule.
pub fn runs(law: Law, seeds: std::ops::Range<u64>) -> Result<(Tally, usize), (u64, String)> {
    const WORKERS: u64 = 2;
    // No later run is of interest then.
    let broken = AtomicU64::new(u64::MAX);
    let results: Vec<_> = std::thread::scope(|scope| {
        let of = |worker: u64| seeds.clone().filter(move |seed| seed % WORKERS == worker);
        let work = |worker: u64| {
            let (seeds, broken) = (of(worker), &broken);
            scope.spawn(move || {
                let beginnings = Beginnings::new(law);
                let (mut sum, mut happened) = (Tally::default(), HashSet::new());
                for seed in seeds {
                    if seed > broken.load(Ordering::Relaxed) {
                        break;
                    }
                    let (tally, digest) = run(&beginnings, seed).map_err(|what| {
                        broken.fetch_min(seed, Ordering::Relaxed);
                        (seed, what)
                    })?;
                    sum.add(&tally);
                    happened.insert(digest);
                }
                Ok((sum, happened))
            })
        };
        let threads: Vec<_> = (0..WORKERS).map(work).collect();
        threads.into_iter().map(|t| t.join().expect("a run panicked")).collect()
    });
    let (mut sum, mut happened) = (Tally::default(), HashSet::new());
    if let Some(first) = results.iter().filter_map(|r| r.as_ref().err()).min_by_key(|(seed, _)| *seed) {
        return Err(first.clone());
    }
    for (tally, digests) in results.into_iter().flatten() {
        sum.add(&tally);
        happened.extend(digests);
    }
    Ok((sum, happened.len()))
}
