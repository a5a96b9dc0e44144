//! HTTP for people's tools: metrics for Prometheus, and probes for load balancers and orchestrators.
//!
//! | path | 200 | otherwise 503 |
//! | --- | --- | --- |
//! | `/health` | the process is alive and has met no fault | restart or replace the node |
//! | `/ready` | it can serve: the cluster is formed, a leader is known, its reign is applied here | wait |
//! | `/primary` | it leads, with a valid lease at this very moment | send writes elsewhere |
//! | `/replica` | it is ready and does not lead | send eventual reads elsewhere |
//! | `/metrics` | always | |
//!
//! The answers are decided from one [`NodeState`], so that a probe never mixes two moments. Nothing here changes the
//! node.

use std::future::Future;
use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use tokio::net::TcpListener;

use crate::consensus::{Consensus, LeaderInfo};
use crate::engine::{CustomEngine, Engine};
use crate::limits::{MONITORING_CONNECTION_AGE_MAX, MONITORING_CONNECTIONS_MAX};
use crate::metrics::{Figures, Metrics};
use crate::services::{Listener, ServeError};

#[cfg(test)]
mod tests;

/// Serves the monitoring port until `shutdown` is ready.
///
/// # Errors
/// When serving ends by itself.
pub async fn serve(
    listener: TcpListener,
    engine: Engine,
    metrics: Arc<Metrics>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    serve_state(listener, move || NodeState::of(&engine), metrics, shutdown).await
}

/// As [`serve`], for a node whose state machine is an application's: what only the key-value store counts stays 0.
///
/// # Errors
/// As [`serve`].
pub async fn serve_custom(
    listener: TcpListener,
    engine: CustomEngine,
    metrics: Arc<Metrics>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let observe = move || {
        let consensus = engine.consensus();
        NodeState::new(consensus, engine.problem(), consensus.figures())
    };
    serve_state(listener, observe, metrics, shutdown).await
}

async fn serve_state(
    listener: TcpListener,
    observe: impl Fn() -> NodeState + Send + Sync + 'static,
    metrics: Arc<Metrics>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let router = Router::new()
        .route("/metrics", get(scrape))
        .route("/health", get(|State(port): State<Port>| async move { port.probe(NodeState::health) }))
        .route("/ready", get(|State(port): State<Port>| async move { port.probe(NodeState::ready) }))
        .route("/primary", get(|State(port): State<Port>| async move { port.probe(NodeState::primary) }))
        .route("/replica", get(|State(port): State<Port>| async move { port.probe(NodeState::replica) }))
        .with_state(Port { observe: Arc::new(observe), metrics });
    let (stopping, stopped) = tokio::sync::watch::channel(());
    // Nobody else notices a client that connects and says nothing, and none may hold up the end.
    let end = move || {
        let mut stopped = stopped.clone();
        let end = async move {
            let _ = tokio::time::timeout(MONITORING_CONNECTION_AGE_MAX, stopped.changed()).await;
        };
        Box::pin(end) as _
    };
    let listener = Listener::new(listener, MONITORING_CONNECTIONS_MAX, end, None);
    let shutdown = async move {
        shutdown.await;
        drop(stopping);
    };
    let served = axum::serve(listener, router).with_graceful_shutdown(shutdown).await;
    served.map_err(|error| ServeError::Ended { message: error.to_string() })
}

/// What the probes are decided from, all of one moment.
#[derive(Clone, Debug, Default)]
struct NodeState {
    node_id: u32,
    /// Why the node cannot go on.
    fault: Option<String>,
    /// Why it does not serve now.
    problem: Option<String>,
    leader: Option<LeaderInfo>,
    /// Whether this node leads with a valid lease.
    is_leader: bool,
    figures: Figures,
}

impl NodeState {
    fn of(engine: &Engine) -> Self {
        Self::new(engine.consensus(), engine.problem(), engine.figures())
    }

    fn new(consensus: &Consensus, problem: Option<String>, figures: Figures) -> Self {
        Self {
            node_id: consensus.node_id().get(),
            fault: consensus.failure().borrow().as_ref().map(ToString::to_string),
            problem,
            leader: consensus.leader(),
            is_leader: consensus.is_leader(),
            figures,
        }
    }

    fn health(&self) -> Result<(), String> {
        self.fault.clone().map_or(Ok(()), Err)
    }

    fn ready(&self) -> Result<(), String> {
        self.health()?;
        self.problem.clone().map_or(Ok(()), Err)
    }

    fn primary(&self) -> Result<(), String> {
        self.ready()?;
        if self.is_leader { Ok(()) } else { Err("this node does not lead, or its lease is over".to_owned()) }
    }

    fn replica(&self) -> Result<(), String> {
        self.ready()?;
        let leads = self.is_leader || self.leader.is_none_or(|leader| leader.leader_id == self.node_id);
        if leads { Err("this node leads".to_owned()) } else { Ok(()) }
    }
}

/// The body of a probe's answer.
#[derive(Serialize)]
struct Answer {
    ok: bool,
    node_id: u32,
    leader_id: Option<u32>,
    term: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

#[derive(Clone)]
struct Port {
    observe: Arc<dyn Fn() -> NodeState + Send + Sync>,
    metrics: Arc<Metrics>,
}

impl Port {
    fn probe(&self, probe: fn(&NodeState) -> Result<(), String>) -> Response {
        let state = (self.observe)();
        let problem = probe(&state).err();
        let status = if problem.is_none() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let answer = Answer {
            ok: problem.is_none(),
            node_id: state.node_id,
            leader_id: state.leader.map(|leader| leader.leader_id),
            term: state.leader.map(|leader| leader.term),
            problem,
        };
        (status, [(header::CACHE_CONTROL, "no-store")], Json(answer)).into_response()
    }
}

async fn scrape(State(port): State<Port>) -> Response {
    match port.metrics.encode(&(port.observe)().figures) {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
