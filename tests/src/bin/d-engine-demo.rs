//! The demo: three servers on this machine, a real data set, many clients, and a leader killed in the middle. Then it
//! checks what a coordination store promises, and exits with 1 if a promise was broken.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a failed step ends the demo")]

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use d_engine_client::{Client, Consistency, Outcome, Revision};
use d_engine_tests::cluster::Cluster;
use d_engine_tests::data_set::{Entry, public_suffixes};
use indicatif::{ProgressBar, ProgressStyle};

const WRITERS: usize = 32;
const READERS: usize = 8;
/// Budget of every call.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// How far past its deadline a call may end: what a busy machine needs to wake a task.
const DEADLINE_MARGIN: Duration = Duration::from_millis(500);

/// What all tasks add to.
#[derive(Default)]
struct Tally {
    next: AtomicU64,
    acknowledged: AtomicU64,
    reads: AtomicU64,
    unknown: AtomicU64,
    not_applied: AtomicU64,
    highest_revision: AtomicU64,
    slowest_nanos: AtomicU64,
    writing_done: AtomicBool,
    /// When the leader was killed, and when the first write sent after that was acknowledged.
    killed: Mutex<Option<Instant>>,
    recovered: Mutex<Option<Instant>>,
    violations: Mutex<Vec<String>>,
}

impl Tally {
    fn violation(&self, text: String) {
        self.violations.lock().unwrap().push(text);
    }

    /// Notes how long a call took.
    fn took(&self, what: &str, began: Instant) {
        let elapsed = began.elapsed();
        self.slowest_nanos.fetch_max(elapsed.as_nanos() as u64, Ordering::Relaxed);
        if elapsed > CALL_TIMEOUT + DEADLINE_MARGIN {
            self.violation(format!("a {what} took {elapsed:?}, its deadline was {CALL_TIMEOUT:?}"));
        }
    }

    fn acknowledged(&self, began: Instant, revision: Revision) {
        self.acknowledged.fetch_add(1, Ordering::Relaxed);
        self.highest_revision.fetch_max(revision.get(), Ordering::Relaxed);
        let killed = *self.killed.lock().unwrap();
        if killed.is_some_and(|killed| began > killed) {
            self.recovered.lock().unwrap().get_or_insert_with(Instant::now);
        }
    }
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(run())
}

async fn run() -> ExitCode {
    let entries = Arc::new(public_suffixes());
    println!("d-engine demo: three servers on loopback, {} entries of the Public Suffix List\n", entries.len());
    let began = Instant::now();
    let mut cluster = Cluster::start(3).await;
    let ready = began.elapsed();
    println!("three servers are ready after {ready:.1?}");

    let client = Client::builder().endpoints(cluster.addresses()).call_timeout(CALL_TIMEOUT).build().unwrap();
    let tally = Arc::new(Tally::default());
    let bar = bar(entries.len() as u64, "loading");
    let loading = Instant::now();
    let writers: Vec<_> = (0..WRITERS)
        .map(|_| tokio::spawn(write(client.clone(), Arc::clone(&entries), Arc::clone(&tally), bar.clone())))
        .collect();
    let readers: Vec<_> = (0..READERS)
        .map(|number| tokio::spawn(read(client.clone(), Arc::clone(&entries), Arc::clone(&tally), number)))
        .collect();

    reached(&tally, entries.len() as u64 * 2 / 5).await;
    let leader = cluster.leader(&[]).await;
    cluster.node_mut(leader).kill();
    *tally.killed.lock().unwrap() = Some(Instant::now());
    say(&bar, &format!("killed node {leader}, the leader"));
    reached(&tally, entries.len() as u64 * 3 / 5).await;
    cluster.node_mut(leader).start();
    say(&bar, &format!("started node {leader} again"));

    for task in writers {
        task.await.unwrap();
    }
    let loading = loading.elapsed();
    tally.writing_done.store(true, Ordering::Relaxed);
    for task in readers {
        task.await.unwrap();
    }
    bar.finish_and_clear();
    cluster.start_all().await;

    check_nodes(&cluster, &entries, &tally).await;
    report(&client, &tally, ready, loading);
    if tally.violations.lock().unwrap().is_empty() {
        return ExitCode::SUCCESS;
    }
    cluster.keep();
    ExitCode::FAILURE
}

/// Waits until so many writes are acknowledged.
async fn reached(tally: &Tally, writes: u64) {
    d_engine_tests::wait::until("the load to go on", d_engine_tests::wait::PATIENCE, || async {
        (tally.acknowledged.load(Ordering::Relaxed) >= writes).then_some(())
    })
    .await;
}

/// Writes entries until none is left. One whose outcome is unknown is read before it is written again.
async fn write(client: Client, entries: Arc<Vec<Entry>>, tally: Arc<Tally>, bar: ProgressBar) {
    loop {
        let index = tally.next.fetch_add(1, Ordering::Relaxed) as usize;
        let Some(entry) = entries.get(index) else { break };
        loop {
            let began = Instant::now();
            let result = client.put(&entry.key, &entry.value).await;
            tally.took("write", began);
            match result {
                Ok(put) => {
                    tally.acknowledged(began, put.header.revision);
                    break;
                }
                Err(error) if error.outcome() == Outcome::NotApplied => {
                    tally.not_applied.fetch_add(1, Ordering::Relaxed);
                }
                Err(_) => {
                    tally.unknown.fetch_add(1, Ordering::Relaxed);
                    if holds(&client, entry, &tally).await {
                        break;
                    }
                }
            }
        }
        bar.inc(1);
    }
}

/// Whether the store holds the entry, read linearizably.
async fn holds(client: &Client, entry: &Entry, tally: &Tally) -> bool {
    loop {
        let began = Instant::now();
        let result = client.get(&entry.key).consistency(Consistency::Linearizable).await;
        tally.took("read", began);
        if let Ok(get) = result {
            tally.reads.fetch_add(1, Ordering::Relaxed);
            let revision = get.header.revision;
            let found = get.into_value().is_some_and(|value| value == entry.value.as_bytes());
            if found {
                tally.acknowledged(began, revision);
            }
            return found;
        }
    }
}

/// Reads random entries with every policy, and makes sure that what this reader sees never goes back in time.
async fn read(client: Client, entries: Arc<Vec<Entry>>, tally: Arc<Tally>, number: usize) {
    let policies = [Consistency::Eventual, Consistency::Lease, Consistency::Linearizable, Consistency::Eventual];
    let mut rng = fastrand::Rng::with_seed(number as u64);
    let mut highest = Revision(0);
    while !tally.writing_done.load(Ordering::Relaxed) {
        let entry = &entries[rng.usize(..entries.len())];
        let policy = *rng.choice(&policies).unwrap();
        let began = Instant::now();
        let result = client.get(&entry.key).consistency(policy).min_revision(highest).await;
        tally.took("read", began);
        let Ok(get) = result else { continue };
        tally.reads.fetch_add(1, Ordering::Relaxed);
        if get.header.revision < highest {
            tally.violation(format!("a read went back from revision {highest} to {}", get.header.revision));
        }
        highest = highest.max(get.header.revision);
        if get.into_value().is_some_and(|value| value != entry.value.as_bytes()) {
            tally.violation(format!("{} holds what nobody wrote", entry.key));
        }
    }
}

/// Every acknowledged write is on every node, asked one by one.
async fn check_nodes(cluster: &Cluster, entries: &[Entry], tally: &Tally) {
    let bar = bar((entries.len() * cluster.nodes().len()) as u64, "checking");
    let revision = tally.highest_revision.load(Ordering::Relaxed);
    for node in cluster.nodes() {
        let found = match node.direct(d_engine_tests::wait::PATIENCE).prefix("suffix/", revision).await {
            Ok(found) => found,
            Err(status) => return tally.violation(format!("node {} does not answer: {status}", node.id)),
        };
        for entry in entries {
            if found.get(entry.key.as_bytes()).is_none_or(|value| value != entry.value.as_bytes()) {
                tally.violation(format!("node {} lost {}", node.id, entry.key));
            }
            bar.inc(1);
        }
        if found.len() != entries.len() {
            tally.violation(format!("node {} has {} entries of {}", node.id, found.len(), entries.len()));
        }
    }
    bar.finish_and_clear();
}

fn report(client: &Client, tally: &Tally, ready: Duration, loading: Duration) {
    let writes = tally.acknowledged.load(Ordering::Relaxed);
    let reads = tally.reads.load(Ordering::Relaxed);
    let per_second = |count: u64| format!("{count} ({:.0} a second)", count as f64 / loading.as_secs_f64());
    let killed = *tally.killed.lock().unwrap();
    let recovered = *tally.recovered.lock().unwrap();
    let failover = killed.zip(recovered).map(|(killed, recovered)| recovered - killed);
    if failover.is_none() {
        tally.violation("no write was acknowledged after the leader was killed".to_owned());
    }
    let violations = tally.violations.lock().unwrap();
    let stats = client.stats();
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.add_row(["time to ready, three servers".to_owned(), format!("{ready:.1?}")]);
    table.add_row(["writes acknowledged".to_owned(), per_second(writes)]);
    table.add_row(["reads answered".to_owned(), per_second(reads)]);
    table.add_row(["retries by the client".to_owned(), stats.retries.to_string()]);
    table.add_row([
        "writes repeated by the demo".to_owned(),
        format!(
            "{} not applied, {} of unknown outcome, read first",
            tally.not_applied.load(Ordering::Relaxed),
            tally.unknown.load(Ordering::Relaxed)
        ),
    ]);
    table.add_row([
        "fail-over, kill to next write".to_owned(),
        failover.map_or("none".to_owned(), |f| format!("{f:.1?}")),
    ]);
    let slowest = Duration::from_nanos(tally.slowest_nanos.load(Ordering::Relaxed));
    table.add_row(["slowest call".to_owned(), format!("{slowest:.1?} of {CALL_TIMEOUT:?} allowed")]);
    let result = if violations.is_empty() {
        "every acknowledged write is on every node, no call overran, no read went back".to_owned()
    } else {
        format!("{} VIOLATIONS", violations.len())
    };
    table.add_row(["result".to_owned(), result]);
    println!("{table}");
    for violation in violations.iter().take(10) {
        println!("VIOLATION: {violation}");
    }
}

/// Prints a line above the bar, or in its place where it cannot be drawn.
fn say(bar: &ProgressBar, text: &str) {
    if bar.is_hidden() { println!("{text}") } else { bar.println(text) }
}

fn bar(length: u64, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:>9} {bar:40} {pos}/{len}").unwrap();
    ProgressBar::new(length).with_style(style).with_prefix(what)
}
