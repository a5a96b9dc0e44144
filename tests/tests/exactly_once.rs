//! Sessions: what a client says of a put is what became of it, and no put is applied twice, whatever happens to
//! answers, connections, leaders and the client itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use d_engine_client::{Client, Consistency, KeyRange, Outcome};
use d_engine_proto::{DetailedStatus, ErrorCode, limits, v1};
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::direct::DirectNode;
use d_engine_tests::nemesis::{Schedule, torment};
use d_engine_tests::network::{self, PrivateNetwork};
use d_engine_tests::once::{self, Fate, Put, Tally};
use d_engine_tests::puppet::Puppet;
use d_engine_tests::seed::seed;
use d_engine_tests::truth::{Change, Truth, View};
use d_engine_tests::watched::Watched;
use d_engine_tests::{wait, watchers};
use fastrand::Rng;

/// Long enough for a cluster to be whole again.
const TIMEOUT: Duration = Duration::from_secs(30);
const CLIENTS: usize = 6;
const TASKS: usize = 4;
const KEYS: usize = 5;

async fn proxied(network: Option<PrivateNetwork>) -> Cluster {
    let mut cluster = Cluster::prepare(Shape { network, proxied: true, ..Shape::default() }).await;
    cluster.start_all().await;
    cluster
}

fn client(cluster: &Cluster, sessions: bool) -> Client {
    Client::builder().endpoints(cluster.addresses()).call_timeout(TIMEOUT).sessions(sessions).build().unwrap()
}

fn lose_answers(cluster: &Cluster) {
    for node in cluster.nodes() {
        node.proxy.as_ref().unwrap().lose_answers();
    }
}

fn cut(cluster: &Cluster) {
    for node in cluster.nodes() {
        node.proxy.as_ref().unwrap().cut();
    }
}

/// Waits until `key` holds `value` at one of the nodes, which are asked behind the proxies; answers its version.
async fn applied(nodes: &[DirectNode], key: &str, value: &str) -> (u64, u64) {
    wait::until("the put to be applied", wait::PATIENCE, || async {
        for node in nodes {
            let Ok(answer) = node.get(key, v1::Consistency::Eventual, 0).await else { continue };
            if let Some(kv) = answer.kv.filter(|kv| kv.value == value.as_bytes()) {
                return Some((kv.version, kv.mod_revision));
            }
        }
        None
    })
    .await
}

fn directly(cluster: &Cluster) -> Vec<DirectNode> {
    cluster.nodes().iter().map(|node| node.direct(Duration::from_secs(1))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_whose_answer_is_lost_is_answered_with_a_session_and_in_doubt_without() {
    let cluster = proxied(None).await;
    let nodes = directly(&cluster);
    for (sessions, key) in [(true, "with"), (false, "without")] {
        let client = client(&cluster, sessions);
        client.put(key, "first").await.unwrap();
        for round in 2..8 {
            let value = format!("{key} {round}");
            // There is a connection to the leader when answers begin to be lost: one that is made counts once its server has spoken.
            client.get(key).consistency(Consistency::Lease).await.unwrap();
            lose_answers(&cluster);
            let put = tokio::spawn(client.put(key, &value).into_future());
            let (version, revision) = applied(&nodes, key, &value).await;
            assert_eq!(version, round, "applied once each");
            cut(&cluster);
            match put.await.unwrap() {
                Ok(answer) => {
                    assert!(sessions, "nobody can know without a session");
                    assert_eq!(answer.header.revision.get(), revision, "the answer is that of the first time");
                }
                Err(error) => assert!(!sessions && error.outcome() == Outcome::Unknown, "{error}"),
            }
        }
        let found = client.get(key).await.unwrap().kv.unwrap();
        assert_eq!(found.version, 7);
        assert_eq!(client.stats().repeats > 0, sessions, "{:?}", client.stats());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_killed_between_commit_and_answer_leaves_no_put_in_doubt() {
    let mut cluster = proxied(None).await;
    let client = client(&cluster, true);
    client.put("key", "first").await.unwrap();
    for round in 2..5 {
        let leader = cluster.leader(&[]).await;
        let value = format!("round {round}");
        lose_answers(&cluster);
        let put = tokio::spawn(client.put("key", &value).into_future());
        // Committed for certain: a follower shows it.
        let followers: Vec<_> = cluster.nodes().iter().filter(|node| node.id != leader).collect();
        let followers: Vec<_> = followers.iter().map(|node| node.direct(Duration::from_secs(1))).collect();
        let (version, revision) = applied(&followers, "key", &value).await;
        cluster.node_mut(leader).kill();
        cut(&cluster);
        let answer = put.await.unwrap().unwrap();
        assert_eq!((version, answer.header.revision.get()), (round, revision));
        cluster.start_all().await;
        assert_eq!(client.get("key").await.unwrap().kv.unwrap().version, round);
    }
}

/// A client process that stands still while its session ends cannot know whether its put was applied. It must say so, and
/// must not write again under another session.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_stopped_past_its_session_says_that_it_does_not_know() {
    let cluster = proxied(None).await;
    let nodes = directly(&cluster);
    let mut puppet = Puppet::start(Path::new(env!("CARGO_BIN_EXE_d-engine-puppet")), &cluster.addresses());
    puppet.order("put key first");
    assert!(puppet.line().await.starts_with("put acknowledged"));

    lose_answers(&cluster);
    puppet.order("put key second");
    applied(&nodes, "key", "second").await;
    puppet.pause();
    cut(&cluster);
    // Sessions are numbered from 1, and nobody else has one. Ending them is what their time to live does, without the
    // minute that takes.
    for session in 1..=4 {
        end_session(&cluster, session).await;
    }
    puppet.resume();
    assert_eq!(puppet.line().await, "put unknown SessionExpired");

    // It goes on under a new session, and the doubtful put was applied once.
    puppet.order("put key third");
    assert!(puppet.line().await.starts_with("put acknowledged"));
    assert_eq!(applied(&nodes, "key", "third").await.0, 3);
}

async fn end_session(cluster: &Cluster, session: u64) {
    wait::until("the session to be ended", wait::PATIENCE, || async {
        let leader = cluster.node(cluster.leader_now(&[]).await?).direct(Duration::from_secs(1));
        let renewed = leader.session().renew(leader.timed(v1::SessionRenewRequest { session })).await;
        if let Err(status) = &renewed
            && code(status) == Some(ErrorCode::SessionExpired)
        {
            return Some(());
        }
        let _ = leader.session().close(leader.timed(v1::SessionCloseRequest { session })).await;
        None
    })
    .await;
}

fn code(status: &tonic::Status) -> Option<ErrorCode> {
    DetailedStatus::from_status(status).and_then(|detailed| detailed.code())
}

#[test]
fn no_put_is_applied_twice_while_leaders_and_links_fail_and_answers_are_lost() {
    network::inside("no_put_is_applied_twice_while_leaders_and_links_fail_and_answers_are_lost", || async {
        let seed = seed();
        let mut cluster = proxied(Some(PrivateNetwork::lay(3))).await;
        let mut unknown = BTreeMap::new();
        for (sessions, seconds) in [(true, 9), (false, 4)] {
            let (tally, cuts) = puts_under_torment(&mut cluster, sessions, seconds, seed).await;
            println!("sessions {sessions}: {tally}; answers were lost {cuts} times");
            assert!(cuts > 10 && tally.acknowledged > 100, "too little happened to show anything");
            unknown.insert(sessions, tally.unknown());
        }
        assert!(unknown[&false] > 0, "no answer was lost where it counts");
    });
}

async fn puts_under_torment(cluster: &mut Cluster, sessions: bool, seconds: u64, seed: u64) -> (Tally, usize) {
    let mut rng = Rng::with_seed(seed);
    let prefix = format!("sessions-{sessions}/");
    let base = watchers::content(&client(cluster, true)).await;
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut work = Vec::new();
    for number in 0..CLIENTS {
        // A client is a session, so its tasks share it.
        let client = client(cluster, sessions);
        for task in 0..TASKS {
            let (client, prefix) = (client.clone(), prefix.clone());
            work.push(tokio::spawn(put_until(client, prefix, format!("{number}-{task}"), rng.fork(), end)));
        }
    }
    let cuts = Arc::new(AtomicUsize::new(0));
    let mut losses = Vec::new();
    for node in cluster.nodes() {
        let (proxy, rng, cuts) = (node.proxy.clone().unwrap(), rng.fork(), Arc::clone(&cuts));
        losses.push(tokio::spawn(async move { proxy.torment(rng, &cuts).await }));
    }
    let mut schedule = Schedule::new(seed, 3, cluster.reach());
    torment(cluster, &mut schedule, end, |text| println!("  {text}")).await;
    for loss in &losses {
        loss.abort();
    }
    cut(cluster);
    let mut puts = Vec::new();
    for task in work {
        puts.extend(task.await.unwrap());
    }

    // Behind a write that everybody sees, nothing that was under way before can come.
    let reader = client(cluster, true);
    reader.put("barrier", "").await.unwrap();
    let (last, state) = watchers::content(&reader).await;
    let truth = history(&reader, base, last).await;
    truth.check_state(last, &KeyRange::all(), &state).unwrap();
    let ours = state.into_iter().filter(|(key, _)| key.starts_with(prefix.as_bytes()));
    let versions: BTreeMap<Bytes, u64> = ours.map(|(key, held)| (key, held.version)).collect();
    match once::judge(&puts, &truth, &versions) {
        Ok(tally) => (tally, cuts.load(Ordering::Relaxed)),
        Err(wrong) => panic!("seed {seed}, sessions {sessions}: {wrong}"),
    }
}

async fn put_until(client: Client, prefix: String, name: String, mut rng: Rng, end: Instant) -> Vec<Put> {
    let mut pace = tokio::time::interval(Duration::from_millis(5));
    pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut puts = Vec::new();
    while Instant::now() < end {
        pace.tick().await;
        let key = format!("{prefix}{}", rng.usize(..KEYS));
        let value = format!("{name}-{}", puts.len());
        let fate = match client.put(&key, &value).await {
            Ok(answer) => Fate::Acknowledged(answer.header.revision.get()),
            Err(error) if error.outcome() == Outcome::NotApplied => Fate::NotApplied,
            Err(_) => Fate::Unknown,
        };
        puts.push(Put { key: key.into(), value: value.into(), fate });
    }
    puts
}

/// What happened from the base to `last`, by a watch from the past.
async fn history(client: &Client, base: (u64, d_engine_tests::truth::State), last: u64) -> Truth {
    let (_goal, goals) = tokio::sync::watch::channel(Some(last));
    let view = View { previous: true, ..View::of(KeyRange::all()) };
    let watched = Watched::new("the history", view, base.0 + 1);
    let watching = watchers::by_client(client.clone(), watched, None, goals);
    let watched =
        tokio::time::timeout(wait::PATIENCE, watching).await.expect("the watch comes to the present").unwrap();
    let changes: Vec<Change> = watched.deliveries.into_iter().flat_map(|delivery| delivery.changes).collect();
    Truth::new(base.0, base.1, changes).unwrap()
}

// What follows speaks the protocol itself.

async fn put(
    node: &DirectNode,
    key: &str,
    value: &str,
    lease: u64,
    call: v1::SessionCall,
) -> Result<v1::PutResponse, tonic::Status> {
    let (key, value) = (Bytes::copy_from_slice(key.as_bytes()), Bytes::copy_from_slice(value.as_bytes()));
    let request =
        v1::PutRequest { key, value, lease, return_previous: true, session: Some(call), ..v1::PutRequest::default() };
    let mut answer = node.kv().put(node.timed(request)).await?.into_inner();
    // Who answers, and in which term, is no part of what was answered.
    if let Some(header) = &mut answer.header {
        (header.node_id, header.term) = (0, 0);
    }
    Ok(answer)
}

#[track_caller]
fn is_refused<T: std::fmt::Debug>(result: Result<T, tonic::Status>, expected: ErrorCode, outcome: v1::Outcome) {
    let status = result.expect_err("refused");
    let detailed = DetailedStatus::from_status(&status).unwrap_or_else(|| panic!("no details: {status}"));
    assert_eq!((detailed.code(), detailed.outcome()), (Some(expected), outcome), "{status}");
}

async fn leading(cluster: &Cluster) -> DirectNode {
    let leader = cluster.leader(&[]).await;
    cluster.node(leader).direct(wait::PATIENCE)
}

async fn register(node: &DirectNode, ttl_ms: u64) -> u64 {
    let request = node.timed(v1::SessionRegisterRequest { ttl_ms });
    node.session().register(request).await.unwrap().into_inner().session
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn numbers_come_in_any_order_and_are_answered_as_the_first_time() {
    const CALLS: u64 = 64;
    let seed = seed();
    let mut rng = Rng::with_seed(seed);
    let mut cluster = Cluster::start(3).await;
    let node = leading(&cluster).await;
    let session = register(&node, 0).await;
    let call = move |sequence, acknowledged_through| v1::SessionCall { session, sequence, acknowledged_through };

    let mut order: Vec<u64> = (1..=CALLS).collect();
    rng.shuffle(&mut order);
    let tasks: Vec<_> = order
        .iter()
        .map(|sequence| {
            let (node, sequence) = (node.clone(), *sequence);
            tokio::spawn(
                async move { (sequence, put(&node, "k", &format!("v{sequence}"), 0, call(sequence, 0)).await) },
            )
        })
        .collect();
    let mut first = BTreeMap::new();
    for task in tasks {
        let (sequence, answer) = task.await.unwrap();
        first.insert(sequence, answer.unwrap());
    }
    // A refusal is an answer, too, and does not change with what would change it.
    let without_lease = put(&node, "k", "leased", 999, call(CALLS + 1, 0)).await;
    is_refused(without_lease, ErrorCode::LeaseNotFound, v1::Outcome::NotApplied);
    let grant = v1::LeaseGrantRequest { ttl_ms: 60_000, lease: 999, session: Some(call(CALLS + 2, 0)) };
    node.lease().grant(node.timed(grant)).await.unwrap();

    let node = {
        let leader = cluster.leader(&[]).await;
        cluster.node_mut(leader).kill();
        let other = cluster.leader(&[leader]).await;
        cluster.node(other).direct(wait::PATIENCE)
    };
    rng.shuffle(&mut order);
    for sequence in &order {
        let again = put(&node, "k", &format!("v{sequence}"), 0, call(*sequence, 0)).await.unwrap();
        assert_eq!(again, first[sequence], "seed {seed}: another answer to {sequence}");
    }
    let without_lease = put(&node, "k", "leased", 999, call(CALLS + 1, 0)).await;
    is_refused(without_lease, ErrorCode::LeaseNotFound, v1::Outcome::NotApplied);
    let version = || async { node.get("k", v1::Consistency::Linearizable, 0).await.unwrap().kv.unwrap().version };
    assert_eq!(version().await, CALLS, "seed {seed}");

    let (invalid, not_applied) = (ErrorCode::InvalidArgument, v1::Outcome::NotApplied);
    is_refused(put(&node, "k", "other bytes", 0, call(7, 0)).await, invalid, not_applied);
    is_refused(put(&node, "k", "v0", 0, call(0, 0)).await, invalid, not_applied);
    is_refused(
        put(&node, "k", "x", 0, call(limits::SESSION_WINDOW_CALLS + 1, 0)).await,
        ErrorCode::ResourceExhausted,
        not_applied,
    );
    assert_eq!(version().await, CALLS);

    // Acknowledged answers are gone for good, also for who is told of fewer acknowledgements.
    let next = CALLS + 3;
    put(&node, "k", "next", 0, call(next, 32)).await.unwrap();
    for (sequence, acknowledged) in [(32, 32), (1, 0), (20, 5)] {
        let again = put(&node, "k", &format!("v{sequence}"), 0, call(sequence, acknowledged)).await;
        is_refused(again, ErrorCode::AlreadyAcknowledged, v1::Outcome::Unknown);
    }
    for sequence in 33..=CALLS {
        let again = put(&node, "k", &format!("v{sequence}"), 0, call(sequence, 3)).await.unwrap();
        assert_eq!(again, first[&sequence], "seed {seed}: another answer to {sequence}");
    }
    put(&node, "k", "last of the window", 0, call(32 + limits::SESSION_WINDOW_CALLS, 32)).await.unwrap();
    let beyond = put(&node, "k", "beyond it", 0, call(33 + limits::SESSION_WINDOW_CALLS, 32)).await;
    is_refused(beyond, ErrorCode::ResourceExhausted, not_applied);
    assert_eq!(version().await, CALLS + 2);

    // A session lives on in a node that restarts, and with all of them.
    for id in 1..=3 {
        if cluster.node(id).runs() {
            cluster.node_mut(id).kill();
        }
    }
    cluster.start_all().await;
    let node = leading(&cluster).await;
    let again = put(&node, "k", "v50", 0, call(50, 0)).await.unwrap();
    assert_eq!(again, first[&50]);

    node.session().close(node.timed(v1::SessionCloseRequest { session })).await.unwrap();
    is_refused(put(&node, "k", "v50", 0, call(50, 0)).await, ErrorCode::SessionExpired, not_applied);
    is_refused(put(&node, "k", "new", 0, call(CALLS + 9, 0)).await, ErrorCode::SessionExpired, not_applied);
    assert_eq!(node.get("k", v1::Consistency::Linearizable, 0).await.unwrap().kv.unwrap().version, CALLS + 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_lives_as_long_as_it_is_used_and_ends_when_it_is_not() {
    const TTL: Duration = Duration::from_millis(limits::SESSION_TTL_MS_MIN);
    let cluster = Cluster::start(1).await;
    let node = leading(&cluster).await;
    let call = |session, sequence| v1::SessionCall { session, sequence, acknowledged_through: sequence - 1 };
    // Each call prolongs it: it outlives its time by far.
    let (start, mut pace, mut puts) = (Instant::now(), tokio::time::interval(TTL / 20), 0);
    let mut prolonged = start;
    let mut session = register(&node, limits::SESSION_TTL_MS_MIN).await;
    let mut sequence = 0;
    while start.elapsed() < 3 * TTL {
        pace.tick().await;
        sequence += 1;
        let sent = Instant::now();
        match put(&node, "k", "v", 0, call(session, sequence)).await {
            Ok(_) => {
                puts += 1;
                prolonged = sent;
            }
            // Only a machine that stood still for as long may end it.
            Err(status) => {
                assert_eq!(code(&status), Some(ErrorCode::SessionExpired));
                assert!(prolonged.elapsed() >= TTL, "it ended early: {status}");
                prolonged = Instant::now();
                session = register(&node, limits::SESSION_TTL_MS_MIN).await;
                sequence = 0;
            }
        }
    }
    assert!(puts > 10, "hardly used");
    // Unused for its time. A call would prolong it, so that the number of sessions tells.
    let address = cluster.node(1).http_address;
    wait::until("the session to end", wait::PATIENCE, || async {
        let (_, metrics) = d_engine_tests::http::get(address, "/metrics").await.ok()?;
        metrics.lines().any(|line| line == "d_engine_sessions 0").then_some(())
    })
    .await;
    let expired = put(&node, "k", "after the end", 0, call(session, sequence + 1)).await;
    is_refused(expired, ErrorCode::SessionExpired, v1::Outcome::NotApplied);
    let kv = node.get("k", v1::Consistency::Linearizable, 0).await.unwrap().kv.unwrap();
    assert_eq!((kv.value, kv.version), ("v".into(), puts));
}
