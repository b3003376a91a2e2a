//! Disks that were not composed here: real ext4 file systems whose files are in packs too, adopted,
//! and read back bit by bit.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use cicada::adopt::{self, AdoptError, Base, Examined, Findings, Job, VmDisk};
use cicada::component::extents::{BlockExtent, ENTRY, ExtentList};
use cicada::component::manifest::Meta;
use cicada::component::{DiskParameters, Entry, EntryKind, Kind, Manifest, PackRef, Recipe};
use cicada::compose::{ComposeError, Composer, EXTENTS_COMPOSER, ImageFormat, digest_of};
use cicada::repository::{ObjectId, Repository};
use cicada::types::{ComponentId, ImageDigest, RecipeId};

const MIB: u64 = 1 << 20;
const QUIET: Job<'static> = Job { progress: &|_, _, _| (), cancelled: &|| false };

fn missing_tool() -> bool {
    let found = |tool: &&str| {
        let mut look = Command::new("sh");
        look.args(["-c", &format!("command -v {tool}")]).stdout(Stdio::null());
        look.status().is_ok_and(|s| s.success())
    };
    let missing: Vec<_> = ["mke2fs", "qemu-img"].into_iter().filter(|t| !found(t)).collect();
    if !missing.is_empty() {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: not installed: {} (e2fsprogs, qemu-utils)",
            missing.join(", ")
        );
    }
    !missing.is_empty()
}

/// Bytes that do not compress and differ by `seed`.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

struct World {
    repository: Repository,
    composer: Composer,
    dir: tempfile::TempDir,
}

/// Sizes that are no multiples of blocks among them.
const FILES: [(&str, usize); 6] = [
    ("usr/bin/large", 3_000_001),
    ("usr/bin/small", 77),
    ("usr/lib/libc.so", 2 << 20),
    ("usr/lib/a/deep/one", 4096),
    ("usr/share/doc", 9_000),
    ("usr/share/data", 1_500_000),
];

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::create(&dir.path().join("repository")).unwrap();
        let composer = Composer::new(repository.clone());
        Self { repository, composer, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A component of one pack with these contents.
    fn component(&self, name: &str, contents: &[Vec<u8>], named: bool) -> ComponentId {
        let mut writer = self.repository.pack_writer().unwrap();
        for content in contents {
            writer.append(&mut content.as_slice(), content.len() as u64).unwrap();
        }
        let (id, size_bytes) = writer.finish().unwrap().unwrap();
        let pack = PackRef { id, size_bytes, package: name.into(), package_version: "1".into() };
        let manifest = Manifest {
            name: name.into(),
            version: "1".into(),
            kind: Kind::Program,
            architecture: "amd64".into(),
            origin: "made by hand".into(),
            licences: Vec::new(),
            requires: Vec::new(),
            conflicts: Vec::new(),
            packs: vec![pack],
            entries: Vec::new(),
            fragments: Vec::new(),
        };
        let id = self.repository.put_manifest(&manifest).unwrap();
        if named {
            self.repository.bind_component(&manifest, id).unwrap();
        }
        id
    }

    /// The files that disks below have in common, in two packs.
    fn hold_files(&self) {
        let contents: Vec<Vec<u8>> =
            FILES.iter().zip(0..).map(|((_, len), seed)| noise(seed, *len)).collect();
        self.component("base-files", &contents[..3], true);
        self.component("more-files", &contents[3..], true);
    }

    /// An ext4 file system with the common files and private ones.
    fn disk(&self, name: &str, size: &str, uuid: &str, private: &[(&str, Vec<u8>)]) -> PathBuf {
        let tree = self.path(&format!("{name}-tree"));
        let put = |path: &str, content: &[u8]| {
            let path = tree.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        for ((path, len), seed) in FILES.iter().zip(0..) {
            put(path, &noise(seed, *len));
        }
        private.iter().for_each(|(path, content)| put(path, content));
        let disk = self.path(name);
        run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-b", "4096", "-U", uuid, "-d"]).args([
            tree.as_os_str(),
            disk.as_os_str(),
            size.as_ref(),
        ]));
        disk
    }

    fn examine(&self, disk: &Path, format: Option<ImageFormat>) -> Result<Examined, AdoptError> {
        adopt::examine(&self.repository, disk, format, QUIET)
    }

    /// Adopts as a broker does; the overlay is called by `name`.
    fn adopt(&self, disk: &Path, name: &str, share: bool) -> (Findings, Base, VmDisk, u64) {
        let examined = self.examine(disk, None).unwrap();
        let base = examined.make_base(&self.repository, &self.composer, "amd64", share, QUIET).unwrap();
        let vm = VmDisk::Root { overlay: self.path(name), base: self.composer.path_of(&base.recipe) };
        let VmDisk::Root { overlay, base: image } = &vm else { unreachable!() };
        let written = examined.write_root(overlay, image, QUIET).unwrap();
        (examined.findings(), base, vm, written)
    }

    fn leftovers(&self) -> Vec<PathBuf> {
        fs::read_dir(self.repository.temporary_dir()).unwrap().map(|e| e.unwrap().path()).collect()
    }
}

fn convert(from: &Path, format: &str, to: &Path) -> PathBuf {
    run(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", format]).arg(from).arg(to));
    to.to_owned()
}

const ONE: &str = "11111111-1111-4111-8111-111111111111";
const TWO: &str = "22222222-2222-4222-8222-222222222222";

#[test]
fn a_disk_of_known_files_is_adopted_and_comes_back_bit_by_bit() {
    if missing_tool() {
        return;
    }
    let world = World::new();
    world.hold_files();
    let shared: u64 = FILES.iter().map(|(_, len)| (*len as u64).next_multiple_of(4096)).sum();
    let private = noise(100, 700_000);
    let raw = world.disk("disk.raw", "40M", ONE, &[("home/secret", private.clone())]);
    let original = fs::read(&raw).unwrap();
    let before = digest_of(&raw).unwrap();
    for (format, name) in [
        (ImageFormat::Raw, "raw"),
        (ImageFormat::Qcow2, "qcow2"),
        (ImageFormat::Vmdk, "vmdk"),
        (ImageFormat::Vdi, "vdi"),
        (ImageFormat::Vhdx, "vhdx"),
    ] {
        let disk = match format {
            ImageFormat::Raw => raw.clone(),
            _ => convert(&raw, name, &world.path(&format!("disk.{name}"))),
        };
        let (findings, base, vm, written) = world.adopt(&disk, &format!("{name}-overlay"), false);
        assert_eq!(findings.format, format);
        assert_eq!(findings.digest, before.digest, "{name}");
        assert_eq!(findings.disk_bytes, 40 * MIB);
        let sum = findings.known_bytes + findings.residue_bytes + findings.zero_bytes;
        assert_eq!(sum, findings.size_bytes);
        // Every known file is found whole, whatever lies around it; what is left is the private file
        // and the file system's own.
        assert_eq!(findings.known_bytes, shared, "{name}: {findings:?}");
        assert!(findings.residue_bytes >= private.len() as u64);
        assert!(findings.residue_bytes < private.len() as u64 + MIB, "{name}: {findings:?}");
        assert_eq!(written, findings.residue_bytes);
        assert_eq!(findings.known_from.len(), 2);

        // The base comes again from its recipe, and both together are the disk.
        assert!(world.composer.remove(&base.recipe).unwrap());
        world.composer.composition(&base.recipe).unwrap();
        world.composer.verify(&base.recipe).unwrap();
        let out = world.path(&format!("{name}-out"));
        assert_eq!(adopt::export(&vm, &out, ImageFormat::Raw, QUIET).unwrap(), 40 * MIB);
        assert!(fs::read(&out).unwrap() == original, "{name}: the disk came back another");
        let again = adopt::export(&vm, &out, ImageFormat::Raw, QUIET);
        assert!(matches!(again, Err(AdoptError::Occupied { .. })));
        let other = world.path(&format!("{name}-out.qcow2"));
        adopt::export(&vm, &other, ImageFormat::Qcow2, QUIET).unwrap();
        run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "qcow2"]).arg(&raw).arg(&other));
        assert_eq!(world.leftovers(), Vec::<PathBuf>::new());
    }
    assert!(fs::read(&raw).unwrap() == original, "the adopted disk was written to");
}

#[test]
fn equal_disks_have_one_base_and_the_residue_of_a_shared_one_is_known_to_the_next() {
    if missing_tool() {
        return;
    }
    let world = World::new();
    world.hold_files();
    let distribution = noise(7, 2_500_000);
    let first = world.disk("first", "32M", ONE, &[("opt/distribution", distribution.clone())]);
    let (_, base, ..) = world.adopt(&first, "a", false);
    let (_, again, ..) = world.adopt(&first, "b", false);
    assert_eq!((base.recipe, base.is_new, again.is_new), (again.recipe, true, false));

    let (findings, shared, vm, written) = world.adopt(&first, "c", true);
    assert_ne!(shared.recipe, base.recipe);
    assert!(findings.residue_bytes > distribution.len() as u64);
    assert_eq!(written, 0, "all of it is in the base");
    let out = world.path("c-out");
    adopt::export(&vm, &out, ImageFormat::Raw, QUIET).unwrap();
    assert!(fs::read(out).unwrap() == fs::read(&first).unwrap());
    assert_eq!(world.repository.resolve_component(&shared.label).unwrap(), shared.component);

    // Another file system, another layout, the same distribution.
    let private = ("home/other", noise(9, 300_000));
    let second = world.disk("second", "48M", TWO, &[("opt/distribution", distribution), private]);
    let (findings, _, vm, _) = world.adopt(&second, "d", false);
    let known: u64 = FILES.iter().map(|(_, len)| (*len as u64).next_multiple_of(4096)).sum();
    assert!(findings.known_bytes >= known + 2_500_000, "{findings:?}");
    assert!(findings.known_from.iter().any(|k| k.component == shared.label), "{findings:?}");
    let out = world.path("d-out");
    adopt::export(&vm, &out, ImageFormat::Raw, QUIET).unwrap();
    assert!(fs::read(out).unwrap() == fs::read(&second).unwrap());
}

#[test]
fn packs_of_nobody_are_used_only_where_they_are_worth_it() {
    let world = World::new();
    // 40 KiB of 40; 128 KiB of 128; 128 KiB of 4 MiB.
    let (little, whole, large) = (noise(1, 40 << 10), noise(2, 128 << 10), noise(3, 4 << 20));
    for (name, content) in [("little", &little), ("whole", &whole), ("large", &large)] {
        world.component(name, std::slice::from_ref(content), false);
    }
    let disk = world.path("disk");
    let bytes = [little, vec![0; 8192], whole, large[..128 << 10].to_vec(), noise(4, 10_000)].concat();
    fs::write(&disk, &bytes).unwrap();
    let (findings, base, vm, _) = world.adopt(&disk, "overlay", false);
    let used: Vec<_> = findings.known_from.iter().map(|k| (k.component.as_str(), k.bytes)).collect();
    assert_eq!(used, [("whole@1", 128 << 10)]);
    let manifest = world.repository.manifest(&base.component).unwrap();
    assert_eq!(manifest.packs.len(), 2, "the list and one pack");
    // The disk's odd size is made up to 1 MiB with zeros.
    assert_eq!((findings.disk_bytes, findings.size_bytes), (bytes.len() as u64, MIB));
    let out = world.path("out");
    adopt::export(&vm, &out, ImageFormat::Raw, QUIET).unwrap();
    let found = fs::read(out).unwrap();
    assert!(found[..bytes.len()] == bytes && found[bytes.len()..].iter().all(|b| *b == 0));
    assert_eq!(found.len() as u64, MIB);
}

/// A digest has 64 bits, and a kept one is a file that somebody could have written: whatever they say,
/// the disk that comes back is the one that was given.
#[test]
fn digests_that_lie_cost_room_and_nothing_else() {
    let world = World::new();
    let disk = world.path("disk");
    let content = noise(1, 1 << 20);
    fs::write(&disk, &content).unwrap();
    world.component("other", &[noise(2, 1 << 20)], true);
    world.examine(&disk, None).unwrap();
    // As `repository/FORMAT.md` has it, but of the disk's blocks instead of the pack's.
    let fans = fs::read_dir(world.path("repository/blocks")).unwrap();
    let kept: Vec<PathBuf> =
        fans.flat_map(|fan| fs::read_dir(fan.unwrap().path()).unwrap()).map(|f| f.unwrap().path()).collect();
    let [path] = kept.as_slice() else { panic!("{kept:?}") };
    let id: cicada::types::Hash = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
    let mut bytes = b"CICBLK\0\x01".to_vec();
    content.chunks(4096).for_each(|block| bytes.extend_from_slice(&blake3::hash(block).as_bytes()[..8]));
    let seal = blake3::hash(&[id.as_bytes().as_slice(), &bytes].concat());
    bytes.extend_from_slice(seal.as_bytes());
    fs::write(path, bytes).unwrap();

    for share in [false, true] {
        let (findings, _, vm, written) = world.adopt(&disk, &format!("overlay-{share}"), share);
        assert_eq!((findings.known_bytes, findings.residue_bytes), (1 << 20, 0), "the lie was believed");
        assert_eq!(written, 1 << 20);
        let out = world.path(&format!("out-{share}"));
        adopt::export(&vm, &out, ImageFormat::Raw, QUIET).unwrap();
        assert!(fs::read(out).unwrap() == content);
    }
}

#[test]
fn a_disk_that_changes_meanwhile_is_refused() {
    let world = World::new();
    let disk = world.path("disk");
    fs::write(&disk, noise(1, 1 << 20)).unwrap();
    let examined = world.examine(&disk, None).unwrap();
    let base = examined.make_base(&world.repository, &world.composer, "amd64", false, QUIET).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&disk).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"changed", 5000).unwrap();
    let image = world.composer.path_of(&base.recipe);
    let error = examined.write_root(&world.path("overlay"), &image, QUIET).unwrap_err();
    assert!(matches!(error, AdoptError::Changed { .. }), "{error}");
}

#[test]
fn an_unknown_disk_and_an_empty_one_are_adopted_too() {
    let world = World::new();
    let (unknown, zeros) = (world.path("unknown"), world.path("zeros"));
    fs::write(&unknown, noise(1, 5 << 20)).unwrap();
    fs::File::create(&zeros).unwrap().set_len(9 << 20).unwrap();
    for (disk, residue) in [(&unknown, 5 << 20), (&zeros, 0)] {
        let name = disk.file_name().unwrap().to_str().unwrap();
        let (findings, _, vm, written) = world.adopt(disk, &format!("{name}-overlay"), false);
        assert_eq!((findings.known_bytes, findings.residue_bytes, written), (0, residue, residue));
        let out = world.path(&format!("{name}-out"));
        adopt::export(&vm, &out, ImageFormat::Raw, QUIET).unwrap();
        assert!(fs::read(out).unwrap() == fs::read(disk).unwrap());
    }
}

#[test]
fn disks_that_lead_elsewhere_are_refused() {
    if missing_tool() {
        return;
    }
    let world = World::new();
    let secret = world.path("secret.raw");
    fs::write(&secret, noise(1, 1 << 20)).unwrap();
    let backed = world.path("backed.qcow2");
    let create = |args: &[&str], path: &Path, size: &[&str]| {
        run(Command::new("qemu-img").args(["create", "-q"]).args(args).arg(path).args(size));
    };
    let secret_text = secret.to_str().unwrap();
    create(&["-f", "qcow2", "-F", "raw", "-b", secret_text], &backed, &[]);
    let external = world.path("external.qcow2");
    let data_file = format!("data_file={}", world.path("data.raw").display());
    create(&["-f", "qcow2", "-o", &data_file], &external, &["1M"]);
    let flat = world.path("flat.vmdk");
    create(&["-f", "vmdk", "-o", "subformat=monolithicFlat"], &flat, &["1M"]);
    // A sparse VMDK may name a parent in its descriptor.
    let (parent, child) = (world.path("parent.vmdk"), world.path("child.vmdk"));
    create(&["-f", "vmdk"], &parent, &["1M"]);
    create(&["-f", "vmdk", "-F", "vmdk", "-b", parent.to_str().unwrap()], &child, &[]);
    for disk in [&backed, &external, &flat, &child] {
        let error = world.examine(disk, None).err().unwrap();
        assert!(matches!(error, AdoptError::RefersElsewhere { .. }), "{}: {error}", disk.display());
    }
    // As raw disks they are bytes like any other.
    let raw = world.examine(&backed, Some(ImageFormat::Raw)).unwrap().findings();
    assert_eq!(raw.disk_bytes, fs::metadata(&backed).unwrap().len());

    let not_qcow2 = world.examine(&secret, Some(ImageFormat::Qcow2)).err().unwrap();
    assert!(matches!(not_qcow2, AdoptError::NotADisk { .. }), "{not_qcow2}");
    let empty = world.path("empty");
    fs::write(&empty, b"").unwrap();
    for path in [&empty, &world.path("repository"), &PathBuf::from("/dev/zero")] {
        assert!(matches!(world.examine(path, None), Err(AdoptError::NotADisk { .. })), "{}", path.display());
    }
    let broken = world.path("broken.qcow2");
    let mut bytes = noise(2, 4096);
    bytes[..16].copy_from_slice(b"QFI\xfb\0\0\0\x03\0\0\0\0\0\0\0\0");
    bytes[72..80].fill(0);
    fs::write(&broken, bytes).unwrap();
    assert!(matches!(world.examine(&broken, None), Err(AdoptError::Convert { .. })));
    let huge = world.path("huge.qcow2");
    create(&["-f", "qcow2"], &huge, &["17T"]);
    assert!(matches!(world.examine(&huge, None), Err(AdoptError::TooLarge { .. })));
    assert_eq!(world.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn a_cancelled_adoption_leaves_nothing() {
    if missing_tool() {
        return;
    }
    let world = World::new();
    world.hold_files();
    let disk = world.disk("disk", "32M", ONE, &[("home/secret", noise(5, 100_000))]);
    let qcow2 = convert(&disk, "qcow2", &world.path("disk.qcow2"));
    // At its first look, its second, and so on, until it is through.
    let mut completed = false;
    for after in 0..1000 {
        let looks = AtomicUsize::new(0);
        let cancelled = || looks.fetch_add(1, Ordering::Relaxed) >= after;
        let job = Job { progress: &|_, _, _| (), cancelled: &cancelled };
        let overlay = world.path("overlay");
        let outcome = adopt::examine(&world.repository, &qcow2, None, job).and_then(|examined| {
            let base = examined.make_base(&world.repository, &world.composer, "amd64", false, job)?;
            let image = world.composer.path_of(&base.recipe);
            examined.write_root(&overlay, &image, job).map(|_| ())
        });
        assert_eq!(world.leftovers(), Vec::<PathBuf>::new());
        match outcome {
            Ok(()) => {
                completed = true;
                break;
            }
            Err(e) => assert!(matches!(e, AdoptError::Cancelled), "{e}"),
        }
        let _ = fs::remove_file(&overlay);
    }
    assert!(completed);
}

#[test]
fn hostile_extent_lists_are_refused_before_anything_is_composed() {
    let world = World::new();
    let content = world.component("content", &[noise(1, 64 << 10)], false);
    let content = world.repository.manifest(&content).unwrap().packs[0].clone();
    let run = |disk_block, pack, pack_block, blocks| BlockExtent { disk_block, pack, pack_block, blocks };
    let recipe = |bytes: &[u8], virtual_size_bytes: u64, spoil: &dyn Fn(&mut Manifest)| -> RecipeId {
        let mut writer = world.repository.pack_writer().unwrap();
        let (_, hash) = writer.append(&mut &*bytes, bytes.len() as u64).unwrap();
        let (id, size_bytes) = writer.finish().unwrap().unwrap();
        let pack = PackRef { id, size_bytes, package: ENTRY.into(), package_version: "1".into() };
        let size = bytes.len() as u64;
        let mut manifest = Manifest {
            name: "adopted-0".into(),
            version: "1".into(),
            kind: Kind::Format,
            architecture: "amd64".into(),
            origin: "a stranger".into(),
            licences: Vec::new(),
            requires: Vec::new(),
            conflicts: Vec::new(),
            packs: vec![pack, content.clone()],
            entries: vec![Entry {
                path: ENTRY.into(),
                meta: Meta { mode: 0o444, uid: 0, gid: 0, mtime_s: 0 },
                xattrs: Vec::new(),
                kind: EntryKind::File { size_bytes: size, hash, pack: 0, offset_bytes: 0 },
            }],
            fragments: Vec::new(),
        };
        spoil(&mut manifest);
        let components = vec![world.repository.put_manifest(&manifest).unwrap()];
        let disk = DiskParameters::derived(&components, virtual_size_bytes, 0, "");
        let image_digest = ImageDigest::from_bytes([7; 32]);
        let composer = EXTENTS_COMPOSER.into();
        let recipe = Recipe { composer, components, ordered: false, disk, image_digest };
        world.repository.put_recipe(&recipe).unwrap()
    };
    let list = |extents: Vec<BlockExtent>| ExtentList { disk_size_bytes: MIB, extents }.encode();
    let good = list(vec![run(3, 1, 0, 16)]);
    let as_it_is = |_: &mut Manifest| ();
    let mut cut = good.clone();
    cut.pop();
    let refused = [
        recipe(&list(vec![run(3, 1, 1, 16)]), MIB, &as_it_is),
        recipe(&list(vec![run(250, 1, 0, 16)]), MIB, &as_it_is),
        recipe(&list(vec![run(3, 2, 0, 1)]), MIB, &as_it_is),
        recipe(&list(vec![run(3, 0, 0, 1)]), MIB, &as_it_is),
        recipe(&cut, MIB, &as_it_is),
        recipe(b"not a list at all", MIB, &as_it_is),
        recipe(&good, 2 * MIB, &as_it_is),
        recipe(&good, MIB, &|m| m.entries[0].path = b"another".to_vec()),
        recipe(&good, MIB, &|m| m.entries.clear()),
        recipe(&list(vec![run(3, 1, 0, 17)]), MIB, &as_it_is),
    ];
    for (id, n) in refused.iter().zip(0..) {
        let error = world.composer.composition(id).unwrap_err();
        assert!(matches!(error, ComposeError::ExtentList { .. }), "{n}: {error}");
    }
    // What is valid is composed, and is not what its recipe promises.
    let error = world.composer.composition(&recipe(&good, MIB, &as_it_is)).unwrap_err();
    assert!(matches!(error, ComposeError::Digest { .. }), "{error}");
    // The pack has fewer bytes than its manifest claims.
    let lies = recipe(&list(vec![run(3, 1, 0, 17)]), MIB, &|m| m.packs[1].size_bytes += 4096);
    let error = world.composer.composition(&lies).unwrap_err();
    assert!(matches!(error, ComposeError::ShortPack { .. }), "{error}");
    let mut two = world.repository.recipe(&refused[0]).unwrap();
    two.components.push(two.components[0]);
    let two = world.repository.put_recipe(&two).unwrap();
    assert!(matches!(world.composer.composition(&two), Err(ComposeError::ExtentList { .. })));
    assert_eq!(world.leftovers(), Vec::<PathBuf>::new());
    assert_eq!(fs::read_dir(world.repository.compositions_dir()).unwrap().count(), 0);
}

#[test]
fn what_a_base_is_made_of_stays_as_long_as_its_recipe() {
    let world = World::new();
    world.component("whole", &[noise(2, 128 << 10)], false);
    let disk = world.path("disk");
    fs::write(&disk, [noise(2, 128 << 10), noise(3, 9000)].concat()).unwrap();
    let (_, base, ..) = world.adopt(&disk, "overlay", false);
    let recipe = base.recipe;
    drop(base);
    let grace = std::time::Duration::ZERO;
    world.repository.gc(false, grace, &[ObjectId::Recipe(recipe)]).unwrap();
    world.composer.remove(&recipe).unwrap();
    world.composer.composition(&recipe).unwrap();
    world.repository.gc(false, grace, &[]).unwrap();
    assert!(!world.repository.has_recipe(&recipe));
}
