//! What observers are told of calls, attempts and changes.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use d_engine_client::{Attempt, Call, Client, End, ErrorKind, Notice, Observer, Outcome, TraceContext};
use d_engine_proto::{ErrorCode, v1};
use parking_lot::Mutex;
use support::{Behaviour, FakeNode, PATIENCE, builder, cluster, elect, eventually, refusal};

/// What happened to one call.
#[derive(Clone, Debug, Default)]
struct Life {
    call: Option<Call>,
    attempts: Vec<(u32, String, End)>,
    ended: Vec<(u32, End)>,
}

/// Writes down everything.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Told>>);

#[derive(Default)]
struct Told {
    calls: HashMap<u64, Life>,
    notices: Vec<Notice>,
}

impl Observer for Recorder {
    fn call_started(&self, call: &Call) {
        let life = Life { call: Some(call.clone()), ..Life::default() };
        assert!(self.0.lock().calls.insert(call.id, life).is_none(), "{call:?} began twice");
    }

    fn attempt_ended(&self, call: &Call, attempt: &Attempt<'_>) {
        let mut told = self.0.lock();
        let life = told.calls.get_mut(&call.id).unwrap();
        assert!(life.ended.is_empty(), "an attempt of {call:?} after its end");
        life.attempts.push((attempt.number, attempt.address.to_owned(), attempt.end));
    }

    fn call_ended(&self, call: &Call, attempts: u32, _elapsed: Duration, end: End) {
        self.0.lock().calls.get_mut(&call.id).unwrap().ended.push((attempts, end));
    }

    fn noticed(&self, notice: &Notice) {
        self.0.lock().notices.push(notice.clone());
    }
}

impl Recorder {
    /// The calls of an operation, in the order in which they began.
    fn calls(&self, operation: &str) -> Vec<Life> {
        let told = self.0.lock();
        let mut calls: Vec<_> = told.calls.values().cloned().collect();
        calls.retain(|life| life.call.as_ref().unwrap().operation == operation);
        calls.sort_by_key(|life| life.call.as_ref().unwrap().id);
        calls
    }

    /// Every call ended once, with the attempts that were told of, numbered one after the other; and all of it adds up
    /// with what the client counts itself.
    fn agrees_with(&self, client: &Client) {
        let (told, stats) = (self.0.lock(), client.stats());
        for life in told.calls.values() {
            assert_eq!(life.ended.len(), 1, "{life:?}");
            assert_eq!(life.ended[0].0 as usize, life.attempts.len(), "{life:?}");
            assert!(life.attempts.iter().zip(1..).all(|(attempt, number)| attempt.0 == number), "{life:?}");
        }
        let of_the_application = told.calls.values().filter(|life| !life.call.as_ref().unwrap().internal).count();
        assert_eq!(stats.calls, of_the_application as u64);
        assert_eq!(stats.in_flight, 0);
        assert_eq!(stats.attempts, told.calls.values().map(|life| life.attempts.len() as u64).sum::<u64>());
        let abandoned = told.calls.values().filter(|life| life.ended[0].1 == End::Abandoned).count();
        assert_eq!(stats.abandoned, abandoned as u64);
    }
}

fn observed(nodes: &[FakeNode], timeout: Duration) -> (Client, Recorder) {
    let recorder = Recorder::default();
    (builder(&[&nodes[0]], timeout).observer(recorder.clone()).build().unwrap(), recorder)
}

#[tokio::test]
async fn a_redirect_is_two_attempts_of_one_call() {
    let nodes = cluster(3);
    let (client, recorder) = observed(&nodes, PATIENCE);
    client.put("k", "1").await.unwrap();
    elect(&nodes, 2, 2);
    client.put("k", "2").await.unwrap();
    let puts = recorder.calls("put");
    assert_eq!(puts[0].attempts, [(1, nodes[0].address.clone(), End::Ok)]);
    let turned_away = End::Failed { kind: ErrorKind::NotLeader, outcome: Outcome::NotApplied };
    assert_eq!(puts[1].attempts, [(1, nodes[0].address.clone(), turned_away), (2, nodes[2].address.clone(), End::Ok)]);
    assert_eq!(puts[1].ended, [(2, End::Ok)]);
    let Call { method, internal, .. } = puts[1].call.clone().unwrap();
    assert_eq!((method, internal), ("Kv/Put", false));
    let session = recorder.calls("register session");
    assert!(session.len() == 1 && session[0].call.as_ref().unwrap().internal);
    recorder.agrees_with(&client);

    let notices = recorder.0.lock().notices.clone();
    let leaders = notices.iter().filter_map(|notice| match notice {
        Notice::Leader(leader) => Some(leader.term.get()),
        _ => None,
    });
    let mut leaders: Vec<_> = leaders.collect();
    leaders.dedup();
    assert_eq!(leaders, [1, 2]);
    assert_eq!(notices.iter().filter(|notice| matches!(notice, Notice::Session(_))).count(), 1);
}

#[tokio::test]
async fn calls_that_fail_or_are_dropped_end_once_too() {
    let nodes = cluster(1);
    let (client, recorder) = observed(&nodes, PATIENCE);
    client.put("k", "1").await.unwrap();
    nodes[0].behave(Behaviour::Refuse(refusal(ErrorCode::InvalidArgument, v1::Outcome::NotApplied, false)));
    client.put("k", "2").await.unwrap_err();
    client.status(&nodes[0].address).await.unwrap();

    nodes[0].behave(Behaviour::Silent);
    let hanging = tokio::spawn(client.put("k", "3").into_future());
    eventually("the put was sent", || nodes[0].puts() == 3).await;
    hanging.abort();
    assert!(hanging.await.unwrap_err().is_cancelled());
    let late = client.put("k", "4").timeout(Duration::from_millis(50)).await.unwrap_err();

    let ends: Vec<_> = recorder.calls("put").iter().map(|life| life.ended[0]).collect();
    let refused = End::Failed { kind: ErrorKind::InvalidArgument, outcome: Outcome::NotApplied };
    assert_eq!(ends[..3], [(1, End::Ok), (1, refused), (1, End::Abandoned)]);
    assert_eq!(ends[3].1, End::Failed { kind: late.kind(), outcome: late.outcome() });
    assert_eq!(recorder.calls("put")[2].attempts, [(1, nodes[0].address.clone(), End::Abandoned)]);
    assert_eq!(recorder.calls("status").len(), 1);
    // Nothing that a node is asked on nobody's behalf is a call.
    assert_eq!(recorder.calls("members").len(), 0);
    recorder.agrees_with(&client);
}

/// Some of many calls are dropped at whatever point they have come to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_dropped_at_any_moment_end_once() {
    let nodes = cluster(3);
    let (client, recorder) = observed(&nodes, PATIENCE);
    let seed = 17;
    let mut rng = fastrand::Rng::with_seed(seed);
    for round in 0..20 {
        let calls: Vec<_> =
            (0..50).map(|call| tokio::spawn(client.put(format!("{call}"), "v").into_future())).collect();
        if round % 4 == 3 {
            elect(&nodes, rng.usize(0..3), round + 2);
        }
        for call in calls {
            if rng.bool() {
                call.abort();
            }
            let _ = call.await;
        }
    }
    eventually("everything ended", || client.stats().in_flight == 0).await;
    println!("seed {seed}: {} of {} calls were dropped", client.stats().abandoned, client.stats().calls);
    recorder.agrees_with(&client);
}

/// Panics whenever it is told anything.
struct Clumsy;

impl Observer for Clumsy {
    fn call_started(&self, _: &Call) {
        panic!("at the start");
    }

    fn trace_context(&self, _: &Call) -> Option<TraceContext> {
        panic!("asked for a span");
    }

    fn attempt_ended(&self, _: &Call, _: &Attempt<'_>) {
        panic!("at an attempt");
    }

    fn call_ended(&self, _: &Call, _: u32, _: Duration, _: End) {
        panic!("at the end");
    }

    fn noticed(&self, _: &Notice) {
        panic!("at a notice");
    }
}

#[tokio::test]
async fn an_observer_that_panics_harms_neither_calls_nor_other_observers() {
    let nodes = cluster(3);
    let recorder = Recorder::default();
    let client = builder(&[&nodes[0]], PATIENCE).observer(Clumsy).observer(recorder.clone()).build().unwrap();
    client.put("k", "1").await.unwrap();
    elect(&nodes, 2, 2);
    client.put("k", "2").await.unwrap();
    assert_eq!(client.get("k").await.unwrap().into_value().unwrap(), "2");
    recorder.agrees_with(&client);
}

/// Says that every call belongs to the same span.
struct Traced(TraceContext);

impl Observer for Traced {
    fn trace_context(&self, _: &Call) -> Option<TraceContext> {
        Some(self.0)
    }
}

#[tokio::test]
async fn the_span_that_an_observer_names_goes_with_every_attempt() {
    let nodes = cluster(3);
    let span = TraceContext { trace_id: [0xab; 16], span_id: [0xcd; 8], flags: 1 };
    let client = builder(&[&nodes[0]], PATIENCE).observer(Traced(span)).build().unwrap();
    client.put("k", "1").await.unwrap();
    elect(&nodes, 2, 2);
    client.put("k", "2").await.unwrap();
    let header = format!("00-{}-{}-01", "ab".repeat(16), "cd".repeat(8));
    for node in [&nodes[0], &nodes[2]] {
        let traceparent = node.script.lock().traceparent.clone();
        assert_eq!(traceparent.as_deref(), Some(header.as_str()), "node {}", node.id());
    }
    let untraced = builder(&[&nodes[2]], PATIENCE).build().unwrap();
    untraced.put("k", "3").await.unwrap();
    assert_eq!(nodes[2].script.lock().traceparent, None);
}

#[tokio::test]
async fn a_client_has_a_bounded_number_of_observers() {
    let nodes = cluster(1);
    let with =
        |count| (0..count).fold(builder(&[&nodes[0]], PATIENCE), |builder, _| builder.observer(Recorder::default()));
    assert!(with(8).build().is_ok());
    assert_eq!(with(9).build().unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[cfg(feature = "metrics")]
#[tokio::test]
async fn the_metrics_are_those_of_the_document_and_count_what_happened() {
    use std::collections::BTreeSet;

    use d_engine_client::ClientMetrics;
    use prometheus_client::registry::Registry;

    let nodes = cluster(3);
    let mut registry = Registry::default();
    let metrics = ClientMetrics::new(&mut registry);
    let client = builder(&[&nodes[0]], PATIENCE).observer(metrics).build().unwrap();
    client.put("k", "1").await.unwrap();
    elect(&nodes, 2, 2);
    client.put("k", "2").await.unwrap();
    nodes[2].behave(Behaviour::Refuse(refusal(ErrorCode::Internal, v1::Outcome::Unknown, false)));
    client.put("k", "3").timeout(Duration::from_millis(100)).await.unwrap_err();

    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    for line in [
        "d_engine_client_calls_total{method=\"Kv/Put\",code=\"Ok\"} 2",
        "d_engine_client_call_duration_seconds_count{method=\"Kv/Put\"} 3",
        "d_engine_client_calls_in_flight 0",
        "d_engine_client_attempts_total{method=\"Kv/Put\",code=\"NotLeader\"} 1",
        "d_engine_client_unknown_outcomes_total{method=\"Kv/Put\"} 1",
        "d_engine_client_sessions_total 1",
    ] {
        assert!(text.lines().any(|found| found == line), "`{line}` is missing in\n{text}");
    }
    let counters = |kind: &str| if kind == "counter" { "_total" } else { "" };
    let registered: BTreeSet<String> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '))
        .map(|(name, kind)| format!("{name}{} {kind}", counters(kind)))
        .collect();
    let documented: BTreeSet<String> = include_str!("../../docs/observability.md")
        .lines()
        .filter_map(|line| line.strip_prefix("| `d_engine_client_"))
        .map(|line| {
            let mut cells = line.split('|').map(str::trim);
            let (name, kind) = (cells.next().unwrap(), cells.next().unwrap());
            format!("d_engine_client_{} {kind}", name.split(['`', '{']).next().unwrap())
        })
        .collect();
    assert_eq!(registered, documented);
    assert!(registered.len() > 8);
}
