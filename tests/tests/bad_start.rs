//! What a server does when it is started wrongly: it says what is wrong and what to do, and harms nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step ends the test")]

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use d_engine_proto::v1::Consistency;
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::{http, wait};

const DEADLINE: Duration = Duration::from_secs(5);

/// Starts node 1 of a prepared cluster, which must refuse, and checks that it names every one of `words`.
async fn is_refused(cluster: &mut Cluster, id: u32, words: &[&str]) {
    let node = cluster.node_mut(id);
    node.start();
    let (success, output) = node.exit().await;
    assert!(!success, "the server started and ended well:\n{output}");
    assert!(!output.contains("panicked"), "a panic is no message:\n{output}");
    for word in words {
        assert!(output.contains(word), "the message does not say {word:?}:\n{output}");
    }
}

fn members(cluster: &Cluster) -> Vec<(u32, SocketAddr)> {
    cluster.nodes().iter().map(|node| (node.id, node.address)).collect()
}

async fn three() -> Cluster {
    Cluster::prepare(Shape::default()).await
}

#[tokio::test]
async fn an_unknown_key_is_named() {
    let mut cluster = three().await;
    cluster.node(1).write_config(&members(&cluster), "[raft.election]\nelection_timeout = 5\n");
    is_refused(&mut cluster, 1, &["config.toml", "election_timeout"]).await;
}

#[tokio::test]
async fn text_that_is_not_toml_is_refused_with_its_place() {
    let mut cluster = three().await;
    std::fs::write(cluster.node(1).config(), "[cluster\n").unwrap();
    is_refused(&mut cluster, 1, &["config.toml:1"]).await;
}

#[tokio::test]
async fn a_configuration_that_is_not_there_is_named() {
    let mut cluster = three().await;
    std::fs::remove_file(cluster.node(1).config()).unwrap();
    is_refused(&mut cluster, 1, &["config.toml"]).await;
}

#[tokio::test]
async fn duplicate_ids_and_addresses_are_refused() {
    let mut cluster = three().await;
    let mut twice = members(&cluster);
    twice[2].0 = 2;
    cluster.node(1).write_config(&twice, "");
    is_refused(&mut cluster, 1, &["initial_cluster", "2"]).await;

    let mut twice = members(&cluster);
    twice[2].1 = twice[1].1;
    cluster.node(1).write_config(&twice, "");
    is_refused(&mut cluster, 1, &["initial_cluster", &twice[1].1.to_string()]).await;
}

#[tokio::test]
async fn a_node_missing_from_its_own_cluster_is_refused() {
    let mut cluster = three().await;
    cluster.node(1).write_config(&members(&cluster)[1..], "");
    is_refused(&mut cluster, 1, &["initial_cluster", "node 1"]).await;
}

#[tokio::test]
async fn timeouts_that_contradict_each_other_are_refused() {
    let mut cluster = three().await;
    let extra = "[raft.election]\nelection_timeout_min = 500\nelection_timeout_max = 400\n";
    cluster.node(1).write_config(&members(&cluster), extra);
    is_refused(&mut cluster, 1, &["election_timeout_min", "election_timeout_max"]).await;
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let mut cluster = three().await;
    let address = cluster.node(1).address;
    let taken = TcpListener::bind(address).unwrap();
    is_refused(&mut cluster, 1, &[&address.to_string()]).await;
    drop(taken);
    let address = cluster.node(1).http_address;
    let _taken = TcpListener::bind(address).unwrap();
    is_refused(&mut cluster, 1, &[&address.to_string()]).await;
}

#[tokio::test]
async fn the_data_directory_of_another_node_is_refused_and_left_alone() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader(&[]).await;
    cluster.node(leader).direct(DEADLINE).put("key", "value").await.unwrap();
    for id in 1..=3 {
        cluster.node_mut(id).stop().await;
    }
    // Node 1 finds the directory of node 2 in the place of its own.
    let (one, two) = (cluster.node(1).data(), cluster.node(2).data());
    let aside = cluster.directory().join("aside");
    std::fs::rename(&one, &aside).unwrap();
    std::fs::rename(&two, &one).unwrap();
    is_refused(&mut cluster, 1, &[&one.display().to_string(), "node"]).await;

    std::fs::rename(&one, &two).unwrap();
    std::fs::rename(&aside, &one).unwrap();
    cluster.start_all().await;
    assert_serves(&cluster, "key", "value").await;
}

#[tokio::test]
async fn a_directory_in_use_by_a_running_node_is_refused() {
    let mut cluster = Cluster::prepare(Shape { nodes: 1, ..Shape::default() }).await;
    cluster.start_all().await;
    let config = std::fs::read_to_string(cluster.node(1).config()).unwrap();
    let text = config.replace(":9081", ":9071").replace(":9181", ":9171");
    let other = cluster.directory().join("other.toml");
    std::fs::write(&other, text).unwrap();
    let output = std::process::Command::new(d_engine_tests::process::d_engine())
        .args(["server", "--config"])
        .arg(&other)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && said.contains("in use"), "{said}");
}

#[tokio::test]
async fn a_directory_of_something_else_is_refused_and_left_alone() {
    let mut cluster = three().await;
    // Not in the root, where a mount point may have files of its own, but where the node keeps its log.
    let log = cluster.node(1).data().join("log");
    std::fs::create_dir_all(&log).unwrap();
    std::fs::write(log.join("thesis.tex"), "years of work").unwrap();
    is_refused(&mut cluster, 1, &[&log.display().to_string()]).await;
    assert_eq!(std::fs::read_to_string(log.join("thesis.tex")).unwrap(), "years of work");
}

/// Two lists that name different members would form two clusters that each believe to be the one.
#[tokio::test]
async fn differing_member_lists_never_form_a_cluster_of_both() {
    let mut cluster = three().await;
    let list = members(&cluster);
    let stranger = SocketAddr::from((list[0].1.ip(), 9089));
    cluster.node(1).write_config(&[list[0], list[1], (9, stranger)], "");
    for id in 1..=3 {
        cluster.node_mut(id).start();
    }
    // Who learns of it first ends with the reason, perhaps before another has asked it.
    wait::until("a node to complain of the differing lists", wait::PATIENCE, || async {
        (1..=3).any(|id| cluster.node(id).output().contains("cluster.initial_cluster differs")).then_some(())
    })
    .await;
    for id in 1..=3 {
        let output = cluster.node(id).output();
        assert!(!output.contains("panicked") && !output.contains("formed the cluster"), "node {id}: {output}");
        let ready = http::get(cluster.node(id).http_address, "/ready").await;
        assert!(!matches!(ready, Ok((200, _))), "node {id} says it is ready");
    }
}

#[tokio::test]
async fn a_wiped_voter_does_not_come_back_under_its_id() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader(&[]).await;
    cluster.node(leader).direct(DEADLINE).put("key", "value").await.unwrap();
    let victim = leader % 3 + 1;
    let other = victim % 3 + 1;
    cluster.node_mut(victim).kill();
    std::fs::remove_dir_all(cluster.node(victim).data()).unwrap();
    cluster.node_mut(victim).start();
    wait::until("the wiped node to say what to do", wait::PATIENCE, || async {
        let output = cluster.node(victim).output();
        (output.contains("remove") && output.contains("add")).then_some(())
    })
    .await;
    // Its vote counts for nothing: with another voter gone there is no majority, and no write is acknowledged.
    let third = if other == leader { 6 - victim - other } else { other };
    cluster.node_mut(third).kill();
    let remaining = cluster.node(6 - victim - third).direct(Duration::from_secs(2));
    let refused = wait::until("writes to be refused", wait::PATIENCE, || async {
        remaining.put("key", "must not be acknowledged").await.err()
    })
    .await;
    assert_ne!(refused.code(), tonic::Code::Ok);
    for _ in 0..3 {
        assert!(remaining.put("key", "must not be acknowledged").await.is_err(), "a wiped voter was counted");
    }
}

#[tokio::test]
async fn without_a_quorum_a_node_waits_and_says_so() {
    let mut cluster = three().await;
    cluster.node_mut(1).start();
    let status = wait::until("node 1 to answer", wait::PATIENCE, || async {
        http::get(cluster.node(1).http_address, "/ready").await.ok()
    })
    .await;
    assert_eq!(status.0, 503, "{status:?}");
    let health = http::get(cluster.node(1).http_address, "/health").await.unwrap();
    assert_eq!(health.0, 200, "alive, though not ready: {health:?}");
    let node = cluster.node(1).direct(Duration::from_secs(1));
    assert!(node.put("key", "value").await.is_err());
    assert!(node.get("key", Consistency::Linearizable, 0).await.is_err());
    // The quorum comes, and all is well.
    cluster.start_all().await;
    let leader = cluster.leader(&[]).await;
    cluster.node(leader).direct(DEADLINE).put("key", "value").await.unwrap();
    assert_serves(&cluster, "key", "value").await;
}

async fn assert_serves(cluster: &Cluster, key: &str, value: &str) {
    for node in cluster.nodes() {
        let direct = node.direct(DEADLINE);
        let response = wait::until("a linearizable read", wait::PATIENCE, || async {
            direct.get(key, Consistency::Linearizable, 0).await.ok()
        })
        .await;
        assert_eq!(response.kv.map(|kv| kv.value), Some(value.to_owned().into()), "node {}", node.id);
    }
}
