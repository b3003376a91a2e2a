//! One effect, one function: begins what the core wants done, off the runner's own task.

use std::any::Any;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use tokio_util::sync::CancellationToken;

use crate::broker::effect::{Export, Holdings, ReceiptWanted, Scanned, Serving, StageOrder};
use crate::broker::{self, CallId, Done, Effect, Matter, Peer, Token, Unanswered, owners};
use crate::interface::{ContentRequest, Event, Problem, Reply, VmAdopt, chain};
use crate::migration::records::VmRecord;
use crate::migration::{Denial, DenialCode, RequestBody};
use crate::transfer::Ticket;
use crate::types::{CloudName, ComponentId, Hash, MigrationId, PackId, RecipeId, VmId};
use crate::vm::VmSpec;

use super::content::serving::Served;
use super::content::{catalogue, healing, optimize, receipts};
use super::host::{adopt, machine, monolithic, rehearsal, scan, stage};
use super::shared::AskError;
use super::{Hands, Input, Outcome, Shared, check, conversations};

/// Packed firmware variables that fit into a message beside everything else.
const FIRMWARE_BYTES_MAX: usize = 48 << 10;
/// How long a guest is watched for its ready line before its boot counts as unobserved.
const BOOT_WATCH: Duration = Duration::from_secs(600);
/// How often a copy's progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// Between tries to open a failed index anew.
const INDEX_PAUSE: Duration = Duration::from_secs(10);

impl Hands {
    pub(super) fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Reply(call, result) => self.reply(call, *result),
            Effect::Tell(call, event) => self.tell(call, event),
            Effect::Answer(ask, sealed) => {
                if let Some(reply) = self.asks.remove(&ask) {
                    let _ = reply.send(sealed);
                }
            }
            Effect::Ask { token, to, about, body } => self.ask(token, to, about, *body),
            Effect::Check { token, to, about, spec } => self.check(token, to, about, *spec),
            Effect::Reserve { token, to, about, spec, lineage } => {
                let shared = self.shared.clone();
                self.async_job(token, async move {
                    let answer = conversations::reserve(&shared, &to, about, *spec, *lineage).await;
                    Done::Answered(answer.map_err(|e| unanswered(&e)))
                });
            }
            Effect::Plan { token, record, peers } => self.plan(token, *record, peers),
            Effect::AskOwners { token, of, claims } => {
                let shared = self.shared.clone();
                self.async_job(token, async move {
                    let said = conversations::ask_owners(&shared, &of, claims).await;
                    Done::OwnersSaid(said.map_err(|e| unanswered(&e)))
                });
            }
            Effect::KnowOwners { token, by, claims } => {
                self.blocking_job(token, move |shared| {
                    let kept = |vm| shared.records.lineage(vm).ok();
                    let (known, disputed) = owners::known_beyond(&by, claims.into_iter(), kept);
                    Done::OwnersKnown { known, disputed }
                });
            }
            Effect::Verify { token, known, successions, pages } => {
                self.blocking_job(token, move |_| {
                    Done::Verified(known.with(&successions).continued(pages).map(Box::new))
                });
            }
            Effect::Speaks(member, version) => self.shared.versions.note(&member, version),
            Effect::Announce(cloud) => (self.announce)(*cloud),

            Effect::Admit { keys, caps } => {
                self.shared.tickets.set_members(keys.into_iter().collect());
                self.shared.tickets.set_caps(caps.into_iter().collect());
            }
            Effect::AdmitAlso(key, cap) => self.shared.tickets.add_member(key, cap),
            Effect::Part(key) => {
                self.shared.tickets.withdraw_all_of(&key);
                self.shared.endpoint.cut(&key);
            }
            Effect::Withdraw(ticket) => self.shared.tickets.withdraw(&ticket_of(&ticket)),
            Effect::Lend { token, to, ticket, components, packs } => {
                self.blocking_job(token, move |shared| {
                    Done::Lent(lend(shared, &to, ticket, &components, &packs))
                });
            }
            Effect::Cap(id, bytes_per_s) => self.moves.cap(id, bytes_per_s),
            Effect::EndServing(id) => {
                if let Some(ticket) = self.moves.end_leaving(id) {
                    self.shared.tickets.withdraw(&ticket);
                }
            }

            Effect::Wake { token, at } => {
                let shared = self.shared.clone();
                let wait = at.since(shared.now());
                self.async_job(token, async move {
                    tokio::time::sleep(wait).await;
                    Done::Due
                });
            }

            Effect::KeepPromise { token, promise, to } => {
                let shared = self.shared.clone();
                tokio::task::spawn_blocking(move || {
                    let kept = shared.records.save_return(&promise, Some(&to));
                    if let Err(e) = &kept
                        && e.is_undecided()
                    {
                        return shared.post(Input::Undecided(chain(e)));
                    }
                    let done = Done::PromiseKept(kept.map_err(|e| chain(&e)));
                    shared.post(Input::Done(token, Box::new(done), None));
                });
            }
            Effect::Mark(marks) => self.continuity.note(&marks),

            Effect::Define(record) => {
                let shared = self.shared.clone();
                tokio::spawn(async move {
                    if let Err(e) = shared.driver.define(&machine::machine_of(&shared, &record)).await {
                        tracing::error!(vm = %record.spec.name, error = chain(&e), "cannot be defined");
                    }
                });
            }
            Effect::Start { token, record } => {
                let shared = self.shared.clone();
                self.machine_job(record.spec.id, token, async move {
                    Done::Started(machine::run_machine(&shared, &machine::machine_of(&shared, &record)).await)
                });
            }
            Effect::Stop { token, vm, name, mode } => {
                let shared = self.shared.clone();
                self.machine_job(vm, token, async move {
                    use crate::vm::PowerState::{Crashed, Stopped};
                    let begun = Instant::now();
                    let was_off = matches!(shared.driver.state(vm), Err(_) | Ok(Crashed | Stopped));
                    let result = match shared.driver.state(vm) {
                        // What the hypervisor never heard of is off.
                        Err(_) | Ok(Stopped) => Ok(()),
                        Ok(_) => shared.driver.stop(vm, mode).await,
                    };
                    let result = result.map_err(|e| Problem::from_driver(&name, &e));
                    Done::Stopped { result, took: begun.elapsed(), was_off }
                });
            }
            Effect::Pause { token, vm } => {
                let shared = self.shared.clone();
                self.machine_job(vm, token, async move {
                    Done::Paused(shared.driver.pause(vm).await.map_err(|e| chain(&e)))
                });
            }
            Effect::Resume(vm) => {
                let shared = self.shared.clone();
                tokio::spawn(async move {
                    match shared.driver.resume(vm).await {
                        Ok(()) => tracing::info!(vm = %vm, "the guest goes on"),
                        Err(e) => tracing::warn!(vm = %vm, error = chain(&e), "the guest does not go on"),
                    }
                });
            }
            Effect::Undefine(vm) => {
                let shared = self.shared.clone();
                tokio::spawn(async move {
                    if let Err(e) = shared.driver.undefine(vm).await {
                        tracing::warn!(vm = %vm, error = chain(&e), "cannot undefine");
                    }
                });
            }
            Effect::EndTracking(vm) => {
                let shared = self.shared.clone();
                tokio::spawn(async move { scan::end_tracking(&shared, vm).await });
            }
            Effect::Scan { token, record, serving, pass, last } => {
                self.scan(token, *record, *serving, pass, last)
            }
            Effect::EstimateMonolithic { token, migration, recipe } => {
                self.estimate(token, migration, recipe)
            }
            Effect::Stage { token, order } => self.stage(token, *order),
            Effect::EndStaging(id) => self.moves.end_arriving(id, true),
            Effect::KeepStaged(id) => self.moves.end_arriving(id, false),
            Effect::RemoveStaged { vm, disks, no_record } => {
                let dir = self.dir_of(vm, &disks);
                let (moves, shared) = (self.moves.clone(), self.shared.clone());
                tokio::spawn(async move {
                    dir.remove(shared, vm, no_record).await;
                    moves.forget_dir(vm, &disks);
                });
            }
            Effect::WatchBoot { token, vm } => {
                let shared = self.shared.clone();
                self.async_job(token, async move {
                    let begun = Instant::now();
                    let seen = match shared.driver.console_log(vm) {
                        Ok(log) => machine::watch_boot(&log, BOOT_WATCH).await,
                        Err(_) => false,
                    };
                    Done::Booted(seen.then(|| begun.elapsed().as_millis() as u64))
                });
            }
            Effect::Make { token, id, create } => {
                self.blocking_job(token, move |shared| {
                    Done::Made(machine::make_vm(shared, id, *create).map(Box::new))
                });
            }
            Effect::Adopt { token, call, id, adopt } => self.adopt(token, call, id, *adopt),
            Effect::Export(export) => self.export(*export),
            Effect::Grow { token, record, root, user_data } => {
                self.blocking_job(token, move |shared| {
                    Done::Grown(machine::grow(shared, &record, root, user_data))
                });
            }
            Effect::Remove { token, record } => {
                let shared = self.shared.clone();
                self.async_job(token, async move { Done::Removed(machine::remove(&shared, *record).await) });
            }
            Effect::Scrub { vm, disks } => {
                let dir = self.shared.records.vm_dir(vm);
                tokio::task::spawn_blocking(move || {
                    disks.iter().for_each(|disks| stage::scrub_dir(&dir.join(disks)));
                });
            }

            Effect::Content { call, request, recipes } => self.content(call, *request, recipes),
            Effect::Heal { call, peers } => {
                let (shared, events) = (self.shared.clone(), self.events_of(call));
                if let Some(caller) = self.calls.remove(&call) {
                    tokio::spawn(async move {
                        let healed = healing::heal(&shared, &peers, &events).await.map(Reply::Report);
                        let _ = caller.reply.send(healed);
                    });
                }
            }
            Effect::Receipt(wanted) => self.receipt(*wanted),
            Effect::LookUp { token, spec, components, packs } => {
                self.blocking_job(token, move |shared| {
                    Done::Holdings(look_up(shared, &spec, &components, &packs))
                });
            }
            Effect::ListComponents(token) => {
                // Listing many components takes a second.
                self.blocking_job(token, |shared| {
                    let all = shared.repository.components().unwrap_or_default();
                    Done::Components(all.into_iter().map(|(id, _)| id).collect())
                });
            }
            Effect::Optimize(components) => self.optimize(components),
            Effect::StopOptimizing => self.optimizing.cancel(),
            // The loop's own.
            Effect::End(_) | Effect::Shutdown => {}
        }
    }

    fn tell(&self, call: CallId, event: Event) {
        use tokio::sync::mpsc::error::TrySendError::Closed;
        let Some(caller) = self.calls.get(&call) else { return };
        if matches!(caller.events.try_send(event), Err(Closed(_))) {
            self.shared.tell(broker::Input::CallerGone(call));
        }
    }

    // --- how jobs run ---

    fn async_job(&self, token: Token, job: impl Future<Output = Done> + Send + 'static) {
        let shared = self.shared.clone();
        tokio::spawn(async move {
            let done = job.await;
            shared.post(Input::Done(token, Box::new(done), None));
        });
    }

    /// What it comes to is told after all the hypervisor's events of before.
    fn machine_job(&self, vm: VmId, token: Token, job: impl Future<Output = Done> + Send + 'static) {
        let outcomes = self.outcomes.clone();
        tokio::spawn(async move {
            let done = job.await;
            // After shutdown nobody wants to know.
            let _ = outcomes.send(Outcome { vm, token, done });
        });
    }

    fn blocking_job(&self, token: Token, job: impl FnOnce(&Arc<Shared>) -> Done + Send + 'static) {
        let shared = self.shared.clone();
        tokio::task::spawn_blocking(move || {
            let done = job(&shared);
            shared.post(Input::Done(token, Box::new(done), None));
        });
    }

    // --- other brokers ---

    fn ask(&self, token: Token, to: Peer, about: Matter, body: RequestBody) {
        let shared = self.shared.clone();
        self.async_job(token, async move {
            Done::Answered(shared.ask(&to, about, body).await.map_err(|e| unanswered(&e)))
        });
    }

    fn check(&self, token: Token, to: Peer, about: Matter, spec: VmSpec) {
        let shared = self.shared.clone();
        self.async_job(token, async move {
            let repository = shared.repository.clone();
            let id = spec.recipe;
            let recipe = check::blocking(move || {
                repository.recipe(&id).map_err(|e| Denial::new(DenialCode::Content, chain(&e)))
            });
            let checked = async {
                let recipe = Arc::new(recipe.await?);
                let checked = check::check(&shared, &to, about, &spec, &recipe).await?;
                Ok(Box::new((checked, (*recipe).clone())))
            };
            Done::Checked(checked.await)
        });
    }

    fn plan(&self, token: Token, record: VmRecord, peers: Vec<(Peer, Option<CloudName>)>) {
        let shared = self.shared.clone();
        self.async_job(token, async move { Done::Planned(check::candidates(&shared, &record, peers).await) });
    }

    // --- moves ---

    fn dir_of(&self, vm: VmId, disks: &str) -> stage::StagedDir {
        let path = self.shared.records.vm_dir(vm).join(disks);
        self.moves.dir(vm, disks, path)
    }

    fn scan(&self, token: Token, record: VmRecord, serving: Serving, pass: u32, last: bool) {
        let (shared, moves) = (self.shared.clone(), self.moves.clone());
        let before = moves.looked(serving.migration);
        let disks = machine::paths_of(&shared, &broker::effect::DisksOf::record(&record));
        let held = serving.seed;
        self.async_job(token, async move {
            let scanned = scan::look(shared.clone(), record.spec.clone(), disks, before, last).await;
            let scanned = match scanned {
                Ok(scanned) => scanned,
                Err(denial) => return Done::Scanned(Err(denial)),
            };
            let read_bytes = scanned.looked.read_bytes();
            let ticket = ticket_of(&serving.ticket);
            // A move that has ended meanwhile is not served.
            let content = moves.with_leaving(serving.migration, |leaving| {
                leaving.ticket = Some(ticket);
                leaving.nodes.extend(scanned.nodes);
                leaving.looked = scanned.looked;
                Served {
                    peer: Some(serving.to),
                    recipe: Some(serving.recipe),
                    components: serving.components.into_iter().collect(),
                    packs: scanned.packs,
                    nodes: leaving.nodes.clone(),
                    blocks: leaving.looked.disks.iter().map(|d| d.index.clone()).collect(),
                    limiter: leaving.limiter.clone(),
                }
            });
            if let Some(content) = content {
                shared.tickets.serve(ticket, content);
            }
            let machine = machine::machine_of(&shared, &record);
            let firmware = check::blocking(move || Ok(firmware_of(&machine))).await.ok().flatten();
            let (repository, now) = (shared.repository.clone(), scanned.seed);
            let missing = check::blocking(move || match pass {
                1 => check::disks_missing(&repository, &now, held.as_ref()),
                _ => Ok((0, 0)),
            });
            // It is foretold by it, nothing else.
            let (root, user_data) = missing.await.unwrap_or_default();
            let missing_bytes = root.saturating_add(user_data);
            Done::Scanned(Ok(Scanned { seed: scanned.seed, missing_bytes, read_bytes, firmware }))
        });
    }

    fn estimate(&self, token: Token, migration: MigrationId, recipe: RecipeId) {
        let disks = self.moves.take_scans(migration);
        self.blocking_job(token, move |shared| {
            let estimate = monolithic::monolithic(shared, &recipe, &disks).inspect_err(|e| {
                tracing::info!(%migration, error = chain(e), "no estimate of a monolithic move");
            });
            Done::Monolithic(estimate.ok())
        });
    }

    fn stage(&self, token: Token, order: StageOrder) {
        let id = order.migration;
        let (staged, cancel) = self.moves.begin_pass(id);
        let (progress, mut reports) = tokio::sync::watch::channel(Default::default());
        let vm = order.spec.id;
        let paths = |disks: &broker::effect::DisksOf| machine::paths_of(&self.shared, disks);
        let job = stage::StageJob {
            shared: self.shared.clone(),
            peer: order.from,
            spec: order.spec,
            init: order.init,
            dir: self.dir_of(vm, &order.disks),
            goes_on_with: order.goes_on_with.as_ref().map(|disks| self.dir_of(vm, disks)),
            seeds: order.seeds.as_ref().map(paths),
            lenders: order.lenders,
            neighbours: order.neighbours.iter().map(paths).collect(),
            staged,
            account: order.account,
            progress,
            cancel,
        };
        let (shared, moves) = (self.shared.clone(), self.moves.clone());
        self.async_job(token, async move {
            let tasks = job.dir.tasks.clone();
            let work = tasks.spawn(stage::run(job));
            while reports.changed().await.is_ok() {
                let report = reports.borrow_and_update().clone();
                shared.tell(broker::Input::Staging(id, Box::new(report)));
                tokio::time::sleep(PROGRESS_EVERY).await;
            }
            Done::Staged(match work.await {
                Ok(Ok((staged, account))) => {
                    moves.end_pass(id, staged);
                    Ok(account)
                }
                Ok(Err(denial)) => Err(denial),
                Err(e) => Err(Denial::new(DenialCode::Other, format!("staging ended early: {e}"))),
            })
        });
    }

    // --- disks in and out ---

    fn adopt(&self, token: Token, call: CallId, id: VmId, adopt: VmAdopt) {
        let (shared, events, given) = (self.shared.clone(), self.events_of(call), self.given_with(call));
        tokio::task::spawn_blocking(move || {
            let mut keep: Option<Box<dyn Any + Send>> = None;
            let result = adopt::take(&shared, id, &adopt, &given, &events).map(|(mut view, adopted)| {
                let record = adopted.map(|adopted| {
                    view.component = Some(adopted.base.label.clone());
                    // From when its record is there the VM's recipe keeps everything.
                    keep = Some(Box::new(adopted.base.kept));
                    adopted.record
                });
                Box::new((view, record))
            });
            shared.post(Input::Done(token, Box::new(Done::Adopted(result)), keep));
        });
    }

    fn export(&self, export: Export) {
        let (events, given) = (self.events_of(export.call), self.given_with(export.call));
        self.blocking_job(export.token, move |shared| {
            Done::Exported(adopt::export(shared, &export, &given, &events))
        });
    }

    // --- content ---

    fn content(&mut self, call: CallId, request: ContentRequest, recipes: Vec<RecipeId>) {
        let Some(caller) = self.calls.remove(&call) else { return };
        let shared = self.shared.clone();
        tokio::task::spawn_blocking(move || {
            let grace = shared.config.repository.gc_grace;
            let (repository, composer) = (&shared.repository, &shared.composer);
            let stop = || caller.events.is_closed();
            let mut tell = |event| drop(caller.events.try_send(event));
            let files = (&request, &*caller.given);
            let result = catalogue::call(repository, composer, grace, &recipes, files, &stop, &mut tell);
            let _ = caller.reply.send(result);
        });
    }

    fn receipt(&mut self, wanted: ReceiptWanted) {
        let Some(caller) = self.calls.remove(&wanted.call) else { return };
        let records = self.shared.records.clone();
        tokio::task::spawn_blocking(move || {
            let _ = caller.reply.send(receipts::receipt(&records, wanted));
        });
    }

    fn optimize(&mut self, components: Vec<ComponentId>) {
        self.optimizing.cancel();
        self.optimizing = CancellationToken::new();
        let (token, shared) = (self.optimizing.clone(), self.shared.clone());
        tokio::task::spawn_blocking(move || {
            let stop = || token.is_cancelled();
            if let Err(error) = optimize::optimize_quietly(&shared.repository, &components, &stop) {
                tracing::warn!(error = chain(&error), "not all could be optimised");
            }
        });
    }

    /// Opens the repository's index anew if its storage failed, as when the disk was full, until it works.
    pub(super) fn heal_index(&mut self) {
        let now = self.shared.now();
        if !self.shared.repository.index_has_failed() || now < self.index_retry {
            return;
        }
        self.index_retry = now.plus(INDEX_PAUSE);
        let repository = self.shared.repository.clone();
        tokio::task::spawn_blocking(move || match repository.heal_index() {
            Ok(_) => tracing::info!("the repository's index works again"),
            Err(e) => tracing::error!(error = chain(&e), "the repository's index failed; it is tried again"),
        });
    }
}

fn unanswered(e: &AskError) -> Unanswered {
    Unanswered(chain(e))
}

fn ticket_of(ticket: &Hash) -> Ticket {
    Ticket::from_bytes(*ticket.as_bytes())
}

/// The firmware's variables, packed. A VM that never ran has none.
fn firmware_of(machine: &crate::hypervisor::Machine) -> Option<String> {
    let bytes = std::fs::read(&machine.firmware_vars).ok()?;
    let packed = zstd::bulk::compress(&bytes, 9).ok()?;
    if packed.len() > FIRMWARE_BYTES_MAX {
        tracing::warn!(vm = %machine.spec.name, "its firmware variables are too large to travel; the target begins with fresh ones");
        return None;
    }
    Some(BASE64.encode(packed))
}

/// What is held of what a VM needs, and whether it could start.
fn look_up(shared: &Shared, spec: &VmSpec, components: &[ComponentId], packs: &[PackId]) -> Holdings {
    let (components_lacking, packs_lacking) = check::holdings(&shared.repository, components, packs);
    Holdings {
        composed: shared.composer.is_composed(&spec.recipe),
        refusal: rehearsal::refusal(shared, spec),
        components_lacking,
        packs_lacking,
    }
}

/// Looks up what of the objects has a name here, and serves it under `ticket`.
fn lend(
    shared: &Shared,
    to: &Peer,
    ticket: Option<Hash>,
    components: &[ComponentId],
    packs: &[PackId],
) -> Result<(Vec<u32>, Vec<u32>), Denial> {
    let Some(ticket) = ticket else { return Ok((Vec::new(), Vec::new())) };
    let held = shared.repository.held_by_name(components, packs);
    let (c, p) = held.map_err(|e| Denial::new(DenialCode::Content, chain(&e)))?;
    if c.is_empty() && p.is_empty() {
        return Ok((c, p));
    }
    let content = Served {
        peer: Some(to.key),
        components: c.iter().map(|i| components[*i as usize]).collect(),
        packs: p.iter().map(|i| packs[*i as usize]).collect(),
        ..Served::default()
    };
    tracing::info!(member = %to.jid, components = content.components.len(), packs = content.packs.len(), "lends components");
    shared.tickets.serve(ticket_of(&ticket), content);
    Ok((c, p))
}
