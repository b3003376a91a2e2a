//! The component manifest: every entry of a component, canonical and bounded.
//! The byte format is specified in `repository/FORMAT.md`, section "Manifest".

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::types::codec::{CodecError, Reader, Writer};
use crate::types::{ComponentId, Hash, PackId};

/// Magic and version of an encoded manifest. Changing the encoding changes every component id.
pub const MAGIC: &[u8; 8] = b"CICMAN\x00\x01";
/// Pack offsets and pack sizes are multiples of this. Changing it is a format break.
pub const ALIGNMENT_BYTES: u64 = 4096;

/// Limits of what a manifest may claim; a stranger's manifest beyond them is refused unread.
pub mod limit {
    pub const MANIFEST_BYTES: u64 = 256 << 20;
    pub const TEXT_BYTES: u64 = 1024;
    pub const PATH_BYTES: u64 = 4095;
    pub const NAME_BYTES: usize = 255;
    pub const ENTRIES: u64 = 4_000_000;
    pub const PACKS: u64 = 100_000;
    pub const XATTRS: u64 = 64;
    pub const XATTR_VALUE_BYTES: u64 = 4000;
    pub const FILE_BYTES: u64 = 1 << 42;
    pub const RECORDS: u64 = 1_000_000;
    pub const RECORD_BYTES: u64 = 1 << 20;
    pub const LIST_ITEMS: u64 = 10_000;
}

/// The four kinds of component (CIC paper, section III).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// What makes the disk start in a machine: boot loader and EFI system partition content.
    Format,
    Kernel,
    Os,
    Program,
}

impl Kind {
    pub const ALL: [Kind; 4] = [Kind::Format, Kind::Kernel, Kind::Os, Kind::Program];

    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Format => "format",
            Kind::Kernel => "kernel",
            Kind::Os => "os",
            Kind::Program => "program",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        Kind::ALL
            .into_iter()
            .find(|k| k.as_str() == s)
            .ok_or_else(|| format!("'{s}' is no component kind: format, kernel, os or program"))
    }
}

/// A named, versioned, immutable part of a VM's disk. Its id is the hash of its canonical bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Manifest {
    pub name: String,
    pub version: String,
    pub kind: Kind,
    /// Debian architecture name, for example `amd64`.
    pub architecture: String,
    /// Where it came from, for people: for example `Debian 12 (bookworm)`.
    pub origin: String,
    /// SPDX or free-text licences, sorted, without duplicates.
    pub licences: Vec<String>,
    /// Components this one was built on: it only composes with exactly these.
    pub requires: Vec<ComponentId>,
    /// Names of components it refuses to share a disk with, sorted.
    pub conflicts: Vec<String>,
    pub packs: Vec<PackRef>,
    /// Sorted by path, unique; every directory precedes what is in it.
    pub entries: Vec<Entry>,
    /// Sorted by path, unique, disjoint from `entries`.
    pub fragments: Vec<Fragment>,
}

/// One pack of a component: the file contents of one package.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PackRef {
    pub id: PackId,
    /// Plain size, a multiple of [`ALIGNMENT_BYTES`], not zero.
    pub size_bytes: u64,
    /// Package name, or a name of our own for what no package owns.
    pub package: String,
    pub package_version: String,
}

/// Ownership, mode and times of an entry. `mode` is the low twelve bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Meta {
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970: clamped to the component's epoch when built, kept when imported.
    pub mtime_s: i64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Relative to the root, no leading slash, no `.`, `..` or empty part. The root itself is the
    /// empty path: at most once, a directory.
    pub path: Vec<u8>,
    pub meta: Meta,
    /// Sorted by name, values in the form the file system stores on disk.
    pub xattrs: Vec<(String, Vec<u8>)>,
    pub kind: EntryKind,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EntryKind {
    Directory,
    /// Content lies in pack number `pack` at `offset_bytes`, zero padded to the alignment. An empty
    /// file has pack 0 and offset 0 whether or not packs exist.
    File {
        size_bytes: u64,
        hash: Hash,
        pack: u32,
        offset_bytes: u64,
    },
    Symlink {
        target: Vec<u8>,
    },
    /// Another name of what lies at `target` in the same manifest: a file, a symbolic link, a device, a fifo
    /// or a socket.
    HardLink {
        target: Vec<u8>,
    },
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
    Socket,
    /// Removes the path that a required component brings.
    Whiteout,
}

impl EntryKind {
    /// Whether it is an inode that may have several names.
    pub fn can_be_linked(&self) -> bool {
        !matches!(self, EntryKind::Directory | EntryKind::HardLink { .. } | EntryKind::Whiteout)
    }
}

/// How the records of one aggregated file merge.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FragmentRule {
    /// Lines keyed by what precedes the first `:`; the numeric third field is an id that must be
    /// unique (`passwd`). Written sorted by that id.
    Accounts,
    /// As `Accounts`, and the fourth field is a member list that unites (`group`).
    Groups,
    /// Lines keyed by the first field before `:`, written sorted by key (`shadow`, `subuid`).
    /// `gshadow`'s last field unites too, which is the rule `GroupShadow`.
    Lines,
    GroupShadow,
    /// Whole lines are the keys: a sorted set (`dpkg/triggers/File`, `statoverride`).
    Set,
    /// Records of three lines (`dpkg/diversions`), kept together, sorted.
    Triples,
    /// Blank-line-separated stanzas keyed by their first line (`dpkg/status`, debconf databases).
    Stanzas,
}

/// A component's share of a file that many packages write together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fragment {
    pub path: Vec<u8>,
    pub rule: FragmentRule,
    pub meta: Meta,
    /// Key and the record's bytes without its terminator, sorted by key, keys unique.
    pub records: Vec<(Vec<u8>, Vec<u8>)>,
}

const RULES: [FragmentRule; 7] = [
    FragmentRule::Accounts,
    FragmentRule::Groups,
    FragmentRule::Lines,
    FragmentRule::GroupShadow,
    FragmentRule::Set,
    FragmentRule::Triples,
    FragmentRule::Stanzas,
];

impl Manifest {
    /// Components whose versions are near each other share this key: name, kind and architecture.
    pub fn similarity_key(&self) -> String {
        format!("{}/{}/{}", self.kind, self.name, self.architecture)
    }

    pub fn id(&self) -> ComponentId {
        ComponentId::of(&self.encode())
    }

    /// Bytes of all packs, plain and padded.
    pub fn plain_bytes(&self) -> u64 {
        self.packs.iter().map(|p| p.size_bytes).sum()
    }

    /// The canonical bytes. Only a manifest that [`Manifest::check`] accepts decodes again.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::with_magic(MAGIC);
        for text in [&self.name, &self.version, &self.architecture, &self.origin] {
            w.str(text);
        }
        w.u8(self.kind as u8);
        w.varint(self.licences.len() as u64);
        self.licences.iter().for_each(|l| w.str(l));
        w.varint(self.requires.len() as u64);
        self.requires.iter().for_each(|c| w.fixed(c.as_bytes()));
        w.varint(self.conflicts.len() as u64);
        self.conflicts.iter().for_each(|c| w.str(c));
        w.varint(self.packs.len() as u64);
        for p in &self.packs {
            w.fixed(p.id.as_bytes());
            w.varint(p.size_bytes);
            w.str(&p.package);
            w.str(&p.package_version);
        }
        w.varint(self.entries.len() as u64);
        for e in &self.entries {
            e.encode(&mut w);
        }
        w.varint(self.fragments.len() as u64);
        for f in &self.fragments {
            w.bytes(&f.path);
            w.u8(RULES.iter().position(|r| *r == f.rule).unwrap_or_default() as u8);
            f.meta.encode(&mut w);
            w.varint(f.records.len() as u64);
            for (key, record) in &f.records {
                w.bytes(key);
                w.bytes(record);
            }
        }
        w.into_bytes()
    }

    /// Reads canonical bytes and checks every rule of the format.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let size = bytes.len() as u64;
        if size > limit::MANIFEST_BYTES {
            return Err(CodecError::TooLarge { what: "manifest", value: size, limit: limit::MANIFEST_BYTES });
        }
        let mut r = Reader::with_magic(bytes, MAGIC, "component manifest of version 1")?;
        let r = &mut r;
        let name = text(r, "name")?;
        let version = text(r, "version")?;
        let architecture = text(r, "architecture")?;
        let origin = text(r, "origin")?;
        let kind = match r.u8("kind")? {
            k @ 0..=3 => Kind::ALL[k as usize],
            k => return Err(CodecError::Unknown { what: "component kind", value: k.into() }),
        };
        let licences = list(r, "licences", limit::LIST_ITEMS, 1, |r| text(r, "licence"))?;
        let requires = list(r, "requires", limit::LIST_ITEMS, 32, |r| {
            Ok(ComponentId::from_bytes(r.array("requires")?))
        })?;
        let conflicts = list(r, "conflicts", limit::LIST_ITEMS, 1, |r| text(r, "conflict"))?;
        let packs = list(r, "packs", limit::PACKS, 35, |r| {
            Ok(PackRef {
                id: PackId::from_bytes(r.array("pack id")?),
                size_bytes: r.bounded("pack size", limit::FILE_BYTES)?,
                package: text(r, "package")?,
                package_version: text(r, "package version")?,
            })
        })?;
        let entries = list(r, "entries", limit::ENTRIES, 7, Entry::decode)?;
        let fragments = list(r, "fragments", limit::LIST_ITEMS, 7, |r| {
            let path = r.bytes("fragment path", limit::PATH_BYTES)?.to_vec();
            let rule = r.u8("fragment rule")?;
            let rule = *RULES
                .get(rule as usize)
                .ok_or(CodecError::Unknown { what: "fragment rule", value: rule.into() })?;
            let meta = Meta::decode(r)?;
            let records = list(r, "records", limit::RECORDS, 2, |r| {
                let key = r.bytes("record key", limit::RECORD_BYTES)?.to_vec();
                Ok((key, r.bytes("record", limit::RECORD_BYTES)?.to_vec()))
            })?;
            Ok(Fragment { path, rule, meta, records })
        })?;
        r.clone().end()?;
        let manifest = Manifest {
            name,
            version,
            kind,
            architecture,
            origin,
            licences,
            requires,
            conflicts,
            packs,
            entries,
            fragments,
        };
        manifest.check()?;
        Ok(manifest)
    }

    /// Every rule that makes a manifest valid, named when broken.
    pub fn check(&self) -> Result<(), CodecError> {
        if !is_component_name(&self.name) {
            return Err(invalid(
                "component name",
                format!("'{}' is not 1 to 100 of a-z 0-9 . + -", self.name),
            ));
        }
        if self.version.is_empty() || self.version.bytes().any(|b| b <= b' ' || b == b'/' || b >= 0x7f) {
            return Err(invalid(
                "component version",
                format!("'{}' is empty or has odd characters", self.version),
            ));
        }
        if !self.licences.is_sorted_by(|a, b| a < b) || !self.conflicts.is_sorted_by(|a, b| a < b) {
            return Err(CodecError::NotCanonical { what: "licence or conflict list" });
        }
        for p in &self.packs {
            if p.size_bytes == 0 || p.size_bytes % ALIGNMENT_BYTES != 0 {
                return Err(invalid(
                    "pack size",
                    format!("{} of pack {} is not a positive multiple of 4096", p.size_bytes, p.id.short()),
                ));
            }
        }
        if !self.entries.is_sorted_by(|a, b| path_order(&a.path, &b.path).is_lt()) {
            return Err(invalid("entries", "not sorted by path, or a path appears twice".into()));
        }
        let find = |path: &[u8]| {
            self.entries.binary_search_by(|e| path_order(&e.path, path)).ok().map(|i| &self.entries[i])
        };
        for e in &self.entries {
            check_path(&e.path)?;
            if e.meta.mode > 0o7777 {
                return Err(invalid("mode", format!("{:o} of {}", e.meta.mode, show(&e.path))));
            }
            if !e.xattrs.is_sorted_by(|a, b| a.0 < b.0) {
                return Err(invalid("extended attributes", format!("of {} not sorted", show(&e.path))));
            }
            if e.path.is_empty() {
                if e.kind != EntryKind::Directory {
                    return Err(invalid("root entry", "is not a directory".into()));
                }
            } else if let Some(parent) = parent_of(&e.path).filter(|p| !p.is_empty()) {
                // Nothing may be reached through a link, or through anything but a directory.
                match find(parent).map(|p| &p.kind) {
                    Some(EntryKind::Directory) => {}
                    Some(_) => {
                        return Err(invalid(
                            "path",
                            format!("{} lies below what is no directory", show(&e.path)),
                        ));
                    }
                    None => {
                        return Err(invalid(
                            "path",
                            format!("{} has no parent directory entry", show(&e.path)),
                        ));
                    }
                }
            }
            match &e.kind {
                EntryKind::File { size_bytes, pack, offset_bytes, .. } => {
                    self.check_file(e, *size_bytes, *pack, *offset_bytes)?
                }
                EntryKind::HardLink { target } => match find(target).map(|t| &t.kind) {
                    Some(kind) if kind.can_be_linked() => {}
                    _ => {
                        return Err(invalid(
                            "hard link",
                            format!("{} links to no file, link or device of this component", show(&e.path)),
                        ));
                    }
                },
                EntryKind::Symlink { target } if target.is_empty() || target.contains(&0) => {
                    return Err(invalid(
                        "symbolic link",
                        format!("{} has an empty target or one with NUL", show(&e.path)),
                    ));
                }
                _ => {}
            }
        }
        if !self.fragments.is_sorted_by(|a, b| path_order(&a.path, &b.path).is_lt()) {
            return Err(invalid("fragments", "not sorted by path, or a path appears twice".into()));
        }
        for f in &self.fragments {
            check_path(&f.path)?;
            if f.path.is_empty() || f.meta.mode > 0o7777 || find(&f.path).is_some() {
                return Err(invalid(
                    "fragment",
                    format!("{} is the root, has a bad mode or is an entry too", show(&f.path)),
                ));
            }
            // As with entries, nothing may be reached through a link. Directories may be the base's.
            let is_fragment =
                |path: &[u8]| self.fragments.binary_search_by(|f| path_order(&f.path, path)).is_ok();
            let mut above = parent_of(&f.path);
            while let Some(path) = above.filter(|p| !p.is_empty()) {
                if find(path).is_some_and(|e| e.kind != EntryKind::Directory) || is_fragment(path) {
                    return Err(invalid(
                        "fragment",
                        format!("{} lies below what is no directory", show(&f.path)),
                    ));
                }
                above = parent_of(path);
            }
            if !f.records.is_sorted_by(|a, b| a.0 < b.0) {
                return Err(invalid("fragment", format!("records of {} not sorted by key", show(&f.path))));
            }
        }
        Ok(())
    }

    fn check_file(&self, e: &Entry, size_bytes: u64, pack: u32, offset_bytes: u64) -> Result<(), CodecError> {
        if size_bytes == 0 {
            return if pack == 0 && offset_bytes == 0 {
                Ok(())
            } else {
                Err(invalid("empty file", format!("{} names a place in a pack", show(&e.path))))
            };
        }
        let held = self.packs.get(pack as usize).map(|p| p.size_bytes);
        let end = offset_bytes.checked_add(size_bytes);
        match (held, end) {
            (Some(held), Some(end)) if end <= held && offset_bytes.is_multiple_of(ALIGNMENT_BYTES) => Ok(()),
            _ => Err(invalid("file", format!("{} lies outside its pack or is not aligned", show(&e.path)))),
        }
    }
}

impl Meta {
    fn encode(&self, w: &mut Writer) {
        w.varint(self.mode.into());
        w.varint(self.uid.into());
        w.varint(self.gid.into());
        w.varint_signed(self.mtime_s);
    }
    fn decode(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        Ok(Self {
            mode: r.bounded("mode", 0o7777)? as u16,
            uid: r.bounded("uid", u32::MAX.into())? as u32,
            gid: r.bounded("gid", u32::MAX.into())? as u32,
            mtime_s: r.varint_signed("mtime")?,
        })
    }
}

impl Entry {
    fn encode(&self, w: &mut Writer) {
        w.bytes(&self.path);
        self.meta.encode(w);
        w.varint(self.xattrs.len() as u64);
        for (name, value) in &self.xattrs {
            w.str(name);
            w.bytes(value);
        }
        match &self.kind {
            EntryKind::Directory => w.u8(0),
            EntryKind::File { size_bytes, hash, pack, offset_bytes } => {
                w.u8(1);
                w.varint(*size_bytes);
                w.fixed(hash.as_bytes());
                w.varint((*pack).into());
                w.varint(*offset_bytes);
            }
            EntryKind::Symlink { target } => {
                w.u8(2);
                w.bytes(target);
            }
            EntryKind::HardLink { target } => {
                w.u8(3);
                w.bytes(target);
            }
            EntryKind::CharDevice { major, minor } | EntryKind::BlockDevice { major, minor } => {
                w.u8(if matches!(self.kind, EntryKind::CharDevice { .. }) { 4 } else { 5 });
                w.varint((*major).into());
                w.varint((*minor).into());
            }
            EntryKind::Fifo => w.u8(6),
            EntryKind::Socket => w.u8(7),
            EntryKind::Whiteout => w.u8(8),
        }
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        let path = r.bytes("path", limit::PATH_BYTES)?.to_vec();
        let meta = Meta::decode(r)?;
        let xattrs = list(r, "extended attributes", limit::XATTRS, 2, |r| {
            let name = r.str("attribute name", 255)?.to_owned();
            Ok((name, r.bytes("attribute value", limit::XATTR_VALUE_BYTES)?.to_vec()))
        })?;
        let number =
            |r: &mut Reader<'_>| Ok::<_, CodecError>(r.bounded("device number", u32::MAX.into())? as u32);
        let kind = match r.u8("entry kind")? {
            0 => EntryKind::Directory,
            1 => EntryKind::File {
                size_bytes: r.bounded("file size", limit::FILE_BYTES)?,
                hash: Hash::from_bytes(r.array("file hash")?),
                pack: r.bounded("pack number", limit::PACKS)? as u32,
                offset_bytes: r.bounded("pack offset", limit::FILE_BYTES)?,
            },
            2 => EntryKind::Symlink { target: r.bytes("link target", limit::PATH_BYTES)?.to_vec() },
            3 => EntryKind::HardLink { target: r.bytes("link target", limit::PATH_BYTES)?.to_vec() },
            4 => EntryKind::CharDevice { major: number(r)?, minor: number(r)? },
            5 => EntryKind::BlockDevice { major: number(r)?, minor: number(r)? },
            6 => EntryKind::Fifo,
            7 => EntryKind::Socket,
            8 => EntryKind::Whiteout,
            k => return Err(CodecError::Unknown { what: "entry kind", value: k.into() }),
        };
        Ok(Self { path, meta, xattrs, kind })
    }
}

/// The order of entries: plain byte order of the path with `/` sorting before every other byte, so
/// a directory is followed by all it holds.
pub fn path_order(a: &[u8], b: &[u8]) -> std::cmp::Ordering {
    a.split(|c| *c == b'/').cmp(b.split(|c| *c == b'/'))
}

/// The path of the directory a path lies in; `None` for the root.
pub fn parent_of(path: &[u8]) -> Option<&[u8]> {
    if path.is_empty() {
        return None;
    }
    Some(path.iter().rposition(|b| *b == b'/').map_or(&path[..0], |i| &path[..i]))
}

/// A path for people: lossy, with control characters escaped.
pub fn show(path: &[u8]) -> String {
    format!("/{}", path.escape_ascii())
}

pub(super) fn is_component_name(s: &str) -> bool {
    (1..=100).contains(&s.len())
        && s.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'+' | b'-'))
        && s.as_bytes()[0].is_ascii_alphanumeric()
}

fn check_path(path: &[u8]) -> Result<(), CodecError> {
    let bad = |rule: &str| Err(invalid("path", format!("{} {rule}", show(path))));
    if path.is_empty() {
        return Ok(());
    }
    if path.contains(&0) {
        return bad("contains NUL");
    }
    if path.len() as u64 > limit::PATH_BYTES {
        return bad("is too long");
    }
    for part in path.split(|b| *b == b'/') {
        if part.is_empty() || part == b"." || part == b".." {
            return bad("is absolute or has an empty, '.' or '..' part");
        }
        if part.len() > limit::NAME_BYTES {
            return bad("has a part of more than 255 bytes");
        }
    }
    Ok(())
}

fn invalid(what: &'static str, rule: String) -> CodecError {
    CodecError::Invalid { what, rule }
}

fn text(r: &mut Reader<'_>, what: &'static str) -> Result<String, CodecError> {
    r.str(what, limit::TEXT_BYTES).map(str::to_owned)
}

fn list<T>(
    r: &mut Reader<'_>,
    what: &'static str,
    limit: u64,
    bytes_min_each: usize,
    mut item: impl FnMut(&mut Reader<'_>) -> Result<T, CodecError>,
) -> Result<Vec<T>, CodecError> {
    let n = r.count(what, limit, bytes_min_each)?;
    let mut out = Vec::new();
    for _ in 0..n {
        out.push(item(r)?);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta() -> Meta {
        Meta { mode: 0o755, uid: 0, gid: 0, mtime_s: -5 }
    }

    fn entry(path: &str, kind: EntryKind) -> Entry {
        Entry { path: path.into(), meta: meta(), xattrs: vec![("user.a".into(), vec![1])], kind }
    }

    pub fn sample() -> Manifest {
        let file = EntryKind::File { size_bytes: 5000, hash: Hash::of(b"x"), pack: 0, offset_bytes: 4096 };
        Manifest {
            name: "redis".into(),
            version: "7.0.15-1".into(),
            kind: Kind::Program,
            architecture: "amd64".into(),
            origin: "Debian 12".into(),
            licences: vec!["BSD-3-Clause".into()],
            requires: vec![ComponentId::of(b"os")],
            conflicts: vec![],
            packs: vec![PackRef {
                id: PackId::of(b"p"),
                size_bytes: 12288,
                package: "redis".into(),
                package_version: "7".into(),
            }],
            entries: vec![
                entry("a", EntryKind::Directory),
                entry("a/b", file),
                entry("a/c", EntryKind::HardLink { target: b"a/b".to_vec() }),
                entry("a-b", EntryKind::Symlink { target: b"../..".to_vec() }),
                entry("dev", EntryKind::Directory),
                entry("dev/null", EntryKind::CharDevice { major: 1, minor: 3 }),
                entry("gone", EntryKind::Whiteout),
            ],
            fragments: vec![Fragment {
                path: b"etc/passwd".to_vec(),
                rule: FragmentRule::Accounts,
                meta: meta(),
                records: vec![(b"redis".to_vec(), b"redis:x:120:120::/:/bin/false".to_vec())],
            }],
        }
    }

    #[test]
    fn encodes_and_decodes_to_itself() {
        let m = sample();
        let bytes = m.encode();
        assert_eq!(Manifest::decode(&bytes).unwrap(), m);
        // Every truncation is an error, never a panic and never another manifest.
        for n in 0..bytes.len() {
            assert!(Manifest::decode(&bytes[..n]).is_err(), "{n}");
        }
    }

    #[test]
    fn hostile_manifests_are_refused_by_name() {
        type Spoil = fn(&mut Manifest);
        let table: [(&str, Spoil); 18] = [
            ("traversal", |m| m.entries[6].path = b"../x".to_vec()),
            ("absolute", |m| m.entries[6].path = b"/x".to_vec()),
            ("duplicate", |m| m.entries[6] = m.entries[5].clone()),
            ("unsorted", |m| m.entries.swap(0, 4)),
            ("below a link", |m| m.entries[3].path = b"a/b/c".to_vec()),
            ("no parent", |m| m.entries[5].path = b"nowhere/null".to_vec()),
            ("link to nothing", |m| m.entries[2].kind = EntryKind::HardLink { target: b"zz".to_vec() }),
            ("link to a link", |m| m.entries[2].kind = EntryKind::HardLink { target: b"a/c".to_vec() }),
            ("link to what is gone", |m| {
                m.entries[2].kind = EntryKind::HardLink { target: b"gone".to_vec() }
            }),
            ("link to a directory", |m| m.entries[2].kind = EntryKind::HardLink { target: b"a".to_vec() }),
            ("outside the pack", |m| m.packs[0].size_bytes = 4096),
            ("bad name", |m| m.name = "../redis".into()),
            ("mode", |m| m.entries[0].meta.mode = 0o17777),
            ("fragment and entry", |m| m.fragments[0].path = b"a".to_vec()),
            ("fragment below a link", |m| m.fragments[0].path = b"a-b/passwd".to_vec()),
            ("fragment far below a link", |m| m.fragments[0].path = b"a-b/x/y/passwd".to_vec()),
            ("fragment below a removal", |m| m.fragments[0].path = b"gone/passwd".to_vec()),
            ("fragment below a fragment", |m| {
                let below = Fragment { path: b"etc/passwd/x".to_vec(), ..m.fragments[0].clone() };
                m.fragments.push(below);
            }),
        ];
        for (what, spoil) in table {
            let mut m = sample();
            spoil(&mut m);
            assert!(Manifest::decode(&m.encode()).is_err(), "{what}");
        }
    }

    #[test]
    fn offsets_that_overflow_are_refused() {
        let mut m = sample();
        m.entries[1].kind =
            EntryKind::File { size_bytes: u64::MAX, hash: Hash::of(b""), pack: 0, offset_bytes: 4096 };
        assert!(m.check().is_err());
    }
}
