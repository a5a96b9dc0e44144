//! Whether memory and history stay flat: keys that are written over and over, leases that come and go, and automatic
//! compaction, for as long as asked.

use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use d_engine_client::Client;
use d_engine_tests::cluster::{Cluster, Shape};
use indicatif::ProgressBar;

use d_engine_tests::processes;

const RETENTION: Duration = Duration::from_secs(30);
const KEYS: u64 = 10_000;
const VALUE_BYTES: usize = 256;
const WRITERS: usize = 8;
/// Writes per second of each writer.
const RATE: f64 = 100.0;
/// One write in so many is a key of its own with a time to live.
const PASSING: u64 = 10;
const TTL: Duration = Duration::from_secs(20);
const SAMPLES: u32 = 12;

/// What was seen at one moment, summed over the nodes.
struct Sample {
    at: Duration,
    resident_mib: f64,
    history_mib: f64,
    log_mib: f64,
    keys: u64,
}

/// Writes at a steady rate for `duration` and samples memory and disk.
pub(crate) async fn run(duration: Duration) -> Table {
    let extra = format!("[raft.state_machine.history]\nretention_ms = {}\n", RETENTION.as_millis());
    let mut cluster = Cluster::prepare(Shape { extra, ..Shape::default() }).await;
    cluster.start_all().await;
    let client = Client::builder().endpoints(cluster.addresses()).connect().await.expect("the cluster is ready");
    let began = Instant::now();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let client = client.clone();
            tokio::spawn(async move {
                let mut number = 0_u64;
                let mut pace = tokio::time::interval(Duration::from_secs_f64(1.0 / RATE));
                while began.elapsed() < duration {
                    pace.tick().await;
                    number += 1;
                    let value = vec![b'x'; VALUE_BYTES];
                    let written = if number.is_multiple_of(PASSING) {
                        client.put_with_ttl(format!("passing/{writer}/{number}"), value, TTL).await
                    } else {
                        client.put(format!("churn/{}", fastrand::u64(..KEYS)), value).await
                    };
                    written.expect("a healthy cluster");
                }
            })
        })
        .collect();
    let progress = ProgressBar::new(u64::from(SAMPLES));
    let mut samples = Vec::new();
    for number in 1..=SAMPLES {
        tokio::time::sleep_until((began + duration * number / SAMPLES).into()).await;
        samples.push(sample(&cluster, began).await);
        progress.inc(1);
    }
    progress.finish_and_clear();
    for writer in writers {
        writer.await.expect("no panic");
    }
    table(&samples)
}

async fn sample(cluster: &Cluster, began: Instant) -> Sample {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let resident = processes::servers().iter().map(|id| processes::resident_bytes(*id)).sum();
    let size =
        |part: &str| cluster.nodes().iter().map(|node| processes::directory_bytes(&node.data().join(part))).sum();
    let status = cluster.nodes()[0].direct(Duration::from_secs(10)).status().await.expect("it runs");
    Sample {
        at: began.elapsed(),
        resident_mib: mib(resident),
        history_mib: mib(size("state")),
        log_mib: mib(size("log")),
        keys: status.keys,
    }
}

fn table(samples: &[Sample]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["after", "keys", "RSS MiB, all nodes", "history MiB", "log MiB"]);
    for sample in samples {
        table.add_row([
            format!("{:.0} s", sample.at.as_secs_f64()),
            sample.keys.to_string(),
            format!("{:.0}", sample.resident_mib),
            format!("{:.0}", sample.history_mib),
            format!("{:.0}", sample.log_mib),
        ]);
    }
    table
}
