//! The history of the key-value store: every version of every key since the last compaction, and the state the
//! latest of them adds up to.
//!
//! Changes are written behind ([`VersionStore::submit`] returns once they are queued) and become durable later still;
//! after a crash the directory holds everything up to one submission and nothing after it, together with the
//! [`StoreState`] of exactly that submission. It never decides what a change is: revisions and versions are the state
//! machine's business.

mod cursor;
mod database;
mod encoding;
#[cfg(test)]
mod tests;
mod write_behind;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use d_engine_proto::{LeaseId, Revision};

pub use cursor::Cursor;
use database::Database;
use write_behind::{Bounds, WriteBehind};

use super::{LogPosition, StorageError};

/// What one put left under a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyVersion {
    /// The key.
    pub key: Bytes,
    /// The value.
    pub value: Bytes,
    /// Revision that began the key's present life. Never after `mod_revision`.
    pub create_revision: Revision,
    /// Revision of this put.
    pub mod_revision: Revision,
    /// Puts since creation, this one included. At least 1.
    pub version: u64,
    /// Lease the key is attached to; 0: none.
    pub lease: LeaseId,
}

impl KeyVersion {
    /// Copies key and value into one allocation of their own. A slice of the log entry that brought them would keep
    /// the whole entry in memory for as long as the key lives.
    #[must_use]
    pub fn own(key: &[u8], value: &[u8]) -> (Bytes, Bytes) {
        let mut buffer = BytesMut::with_capacity(key.len() + value.len());
        buffer.extend_from_slice(key);
        buffer.extend_from_slice(value);
        let mut value = buffer.freeze();
        let key = value.split_to(key.len());
        (key, value)
    }
}

/// What one revision did to one key. A revision changes a key at most once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It wrote the key.
    Put(Arc<KeyVersion>),
    /// It ended the key's life.
    Delete {
        /// The key.
        key: Bytes,
        /// The revision.
        revision: Revision,
    },
}

impl Change {
    /// The key changed.
    #[must_use]
    pub fn key(&self) -> &Bytes {
        match self {
            Self::Put(put) => &put.key,
            Self::Delete { key, .. } => key,
        }
    }

    /// The revision that changed it.
    #[must_use]
    pub fn revision(&self) -> Revision {
        match self {
            Self::Put(put) => put.mod_revision,
            Self::Delete { revision, .. } => *revision,
        }
    }
}

/// The store apart from its keys, as of one log entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreState {
    /// The last entry applied.
    pub position: Option<LogPosition>,
    /// Store time of the last batch applied.
    pub store_time: Duration,
    /// The last membership applied, with its position.
    pub membership: Option<(LogPosition, Bytes)>,
    /// The store's revision. No change has a greater one.
    pub revision: Revision,
    /// The oldest revision that can be read. Never after `revision`.
    pub compacted: Revision,
}

/// Which end of an interval comes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScanOrder {
    /// The smallest key.
    #[default]
    Ascending,
    /// The largest key.
    Descending,
}

/// The versions on disk. Dropping it without [`flush`](Self::flush) loses what was not written, as a crash would.
pub struct VersionStore {
    // Before the database: its threads end first.
    write_behind: WriteBehind,
    database: Arc<Database>,
    recovered: StoreState,
}

impl VersionStore {
    /// Opens the directory, creating it if it does not exist.
    ///
    /// # Errors
    /// [`StorageError::Foreign`], [`StorageError::NewerFormat`], [`StorageError::Corrupt`],
    /// [`StorageError::Locked`] or [`StorageError::Io`].
    pub fn open(path: &Path) -> Result<Self, StorageError> {
        Self::open_bounded(path, Bounds::default())
    }

    fn open_bounded(path: &Path, bounds: Bounds) -> Result<Self, StorageError> {
        let (database, recovered) = Database::open(path)?;
        let database = Arc::new(database);
        let write_behind = WriteBehind::start(Arc::clone(&database), &recovered, bounds)?;
        Ok(Self { write_behind, database, recovered })
    }

    /// Opens with bounds so small that a short test crosses all of them many times.
    #[cfg(test)]
    pub(crate) fn open_tiny(path: &Path) -> Result<Self, StorageError> {
        Self::open_bounded(path, Bounds { queue_bytes_max: 8 << 10, batch_bytes_max: 2 << 10, flush_bytes: 16 << 10 })
    }

    /// The state that was durable when the directory was opened.
    #[must_use]
    pub fn recovered(&self) -> &StoreState {
        &self.recovered
    }

    /// Queues the changes of one log entry, in the order of their revisions, and the state after it. Waits while more
    /// is queued than memory is meant to hold.
    ///
    /// # Errors
    /// [`StorageError::Io`] once anything could not be written; nothing is written from then on.
    pub fn submit(&self, changes: Vec<Change>, state: StoreState) -> Result<(), StorageError> {
        self.write_behind.submit(changes, state)
    }

    /// The last log entry whose submission is durable.
    #[must_use]
    pub fn durable(&self) -> Option<LogPosition> {
        self.write_behind.durable()
    }

    /// Waits until `revision` can be read from here and answers the last revision that can: a smaller one if
    /// `timeout` passed first. Blocks.
    ///
    /// # Errors
    /// [`StorageError::Io`] when it never will be.
    pub fn wait_written(&self, revision: Revision, timeout: Duration) -> Result<Revision, StorageError> {
        self.write_behind.wait_written(revision, timeout)
    }

    /// Makes everything submitted before the call durable. Blocks.
    ///
    /// # Errors
    /// [`StorageError::Io`] when the disk refuses.
    pub fn flush(&self) -> Result<(), StorageError> {
        self.write_behind.flush()
    }

    /// What to report when records that are sound by themselves contradict each other.
    #[must_use]
    pub fn contradiction(&self, message: String) -> StorageError {
        self.database.corrupt("versions", message)
    }

    /// The keys from `start` (inclusive) to `end` (exclusive; `None`: to the last) as of `revision`, which must be
    /// written and not compacted.
    #[must_use]
    pub fn scan(&self, start: &[u8], end: Option<&[u8]>, revision: Revision, order: ScanOrder) -> Cursor<'_> {
        Cursor::new(&self.database, start, end, revision, order)
    }

    /// One key as of `revision`, which must be written and not compacted. Blocks on the disk.
    ///
    /// # Errors
    /// [`StorageError::Corrupt`] or [`StorageError::Io`].
    pub fn get(&self, key: &[u8], revision: Revision) -> Result<Option<KeyVersion>, StorageError> {
        let mut following = Vec::with_capacity(key.len() + 1);
        following.extend_from_slice(key);
        following.push(0);
        // Downwards: the newest versions are the ones asked for.
        self.scan(key, Some(&following), revision, ScanOrder::Descending).advance()
    }
}
