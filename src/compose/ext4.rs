//! The root file system, laid out by `mkext4` behind this small interface. Its version is pinned:
//! the bytes it gives are part of the composer's format.

use std::collections::HashMap;
use std::io;

use mkext4::{FsBuilder, InodeCount, InodeHandle, Options, ROOT, RegionSink, SpecialKind};

use crate::component::DiskParameters;
use crate::component::manifest::{Meta, parent_of, show};
use crate::component::tree::{Node, NodeKind};
use crate::sparse::is_zero;

use super::error::ComposeError;
use super::plan::{Extent, Partition};

const BLOCK_BYTES: u64 = 4096;
const LABEL: &str = "root";
const LOST_AND_FOUND: &[u8] = b"lost+found";
const RESERVED_PERCENT: u8 = 1;

/// Seconds since 1970 that an inode can hold.
const MTIME_S: std::ops::Range<i64> = -(1 << 31)..(1 << 34) - (1 << 31);
/// Extended attributes of one inode, with a header each, beside which the block has one of its own.
const XATTRS_BYTES_MAX: usize = 4096 - 32 - 4;
const XATTR_HEADER_BYTES: usize = 16;
/// One inode for this many bytes, unless the tree needs more.
const BYTES_PER_INODE: u64 = 16384;

/// Those before the first of a file, lost+found among them.
const RESERVED_INODES: u64 = 11;

/// Lays out the file system; `None` when it does not fit into `size_bytes`.
pub fn layout(
    nodes: &[&Node],
    disk: &DiskParameters,
    size_bytes: u64,
) -> Result<Option<Partition>, ComposeError> {
    if content_bytes(nodes) >= size_bytes {
        return Ok(None);
    }
    let mut options = Options::new(size_bytes, *disk.filesystem_uuid.as_bytes(), disk.epoch_s);
    let seed = disk.hash_seed.as_bytes();
    options.hash_seed = std::array::from_fn(|i| {
        u32::from_le_bytes([seed[4 * i], seed[4 * i + 1], seed[4 * i + 2], seed[4 * i + 3]])
    });
    options.label = Some(LABEL.into());
    options.reserved_percent = RESERVED_PERCENT;
    let inodes = (size_bytes / BYTES_PER_INODE).max(2 * nodes.len() as u64);
    options.inodes = InodeCount::Exact(u32::try_from(inodes).unwrap_or(u32::MAX));
    let mut builder = FsBuilder::new(options).map_err(ComposeError::FileSystem)?;
    let mut handles: HashMap<&[u8], InodeHandle> = HashMap::from([(&b""[..], ROOT)]);
    let mut links = Vec::new();
    for node in nodes {
        if node.path == LOST_AND_FOUND {
            check_lost_and_found(node, nodes)?;
            continue;
        }
        if let NodeKind::HardLink { target } = &node.kind {
            links.push((*node, target.as_slice()));
            continue;
        }
        let handle = declare(&mut builder, &handles, node, disk.epoch_s)
            .map_err(|source| layout_error(node, source))?;
        for (name, value) in &node.xattrs {
            builder.set_xattr(handle, name, value).map_err(|source| layout_error(node, source))?;
        }
        handles.insert(&node.path, handle);
    }
    for (node, target) in links {
        let (Some(parent), Some(target)) =
            (parent_of(&node.path).and_then(|p| handles.get(p)), handles.get(target))
        else {
            return Err(layout_error(node, invalid("a link without its file or directory")));
        };
        let linked = name_of(&node.path).and_then(|name| builder.hardlink(*parent, name, *target));
        linked.map_err(|source| layout_error(node, source))?;
    }
    let sealed = match builder.seal() {
        Ok(sealed) => sealed,
        // What can be wrong with a node was found above: now only room can be lacking.
        Err(_) if size_bytes < size_estimate(nodes) => return Ok(None),
        Err(e) => return Err(ComposeError::FileSystem(e)),
    };
    let mut out = Partition { metadata: Vec::new(), extents: Vec::new() };
    // The writer emits all metadata at once and is dropped before file data, which we place.
    drop(sealed.writer(Collect(&mut out.metadata)).map_err(ComposeError::FileSystem)?);
    for node in nodes {
        let Some(handle) = handles.get(node.path.as_slice()) else { continue };
        match &node.kind {
            NodeKind::File { pack, offset_bytes, .. } => {
                let mut at = *offset_bytes;
                for (image_offset_bytes, len) in sealed.extents(*handle) {
                    // Packs are padded with zeros, so whole blocks are copied.
                    let len_bytes = len.next_multiple_of(BLOCK_BYTES);
                    out.extents.push(Extent {
                        pack: *pack,
                        pack_offset_bytes: at,
                        image_offset_bytes,
                        len_bytes,
                    });
                    at += len_bytes;
                }
            }
            NodeKind::Literal(bytes) => {
                let mut rest = bytes.as_slice();
                for (offset, len) in sealed.extents(*handle) {
                    let (now, later) = rest.split_at((len as usize).min(rest.len()));
                    out.metadata.push((offset, now.to_vec()));
                    rest = later;
                }
            }
            _ => {}
        }
    }
    Ok(Some(out))
}

/// A size that is enough, with some room to live: content, directories, tables, journal.
pub fn size_estimate(nodes: &[&Node]) -> u64 {
    let used = content_bytes(nodes).saturating_add(nodes.len() as u64 * 2048);
    let used = used.saturating_add(used / 8).saturating_add(32 << 20);
    // Many small files: a group of blocks has a bitmap of one block for its inodes.
    let groups = (nodes.len() as u64 + RESERVED_INODES).div_ceil(8 * BLOCK_BYTES);
    used.max(groups * 8 * BLOCK_BYTES * BLOCK_BYTES)
}

/// Whole blocks of all files and directories.
fn content_bytes(nodes: &[&Node]) -> u64 {
    let bytes = |node: &Node| match &node.kind {
        NodeKind::File { size_bytes, .. } => *size_bytes,
        NodeKind::Literal(bytes) => bytes.len() as u64,
        NodeKind::Directory => BLOCK_BYTES,
        _ => 0,
    };
    nodes.iter().fold(0, |sum: u64, n| sum.saturating_add(bytes(n).next_multiple_of(BLOCK_BYTES)))
}

fn declare(
    builder: &mut FsBuilder,
    handles: &HashMap<&[u8], InodeHandle>,
    node: &Node,
    epoch_s: i64,
) -> mkext4::Result<InodeHandle> {
    check(node)?;
    let meta = meta_of(&node.meta, epoch_s);
    if node.path.is_empty() {
        builder.set_meta(ROOT, meta)?;
        return Ok(ROOT);
    }
    let parent = parent_of(&node.path).and_then(|p| handles.get(p));
    let parent = *parent.ok_or_else(|| invalid("its directory is not declared"))?;
    let name = name_of(&node.path)?;
    match &node.kind {
        NodeKind::Directory => builder.mkdir(parent, name, meta),
        NodeKind::File { size_bytes, .. } => builder.file(parent, name, meta, *size_bytes),
        NodeKind::Literal(bytes) => builder.file(parent, name, meta, bytes.len() as u64),
        NodeKind::Symlink { target } => builder.symlink(parent, name, text(target)?, meta),
        NodeKind::CharDevice { major, minor } => {
            builder.mknod(parent, name, meta, SpecialKind::Char { major: *major, minor: *minor })
        }
        NodeKind::BlockDevice { major, minor } => {
            builder.mknod(parent, name, meta, SpecialKind::Block { major: *major, minor: *minor })
        }
        NodeKind::Fifo => builder.mknod(parent, name, meta, SpecialKind::Fifo),
        NodeKind::Socket => builder.mknod(parent, name, meta, SpecialKind::Socket),
        NodeKind::HardLink { .. } => Err(invalid("a hard link is no inode of its own")),
    }
}

fn meta_of(meta: &Meta, epoch_s: i64) -> mkext4::Meta {
    let mut out = mkext4::Meta::new(meta.mode, meta.uid, meta.gid, (meta.mtime_s, 0));
    out.atime = Some((epoch_s, 0));
    out.ctime = Some((epoch_s, 0));
    out.crtime = Some((epoch_s, 0));
    out
}

/// What the library finds only when it seals, and then cannot say of which node, or not at all.
fn check(node: &Node) -> mkext4::Result<()> {
    if !MTIME_S.contains(&node.meta.mtime_s) {
        return Err(invalid("its time is before 1901 or after 2446"));
    }
    let xattr = |(name, value): &(String, Vec<u8>)| {
        XATTR_HEADER_BYTES + name.len().next_multiple_of(4) + value.len().next_multiple_of(4)
    };
    if node.xattrs.iter().map(xattr).sum::<usize>() > XATTRS_BYTES_MAX {
        return Err(invalid("its extended attributes do not fit into a block"));
    }
    Ok(())
}

/// The file system brings this directory itself.
fn check_lost_and_found(node: &Node, nodes: &[&Node]) -> Result<(), ComposeError> {
    let is_empty = !nodes.iter().any(|n| parent_of(&n.path) == Some(LOST_AND_FOUND));
    if node.kind == NodeKind::Directory && is_empty {
        return Ok(());
    }
    Err(layout_error(node, invalid("the file system has an empty directory of this name")))
}

fn name_of(path: &[u8]) -> mkext4::Result<&str> {
    let name = path.rsplit(|b| *b == b'/').next().unwrap_or(path);
    str::from_utf8(name).map_err(|_| invalid("its name is not UTF-8"))
}

fn text(target: &[u8]) -> mkext4::Result<&str> {
    str::from_utf8(target).map_err(|_| invalid("its target is not UTF-8"))
}

fn invalid(reason: &str) -> mkext4::Error {
    mkext4::Error::Invalid(reason.into())
}

fn layout_error(node: &Node, source: mkext4::Error) -> ComposeError {
    ComposeError::Layout { path: show(&node.path), source }
}

/// Keeps what is not zero.
struct Collect<'a>(&'a mut Vec<(u64, Vec<u8>)>);

impl RegionSink for Collect<'_> {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        // Metadata arrives in pieces of any size; zero blocks inside stay holes in the image.
        let mut run: Option<(u64, Vec<u8>)> = None;
        let first = (BLOCK_BYTES - offset % BLOCK_BYTES) as usize;
        let (head, tail) = bytes.split_at(first.min(bytes.len()));
        let mut at = offset;
        for piece in std::iter::once(head).chain(tail.chunks(BLOCK_BYTES as usize)) {
            if is_zero(piece) {
                self.0.extend(run.take());
            } else {
                run.get_or_insert_with(|| (at, Vec::new())).1.extend_from_slice(piece);
            }
            at += piece.len() as u64;
        }
        self.0.extend(run);
        Ok(())
    }

    fn zeros(&mut self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
}
