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

/// A disk with a table and, as far as it says, partitions up to its end.
fn gpt_disk(len: u64, sector: u64, types: &[[u8; 16]], boot_code: bool) -> Vec<u8> {
    let mut disk = vec![0; len as usize];
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[450] = 0xee;
    if boot_code {
        disk[..3].copy_from_slice(&[0xeb, 0x63, 0x90]);
    }
    let header = sector as usize;
    let mut put = |at: usize, bytes: &[u8]| disk[at..at + bytes.len()].copy_from_slice(bytes);
    put(header, b"EFI PART");
    put(header + 32, &(len / sector - 1).to_le_bytes());
    put(header + 72, &2u64.to_le_bytes());
    put(header + 80, &128u32.to_le_bytes());
    put(header + 84, &128u32.to_le_bytes());
    for (n, kind) in types.iter().enumerate() {
        let at = 2 * header + n * 128;
        put(at, kind);
        put(at + 32, &(MIB / sector).to_le_bytes());
        put(at + 40, &(len / sector - 40).to_le_bytes());
    }
    disk
}

const ESP: [u8; 16] =
    [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];
const LINUX: [u8; 16] =
    [0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4];

#[test]
fn a_disk_file_that_was_cut_short_is_damaged_whatever_its_format() {
    if missing_tool() {
        return;
    }
    let world = World::new();
    let raw = world.path("r.raw");
    fs::write(&raw, noise(1, 8 << 20)).unwrap();
    for format in ["qcow2", "vmdk", "vdi", "vhdx", "vpc"] {
        let whole = convert(&raw, format, &world.path(&format!("whole.{format}")));
        world.examine(&whole, None).unwrap_or_else(|e| panic!("{format}: {e}"));
        let len = fs::metadata(&whole).unwrap().len();
        // In the middle, and less than a cluster from the end.
        let last = if format == "vhdx" { len - 1 } else { len - 3000 };
        for cut in [len / 2, len - 3000, last] {
            let path = world.path(&format!("cut.{format}"));
            fs::copy(&whole, &path).unwrap();
            fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
            let named: ImageFormat = format.parse().unwrap();
            let error =
                world.examine(&path, Some(named)).err().unwrap_or_else(|| panic!("{format} at {cut}"));
            match error {
                AdoptError::Damaged { .. } => {}
                other => panic!("{format}: {other}"),
            }
            let out = world.path("user-data");
            let taken =
                adopt::take_user_data(&path, Some(named), world.repository.temporary_dir(), &out, QUIET);
            assert!(taken.is_err() && !out.exists(), "{format}");
        }
    }
    // What is compressed has no place that a map tells.
    for (format, arguments) in [("qcow2", &["-c"][..]), ("vmdk", &["-o", "subformat=streamOptimized"])] {
        let text: Vec<u8> = (0..3_000_000u32).flat_map(|n| n.to_string().into_bytes()).collect();
        fs::write(&raw, &text[..8 << 20]).unwrap();
        let packed = world.path(&format!("packed.{format}"));
        let mut make = Command::new("qemu-img");
        make.args(["convert", "-f", "raw", "-O", format]).args(arguments).arg(&raw).arg(&packed);
        run(&mut make);
        world.examine(&packed, None).unwrap();
        let len = fs::metadata(&packed).unwrap().len();
        for cut in [len / 2, len - 70_000] {
            fs::OpenOptions::new().write(true).open(&packed).unwrap().set_len(cut).unwrap();
            let error = world.examine(&packed, None).err().unwrap();
            assert!(matches!(error, AdoptError::Damaged { .. }), "{format} at {cut}: {error}");
        }
    }
    // Not closed by a machine that crashed.
    let dirty = world.path("dirty.qcow2");
    fs::copy(world.path("whole.qcow2"), &dirty).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&dirty).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1], 79).unwrap();
    let error = world.examine(&dirty, None).err().unwrap();
    assert!(error.to_string().contains("check -r all"), "{error}");
    // Marked by whoever noticed; and a table that lies in the part that is gone.
    let marked = world.path("marked.qcow2");
    fs::copy(world.path("whole.qcow2"), &marked).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&marked).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[2], 79).unwrap();
    let error = world.examine(&marked, None).err().unwrap();
    assert!(matches!(error, AdoptError::Damaged { .. }) && error.to_string().contains("corrupt"), "{error}");
    assert_eq!(world.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn a_raw_disk_that_ends_before_its_partitions_or_file_system_is_damaged() {
    let world = World::new();
    let path = world.path("disk");
    let damaged = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let error = world.examine(&path, Some(ImageFormat::Raw)).err();
        assert!(matches!(error, Some(AdoptError::Damaged { .. })), "{error:?}");
    };
    let whole = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        world.examine(&path, None).unwrap().findings().disk
    };
    for sector in [512, 4096] {
        let disk = gpt_disk(4 << 20, sector, &[LINUX], false);
        assert_eq!(whole(&disk).end_bytes, 4 << 20);
        // The copy of the table alone, and more.
        damaged(&disk[..disk.len() - 512]);
        damaged(&disk[..2 << 20]);
        // A disk that was made larger is none the worse.
        whole(&[disk, vec![0; 1 << 20]].concat());
    }
    let mut mbr = vec![0; 2 << 20];
    mbr[0] = 0xfa;
    mbr[446..462].copy_from_slice(&[0x80, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0]);
    mbr[510..512].copy_from_slice(&[0x55, 0xaa]);
    assert_eq!(whole(&mbr).end_bytes, 2 << 20);
    damaged(&mbr[..(2 << 20) - 512]);
    // Where each says that it ends, at the places their headers have for it.
    type Fields<'a> = &'a [(usize, &'a [u8])];
    let others: [(&str, Fields<'_>); 11] = [
        ("XFS", &[(0, b"XFSB"), (4, &[0, 0, 16, 0]), (8, &[0, 0, 0, 0, 0, 0, 2, 0])]),
        ("btrfs", &[(0x10040, b"_BHRfS_M"), (0x100d1, &[0, 0, 0x20, 0, 0, 0, 0, 0])]),
        ("LVM", &[(512, b"LABELONE"), (532, &[32]), (576, &[0, 0, 0x20])]),
        ("swap", &[(4086, b"SWAPSPACE2"), (1028, &[0xff, 1])]),
        ("squashfs", &[(0, b"hsqs"), (40, &[0, 0, 0x20])]),
        ("NTFS", &[(3, b"NTFS    "), (11, &[0, 2]), (40, &[0xff, 0x0f])]),
        ("exFAT", &[(3, b"EXFAT   "), (72, &[0, 0x10]), (108, &[9])]),
        ("FAT", &[(54, b"FAT16   "), (11, &[0, 2]), (19, &[0, 0x10])]),
        ("FAT", &[(82, b"FAT32   "), (11, &[0, 2]), (32, &[0, 0x10])]),
        ("RAID", &[(4096, &[0xfc, 0x4e, 0x2b, 0xa9]), (4224, &[0, 8]), (4232, &[0, 8])]),
        ("F2FS", &[(1024, &[0x10, 0x20, 0xf5, 0xf2]), (1040, &[12]), (1060, &[0, 2])]),
    ];
    for (what, fields) in others {
        let mut disk = vec![0; 2 << 20];
        fields.iter().for_each(|(at, bytes)| disk[*at..at + bytes.len()].copy_from_slice(bytes));
        let found = whole(&disk);
        assert!(found.what.contains(what) && found.end_bytes == 2 << 20, "{found:?}");
        damaged(&disk[..(2 << 20) - 512]);
        whole(&[&disk[..], &[0; 4096]].concat());
    }
    if missing_tool() {
        return;
    }
    let ext4 = fs::read(world.disk("ext4", "32M", ONE, &[])).unwrap();
    assert!(whole(&ext4).what.starts_with("ext file system"));
    damaged(&ext4[..16 << 20]);
}

#[test]
fn a_disk_says_what_it_is_and_how_it_boots() {
    let world = World::new();
    let path = world.path("disk");
    let found = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        world.examine(&path, None).unwrap().findings().disk
    };
    let uefi = found(&gpt_disk(4 << 20, 512, &[ESP, LINUX], false));
    assert_eq!((uefi.boots_uefi, uefi.boots_bios, &uefi.loader), (true, false, &None));
    assert!(uefi.what.contains("GPT") && uefi.what.contains("512") && uefi.what.contains("2 partitions"));
    assert!(found(&gpt_disk(4 << 20, 4096, &[ESP], false)).what.contains("4096"));
    let mut bios = vec![0; 2 << 20];
    bios[0] = 0xfa;
    bios[446..462].copy_from_slice(&[0x80, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0]);
    bios[510..512].copy_from_slice(&[0x55, 0xaa]);
    let bios = found(&bios);
    assert_eq!((bios.boots_uefi, bios.boots_bios, bios.boots()), (false, true, "BIOS"));
    // GRUB's partition or the attribute that syslinux goes by, and the code that looks for it.
    let mut legacy = gpt_disk(4 << 20, 512, &[LINUX], true);
    assert!(!found(&legacy).boots_bios);
    legacy[1024 + 48] = 4;
    assert!(found(&legacy).boots_bios);
    // Where the table at the beginning is gone, its copy at the end counts, as for firmware.
    for sector in [512, 4096] {
        let mut copy = gpt_disk(4 << 20, sector, &[ESP], false);
        let (sector, end) = (sector as usize, copy.len());
        let mut header: Vec<u8> = copy[sector..2 * sector].to_vec();
        header[24..32].copy_from_slice(&(end as u64 / sector as u64 - 1).to_le_bytes());
        header[32..40].copy_from_slice(&1u64.to_le_bytes());
        copy[end - sector..].copy_from_slice(&header);
        copy[sector..2 * sector].fill(0);
        let found = found(&copy);
        assert!(found.boots_uefi && found.what.contains("GPT") && found.end_bytes == end as u64, "{found:?}");
        // Without the copy nothing says what the disk is.
        copy[end - sector..].fill(0);
        fs::write(&path, &copy).unwrap();
        assert!(!world.examine(&path, None).unwrap().findings().disk.is_known);
    }
    let unknown = found(&noise(3, 1 << 20));
    assert!(!unknown.is_known && !unknown.boots_bios && !unknown.boots_uefi);
    // A table with nothing but noise behind its magic is no reason to panic.
    for seed in 0..50 {
        let mut hostile = noise(seed, 1 << 20);
        hostile[512..520].copy_from_slice(b"EFI PART");
        hostile[84..88].fill(0xff);
        fs::write(&path, &hostile).unwrap();
        let _ = world.examine(&path, None);
    }
}

#[test]
fn the_loader_of_a_system_partition_is_found() {
    use fatfs::{FatType, FormatVolumeOptions};
    let world = World::new();
    for (kind, mib) in [(FatType::Fat12, 4), (FatType::Fat16, 16), (FatType::Fat32, 64)] {
        let esp = world.path("esp");
        let mut file =
            fs::OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&esp).unwrap();
        file.set_len(mib << 20).unwrap();
        let cluster = if kind == FatType::Fat12 { 2048 } else { 512 };
        let options = FormatVolumeOptions::new().fat_type(kind).bytes_per_cluster(cluster);
        fatfs::format_volume(&mut file, options).unwrap();
        drop(file);
        let fill = |loader: bool| {
            let file = fs::OpenOptions::new().read(true).write(true).open(&esp).unwrap();
            let fat = fatfs::FileSystem::new(file, fatfs::FsOptions::new()).unwrap();
            fat.root_dir().create_dir("EFI").unwrap();
            let boot = fat.root_dir().create_dir("EFI/BOOT").unwrap();
            (0..40).for_each(|n| drop(boot.create_file(&format!("a rather long name {n}.txt")).unwrap()));
            if loader {
                boot.create_file("BOOTX64.EFI").unwrap();
            }
        };
        let found = |world: &World| {
            let mut disk = gpt_disk((mib + 4) << 20, 512, &[ESP], false);
            let bytes = fs::read(&esp).unwrap();
            disk[MIB as usize..MIB as usize + bytes.len()].copy_from_slice(&bytes);
            fs::write(world.path("disk"), disk).unwrap();
            world.examine(&world.path("disk"), None).unwrap().findings().disk
        };
        fill(false);
        assert_eq!(found(&world).loader, None, "{kind:?}");
        fill(true);
        assert_eq!(found(&world).loader.as_deref(), Some("EFI/BOOT/BOOTX64.EFI"), "{kind:?}");
    }
}

#[test]
fn what_is_no_disk_is_refused_with_what_to_do() {
    let world = World::new();
    let refused = |name: &str, bytes: &[u8], hint: &str| {
        let path = world.path(name);
        fs::write(&path, bytes).unwrap();
        let error = world.examine(&path, None).err().unwrap_or_else(|| panic!("{name}"));
        assert!(matches!(error, AdoptError::NotADisk { .. }), "{error}");
        assert!(error.to_string().contains(hint), "{error}");
        // Who says that it is one is believed.
        world.examine(&path, Some(ImageFormat::Raw)).unwrap();
    };
    let padded = |magic: &[u8]| [magic, &noise(1, 4000)].concat();
    refused("deb.qcow2", b"<html><body>Not found</body></html>\r\n", "text");
    refused("disk.raw.xz", &padded(b"\xfd7zXZ\0"), "unxz");
    refused("disk.raw.gz", &padded(b"\x1f\x8b\x08"), "gunzip");
    refused("disk.zip", &padded(b"PK\x03\x04"), "unzip");
    let mut ova = noise(2, 10_240);
    ova[257..262].copy_from_slice(b"ustar");
    refused("machine.ova", &ova, "tar -xf");
    let mut iso = vec![0; 64 << 10];
    iso[0x8001..0x8006].copy_from_slice(b"CD001");
    refused("install.iso", &iso, "ISO 9660");
    refused("backup.vma", &padded(b"VMA\0\0\0\0\x01"), "vma extract");
    refused("old.qcow", &padded(b"QFI\xfb\0\0\0\x01"), "-f qcow ");
    refused("odc.cpio", &padded(b"070707"), "cpio");
    // Code alone, such as a kernel's, is no disk either.
    let mut code = noise(5, 1 << 20);
    code[510..512].copy_from_slice(&[0x55, 0xaa]);
    code[446] = 7;
    // Nothing says that it is a disk, or its name says that it is something else.
    let temporary = world.repository.temporary_dir();
    let plausible = |name: &str, bytes: &[u8]| {
        let path = world.path(name);
        fs::write(&path, bytes).unwrap();
        adopt::Source::open(&path, None, temporary, QUIET).unwrap().check_plausible()
    };
    let table = gpt_disk(2 << 20, 512, &[LINUX], false);
    plausible("disk.img", &table).unwrap();
    for (name, bytes) in [
        ("disk.qcow2", &table),
        ("kernel", &code),
        ("noise.raw", &noise(4, 1 << 20)),
        ("zeros", &vec![0; 1 << 20]),
    ] {
        let error = plausible(name, bytes).unwrap_err();
        assert!(error.to_string().contains("--format raw"), "{error}");
    }
}

#[test]
fn snapshots_in_a_file_are_named() {
    if missing_tool() {
        return;
    }
    let world = World::new();
    let raw = world.path("r.raw");
    fs::write(&raw, noise(1, 1 << 20)).unwrap();
    let disk = convert(&raw, "qcow2", &world.path("d.qcow2"));
    assert!(world.examine(&disk, None).unwrap().findings().snapshots.is_empty());
    run(Command::new("qemu-img").args(["snapshot", "-c", "before upgrade"]).arg(&disk));
    assert_eq!(world.examine(&disk, None).unwrap().findings().snapshots, ["before upgrade"]);
}

#[test]
fn a_disk_that_another_machine_writes_to_is_in_use() {
    if missing_tool() {
        return;
    }
    let world = World::new();
    let raw = world.path("r.raw");
    fs::write(&raw, noise(1, 1 << 20)).unwrap();
    let disk = convert(&raw, "qcow2", &world.path("d.qcow2"));
    let mut writer = Command::new("qemu-io");
    writer.args(["-f", "qcow2"]).arg(&disk).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut writer = writer.spawn().unwrap();
    // Its prompt says that it has opened the disk.
    std::io::Read::read_exact(writer.stdout.as_mut().unwrap(), &mut [0; 4]).unwrap();
    let error = world.examine(&disk, None).err().unwrap();
    assert!(matches!(error, AdoptError::InUse { .. }), "{error}");
    drop(writer.stdin.take());
    writer.wait().unwrap();
    world.examine(&disk, None).unwrap();
}
