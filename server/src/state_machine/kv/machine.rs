//! The key-value state machine: the store in memory, its history behind it.
//!
//! ```text
//! apply ──▶ Store ──▶ published for readers ──▶ answers
//!             └─────▶ changes, leases, sessions ──▶ VersionStore (written behind)
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use bytes::Bytes;
use d_engine_proto::Revision;
use d_engine_proto::v1::{self, command_reply::Reply};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::watch;

use super::error::KvError;
use super::past::PastRevision;
use super::recent::Recent;
use super::store::{self, Store};
use crate::state_machine::{AppliedState, CommittedEntry, StateMachine, StoreTime};
use crate::storage::versions::{Change, ScanOrder, StoreState, Submission, VersionStore};
use crate::storage::{LogPosition, StorageError};
use crate::trace;

/// Name of the history in the directory of a snapshot.
const VERSIONS: &str = "versions";

/// The state machine of the product. Readers never wait for `apply`, nor it for them.
pub struct KvStateMachine {
    /// The store after the last entry applied, replaced as a whole.
    current: Arc<ArcSwap<Store>>,
    /// Held by the one who applies: `current` is read, changed and replaced as one step.
    applying: Mutex<()>,
    /// Replaced together with `current`, before it.
    versions: ArcSwap<VersionStore>,
    /// What `versions` stands for, wherever that is at present.
    path: PathBuf,
    /// The last changes of `current`.
    recent: Recent,
    /// Follows `current`, for those who wait.
    revision: watch::Sender<Revision>,
    /// Follows `current` too.
    due: watch::Sender<Option<StoreTime>>,
    expired: AtomicU64,
}

/// Where a read at some revision is served from.
pub enum ReadPoint {
    /// Memory.
    Current(Arc<Store>),
    /// The history on disk.
    Past(PastRevision),
}

impl KvStateMachine {
    /// Opens the directory, creating it if it does not exist, and loads the store into memory.
    ///
    /// # Errors
    /// As [`VersionStore::open`]; [`StorageError::Corrupt`] when what is stored contradicts itself.
    pub fn open(path: &Path) -> Result<Self, StorageError> {
        Self::load(VersionStore::open_newest(path)?)
    }

    /// Loads the store from an open history.
    ///
    /// # Errors
    /// [`StorageError::Corrupt`] or [`StorageError::Io`].
    pub fn load(versions: VersionStore) -> Result<Self, StorageError> {
        let store = load_store(&versions)?;
        let (revision, _) = watch::channel(store.revision());
        let (due, _) = watch::channel(store.due());
        let recent = Recent::after(store.revision());
        let current = Arc::new(ArcSwap::from_pointee(store));
        let (applying, expired) = (Mutex::new(()), AtomicU64::new(0));
        let path = versions.path().to_owned();
        Ok(Self { current, applying, versions: ArcSwap::from_pointee(versions), path, recent, revision, due, expired })
    }

    /// The store as of now: consistent, and unmoved by what is applied later. Dropped soon, since it keeps what it shows
    /// in memory.
    #[must_use]
    pub fn current(&self) -> Arc<Store> {
        self.current.load_full()
    }

    /// Where to read as of `revision`; 0 is the current one.
    ///
    /// # Errors
    /// [`KvError::Compacted`] or [`KvError::FutureRevision`].
    pub fn at(&self, revision: Revision) -> Result<ReadPoint, KvError> {
        let store = self.current();
        let (current, minimum) = (store.revision(), store.compacted());
        if revision == Revision(0) || revision == current {
            Ok(ReadPoint::Current(store))
        } else if revision > current {
            Err(KvError::FutureRevision { requested: revision, current })
        } else if revision < minimum {
            Err(KvError::Compacted { requested: revision, minimum })
        } else {
            // After `current`: what was compacted by then is not looked for in an older history.
            Ok(ReadPoint::Past(PastRevision::new(self.history(), Arc::clone(&self.current), revision)))
        }
    }

    /// The changes after `revision` that memory still holds: one vector for each log entry that changed a key, in the
    /// order of revisions. `None` if some of them are gone from memory; the history has those.
    #[must_use]
    pub fn changes_after(&self, revision: Revision) -> Option<Vec<Arc<Vec<Change>>>> {
        self.recent.after_revision(revision)
    }

    /// As [`changes_after`](Self::changes_after), but no more entries than it takes to reach `bytes_max`, and at least
    /// one if there is one.
    #[must_use]
    pub fn changes_after_within(&self, revision: Revision, bytes_max: usize) -> Option<Vec<Arc<Vec<Change>>>> {
        self.recent.after_revision_within(revision, bytes_max.max(1))
    }

    /// Keeps fewer changes in memory, so that a short test goes beyond it many times.
    #[cfg(test)]
    pub(crate) fn with_recent_bytes(self, bytes_max: usize) -> Self {
        Self { recent: self.recent.bounded(bytes_max), ..self }
    }

    /// The history on disk, to which changes come late. Not to be kept: a snapshot that is installed replaces it.
    #[must_use]
    pub fn history(&self) -> Arc<VersionStore> {
        self.versions.load_full()
    }

    /// Follows the current revision: once it is seen here, [`current`](Self::current) shows it, and
    /// [`changes_after`](Self::changes_after) its changes.
    #[must_use]
    pub fn revisions(&self) -> watch::Receiver<Revision> {
        self.revision.subscribe()
    }

    /// When the next lease or session is due, as [`Store::due`] of the current store; costs next to nothing.
    #[must_use]
    pub fn due(&self) -> Option<StoreTime> {
        self.current.load().due()
    }

    /// How many leases and sessions came to their deadline since the node started, those of replayed entries included.
    #[must_use]
    pub fn expired(&self) -> u64 {
        self.expired.load(Ordering::Relaxed)
    }

    /// Follows [`due`](Self::due): what has ended by then is gone from [`current`](Self::current).
    #[must_use]
    pub fn due_changes(&self) -> watch::Receiver<Option<StoreTime>> {
        self.due.subscribe()
    }
}

impl StateMachine for KvStateMachine {
    fn applied(&self) -> AppliedState {
        applied_state(self.current.load().state().clone())
    }

    fn durable(&self) -> Option<LogPosition> {
        self.versions.load().durable()
    }

    fn apply(&self, entry: &CommittedEntry) -> Result<Vec<Bytes>, StorageError> {
        let _applying = self.applying.lock();
        let mut store = Store::clone(&self.current.load());
        let store::Effects { answers, changes, records, expired, traced } = store.apply(entry);
        // They end when this returns: when what the commands changed can be read here.
        let _spans: Vec<_> =
            traced.iter().map(|command| trace::apply(&command.context, entry.position, command.revision)).collect();
        let changes = Arc::new(changes);
        let state = store.state().clone();
        let revision = store.revision();
        let due = store.due();
        // In this order: who sees a revision finds its changes, and who sees a change can read it.
        self.current.store(Arc::new(store));
        self.recent.push(&changes);
        if *self.revision.borrow() != revision {
            self.revision.send_replace(revision);
        }
        if *self.due.borrow() != due {
            self.due.send_replace(due);
        }
        self.expired.fetch_add(expired as u64, Ordering::Relaxed);
        self.versions.load().submit(Submission { changes, records, state })?;
        Ok(answers)
    }

    /// The key-value store has typed reads of its own; an opaque query is answered with an error.
    fn query(&self, _query: Bytes) -> Result<Bytes, StorageError> {
        let revision = self.current.load().revision().get();
        let reply = Some(Reply::Error(KvError::NoQueries.into()));
        Ok(v1::CommandReply { revision, reply }.encode_to_vec().into())
    }

    fn flush(&self) -> Result<(), StorageError> {
        self.versions.load_full().flush()
    }

    fn save(&self, directory: &Path) -> Result<AppliedState, StorageError> {
        Ok(applied_state(self.history().checkpoint(&directory.join(VERSIONS))?))
    }

    /// Memory holds the old store and the new one until the readers of the old one are done.
    fn restore(&self, directory: &Path) -> Result<(), StorageError> {
        let _applying = self.applying.lock();
        let versions = VersionStore::install(&self.path, &directory.join(VERSIONS))?;
        let store = load_store(&versions)?;
        let (revision, due) = (store.revision(), store.due());
        // As in `apply`; who sees the new store looks for its past in the new history.
        self.versions.swap(Arc::new(versions)).retire();
        self.current.store(Arc::new(store));
        self.recent.start_over(revision);
        self.revision.send_replace(revision);
        self.due.send_replace(due);
        Ok(())
    }
}

fn applied_state(state: StoreState) -> AppliedState {
    let StoreState { position, store_time, membership, .. } = state;
    AppliedState { position, store_time: StoreTime(store_time), membership }
}

/// Reads a whole store into memory.
fn load_store(versions: &VersionStore) -> Result<Store, StorageError> {
    let restored = Store::restore(versions.recovered().clone(), &versions.recovered_records()?);
    let mut store = restored.map_err(|violation| versions.contradiction(violation.to_string()))?;
    // As of any revision there could be: one beyond the state's is found out below.
    let mut newest = versions.scan(&[], None, Revision(u64::MAX), ScanOrder::Ascending);
    while let Some(version) = newest.advance()? {
        store.restore_key(version);
    }
    drop(newest);
    store.validate().map_err(|violation| versions.contradiction(violation.to_string()))?;
    Ok(store)
}
