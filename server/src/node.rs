//! One node, put together: ports, storage, consensus, services; started, run and stopped as a whole.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use d_engine_proto::{NodeId, v1};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::config::{DEFAULT_LISTEN_ADDRESS, MemberRole, RaftNodeConfig};
use crate::consensus::{Consensus, ConsensusConfig, SnapshotPolicy, StartError};
use crate::engine::{Engine, EngineConfig, ReadPolicy};
use crate::metrics::Metrics;
use crate::monitoring;
use crate::services::{self, ServeError};
use crate::state_machine::kv::KvStateMachine;
use crate::storage::{RocksDBStorageEngine, StorageError};
use crate::tls::{Tls, TlsError};

/// Name of the log's directory below `cluster.db_root_dir`.
const LOG_DIRECTORY: &str = "log";
/// Name of the state machine's directory below `cluster.db_root_dir`.
const STATE_DIRECTORY: &str = "state";
/// Name of the snapshots' directory below `cluster.db_root_dir`.
const SNAPSHOT_DIRECTORY: &str = "snapshots";

/// Why a node does not start, or ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A port cannot be used, or serving on it failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// A data directory cannot be used.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A certificate, key or CA cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The node must not take part, or consensus ended.
    #[error(transparent)]
    Consensus(#[from] StartError),
    /// A task of the node panicked: a bug.
    #[error("{what} panicked: report it, with the log")]
    Panicked {
        /// Which task.
        what: &'static str,
    },
}

/// A running node. Dropping it without [`stop`](Self::stop) leaves its tasks running until the runtime ends.
pub struct Node {
    engine: Engine,
    stop: watch::Sender<bool>,
    serving: JoinHandle<Result<(), ServeError>>,
    monitoring: Option<JoinHandle<Result<(), ServeError>>>,
}

impl Node {
    /// Starts a node by a configuration that was validated. Ports are taken first, so that a second start of the
    /// same node fails before it touches the data.
    ///
    /// # Errors
    /// When a port or a directory cannot be used, or the directory is another node's.
    pub async fn start(config: RaftNodeConfig) -> Result<Self, NodeError> {
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
        let listen_address = config.cluster.listen_address.as_deref().unwrap_or(DEFAULT_LISTEN_ADDRESS);
        let listener = services::bind(listen_address).await?;
        let monitoring_listener = match &config.monitoring.listen_address {
            Some(address) => Some(services::bind(address).await?),
            None => None,
        };
        let root = config.cluster.db_root_dir.clone();
        let metrics = Arc::new(Metrics::default());
        let tls = match config.tls.is_on() {
            true => {
                let (tls, metrics) = (config.tls.clone(), metrics.clone());
                Some(blocking("reading the certificates", move || Tls::load(tls, metrics)).await??)
            }
            false => None,
        };
        let (log, state_machine) = blocking("opening the data directories", move || open(&root)).await??;
        let kv = Arc::new(state_machine);
        let consensus_config = consensus_config(&config);
        let (consensus, peers) =
            Consensus::start(consensus_config, Arc::new(log), kv.clone(), metrics.clone(), tls.clone()).await?;
        let read_policy = ReadPolicy {
            default: config.raft.read_consistency.default_policy.into(),
            allow_client_override: config.raft.read_consistency.allow_client_override,
        };
        let engine_config = EngineConfig {
            read_policy,
            watches_enabled: config.raft.watch.enabled,
            leases_enabled: config.raft.state_machine.lease_enabled,
            history_retention: Some(config.raft.state_machine.history_retention).filter(|time| !time.is_zero()),
            data_directories: vec![config.cluster.db_root_dir.clone()],
        };
        let engine = Engine::new(consensus, kv, engine_config, metrics.clone());

        let (stop, stopped) = watch::channel(false);
        if let Some(tls) = tls.clone() {
            let told_to_stop = asked(stopped.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = told_to_stop => {}
                    () = tls.keep_fresh() => {}
                }
            });
        }
        let told_to_stop = asked(stopped.clone());
        let serving = services::serve(listener, engine.clone(), peers, &config, tls, metrics.clone(), told_to_stop);
        let serving = tokio::spawn(serving);
        let monitoring = monitoring_listener
            .map(|listener| tokio::spawn(monitoring::serve(listener, engine.clone(), metrics, asked(stopped))));
        tracing::info!(
            node = config.cluster.node_id,
            address = listen_address,
            data = %config.cluster.db_root_dir.display(),
            tls = config.tls.is_on(),
            "node started"
        );
        Ok(Self { engine, stop, serving, monitoring })
    }

    /// The node's engine, for embedded use.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Runs until `shutdown` is ready, then stops gracefully; or until the node cannot go on.
    ///
    /// # Errors
    /// The reason why the node could not go on.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), NodeError> {
        let mut failure = self.engine.consensus().failure();
        let failed = async {
            match failure.wait_for(Option::is_some).await.ok().and_then(|failure| failure.clone()) {
                Some(failure) => failure,
                None => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            () = shutdown => Ok(()),
            failure = failed => Err(failure.into()),
            served = &mut self.serving => match served {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(error.into()),
                Err(_) => Err(NodeError::Panicked { what: "the gRPC server" }),
            },
        };
        self.stop().await;
        ended
    }

    /// Stops: hands leadership over, lets calls under way end, closes the data directories.
    pub async fn stop(self) {
        tracing::info!("stopping");
        // Consensus first: it still needs the peers, and callers are better told by it than by a closed port.
        self.engine.consensus().stop().await;
        self.stop.send_replace(true);
        if !self.serving.is_finished() {
            let _ = self.serving.await;
        }
        if let Some(monitoring) = self.monitoring {
            let _ = monitoring.await;
        }
        tracing::info!("stopped");
    }
}

async fn asked(mut stopped: watch::Receiver<bool>) {
    // A sender that is gone asks for the same.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NodeError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| NodeError::Panicked { what })
}

fn open(root: &Path) -> Result<(RocksDBStorageEngine, KvStateMachine), StorageError> {
    let create = |directory: PathBuf| match std::fs::create_dir_all(&directory) {
        Ok(()) => Ok(directory),
        Err(error) => Err(StorageError::Io { action: "create", path: directory, message: error.to_string() }),
    };
    let log = RocksDBStorageEngine::open(create(root.join(LOG_DIRECTORY))?)?;
    let state_machine = KvStateMachine::open(&root.join(STATE_DIRECTORY))?;
    Ok((log, state_machine))
}

fn consensus_config(config: &RaftNodeConfig) -> ConsensusConfig {
    let initial_cluster = config
        .cluster
        .initial_cluster
        .iter()
        .map(|member| v1::InitialMember {
            id: member.id,
            address: member.address.clone(),
            learner: member.role == MemberRole::Learner,
        })
        .collect();
    ConsensusConfig {
        node_id: NodeId(config.cluster.node_id),
        initial_cluster,
        client_address: config.cluster.advertise_address.clone().unwrap_or_default(),
        application_address: config.cluster.application_address.clone(),
        timings: config.raft.timings(),
        pending_bytes_max: config.raft.backpressure.max_pending_bytes,
        snapshot_directory: config.cluster.db_root_dir.join(SNAPSHOT_DIRECTORY),
        snapshot_policy: SnapshotPolicy {
            enabled: config.raft.snapshot.enabled,
            log_entries_max: config.raft.snapshot.log_entries_max,
            log_bytes_max: config.raft.snapshot.log_bytes_max,
            retained_log_entries: config.raft.snapshot.retained_log_entries,
        },
    }
}
