//! Reads what is stored beside the versions: their index, in the order of revisions, and the records.
//!
//! The index and the versions are written, and removed, by the same batches: in one snapshot of the database, whatever
//! the index lists is there, and so is the version before it.

use std::ops::RangeInclusive;
use std::sync::Arc;

use bytes::Bytes;
use d_engine_proto::Revision;
use rocksdb::{DBRawIterator, ReadOptions};

use super::database::Database;
use super::encoding::{self, AFTER_INDEX, IndexEntry, RECORD_INTERVALS};
use super::{Change, RecordKey};
use crate::storage::StorageError;

/// What looking at an index entry costs besides its key.
const ENTRY_OVERHEAD_BYTES: usize = 64;

/// The changes that a reader wants.
pub(super) struct ChangesQuery<'a> {
    pub(super) start: &'a [u8],
    pub(super) end: Option<&'a [u8]>,
    pub(super) revisions: RangeInclusive<Revision>,
    /// Whether changes carry what the key held before.
    pub(super) before: bool,
    pub(super) bytes_max: usize,
}

impl ChangesQuery<'_> {
    /// The changes, and the last revision that they cover.
    pub(super) fn run(&self, database: &Database) -> Result<(Vec<Change>, Revision), StorageError> {
        let snapshot = database.rocks().snapshot();
        let version = |key: &[u8], revision| {
            let mut version_key = Vec::with_capacity(key.len() + 16);
            encoding::put_version_key(&mut version_key, key, revision);
            let record = snapshot.get_pinned(&version_key).map_err(|error| read_failed(database, &error))?;
            let record = record.ok_or_else(|| missing(database, &version_key))?;
            let version = encoding::decode_version(&version_key, &record)
                .map_err(|malformed| database.corrupt_version(&version_key, &malformed))?;
            version.map(Arc::new).ok_or_else(|| missing(database, &version_key))
        };

        let (first, last) = (*self.revisions.start(), *self.revisions.end());
        let options = index_options(encoding::index_bound(first), last.get().checked_add(1).map(Revision));
        let mut iterator = snapshot.raw_iterator_opt(options);
        iterator.seek_to_first();
        let (mut changes, mut bytes, mut covered) = (Vec::new(), 0, first);
        while let Some(entry) = index_entry(database, &iterator)? {
            if entry.revision > covered {
                // Only here: a revision is never cut, however large it is.
                if bytes > self.bytes_max {
                    return Ok((changes, covered));
                }
                covered = entry.revision;
            }
            bytes += ENTRY_OVERHEAD_BYTES + entry.key.len();
            if entry.key >= self.start && self.end.is_none_or(|end| entry.key < end) {
                let after = if entry.deletes { None } else { Some(version(entry.key, entry.revision)?) };
                let before = entry.before.filter(|_| self.before);
                let before = before.map(|before| version(entry.key, before)).transpose()?;
                bytes += [&after, &before].into_iter().flatten().map(|version| version.value.len()).sum::<usize>();
                let key = after.as_ref().map_or_else(|| Bytes::copy_from_slice(entry.key), |after| after.key.clone());
                changes.push(Change { key, revision: entry.revision, after, before });
            }
            iterator.next();
        }
        Ok((changes, last))
    }
}

/// All records, leases first, each kind in the order of ids.
pub(super) fn records(database: &Database) -> Result<Vec<(RecordKey, Bytes)>, StorageError> {
    let mut records = Vec::new();
    for (start, end) in RECORD_INTERVALS {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(start);
        options.set_iterate_upper_bound(end);
        let mut iterator = database.rocks().raw_iterator_opt(options);
        iterator.seek_to_first();
        while let Some((key, record)) = iterator.item() {
            let record = encoding::decode_record(key, record).map_err(|malformed| {
                database.corrupt(&format!("record {}", key.escape_ascii()), malformed.to_string())
            });
            records.push(record?);
            iterator.next();
        }
        iterator.status().map_err(|error| read_failed(database, &error))?;
    }
    Ok(records)
}

/// Bounds an iterator to the index entries from the key `start` on, of revisions before `end`; `None`: of all.
pub(super) fn index_options(start: impl Into<Vec<u8>>, end: Option<Revision>) -> ReadOptions {
    let mut options = ReadOptions::default();
    options.set_iterate_lower_bound(start);
    match end {
        Some(end) => options.set_iterate_upper_bound(encoding::index_bound(end)),
        None => options.set_iterate_upper_bound(AFTER_INDEX),
    }
    options
}

/// The entry an iterator stands at; `None` at the end.
pub(super) fn index_entry<'a>(
    database: &Database,
    iterator: &'a DBRawIterator<'_>,
) -> Result<Option<IndexEntry<'a>>, StorageError> {
    let Some((index_key, record)) = iterator.item() else {
        return iterator.status().map(|()| None).map_err(|error| read_failed(database, &error));
    };
    IndexEntry::decode(index_key, record).map(Some).map_err(|malformed| {
        database.corrupt(&format!("index entry {}", index_key.escape_ascii()), malformed.to_string())
    })
}

fn read_failed(database: &Database, error: &rocksdb::Error) -> StorageError {
    database.failed("read versions in", error)
}

fn missing(database: &Database, version_key: &[u8]) -> StorageError {
    database.corrupt(&format!("version record {}", version_key.escape_ascii()), "it is missing".to_owned())
}
