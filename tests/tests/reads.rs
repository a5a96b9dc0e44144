//! Reads of different kinds and nodes, compared with each other while writes go on.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step ends the test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use d_engine_client::Client;
use d_engine_proto::v1::{Consistency, GetResponse};
use d_engine_tests::cluster::Cluster;
use d_engine_tests::direct::DirectNode;

const WRITERS: usize = 64;
const READERS: usize = 8;
const READS: usize = 300;
const DEADLINE: Duration = Duration::from_secs(20);

fn revision(response: &GetResponse) -> u64 {
    response.header.unwrap_or_default().revision
}

/// A follower may apply an entry before the leader does, and show it. Whoever then asks the leader must not be shown an
/// older state, though the leader needs to ask nobody for a lease read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_read_is_behind_one_that_ended_before_it_began() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader(&[]).await;
    let nodes: Vec<DirectNode> = cluster.nodes().iter().map(|node| node.direct(DEADLINE)).collect();
    let leading = cluster.node(leader).direct(DEADLINE);

    let done = Arc::new(AtomicBool::new(false));
    let client = Client::builder().endpoints(cluster.addresses()).call_timeout(DEADLINE).build().unwrap();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (client, done) = (client.clone(), Arc::clone(&done));
            tokio::spawn(async move {
                let mut writes = 0;
                // An error ends the writer; the readers tell what went wrong.
                while !done.load(Ordering::Relaxed) {
                    if client.put(format!("key-{writer}"), vec![b'v'; 2_000]).await.is_err() {
                        break;
                    }
                    writes += 1;
                }
                writes
            })
        })
        .collect();
    let readers: Vec<_> = (0..READERS)
        .map(|reader| {
            let (nodes, leading) = (nodes.clone(), leading.clone());
            tokio::spawn(async move {
                let mut seen = 0;
                for read in 0..READS {
                    let node = &nodes[(reader + read) % nodes.len()];
                    for (node, kind) in [(node, Consistency::Linearizable), (&leading, Consistency::Lease)] {
                        let response = node.get("key-0", kind, 0).await.unwrap();
                        let found = revision(&response);
                        assert!(found >= seen, "{kind:?} read at revision {found}, after one at {seen}");
                        seen = found;
                    }
                }
            })
        })
        .collect();
    for reader in readers {
        reader.await.unwrap();
    }
    done.store(true, Ordering::Relaxed);
    let mut writes = 0;
    for writer in writers {
        writes += writer.await.unwrap();
    }
    assert!(writes > WRITERS, "hardly anything was written meanwhile: {writes}");
}
