//! Why a call failed, and what a program needs to know about it.

use std::sync::Arc;

use d_engine_proto::{ErrorCode, NodeId, Revision, v1};

use crate::backup::BackupError;
use crate::consensus::ChangeError;
use crate::state_machine::kv::KvError;
use crate::storage::StorageError;
use crate::watch::WatchError;

/// Why a call failed. Each variant fixes the error code and what became of the call.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    /// The request breaks a rule of the data model, or asks for a revision that is not there.
    #[error(transparent)]
    Refused(#[from] KvError),
    /// The command was applied and refused by every replica alike.
    #[error("{message}")]
    Rejected {
        /// Why, as a code.
        code: ErrorCode,
        /// Why, in words.
        message: String,
        /// What became of it: a repetition is refused although the first one may have been applied.
        outcome: v1::Outcome,
        /// The revision that a refusal for its revision names.
        revision: Option<Revision>,
    },
    /// Leases are switched off on this node.
    #[error("this server makes no leases and no keys with a time to live (raft.state_machine.lease.enabled is false)")]
    LeasesDisabled,
    /// A compaction without a target.
    #[error("target is missing: name the oldest revision to keep, or an age")]
    NoTarget,
    /// A change of the membership that names nobody.
    #[error("change is missing: name a member by its id, which is not 0, or the peer address of a node to add")]
    NoMemberNamed,
    /// The state of the cluster forbids a change of the membership or of the leader.
    #[error("{reason}")]
    MembersForbid {
        /// What is missing.
        reason: String,
    },
    /// A change of the membership under way.
    #[error(transparent)]
    MemberChangeInterrupted(ChangeError),
    /// The encoded request is too large.
    #[error("the request has {bytes} bytes, the limit is {max} (request_bytes_max)")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        max: u64,
    },
    /// The policy asked for is not the server's.
    #[error("this server serves {default:?} reads only (raft.read_consistency.allow_client_override is false)")]
    PolicyFixed {
        /// The policy it serves.
        default: v1::Consistency,
    },
    /// The operation needs the leader.
    #[error("node {node} is not the leader{}", hint.as_ref().map_or_else(String::new, |hint| format!("; node {} at {} is", hint.node_id, hint.client_address)))]
    NotLeader {
        /// The answering node.
        node: NodeId,
        /// The leader, if known.
        hint: Option<v1::LeaderHint>,
    },
    /// No leader, no quorum, or stopping.
    #[error("node {node} cannot serve this now: {reason}")]
    Unavailable {
        /// The answering node.
        node: NodeId,
        /// What is missing.
        reason: String,
    },
    /// A bound on waiting work is reached.
    #[error("{reason}")]
    Overloaded {
        /// Which bound.
        reason: String,
    },
    /// The deadline passed.
    #[error("the deadline passed while waiting for {waiting_for}")]
    DeadlineExceeded {
        /// What was not ready.
        waiting_for: &'static str,
        /// Whether the call may still take effect.
        outcome: v1::Outcome,
    },
    /// The node has not applied the revision asked for.
    #[error("node {node} has applied revision {applied}, the request asks for at least {minimum}")]
    Behind {
        /// The answering node.
        node: NodeId,
        /// Where it is.
        applied: Revision,
        /// Where it should be.
        minimum: Revision,
    },
    /// Leadership was lost with the write under way.
    #[error("leadership was lost after the write was accepted; a successor may still commit it")]
    LeadershipLost,
    /// The node stopped with the write under way.
    #[error("the node stopped after it had accepted the write")]
    Stopped,
    /// A backup cannot be made.
    #[error("{0}")]
    Backup(Arc<BackupError>),
    /// The disk failed.
    #[error("{0}")]
    Storage(Arc<StorageError>),
    /// A watch that cannot begin or go on.
    #[error("{0}")]
    Watch(WatchError),
}

impl EngineError {
    /// The code, the outcome and the rest that a program needs.
    #[must_use]
    pub fn detail(&self) -> v1::ErrorDetail {
        use v1::Outcome::{NotApplied, Unknown};
        let (code, outcome) = match self {
            Self::Refused(refused) => (refused.code(), NotApplied),
            Self::Rejected { code, outcome, .. } => (*code, *outcome),
            Self::NoTarget | Self::NoMemberNamed => (ErrorCode::InvalidArgument, NotApplied),
            Self::TooLarge { .. } => (ErrorCode::ResourceExhausted, NotApplied),
            Self::PolicyFixed { .. } | Self::LeasesDisabled | Self::MembersForbid { .. } => {
                (ErrorCode::FailedPrecondition, NotApplied)
            }
            Self::NotLeader { .. } => (ErrorCode::NotLeader, NotApplied),
            Self::Unavailable { .. } => (ErrorCode::Unavailable, NotApplied),
            Self::Overloaded { .. } => (ErrorCode::ResourceExhausted, NotApplied),
            Self::DeadlineExceeded { outcome, .. } => (ErrorCode::DeadlineExceeded, *outcome),
            Self::Behind { .. } => (ErrorCode::Behind, NotApplied),
            Self::LeadershipLost | Self::MemberChangeInterrupted(_) => (ErrorCode::LeadershipLost, Unknown),
            Self::Stopped => (ErrorCode::Unavailable, Unknown),
            Self::Storage(_) | Self::Backup(_) => (ErrorCode::Internal, NotApplied),
            Self::Watch(error) => (error.code(), NotApplied),
        };
        v1::ErrorDetail {
            code: code.number(),
            outcome: outcome as i32,
            retry_safe: outcome == NotApplied && code.retry() != d_engine_proto::RetryWhere::Never,
            backoff_ms: match self {
                Self::Overloaded { .. } | Self::Rejected { code: ErrorCode::ResourceExhausted, .. } => 50,
                Self::Unavailable { .. } => 100,
                _ => 0,
            },
            leader: match self {
                Self::NotLeader { hint, .. } => hint.clone(),
                _ => None,
            },
            revision: match self {
                Self::Refused(refused) => refused.revision().map_or(0, Revision::get),
                Self::Rejected { revision, .. } => revision.map_or(0, Revision::get),
                Self::Behind { applied, .. } => applied.get(),
                _ => 0,
            },
        }
    }
}
