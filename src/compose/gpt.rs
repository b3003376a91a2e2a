//! The partition table (UEFI specification 2.10, section 5.3): protective MBR, primary and backup
//! GPT with the GUIDs the recipe states.

use std::ops::Range;

use uuid::{Uuid, uuid};

use crate::component::DiskParameters;

const SECTOR_BYTES: u64 = 512;
const ENTRY_COUNT: usize = 128;
const ENTRY_BYTES: usize = 128;
const TABLE_SECTORS: u64 = (ENTRY_COUNT * ENTRY_BYTES) as u64 / SECTOR_BYTES;
const EFI_SYSTEM: Uuid = uuid!("c12a7328-f81f-11d2-ba4b-00a0c93ec93b");
/// Linux file system data: the same on every architecture, and nothing mounts it unasked.
const LINUX: Uuid = uuid!("0fc63daf-8483-4772-8e79-3d69d8477de4");

/// Offset and bytes of the table's pieces. Ranges are in bytes, multiples of the sector size.
pub fn write(disk: &DiskParameters, esp: Range<u64>, root: Range<u64>) -> Vec<(u64, Vec<u8>)> {
    let sectors = disk.virtual_size_bytes / SECTOR_BYTES;
    let mut entries = vec![0u8; ENTRY_COUNT * ENTRY_BYTES];
    let partitions = [(EFI_SYSTEM, disk.esp_guid, esp, "EFI system"), (LINUX, disk.root_guid, root, "root")];
    for (slot, (kind, guid, range, name)) in entries.chunks_mut(ENTRY_BYTES).zip(partitions) {
        slot[..16].copy_from_slice(&kind.to_bytes_le());
        slot[16..32].copy_from_slice(&guid.to_bytes_le());
        slot[32..40].copy_from_slice(&(range.start / SECTOR_BYTES).to_le_bytes());
        slot[40..48].copy_from_slice(&(range.end / SECTOR_BYTES - 1).to_le_bytes());
        for (to, unit) in slot[56..].chunks_mut(2).zip(name.encode_utf16()) {
            to.copy_from_slice(&unit.to_le_bytes());
        }
    }
    let table_crc = crc32fast::hash(&entries);
    let last = sectors - 1;
    let backup_table = last - TABLE_SECTORS;
    let header = |own: u64, other: u64, table: u64| {
        let mut h = vec![0u8; SECTOR_BYTES as usize];
        h[..8].copy_from_slice(b"EFI PART");
        h[8..12].copy_from_slice(&0x0001_0000u32.to_le_bytes());
        h[12..16].copy_from_slice(&92u32.to_le_bytes());
        h[24..32].copy_from_slice(&own.to_le_bytes());
        h[32..40].copy_from_slice(&other.to_le_bytes());
        h[40..48].copy_from_slice(&(2 + TABLE_SECTORS).to_le_bytes());
        h[48..56].copy_from_slice(&(backup_table - 1).to_le_bytes());
        h[56..72].copy_from_slice(&disk.disk_guid.to_bytes_le());
        h[72..80].copy_from_slice(&table.to_le_bytes());
        h[80..84].copy_from_slice(&(ENTRY_COUNT as u32).to_le_bytes());
        h[84..88].copy_from_slice(&(ENTRY_BYTES as u32).to_le_bytes());
        h[88..92].copy_from_slice(&table_crc.to_le_bytes());
        let crc = crc32fast::hash(&h[..92]);
        h[16..20].copy_from_slice(&crc.to_le_bytes());
        h
    };
    let mut mbr = vec![0u8; SECTOR_BYTES as usize];
    mbr[446..462].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0, 0, 0, 0]);
    mbr[458..462].copy_from_slice(&u32::try_from(sectors - 1).unwrap_or(u32::MAX).to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    vec![
        (0, mbr),
        (SECTOR_BYTES, header(1, last, 2)),
        (2 * SECTOR_BYTES, entries.clone()),
        (backup_table * SECTOR_BYTES, entries),
        (last * SECTOR_BYTES, header(last, 1, backup_table)),
    ]
}
