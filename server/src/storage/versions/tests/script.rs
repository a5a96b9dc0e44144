//! A random history as slowly and plainly as it can be kept: the keys at every revision, and a list of every change.

use std::collections::{BTreeMap, BTreeSet};

use fastrand::Rng;

use super::*;

type Keys = BTreeMap<Bytes, Arc<KeyVersion>>;

/// Submissions that follow from a seed alone, and all they add up to.
pub(super) struct Script {
    rng: Rng,
    pub(super) state: StoreState,
    /// The keys at each revision.
    past: Vec<Keys>,
    /// In the order of revisions and keys.
    changes: Vec<Change>,
    pub(super) records: BTreeMap<RecordKey, Bytes>,
}

pub(super) struct Plain(pub(super) Vec<u8>);

impl RecordValue for Plain {
    fn encode(&self) -> Vec<u8> {
        self.0.clone()
    }
}

impl Script {
    pub(super) fn new(seed: u64) -> Self {
        let (state, records) = (StoreState::default(), BTreeMap::new());
        Self { rng: Rng::with_seed(seed), state, past: vec![Keys::new()], changes: Vec::new(), records }
    }

    /// As of a position that [`next`](Self::next) went through.
    pub(super) fn at(seed: u64, position: Option<LogPosition>) -> Self {
        let mut script = Self::new(seed);
        while script.state.position != position {
            script.next();
        }
        script
    }

    /// Up to three revisions of up to three keys each, some records, and now and then a compaction.
    pub(super) fn next(&mut self) -> Submission {
        let mut changes = Vec::new();
        for _ in 0..self.rng.u32(..4) {
            let touched = self.rng.usize(1..4);
            let touched: BTreeSet<&[u8]> = (0..touched).map(|_| KEYS[self.rng.usize(..KEYS.len())]).collect();
            changes.extend(self.revision(&touched));
        }
        let mut records = BTreeMap::new();
        for _ in 0..self.rng.u32(..4) {
            let id = self.rng.u64(1..6);
            let key = if self.rng.bool() { RecordKey::Lease(LeaseId(id)) } else { RecordKey::Session(SessionId(id)) };
            let length = self.rng.usize(..20);
            let value = self.rng.bool().then(|| (0..length).map(|_| self.rng.u8(..)).collect::<Vec<u8>>());
            records.insert(key, value);
        }
        for (key, value) in &records {
            match value {
                Some(value) => drop(self.records.insert(*key, value.clone().into())),
                None => drop(self.records.remove(key)),
            }
        }
        if self.rng.u32(..10) == 0 {
            self.state.compacted = Revision(self.rng.u64(self.state.compacted.get()..=self.state.revision.get()));
        }
        let index = self.state.position.map_or(1, |position| position.index.get() + 1);
        self.state.position = Some(LogPosition { term: Term(1), index: LogIndex(index) });
        let value = |value: Option<Vec<u8>>| value.map(|value| Arc::new(Plain(value)) as Arc<dyn RecordValue>);
        let records = records.into_iter().map(|(key, held)| Record { key, value: value(held) }).collect();
        Submission { changes: Arc::new(changes), records, state: self.state.clone() }
    }

    /// The next revision, which changes these keys.
    fn revision(&mut self, touched: &BTreeSet<&[u8]>) -> Vec<Change> {
        let revision = self.state.revision.next();
        let mut keys = self.past[self.past.len() - 1].clone();
        let mut changes = Vec::new();
        for key in touched {
            let before = keys.get(*key).cloned();
            // Also of a key that does not exist: a transaction put it and took it away again.
            let after = (self.rng.u32(..3) > 0).then(|| {
                let (create_revision, puts) = match &before {
                    Some(held) => (held.create_revision, held.version + 1),
                    None => (revision, 1),
                };
                let text = format!("{revision} {}", "x".repeat(self.rng.usize(..60)));
                let (key, value) = KeyVersion::own(key, text.as_bytes());
                let lease = LeaseId(self.rng.u64(..3));
                Arc::new(KeyVersion { key, value, create_revision, mod_revision: revision, version: puts, lease })
            });
            match &after {
                Some(put) => drop(keys.insert(put.key.clone(), Arc::clone(put))),
                None => drop(keys.remove(*key)),
            }
            changes.push(Change { key: Bytes::copy_from_slice(key), revision, after, before });
        }
        self.past.push(keys);
        self.changes.extend(changes.iter().cloned());
        self.state.revision = revision;
        changes
    }

    fn versions_at(&self, revision: u64) -> Vec<KeyVersion> {
        self.past[usize::try_from(revision).unwrap()].values().map(|version| KeyVersion::clone(version)).collect()
    }

    /// Compares a store, in which everything is written, with what it should hold: the records only if nothing was
    /// submitted since it was opened, a few revisions and stretches of changes of all that can be read.
    pub(super) fn check(&self, store: &VersionStore, rng: &mut Rng, context: &str) {
        let (oldest, newest) = (self.state.compacted.get(), self.state.revision.get());
        // What the changes of the oldest readable revision replaced is there too.
        let edge = [oldest.saturating_sub(1), oldest, newest];
        for revision in edge.into_iter().chain((0..4).map(|_| rng.u64(oldest..=newest))) {
            let context = format!("{context}, at {revision} of {oldest} to {newest}");
            assert_eq!(scan_all(store, revision).unwrap(), self.versions_at(revision), "{context}");
        }
        for _ in 0..4 {
            let first = rng.u64(oldest.max(1)..=newest.max(1));
            let last = rng.u64(first..=newest.max(first));
            let (start, end) = (KEYS[rng.usize(..KEYS.len())], KEYS[rng.usize(..KEYS.len())]);
            let (start, end) = [(&b""[..], None), (start, None), (start, Some(end))][rng.usize(..3)];
            let before = rng.bool();
            let bytes_max = if rng.bool() { usize::MAX } else { rng.usize(..2000) };
            let context = format!("{context}, {start:?} to {end:?}, {first} to {last} of {oldest} to {newest}");
            self.check_changes(store, (start, end), (first, last), before, bytes_max, &context);
        }
    }

    fn check_changes(
        &self,
        store: &VersionStore,
        (start, end): (&[u8], Option<&[u8]>),
        (first, last): (u64, u64),
        before: bool,
        bytes_max: usize,
        context: &str,
    ) {
        let wanted = |change: &&Change| {
            (first..=last).contains(&change.revision.get())
                && change.key >= start
                && end.is_none_or(|end| change.key < end)
        };
        let mut expected: Vec<_> = self.changes.iter().filter(wanted).cloned().collect();
        if !before {
            expected.iter_mut().for_each(|change| change.before = None);
        }
        let (mut found, mut next) = (Vec::new(), Revision(first));
        while next <= Revision(last) && last <= self.state.revision.get() {
            let (page, covered) = store.changes(start, end, next, Revision(last), before, bytes_max).unwrap();
            assert!(covered >= next && covered <= Revision(last), "{context}: {covered} from {next}");
            assert!(page.iter().all(|change| (next..=covered).contains(&change.revision)), "{context}");
            // Without its last revision a page is within bounds; counted here are values, without any overhead.
            let early = page.iter().filter(|change| change.revision < covered);
            let values = early.flat_map(|change| [&change.after, &change.before]).flatten();
            let bytes: usize = values.map(|version| version.value.len()).sum();
            assert!(bytes <= bytes_max, "{context}: {bytes} beyond {bytes_max}");
            if bytes_max == usize::MAX {
                assert_eq!(covered, Revision(last), "{context}");
            }
            found.extend(page);
            next = covered.next();
        }
        assert_eq!(found, expected, "{context}");
    }

    /// Every key and revision that a store must still hold once it is clean, and nothing else.
    pub(super) fn check_clean(&self, contents: &Contents, context: &str) {
        let kept = |change: &&Change| {
            let following = self.changes.iter().find(|next| next.key == change.key && next.revision > change.revision);
            // Readable, or what stands just before the oldest readable revision.
            change.revision >= self.state.compacted
                || (change.after.is_some() && following.is_none_or(|next| next.revision >= self.state.compacted))
        };
        let place = |change: &Change| (change.key.clone(), change.revision);
        let versions: BTreeSet<_> = self.changes.iter().filter(kept).map(place).collect();
        assert_eq!(contents.versions, versions, "{context}");
        let readable = self.changes.iter().filter(|change| change.revision >= self.state.compacted);
        assert_eq!(contents.index, readable.map(place).collect(), "{context}");
    }
}

/// What stands in the database, key by key.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) versions: BTreeSet<(Bytes, Revision)>,
    pub(super) index: BTreeSet<(Bytes, Revision)>,
}

impl Contents {
    pub(super) fn of(rocks: &DB) -> Self {
        let mut contents = Self::default();
        for item in rocks.iterator(rocksdb::IteratorMode::Start) {
            let (key, record) = item.unwrap();
            match key[0] {
                b'v' => {
                    let (escaped, revision) = encoding::split_version_key(&key).unwrap();
                    let mut user_key = BytesMut::new();
                    encoding::unescape_key(&mut user_key, escaped).unwrap();
                    contents.versions.insert((user_key.freeze(), revision));
                }
                b'e' => {
                    let entry = encoding::IndexEntry::decode(&key, &record).unwrap();
                    contents.index.insert((Bytes::copy_from_slice(entry.key), entry.revision));
                }
                _ => {}
            }
        }
        contents
    }

    /// Index entries of revisions before `compacted`: what is left to clean.
    pub(super) fn left(&self, compacted: Revision) -> usize {
        self.index.iter().filter(|(_, revision)| *revision < compacted).count()
    }

    /// Once everything before `compacted` is cleaned.
    pub(super) fn when_clean(store: &VersionStore, compacted: Revision) -> Self {
        let deadline = std::time::Instant::now() + GENEROUS;
        loop {
            let contents = Self::of(store.database.rocks());
            if contents.left(compacted) == 0 {
                return contents;
            }
            assert!(std::time::Instant::now() < deadline, "{} entries are not cleaned", contents.left(compacted));
            std::thread::yield_now();
        }
    }
}
