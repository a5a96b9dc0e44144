//! The lease hole: a leader that was stopped past its lease, while another was elected and wrote, goes on and believes
//! for a moment that it still leads. No read it serves as linearizable or within its lease may show the old value.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step ends the test")]

use std::time::{Duration, Instant};

use d_engine_proto::v1::{Consistency, GetResponse};
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::direct::DirectNode;
use d_engine_tests::network::{self, End, PrivateNetwork};
use d_engine_tests::wait;

/// For one attempt; whoever needs more repeats it.
const ATTEMPT: Duration = Duration::from_millis(500);

/// Writes until a node has acknowledged it. The value is the same each time, so a repetition changes nothing.
async fn write(nodes: &[DirectNode], key: &str, value: &str) {
    wait::until("a leader that acknowledges a write", wait::PATIENCE, || async {
        for node in nodes {
            if node.put(key, value).await.is_ok() {
                return Some(());
            }
        }
        None
    })
    .await;
}

fn shown(response: &GetResponse) -> Option<&[u8]> {
    response.kv.as_ref().map(|kv| &kv.value[..])
}

/// Reads from `node` again and again. A refusal is a good answer; an old value is a bad one.
async fn no_stale_answer(node: DirectNode, consistency: Consistency, value: String, reads: usize) {
    for _ in 0..reads {
        if let Ok(response) = node.get("key", consistency, 0).await {
            assert_eq!(shown(&response), Some(value.as_bytes()), "stale {consistency:?} read");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_paused_past_its_lease_serves_no_stale_read() {
    let mut cluster = Cluster::start(3).await;
    for round in 0..5 {
        let old = cluster.leader(&[]).await;
        let others: Vec<DirectNode> =
            cluster.nodes().iter().filter(|node| node.id != old).map(|node| node.direct(ATTEMPT)).collect();
        write(&[cluster.node(old).direct(ATTEMPT)], "key", &format!("old {round}")).await;

        cluster.node_mut(old).process().pause();
        let value = format!("new {round}");
        write(&others, "key", &value).await;

        // The reads lie in the old leader's sockets before it goes on: it meets them with its old state of mind.
        let node = cluster.node(old);
        let readers: Vec<_> = (0..64)
            .map(|reader| {
                let kind = if reader % 4 == 0 { Consistency::Linearizable } else { Consistency::Lease };
                tokio::spawn(no_stale_answer(node.direct(wait::PATIENCE), kind, value.clone(), 10))
            })
            .collect();
        wait::pass(Duration::from_millis(50)).await;
        cluster.node_mut(old).process().resume();
        for reader in readers {
            reader.await.unwrap();
        }
        // The old leader learns of the new one and serves its value.
        let node = cluster.node(old).direct(ATTEMPT);
        wait::until("the old leader to serve the new value", wait::PATIENCE, || async {
            let response = node.get("key", Consistency::Linearizable, 0).await.ok()?;
            (response.kv?.value == value.as_bytes()).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_of_all_voters_no_read_is_stale() {
    let mut cluster = Cluster::start(3).await;
    for round in 0..5 {
        let nodes: Vec<DirectNode> = cluster.nodes().iter().map(|node| node.direct(ATTEMPT)).collect();
        let value = format!("value {round}");
        write(&nodes, "key", &value).await;
        for id in 1..=3 {
            cluster.node_mut(id).kill();
        }
        for id in 1..=3 {
            cluster.node_mut(id).start();
        }
        // Whoever answers first, from whatever it remembers, must know the last acknowledged value.
        let readers: Vec<_> = nodes
            .iter()
            .flat_map(|node| [Consistency::Lease, Consistency::Linearizable].map(|kind| (node.clone(), kind)))
            .map(|(node, kind)| tokio::spawn(no_stale_answer(node, kind, value.clone(), 200)))
            .collect();
        for reader in readers {
            reader.await.unwrap();
        }
        cluster.start_all().await;
        let leader = cluster.leader(&[]).await;
        let leader = cluster.node(leader).direct(ATTEMPT);
        for kind in [Consistency::Lease, Consistency::Linearizable] {
            wait::until("the new leader to serve reads", wait::PATIENCE, || async {
                let response = leader.get("key", kind, 0).await.ok()?;
                assert_eq!(shown(&response), Some(value.as_bytes()), "stale {kind:?} read after a restart");
                Some(())
            })
            .await;
        }
    }
}

/// A restarted voter has forgotten whose lease it supported. If it helped another node to lead at once, the old leader,
/// cut off and unaware, would go on serving reads within its lease while the new one writes.
///
/// ```text
/// leader ──x── first follower     cannot hear the leader and campaigns; the second follower refuses
/// leader ───── second follower    acknowledges the leader; then it is cut off, killed and started again
/// ```
///
/// The lease is long, so that campaigns and the restart fall into it.
#[test]
fn a_restarted_voter_does_not_shorten_a_lease() {
    const LEASE: Duration = Duration::from_secs(1);
    network::inside("a_restarted_voter_does_not_shorten_a_lease", || async {
        let extra = format!("[raft.read_consistency]\nlease_duration_ms = {}\n", LEASE.as_millis());
        let network = Some(PrivateNetwork::lay(3));
        let mut cluster = Cluster::prepare(Shape { nodes: 3, extra, network, ..Shape::default() }).await;
        cluster.start_all().await;
        for round in 0..4 {
            let old = cluster.leader(&[]).await;
            let (first, second) = (old % 3 + 1, (old + 1) % 3 + 1);
            write(&[cluster.node(old).direct(ATTEMPT)], "key", &format!("old {round}")).await;
            let net = cluster.network().unwrap();
            net.sever(End::Node(old), End::Node(first));
            wait::pass(2 * LEASE).await;

            // A reader asks the old leader all the time. A read that began after the new value was acknowledged and
            // shows the old one is stale.
            let value = format!("new {round}");
            let (acknowledged, on_acknowledged) = tokio::sync::watch::channel(None::<Instant>);
            let reader = {
                let value = value.clone();
                let leader = cluster.node(old).direct(Duration::from_millis(50));
                tokio::spawn(async move {
                    let mut served = 0;
                    loop {
                        let acknowledged = *on_acknowledged.borrow();
                        let answer = leader.get("key", Consistency::Lease, 0).await;
                        let Some(since) = acknowledged else {
                            served += usize::from(answer.is_ok());
                            continue;
                        };
                        if let Ok(response) = answer {
                            assert_eq!(shown(&response), Some(value.as_bytes()), "stale lease read");
                        }
                        if since.elapsed() > 2 * LEASE {
                            return served;
                        }
                    }
                })
            };
            cluster.network().unwrap().sever(End::Node(old), End::Node(second));
            cluster.node_mut(second).kill();
            cluster.node_mut(second).start();
            write(&[first, second].map(|id| cluster.node(id).direct(ATTEMPT)), "key", &value).await;
            acknowledged.send_replace(Some(Instant::now()));
            assert!(reader.await.unwrap() > 0, "the old leader served no lease read at all");
            cluster.network().unwrap().heal();
            cluster.start_all().await;
        }
    });
}
