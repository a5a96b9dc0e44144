//! Members whose states differ are found, and the wrong one stops. The state of a real node is altered by one byte of
//! one value, with sound checksums, as a defect or bad memory would do it, while it does not run.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step ends the test")]

use std::process::Command;
use std::sync::Arc;

use bytes::Bytes;
use d_engine_client::Client;
use d_engine_server::storage::versions::{Change, KeyVersion, ScanOrder, Submission, VersionStore};
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::process::d_engine;
use d_engine_tests::{http, wait};

/// Alters the newest value below the directory of a node that does not run.
fn alter(state: &std::path::Path) {
    let versions = VersionStore::open(state).unwrap();
    let recovered = versions.recovered().clone();
    let found = versions.scan(b"", None, recovered.revision, ScanOrder::Descending).advance().unwrap().unwrap();
    let mut value = found.value.to_vec();
    value[0] ^= 1;
    let altered = KeyVersion { value: Bytes::from(value), ..found.clone() };
    let (key, revision) = (found.key.clone(), found.mod_revision);
    let change = Change { key, revision, after: Some(Arc::new(altered)), before: None };
    versions.submit(Submission { changes: Arc::new(vec![change]), records: Vec::new(), state: recovered }).unwrap();
    versions.flush().unwrap();
}

fn client(cluster: &Cluster) -> Client {
    Client::builder().endpoints(cluster.addresses()).call_timeout(wait::PATIENCE).build().unwrap()
}

async fn prepared(nodes: u32, extra: &str) -> Cluster {
    let mut cluster = Cluster::prepare(Shape { nodes, extra: extra.to_owned(), ..Shape::default() }).await;
    cluster.start_all().await;
    let writer = client(&cluster);
    for key in 0..20 {
        writer.put(format!("key-{key:02}"), "value").await.unwrap();
    }
    cluster
}

/// Stops a follower, alters its state, and starts it again.
async fn corrupt_a_follower(cluster: &mut Cluster) -> u32 {
    let leader = cluster.leader(&[]).await;
    let victim = cluster.nodes().iter().map(|node| node.id).find(|id| *id != leader).unwrap();
    cluster.node_mut(victim).stop().await;
    alter(&cluster.node(victim).data().join("state"));
    cluster.node_mut(victim).start();
    victim
}

async fn stops_and_stays_down(cluster: &mut Cluster, victim: u32) {
    let (success, output) = cluster.node_mut(victim).exit().await;
    assert!(!success, "it ended well: {output}");
    assert!(output.contains("was not the cluster's") && output.contains("add it again"), "{output}");
    // A supervisor starts it again: it must not serve from that directory.
    cluster.node_mut(victim).start();
    let (success, output) = cluster.node_mut(victim).exit().await;
    assert!(!success && output.contains("put aside"), "{output}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_differs_by_one_byte_is_found_by_itself_and_stops() {
    let mut cluster = prepared(3, "[raft.state_machine]\ncheck_interval_ms = 200\n").await;
    let victim = corrupt_a_follower(&mut cluster).await;
    stops_and_stays_down(&mut cluster, victim).await;

    // The others serve on.
    client(&cluster).put("after", "value").await.unwrap();
    let mut counted = 0;
    for node in cluster.nodes().iter().filter(|node| node.id != victim) {
        let (_, metrics) = http::get(node.http_address, "/metrics").await.unwrap();
        counted += metrics.matches("d_engine_state_checks_total{outcome=\"different\"}").count();
    }
    assert!(counted > 0, "by the one that led then");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_check_by_command_finds_it_and_the_status_shows_the_alarm() {
    let mut cluster = prepared(3, "[raft.state_machine]\ncheck_interval_ms = 0\n").await;
    let check = |cluster: &Cluster| {
        let addresses = cluster.addresses().join(",");
        let arguments = ["--endpoints", &addresses, "--timeout", "30s", "check"];
        let output = Command::new(d_engine()).args(arguments).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    // A leader that was just elected may refuse.
    wait::until("all to be the same", wait::PATIENCE, || async {
        let (well, table) = check(&cluster);
        assert!(!table.contains("different"), "{table}");
        (well && table.matches("same").count() == 3).then_some(())
    })
    .await;

    let victim = corrupt_a_follower(&mut cluster).await;
    cluster.node_mut(victim).ready().await;
    // It may still be applying.
    wait::until("the finding", wait::PATIENCE, || async {
        let (well, table) = check(&cluster);
        let found = table.matches("different").count();
        assert!(found <= 1 && (found == 0 || !well), "{table}");
        (found == 1).then_some(())
    })
    .await;
    let addresses = cluster.addresses().join(",");
    let status =
        Command::new(d_engine()).args(["--endpoints", &addresses, "--timeout", "30s", "status"]).output().unwrap();
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(status.contains("alarm") && status.contains(&format!("the state of node {victim}")), "{status}");
    stops_and_stays_down(&mut cluster, victim).await;
}
