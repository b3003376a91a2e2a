//! The EFI system partition: every file of the set below `boot/efi`, plus one generated file that
//! tells the boot loader which root file system to boot and with which command line.
//!
//! The FAT file system itself is made with a marker in every cluster of a file's content. Where
//! the markers came to lie is where content belongs: metadata is part of the plan, content comes
//! from packs like any other.

use std::collections::HashMap;
use std::io::{self, Cursor, Read, Seek, SeekFrom, Write};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};

use crate::component::DiskParameters;
use crate::component::manifest::show;
use crate::component::tree::{Node, NodeKind, Tree};

use super::error::ComposeError;
use super::plan::{Extent, Partition};

/// What is below here goes onto the EFI system partition.
const MOUNT: &[u8] = b"boot/efi/";
/// The generated file.
pub const ROOT_CONFIG: &str = "EFI/cicada/root.cfg";
const CLUSTER_BYTES: u32 = 4096;
const SIZE_BYTES_MIN: u64 = 16 << 20;

/// Nodes of the system partition, and all others.
pub fn split(tree: &Tree) -> (Vec<&Node>, Vec<&Node>) {
    tree.nodes.iter().partition(|n| n.path.starts_with(MOUNT))
}

/// A size that holds the set's boot files with room for an update, a power of two from 16 MiB.
pub fn size_for(tree: &Tree) -> u64 {
    let content: u64 = split(tree)
        .0
        .iter()
        .map(|n| match &n.kind {
            NodeKind::File { size_bytes, .. } => *size_bytes,
            _ => u64::from(CLUSTER_BYTES),
        })
        .sum();
    (content * 2 + (2 << 20)).next_power_of_two().max(SIZE_BYTES_MIN)
}

pub fn layout(nodes: &[&Node], disk: &DiskParameters) -> Result<Partition, ComposeError> {
    let fail = |path: &str| {
        let path = path.to_owned();
        move |source| ComposeError::Esp { path, source }
    };
    let mut volume = Volume::new(disk.esp_size_bytes);
    let id = disk.esp_guid.as_bytes();
    let options = FormatVolumeOptions::new()
        .bytes_per_cluster(CLUSTER_BYTES)
        .volume_id(u32::from_le_bytes([id[0], id[1], id[2], id[3]]))
        .volume_label(*b"EFI        ");
    fatfs::format_volume(&mut volume, options).map_err(fail("the file system"))?;
    let mut out = Partition { metadata: Vec::new(), extents: Vec::new() };
    {
        let fs = FileSystem::new(&mut volume, FsOptions::new()).map_err(fail("the file system"))?;
        let root = fs.root_dir();
        let command_line = disk.kernel_command_line.replace('\'', "");
        let config =
            format!("set cicada_root_uuid={}\nset cicada_cmdline='{command_line}'\n", disk.filesystem_uuid);
        for dir in ["EFI", "EFI/cicada"] {
            root.create_dir(dir).map_err(fail(dir))?;
        }
        let mut file = root.create_file(ROOT_CONFIG).map_err(fail(ROOT_CONFIG))?;
        file.write_all(config.as_bytes()).map_err(fail(ROOT_CONFIG))?;
        drop(file);
        for (number, node) in nodes.iter().enumerate() {
            let name = show(&node.path);
            let path = std::str::from_utf8(&node.path[MOUNT.len()..])
                .map_err(|e| fail(&name)(io::Error::new(io::ErrorKind::InvalidInput, e)))?;
            match &node.kind {
                NodeKind::Directory => drop(root.create_dir(path).map_err(fail(&name))?),
                NodeKind::Literal(bytes) => {
                    root.create_file(path).and_then(|mut f| f.write_all(bytes)).map_err(fail(&name))?;
                }
                NodeKind::File { size_bytes, .. } => {
                    let mut file = root.create_file(path).map_err(fail(&name))?;
                    for cluster in 0..size_bytes.div_ceil(CLUSTER_BYTES.into()) {
                        let mut content = vec![
                            0;
                            (CLUSTER_BYTES as usize).min(
                                (size_bytes - cluster * u64::from(CLUSTER_BYTES)) as usize
                            )
                        ];
                        let marker = marker(number, cluster);
                        let len = content.len().min(marker.len());
                        content[..len].copy_from_slice(&marker[..len]);
                        file.write_all(&content).map_err(fail(&name))?;
                    }
                }
                _ => {
                    let why = io::Error::new(io::ErrorKind::Unsupported, "FAT has no links and no devices");
                    return Err(fail(&name)(why));
                }
            }
        }
    }
    out.extents = volume.take_marked(nodes);
    out.metadata = volume.into_regions();
    Ok(out)
}

const MARKER_BYTES: usize = 32;

/// Says, in a way nothing else does by chance, that a cluster of a file belongs here.
fn marker(number: usize, cluster: u64) -> [u8; MARKER_BYTES] {
    let seed = [b"cicada esp".as_slice(), &(number as u64).to_le_bytes(), &cluster.to_le_bytes()].concat();
    *blake3::hash(&seed).as_bytes()
}

/// A volume in memory.
struct Volume {
    cursor: Cursor<Vec<u8>>,
}

impl Volume {
    fn new(size_bytes: u64) -> Self {
        Self { cursor: Cursor::new(vec![0; size_bytes as usize]) }
    }

    /// Finds every marker, clears it, and says what belongs there.
    fn take_marked(&mut self, nodes: &[&Node]) -> Vec<Extent> {
        const SECTOR_BYTES: usize = 512;
        let mut places = HashMap::new();
        for (number, node) in nodes.iter().enumerate() {
            if let NodeKind::File { pack, offset_bytes, size_bytes, .. } = node.kind {
                for cluster in 0..size_bytes.div_ceil(CLUSTER_BYTES.into()) {
                    let at = cluster * u64::from(CLUSTER_BYTES);
                    // The last one may be too short for a whole marker.
                    let len = ((size_bytes - at) as usize).min(MARKER_BYTES);
                    let mut key = [0; MARKER_BYTES];
                    key[..len].copy_from_slice(&marker(number, cluster)[..len]);
                    places.insert(key, (pack, offset_bytes + at));
                }
            }
        }
        let mut extents = Vec::new();
        for (i, sector) in self.cursor.get_mut().chunks_mut(SECTOR_BYTES).enumerate() {
            let (head, _) = sector.split_at_mut(MARKER_BYTES);
            let Some((pack, pack_offset_bytes)) =
                <[u8; MARKER_BYTES]>::try_from(&*head).ok().and_then(|k| places.remove(&k))
            else {
                continue;
            };
            head.fill(0);
            extents.push(Extent {
                pack,
                pack_offset_bytes,
                image_offset_bytes: (i * SECTOR_BYTES) as u64,
                len_bytes: CLUSTER_BYTES.into(),
            });
        }
        extents
    }

    fn into_regions(self) -> Vec<(u64, Vec<u8>)> {
        const BLOCK: usize = 4096;
        let mut out: Vec<(u64, Vec<u8>)> = Vec::new();
        for (i, block) in self.cursor.into_inner().chunks(BLOCK).enumerate() {
            if block.iter().all(|b| *b == 0) {
                continue;
            }
            let at = (i * BLOCK) as u64;
            match out.last_mut() {
                Some((start, bytes)) if *start + bytes.len() as u64 == at => bytes.extend_from_slice(block),
                _ => out.push((at, block.to_vec())),
            }
        }
        out
    }
}

impl Read for Volume {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.cursor.read(buf)
    }
}

impl Write for Volume {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        // A cursor over a vector would grow; a volume has an end.
        let room = (self.cursor.get_ref().len() as u64).saturating_sub(self.cursor.position());
        let take = (buf.len() as u64).min(room) as usize;
        self.cursor.write(&buf[..take])
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Volume {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.cursor.seek(to)
    }
}
