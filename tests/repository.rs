//! Guards the promise that a repository survives `kill -9` at any instant: what a writer said was
//! stored is there and whole, nothing half-made is left, and no manual step is needed.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use cicada::component::manifest::{Kind, Manifest, PackRef};
use cicada::repository::{RefKind, Repository, RepositoryError};
use cicada::types::{BlockHash, ComponentId, PackId};
use cicada::vm::{Block, ChunkMap, MapRef};

const WRITER_DIR: &str = "CICADA_TEST_WRITER_DIR";
const ROUNDS: u64 = 12;

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

fn map_of(seed: u64) -> ChunkMap {
    let block = |n: u64| (n, Block::Data(BlockHash::of(&(n ^ seed << 20).to_le_bytes())));
    ChunkMap { blocks: (0..2000).map(block).collect(), ..ChunkMap::empty(4096, 4096 * 100_000) }
}

/// Run in a process of its own by the test below: stores without end and says what is stored.
#[test]
fn writer() {
    let Ok(dir) = std::env::var(WRITER_DIR) else { return };
    let repository = Repository::open_or_create(&PathBuf::from(dir)).unwrap();
    let mut out = std::io::stdout();
    let start = u64::from(std::process::id()) << 32;
    for n in start.. {
        let mut writer = repository.pack_writer().unwrap();
        writer.append(&mut noise(n, 3000).as_slice(), 3000).unwrap();
        writer.append(&mut noise(n + 1, 1_200_000).as_slice(), 1_200_000).unwrap();
        let (pack, size_bytes) = writer.finish().unwrap().unwrap();
        let manifest = Manifest {
            name: "made".into(),
            version: n.to_string(),
            kind: Kind::Program,
            architecture: "amd64".into(),
            origin: String::new(),
            licences: Vec::new(),
            requires: Vec::new(),
            conflicts: Vec::new(),
            packs: vec![PackRef { id: pack, size_bytes, package: "p".into(), package_version: "1".into() }],
            entries: Vec::new(),
            fragments: Vec::new(),
        };
        let component = repository.put_manifest(&manifest).unwrap();
        repository.bind_component(&manifest, component).unwrap();
        let map = repository.put_map(&map_of(n)).unwrap().0;
        repository.set_ref(RefKind::Vm, &n.to_string(), &serde_json::to_vec(&map).unwrap()).unwrap();
        writeln!(out, "\nstored {n} {pack} {component}").unwrap();
        if n % 4 == 3 {
            let roots: Vec<_> = maps(&repository).into_iter().filter_map(|m| m.root).collect();
            let roots: Vec<_> = roots.into_iter().map(cicada::repository::ObjectId::Node).collect();
            repository.gc(false, Duration::ZERO, &roots).unwrap();
        }
    }
}

fn maps(repository: &Repository) -> Vec<MapRef> {
    let refs = repository.list_refs(RefKind::Vm).unwrap();
    refs.iter().map(|(_, value)| serde_json::from_slice(value).unwrap()).collect()
}

#[test]
fn a_killed_writer_loses_nothing_it_reported_and_leaves_nothing_half_made() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("repository");
    let mut stored = Vec::new();
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer", "--nocapture"])
            .env(WRITER_DIR, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // The writer runs on for a time that differs, so that the kill hits every step.
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let reader = std::thread::spawn(move || {
            let lines = lines.map_while(Result::ok).filter(|line| line.starts_with("stored "));
            lines.collect::<Vec<_>>()
        });
        std::thread::sleep(Duration::from_millis(150 + round * 67));
        if round == 0 {
            while !path.join("lock").exists() {
                std::thread::sleep(Duration::from_millis(10));
            }
            let locked = Repository::open(&path).map(drop);
            assert!(
                matches!(&locked, Err(RepositoryError::Locked { pid: Some(pid), .. }) if *pid == child.id()),
                "{locked:?}"
            );
        }
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9), "the writer failed by itself");
        stored.extend(reader.join().unwrap());

        let repository = Repository::open(&path).unwrap();
        for line in &stored {
            let mut words = line.split(' ').skip(1);
            let number: u64 = words.next().unwrap().parse().unwrap();
            let pack: PackId = words.next().unwrap().parse().unwrap();
            let component: ComponentId = words.next().unwrap().parse().unwrap();
            assert!(repository.has_pack(&pack), "{line}");
            assert_eq!(repository.resolve_component(&format!("made@{number}")).unwrap(), component);
            let map = repository.get_ref(RefKind::Vm, &number.to_string()).unwrap().unwrap();
            let map: MapRef = serde_json::from_slice(&map).unwrap();
            assert_eq!(repository.map(&map).unwrap(), map_of(number));
        }
        let report = repository.check(&mut |_, _| {}).unwrap();
        assert!(report.is_clean() && report.strays.is_empty(), "{report:?}");
        let stats = repository.stats().unwrap();
        assert_eq!((stats.temporary.files, stats.quarantine.files), (0, 0));
        assert_eq!(stats.objects.packs.count, report.good.packs.count);
    }
    assert!(stored.len() as u64 > ROUNDS / 2, "only {} were stored", stored.len());
    println!("{} components stored over {ROUNDS} kills, none lost", stored.len());
}

/// A file system of its own, gone with it.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf, size_mib: u32) -> Option<Self> {
        std::fs::create_dir_all(&at).unwrap();
        let options = format!("size={size_mib}m,mode=700");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&at).status();
        mounted.is_ok_and(|s| s.success()).then_some(Self(at))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// The disk was full for a while: the index works again without a restart, and knows all that is there.
#[test]
fn an_index_that_failed_on_a_full_disk_works_again() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(dir.path().join("small"), 48) else {
        let _ = writeln!(std::io::stderr(), "SKIPPED: a small file system cannot be mounted here");
        return;
    };
    let repository = Repository::create(&disk.0.join("repository")).unwrap();
    let pack = |seed: u64| {
        let mut writer = repository.pack_writer().unwrap();
        writer.append(&mut noise(seed, 3000).as_slice(), 3000).unwrap();
        writer.finish().map(|finished| finished.unwrap().0)
    };
    let mut held: Vec<PackId> = (0..50).map(|n| pack(n).unwrap()).collect();
    assert!(!repository.index_has_failed() && !repository.heal_index().unwrap());
    // No byte is left, and what the index was told last is not on disk yet.
    let filler = disk.0.join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    let mut n = 1000;
    for size in [1 << 20, 1 << 12] {
        while file.write_all(&vec![1; size]).is_ok() {}
    }
    let begun = std::time::Instant::now();
    while !repository.index_has_failed() {
        assert!(begun.elapsed() < Duration::from_secs(30), "the index never failed");
        // What does not fit is refused; what does is held.
        file.set_len(file.metadata().unwrap().len() - 4096).unwrap();
        held.extend(pack(n));
        n += 1;
        let _ = file.sync_all();
        while file.write_all(&[1; 4096]).is_ok() {}
        let _ = repository.check(&mut |_, _| ());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(matches!(repository.heal_index(), Err(RepositoryError::NoSpace { .. })), "still full");
    std::fs::remove_file(&filler).unwrap();
    drop(file);
    assert!(repository.heal_index().unwrap());
    assert!(!repository.index_has_failed());
    held.push(pack(7).unwrap());
    for pack in &held {
        assert!(repository.has_pack(pack), "{pack}");
    }
    drop(repository);
    let again = Repository::open(&disk.0.join("repository")).unwrap();
    assert!(held.iter().all(|pack| again.has_pack(pack)));
}
