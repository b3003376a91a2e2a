//! Level 3: what the broker's core wants done is done here, and what came of it is told to the core. One task
//! hands inputs to the core and begins its effects; everything that takes time runs beside it.

pub mod check;
pub mod content;
pub mod continuity;
mod conversations;
mod given;
pub mod host;
pub mod inbox;
mod measure;
mod moves;
mod notes;
mod perform;
pub mod record_dir;
pub mod shared;

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::{broadcast, mpsc, oneshot};

use crate::broker::book::{Book, RecordError};
use crate::broker::effect::DisksOf;
use crate::broker::ids::Ids;
use crate::broker::{self, AskId, Beginning, Broker, CallId, Done, Effect, RoomInput, Token};
use crate::federation::Members;
use crate::hypervisor::DriverEvent;
use crate::interface::{Event, Problem, Reply, Request, VmRequest, chain};
use crate::migration::Law;
use crate::migration::records::VmRecord;
use crate::recording::{self, Recorder};
use crate::stanza::Cloud;
use crate::types::{MemberJid, Successions, VmId};

pub use given::Given;
pub use inbox::{Inbox, Inputs, inbox};
pub use record_dir::{RecordBook, Records};
pub use shared::{AskError, Link, LinkError, Shared};

use continuity::Continuity;
use measure::Measuring;
use moves::Moves;

/// What comes from outside, with the ways to answer it; and what comes back from effects.
pub enum Input {
    /// An operator's request.
    Call {
        request: Box<Request>,
        given: Arc<Given>,
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
    /// For the core as it is.
    Core(Box<broker::Input>),
    /// An outcome, with what has to be kept until the core has taken it in.
    Done(Token, Box<Done>, Option<Box<dyn Any + Send>>),
    /// Whether a record was made durable is unknown.
    Undecided(String),
    /// Once a second.
    Tick,
    Shutdown,
}

/// The broker ended because it could not know what it recorded.
#[derive(Debug, thiserror::Error)]
#[error("the broker ended: {0}")]
pub struct Ended(pub String);

/// An operator who waits.
struct Caller {
    given: Arc<Given>,
    events: mpsc::Sender<Event>,
    reply: oneshot::Sender<Result<Reply, Problem>>,
}

/// Runs a broker's core.
pub struct Runner {
    broker: Broker,
    hands: Hands,
    recorder: Option<Recorder>,
}

/// What performs effects.
struct Hands {
    shared: Arc<Shared>,
    calls: BTreeMap<CallId, Caller>,
    asks: BTreeMap<AskId, oneshot::Sender<Option<Vec<u8>>>>,
    next_id: u64,
    moves: Moves,
    measuring: Measuring,
    continuity: Continuity,
    announce: Box<dyn Fn(Cloud) + Send>,
    optimizing: tokio_util::sync::CancellationToken,
    index_retry: crate::clock::UnixMillis,
    /// Outcomes of what was done to VMs, on their way past the hypervisor's events.
    outcomes: mpsc::UnboundedSender<Outcome>,
    outcomes_in: Option<mpsc::UnboundedReceiver<Outcome>>,
}

/// An outcome of something done to a VM. The hypervisor's events of before come first.
struct Outcome {
    vm: VmId,
    token: Token,
    done: Done,
}

impl Runner {
    /// Reads the durable records. `announce` publishes this cloud's presence; what the core takes in and decides
    /// goes to `recorder` as well.
    ///
    /// # Errors
    /// If the records cannot be read as a whole, or there is no random source.
    pub fn open(
        shared: Arc<Shared>,
        members: Members,
        announce: Box<dyn Fn(Cloud) + Send>,
        mut recorder: Option<Recorder>,
    ) -> Result<Self, RecordError> {
        let continuity = Continuity::of(shared.records.dir());
        let beginning = Beginning {
            config: shared.config.clone(),
            key: Arc::new(shared.key.clone()),
            features: shared.driver.features().clone(),
            transfer_addresses: shared.config.transfer.addresses(shared.endpoint.local_addr().ok()),
            vms_dir: shared.records.vms_dir(),
            disk_dirs: host::stage::disk_dirs(&shared),
            marks: continuity.found(),
            ids: Ids::new(seed()),
            now: shared.now(),
            law: Law::WHOLE,
        };
        let book: Box<dyn Book> = Box::new(RecordBook::new(shared.records.clone()));
        let (beginning, book) = match &mut recorder {
            Some(recorder) => recorder.wrap(beginning, book, members.keyring().clone()),
            None => (beginning, book),
        };
        let broker = Broker::open(book, members, beginning)?;
        let (outcomes, outcomes_in) = mpsc::unbounded_channel();
        let hands = Hands {
            shared,
            calls: BTreeMap::new(),
            asks: BTreeMap::new(),
            next_id: 0,
            moves: Moves::default(),
            measuring: Measuring::default(),
            continuity,
            announce,
            optimizing: tokio_util::sync::CancellationToken::new(),
            index_retry: crate::clock::UnixMillis(0),
            outcomes,
            outcomes_in: Some(outcomes_in),
        };
        Ok(Self { broker, hands, recorder })
    }

    /// See [`Broker::after_restore`].
    pub fn after_restore(self) -> Result<Self, RecordError> {
        let mut recorder = self.recorder;
        if let Some(recorder) = &mut recorder {
            recorder.set_after_restore();
        }
        Ok(Self { broker: self.broker.after_restore()?, hands: self.hands, recorder })
    }

    /// See [`Broker::with_successions`].
    pub fn with_successions(self, successions: Successions) -> Self {
        let mut recorder = self.recorder;
        if let Some(recorder) = &mut recorder {
            recorder.set_successions(&successions);
        }
        Self { broker: self.broker.with_successions(successions), hands: self.hands, recorder }
    }

    /// Runs until [`Input::Shutdown`]; VMs keep running.
    ///
    /// # Errors
    /// If it became unknown what is recorded: nothing was done after that.
    pub async fn run(mut self, mut inputs: Inputs) -> Result<(), Ended> {
        let shared = self.hands.shared.clone();
        host::rehearsal::end_left_over(&shared).await;
        // Before the first look, so that nothing between is missed.
        let events = shared.driver.events();
        for record in self.broker.records_here() {
            let machine = host::machine::machine_of(&shared, record);
            if let Err(e) = shared.driver.define(&machine).await {
                tracing::error!(vm = %record.spec.name, error = chain(&e), "cannot be defined");
            }
        }
        if let Some(outcomes) = self.hands.outcomes_in.take() {
            tokio::spawn(pump(shared.clone(), events, outcomes));
        }
        self.measure();
        let machines = broker::Input::Machines(shared.driver.list());
        if self.step(machines)? {
            return Ok(());
        }
        while let Some(input) = inputs.next().await {
            let ends = match input {
                Input::Call { request, given, events, reply } => {
                    self.look_around()?;
                    if shows_disks(&request) {
                        self.measure_anew(None);
                    }
                    let call = CallId(self.hands.id());
                    self.hands.calls.insert(call, Caller { given, events, reply });
                    self.step(broker::Input::Call(call, *request))?
                }
                Input::Asked { from, payload, reply } => {
                    self.measure();
                    let ask = AskId(self.hands.id());
                    self.hands.asks.insert(ask, reply);
                    self.step(broker::Input::Asked(ask, from, payload))?
                }
                Input::Room(input) => self.step(broker::Input::Room(input))?,
                Input::Core(input) => self.step(*input)?,
                Input::Done(token, done, keep) => {
                    match &*done {
                        Done::Made(Ok(record)) => self.measure_anew(Some(record)),
                        Done::Adopted(Ok(adopted)) => self.measure_anew(adopted.1.as_ref()),
                        _ => self.measure(),
                    }
                    self.tell_sent()?;
                    let ends = self.step(broker::Input::Done(token, *done))?;
                    drop(keep);
                    ends
                }
                Input::Undecided(reason) => return Err(Ended(reason)),
                Input::Tick => {
                    self.look_around()?;
                    self.hands.heal_index();
                    self.step(broker::Input::Tick)?
                }
                Input::Shutdown => self.step(broker::Input::Shutdown)?,
            };
            if ends {
                break;
            }
        }
        if let Some(recorder) = &mut self.recorder {
            recorder.end(recording::End::Stopped);
        }
        Ok(())
    }

    /// One step of the core, and the begin of all that it wants done. Whether the broker ends.
    fn step(&mut self, input: broker::Input) -> Result<bool, Ended> {
        let effects = self.decide(input);
        let mut ends = false;
        for effect in effects {
            match effect {
                Effect::End(reason) => return Err(Ended(reason)),
                Effect::Shutdown => ends = true,
                effect => self.hands.perform(effect),
            }
        }
        Ok(ends)
    }

    /// What the core decides, recorded if that is wanted.
    fn decide(&mut self, input: broker::Input) -> Vec<Effect> {
        let now = self.hands.shared.now();
        let Some(recorder) = &mut self.recorder else { return self.broker.step(now, input) };
        let recorded = recorder.before(&input);
        let effects = self.broker.step(now, input);
        recorder.after(now, recorded, &effects);
        effects
    }

    /// Tells the core what it cannot see: what was refused, what was sent, what disks take up.
    fn look_around(&mut self) -> Result<(), Ended> {
        let by_link = self.hands.shared.tickets.take_refused();
        if !by_link.is_empty() {
            self.step(broker::Input::LinkRefused(by_link))?;
        }
        let overrun = self.hands.shared.inbox.take_refused();
        if !overrun.is_empty() {
            self.step(broker::Input::Overrun(overrun))?;
        }
        self.measure();
        self.tell_sent()
    }

    fn tell_sent(&mut self) -> Result<(), Ended> {
        let sent = self.hands.moves.sent_bytes();
        if !sent.is_empty() {
            self.step(broker::Input::Sent(sent))?;
        }
        Ok(())
    }

    /// What the disk is like, unless that was measured a moment ago: asking anew for every request would make
    /// the members that ask most slow down the others.
    fn measure(&mut self) {
        let hands = &mut self.hands;
        if let Some(measured) = hands.measuring.due(&hands.shared, &self.broker) {
            self.take_measured(measured);
        }
    }

    /// As it is at this moment, with the disks of a VM that the core does not know yet.
    fn measure_anew(&mut self, more: Option<&VmRecord>) {
        let hands = &mut self.hands;
        let measured = hands.measuring.anew(&hands.shared, &self.broker, more.map(DisksOf::record));
        self.take_measured(measured);
    }

    fn take_measured(&mut self, measured: broker::Measured) {
        let effects = self.decide(broker::Input::Measured(Box::new(measured)));
        effects.into_iter().for_each(|effect| self.hands.perform(effect));
    }
}

/// Whether an operator sees what disks take up.
fn shows_disks(request: &Request) -> bool {
    matches!(
        request,
        Request::Vm(VmRequest::List)
            | Request::Vm(VmRequest::Show { .. })
            | Request::Vm(VmRequest::Delete { .. })
    )
}

impl Hands {
    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn reply(&mut self, call: CallId, result: Result<Reply, Problem>) {
        if let Some(caller) = self.calls.remove(&call) {
            let _ = caller.reply.send(result);
        }
    }

    /// What was handed over with a call.
    fn given_with(&self, call: CallId) -> Arc<Given> {
        self.calls.get(&call).map(|caller| caller.given.clone()).unwrap_or_default()
    }

    /// The events of a call; of one that nobody waits for, a channel that is closed.
    fn events_of(&self, call: CallId) -> mpsc::Sender<Event> {
        match self.calls.get(&call) {
            Some(caller) => caller.events.clone(),
            None => mpsc::channel(1).0,
        }
    }
}

/// Carries the hypervisor's events and the outcomes of what was done to VMs to the core, in the order in which
/// they came to be: with each, the state the VM is in by then.
async fn pump(
    shared: Arc<Shared>,
    mut events: broadcast::Receiver<DriverEvent>,
    mut outcomes: mpsc::UnboundedReceiver<Outcome>,
) {
    use broadcast::error::{RecvError, TryRecvError};
    let state = |vm: VmId| shared.driver.state(vm).unwrap_or(crate::vm::PowerState::Stopped);
    let tell = |event: DriverEvent| {
        let power = state(event.vm);
        shared.tell(broker::Input::Machine(event, power));
    };
    let all = || shared.tell(broker::Input::Machines(shared.driver.list()));
    loop {
        tokio::select! {
            biased;
            event = events.recv() => match event {
                Ok(event) => tell(event),
                Err(RecvError::Lagged(_)) => all(),
                Err(RecvError::Closed) => return,
            },
            outcome = outcomes.recv() => {
                let Some(Outcome { vm, token, done }) = outcome else { return };
                loop {
                    match events.try_recv() {
                        Ok(event) => tell(event),
                        Err(TryRecvError::Lagged(_)) => all(),
                        Err(TryRecvError::Empty | TryRecvError::Closed) => break,
                    }
                }
                shared.tell(broker::Input::Power(vm, state(vm)));
                shared.post(Input::Done(token, Box::new(done), None));
            }
        }
    }
}

/// Random bytes for the core's ids.
fn seed() -> [u8; 32] {
    let mut seed = [0; 32];
    seed[..16].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    seed[16..].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    seed
}
