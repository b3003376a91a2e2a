//! Components by name: binding, listing, resolving, removing, and what a set of them lacks here.

use std::collections::{BTreeSet, HashSet};

use serde::{Deserialize, Serialize};

use super::Repository;
use super::error::{ObjectId, RepositoryError, Result};
use super::index::Summary;
use super::refs::RefKind;
use crate::component::{Kind, Manifest};
use crate::types::{ComponentId, PackId, RecipeId};

/// Shorter beginnings of an id are taken for names only.
const ID_PREFIX_DIGITS_MIN: usize = 4;

/// What a listing shows of a component.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ComponentSummary {
    pub name: String,
    pub version: String,
    pub kind: Kind,
    pub architecture: String,
    /// Bytes of all its packs, plain and padded.
    pub plain_bytes: u64,
    /// Bytes its packs take here; what is missing takes none.
    pub stored_bytes: u64,
    pub packs: usize,
    /// Whether its name is bound here. A component can be held only because another needs it.
    pub bound: bool,
}

/// What a set of components lacks here.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct MissingReport {
    /// Their packs are unknown until they are fetched.
    pub manifests: Vec<ComponentId>,
    /// Missing packs of the manifests that are held, each once, with plain sizes.
    pub packs: Vec<(PackId, u64)>,
    /// Plain bytes of `packs`.
    pub missing_bytes: u64,
    /// Plain bytes of the packs that are held, each once.
    pub held_bytes: u64,
}

impl MissingReport {
    pub fn is_complete(&self) -> bool {
        self.manifests.is_empty() && self.packs.is_empty()
    }
}

impl Repository {
    /// Binds a held component to its name, kind, version and architecture. Returns the component
    /// that was bound to them before, if it is another.
    pub fn bind_component(&self, manifest: &Manifest, id: ComponentId) -> Result<Option<ComponentId>> {
        if !self.has_manifest(&id) {
            return Err(RepositoryError::Missing { object: ObjectId::Manifest(id) });
        }
        let name = ref_name(manifest);
        let before = self.get_ref(RefKind::Component, &name)?;
        let before = before.map(|value| component_of(&name, &value)).transpose()?;
        if before != Some(id) {
            self.set_ref(RefKind::Component, &name, id.as_bytes())?;
        }
        Ok(before.filter(|old| *old != id))
    }

    /// Every component held here, sorted by kind, name and version.
    pub fn components(&self) -> Result<Vec<(ComponentId, ComponentSummary)>> {
        let bound: HashSet<ComponentId> = self.bound_components()?.into_iter().map(|b| b.1).collect();
        let mut found = Vec::new();
        for item in self.index().summaries() {
            let (id, summary) = item?;
            if !self.has_manifest(&id) {
                continue;
            }
            let mut stored_bytes = 0;
            for (pack, _) in &summary.packs {
                let entry = self.index().get(&ObjectId::Pack(*pack))?;
                stored_bytes += entry.map_or(0, |e| e.stored_bytes);
            }
            let summary = ComponentSummary {
                plain_bytes: summary.packs.iter().map(|p| p.1).sum(),
                stored_bytes,
                packs: summary.packs.len(),
                bound: bound.contains(&id),
                name: summary.name,
                version: summary.version,
                kind: summary.kind,
                architecture: summary.architecture,
            };
            found.push((id, summary));
        }
        found.sort_by(|(a_id, a), (b_id, b)| {
            (a.kind, &a.name, &a.version, a_id).cmp(&(b.kind, &b.name, &b.version, b_id))
        });
        Ok(found)
    }

    /// The component an operator means: a bound `name` or `name@version`, or the id of a held
    /// component or the beginning of it. Names go before ids.
    pub fn resolve_component(&self, text: &str) -> Result<ComponentId> {
        let (name, version) = match text.split_once('@') {
            Some((name, version)) => (name, Some(version)),
            None => (text, None),
        };
        let mut candidates = BTreeSet::new();
        for (_, id) in self.bound_components()? {
            let Some(summary) = self.summary(&id)? else { continue };
            if summary.name == name && version.is_none_or(|v| v == summary.version) {
                candidates.insert(id);
            }
        }
        let is_id_prefix = (ID_PREFIX_DIGITS_MIN..=64).contains(&text.len())
            && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if candidates.is_empty() && is_id_prefix {
            for item in self.index().summaries() {
                let (id, _) = item?;
                if id.to_string().starts_with(text) && self.has_manifest(&id) {
                    candidates.insert(id);
                }
            }
        }
        match (candidates.first(), candidates.len()) {
            (Some(id), 1) => Ok(*id),
            (None, _) => Err(RepositoryError::UnknownComponent { text: text.chars().take(200).collect() }),
            _ => {
                let shown = candidates.iter().map(|id| self.describe(id)).collect();
                Err(RepositoryError::Ambiguous { text: text.to_owned(), candidates: shown })
            }
        }
    }

    /// Unbinds a component's names, after which the collector may take it. Refused while a bound
    /// component or the recipe of a composition needs it.
    pub fn remove_component(&self, id: &ComponentId) -> Result<()> {
        let bound = self.bound_components()?;
        if !self.has_manifest(id) && !bound.iter().any(|b| b.1 == *id) {
            return Err(RepositoryError::Missing { object: ObjectId::Manifest(*id) });
        }
        let in_use = |by: String, next_step: String| {
            Err(RepositoryError::InUse { object: ObjectId::Manifest(*id), by, next_step })
        };
        for (_, other) in &bound {
            let needs = |s: Summary| s.requires.contains(id);
            if other != id && self.summary(other)?.is_some_and(needs) {
                let by = self.describe(other);
                let next_step = format!("remove that first: cicada component remove {}", other.short());
                return in_use(format!("component {by}"), next_step);
            }
        }
        for recipe in self.composition_recipes()? {
            match self.recipe(&recipe) {
                Ok(held) if held.components.contains(id) => {
                    // The composition is what keeps the recipe; both go when no VM has them any more.
                    return in_use(
                        format!("the composition of recipe {}", recipe.short()),
                        "delete the VMs made of it, and run `cicada repo gc` when repository.gc_grace is over"
                            .into(),
                    );
                }
                Ok(_) | Err(RepositoryError::Missing { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        for (name, bound_id) in bound {
            if bound_id == *id {
                self.remove_ref(RefKind::Component, &name)?;
            }
        }
        Ok(())
    }

    /// Which manifests and packs a set of components lacks, exact to the byte once all manifests
    /// are held.
    pub fn missing_packs(&self, components: &[ComponentId]) -> Result<MissingReport> {
        let mut report = MissingReport::default();
        let (mut seen, mut seen_packs) = (HashSet::new(), HashSet::new());
        for id in components.iter().filter(|id| seen.insert(**id)) {
            let Some(summary) = self.summary(id)? else {
                report.manifests.push(*id);
                continue;
            };
            for (pack, size_bytes) in summary.packs {
                if !seen_packs.insert(pack) {
                    continue;
                }
                if self.has_pack(&pack) {
                    report.held_bytes = report.held_bytes.saturating_add(size_bytes);
                } else {
                    report.missing_bytes = report.missing_bytes.saturating_add(size_bytes);
                    report.packs.push((pack, size_bytes));
                }
            }
        }
        Ok(report)
    }

    /// Whether a name means this component.
    pub fn is_bound(&self, id: &ComponentId) -> Result<bool> {
        Ok(self.bound_components()?.iter().any(|(_, bound)| bound == id))
    }

    /// Ref names and ids of all bound components.
    pub(super) fn bound_components(&self) -> Result<Vec<(String, ComponentId)>> {
        let refs = self.list_refs(RefKind::Component)?;
        refs.into_iter()
            .map(|(name, value)| {
                let id = component_of(&name, &value)?;
                Ok((name, id))
            })
            .collect()
    }

    /// Removes what is kept by the names of compositions, but for those that are `used`.
    pub fn forget_compositions(&self, used: &dyn Fn(&RecipeId) -> bool) -> Result<()> {
        for recipe in self.composition_recipes()?.iter().filter(|recipe| !used(recipe)) {
            self.remove_ref(RefKind::Composition, &recipe.to_string())?;
        }
        Ok(())
    }

    /// The recipes that composition refs name.
    pub(super) fn composition_recipes(&self) -> Result<Vec<RecipeId>> {
        let refs = self.list_refs(RefKind::Composition)?;
        let parse = |(name, _): (String, _)| {
            name.parse().map_err(|_| RepositoryError::Invalid {
                what: "composition ref",
                rule: format!("'{name}' is no recipe id"),
            })
        };
        refs.into_iter().map(parse).collect()
    }

    /// A held component's summary, from the manifest itself if the index lacks it.
    pub(super) fn summary(&self, id: &ComponentId) -> Result<Option<Summary>> {
        if !self.has_manifest(id) {
            return Ok(None);
        }
        if let Some(summary) = self.index().summary(id)? {
            return Ok(Some(summary));
        }
        Ok(Some(Summary::of(&*self.manifest(id)?)))
    }

    /// A component as `name@version (id)`.
    pub(super) fn describe(&self, id: &ComponentId) -> String {
        match self.summary(id) {
            Ok(Some(s)) => {
                format!("{}@{} ({} {}, {})", s.name, s.version, s.architecture, s.kind, id.short())
            }
            _ => id.short(),
        }
    }
}

/// The name a component is bound under. The architecture is part of it, so that one cloud can hold
/// the same version for two.
fn ref_name(m: &Manifest) -> String {
    format!("{}/{}/{}/{}", m.kind, m.name, m.version, m.architecture)
}

fn component_of(name: &str, value: &[u8]) -> Result<ComponentId> {
    match <[u8; 32]>::try_from(value) {
        Ok(id) => Ok(ComponentId::from_bytes(id)),
        Err(_) => Err(RepositoryError::Invalid {
            what: "component ref",
            rule: format!("'{name}' is bound to {} bytes that are no component id", value.len()),
        }),
    }
}
