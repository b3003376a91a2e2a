//! What a disk is: its partition table, how firmware starts from it, or the one file system on it; and
//! what files that are no disks are instead. Everything is read at fixed places and bounded.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::compose::ImageFormat;

use super::reader::Reader;
use super::whole;

/// Sizes of sectors a GPT may count in.
const SECTORS: [u64; 2] = [512, 4096];
/// Entries of a GPT that are looked at.
const ENTRIES_MAX: u64 = 128;
/// Type of an EFI system partition, as it lies on a disk.
const ESP: [u8; 16] =
    [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];
/// Type of GRUB's partition for starting a GPT disk by BIOS.
const BIOS_BOOT: [u8; 16] =
    [0x48, 0x61, 0x68, 0x21, 0x49, 0x64, 0x6f, 0x6e, 0x74, 0x4e, 0x65, 0x65, 0x64, 0x45, 0x46, 0x49];
/// Attribute of a GPT's partition that syslinux and its like start by BIOS.
const LEGACY_BOOTABLE: u64 = 1 << 2;
const MBR_ESP: u8 = 0xef;
const MBR_PROTECTIVE: u8 = 0xee;

/// Beginnings of files that are no disks, with where they begin, what they are and what to do.
const FOREIGN: &[(u64, &[u8], &str, &str)] = &[
    (0, b"\xfd7zXZ\0", "compressed by xz", "unpack it with 'unxz' first"),
    (0, b"\x1f\x8b", "compressed by gzip", "unpack it with 'gunzip' first"),
    (0, b"BZh", "compressed by bzip2", "unpack it with 'bunzip2' first"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it with 'unzstd' first"),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4", "unpack it with 'unlz4' first"),
    (0, b"PK\x03\x04", "a zip archive", "unpack it with 'unzip' and adopt the disk in it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it and adopt the disk in it"),
    (0, b"Rar!", "a RAR archive", "unpack it and adopt the disk in it"),
    (257, b"ustar", "a tar archive, as .ova files are", "unpack it with 'tar -xf' and adopt the disk in it"),
    (0, b"07070", "a cpio archive", "unpack it and adopt the disk in it"),
    (0, b"!<arch>\n", "a package or library", "name the disk itself"),
    (0, b"\xed\xab\xee\xdb", "a package", "name the disk itself"),
    (0, b"VMA\0", "a backup of Proxmox", "unpack it with 'vma extract' and adopt the disk in it"),
    (0, b"\x3a\xff\x26\xed", "a sparse image of Android", "unpack it with 'simg2img' first"),
    (
        0,
        b"QFI\xfb\0\0\0\x01",
        "a disk of the format qcow",
        "convert it with 'qemu-img convert -f qcow -O qcow2'",
    ),
    (0, b"MSWIM\0\0\0", "a Windows image (WIM)", "install it into a VM and adopt that one's disk"),
    (0, b"QED\0", "a disk of the format qed", "convert it with 'qemu-img convert -f qed -O qcow2'"),
    (
        0,
        b"WithoutFreeSpace",
        "a disk of Parallels",
        "convert it with 'qemu-img convert -f parallels -O qcow2'",
    ),
    (
        0,
        b"WithouFreSpacExt",
        "a disk of Parallels",
        "convert it with 'qemu-img convert -f parallels -O qcow2'",
    ),
    (0, b"COWD", "an old disk of VMware ESX", "convert it with 'qemu-img convert -f vmdk -O qcow2'"),
    (0, b"\x7fELF", "a program", "name the disk itself"),
    (0, b"%PDF", "a document", "name the disk itself"),
    (0, b"MZ", "a program for Windows or DOS", "name the disk itself"),
    (0x8001, b"CD001", "a CD image (ISO 9660)", "install from it and adopt the disk that makes"),
];

/// Extensions that promise a format, or something that is no disk.
const PROMISES: &[&str] = &[
    "qcow2", "qcow", "vmdk", "vhdx", "vhd", "vdi", "ova", "ovf", "qed", "xz", "gz", "bz2", "zst", "zip",
    "7z", "tar", "tgz", "iso",
];

/// What a disk was found to be.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Disk {
    /// For people: table, sectors, partitions, or the one file system; empty if there is nothing of its kind.
    pub what: String,
    /// Whether a partition table or a file system says that this is a disk. A boot sector alone does not: many
    /// files have its two bytes.
    pub is_known: bool,
    pub boots_bios: bool,
    pub boots_uefi: bool,
    /// The boot loader for UEFI that was found, or why none was.
    pub loader: Option<String>,
    /// Where the last partition or the file system ends, as far as it says.
    pub end_bytes: u64,
}

impl Disk {
    /// Notes the loader in the EFI system partition that begins at `start`.
    fn take_loader(&mut self, reader: &Reader<'_>, start: u64) -> io::Result<()> {
        let fill = |at: u64, buffer: &mut [u8]| reader.fill(start.saturating_add(at), buffer);
        self.loader = self.loader.take().or(super::fat::loader(&fill)?);
        Ok(())
    }

    /// How firmware starts it, in words.
    pub fn boots(&self) -> &'static str {
        match (self.boots_bios, self.boots_uefi) {
            (true, true) => "BIOS and UEFI",
            (true, false) => "BIOS",
            (false, true) => "UEFI",
            (false, false) => "nothing was found that firmware starts",
        }
    }
}

/// What a file is that is no disk, and what to do about it.
pub fn foreign(file: &File, len: u64) -> io::Result<Option<(String, String)>> {
    let reader = Reader { file, len };
    for (offset, magic, what, hint) in FOREIGN {
        if reader.has(*offset, magic)? {
            return Ok(Some(((*what).to_owned(), (*hint).to_owned())));
        }
    }
    // Disk images of macOS end with theirs.
    if len >= 512 && reader.has(len - 512, b"koly")? {
        return Ok(Some((
            "a disk image of macOS (DMG)".into(),
            "convert it with 'qemu-img convert -f dmg'".into(),
        )));
    }
    let first = reader.at::<512>(0)?;
    let first = &first[..len.min(512) as usize];
    let is_text = first.iter().all(|b| matches!(b, b'\t' | b'\n' | b'\r' | 0x20..=0x7e | 0x80..));
    if !first.is_empty()
        && is_text
        && str::from_utf8(first).map_or_else(|e| e.error_len().is_none(), |_| true)
    {
        let begin: String = String::from_utf8_lossy(first).trim().chars().take(30).collect();
        let what = format!("text, which begins '{}'", begin.escape_debug());
        return Ok(Some((what, "get the disk itself: this may be what a server said instead".into())));
    }
    Ok(None)
}

/// The format that a file's name promises and its content is not.
pub fn broken_promise(path: &Path, format: ImageFormat) -> Option<&'static str> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    let promised = PROMISES.iter().find(|p| **p == extension)?;
    (format == ImageFormat::Raw).then_some(*promised)
}

/// What the disk in `file` is.
pub fn disk(file: &File, len: u64) -> io::Result<Disk> {
    let reader = Reader { file, len };
    let sector = reader.at::<512>(0)?;
    let is_marked = sector[510..] == [0x55, 0xaa];
    let has_boot_code = is_marked && sector[..440].iter().any(|b| *b != 0);
    for size in SECTORS {
        if reader.has(size, b"EFI PART")? {
            return gpt(&reader, size, size, has_boot_code);
        }
    }
    let table = &sector[446..510];
    let is_table = is_marked && table.chunks_exact(16).all(|e| matches!(e[0], 0 | 0x80));
    let types: Vec<u8> = table.chunks_exact(16).map(|e| e[4]).filter(|t| is_table && *t != 0).collect();
    if types.iter().any(|t| *t != MBR_PROTECTIVE) {
        return mbr(&reader, table, has_boot_code);
    }
    if !types.is_empty() {
        // The table stands for a GPT, of which the copy at the end may be left; firmware takes that.
        for size in SECTORS {
            let last = (len / size).saturating_sub(1) * size;
            if reader.has(last, b"EFI PART")? {
                return gpt(&reader, size, last, has_boot_code);
            }
        }
        return Ok(Disk::default());
    }
    if let Some((what, end_bytes)) = whole::find(&reader)? {
        return Ok(Disk {
            what: format!("{what}, no partition table"),
            is_known: true,
            end_bytes,
            ..Disk::default()
        });
    }
    let what = if has_boot_code { "a boot sector, no partition table" } else { "" };
    Ok(Disk { what: what.into(), boots_bios: has_boot_code, ..Disk::default() })
}

/// A GPT whose header is at `at`.
fn gpt(reader: &Reader<'_>, sector_bytes: u64, at: u64, has_boot_code: bool) -> io::Result<Disk> {
    let (table, count) = (reader.le::<8>(at + 72)?, reader.le::<4>(at + 80)?);
    let size = reader.le::<4>(at + 84)?;
    let bytes = |sector: u64| sector.saturating_mul(sector_bytes);
    // The copy of the header is the last that belongs to the disk.
    let last = reader.le::<8>(at + 24)?.max(reader.le::<8>(at + 32)?);
    let mut disk = Disk { is_known: true, end_bytes: bytes(last.saturating_add(1)), ..Disk::default() };
    let mut partitions = 0;
    let (mut has_esp, mut is_bios_bootable) = (false, false);
    for number in 0..count.min(ENTRIES_MAX) {
        let entry = bytes(table).saturating_add(number.saturating_mul(size));
        let kind = reader.at::<16>(entry)?;
        if kind == [0; 16] {
            continue;
        }
        partitions += 1;
        let number_at = |at: u64| reader.le::<8>(entry.saturating_add(at));
        disk.end_bytes = disk.end_bytes.max(bytes(number_at(40)?.saturating_add(1)));
        is_bios_bootable |= kind == BIOS_BOOT || number_at(48)? & LEGACY_BOOTABLE != 0;
        if kind == ESP {
            has_esp = true;
            disk.take_loader(reader, bytes(number_at(32)?))?;
        }
    }
    disk.boots_uefi = has_esp;
    disk.boots_bios = is_bios_bootable && has_boot_code;
    disk.what =
        format!("GPT, sectors of {sector_bytes} bytes, {partitions} partitions{}", esp_text(has_esp, &disk));
    Ok(disk)
}

fn mbr(reader: &Reader<'_>, table: &[u8], has_boot_code: bool) -> io::Result<Disk> {
    let mut disk = Disk { is_known: true, boots_bios: has_boot_code, ..Disk::default() };
    let u32_at = |e: &[u8], at: usize| e[at..at + 4].iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
    let (mut partitions, mut has_esp) = (0, false);
    // The one that stands for a GPT may say more than there is.
    for entry in table.chunks_exact(16).filter(|e| e[4] != 0 && e[4] != MBR_PROTECTIVE) {
        partitions += 1;
        let start = u32_at(entry, 8) * 512;
        disk.end_bytes = disk.end_bytes.max(start + u32_at(entry, 12) * 512);
        if entry[4] == MBR_ESP {
            has_esp = true;
            disk.take_loader(reader, start)?;
        }
    }
    disk.boots_uefi = has_esp;
    disk.what = format!("MBR, sectors of 512 bytes, {partitions} partitions{}", esp_text(has_esp, &disk));
    Ok(disk)
}

fn esp_text(has_esp: bool, disk: &Disk) -> String {
    match (has_esp, &disk.loader) {
        (false, _) => String::new(),
        (true, Some(loader)) => format!(", EFI system partition with {loader}"),
        (true, None) => ", EFI system partition without a loader that firmware finds by itself".into(),
    }
}
