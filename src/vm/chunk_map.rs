//! Chunk maps: the ordered block hashes of a root delta or a user-data block, kept as a tree so
//! that equal subtrees compare by one hash and empty regions cost nothing.
//! The byte format is specified in `repository/FORMAT.md`, section "Chunk map".

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::types::codec::{CodecError, Reader, Writer};
use crate::types::{BlockHash, MapId, NodeHash};

/// Children per node. Changing this value is a format break.
pub const FANOUT: u64 = 256;
/// Magic and version of an encoded node.
pub const NODE_MAGIC: &[u8; 8] = b"CICNOD\x00\x01";
/// The largest encoded node: magic, level, count, and a place, a state and a hash per child.
pub const NODE_BYTES_MAX: usize = 8 + 1 + 2 + 34 * FANOUT as usize;
/// Block sizes a map may have.
pub const BLOCK_BYTES_MIN: u32 = 4096;
pub const BLOCK_BYTES_MAX: u32 = 1 << 20;
const DISK_BYTES_MAX: u64 = 1 << 44;

/// One block that is not absent. An absent block is what lies below: the composition for a root
/// delta, zeros for a user-data block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Block {
    Zero,
    Data(BlockHash),
}

/// A chunk map named by its root: all a peer needs to fetch the rest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct MapRef {
    /// A power of two from 4 KiB to 1 MiB.
    pub block_size_bytes: u32,
    pub disk_size_bytes: u64,
    /// `None` when every block is absent.
    pub root: Option<NodeHash>,
}

impl MapRef {
    pub fn id(&self) -> MapId {
        let mut w = Writer::with_magic(b"CICMAP\x00\x01");
        w.u32(self.block_size_bytes);
        w.u64(self.disk_size_bytes);
        w.u8(self.root.is_some().into());
        if let Some(root) = self.root {
            w.fixed(root.as_bytes());
        }
        MapId::of(&w.into_bytes())
    }

    /// Refuses geometry no map can have; call it on whatever a peer sends.
    pub fn check(&self) -> Result<(), CodecError> {
        let bs = self.block_size_bytes;
        if !bs.is_power_of_two()
            || !(BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&bs)
            || self.disk_size_bytes > DISK_BYTES_MAX
        {
            return Err(CodecError::Invalid {
                what: "chunk map",
                rule: format!("block size {bs} or disk size {} is outside the limits", self.disk_size_bytes),
            });
        }
        Ok(())
    }

    pub fn block_count(&self) -> u64 {
        self.disk_size_bytes.div_ceil(self.block_size_bytes.into())
    }

    /// Levels of the tree: 1 when the root is a leaf.
    pub fn levels(&self) -> u8 {
        let mut levels = 1;
        let mut reach = FANOUT;
        while reach < self.block_count() {
            reach *= FANOUT;
            levels += 1;
        }
        levels
    }
}

/// A decoded node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Node {
    /// Blocks by their place in the node, ascending.
    Leaf(Vec<(u8, Block)>),
    /// Child nodes by their place, ascending; an absent child is an empty region.
    Inner(Vec<(u8, NodeHash)>),
}

impl Node {
    /// `level` 0 is a leaf.
    fn encode(&self, level: u8) -> Vec<u8> {
        let mut w = Writer::with_magic(NODE_MAGIC);
        w.u8(level);
        match self {
            Node::Leaf(blocks) => {
                w.varint(blocks.len() as u64);
                for (place, block) in blocks {
                    w.u8(*place);
                    match block {
                        Block::Zero => w.u8(0),
                        Block::Data(h) => {
                            w.u8(1);
                            w.fixed(h.as_bytes());
                        }
                    }
                }
            }
            Node::Inner(children) => {
                w.varint(children.len() as u64);
                for (place, child) in children {
                    w.u8(*place);
                    w.fixed(child.as_bytes());
                }
            }
        }
        w.into_bytes()
    }

    /// Reads a node that must be of `level`; since a node names lower nodes only by the hash of
    /// their bytes, and levels count down, no tree can have a cycle or be deeper than its map says.
    pub fn decode(bytes: &[u8], level: u8) -> Result<Self, CodecError> {
        let mut r = Reader::with_magic(bytes, NODE_MAGIC, "chunk map node of version 1")?;
        let found = r.u8("level")?;
        if found != level {
            return Err(CodecError::Invalid {
                what: "chunk map node",
                rule: format!("level {found} where {level} belongs"),
            });
        }
        let n = r.count("children", FANOUT, 2)?;
        if n == 0 {
            return Err(CodecError::NotCanonical { what: "empty chunk map node" });
        }
        let mut last = None;
        let mut place = |r: &mut Reader<'_>| {
            let p = r.u8("place")?;
            if last.is_some_and(|l| p <= l) {
                return Err(CodecError::NotCanonical { what: "order of children" });
            }
            last = Some(p);
            Ok(p)
        };
        let node = if level == 0 {
            let mut blocks = Vec::with_capacity(n);
            for _ in 0..n {
                let p = place(&mut r)?;
                let block = match r.u8("block state")? {
                    0 => Block::Zero,
                    1 => Block::Data(BlockHash::from_bytes(r.array("block hash")?)),
                    v => return Err(CodecError::Unknown { what: "block state", value: v.into() }),
                };
                blocks.push((p, block));
            }
            Node::Leaf(blocks)
        } else {
            let mut children = Vec::with_capacity(n);
            for _ in 0..n {
                children.push((place(&mut r)?, NodeHash::from_bytes(r.array("child")?)));
            }
            Node::Inner(children)
        };
        r.end()?;
        Ok(node)
    }
}

/// A whole chunk map in memory: block number and state, ascending, absent blocks left out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChunkMap {
    pub block_size_bytes: u32,
    pub disk_size_bytes: u64,
    pub blocks: Vec<(u64, Block)>,
}

impl ChunkMap {
    pub fn empty(block_size_bytes: u32, disk_size_bytes: u64) -> Self {
        Self { block_size_bytes, disk_size_bytes, blocks: Vec::new() }
    }

    pub fn get(&self, number: u64) -> Option<Block> {
        self.blocks.binary_search_by_key(&number, |b| b.0).ok().map(|i| self.blocks[i].1)
    }

    /// Bytes the data blocks stand for.
    pub fn data_bytes(&self) -> u64 {
        let n = self.blocks.iter().filter(|b| matches!(b.1, Block::Data(_))).count() as u64;
        n * u64::from(self.block_size_bytes)
    }

    /// The tree: its name, and every node that must be stored for it, children before parents.
    pub fn to_tree(&self) -> (MapRef, Vec<(NodeHash, Vec<u8>)>) {
        let mut map = MapRef {
            block_size_bytes: self.block_size_bytes,
            disk_size_bytes: self.disk_size_bytes,
            root: None,
        };
        let mut nodes = Vec::new();
        let mut seal = |node: Node, level: u8| {
            let bytes = node.encode(level);
            let hash = NodeHash::of(&bytes);
            nodes.push((hash, bytes));
            hash
        };
        let mut row: Vec<(u64, NodeHash)> = self
            .blocks
            .chunk_by(|a, b| a.0 / FANOUT == b.0 / FANOUT)
            .map(|leaf| {
                let blocks = leaf.iter().map(|(n, b)| ((n % FANOUT) as u8, *b)).collect();
                (leaf[0].0 / FANOUT, seal(Node::Leaf(blocks), 0))
            })
            .collect();
        for level in 1..map.levels() {
            row = row
                .chunk_by(|a, b| a.0 / FANOUT == b.0 / FANOUT)
                .map(|part| {
                    let children = part.iter().map(|(n, h)| ((n % FANOUT) as u8, *h)).collect();
                    (part[0].0 / FANOUT, seal(Node::Inner(children), level))
                })
                .collect();
        }
        map.root = row.first().map(|(_, h)| *h);
        (map, nodes)
    }

    /// How many leaves a tree has, each counted at every place it has, found from the nodes above them
    /// alone, each read once: a few nodes may stand for a disk that no memory holds.
    pub fn leaf_count<E: From<CodecError>>(
        map: &MapRef,
        mut node: impl FnMut(NodeHash) -> Result<Vec<u8>, E>,
    ) -> Result<u64, E> {
        map.check()?;
        let mut row: HashMap<NodeHash, u64> = map.root.map(|root| (root, 1)).into_iter().collect();
        for level in (1..map.levels()).rev() {
            let mut below: HashMap<NodeHash, u64> = HashMap::new();
            for (hash, places) in row {
                if let Node::Inner(children) = Node::decode(&node(hash)?, level)? {
                    // Four levels of 256 places do not overflow.
                    children.into_iter().for_each(|(_, h)| *below.entry(h).or_default() += places);
                }
            }
            row = below;
        }
        Ok(row.into_values().sum())
    }

    /// Reads a whole map, getting each node's bytes (already verified against their hash) from `node`,
    /// in the order of the disk. `node` is asked once for every place a node has, and bounds what a
    /// small tree may stand for by refusing.
    pub fn from_tree<E: From<CodecError>>(
        map: &MapRef,
        mut node: impl FnMut(NodeHash) -> Result<Vec<u8>, E>,
    ) -> Result<Self, E> {
        map.check()?;
        // Depth first: a node may be named 256 times by each of 256 parents, so a row of the tree can
        // be enormous where its distinct nodes are few. What is open is never more than 256 a level,
        // and whoever answers for the nodes can end it at any number of them.
        let mut open: Vec<(u8, u64, NodeHash)> = Vec::new();
        open.extend(map.root.map(|root| (map.levels() - 1, 0, root)));
        let mut blocks = Vec::new();
        while let Some((level, number, hash)) = open.pop() {
            let first = number * FANOUT;
            match Node::decode(&node(hash)?, level)? {
                Node::Leaf(leaf) => {
                    blocks.extend(leaf.into_iter().map(|(p, b)| (first + u64::from(p), b)));
                    check_within(map, blocks.last().map(|b| b.0), 1)?;
                }
                Node::Inner(children) => {
                    let last = children.last().map(|(p, _)| first + u64::from(*p));
                    check_within(map, last, FANOUT.saturating_pow(u32::from(level)))?;
                    let below = children.into_iter().rev();
                    open.extend(below.map(|(p, h)| (level - 1, first + u64::from(p), h)));
                }
            }
        }
        Ok(Self { block_size_bytes: map.block_size_bytes, disk_size_bytes: map.disk_size_bytes, blocks })
    }
}

fn check_within(map: &MapRef, last: Option<u64>, reach: u64) -> Result<(), CodecError> {
    match last {
        Some(n) if n.saturating_mul(reach) >= map.block_count() => Err(CodecError::Invalid {
            what: "chunk map",
            rule: format!("names a block beyond the end of a disk of {} bytes", map.disk_size_bytes),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn tree_round_trip(numbers in proptest::collection::btree_map(0u64..200_000, any::<Option<u8>>(), 0..300), extra in 0u64..100_000) {
            let numbers: BTreeMap<u64, Option<u8>> = numbers;
            let blocks: Vec<_> = numbers.iter().map(|(n, v)| (*n, v.map_or(Block::Zero, |v| Block::Data(BlockHash::of(&[v]))))).collect();
            let count = blocks.last().map_or(0, |b| b.0 + 1) + extra;
            let map = ChunkMap { block_size_bytes: 4096, disk_size_bytes: count * 4096, blocks };
            let (name, nodes) = map.to_tree();
            let store: HashMap<_, _> = nodes.into_iter().collect();
            let back = ChunkMap::from_tree::<CodecError>(&name, |h| Ok(store[&h].clone())).unwrap();
            prop_assert_eq!(back, map);
        }

        #[test]
        fn bytes_from_a_stranger_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), level in 0u8..4) {
            let _ = Node::decode(&bytes, level);
            let mut framed = NODE_MAGIC.to_vec();
            framed.push(level);
            framed.extend(bytes);
            let _ = Node::decode(&framed, level);
        }
    }

    #[test]
    fn a_small_tree_that_stands_for_a_giant_disk_ends_when_its_reader_wants() {
        // 16 TiB from four nodes, each naming the one below 256 times.
        let leaf = Node::Leaf((0..=255).map(|p| (p, Block::Zero)).collect()).encode(0);
        let mut store = HashMap::from([(NodeHash::of(&leaf), leaf.clone())]);
        let mut below = NodeHash::of(&leaf);
        for level in 1..4 {
            let node = Node::Inner((0..=255).map(|p| (p, below)).collect()).encode(level);
            below = NodeHash::of(&node);
            store.insert(below, node);
        }
        let map = MapRef { block_size_bytes: 4096, disk_size_bytes: 1 << 44, root: Some(below) };
        assert_eq!(ChunkMap::leaf_count::<CodecError>(&map, |h| Ok(store[&h].clone())), Ok(1 << 24));
        let (mut asked, mut leaves) = (0, 0);
        let ended = ChunkMap::from_tree(&map, |hash| {
            asked += 1;
            leaves += usize::from(hash == NodeHash::of(&leaf));
            if asked > 100 {
                Err(CodecError::NotCanonical { what: "enough" })
            } else {
                Ok(store[&hash].clone())
            }
        });
        assert_eq!(ended, Err(CodecError::NotCanonical { what: "enough" }));
        // Leaves are reached at once, not after all that is above them was gathered.
        assert_eq!(leaves, 98);
    }

    #[test]
    fn a_block_beyond_the_disk_is_refused() {
        let map = ChunkMap {
            block_size_bytes: 4096,
            disk_size_bytes: 4096 * 1000,
            blocks: vec![(999, Block::Zero)],
        };
        let (mut name, nodes) = map.to_tree();
        let store: HashMap<_, _> = nodes.into_iter().collect();
        name.disk_size_bytes = 4096 * 999;
        assert!(ChunkMap::from_tree::<CodecError>(&name, |h| Ok(store[&h].clone())).is_err());
    }
}
