//! Reading a composed disk with eyes other than the composer's.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use cicada::component::manifest::Meta;
use mkext4::reader::{Fs, ReadAt};
use mkext4::spec::Inode;
use mkext4::spec::inode::FileType;

use super::world::{Thing, What};

pub const SECTOR_BYTES: u64 = 512;

/// A partition: where in the file, and how long.
pub struct Partition {
    pub file: File,
    pub start_bytes: u64,
    pub len_bytes: u64,
}

impl ReadAt for Partition {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        FileExt::read_exact_at(&self.file, buf, self.start_bytes + offset)
    }
}

/// Copies a partition into a file of its own, holes kept.
pub fn extract(disk: &Path, number: usize, to: &Path) {
    let partition = partition(disk, number);
    let out = File::create(to).unwrap();
    out.set_len(partition.len_bytes).unwrap();
    let mut buffer = vec![0; 1 << 20];
    for at in (0..partition.len_bytes).step_by(buffer.len()) {
        let len = (partition.len_bytes - at).min(buffer.len() as u64) as usize;
        ReadAt::read_exact_at(&partition, at, &mut buffer[..len]).unwrap();
        if buffer[..len].iter().any(|b| *b != 0) {
            out.write_all_at(&buffer[..len], at).unwrap();
        }
    }
}

/// Checks both copies of the partition table and finds a partition in it.
pub fn partition(disk: &Path, number: usize) -> Partition {
    let mut file = File::open(disk).unwrap();
    let len = file.metadata().unwrap().len();
    let read = |file: &mut File, at: u64, len: usize| {
        let mut bytes = vec![0; len];
        file.seek(SeekFrom::Start(at)).unwrap();
        file.read_exact(&mut bytes).unwrap();
        bytes
    };
    let u32_at = |b: &[u8], at: usize| u32::from_le_bytes(b[at..at + 4].try_into().unwrap());
    let u64_at = |b: &[u8], at: usize| u64::from_le_bytes(b[at..at + 8].try_into().unwrap());
    let mbr = read(&mut file, 0, 512);
    assert_eq!((mbr[450], &mbr[510..]), (0xee, &[0x55, 0xaa][..]));
    assert_eq!(u64::from(u32_at(&mbr, 458)), len / SECTOR_BYTES - 1);
    let mut tables = Vec::new();
    for at in [SECTOR_BYTES, len - SECTOR_BYTES] {
        let mut header = read(&mut file, at, 92);
        assert_eq!(&header[..8], b"EFI PART");
        let crc = u32_at(&header, 16);
        header[16..20].fill(0);
        assert_eq!(crc32fast::hash(&header), crc, "header CRC");
        assert_eq!(u64_at(&header, 24), at / SECTOR_BYTES);
        let table = read(&mut file, u64_at(&header, 72) * SECTOR_BYTES, 128 * 128);
        assert_eq!(crc32fast::hash(&table), u32_at(&header, 88), "table CRC");
        tables.push(table);
    }
    assert_eq!(tables[0], tables[1]);
    let entry = &tables[0][number * 128..];
    let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
    let (start_bytes, len_bytes) = (first * SECTOR_BYTES, (last + 1 - first) * SECTOR_BYTES);
    assert_eq!(start_bytes % (1 << 20), 0, "aligned to 1 MiB");
    Partition { file, start_bytes, len_bytes }
}

/// Everything in the root file system, by path, and every path's inode number.
pub fn root_tree(disk: &Path) -> (BTreeMap<Vec<u8>, Thing>, BTreeMap<Vec<u8>, u32>) {
    let fs = Fs::open(partition(disk, 1)).unwrap();
    let issues = fs.verify().unwrap();
    assert!(issues.is_empty(), "{issues:?}");
    let mut found = BTreeMap::new();
    let mut inodes = BTreeMap::new();
    let mut open = vec![(Vec::new(), 2)];
    while let Some((path, ino)) = open.pop() {
        let thing = read_thing(&fs, ino);
        if thing.what == What::Directory {
            for entry in fs.read_dir(ino).unwrap() {
                let is_own = entry.name == b"."
                    || entry.name == b".."
                    || path.is_empty() && entry.name == b"lost+found";
                if !is_own {
                    let separator: &[u8] = if path.is_empty() { b"" } else { b"/" };
                    open.push(([&path[..], separator, &entry.name].concat(), entry.inode));
                }
            }
        }
        inodes.insert(path.clone(), ino);
        found.insert(path, thing);
    }
    (found, inodes)
}

fn read_thing(fs: &Fs<Partition>, ino: u32) -> Thing {
    let inode = fs.inode(ino).unwrap();
    let what = match inode.file_type() {
        FileType::Dir => What::Directory,
        FileType::Regular => What::File(fs.read_file(ino).unwrap()),
        FileType::Symlink => What::Symlink(fs.symlink_target(ino).unwrap()),
        FileType::CharDev => device(&inode, What::Char),
        FileType::BlockDev => device(&inode, What::Block),
        FileType::Fifo => What::Fifo,
        FileType::Socket => What::Socket,
        FileType::Unknown => panic!("inode {ino} is of no known type"),
    };
    let mut xattrs: Vec<(String, Vec<u8>)> = fs
        .xattrs(ino)
        .unwrap()
        .into_iter()
        .map(|x| {
            let prefix = match x.name_index {
                1 => "user.",
                2 => "system.posix_acl_access",
                3 => "system.posix_acl_default",
                6 => "security.",
                other => panic!("attribute index {other}"),
            };
            (format!("{prefix}{}", String::from_utf8(x.name).unwrap()), x.value)
        })
        .collect();
    xattrs.sort();
    // 34 bits of seconds, the lower 32 of them signed.
    let mtime_s = i64::from(inode.mtime as i32) + (i64::from(inode.mtime_extra & 3) << 32);
    let meta = Meta { mode: inode.mode & 0o7777, uid: inode.uid, gid: inode.gid, mtime_s };
    Thing { meta, xattrs, what, links: inode.links_count.into() }
}

/// Device numbers as linux/kdev_t.h encodes them: the old form in the first word, or the new in the second.
fn device(inode: &Inode, kind: fn(u32, u32) -> What) -> What {
    let word = |i: usize| u32::from_le_bytes(inode.block[4 * i..4 * i + 4].try_into().unwrap());
    match (word(0), word(1)) {
        (0, new) => kind((new >> 8) & 0xfff, (new & 0xff) | ((new >> 12) & 0xf_ff00)),
        (old, _) => kind(old >> 8, old & 0xff),
    }
}
