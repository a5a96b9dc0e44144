//! Copies of a history that is being written and cleaned.

use std::thread;

use super::script::{Contents, Script};
use super::*;

#[test]
fn a_copy_is_the_history_up_to_one_submission_while_more_are_submitted() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let root = tempfile::tempdir().unwrap();
    let store = VersionStore::open_tiny(&root.path().join("versions")).unwrap();
    let mut script = Script::new(seed);
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut before = None;
    for number in 0..8 {
        let path = root.path().join(number.to_string());
        let state = thread::scope(|scope| {
            scope.spawn(|| (0..60).for_each(|_| store.submit(script.next()).unwrap()));
            let durable = store.durable();
            let state = store.checkpoint(&path).unwrap();
            assert!(state.position >= durable && state.position >= before, "seed {seed}, copy {number}");
            state
        });
        before = state.position;

        let copy = VersionStore::open_tiny(&path).unwrap();
        let script = Script::at(seed, state.position);
        let context = format!("seed {seed}, copy {number}, {:?}", state.position);
        assert_eq!(state, script.state, "{context}");
        assert_eq!(*copy.recovered(), state, "{context}");
        let records: BTreeMap<_, _> = copy.recovered_records().unwrap().into_iter().collect();
        assert_eq!(records, script.records, "{context}");
        script.check(&copy, &mut rng, &context);
        // It goes on by itself, and its cleaning does nothing to the store it was taken from.
        script.check_clean(&Contents::when_clean(&copy, state.compacted), &context);
        script.check(&copy, &mut rng, &context);
    }
    store.flush().unwrap();
    script.check(&store, &mut rng, &format!("seed {seed}, the store itself"));
}

#[test]
fn a_copy_holds_what_was_submitted_before_and_is_never_made_into_what_exists() {
    let root = tempfile::tempdir().unwrap();
    let store = VersionStore::open(&root.path().join("versions")).unwrap();
    // So many that some still wait to be written.
    let last = 5000;
    for revision in 1..=last {
        submit(&store, vec![put(b"a", revision)], state(revision)).unwrap();
    }
    let copy = root.path().join("copy");
    assert_eq!(store.checkpoint(&copy).unwrap(), state(last));
    assert!(matches!(store.checkpoint(&copy), Err(StorageError::Io { .. })));
    submit(&store, vec![put(b"a", last + 1)], state(last + 1)).unwrap();
    store.flush().unwrap();
    assert_eq!(scan_all(&VersionStore::open(&copy).unwrap(), last).unwrap(), [version(b"a", last)]);
}
