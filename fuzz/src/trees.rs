//! Chunk maps: nodes as bytes, and trees put together from them.

use std::collections::HashMap;

use cicada::types::codec::CodecError;
use cicada::types::{BlockHash, NodeHash};
use cicada::vm::chunk_map::{FANOUT, NODE_MAGIC, Node};
use cicada::vm::{Block, ChunkMap, MapRef};

use crate::split;

const NODES_MAX: u64 = 400;

/// A first byte of 1: the rest is one node. Another: the rest describes a tree, see [`tree`].
pub fn chunk_map(data: &[u8]) {
    match split(data) {
        Some((1, rest)) => node(rest),
        Some((bits, rest)) => tree(bits, rest),
        None => {}
    }
}

fn node(bytes: &[u8]) {
    let level = bytes.get(8).copied().unwrap_or_default();
    for wanted in [level, 0, 1] {
        match Node::decode(bytes, wanted) {
            Ok(Node::Leaf(leaf)) => {
                let blocks: Vec<_> = leaf.into_iter().map(|(place, block)| (place.into(), block)).collect();
                let map = ChunkMap { block_size_bytes: 4096, disk_size_bytes: FANOUT * 4096, blocks };
                let (_, nodes) = map.to_tree();
                assert_eq!(nodes[0].1, bytes, "an accepted leaf has one encoding");
            }
            Ok(Node::Inner(children)) => assert!(!children.is_empty() && wanted > 0),
            Err(e) => assert!(!e.to_string().is_empty()),
        }
    }
}

/// Eight bytes of disk size, then nodes, children before parents: level, number of children, and for
/// each its place and either the state of a block or the number of an earlier node. The last node
/// is the root. Levels and sizes may lie; hashes cannot.
fn tree(bits: u8, data: &[u8]) {
    let Some((size, mut rest)) = data.split_first_chunk::<8>() else { return };
    let mut store: HashMap<NodeHash, Vec<u8>> = HashMap::new();
    let mut hashes: Vec<NodeHash> = Vec::new();
    while let [level, count, after @ ..] = rest {
        let count = usize::from(*count) + 1;
        let entries: Vec<_> = after.chunks_exact(2).take(count).collect();
        let mut bytes = NODE_MAGIC.to_vec();
        bytes.push(*level);
        varint(&mut bytes, entries.len() as u64);
        for entry in &entries {
            bytes.push(entry[0]);
            if *level == 0 {
                bytes.push(u8::from(entry[1] > 0));
                if entry[1] > 0 {
                    bytes.extend_from_slice(BlockHash::of(&entry[1..]).as_bytes());
                }
            } else {
                let child = hashes.get(usize::from(entry[1]) % hashes.len().max(1)).copied();
                bytes.extend_from_slice(child.unwrap_or(NodeHash::of(b"")).as_bytes());
            }
        }
        let hash = NodeHash::of(&bytes);
        hashes.push(hash);
        store.insert(hash, bytes);
        rest = &after[2 * entries.len()..];
    }
    let map = MapRef {
        block_size_bytes: 1 << (bits / 2 % 32),
        disk_size_bytes: u64::from_le_bytes(*size),
        root: hashes.last().copied(),
    };
    let _ = map.id();
    // As the repository does: a small tree may stand for a giant disk.
    let mut nodes = 0;
    let read = ChunkMap::from_tree::<CodecError>(&map, |hash| {
        nodes += 1;
        if nodes > NODES_MAX {
            return Err(CodecError::TooLarge { what: "nodes", value: nodes, limit: NODES_MAX });
        }
        store.get(&hash).cloned().ok_or(CodecError::NotCanonical { what: "hash" })
    });
    if let Ok(whole) = read {
        assert!(whole.blocks.is_sorted_by(|a, b| a.0 < b.0), "blocks ascend");
        assert!(whole.blocks.last().is_none_or(|b| b.0 < map.block_count()), "no block is beyond the disk");
        let _ = whole.data_bytes();
        if let Some((number, block)) = whole.blocks.first() {
            assert_eq!(whole.get(*number), Some(*block));
            assert!(matches!(block, Block::Zero | Block::Data(_)));
        }
        assert_eq!(whole.to_tree().0, map, "an accepted map has one tree");
    }
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}
