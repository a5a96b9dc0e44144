//! The program runs, and a second time on the data of the first.
#![allow(clippy::unwrap_used, reason = "a failed step ends the test")]

use std::path::Path;

use d_engine_tests::process::{Process, bound_to_this_thread};
use d_engine_tests::wait::PATIENCE;

#[tokio::test]
async fn the_smallest_program_runs_twice() {
    let directory = tempfile::tempdir().unwrap();
    for run in 1..=2 {
        let mut command = bound_to_this_thread(Path::new(env!("CARGO_BIN_EXE_d-engine-example-quick-start-embedded")));
        command.current_dir(&directory);
        let mut program = Process::start(command, &directory.path().join(format!("run-{run}")));
        assert!(program.exit(PATIENCE).await.success(), "{}", program.output());
        let output = program.output();
        let lines: Vec<&str> = output.lines().collect();
        assert!(lines[0].starts_with("node 1 leads in term "), "{output}");
        assert_eq!(lines[1..], ["greeting is hello", "changed: greeting = hello"], "{output}");
        assert!(directory.path().join("db").is_dir());
    }
}
