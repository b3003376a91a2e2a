//! What simulated clouds have instead of disks and repositories: components made of packs whose sizes are
//! counted, and VMs with so many bytes of their own. No byte is moved; every byte is counted.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use uuid::Uuid;

use crate::component::Recipe;
use crate::component::recipe::DiskParameters;
use crate::types::{ByteSize, ComponentId, ImageDigest, PackId, RecipeId, VmId, VmName};
use crate::vm::{Firmware, VmSpec};

/// A component: its packs, each with its size as it travels.
#[derive(Clone, PartialEq, Debug)]
pub struct Component {
    pub id: ComponentId,
    pub name: String,
    pub packs: Vec<(PackId, u64)>,
}

impl Component {
    /// A component of packs that `of` names; the same words make the same packs.
    pub fn new(name: &str, packs: &[(String, u64)]) -> Self {
        let packs = packs.iter().map(|(pack, bytes)| (PackId::of(pack.as_bytes()), *bytes)).collect();
        Self { id: ComponentId::of(name.as_bytes()), name: name.to_owned(), packs }
    }
}

/// All components of a federation, and the recipes made of them.
#[derive(Clone, Debug, Default)]
pub struct Catalogue {
    pub components: Vec<Component>,
    pub recipes: Vec<Made>,
    by_id: HashMap<RecipeId, usize>,
}

/// A recipe with what it is made of.
#[derive(Clone, Debug)]
pub struct Made {
    pub id: RecipeId,
    pub recipe: Arc<Recipe>,
    /// Positions in the catalogue.
    pub components: Vec<usize>,
    /// Its packs, each once, with what each takes as it travels.
    pub packs: Vec<(PackId, u64)>,
}

impl Made {
    /// A small VM of this recipe, such as every simulated cloud can run.
    pub fn vm(&self, id: VmId, name: VmName) -> VmSpec {
        VmSpec {
            id,
            name,
            cpus: 1,
            memory: ByteSize::mib(256),
            recipe: self.id,
            root_size: ByteSize(self.recipe.disk.virtual_size_bytes),
            user_data_size: ByteSize(1 << 30),
            nics: Vec::new(),
            architecture: "amd64".into(),
            cpu_model: "qemu64".into(),
            firmware: Firmware::Bios,
            disk_bus: Default::default(),
            system_uuid: None,
        }
    }
}

impl Catalogue {
    pub fn new(components: Vec<Component>) -> Self {
        Self { components, ..Self::default() }
    }

    /// Adds a recipe of these components; its position.
    pub fn add_recipe(&mut self, components: Vec<usize>, root_bytes: u64) -> usize {
        let ids: Vec<ComponentId> = components.iter().map(|at| self.components[*at].id).collect();
        let guid = |n: u128| Uuid::from_u128((self.recipes.len() as u128) << 8 | n);
        let recipe = Recipe {
            composer: "simulated 1".into(),
            components: ids,
            ordered: false,
            disk: DiskParameters {
                virtual_size_bytes: root_bytes,
                esp_size_bytes: 64 << 20,
                disk_guid: guid(1),
                esp_guid: guid(2),
                root_guid: guid(3),
                filesystem_uuid: guid(4),
                hash_seed: guid(5),
                epoch_s: 0,
                kernel_command_line: String::new(),
            },
            image_digest: ImageDigest::from_bytes([0; 32]),
        };
        let all = components.iter().flat_map(|at| self.components[*at].packs.iter().copied());
        let mut seen = BTreeSet::new();
        let packs = all.filter(|(id, _)| seen.insert(*id)).collect();
        let (id, at) = (recipe.id(), self.recipes.len());
        self.recipes.push(Made { id, recipe: Arc::new(recipe), components, packs });
        self.by_id.insert(id, at);
        at
    }

    pub fn made(&self, recipe: &RecipeId) -> Option<&Made> {
        self.by_id.get(recipe).map(|at| &self.recipes[*at])
    }
}
