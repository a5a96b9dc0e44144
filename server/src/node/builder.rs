//! A node of parts of one's own: storage, state machine, and the signal it stops by.

use std::any::Any;
use std::sync::Arc;

use tokio::sync::watch;

use super::{Machine, Node, NodeError, Parts};
use crate::config::RaftNodeConfig;
use crate::state_machine::StateMachine;
use crate::state_machine::kv::KvStateMachine;
use crate::storage::StorageEngine;

/// A storage engine to run a node on: any [`StorageEngine`], or an [`Arc`] of one.
pub struct StorageHandle(pub(super) Arc<dyn StorageEngine>);

impl<T: StorageEngine> From<T> for StorageHandle {
    fn from(storage: T) -> Self {
        Self(Arc::new(storage))
    }
}

impl<T: StorageEngine> From<Arc<T>> for StorageHandle {
    fn from(storage: Arc<T>) -> Self {
        Self(storage)
    }
}

/// A state machine to run a node with: any [`StateMachine`], or an [`Arc`] of one. With the key-value store the node
/// does everything; with another one it replicates, and answers `propose` and `query`.
pub struct StateMachineHandle(pub(super) Machine);

impl<T: StateMachine> From<T> for StateMachineHandle {
    fn from(state_machine: T) -> Self {
        Arc::new(state_machine).into()
    }
}

impl<T: StateMachine> From<Arc<T>> for StateMachineHandle {
    fn from(state_machine: Arc<T>) -> Self {
        let any: Arc<dyn Any + Send + Sync> = state_machine.clone();
        Self(match any.downcast::<KvStateMachine>() {
            Ok(kv) => Machine::Kv(kv),
            Err(_) => Machine::Custom(state_machine),
        })
    }
}

/// Puts a node together that serves its port: for a server, or a program that runs one beside what else it does.
///
/// ```
/// use d_engine_server::config::RaftNodeConfig;
/// use d_engine_server::node::NodeBuilder;
/// use d_engine_server::state_machine::kv::KvStateMachine;
/// use d_engine_server::storage::RocksDBStorageEngine;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = std::env::temp_dir().join(format!("d-engine-builder-{}", std::process::id()));
/// # let mut config = RaftNodeConfig::dev(&directory);
/// # config.cluster.listen_address = Some("127.0.0.1:9871".into());
/// # /*
/// let config = RaftNodeConfig::new()?.with_override_config("config/n1")?;
/// # */
/// let config = config.validate()?;
/// let (stop, stopped) = tokio::sync::watch::channel(());
/// let node = NodeBuilder::init(config, stopped)
///     .storage_engine(RocksDBStorageEngine::new(directory.join("log"))?)
///     .state_machine(KvStateMachine::new(directory.join("state"))?)
///     .start()
///     .await?;
/// # stop.send(())?;
/// node.run().await?;
/// # std::fs::remove_dir_all(directory)?;
/// # Ok(()) }
/// ```
pub struct NodeBuilder {
    config: RaftNodeConfig,
    parts: Parts,
    told_to_stop: Option<futures_util::future::BoxFuture<'static, ()>>,
}

impl NodeBuilder {
    /// A node by a configuration that was validated. Unless told otherwise it stores the key-value store and the log in
    /// RocksDB, below `cluster.db_root_dir`.
    #[must_use]
    pub fn new(config: RaftNodeConfig) -> Self {
        Self { config, parts: Parts::default(), told_to_stop: None }
    }

    /// As [`new`](Self::new), with the signal for [`Node::run`]: the node stops when something is sent, or when the
    /// sender is dropped.
    #[must_use]
    pub fn init<T: Send + Sync + 'static>(config: RaftNodeConfig, mut shutdown: watch::Receiver<T>) -> Self {
        let told_to_stop = async move {
            // A sender that is gone asks for the same.
            let _ = shutdown.changed().await;
        };
        Self { told_to_stop: Some(Box::pin(told_to_stop)), ..Self::new(config) }
    }

    /// Keeps log, vote and identity there.
    #[must_use]
    pub fn storage_engine(mut self, storage: impl Into<StorageHandle>) -> Self {
        self.parts.storage = Some(storage.into());
        self
    }

    /// Applies what is committed to it.
    #[must_use]
    pub fn state_machine(mut self, state_machine: impl Into<StateMachineHandle>) -> Self {
        self.parts.state_machine = Some(state_machine.into());
        self
    }

    /// Starts the node: it serves its port and takes part in its cluster when this returns.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub async fn start(self) -> Result<Node, NodeError> {
        self.start_serving(true).await
    }

    /// As [`start`](Self::start); with a port only if it `serves`.
    pub(crate) async fn start_serving(self, serves: bool) -> Result<Node, NodeError> {
        let mut node = Node::assemble(self.config, self.parts, serves).await?;
        if let Some(told_to_stop) = self.told_to_stop {
            node.told_to_stop = told_to_stop;
        }
        Ok(node)
    }
}
