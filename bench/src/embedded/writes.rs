//! Durable writes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use comfy_table::Table;
use d_engine::prelude::EmbeddedClient;
use d_engine_tests::processes;
use futures_util::{StreamExt, TryStreamExt};

use super::group::Group;
use super::{KEYS, VALUE_BYTES};
use crate::fill;
use crate::steady::percentile;

/// One row.
pub(super) struct Figures {
    callers: usize,
    per_second: f64,
    p50_us: u64,
    p99_us: u64,
    own_cpu_us: f64,
    peers_cpu_us: f64,
    failed: u64,
}

/// Puts so many keys.
pub(super) async fn fill(client: &EmbeddedClient, keys: u64, value_bytes: usize) {
    let value = vec![b'x'; value_bytes];
    futures_util::stream::iter(0..keys)
        .map(|number| {
            let value = &value;
            async move { client.put(fill::key(number), value).await }
        })
        .buffer_unordered(256)
        .try_for_each(async |()| Ok(()))
        .await
        .expect("a healthy cluster");
}

pub(super) async fn measure(group: &Group, callers: usize, duration: Duration) -> Figures {
    let client = group.leader().client();
    let own_cpu = || processes::cpu_time(std::process::id());
    let peers_cpu = || group.peers().map(processes::cpu_time).sum::<Duration>();
    let (own_before, peers_before) = (own_cpu(), peers_cpu());
    let began = Instant::now();
    let end = began + duration;
    let tasks: Vec<_> = (0..callers).map(|_| tokio::spawn(put_until(end, client.clone()))).collect();
    let (mut micros, mut failed) = (Vec::new(), 0);
    for task in tasks {
        let (own_micros, own_failed) = task.await.expect("a caller does not panic");
        micros.extend(own_micros);
        failed += own_failed;
    }
    let took = began.elapsed();
    micros.sort_unstable();
    let writes = micros.len().max(1) as f64;
    let each = |spent: Duration| spent.as_secs_f64() * 1e6 / writes;
    Figures {
        callers,
        per_second: micros.len() as f64 / took.as_secs_f64(),
        p50_us: percentile(&micros, 50).unwrap_or_default(),
        p99_us: percentile(&micros, 99).unwrap_or_default(),
        own_cpu_us: each(own_cpu().saturating_sub(own_before)),
        peers_cpu_us: each(peers_cpu().saturating_sub(peers_before)),
        failed,
    }
}

/// The microseconds of each write, and how many have failed.
async fn put_until(end: Instant, client: Arc<EmbeddedClient>) -> (Vec<u64>, u64) {
    let value = vec![b'x'; VALUE_BYTES];
    let (mut micros, mut failed) = (Vec::new(), 0);
    while Instant::now() < end {
        let key = fill::key(fastrand::u64(..KEYS));
        let began = Instant::now();
        match client.put(key, &value).await {
            Ok(()) => micros.push(u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX)),
            Err(_) => failed += 1,
        }
    }
    (micros, failed)
}

pub(super) fn table(rows: &[(u32, Figures)]) -> Table {
    let header = ["operation", "processes", "callers", "per second", "p50 µs", "p99 µs"];
    let costs = ["own CPU µs/op", "peers' CPU µs/op", "failed"];
    let mut table = super::table(&[&header[..], &costs[..]].concat());
    for (processes, row) in rows {
        let numbers = [
            processes.to_string(),
            row.callers.to_string(),
            format!("{:.0}", row.per_second),
            row.p50_us.to_string(),
            row.p99_us.to_string(),
            format!("{:.1}", row.own_cpu_us),
            format!("{:.1}", row.peers_cpu_us),
            row.failed.to_string(),
        ];
        super::add_row(&mut table, "durable put", numbers);
    }
    table
}
