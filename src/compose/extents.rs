//! The plan of an adopted disk's base: its component carries the extents, see `repository/FORMAT.md`,
//! section "Extent list". Nothing is laid out anew.

use std::io;

use crate::component::extents::{BLOCK_BYTES, ENCODED_BYTES_MAX, ENTRY};
use crate::component::{EntryKind, ExtentList, Manifest, Recipe};
use crate::repository::Repository;
use crate::sparse::Run;

use super::error::ComposeError;
use super::plan::{Extent, Plan};

/// Reads the extent list of a recipe's one component and turns it into a plan.
pub fn plan(repository: &Repository, recipe: &Recipe, manifest: &Manifest) -> Result<Plan, ComposeError> {
    let invalid = |reason: String| ComposeError::ExtentList { component: manifest.name.clone(), reason };
    let list = read(repository, manifest, &invalid)?;
    if list.disk_size_bytes != recipe.disk.virtual_size_bytes {
        return Err(invalid(format!(
            "it describes a disk of {} bytes, the recipe one of {}",
            list.disk_size_bytes, recipe.disk.virtual_size_bytes
        )));
    }
    let extents = list.extents.iter().map(|e| Extent {
        // The list was checked against these packs.
        pack: manifest.packs[e.pack as usize].id,
        pack_offset_bytes: e.pack_block * BLOCK_BYTES,
        image_offset_bytes: e.disk_block * BLOCK_BYTES,
        len_bytes: e.blocks * BLOCK_BYTES,
    });
    Ok(Plan { virtual_size_bytes: list.disk_size_bytes, metadata: Vec::new(), extents: extents.collect() })
}

fn read(
    repository: &Repository,
    manifest: &Manifest,
    invalid: &dyn Fn(String) -> ComposeError,
) -> Result<ExtentList, ComposeError> {
    let size_bytes = match manifest.entries.as_slice() {
        [entry] if entry.path == ENTRY.as_bytes() => match entry.kind {
            EntryKind::File { size_bytes, pack: 0, offset_bytes: 0, .. } => size_bytes,
            _ => return Err(invalid("its entry is no file at the beginning of its first pack".into())),
        },
        _ => return Err(invalid(format!("it does not consist of the one file '{ENTRY}'"))),
    };
    let Some(first) = manifest.packs.first() else { return Err(invalid("it has no packs".into())) };
    if size_bytes > ENCODED_BYTES_MAX || first.size_bytes > ENCODED_BYTES_MAX.next_multiple_of(BLOCK_BYTES) {
        return Err(invalid(format!("it is larger than {ENCODED_BYTES_MAX} bytes")));
    }
    let mut bytes = Vec::new();
    repository.read_pack(&first.id, &mut |_, run| {
        // The pack may be larger than its manifest says.
        if bytes.len() as u64 + run.len_bytes() > first.size_bytes {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        match run {
            Run::Data(piece) => bytes.extend_from_slice(piece),
            Run::Zeros(len) => bytes.resize(bytes.len() + len as usize, 0),
        }
        Ok(())
    })?;
    bytes.truncate(size_bytes as usize);
    let sizes: Vec<u64> = manifest.packs.iter().map(|p| p.size_bytes).collect();
    ExtentList::decode(&bytes, &sizes).map_err(|e| invalid(e.to_string()))
}
