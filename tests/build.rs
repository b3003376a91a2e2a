//! Components from directories, archives and definitions, as an operator makes them. Promises
//! guarded: equal inputs give equal ids, nothing of a tree is lost or altered, no secret enters.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use cicada::build::{BuildError, BuildOptions, ImportIdentity, build, import, materialise};
use cicada::component::manifest::{EntryKind, Manifest};
use cicada::component::{Definition, Kind};
use cicada::repository::Repository;
use cicada::types::ComponentId;
use tempfile::TempDir;

fn repository(dir: &TempDir) -> Repository {
    Repository::create(&dir.path().join("repository")).unwrap()
}

fn identity(name: &str, kind: Kind, requires: Vec<ComponentId>) -> ImportIdentity {
    ImportIdentity { name: name.into(), version: "1".into(), kind, architecture: "amd64".into(), requires }
}

fn put(root: &Path, path: &str, content: &[u8]) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

/// A tree with one of everything an ordinary user can make.
fn sample(root: &Path) {
    put(root, "usr/bin/tool", &[7; 5000]);
    fs::set_permissions(root.join("usr/bin/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::hard_link(root.join("usr/bin/tool"), root.join("usr/bin/alias")).unwrap();
    put(root, "usr/share/empty", b"");
    put(root, "usr/share/text", b"content\n");
    fs::create_dir_all(root.join("var/log/service")).unwrap();
    put(root, "var/log/service/today.log", b"left behind");
    put(root, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n");
    symlink("usr/bin", root.join("bin")).unwrap();
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(root.join("usr/share/text"), "user.note", b"value", flags).unwrap();
    // Owner read/write/execute, user 1000 read, group, mask, other: the form programs write.
    let acl = [
        &[2, 0, 0, 0][..],
        &[1, 0, 7, 0, 255, 255, 255, 255],
        &[2, 0, 4, 0, 0xe8, 3, 0, 0],
        &[4, 0, 5, 0, 255, 255, 255, 255],
        &[16, 0, 5, 0, 255, 255, 255, 255],
        &[32, 0, 5, 0, 255, 255, 255, 255],
    ]
    .concat();
    rustix::fs::setxattr(root.join("var/log/service"), "system.posix_acl_access", &acl, flags).unwrap();
}

/// All that can be seen of a tree, times apart: `tests/compose` reads them from disks.
fn picture(root: &Path) -> BTreeMap<PathBuf, String> {
    fn walk(root: &Path, dir: &Path, out: &mut BTreeMap<PathBuf, String>) {
        for item in fs::read_dir(dir).unwrap() {
            let path = item.unwrap().path();
            let m = fs::symlink_metadata(&path).unwrap();
            let what = if m.is_dir() {
                "directory".into()
            } else if m.is_symlink() {
                format!("-> {}", fs::read_link(&path).unwrap().display())
            } else {
                format!("{} links, {}", m.nlink(), blake3::hash(&fs::read(&path).unwrap()))
            };
            let mut buffer = [0u8; 4096];
            let mut attributes = Vec::new();
            let n = rustix::fs::llistxattr(&path, &mut buffer).unwrap_or(0);
            for name in buffer[..n].split(|b| *b == 0).filter(|n| !n.is_empty()) {
                let mut value = [0u8; 4096];
                let n = rustix::fs::lgetxattr(&path, name, &mut value).unwrap();
                attributes.push((String::from_utf8_lossy(name).into_owned(), value[..n].to_vec()));
            }
            let text = format!("{:o} {}:{} {what} {attributes:?}", m.mode(), m.uid(), m.gid());
            out.insert(path.strip_prefix(root).unwrap().to_owned(), text);
            if m.is_dir() {
                walk(root, &path, out);
            }
        }
    }
    let mut out = BTreeMap::new();
    walk(root, root, &mut out);
    out
}

fn entry<'a>(manifest: &'a Manifest, path: &str) -> Option<&'a cicada::component::Entry> {
    manifest.entries.iter().find(|e| e.path == path.as_bytes())
}

#[test]
fn an_imported_directory_comes_back_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (repository, source) = (repository(&dir), dir.path().join("source"));
    sample(&source);
    let id = import(&repository, &source, identity("sample", Kind::Os, vec![])).unwrap();
    assert_eq!(repository.resolve_component("sample").unwrap(), id);
    let manifest = repository.manifest(&id).unwrap();
    assert!(entry(&manifest, "var/log/service").is_some(), "empty directories stay");
    assert!(entry(&manifest, "var/log/service/today.log").is_none(), "log files do not");
    assert_eq!(manifest.fragments[0].path, b"etc/passwd");
    if !rustix::process::geteuid().is_root() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: comparing the materialised tree needs root");
        return;
    }
    let target = dir.path().join("target");
    materialise(&repository, &manifest, &target).unwrap();
    fs::remove_file(source.join("var/log/service/today.log")).unwrap();
    assert_eq!(picture(&target), picture(&source));
    assert!(picture(&target)[Path::new("usr/bin/tool")].contains("2 links"));
}

#[test]
fn a_tar_archive_gives_the_component_its_directory_gives() {
    let dir = tempfile::tempdir().unwrap();
    let (repository, source) = (repository(&dir), dir.path().join("source"));
    sample(&source);
    let pack = |name: &str, arguments: &[&str]| {
        let archive = dir.path().join(name);
        let mut tar = std::process::Command::new("tar");
        tar.args(["--create", "--format=posix", "--xattrs", "--xattrs-include=user.*", "--acls"]);
        tar.args(arguments).arg("--file").arg(&archive).arg("--directory").arg(&source).arg(".");
        assert!(tar.status().unwrap().success());
        archive
    };
    let plain = pack("sample.tar", &[]);
    let archived = import(&repository, &plain, identity("sample", Kind::Os, vec![])).unwrap();
    let manifest = repository.manifest(&archived).unwrap();
    let text = entry(&manifest, "usr/share/text").unwrap();
    assert_eq!(text.xattrs, [("user.note".to_owned(), b"value".to_vec())]);
    let compressed = dir.path().join("sample.tar.zst");
    fs::write(&compressed, zstd::encode_all(&fs::read(&plain).unwrap()[..], 1).unwrap()).unwrap();
    let again = import(&repository, &compressed, identity("sample", Kind::Os, vec![])).unwrap();
    // The origin names the archive, so only what is inside can be equal.
    let inside = |id| {
        let m = repository.manifest(&id).unwrap();
        (m.packs.clone(), m.entries.clone(), m.fragments.clone())
    };
    let direct = import(&repository, &source, identity("sample", Kind::Os, vec![])).unwrap();
    assert_eq!(inside(archived), inside(again));
    // Times and ACLs too, which tar keeps as text.
    assert_eq!(inside(archived), inside(direct));
    assert!(entry(&manifest, "var/log/service").unwrap().xattrs[0].0.contains("posix_acl_access"));
    let links = |id| {
        let entries = inside(id).1;
        entries.into_iter().filter(|e| matches!(e.kind, EntryKind::HardLink { .. })).count()
    };
    assert_eq!(links(archived), 1);
}

#[test]
fn what_the_component_below_has_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let (repository, source) = (repository(&dir), dir.path().join("source"));
    sample(&source);
    let os = import(&repository, &source, identity("os", Kind::Os, vec![])).unwrap();
    put(&source, "usr/bin/program", b"new");
    put(&source, "usr/share/text", b"changed\n");
    put(&source, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nredis:x:200:200::/:/bin/sh\n");
    let program = import(&repository, &source, identity("program", Kind::Program, vec![os])).unwrap();
    let manifest = repository.manifest(&program).unwrap();
    let paths: Vec<_> = manifest.entries.iter().map(|e| String::from_utf8_lossy(&e.path)).collect();
    assert_eq!(paths, ["usr", "usr/bin", "usr/bin/program", "usr/share", "usr/share/text"]);
    assert_eq!(manifest.requires, [os]);
    let records: Vec<_> = manifest.fragments[0].records.iter().map(|r| r.0.clone()).collect();
    assert_eq!(records, [b"redis".to_vec()]);
}

#[test]
fn secrets_and_identity_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let repository = repository(&dir);
    for (number, (path, content)) in [
        ("etc/ssh/ssh_host_rsa_key", "x"),
        ("etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
        ("etc/service/key.pem", "-----BEGIN PRIVATE KEY-----\n"),
        ("etc/shadow", "root:$y$j9T$salt$hash:19000:0:99999:7:::\n"),
        ("var/lib/systemd/random-seed", "x"),
        ("root/.ssh/id_ed25519", "x"),
    ]
    .into_iter()
    .enumerate()
    {
        let source = dir.path().join(number.to_string());
        put(&source, path, content.as_bytes());
        let error = import(&repository, &source, identity("secret", Kind::Os, vec![])).unwrap_err();
        assert!(matches!(error, BuildError::Secret { .. }), "{path}: {error}");
        assert!(error.to_string().contains(path), "{error}");
    }
    let source = dir.path().join("harmless");
    put(&source, "etc/machine-id", b"");
    put(&source, "etc/shadow", b"root:*:19000:0:99999:7:::\n");
    import(&repository, &source, identity("harmless", Kind::Os, vec![])).unwrap();
}

#[test]
fn archives_that_lead_elsewhere_or_lie_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let repository = repository(&dir);
    let archive = |write: &dyn Fn(&mut tar::Builder<Vec<u8>>)| {
        let mut builder = tar::Builder::new(Vec::new());
        write(&mut builder);
        builder.into_inner().unwrap()
    };
    let raw = |name: &[u8], kind: tar::EntryType, link: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        header.set_entry_type(kind);
        header.set_size(0);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_cksum();
        header
    };
    use tar::EntryType::{Link, Regular, Symlink};
    let upwards = archive(&|b| b.append(&raw(b"a/../../x", Regular, b""), &[][..]).unwrap());
    let absolute = archive(&|b| b.append(&raw(b"/etc/x", Regular, b""), &[][..]).unwrap());
    let through_link = archive(&|b| {
        b.append(&raw(b"a", Symlink, b"/etc"), &[][..]).unwrap();
        b.append(&raw(b"a/x", Regular, b""), &[][..]).unwrap();
    });
    let to_nowhere = archive(&|b| b.append(&raw(b"a", Link, b"b"), &[][..]).unwrap());
    let link_upwards = archive(&|b| b.append(&raw(b"a", Link, b"../b"), &[][..]).unwrap());
    let cut_short = {
        let mut header = raw(b"a", Regular, b"");
        header.set_size(1 << 40);
        header.set_cksum();
        archive(&|b| b.append(&header, &[][..]).unwrap())
    };
    let no_archive = vec![0x55; 4096];
    let cases = [
        ("upwards", upwards),
        ("absolute", absolute),
        ("through a link", through_link),
        ("link to nowhere", to_nowhere),
        ("link upwards", link_upwards),
        ("cut short", cut_short),
        ("no archive", no_archive),
        ("empty", vec![]),
    ];
    for (what, bytes) in cases {
        let path = dir.path().join("hostile.tar");
        fs::write(&path, bytes).unwrap();
        let error = import(&repository, &path, identity("hostile", Kind::Os, vec![])).expect_err(what);
        assert!(error.to_string().contains("hostile.tar"), "{what}: {error}");
    }
    assert!(repository.components().unwrap().is_empty());
}

fn definitions() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("components")
}

#[test]
fn every_definition_of_ours_is_valid() {
    let mut seen = 0;
    for item in fs::read_dir(definitions()).unwrap() {
        let path = item.unwrap().path();
        if path.extension().is_some_and(|e| e == "toml") {
            let text = fs::read_to_string(&path).unwrap();
            let definition = Definition::parse(&text).unwrap_or_else(|e| panic!("{}: {e:?}", path.display()));
            let file = path.file_stem().unwrap().to_str().unwrap();
            assert!(file.starts_with(&definition.kind.to_string()), "{file} is a {}", definition.kind);
            seen += 1;
        }
    }
    assert!(seen >= 10);
}

/// Needs root and the distribution's archive.
fn can_build() -> bool {
    if !rustix::process::geteuid().is_root() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: building components needs root");
        return false;
    }
    true
}

#[test]
fn the_tiny_guest_builds_the_same_twice_and_is_reused() {
    if !can_build() {
        return;
    }
    let names = ["os-tiny", "kernel-tiny", "program-tiny-clock", "format-uefi-gpt"];
    let files: Vec<PathBuf> = names.iter().map(|n| definitions().join(format!("{n}.toml"))).collect();
    let mut outcomes = Vec::new();
    for _ in 0..2 {
        let dir = tempfile::tempdir().unwrap();
        let repository = repository(&dir);
        let options =
            BuildOptions { cache_dir: dir.path().join("cache"), keep_failed: false, rebuild: false };
        let built = match build(&repository, &files, &options, &mut |_| {}) {
            Ok(built) => built,
            Err(error @ BuildError::Lists { .. }) => {
                let _ = writeln!(
                    std::io::stderr(),
                    "SKIPPED: the distribution's archive cannot be reached: {error}"
                );
                return;
            }
            Err(error) => panic!("{error:?}"),
        };
        let again = build(&repository, &files, &options, &mut |_| {}).unwrap();
        assert!(built.iter().all(|b| !b.reused) && again.iter().all(|b| b.reused));
        let ids =
            |list: &[cicada::build::Built]| list.iter().map(|b| (b.name.clone(), b.id)).collect::<Vec<_>>();
        assert_eq!(ids(&built), ids(&again));
        let left: Vec<_> = fs::read_dir(dir.path().join("cache/work")).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
        let held = fs::File::open(dir.path().join("cache/lock")).unwrap();
        rustix::fs::flock(&held, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
        let error = build(&repository, &files, &options, &mut |_| {}).unwrap_err();
        assert!(matches!(error, BuildError::CacheDirectory { .. }), "one build at a time: {error}");
        outcomes.push(ids(&built));
    }
    assert_eq!(outcomes[0], outcomes[1], "same definitions and packages, same ids");
}

#[test]
fn a_program_without_its_os_is_refused_by_name() {
    if !can_build() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let repository = repository(&dir);
    let options = BuildOptions { cache_dir: dir.path().join("cache"), keep_failed: false, rebuild: false };
    let files = [definitions().join("program-tiny-clock.toml")];
    let error = build(&repository, &files, &options, &mut |_| {}).unwrap_err();
    assert!(matches!(error, BuildError::OsMissing { .. }), "{error}");
    let missing = [definitions().join("no-such.toml")];
    let error = build(&repository, &missing, &options, &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("no-such.toml"), "{error}");
}

fn options(cache_dir: PathBuf) -> BuildOptions {
    BuildOptions { cache_dir, keep_failed: false, rebuild: true }
}

#[test]
fn root_builds_nowhere_that_another_user_could_plant_something() {
    if !can_build() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let repository = repository(&dir);
    let files = [definitions().join("os-tiny.toml")];
    let theirs = dir.path().join("theirs");
    fs::create_dir(&theirs).unwrap();
    std::os::unix::fs::chown(&theirs, Some(12345), Some(12345)).unwrap();
    let error = build(&repository, &files, &options(theirs.join("cache")), &mut |_| {}).unwrap_err();
    assert!(matches!(error, BuildError::Exposed { .. }), "{error}");
    assert!(!theirs.join("cache").exists(), "nothing was made there");

    // What was planted while the directory was somebody else's is not used either.
    let victim = dir.path().join("victim");
    fs::create_dir(&victim).unwrap();
    for part in ["apt", "trees", "logs", "work", "failed"] {
        let cache = dir.path().join(format!("link-{part}"));
        fs::create_dir(&cache).unwrap();
        symlink(&victim, cache.join(part)).unwrap();
        let error = build(&repository, &files, &options(cache), &mut |_| {}).unwrap_err();
        assert!(matches!(error, BuildError::Planted { .. }), "{part}: {error}");
        let cache = dir.path().join(format!("tree-{part}"));
        fs::create_dir_all(cache.join(part)).unwrap();
        std::os::unix::fs::chown(cache.join(part), Some(12345), Some(12345)).unwrap();
        let error = build(&repository, &files, &options(cache), &mut |_| {}).unwrap_err();
        assert!(matches!(error, BuildError::Planted { .. }), "{part}: {error}");
    }
    let cache = dir.path().join("link-lock");
    fs::create_dir(&cache).unwrap();
    symlink(victim.join("made"), cache.join("lock")).unwrap();
    build(&repository, &files, &options(cache), &mut |_| {}).unwrap_err();
    assert_eq!(fs::read_dir(&victim).unwrap().count(), 0, "no link was followed");
}

/// Reports, from inside a tree, what the process that runs there may do.
const PROBE: &str = r##"
name = "probe"
kind = "os"
version = "1"
origin = "test"
method = "unpack"
packages = ["busybox-static"]
directory = [{ path = "dev" }, { path = "proc" }, { path = "tmp", mode = "1777" }]
file = [{ path = "bin/busybox", unpacked = "bin/busybox", mode = "0755" }]
link = [{ path = "bin/sh", target = "busybox" }]
[[run]]
script = """
b=/bin/busybox
$b grep -E '^(CapInh|CapPrm|CapEff|NoNewPrivs|Seccomp):' /proc/self/status >/report
for try in 'mount -t tmpfs none /tmp' 'unshare -m true' 'mknod /tmp/disk b 8 0'; do
    if $b $try 2>/dev/null; then echo "could: $try"; else echo "could not: $try"; fi >>/report
done
for device in /dev/*; do [ ! -b $device ] || echo "block device $device"; done >>/report
[ ! -e /dev/kvm ] && [ ! -e /dev/mem ] && echo "no devices of the machine" >>/report
echo "interfaces: $($b grep -c : /proc/net/dev)" >>/report
"""
"##;

#[test]
fn scripts_of_definitions_and_packages_are_confined() {
    if !can_build() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let repository = repository(&dir);
    let probe = dir.path().join("probe.toml");
    fs::write(&probe, PROBE).unwrap();
    let built = build(&repository, &[probe], &options(dir.path().join("cache")), &mut |_| {}).unwrap();
    let tree = dir.path().join("tree");
    materialise(&repository, &repository.manifest(&built[0].id).unwrap(), &tree).unwrap();
    let report = fs::read_to_string(tree.join("report")).unwrap();
    println!("{report}");
    for line in [
        // With no_new_privs nothing that is executed gets more, so the bounding set does not matter.
        // Owners, modes, other users, chroot and file capabilities: see CAPABILITIES in build/sandbox.rs.
        "CapEff:\t00000000800400fb",
        "CapPrm:\t00000000800400fb",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        "could not: mount -t tmpfs none /tmp",
        "could not: unshare -m true",
        "could not: mknod /tmp/disk b 8 0",
        "no devices of the machine",
        "interfaces: 1",
    ] {
        assert!(report.lines().any(|l| l == line), "{line} is not in: {report}");
    }
    assert!(!report.contains("block device"), "{report}");
    // apt downloaded as its own user, not as root.
    let log = fs::read_to_string(dir.path().join("cache/logs/probe.log")).unwrap();
    assert!(!log.contains("unsandboxed"), "{log}");
}

#[test]
fn a_cached_tree_that_was_changed_is_made_anew() {
    if !can_build() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let repository = repository(&dir);
    let files = ["os-tiny", "program-tiny-clock"].map(|n| definitions().join(format!("{n}.toml")));
    let options = options(dir.path().join("cache"));
    let ids = |built: Vec<cicada::build::Built>| built.iter().map(|b| b.id).collect::<Vec<_>>();
    let first = ids(build(&repository, &files, &options, &mut |_| {}).unwrap());
    let tree = options.cache_dir.join("trees").join(first[0].to_string());
    fs::write(tree.join("sbin/planted"), "#!/bin/sh\n").unwrap();
    fs::write(tree.join("etc/passwd"), "root::0:0:root:/root:/bin/sh\n").unwrap();
    assert_eq!(ids(build(&repository, &files, &options, &mut |_| {}).unwrap()), first);
    assert!(!tree.join("sbin/planted").exists());
    assert!(!fs::read_to_string(tree.join("etc/passwd")).unwrap().contains("root::"));
}

/// Name, user id and group id of somebody whom `/etc/subuid` and `/etc/subgid` lend enough ids.
fn somebody_with_lent_ids() -> Option<(String, u32, u32)> {
    let lends = |file: &str, name: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        text.lines().any(|l| {
            l.strip_prefix(name).is_some_and(|rest| rest.starts_with(':') && rest.ends_with(":65536"))
        })
    };
    fs::read_to_string("/etc/passwd").ok()?.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let (name, uid, gid) = (fields[0], fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?);
        (uid != 0 && lends("/etc/subuid", name) && lends("/etc/subgid", name))
            .then(|| (name.to_owned(), uid, gid))
    })
}

#[test]
fn a_build_without_root_gives_the_ids_of_a_build_as_root() {
    if !can_build() {
        return;
    }
    let Some((name, uid, gid)) = somebody_with_lent_ids() else {
        let _ = writeln!(std::io::stderr(), "SKIPPED: /etc/subuid and /etc/subgid lend nobody 65536 ids");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let names = ["os-tiny", "kernel-tiny", "program-tiny-clock"];
    let files: Vec<PathBuf> = names.iter().map(|n| definitions().join(format!("{n}.toml"))).collect();
    let ours = repository(&dir);
    let built = build(&ours, &files, &options(dir.path().join("cache")), &mut |_| {}).unwrap();

    let home = dir.path().join("home");
    fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(uid), Some(gid)).unwrap();
    // The program and the definitions may lie where that user cannot look.
    let program = dir.path().join("cicada");
    fs::copy(env!("CARGO_BIN_EXE_cicada"), &program).unwrap();
    let copied = std::process::Command::new("cp").arg("-r").arg(definitions()).arg(dir.path()).status();
    assert!(copied.unwrap().success());
    let config = dir.path().join("federation.toml");
    let text = format!(
        "[cloud]\nname = \"a\"\ndata_dir = \"{0}/data\"\n[xmpp]\njid = \"a@example.org\"\n\
         password_file = \"{0}/password\"\nroom = \"f@conference.example.org\"\n",
        home.display()
    );
    fs::write(&config, text).unwrap();
    let mut command = std::process::Command::new("setpriv");
    command.arg(format!("--reuid={uid}")).arg(format!("--regid={gid}")).args(["--init-groups", "--"]);
    command.arg(&program).arg("--config").arg(&config).args(["component", "build"]);
    command.args(names.map(|n| dir.path().join("components").join(format!("{n}.toml"))));
    let output = command.current_dir(dir.path()).output().unwrap();
    assert!(output.status.success(), "as {name}: {}", String::from_utf8_lossy(&output.stderr));
    let theirs = Repository::open_or_create(&home.join("data/build/repository")).unwrap();
    for b in &built {
        assert_eq!(theirs.resolve_component(&b.name).unwrap(), b.id, "{}", b.name);
    }
}

#[test]
fn a_tree_is_written_beneath_its_root_whatever_the_manifest_says() {
    if !rustix::process::geteuid().is_root() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: materialising needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (repository, source) = (repository(&dir), dir.path().join("source"));
    sample(&source);
    let id = import(&repository, &source, identity("sample", Kind::Os, vec![])).unwrap();
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let manifest = repository.manifest(&id).unwrap();
    // `bin` is a link. Neither a manifest that was never checked nor one with a fragment leads through it.
    for spoil in [0, 1] {
        let mut hostile = (*manifest).clone();
        let link = hostile.entries.iter_mut().find(|e| e.path == b"bin").unwrap();
        link.kind = EntryKind::Symlink { target: outside.to_str().unwrap().as_bytes().to_vec() };
        if spoil == 0 {
            hostile.fragments[0].path = b"bin/passwd".to_vec();
        } else {
            let mut below = hostile.entries.iter().find(|e| e.path == b"usr/share/empty").unwrap().clone();
            below.path = b"bin/planted".to_vec();
            let at = hostile.entries.iter().position(|e| e.path == b"bin").unwrap();
            hostile.entries.insert(at + 1, below);
        }
        assert!(Manifest::decode(&hostile.encode()).is_err(), "the check refuses it first");
        let error = materialise(&repository, &hostile, &dir.path().join(format!("t{spoil}"))).unwrap_err();
        assert!(matches!(error, BuildError::Tree { .. }), "{error}");
    }
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}
