//! What comes of an archive, whole and damaged. A real directory, and no node.

use std::fs;
use std::path::PathBuf;

use bytes::Bytes;
use d_engine_proto::v1::{self, command::Command as Change};
use d_engine_proto::{Epoch, LogIndex, NodeId, Revision, Term};
use prost::Message;

use super::*;
use crate::config::LogEngine;
use crate::node::{LOG_DIRECTORY, STATE_DIRECTORY};
use crate::state_machine::kv::{KvStateMachine, REVISION_GAP};
use crate::state_machine::{CommittedEntry, EntryContent, StateMachine, StoreTime};
use crate::storage::{LogPosition, RocksDBStorageEngine, StorageEngine};

const KEYS: u64 = 40;

fn commands(changes: Vec<Change>) -> EntryContent {
    let commands = changes.into_iter().map(|change| v1::Command::from(change).encode_to_vec().into()).collect();
    EntryContent::Commands { store_time: StoreTime(std::time::Duration::from_secs(5)), commands }
}

/// A store with keys, a lease that is half over, and a session.
fn fill(kv: &KvStateMachine) {
    let grant = v1::LeaseGrantRequest { ttl_ms: 10_000, lease: 77, session: None };
    let mut changes =
        vec![Change::LeaseGrant(grant), Change::SessionRegister(v1::SessionRegisterRequest { ttl_ms: 10_000 })];
    for key in 0..KEYS {
        let lease = if key == 0 { 77 } else { 0 };
        let (key, value) = (Bytes::from(format!("key-{key:02}")), Bytes::from(vec![7; 20_000]));
        changes.push(Change::Put(v1::PutRequest { key, value, lease, ..v1::PutRequest::default() }));
    }
    let position = |index| LogPosition { term: Term(3), index: LogIndex(index) };
    kv.apply(&CommittedEntry { position: position(8), content: commands(changes) }).unwrap();
    let later = EntryContent::Commands {
        store_time: StoreTime(std::time::Duration::from_secs(9)),
        commands: vec![v1::Command::from(Change::Tick(v1::Tick {})).encode_to_vec().into()],
    };
    kv.apply(&CommittedEntry { position: position(9), content: later }).unwrap();
}

struct Fixture {
    directory: tempfile::TempDir,
    archive: PathBuf,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let kv = KvStateMachine::open(&directory.path().join("source")).unwrap();
        fill(&kv);
        let origin = Origin { cluster_id: 0xabc, node_id: NodeId(2), unix_ms: 1 };
        let copy = directory.path().join("copy");
        let backup = Backup::begin(&kv, &copy, origin).unwrap();
        let archive = directory.path().join("archive");
        let mut bytes = Vec::new();
        backup.write(&mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, backup.archive_bytes(), "as it was foretold");
        fs::write(&archive, bytes).unwrap();
        drop(backup);
        assert!(!copy.exists(), "the copy goes with the backup");
        Self { directory, archive }
    }

    fn node(&self) -> NewNode {
        NewNode {
            data_directory: self.directory.path().join("data"),
            node_id: NodeId(5),
            peer_address: "127.0.0.1:1".to_owned(),
            client_address: "127.0.0.1:2".to_owned(),
            log_engine: LogEngine::RocksDb,
        }
    }
}

#[test]
fn an_archive_says_what_it_holds() {
    let fixture = Fixture::new();
    let archive = Archive::open(&fixture.archive).unwrap();
    let manifest = archive.manifest().clone();
    assert_eq!((manifest.cluster_id, manifest.epoch, manifest.node_id), (0xabc, 0, 2));
    assert_eq!((manifest.revision, manifest.term, manifest.index), (KEYS, 3, 9));
    assert_eq!((manifest.keys, manifest.leases, manifest.sessions), (KEYS, 1, 1));
    archive.verify().unwrap();
}

#[test]
fn a_restored_node_begins_a_new_epoch_behind_any_revision_that_was_issued() {
    let fixture = Fixture::new();
    let node = fixture.node();
    let restored = restore(&fixture.archive, &node).unwrap();
    assert_eq!(restored.revision_before, Revision(KEYS));
    assert_eq!((restored.epoch, restored.keys, restored.leases), (Epoch(1), KEYS, 1));
    assert_ne!(restored.cluster_id, 0xabc);

    let kv = KvStateMachine::open(&node.data_directory.join(STATE_DIRECTORY)).unwrap();
    let store = kv.current();
    assert_eq!(store.revision(), Revision(KEYS + REVISION_GAP));
    assert_eq!(store.compacted(), store.revision(), "older history is compacted");
    assert_eq!((store.key_count(), store.session_count()), (KEYS, 0), "sessions are dropped");
    let lease = store.lease(d_engine_proto::LeaseId(77)).unwrap();
    assert_eq!(lease.deadline, StoreTime(std::time::Duration::from_secs(19)), "its full time, from now on");
    assert_eq!(lease.key_count, 1);
    let found = store.get(&v1::GetRequest { key: Bytes::from_static(b"key-07"), read: None }).unwrap().kv.unwrap();
    assert_eq!((found.value.len(), found.mod_revision), (20_000, 8));

    let log = RocksDBStorageEngine::open(node.data_directory.join(LOG_DIRECTORY)).unwrap();
    let state = log.state().unwrap();
    let identity = state.identity.unwrap();
    assert_eq!((identity.node_id, identity.cluster_id), (NodeId(5), Some(restored.cluster_id)));
    assert_eq!(state.purged, store.state().position);
    assert!(!node.data_directory.join("restoring").exists());
}

#[test]
fn each_restore_is_another_cluster_and_what_is_restored_again_is_another_epoch() {
    let fixture = Fixture::new();
    let first = restore(&fixture.archive, &fixture.node()).unwrap();
    let again = NewNode { data_directory: fixture.directory.path().join("again"), ..fixture.node() };
    let second = recover(&fixture.node().data_directory, &again).unwrap();
    assert_ne!(first.cluster_id, second.cluster_id);
    assert_eq!(second.epoch, Epoch(2));
    assert_eq!(second.revision, Revision(first.revision.get() + REVISION_GAP));
    assert_eq!(second.keys, KEYS);
}

#[test]
fn every_byte_of_an_archive_counts() {
    let fixture = Fixture::new();
    let whole = fs::read(&fixture.archive).unwrap();
    let damaged = fixture.directory.path().join("damaged");
    let verdict = |bytes: &[u8]| {
        fs::write(&damaged, bytes).unwrap();
        Archive::open(&damaged).and_then(Archive::verify)
    };
    verdict(&whole).unwrap();
    // Every byte of the head and the end, and some between.
    let step = whole.len() / 97;
    let places = (0..300).chain((0..whole.len()).step_by(step)).chain(whole.len() - 40..whole.len());
    for place in places {
        let mut bytes = whole.clone();
        bytes[place] ^= 0x10;
        assert!(verdict(&bytes).is_err(), "byte {place}");
    }
    for length in (0..whole.len()).step_by(step).chain(whole.len() - 30..whole.len()) {
        let refused = verdict(&whole[..length]).unwrap_err();
        assert!(matches!(refused, BackupError::Truncated { .. }), "{length}: {refused}");
        assert!(refused.to_string().contains("cut short"), "{refused}");
    }
    let mut longer = whole.clone();
    longer.push(0);
    assert!(matches!(verdict(&longer), Err(BackupError::Damaged { .. })));
    // Two whole chunks in the wrong order: each has its checksum, the archive has its own.
    let chunk = 9 + (256 << 10);
    let start = 20 + 9 + Archive::open(&fixture.archive).unwrap().manifest().encoded_len();
    let mut swapped = whole.clone();
    swapped.copy_within(start + chunk..start + 2 * chunk, start);
    swapped[start + chunk..start + 2 * chunk].copy_from_slice(&whole[start..start + chunk]);
    if swapped != whole {
        assert!(matches!(verdict(&swapped), Err(BackupError::Damaged { .. })), "swapped chunks");
    }
    let mut newer = whole;
    newer[19] = 9;
    let refused = verdict(&newer).unwrap_err();
    assert!(matches!(refused, BackupError::Newer { found: 9, .. }), "{refused}");
    assert!(matches!(verdict(b"something else than an archive"), Err(BackupError::Foreign { .. })));
}

#[test]
fn a_restore_that_fails_leaves_the_directory_as_it_was() {
    let fixture = Fixture::new();
    let mut bytes = fs::read(&fixture.archive).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&fixture.archive, bytes).unwrap();
    let node = fixture.node();
    restore(&fixture.archive, &node).unwrap_err();
    assert_eq!(fs::read_dir(&node.data_directory).unwrap().count(), 0);

    fs::write(node.data_directory.join("precious"), "").unwrap();
    let refused = restore(&fixture.archive, &node).unwrap_err();
    assert!(refused.to_string().contains("precious"), "{refused}");
    assert!(node.data_directory.join("precious").exists());

    let interrupted = fixture.directory.path().join("interrupted");
    fs::create_dir_all(interrupted.join("restoring")).unwrap();
    assert!(matches!(refuse_unfinished(&interrupted), Err(BackupError::Unfinished { .. })));
}
