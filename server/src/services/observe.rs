//! Around every call: a span, the metrics, and the details of errors that tonic made itself.
//!
//! A call ends here when its answer begins, so that a stream counts with the time until it is open. What happens on it is
//! counted where it happens: a pipeline counts its operations as calls.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use d_engine_proto::v1::TraceContext;
use d_engine_proto::{DetailedStatus, TRACEPARENT};
use tonic::Status;
use tracing::Instrument;

use super::error::explain;
use crate::metrics::Metrics;
use crate::trace;

const PACKAGE: &str = "/d_engine.v1.";

/// The methods that are counted by name. Calls between members are not: they are heartbeats for the most part.
const METHODS: [&str; 26] = [
    "Cluster/ChangeMember",
    "Cluster/Members",
    "Cluster/Status",
    "Cluster/TransferLeadership",
    "Kv/CompareAndSwap",
    "Kv/Delete",
    "Kv/DeleteRange",
    "Kv/Get",
    "Kv/GetMany",
    "Kv/Put",
    "Kv/Range",
    "Kv/Txn",
    "Lease/Grant",
    "Lease/KeepAlive",
    "Lease/List",
    "Lease/Renew",
    "Lease/Revoke",
    "Lease/TimeToLive",
    "Maintenance/Check",
    "Maintenance/Compact",
    "Maintenance/Snapshot",
    "Pipeline/Exchange",
    "Session/Close",
    "Session/Register",
    "Session/Renew",
    "Watch/Watch",
];

/// For an axum middleware around the services.
pub(super) async fn observe(State(metrics): State<Arc<Metrics>>, request: Request, next: Next) -> Response {
    let Some(path) = request.uri().path().strip_prefix(PACKAGE) else { return next.run(request).await };
    if path.starts_with("Peer/") {
        return next.run(request).await;
    }
    let method = METHODS.iter().find(|method| **method == path).copied().unwrap_or("unknown");
    let started = Instant::now();
    let span = trace::call(method, parent(&request).as_ref());
    let answer = next.run(request).instrument(span.clone());
    #[cfg(feature = "fault-points")]
    let answer = between_the_fault_points(method, answer);
    let (response, code) = complete(answer.await);
    trace::ended(&span, code);
    metrics.request(method, code, started.elapsed());
    response
}

/// The fault points of a call whose operation is its method: not of streams.
#[cfg(feature = "fault-points")]
async fn between_the_fault_points(method: &str, answer: impl Future<Output = Response>) -> Response {
    use crate::faults::{BEFORE_REPLY, RECEIVED, reached};
    let Some(operation) = method.strip_prefix("Kv/") else { return answer.await };
    let refused = |error| super::error::refusal(error).into_http();
    if let Err(error) = reached(RECEIVED, operation).await {
        return refused(error);
    }
    let response = answer.await;
    match reached(BEFORE_REPLY, operation).await {
        Ok(()) => response,
        Err(error) => refused(error),
    }
}

/// The span that the call belongs to.
fn parent(request: &Request) -> Option<TraceContext> {
    TraceContext::from_traceparent(request.headers().get(TRACEPARENT)?.to_str().ok()?)
}

/// The response with details, if it is an error, and the name of its code.
fn complete(response: Response) -> (Response, &'static str) {
    let Some(status) = Status::from_header_map(response.headers()) else { return (response, "Ok") };
    match DetailedStatus::from_status(&status) {
        Some(error) => (response, error.code().map_or("unknown", |code| code.name())),
        None => {
            let explained = explain(&status);
            let code = DetailedStatus::from_status(&explained).and_then(|error| error.code());
            (explained.into_http(), code.map_or("unknown", |code| code.name()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    #[test]
    fn every_method_for_clients_is_counted_by_its_name() {
        let files = prost_types::FileDescriptorSet::decode(d_engine_proto::FILE_DESCRIPTOR_SET).unwrap();
        let services = files.file.iter().flat_map(|file| &file.service).filter(|service| service.name() != "Peer");
        let mut methods: Vec<String> = services
            .flat_map(|service| service.method.iter().map(|method| format!("{}/{}", service.name(), method.name())))
            .collect();
        methods.sort();
        assert_eq!(methods, METHODS);
    }
}
