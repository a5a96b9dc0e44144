//! Directories written by earlier versions, kept beside this file: they open and hold what they held.

use super::*;
use crate::storage::Identity;

/// Format 1, written by [`writes_the_fixture`]. Never written again: a new format gets a directory of its own.
const FORMAT_1: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/storage/segment_engine/tests/format-1");
const FIXTURE_SIZES: Sizes = Sizes { segment_bytes: 5 << 10, step_bytes: 1 << 10 };

fn position(term: u64, index: u64) -> LogPosition {
    LogPosition { term: Term(term), index: LogIndex(index) }
}

fn append(term: u64, index: u64, payload: &[u8]) -> StorageOperation {
    StorageOperation::Append(LogRecord { position: position(term, index), payload: Bytes::copy_from_slice(payload) })
}

/// Every kind of operation, over several segments.
fn content() -> [Vec<StorageOperation>; 5] {
    let identity = Identity { node_id: NodeId(3), incarnation: 0x0123_4567_89ab_cdef, cluster_id: Some(77) };
    let vote = Vote { term: Term(4), node_id: NodeId(1), committed: true };
    [
        vec![StorageOperation::SaveIdentity(identity), StorageOperation::SaveVote(vote)],
        vec![append(1, 1, b"one"), append(1, 2, &[2; 700]), append(1, 3, b"three"), append(1, 4, b"")],
        vec![StorageOperation::TruncateAfter(Some(LogIndex(3))), StorageOperation::PurgeTo(position(1, 1))],
        vec![append(4, 4, &[4; 800]), append(4, 5, b"five"), StorageOperation::SaveCommitted(position(4, 4))],
        vec![append(4, 6, b"six"), append(4, 7, &[7; 600])],
    ]
}

fn copy() -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for file in recovery::files(Path::new(FORMAT_1)).unwrap() {
        fs::copy(&file, copy.path().join(file.file_name().unwrap())).unwrap();
    }
    copy
}

#[test]
fn format_1_is_read_and_goes_on() {
    let copy = copy();
    let mut model = Model::default();
    content().iter().flatten().for_each(|operation| model.apply(operation));
    let mut engine = SegmentStorageEngine::open(copy.path()).unwrap();
    suite::assert_matches(&engine, &model, &mut Rng::with_seed(1), "format 1");
    let mut rng = Rng::with_seed(2);
    for _ in 0..20 {
        engine.write(&model.random_write(&mut rng), Durability::Fsync).unwrap();
        drop(engine);
        engine = SegmentStorageEngine::open(copy.path()).unwrap();
        suite::assert_matches(&engine, &model, &mut rng, "format 1, written to");
    }
}

#[test]
fn a_newer_format_is_refused_by_name_and_left_alone() {
    let copy = copy();
    let marker = "d-engine raft-log-segments 2";
    fs::write(copy.path().join("FORMAT"), format!("{marker} {:08x}\n", crc32c::crc32c(marker.as_bytes()))).unwrap();
    let content = || -> Vec<(PathBuf, Vec<u8>)> {
        let mut files = recovery::files(copy.path()).unwrap();
        files.sort();
        files.into_iter().map(|path| (path.clone(), fs::read(&path).unwrap())).collect()
    };
    let before = content();
    let refused = SegmentStorageEngine::open(copy.path()).unwrap_err();
    assert!(matches!(refused, StorageError::NewerFormat { found: 2, supported: 1, .. }), "{refused}");
    assert!(content() == before, "the directory was changed");
}

#[test]
#[ignore = "writes the fixture, once per format"]
fn writes_the_fixture() {
    let root = tempfile::tempdir().unwrap();
    let engine = SegmentStorageEngine::open_sized(root.path(), FIXTURE_SIZES).unwrap();
    for operations in content() {
        engine.write(&operations, Durability::Fsync).unwrap();
    }
    drop(engine);
    fs::create_dir(FORMAT_1).unwrap();
    for file in recovery::files(root.path()).unwrap() {
        fs::copy(&file, Path::new(FORMAT_1).join(file.file_name().unwrap())).unwrap();
    }
}
