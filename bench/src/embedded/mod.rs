//! Measures the engine inside an application's own process: this one, alone and as the leader of three processes.
//!
//! The other two run this very program ([`Peer`]). What is asked runs on tokio's threads beside the engine, as in an
//! application. A read that is answered from memory is shorter than a look at the clock is exact, so one in
//! [`reads::SAMPLED`] is timed by itself, and the table says what a look at the clock takes.

mod group;
mod reads;
mod writes;

use std::hint::black_box;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use comfy_table::{Cell, CellAlignment, Table, presets};
use d_engine::prelude::EmbeddedEngine;
use d_engine_tests::processes;

use crate::failover;
use crate::fill::bar;
use group::Group;
use reads::Policy;

/// Keys in the store while it is measured, of 8 bytes.
const KEYS: u64 = 10_000;
const VALUE_BYTES: usize = 256;
/// Calls of `is_leader()` that are timed together.
const LOOKS: u32 = 2_000_000;

/// Measures the embedded engine, alone and in three processes: writes, reads, memory, time to ready, `is_leader()`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Seconds of load per row.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Callers that write, a row for each number.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 1000])]
    writers: Vec<usize>,
    /// Callers that read, a row for each number.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 1000])]
    readers: Vec<usize>,
    /// How often an engine is started in an empty directory; 0: no row for that.
    #[arg(long, default_value_t = 20)]
    starts: u32,
    /// In how many processes, a run for each number: 1 or 3.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 3])]
    processes: Vec<u32>,
}

/// One of the processes that are not measured but take part.
#[derive(Args)]
pub(crate) struct Peer {
    #[arg(long)]
    config: PathBuf,
}

/// Runs until it is killed.
pub(crate) async fn run_peer(peer: &Peer) {
    let _engine = EmbeddedEngine::start_with(&peer.config).await.expect("the engine starts");
    std::future::pending::<()>().await;
}

/// A process' memory over time.
struct Memory {
    processes: u32,
    before: u64,
    ready: u64,
    filled: u64,
    /// Of the other processes, filled.
    peers: Vec<u64>,
}

/// What one look at who leads costs.
struct Looks {
    processes: u32,
    name: &'static str,
    threads: usize,
    nanoseconds: f64,
}

pub(crate) async fn measure(arguments: &Arguments) {
    let (mut memory, mut looks, mut writes, mut reads) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let duration = Duration::from_secs(arguments.seconds);
    let rows = arguments.writers.len() + arguments.readers.len() * Policy::ALL.len();
    let progress = bar((rows * arguments.processes.len()) as u64, "rows");
    for processes in arguments.processes.iter().copied() {
        let before = own_resident();
        let group = Group::start(processes).await;
        let ready = own_resident();
        let client = group.leader().client();
        writes::fill(&client, KEYS, VALUE_BYTES).await;
        let peers = group.peers().map(processes::resident_bytes).collect();
        memory.push(Memory { processes, before, ready, filled: own_resident(), peers });
        looks.extend(look(processes, group.leader()).await);
        for policy in Policy::ALL {
            for callers in &arguments.readers {
                reads.push((processes, reads::measure(&client, policy, *callers, duration).await));
                progress.inc(1);
            }
        }
        for callers in &arguments.writers {
            writes.push((processes, writes::measure(&group, *callers, duration).await));
            progress.inc(1);
        }
        group.stop().await;
    }
    progress.finish_and_clear();
    println!("{}", writes::table(&writes));
    println!(
        "{KEYS} keys of 8 bytes, values of {VALUE_BYTES} bytes, each on the disks of a majority before its answer\n"
    );
    println!("{}", reads::table(&reads));
    println!(
        "linearizable reads are all timed, of the others one in {}; each time has a look at the clock in it: {:.0} ns\n",
        reads::SAMPLED,
        clock_nanoseconds()
    );
    println!("{}\n", look_table(&looks));
    println!("{}", memory_table(&memory));
    println!(
        "a second row begins with what the first run left with the allocator; --processes 3 is a run of its own\n"
    );
    if arguments.starts > 0 {
        println!("{}\n", starts(arguments).await);
    }
}

fn own_resident() -> u64 {
    processes::resident_bytes(std::process::id())
}

/// Time to ready in empty directories.
async fn starts(arguments: &Arguments) -> Table {
    let progress = bar(u64::from(arguments.starts) * arguments.processes.len() as u64, "starts");
    let mut rows = Vec::new();
    for processes in arguments.processes.iter().copied() {
        let mut times = Vec::new();
        for _ in 0..arguments.starts {
            let group = Group::start(processes).await;
            times.push(group.time_to_ready());
            group.stop().await;
            progress.inc(1);
        }
        rows.push((if processes == 1 { "one process" } else { "three processes, from exec of the other two" }, times));
    }
    progress.finish_and_clear();
    failover::table("time to ready, empty directories", &rows)
}

/// Times many looks together, by one thread and by as many as there are cores.
async fn look(processes: u32, engine: &EmbeddedEngine) -> Vec<Looks> {
    let is_leader = |engine: &EmbeddedEngine| black_box(engine.is_leader());
    let knows_leader = |engine: &EmbeddedEngine| black_box(engine.leader_info()).is_some();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut rows = Vec::new();
    for threads in if cores > 1 { vec![1, cores] } else { vec![1] } {
        for (name, look) in [("is_leader()", is_leader as fn(&EmbeddedEngine) -> bool), ("leader_info()", knows_leader)]
        {
            let timed = |engine: EmbeddedEngine| {
                move || {
                    let began = Instant::now();
                    let yes = (0..LOOKS).filter(|_| look(&engine)).count();
                    assert!(yes > 0, "the engine measured is the leader");
                    began.elapsed().as_secs_f64() * 1e9 / f64::from(LOOKS)
                }
            };
            let tasks: Vec<_> = (0..threads).map(|_| tokio::task::spawn_blocking(timed(engine.clone()))).collect();
            let mut sum = 0.0;
            for task in tasks {
                sum += task.await.expect("it leads");
            }
            rows.push(Looks { processes, name, threads, nanoseconds: sum / threads as f64 });
        }
    }
    rows
}

/// What is measured where nothing lies between two looks at the clock.
fn clock_nanoseconds() -> f64 {
    let began = Instant::now();
    for _ in 0..LOOKS {
        black_box(Instant::now().elapsed());
    }
    // Two looks each, of which one is within the time.
    began.elapsed().as_secs_f64() * 1e9 / f64::from(LOOKS) / 2.0
}

fn look_table(looks: &[Looks]) -> Table {
    let mut table = table(&["who leads?", "processes", "threads at once", "mean ns"]);
    for row in looks {
        let numbers = [row.processes.to_string(), row.threads.to_string(), format!("{:.1}", row.nanoseconds)];
        add_row(&mut table, row.name, numbers);
    }
    table
}

fn memory_table(memory: &[Memory]) -> Table {
    let mut table =
        table(&["resident MiB", "before start", "ready", "with the keys", "each other process, with the keys"]);
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    for row in memory {
        let peers: Vec<String> = row.peers.iter().map(|bytes| mib(*bytes)).collect();
        let numbers = [mib(row.before), mib(row.ready), mib(row.filled), peers.join(", ")];
        add_row(&mut table, if row.processes == 1 { "one process" } else { "the leader of three" }, numbers);
    }
    table
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(header);
    table
}

fn add_row(table: &mut Table, name: &str, numbers: impl IntoIterator<Item = String>) {
    let cells = numbers.into_iter().map(|number| Cell::new(number).set_alignment(CellAlignment::Right));
    table.add_row(std::iter::once(Cell::new(name)).chain(cells));
}
