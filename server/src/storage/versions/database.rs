//! The RocksDB instance under the history: how it is opened and judged, and how its failures become ours.
//!
//! One column family and no write-ahead log: the Raft log is the log. A write batch never spans memtables: RocksDB
//! switches them before a batch, never within one. Memtables reach the disk whole and in order: flushes may run side by
//! side, but each becomes part of the database only after those of all older memtables. So after a crash the directory
//! holds all batches up to one of them and nothing of the later ones, whoever asked for the flush: we, or RocksDB
//! because a memtable was full. Hence a batch may rely on those written before it: what compaction allows to remove is
//! removed by batches after the one whose state allows it, and no crash leaves the removal without that state.

use std::path::Path;

use d_engine_proto::Epoch;
use rocksdb::checkpoint::Checkpoint;
use rocksdb::{BlockBasedOptions, Cache, DB, DBCompressionType, ErrorKind, Options, WriteBatch, WriteOptions};

use super::StoreState;
use super::encoding::{self, EPOCH_KEY, Malformed, STATE_KEY};
use crate::storage::StorageError;
use crate::storage::directory::{self, Directory, Layout};

const LAYOUT: Layout = Layout { kind: "versions", version: 2, oldest: 2 };

/// Larger than what is written between two explicit flushes, so that memtables are switched when we say so.
const MEMTABLE_BYTES: usize = 64 << 20;
/// Memtables in memory before RocksDB holds writes up: one filling, others on their way to a slow disk.
const MEMTABLES_MAX: i32 = 3;
const BLOCK_CACHE_BYTES: usize = 32 << 20;
/// Bytes of a table that may gather before they are sent to the disk: else each comes in one go when it is finished, and
/// the log's next write waits for all of it.
const BYTES_PER_SYNC: u64 = 1 << 20;
/// Share of a file's entries that are removals from which on it is merged with those below at once: it was written for
/// cleaning, and the space is wanted back. In one written while keys are replaced about half of the entries are.
const MERGED_AT_REMOVALS: f64 = 0.75;
/// RocksDB's own diagnostics files kept.
const INFO_LOGS_MAX: usize = 3;

/// An open directory of versions.
pub(super) struct Database {
    rocks: DB,
    /// Dropped last: it keeps other processes out until RocksDB has closed.
    directory: Directory,
}

impl Database {
    /// Opens the directory, creating it if it does not exist, and reads the state it stands for.
    pub(super) fn open(path: &Path) -> Result<(Self, StoreState), StorageError> {
        let directory = Directory::claim(path, LAYOUT)?;
        let is_new = !directory.is_sealed();
        let mut table = BlockBasedOptions::default();
        table.set_block_cache(&Cache::new_lru_cache(BLOCK_CACHE_BYTES));
        let mut options = Options::default();
        options.set_bytes_per_sync(BYTES_PER_SYNC);
        options.create_if_missing(is_new);
        // No window within a file: its whole counts.
        options.add_compact_on_deletion_collector_factory(0, 0, MERGED_AT_REMOVALS);
        options.set_block_based_table_factory(&table);
        options.set_compression_type(DBCompressionType::None);
        options.set_keep_log_file_num(INFO_LOGS_MAX);
        options.set_max_write_buffer_number(MEMTABLES_MAX);
        options.set_paranoid_checks(true);
        options.set_write_buffer_size(MEMTABLE_BYTES);
        let rocks = DB::open(&options, path).map_err(|error| open_error(path, &error))?;
        let mut database = Self { rocks, directory };
        let state = if is_new { database.begin()? } else { read_state(&database.rocks, path)? };
        Ok((database, state))
    }

    pub(super) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(super) fn rocks(&self) -> &DB {
        &self.rocks
    }

    /// Writes a batch into the memtable, all of it or nothing.
    pub(super) fn write(&self, batch: WriteBatch) -> Result<(), rocksdb::Error> {
        let mut options = WriteOptions::default();
        options.disable_wal(true);
        self.rocks.write_opt(batch, &options)
    }

    /// Makes every batch written so far durable.
    pub(super) fn flush(&self) -> Result<(), rocksdb::Error> {
        self.rocks.flush()
    }

    /// Makes every batch written so far durable and links the files into a new directory `into`, which holds those
    /// batches, perhaps a few more, and the state of exactly the last of them. On return it is durable.
    pub(super) fn checkpoint(&self, into: &Path) -> Result<StoreState, StorageError> {
        let linked = Checkpoint::new(&self.rocks).and_then(|checkpoint| checkpoint.create_checkpoint(into));
        linked.map_err(|error| self.failed("copy versions of", &error))?;
        // Asked of the copy itself: the database has gone on.
        let refused = |error| open_error(into, &error);
        let copy = DB::open_for_read_only(&Options::default(), into, false).map_err(refused)?;
        let state = read_state(&copy, into)?;
        drop(copy);
        directory::seal_made(into, LAYOUT)?;
        Ok(state)
    }

    /// A refusal of RocksDB while it was asked to read, write or flush.
    pub(super) fn failed(&self, verb: &'static str, error: &rocksdb::Error) -> StorageError {
        match error.kind() {
            ErrorKind::Corruption => self.corrupt("file", error.to_string()),
            _ => StorageError::Io { action: verb, path: self.path().to_owned(), message: error.to_string() },
        }
    }

    /// A version that is not what was written.
    pub(super) fn corrupt_version(&self, version_key: &[u8], malformed: &Malformed) -> StorageError {
        self.corrupt(&format!("version record {}", version_key.escape_ascii()), malformed.to_string())
    }

    pub(super) fn corrupt(&self, what: &str, message: String) -> StorageError {
        StorageError::Corrupt { what: what.to_owned(), path: self.path().to_owned(), message }
    }

    /// Makes a new directory hold the state of a store that nothing was ever written to.
    fn begin(&mut self) -> Result<StoreState, StorageError> {
        let state = StoreState::default();
        let mut batch = WriteBatch::default();
        batch.put(STATE_KEY, encoding::encode_state(&state));
        self.write(batch).and_then(|()| self.flush()).map_err(|error| self.failed("write versions in", &error))?;
        self.directory.seal()?;
        Ok(state)
    }
}

/// The state that a directory stands for.
fn read_state(rocks: &DB, path: &Path) -> Result<StoreState, StorageError> {
    let corrupt =
        |what: &str, message: String| StorageError::Corrupt { what: what.to_owned(), path: path.into(), message };
    let refused = |error: rocksdb::Error| open_error(path, &error);
    let record = rocks.get_pinned(STATE_KEY).map_err(refused)?;
    let record = record.ok_or_else(|| corrupt("state record", "it is missing".to_owned()))?;
    let state = encoding::decode_state(&record).map_err(|error| corrupt("state record", error.to_string()))?;
    let epoch =
        rocks.get_pinned(EPOCH_KEY).map_err(refused)?.map_or(Ok(Epoch(0)), |record| encoding::decode_epoch(&record));
    let epoch = epoch.map_err(|error| corrupt("epoch record", error.to_string()))?;
    Ok(StoreState { epoch, ..state })
}

fn open_error(path: &Path, error: &rocksdb::Error) -> StorageError {
    let (path, message) = (path.to_owned(), error.to_string());
    match error.kind() {
        // Files that do not belong together or are gone: the directory was complete once.
        ErrorKind::Corruption | ErrorKind::NotFound | ErrorKind::InvalidArgument => {
            StorageError::Corrupt { what: "versions".to_owned(), path, message }
        }
        _ => StorageError::Io { action: "open versions in", path, message },
    }
}
