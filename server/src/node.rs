//! One node, put together: ports, storage, consensus, services; started, run and stopped as a whole.

mod builder;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use d_engine_proto::{NodeId, v1};
use futures_util::future::{BoxFuture, FutureExt};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::backup::{BackupError, refuse_unfinished};
use crate::config::{DEFAULT_LISTEN_ADDRESS, LogEngine, MemberRole, MemberStatus, RaftNodeConfig};
use crate::consensus::{Consensus, ConsensusConfig, SnapshotPolicy, StartError};
use crate::engine::{CustomEngine, Engine, EngineConfig, ReadPolicy, refuse_if_marked};
use crate::limits::ABANDON_TIMEOUT;
use crate::metrics::Metrics;
use crate::monitoring;
use crate::services::{self, ServeError};
use crate::state_machine::StateMachine;
use crate::state_machine::kv::KvStateMachine;
use crate::storage::{RocksDBStorageEngine, SegmentStorageEngine, StorageEngine, StorageError};
use crate::tls::{Tls, TlsError};

pub use builder::{NodeBuilder, StateMachineHandle, StorageHandle};

/// Name of the log's directory below `cluster.db_root_dir`.
pub(crate) const LOG_DIRECTORY: &str = "log";
/// Name of the state machine's directory below `cluster.db_root_dir`.
pub(crate) const STATE_DIRECTORY: &str = "state";
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
    /// The data directory is that of a restore which did not come to its end.
    #[error(transparent)]
    Backup(#[from] BackupError),
    /// A task of the node panicked: a bug.
    #[error("{what} panicked: report it, with the log")]
    Panicked {
        /// Which task.
        what: &'static str,
    },
}

/// The way to a node's state machine.
#[derive(Clone)]
pub(crate) enum Door {
    /// The key-value store.
    Kv(Engine),
    /// An application's own.
    Custom(CustomEngine),
}

impl Door {
    pub(crate) fn consensus(&self) -> &Consensus {
        match self {
            Self::Kv(engine) => engine.consensus(),
            Self::Custom(engine) => engine.consensus(),
        }
    }

    pub(crate) fn problem(&self) -> Option<String> {
        match self {
            Self::Kv(engine) => engine.problem(),
            Self::Custom(engine) => engine.problem(),
        }
    }
}

/// What a node is made of besides its configuration.
#[derive(Default)]
struct Parts {
    /// `None`: RocksDB below `cluster.db_root_dir`.
    storage: Option<StorageHandle>,
    /// `None`: the key-value store below `cluster.db_root_dir`.
    state_machine: Option<StateMachineHandle>,
}

/// The state machine of a node that starts.
enum Machine {
    Kv(Arc<KvStateMachine>),
    Custom(Arc<dyn StateMachine>),
}

/// How long the end of a node waits until nobody holds its storage any more.
const RELEASE_MAX: Duration = Duration::from_secs(2);

/// A running node. Dropping it without [`stop`](Self::stop) leaves its tasks running until the runtime ends.
pub struct Node {
    door: Door,
    stop: watch::Sender<bool>,
    /// `None`: the node has no port.
    serving: Option<JoinHandle<Result<(), ServeError>>>,
    monitoring: Option<JoinHandle<Result<(), ServeError>>>,
    /// What the program that built it tells it to stop by.
    told_to_stop: BoxFuture<'static, ()>,
    held: Held,
}

impl Node {
    /// Starts a node by a configuration that was validated. Ports are taken first, so that a second start of the
    /// same node fails before it touches the data.
    ///
    /// # Errors
    /// When a port or a directory cannot be used, or the directory is another node's.
    pub async fn start(config: RaftNodeConfig) -> Result<Self, NodeError> {
        NodeBuilder::new(config).start().await
    }

    /// As [`start`](Self::start); with a port only if it `serves`.
    async fn assemble(config: RaftNodeConfig, parts: Parts, serves: bool) -> Result<Self, NodeError> {
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
        let listen_address = config.cluster.listen_address.as_deref().unwrap_or(DEFAULT_LISTEN_ADDRESS);
        let listener = match serves {
            true => Some(services::bind(listen_address).await?),
            false => None,
        };
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
        refuse_if_marked(&root)?;
        refuse_unfinished(&root)?;
        let (own_log, own_state) = (parts.storage.is_none(), parts.state_machine.is_none());
        let engine = config.raft.persistence.engine;
        let (storage, machine) = blocking("opening the data directories", move || open(&root, engine, parts)).await??;
        let state_machine: Arc<dyn StateMachine> = match &machine {
            Machine::Kv(kv) => kv.clone(),
            Machine::Custom(custom) => custom.clone(),
        };
        let held = Held {
            storage: own_log.then(|| Arc::downgrade(&storage)),
            state_machine: own_state.then(|| Arc::downgrade(&state_machine)),
        };
        let consensus_config = consensus_config(&config, serves);
        let (consensus, peers) =
            Consensus::start(consensus_config, storage, state_machine, metrics.clone(), tls.clone()).await?;
        let read_policy = ReadPolicy {
            default: config.raft.read_consistency.default_policy.into(),
            allow_client_override: config.raft.read_consistency.allow_client_override,
        };
        let engine_config = EngineConfig {
            read_policy,
            watches_enabled: config.raft.watch.enabled,
            leases_enabled: config.raft.state_machine.lease_enabled,
            history_retention: Some(config.raft.state_machine.history_retention).filter(|time| !time.is_zero()),
            check_interval: Some(config.raft.state_machine.check_interval).filter(|time| !time.is_zero()),
            data_directories: vec![config.cluster.db_root_dir.clone()],
        };
        let door = match machine {
            Machine::Kv(kv) => Door::Kv(Engine::new(consensus, kv, engine_config, metrics.clone())),
            Machine::Custom(custom) => Door::Custom(CustomEngine::new(consensus, custom, read_policy)),
        };

        let poison = door.consensus().poison().clone();
        let (stop, stopped) = watch::channel(false);
        if let Some(tls) = tls.clone() {
            let told_to_stop = asked(stopped.clone());
            tokio::spawn(poison.guard("the watch over certificates", async move {
                tokio::select! {
                    () = told_to_stop => {}
                    () = tls.keep_fresh() => {}
                }
            }));
        }
        let serving = listener.map(|listener| {
            let (tls, metrics, told_to_stop) = (tls.clone(), metrics.clone(), asked(stopped.clone()));
            match &door {
                Door::Kv(engine) => {
                    tokio::spawn(services::serve(listener, engine.clone(), peers, &config, tls, metrics, told_to_stop))
                }
                Door::Custom(_) => {
                    tokio::spawn(services::serve_peers(listener, peers, &config, tls, metrics, told_to_stop))
                }
            }
        });
        let monitoring = monitoring_listener.map(|listener| {
            let serving = match &door {
                Door::Kv(engine) => monitoring::serve(listener, engine.clone(), metrics, asked(stopped)).boxed(),
                Door::Custom(engine) => {
                    monitoring::serve_custom(listener, engine.clone(), metrics, asked(stopped)).boxed()
                }
            };
            tokio::spawn(poison.guard("the monitoring port", serving))
        });
        tracing::info!(
            node = config.cluster.node_id,
            address = if serves { listen_address } else { "none" },
            data = %config.cluster.db_root_dir.display(),
            tls = config.tls.is_on(),
            "node started"
        );
        let told_to_stop = Box::pin(std::future::pending());
        Ok(Self { door, stop, serving, monitoring, told_to_stop, held })
    }

    /// The engine over the key-value store; `None` when the state machine is the application's own.
    #[must_use]
    pub fn engine(&self) -> Option<&Engine> {
        match &self.door {
            Door::Kv(engine) => Some(engine),
            Door::Custom(_) => None,
        }
    }

    pub(crate) fn door(&self) -> &Door {
        &self.door
    }

    /// Runs until the signal that [`NodeBuilder::init`] was given, then stops gracefully; or until the node cannot go
    /// on. Without a signal it runs for good.
    ///
    /// # Errors
    /// The reason why the node could not go on.
    pub async fn run(mut self) -> Result<(), NodeError> {
        let told_to_stop = std::mem::replace(&mut self.told_to_stop, Box::pin(std::future::pending()));
        self.run_until(told_to_stop).await
    }

    /// Runs until `shutdown` is ready, then stops gracefully; or until the node cannot go on.
    ///
    /// # Errors
    /// The reason why the node could not go on.
    pub async fn run_until(mut self, shutdown: impl Future<Output = ()>) -> Result<(), NodeError> {
        let mut failure = self.door.consensus().failure();
        let failed = async {
            match failure.wait_for(Option::is_some).await.ok().and_then(|failure| failure.clone()) {
                Some(failure) => failure,
                None => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            // Whoever stops a node that has failed is told so.
            biased;
            failure = failed => Err(failure.into()),
            served = served(&mut self.serving) => match served {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(error.into()),
                Err(_) => Err(NodeError::Panicked { what: "the gRPC server" }),
            },
            () = shutdown => Ok(()),
        };
        match &ended {
            Ok(()) => self.stop().await,
            Err(_) => self.abandon().await,
        }
        ended
    }

    /// Ends a node that must not go on: nothing is answered any more, and then it stops as far as it still can.
    async fn abandon(self) {
        if let Some(serving) = &self.serving {
            serving.abort();
        }
        if tokio::time::timeout(ABANDON_TIMEOUT, self.stop()).await.is_err() {
            tracing::warn!("parts of the node do not end by themselves");
        }
    }

    /// Stops: hands leadership over, lets calls under way end, closes the data directories.
    pub async fn stop(self) {
        tracing::info!("stopping");
        // Consensus first: it still needs the peers, and callers are better told by it than by a closed port.
        self.door.consensus().stop().await;
        self.stop.send_replace(true);
        if let Some(serving) = self.serving.filter(|serving| !serving.is_finished()) {
            let _ = serving.await;
        }
        if let Some(monitoring) = self.monitoring {
            let _ = monitoring.await;
        }
        drop(self.door);
        self.held.released().await;
        tracing::info!("stopped");
    }
}

/// What keeps the data directories open that the node opened itself. Tasks that were told to end let go of it a little
/// later.
struct Held {
    storage: Option<Weak<dyn StorageEngine>>,
    state_machine: Option<Weak<dyn StateMachine>>,
}

impl Held {
    fn is_any(&self) -> bool {
        self.storage.as_ref().is_some_and(|storage| storage.strong_count() > 0)
            || self.state_machine.as_ref().is_some_and(|state_machine| state_machine.strong_count() > 0)
    }

    /// Waits until the directories can be opened again, or [`RELEASE_MAX`] is over: who watches or reads may hold on.
    async fn released(&self) {
        let mut pace = tokio::time::interval(Duration::from_millis(1));
        let gone = async {
            while self.is_any() {
                pace.tick().await;
            }
        };
        if tokio::time::timeout(RELEASE_MAX, gone).await.is_err() {
            tracing::warn!("the data directories stay open: something of this process still reads or watches");
        }
    }
}

/// Ready when the port is served no more; never without one.
async fn served(
    serving: &mut Option<JoinHandle<Result<(), ServeError>>>,
) -> Result<Result<(), ServeError>, tokio::task::JoinError> {
    match serving {
        Some(serving) => serving.await,
        None => std::future::pending().await,
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

fn open(root: &Path, engine: LogEngine, parts: Parts) -> Result<(Arc<dyn StorageEngine>, Machine), StorageError> {
    let create = |directory: PathBuf| match std::fs::create_dir_all(&directory) {
        Ok(()) => Ok(directory),
        Err(error) => Err(StorageError::Io { action: "create", path: directory, message: error.to_string() }),
    };
    let log: Arc<dyn StorageEngine> = match parts.storage {
        Some(storage) => storage.0,
        None => {
            let directory = create(root.join(LOG_DIRECTORY))?;
            open_log(engine, &directory)?
        }
    };
    let machine = match parts.state_machine {
        Some(state_machine) => state_machine.0,
        None => Machine::Kv(Arc::new(KvStateMachine::open(&root.join(STATE_DIRECTORY))?)),
    };
    Ok((log, machine))
}

/// Opens the log in `directory` as the files of `engine`, making it if there is none.
pub(crate) fn open_log(engine: LogEngine, directory: &Path) -> Result<Arc<dyn StorageEngine>, StorageError> {
    Ok(match engine {
        LogEngine::RocksDb => Arc::new(RocksDBStorageEngine::open(directory)?),
        LogEngine::Segments => Arc::new(SegmentStorageEngine::open(directory)?),
    })
}

fn consensus_config(config: &RaftNodeConfig, serves: bool) -> ConsensusConfig {
    let initial_cluster = config
        .cluster
        .initial_cluster
        .iter()
        .map(|member| v1::InitialMember {
            id: member.id,
            address: member.address.clone(),
            learner: member.role == MemberRole::Learner,
            joining: member.status == MemberStatus::Joining,
        })
        .collect();
    ConsensusConfig {
        node_id: NodeId(config.cluster.node_id),
        initial_cluster,
        // Nobody is told of a port that is not there.
        client_address: config.cluster.advertise_address.clone().filter(|_| serves).unwrap_or_default(),
        application_address: config.cluster.application_address.clone(),
        timings: config.raft.timings(),
        persistence: config.raft.persistence.promise(),
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
