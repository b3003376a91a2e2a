//! A bounded, read-only reader of qcow2 version 3 (QEMU `docs/interop/qcow2.txt`), with extended
//! L2 entries.
//!
//! Nothing in the file is believed: every offset is checked against the file's length, no table is
//! held in memory whole, and whatever does not hold together is a [`DiskError::Damaged`].
//!
//! **Reading while QEMU writes.** QEMU keeps mapping tables in memory and writes them back when it
//! flushes, so a reader beside it sees an older disk, and bytes may change between two reads. That
//! is good enough for a first pass over a running VM: what is missed there is found after the VM
//! has stopped, by reading all again, or where the tables differ and the guest is known to have
//! written ([`super::Scan::root_again`]). Tables are read afresh at every access, the length of
//! the file is asked again before an offset is called wrong, and a torn entry is read once more.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::DiskError;
use super::error::io_error;
use super::image::read_padded_at;
use crate::vm::spec::limit::DISK_BYTES;

/// A qcow2 file opened for reading.
#[derive(Debug)]
pub struct Qcow2 {
    file: File,
    path: PathBuf,
    header: Header,
    /// As last asked; the file may have grown since.
    file_len_bytes: AtomicU64,
}

/// A stretch of the disk that is not taken from the backing file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    pub offset_bytes: u64,
    pub len_bytes: u64,
    pub state: RunState,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RunState {
    /// The bytes lie in the file, contiguously, from there on.
    Data {
        host_offset_bytes: u64,
    },
    Zero,
}

impl Qcow2 {
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        let file = File::open(path).map_err(io_error("open", path))?;
        let file_len_bytes = file.metadata().map_err(io_error("stat", path))?.len();
        let header = Header::read(&file, path, file_len_bytes)?;
        Ok(Self { file, path: path.to_owned(), header, file_len_bytes: AtomicU64::new(file_len_bytes) })
    }

    /// Size of the disk as the guest sees it.
    pub fn virtual_size_bytes(&self) -> u64 {
        self.header.virtual_size_bytes
    }

    /// The backing file as the header names it. It is never opened here.
    pub fn backing_file(&self) -> Option<&Path> {
        self.header.backing_file.as_deref()
    }

    /// What the overlay itself holds, ascending and coalesced. Ends after the first error.
    pub fn allocated(&self) -> impl Iterator<Item = Result<Run, DiskError>> + Send + '_ {
        Coalesced { pieces: Pieces::new(self), pending: None }
    }

    /// Fills `buf` with the disk's content at `offset_bytes`. What the overlay does not hold is
    /// asked from `below`, with its offset; beyond the end of the disk there are zeros.
    pub fn read_at(
        &self,
        offset_bytes: u64,
        buf: &mut [u8],
        mut below: impl FnMut(u64, &mut [u8]) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        let mut offset = offset_bytes;
        let mut rest = buf;
        while !rest.is_empty() {
            if offset >= self.header.virtual_size_bytes {
                rest.fill(0);
                return Ok(());
            }
            let cluster = offset >> self.header.cluster_bits;
            let (stretch, state) = self.stretch_at(self.entry_of(cluster)?, offset)?;
            let len = stretch.min(rest.len() as u64) as usize;
            let (part, tail) = rest.split_at_mut(len);
            match state {
                None => below(offset, part)?,
                Some(RunState::Zero) => part.fill(0),
                Some(RunState::Data { host_offset_bytes }) => {
                    read_padded_at(&self.file, part, host_offset_bytes)
                        .map_err(io_error("read", &self.path))?;
                }
            }
            rest = tail;
            offset += len as u64;
        }
        Ok(())
    }

    /// How far the state at `offset` reaches, within its cluster and the disk, and the state;
    /// `None` is the backing file's.
    fn stretch_at(&self, entry: Entry, offset: u64) -> Result<(u64, Option<RunState>), DiskError> {
        let h = &self.header;
        let within = offset & (h.cluster_bytes() - 1);
        let sub = (within / h.subcluster_bytes()) as u32;
        let (subs, held) = entry.stretch(sub, h.subclusters());
        let end =
            (u64::from(sub + subs) * h.subcluster_bytes()).min(h.virtual_size_bytes - (offset - within));
        let state = match held {
            Held::Below => None,
            Held::Zero => Some(RunState::Zero),
            Held::Data => {
                let host_offset_bytes = entry.host_offset_bytes + within;
                // The last cluster of a file may be cut short, one that begins beyond it may not.
                self.check_within(host_offset_bytes, 1, "a data cluster lies beyond the end of the file")?;
                Some(RunState::Data { host_offset_bytes })
            }
        };
        Ok((end - within, state))
    }

    /// The mapping of one cluster, read from the file.
    fn entry_of(&self, cluster: u64) -> Result<Entry, DiskError> {
        let per_table = self.header.entries_per_table();
        match self.l2_table(cluster / per_table)? {
            None => Ok(Entry::BELOW),
            Some(table) => self.entry_at(table + cluster % per_table * self.header.entry_bytes()),
        }
    }

    /// Where the L2 table of L1 entry `number` lies.
    pub(super) fn l2_table(&self, number: u64) -> Result<Option<u64>, DiskError> {
        let at = self.header.l1_offset_bytes + 8 * number;
        let mut raw = [0; 8];
        self.read_table(&mut raw, at)?;
        let raw = u64::from_be_bytes(raw);
        let table = raw & OFFSET_MASK;
        if raw & !(OFFSET_MASK | COPIED) != 0 || table & (self.header.cluster_bytes() - 1) != 0 {
            return Err(self.damaged(at, "an L1 entry has unknown bits or is not aligned"));
        }
        if table == 0 {
            return Ok(None);
        }
        self.check_within(table, self.header.cluster_bytes(), "an L2 table lies beyond the end of the file")?;
        Ok(Some(table))
    }

    fn entry_at(&self, at: u64) -> Result<Entry, DiskError> {
        let mut raw = [0; 16];
        let raw = &mut raw[..self.header.entry_bytes() as usize];
        self.read_table(raw, at)?;
        match self.parse(raw, at) {
            Ok(entry) => Ok(entry),
            // QEMU may have been in the middle of writing it.
            Err(_) => {
                self.read_table(raw, at)?;
                self.parse(raw, at)
            }
        }
    }

    /// Reads `count` entries of an L2 table from entry `first` on.
    pub(super) fn entries(&self, table: u64, first: u64, count: u64) -> Result<Vec<Entry>, DiskError> {
        let size = self.header.entry_bytes();
        let mut raw = vec![0; (count * size) as usize];
        let start = table + first * size;
        self.read_table(&mut raw, start)?;
        raw.chunks_exact(size as usize)
            .zip((start..).step_by(size as usize))
            .map(|(raw, at)| self.parse(raw, at).or_else(|_| self.entry_at(at)))
            .collect()
    }

    fn parse(&self, raw: &[u8], at: u64) -> Result<Entry, DiskError> {
        let descriptor = be_u64(raw, 0);
        if descriptor & COMPRESSED != 0 {
            return Err(DiskError::Unsupported { path: self.path.clone(), what: "compressed clusters" });
        }
        let zero_flag = if self.header.extended_l2 { 0 } else { ZERO };
        let host_offset_bytes = descriptor & OFFSET_MASK;
        if descriptor & !(OFFSET_MASK | COPIED | zero_flag) != 0
            || host_offset_bytes & (self.header.cluster_bytes() - 1) != 0
        {
            return Err(self.damaged(at, "an L2 entry has unknown bits or is not aligned"));
        }
        let (allocated, zero) = if self.header.extended_l2 {
            let bitmap = be_u64(raw, 8);
            (bitmap as u32, (bitmap >> 32) as u32)
        } else {
            let zero = descriptor & zero_flag != 0;
            (u32::from(host_offset_bytes != 0 && !zero), zero.into())
        };
        if allocated & zero != 0 || (allocated != 0 && host_offset_bytes == 0) {
            return Err(self.damaged(at, "the subcluster bitmap of an L2 entry contradicts itself"));
        }
        Ok(Entry { host_offset_bytes, allocated, zero })
    }

    fn read_table(&self, buf: &mut [u8], at: u64) -> Result<(), DiskError> {
        self.check_within(at, buf.len() as u64, "a table lies beyond the end of the file")?;
        self.file.read_exact_at(buf, at).map_err(io_error("read a table of", &self.path))
    }

    fn check_within(&self, at: u64, len: u64, reason: &'static str) -> Result<(), DiskError> {
        let end = at.checked_add(len).ok_or_else(|| self.damaged(at, reason))?;
        if end > self.file_len_bytes.load(Ordering::Relaxed) && end > self.measure()? {
            return Err(self.damaged(at, reason));
        }
        Ok(())
    }

    /// Asks the length of the file again.
    fn measure(&self) -> Result<u64, DiskError> {
        let len = self.file.metadata().map_err(io_error("stat", &self.path))?.len();
        self.file_len_bytes.store(len, Ordering::Relaxed);
        Ok(len)
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    pub(super) fn damaged(&self, offset_bytes: u64, reason: &'static str) -> DiskError {
        DiskError::Damaged { path: self.path.clone(), offset_bytes, reason }
    }
}

/// Bits of L1 and L2 entries.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
pub(super) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

pub(super) const MAGIC: u32 = 0x5146_49fb;
pub(super) const VERSION: u32 = 3;
/// Incompatible feature bits.
pub(super) const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
pub(super) const EXTENDED_L2: u64 = 1 << 4;
/// The header as of version 3, before the compression type.
const HEADER_BYTES_MIN: u64 = 104;
const BACKING_NAME_BYTES_MAX: u32 = 1023;
/// QEMU's own limit, `QCOW_MAX_L1_SIZE`.
const L1_BYTES_MAX: u64 = 32 << 20;
/// Entries of an L2 table read at once.
const SLICE_ENTRIES: u64 = 4096;

/// What a reader needs of the header, checked.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub cluster_bits: u32,
    pub virtual_size_bytes: u64,
    pub l1_offset_bytes: u64,
    pub l1_entries: u32,
    pub refcount_table_offset_bytes: u64,
    pub refcount_table_clusters: u32,
    pub refcount_order: u32,
    pub extended_l2: bool,
    pub dirty: bool,
    pub autoclear_features: u64,
    pub backing_file: Option<PathBuf>,
}

impl Header {
    fn read(file: &File, path: &Path, file_len_bytes: u64) -> Result<Self, DiskError> {
        let damaged =
            |offset_bytes, reason| DiskError::Damaged { path: path.to_owned(), offset_bytes, reason };
        let unsupported = |what| DiskError::Unsupported { path: path.to_owned(), what };
        if file_len_bytes < HEADER_BYTES_MIN {
            return Err(damaged(0, "too short for a qcow2 header"));
        }
        let mut raw = [0; HEADER_BYTES_MIN as usize];
        file.read_exact_at(&mut raw, 0).map_err(io_error("read the header of", path))?;
        if be_u32(&raw, 0) != MAGIC {
            return Err(damaged(0, "not a qcow2 file"));
        }
        if be_u32(&raw, 4) != VERSION {
            return Err(unsupported("a qcow2 version other than 3"));
        }
        let incompatible = be_u64(&raw, 72);
        for (met, what) in [
            (be_u32(&raw, 32) != 0, "encryption"),
            (be_u32(&raw, 60) != 0, "internal snapshots"),
            (incompatible & EXTERNAL_DATA != 0, "an external data file"),
            (
                incompatible & !(DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2) != 0,
                "unknown qcow2 features",
            ),
        ] {
            if met {
                return Err(unsupported(what));
            }
        }
        if incompatible & CORRUPT != 0 {
            return Err(damaged(72, "QEMU has marked it corrupt"));
        }
        let extended_l2 = incompatible & EXTENDED_L2 != 0;
        let cluster_bits = be_u32(&raw, 20);
        if !(if extended_l2 { 14 } else { 9 }..=21).contains(&cluster_bits) {
            return Err(damaged(20, "the cluster size is outside the limits"));
        }
        let mut header = Self {
            cluster_bits,
            virtual_size_bytes: be_u64(&raw, 24),
            l1_offset_bytes: be_u64(&raw, 40),
            l1_entries: be_u32(&raw, 36),
            refcount_table_offset_bytes: be_u64(&raw, 48),
            refcount_table_clusters: be_u32(&raw, 56),
            refcount_order: be_u32(&raw, 96),
            extended_l2,
            dirty: incompatible & DIRTY != 0,
            autoclear_features: be_u64(&raw, 88),
            backing_file: None,
        };
        if header.virtual_size_bytes > DISK_BYTES {
            return Err(unsupported("a disk of more than 16 TiB"));
        }
        let l1_bytes = 8 * u64::from(header.l1_entries);
        let l1_end = header.l1_offset_bytes.checked_add(l1_bytes);
        if header.l1_offset_bytes & (header.cluster_bytes() - 1) != 0
            || u64::from(header.l1_entries) < header.l1_entries_needed()
            || l1_bytes > L1_BYTES_MAX
            || l1_end.is_none_or(|end| end > file_len_bytes)
        {
            return Err(damaged(36, "the L1 table does not fit the disk or the file"));
        }
        header.backing_file = read_backing_name(file, path, &raw, header.cluster_bytes(), file_len_bytes)?;
        Ok(header)
    }

    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }
    /// Subclusters in a cluster; without extended L2 entries the cluster is its only one.
    fn subclusters(&self) -> u32 {
        if self.extended_l2 { 32 } else { 1 }
    }
    fn subcluster_bytes(&self) -> u64 {
        self.cluster_bytes() / u64::from(self.subclusters())
    }
    pub fn entry_bytes(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }
    pub fn entries_per_table(&self) -> u64 {
        self.cluster_bytes() / self.entry_bytes()
    }
    fn clusters(&self) -> u64 {
        self.virtual_size_bytes.div_ceil(self.cluster_bytes())
    }
    pub fn l1_entries_needed(&self) -> u64 {
        self.clusters().div_ceil(self.entries_per_table())
    }
}

fn read_backing_name(
    file: &File,
    path: &Path,
    raw: &[u8],
    cluster_bytes: u64,
    file_len_bytes: u64,
) -> Result<Option<PathBuf>, DiskError> {
    let (at, len) = (be_u64(raw, 8), be_u32(raw, 16));
    if at == 0 {
        return Ok(None);
    }
    let end = at.checked_add(len.into());
    if len > BACKING_NAME_BYTES_MAX || end.is_none_or(|end| end > cluster_bytes.min(file_len_bytes)) {
        let reason = "the name of the backing file is too long";
        return Err(DiskError::Damaged { path: path.to_owned(), offset_bytes: 8, reason });
    }
    let mut name = vec![0; len as usize];
    file.read_exact_at(&mut name, at).map_err(io_error("read the header of", path))?;
    Ok(Some(PathBuf::from(OsStr::from_bytes(&name))))
}

/// The mapping of one cluster. A plain L2 entry is one with a single subcluster.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    /// Zero: no host cluster.
    pub host_offset_bytes: u64,
    /// Bit n: subcluster n lies in the host cluster.
    pub allocated: u32,
    /// Bit n: subcluster n reads as zeros.
    pub zero: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    Below,
    Zero,
    Data,
}

impl Entry {
    const BELOW: Entry = Entry { host_offset_bytes: 0, allocated: 0, zero: 0 };

    fn held(&self, sub: u32) -> Held {
        if self.allocated >> sub & 1 == 1 {
            Held::Data
        } else if self.zero >> sub & 1 == 1 {
            Held::Zero
        } else {
            Held::Below
        }
    }

    /// How many subclusters from `sub` on are held alike, and how.
    fn stretch(&self, sub: u32, subclusters: u32) -> (u32, Held) {
        let held = self.held(sub);
        let alike = (sub..subclusters).take_while(|s| self.held(*s) == held).count();
        (alike as u32, held)
    }
}

/// Walks the mapping tables a slice at a time and yields runs that end at cluster borders at the latest.
struct Pieces<'a> {
    image: &'a Qcow2,
    slice: Vec<Entry>,
    /// Number of the slice's first cluster.
    slice_first: u64,
    offset: u64,
    /// Clusters with data met so far: without snapshots each has a host cluster to itself, so
    /// there cannot be more of them than the file has room for.
    data_clusters: u64,
}

impl<'a> Pieces<'a> {
    fn new(image: &'a Qcow2) -> Self {
        Self { image, slice: Vec::new(), slice_first: 0, offset: 0, data_clusters: 0 }
    }

    fn step(&mut self) -> Result<Option<Run>, DiskError> {
        let h = &self.image.header;
        while self.offset < h.virtual_size_bytes {
            let cluster = self.offset >> h.cluster_bits;
            let Some(entry) = self.entry(cluster)? else {
                // No L2 table: go on where the next one begins.
                let next = (cluster / h.entries_per_table() + 1) * h.entries_per_table();
                self.offset = next << h.cluster_bits;
                continue;
            };
            if entry.allocated != 0 && self.offset & (h.cluster_bytes() - 1) == 0 {
                self.count_data_cluster(cluster)?;
            }
            let offset_bytes = self.offset;
            let (len_bytes, state) = self.image.stretch_at(entry, offset_bytes)?;
            self.offset += len_bytes;
            if let Some(state) = state {
                return Ok(Some(Run { offset_bytes, len_bytes, state }));
            }
        }
        Ok(None)
    }

    fn entry(&mut self, cluster: u64) -> Result<Option<Entry>, DiskError> {
        let h = &self.image.header;
        if cluster < self.slice_first || cluster >= self.slice_first + self.slice.len() as u64 {
            let Some(table) = self.image.l2_table(cluster / h.entries_per_table())? else { return Ok(None) };
            let first = cluster % h.entries_per_table();
            let count = SLICE_ENTRIES.min(h.entries_per_table() - first).min(h.clusters() - cluster);
            self.slice = self.image.entries(table, first, count)?;
            self.slice_first = cluster;
        }
        Ok(Some(self.slice[(cluster - self.slice_first) as usize]))
    }

    fn count_data_cluster(&mut self, cluster: u64) -> Result<(), DiskError> {
        self.data_clusters += 1;
        let bits = self.image.header.cluster_bits;
        if self.data_clusters > self.image.file_len_bytes.load(Ordering::Relaxed) >> bits
            && self.data_clusters > self.image.measure()?.div_ceil(1 << bits)
        {
            return Err(self.image.damaged(cluster << bits, "more clusters are mapped than the file holds"));
        }
        Ok(())
    }
}

/// Joins what [`Pieces`] yields.
struct Coalesced<'a> {
    pieces: Pieces<'a>,
    pending: Option<Run>,
}

impl Iterator for Coalesced<'_> {
    type Item = Result<Run, DiskError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.pieces.step() {
                Err(e) => {
                    self.pieces.offset = u64::MAX;
                    self.pending = None;
                    return Some(Err(e));
                }
                Ok(None) => return self.pending.take().map(Ok),
                Ok(Some(run)) => match &mut self.pending {
                    Some(pending) if continues(pending, &run) => pending.len_bytes += run.len_bytes,
                    pending => {
                        if let Some(done) = pending.replace(run) {
                            return Some(Ok(done));
                        }
                    }
                },
            }
        }
    }
}

fn continues(a: &Run, b: &Run) -> bool {
    a.offset_bytes + a.len_bytes == b.offset_bytes
        && match (a.state, b.state) {
            (RunState::Zero, RunState::Zero) => true,
            (RunState::Data { host_offset_bytes: first }, RunState::Data { host_offset_bytes: second }) => {
                first + a.len_bytes == second
            }
            _ => false,
        }
}

pub(super) fn be_u32(raw: &[u8], at: usize) -> u32 {
    raw[at..at + 4].iter().fold(0, |v, b| v << 8 | u32::from(*b))
}

pub(super) fn be_u64(raw: &[u8], at: usize) -> u64 {
    raw[at..at + 8].iter().fold(0, |v, b| v << 8 | u64::from(*b))
}
