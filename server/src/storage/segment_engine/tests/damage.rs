//! Bytes of the files change, files are cut off or go missing, or hold anything at all: an error or the truth, never a
//! wrong record and never a panic.

use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof, proptest};

use super::crash::scratch;
use super::*;

/// A closed directory after random writes, all of them on the disk, and what it holds.
fn written(seed: u64, writes: usize) -> (tempfile::TempDir, Model) {
    let root = scratch();
    let mut rng = Rng::with_seed(seed);
    let mut model = Model::default();
    let engine = SegmentStorageEngine::open_sized(root.path(), SMALL).unwrap();
    for _ in 0..writes {
        engine.write(&model.random_write(&mut rng), Durability::Fsync).unwrap();
    }
    (root, model)
}

/// As [`written`], but nothing is purged: every segment is needed.
fn appended() -> (tempfile::TempDir, Model) {
    let root = scratch();
    let mut model = Model::default();
    let engine = SegmentStorageEngine::open_sized(root.path(), SMALL).unwrap();
    for index in 1..=60_u8 {
        let position = LogPosition { term: Term(1), index: LogIndex(index.into()) };
        let payload = Bytes::from(vec![index; 2000]);
        let operation = StorageOperation::Append(LogRecord { position, payload });
        model.apply(&operation);
        engine.write(&[operation], Durability::Fsync).unwrap();
    }
    (root, model)
}

fn segments(directory: &Path) -> Vec<PathBuf> {
    let mut files = recovery::files(directory).unwrap();
    files.retain(|path| path.extension().is_some_and(|extension| extension == recovery::EXTENSION));
    files.sort();
    files
}

fn copy(directory: &Path) -> tempfile::TempDir {
    let copy = scratch();
    for path in recovery::files(directory).unwrap() {
        fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    copy
}

/// Whether the directory can be opened and read; then it holds what the model does.
fn holds_the_truth(directory: &Path, model: &Model, context: &str) -> bool {
    let engine = match SegmentStorageEngine::open_sized(directory, SMALL) {
        Ok(engine) => engine,
        Err(error) => {
            assert!(matches!(error, StorageError::Corrupt { .. }), "{context}: {error}");
            return false;
        }
    };
    assert_eq!(engine.state().unwrap(), model.state(), "{context}");
    let records = engine.read(LogIndex(0), LogIndex(u64::MAX), usize::MAX).unwrap();
    assert!(records == model.records(), "{context}: other records");
    true
}

#[test]
fn a_changed_bit_anywhere_is_refused_or_changes_nothing() {
    let seed = fastrand::u64(..);
    let mut rng = Rng::with_seed(seed);
    let (root, model) = written(seed, 60);
    let files = segments(root.path());
    let mut refused = 0;
    for round in 0..400 {
        let copy = copy(root.path());
        let path = copy.path().join(rng.choice(&files).unwrap().file_name().unwrap());
        let mut bytes = fs::read(&path).unwrap();
        let position = rng.usize(0..bytes.len());
        bytes[position] ^= 1 << rng.u8(0..8);
        fs::write(&path, &bytes).unwrap();
        let context = format!("seed {seed}, round {round}, {} changed at {position}", path.display());
        refused += usize::from(!holds_the_truth(copy.path(), &model, &context));
    }
    assert!(refused > 50, "seed {seed}: {refused} of 400 changes were noticed");
}

/// The very last write too: no reader of a journal knows more than its frames tell, and they tell when they were whole.
#[test]
fn a_changed_bit_in_the_last_write_is_refused_with_file_and_offset() {
    let (root, _) = written(7, 5);
    let engine = SegmentStorageEngine::open_sized(root.path(), SMALL).unwrap();
    let start = engine.writer.lock().end;
    let vote = Vote { term: Term(99), node_id: NodeId(1), committed: false };
    let position = LogPosition { term: Term(99), index: LogIndex(1) };
    engine
        .write(&[StorageOperation::SaveVote(vote), StorageOperation::SaveCommitted(position)], Durability::Fsync)
        .unwrap();
    let end = engine.writer.lock().end;
    drop(engine);
    let newest = segments(root.path()).pop().unwrap();
    for byte in start..end {
        for bit in 0..8 {
            let copy = copy(root.path());
            let path = copy.path().join(newest.file_name().unwrap());
            let mut bytes = fs::read(&path).unwrap();
            bytes[usize::try_from(byte).unwrap()] ^= 1 << bit;
            fs::write(&path, &bytes).unwrap();
            let refused = SegmentStorageEngine::open_sized(copy.path(), SMALL).unwrap_err();
            let StorageError::Corrupt { path: named, message, .. } = &refused else { panic!("{refused}") };
            assert_eq!(*named, path);
            assert!(message.contains("at byte "), "{message}");
        }
    }
}

#[test]
fn no_missing_file_makes_the_log_look_shorter() {
    let (root, model) = appended();
    let files = segments(root.path());
    assert!(files.len() > 2, "{files:?}");
    // Only the newest is known by nothing else.
    for file in &files[..files.len() - 1] {
        let copy = copy(root.path());
        fs::remove_file(copy.path().join(file.file_name().unwrap())).unwrap();
        assert!(!holds_the_truth(copy.path(), &model, "a file is missing"), "{}", file.display());
    }
    let copy = copy(root.path());
    for file in &files {
        fs::remove_file(copy.path().join(file.file_name().unwrap())).unwrap();
    }
    assert!(!holds_the_truth(copy.path(), &model, "every file is missing"));
    fs::remove_file(root.path().join("FORMAT")).unwrap();
    let refused = SegmentStorageEngine::open_sized(root.path(), SMALL).unwrap_err();
    assert!(matches!(refused, StorageError::Foreign { .. }), "{refused}");
}

#[test]
fn a_segment_in_another_place_is_refused() {
    let (root, model) = appended();
    let files = segments(root.path());
    let copy = copy(root.path());
    let at = |file: &Path| copy.path().join(file.file_name().unwrap());
    fs::copy(&files[0], at(&files[1])).unwrap();
    assert!(!holds_the_truth(copy.path(), &model, "another's content"));
}

/// What a changed file may hold.
#[derive(Clone, Debug)]
enum Change {
    Random(Vec<u8>),
    Zeros(usize),
    Cut,
    /// The bytes from elsewhere in the file.
    Copied(usize, usize),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 1..200).prop_map(Change::Random),
        (1_usize..2000).prop_map(Change::Zeros),
        Just(Change::Cut),
        (any::<usize>(), 1_usize..2000).prop_map(|(from, length)| Change::Copied(from, length)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the newest segment holds: it opens with some log, or is refused, and reading it ends the same way.
    #[test]
    fn no_bytes_make_the_reader_panic(
        seed in 0_u64..4,
        changes in proptest::collection::vec((any::<usize>(), change()), 1..4),
    ) {
        let (root, _) = written(seed, 12);
        let path = segments(root.path()).pop().unwrap();
        let mut bytes = fs::read(&path).unwrap();
        for (place, change) in changes {
            let place = place % bytes.len().max(1);
            let replacement = match change {
                Change::Random(bytes) => bytes,
                Change::Zeros(length) => vec![0; length],
                Change::Cut => { bytes.truncate(place); Vec::new() }
                Change::Copied(from, length) => {
                    bytes.iter().skip(from % bytes.len().max(1)).take(length).copied().collect()
                }
            };
            for (byte, new) in bytes.iter_mut().skip(place).zip(replacement) {
                *byte = new;
            }
        }
        fs::write(&path, &bytes).unwrap();
        match SegmentStorageEngine::open_sized(root.path(), SMALL) {
            Ok(engine) => {
                let state = engine.state().unwrap();
                let records = engine.read(LogIndex(0), LogIndex(u64::MAX), usize::MAX).unwrap();
                assert_eq!(records.last().map(|record| record.position), state.last);
            }
            Err(error) => assert!(matches!(error, StorageError::Corrupt { .. }), "{error}"),
        }
    }

    /// A file of nothing but random bytes behind a sound header.
    #[test]
    fn random_frames_are_nothing_or_damage(tail in proptest::collection::vec(any::<u8>(), 0..3000)) {
        let root = scratch();
        drop(SegmentStorageEngine::open_sized(root.path(), SMALL).unwrap());
        let path = segments(root.path()).pop().unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes.extend(&tail);
        fs::write(&path, &bytes).unwrap();
        match SegmentStorageEngine::open_sized(root.path(), SMALL) {
            Ok(engine) => assert_eq!(engine.state().unwrap(), StorageState::default()),
            Err(error) => assert!(matches!(error, StorageError::Corrupt { .. }), "{error}"),
        }
    }
}
