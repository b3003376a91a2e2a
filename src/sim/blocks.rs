//! What a tool would send that cuts whole disks into blocks of one size, keeps each block once in every cloud, and
//! knows nothing of files: the list of the disk's blocks, and those that the target lacks, each compressed alone.
//! Its numbers were measured on disks that were installed one by one: `SIMULATION.md`.

/// Of packages that were not there yet: bytes of their blocks of 4 KiB, compressed, for a thousand bytes of package
/// files, which are compressed as a whole.
const BLOCKS_PERMILLE: u64 = 1630;
/// What a disk has that no other has, even one with the same packages: the file system's own blocks, and what
/// installing makes anew.
const ALONE_BYTES: u64 = 21_700_000;
/// The list, for a thousand bytes of package files: 32 bytes name a block.
const LIST_PERMILLE: u64 = 41;

/// Bytes that a disk's first pass takes. `missing` of the `needed` bytes of package files are of packages that no
/// disk brought to the target yet; of a disk that was there, what it has alone is mostly there still.
pub(super) fn sent(missing: u64, needed: u64, was_there: bool) -> u64 {
    let alone = if was_there { ALONE_BYTES / 20 } else { ALONE_BYTES };
    missing * BLOCKS_PERMILLE / 1000 + needed * LIST_PERMILLE / 1000 + alone
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_named_and_what_is_not_is_sent() {
        let packages = 80_000_000;
        let first = sent(packages, packages, false);
        assert!(first > packages * 3 / 2, "blocks are compressed alone: {first}");
        let same_packages = sent(0, packages, false);
        assert!(same_packages > ALONE_BYTES && same_packages < first / 4, "{same_packages}");
        let comes_home = sent(0, packages, true);
        assert!(comes_home < same_packages / 4, "{comes_home}");
    }
}
