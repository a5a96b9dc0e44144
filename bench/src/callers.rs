//! Callers: tasks that repeat an operation, each with one in flight, and what that takes and costs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use d_engine_tests::processes;
use hdrhistogram::Histogram;

const LATENCY_US_MAX: u64 = 60_000_000;

/// What the callers got, and what it cost.
#[derive(Debug)]
pub struct Load {
    /// Operations that succeeded, per second.
    pub per_second: f64,
    /// Microseconds of those operations.
    pub latencies_us: Histogram<u64>,
    /// CPU of all servers per operation, in microseconds.
    pub servers_cpu_us: f64,
    /// CPU of this process per operation, in microseconds.
    pub own_cpu_us: f64,
    /// Resident memory of all servers at the end, in bytes.
    pub resident: u64,
    /// Operations that failed.
    pub errors: u64,
}

/// Has so many callers repeat `call`, which says whether it succeeded, for `duration` after a warm-up that does not count.
///
/// # Panics
/// When a caller does.
pub async fn load<F: Future<Output = bool> + Send + 'static>(
    servers: &[u32],
    callers: usize,
    warm_up: Duration,
    duration: Duration,
    call: impl Fn() -> F + Clone + Send + 'static,
) -> Load {
    let errors = Arc::new(AtomicU64::new(0));
    let begin = Instant::now() + warm_up;
    let end = begin + duration;
    let tasks: Vec<_> =
        (0..callers).map(|_| tokio::spawn(call_until(begin, end, call.clone(), errors.clone()))).collect();
    tokio::time::sleep_until(begin.into()).await;
    let before = Spent::so_far(servers);
    let mut latencies = latencies();
    for task in tasks {
        latencies.add(task.await.expect("a caller does not panic")).expect("same bounds");
    }
    let spent = Spent::so_far(servers);
    let operations = latencies.len().max(1) as f64;
    let per_operation = |after: Duration, before| after.saturating_sub(before).as_secs_f64() * 1e6 / operations;
    Load {
        per_second: latencies.len() as f64 / spent.at.duration_since(before.at).as_secs_f64(),
        latencies_us: latencies,
        servers_cpu_us: per_operation(spent.servers, before.servers),
        own_cpu_us: per_operation(spent.own, before.own),
        resident: servers.iter().map(|id| processes::resident_bytes(*id)).sum(),
        errors: errors.load(Ordering::Relaxed),
    }
}

/// CPU time at one moment.
struct Spent {
    at: Instant,
    servers: Duration,
    own: Duration,
}

impl Spent {
    fn so_far(servers: &[u32]) -> Self {
        Self { at: Instant::now(), servers: cpu_time(servers), own: processes::cpu_time(std::process::id()) }
    }
}

/// CPU time these processes have spent so far.
#[must_use]
pub fn cpu_time(servers: &[u32]) -> Duration {
    servers.iter().map(|id| processes::cpu_time(*id)).sum()
}

/// An empty histogram of microseconds, up to a minute.
///
/// # Panics
/// Never.
#[must_use]
pub fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).expect("valid bounds")
}

/// A time as the histograms count it: in whole microseconds, and never none.
#[must_use]
pub fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(LATENCY_US_MAX).max(1)
}

async fn call_until<F: Future<Output = bool>>(
    begin: Instant,
    end: Instant,
    call: impl Fn() -> F,
    errors: Arc<AtomicU64>,
) -> Histogram<u64> {
    let mut latencies = latencies();
    loop {
        let started = Instant::now();
        if started >= end {
            return latencies;
        }
        let succeeded = call().await;
        if started < begin {
            continue;
        }
        if succeeded {
            latencies.saturating_record(micros(started.elapsed()));
        } else {
            errors.fetch_add(1, Ordering::Relaxed);
        }
    }
}
