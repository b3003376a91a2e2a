//! Questions others ask about what is held.

use super::error::Result;
use super::{ObjectId, Repository, RepositoryError};
use crate::types::{ComponentId, RecipeId};

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

impl RepositoryError {
    /// Whether what was handed in is at fault, rather than this machine.
    pub fn is_content_fault(&self) -> bool {
        matches!(
            self,
            RepositoryError::Refused { .. } | RepositoryError::Codec { .. } | RepositoryError::Invalid { .. }
        )
    }
}
