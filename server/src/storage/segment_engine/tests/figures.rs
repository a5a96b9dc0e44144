//! How long a write takes that is on the disk when it returns, for both engines: a measurement, not a test.

use std::time::{Duration, Instant};

use super::*;

const ROUNDS: usize = 6;
const PER_ROUND: Duration = Duration::from_millis(700);
const PAYLOAD_BYTES: usize = 300;

/// Microseconds of each write of `group` entries, for a while.
fn measure(engine: &dyn StorageEngine, group: u64, next: &mut u64, times: &mut Vec<u128>) {
    let start = Instant::now();
    while start.elapsed() < PER_ROUND {
        let append = |index| {
            let position = LogPosition { term: Term(1), index: LogIndex(index) };
            let payload = Bytes::from_static(&[7; PAYLOAD_BYTES]);
            StorageOperation::Append(LogRecord { position, payload })
        };
        let operations: Vec<_> = (*next..*next + group).map(append).collect();
        *next += group;
        let begun = Instant::now();
        engine.write(&operations, Durability::Fsync).unwrap();
        times.push(begun.elapsed().as_micros());
    }
}

#[test]
#[ignore = "a measurement: run it alone, with --nocapture"]
fn figures_of_both_engines() {
    for group in [1, 64, 1000] {
        let root = tempfile::tempdir_in(std::env::var("FIGURES_DIRECTORY").unwrap_or("/tmp".into())).unwrap();
        let engines: [Box<dyn StorageEngine>; 2] = [
            Box::new(RocksDBStorageEngine::open(root.path().join("rocksdb")).unwrap()),
            Box::new(SegmentStorageEngine::open(root.path().join("segments")).unwrap()),
        ];
        let mut next = [1, 1];
        let mut times = [Vec::new(), Vec::new()];
        // Turn and turn about, since the machine's speed changes.
        for _ in 0..ROUNDS {
            for (place, engine) in engines.iter().enumerate() {
                measure(engine.as_ref(), group, &mut next[place], &mut times[place]);
            }
        }
        for (name, times) in ["RocksDB", "Segments"].iter().zip(&mut times) {
            times.sort_unstable();
            let at = |part: usize| times[times.len() * part / 1000];
            let mean = times.iter().sum::<u128>() / times.len() as u128;
            println!(
                "{name:9} {group:5} entries: mean {mean} µs, p50 {} µs, p99 {} µs, {} writes",
                at(500),
                at(990),
                times.len()
            );
        }
    }
}
