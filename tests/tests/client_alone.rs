//! The client on its own pulls in no server code, and what it pulls in is written down.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step ends the test")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

const DOCUMENT: &str = "docs/client-dependencies.md";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").to_owned()
}

/// Names of the crates that the facade needs with one feature, itself included.
fn dependencies(feature: &str) -> BTreeSet<String> {
    let tree = ["tree", "-p", "d-engine", "--no-default-features", "--features", feature];
    let output = Command::new(env!("CARGO"))
        .args(tree)
        .args(["--edges", "normal", "--prefix", "none", "--format", "{p}", "--locked"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

#[test]
fn the_client_alone_brings_what_is_listed_and_no_server_code() {
    let found = dependencies("client");
    for server in ["d-engine-server", "openraft", "rocksdb", "librocksdb-sys", "axum"] {
        assert!(!found.contains(server), "the client alone pulls in {server}");
    }
    assert!(dependencies("server").contains("openraft"), "cargo's tree is read wrongly");

    let document = std::fs::read_to_string(root().join(DOCUMENT)).expect(DOCUMENT);
    let listed = document.split("```text\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a list");
    let listed: BTreeSet<String> = listed.split_whitespace().map(str::to_owned).collect();
    let is = found.iter().map(String::as_str).collect::<Vec<_>>().join(" ");
    assert_eq!(found, listed, "{DOCUMENT} lists something else than what cargo needs:\n{is}");
}
