//! The pieces `benches/compare/run` compares with: two composed disks, and what Cicada sends to a
//! cloud that holds the first so that it can make the second.
//!
//! `cargo bench --bench compare -- DIR HELD NEEDED`: HELD and NEEDED are lists of definitions in
//! `components/`, with commas. Writes DIR/held.raw and DIR/needed.raw (both images as the composer
//! keeps them) and prints `key value` lines.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cicada::broker::serving::{Served, Store, Tickets};
use cicada::build::{BuildEvent, BuildOptions, build};
use cicada::compose::Composer;
use cicada::repository::{PackReceiver, Repository, RepositoryError};
use cicada::transfer::{
    Endpoint, Limiter, ObjectKey, ObjectSink, PackRange, PackWriter, Progress, SinkError, Ticket, Verified,
};
use cicada::types::{ByteSize, ComponentId, IdentityKey, PackId, RecipeId};

const IMAGE_BYTES: ByteSize = ByteSize(1536 << 20);
const COMMAND_LINE: &str = "console=ttyS0 quiet";

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [dir, held, needed] = arguments.as_slice() else {
        println!("compare: run benches/compare/run");
        return Ok(());
    };
    let dir = std::path::absolute(dir)?;
    let source = Repository::open_or_create(&dir.join("source"))?;
    let (held, needed) = (components(&source, &dir, held)?, components(&source, &dir, needed)?);

    let composer = Composer::new(source.clone());
    let (held_recipe, held_image) = composed(&composer, &held, &dir.join("held.raw"))?;
    let (needed_recipe, needed_image) = composed(&composer, &needed, &dir.join("needed.raw"))?;

    for (case, before) in [("average", held.as_slice()), ("worst", &[])] {
        let target_dir = dir.join(format!("target-{case}"));
        let _ = std::fs::remove_dir_all(&target_dir);
        let target = Repository::create(&target_dir)?;
        let runtime = tokio::runtime::Runtime::new()?;
        // What the target has before is not counted.
        runtime.block_on(transfer(&source, &target, before, held_recipe))?;
        let missing = missing_bytes(&source, &target, &needed)?;
        let wire = runtime.block_on(transfer(&source, &target, &needed, needed_recipe))?;
        println!("{case}_missing_components {}", missing.components);
        println!("{case}_missing_packs {}", missing.packs);
        println!("{case}_pack_bytes {}", missing.pack_bytes);
        println!("{case}_manifest_bytes {}", missing.manifest_bytes);
        println!("{case}_udp_bytes {wire}");
        // The target makes the same disk, or none.
        target.put_recipe(&source.recipe(&needed_recipe)?)?;
        let made = Composer::new(target).composition(&needed_recipe)?;
        println!("{case}_same_image {}", made.digest == source.recipe(&needed_recipe)?.image_digest);
        std::fs::remove_file(made.path)?;
    }
    println!("recipe_bytes {}", source.recipe_bytes(&needed_recipe)?.len());
    println!("held_image {}\nneeded_image {}", held_image.display(), needed_image.display());
    Ok(())
}

fn components(repository: &Repository, dir: &Path, names: &str) -> Result<Vec<ComponentId>> {
    let definitions = Path::new(env!("CARGO_MANIFEST_DIR")).join("components");
    let files: Vec<PathBuf> = names.split(',').map(|n| definitions.join(format!("{n}.toml"))).collect();
    let options = BuildOptions { cache_dir: dir.join("cache"), keep_failed: false, rebuild: false };
    let built = build(repository, &files, &options, &mut |event| match event {
        BuildEvent::Begun { component, number, total } => eprintln!("{component} ({number} of {total})"),
        BuildEvent::Step { step, .. } => eprintln!("  {step}"),
        _ => {}
    })?;
    Ok(built.into_iter().map(|b| b.id).collect())
}

fn composed(composer: &Composer, ids: &[ComponentId], link: &Path) -> Result<(RecipeId, PathBuf)> {
    let (recipe, _) = composer.make_recipe(ids, false, IMAGE_BYTES, COMMAND_LINE)?;
    let path = composer.path_of(&recipe);
    let _ = std::fs::remove_file(link);
    std::os::unix::fs::symlink(&path, link)?;
    Ok((recipe, path))
}

#[derive(Default)]
struct Missing {
    components: usize,
    packs: usize,
    pack_bytes: u64,
    manifest_bytes: u64,
}

fn missing_bytes(source: &Repository, target: &Repository, needed: &[ComponentId]) -> Result<Missing> {
    let mut out = Missing::default();
    let mut packs = HashSet::new();
    for id in needed.iter().filter(|id| !target.has_manifest(id)) {
        out.components += 1;
        out.manifest_bytes += source.manifest_stored_bytes(id)?;
        packs.extend(source.manifest(id)?.packs.iter().map(|p| p.id).filter(|p| !target.has_pack(p)));
    }
    out.packs = packs.len();
    for pack in &packs {
        out.pack_bytes += source.pack_stored(pack)?.stored_size_bytes;
    }
    Ok(out)
}

/// Brings what `target` lacks of `components` over the real transport on loopback. Returns the UDP
/// bytes of both directions.
async fn transfer(
    source: &Repository,
    target: &Repository,
    components: &[ComponentId],
    recipe: RecipeId,
) -> Result<u64> {
    let keys = [1, 2].map(|n| IdentityKey::from_secret_bytes(&[n; 32]));
    let [from, to] = [0, 1].map(|_| Arc::new(Tickets::default()));
    for tickets in [&from, &to] {
        tickets.set_members(keys.iter().map(IdentityKey::public).collect());
    }
    let ticket = Ticket::random()?;
    let packs = |id: &ComponentId| Ok(source.manifest(id)?.packs.iter().map(|p| p.id).collect::<Vec<_>>());
    let all: Vec<Vec<PackId>> = components.iter().map(packs).collect::<Result<_>>()?;
    from.serve(
        ticket,
        Served {
            peer: Some(keys[1].public()),
            recipe: Some(recipe),
            components: components.iter().copied().collect(),
            packs: all.iter().flatten().copied().collect(),
            ..Served::default()
        },
    );
    let endpoint = |key: &IdentityKey, repository: &Repository, tickets: &Arc<Tickets>| {
        let store = Arc::new(Store { repository: repository.clone(), tickets: tickets.clone() });
        Endpoint::bind(([127, 0, 0, 1], 0).into(), key, tickets.clone(), store, Limiter::unlimited())
    };
    let (serving, asking) = (endpoint(&keys[0], source, &from)?, endpoint(&keys[1], target, &to)?);
    let connection = asking.connect(&[serving.local_addr()?], keys[0].public()).await?;
    let sink = Arc::new(Sink(target.clone()));
    let manifests =
        components.iter().filter(|id| !target.has_manifest(id)).map(|id| ObjectKey::Manifest(*id));
    let manifests: Vec<_> = manifests.collect();
    connection.fetch(&ticket, manifests, sink.clone(), Arc::new(Progress::default())).await?;
    let mut packs: Vec<_> = all.into_iter().flatten().filter(|p| !target.has_pack(p)).collect();
    packs.sort_unstable();
    packs.dedup();
    let packs = packs.into_iter().map(ObjectKey::Pack).collect();
    connection.fetch(&ticket, packs, sink, Arc::new(Progress::default())).await?;
    let stats = connection.stats();
    asking.close().await;
    serving.close().await;
    Ok(stats.sent_bytes + stats.received_bytes)
}

/// Keeps in a repository what arrives, as a broker does.
struct Sink(Repository);

impl ObjectSink for Sink {
    fn deliver(&self, objects: Vec<Verified>) -> Result<(), SinkError> {
        for object in objects {
            if let ObjectKey::Manifest(id) = &object.key {
                self.0.put_manifest_bytes(id, &object.bytes).map_err(storage)?;
            }
        }
        Ok(())
    }
    fn pack(
        &self,
        pack: &PackId,
        _is_delta: bool,
        _range: &PackRange,
        size_bytes: u64,
    ) -> Result<Box<dyn PackWriter>, SinkError> {
        Ok(Box::new(Receiving(self.0.pack_receiver(*pack, size_bytes).map_err(storage)?)))
    }
}

struct Receiving(PackReceiver);

impl PackWriter for Receiving {
    fn write(&mut self, stored: &[u8]) -> Result<(), SinkError> {
        self.0.write(stored).map_err(storage)
    }
    fn finish(self: Box<Self>) -> Result<(), SinkError> {
        self.0.finish().map_err(storage)
    }
}

fn storage(e: RepositoryError) -> SinkError {
    SinkError::Storage(Box::new(e))
}
