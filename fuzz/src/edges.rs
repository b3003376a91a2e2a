//! Small readers of foreign bytes that no other target reaches: peers' keys, tickets and addresses,
//! the guard before the XML parser, what QEMU and its tools say, durable records beside the journal.

use std::collections::BTreeMap;

use cicada::federation::{Kept, Revoked};
use cicada::hypervisor::fuzzing::{dirty_ranges, is_message};
use cicada::migration::Receipt;
use cicada::types::codec::{Reader, Writer};
use cicada::types::{CloudName, Hash, MemberJid, PublicKey, Successions, VmName};
use cicada::xmpp::fuzzing::filtered;
use xmpp_parsers::minidom::Element;

use crate::split;

/// By the first byte.
pub fn edges(data: &[u8]) {
    let Some((selector, rest)) = split(data) else { return };
    match selector % 6 {
        0 => {
            if let Ok(key) = PublicKey::from_spki_der(rest) {
                assert!(rest.ends_with(key.as_bytes()) && rest.len() == 44, "a key has one encoding");
            }
        }
        1 => texts(rest),
        2 => guarded(rest),
        3 => {
            if let Ok(line) = std::str::from_utf8(rest) {
                let _ = is_message(line);
            }
        }
        4 => map(rest),
        _ => records(rest),
    }
}

fn texts(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(jid) = text.parse::<MemberJid>() {
        assert_eq!(jid.as_str().parse::<MemberJid>().as_ref().ok(), Some(&jid));
    }
    if let Ok(key) = text.parse::<PublicKey>() {
        assert_eq!(key.to_string().parse::<PublicKey>().ok(), Some(key));
    }
    if let Ok(ticket) = text.parse::<Hash>() {
        assert_eq!(ticket.to_string().parse::<Hash>().ok(), Some(ticket));
    }
    let _ = (text.parse::<CloudName>(), text.parse::<VmName>());
}

/// What passes the guard is never deep, and passes it again as it is.
fn guarded(bytes: &[u8]) {
    let passed = filtered(bytes);
    assert!(passed.len() <= bytes.len() + bytes.len() / 100 + 16);
    let Ok(text) = std::str::from_utf8(&passed) else { return };
    if let Ok(element) = text.parse::<Element>() {
        fn depth(element: &Element) -> usize {
            1 + element.children().map(depth).max().unwrap_or(0)
        }
        assert!(depth(&element) <= 64);
        assert_eq!(filtered(&passed), passed);
    }
}

/// Eight bytes of disk size, one of granularity, one of the count; then JSON.
fn map(bytes: &[u8]) {
    let Some((size, rest)) = bytes.split_first_chunk::<8>() else { return };
    let Some(([granularity, count], json)) = rest.split_first_chunk::<2>() else { return };
    let (size, granularity) = (u64::from_le_bytes(*size), 1u64 << (granularity % 64));
    if let Some(ranges) = dirty_ranges(json, size, granularity, u64::from(*count).wrapping_mul(granularity)) {
        assert!(ranges.iter().all(|r| r.start < r.end && r.end <= size), "{ranges:?} of {size}");
        assert!(ranges.is_sorted_by(|a, b| a.end <= b.start), "{ranges:?}");
    }
}

fn records(json: &[u8]) {
    if let Ok(kept) = serde_json::from_slice::<BTreeMap<MemberJid, Kept>>(json) {
        let written = serde_json::to_vec(&kept).expect("keys can be written");
        assert_eq!(serde_json::from_slice::<BTreeMap<_, _>>(&written).ok(), Some(kept));
    }
    if let Ok(revoked) = serde_json::from_slice::<Revoked>(json) {
        let written = serde_json::to_vec(&revoked).expect("keys can be written");
        assert_eq!(serde_json::from_slice::<Revoked>(&written).ok(), Some(revoked));
    }
    let mut r = Reader::new(json);
    if let Ok(successions) = Successions::decode(&mut r) {
        let mut w = Writer::new();
        successions.encode(&mut w);
        assert_eq!(w.into_bytes(), json[..json.len() - r.remaining_bytes()], "one encoding");
    }
    if let Ok(receipt) = serde_json::from_slice::<Receipt>(json) {
        let _ = receipt.verify();
        let written = serde_json::to_vec(&receipt).expect("a receipt can be written");
        assert_eq!(serde_json::from_slice::<Receipt>(&written).ok(), Some(receipt));
    }
}
