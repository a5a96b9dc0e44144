//! What becomes of a state that a cluster begins with anew.
//!
//! Clients may know more than the backup does: revisions that were issued after it, and tokens made of them. So the
//! revision jumps past any that could have been issued, and everything before it counts as compacted: a watch that goes
//! on from an old revision is told so, rather than shown a history that is another one. Sessions end, since what they
//! remember may not be what was answered. Leases begin anew, since nobody could renew them meanwhile.

use bytes::Bytes;
use d_engine_proto::{Epoch, LeaseId, Revision, SessionId};

use super::machine::KvStateMachine;
use super::store::Store;
use crate::state_machine::{StateMachine, StoreTime};
use crate::storage::versions::{StoreState, Submission};
use crate::storage::{LogPosition, StorageError};

/// How far the revision jumps: more than were issued since the backup. At a million a second, which no cluster reaches,
/// that is twelve days; and thousands of restores stay below 2^53, the last number that every JSON reader keeps whole.
pub const REVISION_GAP: u64 = 1 << 40;

impl KvStateMachine {
    /// Begins the next restore epoch, in a cluster with this membership whose log begins behind `position`. On return it
    /// is durable. Never while entries are applied.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn begin_epoch(&self, position: LogPosition, membership: Bytes) -> Result<StoreState, StorageError> {
        let state = self.replace(|store| store.begin_epoch(position, membership))?;
        self.flush()?;
        Ok(state)
    }
}

impl Store {
    fn begin_epoch(&mut self, position: LogPosition, membership: Bytes) -> Submission {
        let now = StoreTime(self.state.store_time);
        let leases: Vec<LeaseId> = self.leases.records().map(|(id, _)| id).collect();
        for lease in leases {
            self.leases.renew(lease, now);
        }
        let sessions: Vec<SessionId> = self.sessions.records().map(|(id, _)| id).collect();
        for session in sessions {
            self.sessions.close(session);
        }
        let revision = Revision(self.state.revision.get().saturating_add(REVISION_GAP));
        self.state.position = Some(position);
        self.state.membership = Some((position, membership));
        self.state.epoch = Epoch(self.state.epoch.get() + 1);
        self.state.revision = revision;
        self.state.compacted = revision;
        let records = self.leases.take_records().chain(self.sessions.take_records()).collect();
        Submission { changes: Default::default(), records, state: self.state.clone() }
    }
}
