//! Conversations between simulated brokers: requests and answers, sealed as on the wire, and what a check or a plan
//! is made of.

use std::rc::Rc;
use std::time::Duration;

use crate::broker::effect::{Checked, Done, Input, Matter, Peer, Unanswered};
use crate::broker::planning::{reason, unasked};
use crate::broker::talks::Next;
use crate::broker::{AskId, Token};
use crate::interface::Verdict;
use crate::migration::envelope::{LIFETIME, VERSION};
use crate::migration::records::VmRecord;
use crate::migration::{AnswerBody, Denial, DenialCode, Envelope, RequestBody};
use crate::types::{CloudName, MemberJid, MigrationId, VmId};
use crate::vm::VmSpec;

use super::cloud::{Answered, Asks, Checking, Job, Planning, Talk, Talking};
use super::counts::Subject;
use super::helper::{Chore, Made, Order};
use super::queue::{Event, Kind, Said};
use super::world::{World, mix};

/// How long an unanswered request is waited for.
const ASK_TIMEOUT_MS: u64 = 10_000;
/// How often, and after how long, one that is asked too much at once is asked again: as the runner does.
const PATIENCE: u32 = 10;
const WAIT_MS_MIN: u64 = 100;
const WAIT_MS_MAX: u64 = 5000;
/// What the one that is asked by hand may do before it answers.
const HAND_STEPS_MAX: usize = 20;

impl World {
    // --- requests and answers ---

    #[allow(clippy::too_many_arguments)]
    pub(super) fn talk(
        &mut self,
        at: usize,
        token: Token,
        to: Peer,
        about: Matter,
        talk: Talk,
        body: RequestBody,
        plan: Option<u64>,
    ) {
        let of = self.cloud(at);
        let id = of.id();
        let job = Job { token, life: of.life };
        let (nonce, body_kept, patience) = (String::new(), None, PATIENCE);
        let talking = Talking { job, to, about, asked: 0, nonce, body: body_kept, patience, talk, plan };
        of.talks.insert(id, talking);
        self.request(at, id, body);
    }

    fn request(&mut self, at: usize, id: u64, body: RequestBody) {
        let of = self.cloud(at);
        let asked = of.id();
        let Some(talking) = of.talks.get_mut(&id) else { return };
        (talking.asked, talking.nonce) = (asked, format!("{at:016x}{asked:016x}"));
        talking.body = Some(Box::new(body.clone()));
        let subject = Subject::of(&body);
        let answered = Answered { cloud: at, life: talking.job.life, talk: id, asked, about: subject };
        let (to, about, nonce) = (talking.to.jid.clone(), talking.about, talking.nonce.clone());
        let version = of.versions.get(&to).copied().unwrap_or(VERSION);
        let target = self.by_jid.get(&to).copied();
        let envelope = self.envelope(at, to, about, version, nonce, body);
        self.counts.sent(subject);
        let lost = self.random.chance(self.links.loss);
        let target = target.filter(|to| !lost && !self.is_cut(at, *to));
        if let (Some(helper), Some(to), None) = (&self.helper, target, &self.log) {
            let key = self.clouds[at].key.clone();
            let sealing = Some(helper.order(Chore::Seal { envelope: Box::new(envelope), key }));
            let said = Said { from: self.clouds[at].jid.clone(), to, payload: Rc::default() };
            let answered = answered.clone();
            self.later(to, self.links.latency_ms, Event::Request { said, answered, sealing });
        } else if let (Some(to), Ok(payload)) = (target, envelope.seal(&self.clouds[at].key)) {
            self.counts.carried(subject, payload.len());
            let said = Said { from: self.clouds[at].jid.clone(), to, payload: Rc::new(payload) };
            if let Some(log) = &mut self.log {
                log.push(said.clone());
            }
            let answered = answered.clone();
            self.later(to, self.links.latency_ms, Event::Request { said, answered, sealing: None });
        }
        self.later(at, ASK_TIMEOUT_MS, Event::Answer { answered, sealed: None, opening: None });
    }

    fn envelope(
        &self,
        at: usize,
        to: MemberJid,
        about: Matter,
        version: u32,
        nonce: String,
        body: RequestBody,
    ) -> Envelope<RequestBody> {
        let of = &self.clouds[at];
        let issued = self.now_at(at);
        Envelope {
            version,
            from: of.jid.clone(),
            to,
            migration: about.migration,
            vm: about.vm,
            epoch: about.epoch,
            nonce,
            issued,
            expires: issued.plus(LIFETIME),
            body,
        }
    }

    /// Says something in a member's name, whatever its broker thinks of it, and lets the one that is asked do
    /// nothing else until it answers.
    pub fn say(
        &mut self,
        by: usize,
        to: usize,
        about: Matter,
        version: u32,
        body: RequestBody,
    ) -> Option<AnswerBody> {
        self.enter(to);
        self.clouds[to].broker.as_ref()?;
        let asked = self.cloud(by).id();
        let jid = self.clouds[to].jid.clone();
        // It goes by the clock of whom it asks.
        let theirs = self.clouds[to].ahead_ms;
        let ahead_ms = std::mem::replace(&mut self.cloud(by).ahead_ms, theirs);
        let subject = Subject::of(&body);
        let nonce = format!("{by:016x}{asked:016x}");
        let envelope = self.envelope(by, jid.clone(), about, version, nonce, body);
        let payload = envelope.seal(&self.clouds[by].key).ok();
        self.cloud(by).ahead_ms = ahead_ms;
        self.note(to, mix(asked, by as u64));
        let ask = AskId(self.cloud(to).id());
        let answered = Answered { cloud: by, life: u32::MAX, talk: 0, asked, about: subject };
        self.cloud(to).awaited.insert(ask, answered);
        let from = self.clouds[by].jid.clone();
        (self.by_hand, self.asks_by_hand) = (None, Some(asked));
        self.step(to, Input::Asked(ask, from, payload?));
        self.cloud(to).clock = self.now;
        for _ in 0..HAND_STEPS_MAX {
            if self.by_hand.is_some() {
                break;
            }
            let next = self.pending().into_iter().find(|p| p.cloud == to && p.kind == Kind::Outcome)?;
            self.take(next.seq);
        }
        let (sealed, of) = (self.by_hand.take()??, &self.clouds[to]);
        let now = self.now_at(to);
        let open = Envelope::<AnswerBody>::open(&sealed, &of.key.public(), &jid, &self.clouds[by].jid, now);
        open.ok().map(|answer| answer.body)
    }

    /// A request arrives.
    pub(super) fn arrives(&mut self, said: Said, answered: Answered) {
        let to = said.to;
        if self.clouds[to].broker.is_some() {
            let ask = AskId(self.cloud(to).id());
            self.cloud(to).awaited.insert(ask, answered);
            self.measure(to);
            self.step(to, Input::Asked(ask, said.from, said.payload.to_vec()));
        }
    }

    /// A request arrives that was sealed on its way.
    pub(super) fn arrives_sealed(&mut self, said: Said, answered: Answered, sealing: &Order) {
        if let Made::Sealed(Some(payload)) = sealing.made() {
            self.counts.carried(answered.about, payload.len());
            self.arrives(Said { payload: Rc::new(payload), ..said }, answered);
        }
    }

    /// A request arrives once more; nobody waits for the answer.
    pub(super) fn deliver_again(&mut self, said: Said) {
        let answered = Answered { cloud: said.to, life: u32::MAX, talk: 0, asked: 0, about: Subject::Other };
        self.later(said.to, 0, Event::Request { said, answered, sealing: None });
    }

    pub(super) fn send_answer(&mut self, at: usize, answered: Answered, sealed: Option<Vec<u8>>) {
        self.counts.sent(answered.about);
        if answered.life == u32::MAX {
            if self.asks_by_hand == Some(answered.asked) {
                self.by_hand = Some(sealed);
            }
            return;
        }
        if self.random.chance(self.links.loss) || self.is_cut(at, answered.cloud) {
            return;
        }
        if let Some(sealed) = sealed {
            self.counts.carried(answered.about, sealed.len());
            let to = answered.cloud;
            let opening = self.helper.as_ref().and_then(|helper| {
                let talking = self.clouds[to].talks.get(&answered.talk)?;
                Some(helper.order(Chore::Open {
                    sealed: sealed.clone(),
                    key: talking.to.key,
                    by: talking.to.jid.clone(),
                    to: self.clouds[to].jid.clone(),
                    at: self.now_at(to).plus(Duration::from_millis(self.links.latency_ms)),
                }))
            });
            self.later(to, self.links.latency_ms, Event::Answer { answered, sealed: Some(sealed), opening });
        }
    }

    pub(super) fn heard(&mut self, answered: &Answered, sealed: Option<Vec<u8>>, opening: Option<Order>) {
        let (at, now) = (answered.cloud, self.now_at(answered.cloud));
        let cloud = &self.clouds[at];
        let Some(talking) = cloud.talks.get(&answered.talk).filter(|t| t.asked == answered.asked) else {
            return;
        };
        let opened = sealed.as_ref().and_then(|sealed| match opening.map(|opening| opening.made()) {
            Some(Made::Opened(opened)) => opened.map(|opened| *opened),
            _ => Envelope::<AnswerBody>::open(sealed, &talking.to.key, &talking.to.jid, &cloud.jid, now).ok(),
        });
        let opened = opened.filter(|answer| answer.nonce == talking.nonce);
        // What comes late answers nothing any more.
        if sealed.is_some() && opened.is_none() {
            return;
        }
        match opened.map(|answer| answer.body) {
            Some(AnswerBody::Denied(d)) if d.code == DenialCode::RateLimited => {
                self.put_off(at, answered.talk, d);
            }
            Some(body) => self.answer_to(at, answered.talk, body),
            None => self.conclude(at, answered.talk, Err(Unanswered("no answer in time".into()))),
        }
    }

    /// As the runner: one that was asked too much at once is asked again when it says.
    fn put_off(&mut self, at: usize, id: u64, d: Denial) {
        self.counts.put_off += 1;
        let Some(talking) = self.cloud(at).talks.get_mut(&id) else { return };
        if talking.patience == 0 {
            return self.conclude(at, id, Ok(AnswerBody::Denied(d)));
        }
        talking.patience -= 1;
        let (life, talk, asked) = (talking.job.life, id, talking.asked);
        let wait_ms = d.retry_after_ms.unwrap_or(0).clamp(WAIT_MS_MIN, WAIT_MS_MAX);
        self.later(at, wait_ms, Event::AskAgain { life, talk, asked });
    }

    pub(super) fn ask_again(&mut self, at: usize, id: u64) {
        let body = self.cloud(at).talks.get_mut(&id).and_then(|talking| talking.body.take());
        if let Some(body) = body {
            self.request(at, id, *body);
        }
    }

    fn answer_to(&mut self, at: usize, id: u64, body: AnswerBody) {
        let Some(talking) = self.cloud(at).talks.get_mut(&id) else { return };
        talking.patience = PATIENCE;
        let peer = talking.to.clone();
        match &mut talking.talk {
            Talk::One => self.conclude(at, id, Ok(body)),
            Talk::Reserve(talk) => match talk.answered(body) {
                Next::Ask(next) => self.request(at, id, *next),
                Next::End(answer) => self.conclude(at, id, Ok(*answer)),
            },
            Talk::Owners(talk) => {
                let shown = talk.answered(body);
                let next = talk.next_question();
                for shown in shown {
                    use crate::broker::book::Book;
                    let vm = shown.claim.vm;
                    if let Ok(kept) = self.clouds[at].book.lineage(vm)
                        && let Ok(lineage) = shown.verified(&kept)
                    {
                        self.step(at, Input::Shown(peer.clone(), vm, Box::new(lineage)));
                    }
                }
                match next {
                    Some(body) => self.request(at, id, body),
                    None => self.conclude(at, id, Ok(AnswerBody::Owners { known: Vec::new() })),
                }
            }
            Talk::Check(_) => self.check_answered(at, id, body),
        }
    }

    /// A conversation is over.
    fn conclude(&mut self, at: usize, id: u64, answer: Result<AnswerBody, Unanswered>) {
        let Some(talking) = self.cloud(at).talks.remove(&id) else { return };
        let done = match talking.talk {
            Talk::One | Talk::Reserve(_) => Done::Answered(answer),
            Talk::Owners(_) => Done::OwnersSaid(answer.map(drop)),
            Talk::Check(checking) => {
                let why = match answer {
                    Ok(AnswerBody::Denied(d)) => d,
                    Ok(_) => Denial::new(DenialCode::Other, "gave an answer that fits no check"),
                    Err(Unanswered(why)) => Denial::new(DenialCode::Other, why),
                };
                return self.checked(at, talking.job, talking.plan, &talking.to, *checking, Err(why));
            }
        };
        self.done(at, talking.job.token, 0, done);
    }

    // --- checks and plans ---

    pub(super) fn checking(&self, spec: VmSpec) -> (Talk, RequestBody) {
        let body =
            RequestBody::Configuration { spec: spec.anonymous(), components: Vec::new(), packs: Vec::new() };
        let begun = self.now;
        let talk = Checking { spec, checked: Checked::default(), begun, asks: Asks::Fit };
        (Talk::Check(Box::new(talk)), body)
    }

    fn check_answered(&mut self, at: usize, id: u64, body: AnswerBody) {
        let answer = match body {
            AnswerBody::Configuration(answer) => answer,
            other => return self.conclude(at, id, Ok(other)),
        };
        if let Some(first) = answer.blockers.first() {
            return self.conclude(at, id, Ok(AnswerBody::Denied(first.clone())));
        }
        let catalogue = self.catalogue.clone();
        let Some(talking) = self.cloud(at).talks.get_mut(&id) else { return };
        let Talk::Check(checking) = &mut talking.talk else { return };
        let Some(made) = catalogue.made(&checking.spec.recipe) else { return };
        let spec = checking.spec.anonymous();
        let ask = |components, packs| RequestBody::Configuration { spec, components, packs };
        let components: Vec<_> = made.components.iter().map(|part| catalogue.components[*part].id).collect();
        let packs = &made.packs;
        let next = match checking.asks {
            Asks::Fit => {
                checking.checked.seed = answer.seed;
                checking.checked.kept = answer.kept;
                checking.checked.components_needed = components.len() as u32;
                checking.asks = Asks::Components;
                Some(ask(components, Vec::new()))
            }
            Asks::Components => {
                let lacking = answer.components_lacking.len() as u32;
                checking.checked.components_held = checking.checked.components_needed - lacking;
                checking.asks = Asks::Packs;
                (lacking > 0).then(|| ask(Vec::new(), packs.iter().map(|(id, _)| *id).collect()))
            }
            Asks::Packs => {
                let lacking = &answer.packs_lacking;
                checking.checked.packs_needed = packs.len() as u32;
                checking.checked.packs_missing = lacking.len() as u32;
                let bytes = lacking.iter().filter_map(|at| packs.get(*at as usize)).map(|(_, bytes)| *bytes);
                checking.checked.component_bytes = bytes.sum();
                None
            }
        };
        match next {
            Some(body) => self.request(at, id, body),
            None => {
                let Some(talking) = self.cloud(at).talks.remove(&id) else { return };
                if let Talk::Check(checking) = talking.talk {
                    self.checked(at, talking.job, talking.plan, &talking.to, *checking, Ok(()));
                }
            }
        }
    }

    fn checked(
        &mut self,
        at: usize,
        job: Job,
        plan: Option<u64>,
        to: &Peer,
        checking: Checking,
        result: Result<(), Denial>,
    ) {
        let Checking { spec, mut checked, begun, .. } = checking;
        checked.answer_ms = self.now.since(begun).as_millis() as f64;
        let Some(plan_id) = plan else {
            let recipe = self.catalogue.made(&spec.recipe).map(|made| (*made.recipe).clone());
            let done = result.and_then(|()| {
                let recipe = recipe.ok_or_else(|| Denial::new(DenialCode::Content, "no such recipe"))?;
                Ok(Box::new((checked, recipe)))
            });
            return self.done(at, job.token, 0, Done::Checked(done));
        };
        let mut row = unasked(to.jid.clone(), None, Verdict::Yes);
        match result {
            Ok(()) => {
                row.component_bytes_missing = checked.component_bytes;
                row.components_needed = checked.components_needed;
                row.components_held = checked.components_held;
                row.packs_missing = checked.packs_missing;
                let own = self.own_bytes.get(&spec.id).copied().unwrap_or(0);
                row.user_data_bytes_missing = if checked.seed.is_some() { own / 20 } else { own };
            }
            Err(denial) => row.verdict = Verdict::No { reasons: vec![reason(&denial)] },
        }
        let Some(planning) = self.cloud(at).plans.get_mut(&plan_id) else { return };
        planning.rows.push(row);
        planning.awaited -= 1;
        if planning.awaited == 0
            && let Some(planning) = self.cloud(at).plans.remove(&plan_id)
        {
            self.done(at, planning.job.token, 0, Done::Planned(Ok(planning.rows)));
        }
    }

    pub(super) fn plan(
        &mut self,
        at: usize,
        token: Token,
        record: &VmRecord,
        peers: Vec<(Peer, Option<CloudName>)>,
    ) {
        let plan = self.cloud(at).id();
        let job = Job { token, life: self.clouds[at].life };
        if peers.is_empty() {
            return self.done(at, token, 0, Done::Planned(Ok(Vec::new())));
        }
        let awaited = peers.len();
        self.cloud(at).plans.insert(plan, Planning { job, rows: Vec::new(), awaited });
        for (peer, _) in peers {
            let about = Matter {
                migration: MigrationId(uuid::Uuid::from_u128(u128::from(self.random.number()))),
                vm: record.spec.id,
                epoch: record.epoch,
            };
            let (talk, body) = self.checking(record.spec.clone());
            self.talk(at, token, peer, about, talk, body, Some(plan));
        }
    }
}

pub(super) fn nothing() -> Matter {
    Matter { migration: MigrationId(uuid::Uuid::nil()), vm: VmId(uuid::Uuid::nil()), epoch: 0 }
}
