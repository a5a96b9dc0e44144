//! Crashes imagined at every call the engine makes to the disk, from a record of what it did: the process is killed, in
//! the midst of a write too, or the power fails and takes any sectors and names that were not synced.

use std::collections::BTreeMap;

use super::*;
use crate::storage::segment_engine::disk::record::{self, Step};

/// What a crash can look like from here on.
#[derive(Clone, Default)]
struct Disk {
    files: Vec<Content>,
    names: BTreeMap<String, usize>,
    synced_names: BTreeMap<String, usize>,
    /// Changes of names since the directory was synced: from, to.
    renames: Vec<(String, Option<String>)>,
}

#[derive(Clone, Default)]
struct Content {
    now: Vec<u8>,
    synced: Vec<u8>,
    unsynced: Vec<(usize, Vec<u8>)>,
}

impl Content {
    fn write(&mut self, offset: usize, bytes: &[u8]) {
        put(&mut self.now, offset, bytes);
        self.unsynced.push((offset, bytes.to_vec()));
    }
}

fn put(content: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    if content.len() < offset + bytes.len() {
        content.resize(offset + bytes.len(), 0);
    }
    content[offset..offset + bytes.len()].copy_from_slice(bytes);
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

impl Disk {
    /// The files of a directory, all of them synced.
    fn of(directory: &Path) -> Self {
        let mut disk = Self::default();
        for path in recovery::files(directory).unwrap() {
            let now = fs::read(&path).unwrap();
            disk.names.insert(name(&path), disk.files.len());
            disk.files.push(Content { synced: now.clone(), now, unsynced: Vec::new() });
        }
        disk.synced_names = disk.names.clone();
        disk
    }

    fn file(&mut self, path: &Path) -> &mut Content {
        &mut self.files[self.names[&name(path)]]
    }

    fn apply(&mut self, step: &Step) {
        match step {
            Step::Create(path) => {
                self.names.insert(name(path), self.files.len());
                self.files.push(Content::default());
            }
            Step::Write(path, offset, bytes) => self.file(path).write(*offset, bytes),
            Step::Sync(path) => {
                let file = self.file(path);
                file.synced.clone_from(&file.now);
                file.unsynced.clear();
            }
            Step::Rename(from, to) => {
                let file = self.names.remove(&name(from)).unwrap();
                self.names.insert(name(to), file);
                self.renames.push((name(from), Some(name(to))));
            }
            Step::Remove(path) => {
                self.names.remove(&name(path)).unwrap();
                self.renames.push((name(path), None));
            }
            Step::SyncDirectory => {
                self.synced_names.clone_from(&self.names);
                self.renames.clear();
            }
            Step::Acknowledged { .. } => {}
        }
    }

    /// What the process that is killed leaves: of the call it was in, some bytes.
    fn kill_during(&mut self, step: Option<&Step>, rng: &mut Rng) {
        if let Some(Step::Write(path, offset, bytes)) = step {
            let done = rng.usize(0..=bytes.len());
            self.file(path).write(*offset, &bytes[..done]);
        }
    }

    /// What the power failure leaves: what was synced, and a part of the rest.
    fn cut_power(&mut self, rng: &mut Rng) {
        let likely = *rng.choice(&[0.0, 0.5, 0.9, 1.0]).unwrap();
        // What the directory held before: names that were changed since may be changed there or not, in their order.
        let mut names = self.synced_names.clone();
        let files: BTreeMap<String, usize> = self.names.clone();
        for (from, to) in self.renames.iter().take(rng.usize(0..=self.renames.len())) {
            let file = names.remove(from);
            if let Some(to) = to {
                // Made since, so it had no name before.
                let file = file.or_else(|| files.get(to).copied());
                names.extend(file.map(|file| (to.clone(), file)));
            }
        }
        self.names = names;
        for file in &mut self.files {
            let longest = file.now.len();
            let length = if rng.bool() { longest } else { rng.usize(file.synced.len()..=longest) };
            let mut left = file.synced.clone();
            left.resize(length, 0);
            for (offset, bytes) in file.unsynced.drain(..) {
                let mut start = 0;
                while start < bytes.len() {
                    let end = (start + 512 - (offset + start) % 512).min(bytes.len());
                    if rng.f64() < likely && offset + end <= length {
                        left[offset + start..offset + end].copy_from_slice(&bytes[start..end]);
                    }
                    start = end;
                }
            }
            file.now.clone_from(&left);
            file.synced = left;
        }
        self.synced_names.clone_from(&self.names);
        self.renames.clear();
    }

    fn lay_out(&self) -> tempfile::TempDir {
        let root = scratch();
        for (name, file) in &self.names {
            fs::write(root.path().join(name), &self.files[*file].now).unwrap();
        }
        root
    }
}

/// In memory, where there is such a place: what is tested is not whether this machine's disk keeps its word.
pub(super) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// What was written and which calls that took, with what the log is after each write.
struct Recording {
    disk: Disk,
    steps: Vec<Step>,
    history: Vec<Model>,
}

impl Recording {
    fn make(seed: u64, writes: usize, sizes: Sizes) -> Self {
        let mut rng = Rng::with_seed(seed);
        let root = scratch();
        drop(SegmentStorageEngine::open_sized(root.path(), sizes).unwrap());
        let disk = Disk::of(root.path());
        let mut model = Model::default();
        let mut history = vec![model.clone()];
        let ((), steps) = record::during(|| {
            let mut engine = SegmentStorageEngine::open_sized(root.path(), sizes).unwrap();
            for _ in 0..writes {
                let durability = if rng.bool() { Durability::Fsync } else { Durability::OperatingSystem };
                engine.write(&model.random_write(&mut rng), durability).unwrap();
                history.push(model.clone());
                let mut on_disk = durability == Durability::Fsync;
                if rng.u8(0..6) == 0 {
                    engine.sync().unwrap();
                    on_disk = true;
                }
                record::note(Step::Acknowledged { writes: history.len() - 1, on_disk });
                if rng.u8(0..20) == 0 {
                    drop(engine);
                    engine = SegmentStorageEngine::open_sized(root.path(), sizes).unwrap();
                }
            }
        });
        Self { disk, steps, history }
    }

    /// Opens what a crash left, after which at least `oldest` writes and at most one more than `newest` must be there.
    /// Answers how many are, and the calls that opening took.
    fn open(&self, disk: &Disk, oldest: usize, newest: usize, sizes: Sizes, context: &str) -> (usize, Vec<Step>) {
        let root = disk.lay_out();
        let (engine, steps) = record::during(|| SegmentStorageEngine::open_sized(root.path(), sizes));
        let engine = engine.unwrap_or_else(|error| panic!("{context}: {error}"));
        let state = engine.state().unwrap();
        let records = engine.read(LogIndex(0), LogIndex(u64::MAX), usize::MAX).unwrap();
        let candidates = oldest..=(newest + 1).min(self.history.len() - 1);
        let matches =
            |writes: &usize| self.history[*writes].state() == state && self.history[*writes].records() == records;
        let found = candidates.clone().rev().find(matches);
        let found = found.unwrap_or_else(|| panic!("{context}: holds none of the logs after writes {candidates:?}"));
        // It goes on from there, and what it writes next is found again.
        let mut model = self.history[found].clone();
        let mut rng = Rng::with_seed(found as u64);
        for _ in 0..3 {
            engine.write(&model.random_write(&mut rng), Durability::Fsync).unwrap();
        }
        drop(engine);
        let engine = SegmentStorageEngine::open_sized(root.path(), sizes).unwrap();
        suite::assert_matches(&engine, &model, &mut rng, context);
        (found, steps)
    }
}

/// Every call is crashed at, by kill and by power cut; and so is every call of the opening after that.
#[test]
fn no_crash_at_any_call_loses_what_was_acknowledged() {
    const SIZES: Sizes = Sizes { segment_bytes: 24 << 10, step_bytes: 4 << 10 };
    let seed = fastrand::u64(..);
    let mut rng = Rng::with_seed(seed);
    let mut opened_into_new_segments = 0;
    for round in 0..3 {
        let recording = Recording::make(seed.wrapping_add(round), 60, SIZES);
        let mut disk = recording.disk.clone();
        let (mut acknowledged, mut on_disk) = (0, 0);
        for (at, step) in recording.steps.iter().enumerate() {
            for power in [false, false, true, true] {
                let mut crashed = disk.clone();
                crashed.kill_during(Some(step), &mut rng);
                if power {
                    crashed.cut_power(&mut rng);
                }
                let oldest = if power { on_disk } else { acknowledged };
                let context = format!("seed {seed}, round {round}, step {at} ({}), power cut: {power}", kind(step));
                let (found, opening) = recording.open(&crashed, oldest, acknowledged, SIZES, &context);
                opened_into_new_segments += opening.iter().filter(|step| matches!(step, Step::Rename(..))).count();
                if rng.u8(0..8) != 0 {
                    continue;
                }
                // Opening is interrupted: what it found is found again, or what had been on the disk.
                for (at, step) in opening.iter().enumerate() {
                    let mut again = crashed.clone();
                    opening[..at].iter().for_each(|step| again.apply(step));
                    again.kill_during(Some(step), &mut rng);
                    let cut = rng.bool();
                    if cut {
                        again.cut_power(&mut rng);
                    }
                    let context = format!("{context}, then step {at} ({}) of opening, power cut: {cut}", kind(step));
                    let oldest = if cut && !power { on_disk } else { found };
                    recording.open(&again, oldest, found.saturating_sub(1), SIZES, &context);
                }
                // Once it is open, what it found is on the disk.
                let mut after = crashed;
                opening.iter().for_each(|step| after.apply(step));
                after.cut_power(&mut rng);
                let context = format!("{context}, opened, then a power cut");
                recording.open(&after, found, found.saturating_sub(1), SIZES, &context);
            }
            disk.apply(step);
            if let Step::Acknowledged { writes, on_disk: synced } = step {
                acknowledged = *writes;
                if *synced {
                    on_disk = *writes;
                }
            }
        }
        assert!(recording.steps.iter().any(|step| matches!(step, Step::Remove(_))), "seed {seed}: nothing was deleted");
    }
    assert!(opened_into_new_segments > 0, "seed {seed}: no crash left anything to drop");
}

/// The last write is cut off after every one of its bytes.
#[test]
fn a_write_cut_off_after_any_byte_is_dropped_as_a_whole() {
    let append = |index: u64, payload: &[u8]| {
        let position = LogPosition { term: Term(3), index: LogIndex(index) };
        StorageOperation::Append(LogRecord { position, payload: Bytes::copy_from_slice(payload) })
    };
    let vote = Vote { term: Term(3), node_id: NodeId(1), committed: false };
    let last = [append(3, &[0; 700]), append(4, &[7; 300]), StorageOperation::SaveVote(vote)];
    let root = scratch();
    let engine = SegmentStorageEngine::open_sized(root.path(), SMALL).unwrap();
    engine.write(&[append(1, b"one"), append(2, &[0; 900])], Durability::Fsync).unwrap();
    let before = Disk::of(root.path());
    let (_, steps) = record::during(|| engine.write(&last, Durability::Fsync).unwrap());
    let state = engine.state().unwrap();
    let [Step::Write(path, offset, bytes), Step::Sync(_)] = &steps[..] else { panic!("{steps:?}") };
    for length in 0..=bytes.len() {
        let mut disk = before.clone();
        disk.file(path).write(*offset, &bytes[..length]);
        let root = disk.lay_out();
        let engine = SegmentStorageEngine::open_sized(root.path(), SMALL).unwrap();
        let left = engine.state().unwrap();
        let entries = engine.read(LogIndex(0), LogIndex(9), usize::MAX).unwrap().len();
        match length == bytes.len() {
            true => assert_eq!((&left, entries), (&state, 4)),
            false => {
                assert_eq!((left.vote, left.last.unwrap().index, entries), (None, LogIndex(2), 2), "cut at {length}");
            }
        }
        engine.write(&[append(entries as u64 + 1, b"next")], Durability::Fsync).unwrap();
        drop(engine);
        let engine = SegmentStorageEngine::open_sized(root.path(), SMALL).unwrap();
        assert_eq!(engine.read(LogIndex(0), LogIndex(9), usize::MAX).unwrap().len(), entries + 1, "cut at {length}");
    }
}

fn kind(step: &Step) -> String {
    match step {
        Step::Write(path, offset, bytes) => format!("write {} bytes at {offset} of {}", bytes.len(), name(path)),
        Step::Create(path) => format!("create {}", name(path)),
        Step::Sync(path) => format!("sync {}", name(path)),
        Step::Rename(_, to) => format!("rename to {}", name(to)),
        Step::Remove(path) => format!("remove {}", name(path)),
        Step::SyncDirectory => "sync the directory".to_owned(),
        Step::Acknowledged { writes, .. } => format!("acknowledge write {writes}"),
    }
}
