//! A broker against a peer that holds a member's key but keeps to no rule: raw QUIC streams with
//! whatever bytes. It must be cut off with its reason, and nothing may panic or hang.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use quinn::VarInt;

use super::error::{TransferError, Violation, close};
use super::frame::{Frame, Request, limit};
use super::object::*;
use super::tls::Identity;
use super::{Endpoint, FetchError, Limiter, Progress, Refusal, Settings};
use crate::types::{BlockHash, Hash, IdentityKey, NodeHash, PackId, PublicKey};

const TICKET: Ticket = Ticket::from_bytes([1; 32]);
const ANY: &str = "127.0.0.1:0";

fn honest() -> IdentityKey {
    IdentityKey::from_secret_bytes(&[1; 32])
}
fn hostile() -> IdentityKey {
    IdentityKey::from_secret_bytes(&[2; 32])
}

/// Lets everyone have everything, which is packs of zeros.
struct Open;

impl Authority for Open {
    fn admit(&self, _: &PublicKey) -> Result<(), Refusal> {
        Ok(())
    }
    fn check(&self, _: &PublicKey, _: &Ticket, _: &ObjectKey) -> Result<(), Refusal> {
        Ok(())
    }
}

impl ObjectSource for Open {
    fn open(&self, _: &Ticket, key: &ObjectKey) -> Result<ObjectBody, Refusal> {
        match key {
            // Bodies that break the rules of the seam are our fault, not the peer's.
            ObjectKey::Node(_) => Ok(ObjectBody::plain(vec![0; 1 << 20])),
            ObjectKey::Block(_) => Ok(ObjectBody {
                encoding: Encoding::Zstd { plain_size_bytes: 4096 },
                content: Content::Bytes(Bytes::from_static(b"not zstd")),
            }),
            _ => Err(Refusal::NotHeld),
        }
    }
    fn open_pack(&self, _: &Ticket, _: &PackId, _: &PackWish) -> Result<ObjectBody, Refusal> {
        Ok(ObjectBody {
            encoding: Encoding::StoredPack(RANGE),
            content: Content::Bytes(vec![0; 64 << 20].into()),
        })
    }
}

const RANGE: PackRange = PackRange { tag: [0; 16], offset_bytes: 0, stored_size_bytes: 100 };

/// Takes everything, and counts.
#[derive(Default)]
struct Bin(Mutex<usize>);

impl ObjectSink for Bin {
    fn deliver(&self, objects: Vec<Verified>) -> Result<(), SinkError> {
        *self.0.lock().unwrap() += objects.len();
        Ok(())
    }
    fn pack(&self, _: &PackId, _: bool, _: &PackRange, _: u64) -> Result<Box<dyn PackWriter>, SinkError> {
        struct Nowhere;
        impl PackWriter for Nowhere {
            fn write(&mut self, _: &[u8]) -> Result<(), SinkError> {
                Ok(())
            }
            fn finish(self: Box<Self>) -> Result<(), SinkError> {
                Ok(())
            }
        }
        Ok(Box::new(Nowhere))
    }
}

fn broker() -> Endpoint {
    let settings = Settings {
        connect_timeout: Duration::from_secs(2),
        idle_timeout: Duration::from_secs(2),
        stall_timeout: Duration::from_millis(700),
        ..Settings::default()
    };
    let any = ANY.parse().unwrap();
    Endpoint::bind_with(any, &honest(), Arc::new(Open), Arc::new(Open), Limiter::unlimited(), settings)
        .unwrap()
}

/// Dials a broker as a raw peer.
async fn dial(
    address: SocketAddr,
    identity: Identity,
) -> (quinn::Endpoint, Result<quinn::Connection, quinn::ConnectionError>) {
    let endpoint = quinn::Endpoint::client(ANY.parse().unwrap()).unwrap();
    let crypto = identity.client(honest().public()).unwrap().0;
    let connecting = endpoint.connect_with(quinn::ClientConfig::new(Arc::new(crypto)), address, "x").unwrap();
    let connection = connecting.await;
    (endpoint, connection)
}

/// A raw peer that answers every request with `answer`, and then ends the stream.
async fn answering(answer: Vec<u8>) -> quinn::Endpoint {
    let crypto = Identity::new(&hostile()).unwrap().server().unwrap();
    let config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    let endpoint = quinn::Endpoint::server(config, ANY.parse().unwrap()).unwrap();
    let accepting = endpoint.clone();
    tokio::spawn(async move {
        let connection = accepting.accept().await.unwrap().await.unwrap();
        let mut welcome = connection.open_uni().await.unwrap();
        welcome.write_all(b"\x01").await.unwrap();
        welcome.finish().unwrap();
        while let Ok((mut send, _recv)) = connection.accept_bi().await {
            let _ = send.write_all(&answer).await;
            let _ = send.finish();
            let _ = send.stopped().await;
        }
    });
    endpoint
}

async fn fetch_from(answer: Vec<u8>, keys: Vec<ObjectKey>) -> Result<super::FetchReport, FetchError> {
    let (peer, broker) = (answering(answer).await, broker());
    let connection = broker.connect(&[peer.local_addr().unwrap()], hostile().public()).await.unwrap();
    let fetch = connection.fetch(&TICKET, keys, Arc::new(Bin::default()), Arc::new(Progress::default()));
    tokio::time::timeout(Duration::from_secs(5), fetch).await.expect("the fetch hangs")
}

fn noise(seed: u32, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

fn small(objects: &[&[u8]]) -> Frame {
    let sizes_bytes = objects.iter().map(|o| o.len() as u32).collect();
    Frame::Small { zstd: false, sizes_bytes, payload: objects.concat().into() }
}

#[tokio::test]
async fn every_kind_of_bad_answer_is_cut_off() {
    let block = |b: &[u8]| ObjectKey::Block(BlockHash::of(b));
    let (one, two): (&[u8], &[u8]) = (b"one", b"two");
    let pack = ObjectKey::Pack(PackId::of(b"pack"));
    let large = |encoding, size_bytes| Frame::Large { encoding, size_bytes }.encode();
    let refused = |count| Frame::Refused { reason: Refusal::NotHeld, count }.encode();
    let bomb = zstd::bulk::compress(&vec![0; 32 << 20], 3).unwrap();
    let bomb = Frame::Small { zstd: true, sizes_bytes: vec![200_000], payload: bomb.into() };

    type Expect = fn(&Violation) -> bool;
    let cases: Vec<(&str, Vec<u8>, Vec<ObjectKey>, Expect)> = vec![
        ("silence", vec![], vec![block(one)], |v| matches!(v, Violation::Short { missing: 1 })),
        ("half an answer", small(&[one]).encode(), vec![block(one), block(two)], |v| {
            matches!(v, Violation::Short { missing: 1 })
        }),
        ("half a frame", small(&[one]).encode()[..6].to_vec(), vec![block(one)], |v| {
            matches!(v, Violation::Short { .. })
        }),
        ("more than asked", small(&[one, two]).encode(), vec![block(one)], |v| matches!(v, Violation::Long)),
        ("more after the end", [small(&[one]).encode(), vec![0]].concat(), vec![block(one)], |v| {
            matches!(v, Violation::Long)
        }),
        ("too many refusals", refused(2), vec![block(one)], |v| matches!(v, Violation::Long)),
        ("another object", small(&[two]).encode(), vec![block(one)], |v| matches!(v, Violation::Hash { .. })),
        ("a giant node", small(&[&[0; 10_000]]).encode(), vec![ObjectKey::Node(NodeHash::of(one))], |v| {
            matches!(v, Violation::TooLarge { .. })
        }),
        ("a bomb", bomb.encode(), vec![block(one)], |v| matches!(v, Violation::Unpack { .. })),
        ("a pack in a batch", small(&[b"pack"]).encode(), vec![pack], |v| {
            matches!(v, Violation::Form { .. })
        }),
        ("a pack that is no stored pack", large(Encoding::Plain, 4), vec![pack], |v| {
            matches!(v, Violation::Form { .. })
        }),
        ("a block as a large object", large(Encoding::Plain, 4), vec![block(one)], |v| {
            matches!(v, Violation::Form { .. })
        }),
        (
            "a manifest of a terabyte",
            large(Encoding::Zstd { plain_size_bytes: 1 << 40 }, 100),
            vec![ObjectKey::Manifest(crate::types::ComponentId(Hash::of(one)))],
            |v| matches!(v, Violation::TooLarge { .. }),
        ),
        (
            "a pack that ends early",
            [large(Encoding::StoredPack(RANGE), 100), vec![0; 99]].concat(),
            vec![pack],
            |v| matches!(v, Violation::Short { .. }),
        ),
        ("an unknown frame", vec![9, 0, 0, 0, 0], vec![block(one)], |v| matches!(v, Violation::Malformed(_))),
        ("a frame of 4 GiB", vec![2, 255, 255, 255, 255], vec![block(one)], |v| {
            matches!(v, Violation::Malformed(_))
        }),
    ];
    for (what, answer, keys, expected) in cases {
        match fetch_from(answer, keys).await {
            Err(FetchError { source: TransferError::Misbehaved { source, .. }, .. }) => {
                assert!(expected(&source), "{what}: {source:?}");
            }
            other => panic!("{what}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn random_answers_never_panic() {
    for seed in 0..40 {
        // The first byte leads half of them past the tag.
        let mut answer = noise(seed, 20 + 37 * seed as usize);
        if seed % 2 == 0 {
            answer[..5].copy_from_slice(&[1 + (seed % 3) as u8, 12, 0, 0, 0]);
        }
        let keys = (0u32..200).map(|i| ObjectKey::Block(BlockHash::of(&i.to_le_bytes()))).collect();
        let result = fetch_from(answer, keys).await;
        assert!(
            matches!(result, Err(FetchError { source: TransferError::Misbehaved { .. }, .. })),
            "seed {seed}: {result:?}"
        );
    }
}

#[tokio::test]
async fn random_requests_are_cut_off_and_others_still_served() {
    let broker = broker();
    let address = broker.local_addr().unwrap();
    for seed in 0..40 {
        let (_endpoint, connection) = dial(address, Identity::new(&hostile()).unwrap()).await;
        let connection = connection.unwrap();
        let (mut send, _recv) = connection.open_bi().await.unwrap();
        let request = match seed {
            0 => vec![],
            1 => vec![1; limit::REQUEST_BYTES + 1],
            seed => noise(seed, 1 + 97 * seed as usize),
        };
        let _ = send.write_all(&request).await;
        let _ = send.finish();
        match connection.closed().await {
            quinn::ConnectionError::ApplicationClosed(c) => assert_eq!(c.error_code, close::MISBEHAVED),
            other => panic!("seed {seed}: {other:?}"),
        }
    }
    // Objects the store cannot serve are refused; the peer is not to blame.
    let (_endpoint, connection) = dial(address, Identity::new(&hostile()).unwrap()).await;
    let (mut send, mut recv) = connection.as_ref().unwrap().open_bi().await.unwrap();
    let keys = vec![ObjectKey::Node(NodeHash::of(b"n")), ObjectKey::Block(BlockHash::of(b"b"))];
    send.write_all(&Request { ticket: TICKET, keys, wishes: vec![] }.encode()).await.unwrap();
    send.finish().unwrap();
    let answer = recv.read_to_end(1000).await.unwrap();
    assert_eq!(answer, Frame::Refused { reason: Refusal::Failed, count: 2 }.encode());
}

#[tokio::test]
async fn a_peer_that_takes_nothing_loses_its_request() {
    let broker = broker();
    let (_endpoint, connection) =
        dial(broker.local_addr().unwrap(), Identity::new(&hostile()).unwrap()).await;
    let connection = connection.unwrap();
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    let request = Request { ticket: TICKET, keys: vec![ObjectKey::Pack(PackId::of(b"p"))], wishes: vec![] };
    send.write_all(&request.encode()).await.unwrap();
    send.finish().unwrap();
    let reset = tokio::time::timeout(Duration::from_secs(4), recv.received_reset()).await;
    assert_eq!(reset.expect("the request is still served").unwrap(), Some(close::STALLED));

    // Nor does one that never finishes asking.
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&request.encode()[..10]).await.unwrap();
    let reset = tokio::time::timeout(Duration::from_secs(4), recv.received_reset()).await;
    assert_eq!(reset.expect("the request is still read").unwrap(), Some(close::STALLED));
}

#[tokio::test]
async fn another_protocol_or_no_key_is_refused_at_both_ends() {
    let broker = broker();
    let address = broker.local_addr().unwrap();

    // As dialler.
    let mut identity = Identity::new(&hostile()).unwrap();
    identity.protocol = b"cicada-transfer/999";
    let no_protocol = quinn::TransportErrorCode::crypto(super::tls::alert::NO_APPLICATION_PROTOCOL);
    match dial(address, identity).await.1 {
        Err(quinn::ConnectionError::ConnectionClosed(c)) => assert_eq!(c.error_code, no_protocol),
        other => panic!("{other:?}"),
    }

    // As dialled.
    let mut identity = Identity::new(&hostile()).unwrap();
    identity.protocol = b"cicada-transfer/999";
    let config = quinn::ServerConfig::with_crypto(Arc::new(identity.server().unwrap()));
    let other = quinn::Endpoint::server(config, ANY.parse().unwrap()).unwrap();
    let other_address = other.local_addr().unwrap();
    tokio::spawn(async move {
        while let Some(incoming) = other.accept().await {
            let _ = incoming.await;
        }
    });
    let error = broker.connect(&[other_address], hostile().public()).await.unwrap_err();
    assert!(matches!(error, TransferError::WrongProtocol { .. }), "{error:?}");

    // A dialler that shows no key, or speaks ordinary TLS with certificates.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = vec![super::ALPN.to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(config).unwrap();
    let endpoint = quinn::Endpoint::client(ANY.parse().unwrap()).unwrap();
    let connecting = endpoint.connect_with(quinn::ClientConfig::new(Arc::new(crypto)), address, "x").unwrap();
    assert!(connecting.await.is_err());

    // One that stops in the middle of the welcome.
    let crypto = Identity::new(&hostile()).unwrap().server().unwrap();
    let config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    let mute = quinn::Endpoint::server(config, ANY.parse().unwrap()).unwrap();
    let mute_address = mute.local_addr().unwrap();
    tokio::spawn(async move {
        let connection = mute.accept().await.unwrap().await.unwrap();
        let mut welcome = connection.open_uni().await.unwrap();
        let _ = welcome.reset(VarInt::from_u32(7));
        connection.closed().await;
    });
    let error = broker.connect(&[mute_address], hostile().public()).await.unwrap_err();
    assert!(matches!(error, TransferError::WrongProtocol { .. }), "{error:?}");
}
