//! How long a fail-over and a start take.

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use d_engine_client::Client;
use d_engine_tests::cluster::{Cluster, Shape};
use indicatif::ProgressBar;
use plotters::prelude::*;

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

/// Draws how many of the fail-overs were over after which time, as an SVG.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn draw(times: &[Duration], path: &Path) -> Result<(), Box<dyn Error>> {
    let mut milliseconds: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1e3).collect();
    milliseconds.sort_unstable_by(f64::total_cmp);
    let worst = milliseconds.last().copied().unwrap_or(1.0);
    let count = milliseconds.len() as f64;
    let area = SVGBackend::new(path, (900, 420)).into_drawing_area();
    area.fill(&WHITE)?;
    let title = format!("fail-over, {count} times: SIGKILL of the leader to the next acknowledged put");
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..worst * 1.05, 0.0..100.0)?;
    chart.configure_mesh().x_desc("ms").y_desc("% done").draw()?;
    // A step for each: it is over at its time, and not before.
    let steps = milliseconds.iter().enumerate().flat_map(|(number, time)| {
        [(*time, 100.0 * number as f64 / count), (*time, 100.0 * (number + 1) as f64 / count)]
    });
    chart.draw_series(LineSeries::new(steps, BLACK.stroke_width(2)))?;
    area.present()?;
    Ok(())
}
