//! d-engine beside etcd: the same load on three servers of each, one after the other and round after round.
//!
//! Every round starts a fresh cluster of each system in turn, the next round in the opposite order, so that a machine
//! whose speed changes harms no side. Ratios are taken within a round; what is printed are their medians and spread.
//! All servers keep their default settings and are durable: a write is on the disks of a majority before its answer.
//!
//! A `system` is started as `Servers` (`etcd` being the one that is not ours) and used through its `client`; a `workload`
//! says what callers ask for. `fan_out`, `keep_alives`, `fail_over`, `many_keys` and `churn` measure what callers alone do not show.
//! The `report` collects samples and compares them, by each workload's figure with its `target`; `picture` draws it.

mod churn;
mod client;
mod etcd;
mod fail_over;
mod fan_out;
mod keep_alives;
mod machine;
mod many_keys;
mod picture;
mod report;
mod system;
mod target;
mod workload;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use etcd::Release;
use report::{Point, Report, Sample};
use system::{Servers, System, mib};
use workload::Workload;

use crate::callers;

// Rough times, of which the time left is made.
const START: Duration = Duration::from_secs(4);
const OPENING: Duration = Duration::from_secs(2);
const FAIL_OVER: Duration = Duration::from_secs(4);
const FILLED_PER_SECOND: u64 = 12_000;

/// The part of a row's time for which there is load before it counts.
const WARM_UP: u32 = 5;

/// Measures d-engine beside etcd on this machine.
#[derive(Debug, Parser)]
pub struct Arguments {
    /// An etcd server to compare with; may be given several times.
    #[arg(long = "etcd", required = true)]
    releases: Vec<PathBuf>,
    /// How often everything is measured; each row shows the median.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds of load per row.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// How often the leader is killed in each round.
    #[arg(long, default_value_t = 3)]
    kills: u32,
    /// Keys whose memory and restart are measured, once; 0: none.
    #[arg(long, default_value_t = 1_000_000)]
    keys: u64,
    /// Seconds of churn with automatic compaction, for each system once; 0: none.
    #[arg(long, default_value_t = 0)]
    churn_seconds: u64,
    /// Where the report is written, as JSON.
    #[arg(long)]
    report: Option<PathBuf>,
    /// Where the ratios are drawn, an SVG.
    #[arg(long)]
    picture: Option<PathBuf>,
}

/// Measures, prints, and writes what was asked for.
///
/// # Panics
/// When anything cannot be measured or written.
pub async fn run(arguments: &Arguments) {
    let releases = arguments.releases.iter().map(|program| System::Etcd(Release::of(program)));
    let systems: Vec<System> = std::iter::once(System::d_engine()).chain(releases).collect();
    let began = Instant::now();
    let mut report = Report::new(systems.iter().map(System::name).collect());
    let round = Round::new(arguments, systems.len());
    for number in 0..arguments.rounds {
        for place in in_turn(systems.len(), number) {
            round.measure(&systems[place], &mut |point, sample| report.add(point, place, sample)).await;
        }
    }
    if arguments.keys > 0 {
        for (place, system) in systems.iter().enumerate() {
            round.measure_many_keys(system, &mut |point, sample| report.add(point, place, sample)).await;
        }
    }
    let mut courses = Vec::new();
    if arguments.churn_seconds > 0 {
        for (place, system) in systems.iter().enumerate() {
            round.begin(system, "churn");
            let course = churn::measure(system, round.churn).await;
            report.add(Point { workload: "churn", callers: churn::WRITERS }, place, churn::sample(&course));
            courses.push((system.name(), course));
            round.done(round.churn);
        }
    }
    round.progress.finish_and_clear();
    if !courses.is_empty() {
        println!("{}\n", churn::table(&courses));
    }
    print(arguments, &systems, &report, began.elapsed());
    if let Some(path) = &arguments.report {
        std::fs::write(path, report.json().expect("numbers and names")).expect("the report can be written");
    }
    if let Some(path) = &arguments.picture {
        picture::draw(&report, path).expect("the picture can be written");
    }
}

/// Every system, in the opposite order in every second round.
fn in_turn(systems: usize, round: u32) -> Vec<usize> {
    let order = 0..systems;
    if round.is_multiple_of(2) { order.collect() } else { order.rev().collect() }
}

fn print(arguments: &Arguments, systems: &[System], report: &Report, took: Duration) {
    println!("{}", report.table());
    println!("\non {}", machine::description());
    for system in systems {
        println!("{}", system.version());
    }
    println!(
        "{} rounds of {} s per row, in turn, in {:.0} min; three servers and the load on this machine, over loopback; \
         {} keys of 8 bytes, values of {} bytes unless the row says otherwise; a write is on the disks of a majority \
         before its answer, in both systems",
        arguments.rounds,
        arguments.seconds,
        took.as_secs_f64() / 60.0,
        workload::KEYS,
        workload::VALUE_BYTES,
    );
    println!(
        "etcd has no lease reads: its linearizable ones stand beside ours. CPU and memory are those of three servers. A \
         ratio is d-engine's figure for one of etcd's in the same round: of what is per second, more is better; of all else, \
         less."
    );
}

/// How everything is measured, and how far it is.
struct Round {
    row: Duration,
    kills: u32,
    keys: u64,
    churn: Duration,
    progress: ProgressBar,
}

impl Round {
    fn new(arguments: &Arguments, systems: usize) -> Self {
        let row = Duration::from_secs_f64(arguments.seconds);
        let mut round = Self {
            row,
            kills: arguments.kills,
            keys: arguments.keys,
            churn: Duration::from_secs(arguments.churn_seconds),
            progress: ProgressBar::new(0),
        };
        let loads: Duration = Workload::ALL.iter().flat_map(|(_, every)| *every).map(|_| round.load_time()).sum();
        let each = START + loads + round.other_time() * 2 + round.kills_time();
        let all = each * arguments.rounds + round.keys_time() + round.churn;
        round.progress = ProgressBar::new(millis(all) * systems as u64);
        let style = ProgressStyle::with_template("{wide_bar} {percent} % {msg}");
        round.progress.set_style(style.expect("a valid template"));
        round.progress.enable_steady_tick(Duration::from_secs(1));
        round
    }

    fn load_time(&self) -> Duration {
        self.row + self.row / WARM_UP
    }

    fn other_time(&self) -> Duration {
        self.row + OPENING
    }

    fn kills_time(&self) -> Duration {
        FAIL_OVER * self.kills
    }

    fn keys_time(&self) -> Duration {
        Duration::from_secs(self.keys / FILLED_PER_SECOND)
    }

    /// Says what is measured next, where nobody sees a bar on a line of its own.
    fn begin(&self, system: &System, what: &str) {
        let message = format!("{}, {what}; about {} s left", system.name(), self.left().as_secs());
        if self.progress.is_hidden() {
            eprintln!("{message}");
        }
        self.progress.set_message(message);
    }

    /// By how long what is done has taken; the bar's own guess goes by its last steps, of which no two are alike.
    fn left(&self) -> Duration {
        let (done, all) = (self.progress.position(), self.progress.length().unwrap_or(0));
        let left = all.saturating_sub(done);
        if done == 0 { Duration::from_millis(left) } else { self.progress.elapsed().mul_f64(left as f64 / done as f64) }
    }

    fn done(&self, expected: Duration) {
        self.progress.inc(millis(expected));
    }

    /// Measures everything but many keys on a fresh cluster.
    async fn measure(&self, system: &System, add: &mut impl FnMut(Point, Sample)) {
        self.begin(system, "start");
        let mut servers = system.start().await;
        many_keys::fill(&mut servers, workload::KEYS).await;
        self.done(START);
        for (workload, every) in Workload::ALL {
            for callers in every.iter().copied() {
                self.begin(system, &format!("{} with {callers} callers", workload.name()));
                add(Point { workload: workload.name(), callers }, self.load(&mut servers, workload, callers).await);
                self.done(self.load_time());
            }
        }
        self.begin(system, "watch fan-out");
        let sample = fan_out::measure(&mut servers, self.row).await;
        add(Point { workload: "watch fan-out", callers: fan_out::WATCHERS }, sample);
        self.done(self.other_time());
        self.begin(system, "lease keep-alive");
        let sample = keep_alives::measure(&mut servers, self.row).await;
        add(Point { workload: "lease keep-alive", callers: keep_alives::LEASES }, sample);
        self.done(self.other_time());
        if self.kills > 0 {
            self.begin(system, "fail-over");
            let sample = fail_over::measure(&mut servers, self.kills).await;
            add(Point { workload: "fail-over", callers: fail_over::CALLERS }, sample);
            self.done(self.kills_time());
        }
    }

    async fn load(&self, servers: &mut Servers, workload: Workload, callers: usize) -> Sample {
        let (client, next) = (servers.client().await, workload.calls());
        let call = move || {
            let (client, call) = (client.clone(), next());
            async move { client.call(call).await.is_ok() }
        };
        let load = callers::load(&servers.ids(), callers, self.row / WARM_UP, self.row, call).await;
        let (done, what) = (load.latencies_us.len(), workload.name());
        if done == 0 || load.errors > 0 {
            self.progress.suspend(|| eprintln!("{what} with {callers} callers: {done} done, {} failed", load.errors));
        }
        // Nothing done has no latency.
        let quantile =
            |quantile| if done == 0 { f64::NAN } else { load.latencies_us.value_at_quantile(quantile) as f64 };
        Sample {
            ops_per_s: load.per_second,
            p50_us: quantile(0.5),
            p99_us: quantile(0.99),
            rss_mib: mib(load.resident),
            cpu_us_per_op: load.servers_cpu_us,
        }
    }

    /// Measures what many keys take, on a fresh cluster.
    async fn measure_many_keys(&self, system: &System, add: &mut impl FnMut(Point, Sample)) {
        self.begin(system, &format!("{} keys", self.keys));
        let mut servers = system.start().await;
        let sample = many_keys::fill(&mut servers, self.keys).await;
        add(Point { workload: "million keys", callers: many_keys::WRITERS }, sample);
        self.begin(system, &format!("restart with {} keys", self.keys));
        add(Point { workload: "restart", callers: 1 }, many_keys::restart(&mut servers).await);
        self.done(self.keys_time());
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_alternate_so_that_no_system_is_always_first() {
        assert_eq!(in_turn(3, 0), [0, 1, 2]);
        assert_eq!(in_turn(3, 1), [2, 1, 0]);
    }
}
