//! How long a node with a large store takes until it serves again.

use std::time::{Duration, Instant};

use clap::Args;
use d_engine_client::Client;
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::processes;

use crate::failover;
use crate::fill::{self, bar};
use crate::steady::{Calls, Steady};

const VALUE_BYTES: usize = 256;
/// Load before a SIGKILL, so that the log holds more than the state's database.
const LOAD: Duration = Duration::from_secs(1);
const CALLERS: usize = 64;

/// Restarts one node alone, and nodes of three, that hold many keys.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Keys in the store, with values of 256 bytes.
    #[arg(long, default_value_t = 1_000_000)]
    keys: u64,
    /// How often each.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
}

/// Who is restarted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    Everyone,
    AFollower,
}

/// What ends a process.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// After it has written everything down.
    Sigterm,
    /// In the midst of work.
    Sigkill,
}

/// What is measured: who is restarted, after which end.
type Case = (&'static str, Who, End);

const ALONE: &[Case] = &[
    ("one node, after SIGTERM", Who::Everyone, End::Sigterm),
    ("one node, after SIGKILL under load", Who::Everyone, End::Sigkill),
];

const OF_THREE: &[Case] = &[
    ("a follower of three, after SIGTERM", Who::AFollower, End::Sigterm),
    ("a follower of three, after SIGKILL under load", Who::AFollower, End::Sigkill),
    ("all three together, after SIGTERM", Who::Everyone, End::Sigterm),
    ("all three together, after SIGKILL under load", Who::Everyone, End::Sigkill),
];

pub(crate) async fn measure(arguments: &Arguments) {
    let mut rows = Vec::new();
    for (nodes, cases) in [(1, ALONE), (3, OF_THREE)] {
        eprintln!("filling {} ...", if nodes == 1 { "one node" } else { "three nodes" });
        let mut cluster = Cluster::prepare(Shape { nodes, ..Shape::default() }).await;
        cluster.start_all().await;
        let client = Client::builder().endpoints(cluster.addresses()).connect().await.expect("the cluster is ready");
        fill::fill(&client, arguments.keys, VALUE_BYTES).await;
        let progress = bar(u64::from(arguments.rounds) * cases.len() as u64, "restarts");
        for (name, who, end) in cases {
            let mut times = Vec::new();
            for _ in 0..arguments.rounds {
                times.push(restart(&mut cluster, &client, arguments.keys, *who, *end).await);
                progress.inc(1);
            }
            rows.push((*name, times));
        }
        progress.finish_and_clear();
        let servers = processes::servers();
        let resident: u64 = servers.iter().map(|id| processes::resident_bytes(*id)).sum();
        let mib = resident as f64 / servers.len().max(1) as f64 / f64::from(1 << 20);
        println!(
            "resident with {} keys, nodes: {nodes}, after the last restart: {mib:.0} MiB per node",
            arguments.keys
        );
    }
    println!("{}", failover::table("from exec to the first 200 on /ready", &rows));
    println!("{} keys of 8 bytes with 256 bytes each; SIGKILL comes while {CALLERS} callers put\n", arguments.keys);
}

/// Ends who is asked for, and measures from the start until all of them are ready.
async fn restart(cluster: &mut Cluster, client: &Client, keys: u64, who: Who, end: End) -> Duration {
    // Everyone has it, before somebody goes.
    let leader = cluster.reign().await.leader;
    let mut ids: Vec<u32> = cluster.nodes().iter().map(|node| node.id).collect();
    if who == Who::AFollower {
        ids.retain(|id| *id != leader);
        ids.truncate(1);
    }
    let load = match end {
        End::Sigterm => None,
        End::Sigkill => {
            let steady = Steady::start(client, CALLERS, Calls::Puts, keys, VALUE_BYTES);
            tokio::time::sleep(LOAD).await;
            Some(steady)
        }
    };
    for id in ids {
        match end {
            End::Sigterm => cluster.node_mut(id).stop().await,
            End::Sigkill => cluster.node_mut(id).kill(),
        }
    }
    if let Some(load) = load {
        load.abandon();
    }
    let began = Instant::now();
    cluster.start_all().await;
    began.elapsed()
}
