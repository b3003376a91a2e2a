//! Guards the promises of composing: a recipe gives the same disk everywhere, the disk holds exactly
//! what its components say, and what goes wrong is named and leaves nothing behind.

mod imports;
mod read_back;
mod world;

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use cicada::component::manifest::Meta;
use cicada::component::tree::TreeError;
use cicada::component::{EntryKind, FragmentRule, Kind};
use cicada::compose::{COMPOSER, ComposeError, ImageFormat, SEGMENT_BYTES};
use cicada::repository::{Repository, RepositoryError};
use cicada::types::{ByteSize, ComponentId};

use read_back::{extract, partition, root_tree};
use world::{COMMAND_LINE, Draft, SIZE, What, World, directory, expected, file, meta, noise, os, thing};

/// Said past the test runner's capture, so nobody takes a skipped check for a passed one.
fn skipped(reason: &str) {
    let _ = writeln!(std::io::stderr().lock(), "SKIPPED: {reason}");
}

fn has_tool(name: &str) -> bool {
    Command::new(name).arg("-V").output().is_ok()
}

/// The layout bytes are part of the composer's format. If this fails, either the change was not meant
/// to alter them, or [`COMPOSER`] needs a new version.
const GOLDEN_DIGEST: &str = "42912d1e2c18523303fadbb8ca8bef81dccdeecc36de824f6aa5c6e759ffd209";

#[test]
fn one_recipe_gives_one_disk_wherever_it_is_composed() {
    let (a, b) = (World::new(), World::new());
    let set = a.set();
    let (id, recipe) = a.composer.make_recipe(&set, false, SIZE, COMMAND_LINE).unwrap();
    assert_eq!(recipe.composer, COMPOSER);
    assert_eq!(recipe.image_digest.to_string(), GOLDEN_DIGEST);

    // Another repository, the set named in another order, packs that lie there in plain form.
    let mut other_set = b.set();
    other_set.reverse();
    assert_eq!(set.iter().collect::<BTreeSet<_>>(), other_set.iter().collect());
    for component in &other_set {
        for pack in &b.repository.manifest(component).unwrap().packs {
            b.repository.hot_pack(&pack.id).unwrap();
        }
    }
    let (other_id, _) = b.composer.make_recipe(&other_set, false, SIZE, COMMAND_LINE).unwrap();
    assert_eq!(id, other_id);
    let (first, second) = (a.composer.path_of(&id), b.composer.path_of(&id));
    assert!(fs::read(&first).unwrap() == fs::read(&second).unwrap(), "the images differ");

    // A received recipe is composed and found good; half of the packs are plain, half are not.
    a.composer.remove(&id).unwrap();
    for pack in a.repository.manifest(&set[0]).unwrap().packs.iter().step_by(2) {
        a.repository.hot_pack(&pack.id).unwrap();
    }
    let composition = a.composer.composition(&id).unwrap();
    assert!(!composition.reused);
    assert_eq!(composition.digest, recipe.image_digest);
    a.composer.verify(&id).unwrap();

    let meta = fs::metadata(&composition.path).unwrap();
    assert_eq!((meta.len(), meta.permissions().mode() & 0o777), (SIZE.0, 0o444));
    assert!(meta.blocks() * 512 < 40 << 20, "{} bytes are allocated", meta.blocks() * 512);
}

#[test]
fn an_archive_is_enough_to_compose_the_same_disk() {
    let (a, b) = (World::new(), World::new());
    let (id, recipe) = a.composer.make_recipe(&a.set(), false, SIZE, COMMAND_LINE).unwrap();
    let archive = a.dir.path().join("recipe.tar");
    a.repository.export(&[], &[id]).unwrap().write(&archive, &mut |_, _| true).unwrap();
    let (report, result) = b.repository.import(&archive, &mut |_, _| true);
    result.unwrap();
    assert_eq!((report.skipped, report.refused.len()), (0, 0));
    assert_eq!(b.composer.composition(&id).unwrap().digest, recipe.image_digest);
    assert!(b.repository.check(&mut |_, _| ()).unwrap().is_clean());
}

#[test]
fn the_disk_holds_exactly_what_the_components_say() {
    let world = World::new();
    let (id, _) = world.composer.make_recipe(&world.set(), false, SIZE, COMMAND_LINE).unwrap();
    let disk = world.composer.path_of(&id);
    let (found, inodes) = root_tree(&disk);
    let expected = expected();
    for (path, thing) in &expected {
        let path_shown = String::from_utf8_lossy(path);
        assert_eq!(found.get(path), Some(thing), "{path_shown}");
    }
    let extra: Vec<_> = found.keys().filter(|p| !expected.contains_key(*p)).collect();
    assert!(extra.is_empty(), "{extra:?}");
    let names = [&b"usr/bin/links"[..], b"usr/lib/link", b"usr/lib/link2"].map(|p| inodes[p]);
    assert!(names.iter().all(|ino| *ino == names[0]), "hard links share an inode");
}

#[test]
fn linux_sees_the_same() {
    let world = World::new();
    let (id, _) = world.composer.make_recipe(&world.set(), false, SIZE, COMMAND_LINE).unwrap();
    let (root, mounted) = (world.dir.path().join("root"), world.dir.path().join("mounted"));
    extract(&world.composer.path_of(&id), 1, &root);
    fs::create_dir(&mounted).unwrap();
    let Some(_mount) = Mount::image(&root, &mounted) else {
        skipped("no right to mount an image");
        return;
    };
    for (path, thing) in expected() {
        let path = mounted.join(std::ffi::OsStr::from_bytes(&path));
        let found = fs::symlink_metadata(&path).unwrap();
        let Meta { mode, uid, gid, mtime_s } = thing.meta;
        assert_eq!(
            (found.mode() & 0o7777, found.uid(), found.gid(), found.mtime(), found.nlink()),
            (mode.into(), uid, gid, mtime_s, thing.links.into()),
            "{}",
            path.display()
        );
        match thing.what {
            What::File(content) => assert!(fs::read(&path).unwrap() == content, "{}", path.display()),
            What::Symlink(to) => assert_eq!(fs::read_link(&path).unwrap().as_os_str().as_bytes(), to),
            What::Char(major, minor) | What::Block(major, minor) => {
                assert_eq!(found.rdev(), rustix::fs::makedev(major, minor));
            }
            _ => {}
        }
        for (name, value) in thing.xattrs {
            let mut buffer = vec![0; 4096];
            let len = rustix::fs::lgetxattr(&path, &name, &mut buffer[..]).unwrap();
            // Linux hands ACLs out in another form than the one on disk; that it can is what counts.
            let is_acl = name.starts_with("system.posix_acl");
            assert!(if is_acl { len == 4 + 5 * 8 } else { buffer[..len] == value }, "{name}");
        }
    }
}

#[test]
fn foreign_tools_find_the_disk_in_order() {
    let world = World::new();
    let (id, recipe) = world.composer.make_recipe(&world.set(), false, SIZE, COMMAND_LINE).unwrap();
    let disk = world.composer.path_of(&id);
    let root = world.dir.path().join("root");
    extract(&disk, 1, &root);
    if has_tool("e2fsck") {
        let out = Command::new("e2fsck").arg("-fn").arg(&root).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
    } else {
        skipped("no e2fsck (e2fsprogs)");
    }
    if has_tool("sfdisk") {
        let out = Command::new("sfdisk").arg("-V").arg(&disk).output().unwrap();
        let said = [out.stdout, out.stderr].concat();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&said));
        assert!(String::from_utf8_lossy(&said).contains("No errors detected"));
    } else {
        skipped("no sfdisk (fdisk)");
    }
    let esp = world.dir.path().join("esp");
    extract(&disk, 0, &esp);
    if has_tool("fsck.fat") {
        let out = Command::new("fsck.fat").arg("-nv").arg(&esp).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
    } else {
        skipped("no fsck.fat (dosfstools)");
    }
    if has_tool("blkid") {
        let probe = |path: &Path, tag: &str| {
            let out =
                Command::new("blkid").args(["-p", "-o", "value", "-s", tag]).arg(path).output().unwrap();
            String::from_utf8(out.stdout).unwrap().trim().to_owned()
        };
        assert_eq!(probe(&disk, "PTTYPE"), "gpt");
        assert_eq!(probe(&disk, "PTUUID"), recipe.disk.disk_guid.to_string());
        assert_eq!(probe(&root, "UUID"), recipe.disk.filesystem_uuid.to_string());
        assert_eq!((probe(&esp, "TYPE"), probe(&esp, "VERSION")), ("vfat".into(), "FAT16".into()));
    } else {
        skipped("no blkid (util-linux)");
    }
}

#[test]
fn the_system_partition_holds_the_boot_files_and_says_what_to_boot() {
    let world = World::new();
    let (id, recipe) = world.composer.make_recipe(&world.set(), false, SIZE, COMMAND_LINE).unwrap();
    let esp = world.dir.path().join("esp");
    extract(&world.composer.path_of(&id), 0, &esp);
    let image = OpenOptions::new().read(true).write(true).open(&esp).unwrap();
    let fs = fatfs::FileSystem::new(image, fatfs::FsOptions::new()).unwrap();
    let read = |path: &str| {
        let mut bytes = Vec::new();
        fs.root_dir().open_file(path).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    };
    assert_eq!(read("EFI/BOOT/BOOTX64.EFI"), noise(1, 150_001));
    assert_eq!(read("EFI/debian/grub.cfg"), b"x");
    assert_eq!(read("EFI/debian/y.cfg"), b"x");
    let config = String::from_utf8(read("EFI/cicada/root.cfg")).unwrap();
    let uuid = recipe.disk.filesystem_uuid;
    assert_eq!(
        config,
        format!(
            "set cicada_root_uuid={uuid}\n\
             set cicada_cmdline=\"console=ttyS0 quiet path=\\\"\\$HOME\\\\x\\\"\"\n"
        )
    );
    let mut names: Vec<String> = fs.root_dir().iter().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["EFI"]);
    assert_eq!(partition(&world.composer.path_of(&id), 0).len_bytes, recipe.disk.esp_size_bytes);
}

#[test]
fn unused_compositions_are_collected() {
    let world = World::new();
    let set = world.set();
    let (id, _) = world.composer.make_recipe(&set, false, SIZE, COMMAND_LINE).unwrap();
    let (now, day) = (std::time::Duration::ZERO, std::time::Duration::from_secs(86_400));
    assert_eq!(world.composer.collect(&[id], now, false).unwrap(), (0, 0), "a VM stands on it");
    assert_eq!(world.composer.collect(&[], day, false).unwrap(), (0, 0), "it is young");
    let (count, bytes) = world.composer.collect(&[], now, true).unwrap();
    assert!(count == 1 && bytes > 0 && world.composer.is_composed(&id), "a dry run removes nothing");
    assert_eq!(world.composer.collect(&[], now, false).unwrap(), (count, bytes));
    assert!(!world.composer.is_composed(&id));
    assert!(!world.composer.composition(&id).unwrap().reused, "and it can be made again");
}

#[test]
fn a_composition_is_made_once() {
    let world = World::new();
    let set = world.set();
    let (id, recipe) = world.composer.make_recipe(&set, false, SIZE, COMMAND_LINE).unwrap();
    assert_eq!(world.composer.make_recipe(&set, false, SIZE, COMMAND_LINE).unwrap(), (id, recipe));
    assert!(world.composer.composition(&id).unwrap().reused);
    assert!(world.composer.remove(&id).unwrap());
    assert!(!world.composer.remove(&id).unwrap());
    assert!(matches!(world.composer.verify(&id), Err(ComposeError::NotComposed { .. })));

    let made: Vec<bool> = std::thread::scope(|scope| {
        let tasks: Vec<_> =
            (0..4).map(|_| scope.spawn(|| world.composer.composition(&id).unwrap())).collect();
        tasks.into_iter().map(|t| !t.join().unwrap().reused).collect()
    });
    assert_eq!(made.iter().filter(|m| **m).count(), 1);
    let mut left = world.leftovers();
    left.sort();
    assert_eq!(left, [format!("{id}.raw"), format!("{id}.segments")]);
}

#[test]
fn progress_reaches_the_end() {
    let world = World::new();
    let seen = Mutex::new((0, 0));
    let report = |done: u64, total: u64| {
        let mut seen = seen.lock().unwrap();
        assert!(done <= total);
        *seen = (seen.0.max(done), total);
    };
    world.composer.make_recipe_reporting(&world.set(), false, SIZE, "", &report).unwrap();
    let (done, total) = *seen.lock().unwrap();
    // The 5 MiB of the kernel and the 2 MiB of a file around its hole of 7 MiB, which is no work.
    assert!(total > 7 << 20 && total < 9 << 20, "{total}");
    assert_eq!(done, total);
}

#[test]
fn conflicts_name_the_components_unless_ordered() {
    let world = World::new();
    let set = world.set();
    let rival = |name: &str, content: &str| {
        Draft::new(name, Kind::Program)
            .with("etc", directory())
            .with("etc/rival.conf", file(content))
            .store(&world.repository)
    };
    let mut rivals = set.clone();
    rivals.extend([rival("nginx", "1"), rival("apache", "2")]);
    let error = world.composer.make_recipe(&rivals, false, SIZE, "").unwrap_err();
    let ComposeError::Tree(TreeError::Path { path, first, second, .. }) = &error else { panic!("{error}") };
    assert_eq!((&path[..], &first[..], &second[..]), ("/etc/rival.conf", "apache@1", "nginx@1"));
    let (id, _) = world.composer.make_recipe(&rivals, true, SIZE, "").unwrap();
    let (tree, _) = root_tree(&world.composer.path_of(&id));
    assert_eq!(tree[&b"etc/rival.conf"[..]].what, What::File(b"2".to_vec()));

    let accounts = Draft::new("valkey", Kind::Program)
        .on(set[0])
        .with("etc", directory())
        .fragment("etc/passwd", FragmentRule::Accounts, "valkey:x:120:121::/:/bin/false\n")
        .store(&world.repository);
    let error = world.composer.make_recipe(&[set, vec![accounts]].concat(), false, SIZE, "").unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(source, "/etc/passwd: redis@1 gives id 120 to 'redis' and valkey@1 gives it to 'valkey'");
}

#[test]
fn what_cannot_be_composed_is_refused_by_name() {
    let world = World::new();
    let set = world.set();
    type Change = fn(Draft) -> Draft;
    let table: [(&str, Change); 8] = [
        ("/caf\\xe9", |d| d.with(b"caf\xe9", file("latin 1"))),
        ("/link", |d| d.with("link", thing(0o777, What::Symlink(b"\xff".to_vec())))),
        ("/late", |d| {
            let mut late = file("");
            late.meta.mtime_s = 1 << 34;
            d.with("late", late)
        }),
        ("/device", |d| d.with("device", thing(0o600, What::Char(4096, 0)))),
        ("/attributes", |d| {
            let mut heavy = file("");
            heavy.xattrs = vec![("user.a".into(), vec![1; 3000]), ("user.b".into(), vec![1; 3000])];
            d.with("attributes", heavy)
        }),
        ("/lost+found", |d| d.with("lost+found", file(""))),
        ("/boot/efi/link", |d| {
            d.with("boot", directory())
                .with("boot/efi", directory())
                .with("boot/efi/link", thing(0o777, What::Symlink(b"x".to_vec())))
        }),
        ("/boot/efi/efi/CICADA/Root.cfg", |d| {
            d.with("boot", directory())
                .with("boot/efi", directory())
                .with("boot/efi/efi", directory())
                .with("boot/efi/efi/CICADA", directory())
                .with("boot/efi/efi/CICADA/Root.cfg", file("mine"))
        }),
    ];
    for (expected, change) in table {
        let bad = change(Draft::new("bad", Kind::Program)).store(&world.repository);
        let error =
            world.composer.make_recipe(&[set.clone(), vec![bad]].concat(), false, SIZE, "").unwrap_err();
        match &error {
            ComposeError::Layout { path, .. } | ComposeError::Esp { path, .. } => assert_eq!(path, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
    let error = world.composer.make_recipe(&set[1..], false, SIZE, "").unwrap_err();
    assert!(matches!(error, ComposeError::Tree(TreeError::NotBootable { kind: Kind::Os, .. })), "{error:?}");
    let error = world.composer.make_recipe(&set, false, ByteSize::mib(48), "").unwrap_err();
    let ComposeError::TooSmall { need, .. } = error else { panic!("{error:?}") };
    assert!(need <= SIZE);
    world.composer.make_recipe(&set, false, need, "").unwrap();
    let error = world.composer.make_recipe(&set, false, ByteSize::gib(4096), "").unwrap_err();
    assert!(matches!(error, ComposeError::TooLarge { .. }));
}

#[test]
fn what_is_missing_is_listed_and_a_foreign_composer_is_refused() {
    let world = World::new();
    let set = world.set();
    let (id, recipe) = world.composer.make_recipe(&set, false, SIZE, "").unwrap();
    let absent = ComponentId::of(b"absent");
    let pack = world.repository.manifest(&set[2]).unwrap().packs[0].clone();
    fs::remove_file(file_named(world.repository.dir(), &pack.id.to_string()).unwrap()).unwrap();
    let error = world.composer.make_recipe(&[set, vec![absent]].concat(), false, SIZE, "").unwrap_err();
    let ComposeError::Missing { objects } = &error else { panic!("{error:?}") };
    let pack_shown = format!("pack {} (kernel-0 of kernel@1)", pack.id.short());
    assert_eq!(objects, &[pack_shown, format!("component {absent}")]);

    let mut foreign = recipe;
    foreign.composer = "other/7".into();
    let foreign = world.repository.put_recipe(&foreign).unwrap();
    let error = world.composer.composition(&foreign).unwrap_err().to_string();
    assert!(error.contains("other/7") && error.contains(COMPOSER), "{error}");
    world.composer.verify(&id).unwrap();
}

/// The file of that name below a directory.
fn file_named(dir: &Path, name: &str) -> Option<PathBuf> {
    fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).find_map(|path| {
        let is_it = path.is_file() && path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(name));
        if path.is_dir() { file_named(&path, name) } else { is_it.then_some(path) }
    })
}

#[test]
fn a_damaged_pack_is_named_and_nothing_is_left() {
    let world = World::new();
    let set = world.set();
    let pack = world.repository.manifest(&set[0]).unwrap().packs[1].id;
    let stored = file_named(world.repository.dir(), &pack.to_string()).unwrap();
    let mut bytes = fs::read(&stored).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::set_permissions(&stored, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&stored, bytes).unwrap();
    let error = world.composer.make_recipe(&set, false, SIZE, "").unwrap_err();
    assert!(matches!(error, ComposeError::Repository(RepositoryError::Damaged { .. })), "{error:?}");
    assert!(error.to_string().contains(&pack.to_string()), "{error}");
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn damaged_plain_copies_do_not_spoil_a_disk() {
    let world = World::new();
    let set = world.set();
    let pack = world.repository.manifest(&set[0]).unwrap().packs[1].id;
    world.repository.hot_pack(&pack).unwrap();
    let hot = file_named(&world.repository.dir().join("hot"), &pack.to_string()).unwrap();
    OpenOptions::new().write(true).open(hot).unwrap().write_all_at(b"damage", 4000).unwrap();
    let (id, recipe) = world.composer.make_recipe(&set, false, SIZE, COMMAND_LINE).unwrap();
    assert_eq!(recipe.image_digest.to_string(), GOLDEN_DIGEST);
    world.composer.remove(&id).unwrap();
    world.composer.composition(&id).unwrap();
    world.composer.verify(&id).unwrap();
}

#[test]
fn a_recipe_that_promises_another_disk_is_not_kept() {
    let world = World::new();
    let (_, recipe) = world.composer.make_recipe(&world.set(), false, SIZE, "").unwrap();
    let mut lie = recipe;
    lie.image_digest = cicada::types::ImageDigest::of(b"another");
    let id = world.repository.put_recipe(&lie).unwrap();
    let before = world.leftovers().len();
    let error = world.composer.composition(&id).unwrap_err();
    assert!(matches!(error, ComposeError::Digest { .. }), "{error:?}");
    assert!(!world.composer.is_composed(&id));
    assert_eq!(world.leftovers().len(), before);
}

#[test]
fn damage_to_a_composition_is_found_and_located() {
    let world = World::new();
    let (id, _) = world.composer.make_recipe(&world.set(), false, SIZE, "").unwrap();
    let path = world.composer.path_of(&id);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let disk = OpenOptions::new().write(true).open(&path).unwrap();
    // One in data, one in what was a hole.
    disk.write_all_at(b"x", 11 * SEGMENT_BYTES + 5).unwrap();
    disk.write_all_at(b"x", SIZE.0 - SEGMENT_BYTES * 2 - 1).unwrap();
    let error = world.composer.verify(&id).unwrap_err();
    let ComposeError::Damaged { segments, .. } = &error else { panic!("{error:?}") };
    assert_eq!(segments, &[11, SIZE.0 / SEGMENT_BYTES - 3]);
    assert!(error.to_string().contains("segments 11, 45"), "{error}");
    world.composer.remove(&id).unwrap();
    world.composer.composition(&id).unwrap();
    world.composer.verify(&id).unwrap();
}

#[test]
fn other_hypervisors_get_the_same_disk() {
    let world = World::new();
    let (id, _) = world.composer.make_recipe(&world.set(), false, SIZE, "").unwrap();
    if !has_tool("qemu-img") {
        skipped("no qemu-img (qemu-utils)");
        return;
    }
    for format in ImageFormat::ALL {
        let output = world.dir.path().join(format!("disk.{format}"));
        world.composer.export(&id, &output, format).unwrap();
        let mut compare = Command::new("qemu-img");
        compare.args(["compare", "-f", "raw", "-F"]).arg(format.to_string());
        let out = compare.arg(world.composer.path_of(&id)).arg(&output).output().unwrap();
        assert!(out.status.success(), "{format}: {}", String::from_utf8_lossy(&out.stdout));
    }
    let nowhere = world.dir.path().join("nowhere/disk");
    let error = world.composer.export(&id, &nowhere, ImageFormat::Qcow2).unwrap_err();
    // Found before anything is converted, and by the name of what was to be made.
    assert!(matches!(error, ComposeError::Io { what: "create", .. }), "{error:?}");
    assert!(error.to_string().contains("nowhere"), "{error}");
}

/// Runs a command that needs root and says whether it worked.
fn succeeds(command: &mut Command) -> bool {
    command.output().is_ok_and(|o| o.status.success())
}

/// A file system mounted for one test.
struct Mount(PathBuf);

impl Mount {
    fn tmpfs(dir: &Path, size: &str) -> Option<Self> {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o"]).arg(format!("size={size}")).arg("tmpfs").arg(dir);
        succeeds(&mut mount).then(|| Self(dir.to_owned()))
    }

    fn image(image: &Path, dir: &Path) -> Option<Self> {
        let mut mount = Command::new("mount");
        succeeds(mount.args(["-o", "loop"]).arg(image).arg(dir)).then(|| Self(dir.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        succeeds(Command::new("umount").arg(&self.0));
    }
}

#[test]
fn a_full_disk_says_what_is_needed_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mount) = Mount::tmpfs(dir.path(), "12m") else {
        skipped("no right to mount a small file system");
        return;
    };
    let world =
        World::with_repository(Repository::create(&mount.0.join("r")).unwrap(), tempfile::tempdir().unwrap());
    let error = world.composer.make_recipe(&world.set(), false, SIZE, "").unwrap_err();
    let ComposeError::NoSpace { need, have, .. } = &error else { panic!("{error:?}") };
    assert!(need > have && *have < ByteSize::mib(12), "{error}");
    assert_eq!(world.leftovers(), Vec::<String>::new());
    drop(world);
}

#[test]
fn a_disk_that_fills_while_a_tool_writes_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("small");
    fs::create_dir(&at).unwrap();
    let Some(mount) = Mount::tmpfs(&at, "64k").filter(|_| has_tool("qemu-img")) else {
        skipped("no qemu-img (qemu-utils), or no right to mount a small file system");
        return;
    };
    let input = dir.path().join("disk");
    fs::write(&input, world::noise(1, 1 << 20)).unwrap();
    for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
        let error = cicada::compose::convert(&[input.as_ref()], &at.join("out"), format).unwrap_err();
        let ComposeError::Io { source, .. } = &error else { panic!("{format}: {error}") };
        assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
        assert_eq!(fs::read_dir(&at).unwrap().count(), 0, "nothing is left");
    }
    drop(mount);
    // What is being written, or was when somebody ended it, is not mixed with.
    let part = dir.path().join("out.part");
    fs::write(&part, b"half").unwrap();
    let error = cicada::compose::convert(&[input.as_ref()], &dir.path().join("out"), ImageFormat::Raw);
    assert!(
        matches!(&error, Err(ComposeError::Occupied { reason, .. }) if reason.contains(".part")),
        "{error:?}"
    );
    assert_eq!(fs::read(&part).unwrap(), b"half");
}

#[test]
fn shared_blocks_give_the_same_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (image, mounted) = (dir.path().join("xfs"), dir.path().join("mounted"));
    fs::create_dir(&mounted).unwrap();
    fs::File::create(&image).unwrap().set_len(512 << 20).unwrap();
    let made = succeeds(Command::new("mkfs.xfs").arg("-q").arg(&image));
    let Some(mount) = made.then(|| Mount::image(&image, &mounted)).flatten() else {
        skipped("no mkfs.xfs (xfsprogs), or no right to mount its file system");
        return;
    };
    let world =
        World::with_repository(Repository::create(&mount.0.join("r")).unwrap(), tempfile::tempdir().unwrap());
    let (id, recipe) = world.composer.make_recipe(&world.set(), false, SIZE, COMMAND_LINE).unwrap();
    assert_eq!(recipe.image_digest.to_string(), GOLDEN_DIGEST);
    world.composer.verify(&id).unwrap();
    let shown = Command::new("filefrag").arg("-v").arg(world.composer.path_of(&id)).output();
    match shown {
        Ok(out) => assert!(String::from_utf8_lossy(&out.stdout).contains("shared"), "no block is shared"),
        Err(_) => skipped("no filefrag (e2fsprogs)"),
    }
    drop(world);
}

#[test]
fn an_empty_program_changes_nothing_but_the_recipe() {
    let world = World::new();
    let set = world.set();
    let empty = Draft::new("empty", Kind::Program).store(&world.repository);
    let plain = world.composer.tree(&set, false).unwrap();
    assert_eq!(world.composer.tree(&[set, vec![empty]].concat(), false).unwrap(), plain);
    // The draft's own rules hold too: an empty file lies in no pack.
    let os = world.repository.manifest(&os().store(&world.repository)).unwrap();
    let nothing = os.entries.iter().find(|e| e.path == b"etc/nothing").unwrap();
    assert_eq!(nothing.meta, meta(0o644));
    assert!(matches!(nothing.kind, EntryKind::File { size_bytes: 0, pack: 0, offset_bytes: 0, .. }));
}
