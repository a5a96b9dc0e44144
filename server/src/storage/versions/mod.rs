//! The history of the key-value store: every version of every key since the last compaction, and the state the
//! latest of them adds up to.
//!
//! Changes are written behind ([`VersionStore::submit`] returns once they are queued) and become durable later still;
//! after a crash the directory holds everything up to one submission and nothing after it, together with the
//! [`StoreState`] of exactly that submission. It never decides what a change is: revisions and versions are the state
//! machine's business.

mod cleaner;
mod cursor;
mod database;
mod encoding;
mod generations;
mod history;
#[cfg(test)]
mod tests;
mod write_behind;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use d_engine_proto::{Epoch, LeaseId, Revision, SessionId};
use tokio::sync::watch;

pub use cursor::Cursor;
use database::Database;
use history::ChangesQuery;
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
pub struct Change {
    /// The key changed.
    pub key: Bytes,
    /// The revision that changed it.
    pub revision: Revision,
    /// What it left under the key; `None` for a deletion.
    pub after: Option<Arc<KeyVersion>>,
    /// What the key held before the revision; `None` if it did not exist. Its own revision is smaller.
    pub before: Option<Arc<KeyVersion>>,
}

/// A record that the state machine keeps beside the versions: stored, replaced and removed as a whole.
#[derive(Clone)]
pub struct Record {
    /// Whose it is.
    pub key: RecordKey,
    /// What it holds now; `None`: it is removed.
    pub value: Option<Arc<dyn RecordValue>>,
}

/// Names a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RecordKey {
    /// A lease.
    Lease(LeaseId),
    /// A client session.
    Session(SessionId),
}

/// What a record holds. It is encoded by the thread that writes behind, and only if nothing replaced it meanwhile.
pub trait RecordValue: Send + Sync {
    /// The bytes to store.
    fn encode(&self) -> Vec<u8>;
}

/// What one log entry led to.
#[derive(Default)]
pub struct Submission {
    /// In the order of revisions and, within one, of keys. Shared with those who watch.
    pub changes: Arc<Vec<Change>>,
    /// Each record at most once.
    pub records: Vec<Record>,
    /// The state after the entry.
    pub state: StoreState,
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
    /// The greatest lease id ever given by the store itself.
    pub last_lease: LeaseId,
    /// The greatest session id ever given.
    pub last_session: SessionId,
    /// How often the store was restored from a backup.
    pub epoch: Epoch,
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
    // Last: it removes the directory.
    retirement: Retirement,
}

/// Removes a directory that another one has replaced, once it is closed.
struct Retirement {
    path: PathBuf,
    due: AtomicBool,
}

impl Drop for Retirement {
    fn drop(&mut self) {
        if *self.due.get_mut()
            && let Err(error) = generations::remove(&self.path)
        {
            tracing::warn!(%error, "a directory that was replaced stays until the next start");
        }
    }
}

impl VersionStore {
    /// Opens the directory, creating it if it does not exist.
    ///
    /// # Errors
    /// [`StorageError::Foreign`], [`StorageError::NewerFormat`], [`StorageError::OlderFormat`],
    /// [`StorageError::Corrupt`], [`StorageError::Locked`] or [`StorageError::Io`].
    pub fn open(path: &Path) -> Result<Self, StorageError> {
        Self::open_bounded(path, Bounds::default())
    }

    fn open_bounded(path: &Path, bounds: Bounds) -> Result<Self, StorageError> {
        let (database, recovered) = Database::open(path)?;
        let database = Arc::new(database);
        let write_behind = WriteBehind::start(Arc::clone(&database), &recovered, bounds)?;
        let retirement = Retirement { path: path.into(), due: AtomicBool::new(false) };
        Ok(Self { write_behind, database, recovered, retirement })
    }

    /// As [`open`](Self::open) for what stands for the directory after [`install`](Self::install), even if that was
    /// interrupted.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_newest(path: &Path) -> Result<Self, StorageError> {
        generations::settle(path)?;
        Self::open(path)
    }

    /// Has a copy of `from`, a directory that [`checkpoint`](Self::checkpoint) made, stand for the directory `path`
    /// from now on, and opens it. A crash leaves what was or what is, whole. Whoever has `path` open
    /// [retires](Self::retire) it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn install(path: &Path, from: &Path) -> Result<Self, StorageError> {
        Self::open(&generations::install(path, from)?)
    }

    /// Removes the directory once this store is dropped: another one has replaced it.
    pub fn retire(&self) {
        self.retirement.due.store(true, Ordering::Relaxed);
    }

    /// Where the directory is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.retirement.path
    }

    /// Opens with bounds so small that a short test crosses all of them many times.
    #[cfg(test)]
    pub(crate) fn open_tiny(path: &Path) -> Result<Self, StorageError> {
        let bounds =
            Bounds { queue_bytes_max: 8 << 10, batch_bytes_max: 2 << 10, flush_bytes: 16 << 10, clean_bytes: 64 };
        Self::open_bounded(path, bounds)
    }

    /// The state that was durable when the directory was opened.
    #[must_use]
    pub fn recovered(&self) -> &StoreState {
        &self.recovered
    }

    /// Queues what one log entry led to. Waits while more is queued than memory is meant to hold.
    ///
    /// Once a submission's state has a greater `compacted`, the versions that only older revisions show are removed in
    /// the background, which goes on after a restart. What revisions from `compacted` on show and did stays whole, what
    /// their changes replaced included. Who reads at a past revision checks afterwards that it was not compacted
    /// meanwhile.
    ///
    /// The `before` of a change must be what the submissions so far left under the key: the removal relies on it.
    ///
    /// # Errors
    /// [`StorageError::Io`] once anything could not be written; nothing is written from then on.
    pub fn submit(&self, submission: Submission) -> Result<(), StorageError> {
        self.write_behind.submit(submission)
    }

    /// The records as they were durable when the directory was opened, each as its value encoded it: leases, then
    /// sessions, in the order of ids. To be called before anything is submitted. Blocks on the disk.
    ///
    /// # Errors
    /// [`StorageError::Corrupt`] or [`StorageError::Io`].
    pub fn recovered_records(&self) -> Result<Vec<(RecordKey, Bytes)>, StorageError> {
        history::records(&self.database)
    }

    /// The changes of the keys from `start` (inclusive) to `end` (exclusive; `None`: to the last) that were made by the
    /// revisions from `first` to `last` inclusive, in the order of revisions and, within one, of keys.
    ///
    /// Answers the last revision that the changes cover beside them: all of them, up to there. That is `last`, unless
    /// it is not written yet, or more than `bytes_max` bytes were looked through or are returned: then no further
    /// revision is begun, but one that alone has more is still returned whole. Without progress, when `first` is not
    /// written yet, the answer is a revision before it. `before` is filled in only if asked for.
    ///
    /// Blocks on the disk. The caller checks afterwards that `first` was not compacted meanwhile: the history
    /// of compacted revisions has holes.
    ///
    /// # Errors
    /// [`StorageError::Corrupt`] or [`StorageError::Io`].
    pub fn changes(
        &self,
        start: &[u8],
        end: Option<&[u8]>,
        first: Revision,
        last: Revision,
        before: bool,
        bytes_max: usize,
    ) -> Result<(Vec<Change>, Revision), StorageError> {
        // Before the database is read: what is written later must not count as covered.
        let last = last.min(self.write_behind.written());
        ChangesQuery { start, end, revisions: first..=last, before, bytes_max }.run(&self.database)
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

    /// Follows why nothing more can be written; `None` while it can.
    #[must_use]
    pub fn failure(&self) -> watch::Receiver<Option<StorageError>> {
        self.write_behind.failure()
    }

    /// Makes everything submitted before the call durable. Blocks.
    ///
    /// # Errors
    /// [`StorageError::Io`] when the disk refuses.
    pub fn flush(&self) -> Result<(), StorageError> {
        self.write_behind.flush()
    }

    /// Writes a copy of everything submitted before the call, and perhaps of some of what is submitted meanwhile, into
    /// a new directory, which [`open`](Self::open) opens. Answers the state of the last submission in it; nothing of a
    /// later one is. The copy shares its large files with this store as links, so it costs little disk until the store
    /// has rewritten them. It is durable on return. Blocks; submitting goes on.
    ///
    /// After an error `into` is to be removed.
    ///
    /// # Errors
    /// [`StorageError::Io`], also when `into` exists.
    pub fn checkpoint(&self, into: &Path) -> Result<StoreState, StorageError> {
        // Beyond what the checkpoint itself flushes: what is still queued.
        self.flush()?;
        self.database.checkpoint(into)
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
