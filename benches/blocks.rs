//! What block size a chunk map of user data should have: what travels when one state of a disk
//! becomes another, blocks and chunk map together, for each size.
//!
//! `cargo bench --bench blocks -- OLD NEW`: two raw images. Blocks that are somewhere in OLD are
//! held; the others travel in batches as the transfer makes them (1 MiB, zstd -3). Of the map those
//! nodes travel that OLD's does not have.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;

use cicada::types::BlockHash;
use cicada::vm::{Block, ChunkMap};

const BATCH_BYTES: usize = 1 << 20;
const SIZES: [u32; 5] = [4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [old, new] = arguments.as_slice() else {
        println!("blocks: cargo bench --bench blocks -- OLD NEW");
        return Ok(());
    };
    println!("{:>8} {:>10} {:>12} {:>12} {:>10} {:>12}", "block", "blocks", "plain", "zstd -3", "map", "sum");
    for size in SIZES {
        let held: HashSet<BlockHash> = blocks(old, size)?.1.into_iter().collect();
        let old_nodes: HashSet<_> =
            blocks(old, size)?.0.to_tree().1.into_iter().map(|(hash, _)| hash).collect();
        let (map, _) = blocks(new, size)?;
        let wanted: HashSet<BlockHash> = map
            .blocks
            .iter()
            .filter_map(|(_, b)| if let Block::Data(h) = b { Some(*h) } else { None })
            .filter(|h| !held.contains(h))
            .collect();
        let (mut sent, mut batch, mut packed, mut plain) = (HashSet::new(), Vec::new(), 0, 0);
        each_block(new, size, |_, bytes| {
            let hash = BlockHash::of(bytes);
            if wanted.contains(&hash) && sent.insert(hash) {
                plain += bytes.len();
                batch.extend_from_slice(bytes);
            }
            if batch.len() >= BATCH_BYTES {
                packed += zstd::bulk::compress(&batch, 3)?.len();
                batch.clear();
            }
            Ok(())
        })?;
        packed += zstd::bulk::compress(&batch, 3)?.len();
        let nodes = map.to_tree().1;
        let map_bytes: usize =
            nodes.iter().filter(|(hash, _)| !old_nodes.contains(hash)).map(|(_, bytes)| bytes.len()).sum();
        println!(
            "{:>8} {:>10} {plain:>12} {packed:>12} {map_bytes:>10} {:>12}",
            size,
            sent.len(),
            packed + map_bytes
        );
    }
    Ok(())
}

/// A disk's map, and the hashes of its blocks.
fn blocks(path: &str, size: u32) -> std::io::Result<(ChunkMap, Vec<BlockHash>)> {
    let mut map = ChunkMap::empty(size, std::fs::metadata(path)?.len());
    let mut hashes = Vec::new();
    each_block(path, size, |number, bytes| {
        let hash = BlockHash::of(bytes);
        map.blocks.push((number, Block::Data(hash)));
        hashes.push(hash);
        Ok(())
    })?;
    Ok((map, hashes))
}

/// Calls `each` with the blocks that are not zero.
fn each_block(
    path: &str,
    size: u32,
    mut each: impl FnMut(u64, &[u8]) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut file = std::io::BufReader::with_capacity(1 << 20, File::open(path)?);
    let mut left = std::fs::metadata(path)?.len();
    let mut block = vec![0; size as usize];
    for number in 0.. {
        let len = left.min(size.into()) as usize;
        if len == 0 {
            break;
        }
        file.read_exact(&mut block[..len])?;
        left -= len as u64;
        if block[..len].iter().any(|b| *b != 0) {
            each(number, &block[..len])?;
        }
    }
    Ok(())
}
