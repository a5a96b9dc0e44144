//! Watches on real clusters: resumed anywhere they continue there, slow ones cost nobody anything, and compaction ends
//! only those it must. What faults do to watches is shown by `d-engine-faults`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a failed step ends the test; its numbers are small"
)]

use std::time::{Duration, Instant};

use d_engine_client::{Client, ErrorKind, KeyRange, Revision};
use d_engine_proto::{ErrorCode, v1};
use d_engine_tests::cluster::Cluster;
use d_engine_tests::direct::DirectNode;
use d_engine_tests::seed::seed;
use d_engine_tests::truth::{Change, Held, State, Truth, View};
use d_engine_tests::watched::{Assembler, Watched};
use d_engine_tests::{wait, watchers};
use fastrand::Rng;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use v1::watch_response::Kind;

const DEADLINE: Duration = Duration::from_secs(20);

/// Watches on one stream that go on until they are told otherwise.
struct Stream {
    requests: mpsc::Sender<v1::WatchRequest>,
    answers: Streaming<v1::WatchResponse>,
}

impl Stream {
    async fn open(node: &DirectNode) -> Self {
        let (requests, sent) = mpsc::channel(1024);
        let answers = node.watch().watch(ReceiverStream::new(sent)).await.unwrap().into_inner();
        Self { requests, answers }
    }

    async fn create(&self, watch_id: u64, create: v1::WatchCreate) {
        let action = Some(v1::watch_request::Action::Create(create));
        self.requests.send(v1::WatchRequest { watch_id, action }).await.unwrap();
    }

    async fn next(&mut self) -> (u64, Kind) {
        let answer = tokio::time::timeout(wait::PATIENCE, self.answers.message()).await;
        let answer = answer.expect("the node goes on").unwrap().expect("the stream lasts");
        (answer.watch_id, answer.kind.expect("an answer of a kind"))
    }
}

/// One watch of a stream, and what came of it.
struct Follower {
    watched: Watched,
    assembler: Assembler,
    ended: Option<v1::WatchEnded>,
}

impl Follower {
    fn new(name: String, view: View, from: u64) -> Self {
        Self { watched: Watched::new(name, view, from), assembler: Assembler::default(), ended: None }
    }

    fn take(&mut self, kind: Kind) {
        let delivery = match kind {
            Kind::Created(created) => {
                assert!(self.watched.from == 0 || self.watched.from == created.from_revision);
                self.watched.from = created.from_revision;
                None
            }
            Kind::Events(events) => self.assembler.events(events).unwrap(),
            Kind::Bookmark(bookmark) => Some(self.assembler.bookmark(bookmark.revision).unwrap()),
            Kind::Ended(ended) => {
                self.ended = Some(ended);
                None
            }
        };
        let cursor = self.watched.cursor();
        let says_something = |delivery: &_| {
            let delivery: &d_engine_tests::watched::Delivery = delivery;
            !delivery.changes.is_empty() || delivery.through > cursor
        };
        self.watched.deliveries.extend(delivery.filter(says_something));
    }
}

/// The history that acknowledged writes make, with nobody else writing.
#[derive(Default)]
struct Written {
    changes: Vec<Change>,
    state: State,
}

impl Written {
    fn put(&mut self, key: &str, value: Vec<u8>, revision: u64) {
        let key: bytes::Bytes = key.to_owned().into();
        let before = self.state.get(&key).cloned();
        let after = Held {
            value: value.into(),
            create_revision: before.as_ref().map_or(revision, |before| before.create_revision),
            mod_revision: revision,
            version: before.as_ref().map_or(1, |before| before.version + 1),
            lease: 0,
        };
        self.state.insert(key.clone(), after.clone());
        self.changes.push(Change { revision, key, after: Some(after), before });
    }

    fn delete(&mut self, key: &str, revision: u64) {
        let key: bytes::Bytes = key.to_owned().into();
        if let Some(before) = self.state.remove(&key) {
            self.changes.push(Change { revision, key, after: None, before: Some(before) });
        }
    }

    fn truth(self) -> Truth {
        Truth::new(0, State::new(), self.changes).unwrap()
    }
}

fn client(cluster: &Cluster) -> Client {
    Client::builder().endpoints(cluster.addresses()).call_timeout(DEADLINE).build().unwrap()
}

/// From every revision, on every node, many watches on one stream: what comes is what happened from there on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_begins_at_any_revision_continues_there_on_any_node() {
    const CHANGES: u64 = 60;
    let seed = seed();
    let mut rng = Rng::with_seed(seed);
    let cluster = Cluster::start(3).await;
    let client = client(&cluster);
    let mut written = Written::default();
    let change = async |rng: &mut Rng, written: &mut Written| {
        let key = format!("{}/{}", rng.u8(0..2), rng.u8(0..3));
        if rng.u8(0..3) == 0 {
            let answer = client.delete(&key).await.unwrap();
            written.delete(&key, answer.header.revision.get());
        } else {
            let value = rng.u64(..).to_string().into_bytes();
            let answer = client.put(&key, value.clone()).await.unwrap();
            written.put(&key, value, answer.header.revision.get());
        }
    };
    while written.changes.len() < CHANGES as usize {
        change(&mut rng, &mut written).await;
    }
    let mut streams = Vec::new();
    for node in cluster.nodes() {
        let stream = Stream::open(&node.direct(DEADLINE)).await;
        let mut followers = Vec::new();
        // Past, present and future ones.
        for from in 0..=CHANGES + 10 {
            let range = [KeyRange::all(), KeyRange::prefix("0/"), watchers::single("1/2")];
            let range = range[rng.usize(..range.len())].clone();
            let view = View { previous: rng.bool(), keys_only: rng.bool(), ..View::of(range) };
            stream.create(from, watchers::create(&view, from)).await;
            followers.push(Follower::new(format!("from {from} at node {}", node.id), view, from));
        }
        streams.push((stream, followers));
    }
    // "Now" is told by the answer, so that it lies before what is written next.
    for (stream, followers) in &mut streams {
        while followers[0].watched.from == 0 {
            let (id, kind) = stream.next().await;
            followers[id as usize].take(kind);
        }
    }
    let goal = CHANGES + 30;
    while written.changes.len() < goal as usize {
        change(&mut rng, &mut written).await;
    }
    let truth = written.truth();
    for (stream, followers) in &mut streams {
        // Bookmarks bring those to the goal that have nothing to see there.
        while followers.iter().any(|follower| follower.watched.cursor() < goal) {
            let (id, kind) = stream.next().await;
            followers[id as usize].take(kind);
        }
        for follower in followers {
            assert!(follower.ended.is_none());
            follower.watched.judge(&truth).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        }
    }
}

/// Some who asked for everything and do not read, among many who do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_read_holds_nobody_up_and_takes_no_memory() {
    const SLOW: u64 = 16;
    const STREAMS: usize = 20;
    const FAST_PER_STREAM: u64 = 100;
    const PUTS: u64 = 100;
    const VALUE_BYTES: usize = 256 << 10;
    /// What each slow one would have waiting: the values, and what they replaced.
    const BACKLOG_BYTES: u64 = PUTS * 2 * VALUE_BYTES as u64;
    let mut cluster = Cluster::start(1).await;
    let node = cluster.node(1).direct(DEADLINE);
    let mut slow = Vec::new();
    for number in 0..SLOW {
        // Each asks for something of its own, so that no two share what is encoded.
        let view = View { previous: true, ..View::of(KeyRange::between("data/", format!("data0{number:02}"))) };
        let mut stream = Stream::open(&cluster.node(1).direct(DEADLINE)).await;
        stream.create(0, watchers::create(&view, 0)).await;
        let mut follower = Follower::new(format!("slow {number}"), view, 0);
        follower.take(stream.next().await.1);
        slow.push((stream, follower));
    }
    let view = View { keys_only: true, ..View::of(KeyRange::prefix("data/")) };
    let mut fast = Vec::new();
    for _ in 0..STREAMS {
        let mut stream = Stream::open(&node).await;
        for id in 0..FAST_PER_STREAM {
            stream.create(id, watchers::create(&view, 1)).await;
        }
        let mut followers: Vec<_> =
            (0..FAST_PER_STREAM).map(|id| Follower::new(format!("fast {id}"), view.clone(), 1)).collect();
        fast.push(tokio::spawn(async move {
            while followers.iter().any(|follower| follower.watched.cursor() < PUTS) {
                let (id, kind) = stream.next().await;
                followers[id as usize].take(kind);
            }
            followers
        }));
    }
    let client = client(&cluster);
    let before = resident_bytes(cluster.node_mut(1).process().id());
    let mut written = Written::default();
    let start = Instant::now();
    for number in 0..PUTS {
        let (key, value) = (format!("data/{}", number % 4), vec![number as u8; VALUE_BYTES]);
        let answer = client.put(&key, value.clone()).await.unwrap();
        written.put(&key, value, answer.header.revision.get());
    }
    let truth = written.truth();
    let mut changes = 0;
    for task in fast {
        for follower in task.await.unwrap() {
            assert!(follower.ended.is_none());
            changes += follower.watched.judge(&truth).unwrap().changes;
        }
    }
    assert_eq!(changes, STREAMS * (FAST_PER_STREAM * PUTS) as usize);
    println!("{changes} events to fast watches within {:?} from the first put", start.elapsed());
    let grown = resident_bytes(cluster.node_mut(1).process().id()).saturating_sub(before);
    let waiting = SLOW * BACKLOG_BYTES;
    println!("the server grew by {} MiB while {} MiB wait for slow watches", grown >> 20, waiting >> 20);
    // What is written takes memory, too, in caches of every layer: that is bounded, and no part of what is judged.
    assert!(grown < waiting / 4, "{grown} bytes");

    for (mut stream, mut follower) in slow {
        while follower.watched.cursor() < PUTS {
            follower.take(stream.next().await.1);
            assert!(follower.ended.is_none(), "{:?}", follower.ended);
        }
        follower.watched.judge(&truth).unwrap();
    }
}

/// Resident memory of a process.
fn resident_bytes(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() << 10
}

/// Watches that catch up from the beginning, again and again, while what they read is compacted away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compaction_leaves_a_watch_complete_or_tells_it_the_oldest_revision_left() {
    const PUTS: u64 = 900;
    const KEPT: u64 = 100;
    const COMPACT_EVERY: u64 = 150;
    let seed = seed();
    let mut rng = Rng::with_seed(seed);
    let cluster = Cluster::start(3).await;
    let client = client(&cluster);
    let (done, mut tasks) = (tokio::sync::watch::Sender::new(false), tokio::task::JoinSet::new());
    let compacted = tokio::sync::watch::Sender::new(1);
    for node in cluster.nodes() {
        for part in [KeyRange::all(), KeyRange::prefix("k/1")] {
            let view = View { previous: true, ..View::of(part) };
            let (direct, done, compacted) = (node.direct(DEADLINE), done.subscribe(), compacted.subscribe());
            tasks.spawn(catch_up(direct, view, done, compacted));
        }
    }
    let through_client = {
        let (client, mut done) = (client.clone(), done.subscribe());
        tokio::spawn(async move {
            // The client's own word for it, with the oldest revision left.
            let mut told = 0;
            while !*done.borrow_and_update() {
                match client.watch_prefix("k/").from(Revision(1)).await {
                    Ok(mut stream) => {
                        let first = stream.next().await.expect("an endless stream");
                        assert!(first.is_err_and(|error| is_compacted(&error)) || stream.cursor() >= Revision(1));
                    }
                    Err(error) => {
                        assert!(is_compacted(&error), "{error}");
                        told += 1;
                    }
                }
                tokio::task::yield_now().await;
            }
            told
        })
    };
    let mut written = Written::default();
    for number in 1..=PUTS {
        let (key, value) = (format!("k/{}", rng.u8(0..20)), vec![b'v'; rng.usize(1..2000)]);
        let answer = client.put(&key, value.clone()).await.unwrap();
        written.put(&key, value, answer.header.revision.get());
        if number % COMPACT_EVERY == 0 && number > KEPT {
            let answer = client.compact(Revision(number - KEPT)).await.unwrap();
            assert_eq!(answer.compacted_revision, Revision(number - KEPT));
            compacted.send_replace(number - KEPT);
        }
    }
    done.send_replace(true);
    let truth = written.truth();
    let (mut complete, mut cut, mut overtaken) = (0, 0, 0);
    while let Some(task) = tasks.join_next().await {
        for (watched, oldest) in task.unwrap() {
            watched.judge(&truth).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
            match oldest {
                Some(oldest) => {
                    assert!(
                        watched.cursor() + 1 < oldest,
                        "seed {seed}: {} stood at {}",
                        watched.name,
                        watched.cursor()
                    );
                    cut += 1;
                    overtaken += usize::from(watched.cursor() >= watched.from);
                }
                None => complete += 1,
            }
        }
    }
    let told = through_client.await.unwrap();
    println!(
        "{complete} watches came to the present, {cut} were told what is left, {overtaken} of them on their way; {told} through the client"
    );
    assert!(complete > 0 && cut > 0 && told > 0, "nothing raced");
}

fn is_compacted(error: &d_engine_client::Error) -> bool {
    error.kind() == ErrorKind::Compacted && error.revision().is_some_and(|oldest| oldest > Revision(1))
}

/// Catches up until `done`: from the beginning, then from wherever it is told that there is something left, to the
/// present; then anew from the oldest revision that it knows to be left. Each try with what ended it.
async fn catch_up(
    node: DirectNode,
    view: View,
    done: tokio::sync::watch::Receiver<bool>,
    compacted: tokio::sync::watch::Receiver<u64>,
) -> Vec<(Watched, Option<u64>)> {
    let mut tries = Vec::new();
    let mut from = 1;
    while !*done.borrow() {
        let answer = node.get("none", v1::Consistency::Eventual, 0).await.unwrap();
        let present = answer.header.unwrap_or_default().revision;
        let mut stream = Stream::open(&node).await;
        stream.create(0, watchers::create(&view, from)).await;
        let mut follower = Follower::new(format!("{:?} from {from}", view.range), view.clone(), from);
        let oldest = loop {
            follower.take(stream.next().await.1);
            if let Some(ended) = follower.ended.take() {
                let detail = ended.error.unwrap_or_default();
                assert_eq!(ErrorCode::from_number(detail.code), Some(ErrorCode::Compacted), "{}", ended.message);
                break Some(detail.revision);
            }
            // A view that rarely has something would wait for bookmarks: what it came to is as good.
            if follower.watched.cursor() + 50 >= present {
                break None;
            }
        };
        from = oldest.unwrap_or(*compacted.borrow());
        tries.push((follower.watched, oldest));
    }
    tries
}
