//! What is known of one disk, and of what the source offers.

use std::path::{Path, PathBuf};

use cicada::disk::{BlockIndex, scan_root, scan_user_data};
use cicada::types::{ComponentId, PackId, RecipeId};
use cicada::vm::{ChunkMap, MapRef};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Result;

/// One VM's disks at one time.
#[derive(Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct State {
    pub recipe: Option<RecipeId>,
    /// The composition of `recipe`.
    pub image: Option<PathBuf>,
    /// What was written over it; nothing if absent.
    pub overlay: Option<PathBuf>,
    pub user_data: Option<PathBuf>,
}

/// What a target learns from the negotiation.
#[derive(Serialize, Deserialize)]
pub struct Offer {
    pub recipe: Option<RecipeId>,
    pub components: Vec<ComponentId>,
    pub root_delta: Option<MapRef>,
    pub user_data: Option<MapRef>,
}

/// A disk that was scanned.
pub struct Scanned {
    pub map: ChunkMap,
    pub index: BlockIndex,
}

impl State {
    pub fn read(path: &Path) -> Result<Self> {
        read(path)
    }
    pub fn write(&self, path: &Path) -> Result<()> {
        write(path, self)
    }

    pub fn root_delta(&self) -> Result<Option<Scanned>> {
        let (Some(overlay), Some(image)) = (&self.overlay, &self.image) else { return Ok(None) };
        let (map, index) = scan_root(overlay, image)?;
        Ok(Some(Scanned { map, index }))
    }

    pub fn user_data(&self) -> Result<Option<Scanned>> {
        let Some(raw) = &self.user_data else { return Ok(None) };
        let (map, index) = scan_user_data(raw)?;
        Ok(Some(Scanned { map, index }))
    }
}

/// What a move cost, apart from what the interface and the kernel count.
#[derive(Default)]
pub struct Report {
    pub components: usize,
    pub packs: Vec<PackId>,
    pub component_bytes: u64,
    pub map_bytes: u64,
    pub root_delta_bytes: u64,
    pub user_data_bytes: u64,
    pub udp_bytes: u64,
    pub fetch_seconds: f64,
    pub compose_seconds: f64,
}

impl Report {
    pub fn print(&self) {
        println!("components {}\npacks {}", self.components, self.packs.len());
        println!("component_bytes {}\nmap_bytes {}", self.component_bytes, self.map_bytes);
        println!("root_delta_bytes {}\nuser_data_bytes {}", self.root_delta_bytes, self.user_data_bytes);
        println!("udp_bytes {}", self.udp_bytes);
        println!("fetch_seconds {:.2}\ncompose_seconds {:.2}", self.fetch_seconds, self.compose_seconds);
    }
}

pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(serde_json::from_slice(&text)?)
}

pub fn write(path: &Path, value: &impl Serialize) -> Result<()> {
    Ok(std::fs::write(path, serde_json::to_vec_pretty(value)?)?)
}
