//! The one internal interface: gRPC services and embedded clients both come through this door.
//!
//! Requests are checked here, before anything is proposed or read, so that every way in has the same limits. Reads
//! first earn the right to answer from memory, by the policy asked for, and then never touch consensus:
//!
//! | policy | earned by |
//! | --- | --- |
//! | linearizable | one confirmation by a quorum, begun after the read arrived |
//! | lease | the leader's lease, checked against the clock at this moment, and having applied what any member may show; without a lease, as linearizable |
//! | eventual | nothing |

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use d_engine_proto::v1::{self, command::Command as Change, command_reply::Reply};
use d_engine_proto::{ErrorCode, NodeId, Revision, limits};
use prost::Message;

use crate::consensus::{Consensus, LeaderInfo, ProposeError, ReadIndexError, Role};
use crate::state_machine::kv::{self, KvError, KvStateMachine, PastStore, ReadError, ReadPoint, Store};
use crate::storage::{StorageError, disk_bytes};
use crate::watch::{Hub, WatchError};

/// When a call must have its answer.
pub type Deadline = tokio::time::Instant;

const HISTORY: &str = "the history to be read";

/// The version of this software.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// How reads are served when the request does not say, and whether it may say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadPolicy {
    /// The policy of a request without one.
    pub default: v1::Consistency,
    /// Whether a request may ask for another.
    pub allow_client_override: bool,
}

/// Why a call failed. Each variant fixes the error code and what became of the call.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    /// The request breaks a rule of the data model, or asks for a revision that is not there.
    #[error(transparent)]
    Refused(#[from] KvError),
    /// The command was applied and refused by every replica alike: nothing changed.
    #[error("{message}")]
    Rejected {
        /// Why, as a code.
        code: ErrorCode,
        /// Why, in words.
        message: String,
    },
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
            Self::Rejected { code, .. } => (*code, NotApplied),
            Self::TooLarge { .. } => (ErrorCode::ResourceExhausted, NotApplied),
            Self::PolicyFixed { .. } => (ErrorCode::FailedPrecondition, NotApplied),
            Self::NotLeader { .. } => (ErrorCode::NotLeader, NotApplied),
            Self::Unavailable { .. } => (ErrorCode::Unavailable, NotApplied),
            Self::Overloaded { .. } => (ErrorCode::ResourceExhausted, NotApplied),
            Self::DeadlineExceeded { outcome, .. } => (ErrorCode::DeadlineExceeded, *outcome),
            Self::Behind { .. } => (ErrorCode::Behind, NotApplied),
            Self::LeadershipLost => (ErrorCode::LeadershipLost, Unknown),
            Self::Stopped => (ErrorCode::Unavailable, Unknown),
            Self::Storage(_) => (ErrorCode::Internal, NotApplied),
            Self::Watch(error) => (error.code(), NotApplied),
        };
        v1::ErrorDetail {
            code: code.number(),
            outcome: outcome as i32,
            retry_safe: outcome == NotApplied && code.retry() != d_engine_proto::RetryWhere::Never,
            backoff_ms: match self {
                Self::Overloaded { .. } => 50,
                Self::Unavailable { .. } => 100,
                _ => 0,
            },
            leader: match self {
                Self::NotLeader { hint, .. } => hint.clone(),
                _ => None,
            },
            revision: match self {
                Self::Refused(refused) => refused.revision().map_or(0, Revision::get),
                Self::Behind { applied, .. } => applied.get(),
                _ => 0,
            },
        }
    }
}

/// A running node, as its services and embedded clients use it. Clones share it.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

struct Inner {
    consensus: Consensus,
    kv: Arc<KvStateMachine>,
    /// `None`: switched off.
    watches: Option<Hub>,
    read_policy: ReadPolicy,
    data_directories: Vec<std::path::PathBuf>,
    started: Instant,
}

impl Engine {
    /// Joins a consensus node, its state machine, and the watches of that unless they are switched off.
    #[must_use]
    pub fn new(
        consensus: Consensus,
        kv: Arc<KvStateMachine>,
        watches: Option<Hub>,
        read_policy: ReadPolicy,
        data_directories: Vec<std::path::PathBuf>,
    ) -> Self {
        let inner = Inner { consensus, kv, watches, read_policy, data_directories, started: Instant::now() };
        Self { inner: Arc::new(inner) }
    }

    /// Writes one key.
    ///
    /// # Errors
    /// See [`EngineError`]; its detail tells whether the write can have taken effect. So with every write.
    pub async fn put(&self, request: v1::PutRequest, deadline: Deadline) -> Result<v1::PutResponse, EngineError> {
        let (header, reply) = self.propose(Change::Put(request), deadline).await?;
        match reply {
            Reply::Put(response) => Ok(v1::PutResponse { header, ..response }),
            _ => Err(EngineError::Stopped),
        }
    }

    /// Deletes one key.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn delete(
        &self,
        request: v1::DeleteRequest,
        deadline: Deadline,
    ) -> Result<v1::DeleteResponse, EngineError> {
        let (header, reply) = self.propose(Change::Delete(request), deadline).await?;
        match reply {
            Reply::Delete(response) => Ok(v1::DeleteResponse { header, ..response }),
            _ => Err(EngineError::Stopped),
        }
    }

    /// Deletes an interval of keys.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn delete_range(
        &self,
        request: v1::DeleteRangeRequest,
        deadline: Deadline,
    ) -> Result<v1::DeleteRangeResponse, EngineError> {
        let (header, reply) = self.propose(Change::DeleteRange(request), deadline).await?;
        match reply {
            Reply::DeleteRange(response) => Ok(v1::DeleteRangeResponse { header, ..response }),
            _ => Err(EngineError::Stopped),
        }
    }

    /// Writes one key if it holds the expected value.
    ///
    /// # Errors
    /// As [`put`](Self::put). A value that differs is an answer, not an error.
    pub async fn compare_and_swap(
        &self,
        request: v1::CompareAndSwapRequest,
        deadline: Deadline,
    ) -> Result<v1::CompareAndSwapResponse, EngineError> {
        let (header, reply) = self.propose(Change::CompareAndSwap(request), deadline).await?;
        match reply {
            Reply::CompareAndSwap(response) => Ok(v1::CompareAndSwapResponse { header, ..response }),
            _ => Err(EngineError::Stopped),
        }
    }

    /// Applies a transaction; one that cannot write is served as a read.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn txn(&self, request: v1::TxnRequest, deadline: Deadline) -> Result<v1::TxnResponse, EngineError> {
        if kv::is_read_only(&request) {
            check_size(request.encoded_len())?;
            kv::validate_txn(&request)?;
            let (header, response) = self.read(request.read, deadline, request, Store::txn, PastStore::txn).await?;
            return Ok(v1::TxnResponse { header, ..response });
        }
        let (header, reply) = self.propose(Change::Txn(request), deadline).await?;
        match reply {
            Reply::Txn(response) => Ok(v1::TxnResponse { header, ..response }),
            _ => Err(EngineError::Stopped),
        }
    }

    /// Reads one key.
    ///
    /// # Errors
    /// See [`EngineError`]; a read can always be repeated.
    pub async fn get(&self, request: v1::GetRequest, deadline: Deadline) -> Result<v1::GetResponse, EngineError> {
        kv::validate_get(&request)?;
        let (header, response) = self.read(request.read, deadline, request, Store::get, PastStore::get).await?;
        Ok(v1::GetResponse { header, ..response })
    }

    /// Reads several keys at one revision.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn get_many(
        &self,
        request: v1::GetManyRequest,
        deadline: Deadline,
    ) -> Result<v1::GetManyResponse, EngineError> {
        check_size(request.encoded_len())?;
        kv::validate_get_many(&request)?;
        let (header, response) =
            self.read(request.read, deadline, request, Store::get_many, PastStore::get_many).await?;
        Ok(v1::GetManyResponse { header, ..response })
    }

    /// Reads an interval of keys at one revision.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn range(&self, request: v1::RangeRequest, deadline: Deadline) -> Result<v1::RangeResponse, EngineError> {
        kv::validate_range(&request)?;
        let (header, response) = self.read(request.read, deadline, request, Store::range, PastStore::range).await?;
        Ok(v1::RangeResponse { header, ..response })
    }

    /// The members and the leader, as this node knows them.
    #[must_use]
    pub fn members(&self) -> v1::MembersResponse {
        let membership = self.inner.consensus.membership();
        let members = membership
            .members
            .iter()
            .map(|(id, (member, votes))| v1::Member {
                id: id.get(),
                role: if *votes { v1::MemberRole::Voter } else { v1::MemberRole::Learner } as i32,
                peer_address: member.peer_address.clone(),
                client_address: member.client_address.clone(),
                application_address: member.application_address.clone(),
            })
            .collect();
        let revision = self.inner.kv.current().revision();
        v1::MembersResponse { header: self.header(revision), members, leader: self.leader_hint() }
    }

    /// How this node is doing. Reads the size of the data directories: not for a hot path.
    #[must_use]
    pub fn status(&self) -> v1::StatusResponse {
        let consensus = &self.inner.consensus;
        let progress = consensus.progress();
        let store = self.inner.kv.current();
        let problem = self.problem();
        v1::StatusResponse {
            header: self.header(store.revision()),
            role: match consensus.role() {
                Role::Learner => v1::NodeRole::Learner,
                Role::Follower => v1::NodeRole::Follower,
                Role::Candidate => v1::NodeRole::Candidate,
                Role::Leader => v1::NodeRole::Leader,
            } as i32,
            leader: self.leader_hint(),
            last_log_index: progress.last_log.get(),
            committed_index: progress.committed.get(),
            applied_index: progress.applied.get(),
            keys: store.key_count(),
            disk_bytes: self.inner.data_directories.iter().map(|directory| disk_bytes(directory)).sum(),
            version: VERSION.to_owned(),
            ready: problem.is_none(),
            problem: problem.unwrap_or_default(),
            uptime_ms: u64::try_from(self.inner.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// Why this node does not serve; `None` if it does.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        if let Some(failure) = &*self.inner.consensus.failure().borrow() {
            return Some(failure.to_string());
        }
        if self.inner.consensus.cluster_id().is_none() {
            return Some("the cluster is not formed yet: waiting for its initial members".to_owned());
        }
        self.inner.consensus.leader().is_none().then(|| "no leader is known: waiting for a quorum".to_owned())
    }

    /// The watches of this node, unless they are switched off.
    #[must_use]
    pub fn watches(&self) -> Option<&Hub> {
        self.inner.watches.as_ref()
    }

    /// The consensus node below.
    #[must_use]
    pub fn consensus(&self) -> &Consensus {
        &self.inner.consensus
    }

    /// Whether this node leads and its lease is valid at this very moment.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.inner.consensus.is_leader()
    }

    /// The leader, while one is known.
    #[must_use]
    pub fn leader(&self) -> Option<LeaderInfo> {
        self.inner.consensus.leader()
    }

    /// Current revision and number of keys.
    #[must_use]
    pub fn store_size(&self) -> (Revision, u64) {
        let store = self.inner.kv.current();
        (store.revision(), store.key_count())
    }

    async fn propose(
        &self,
        change: Change,
        deadline: Deadline,
    ) -> Result<(Option<v1::ResponseHeader>, Reply), EngineError> {
        let command = v1::Command::from(change);
        check_size(command.encoded_len())?;
        kv::validate(&command)?;
        if Deadline::now() >= deadline {
            return Err(late("its turn"));
        }
        let encoded = Bytes::from(command.encode_to_vec());
        let answer = match tokio::time::timeout_at(deadline, self.inner.consensus.propose(encoded)).await {
            Ok(answer) => answer.map_err(|error| self.explain_propose(error))?,
            Err(_) => {
                let outcome = v1::Outcome::Unknown;
                return Err(EngineError::DeadlineExceeded { waiting_for: "the write to be committed", outcome });
            }
        };
        let reply = v1::CommandReply::decode(answer).map_err(|_| EngineError::Stopped)?;
        let header = self.header(Revision(reply.revision));
        match reply.reply {
            Some(Reply::Error(error)) => {
                let code = i32::try_from(error.code).ok().and_then(ErrorCode::from_number);
                Err(EngineError::Rejected { code: code.unwrap_or(ErrorCode::Internal), message: error.message })
            }
            Some(reply) => Ok((header, reply)),
            None => Err(EngineError::Stopped),
        }
    }

    /// Earns the right to answer by the policy asked for, then reads; a past revision is read from the disk.
    async fn read<Request: Send + 'static, Response: Send + 'static>(
        &self,
        options: Option<v1::ReadOptions>,
        deadline: Deadline,
        request: Request,
        current: fn(&Store, &Request) -> Result<Response, KvError>,
        past: fn(&PastStore, &Request) -> Result<Response, ReadError>,
    ) -> Result<(Option<v1::ResponseHeader>, Response), EngineError> {
        let options = options.unwrap_or_default();
        self.earn(options.consistency(), deadline).await?;
        self.wait_for_revision(Revision(options.min_revision), deadline).await?;
        match self.inner.kv.at(Revision(options.revision))? {
            ReadPoint::Current(store) => Ok((self.header(store.revision()), current(&store, &request)?)),
            ReadPoint::Past(revision) => {
                let patience = deadline.saturating_duration_since(Deadline::now());
                let task = tokio::task::spawn_blocking(move || past(&revision.wait(patience)?, &request));
                let response = match tokio::time::timeout_at(deadline, task).await {
                    Ok(Ok(read)) => read.map_err(explain_past)?,
                    Ok(Err(_)) => return Err(self.unavailable("the read was aborted")),
                    Err(_) => return Err(late(HISTORY)),
                };
                Ok((self.header(Revision(options.revision)), response))
            }
        }
    }

    async fn earn(&self, asked: v1::Consistency, deadline: Deadline) -> Result<(), EngineError> {
        let ReadPolicy { default, allow_client_override } = self.inner.read_policy;
        let policy = match asked {
            v1::Consistency::Unspecified => default,
            asked if asked == default || allow_client_override => asked,
            _ => return Err(EngineError::PolicyFixed { default }),
        };
        let consensus = &self.inner.consensus;
        let earned = async {
            match policy {
                v1::Consistency::Eventual => Ok(()),
                v1::Consistency::Lease if consensus.confirm_read_by_lease().await? => Ok(()),
                _ => consensus.confirm_read().await,
            }
        };
        if policy == v1::Consistency::Lease && consensus.role() != Role::Leader {
            return Err(self.not_leader());
        }
        match tokio::time::timeout_at(deadline, earned).await {
            Ok(earned) => earned.map_err(|error| self.explain_read(error)),
            Err(_) => Err(late("a quorum to confirm the leader")),
        }
    }

    async fn wait_for_revision(&self, minimum: Revision, deadline: Deadline) -> Result<(), EngineError> {
        let mut revision = self.inner.kv.revisions();
        if *revision.borrow() >= minimum {
            return Ok(());
        }
        match tokio::time::timeout_at(deadline, revision.wait_for(|applied| *applied >= minimum)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(self.unavailable("it is stopping")),
            Err(_) => {
                let applied = *self.inner.kv.revisions().borrow();
                Err(EngineError::Behind { node: self.inner.consensus.node_id(), applied, minimum })
            }
        }
    }

    pub(crate) fn header(&self, revision: Revision) -> Option<v1::ResponseHeader> {
        let consensus = &self.inner.consensus;
        Some(v1::ResponseHeader {
            cluster_id: consensus.cluster_id().unwrap_or(0),
            epoch: 0,
            revision: revision.get(),
            node_id: consensus.node_id().get(),
            term: consensus.term().get(),
        })
    }

    fn leader_hint(&self) -> Option<v1::LeaderHint> {
        let leader = self.inner.consensus.leader()?;
        let membership = self.inner.consensus.membership();
        let member = membership.get(NodeId(leader.leader_id))?;
        Some(v1::LeaderHint {
            node_id: leader.leader_id,
            client_address: member.client_address.clone(),
            application_address: member.application_address.clone(),
            term: leader.term,
        })
    }

    fn not_leader(&self) -> EngineError {
        let node = self.inner.consensus.node_id();
        EngineError::NotLeader { node, hint: self.leader_hint().filter(|hint| hint.node_id != node.get()) }
    }

    pub(crate) fn unavailable(&self, reason: impl Into<String>) -> EngineError {
        EngineError::Unavailable { node: self.inner.consensus.node_id(), reason: reason.into() }
    }

    fn explain_propose(&self, error: ProposeError) -> EngineError {
        match error {
            ProposeError::NotLeader if self.inner.consensus.role() == Role::Leader => {
                self.unavailable("its leadership is not confirmed by a quorum")
            }
            ProposeError::NotLeader => self.not_leader(),
            ProposeError::Overloaded { .. } => {
                EngineError::Overloaded { reason: format!("{error} (raft.backpressure.max_pending_bytes)") }
            }
            ProposeError::TooLarge { bytes } => EngineError::TooLarge { bytes, max: limits::REQUEST_BYTES_MAX },
            ProposeError::LeadershipLost => EngineError::LeadershipLost,
            ProposeError::Stopped => EngineError::Stopped,
        }
    }

    fn explain_read(&self, error: ReadIndexError) -> EngineError {
        match error {
            ReadIndexError::NoLeader => self.unavailable(error.to_string()),
            ReadIndexError::Unconfirmed { reason } => self.unavailable(reason),
            ReadIndexError::Overloaded { .. } => EngineError::Overloaded { reason: error.to_string() },
        }
    }
}

fn check_size(bytes: usize) -> Result<(), EngineError> {
    let max = limits::REQUEST_BYTES_MAX;
    if bytes as u64 > max { Err(EngineError::TooLarge { bytes, max }) } else { Ok(()) }
}

fn late(waiting_for: &'static str) -> EngineError {
    EngineError::DeadlineExceeded { waiting_for, outcome: v1::Outcome::NotApplied }
}

fn explain_past(error: ReadError) -> EngineError {
    match error {
        ReadError::Refused(refused) => refused.into(),
        ReadError::Storage(error) => EngineError::Storage(Arc::new(error)),
        ReadError::NotWritten { .. } => late(HISTORY),
    }
}
