//! What a client does, as Prometheus metrics: an observer that counts, and decides nothing.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::error::Outcome;
use crate::observe::{Attempt, Call, End, Notice, Observer};

/// Counts what clients do; `docs/observability.md` lists the metrics. Clones count together, so that one set of metrics
/// may serve several clients.
///
/// ```
/// use d_engine_client::{Client, ClientMetrics};
/// use prometheus_client::registry::Registry;
///
/// let mut registry = Registry::default();
/// let metrics = ClientMetrics::new(&mut registry);
/// let builder = Client::builder().endpoints(["127.0.0.1:9081"]).observer(metrics);
/// # let _: d_engine_client::ClientBuilder = builder;
/// ```
#[derive(Clone, Debug)]
pub struct ClientMetrics {
    calls: Family<Ended, Counter>,
    durations: Family<Method, Histogram, fn() -> Histogram>,
    in_flight: Gauge,
    attempts: Family<Ended, Counter>,
    retries: Family<Method, Counter>,
    unknown: Family<Method, Counter>,
    leader_changes: Counter,
    sessions: Counter,
    watch_resumes: Counter,
    leases_lost: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Method {
    method: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    method: &'static str,
    code: &'static str,
}

impl ClientMetrics {
    /// Registers the metrics, none of which has a value yet.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            calls: Family::default(),
            durations: Family::new_with_constructor(latencies),
            in_flight: Gauge::default(),
            attempts: Family::default(),
            retries: Family::default(),
            unknown: Family::default(),
            leader_changes: Counter::default(),
            sessions: Counter::default(),
            watch_resumes: Counter::default(),
            leases_lost: Counter::default(),
        };
        let registry = registry.sub_registry_with_prefix("d_engine_client");
        registry.register("calls", "Calls that ended", metrics.calls.clone());
        registry.register("call_duration_seconds", "Time of a call, all attempts included", metrics.durations.clone());
        registry.register("calls_in_flight", "Calls that have not ended", metrics.in_flight.clone());
        registry.register("attempts", "Attempts that ended", metrics.attempts.clone());
        registry.register("retries", "Attempts beyond the first of their call", metrics.retries.clone());
        registry.register("unknown_outcomes", "Calls whose outcome is unknown", metrics.unknown.clone());
        registry.register("leader_changes", "Leaders that became known", metrics.leader_changes.clone());
        registry.register("sessions", "Sessions opened", metrics.sessions.clone());
        registry.register("watch_resumes", "Times a watch went on on a new stream", metrics.watch_resumes.clone());
        registry.register("leases_lost", "Leases kept alive that were lost", metrics.leases_lost.clone());
        metrics
    }
}

impl Observer for ClientMetrics {
    fn call_started(&self, _call: &Call) {
        self.in_flight.inc();
    }

    fn attempt_ended(&self, call: &Call, attempt: &Attempt<'_>) {
        let method = call.method;
        self.attempts.get_or_create(&Ended { method, code: attempt.end.name() }).inc();
        if attempt.number > 1 {
            self.retries.get_or_create(&Method { method }).inc();
        }
    }

    fn call_ended(&self, call: &Call, _attempts: u32, elapsed: Duration, end: End) {
        let method = call.method;
        self.in_flight.dec();
        self.calls.get_or_create(&Ended { method, code: end.name() }).inc();
        self.durations.get_or_create(&Method { method }).observe(elapsed.as_secs_f64());
        if matches!(end, End::Failed { outcome: Outcome::Unknown, .. }) {
            self.unknown.get_or_create(&Method { method }).inc();
        }
    }

    fn noticed(&self, notice: &Notice) {
        match notice {
            Notice::Leader(_) => &self.leader_changes,
            Notice::Session(_) => &self.sessions,
            Notice::WatchResumed => &self.watch_resumes,
            Notice::LeaseLost(_) => &self.leases_lost,
        }
        .inc();
    }
}

/// 50 µs to 6.5 s, as the server's.
fn latencies() -> Histogram {
    Histogram::new(exponential_buckets(50e-6, 2.0, 18))
}
