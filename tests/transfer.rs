//! Two endpoints on loopback: what is fetched is complete and verified, what must be refused is
//! refused with its reason, and an interrupted fetch goes on where it was.

#[path = "transfer/world.rs"]
mod world;

use std::sync::Arc;
use std::time::{Duration, Instant};

use cicada::transfer::{
    FetchError, Limiter, ObjectKey, Progress, Refusal, Settings, TransferError, Violation,
};
use cicada::types::BlockHash;
use tokio::runtime::Runtime;
use tokio::time::sleep;
use world::{Broker, Members, Sink, Store, data, identity};

fn cause(result: Result<impl std::fmt::Debug, FetchError>) -> TransferError {
    result.unwrap_err().source
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_nodes_manifests_and_a_large_pack_arrive_verified() {
    let store = Store::new();
    let mut keys = Vec::new();
    for i in 0..5_000 {
        keys.push(store.add_block(data::block_like_a_file_systems(i, 4096)));
    }
    for i in 0..100 {
        keys.push(store.add_node(data::noise(i, 8000)));
    }
    keys.push(store.add_manifest(data::block_like_a_file_systems(1, 3 << 20)));
    keys.push(store.add_recipe(data::noise(7, 700)));
    keys.push(store.add_pack(data::noise(99, 100 << 20)));
    keys.push(store.add_pack(Vec::new()));
    let plain_bytes = store.total_bytes();
    let (source, target) = Broker::pair(store.clone()).await;

    let connection = target.connect(&source).await.unwrap();
    let (sink, progress) = (Sink::new(), Arc::new(Progress::default()));
    let started = Instant::now();
    let report =
        connection.fetch(&world::TICKET, keys.clone(), sink.clone(), progress.clone()).await.unwrap();
    let took = started.elapsed();

    assert_eq!(report.delivered, keys.len() as u64);
    assert!(report.refused.is_empty() && report.missing.is_empty());
    sink.assert_holds_all_of(&store);
    let done = progress.snapshot();
    assert_eq!((done.objects, done.payload_bytes), (keys.len() as u64, plain_bytes));
    let stats = connection.stats();
    println!(
        "loopback, debug build: {:.1} MB in {:.2} s = {:.0} MB/s, {} datagrams of up to {} bytes, {} lost",
        plain_bytes as f64 / 1e6,
        took.as_secs_f64(),
        plain_bytes as f64 / 1e6 / took.as_secs_f64(),
        stats.received_datagrams,
        stats.mtu_bytes,
        stats.lost_packets
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_small_blocks_cost_little_more_than_their_bytes() {
    let store = Store::new();
    let keys: Vec<_> = (0..5_000).map(|i| store.add_block(data::noise(i, 4096))).collect();
    let (source, target) = Broker::pair(store.clone()).await;
    let connection = target.connect(&source).await.unwrap();
    let before = connection.stats();
    let progress = Arc::new(Progress::default());
    let started = Instant::now();
    connection.fetch(&world::TICKET, keys, Sink::new(), progress.clone()).await.unwrap();
    let took = started.elapsed();
    let after = connection.stats();
    let payload = progress.snapshot().payload_bytes as f64;
    let down = (after.received_bytes - before.received_bytes) as f64 / payload;
    let up = (after.sent_bytes - before.sent_bytes) as f64 / payload;
    println!(
        "5,000 incompressible 4 KiB blocks: {:.0} MB/s; UDP bytes per payload byte: {down:.4} down, {up:.4} up",
        payload / 1e6 / took.as_secs_f64()
    );
    assert!(down < 1.05, "{down}");
    assert!(up < 0.04, "{up}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_side_of_a_connection_may_fetch() {
    let store = Store::new();
    let key = store.add_block(data::noise(1, 4096));
    let (source, target) = Broker::pair(store.clone()).await;
    target.connect(&source).await.unwrap();
    let back = loop {
        if let Some(connection) = source.endpoint.connection_with(&target.identity.public()) {
            break connection;
        }
        sleep(Duration::from_millis(5)).await;
    };
    target.store.copy_from(&store);
    let sink = Sink::new();
    let report = back.fetch(&world::TICKET, vec![key], sink.clone(), Arc::default()).await.unwrap();
    assert_eq!(report.delivered, 1);
    sink.assert_holds_all_of(&store);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_held_is_refused_and_the_rest_arrives() {
    let store = Store::new();
    let held: Vec<_> = (0..50).map(|i| store.add_block(data::noise(i, 4096))).collect();
    let mut keys = held.clone();
    let strangers: Vec<_> = (0..3).map(|i: u8| ObjectKey::Block(BlockHash::of(&[i]))).collect();
    keys.insert(0, strangers[0]);
    keys.insert(20, strangers[1]);
    keys.push(strangers[2]);
    let (source, target) = Broker::pair(store.clone()).await;
    let connection = target.connect(&source).await.unwrap();
    let sink = Sink::new();
    let report = connection.fetch(&world::TICKET, keys, sink.clone(), Arc::default()).await.unwrap();
    let mut refused = report.refused;
    refused.sort_by_key(|(key, _)| strangers.iter().position(|s| s == key));
    assert_eq!(refused, strangers.iter().map(|k| (*k, Refusal::NotHeld)).collect::<Vec<_>>());
    sink.assert_holds_all_of(&store);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_ticket_gets_nothing() {
    let store = Store::new();
    let keys: Vec<_> = (0..100).map(|i| store.add_block(data::noise(i, 4096))).collect();
    let (source, target) = Broker::pair(store).await;
    let connection = target.connect(&source).await.unwrap();
    let sink = Sink::new();
    let forged = cicada::transfer::Ticket::from_bytes([9; 32]);
    let report = connection.fetch(&forged, keys.clone(), sink.clone(), Arc::default()).await.unwrap();
    assert_eq!(report.delivered, 0);
    assert_eq!(report.refused.len(), keys.len());
    assert!(report.refused.iter().all(|(_, reason)| *reason == Refusal::UnknownTicket));
    assert!(sink.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tampered_content_is_refused_and_the_peer_cut_off() {
    for tampered_pack in [false, true] {
        let store = Store::new();
        let mut keys: Vec<_> = (0..10).map(|i| store.add_block(data::noise(i, 4096))).collect();
        keys.push(store.add_pack(data::noise(50, 600_000)));
        let bad = keys[if tampered_pack { 10 } else { 5 }];
        store.tamper(&bad);
        let (source, target) = Broker::pair(store).await;
        let connection = target.connect(&source).await.unwrap();
        let sink = Sink::new();
        let failure = cause(connection.fetch(&world::TICKET, keys, sink.clone(), Arc::default()).await);
        match failure {
            TransferError::Misbehaved { source: Violation::Hash { key, .. }, .. } if !tampered_pack => {
                assert_eq!(key, bad);
            }
            TransferError::Misbehaved { source: Violation::Pack { key, .. }, .. } if tampered_pack => {
                assert_eq!(key, bad);
            }
            other => panic!("{other:?}"),
        }
        assert!(!sink.holds(&bad));
        assert!(!connection.is_open());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_and_wrong_keys_are_refused_with_the_reason() {
    let (source, target) = Broker::pair(Store::new()).await;
    let address = source.address();

    // Another broker answers at the address.
    let expected = identity(77).public();
    match target.endpoint.connect(&[address], expected).await.unwrap_err() {
        TransferError::WrongKey { expected: e, found, .. } => {
            assert_eq!((e, found), (expected, source.identity.public()));
        }
        other => panic!("{other:?}"),
    }

    // A key that belongs to no member.
    let stranger = Broker::start(identity(66), Members::of(&[&source]), Store::new(), Limiter::unlimited());
    match stranger.connect(&source).await.unwrap_err() {
        TransferError::Refused { reason: Refusal::NotMember, .. } => {}
        other => panic!("{other:?}"),
    }
    assert!(source.endpoint.connection_with(&stranger.identity.public()).is_none());

    // Nobody answers; nothing to ask.
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let error = target.endpoint.connect(&[silent.local_addr().unwrap()], expected).await.unwrap_err();
    assert!(matches!(error, TransferError::Unreachable { .. }), "{error:?}");
    let error = target.endpoint.connect(&[], expected).await.unwrap_err();
    assert!(matches!(error, TransferError::NoAddress { .. }), "{error:?}");

    // A silent address does not keep a good one from being found.
    let addresses = [silent.local_addr().unwrap(), address];
    target.endpoint.connect(&addresses, source.identity.public()).await.unwrap();

    // The port is taken.
    let error = cicada::transfer::Endpoint::bind(
        address,
        &identity(1),
        Arc::new(Members::of(&[])),
        Store::new(),
        Limiter::unlimited(),
    )
    .unwrap_err();
    assert!(matches!(error, TransferError::Bind { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_refusal_is_one_log_line_with_peer_address_and_reason() {
    let log = world::log();
    let store = Store::new();
    let keys: Vec<_> = (0..300).map(|i| store.add_block(data::noise(i, 4096))).collect();
    let both = [identity(31).public(), identity(32).public()];
    let source = Broker::start(identity(31), Members::new(&both), store, Limiter::unlimited());
    let target = Broker::start(identity(32), Members::new(&both), Store::new(), Limiter::unlimited());
    let stranger = Broker::start(identity(33), Members::new(&[]), Store::new(), Limiter::unlimited());

    stranger.connect(&source).await.unwrap_err();
    target.endpoint.connect(&[source.address()], identity(34).public()).await.unwrap_err();
    let connection = target.connect(&source).await.unwrap();
    let forged = cicada::transfer::Ticket::from_bytes([9; 32]);
    connection.fetch(&forged, keys, Sink::new(), Arc::default()).await.unwrap();
    sleep(Duration::from_millis(50)).await;

    let lines = log.lines();
    for (broker, reason) in [
        (&stranger, Refusal::NotMember.to_string()),
        (&target, Refusal::UnknownTicket.to_string()),
        (&target, "refused our identity key".to_owned()),
    ] {
        let address = broker.address().to_string();
        let found: Vec<_> = lines
            .iter()
            .filter(|l| l.contains(&reason) && l.contains(&address) && !l.contains("could not connect"))
            .collect();
        assert_eq!(found.len(), 1, "{reason}: {found:#?}");
        assert!(found[0].contains("WARN"));
    }
    let seen_by_dialler = format!("holds the key {:?}, not the expected", identity(31).public());
    assert_eq!(lines.iter().filter(|l| l.contains(&seen_by_dialler)).count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_expelled_gets_nothing_more() {
    let store = Store::new();
    let key = store.add_block(data::noise(1, 4096));
    let (source, target) = Broker::pair(store).await;
    let connection = target.connect(&source).await.unwrap();
    source.members.expel(&target.identity.public());
    let report = connection.fetch(&world::TICKET, vec![key], Sink::new(), Arc::default()).await.unwrap();
    assert_eq!(report.refused, vec![(key, Refusal::NotMember)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_source_is_cut_off() {
    let store = Store::new();
    let keys: Vec<_> = (0..64).map(|i| store.add_block(data::noise(i, 4096))).collect();
    store.hang_at(&keys[40], Duration::from_secs(4));
    let (source, target) = Broker::pair(store).await;
    let connection = target.connect(&source).await.unwrap();
    let started = Instant::now();
    let failure = connection.fetch(&world::TICKET, keys, Sink::new(), Arc::default()).await.unwrap_err();
    assert!(matches!(failure.source, TransferError::Stalled { .. }), "{failure:?}");
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    assert!(!failure.report.missing.is_empty());
    drop(source);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_sink_is_not_a_stalled_source() {
    let store = Store::new();
    let key = store.add_pack(data::noise(1, 1 << 20));
    let (source, target) = Broker::pair(store.clone()).await;
    let connection = target.connect(&source).await.unwrap();
    let sink = Sink::slow(world::settings().stall_timeout * 3);
    connection.fetch(&world::TICKET, vec![key], sink.clone(), Arc::default()).await.unwrap();
    sink.assert_holds_all_of(&store);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_cannot_store_says_so_and_the_connection_lives() {
    let store = Store::new();
    let key = store.add_pack(data::noise(1, 3 << 20));
    let (source, target) = Broker::pair(store.clone()).await;
    let connection = target.connect(&source).await.unwrap();
    let failure =
        connection.fetch(&world::TICKET, vec![key], Sink::full(), Arc::default()).await.unwrap_err();
    assert!(matches!(failure.source, TransferError::Sink { .. }), "{failure:?}");
    assert_eq!(failure.report.missing, vec![key]);
    let sink = Sink::new();
    connection.fetch(&world::TICKET, vec![key], sink.clone(), Arc::default()).await.unwrap();
    sink.assert_holds_all_of(&store);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_fetch_stops_its_streams() {
    let store = Store::new();
    let keys: Vec<_> = (0..4).map(|i| store.add_pack(data::noise(i, 20 << 20))).collect();
    let limiter = Limiter::new(Some(4_000_000));
    let (source, target) = Broker::pair_with(store, limiter).await;
    let connection = target.connect(&source).await.unwrap();
    let progress = Arc::new(Progress::default());
    let fetch = connection.fetch(&world::TICKET, keys, Sink::new(), progress.clone());
    let cancelled = tokio::time::timeout(Duration::from_millis(700), fetch).await;
    assert!(cancelled.is_err());
    sleep(Duration::from_millis(300)).await;
    let before = connection.stats().received_bytes;
    sleep(Duration::from_millis(500)).await;
    let after = connection.stats().received_bytes;
    assert!(after - before < 20_000, "{} bytes came after the fetch was dropped", after - before);
    assert!(connection.is_open());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cap_holds_and_changes_under_way() {
    let store = Store::new();
    let mut keys: Vec<_> = (0..4).map(|i| store.add_pack(data::noise(i, 10 << 20))).collect();
    keys.extend((100..2100).map(|i| store.add_block(data::noise(i, 4096))));
    let limiter = Limiter::new(Some(20_000_000 / 8));
    let (source, target) = Broker::pair_with(store, limiter.clone()).await;
    let connection = target.connect(&source).await.unwrap();
    let fetching = connection.clone();
    let fetch =
        tokio::spawn(async move { fetching.fetch(&world::TICKET, keys, Sink::new(), Arc::default()).await });
    sleep(Duration::from_millis(300)).await;
    for (mbit, seconds) in [(20, 3.0), (60, 2.0)] {
        limiter.set_rate(Some(mbit * 1_000_000 / 8));
        sleep(Duration::from_millis(200)).await;
        let (from, at) = (connection.stats().received_bytes, Instant::now());
        sleep(Duration::from_secs_f64(seconds)).await;
        let moved = connection.stats().received_bytes - from;
        let measured = moved as f64 * 8e-6 / at.elapsed().as_secs_f64();
        println!("cap of {mbit} Mbit/s: {measured:.2} Mbit/s of UDP payload arrived");
        assert!((measured / mbit as f64 - 1.0).abs() < 0.05, "cap {mbit}, measured {measured}");
    }
    fetch.abort();
}

/// The cap of one migration: the answers to its ticket draw from it, nothing else does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_s_cap_holds_and_is_lifted_under_way() {
    let store = Store::new();
    let mut keys: Vec<_> = (0..12).map(|i| store.add_pack(data::noise(i, 12 << 20))).collect();
    keys.extend((100..3100).map(|i| store.add_block(data::noise(i, 4096))));
    let (source, target) = Broker::pair(store).await;
    let limiter = source.members.1.clone();
    limiter.set_rate(Some(40_000_000 / 8));
    let connection = target.connect(&source).await.unwrap();
    let fetching = connection.clone();
    let fetch =
        tokio::spawn(async move { fetching.fetch(&world::TICKET, keys, Sink::new(), Arc::default()).await });
    for mbit in [40, 16] {
        limiter.set_rate(Some(mbit * 1_000_000 / 8));
        sleep(Duration::from_millis(700)).await;
        // On a busy machine less may come for a while, but never more.
        let mut windows = Vec::new();
        while windows.len() < 5 && !windows.last().is_some_and(|part| *part > 0.92) {
            let (from, at) = (connection.stats().received_bytes, Instant::now());
            sleep(Duration::from_secs(2)).await;
            let moved = connection.stats().received_bytes - from;
            let measured = moved as f64 * 8e-6 / at.elapsed().as_secs_f64();
            println!("ticket capped at {mbit} Mbit/s: {measured:.2} Mbit/s of UDP payload arrived");
            windows.push(measured / mbit as f64);
        }
        assert!(windows.iter().all(|part| *part < 1.08), "cap {mbit}, measured {windows:?}");
        assert!(windows.iter().any(|part| *part > 0.92), "cap {mbit}, measured {windows:?}");
    }
    limiter.set_rate(None);
    fetch.await.unwrap().unwrap();
}

/// The source dies without a word; what arrived is not fetched again.
#[test]
fn a_killed_source_interrupts_and_resuming_fetches_only_the_rest() {
    let store = Store::new();
    let mut keys: Vec<_> = (0..3_000).map(|i| store.add_block(data::noise(i, 4096))).collect();
    keys.extend((0..40).map(|i| store.add_pack(data::noise(10_000 + i, 300_000))));
    let total = store.total_bytes();

    let target_runtime = Runtime::new().unwrap();
    let source_runtime = Runtime::new().unwrap();
    let (source_identity, target_identity) = (identity(1), identity(2));
    let both = [source_identity.public(), target_identity.public()];
    let source = source_runtime.block_on(async {
        let limiter = Limiter::new(Some(10_000_000));
        Broker::start(source_identity.clone(), Members::new(&both), store.clone(), limiter)
    });
    let target = target_runtime.block_on(async {
        Broker::start(target_identity, Members::new(&both), Store::new(), Limiter::unlimited())
    });
    let (sink, progress) = (Sink::new(), Arc::new(Progress::default()));
    let connection = target_runtime.block_on(target.connect(&source)).unwrap();
    let first = connection.clone();
    let fetch = {
        let (sink, progress, keys) = (sink.clone(), progress.clone(), keys.clone());
        target_runtime.spawn(async move { connection.fetch(&world::TICKET, keys, sink, progress).await })
    };
    while progress.snapshot().payload_bytes < total / 2 {
        std::thread::sleep(Duration::from_millis(5));
    }
    // No task of it runs again, so not even a farewell is sent.
    source_runtime.shutdown_background();

    let failure = target_runtime.block_on(fetch).unwrap().unwrap_err();
    assert!(matches!(failure.source, TransferError::Interrupted { .. }), "{failure:?}");
    let report = failure.report;
    assert_eq!(report.delivered as usize + report.missing.len(), keys.len());
    assert!(report.missing.iter().all(|key| !sink.holds(key)));
    assert!(report.delivered > 1000);

    let again = target_runtime.block_on(async {
        Broker::start(source_identity, Members::new(&both), store.clone(), Limiter::unlimited())
    });
    let second = target_runtime.block_on(target.connect(&again)).unwrap();
    let resumed = second.fetch(&world::TICKET, report.missing, sink.clone(), progress.clone());
    target_runtime.block_on(resumed).unwrap();
    sink.assert_holds_all_of(&store);
    assert_eq!(progress.snapshot().objects, keys.len() as u64, "nothing was delivered twice");
    let received = first.stats().received_bytes + second.stats().received_bytes;
    let overhead = received as f64 / total as f64 - 1.0;
    println!(
        "resumed after a kill at 50 %: both connections together carried {:.1} % more than the objects",
        overhead * 100.0
    );
    // QUIC's own overhead is 2.4 %.
    assert!(overhead < 0.06, "{overhead}");
    drop((source, target, target_runtime));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_many_requests_at_once_are_refused() {
    let store = Store::new();
    let keys: Vec<_> = (0..2_000).map(|i| store.add_block(data::noise(i, 4096))).collect();
    let settings = Settings { requests_max: 0, ..world::settings() };
    let (source, target) = Broker::pair_as(store, Limiter::unlimited(), settings).await;
    let connection = target.connect(&source).await.unwrap();
    let report = connection.fetch(&world::TICKET, keys.clone(), Sink::new(), Arc::default()).await.unwrap();
    assert!(report.refused.len() == keys.len());
    assert!(report.refused.iter().all(|(_, reason)| *reason == Refusal::TooMany));
}
