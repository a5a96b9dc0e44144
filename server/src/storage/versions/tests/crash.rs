//! Kills a process that writes a history with compactions, again and again, and looks at what it left.

use std::env;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use super::script::{Contents, Script};
use super::*;

const DIRECTORY: &str = "D_ENGINE_TEST_VERSIONS_DIRECTORY";
const SEED: &str = "D_ENGINE_TEST_VERSIONS_SEED";
const ROUNDS: u32 = 12;

fn index_of(position: Option<LogPosition>) -> u64 {
    position.map_or(0, |position| position.index.get())
}

#[test]
fn a_killed_process_leaves_state_records_index_and_versions_of_one_submission() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let directory = tempfile::tempdir().unwrap();
    let mut durable_before = 0;
    for round in 0..ROUNDS {
        let reached = run_and_kill(directory.path(), seed, durable_before + rng.u64(20..400));
        let store = VersionStore::open_tiny(directory.path()).unwrap();
        let durable = index_of(store.recovered().position);
        let context = format!("seed {seed}, round {round}, submission {durable}");
        assert!(durable >= reached && durable >= durable_before, "{context}: {reached} was durable");
        let script = Script::at(seed, store.recovered().position);
        assert_eq!(*store.recovered(), script.state, "{context}");
        let records: BTreeMap<_, _> = store.recovered_records().unwrap().into_iter().collect();
        assert_eq!(records, script.records, "{context}");
        script.check(&store, &mut rng, &context);
        script.check_clean(&Contents::when_clean(&store, script.state.compacted), &context);
        script.check(&store, &mut rng, &context);
        durable_before = durable;
    }
    assert!(durable_before > 0, "no round made anything durable, so nothing was shown");
}

/// Runs [`child`] in a process of its own until it has submitted `target`, then kills it. Answers what it said was
/// durable.
fn run_and_kill(directory: &Path, seed: u64, target: u64) -> u64 {
    let name = module_path!().split_once("::").unwrap().1;
    let mut process = Command::new(env::current_exe().unwrap())
        .args(["--exact", &format!("{name}::child"), "--ignored", "--nocapture"])
        .env(DIRECTORY, directory)
        .env(SEED, seed.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut durable = 0;
    let mut submitted = 0;
    for line in BufReader::new(process.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if let Some(numbers) = line.strip_prefix("submitted ").and_then(|rest| rest.split_once(" durable ")) {
            (submitted, durable) = (numbers.0.parse().unwrap(), numbers.1.parse().unwrap());
        }
        if submitted >= target {
            break;
        }
    }
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(submitted >= target, "the child ended by itself");
    durable
}

/// Goes on with the script from where the directory stands, until killed.
#[test]
#[ignore = "the process that a_killed_process_leaves_state_records_index_and_versions_of_one_submission kills"]
fn child() {
    let directory = env::var(DIRECTORY).expect("started by the test that kills it");
    let seed = env::var(SEED).unwrap().parse().unwrap();
    let store = VersionStore::open_tiny(Path::new(&directory)).unwrap();
    let mut script = Script::at(seed, store.recovered().position);
    loop {
        store.submit(script.next()).unwrap();
        println!("submitted {} durable {}", index_of(script.state.position), index_of(store.durable()));
    }
}
