//! The door to a state machine of the application's own: opaque commands and queries, checked for their size only.
//!
//! What it promises is what [`Engine`](super::Engine) promises of writes and reads, apart from leases and sessions: an
//! application's state machine has those it makes itself. It knows nothing of what the bytes mean.

use std::sync::Arc;

use bytes::Bytes;
use d_engine_proto::v1;

use super::{Deadline, EngineError, ReadPolicy, check_size, late, refusal, writes};
use crate::consensus::{Consensus, Role};
use crate::state_machine::StateMachine;

/// A running node with an application's state machine. Clones share it.
#[derive(Clone)]
pub struct CustomEngine {
    consensus: Consensus,
    state_machine: Arc<dyn StateMachine>,
    read_policy: ReadPolicy,
}

impl CustomEngine {
    /// Joins a consensus node and its state machine.
    #[must_use]
    pub fn new(consensus: Consensus, state_machine: Arc<dyn StateMachine>, read_policy: ReadPolicy) -> Self {
        Self { consensus, state_machine, read_policy }
    }

    /// The consensus node below.
    #[must_use]
    pub fn consensus(&self) -> &Consensus {
        &self.consensus
    }

    /// Replicates a command and returns what the state machine answers once it is committed and applied here.
    ///
    /// # Errors
    /// See [`EngineError`]; its detail tells whether the command can have taken effect. Dropping the future does not
    /// withdraw the command.
    pub async fn propose(&self, command: Bytes, deadline: Deadline) -> Result<Bytes, EngineError> {
        check_size(command.len())?;
        match tokio::time::timeout_at(deadline, self.consensus.propose(command)).await {
            Ok(answer) => answer.map_err(|error| refusal::explain_propose(&self.consensus, error)),
            Err(_) => Err(writes::uncommitted()),
        }
    }

    /// Asks the state machine, once the policy allows to answer from this node. It is asked on the caller's thread.
    ///
    /// # Errors
    /// See [`EngineError`]; a query can always be repeated.
    pub async fn query(
        &self,
        query: Bytes,
        consistency: v1::Consistency,
        deadline: Deadline,
    ) -> Result<Bytes, EngineError> {
        let policy = self.read_policy.choose(consistency)?;
        let earned = async {
            match policy {
                v1::Consistency::Eventual => return Ok(()),
                v1::Consistency::Lease if self.consensus.confirm_read_by_lease().await?.is_some() => return Ok(()),
                _ => {}
            }
            self.consensus.confirm_read().await.map(drop)
        };
        if policy == v1::Consistency::Lease && self.consensus.role() != Role::Leader {
            return Err(refusal::not_leader(&self.consensus));
        }
        match tokio::time::timeout_at(deadline, earned).await {
            Ok(earned) => earned.map_err(|error| refusal::explain_read(&self.consensus, error))?,
            Err(_) => return Err(late("a quorum to confirm the leader")),
        }
        self.state_machine.query(query).map_err(|error| EngineError::Storage(Arc::new(error)))
    }

    /// Why this node does not serve; `None` if it does.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        refusal::problem(&self.consensus)
    }
}
