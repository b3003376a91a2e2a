//! The root file system, laid out by `mkext4` behind this small interface. Its version is pinned:
//! the bytes it gives are part of the composer's format.

use std::collections::HashMap;
use std::io;

use mkext4::{FsBuilder, InodeHandle, Options, ROOT, RegionSink, SpecialKind};

use crate::component::DiskParameters;
use crate::component::manifest::{Meta, parent_of, show};
use crate::component::tree::{Node, NodeKind};

use super::error::ComposeError;
use super::plan::{Extent, Partition};

const BLOCK_BYTES: u64 = 4096;
const LABEL: &str = "root";
const RESERVED_PERCENT: u8 = 1;

pub fn layout(nodes: &[&Node], disk: &DiskParameters, size_bytes: u64) -> Result<Partition, ComposeError> {
    let mut options = Options::new(size_bytes, *disk.filesystem_uuid.as_bytes(), disk.epoch_s);
    let seed = disk.hash_seed.as_bytes();
    options.hash_seed = std::array::from_fn(|i| {
        u32::from_le_bytes([seed[4 * i], seed[4 * i + 1], seed[4 * i + 2], seed[4 * i + 3]])
    });
    options.label = Some(LABEL.into());
    options.reserved_percent = RESERVED_PERCENT;
    let mut builder = FsBuilder::new(options).map_err(ComposeError::FileSystem)?;
    let mut handles: HashMap<&[u8], InodeHandle> = HashMap::from([(&b""[..], ROOT)]);
    let mut links = Vec::new();
    for node in nodes {
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
            return Err(layout_error(
                node,
                mkext4::Error::Invalid("a link without its file or directory".into()),
            ));
        };
        let linked = name_of(&node.path).and_then(|name| builder.hardlink(*parent, name, *target));
        linked.map_err(|source| layout_error(node, source))?;
    }
    let sealed = builder.seal().map_err(ComposeError::FileSystem)?;
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
    Ok(out)
}

fn declare(
    builder: &mut FsBuilder,
    handles: &HashMap<&[u8], InodeHandle>,
    node: &Node,
    epoch_s: i64,
) -> mkext4::Result<InodeHandle> {
    let meta = meta_of(&node.meta, epoch_s);
    if node.path.is_empty() {
        builder.set_meta(ROOT, meta)?;
        return Ok(ROOT);
    }
    let parent = parent_of(&node.path).and_then(|p| handles.get(p));
    let parent = *parent.ok_or_else(|| mkext4::Error::Invalid("its directory is not declared".into()))?;
    let name = name_of(&node.path)?;
    let special = |kind| Ok::<SpecialKind, mkext4::Error>(kind);
    match &node.kind {
        NodeKind::Directory => builder.mkdir(parent, name, meta),
        NodeKind::File { size_bytes, .. } => builder.file(parent, name, meta, *size_bytes),
        NodeKind::Literal(bytes) => builder.file(parent, name, meta, bytes.len() as u64),
        NodeKind::Symlink { target } => builder.symlink(parent, name, text(target)?, meta),
        NodeKind::CharDevice { major, minor } => {
            builder.mknod(parent, name, meta, special(SpecialKind::Char { major: *major, minor: *minor })?)
        }
        NodeKind::BlockDevice { major, minor } => {
            builder.mknod(parent, name, meta, special(SpecialKind::Block { major: *major, minor: *minor })?)
        }
        NodeKind::Fifo => builder.mknod(parent, name, meta, SpecialKind::Fifo),
        NodeKind::Socket => builder.mknod(parent, name, meta, SpecialKind::Socket),
        NodeKind::HardLink { .. } => Err(mkext4::Error::Invalid("a hard link is no inode of its own".into())),
    }
}

fn meta_of(meta: &Meta, epoch_s: i64) -> mkext4::Meta {
    let mut out = mkext4::Meta::new(meta.mode, meta.uid, meta.gid, (meta.mtime_s, 0));
    out.atime = Some((epoch_s, 0));
    out.ctime = Some((epoch_s, 0));
    out.crtime = Some((epoch_s, 0));
    out
}

fn name_of(path: &[u8]) -> mkext4::Result<&str> {
    text(path.rsplit(|b| *b == b'/').next().unwrap_or(path))
}

fn text(bytes: &[u8]) -> mkext4::Result<&str> {
    std::str::from_utf8(bytes).map_err(|_| mkext4::Error::Unsupported("a name that is not UTF-8".into()))
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
            if piece.iter().all(|b| *b == 0) {
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
