//! Wall clocks play no part: one that jumps by an hour, forward and back, deposes nobody, fails no call and makes no
//! read stale, on the leader and on a follower.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use d_engine_client::Client;
use d_engine_proto::v1::Consistency;
use d_engine_tests::cluster::{Cluster, Node, Shape};
use d_engine_tests::lifetime::{Lifetime, Look};
use d_engine_tests::steady::{self, Steady};
use d_engine_tests::wait;
use d_engine_tests::wall_clock::WallClock;

/// Long enough for a busy machine; a step that counts would end it at once, however long it is.
const LEASE: Duration = Duration::from_secs(1);
const HOUR: i64 = 3600;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wall_clock_stepped_by_an_hour_both_ways_changes_nothing() {
    let (mut cluster, clocks) = with_wall_clocks().await;
    let before = cluster.reign().await;
    let mut steady = Steady::start(cluster.node(before.leader).direct(wait::PATIENCE)).await;
    for id in [before.leader, before.leader % 3 + 1] {
        for hours in [1, -1, 0] {
            clocks[id as usize - 1].step(hours * HOUR);
            is_logged(cluster.node(id), hours * HOUR).await;
            // Whoever counted on the clock would find the lease, or the patience with the leader, long over, or
            // stand still until they are.
            wait::pass(2 * LEASE).await;
            steady.go_on(50).await;
            assert_eq!(cluster.reign().await, before, "node {id}, {hours} h");
        }
    }
    let written = steady.finish().await;
    for node in cluster.nodes() {
        assert_eq!(steady::last_write(&node.direct(wait::PATIENCE)).await, written, "node {}", node.id);
    }
    cluster.check_alive();
}

/// Nor does it end a lease early, or keep it: the time to live is the monotonic clock's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_lasts_its_time_whatever_the_wall_clock_says() {
    const TTL: Duration = Duration::from_secs(2);
    // What a busy machine may add.
    const MARGIN: Duration = Duration::from_secs(5);
    let (cluster, clocks) = with_wall_clocks().await;
    let client = Client::builder().endpoints(cluster.addresses()).build().unwrap();
    for hours in [1, -1] {
        let reign = cluster.reign().await;
        let leader = cluster.node(reign.leader);
        let start = Instant::now();
        let key = format!("key {hours}");
        let lease = client.grant_lease(TTL).await.unwrap().lease;
        client.put(&key, "").lease(lease).await.unwrap();
        let mut lifetime = Lifetime { key: key.clone(), promised_until: TTL, ..Lifetime::default() };
        lifetime.due = Some(start.elapsed() + TTL + MARGIN);
        for clock in &clocks {
            clock.step(hours * HOUR);
        }
        let node = leader.direct(wait::PATIENCE);
        let mut gone = 0;
        while gone < 10 {
            let begun = start.elapsed();
            let answer = node.get(&key, Consistency::Lease, 0).await.unwrap();
            let (ended, there) = (start.elapsed(), answer.kv.is_some());
            lifetime.looks.push(Look { begun, ended, there, how: format!("{hours} h") });
            gone += usize::from(!there);
            lifetime.judge().unwrap_or_else(|wrong| panic!("{wrong}"));
        }
        is_logged(leader, hours * HOUR).await;
        assert_eq!(cluster.reign().await, reign, "{hours} h");
    }
}

/// A cluster whose nodes have wall clocks of their own.
async fn with_wall_clocks() -> (Cluster, Vec<WallClock>) {
    let extra = format!("[raft.read_consistency]\nlease_duration_ms = {}\n", LEASE.as_millis());
    let mut cluster = Cluster::prepare(Shape { extra, ..Shape::default() }).await;
    let directory = cluster.directory().to_owned();
    let mut clocks = Vec::new();
    for id in 1..=3 {
        let node = cluster.node_mut(id);
        clocks.push(WallClock::give(node, &directory));
        // Lines that come all the time, to see the node's wall clock by.
        node.set_environment("D_ENGINE_LOG", "info,[tick]=debug");
    }
    cluster.start_all().await;
    (cluster, clocks)
}

/// Waits until the node logs with a time of day `offset` seconds from the machine's, give or take some minutes.
async fn is_logged(node: &Node, offset: i64) {
    const MARGIN: i64 = 600;
    let seen = node.output().len();
    let now = i64::try_from(SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs()).unwrap() + offset;
    let (from, to) = (time_of_day(now - MARGIN), time_of_day(now + MARGIN));
    wait::until(&format!("node {} to log a time from {from} to {to}", node.id), wait::PATIENCE, || async {
        let output = node.output();
        let lines = output.get(seen..).unwrap_or_default().lines();
        // As text, times of this form have the order of the times themselves.
        lines
            .map(|line| line.get(..from.len()).unwrap_or_default())
            .any(|time| *from <= *time && *time <= *to)
            .then_some(())
    })
    .await;
}

/// As the log writes it, to the second.
fn time_of_day(seconds: i64) -> String {
    let output =
        Command::new("date").args(["-u", "-d", &format!("@{seconds}"), "+%Y-%m-%dT%H:%M:%S"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
