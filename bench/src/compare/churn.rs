//! Whether memory and disk stay flat: keys that are written over and over at a steady rate, with automatic compaction.

use std::time::{Duration, Instant};

use bytes::Bytes;
use comfy_table::{Table, presets};
use tokio::task::JoinSet;

use super::client::Call;
use super::report::Sample;
use super::system::System;
use super::workload::{KEYS, VALUE_BYTES, key};

pub(crate) const WRITERS: usize = 8;
/// Writes per second of each writer.
const RATE: f64 = 100.0;
const RETENTION: Duration = Duration::from_secs(30);
const MOMENTS: u32 = 12;

/// What all servers held at one moment.
pub(crate) struct Moment {
    at: Duration,
    resident_mib: f64,
    disk_mib: f64,
}

/// Writes for `duration` on a fresh cluster.
pub(crate) async fn measure(system: &System, duration: Duration) -> Vec<Moment> {
    let mut servers = system.start_compacting(Some(RETENTION)).await;
    let client = servers.client().await;
    // Dropped at the end, which ends the writers.
    let mut writers = JoinSet::new();
    for _ in 0..WRITERS {
        let client = client.clone();
        writers.spawn(async move {
            let value = Bytes::from(vec![b'x'; VALUE_BYTES]);
            let mut pace = tokio::time::interval(Duration::from_secs_f64(1.0 / RATE));
            loop {
                pace.tick().await;
                let put = Call::Put { key: key(fastrand::u64(..KEYS)), value: value.clone() };
                client.insist(put).await;
            }
        });
    }
    let began = Instant::now();
    let mut moments = Vec::new();
    for number in 1..=MOMENTS {
        tokio::select! {
            () = tokio::time::sleep_until((began + duration * number / MOMENTS).into()) => {}
            Some(ended) = writers.join_next() => ended.expect("a writer goes on"),
        }
        let (resident_mib, disk_mib) = (servers.resident_mib(), servers.disk_mib());
        moments.push(Moment { at: began.elapsed(), resident_mib, disk_mib });
    }
    moments
}

/// The end of the course.
pub(crate) fn sample(course: &[Moment]) -> Sample {
    let rss_mib = course.last().map_or(0.0, |moment| moment.resident_mib);
    Sample { ops_per_s: WRITERS as f64 * RATE, rss_mib, ..Sample::default() }
}

pub(crate) fn table(courses: &[(String, Vec<Moment>)]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["churn", "after", "RSS MiB, all servers", "disk MiB, all servers"]);
    for (system, course) in courses {
        for moment in course {
            table.add_row([
                system.clone(),
                format!("{:.0} s", moment.at.as_secs_f64()),
                format!("{:.0}", moment.resident_mib),
                format!("{:.0}", moment.disk_mib),
            ]);
        }
    }
    table
}
