//! The sessions that the documents show are run, command by command, and print what is shown.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step ends the test")]

use std::path::{Path, PathBuf};
use std::process::Command;

use d_engine_tests::transcript::{Exchange, run, session};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").to_owned()
}

#[track_caller]
fn is_true(document: &str, directory: &Path) {
    let path = root().join(document);
    let exchanges = session(&std::fs::read_to_string(&path).unwrap());
    assert!(!exchanges.is_empty(), "{document} shows no session");
    let differences = run(&exchanges, directory);
    assert!(differences.is_empty(), "{document} shows what is not so:\n{}", differences.join("\n"));
}

#[test]
fn the_session_of_the_readme_is_true() {
    let directory = tempfile::tempdir().unwrap();
    is_true("README.md", directory.path());
}

#[test]
fn the_session_of_the_quick_start_is_true() {
    let directory = tempfile::tempdir().unwrap();
    is_true("docs/quick-start-standalone.md", directory.path());
}

#[test]
fn the_example_of_three_nodes_does_what_its_readme_shows() {
    // A copy, so that the tree stays as it is; by its other name, so that this one works too.
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("three-nodes-cluster");
    let source = root().join("examples/three-nodes-cluster/.");
    let copied = Command::new("cp").arg("-r").args([&source, &copy]).status().unwrap();
    assert!(copied.success());
    for leftover in ["data", "logs", "run"] {
        let _ = std::fs::remove_dir_all(copy.join(leftover));
    }
    is_true("examples/three-nodes-standalone/README.md", &copy);
    assert!(!copy.join("data").exists() && !copy.join("logs").exists(), "`make clean` left something");
}

#[test]
fn a_session_that_lies_is_seen() {
    let directory = tempfile::tempdir().unwrap();
    let exchange = |command: &str, expected: &str| Exchange {
        command: command.to_owned(),
        expected: expected.lines().map(str::to_owned).collect(),
    };
    let truth = [exchange("x=1", ""), exchange("echo $x; echo 2", "1\n2")];
    assert_eq!(run(&truth, directory.path()), Vec::<String>::new());
    let lie = [exchange("echo 1", "2"), exchange("exit 3", ""), exchange("echo 3", "3")];
    assert_eq!(run(&lie, directory.path()).len(), 2);
}
