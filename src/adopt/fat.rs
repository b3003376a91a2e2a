//! Looks into an EFI system partition for the loader that firmware starts where nothing else is noted.
//! Only as much of FAT as that needs; nothing is trusted, and no chain is followed for long.

use std::io;

/// The path every firmware tries, by machine.
const LOADERS: [(&[u8; 11], &str); 4] = [
    (b"BOOTX64 EFI", "EFI/BOOT/BOOTX64.EFI"),
    (b"BOOTAA64EFI", "EFI/BOOT/BOOTAA64.EFI"),
    (b"BOOTIA32EFI", "EFI/BOOT/BOOTIA32.EFI"),
    (b"BOOTARM EFI", "EFI/BOOT/BOOTARM.EFI"),
];
/// Clusters of one directory that are looked through.
const CLUSTERS_MAX: usize = 64;
const ENTRY_BYTES: usize = 32;
const ATTRIBUTE_DIRECTORY: u8 = 0x10;
const ATTRIBUTE_LONG_NAME: u8 = 0x0f;

/// Fills a buffer from an offset of the partition; zeros beyond its end.
type ReadAt<'a> = &'a dyn Fn(u64, &mut [u8]) -> io::Result<()>;

struct Fat<'a> {
    read: ReadAt<'a>,
    cluster_bytes: u64,
    table: u64,
    data: u64,
    /// Bits of an entry of the table.
    width: u64,
}

/// The loader that is there, `None` also where this is no FAT.
pub fn loader(read: ReadAt<'_>) -> io::Result<Option<String>> {
    let mut b = [0; 512];
    read(0, &mut b)?;
    let u16_at = |at: usize| u64::from(u16::from_le_bytes([b[at], b[at + 1]]));
    let u32_at = |at: usize| u16_at(at) | u16_at(at + 2) << 16;
    let (sector, per_cluster) = (u16_at(11), u64::from(b[13]));
    let is_fat = matches!(sector, 512 | 1024 | 2048 | 4096) && per_cluster.is_power_of_two() && b[16] > 0;
    if b[510..] != [0x55, 0xaa] || !is_fat {
        return Ok(None);
    }
    let fat_sectors = if u16_at(22) > 0 { u16_at(22) } else { u32_at(36) };
    let sectors = if u16_at(19) > 0 { u16_at(19) } else { u32_at(32) };
    let table = u16_at(14) * sector;
    let root = table.saturating_add(u64::from(b[16]) * fat_sectors * sector);
    let root_bytes = u16_at(17) * ENTRY_BYTES as u64;
    let data = root + root_bytes.next_multiple_of(sector);
    let cluster_bytes = sector * per_cluster;
    let clusters = (sectors * sector).saturating_sub(data) / cluster_bytes;
    let width = if clusters < 4085 {
        12
    } else if clusters < 65525 {
        16
    } else {
        32
    };
    let fat = Fat { read, cluster_bytes, table, data, width };
    let mut entries = if width == 32 {
        fat.directory(u32_at(44))?
    } else {
        let mut bytes = vec![0; root_bytes as usize];
        read(root, &mut bytes)?;
        bytes
    };
    for name in [b"EFI        ", b"BOOT       "] {
        let Some(cluster) = find(&entries, name, true) else { return Ok(None) };
        entries = fat.directory(cluster)?;
    }
    let found = LOADERS.iter().find(|(name, _)| find(&entries, name, false).is_some());
    Ok(found.map(|(_, path)| (*path).to_owned()))
}

impl Fat<'_> {
    fn directory(&self, mut cluster: u64) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        for _ in 0..CLUSTERS_MAX {
            if cluster < 2 || cluster >= self.end_mark() {
                break;
            }
            let begin = out.len();
            out.resize(begin + self.cluster_bytes as usize, 0);
            (self.read)(
                self.data.saturating_add((cluster - 2).saturating_mul(self.cluster_bytes)),
                &mut out[begin..],
            )?;
            cluster = self.next(cluster)?;
        }
        Ok(out)
    }

    fn end_mark(&self) -> u64 {
        match self.width {
            12 => 0xff7,
            16 => 0xfff7,
            _ => 0x0fff_fff7,
        }
    }

    fn next(&self, cluster: u64) -> io::Result<u64> {
        let mut bytes = [0; 4];
        (self.read)(self.table.saturating_add(cluster * self.width / 8), &mut bytes)?;
        let value = u64::from(u32::from_le_bytes(bytes));
        Ok(match self.width {
            12 if cluster % 2 == 1 => value >> 4 & 0xfff,
            12 => value & 0xfff,
            16 => value & 0xffff,
            _ => value & 0x0fff_ffff,
        })
    }
}

/// The first cluster of an entry with this short name.
fn find(entries: &[u8], name: &[u8; 11], is_directory: bool) -> Option<u64> {
    let mut all = entries.chunks_exact(ENTRY_BYTES).take_while(|e| e[0] != 0);
    let found = all.find(|e| {
        e[..11] == *name && e[11] != ATTRIBUTE_LONG_NAME && (e[11] & ATTRIBUTE_DIRECTORY != 0) == is_directory
    })?;
    let u16_at = |at: usize| u64::from(u16::from_le_bytes([found[at], found[at + 1]]));
    Some(u16_at(20) << 16 | u16_at(26))
}
