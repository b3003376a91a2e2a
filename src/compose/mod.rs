//! Level 3: recipe to disk image. A pure plan says which bytes go where; writing it, digesting the
//! result and keeping compositions is the rest. The layout is specified in `LAYOUT.md`.

mod digest;
mod error;
mod esp;
mod export;
mod ext4;
mod gpt;
mod image;
mod plan;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::component::tree::{self, Tree};
use crate::component::{DiskParameters, Manifest, Recipe};
use crate::repository::{ObjectId, Repository};
use crate::types::{ByteSize, ComponentId, ImageDigest, RecipeId};

pub use digest::{SEGMENT_BYTES, digest_of};
pub use error::ComposeError;
pub use export::ImageFormat;
pub use plan::{Extent, Plan};

/// Names the layout. A recipe of another composer would give another disk and is refused.
pub const COMPOSER: &str = "cicada-ext4/1";

/// Makes compositions and keeps them, one for each recipe, read-only.
#[derive(Clone)]
pub struct Composer {
    repository: Repository,
    /// One lock a recipe: concurrent askers wait for one composition instead of making several.
    under_way: Arc<Mutex<HashMap<RecipeId, Arc<Mutex<()>>>>>,
}

/// A finished base image.
#[derive(Clone, Debug)]
pub struct Composition {
    pub path: PathBuf,
    pub digest: ImageDigest,
    /// It was there already.
    pub reused: bool,
    pub elapsed: Duration,
}

impl Composer {
    pub fn new(repository: Repository) -> Self {
        Self { repository, under_way: Arc::default() }
    }

    /// Where the composition of a recipe lies, or will lie.
    pub fn path_of(&self, recipe: &RecipeId) -> PathBuf {
        self.repository.compositions_dir().join(format!("{recipe}.raw"))
    }

    pub fn is_composed(&self, recipe: &RecipeId) -> bool {
        self.path_of(recipe).exists()
    }

    /// Composes a set once to learn its digest, stores the recipe and keeps the composition. A set
    /// that was composed before costs nothing but the plan.
    pub fn make_recipe(
        &self,
        components: &[ComponentId],
        ordered: bool,
        virtual_size: ByteSize,
        kernel_command_line: &str,
    ) -> Result<(RecipeId, Recipe), ComposeError> {
        let esp_size_bytes = self.esp_size_bytes(components, ordered)?;
        let disk = DiskParameters::derived(components, virtual_size.0, esp_size_bytes, kernel_command_line);
        if let Some(known) = self.known_recipe(components, ordered, &disk)? {
            self.composition(&known.id())?;
            return Ok((known.id(), known));
        }
        let mut recipe = Recipe {
            composer: COMPOSER.into(),
            components: components.to_vec(),
            ordered,
            disk,
            image_digest: ImageDigest::from_bytes([0; 32]),
        };
        let plan = self.plan(&recipe)?;
        let pending = image::write(&self.repository, &plan)?;
        recipe.image_digest = pending.digest.digest;
        let id = self.repository.put_recipe(&recipe)?;
        pending.keep(&self.path_of(&id))?;
        Ok((id, recipe))
    }

    /// The composition of a recipe, made now if it is not there, and verified before use.
    pub fn composition(&self, id: &RecipeId) -> Result<Composition, ComposeError> {
        let begun = Instant::now();
        let recipe = self.repository.recipe(id)?;
        let path = self.path_of(id);
        let done = |reused| Composition {
            path: path.clone(),
            digest: recipe.image_digest,
            reused,
            elapsed: begun.elapsed(),
        };
        if path.exists() {
            return Ok(done(true));
        }
        let lock = lock(&self.under_way).entry(*id).or_default().clone();
        let _turn = lock.lock().unwrap_or_else(|e| e.into_inner());
        if path.exists() {
            return Ok(done(true));
        }
        let plan = self.plan(&recipe)?;
        let pending = image::write(&self.repository, &plan)?;
        if pending.digest.digest != recipe.image_digest {
            return Err(ComposeError::Digest {
                recipe: *id,
                expected: recipe.image_digest,
                found: pending.digest.digest,
                composer: recipe.composer.clone(),
            });
        }
        pending.keep(&path)?;
        self.under_way.lock().unwrap_or_else(|e| e.into_inner()).remove(id);
        Ok(done(false))
    }

    /// Reads a kept composition again and compares its digest.
    pub fn verify(&self, id: &RecipeId) -> Result<(), ComposeError> {
        let recipe = self.repository.recipe(id)?;
        let path = self.path_of(id);
        let found =
            digest_of(&path).map_err(|source| ComposeError::Io { what: "read", path, source })?.digest;
        if found == recipe.image_digest {
            return Ok(());
        }
        Err(ComposeError::Digest {
            recipe: *id,
            expected: recipe.image_digest,
            found,
            composer: recipe.composer,
        })
    }

    /// Writes the composed disk to `output` in another hypervisor's format.
    pub fn export(&self, id: &RecipeId, output: &Path, format: ImageFormat) -> Result<(), ComposeError> {
        let composition = self.composition(id)?;
        export::convert(&composition.path, output, format)
    }

    /// What goes where; nothing is written.
    pub fn plan(&self, recipe: &Recipe) -> Result<Plan, ComposeError> {
        if recipe.composer != COMPOSER {
            return Err(ComposeError::Composer { wanted: recipe.composer.clone() });
        }
        plan::plan(&self.tree(&recipe.components, recipe.ordered)?, &recipe.disk)
    }

    /// The files of a set of components, all of them held, that can boot.
    pub fn tree(&self, components: &[ComponentId], ordered: bool) -> Result<Tree, ComposeError> {
        let set = self.manifests(components)?;
        tree::check_bootable(&set)?;
        Ok(tree::unite(&set, ordered)?)
    }

    fn manifests(
        &self,
        components: &[ComponentId],
    ) -> Result<Vec<(ComponentId, Arc<Manifest>)>, ComposeError> {
        let lacking: Vec<_> = components.iter().filter(|c| !self.repository.has_manifest(c)).collect();
        if !lacking.is_empty() {
            let objects = lacking.into_iter().map(|c| ObjectId::Manifest(*c).to_string()).collect();
            return Err(ComposeError::Missing { objects });
        }
        let set: Vec<_> = components
            .iter()
            .map(|id| self.repository.manifest(id).map(|m| (*id, m)))
            .collect::<Result<_, _>>()?;
        let mut objects = Vec::new();
        for (_, m) in &set {
            let packs = m.packs.iter().filter(|p| !self.repository.has_pack(&p.id));
            objects.extend(
                packs.map(|p| format!("pack {} ({} of component {})", p.id.short(), p.package, m.name)),
            );
        }
        if objects.is_empty() { Ok(set) } else { Err(ComposeError::Missing { objects }) }
    }

    fn esp_size_bytes(&self, components: &[ComponentId], ordered: bool) -> Result<u64, ComposeError> {
        Ok(esp::size_for(&self.tree(components, ordered)?))
    }

    fn known_recipe(
        &self,
        components: &[ComponentId],
        ordered: bool,
        disk: &DiskParameters,
    ) -> Result<Option<Recipe>, ComposeError> {
        for id in self.repository.recipes()? {
            let recipe = self.repository.recipe(&id)?;
            let equal = recipe.composer == COMPOSER
                && recipe.components == components
                && recipe.ordered == ordered
                && recipe.disk == *disk;
            if equal {
                return Ok(Some(recipe));
            }
        }
        Ok(None)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
