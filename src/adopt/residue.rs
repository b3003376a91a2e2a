//! From a disk and its base to the root delta, and the proof that both together are the disk.

use std::path::Path;

use rayon::prelude::*;

use crate::component::extents::BLOCK_BYTES;
use crate::compose::{Digest, SEGMENT_BYTES};
use crate::disk::OverlayWriter;
use crate::sparse::is_zero;

use super::segments::{Done, zero_hash};
use super::{AdoptError, DiskBlocks, Job, Segments};

/// Segments that are compared at once; their differences wait in memory.
const BATCH: usize = 16;

/// Writes every block of the disk that is not in the base to a new overlay; returns their bytes. The
/// digests by which blocks were matched do not matter here: bytes are compared.
pub fn write(disk: &Segments, overlay: &Path, base: &Path, job: Job<'_>) -> Result<u64, AdoptError> {
    let below = Segments::of_file(base)?;
    let mut writer = OverlayWriter::open_or_create(overlay, base, disk.size_bytes())?;
    let done = Done::new("write", disk.size_bytes(), job);
    let numbers: Vec<usize> = (0..disk.count()).collect();
    let mut blocks = 0;
    for batch in numbers.chunks(BATCH) {
        let differences: Vec<Vec<(u64, Vec<u8>)>> =
            batch.par_iter().map(|n| differences(disk, &below, *n)).collect::<Result<_, AdoptError>>()?;
        for (number, bytes) in differences.iter().flatten() {
            if is_zero(bytes) {
                writer.write_zero(*number)?;
            } else {
                writer.write_block(*number, bytes)?;
            }
            blocks += 1;
        }
        let bytes: u64 = batch.iter().map(|n| disk.range(*n)).map(|r| r.end - r.start).sum();
        done.add(bytes)?;
    }
    writer.finish()?;
    Ok(blocks * BLOCK_BYTES)
}

/// The blocks of a segment that differ, with their numbers.
fn differences(disk: &Segments, below: &Segments, number: usize) -> Result<Vec<(u64, Vec<u8>)>, AdoptError> {
    let size = (disk.range(number).end - disk.range(number).start) as usize;
    let (mut above_buffer, mut below_buffer) = (vec![0; size], vec![0; SEGMENT_BYTES as usize]);
    let above = disk.read(number, &mut above_buffer)?;
    let base = below.read(number, &mut below_buffer)?;
    if above.is_none() && base.is_none() {
        return Ok(Vec::new());
    }
    let first = disk.range(number).start / BLOCK_BYTES;
    let pairs = above_buffer.chunks(BLOCK_BYTES as usize).zip(below_buffer.chunks(BLOCK_BYTES as usize));
    let differing = (first..).zip(pairs).filter(|(_, (a, b))| a != b);
    Ok(differing.map(|(block, (above, _))| (block, above.to_vec())).collect())
}

/// Reads the VM's disk as its guest will; tells whether it is what was read first.
pub fn is_same(disk: &DiskBlocks, overlay: &Path, base: &Path, job: Job<'_>) -> Result<bool, AdoptError> {
    let vm = Segments::of_vm(overlay, base)?;
    let done = Done::new("verify", vm.data_bytes(), job);
    let hashes = (0..vm.count()).into_par_iter().map_init(
        || vec![0; SEGMENT_BYTES as usize],
        |buffer, number| match vm.read(number, buffer)? {
            None => Ok(zero_hash(&vm, number)),
            Some(bytes) => {
                let hash = blake3::hash(bytes);
                done.add(SEGMENT_BYTES)?;
                Ok(hash)
            }
        },
    );
    let found = Digest::of_segments(hashes.collect::<Result<_, AdoptError>>()?);
    Ok(found.digest == disk.digest().digest)
}
