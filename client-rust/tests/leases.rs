//! Leases, their keeper and namespaces against nodes that fail.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::time::Duration;

use d_engine_client::{Client, ErrorKind, KeyRange, LeaseId, LeaseKeeper, LeaseState};
use support::{Behaviour, PATIENCE, client, cluster, elect, eventually};

/// Long enough to be renewed at leisure, short enough to be lost within a test.
const TTL: Duration = Duration::from_millis(900);

async fn keeper(client: &Client) -> LeaseKeeper {
    tokio::time::timeout(PATIENCE, client.keep_lease(TTL).into_future()).await.unwrap().unwrap()
}

async fn lost(keeper: &LeaseKeeper) {
    tokio::time::timeout(PATIENCE, keeper.lost()).await.unwrap();
    assert_eq!((keeper.state(), keeper.is_alive()), (LeaseState::Lost, false));
    assert_eq!(keeper.remaining(), Duration::ZERO);
}

#[tokio::test]
async fn a_lease_lives_its_life() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    let granted = client.grant_lease(Duration::from_secs(9)).id(LeaseId(77)).await.unwrap();
    assert_eq!((granted.lease, granted.ttl), (LeaseId(77), Duration::from_secs(9)));
    let taken = client.grant_lease(TTL).id(LeaseId(77)).await.unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::LeaseExists);
    for key in ["b", "a"] {
        assert_eq!(client.put(key, "v").lease(LeaseId(77)).await.unwrap().lease, Some(LeaseId(77)));
    }
    assert_eq!(client.renew_lease(LeaseId(77)).await.unwrap().ttl, Duration::from_secs(9));
    let left = client.lease_time_to_live(LeaseId(77)).keys().await.unwrap();
    assert_eq!((left.key_count, left.keys), (2, vec!["a".into(), "b".into()]));
    for _ in 0..4 {
        client.grant_lease(TTL).await.unwrap();
    }
    let all = client.leases().all().await.unwrap();
    assert_eq!(all.iter().map(|lease| lease.lease).collect::<Vec<_>>().len(), 5);
    assert_eq!(all.last().unwrap().key_count, 2);
    assert_eq!(client.revoke_lease(LeaseId(77)).await.unwrap().deleted, 2);
    assert_eq!(client.get("a").await.unwrap().kv, None);
    assert_eq!(client.revoke_lease(LeaseId(77)).await.unwrap_err().kind(), ErrorKind::LeaseNotFound);
    assert_eq!(client.renew_lease(LeaseId(77)).await.unwrap_err().kind(), ErrorKind::LeaseNotFound);
}

#[tokio::test]
async fn a_keeper_renews_through_whoever_leads() {
    let nodes = cluster(3);
    let client = client(&[&nodes[0]], PATIENCE);
    let keeper = keeper(&client).await;
    assert_eq!(keeper.ttl(), TTL);
    eventually("the first leader was asked", || nodes[0].renewals() > 1).await;
    elect(&nodes, 1, 2);
    eventually("the second leader was asked", || nodes[1].renewals() > 1).await;
    // The leader falls silent, and another one is elected.
    nodes[1].behave(Behaviour::Silent);
    let before = nodes[1].renewals();
    eventually("a renewal is not answered", || nodes[1].renewals() > before).await;
    elect(&nodes, 2, 3);
    eventually("the third leader was asked", || nodes[2].renewals() > 1).await;
    assert_eq!(keeper.state(), LeaseState::Alive);
}

#[tokio::test]
async fn a_keeper_without_answers_is_suspect_and_then_lost() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    let keeper = keeper(&client).await;
    let mut states = keeper.states();
    assert_eq!(*states.borrow_and_update(), LeaseState::Alive);
    nodes[0].behave(Behaviour::Silent);
    tokio::time::timeout(PATIENCE, states.changed()).await.unwrap().unwrap();
    assert_eq!(*states.borrow_and_update(), LeaseState::Suspect);
    lost(&keeper).await;
    // Whatever the servers say from now on.
    nodes[0].behave(Behaviour::Serve);
    client.put("k", "v").await.unwrap();
    assert_eq!(keeper.state(), LeaseState::Lost);
    assert_eq!(nodes[0].store().lock().granted, 1, "it is never granted again");
}

#[tokio::test]
async fn a_keeper_recovers_from_a_pause_of_the_servers() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    let keeper = client.keep_lease(Duration::from_secs(6)).await.unwrap();
    let mut states = keeper.states();
    nodes[0].behave(Behaviour::Silent);
    let suspect = states.wait_for(|state| *state == LeaseState::Suspect);
    tokio::time::timeout(PATIENCE, suspect).await.unwrap().unwrap();
    assert!(keeper.is_alive());
    nodes[0].behave(Behaviour::Serve);
    let alive = states.wait_for(|state| *state == LeaseState::Alive);
    tokio::time::timeout(PATIENCE, alive).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_lease_that_does_not_exist_is_lost_at_once() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    let keeper = client.keep_lease(Duration::from_secs(3)).await.unwrap();
    nodes[0].store().lock().leases.clear();
    let states = keeper.states();
    lost(&keeper).await;
    assert_eq!(*states.borrow(), LeaseState::Lost);
    assert_eq!(nodes[0].renewals(), 1, "the first renewal told, long before the deadline");
}

#[tokio::test]
async fn a_keeper_stops_when_it_is_dropped_and_is_lost_when_its_client_closes_or_it_revokes() {
    let nodes = cluster(1);
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let client = client(&[&nodes[0]], PATIENCE);
    drop(keeper(&client).await);
    let revoked = keeper(&client).await;
    revoked.revoke().await.unwrap();
    lost(&revoked).await;
    assert_eq!(nodes[0].store().lock().leases.len(), 1, "only the dropped one is left to end by itself");
    let closed = keeper(&client).await;
    client.close();
    lost(&closed).await;
    eventually("nothing is left running", || tasks() == 0).await;
}

#[tokio::test]
async fn a_namespace_shows_its_own_keys_only_and_without_the_prefix() {
    let nodes = cluster(1);
    let root = client(&[&nodes[0]], PATIENCE);
    // The last key that a byte can end on, so that the interval has no next prefix of the same length.
    let prefix = &b"a\xff"[..];
    let inner = root.namespace(&b"a"[..]).namespace(&b"\xff"[..]);
    for key in [&b"a"[..], b"a\xfe", b"a\xff", b"b"] {
        root.put(key, "outside").await.unwrap();
    }
    let keys = [&b"\0"[..], b"k", b"\xff", b"\xff\xff"];
    for key in keys {
        inner.put(key, key).await.unwrap();
        let full = [prefix, key].concat();
        assert_eq!(root.get(&full).await.unwrap().into_value().unwrap(), key);
        assert_eq!(inner.get(key).await.unwrap().kv.unwrap().key, key);
    }
    let all = inner.range(KeyRange::all()).all().await.unwrap();
    assert_eq!(all.iter().map(|kv| &kv.key[..]).collect::<Vec<_>>(), keys);
    assert_eq!(inner.range(KeyRange::prefix(&b"\xff"[..])).all().await.unwrap().len(), 2);
    assert_eq!(inner.range(KeyRange::between("a", "l")).all().await.unwrap().len(), 1);
    let many = inner.get_many([&b"\xff"[..], b"nothing", b"k"]).await.unwrap().kvs;
    assert_eq!(many.iter().map(|kv| &kv.key[..]).collect::<Vec<_>>(), [&b"\xff"[..], b"k"]);
    assert_eq!(inner.put("", "v").await.unwrap_err().kind(), ErrorKind::InvalidArgument);

    let lease = root.grant_lease(TTL).await.unwrap().lease;
    inner.put("leased", "v").lease(lease).await.unwrap();
    root.put("leased", "v").lease(lease).await.unwrap();
    let left = inner.lease_time_to_live(lease).keys().await.unwrap();
    assert_eq!((left.key_count, left.keys), (2, vec!["leased".into()]));

    let deleted = inner.delete_range(KeyRange::all()).return_previous().await.unwrap();
    assert_eq!(deleted.previous.last().unwrap().key, &b"\xff\xff"[..]);
    assert_eq!(deleted.deleted, 5);
    assert_eq!(root.range(KeyRange::all()).all().await.unwrap().len(), 5, "what lies outside stays");
}
