//! Files are cut off, or bytes in them change: an error or the truth, never a wrong record and never a panic.

use super::*;

/// What a script left in a directory, and what it was after each write.
struct Original {
    root: tempfile::TempDir,
    history: Vec<Model>,
}

impl Original {
    /// Closed and opened twice on the way, so that tables, manifest and write-ahead log all hold part of it.
    fn write(seed: u64, writes: usize, sizes: Sizes) -> Self {
        let root = tempfile::tempdir().unwrap();
        let mut script = Script::new(seed);
        let mut history = vec![script.model.clone()];
        for part in 1..=3 {
            let engine = RocksDBStorageEngine::open_sized(root.path(), sizes).unwrap();
            while script.written < writes * part / 3 {
                let (operations, durability) = script.next();
                engine.write(&operations, durability).unwrap();
                history.push(script.model.clone());
            }
        }
        Self { root, history }
    }

    fn copy(&self) -> tempfile::TempDir {
        let copy = tempfile::tempdir().unwrap();
        for file in files(self.root.path(), |_| true) {
            fs::copy(&file, copy.path().join(file.file_name().unwrap())).unwrap();
        }
        copy
    }

    /// The first write, `oldest` or later, after which everything was as it is now, as far as it can be read. States
    /// alone repeat: a term and an index come back with another payload once they were truncated away.
    fn age(&self, engine: &RocksDBStorageEngine, oldest: usize) -> Option<usize> {
        let state = engine.state().ok()?;
        let reads = readable(engine, &state);
        let matches = |model: &Model| {
            model.state() == state
                && reads.iter().all(|(start, end, read)| model.read(*start, *end, usize::MAX) == *read)
        };
        (oldest..self.history.len()).find(|write| matches(&self.history[*write]))
    }
}

/// All records in one read, or one by one those that are not damaged.
fn readable(engine: &RocksDBStorageEngine, state: &StorageState) -> Vec<(LogIndex, LogIndex, Vec<LogRecord>)> {
    let (start, end) = (LogIndex(0), LogIndex(u64::MAX));
    if let Ok(records) = engine.read(start, end, usize::MAX) {
        return vec![(start, end, records)];
    }
    let last = state.last.map_or(0, |last| last.index.get());
    let ranges = (0..=last).map(|index| (LogIndex(index), LogIndex(index + 1)));
    ranges.filter_map(|(start, end)| Some((start, end, engine.read(start, end, usize::MAX).ok()?))).collect()
}

#[test]
fn a_write_ahead_log_cut_anywhere_leaves_the_writes_before_the_cut() {
    let seed = fastrand::u64(..);
    let mut rng = Rng::with_seed(seed);
    let original = Original::write(seed, 60, SIZES);
    let logs = files(original.root.path(), |name| name.ends_with(".log"));
    let log = logs.last().unwrap();
    let length = fs::metadata(log).unwrap().len();

    let mut cuts: Vec<_> = (0..60).map(|_| rng.u64(0..length)).chain([0, 1, 7, length - 1, length]).collect();
    cuts.sort_unstable();
    let mut oldest = 0;
    for cut in cuts {
        let copy = original.copy();
        let file = fs::OpenOptions::new().write(true).open(copy.path().join(log.file_name().unwrap())).unwrap();
        file.set_len(cut).unwrap();
        let context = format!("seed {seed}, cut at {cut} of {length}");
        let engine = RocksDBStorageEngine::open(copy.path()).unwrap_or_else(|error| panic!("{context}: {error}"));
        // A later cut keeps no less.
        oldest = original.age(&engine, oldest).unwrap_or_else(|| panic!("{context}: not a prefix of the writes"));
        suite::assert_matches(&engine, &original.history[oldest], &mut rng, &context);
    }
    assert!(original.history.last() == original.history.get(oldest), "seed {seed}: lost something without a cut");
}

#[test]
fn any_file_cut_anywhere_shows_an_error_or_the_truth() {
    let seed = fastrand::u64(..);
    let mut rng = Rng::with_seed(seed);
    let original = Original::write(seed, 150, SMALL);
    let damaged = files(original.root.path(), |name| !["LOCK", "LOG", "IDENTITY"].contains(&name));
    for round in 0..150 {
        let copy = original.copy();
        let path = copy.path().join(rng.choice(&damaged).unwrap().file_name().unwrap());
        let length = fs::metadata(&path).unwrap().len();
        let cut = rng.u64(0..=length);
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
        let context = format!("seed {seed}, round {round}, {} cut at {cut} of {length}", path.display());
        check(&original, copy.path(), 0, &context);
    }
}

#[test]
fn a_changed_byte_anywhere_shows_an_error_or_the_truth_but_for_the_last_write() {
    let seed = fastrand::u64(..);
    let mut rng = Rng::with_seed(seed);
    let mut refused = 0;
    for sizes in [SIZES, SMALL] {
        let original = Original::write(seed, 45, sizes);
        let last = original.history.len() - 1;
        let damaged = files(original.root.path(), |name| {
            name.ends_with(".log") || name.ends_with(".sst") || name.starts_with("MANIFEST") || name == "CURRENT"
        });
        for round in 0..200 {
            let copy = original.copy();
            let path = copy.path().join(rng.choice(&damaged).unwrap().file_name().unwrap());
            let mut bytes = fs::read(&path).unwrap();
            if bytes.is_empty() {
                continue;
            }
            // Half of them near the end, where RocksDB takes damage for a write that was cut off.
            let end = bytes.len();
            let start = if rng.bool() { end.saturating_sub(400) } else { 0 };
            let position = rng.usize(start..end);
            bytes[position] ^= rng.u8(1..);
            fs::write(&path, bytes).unwrap();
            let context = format!("seed {seed}, round {round}, {} changed at {position} of {end}", path.display());
            refused += usize::from(!check(&original, copy.path(), last - 1, &context));
        }
    }
    assert!(refused > 0, "seed {seed}: no change was ever noticed");
}

/// RocksDB tolerates a log that is cut off, and takes a damaged length for a cut. Whatever is damaged in a record that
/// others follow is refused. In the last record only its length can pass for a cut, and then that write is lost: the
/// one case where damage shows as the truth of an earlier time.
#[test]
fn only_a_damaged_length_of_the_last_record_passes_for_a_cut() {
    let root = small_log();
    let engine = RocksDBStorageEngine::open(root.path()).unwrap();
    let log = files(root.path(), |name| name.ends_with(".log")).pop().unwrap();
    let length = || usize::try_from(fs::metadata(&log).unwrap().len()).unwrap();
    let mut records = Vec::new();
    for index in 4..9 {
        records.push((index, length()));
        engine.write(&[append(index, b"some entry")], Durability::Fsync).unwrap();
    }
    let end = length();
    drop(engine);
    let original = Original { root, history: Vec::new() };

    let (checksum, high_length, kind, content) = (0, 5, 6, 30);
    for &(index, start) in &records {
        for part in [checksum, high_length, kind, content] {
            let copy = original.copy();
            let path = copy.path().join(log.file_name().unwrap());
            let mut bytes = fs::read(&path).unwrap();
            bytes[start + part] ^= 0x40;
            fs::write(&path, bytes).unwrap();
            let opened = RocksDBStorageEngine::open(copy.path());
            if part == high_length && index == 8 {
                assert_eq!(opened.unwrap().state().unwrap().last.unwrap().index, LogIndex(7));
            } else {
                assert!(
                    matches!(opened, Err(StorageError::Corrupt { .. })),
                    "entry {index} at {start} of {end}, byte {part}: {opened:?}"
                );
            }
        }
    }
}

/// RocksDB reads a manifest that is cut off as one that was shorter, and deletes the tables it does not mention.
#[test]
fn a_manifest_cut_anywhere_loses_nothing_silently() {
    let root = small_log();
    // Each opening moves to a table what was in the write-ahead log, so both an older and the last state are in one.
    let engine = RocksDBStorageEngine::open(root.path()).unwrap();
    engine.write(&[append(4, b"four")], Durability::Fsync).unwrap();
    drop(engine);
    drop(RocksDBStorageEngine::open(root.path()).unwrap());
    let manifest = files(root.path(), |name| name.starts_with("MANIFEST")).pop().unwrap();
    let length = fs::metadata(&manifest).unwrap().len();
    let original = Original { root, history: Vec::new() };
    let mut refused = 0;
    for cut in (0..length).step_by(3) {
        let copy = original.copy();
        let path = copy.path().join(manifest.file_name().unwrap());
        fs::OpenOptions::new().write(true).open(path).unwrap().set_len(cut).unwrap();
        match RocksDBStorageEngine::open(copy.path()) {
            Ok(engine) => {
                let records = engine.read(LogIndex(0), LogIndex(9), usize::MAX).unwrap();
                assert_eq!(records.len(), 4, "cut at {cut} of {length}");
            }
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 0, "{length} bytes of manifest and no cut ever mattered");
}

/// Whether the directory opens; it then holds what was there after some write, not before `oldest`, as far as it can
/// be read.
fn check(original: &Original, directory: &Path, oldest: usize, context: &str) -> bool {
    let Ok(engine) = RocksDBStorageEngine::open(directory) else { return false };
    if engine.state().is_ok() {
        let age = original.age(&engine, oldest);
        assert!(age.is_some(), "{context}: what can be read never was, or was before write {oldest}");
    }
    true
}
