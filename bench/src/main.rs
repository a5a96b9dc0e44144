//! Measures what a user feels: throughput and latency of puts and of each kind of get, what they cost in CPU and
//! memory, what watches and leases cost, how long a fail-over and a start take.
//!
//! Three real server processes on loopback, which share the machine with the load. Every put is on the disks of a
//! majority before its answer. `make figures` runs it.

#![expect(
    clippy::expect_used,
    reason = "a measurement that cannot go on is worth nothing: a panic is its error message"
)]

mod churn;
mod embedded;
mod failover;
mod fill;
mod idle;
mod keep_alives;
mod load;
mod restart;
mod rolling;
mod snapshot;
mod steady;
mod watches;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};
use comfy_table::{Cell, CellAlignment, Table, presets};
use d_engine_client::Client;
use d_engine_tests::cluster::{Cluster, Shape};

use load::{Clients, Figures, Operation, Transport};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Measures a three-node cluster on this machine.
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Seconds of load per row.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Callers of the rows, each one with an operation in flight; 0: no rows.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 64, 1000, 10_000])]
    callers: Vec<usize>,
    /// Nodes of the cluster that is under load.
    #[arg(long, default_value_t = 3)]
    nodes: u32,
    /// TOML added to the configuration of every node that is under load.
    #[arg(long, default_value = "")]
    extra: String,
    /// Only puts, over the pipeline.
    #[arg(long)]
    puts_only: bool,
    /// Clients that do nothing, to see what they keep in memory; 0: none.
    #[arg(long, default_value_t = 1000)]
    idle_clients: usize,
    /// How often the leader is killed; 0: never.
    #[arg(long, default_value_t = 20)]
    failovers: u32,
    /// Where the distribution of the fail-overs is drawn, an SVG.
    #[arg(long)]
    failover_picture: Option<PathBuf>,
    /// How often one node and three nodes are started; 0: never.
    #[arg(long, default_value_t = 10)]
    starts: u32,
    /// Watches of one prefix, a row for each number; 0: no rows, nor one for the delay.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 100, 10_000])]
    watches: Vec<usize>,
    /// Seconds of keep-alives; 0: none.
    #[arg(long, default_value_t = 5)]
    keep_alive_seconds: u64,
    /// Seconds of churn with automatic compaction; 0: none.
    #[arg(long, default_value_t = 0)]
    churn_seconds: u64,
}

/// What is measured by itself: each takes minutes.
#[derive(Subcommand)]
enum Command {
    Snapshot(snapshot::Arguments),
    Restart(restart::Arguments),
    Rolling(rolling::Arguments),
    Embedded(embedded::Arguments),
    #[command(hide = true)]
    EmbeddedPeer(embedded::Peer),
}

#[tokio::main]
async fn main() {
    let mut arguments = Arguments::parse();
    match arguments.command.take() {
        None => measure_usual(&arguments).await,
        Some(Command::Snapshot(asked)) => snapshot::measure(&asked).await,
        Some(Command::Restart(asked)) => restart::measure(&asked).await,
        Some(Command::Rolling(asked)) => rolling::measure(&asked).await,
        Some(Command::Embedded(asked)) => embedded::measure(&asked).await,
        Some(Command::EmbeddedPeer(peer)) => embedded::run_peer(&peer).await,
    }
}

async fn measure_usual(arguments: &Arguments) {
    if !arguments.callers.contains(&0) {
        measure_load(arguments).await;
    }
    if !arguments.watches.contains(&0) {
        measure_watches(arguments).await;
    }
    if arguments.idle_clients > 0 {
        eprintln!("{} idle clients ...", arguments.idle_clients);
        println!("{}\n", idle::table(&idle::measure(arguments.idle_clients).await));
    }
    if arguments.keep_alive_seconds > 0 {
        eprintln!("keep-alives ...");
        let figures = keep_alives::measure(Duration::from_secs(arguments.keep_alive_seconds)).await;
        println!("{}\n", keep_alives::table(&figures));
    }
    if arguments.churn_seconds > 0 {
        eprintln!("churn ...");
        println!("{}\n", churn::run(Duration::from_secs(arguments.churn_seconds)).await);
    }
    if arguments.starts > 0 {
        let alone = failover::times_to_ready(1, arguments.starts).await;
        let three = failover::times_to_ready(3, arguments.starts).await;
        println!(
            "{}",
            failover::table(
                "time to ready, from exec to the first 200 on /ready",
                &[("one node, empty directory", alone), ("three nodes, empty directories", three),]
            )
        );
    }
    if arguments.failovers > 0 {
        let times = failover::times(arguments.failovers).await;
        if let Some(picture) = &arguments.failover_picture {
            failover::draw(&times, picture).expect("the picture can be written");
        }
        println!(
            "{}",
            failover::table(
                "fail-over, from SIGKILL of the leader to the next acknowledged put",
                &[("three nodes, default settings", times),]
            )
        );
    }
}

async fn measure_load(arguments: &Arguments) {
    let shape = Shape { nodes: arguments.nodes, extra: arguments.extra.clone(), ..Shape::default() };
    let mut cluster = Cluster::prepare(shape).await;
    cluster.start_all().await;
    let mut transports = Vec::new();
    let kinds = if arguments.puts_only { &Transport::ALL[..1] } else { &Transport::ALL[..] };
    for transport in kinds.iter().copied() {
        transports.push(Clients::connect(&cluster.addresses(), transport).await);
    }
    let mut rows = Vec::new();
    let operations = if arguments.puts_only { &Operation::ALL[..1] } else { &Operation::ALL[..] };
    for operation in operations.iter().copied() {
        for callers in &arguments.callers {
            for clients in &transports {
                eprintln!("{} with {callers} callers ...", operation.name());
                rows.push(load::measure(clients, operation, *callers, Duration::from_secs(arguments.seconds)).await);
            }
        }
    }
    println!("{}", load_table(&rows));
    println!(
        "{} cores, {} nodes, 8-byte keys, 256-byte values, one client with one connection to each node; all but eventual \
         gets go to the leader\n",
        cores(),
        arguments.nodes
    );
}

async fn measure_watches(arguments: &Arguments) {
    eprintln!("delay of events ...");
    {
        let cluster = Cluster::start(3).await;
        let client = Client::builder().endpoints(cluster.addresses()).connect().await.expect("the cluster is ready");
        println!("{}\n", watches::delay_table(&watches::delays(&client).await));
    }
    let mut rows = Vec::new();
    for number in &arguments.watches {
        eprintln!("{number} watches ...");
        rows.push(watches::fan_out(*number, Duration::from_secs(arguments.seconds)).await);
    }
    println!("{}\n", watches::fan_out_table(&rows));
}

fn load_table(rows: &[Figures]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "operation",
        "callers",
        "over",
        "per second",
        "p50 µs",
        "p99 µs",
        "server CPU µs/op",
        "client CPU µs/op",
        "RSS MiB/node",
        "errors",
    ]);
    for row in rows {
        let numbers = [
            row.callers.to_string(),
            row.transport.name().to_owned(),
            format!("{:.0}", row.per_second),
            row.p50_us.to_string(),
            row.p99_us.to_string(),
            format!("{:.1}", row.server_cpu_us),
            format!("{:.1}", row.client_cpu_us),
            format!("{:.0}", row.rss_mib),
            row.errors.to_string(),
        ];
        let cells = numbers.into_iter().map(|number| Cell::new(number).set_alignment(CellAlignment::Right));
        table.add_row(std::iter::once(Cell::new(row.operation.name())).chain(cells));
    }
    table
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
