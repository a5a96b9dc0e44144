//! The fault test: random operations, leases and locks from many clients on a cluster of real processes, while a seeded
//! adversary does everything to it that [`nemesis`](d_engine_tests::nemesis) knows. Then it is judged whether the history
//! is linearizable, whether each of many watches and caches saw exactly what happened to the store, whether leases lasted
//! and locks held, and whether all nodes have the same state.
//!
//! Long runs are made of episodes on the same cluster, each judged by itself, and end with a picture of the whole. Exits
//! with 1 on a violation and keeps the files that show it.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a failed step ends the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use d_engine_client::{Client, Revision};
use d_engine_tests::cluster::{Cluster, Node, Shape};
use d_engine_tests::contenders::{self, Contenders};
use d_engine_tests::disk;
use d_engine_tests::history::{self, Operation, Outcome};
use d_engine_tests::nemesis::{Schedule, torment};
use d_engine_tests::network::{self, PrivateNetwork};
use d_engine_tests::processes;
use d_engine_tests::tenants::{self, Tenants};
use d_engine_tests::timeline::{Event, Holding, Timeline};
use d_engine_tests::truth::Truth;
use d_engine_tests::wait;
use d_engine_tests::watchers::{Findings, Watchers};
use d_engine_tests::workload::{CALL_TIMEOUT, Keys, Worker};
use fastrand::Rng;
use tokio::sync::watch;

const CLIENTS: usize = 8;
/// Small enough to be filled in a moment.
const DISK_MEBIBYTES: u32 = 256;
/// History is compacted while it is read, and the log so often that a node which was away for a moment needs a snapshot.
const EXTRA: &str = "\
[raft.state_machine.history]
retention_ms = 120000

[raft.snapshot]
max_log_entries_before_snapshot = 200
retained_log_entries = 20
";
/// A run of this length that installs no snapshot shows nothing of them.
const LONG_SECONDS: u64 = 60;

/// Fault test on real processes, judged for linearizability and for what watches deliver.
#[derive(Debug, Parser)]
struct Arguments {
    /// How long to put load on the cluster.
    #[arg(long, default_value_t = 25)]
    seconds: u64,
    /// Seed of the schedule; random unless given.
    #[arg(long)]
    seed: Option<u64>,
    /// Nodes of the cluster.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(3..=9))]
    nodes: u32,
    /// Length of an episode.
    #[arg(long, default_value_t = 60)]
    episode_seconds: u64,
    /// Where the picture of the run goes, an SVG.
    #[arg(long)]
    picture: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let private = match network::enter() {
        Ok(()) => true,
        Err(reason) => {
            println!("partitions: not run: no network namespaces here ({reason})");
            false
        }
    };
    let seed = arguments.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    println!("seed {seed}: `SEED={seed} make soak` gives this schedule again");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(run(&arguments, seed, private))
}

async fn run(arguments: &Arguments, seed: u64, private: bool) -> ExitCode {
    let disks = match disk::available() {
        Ok(()) => private,
        Err(reason) => {
            println!("full and slow disks: not run: no disks can be made here ({reason})");
            false
        }
    };
    let network = private.then(|| PrivateNetwork::lay(arguments.nodes));
    let shape = Shape {
        nodes: arguments.nodes,
        network,
        disks: disks.then_some(DISK_MEBIBYTES),
        wall_clocks: true,
        extra: EXTRA.to_owned(),
        ..Shape::default()
    };
    let mut cluster = Cluster::prepare(shape).await;
    cluster.start_all().await;
    let mut schedule = Schedule::new(seed, arguments.nodes, cluster.reach());
    let mut rng = Rng::with_seed(seed);
    let (start, mut timeline) = (Instant::now(), Timeline::default());
    let samples = Samples::start(&cluster, start);
    let end = start + Duration::from_secs(arguments.seconds);
    let mut episode = 0;
    let mut verdict = Ok(());
    while verdict.is_ok() && Instant::now() < end {
        episode += 1;
        let begun = start.elapsed();
        let episode_end = end.min(Instant::now() + Duration::from_secs(arguments.episode_seconds));
        let history = one_episode(&mut cluster, &mut schedule, rng.fork(), episode, episode_end).await;
        timeline.add_operations(begun, &history.operations);
        timeline.add_events(history.faults.iter().map(|event| Event { at: begun + event.at, ..event.clone() }));
        verdict = judge(&cluster, &history).map_err(|violation| format!("episode {episode}: {violation}"));
        forget_past(&cluster, &history).await;
    }
    for holding in samples.finish().await {
        timeline.add_holding(holding);
    }
    let snapshots = Snapshots::of(&cluster);
    let verdict = verdict.and_then(|()| timeline.flat()).and_then(|()| snapshots.enough(arguments.seconds));
    let (time, nodes) = (start.elapsed().as_secs(), arguments.nodes);
    let title = format!("d-engine fault test, seed {seed}, {time} s, {nodes} nodes");
    if let Some(picture) = &arguments.picture {
        match timeline.draw(&title, picture) {
            Ok(()) => println!("picture: {}", picture.display()),
            Err(error) => println!("no picture: {}: {error}", picture.display()),
        }
    }
    match verdict {
        Ok(()) => {
            let Snapshots { built, installed } = snapshots;
            println!(
                "fault test passed: {episode} episode(s), {nodes} nodes, {built} snapshots built, {installed} installed, \
                 seed {seed}"
            );
            ExitCode::SUCCESS
        }
        Err(violation) => {
            println!("seed {seed}: {violation}");
            cluster.keep();
            ExitCode::FAILURE
        }
    }
}

/// Snapshots of all nodes, in all their runs.
#[derive(Clone, Copy)]
struct Snapshots {
    built: usize,
    installed: usize,
}

impl Snapshots {
    /// As the nodes' logs tell: counters end with their process.
    fn of(cluster: &Cluster) -> Self {
        let logs: Vec<String> = cluster.nodes().iter().map(Node::output).collect();
        let count = |words: &str| logs.iter().map(|log| log.matches(words).count()).sum();
        Self { built: count("built a snapshot"), installed: count("installed a snapshot") }
    }

    fn enough(self, seconds: u64) -> Result<(), String> {
        match self.installed {
            0 if seconds >= LONG_SECONDS => Err(format!("of {} snapshots built none was installed", self.built)),
            _ => Ok(()),
        }
    }
}

/// Samples of what the processes hold, once a second.
struct Samples {
    task: tokio::task::JoinHandle<Vec<Holding>>,
    stop: watch::Sender<bool>,
}

impl Samples {
    fn start(cluster: &Cluster, start: Instant) -> Self {
        // Not what fills a disk up beside them.
        let parts = |node: &Node| ["log", "state", "snapshots"].map(|part| node.data().join(part));
        let directories: Vec<PathBuf> = cluster.nodes().iter().flat_map(parts).collect();
        let (stop, mut stopped) = watch::channel(false);
        let task = tokio::spawn(async move {
            let mut samples = Vec::new();
            let mut pace = tokio::time::interval(Duration::from_secs(1));
            loop {
                tokio::select! {
                    _ = pace.tick() => {}
                    _ = stopped.changed() => return samples,
                }
                let servers = processes::servers();
                samples.push(Holding {
                    at: start.elapsed(),
                    memory: servers.iter().map(|id| processes::resident_bytes(*id)).sum(),
                    descriptors: servers.iter().map(|id| processes::descriptors(*id)).sum(),
                    disk: directories.iter().map(|directory| processes::directory_bytes(directory)).sum(),
                });
            }
        });
        Self { task, stop }
    }

    async fn finish(self) -> Vec<Holding> {
        self.stop.send_replace(true);
        self.task.await.unwrap()
    }
}

struct History {
    /// Of the keys that the operations are about.
    prefix: String,
    operations: Vec<Operation>,
    watched: Result<Findings, String>,
    late: Vec<String>,
    tenants: Result<tenants::Tally, String>,
    contenders: Result<contenders::Tally, String>,
    same: Result<usize, String>,
    faults: Vec<Event>,
    time: Duration,
}

async fn one_episode(
    cluster: &mut Cluster,
    schedule: &mut Schedule,
    mut rng: Rng,
    episode: usize,
    end: Instant,
) -> History {
    let prefix = format!("episode-{episode}");
    let keys = Arc::new(Keys::new(&prefix));
    let watchers = Watchers::start(cluster, &prefix, &keys.used()[0], &mut rng).await;
    let tenants = Tenants::start(cluster, &format!("lives-{episode}"), end, &mut rng);
    let contenders = Contenders::start(cluster, &format!("lock-{episode}"), end, &mut rng);
    let start = Instant::now();
    let worker = |cluster: &Cluster, number: usize, rng: Rng| {
        let client = Client::builder().endpoints(cluster.addresses()).call_timeout(CALL_TIMEOUT).build().unwrap();
        let nodes = cluster.nodes().iter().map(|node| node.direct(CALL_TIMEOUT)).collect();
        Worker::new(number, client, nodes, Arc::clone(&keys), rng, start)
    };
    let load: Vec<_> = (0..CLIENTS).map(|number| tokio::spawn(worker(cluster, number, rng.fork()).run(end))).collect();

    let say = |text: &str| println!("  {:>6.1} s  {text}", start.elapsed().as_secs_f64());
    let faults = torment(cluster, schedule, end, say).await;

    let time = start.elapsed();
    let (mut operations, mut late) = (Vec::new(), Vec::new());
    for task in load {
        let work = task.await.unwrap();
        operations.extend(work.operations);
        late.extend(work.late);
    }
    let last = worker(cluster, CLIENTS, rng).read_all().await;
    operations.extend(last.operations);
    late.extend(last.late);
    let (tenants, contenders, watched) = (tenants.judge().await, contenders.judge().await, watchers.judge().await);
    let same = same_everywhere(cluster).await;
    History { prefix, operations, watched, late, tenants, contenders, same, faults, time }
}

/// Nodes know the age of a revision only as long as they run, which is never long here: the history would grow until the
/// disks are full.
async fn forget_past(cluster: &Cluster, history: &History) {
    let Ok(findings) = &history.watched else { return };
    let client = Client::builder().endpoints(cluster.addresses()).call_timeout(wait::PATIENCE).build().unwrap();
    // What is not forgotten now is after the next episode.
    let _ = client.compact(Revision(findings.truth.last())).await;
}

/// Whether all nodes have the same keys and values at one revision; how many keys.
async fn same_everywhere(cluster: &Cluster) -> Result<usize, String> {
    let nodes: Vec<_> = cluster.nodes().iter().map(|node| (node.id, node.direct(wait::PATIENCE))).collect();
    let mut revision = 0;
    for (id, node) in &nodes {
        let status = node.status().await.map_err(|status| format!("node {id}: {status}"))?;
        revision = revision.max(status.header.unwrap_or_default().revision);
    }
    let mut first: Option<BTreeMap<_, _>> = None;
    for (id, node) in &nodes {
        let found = node.at(revision).await.map_err(|status| format!("node {id}: {status}"))?;
        let first = first.get_or_insert_with(|| found.clone());
        if let Some((key, value)) = found.iter().find(|(key, value)| first.get(*key) != Some(*value)) {
            return Err(format!("at revision {revision} node {id} has {key:?} = {value:?}, node 1 has not"));
        }
        if found.len() != first.len() {
            return Err(format!("at revision {revision} node {id} has {} keys, node 1 {}", found.len(), first.len()));
        }
    }
    Ok(first.map_or(0, |keys| keys.len()))
}

/// Whether what callers were told of their writes is what happened to the store.
fn told_truly(operations: &[Operation], prefix: &str, truth: &Truth) -> Result<(), String> {
    let mut values: BTreeMap<(u64, &[u8]), Option<&[u8]>> = BTreeMap::new();
    let mut written: BTreeSet<&[u8]> = BTreeSet::new();
    // Leases and locks have keys of their own, whose values come again.
    for change in truth.changes().iter().filter(|change| change.key.starts_with(prefix.as_bytes())) {
        let value = change.after.as_ref().map(|after| &after.value[..]);
        values.insert((change.revision, &change.key), value);
        if value.is_some_and(|value| !written.insert(value)) {
            return Err(format!("{:?} was written twice, again at revision {}", change.after, change.revision));
        }
    }
    for operation in operations {
        for (key, value) in &operation.write {
            let value = value.as_ref().map(String::as_bytes);
            let found = values.get(&(operation.revision, key.as_bytes()));
            // A deletion that found nothing left no trace, nor did a comparison that failed.
            let acknowledged = operation.outcome == Outcome::Ok && operation.succeeded;
            let without_trace = value.is_none() && !matches!(operation.observed.get(key), Some(Some(_)));
            if acknowledged && !without_trace && found != Some(&value) {
                return Err(format!("{operation:?} was acknowledged, and the history has {found:?}"));
            }
            let refused =
                operation.outcome == Outcome::NotApplied || !operation.succeeded && operation.outcome == Outcome::Ok;
            if refused && value.is_some_and(|value| written.contains(value)) {
                return Err(format!("{operation:?} was not applied, and the history has its value"));
            }
        }
    }
    Ok(())
}

fn judge(cluster: &Cluster, history: &History) -> Result<(), String> {
    let count = |wanted: Outcome| history.operations.iter().filter(|o| o.outcome == wanted).count();
    let answered = count(Outcome::Ok);
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    for operation in history.operations.iter().filter(|o| o.outcome == Outcome::Ok) {
        *kinds.entry(operation.kind).or_default() += 1;
    }
    println!("  answered {kinds:?}");
    println!("  not applied {}, unknown {}", count(Outcome::NotApplied), count(Outcome::Unknown));
    let mut faults: BTreeMap<&str, usize> = BTreeMap::new();
    for event in &history.faults {
        *faults.entry(event.name).or_default() += 1;
    }
    println!("  faults {faults:?}");

    let findings = history.watched.as_ref().map_err(|wrong| format!("watches: {wrong}"))?;
    println!(
        "  {} watches saw {} changes and {} bookmarks, resumed {} times; {} caches are as the store",
        findings.watches, findings.amount.changes, findings.amount.bookmarks, findings.amount.resumed, findings.caches
    );
    println!("  leases: {:?}", history.tenants.clone().map_err(|wrong| format!("leases: {wrong}"))?);
    println!("  locks: {:?}", history.contenders.clone().map_err(|wrong| format!("locks: {wrong}"))?);
    println!("  all nodes have the same {} keys", history.same.clone().map_err(|wrong| format!("states: {wrong}"))?);
    let told = told_truly(&history.operations, &history.prefix, &findings.truth);

    let path = cluster.directory().join("history.jsonl");
    history::write(&path, &history.operations).map_err(|error| format!("{}: {error}", path.display()))?;
    let exe = std::env::current_exe().map_err(|error| error.to_string())?;
    let verdict = Command::new(exe.with_file_name("d-engine-judge"))
        .arg("--picture")
        .arg(cluster.directory().join("violation.html"))
        .arg(&path)
        .status()
        .map_err(|error| format!("the judge does not run ({error}): start this test by scripts/faults"))?;
    if !verdict.success() {
        return Err(format!("the judge says no, see {}", path.display()));
    }
    told?;
    if let Some(late) = history.late.first() {
        return Err(format!("{} calls ran past their deadline, such as: {late}", history.late.len()));
    }
    // A run in which hardly anything was answered, or no fault was done, shows nothing.
    let enough = (history.time.as_secs() * 20) as usize;
    if answered < enough {
        return Err(format!("only {answered} operations were answered, fewer than {enough}"));
    }
    if history.time > Duration::from_secs(20) && history.faults.is_empty() {
        return Err("no fault was done".to_owned());
    }
    Ok(())
}
