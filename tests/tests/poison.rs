//! A node that lost a part of itself ends. A task that everybody relies on panics in a real process, and the process
//! must not go on answering without it: it fails by the task's name and with an exit code that a supervisor sees.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step ends the test")]

use std::time::Duration;

use d_engine_proto::v1::{Consistency, LeaseGrantRequest, LeaseRenewRequest};
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::direct::DirectNode;
use d_engine_tests::wait;

/// For one attempt of a call that the dying node may never answer.
const ATTEMPT: Duration = Duration::from_secs(1);

/// As the failure names them. What hardly ever has a turn is left to unit tests.
const TASKS: [&str; 10] = [
    "the writer of the log",
    "a task of openraft",
    "the watch over leadership",
    "the proposer",
    "the confirmation of reads",
    "the delivery of watches",
    "the expiry",
    "the renewal of leases",
    "the sampling of history",
    "kv-write",
];

/// Gives every task something to do.
async fn use_everything(node: &DirectNode, number: u32) {
    let key = format!("key-{number}");
    let _ = node.put(&key, "value").await;
    let _ = node.get(&key, Consistency::Linearizable, 0).await;
    let grant = LeaseGrantRequest { ttl_ms: 1000, ..LeaseGrantRequest::default() };
    if let Ok(granted) = node.lease().grant(node.timed(grant)).await {
        let renew = LeaseRenewRequest { lease: granted.into_inner().lease };
        let _ = node.lease().renew(node.timed(renew)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_ends_when_a_task_that_it_relies_on_panics() {
    for task in TASKS {
        let mut cluster = Cluster::prepare(Shape { nodes: 1, faulty: true, ..Shape::default() }).await;
        cluster.start_all().await;
        let node = cluster.node_mut(1);
        let direct = node.direct(ATTEMPT);
        use_everything(&direct, 0).await;
        assert!(node.process().ended().is_none(), "before {task} panicked");

        node.faults().arm(&format!("in-task/{}", task.replace(' ', "-")), 1, "panic").await;
        let mut number = 0;
        let status = wait::until(&format!("the end by {task}"), wait::PATIENCE, || {
            number += 1;
            let ended = node.process().ended();
            let direct = direct.clone();
            async move {
                if ended.is_none() {
                    use_everything(&direct, number).await;
                }
                ended
            }
        })
        .await;
        let output = node.output();
        assert!(!status.success(), "{task}: {status}");
        assert!(output.contains(&format!("{task} panicked")), "{task}: {output}");
        assert!(output.contains("the node cannot go on"), "{task}: {output}");
        cluster.bury();
    }
}

/// A call is nobody's but its client's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_other_members_go_on_and_take_the_node_back() {
    let mut cluster = Cluster::prepare(Shape { nodes: 3, faulty: true, ..Shape::default() }).await;
    cluster.start_all().await;
    let leader = cluster.leader(&[]).await;
    cluster.node(leader).direct(wait::PATIENCE).put("before", "1").await.unwrap();
    cluster.node_mut(leader).faults().arm("in-task/the-proposer", 1, "panic").await;
    let dying = cluster.node(leader).direct(ATTEMPT);
    let (well, _) = {
        let ended = cluster.node_mut(leader).exit();
        let poking = async {
            loop {
                let _ = dying.put("during", "2").await;
            }
        };
        tokio::select! { ended = ended => ended, () = poking => unreachable!() }
    };
    assert!(!well);
    let next = cluster.leader(&[leader]).await;
    assert_ne!(next, leader);
    cluster.node(next).direct(wait::PATIENCE).put("after", "3").await.unwrap();

    cluster.start_all().await;
    let back = cluster.node(leader).direct(wait::PATIENCE);
    let found = back.get("before", Consistency::Linearizable, 0).await.unwrap();
    assert_eq!(&found.kv.unwrap().value[..], b"1");
    let found = back.get("after", Consistency::Linearizable, 0).await.unwrap();
    assert_eq!(&found.kv.unwrap().value[..], b"3");
}
