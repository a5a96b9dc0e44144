//! A member that was away while the log was purged gets a snapshot and ends up with what the others have, whoever dies
//! meanwhile and wherever, while writes go on. Watches and sessions do not notice.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use bytes::Bytes;
use d_engine_proto::v1::{self, Consistency};
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::direct::DirectNode;
use d_engine_tests::network::{self, PrivateNetwork};
use d_engine_tests::seed::seed;
use d_engine_tests::steady::Steady;
use d_engine_tests::{http, wait};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// A snapshot every hundred entries, and nothing kept for those who are behind. Patient, since nothing here is about
/// elections.
const POLICY: &str = "[raft.snapshot]\nmax_log_entries_before_snapshot = 100\nretained_log_entries = 0\n\
                      [raft.read_consistency]\nlease_duration_ms = 1500\n";
const VALUE_BYTES: usize = 100 << 10;

/// Writes that make a snapshot of some mebibytes.
async fn fill(leader: &DirectNode, keys: usize) {
    for number in 0..keys {
        let key = format!("fill-{number:05}");
        leader.put(&key, &key.repeat(VALUE_BYTES / key.len())).await.unwrap();
    }
}

/// One of a node's counters.
async fn counter(cluster: &Cluster, id: u32, name: &str) -> Option<u64> {
    let (_, text) = http::get(cluster.node(id).http_address, "/metrics").await.ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    // Written without a fraction.
    Some(line.trim_end_matches(".0").parse().unwrap())
}

async fn count(cluster: &Cluster, id: u32, name: &str) -> u64 {
    wait::until(name, wait::PATIENCE, || counter(cluster, id, name)).await
}

/// Waits until what everyone else has now is gone from their logs.
async fn purged_up_to_now(cluster: &Cluster, except: u32) {
    for node in cluster.nodes().iter().filter(|node| node.id != except) {
        let now = count(cluster, node.id, "d_engine_raft_applied_index").await;
        wait::until("the log to be purged", wait::PATIENCE, || async {
            let purged = counter(cluster, node.id, "d_engine_raft_purged_index").await?;
            (purged >= now).then_some(())
        })
        .await;
    }
}

/// What a node shows at `revision`: the keys, read from the history on its disk.
async fn scan(node: &DirectNode, revision: u64) -> BTreeMap<Bytes, (Bytes, u64, u64)> {
    let mut found = BTreeMap::new();
    let mut start = Bytes::new();
    loop {
        let request = v1::RangeRequest {
            range: Some(v1::KeyRange { start: start.clone(), end: Bytes::new() }),
            read: Some(v1::ReadOptions { consistency: Consistency::Eventual as i32, min_revision: revision, revision }),
            ..v1::RangeRequest::default()
        };
        let page = wait::until("a page of the past", wait::PATIENCE, || async {
            node.kv().range(node.timed(request.clone())).await.ok()
        })
        .await
        .into_inner();
        for kv in page.kvs {
            start = [&kv.key[..], &[0]].concat().into();
            found.insert(kv.key, (kv.value, kv.mod_revision, kv.version));
        }
        if !page.more {
            return found;
        }
    }
}

/// All nodes show the same, now and at a revision before.
async fn all_equal(cluster: &Cluster) {
    let leader = cluster.leader(&[]).await;
    let last = cluster.node(leader).direct(wait::PATIENCE).put("last", "").await.unwrap().header.unwrap().revision;
    let mut expected = None;
    for node in cluster.nodes() {
        let direct = node.direct(wait::PATIENCE);
        let found = [scan(&direct, last).await, scan(&direct, last - 1).await];
        assert!(!found[0].is_empty());
        let same = expected.get_or_insert_with(|| found.clone()) == &found;
        assert!(same, "node {} shows something else at revision {last}", node.id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_dies_at_any_step_of_receiving_and_installing_catches_up() {
    let shape = Shape { extra: POLICY.into(), faulty: true, ..Shape::default() };
    let mut cluster = Cluster::prepare(shape).await;
    cluster.start_all().await;
    let leader = cluster.reign().await.leader;
    let follower = leader % 3 + 1;
    fill(&cluster.node(leader).direct(wait::PATIENCE), 30).await;
    let mut steady = Steady::start(cluster.node(leader).direct(wait::PATIENCE)).await;
    for step in [
        "receive/begun",
        "receive/piece",
        "receive/described",
        "receive/renamed",
        "install/purged",
        "install/copied",
        "install/switched",
        "install/restored",
    ] {
        cluster.node_mut(follower).kill();
        purged_up_to_now(&cluster, follower).await;
        let node = cluster.node_mut(follower);
        node.start();
        node.faults().arm(step, 1, "die").await;
        wait::until(step, wait::PATIENCE, || {
            let ended = cluster.node_mut(follower).process().ended();
            async move { ended }
        })
        .await;
        cluster.bury();
        cluster.start_all().await;
        steady.go_on(10).await;
        all_equal(&cluster).await;
    }
    assert!(count(&cluster, leader, "d_engine_snapshot_sent_bytes_total").await > 0);
    steady.finish().await;
    cluster.check_alive();
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_killed_while_a_snapshot_is_sent_the_cluster_ends_up_equal() {
    let mut rng = fastrand::Rng::with_seed(seed());
    let mut cluster = Cluster::prepare(Shape { extra: POLICY.into(), ..Shape::default() }).await;
    cluster.start_all().await;
    let leader = cluster.leader(&[]).await;
    fill(&cluster.node(leader).direct(wait::PATIENCE), 150).await;
    for round in 0..4 {
        let leader = cluster.leader(&[]).await;
        let follower = leader % 3 + 1;
        cluster.node_mut(follower).kill();
        let writer = cluster.node(leader).direct(wait::PATIENCE);
        let mut steady = Steady::start(writer).await;
        purged_up_to_now(&cluster, follower).await;
        cluster.node_mut(follower).start();
        let some = rng.u64(1..12 << 20);
        wait::until("some of a snapshot", wait::PATIENCE, || async {
            let received = counter(&cluster, follower, "d_engine_snapshot_received_bytes_total").await?;
            (received >= some).then_some(())
        })
        .await;
        // In turn: who receives, who sends.
        if round % 2 == 0 {
            cluster.node_mut(follower).kill();
            steady.go_on(10).await;
            steady.finish().await;
        } else {
            steady.finish().await;
            cluster.node_mut(leader).kill();
            cluster.leader(&[leader]).await;
        }
        cluster.start_all().await;
        all_equal(&cluster).await;
    }
    cluster.check_alive();
}

/// Follows a prefix at a node, without ever beginning anew.
async fn watch(node: &DirectNode) -> tonic::Streaming<v1::WatchResponse> {
    let (requests, sent) = mpsc::channel(1);
    let range = v1::KeyRange { start: "steady".into(), end: "steadz".into() };
    let create = v1::WatchCreate { range: Some(range), from_revision: 1, ..v1::WatchCreate::default() };
    let action = Some(v1::watch_request::Action::Create(create));
    requests.send(v1::WatchRequest { watch_id: 1, action }).await.unwrap();
    let answers = node.watch().watch(ReceiverStream::new(sent)).await.unwrap().into_inner();
    // Open as long as the answers are read.
    std::mem::forget(requests);
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_loses_nothing_and_a_session_repeats_nothing_when_a_snapshot_is_installed_under_them() {
    use v1::watch_response::Kind;

    let mut cluster = Cluster::prepare(Shape { extra: POLICY.replace("1500", "500"), ..Shape::default() }).await;
    cluster.start_all().await;
    let reign = cluster.reign().await;
    let follower = reign.leader % 3 + 1;
    let at_follower = cluster.node(follower).direct(wait::PATIENCE);
    let mut answers = watch(&at_follower).await;
    let mut steady = Steady::start(cluster.node(reign.leader).direct(wait::PATIENCE)).await;

    cluster.node_mut(follower).process().pause();
    let leader = cluster.node(reign.leader).direct(wait::PATIENCE);
    let register = leader.timed(v1::SessionRegisterRequest { ttl_ms: 0 });
    let session = leader.session().register(register).await.unwrap().into_inner().session;
    let swap = v1::PutRequest {
        key: "once".into(),
        value: "value".into(),
        return_previous: true,
        session: Some(v1::SessionCall { session, sequence: 1, ..v1::SessionCall::default() }),
        ..v1::PutRequest::default()
    };
    let first = leader.kv().put(leader.timed(swap.clone())).await.unwrap().into_inner();
    // A leader keeps what it is just sending, until it notices that nobody takes it: the first time. What it has sent by
    // then may lie in the connection and be taken yet, so that must be gone as well: the second time.
    for _ in 0..2 {
        purged_up_to_now(&cluster, follower).await;
    }
    cluster.node_mut(follower).process().resume();
    wait::until("a snapshot to be installed", wait::PATIENCE, || async {
        let installed = counter(&cluster, follower, "d_engine_snapshots_installed_total").await?;
        (installed > 0).then_some(())
    })
    .await;
    steady.go_on(50).await;
    let written = steady.finish().await;

    // The numbers that were written, one after the other: each once, none missing.
    let mut next = None;
    while next != Some(written + 1) {
        let answer = tokio::time::timeout(wait::PATIENCE, answers.message()).await.expect("in time").unwrap().unwrap();
        match answer.kind {
            Some(Kind::Events(events)) => {
                for event in events.events {
                    let value = event.kv.expect("a put").value;
                    let number: u64 = std::str::from_utf8(&value).unwrap().parse().unwrap();
                    assert_eq!(number, *next.get_or_insert(number), "an event was lost or came twice");
                    next = Some(number + 1);
                }
            }
            Some(Kind::Ended(ended)) => panic!("the watch ended: {}", ended.message),
            _ => {}
        }
    }

    // The one that has the session from the snapshot answers alone with one other.
    cluster.node_mut(reign.leader).kill();
    let answer = wait::until("the answer again", wait::PATIENCE, || async {
        for node in cluster.nodes().iter().filter(|node| node.runs()) {
            let direct = node.direct(wait::PATIENCE);
            if let Ok(answer) = direct.kv().put(direct.timed(swap.clone())).await {
                return Some(answer.into_inner());
            }
        }
        None
    })
    .await;
    let revision = |answer: &v1::PutResponse| answer.header.unwrap().revision;
    assert_eq!(revision(&answer), revision(&first), "it was applied a second time");
    cluster.start_all().await;
    let kv = cluster.node(follower).direct(wait::PATIENCE);
    let kv = kv.get("once", Consistency::Linearizable, 0).await.unwrap().kv.unwrap();
    assert_eq!(kv.version, 1);
    all_equal(&cluster).await;
}

#[test]
fn a_follower_without_room_for_a_snapshot_serves_what_it_has_and_catches_up_with_room() {
    network::inside("a_follower_without_room_for_a_snapshot_serves_what_it_has_and_catches_up_with_room", || async {
        let network = Some(PrivateNetwork::lay(3));
        let mut cluster = Cluster::prepare(Shape { extra: POLICY.into(), network, ..Shape::default() }).await;
        let leader = lead_with_small_disk(&mut cluster).await;
        let data = cluster.node(3).data();
        let direct = cluster.node(leader).direct(wait::PATIENCE);
        // Not killed: what it was told of commits would be lost with what was not written yet.
        cluster.node_mut(3).stop().await;
        fill(&direct, 200).await;
        let mut steady = Steady::start(direct).await;
        purged_up_to_now(&cluster, 3).await;

        // What is left is less than what has to stay free beside a snapshot.
        let ballast = data.join("ballast");
        let mut file = File::create(&ballast).unwrap();
        for _ in 0..df(&data, "avail").saturating_sub(60 << 20) >> 20 {
            file.write_all(&[0; 1 << 20]).unwrap();
        }
        // Or the space would stay taken.
        drop(file);
        cluster.node_mut(3).start();
        wait::until("the leader to say that there is no room", wait::PATIENCE, || async {
            cluster.node(leader).output().contains("free some space").then_some(())
        })
        .await;
        let old = cluster.node(3).direct(wait::PATIENCE).get("before", Consistency::Eventual, 0).await.unwrap();
        assert_eq!(old.kv.unwrap().value, "x");
        steady.go_on(10).await;
        cluster.check_alive();

        std::fs::remove_file(&ballast).unwrap();
        cluster.node_mut(3).ready().await;
        steady.finish().await;
        all_equal(&cluster).await;
        cluster.check_alive();
    });
}

/// Starts a cluster of which node 3 has a small disk, does not lead, and has the key `before`. Answers the leader.
async fn lead_with_small_disk(cluster: &mut Cluster) -> u32 {
    mount(&cluster.node(3).data());
    cluster.start_all().await;
    let mut leader = cluster.leader(&[]).await;
    while leader == 3 {
        cluster.node_mut(3).kill();
        cluster.leader(&[3]).await;
        cluster.start_all().await;
        leader = cluster.leader(&[]).await;
    }
    cluster.node(leader).direct(wait::PATIENCE).put("before", "x").await.unwrap();
    wait::until("the follower to have it", wait::PATIENCE, || async {
        cluster.node(3).direct(wait::PATIENCE).get("before", Consistency::Eventual, 0).await.ok()?.kv
    })
    .await;
    leader
}

/// Bytes of a disk that are `used`, or that are `avail`able.
fn df(place: &Path, which: &str) -> usize {
    let output = Command::new("df").arg(format!("--output={which}")).arg("-B1").arg(place).output().unwrap().stdout;
    String::from_utf8(output).unwrap().lines().nth(1).unwrap().trim().parse().unwrap()
}

#[test]
fn a_disk_that_fills_up_while_a_snapshot_arrives_costs_the_snapshot_and_not_the_node() {
    network::inside("a_disk_that_fills_up_while_a_snapshot_arrives_costs_the_snapshot_and_not_the_node", || async {
        let network = Some(PrivateNetwork::lay(3));
        let mut cluster = Cluster::prepare(Shape { extra: POLICY.into(), network, ..Shape::default() }).await;
        let leader = lead_with_small_disk(&mut cluster).await;
        let direct = cluster.node(leader).direct(wait::PATIENCE);
        // Not killed: what it was told of commits would be lost with what was not written yet.
        cluster.node_mut(3).stop().await;
        fill(&direct, 400).await;
        let mut steady = Steady::start(direct).await;
        purged_up_to_now(&cluster, 3).await;

        let data = cluster.node(3).data();
        // It sleeps in the midst of a transfer. One that was over before is tried again.
        loop {
            cluster.node_mut(3).start();
            wait::until("some of a snapshot", wait::PATIENCE, || async {
                let received = counter(&cluster, 3, "d_engine_snapshot_received_bytes_total").await?;
                (received > 1 << 20).then_some(())
            })
            .await;
            cluster.node_mut(3).process().pause();
            if data.join("snapshots").join("receiving").exists() {
                break;
            }
            cluster.node_mut(3).process().resume();
            cluster.node_mut(3).stop().await;
            purged_up_to_now(&cluster, 3).await;
        }
        resize(&data, df(&data, "used"));
        assert_eq!(df(&data, "avail"), 0);
        cluster.node_mut(3).process().resume();

        wait::until("the leader to be told of the full disk", wait::PATIENCE, || async {
            cluster.node(leader).output().contains("No space left on device").then_some(())
        })
        .await;
        // What had arrived is given back: the log needs the space more.
        wait::until("space", wait::PATIENCE, || async { (df(&data, "avail") > 1 << 20).then_some(()) }).await;
        let old = cluster.node(3).direct(wait::PATIENCE).get("before", Consistency::Eventual, 0).await.unwrap();
        assert_eq!(old.kv.unwrap().value, "x");
        steady.go_on(10).await;
        cluster.check_alive();

        resize(&data, DISK_BYTES);
        cluster.node_mut(3).ready().await;
        steady.finish().await;
        all_equal(&cluster).await;
        cluster.check_alive();
    });
}

const DISK_BYTES: usize = 300 << 20;

/// A small disk in memory, in mounts that the test alone sees.
fn mount(place: &Path) {
    std::fs::create_dir_all(place).unwrap();
    let size = format!("size={DISK_BYTES}");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(place).status().unwrap();
    assert!(mounted.success());
}

/// Makes it smaller or larger, down to what is used of it.
fn resize(place: &Path, bytes: usize) {
    let size = format!("remount,size={bytes}");
    let resized = Command::new("mount").args(["-o", &size]).arg(place).status().unwrap();
    assert!(resized.success());
}
