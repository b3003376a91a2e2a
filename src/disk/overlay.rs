//! Writes root disks: qcow2 overlays with 128 KiB clusters of 4 KiB subclusters, so that a guest's
//! write of one page copies nothing around it.
//!
//! Blocks go straight to the file, mapping entries after their data. Reference counts are not
//! kept up to date meanwhile: the file carries qcow2's *dirty* bit from the first change to the
//! end of [`OverlayWriter::finish`], which tells every reader that they must be rebuilt, and QEMU
//! does so. Opening an overlay here always derives them anew from the mapping, which also frees
//! what a killed QEMU leaked. The same writes in the same order give the same file.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::error::io_error;
use super::qcow2::{COPIED, DIRTY, EXTENDED_L2, Entry, Header, MAGIC, OFFSET_MASK, Qcow2, VERSION, be_u64};
use super::user_data::{create_file, open_alone, punch_hole};
use super::{DiskError, ROOT_BLOCK_BYTES};
use crate::vm::spec::limit::DISK_BYTES;

const CLUSTER_BITS: u32 = 17;
const CLUSTER_BYTES: u64 = 1 << CLUSTER_BITS;
const BLOCK_BYTES: u64 = ROOT_BLOCK_BYTES as u64;
const BLOCKS_PER_CLUSTER: u64 = CLUSTER_BYTES / BLOCK_BYTES;
const ENTRY_BYTES: u64 = 16;
const ENTRIES_PER_TABLE: u64 = CLUSTER_BYTES / ENTRY_BYTES;
/// 16-bit reference counts, as QEMU makes them.
const REFCOUNT_ORDER: u32 = 4;
const REFCOUNTS_PER_BLOCK: u64 = CLUSTER_BYTES / 2;
/// One cluster of the refcount table is enough for a file of 128 TiB; QEMU makes no more either.
const REFCOUNT_TABLE_CLUSTERS_MAX: u32 = 8;

/// Layout of an empty overlay, in clusters; the same that QEMU chooses.
const REFCOUNT_TABLE_AT: u64 = 1;
const REFCOUNT_BLOCK_AT: u64 = 2;
const L1_AT: u64 = 3;

const HEADER_BYTES: u32 = 112;
const INCOMPATIBLE_AT: u64 = 72;
const BACKING_FORMAT_EXTENSION: u32 = 0xe279_2aca;
const BACKING_NAME_BYTES_MAX: usize = 1023;

/// Makes an empty overlay of `virtual_size_bytes` over the raw image `backing`, durably. Nothing is
/// replaced. `backing` must be absolute: QEMU reads other names as relative to the overlay, or as URLs.
pub fn create_overlay(path: &Path, backing: &Path, virtual_size_bytes: u64) -> Result<(), DiskError> {
    let wrong = |reason: &str| DiskError::WrongDisk { path: path.to_owned(), reason: reason.to_owned() };
    let name = backing.as_os_str().as_bytes();
    if !backing.is_absolute() || name.len() > BACKING_NAME_BYTES_MAX {
        return Err(wrong("its backing file needs an absolute path of at most 1023 bytes"));
    }
    if virtual_size_bytes > DISK_BYTES || !virtual_size_bytes.is_multiple_of(512) {
        return Err(wrong("its size must be a multiple of 512 bytes and at most 16 TiB"));
    }
    let header = encode_header(name, virtual_size_bytes);
    create_file(path, |file| {
        file.set_len((L1_AT + 1) * CLUSTER_BYTES)?;
        file.write_all_at(&header, 0)?;
        let refcount_block = REFCOUNT_BLOCK_AT * CLUSTER_BYTES;
        file.write_all_at(&refcount_block.to_be_bytes(), REFCOUNT_TABLE_AT * CLUSTER_BYTES)?;
        let counts: Vec<u8> = (0..=L1_AT).flat_map(|_| 1u16.to_be_bytes()).collect();
        file.write_all_at(&counts, refcount_block)
    })
}

/// Makes an overlay that no hypervisor runs larger, durably; what is new reads as zeros. One of that size stays
/// as it is.
pub fn grow_overlay(path: &Path, virtual_size_bytes: u64) -> Result<(), DiskError> {
    let wrong = |reason: String| DiskError::WrongDisk { path: path.to_owned(), reason };
    if virtual_size_bytes > DISK_BYTES || !virtual_size_bytes.is_multiple_of(512) {
        return Err(wrong("its size must be a multiple of 512 bytes and at most 16 TiB".into()));
    }
    let file = open_alone(path)?;
    let now = Qcow2::open(path)?.virtual_size_bytes();
    if now == virtual_size_bytes {
        return Ok(());
    }
    if now > virtual_size_bytes {
        return Err(wrong(format!("it has {now} bytes, which is more than {virtual_size_bytes}")));
    }
    let mut header = [0; HEADER_BYTES as usize];
    file.read_exact_at(&mut header, 0).map_err(io_error("read the header of", path))?;
    // The table of tables has a cluster, which is enough for the largest disk, as `create_overlay` makes it.
    let made_here = be_u64(&header, 40) == L1_AT * CLUSTER_BYTES
        && header[20..24] == CLUSTER_BITS.to_be_bytes()
        && be_u64(&header, INCOMPATIBLE_AT as usize) & EXTENDED_L2 != 0;
    let l1_entries = virtual_size_bytes.div_ceil(CLUSTER_BYTES * ENTRIES_PER_TABLE).max(1);
    if !made_here || l1_entries > CLUSTER_BYTES / 8 {
        return Err(wrong("it is laid out in another way than here".into()));
    }
    // Size, no encryption, entries: neighbours, and one write, so that it is the old disk or the new one.
    let mut sizes = Vec::with_capacity(16);
    sizes.extend(virtual_size_bytes.to_be_bytes());
    sizes.extend(0u32.to_be_bytes());
    sizes.extend((l1_entries as u32).to_be_bytes());
    file.write_all_at(&sizes, 24).and_then(|()| file.sync_all()).map_err(io_error("write", path))
}

fn encode_header(backing_name: &[u8], virtual_size_bytes: u64) -> Vec<u8> {
    let l1_entries = virtual_size_bytes.div_ceil(CLUSTER_BYTES * ENTRIES_PER_TABLE).max(1);
    // Extensions: the backing format, padded to 8 bytes, and the end mark.
    let backing_name_at = u64::from(HEADER_BYTES) + 16 + 8;
    let mut out = Vec::new();
    let u32 = |out: &mut Vec<u8>, v: u32| out.extend(v.to_be_bytes());
    let u64 = |out: &mut Vec<u8>, v: u64| out.extend(v.to_be_bytes());
    u32(&mut out, MAGIC);
    u32(&mut out, VERSION);
    u64(&mut out, backing_name_at);
    u32(&mut out, backing_name.len() as u32);
    u32(&mut out, CLUSTER_BITS);
    u64(&mut out, virtual_size_bytes);
    u32(&mut out, 0); // no encryption
    u32(&mut out, l1_entries as u32);
    u64(&mut out, L1_AT * CLUSTER_BYTES);
    u64(&mut out, REFCOUNT_TABLE_AT * CLUSTER_BYTES);
    u32(&mut out, 1); // clusters of the refcount table
    u32(&mut out, 0); // no snapshots
    u64(&mut out, 0);
    u64(&mut out, EXTENDED_L2); // incompatible features
    u64(&mut out, 0); // compatible features
    u64(&mut out, 0); // autoclear features
    u32(&mut out, REFCOUNT_ORDER);
    u32(&mut out, HEADER_BYTES);
    u64(&mut out, 0); // compression type and padding
    u32(&mut out, BACKING_FORMAT_EXTENSION);
    u32(&mut out, 3);
    out.extend(b"raw\0\0\0\0\0");
    u64(&mut out, 0); // end of extensions
    out.extend(backing_name);
    out
}

/// Applies blocks of 4 KiB to an overlay that no hypervisor runs.
#[derive(Debug)]
pub struct OverlayWriter {
    file: File,
    path: PathBuf,
    header: Header,
    /// Offsets of the L2 tables, 0 for none: 8 bytes for each GiB of disk.
    tables: Vec<u64>,
    /// The refcount table: offsets of its blocks, 0 for none.
    refcount_blocks: Vec<u64>,
    clusters: Clusters,
    /// Whether the file carries the dirty bit.
    dirty: bool,
}

impl OverlayWriter {
    /// Opens an overlay made here or by QEMU with the same options, or makes an empty one. Refuses
    /// one of another size or backing file.
    pub fn open_or_create(path: &Path, backing: &Path, virtual_size_bytes: u64) -> Result<Self, DiskError> {
        match create_overlay(path, backing, virtual_size_bytes) {
            Ok(()) | Err(DiskError::Exists { .. }) => {}
            Err(e) => return Err(e),
        }
        let file = open_alone(path)?;
        let image = Qcow2::open(path)?;
        let header = image.header().clone();
        check_same_disk(path, &header, backing, virtual_size_bytes)?;
        let Survey { tables, refcount_blocks, clusters } = survey(&image, &file, path)?;
        let (path, dirty) = (path.to_owned(), header.dirty);
        Ok(Self { file, path, header, tables, refcount_blocks, clusters, dirty })
    }

    /// Writes block `number`. The last block of a disk may be short.
    pub fn write_block(&mut self, number: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let len = self.block_len(number)?;
        if bytes.len() as u64 != len {
            let reason = format!("block {number} has {} bytes, not {len}", bytes.len());
            return Err(DiskError::WrongMap { path: self.path.clone(), reason });
        }
        self.mark_dirty()?;
        let (at, mut entry) = self.entry_for_writing(number)?;
        if entry.host_offset_bytes == 0 {
            entry.host_offset_bytes = self.clusters.take() * CLUSTER_BYTES;
        }
        let mut whole = [0; BLOCK_BYTES as usize];
        whole[..bytes.len()].copy_from_slice(bytes);
        self.write(&whole, entry.host_offset_bytes + number % BLOCKS_PER_CLUSTER * BLOCK_BYTES)?;
        entry.allocated |= bit(number);
        entry.zero &= !bit(number);
        self.write_entry(at, entry)
    }

    /// Makes block `number` read as zeros.
    pub fn write_zero(&mut self, number: u64) -> Result<(), DiskError> {
        self.block_len(number)?;
        self.mark_dirty()?;
        let (at, mut entry) = self.entry_for_writing(number)?;
        entry.zero |= bit(number);
        self.give_up(at, entry, number)
    }

    /// Makes block `number` read as the backing file again.
    pub fn discard(&mut self, number: u64) -> Result<(), DiskError> {
        self.block_len(number)?;
        let cluster = number / BLOCKS_PER_CLUSTER;
        if self.tables[(cluster / ENTRIES_PER_TABLE) as usize] == 0 {
            return Ok(());
        }
        self.mark_dirty()?;
        let (at, mut entry) = self.entry_for_writing(number)?;
        entry.zero &= !bit(number);
        self.give_up(at, entry, number)
    }

    /// Makes everything written so far durable and the file clean. More blocks may follow.
    pub fn finish(&mut self) -> Result<(), DiskError> {
        self.sync()?;
        if self.dirty {
            self.write_refcounts()?;
            self.sync()?;
            self.write(&self.incompatible(false), INCOMPATIBLE_AT)?;
            self.sync()?;
            self.dirty = false;
        }
        Ok(())
    }

    /// Stores an entry whose block no longer lies in the host cluster, and frees what that leaves unused.
    fn give_up(&mut self, at: u64, mut entry: Entry, number: u64) -> Result<(), DiskError> {
        let (host, was_allocated) = (entry.host_offset_bytes, entry.allocated & bit(number) != 0);
        entry.allocated &= !bit(number);
        if entry.allocated == 0 {
            entry.host_offset_bytes = 0;
        }
        self.write_entry(at, entry)?;
        if was_allocated {
            // To save room only: the entry no longer points there.
            let _ = punch_hole(&self.file, host + number % BLOCKS_PER_CLUSTER * BLOCK_BYTES, BLOCK_BYTES);
        }
        if host != 0 && entry.allocated == 0 {
            self.clusters.free(host / CLUSTER_BYTES);
        }
        Ok(())
    }

    /// The mapping entry of a block's cluster and where it lies; makes the table if there is none.
    fn entry_for_writing(&mut self, number: u64) -> Result<(u64, Entry), DiskError> {
        let cluster = number / BLOCKS_PER_CLUSTER;
        let slot = (cluster / ENTRIES_PER_TABLE) as usize;
        if self.tables[slot] == 0 {
            let table = self.clusters.take() * CLUSTER_BYTES;
            self.write(&vec![0; CLUSTER_BYTES as usize], table)?;
            self.write(&(table | COPIED).to_be_bytes(), self.header.l1_offset_bytes + 8 * slot as u64)?;
            self.tables[slot] = table;
        }
        let at = self.tables[slot] + cluster % ENTRIES_PER_TABLE * ENTRY_BYTES;
        let mut raw = [0; ENTRY_BYTES as usize];
        self.file.read_exact_at(&mut raw, at).map_err(io_error("read", &self.path))?;
        let raw = u128::from_be_bytes(raw);
        let entry = Entry {
            host_offset_bytes: (raw >> 64) as u64 & OFFSET_MASK,
            zero: (raw >> 32) as u32,
            allocated: raw as u32,
        };
        Ok((at, entry))
    }

    fn write_entry(&self, at: u64, entry: Entry) -> Result<(), DiskError> {
        let copied = if entry.host_offset_bytes == 0 { 0 } else { COPIED };
        let raw = u128::from(entry.host_offset_bytes | copied) << 64
            | u128::from(entry.zero) << 32
            | u128::from(entry.allocated);
        self.write(&raw.to_be_bytes(), at)
    }

    /// Writes all reference counts: one for each used cluster. Refcount blocks count themselves.
    fn write_refcounts(&mut self) -> Result<(), DiskError> {
        let table_at = self.header.refcount_table_offset_bytes;
        let mut slot = 0;
        // Taking a cluster for a block may lengthen the file, so its end is asked each time.
        while slot as u64 * REFCOUNTS_PER_BLOCK < self.clusters.end {
            match self.refcount_blocks.get(slot) {
                None => {
                    let reason = "the refcount table is too small for the file";
                    return Err(DiskError::Damaged {
                        path: self.path.clone(),
                        offset_bytes: table_at,
                        reason,
                    });
                }
                Some(0) => {
                    let block = self.clusters.take() * CLUSTER_BYTES;
                    self.write(&block.to_be_bytes(), table_at + 8 * slot as u64)?;
                    self.refcount_blocks[slot] = block;
                }
                Some(_) => {}
            }
            slot += 1;
        }
        for (slot, block) in (0..).zip(&self.refcount_blocks).filter(|(_, block)| **block != 0) {
            let clusters = slot * REFCOUNTS_PER_BLOCK..(slot + 1) * REFCOUNTS_PER_BLOCK;
            let counts: Vec<u8> =
                clusters.flat_map(|c| u16::from(self.clusters.is_used(c)).to_be_bytes()).collect();
            self.write(&counts, *block)?;
        }
        let end = self.clusters.end * CLUSTER_BYTES;
        self.file.set_len(end).map_err(io_error("set the length of", &self.path))
    }

    /// Before the first change: nobody may trust the reference counts from here on.
    fn mark_dirty(&mut self) -> Result<(), DiskError> {
        if !self.dirty {
            self.write(&self.incompatible(true), INCOMPATIBLE_AT)?;
            self.sync()?;
            self.dirty = true;
        }
        Ok(())
    }

    fn incompatible(&self, dirty: bool) -> [u8; 8] {
        (EXTENDED_L2 | if dirty { DIRTY } else { 0 }).to_be_bytes()
    }

    fn block_len(&self, number: u64) -> Result<u64, DiskError> {
        let size = self.header.virtual_size_bytes;
        match number.checked_mul(BLOCK_BYTES) {
            Some(offset) if offset < size => Ok(BLOCK_BYTES.min(size - offset)),
            _ => {
                let reason = format!("block {number} is beyond its end at {size}");
                Err(DiskError::WrongMap { path: self.path.clone(), reason })
            }
        }
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<(), DiskError> {
        self.file.write_all_at(bytes, at).map_err(io_error("write", &self.path))
    }

    fn sync(&self) -> Result<(), DiskError> {
        self.file.sync_all().map_err(io_error("sync", &self.path))
    }
}

fn bit(number: u64) -> u32 {
    1 << (number % BLOCKS_PER_CLUSTER)
}

fn check_same_disk(
    path: &Path,
    header: &Header,
    backing: &Path,
    virtual_size_bytes: u64,
) -> Result<(), DiskError> {
    let reason = if header.virtual_size_bytes != virtual_size_bytes {
        format!("it has {} bytes, not {virtual_size_bytes}", header.virtual_size_bytes)
    } else if header.backing_file.as_deref() != Some(backing) {
        let found = header.backing_file.as_deref().unwrap_or(Path::new("nothing"));
        format!("it lies over {}, not {}", found.display(), backing.display())
    } else if header.cluster_bits != CLUSTER_BITS
        || !header.extended_l2
        || header.refcount_order != REFCOUNT_ORDER
        || !(1..=REFCOUNT_TABLE_CLUSTERS_MAX).contains(&header.refcount_table_clusters)
    {
        "it has not 128 KiB clusters of 4 KiB subclusters".to_owned()
    } else if header.autoclear_features != 0 {
        "it has persistent bitmaps or other extras".to_owned()
    } else {
        return Ok(());
    };
    Err(DiskError::WrongDisk { path: path.to_owned(), reason })
}

/// What a file is made of.
struct Survey {
    tables: Vec<u64>,
    refcount_blocks: Vec<u64>,
    clusters: Clusters,
}

/// Finds which clusters of the file are used, from everything that points to one. Each may be used once.
fn survey(image: &Qcow2, file: &File, path: &Path) -> Result<Survey, DiskError> {
    let header = image.header();
    let len = file.metadata().map_err(io_error("stat", path))?.len();
    // All metadata is a small part of the data; a longer file is not what it seems to be.
    if len > header.virtual_size_bytes.saturating_mul(2).saturating_add(64 << 20) {
        return Err(image.damaged(0, "the file is far longer than its disk"));
    }
    let mut clusters = Clusters::new(len.div_ceil(CLUSTER_BYTES));
    let mut mark = |offset: u64| match clusters.mark(offset / CLUSTER_BYTES) {
        _ if !offset.is_multiple_of(CLUSTER_BYTES) => Err(image.damaged(offset, "a cluster is not aligned")),
        Marked::Fresh => Ok(()),
        Marked::Twice => Err(image.damaged(offset, "a cluster is used twice")),
        Marked::Beyond => Err(image.damaged(offset, "a cluster lies beyond the end of the file")),
    };
    mark(0)?;
    let l1_clusters = (8 * u64::from(header.l1_entries)).div_ceil(CLUSTER_BYTES);
    let refcount_table = header.refcount_table_offset_bytes;
    let refcount_table_clusters = u64::from(header.refcount_table_clusters);
    for (first, count) in [(header.l1_offset_bytes, l1_clusters), (refcount_table, refcount_table_clusters)] {
        for n in 0..count {
            mark(first.saturating_add(n * CLUSTER_BYTES))?;
        }
    }
    // Its clusters are marked, so it is no longer than the file.
    let mut raw = vec![0; (refcount_table_clusters * CLUSTER_BYTES) as usize];
    file.read_exact_at(&mut raw, refcount_table).map_err(io_error("read the refcount table of", path))?;
    let refcount_blocks: Vec<u64> = raw.chunks_exact(8).map(|slot| be_u64(slot, 0)).collect();
    for block in refcount_blocks.iter().filter(|block| **block != 0) {
        mark(*block)?;
    }
    let mut tables = Vec::new();
    for slot in 0..header.l1_entries_needed() {
        let table = image.l2_table(slot)?;
        if let Some(table) = table {
            mark(table)?;
            for entry in image.entries(table, 0, ENTRIES_PER_TABLE)? {
                if entry.host_offset_bytes != 0 {
                    mark(entry.host_offset_bytes)?;
                }
            }
        }
        tables.push(table.unwrap_or(0));
    }
    Ok(Survey { tables, refcount_blocks, clusters })
}

/// Used and free clusters of the file: a bit each.
#[derive(Debug)]
struct Clusters {
    words: Vec<u64>,
    /// One past the last cluster of the file.
    end: u64,
    /// No cluster below is free.
    first_maybe_free: u64,
}

enum Marked {
    Fresh,
    Twice,
    Beyond,
}

impl Clusters {
    fn new(end: u64) -> Self {
        Self { words: vec![0; end.div_ceil(64) as usize], end, first_maybe_free: 0 }
    }

    fn is_used(&self, cluster: u64) -> bool {
        cluster < self.end && self.words[(cluster / 64) as usize] >> (cluster % 64) & 1 == 1
    }

    fn mark(&mut self, cluster: u64) -> Marked {
        if cluster >= self.end {
            return Marked::Beyond;
        }
        if self.is_used(cluster) {
            return Marked::Twice;
        }
        self.words[(cluster / 64) as usize] |= 1 << (cluster % 64);
        Marked::Fresh
    }

    /// The lowest free cluster, used from now on; the file grows if there is none.
    fn take(&mut self) -> u64 {
        let from = (self.first_maybe_free / 64) as usize;
        let free = self.words[from.min(self.words.len())..].iter().position(|w| *w != u64::MAX);
        let cluster = match free {
            Some(n) => {
                let word = from + n;
                word as u64 * 64 + u64::from(self.words[word].trailing_ones())
            }
            None => self.words.len() as u64 * 64,
        };
        if cluster / 64 >= self.words.len() as u64 {
            self.words.push(0);
        }
        self.end = self.end.max(cluster + 1);
        self.words[(cluster / 64) as usize] |= 1 << (cluster % 64);
        self.first_maybe_free = cluster + 1;
        cluster
    }

    fn free(&mut self, cluster: u64) {
        if self.is_used(cluster) {
            self.words[(cluster / 64) as usize] &= !(1 << (cluster % 64));
            self.first_maybe_free = self.first_maybe_free.min(cluster);
        }
    }
}
