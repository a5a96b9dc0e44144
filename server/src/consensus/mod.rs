//! Raft, behind a facade: proposes batches of opaque commands, confirms reads, publishes leadership.
//!
//! The only module that names openraft. It knows nothing of keys and values: commands are bytes for a
//! [`StateMachine`](crate::state_machine::StateMachine), entries are bytes for a
//! [`StorageEngine`](crate::storage::StorageEngine).
//!
//! ```text
//!  propose ──► proposer ──► openraft ──► log ──────► StorageEngine     (group commit, one fsync)
//!              (batches)       │  ▲       └► network ──► peers ──► their log
//!                              │  └──────────────────────┘ acknowledgements
//!                              └► applier ──► StateMachine ──► answers straight to the callers
//!                                                  └► snapshots ──► peers that need what the log has no more
//! ```

mod appends;
mod applier;
mod compaction;
mod entry;
mod formation;
mod gathering;
mod handle;
mod leadership;
mod log;
mod member;
mod network;
mod peer_service;
mod proposer;
mod raft_types;
mod read_index;
mod runtime;
mod snapshots;
#[cfg(test)]
mod tests;

pub use compaction::{SnapshotError, SnapshotPolicy};
pub use formation::MembershipRefused;
pub use gathering::{Gathering, Ticket};
pub use handle::{Consensus, ConsensusConfig, RaftProgress, StartError, Timings};
pub use leadership::{LeaderInfo, Role};
pub use member::{Member, Membership};
pub use peer_service::Server as PeerServer;
pub use proposer::{Answer, ProposeError};
pub use read_index::ReadIndexError;
