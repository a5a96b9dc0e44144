//! Reads in the caller's own task.

use std::sync::Arc;
use std::time::{Duration, Instant};

use comfy_table::Table;
use d_engine::prelude::EmbeddedClient;
use d_engine_tests::processes;

use super::KEYS;
use crate::fill;
use crate::steady::percentile;

/// Of the reads that memory answers, one in so many is timed.
pub(super) const SAMPLED: usize = 64;
/// Of these, so many are made before the caller lets others run. A thousand callers' turns together have to be far shorter
/// than a lease, which the engine renews on the same threads.
const READS_PER_TURN: usize = 128;

/// By which policy is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Policy {
    Linearizable,
    Lease,
    Eventual,
}

impl Policy {
    pub(super) const ALL: [Self; 3] = [Self::Linearizable, Self::Lease, Self::Eventual];

    fn name(self) -> &'static str {
        match self {
            Self::Linearizable => "linearizable get",
            Self::Lease => "lease get",
            Self::Eventual => "eventual get",
        }
    }

    async fn read(self, client: &EmbeddedClient, key: &str) -> bool {
        let found = match self {
            Self::Linearizable => client.get_linearizable(key).await,
            Self::Lease => client.get_lease(key).await,
            Self::Eventual => client.get_eventual(key).await,
        };
        matches!(found, Ok(Some(_)))
    }
}

/// One row.
pub(super) struct Figures {
    policy: Policy,
    callers: usize,
    per_second: f64,
    p50_ns: u64,
    p99_ns: u64,
    /// Of this process, the engine's own work included: what a busy machine changes least.
    cpu_ns: f64,
    failed: u64,
}

/// What one caller did.
#[derive(Default)]
struct Work {
    reads: u64,
    failed: u64,
    nanoseconds: Vec<u64>,
}

pub(super) async fn measure(
    client: &Arc<EmbeddedClient>,
    policy: Policy,
    callers: usize,
    duration: Duration,
) -> Figures {
    let keys: Arc<[String]> = (0..KEYS).map(fill::key).collect();
    let cpu = || processes::cpu_time(std::process::id());
    let cpu_before = cpu();
    let began = Instant::now();
    let end = began + duration;
    let tasks: Vec<_> =
        (0..callers).map(|_| tokio::spawn(read_until(end, client.clone(), policy, keys.clone()))).collect();
    let mut all = Work::default();
    for task in tasks {
        let work = task.await.expect("a caller does not panic");
        all.reads += work.reads;
        all.failed += work.failed;
        all.nanoseconds.extend(work.nanoseconds);
    }
    let (took, spent) = (began.elapsed(), cpu().saturating_sub(cpu_before));
    all.nanoseconds.sort_unstable();
    Figures {
        policy,
        callers,
        per_second: all.reads as f64 / took.as_secs_f64(),
        p50_ns: percentile(&all.nanoseconds, 50).unwrap_or_default(),
        p99_ns: percentile(&all.nanoseconds, 99).unwrap_or_default(),
        cpu_ns: spent.as_secs_f64() * 1e9 / all.reads.max(1) as f64,
        failed: all.failed,
    }
}

async fn read_until(end: Instant, client: Arc<EmbeddedClient>, policy: Policy, keys: Arc<[String]>) -> Work {
    // One that waits for a quorum is long, and lets others run by itself.
    let (sampled, per_turn) = if policy == Policy::Linearizable { (1, 1) } else { (SAMPLED, READS_PER_TURN) };
    let mut work = Work::default();
    while Instant::now() < end {
        for number in 0..per_turn {
            let key = &keys[fastrand::usize(..keys.len())];
            let found = if number % sampled == 0 {
                let began = Instant::now();
                let found = policy.read(&client, key).await;
                work.nanoseconds.push(u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX));
                found
            } else {
                policy.read(&client, key).await
            };
            work.failed += u64::from(!found);
        }
        work.reads += per_turn as u64;
        if per_turn > 1 {
            tokio::task::yield_now().await;
        }
    }
    work
}

pub(super) fn table(rows: &[(u32, Figures)]) -> Table {
    let header = ["operation", "processes", "callers", "per second", "p50 ns", "p99 ns", "own CPU ns/op", "failed"];
    let mut table = super::table(&header);
    for (processes, row) in rows {
        let numbers = [
            processes.to_string(),
            row.callers.to_string(),
            format!("{:.0}", row.per_second),
            row.p50_ns.to_string(),
            row.p99_ns.to_string(),
            format!("{:.0}", row.cpu_ns),
            row.failed.to_string(),
        ];
        super::add_row(&mut table, row.policy.name(), numbers);
    }
    table
}
