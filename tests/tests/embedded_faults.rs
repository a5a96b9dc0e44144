//! The embedded engine when something goes wrong: the leader is cut off from its followers, a disk fails, a task panics.
//! What it says then is defined, and no later than others rely on it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use d_engine::prelude::*;
use d_engine::server::storage::{Durability, LogRecord, StorageOperation, StorageState};
use d_engine_proto::{LogIndex, v1};
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::embedded::{Claim, Fleet};
use d_engine_tests::network::{self, End, PrivateNetwork};
use d_engine_tests::wait::{self, PATIENCE};

/// The codes with which a read may be refused on a node that is cut off.
const REFUSALS: [&str; 3] = ["NotLeader", "Unavailable", "DeadlineExceeded"];

/// What an application has said since it had said so many bytes, in lines that begin with `topic`, without that.
fn said(cluster: &Cluster, node: u32, since: usize, topic: &str) -> Vec<String> {
    let output = cluster.node(node).output();
    output[since..].lines().filter_map(|line| line.strip_prefix(topic).map(str::to_owned)).collect()
}

/// Applications in processes and networks of their own look at their leadership all the time. The leader is cut off from
/// the others until one of them leads: by then nothing there may say any more that it leads.
#[test]
fn a_leader_that_is_cut_off_stops_believing_in_itself_before_another_leads() {
    let test = "a_leader_that_is_cut_off_stops_believing_in_itself_before_another_leads";
    network::inside(test, || async {
        let network = Some(PrivateNetwork::lay(3));
        // Long, so that a busy machine has time to publish the end of a lease before there is another one.
        let extra = "[raft.read_consistency]\nlease_duration_ms = 1000\n[network]\ncall_timeout_ms = 1000\n".to_owned();
        let mut cluster = Cluster::prepare(Shape { network, embedding: true, extra, ..Shape::default() }).await;
        cluster.start_all().await;
        for _ in 0..3 {
            let cut_off = cluster.reign().await.leader;
            wait::until("its reads to be answered", PATIENCE, || async {
                let lease = said(&cluster, cut_off, 0, "lease read ").pop()?;
                let linearizable = said(&cluster, cut_off, 0, "linearizable read ").pop()?;
                (lease == "answered" && linearizable == "answered").then_some(())
            })
            .await;
            let since = cluster.node(cut_off).output().len();
            cluster.network().unwrap().isolate(End::Node(cut_off), false);
            cluster.leader(&[cut_off]).await;
            for topic in ["lease read ", "linearizable read "] {
                let refusal = wait::until("its reads to be refused", PATIENCE, || async {
                    said(&cluster, cut_off, since, topic).pop().filter(|outcome| outcome != "answered")
                })
                .await;
                assert!(REFUSALS.contains(&&*refusal), "{topic}{refusal}");
            }
            let own = format!("{cut_off} in ");
            let seen = said(&cluster, cut_off, since, "sees ");
            assert_eq!(seen.last().map(String::as_str), Some("nobody"), "another one leads");
            assert!(
                seen.iter().all(|seen| seen == "nobody" || seen.starts_with(&own)),
                "of whom it cannot know: {seen:?}"
            );

            cluster.network().unwrap().heal();
            wait::until("it to follow", PATIENCE, || async {
                let seen = said(&cluster, cut_off, since, "sees ").pop()?;
                let follows = seen != "nobody" && !seen.starts_with(&own);
                let lease = said(&cluster, cut_off, since, "lease read ").pop()?;
                let linearizable = said(&cluster, cut_off, since, "linearizable read ").pop()?;
                (follows && lease == "NotLeader" && linearizable == "answered").then_some(())
            })
            .await;
        }
        for id in 1..=3 {
            cluster.node_mut(id).stop().await;
        }
        let claims: Vec<Claim> =
            cluster.nodes().iter().flat_map(|node| Claim::all(&node.output()).collect::<Vec<_>>()).collect();
        for by in [Claim::IS_LEADER, Claim::NOTIFIER, Claim::LEASE] {
            assert!(claims.iter().filter(|claim| claim.by == by).count() >= 3, "hardly anybody claimed {by}");
        }
        Claim::check(&claims, 3);
    });
}

const WELL: u8 = 0;
const FAILS: u8 = 1;
const PANICS: u8 = 2;

/// A fake disk below a real log: it fails, or its driver panics, when the test says so.
struct FakeDisk {
    log: RocksDBStorageEngine,
    state: Arc<AtomicU8>,
}

impl StorageEngine for FakeDisk {
    fn state(&self) -> Result<StorageState, StorageError> {
        self.log.state()
    }

    fn read(&self, start: LogIndex, end: LogIndex, bytes_max: usize) -> Result<Vec<LogRecord>, StorageError> {
        self.log.read(start, end, bytes_max)
    }

    fn write(&self, operations: &[StorageOperation], durability: Durability) -> Result<(), StorageError> {
        match self.state.load(Ordering::Relaxed) {
            WELL => self.log.write(operations, durability),
            PANICS => panic!("as this test wants it"),
            _ => Err(StorageError::Io {
                action: "write log in",
                path: "/fake/disk".into(),
                message: "no space left on device".to_owned(),
            }),
        }
    }

    fn sync(&self) -> Result<(), StorageError> {
        self.log.sync()
    }
}

/// Every kind of call is refused for `reason`.
async fn is_refused(client: &EmbeddedClient, reason: &str) {
    for error in [
        client.get_eventual("key").await.map(drop).unwrap_err(),
        client.get_lease("key").await.map(drop).unwrap_err(),
        client.get_linearizable("key").await.map(drop).unwrap_err(),
        client.get_multi(["key"]).await.map(drop).unwrap_err(),
        client.scan_prefix("").await.map(drop).unwrap_err(),
        client.put("key", "later").await.unwrap_err(),
        client.watch("key").await.map(drop).unwrap_err(),
        client.watch_from_snapshot("key").await.map(drop).unwrap_err(),
        client.engine().map(drop).unwrap_err(),
    ] {
        assert!(matches!(error, LocalClientError::Failed { .. }), "{error}");
        assert_eq!(error.outcome(), v1::Outcome::NotApplied);
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_whose_disk_fails_or_whose_task_panics_says_so_to_every_call() {
    for (fault, reason) in [(FAILS, "no space left on device"), (PANICS, "the writer of the log panicked")] {
        let fleet = Fleet::prepared(1);
        let data = fleet.config(1).with_file_name("data");
        let state = Arc::new(AtomicU8::new(WELL));
        std::fs::create_dir(&data).unwrap();
        let disk = FakeDisk { log: RocksDBStorageEngine::new(data.join("log")).unwrap(), state: state.clone() };
        let machine = RocksDBStateMachine::new(data.join("state")).unwrap();
        let path = fleet.config(1);
        let engine = EmbeddedEngine::start_custom(disk, machine, path.to_str()).await.unwrap();
        engine.wait_ready(PATIENCE).await.unwrap();
        let client = engine.client();
        client.put("key", "value").await.unwrap();

        state.store(fault, Ordering::Relaxed);
        let error = client.put("key", "lost").await.unwrap_err();
        assert_ne!(error.outcome(), v1::Outcome::Applied, "{error}");
        wait::until("the fault to be the engine's", PATIENCE, || async { client.get_eventual("key").await.err() })
            .await;
        is_refused(&client, reason).await;
        assert!(!engine.is_leader() && engine.leader_info().is_none());
        let error = engine.wait_ready(PATIENCE).await.unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
        // And so it stays when the node has ended.
        let error = engine.stop().await.unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
        assert!(engine.is_stopped().await);
        is_refused(&client, reason).await;
    }
}

/// From the moment of the fault on, not only once the node has ended.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_read_from_an_engine_between_its_fault_and_its_end() {
    let fleet = Fleet::alone().await;
    let engine = fleet.leader().await;
    let client = engine.client();
    client.put("key", "value").await.unwrap();
    let consensus = client.engine().unwrap().consensus().clone();
    assert_eq!(client.get_eventual("key").await.unwrap().unwrap(), "value");
    consensus.poison().fail(d_engine::server::consensus::StartError::Panicked { task: "a task of this test" });
    is_refused(&client, "a task of this test panicked").await;
    assert!(!engine.is_leader() && engine.leader_info().is_none());
    drop(consensus);
    assert!(engine.stop().await.is_err());
}
