//! A data directory in the wrong place: of another cluster, or of a newer version. The node that finds it says whose it
//! is and ends; the directory and both clusters are as they were.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use d_engine_proto::v1::Consistency;
use d_engine_tests::cluster::Cluster;
use d_engine_tests::wait;

/// Starts a node, which must end by itself, and checks that it names every one of `words`; answers what it said.
async fn is_refused(cluster: &mut Cluster, id: u32, words: &[&str]) -> String {
    let node = cluster.node_mut(id);
    let before = node.output().len();
    node.start();
    let (success, output) = node.exit().await;
    let said = &output[before..];
    assert!(!success, "the server started and ended well:\n{said}");
    assert!(!said.contains("panicked"), "a panic is no message:\n{said}");
    for word in words {
        assert!(said.contains(word), "the message does not say {word:?}:\n{said}");
    }
    said.to_owned()
}

/// Writes through the leader and answers the cluster's id.
async fn write(cluster: &Cluster, key: &str, value: &str) -> u64 {
    let leader = cluster.leader(&[]).await;
    let response = cluster.node(leader).direct(wait::PATIENCE).put(key, value).await.unwrap();
    response.header.unwrap().cluster_id
}

async fn every_node_shows(cluster: &Cluster, key: &str, value: &str) {
    for node in cluster.nodes() {
        let direct = node.direct(wait::PATIENCE);
        let response = wait::until("a linearizable read", wait::PATIENCE, || async {
            direct.get(key, Consistency::Linearizable, 0).await.ok()
        })
        .await;
        assert_eq!(response.kv.map(|kv| kv.value), Some(value.to_owned().into()), "node {}", node.id);
    }
}

/// Two clusters that take turns at the same addresses: the one that is not there waits in a directory of its own.
fn set_aside(cluster: &Cluster, id: u32, name: &str) {
    std::fs::rename(cluster.node(id).data(), aside(cluster, id, name)).unwrap();
}

fn bring_back(cluster: &Cluster, id: u32, name: &str) {
    std::fs::rename(aside(cluster, id, name), cluster.node(id).data()).unwrap();
}

fn aside(cluster: &Cluster, id: u32, name: &str) -> PathBuf {
    cluster.directory().join(format!("{name}-{id}"))
}

#[tokio::test]
async fn the_data_directory_of_another_cluster_is_refused_and_harms_neither() {
    let mut cluster = Cluster::start(3).await;
    let first = write(&cluster, "key", "first").await;
    for id in 1..=3 {
        cluster.node_mut(id).stop().await;
        set_aside(&cluster, id, "first");
    }
    cluster.start_all().await;
    let second = write(&cluster, "key", "second").await;
    assert_ne!(first, second);

    // A follower of the second cluster finds the directory it had in the first.
    let victim = cluster.leader(&[]).await % 3 + 1;
    cluster.node_mut(victim).stop().await;
    let reign = cluster.reign().await;
    set_aside(&cluster, victim, "second");
    bring_back(&cluster, victim, "first");
    let clusters = [format!("{first:016x}"), format!("{second:016x}")];
    is_refused(&mut cluster, victim, &[&clusters[0], &clusters[1], "directory"]).await;
    assert_eq!(cluster.reign().await, reign, "the others did not notice");
    write(&cluster, "key", "second, by two").await;

    set_aside(&cluster, victim, "first");
    bring_back(&cluster, victim, "second");
    cluster.start_all().await;
    every_node_shows(&cluster, "key", "second, by two").await;

    // The first cluster, one of whose directories was started among strangers.
    for id in 1..=3 {
        cluster.node_mut(id).stop().await;
        set_aside(&cluster, id, "second");
        bring_back(&cluster, id, "first");
    }
    cluster.start_all().await;
    every_node_shows(&cluster, "key", "first").await;
    assert_eq!(write(&cluster, "key", "first, again").await, first);
}

#[tokio::test]
async fn a_directory_of_a_newer_format_is_refused_by_name_and_left_alone() {
    let mut cluster = Cluster::start(3).await;
    write(&cluster, "key", "value").await;
    let victim = cluster.leader(&[]).await % 3 + 1;
    cluster.node_mut(victim).stop().await;
    for part in ["log", "state"] {
        let directory = cluster.node(victim).data().join(part);
        let marker = directory.join("FORMAT");
        let own = std::fs::read_to_string(&marker).unwrap();
        let (newer, version) = with_next_version(&own);
        std::fs::write(&marker, newer).unwrap();
        let before = content(&directory);
        let place = directory.display().to_string();
        is_refused(&mut cluster, victim, &[&place, &format!("format {version}"), "newer version"]).await;
        assert_eq!(content(&directory), before, "{place} was changed");
        std::fs::write(&marker, own).unwrap();
    }
    write(&cluster, "key", "meanwhile").await;
    cluster.start_all().await;
    every_node_shows(&cluster, "key", "meanwhile").await;
}

/// The marker `d-engine <kind> <version> <checksum>` as a later version would write it, and that version.
fn with_next_version(marker: &str) -> (String, u32) {
    let words: Vec<&str> = marker.split_whitespace().collect();
    let [magic, kind, version, _] = words[..] else { panic!("an unknown marker: {marker:?}") };
    let version = version.parse::<u32>().unwrap() + 1;
    let content = format!("{magic} {kind} {version}");
    (format!("{content} {:08x}\n", crc32c::crc32c(content.as_bytes())), version)
}

/// Every file below `directory`.
fn content(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| match path.is_dir() {
            true => content(&path),
            false => BTreeMap::from([(path.clone(), std::fs::read(&path).unwrap())]),
        })
        .collect()
}
