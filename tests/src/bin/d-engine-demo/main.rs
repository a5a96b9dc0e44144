//! The demo: three servers on this machine, a real data set, many clients; a leader killed and another one cut off in the
//! middle, watchers that mirror everything, and a lock holder that is stopped for too long. Then it checks what a
//! coordination store promises, and exits with 1 if a promise was broken.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a failed step ends the demo")]

mod fencing;
mod load;
mod mirror;
mod tally;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use d_engine_client::Client;
use d_engine_tests::cluster::Cluster;
use d_engine_tests::data_set::{Entry, public_suffixes};
use indicatif::{ProgressBar, ProgressStyle};

use crate::fencing::Fenced;
use crate::load::Load;
use crate::mirror::{Mirror, Reflection};
use crate::tally::{CALL_TIMEOUT, Tally};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().is_some_and(|first| first == fencing::HOLDER) {
        return fencing::hold(&arguments.collect::<Vec<_>>());
    }
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
    let leader = cluster.leader(&[]).await;
    let mirror = Mirror::start(cluster.node(leader).address.to_string()).await;
    println!("two watchers mirror the store from its first revision on");
    let bar = bar(entries.len() as u64, "loading");
    let loading = Instant::now();
    let load = Load::start(&client, &entries, &tally, &bar);

    let part = |tenths: usize| entries.len() * tenths / 10;
    load.reaches(part(3)).await;
    let leader = cluster.leader(&[]).await;
    let mut away = vec![leader];
    cluster.node_mut(leader).kill();
    tally.lost_leader("kill");
    say(&bar, &format!("killed node {leader}, the leader"));
    load.reaches(part(5)).await;
    cluster.node_mut(leader).start();
    cluster.node_mut(leader).ready().await;
    say(&bar, &format!("started node {leader} again"));

    load.reaches(part(6)).await;
    let leader = cluster.leader(&[]).await;
    cluster.node_mut(leader).process().pause();
    tally.lost_leader("cut");
    say(&bar, &format!("cut off node {leader}, the new leader: it stands still and does not know it"));
    load.reaches(part(9)).await;
    cluster.node_mut(leader).process().resume();
    say(&bar, &format!("node {leader} is back"));

    away.push(leader);

    // So that every watcher has lost its node, wherever it was.
    for id in cluster.nodes().iter().map(|node| node.id).filter(|id| !away.contains(id)).collect::<Vec<_>>() {
        cluster.node_mut(id).stop().await;
        cluster.node_mut(id).start();
        cluster.node_mut(id).ready().await;
        say(&bar, &format!("restarted node {id}, so that each has been away"));
    }

    load.finish().await;
    let loading = loading.elapsed();
    bar.finish_and_clear();

    let fenced = fencing::play(&client, &cluster.addresses(), &tally).await;
    println!("stopped the holder of a lock for {:.1?}, until another one had it", fenced.takeover);
    check_nodes(&cluster, &entries, &tally).await;
    let reflection = mirror.compare(&tally).await;
    report(&client, &tally, ready, loading, &fenced, reflection.as_ref());
    if tally.violations().is_empty() {
        return ExitCode::SUCCESS;
    }
    cluster.keep();
    ExitCode::FAILURE
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

fn report(
    client: &Client,
    tally: &Tally,
    ready: Duration,
    loading: Duration,
    fenced: &Fenced,
    mirror: Option<&Reflection>,
) {
    let writes = tally.acknowledged.load(Ordering::Relaxed);
    let reads = tally.reads.load(Ordering::Relaxed);
    let per_second = |count: u64| format!("{count} ({:.0} a second)", count as f64 / loading.as_secs_f64());
    let fail_overs = tally.fail_overs();
    for (what, _) in fail_overs.iter().filter(|(_, fail_over)| fail_over.is_none()) {
        tally.violation(format!("no write was acknowledged after the {what} of the leader"));
    }
    let violations = tally.violations();
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
    for (what, fail_over) in fail_overs {
        let after = fail_over.map_or("none".to_owned(), |fail_over| format!("{fail_over:.1?}"));
        table.add_row([format!("fail-over, {what} to next write"), after]);
    }
    let slowest = Duration::from_nanos(tally.slowest_nanos.load(Ordering::Relaxed));
    table.add_row(["slowest call".to_owned(), format!("{slowest:.1?} of {CALL_TIMEOUT:?} allowed")]);
    if let Some(Reflection { keys, events, revision, resumes }) = mirror {
        let events = format!("{events}, of every revision up to {revision}; {resumes} times resumed at another node");
        table.add_row(["events watched".to_owned(), events]);
        table.add_row(["mirror".to_owned(), format!("{keys} keys at revision {revision}, compared with the store")]);
    }
    table.add_row([
        "stopped lock holder".to_owned(),
        format!("token {} refused, that of its successor is {}", fenced.refused, fenced.accepted),
    ]);
    let result = if violations.is_empty() {
        "every acknowledged write is on every node, once; no call overran, no read went back,\n\
         no event was lost or came twice, the mirror equals the store"
            .to_owned()
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
