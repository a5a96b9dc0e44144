//! What callers feel when every node is restarted, one after the other, the leader last.

use std::time::{Duration, Instant};

use clap::Args;
use d_engine_client::Client;
use d_engine_tests::cluster::Cluster;

use crate::failover;
use crate::fill::{self, bar};
use crate::steady::{self, Calls, Steady, Window};

const KEYS: u64 = 10_000;
const VALUE_BYTES: usize = 256;

/// Restarts every node of three under load, one after the other, the leader last: SIGTERM, start, wait until it is ready.
#[derive(Args)]
pub(crate) struct Arguments {
    /// How often.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Callers that put and read linearizably in turn.
    #[arg(long, default_value_t = 64)]
    callers: usize,
    /// Seconds of load before the first restart.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
}

pub(crate) async fn measure(arguments: &Arguments) {
    let mut cluster = Cluster::start(3).await;
    let client = Client::builder().endpoints(cluster.addresses()).connect().await.expect("the cluster is ready");
    fill::fill(&client, KEYS, VALUE_BYTES).await;
    let steady = Steady::start(&client, arguments.callers, Calls::PutsAndGets, KEYS, VALUE_BYTES);
    let mut windows = Vec::new();
    let (mut stops, mut starts) = (Vec::new(), Vec::new());
    let calm = Instant::now();
    tokio::time::sleep(Duration::from_secs(arguments.seconds)).await;
    windows.push(Window { name: "no restart", from: calm, to: Instant::now() });
    let progress = bar(u64::from(arguments.rounds) * 3, "restarts");
    for _ in 0..arguments.rounds {
        let leader = cluster.reign().await.leader;
        let followers = (1..=3).filter(|id| *id != leader);
        for id in followers.chain([leader]) {
            let from = Instant::now();
            let node = cluster.node_mut(id);
            node.stop().await;
            let stopped = Instant::now();
            node.start();
            node.ready().await;
            let to = Instant::now();
            stops.push(stopped - from);
            starts.push(to - stopped);
            windows.push(Window { name: if id == leader { "the leader" } else { "a follower" }, from, to });
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    let calls = steady.finish().await;
    println!("{}\n", steady::table("calls while this is restarted", &calls, &windows));
    let rows = [("from SIGTERM to the end of the process", stops), ("from exec to the first 200 on /ready", starts)];
    println!("{}", failover::table("rolling restart of three nodes", &rows));
    println!(
        "{} callers that put (256 bytes) and read linearizably in turn, through one client with the default settings\n",
        arguments.callers
    );
}
