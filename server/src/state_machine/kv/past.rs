//! Reads at a past revision, from the history on disk.

use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::{Revision, v1};

use super::command::RangeQuery;
use super::error::ReadError;
use super::page;
use super::read::{self, Source};
use super::room::Room;
use crate::storage::versions::{KeyVersion, VersionStore};

/// A past revision that exists, but may not have been written behind yet.
pub struct PastRevision {
    versions: Arc<VersionStore>,
    revision: Revision,
}

impl PastRevision {
    pub(super) fn new(versions: Arc<VersionStore>, revision: Revision) -> Self {
        Self { versions, revision }
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
        Ok(PastStore { versions: self.versions, revision: self.revision })
    }
}

/// The store as of a past revision. Every read blocks on the disk; headers are left to the caller.
pub struct PastStore {
    versions: Arc<VersionStore>,
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
    /// [`ReadError::Storage`].
    pub fn get(&self, request: &v1::GetRequest) -> Result<v1::GetResponse, ReadError> {
        read::get(&self, request)
    }

    /// Answers a read of several keys.
    ///
    /// # Errors
    /// [`ReadError::Storage`]; [`KvError::AnswerTooLarge`](super::KvError::AnswerTooLarge).
    pub fn get_many(&self, request: &v1::GetManyRequest) -> Result<v1::GetManyResponse, ReadError> {
        read::get_many(&self, request)
    }

    /// Answers a read of an interval, up to a page. To count it walks the whole interval.
    ///
    /// # Errors
    /// [`ReadError::Refused`] or [`ReadError::Storage`].
    pub fn range(&self, request: &v1::RangeRequest) -> Result<v1::RangeResponse, ReadError> {
        read::range(&self, request)
    }

    /// Answers a transaction that cannot write.
    ///
    /// # Errors
    /// [`ReadError::Refused`] or [`ReadError::Storage`].
    pub fn txn(&self, request: &v1::TxnRequest) -> Result<v1::TxnResponse, ReadError> {
        read::txn(&mut &*self, request)
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
