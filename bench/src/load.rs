//! Load: many callers, each with one operation in flight, through one client.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use d_engine_client::{Client, Consistency};
use hdrhistogram::Histogram;

use d_engine_tests::processes;

const KEYS: u64 = 10_000;
const VALUE_BYTES: usize = 256;
const LATENCY_US_MAX: u64 = 60_000_000;

/// What a caller repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Put,
    /// As a client without exactly-once puts.
    PutWithoutSession,
    Get(Consistency),
}

impl Operation {
    pub(crate) const ALL: [Self; 5] = [
        Self::Put,
        Self::PutWithoutSession,
        Self::Get(Consistency::Linearizable),
        Self::Get(Consistency::Lease),
        Self::Get(Consistency::Eventual),
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::PutWithoutSession => "put, no session",
            Self::Get(Consistency::Linearizable) => "linearizable get",
            Self::Get(Consistency::Lease) => "lease get",
            Self::Get(_) => "eventual get",
        }
    }
}

/// How operations travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    /// Many on one stream.
    Pipeline,
    /// A call each.
    Unary,
}

impl Transport {
    pub(crate) const ALL: [Self; 2] = [Self::Pipeline, Self::Unary];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pipeline => "pipeline",
            Self::Unary => "unary",
        }
    }
}

/// One row of the report.
pub(crate) struct Figures {
    pub(crate) operation: Operation,
    pub(crate) transport: Transport,
    pub(crate) callers: usize,
    pub(crate) per_second: f64,
    pub(crate) p50_us: u64,
    pub(crate) p99_us: u64,
    pub(crate) server_cpu_us: f64,
    pub(crate) client_cpu_us: f64,
    pub(crate) rss_mib: f64,
    pub(crate) errors: u64,
}

/// The clients of one transport.
pub(crate) struct Clients {
    transport: Transport,
    usual: Client,
    /// Without exactly-once puts.
    sessionless: Client,
}

impl Clients {
    pub(crate) async fn connect(endpoints: &[String], transport: Transport) -> Self {
        let builder = || Client::builder().endpoints(endpoints.to_vec()).pipelined(transport == Transport::Pipeline);
        let usual = builder().connect().await.expect("the cluster is ready");
        let sessionless = builder().sessions(false).connect().await.expect("the cluster is ready");
        Self { transport, usual, sessionless }
    }
}

/// Runs the load for `duration` and reports.
pub(crate) async fn measure(clients: &Clients, operation: Operation, callers: usize, duration: Duration) -> Figures {
    let client = if operation == Operation::PutWithoutSession { &clients.sessionless } else { &clients.usual };
    let servers = processes::servers();
    let own = std::process::id();
    let cpu = |ids: &[u32]| ids.iter().map(|id| processes::cpu_time(*id)).sum::<Duration>();
    let (servers_before, own_before) = (cpu(&servers), cpu(&[own]));
    let errors = Arc::new(AtomicU64::new(0));
    let started = Instant::now();
    let end = started + duration;
    let tasks: Vec<_> =
        (0..callers).map(|_| tokio::spawn(call_until(end, client.clone(), operation, errors.clone()))).collect();
    let mut latencies = empty_histogram();
    for task in tasks {
        latencies.add(task.await.expect("a caller does not panic")).expect("same bounds");
    }
    let operations = latencies.len().max(1) as f64;
    let per_operation = |spent: Duration| spent.as_secs_f64() * 1e6 / operations;
    let resident: u64 = servers.iter().map(|id| processes::resident_bytes(*id)).sum();
    Figures {
        operation,
        transport: clients.transport,
        callers,
        per_second: operations / started.elapsed().as_secs_f64(),
        p50_us: latencies.value_at_quantile(0.5),
        p99_us: latencies.value_at_quantile(0.99),
        server_cpu_us: per_operation(cpu(&servers).saturating_sub(servers_before)),
        client_cpu_us: per_operation(cpu(&[own]).saturating_sub(own_before)),
        rss_mib: resident as f64 / servers.len().max(1) as f64 / f64::from(1 << 20),
        errors: errors.load(Ordering::Relaxed),
    }
}

fn empty_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).expect("valid bounds")
}

async fn call_until(end: Instant, client: Client, operation: Operation, errors: Arc<AtomicU64>) -> Histogram<u64> {
    let mut latencies = empty_histogram();
    let value = vec![b'x'; VALUE_BYTES];
    while Instant::now() < end {
        let key = format!("{:08}", fastrand::u64(..KEYS));
        let started = Instant::now();
        let ok = match operation {
            Operation::Put | Operation::PutWithoutSession => client.put(key, value.clone()).await.is_ok(),
            Operation::Get(consistency) => client.get(key).consistency(consistency).await.is_ok(),
        };
        if ok {
            let micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(LATENCY_US_MAX);
            latencies.saturating_record(micros.max(1));
        } else {
            errors.fetch_add(1, Ordering::Relaxed);
        }
    }
    latencies
}
