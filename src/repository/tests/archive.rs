//! Archives: what is exported arrives whole, and nothing else gets in.

use std::io::Write;

use crate::repository::archive::{
    ArchiveIndex, INDEX_NAME, entry_name, padding, write_end, write_header, write_padding,
};

use super::*;

/// A cloud with two named components that share a requirement, a recipe, and one nobody named.
struct Cloud {
    _dir: TempDir,
    repository: Repository,
    base: ComponentId,
    web: ComponentId,
    unnamed: ComponentId,
    recipe: RecipeId,
}

fn cloud() -> Cloud {
    let (dir, repository) = repository();
    let shared = put_pack(&repository, &noise(1, 3_000_000));
    let text = put_pack(&repository, &b"lorem ipsum ".repeat(100_000));
    let base = bound(&repository, &component("base", "1", vec![], &[shared]));
    let web = bound(&repository, &component("web", "2", vec![base], &[text, shared]));
    let own = put_pack(&repository, &noise(2, 5000));
    let unnamed = repository.put_manifest(&component("unnamed", "1", vec![base], &[own])).unwrap();
    let recipe = repository.put_recipe(&recipe_of(vec![base, web])).unwrap();
    repository.put_recipe(&recipe_of(vec![base, unnamed])).unwrap();
    Cloud { _dir: dir, repository, base, web, unnamed, recipe }
}

fn everything(cloud: &Cloud, path: &Path) -> u64 {
    cloud.repository.export(&[], &[]).unwrap().write(path, &mut |_, _| true).unwrap()
}

fn import(repository: &Repository, path: &Path) -> (ImportReport, Result<(), ArchiveError>) {
    repository.import(path, &mut |_, _| true)
}

/// Offsets of the headers in an archive, in its order, and of its end.
fn entries(archive: &[u8], index: &ArchiveIndex) -> Vec<usize> {
    let mut at = 0;
    let mut out = Vec::new();
    for size in std::iter::once(index.encode().len() as u64).chain(index.objects.iter().map(|o| o.1)) {
        out.push(at);
        at += 512 + (size + padding(size)) as usize;
    }
    out.push(at);
    assert_eq!(at + 1024, archive.len());
    out
}

fn index_of(archive: &[u8]) -> ArchiveIndex {
    let header = tar::Header::from_byte_slice(&archive[..512]);
    assert_eq!(&*header.path_bytes(), INDEX_NAME.as_bytes());
    ArchiveIndex::decode(&archive[512..512 + header.entry_size().unwrap() as usize]).unwrap()
}

#[test]
fn an_archive_carries_what_is_named_and_an_import_is_checked_and_complete() {
    let cloud = cloud();
    let out = tempfile::tempdir().unwrap();
    let (tar, tree) = (out.path().join("a.tar"), out.path().join("tree/"));
    assert_eq!(everything(&cloud, &tar), 0);
    assert_eq!(everything(&cloud, &tree), 0);
    let size = cloud.repository.export(&[], &[]).unwrap().content();
    assert_eq!((size.components, size.recipes, size.packs, size.names), (2, 1, 2, 2));
    assert_eq!(everything(&cloud, &tree), size.stored_bytes, "a second export finds all of it there");
    // Any tar reads it, and equal content gives an equal archive.
    let names: Vec<_> = tar::Archive::new(File::open(&tar).unwrap())
        .entries()
        .unwrap()
        .map(|e| e.unwrap().path().unwrap().display().to_string())
        .collect();
    assert_eq!(names.len(), 6);
    assert!(names.iter().skip(1).all(|n| tree.join(n).is_file()), "{names:?}");
    everything(&cloud, &out.path().join("again.tar"));
    assert_eq!(fs::read(&tar).unwrap(), fs::read(out.path().join("again.tar")).unwrap());

    for path in [&tar, &tree] {
        let (_dir, other) = repository();
        let (report, result) = import(&other, path);
        result.unwrap();
        assert_eq!((report.stored, report.skipped, report.refused.len()), (5, 0, 0));
        assert_eq!(report.stored_bytes, size.stored_bytes);
        assert!(report.names.iter().any(|(id, name)| *id == cloud.web && name == "program/web/2/amd64"));
        assert!(other.has_manifest(&cloud.base) && !other.has_manifest(&cloud.unnamed));
        assert!(other.missing_packs(&[cloud.base, cloud.web]).unwrap().is_complete());
        assert!(other.resolve_component("web").is_err(), "names from elsewhere are not bound by themselves");
        let check = other.check(&mut |_, _| ()).unwrap();
        assert!(check.is_clean() && check.strays.is_empty(), "{check:?}");
        let (report, result) = import(&other, path);
        result.unwrap();
        assert_eq!((report.stored, report.skipped), (0, 5));
        assert_eq!(files_in(other.temporary_dir()), 0);
    }
}

#[test]
fn chosen_components_and_recipes_bring_what_they_need_and_no_more() {
    let cloud = cloud();
    let content = |c: &[_], r: &[_]| cloud.repository.export(c, r).unwrap().content();
    assert_eq!(content(&[cloud.base], &[]).packs, 1);
    let web = content(&[cloud.web], &[]);
    assert_eq!((web.components, web.packs, web.recipes, web.names), (2, 2, 0, 2));
    let unnamed = content(&[cloud.unnamed], &[]);
    assert_eq!((unnamed.components, unnamed.names), (2, 1), "its requirement has a name, it has none");
    let recipe = content(&[], &[cloud.recipe]);
    assert_eq!((recipe.components, recipe.packs, recipe.recipes), (2, 2, 1));
    let (_dir, empty) = repository();
    assert!(matches!(empty.export(&[], &[]), Err(ArchiveError::Nothing)));
}

#[test]
fn damage_is_found_before_it_is_exported_and_leaves_no_file() {
    let cloud = cloud();
    let out = tempfile::tempdir().unwrap();
    let pack = cloud.repository.manifest(&cloud.base).unwrap().packs[0].id;
    flip_byte(&pack_path(&cloud.repository, &pack), 2000);
    let export = cloud.repository.export(&[], &[]).unwrap();
    let e = export.write(&out.path().join("a.tar"), &mut |_, _| true).unwrap_err();
    assert!(matches!(e, ArchiveError::Repository(RepositoryError::Damaged { .. })), "{e}");
    let e = export.write(&out.path().join("b.tar"), &mut |_, _| false).unwrap_err();
    assert!(matches!(e, ArchiveError::Stopped), "{e}");
    assert_eq!(files_in(out.path()), 0);
    let e = export.write(cloud.repository.dir(), &mut |_, _| true).unwrap_err();
    assert!(matches!(e, ArchiveError::Target { .. }), "{e}");
}

#[test]
fn what_is_there_is_not_written_over() {
    let cloud = cloud();
    let out = tempfile::tempdir().unwrap();
    let (file, to_file, nowhere) =
        (out.path().join("file"), out.path().join("link"), out.path().join("dead"));
    fs::write(&file, b"precious").unwrap();
    std::os::unix::fs::symlink(&file, &to_file).unwrap();
    std::os::unix::fs::symlink(out.path().join("nowhere"), &nowhere).unwrap();
    let export = cloud.repository.export(&[], &[]).unwrap();
    for path in [&file, &to_file, &nowhere] {
        let e = export.write(path, &mut |_, _| true).unwrap_err();
        assert!(matches!(e, ArchiveError::Occupied { .. }), "{e}");
    }
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    assert_eq!(files_in(out.path()), 3);
    // A device without blocks is written to, as a tape is.
    export.write(Path::new("/dev/null"), &mut |_, _| true).unwrap();
}

#[test]
fn a_tampered_object_is_refused_by_name_and_the_rest_taken() {
    let cloud = cloud();
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("a.tar");
    everything(&cloud, &path);
    let good = fs::read(&path).unwrap();
    let index = index_of(&good);
    for (n, (object, size)) in index.objects.iter().enumerate() {
        let start = entries(&good, &index)[n + 1] + 512;
        let mut bad = good.clone();
        bad[start + *size as usize / 2] ^= 1;
        fs::write(&path, &bad).unwrap();
        let (_dir, other) = repository();
        let (report, result) = import(&other, &path);
        result.unwrap();
        assert_eq!(report.refused.iter().map(|r| r.0).collect::<Vec<_>>(), [*object]);
        assert_eq!((report.stored, other.has_file(object)), (4, false));
        assert_eq!(files_in(other.temporary_dir()), 0);
        // The whole one brings what is missing.
        fs::write(&path, &good).unwrap();
        let (report, result) = import(&other, &path);
        result.unwrap();
        assert_eq!((report.stored, report.skipped), (1, 4));
        assert!(other.check(&mut |_, _| ()).unwrap().is_clean());
    }
}

#[test]
fn a_cut_archive_keeps_what_came_and_says_where_it_ended() {
    let cloud = cloud();
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("a.tar");
    everything(&cloud, &path);
    let good = fs::read(&path).unwrap();
    let index = index_of(&good);
    let at = entries(&good, &index);
    let (_dir, other) = repository();
    // Inside the index, a header, an object; between objects; before the end marker.
    for (cut, done) in
        [(300, 0), (700, 0), (at[1], 0), (at[2] + 100, 1), (at[4] + 4096, 3), (at[5], 4), (at[6], 5)]
    {
        fs::write(&path, &good[..cut]).unwrap();
        let (report, result) = import(&other, &path);
        match result {
            Err(ArchiveError::NotAnArchive { .. }) => assert!(cut < 512),
            Err(ArchiveError::Ended { done: said, .. }) => assert_eq!(said, done),
            other => panic!("{cut}: {other:?}"),
        }
        assert_eq!(report.stored + report.skipped, done as u64);
    }
    fs::write(&path, &good).unwrap();
    let (report, result) = import(&other, &path);
    result.unwrap();
    assert_eq!((report.stored, report.skipped), (0, 5));
    // Whoever asked left in the middle.
    let (_dir, other) = repository();
    let (report, result) = other.import(&path, &mut |done, total| done < total / 2);
    assert!(matches!(result, Err(ArchiveError::Stopped)));
    assert!(report.stored < 5 && files_in(other.temporary_dir()) == 0);
}

#[test]
fn foreign_entries_and_false_indexes_end_an_import() {
    let cloud = cloud();
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("a.tar");
    everything(&cloud, &path);
    let good = fs::read(&path).unwrap();
    let index = index_of(&good);
    let first = index.objects[0];
    let body = vec![7; first.1 as usize];
    let refused_as_unexpected = |header: &dyn Fn(&mut Vec<u8>)| {
        let mut archive = good[..entries(&good, &index)[1]].to_vec();
        header(&mut archive);
        archive.extend_from_slice(&body);
        write_padding(&mut archive, first.1).unwrap();
        write_end(&mut archive).unwrap();
        fs::write(&path, &archive).unwrap();
        let (dir, other) = repository();
        let (report, result) = import(&other, &path);
        assert!(matches!(result, Err(ArchiveError::Unexpected { .. })), "{result:?}");
        assert_eq!(report.stored, 0);
        assert!(!dir.path().join("x").exists() && !dir.path().parent().unwrap().join("x").exists());
    };
    let name = entry_name(&first.0);
    for wrong in [
        "../x",
        "manifests/../../x",
        "/tmp/x",
        "packs/ab/x.pack",
        "refs/component/x",
        "cicada-repository",
        INDEX_NAME,
    ] {
        refused_as_unexpected(&|archive| {
            // As an enemy would: the tar crate itself refuses such names.
            let mut header = tar::Header::new_ustar();
            header.as_old_mut().name[..wrong.len()].copy_from_slice(wrong.as_bytes());
            header.set_size(first.1);
            header.set_entry_type(tar::EntryType::Regular);
            header.set_cksum();
            archive.extend_from_slice(header.as_bytes());
        });
    }
    for kind in [
        tar::EntryType::Symlink,
        tar::EntryType::Link,
        tar::EntryType::Directory,
        tar::EntryType::Char,
        tar::EntryType::GNULongName,
        tar::EntryType::XHeader,
        tar::EntryType::GNUSparse,
    ] {
        refused_as_unexpected(&|archive| {
            let mut header = tar::Header::new_gnu();
            header.set_path(&name).unwrap();
            header.set_size(first.1);
            header.set_entry_type(kind);
            header.set_cksum();
            archive.extend_from_slice(header.as_bytes());
        });
    }
    refused_as_unexpected(&|archive| write_header(archive, &name, first.1 + 1).unwrap());
    refused_as_unexpected(&|archive| write_header(archive, &name, u64::MAX >> 1).unwrap());
    refused_as_unexpected(&|archive| archive.write_all(&[b'x'; 512]).unwrap());

    // Something after the last object.
    let mut longer = good[..good.len() - 1024].to_vec();
    write_header(&mut longer, "packs/more", 0).unwrap();
    write_end(&mut longer).unwrap();
    fs::write(&path, &longer).unwrap();
    let (_dir, other) = repository();
    assert!(matches!(import(&other, &path).1, Err(ArchiveError::Unexpected { .. })));

    // Indexes that are not what they should be are refused before anything is read.
    let bytes = index.encode();
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 1;
        assert!(ArchiveIndex::decode(&bad).is_err(), "{at}");
        assert!(ArchiveIndex::decode(&bytes[..at]).is_err(), "{at}");
    }
    let mut twice = index.clone();
    twice.objects.insert(0, first);
    assert!(ArchiveIndex::decode(&twice.encode()).is_err());
    let mut huge = index.clone();
    huge.objects[0].1 = 1 << 60;
    assert!(ArchiveIndex::decode(&huge.encode()).is_err());
    let mut misnamed = index.clone();
    misnamed.names[0].0 = ComponentId::of(b"another");
    misnamed.names.sort();
    assert!(ArchiveIndex::decode(&misnamed.encode()).is_err());
    let mut claims = Vec::new();
    write_header(&mut claims, INDEX_NAME, u64::MAX >> 1).unwrap();
    fs::write(&path, &claims).unwrap();
    assert!(matches!(import(&other, &path).1, Err(ArchiveError::NotAnArchive { .. })));
}

#[test]
fn links_and_pipes_in_a_directory_are_not_followed() {
    let cloud = cloud();
    let out = tempfile::tempdir().unwrap();
    let tree = out.path().join("tree/");
    everything(&cloud, &tree);
    let index = ArchiveIndex::decode(&fs::read(tree.join(INDEX_NAME)).unwrap()).unwrap();
    let file = tree.join(entry_name(&index.objects[0].0));
    let aside = out.path().join("aside");
    fs::rename(&file, &aside).unwrap();
    let (_dir, other) = repository();
    std::os::unix::fs::symlink(&aside, &file).unwrap();
    assert!(matches!(import(&other, &tree).1, Err(ArchiveError::Io { .. })));
    fs::remove_file(&file).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &file, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(matches!(import(&other, &tree).1, Err(ArchiveError::Io { .. })));
    fs::remove_file(&file).unwrap();
    fs::write(&file, vec![0; index.objects[0].1 as usize + 1]).unwrap();
    assert!(matches!(import(&other, &tree).1, Err(ArchiveError::Unexpected { .. })));
    fs::remove_file(tree.join(INDEX_NAME)).unwrap();
    assert!(matches!(import(&other, &tree).1, Err(ArchiveError::NotAnArchive { .. })));
}
