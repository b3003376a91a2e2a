//! Manifests, fragments, recipes, and the small files of a repository.

use std::sync::Arc;

use cicada::component::extents::BLOCK_BYTES;
use cicada::component::fragment::{self, Part};
use cicada::component::tree::{check_bootable, unite};
use cicada::component::{ExtentList, FragmentRule, Manifest, Recipe};
use cicada::migration::HandOver;
use cicada::repository::RefKind;
use cicada::repository::fuzzing as files;
use cicada::types::ComponentId;
use cicada::types::codec::Reader;
use cicada::vm::MapRef;

use crate::split;

/// A manifest from a peer: decoded, united into trees alone and with a sibling, shown.
pub fn manifest(data: &[u8]) {
    let Ok(manifest) = Manifest::decode(data) else { return };
    assert_eq!(manifest.encode(), data, "an accepted manifest has one encoding");
    let _ = (manifest.plain_bytes(), manifest.similarity_key());
    let id = manifest.id();
    let mut sibling = manifest.clone();
    sibling.version.push('2');
    sibling.conflicts.clear();
    sibling.entries.iter_mut().step_by(3).for_each(|e| e.meta.uid ^= 1);
    let child = {
        let mut child = sibling.clone();
        child.requires = vec![id];
        child
    };
    let of = |m: &Manifest| (ComponentId::of(&m.encode()), Arc::new(m.clone()));
    let alone = vec![of(&manifest)];
    let _ = check_bootable(&alone);
    for (members, ordered) in [
        (alone, false),
        (vec![of(&manifest), of(&sibling)], false),
        (vec![of(&manifest), of(&sibling)], true),
        (vec![of(&manifest), of(&child)], false),
    ] {
        // What others require is not in the set; without it the rules beyond are reached too.
        let members: Vec<_> = members
            .into_iter()
            .map(|(own, m)| {
                let mut m = (*m).clone();
                m.requires.retain(|r| *r == id && own != id);
                (own, Arc::new(m))
            })
            .collect();
        match unite(&members, ordered) {
            Ok(tree) => {
                assert!(tree.nodes.iter().all(|n| tree.find(&n.path).is_some()), "a tree finds its nodes");
            }
            Err(e) => assert!(!e.to_string().is_empty()),
        }
    }
}

/// The extent list of an adopted disk. The first byte is the size of its second pack in blocks, and
/// the list's other packs are one and a million blocks large.
pub fn extents(data: &[u8]) {
    let Some((blocks, list)) = split(data) else { return };
    let sizes = [1, u64::from(blocks), 1, 1_000_000].map(|blocks| blocks * BLOCK_BYTES);
    let Ok(found) = ExtentList::decode(list, &sizes) else { return };
    assert_eq!(found.encode(), list, "an accepted extent list has one encoding");
    assert!(found.known_blocks() * BLOCK_BYTES <= found.disk_size_bytes, "runs are disjoint and within");
}

const RULES: [FragmentRule; 7] = [
    FragmentRule::Accounts,
    FragmentRule::Groups,
    FragmentRule::Lines,
    FragmentRule::GroupShadow,
    FragmentRule::Set,
    FragmentRule::Triples,
    FragmentRule::Stanzas,
];

/// Files of aggregated records: three of them, separated by a byte 0xff, one after another.
pub fn fragments(data: &[u8]) {
    let Some((selector, rest)) = split(data) else { return };
    let rule = RULES[selector as usize % RULES.len()];
    let mut files = rest.splitn(3, |b| *b == 0xff);
    let parsed: Vec<_> = (0..3).map(|_| fragment::parse(rule, files.next().unwrap_or_default())).collect();
    for records in parsed.iter().flatten() {
        let rendered = fragment::render(rule, records);
        let again = fragment::parse(rule, &rendered);
        assert_eq!(again.as_ref(), Ok(records), "records read back from the file they make");
        assert_eq!(fragment::difference(rule, records, records), Ok(vec![]), "nothing differs from itself");
    }
    let [Ok(a), Ok(b), c] = parsed.as_slice() else { return };
    let difference = fragment::difference(rule, a, b);
    let part = |number, records| Part { component: "x", number, records };
    let parts = [part(0, a.as_slice()), part(1, b.as_slice())];
    let none = |_: usize, _: usize| false;
    let merged = fragment::merge(rule, b"etc/x", &parts, &none, false);
    let swapped = fragment::merge(rule, b"etc/x", &[parts[1], parts[0]], &none, false);
    match (&merged, &swapped) {
        (Ok(one), Ok(other)) => assert_eq!(one, other, "order decides nothing"),
        (one, other) => assert_eq!(one.is_ok(), other.is_ok(), "order decides nothing"),
    }
    let _ = fragment::merge(rule, b"etc/x", &parts, &none, true);
    if let Ok(difference) = &difference {
        let parts = [part(0, a.as_slice()), part(1, difference.as_slice())];
        let overrides = |x: usize, y: usize| (x, y) == (1, 0);
        if let Ok(merged) = fragment::merge(rule, b"etc/x", &parts, &overrides, false) {
            assert!(fragment::parse(rule, &merged).is_ok(), "what merging makes can be read");
        }
    }
    if let Ok(c) = c {
        let _ = fragment::merge(rule, b"etc/x", &[parts[0], parts[1], part(2, c)], &none, true);
    }
    // Records as a manifest brings them, not as parsing made them.
    let crude: Vec<_> =
        rest.split(|b| *b == 0xff).map(|r| (r[..r.len().min(3)].to_vec(), r.to_vec())).collect();
    let _ = fragment::render(rule, &crude);
    let _ = fragment::merge(rule, b"etc/x", &[part(0, &crude)], &none, false);
    let _ = fragment::difference(rule, &crude, a);
}

/// Small binary records, by the first byte: recipe, stored record, ref, node bundle, hand-over,
/// numbers of the canonical codec.
pub fn records(data: &[u8]) {
    let Some((selector, rest)) = split(data) else { return };
    match selector % 6 {
        0 => {
            if let Ok(recipe) = Recipe::decode(rest) {
                assert_eq!(recipe.encode(), rest, "an accepted recipe has one encoding");
            }
        }
        1 => {
            if let Ok(plain) = files::read_record(rest, 1 << 20) {
                assert!(plain.len() <= 1 << 20);
                let stored = files::write_record(&plain).expect("memory is written to");
                assert_eq!(files::read_record(&stored, 1 << 20), Ok(plain));
            }
        }
        2 => {
            let Some((kind, body)) = split(rest) else { return };
            let kind = RefKind::ALL[kind as usize % RefKind::ALL.len()];
            // Sealed, as whoever can write the file would.
            let sealed = [body, blake3_of(body).as_slice()].concat();
            for bytes in [body, &sealed] {
                if let Ok((name, value)) = files::read_ref(kind, bytes) {
                    assert_eq!(
                        files::write_ref(kind, &name, &value),
                        bytes,
                        "an accepted ref has one encoding"
                    );
                }
            }
        }
        3 => {
            for (hash, bytes) in files::read_bundle(rest) {
                assert_eq!(cicada::types::NodeHash::of(bytes), hash);
            }
        }
        4 => {
            if let Ok(record) = HandOver::decode(rest) {
                assert_eq!(record.encode(), rest, "an accepted hand-over has one encoding");
            }
        }
        _ => {
            let mut reader = Reader::new(rest);
            while reader.remaining_bytes() > 0 {
                if reader.varint("number").is_err() || reader.bytes("text", 100).is_err() {
                    break;
                }
            }
            if let Some((head, _)) = rest.split_first_chunk::<12>() {
                let [a, b, c, d, disk @ ..] = *head;
                let map = MapRef {
                    block_size_bytes: u32::from_le_bytes([a, b, c, d]),
                    disk_size_bytes: u64::from_le_bytes(disk),
                    root: None,
                };
                if map.check().is_ok() {
                    assert!(map.levels() <= 5 && map.block_count() <= 1 << 32);
                }
                let _ = map.id();
            }
        }
    }
}

fn blake3_of(bytes: &[u8]) -> [u8; 32] {
    *cicada::types::Hash::of(bytes).as_bytes()
}
