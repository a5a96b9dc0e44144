//! openraft's types as configured here, and the conversions to and from the plain types of `storage`.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use d_engine_proto::{LogIndex, NodeId, Term};
use openraft::impls::{InlineBatch, leader_id_std};
use openraft::raft::responder::Responder;
use openraft::{OptionalSend, RaftTypeConfig};

use super::entry::Batch;
use super::member::Member;
use super::runtime::Runtime;
use super::snapshots::Snapshot;
use crate::storage::{LogPosition, Vote};

/// openraft's type parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Types;

/// One leader per term, as in the Raft paper, so that every reign has a term of its own.
pub(super) type LeaderId = leader_id_std::LeaderId<u64, u32>;
pub(super) type LogId = openraft::alias::LogIdOf<Types>;
pub(super) type RaftVote = openraft::alias::VoteOf<Types>;
pub(super) type Payload = openraft::EntryPayload<Batch, u32, Member>;
pub(super) type Entry = openraft::alias::EntryOf<Types>;
pub(super) type RaftMembership = openraft::Membership<u32, Member>;
pub(super) type StoredMembership = openraft::alias::StoredMembershipOf<Types>;
pub(super) type SnapshotMeta = openraft::alias::SnapshotMetaOf<Types>;
pub(super) type RaftSnapshot = openraft::alias::SnapshotOf<Types, Arc<Snapshot>>;
pub(super) type Raft = openraft::Raft<Types, super::applier::Applier>;
pub(super) type WriteResult = openraft::raft::ClientWriteResult<Types>;

impl RaftTypeConfig for Types {
    type D = Batch;
    type R = Answers;
    type NodeId = u32;
    type Node = Member;
    type Term = u64;
    type LeaderId = LeaderId;
    type Vote = openraft::impls::Vote<LeaderId>;
    type Payload = Payload;
    type Entry = openraft::Entry<<LeaderId as openraft::vote::RaftLeaderId>::Committed, Payload>;
    type AsyncRuntime = Runtime;
    type Responder<T>
        = Callback<T>
    where
        T: OptionalSend + 'static;
    type Batch<T>
        = InlineBatch<T>
    where
        T: OptionalSend + 'static;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

/// The answers of one applied entry, one for each of its commands.
#[derive(Default)]
pub(super) struct Answers(pub(super) Vec<Bytes>);

impl fmt::Debug for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} answers", self.0.len())
    }
}

/// Takes the result of a proposed entry straight from the apply loop; one per entry, not per command.
pub(super) struct Callback<T>(pub(super) Box<dyn FnOnce(T) + Send>);

impl<T: OptionalSend + 'static> Responder<Types, T> for Callback<T> {
    fn on_complete(self, result: T) {
        (self.0)(result);
    }
}

pub(super) fn to_position(id: &LogId) -> LogPosition {
    LogPosition { term: Term(**id.committed_leader_id()), index: LogIndex(id.index()) }
}

pub(super) fn from_position(position: LogPosition) -> LogId {
    LogId::new_term_index(position.term.get(), position.index.get())
}

pub(super) fn to_vote(vote: &RaftVote) -> Vote {
    let leader = vote.leader_id();
    Vote { term: Term(leader.term), node_id: NodeId(leader.voted_for), committed: vote.is_committed() }
}

pub(super) fn from_vote(vote: Vote) -> RaftVote {
    if vote.committed {
        RaftVote::new_committed(vote.term.get(), vote.node_id.get())
    } else {
        RaftVote::new(vote.term.get(), vote.node_id.get())
    }
}
