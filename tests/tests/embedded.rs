//! The embedded engine as applications use it; and one suite for application code that is generic over the mode.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::time::{Duration, Instant};

use d_engine::prelude::*;
use d_engine_proto::v1;
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::embedded::{Claim, Fleet, shows};
use d_engine_tests::wait::{self, PATIENCE};

/// What both modes promise in the same words.
async fn suite<C: ClientApi>(client: &C) {
    keys_and_values(client).await;
    conditions(client).await;
    time_to_live(client).await;
    watches(client).await;
    refusals(client).await;
}

async fn keys_and_values<C: ClientApi>(client: &C) {
    let bytes: Vec<u8> = (0..=255).collect();
    client.put(b"suite/a", b"1").await.unwrap();
    client.put(b"suite/b".as_slice(), bytes.clone()).await.unwrap();
    client.put(b"suite/c".to_vec(), b"").await.unwrap();
    client.put([0u8, 255], "binary").await.unwrap();
    assert_eq!(client.get(b"suite/a").await.unwrap().as_deref(), Some(&b"1"[..]));
    assert_eq!(client.get_linearizable(b"suite/b").await.unwrap().as_deref(), Some(&bytes[..]));
    assert_eq!(client.get_lease(b"suite/c").await.unwrap().as_deref(), Some(&b""[..]));
    assert_eq!(client.get_linearizable([0u8, 255]).await.unwrap().as_deref(), Some(&b"binary"[..]));
    assert_eq!(client.get("suite/nothing").await.unwrap(), None);
    wait::until("an eventual read to show it", PATIENCE, || async {
        client.get_eventual("suite/a").await.unwrap().filter(|found| *found == "1")
    })
    .await;

    let found = client.get_multi(["suite/c", "suite/nothing", "suite/a", "suite/a"]).await.unwrap();
    let found: Vec<_> = found.iter().map(Option::as_deref).collect();
    assert_eq!(found, [Some(&b""[..]), None, Some(b"1"), Some(b"1")]);

    let expected = [("suite/a", &b"1"[..]), ("suite/b", &bytes[..]), ("suite/c", b"")];
    let found = client.scan_prefix("suite/").await.unwrap();
    let found: Vec<_> = found.iter().map(|(key, value)| (str::from_utf8(key).unwrap(), &value[..])).collect();
    assert_eq!(found, expected);

    client.delete("suite/b").await.unwrap();
    client.delete("suite/b").await.unwrap();
    assert_eq!(client.get("suite/b").await.unwrap(), None);
    assert_eq!(client.scan_prefix("suite/").await.unwrap().len(), 2);
}

async fn conditions<C: ClientApi>(client: &C) {
    assert!(client.compare_and_swap("cas", None::<&[u8]>, "1").await.unwrap());
    assert!(!client.compare_and_swap("cas", None::<&[u8]>, "2").await.unwrap());
    assert!(!client.compare_and_swap("cas", Some("0"), "2").await.unwrap());
    assert!(client.compare_and_swap("cas", Some(b"1".to_vec()), "2").await.unwrap());
    assert_eq!(client.get("cas").await.unwrap().as_deref(), Some(&b"2"[..]));
}

async fn time_to_live<C: ClientApi>(client: &C) {
    client.put_with_ttl("ttl/short", "v", Duration::from_millis(100)).await.unwrap();
    client.put_with_ttl("ttl/long", "v", 3600).await.unwrap();
    wait::until("a key to expire", PATIENCE, || async {
        client.get_linearizable("ttl/short").await.unwrap().is_none().then_some(())
    })
    .await;
    assert!(client.get("ttl/long").await.unwrap().is_some());
}

async fn watches<C: ClientApi>(client: &C) {
    let mut one = client.watch("watch/a").await.unwrap();
    let mut all = client.watch_prefix("watch/").await.unwrap();
    client.put("watch/a", "1").await.unwrap();
    client.put("watch/b", "2").await.unwrap();
    client.put("watch", "not below").await.unwrap();
    client.delete("watch/a").await.unwrap();
    let put = |key: &str, value: &str| WatchEvent::Put(key.to_owned().into(), value.to_owned().into());
    let gone = |key: &str| WatchEvent::Delete(key.to_owned().into());
    for expected in [put("watch/a", "1"), gone("watch/a")] {
        assert_eq!(within_patience(one.recv()).await, Some(expected));
    }
    for expected in [put("watch/a", "1"), put("watch/b", "2"), gone("watch/a")] {
        assert_eq!(within_patience(all.recv()).await, Some(expected));
    }
    assert!(one.end_reason().is_none() && all.end_reason().is_none());
}

async fn refusals<C: ClientApi>(client: &C) {
    for (key, value) in [(vec![], vec![]), (vec![b'k'; 65 << 10], vec![]), (b"large".to_vec(), vec![0; 2 << 20])] {
        let error = client.put(key, value).await.unwrap_err();
        assert!(["InvalidArgument", "ResourceExhausted"].contains(&error.code()), "{error}");
        assert!(!error.may_have_been_applied() && !error.is_not_leader() && error.leader_address().is_none());
    }
    assert_eq!(client.get("large").await.unwrap(), None);
}

async fn within_patience<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}

#[tokio::test(flavor = "multi_thread")]
async fn one_suite_on_an_engine_alone() {
    let fleet = Fleet::alone().await;
    suite(&fleet.leader().await.client()).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_suite_on_the_leader_of_three_and_over_grpc() {
    let fleet = Fleet::of(3).await;
    suite(&*fleet.leader().await.client()).await;
    fleet.stop().await;

    let fleet = Fleet::of(3).await;
    let members = fleet.leader().await.client().engine().unwrap().members().members;
    let addresses: Vec<_> = members.into_iter().map(|member| member.client_address).collect();
    // A Rust application is the cluster for programs outside of it.
    let client: GrpcClient = Client::builder().endpoints(addresses).connect().await.unwrap();
    suite(&client).await;
    client.close();
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_can_be_made_from_tasks_and_by_many_at_once() {
    let fleet = Fleet::alone().await;
    let client = fleet.leader().await.client();
    let callers: Vec<_> = (0..100)
        .map(|caller| {
            let client = client.clone();
            tokio::spawn(async move {
                for round in 0..20 {
                    let key = format!("caller/{caller}");
                    client.put(&key, round.to_string()).await.unwrap();
                    // What is written can be read on the node that wrote it, whatever the policy.
                    for found in [
                        client.get_eventual(&key).await,
                        client.get_lease(&key).await,
                        client.get_linearizable(&key).await,
                    ] {
                        assert_eq!(found.unwrap().unwrap(), round.to_string());
                    }
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    assert_eq!(client.scan_prefix("caller/").await.unwrap().len(), 100);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_says_where_the_leader_is_and_serves_reads() {
    let fleet = Fleet::of(3).await;
    let (leader, follower) = (fleet.leader().await, fleet.follower().await);
    leader.client().put("key", "value").await.unwrap();

    let members = leader.client().engine().unwrap().members().members;
    let address = &members.iter().find(|member| member.id == leader.node_id()).unwrap().peer_address;
    let application = format!("app-{}:80", leader.node_id());
    let client = follower.client();
    for error in [
        client.put("key", "other").await.unwrap_err(),
        client.delete("key").await.unwrap_err(),
        client.compare_and_swap("key", Some("value"), "other").await.unwrap_err(),
        client.get_lease("key").await.unwrap_err(),
    ] {
        assert!(error.is_not_leader(), "{error}");
        assert_eq!(error.leader_address(), Some(&**address));
        assert_eq!(error.outcome(), v1::Outcome::NotApplied);
        assert!(error.to_string().contains(address.as_str()), "{error}");
        match error {
            LocalClientError::NotLeader { leader_id, application_address, term, .. } => {
                assert_eq!(leader_id, Some(leader.node_id()));
                assert_eq!(application_address.as_deref(), Some(&*application));
                assert_eq!(term, leader.leader_info().map(|info| info.term));
            }
            other => panic!("{other}"),
        }
    }
    assert_eq!(client.get_linearizable("key").await.unwrap().unwrap(), "value");
    shows(&client, "key", "value").await;
    assert!(!follower.is_leader() && leader.is_leader());
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_hands_leadership_over_and_a_watch_goes_on_elsewhere() {
    let fleet = Fleet::of(3).await;
    let (leader, follower) = (fleet.leader().await, fleet.follower().await);
    let mut changes = follower.leader_change_notifier();
    let mut watch = follower.client().watch_prefix("").await.unwrap();
    let mut ending = leader.client().watch("key").await.unwrap();
    let before = leader.leader_info().unwrap();
    leader.client().put("key", "1").await.unwrap();
    leader.stop().await.unwrap();

    let after = within_patience(changes.wait_for(|info| info.is_some_and(|info| info.term > before.term))).await;
    let after = after.unwrap().expect("a leader");
    assert_ne!(after.leader_id, before.leader_id);
    let next = fleet.engines().iter().find(|engine| engine.node_id() == after.leader_id).unwrap();
    wait::until("the successor to serve", PATIENCE, || async { next.client().put("key", "2").await.ok() }).await;
    for value in ["1", "2"] {
        let event = within_patience(watch.recv()).await;
        assert_eq!(event, Some(WatchEvent::Put("key".into(), value.into())));
    }
    // What was applied before the end may still come; then there is a reason.
    while within_patience(ending.recv()).await.is_some() {}
    assert!(matches!(ending.end_reason(), Some(LocalClientError::Stopped)));
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_engine_says_so_and_its_directory_is_free() {
    let mut fleet = Fleet::prepared(1);
    let mut held = Vec::new();
    for round in 0..10 {
        let engine = fleet.start(1).await;
        let leader = engine.wait_ready(PATIENCE).await.unwrap();
        assert_eq!((leader.leader_id, engine.node_id()), (1, 1));
        assert!(engine.is_leader() && !engine.is_stopped().await);
        let client = engine.client();
        assert_eq!(client.get("round").await.unwrap().is_some(), round > 0, "it kept what it had");
        client.put("round", round.to_string()).await.unwrap();

        let clone = engine.clone();
        let twice = tokio::join!(engine.stop(), clone.stop());
        assert!(twice.0.is_ok() && twice.1.is_ok() && engine.stop().await.is_ok());
        assert!(engine.is_stopped().await && !engine.is_leader() && engine.leader_info().is_none());
        assert_eq!(*engine.leader_change_notifier().borrow(), None);
        assert!(matches!(engine.wait_ready(PATIENCE).await, Err(EmbeddedError::Stopped)));
        for error in [
            client.put("k", "v").await.unwrap_err(),
            client.get("k").await.unwrap_err(),
            client.get_eventual("k").await.unwrap_err(),
            client.watch("k").await.map(drop).unwrap_err(),
        ] {
            assert!(matches!(error, LocalClientError::Stopped), "{error}");
            assert_eq!(error.outcome(), v1::Outcome::NotApplied);
        }
        // Who keeps the client keeps nothing of the engine.
        held.push(client);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_is_dropped_stops_and_its_client_says_so() {
    let fleet = Fleet::prepared(1);
    let engine = EmbeddedEngine::start_with(fleet.config(1)).await.unwrap();
    engine.wait_ready(PATIENCE).await.unwrap();
    let client = engine.client();
    client.put("key", "value").await.unwrap();
    drop(engine);
    assert!(matches!(client.get_eventual("key").await, Err(LocalClientError::Stopped)));
    let again = wait::until("the directory to be free", PATIENCE, || async {
        EmbeddedEngine::start_with(fleet.config(1)).await.ok()
    })
    .await;
    again.wait_ready(PATIENCE).await.unwrap();
    assert_eq!(again.client().get("key").await.unwrap().unwrap(), "value");
    again.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_without_its_cluster_is_not_ready() {
    let mut fleet = Fleet::prepared(3);
    let engine = fleet.start(1).await;
    let error = engine.wait_ready(Duration::from_millis(100)).await.unwrap_err();
    assert!(error.to_string().contains("initial members"), "{error}");
    assert!(!engine.is_leader() && engine.leader_info().is_none());
    for error in [
        engine.client().put("k", "v").await.unwrap_err(),
        engine.client().get_linearizable("k").await.unwrap_err(),
        engine.client().watch("k").await.map(drop).unwrap_err(),
    ] {
        assert!(matches!(error, LocalClientError::NotReady { .. }), "{error}");
    }
    engine.stop().await.unwrap();
}

/// No configuration at all: data in `./db`, no port, so that two such processes do not meet.
#[tokio::test(flavor = "multi_thread")]
async fn an_engine_alone_opens_no_port_and_is_ready_soon() {
    let started = Instant::now();
    let first = Fleet::alone().await;
    println!("ready within {:?}", started.elapsed());
    let second = Fleet::alone().await;
    for fleet in [&first, &second] {
        let members = fleet.leader().await.client().engine().unwrap().members();
        assert_eq!(members.members[0].client_address, "", "an address nobody listens on is told to nobody");
    }
    first.stop().await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_events_have_revisions_and_begin_where_asked() {
    let fleet = Fleet::alone().await;
    let client = fleet.leader().await.client();
    for value in ["1", "2", "3"] {
        client.put("key", value).await.unwrap();
    }
    let engine = client.engine().unwrap();
    let request = v1::GetRequest { key: "key".into(), read: None };
    let last = engine.get(request, client.deadline()).await.unwrap().kv.unwrap().mod_revision;
    let request = WatchRequest::key("key").from((last - 1).into()).previous();
    let mut events = client.watch_events(request).await.unwrap();
    for (value, revision) in [("2", last - 1), ("3", last)] {
        let event = within_patience(events.recv()).await.unwrap();
        let (kv, previous) = (event.kv.unwrap(), event.previous.unwrap());
        assert_eq!((&kv.value[..], kv.mod_revision, previous.mod_revision), (value.as_bytes(), revision, revision - 1));
    }
    fleet.stop().await;
}

/// Applications in processes of their own look at `is_leader` all the time. The leader is stopped until another one
/// leads, and goes on as if no time had passed: it must not have believed to lead for a moment after that.
#[tokio::test(flavor = "multi_thread")]
async fn a_paused_leader_stops_believing_in_itself() {
    let shape = Shape { embedding: true, ..Shape::default() };
    let mut cluster = Cluster::prepare(shape).await;
    cluster.start_all().await;
    for _ in 0..3 {
        let paused = cluster.leader(&[]).await;
        cluster.node_mut(paused).process().pause();
        cluster.leader(&[paused]).await;
        cluster.node_mut(paused).process().resume();
        cluster.node_mut(paused).ready().await;
    }
    for id in 1..=3 {
        cluster.node_mut(id).stop().await;
    }
    let claims = cluster.nodes().iter().flat_map(|node| Claim::all(&node.output()).collect::<Vec<_>>());
    // Nothing can change the notifier of a process that stands still.
    let claims: Vec<Claim> = claims.filter(|claim| claim.by != Claim::NOTIFIER).collect();
    Claim::check(&claims, 3);
}
