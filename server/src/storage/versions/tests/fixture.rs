//! Directories written by earlier versions, kept beside this file: they open and hold what they held.

use d_engine_proto::SessionId;

use super::*;

/// Format 2, written by [`writes_the_fixture`]. Never written again: a new format gets a directory of its own.
const FORMAT_2: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/storage/versions/tests/format-2");

fn final_state() -> StoreState {
    StoreState {
        position: Some(LogPosition { term: Term(3), index: LogIndex(9) }),
        store_time: Duration::from_millis(1234),
        membership: Some((LogPosition { term: Term(1), index: LogIndex(1) }, Bytes::from_static(b"membership"))),
        revision: Revision(4),
        compacted: Revision(2),
        last_lease: LeaseId(7),
        last_session: SessionId(8),
        epoch: Epoch(0),
    }
}

fn version_of(key: &'static [u8], value: &'static [u8], create: u64, modified: u64, version: u64) -> Arc<KeyVersion> {
    let (key, value) = (Bytes::from_static(key), Bytes::from_static(value));
    let (create_revision, mod_revision) = (Revision(create), Revision(modified));
    Arc::new(KeyVersion { key, value, create_revision, mod_revision, version, lease: LeaseId(modified % 2 * 7) })
}

/// What each revision did, from the first on.
fn changes() -> Vec<Change> {
    let first = version_of(b"a\0", b"one", 1, 1, 1);
    let second = version_of(b"a\0", b"two", 1, 2, 2);
    let other = version_of(b"b", b"", 3, 3, 1);
    let change = |revision, after: Option<&Arc<KeyVersion>>, before: Option<&Arc<KeyVersion>>| Change {
        key: after.or(before).map(|version| version.key.clone()).unwrap_or_default(),
        revision: Revision(revision),
        after: after.cloned(),
        before: before.cloned(),
    };
    vec![
        change(1, Some(&first), None),
        change(2, Some(&second), Some(&first)),
        change(3, Some(&other), None),
        change(4, None, Some(&second)),
    ]
}

fn records() -> Vec<(RecordKey, Bytes)> {
    vec![
        (RecordKey::Lease(LeaseId(7)), Bytes::from_static(b"a lease")),
        (RecordKey::Session(SessionId(8)), Bytes::from_static(b"a session")),
    ]
}

#[test]
fn format_2_is_read() {
    let copy = tempfile::tempdir().unwrap();
    for file in fs::read_dir(FORMAT_2).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    let store = VersionStore::open(copy.path()).unwrap();
    assert_eq!(*store.recovered(), final_state());
    assert_eq!(store.recovered_records().unwrap(), records());
    let changes = changes();
    let (found, covered) = store.changes(&[], None, Revision(3), Revision(4), true, usize::MAX).unwrap();
    assert_eq!((found, covered), (changes[2..].to_vec(), Revision(4)));
    let current = scan(&store, &[], None, 4, ScanOrder::Ascending).unwrap();
    assert_eq!(current, [KeyVersion::clone(changes[2].after.as_ref().unwrap())]);
    let past = scan(&store, &[], None, 2, ScanOrder::Ascending).unwrap();
    assert_eq!(past, [KeyVersion::clone(changes[1].after.as_ref().unwrap())]);
}

#[test]
#[ignore = "writes the fixture, once per format"]
fn writes_the_fixture() {
    let root = tempfile::tempdir().unwrap();
    let store = VersionStore::open(root.path()).unwrap();
    let value = |bytes: &Bytes| Some(Arc::new(Plain(bytes.to_vec())) as Arc<dyn RecordValue>);
    let records = records().iter().map(|(key, bytes)| Record { key: *key, value: value(bytes) }).collect();
    store.submit(Submission { changes: Arc::new(changes()), records, state: final_state() }).unwrap();
    store.flush().unwrap();
    drop(store);
    fs::create_dir(FORMAT_2).unwrap();
    for file in fs::read_dir(root.path()).unwrap() {
        let file = file.unwrap();
        let name = file.file_name().into_string().unwrap();
        // Not the lock, the notes RocksDB takes, and its copies of the options.
        if !["LO", "OP", "ID"].contains(&&name[..2]) {
            fs::copy(file.path(), Path::new(FORMAT_2).join(name)).unwrap();
        }
    }
}
