//! The frames of `transfer/PROTOCOL.md`: pure encoding and decoding, bounded.

use bytes::Bytes;

use super::error::Refusal;
use super::object::{Encoding, ObjectKey, PackRange, PackWish, Ticket};
use crate::component::manifest;
use crate::types::codec::{CodecError, Reader, Writer};
use crate::types::{BlockHash, ComponentId, NodeHash, PackId, RecipeId};
use crate::vm::chunk_map;

/// Bounds of what a peer may send. All are part of the protocol.
pub mod limit {
    /// Objects one request may ask for.
    pub const KEYS_PER_REQUEST: usize = 1024;
    /// Packs an asker may name as bases of a delta.
    pub const BASES: usize = 4;
    /// Verb, ticket, count and keys; of packs, with what the asker says of them.
    pub const REQUEST_BYTES: usize = 1 + 32 + 2 + KEYS_PER_REQUEST * 33 + PACKS_PER_REQUEST * WISH_BYTES;
    /// Packs one request may ask for.
    pub const PACKS_PER_REQUEST: usize = 64;
    /// Count of bases, bases, whether a part is there, its tag and size.
    pub const WISH_BYTES: usize = 1 + BASES * 32 + 1 + 16 + 6;
    /// Plain bytes of one batch of small objects, unless it is a single larger one.
    pub const BATCH_BYTES: usize = 1 << 20;
    /// The largest object that travels in a batch.
    pub const SMALL_BYTES: usize = 1 << 20;
    /// The stored form of a pack.
    pub const PACK_BYTES: u64 = 1 << 42;
    /// Body of a batch frame: one small object, or a batch, and the sizes.
    pub const FRAME_BYTES: usize = SMALL_BYTES + 1 + 5 + KEYS_PER_REQUEST * 5;
}

/// First byte of a request stream that fetches objects.
pub const VERB_FETCH: u8 = 1;
/// Tag and length in front of every answer frame.
pub const HEADER_BYTES: usize = 5;

const TAG_REFUSED: u8 = 1;
const TAG_SMALL: u8 = 2;
const TAG_LARGE: u8 = 3;
const TAG_WORKING: u8 = 4;

/// The most plain bytes an object of this kind may have; for a pack, of its stored form.
pub fn size_limit_bytes(key: &ObjectKey) -> u64 {
    match key {
        ObjectKey::Manifest(_) => manifest::limit::MANIFEST_BYTES,
        ObjectKey::Recipe(_) => limit::SMALL_BYTES as u64,
        ObjectKey::Pack(_) => limit::PACK_BYTES,
        ObjectKey::Node(_) => chunk_map::NODE_BYTES_MAX as u64,
        ObjectKey::Block(_) => chunk_map::BLOCK_BYTES_MAX.into(),
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    pub ticket: Ticket,
    /// 1 to [`limit::KEYS_PER_REQUEST`].
    pub keys: Vec<ObjectKey>,
    /// One for each pack among the keys, in their order.
    pub wishes: Vec<PackWish>,
}

impl Request {
    /// The whole request, verb included.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u8(VERB_FETCH);
        w.fixed(self.ticket.as_bytes());
        w.varint(self.keys.len() as u64);
        let mut wishes = self.wishes.iter();
        for key in &self.keys {
            w.u8(kind_code(key));
            w.fixed(key.hash().as_bytes());
            if key.is_pack() {
                encode_wish(&mut w, wishes.next().unwrap_or(&PackWish::default()));
            }
        }
        w.into_bytes()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let mut r = Reader::new(bytes);
        match r.u8("verb")? {
            VERB_FETCH => {}
            value => return Err(CodecError::Unknown { what: "verb", value: value.into() }),
        }
        let ticket = Ticket::from_bytes(r.array("ticket")?);
        let count = r.count("objects asked for", limit::KEYS_PER_REQUEST as u64, 33)?;
        if count == 0 {
            return Err(CodecError::NotCanonical { what: "empty request" });
        }
        let (mut keys, mut wishes) = (Vec::with_capacity(count), Vec::new());
        for _ in 0..count {
            let kind = r.u8("kind of object")?;
            let key = key_of(kind, r.array("id of object")?)?;
            if key.is_pack() {
                if wishes.len() == limit::PACKS_PER_REQUEST {
                    let (value, limit) = (wishes.len() as u64 + 1, limit::PACKS_PER_REQUEST as u64);
                    return Err(CodecError::TooLarge { what: "packs asked for", value, limit });
                }
                wishes.push(decode_wish(&mut r)?);
            }
            keys.push(key);
        }
        r.end()?;
        Ok(Self { ticket, keys, wishes })
    }
}

fn encode_wish(w: &mut Writer, wish: &PackWish) {
    let bases = &wish.bases[..wish.bases.len().min(limit::BASES)];
    w.u8(bases.len() as u8);
    bases.iter().for_each(|base| w.fixed(base.as_bytes()));
    match &wish.begun {
        Some((tag, bytes)) => {
            w.u8(1);
            w.fixed(tag);
            w.varint(*bytes);
        }
        None => w.u8(0),
    }
}

fn decode_wish(r: &mut Reader<'_>) -> Result<PackWish, CodecError> {
    let count = r.u8("bases")?;
    if usize::from(count) > limit::BASES {
        return Err(CodecError::TooLarge { what: "bases", value: count.into(), limit: limit::BASES as u64 });
    }
    let bases = (0..count).map(|_| Ok(PackId::from_bytes(r.array("base")?))).collect::<Result<_, _>>()?;
    let begun = match flag(r)? {
        true => Some((r.array("tag")?, r.bounded("size of a part", limit::PACK_BYTES)?)),
        false => None,
    };
    Ok(PackWish { bases, begun })
}

fn kind_code(key: &ObjectKey) -> u8 {
    match key {
        ObjectKey::Manifest(_) => 1,
        ObjectKey::Recipe(_) => 2,
        ObjectKey::Pack(_) => 3,
        ObjectKey::Node(_) => 4,
        ObjectKey::Block(_) => 5,
    }
}

fn key_of(kind: u8, id: [u8; 32]) -> Result<ObjectKey, CodecError> {
    Ok(match kind {
        1 => ObjectKey::Manifest(ComponentId::from_bytes(id)),
        2 => ObjectKey::Recipe(RecipeId::from_bytes(id)),
        3 => ObjectKey::Pack(PackId::from_bytes(id)),
        4 => ObjectKey::Node(NodeHash::from_bytes(id)),
        5 => ObjectKey::Block(BlockHash::from_bytes(id)),
        value => return Err(CodecError::Unknown { what: "kind of object", value: value.into() }),
    })
}

/// One frame of an answer; each answers the next keys of the request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Frame {
    /// The next `count` objects are refused.
    Refused { reason: Refusal, count: usize },
    /// The next objects, one after another in `payload`.
    Small { zstd: bool, sizes_bytes: Vec<u32>, payload: Bytes },
    /// The next object; `size_bytes` raw bytes follow the frame.
    Large { encoding: Encoding, size_bytes: u64 },
    /// The next object is being made ready; answers nothing.
    Working,
}

impl Frame {
    /// Header and body.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        let (tag, payload) = match self {
            Frame::Refused { reason, count } => {
                w.u8(reason.code());
                w.varint(*count as u64);
                (TAG_REFUSED, &[][..])
            }
            Frame::Small { zstd, sizes_bytes, payload } => {
                w.u8(u8::from(*zstd));
                w.varint(sizes_bytes.len() as u64);
                for size in sizes_bytes {
                    w.varint((*size).into());
                }
                (TAG_SMALL, &payload[..])
            }
            Frame::Large { encoding, size_bytes } => {
                let (code, plain_size_bytes) = match encoding {
                    Encoding::Plain => (0, *size_bytes),
                    Encoding::Zstd { plain_size_bytes } => (1, *plain_size_bytes),
                    Encoding::StoredPack(range) => (2, range.stored_size_bytes),
                    Encoding::PackDelta(range) => (3, range.stored_size_bytes),
                };
                w.u8(code);
                w.varint(*size_bytes);
                w.varint(plain_size_bytes);
                if let Encoding::StoredPack(range) | Encoding::PackDelta(range) = encoding {
                    w.fixed(&range.tag);
                    w.varint(range.offset_bytes);
                }
                (TAG_LARGE, &[][..])
            }
            Frame::Working => (TAG_WORKING, &[][..]),
        };
        let head = w.into_bytes();
        let mut out = Vec::with_capacity(HEADER_BYTES + head.len() + payload.len());
        out.push(tag);
        out.extend_from_slice(&((head.len() + payload.len()) as u32).to_le_bytes());
        out.extend_from_slice(&head);
        out.extend_from_slice(payload);
        out
    }

    /// Reads a header: the tag, and how many bytes of body to read.
    pub fn header(header: [u8; HEADER_BYTES]) -> Result<(u8, usize), CodecError> {
        let [tag, length @ ..] = header;
        let length = u32::from_le_bytes(length);
        let limit = match tag {
            TAG_REFUSED => 32,
            TAG_LARGE => 64,
            TAG_WORKING => 0,
            TAG_SMALL => limit::FRAME_BYTES,
            value => return Err(CodecError::Unknown { what: "frame tag", value: value.into() }),
        };
        if length as usize > limit {
            return Err(CodecError::TooLarge { what: "frame", value: length.into(), limit: limit as u64 });
        }
        Ok((tag, length as usize))
    }

    /// Reads a body; a batch's payload shares its buffer.
    pub fn decode(tag: u8, body: Bytes) -> Result<Self, CodecError> {
        let mut r = Reader::new(&body);
        let frame = match tag {
            TAG_REFUSED => {
                let reason = Refusal::from_code(r.u8("refusal")?);
                let count = r.bounded("refused objects", limit::KEYS_PER_REQUEST as u64)? as usize;
                if count == 0 {
                    return Err(CodecError::NotCanonical { what: "empty refusal" });
                }
                Frame::Refused { reason, count }
            }
            TAG_SMALL => {
                let zstd = flag(&mut r)?;
                let count = r.count("objects in a batch", limit::KEYS_PER_REQUEST as u64, 1)?;
                if count == 0 {
                    return Err(CodecError::NotCanonical { what: "empty batch" });
                }
                let sizes_bytes = (0..count)
                    .map(|_| r.bounded("object size", limit::SMALL_BYTES as u64).map(|s| s as u32))
                    .collect::<Result<Vec<_>, _>>()?;
                let plain: u64 = sizes_bytes.iter().map(|s| u64::from(*s)).sum();
                let plain_limit = if count == 1 { limit::SMALL_BYTES } else { limit::BATCH_BYTES } as u64;
                if plain > plain_limit {
                    return Err(CodecError::TooLarge { what: "batch", value: plain, limit: plain_limit });
                }
                let payload = body.slice(body.len() - r.remaining_bytes()..);
                // Packed is only sent when it is smaller, so the payload never exceeds the plain bytes.
                if if zstd { payload.len() as u64 >= plain } else { payload.len() as u64 != plain } {
                    return Err(CodecError::NotCanonical { what: "size of a batch" });
                }
                return Ok(Frame::Small { zstd, sizes_bytes, payload });
            }
            TAG_LARGE => {
                let code = r.u8("encoding")?;
                let size_bytes = r.bounded("object size", limit::PACK_BYTES)?;
                let plain_size_bytes = r.bounded("plain size", limit::PACK_BYTES)?;
                let mut range = || {
                    let tag = r.array("tag")?;
                    let offset_bytes = r.bounded("offset in a pack", limit::PACK_BYTES)?;
                    Ok::<_, CodecError>(PackRange { tag, offset_bytes, stored_size_bytes: plain_size_bytes })
                };
                let encoding = match code {
                    0 if plain_size_bytes == size_bytes => Encoding::Plain,
                    1 => Encoding::Zstd { plain_size_bytes },
                    2 => Encoding::StoredPack(range()?),
                    3 => Encoding::PackDelta(range()?),
                    0 => return Err(CodecError::NotCanonical { what: "plain size" }),
                    value => return Err(CodecError::Unknown { what: "encoding", value: value.into() }),
                };
                Frame::Large { encoding, size_bytes }
            }
            TAG_WORKING => Frame::Working,
            value => return Err(CodecError::Unknown { what: "frame tag", value: value.into() }),
        };
        r.end()?;
        Ok(frame)
    }
}

fn flag(r: &mut Reader<'_>) -> Result<bool, CodecError> {
    match r.u8("encoding")? {
        0 => Ok(false),
        1 => Ok(true),
        value => Err(CodecError::Unknown { what: "encoding", value: value.into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(bytes: &[u8]) -> Result<Frame, CodecError> {
        let mut r = Reader::new(bytes);
        let (tag, length) = Frame::header(r.array("header")?)?;
        let body = r.fixed("body", length)?;
        r.end()?;
        Frame::decode(tag, Bytes::copy_from_slice(body))
    }

    fn any_key() -> impl Strategy<Value = ObjectKey> {
        (1u8..=5, any::<[u8; 32]>()).prop_map(|(kind, id)| key_of(kind, id).unwrap())
    }

    fn any_frame() -> impl Strategy<Value = Frame> {
        let refused = (any::<u8>(), 1..=limit::KEYS_PER_REQUEST)
            .prop_map(|(code, count)| Frame::Refused { reason: Refusal::from_code(code), count });
        let small = proptest::collection::vec(0u32..5000, 1..40).prop_map(|sizes_bytes| {
            let payload = vec![7; sizes_bytes.iter().sum::<u32>() as usize].into();
            Frame::Small { zstd: false, sizes_bytes, payload }
        });
        let large =
            (0..limit::PACK_BYTES, 0..limit::PACK_BYTES, 0..4).prop_map(|(size_bytes, plain, code)| {
                let range =
                    PackRange { tag: [code as u8; 16], offset_bytes: plain / 2, stored_size_bytes: plain };
                let encoding = match code {
                    0 => Encoding::Plain,
                    1 => Encoding::Zstd { plain_size_bytes: plain },
                    2 => Encoding::StoredPack(range),
                    _ => Encoding::PackDelta(range),
                };
                Frame::Large { encoding, size_bytes }
            });
        prop_oneof![refused, small, large, Just(Frame::Working)]
    }

    proptest! {
        #[test]
        fn requests_read_back(ticket: [u8; 32], keys in proptest::collection::vec(any_key(), 1..60), bases: [u8; 32]) {
            let packs = keys.iter().filter(|k| k.is_pack()).count();
            let wish = |n: usize| PackWish {
                bases: vec![PackId::from_bytes(bases); n % (limit::BASES + 1)],
                begun: n.is_multiple_of(2).then_some(([n as u8; 16], n as u64 * 1000)),
            };
            let wishes = (0..packs).map(wish).collect();
            let request = Request { ticket: Ticket::from_bytes(ticket), keys, wishes };
            let bytes = request.encode();
            prop_assert!(bytes.len() <= limit::REQUEST_BYTES);
            prop_assert_eq!(Request::decode(&bytes).unwrap(), request);
        }

        #[test]
        fn frames_read_back(frame in any_frame()) {
            prop_assert_eq!(read(&frame.encode()).unwrap(), frame);
        }

        /// Whatever is accepted has one spelling, and nothing panics.
        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), tag in 0u8..5) {
            if let Ok(request) = Request::decode(&bytes) {
                prop_assert_eq!(request.encode(), bytes.clone());
            }
            if let Ok(frame) = read(&bytes) {
                prop_assert_eq!(frame.encode(), bytes.clone());
            }
            if let Ok(frame) = Frame::decode(tag, bytes.clone().into()) {
                prop_assert_eq!(&frame.encode()[HEADER_BYTES..], &bytes[..]);
            }
        }

        #[test]
        fn bent_frames_never_panic(frame in any_frame(), at: prop::sample::Index, to: u8, cut: prop::sample::Index) {
            let mut bytes = frame.encode();
            let at = at.index(bytes.len());
            bytes[at] = to;
            let _ = read(&bytes);
            bytes.truncate(cut.index(bytes.len() + 1));
            let _ = read(&bytes);
        }
    }

    #[test]
    fn lying_lengths_are_refused_before_anything_is_allocated() {
        assert!(matches!(Frame::header([TAG_SMALL, 255, 255, 255, 255]), Err(CodecError::TooLarge { .. })));
        assert!(matches!(Frame::header([TAG_LARGE, 65, 0, 0, 0]), Err(CodecError::TooLarge { .. })));
        assert!(matches!(Frame::header([9, 0, 0, 0, 0]), Err(CodecError::Unknown { .. })));
        // A packed batch that announces more than a batch may unpack to.
        let sizes_bytes = vec![limit::SMALL_BYTES as u32; 2];
        let bomb = Frame::Small { zstd: true, sizes_bytes, payload: Bytes::from_static(&[0; 40]) };
        assert!(matches!(read(&bomb.encode()), Err(CodecError::TooLarge { .. })));
        // A request for no object, and one for too many.
        let mut request = Request { ticket: Ticket::from_bytes([1; 32]), keys: vec![], wishes: vec![] };
        assert!(Request::decode(&request.encode()).is_err());
        request.keys = vec![ObjectKey::Block(BlockHash::of(b"x")); limit::KEYS_PER_REQUEST + 1];
        assert!(Request::decode(&request.encode()).is_err());
    }

    #[test]
    fn the_largest_batch_fits_its_frame_limit() {
        let sizes_bytes = vec![limit::SMALL_BYTES as u32];
        let frame = Frame::Small { zstd: false, sizes_bytes, payload: vec![1; limit::SMALL_BYTES].into() };
        assert_eq!(read(&frame.encode()).unwrap(), frame);
    }
}
