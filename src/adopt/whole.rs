//! What takes up a whole disk without a partition table: file systems and the like, and where each of
//! them says that it ends. A disk that is shorter was cut.

use std::io;

use super::reader::Reader;

const SECTOR_BYTES: u64 = 512;

/// Where it ends in bytes; 0 if it does not say.
type End = fn(&Reader<'_>) -> io::Result<u64>;

/// Where the magic is, what it is of, and how that tells its end.
const WHOLE: &[(u64, &[u8], &str, End)] = &[
    (1080, &[0x53, 0xef], "ext file system", ext),
    (0, b"XFSB", "XFS file system", |r| Ok(r.be::<8>(8)?.saturating_mul(r.be::<4>(4)?))),
    // Of this device, where the file system has several.
    (0x10040, b"_BHRfS_M", "btrfs file system", |r| r.le::<8>(0x100d1)),
    (SECTOR_BYTES, b"LABELONE", "LVM physical volume", |r| r.le::<8>(SECTOR_BYTES + r.le::<4>(532)? + 32)),
    (0, b"LUKS\xba\xbe", "LUKS encrypted disk", |_| Ok(0)),
    (4086, b"SWAPSPACE2", "swap space", |r| Ok((r.le::<4>(1028)? + 1) * 4096)),
    (0, b"hsqs", "squashfs file system", |r| r.le::<8>(40)),
    // The copy of its first sector lies behind the last it counts.
    (3, b"NTFS    ", "NTFS file system", |r| {
        Ok(r.le::<8>(40)?.saturating_add(1).saturating_mul(r.le::<2>(11)?))
    }),
    (3, b"EXFAT   ", "exFAT file system", |r| Ok(shifted(r.le::<8>(72)?, r.le::<1>(108)?))),
    (54, b"FAT", "FAT file system", fat),
    (82, b"FAT32", "FAT file system", fat),
    (4096, &[0xfc, 0x4e, 0x2b, 0xa9], "member of a Linux RAID", |r| {
        Ok(r.le::<8>(4224)?.saturating_add(r.le::<8>(4232)?).saturating_mul(SECTOR_BYTES))
    }),
    (1024, &[0x10, 0x20, 0xf5, 0xf2], "F2FS file system", |r| {
        Ok(shifted(r.le::<8>(1060)?, r.le::<4>(1040)?))
    }),
    (65588, b"ReIsEr", "ReiserFS file system", |r| Ok(r.le::<4>(65536)? * r.le::<2>(65580)?)),
];

/// What is on the disk, and where it ends.
pub fn find(reader: &Reader<'_>) -> io::Result<Option<(&'static str, u64)>> {
    for (offset, magic, what, end) in WHOLE {
        if reader.has(*offset, magic)? {
            return Ok(Some((what, end(reader)?)));
        }
    }
    Ok(None)
}

fn ext(reader: &Reader<'_>) -> io::Result<u64> {
    // Only with the feature of 64 bits do the upper halves count.
    let high = if reader.le::<4>(1120)? & 0x80 != 0 { reader.le::<4>(1360)? } else { 0 };
    Ok(shifted(high << 32 | reader.le::<4>(1028)?, reader.le::<4>(1048)?.saturating_add(10)))
}

fn fat(reader: &Reader<'_>) -> io::Result<u64> {
    let small = reader.le::<2>(19)?;
    let sectors = if small > 0 { small } else { reader.le::<4>(32)? };
    Ok(sectors * reader.le::<2>(11)?)
}

/// Blocks of a size that is given as a power of two, up to 64 KiB; 0 of one that is none.
fn shifted(count: u64, shift: u64) -> u64 {
    if shift <= 16 { count.saturating_mul(1 << shift) } else { 0 }
}
