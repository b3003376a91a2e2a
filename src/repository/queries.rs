//! Questions others ask about what is held.

use std::collections::{HashMap, HashSet};

use super::error::Result;
use super::{ObjectId, Repository, RepositoryError};
use crate::types::{ComponentId, PackId, RecipeId};

impl Repository {
    /// All recipes held, in order of their ids.
    pub fn recipes(&self) -> Result<Vec<RecipeId>> {
        let mut out = Vec::new();
        for item in self.index().of_kind(super::ObjectKind::Recipe) {
            if let (ObjectId::Recipe(id), _) = item? {
                out.push(id);
            }
        }
        Ok(out)
    }

    /// Stored size of a manifest: what sending it costs at most.
    pub fn manifest_stored_bytes(&self, id: &ComponentId) -> Result<u64> {
        let object = ObjectId::Manifest(*id);
        let entry = self.index().get(&object)?;
        entry.map(|e| e.stored_bytes).ok_or(RepositoryError::Missing { object })
    }
}

impl Repository {
    /// Positions of those `components` and `packs` that are held and that a component with a name
    /// here is or needs. Looks through all named components.
    pub fn held_by_name(&self, components: &[ComponentId], packs: &[PackId]) -> Result<(Vec<u32>, Vec<u32>)> {
        let wanted: HashSet<PackId> = packs.iter().copied().collect();
        let (mut reached, mut named_packs) = (HashSet::new(), HashSet::new());
        let mut waiting: Vec<ComponentId> = self.bound_components()?.into_iter().map(|b| b.1).collect();
        while let Some(id) = waiting.pop() {
            if !reached.insert(id) {
                continue;
            }
            // One that is damaged leads nowhere for now.
            let Some(summary) = self.summary(&id)? else { continue };
            waiting.extend(summary.requires);
            named_packs.extend(summary.packs.into_iter().map(|p| p.0).filter(|p| wanted.contains(p)));
        }
        let positions = |held: Vec<bool>| (0u32..).zip(held).filter(|(_, h)| *h).map(|(i, _)| i).collect();
        Ok((
            positions(components.iter().map(|c| reached.contains(c) && self.has_manifest(c)).collect()),
            positions(packs.iter().map(|p| named_packs.contains(p) && self.has_pack(p)).collect()),
        ))
    }

    /// Plain sizes that held manifests state for some packs.
    pub fn plain_sizes(&self, packs: &HashSet<PackId>) -> Result<HashMap<PackId, u64>> {
        let mut sizes = HashMap::new();
        for item in self.index().summaries() {
            let (_, summary) = item?;
            sizes.extend(summary.packs.into_iter().filter(|(id, _)| packs.contains(id)));
        }
        Ok(sizes)
    }
}

impl RepositoryError {
    /// Whether what was handed in is at fault, rather than this machine.
    pub fn is_content_fault(&self) -> bool {
        matches!(
            self,
            RepositoryError::Refused { .. } | RepositoryError::Codec { .. } | RepositoryError::Invalid { .. }
        )
    }
}
