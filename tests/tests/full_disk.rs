//! A disk that fills up while writes go on: the node stops acknowledging, says which directory needs space and ends;
//! the others go on; with space again it comes back, and every acknowledged write is there.
//!
//! The small disk is a file system in memory, in mounts that this test alone sees.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step ends the test")]

use std::time::{Duration, Instant};

use bytes::Bytes;
use d_engine_proto::DetailedStatus;
use d_engine_proto::v1::Outcome;
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::direct::DirectNode;
use d_engine_tests::disk::Disk;
use d_engine_tests::network::{self, PrivateNetwork};
use d_engine_tests::wait;
use tonic::Status;

/// For one write; a node that is about to end may not answer at all.
const ATTEMPT: Duration = Duration::from_secs(5);
const DISK_MEBIBYTES: u32 = 256;
/// Storage takes space ahead of need: large values use it up soon.
const VALUE_BYTES: usize = 64 << 10;
/// Pause between writes, so that the disks of those that go on are not filled by the test itself.
const PACE: Duration = Duration::from_millis(5);

#[test]
fn a_leader_or_follower_whose_disk_is_full_ends_and_comes_back_while_the_others_go_on() {
    network::inside("a_leader_or_follower_whose_disk_is_full_ends_and_comes_back_while_the_others_go_on", || {
        three_nodes("RocksDB")
    });
}

#[test]
fn so_does_one_whose_log_is_in_segments() {
    network::inside("so_does_one_whose_log_is_in_segments", || three_nodes("Segments"));
}

#[test]
fn a_single_node_whose_disk_is_full_acknowledges_nothing_more_and_loses_nothing() {
    network::inside("a_single_node_whose_disk_is_full_acknowledges_nothing_more_and_loses_nothing", || {
        single_node("RocksDB")
    });
}

#[test]
fn neither_does_one_whose_log_is_in_segments() {
    network::inside("neither_does_one_whose_log_is_in_segments", || single_node("Segments"));
}

async fn three_nodes(engine: &str) {
    let mut cluster = prepare(3, engine).await;
    let disks: Vec<Disk> = cluster.nodes().iter().map(|node| Disk::in_memory(&node.data(), DISK_MEBIBYTES)).collect();
    cluster.start_all().await;
    let mut ledger = Ledger::default();
    for leads in [true, false] {
        let leader = cluster.leader(&[]).await;
        let victim = if leads { leader } else { leader % 3 + 1 };
        let disk = &disks[victim as usize - 1];
        ledger.write(&cluster, 50).await;
        disk.fill();
        while cluster.node_mut(victim).process().ended().is_none() {
            ledger.write(&cluster, 1).await;
        }
        names_the_directory(&mut cluster, victim).await;

        cluster.leader(&[victim]).await;
        ledger.write(&cluster, 50).await;
        disk.free();
        cluster.start_all().await;
        ledger.write(&cluster, 50).await;
        for node in cluster.nodes() {
            ledger.stands(&node.direct(wait::PATIENCE)).await;
        }
    }
    cluster.check_alive();
}

async fn single_node(engine: &str) {
    let mut cluster = prepare(1, engine).await;
    let data = cluster.node(1).data();
    // The disk of everything, and one that holds only the history, to which nothing is written before long.
    for place in [data.clone(), data.join("state")] {
        let disk = Disk::in_memory(&place, DISK_MEBIBYTES);
        cluster.start_all().await;
        let mut ledger = Ledger::default();
        let node = cluster.node(1).direct(ATTEMPT);
        for _ in 0..50 {
            ledger.put(&node).await.unwrap();
        }
        disk.fill();
        while ledger.put(&node).await.is_ok() {}
        while cluster.node_mut(1).process().ended().is_none() {
            assert!(ledger.put(&node).await.is_err(), "a write was acknowledged after one had failed");
        }
        names_the_directory(&mut cluster, 1).await;

        disk.free();
        cluster.start_all().await;
        ledger.stands(&cluster.node(1).direct(wait::PATIENCE)).await;
        ledger.write(&cluster, 50).await;
        ledger.stands(&cluster.node(1).direct(wait::PATIENCE)).await;

        // The next round begins with an empty directory.
        cluster.node_mut(1).stop().await;
        drop(disk);
        std::fs::remove_dir_all(&data).unwrap();
    }
}

async fn prepare(nodes: u32, engine: &str) -> Cluster {
    let network = Some(PrivateNetwork::lay(nodes));
    let extra = format!("[raft.persistence]\nengine = {engine:?}\n");
    Cluster::prepare(Shape { nodes, network, extra, ..Shape::default() }).await
}

/// Waits for the node to end, and looks at its last words.
async fn names_the_directory(cluster: &mut Cluster, id: u32) {
    let (success, output) = cluster.node_mut(id).exit().await;
    assert!(!success, "the node ended as if all were well:\n{output}");
    assert!(!output.contains("panicked"), "a panic is no message:\n{output}");
    let last = output.lines().last().unwrap_or_default();
    let data = cluster.node(id).data().display().to_string();
    for word in [&data, "No space left", "free space", "restart"] {
        assert!(last.contains(word), "the last line does not say {word:?}:\n{output}");
    }
}

/// Writes, each of a key of its own, and what became of them.
#[derive(Default)]
struct Ledger {
    tried: usize,
    acknowledged: Vec<String>,
    /// Those of which the answer said that they were not applied.
    refused: Vec<String>,
    /// The highest one acknowledged.
    revision: u64,
}

impl Ledger {
    async fn put(&mut self, node: &DirectNode) -> Result<(), Status> {
        let key = format!("key-{:06}", self.tried);
        self.tried += 1;
        match node.put(&key, &value_of(&key)).await {
            Ok(response) => {
                self.revision = response.header.unwrap().revision;
                self.acknowledged.push(key);
                Ok(())
            }
            Err(status) => {
                let detailed = DetailedStatus::from_status(&status);
                if detailed.is_some_and(|detailed| detailed.outcome() == Outcome::NotApplied) {
                    self.refused.push(key);
                }
                Err(status)
            }
        }
    }

    /// Tries until `count` writes more were acknowledged by whichever node leads.
    async fn write(&mut self, cluster: &Cluster, count: usize) {
        let nodes: Vec<DirectNode> =
            cluster.nodes().iter().filter(|node| node.runs()).map(|node| node.direct(ATTEMPT)).collect();
        let enough = self.acknowledged.len() + count;
        let start = Instant::now();
        let mut pace = tokio::time::interval(PACE);
        let mut turn = 0;
        while self.acknowledged.len() < enough {
            pace.tick().await;
            if let Err(status) = self.put(&nodes[turn % nodes.len()]).await {
                assert!(start.elapsed() < wait::PATIENCE, "nobody acknowledges a write: {status}");
                turn += 1;
            }
        }
    }

    /// Checks that every acknowledged write is on `node`, and none that was said not to be applied.
    async fn stands(&self, node: &DirectNode) {
        let found = node.prefix("key-", self.revision).await.unwrap();
        for key in &self.acknowledged {
            let value = found.get(key.as_bytes()).map(Bytes::as_ref);
            assert!(value == Some(value_of(key).as_bytes()), "{key} was acknowledged and is lost");
        }
        for key in &self.refused {
            assert!(!found.contains_key(key.as_bytes()), "{key} was said not to be applied and is there");
        }
    }
}

fn value_of(key: &str) -> String {
    key.repeat(VALUE_BYTES / key.len())
}
