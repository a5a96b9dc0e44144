//! The deterministic half of the engine: committed entries in, answers out. [`kv`] is the state machine of the
//! product; an application may bring its own.
//!
//! A state machine knows nothing of Raft, gRPC or clocks: time arrives inside the entry, as [`StoreTime`].

pub mod kv;

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;

use crate::storage::{LogPosition, StorageError};

/// Time as the cluster counts it: elapsed leadership since the cluster was formed. It never jumps, and stands still
/// while there is no leader. Wall clocks play no part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct StoreTime(pub Duration);

impl StoreTime {
    /// The moment so many milliseconds later.
    #[must_use]
    pub fn after_ms(self, milliseconds: u64) -> Self {
        Self(self.0.saturating_add(Duration::from_millis(milliseconds)).min(Self::END.0))
    }

    /// As it is stored.
    #[must_use]
    pub fn as_nanos(self) -> u64 {
        u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX)
    }

    /// From how it was stored.
    #[must_use]
    pub const fn from_nanos(nanoseconds: u64) -> Self {
        Self(Duration::from_nanos(nanoseconds))
    }

    /// The last one that can be stored, after centuries.
    const END: Self = Self::from_nanos(u64::MAX);
}

/// A committed log entry, handed over exactly once per run and in log order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommittedEntry {
    /// Where it stands in the log.
    pub position: LogPosition,
    /// What it carries.
    pub content: EntryContent,
}

/// What a committed entry carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryContent {
    /// Nothing: the first entry of a term.
    Blank,
    /// A batch of commands, applied in order, each succeeding or failing by itself.
    Commands {
        /// Store time of the batch; never before the one applied last.
        store_time: StoreTime,
        /// The commands, as they were proposed.
        commands: Vec<Bytes>,
    },
    /// The cluster's membership, opaque here; kept and given back by [`StateMachine::applied`].
    Membership(Bytes),
}

/// How far a state machine has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AppliedState {
    /// The last entry applied.
    pub position: Option<LogPosition>,
    /// The store time of the last batch applied.
    pub store_time: StoreTime,
    /// The last membership applied, with its position.
    pub membership: Option<(LogPosition, Bytes)>,
}

/// What an application replicates. Implementations must be deterministic: the same entries give the same answers
/// and the same state on every node, whatever the machine, its clock or its load.
///
/// Effects, position, store time and membership of an entry become durable together or not at all. They may become
/// durable late: after a crash the entries after [`applied`](Self::applied) are handed over again.
pub trait StateMachine: Send + Sync + 'static {
    /// How far this state machine has come; right after opening, what had become durable.
    fn applied(&self) -> AppliedState;

    /// The last entry whose effects are durable. The log is purged no further.
    fn durable(&self) -> Option<LogPosition>;

    /// Applies the next entry and returns one answer for each of its commands. Called by one thread at a time.
    ///
    /// A command that makes no sense is answered with an error of the application's own, since a failure here would
    /// repeat on every replica.
    ///
    /// # Errors
    /// Only for what makes going on impossible: the node stops serving.
    fn apply(&self, entry: &CommittedEntry) -> Result<Vec<Bytes>, StorageError>;

    /// Answers a read-only query from the current state. May run while `apply` does.
    ///
    /// # Errors
    /// Only for a failing disk.
    fn query(&self, query: Bytes) -> Result<Bytes, StorageError>;

    /// Makes everything applied durable, as far as possible: before the process ends, and before the log is purged.
    ///
    /// # Errors
    /// When the disk refuses.
    fn flush(&self) -> Result<(), StorageError>;

    /// Writes a copy of the state into files below `directory`, which is there and empty, and answers what the copy
    /// stands for: the state after one entry, that may be any from the last one applied before the call on. Files and
    /// directories only; they may be links to files that are never written to again. Whoever called makes them durable
    /// and keeps their checksums. May take long and run while `apply` does, which should not wait for it.
    ///
    /// # Errors
    /// When the disk refuses. The node goes on, and tries again later.
    fn save(&self, directory: &Path) -> Result<AppliedState, StorageError>;

    /// Replaces the state by what [`save`](Self::save) wrote, on this node or another: on return `applied` and `durable`
    /// tell its position, and queries see it. A crash leaves the old state or the new one, whole. `directory` stays as it
    /// is and is not needed afterwards. Never runs while `apply` does.
    ///
    /// # Errors
    /// When the disk refuses or the copy makes no sense: the node stops, with the old state or the new one.
    fn restore(&self, directory: &Path) -> Result<(), StorageError>;
}
