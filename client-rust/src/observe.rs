//! Observers: who wants to know of calls, attempts and changes, and to which span a call belongs.
//!
//! The client tells; nobody who is told decides anything. A call is told of by a guard, so that it begins once and ends
//! once, also if its future is dropped.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::{LeaseId, SessionId, v1};
use tokio::time::Instant;
use tracing::Span;
use tracing::field::Empty;

use crate::client::Shared;
use crate::cluster::Leader;
use crate::error::{Error, ErrorKind, Outcome};
use crate::retry::{Failure, Resend};
use crate::topology::Address;
use crate::wire::Unary;

/// Observers of one client; each is told of everything.
pub(crate) const OBSERVERS_MAX: usize = 8;

const PACKAGE: &str = "d_engine.v1.";

/// Is told what a client does, as it happens: for metrics and tracing.
///
/// Its methods are called by the task that makes the call, which waits for them: they must not block. A panic in one
/// ends what that method does, and is otherwise ignored. No lock of the client is held meanwhile.
///
/// ```
/// use d_engine_client::{Attempt, Call, End, Observer};
///
/// struct Failures;
///
/// impl Observer for Failures {
///     fn attempt_ended(&self, call: &Call, attempt: &Attempt<'_>) {
///         if let End::Failed { kind, .. } = attempt.end {
///             println!("{} at {}: {} after {:?}", call.operation, attempt.address, kind.name(), attempt.elapsed);
///         }
///     }
/// }
/// # let _: d_engine_client::ClientBuilder = d_engine_client::Client::builder().observer(Failures);
/// ```
pub trait Observer: Send + Sync + 'static {
    /// A call begins. Exactly one [`call_ended`](Self::call_ended) follows.
    fn call_started(&self, call: &Call) {
        let _ = call;
    }

    /// The span that a call belongs to: the servers' spans become part of it. Asked once, when the call begins. The
    /// feature `opentelemetry` takes the current span without asking; of several answers the first one counts.
    fn trace_context(&self, call: &Call) -> Option<TraceContext> {
        let _ = call;
        None
    }

    /// An attempt of a call ended.
    fn attempt_ended(&self, call: &Call, attempt: &Attempt<'_>) {
        let _ = (call, attempt);
    }

    /// A call ended, after so many attempts.
    fn call_ended(&self, call: &Call, attempts: u32, elapsed: Duration, end: End) {
        let _ = (call, attempts, elapsed, end);
    }

    /// Something changed that belongs to no call.
    fn noticed(&self, notice: &Notice) {
        let _ = notice;
    }
}

/// A call: what the application asked for, or what the client needs for itself.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Call {
    /// Tells the calls of a client from each other.
    pub id: u64,
    /// What is asked for, as errors name it, such as `put`.
    pub operation: &'static str,
    /// Its gRPC method, such as `Kv/Put`; the metrics of the server name it alike.
    pub method: &'static str,
    /// Whether the client makes it for itself: to open or to prolong its session.
    pub internal: bool,
}

/// An attempt that ended.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Attempt<'a> {
    /// 1 for the first of its call.
    pub number: u32,
    /// The node that was asked, as `host:port`.
    pub address: &'a str,
    /// How long it took.
    pub elapsed: Duration,
    /// How it ended.
    pub end: End,
}

/// How a call or an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With an answer.
    Ok,
    /// With an error of this kind.
    Failed {
        /// What a caller acts on.
        kind: ErrorKind,
        /// What became of the request.
        outcome: Outcome,
    },
    /// Its future was dropped.
    Abandoned,
}

impl End {
    /// `Ok`, the name of the kind of error, or `Abandoned`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "Ok",
            Self::Failed { kind, .. } => kind.name(),
            Self::Abandoned => "Abandoned",
        }
    }
}

/// What changes beside calls.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Notice {
    /// A leader of a newer term became known, or one after there was none.
    Leader(Leader),
    /// The client's writes go under this session now.
    Session(SessionId),
    /// A watch went on on a new stream.
    WatchResumed,
    /// A lease that was kept alive is lost.
    LeaseLost(LeaseId),
}

/// A span, in the terms of W3C Trace Context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// Not all zeros.
    pub trace_id: [u8; 16],
    /// Not all zeros.
    pub span_id: [u8; 8],
    /// The lowest bit says whether somebody records the trace.
    pub flags: u8,
}

impl TraceContext {
    /// As the protocol carries it; `None` if an id is none.
    pub(crate) fn to_wire(self) -> Option<v1::TraceContext> {
        v1::TraceContext::new(self.trace_id, self.span_id, self.flags)
    }
}

/// The observers of a client.
#[derive(Clone, Default)]
pub(crate) struct Observers(pub(crate) Vec<Arc<dyn Observer>>);

impl Observers {
    fn tell(&self, tell: impl Fn(&dyn Observer)) {
        for observer in &self.0 {
            // What it leaves behind is its own.
            if catch_unwind(AssertUnwindSafe(|| tell(&**observer))).is_err() {
                tracing::error!("an observer panicked");
            }
        }
    }

    fn trace_context(&self, call: &Call) -> Option<TraceContext> {
        let ask = |observer: &Arc<dyn Observer>| {
            catch_unwind(AssertUnwindSafe(|| observer.trace_context(call))).unwrap_or_default()
        };
        self.0.iter().find_map(ask)
    }

    /// The time, if somebody wants to know how much passes.
    fn now(&self) -> Option<Instant> {
        (!self.0.is_empty()).then(Instant::now)
    }
}

impl fmt::Debug for Observers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} observers", self.0.len())
    }
}

impl Shared {
    /// Begins a call.
    pub(crate) fn observe<R: Unary>(&self, internal: bool) -> Observed<'_> {
        let method = behind(R::PATH, '.');
        let id = self.counters.observed.next();
        let call = Call { id, operation: R::OPERATION, method, internal };
        let observers = &self.options.observers;
        observers.tell(|observer| observer.call_started(&call));
        let trace = observers.trace_context(&call);
        let span = tracing::debug_span!(
            "d_engine_call",
            operation = R::OPERATION,
            otel.status_code = Empty,
            error.type = Empty
        );
        Observed { shared: self, started: observers.now(), attempts: 0, end: End::Abandoned, trace, span, call }
    }

    pub(crate) fn notice(&self, notice: &Notice) {
        self.options.observers.tell(|observer| observer.noticed(notice));
    }

    /// Another leader became known. No lock is held.
    pub(crate) fn notice_leader(&self) {
        if !self.options.observers.0.is_empty() {
            let leader = self.state.lock().topology.leader().cloned();
            if let Some(leader) = leader {
                self.notice(&Notice::Leader(leader));
            }
        }
    }
}

/// A call under way. It ends when this is dropped.
pub(crate) struct Observed<'a> {
    shared: &'a Shared,
    call: Call,
    started: Option<Instant>,
    attempts: u32,
    end: End,
    trace: Option<TraceContext>,
    span: Span,
}

impl Observed<'_> {
    /// The span to make the call in.
    pub(crate) fn span(&self) -> Span {
        self.span.clone()
    }

    /// Takes note of how the call ends.
    pub(crate) fn ends<T>(&mut self, result: &Result<T, Error>) {
        self.end = match result {
            Ok(_) => End::Ok,
            Err(error) => End::Failed { kind: error.kind(), outcome: error.outcome() },
        };
    }

    /// Begins an attempt.
    pub(crate) fn attempt<'a>(&'a mut self, address: &'a Address) -> ObservedAttempt<'a> {
        self.attempts = self.attempts.saturating_add(1);
        self.shared.counters.attempts.add();
        let span = tracing::debug_span!(
            "d_engine_attempt",
            otel.name = %format_args!("{PACKAGE}{}", self.call.method),
            otel.kind = "client",
            otel.status_code = Empty,
            rpc.system = "grpc",
            rpc.service = %format_args!("{PACKAGE}{}", before(self.call.method, '/')),
            rpc.method = behind(self.call.method, '/'),
            server.address = behind(before(address.as_str(), ':'), '/'),
            server.port = behind(address.as_str(), ':').parse::<u16>().ok(),
            error.type = Empty,
        );
        ObservedAttempt { started: self.shared.options.observers.now(), end: End::Abandoned, call: self, address, span }
    }
}

impl Drop for Observed<'_> {
    fn drop(&mut self) {
        let counters = &self.shared.counters;
        counters.observed_ended.add();
        if self.end == End::Abandoned {
            counters.abandoned.add();
        }
        note_end(&self.span, self.end);
        if let Some(started) = self.started {
            let elapsed = started.elapsed();
            let observers = &self.shared.options.observers;
            observers.tell(|observer| observer.call_ended(&self.call, self.attempts, elapsed, self.end));
        }
    }
}

/// An attempt under way. It ends when this is dropped.
pub(crate) struct ObservedAttempt<'a> {
    call: &'a Observed<'a>,
    address: &'a Address,
    started: Option<Instant>,
    end: End,
    span: Span,
}

impl ObservedAttempt<'_> {
    /// The span to make the attempt in.
    pub(crate) fn span(&self) -> Span {
        self.span.clone()
    }

    /// What the node is told of the span that it serves: the attempt's own, or the one that an observer named.
    pub(crate) fn trace(&self) -> Option<v1::TraceContext> {
        exported(&self.span).or_else(|| self.call.trace?.to_wire())
    }

    /// Takes note of how the attempt ends.
    pub(crate) fn ends<T>(mut self, result: &Result<T, Failure>, resend: Resend) {
        self.end = match result {
            Ok(_) => End::Ok,
            Err(failure) => End::Failed { kind: failure.kind(), outcome: failure.outcome(resend) },
        };
    }
}

impl Drop for ObservedAttempt<'_> {
    fn drop(&mut self) {
        note_end(&self.span, self.end);
        if let Some(started) = self.started {
            let (number, elapsed) = (self.call.attempts, started.elapsed());
            let attempt = Attempt { number, address: self.address.as_str(), elapsed, end: self.end };
            self.call.shared.options.observers.tell(|observer| observer.attempt_ended(&self.call.call, &attempt));
        }
    }
}

fn note_end(span: &Span, end: End) {
    if end != End::Ok {
        span.record("error.type", end.name()).record("otel.status_code", "ERROR");
    }
}

/// What stands before the last `separator`, or nothing.
fn before(text: &str, separator: char) -> &str {
    text.rsplit_once(separator).map_or("", |(before, _)| before)
}

/// What stands behind the last `separator`, or everything.
fn behind(text: &str, separator: char) -> &str {
    text.rsplit_once(separator).map_or(text, |(_, behind)| behind)
}

/// The OpenTelemetry context of a span, or of the one around it if nobody wants the span itself.
#[cfg(feature = "opentelemetry")]
fn exported(span: &Span) -> Option<v1::TraceContext> {
    use opentelemetry::trace::TraceContextExt;
    use tracing_opentelemetry::OpenTelemetrySpanExt;

    let context = if span.is_disabled() { Span::current().context() } else { span.context() };
    let span = context.span();
    let span = span.span_context();
    if !span.is_valid() {
        return None;
    }
    v1::TraceContext::new(span.trace_id().to_bytes(), span.span_id().to_bytes(), span.trace_flags().to_u8())
}

#[cfg(not(feature = "opentelemetry"))]
fn exported(_span: &Span) -> Option<v1::TraceContext> {
    None
}
