//! Backups on real processes, by the commands that docs/operations.md shows: saved from a cluster under load, examined,
//! damaged and refused, restored into a node that runs, and recovered from a single survivor.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use d_engine_client::{Client, ErrorKind, MemberRole, Op, Revision, Txn};
use d_engine_proto::v1::{self, Consistency};
use d_engine_proto::{DetailedStatus, ErrorCode};
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::process::d_engine;
use d_engine_tests::wait;
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(10);
/// `REVISION_GAP` of the server.
const GAP: u64 = 1 << 40;

fn run(args: &[&str]) -> Output {
    Command::new(d_engine()).args(args).output().expect("d-engine runs")
}

/// What the command prints as JSON.
fn json(args: &[&str]) -> Value {
    let output = run(&[args, &["-o", "json"]].concat());
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {error}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Why the command refuses.
fn refusal(args: &[&str]) -> String {
    let output = run(args);
    assert!(!output.status.success(), "{args:?} was done");
    String::from_utf8(output.stderr).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn client(address: &str) -> Client {
    Client::builder().endpoints([address]).call_timeout(DEADLINE).build().unwrap()
}

/// Makes the data directory of `cluster`'s first node from what `source` says.
fn restore(cluster: &Cluster, source: &[&str]) -> Value {
    let node = cluster.node(1);
    let (data, address) = (node.data(), node.address.to_string());
    let target = ["--data-dir", text(&data), "--node-id", "1", "--address", &address];
    json(&[&["snapshot", "restore"], source, &target].concat())
}

/// A cluster of one that was made from what `source` says, and runs.
async fn restored(source: &[&str]) -> (Cluster, Value) {
    let mut cluster = Cluster::prepare(Shape { nodes: 1, ..Shape::default() }).await;
    let made = restore(&cluster, source);
    cluster.start_all().await;
    (cluster, made)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_under_load_holds_a_moment_of_it_and_is_restored_as_a_cluster_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let archive = directory.path().join("backup.snapshot");
    let (old_cluster, old_epoch, last_known, saved);
    {
        let cluster = Cluster::start(3).await;
        let addresses = cluster.addresses().join(",");
        let writer = Client::builder().endpoints(cluster.addresses()).call_timeout(DEADLINE).build().unwrap();
        for key in 0..50 {
            writer.put(format!("before/{key}"), "there").await.unwrap();
        }
        let lease = writer.grant_lease(Duration::from_secs(3600)).await.unwrap().lease;
        writer.put("leased", "value").lease(lease).await.unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let load = {
            let (writer, stop) = (writer.clone(), stop.clone());
            tokio::spawn(async move {
                // Always both at once: a moment has both or neither.
                let mut turn = 0_u64;
                while !stop.load(Ordering::Relaxed) {
                    turn += 1;
                    let txn =
                        Txn::new().then(Op::put("left", turn.to_string())).then(Op::put("right", turn.to_string()));
                    writer.txn(txn).await.unwrap();
                }
            })
        };
        saved = tokio::task::spawn_blocking({
            let archive = archive.clone();
            move || json(&["--endpoints", &addresses, "snapshot", "save", text(&archive)])
        })
        .await
        .unwrap();
        stop.store(true, Ordering::Relaxed);
        load.await.unwrap();
        let last = writer.put("after", "the backup").await.unwrap();
        (old_cluster, old_epoch, last_known) = (last.header.cluster_id, last.header.epoch, last.header.revision);
        assert_eq!((saved["verified"].as_bool(), saved["epoch"].as_u64()), (Some(true), Some(0)));
        assert!(saved["revision"].as_u64().unwrap() < last_known.get());
        assert!(refusal(&["snapshot", "save", text(&archive)]).contains("exists already"));
    }
    let seen = json(&["snapshot", "inspect", text(&archive)]);
    assert_eq!(seen["revision"], saved["revision"]);
    assert_eq!(seen["cluster_id"].as_str().unwrap(), format!("{old_cluster:016x}"));
    let table = String::from_utf8(run(&["snapshot", "inspect", text(&archive)]).stdout).unwrap();
    assert!(table.contains("verified") && table.contains("keys"), "{table}");

    refuses_what_is_damaged(&archive, directory.path());

    let (mut cluster, made) = restored(&[text(&archive)]).await;
    assert_eq!(made["epoch"].as_u64(), Some(1));
    assert_eq!(made["revision"].as_u64().unwrap(), saved["revision"].as_u64().unwrap() + GAP);
    let address = cluster.addresses().remove(0);
    let reader = client(&address);
    let found = reader.get("before/49").await.unwrap();
    assert_eq!(found.kv.map(|kv| kv.value), Some("there".into()));
    assert!(found.header.epoch > old_epoch && found.header.cluster_id != old_cluster);
    let (left, right) = (reader.get("left").await.unwrap().kv, reader.get("right").await.unwrap().kv);
    assert_eq!(left.map(|kv| kv.value), right.map(|kv| kv.value), "one moment");
    assert!(reader.get("after").await.unwrap().kv.is_none(), "it was written later");
    let leases = reader.get("leased").await.unwrap();
    assert!(leases.kv.unwrap().lease.is_some());

    // Whoever goes on from the old history is told that it is gone, and fencing tokens go on.
    let watch = reader.watch_prefix("before/").from(last_known).await;
    let refused = match watch {
        Ok(mut stream) => stream.next().await.expect("it ends").unwrap_err(),
        Err(error) => error,
    };
    assert_eq!(refused.kind(), ErrorKind::Compacted, "{refused}");
    let written = reader.put("new", "value").await.unwrap();
    assert!(written.header.revision > Revision(last_known.get() + GAP / 2), "past any that was issued");

    // It is a cluster like any: it comes back, and is saved again.
    cluster.node_mut(1).kill();
    cluster.start_all().await;
    let found = client(&address).get("new").await.unwrap();
    assert_eq!(found.kv.map(|kv| kv.value), Some("value".into()));
    let again = directory.path().join("again.snapshot");
    let saved = json(&["--endpoints", &address, "snapshot", "save", text(&again)]);
    assert_eq!(saved["epoch"].as_u64(), Some(1));
}

fn refuses_what_is_damaged(archive: &Path, directory: &Path) {
    let whole = std::fs::read(archive).unwrap();
    let (broken, data) = (directory.join("broken"), directory.join("never"));
    let restore = ["snapshot", "restore", text(&broken), "--data-dir", text(&data), "--node-id", "1"];
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for (bytes, word) in [
        (&whole[..whole.len() - 7], "cut short"),
        (&flipped[..], "damaged"),
        (&b"not one"[..], "not a d-engine snapshot"),
    ] {
        std::fs::write(&broken, bytes).unwrap();
        let inspected = refusal(&["snapshot", "inspect", text(&broken)]);
        assert!(inspected.contains(word) && inspected.contains("broken"), "{inspected}");
        let refused = refusal(&restore);
        assert!(refused.contains(word), "{refused}");
        assert!(!data.join("state").exists());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_the_old_cluster_is_kept_from_the_restored_one() {
    let directory = tempfile::tempdir().unwrap();
    let archive = directory.path().join("backup");
    let mut cluster = Cluster::start(1).await;
    let address = cluster.addresses().remove(0);
    let old = client(&address);
    old.put("key", "old").await.unwrap();
    json(&["--endpoints", &address, "snapshot", "save", text(&archive)]);

    // The same node, at the same address, from its backup.
    cluster.node_mut(1).stop().await;
    let data = cluster.node(1).data();
    let source = ["snapshot", "restore", text(&archive), "--data-dir", text(&data), "--node-id", "1"];
    assert!(refusal(&source).contains("not empty"));
    std::fs::remove_dir_all(&data).unwrap();
    json(&[&source[..], &["--address", &address]].concat());
    cluster.start_all().await;

    let refused = wait::until("the old client to reach the new cluster", wait::PATIENCE, || async {
        old.get("key").await.err().filter(|error| error.kind() == ErrorKind::WrongCluster)
    })
    .await;
    assert!(refused.to_string().contains("cluster"), "{refused}");
    let refused = old.put("key", "written by mistake").await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::WrongCluster, "{refused}");
    let found = client(&address).get("key").await.unwrap();
    assert_eq!(found.kv.map(|kv| kv.value), Some("old".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_of_three_nodes_becomes_three_nodes_that_outrank_the_old_ones() {
    for engine in ["RocksDB", "Segments"] {
        three_become_three(engine).await;
    }
}

async fn three_become_three(engine: &str) {
    let directory = tempfile::tempdir().unwrap();
    let archive = directory.path().join("backup.snapshot");
    let extra = format!("[raft.persistence]\nengine = {engine:?}\n");
    let shape = || Shape { extra: extra.clone(), ..Shape::default() };
    let [mut before, mut after] = Cluster::prepare_together([shape(), shape()]).await;
    before.start_all().await;

    let both = [before.addresses(), after.addresses()].concat();
    let old = Client::builder().endpoints(both).call_timeout(DEADLINE).build().unwrap();
    for key in 0..20 {
        old.put(format!("key/{key}"), key.to_string()).await.unwrap();
    }
    old.delete("key/7").await.unwrap();
    let lock = |client: &Client| client.lock("disk").ttl(Duration::from_secs(2)).timeout(wait::PATIENCE);
    let held = lock(&old).acquire().await.unwrap();
    let leader = before.node(before.leader(&[]).await);
    let (direct, address) = (leader.direct(DEADLINE), leader.address.to_string());
    let register = direct.timed(v1::SessionRegisterRequest { ttl_ms: 3_600_000 });
    let session = direct.session().register(register).await.unwrap().into_inner().session;
    let call = v1::SessionCall { session, sequence: 1, ..v1::SessionCall::default() };
    let once =
        v1::PutRequest { key: "once".into(), value: "x".into(), session: Some(call), ..v1::PutRequest::default() };
    direct.kv().put(direct.timed(once.clone())).await.unwrap();
    let saved = json(&["--endpoints", &address, "snapshot", "save", text(&archive)]);
    assert!(saved["sessions"].as_u64() >= Some(1), "the session is in it: {saved}");
    let kept = direct.at(saved["revision"].as_u64().unwrap()).await.unwrap();
    assert_eq!(kept.get(&b"key/19"[..]).map(|value| &value[..]), Some(&b"19"[..]));
    // What came later is lost, but for what it had told others.
    let outranked = old.lock("another").acquire().await.unwrap().token().max(held.token());
    let last = old.put("key/0", "too late").await.unwrap().header;

    let made = restore(&after, &[text(&archive), "--engine", engine]);
    let members: Vec<_> = after.nodes().iter().map(|node| (node.id, node.address)).collect();
    for (id, address) in &members {
        let known: Vec<_> = members.iter().filter(|(other, _)| *other == 1 || other == id).copied().collect();
        after.node(*id).write_config(&known, &extra);
        if *id > 1 {
            after.node(*id).joins();
            assert!(!after.node(*id).data().exists(), "{address} begins with nothing");
        }
    }
    after.start_all().await;
    let new = Client::builder().endpoints(after.addresses()).call_timeout(DEADLINE).build().unwrap();
    wait::until("three voters", wait::PATIENCE, || async {
        let members = new.members().await.ok()?.members;
        (members.iter().filter(|member| member.role == MemberRole::Voter).count() == 3).then_some(())
    })
    .await;

    let revision = made["revision"].as_u64().unwrap();
    assert!(revision > last.revision.get(), "past any that was issued");
    for node in after.nodes() {
        let direct = node.direct(DEADLINE);
        assert_eq!(direct.at(revision).await.unwrap(), kept, "{engine}: node {}", node.id);
        let header = direct.get("key/0", Consistency::Eventual, revision).await.unwrap().header.unwrap();
        assert_eq!(header.epoch, last.epoch.get() + 1, "{engine}: node {}", node.id);
        assert_ne!(header.cluster_id, last.cluster_id);
    }
    let leader = after.node(after.leader(&[]).await).direct(DEADLINE);
    let refused = leader.kv().put(leader.timed(once)).await.unwrap_err();
    let code = DetailedStatus::from_status(&refused).and_then(|detailed| detailed.code());
    assert_eq!(code, Some(ErrorCode::SessionExpired), "{engine}: {refused}");

    // The lease begins anew with its full time to live; nobody renews it.
    let guard = lock(&new).acquire().await.unwrap();
    assert!(guard.token() > outranked, "{engine}: {} after {outranked}", guard.token());
    assert!(guard.token().revision > outranked.revision, "also for who looks at nothing else");

    // Nobody of the old cluster is left, and its clients find the new one.
    for id in 1..=3 {
        before.node_mut(id).kill();
    }
    let refused = wait::until("the old client to reach the new cluster", wait::PATIENCE, || async {
        let error = old.put("key/0", "by mistake").await.expect_err("it belongs to the old cluster");
        (error.kind() == ErrorKind::WrongCluster).then_some(error)
    })
    .await;
    assert!(refused.to_string().contains("cluster"), "{refused}");
    assert_eq!(new.get("key/0").await.unwrap().into_value().as_deref(), Some(&b"0"[..]));

    // It is a cluster of three: any one of them may fail.
    for id in 1..=3 {
        after.node_mut(id).kill();
        new.put("key/0", id.to_string()).await.unwrap();
        after.start_all().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_survivor_is_recovered_with_its_log_to_the_end() {
    let kept: PathBuf;
    let acknowledged = 30;
    {
        let mut cluster = Cluster::start(3).await;
        let writer = Client::builder().endpoints(cluster.addresses()).call_timeout(DEADLINE).build().unwrap();
        let mut last = Revision(0);
        for key in 0..acknowledged {
            last = writer.put(format!("key/{key}"), key.to_string()).await.unwrap().header.revision;
        }
        let survivor = cluster.node(2).direct(DEADLINE);
        survivor.get("key/0", Consistency::Eventual, last.get()).await.unwrap();
        // As by a loss of power in two of three machines: the survivor had no time to write its state behind.
        for id in 1..=3 {
            cluster.node_mut(id).kill();
        }
        kept = cluster.keep().join("n2").join("data");
    }
    let (cluster, made) = restored(&["--from-data-dir", text(&kept)]).await;
    assert_eq!(made["keys"].as_u64(), Some(acknowledged));
    assert_eq!(made["epoch"].as_u64(), Some(1));
    let reader = client(&cluster.addresses()[0]);
    for key in 0..acknowledged {
        let found = reader.get(format!("key/{key}")).await.unwrap().kv.expect("it was acknowledged");
        assert_eq!(found.value, key.to_string());
    }
    reader.put("new", "value").await.unwrap();
    std::fs::remove_dir_all(kept.ancestors().nth(2).unwrap()).unwrap();
}
