//! What stands in the log of a node that begins a cluster by itself, with a state that came from elsewhere; and the
//! replay of a log without a cluster. For directories of nodes that do not run.

use std::collections::BTreeMap;

use bytes::Bytes;
use d_engine_proto::{LogIndex, NodeId, Term};

use super::entry;
use super::member::Member;
use super::raft_types::RaftMembership;
use crate::state_machine::{CommittedEntry, StateMachine};
use crate::storage::{Identity, LogPosition, StorageEngine, StorageError, StorageOperation, Vote};

/// Payload bytes read at once.
const READ_BYTES: usize = 8 << 20;

/// How a node begins.
#[derive(Debug)]
pub struct Beginning {
    /// The new cluster.
    pub cluster_id: u64,
    /// The last entry that its state stands for; the log is empty behind it.
    pub position: LogPosition,
    /// The membership as of then: this node alone. Opaque, for the state machine.
    pub membership: Bytes,
    /// What makes an empty log that of this node.
    pub operations: Vec<StorageOperation>,
}

/// The beginning of a new cluster of this one voter, whose incarnation is `member`'s, behind `position`.
#[must_use]
pub fn begin_alone(node_id: NodeId, member: Member, position: Option<LogPosition>) -> Beginning {
    let position = position.unwrap_or(LogPosition { term: Term(1), index: LogIndex(1) });
    let cluster_id = fastrand::u64(1..);
    let identity = Identity { node_id, incarnation: member.incarnation, cluster_id: Some(cluster_id) };
    let membership = RaftMembership::from(BTreeMap::from([(node_id.get(), member)]));
    Beginning {
        cluster_id,
        position,
        membership: entry::encode_membership(&membership),
        operations: vec![
            StorageOperation::SaveIdentity(identity),
            // Its own, so that nobody else was promised anything.
            StorageOperation::SaveVote(Vote { term: position.term, node_id, committed: false }),
            StorageOperation::PurgeTo(position),
            StorageOperation::SaveCommitted(position),
        ],
    }
}

/// Why a log cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The log or the state cannot be read or written.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// An entry is missing, or of a newer version.
    #[error("entry {index}: {message}")]
    Entry {
        /// Which one.
        index: LogIndex,
        /// What is wrong.
        message: String,
    },
}

/// Applies every entry that the log holds beyond what the state machine has applied, committed or not.
///
/// # Errors
/// [`ReplayError`].
pub fn replay(engine: &dyn StorageEngine, state_machine: &dyn StateMachine) -> Result<(), ReplayError> {
    let Some(last) = engine.state()?.last else { return Ok(()) };
    let mut applied = state_machine.applied();
    let mut next = applied.position.map_or(LogIndex(0), |position| LogIndex(position.index.get() + 1));
    while next <= last.index {
        let records = engine.read(next, LogIndex(last.index.get() + 1), READ_BYTES)?;
        if records.first().map(|record| record.position.index) != Some(next) {
            return Err(ReplayError::Entry { index: next, message: "it is missing".to_owned() });
        }
        for record in records {
            let position = record.position;
            let unreadable = |message| ReplayError::Entry { index: position.index, message };
            let entry = entry::decode(record).map_err(|error| unreadable(error.to_string()))?;
            let (store_time, content) =
                entry::content(&entry.payload, applied.store_time).map_err(|error| unreadable(error.to_string()))?;
            applied.store_time = store_time;
            state_machine.apply(&CommittedEntry { position, content })?;
            next = LogIndex(position.index.get() + 1);
        }
    }
    Ok(())
}
