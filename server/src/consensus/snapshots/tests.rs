//! Crashes at every step of building, receiving and installing, on real disks with the key-value store.

use bytes::Bytes;
use d_engine_proto::{LogIndex, Revision, Term, v1};
use prost::Message;
use tempfile::TempDir;

use super::*;
use crate::limits::SNAPSHOT_CHUNK_BYTES;
use crate::state_machine::kv::KvStateMachine;
use crate::state_machine::{CommittedEntry, EntryContent, StoreTime};
use crate::steps::tests::interrupted;
use crate::storage::versions::ScanOrder;
use crate::storage::{Durability, LogRecord, MemoryStorageEngine, StorageEngine, StorageOperation};

fn at(term: u64, index: u64) -> LogPosition {
    LogPosition { term: Term(term), index: LogIndex(index) }
}

/// Entry number `index` puts a key of its own and one that all put, with values that fill some pieces.
fn apply(kv: &KvStateMachine, indexes: std::ops::RangeInclusive<u64>) {
    for index in indexes {
        let put = |key: String| {
            let value = Bytes::from(format!("{index} ").repeat(SNAPSHOT_CHUNK_BYTES / 8));
            let put = v1::PutRequest { key: key.into(), value, ..Default::default() };
            let command = v1::Command { command: Some(v1::command::Command::Put(put)), ..Default::default() };
            Bytes::from(command.encode_to_vec())
        };
        let commands = vec![put(format!("own {index}")), put("shared".into())];
        let content = EntryContent::Commands { store_time: StoreTime::from_nanos(index), commands };
        kv.apply(&CommittedEntry { position: at(1, index), content }).unwrap();
    }
}

/// Everything that the store shows and remembers.
fn contents(kv: &KvStateMachine) -> Vec<String> {
    kv.flush().unwrap();
    let history = kv.history();
    let mut cursor = history.scan(&[], None, Revision(u64::MAX), ScanOrder::Ascending);
    let mut found = vec![format!("{:?}", kv.current().state())];
    while let Some(version) = cursor.advance().unwrap() {
        found.push(format!("{:?} {}", version, version.value.len()));
    }
    let last = kv.current().revision();
    let (changes, _) = history.changes(b"", None, Revision(1), last, true, usize::MAX).unwrap();
    found.extend(changes.iter().map(|change| format!("{change:?}")));
    found
}

/// A node's disk.
struct Disk {
    directory: TempDir,
    log: MemoryStorageEngine,
}

struct Opened {
    kv: KvStateMachine,
    snapshots: Snapshots,
}

impl Disk {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap(), log: MemoryStorageEngine::default() }
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("snapshots")
    }

    /// As a start does it.
    fn open(&self) -> Opened {
        let kv = KvStateMachine::open(&self.directory.path().join("state")).unwrap();
        let snapshots = Snapshots::open(&self.root()).unwrap();
        recover(&snapshots, &self.log, &kv).unwrap();
        Opened { kv, snapshots }
    }

    fn append(&self, positions: impl IntoIterator<Item = LogPosition>) {
        let append = |position| StorageOperation::Append(LogRecord { position, payload: Bytes::from_static(b"x") });
        let operations: Vec<_> = positions.into_iter().map(append).collect();
        self.log.write(&operations, Durability::Fsync).unwrap();
    }

    fn snapshots_there(&self) -> usize {
        fs::read_dir(self.root()).unwrap().count()
    }
}

#[test]
fn a_crash_at_any_step_of_building_leaves_the_last_snapshot_or_the_new_one() {
    let disk = Disk::new();
    let mut number = 0;
    loop {
        let Opened { kv, snapshots } = disk.open();
        let before = snapshots.current().map(|current| current.position());
        let next = kv.applied().position.map_or(1, |position| position.index.get() + 1);
        apply(&kv, next..=next + 1);
        let (built, passed) = interrupted(number, || snapshots.build(&kv));
        drop((kv, snapshots));

        let Opened { kv, snapshots } = disk.open();
        let current = snapshots.current();
        let found = current.as_ref().map(|current| current.position());
        assert!(found == before || found == Some(at(1, next + 1)), "{found:?} after {passed:?}");
        if let Some(current) = &current {
            current.manifest.verify(&current.directory).unwrap();
        }
        assert!(disk.snapshots_there() <= 1, "after {passed:?}");
        if built.is_ok() {
            assert_eq!(found, kv.applied().position);
            break;
        }
        number += 1;
    }
    assert!(number >= 5, "only {number} steps");
}

/// Sends the whole snapshot, installs it as `Applier` does, and answers where it goes on if that is interrupted.
fn deliver(from: &Arc<Snapshot>, to: &Opened, log: &MemoryStorageEngine) -> Result<(), ReceiveError> {
    let (transfer, resume) = to.snapshots.begin(from.manifest.clone())?;
    let mut outgoing = Outgoing::new(from.clone(), resume);
    while let Some(piece) = outgoing.next()? {
        to.snapshots.take(transfer, &piece)?;
    }
    assert!(to.snapshots.is_received(transfer));
    let snapshot = to.snapshots.received(transfer)?;
    log.write(&[StorageOperation::PurgeTo(snapshot.position())], Durability::Fsync)?;
    steps::passed("install/purged")?;
    to.kv.restore(&snapshot.state())?;
    steps::passed("install/restored")?;
    to.snapshots.replace(snapshot);
    to.snapshots.sweep()?;
    Ok(())
}

#[test]
fn a_crash_at_any_step_of_receiving_and_installing_leaves_the_old_state_or_the_new_one() {
    let source = Disk::new();
    let Opened { kv, snapshots } = source.open();
    apply(&kv, 1..=10);
    let snapshot = snapshots.build(&kv).unwrap().unwrap();
    let new = contents(&kv);
    let mut steps_seen = Vec::new();
    for number in 0.. {
        let disk = Disk::new();
        disk.append((1..=7).map(|index| at(1, index)));
        let opened = disk.open();
        apply(&opened.kv, 1..=5);
        opened.kv.flush().unwrap();
        let old = contents(&opened.kv);
        let (delivered, passed) = interrupted(number, || deliver(&snapshot, &opened, &disk.log));
        drop(opened);

        let opened = disk.open();
        let found = contents(&opened.kv);
        let is_new = found == new;
        assert!(is_new || found == old, "neither after {passed:?}");
        let has_arrived = passed.contains(&"receive/renamed") || opened.snapshots.current().is_some();
        assert_eq!(is_new, has_arrived, "after {passed:?}");
        let state = disk.log.state().unwrap();
        assert!(state.last.max(state.purged) >= opened.kv.applied().position, "the log ends before the state");
        assert_eq!(state.purged, is_new.then_some(at(1, 10)), "after {passed:?}");
        // Entries that follow are taken.
        if is_new {
            disk.append([at(2, 11)]);
            apply(&opened.kv, 11..=11);
        } else {
            deliver(&snapshot, &opened, &disk.log).unwrap();
            assert_eq!(contents(&opened.kv), new, "delivered again after {passed:?}");
        }
        assert!(disk.snapshots_there() <= 1, "after {passed:?}");
        drop(opened);
        // The next start leaves one directory, by its plain name.
        drop(disk.open());
        let mut names: Vec<_> =
            fs::read_dir(disk.directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["snapshots", "state"], "after {passed:?}");
        steps_seen = passed;
        if delivered.is_ok() {
            break;
        }
    }
    for step in ["receive/begun", "receive/piece", "receive/renamed", "install/purged", "install/switched"] {
        assert!(steps_seen.contains(&step), "{step} was never passed");
    }
}

#[test]
fn a_log_that_contradicts_an_arrived_snapshot_is_dropped_and_one_that_continues_it_is_kept() {
    let source = Disk::new();
    let Opened { kv, snapshots } = source.open();
    apply(&kv, 1..=20);
    let snapshot = snapshots.build(&kv).unwrap().unwrap();
    for (term, kept) in [(1, Some(at(1, 25))), (3, None)] {
        let disk = Disk::new();
        disk.append((1..=10).map(|index| at(1, index)).chain((11..=25).map(|index| at(term, index))));
        let opened = disk.open();
        let arrive = || {
            let (transfer, resume) = opened.snapshots.begin(snapshot.manifest.clone()).unwrap();
            let mut outgoing = Outgoing::new(snapshot.clone(), resume);
            while let Some(piece) = outgoing.next().unwrap() {
                opened.snapshots.take(transfer, &piece).unwrap();
            }
            opened.snapshots.received(transfer).unwrap();
        };
        arrive();
        drop(opened);
        let opened = disk.open();
        assert_eq!(opened.kv.applied().position, Some(at(1, 20)));
        let state = disk.log.state().unwrap();
        assert_eq!((state.last, state.purged), (kept, Some(at(1, 20))));
        disk.append([at(4, kept.map_or(21, |last| last.index.get() + 1))]);
    }
}

#[test]
fn a_transfer_goes_on_after_a_break_and_fetches_again_what_was_damaged() {
    let source = Disk::new();
    let Opened { kv, snapshots } = source.open();
    apply(&kv, 1..=20);
    let snapshot = snapshots.build(&kv).unwrap().unwrap();
    let disk = Disk::new();
    let opened = disk.open();
    let (transfer, resume) = opened.snapshots.begin(snapshot.manifest.clone()).unwrap();
    let mut outgoing = Outgoing::new(snapshot.clone(), resume);
    // Into the middle of the largest file.
    let (file, _) = snapshot.manifest.files().iter().enumerate().max_by_key(|(_, file)| file.bytes).unwrap();
    let mut last = v1::SnapshotChunk::default();
    while last.file as usize != file || last.offset == 0 {
        last = outgoing.next().unwrap().unwrap();
        opened.snapshots.take(transfer, &last).unwrap();
    }
    let next = outgoing.next().unwrap().unwrap();
    let damaged = v1::SnapshotChunk { data: vec![7; next.data.len()].into(), ..next.clone() };
    assert!(matches!(opened.snapshots.take(transfer, &damaged), Err(ReceiveError::Refused(_))));
    let place = (last.file, last.offset + last.data.len() as u64);

    // In the same process, and in the next one.
    let (second, resume) = opened.snapshots.begin(snapshot.manifest.clone()).unwrap();
    assert_eq!((resume.file, resume.offset), place);
    assert!(matches!(opened.snapshots.take(transfer, &next), Err(ReceiveError::Superseded)));
    opened.snapshots.take(second, &next).unwrap();
    drop(opened);
    let opened = disk.open();
    let (_, resume) = opened.snapshots.begin(snapshot.manifest.clone()).unwrap();
    assert_eq!((resume.file, resume.offset), (place.0, place.1 + next.data.len() as u64));
    // A sender that begins there, in the middle of a file, sends what belongs there.
    assert_eq!(Outgoing::new(snapshot.clone(), resume).next().unwrap(), outgoing.next().unwrap());
    drop(opened);

    // What is there is not what was sent: found at the end of the file, and only that file is fetched again.
    let path = disk.root().join(RECEIVING).join(&snapshot.manifest.files()[file].path);
    let mut bytes = fs::read(&path).unwrap();
    bytes[1000] ^= 1;
    fs::write(&path, bytes).unwrap();
    let opened = disk.open();
    let refused = deliver(&snapshot, &opened, &disk.log).unwrap_err();
    assert!(matches!(&refused, ReceiveError::Refused(message) if message.contains("checksum")), "{refused}");
    let (_, resume) = opened.snapshots.begin(snapshot.manifest.clone()).unwrap();
    assert_eq!((resume.file as usize, resume.offset), (file, 0));
    deliver(&snapshot, &opened, &disk.log).unwrap();
    assert_eq!(contents(&opened.kv), contents(&kv));
}

#[test]
fn another_snapshot_begins_anew_and_a_damaged_one_is_not_sent_and_is_built_again() {
    let source = Disk::new();
    let Opened { kv, snapshots } = source.open();
    apply(&kv, 1..=10);
    let first = snapshots.build(&kv).unwrap().unwrap();
    let disk = Disk::new();
    let opened = disk.open();
    let (transfer, resume) = opened.snapshots.begin(first.manifest.clone()).unwrap();
    let mut outgoing = Outgoing::new(first.clone(), resume);
    for _ in 0..3 {
        opened.snapshots.take(transfer, &outgoing.next().unwrap().unwrap()).unwrap();
    }
    apply(&kv, 11..=12);
    let second = snapshots.build(&kv).unwrap().unwrap();
    let (_, resume) = opened.snapshots.begin(second.manifest.clone()).unwrap();
    // The first that is not empty.
    let first_file = second.manifest.files().iter().position(|file| file.bytes > 0).unwrap();
    assert_eq!((resume.file as usize, resume.offset), (first_file, 0));
    // It is being sent, so it is still there, until nobody holds it.
    assert!(first.directory.exists());
    let gone = first.directory.clone();
    drop((first, outgoing));
    snapshots.sweep().unwrap();
    assert!(!gone.exists());

    let largest = second.manifest.files().iter().max_by_key(|file| file.bytes).unwrap();
    let path = second.directory.join(&largest.path);
    let mut bytes = fs::read(&path).unwrap();
    bytes[1000] ^= 1;
    // The state machine has the file too, under another name.
    fs::remove_file(&path).unwrap();
    fs::write(&path, bytes).unwrap();
    let refused = deliver(&second, &opened, &disk.log).unwrap_err();
    assert!(
        matches!(refused, ReceiveError::Storage(StorageError::Corrupt { .. }) | ReceiveError::Refused(_)),
        "{refused}"
    );
    assert!(opened.kv.applied().position.is_none(), "nothing of it was installed");
    // Its own reader notices when it reads the whole file.
    let mut outgoing = Outgoing::new(second.clone(), v1::snapshot_response::Resume::default());
    while let Ok(Some(_)) = outgoing.next() {}
    assert!(second.is_damaged());
    let third = snapshots.build(&kv).unwrap().unwrap();
    assert_eq!(third.position(), second.position());
    deliver(&third, &opened, &disk.log).unwrap();
    assert_eq!(contents(&opened.kv), contents(&kv));
}

#[test]
fn no_flipped_byte_of_a_manifest_goes_unnoticed_and_no_file_lies_outside() {
    let disk = Disk::new();
    let Opened { kv, snapshots } = disk.open();
    apply(&kv, 1..=2);
    let snapshot = snapshots.build(&kv).unwrap().unwrap();
    let path = snapshot.directory.join(manifest::FILE);
    let good = fs::read(&path).unwrap();
    for position in 0..good.len() {
        let mut bytes = good.clone();
        bytes[position] ^= 1;
        fs::write(&path, bytes).unwrap();
        Manifest::read(&snapshot.directory).unwrap_err();
    }
    for name in ["../state", "/etc/passwd", "", ".", "a/../../b", manifest::FILE] {
        let file = v1::SnapshotFile { path: name.to_owned(), bytes: 1, crc32c: 0 };
        Manifest::new(v1::SnapshotManifest { index: 1, term: 1, files: vec![file], ..Default::default() }).unwrap_err();
    }
}

#[test]
fn a_damaged_snapshot_is_given_up_unless_the_state_needs_it() {
    let source = Disk::new();
    let Opened { kv, snapshots } = source.open();
    apply(&kv, 1..=5);
    let snapshot = snapshots.build(&kv).unwrap().unwrap();
    for needed in [false, true] {
        let disk = Disk::new();
        disk.append((1..=5).map(|index| at(1, index)));
        let opened = disk.open();
        let (transfer, resume) = opened.snapshots.begin(snapshot.manifest.clone()).unwrap();
        let mut outgoing = Outgoing::new(snapshot.clone(), resume);
        while let Some(piece) = outgoing.next().unwrap() {
            opened.snapshots.take(transfer, &piece).unwrap();
        }
        let arrived = opened.snapshots.received(transfer).unwrap();
        let path = arrived.directory.join(&arrived.manifest.files()[0].path);
        fs::write(path, "short").unwrap();
        if needed {
            disk.log.write(&[StorageOperation::PurgeTo(at(1, 5))], Durability::Fsync).unwrap();
        }
        drop(opened);
        let kv = KvStateMachine::open(&disk.directory.path().join("state")).unwrap();
        let snapshots = Snapshots::open(&disk.root()).unwrap();
        let recovered = recover(&snapshots, &disk.log, &kv);
        if needed {
            assert!(matches!(recovered, Err(StorageError::Corrupt { .. })), "{recovered:?}");
        } else {
            recovered.unwrap();
            assert!(snapshots.current().is_none() && disk.snapshots_there() == 0);
        }
    }
}
