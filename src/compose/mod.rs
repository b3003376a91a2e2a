//! Level 3: recipe to disk image. A pure plan says which bytes go where; writing it, digesting the
//! result and keeping compositions is the rest. The layout is specified in `LAYOUT.md`.

mod digest;
mod error;
mod esp;
mod export;
mod ext4;
mod extents;
mod gpt;
mod image;
mod plan;
mod reflink;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use crate::component::tree::{self, Member, Tree};
use crate::component::{DiskParameters, Recipe};
use crate::durable;
use crate::repository::{ObjectId, Repository};
use crate::types::{ByteSize, ComponentId, ImageDigest, RecipeId};

pub use digest::{Digest, SEGMENT_BYTES, digest_of, zero_segment};
pub use error::ComposeError;
pub use export::{HANDED, ImageFormat, Output, convert, occupied, part_of, place, qemu_img_with};
pub use image::{Progress, Timing};
pub use plan::{Extent, Plan};

use image::{PendingImage, PlainCopies};

/// Names the layout. A recipe of another composer would give another disk and is refused.
pub const COMPOSER: &str = "cicada-ext4/1";
/// Names the composer of adopted disks' bases: nothing but extents of packs, listed by one component.
pub const EXTENTS_COMPOSER: &str = "cicada-extents/1";

/// Makes compositions and keeps them, one for each recipe, read-only.
#[derive(Clone)]
pub struct Composer {
    repository: Repository,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// One composition at a time: it uses all cores, and who waited may find it done.
    composing: Mutex<()>,
    /// Whether the repository's file system shares blocks between files.
    clones: OnceLock<bool>,
}

/// A finished base image.
#[derive(Clone, Debug)]
pub struct Composition {
    pub path: PathBuf,
    pub digest: ImageDigest,
    /// It was there already.
    pub reused: bool,
    pub elapsed: Duration,
    /// All zero when it was there already.
    pub timing: Timing,
}

impl Composer {
    pub fn new(repository: Repository) -> Self {
        Self { repository, shared: Arc::default() }
    }

    /// Where the composition of a recipe lies, or will lie.
    pub fn path_of(&self, recipe: &RecipeId) -> PathBuf {
        self.repository.compositions_dir().join(format!("{recipe}.raw"))
    }

    pub fn is_composed(&self, recipe: &RecipeId) -> bool {
        self.path_of(recipe).exists()
    }

    /// The recipe of a set of components. Composes it once to learn its digest, stores the recipe and
    /// keeps the composition; a set that was composed before costs nothing but a look. Unless `ordered`
    /// the components' order does not matter: equal sets give equal recipes.
    pub fn make_recipe(
        &self,
        components: &[ComponentId],
        ordered: bool,
        virtual_size: ByteSize,
        kernel_command_line: &str,
    ) -> Result<(RecipeId, Recipe), ComposeError> {
        self.make_recipe_reporting(components, ordered, virtual_size, kernel_command_line, &|_, _| {})
    }

    /// As [`Composer::make_recipe`], telling how far it is.
    pub fn make_recipe_reporting(
        &self,
        components: &[ComponentId],
        ordered: bool,
        virtual_size: ByteSize,
        kernel_command_line: &str,
        progress: Progress<'_>,
    ) -> Result<(RecipeId, Recipe), ComposeError> {
        let begun = Instant::now();
        let _kept = self.repository.pin(components.iter().map(|c| ObjectId::Manifest(*c)).collect());
        let mut set = self.members(components)?;
        if !ordered {
            set.sort_by(|(a_id, a), (b_id, b)| (a.kind, &a.name, a_id).cmp(&(b.kind, &b.name, b_id)));
        }
        let components: Vec<ComponentId> = set.iter().map(|(id, _)| *id).collect();
        let tree = unite(&set, ordered)?;
        let esp_size_bytes = esp::size_for(&tree);
        let disk = DiskParameters::derived(&components, virtual_size.0, esp_size_bytes, kernel_command_line);
        let image_digest = ImageDigest::from_bytes([0; 32]);
        let recipe = Recipe { composer: COMPOSER.into(), components, ordered, disk, image_digest };
        self.complete(recipe, &|recipe| plan::plan(&tree, &recipe.disk), begun, progress)
    }

    /// The recipe of an adopted disk's base, whose component lists its extents. As with
    /// [`Composer::make_recipe`] the base is composed to learn its digest, and kept.
    pub fn make_extents_recipe(
        &self,
        component: &ComponentId,
        virtual_size: ByteSize,
        progress: Progress<'_>,
    ) -> Result<(RecipeId, Recipe), ComposeError> {
        let begun = Instant::now();
        let _kept = self.repository.pin(vec![ObjectId::Manifest(*component)]);
        let components = vec![*component];
        let disk = DiskParameters::derived(&components, virtual_size.0, 0, "");
        let image_digest = ImageDigest::from_bytes([0; 32]);
        let composer = EXTENTS_COMPOSER.into();
        let recipe = Recipe { composer, components, ordered: false, disk, image_digest };
        self.complete(recipe, &|recipe| self.plan(recipe), begun, progress)
    }

    /// Composes a recipe that lacks nothing but its digest, stores it and keeps the composition.
    fn complete(
        &self,
        mut recipe: Recipe,
        plan: &dyn Fn(&Recipe) -> Result<Plan, ComposeError>,
        begun: Instant,
        progress: Progress<'_>,
    ) -> Result<(RecipeId, Recipe), ComposeError> {
        let _turn = self.turn();
        if let Some(known) = self.composed_recipe(&recipe)? {
            return Ok((known.id(), known));
        }
        let plan = plan(&recipe)?;
        let mut pending = self.write(&plan, true, progress)?;
        pending.timing.plan = begun.elapsed().saturating_sub(pending.timing.place + pending.timing.write);
        recipe.image_digest = pending.digest.digest;
        let id = self.repository.put_recipe(&recipe)?;
        self.keep(pending, &id)?;
        Ok((id, recipe))
    }

    /// The composition of a recipe, made now if it is not there, and verified before it gets its name.
    pub fn composition(&self, id: &RecipeId) -> Result<Composition, ComposeError> {
        self.composition_reporting(id, &|_, _| {})
    }

    /// As [`Composer::composition`], telling how far it is.
    pub fn composition_reporting(
        &self,
        id: &RecipeId,
        progress: Progress<'_>,
    ) -> Result<Composition, ComposeError> {
        let begun = Instant::now();
        let _kept = self.repository.pin(vec![ObjectId::Recipe(*id)]);
        let recipe = self.repository.recipe(id)?;
        let path = self.path_of(id);
        let digest = recipe.image_digest;
        let done = |reused, timing| {
            let path = path.clone();
            Ok(Composition { path, digest, reused, elapsed: begun.elapsed(), timing })
        };
        if path.exists() {
            // Its age says when it was wanted last; failing to renew it only costs a composition.
            let _ = fs::File::open(&path).and_then(|f| f.set_modified(SystemTime::now()));
            return done(true, Timing::default());
        }
        let _turn = self.turn();
        if path.exists() {
            return done(true, Timing::default());
        }
        let planning = Instant::now();
        let plan = self.plan(&recipe)?;
        let plan_time = planning.elapsed();
        let mut pending = self.write(&plan, false, progress)?;
        if pending.digest.digest != digest {
            // A plain copy may be damaged: once more, looking closely.
            pending = self.write(&plan, true, progress)?;
        }
        let found = pending.digest.digest;
        if found != digest {
            let composer = recipe.composer;
            return Err(ComposeError::Digest { recipe: *id, expected: digest, found, composer });
        }
        let timing = self.keep(pending, id)?;
        done(false, Timing { plan: plan_time, ..timing })
    }

    /// Reads a kept composition again and compares it with what was composed.
    pub fn verify(&self, id: &RecipeId) -> Result<(), ComposeError> {
        let recipe = self.repository.recipe(id)?;
        let path = self.path_of(id);
        if !path.exists() {
            return Err(ComposeError::NotComposed { recipe: *id });
        }
        let found = digest_of(&path).map_err(|source| ComposeError::Io {
            what: "read",
            path: path.clone(),
            source,
        })?;
        if found.digest == recipe.image_digest {
            return Ok(());
        }
        // Without a good list it is only known that something is wrong, not where.
        let list = fs::read(self.segments_path(id)).ok().and_then(|bytes| Digest::from_bytes(&bytes));
        let list = list.filter(|list| list.digest == recipe.image_digest);
        let segments = list.map_or(Vec::new(), |list| list.differing(&found));
        Err(ComposeError::Damaged { path, recipe: *id, composer: recipe.composer, segments })
    }

    /// Writes the composed disk to `output` in another hypervisor's format.
    pub fn export<'a>(
        &self,
        id: &RecipeId,
        output: impl Into<Output<'a>>,
        format: ImageFormat,
    ) -> Result<(), ComposeError> {
        let composition = self.composition(id)?;
        let input = ["-f".as_ref(), "raw".as_ref(), composition.path.as_os_str()];
        export::convert(&input, output, format)
    }

    /// Removes a composition that nothing uses any more; tells whether there was one. The recipe stays,
    /// so it can be composed again.
    pub fn remove(&self, id: &RecipeId) -> Result<bool, ComposeError> {
        let _turn = self.turn();
        let path = self.path_of(id);
        let existed = path.exists();
        for path in [path, self.segments_path(id)] {
            durable::remove(&path).map_err(|source| ComposeError::Io { what: "remove", path, source })?;
        }
        Ok(existed)
    }

    /// Removes compositions of other recipes than `used` that nobody asked for within `grace`; tells
    /// how many and how many bytes they had on disk. The recipes stay.
    pub fn collect(
        &self,
        used: &[RecipeId],
        grace: Duration,
        dry_run: bool,
    ) -> Result<(u64, u64), ComposeError> {
        let dir = self.repository.compositions_dir();
        let error = |source| ComposeError::Io { what: "list", path: dir.to_owned(), source };
        let (mut count, mut bytes) = (0, 0);
        for entry in fs::read_dir(dir).map_err(error)? {
            let path = entry.map_err(error)?.path();
            let recipe = path.file_stem().and_then(|name| name.to_str()?.parse::<RecipeId>().ok());
            let Some(recipe) = recipe.filter(|_| path.extension().is_some_and(|e| e == "raw")) else {
                continue;
            };
            let Ok(meta) = fs::metadata(&path) else { continue };
            let age = meta.modified().ok().and_then(|m| SystemTime::now().duration_since(m).ok());
            if used.contains(&recipe) || age.is_none_or(|age| age < grace) {
                continue;
            }
            count += 1;
            bytes += meta.blocks() * 512;
            if !dry_run {
                self.remove(&recipe)?;
            }
        }
        Ok((count, bytes))
    }

    /// What goes where; nothing is written.
    pub fn plan(&self, recipe: &Recipe) -> Result<Plan, ComposeError> {
        match recipe.composer.as_str() {
            COMPOSER => plan::plan(&self.tree(&recipe.components, recipe.ordered)?, &recipe.disk),
            EXTENTS_COMPOSER => match self.members(&recipe.components)?.as_slice() {
                [(_, manifest)] => extents::plan(&self.repository, recipe, manifest),
                members => Err(ComposeError::ExtentList {
                    component: format!("{} components", members.len()),
                    reason: "a recipe of extents has one component".into(),
                }),
            },
            other => Err(ComposeError::Composer { wanted: other.to_owned() }),
        }
    }

    /// The files of a set of components, all of them held, that can boot.
    pub fn tree(&self, components: &[ComponentId], ordered: bool) -> Result<Tree, ComposeError> {
        unite(&self.members(components)?, ordered)
    }

    /// The set with its manifests; what is not held is named, all of it at once.
    fn members(&self, components: &[ComponentId]) -> Result<Vec<Member>, ComposeError> {
        let mut set = Vec::with_capacity(components.len());
        let mut objects = Vec::new();
        for id in components {
            if !self.repository.has_manifest(id) {
                objects.push(ObjectId::Manifest(*id).to_string());
                continue;
            }
            let manifest = self.repository.manifest(id)?;
            let lacking = manifest.packs.iter().filter(|p| !self.repository.has_pack(&p.id));
            objects.extend(
                lacking
                    .map(|p| format!("pack {} ({} of {})", p.id.short(), p.package, tree::label(&manifest))),
            );
            set.push((*id, manifest));
        }
        if objects.is_empty() { Ok(set) } else { Err(ComposeError::Missing { objects }) }
    }

    /// A recipe that differs from `wanted` in the digest at most and is composed already.
    fn composed_recipe(&self, wanted: &Recipe) -> Result<Option<Recipe>, ComposeError> {
        for id in self.repository.recipes()? {
            if !self.is_composed(&id) {
                continue;
            }
            let recipe = self.repository.recipe(&id)?;
            if (Recipe { image_digest: recipe.image_digest, ..wanted.clone() }) == recipe {
                return Ok(Some(recipe));
            }
        }
        Ok(None)
    }

    fn write(
        &self,
        plan: &Plan,
        verified: bool,
        progress: Progress<'_>,
    ) -> Result<PendingImage, ComposeError> {
        let dir = self.repository.temporary_dir();
        let clones = *self.shared.clones.get_or_init(|| reflink::is_possible(dir));
        image::write(&self.repository, plan, PlainCopies { clones, verified }, progress)
    }

    fn keep(&self, pending: PendingImage, id: &RecipeId) -> Result<Timing, ComposeError> {
        let path = self.segments_path(id);
        durable::write(&path, &pending.digest.to_bytes()).map_err(|source| ComposeError::Io {
            what: "write",
            path,
            source,
        })?;
        pending.keep(&self.path_of(id))
    }

    /// The hashes of the segments, kept beside the image to say where it was damaged.
    fn segments_path(&self, id: &RecipeId) -> PathBuf {
        self.repository.compositions_dir().join(format!("{id}.segments"))
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.shared.composing.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Whether a disk can be laid out that has these components, be it one that starts or not: what the
/// composer would refuse is better refused before a component is stored. Reads no pack.
pub fn check(members: &[Member]) -> Result<(), ComposeError> {
    let tree = tree::unite(members, false)?;
    let components: Vec<ComponentId> = members.iter().map(|(id, _)| *id).collect();
    let size = plan::size_for(&tree)?;
    let disk = DiskParameters::derived(&components, size.0, esp::size_for(&tree), "");
    plan::plan(&tree, &disk).map(drop)
}

fn unite(set: &[Member], ordered: bool) -> Result<Tree, ComposeError> {
    tree::check_bootable(set)?;
    Ok(tree::unite(set, ordered)?)
}
