//! Random logs: the same answers as the model, whatever was lost and applied again on the way.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::{LeaseId, Revision, v1};
use fastrand::Rng;
use prost::Message;

use super::model::{self, Event, Model};
use super::random::{self, log_entry, seed};
use super::restore::Recorded;
use super::{contents, decode};
use crate::state_machine::kv::room::key_value;
use crate::state_machine::kv::{KvError, KvStateMachine, ReadError, ReadPoint, Store};
use crate::state_machine::{CommittedEntry, EntryContent, StateMachine, StoreTime};
use crate::storage::versions::{Change, KeyVersion, VersionStore};

const GENEROUS: Duration = Duration::from_secs(60);

/// Applies an entry to the model and compares the answers that the real store gave.
fn check_answers(model: &mut Model, entry: &CommittedEntry, answers: &[Bytes], context: &str) {
    let mut answers = decode(answers);
    for answer in &mut answers {
        if let Some(v1::command_reply::Reply::Error(error)) = &mut answer.reply {
            // The model knows that a command is refused, not in which words.
            assert!(!std::mem::take(&mut error.message).is_empty());
        }
    }
    assert_eq!(answers, model.apply(entry), "{context}: {:?}", commands(entry));
}

fn commands(entry: &CommittedEntry) -> Vec<v1::Command> {
    match &entry.content {
        EntryContent::Commands { commands, .. } => {
            commands.iter().map(|command| v1::Command::decode(command.clone()).unwrap()).collect()
        }
        _ => Vec::new(),
    }
}

/// Compares what a store shows of itself with the model.
fn check_store(model: &Model, store: &Store, context: &str) {
    let state = &model.state;
    store.validate().expect(context);
    assert_eq!(contents(store), state.keys.values().cloned().collect::<Vec<_>>(), "{context}");
    assert_eq!(store.revision(), Revision(state.revision), "{context}");
    assert_eq!(store.compacted(), Revision(state.compacted), "{context}");
    assert_eq!(store.key_count(), state.keys.len() as u64, "{context}");
    assert_eq!(store.state().store_time, state.now, "{context}");
    assert_eq!(store.due(), model.due().map(|(deadline, ..)| StoreTime(deadline)), "{context}");
    assert_eq!(store.session_count(), state.sessions.len() as u64, "{context}");
    assert_eq!(store.lease_count(), state.leases.len() as u64, "{context}");
    for (id, lease) in &state.leases {
        let view = store.lease(LeaseId(*id)).expect(context);
        assert_eq!((view.ttl, view.deadline), (lease.ttl, StoreTime(lease.deadline)), "{context}");
        assert_eq!(view.keys().cloned().collect::<Vec<_>>(), state.keys_of(*id), "{context}");
        assert_eq!(view.key_count, view.keys().count() as u64, "{context}");
    }
    let granted: Vec<_> = state.leases.iter().filter(|(_, lease)| !lease.own).map(|(id, _)| *id).collect();
    assert_eq!(store.leases(LeaseId(0)).map(|lease| lease.id.get()).collect::<Vec<_>>(), granted, "{context}");
}

/// Compares changes with what the model remembers of all after `revision`.
fn check_changes<'a>(model: &Model, revision: u64, changes: impl Iterator<Item = &'a Change>, context: &str) {
    let kv = |version: &Option<Arc<KeyVersion>>| version.as_deref().map(key_value);
    let events: Vec<_> = changes
        .filter(|change| change.revision.get() > revision)
        .map(|change| Event {
            revision: change.revision.get(),
            key: change.key.clone(),
            after: kv(&change.after),
            before: kv(&change.before),
        })
        .collect();
    let first = model.history.partition_point(|event| event.revision <= revision);
    assert_eq!(events, model.history[first..], "{context}");
}

fn check_state(model: &Model, machine: &KvStateMachine, index: u64, seed: u64) {
    let context = format!("seed {seed}, entry {index}");
    let store = machine.current();
    check_store(model, &store, &context);
    assert_eq!(*machine.revisions().borrow(), store.revision(), "{context}");

    let applied = machine.applied();
    let entries: Vec<_> = (1..=index).map(|index| log_entry(seed, index)).collect();
    assert_eq!(applied.position, entries.last().map(|entry| entry.position), "{context}");
    let membership = entries.iter().rev().find_map(|entry| match &entry.content {
        EntryContent::Membership(membership) => Some((entry.position, membership.clone())),
        _ => None,
    });
    assert_eq!(applied.membership, membership, "{context}");
    assert_eq!(applied.store_time, StoreTime(model.state.now), "{context}");
}

/// Some reads at some revision, present or past.
fn check_reads(model: &Model, machine: &KvStateMachine, rng: &mut Rng, context: &str) {
    let state = &model.state;
    let revision = rng.u64(..=state.revision);
    let context = format!("{context}, read at {revision}");
    if revision != 0 && revision < state.compacted {
        let (requested, minimum) = (Revision(revision), Revision(state.compacted));
        assert_eq!(machine.at(requested).err(), Some(KvError::Compacted { requested, minimum }), "{context}");
        return;
    }
    let keys = if revision == 0 { state.keys.clone() } else { model.at(revision) };
    let (get, many) = (random::get(rng), random::get_many(rng));
    let (range, txn) = (random::range(rng), random::read_txn(rng));
    let answers = match machine.at(Revision(revision)).unwrap() {
        ReadPoint::Current(store) => {
            (store.get(&get).unwrap(), store.get_many(&many), store.range(&range).unwrap(), store.txn(&txn))
        }
        ReadPoint::Past(past) => {
            let past = past.wait(GENEROUS).unwrap();
            assert_eq!(past.revision(), Revision(revision));
            (
                past.get(&get).unwrap(),
                past.get_many(&many).map_err(refusal),
                past.range(&range).unwrap(),
                past.txn(&txn).map_err(refusal),
            )
        }
    };
    assert_eq!(answers.0, model::get(&keys, &get), "{context}: {get:?}");
    assert_eq!(answers.1, model::get_many(&keys, &many).ok_or(KvError::AnswerTooLarge), "{context}: {many:?}");
    assert_eq!(answers.2, model::range(&keys, &range, &mut model::Page::default()), "{context}: {range:?}");
    assert_eq!(answers.3, model::read_txn(&keys, &txn).ok_or(KvError::AnswerTooLarge), "{context}: {txn:?}");
}

fn refusal(error: ReadError) -> KvError {
    match error {
        ReadError::Refused(refusal) => refusal,
        other => panic!("{other}"),
    }
}

fn open(path: &Path) -> KvStateMachine {
    KvStateMachine::load(VersionStore::open_tiny(path).unwrap()).unwrap()
}

/// Beside the store runs a second one, which is now and then made anew from what the first one recorded.
#[test]
fn random_commands_are_answered_as_the_model_answers_them() {
    let seed = seed();
    for run in 0..40 {
        let seed = seed.wrapping_add(run);
        let mut rng = Rng::with_seed(seed);
        let (mut store, mut other, mut model) = (Store::default(), Store::default(), Model::default());
        let mut recorded = Recorded::default();
        for index in 1..=150 {
            let entry = log_entry(seed, index);
            let context = format!("seed {seed}, entry {index}");
            let revision = model.state.revision;
            let effects = store.apply(&entry);
            check_answers(&mut model, &entry, &effects.answers, &context);
            check_store(&model, &store, &context);
            check_changes(&model, revision, effects.changes.iter(), &context);
            let mirrored = other.apply(&entry);
            assert_eq!(mirrored.answers, effects.answers, "{context}");
            assert_eq!(mirrored.changes, effects.changes, "{context}");
            recorded.take(effects, store.state());
            if rng.u32(..8) == 0 {
                other = recorded.restore().unwrap();
                check_store(&model, &other, &context);
            }
        }
    }
}

#[test]
fn every_past_revision_reads_as_it_was() {
    let seed = seed();
    let directory = tempfile::tempdir().unwrap();
    let (machine, mut model) = (open(directory.path()), Model::default());
    let mut rng = Rng::with_seed(seed);
    for index in 1..=400 {
        let entry = log_entry(seed, index);
        let revision = model.state.revision;
        let answers = machine.apply(&entry).unwrap();
        let context = format!("seed {seed}, entry {index}");
        check_answers(&mut model, &entry, &answers, &context);
        let changes = machine.changes_after(Revision(revision)).unwrap();
        check_changes(&model, revision, changes.iter().flat_map(|changes| changes.iter()), &context);
        for _ in 0..4 {
            check_reads(&model, &machine, &mut rng, &context);
        }
    }
    check_state(&model, &machine, 400, seed);
}

/// Large values are put again and again, so that gets, ranges and previous values meet several in one answer.
#[test]
fn answers_that_would_be_too_large_are_refused_as_in_the_model() {
    static LARGE: [u8; 1_400_000] = [b'v'; 1_400_000];
    let seed = seed();
    let directory = tempfile::tempdir().unwrap();
    let (machine, mut model) = (KvStateMachine::open(directory.path()).unwrap(), Model::default());
    let mut rng = Rng::with_seed(seed);
    let mut refused = 0;
    for index in 1..=120 {
        let entry = match index % 8 {
            1 => {
                let commands: Vec<_> = (0..6).map(|_| random::put_of(&mut rng, Bytes::from_static(&LARGE))).collect();
                super::entry(index, &commands)
            }
            3 | 6 => super::entry(index, &[random::greedy_txn(&mut rng)]),
            _ => log_entry(seed, index),
        };
        let answers = machine.apply(&entry).unwrap();
        let context = format!("seed {seed}, entry {index}");
        let too_large = Some(v1::command_reply::Reply::Error(KvError::AnswerTooLarge.into()));
        refused += decode(&answers).iter().filter(|answer| answer.reply == too_large).count();
        check_answers(&mut model, &entry, &answers, &context);
        assert!(contents(&machine.current()) == model.state.keys.values().cloned().collect::<Vec<_>>(), "{context}");
        for _ in 0..4 {
            check_reads(&model, &machine, &mut rng, &context);
        }
    }
    assert!(refused > 0, "seed {seed}: no command met enough large values");
}

/// Stops after every prefix of a log, with and without having made it durable, and goes on from what is left.
#[test]
fn replay_from_every_prefix_gives_the_same_answers_and_state() {
    const ENTRIES: u64 = 40;
    let seed = seed();
    for stop in 0..=ENTRIES {
        let directory = tempfile::tempdir().unwrap();
        let (machine, mut model) = (open(directory.path()), Model::default());
        for index in 1..=stop {
            let entry = log_entry(seed, index);
            check_answers(&mut model, &entry, &machine.apply(&entry).unwrap(), &format!("seed {seed}"));
        }
        check_state(&model, &machine, stop, seed);
        if stop % 2 == 1 {
            machine.flush().unwrap();
            assert_eq!(machine.durable(), machine.applied().position);
        }
        drop(machine);
        go_on(directory.path(), seed, ENTRIES, (stop % 2 == 1).then_some(stop));
    }
}

/// A copy of the files of a running store is what a crash at that moment would leave.
#[test]
fn after_a_crash_the_store_goes_on_from_what_was_durable() {
    let seed = seed();
    let mut rng = Rng::with_seed(seed);
    let directory = tempfile::tempdir().unwrap();
    // The usual bounds, and few flushes: no file moves while this test copies it.
    let machine = KvStateMachine::open(directory.path()).unwrap();
    let flushes = [rng.u64(1..100), rng.u64(100..200)];
    let mut durable = 0;
    for index in 1..=200 {
        machine.apply(&log_entry(seed, index)).unwrap();
        if flushes.contains(&index) {
            machine.flush().unwrap();
            durable = index;
        }
        if rng.u32(..20) == 0 {
            assert_eq!(machine.durable().map_or(0, |position| position.index.get()), durable);
            let image = tempfile::tempdir().unwrap();
            for file in fs::read_dir(directory.path()).unwrap() {
                let file = file.unwrap();
                fs::copy(file.path(), image.path().join(file.file_name())).unwrap();
            }
            go_on(image.path(), seed, index + 10, Some(durable));
        }
    }
}

/// Reopens a directory, checks that it holds exactly a prefix of the log, `expected` if that is known, and applies the
/// rest up to `last`.
fn go_on(path: &Path, seed: u64, last: u64, expected: Option<u64>) {
    let machine = open(path);
    let durable = machine.applied().position.map_or(0, |position| position.index.get());
    assert_eq!(machine.durable(), machine.applied().position);
    if let Some(expected) = expected {
        assert_eq!(durable, expected, "seed {seed}");
    }
    let mut model = Model::default();
    for index in 1..=last {
        let entry = log_entry(seed, index);
        if index <= durable {
            model.apply(&entry);
            continue;
        }
        if index == durable + 1 {
            check_state(&model, &machine, durable, seed);
        }
        let context = format!("seed {seed}, entry {index} after {durable}");
        check_answers(&mut model, &entry, &machine.apply(&entry).unwrap(), &context);
    }
    check_state(&model, &machine, last, seed);
    check_reads(&model, &machine, &mut Rng::with_seed(seed), &format!("seed {seed}, reopened at {durable}"));
}
