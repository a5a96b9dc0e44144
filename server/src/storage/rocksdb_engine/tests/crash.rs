//! The process dies, or the disk is full: what was acknowledged stays, and nothing half-written shows.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use super::*;

const WRITER: &str = "storage::rocksdb_engine::tests::crash::writes_until_killed_or_refused";
const ROUNDS: usize = 25;

/// What the parent tells its child by environment variables.
const DIRECTORY: &str = "CRASH_DIRECTORY";
const SEED: &str = "CRASH_SEED";
const WRITTEN: &str = "CRASH_WRITTEN";

/// Carries on the script where the last process left it, and tells of each write that it was acknowledged.
#[test]
#[ignore = "the child process of the tests below"]
fn writes_until_killed_or_refused() {
    let variable = |name| std::env::var(name).unwrap();
    let mut script = Script::new(variable(SEED).parse().unwrap());
    script.skip_to(variable(WRITTEN).parse().unwrap());
    let mut out = std::io::stdout();
    writeln!(out, "\nopening").unwrap();
    let engine = RocksDBStorageEngine::open_sized(Path::new(&variable(DIRECTORY)), SMALL).unwrap();
    loop {
        let (operations, durability) = script.next();
        if let Err(error) = engine.write(&operations, durability) {
            assert!(matches!(error, StorageError::Io { .. }), "{error:?}");
            for _ in 0..20 {
                assert!(engine.write(&[vote(1)], durability).is_err(), "acknowledged after {error}");
            }
            writeln!(out, "refused: {error}").unwrap();
            return;
        }
        writeln!(out, "acknowledged {}", script.written).unwrap();
    }
}

fn child(directory: &Path, seed: u64, written: usize) -> Vec<(&'static str, String)> {
    vec![(DIRECTORY, directory.to_str().unwrap().into()), (SEED, seed.to_string()), (WRITTEN, written.to_string())]
}

fn acknowledged(line: &str) -> Option<usize> {
    line.strip_prefix("acknowledged ").map(|number| number.parse().unwrap())
}

/// Opens what a process left and returns how many writes it holds: all acknowledged ones, and at most the one after.
fn check_left_behind(directory: &Path, script: &mut Script, acknowledged: usize, context: &str) {
    script.skip_to(acknowledged);
    let engine = RocksDBStorageEngine::open_sized(directory, SMALL).unwrap();
    if engine.state().unwrap() != script.model.state()
        || engine.read(LogIndex(0), LogIndex(u64::MAX), usize::MAX).unwrap() != script.model.records()
    {
        script.skip_to(acknowledged + 1);
    }
    let context = format!("{context}: {acknowledged} writes acknowledged, neither they nor one more are there");
    suite::assert_matches(&engine, &script.model, &mut Rng::with_seed(1), &context);
}

#[test]
fn a_killed_process_loses_nothing_acknowledged() {
    let seed = fastrand::u64(..);
    let mut rng = Rng::with_seed(seed);
    let root = tempfile::tempdir().unwrap();
    let mut script = Script::new(seed);
    for round in 0..ROUNDS {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", WRITER, "--ignored", "--nocapture"])
            .envs(child(root.path(), seed, script.written))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // 0: while it opens, recovering from the round before.
        let wait_for = if rng.u8(0..4) == 0 { 0 } else { rng.usize(1..120) };
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut last = script.written;
        let mut seen = 0;
        for line in lines.by_ref() {
            if let Some(number) = acknowledged(&line) {
                last = number;
                seen += 1;
            }
            if seen >= wait_for && (seen > 0 || line == "opening") {
                break;
            }
        }
        process.kill().unwrap();
        // What it still said before it died was acknowledged too.
        last = lines.filter_map(|line| acknowledged(&line)).last().unwrap_or(last);
        assert!(!process.wait().unwrap().success(), "seed {seed}, round {round}: ended by itself");
        check_left_behind(root.path(), &mut script, last, &format!("seed {seed}, round {round}"));
    }
    assert!(script.written > ROUNDS, "{} writes in {ROUNDS} rounds", script.written);
}

/// A limit on the size of files stands for the size of the disk: the system refuses to write on, in mid-record.
#[test]
fn a_full_disk_stops_every_later_write_and_loses_nothing_acknowledged() {
    for (seed, blocks) in [(fastrand::u64(..), 40), (fastrand::u64(..), 100), (fastrand::u64(..), 160)] {
        let root = tempfile::tempdir().unwrap();
        let limited = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
        let output = Command::new("sh")
            .args(["-c", &limited])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", WRITER, "--ignored", "--nocapture"])
            .envs(child(root.path(), seed, 0))
            .output()
            .unwrap();
        let context = format!("seed {seed}, {blocks} blocks: {output:?}");
        assert!(output.status.success(), "{context}");
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(said.lines().any(|line| line.starts_with("refused: write log in ")), "{context}");
        let last = said.lines().filter_map(acknowledged).next_back().unwrap_or(0);
        check_left_behind(root.path(), &mut Script::new(seed), last, &context);
    }
}
