//! Plans: which members could take a VM, and what it would cost.

use std::sync::Arc;

use futures::future::join_all;

use crate::migration::DenialCode;
use crate::placement::{Offer, rank, shortlist};
use crate::types::{CloudName, MemberJid, MigrationId, VmId};
use crate::vm::{PowerState, VmSpec};

use super::calls::Answer;
use super::interface::{Candidate, PlanView, Reason, Reply, Verdict};
use super::problem::Problem;
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
        let notes: Vec<_> = self.shutdown_note(vm).into_iter().collect();
        let (shared, name) = (self.shared.clone(), spec.name.clone());
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
                let plan = result.map(|rows| PlanView { notes, ..broker.ranked(name, rows) });
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

    /// What is known of a guest that was asked to end before and did not.
    fn shutdown_note(&self, vm: &Vm) -> Option<String> {
        let at = vm.record.ignored_stop?;
        let running = self.shared.driver.state(vm.record.spec.id).is_ok_and(|s| s != PowerState::Stopped);
        running.then(|| {
            format!(
                "the guest did not end by itself on {at}, within the time it was given: a move waits {} s for it, and \
                 then is called off, or with --force-stop switches it off",
                self.stop_timeout(vm.record.spec.id).as_secs()
            )
        })
    }

    fn ranked(&self, vm: crate::types::VmName, mut rows: Vec<Candidate>) -> PlanView {
        rows.iter_mut().for_each(|row| self.rates.predict(row));
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
        PlanView { vm, candidates, notes: Vec::new() }
    }
}
