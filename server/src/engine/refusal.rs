//! What a node says that cannot do what only a leader can, whatever state machine it runs.

use d_engine_proto::{NodeId, limits, v1};

use super::EngineError;
use crate::consensus::{Consensus, LeaderInfo, ProposeError, ReadIndexError, Role};

pub(super) fn leader_hint(consensus: &Consensus) -> Option<v1::LeaderHint> {
    hint_of(consensus, consensus.leader()?)
}

pub(super) fn hint_of(consensus: &Consensus, leader: LeaderInfo) -> Option<v1::LeaderHint> {
    let membership = consensus.membership();
    let member = membership.get(NodeId(leader.leader_id))?;
    Some(v1::LeaderHint {
        node_id: leader.leader_id,
        client_address: member.client_address.clone(),
        application_address: member.application_address.clone(),
        term: leader.term,
    })
}

pub(super) fn not_leader(consensus: &Consensus) -> EngineError {
    let node = consensus.node_id();
    EngineError::NotLeader { node, hint: leader_hint(consensus).filter(|hint| hint.node_id != node.get()) }
}

/// For what only a leader does that has begun its reign.
pub(super) fn not_leading(consensus: &Consensus) -> EngineError {
    match consensus.role() {
        Role::Leader => unavailable(consensus, "its leadership is not confirmed by a quorum"),
        _ => not_leader(consensus),
    }
}

pub(super) fn unavailable(consensus: &Consensus, reason: impl Into<String>) -> EngineError {
    EngineError::Unavailable { node: consensus.node_id(), reason: reason.into() }
}

pub(super) fn explain_propose(consensus: &Consensus, error: ProposeError) -> EngineError {
    match error {
        ProposeError::NotLeader => not_leading(consensus),
        ProposeError::Overloaded { .. } => {
            EngineError::Overloaded { reason: format!("{error} (raft.backpressure.max_pending_bytes)") }
        }
        ProposeError::TooLarge { bytes } => EngineError::TooLarge { bytes, max: limits::REQUEST_BYTES_MAX },
        ProposeError::LeadershipLost => EngineError::LeadershipLost,
        ProposeError::Stopped => EngineError::Stopped,
    }
}

pub(super) fn explain_read(consensus: &Consensus, error: ReadIndexError) -> EngineError {
    match error {
        ReadIndexError::NoLeader => unavailable(consensus, error.to_string()),
        ReadIndexError::Unconfirmed { reason } => unavailable(consensus, reason),
        ReadIndexError::Overloaded { .. } => EngineError::Overloaded { reason: error.to_string() },
    }
}

/// Why a node does not serve; `None` if it does.
pub(super) fn problem(consensus: &Consensus) -> Option<String> {
    if let Some(failure) = &*consensus.failure().borrow() {
        return Some(failure.to_string());
    }
    if consensus.cluster_id().is_none() {
        return Some("the cluster is not formed yet: waiting for its initial members".to_owned());
    }
    consensus.leader().is_none().then(|| "no leader is known: waiting for a quorum".to_owned())
}
