//! Content that lies: manifests, trees, packs and chunk maps as a hostile peer, a damaged disk or a
//! full one makes them. Each is refused with an error that names the object and the reason, without
//! memory or time out of proportion, and leaves nothing behind. In a file of its own because it
//! counts every allocation of the process; packs from a peer are in `repository/tests.rs`, frames in
//! `transfer/hostile.rs`, disks in `disk_hostile.rs`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::error::Error;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cicada::component::manifest::{limit, path_order};
use cicada::component::tree::{TreeError, unite};
use cicada::component::{Entry, EntryKind, FragmentRule, Kind, Manifest};
use cicada::compose::ComposeError;
use cicada::disk::{DiskError, DiskFile, StagedDisk};
use cicada::repository::{Repository, RepositoryError};
use cicada::types::{BlockHash, ByteSize, ComponentId, Hash, NodeHash, PackId};
use cicada::vm::chunk_map::NODE_MAGIC;
use cicada::vm::{Block, ChunkMap, MapRef};

#[path = "compose/world.rs"]
#[allow(dead_code)]
mod world;
use world::{Draft, What, World, directory, file, format, kernel, meta, noise, thing};

/// Counts what is held, and the most that was.
struct Counted;

static HELD_BYTES: AtomicI64 = AtomicI64::new(0);
static PEAK_BYTES: AtomicI64 = AtomicI64::new(0);

fn count(bytes: i64) {
    let held = HELD_BYTES.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK_BYTES.fetch_max(held, Ordering::Relaxed);
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as i64 - layout.size() as i64);
        unsafe { System.realloc(at, layout, size) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// What refusing something small may take: a frame of a pack in both forms, a repository's buffers.
const REFUSAL_BYTES_MAX: i64 = 32 << 20;

/// One test at a time, or they would count each other's memory.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `work`, which must not hold more than `limit_bytes` beyond what is held already.
fn within<T>(limit_bytes: i64, work: impl FnOnce() -> T) -> T {
    let before = HELD_BYTES.load(Ordering::Relaxed);
    PEAK_BYTES.store(before, Ordering::Relaxed);
    let result = work();
    let taken = PEAK_BYTES.load(Ordering::Relaxed) - before;
    assert!(taken <= limit_bytes, "{taken} bytes were held, {limit_bytes} are allowed");
    result
}

/// An error and all its causes.
fn chain(e: &dyn Error) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(cause) = next {
        text += &format!(": {cause}");
        next = cause.source();
    }
    text
}

fn skipped(reason: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {reason}");
}

// ---- manifests

fn sample() -> Manifest {
    let mut m = Draft::new("redis", Kind::Program)
        .fragment("etc/passwd", FragmentRule::Accounts, "redis:x:120:120::/:/bin/false\n")
        .manifest;
    let entry = |path: &str, kind| Entry { path: path.into(), meta: meta(0o755), xattrs: vec![], kind };
    let file = EntryKind::File { size_bytes: 5000, hash: Hash::of(b"x"), pack: 0, offset_bytes: 4096 };
    m.packs = vec![pack_ref(12288)];
    m.entries = vec![
        entry("a", EntryKind::Directory),
        entry("a/b", file),
        entry("a/c", EntryKind::HardLink { target: b"a/b".to_vec() }),
        entry("a/l", EntryKind::Symlink { target: b"../../etc".to_vec() }),
        entry("z", EntryKind::Whiteout),
    ];
    m
}

fn pack_ref(size_bytes: u64) -> cicada::component::PackRef {
    cicada::component::PackRef {
        id: PackId::of(b"p"),
        size_bytes,
        package: "redis".into(),
        package_version: "1".into(),
    }
}

#[test]
fn manifests_that_lead_elsewhere_are_refused_by_name_and_path() {
    let _alone = alone();
    let world = World::new();
    type Spoil = fn(&mut Manifest);
    let cases: [(&str, Spoil); 15] = [
        ("/../x is absolute or has", |m| m.entries[4].path = b"../x".to_vec()),
        ("//etc/x is absolute or has", |m| m.entries[4].path = b"/etc/x".to_vec()),
        ("/a/./x is absolute or has", |m| m.entries[3].path = b"a/./x".to_vec()),
        ("contains NUL", |m| m.entries[4].path = b"z\0".to_vec()),
        ("more than 255 bytes", |m| m.entries[4].path = vec![b'z'; 256]),
        ("a path appears twice", |m| m.entries[4] = m.entries[3].clone()),
        ("/a/l/passwd lies below what is no directory", |m| {
            let mut below = m.entries[1].clone();
            below.path = b"a/l/passwd".to_vec();
            m.entries.insert(4, below);
        }),
        ("/nowhere/x has no parent", |m| m.entries[4].path = b"nowhere/x".to_vec()),
        ("/a/c links to no file, link or device of this component", |m| {
            m.entries[2].kind = EntryKind::HardLink { target: b"etc/shadow".to_vec() };
        }),
        ("/a/c links to no file, link or device of this component", |m| {
            m.entries[2].kind = EntryKind::HardLink { target: b"a".to_vec() };
        }),
        ("/a/b lies outside its pack", |m| m.packs[0].size_bytes = 8192),
        ("/a/b lies outside its pack", |m| m.packs.clear()),
        ("not a positive multiple of 4096", |m| m.packs[0].size_bytes = 12289),
        ("is an entry too", |m| m.fragments[0].path = b"a/b".to_vec()),
        ("file size is", |m| {
            m.entries[1].kind = EntryKind::File {
                size_bytes: limit::FILE_BYTES + 1,
                hash: Hash::of(b"x"),
                pack: 0,
                offset_bytes: 0,
            };
        }),
    ];
    for (reason, spoil) in cases {
        let mut m = sample();
        spoil(&mut m);
        m.entries.sort_by(|a, b| path_order(&a.path, &b.path));
        let bytes = m.encode();
        let id = ComponentId::of(&bytes);
        let refused =
            within(REFUSAL_BYTES_MAX, || world.repository.put_manifest_bytes(&id, &bytes)).unwrap_err();
        assert!(matches!(refused, RepositoryError::Codec { .. }), "{refused:?}");
        let text = chain(&refused);
        assert!(text.contains(&id.to_string()) && text.contains(reason), "{reason}: {text}");
        assert!(!world.repository.has_manifest(&id));
    }
    assert!(world.repository.components().unwrap().is_empty());
    assert_eq!(world.leftovers(), [""; 0]);
}

#[test]
fn counts_that_lie_take_no_memory() {
    let _alone = alone();
    let world = World::new();
    let honest = sample().encode();
    // A count in place of every byte: whatever it counts, so many are not there.
    for at in 8..honest.len() {
        for count in [&[0xff, 0xff, 0x7f][..], &[0xff; 9], &[0xff, 0xff, 0xff, 0xff, 0x0f]] {
            let lie = [&honest[..at], count].concat();
            if lie.len() == honest.len() {
                // Only the last bytes are others, and those are anything.
                continue;
            }
            let id = ComponentId::of(&lie);
            let put = within(1 << 20, || world.repository.put_manifest_bytes(&id, &lie));
            assert!(matches!(put, Err(RepositoryError::Codec { .. })), "{at}: {put:?}");
        }
    }
}

// ---- components together

fn member(draft: Draft, requires: &[ComponentId]) -> (ComponentId, Arc<Manifest>) {
    let mut m = draft.manifest;
    m.requires = requires.to_vec();
    for (path, thing) in draft.things {
        let kind = match thing.what {
            What::Symlink(target) => EntryKind::Symlink { target },
            What::File(_) => EntryKind::File { size_bytes: 0, hash: Hash::of(b""), pack: 0, offset_bytes: 0 },
            What::HardLink(target) => EntryKind::HardLink { target },
            _ => EntryKind::Directory,
        };
        m.entries.push(Entry { path, meta: thing.meta, xattrs: thing.xattrs, kind });
    }
    m.check().unwrap();
    (m.id(), Arc::new(m))
}

#[test]
fn no_component_reaches_through_the_links_of_another() {
    let _alone = alone();
    let link = thing(0o777, What::Symlink(b"/var".to_vec()));
    let os = member(Draft::new("os", Kind::Os).with("etc", directory()).with("opt", link.clone()), &[]);
    let below = || Draft::new("evil", Kind::Program).with("opt", directory()).with("opt/x", file("x"));
    let fragment =
        || Draft::new("part", Kind::Program).fragment("opt/passwd", FragmentRule::Set, "root::0:0:::\n");
    let replaced =
        || Draft::new("swap", Kind::Program).with("etc", thing(0o777, What::Symlink(b"/home".to_vec())));
    let file_in_etc =
        member(Draft::new("conf", Kind::Program).with("etc", directory()).with("etc/c", file("")), &[os.0]);

    let conflict = |members: &[_]| unite(members, false).unwrap_err();
    match conflict(&[os.clone(), member(below(), &[])]) {
        TreeError::Path { path, first, second, difference } => {
            assert_eq!((path.as_str(), difference), ("/opt", "kind"));
            assert_eq!([first, second], ["os@1", "evil@1"]);
        }
        other => panic!("{other:?}"),
    }
    for needs in [vec![], vec![os.0]] {
        match conflict(&[os.clone(), member(fragment(), &needs)]) {
            TreeError::BelowNoDirectory { path, component, parent, owner } => {
                assert_eq!([path.as_str(), parent.as_str()], ["/opt/passwd", "/opt"]);
                assert_eq!([component, owner], ["part@1", "os@1"]);
            }
            other => panic!("{other:?}"),
        }
    }
    // Two programs on one OS: one makes a link of a directory in which the other has a file.
    let refused = conflict(&[os.clone(), member(replaced(), &[os.0]), file_in_etc.clone()]).to_string();
    assert!(refused.contains("swap@1") && refused.contains("/etc"), "{refused}");

    // Where order decides, whatever comes out holds nothing below a link.
    for members in [
        vec![os.clone(), member(below(), &[])],
        vec![member(below(), &[]), os.clone()],
        vec![os.clone(), member(fragment(), &[])],
        vec![os.clone(), member(replaced(), &[os.0]), file_in_etc.clone()],
        vec![os.clone(), file_in_etc, member(replaced(), &[os.0])],
    ] {
        let tree = unite(&members, true).unwrap();
        for node in &tree.nodes {
            let mut parents = node.path.iter().enumerate().filter(|(_, b)| **b == b'/');
            assert!(
                parents.all(|(at, _)| matches!(
                    tree.find(&node.path[..at]).map(|n| &n.kind),
                    Some(cicada::component::tree::NodeKind::Directory)
                )),
                "{node:?}"
            );
        }
    }
}

// ---- packs on disk

/// The smallest set that makes a disk, with a file of 3 MiB in a pack of its own.
fn small_set(world: &World) -> (Vec<ComponentId>, PackId) {
    let os = Draft::new("os", Kind::Os).with("boot", directory()).with("big", file(noise(9, 3 << 20)));
    let os = os.store(&world.repository);
    let pack = world.repository.manifest(&os).unwrap().packs[0].id;
    let set = vec![os, format().store(&world.repository), kernel().store(&world.repository)];
    (set, pack)
}

fn pack_file(world: &World, id: &PackId) -> PathBuf {
    let name = id.to_string();
    world.repository.dir().join("packs").join(&name[..2]).join(format!("{name}.pack"))
}

#[test]
fn packs_cut_short_are_named_and_set_aside() {
    let _alone = alone();
    let world = World::new();
    // With plain copies nobody would look at the pack.
    world.repository.set_hot_limit(0).unwrap();
    let (set, pack) = small_set(&world);
    let path = pack_file(&world, &pack);
    let good = fs::read(&path).unwrap();
    for len in [0, 15, 16, 19, 21, good.len() / 2, good.len() - 1, good.len() + 1] {
        let mut cut = good.clone();
        cut.resize(len, 0);
        fs::write(&path, &cut).unwrap();
        let compose = || world.composer.make_recipe(&set, false, ByteSize::mib(96), "quiet");
        let text = match within(REFUSAL_BYTES_MAX, compose) {
            Err(ComposeError::Repository(e @ RepositoryError::Damaged { .. })) => e.to_string(),
            // A file too short for a header is not in the index's sense a pack at all.
            Err(e @ ComposeError::Missing { .. }) => e.to_string(),
            other => panic!("{len}: {other:?}"),
        };
        assert!(text.contains(&pack.to_string()), "{len}: {text}");
        assert_eq!(world.leftovers(), [""; 0], "{len}");
        assert!(!path.exists(), "{len}: a damaged pack is set aside");
        let mut receiver = world.repository.pack_receiver(pack, good.len() as u64).unwrap();
        receiver.write(&good).unwrap();
        receiver.finish().unwrap();
    }
    world.composer.make_recipe(&set, false, ByteSize::mib(96), "quiet").unwrap();
}

#[test]
fn a_manifest_that_claims_more_of_a_pack_than_there_is_makes_no_disk() {
    let _alone = alone();
    let world = World::new();
    let (set, pack) = small_set(&world);
    let honest = world.repository.manifest(&set[0]).unwrap();
    for (claimed_bytes, size_bytes, offset_bytes) in [
        // The file goes on beyond the pack's end, begins beyond it, or takes the disk's room many times.
        (4 << 20, 4 << 20, 0),
        (8 << 20, 4096, 7 << 20),
        (1 << 41, 1 << 41, 0),
    ] {
        let mut lying = (*honest).clone();
        lying.version = format!("{claimed_bytes}");
        lying.packs[0].size_bytes = claimed_bytes;
        for entry in &mut lying.entries {
            if let EntryKind::File { size_bytes: size, offset_bytes: offset, .. } = &mut entry.kind {
                (*size, *offset) = (size_bytes, offset_bytes);
            }
        }
        let id = world.repository.put_manifest(&lying).unwrap();
        let set = [vec![id], set[1..].to_vec()].concat();
        for hot in [false, true] {
            if hot {
                world.repository.hot_pack(&pack).unwrap();
            }
            let compose = || world.composer.make_recipe(&set, false, ByteSize::mib(96), "quiet");
            let refused = within(REFUSAL_BYTES_MAX, compose).unwrap_err();
            let text = chain(&refused);
            assert!(
                text.contains(&pack.to_string()) || matches!(refused, ComposeError::TooSmall { .. }),
                "{claimed_bytes}, hot {hot}: {text}"
            );
            assert_eq!(world.leftovers(), [""; 0], "{claimed_bytes}, hot {hot}");
        }
    }
}

// ---- chunk maps

/// A node as bytes, children before parents; stored unless `put` refuses.
fn node(level: u8, children: &[(u8, NodeHash)]) -> (NodeHash, Vec<u8>) {
    let mut bytes = [&NODE_MAGIC[..], &[level]].concat();
    let n = children.len();
    if n < 128 {
        bytes.push(n as u8)
    } else {
        bytes.extend([n as u8 | 0x80, (n >> 7) as u8])
    }
    for (place, child) in children {
        bytes.push(*place);
        if level == 0 {
            bytes.push(0);
        } else {
            bytes.extend_from_slice(child.as_bytes());
        }
    }
    (NodeHash::of(&bytes), bytes)
}

fn put(repository: &Repository, level: u8, children: &[(u8, NodeHash)]) -> NodeHash {
    let (hash, bytes) = node(level, children);
    repository.put_node(hash, &bytes).unwrap();
    hash
}

#[test]
fn absurd_trees_are_refused_by_name() {
    let _alone = alone();
    let world = World::new();
    let r = &world.repository;
    let everywhere = |child: NodeHash| (0..=255).map(|p| (p, child)).collect::<Vec<_>>();
    let nobody = NodeHash::of(b"");
    let leaf = put(r, 0, &everywhere(nobody));
    let (one, two) = (put(r, 1, &everywhere(leaf)), put(r, 1, &[(0, leaf)]));
    let three = put(r, 2, &everywhere(one));
    let giant = put(r, 3, &everywhere(three));
    let deep = put(r, 255, &[(0, leaf)]);
    let far = put(r, 1, &[(255, leaf)]);
    let wrong_child = put(r, 2, &[(0, leaf)]);
    let skips = put(r, 1, &[(0, two)]);
    let map = |disk_size_bytes, root| MapRef { block_size_bytes: 4096, disk_size_bytes, root: Some(root) };
    let cases = [
        (map(1 << 44, giant), "16777216 leaves, more than 262144"),
        (map(1 << 33, deep), "level 255 where 2 belongs"),
        (map(1 << 20, deep), "level 255 where 0 belongs"),
        (map(1 << 33, wrong_child), "level 0 where 1 belongs"),
        (map(1 << 28, skips), "level 1 where 0 belongs"),
        (map(1 << 27, far), "beyond the end of a disk of 134217728 bytes"),
        (map(4096, leaf), "beyond the end of a disk of 4096 bytes"),
        (map(0, leaf), "beyond the end of a disk of 0 bytes"),
        (map((1 << 44) + 1, leaf), "outside the limits"),
        (MapRef { block_size_bytes: 0, ..map(4096, leaf) }, "outside the limits"),
        (MapRef { block_size_bytes: 1 << 31, ..map(4096, leaf) }, "outside the limits"),
    ];
    for (map, reason) in cases {
        let refused = within(REFUSAL_BYTES_MAX, || r.map(&map)).unwrap_err();
        let text = chain(&refused);
        assert!(text.contains(&map.id().to_string()) && text.contains(reason), "{reason}: {text}");
        // The traversal that says what to fetch sees each node once, and lies of level and shape.
        match within(REFUSAL_BYTES_MAX, || r.nodes_missing(&map)) {
            Ok(missing) => assert!(missing.is_empty(), "{reason}"),
            Err(e) => assert!(chain(&e).contains(&map.id().to_string()), "{reason}: {e}"),
        }
    }
    // A child that nobody has is missing, by name, and no map.
    let dangling = put(r, 1, &[(0, nobody)]);
    assert_eq!(r.nodes_missing(&map(1 << 28, dangling)).unwrap(), [(nobody, 0)]);
    match r.map(&map(1 << 28, dangling)) {
        Err(RepositoryError::Missing { object }) => assert!(object.to_string().contains(&nobody.to_string())),
        other => panic!("{other:?}"),
    }
    // What is no node is not taken at all.
    let (empty, unsorted) = (node(1, &[]), node(0, &[(3, nobody), (3, nobody)]));
    for (hash, bytes) in [empty, unsorted, (NodeHash::of(&[7; 9000]), vec![7; 9000]), (leaf, vec![1])] {
        let refused = r.put_node(hash, &bytes).unwrap_err().to_string();
        assert!(refused.contains(&hash.to_string()), "{refused}");
    }
    assert_eq!(world.leftovers(), [""; 0]);
}

#[test]
fn a_map_of_another_disk_is_not_staged() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("user-data");
    let shape = MapRef { block_size_bytes: 16 << 10, disk_size_bytes: 1 << 20, root: None };
    let open = |shape: &MapRef| StagedDisk::open_or_create(DiskFile::UserData { raw: raw.clone() }, shape);
    for bad in [
        MapRef { block_size_bytes: 12345, ..shape },
        MapRef { block_size_bytes: 2 << 20, ..shape },
        MapRef { disk_size_bytes: 1 << 50, ..shape },
    ] {
        assert!(matches!(open(&bad), Err(DiskError::WrongMap { .. })));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is made for it");
    }
    let mut staged = open(&shape).unwrap();
    let data = Block::Data(BlockHash::of(b"x"));
    for (map, reason) in [
        (ChunkMap { blocks: vec![(64, data)], ..ChunkMap::empty(16 << 10, 1 << 20) }, "beyond the end"),
        (ChunkMap { blocks: vec![(u64::MAX, data)], ..ChunkMap::empty(16 << 10, 1 << 20) }, "beyond the end"),
        (
            ChunkMap { blocks: vec![(3, data), (2, data)], ..ChunkMap::empty(16 << 10, 1 << 20) },
            "out of order",
        ),
        (ChunkMap::empty(4096, 1 << 20), "in blocks of 4096"),
        (ChunkMap::empty(16 << 10, 1 << 44), "a disk of 17592186044416 bytes"),
    ] {
        let refused = within(1 << 20, || staged.begin(&map)).unwrap_err().to_string();
        assert!(refused.contains("user-data") && refused.contains(reason), "{refused}");
    }
}

// ---- a full disk

struct Tmpfs<'a>(&'a Path);

impl<'a> Tmpfs<'a> {
    fn mount(dir: &'a Path, size: &str) -> Option<Self> {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(dir);
        let done = mount.stdout(Stdio::null()).stderr(Stdio::null()).status();
        done.is_ok_and(|s| s.success()).then_some(Self(dir))
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0).status();
    }
}

#[test]
fn a_full_disk_is_said_and_what_was_stored_stays() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let Some(_mounted) = Tmpfs::mount(dir.path(), "24m") else {
        skipped("no right to mount a small file system");
        return;
    };
    let repository = Repository::create(&dir.path().join("repository")).unwrap();
    let (_other_dir, other) = {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::create(&dir.path().join("repository")).unwrap();
        (dir, repository)
    };
    let pack_of = |repository: &Repository, seed, len: usize| {
        let mut writer = repository.pack_writer()?;
        writer.append(&mut noise(seed, len).as_slice(), len as u64)?;
        writer.finish()
    };
    let kept = pack_of(&repository, 1, 1 << 20).unwrap().unwrap();
    let kept_map = ChunkMap { blocks: vec![(7, Block::Zero)], ..ChunkMap::empty(4096, 1 << 20) };
    let kept_map_name = repository.put_map(&kept_map).unwrap().0;
    let no_space = |what: &str, result: Result<(), RepositoryError>| match result {
        Err(e @ RepositoryError::NoSpace { .. }) => {
            assert!(e.to_string().contains("repository"), "{what}: {e}");
            let left = fs::read_dir(repository.temporary_dir()).unwrap().count();
            assert_eq!(left, 0, "{what}: nothing stays in temporary/");
        }
        other => panic!("{what}: {other:?}"),
    };
    no_space("a pack that grows too large", pack_of(&repository, 2, 40 << 20).map(drop));

    // Room when it was promised, gone when it comes.
    let (id, _) = pack_of(&other, 3, 4 << 20).unwrap().unwrap();
    let mut stored = Vec::new();
    std::io::Read::read_to_end(&mut other.pack_stored(&id).unwrap().file, &mut stored).unwrap();
    let mut receiver = repository.pack_receiver(id, stored.len() as u64).unwrap();
    receiver.write(&stored[..100_000]).unwrap();
    let filler = dir.path().join("filler");
    let mut file = OpenOptions::new().write(true).create_new(true).open(&filler).unwrap();
    while std::io::Write::write(&mut file, &[1; 4096]).is_ok() {}
    drop(file);
    let rest = receiver.write(&stored[100_000..]).and_then(|()| receiver.finish());
    no_space("a pack on its way", rest);
    no_space("a pack announced", repository.pack_receiver(id, stored.len() as u64).map(drop));
    let mut large = sample();
    large.origin = String::from_utf8(noise(4, 500).iter().map(|b| b'a' + b % 26).collect()).unwrap();
    let blocks = (0..20_000u64).map(|n| (n, Block::Data(BlockHash::of(&n.to_le_bytes())))).collect();
    no_space(
        "a chunk map",
        repository.put_map(&ChunkMap { blocks, ..ChunkMap::empty(4096, 1 << 40) }).map(drop),
    );

    // What was there is whole, and with room again everything goes on.
    assert_eq!(repository.map(&kept_map_name).unwrap(), kept_map);
    repository.read_pack(&kept.0, &mut |_, _| Ok(())).unwrap();
    fs::remove_file(&filler).unwrap();
    let mut receiver = repository.pack_receiver(id, stored.len() as u64).unwrap();
    receiver.write(&stored).unwrap();
    receiver.finish().unwrap();
    let manifest = repository.put_manifest(&large).unwrap();
    assert_eq!(*repository.manifest(&manifest).unwrap(), large);
    let report = repository.check(&mut |_, _| {}).unwrap();
    assert!(report.damaged.is_empty(), "{:?}", report.damaged);
}
