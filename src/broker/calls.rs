//! Operators' requests.

use crate::federation::{Member, Trust};
use crate::interface::{
    Candidate, CloudRequest, ContentRequest, LinkState, MemberState, MemberTrust, MemberView, MigrationView,
    MoveRequest, PlanView, Predecessor, Problem, ProblemKind, Reply, Request, Resource, StatusView, Verdict,
    VmRequest,
};
use crate::migration::{RequestBody, envelope};
use crate::types::{CloudName, MemberJid, VmId};
use crate::vm::PowerState;

use super::effect::{CallId, Effect, Peer, ReceiptWanted};
use super::hold::Verb;
use super::outgoing::Course;
use super::pending::{PlanFor, Whom};
use super::planning::Asked;
use super::{Broker, aside};

impl Broker {
    pub(super) fn call(&mut self, request: Request, call: CallId) {
        match request {
            Request::Vm(request) => self.vm_call(request, call),
            Request::Move(request) => self.move_call(request, call),
            Request::Cloud(request) => self.cloud_call(request, call),
            Request::Content(request) => self.content_call(request, call),
        }
    }

    fn vm_call(&mut self, request: VmRequest, call: CallId) {
        let result = match request {
            VmRequest::Create(create) => return self.create_vm(create, call),
            VmRequest::Adopt(adopt) => return self.adopt_vm(adopt, call),
            VmRequest::Export { vm, output, format, user_data } => {
                return self.export_vm(&vm, output, format, user_data, call);
            }
            VmRequest::List => {
                let vms = self.vms.values().map(|vm| self.vm_view(vm));
                let mut vms: Vec<_> = vms.chain(self.aside_views()).collect();
                vms.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
                Ok(Reply::Vms(vms))
            }
            VmRequest::Show { vm } => self.find_vm(&vm).map(|id| self.shown(id)),
            VmRequest::Start { vm, unconfirmed, by_uid } => {
                match self.startable_vm(&vm, unconfirmed, by_uid) {
                    Ok(id) => return self.start_vm(id, Whom::Caller(call)),
                    Err(p) => Err(p),
                }
            }
            VmRequest::Stop { vm, force, timeout_s, for_host } => {
                return self.stop_named(&vm, force, timeout_s, for_host, call);
            }
            VmRequest::Reboot { vm, force, timeout_s } => match self.vm_for(Verb::Reboot, &vm) {
                Ok(id) => return self.reboot_vm(id, force, timeout_s, call),
                Err(p) => Err(p),
            },
            VmRequest::Set(set) => self.set_vm(&set).map(|id| self.shown(id)),
            VmRequest::Resize { vm, root_size, user_data_size } => {
                return self.resize_vm(&vm, root_size, user_data_size, call);
            }
            VmRequest::Delete { vm, taken_for } => return self.delete_vm(&vm, taken_for, call),
        };
        self.reply(call, result);
    }

    fn move_call(&mut self, request: MoveRequest, call: CallId) {
        let result = match request {
            MoveRequest::Plan { vm, to, all } => return self.plan(&vm, to.as_deref(), all, call),
            MoveRequest::Begin { vm, to, dry_run: true, .. } => {
                return self.plan(&vm, to.as_deref(), false, call);
            }
            MoveRequest::Begin { vm, to, dry_run: false, force_stop } => {
                return self.move_vm(&vm, to.as_deref(), force_stop, call);
            }
            MoveRequest::List => Ok(Reply::Migrations(self.migrations())),
            MoveRequest::Show { id } => {
                self.migration(&id).map(|v| Reply::Migration(Box::new(self.remarked(v))))
            }
            MoveRequest::Receipt { id } => return self.receipt(id, call),
            MoveRequest::Resolve { id, owner, confirmed, by_uid } => {
                self.resolve(&id, owner, confirmed, by_uid)
            }
            MoveRequest::Watch { id } => match self.migration(&id) {
                Ok(v) if self.outgoing.contains_key(&v.progress.id) => {
                    return self.watch_outgoing(v.progress.id, call);
                }
                Ok(v) => Ok(Reply::Migration(Box::new(v))),
                Err(p) => Err(p),
            },
            MoveRequest::Cancel { id } => {
                self.migration(&id).and_then(|v| self.cancel(&v)).map(|()| Reply::Done)
            }
            MoveRequest::Limit { id, bytes_per_s } => {
                self.migration(&id).and_then(|v| self.limit(&v, bytes_per_s)).map(|()| Reply::Done)
            }
            MoveRequest::SwitchOver { id } => match self.migration(&id) {
                Ok(v) => return self.steer(v, RequestBody::Stop, call),
                Err(p) => Err(p),
            },
            MoveRequest::Hold { id } => match self.migration(&id) {
                Ok(v) => return self.steer(v, RequestBody::Suspend, call),
                Err(p) => Err(p),
            },
        };
        self.reply(call, result);
    }

    fn cloud_call(&mut self, request: CloudRequest, call: CallId) {
        let result = match request {
            CloudRequest::Status => Ok(Reply::Status(Box::new(self.status()))),
            CloudRequest::Members => Ok(Reply::Members(self.member_views())),
            CloudRequest::IdentityTrust { member, key } => self.trust(|b| b.members.pin(&member, key)),
            CloudRequest::IdentityRevoke { member } => {
                let key = self.members.get(&member).and_then(|m| m.key);
                self.trust(|b| b.members.revoke(&member)).inspect(|_| self.part_with(&member, key))
            }
            CloudRequest::Heal => return self.heal(call),
            CloudRequest::Shutdown => {
                self.reply(call, Ok(Reply::Done));
                self.emit(Effect::StopOptimizing);
                return self.emit(Effect::Shutdown);
            }
        };
        self.reply(call, result);
    }

    /// Requests about components, recipes and the repository: the repository answers them.
    fn content_call(&mut self, request: ContentRequest, call: CallId) {
        if let (ContentRequest::RepoGc { .. }, Some(damaged)) = (&request, self.aside.values().next()) {
            let problem = aside::gc_problem(damaged);
            return self.reply(call, Err(problem));
        }
        // What VMs and their kept copies are made of must stay.
        let recipes = self.vms.values().map(|vm| vm.record.spec.recipe);
        let recipes = recipes.chain(self.incoming.values().map(|run| run.spec().recipe)).collect();
        self.emit(Effect::Content { call, request: Box::new(request), recipes });
    }

    /// Checks the repository, and fetches what is damaged or missing.
    fn heal(&mut self, call: CallId) {
        // Without members it is a check that says why nothing was healed.
        let peers = self.peers(None).unwrap_or_default().into_iter().map(|p| p.0).collect();
        self.emit(Effect::Heal { call, peers });
    }

    /// Answers with the record of one migration, remembered or not.
    fn receipt(&mut self, text: String, call: CallId) {
        let known = self.migration(&text).map(|view| view.progress);
        let remarks = self.resolution_remarks();
        self.emit(Effect::Receipt(Box::new(ReceiptWanted { call, text, known, remarks })));
    }

    pub(super) fn status(&self) -> StatusView {
        let (cpus, memory_bytes) = self.resources(None);
        let features = &self.features;
        let storage = self.storage(None);
        let key = self.key.public();
        StatusView {
            cloud: self.config.cloud.name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            jid: self.me.clone(),
            key,
            fingerprint: key.fingerprint(),
            room: self.config.xmpp.room.clone(),
            link: if self.offline.is_none() { LinkState::Online } else { LinkState::Offline },
            link_problem: self.offline.clone().unwrap_or_default(),
            driver: features.driver.clone(),
            accelerator: features.accelerator.to_string(),
            own_users: features.own_users,
            cpus,
            memory_bytes,
            storage_bytes: self.file_system(),
            storage_promised_bytes: Resource {
                total: storage.promisable_bytes(),
                free: storage.unpromised_bytes().min(storage.at_hand_bytes()),
            },
            transfer_addresses: self.transfer_addresses.clone(),
            vms_running: self.vms_running(),
            migrations_running: (self.outgoing.len()
                + self.incoming.values().filter(|r| r.is_unfinished()).count())
                as u32,
            resident_bytes: self.measured.resident_bytes,
            refusals: self.guard.view(),
        }
    }

    fn vms_running(&self) -> u32 {
        self.vms.values().filter(|vm| vm.record.is_here() && vm.power == PowerState::Running).count() as u32
    }

    fn member_views(&self) -> Vec<MemberView> {
        self.members.all().map(|m| self.member_view(m)).collect()
    }

    fn member_view(&self, m: &Member) -> MemberView {
        let cloud = m.cloud.as_ref();
        let c = cloud.and_then(|c| c.capacity).unwrap_or_default();
        MemberView {
            jid: m.jid.clone(),
            cloud: m.name.clone(),
            state: match (m.is_online(), m.removed) {
                (true, _) => MemberState::Online,
                (false, true) => MemberState::Removed,
                (false, false) => MemberState::Gone,
            },
            since: m.since,
            last_seen: m.last_seen,
            trust: match self.members.trust_of(&m.jid) {
                Trust::Trusted => MemberTrust::Trusted,
                Trust::Unknown => MemberTrust::Unknown,
                Trust::Changed { .. } => MemberTrust::Changed,
                Trust::Superseded { .. } => MemberTrust::Superseded,
                Trust::Forked { .. } => MemberTrust::Forked,
                Trust::Revoked => MemberTrust::Revoked,
                Trust::NoKey => MemberTrust::NoKey,
            },
            key: m.key,
            clock_ahead_ms: self.clocks.ahead_ms(&m.jid),
            pinned_fingerprint: match self.members.trust_of(&m.jid) {
                Trust::Changed { pinned } | Trust::Forked { pinned } => pinned.fingerprint(),
                Trust::Superseded { by } => by.fingerprint(),
                _ => String::new(),
            },
            fingerprint: m.key.map(|k| k.fingerprint()).unwrap_or_default(),
            predecessors: self.members.keys().predecessors(&m.jid).iter().map(Predecessor::of).collect(),
            outdated_pin: self.members.keys().outdated(&m.jid).map(|k| k.fingerprint()).unwrap_or_default(),
            cpus: Resource { total: c.cpus, free: c.cpus_free },
            memory_bytes: Resource { total: c.memory, free: c.memory_free },
            storage_bytes: Resource { total: c.storage, free: c.storage_free },
            load_percent: cloud.and_then(|c| c.load).unwrap_or(0) as f32,
            power: cloud.map(|c| c.power.clone()).unwrap_or_default(),
            region: cloud.and_then(|c| c.region.clone()).unwrap_or_default(),
            carbon_g_per_kwh: cloud.and_then(|c| c.carbon),
            price_per_hour: cloud.and_then(|c| c.price),
            features: cloud.map(|c| c.features.clone()).unwrap_or_default(),
            software: cloud.and_then(|c| c.software.clone()).unwrap_or_default(),
            policy: Some(self.limits_of(&m.jid)),
            used: self.used_by(&m.jid, None),
            refused: self
                .guard
                .refusals
                .of(m.jid.as_str())
                .iter()
                .map(|(refused, n)| (refused.to_string(), *n))
                .collect(),
        }
    }

    fn trust(&mut self, change: impl FnOnce(&mut Self) -> Result<(), String>) -> Result<Reply, Problem> {
        change(self).map_err(|reason| Problem::new(ProblemKind::BadRequest, "identity", reason))?;
        let keys = self.members.keys();
        self.book
            .save_revoked(keys.revoked())
            .and_then(|()| self.book.save_trust(keys.kept()))
            .map_err(|e| Problem::from_error(ProblemKind::Failed, "identity", &e))?;
        self.admit_members();
        Ok(Reply::Done)
    }

    fn shown(&self, id: VmId) -> Reply {
        self.vms.get(&id).map_or(Reply::Done, |vm| Reply::Vm(Box::new(self.vm_view(vm))))
    }

    fn migrations(&self) -> Vec<MigrationView> {
        let mut all: Vec<_> = self.history.views().cloned().collect();
        all.extend(self.outgoing.values().map(|r| r.view.clone()));
        all.extend(self.incoming.values().filter(|r| !r.view.progress.ended).map(|r| r.view.clone()));
        all.extend(self.unfinished.iter().map(|u| u.view()));
        all.iter_mut().for_each(|view| self.explain(view));
        all.sort_by_key(|v| v.progress.started);
        all
    }

    /// A migration by id or the beginning of one.
    pub(super) fn migration(&self, text: &str) -> Result<MigrationView, Problem> {
        let mut found: Vec<_> = self
            .migrations()
            .into_iter()
            .filter(|v| text.len() >= 4 && v.progress.id.to_string().starts_with(text))
            .collect();
        let object = format!("migration {text}");
        match (found.pop(), found.len()) {
            (Some(view), 0) => Ok(view),
            (Some(_), n) => {
                Err(Problem::new(ProblemKind::BadRequest, object, format!("{} migrations begin so", n + 1))
                    .next("write more digits"))
            }
            (None, _) => Err(Problem::new(ProblemKind::NotFound, object, "there is no such migration")
                .next("see 'cicada migration list'")),
        }
    }

    fn cancel(&mut self, view: &MigrationView) -> Result<(), Problem> {
        let id = view.progress.id;
        if self.outgoing.contains_key(&id) {
            return self.cancel_outgoing(id);
        }
        if self.cancel_unfinished(id) {
            return Ok(());
        }
        let object = format!("migration {id}");
        if view.progress.ended {
            return Err(Problem::new(
                ProblemKind::Conflict,
                object,
                format!("has ended: {}", view.progress.phase),
            ));
        }
        Err(Problem::new(ProblemKind::Conflict, object, "is driven by its source")
            .next(format!("cancel it at {}", view.progress.peer)))
    }

    fn limit(&mut self, view: &MigrationView, bytes_per_s: Option<u64>) -> Result<(), Problem> {
        let id = view.progress.id;
        if self.outgoing.contains_key(&id) {
            self.limit_outgoing(id, bytes_per_s);
            return Ok(());
        }
        let object = format!("migration {id}");
        if view.progress.ended {
            let reason = format!("has ended: {}", view.progress.phase);
            return Err(Problem::new(ProblemKind::Conflict, object, reason));
        }
        Err(Problem::new(ProblemKind::Conflict, object, "is capped where it sends")
            .next(format!("limit it at {}", view.progress.peer)))
    }

    /// Trusted members that are online.
    pub(super) fn trusted_online(&self) -> impl Iterator<Item = Peer> {
        let online = self.members.online().filter(|jid| **jid != self.me);
        online.filter_map(|jid| Some(Peer { jid: jid.clone(), key: self.members.trusted_key(jid).ok()? }))
    }

    /// A member to negotiate with, if it is trusted and speaks a version that is spoken here.
    fn peer(&self, jid: &MemberJid) -> Result<(Peer, Option<CloudName>), Problem> {
        let key = self.members.trusted_key(jid).map_err(|reason| {
            Problem::new(ProblemKind::Forbidden, format!("member {jid}"), reason.to_string()).next(format!(
                "compare fingerprints with its operator, then: cicada identity trust {jid} KEY"
            ))
        })?;
        speaks_with_us(jid, self.members.versions_of(jid))?;
        Ok((Peer { jid: jid.clone(), key }, self.members.cloud_of(jid)))
    }

    /// Members that are online and are not negotiated with; why.
    pub(super) fn unaskable(&self) -> Vec<(MemberJid, Problem)> {
        let online = self.members.online().filter(|jid| **jid != self.me);
        online.filter_map(|jid| Some((jid.clone(), self.peer(jid).err()?))).collect()
    }

    /// Members that could be asked: the one named, or all that are online.
    pub(super) fn peers(&self, to: Option<&str>) -> Result<Vec<(Peer, Option<CloudName>)>, Problem> {
        self.peers_seen(to).map_err(|problem| match problem.kind {
            // Nobody is seen, because it is this broker that is not there.
            ProblemKind::NotFound | ProblemKind::Unavailable if self.offline.is_some() => Problem::new(
                ProblemKind::Unavailable,
                "this broker",
                format!("is not in the room itself: {}", self.offline.as_deref().unwrap_or_default()),
            )
            .next("see 'cicada status'"),
            _ => problem,
        })
    }

    fn is_this_cloud(&self, name: &str) -> bool {
        name == self.config.cloud.name.as_str() || name.parse::<MemberJid>().is_ok_and(|jid| jid == self.me)
    }

    fn peers_seen(&self, to: Option<&str>) -> Result<Vec<(Peer, Option<CloudName>)>, Problem> {
        match to {
            Some(name) if self.is_this_cloud(name) => {
                Err(Problem::new(ProblemKind::BadRequest, format!("member {name}"), "is this cloud itself")
                    .next("name another: see 'cicada members'"))
            }
            Some(name) => {
                let jid = self.members.find(name).ok_or_else(|| {
                    Problem::new(
                        ProblemKind::NotFound,
                        format!("member {name}"),
                        "no such member was ever seen in the room",
                    )
                    .next("see 'cicada members'")
                })?;
                if !self.members.is_online(&jid) {
                    return Err(Problem::new(
                        ProblemKind::Unavailable,
                        format!("member {name}"),
                        "is not online now",
                    )
                    .next("see 'cicada members' for since when"));
                }
                Ok(vec![self.peer(&jid)?])
            }
            None => {
                let online = self.members.online().filter(|jid| **jid != self.me);
                let (peers, refused): (Vec<_>, Vec<_>) =
                    online.map(|jid| self.peer(jid)).partition(Result::is_ok);
                let peers: Vec<_> = peers.into_iter().flatten().collect();
                let mut refused = refused.into_iter().filter_map(Result::err);
                if peers.is_empty() {
                    // Trust is the usual lack; another is worth its own words.
                    if let Some(problem) = refused.find(|p| p.kind == ProblemKind::Refused) {
                        return Err(problem);
                    }
                    return Err(Problem::new(
                        ProblemKind::Unavailable,
                        "federation",
                        "no trusted member is online",
                    )
                    .next("see 'cicada members'"));
                }
                Ok(peers)
            }
        }
    }

    fn move_vm(&mut self, vm: &str, to: Option<&str>, force_stop: bool, call: CallId) {
        let prepared = self.vm_for(Verb::Move, vm).and_then(|id| Ok((id, self.peers(to)?)));
        let (id, mut peers) = match prepared {
            Ok(p) => p,
            Err(problem) => return self.reply(call, Err(problem)),
        };
        // A named target is checked by the migration itself; otherwise all are asked and ranked.
        if to.is_some() {
            if let Some((peer, cloud)) = peers.pop() {
                self.move_to(id, (peer, cloud), force_stop, call);
            }
            return;
        }
        let whom = if to.is_some() { Asked::Named } else { Asked::Some };
        self.candidates(id, peers.clone(), whom, PlanFor::Move { call, peers, force_stop });
    }

    /// A plan was asked for to choose the target.
    pub(super) fn move_planned(
        &mut self,
        id: VmId,
        plan: Result<PlanView, Problem>,
        peers: Vec<(Peer, Option<CloudName>)>,
        force_stop: bool,
        call: CallId,
    ) {
        let chosen = plan.and_then(|plan| match plan.candidates.into_iter().next() {
            Some(Candidate {
                verdict: Verdict::No { reasons } | Verdict::NotAsked { reasons }, jid, ..
            }) => {
                let why: Vec<_> = reasons.iter().map(|r| r.text.as_str()).collect();
                let reason = format!("no member can take it; {jid}: {}", why.join("; "));
                Err(Problem::new(ProblemKind::Refused, format!("move of {}", plan.vm), reason)
                    .next("see 'cicada plan' for every member's reasons"))
            }
            Some(c) => Ok(peers.into_iter().find(|(p, _)| p.jid == c.jid)),
            None => Ok(None),
        });
        match chosen {
            Ok(Some((peer, cloud))) => self.move_to(id, (peer, cloud), force_stop, call),
            Ok(None) => {
                let nobody = Problem::new(ProblemKind::Unavailable, "federation", "no member answered");
                self.reply(call, Err(nobody));
            }
            Err(problem) => self.reply(call, Err(problem)),
        }
    }

    fn move_to(
        &mut self,
        id: VmId,
        (peer, cloud): (Peer, Option<CloudName>),
        force_stop: bool,
        call: CallId,
    ) {
        // begin_move() asks whether it still may.
        self.begin_move(id, Course { peer, cloud, attempt: 0, force_stop }, Some(call));
    }
}

/// Whether a member speaks a version of the negotiation protocol that is spoken here.
fn speaks_with_us(jid: &crate::types::MemberJid, theirs: &str) -> Result<(), Problem> {
    if envelope::common_version(theirs).is_some() {
        return Ok(());
    }
    let ours = envelope::VERSIONS.map(|v| v.to_string()).join(",");
    let reason = format!("negotiates in version {theirs:?}, and this cloud in version {ours:?}");
    Err(Problem::new(ProblemKind::Refused, format!("member {jid}"), reason)
        .next("bring the older of the two brokers up to date"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_of_another_version_is_refused_with_what_to_do() {
        let jid = "b@x".parse().unwrap();
        assert!(speaks_with_us(&jid, "2,1").is_ok());
        let problem = speaks_with_us(&jid, "4,3").unwrap_err();
        assert_eq!(problem.kind, ProblemKind::Refused);
        assert!(problem.reason.contains("\"4,3\"") && problem.next_step.contains("up to date"), "{problem}");
    }
}
