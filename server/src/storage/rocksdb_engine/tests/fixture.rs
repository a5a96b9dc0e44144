//! Directories written by earlier versions, kept beside this file: they open and hold what they held.

use d_engine_proto::LogIndex;

use super::*;
use crate::storage::Identity;

/// Format 1, written by [`writes_the_fixture`]. Never written again: a new format gets a directory of its own.
const FORMAT_1: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/storage/rocksdb_engine/tests/format-1");

fn position(term: u64, index: u64) -> LogPosition {
    LogPosition { term: Term(term), index: LogIndex(index) }
}

/// Half of it is in a table, half in the write-ahead log.
fn content() -> [Vec<StorageOperation>; 2] {
    let identity = Identity { node_id: NodeId(3), incarnation: 0x0123_4567_89ab_cdef, cluster_id: Some(77) };
    [
        vec![
            StorageOperation::SaveIdentity(identity),
            vote(4),
            append(1, b"one"),
            append(2, b"two"),
            append(3, b"three"),
            append(4, b""),
        ],
        vec![
            StorageOperation::TruncateAfter(Some(LogIndex(3))),
            StorageOperation::PurgeTo(position(1, 1)),
            append(4, b"four"),
            append(5, b"five"),
            StorageOperation::SaveCommitted(position(1, 4)),
        ],
    ]
}

#[test]
fn format_1_is_read() {
    let copy = tempfile::tempdir().unwrap();
    for file in files(Path::new(FORMAT_1), |_| true) {
        fs::copy(&file, copy.path().join(file.file_name().unwrap())).unwrap();
    }
    let mut model = Model::default();
    content().iter().flatten().for_each(|operation| model.apply(operation));
    let engine = RocksDBStorageEngine::open(copy.path()).unwrap();
    suite::assert_matches(&engine, &model, &mut Rng::with_seed(1), "format 1");
}

#[test]
#[ignore = "writes the fixture, once per format"]
fn writes_the_fixture() {
    let root = tempfile::tempdir().unwrap();
    for operations in content() {
        let engine = RocksDBStorageEngine::open(root.path()).unwrap();
        engine.write(&operations, Durability::Fsync).unwrap();
    }
    fs::create_dir(FORMAT_1).unwrap();
    // Not the lock, the notes RocksDB takes, and its copies of the options.
    for file in files(root.path(), |name| !["LO", "OP", "ID"].contains(&&name[..2])) {
        fs::copy(&file, Path::new(FORMAT_1).join(file.file_name().unwrap())).unwrap();
    }
}
