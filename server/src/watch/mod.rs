//! Watches: every change of a key or an interval, from any revision that is not compacted, in the order of revisions,
//! none lost and none twice, and only once it can be read on this node.
//!
//! ```text
//! KvStateMachine ──changes──▶ Hub ──delivery──▶ window of a Group ◀──cursor── Watch ──▶ its consumer
//!        │                    (one task)        (equal watches)               (as fast as the consumer)
//!        └── memory, then the history on disk ◀── a cursor the window does not reach ──┘
//! ```
//!
//! Consumers pull. The hub matches a log entry once for each group of equal watches and keeps the result for a while,
//! bounded in bytes for all groups together; a delivery is encoded when the first consumer takes it. A watch is a cursor
//! and keeps nothing else, so a slow one costs nobody anything: it reads the state machine's memory or the history
//! until its cursor is within its group's window again, or learns that what it needs was compacted.
//!
//! Knows nothing of gRPC, and never makes the state machine wait.

mod catch_up;
mod delivery;
mod group;
mod hub;
mod index;
mod interest;
mod stream;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use d_engine_proto::{ErrorCode, v1};

pub use catch_up::Lane;
pub use delivery::Delivery;
pub use hub::{Hub, HubSettings};
pub use stream::{Update, Watch};

use crate::engine::{Engine, EngineError};
use crate::state_machine::kv::KvError;
use crate::storage::StorageError;

/// Why a watch does not begin, or ends.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WatchError {
    /// The range makes no sense, or a revision that is needed is compacted.
    #[error(transparent)]
    Refused(#[from] KvError),
    /// Neither puts nor deletions are asked for.
    #[error("no_puts and no_deletes exclude each other: nothing would be left to watch")]
    NothingLeft,
    /// A bound on watches is reached.
    #[error("there are {max} watches already ({limit}): end some, or watch a prefix instead of many keys")]
    TooMany {
        /// The bound.
        max: usize,
        /// Its name.
        limit: &'static str,
    },
    /// The operator switched watches off.
    #[error("this server serves no watches (raft.watch.enabled is false)")]
    Disabled,
    /// The node is stopping.
    #[error("the node is stopping: watch on another one")]
    Stopping,
    /// The history cannot be read.
    #[error("{0}")]
    Storage(Arc<StorageError>),
}

impl From<StorageError> for WatchError {
    fn from(error: StorageError) -> Self {
        Self::Storage(Arc::new(error))
    }
}

impl From<WatchError> for EngineError {
    fn from(error: WatchError) -> Self {
        match error {
            WatchError::Refused(refused) => Self::Refused(refused),
            WatchError::Storage(error) => Self::Storage(error),
            error => Self::Watch(error),
        }
    }
}

impl WatchError {
    /// The code that callers act on.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Refused(refused) => refused.code(),
            Self::NothingLeft => ErrorCode::InvalidArgument,
            Self::TooMany { .. } => ErrorCode::ResourceExhausted,
            Self::Disabled => ErrorCode::FailedPrecondition,
            Self::Stopping => ErrorCode::Unavailable,
            Self::Storage(_) => ErrorCode::Internal,
        }
    }
}

impl Engine {
    /// Watches keys. Served by any member, as far as it has applied the log.
    ///
    /// # Errors
    /// [`EngineError::Refused`], [`EngineError::Watch`], or [`EngineError::Unavailable`] before the cluster is formed.
    pub fn watch(&self, create: &v1::WatchCreate) -> Result<Watch, EngineError> {
        self.watch_in(create, &Lane::default())
    }

    /// As [`watch`](Self::watch), for a consumer of many watches, which share its lane.
    ///
    /// # Errors
    /// As [`watch`](Self::watch).
    pub fn watch_in(&self, create: &v1::WatchCreate, lane: &Lane) -> Result<Watch, EngineError> {
        let hub = self.watches().ok_or(WatchError::Disabled)?;
        if self.consensus().cluster_id().is_none() {
            return Err(self.unavailable("the cluster is not formed yet: waiting for its initial members"));
        }
        Ok(hub.watch(create, lane)?)
    }
}
