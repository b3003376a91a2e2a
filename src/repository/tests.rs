//! The repository as its users see it.

mod archive;

use std::io::Read;
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;

use super::frame::{FRAME_BYTES, Header};
use super::*;
use crate::component::manifest::{
    ALIGNMENT_BYTES, Entry as FileEntry, EntryKind, Kind, Manifest, Meta, PackRef,
};
use crate::component::{DiskParameters, Recipe};
use crate::sparse::Run;
use crate::types::{BlockHash, ComponentId, Hash, ImageDigest, NodeHash, PackId, RecipeId};
use crate::vm::{Block, ChunkMap};

/// No grace: what no root reaches goes at once.
const NOW: Duration = Duration::ZERO;
const DAY: Duration = Duration::from_secs(86_400);

fn repository() -> (TempDir, Repository) {
    let dir = tempfile::tempdir().unwrap();
    let repository = Repository::create(dir.path()).unwrap();
    (dir, repository)
}

/// Bytes that do not compress, different for each seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

fn put_pack(repository: &Repository, content: &[u8]) -> (PackId, u64) {
    let mut writer = repository.pack_writer().unwrap();
    let (offset_bytes, hash) = writer.append(&mut &content[..], content.len() as u64).unwrap();
    assert_eq!((offset_bytes, hash), (0, Hash::of(content)));
    writer.finish().unwrap().unwrap()
}

fn plain(repository: &Repository, id: &PackId) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    repository.read_pack(id, &mut |offset, run| {
        assert_eq!(offset, out.len() as u64);
        match run {
            Run::Data(bytes) => out.extend_from_slice(bytes),
            Run::Zeros(len) => out.resize(out.len() + len as usize, 0),
        }
        Ok(())
    })?;
    Ok(out)
}

fn stored(repository: &Repository, id: &PackId) -> Vec<u8> {
    let mut bytes = Vec::new();
    repository.pack_stored(id).unwrap().file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn pack_path(repository: &Repository, id: &PackId) -> PathBuf {
    repository.layout().object_path(&ObjectId::Pack(*id))
}

fn flip_byte(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x40;
    fs::write(path, bytes).unwrap();
}

fn files_in(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

fn component(name: &str, version: &str, requires: Vec<ComponentId>, packs: &[(PackId, u64)]) -> Manifest {
    let meta = Meta { mode: 0o644, uid: 0, gid: 0, mtime_s: 0 };
    let hash = Hash::of(name.as_bytes());
    let entries = if packs.is_empty() {
        Vec::new()
    } else {
        let kind = EntryKind::File { size_bytes: 1, hash, pack: 0, offset_bytes: 0 };
        vec![FileEntry { path: b"file".to_vec(), meta, xattrs: Vec::new(), kind }]
    };
    Manifest {
        name: name.into(),
        version: version.into(),
        kind: Kind::Program,
        architecture: "amd64".into(),
        origin: String::new(),
        licences: Vec::new(),
        requires,
        conflicts: Vec::new(),
        packs: packs
            .iter()
            .map(|(id, size_bytes)| PackRef {
                id: *id,
                size_bytes: *size_bytes,
                package: name.into(),
                package_version: version.into(),
            })
            .collect(),
        entries,
        fragments: Vec::new(),
    }
}

fn bound(repository: &Repository, manifest: &Manifest) -> ComponentId {
    let id = repository.put_manifest(manifest).unwrap();
    repository.bind_component(manifest, id).unwrap();
    id
}

fn recipe_of(components: Vec<ComponentId>) -> Recipe {
    let disk = DiskParameters::derived(&components, 1 << 30, 32 << 20, "");
    Recipe { composer: "test/1".into(), components, ordered: false, disk, image_digest: ImageDigest::of(b"") }
}

fn map_of(blocks: impl IntoIterator<Item = u64>) -> ChunkMap {
    let blocks = blocks.into_iter().map(|n| (n, Block::Data(BlockHash::of(&n.to_le_bytes())))).collect();
    ChunkMap { blocks, ..ChunkMap::empty(4096, 4096 * 1_000_000) }
}

fn reopen(dir: &TempDir, repository: Repository) -> Repository {
    drop(repository);
    Repository::open(dir.path()).unwrap()
}

// ---- packs

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Contents of any size lie where the writer says, aligned, padded with zeros, in order.
    #[test]
    fn packs_hold_what_went_in_where_the_writer_says(
        sizes in proptest::collection::vec(prop_oneof![0usize..10_000, 1_040_000usize..1_060_000, Just(4096), Just(1 << 20)], 1..6),
        compressible: bool,
    ) {
        let (_dir, repository) = repository();
        let mut writer = repository.pack_writer().unwrap();
        let mut contents = Vec::new();
        for (n, size) in sizes.into_iter().enumerate() {
            let content = if compressible { vec![n as u8; size] } else { noise(n as u64, size) };
            let (offset_bytes, hash) = writer.append(&mut &content[..], size as u64).unwrap();
            prop_assert_eq!(offset_bytes % ALIGNMENT_BYTES, 0);
            prop_assert_eq!(hash, Hash::of(&content));
            contents.push((offset_bytes as usize, content));
        }
        let Some((id, size_bytes)) = writer.finish().unwrap() else {
            prop_assert!(contents.iter().all(|(_, content)| content.is_empty()));
            return Ok(());
        };
        let mut expected = Vec::new();
        for (offset, content) in contents.iter().filter(|(_, content)| !content.is_empty()) {
            prop_assert_eq!(*offset, expected.len());
            expected.extend_from_slice(content);
            expected.resize(expected.len().next_multiple_of(4096), 0);
        }
        prop_assert_eq!(size_bytes, expected.len() as u64);
        prop_assert_eq!(id, PackId::of(&expected));
        prop_assert!(plain(&repository, &id).unwrap() == expected);

        let mut hot = Vec::new();
        repository.hot_pack(&id).unwrap().read_to_end(&mut hot).unwrap();
        prop_assert!(hot == expected);

        // The stored form carries it to another repository, in pieces of any size.
        let (_dir, other) = self::repository();
        let bytes = stored(&repository, &id);
        let mut receiver = other.pack_receiver(id, bytes.len() as u64).unwrap().expect_plain_size(size_bytes);
        for piece in bytes.chunks(70_001) {
            receiver.write(piece).unwrap();
        }
        receiver.finish().unwrap();
        prop_assert!(plain(&other, &id).unwrap() == expected);
        prop_assert!(stored(&other, &id) == bytes);
    }
}

#[test]
fn nothing_appended_is_no_pack_and_leaves_no_file() {
    let (_dir, repository) = repository();
    let mut writer = repository.pack_writer().unwrap();
    assert_eq!(writer.append(&mut &b""[..], 0).unwrap(), (0, Hash::of(b"")));
    assert!(writer.finish().unwrap().is_none());
    assert_eq!(files_in(repository.temporary_dir()), 0);
}

#[test]
fn a_content_that_ends_early_spoils_the_writer_and_leaves_no_file() {
    let (_dir, repository) = repository();
    let mut writer = repository.pack_writer().unwrap();
    let e = writer.append(&mut &b"short"[..], 6).unwrap_err();
    assert!(matches!(e, RepositoryError::Invalid { .. }), "{e}");
    assert!(writer.append(&mut &b"more"[..], 4).is_err());
    assert!(writer.finish().is_err());
    assert_eq!(files_in(repository.temporary_dir()), 0);
}

#[test]
fn the_same_content_is_stored_once() {
    let (_dir, repository) = repository();
    let a = put_pack(&repository, &noise(1, 100_000));
    let before = repository.stats().unwrap().objects;
    assert_eq!(put_pack(&repository, &noise(1, 100_000)), a);
    assert_eq!(repository.stats().unwrap().objects, before);
    assert_eq!((before.packs.count, before.packs.plain_bytes), (1, 102_400));
    let on_disk = fs::metadata(pack_path(&repository, &a.0)).unwrap().len();
    assert_eq!(before.packs.stored_bytes, on_disk);
}

#[test]
fn every_flipped_bit_and_truncation_of_a_pack_is_found_and_healed_by_a_fresh_copy() {
    let (_dir, repository) = repository();
    let content = [vec![3; 1 << 20], noise(7, 5000)].concat();
    let (id, _) = put_pack(&repository, &content);
    let path = pack_path(&repository, &id);
    let good = fs::read(&path).unwrap();
    let spoiled = (0..good.len()).step_by(37).map(|at| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        bytes
    });
    let cut = [0, 1, 15, 16, 19, 20, good.len() - 1].map(|n| good[..n].to_vec());
    let longer = [[good.as_slice(), b"x"].concat()];
    for bytes in spoiled.chain(cut).chain(longer) {
        fs::write(&path, bytes).unwrap();
        match plain(&repository, &id) {
            Err(RepositoryError::Damaged { object, path, .. }) => {
                assert_eq!(object, ObjectId::Pack(id));
                assert!(path.starts_with(repository.dir().join("quarantine")) && path.exists());
            }
            // A bit zstd does not care about: what came out was verified.
            Ok(bytes) => assert!(bytes.starts_with(&content)),
            Err(e) => panic!("{e}"),
        }
        assert!(!repository.has_pack(&id) || path.exists());
        put_pack(&repository, &content);
        assert!(plain(&repository, &id).is_ok());
    }
    assert_eq!(files_in(&repository.dir().join("quarantine")), 0);
}

#[test]
fn a_file_that_vanished_is_missing_whatever_the_index_says() {
    let (_dir, repository) = repository();
    let (id, _) = put_pack(&repository, b"content");
    assert!(repository.has_pack(&id));
    fs::remove_file(pack_path(&repository, &id)).unwrap();
    assert!(!repository.has_pack(&id));
    assert!(matches!(plain(&repository, &id), Err(RepositoryError::Missing { .. })));
    assert!(matches!(repository.pack_stored(&id), Err(RepositoryError::Missing { .. })));
    assert!(matches!(repository.hot_pack(&id), Err(RepositoryError::Missing { .. })));
    assert_eq!(repository.stats().unwrap().objects.packs.count, 0);
}

/// Sends `bytes` as the stored form of `id`, saying it has `claimed_bytes`.
fn receive(repository: &Repository, id: PackId, claimed_bytes: u64, bytes: &[u8]) -> Result<()> {
    let mut receiver = repository.pack_receiver(id, claimed_bytes)?;
    for piece in bytes.chunks(1000) {
        receiver.write(piece)?;
    }
    receiver.finish()
}

#[test]
fn a_lying_peer_is_refused_and_leaves_nothing() {
    let (_dir, repository) = repository();
    let content = [vec![0; 3 << 20], noise(1, 4096)].concat();
    let (source_dir, source) = self::repository();
    let (id, _) = put_pack(&source, &content);
    let good = stored(&source, &id);
    let len = good.len() as u64;

    let header = |plain_bytes| Header { plain_bytes, frame_bytes: FRAME_BYTES }.encode();
    let bomb = {
        // One frame that claims 4096 plain bytes and holds 64 MiB.
        let frame = zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap();
        let frame = &frame[..frame.len().min(4096)];
        [header(4096).as_slice(), &(frame.len() as u32).to_le_bytes(), frame].concat()
    };
    let huge_plain = [header(1 << 42).as_slice(), &[0; 100]].concat();
    let long_frame = [header(4096).as_slice(), &u32::MAX.to_le_bytes(), &[0; 100]].concat();
    let empty_frame = [header(4096).as_slice(), &0u32.to_le_bytes(), &[0; 100]].concat();
    let mut flipped = good.clone();
    flipped[60] ^= 1;
    let n = |bytes: &[u8]| bytes.len() as u64;
    let cases: [(&str, u64, &[u8]); 12] = [
        ("bomb", n(&bomb), &bomb),
        ("plain size beyond the stored", n(&huge_plain), &huge_plain),
        ("frame length beyond the frame", n(&long_frame), &long_frame),
        ("empty frame", n(&empty_frame), &empty_frame),
        ("truncated", len, &good[..good.len() - 1]),
        ("claims less", len - 1, &good),
        ("claims more", len + 1, &good),
        ("claims the impossible", u64::MAX, &good),
        ("nothing", 0, b""),
        ("not a pack", 100, &[7; 100]),
        ("flipped bit", len, &flipped),
        ("goes on after the end", len + 5, &[good.as_slice(), b"extra"].concat()),
    ];
    for (what, claimed_bytes, bytes) in cases {
        match receive(&repository, id, claimed_bytes, bytes) {
            Err(RepositoryError::Refused { object, .. }) => assert_eq!(object, ObjectId::Pack(id), "{what}"),
            other => panic!("{what}: {other:?}"),
        }
    }
    // Right bytes under a wrong id, and another plain size than the manifest's.
    assert!(matches!(
        receive(&repository, PackId::of(b"other"), len, &good),
        Err(RepositoryError::Refused { .. })
    ));
    let mut receiver = repository.pack_receiver(id, len).unwrap().expect_plain_size(4096);
    assert!(receiver.write(&good).is_err());
    assert!(receiver.write(&good).is_err(), "refused once, refused for good");
    assert!(receiver.finish().is_err());

    assert!(!repository.has_pack(&id));
    assert_eq!(files_in(repository.temporary_dir()), 0);
    assert_eq!(repository.stats().unwrap().objects, ByKind::default());
    receive(&repository, id, len, &good).unwrap();
    receive(&repository, id, len, &good).unwrap();
    assert_eq!(repository.stats().unwrap().objects.packs.count, 1);
    assert_eq!(files_in(repository.temporary_dir()), 0);
    drop(source_dir);
}

#[test]
fn more_than_the_disk_holds_is_refused_before_it_comes() {
    let (_dir, repository) = repository();
    match repository.pack_receiver(PackId::of(b"p"), 1 << 42).map(drop) {
        Err(RepositoryError::NoSpace { need_bytes, have_bytes, .. }) => {
            assert!(need_bytes == 1 << 42 && have_bytes < need_bytes);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(files_in(repository.temporary_dir()), 0);
}

#[test]
fn hot_packs_are_evicted_oldest_first_but_not_while_open() {
    let (_dir, repository) = repository();
    let packs: Vec<PackId> = (0..4).map(|n| put_pack(&repository, &noise(n, 4096)).0).collect();
    repository.set_hot_limit(2 * 4096).unwrap();
    let is_hot = |id: &PackId| {
        let name = id.to_string();
        repository.dir().join("hot").join(&name[..2]).join(name).exists()
    };
    let age = |id: &PackId, days: u32| {
        let file = repository.hot_pack(id).unwrap();
        file.set_modified(std::time::SystemTime::now() - days * DAY).unwrap();
        file
    };
    let leased = age(&packs[0], 3);
    drop(age(&packs[1], 2));
    drop(repository.hot_pack(&packs[2]).unwrap());
    assert!(is_hot(&packs[0]) && !is_hot(&packs[1]) && is_hot(&packs[2]));
    drop(leased);
    drop(repository.hot_pack(&packs[3]).unwrap());
    assert!(!is_hot(&packs[0]) && is_hot(&packs[2]) && is_hot(&packs[3]));
    assert_eq!(repository.stats().unwrap().hot.size_bytes, 2 * 4096);
}

// ---- opening

#[test]
fn a_second_opener_is_told_who_holds_it() {
    let (dir, repository) = repository();
    match Repository::open(dir.path()) {
        Err(e @ RepositoryError::Locked { pid: Some(pid), .. }) => {
            assert_eq!(pid, std::process::id());
            assert!(e.to_string().contains(&pid.to_string()));
        }
        other => panic!("{other:?}"),
    }
    let clone = repository.clone();
    drop(repository);
    assert!(Repository::open(dir.path()).is_err(), "a clone still holds it");
    drop(clone);
    Repository::open_or_create(dir.path()).unwrap();
    assert!(Repository::create(dir.path()).is_err());
    assert!(matches!(
        Repository::open(&dir.path().join("nowhere")),
        Err(RepositoryError::NotARepository { .. })
    ));
}

#[test]
fn a_deleted_damaged_or_stale_index_is_made_anew() {
    let (dir, mut repository) = repository();
    let pack = put_pack(&repository, b"content");
    let id = bound(&repository, &component("redis", "7", vec![], &[pack]));
    let recipe = repository.put_recipe(&recipe_of(vec![id])).unwrap();
    let map = repository.put_map(&map_of(0..1000)).unwrap().0;
    let stats = repository.stats().unwrap();
    type Spoil = fn(&Path);
    let spoils: [(&str, Spoil); 4] = [
        ("deleted", |index| fs::remove_dir_all(index).unwrap()),
        ("junk", |index| fs::write(index.join("db"), [9; 5000]).unwrap()),
        ("empty", |index| fs::write(index.join("db"), []).unwrap()),
        ("not closed", |index| fs::write(index.with_file_name("unclean"), "another boot").unwrap()),
    ];
    for (what, spoil) in spoils {
        drop(repository);
        spoil(&dir.path().join("index"));
        repository = Repository::open(dir.path()).unwrap();
        assert_eq!(repository.stats().unwrap(), stats, "{what}");
        assert!(repository.has_pack(&pack.0) && repository.has_recipe(&recipe), "{what}");
        assert_eq!(repository.resolve_component("redis").unwrap(), id, "{what}");
        assert_eq!(repository.map(&map).unwrap(), map_of(0..1000), "{what}");
    }
    assert_eq!(repository.rebuild_index().unwrap(), stats.objects.total().count);
    assert_eq!(repository.stats().unwrap(), stats);
}

/// sled silently drops what lies behind damage in its log; entries lost that way are found again.
#[test]
fn bits_flipped_in_the_index_lose_no_object() {
    let (dir, repository) = repository();
    for n in 0..50 {
        put_pack(&repository, &noise(n, 100));
    }
    drop(repository);
    let log = dir.path().join("index/db");
    for round in 0..40 {
        let len = fs::metadata(&log).unwrap().len();
        for place in noise(round, 64).chunks_exact(8) {
            let place = u64::from_le_bytes(place.try_into().unwrap());
            flip_byte(&log, (place % len) as usize);
        }
        let repository = Repository::open(dir.path()).unwrap();
        assert_eq!(repository.stats().unwrap().objects.packs.count, 50, "round {round}");
    }
}

#[test]
fn what_a_killed_process_left_is_removed_and_what_it_finished_is_found() {
    let (dir, repository) = repository();
    let kept = put_pack(&repository, b"kept").0;
    let gone = put_pack(&repository, b"gone").0;
    let (_other_dir, other) = self::repository();
    let late = put_pack(&other, b"late").0;
    // As after a kill: leftovers, a file renamed but not indexed, one removed but still indexed.
    let (from, to) = (pack_path(&other, &late), pack_path(&repository, &late));
    let removed = pack_path(&repository, &gone);
    drop(repository);
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    fs::copy(from, &to).unwrap();
    fs::remove_file(removed).unwrap();
    fs::write(dir.path().join("temporary/pack.1-1.tmp"), b"half").unwrap();
    fs::create_dir(dir.path().join("temporary/work")).unwrap();
    fs::write(dir.path().join("temporary/work/file"), b"half").unwrap();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    fs::write(dir.path().join("unclean"), boot).unwrap();
    let repository = Repository::open(dir.path()).unwrap();
    assert!(repository.has_pack(&kept) && repository.has_pack(&late) && !repository.has_pack(&gone));
    assert_eq!(files_in(repository.temporary_dir()), 0);
    assert_eq!(repository.stats().unwrap().objects.packs.count, 2);
}

#[test]
fn hot_copies_outlive_a_killed_process_but_not_a_machine_that_went_down() {
    let (dir, repository) = repository();
    let (id, _) = put_pack(&repository, b"content");
    repository.hot_pack(&id).unwrap();
    let mut repository = reopen(&dir, repository);
    assert_eq!(repository.stats().unwrap().hot.files, 1);
    let boot = fs::read_to_string(dir.path().join("unclean")).unwrap();
    for (boot, files) in [(boot, 1), ("another".to_owned(), 0)] {
        drop(repository);
        fs::write(dir.path().join("unclean"), boot).unwrap();
        repository = Repository::open(dir.path()).unwrap();
        assert_eq!(repository.stats().unwrap().hot.files, files);
    }
}

// ---- manifests, recipes, refs

#[test]
fn records_round_trip_and_strangers_bytes_are_refused() {
    let (dir, repository) = repository();
    let manifest = component("redis", "7", vec![], &[(PackId::of(b"p"), 4096)]);
    let bytes = manifest.encode();
    let id = repository.put_manifest(&manifest).unwrap();
    assert_eq!(id, manifest.id());
    assert_eq!(*repository.manifest(&id).unwrap(), manifest);
    assert_eq!(repository.manifest_bytes(&id).unwrap(), bytes);
    repository.put_manifest_bytes(&id, &bytes).unwrap();
    assert_eq!(repository.stats().unwrap().objects.manifests.count, 1);

    let recipe = recipe_of(vec![id]);
    let recipe_id = repository.put_recipe(&recipe).unwrap();
    let repository = reopen(&dir, repository);
    assert_eq!(repository.recipe(&recipe_id).unwrap(), recipe);
    assert_eq!(repository.recipe_bytes(&recipe_id).unwrap(), recipe.encode());

    let other = ComponentId::of(b"other");
    assert!(matches!(repository.put_manifest_bytes(&other, &bytes), Err(RepositoryError::Refused { .. })));
    let junk = ComponentId::of(b"junk");
    assert!(matches!(repository.put_manifest_bytes(&junk, b"junk"), Err(RepositoryError::Codec { .. })));
    let mut bad = manifest.clone();
    bad.name = "../redis".into();
    assert!(matches!(repository.put_manifest(&bad), Err(RepositoryError::Codec { .. })));
    assert!(repository.put_recipe_bytes(&RecipeId::of(b"junk"), b"junk").is_err());
    assert!(matches!(repository.manifest(&other), Err(RepositoryError::Missing { .. })));
    assert!(!repository.has_manifest(&junk) && !repository.has_recipe(&RecipeId::of(b"junk")));
    assert_eq!(files_in(repository.temporary_dir()), 0);
}

#[test]
fn a_damaged_manifest_is_found_set_aside_and_healed() {
    let (dir, repository) = repository();
    let manifest = component("redis", "7", vec![], &[]);
    let id = bound(&repository, &manifest);
    let path = repository.layout().object_path(&ObjectId::Manifest(id));
    for at in 0..fs::metadata(&path).unwrap().len() as usize {
        flip_byte(&path, at);
        match repository.manifest_bytes(&id) {
            Err(RepositoryError::Damaged { .. }) => {
                assert!(!repository.has_manifest(&id));
                // Roots that cannot be followed stop the collector.
                assert!(matches!(repository.gc(false, NOW, &[]), Err(RepositoryError::Damaged { .. })));
                repository.put_manifest(&manifest).unwrap();
            }
            Ok(bytes) => {
                assert_eq!(bytes, manifest.encode());
                flip_byte(&path, at);
            }
            Err(e) => panic!("{e}"),
        }
    }
    // Found at a rebuild too, and then by the check.
    flip_byte(&path, 30);
    drop(repository);
    fs::remove_dir_all(dir.path().join("index")).unwrap();
    let repository = Repository::open(dir.path()).unwrap();
    assert!(!repository.has_manifest(&id));
    let report = repository.check(&mut |_, _| {}).unwrap();
    assert_eq!(report.damaged.len(), 1);
    assert_eq!(report.missing.len(), 1);
}

#[test]
fn refs_bind_any_name_durably_and_damage_is_loud() {
    let (dir, repository) = repository();
    let names = ["a", "a/b/c", "../../etc/passwd", "ü ∞\n", &"x".repeat(4000)];
    for kind in RefKind::ALL {
        for name in names {
            assert_eq!(repository.get_ref(kind, name).unwrap(), None);
            repository.set_ref(kind, name, b"old").unwrap();
            repository.set_ref(kind, name, kind.as_str().as_bytes()).unwrap();
        }
    }
    let repository = reopen(&dir, repository);
    for kind in RefKind::ALL {
        let listed = repository.list_refs(kind).unwrap();
        let mut expected = names.to_vec();
        expected.sort();
        assert_eq!(listed.iter().map(|r| r.0.as_str()).collect::<Vec<_>>(), expected);
        assert!(listed.iter().all(|r| r.1 == kind.as_str().as_bytes()));
        assert!(repository.remove_ref(kind, "a").unwrap());
        assert!(!repository.remove_ref(kind, "a").unwrap());
        assert_eq!(repository.get_ref(kind, "a").unwrap(), None);
    }
    assert!(repository.set_ref(RefKind::Vm, "", b"").is_err());
    assert!(repository.set_ref(RefKind::Vm, &"x".repeat(5000), b"").is_err());
    assert!(repository.set_ref(RefKind::Vm, "big", &vec![0; (1 << 20) + 1]).is_err());

    let file = fs::read_dir(dir.path().join("refs/vm")).unwrap().next().unwrap().unwrap().path();
    flip_byte(&file, 20);
    assert!(matches!(repository.list_refs(RefKind::Vm), Err(RepositoryError::DamagedRef { .. })));
    assert!(file.exists());
}

#[test]
fn components_are_found_by_name_version_and_id() {
    let (_dir, repository) = repository();
    let redis7 = bound(&repository, &component("redis", "7", vec![], &[]));
    let redis8 = bound(&repository, &component("redis", "8", vec![], &[]));
    let nginx = bound(&repository, &component("nginx", "1", vec![], &[]));
    let unbound = repository.put_manifest(&component("secret", "1", vec![], &[])).unwrap();
    assert_eq!(repository.resolve_component("nginx").unwrap(), nginx);
    assert_eq!(repository.resolve_component("redis@7").unwrap(), redis7);
    assert_eq!(repository.resolve_component(&redis8.to_string()).unwrap(), redis8);
    assert_eq!(repository.resolve_component(&redis8.to_string()[..12]).unwrap(), redis8);
    // By content it can be used; by its name only once somebody trusted bound it.
    assert_eq!(repository.resolve_component(&unbound.to_string()).unwrap(), unbound);
    for text in ["secret", "redis@9", "", "@", "ffffffffffff", "nginx@", &"x".repeat(10_000)] {
        let found = repository.resolve_component(text);
        assert!(matches!(found, Err(RepositoryError::UnknownComponent { .. })), "{text} {found:?}");
    }
    match repository.resolve_component("redis") {
        Err(e @ RepositoryError::Ambiguous { .. }) => {
            let text = e.to_string();
            assert!(text.contains("redis@7") && text.contains("redis@8"), "{text}");
        }
        other => panic!("{other:?}"),
    }
    let listed = repository.components().unwrap();
    let names: Vec<_> = listed.iter().map(|(_, s)| (s.name.as_str(), s.version.as_str(), s.bound)).collect();
    assert_eq!(
        names,
        [("nginx", "1", true), ("redis", "7", true), ("redis", "8", true), ("secret", "1", false)]
    );
}

#[test]
fn a_name_bound_anew_tells_what_it_was_bound_to() {
    let (_dir, repository) = repository();
    let first = component("redis", "7", vec![], &[]);
    let mut second = first.clone();
    second.origin = "rebuilt".into();
    let mut other_machine = first.clone();
    other_machine.architecture = "arm64".into();
    let first_id = bound(&repository, &first);
    let second_id = repository.put_manifest(&second).unwrap();
    assert_eq!(repository.bind_component(&first, first_id).unwrap(), None);
    assert_eq!(repository.bind_component(&second, second_id).unwrap(), Some(first_id));
    assert_eq!(repository.resolve_component("redis@7").unwrap(), second_id);
    let other_id = repository.put_manifest(&other_machine).unwrap();
    assert_eq!(repository.bind_component(&other_machine, other_id).unwrap(), None);
    assert!(matches!(repository.resolve_component("redis"), Err(RepositoryError::Ambiguous { .. })));
    let absent = component("absent", "1", vec![], &[]);
    assert!(matches!(repository.bind_component(&absent, absent.id()), Err(RepositoryError::Missing { .. })));
}

#[test]
fn a_component_in_use_is_not_removed() {
    let (_dir, repository) = repository();
    let os = bound(&repository, &component("debian", "12", vec![], &[]));
    let redis = bound(&repository, &component("redis", "7", vec![os], &[]));
    let in_use = |id, by: &str| match repository.remove_component(&id) {
        Err(e @ RepositoryError::InUse { .. }) => assert!(e.to_string().contains(by), "{e}"),
        other => panic!("{other:?}"),
    };
    in_use(os, "redis@7");
    let recipe = repository.put_recipe(&recipe_of(vec![os, redis])).unwrap();
    repository.set_ref(RefKind::Composition, &recipe.to_string(), b"").unwrap();
    in_use(redis, &recipe.short());
    repository.remove_ref(RefKind::Composition, &recipe.to_string()).unwrap();
    repository.remove_component(&redis).unwrap();
    repository.remove_component(&os).unwrap();
    assert!(repository.resolve_component("redis").is_err());
    assert!(matches!(
        repository.remove_component(&ComponentId::of(b"x")),
        Err(RepositoryError::Missing { .. })
    ));
}

#[test]
fn what_a_set_lacks_is_counted_once_and_exactly() {
    let (_dir, repository) = repository();
    let held = put_pack(&repository, &noise(1, 8192));
    let (absent, other) = ((PackId::of(b"a"), 4096), (PackId::of(b"b"), 12_288));
    let a = repository.put_manifest(&component("a", "1", vec![], &[held, absent])).unwrap();
    let b = repository.put_manifest(&component("b", "1", vec![], &[absent, held, other])).unwrap();
    let unknown = ComponentId::of(b"unknown");
    let report = repository.missing_packs(&[a, unknown, b, a]).unwrap();
    assert_eq!(report.manifests, [unknown]);
    assert_eq!(report.packs, [absent, other]);
    assert_eq!((report.missing_bytes, report.held_bytes), (16_384, 8192));
    assert!(!report.is_complete());
}

// ---- chunk maps

#[test]
fn maps_round_trip_and_share_what_is_equal() {
    let (dir, repository) = repository();
    let first = map_of(0..3000);
    let name = repository.put_map(&first).unwrap().0;
    let before = repository.stats().unwrap().objects.nodes.count;
    let second = map_of((0..2999).chain([500_000]));
    let second_name = repository.put_map(&second).unwrap().0;
    let added = repository.stats().unwrap().objects.nodes.count - before;
    assert!(added <= 6, "{added} new nodes for one changed leaf and one new");
    let repository = reopen(&dir, repository);
    assert_eq!(repository.map(&name).unwrap(), first);
    assert_eq!(repository.map(&second_name).unwrap(), second);
    let empty = ChunkMap::empty(4096, 4096);
    let empty_name = repository.put_map(&empty).unwrap().0;
    assert_eq!(repository.map(&empty_name).unwrap(), empty);
    assert!(repository.nodes_missing(&empty_name).unwrap().is_empty());
}

#[test]
fn a_map_is_fetched_from_the_root_down() {
    let (_a, source) = repository();
    let (dir, target) = repository();
    let map = map_of((0..400_000).step_by(97));
    let name = source.put_map(&map).unwrap().0;
    let mut rounds = 0;
    loop {
        let missing = target.nodes_missing(&name).unwrap();
        if missing.is_empty() {
            break;
        }
        for (hash, level) in missing {
            assert_eq!(level, name.levels() - 1 - rounds);
            target.put_node(hash, &source.node(&hash).unwrap()).unwrap();
        }
        rounds += 1;
    }
    assert_eq!(rounds, name.levels());
    assert_eq!(target.map(&name).unwrap(), map, "readable before it is durable");
    target.set_ref(RefKind::Vm, "vm", b"").unwrap();
    assert_eq!(files_in(target.temporary_dir()), 0);
    let target = reopen(&dir, target);
    assert_eq!(target.map(&name).unwrap(), map);

    let root = name.root.unwrap();
    let bytes = source.node(&root).unwrap();
    assert!(matches!(target.put_node(NodeHash::of(b"x"), &bytes), Err(RepositoryError::Refused { .. })));
    assert!(matches!(target.put_node(NodeHash::of(b"x"), b"x"), Err(RepositoryError::Codec { .. })));
    let large = vec![0; 10_000];
    assert!(matches!(target.put_node(NodeHash::of(&large), &large), Err(RepositoryError::Refused { .. })));
}

#[test]
fn a_damaged_node_is_named_and_healed_and_its_neighbours_stay() {
    let (dir, repository) = repository();
    let map = map_of(0..3000);
    let (name, hashes) = repository.put_map(&map).unwrap();
    let (_, nodes) = map.to_tree();
    assert!(hashes.iter().eq(nodes.iter().map(|(hash, _)| hash)));
    let (hash, bytes) = nodes[2].clone();
    let place = repository.index().get(&ObjectId::Node(hash)).unwrap().unwrap().place.unwrap();
    let bundle = nodes::bundle_path(repository.layout(), &place.bundle);
    flip_byte(&bundle, place.offset_bytes as usize + 100);
    let report = repository.check(&mut |_, _| {}).unwrap();
    assert_eq!(report.damaged.iter().map(|d| d.object).collect::<Vec<_>>(), [ObjectId::Node(hash)]);
    assert!(matches!(repository.map(&name), Err(RepositoryError::Missing { .. })));
    // A rebuild does not take the damaged bytes for the node.
    repository.rebuild_index().unwrap();
    assert_eq!(repository.nodes_missing(&name).unwrap(), [(hash, 0)]);
    repository.put_node(hash, &bytes).unwrap();
    repository.flush_nodes().unwrap();
    assert_eq!(repository.map(&name).unwrap(), map);
    repository.rebuild_index().unwrap();
    assert_eq!(repository.map(&name).unwrap(), map);
    assert_eq!(files_in(&dir.path().join("quarantine")), 0);
}

// ---- upkeep

#[test]
fn gc_keeps_what_is_referred_to_or_pinned_and_removes_the_rest() {
    let (_dir, repository) = repository();
    let pack = |n| put_pack(&repository, &noise(n, 4096));
    let os = bound(&repository, &component("debian", "12", vec![], &[pack(0)]));
    let unbound_os = repository.put_manifest(&component("debian", "11", vec![], &[pack(1)])).unwrap();
    let redis = bound(&repository, &component("redis", "7", vec![unbound_os], &[pack(2)]));
    let in_recipe = repository.put_manifest(&component("kernel", "6", vec![], &[pack(3)])).unwrap();
    let recipe = repository.put_recipe(&recipe_of(vec![os, in_recipe])).unwrap();
    repository.set_ref(RefKind::Composition, &recipe.to_string(), b"").unwrap();
    let pinned = repository.put_manifest(&component("pinned", "1", vec![], &[pack(4)])).unwrap();
    let extra = repository.put_recipe(&recipe_of(vec![pinned])).unwrap();
    let garbage = repository.put_manifest(&component("garbage", "1", vec![], &[pack(5), pack(0)])).unwrap();
    let loose = pack(6).0;
    let garbage_recipe = repository.put_recipe(&recipe_of(vec![garbage])).unwrap();
    let kept_map = repository.put_map(&map_of(0..2000)).unwrap().0;
    repository.put_map(&map_of(5000..9000)).unwrap();
    repository.hot_pack(&loose).unwrap();
    let pin = repository.pin(vec![ObjectId::Manifest(pinned)]);
    let roots = [ObjectId::Recipe(extra), ObjectId::Node(kept_map.root.unwrap())];

    let before = repository.stats().unwrap().objects;
    let dry = repository.gc(true, NOW, &roots).unwrap();
    assert_eq!(repository.stats().unwrap().objects, before);
    let nothing = repository.gc(false, DAY, &[]).unwrap();
    assert_eq!(nothing.removed, ByKind::default(), "everything is younger than a day");

    let report = repository.gc(false, NOW, &roots).unwrap();
    assert_eq!((report.removed, report.kept), (dry.removed, dry.kept));
    assert!(report.missing.is_empty());
    let counts = |t: ByKind| [t.manifests.count, t.recipes.count, t.packs.count];
    assert_eq!(counts(report.removed), [1, 1, 2]);
    assert!(report.removed.nodes.count > 10);
    for id in [os, unbound_os, redis, in_recipe, pinned] {
        assert!(repository.missing_packs(&[id]).unwrap().is_complete());
    }
    assert!(!repository.has_manifest(&garbage) && !repository.has_pack(&loose));
    assert!(!repository.has_recipe(&garbage_recipe) && repository.has_recipe(&extra));
    assert_eq!(repository.map(&kept_map).unwrap(), map_of(0..2000));
    assert!(repository.manifest(&garbage).is_err(), "not from a cache either");
    assert_eq!(repository.stats().unwrap().hot.files, 0);
    assert_eq!(repository.stats().unwrap().objects.total().count, report.kept.total().count);

    drop(pin);
    let report = repository.gc(false, NOW, &[]).unwrap();
    assert_eq!(counts(report.removed), [1, 1, 1]);
    assert!(repository.check(&mut |_, _| {}).unwrap().is_clean());
}

#[test]
fn what_is_young_keeps_the_old_it_refers_to() {
    let (_dir, repository) = repository();
    let pack = put_pack(&repository, b"old content");
    let old = std::time::SystemTime::now() - 30 * DAY;
    File::open(pack_path(&repository, &pack.0)).unwrap().set_modified(old).unwrap();
    repository.put_manifest(&component("coming", "1", vec![], &[pack])).unwrap();
    assert_eq!(repository.gc(false, DAY, &[]).unwrap().removed, ByKind::default());
    assert!(repository.has_pack(&pack.0));
}

#[test]
fn storing_again_what_is_held_renews_its_age() {
    let (_dir, repository) = repository();
    let (id, _) = put_pack(&repository, b"content");
    let old = std::time::SystemTime::now() - 30 * DAY;
    File::open(pack_path(&repository, &id)).unwrap().set_modified(old).unwrap();
    put_pack(&repository, b"content");
    repository.gc(false, DAY, &[]).unwrap();
    assert!(repository.has_pack(&id));
}

#[test]
fn nodes_leave_bundles_that_are_mostly_dead() {
    let (_dir, repository) = repository();
    let map = map_of(0..30_000);
    let (name, nodes) = map.to_tree();
    repository.put_map(&map).unwrap();
    // One leaf is all that is kept of the bundle.
    let report = repository.gc(false, NOW, &[ObjectId::Node(nodes[3].0)]).unwrap();
    assert_eq!((report.kept.nodes.count, report.removed.nodes.count), (1, nodes.len() as u64 - 1));
    assert_eq!(repository.node(&nodes[3].0).unwrap(), nodes[3].1);
    assert!(!repository.has_node(&name.root.unwrap()));
    let bytes = directory_bytes(&repository.dir().join("nodes"));
    assert!(bytes < 10_000, "{bytes}");
    assert_eq!(repository.rebuild_index().unwrap(), 1);
}

#[test]
fn many_small_bundles_become_few() {
    let (_dir, repository) = repository();
    let maps: Vec<_> = (0..70).map(|n| repository.put_map(&map_of([n * 1000])).unwrap().0).collect();
    let roots: Vec<_> = maps.iter().map(|m| ObjectId::Node(m.root.unwrap())).collect();
    let bundles = || {
        let mut count = 0;
        layout::walk_objects(repository.layout(), ObjectKind::Node, |_, _, _| {
            count += 1;
            Ok(())
        })
        .unwrap();
        count
    };
    assert_eq!(bundles(), 70);
    let report = repository.gc(false, NOW, &roots).unwrap();
    assert_eq!(report.removed, ByKind::default());
    assert!(bundles() < 10, "{}", bundles());
    repository.rebuild_index().unwrap();
    for (n, map) in maps.iter().enumerate() {
        assert_eq!(repository.map(map).unwrap(), map_of([n as u64 * 1000]));
    }
}

fn directory_bytes(dir: &Path) -> u64 {
    let fans = fs::read_dir(dir).unwrap();
    fans.flat_map(|fan| fs::read_dir(fan.unwrap().path()).unwrap())
        .map(|file| file.unwrap().metadata().unwrap().len())
        .sum()
}

#[test]
fn a_check_names_what_is_damaged_and_missing_and_who_needs_it() {
    let (_dir, repository) = repository();
    let good = put_pack(&repository, &noise(1, 4096));
    let bad = put_pack(&repository, &noise(2, 2 << 20));
    let absent = (PackId::of(b"absent"), 4096);
    let id = bound(&repository, &component("redis", "7", vec![], &[good, bad, absent]));
    let recipe = repository.put_recipe(&recipe_of(vec![id, ComponentId::of(b"none")])).unwrap();
    repository.hot_pack(&good.0).unwrap();
    let name = good.0.to_string();
    flip_byte(&repository.dir().join("hot").join(&name[..2]).join(&name), 0);
    flip_byte(&pack_path(&repository, &bad.0), 1_500_000);
    fs::write(repository.dir().join("packs/notes.txt"), b"x").unwrap();

    let mut last = (0, 0);
    let report = repository.check(&mut |done, total| last = (done, total)).unwrap();
    assert!(last.0 == last.1 && last.1 > 2 << 20);
    assert!(!report.is_clean());
    assert_eq!(report.damaged.iter().map(|d| d.object).collect::<Vec<_>>(), [ObjectId::Pack(bad.0)]);
    let missing = |object| report.missing.iter().find(|m| m.object == object).unwrap().needed_by.join(" ");
    assert!(missing(ObjectId::Pack(bad.0)).contains("redis@7"));
    assert!(missing(ObjectId::Pack(absent.0)).contains("redis@7"));
    assert!(missing(ObjectId::Manifest(ComponentId::of(b"none"))).contains(&recipe.short()));
    assert_eq!(report.missing.len(), 3);
    assert_eq!(report.hot_removed, 1);
    assert_eq!(report.strays, [repository.dir().join("packs/notes.txt")]);
    assert_eq!((report.good.packs.count, report.good.packs.plain_bytes), (1, 4096));

    put_pack(&repository, &noise(2, 2 << 20));
    let report = repository.check(&mut |_, _| {}).unwrap();
    assert!(report.damaged.is_empty() && report.missing.len() == 2);
}

#[test]
fn statistics_show_sharing_and_learning() {
    let (dir, repository) = repository();
    let shared = put_pack(&repository, &noise(1, 8192));
    let own = put_pack(&repository, &[0; 40_960]);
    bound(&repository, &component("a", "1", vec![], &[shared]));
    bound(&repository, &component("b", "1", vec![], &[shared, own]));
    repository.record_lookup(100, 900).unwrap();
    repository.record_lookup(1000, 0).unwrap();
    fs::write(repository.compositions_dir().join("image"), vec![1; 10_000]).unwrap();
    let repository = reopen(&dir, repository);
    let stats = repository.stats().unwrap();
    assert_eq!((stats.components, stats.shared_bytes), (2, 8192));
    assert_eq!(stats.lookups, Lookups { count: 2, hit_bytes: 1100, miss_bytes: 900 });
    assert_eq!((stats.compositions.files, stats.compositions.size_bytes), (1, 10_000));
    assert_eq!(stats.objects.packs.plain_bytes, 8192 + 40_960);
    assert!(stats.objects.packs.stored_bytes < 9000);
    fs::write(dir.path().join("lookups"), b"junk").unwrap();
    assert_eq!(reopen(&dir, repository).stats().unwrap().lookups, Lookups::default());
}

#[test]
fn threads_share_a_repository() {
    let (_dir, repository) = repository();
    let bytes_of = |n: u64| noise(n % 5, 1_500_000);
    std::thread::scope(|scope| {
        for n in 0..10 {
            let repository = repository.clone();
            scope.spawn(move || {
                let (id, _) = put_pack(&repository, &bytes_of(n));
                assert!(plain(&repository, &id).unwrap().starts_with(&bytes_of(n)));
                let mut hot = Vec::new();
                repository.hot_pack(&id).unwrap().read_to_end(&mut hot).unwrap();
                assert!(hot.starts_with(&bytes_of(n)));
                repository.gc(false, DAY, &[]).unwrap();
            });
        }
    });
    let stats = repository.stats().unwrap();
    assert_eq!((stats.objects.packs.count, stats.hot.files, stats.temporary.files), (5, 5, 0));
}

#[test]
fn packing_from_within_a_thread_pool_does_not_starve() {
    use rayon::prelude::*;
    let (_dir, repository) = repository();
    let ids: Vec<PackId> =
        (0..8u64).into_par_iter().map(|n| put_pack(&repository, &noise(n, 20 << 20 >> 2)).0).collect();
    assert!(ids.iter().all(|id| repository.has_pack(id)));
}
