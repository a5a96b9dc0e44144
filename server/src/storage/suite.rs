//! What every [`StorageEngine`] must do, as one function that panics where an engine does not.
//!
//! An application that brings its own engine calls [`run`] from a test. It cannot show what survives a kill or a power
//! cut: that needs processes and disks of its own.

mod model;

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use d_engine_proto::{LogIndex, NodeId, Term};
use fastrand::Rng;

pub(super) use model::Model;

use super::{
    Durability, Identity, LogPosition, LogRecord, StorageEngine, StorageError, StorageOperation, StorageState, Vote,
};

/// How the suite comes by engines.
pub trait Subject {
    /// The engine under test.
    type Engine: StorageEngine;

    /// Makes an engine that holds nothing and shares nothing with any other.
    fn empty(&mut self) -> Self::Engine;

    /// Closes the engine and opens what it left behind.
    fn reopen(&mut self, engine: Self::Engine) -> Self::Engine;
}

/// Checks all of the contract; random parts follow from `seed`, which every complaint names.
///
/// # Panics
/// When the engine breaks it.
pub fn run<S: Subject>(subject: &mut S, seed: u64) {
    holds_nothing_at_first(subject);
    keeps_what_is_saved(subject);
    reads_what_was_appended(subject);
    stops_reading_at_bytes_max(subject);
    truncates(subject);
    purges(subject);
    looks_up_what_the_same_write_appended(subject);
    refuses_holes_and_then_everything(subject);
    follows_the_model(subject, seed, 400, 0.02);
    follows_the_model(subject, seed.wrapping_add(1), 60, 1.0);
    reads_whole_writes_while_writing(subject, seed);
}

/// Checks that an engine holds exactly what the model does, by its state, a read of everything and random reads.
pub(super) fn assert_matches(engine: &impl StorageEngine, model: &Model, rng: &mut Rng, context: &str) {
    assert_eq!(state(engine), model.state(), "{context}: state");
    let all = read(engine, 0, u64::MAX, usize::MAX);
    assert!(all == model.records(), "{context}: holds other records than it should");
    let end = model.state().last.map_or(1, |last| last.index.get() + 2);
    for _ in 0..4 {
        let (start, end, bytes_max) = (rng.u64(0..=end), rng.u64(0..=end), rng.usize(0..2000));
        let expected = model.read(LogIndex(start), LogIndex(end), bytes_max);
        assert!(
            read(engine, start, end, bytes_max) == expected,
            "{context}: read {start}..{end} up to {bytes_max} bytes"
        );
    }
}

fn holds_nothing_at_first<S: Subject>(subject: &mut S) {
    let engine = subject.empty();
    assert_eq!(state(&engine), StorageState::default());
    assert_eq!(read(&engine, 0, u64::MAX, usize::MAX), []);
    let engine = subject.reopen(engine);
    assert_eq!(state(&engine), StorageState::default());
    assert_eq!(read(&engine, 0, u64::MAX, usize::MAX), []);
}

fn keeps_what_is_saved<S: Subject>(subject: &mut S) {
    let mut engine = subject.empty();
    let mut expected = StorageState::default();
    for (term, cluster_id) in [(1, None), (2, Some(0)), (u64::MAX, Some(u64::MAX))] {
        let vote = Vote { term: Term(term), node_id: NodeId(u32::MAX), committed: term == 2 };
        let identity = Identity { node_id: NodeId(1), incarnation: term, cluster_id };
        let committed = position(term, term);
        for durability in [Durability::Fsync, Durability::OperatingSystem] {
            for operation in [
                StorageOperation::SaveVote(vote),
                StorageOperation::SaveIdentity(identity),
                StorageOperation::SaveCommitted(committed),
            ] {
                succeed(engine.write(&[operation], durability));
            }
        }
        expected = StorageState { vote: Some(vote), identity: Some(identity), committed: Some(committed), ..expected };
        assert_eq!(state(&engine), expected);
        engine = subject.reopen(engine);
        assert_eq!(state(&engine), expected);
    }
}

fn reads_what_was_appended<S: Subject>(subject: &mut S) {
    let mut engine = subject.empty();
    // Where an encoding of indices might stop being in their order; and an entry larger than any buffer.
    for index in 250..260 {
        write(&engine, [append(1, index, &vec![0; if index == 255 { 5 << 20 } else { 3 }])]);
    }
    for reopened in [false, true] {
        if reopened {
            engine = subject.reopen(engine);
        }
        assert_eq!(state(&engine).last, Some(position(1, 259)));
        for (start, end, expected) in [
            (0, u64::MAX, 250..260),
            (250, 260, 250..260),
            (255, 257, 255..257),
            (259, 260, 259..260),
            (0, 251, 250..251),
            (0, 250, 0..0),
            (260, u64::MAX, 0..0),
            (255, 255, 0..0),
            (257, 255, 0..0),
        ] {
            let indices: Vec<_> = read(&engine, start, end, usize::MAX).iter().map(index_of).collect();
            assert_eq!(indices, expected.collect::<Vec<_>>(), "read {start}..{end}, reopened: {reopened}");
        }
        assert_eq!(read(&engine, 255, 256, usize::MAX)[0].payload.len(), 5 << 20);
    }

    let engine = subject.empty();
    write(&engine, [append(1, u64::MAX - 1, b"late")]);
    let engine = subject.reopen(engine);
    assert_eq!(read(&engine, 0, u64::MAX, usize::MAX).len(), 1);
}

fn stops_reading_at_bytes_max<S: Subject>(subject: &mut S) {
    let engine = subject.empty();
    for (index, length) in [(1, 10), (2, 0), (3, 10), (4, 10)] {
        write(&engine, [append(1, index, &vec![7; length])]);
    }
    for (start, bytes_max, expected) in
        [(1, 0, 1), (1, 1, 1), (1, 10, 1), (1, 11, 3), (1, 20, 3), (1, 21, 4), (1, usize::MAX, 4), (2, 0, 1), (2, 1, 2)]
    {
        assert_eq!(read(&engine, start, 9, bytes_max).len(), expected, "from {start} up to {bytes_max} bytes");
    }
}

fn truncates<S: Subject>(subject: &mut S) {
    let after = |index| StorageOperation::TruncateAfter(index);
    for (index, expected) in [
        (Some(9), 5..=9),
        (Some(100), 5..=9),
        (Some(8), 5..=8),
        (Some(5), 5..=5),
        (Some(4), empty_range()),
        (Some(0), empty_range()),
        (None, empty_range()),
    ] {
        let engine = subject.empty();
        for index in 5..10 {
            write(&engine, [append(index, index, b"old")]);
        }
        write(&engine, [after(index.map(LogIndex))]);
        let last = expected.clone().last().map(|last| position(last, last));
        let engine = subject.reopen(engine);
        assert_eq!(state(&engine).last, last, "truncated after {index:?}");
        let held: Vec<_> = read(&engine, 0, 100, usize::MAX).iter().map(index_of).collect();
        assert_eq!(held, expected.collect::<Vec<_>>(), "truncated after {index:?}");

        // What comes in its place is what is read.
        let next = last.map_or(5, |last| last.index.get() + 1);
        write(&engine, [append(99, next, b"new")]);
        let engine = subject.reopen(engine);
        assert_eq!(state(&engine).last, Some(position(99, next)));
        assert_eq!(read(&engine, next, 100, usize::MAX), [record(99, next, b"new")]);
    }
}

fn purges<S: Subject>(subject: &mut S) {
    for (index, expected) in [(3, 5..=9), (5, 6..=9), (8, 9..=9), (9, empty_range()), (50, empty_range())] {
        let engine = subject.empty();
        for index in 5..10 {
            write(&engine, [append(1, index, b"entry")]);
        }
        write(&engine, [StorageOperation::PurgeTo(position(7, index))]);
        let engine = subject.reopen(engine);
        assert_eq!(state(&engine).purged, Some(position(7, index)));
        let held: Vec<_> = read(&engine, 0, 100, usize::MAX).iter().map(index_of).collect();
        assert_eq!(held, expected.clone().collect::<Vec<_>>(), "purged to {index}");
        assert_eq!(state(&engine).last, expected.clone().last().map(|last| position(1, last)));

        // Never back; and the log goes on behind it, after a gap if it is empty.
        write(&engine, [StorageOperation::PurgeTo(position(9, index - 1))]);
        assert_eq!(state(&engine).purged, Some(position(7, index)));
        let next = expected.last().map_or(index + 10, |last| last + 1);
        write(&engine, [append(8, next, b"next")]);
        let engine = subject.reopen(engine);
        assert_eq!(state(&engine).last, Some(position(8, next)));
        assert_eq!(read(&engine, next, 100, usize::MAX), [record(8, next, b"next")]);
    }
}

fn looks_up_what_the_same_write_appended<S: Subject>(subject: &mut S) {
    let engine = subject.empty();
    write(&engine, [append(1, 1, b"a"), append(1, 2, b"b"), append(1, 3, b"c")]);
    let operations = [
        StorageOperation::TruncateAfter(Some(LogIndex(1))),
        append(2, 2, b"B"),
        append(3, 3, b"C"),
        append(3, 4, b"D"),
        StorageOperation::TruncateAfter(Some(LogIndex(2))),
        StorageOperation::PurgeTo(position(1, 1)),
    ];
    succeed(engine.write(&operations, Durability::Fsync));
    let engine = subject.reopen(engine);
    assert_eq!(state(&engine).last, Some(position(2, 2)));
    assert_eq!(read(&engine, 0, 100, usize::MAX), [record(2, 2, b"B")]);
}

fn refuses_holes_and_then_everything<S: Subject>(subject: &mut S) {
    for refused in [4, 3, 2, 1, 0, 6] {
        let mut engine = subject.empty();
        write(&engine, [append(1, 3, b"kept"), append(1, 4, b"kept"), StorageOperation::PurgeTo(position(1, 3))]);
        let before = state(&engine);
        let operations = [
            StorageOperation::SaveVote(Vote { term: Term(9), node_id: NodeId(1), committed: true }),
            append(2, 5, b"not kept"),
            StorageOperation::TruncateAfter(Some(LogIndex(4))),
            append(2, refused, b"refused"),
        ];
        let error = engine.write(&operations, Durability::Fsync).err();
        assert!(matches!(error, Some(StorageError::Refused { .. })), "entry {refused} after 4: {error:?}");
        assert!(engine.write(&[append(1, 5, b"good")], Durability::Fsync).is_err(), "a write after a failed one");
        assert!(engine.sync().is_err(), "a sync after a failed write");
        engine = subject.reopen(engine);
        assert_eq!(state(&engine), before, "refused {refused}");
        assert_eq!(read(&engine, 0, 100, usize::MAX), [record(1, 4, b"kept")], "refused {refused}");
        write(&engine, [append(1, 5, b"good")]);

        // In an empty log, only what was purged is out of bounds.
        write(&engine, [StorageOperation::PurgeTo(position(1, 9))]);
        assert!(engine.write(&[append(2, 9, b"refused")], Durability::Fsync).is_err(), "a purged index");
    }
}

fn follows_the_model<S: Subject>(subject: &mut S, seed: u64, steps: usize, reopen_probability: f64) {
    let mut rng = Rng::with_seed(seed);
    let mut model = Model::default();
    let mut engine = subject.empty();
    for step in 0..steps {
        let context = format!("seed {seed}, step {step} of {steps}");
        let operations = model.random_write(&mut rng);
        let durability = if rng.bool() { Durability::Fsync } else { Durability::OperatingSystem };
        let written = engine.write(&operations, durability);
        assert!(written.is_ok(), "{context}: {written:?}");
        if rng.u8(0..8) == 0 {
            succeed(engine.sync());
        }
        assert_matches(&engine, &model, &mut rng, &context);
        if rng.f64() < reopen_probability {
            engine = subject.reopen(engine);
            assert_matches(&engine, &model, &mut rng, &format!("{context}, reopened"));
        }
    }
}

/// Every write replaces the whole log by three entries of its own term: a read that mixes two writes shows.
fn reads_whole_writes_while_writing<S: Subject>(subject: &mut S, seed: u64) {
    let engine = subject.empty();
    write(&engine, (1..=3).map(|index| append(1, index, b"")));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let records = read(&engine, 0, u64::MAX, usize::MAX);
                let terms: Vec<_> = records.iter().map(|record| record.position.term).collect();
                assert_eq!(records.len(), 3, "seed {seed}: {terms:?}");
                assert!(terms.iter().all(|term| *term == terms[0]), "seed {seed}: {terms:?}");
            }
        });
        let mut rng = Rng::with_seed(seed);
        for term in 2..300 {
            let base = rng.u64(0..1 << 40);
            let mut operations = vec![StorageOperation::TruncateAfter(None)];
            operations.extend((0..3).map(|offset| append(term, base + offset, b"")));
            let written = engine.write(&operations, Durability::OperatingSystem);
            if written.is_err() || term == 299 {
                done.store(true, Ordering::Relaxed);
            }
            succeed(written);
        }
    });
}

fn empty_range() -> std::ops::RangeInclusive<u64> {
    #[expect(clippy::reversed_empty_ranges, reason = "the shortest way to write a range that holds nothing")]
    let range = 1..=0;
    range
}

fn position(term: u64, index: u64) -> LogPosition {
    LogPosition { term: Term(term), index: LogIndex(index) }
}

fn record(term: u64, index: u64, payload: &[u8]) -> LogRecord {
    LogRecord { position: position(term, index), payload: Bytes::copy_from_slice(payload) }
}

fn append(term: u64, index: u64, payload: &[u8]) -> StorageOperation {
    StorageOperation::Append(record(term, index, payload))
}

fn index_of(record: &LogRecord) -> u64 {
    record.position.index.get()
}

fn state(engine: &impl StorageEngine) -> StorageState {
    succeed(engine.state())
}

fn read(engine: &impl StorageEngine, start: u64, end: u64, bytes_max: usize) -> Vec<LogRecord> {
    succeed(engine.read(LogIndex(start), LogIndex(end), bytes_max))
}

fn write(engine: &impl StorageEngine, operations: impl IntoIterator<Item = StorageOperation>) {
    for operation in operations {
        succeed(engine.write(&[operation], Durability::OperatingSystem));
    }
}

#[expect(clippy::panic, reason = "the suite reports by panicking, as tests do")]
fn succeed<T>(result: Result<T, StorageError>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("{error}"),
    }
}
