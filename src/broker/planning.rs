//! Plans: which members could take a VM, and what it would cost.

use std::time::Duration;

use crate::interface::{Candidate, MoveWork, PlanView, Problem, ProblemKind, Reason, Reply, Verdict};
use crate::migration::{Denial, DenialCode};
use crate::placement::shortlist::{ASKED_MAX, Choice, Earlier, shortlist};
use crate::placement::{Offer, hardware, rank};
use crate::types::{CloudName, MemberJid, VmId};
use crate::vm::{PowerState, VmSpec};

use super::Broker;
use super::effect::{CallId, Effect, Peer};
use super::hold::Verb;
use super::pending::{Pending, PlanFor};
use super::vms::Vm;

/// The row of a plan for a member that told nothing.
pub fn unasked(jid: MemberJid, cloud: Option<CloudName>, verdict: Verdict) -> Candidate {
    Candidate {
        cloud,
        jid,
        verdict,
        component_bytes_missing: 0,
        deltas_unknown: false,
        components_needed: 0,
        components_held: 0,
        packs_missing: 0,
        root_delta_bytes_missing: 0,
        user_data_bytes_missing: 0,
        kept_s: 0,
        base_bytes: 0,
        seconds_low: None,
        seconds_high: None,
        forecasts_held: 0,
        forecasts_told: 0,
        answer_ms: 0.0,
    }
}

/// Which of the members that are online a plan asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asked {
    /// The one that the operator named, in any case.
    Named,
    /// Every one that may be able to take the VM.
    All,
    /// A few of these.
    Some,
}

/// How long an answer counts when the next plan chooses whom to ask.
const ANSWERS_LAST: Duration = Duration::from_secs(3600);

/// What a row of a plan says for the next one; nothing if the member was not heard.
fn earlier(row: &Candidate) -> Option<Earlier> {
    match row.verdict {
        Verdict::Yes | Verdict::WithDifferences { .. } => Some(Earlier::Lacks { bytes: row.bytes_missing() }),
        Verdict::No { .. } => Some(Earlier::No),
        Verdict::NotAsked { .. } => None,
    }
}

pub fn reason(d: &Denial) -> Reason {
    Reason { code: d.code.as_str(), text: d.text.clone(), next_step: d.next_step.clone() }
}

impl Broker {
    pub(super) fn plan(&mut self, vm: &str, to: Option<&str>, all: bool, call: CallId) {
        let prepared = self.vm_for(Verb::Move, vm).and_then(|id| Ok((id, self.peers(to)?)));
        let whom = match (to, all) {
            (Some(_), _) => Asked::Named,
            (None, true) => Asked::All,
            (None, false) => Asked::Some,
        };
        match prepared {
            Ok((id, peers)) => self.candidates(id, peers, whom, PlanFor::Caller(call)),
            Err(problem) => self.reply(call, Err(problem)),
        }
    }

    /// Asks those of `peers` about a VM that may be able to take it, all at once.
    pub(super) fn candidates(
        &mut self,
        id: VmId,
        peers: Vec<(Peer, Option<CloudName>)>,
        whom: Asked,
        purpose: PlanFor,
    ) {
        let Some(vm) = self.vms.get(&id) else { return };
        let (peers, rows_left_out) = match whom {
            Asked::Named => (peers, Vec::new()),
            Asked::All => self.shortlisted(vm, peers, usize::MAX),
            Asked::Some => self.shortlisted(vm, peers, ASKED_MAX),
        };
        let record = Box::new(vm.record.clone());
        let token = self.expect(Pending::Planned { vm: id, rows_left_out, purpose });
        self.emit(Effect::Plan { token, record, peers });
    }

    pub(super) fn planned(
        &mut self,
        id: VmId,
        left_out: Vec<Candidate>,
        purpose: PlanFor,
        rows: Result<Vec<Candidate>, Problem>,
    ) {
        let (PlanFor::Caller(call) | PlanFor::Move { call, .. }) = purpose;
        let now = self.now;
        if let Some(vm) = self.vms.get_mut(&id) {
            vm.answers.retain(|_, (at, _)| now.since(*at) < ANSWERS_LAST);
            let answers = rows.iter().flatten();
            vm.answers.extend(answers.filter_map(|row| Some((row.jid.clone(), (now, earlier(row)?)))));
        }
        let Some(vm) = self.vms.get(&id) else {
            let gone = Problem::new(ProblemKind::NotFound, "VM", "was deleted meanwhile");
            return self.reply(call, Err(gone));
        };
        let plan = rows.map(|mut rows| {
            rows.extend(left_out);
            PlanView { notes: self.running_notes(vm), ..self.ranked(&vm.record.spec, rows) }
        });
        match purpose {
            PlanFor::Caller(call) => self.reply(call, plan.map(Reply::Plan)),
            PlanFor::Move { call, peers, force_stop } => self.move_planned(id, plan, peers, force_stop, call),
        }
    }

    /// Those of `peers` that are asked, and rows for everybody else who is online.
    fn shortlisted(
        &self,
        vm: &Vm,
        peers: Vec<(Peer, Option<CloudName>)>,
        most: usize,
    ) -> (Vec<(Peer, Option<CloudName>)>, Vec<Candidate>) {
        let row = |jid: &MemberJid, reason: Reason| {
            let verdict = Verdict::NotAsked { reasons: vec![reason] };
            unasked(jid.clone(), self.members.cloud_of(jid), verdict)
        };
        let mut rows = Vec::new();
        for (jid, problem) in self.unaskable() {
            let (text, next_step) = (problem.reason.into(), problem.next_step.into());
            rows.push(row(&jid, Reason { code: DenialCode::Policy.as_str(), text, next_step }));
        }
        let recent =
            |jid: &MemberJid| vm.answers.get(jid).filter(|(at, _)| self.now.since(*at) < ANSWERS_LAST);
        let choice = |(peer, _): &(Peer, _)| Choice {
            member: self.members.get(&peer.jid),
            earlier: recent(&peer.jid).map(|(_, earlier)| *earlier),
        };
        let choices: Vec<_> = peers.iter().map(choice).collect();
        let left_out = shortlist(&vm.record.spec, &choices, most);
        let mut asked = Vec::new();
        for (peer, left_out) in peers.into_iter().zip(left_out) {
            match left_out {
                None => asked.push(peer),
                Some(denial) => rows.push(row(&peer.0.jid, reason(&denial))),
            }
        }
        (asked, rows)
    }

    /// What a guest that runs adds to a move that nobody can foretell.
    fn running_notes(&self, vm: &Vm) -> Vec<String> {
        let id = vm.record.spec.id;
        if vm.power == PowerState::Stopped {
            return Vec::new();
        }
        let mut notes = vec!["the guest runs: what it writes from now on travels as well".to_owned()];
        let patience_s = self.stop_timeout(id).as_secs();
        match (vm.record.ignored_stop, self.forecasts.knows_shutdown_of(id)) {
            (Some(at), _) => notes.push(format!(
                "the guest did not end by itself on {at}, within the time it was given: a move waits {patience_s} s \
                 for it, and then is called off, or with --force-stop switches it off"
            )),
            (None, false) => notes.push(format!(
                "how long the guest takes to shut down is not known yet: a time foretold goes by other guests; it \
                 may take {patience_s} s"
            )),
            (None, true) => {}
        }
        notes
    }

    /// Adds what a guest would find other than it is here.
    fn compare_hardware(&self, spec: &VmSpec, row: &mut Candidate) {
        let Some(cloud) = self.members.get(&row.jid).and_then(|m| m.cloud.as_ref()) else { return };
        let here = [self.hardware(), self.network_kinds()].concat();
        let found = hardware::differences(spec, &here, &cloud.features);
        let found = found.iter().map(reason);
        match &mut row.verdict {
            Verdict::WithDifferences { differences } => differences.extend(found),
            Verdict::Yes => {
                let differences: Vec<_> = found.collect();
                if !differences.is_empty() {
                    row.verdict = Verdict::WithDifferences { differences };
                }
            }
            Verdict::No { .. } | Verdict::NotAsked { .. } => {}
        }
    }

    /// Of what kind this cloud's networks are, as presence says it.
    pub fn network_kinds(&self) -> Vec<String> {
        let networks = self.config.networks.iter();
        networks.map(|n| hardware::network_kind(&n.name, &n.kind.to_string())).collect()
    }

    /// What decides which hardware guests see here, as presence says it.
    pub fn hardware(&self) -> Vec<String> {
        let f = &self.features;
        let value = |t: hardware::Trait| match t {
            hardware::Trait::Accelerator => f.accelerator.to_string(),
            hardware::Trait::Machine => f.machine_type.clone(),
            hardware::Trait::Firmware => f.firmware.clone(),
        };
        hardware::Trait::ALL.into_iter().map(|t| format!("{}{}", t.prefix(), value(t))).collect()
    }

    /// What a move of a VM is to do, as its time is foretold by.
    pub(super) fn work(&self, vm: VmId, bytes: u64, base_bytes: u64, runs: bool) -> MoveWork {
        let disks = self.measured.disks.get(&vm).copied().unwrap_or_default();
        MoveWork {
            bytes,
            base_bytes,
            disk_bytes: disks.root_bytes.saturating_add(disks.user_data_bytes),
            runs,
            patience_s: self.stop_timeout(vm).as_secs_f64(),
            ignores: self.vms.get(&vm).is_some_and(|vm| vm.record.ignored_stop.is_some()),
        }
    }

    fn ranked(&self, spec: &VmSpec, mut rows: Vec<Candidate>) -> PlanView {
        rows.iter_mut().for_each(|row| self.compare_hardware(spec, row));
        let runs = self.power_of(spec.id) != PowerState::Stopped;
        for row in &mut rows {
            let work = self.work(spec.id, row.bytes_missing(), row.base_bytes, runs);
            let foretold = self.forecasts.foretell(&row.jid, spec.id, &work);
            (row.forecasts_held, row.forecasts_told) = self.forecasts.held(&row.jid);
            (row.seconds_low, row.seconds_high) = (foretold.map(|i| i.low_s), foretold.map(|i| i.high_s));
        }
        let offers: Vec<_> = rows
            .iter()
            .map(|row| Offer {
                member: row.jid.clone(),
                possible: row.verdict.is_yes(),
                differences: match &row.verdict {
                    Verdict::WithDifferences { differences } => differences.len(),
                    _ => 0,
                },
                bytes_missing: row.bytes_missing(),
                memory_bytes_free: self.members.memory_bytes_free(&row.jid),
            })
            .collect();
        let candidates = rank(&offers).into_iter().map(|i| rows[i].clone()).collect();
        PlanView { vm: spec.name.clone(), candidates, notes: Vec::new() }
    }
}
