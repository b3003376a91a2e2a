//! The EFI system partition: every file of the set below `boot/efi`, plus one generated file that
//! tells the boot loader which root file system to start and with which command line.
//!
//! The FAT file system itself is made with a marker in every cluster of a file's content. Where
//! the markers came to lie is where content belongs: metadata is part of the plan, content comes
//! from packs like any other.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, Read, Seek, SeekFrom, Write};

use fatfs::{Date, DateTime, Dir, FileSystem, FormatVolumeOptions, FsOptions, Time, TimeProvider};

use crate::component::DiskParameters;
use crate::component::manifest::show;
use crate::component::tree::{Node, NodeKind, Tree};

use super::error::ComposeError;
use super::plan::{Extent, Partition};

/// What is below here goes onto the EFI system partition.
const MOUNT: &[u8] = b"boot/efi/";
/// The generated file.
const ROOT_CONFIG: &str = "EFI/cicada/root.cfg";
const CLUSTER_BYTES: u64 = 4096;
const SECTOR_BYTES: usize = 512;
/// The smallest that is FAT16, which every firmware reads.
const SIZE_BYTES_MIN: u64 = 32 << 20;
/// A recipe that wants more was not made by this composer.
const SIZE_BYTES_MAX: u64 = 1 << 30;

/// Nodes of the system partition, and all others.
pub fn split(tree: &Tree) -> (Vec<&Node>, Vec<&Node>) {
    tree.nodes.iter().partition(|n| n.path.starts_with(MOUNT))
}

/// A size that holds the set's boot files with room for an update, a power of two from 32 MiB.
pub fn size_for(tree: &Tree) -> u64 {
    let content: u64 = split(tree)
        .0
        .iter()
        .map(|n| match &n.kind {
            NodeKind::File { size_bytes, .. } => *size_bytes,
            _ => CLUSTER_BYTES,
        })
        .sum();
    (content.saturating_mul(2).saturating_add(2 << 20)).next_power_of_two().max(SIZE_BYTES_MIN)
}

/// Lays out the partition.
pub fn layout(nodes: &[&Node], disk: &DiskParameters) -> Result<Partition, ComposeError> {
    let whole = |source| ComposeError::Esp { path: "the file system".into(), source };
    if disk.esp_size_bytes > SIZE_BYTES_MAX {
        return Err(whole(refusal("it would be larger than 1 GiB")));
    }
    let mut volume = Volume { sectors: BTreeMap::new(), size_bytes: disk.esp_size_bytes, position: 0 };
    let id = disk.esp_guid.as_bytes();
    let options = FormatVolumeOptions::new()
        .bytes_per_cluster(CLUSTER_BYTES as u32)
        .volume_id(u32::from_le_bytes([id[0], id[1], id[2], id[3]]))
        .volume_label(*b"EFI        ");
    fatfs::format_volume(&mut volume, options).map_err(whole)?;
    {
        let fs = FileSystem::new(&mut volume, FsOptions::new().time_provider(&EPOCH)).map_err(whole)?;
        let mut files = Files { root: fs.root_dir(), taken: HashSet::new() };
        let generated = |source| ComposeError::Esp { path: ROOT_CONFIG.into(), source };
        files.make_parents(ROOT_CONFIG).map_err(generated)?;
        files.write(ROOT_CONFIG, root_config(disk).as_bytes()).map_err(generated)?;
        for (number, node) in nodes.iter().enumerate() {
            let refused = |source| ComposeError::Esp { path: show(&node.path), source };
            files.add(number, node).map_err(refused)?;
        }
    }
    volume.repair_dot_entries();
    let extents = volume.take_marked(nodes);
    Ok(Partition { metadata: volume.into_regions(), extents })
}

/// What the boot loader's own configuration sources.
fn root_config(disk: &DiskParameters) -> String {
    // Within GRUB's double quotes these three have a meaning.
    let mut command_line = String::new();
    for c in disk.kernel_command_line.chars() {
        if matches!(c, '"' | '\\' | '$') {
            command_line.push('\\');
        }
        command_line.push(c);
    }
    format!("set cicada_root_uuid={}\nset cicada_cmdline=\"{command_line}\"\n", disk.filesystem_uuid)
}

/// The time of everything on the partition, that of [`crate::component::recipe::EPOCH_S`].
#[derive(Debug)]
struct Epoch;

static EPOCH: Epoch = Epoch;

impl TimeProvider for Epoch {
    fn get_current_date(&self) -> Date {
        Date { year: 2023, month: 11, day: 14 }
    }
    fn get_current_date_time(&self) -> DateTime {
        DateTime { date: self.get_current_date(), time: Time { hour: 22, min: 13, sec: 20, millis: 0 } }
    }
}

struct Files<'a, 'v> {
    root: Dir<'a, &'v mut Volume>,
    /// Upper-case paths of files: names on FAT differ by more than case.
    taken: HashSet<String>,
}

impl<'a, 'v> Files<'a, 'v> {
    fn add(&mut self, number: usize, node: &Node) -> io::Result<()> {
        let path = str::from_utf8(&node.path[MOUNT.len()..]).map_err(|_| refusal("its name is not UTF-8"))?;
        if !node.xattrs.is_empty() {
            return Err(refusal("FAT has no extended attributes"));
        }
        match &node.kind {
            NodeKind::Directory => self.root.create_dir(path).map(drop),
            NodeKind::Literal(bytes) => self.write(path, bytes),
            NodeKind::File { size_bytes, .. } => self.write_marked(path, number, *size_bytes),
            _ => Err(refusal("FAT has no links and no devices")),
        }
    }

    fn make_parents(&self, path: &str) -> io::Result<()> {
        for (at, _) in path.match_indices('/') {
            self.root.create_dir(&path[..at])?;
        }
        Ok(())
    }

    fn write(&mut self, path: &str, bytes: &[u8]) -> io::Result<()> {
        self.create(path)?.write_all(bytes)
    }

    fn write_marked(&mut self, path: &str, number: usize, size_bytes: u64) -> io::Result<()> {
        let mut file = self.create(path)?;
        for cluster in 0..size_bytes.div_ceil(CLUSTER_BYTES) {
            let mut content = [0; CLUSTER_BYTES as usize];
            content[..MARKER_BYTES].copy_from_slice(&marker(number, cluster));
            file.write_all(&content)?;
        }
        // The last cluster had to be whole for its marker.
        if !size_bytes.is_multiple_of(CLUSTER_BYTES) {
            file.seek(SeekFrom::Start(size_bytes))?;
            file.truncate()?;
        }
        Ok(())
    }

    fn create(&mut self, path: &str) -> io::Result<fatfs::File<'a, &'v mut Volume>> {
        if !self.taken.insert(path.to_uppercase()) {
            return Err(refusal("another file has this name, case aside"));
        }
        self.root.create_file(path)
    }
}

fn refusal(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, reason)
}

const MARKER_BYTES: usize = 32;
type Marker = [u8; MARKER_BYTES];

/// Says, in a way nothing else does by chance, that a cluster of a file belongs here.
fn marker(number: usize, cluster: u64) -> Marker {
    let seed = [b"cicada esp".as_slice(), &(number as u64).to_le_bytes(), &cluster.to_le_bytes()].concat();
    *blake3::hash(&seed).as_bytes()
}

/// A volume in memory that holds no zeros.
struct Volume {
    sectors: BTreeMap<u64, [u8; SECTOR_BYTES]>,
    size_bytes: u64,
    position: u64,
}

impl Volume {
    /// Finds every marker, clears it, and says what belongs there.
    fn take_marked(&mut self, nodes: &[&Node]) -> Vec<Extent> {
        let mut places = HashMap::new();
        for (number, node) in nodes.iter().enumerate() {
            if let NodeKind::File { pack, offset_bytes, size_bytes, .. } = node.kind {
                for cluster in 0..size_bytes.div_ceil(CLUSTER_BYTES) {
                    places.insert(marker(number, cluster), (pack, offset_bytes + cluster * CLUSTER_BYTES));
                }
            }
        }
        let mut extents = Vec::new();
        for (number, sector) in &mut self.sectors {
            let Some((head, _)) = sector.split_first_chunk_mut::<MARKER_BYTES>() else { continue };
            let Some((pack, pack_offset_bytes)) = places.remove(&*head) else { continue };
            head.fill(0);
            let image_offset_bytes = number * SECTOR_BYTES as u64;
            extents.push(Extent { pack, pack_offset_bytes, image_offset_bytes, len_bytes: CLUSTER_BYTES });
        }
        extents
    }

    /// `fatfs` 0.3 gives `.` and `..` long names, which the FAT specification forbids and checkers call
    /// damage. They are the first four slots of a directory.
    fn repair_dot_entries(&mut self) {
        const SLOT_BYTES: usize = 32;
        const LONG_NAME: u8 = 0x0f;
        const FREE: u8 = 0xe5;
        for sector in self.sectors.values_mut() {
            let [long_a, dot, long_b, dot_dot, ..] = sector.as_chunks_mut::<SLOT_BYTES>().0 else { continue };
            let are_names = dot.starts_with(b".          ") && dot_dot.starts_with(b"..         ");
            if are_names && long_a[11] == LONG_NAME && long_b[11] == LONG_NAME {
                (*long_a, *dot) = (*dot, *dot_dot);
                (long_b[0], dot_dot[0]) = (FREE, FREE);
            }
        }
    }

    fn into_regions(self) -> Vec<(u64, Vec<u8>)> {
        let mut out: Vec<(u64, Vec<u8>)> = Vec::new();
        for (number, sector) in self.sectors.into_iter().filter(|(_, s)| s.iter().any(|b| *b != 0)) {
            let at = number * SECTOR_BYTES as u64;
            match out.last_mut() {
                Some((start, bytes)) if *start + bytes.len() as u64 == at => bytes.extend_from_slice(&sector),
                _ => out.push((at, sector.to_vec())),
            }
        }
        out
    }

    /// The part of the sector at the position that `len` bytes from there reach.
    fn step(&self, len: usize) -> (u64, std::ops::Range<usize>) {
        let within = (self.position % SECTOR_BYTES as u64) as usize;
        let room = self.size_bytes.saturating_sub(self.position).min((SECTOR_BYTES - within) as u64);
        (self.position / SECTOR_BYTES as u64, within..within + len.min(room as usize))
    }
}

impl Read for Volume {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let (number, range) = self.step(buf.len());
        let room = &mut buf[..range.len()];
        match self.sectors.get(&number) {
            Some(sector) => room.copy_from_slice(&sector[range.clone()]),
            None => room.fill(0),
        }
        self.position += range.len() as u64;
        Ok(range.len())
    }
}

impl Write for Volume {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let (number, range) = self.step(buf.len());
        let bytes = &buf[..range.len()];
        if self.sectors.contains_key(&number) || bytes.iter().any(|b| *b != 0) {
            let sector = self.sectors.entry(number).or_insert([0; SECTOR_BYTES]);
            sector[range.clone()].copy_from_slice(bytes);
        }
        self.position += range.len() as u64;
        Ok(range.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Volume {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(n) => Some(n),
            SeekFrom::Current(n) => self.position.checked_add_signed(n),
            SeekFrom::End(n) => self.size_bytes.checked_add_signed(n),
        };
        self.position = target.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.position)
    }
}
