//! Locks and elections on a fake store, whose leases end when a test ends them.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "support/fake_store.rs"]
mod fake_store;

use std::time::Duration;

use d_engine_client::{ErrorKind, LockGuard, Revision};
use d_engine_proto::v1;
use fake_store::{FakeStore, StoreNode, client, delete, eventually, nodes, put, soon};

fn places(store: &FakeStore) -> Vec<v1::KeyValue> {
    let mut places = store.list(&v1::KeyRange::default(), store.revision());
    places.sort_by_key(|kv| kv.create_revision);
    places
}

async fn acquire(nodes: &[StoreNode]) -> LockGuard {
    soon("the lock", client(nodes).lock("l").acquire()).await.unwrap()
}

#[tokio::test]
async fn a_lock_passes_on_in_the_order_of_asking_and_wakes_one_at_a_time() {
    let store = FakeStore::new();
    let nodes = nodes(1, &store);
    let first = acquire(&nodes).await;
    let mut waiting = Vec::new();
    for count in 2..=6 {
        let client = client(&nodes);
        waiting.push(tokio::spawn(async move { client.lock("l").acquire().await }));
        eventually("it is in the queue", || places(&store).len() == count).await;
        eventually("it waits", || nodes[0].seen(|script| script.creates.len()) == count - 1).await;
    }
    let (mut token, mut held) = (first.token(), first);
    for next in waiting {
        assert!(held.is_held());
        let lists = nodes[0].seen(|script| script.lists);
        soon("the release", held.release()).await.unwrap();
        held = soon("the next holder", next).await.unwrap().unwrap();
        assert!(held.token() > token, "{} after {token}", held.token());
        token = held.token();
        assert_eq!(places(&store)[0].create_revision, token.revision.get());
        assert_eq!(nodes[0].seen(|script| script.lists), lists + 1, "more than one claimant was woken");
    }
    drop(held);
    eventually("a dropped lock is released", || places(&store).is_empty() && store.leases().is_empty()).await;
}

#[tokio::test]
async fn a_waiter_whose_predecessor_gives_up_does_not_overtake_the_holder() {
    let store = FakeStore::new();
    let nodes = nodes(1, &store);
    let held = acquire(&nodes).await;
    let mut tasks = Vec::new();
    for count in [2, 3] {
        let client = client(&nodes);
        tasks.push(tokio::spawn(async move { client.lock("l").acquire().await }));
        eventually("it is in the queue", || places(&store).len() == count).await;
    }
    eventually("both wait", || nodes[0].seen(|script| script.creates.len()) == 2).await;
    let lists = nodes[0].seen(|script| script.lists);
    let last = tasks.pop().unwrap();
    tasks.pop().unwrap().abort();
    eventually("a cancelled claim is withdrawn", || places(&store).len() == 2 && store.leases().len() == 2).await;
    eventually("the last one looks again", || nodes[0].seen(|script| script.lists) > lists).await;
    eventually("the last one waits again", || nodes[0].seen(|script| script.creates.len()) == 3).await;
    assert!(held.is_held() && !last.is_finished());
    held.release().await.unwrap();
    assert!(soon("the last one", last).await.unwrap().unwrap().is_held());
}

#[tokio::test]
async fn an_attempt_takes_a_free_lock_and_leaves_no_trace_at_a_taken_one() {
    let store = FakeStore::new();
    let nodes = nodes(1, &store);
    let lock = client(&nodes).lock("l").value("me");
    let held = lock.clone().try_acquire().await.unwrap().unwrap();
    assert_eq!(places(&store)[0].value, "me");
    assert!(lock.clone().try_acquire().await.unwrap().is_none());
    assert_eq!((places(&store).len(), store.leases().len()), (1, 1));
    let error = lock.timeout(Duration::from_millis(200)).acquire().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeadlineExceeded, "{error}");
    eventually("the claim that ran out of time is withdrawn", || store.leases().len() == 1).await;
    assert!(held.is_held());
}

#[tokio::test]
async fn keys_below_the_name_that_are_no_claims_are_in_nobodys_way() {
    let store = FakeStore::new();
    store.apply(&[put("l/notes", "x"), put("l/sub/00000000000000aa", "x"), put("l", "x")]);
    let nodes = nodes(1, &store);
    assert!(client(&nodes).lock("l").try_acquire().await.unwrap().is_some());
}

#[tokio::test]
async fn a_claim_whose_lease_ends_while_it_waits_fails() {
    let store = FakeStore::new();
    let nodes = nodes(1, &store);
    let held = acquire(&nodes).await;
    let waiting = tokio::spawn({
        let client = client(&nodes);
        async move { client.lock("l").ttl(Duration::from_secs(2)).acquire().await }
    });
    eventually("it is in the queue", || places(&store).len() == 2).await;
    let lease = places(&store)[1].lease;
    store.end_lease(lease);
    let error = soon("the claim", waiting).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LeaseNotFound, "{error}");
    assert!(held.is_held());
}

#[tokio::test]
async fn a_holder_out_of_contact_stops_believing_and_its_token_is_smaller_than_the_next() {
    let store = FakeStore::new();
    let nodes = nodes(1, &store);
    let held = client(&nodes).lock("l").ttl(Duration::from_secs(2)).acquire().await.unwrap();
    let next = tokio::spawn({
        let client = client(&nodes);
        async move { client.lock("l").acquire().await }
    });
    eventually("the next one waits", || places(&store).len() == 2).await;
    nodes[0].set(|script| script.deaf = true);
    soon("the loss", held.lost()).await;
    assert!(!held.is_held());
    assert_eq!(held.remaining(), Duration::ZERO);
    store.end_lease(held.lease().get());
    let next = soon("the next holder", next).await.unwrap().unwrap();
    assert!(next.token() > held.token());
}

#[tokio::test]
async fn a_lock_whose_key_is_deleted_by_hand_is_lost() {
    let store = FakeStore::new();
    let nodes = nodes(1, &store);
    let held = acquire(&nodes).await;
    let key = String::from_utf8(places(&store)[0].key.to_vec()).unwrap();
    store.apply(&[delete(&key)]);
    // Also if that is history by the time somebody asks.
    store.apply(&[put("x", "1")]);
    store.compact(store.revision());
    soon("the loss", held.lost()).await;
}

#[tokio::test]
async fn leaders_follow_each_other_and_observers_hear_the_last_word_of_each() {
    let store = FakeStore::new();
    let nodes = nodes(1, &store);
    let election = client(&nodes).election("e");
    let mut observer = election.observe().await.unwrap();
    let mut heard = async || soon("news", observer.next()).await.unwrap().unwrap();
    assert_eq!(heard().await, None);
    assert_eq!(election.leader().await.unwrap(), None);

    let first = soon("the campaign", election.campaign("a")).await.unwrap();
    let leader = heard().await.unwrap();
    assert_eq!((&leader.value[..], leader.token), (&b"a"[..], first.token()));
    assert_eq!(election.leader().await.unwrap(), Some(leader));

    let second = tokio::spawn({
        let election = client(&nodes).election("e");
        async move { election.campaign("b").await }
    });
    eventually("the second candidate waits", || places(&store).len() == 2).await;
    first.proclaim("a again").await.unwrap();
    first.proclaim("a at last").await.unwrap();
    loop {
        let leader = heard().await.unwrap();
        assert_eq!(leader.token, first.token(), "a candidate was taken for the leader");
        if leader.value == "a at last" {
            break;
        }
    }
    let token = first.token();
    first.resign().await.unwrap();
    let second = soon("the succession", second).await.unwrap().unwrap();
    let leader = heard().await.unwrap();
    assert_eq!((&leader.value[..], leader.token), (&b"b"[..], second.token()));
    assert!(second.token() > token && second.is_leader());

    store.end_lease(second.lease().get());
    assert_eq!(heard().await, None);
    let error = second.proclaim("still me").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LeaseNotFound, "{error}");
    assert!(places(&store).is_empty(), "a deposed leader was heard");
    soon("the loss", second.lost()).await;
    assert_eq!(second.resign().await.unwrap_err().kind(), ErrorKind::LeaseNotFound);
}

#[tokio::test]
async fn a_lock_in_a_namespace_is_another_lock() {
    let store = FakeStore::new();
    let nodes = nodes(1, &store);
    let _held = acquire(&nodes).await;
    let other = client(&nodes).namespace("tenant/").lock("l").try_acquire().await.unwrap().unwrap();
    assert!(places(&store).iter().any(|kv| kv.key.starts_with(b"tenant/l/")));
    assert!(other.token().revision > Revision(1));
}
