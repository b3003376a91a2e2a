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
