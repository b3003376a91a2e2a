//! What is imported is what is on the disk: archives and directories with what tar, bsdtar and people
//! put into them, imported by the shipping code, composed, and read back. What cannot be kept is
//! refused or told.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use cicada::build::{
    BuildError, ImportIdentity, ImportOptions, LeftOut, check_identity, import, import_reporting,
};
use cicada::component::Kind;
use cicada::types::ComponentId;

use super::read_back::root_tree;
use super::world::{SIZE, Thing, What, World, format, kernel, noise};
use super::{has_tool, skipped};

/// A tar archive, written byte by byte.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn block(path: &str, kind: u8, size: usize, link: &str) -> [u8; 512] {
        let mut b = [0; 512];
        let mut put = |at: usize, text: &[u8]| b[at..at + text.len()].copy_from_slice(text);
        put(0, path.as_bytes());
        put(100, if kind == b'5' { b"0000755" } else { b"0000644" });
        put(108, b"0000000");
        put(116, b"0000000");
        put(124, format!("{size:011o}").as_bytes());
        put(136, b"14000000000");
        put(156, &[kind]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        Self::sum(&mut b);
        b
    }

    fn sum(b: &mut [u8; 512]) {
        b[148..156].fill(b' ');
        let sum: u32 = b.iter().map(|b| u32::from(*b)).sum();
        b[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }

    fn raw(mut self, header: [u8; 512], content: &[u8]) -> Self {
        self.0.extend_from_slice(&header);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn member(self, path: &str, kind: u8, content: &[u8], link: &str) -> Self {
        self.raw(Self::block(path, kind, content.len(), link), content)
    }

    fn file(self, path: &str, content: &[u8]) -> Self {
        self.member(path, b'0', content, "")
    }

    fn pax(self, kind: u8, records: &[(&str, &[u8])]) -> Self {
        let mut all = Vec::new();
        for (key, value) in records {
            let body = key.len() + value.len() + 3;
            let length = (body..).find(|n| *n == body + n.to_string().len()).unwrap();
            all.extend_from_slice(format!("{length} {key}=").as_bytes());
            all.extend_from_slice(value);
            all.push(b'\n');
        }
        self.member("pax", kind, &all, "")
    }

    fn write(self, world: &World) -> PathBuf {
        let path = world.dir.path().join("given.tar");
        fs::write(&path, [self.0, vec![0; 1024]].concat()).unwrap();
        path
    }
}

/// A record as the first header of a pair.
fn long_name(name: &str) -> Tar {
    Tar::default().member("././@LongLink", b'L', format!("{name}\0").as_bytes(), "")
}

fn identity(name: &str, kind: Kind, requires: &[ComponentId]) -> ImportIdentity {
    let requires = requires.to_vec();
    ImportIdentity { name: name.into(), version: "1".into(), kind, architecture: "amd64".into(), requires }
}

/// A directory whose entries are made by `make`.
fn source(world: &World, name: &str, make: impl FnOnce(&Path)) -> PathBuf {
    let path = world.dir.path().join(name);
    fs::create_dir(&path).unwrap();
    make(&path);
    path
}

fn put(root: &Path, path: &str, content: &[u8]) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

/// Everything on the disk that `os` and `others` make.
fn disk(world: &World, os: ComponentId, others: &[ComponentId]) -> std::collections::BTreeMap<String, Thing> {
    let mut set = vec![format().store(&world.repository), kernel().store(&world.repository), os];
    set.extend_from_slice(others);
    let (recipe, _) = world.composer.make_recipe(&set, false, SIZE, "").unwrap();
    let (found, _) = root_tree(&world.composer.path_of(&recipe));
    found.into_iter().map(|(path, thing)| (String::from_utf8(path).unwrap(), thing)).collect()
}

fn content(disk: &std::collections::BTreeMap<String, Thing>, path: &str) -> Vec<u8> {
    match &disk[path].what {
        What::File(content) => content.clone(),
        other => panic!("{path} is {other:?}"),
    }
}

fn refusal(world: &World, archive: Tar) -> String {
    let path = archive.write(world);
    let error = import(&world.repository, &path, identity("refused", Kind::Os, &[])).unwrap_err();
    assert!(matches!(error, BuildError::Archive { .. }), "{error}");
    assert!(world.repository.resolve_component("refused").is_err());
    error.to_string()
}

fn import_os(world: &World, archive: Tar) -> ComponentId {
    import(&world.repository, &archive.write(world), identity("os", Kind::Os, &[])).unwrap()
}

fn tar(world: &World, source: &Path, arguments: &[&str]) -> PathBuf {
    let archive = world.dir.path().join("made.tar");
    let status = Command::new("tar")
        .args(["--create", "--file"])
        .arg(&archive)
        .args(arguments)
        .arg("--directory")
        .arg(source)
        .arg(".")
        .status()
        .unwrap();
    assert!(status.success());
    archive
}

#[test]
fn sparse_files_of_every_format_come_back_under_their_name() {
    let world = World::new();
    let mut expected = vec![0; 5 << 20];
    for (at, seed) in [(0, 1), (1 << 20, 2), (3 << 20, 3), ((5 << 20) - 4096, 4)] {
        expected[at..at + 4096].copy_from_slice(&noise(seed, 4096));
    }
    let given = source(&world, "source", |root| {
        use std::os::unix::fs::FileExt;
        fs::create_dir(root.join("opt")).unwrap();
        let many = fs::File::create(root.join("opt/many")).unwrap();
        many.set_len(8 << 20).unwrap();
        // More runs than a header of the old format holds.
        (0..60).for_each(|n| many.write_all_at(b"x", n * (128 << 10)).unwrap());
        let file = fs::File::create(root.join("opt/sparse")).unwrap();
        file.set_len(5 << 20).unwrap();
        for at in [0, 1 << 20, 3 << 20, (5 << 20) - 4096] {
            file.write_all_at(&expected[at..at + 4096], at as u64).unwrap();
        }
        fs::File::create(root.join("opt/hole")).unwrap().set_len(1 << 20).unwrap();
    });
    let direct = import(&world.repository, &given, identity("os", Kind::Os, &[])).unwrap();
    let expected_entries = world.repository.manifest(&direct).unwrap().entries.clone();
    for format in ["gnu", "0.0", "0.1", "1.0"] {
        let version = format!("--sparse-version={format}");
        let arguments = match format {
            "gnu" => vec!["--sparse", "--format=gnu"],
            _ => vec!["--sparse", "--format=posix", &version],
        };
        let archive = tar(&world, &given, &arguments);
        assert!(fs::metadata(&archive).unwrap().len() < 1 << 20, "tar found the holes");
        let id = import(&world.repository, &archive, identity("os", Kind::Os, &[])).unwrap();
        assert_eq!(world.repository.manifest(&id).unwrap().entries, expected_entries, "{format}");
    }
    let disk = disk(&world, direct, &[]);
    assert!(content(&disk, "opt/sparse") == expected);
    assert_eq!(content(&disk, "opt/hole"), vec![0; 1 << 20]);
    assert_eq!(content(&disk, "opt/many").iter().filter(|b| **b != 0).count(), 60);
}

#[test]
fn maps_of_sparse_files_that_lie_are_refused() {
    let world = World::new();
    let sparse = |map: &[u8]| {
        let records: [(&str, &[u8]); 3] =
            [("GNU.sparse.size", b"8192"), ("GNU.sparse.name", b"opt/s"), ("GNU.sparse.map", map)];
        Tar::default().pax(b'x', &records).file("GNUSparseFile.1/s", &[7; 1024])
    };
    let good = import_os(&world, sparse(b"0,512,4096,512"));
    let on_disk = content(&disk(&world, good, &[]), "opt/s");
    let data: Vec<usize> = (0..8192).filter(|i| on_disk[*i] == 7).collect();
    assert_eq!(data, (0..512).chain(4096..4608).collect::<Vec<_>>());
    for map in [
        "4096,512,0,512",
        "0,512,256,512",
        "0,512,8000,512",
        "0,512",
        "0,512,4096",
        "0,x",
        "0,18446744073709551615,1,1",
    ] {
        let error = refusal(&world, sparse(map.as_bytes()));
        assert!(error.contains("/opt/s") || error.contains("GNU.sparse.map"), "{map}: {error}");
    }
    for records in [
        &[("GNU.sparse.major", &b"1"[..]), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"9")][..],
        &[("GNU.sparse.major", b"2"), ("GNU.sparse.minor", b"0")],
    ] {
        refusal(&world, Tar::default().pax(b'x', records).file("s", &[b'1'; 512]));
    }
}

#[test]
fn keys_that_are_not_known_refuse_the_archive_and_name_member_and_key() {
    let world = World::new();
    for key in [
        "SCHILY.acl.ace",
        "SCHILY.fflags",
        "GNU.dumpdir",
        "GNU.volume.filename",
        "EXAMPLE.key",
        "SCHILY.realsize",
    ] {
        let error =
            refusal(&world, Tar::default().pax(b'x', &[("path", b"opt/f"), (key, b"1")]).file("x", b"1"));
        assert!(error.contains("/opt/f") && error.contains(key), "{error}");
    }
    // Of all members at once only what can be meant so.
    let error = refusal(&world, Tar::default().pax(b'g', &[("path", b"opt/f")]).file("x", b"1"));
    assert!(error.contains("'path'"), "{error}");
    let global: [(&str, &[u8]); 3] = [("comment", b"8bc4"), ("mtime", b"1000.5"), ("uid", b"70000")];
    let own: [(&str, &[u8]); 2] = [("mtime", b"-7.25"), ("atime", b"1")];
    let archive =
        Tar::default().pax(b'g', &global).file("a", b"1").pax(b'x', &own).file("b", b"2").file("c", b"3");
    let id = import_os(&world, archive);
    let manifest = world.repository.manifest(&id).unwrap();
    let said: Vec<_> = manifest.entries[1..].iter().map(|e| (e.meta.uid, e.meta.mtime_s)).collect();
    assert_eq!(said, [(70_000, 1000), (70_000, -8), (70_000, 1000)]);
}

#[test]
fn members_that_archives_hold_besides_files_are_not_mistaken_for_them() {
    let world = World::new();
    for kind in *b"DMNXAI" {
        let error = refusal(&world, Tar::default().member("m", kind, b"", ""));
        assert!(error.contains("/m"), "{error}");
    }
    let whiteout = refusal(&world, Tar::default().file("opt/.wh.gone", b""));
    assert!(whiteout.contains("docker export"), "{whiteout}");
    // The oldest kind has no magic; the label of a volume is nothing; an empty archive is one.
    let mut old = Tar::block("old/", 0, 0, "");
    old[257..265].fill(0);
    Tar::sum(&mut old);
    let id =
        import_os(&world, Tar::default().member("label", b'V', b"", "").raw(old, b"").file("old/f", b"x"));
    let manifest = world.repository.manifest(&id).unwrap();
    assert_eq!(
        manifest.entries.iter().map(|e| &e.path[..]).collect::<Vec<_>>(),
        [&b""[..], b"old", b"old/f"]
    );
    import_os(&world, Tar::default());
    let joined =
        Tar([Tar::default().file("a", b"1").0, vec![0; 1024], Tar::default().file("b", b"2").0].concat());
    assert!(refusal(&world, joined).contains("something follows"));
    // Cut between two members: nothing says that there were more but the missing end.
    let cut = world.dir.path().join("cut.tar");
    fs::write(&cut, Tar::default().file("a", b"1").0).unwrap();
    let error = import(&world.repository, &cut, identity("cut", Kind::Os, &[])).unwrap_err().to_string();
    assert!(error.contains("cut short"), "{error}");
    for (magic, hint) in [(&b"\x1f\x8b\x08"[..], "gunzip"), (b"\xfd7zXZ\0", "unxz"), (b"PK\x03\x04", "zip")] {
        fs::write(&cut, [magic, &[1; 2000]].concat()).unwrap();
        let error = import(&world.repository, &cut, identity("cut", Kind::Os, &[])).unwrap_err();
        assert!(
            matches!(error, BuildError::UnknownSource { .. }) && error.to_string().contains(hint),
            "{error}"
        );
    }
}

#[test]
fn attributes_acls_and_odd_names_are_read_by_length() {
    let world = World::new();
    let access = b"user::rw-\nuser:redis:r--\nuser:7:rw-\ngroup::r--\nmask::rw-\nother::---\n";
    let capability = [1, 0, 0, 2, 10, 0x20, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let records: [(&str, &[u8]); 5] = [
        ("path", b"opt/two\nlines"),
        ("SCHILY.acl.access", access),
        ("SCHILY.xattr.security.capability", &capability),
        ("SCHILY.xattr.user.a%3Db", b"\n12 mtime=5\n"),
        ("mtime", b"1700000000"),
    ];
    let one_line: [(&str, &[u8]); 1] =
        [("SCHILY.acl.access", b"user::rwx,user:redis:r-x:110,group::r-x,mask::r-x,other::r-x")];
    let minimal: [(&str, &[u8]); 1] = [("SCHILY.acl.access", b"user::rwx,group::r-x,other::---")];
    let archive = Tar::default()
        .pax(b'x', &records)
        .file("x", b"1")
        .file("etc/passwd", b"redis:x:110:110::/:/bin/false\n")
        .pax(b'x', &one_line)
        .file("opt/line", b"2")
        .pax(b'x', &minimal)
        .file("opt/minimal", b"3");
    let id = import_os(&world, archive);
    let disk = disk(&world, id, &[]);
    let odd = &disk["opt/two\nlines"];
    // As ext4 stores it: owner, user 7, user 110, group, mask, others.
    let acl = [
        &[1, 0, 0, 0, 1, 0, 6, 0][..],
        &[2, 0, 6, 0, 7, 0, 0, 0, 2, 0, 4, 0, 110, 0, 0, 0],
        &[4, 0, 4, 0, 0x10, 0, 6, 0, 0x20, 0, 0, 0],
    ]
    .concat();
    let expected = [
        ("security.capability", capability.to_vec()),
        ("system.posix_acl_access", acl),
        ("user.a=b", b"\n12 mtime=5\n".to_vec()),
    ];
    assert_eq!(odd.xattrs, expected.map(|(n, v)| (n.to_owned(), v)));
    assert_eq!((odd.meta.mode, odd.meta.mtime_s), (0o660, 1_700_000_000));
    assert_eq!(disk["opt/line"].xattrs.len(), 1);
    assert_eq!(disk["opt/line"].meta.mode, 0o755);
    assert_eq!((disk["opt/minimal"].meta.mode, disk["opt/minimal"].xattrs.len()), (0o750, 0));
    let unknown: [(&str, &[u8]); 1] = [(
        "SCHILY.acl.access",
        b"user::rw-\nuser:no-such-user-here:r--\ngroup::r--\nmask::rw-\nother::---\n",
    )];
    let error = refusal(&world, Tar::default().pax(b'x', &unknown).file("opt/f", b""));
    assert!(error.contains("/opt/f") && error.contains("no-such-user-here"), "{error}");
    for bad in ["user::rwx", "user::rwx,user:5:r--,group::r--,other::---", "nonsense"] {
        refusal(&world, Tar::default().pax(b'x', &[("SCHILY.acl.access", bad.as_bytes())]).file("f", b""));
    }
}

#[test]
fn gnu_tar_with_acls_gives_what_the_directory_gives() {
    if !has_tool("setfacl") {
        return skipped("setfacl is not installed");
    }
    let world = World::new();
    let given = source(&world, "source", |root| {
        put(root, "opt/d/f", b"x");
        let set = |arguments: &[&str]| {
            assert!(
                Command::new("setfacl").args(arguments).arg(root.join("opt/d")).status().unwrap().success()
            );
        };
        // Of an account that has a name here, and of one that has none.
        set(&["-m", "u:1:rwx,g:4:r-x,u:61234:r--"]);
        set(&["-d", "-m", "u:1:rwx"]);
    });
    let direct = import(&world.repository, &given, identity("os", Kind::Os, &[])).unwrap();
    let archive = tar(&world, &given, &["--format=posix", "--acls", "--xattrs"]);
    let archived = import(&world.repository, &archive, identity("os", Kind::Os, &[])).unwrap();
    let entries = |id| world.repository.manifest(&id).unwrap().entries.clone();
    assert_eq!(entries(archived), entries(direct));
    let names: Vec<_> = entries(direct)[2].xattrs.iter().map(|x| x.0.clone()).collect();
    assert_eq!(names, ["system.posix_acl_access", "system.posix_acl_default"]);
}

/// An OS with a merged `/usr`.
fn merged_os(world: &World) -> ComponentId {
    let archive = Tar::default()
        .member("usr", b'5', b"", "")
        .member("usr/lib", b'5', b"", "")
        .file("usr/lib/libc.so", b"libc")
        .member("lib", b'2', b"", "usr/lib")
        .member("lib64", b'2', b"", "/lib")
        .member("dead", b'2', b"", "nowhere")
        .member("srv", b'5', b"", "")
        .file("srv/data", b"data")
        .pax(b'x', &[("mtime", b"1234567890"), ("uid", b"5")])
        .member("tmp", b'5', b"", "");
    import_os(world, archive)
}

#[test]
fn what_a_program_has_goes_through_the_links_of_its_os_and_leaves_directories_alone() {
    let world = World::new();
    let os = merged_os(&world);
    // Through another component: what it requires has the link.
    let middle = Tar::default().file("opt/middle", b"m").write(&world);
    let middle = import(&world.repository, &middle, identity("middle", Kind::Program, &[os])).unwrap();
    for (name, requires) in [("direct", os), ("through", middle)] {
        let archive = Tar::default()
            .member("lib", b'5', b"", "")
            .file("lib/mine.so", b"mine")
            .member("lib64/ld.so", b'1', b"", "lib/mine.so")
            .pax(b'x', &[("uid", b"1000"), ("mtime", b"1")])
            .member("usr", b'5', b"", "")
            .member("tmp", b'5', b"", "")
            .pax(b'x', &[("uid", b"1000"), ("mtime", b"1")])
            .member("opt/own", b'5', b"", "");
        let id =
            import(&world.repository, &archive.write(&world), identity(name, Kind::Program, &[requires]))
                .unwrap();
        let others = if name == "direct" { vec![id] } else { vec![middle, id] };
        let disk = disk(&world, os, &others);
        assert_eq!(disk["lib"].what, What::Symlink(b"usr/lib".to_vec()));
        assert_eq!(content(&disk, "usr/lib/libc.so"), b"libc");
        assert_eq!(content(&disk, "usr/lib/mine.so"), b"mine");
        assert_eq!((content(&disk, "usr/lib/ld.so"), disk["usr/lib/ld.so"].links), (b"mine".to_vec(), 2));
        assert_eq!((disk["usr"].meta.uid, disk["usr"].meta.mtime_s), (0, 0o14000000000));
        assert_eq!((disk["tmp"].meta.uid, disk["tmp"].meta.mtime_s), (5, 1_234_567_890));
        assert_eq!((disk["opt/own"].meta.uid, disk["opt/own"].meta.mtime_s), (1000, 1));
    }
}

#[test]
fn what_would_take_away_a_directory_of_the_os_is_refused_unless_asked_for() {
    let world = World::new();
    let os = merged_os(&world);
    let program = |archive: Tar, as_is: bool| {
        let path = archive.write(&world);
        let identity = identity("program", Kind::Program, &[os]);
        import_reporting(&world.repository, &path, identity, ImportOptions { as_is }, &mut |_| {})
    };
    type Make = fn() -> Tar;
    let cases: [(&str, Make); 7] = [
        ("/lib", || Tar::default().file("lib", b"x")),
        ("/lib64", || Tar::default().member("lib64", b'2', b"", "srv")),
        ("/srv", || Tar::default().member("srv", b'2', b"", "/opt")),
        ("/srv", || Tar::default().file("srv", b"x")),
        ("/usr/lib/libc.so", || Tar::default().file("usr/lib/libc.so/x", b"x")),
        ("/dead", || Tar::default().file("dead/x", b"x")),
        ("/usr/lib/a", || Tar::default().file("lib/a", b"1").file("usr/lib/a", b"2")),
    ];
    for (path, archive) in cases {
        let error = program(archive(), false).unwrap_err();
        assert!(matches!(error, BuildError::Replaces { .. }), "{path}: {error}");
        assert!(error.to_string().contains(path) && error.to_string().contains("--as-is"), "{error}");
    }
    // Another way of saying where it leads.
    program(Tar::default().member("lib", b'2', b"", "/usr/./lib"), false).unwrap();
    let id = program(Tar::default().member("lib", b'5', b"", "").file("lib/a", b"1"), true).unwrap();
    assert_eq!(disk(&world, os, &[id])["lib"].what, What::Directory);
}

#[test]
fn hard_links_are_to_what_lay_there_in_the_order_of_the_archive() {
    let world = World::new();
    let archive = Tar::default()
        .file("first", b"one")
        .member("link", b'1', b"", "first")
        .member("again", b'1', b"", "./link")
        .file("first", b"two")
        .member("sym", b'2', b"", "first")
        .member("symlink", b'1', b"", "sym")
        .member("pipe", b'6', b"", "")
        .member("pipe2", b'1', b"", "pipe")
        .member("block", b'4', b"", "")
        .member("block2", b'1', b"", "block");
    let id = import_os(&world, archive);
    let disk = disk(&world, id, &[]);
    assert_eq!((content(&disk, "first"), disk["first"].links), (b"two".to_vec(), 1));
    assert_eq!((content(&disk, "link"), disk["link"].links), (b"one".to_vec(), 2));
    assert_eq!((content(&disk, "again"), disk["again"].links), (b"one".to_vec(), 2));
    assert_eq!(disk["symlink"].what, What::Symlink(b"first".to_vec()));
    // Whatever has an inode may have two names.
    for name in ["sym", "symlink", "pipe", "pipe2", "block", "block2"] {
        assert_eq!(disk[name].links, 2, "{name}");
    }
    for target in ["later", "opt", "../first", "/first"] {
        let archive =
            Tar::default().member("opt", b'5', b"", "").member("l", b'1', b"", target).file("later", b"x");
        assert!(refusal(&world, archive).contains(target.trim_start_matches(['.', '/'])));
    }
    let replaced = Tar::default().file("d/f", b"1").file("d", b"2");
    assert!(refusal(&world, replaced).contains("/d"));
}

#[test]
fn what_has_several_names_in_a_directory_has_them_on_the_disk() {
    let world = World::new();
    let given = source(&world, "source", |root| {
        put(root, "opt/f", b"x");
        fs::create_dir_all(root.join("etc")).unwrap();
        symlink("f", root.join("opt/sym")).unwrap();
        fs::hard_link(root.join("opt/sym"), root.join("opt/sym2")).unwrap();
        assert!(Command::new("mkfifo").arg(root.join("opt/pipe")).status().unwrap().success());
        fs::hard_link(root.join("opt/pipe"), root.join("opt/pipe2")).unwrap();
        // The first name is left out.
        symlink("../opt/f", root.join("etc/hostname")).unwrap();
        fs::hard_link(root.join("etc/hostname"), root.join("opt/name")).unwrap();
        fs::hard_link(root.join("etc/hostname"), root.join("opt/name2")).unwrap();
        // All names are left out.
        drop(std::os::unix::net::UnixListener::bind(root.join("opt/socket")).unwrap());
        fs::hard_link(root.join("opt/socket"), root.join("opt/socket2")).unwrap();
    });
    let id = import(&world.repository, &given, identity("os", Kind::Os, &[])).unwrap();
    let disk = disk(&world, id, &[]);
    for name in ["sym", "sym2", "pipe", "pipe2", "name", "name2"] {
        assert_eq!(disk[&*format!("opt/{name}")].links, 2, "{name}");
    }
    assert_eq!(disk["opt/sym2"].what, What::Symlink(b"f".to_vec()));
    assert_eq!(disk["opt/name"].what, What::Symlink(b"../opt/f".to_vec()));
    assert!(!disk.contains_key("opt/socket") && !disk.contains_key("opt/socket2"));
}

#[test]
fn times_are_kept_as_far_as_the_file_system_holds_them() {
    let world = World::new();
    let times = [-315_619_200i64, 1_743_217_383, 1_000_000_000, -(1 << 31), (1 << 34) - (1 << 31) - 1];
    let given = source(&world, "source", |root| {
        put(root, "opt/f", b"x");
        put(root, "etc/passwd", b"root:x:0:0::/:/bin/sh\n");
        let touch = |path: &str, date: &str| {
            assert!(
                Command::new("touch").arg("-d").arg(date).arg(root.join(path)).status().unwrap().success()
            );
        };
        touch("opt/f", "2025-03-29T03:03:03.9Z");
        touch("opt", "2001-09-09T01:46:40Z");
        touch("etc/passwd", "2025-03-29T03:03:03Z");
    });
    let id = import(&world.repository, &given, identity("os", Kind::Os, &[])).unwrap();
    let on_disk = disk(&world, id, &[]);
    assert_eq!(on_disk["opt/f"].meta.mtime_s, times[1]);
    assert_eq!(on_disk["etc/passwd"].meta.mtime_s, times[1]);
    assert_eq!(on_disk["opt"].meta.mtime_s, times[2]);
    let mut archive = Tar::default();
    for (n, time) in times.iter().enumerate() {
        // In base 256, as GNU tar writes what octal digits cannot say.
        let mut header = Tar::block(&format!("d{n}"), b'5', 0, "");
        header[136..148]
            .copy_from_slice(&[&[if *time < 0 { 0xff } else { 0 }; 4][..], &time.to_be_bytes()].concat());
        header[136] |= 0x80;
        Tar::sum(&mut header);
        archive = archive
            .raw(header, b"")
            .pax(b'x', &[("mtime", time.to_string().as_bytes())])
            .file(&format!("f{n}"), b"x");
    }
    let id = import_os(&world, archive);
    let on_disk = disk(&world, id, &[]);
    for (n, time) in times.iter().enumerate() {
        assert_eq!(on_disk[&format!("d{n}")].meta.mtime_s, *time);
        assert_eq!(on_disk[&format!("f{n}")].meta.mtime_s, *time);
    }
    for time in [-(1i64 << 31) - 1, (1 << 34) - (1 << 31), i64::MIN + 1] {
        let path = Tar::default()
            .pax(b'x', &[("mtime", time.to_string().as_bytes())])
            .file("opt/f", b"x")
            .write(&world);
        let error = import(&world.repository, &path, identity("os", Kind::Os, &[])).unwrap_err();
        assert!(matches!(error, BuildError::Compose(_)), "{error}");
        let said = words(&error);
        assert!(said.contains("/opt/f") && said.contains("its time is before 1901 or after 2446"), "{said}");
    }
}

/// An error with all that it is caused by.
fn words(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |e| e.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[test]
fn what_no_disk_holds_is_refused_before_anything_is_stored() {
    let world = World::new();
    let refused = |name: &str, make: &dyn Fn(&Path)| {
        let given = source(&world, name, make);
        let error = import(&world.repository, &given, identity("refused", Kind::Os, &[])).unwrap_err();
        assert!(matches!(error, BuildError::Compose(_)), "{name}: {error}");
        words(&error)
    };
    let name = refused("name", &|root| fs::write(root.join(OsStr::from_bytes(b"\xff")), b"1").unwrap());
    assert!(name.contains("its name is not UTF-8"), "{name}");
    let id = refused("id", &|root| put(root, "etc/passwd", b"a:x:7:7::/:/x\nb:x:7:7::/:/x\n"));
    assert!(id.contains('7') && id.contains("/etc/passwd"), "{id}");
    let esp = refused("esp", &|root| {
        fs::create_dir_all(root.join("boot/efi")).unwrap();
        symlink("x", root.join("boot/efi/l")).unwrap();
    });
    assert!(esp.contains("/boot/efi/l") && esp.contains("FAT has no links"), "{esp}");
    let lost = refused("lost", &|root| put(root, "lost+found/x", b"1"));
    assert!(lost.contains("/lost+found"), "{lost}");
    let mut links = Tar::default().file("f", b"x");
    for n in 0..65_000 {
        links = links.member(&format!("l{n}"), b'1', b"", "f");
    }
    let path = links.write(&world);
    let error = import(&world.repository, &path, identity("refused", Kind::Os, &[])).unwrap_err();
    assert!(words(&error).contains("more than 65000 links"), "{}", words(&error));
    assert!(world.repository.components().unwrap().is_empty());
}

#[test]
fn what_is_left_out_is_told_and_not_entered() {
    let world = World::new();
    let given = source(&world, "source", |root| {
        put(root, "var/log/service/today", b"log");
        put(root, "var/backups/b", b"b");
        put(root, "etc/hostname", b"h");
        put(root, "dev/x/y", b"z");
        put(root, "opt/f", b"kept");
        fs::create_dir_all(root.join("run")).unwrap();
        drop(std::os::unix::net::UnixListener::bind(root.join("opt/s")).unwrap());
        // Nobody may look into it, as with another's /proc. Root may anyway.
        put(root, "proc/closed/x", b"x");
        fs::set_permissions(root.join("proc/closed"), fs::Permissions::from_mode(0o0)).unwrap();
    });
    let told = |path: &Path| {
        let mut told: Vec<LeftOut> = Vec::new();
        let options = ImportOptions::default();
        import_reporting(&world.repository, path, identity("os", Kind::Os, &[]), options, &mut |l| {
            told.push(l)
        })
        .unwrap();
        let mut paths: Vec<String> = told.into_iter().map(|l| l.path).collect();
        paths.sort();
        paths
    };
    // Only root may set one.
    symlink("f", given.join("opt/link")).unwrap();
    let flags = rustix::fs::XattrFlags::empty();
    let is_marked = rustix::fs::lsetxattr(given.join("opt/link"), "trusted.x", b"1", flags).is_ok();
    let expected =
        ["/dev/**", "/etc/hostname", "/opt/s", "/proc/**", "/var/backups/b", "/var/log/service/today"];
    let told_of: Vec<String> = told(&given).into_iter().filter(|p| p != "/opt/link").collect();
    assert_eq!(told_of, expected);
    assert_eq!(told(&given).iter().any(|p| p == "/opt/link"), is_marked);
    let trusted: [(&str, &[u8]); 1] = [("SCHILY.xattr.trusted.x", b"1")];
    let archive =
        Tar::default().pax(b'x', &trusted).file("opt/f", b"x").file("run/x", b"1").file("etc/hostname", b"h");
    assert_eq!(told(&archive.write(&world)), ["/etc/hostname", "/opt/f", "/run/x"]);
    assert!(fs::metadata(given.join("proc/closed")).unwrap().mode() & 0o777 == 0);
    fs::set_permissions(given.join("proc/closed"), fs::Permissions::from_mode(0o700)).unwrap();
}

#[test]
fn a_name_that_cannot_be_is_found_before_the_work() {
    for (name, version) in [("Bad", "1"), ("", "1"), ("a", "1 2"), ("a", ""), ("a", &"1".repeat(2000))] {
        let mut wrong = identity(name, Kind::Program, &[]);
        wrong.version = version.into();
        assert!(matches!(check_identity(&wrong), Err(BuildError::Manifest(_))), "{name} {version}");
        let world = World::new();
        // The source is not even looked for.
        let error = import(&world.repository, Path::new("/nowhere"), wrong).unwrap_err();
        assert!(matches!(error, BuildError::Manifest(_)), "{error}");
    }
    for architecture in ["", "x y", "AMD64", "amd64\n"] {
        let wrong = ImportIdentity { architecture: architecture.into(), ..identity("a", Kind::Program, &[]) };
        assert!(matches!(check_identity(&wrong), Err(BuildError::Manifest(_))), "{architecture}");
    }
}

#[test]
fn archives_with_wrong_bytes_are_refused_or_imported_and_never_worse() {
    let world = World::new();
    let sparse: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"opt/sparse"),
        ("GNU.sparse.realsize", b"9000"),
    ];
    let mut map = b"1\n4096\n512\n".to_vec();
    map.resize(1024, 1);
    let attributes: [(&str, &[u8]); 4] = [
        ("SCHILY.acl.access", b"user::rw-,user:5:r--,group::r--,mask::r--,other::---"),
        ("LIBARCHIVE.xattr.user.x", b"AQID"),
        ("mtime", b"-12.5"),
        ("path", b"opt/long"),
    ];
    let whole = Tar::default()
        .pax(b'g', &[("comment", b"x")])
        .pax(b'x', &sparse)
        .file("GNUSparseFile.0/sparse", &map)
        .pax(b'x', &attributes)
        .file("x", b"content")
        .member("././@LongLink", b'L', b"opt/very/long/name\0", "")
        .file("opt/very", b"y")
        .member("opt/link", b'1', b"", "opt/long")
        .member("opt/dir", b'5', b"", "");
    assert!(import(&world.repository, &whole.write(&world), identity("os", Kind::Os, &[])).is_ok());
    let whole = Tar(fs::read(world.dir.path().join("given.tar")).unwrap()).0;
    let path = world.dir.path().join("wrong.tar");
    let mut random = noise(9, 8 * 600).into_iter();
    let mut next = |below: usize| {
        let bytes: Vec<u8> = random.by_ref().take(4).collect();
        u32::from_le_bytes(bytes.try_into().unwrap()) as usize % below
    };
    for round in 0..500 {
        let mut wrong = whole.clone();
        let at = next(wrong.len());
        match round % 5 {
            0 => wrong.truncate(at),
            _ => wrong[at] = next(256) as u8,
        }
        // With the right sum, what is wrong comes further.
        let begin = at / 512 * 512;
        if round % 2 == 0
            && let Some(block) = wrong.get_mut(begin..begin + 512)
            && &block[257..262] == b"ustar"
        {
            Tar::sum(block.try_into().unwrap());
        }
        fs::write(&path, &wrong).unwrap();
        let _ = import(&world.repository, &path, identity("os", Kind::Os, &[]));
    }
}

#[test]
fn images_of_containers_in_layers_are_refused_from_archives_and_directories() {
    let world = World::new();
    let saved = |tar: Tar| {
        tar.file("manifest.json", b"[{\"Layers\":[\"abc/layer.tar\"]}]").file("abc/layer.tar", &[0; 1024])
    };
    let oci = |tar: Tar| {
        let tar = tar.file("oci-layout", b"{\"imageLayoutVersion\":\"1.0.0\"}");
        tar.file("index.json", b"{}").file("blobs/sha256/abc", b"x")
    };
    for archive in [saved(Tar::default()), oci(Tar::default()), Tar::default().file("opt/.wh..wh..opq", b"")]
    {
        let error = refusal(&world, archive);
        assert!(error.contains("docker export"), "{error}");
    }
    for (name, paths) in [
        ("saved", &["manifest.json", "abc/layer.tar"][..]),
        ("oci", &["oci-layout", "index.json", "blobs/sha256/abc"]),
        ("layer", &["opt/.wh.gone"]),
    ] {
        let given = source(&world, name, |root| paths.iter().for_each(|path| put(root, path, b"x")));
        let error = import(&world.repository, &given, identity("refused", Kind::Program, &[])).unwrap_err();
        assert!(error.to_string().contains("docker export"), "{error}");
    }
    // A program may call its files so.
    import_os(&world, Tar::default().file("manifest.json", b"{}").file("index.json", b"{}"));
}

#[test]
fn compressed_archives_are_read_as_every_zstd_writes_them() {
    let world = World::new();
    let plain = fs::read(Tar::default().file("opt/f", &noise(1, 5000)).write(&world)).unwrap();
    let packed = |bytes: &[u8]| zstd::encode_all(bytes, 3).unwrap();
    let skippable = [&0x184d_2a50_u32.to_le_bytes()[..], &4u32.to_le_bytes(), b"size"].concat();
    let given = world.dir.path().join("given.tar.zst");
    let mut ids = Vec::new();
    for bytes in [
        packed(&plain),
        // As pzstd does, and as 'cat' of two does.
        [&skippable[..], &packed(&plain)].concat(),
        [packed(&plain[..3000]), skippable.clone(), packed(&plain[3000..])].concat(),
    ] {
        fs::write(&given, bytes).unwrap();
        ids.push(import(&world.repository, &given, identity("os", Kind::Os, &[])).unwrap());
    }
    assert!(ids.iter().all(|id| *id == ids[0]));
    fs::write(&given, &packed(&plain)[..3000]).unwrap();
    let error = import(&world.repository, &given, identity("cut", Kind::Os, &[])).unwrap_err();
    assert!(matches!(error, BuildError::Read { .. }), "{error}");
    // What takes more memory than is given says so, and is not damaged.
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(28).unwrap();
    encoder.include_contentsize(false).unwrap();
    std::io::Write::write_all(&mut encoder, &plain).unwrap();
    fs::write(&given, encoder.finish().unwrap()).unwrap();
    let error = import(&world.repository, &given, identity("long", Kind::Os, &[])).unwrap_err();
    assert!(error.to_string().contains("--long=31"), "{error}");
}

#[test]
fn a_source_that_can_be_read_once_is_refused_and_not_waited_for() {
    let world = World::new();
    let pipe = world.dir.path().join("pipe");
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, kind, rustix::fs::Mode::RUSR, 0).unwrap();
    for (path, hint) in [(pipe.as_path(), "it is a pipe"), (Path::new("/dev/null"), "neither")] {
        let error = import(&world.repository, path, identity("os", Kind::Os, &[])).unwrap_err();
        assert!(
            matches!(error, BuildError::UnknownSource { .. }) && error.to_string().contains(hint),
            "{error}"
        );
    }
}

#[test]
fn headers_about_nothing_and_paths_that_lead_out_say_what_to_do() {
    let world = World::new();
    for (archive, words) in [
        (Tar::default().file("a", b"").pax(b'x', &[("path", b"opt/f")]), "at the end"),
        (long_name("opt/f"), "at the end"),
        (Tar::default().file("/etc/f", b""), "without -P"),
        (Tar::default().file("opt/../../f", b""), "'..'"),
        (Tar::default().pax(b'x', &[("path", b"a\0b")]).file("x", b""), "NUL"),
    ] {
        let error = refusal(&world, archive);
        assert!(error.contains(words), "{error}");
    }
    import_os(&world, Tar(long_name("opt/f").file("x", b"").0));
}

#[test]
fn many_small_files_take_the_disk_that_their_number_needs() {
    let world = World::new();
    let archive = (0..70_000).fold(Tar::default(), |tar, n| tar.file(&format!("opt/{n}"), b""));
    let os = import_os(&world, archive);
    let set = [format().store(&world.repository), kernel().store(&world.repository), os];
    let size = |bytes: u64| world.composer.make_recipe(&set, false, cicada::types::ByteSize(bytes), "");
    let error = size(100 << 20).unwrap_err();
    let cicada::compose::ComposeError::TooSmall { need, .. } = error else { panic!("{error}") };
    size(need.0).unwrap();
}
