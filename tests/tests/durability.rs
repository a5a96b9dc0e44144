//! What an acknowledgement promises, on real processes: every node is killed at once in the midst of writes, and
//! nothing acknowledged is lost. Power cuts are for the storage engines' own tests.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step ends the test")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use d_engine_client::Client;
use d_engine_proto::v1::Consistency;
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::wait;
use tokio::task::JoinSet;

const ENGINES: [&str; 2] = ["RocksDB", "Segments"];
const ROUNDS: usize = 2;
const WRITERS: usize = 16;
const WRITES_PER_ROUND: usize = 400;

/// A call that dies with the nodes is given up soon.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);

/// So rarely that hardly anything acknowledged is on a disk when the processes die.
const NEVER_FLUSHED: &str = "flush_policy = { Batch = { threshold = 1000000, interval_ms = 60000 } }";

#[tokio::test(flavor = "multi_thread")]
async fn mem_first_loses_nothing_acknowledged_when_every_process_is_killed() {
    for engine in ENGINES {
        every_process_is_killed(&format!("strategy = \"MemFirst\"\n{NEVER_FLUSHED}\nengine = {engine:?}")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn disk_first_loses_nothing_acknowledged_when_every_process_is_killed() {
    for engine in ENGINES {
        every_process_is_killed(&format!("engine = {engine:?}")).await;
    }
}

#[tokio::test]
async fn the_log_of_the_other_engine_is_refused_by_name() {
    for (own, other) in [(ENGINES[0], ENGINES[1]), (ENGINES[1], ENGINES[0])] {
        let extra = format!("[raft.persistence]\nengine = {own:?}\n");
        let mut cluster = Cluster::prepare(Shape { nodes: 1, extra, ..Shape::default() }).await;
        cluster.start_all().await;
        cluster.node_mut(1).stop().await;
        cluster.node_mut(1).set_environment("D_ENGINE__RAFT__PERSISTENCE__ENGINE", other);
        cluster.node_mut(1).start();
        let (success, output) = cluster.node_mut(1).exit().await;
        let log = cluster.node(1).data().join("log").display().to_string();
        let remedy = format!("raft.persistence.engine = \"{own}\"");
        let last = output.lines().last().unwrap_or_default();
        assert!(!success, "{output}");
        for word in [&log, own, other, &remedy] {
            assert!(last.contains(word), "the last line does not say {word:?}:\n{output}");
        }
    }
}

async fn every_process_is_killed(persistence: &str) {
    let extra = format!("[raft.persistence]\n{persistence}\n");
    let mut cluster = Cluster::prepare(Shape { extra, ..Shape::default() }).await;
    let mut acknowledged = BTreeMap::<String, Bytes>::new();
    for round in 0..ROUNDS {
        cluster.start_all().await;
        cluster.reign().await;
        let done = Arc::new(AtomicUsize::new(0));
        let killed = Arc::new(AtomicBool::new(false));
        let mut writers = JoinSet::new();
        for writer in 0..WRITERS {
            let (addresses, done, killed) = (cluster.addresses(), done.clone(), killed.clone());
            writers.spawn(async move {
                let client = Client::builder().endpoints(addresses).call_timeout(CALL_TIMEOUT).connect().await.unwrap();
                let mut own = Vec::new();
                for count in (0..).take_while(|_| !killed.load(Ordering::Relaxed)) {
                    let key = format!("key-{round}-{writer}-{count}");
                    let value = Bytes::from(key.repeat(count % 40 + 1));
                    if client.put(key.clone(), value.clone()).await.is_ok() {
                        done.fetch_add(1, Ordering::Relaxed);
                        own.push((key, value));
                    }
                }
                own
            });
        }
        wait::until("enough writes", wait::PATIENCE, || async {
            (done.load(Ordering::Relaxed) >= WRITES_PER_ROUND).then_some(())
        })
        .await;
        for id in 1..=3 {
            cluster.node_mut(id).kill();
        }
        killed.store(true, Ordering::Relaxed);
        while let Some(own) = writers.join_next().await {
            acknowledged.extend(own.unwrap());
        }
    }

    cluster.start_all().await;
    cluster.reign().await;
    for node in cluster.nodes() {
        // Waits until the node has applied everything acknowledged, then looks at its own copy.
        node.direct(wait::PATIENCE).get("key", Consistency::Linearizable, 0).await.unwrap();
        let found = node.direct(wait::PATIENCE).prefix("key-", 0).await.unwrap();
        let lost: Vec<_> =
            acknowledged.iter().filter(|(key, value)| found.get(key.as_bytes()) != Some(value)).collect();
        assert!(lost.is_empty(), "node {} lost {} of {}: {:?}", node.id, lost.len(), acknowledged.len(), lost.first());
    }
    cluster.check_alive();
}
