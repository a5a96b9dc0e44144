//! The cluster as its clients see it: members, leader, and the state of one node.

use std::time::Duration;

use d_engine_proto::{Epoch, LogIndex, NodeId, Revision, Term, v1};

use crate::call::Plan;
use crate::client::Client;
use crate::error::Error;
use crate::retry::Resend;
use crate::topology::Route;

/// Who answered, for which cluster, at which revision of the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Identity of the cluster; a client refuses an answer in which it changes.
    pub cluster_id: u64,
    /// How often the cluster was restored from a snapshot; a client refuses a change.
    pub epoch: Epoch,
    /// Revision of the store the answer stands for: for a write, the write's own.
    pub revision: Revision,
    /// The answering node.
    pub node_id: NodeId,
    /// The answering node's current term.
    pub term: Term,
}

impl From<v1::ResponseHeader> for Header {
    fn from(header: v1::ResponseHeader) -> Self {
        Self {
            cluster_id: header.cluster_id,
            epoch: Epoch(header.epoch),
            revision: Revision(header.revision),
            node_id: NodeId(header.node_id),
            term: Term(header.term),
        }
    }
}

/// The leader of a term.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    /// Its member number.
    pub id: NodeId,
    /// Its reign.
    pub term: Term,
    /// Where clients reach it, `host:port`; may be empty.
    pub client_address: String,
    /// Free address of the application that embeds it; may be empty.
    pub application_address: String,
}

impl From<v1::LeaderHint> for Leader {
    fn from(hint: v1::LeaderHint) -> Self {
        Self {
            id: NodeId(hint.node_id),
            term: Term(hint.term),
            client_address: hint.client_address,
            application_address: hint.application_address,
        }
    }
}

/// What a member is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemberRole {
    /// Counts towards the quorum and may lead.
    Voter,
    /// Receives the log; neither votes nor leads.
    Learner,
    /// A role that this version of the client does not know.
    Unrecognized,
}

/// One member of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its number, unique in the cluster.
    pub id: NodeId,
    /// What it is for.
    pub role: MemberRole,
    /// Where its peers reach it, `host:port`.
    pub peer_address: String,
    /// Where clients reach it, `host:port`; may be empty.
    pub client_address: String,
    /// Free address of the application that embeds it; may be empty.
    pub application_address: String,
    /// A learner that the leader makes a voter once it has caught up.
    pub promotable: bool,
}

impl From<v1::Member> for Member {
    fn from(member: v1::Member) -> Self {
        let role = match member.role() {
            v1::MemberRole::Voter => MemberRole::Voter,
            v1::MemberRole::Learner => MemberRole::Learner,
            v1::MemberRole::Unspecified => MemberRole::Unrecognized,
        };
        Self {
            id: NodeId(member.id),
            role,
            peer_address: member.peer_address,
            client_address: member.client_address,
            application_address: member.application_address,
            promotable: member.promotable,
        }
    }
}

/// The members as the answering node knows them, and the leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Members {
    /// Who answered.
    pub header: Header,
    /// By ascending id.
    pub members: Vec<Member>,
    /// `None` while the answering node knows no leader.
    pub leader: Option<Leader>,
}

impl From<v1::MembersResponse> for Members {
    fn from(response: v1::MembersResponse) -> Self {
        let mut members: Vec<_> = response.members.into_iter().map(Member::from).collect();
        members.sort_by_key(|member| member.id);
        Self { header: response.header.unwrap_or_default().into(), members, leader: response.leader.map(Leader::from) }
    }
}

/// What a node is doing at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NodeRole {
    /// Leads its term.
    Leader,
    /// Follows a leader, or waits for one.
    Follower,
    /// Campaigns.
    Candidate,
    /// Receives the log without a vote.
    Learner,
    /// A role that this version of the client does not know.
    Unrecognized,
}

/// The state of one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeStatus {
    /// Who answered; its revision is what the node has applied.
    pub header: Header,
    /// What it is doing.
    pub role: NodeRole,
    /// The leader as the node knows it.
    pub leader: Option<Leader>,
    /// Last entry of its log; 0: none.
    pub last_log_index: LogIndex,
    /// Last entry it knows to be committed; 0: none.
    pub committed_index: LogIndex,
    /// Last entry it has applied; 0: none.
    pub applied_index: LogIndex,
    /// Keys in its store.
    pub keys: u64,
    /// Bytes of its data directory.
    pub disk_bytes: u64,
    /// Version of its software.
    pub version: String,
    /// Whether it serves: initialized, with a leader, no fault.
    pub ready: bool,
    /// Why it does not serve; empty if it does.
    pub problem: String,
    /// What an operator must look at although the node serves; empty if nothing.
    pub alarm: String,
    /// Time since it started.
    pub uptime: Duration,
}

impl From<v1::StatusResponse> for NodeStatus {
    fn from(response: v1::StatusResponse) -> Self {
        let role = match response.role() {
            v1::NodeRole::Leader => NodeRole::Leader,
            v1::NodeRole::Follower => NodeRole::Follower,
            v1::NodeRole::Candidate => NodeRole::Candidate,
            v1::NodeRole::Learner => NodeRole::Learner,
            v1::NodeRole::Unspecified => NodeRole::Unrecognized,
        };
        Self {
            header: response.header.unwrap_or_default().into(),
            role,
            leader: response.leader.map(Leader::from),
            last_log_index: LogIndex(response.last_log_index),
            committed_index: LogIndex(response.committed_index),
            applied_index: LogIndex(response.applied_index),
            keys: response.keys,
            disk_bytes: response.disk_bytes,
            version: response.version,
            ready: response.ready,
            problem: response.problem,
            alarm: response.alarm,
            uptime: Duration::from_millis(response.uptime_ms),
        }
    }
}

impl Client {
    /// The members and the leader, as any one reachable node knows them.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// let members = client.members().await?;
    /// assert!(members.leader.is_some());
    /// for member in members.members {
    ///     println!("{} at {}", member.id, member.client_address);
    /// }
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// `Unavailable` or `DeadlineExceeded` if no node answers within the call timeout, `WrongCluster`, `Closed`.
    pub async fn members(&self) -> Result<Members, Error> {
        let plan = Plan { route: Route::Any, resend: Resend::Idempotent, timeout: self.options().call_timeout };
        let response = self.call(v1::MembersRequest {}, plan).await?;
        self.shared().learn(&response);
        Ok(response.into())
    }

    /// The state of the node at `address` (`host:port`), whether or not it is a known member. One attempt, no retry:
    /// a node that does not answer is what the caller wants to see.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// for member in client.members().await?.members {
    ///     let status = client.status(&member.client_address).await?;
    ///     println!("{} applied {} and is {:?}", member.id, status.applied_index, status.role);
    /// }
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// `Unavailable` if it cannot be reached, `DeadlineExceeded` if it does not answer within the call timeout,
    /// `InvalidArgument` if the address is none, `WrongCluster`, `Closed`.
    pub async fn status(&self, address: &str) -> Result<NodeStatus, Error> {
        let response = self.call_node(address, v1::StatusRequest {}, self.options().call_timeout).await?;
        Ok(response.into())
    }
}
