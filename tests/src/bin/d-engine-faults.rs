//! The fault test: random operations from many clients on a cluster of real processes, while a seeded adversary kills
//! and stops nodes and cuts links; then the judge decides whether the history is linearizable, and whether each of many
//! watches and caches saw exactly what happened to the store.
//!
//! Long runs are made of episodes on the same cluster, each judged by itself. Exits with 1 on a violation and keeps
//! the files that show it.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a failed step ends the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use d_engine_client::Client;
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::history::{self, Operation, Outcome};
use d_engine_tests::nemesis::{Schedule, torment};
use d_engine_tests::network::{self, PrivateNetwork};
use d_engine_tests::truth::Truth;
use d_engine_tests::watchers::{Findings, Watchers};
use d_engine_tests::workload::{CALL_TIMEOUT, Keys, Worker};
use fastrand::Rng;

const NODES: u32 = 3;
const CLIENTS: usize = 8;

/// Fault test on real processes, judged for linearizability and for what watches deliver.
#[derive(Debug, Parser)]
struct Arguments {
    /// How long to put load on the cluster.
    #[arg(long, default_value_t = 25)]
    seconds: u64,
    /// Seed of the schedule; random unless given.
    #[arg(long)]
    seed: Option<u64>,
    /// Length of an episode.
    #[arg(long, default_value_t = 60)]
    episode_seconds: u64,
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
    let network = private.then(|| PrivateNetwork::lay(NODES));
    let mut cluster = Cluster::prepare(Shape { nodes: NODES, network, ..Shape::default() }).await;
    cluster.start_all().await;
    let mut schedule = Schedule::new(seed, NODES, private);
    let mut rng = Rng::with_seed(seed);
    let end = Instant::now() + Duration::from_secs(arguments.seconds);
    let mut episode = 0;
    while Instant::now() < end {
        episode += 1;
        let episode_end = end.min(Instant::now() + Duration::from_secs(arguments.episode_seconds));
        let history = one_episode(&mut cluster, &mut schedule, rng.fork(), episode, episode_end).await;
        if let Err(violation) = judge(&cluster, &history) {
            println!("episode {episode}, seed {seed}: {violation}");
            cluster.keep();
            return ExitCode::FAILURE;
        }
    }
    println!("fault test passed: {episode} episode(s), seed {seed}");
    ExitCode::SUCCESS
}

struct History {
    operations: Vec<Operation>,
    watched: Result<Findings, String>,
    late: Vec<String>,
    faults: BTreeMap<&'static str, usize>,
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
    History { operations, watched: watchers.judge().await, late, faults, time }
}

/// Whether what callers were told of their writes is what happened to the store.
fn told_truly(operations: &[Operation], truth: &Truth) -> Result<(), String> {
    let mut values: BTreeMap<(u64, &[u8]), Option<&[u8]>> = BTreeMap::new();
    let mut written: BTreeSet<&[u8]> = BTreeSet::new();
    for change in truth.changes() {
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
    println!("  faults {:?}", history.faults);

    let findings = history.watched.as_ref().map_err(|wrong| format!("watches: {wrong}"))?;
    println!(
        "  {} watches saw {} changes and {} bookmarks, resumed {} times; {} caches are as the store",
        findings.watches, findings.amount.changes, findings.amount.bookmarks, findings.amount.resumed, findings.caches
    );
    let told = told_truly(&history.operations, &findings.truth);

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
