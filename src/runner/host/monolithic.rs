//! What moving whole disks would have cost.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use crate::disk::Scan;
use crate::repository::RefKind;
use crate::runner::Shared;
use crate::sparse;
use crate::types::RecipeId;
use crate::vm::Block;

/// zstd level a monolithic tool would use.
const MONOLITHIC_LEVEL: i32 = 3;

/// What a tool that copies whole disks would send, compressed and raw. Blocking, and slow the
/// first time for a recipe: the composition's part is remembered.
pub fn monolithic(shared: &Shared, recipe: &RecipeId, disks: &[Arc<Scan>]) -> io::Result<(u64, u64)> {
    let name = recipe.to_string();
    let known = shared.repository.get_ref(RefKind::Composition, &name).map_err(io::Error::other)?;
    let known = known.and_then(|v| serde_json::from_slice::<(u64, u64)>(&v).ok());
    let (mut zstd, mut raw) = match known {
        Some(sizes) => sizes,
        None => {
            let composition = shared.composer.composition(recipe).map_err(io::Error::other)?;
            let sizes = compressed_size(&composition.path)?;
            let value = serde_json::to_vec(&sizes).map_err(io::Error::other)?;
            shared.repository.set_ref(RefKind::Composition, &name, &value).map_err(io::Error::other)?;
            sizes
        }
    };
    for disk in disks {
        let mut encoder = zstd::Encoder::new(Counter(0), MONOLITHIC_LEVEL)?;
        for (_, block) in &disk.map.blocks {
            if let Block::Data(hash) = block {
                let bytes = disk.index.read_block(hash).map_err(io::Error::other)?;
                raw += bytes.len() as u64;
                encoder.write_all(&bytes)?;
            }
        }
        zstd += encoder.finish()?.0;
    }
    Ok((zstd, raw))
}

/// Size of a file's data, compressed as one stream and raw; holes cost nothing.
fn compressed_size(path: &Path) -> io::Result<(u64, u64)> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut encoder = zstd::Encoder::new(Counter(0), MONOLITHIC_LEVEL)?;
    let mut raw = 0;
    for data in sparse::data_runs(&file.try_clone()?, 0..len) {
        let data = data?;
        file.seek(SeekFrom::Start(data.start))?;
        raw += io::copy(&mut (&mut file).take(data.end - data.start), &mut encoder)?;
    }
    Ok((encoder.finish()?.0, raw))
}

struct Counter(u64);

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
