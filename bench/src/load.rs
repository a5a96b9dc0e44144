//! Load: many callers, each with one operation in flight, through one client.

use std::time::Duration;

use d_engine_bench::callers;
use d_engine_client::{Bytes, Client, Consistency};
use d_engine_tests::processes;
use futures_util::FutureExt;

const KEYS: u64 = 10_000;
const VALUE_BYTES: usize = 256;

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
    let (client, value) = (client.clone(), Bytes::from(vec![b'x'; VALUE_BYTES]));
    let call = move || {
        let key = format!("{:08}", fastrand::u64(..KEYS));
        match operation {
            Operation::Put | Operation::PutWithoutSession => {
                client.put(key, value.clone()).into_future().map(|answer| answer.is_ok()).left_future()
            }
            Operation::Get(consistency) => {
                client.get(key).consistency(consistency).into_future().map(|answer| answer.is_ok()).right_future()
            }
        }
    };
    let servers = processes::servers();
    let load = callers::load(&servers, callers, Duration::ZERO, duration, call).await;
    Figures {
        operation,
        transport: clients.transport,
        callers,
        per_second: load.per_second,
        p50_us: load.latencies_us.value_at_quantile(0.5),
        p99_us: load.latencies_us.value_at_quantile(0.99),
        server_cpu_us: load.servers_cpu_us,
        client_cpu_us: load.own_cpu_us,
        rss_mib: load.resident as f64 / servers.len().max(1) as f64 / f64::from(1 << 20),
        errors: load.errors,
    }
}
