//! Why the engine does not start, and why a call of its client failed.

use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::{ErrorCode, NodeId, v1};

use crate::config::ConfigError;
use crate::consensus::{Consensus, Poison};
use crate::engine::EngineError;
use crate::node::{Door, NodeError};

/// Why an embedded engine does not start, is not ready, or ended by itself.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// The configuration is refused.
    #[error("{0}")]
    Config(#[source] Arc<ConfigError>),
    /// The node cannot start, or could not go on.
    #[error("{0}")]
    Node(#[source] Arc<NodeError>),
    /// There was no leader within the time given.
    #[error("not ready within {waited:?}: {problem}; wait longer, or check that a majority of the members runs")]
    NotReady {
        /// How long was waited.
        waited: Duration,
        /// What is missing.
        problem: String,
    },
    /// The engine was stopped.
    #[error("the engine is stopped; start another one")]
    Stopped,
}

impl From<ConfigError> for EmbeddedError {
    fn from(error: ConfigError) -> Self {
        Self::Config(Arc::new(error))
    }
}

impl From<NodeError> for EmbeddedError {
    fn from(error: NodeError) -> Self {
        Self::Node(Arc::new(error))
    }
}

/// Why a call of an [`EmbeddedClient`](super::EmbeddedClient) failed. What became of it is
/// [`outcome`](Self::outcome).
#[derive(Clone, Debug, thiserror::Error)]
pub enum LocalClientError {
    /// This node does not lead; the call was not applied. What is known of the leader is here: ask there, or wait for
    /// the next one.
    #[error(
        "this node is not the leader{}", leader_id.map_or_else(
            || "; no leader is known: try again soon".to_owned(),
            |id| format!("; node {id} at {} is: ask there", leader_address.as_deref().unwrap_or("an unknown address")),
        )
    )]
    NotLeader {
        /// The leader, while one is known.
        leader_id: Option<u32>,
        /// Where peers reach it, host:port, as in `cluster.initial_cluster`.
        leader_address: Option<String>,
        /// Where its application is reached, its `cluster.application_address`, if it has one.
        application_address: Option<String>,
        /// Its term.
        term: Option<u64>,
    },
    /// The engine cannot serve this now; the call was not applied. Wait for
    /// [`wait_ready`](super::EmbeddedEngine::wait_ready), or try again.
    #[error("not ready: {problem}; try again soon")]
    NotReady {
        /// What is missing.
        problem: String,
    },
    /// The engine was stopped, or every handle on it dropped; the call was not applied.
    #[error("the engine is stopped; start another one")]
    Stopped,
    /// The node met a fault that it cannot go on with, such as a failing disk; the call was not applied.
    /// [`stop`](super::EmbeddedEngine::stop) gives the fault.
    #[error("the engine cannot go on: {reason}")]
    Failed {
        /// The fault, and what to do about it.
        reason: String,
    },
    /// The engine's state machine has no such operation; the call was not applied.
    #[error("{operation} is not supported: {remedy}")]
    Unsupported {
        /// What was asked for.
        operation: &'static str,
        /// What to ask for instead.
        remedy: &'static str,
    },
    /// Everything else, as every way into the engine has it.
    #[error("{0}")]
    Engine(#[source] EngineError),
}

impl LocalClientError {
    /// Whether the call needs the leader, and this node is not.
    #[must_use]
    pub fn is_not_leader(&self) -> bool {
        matches!(self, Self::NotLeader { .. })
    }

    /// Where peers reach the leader, host:port, if the call failed for not being asked there and one is known.
    #[must_use]
    pub fn leader_address(&self) -> Option<&str> {
        match self {
            Self::NotLeader { leader_address, .. } => leader_address.as_deref(),
            _ => None,
        }
    }

    /// The leader's id, as [`leader_address`](Self::leader_address).
    #[must_use]
    pub fn leader_id(&self) -> Option<u32> {
        match self {
            Self::NotLeader { leader_id, .. } => *leader_id,
            _ => None,
        }
    }

    /// Where the leader's application is reached, as [`leader_address`](Self::leader_address).
    #[must_use]
    pub fn application_address(&self) -> Option<&str> {
        match self {
            Self::NotLeader { application_address, .. } => application_address.as_deref(),
            _ => None,
        }
    }

    /// The code that is the same in every language.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::NotLeader { .. } => ErrorCode::NotLeader,
            Self::NotReady { .. } | Self::Stopped | Self::Failed { .. } => ErrorCode::Unavailable,
            Self::Unsupported { .. } => ErrorCode::Unsupported,
            Self::Engine(error) => ErrorCode::from_number(error.detail().code).unwrap_or(ErrorCode::Internal),
        }
    }

    /// What became of the call: only what was not applied is repeated without further thought.
    #[must_use]
    pub fn outcome(&self) -> v1::Outcome {
        match self {
            Self::Engine(error) => error.detail().outcome(),
            _ => v1::Outcome::NotApplied,
        }
    }

    /// What an error means to a client of this node.
    pub(super) fn explain(error: EngineError, door: &Door) -> Self {
        let formed = door.consensus().cluster_id().is_some();
        match error {
            EngineError::NotLeader { .. } | EngineError::Unavailable { .. }
                if door.consensus().poison().has_failed() =>
            {
                Self::failed(door.consensus().poison())
            }
            EngineError::NotLeader { .. } if !formed => Self::not_ready(door),
            EngineError::NotLeader { hint, .. } => Self::not_leader(hint, door.consensus()),
            EngineError::Unavailable { reason, .. } => Self::NotReady { problem: reason },
            error => Self::Engine(error),
        }
    }

    /// What a node says that has failed.
    pub(super) fn failed(poison: &Poison) -> Self {
        let reason = poison.failure().borrow().as_ref().map_or_else(String::new, ToString::to_string);
        Self::Failed { reason }
    }

    fn not_ready(door: &Door) -> Self {
        Self::NotReady { problem: door.problem().unwrap_or_else(|| "the node has just become ready".to_owned()) }
    }

    fn not_leader(hint: Option<v1::LeaderHint>, consensus: &Consensus) -> Self {
        let Some(hint) = hint else {
            return Self::NotLeader { leader_id: None, leader_address: None, application_address: None, term: None };
        };
        let membership = consensus.membership();
        Self::NotLeader {
            leader_id: Some(hint.node_id),
            leader_address: membership.get(NodeId(hint.node_id)).map(|member| member.peer_address.clone()),
            application_address: Some(hint.application_address).filter(|address| !address.is_empty()),
            term: Some(hint.term),
        }
    }
}
