//! The life of an embedded engine: started, ready, leading or not, stopped.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::{EmbeddedClient, EmbeddedError, LocalClientError};
use crate::config::RaftNodeConfig;
use crate::consensus::LeaderInfo;
use crate::node::{NodeBuilder, NodeError, StateMachineHandle, StorageHandle};

/// A node inside this process. Clones share it.
///
/// It belongs to the tokio runtime that it was started on. Call [`stop`](Self::stop) before the process ends: it hands
/// leadership over and makes everything durable, so that the next start has nothing to replay. When the last clone is
/// dropped without that, it says so in the log and stops in the background.
///
/// ```
/// use d_engine_server::embedded::EmbeddedEngine;
/// use std::time::Duration;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// # let file = directory.path().join("node.toml");
/// # std::fs::write(&file, format!("[cluster]\ndb_root_dir = {:?}", directory.path().join("db")))?;
/// # let engine = EmbeddedEngine::start_with(&file).await?;
/// # /*
/// let engine = EmbeddedEngine::start().await?;
/// # */
/// let leader = engine.wait_ready(Duration::from_secs(5)).await?;
/// assert!(engine.is_leader() && leader.leader_id == engine.node_id());
///
/// let client = engine.client();
/// client.put(b"greeting", b"hello").await?;
/// assert_eq!(client.get(b"greeting").await?.as_deref(), Some(&b"hello"[..]));
/// engine.stop().await?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct EmbeddedEngine {
    inner: Arc<Inner>,
}

struct Inner {
    node_id: u32,
    client: Arc<EmbeddedClient>,
    leader: watch::Receiver<Option<LeaderInfo>>,
    stop: watch::Sender<bool>,
    ended: watch::Receiver<Option<Ended>>,
}

/// How the node ended.
type Ended = Result<(), EmbeddedError>;

impl EmbeddedEngine {
    /// Starts a node by the file that the environment variable `CONFIG_PATH` names and the variables that begin with
    /// `D_ENGINE__`. With neither it is a node by itself: it keeps its data in `./db`, below the working directory,
    /// opens no port, and is ready within a few milliseconds.
    ///
    /// # Errors
    /// [`EmbeddedError::Config`] and [`EmbeddedError::Node`].
    pub async fn start() -> Result<Self, EmbeddedError> {
        Self::launch(RaftNodeConfig::new()?, None, None).await
    }

    /// As [`start`](Self::start), with the keys of a file on top of `CONFIG_PATH` and below the environment. The path
    /// may leave out `.toml`.
    ///
    /// A node serves gRPC, for its peers and for clients outside of this process, if the configuration has a
    /// `cluster.listen_address` or more than one member.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn start_with(path: impl AsRef<Path>) -> Result<Self, EmbeddedError> {
        Self::launch(RaftNodeConfig::new()?.with_override_config(path)?, None, None).await
    }

    /// Starts a node on storage and with a state machine of the application's choice; either may come in an [`Arc`].
    /// The configuration is that of [`start_with`](Self::start_with) with a path, and of [`start`](Self::start) without.
    ///
    /// With a state machine other than the key-value store, the client answers
    /// [`propose`](EmbeddedClient::propose) and [`query`](EmbeddedClient::query) and nothing else, and a port serves
    /// peers only.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn start_custom(
        storage: impl Into<StorageHandle>,
        state_machine: impl Into<StateMachineHandle>,
        path: Option<&str>,
    ) -> Result<Self, EmbeddedError> {
        let config = match path {
            Some(path) => RaftNodeConfig::new()?.with_override_config(path)?,
            None => RaftNodeConfig::new()?,
        };
        Self::launch(config, Some(storage.into()), Some(state_machine.into())).await
    }

    async fn launch(
        config: RaftNodeConfig,
        storage: Option<StorageHandle>,
        state_machine: Option<StateMachineHandle>,
    ) -> Result<Self, EmbeddedError> {
        // Before it is filled in what follows from others.
        let serves = config.cluster.listen_address.is_some() || config.cluster.initial_cluster.len() > 1;
        let config = config.validate()?;
        let (node_id, call_timeout) = (config.cluster.node_id, config.network.call_timeout);
        let mut builder = NodeBuilder::new(config);
        if let Some(storage) = storage {
            builder = builder.storage_engine(storage);
        }
        if let Some(state_machine) = state_machine {
            builder = builder.state_machine(state_machine);
        }
        let node = builder.start_serving(serves).await?;
        let leader = node.door().consensus().leader_changes();
        let client = Arc::new(EmbeddedClient::new(node.door().clone(), call_timeout));
        let (stop, mut told_to_stop) = watch::channel(false);
        let (ending, ended) = watch::channel(None);
        let served = client.clone();
        tokio::spawn(async move {
            let closing = async {
                // A sender that is gone asks for the same.
                let _ = told_to_stop.wait_for(|stop| *stop).await;
                served.close(LocalClientError::Stopped);
            };
            let result = node.run_until(closing).await;
            served.close(match &result {
                Ok(()) => LocalClientError::Stopped,
                Err(error) => {
                    tracing::error!(%error, "the embedded engine cannot go on");
                    LocalClientError::Failed { reason: error.to_string() }
                }
            });
            ending.send_replace(Some(result.map_err(EmbeddedError::from)));
        });
        Ok(Self { inner: Arc::new(Inner { node_id, client, leader, stop, ended }) })
    }

    /// Waits until the cluster has a leader and this node has applied what its reign began with: from then on it serves.
    ///
    /// # Errors
    /// [`EmbeddedError::NotReady`] when `timeout` has passed, [`EmbeddedError::Stopped`], or what the node ended with.
    pub async fn wait_ready(&self, timeout: Duration) -> Result<LeaderInfo, EmbeddedError> {
        let mut leader = self.inner.leader.clone();
        let mut ended = self.inner.ended.clone();
        let ready = async {
            tokio::select! {
                biased;
                // A task that is gone has ended.
                _ = ended.wait_for(Option::is_some) => {}
                found = leader.wait_for(Option::is_some) => if let Ok(found) = found {
                    return *found;
                },
            }
            None
        };
        match tokio::time::timeout(timeout, ready).await {
            Ok(Some(leader)) if !*self.inner.stop.borrow() && self.inner.client.failure().is_none() => Ok(leader),
            Ok(_) => Err(match (&*self.inner.ended.borrow(), self.inner.client.failure()) {
                (Some(Err(error)), _) => error.clone(),
                (None, Some(failure)) if !*self.inner.stop.borrow() => NodeError::from(failure).into(),
                _ => EmbeddedError::Stopped,
            }),
            Err(_) => {
                let problem = self.inner.client.door().ok().and_then(|door| door.problem());
                Err(EmbeddedError::NotReady { waited: timeout, problem: problem.unwrap_or_else(|| "it stops".into()) })
            }
        }
    }

    /// Follows who leads: the latest state is always delivered, every reign has a term of its own, and it is `None` no
    /// later than a leader's lease ends that has lost its quorum. [`is_leader`](Self::is_leader) looks at the clock
    /// itself and is never behind.
    #[must_use]
    pub fn leader_change_notifier(&self) -> watch::Receiver<Option<LeaderInfo>> {
        self.inner.leader.clone()
    }

    /// Whether this node leads, and its lease is valid at this very moment. Costs a look at the clock: a process that was
    /// paused never answers true on a lease that has ended meanwhile, and a node that cannot go on never does.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.inner.client.is_leader()
    }

    /// The leader, while one is known and trusted; `None` on an engine that has stopped.
    #[must_use]
    pub fn leader_info(&self) -> Option<LeaderInfo> {
        self.inner.client.door().ok()?.consensus().leader()
    }

    /// What asks this engine.
    #[must_use]
    pub fn client(&self) -> Arc<EmbeddedClient> {
        self.inner.client.clone()
    }

    /// This node's number.
    #[must_use]
    pub fn node_id(&self) -> u32 {
        self.inner.node_id
    }

    /// Stops the node: from here on its clients answer [`LocalClientError::Stopped`];
    /// leadership is handed over, everything is made durable, and the data directories are free again when this
    /// returns. Calling it again, on any clone, waits for the same end. Dropping the future does not take it back.
    ///
    /// # Errors
    /// What the node ended with, when that was not this.
    pub async fn stop(&self) -> Result<(), EmbeddedError> {
        self.inner.stop.send_replace(true);
        let mut ended = self.inner.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(ended) => ended.clone().unwrap_or(Ok(())),
            Err(_) => Err(EmbeddedError::Stopped),
        }
    }

    /// Whether the node has ended, by [`stop`](Self::stop) or by a fault.
    pub async fn is_stopped(&self) -> bool {
        self.inner.ended.borrow().is_some()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.ended.borrow().is_none() && !*self.stop.borrow() {
            tracing::warn!(
                node = self.node_id,
                "the embedded engine is dropped without stop(): it stops in the background, without a wait for it"
            );
            self.client.close(LocalClientError::Stopped);
            self.stop.send_replace(true);
        }
    }
}
