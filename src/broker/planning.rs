//! Plans: which members could take a VM, and what it would cost.

use std::sync::Arc;

use futures::future::join_all;

use crate::interface::problem::Problem;
use crate::interface::{Candidate, PlanView, Reason, Reply, Verdict};
use crate::migration::DenialCode;
use crate::placement::{Offer, hardware, rank, shortlist};
use crate::types::{CloudName, MemberJid, MigrationId, VmId};
use crate::vm::{PowerState, VmSpec};

use super::calls::Answer;
use super::scanning::scan;
use super::shared::{Matter, Peer};
use super::vms::Vm;
use super::{Broker, Input, content, negotiation};

impl Broker {
    pub(super) fn plan(&mut self, vm: &str, to: Option<&str>, reply: Answer) {
        let prepared = self.movable_vm(vm).and_then(|id| Ok((id, self.peers(to)?)));
        let (id, peers) = match prepared {
            Ok(p) => p,
            Err(problem) => return drop(reply.send(Err(problem))),
        };
        self.candidates(id, peers, to, move |_, result| {
            let _ = reply.send(result.map(Reply::Plan));
        });
    }

    /// Asks those of `peers` about a VM that may be able to take it, all at once, then calls `done` on this
    /// task with the ranked plan. Who is named by the operator is asked in any case.
    pub(super) fn candidates(
        &self,
        id: VmId,
        peers: Vec<(Peer, Option<CloudName>)>,
        named: Option<&str>,
        done: impl FnOnce(&mut Broker, Result<PlanView, Problem>) + Send + 'static,
    ) {
        let Some(vm) = self.vms.get(&id) else { return };
        let (peers, left_out) = match named {
            Some(_) => (peers, Vec::new()),
            None => self.shortlisted(&vm.record.spec, peers),
        };
        let (spec, epoch, disks) = (vm.record.spec.clone(), vm.record.epoch, self.disk_paths(&vm.record));
        let notes: Vec<_> = self.running_notes(vm);
        let (shared, about) = (self.shared.clone(), spec.clone());
        tokio::spawn(async move {
            let (for_scan, scan_spec) = (shared.clone(), spec.clone());
            let scanned =
                negotiation::blocking(move || scan(&for_scan, &scan_spec, &disks, None).map(|s| s.seed));
            let seed = scanned.await.ok();
            let recipe = shared.repository.recipe(&spec.recipe);
            let result = match recipe {
                Err(e) => Err(content::repository_problem(&e)),
                Ok(recipe) => {
                    let recipe = Arc::new(recipe);
                    let ask = peers.iter().map(|(peer, cloud)| {
                        let matter = Matter { migration: MigrationId::random(), vm: spec.id, epoch };
                        let (shared, spec, recipe): (_, _, &Arc<_>) = (&shared, &spec, &recipe);
                        async move {
                            negotiation::candidate(shared, peer, cloud.clone(), matter, spec, recipe, seed)
                                .await
                        }
                    });
                    let mut rows = join_all(ask).await;
                    rows.extend(left_out);
                    Ok(rows)
                }
            };
            shared.post(Input::apply(move |broker| {
                let plan = result.map(|rows| PlanView { notes, ..broker.ranked(&about, rows) });
                done(broker, plan);
            }));
        });
    }

    /// Those of `peers` that are asked, and rows for everybody else who is online.
    fn shortlisted(
        &self,
        spec: &VmSpec,
        peers: Vec<(Peer, Option<CloudName>)>,
    ) -> (Vec<(Peer, Option<CloudName>)>, Vec<Candidate>) {
        let row = |jid: &MemberJid, reason: Reason| {
            let verdict = Verdict::NotAsked { reasons: vec![reason] };
            negotiation::unasked(jid.clone(), self.members.cloud_of(jid), verdict)
        };
        let mut rows = Vec::new();
        for (jid, problem) in self.unaskable() {
            let (text, next_step) = (problem.reason.into(), problem.next_step.into());
            rows.push(row(&jid, Reason { code: DenialCode::Policy.as_str(), text, next_step }));
        }
        let shown: Vec<_> = peers.iter().map(|(peer, _)| self.members.get(&peer.jid)).collect();
        let mut asked = Vec::new();
        for (peer, left_out) in peers.into_iter().zip(shortlist(spec, &shown)) {
            match left_out {
                None => asked.push(peer),
                Some(denial) => rows.push(row(&peer.0.jid, negotiation::reason(&denial))),
            }
        }
        (asked, rows)
    }

    /// What a guest that runs adds to a move that nobody can foretell.
    fn running_notes(&self, vm: &Vm) -> Vec<String> {
        let id = vm.record.spec.id;
        if self.shared.driver.state(id).is_ok_and(|s| s == PowerState::Stopped) {
            return Vec::new();
        }
        let mut notes = vec!["the guest runs: what it writes from now on travels as well".to_owned()];
        let patience_s = self.stop_timeout(id).as_secs();
        match (vm.record.ignored_stop, self.forecasts.shutdown_s(id)) {
            (Some(at), _) => notes.push(format!(
                "the guest did not end by itself on {at}, within the time it was given: a move waits {patience_s} s \
                 for it, and then is called off, or with --force-stop switches it off"
            )),
            (None, None) => notes.push(format!(
                "how long the guest takes to shut down is not known yet, and not in the time foretold; it may \
                 take {patience_s} s"
            )),
            (None, Some(_)) => {}
        }
        notes
    }

    /// Adds what a guest would find other than it is here.
    fn compare_hardware(&self, spec: &VmSpec, row: &mut Candidate) {
        let Some(cloud) = self.members.get(&row.jid).and_then(|m| m.cloud.as_ref()) else { return };
        let found = hardware::differences(spec, &self.hardware(), &cloud.features);
        let found = found.iter().map(negotiation::reason);
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

    /// What decides which hardware guests see here, as presence says it.
    pub fn hardware(&self) -> Vec<String> {
        let f = self.shared.driver.features();
        let value = |t: hardware::Trait| match t {
            hardware::Trait::Accelerator => f.accelerator.to_string(),
            hardware::Trait::Machine => f.machine_type.clone(),
            hardware::Trait::Firmware => f.firmware.clone(),
        };
        hardware::Trait::ALL.into_iter().map(|t| format!("{}{}", t.prefix(), value(t))).collect()
    }

    fn ranked(&self, spec: &VmSpec, mut rows: Vec<Candidate>) -> PlanView {
        rows.iter_mut().for_each(|row| self.compare_hardware(spec, row));
        let runs = self.shared.driver.state(spec.id).is_ok_and(|s| s != PowerState::Stopped);
        for row in &mut rows {
            let bytes =
                row.component_bytes_missing + row.root_delta_bytes_missing + row.user_data_bytes_missing;
            let foretold = self.forecasts.foretell(&row.jid, spec.id, bytes, runs);
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
                bytes_missing: row.component_bytes_missing
                    + row.root_delta_bytes_missing
                    + row.user_data_bytes_missing,
                memory_bytes_free: self.members.memory_bytes_free(&row.jid),
            })
            .collect();
        let candidates = rank(&offers).into_iter().map(|i| rows[i].clone()).collect();
        PlanView { vm: spec.name.clone(), candidates, notes: Vec::new() }
    }
}
