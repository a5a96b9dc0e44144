//! Watches as a client sees them, over a real port and with a generated stub.

use d_engine_proto::v1::watch_client::WatchClient;
use d_engine_proto::v1::{self, watch_request::Action, watch_response::Kind};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::*;

/// One stream of watches.
struct Watches {
    requests: mpsc::Sender<v1::WatchRequest>,
    answers: Streaming<v1::WatchResponse>,
}

impl Watches {
    async fn open(node: &Node) -> Self {
        let (requests, received) = mpsc::channel(16);
        let mut client = WatchClient::new(node.channel().await);
        let answers = within(client.watch(ReceiverStream::new(received))).await.unwrap().into_inner();
        Self { requests, answers }
    }

    async fn ask(&self, watch_id: u64, action: Option<Action>) {
        within(self.requests.send(v1::WatchRequest { watch_id, action })).await.unwrap();
    }

    async fn create(&self, watch_id: u64, create: v1::WatchCreate) {
        self.ask(watch_id, Some(Action::Create(create))).await;
    }

    async fn next(&mut self) -> (u64, Kind) {
        let answer = within(self.answers.message()).await.unwrap().expect("an answer");
        (answer.watch_id, answer.kind.expect("a kind"))
    }

    /// The next answer but for bookmarks, which come when they come.
    async fn next_but_bookmarks(&mut self) -> (u64, Kind) {
        loop {
            match self.next().await {
                (_, Kind::Bookmark(_)) => {}
                answer => return answer,
            }
        }
    }

    async fn created(&mut self, watch_id: u64) -> v1::WatchCreated {
        match self.next_but_bookmarks().await {
            (id, Kind::Created(created)) if id == watch_id => created,
            other => panic!("{other:?}"),
        }
    }

    async fn events(&mut self) -> (u64, v1::WatchEvents) {
        match self.next_but_bookmarks().await {
            (id, Kind::Events(events)) => (id, events),
            other => panic!("{other:?}"),
        }
    }

    async fn ended(&mut self, watch_id: u64) -> v1::WatchEnded {
        match self.next_but_bookmarks().await {
            (id, Kind::Ended(ended)) if id == watch_id => ended,
            other => panic!("{other:?}"),
        }
    }
}

fn watch(start: impl Into<Bytes>, end: impl Into<Bytes>) -> v1::WatchCreate {
    let range = Some(v1::KeyRange { start: start.into(), end: end.into() });
    v1::WatchCreate { range, ..v1::WatchCreate::default() }
}

fn code(ended: &v1::WatchEnded) -> Option<ErrorCode> {
    ErrorCode::from_number(ended.error.as_ref()?.code)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_tells_what_changes_and_what_was_there_before() {
    let node = Node::start().await;
    let mut kv = node.kv().await;
    kv.put(put("k", "1")).await.unwrap();
    let mut watches = Watches::open(&node).await;
    watches.create(7, v1::WatchCreate { previous: true, ..watch("k", "l") }).await;
    let created = watches.created(7).await;
    let header = created.header.unwrap();
    assert_eq!((header.revision, header.node_id, created.from_revision), (1, 1, 2));
    kv.put(put("k", "2")).await.unwrap();
    kv.put(put("other", "")).await.unwrap();
    kv.delete(v1::DeleteRequest { key: "k".into(), ..Default::default() }).await.unwrap();

    let (id, events) = watches.events().await;
    let event = &events.events[0];
    assert_eq!((id, events.incomplete, event.kind()), (7, false, v1::watch_event::Kind::Put));
    let [now, before] = [event.kv.as_ref().unwrap(), event.previous.as_ref().unwrap()];
    assert_eq!((&now.value[..], now.mod_revision, now.version, &before.value[..]), (&b"2"[..], 2, 2, &b"1"[..]));
    let (_, events) = watches.events().await;
    let event = &events.events[0];
    assert_eq!(event.kind(), v1::watch_event::Kind::Delete);
    let deleted = v1::KeyValue { key: "k".into(), mod_revision: 4, ..Default::default() };
    assert_eq!((event.kv.as_ref(), &event.previous.as_ref().unwrap().value[..]), (Some(&deleted), &b"2"[..]));

    let text = node.metrics.encode(&Figures::default()).unwrap();
    assert!(text.contains("d_engine_watches 1") && text.contains("d_engine_watch_events_total 2"), "{text}");
}

/// Watches that agree to it have the events that they share in one answer; others have answers of their own. Each gets
/// every event once and in order, also the last ones of a watch that is cancelled meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn watches_that_agree_to_it_share_answers() {
    const WATCHES: u64 = 2000;
    const PUTS: u64 = 20;
    let node = Node::start().await;
    let mut watches = Watches::open(&node).await;
    for id in 0..WATCHES {
        // The first ones do not agree.
        watches.create(id, v1::WatchCreate { shared: id >= 3, ..watch("k", "l") }).await;
        watches.created(id).await;
    }
    let mut kv = node.kv().await;
    let mut seen: Vec<Vec<u64>> = vec![Vec::new(); usize::try_from(WATCHES).unwrap()];
    let mut answers = 0;
    for number in 1..=PUTS {
        kv.put(v1::PutRequest { key: format!("k{number}").into(), ..Default::default() }).await.unwrap();
        if number == PUTS / 2 {
            watches.ask(7, Some(Action::Cancel(v1::WatchCancel {}))).await;
        }
    }
    let whole = |id: usize, seen: &[u64]| seen.len() as u64 == PUTS || id == 7;
    let mut ended = false;
    while !ended || !seen.iter().enumerate().all(|(id, seen)| whole(id, seen)) {
        let answer = within(watches.answers.message()).await.unwrap().expect("an answer");
        match answer.kind.expect("a kind") {
            Kind::Events(events) => {
                answers += 1;
                assert!(answer.also.is_empty() || (answer.watch_id >= 3 && answer.also.iter().all(|id| *id >= 3)));
                for id in answer.also.into_iter().chain([answer.watch_id]) {
                    assert!(id != 7 || !ended, "events after the end");
                    let revisions = events.events.iter().map(|event| event.kv.as_ref().unwrap().mod_revision);
                    seen[usize::try_from(id).unwrap()].extend(revisions);
                }
            }
            Kind::Ended(_) => {
                assert_eq!((answer.watch_id, answer.also), (7, Vec::new()));
                ended = true;
            }
            Kind::Created(_) | Kind::Bookmark(_) => assert!(answer.also.is_empty()),
        }
    }
    let all: Vec<u64> = (1..=PUTS).collect();
    for (id, seen) in seen.iter().enumerate() {
        assert_eq!(seen[..], all[..seen.len()], "watch {id}");
    }
    assert!(answers < WATCHES, "{answers} answers: they share none");
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_watches_share_a_stream_and_each_stream_gets_its_own() {
    const WATCHES: u64 = 2000;
    let node = Node::start().await;
    let mut streams = [Watches::open(&node).await, Watches::open(&node).await];
    for watches in &mut streams {
        // Watch 0 has no number on the wire.
        for id in 0..WATCHES {
            watches.create(id, watch(format!("k{id:04}"), format!("k{id:04}\0"))).await;
            watches.created(id).await;
        }
        watches.create(WATCHES, watch("k", "l")).await;
        watches.created(WATCHES).await;
    }
    let mut kv = node.kv().await;
    for id in [0, 1234, 1999] {
        kv.put(v1::PutRequest { key: format!("k{id:04}").into(), ..Default::default() }).await.unwrap();
        for watches in &mut streams {
            let mut ids = [watches.events().await.0, watches.events().await.0];
            ids.sort_unstable();
            assert_eq!(ids, [id, WATCHES]);
        }
    }
    drop(streams);
    let gone = async {
        while !node.metrics.encode(&Figures::default()).unwrap().contains("d_engine_watches 0") {
            tokio::task::yield_now().await;
        }
    };
    within(gone).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_ends_one_watch_and_leaves_the_stream_alone() {
    let node = Node::start().await;
    let mut watches = Watches::open(&node).await;
    for (create, said) in [
        (v1::WatchCreate::default(), "range is missing"),
        (watch("b", "a"), "range ends"),
        (v1::WatchCreate { no_puts: true, no_deletes: true, ..watch("a", "b") }, "no_puts"),
    ] {
        watches.create(1, create).await;
        let ended = watches.ended(1).await;
        assert_eq!(code(&ended), Some(ErrorCode::InvalidArgument));
        assert!(ended.message.contains(said), "{}", ended.message);
    }
    watches.ask(1, None).await;
    assert_eq!(code(&watches.ended(1).await), Some(ErrorCode::InvalidArgument));
    // Nobody knows which of two is meant, so neither goes on.
    watches.create(1, watch("a", "b")).await;
    watches.created(1).await;
    watches.create(1, watch("a", "b")).await;
    assert!(watches.ended(1).await.message.contains("exists already"));

    watches.create(1, watch("a", "b")).await;
    watches.created(1).await;
    node.kv().await.put(put("a", "")).await.unwrap();
    assert_eq!(watches.events().await.0, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_watch_is_answered_once_and_silent_from_then_on() {
    let node = Node::start().await;
    let mut watches = Watches::open(&node).await;
    watches.ask(9, Some(Action::Cancel(v1::WatchCancel {}))).await;
    for id in [1, 2] {
        watches.create(id, watch("a", "b")).await;
        watches.created(id).await;
    }
    watches.ask(1, Some(Action::Cancel(v1::WatchCancel {}))).await;
    assert_eq!(code(&watches.ended(1).await), Some(ErrorCode::Cancelled));
    let mut kv = node.kv().await;
    for _ in 0..2 {
        kv.put(put("a", "")).await.unwrap();
        assert_eq!(watches.events().await.0, 2);
    }
    watches.create(1, v1::WatchCreate { from_revision: 1, ..watch("a", "b") }).await;
    watches.created(1).await;
    assert_eq!(watches.events().await.0, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revision_larger_than_an_answer_comes_in_parts_and_the_next_one_whole() {
    const KEYS: usize = 40;
    let node = Node::start().await;
    let mut kv = node.kv().await;
    for key in 0..KEYS {
        let value = vec![b'v'; 100_000].into();
        kv.put(v1::PutRequest { key: format!("k{key:02}").into(), value, ..Default::default() }).await.unwrap();
    }
    let mut watches = Watches::open(&node).await;
    watches.create(3, v1::WatchCreate { previous: true, ..watch("k", "l") }).await;
    watches.created(3).await;
    let range = Some(v1::KeyRange { start: "k".into(), end: "l".into() });
    kv.delete_range(v1::DeleteRangeRequest { range, ..Default::default() }).await.unwrap();
    let (mut keys, mut parts) = (Vec::new(), 0);
    loop {
        let (id, events) = watches.events().await;
        assert!(id == 3 && events.encoded_len() <= crate::limits::WATCH_FRAME_BYTES_MAX);
        keys.extend(events.events.into_iter().map(|event| event.kv.unwrap().key));
        parts += 1;
        if !events.incomplete {
            break;
        }
    }
    let expected: Vec<_> = (0..KEYS).map(|key| Bytes::from(format!("k{key:02}"))).collect();
    assert_eq!(keys, expected);
    assert!(parts > 3, "{parts}");
    kv.put(put("k", "")).await.unwrap();
    assert_eq!(watches.events().await.1.events.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_stops_ends_its_streams_so_that_clients_go_elsewhere() {
    let node = Node::start().await;
    let mut watches = Watches::open(&node).await;
    watches.create(1, watch("a", "b")).await;
    watches.created(1).await;
    let mut idle = Watches::open(&node).await;
    node.engine.consensus().stop().await;
    node.stop.send(()).unwrap();
    for watches in [&mut watches, &mut idle] {
        let ended = within(watches.answers.message()).await.unwrap_err();
        assert_eq!(details(&ended).code(), Some(ErrorCode::Unavailable));
    }
    drop((watches, idle));
    within(node.serving).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_watches_says_so() {
    let mut config = RaftNodeConfig::default();
    config.raft.watch.enabled = false;
    let node = Node::start_with(&config).await;
    let mut client = WatchClient::new(node.channel().await);
    let refused = within(client.watch(tokio_stream::pending())).await.unwrap_err();
    assert_eq!(details(&refused).code(), Some(ErrorCode::FailedPrecondition));
    assert!(refused.message().contains("raft.watch.enabled"), "{}", refused.message());
}
