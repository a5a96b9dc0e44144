//! Reads at a past revision, from the history on disk.
//!
//! A compaction may overtake a read. The store is published with its new oldest revision before the history hears of it
//! and removes anything, so a read that still finds its revision readable *afterwards* saw it whole.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use d_engine_proto::{Revision, v1};

use super::command::RangeQuery;
use super::error::{KvError, ReadError};
use super::page;
use super::read::{self, Source};
use super::room::Room;
use super::store::Store;
use crate::storage::versions::{KeyVersion, VersionStore};

/// A past revision that exists, but may not have been written behind yet.
pub struct PastRevision {
    versions: Arc<VersionStore>,
    /// Tells whether the revision is still readable.
    current: Arc<ArcSwap<Store>>,
    revision: Revision,
}

impl PastRevision {
    pub(super) fn new(versions: Arc<VersionStore>, current: Arc<ArcSwap<Store>>, revision: Revision) -> Self {
        Self { versions, current, revision }
    }

    /// Waits until the revision can be read. Blocks, as reading from the result does: for threads that may.
    ///
    /// # Errors
    /// [`ReadError::NotWritten`] when `timeout` passes first, [`ReadError::Storage`] when it never will be.
    pub fn wait(self, timeout: Duration) -> Result<PastStore, ReadError> {
        let written = self.versions.wait_written(self.revision, timeout)?;
        if written < self.revision {
            return Err(ReadError::NotWritten { requested: self.revision, written });
        }
        Ok(PastStore { versions: self.versions, current: self.current, revision: self.revision })
    }
}

/// The store as of a past revision. Every read blocks on the disk; headers are left to the caller. A read during which
/// the revision was compacted is refused with [`KvError::Compacted`].
pub struct PastStore {
    versions: Arc<VersionStore>,
    current: Arc<ArcSwap<Store>>,
    revision: Revision,
}

impl PastStore {
    /// The revision it shows.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Answers a read of one key.
    ///
    /// # Errors
    /// [`ReadError::Storage`]; [`KvError::Compacted`].
    pub fn get(&self, request: &v1::GetRequest) -> Result<v1::GetResponse, ReadError> {
        self.unless_compacted(read::get(&self, request))
    }

    /// Answers a read of several keys.
    ///
    /// # Errors
    /// [`ReadError::Storage`]; [`KvError::AnswerTooLarge`] or [`KvError::Compacted`].
    pub fn get_many(&self, request: &v1::GetManyRequest) -> Result<v1::GetManyResponse, ReadError> {
        self.unless_compacted(read::get_many(&self, request))
    }

    /// Answers a read of an interval, up to a page. To count it walks the whole interval.
    ///
    /// # Errors
    /// [`ReadError::Refused`] or [`ReadError::Storage`].
    pub fn range(&self, request: &v1::RangeRequest) -> Result<v1::RangeResponse, ReadError> {
        self.unless_compacted(read::range(&self, request))
    }

    /// Answers a transaction that cannot write.
    ///
    /// # Errors
    /// [`ReadError::Refused`] or [`ReadError::Storage`].
    pub fn txn(&self, request: &v1::TxnRequest) -> Result<v1::TxnResponse, ReadError> {
        self.unless_compacted(read::txn(&mut &*self, request))
    }

    /// What was read, an error included, means nothing if the revision was compacted meanwhile.
    fn unless_compacted<T>(&self, answer: Result<T, ReadError>) -> Result<T, ReadError> {
        let minimum = self.current.load().compacted();
        if self.revision < minimum {
            return Err(KvError::Compacted { requested: self.revision, minimum }.into());
        }
        answer
    }
}

impl Source for &PastStore {
    type Error = ReadError;

    fn get(&self, key: &[u8]) -> Result<Option<KeyVersion>, ReadError> {
        Ok(self.versions.get(key, self.revision)?)
    }

    fn range(&self, query: &RangeQuery, room: &mut Room) -> Result<v1::RangeResponse, ReadError> {
        let interval = &query.interval;
        let mut cursor = self.versions.scan(&interval.start, interval.end.as_deref(), self.revision, query.order);
        page::fill(query, room, || Ok(cursor.advance()?))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use bytes::Bytes;
    use d_engine_proto::LeaseId;

    use super::*;
    use crate::storage::versions::{Change, StoreState, Submission};

    const KEYS: usize = 200;
    const GENEROUS: Duration = Duration::from_secs(60);

    /// Every revision puts every key, with the revision as value, and gives up all but the last few revisions: the
    /// history is cleaned while it is read.
    fn put_all(revision: Revision, held: &mut [Option<Arc<KeyVersion>>]) -> Vec<Change> {
        let put = |(number, before): (usize, &mut Option<Arc<KeyVersion>>)| {
            let (key, value) = KeyVersion::own(&number.to_be_bytes(), &revision.get().to_be_bytes());
            let (create_revision, version) = (Revision(1), revision.get());
            let mod_revision = revision;
            let put = KeyVersion { key, value, create_revision, mod_revision, version, lease: LeaseId(0) };
            let after = Some(Arc::new(put));
            let before = std::mem::replace(before, after.clone());
            Change { key: Bytes::copy_from_slice(&number.to_be_bytes()), revision, after, before }
        };
        held.iter_mut().enumerate().map(put).collect()
    }

    #[test]
    fn a_read_that_a_compaction_overtakes_is_refused_and_never_wrong() {
        let directory = tempfile::tempdir().unwrap();
        let versions = Arc::new(VersionStore::open_tiny(directory.path()).unwrap());
        let current = Arc::new(ArcSwap::from_pointee(Store::default()));
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut held = vec![None; KEYS];
                for revision in (1..).map(Revision).take_while(|_| !done.load(Ordering::Relaxed)) {
                    let changes = Arc::new(put_all(revision, &mut held));
                    let compacted = Revision(revision.get().saturating_sub(2));
                    let state = StoreState { revision, compacted, ..StoreState::default() };
                    let Ok(store) = Store::restore(state.clone(), &[]) else { return };
                    // As the state machine does it: published first.
                    current.store(Arc::new(store));
                    versions.submit(Submission { changes, records: Vec::new(), state }).unwrap();
                }
            });
            let (mut whole, mut refused) = (0, 0);
            // Ends once both have been seen often enough.
            while whole < 100 || refused < 100 {
                let revision = current.load().compacted();
                if revision == Revision(0) {
                    continue;
                }
                let past = PastRevision::new(Arc::clone(&versions), Arc::clone(&current), revision);
                let Ok(past) = past.wait(GENEROUS) else { panic!("revision {revision} was never written") };
                let range = Some(v1::KeyRange::default());
                match past.range(&v1::RangeRequest { range, ..Default::default() }) {
                    Ok(page) => {
                        whole += 1;
                        let is_right = |kv: &v1::KeyValue| kv.value[..] == revision.get().to_be_bytes();
                        let right = page.kvs.len() == KEYS && page.kvs.iter().all(is_right);
                        done.fetch_or(!right, Ordering::Relaxed);
                        assert!(right, "{} keys at {revision}", page.kvs.len());
                    }
                    Err(ReadError::Refused(KvError::Compacted { requested, minimum })) => {
                        refused += 1;
                        assert!(requested == revision && minimum > revision);
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            done.store(true, Ordering::Relaxed);
        });
    }
}
