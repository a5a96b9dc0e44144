//! Random logs: the same answers as the model, whatever was lost and applied again on the way.

use std::fs;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::{Revision, v1};
use fastrand::Rng;

use super::model::{self, Model};
use super::random::{self, log_entry, seed};
use super::{contents, decode};
use crate::state_machine::kv::{KvError, KvStateMachine, ReadError, ReadPoint, Store};
use crate::state_machine::{EntryContent, StateMachine, StoreTime};
use crate::storage::versions::VersionStore;

const GENEROUS: Duration = Duration::from_secs(60);

/// Applies an entry to the model and compares the answers that the real store gave.
fn check_answers(model: &mut Model, commands: &[v1::Command], answers: &[Bytes], context: &str) {
    let answers = decode(answers);
    assert_eq!(answers.len(), commands.len(), "{context}");
    for (command, mut answer) in commands.iter().zip(answers) {
        if let Some(v1::command_reply::Reply::Error(error)) = &mut answer.reply {
            // The model knows that a command is refused, not in which words.
            assert!(!std::mem::take(&mut error.message).is_empty());
        }
        assert_eq!(answer, model.apply(command), "{context}: {command:?}");
    }
}

fn check_state(model: &Model, machine: &KvStateMachine, index: u64, seed: u64) {
    let context = format!("seed {seed}, entry {index}");
    let store = machine.current();
    store.validate().expect(&context);
    assert_eq!(contents(&store), model.keys.values().cloned().collect::<Vec<_>>(), "{context}");
    assert_eq!(store.revision(), Revision(model.revision), "{context}");
    assert_eq!(store.key_count(), model.keys.len() as u64, "{context}");
    assert_eq!(*machine.revisions().borrow(), store.revision(), "{context}");

    let applied = machine.applied();
    let entries: Vec<_> = (1..=index).map(|index| log_entry(seed, index).0).collect();
    assert_eq!(applied.position, entries.last().map(|entry| entry.position), "{context}");
    let membership = entries.iter().rev().find_map(|entry| match &entry.content {
        EntryContent::Membership(membership) => Some((entry.position, membership.clone())),
        _ => None,
    });
    assert_eq!(applied.membership, membership, "{context}");
    let store_time = entries.iter().rev().find_map(|entry| match &entry.content {
        EntryContent::Commands { store_time, .. } => Some(*store_time),
        _ => None,
    });
    assert_eq!(applied.store_time, store_time.unwrap_or(StoreTime::default()), "{context}");
}

/// Some reads at some revision, present or past.
fn check_reads(model: &Model, machine: &KvStateMachine, rng: &mut Rng, context: &str) {
    let revision = rng.u64(..=model.revision);
    let context = format!("{context}, read at {revision}");
    let keys = if revision == 0 { model.keys.clone() } else { model.at(revision) };
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

#[test]
fn random_commands_are_answered_as_the_model_answers_them() {
    let seed = seed();
    for run in 0..40 {
        let seed = seed.wrapping_add(run);
        let (mut store, mut model) = (Store::default(), Model::default());
        for index in 1..=150 {
            let (entry, commands) = log_entry(seed, index);
            let effects = store.apply(&entry);
            let context = format!("seed {seed}, entry {index}");
            check_answers(&mut model, &commands, &effects.answers, &context);
            store.validate().expect(&context);
            assert_eq!(contents(&store), model.keys.values().cloned().collect::<Vec<_>>(), "{context}");
            assert!(effects.changes.windows(2).all(|pair| pair[0].revision <= pair[1].revision), "{context}");
            assert!(
                effects
                    .changes
                    .windows(2)
                    .all(|pair| { pair[0].revision < pair[1].revision || pair[0].key < pair[1].key }),
                "{context}"
            );
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
        let (entry, commands) = log_entry(seed, index);
        let answers = machine.apply(&entry).unwrap();
        let context = format!("seed {seed}, entry {index}");
        check_answers(&mut model, &commands, &answers, &context);
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
        let (entry, commands) = match index % 8 {
            1 => {
                let commands: Vec<_> = (0..6).map(|_| random::put_of(&mut rng, Bytes::from_static(&LARGE))).collect();
                (super::entry(index, &commands), commands)
            }
            3 | 6 => {
                let commands = vec![random::greedy_txn(&mut rng)];
                (super::entry(index, &commands), commands)
            }
            _ => log_entry(seed, index),
        };
        let answers = machine.apply(&entry).unwrap();
        let context = format!("seed {seed}, entry {index}");
        let too_large = Some(v1::command_reply::Reply::Error(KvError::AnswerTooLarge.into()));
        refused += decode(&answers).iter().filter(|answer| answer.reply == too_large).count();
        check_answers(&mut model, &commands, &answers, &context);
        assert!(contents(&machine.current()) == model.keys.values().cloned().collect::<Vec<_>>(), "{context}");
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
            let (entry, commands) = log_entry(seed, index);
            check_answers(&mut model, &commands, &machine.apply(&entry).unwrap(), &format!("seed {seed}"));
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
        machine.apply(&log_entry(seed, index).0).unwrap();
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
        let (entry, commands) = log_entry(seed, index);
        if index <= durable {
            commands.iter().for_each(|command| drop(model.apply(command)));
            continue;
        }
        if index == durable + 1 {
            check_state(&model, &machine, durable, seed);
        }
        let context = format!("seed {seed}, entry {index} after {durable}");
        check_answers(&mut model, &commands, &machine.apply(&entry).unwrap(), &context);
    }
    check_state(&model, &machine, last, seed);
    check_reads(&model, &machine, &mut Rng::with_seed(seed), &format!("seed {seed}, reopened at {durable}"));
}
