//! The examples in the documentation of the crates run, against a real cluster.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step ends the test")]

use std::path::Path;
use std::process::Command;

use d_engine_tests::cluster::Cluster;

/// Runs what `cargo test --doc` runs, which needs a server: `scripts/test` leaves it to this test.
#[tokio::test(flavor = "multi_thread")]
async fn every_example_of_the_documentation_runs() {
    let cluster = Cluster::start(3).await;
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .args(["test", "--doc", "--workspace", "--locked"])
        .env("D_ENGINE_ENDPOINTS", cluster.addresses().join(","))
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace"));
    let output = tokio::task::spawn_blocking(move || cargo.output()).await.unwrap().expect("cargo runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let examples =
        text.lines().filter(|line| line.starts_with("test client-rust/") && line.ends_with("... ok")).count();
    assert!(examples > 25, "only {examples} examples of the client ran:\n{text}");
    // That one would need certificates; tests/tests/tls.rs has them.
    let unrun = |line: &&str| line.contains("- compile") && !line.contains("tls::TlsOptions");
    assert_eq!(text.lines().find(unrun), None, "an example does not run:\n{text}");
    assert!(!text.contains("... ignored"), "an example is not even compiled:\n{text}");
}
