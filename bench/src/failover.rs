//! How long a fail-over and a start take.

use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use d_engine_client::Client;
use d_engine_tests::cluster::{Cluster, Shape};
use indicatif::ProgressBar;

/// Pause between two puts of the client that waits for the next leader; bounds the resolution.
const PROBE_TIMEOUT: Duration = Duration::from_secs(30);

/// Kills the leader `rounds` times; each time ends with the first put acknowledged after the kill.
pub(crate) async fn times(rounds: u32) -> Vec<Duration> {
    let mut cluster = Cluster::start(3).await;
    let client = Client::builder()
        .endpoints(cluster.addresses())
        .call_timeout(PROBE_TIMEOUT)
        .connect()
        .await
        .expect("the cluster is ready");
    let progress = ProgressBar::new(u64::from(rounds));
    let mut times = Vec::new();
    for round in 0..rounds {
        client.put("warm", format!("{round}")).await.expect("a healthy cluster accepts a put");
        let leader = cluster.leader(&[]).await;
        cluster.node_mut(leader).kill();
        let killed = Instant::now();
        // A put that reached the dead leader may be unknown; the next one finds the new leader.
        while client.put("after", format!("{round}")).await.is_err() {}
        times.push(killed.elapsed());
        cluster.start_all().await;
        progress.inc(1);
    }
    progress.finish_and_clear();
    times
}

/// Starts fresh clusters of this size.
pub(crate) async fn times_to_ready(nodes: u32, rounds: u32) -> Vec<Duration> {
    let mut times = Vec::new();
    for _ in 0..rounds {
        let mut cluster = Cluster::prepare(Shape { nodes, ..Shape::default() }).await;
        let started = Instant::now();
        cluster.start_all().await;
        times.push(started.elapsed());
    }
    times
}

/// Median and worst of each row.
pub(crate) fn table(title: &str, rows: &[(&str, Vec<Duration>)]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header([title, "runs", "median ms", "worst ms"]);
    for (name, times) in rows {
        let mut times = times.clone();
        times.sort_unstable();
        let milliseconds = |time: Option<&Duration>| time.map_or(String::new(), |time| time.as_millis().to_string());
        let median = milliseconds(times.get(times.len() / 2));
        table.add_row([(*name).to_owned(), times.len().to_string(), median, milliseconds(times.last())]);
    }
    table
}
