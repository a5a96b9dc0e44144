mod crash;
mod damage;
mod fixture;

use std::fs;
use std::path::PathBuf;

use bytes::Bytes;
use d_engine_proto::{NodeId, Term};
use fastrand::Rng;

use super::*;
use crate::storage::Vote;
use crate::storage::suite::{self, Model, Subject};

/// Small enough that a few hundred writes become tables, and the tables are compacted.
const SMALL: Sizes = Sizes { entry_memtable_bytes: 64 << 10, write_ahead_log_bytes_max: 256 << 10 };

/// Random writes that follow from a seed, and what they lead to.
struct Script {
    rng: Rng,
    model: Model,
    written: usize,
}

impl Script {
    fn new(seed: u64) -> Self {
        Self { rng: Rng::with_seed(seed), model: Model::default(), written: 0 }
    }

    fn next(&mut self) -> (Vec<StorageOperation>, Durability) {
        self.written += 1;
        let durability = if self.rng.bool() { Durability::Fsync } else { Durability::OperatingSystem };
        (self.model.random_write(&mut self.rng), durability)
    }

    fn skip_to(&mut self, written: usize) {
        while self.written < written {
            self.next();
        }
    }
}

struct OnDisk {
    root: tempfile::TempDir,
    engines: usize,
    sizes: Sizes,
}

impl Subject for OnDisk {
    type Engine = RocksDBStorageEngine;

    fn empty(&mut self) -> RocksDBStorageEngine {
        self.engines += 1;
        let path = self.root.path().join(self.engines.to_string());
        RocksDBStorageEngine::open_sized(&path, self.sizes).unwrap()
    }

    fn reopen(&mut self, engine: RocksDBStorageEngine) -> RocksDBStorageEngine {
        let path = engine.path().to_path_buf();
        drop(engine);
        RocksDBStorageEngine::open_sized(&path, self.sizes).unwrap()
    }
}

fn append(index: u64, payload: &[u8]) -> StorageOperation {
    let position = LogPosition { term: Term(1), index: LogIndex(index) };
    StorageOperation::Append(LogRecord { position, payload: Bytes::copy_from_slice(payload) })
}

fn vote(term: u64) -> StorageOperation {
    StorageOperation::SaveVote(Vote { term: Term(term), node_id: NodeId(1), committed: false })
}

/// A closed directory with three entries in it.
fn small_log() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let engine = RocksDBStorageEngine::open(root.path()).unwrap();
    engine.write(&[append(1, b"one"), append(2, b"two"), append(3, b"three")], Durability::Fsync).unwrap();
    root
}

fn files(directory: &Path, is_wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let names = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = names.filter(|path| is_wanted(path.file_name().unwrap().to_str().unwrap())).collect();
    files.sort();
    files
}

#[test]
fn rocksdb_passes_the_suite() {
    let root = tempfile::tempdir().unwrap();
    suite::run(&mut OnDisk { root, engines: 0, sizes: SIZES }, fastrand::u64(..));
}

#[test]
fn rocksdb_passes_the_suite_while_tables_are_written() {
    let root = tempfile::tempdir().unwrap();
    suite::run(&mut OnDisk { root, engines: 0, sizes: SMALL }, fastrand::u64(..));
}

#[test]
fn an_open_log_is_locked() {
    let root = tempfile::tempdir().unwrap();
    let engine = RocksDBStorageEngine::open(root.path()).unwrap();
    assert!(matches!(RocksDBStorageEngine::open(root.path()), Err(StorageError::Locked { .. })));
    drop(engine);
    RocksDBStorageEngine::open(root.path()).unwrap();
}

#[test]
fn a_directory_of_another_program_is_refused_and_left_alone() {
    let root = tempfile::tempdir().unwrap();
    DB::open_default(root.path()).unwrap();
    let before = files(root.path(), |_| true);
    assert!(matches!(RocksDBStorageEngine::open(root.path()), Err(StorageError::Foreign { .. })));
    assert_eq!(files(root.path(), |_| true), before);
}

#[test]
fn a_directory_whose_making_was_interrupted_is_made_again() {
    // What making one leaves behind, last first.
    let made = ["FORMAT", ".log", "CURRENT", "MANIFEST-"];
    for missing in 1..=made.len() {
        let root = tempfile::tempdir().unwrap();
        drop(RocksDBStorageEngine::open(root.path()).unwrap());
        fs::rename(root.path().join("FORMAT"), root.path().join("FORMAT.new")).unwrap();
        for lost in &made[1..missing] {
            for file in files(root.path(), |name| name.starts_with(lost) || name.ends_with(lost)) {
                fs::remove_file(file).unwrap();
            }
        }
        let engine = RocksDBStorageEngine::open(root.path()).unwrap();
        assert_eq!(engine.state().unwrap(), StorageState::default(), "without the last {missing}");
        engine.write(&[append(1, b"one")], Durability::Fsync).unwrap();
        drop(engine);
        let engine = RocksDBStorageEngine::open(root.path()).unwrap();
        assert_eq!(engine.read(LogIndex(0), LogIndex(9), 9).unwrap().len(), 1, "without the last {missing}");
    }
}

#[test]
fn no_missing_file_makes_the_log_look_empty() {
    for lost in ["CURRENT", "MANIFEST-", ".sst", ".log", "FORMAT"] {
        let root = small_log();
        // Opened again, so that entries are in a table; written again, so that others are in the write-ahead log.
        let engine = RocksDBStorageEngine::open(root.path()).unwrap();
        engine.write(&[append(4, b"four")], Durability::Fsync).unwrap();
        drop(engine);
        let lost_files = files(root.path(), |name| name.starts_with(lost) || name.ends_with(lost));
        assert!(!lost_files.is_empty(), "{lost}");
        for file in lost_files {
            fs::remove_file(file).unwrap();
        }
        let opened = RocksDBStorageEngine::open(root.path()).map(|engine| engine.state());
        // A write-ahead log that is gone as a whole leaves an older state, which nothing else contradicts.
        if lost == ".log" {
            assert_eq!(opened.unwrap().unwrap().last.unwrap().index, LogIndex(3));
        } else {
            assert!(
                matches!(
                    opened,
                    Err(StorageError::Corrupt { .. } | StorageError::Io { .. } | StorageError::Foreign { .. })
                ),
                "without {lost}: {opened:?}"
            );
        }
    }
}

#[test]
fn a_log_is_not_opened_as_another_kind_or_from_a_newer_version() {
    let root = small_log();
    let marker = |content: &str| format!("{content} {:08x}\n", crc32c::crc32c(content.as_bytes()));
    fs::write(root.path().join("FORMAT"), marker("d-engine raft-log 2")).unwrap();
    let newer = RocksDBStorageEngine::open(root.path()).err();
    assert!(matches!(newer, Some(StorageError::NewerFormat { found: 2, supported: 1, .. })), "{newer:?}");
    fs::write(root.path().join("FORMAT"), marker("d-engine something-else 1")).unwrap();
    assert!(matches!(RocksDBStorageEngine::open(root.path()), Err(StorageError::Foreign { .. })));
}

#[test]
fn entries_that_vanish_behind_our_back_are_missed() {
    for (lost, is_noticed_on_opening) in [(1, true), (2, false), (3, true)] {
        let root = small_log();
        let engine = RocksDBStorageEngine::open(root.path()).unwrap();
        let family = entry_family(&engine.db, engine.path()).unwrap();
        engine.db.delete_cf(family, record::entry_key(lost)).unwrap();

        let read = engine.read(LogIndex(0), LogIndex(9), usize::MAX);
        assert!(
            matches!(&read, Err(StorageError::Corrupt { what, .. }) if *what == format!("log entry {lost}")),
            "without {lost}: {read:?}"
        );
        drop(engine);
        let opened = RocksDBStorageEngine::open(root.path());
        assert_eq!(opened.is_err(), is_noticed_on_opening, "without {lost}: {opened:?}");
    }
}

#[test]
fn an_entry_that_changed_behind_our_back_is_not_served() {
    let root = small_log();
    let engine = RocksDBStorageEngine::open(root.path()).unwrap();
    let family = entry_family(&engine.db, engine.path()).unwrap();
    let other = engine.db.get_cf(family, record::entry_key(1)).unwrap().unwrap();
    engine.db.put_cf(family, record::entry_key(2), other).unwrap();
    assert!(matches!(engine.read(LogIndex(2), LogIndex(3), 9), Err(StorageError::Corrupt { .. })));
    assert_eq!(engine.read(LogIndex(1), LogIndex(2), 9).unwrap().len(), 1);
}

#[test]
fn files_of_a_long_life_stay_bounded() {
    let root = tempfile::tempdir().unwrap();
    let engine = RocksDBStorageEngine::open_sized(root.path(), SMALL).unwrap();
    for index in 1..=3000_u64 {
        let position = LogPosition { term: Term(1), index: LogIndex(index.saturating_sub(20)) };
        let operations = [append(index, &[7; 4000]), StorageOperation::PurgeTo(position)];
        engine.write(&operations, Durability::OperatingSystem).unwrap();
    }
    drop(engine);
    drop(RocksDBStorageEngine::open_sized(root.path(), SMALL).unwrap());
    let bytes = crate::storage::disk_bytes(root.path());
    assert!(bytes < 4 << 20, "{bytes} bytes for 80 kB of entries after writing 12 MB");
}
