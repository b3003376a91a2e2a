//! Both ends of a move as brokers play them, without the negotiation: one process serves a state,
//! another makes its disks with what it holds.
//!
//! What a new way of saving bytes changes is here: [`fetch`] asks for what is missing, component by
//! component and disk by disk.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use cicada::compose::Composer;
use cicada::disk::{BlockIndex, DiskFile, StagedDisk};
use cicada::repository::Repository;
use cicada::runner::content::receiving::{Packs, Sink, TakeBlock};
use cicada::runner::content::serving::{Served, Store, Tickets};
use cicada::transfer::{Connection, Endpoint, Limiter, ObjectKey, Progress, Ticket};
use cicada::types::{ComponentId, IdentityKey, PackId, RecipeId};
use cicada::vm::MapRef;

use super::Result;
use super::state::{self, Offer, Report, State};

/// The negotiation would agree on it.
const TICKET: Ticket = Ticket::from_bytes([7; 32]);

/// The identity of the source (0) or the target (1).
fn key(side: u8) -> IdentityKey {
    IdentityKey::from_secret_bytes(&[side + 1; 32])
}

fn endpoint(
    side: u8,
    address: SocketAddr,
    repository: &Repository,
    tickets: &Arc<Tickets>,
) -> Result<Endpoint> {
    tickets.set_members([key(0).public(), key(1).public()].into());
    let store = Arc::new(Store { repository: repository.clone(), tickets: tickets.clone() });
    Ok(Endpoint::bind(address, &key(side), tickets.clone(), store, Limiter::unlimited())?)
}

fn components_of(repository: &Repository, recipe: &Option<RecipeId>) -> Result<Vec<ComponentId>> {
    Ok(match recipe {
        Some(recipe) => repository.recipe(recipe)?.components,
        None => Vec::new(),
    })
}

fn packs_of(repository: &Repository, components: &[ComponentId]) -> Result<Vec<PackId>> {
    let mut packs = Vec::new();
    for id in components {
        packs.extend(repository.manifest(id)?.packs.iter().map(|p| p.id));
    }
    packs.sort_unstable();
    packs.dedup();
    Ok(packs)
}

/// A repository as a cloud has it that the VM was at with this state: its components, its
/// composition, and the maps of its disks.
pub fn seed(source: &Repository, held: &State, target: &Path) -> Result<()> {
    let _ = std::fs::remove_dir_all(target);
    let target = Repository::create(target)?;
    let components = components_of(source, &held.recipe)?;
    for pack in packs_of(source, &components)? {
        let mut stored = source.pack_stored(&pack)?;
        let mut receiver = target.pack_receiver(pack, stored.stored_size_bytes)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match std::io::Read::read(&mut stored.file, &mut buffer)? {
                0 => break,
                n => receiver.write(&buffer[..n])?,
            }
        }
        receiver.finish()?;
    }
    for id in &components {
        target.put_manifest_bytes(id, &source.manifest_bytes(id)?)?;
    }
    if let Some(recipe) = &held.recipe {
        target.put_recipe(&source.recipe(recipe)?)?;
        Composer::new(target.clone()).composition(recipe)?;
    }
    for scanned in [held.root_delta()?, held.user_data()?].into_iter().flatten() {
        target.put_map(&scanned.map)?;
    }
    Ok(())
}

/// Serves until standard input ends.
pub fn serve(source: &Repository, state: &State, offer: &Path, address: SocketAddr) -> Result<()> {
    let components = components_of(source, &state.recipe)?;
    let mut served = Served {
        peer: Some(key(1).public()),
        recipe: state.recipe,
        components: components.iter().copied().collect(),
        packs: packs_of(source, &components)?.into_iter().collect(),
        ..Served::default()
    };
    let mut offered = |scanned: Option<state::Scanned>| -> Result<Option<MapRef>> {
        let Some(state::Scanned { map, index }) = scanned else { return Ok(None) };
        let (reference, hashes) = source.put_map(&map)?;
        served.nodes.extend(hashes);
        served.blocks.push(Arc::new(index));
        Ok(Some(reference))
    };
    let (root_delta, user_data) = (offered(state.root_delta()?)?, offered(state.user_data()?)?);
    state::write(offer, &Offer { recipe: state.recipe, components, root_delta, user_data })?;

    let tickets = Arc::new(Tickets::default());
    tickets.serve(TICKET, served);
    tokio::runtime::Runtime::new()?.block_on(async {
        let endpoint = endpoint(0, address, source, &tickets)?;
        println!("READY");
        let ended =
            tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
        ended.await??;
        endpoint.close().await;
        Ok(())
    })
}

/// Makes the offered disks in the directory `disks`.
pub fn fetch(
    target: &Repository,
    offer: &Path,
    held: &State,
    disks: &Path,
    address: SocketAddr,
) -> Result<Report> {
    let offer: Offer = state::read(offer)?;
    std::fs::create_dir_all(disks)?;
    let begun = Instant::now();
    let mut report = Report::default();
    let work = async {
        let here = SocketAddr::new(if address.is_ipv4() { [0, 0, 0, 0].into() } else { [0; 16].into() }, 0);
        let endpoint = endpoint(1, here, target, &Arc::default())?;
        let connection = endpoint.connect(&[address], key(0).public()).await?;
        let move_ = Move { target, connection };

        if let Some(recipe) = &offer.recipe {
            move_.components(recipe, &offer.components, &mut report).await?;
            let composing = Instant::now();
            Composer::new(target.clone()).composition(recipe)?;
            report.compose_seconds = composing.elapsed().as_secs_f64();
        }
        let mut seeds = Vec::new();
        if let (Some(map), Some(recipe)) = (&offer.root_delta, &offer.recipe) {
            seeds.extend(held.root_delta()?.map(|s| Arc::new(s.index)));
            let base = Composer::new(target.clone()).path_of(recipe);
            let disk = DiskFile::Root { overlay: disks.join("root.qcow2"), base };
            let (maps, blocks) = move_.disk(disk, map, &seeds).await?;
            (report.map_bytes, report.root_delta_bytes) = (report.map_bytes + maps, blocks);
        }
        if let Some(map) = &offer.user_data {
            seeds.extend(held.user_data()?.map(|s| Arc::new(s.index)));
            let disk = DiskFile::UserData { raw: disks.join("user-data.raw") };
            let (maps, blocks) = move_.disk(disk, map, &seeds).await?;
            (report.map_bytes, report.user_data_bytes) = (report.map_bytes + maps, blocks);
        }
        let stats = move_.connection.stats();
        report.udp_bytes = stats.sent_bytes + stats.received_bytes;
        endpoint.close().await;
        Ok::<(), Box<dyn std::error::Error>>(())
    };
    tokio::runtime::Runtime::new()?.block_on(work)?;
    report.fetch_seconds = begun.elapsed().as_secs_f64() - report.compose_seconds;
    Ok(report)
}

struct Move<'a> {
    target: &'a Repository,
    connection: Connection,
}

impl Move<'_> {
    /// Fetches all of `keys`; their bytes as they travelled, before the transport's own.
    async fn fetch(&self, keys: Vec<ObjectKey>, packs: Packs, blocks: Option<Box<TakeBlock>>) -> Result<u64> {
        let progress = Arc::new(Progress::default());
        if !keys.is_empty() {
            let sink = Sink { repository: self.target.clone(), packs: Arc::new(packs), blocks };
            self.connection.fetch(&TICKET, keys, Arc::new(sink), progress.clone()).await?;
        }
        Ok(progress.snapshot().encoded_bytes)
    }

    /// The recipe, the manifests and the packs that are not held.
    async fn components(&self, recipe: &RecipeId, ids: &[ComponentId], report: &mut Report) -> Result<()> {
        let mut keys: Vec<_> = ids
            .iter()
            .filter(|id| !self.target.has_manifest(id))
            .map(|id| ObjectKey::Manifest(*id))
            .collect();
        report.components = keys.len();
        if !self.target.has_recipe(recipe) {
            keys.push(ObjectKey::Recipe(*recipe));
        }
        report.component_bytes = self.fetch(keys, Packs::default(), None).await?;
        let missing = packs_of(self.target, ids)?.into_iter().filter(|p| !self.target.has_pack(p));
        report.packs = missing.collect();
        let wanted: HashSet<PackId> = report.packs.iter().copied().collect();
        let mut sizes = HashMap::new();
        for id in ids {
            sizes.extend(self.target.manifest(id)?.packs.iter().map(|p| (p.id, p.size_bytes)));
        }
        let packs = Packs { sizes, bases: self.target.likely_bases(ids, &wanted)? };
        let keys = report.packs.iter().map(|p| ObjectKey::Pack(*p)).collect();
        report.component_bytes += self.fetch(keys, packs, None).await?;
        Ok(())
    }

    /// The map, then the blocks that neither the disk nor the seeds have. Bytes of both.
    async fn disk(&self, disk: DiskFile, map: &MapRef, seeds: &[Arc<BlockIndex>]) -> Result<(u64, u64)> {
        let base = match &disk {
            DiskFile::Root { base, .. } => Some(base.clone()),
            DiskFile::UserData { .. } => None,
        };
        let mut map_bytes = 0;
        loop {
            let missing: HashSet<_> = self.target.nodes_missing(map)?.into_iter().map(|(n, _)| n).collect();
            if missing.is_empty() {
                break;
            }
            let keys = missing.into_iter().map(ObjectKey::Node).collect();
            map_bytes += self.fetch(keys, Packs::default(), None).await?;
        }
        let map_content = self.target.map(map)?;
        let mut staged = StagedDisk::open_or_create(disk, map)?;
        let needed = staged.begin(&map_content)?.fetch;
        let mut left = staged.fill(needed, seeds)?;
        // As a broker does: many blocks of a root delta are worth a look at the composition.
        if let Some(base) = base.filter(|_| left.len() >= 256) {
            left = staged.fill(left, &[Arc::new(cicada::disk::scan_base(&base)?)])?;
        }
        let keys = left.into_iter().map(ObjectKey::Block).collect();
        let staged = Arc::new(Mutex::new(staged));
        let taking = staged.clone();
        let take: Box<TakeBlock> = Box::new(move |hash, bytes| {
            taking.lock().unwrap_or_else(|e| e.into_inner()).write_block(hash, bytes).map(drop)
        });
        let block_bytes = self.fetch(keys, Packs::default(), Some(take)).await?;
        staged.lock().unwrap_or_else(|e| e.into_inner()).finish(&map_content)?;
        Ok((map_bytes, block_bytes))
    }
}
