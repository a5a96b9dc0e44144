mod crash;
mod damage;
mod figures;
mod fixture;

use std::fs;

use bytes::Bytes;
use d_engine_proto::{NodeId, Term};
use fastrand::Rng;

use super::*;
use crate::storage::suite::{self, Model, Subject};
use crate::storage::{RocksDBStorageEngine, Vote};

/// Small enough that a short script fills many segments.
const SMALL: Sizes = Sizes { segment_bytes: 32 << 10, step_bytes: 4 << 10 };

struct OnDisk {
    root: tempfile::TempDir,
    engines: usize,
    sizes: Sizes,
}

impl Subject for OnDisk {
    type Engine = SegmentStorageEngine;

    fn empty(&mut self) -> SegmentStorageEngine {
        self.engines += 1;
        let path = self.root.path().join(self.engines.to_string());
        SegmentStorageEngine::open_sized(&path, self.sizes).unwrap()
    }

    fn reopen(&mut self, engine: SegmentStorageEngine) -> SegmentStorageEngine {
        let path = engine.path().to_path_buf();
        drop(engine);
        SegmentStorageEngine::open_sized(&path, self.sizes).unwrap()
    }
}

#[test]
fn segments_pass_the_suite() {
    let root = tempfile::tempdir().unwrap();
    suite::run(&mut OnDisk { root, engines: 0, sizes: SIZES }, fastrand::u64(..));
}

#[test]
fn small_segments_pass_the_suite() {
    let root = tempfile::tempdir().unwrap();
    suite::run(&mut OnDisk { root, engines: 0, sizes: SMALL }, fastrand::u64(..));
}

#[test]
fn an_open_log_is_locked() {
    let root = tempfile::tempdir().unwrap();
    let engine = SegmentStorageEngine::open(root.path()).unwrap();
    assert!(matches!(SegmentStorageEngine::open(root.path()), Err(StorageError::Locked { .. })));
    drop(engine);
    SegmentStorageEngine::open(root.path()).unwrap();
}

#[test]
fn the_log_of_the_other_engine_is_refused_by_name() {
    let root = tempfile::tempdir().unwrap();
    drop(RocksDBStorageEngine::open(root.path().join("rocksdb")).unwrap());
    drop(SegmentStorageEngine::open(root.path().join("segments")).unwrap());
    let refused = SegmentStorageEngine::open(root.path().join("rocksdb")).unwrap_err();
    assert!(matches!(refused, StorageError::OtherEngine { found: "RocksDB", expected: "Segments", .. }), "{refused}");
    let refused = RocksDBStorageEngine::open(root.path().join("segments")).unwrap_err();
    assert!(matches!(refused, StorageError::OtherEngine { found: "Segments", expected: "RocksDB", .. }), "{refused}");
}

#[test]
fn files_of_a_long_life_stay_bounded() {
    let root = tempfile::tempdir().unwrap();
    let engine = SegmentStorageEngine::open_sized(root.path(), SMALL).unwrap();
    for index in 1..=3000_u64 {
        let position = |index| LogPosition { term: Term(1), index: LogIndex(index) };
        let record = LogRecord { position: position(index), payload: Bytes::from_static(&[7; 4000]) };
        let purge = StorageOperation::PurgeTo(position(index.saturating_sub(20)));
        engine.write(&[StorageOperation::Append(record), purge], Durability::OperatingSystem).unwrap();
        if index % 100 == 0 {
            engine.sync().unwrap();
        }
    }
    let bytes = crate::storage::disk_bytes(root.path());
    assert!(bytes < 200 << 10, "{bytes} bytes for 80 kB of entries after writing 12 MB");
    assert_eq!(engine.read(LogIndex(0), LogIndex(u64::MAX), usize::MAX).unwrap().len(), 20);
}

#[test]
fn a_segment_whose_purge_is_not_on_the_disk_stays() {
    let root = tempfile::tempdir().unwrap();
    let engine = SegmentStorageEngine::open_sized(root.path(), SMALL).unwrap();
    let position = |index| LogPosition { term: Term(1), index: LogIndex(index) };
    for index in 1..=20 {
        let record = LogRecord { position: position(index), payload: Bytes::from_static(&[7; 4000]) };
        engine.write(&[StorageOperation::Append(record)], Durability::Fsync).unwrap();
    }
    let segments = engine.held.read().segments.len();
    engine.write(&[StorageOperation::PurgeTo(position(20))], Durability::OperatingSystem).unwrap();
    assert_eq!(engine.held.read().segments.len(), segments);
    engine.sync().unwrap();
    assert_eq!(engine.held.read().segments.len(), 1);
}
