//! The standard gRPC health service: it says of the server and of each of its services whether the node is ready.

use std::time::Duration;

use d_engine_proto::v1::{cluster_server, kv_server, lease_server, maintenance_server, session_server, watch_server};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::engine::Engine;

/// A node can get into trouble without anything being published, such as by a disk that fails, so it is also asked.
const PERIOD: Duration = Duration::from_millis(500);

/// What serves when the node does; the empty name stands for the server as a whole.
const SERVICES: [&str; 6] = [
    "",
    kv_server::SERVICE_NAME,
    lease_server::SERVICE_NAME,
    session_server::SERVICE_NAME,
    maintenance_server::SERVICE_NAME,
    watch_server::SERVICE_NAME,
];

/// Keeps the reported health true, for as long as it is polled.
pub(super) async fn follow(engine: Engine, reporter: HealthReporter) {
    // An operator asks the cluster service also about a node that does not serve.
    reporter.set_service_status(cluster_server::SERVICE_NAME, ServingStatus::Serving).await;
    let mut leader = engine.consensus().leader_changes();
    let mut reported = None;
    loop {
        leader.mark_unchanged();
        let ready = engine.problem().is_none();
        if reported != Some(ready) {
            let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
            for service in SERVICES {
                reporter.set_service_status(service, status).await;
            }
            reported = Some(ready);
        }
        if let Ok(Err(_)) = tokio::time::timeout(PERIOD, leader.changed()).await {
            // Nobody publishes any more: the node has stopped.
            tokio::time::sleep(PERIOD).await;
        }
    }
}
