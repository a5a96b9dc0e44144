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
fn the_sessions_of_the_guides_are_true() {
    for guide in ["watch", "leases-and-locks", "service-discovery"] {
        let directory = tempfile::tempdir().unwrap();
        is_true(&format!("docs/{guide}.md"), directory.path());
    }
}

/// The guide's own commands, on the configurations of the example.
#[test]
fn the_session_of_scaling_one_to_three_is_true() {
    let directory = tempfile::tempdir().unwrap();
    copy("single-node-expansion", directory.path());
    is_true("docs/scaling-one-to-three.md", directory.path());
}

/// Copies an example, so that the tree stays as it is, without what a run has left there.
fn copy(example: &str, to: &Path) {
    let source = root().join("examples").join(example).join(".");
    let copied = Command::new("cp").arg("-r").args([&source, to]).status().unwrap();
    assert!(copied.success());
    for leftover in ["data", "logs", "run"] {
        let _ = std::fs::remove_dir_all(to.join(leftover));
    }
}

#[test]
fn the_example_of_service_discovery_does_what_its_readme_shows() {
    let directory = tempfile::tempdir().unwrap();
    copy("three-nodes-standalone", &directory.path().join("three-nodes-standalone"));
    let example = directory.path().join("service-discovery");
    copy("service-discovery", &example);
    is_true("examples/service-discovery/README.md", &example);
}

#[test]
fn the_example_of_three_nodes_does_what_its_readme_shows() {
    let directory = tempfile::tempdir().unwrap();
    // By its other name, so that this one works too.
    let example = directory.path().join("three-nodes-cluster");
    copy("three-nodes-cluster", &example);
    is_true("examples/three-nodes-standalone/README.md", &example);
    assert!(!example.join("data").exists() && !example.join("logs").exists(), "`make clean` left something");
}

#[test]
fn the_example_of_tls_does_what_its_readme_shows() {
    let directory = tempfile::tempdir().unwrap();
    let example = directory.path().join("tls");
    copy("tls", &example);
    is_true("examples/tls/README.md", &example);
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
