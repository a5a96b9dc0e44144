//! Kills a process that applies entries, again and again, and looks at what it left.

use std::env;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use d_engine_proto::Revision;

use super::contents;
use super::model::Model;
use super::random::{log_entry, seed};
use crate::state_machine::StateMachine;
use crate::state_machine::kv::{KvStateMachine, ReadPoint};
use crate::storage::LogPosition;
use crate::storage::versions::VersionStore;

const DIRECTORY: &str = "D_ENGINE_TEST_CRASH_DIRECTORY";
const SEED: &str = "D_ENGINE_TEST_CRASH_SEED";
const ROUNDS: u32 = 8;

fn open(path: &Path) -> KvStateMachine {
    KvStateMachine::load(VersionStore::open_tiny(path).unwrap()).unwrap()
}

fn index_of(position: Option<LogPosition>) -> u64 {
    position.map_or(0, |position| position.index.get())
}

#[test]
fn a_killed_process_leaves_exactly_a_prefix_of_what_it_applied() {
    let seed = seed();
    let directory = tempfile::tempdir().unwrap();
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut durable_before = 0;
    for round in 0..ROUNDS {
        let reached = run_and_kill(directory.path(), seed, durable_before + rng.u64(50..600));
        let machine = open(directory.path());
        let durable = index_of(machine.applied().position);
        let context = format!("seed {seed}, round {round}, entry {durable} after {reached:?}");
        assert!(durable >= durable_before && durable >= reached.durable, "{context}");
        assert_eq!(machine.durable(), machine.applied().position, "{context}");

        let mut model = Model::default();
        for index in 1..=durable {
            model.apply(&log_entry(seed, index));
        }
        let store = machine.current();
        store.validate().expect(&context);
        assert_eq!(store.revision(), Revision(model.state.revision), "{context}");
        assert_eq!(contents(&store), model.state.keys.values().cloned().collect::<Vec<_>>(), "{context}");
        for _ in 0..20 {
            // The present was compared above.
            let revision = rng.u64(model.state.compacted..=model.state.revision);
            let ReadPoint::Past(past) = machine.at(Revision(revision)).unwrap() else { continue };
            let past = past.wait(std::time::Duration::ZERO).expect(&context);
            let keys = super::all_pages(|request| past.range(request).unwrap());
            assert_eq!(keys, model.at(revision).into_values().collect::<Vec<_>>(), "{context}, at {revision}");
        }
        durable_before = durable;
    }
    assert!(durable_before > 0, "no round made anything durable, so nothing was shown");
}

/// The last entries that a child said it had applied and made durable.
#[derive(Debug, Default)]
struct Reached {
    applied: u64,
    durable: u64,
}

/// Runs [`child`] in a process of its own until it has applied `target`, then kills it.
fn run_and_kill(directory: &Path, seed: u64, target: u64) -> Reached {
    let name = module_path!().split_once("::").unwrap().1;
    let mut process = Command::new(env::current_exe().unwrap())
        .args(["--exact", &format!("{name}::child"), "--ignored", "--nocapture"])
        .env(DIRECTORY, directory)
        .env(SEED, seed.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut reached = Reached::default();
    for line in BufReader::new(process.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if let Some((applied, durable)) = line.strip_prefix("applied ").and_then(|rest| rest.split_once(" durable ")) {
            reached = Reached { applied: applied.parse().unwrap(), durable: durable.parse().unwrap() };
        }
        if reached.applied >= target {
            break;
        }
    }
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(reached.applied >= target, "the child ended by itself");
    reached
}

/// Applies the log from where the directory stands, until killed.
#[test]
#[ignore = "the process that a_killed_process_leaves_exactly_a_prefix_of_what_it_applied kills"]
fn child() {
    let directory = env::var(DIRECTORY).expect("started by the test that kills it");
    let seed = env::var(SEED).unwrap().parse().unwrap();
    let machine = open(Path::new(&directory));
    for index in index_of(machine.applied().position) + 1.. {
        machine.apply(&log_entry(seed, index)).unwrap();
        println!("applied {index} durable {}", index_of(machine.durable()));
    }
}
