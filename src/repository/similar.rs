//! Which held packs are likely other versions of one that is not: those of the same package, in a
//! component of the same similarity key (name, kind, architecture).

use std::collections::{HashMap, HashSet};

use super::Repository;
use super::error::Result;
use crate::types::{ComponentId, PackId};

/// Bases named for one pack: the sender may not hold all of them.
const BASES_MAX: usize = 4;
/// Manifests read to find them; a repository seldom holds as many versions of one component.
const VERSIONS_MAX: usize = 64;
/// Smaller packs are not worth a comparison.
const PACK_BYTES_MIN: u64 = 16 << 10;

impl Repository {
    /// For packs of `components` that are in `wanted`: held packs a delta may lean on, likeliest
    /// first. The components' manifests must be held.
    pub fn likely_bases(
        &self,
        components: &[ComponentId],
        wanted: &HashSet<PackId>,
    ) -> Result<HashMap<PackId, Vec<PackId>>> {
        let mut bases: HashMap<PackId, Vec<PackId>> = HashMap::new();
        let own: HashSet<&ComponentId> = components.iter().collect();
        let mut manifests = Vec::new();
        let mut keys = HashSet::new();
        for id in components {
            let manifest = self.manifest(id)?;
            if manifest.packs.iter().any(|p| wanted.contains(&p.id)) {
                keys.insert((manifest.name.clone(), manifest.kind, manifest.architecture.clone()));
                manifests.push(manifest);
            }
        }
        if manifests.is_empty() {
            return Ok(bases);
        }
        // Key, package without its numbers, pack, size.
        let mut held = Vec::new();
        let mut versions = 0;
        for item in self.index().summaries() {
            let (id, summary) = item?;
            let key = (summary.name, summary.kind, summary.architecture);
            if own.contains(&id) || !keys.contains(&key) || versions == VERSIONS_MAX {
                continue;
            }
            versions += 1;
            // A manifest that cannot be read is no base, and no reason to fail.
            let Ok(manifest) = self.manifest(&id) else { continue };
            for pack in manifest.packs.iter().filter(|p| !wanted.contains(&p.id)) {
                held.push((key.clone(), without_numbers(&pack.package), pack.id, pack.size_bytes));
            }
        }
        for manifest in manifests {
            let key = (manifest.name.clone(), manifest.kind, manifest.architecture.clone());
            for pack in manifest.packs.iter().filter(|p| wanted.contains(&p.id)) {
                if pack.size_bytes < PACK_BYTES_MIN {
                    continue;
                }
                let package = without_numbers(&pack.package);
                let mut found: Vec<_> = held
                    .iter()
                    .filter(|(k, p, ..)| *k == key && *p == package)
                    .map(|(.., id, size_bytes)| (size_bytes.abs_diff(pack.size_bytes), *id))
                    .collect();
                found.sort();
                found.dedup();
                let found = found.into_iter().map(|(_, id)| id).filter(|id| self.has_pack(id));
                bases.entry(pack.id).or_default().extend(found.take(BASES_MAX));
            }
        }
        bases.retain(|_, found| !found.is_empty());
        Ok(bases)
    }
}

/// `linux-image-6.1.0-55-cloud-amd64` and `linux-image-6.1.0-56-cloud-amd64` are versions of one
/// thing: package names that carry versions are compared without their numbers.
fn without_numbers(package: &str) -> String {
    let mut out = String::new();
    for c in package.chars() {
        match c {
            '0'..='9' if out.ends_with('#') => {}
            '0'..='9' => out.push('#'),
            c => out.push(c),
        }
    }
    out
}
