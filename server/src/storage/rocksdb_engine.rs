//! The [`StorageEngine`] on RocksDB: one instance per node, its write-ahead log on.
//!
//! A write is one RocksDB batch: the entries it appends, the ranges it deletes, and the one record of the
//! [state](super::record), so nothing of it can exist without the rest. RocksDB's own checksums guard its files, ours
//! (over key and value) what comes out of them, and the state tells which entries there must be: a record that fails a
//! check or is missing is reported as [`StorageError::Corrupt`], never skipped.
//!
//! # What a crash can leave, and how it is told from damage
//!
//! | at the end of the write-ahead log | means | on opening |
//! | --- | --- | --- |
//! | the last record is cut off, or zeros follow | a write that was never acknowledged | it is dropped |
//! | a record whose checksum fails | damage | `Corrupt` |
//! | a record cut off, with sound records after it | damage to its length | `Corrupt`, by [`tails`](super::tails) |
//! | anything wrong further ahead | damage | `Corrupt`, on opening or on reading the entry |
//!
//! So RocksDB recovers in the mode that tolerates a cut-off tail and nothing else; "point in time" would drop what was
//! acknowledged after a damaged record without a word, and "absolute consistency" would refuse to start after a power
//! cut. One case remains that no reader can decide: damage to the *length* of the very last record looks like a write
//! that was cut off, and the last write is lost silently, acknowledged or not.
//!
//! Every opening rewrites the state, so that log and tables vouch for each other: a table file that went missing
//! together with its mention in the manifest leaves a state that names entries which are not there.

use std::path::Path;

use d_engine_proto::LogIndex;
use parking_lot::Mutex;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBRecoveryMode, ErrorKind, LogLevel, Options,
    ReadOptions, WriteBatch, WriteOptions,
};

use super::directory::{Directory, Layout};
use super::log_state::LogState;
use super::record::{self, RecordError, STATE_KEY};
use super::{Durability, LogPosition, LogRecord, StorageEngine, StorageError, StorageOperation, StorageState, tails};

const LAYOUT: Layout = Layout { kind: "raft-log", version: 1, oldest: 1 };
const STATE_FAMILY: &str = "default";
const ENTRY_FAMILY: &str = "entries";

const MIB: usize = 1 << 20;
/// The state is one small record, rewritten by every write.
const STATE_MEMTABLE_BYTES: usize = MIB;
const TABLE_BYTES: u64 = 32 * MIB as u64;
/// The log is read in long runs, by followers that lag: nothing is worth caching but table indices.
const CACHE_BYTES: usize = 4 * MIB;
const BLOCK_BYTES: usize = 32 << 10;
const OPEN_FILES_MAX: i32 = 128;

/// When RocksDB turns its write-ahead log into tables. Tests choose smaller ones, to see it happen.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    /// Two of these are the memory the log takes.
    entry_memtable_bytes: usize,
    /// Bounds what opening has to replay.
    write_ahead_log_bytes_max: u64,
}

const SIZES: Sizes = Sizes { entry_memtable_bytes: 16 * MIB, write_ahead_log_bytes_max: 64 * MIB as u64 };

/// Raft log, vote and identity in a RocksDB directory.
#[derive(Debug)]
pub struct RocksDBStorageEngine {
    db: DB,
    writer: Mutex<Writer>,
    /// Dropped last: it keeps other processes out until RocksDB has closed.
    directory: Directory,
}

/// What only the writing thread needs.
#[derive(Debug)]
struct Writer {
    /// As the last successful write left it.
    log: LogState,
    /// What the first failed write said. From then on the disk may hold more than is known here.
    poison: Option<String>,
    /// Reused for encoding.
    buffer: Vec<u8>,
}

impl RocksDBStorageEngine {
    /// As [`open`](Self::open), by the name that programs which bring their own storage know.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn new(path: impl AsRef<Path>) -> Result<Self, StorageError> {
        Self::open(path)
    }

    /// Opens the log in the directory at `path`, or makes an empty one in an empty or absent directory.
    ///
    /// # Errors
    /// Any [`StorageError`]. What was in the directory is still there then, so it can be examined or copied.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, StorageError> {
        Self::open_sized(path.as_ref(), SIZES)
    }

    fn open_sized(path: &Path, sizes: Sizes) -> Result<Self, StorageError> {
        let mut directory = Directory::claim(path, LAYOUT)?;
        let is_new = !directory.is_sealed();
        if !is_new {
            tails::check(directory.path())?;
        }
        let families = [
            ColumnFamilyDescriptor::new(STATE_FAMILY, family_options(STATE_MEMTABLE_BYTES)),
            ColumnFamilyDescriptor::new(ENTRY_FAMILY, family_options(sizes.entry_memtable_bytes)),
        ];
        let db = DB::open_cf_descriptors(&database_options(is_new, sizes), directory.path(), families)
            .map_err(|error| open_error(directory.path(), &error))?;

        let log = if is_new { LogState::default() } else { load(&db, directory.path())? };
        let writer = Writer { log: log.clone(), poison: None, buffer: Vec::new() };
        let durability = if is_new { Durability::Fsync } else { Durability::OperatingSystem };
        let mut batch = WriteBatch::default();
        put_state(&mut batch, &log, &mut Vec::new());
        db.write_opt(batch, &write_options(durability))
            .map_err(|error| storage_error("write log in", directory.path(), &error))?;
        if is_new {
            directory.seal()?;
        }
        Ok(Self { db, writer: Mutex::new(writer), directory })
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl StorageEngine for RocksDBStorageEngine {
    fn state(&self) -> Result<StorageState, StorageError> {
        let value = self.db.get_pinned(STATE_KEY).map_err(|error| read_error(self.path(), &error))?;
        decode_state(value.as_deref(), self.path()).map(|log| log.state)
    }

    fn read(&self, start: LogIndex, end: LogIndex, bytes_max: usize) -> Result<Vec<LogRecord>, StorageError> {
        // One snapshot, so that the state and the entries it names belong together while another thread writes.
        let snapshot = self.db.snapshot();
        let value = snapshot.get_pinned(STATE_KEY).map_err(|error| read_error(self.path(), &error))?;
        let Some(held) = decode_state(value.as_deref(), self.path())?.held() else { return Ok(Vec::new()) };
        let start = start.get().max(*held.start());
        let end = end.get().min(held.end().saturating_add(1));
        if start >= end {
            return Ok(Vec::new());
        }

        let mut options = ReadOptions::default();
        options.fill_cache(false);
        options.set_iterate_upper_bound(record::entry_key(end));
        let mut iterator = snapshot.raw_iterator_cf_opt(entry_family(&self.db, self.path())?, options);
        iterator.seek(record::entry_key(start));

        let mut bytes = 0_usize;
        let mut records = Vec::new();
        for index in start..end {
            let Some((key, value)) = iterator.item() else {
                iterator.status().map_err(|error| read_error(self.path(), &error))?;
                return Err(missing(index, self.path()));
            };
            if key != record::entry_key(index) {
                return Err(missing(index, self.path()));
            }
            let record =
                record::decode_entry(key, value).map_err(|error| record_error(entry(index), self.path(), &error))?;
            bytes = bytes.saturating_add(record.payload.len());
            records.push(record);
            if bytes >= bytes_max {
                break;
            }
            iterator.next();
        }
        Ok(records)
    }

    fn sync(&self) -> Result<(), StorageError> {
        self.writer.lock().check_poison(self.path())?;
        let synced = self.db.flush_wal(true).map_err(|error| storage_error("sync log in", self.path(), &error));
        if let Err(error) = &synced {
            self.writer.lock().poison.get_or_insert_with(|| error.to_string());
        }
        synced
    }

    fn write(&self, operations: &[StorageOperation], durability: Durability) -> Result<(), StorageError> {
        let mut writer = self.writer.lock();
        writer.check_poison(self.path())?;
        let written = writer.write(&self.db, self.path(), operations, durability);
        if let Err(error) = &written {
            writer.poison = Some(error.to_string());
        }
        written
    }
}

impl Writer {
    fn check_poison(&self, path: &Path) -> Result<(), StorageError> {
        let Some(first) = &self.poison else { return Ok(()) };
        let message = format!("an earlier write failed: {first}");
        Err(StorageError::Io { action: "write log in", path: path.into(), message })
    }

    fn write(
        &mut self,
        db: &DB,
        path: &Path,
        operations: &[StorageOperation],
        durability: Durability,
    ) -> Result<(), StorageError> {
        let entries = entry_family(db, path)?;
        let mut log = self.log.clone();
        let mut batch = WriteBatch::default();
        for (step, operation) in operations.iter().enumerate() {
            let dropped =
                log.apply(operation, path, |index| position_of(index, &operations[..step], db, entries, path))?;
            if let Some(dropped) = dropped {
                let (from, to) = (record::entry_key(*dropped.start()), record::key_after_entry(*dropped.end()));
                batch.delete_range_cf(entries, &from[..], &to[..]);
            }
            if let StorageOperation::Append(record) = operation {
                record::encode_entry(record, &mut self.buffer);
                batch.put_cf(entries, record::entry_key(record.position.index.get()), &self.buffer);
            }
        }
        put_state(&mut batch, &log, &mut self.buffer);
        db.write_opt(batch, &write_options(durability)).map_err(|error| storage_error("write log in", path, &error))?;
        self.log = log;
        Ok(())
    }
}

fn put_state(batch: &mut WriteBatch, log: &LogState, buffer: &mut Vec<u8>) {
    record::encode_state(log, buffer);
    batch.put(STATE_KEY, buffer);
}

/// Position of an entry that is held: appended by an earlier step of the same write, or stored.
fn position_of(
    index: LogIndex,
    earlier: &[StorageOperation],
    db: &DB,
    entries: &ColumnFamily,
    path: &Path,
) -> Result<LogPosition, StorageError> {
    let appended = earlier.iter().rev().find_map(|operation| match operation {
        StorageOperation::Append(record) if record.position.index == index => Some(record.position),
        _ => None,
    });
    if let Some(position) = appended {
        return Ok(position);
    }
    let key = record::entry_key(index.get());
    let value = db.get_pinned_cf(entries, key).map_err(|error| read_error(path, &error))?;
    let value = value.ok_or_else(|| missing(index.get(), path))?;
    record::decode_entry_position(&key, &value).map_err(|error| record_error(entry(index.get()), path, &error))
}

/// Reads the state and checks that the log begins and ends where it says.
fn load(db: &DB, path: &Path) -> Result<LogState, StorageError> {
    let value = db.get_pinned(STATE_KEY).map_err(|error| read_error(path, &error))?;
    let log = decode_state(value.as_deref(), path)?;

    let mut iterator = db.raw_iterator_cf(entry_family(db, path)?);
    iterator.seek_to_first();
    let first = iterator.key().map(record::entry_index).transpose();
    let first = first.map_err(|error| record_error("first key of the log".into(), path, &error))?;
    iterator.status().map_err(|error| read_error(path, &error))?;
    iterator.seek_to_last();
    let last = iterator.item().map(|(key, value)| record::decode_entry_position(key, value)).transpose();
    let last = last.map_err(|error| record_error("last log entry".into(), path, &error))?;
    iterator.status().map_err(|error| read_error(path, &error))?;

    if (first, last) == (log.first, log.state.last) {
        return Ok(log);
    }
    let describe = |first: Option<LogIndex>, last: Option<LogPosition>| match (first, last) {
        (Some(first), Some(last)) => format!("entries {first} to {} of term {}", last.index, last.term),
        _ => "no entries".to_owned(),
    };
    Err(StorageError::Corrupt {
        what: "log".into(),
        path: path.into(),
        message: format!("it holds {} instead of {}", describe(first, last), describe(log.first, log.state.last)),
    })
}

fn decode_state(value: Option<&[u8]>, path: &Path) -> Result<LogState, StorageError> {
    let what = || "state of the log".to_owned();
    match value {
        Some(value) => record::decode_state(value).map_err(|error| record_error(what(), path, &error)),
        None => Err(StorageError::Corrupt { what: what(), path: path.into(), message: "it is missing".into() }),
    }
}

fn entry_family<'a>(db: &'a DB, path: &Path) -> Result<&'a ColumnFamily, StorageError> {
    db.cf_handle(ENTRY_FAMILY).ok_or_else(|| StorageError::Corrupt {
        what: format!("family {ENTRY_FAMILY}"),
        path: path.into(),
        message: "it is missing".into(),
    })
}

fn database_options(is_new: bool, sizes: Sizes) -> Options {
    let mut options = Options::default();
    // A sealed directory without a database lost it: never make an empty one there.
    options.create_if_missing(is_new);
    options.create_missing_column_families(is_new);
    options.set_paranoid_checks(true);
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    options.set_track_and_verify_wals_in_manifest(true);
    options.set_max_total_wal_size(sizes.write_ahead_log_bytes_max);
    // Table files reach the disk as they are written, or the fsync of a vote waits for megabytes of them.
    options.set_bytes_per_sync(MIB as u64);
    options.set_max_background_jobs(2);
    options.set_max_open_files(OPEN_FILES_MAX);
    options.set_log_level(LogLevel::Warn);
    options.set_max_log_file_size(MIB);
    options.set_keep_log_file_num(2);
    options.set_stats_dump_period_sec(0);
    options.set_stats_persist_period_sec(0);
    options
}

fn family_options(memtable_bytes: usize) -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_size(BLOCK_BYTES);
    table.set_block_cache(&Cache::new_lru_cache(CACHE_BYTES));
    let mut options = Options::default();
    options.set_block_based_table_factory(&table);
    options.set_write_buffer_size(memtable_bytes);
    options.set_max_write_buffer_number(2);
    options.set_target_file_size_base(TABLE_BYTES);
    options
}

fn write_options(durability: Durability) -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(durability == Durability::Fsync);
    options
}

fn open_error(path: &Path, error: &rocksdb::Error) -> StorageError {
    match error.kind() {
        // The directory is locked by us, so this is a tool of RocksDB's at work in it.
        ErrorKind::IOError if error.as_ref().contains("lock file") => StorageError::Locked { path: path.into() },
        // A database or a family of it is missing, or unknown.
        ErrorKind::InvalidArgument | ErrorKind::NotFound | ErrorKind::NotSupported => corrupt(path, error),
        _ => storage_error("open log in", path, error),
    }
}

fn read_error(path: &Path, error: &rocksdb::Error) -> StorageError {
    storage_error("read log in", path, error)
}

fn storage_error(action: &'static str, path: &Path, error: &rocksdb::Error) -> StorageError {
    match error.kind() {
        ErrorKind::Corruption => corrupt(path, error),
        _ => StorageError::Io { action, path: path.into(), message: error.to_string() },
    }
}

fn corrupt(path: &Path, error: &rocksdb::Error) -> StorageError {
    StorageError::Corrupt { what: "log".into(), path: path.into(), message: error.to_string() }
}

fn record_error(what: String, path: &Path, error: &RecordError) -> StorageError {
    match error {
        RecordError::Version(version) => StorageError::NewerFormat {
            path: path.into(),
            found: u32::from(*version),
            supported: u32::from(record::VERSION),
        },
        RecordError::Checksum | RecordError::Malformed => {
            StorageError::Corrupt { what, path: path.into(), message: error.to_string() }
        }
    }
}

fn entry(index: u64) -> String {
    format!("log entry {index}")
}

fn missing(index: u64, path: &Path) -> StorageError {
    StorageError::Corrupt { what: entry(index), path: path.into(), message: "it is missing".into() }
}

#[cfg(test)]
mod tests;
