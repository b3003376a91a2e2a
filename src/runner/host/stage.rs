//! Bringing a VM's copy at the target to a given state: fetch what is missing, compose the base,
//! apply the blocks of both disks.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::broker::Peer;
use crate::broker::effect::StageReport;
use crate::component::Recipe;
use crate::disk::{self, BlockIndex, DiskFile, StagedDisk};
use crate::fault;
use crate::migration::message::{Initialization, Progress, StageAccount};
use crate::migration::{Denial, DenialCode};
use crate::repository::{ObjectId, Repository, RepositoryError};
use crate::runner::Shared;
use crate::runner::check::{blocking, joined};
use crate::runner::content::borrowing;
use crate::runner::content::receiving::{self, Packs, Sink, TakeBlock};
use crate::transfer::{
    Connection, ObjectKey, ObjectSink, Progress as Counter, Refusal, SinkError, Ticket, TransferError,
};
use crate::types::{BlockHash, Hash, PackId, PeerText, VmId};
use crate::vm::{Block, ChunkMap, MapRef, VmSpec};

use super::machine::DiskPaths;

/// Unpacked firmware variables.
const FIRMWARE_BYTES_MAX: usize = 4 << 20;
/// Attempts to go on after the data link broke, each after a growing pause.
const RECONNECTS_MAX: u32 = 12;
/// Packs smaller than this are not asked of others than the source.
const LENT_BYTES_MIN: u64 = 1 << 20;
/// So many blocks of a root delta are looked for in the composition, too, before they are fetched.
const BASE_SEARCH_BLOCKS_MIN: usize = 256;
/// Blocks of other VMs that are looked through for what need not travel, 12 bytes of memory each.
const NEIGHBOUR_PLACES_MAX: usize = 8 << 20;
/// How long the disks of an earlier migration of the VM may be held by it.
const OPEN_PATIENCE: Duration = Duration::from_secs(5);

/// Both disks as far as they are staged, kept from pass to pass.
pub struct Staged {
    pub root: StagedDisk,
    pub user_data: Option<StagedDisk>,
    /// Blocks of the copy this cloud kept when the VM left: what comes home need not travel.
    seeds: Vec<Arc<BlockIndex>>,
    /// The composition, and its blocks once they were worth a look.
    base: PathBuf,
    base_blocks: Option<Arc<BlockIndex>>,
    /// What the passes so far reported, so that the next goes on from there.
    reported: Progress,
}

/// A directory of disks that are or were staged, with everything that may still be at work in it:
/// a pass that is cancelled ends only after its last step.
#[derive(Clone)]
pub struct StagedDir {
    pub path: PathBuf,
    pub tasks: TaskTracker,
}

pub struct StageJob {
    pub shared: Arc<Shared>,
    pub peer: Peer,
    pub spec: VmSpec,
    pub init: Initialization,
    pub dir: StagedDir,
    /// What an earlier migration of the VM staged.
    pub goes_on_with: Option<StagedDir>,
    /// Disks of a copy that was kept here.
    pub seeds: Option<DiskPaths>,
    /// Other trusted members that are online: they may lend components.
    pub lenders: Vec<Peer>,
    /// Disks of other VMs that came from the same member.
    pub neighbours: Vec<DiskPaths>,
    pub staged: Option<Staged>,
    /// What earlier passes counted.
    pub account: StageAccount,
    pub progress: watch::Sender<StageReport>,
    pub cancel: CancellationToken,
}

/// Runs one pass. On success the disks are at the pass's state, durable, every block verified (in
/// a pass before the last, blocks the guest overwrote meanwhile may be missing). How far it came is reported
/// however it ends.
pub async fn run(job: StageJob) -> Result<(Staged, StageAccount), Denial> {
    let cancel = job.cancel.clone();
    let mut pass = Stage::new(job)?;
    let counters = pass.counters.clone();
    let reporter = pass.job.progress.clone();
    let work = pass.run();
    tokio::pin!(work);
    let mut tick = tokio::time::interval(Duration::from_millis(200));
    let result = loop {
        tokio::select! {
            result = &mut work => break result,
            () = cancel.cancelled() => break Err(Denial::new(DenialCode::Other, "cancelled")),
            _ = tick.tick() => { reporter.send_replace(counters.report()); }
        }
    };
    reporter.send_replace(counters.report());
    result
}

/// Bytes so far by kind, readable while the fetches run.
#[derive(Default)]
struct Counters {
    components: Arc<Counter>,
    maps: Arc<Counter>,
    root_delta: Arc<Counter>,
    user_data: Arc<Counter>,
    expected: Mutex<Expected>,
    /// Delivered by earlier passes.
    before_bytes: u64,
    /// What earlier passes cost, and what of this one is not counted in bytes.
    account: Mutex<StageAccount>,
}

/// What a pass is to bring, as far as that is known by now.
#[derive(Clone, Default)]
struct Expected {
    step: String,
    component_bytes: u64,
    root_delta_bytes: u64,
    user_data_bytes: u64,
}

impl Counters {
    fn progress(&self) -> Progress {
        let expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let kinds = [
            (&self.components, expected.component_bytes),
            (&self.root_delta, expected.root_delta_bytes),
            (&self.user_data, expected.user_data_bytes),
        ];
        let mut progress = Progress {
            step: expected.step.into(),
            bytes_done: self.before_bytes,
            bytes_total: self.before_bytes,
        };
        for (counter, expected_bytes) in kinds {
            let done = counter.snapshot().payload_bytes;
            progress.bytes_done = progress.bytes_done.saturating_add(done);
            // Partly what the source says.
            progress.bytes_total = progress.bytes_total.saturating_add(expected_bytes.max(done));
        }
        progress
    }
    fn expect(&self, change: impl FnOnce(&mut Expected)) {
        change(&mut self.expected.lock().unwrap_or_else(PoisonError::into_inner));
    }
    fn count(&self, change: impl FnOnce(&mut StageAccount)) {
        change(&mut self.account.lock().unwrap_or_else(PoisonError::into_inner));
    }
    /// What all passes cost so far.
    fn account(&self) -> StageAccount {
        let mut account = self.account.lock().unwrap_or_else(PoisonError::into_inner).clone();
        account.component_bytes += self.components.snapshot().encoded_bytes;
        account.map_bytes += self.maps.snapshot().encoded_bytes;
        account.root_delta_bytes += self.root_delta.snapshot().encoded_bytes;
        account.user_data_bytes += self.user_data.snapshot().encoded_bytes;
        account
    }
    fn report(&self) -> StageReport {
        StageReport {
            progress: self.progress(),
            account: self.account(),
            root_delta_bytes: self.root_delta.snapshot().payload_bytes,
            user_data_bytes: self.user_data.snapshot().payload_bytes,
        }
    }
}

struct Stage {
    job: StageJob,
    recipe: Arc<Recipe>,
    ticket: Ticket,
    connection: Option<Connection>,
    /// UDP bytes of connections that were lost.
    wire_bytes: u64,
    counters: Arc<Counters>,
    packs: Arc<Packs>,
    /// How long content flowed.
    flowing: Duration,
}

impl Stage {
    fn new(job: StageJob) -> Result<Self, Denial> {
        let bad = |text: String| Denial::new(DenialCode::Content, text);
        let bytes = BASE64.decode(&job.init.recipe).map_err(|_| bad("the recipe is not base64".into()))?;
        let recipe = Recipe::decode(&bytes).map_err(|e| bad(format!("the recipe is malformed: {e}")))?;
        if recipe.id() != job.spec.recipe || job.init.spec != job.spec {
            return Err(bad("the recipe or the VM is another than was reserved".into()));
        }
        // It may have been made larger since.
        if recipe.disk.virtual_size_bytes > job.spec.root_size.0 {
            return Err(bad("the recipe's disk is larger than the VM's".into()));
        }
        let pass = &job.init.pass;
        for (map, size) in
            [(&pass.root_delta, job.spec.root_size), (&pass.user_data, job.spec.user_data_size)]
        {
            map.check().map_err(|e| bad(e.to_string()))?;
            if map.disk_size_bytes != size.0 {
                return Err(bad("a chunk map's disk has another size than the VM's".into()));
            }
        }
        if job.init.source_key != job.peer.key {
            return Err(bad("the source's transfer key is not its identity key".into()));
        }
        let before = job.staged.as_ref().map(|s| s.reported.clone()).unwrap_or_default();
        let ticket: Hash = job.init.ticket.parse().map_err(|_| bad("the ticket is malformed".into()))?;
        Ok(Self {
            recipe: Arc::new(recipe),
            ticket: Ticket::from_bytes(*ticket.as_bytes()),
            connection: None,
            wire_bytes: job.account.wire_bytes,
            counters: Arc::new(Counters {
                before_bytes: before.bytes_done,
                account: Mutex::new(job.account.clone()),
                ..Counters::default()
            }),
            packs: Arc::default(),
            flowing: Duration::ZERO,
            job,
        })
    }

    async fn run(&mut self) -> Result<(Staged, StageAccount), Denial> {
        if let Some(earlier) = self.job.goes_on_with.take() {
            earlier.become_dir(&self.job.dir.path).await;
        }
        if self.job.init.pass.number == 1 {
            super::rehearsal::rehearse(&self.job.shared, &self.job.spec).await?;
        }
        let (root_map, user_map) = self.fetch_maps().await?;
        if self.job.staged.is_none() && self.job.init.component_bytes > 0 {
            // All that may come is known before the first of it: not what of the disks is here already.
            self.counters.expect(|e| {
                e.component_bytes = self.job.init.component_bytes;
                (e.root_delta_bytes, e.user_data_bytes) = (data_bytes(&root_map), data_bytes(&user_map));
            });
        }
        self.fetch_components().await?;

        // The overlay names its base, so the base comes first.
        self.counters.expect(|e| e.step = "compose".into());
        let compose_begun = Instant::now();
        if let Err(denial) = self.compose().await {
            // A pack that was damaged here is set aside now, and so counts as missing.
            tracing::warn!(reason = denial.text.as_str(), "composing failed; fetching what is damaged again");
            self.fetch_components().await?;
            self.compose().await?;
        }
        let compose_ms = compose_begun.elapsed().as_millis() as u64;
        fault::point("target-composed");
        let staged = match self.job.staged.take() {
            Some(staged) => staged,
            None => self.open_disks().await?,
        };
        let mut staged = self.apply(staged, root_map, user_map).await?;
        self.place_firmware().await?;

        let (flowing, wire_bytes) = (self.flowing, self.connection.as_ref().map_or(0, wire_bytes_of));
        self.counters.count(|account| {
            account.compose_ms = account.compose_ms.max(compose_ms);
            account.fetch_ms += flowing.as_millis() as u64;
            account.wire_bytes = self.wire_bytes + wire_bytes;
        });
        staged.reported = self.counters.progress();
        Ok((staged, self.counters.account()))
    }

    /// Manifests first, since they name the packs; then the packs that are missing.
    async fn fetch_components(&mut self) -> Result<(), Denial> {
        let repository = self.job.shared.repository.clone();
        let components = self.recipe.components.clone();
        let pin = repository.pin(components.iter().map(|c| ObjectId::Manifest(*c)).collect());
        let lacking = {
            let (repository, components) = (repository.clone(), components.clone());
            blocking(move || {
                Ok(components.into_iter().filter(|c| !repository.has_manifest(c)).collect::<Vec<_>>())
            })
            .await?
        };
        self.counters.expect(|e| e.step = "fetch".into());
        if !lacking.is_empty() {
            let keys = lacking.iter().map(|c| ObjectKey::Manifest(*c)).collect();
            self.fetch(keys, self.counters.components.clone(), None, true).await?;
        }
        let Lacking { packs, needed, names, bases } = {
            let (repository, names) = (repository.clone(), self.job.init.component_names.clone());
            let first = self.job.staged.is_none();
            blocking(move || missing_packs(&repository, &components, &names, first)).await?
        };
        // A delta leans on them until it is applied.
        let _bases_pinned = repository.pin(bases.values().flatten().map(|p| ObjectId::Pack(*p)).collect());
        self.counters.count(|account| {
            account.components_fetched += lacking.len() as u32;
            account.packs_needed = account.packs_needed.max(needed);
            account.packs_fetched += packs.len() as u32;
            for name in names {
                if !account.fetched.contains(&name) {
                    account.fetched.push(name);
                }
            }
        });
        let _packs_pinned = repository.pin(packs.keys().map(|p| ObjectId::Pack(*p)).collect());
        if !packs.is_empty() {
            // What was called off stays here until it is collected: the floor holds against that too.
            let floor = self.job.shared.config.hypervisor.storage_floor.0;
            let needed = packs.values().fold(floor, |sum, size| sum.saturating_add(*size));
            repository.require_space(needed).map_err(|e| {
                Denial::new(DenialCode::Storage, crate::interface::chain(&e))
                    .next("let the target's operator run 'cicada repo gc', or free storage there")
            })?;
            self.packs = Arc::new(Packs { sizes: packs, bases });
            self.fetch_packs().await?;
        }
        // The recipe's own reference keeps all of it from here on.
        let (recipe, shared) = (self.recipe.clone(), self.job.shared.clone());
        blocking(move || shared.repository.put_recipe(&recipe).map(drop).map_err(|e| content(&e))).await?;
        drop(pin);
        // Deltas made less of it than was foreseen.
        self.counters.expect(|e| e.component_bytes = 0);
        Ok(())
    }

    /// The source's share comes from the source, the rest from other members at the same time; what
    /// they do not give comes from the source in the end.
    async fn fetch_packs(&mut self) -> Result<(), Denial> {
        let packs = self.packs.clone();
        let lenders = std::mem::take(&mut self.job.lenders);
        let mut keys: Vec<PackId> = packs.sizes.keys().copied().collect();
        keys.sort_unstable_by_key(|id| (u64::MAX - packs.sizes[id], *id));
        let (mut own, mut lent) = (Vec::new(), Vec::new());
        for (n, id) in keys.into_iter().enumerate() {
            // The source can send a delta, and others may be further away: small fry is its own.
            let asks_others = !packs.bases.contains_key(&id) && packs.sizes[&id] >= LENT_BYTES_MIN;
            if asks_others && n % (lenders.len() + 1) != 0 { lent.push(id) } else { own.push(id) }
        }
        let (shared, counter) = (self.job.shared.clone(), self.counters.components.clone());
        let borrowing = async {
            let objects: Vec<_> = lent.iter().map(|id| ObjectId::Pack(*id)).collect();
            borrowing::borrow(&shared, &lenders, &objects, &counter, &mut |_| ()).await
        };
        let own = own.into_iter().map(ObjectKey::Pack).collect();
        let (begun, flowing) = (Instant::now(), self.flowing);
        let fetching = self.fetch(own, counter.clone(), None, true);
        let (borrowed, fetched) = tokio::join!(borrowing, fetching);
        fetched?;
        // What is borrowed may flow for longer.
        if !borrowed.fetched.is_empty() {
            self.flowing = flowing + begun.elapsed();
        }
        self.wire_bytes += borrowed.wire_bytes;
        for member in borrowed.fetched.iter().map(|(_, member)| member).collect::<HashSet<_>>() {
            let packs = borrowed.fetched.iter().filter(|(_, from)| from == member).count();
            tracing::info!(%member, packs, "lent packs that the source needed not send");
        }
        for (member, reason) in &borrowed.reasons {
            tracing::info!(%member, reason, "lent less than it was asked for");
        }
        let repository = self.job.shared.repository.clone();
        let left = blocking(move || {
            let left = lent.into_iter().filter(|id| !repository.has_pack(id));
            Ok(left.map(ObjectKey::Pack).collect::<Vec<_>>())
        });
        let left = left.await?;
        self.fetch(left, counter, None, true).await
    }

    async fn compose(&self) -> Result<(), Denial> {
        let (shared, recipe) = (self.job.shared.clone(), self.recipe.id());
        blocking(move || shared.composer.composition(&recipe).map(drop).map_err(|e| content(&e))).await
    }

    async fn fetch_maps(&mut self) -> Result<(ChunkMap, ChunkMap), Denial> {
        let pass = self.job.init.pass;
        for map in [pass.root_delta, pass.user_data] {
            // One round for each level of the tree; equal subtrees end the descent.
            loop {
                let repository = self.job.shared.repository.clone();
                let missing =
                    blocking(move || repository.nodes_missing(&map).map_err(|e| content(&e))).await?;
                if missing.is_empty() {
                    break;
                }
                let keys = missing.into_iter().map(|(node, _)| ObjectKey::Node(node)).collect();
                self.fetch(keys, self.counters.maps.clone(), None, true).await?;
            }
        }
        let repository = self.job.shared.repository.clone();
        blocking(move || {
            let load = |map: &MapRef| repository.map(map).map_err(|e| content(&e));
            Ok((load(&pass.root_delta)?, load(&pass.user_data)?))
        })
        .await
    }

    /// Blocking work in the staging directory, which is nobody else's until it is done.
    async fn on_disks<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Denial> + Send + 'static,
    ) -> Result<T, Denial> {
        joined(self.job.dir.tasks.spawn_blocking(work)).await
    }

    async fn open_disks(&self) -> Result<Staged, Denial> {
        let (dir, spec, seeds) = (self.job.dir.path.clone(), self.job.spec.clone(), self.job.seeds.clone());
        let neighbours = self.job.neighbours.clone();
        let base = self.job.shared.composer.path_of(&self.recipe.id());
        let pass = self.job.init.pass;
        self.on_disks(move || {
            fs::create_dir_all(&dir).map_err(|e| content(&e))?;
            let paths = DiskPaths::in_dir(&dir, base);
            let open = |disk: DiskFile, shape: &MapRef| open_disk(&disk, shape).map_err(|e| content(&e));
            let base = paths.base.clone();
            let root = open(DiskFile::Root { overlay: paths.root, base: paths.base }, &pass.root_delta)?;
            let user_data = match spec.user_data_size.0 {
                0 => None,
                _ => Some(open(DiskFile::UserData { raw: paths.user_data }, &pass.user_data)?),
            };
            // A seed that cannot be read only means that more travels.
            let mut held = Vec::new();
            if let Some(old) = seeds {
                held.extend(disk::scan_root(&old.root, &old.base).ok().map(|(_, index)| Arc::new(index)));
                if spec.user_data_size.0 > 0 {
                    held.extend(disk::scan_user_data(&old.user_data).ok().map(|(_, index)| Arc::new(index)));
                }
            }
            let mut places_left = NEIGHBOUR_PLACES_MAX;
            for disks in neighbours {
                for disk in [
                    DiskFile::Root { overlay: disks.root, base: disks.base },
                    DiskFile::UserData { raw: disks.user_data },
                ] {
                    // What was staged there may be overwritten by now: each block is looked at.
                    let index = disk::index_as_staged(&disk).filter(|index| index.len() <= places_left);
                    if let Some(index) = index {
                        places_left -= index.len();
                        held.push(Arc::new(index));
                    }
                }
            }
            let reported = Progress::default();
            Ok(Staged { root, user_data, seeds: held, base, base_blocks: None, reported })
        })
        .await
    }

    async fn apply(
        &mut self,
        staged: Staged,
        root_map: ChunkMap,
        user_map: ChunkMap,
    ) -> Result<Staged, Denial> {
        let last = self.job.init.pass.last;
        let disks = Arc::new(Disks(Mutex::new(Some(staged))));
        let (root_map, user_map) = (Arc::new(root_map), Arc::new(user_map));
        // Both are looked at before either is fetched: then it is known what is still to come.
        let mut fetches = Vec::new();
        for (which, map) in [(Which::Root, root_map), (Which::UserData, user_map)] {
            let fetch = {
                let (disks, map) = (disks.clone(), map.clone());
                self.on_disks(move || disks.begin(which, &map)).await?
            };
            fetches.push((which, map, fetch));
        }
        self.counters.expect(|e| {
            e.step = "fetch".into();
            for (which, map, fetch) in &fetches {
                let bytes = fetch.len() as u64 * u64::from(map.block_size_bytes);
                match which {
                    Which::Root => e.root_delta_bytes = bytes,
                    Which::UserData => e.user_data_bytes = bytes,
                }
            }
        });
        for (which, map, fetch) in fetches {
            if !fetch.is_empty() {
                let counter = match which {
                    Which::Root => self.counters.root_delta.clone(),
                    Which::UserData => self.counters.user_data.clone(),
                };
                let keys = fetch.into_iter().map(ObjectKey::Block).collect();
                self.fetch(keys, counter, Some((disks.clone(), which)), last).await?;
            }
            let disks = disks.clone();
            self.on_disks(move || disks.finish(which, &map, last)).await?;
        }
        disks.take().ok_or_else(|| Denial::new(DenialCode::Other, "cancelled"))
    }

    async fn place_firmware(&self) -> Result<(), Denial> {
        let Some(packed) = self.job.init.firmware.clone() else { return Ok(()) };
        let path = DiskPaths::firmware_in(&self.job.dir.path);
        self.on_disks(move || {
            let bad = |text: &str| Denial::new(DenialCode::Content, format!("the firmware variables {text}"));
            let packed = BASE64.decode(packed).map_err(|_| bad("are not base64"))?;
            let bytes =
                zstd::bulk::decompress(&packed, FIRMWARE_BYTES_MAX).map_err(|_| bad("do not unpack"))?;
            crate::durable::write(&path, &bytes).map_err(|e| content(&e))
        })
        .await
    }

    /// Fetches all of `keys`, reconnecting where the link breaks. What the source refuses is an
    /// error if `strict`; else it was overwritten by the running guest and comes in a later pass.
    async fn fetch(
        &mut self,
        mut keys: Vec<ObjectKey>,
        counter: Arc<Counter>,
        disks: Option<(Arc<Disks>, Which)>,
        strict: bool,
    ) -> Result<(), Denial> {
        if keys.is_empty() {
            return Ok(());
        }
        let (repository, packs) = (self.job.shared.repository.clone(), self.packs.clone());
        let blocks = disks.map(|(disks, which)| -> Box<TakeBlock> {
            Box::new(move |hash, bytes| disks.take_block(which, hash, bytes))
        });
        let sink: Arc<dyn ObjectSink> = Arc::new(Sink { repository, packs, blocks });
        let mut attempt = 0;
        loop {
            let failure = match self.connect().await {
                Ok(connection) => {
                    let begun = Instant::now();
                    let fetched =
                        connection.fetch(&self.ticket, keys.clone(), sink.clone(), counter.clone()).await;
                    // The maps that lead to content are no content.
                    if !Arc::ptr_eq(&counter, &self.counters.maps) {
                        self.flowing += begun.elapsed();
                    }
                    match fetched {
                        Ok(report) => return settle(&report.refused, strict),
                        Err(e) => {
                            settle(&e.report.refused, strict)?;
                            // Some arrived: the link works, so patience begins anew.
                            if e.report.missing.len() < keys.len() {
                                attempt = 0;
                            }
                            keys = e.report.missing;
                            e.source
                        }
                    }
                }
                Err(e) => e,
            };
            attempt += 1;
            let again = matches!(
                failure,
                TransferError::Interrupted { .. }
                    | TransferError::Stalled { .. }
                    | TransferError::Unreachable { .. }
                    | TransferError::Handshake { .. }
            ) || is_torn(&failure);
            if !again || attempt > RECONNECTS_MAX {
                let next = match failure {
                    TransferError::Barred { .. } => {
                        "let the target's operator list the source's network in transfer.peer_networks, or set \
                         transfer.advertise at the source, then move again"
                    }
                    _ => "see that UDP reaches the source's transfer address, then move again",
                };
                return Err(content(&failure).next(next));
            }
            tracing::info!(
                reason = crate::interface::chain(&failure),
                attempt,
                missing = keys.len(),
                "transfer goes on after a pause"
            );
            self.drop_connection();
            tokio::time::sleep(Duration::from_millis(500 << attempt.min(5))).await;
        }
    }

    async fn connect(&mut self) -> Result<Connection, TransferError> {
        if let Some(connection) = self.connection.as_ref().filter(|c| c.is_open()) {
            return Ok(connection.clone());
        }
        self.drop_connection();
        let addresses =
            receiving::resolve(&self.job.shared, &self.job.peer, &self.job.init.addresses).await?;
        let connection = self.job.shared.endpoint.connect(&addresses, self.job.peer.key).await?;
        self.connection = Some(connection.clone());
        Ok(connection)
    }

    fn drop_connection(&mut self) {
        if let Some(lost) = self.connection.take() {
            self.wire_bytes += wire_bytes_of(&lost);
            lost.close();
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.drop_connection();
    }
}

/// Whether what was here of a pack did not fit: it was dropped, and all of it is asked for.
fn is_torn(failure: &TransferError) -> bool {
    matches!(failure, TransferError::Sink { source: SinkError::Storage(e), .. }
        if matches!(e.downcast_ref(), Some(RepositoryError::TornPart { .. })))
}

/// Opens a disk to be staged. What an earlier migration left of it may still be in the hands of
/// that one's last step, or be of no use: then it is made anew.
fn open_disk(disk: &DiskFile, shape: &MapRef) -> Result<StagedDisk, disk::DiskError> {
    let begun = Instant::now();
    loop {
        match StagedDisk::open_or_create(disk.clone(), shape) {
            Err(e) if disk.path().exists() => {
                tracing::info!(
                    error = crate::interface::chain(&e),
                    "a disk staged before cannot be gone on with"
                );
                if begun.elapsed() > OPEN_PATIENCE {
                    disk::scrub(disk.path())?;
                    return StagedDisk::open_or_create(disk.clone(), shape);
                }
                std::thread::sleep(OPEN_PATIENCE / 10);
            }
            opened => return opened,
        }
    }
}

/// Plain bytes of a disk's blocks that are not zeros.
fn data_bytes(map: &ChunkMap) -> u64 {
    let data = map.blocks.iter().filter(|(_, block)| *block != Block::Zero).count() as u64;
    data.saturating_mul(map.block_size_bytes.into())
}

fn wire_bytes_of(connection: &Connection) -> u64 {
    let stats = connection.stats();
    stats.sent_bytes + stats.received_bytes
}

fn settle(refused: &[(ObjectKey, Refusal)], strict: bool) -> Result<(), Denial> {
    let gone = |r: &Refusal| matches!(r, Refusal::Changed | Refusal::NotHeld);
    match refused.iter().find(|(_, r)| strict || !gone(r)) {
        Some((key, reason)) => {
            Err(Denial::new(DenialCode::Content, format!("the source does not serve {key}: {reason}")))
        }
        None => Ok(()),
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Which {
    Root,
    UserData,
}

/// The disks being staged; empty once they are taken out or the job is gone.
struct Disks(Mutex<Option<Staged>>);

impl Disks {
    fn with<T>(
        &self,
        work: impl FnOnce(&mut Staged) -> Result<T, disk::DiskError>,
    ) -> Result<T, disk::DiskError> {
        let mut guard = self.0.lock().unwrap_or_else(|e| e.into_inner());
        match guard.as_mut() {
            Some(staged) => work(staged),
            None => Err(disk::DiskError::Poisoned { path: PathBuf::from("the staged copy") }),
        }
    }

    /// Applies all that needs no fetching and names the blocks that do.
    fn begin(&self, which: Which, map: &ChunkMap) -> Result<Vec<BlockHash>, Denial> {
        self.with(|staged| {
            let seeds = staged.seeds.clone();
            let Some(disk) = staged.disk(which) else { return Ok(Vec::new()) };
            let needed = disk.begin(map)?.fetch;
            let left = disk.fill(needed, &seeds)?;
            if which == Which::UserData || left.len() < BASE_SEARCH_BLOCKS_MIN {
                return Ok(left);
            }
            // Reading a composition costs a second for some hundred megabytes: worth it for many blocks.
            let blocks = match staged.base_blocks.clone() {
                Some(blocks) => blocks,
                None => Arc::new(disk::scan_base(&staged.base)?),
            };
            staged.base_blocks = Some(blocks.clone());
            staged.root.fill(left, &[blocks])
        })
        .map_err(|e| content(&e))
    }

    fn take_block(&self, which: Which, hash: &BlockHash, bytes: &[u8]) -> Result<(), disk::DiskError> {
        self.with(|staged| match staged.disk(which) {
            Some(disk) => disk.write_block(hash, bytes).map(drop),
            None => Ok(()),
        })
    }

    fn finish(&self, which: Which, map: &ChunkMap, last: bool) -> Result<(), Denial> {
        self.with(|staged| match staged.disk(which) {
            Some(disk) if last => disk.finish(map),
            Some(disk) => disk.checkpoint(),
            None => Ok(()),
        })
        .map_err(|e| content(&e))
    }

    fn take(&self) -> Option<Staged> {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).take()
    }
}

impl Staged {
    fn disk(&mut self, which: Which) -> Option<&mut StagedDisk> {
        match which {
            Which::Root => Some(&mut self.root),
            Which::UserData => self.user_data.as_mut(),
        }
    }
}

fn content(e: &(dyn std::error::Error + 'static)) -> Denial {
    let mut cause = Some(e);
    while let Some(c) = cause {
        let full =
            c.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::StorageFull);
        if full {
            return Denial::new(
                DenialCode::Storage,
                format!("the disk is full: {}", crate::interface::chain(e)),
            )
            .next("free space at the target, then move again");
        }
        cause = c.source();
    }
    Denial::new(DenialCode::Content, crate::interface::chain(e))
}

/// What a target has to fetch of a recipe's components.
struct Lacking {
    /// Packs that are not held, with their plain sizes.
    packs: HashMap<PackId, u64>,
    /// Packs of all components, held or not.
    needed: u32,
    /// Names of the components they belong to.
    names: Vec<PeerText>,
    /// Held packs that may be other versions of those missing.
    bases: HashMap<PackId, Vec<PackId>>,
}

fn missing_packs(
    repository: &Repository,
    components: &[crate::types::ComponentId],
    names: &[PeerText],
    first_pass: bool,
) -> Result<Lacking, Denial> {
    let (mut seen, mut missing, mut incomplete) = (HashSet::new(), HashMap::new(), Vec::new());
    let mut held_bytes = 0;
    for (i, id) in components.iter().enumerate() {
        let manifest = repository.manifest(id).map_err(|e| content(&e))?;
        let before = missing.len();
        for pack in &manifest.packs {
            if !seen.insert(pack.id) {
                continue;
            }
            if repository.has_pack(&pack.id) {
                held_bytes += pack.size_bytes;
            } else {
                missing.insert(pack.id, pack.size_bytes);
            }
        }
        if missing.len() > before {
            incomplete.push(names.get(i).cloned().unwrap_or_else(|| manifest.name.as_str().into()));
        }
    }
    // How the repository learns: what it did not have to fetch.
    if first_pass && let Err(e) = repository.record_lookup(held_bytes, missing.values().sum()) {
        tracing::warn!(error = crate::interface::chain(&e), "lookup not counted");
    }
    // Without bases more travels, that is all.
    let bases = repository.likely_bases(components, &missing.keys().copied().collect());
    let bases = bases.unwrap_or_else(|e| {
        tracing::warn!(error = crate::interface::chain(&e), "no bases for deltas");
        HashMap::new()
    });
    Ok(Lacking { packs: missing, needed: seen.len() as u32, names: incomplete, bases })
}

impl StagedDir {
    pub fn new(path: PathBuf) -> Self {
        Self { path, tasks: TaskTracker::new() }
    }

    /// Returns when nobody works in it any more; nobody must begin to.
    async fn settled(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Removes what an abandoned migration staged, and the VM's directory if nothing else is in it.
    pub async fn remove(self, shared: Arc<Shared>, vm: VmId, no_record: bool) {
        self.settled().await;
        let removed = tokio::task::spawn_blocking(move || {
            scrub_dir(&self.path);
            if no_record {
                // Fails, as it should, when something else is in it.
                let _ = fs::remove_dir(shared.records.vm_dir(vm));
            }
        });
        let _ = removed.await;
    }

    /// Gives what was staged to another migration of the VM, if it came to anything.
    async fn become_dir(self, path: &Path) {
        self.settled().await;
        let to = path.to_owned();
        let moved = tokio::task::spawn_blocking(move || match fs::rename(&self.path, &to) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.path.display(), %error, "what was staged before cannot be used");
                scrub_dir(&self.path);
                false
            }
            renamed => renamed.is_ok(),
        });
        if moved.await.unwrap_or(false) {
            tracing::info!(path = %path.display(), "going on with what was staged before");
        }
    }
}

/// Scrubs every disk below `dir`, then removes it.
pub fn scrub_dir(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for path in entries.flatten().map(|e| e.path()) {
        if let Err(e) = disk::scrub(&path) {
            tracing::warn!(path = %path.display(), error = crate::interface::chain(&e), "cannot scrub");
        }
    }
    if let Err(e) = fs::remove_dir_all(dir) {
        tracing::warn!(path = %dir.display(), error = %e, "cannot remove");
    }
}

/// Directories of disks by VM, the one that was changed last at the end.
pub fn disk_dirs(shared: &Shared) -> BTreeMap<VmId, Vec<String>> {
    let mut found = BTreeMap::new();
    let Ok(vms) = fs::read_dir(shared.records.vms_dir()) else { return found };
    for vm in vms.flatten() {
        let Some(id) = vm.file_name().to_str().and_then(|n| n.parse::<VmId>().ok()) else { continue };
        let Ok(entries) = fs::read_dir(vm.path()) else { continue };
        let changed = |entry: &fs::DirEntry| entry.metadata().and_then(|m| m.modified()).ok();
        let mut dirs: Vec<_> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().to_str()?.to_owned();
                name.starts_with("disks-").then(|| (changed(&entry), name))
            })
            .collect();
        dirs.sort();
        found.insert(id, dirs.into_iter().map(|(_, name)| name).collect());
    }
    found
}
