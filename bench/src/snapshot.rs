//! What a large snapshot costs: how long it takes to build, to send and to install, and what puts feel of that.
//!
//! ```text
//!  all three serve | calm | a snapshot is built | a follower is away | it starts | sent | installed | catches up
//!  -- fill -------- puts --------------------------------------------------------------------------------------->
//! ```
//!
//! What the nodes do is seen in their metrics, which are asked for every [`PERIOD`]: a window may begin and end that
//! much late.

use std::time::{Duration, Instant};

use clap::Args;
use comfy_table::{Table, presets};
use d_engine_client::Client;
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::http;
use indicatif::ProgressBar;

use crate::fill;
use crate::steady::{self, Calls, Steady, Window};

const VALUE_BYTES: usize = 1024;
const PERIOD: Duration = Duration::from_millis(50);
/// How long is waited for any step; puts have to fill a quarter of a gibibyte of log between two snapshots.
const PATIENCE: Duration = Duration::from_secs(1800);
/// Entries by which a member that is awake may lag behind the leader under load.
const LAG: f64 = 100.0;
/// The default of `raft.snapshot.max_log_bytes_before_snapshot`.
const DEFAULT_LOG_MIB: u64 = 256;

const BUILT: &str = "d_engine_snapshot_build_duration_seconds";
const INSTALLED: &str = "d_engine_snapshot_install_duration_seconds";
const RECEIVED: &str = "d_engine_snapshot_received_bytes_total";
const APPLIED: &str = "d_engine_raft_applied_index";
const CHANGES: &str = "d_engine_leader_changes_total";
const TERM: &str = "d_engine_raft_term";

/// Builds, sends and installs a snapshot on three nodes while callers put.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Mebibytes of values in the store. Below 1024 snapshots are made more often than by default, and nothing is kept
    /// of the log behind them, so that a small trial sees the same steps.
    #[arg(long, default_value_t = 1024)]
    mib: u64,
    /// Callers that put.
    #[arg(long, default_value_t = 64)]
    callers: usize,
    /// Seconds of puts before anything else happens.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
}

/// The metrics of all nodes, as asked for last.
struct Scrapes {
    texts: Vec<Option<String>>,
}

/// How often and how long in all something was done, as its histogram says.
#[derive(Clone, Copy, Default)]
struct Durations {
    count: f64,
    seconds: f64,
}

/// What the watching of the nodes has found.
#[derive(Default)]
struct Observer {
    seen: Vec<Durations>,
    built: Vec<(u32, Duration)>,
    windows: Vec<Window>,
    /// What each node said last of who leads.
    led: Vec<Option<Led>>,
    losses: Vec<Loss>,
}

/// What a node says of who leads.
#[derive(Clone, Copy)]
struct Led {
    changes: f64,
    term: f64,
}

/// A node took its leader for lost, or lost its own lease, since it was last looked at.
struct Loss {
    at: Instant,
    node: u32,
    changes: f64,
    terms: f64,
}

pub(crate) async fn measure(arguments: &Arguments) {
    let mut cluster = Cluster::prepare(Shape { extra: policy(arguments.mib), ..Shape::default() }).await;
    cluster.start_all().await;
    let client = Client::builder().endpoints(cluster.addresses()).connect().await.expect("the cluster is ready");
    let keys = (arguments.mib << 20) / VALUE_BYTES as u64;
    eprintln!("filling the store with {} MiB ...", arguments.mib);
    fill::fill(&client, keys, VALUE_BYTES).await;

    let progress = ProgressBar::new_spinner();
    let mut observer = Observer::default();
    let steady = Steady::start(&client, arguments.callers, Calls::Puts, keys, VALUE_BYTES);
    let leader = cluster.leader(&[]).await;
    let follower = leader % 3 + 1;
    let mut windows = Vec::new();

    let calm = Instant::now();
    let tell = |what: &str| progress.set_message(format!("{what}; {} puts", steady.done()));
    let built = |scrapes: &Scrapes| scrapes.durations(leader, BUILT).count;
    let is_over = |_: &Scrapes| {
        tell("nothing else");
        calm.elapsed() >= Duration::from_secs(arguments.seconds)
    };
    observer.watch(&cluster, is_over).await;
    let before = built(&Scrapes::take(&cluster).await);
    let is_next = |scrapes: &Scrapes| {
        tell("until the leader builds its next snapshot");
        built(scrapes) > before
    };
    observer.watch(&cluster, is_next).await;
    let away = Instant::now();
    windows.push(Window { name: "three nodes, nothing else", from: calm, to: away });

    cluster.node_mut(follower).kill();
    let before = built(&Scrapes::take(&cluster).await);
    let is_purged = |scrapes: &Scrapes| {
        tell("a follower is away, until the leader has purged what it needs");
        built(scrapes) >= before + 2.0
    };
    observer.watch(&cluster, is_purged).await;
    let started = Instant::now();
    windows.push(Window { name: "a follower is away", from: away, to: started });

    cluster.node_mut(follower).start();
    let is_received = |scrapes: &Scrapes| {
        tell("the follower starts");
        scrapes.of(follower, RECEIVED) > Some(0.0)
    };
    observer.watch(&cluster, is_received).await;
    let sending = Instant::now();
    let mut received = 0.0;
    let is_installed = |scrapes: &Scrapes| {
        received = scrapes.of(follower, RECEIVED).unwrap_or(received);
        tell(&format!("{:.0} MiB sent", mib(received)));
        scrapes.durations(follower, INSTALLED).count > 0.0
    };
    observer.watch(&cluster, is_installed).await;
    let installed = Instant::now();
    let install = Duration::from_secs_f64(Scrapes::take(&cluster).await.durations(follower, INSTALLED).seconds);
    let sent = installed - install;
    let is_level = |scrapes: &Scrapes| {
        tell("the follower catches up");
        let applied = scrapes.of(leader, APPLIED).zip(scrapes.of(follower, APPLIED));
        applied.is_some_and(|(leader, follower)| leader - follower <= LAG)
    };
    observer.watch(&cluster, is_level).await;
    let level = Instant::now();
    progress.finish_and_clear();
    let calls = steady.finish().await;

    windows.push(Window { name: "the follower starts", from: started, to: sending });
    windows.push(Window { name: "it catches up", from: installed, to: level });
    windows.extend(&observer.windows);
    windows.push(Window { name: "a snapshot is sent", from: sending, to: sent });
    windows.push(Window { name: "it is installed", from: sent, to: installed });
    println!("{}\n", table(&observer.built, received, sent - sending, install, level - started));
    println!("{}", steady::table("puts while", &calls, &windows));
    println!("{}", losses(&observer.losses, leader, follower, &windows));
    println!("{} callers that put {VALUE_BYTES} bytes each over {} MiB of them\n", arguments.callers, arguments.mib);
}

/// The default, or for a store that is smaller than what the default is made for, its quarter.
fn policy(mib: u64) -> String {
    if mib >= 4 * DEFAULT_LOG_MIB {
        return String::new();
    }
    let bytes = (mib << 20).div_ceil(4);
    format!("[raft.snapshot]\nmax_log_bytes_before_snapshot = {bytes}\nretained_log_entries = 0\n")
}

impl Scrapes {
    /// Nothing for a node that does not answer.
    async fn take(cluster: &Cluster) -> Self {
        let mut texts = Vec::new();
        for node in cluster.nodes() {
            let answer = if node.runs() { http::get(node.http_address, "/metrics").await.ok() } else { None };
            texts.push(answer.map(|(_, text)| text));
        }
        Self { texts }
    }

    fn of(&self, node: u32, name: &str) -> Option<f64> {
        let text = self.texts.get(node as usize - 1)?.as_deref()?;
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?.parse().ok()
    }

    /// Of a histogram.
    fn durations(&self, node: u32, name: &str) -> Durations {
        let part = |part: &str| self.of(node, &format!("{name}_{part}")).unwrap_or_default();
        Durations { count: part("count"), seconds: part("sum") }
    }
}

impl Observer {
    /// Looks at the nodes again and again until `done`, and takes note of the snapshots they build.
    async fn watch(&mut self, cluster: &Cluster, mut done: impl FnMut(&Scrapes) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        let mut pace = tokio::time::interval(PERIOD);
        pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            pace.tick().await;
            let scrapes = Scrapes::take(cluster).await;
            self.take_note(cluster, &scrapes);
            if done(&scrapes) {
                return;
            }
            assert!(Instant::now() < deadline, "gave up after {PATIENCE:?}: what was waited for does not happen");
        }
    }

    fn take_note(&mut self, cluster: &Cluster, scrapes: &Scrapes) {
        // What was built before the first look is not counted.
        let first = self.seen.is_empty();
        self.seen.resize_with(cluster.nodes().len(), Durations::default);
        let to = Instant::now();
        for ((node, seen), text) in cluster.nodes().iter().zip(&mut self.seen).zip(&scrapes.texts) {
            if text.is_none() {
                continue;
            }
            let now = scrapes.durations(node.id, BUILT);
            if now.count < seen.count {
                // It was restarted and counts from the beginning.
                *seen = Durations::default();
            }
            let took = Duration::from_secs_f64((now.seconds - seen.seconds).max(0.0));
            if !first && now.count > seen.count {
                self.built.push((node.id, took));
                self.windows.push(Window { name: "a snapshot is built", from: to - took - PERIOD, to });
            }
            *seen = now;
        }
        self.led.resize(cluster.nodes().len(), None);
        for (node, led) in cluster.nodes().iter().zip(&mut self.led) {
            let now = scrapes.of(node.id, CHANGES).zip(scrapes.of(node.id, TERM));
            let now = now.map(|(changes, term)| Led { changes, term });
            // A node that was away begins anew: what it finds is not lost.
            if let (Some(before), Some(now)) = (*led, now)
                && (now.changes > before.changes || now.term > before.term)
            {
                let (changes, terms) = (now.changes - before.changes, now.term - before.term);
                self.losses.push(Loss { at: to, node: node.id, changes, terms });
            }
            *led = now;
        }
    }
}

/// The sum of nothing has a sign of its own.
fn whole(number: f64) -> String {
    number.abs().to_string()
}

/// Where windows overlap, each has what happened in it.
fn losses(losses: &[Loss], leader: u32, follower: u32, windows: &[Window]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["changes of who is known to lead while", "the leader", "the follower", "the third", "new terms"]);
    let mut names: Vec<&str> = windows.iter().map(|window| window.name).collect();
    names.dedup();
    for name in names {
        let within = |loss: &&Loss| {
            windows.iter().any(|window| window.name == name && window.from <= loss.at && loss.at <= window.to + PERIOD)
        };
        let found: Vec<&Loss> = losses.iter().filter(within).collect();
        let changes = |is_meant: &dyn Fn(u32) -> bool| {
            let changes: f64 = found.iter().filter(|loss| is_meant(loss.node)).map(|loss| loss.changes).sum();
            whole(changes)
        };
        let terms = found.iter().filter(|loss| loss.node == leader).map(|loss| loss.terms).sum();
        table.add_row([
            name.to_owned(),
            changes(&|node| node == leader),
            changes(&|node| node == follower),
            changes(&|node| node != leader && node != follower),
            whole(terms),
        ]);
    }
    table
}

fn table(built: &[(u32, Duration)], received: f64, sending: Duration, install: Duration, whole: Duration) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["a snapshot under load", "times", "median s", "worst s", "MiB", "MiB/s"]);
    let seconds = |time: Duration| format!("{:.2}", time.as_secs_f64());
    let mut times: Vec<Duration> = built.iter().map(|(_, took)| *took).collect();
    times.sort_unstable();
    let (median, worst) = (steady::percentile(&times, 50), times.last().copied());
    let [median, worst] = [median, worst].map(|time| time.map_or(String::new(), seconds));
    table.add_row(["built, on any node".into(), times.len().to_string(), median, worst, String::new(), String::new()]);
    let rate = mib(received) / sending.as_secs_f64();
    let (bytes, rate) = (format!("{:.0}", mib(received)), format!("{rate:.0}"));
    table.add_row(["sent".into(), "1".into(), seconds(sending), seconds(sending), bytes, rate]);
    table.add_row(["installed".into(), "1".into(), seconds(install), seconds(install), String::new(), String::new()]);
    let from_exec = "from exec of the follower until it is level with the leader";
    table.add_row([from_exec.into(), "1".into(), seconds(whole), seconds(whole), String::new(), String::new()]);
    table
}

fn mib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}
