//! Watches against nodes that break off wherever they can: nothing is lost, nothing comes twice, nothing is torn.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "support/fake_store.rs"]
mod fake_store;

use std::collections::VecDeque;
use std::time::Duration;

use d_engine_client::{Client, ErrorKind, KeyRange, KeyValue, Revision, WatchEvent, WatchStream, WatchUpdate};
use d_engine_proto::{ErrorCode, v1};
use fake_store::{Break, FakeStore, How, StoreNode, client, delete, eventually, introduce, nodes, put, soon};

const EVERY_HOW: [How; 6] = [
    How::End,
    How::Garble,
    How::Refuse,
    How::EndWatches(ErrorCode::Unavailable),
    How::EndWatches(ErrorCode::Cancelled),
    How::EndWatches(ErrorCode::ResourceExhausted),
];

/// Compares what a watch delivers with what happened.
struct Validator<'a> {
    store: &'a FakeStore,
    create: v1::WatchCreate,
    cursor: u64,
    context: String,
}

impl<'a> Validator<'a> {
    fn new(store: &'a FakeStore, range: &KeyRange, cursor: u64, context: impl Into<String>) -> Self {
        let range = Some(range.clone().into());
        let create = v1::WatchCreate { range, shared: true, ..v1::WatchCreate::default() };
        Self { store, create, cursor, context: context.into() }
    }

    fn take(&mut self, update: &WatchUpdate) {
        let Self { store, create, cursor, context } = self;
        let revision = update.revision.get();
        assert!(revision > *cursor, "{context}: {revision} comes after {cursor}");
        let happened = (*cursor + 1..=revision).flat_map(|revision| store.events(create, revision));
        let happened: Vec<_> = happened.map(from_wire).collect();
        assert_eq!(update.events, happened, "{context}: between {cursor} and {revision}");
        *cursor = revision;
    }

    /// Reads on until everything up to `revision` was delivered.
    async fn read_to(&mut self, watch: &mut WatchStream, revision: u64) {
        while self.cursor < revision {
            let update = soon(&format!("{}: a watch at {}", self.context, self.cursor), watch.next()).await;
            self.take(&update.unwrap().unwrap());
            assert_eq!(watch.cursor().get(), self.cursor);
        }
    }
}

fn from_wire(event: v1::WatchEvent) -> WatchEvent {
    let (kind, kv, previous) = (event.kind(), KeyValue::from(event.kv.unwrap()), event.previous.map(KeyValue::from));
    match kind {
        v1::watch_event::Kind::Put => WatchEvent::Put { kv, previous },
        _ => WatchEvent::Delete { key: kv.key, revision: kv.mod_revision, previous },
    }
}

/// Eight revisions of which some have several events and some none below `k`.
fn eventful() -> FakeStore {
    let store = FakeStore::new();
    store.apply(&[put("k/a", "1")]);
    store.apply(&[put("k/a", "2"), put("k/b", "1"), put("x", "1"), put("k/c", "1")]);
    store.apply(&[put("x", "2")]);
    store.apply(&[delete("k/b"), put("k/d", "1")]);
    store.apply(&[delete("x")]);
    store.apply(&[put("k/b", "2")]);
    store.apply(&[delete("k/a"), delete("k/b"), delete("k/c"), delete("k/d")]);
    store.apply(&[put("k/z", "last")]);
    store
}

fn below_k() -> KeyRange {
    KeyRange::prefix("k/")
}

#[tokio::test]
async fn a_break_at_any_answer_neither_loses_nor_repeats_nor_tears() {
    let store = eventful();
    let nodes = nodes(2, &store);
    let client = client(&nodes);
    for (how, repeats) in EVERY_HOW.into_iter().flat_map(|how| [(how, 0), (how, 2)]) {
        for after in 0..20 {
            for node in &nodes {
                node.set(|script| {
                    (script.events_max, script.bookmarks, script.repeats) = (1, true, repeats);
                    script.breaks = VecDeque::from([Break { after, how }]);
                });
            }
            let context = format!("{how:?} after {after} answers, {repeats} revisions repeated");
            let mut watch =
                soon(&context, client.watch_range(below_k()).from(Revision(1)).into_future()).await.unwrap();
            Validator::new(&store, &below_k(), 0, &context).read_to(&mut watch, 8).await;
            let broken = nodes.iter().any(|node| node.seen(|script| script.breaks.is_empty()));
            assert!(broken, "{context}: no node was asked");
        }
    }
    assert!(client.stats().watch_resumes > 100, "{:?}", client.stats());
}

#[tokio::test]
async fn filters_and_previous_values_hold_across_breaks() {
    let store = eventful();
    let nodes = nodes(1, &store);
    let client = client(&nodes);
    type Filter = (fn(d_engine_client::Watch) -> d_engine_client::Watch, fn(&mut v1::WatchCreate));
    let filters: [Filter; 3] = [
        (d_engine_client::Watch::previous, |create| create.previous = true),
        (d_engine_client::Watch::puts_only, |create| create.no_deletes = true),
        (|watch| watch.puts_only().deletes_only(), |create| create.no_puts = true),
    ];
    for (build, filter) in filters {
        nodes[0].set(|script| {
            script.breaks = VecDeque::from([Break { after: 3, how: How::Garble }]);
            (script.events_max, script.bookmarks) = (1, true);
            script.creates.clear();
        });
        let mut watch = build(client.watch_prefix("k/").from(Revision(1))).await.unwrap();
        let mut validator = Validator::new(&store, &below_k(), 0, "filtered");
        filter(&mut validator.create);
        validator.read_to(&mut watch, 8).await;
        for create in nodes[0].seen(|script| script.creates.clone()) {
            assert_eq!(v1::WatchCreate { from_revision: 0, ..create }, validator.create);
        }
    }
}

#[tokio::test]
async fn a_watch_from_now_loses_nothing_if_it_breaks_before_its_first_event() {
    let store = eventful();
    let nodes = nodes(2, &store);
    let client = client(&nodes);
    for node in &nodes {
        node.set(|script| script.breaks = VecDeque::from([Break { after: 1, how: How::Garble }]));
    }
    let mut watch = client.watch_range(below_k()).await.unwrap();
    assert_eq!(watch.cursor(), Revision(8));
    store.apply(&[put("k/a", "while nobody listens")]);
    store.apply(&[put("k/a", "nor now")]);
    Validator::new(&store, &below_k(), 8, "from now").read_to(&mut watch, 10).await;
    let asked: Vec<_> = nodes
        .iter()
        .flat_map(|node| node.seen(|script| script.creates.clone()))
        .map(|create| create.from_revision)
        .collect();
    assert!(asked.len() > 1 && asked.iter().filter(|from| **from == 0).count() == 1, "{asked:?}");
}

#[tokio::test]
async fn random_faults_change_nothing_about_what_is_delivered() {
    for _ in 0..8 {
        let seed = fastrand::u64(..);
        let mut rng = fastrand::Rng::with_seed(seed);
        let store = FakeStore::new();
        let nodes = nodes(3, &store);
        let client = client(&nodes);
        let mut watches = Vec::new();
        for prefix in ["", "k", "k1", "none/"] {
            let range = KeyRange::prefix(prefix);
            let watch = client.watch_range(range.clone()).from(Revision(1)).await.unwrap();
            watches.push((watch, Validator::new(&store, &range, 0, format!("seed {seed}, {prefix:?}"))));
        }
        for _ in 0..60 {
            for node in &nodes {
                let mut random = |count| (0..count).map(|_| rng.usize(0..4)).sum::<usize>();
                let (after, behind, events_max, repeats) =
                    (random(5), random(2) as u64, 1 + random(1), random(1) as u64);
                let how = EVERY_HOW[rng.usize(0..EVERY_HOW.len())];
                node.set(|script| {
                    script.breaks = VecDeque::from([Break { after, how }]);
                    script.applied_max = store.revision() + 5 - behind.min(5);
                    (script.events_max, script.repeats, script.bookmarks) = (events_max, repeats, true);
                });
            }
            for _ in 0..rng.usize(0..5) {
                let changes: Vec<_> = (0..rng.usize(1..4))
                    .map(|at| {
                        let key = format!("k{at}{}", rng.usize(0..3));
                        if rng.usize(0..3) == 0 { delete(&key) } else { put(&key, "v") }
                    })
                    .collect();
                store.apply(&changes);
            }
            // Readers that come and go, and give up in the middle of waiting.
            for (watch, validator) in &mut watches {
                let patience = Duration::from_micros(rng.u64(0..2000));
                if let Ok(update) = tokio::time::timeout(patience, watch.next()).await {
                    validator.take(&update.unwrap().unwrap());
                }
            }
        }
        for node in &nodes {
            node.set(|script| {
                script.breaks.clear();
                script.applied_max = u64::MAX;
            });
        }
        let end = store.apply(&[put("k", "end"), put("k1", "end"), put("none/", "end")]);
        for (watch, validator) in &mut watches {
            validator.read_to(watch, end).await;
        }
    }
}

#[tokio::test]
async fn a_watch_outlasts_the_death_of_every_node() {
    let store = eventful();
    let mut running = nodes(2, &store);
    let client = client(&running);
    let mut watch = client.watch_range(below_k()).from(Revision(1)).await.unwrap();
    let mut validator = Validator::new(&store, &below_k(), 0, "outage");
    validator.read_to(&mut watch, 8).await;
    let addresses: Vec<_> = running.iter().map(|node| node.address.clone()).collect();
    running.clear();
    let refreshes = client.stats().refreshes;
    tokio::select! {
        update = watch.next() => panic!("{update:?} from nobody"),
        () = eventually("the outage was noticed", || client.stats().refreshes > refreshes + 3) => {}
    }
    let end = store.apply(&[put("k/a", "after the outage")]);
    let mut restarted: Vec<_> =
        (1..).zip(&addresses).map(|(id, address)| StoreNode::start_at(id, &store, address)).collect();
    introduce(&restarted);
    validator.read_to(&mut watch, end).await;
    drop(restarted.remove(0));
    let end = store.apply(&[put("k/a", "one is left")]);
    validator.read_to(&mut watch, end).await;
}

#[tokio::test]
async fn a_resume_on_a_node_that_is_behind_waits_for_it() {
    let store = eventful();
    let mut running = nodes(1, &store);
    let client = client(&running);
    let mut watch = client.watch_range(below_k()).from(Revision(1)).await.unwrap();
    let mut validator = Validator::new(&store, &below_k(), 0, "behind");
    validator.read_to(&mut watch, 8).await;
    let address = running.remove(0).address.clone();
    let restarted = StoreNode::start_at(1, &store, &address);
    restarted.set(|script| script.applied_max = 6);
    let end = store.apply(&[put("k/a", "ahead of the node")]);
    tokio::select! {
        update = watch.next() => panic!("{update:?} from a node that is behind"),
        () = eventually("it is asked for what follows", || {
            restarted.seen(|script| script.creates.iter().any(|create| create.from_revision == 9))
        }) => {}
    }
    restarted.set(|script| script.applied_max = u64::MAX);
    store.compact(1);
    validator.read_to(&mut watch, end).await;
}

#[tokio::test]
async fn a_future_start_waits_for_its_revision() {
    let store = eventful();
    let nodes = nodes(1, &store);
    nodes[0].set(|script| script.bookmarks = true);
    let mut watch = client(&nodes).watch_range(below_k()).from(Revision(11)).await.unwrap();
    for _ in 9..=12 {
        store.apply(&[put("k/a", "now")]);
    }
    Validator::new(&store, &below_k(), 10, "future").read_to(&mut watch, 12).await;
}

#[tokio::test]
async fn what_was_compacted_is_reported_with_the_oldest_revision_left() {
    let store = eventful();
    store.compact(5);
    let nodes = nodes(2, &store);
    let client = client(&nodes);
    let error = client.watch_range(below_k()).from(Revision(4)).await.unwrap_err();
    assert_eq!((error.kind(), error.revision()), (ErrorKind::Compacted, Some(Revision(5))), "{error}");

    let mut watch = client.watch_range(below_k()).from(Revision(5)).await.unwrap();
    Validator::new(&store, &below_k(), 4, "compacted").read_to(&mut watch, 8).await;
    for node in &nodes {
        // Whoever serves the watch has not seen the next revision yet when it is compacted away.
        node.set(|script| script.applied_max = 8);
    }
    for _ in 9..=12 {
        store.apply(&[put("k/a", "v")]);
    }
    store.compact(12);
    let error = soon("a watch behind compaction", watch.next()).await.unwrap().unwrap_err();
    assert_eq!((error.kind(), error.revision()), (ErrorKind::Compacted, Some(Revision(12))), "{error}");
    assert!(soon("the end", watch.next()).await.is_none());
    assert_eq!(watch.cursor(), Revision(8));
}

#[tokio::test]
async fn what_no_node_can_mend_ends_a_watch() {
    let store = eventful();
    let nodes = nodes(1, &store);
    let client = client(&nodes);
    for code in [ErrorCode::InvalidArgument, ErrorCode::Unsupported, ErrorCode::WrongCluster] {
        for after in [0, 1] {
            nodes[0].set(|script| {
                script.breaks = VecDeque::from([Break { after, how: How::EndWatches(code) }]);
            });
            let opened = client.watch_range(below_k()).from(Revision(1)).await;
            let error = match opened {
                Ok(mut watch) => soon("the end", watch.next()).await.unwrap().unwrap_err(),
                Err(error) => error,
            };
            assert_eq!(error.kind().name(), code.name());
        }
    }
}

#[tokio::test]
async fn a_node_of_another_epoch_ends_a_watch() {
    let store = eventful();
    let nodes = nodes(1, &store);
    let client = client(&nodes);
    nodes[0].set(|script| script.breaks = VecDeque::from([Break { after: 2, how: How::Garble }]));
    let mut watch = client.watch_range(below_k()).from(Revision(1)).await.unwrap();
    nodes[0].set(|script| script.header.epoch += 1);
    let mut validator = Validator::new(&store, &below_k(), 0, "foreign");
    let error = loop {
        match soon("the end", watch.next()).await.unwrap() {
            Ok(update) => validator.take(&update),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::WrongCluster, "{error}");
    assert!(validator.cursor <= 1, "events of another epoch were delivered");
}

#[tokio::test]
async fn all_watches_of_a_client_share_one_stream_that_ends_with_the_last() {
    let store = eventful();
    let nodes = nodes(3, &store);
    let client = client(&nodes);
    let mut watches = Vec::new();
    for _ in 0..50 {
        watches.push(client.watch_range(below_k()).from(Revision(1)).await.unwrap());
    }
    let open = || nodes.iter().map(|node| node.seen(|script| script.open_streams)).sum::<usize>();
    let cancels = || nodes.iter().map(|node| node.seen(|script| script.cancels)).sum::<usize>();
    assert_eq!(open(), 1);
    for watch in &mut watches {
        Validator::new(&store, &below_k(), 0, "shared").read_to(watch, 8).await;
    }
    watches.truncate(20);
    eventually("dropped watches are cancelled", || cancels() == 30).await;
    let end = store.apply(&[put("k/a", "v")]);
    for watch in &mut watches {
        Validator::new(&store, &below_k(), 8, "shared").read_to(watch, end).await;
    }
    drop(watches);
    eventually("the stream is closed", || open() == 0).await;
}

#[tokio::test]
async fn a_reader_that_does_not_read_delays_nobody_and_loses_nothing() {
    let store = FakeStore::new();
    let nodes = nodes(1, &store);
    let client = client(&nodes);
    let everything = KeyRange::all();
    let mut idle = client.watch_range(everything.clone()).from(Revision(1)).await.unwrap();
    let mut busy = client.watch_range(everything.clone()).from(Revision(1)).await.unwrap();
    let mut validator = Validator::new(&store, &everything, 0, "busy");
    let big = "x".repeat(256 << 10);
    for revision in 1..=64 {
        store.apply(&[put("k", &big)]);
        validator.read_to(&mut busy, revision).await;
    }
    eventually("the idle watch is given up", || nodes[0].seen(|script| script.cancels) == 1).await;
    let sent_to_idle = nodes[0].seen(|script| script.sent) - 64;
    assert!(sent_to_idle < 40, "{sent_to_idle} of 64 events of 256 KiB each wait for a reader");
    Validator::new(&store, &everything, 0, "idle").read_to(&mut idle, 64).await;
    assert_eq!(client.stats().watch_resumes, 1 + u64::from(nodes[0].seen(|script| script.cancels) > 1));
}

#[tokio::test]
async fn a_node_that_does_not_answer_is_left_for_another() {
    let store = eventful();
    let nodes = nodes(2, &store);
    nodes[0].set(|script| script.mute = true);
    let client = Client::builder().endpoints([nodes[0].address.clone()]).build().unwrap();
    let mut watch = soon("opening", client.watch_range(below_k()).from(Revision(1)).into_future()).await.unwrap();
    Validator::new(&store, &below_k(), 0, "mute").read_to(&mut watch, 8).await;
}

#[tokio::test]
async fn opening_ends_at_its_timeout_and_says_why() {
    let store = eventful();
    let nodes = nodes(1, &store);
    nodes[0].set(|script| script.mute = true);
    let opening = client(&nodes).watch_range(below_k()).timeout(Duration::from_millis(400));
    let error = soon("opening", opening.into_future()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeadlineExceeded, "{error}");
    assert_eq!(error.endpoint(), Some(&nodes[0].address[..]));

    let nobody = Client::builder().endpoints(["127.0.0.1:1"]).build().unwrap();
    let error = nobody.watch("k").timeout(Duration::from_millis(300)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
}

#[tokio::test]
async fn a_watch_in_a_namespace_sees_its_keys_without_the_prefix() {
    let store = eventful();
    let nodes = nodes(1, &store);
    let space = client(&nodes).namespace("k/");
    let mut watch = space.watch_range(KeyRange::all()).from(Revision(1)).previous().await.unwrap();
    let mut keys = Vec::new();
    while watch.cursor() < Revision(8) {
        for event in watch.next().await.unwrap().unwrap().events {
            let previous = event.previous().map(|kv| kv.key.clone());
            assert!(previous.is_none_or(|key| key == event.key()), "{event:?}");
            keys.push(event.key().clone());
        }
    }
    assert_eq!(keys, ["a", "a", "b", "c", "b", "d", "b", "a", "b", "c", "d", "z"]);
    let mut one = space.watch("b").from(Revision(1)).await.unwrap();
    assert_eq!(one.next().await.unwrap().unwrap().events[0].key(), "b");
    assert_eq!(space.watch("").await.unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[tokio::test]
async fn closing_the_client_ends_its_watches() {
    let store = eventful();
    let nodes = nodes(1, &store);
    let client = client(&nodes);
    let mut watch = client.watch_range(below_k()).await.unwrap();
    client.close();
    let error = soon("the end", watch.next()).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    assert!(watch.next().await.is_none());
    assert_eq!(client.watch("k").await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn a_watch_goes_on_when_its_client_is_dropped() {
    let store = eventful();
    let nodes = nodes(1, &store);
    let mut watch = client(&nodes).watch_range(below_k()).await.unwrap();
    nodes[0].set(|script| script.breaks = VecDeque::from([Break { after: 0, how: How::End }]));
    let end = store.apply(&[put("k/a", "v")]);
    Validator::new(&store, &below_k(), 8, "dropped").read_to(&mut watch, end).await;
}
