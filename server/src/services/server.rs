//! The gRPC server: its services, its bounds, and how it ends.

use std::future::Future;
use std::sync::Arc;

use axum::middleware::from_fn_with_state;
use d_engine_proto::FILE_DESCRIPTOR_SET;
use d_engine_proto::v1::cluster_server::ClusterServer;
use d_engine_proto::v1::kv_server::KvServer;
use d_engine_proto::v1::lease_server::LeaseServer;
use d_engine_proto::v1::maintenance_server::MaintenanceServer;
use d_engine_proto::v1::session_server::SessionServer;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::service::Routes;

use super::deadline::Deadlines;
use super::error::ServeError;
use super::listener::{End, Listener, affordable};
use super::observe::observe;
use super::pipeline::PipelineService;
use super::watch::WatchService;
use super::{Service, health};
use crate::config::{NetworkConfig, RaftNodeConfig};
use crate::consensus::PeerServer;
use crate::engine::Engine;
use crate::limits;
use crate::metrics::Metrics;
use crate::tls::Tls;

/// Serves clients and peers on a port, with TLS if any is given, until `shutdown` is ready. Calls under way may then end, but not for longer
/// than [`limits::DRAIN_TIMEOUT`]; streams that never end are cut then.
///
/// # Errors
/// When serving ends by itself.
pub fn serve<F: Future<Output = ()> + Send + 'static>(
    listener: TcpListener,
    engine: Engine,
    peers: PeerServer,
    config: &RaftNodeConfig,
    tls: Option<Arc<Tls>>,
    metrics: Arc<Metrics>,
    shutdown: F,
) -> impl Future<Output = Result<(), ServeError>> + Send + use<F> {
    let network = config.network.clone();
    async move {
        let (reporter, health_service) = tonic_health::server::health_reporter();
        let deadlines = Deadlines::new(network.call_timeout);
        let service = Arc::new(Service { engine: engine.clone(), deadlines });
        let (draining, drain) = watch::channel(false);
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()
            .map_err(|error| ServeError::Ended { message: error.to_string() })?;
        let message_max = limits::CLIENT_MESSAGE_BYTES_MAX;
        let routes = Routes::new(KvServer::from_arc(service.clone()).max_decoding_message_size(message_max))
            .add_service(LeaseServer::from_arc(service.clone()).max_decoding_message_size(message_max))
            .add_service(SessionServer::from_arc(service.clone()).max_decoding_message_size(message_max))
            .add_service(MaintenanceServer::from_arc(service.clone()).max_decoding_message_size(message_max))
            .add_service(ClusterServer::from_arc(service).max_decoding_message_size(message_max))
            .add_service(WatchService::new(engine.clone()))
            .add_service(PipelineService::new(engine.clone(), deadlines, metrics.clone(), drain))
            .add_service(peers)
            .add_service(health_service)
            .add_service(reflection);
        let watches = engine.watches().cloned();
        let shutdown = async move {
            shutdown.await;
            // They would never end by themselves.
            if let Some(watches) = watches {
                watches.stop();
            }
        };
        tokio::select! {
            served = serve_routes(listener, routes, network, tls, metrics, draining, shutdown) => served,
            () = health::follow(engine, reporter) => Ok(()),
        }
    }
}

/// As [`serve`], for peers alone: clients find none of the services they look for.
///
/// # Errors
/// As [`serve`].
pub fn serve_peers<F: Future<Output = ()> + Send + 'static>(
    listener: TcpListener,
    peers: PeerServer,
    config: &RaftNodeConfig,
    tls: Option<Arc<Tls>>,
    metrics: Arc<Metrics>,
    shutdown: F,
) -> impl Future<Output = Result<(), ServeError>> + Send + use<F> {
    let network = config.network.clone();
    let (draining, _) = watch::channel(false);
    serve_routes(listener, Routes::new(peers), network, tls, metrics, draining, shutdown)
}

/// Serves until `shutdown` is ready; `draining` is told then.
async fn serve_routes(
    listener: TcpListener,
    routes: Routes,
    network: NetworkConfig,
    tls: Option<Arc<Tls>>,
    metrics: Arc<Metrics>,
    draining: watch::Sender<bool>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let routes = Routes::from(routes.into_axum_router().layer(from_fn_with_state(metrics.clone(), observe)));
    let mut drain = draining.subscribe();
    let server = tonic::transport::Server::builder()
        .max_concurrent_streams(network.streams_per_connection_max)
        .initial_stream_window_size(limits::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(limits::CONNECTION_WINDOW_BYTES)
        .http2_max_header_list_size(limits::HEADER_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(limits::PENDING_RESETS_MAX))
        .http2_keepalive_interval(Some(limits::KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(limits::KEEPALIVE_TIMEOUT))
        .add_routes(routes);

    let (cut, uncut) = watch::channel(());
    let end = move || -> End {
        let mut uncut = uncut.clone();
        Box::pin(async move {
            let _ = uncut.changed().await;
        })
    };
    let connections_max = affordable(network.connections_max);
    let listener = Listener::new(listener, connections_max, end, Some(metrics)).with_tls(tls);
    let incoming = futures_util::stream::unfold(listener, |mut listener| async {
        let connection = listener.next_connection().await;
        Some((Ok::<_, std::io::Error>(connection), listener))
    });

    let shutdown = async move {
        shutdown.await;
        draining.send_replace(true);
    };
    let serving = server.serve_with_incoming_shutdown(incoming, shutdown);
    let cutting = async move {
        if drain.wait_for(|begun| *begun).await.is_ok() {
            tokio::time::sleep(limits::DRAIN_TIMEOUT).await;
            cut.send_replace(());
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        served = serving => served.map_err(|error| ServeError::Ended { message: error.to_string() }),
        () = cutting => Ok(()),
    }
}
