//! List-then-watch and local caches against nodes that break off, fall behind and compact.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "support/fake_store.rs"]
mod fake_store;

use std::collections::{BTreeMap, VecDeque};

use d_engine_client::{
    Bytes, CacheChange, CacheState, CacheView, Consistency, ErrorKind, KeyRange, KeyValue, Revision,
};
use d_engine_proto::ErrorCode;
use fake_store::{Break, FakeStore, How, client, delete, eventually, nodes, put, soon};

fn below_k() -> KeyRange {
    KeyRange::prefix("k/")
}

fn list(store: &FakeStore, revision: Revision) -> Vec<KeyValue> {
    store.list(&below_k().into(), revision.get()).into_iter().map(KeyValue::from).collect()
}

/// What the view shows is what the store held at its revision.
fn check(view: &CacheView, store: &FakeStore, context: &str) {
    let held: Vec<_> = view.iter().cloned().collect();
    assert_eq!(held, list(store, view.revision()), "{context}: at {}", view.revision());
    assert_eq!(view.len(), held.len());
}

fn filled() -> FakeStore {
    let store = FakeStore::new();
    for at in 0..5 {
        store.apply(&[put(&format!("k/{at}"), "1"), put(&format!("x/{at}"), "1")]);
    }
    store
}

#[tokio::test]
async fn nothing_is_missed_between_the_list_and_the_watch() {
    let store = filled();
    let nodes = nodes(1, &store);
    nodes[0].set(|script| {
        script.after_list = Some(Box::new(|store| {
            store.apply(&[put("k/0", "2"), delete("k/1")]);
        }));
    });
    let mut snapshot = client(&nodes).watch_from_snapshot(below_k()).previous().await.unwrap();
    assert_eq!((snapshot.revision, snapshot.kvs.clone()), (Revision(5), list(&store, Revision(5))));
    let update = soon("the change in between", snapshot.watch.next()).await.unwrap().unwrap();
    assert_eq!((update.revision, update.events.len()), (Revision(6), 2));
    assert_eq!(update.events[1].previous(), snapshot.kvs.get(1));
}

#[tokio::test]
async fn a_list_that_is_compacted_before_the_watch_begins_is_read_again() {
    let store = filled();
    let nodes = nodes(1, &store);
    nodes[0].set(|script| {
        script.after_list = Some(Box::new(|store| {
            for _ in 0..3 {
                store.apply(&[put("k/0", "2")]);
            }
            store.compact(8);
        }));
    });
    let snapshot = client(&nodes).watch_from_snapshot(below_k()).await.unwrap();
    assert_eq!((snapshot.revision, snapshot.kvs), (Revision(8), list(&store, Revision(8))));
    assert_eq!(nodes[0].seen(|script| script.lists), 2);
}

/// Applies changes to a map as a subscriber would.
fn replay(map: &mut BTreeMap<Bytes, KeyValue>, change: CacheChange, context: &str) {
    let held = map.get(&change.key).cloned();
    assert_eq!(held, change.before, "{context}: {change:?} does not follow what came before");
    match change.after {
        Some(kv) => map.insert(change.key, kv),
        None => map.remove(&change.key),
    };
}

#[tokio::test]
async fn a_cache_is_the_store_at_its_revision_whatever_breaks() {
    for _ in 0..6 {
        let seed = fastrand::u64(..);
        let mut rng = fastrand::Rng::with_seed(seed);
        let context = format!("seed {seed}");
        let store = filled();
        let nodes = nodes(3, &store);
        let client = client(&nodes);
        let cache = client.cache(below_k()).await.unwrap();
        let (start, mut changes) = cache.view_and_changes();
        let mut told: BTreeMap<_, _> = start.iter().map(|kv| (kv.key.clone(), kv.clone())).collect();
        let mut seen = start.revision();
        for _ in 0..60 {
            for node in &nodes {
                let hows = [How::End, How::Garble, How::EndWatches(ErrorCode::Unavailable)];
                let (after, how) = (rng.usize(0..8), hows[rng.usize(0..hows.len())]);
                let (events_max, behind) = (rng.usize(1..4), rng.u64(0..3));
                node.set(|script| {
                    script.breaks = VecDeque::from([Break { after, how }]);
                    (script.events_max, script.bookmarks) = (events_max, true);
                    script.applied_max = store.revision() + 3 - behind;
                });
            }
            for _ in 0..rng.usize(0..6) {
                let changes: Vec<_> = (0..rng.usize(1..4))
                    .map(|at| {
                        let key = format!("{}/{at}{}", if rng.bool() { "k" } else { "x" }, rng.usize(0..3));
                        if rng.usize(0..3) == 0 { delete(&key) } else { put(&key, "v") }
                    })
                    .collect();
                store.apply(&changes);
            }
            if rng.usize(0..6) == 0 {
                store.compact(store.revision());
            }
            tokio::task::yield_now().await;
            let view = cache.view();
            assert!(view.revision() >= seen, "{context}: back from {seen} to {}", view.revision());
            seen = view.revision();
            check(&view, &store, &context);
        }
        for node in &nodes {
            node.set(|script| {
                script.breaks.clear();
                script.applied_max = u64::MAX;
            });
        }
        let end = Revision(store.apply(&[put("k/end", "v")]));
        soon(&context, cache.wait_for(end)).await.unwrap();
        check(&cache.view(), &store, &context);
        assert_eq!(cache.iter().collect::<Vec<_>>(), list(&store, cache.revision()));
        while !told.contains_key(&b"k/end"[..]) {
            replay(&mut told, soon(&context, changes.next()).await.unwrap(), &context);
        }
        assert_eq!(told.into_values().collect::<Vec<_>>(), list(&store, end), "{context}: the changes do not add up");
    }
}

#[tokio::test]
async fn a_cache_behind_compaction_lists_again_and_tells_the_differences() {
    let store = filled();
    let nodes = nodes(1, &store);
    let cache = client(&nodes).cache(below_k()).consistency(Consistency::Eventual).await.unwrap();
    let mut changes = cache.changes();
    nodes[0].set(|script| script.applied_max = 5);
    store.apply(&[delete("k/0")]);
    store.apply(&[put("k/1", "passing")]);
    let end = store.apply(&[put("k/1", "2"), put("k/9", "1")]);
    store.compact(end);
    // The watch has ended, and the node cannot show a list the cache may take until it is further than the cache.
    nodes[0].set(|script| script.applied_max = u64::MAX);
    soon("the second list", cache.wait_for(Revision(end))).await.unwrap();
    check(&cache.view(), &store, "listed again");
    // Else a node that is further behind could take the cache back in time.
    let mut asked = nodes[0].seen(|script| script.min_revisions.clone());
    asked.dedup();
    assert_eq!(asked, [0, 5]);
    let mut told = Vec::new();
    for _ in 0..3 {
        let change = soon("a difference", changes.next()).await.unwrap();
        assert!(change.merged && change.revision == Revision(end), "{change:?}");
        told.push(change.key);
    }
    assert_eq!(told, ["k/0", "k/1", "k/9"]);
}

#[tokio::test]
async fn revisions_become_visible_as_a_whole() {
    let store = filled();
    let nodes = nodes(1, &store);
    nodes[0].set(|script| script.events_max = 1);
    let cache = client(&nodes).cache(below_k()).await.unwrap();
    for round in 0..30 {
        let value = round.to_string();
        let end = Revision(store.apply(&(0..5).map(|at| put(&format!("k/{at}"), &value)).collect::<Vec<_>>()));
        while cache.revision() < end {
            let values: Vec<_> = cache.iter().map(|kv| kv.value).collect();
            assert!(values.windows(2).all(|pair| pair[0] == pair[1]), "half a revision: {values:?}");
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn a_cache_says_whether_it_is_fresh() {
    let store = filled();
    let mut running = nodes(1, &store);
    let client = client(&running);
    let cache = client.cache(below_k()).await.unwrap();
    assert_eq!(cache.state(), CacheState::Fresh);
    let address = running.remove(0).address.clone();
    eventually("it is stale without a node", || cache.state() == CacheState::Stale).await;
    assert_eq!(cache.len(), 5);
    let _restarted = fake_store::StoreNode::start_at(1, &store, &address);
    eventually("it is fresh again", || cache.state() == CacheState::Fresh).await;
    let mut changes = cache.changes();
    client.close();
    eventually("it ends with its client", || cache.state() == CacheState::Ended).await;
    assert_eq!(cache.error().map(|error| error.kind()), Some(ErrorKind::Closed));
    assert_eq!(cache.wait_for(Revision(99)).await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(soon("the end of changes", changes.next()).await, None);
    assert!(cache.get("k/0").is_some(), "what it held stays readable");
}

#[tokio::test]
async fn a_cache_that_is_dropped_ends_its_watch_and_its_changes() {
    let store = filled();
    let nodes = nodes(1, &store);
    let cache = client(&nodes).cache(below_k()).await.unwrap();
    let mut changes = cache.changes();
    let clone = cache.clone();
    drop(cache);
    store.apply(&[delete("k/3")]);
    assert_eq!(soon("a change", changes.next()).await.unwrap().after, None);
    drop(clone);
    assert_eq!(soon("the end of changes", changes.next()).await, None);
    eventually("the stream is closed", || nodes[0].seen(|script| script.open_streams) == 0).await;
}
