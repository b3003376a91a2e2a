//! The extent list of an adopted disk: which blocks of the disk lie where in which packs.
//! The byte format is specified in `repository/FORMAT.md`, section "Extent list".

use crate::types::codec::{CodecError, Reader, Writer};

/// Magic and version of an encoded extent list.
pub const MAGIC: &[u8; 8] = b"CICEXT\x00\x01";
/// The unit of an extent list. Changing it is a format break.
pub const BLOCK_BYTES: u64 = 4096;
/// More extents than this are refused.
pub const EXTENTS_MAX: u64 = 1 << 22;
/// The longest encoding: magic, disk size, count, and four varints an extent.
pub const ENCODED_BYTES_MAX: u64 = 8 + 8 + 10 + EXTENTS_MAX * 40;
/// The largest disk, as for a recipe.
const DISK_BYTES_MAX: u64 = super::recipe::VIRTUAL_SIZE_BYTES_MAX;
/// Name of the one entry of the component that carries the list, a file in its pack 0.
pub const ENTRY: &str = "extents";

/// A run of blocks that is the same on the disk and in a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockExtent {
    pub disk_block: u64,
    /// Number of the pack in the manifest that carries the list; never 0, where the list itself is.
    pub pack: u32,
    pub pack_block: u64,
    /// At least 1.
    pub blocks: u64,
}

/// The known part of a disk; everything no extent covers is zero.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExtentList {
    /// A multiple of 1 MiB.
    pub disk_size_bytes: u64,
    /// Ascending by `disk_block`, disjoint; neighbours on the disk are none in a pack.
    pub extents: Vec<BlockExtent>,
}

impl ExtentList {
    pub fn known_blocks(&self) -> u64 {
        self.extents.iter().map(|e| e.blocks).sum()
    }

    /// The canonical bytes. Only a list that [`ExtentList::check`] accepts decodes again.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::with_magic(MAGIC);
        w.u64(self.disk_size_bytes);
        w.varint(self.extents.len() as u64);
        let (mut disk_end, mut pack_end) = (0u64, 0u64);
        for e in &self.extents {
            w.varint(e.disk_block.wrapping_sub(disk_end));
            w.varint(e.blocks);
            w.varint(e.pack.into());
            w.varint_signed(e.pack_block.wrapping_sub(pack_end) as i64);
            disk_end = e.disk_block.wrapping_add(e.blocks);
            pack_end = e.pack_block.wrapping_add(e.blocks);
        }
        w.into_bytes()
    }

    /// Reads a stranger's list. `pack_size_bytes` are the plain sizes of the manifest's packs, in its order.
    pub fn decode(bytes: &[u8], pack_size_bytes: &[u64]) -> Result<Self, CodecError> {
        let mut r = Reader::with_magic(bytes, MAGIC, "extent list of version 1")?;
        let disk_size_bytes = r.u64("disk size")?;
        let count = r.count("extents", EXTENTS_MAX, 4)?;
        let mut extents: Vec<BlockExtent> = Vec::with_capacity(count);
        let (mut disk_end, mut pack_end) = (0u64, 0i64);
        let outside = || invalid("a run begins or ends beyond 2^52 blocks");
        for _ in 0..count {
            let gap = r.bounded("gap", DISK_BYTES_MAX)?;
            let blocks = r.bounded("blocks of a run", DISK_BYTES_MAX)?;
            let pack = r.bounded("pack number", u32::MAX.into())? as u32;
            let delta = r.varint_signed("pack block")?;
            let pack_block = pack_end.checked_add(delta).filter(|b| *b >= 0).ok_or_else(outside)?;
            let disk_block = disk_end.checked_add(gap).ok_or_else(outside)?;
            disk_end = disk_block.checked_add(blocks).ok_or_else(outside)?;
            pack_end = pack_block.checked_add(blocks as i64).ok_or_else(outside)?;
            extents.push(BlockExtent { disk_block, pack, pack_block: pack_block as u64, blocks });
        }
        r.end()?;
        let list = Self { disk_size_bytes, extents };
        list.check(pack_size_bytes)?;
        Ok(list)
    }

    /// Every rule that makes a list valid over packs of these plain sizes, named when broken.
    pub fn check(&self, pack_size_bytes: &[u64]) -> Result<(), CodecError> {
        if self.disk_size_bytes > DISK_BYTES_MAX || !self.disk_size_bytes.is_multiple_of(1 << 20) {
            return Err(invalid("the disk size is no multiple of 1 MiB up to 16 TiB"));
        }
        if self.extents.len() as u64 > EXTENTS_MAX {
            let value = self.extents.len() as u64;
            return Err(CodecError::TooLarge { what: "extents", value, limit: EXTENTS_MAX });
        }
        let disk_blocks = self.disk_size_bytes / BLOCK_BYTES;
        let mut last: Option<&BlockExtent> = None;
        for e in &self.extents {
            let size_bytes = pack_size_bytes.get(e.pack as usize).filter(|_| e.pack != 0);
            let Some(pack_blocks) = size_bytes.map(|s| s / BLOCK_BYTES) else {
                return Err(invalid("a run names a pack that the manifest does not have, or the list's own"));
            };
            if e.blocks == 0 {
                return Err(invalid("a run is empty"));
            }
            let ends_within =
                |begin: u64, end: u64| begin.checked_add(e.blocks).is_some_and(|last| last <= end);
            if !ends_within(e.disk_block, disk_blocks) {
                return Err(invalid("a run ends beyond the disk"));
            }
            if !ends_within(e.pack_block, pack_blocks) {
                return Err(invalid("a run ends beyond its pack"));
            }
            if let Some(last) = last {
                let disk_end = last.disk_block + last.blocks;
                if e.disk_block < disk_end {
                    return Err(invalid("runs overlap or are not in the order of the disk"));
                }
                if e.disk_block == disk_end
                    && e.pack == last.pack
                    && e.pack_block == last.pack_block + last.blocks
                {
                    return Err(CodecError::NotCanonical { what: "a run in two parts" });
                }
            }
            last = Some(e);
        }
        Ok(())
    }
}

fn invalid(rule: &str) -> CodecError {
    CodecError::Invalid { what: "extent list", rule: rule.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;
    /// Pack 0 holds the list.
    const PACKS: [u64; 3] = [4096, 64 * BLOCK_BYTES, 1024 * BLOCK_BYTES];

    fn run(disk_block: u64, pack: u32, pack_block: u64, blocks: u64) -> BlockExtent {
        BlockExtent { disk_block, pack, pack_block, blocks }
    }

    fn sample() -> ExtentList {
        let extents = vec![run(0, 2, 0, 1), run(1, 1, 63, 1), run(7, 1, 0, 63), run(70, 1, 0, 5)];
        ExtentList { disk_size_bytes: 8 * MIB, extents }
    }

    #[test]
    fn encodes_and_decodes_to_itself() {
        for list in [sample(), ExtentList { disk_size_bytes: MIB, extents: vec![] }] {
            let bytes = list.encode();
            assert_eq!(ExtentList::decode(&bytes, &PACKS).unwrap(), list);
            assert!(bytes.len() as u64 <= ENCODED_BYTES_MAX);
            for n in 0..bytes.len() {
                assert!(ExtentList::decode(&bytes[..n], &PACKS).is_err(), "{n}");
            }
            assert!(ExtentList::decode(&[bytes, vec![0]].concat(), &PACKS).is_err());
        }
    }

    #[test]
    fn lists_that_break_a_rule_are_refused() {
        type Spoil = fn(&mut ExtentList);
        let table: [(&str, Spoil); 11] = [
            ("size", |l| l.disk_size_bytes += 4096),
            ("huge disk", |l| l.disk_size_bytes = 1 << 50),
            ("small disk", |l| l.disk_size_bytes = 0),
            ("overlap", |l| l.extents[1].disk_block = 0),
            ("order", |l| l.extents.swap(1, 2)),
            ("empty", |l| l.extents[1].blocks = 0),
            ("beyond the pack", |l| l.extents[3].pack_block = 60),
            ("beyond the disk", |l| l.extents[3].disk_block = 2044),
            ("no such pack", |l| l.extents[0].pack = 3),
            ("the list's pack", |l| l.extents[1] = run(1, 0, 0, 1)),
            ("in two parts", |l| l.extents[3] = run(70, 1, 63, 1)),
        ];
        for (what, spoil) in table {
            let mut list = sample();
            spoil(&mut list);
            assert!(ExtentList::decode(&list.encode(), &PACKS).is_err(), "{what}");
        }
    }

    #[test]
    fn numbers_that_overflow_are_refused() {
        for (gap, blocks, delta) in
            [(u64::MAX, 1, 0), (0, u64::MAX, 0), (0, 1, i64::MIN), (0, 1, i64::MAX), (0, 1, -1)]
        {
            let mut w = Writer::with_magic(MAGIC);
            w.u64(MIB);
            w.varint(1);
            w.varint(gap);
            w.varint(blocks);
            w.varint(1);
            w.varint_signed(delta);
            assert!(ExtentList::decode(&w.into_bytes(), &PACKS).is_err(), "{gap} {blocks} {delta}");
        }
    }

    #[test]
    fn a_count_that_lies_allocates_nothing() {
        let mut w = Writer::with_magic(MAGIC);
        w.u64(MIB);
        w.varint(EXTENTS_MAX);
        let error = ExtentList::decode(&w.into_bytes(), &PACKS).unwrap_err();
        assert!(matches!(error, CodecError::Truncated { .. }), "{error}");
    }

    proptest! {
        #[test]
        fn mutated_lists_are_refused_or_canonical(at: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
            let mut bytes = sample().encode();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if byte % 4 == 0 {
                bytes.truncate(cut.index(bytes.len()) + 1);
            }
            if let Ok(list) = ExtentList::decode(&bytes, &PACKS) {
                prop_assert_eq!(list.encode(), bytes);
            }
        }

        #[test]
        fn any_valid_list_round_trips(runs in prop::collection::vec((0u64..20, 1u64..30, 1u32..3, 0u64..34), 0..50)) {
            let (mut at, mut extents) = (0, Vec::new());
            for (gap, blocks, pack, pack_block) in runs {
                // At least one block between them, so that none continues another.
                extents.push(run(at + gap, pack, pack_block, blocks));
                at += gap + blocks + 1;
            }
            let list = ExtentList { disk_size_bytes: 16 * MIB, extents };
            prop_assert_eq!(ExtentList::decode(&list.encode(), &PACKS).unwrap(), list);
        }
    }
}
