//! Random histories with compactions, against the plain list of all that happened; then how much disk they take.

use fastrand::Rng;

use super::script::{Contents, Script};
use super::*;
use crate::storage::disk_bytes;

fn seed() -> u64 {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    seed
}

fn wait_written(store: &VersionStore, script: &Script) {
    assert_eq!(store.wait_written(script.state.revision, GENEROUS).unwrap(), script.state.revision);
}

#[test]
fn what_can_be_read_stays_whole_whatever_is_compacted_and_the_rest_goes() {
    let seed = seed();
    let mut rng = Rng::with_seed(seed);
    let directory = tempfile::tempdir().unwrap();
    let store = VersionStore::open_tiny(directory.path()).unwrap();
    let mut script = Script::new(seed);
    for step in 0..600 {
        store.submit(script.next()).unwrap();
        if rng.u32(..8) == 0 {
            let context = format!("seed {seed}, step {step}");
            wait_written(&store, &script);
            script.check(&store, &mut rng, &context);
            if rng.u32(..4) == 0 {
                script.check_clean(&Contents::when_clean(&store, script.state.compacted), &context);
                script.check(&store, &mut rng, &context);
            }
        }
    }
    assert!(script.state.compacted > Revision(0), "seed {seed}: nothing was compacted");
}

/// Closes the store wherever its writer and its cleaner happen to be, and goes on from what is left.
#[test]
fn records_history_and_cleaning_go_on_after_reopening() {
    let seed = seed();
    let mut rng = Rng::with_seed(seed);
    let directory = tempfile::tempdir().unwrap();
    let mut unfinished = 0;
    // Ends once it has seen what it is about; a store that cleans before it closes would be given up on.
    for round in 0.. {
        let store = VersionStore::open_tiny(directory.path()).unwrap();
        let mut script = Script::at(seed, store.recovered().position);
        let context = format!("seed {seed}, round {round}");
        assert_eq!(*store.recovered(), script.state, "{context}");
        let records: BTreeMap<_, _> = store.recovered_records().unwrap().into_iter().collect();
        assert_eq!(records, script.records, "{context}");
        script.check(&store, &mut rng, &context);
        if rng.bool() {
            script.check_clean(&Contents::when_clean(&store, script.state.compacted), &context);
        }
        if unfinished >= 3 && round >= 20 {
            break;
        }
        for _ in 0..rng.u32(..60) {
            store.submit(script.next()).unwrap();
        }
        if rng.bool() {
            store.flush().unwrap();
        }
        drop(store);
        let rocks = DB::open_default(directory.path()).unwrap();
        let state = encoding::decode_state(&rocks.get(encoding::STATE_KEY).unwrap().unwrap()).unwrap();
        unfinished += u32::from(Contents::of(&rocks).left(state.compacted) > 0);
    }
}

#[test]
fn a_page_of_changes_ends_with_a_whole_revision_and_at_what_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let store = VersionStore::open(directory.path()).unwrap();
    for revision in 1..=10 {
        submit(&store, KEYS.iter().map(|key| put(key, revision)).collect(), state(revision)).unwrap();
    }
    wait(&store, 10);
    let read = |first, last, bytes_max| {
        let (changes, covered) = store.changes(b"", None, Revision(first), Revision(last), false, bytes_max).unwrap();
        assert!(changes.windows(2).all(|pair| (pair[0].revision, &pair[0].key) < (pair[1].revision, &pair[1].key)));
        (changes.len() / KEYS.len(), changes.len() % KEYS.len(), covered.get())
    };
    assert_eq!(read(1, 10, usize::MAX), (10, 0, 10));
    assert_eq!(read(3, 3, usize::MAX), (1, 0, 3));
    assert_eq!(read(3, 10, 0), (1, 0, 3), "one revision alone is beyond the bound");
    assert_eq!(read(9, u64::MAX, usize::MAX), (2, 0, 10), "no more is covered than is written");
    assert_eq!(read(11, 20, usize::MAX), (0, 0, 10), "nothing is covered");
    let (_, _, covered) = read(1, 10, 2000);
    assert!((2..9).contains(&covered), "{covered}");
    // Keys that nobody asked for were looked through too.
    let (changes, covered) = store.changes(b"b", Some(b"c"), Revision(1), Revision(10), false, 2000).unwrap();
    assert!((2..9).contains(&covered.get()), "{covered}");
    assert_eq!(changes.len() as u64, covered.get());
}

/// A few keys put again and again. Without cleaning this takes some 40 MB.
#[test]
fn overwriting_with_compaction_takes_bounded_space() {
    const PUTS: u64 = 100_000;
    let directory = tempfile::tempdir().unwrap();
    let bounds = Bounds { flush_bytes: 1 << 20, ..Bounds::default() };
    let store = VersionStore::open_bounded(directory.path(), bounds).unwrap();
    let mut held: Vec<Option<Arc<KeyVersion>>> = vec![None; KEYS.len()];
    for revision in 1..=PUTS {
        let slot = usize::try_from(revision).unwrap() % KEYS.len();
        let (key, value) = KeyVersion::own(KEYS[slot], &[b'x'; 400]);
        let after = KeyVersion { key, value, ..version(KEYS[slot], revision) };
        let after = Some(Arc::new(after));
        let before = std::mem::replace(&mut held[slot], after.clone());
        let change = Change { key: Bytes::from_static(KEYS[slot]), revision: Revision(revision), after, before };
        let compacted = Revision(revision.saturating_sub(1000));
        submit(&store, vec![change], StoreState { compacted, ..state(revision) }).unwrap();
    }
    let contents = Contents::when_clean(&store, Revision(PUTS - 1000));
    assert_eq!((contents.index.len(), contents.versions.len()), (1001, 1001 + KEYS.len()));
    store.flush().unwrap();
    let deadline = std::time::Instant::now() + GENEROUS;
    while disk_bytes(directory.path()) > 8 << 20 {
        assert!(std::time::Instant::now() < deadline, "{} bytes", disk_bytes(directory.path()));
        std::thread::yield_now();
    }
}

/// All is written and flushed before anything is given up, and nothing is written afterwards.
#[test]
fn a_compaction_frees_the_disk_without_further_writes() {
    const PUTS: u64 = 20_000;
    let directory = tempfile::tempdir().unwrap();
    let bounds = Bounds { flush_bytes: 1 << 20, ..Bounds::default() };
    let store = VersionStore::open_bounded(directory.path(), bounds).unwrap();
    let mut before = None;
    for revision in 1..=PUTS {
        let (key, value) = KeyVersion::own(b"k", &[b'x'; 1000]);
        let after = Some(Arc::new(KeyVersion { key, value, ..version(b"k", revision) }));
        let change =
            Change { key: Bytes::from_static(b"k"), revision: Revision(revision), after: after.clone(), before };
        before = after;
        submit(&store, vec![change], state(revision)).unwrap();
    }
    store.flush().unwrap();
    assert!(disk_bytes(directory.path()) > 20 << 20);
    submit(&store, Vec::new(), StoreState { compacted: Revision(PUTS), ..state(PUTS) }).unwrap();
    let deadline = std::time::Instant::now() + GENEROUS;
    while disk_bytes(directory.path()) > 4 << 20 {
        assert!(std::time::Instant::now() < deadline, "{} bytes", disk_bytes(directory.path()));
        std::thread::yield_now();
    }
}
