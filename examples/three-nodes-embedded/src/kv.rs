//! Keys and values over HTTP, on any node: reads from the engine in this process, writes by the leader.

use std::error::Error;
use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use d_engine::client::Client;
use d_engine::prelude::*;
use serde::{Deserialize, Serialize};

#[derive(Clone)]
struct Service {
    local: Arc<EmbeddedClient>,
    /// Finds the leader and repeats what may be repeated, for the writes that arrive on another node.
    remote: Client,
}

#[derive(Deserialize)]
struct Pair {
    key: String,
    value: String,
}

#[derive(Default, Deserialize)]
struct WriteOptions {
    /// Answer 307 instead of forwarding.
    #[serde(default)]
    redirect: bool,
}

#[derive(Default, Deserialize)]
struct ReadOptions {
    /// Answer from this node's memory, which may be a little behind.
    #[serde(default)]
    eventual: bool,
}

#[derive(Serialize)]
struct Found {
    value: Option<String>,
}

/// The routes of a node that is ready.
pub(crate) async fn router(engine: EmbeddedEngine) -> Result<Router, Box<dyn Error>> {
    let local = engine.client();
    let members = local.engine()?.members().members;
    let endpoints = members.into_iter().map(|member| member.client_address);
    let remote = Client::builder().endpoints(endpoints).build()?;
    let service = Service { local, remote };
    Ok(Router::new().route("/kv", post(write)).route("/kv/{key}", get(read)).with_state(service))
}

async fn write(
    State(service): State<Service>,
    Query(options): Query<WriteOptions>,
    Json(pair): Json<Pair>,
) -> Response {
    match service.local.put(&pair.key, &pair.value).await {
        Ok(()) => StatusCode::OK.into_response(),
        Err(error) if error.is_not_leader() && options.redirect => redirect(&error),
        // Nothing of it was applied here.
        Err(error) if error.is_not_leader() => match service.remote.put(pair.key, pair.value).await {
            Ok(_) => StatusCode::OK.into_response(),
            Err(error) => failed(&error),
        },
        Err(error) => failed(&error),
    }
}

fn redirect(error: &LocalClientError) -> Response {
    match error.application_address() {
        Some(address) => {
            (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, format!("http://{address}/kv"))]).into_response()
        }
        None => failed(error),
    }
}

async fn read(State(service): State<Service>, Query(options): Query<ReadOptions>, Path(key): Path<String>) -> Response {
    let found = match options.eventual {
        true => service.local.get_eventual(&key).await,
        false => service.local.get_linearizable(&key).await,
    };
    match found {
        Ok(value) => {
            let status = if value.is_some() { StatusCode::OK } else { StatusCode::NOT_FOUND };
            let value = value.map(|value| String::from_utf8_lossy(&value).into_owned());
            (status, Json(Found { value })).into_response()
        }
        Err(error) => failed(&error),
    }
}

/// 400 for a request that makes no sense; else 503, and the text says what became of a write.
fn failed(error: &impl ClientApiError) -> Response {
    let status = match error.code() {
        "InvalidArgument" => StatusCode::BAD_REQUEST,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, error.to_string()).into_response()
}
