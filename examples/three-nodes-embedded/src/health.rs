//! What a load balancer asks: who takes writes, and who takes reads.

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use d_engine::prelude::*;

/// `/primary`: 200 on the leader, by its lease at this very moment. `/replica`: 200 on those that follow one. `/ready`: 200
/// on both.
pub(crate) fn router(engine: EmbeddedEngine) -> Router {
    let (primary, replica, ready) = (engine.clone(), engine.clone(), engine);
    let answer = |is_so: bool| if is_so { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Router::new()
        .route("/primary", get(move || async move { answer(primary.is_leader()) }))
        .route("/ready", get(move || async move { answer(ready.leader_info().is_some()) }))
        .route("/replica", get(move || async move { answer(!replica.is_leader() && replica.leader_info().is_some()) }))
}
