//! Components made by hand, through the repository, and a list of what their disk must hold.

use std::collections::BTreeMap;

use cicada::component::manifest::{Meta, path_order};
use cicada::component::{Entry, EntryKind, Fragment, FragmentRule, Kind, Manifest, PackRef};
use cicada::compose::Composer;
use cicada::repository::Repository;
use cicada::types::{ByteSize, ComponentId};

pub const SIZE: ByteSize = ByteSize::mib(192);
pub const COMMAND_LINE: &str = r#"console=ttyS0 quiet path="$HOME\x""#;

/// A repository of its own in a directory of its own.
pub struct World {
    pub repository: Repository,
    pub composer: Composer,
    pub dir: tempfile::TempDir,
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::with_repository(Repository::create(&dir.path().join("repository")).unwrap(), dir)
    }

    pub fn with_repository(repository: Repository, dir: tempfile::TempDir) -> Self {
        let composer = Composer::new(repository.clone());
        Self { repository, composer, dir }
    }

    /// The usual set: format, kernel, an OS with one entry of every kind, and a program.
    pub fn set(&self) -> Vec<ComponentId> {
        let os = os().store(&self.repository);
        let rest = [format(), kernel(), program(os)].map(|c| c.store(&self.repository));
        [vec![os], rest.to_vec()].concat()
    }

    /// Names of everything below the repository's working directories.
    pub fn leftovers(&self) -> Vec<String> {
        let dirs = [self.repository.temporary_dir(), self.repository.compositions_dir()];
        let names = dirs.iter().flat_map(|d| std::fs::read_dir(d).unwrap());
        names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// One thing on a disk, as it goes in and as it must come out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Thing {
    pub meta: Meta,
    pub xattrs: Vec<(String, Vec<u8>)>,
    pub what: What,
    pub links: u32,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum What {
    Directory,
    File(Vec<u8>),
    Symlink(Vec<u8>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
    Socket,
    HardLink(Vec<u8>),
    Whiteout,
}

/// A component to be.
#[derive(Clone)]
pub struct Draft {
    pub manifest: Manifest,
    pub things: Vec<(Vec<u8>, Thing)>,
}

pub fn meta(mode: u16) -> Meta {
    Meta { mode, uid: 0, gid: 0, mtime_s: 1_600_000_000 }
}

pub fn thing(mode: u16, what: What) -> Thing {
    let links = if what == What::Directory { 2 } else { 1 };
    Thing { meta: meta(mode), xattrs: Vec::new(), what, links }
}

pub fn directory() -> Thing {
    thing(0o755, What::Directory)
}

pub fn file(content: impl Into<Vec<u8>>) -> Thing {
    thing(0o644, What::File(content.into()))
}

/// Bytes that do not compress and differ by `seed`.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

impl Draft {
    pub fn new(name: &str, kind: Kind) -> Self {
        let manifest = Manifest {
            name: name.into(),
            version: "1".into(),
            kind,
            architecture: "amd64".into(),
            origin: "made by hand".into(),
            licences: Vec::new(),
            requires: Vec::new(),
            conflicts: Vec::new(),
            packs: Vec::new(),
            entries: Vec::new(),
            fragments: Vec::new(),
        };
        Self { manifest, things: Vec::new() }
    }

    pub fn with(mut self, path: impl AsRef<[u8]>, thing: Thing) -> Self {
        self.things.push((path.as_ref().to_vec(), thing));
        self
    }

    pub fn on(mut self, base: ComponentId) -> Self {
        self.manifest.requires = vec![base];
        self
    }

    pub fn fragment(mut self, path: &str, rule: FragmentRule, content: &str) -> Self {
        let records = cicada::component::fragment::parse(rule, content.as_bytes()).unwrap();
        self.manifest.fragments.push(Fragment { path: path.into(), rule, meta: meta(0o644), records });
        self
    }

    /// Stores packs, of at most three files each, and the manifest.
    pub fn store(mut self, repository: &Repository) -> ComponentId {
        self.things.sort_by(|(a, _), (b, _)| path_order(a, b));
        let mut open = None;
        let mut in_pack = 0;
        for (path, thing) in self.things.clone() {
            let kind = match &thing.what {
                What::Directory => EntryKind::Directory,
                What::File(content) => {
                    let writer = open.get_or_insert_with(|| repository.pack_writer().unwrap());
                    let (offset_bytes, hash) =
                        writer.append(&mut content.as_slice(), content.len() as u64).unwrap();
                    let pack = if content.is_empty() { 0 } else { self.manifest.packs.len() as u32 };
                    in_pack += 1;
                    EntryKind::File { size_bytes: content.len() as u64, hash, pack, offset_bytes }
                }
                What::Symlink(target) => EntryKind::Symlink { target: target.clone() },
                What::HardLink(target) => EntryKind::HardLink { target: target.clone() },
                What::Char(major, minor) => EntryKind::CharDevice { major: *major, minor: *minor },
                What::Block(major, minor) => EntryKind::BlockDevice { major: *major, minor: *minor },
                What::Fifo => EntryKind::Fifo,
                What::Socket => EntryKind::Socket,
                What::Whiteout => EntryKind::Whiteout,
            };
            self.manifest.entries.push(Entry { path, meta: thing.meta, xattrs: thing.xattrs, kind });
            if in_pack == 3 {
                self.close(open.take());
                in_pack = 0;
            }
        }
        self.close(open);
        self.manifest.check().unwrap();
        repository.put_manifest(&self.manifest).unwrap()
    }

    fn close(&mut self, writer: Option<cicada::repository::PackWriter>) {
        if let Some((id, size_bytes)) = writer.and_then(|w| w.finish().unwrap()) {
            let package = format!("{}-{}", self.manifest.name, self.manifest.packs.len());
            self.manifest.packs.push(PackRef { id, size_bytes, package, package_version: "1".into() });
        }
    }
}

pub fn format() -> Draft {
    Draft::new("uefi", Kind::Format)
        .with("boot", directory())
        .with("boot/efi", directory())
        .with("boot/efi/EFI", directory())
        .with("boot/efi/EFI/BOOT", directory())
        .with("boot/efi/EFI/BOOT/BOOTX64.EFI", file(noise(1, 150_001)))
        .with("boot/efi/EFI/debian", directory())
        .with("boot/efi/EFI/debian/grub.cfg", file("x"))
        .with("boot/efi/EFI/debian/y.cfg", file("x"))
}

pub fn kernel() -> Draft {
    Draft::new("kernel", Kind::Kernel).with("boot", directory()).with("boot/vmlinuz", file(noise(2, 5 << 20)))
}

/// Revision 2 of the attribute of linux/capability.h: effective, `cap_net_raw` permitted.
const CAP_NET_RAW: &[u8] = &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// An operating system with one entry of every kind.
pub fn os() -> Draft {
    let with_xattrs = |mut thing: Thing, xattrs: &[(&str, &[u8])]| {
        thing.xattrs = xattrs.iter().map(|(n, v)| ((*n).to_owned(), v.to_vec())).collect();
        thing
    };
    let owned = |mut thing: Thing, uid, gid, mtime_s| {
        (thing.meta.uid, thing.meta.gid, thing.meta.mtime_s) = (uid, gid, mtime_s);
        thing
    };
    let linked = |mut thing: Thing, links| {
        thing.links = links;
        thing
    };
    // The form ext4 stores: version 1, then user::rw-, user:70000:r--, group::r--, mask::r--, other::---.
    let acl: &[u8] =
        &[1, 0, 0, 0, 1, 0, 6, 0, 2, 0, 4, 0, 0x70, 0x11, 1, 0, 4, 0, 4, 0, 0x10, 0, 4, 0, 0x20, 0, 0, 0];
    let mut sparse = noise(3, 9 << 20);
    sparse[1 << 20..8 << 20].fill(0);
    let mut os = Draft::new("os", Kind::Os)
        .with("", owned(thing(0o755, What::Directory), 0, 0, 1_500_000_000))
        .with("boot", directory())
        .with("dev", directory())
        .with("dev/null", thing(0o666, What::Char(1, 3)))
        .with("dev/big", thing(0o600, What::Char(511, 0x54321)))
        .with("dev/vda", owned(thing(0o660, What::Block(254, 0)), 0, 6, 1))
        .with("etc", directory())
        .with("etc/acl", with_xattrs(file("secret"), &[("system.posix_acl_access", acl)]))
        .with("etc/hostname", file("cicada\n"))
        .with("etc/nothing", file(""))
        .with("run", directory())
        .with("run/fifo", thing(0o600, What::Fifo))
        .with("run/socket", thing(0o755, What::Socket))
        .with("tmp", thing(0o1777, What::Directory))
        .with("usr", directory())
        .with("usr/bin", directory())
        .with("usr/bin/links", linked(file(noise(4, 20_000)), 3))
        .with("usr/bin/ping", with_xattrs(file(noise(5, 4096)), &[("security.capability", CAP_NET_RAW)]))
        .with("usr/bin/sudo", thing(0o4755, What::File(noise(6, 4097))))
        .with("usr/lib", with_xattrs(directory(), &[("user.a", b"1"), ("user.b", &[7; 3000])]))
        .with("usr/lib/link", linked(thing(0, What::HardLink(b"usr/bin/links".to_vec())), 3))
        .with("usr/lib/link2", linked(thing(0, What::HardLink(b"usr/bin/links".to_vec())), 3))
        .with("usr/lib/long", thing(0o777, What::Symlink(vec![b'x'; 300])))
        .with("usr/lib/short", thing(0o777, What::Symlink(b"../bin/ping".to_vec())))
        .with("usr/lib/sparse", file(sparse))
        .with("usr/share", directory())
        .with("usr/share/doc", directory())
        .with("usr/share/doc/copyright", file("public domain"))
        .with(format!("usr/share/{}", "n".repeat(255)), file("long name"))
        .with("usr/share/tsch\u{fc}\u{df}", file("UTF-8"))
        .with("usr/share/many", directory())
        .with("var", directory())
        .with("var/empty", owned(thing(0o2700, What::Directory), 70_000, 4_000_000_000, -5))
        .with("var/old", owned(file("before 1970"), 65_536, 65_535, -2_147_483_648))
        .with("var/young", owned(file("after 2038"), 1, 2, (1 << 32) + 7))
        .fragment("etc/passwd", FragmentRule::Accounts, "root:x:0:0::/root:/bin/sh\n")
        .fragment("var/status", FragmentRule::Stanzas, "Package: os\nStatus: ok\n");
    for i in 0..600 {
        let path = format!("usr/share/many/entry-with-a-rather-long-name-{i}");
        os = os.with(path, thing(0o777, What::Symlink(format!("{i}").into_bytes())));
    }
    os
}

/// A program that adds, replaces, removes and merges.
pub fn program(os: ComponentId) -> Draft {
    Draft::new("redis", Kind::Program)
        .on(os)
        .with("etc", directory())
        .with("etc/hostname", file("replaced\n"))
        .with("usr", directory())
        .with("usr/share", directory())
        .with("usr/share/doc", thing(0, What::Whiteout))
        .with("var", directory())
        .with("var/redis", thing(0o750, What::Directory))
        .fragment("etc/passwd", FragmentRule::Accounts, "redis:x:120:120::/:/bin/false\n")
        .fragment("var/status", FragmentRule::Stanzas, "Package: redis\nStatus: ok\n")
}

/// What the root file system of the usual set must hold, by path.
pub fn expected() -> BTreeMap<Vec<u8>, Thing> {
    let mut all: BTreeMap<Vec<u8>, Thing> = BTreeMap::new();
    for draft in [format(), kernel(), os(), program(ComponentId::of(b""))] {
        for (path, thing) in draft.things {
            // The root's own entry is the OS's; what is shared has equal metadata.
            all.insert(path, thing);
        }
    }
    all.retain(|path, _| !path.starts_with(b"boot/efi/") && !path.starts_with(b"usr/share/doc"));
    let literal = |content: &str| Thing { meta: meta(0o644), ..file(content) };
    all.insert(b"etc/passwd".to_vec(), literal("root:x:0:0::/root:/bin/sh\nredis:x:120:120::/:/bin/false\n"));
    all.insert(b"var/status".to_vec(), literal("Package: os\nStatus: ok\n\nPackage: redis\nStatus: ok\n\n"));
    let links = all[&b"usr/bin/links"[..]].clone();
    for path in [b"usr/lib/link".to_vec(), b"usr/lib/link2".to_vec()] {
        all.insert(path, links.clone());
    }
    // A directory's links are itself, its name, and the parents of its directories.
    let directories: Vec<Vec<u8>> =
        all.iter().filter(|(_, t)| t.what == What::Directory).map(|(p, _)| p.clone()).collect();
    for path in directories.iter().filter(|p| !p.is_empty()) {
        let parent = path.iter().rposition(|b| *b == b'/').map_or(&b""[..], |i| &path[..i]);
        all.get_mut(parent).unwrap().links += 1;
    }
    // lost+found
    all.get_mut(&b""[..]).unwrap().links += 1;
    all
}
