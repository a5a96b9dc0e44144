//! The history against a plain list of changes; then damaged, locked and failing directories.

mod checkpoint;
mod compaction;
mod crash;
mod script;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use d_engine_proto::{LogIndex, Term};
use rocksdb::{DB, WriteBatch, WriteOptions};
use script::Plain;

use super::*;

const GENEROUS: Duration = Duration::from_secs(60);
const KEYS: &[&[u8]] = &[b"\0", b"\0\xff", b"a", b"a\0", b"a\0\x01", b"b", b"\xff"];

fn state(revision: u64) -> StoreState {
    StoreState {
        position: Some(LogPosition { term: Term(1), index: LogIndex(revision) }),
        revision: Revision(revision),
        ..Default::default()
    }
}

fn version(key: &[u8], revision: u64) -> KeyVersion {
    let text = format!("value of revision {revision}");
    let (key, value) = KeyVersion::own(key, text.as_bytes());
    let mod_revision = Revision(revision);
    KeyVersion { key, value, create_revision: Revision(1), mod_revision, version: revision, lease: LeaseId(0) }
}

fn put(key: &[u8], revision: u64) -> Change {
    let after = Some(Arc::new(version(key, revision)));
    Change { key: Bytes::copy_from_slice(key), revision: Revision(revision), after, before: None }
}

fn delete(key: &[u8], revision: u64) -> Change {
    Change { key: Bytes::copy_from_slice(key), revision: Revision(revision), after: None, before: None }
}

/// Submits changes alone.
fn submit(store: &VersionStore, changes: Vec<Change>, state: StoreState) -> Result<(), StorageError> {
    store.submit(Submission { changes: Arc::new(changes), records: Vec::new(), state })
}

fn wait(store: &VersionStore, revision: u64) {
    assert_eq!(store.wait_written(Revision(revision), GENEROUS).unwrap(), Revision(revision));
}

fn scan(
    store: &VersionStore,
    start: &[u8],
    end: Option<&[u8]>,
    revision: u64,
    order: ScanOrder,
) -> Result<Vec<KeyVersion>, StorageError> {
    let mut cursor = store.scan(start, end, Revision(revision), order);
    let mut found = Vec::new();
    while let Some(version) = cursor.advance()? {
        found.push(version);
    }
    Ok(found)
}

fn scan_all(store: &VersionStore, revision: u64) -> Result<Vec<KeyVersion>, StorageError> {
    scan(store, b"", None, revision, ScanOrder::Ascending)
}

/// A closed directory with the versions 1 to 100 of a few keys, a lease and a session.
fn filled() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let store = VersionStore::open(directory.path()).unwrap();
    let keys = u64::try_from(KEYS.len()).unwrap();
    for revision in 1..=100 {
        let key = KEYS[usize::try_from(revision % keys).unwrap()];
        let before = (revision > keys).then(|| Arc::new(version(key, revision - keys)));
        submit(&store, vec![Change { before, ..put(key, revision) }], state(revision)).unwrap();
    }
    let value = || Some(Arc::new(Plain(b"what it holds".to_vec())) as Arc<dyn RecordValue>);
    let keys = [RecordKey::Lease(LeaseId(7)), RecordKey::Session(SessionId(7))];
    let records = keys.map(|key| Record { key, value: value() }).into();
    store.submit(Submission { records, state: state(100), ..Default::default() }).unwrap();
    store.flush().unwrap();
    directory
}

/// Everything that can be read from [`filled`].
#[derive(Debug, PartialEq)]
struct Everything {
    newest: Vec<KeyVersion>,
    changes: Vec<Change>,
    records: Vec<(RecordKey, Bytes)>,
}

fn read_everything(path: &Path) -> Result<Everything, StorageError> {
    let store = VersionStore::open(path)?;
    let (changes, _) = store.changes(b"", None, Revision(1), Revision(100), true, usize::MAX)?;
    Ok(Everything { newest: scan_all(&store, 100)?, changes, records: store.recovered_records()? })
}

fn tables(path: &Path) -> Vec<PathBuf> {
    let mut tables: Vec<_> = fs::read_dir(path).unwrap().map(|file| file.unwrap().path()).collect();
    tables.retain(|path| path.extension().is_some_and(|extension| extension == "sst"));
    assert!(!tables.is_empty());
    tables
}

#[test]
fn a_new_directory_stands_for_an_empty_store() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("made/here");
    for _ in 0..2 {
        let store = VersionStore::open(&path).unwrap();
        assert_eq!(*store.recovered(), StoreState::default());
        assert_eq!(store.durable(), None);
        assert_eq!(scan_all(&store, u64::MAX).unwrap(), []);
        assert_eq!(store.get(b"a", Revision(1)).unwrap(), None);
        store.flush().unwrap();
    }
}

#[test]
fn the_history_reads_like_a_list_of_changes_at_every_revision() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let directory = tempfile::tempdir().unwrap();
    let store = VersionStore::open_tiny(directory.path()).unwrap();
    // More versions of a key than the cursor walks before it jumps, and long runs of one key.
    let mut past: Vec<BTreeMap<Bytes, KeyVersion>> = vec![BTreeMap::new()];
    for revision in 1..=300_u64 {
        let mut now = past.last().unwrap().clone();
        let key = if rng.u32(..3) == 0 { KEYS[rng.usize(..KEYS.len())] } else { b"a\0" };
        let change = if rng.u32(..6) == 0 { delete(key, revision) } else { put(key, revision) };
        match &change.after {
            Some(put) => drop(now.insert(put.key.clone(), KeyVersion::clone(put))),
            None => drop(now.remove(&change.key)),
        }
        past.push(now);
        submit(&store, vec![change], state(revision)).unwrap();
    }
    assert_eq!(store.wait_written(Revision(300), GENEROUS).unwrap(), Revision(300));
    for (revision, keys) in past.iter().enumerate().skip(1) {
        let revision = revision as u64;
        for key in KEYS {
            assert_eq!(store.get(key, Revision(revision)).unwrap().as_ref(), keys.get(*key), "{key:?} at {revision}");
        }
        let (start, end) = (KEYS[rng.usize(..KEYS.len())], KEYS[rng.usize(..KEYS.len())]);
        for (start, end) in [(&b""[..], None), (start, None), (start, Some(end))] {
            let within = |key: &Bytes| *key >= start && end.is_none_or(|end| *key < end);
            let mut expected: Vec<_> = keys.iter().filter(|(key, _)| within(key)).map(|(_, kv)| kv.clone()).collect();
            let context = format!("{start:?} to {end:?} at {revision}");
            assert_eq!(scan(&store, start, end, revision, ScanOrder::Ascending).unwrap(), expected, "{context}");
            expected.reverse();
            assert_eq!(scan(&store, start, end, revision, ScanOrder::Descending).unwrap(), expected, "{context}");
        }
    }
}

#[test]
fn flushed_changes_and_their_state_are_there_after_reopening() {
    let directory = tempfile::tempdir().unwrap();
    let store = VersionStore::open(directory.path()).unwrap();
    let membership = (LogPosition { term: Term(1), index: LogIndex(1) }, Bytes::from_static(b"members"));
    let last = StoreState {
        store_time: Duration::from_nanos(1_234_567_890),
        membership: Some(membership),
        compacted: Revision(1),
        ..state(2)
    };
    submit(&store, vec![put(b"a", 1)], state(1)).unwrap();
    submit(&store, vec![delete(b"a", 2), put(b"b", 2)], last.clone()).unwrap();
    assert_eq!(store.durable(), None);
    store.flush().unwrap();
    assert_eq!(store.durable(), last.position);
    drop(store);

    let store = VersionStore::open(directory.path()).unwrap();
    assert_eq!((store.recovered(), store.durable()), (&last, last.position));
    assert_eq!(scan_all(&store, 2).unwrap(), [version(b"b", 2)]);
    assert_eq!(scan_all(&store, 1).unwrap(), [version(b"a", 1)]);
}

/// Copies the files while a flush has just met a busy writer, as a crash at that moment would leave them.
#[test]
fn a_crash_between_writes_never_leaves_half_a_submission() {
    let whole = |revision| KEYS.iter().map(|key| version(key, revision)).collect::<Vec<_>>();
    for _ in 0..30 {
        let directory = tempfile::tempdir().unwrap();
        let store = VersionStore::open_tiny(directory.path()).unwrap();
        let mut revision = 0;
        while store.durable().is_none() {
            revision += 1;
            let changes = KEYS.iter().map(|key| put(key, revision)).collect();
            submit(&store, changes, state(revision)).unwrap();
        }
        let image = tempfile::tempdir().unwrap();
        // The manifest first: it names no file that is not there yet.
        let mut files: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
        files.sort_by_key(|name| !name.to_string_lossy().starts_with("MANIFEST"));
        for file in files {
            fs::copy(directory.path().join(&file), image.path().join(&file)).unwrap();
        }
        let recovered = VersionStore::open(image.path()).unwrap();
        let last = recovered.recovered().revision.get();
        assert!((1..=revision).contains(&last));
        assert_eq!(recovered.recovered(), &state(last));
        assert_eq!(scan_all(&recovered, u64::MAX).unwrap(), whole(last));
        assert_eq!(scan_all(&recovered, last.div_ceil(2)).unwrap(), whole(last.div_ceil(2)));
    }
}

#[test]
fn a_submission_without_changes_moves_the_state_too() {
    let directory = tempfile::tempdir().unwrap();
    let store = VersionStore::open(directory.path()).unwrap();
    submit(&store, Vec::new(), state(0)).unwrap();
    store.flush().unwrap();
    assert_eq!(store.durable(), state(0).position);
}

#[test]
fn durability_advances_by_itself_once_enough_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let store = VersionStore::open_tiny(directory.path()).unwrap();
    let mut revision = 0;
    // Ends as soon as it is so; a store that never flushed by itself would write on until the test is given up.
    while store.durable().is_none() {
        revision += 1;
        submit(&store, vec![put(b"k", revision)], state(revision)).unwrap();
    }
}

#[test]
fn waiting_for_what_is_not_submitted_ends_with_the_time_allowed() {
    let directory = tempfile::tempdir().unwrap();
    let store = VersionStore::open(directory.path()).unwrap();
    submit(&store, vec![put(b"a", 1)], state(1)).unwrap();
    assert_eq!(store.wait_written(Revision(1), GENEROUS).unwrap(), Revision(1));
    assert_eq!(store.wait_written(Revision(2), Duration::from_millis(1)).unwrap(), Revision(1));
}

#[test]
fn a_directory_in_use_or_not_ours_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let store = VersionStore::open(directory.path()).unwrap();
    assert!(matches!(VersionStore::open(directory.path()), Err(StorageError::Locked { .. })));
    drop(store);
    VersionStore::open(directory.path()).unwrap();

    let foreign = tempfile::tempdir().unwrap();
    fs::write(foreign.path().join("thesis.tex"), "years of work").unwrap();
    assert!(matches!(VersionStore::open(foreign.path()), Err(StorageError::Foreign { .. })));

    let log = tempfile::tempdir().unwrap();
    drop(crate::storage::RocksDBStorageEngine::open(log.path()).unwrap());
    assert!(matches!(VersionStore::open(log.path()), Err(StorageError::Foreign { .. })));
}

#[test]
fn a_directory_of_a_newer_format_is_refused() {
    let directory = filled();
    mark_as(directory.path(), "d-engine versions 3");
    let refused = VersionStore::open(directory.path()).err();
    assert!(matches!(refused, Some(StorageError::NewerFormat { found: 3, supported: 2, .. })), "{refused:?}");
}

/// It has no index, so its history could not be followed.
#[test]
fn a_directory_of_the_format_before_is_refused() {
    let directory = filled();
    mark_as(directory.path(), "d-engine versions 1");
    let refused = VersionStore::open(directory.path()).err();
    assert!(matches!(refused, Some(StorageError::OlderFormat { found: 1, supported: 2, .. })), "{refused:?}");
}

fn mark_as(path: &Path, content: &str) {
    let marker = format!("{content} {:08x}\n", crc32c::crc32c(content.as_bytes()));
    fs::write(path.join("FORMAT"), marker).unwrap();
}

#[test]
fn a_missing_file_is_corruption_not_an_empty_store() {
    for name in ["CURRENT", "sst"] {
        let directory = filled();
        for file in fs::read_dir(directory.path()).unwrap() {
            let path = file.unwrap().path();
            if path.to_string_lossy().ends_with(name) {
                fs::remove_file(path).unwrap();
            }
        }
        let refused = VersionStore::open(directory.path()).err();
        assert!(matches!(refused, Some(StorageError::Corrupt { .. })), "without {name}: {refused:?}");
    }
}

#[test]
fn damage_to_a_table_is_never_served() {
    let intact = filled();
    let expected = read_everything(intact.path()).unwrap();
    assert_eq!((expected.newest.len(), expected.changes.len(), expected.records.len()), (KEYS.len(), 100, 2));
    let directory = filled();
    for table in tables(directory.path()) {
        let length = fs::metadata(&table).unwrap().len();
        for offset in (0..length).step_by(37) {
            flip(&table, offset);
            let outcome = read_everything(directory.path());
            match outcome {
                // Bytes that nothing reads, such as padding.
                Ok(found) => assert_eq!(found, expected, "{} at {offset}", table.display()),
                Err(error) => {
                    assert!(matches!(error, StorageError::Corrupt { .. }), "{} at {offset}: {error}", table.display());
                }
            }
            flip(&table, offset);
        }
    }
    assert_eq!(read_everything(directory.path()).unwrap(), expected);
}

fn flip(path: &Path, offset: u64) {
    let mut file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.read_exact(&mut byte).unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.write_all(&[byte[0] ^ 0x40]).unwrap();
}

/// Writes past the store what [`filled`] left, as no sound program would.
fn tamper(path: &Path, change: impl FnOnce(&mut WriteBatch)) {
    let rocks = DB::open_default(path).unwrap();
    let mut batch = WriteBatch::default();
    change(&mut batch);
    rocks.write_opt(batch, &WriteOptions::default()).unwrap();
}

fn version_key(key: &[u8], revision: u64) -> Vec<u8> {
    let mut version_key = Vec::new();
    encoding::put_version_key(&mut version_key, key, Revision(revision));
    version_key
}

/// Damage that RocksDB's own checksums cannot see, since it happened before they were made.
#[test]
fn a_record_that_is_not_what_was_written_is_corruption() {
    let key = version_key(b"a", 2);
    let mut record = Vec::new();
    encoding::encode_change(&mut record, &key, &put(b"a", 2));
    let (mut index_key, mut entry) = (Vec::new(), Vec::new());
    encoding::IndexEntry::of(&put(b"a", 2)).encode(&mut index_key, &mut entry);
    let lease_key = encoding::record_key(RecordKey::Lease(LeaseId(7))).to_vec();
    let lease = encoding::encode_record(&lease_key, b"what it holds");
    let damaged = |record: &[u8]| {
        let mut damaged = record.to_vec();
        *damaged.last_mut().unwrap() ^= 1;
        damaged
    };

    let cases = [
        ("value", key, damaged(&record)),
        ("place", version_key(b"b", 2), record.clone()),
        ("key", b"v\0\x03".to_vec(), record),
        ("state", encoding::STATE_KEY.to_vec(), b"nonsense".to_vec()),
        ("index", index_key, damaged(&entry)),
        ("place in the index", [&encoding::index_bound(Revision(2)), &b"z"[..]].concat(), entry),
        ("lease", lease_key.clone(), damaged(&lease)),
        ("place of a lease", encoding::record_key(RecordKey::Lease(LeaseId(8))).to_vec(), lease.clone()),
        ("kind of a lease", encoding::record_key(RecordKey::Session(SessionId(7))).to_vec(), lease.clone()),
        ("key of a lease", [&lease_key, &b"\0"[..]].concat(), lease),
    ];
    for (what, key, record) in cases {
        let directory = filled();
        tamper(directory.path(), |batch| batch.put(key, record));
        let outcome = VersionStore::open(directory.path()).and_then(|store| {
            // From the revision with the damage on: the index has nothing before its first revision.
            let found = scan_all(&store, 2)?;
            store.changes(b"", None, Revision(0), Revision(100), false, usize::MAX)?;
            store.recovered_records()?;
            Ok(found)
        });
        assert!(matches!(outcome, Err(StorageError::Corrupt { .. })), "{what}: {outcome:?}");
    }
}

/// Both the version that a revision left and the one it replaced.
#[test]
fn a_version_that_the_index_lists_and_is_not_there_is_corruption() {
    for revision in [50, 50 - 7] {
        let directory = filled();
        let key = KEYS[50 % KEYS.len()];
        tamper(directory.path(), |batch| batch.delete(version_key(key, revision)));
        let store = VersionStore::open(directory.path()).unwrap();
        let outcome = store.changes(b"", None, Revision(50), Revision(50), true, usize::MAX);
        assert!(matches!(outcome, Err(StorageError::Corrupt { .. })), "{outcome:?}");
    }
}

/// What to remove is no longer known, so the node must not go on as if it were.
#[test]
fn cleaning_that_meets_damage_stops_the_writer() {
    let directory = filled();
    tamper(directory.path(), |batch| batch.put([&encoding::index_bound(Revision(3)), &b"a"[..]].concat(), b"nonsense"));
    let store = VersionStore::open(directory.path()).unwrap();
    submit(&store, Vec::new(), StoreState { compacted: Revision(10), ..state(100) }).unwrap();
    let refused = store.wait_written(Revision(101), GENEROUS);
    assert!(matches!(refused, Err(StorageError::Corrupt { .. })), "{refused:?}");
    assert!(matches!(submit(&store, Vec::new(), state(101)), Err(StorageError::Corrupt { .. })));
}

#[test]
fn after_a_failed_write_nothing_is_acknowledged_any_more() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("versions");
    let store = VersionStore::open(&path).unwrap();
    submit(&store, vec![put(b"a", 1)], state(1)).unwrap();
    assert_eq!(store.wait_written(Revision(1), GENEROUS).unwrap(), Revision(1));
    fs::remove_dir_all(&path).unwrap();
    assert!(matches!(store.flush(), Err(StorageError::Io { .. })));
    assert_eq!(store.durable(), None);
    assert!(matches!(submit(&store, vec![put(b"a", 2)], state(2)), Err(StorageError::Io { .. })));
    assert!(matches!(store.wait_written(Revision(2), GENEROUS), Err(StorageError::Io { .. })));
    assert!(matches!(store.flush(), Err(StorageError::Io { .. })));
}
