//! The forms packs travel in: stored, optimised, as deltas; whole and in parts.

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use cicada::component::manifest::{Entry, EntryKind, Kind, Manifest, Meta, PackRef};
use cicada::repository::{IncomingForm, ObjectId, PackForm, Repository, RepositoryError};
use cicada::types::{ComponentId, PackId};

fn repository() -> (tempfile::TempDir, Repository) {
    let dir = tempfile::tempdir().unwrap();
    let repository = Repository::create(&dir.path().join("repository")).unwrap();
    (dir, repository)
}

/// Bytes that compress somewhat, as programs do: words of a small random vocabulary.
fn program(seed: u64, len: usize) -> Vec<u8> {
    let mut noise = vec![0; len / 4];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut noise);
    noise.iter().flat_map(|b| [*b, *b >> 3, 0x48, 0x89]).collect()
}

/// Bytes that do not compress.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

fn put(repository: &Repository, content: &[u8]) -> PackId {
    let mut writer = repository.pack_writer().unwrap();
    writer.append(&mut &content[..], content.len() as u64).unwrap();
    writer.finish().unwrap().unwrap().0
}

fn plain(repository: &Repository, id: &PackId) -> Vec<u8> {
    let mut out = Vec::new();
    repository
        .read_pack(id, &mut |_, run| {
            match run {
                cicada::sparse::Run::Data(bytes) => out.extend_from_slice(bytes),
                cicada::sparse::Run::Zeros(len) => out.resize(out.len() + len as usize, 0),
            }
            Ok(())
        })
        .unwrap();
    out
}

/// Receives a form from `offset` on; stops after `stop_bytes` more, as if the link broke.
fn receive(
    target: &Repository,
    id: PackId,
    form: &mut PackForm,
    plain_bytes: u64,
    stop_bytes: Option<u64>,
) -> Result<u64, RepositoryError> {
    let begun = target.partial_pack(&id).filter(|p| p.tag == form.tag);
    let offset_bytes = begun.map_or(0, |p| p.received_bytes);
    let is_delta = form.base.is_some();
    let incoming = IncomingForm { tag: form.tag, size_bytes: form.size_bytes, offset_bytes, is_delta };
    let mut pack = target.incoming_pack(id, incoming, Some(plain_bytes))?;
    let mut rest = vec![0; (form.size_bytes - offset_bytes) as usize];
    form.file.read_exact_at(&mut rest, offset_bytes).unwrap();
    if let Some(stop) = stop_bytes {
        rest.truncate(stop as usize);
    }
    for piece in rest.chunks(7001) {
        pack.write(piece)?;
    }
    match stop_bytes {
        Some(_) => drop(pack),
        None => pack.finish()?,
    }
    Ok(rest.len() as u64)
}

fn files_below(dir: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    entries.flatten().map(|e| if e.file_type().unwrap().is_dir() { files_below(&e.path()) } else { 1 }).sum()
}

#[test]
fn an_optimised_pack_is_smaller_and_the_same() {
    let ((_a, source), (_b, target)) = (repository(), repository());
    let content = program(1, 9 << 20);
    let id = put(&source, &content);
    assert!(!source.is_optimized(&id).unwrap());
    let mut old = source.pack_stored(&id).unwrap().file;

    assert!(source.optimize_pack(&id, &|| true).is_err(), "it was told to stop");
    assert!(!source.is_optimized(&id).unwrap());
    let done = source.optimize_pack(&id, &|| false).unwrap();
    assert!(done.after_bytes < done.before_bytes, "{done:?}");
    assert!(source.is_optimized(&id).unwrap());
    let again = source.optimize_pack(&id, &|| false).unwrap();
    assert_eq!((again.before_bytes, again.after_bytes), (done.after_bytes, done.after_bytes));
    assert!(plain(&source, &id) == content);
    assert_eq!(source.stats().unwrap().objects.packs.stored_bytes, done.after_bytes);
    // Who was being sent the old form still gets all of it.
    let mut bytes = Vec::new();
    old.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, done.before_bytes);

    // It travels as it is stored.
    let mut form = source.pack_form(&id, &[], None).unwrap();
    assert_eq!(form.size_bytes, done.after_bytes);
    receive(&target, id, &mut form, content.len() as u64, None).unwrap();
    assert!(target.is_optimized(&id).unwrap() && plain(&target, &id) == content);
    // What was unpacked to be verified need not be unpacked again to be composed.
    assert!(target.held_hot_pack(&id).unwrap().is_some());
    let report = source.check(&mut |_, _| {}).unwrap();
    assert!(report.damaged.is_empty() && report.missing.is_empty());
}

#[test]
fn a_new_version_travels_as_a_delta() {
    let ((_a, source), (_b, target)) = (repository(), repository());
    let old = noise(1, 12 << 20);
    let new = [&old[..4 << 20], &noise(2, 64 << 10), &old[4 << 20..]].concat();
    let (base, id) = (put(&source, &old), put(&source, &new));
    put(&target, &old);

    let mut form = source.pack_form(&id, &[base], None).unwrap();
    assert_eq!(form.base, Some(base));
    assert!(form.size_bytes < form.stored_size_bytes / 20, "{form:?}");
    assert_eq!(source.held_delta_bytes(&id, &base), Some(form.size_bytes));
    receive(&target, id, &mut form, new.len() as u64, None).unwrap();
    assert!(plain(&target, &id) == new);
    assert_eq!(files_below(&target.dir().join("incoming")), 0);

    // No base, an unknown one, itself, or one that has nothing in common: the whole.
    let other = put(&source, &noise(3, 1 << 20));
    for bases in [vec![], vec![PackId::of(b"unknown")], vec![id], vec![other]] {
        assert_eq!(source.pack_form(&id, &bases, None).unwrap().base, None, "{bases:?}");
    }
    assert_eq!(source.held_delta_bytes(&id, &other), None);

    // Made ahead of time it is no larger.
    let strong = source.prepare_delta(&id, &base).unwrap().unwrap();
    assert!(strong <= form.size_bytes);
    assert_eq!(source.pack_form(&id, &[base], None).unwrap().size_bytes, strong);

    // Where the delta is gone, nothing goes on saying that it was made so.
    let deltas = source.dir().join("deltas");
    let hex = id.to_string();
    std::fs::remove_file(deltas.join(&hex[..2]).join(format!("{hex}-{base}"))).unwrap();
    let pin = source.pin([id, base].map(ObjectId::Pack).into());
    source.gc(false, Duration::ZERO, &[]).unwrap();
    assert_eq!(files_below(&deltas), 0);
    let quick = source.pack_form(&id, &[base], None).unwrap().size_bytes;
    let again = source.prepare_delta(&id, &base).unwrap().unwrap();
    // The compressor is not the same to the byte when it is fed in other pieces.
    assert!(again <= quick && again.abs_diff(strong) * 1000 < strong, "{quick}, {strong}, {again}");

    // Deltas go with their packs.
    drop(pin);
    source.gc(false, Duration::ZERO, &[]).unwrap();
    assert_eq!(files_below(&source.dir().join("deltas")), 0);
}

#[test]
fn a_delta_for_another_base_or_pack_is_refused() {
    let ((_a, source), (_b, target)) = (repository(), repository());
    let old = program(1, 2 << 20);
    let new = [&old[..], &program(2, 4096)].concat();
    let (base, id) = (put(&source, &old), put(&source, &new));
    let mut form = source.pack_form(&id, &[base], None).unwrap();
    // The target has no such base.
    let lacking = receive(&target, id, &mut form, new.len() as u64, None);
    assert!(matches!(lacking, Err(RepositoryError::Missing { .. })), "{lacking:?}");
    put(&target, &old);
    for (wanted, plain_bytes) in [(PackId::of(b"other"), new.len() as u64), (id, 4096)] {
        let mut form = source.pack_form(&id, &[base], None).unwrap();
        let refused = receive(&target, wanted, &mut form, plain_bytes, None);
        assert!(matches!(refused, Err(RepositoryError::Refused { .. })), "{refused:?}");
    }
    assert_eq!(files_below(&target.dir().join("incoming")), 0);
    assert_eq!(files_below(&target.dir().join("temporary")), 0);
    assert!(!target.has_pack(&id));
}

#[test]
fn what_came_before_a_cut_is_not_sent_again() {
    let (_a, source) = repository();
    let old = program(1, 9 << 20);
    let new = [&program(2, 3 << 20), &old[..]].concat();
    let (base, id) = (put(&source, &old), put(&source, &new));
    for bases in [vec![], vec![base]] {
        let (dir, mut target) = repository();
        put(&target, &old);
        let mut form = source.pack_form(&id, &bases, None).unwrap();
        let half = form.size_bytes / 2 + 13;
        receive(&target, id, &mut form, new.len() as u64, Some(half)).unwrap();
        assert!(!target.has_pack(&id));
        // The broker ends and comes back.
        drop(target);
        target = Repository::open(&dir.path().join("repository")).unwrap();
        let part = target.partial_pack(&id).unwrap();
        assert_eq!((part.tag, part.received_bytes), (form.tag, half));
        // The sender goes on with the form that was begun, though another might be smaller now.
        let mut form = source.pack_form(&id, &[base], Some(part.tag)).unwrap();
        assert_eq!(form.tag, part.tag);
        let sent = receive(&target, id, &mut form, new.len() as u64, None).unwrap();
        assert_eq!(sent, form.size_bytes - half);
        assert!(plain(&target, &id) == new);
        assert_eq!(target.partial_pack(&id), None);
    }
}

#[test]
fn a_torn_part_is_dropped_and_nobody_blamed() {
    let ((_a, source), (_b, target)) = (repository(), repository());
    let content = program(1, 8 << 20);
    let id = put(&source, &content);
    let mut form = source.pack_form(&id, &[], None).unwrap();
    let half = form.size_bytes / 2;
    receive(&target, id, &mut form, content.len() as u64, Some(half)).unwrap();
    let incoming = target.dir().join("incoming");
    let part = std::fs::read_dir(&incoming).unwrap().next().unwrap().unwrap().path();
    let file = std::fs::OpenOptions::new().write(true).open(&part).unwrap();
    file.write_all_at(&[0; 4096], 100_000).unwrap();
    let torn = receive(&target, id, &mut form, content.len() as u64, None);
    assert!(matches!(torn, Err(RepositoryError::TornPart { .. })), "{torn:?}");
    assert_eq!(files_below(&incoming), 0);
    receive(&target, id, &mut form, content.len() as u64, None).unwrap();
    assert!(plain(&target, &id) == content);
}

#[test]
fn two_who_want_the_same_pack_do_not_meet() {
    let ((_a, source), (_b, target)) = (repository(), repository());
    let content = program(1, 4 << 20);
    let id = put(&source, &content);
    let mut form = source.pack_form(&id, &[], None).unwrap();
    let announced =
        IncomingForm { tag: form.tag, size_bytes: form.size_bytes, offset_bytes: 0, is_delta: false };
    let mut bytes = vec![0; form.size_bytes as usize];
    form.file.read_exact(&mut bytes).unwrap();
    let mut first = target.incoming_pack(id, announced, None).unwrap();
    let mut second = target.incoming_pack(id, announced, None).unwrap();
    for (a, b) in bytes.chunks(1000).zip(bytes.chunks(1000)) {
        first.write(a).unwrap();
        second.write(b).unwrap();
    }
    second.finish().unwrap();
    first.finish().unwrap();
    assert!(plain(&target, &id) == content);
    assert_eq!(files_below(&target.dir().join("incoming")), 0);
    assert_eq!(files_below(&target.dir().join("temporary")), 0);
}

#[test]
fn versions_of_a_package_are_found_by_name() {
    let (_dir, repository) = repository();
    let component = |name: &str, version: &str, packages: &[(&str, u64)]| -> (ComponentId, Vec<PackId>) {
        let packs: Vec<PackRef> = packages
            .iter()
            .map(|(package, seed)| {
                let content = program(*seed, 64 << 10);
                let id = put(&repository, &content);
                PackRef {
                    id,
                    size_bytes: content.len() as u64,
                    package: (*package).into(),
                    package_version: version.into(),
                }
            })
            .collect();
        let root = Entry {
            path: vec![],
            meta: Meta { mode: 0o755, uid: 0, gid: 0, mtime_s: 0 },
            xattrs: vec![],
            kind: EntryKind::Directory,
        };
        let manifest = Manifest {
            name: name.into(),
            version: version.into(),
            architecture: "amd64".into(),
            origin: "test".into(),
            kind: Kind::Program,
            licences: vec![],
            requires: vec![],
            conflicts: vec![],
            packs: packs.clone(),
            entries: vec![root],
            fragments: vec![],
        };
        (repository.put_manifest(&manifest).unwrap(), packs.iter().map(|p| p.id).collect())
    };
    let (_, old) = component("kernel", "1", &[("linux-image-6.1.0-55-cloud", 1), ("linux-base", 2)]);
    component("editor", "1", &[("linux-image-6.1.0-54-cloud", 3)]);
    let (new_id, new) = component("kernel", "2", &[("linux-image-6.1.0-56-cloud", 4), ("other", 5)]);
    let bases = repository.likely_bases(&[new_id], &new.iter().copied().collect()).unwrap();
    assert_eq!(bases.len(), 1);
    assert_eq!(bases[&new[0]], vec![old[0]]);
}
