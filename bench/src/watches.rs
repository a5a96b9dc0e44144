//! What watching costs: how late an event comes, how many a cluster delivers, what an idle watch keeps in memory.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use d_engine_client::{Client, WatchStream};
use d_engine_tests::cluster::Cluster;
use hdrhistogram::Histogram;

use d_engine_tests::processes;

const PREFIX: &str = "watched/";
const VALUE_BYTES: usize = 256;
/// Writers of the fan-out rows.
const WRITERS: usize = 16;
const DELAYS: usize = 2000;

/// Microseconds from the acknowledgement of a put to its event; 0 if the event was first.
pub(crate) async fn delays(client: &Client) -> Histogram<u64> {
    let mut watch = client.watch_prefix(PREFIX).await.expect("a watch begins");
    let arrivals = tokio::spawn(async move {
        let mut arrivals = HashMap::new();
        while arrivals.len() < DELAYS {
            let update = watch.next().await.expect("endless").expect("not compacted");
            let now = Instant::now();
            arrivals.extend(update.events.iter().map(|event| (event.revision(), now)));
        }
        arrivals
    });
    let mut acknowledged = Vec::with_capacity(DELAYS);
    for number in 0..DELAYS {
        let put = client.put(format!("{PREFIX}{number}"), vec![b'x'; VALUE_BYTES]).await.expect("a healthy cluster");
        acknowledged.push((put.header.revision, Instant::now()));
    }
    let arrivals = arrivals.await.expect("no panic");
    let mut delays = Histogram::new_with_bounds(1, 60_000_000, 3).expect("valid bounds");
    for (revision, acknowledged) in acknowledged {
        let delay = arrivals[&revision].saturating_duration_since(acknowledged);
        delays.saturating_record(u64::try_from(delay.as_micros()).unwrap_or(u64::MAX));
    }
    delays
}

/// One row of the fan-out.
pub(crate) struct FanOut {
    watches: usize,
    puts_per_second: f64,
    events_per_second: f64,
    server_cpu_us: f64,
    server_bytes_per_watch: f64,
}

/// Opens so many watches of one prefix, lets writers put below it, and counts what arrives.
pub(crate) async fn fan_out(watches: usize, duration: Duration) -> FanOut {
    let cluster = Cluster::start(3).await;
    let client = Client::builder().endpoints(cluster.addresses()).connect().await.expect("the cluster is ready");
    let servers = processes::servers();
    let resident = || servers.iter().map(|id| processes::resident_bytes(*id)).sum::<u64>();
    let cpu = || servers.iter().map(|id| processes::cpu_time(*id)).sum::<Duration>();
    client.put(format!("{PREFIX}warm"), vec![b'x'; VALUE_BYTES]).await.expect("a healthy cluster");
    let resident_before = resident();
    let mut open = Vec::with_capacity(watches);
    for _ in 0..watches {
        open.push(client.watch_prefix(PREFIX).await.expect("a watch begins"));
    }
    let server_bytes_per_watch = resident().saturating_sub(resident_before) as f64 / watches as f64;
    let (events, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let readers: Vec<_> = open.into_iter().map(|watch| tokio::spawn(count(watch, events.clone()))).collect();
    let (cpu_before, began) = (cpu(), Instant::now());
    let writers: Vec<_> =
        (0..WRITERS).map(|writer| tokio::spawn(write(client.clone(), writer, stop.clone()))).collect();
    tokio::time::sleep(duration).await;
    let (delivered, took, spent) = (events.load(Ordering::Relaxed), began.elapsed(), cpu().saturating_sub(cpu_before));
    stop.store(true, Ordering::Relaxed);
    let mut puts = 0;
    for writer in writers {
        puts += writer.await.expect("no panic");
    }
    for reader in readers {
        reader.abort();
    }
    FanOut {
        watches,
        puts_per_second: puts as f64 / took.as_secs_f64(),
        events_per_second: delivered as f64 / took.as_secs_f64(),
        server_cpu_us: spent.as_secs_f64() * 1e6 / delivered.max(1) as f64,
        server_bytes_per_watch,
    }
}

async fn count(mut watch: WatchStream, events: Arc<AtomicU64>) {
    while let Some(Ok(update)) = watch.next().await {
        events.fetch_add(update.events.len() as u64, Ordering::Relaxed);
    }
}

async fn write(client: Client, writer: usize, stop: Arc<AtomicBool>) -> u64 {
    let mut puts = 0;
    while !stop.load(Ordering::Relaxed) {
        client
            .put(format!("{PREFIX}{writer}/{}", puts % 100), vec![b'x'; VALUE_BYTES])
            .await
            .expect("a healthy cluster");
        puts += 1;
    }
    puts
}

pub(crate) fn delay_table(delays: &Histogram<u64>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["from acknowledged put to event", "events", "p50 µs", "p99 µs", "worst µs"]);
    let numbers = [delays.len(), delays.value_at_quantile(0.5), delays.value_at_quantile(0.99), delays.max()];
    table.add_row(std::iter::once("one writer, one watch".to_owned()).chain(numbers.iter().map(u64::to_string)));
    table
}

pub(crate) fn fan_out_table(rows: &[FanOut]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "watches of one prefix",
        "puts/s",
        "events/s",
        "server CPU µs/event",
        "server bytes per idle watch",
    ]);
    for row in rows {
        table.add_row([
            row.watches.to_string(),
            format!("{:.0}", row.puts_per_second),
            format!("{:.0}", row.events_per_second),
            format!("{:.2}", row.server_cpu_us),
            format!("{:.0}", row.server_bytes_per_watch),
        ]);
    }
    table
}
