//! Removes what compaction gave up: the versions that only revisions before the oldest readable one show.
//!
//! The index says what they are. A change of a revision before the compacted one stands for the version that it
//! replaced, which no readable revision shows any more, and for itself if it is a deletion, which shows nothing. Both
//! go, and the index entry with them, in one batch; so the entries that are left say what is left to do, after a restart
//! too. The state just before the compacted revision stays whole: it is what its events call "before".
//!
//! Every key here is written once and removed once, never written again, which is what `single_delete` asks for; it
//! spares the markers that ordinary deletions leave behind: one that meets its record in a memtable is never flushed.

use d_engine_proto::Revision;
use rocksdb::WriteBatch;

use super::database::Database;
use super::encoding;
use super::history::{index_entry, index_options};
use crate::storage::StorageError;

/// Where cleaning stands. It works in chunks, so that its thread can do other things in between.
pub(super) struct Cleaner {
    /// What revisions before this one did is to be cleaned.
    compacted: Revision,
    /// Key in the index; nothing before it is left. Saves walking over the markers of what was removed.
    from: Vec<u8>,
    /// Whether anything may be left.
    due: bool,
    /// Bytes of a batch that removes.
    chunk_bytes: usize,
}

/// What cleaning came to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cleaned {
    /// Changes whose traces were removed.
    pub(super) changes: usize,
    /// Bytes written to remove them.
    pub(super) written_bytes: usize,
    /// Bytes of the values removed, which the disk gets back once what was written is flushed and merged.
    pub(super) freed_bytes: usize,
}

impl Cleaner {
    /// Begins anew: where the last process stood is found out by looking.
    pub(super) fn new(compacted: Revision, chunk_bytes: usize) -> Self {
        let from = encoding::index_bound(Revision(0)).to_vec();
        Self { compacted, from, due: compacted > Revision(0), chunk_bytes }
    }

    /// Allows it to clean what revisions before `compacted` did. The state that says so is written already: see
    /// [`Database`], a removal never outlives the state that allows it.
    pub(super) fn allow(&mut self, compacted: Revision) {
        if compacted > self.compacted {
            self.compacted = compacted;
            self.due = true;
        }
    }

    /// Whether anything may be left to clean.
    pub(super) fn is_due(&self) -> bool {
        self.due
    }

    /// Cleans one chunk.
    pub(super) fn clean(&mut self, database: &Database) -> Result<Cleaned, StorageError> {
        let mut batch = WriteBatch::default();
        let mut cleaned = Cleaned::default();
        let mut version_key = Vec::new();
        let mut iterator = database.rocks().raw_iterator_opt(index_options(&*self.from, Some(self.compacted)));
        iterator.seek_to_first();
        while batch.size_in_bytes() < self.chunk_bytes {
            let (Some(entry), Some(index_key)) = (index_entry(database, &iterator)?, iterator.key()) else {
                self.due = false;
                break;
            };
            for revision in entry.before.into_iter().chain(entry.deletes.then_some(entry.revision)) {
                version_key.clear();
                encoding::put_version_key(&mut version_key, entry.key, revision);
                batch.single_delete(&version_key);
            }
            batch.single_delete(index_key);
            cleaned.changes += 1;
            cleaned.freed_bytes += entry.before_bytes as usize;
            self.from.clear();
            self.from.extend_from_slice(index_key);
            iterator.next();
        }
        cleaned.written_bytes = batch.size_in_bytes();
        database.write(batch).map_err(|error| database.failed("write versions in", &error))?;
        Ok(cleaned)
    }
}
