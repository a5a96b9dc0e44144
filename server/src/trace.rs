//! The spans of a traced call: the call, what it proposes, and what every member applies of it.
//!
//! ```text
//! client's span ──▶ call ──▶ propose ──▶ (log) ──▶ apply, on each member
//! ```
//!
//! They are `tracing` spans of the target [`TARGET`], at the level `DEBUG`. With the feature `opentelemetry` they take
//! their parent from the request or from the log, and tell their own to what follows; this is the only module of the
//! server that names OpenTelemetry. It never sets up a subscriber or an exporter: the program does.
//!
//! A call whose trace nobody records costs a look at the header. One that came without a trace begins one only where
//! the target [`ROOT_TARGET`] is enabled.

use d_engine_proto::{Revision, v1};
use tracing::Span;
use tracing::field::Empty;

use crate::storage::LogPosition;

/// Target of the spans of calls whose trace somebody records.
pub const TARGET: &str = "d_engine::trace";
/// Target of the spans of calls that came without a trace.
pub const ROOT_TARGET: &str = "d_engine::trace::root";

macro_rules! call_span {
    ($target:expr, $method:expr) => {
        tracing::debug_span!(
            target: $target,
            parent: None,
            "call",
            otel.name = %format_args!("d_engine.v1.{}", $method),
            otel.kind = "server",
            otel.status_code = Empty,
            rpc.system = "grpc",
            rpc.service = %format_args!("d_engine.v1.{}", service($method)),
            rpc.method = %method($method),
            error.type = Empty,
        )
    };
}

/// The span of a call for `method`, such as `Kv/Put`, that belongs to the span `parent` of its caller. Pass it to
/// [`ended`] when the call has its answer. An operation of a pipelined stream is a call, too.
#[must_use]
pub fn call(method: &'static str, parent: Option<&v1::TraceContext>) -> Span {
    let span = match parent {
        Some(parent) if parent.is_sampled() => within(call_span!(TARGET, method), parent),
        Some(_) => Span::none(),
        None => call_span!(ROOT_TARGET, method),
    };
    if span.is_disabled() { tracing::debug_span!("call", method) } else { span }
}

/// Takes note of how a call ended: `Ok` or the name of an error code.
pub fn ended(call: &Span, code: &'static str) {
    if code != "Ok" {
        call.record("error.type", code).record("otel.status_code", "ERROR");
    }
}

/// The span of a proposal, if somebody records the current one.
#[must_use]
pub fn propose() -> Span {
    match context(&Span::current()) {
        Some(_) => tracing::debug_span!(target: TARGET, "propose"),
        None => Span::none(),
    }
}

/// The span of applying a command that was proposed under `parent`.
#[must_use]
pub fn apply(parent: &v1::TraceContext, position: LogPosition, revision: Revision) -> Span {
    if !parent.is_sampled() {
        return Span::none();
    }
    let span = tracing::debug_span!(
        target: TARGET,
        parent: None,
        "apply",
        d_engine.log_index = position.index.get(),
        d_engine.revision = revision.get(),
    );
    within(span, parent)
}

fn service(method: &str) -> &str {
    method.split_once('/').map_or("unknown", |(service, _)| service)
}

fn method(method: &str) -> &str {
    method.split_once('/').map_or(method, |(_, method)| method)
}

#[cfg(feature = "opentelemetry")]
mod bridge {
    use d_engine_proto::v1;
    use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
    use tracing::Span;
    use tracing_opentelemetry::OpenTelemetrySpanExt;

    /// A span that was not entered yet, as a part of another process's span.
    pub(super) fn within(span: Span, parent: &v1::TraceContext) -> Span {
        if !span.is_disabled()
            && let Some((trace_id, span_id)) = parent.ids()
        {
            let parent = SpanContext::new(
                TraceId::from_bytes(trace_id),
                SpanId::from_bytes(span_id),
                TraceFlags::SAMPLED,
                true,
                TraceState::default(),
            );
            // Fails where nobody exports: then the span is the log's alone.
            let _ = span.set_parent(opentelemetry::Context::new().with_remote_span_context(parent));
        }
        span
    }

    pub(super) fn context(span: &Span) -> Option<v1::TraceContext> {
        if span.is_disabled() {
            return None;
        }
        let context = span.context();
        let context = context.span().span_context().clone();
        let flags = context.trace_flags();
        let (trace_id, span_id) = (context.trace_id().to_bytes(), context.span_id().to_bytes());
        flags.is_sampled().then(|| v1::TraceContext::new(trace_id, span_id, flags.to_u8())).flatten()
    }
}

#[cfg(not(feature = "opentelemetry"))]
mod bridge {
    use d_engine_proto::v1;
    use tracing::Span;

    pub(super) fn within(span: Span, _parent: &v1::TraceContext) -> Span {
        span
    }

    pub(super) fn context(_span: &Span) -> Option<v1::TraceContext> {
        None
    }
}

use bridge::within;

/// What others need to be part of a span: for the command that is proposed under it. `None` unless somebody records it.
#[must_use]
pub fn context(span: &Span) -> Option<v1::TraceContext> {
    bridge::context(span)
}
