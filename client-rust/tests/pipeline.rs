//! The pipeline: what callers see when it breaks, drains, stutters or is not there, and that nothing of it is left.

#![allow(clippy::unwrap_used, clippy::panic, clippy::duplicate_mod)]

#[path = "support/fake_store.rs"]
mod fake_store;
mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use d_engine_client::{CancellationToken, Client, Consistency, Error, ErrorKind, KeyRange, NodeId, Op, Outcome, Txn};
use d_engine_proto::{ErrorCode, limits, v1};
use futures_util::future::join_all;
use support::pipeline::Manner;
use support::{Behaviour, FakeNode, PATIENCE, builder, client, cluster, elect, eventually, introduce, refusal};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

fn kinds(error: &Error) -> (ErrorKind, Outcome) {
    (error.kind(), error.outcome())
}

#[tokio::test]
async fn calls_at_once_travel_in_few_messages() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    client.get("k").await.unwrap();
    let before = nodes[0].script.lock().messages;
    let answers = join_all((0..1000).map(|_| client.get("k").into_future())).await;
    assert!(answers.iter().all(Result::is_ok));
    let script = nodes[0].script.lock();
    assert!(script.operations >= 1000);
    assert!(script.messages - before < 100, "{} messages for 1000 operations", script.messages - before);
}

#[tokio::test]
async fn every_operation_can_go_by_the_pipeline() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    client.put("k", "v").await.unwrap();
    client.range(KeyRange::all()).all().await.unwrap();
    assert_eq!(client.get_many(["k", "l"]).await.unwrap().kvs.len(), 1);
    client.delete_range(KeyRange::all()).await.unwrap();
    let lease = client.grant_lease(Duration::from_secs(9)).await.unwrap().lease;
    client.renew_lease(lease).await.unwrap();
    client.lease_time_to_live(lease).await.unwrap();
    client.revoke_lease(lease).await.unwrap();
    client.members().await.unwrap();
    assert!(nodes[0].script.lock().operations >= 10);
    let error = client.txn(Txn::new().then(Op::put("k", "v"))).await.unwrap_err();
    assert_eq!(kinds(&error), (ErrorKind::Unsupported, Outcome::NotApplied), "of one operation only");
    client.get("k").await.unwrap();
}

#[tokio::test]
async fn a_node_without_a_pipeline_gets_unary_calls() {
    let nodes = cluster(1);
    nodes[0].script.lock().manner = Manner::Missing;
    let client = client(&[&nodes[0]], PATIENCE);
    let answers = join_all((0..20).map(|_| client.put("k", "v").into_future())).await;
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    assert_eq!((nodes[0].store().lock().version("k"), nodes[0].puts()), (20, 20));
    let stats = client.stats();
    assert_eq!((nodes[0].script.lock().operations, stats.retries, stats.failures), (0, 0, 0));
}

#[tokio::test]
async fn a_client_told_to_uses_unary_calls() {
    let nodes = cluster(1);
    let client = builder(&[&nodes[0]], PATIENCE).pipelined(false).build().unwrap();
    client.put("k", "v").await.unwrap();
    let script = nodes[0].script.lock();
    assert_eq!((script.operations, script.puts), (0, 1));
}

#[tokio::test]
async fn a_refused_stream_is_a_refusal_of_its_operations() {
    let nodes = cluster(1);
    nodes[0].script.lock().manner = Manner::Refuse;
    let client = builder(&[&nodes[0]], Duration::from_secs(1)).sessions(false).build().unwrap();
    let error = client.put("k", "v").await.unwrap_err();
    assert_eq!(kinds(&error), (ErrorKind::Unavailable, Outcome::NotApplied), "{error}");
    assert_eq!(nodes[0].puts(), 0);
}

#[tokio::test]
async fn a_draining_node_answers_what_it_has_and_later_calls_go_on_without_a_failure() {
    let nodes = cluster(1);
    let client = builder(&[&nodes[0]], PATIENCE).sessions(false).build().unwrap();
    nodes[0].script.lock().manner = Manner::Drain;
    for round in 0..5 {
        let answers = join_all((0..50).map(|_| client.put("k", "v").into_future())).await;
        assert!(answers.iter().all(Result::is_ok), "round {round}: {answers:?}");
    }
    let stats = client.stats();
    assert_eq!((stats.failures, stats.retries, nodes[0].store().lock().version("k")), (0, 0, 250));
}

#[tokio::test]
async fn answers_given_twice_or_to_nobody_are_ignored() {
    let nodes = cluster(1);
    nodes[0].script.lock().manner = Manner::Stutter;
    let client = client(&[&nodes[0]], PATIENCE);
    for _ in 0..20 {
        let answers = join_all((0..20).map(|_| client.put("k", "v").into_future())).await;
        assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    }
    assert_eq!(client.stats().retries, 0);
    assert_eq!(nodes[0].store().lock().version("k"), 400);
}

#[tokio::test]
async fn a_stream_that_breaks_leaves_writes_without_a_session_unknown_and_the_client_well() {
    let nodes = cluster(1);
    let client = builder(&[&nodes[0]], PATIENCE).sessions(false).build().unwrap();
    client.get("k").await.unwrap();
    nodes[0].script.lock().manner = Manner::Cut(0);
    let error = client.put("k", "v").await.unwrap_err();
    assert_eq!(kinds(&error), (ErrorKind::Unavailable, Outcome::Unknown), "{error}");
    nodes[0].script.lock().manner = Manner::Serve;
    client.put("k", "v").await.unwrap();
    assert_eq!(nodes[0].store().lock().version("k"), 2);
}

/// Fills the window of a node that reads nothing, so that what comes later cannot leave the queue.
async fn stuff(nodes: &[FakeNode], client: &Client) -> JoinSet<Result<d_engine_client::PutResponse, Error>> {
    client.get("k").await.unwrap();
    nodes[0].script.lock().manner = Manner::Deaf;
    let mut stuffing = JoinSet::new();
    let mut stuck = 0;
    // It may take one more message, as its hand was out already: which one, is up to chance.
    while stuck < 2 {
        assert!(stuffing.len() < 20, "it goes on to read");
        stuffing.spawn(client.put("stuffing", vec![0; 1 << 20]).timeout(PATIENCE).into_future());
        let probe = client.put("probe", "").timeout(Duration::from_millis(50)).await;
        let stayed = probe.is_err_and(|error| error.outcome() == Outcome::NotApplied);
        stuck = if stayed { stuck + 1 } else { 0 };
    }
    stuffing
}

#[tokio::test]
async fn what_did_not_leave_the_queue_was_not_applied_and_is_never_sent() {
    let nodes = cluster(1);
    let client = builder(&[&nodes[0]], PATIENCE).sessions(false).build().unwrap();
    let mut stuffing = stuff(&nodes, &client).await;
    let error = client.put("late", "v").timeout(Duration::from_millis(100)).await.unwrap_err();
    assert_eq!(error.outcome(), Outcome::NotApplied, "{error}");
    // Dropped, and cancelled.
    let calls = client.stats().calls;
    let dropped = tokio::spawn(client.put("dropped", "v").into_future());
    let token = CancellationToken::new();
    let cancelled = tokio::spawn(client.cancelled_by(token.clone()).put("cancelled", "v").into_future());
    eventually("all are on their way", || client.stats().calls == calls + 2).await;
    dropped.abort();
    token.cancel();
    let error = cancelled.await.unwrap().unwrap_err();
    assert_eq!(kinds(&error), (ErrorKind::Cancelled, Outcome::NotApplied), "{error}");
    nodes[0].script.lock().manner = Manner::Serve;
    while let Some(stuffed) = stuffing.join_next().await {
        stuffed.unwrap().unwrap();
    }
    client.put("after", "v").await.unwrap();
    let store = nodes[0].store();
    let store = store.lock();
    let versions = ["late", "dropped", "cancelled", "after"].map(|key| store.version(key));
    assert_eq!(versions, [0, 0, 0, 1]);
}

#[tokio::test]
async fn a_call_that_is_dropped_after_it_was_sent_is_cancelled_on_the_node() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    client.get("k").await.unwrap();
    nodes[0].behave(Behaviour::Silent);
    let abandoned = tokio::spawn(client.get("k").into_future());
    eventually("the read has arrived", || nodes[0].gets() == 2).await;
    abandoned.abort();
    eventually("the node was told", || nodes[0].script.lock().cancels == 1).await;
    nodes[0].behave(Behaviour::Serve);
    client.get("k").await.unwrap();
}

#[tokio::test]
async fn a_cancelled_call_ends_with_what_the_node_says_became_of_it() {
    for pipelined in [true, false] {
        let nodes = cluster(1);
        let client = builder(&[&nodes[0]], PATIENCE).pipelined(pipelined).build().unwrap();
        client.put("k", "1").await.unwrap();
        nodes[0].behave(Behaviour::ApplyAndHang);
        let token = CancellationToken::new();
        let pending = tokio::spawn(client.cancelled_by(token.clone()).put("k", "2").into_future());
        eventually("the write has arrived", || nodes[0].puts() == 2).await;
        token.cancel();
        let error = pending.await.unwrap().unwrap_err();
        assert_eq!(kinds(&error), (ErrorKind::Cancelled, Outcome::Unknown), "{error}");
        let error = client.cancelled_by(token).put("k", "3").await.unwrap_err();
        assert_eq!(kinds(&error), (ErrorKind::Cancelled, Outcome::NotApplied), "{error}");
        nodes[0].behave(Behaviour::Serve);
        client.put("k", "3").await.unwrap();
        assert_eq!(nodes[0].store().lock().version("k"), 3);
    }
}

#[tokio::test]
async fn cancelling_ends_the_wait_for_a_leader_a_lock_and_a_retry() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    let busy = {
        let mut busy = refusal(ErrorCode::ResourceExhausted, v1::Outcome::NotApplied, true);
        busy.detail.backoff_ms = 20_000;
        busy
    };
    nodes[0].behave(Behaviour::Refuse(busy));
    let token = CancellationToken::new();
    let retrying = tokio::spawn(client.cancelled_by(token.clone()).get("k").into_future());
    eventually("it was refused", || client.stats().retries > 0).await;
    let nobody = Client::builder().endpoints(["127.0.0.1:1"]).build().unwrap();
    let searching = tokio::spawn(nobody.cancelled_by(token.clone()).put("k", "v").into_future());
    let store = fake_store::FakeStore::new();
    let locked = fake_store::nodes(1, &store);
    let locks = fake_store::client(&locked);
    let held = locks.lock("l").acquire().await.unwrap();
    let waiting = tokio::spawn({
        let locks = locks.cancelled_by(token.clone());
        async move { locks.lock("l").acquire().await.map(drop) }
    });
    eventually("somebody waits", || store.leases().len() == 2).await;
    token.cancel();
    for error in [retrying.await.unwrap().unwrap_err(), searching.await.unwrap().unwrap_err()] {
        assert_eq!(kinds(&error), (ErrorKind::Cancelled, Outcome::NotApplied), "{error}");
    }
    assert_eq!(waiting.await.unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
    eventually("the place in the queue was given up", || store.leases().len() == 1).await;
    drop(held);
}

#[tokio::test]
async fn what_no_server_reads_is_refused_before_it_is_sent() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    client.get("k").await.unwrap();
    let operations = nodes[0].script.lock().operations;
    let nested = (0..limits::TXN_DEPTH_MAX).fold(Txn::new(), |inner, _| Txn::new().then(Op::txn(inner)));
    let error = client.txn(nested).await.unwrap_err();
    assert_eq!(kinds(&error), (ErrorKind::InvalidArgument, Outcome::NotApplied), "{error}");
    let large = vec![0; usize::try_from(limits::REQUEST_BYTES_MAX).unwrap()];
    let error = client.put("k", large).await.unwrap_err();
    assert_eq!(kinds(&error), (ErrorKind::ResourceExhausted, Outcome::NotApplied), "{error}");
    assert!(error.to_string().contains("request_bytes_max"), "{error}");
    assert_eq!(nodes[0].script.lock().operations, operations);
}

#[tokio::test]
async fn calls_and_bytes_in_flight_are_bounded_and_others_wait_within_their_deadline() {
    let nodes = cluster(1);
    let room = |calls, bytes| {
        let builder = builder(&[&nodes[0]], PATIENCE).sessions(false);
        builder.calls_in_flight_max(calls).bytes_in_flight_max(bytes).build().unwrap()
    };
    for (client, limit) in [(room(2, 1 << 20), "calls_in_flight_max"), (room(10, 2000), "bytes_in_flight_max")] {
        nodes[0].behave(Behaviour::Silent);
        let before = nodes[0].puts();
        let pending: Vec<_> = (0..2).map(|_| tokio::spawn(client.put("k", vec![0; 900]).into_future())).collect();
        eventually("two have arrived", || nodes[0].puts() == before + 2).await;
        let error = client.put("k", vec![0; 900]).timeout(Duration::from_millis(50)).await.unwrap_err();
        assert_eq!(kinds(&error), (ErrorKind::ResourceExhausted, Outcome::NotApplied), "{error}");
        assert!(error.to_string().contains(limit), "{error}");
        let waiting = tokio::spawn(client.put("k", vec![0; 900]).into_future());
        pending.iter().for_each(JoinHandle::abort);
        nodes[0].behave(Behaviour::Serve);
        waiting.await.unwrap().unwrap();
        client.put("k", vec![0; 3000]).await.unwrap();
    }
}

#[tokio::test]
async fn closing_with_patience_lets_calls_end_and_closes_the_session() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    client.put("k", "1").await.unwrap();
    nodes[0].behave(Behaviour::Silent);
    let pending = tokio::spawn(client.put("k", "2").timeout(PATIENCE).into_future());
    eventually("the write has arrived", || nodes[0].puts() == 2).await;
    let closing = tokio::spawn({
        let client = client.clone();
        async move { client.close_within(PATIENCE).await }
    });
    eventually("no call gets in", || !closing.is_finished() && nodes[0].store().lock().sessions.len() == 1).await;
    let refused = async {
        loop {
            match client.get("k").timeout(Duration::from_millis(20)).await {
                Err(error) if error.kind() == ErrorKind::Closed => return error,
                _ => {}
            }
        }
    };
    assert_eq!(tokio::time::timeout(PATIENCE, refused).await.unwrap().outcome(), Outcome::NotApplied);
    nodes[0].behave(Behaviour::Serve);
    // The silent attempt is repeated.
    pending.await.unwrap().unwrap();
    assert!(closing.await.unwrap());
    assert!(nodes[0].store().lock().sessions.is_empty(), "the session was closed");
    eventually("no task is left", || tasks() == 0).await;
}

#[tokio::test]
async fn closing_without_patience_cuts_calls_off_and_says_so() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    client.put("k", "1").await.unwrap();
    nodes[0].behave(Behaviour::Silent);
    let pending = tokio::spawn(client.put("k", "2").into_future());
    eventually("the write has arrived", || nodes[0].puts() == 2).await;
    assert!(!client.close_within(Duration::from_millis(20)).await);
    assert!(tasks() <= 1, "the caller's own may be left, and no other");
    let error = pending.await.unwrap().unwrap_err();
    assert_eq!(kinds(&error), (ErrorKind::Closed, Outcome::Unknown), "{error}");
    assert_eq!(tasks(), 0);
    assert!(client.close_within(PATIENCE).await, "nothing is in flight any more");
}

fn tasks() -> usize {
    tokio::runtime::Handle::current().metrics().num_alive_tasks()
}

/// Two clients with everything in flight that they can have: one is closed, the other dropped.
#[tokio::test]
async fn nothing_is_left_of_a_client_that_was_closed_or_dropped() {
    let store = fake_store::FakeStore::new();
    let nodes = fake_store::nodes(2, &store);
    for close in [true, false] {
        let client = fake_store::client(&nodes);
        let mut watch = client.watch_prefix("k").await.unwrap();
        let cache = client.cache(KeyRange::all()).await.unwrap();
        let keeper = client.keep_lease(Duration::from_secs(60)).await.unwrap();
        let held = client.lock("l").acquire().await.unwrap();
        let mut pending = tokio::task::JoinSet::new();
        pending.spawn({
            let client = client.clone();
            async move { drop(client.lock("l").acquire().await) }
        });
        pending.spawn(async move { drop(watch.next().await) });
        for _ in 0..50 {
            let write = client.put("k", "v").into_future();
            pending.spawn(async move { drop(write.await) });
        }
        eventually("much is going on", || tasks() > 5 && store.revision() > 2).await;
        if close {
            client.close();
            while let Some(ended) = pending.join_next().await {
                ended.unwrap();
            }
            eventually("no task is left after close", || tasks() == 0).await;
        }
        pending.shutdown().await;
        drop((cache, keeper, held, client));
        eventually("no task is left", || tasks() == 0).await;
        for lease in store.leases() {
            store.end_lease(lease);
        }
    }
}

#[tokio::test]
async fn calls_end_when_the_runtime_of_their_client_does() {
    let nodes = cluster(1);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let client = {
        let _inside = runtime.enter();
        client(&[&nodes[0]], PATIENCE)
    };
    client.put("k", "1").await.unwrap();
    nodes[0].behave(Behaviour::Silent);
    let pending = tokio::spawn(client.put("k", "2").timeout(Duration::from_secs(5)).into_future());
    eventually("the write has arrived", || nodes[0].puts() == 2).await;
    runtime.shutdown_background();
    let error = tokio::time::timeout(PATIENCE, pending).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.outcome(), Outcome::Unknown, "{error}");
}

#[tokio::test]
async fn monotonic_reads_never_go_back_whichever_node_answers() {
    for monotonic in [true, false] {
        let nodes = cluster(2);
        nodes[1].behave(Behaviour::Serve);
        nodes[1].script.lock().applied_max = 1;
        let client = builder(&[&nodes[0]], PATIENCE).monotonic_reads(monotonic).build().unwrap();
        client.members().await.unwrap();
        eventually("both are known", || format!("{client:?}").contains(&nodes[1].address)).await;
        let space = client.namespace("space/");
        let mut back = 0;
        for round in 0..50 {
            let written = space.put("k", "v").await.unwrap().header.revision;
            let read = space.get("k").consistency(Consistency::Eventual).await.unwrap();
            if read.header.revision < written {
                back += 1;
            }
            assert!(!monotonic || read.kv.is_some(), "round {round}");
        }
        assert_eq!(back == 0, monotonic, "{back} reads went back");
        assert!(nodes[1].gets() > 0, "the node that is behind was asked");
    }
}

#[tokio::test]
async fn eventual_reads_avoid_a_node_that_has_not_answered_yet() {
    let nodes = cluster(2);
    nodes[1].behave(Behaviour::Serve);
    let client = client(&[&nodes[0]], PATIENCE);
    eventually("both are known", || format!("{client:?}").contains(&nodes[1].address)).await;
    let read = || client.get("k").consistency(Consistency::Eventual).into_future();
    for _ in 0..20 {
        read().await.unwrap();
    }
    // The one that answers fastest falls silent: how fast it was counts less than that it has not answered.
    let favourite = read().await.unwrap().header.node_id;
    let silent = nodes.iter().find(|node| NodeId(node.id()) == favourite).unwrap();
    silent.behave(Behaviour::Silent);
    let asked = silent.gets();
    let mut held = tokio::task::JoinSet::new();
    eventually("the silent node was asked", || {
        held.spawn(read());
        silent.gets() > asked
    })
    .await;
    eventually("the others are answered", || {
        while held.try_join_next().is_some() {}
        held.len() == (silent.gets() - asked) as usize
    })
    .await;
    let hanging = silent.gets();
    for _ in 0..100 {
        assert_ne!(read().await.unwrap().header.node_id, favourite);
    }
    assert_eq!(silent.gets(), hanging, "somebody was sent there, and answered elsewhere in the end");
}

/// A proxy that cuts every connection after some bytes, wherever that is in a message.
async fn cutting_proxy(target: String, mut rng: fastrand::Rng) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let Ok(server) = TcpStream::connect(&target).await else { continue };
            let (there, back) = (rng.usize(300..30_000), rng.usize(300..30_000));
            tokio::spawn(async move {
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) = server.into_split();
                tokio::select! {
                    () = copy(&mut from_client, &mut to_server, there) => {}
                    () = copy(&mut from_server, &mut to_client, back) => {}
                }
            });
        }
    });
    address
}

async fn copy(from: &mut (impl AsyncReadExt + Unpin), to: &mut (impl AsyncWriteExt + Unpin), mut rest: usize) {
    let mut buffer = vec![0; 4096];
    while rest > 0 {
        let most = rest.min(buffer.len());
        let Ok(read @ 1..) = from.read(&mut buffer[..most]).await else { return };
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
        rest -= read;
    }
}

/// Connections break in the middle of messages, and every call ends once, with what is true of its write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outcomes_are_true_wherever_a_connection_breaks() {
    for sessions in [true, false] {
        let seed = fastrand::u64(..);
        println!("seed {seed}, sessions {sessions}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut nodes = [FakeNode::start(1)];
        let direct = nodes[0].address.clone();
        nodes[0].address = cutting_proxy(direct.clone(), rng.fork()).await;
        introduce(&nodes);
        elect(&nodes, 0, 1);
        let client = builder(&[&nodes[0]], Duration::from_secs(10)).sessions(sessions).build().unwrap();
        let mut calls = tokio::task::JoinSet::new();
        for worker in 0..16 {
            let client = client.clone();
            let mut rng = rng.fork();
            calls.spawn(async move {
                let mut results = BTreeMap::new();
                for number in 0..40 {
                    let key = format!("{worker}/{number}");
                    let write = client.put(key.as_str(), vec![0; rng.usize(0..600)]);
                    // Some are given up.
                    if rng.usize(0..8) == 0 {
                        let patience = Duration::from_micros(rng.u64(0..3000));
                        if let Ok(result) = tokio::time::timeout(patience, write.into_future()).await {
                            results.insert(key, result.map_err(|error| error.outcome()).map(drop));
                        }
                    } else {
                        results.insert(key, write.await.map_err(|error| error.outcome()).map(drop));
                    }
                }
                results
            });
        }
        let mut results = BTreeMap::new();
        while let Some(ended) = calls.join_next().await {
            results.extend(ended.unwrap());
        }
        client.close();
        let honest = Client::builder().endpoints([direct]).sessions(false).pipelined(false).build().unwrap();
        honest.get("after").consistency(Consistency::Eventual).await.unwrap();
        let store = nodes[0].store();
        let store = store.lock();
        let mut counts = [0; 3];
        for (key, result) in &results {
            let version = store.version(key);
            match result {
                Ok(()) => assert_eq!(version, 1, "seed {seed}: {key} was written"),
                Err(Outcome::NotApplied) => assert_eq!(version, 0, "seed {seed}: {key} was not written"),
                Err(_) => assert!(version <= 1, "seed {seed}: {key} was written twice"),
            }
            counts[result.map_or_else(|outcome| if outcome == Outcome::NotApplied { 1 } else { 2 }, |()| 0)] += 1;
        }
        println!("written, not written, unknown: {counts:?}");
        assert!(counts[0] > 100, "seed {seed}: {counts:?}");
        assert_eq!(sessions, counts[2] == 0, "seed {seed}: a session settles what is unknown: {counts:?}");
    }
}
