use super::*;
use crate::component::{FragmentRule, PackRef};
use crate::types::PackId;

/// A component of the test set: `d` directory, `f` file with content, `l` symlink, `h` hard link,
/// `w` whiteout.
fn component(name: &str, requires: &[&Member], entries: &[(char, &str, &str)]) -> Member {
    let meta = Meta { mode: 0o755, uid: 0, gid: 0, mtime_s: 100 };
    let entries = entries.iter().map(|(kind, path, text)| {
        let bytes = text.as_bytes();
        let kind = match kind {
            'd' => EntryKind::Directory,
            'f' => EntryKind::File {
                size_bytes: bytes.len() as u64,
                hash: Hash::of(bytes),
                pack: 0,
                offset_bytes: 0,
            },
            'l' => EntryKind::Symlink { target: bytes.to_vec() },
            'h' => EntryKind::HardLink { target: bytes.to_vec() },
            _ => EntryKind::Whiteout,
        };
        Entry { path: path.as_bytes().to_vec(), meta, xattrs: vec![], kind }
    });
    let manifest = Manifest {
        name: name.into(),
        version: "1".into(),
        kind: Kind::Program,
        architecture: "amd64".into(),
        origin: String::new(),
        licences: vec![],
        requires: requires.iter().map(|m| m.0).collect(),
        conflicts: vec![],
        packs: vec![PackRef {
            id: PackId::of(name.as_bytes()),
            size_bytes: 4096,
            package: name.into(),
            package_version: "1".into(),
        }],
        entries: entries.collect(),
        fragments: vec![],
    };
    manifest.check().unwrap();
    (manifest.id(), Arc::new(manifest))
}

fn changed(member: &Member, change: impl FnOnce(&mut Manifest)) -> Member {
    let mut manifest = (*member.1).clone();
    change(&mut manifest);
    (manifest.id(), Arc::new(manifest))
}

fn fragment(path: &str, key: &str, record: &str) -> Fragment {
    Fragment {
        path: path.into(),
        rule: FragmentRule::Lines,
        meta: Meta { mode: 0o640, uid: 0, gid: 42, mtime_s: 1 },
        records: vec![(key.into(), record.into())],
    }
}

/// Paths with what they are: `name of the component` for files.
fn shown(set: &[Member], ordered: bool) -> Result<Vec<String>, String> {
    let tree = unite(set, ordered).map_err(|e| e.to_string())?;
    Ok(tree
        .nodes
        .iter()
        .map(|n| {
            let kind = match &n.kind {
                NodeKind::Directory => "dir".to_owned(),
                NodeKind::File { pack, .. } => {
                    let owner = set.iter().find(|(_, m)| m.packs[0].id == *pack);
                    owner.map_or("nobody", |(_, m)| &m.name).to_owned()
                }
                NodeKind::Literal(b) => String::from_utf8_lossy(b).trim_end().replace('\n', "|"),
                NodeKind::Symlink { target } => format!("-> {}", String::from_utf8_lossy(target)),
                NodeKind::HardLink { target } => format!("= {}", String::from_utf8_lossy(target)),
                other => format!("{other:?}"),
            };
            format!("{} {kind}", String::from_utf8_lossy(&n.path))
        })
        .collect())
}

#[test]
fn programs_join_their_os_in_any_order() {
    let os = component("os", &[], &[('d', "", ""), ('d', "etc", ""), ('f', "etc/conf", "os")]);
    let a = component("a", &[&os], &[('d', "etc", ""), ('f', "etc/a", "a"), ('f', "etc/same", "s")]);
    let b = component("b", &[&os], &[('d', "etc", ""), ('f', "etc/conf", "b"), ('f', "etc/same", "s")]);
    let expected = [" dir", "etc dir", "etc/a a", "etc/conf b", "etc/same a"];
    let set = [os.clone(), a.clone(), b.clone()];
    assert_eq!(shown(&set, false).unwrap(), expected);
    let back = shown(&[b, a, os], false).unwrap();
    assert_eq!(back[..4], expected[..4]);
    assert_eq!(back[4], "etc/same b");
}

#[test]
fn unrelated_claims_conflict_by_name_unless_ordered() {
    let a = component("a", &[], &[('d', "etc", ""), ('f', "etc/x", "1")]);
    let b = component("b", &[], &[('d', "etc", ""), ('f', "etc/x", "2")]);
    assert_eq!(
        shown(&[a.clone(), b.clone()], false).unwrap_err(),
        "a@1 and b@1 both bring /etc/x, with different content: leave one out, or let the recipe's \
         order decide"
    );
    assert_eq!(shown(&[a.clone(), b.clone()], true).unwrap()[1], "etc/x b");
    assert_eq!(shown(&[b.clone(), a.clone()], true).unwrap()[1], "etc/x a");
    type Change = fn(&mut Manifest);
    let table: [(&str, Change); 4] = [
        ("owner", |m| m.entries[1].meta.uid = 70_000),
        ("mode", |m| m.entries[0].meta.mode = 0o700),
        ("extended attributes", |m| m.entries[1].xattrs = vec![("user.a".into(), vec![])]),
        ("kind", |m| m.entries[1].kind = EntryKind::Fifo),
    ];
    for (what, change) in table {
        let error = unite(&[a.clone(), changed(&a, change)], false).unwrap_err();
        assert!(matches!(error, TreeError::Path { difference, .. } if difference == what), "{error}");
    }
}

#[test]
fn times_never_conflict_the_latest_stands() {
    let a = component("a", &[], &[('d', "etc", ""), ('f', "etc/x", "1")]);
    let b = changed(&a, |m| m.entries.iter_mut().for_each(|e| e.meta.mtime_s = 200));
    for set in [[a.clone(), b.clone()], [b, a]] {
        let tree = unite(&set, false).unwrap();
        assert!(tree.nodes.iter().all(|n| n.meta.mtime_s == 200));
    }
}

#[test]
fn a_requirer_overrides_through_others() {
    let os = component("os", &[], &[('f', "x", "os")]);
    let middle = component("middle", &[&os], &[]);
    let top = component("top", &[&middle], &[('f', "x", "top")]);
    assert_eq!(shown(&[top, middle, os], false).unwrap(), ["x top"]);
}

#[test]
fn whiteouts_take_away_what_the_required_bring() {
    let os = component("os", &[], &[('d', "doc", ""), ('f', "doc/a", "a"), ('f', "doc-b", "b")]);
    let slim = component("slim", &[&os], &[('w', "doc", "")]);
    assert_eq!(shown(&[os.clone(), slim.clone()], false).unwrap(), ["doc-b os"]);
    // Who requires the remover may bring the directory back, but not what was in it.
    let again = component("again", &[&slim], &[('d', "doc", ""), ('f', "doc/new", "n")]);
    // It requires the os only through `slim`.
    assert_eq!(
        shown(&[os.clone(), slim.clone(), again], false).unwrap(),
        ["doc dir", "doc/new again", "doc-b os"]
    );
    // An unrelated program that has something there is in conflict with the remover.
    let other = component("other", &[&os], &[('d', "doc", ""), ('f', "doc/c", "c")]);
    assert!(unite(&[os.clone(), slim.clone(), other.clone()], false).is_err());
    assert_eq!(shown(&[os.clone(), other.clone(), slim.clone()], true).unwrap(), ["doc-b os"]);
    assert_eq!(shown(&[os, slim, other], true).unwrap(), ["doc dir", "doc/a os", "doc/c other", "doc-b os"]);
}

#[test]
fn nothing_lies_below_what_is_no_directory() {
    let os = component("os", &[], &[('d', "bin", ""), ('f', "bin/sh", "sh")]);
    let merged = component("merged", &[&os], &[('l', "bin", "usr/bin")]);
    assert_eq!(shown(&[os.clone(), merged.clone()], false).unwrap(), ["bin -> usr/bin"]);
    let late = component("late", &[&os, &merged], &[]);
    let stray = changed(&late, |m| {
        // A manifest that skips the check of parents cannot escape through the link either.
        m.entries.push(Entry {
            path: b"bin/evil".to_vec(),
            meta: Meta { mode: 0o644, uid: 0, gid: 0, mtime_s: 0 },
            xattrs: vec![],
            kind: EntryKind::Fifo,
        })
    });
    let error = unite(&[os, merged, stray], false).unwrap_err().to_string();
    assert_eq!(error, "/bin/evil of late@1 lies below /bin, which merged@1 brings as no directory");
}

#[test]
fn hard_links_keep_their_own_content() {
    let os = component("os", &[], &[('f', "a", "1"), ('h', "b", "a"), ('h', "c", "a")]);
    assert_eq!(shown(std::slice::from_ref(&os), false).unwrap(), ["a os", "b = a", "c = a"]);
    let new = component("new", &[&os], &[('f', "a", "2")]);
    assert_eq!(shown(&[os.clone(), new], false).unwrap(), ["a new", "b os", "c = b"]);
    let without = component("without", &[&os], &[('w', "a", "")]);
    assert_eq!(shown(&[os.clone(), without], false).unwrap(), ["b os", "c = b"]);
    let twin = changed(&os, |m| m.name = "twin".into());
    assert_eq!(shown(&[os, twin], false).unwrap(), ["a os", "b = a", "c = a"]);
}

#[test]
fn fragments_merge_and_refuse_whole_files() {
    let os = changed(&component("os", &[], &[('d', "etc", "")]), |m| {
        m.fragments = vec![fragment("etc/shadow", "root", "root:*")]
    });
    let a = changed(&component("a", &[&os], &[]), |m| m.fragments = vec![fragment("etc/shadow", "a", "a:!")]);
    assert_eq!(shown(&[os.clone(), a.clone()], false).unwrap(), ["etc dir", "etc/shadow a:!|root:*"]);
    let b =
        changed(&component("b", &[&os], &[]), |m| m.fragments = vec![fragment("etc/shadow", "a", "a:other")]);
    let error = unite(&[os.clone(), a.clone(), b], false).unwrap_err().to_string();
    assert_eq!(error, "a@1 and b@1 both claim 'a' in /etc/shadow, with different content");
    let whole = component("whole", &[], &[('d', "etc", ""), ('f', "etc/shadow", "x")]);
    let error = unite(&[os.clone(), whole], false).unwrap_err();
    assert!(matches!(error, TreeError::WholeAndFragment { .. }), "{error}");
    let mode = changed(&a, |m| m.fragments[0].meta.mode = 0o600);
    assert_eq!(unite(&[os.clone(), mode], false).unwrap().nodes[1].meta.mode, 0o600);
    let rules = changed(&a, |m| m.fragments[0].rule = FragmentRule::Set);
    assert!(matches!(unite(&[os, rules], false), Err(TreeError::Rules { .. })));
}

#[test]
fn sets_that_do_not_belong_together_are_refused_by_name() {
    let os = component("os", &[], &[]);
    let a = component("a", &[&os], &[]);
    let error = unite(std::slice::from_ref(&a), false).unwrap_err().to_string();
    assert_eq!(error, format!("a@1 was built on components that are not in the set: {}", os.0.short()));
    assert_eq!(unite(&[os.clone(), os.clone()], false).unwrap_err().to_string(), "os@1 is named twice");
    let no_os = changed(&a, |m| (m.requires.clear(), m.conflicts = vec!["os".into()]).1);
    let error = unite(&[os.clone(), no_os], false).unwrap_err().to_string();
    assert_eq!(error, "a@1 refuses to share a disk with os@1");
    let arm = changed(&a, |m| m.architecture = "arm64".into());
    assert_eq!(
        unite(&[os.clone(), arm], false).unwrap_err().to_string(),
        "os@1 is for amd64, but a@1 is for arm64"
    );
    let any = changed(&a, |m| m.architecture = "all".into());
    assert!(unite(&[os.clone(), any], false).is_ok());
    let error = check_bootable(&[os]).unwrap_err().to_string();
    assert_eq!(error, "a disk that starts needs exactly one format component, not none");
}
