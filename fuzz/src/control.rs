//! What other brokers and the XMPP server send.

use std::sync::OnceLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use cicada::clock::UnixMillis;
use cicada::component::Recipe;
use cicada::federation::Members;
use cicada::migration::{AnswerBody, Envelope, EnvelopeError, ReplayGuard, RequestBody};
use cicada::stanza::muc::{AdminQuery, OwnerQuery};
use cicada::stanza::{Answer, Cloud, Request, error};
use cicada::transfer::fuzzing::{self as wire, Frame, HEADER_BYTES};
use cicada::transfer::{Encoding, ObjectKey};
use cicada::types::{BlockHash, IdentityKey, MemberJid};
use cicada::xmpp::fuzzing::{RoomPresence, configuration_changed, read};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_xmpp::Stanza;
use xmpp_parsers::jid::Jid;
use xmpp_parsers::minidom::Element;
use xmpp_parsers::stanza_error::StanzaError;

use crate::split;

/// Seeds are issued then.
pub const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

/// Public so that seeds can be made of it.
pub fn parties() -> &'static (IdentityKey, MemberJid, MemberJid) {
    static PARTIES: OnceLock<(IdentityKey, MemberJid, MemberJid)> = OnceLock::new();
    PARTIES.get_or_init(|| {
        let jid = |text: &str| text.parse().expect("a member's address");
        (IdentityKey::from_secret_bytes(&[1; 32]), jid("a@example.org"), jid("b@example.org"))
    })
}

/// XML: one stanza, or one payload of ours.
pub fn stanzas(data: &[u8]) {
    if let Ok(stanza) = xso::from_bytes::<Stanza>(data) {
        stanza_of(stanza);
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(element) = text.parse::<Element>() else { return };
    let _ = error::condition_in(&element);
    if let Ok(cloud) = Cloud::try_from(element.clone()) {
        take_cloud(&cloud);
    }
    if let Ok(request) = Request::try_from(element.clone()) {
        assert_eq!(Request::try_from(Element::from(request.clone())).as_ref().ok(), Some(&request));
    }
    if let Ok(answer) = Answer::try_from(element.clone()) {
        assert_eq!(Answer::try_from(Element::from(answer.clone())).as_ref().ok(), Some(&answer));
    }
    if let Ok(query) = AdminQuery::try_from(element.clone()) {
        assert_eq!(AdminQuery::try_from(Element::from(query.clone())).as_ref().ok(), Some(&query));
    }
    let _ = OwnerQuery::try_from(element.clone());
    if let Ok(error) = StanzaError::try_from(element.clone()) {
        assert!(error::text_of(&error).chars().count() <= 200);
        let _ = error::condition_name(&error);
    }
    if let Ok(stanza) = Stanza::try_from(element) {
        stanza_of(stanza);
    }
}

fn stanza_of(stanza: Stanza) {
    static ME: OnceLock<Jid> = OnceLock::new();
    let me = ME.get_or_init(|| Jid::new("a@example.org/cicada").expect("an address"));
    match stanza {
        Stanza::Presence(presence) => {
            if let RoomPresence::Member(presence) = read(&presence, me) {
                if let Some(cloud) = &presence.cloud {
                    take_cloud(cloud);
                }
                let jid = presence.jid.clone();
                let mut members = Members::new(Default::default(), Default::default(), true);
                members.presence(presence.clone(), NOW);
                members.presence(presence, NOW);
                let _ = (members.trust_of(&jid), members.cloud_of(&jid), members.memory_bytes_free(&jid));
            }
        }
        Stanza::Message(message) => drop(configuration_changed(&message)),
        Stanza::Iq(_) => {}
    }
}

fn take_cloud(cloud: &Cloud) {
    if cloud.is_bounded() {
        assert_eq!(Cloud::try_from(Element::from(cloud.clone())).as_ref().ok(), Some(cloud));
    }
}

/// By the first byte: the JSON of a request or an answer, which is signed here since nothing is
/// read before the signature was checked; a sealed message as it came; a hand-over's texts.
pub fn negotiation(data: &[u8]) {
    let Some((selector, rest)) = split(data) else { return };
    match selector % 3 {
        0 => {
            if let Some(envelope) = open::<RequestBody>(rest) {
                take_request(&envelope.body);
            }
        }
        1 => {
            if let Some(envelope) = open::<AnswerBody>(rest) {
                take_answer(&envelope.body);
            }
        }
        _ => {
            let (key, from, to) = parties();
            let opened = Envelope::<RequestBody>::open(rest, &key.public(), from, to, NOW);
            assert!(opened.is_err(), "a message without our signature was opened");
        }
    }
}

fn open<T>(json: &[u8]) -> Option<Envelope<T>>
where
    T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug,
{
    let (key, from, to) = parties();
    let signature = key.sign(&[b"cicada negotiation 1\0", json].concat());
    let sealed = [signature.as_bytes().as_slice(), json].concat();
    let open = |sealed: &[u8]| Envelope::<T>::open(sealed, &key.public(), from, to, NOW);
    match open(&sealed) {
        Ok(envelope) => {
            let sealed = envelope.seal(key).expect("what came in one message goes out in one");
            assert_eq!(open(&sealed).as_ref().ok(), Some(&envelope), "a message reads back");
            let mut guard = ReplayGuard::default();
            assert!(guard.admit(&envelope, NOW).is_ok() && guard.admit(&envelope, NOW).is_err());
            Some(envelope)
        }
        Err(EnvelopeError::Signature) => panic!("our own signature was refused"),
        Err(_) => None,
    }
}

fn take_request(body: &RequestBody) {
    match body {
        RequestBody::Configuration { spec, .. } | RequestBody::Reservation { spec } => drop(spec.check()),
        RequestBody::Initialization(init) => {
            let _ = init.spec.check();
            for map in [&init.pass.root_delta, &init.pass.user_data] {
                if map.check().is_ok() {
                    let _ = (map.id(), map.levels(), map.block_count());
                }
            }
            if let Ok(bytes) = BASE64.decode(&init.recipe)
                && let Ok(recipe) = Recipe::decode(&bytes)
            {
                assert_eq!(recipe.encode(), bytes);
            }
        }
        RequestBody::Start { hand_over, .. } | RequestBody::Withdraw { hand_over } => {
            if let Ok(record) = hand_over.verify() {
                assert_eq!(record.clone().sign(&parties().0).record, hand_over.record, "one spelling");
            }
        }
        // What is shown is verified link by link.
        RequestBody::Lineage { links, successions, .. } => {
            let empty = cicada::migration::Lineage::empty(cicada::types::VmId(uuid::Uuid::nil()));
            drop(empty.with(successions).continued(links.0.clone()));
        }
        RequestBody::Cancel { .. }
        | RequestBody::Content { .. }
        | RequestBody::Owners { .. }
        | RequestBody::Suspend
        | RequestBody::Stop
        | RequestBody::Delete { .. } => {}
    }
}

fn take_answer(body: &AnswerBody) {
    match body {
        AnswerBody::Started { receipt, .. } => drop(receipt.verify()),
        AnswerBody::Returned { back, .. } => drop(back.verify()),
        AnswerBody::Denied(denial) => drop(denial.code.as_str()),
        AnswerBody::Configuration(check) => {
            let maps = check.seed.iter().flat_map(|s| [&s.root_delta, &s.user_data]);
            maps.for_each(|map| drop(map.check()));
        }
        _ => {}
    }
}

/// By the first byte: a request stream, a frame with its header, a packed object.
pub fn frames(data: &[u8]) {
    let Some((selector, rest)) = split(data) else { return };
    match selector % 3 {
        0 => {
            if let Ok(request) = wire::Request::decode(rest) {
                assert_eq!(request.encode(), rest, "an accepted request has one encoding");
            }
        }
        1 => {
            let Some((header, body)) = rest.split_first_chunk::<HEADER_BYTES>() else { return };
            let Ok((tag, length)) = Frame::header(*header) else { return };
            let Some(body) = body.get(..length) else { return };
            let Ok(frame) = Frame::decode(tag, Bytes::copy_from_slice(body)) else { return };
            assert_eq!(frame.encode(), &rest[..HEADER_BYTES + length], "an accepted frame has one encoding");
            take_frame(frame);
        }
        _ => {
            let plain_size = u64::from(selector) << 8;
            if let Some(plain) = wire::unpack(rest, plain_size) {
                assert_eq!(plain.len() as u64, plain_size);
            }
        }
    }
}

fn take_frame(frame: Frame) {
    match frame {
        Frame::Small { zstd, sizes_bytes, payload } => {
            let total: usize = sizes_bytes.iter().map(|s| *s as usize).sum();
            let plain =
                if zstd { zstd::bulk::decompress(&payload, total).ok() } else { Some(payload.to_vec()) };
            let sound = plain.filter(|p| p.len() == total);
            // With the right hashes, if there are any, the objects must come out.
            let mut rest = sound.as_deref().unwrap_or_default();
            let keys: Vec<ObjectKey> = sizes_bytes
                .iter()
                .map(|size| {
                    let (object, after) = rest.split_at((*size as usize).min(rest.len()));
                    rest = after;
                    ObjectKey::Block(BlockHash::of(object))
                })
                .collect();
            let opened = wire::open(&keys, zstd, &sizes_bytes, payload.clone(), &mut Bytes::new());
            assert_eq!(opened.is_ok(), sound.is_some(), "{:?}", opened.err());
            let wrong = vec![ObjectKey::Block(BlockHash::of(b"another")); keys.len()];
            assert!(wire::open(&wrong, zstd, &sizes_bytes, payload.clone(), &mut Bytes::new()).is_err());
            assert!(wire::open(&keys[1..], zstd, &sizes_bytes, payload, &mut Bytes::new()).is_err());
        }
        Frame::Large { encoding: Encoding::Zstd { plain_size_bytes }, size_bytes } => {
            assert!(plain_size_bytes <= 1 << 42 && size_bytes <= 1 << 42);
        }
        Frame::Large { .. } | Frame::Working => {}
        Frame::Refused { count, .. } => assert!(count > 0),
    }
}
